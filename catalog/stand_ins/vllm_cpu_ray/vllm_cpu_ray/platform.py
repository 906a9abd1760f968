"""The platform itself; imported by vLLM once it was chosen."""

from vllm.platforms.cpu import CpuPlatform


class CpuRayPlatform(CpuPlatform):
    """vLLM's CPU platform with a resource that Ray can count."""

    ray_device_key = "GPU"
