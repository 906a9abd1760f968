"""What rendering an engine's processes starts from, whatever the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepladder.plan import Health, Note, Port, Process
from stepladder.request import Node, Parallel
from stepladder.setting import Setting


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
    venv_path: str | None
    deployment: str
    deployment_path: str
    programs_path: str
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
    """Processes per node, in rank and start order, what is worth knowing about them, and the toolkit's own programs
    that they run, by their paths on the node.
    """

    processes: tuple[tuple[Process, ...], ...]
    notes: tuple[Note, ...]
    programs: tuple[str, ...] = ()


VISIBLE_GPUS = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES"}
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Ranks share memory beyond Docker's 64 MB, and pin what the network reads (vllm 1710, 19613).
CONTAINER_LIMITS = ("--ipc=host", "--shm-size=32g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
# What AMD's own commands have: the driver's devices, and the debugger's right that its runtime asks for.
AMD_CONTAINER = (
    *("--device=/dev/kfd", "--device=/dev/dri", "--group-add", "video"),
    *("--cap-add=SYS_PTRACE", "--security-opt", "seccomp=unconfined"),
)


def launched(
    setting: Setting,
    replica: Replica,
    *,
    name: str,
    purpose: str,
    program: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    ports: Sequence[Port],
    health: Health,
    stop_seconds: int,
) -> Process:
    """A process in the node's environment, or in a container of the engine's image.

    Args:
        program: name of the engine's program, found in the environment or the image.
        arguments: what follows it.
        env: environment variables beside the search path; a container gets them by name, so that none of their values
            stands in a command line.
    """
    if setting.in_container:
        argv = [*_container(setting, replica, name, env), setting.image, *arguments]
        argv = [*argv[:2], "--entrypoint", program, *argv[2:]]
        environment = dict(env)
    else:
        argv = [f"{replica.venv_path}/bin/{program}", *arguments]
        environment = {**env, "PATH": f"{replica.venv_path}/bin:{SEARCH_PATH}"}
    return Process(
        name=name,
        purpose=purpose,
        image=setting.image if setting.in_container else None,
        argv=tuple(argv),
        env=environment,
        ports=tuple(ports),
        health=health,
        stop_seconds=stop_seconds,
    )


def _container(setting: Setting, replica: Replica, name: str, env: Mapping[str, str]) -> list[str]:
    options = ["docker", "run", "--rm", "--name", f"{replica.deployment}-{name}", "--network=host", *CONTAINER_LIMITS]
    options += ["--gpus", "all"] if setting.gpu.vendor == "nvidia" else list(AMD_CONTAINER)
    options += ["--device=/dev/infiniband"] if len(replica.nodes) > 1 else []
    options += ["--volume", f"{replica.model_path}:{replica.model_path}:ro"]
    options += ["--volume", f"{replica.cache_path}:{replica.cache_path}"]
    if "RAY_AUTH_TOKEN_PATH" in env:
        secrets = f"{replica.deployment_path}/secrets"
        options += ["--volume", f"{secrets}:{secrets}:ro"]
    for variable in sorted(env):
        options += ["--env", variable]
    return options


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
    name = VISIBLE_GPUS[setting.gpu.vendor]
    return {name: ",".join(str(gpu) for gpu in range(replica.first_gpu, replica.first_gpu + on_node))}


def visible_gpu_indices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs that a process's environment pins it to by their numbers; none where it sees all, or says otherwise."""
    value = next((env[name] for name in VISIBLE_GPUS.values() if name in env), None)
    if value is None or not re.fullmatch(r"\d+(,\d+)*", value):
        return None
    return tuple(int(index) for index in value.split(","))


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
