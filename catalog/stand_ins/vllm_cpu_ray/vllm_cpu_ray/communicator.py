"""How the ranks of a tensor parallel group talk to each other; imported by vLLM once the platform was chosen."""

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class NetworkCommunicator(CpuCommunicator):
    """vLLM's CPU communicator without its way through shared memory.

    vLLM 0.32.0 takes ranks that were given the same port for ranks of one machine; Ray gives all nodes the same one,
    and the ranks of the second node end with "open shm in SHMManager failed".
    """

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
