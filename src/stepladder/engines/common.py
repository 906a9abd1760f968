"""What rendering an engine's processes starts from, whatever the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stepladder.plan import Health, Note, Port, Process
from stepladder.request import EVERYWHERE, Node, Parallel
from stepladder.setting import Setting

NETWORK_TOPIC = "network between the nodes"


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
        return "127.0.0.1" if self.bind_address == EVERYWHERE else self.bind_address

    def seen_by_peers(self, health: Health) -> Health | None:
        """The head's health as the other nodes ask for it; none where it listens on an address they cannot reach."""
        if self.bind_address not in (EVERYWHERE, self.head.address):
            return None
        return health.model_copy(update={"host": self.head.address, "model": None})

    @property
    def client_host(self) -> str:
        """Where clients reach the head."""
        clients = self.head.client_address or self.head.address
        return clients if self.bind_address == EVERYWHERE else self.bind_address

    def client_url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"http://{self.client_host}:{self.port}/v1"


@dataclass(frozen=True)
class Rendered:
    """Processes per node, in rank and start order, what is worth knowing about them, and the toolkit's own programs
    that they run, by their paths on the node.
    """

    processes: tuple[tuple[Process, ...], ...]
    notes: tuple[Note, ...]
    programs: tuple[str, ...] = ()

    @property
    def head_health(self) -> Health:
        """How the process that answers clients says that it is ready: the head's last one."""
        return self.processes[0][-1].health


# Over the nodes of a replica: who answers clients stops first and lets requests end, Ray's head last.
STOP_HEAD, STOP_FOLLOWERS, STOP_RAY_WORKERS, STOP_RAY_HEAD = range(4)
# A follower has no request of its own to finish once the head is gone.
FOLLOWER_STOP_SECONDS = 15
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
    part: Literal["ray", "engine"] = "engine",
    stop_step: int = 0,
) -> Process:
    """A process in the node's environment, or in a container of the engine's image.

    Args:
        program: name of the engine's program, found in the environment or the image.
        arguments: what follows it.
        env: environment variables beside the search path; a container gets them by name, so that none of their values
            stands in a command line.
        part: what it belongs to; Ray's processes start before the engine's.
        stop_step: order of the stop over all nodes of the replica.
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
        part=part,
        stop_step=stop_step,
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


def interface_notes(replica: Replica) -> list[Note]:
    """What a replica's nodes meet over and why, or that nobody has said so yet."""
    silent = [node.name for node in replica.nodes if not node.interface]
    if len(replica.nodes) == 1:
        return []
    notes = []
    for reason in dict.fromkeys(node.interface_reason for node in replica.nodes if node.interface_reason):
        met = ", ".join(f"{n.name} {n.interface} {n.address}" for n in replica.nodes if n.interface_reason == reason)
        notes.append(Note(kind="note", topic=NETWORK_TOPIC, text=f"{met}: {reason}"))
    if silent:
        text = (
            f"deployment_interface is not declared for {', '.join(silent)}: 'deploy' asks the nodes which network "
            "joins them and says what it chose. A wrong choice is the commonest reason for a hang at start."
        )
        notes.append(Note(kind="note", topic="network interface", text=text, source="sglang 3226, vllm 15537"))
    return notes
