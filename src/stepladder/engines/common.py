"""What rendering an engine's processes starts from, whatever the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stepladder.plan import Health, Note, Port, Process
from stepladder.request import EVERYWHERE, Node, Parallel, host_and_port
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

    def listens_on(self, rank: int) -> str:
        """Where a rank listens that has a server of its own: not on the head's address, which other nodes have not."""
        node, head = self.nodes[rank], self.head
        if self.bind_address == head.address:
            return node.address
        return (node.client_address or node.address) if self.bind_address == head.client_address else self.bind_address

    @property
    def client_host(self) -> str:
        """Where clients reach the head."""
        clients = self.head.client_address or self.head.address
        return clients if self.bind_address == EVERYWHERE else self.bind_address

    def client_url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"http://{host_and_port(self.client_host, self.port)}/v1"


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
# What the run script marks every process with, and a container only hands on what is named to it.
MARKS = ("STEPLADDER_DEPLOYMENT", "STEPLADDER_FINGERPRINT", "STEPLADDER_PROCESS")
# Ranks share memory beyond Docker's 64 MB, and pin what the network reads (vllm 1710, 19613).
CONTAINER_LIMITS = ("--ipc=host", "--shm-size=32g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
# Without a GPU nothing is pinned, and not every machine may raise the limit.
CPU_CONTAINER_LIMITS = ("--shm-size=1g",)
# By CDI: the toolkit's description of the devices, and no hook in the container's way.
NVIDIA_CONTAINER = ("--device=nvidia.com/gpu=all",)
# What AMD's own commands have: the driver's devices, and the debugger's right that its runtime asks for.
AMD_CONTAINER = (
    *("--device=/dev/kfd", "--device=/dev/dri", "--group-add", "video"),
    *("--cap-add=SYS_PTRACE", "--security-opt", "seccomp=unconfined"),
)
# The network's cards, and the right to pin memory for them.
RDMA_CONTAINER = ("--device=/dev/infiniband", "--cap-add=IPC_LOCK")
DEVICES = {"nvidia": NVIDIA_CONTAINER, "amd": AMD_CONTAINER, "cpu": ()}


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
    programs: str | None = None,
) -> Process:
    """A process in the node's environment, or in a container of the engine's image.

    Args:
        program: name of the engine's program, found in the environment or the image.
        arguments: what follows it.
        env: environment variables beside the search path; a container gets them by name, so that none of their values
            stands in a command line.
        part: what it belongs to; Ray's processes start before the engine's.
        stop_step: order of the stop over all nodes of the replica.
        programs: directory of the toolkit's own programs, where the process runs one.
    """
    if setting.in_container:
        options = [*_container(setting, replica, name, env), *_volumes(replica, env, programs), *_names(env)]
        stop = ["--stop-signal=SIGTERM", f"--stop-timeout={stop_seconds}"]
        argv = ["docker", "run", *options, *stop, "--entrypoint", program, setting.image, *arguments]
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


def container_id_file(deployment_path: str, process: str) -> str:
    """Where Docker writes the id of a process's container, by which its processes are known."""
    return f"{deployment_path}/containers/{process}.id"


def _container(setting: Setting, replica: Replica, name: str, env: Mapping[str, str]) -> list[str]:
    """How the container is called, watched and confined, and which devices it sees."""
    # Not --rm: Docker 20.10 takes such a container away, running, when it is itself started anew beside live-restore.
    options = ["--init", "--name", f"{replica.deployment}-{name}"]
    options += ["--cidfile", container_id_file(replica.deployment_path, name)]
    options += ["--label", f"stepladder.deployment={replica.deployment_path}"]
    # The log is written once, where all verbs look for it; Docker's own copy would grow without a bound.
    options += ["--log-driver=none", "--network=host", "--security-opt", "no-new-privileges"]
    options += CPU_CONTAINER_LIMITS if setting.gpu.vendor == "cpu" else CONTAINER_LIMITS
    options += DEVICES[setting.gpu.vendor]
    options += RDMA_CONTAINER if len(replica.nodes) > 1 and setting.gpu.vendor != "cpu" else ()
    return options


def _volumes(replica: Replica, env: Mapping[str, str], programs: str | None) -> list[str]:
    """Directories of the node that the container sees, at the same place; only the cache can be written."""
    read_only = [replica.model_path, *([programs] if programs else [])]
    read_only += [f"{replica.deployment_path}/secrets"] if "RAY_AUTH_TOKEN_PATH" in env else []
    volumes = [f"{path}:{path}:ro" for path in read_only] + [f"{replica.cache_path}:{replica.cache_path}"]
    return [word for volume in volumes for word in ("--volume", volume)]


def _names(env: Mapping[str, str]) -> list[str]:
    """Variables by name: a value in a command line is read by every user of the node."""
    return [word for name in sorted({*env, *MARKS}) for word in ("--env", name)]


def cache_environment(setting: Setting, replica: Replica) -> dict[str, str]:
    """Where what an engine compiles is kept, with the engine's build and the GPU, whose kernels it is.

    Left alone it lies below the home directory, in a container in the container, gone with it. Inductor's and Triton's
    own names; FlashInfer appends .cache/flashinfer (flashinfer/jit/env.py, SGLang 0.5.23 environ.py). vLLM puts
    Inductor's into a folder of its own for each configuration, below VLLM_CACHE_ROOT (0.33.0, compiler_interface.py).
    """
    environment = {
        "HF_HOME": f"{replica.cache_path}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{replica.cache_path}/inductor",
        "TRITON_CACHE_DIR": f"{replica.cache_path}/triton",
    }
    on_nvidia = setting.gpu.vendor == "nvidia"
    return environment | ({"FLASHINFER_WORKSPACE_BASE": f"{replica.cache_path}/flashinfer"} if on_nvidia else {})


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
