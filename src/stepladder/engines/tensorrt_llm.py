"""TensorRT-LLM's process: one server on one node, from its image; experimental for these models."""

from __future__ import annotations

from stepladder.engines.common import Rendered, Replica, launched, visible_gpus
from stepladder.plan import Health, Note, Port
from stepladder.setting import Setting


def render(setting: Setting, replica: Replica) -> Rendered:
    """Render a replica: `trtllm-serve` with its documented flags."""
    parallel = replica.parallel
    arguments = [replica.model_path, "--host", replica.bind_address, "--port", str(replica.port)]
    arguments += ["--tp_size", str(parallel.tensor)]
    arguments += ["--ep_size", str(parallel.tensor)] if parallel.expert else []
    arguments += ["--kv_cache_free_gpu_memory_fraction", str(setting.engine.defaults.memory_fraction)]
    arguments += ["--trust_remote_code"] if setting.model.trust_remote_code else []
    arguments += setting.deployment.extra_arguments
    process = launched(
        setting,
        replica,
        name=f"tensorrt-llm-{replica.index}",
        purpose="serves the API",
        program="trtllm-serve",
        arguments=arguments,
        env=visible_gpus(setting, replica) | setting.deployment.extra_environment,
        ports=[Port(port=replica.port, host=replica.bind_address, purpose="OpenAI-compatible API", scope="clients")],
        health=Health(kind="vllm", host=replica.probe_host, port=replica.port, path="/health"),
        stop_seconds=setting.engine.defaults.stop_seconds,
    )
    note = Note(
        kind="warning",
        topic="TensorRT-LLM",
        text="Experimental: a release candidate, flags by its documentation, never tried with a Step model by us; BF16 "
        "experts and layers 43 and 44 run in a slow loop. The server names the model itself: ask its /v1/models.",
        source="TensorRT-LLM PR 14711",
    )
    return Rendered(((process,),), (note,))
