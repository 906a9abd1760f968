"""Reads a serving command that was found somewhere and says what is wrong with it today, and what we would run."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepladder.catalogue import Catalogue, Engine, EngineRelease, Gpu, Model
from stepladder.errors import CatalogueError, PlanRefusedError, Violation, unknown_name
from stepladder.found_command import (
    HOST_NAME,
    INSTALLERS,
    MODEL_FLAGS,
    NO_ENGINE,
    NO_PROGRAM_OF_OURS,
    PER_NODE_FLAGS,
    PULLS,
    SHELLS,
    TEMPORARY_TAG,
    Container,
    Finding,
    Flag,
    FoundCommand,
    moved_cache,
    parse,
)
from stepladder.memory import GIGA
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import SERVED_NAME, Deployment, Node, Parallel, PlanRequest
from stepladder.show import shell
from stepladder.versions import older

FOUND_ERRORS, USAGE = 1, 2
LONGEST_COMMAND = 32_768
BATCHED_TOKENS = 8192
SLOW_TO_LOAD_BYTES = 300e9  # what a local NVMe disk reads in the engine's own 600 s, with room for compilation
WIDTH = 108
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Meant:
    """What a command was meant for: where it is to run, and what the catalogue knows about it."""

    engine: Engine
    release: EngineRelease
    gpu: Gpu
    nodes: int
    model: Model | None = None
    variant: str | None = None


def identify(reference: str, catalogue: Catalogue) -> tuple[Model, str] | None:
    """The model and variant that an id of a hub or a path means; folders that ModelScope makes are understood."""
    parts = reference.replace("___", ".").replace("--", "/").rstrip("/").lower().split("/")
    while len(parts) > 1 and (parts[-1] in {"master", "main", "snapshots"} or re.fullmatch(r"[0-9a-f]{40}", parts[-1])):
        parts.pop()
    for model in catalogue.models.values():
        for name, variant in model.variants.items():
            if parts[-1] == variant.modelscope.rpartition("/")[2].lower():
                return model, name
    return None


def findings(found: FoundCommand, gpu: str, nodes: int, catalogue: Catalogue) -> list[Finding]:
    """All that there is to say about a command on so many nodes of a GPU type, errors first.

    Raises:
        PlanRefusedError: for a GPU type that the catalogue does not know.
        CatalogueError: if a catalogue file cannot be used.
    """
    problems = list(found.problems)
    meant = _meant(found, gpu, nodes, catalogue)
    if found.program and meant is None:
        problems += [_no_engine(found)] if found.engine is None else [_no_release(found, gpu, catalogue)]
    if meant:
        for look in LOOKS:
            problems += look(found, meant)
        problems += _unknown_flags(found, meant, catalogue)
        if meant.model:
            problems += _broken_rules(found, meant, catalogue)
        elif found.model:
            violation = unknown_name("model", found.model, _known_models(catalogue))
            problems.append(_as_finding(violation, "catalog/models"))
    if found.container:
        problems += _container(found, found.container, catalogue.gpus[gpu], meant)
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(problems), key=lambda finding: order.index(finding.severity))


def _known_models(catalogue: Catalogue) -> list[str]:
    return [variant.modelscope for model in catalogue.models.values() for variant in model.variants.values()]


def _meant(found: FoundCommand, gpu: str, nodes: int, catalogue: Catalogue) -> Meant | None:
    if gpu not in catalogue.gpus:
        raise PlanRefusedError([unknown_name("GPU type", gpu, catalogue.gpus)])
    if found.engine is None:
        return None
    engine, card = catalogue.engines[found.engine], catalogue.gpus[gpu]
    release = next((release for release in engine.releases if release.platform == card.platform), None)
    if release is None:
        return None
    model, variant = identify(found.model or "", catalogue) or (None, None)
    return Meant(engine, release, card, nodes, model, variant)


def _no_engine(found: FoundCommand) -> Finding:
    """A command that starts no engine: those of guides, by what they are for."""
    if found.program == "modelscope download" and any(flag.name == "--cache-dir" for flag in found.flags):
        return moved_cache("--cache-dir")
    nightly = any(flag.name == "--pre" or "nightly" in (flag.value or "") for flag in found.flags)
    if found.program in INSTALLERS and nightly:
        what, why = f"{found.program} of a nightly", "it installs another engine every day, and none that anybody tried"
        mend = "Install a release from a lock, as bin/stepladder deploy does; one nightly by deployment_lock."
        return Finding("warning", what, why, mend, "catalog/locks")
    if found.program in PULLS and found.words[1:] and TEMPORARY_TAG.search(found.words[-1]):
        return _temporary_tag(found.words[-1])
    for programs, why, mend in NO_ENGINE:
        if found.program in programs and (found.container or programs != SHELLS):
            return Finding("note", found.program, f"it {why} and starts no engine", mend, "this tool")
    return Finding("error", found.program, "it starts no engine that is known here", NO_PROGRAM_OF_OURS, "this tool")


def _temporary_tag(image: str) -> Finding:
    mend = "Take a release's tag; see bin/stepladder plan."
    return Finding("warning", image, "its tag moves, or vanishes one day", mend, "report on SGLang PR 26565")


def _no_release(found: FoundCommand, gpu: str, catalogue: Catalogue) -> Finding:
    engine, card = catalogue.engines[found.engine or ""], catalogue.gpus[gpu]
    platforms = ", ".join(sorted({release.platform for release in engine.releases}))
    why = f"the catalogue has {engine.title} for {platforms}, and {card.title} is {card.platform}"
    return Finding("error", found.program, why, "Choose another engine or GPU type.", "catalog/engines")


def _entry_point(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    successors = {
        "python -m sglang.launch_server": ("sglang serve", "it works with a warning"),
        "python -m vllm.entrypoints.openai.api_server": ("vllm serve MODEL", "it is deprecated"),
    }
    if found.program in successors:
        successor, why = successors[found.program]
        source = "vLLM 0.33.0" if found.engine == "vllm" else "SGLang 0.5.23"
        yield Finding("warning", found.program, why, f"Start with: {successor}", source)


def _model_reference(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    reference = found.model
    if not reference:
        yield Finding("error", "the model", "none is named", "Name its folder.", "the engines' own parsers")
        return
    on_disk = reference.startswith(("/", ".", "~", "$"))
    if "___" in reference:
        why = "ModelScope wrote a dot so until 1.37; newer ones look there only for what is there already"
        mend = "Download with --local-dir and serve that folder."
        yield Finding("warning", reference, why, mend, "ModelScope 1.40.2 against a hub of ours")
    elif re.search(r"/stepfun-ai/[^/]+/?$", reference) and on_disk:
        yield moved_cache(reference)
    if not on_disk:
        why = "the engine downloads it itself at start, on each node, whatever its newest revision is"
        yield Finding("note", reference, why, "Download a revision first and serve its folder.", "engine documentation")
    if on_disk and found.engine != "tensorrt_llm" and not found.has("--served-model-name"):
        why = f"clients must ask for the model '{reference}'; any shorter name is answered with 404"
        served = meant.model.served_name if meant.model else "NAME"
        source = "vLLM and SGLang, /v1/models"
        yield Finding("warning", "--served-model-name", why, f"Add --served-model-name {served}.", source)


def _flag_changes(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    """What the catalogue knows about flags of this engine."""
    severities: dict[str, Severity] = {"removed": "error", "deprecated": "warning", "harmful": "warning"}
    for flag in found.flags:
        change = meant.engine.flags.get(flag.typed) or meant.engine.flags.get(flag.name)
        if change is None:
            continue
        # A release before the change takes the flag silently; a warning is still due, for the day of the upgrade.
        early = change.since is not None and older(meant.release.version, change.since)
        severity = "note" if early else severities[change.status]
        since = f" since {change.since}" if change.since else ""
        yield Finding(severity, flag.typed, f"{change.status}{since}", f"Instead: {change.instead}.", change.source)


def _twice(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    seen: dict[str, Flag] = {}
    for flag in found.flags:
        before = seen.get(flag.name)
        if before and before.value != flag.value and "." not in flag.typed and flag.name != "--api-key":
            why = f"it is given as '{before}' before; the last one wins"
            yield Finding("warning", str(flag), why, "Remove one of them.", "argparse")
        seen[flag.name] = flag


def _parsers(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    if meant.model is None or found.engine == "tensorrt_llm":
        return
    pairs = (
        ("--reasoning-parser", meant.model.reasoning_parser, "reasoning is not split off the answer"),
        ("--tool-call-parser", meant.model.tool_call_parser, "tool calls stay text in the answer"),
    )
    for name, right, without in pairs:
        value = found.get(name)
        if not right or (name == "--reasoning-parser" and value == "none") or value == "auto":
            continue
        if not found.has(name):
            yield Finding("note", name, f"without it {without}", f"Add {name} {right}.", "engines' parser registries")
        elif value != right:
            why = f"{meant.model.title} is parsed by '{right}' in {meant.engine.title}"
            yield Finding("error", f"{name} {value}", why, f"Write {name} {right}.", "engines' parser registries")
    if found.engine != "vllm":
        return
    chosen, parser = found.has("--enable-auto-tool-choice"), found.has("--tool-call-parser")
    if parser and not chosen:
        why = "without --enable-auto-tool-choice the parser is never asked, and requests with tools are refused"
        yield Finding("error", "--tool-call-parser", why, "Add --enable-auto-tool-choice.", "vLLM 0.33.0, tool calling")
    if chosen and not parser:
        mend = f"Add --tool-call-parser {meant.model.tool_call_parser}."
        yield Finding(
            "error", "--enable-auto-tool-choice", "vLLM stops without a parser", mend, "vLLM 0.33.0, cli_args"
        )


def _remote_code(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    wants = meant.model and meant.model.trust_remote_code
    if wants and not found.has("--trust-remote-code"):
        why = "the model's tokenizer and processor come with code of their own"
        yield Finding("warning", "--trust-remote-code", why, "Add --trust-remote-code.", "model card")


def _listening(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    if found.engine == "sglang" and not found.has("--host"):
        why = "SGLang listens on 127.0.0.1 alone by default, so that no other machine reaches it"
        yield Finding("warning", "--host", why, "Add --host 0.0.0.0.", "SGLang 0.5.23, server_args.py")
    for flag in found.flags:
        if flag.value and re.match(r"\$\{?\w+", flag.value):
            why = f"it is empty where {flag.value} is not set, and the next word is taken for it"
            yield Finding("note", str(flag), why, "Set the variable, or write the value.", "sh(1)")


def _batched_tokens(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    count = found.number("--max-num-batched-tokens", BATCHED_TOKENS)
    if found.engine == "vllm" and count < BATCHED_TOKENS:
        why = "StepFun's guide asks for more than 4096; vLLM's own default is 8192 here, and 16384 from 160 GiB"
        mend = f"Write --max-num-batched-tokens {BATCHED_TOKENS}, or leave it out."
        yield Finding("warning", f"--max-num-batched-tokens {count}", why, mend, "Step3 deployment guide; vLLM 0.33.0")


def _quantisation(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    value = found.get("--quantization")
    if found.engine != "vllm" or value is None:
        return
    what = f"--quantization {value}"
    if value == "gguf":
        yield Finding("error", what, "vLLM has no GGUF in it", "Take another variant.", "vLLM 0.33.0 argument parser")
    if value in {"fbgemm_fp8", "fp_quant"} and not found.has("--allow-deprecated-quantization"):
        why = "vLLM refuses it without --allow-deprecated-quantization"
        yield Finding("error", what, why, "Serve the -FP8 checkpoint without it.", "vLLM 0.33.0 argument parser")
    if value == "fp8" and meant.variant == "bf16":
        why = "the BF16 weights are read and cut down at each start, with one scale per tensor (fp8_per_tensor)"
        mend = "Serve the -FP8 checkpoint without --quantization; it says itself what it is."
        yield Finding("warning", what, why, mend, "vLLM 0.33.0 argument parser")
    if value == "fp8" and meant.variant == "fp8":
        mend = "Leave it out."
        yield Finding("note", what, "the checkpoint says itself what it is", mend, "vLLM 0.33.0 argument parser")


def _speculation(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    overrides = _json(found.get("--hf-overrides"))
    if "num_nextn_predict_layers" in overrides:
        why = "it was a way around a fault that is mended; it leaves one layer of three"
        yield Finding(
            "warning", "--hf-overrides", why, "Leave num_nextn_predict_layers out.", "vLLM 0.33.0, step3p5.py"
        )
    value = found.get("--speculative-config")
    if found.engine != "vllm" or value is None or "." in (_typed(found, "--speculative-config") or ""):
        return
    config = _json(value)
    if not config:
        mend = """Write '{"method":"mtp","num_speculative_tokens":3}'."""
        yield Finding("error", f"--speculative-config {value}", "it is not a JSON object", mend, "vLLM 0.33.0")
        return
    method, tokens = config.get("method"), config.get("num_speculative_tokens")
    if method == "step3p5_mtp":
        why = "deprecated and replaced with mtp"
        yield Finding("warning", "method step3p5_mtp", why, "Write the method mtp.", "vLLM 0.33.0 argument parser")
    layers = meant.model.mtp_layers if meant.model else 0
    if layers and isinstance(tokens, int) and tokens > layers and tokens % layers:
        why = f"more tokens than the model's {layers} layers must be a multiple of them"
        yield Finding(
            "error", f"num_speculative_tokens {tokens}", why, f"Write {layers}.", "vLLM 0.33.0, speculative.py"
        )
    elif layers and isinstance(tokens, int) and tokens < layers:
        why = f"the model predicts {layers} tokens"
        yield Finding("note", f"num_speculative_tokens {tokens}", why, f"Write {layers}.", "model config.json")


def _environment(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    env = found.environment
    if found.engine != "vllm":
        return
    weights = meant.model.variants[meant.variant or ""].bytes_on_disk if meant.model else 0
    if weights > SLOW_TO_LOAD_BYTES and "VLLM_ENGINE_READY_TIMEOUT_S" not in env:
        why = f"{weights / GIGA:.0f} GB are seldom loaded within vLLM's own 600 s; then it gives up"
        mend = "Set VLLM_ENGINE_READY_TIMEOUT_S=5400."
        yield Finding("warning", "VLLM_ENGINE_READY_TIMEOUT_S", why, mend, "vllm issues 35547, 35616")
    aiter = env.get("VLLM_ROCM_USE_AITER") == "1" and env.get("VLLM_ROCM_USE_AITER_MOE") != "0"
    if meant.gpu.vendor == "amd" and aiter and _clipped(meant):
        why = "AITER's experts lack the clipped activation of layers 43 and 44"
        severity: Severity = "error" if meant.variant == "fp8" else "warning"
        mend = "Set VLLM_ROCM_USE_AITER_MOE=0 beside it."
        yield Finding(severity, "VLLM_ROCM_USE_AITER=1", why, mend, "vllm issue 36193")
    if "VLLM_USE_FLASHINFER_MOE_FP8" in env:
        why = "vLLM 0.33.0 does not know it any more and warns"
        yield Finding("note", "VLLM_USE_FLASHINFER_MOE_FP8", why, "Leave it out.", "vLLM 0.33.0, envs.py")
    if env.get("VLLM_SERVER_DEV_MODE") == "1":
        why = "anyone who reaches the port can put the engine to sleep and call into its workers"
        yield Finding("warning", "VLLM_SERVER_DEV_MODE=1", why, "Unset it.", "vLLM 0.33.0, envs.py")
    if "HOST_IP" in env:
        why, mend = "vLLM does not read it", "Set VLLM_HOST_IP."
        yield Finding("warning", "HOST_IP", why, mend, "vLLM 0.33.0, envs.py")
    if not re.fullmatch(r"\d*", env.get("VLLM_PORT", "")):
        why = f"'{env['VLLM_PORT']}' is no number; a Kubernetes service called vllm sets it so"
        yield Finding("error", "VLLM_PORT", why, "Unset it, or rename the service.", "vLLM 0.33.0, envs.py")


def _clipped(meant: Meant) -> bool:
    """Whether the model has layers with a clipped activation."""
    return meant.model is not None and meant.model.clipped_activation


def _vllm_nodes(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    """Layouts of vLLM over nodes that stop or hang (vLLM 0.33.0's own configuration classes; vllm 44878)."""
    if found.engine != "vllm":
        return
    parallel, size, run = found.parallel, meant.gpu.gpus_per_node, "run against vLLM 0.33.0's configuration classes"
    executor, backend = found.get("--distributed-executor-backend"), found.get("--data-parallel-backend") or "mp"
    joined = found.number("--nnodes", 1)
    one_rank = parallel.tensor * parallel.pipeline
    layout = f"{parallel} on {meant.nodes} x {size} GPUs"
    if executor == "ray" and joined > 1:
        mend = "Leave one of them out."
        yield Finding("error", "--nnodes with Ray", "vLLM takes --nnodes with mp, uni and external_launcher", mend, run)
    if one_rank > size and executor != "ray" and joined == 1 and backend != "ray":
        why = f"vLLM stops: 'World size ({one_rank}) is larger than the number of available GPUs ({size}) in this node'"
        mend = "Add --nnodes, --node-rank and --master-addr on each node, or --distributed-executor-backend ray."
        yield Finding("error", layout, why, mend, run)
    one_of_many = found.has("--data-parallel-rank") or found.has("--data-parallel-external-lb")
    if parallel.data > 1 and parallel.world_size > size and not one_of_many:
        yield from _data_parallel_nodes(found, parallel, size, executor, backend)
    elif parallel.data > 1 and not one_of_many and not found.has("--api-server-count") and not found.has("--headless"):
        why = f"vLLM starts {parallel.data} API servers, one for each data parallel rank"
        yield Finding("note", "--api-server-count", why, "Add --api-server-count 4.", "vLLM 0.33.0")
    if joined > 1:
        missing = [name for name in ("--node-rank", "--master-addr") if not found.has(name)]
        if missing:
            why = "every node takes itself for the first one, and waits"
            yield Finding("error", f"--nnodes without {' and '.join(missing)}", why, "Give them on each node.", run)
    if "ray" in {executor, backend} and "RAY_ADDRESS" not in found.environment:
        why = "where no Ray is found vLLM silently starts one of its own, and waits for GPUs that never come"
        yield Finding("warning", "RAY_ADDRESS", why, "Set RAY_ADDRESS=HEAD:6379.", "vLLM 0.33.0, ray_utils.py")
    if meant.nodes > 1 and parallel.world_size > size and "VLLM_HOST_IP" not in found.environment:
        why = "each node guesses the address under which the others reach it"
        yield Finding("warning", "VLLM_HOST_IP", why, "Set it on each node to its own address.", "vLLM 0.33.0, envs.py")
    if found.has("--headless") and found.has("--api-server-count"):
        mend = "Leave --api-server-count out on followers."
        yield Finding("error", "--headless with --api-server-count", "vLLM refuses the pair", mend, run)


def _data_parallel_nodes(
    found: FoundCommand, parallel: Parallel, size: int, executor: str | None, backend: str
) -> Iterator[Finding]:
    local = max(1, size // (parallel.tensor * parallel.pipeline))
    run = "run against vLLM 0.33.0's configuration classes"
    placing = f"--data-parallel-size-local {local} and --data-parallel-address HEAD"
    if executor == "ray" and backend != "ray":
        why = "with the data parallel backend mp the ranks wait 601 s for each other on 127.0.0.1, then DistStoreError"
        mend = f"Write --data-parallel-backend ray instead of it, with {placing}."
        yield Finding("error", "--distributed-executor-backend ray", why, mend, "vllm issue 44878")
    elif not found.has("--data-parallel-size-local"):
        why = f"all {parallel.data} data parallel ranks are started on the first node, which has {size} GPUs"
        more = f"Add {placing}" + (", and --data-parallel-backend ray or a --headless command on each other node.")
        yield Finding("error", f"--data-parallel-size {parallel.data}", why, more, run)
    elif not found.has("--data-parallel-address"):
        why = "the ranks of the other nodes look for the first one on 127.0.0.1"
        yield Finding("error", "--data-parallel-size-local", why, "Add --data-parallel-address HEAD.", run)


def _sglang_nodes(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    if found.engine != "sglang":
        return
    joined, size, source = found.number("--nnodes", 1), meant.gpu.gpus_per_node, "SGLang 0.5.23, server_args.py"
    ranks = found.parallel.tensor * found.parallel.pipeline
    if ranks > size * joined:
        mend = "Add --nnodes, --node-rank and --dist-init-addr on each node."
        yield Finding("error", f"--tp {ranks}", f"{joined} x {size} GPUs are fewer", mend, source)
    if joined > 1:
        missing = [name for name in ("--node-rank", "--dist-init-addr") if not found.has(name)]
        if missing:
            why = "the ranks do not find each other"
            yield Finding("error", f"--nnodes without {' and '.join(missing)}", why, "Give them on each node.", source)
        if not found.has("--dist-timeout"):
            why = "nodes load at different speeds, and the first ones wait for the last"
            yield Finding("note", "--dist-timeout", why, "Add --dist-timeout 3600.", "sglang issue 958")
    host = (found.get("--dist-init-addr") or "").rpartition(":")[0]
    if host and not HOST_NAME.match(host) and not host.startswith(("$", "[")):
        why = f"'{host}' is no host name: a guide's word that stands for one"
        yield Finding("warning", "--dist-init-addr", why, "Write the first node's address.", "RFC 1123")


def _number_of_nodes(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    joined = found.number("--nnodes", 1)
    if found.has("--nnodes") and joined != meant.nodes:
        why = f"there are {meant.nodes} nodes"
        yield Finding(
            "error", f"--nnodes {joined}", why, f"Write --nnodes {meant.nodes}, or lint for {joined}.", "--nodes"
        )


def _followers(found: FoundCommand, meant: Meant) -> Iterator[Finding]:
    """Commands of one replica's nodes differ in rank alone (vLLM compares a hash of its configuration)."""
    ignored = PER_NODE_FLAGS | {*MODEL_FLAGS}
    mine = {flag.name: flag.value for flag in found.flags if flag.name not in ignored}
    for number, other in enumerate(found.others, 2):
        theirs = {flag.name: flag.value for flag in other.flags if flag.name not in ignored}
        differing = sorted(
            name
            for name in mine.keys() | theirs.keys()
            if (name in mine, mine.get(name)) != (name in theirs, theirs.get(name))
        )
        differing += ["the model"] if other.model != found.model else []
        if other.engine == found.engine and differing:
            why = f"command {number} of the text differs from the first one in it: the nodes do not join, or hang"
            mend = "Make them the same but for their rank."
            yield Finding(
                "error", ", ".join(differing), why, mend, "vLLM: 'Configuration mismatch detected for engine'"
            )
        ranks = {one.get("--node-rank") for one in (found, other)}
        if other.engine == found.engine and found.has("--nnodes") and len(ranks) == 1:
            why = f"command {number} has the rank of the first one"
            yield Finding("error", f"--node-rank {found.get('--node-rank')}", why, "Number them from 0.", "engines")


def _container(found: FoundCommand, container: Container, gpu: Gpu, meant: Meant | None) -> Iterator[Finding]:
    def warn(what: str, why: str, mend: str, source: str = "docker run") -> Finding:
        return Finding("warning", what, why, mend, source)

    if TEMPORARY_TAG.search(container.image):
        yield _temporary_tag(container.image)
    by_cdi = any(device.startswith("nvidia.com/gpu=") for device in container.values("--device"))
    by_hook = container.has("--gpus") or "nvidia" in container.values("--runtime")
    if gpu.vendor == "nvidia" and not by_cdi and not by_hook:
        yield Finding("error", "--gpus", "the container sees no GPU", "Add --gpus all.", "NVIDIA container toolkit")
    if gpu.vendor == "amd" and not {"/dev/kfd", "/dev/dri"} <= set(container.values("--device")):
        mend = "Add --device=/dev/kfd --device=/dev/dri."
        yield Finding("error", "--device", "the container sees no GPU", mend, "SGLang cookbook, Step-3.5 page")
    if "host" not in container.values("--ipc") and not container.has("--shm-size"):
        why = "ranks share memory, and a container has 64 MB of it"
        yield warn("--ipc", why, "Add --ipc=host --shm-size=32g.", "vllm issue 1710")
    if "host" not in container.values("--network", "--net") and not container.has("-p", "--publish"):
        yield warn("--network", "nothing outside the container reaches its port", "Add --network=host.")
    limits = container.values("--ulimit")
    if meant and meant.nodes > 1 and not any(limit.startswith("memlock") for limit in limits):
        why = "RDMA pins memory, and fails with 'Cannot allocate memory'"
        yield warn("--ulimit", why, "Add --ulimit memlock=-1 --ulimit stack=67108864.", "vllm issue 19613")
    volumes = [value.split(":")[1] if ":" in value else value for value in container.values("-v", "--volume")]
    path = found.model or ""
    if path.startswith("/") and not container.has("--mount") and not any(path.startswith(v) for v in volumes if v):
        mend = f"Add --volume {path}:{path}:ro."
        yield Finding("error", path, "no volume brings it into the container", mend, "docker run")


LOOKS: tuple[Callable[[FoundCommand, Meant], Iterator[Finding]], ...] = (
    _entry_point,
    _model_reference,
    _flag_changes,
    _twice,
    _parsers,
    _remote_code,
    _listening,
    _batched_tokens,
    _quantisation,
    _speculation,
    _environment,
    _number_of_nodes,
    _vllm_nodes,
    _sglang_nodes,
    _followers,
)


def _unknown_flags(found: FoundCommand, meant: Meant, catalogue: Catalogue) -> Iterator[Finding]:
    """Flags that the release's own parser does not have; silent where nobody listed those."""
    path = catalogue.directory / "flags" / f"{meant.engine.name}-{meant.release.version}.txt"
    if not path.is_file():
        return
    valid = {line.strip() for line in path.read_text().splitlines() if line.startswith("-")}
    told = meant.engine.flags.keys()
    for flag in found.flags:
        spellings = {flag.typed, flag.typed.partition(".")[0], flag.typed.partition(".")[0].replace("_", "-")}
        plain = min(spellings, key=len)
        # argparse takes the beginning of a single flag for that flag.
        begun = [name for name in valid if plain.startswith("--") and name.startswith(plain)]
        if spellings & valid or {flag.typed, flag.name} & told or len(begun) == 1:
            continue
        nearest = difflib.get_close_matches(flag.typed.replace("_", "-"), sorted(valid), n=1, cutoff=0.6)
        mend = f"Did you mean {nearest[0]}?" if nearest else "Leave it out."
        why = f"{meant.engine.title} {meant.release.version} has no such flag and stops"
        yield Finding("error", flag.typed, why, mend, f"catalog/flags/{path.name}")


def deployment_of(found: FoundCommand, model: Model, variant: str) -> Deployment:
    """The deployment that a command's flags ask for, in our words; its layout as found."""
    flags = {
        "reasoning": found.has("--reasoning-parser") and found.get("--reasoning-parser") != "none",
        "tool_calls": found.has("--tool-call-parser"),
        "text_only": found.has("--language-model-only") or _json(found.get("--limit-mm-per-prompt")).get("image") == 0,
        "mtp": any(found.has(name) for name in ("--speculative-config", "--speculative-algorithm", "--spec-method")),
    }
    context = found.number("--max-model-len", 0) or found.number("--context-length", 0)
    name = found.get("--served-model-name")
    return Deployment(
        name="found",
        port=None,
        model=model.name,
        variant=variant,
        engine=found.engine or "",
        parallel=found.parallel,
        features=tuple(feature for feature, wanted in flags.items() if wanted),
        context_length=context or None,
        served_name=name if name and re.match(SERVED_NAME, name) else None,
    )


def _broken_rules(found: FoundCommand, meant: Meant, catalogue: Catalogue) -> Iterator[Finding]:
    """The planner's own rules for the layout as found."""
    if meant.model is None or meant.variant is None:
        return
    try:
        _plan(deployment_of(found, meant.model, meant.variant), meant, catalogue)
    except PlanRefusedError as refused:
        for violation in refused.violations:
            if violation.rule != "nearest layout":
                yield _as_finding(violation, "the planner's rules")


def _as_finding(violation: Violation, source: str) -> Finding:
    mend = re.sub(r"deployment_parallel\.expert to true", "expert parallelism", violation.mend)
    return Finding("error", violation.rule, violation.found, mend, source)


def _plan(deployment: Deployment, meant: Meant, catalogue: Catalogue) -> Plan:
    nodes = tuple(
        Node(name=f"node-{number}", address=f"192.0.2.{number}", gpu=meant.gpu.name)
        for number in range(1, meant.nodes + 1)
    )
    return make_plan(PlanRequest(deployment=deployment, nodes=nodes), catalogue)


def todays(found: FoundCommand, gpu: str, nodes: int, catalogue: Catalogue) -> tuple[Plan | None, str]:
    """What we would run for what a command meant, and a sentence on how it came about.

    The layout as found, else the same with whole experts, else the planner's own choice.
    """
    meant = _meant(found, gpu, nodes, catalogue)
    if meant is None or meant.model is None or meant.variant is None:
        reason = "the engine or the model is not known" if found.engine else "the text starts no engine"
        return None, f"there is nothing to run instead: {reason}."
    variant = meant.variant
    if variant == "bf16" and (found.get("--quantization") or "").startswith("fp8") and "fp8" in meant.model.variants:
        variant = "fp8"
    wished = deployment_of(found, meant.model, variant)
    whole = Parallel(**{**found.parallel.model_dump(), "expert": True})
    refusal = ""
    for parallel, how in ((found.parallel, "as found"), (whole, "with whole experts"), ("auto", "chosen by auto")):
        try:
            plan = _plan(wished.model_copy(update={"parallel": parallel}), meant, catalogue)
        except PlanRefusedError as refused:
            refusal = refusal or str(refused)
            continue
        return plan, f"{plan.deployment.topology} {plan.deployment.parallel}, the layout {how}"
    return None, refusal


def _typed(found: FoundCommand, name: str) -> str | None:
    return next((flag.typed for flag in reversed(found.flags) if flag.name == name), None)


def _json(text: str | None) -> dict[str, Any]:
    """A JSON object, empty where it is none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def document(found: FoundCommand, noted: Sequence[Finding], plan: Plan | None, how: str) -> dict[str, Any]:
    """All that is known, as plain data."""
    processes = [
        {"node": node.name, "name": process.name, "argv": list(process.argv), "env": process.env}
        for node in (plan.nodes if plan else ())
        for process in node.processes
    ]
    command = {
        "program": found.program,
        "engine": found.engine,
        "model": found.model,
        "flags": [flag._asdict() for flag in found.flags],
        "environment": dict(found.environment),
        "image": found.container.image if found.container else None,
        "container_options": [str(option) for option in found.container.options] if found.container else [],
    }
    return {
        "command": command,
        "findings": [finding._asdict() for finding in noted],
        "errors": sum(finding.severity == "error" for finding in noted),
        "today": {"how": how, "processes": processes},
    }


def human(noted: Sequence[Finding], plan: Plan | None, how: str) -> str:
    """Findings, one paragraph each, and today's commands."""
    counts = {
        severity: sum(finding.severity == severity for finding in noted) for severity in ("error", "warning", "note")
    }
    head = ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items())
    lines = [head]
    for finding in noted:
        text = f"{finding.why}. {finding.mend} [{finding.source}]"
        lines += ["", f"{finding.severity}: {finding.what}"]
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", f"Today: {how}"]
    if plan:
        lines += ["192.0.2.N stands for the address of node N; 'bin/stepladder plan' gives it for an inventory."]
        for node in plan.nodes:
            for process in node.processes:
                lines += ["", f"{node.name}, {process.name}: {process.purpose}", shell(process)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: the command as one argument (`-` reads it from standard input), and where it is to run.

    Returns: 0 without errors in it, 1 with some, 2 for arguments that cannot be used.
    """
    options = _parser().parse_args(arguments)
    text = sys.stdin.buffer.read().decode(errors="replace") if options.command == "-" else options.command
    catalogue = Catalogue()
    found = parse(text)
    try:
        noted = findings(found, options.gpu, options.nodes, catalogue)
        plan, how = todays(found, options.gpu, options.nodes, catalogue)
    except (PlanRefusedError, CatalogueError) as error:
        print(error, file=sys.stderr)
        return USAGE
    if options.format == "json":
        print(json.dumps(document(found, noted, plan, how), ensure_ascii=False, indent=1))
    else:
        print(human(noted, plan, how), end="")
    return FOUND_ERRORS if any(finding.severity == "error" for finding in noted) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/stepladder lint-command",
        description="Say what is wrong with a serving command found somewhere, and what to run today.",
        allow_abbrev=False,
    )
    parser.add_argument("command", help="the command, in quotes; - reads it from standard input")
    parser.add_argument("--gpu", required=True, help="GPU type of the nodes, as in catalog/gpus.yml")
    parser.add_argument("--nodes", type=_count, default=1, help="how many of them (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,2}", text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 999, found {text!r}")
    return int(text)
