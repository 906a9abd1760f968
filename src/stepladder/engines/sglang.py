"""SGLang's processes: one server, or one per node that meet over `--dist-init-addr`."""

from __future__ import annotations

import math
from typing import Literal

from stepladder.engines.common import (
    FOLLOWER_STOP_SECONDS,
    STOP_FOLLOWERS,
    STOP_HEAD,
    Rendered,
    Replica,
    cache_environment,
    interface_notes,
    launched,
    network_environment,
    visible_gpus,
)
from stepladder.memory import MIB
from stepladder.plan import Health, Note, Port, Process
from stepladder.setting import Setting

RENDEZVOUS_PORTS = 11
DIST_TIMEOUT_SECONDS = 3600
WATCHDOG_TIMEOUT_SECONDS = 900
HEALTH_TIMEOUT_SECONDS = 120
SPECULATIVE_FLAGS = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", "4", "--enable-multi-layer-eagle"),
)

# What runs without SGLang's compiled kernels: PyTorch's own attention and sampling, and no cache or schedule that are
# written in Triton. Left alone each rank spins on a core while nobody asks, which starves a rehearsal on few cores.
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--disable-radix-cache", "--sleep-on-idle"),
)
# Full-length sequences that the KV cache holds at least; left alone it takes most of the machine's memory.
CPU_SEQUENCES = 4

NVFP4_FLAGS = (
    *("--moe-runner-backend", "flashinfer_trtllm", "--kv-cache-dtype", "fp8_e4m3"),
    *("--quantization", "modelopt_fp4", "--attention-backend", "trtllm_mha"),
)


def render(setting: Setting, replica: Replica) -> Rendered:
    """Render a replica; every rank runs the same command but for its rank."""
    ranks = tuple((_server(setting, replica, rank),) for rank in range(len(replica.nodes)))
    return Rendered(ranks, tuple(_notes(setting, replica) + interface_notes(replica)))


def _server(setting: Setting, replica: Replica, rank: int) -> Process:
    arguments = ["serve", "--model-path", replica.model_path]
    arguments += ["--served-model-name", replica.served_name, *_parallel_flags(replica)]
    arguments += _joining_flags(setting, replica, rank)
    arguments += ["--host", replica.listens_on(rank), "--port", str(replica.port), *_model_flags(setting)]
    arguments += _memory_flags(setting)
    arguments += ["--enable-metrics", "--watchdog-timeout", str(WATCHDOG_TIMEOUT_SECONDS)]
    arguments += setting.deployment.extra_arguments
    kind: Literal["none", "sglang"] = "none" if rank else "sglang"
    return launched(
        setting,
        replica,
        name=f"sglang-{replica.index}",
        purpose=f"rank {rank}, its health says nothing" if rank else "serves the API",
        program="sglang",
        arguments=arguments,
        env=_environment(setting, replica, rank),
        ports=_ports(setting, replica, rank),
        # It has the engine generate a token; /ready says 200 while a rank hangs (seen with 0.5.23 over two nodes).
        health=Health(
            kind=kind,
            host=replica.probe_host,
            port=replica.port,
            path="/health",
            model=None if rank else replica.served_name,
        ),
        stop_seconds=FOLLOWER_STOP_SECONDS if rank else setting.engine.defaults.stop_seconds,
        stop_step=STOP_FOLLOWERS if rank else STOP_HEAD,
    )


def _parallel_flags(replica: Replica) -> list[str]:
    parallel = replica.parallel
    flags = ["--tp-size", str(parallel.tensor)]
    flags += ["--pp-size", str(parallel.pipeline)] if parallel.pipeline > 1 else []
    flags += ["--dp-size", str(parallel.data)] if parallel.data > 1 else []
    flags += ["--ep", str(parallel.tensor)] if parallel.expert else []
    return flags


def _joining_flags(setting: Setting, replica: Replica, rank: int) -> list[str]:
    if replica.topology == "single":
        return []
    meeting = f"{replica.head.address}:{_rendezvous_port(setting, replica)}"
    flags = ["--nnodes", str(len(replica.nodes)), "--node-rank", str(rank)]
    return [*flags, "--dist-init-addr", meeting, "--dist-timeout", str(DIST_TIMEOUT_SECONDS)]


def _model_flags(setting: Setting) -> list[str]:
    model, features = setting.model, setting.deployment.features
    flags = ["--trust-remote-code"] if model.trust_remote_code else []
    if model.tool_call_parser and "tool_calls" in features:
        flags += ["--tool-call-parser", model.tool_call_parser]
    if model.reasoning_parser and "reasoning" in features:
        flags += ["--reasoning-parser", model.reasoning_parser]
    if setting.variant.quantisation.format == "nvfp4":
        flags += NVFP4_FLAGS
    if setting.deployment.context_length:
        flags += ["--context-length", str(setting.deployment.context_length)]
    return flags + (list(SPECULATIVE_FLAGS) if setting.wants_mtp else [])


def _memory_flags(setting: Setting) -> list[str]:
    if setting.gpu.platform == "cpu":
        sequences = max(CPU_SEQUENCES, setting.deployment.concurrency)
        return [*CPU_FLAGS, "--max-total-tokens", str(sequences * setting.context_length)]
    return ["--mem-fraction-static", str(_static_fraction(setting))]


def _static_fraction(setting: Setting) -> float:
    """The share of a GPU for weights and KV cache; the release's runtime memory comes beside it (memory_hook.py).

    What SGLang keeps back for a long context it takes off this share itself.
    """
    assert setting.gpu.memory_mib is not None  # noqa: S101 - only the CPU's is none
    runtime = setting.release.runtime_memory_bytes / (setting.gpu.memory_mib * MIB)
    return math.ceil((setting.engine.defaults.memory_fraction - runtime) * 1000) / 1000


def _environment(setting: Setting, replica: Replica, rank: int) -> dict[str, str]:
    node, several = replica.nodes[rank], len(replica.nodes) > 1
    environment = {
        **cache_environment(setting, replica),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_CACHE_DIR": f"{replica.cache_path}/sglang",
        "SGLANG_HEALTH_CHECK_TIMEOUT": str(HEALTH_TIMEOUT_SECONDS),
    }
    environment |= _cpu_environment(replica) if setting.gpu.platform == "cpu" else {}
    environment |= {"SGLANG_HOST_IP": node.address} if several else {}
    environment |= {"SGLANG_USE_AITER": "1"} if setting.gpu.vendor == "amd" else {}
    environment |= network_environment(node, several) | visible_gpus(setting, replica)
    return environment | setting.deployment.extra_environment


def _cpu_environment(replica: Replica) -> dict[str, str]:
    # Compiling for the CPU would need a C++ compiler on the node, and take longer than it saves.
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    if replica.parallel.world_size > 1:
        # A core for each rank of the node: SGLang has one rank a NUMA node otherwise, counting the other nodes' ranks
        # (numa_utils.py). Without its compiled kernels nothing is bound to them.
        local = replica.parallel.world_size // len(replica.nodes)
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(local))
    if len(replica.nodes) == 1:
        # The ranks of one machine speak over loopback; left alone they look for the machine's address.
        environment |= {"SGLANG_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return environment


def _ports(setting: Setting, replica: Replica, rank: int) -> list[Port]:
    host = replica.listens_on(rank)
    ports = [Port(port=replica.port, host=host, purpose="OpenAI-compatible API", scope="clients")]
    if replica.topology == "single" or rank > 0:
        return ports
    first = _rendezvous_port(setting, replica)
    host = replica.head.address
    for port in range(first, first + RENDEZVOUS_PORTS):
        ports.append(Port(port=port, host=host, purpose="rendezvous of the ranks", scope="peers"))
    return ports


def _rendezvous_port(setting: Setting, replica: Replica) -> int:
    return setting.engine.defaults.rendezvous_port + replica.index * RENDEZVOUS_PORTS


def _notes(setting: Setting, replica: Replica) -> list[Note]:
    notes = [
        (
            "sglang serve",
            "The published 'python -m sglang.launch_server' still works, with a warning; this is its successor.",
            "SGLang 0.5.23",
        ),
        ("--host", "Written out because SGLang listens on 127.0.0.1 alone by default.", "SGLang 0.5.23 server_args.py"),
        (
            "--enable-metrics, --watchdog-timeout",
            "Not in the published command: without the first /metrics is 404, and the second outlasts the kernel "
            "compilation of a first start.",
            "SGLang 0.5.23 server_args.py",
        ),
    ]
    if setting.gpu.platform == "cpu":
        notes.append(
            (
                "--device cpu",
                "PyTorch's own attention and sampling stand in for SGLang's compiled kernels; it is for rehearsal, not "
                "for use.",
                "catalog/engines/sglang.yml",
            )
        )
    else:
        notes.append(
            (
                "--mem-fraction-static",
                "Weights and KV cache as the memory table reckons with them, its runtime left out; the engine's own "
                "choice depends on GPU, layout and graphs.",
                "SGLang 0.5.23 memory_hook.py",
            )
        )
    if replica.topology == "dist_init":
        notes.append(
            (
                "--dist-timeout",
                "Not in the published command: ranks load at different speeds and must wait for the slowest one.",
                "SGLang issue 958",
            )
        )
    return [Note(kind="note", topic=topic, text=text, source=source) for topic, text, source in notes]
