"""What rendering an engine's processes starts from, whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass

from stepladder.layout import Setting
from stepladder.plan import Note, Process
from stepladder.request import Node, Parallel


@dataclass(frozen=True)
class Replica:
    """One replica placed on nodes; `nodes` are in rank order, the first one answers clients."""

    index: int
    nodes: tuple[Node, ...]
    topology: str
    parallel: Parallel
    served_name: str
    bind_address: str
    port: int
    first_gpu: int
    model_path: str
    venv_path: str
    deployment_path: str
    cache_path: str

    @property
    def head(self) -> Node:
        """The node of rank 0."""
        return self.nodes[0]

    @property
    def probe_host(self) -> str:
        """Where the head's own node reaches the endpoint."""
        return "127.0.0.1" if self.bind_address == "0.0.0.0" else self.bind_address  # noqa: S104 - compared, not bound

    def client_url(self) -> str:
        """Base URL for OpenAI clients."""
        host = self.head.address if self.bind_address == "0.0.0.0" else self.bind_address  # noqa: S104 - compared
        return f"http://{host}:{self.port}/v1"


@dataclass(frozen=True)
class Rendered:
    """Processes per node, in rank and start order, and what is worth knowing about them."""

    processes: tuple[tuple[Process, ...], ...]
    notes: tuple[Note, ...]


def network_environment(node: Node, several_nodes: bool) -> dict[str, str]:
    """Which interface the ranks meet over; '=' asks NCCL for the exact name instead of a prefix."""
    if not several_nodes or not node.interface:
        return {}
    return {"NCCL_SOCKET_IFNAME": f"={node.interface}", "GLOO_SOCKET_IFNAME": node.interface}


def visible_gpus(setting: Setting, replica: Replica) -> dict[str, str]:
    """Pins a replica that shares its node with others to its own GPUs."""
    on_node = replica.parallel.world_size // len(replica.nodes)
    if setting.gpu.vendor == "cpu" or on_node == setting.gpus_per_node:
        return {}
    name = "CUDA_VISIBLE_DEVICES" if setting.gpu.vendor == "nvidia" else "HIP_VISIBLE_DEVICES"
    return {name: ",".join(str(gpu) for gpu in range(replica.first_gpu, replica.first_gpu + on_node))}


def missing_interface_notes(replica: Replica) -> list[Note]:
    """A warning for the nodes of a multi-node replica whose interface nobody declared."""
    silent = [node.name for node in replica.nodes if not node.interface]
    if len(replica.nodes) == 1 or not silent:
        return []
    text = (
        f"deployment_interface is not declared for {', '.join(silent)}: NCCL and Gloo will choose an interface "
        "themselves, and a wrong choice is the commonest reason for a hang at start."
    )
    return [Note(kind="warning", topic="network interface", text=text, source="sglang 3226, vllm 15537")]
