"""vLLM's own verdict on `vllm serve` lines: its parser, its command and its configuration classes, up to the point
where it would start processes.

Runs in vLLM's environment. Without a GPU three things stand in: the platform (NVIDIA GPUs of the kind that the
question names), torchvision, and the kernels' extension module.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import os
import sys
import types
from typing import Any

import answering
import stand_ins

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CONFIGURE_LOGGING": "1"}
if importlib.util.find_spec("torchvision") is None:
    stand_ins.install("torchvision")

import vllm.platforms as vllm_platforms
from vllm.platforms.cpu import CpuPlatform

# One object for all modules that take the platform when they are imported: its class changes once the models are
# known, because what a model can do is asked of its class, and importing that for a GPU would ask for kernels.
PLATFORM = CpuPlatform()
vllm_platforms._current_platform = PLATFORM

import vllm  # noqa: E402
import vllm.logger as vllm_logger  # noqa: E402
from vllm.entrypoints.cli import serve  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.usage.usage_lib import UsageContext  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

ARCHITECTURES = os.environ.get("JUDGE_ARCHITECTURES", "").split()
GPU: dict[str, Any] = {}


def _gpu_platform() -> type:
    """NVIDIA GPUs as the question describes them; kernels are not there, so nothing can be run."""
    sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("vllm._C_stable_libtorch"))
    cuda = importlib.import_module("vllm.platforms.cuda")

    class StandInCudaPlatform(cuda.CudaPlatformBase):  # type: ignore[misc, name-defined]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            major, minor = GPU["compute_capability"].split(".")
            return DeviceCapability(int(major), int(minor))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "stand-in"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return int(GPU["memory_mib"]) << 20

        @classmethod
        def device_count(cls) -> int:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            return len(visible.split(",")) if visible else int(GPU["count"])

        @classmethod
        def get_cuda_runtime_major(cls) -> int:
            return 13

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 78

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return True

        @classmethod
        def is_integrated_gpu(cls, device_id: int = 0) -> bool:
            return False

    return StandInCudaPlatform


def _check_configuration(args: Any, headless: bool = False) -> Any:
    """What `vllm serve` does before it starts a process."""
    if not headless:
        _module_of("validate_api_server_args").validate_api_server_args(args)
    engine_args = vllm.AsyncEngineArgs.from_cli_args(args)
    if GPU.get("platform") not in ("cpu", "cuda"):
        return None  # no platform stands in for these GPUs: the arguments alone are judged
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=headless)
    if headless and engine_args.data_parallel_hybrid_lb:
        raise ValueError("data_parallel_hybrid_lb is not applicable in headless mode")
    FOUND.append(config)
    return config


def _module_of(function: str) -> Any:
    """The module of a function that moves from release to release."""
    for name in ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.launcher"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if hasattr(module, function):
            return module
    raise RuntimeError(f"vLLM {vllm.__version__} has {function} somewhere else; tell this judge where")


async def _run_server(args: Any, **_more: Any) -> None:
    _check_configuration(args)


def _clear() -> None:
    for name in ("_print_warning_once", "_print_error_once"):
        getattr(vllm_logger, name).cache_clear()
    getattr(importlib.import_module("vllm.envs"), "disable_envs_cache", lambda: None)()


FOUND: list[Any] = []
serve.run_server = _run_server
serve.run_multi_api_server = _check_configuration
serve.run_headless = lambda args: _check_configuration(args, headless=True)
serve.run_dp_supervisor = _check_configuration


def main() -> None:
    """Judge."""
    registry._run_in_subprocess = lambda function: function()
    for name in ARCHITECTURES:
        registry.ModelRegistry._try_inspect_model_cls(name)
    importlib.import_module("vllm.v1.worker.worker_base")
    # Triton comes with PyTorch for GPUs; without it vLLM would fall back to its older model runner.
    importlib.import_module("vllm.config.vllm").HAS_TRITON = True
    # Which kernels there are is asked when the modules of the number formats are imported, all of them at once.
    importlib.import_module("vllm.model_executor.layers.quantization").get_quantization_config("fp8")
    gpu_platform: type | None = None
    command = serve.ServeSubcommand()

    @functools.lru_cache(maxsize=1)
    def parsers(_surroundings: str) -> tuple[Any, Any]:
        """vLLM's parser and its `serve`'s, whose defaults follow from the variables and the platform."""
        parser = FlexibleArgumentParser(prog="vllm")
        return parser, command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))

    def examine(argv: list[str], gpu: dict[str, Any]) -> dict[str, Any]:
        nonlocal gpu_platform
        GPU.clear()
        GPU.update(gpu)
        if gpu["platform"] == "cuda":
            gpu_platform = gpu_platform or _gpu_platform()
            PLATFORM.__class__ = gpu_platform  # type: ignore[assignment]
        parser, serve_parser = parsers(answering.surroundings(gpu))
        if argv == ["flags"]:
            return {"flags": answering.flags_of(serve_parser)}
        # A parser hands out its defaults, and later steps write into them.
        args = copy.deepcopy(parser.parse_args(argv))
        answering.warn_of_abbreviations(argv, serve_parser)
        command.validate(args)
        FOUND.clear()
        command.cmd(args)
        if not FOUND:
            return {}
        config = FOUND[-1]
        return {
            "parallel_hash": str(config.parallel_config.compute_hash()),
            "world_size": config.parallel_config.world_size,
            "local_world_size": config.parallel_config.local_world_size,
            "max_model_len": config.model_config.max_model_len,
            "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "shutdown_timeout": getattr(config, "shutdown_timeout", None),
            "speculative": getattr(config.speculative_config, "method", None),
            "quantization": config.model_config.quantization,
            "multimodal": config.model_config.multimodal_config is not None
            and not config.model_config.multimodal_config.language_model_only,
        }

    answering.answer_all("vllm serve", vllm.__version__, ["vllm", "transformers"], examine, _clear)


if __name__ == "__main__":
    main()
