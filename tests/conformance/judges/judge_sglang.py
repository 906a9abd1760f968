"""SGLang's own verdict on `sglang serve` lines: its parser and all of its argument resolution.

Runs in an environment that has what importing SGLang's argument modules needs. Without a GPU two packages stand in,
triton and torchvision, and the device is named on the line, since there is none to be found.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from typing import Any

import answering
import stand_ins

os.environ |= {"HF_HUB_OFFLINE": "1"}

import torch._dynamo
import torch._inductor
import torch.utils.flop_counter  # noqa: F401

stand_ins.install("triton", "torchvision")

import sglang  # noqa: E402
from sglang.srt.arg_groups import kv_shard_hook, memory_hook, pipeline  # noqa: E402, F401 - warnings of the import
from sglang.srt.arg_groups.overrides import resolved_view  # noqa: E402
from sglang.srt.runtime_context import override_platform  # noqa: E402
from sglang.srt.server_args import ServerArgs, prepare_server_args  # noqa: E402

MEMORY_MIB: list[int | None] = [None]
memory_hook.get_device_memory_capacity = lambda device=None: MEMORY_MIB[0]
kv_shard_hook.get_device_memory_capacity = memory_hook.get_device_memory_capacity


def _platform(gpu: dict[str, Any]) -> dict[str, Any]:
    """The question's GPUs in the words of SGLang, which has a way to say what a machine is."""
    major, minor = (int(part) for part in gpu.get("compute_capability", "0.0").split("."))
    return {
        "is_cuda": gpu["platform"] == "cuda",
        "is_hip": gpu["platform"] == "rocm",
        "is_sm90": major == 9,
        "is_sm100": major == 10,
        "is_sm100_or_sm110": major in {10, 11},
        "is_sm110": major == 11,
        "is_sm120": major == 12,
        "is_blackwell": major in {10, 11, 12},
        "is_hopper_with_cuda_12_3": major == 9,
        "has_flashinfer": gpu["platform"] == "cuda",
        "device_sm": major * 10 + minor,
        "device_capability": (major, minor),
    }


@functools.cache
def _own_parser() -> argparse.ArgumentParser:
    """SGLang's parser, to look at its flags; it is asked nothing."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def _examine(argv: list[str], gpu: dict[str, Any]) -> dict[str, Any]:
    if argv == ["flags"]:
        return {"flags": answering.flags_of(_own_parser())}
    if argv[:1] != ["serve"]:
        raise answering.Rejected(f"'sglang {argv[0] if argv else ''}' is not judged, 'sglang serve' is")
    answering.warn_of_abbreviations(argv, _own_parser())
    MEMORY_MIB[0] = gpu.get("memory_mib")
    device = "cpu" if gpu["platform"] == "cpu" else "cuda"  # PyTorch's name for AMD's GPUs too
    with override_platform(**_platform(gpu)):
        args = prepare_server_args([*argv[1:], "--device", device])
        args.resolve_once()
        args.check_server_args()
        return {
            "tensor": args.tp_size,
            "pipeline": args.pp_size,
            "expert": args.ep_size,
            "nodes": args.nnodes,
            "host": args.host,
            "watchdog_timeout": args.watchdog_timeout,
            "enable_metrics": args.enable_metrics,
            "memory_fraction": _resolved(args, "mem_fraction_static"),
            "attention_backend": _resolved(args, "attention_backend"),
            "speculative": _resolved(args, "speculative_algorithm"),
        }


def _resolved(args: Any, name: str) -> Any:
    return getattr(resolved_view(args), name)


def _clear() -> None:
    logging.getLogger().setLevel(logging.WARNING)


if __name__ == "__main__":
    answering.answer_all("sglang serve", sglang.__version__, ["sglang", "transformers"], _examine, _clear)
