"""Which programs are judged, with what, and every question that the catalogue gives rise to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environments
from environments import Overlay
from judging import Question

from stepladder.catalogue import Catalogue
from stepladder.matrix import Case
from stepladder.plan import Process

CATALOGUE = Catalogue()

# Engines that no judge is written for, and why; every other one is judged.
NOT_JUDGED = {
    "transformers": "no engine's command, but a program of this project",
    "tensorrt_llm": "its wheels take several GB and cannot be imported without a GPU",
}


# Of those, engines that `tests/e2e` deploys for real on the CPU.
SERVED_FOR_REAL = {"transformers"}


@dataclass(frozen=True)
class Program:
    """A judged program: one release's command, and Ray's.

    Args:
        name: as in the summary.
        engine: of the plans whose processes are judged.
        version: of that engine.
        executable: the processes' program.
    """

    name: str
    engine: str
    version: str
    executable: str


def programs() -> dict[str, Program]:
    """A judge for each release that a lock pins, by name such as `vllm-0.33.0`; and one for Ray beside each."""
    found: dict[str, Program] = {}
    for engine in CATALOGUE.engines.values():
        if engine.name in NOT_JUDGED:
            continue
        for version in dict.fromkeys(release.version for release in engine.releases):
            if environments.release_lock(CATALOGUE, engine.name, version) is None:
                continue
            name = f"{engine.name}-{version}"
            found[name] = Program(name, engine.name, version, engine.name)
            if "ray" in engine.topologies:
                found[f"ray-for-{name}"] = Program(f"ray-for-{name}", engine.name, version, "ray")
    return found


PROGRAMS = programs()


def overlays(program: Program) -> list[Overlay]:
    """What a program's judge needs beside the base environment."""
    if program.executable == "sglang":
        return [environments.sglang_overlay(CATALOGUE, program.version)]
    ray = environments.ray_overlay(CATALOGUE)
    on_cpu = any(r.platform == "cpu" and r.version == program.version for r in CATALOGUE.engines["vllm"].releases)
    if program.executable == "ray" or on_cpu:
        return [ray]  # the base environment is the CPU's vLLM
    return [environments.vllm_overlay(CATALOGUE, program.version), ray]


def questions(program: Program, matrix: list[Case]) -> Iterator[Question]:
    """What the planner renders for a program, on which GPUs."""
    for case in matrix:
        for node, process in processes(program, case):
            yield question(case, process, f"{case} on {node}")


def processes(program: Program, case: Case) -> Iterator[tuple[str, Process]]:
    """A case's processes that a program's judge judges, each with its node's name."""
    if case.plan is None:
        return
    chosen = case.plan.deployment
    if (chosen.engine, chosen.engine_version) != (program.engine, program.version):
        return
    for node in case.plan.nodes:
        for process in node.processes:
            if command(process)[0] == program.executable:
                yield node.name, process


def command(process: Process) -> tuple[str, tuple[str, ...]]:
    """A process's program and the arguments that it gets, in a container or not."""
    if process.image is None:
        return Path(process.argv[0]).name, process.argv[1:]
    entrypoint = process.argv[process.argv.index("--entrypoint") + 1]
    return entrypoint, process.argv[process.argv.index(process.image) + 1 :]


def question(case: Case, process: Process, label: str = "") -> Question:
    """A process as a question, with its variables and its node's GPUs."""
    assert case.plan is not None
    gpu = CATALOGUE.gpus[case.plan.nodes[0].gpu]
    described: dict[str, Any] = {"platform": gpu.platform, "count": case.plan.nodes[0].gpus}
    if gpu.memory_mib:
        described |= {"memory_mib": gpu.memory_mib}
    if gpu.platform == "cuda":
        described |= {"compute_capability": compute_capability(gpu.architecture)}
    # The judges' own caches and programs are not the node's.
    env = {name: value for name, value in process.env.items() if name not in {"PATH", "HF_HOME"}}
    return Question(command(process)[1], tuple(sorted(env.items())), tuple(sorted(described.items())), label)


def compute_capability(architecture: str) -> str:
    """NVIDIA's two numbers: 9.0 for sm_90, 10.3 for sm_103."""
    digits = architecture.removeprefix("sm_")
    return f"{digits[:-1]}.{digits[-1]}"
