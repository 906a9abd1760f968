"""The platform itself; imported by vLLM once it was chosen."""

from vllm.platforms.cpu import CpuPlatform


class CpuRayPlatform(CpuPlatform):
    """vLLM's CPU platform with a resource that Ray can count, for ranks on several nodes."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Name the communicator that ranks of several nodes can use."""
        return "vllm_cpu_ray.communicator.NetworkCommunicator"
