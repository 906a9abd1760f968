"""Lets vLLM's CPU platform run its ranks through Ray, as GPU platforms do; for rehearsals.

vLLM asks Ray for a device per rank and its CPU platform names none. This platform names Ray's resource `GPU`, a plain
number that `ray start --num-gpus` gives each node; no GPU is looked for and none is used.
"""

import os

SWITCH = "CPU_OVER_RAY"


def platform() -> str | None:
    """Answer vLLM's question for a platform: none unless `CPU_OVER_RAY=1`."""
    return "vllm_cpu_ray.platform.CpuRayPlatform" if os.environ.get(SWITCH) == "1" else None
