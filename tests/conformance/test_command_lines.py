"""Every command line that the planner can render, before the engines' own parsers and configuration classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import environments
import pytest
from judging import Answers, Verdict
from programs import CATALOGUE, NOT_JUDGED, PROGRAMS, SERVED_FOR_REAL, command, processes, question

from stepladder.catalogue import Verified
from stepladder.matrix import Case, tally

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(1200)]

# What engines say because of where they are judged, or on every start of this kind. Anything else fails.
EXPECTED_WARNINGS = {
    r"^Model Runner V2 requires Triton": "there is no Triton without a GPU",
    r"^Async scheduling is disabled because the V1 model runner does not": "as above: the V1 model runner steps in",
    r"^Triton is not installed\. triton-cpu is expected": "the rehearsal's environment has none",
    r"^Enforce eager set, disabling torch\.compile": "the rehearsal starts faster without compiling",
    r"^Inductor compilation was disabled by user settings": "as above",
    r"^Reset SSM cache type to float": "said of every model on the CPU",
}
SHOWN = 5
VLLM = [name for name, program in PROGRAMS.items() if program.executable == "vllm"]
SGLANG = [name for name, program in PROGRAMS.items() if program.executable == "sglang"]
RAY = [name for name, program in PROGRAMS.items() if program.executable == "ray"]


def unexpected(verdict: Verdict) -> list[str]:
    """Warnings that nothing explains."""
    return [text for text in verdict.warnings if not any(re.search(known, text) for known in EXPECTED_WARNINGS)]


def shown(verdicts: list[Verdict]) -> str:
    """The first verdict of each reason, with how many there are."""
    reasons = defaultdict(list)
    for verdict in verdicts:
        reasons[re.sub(r"\d+", "N", verdict.error or unexpected(verdict)[0])].append(verdict)
    parts = [f"{len(found)} lines, the first: {found[0]}" for found in reasons.values()]
    return f"{len(verdicts)} lines:\n" + "\n".join(parts[:SHOWN])


def judged(name: str, matrix: list[Case], given: Answers) -> Iterator[tuple[Case, list[Verdict]]]:
    """Each case that has processes of a program, with the verdicts on them in rank order."""
    for case in matrix:
        verdicts = [given.by_question[question(case, process)] for _, process in processes(PROGRAMS[name], case)]
        if verdicts:
            yield case, verdicts


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_line_is_accepted_without_a_warning(
    name: str, answers: Callable[[str], Answers], report: list[str]
) -> None:
    given = answers(name)
    rejected = [verdict for verdict in given.verdicts if not verdict.accepted]
    warned = [verdict for verdict in given.verdicts if unexpected(verdict)]
    shallow = sum(verdict.accepted and not verdict.facts for verdict in given.verdicts)
    report.append(
        f"{given.program} {given.version} ({name}): {len(given.verdicts)} lines checked, {shallow} by arguments alone, "
        f"{len(rejected)} rejected, {len(warned)} with warnings, {given.seconds:.0f} s"
    )
    assert given.verdicts, "the matrix has no line for this program"
    assert not rejected, shown(rejected)
    assert not warned, shown(warned)


def test_what_claims_to_be_parsed_is_judged(matrix: list[Case], report: list[str]) -> None:
    """A release is marked `verified: parser` or better because it is judged here, or deployed by `tests/e2e`."""
    judged_releases = {(program.engine, program.version) for program in PROGRAMS.values()}
    unproven = [
        f"{engine.name} {release.version} ({release.platform}) says verified: {release.verified.value}"
        for engine in CATALOGUE.engines.values()
        for release in engine.releases
        if release.verified is not Verified.NO
        and (engine.name, release.version) not in judged_releases
        and not (release.verified is Verified.CPU and engine.name in SERVED_FOR_REAL)
    ]
    assert not unproven, "write a judge, or say verified: no"
    unjudged: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for case in matrix:
        if case.plan and (case.plan.deployment.engine, case.plan.deployment.engine_version) not in judged_releases:
            name = f"{case.plan.deployment.engine} {case.plan.deployment.engine_version}"
            unjudged[name] |= {command(process)[1] for node in case.plan.nodes for process in node.processes}
    for name, lines in unjudged.items():
        reason = NOT_JUDGED.get(name.split()[0], "no lock pins this release")
        report.append(f"{name}: {len(lines)} lines not checked: {reason}")
    counted = tally(matrix)
    report.append(f"environments: {environments.megabytes(environments.CACHE)} MB in .cache/conformance")
    report.append(f"matrix: {counted.total} combinations, {counted.valid} valid, {counted.refused} refused")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_judged_release_is_the_catalogues(name: str, answers: Callable[[str], Answers]) -> None:
    program = PROGRAMS[name]
    if program.executable != "ray":
        assert answers(name).version == program.version


@pytest.mark.parametrize("name", VLLM)
def test_vllm_understands_the_line_as_the_plan_means_it(
    name: str, matrix: list[Case], answers: Callable[[str], Answers]
) -> None:
    """What vLLM works out of a line is what the plan promises: nothing is capped, defaulted or read otherwise."""
    differing = []
    for case, verdicts in judged(name, matrix, answers(name)):
        assert case.plan
        chosen = case.plan.deployment
        mtp = "mtp" if "mtp" in chosen.features else None
        vision = CATALOGUE.models[chosen.model].modality == "vision" and "text_only" not in chosen.features
        for verdict in verdicts:
            facts = verdict.facts
            if not facts:
                continue  # rejected, or on GPUs that nothing stands in for
            expected = {
                "world_size": chosen.parallel.tensor * chosen.parallel.pipeline,
                "max_model_len": chosen.context_length,
                "speculative": mtp,
                "multimodal": vision,
                **({"gpu_memory_utilization": case.plan.memory.fraction} if chosen.platform != "cpu" else {}),
            }
            found = {key: facts.get(key) for key in expected}
            if found != expected:
                differing.append(f"{verdict.question.label}: vLLM has {found}, the plan {expected}")
    assert not differing, "\n".join([f"{len(differing)} lines:", *differing[:SHOWN]])


@pytest.mark.parametrize("name", VLLM)
def test_ranks_of_a_replica_agree_as_vllm_compares_them(
    name: str, matrix: list[Case], answers: Callable[[str], Answers]
) -> None:
    """Data parallel ranks whose configurations hash differently refuse each other ('Configuration mismatch')."""
    several = 0
    for case, verdicts in judged(name, matrix, answers(name)):
        if case.request.deployment.replicas == 1 and len(verdicts) > 1 and all(verdict.facts for verdict in verdicts):
            several += 1
            assert len({verdict.facts["parallel_hash"] for verdict in verdicts}) == 1, str(case)
    assert several, "the matrix has no replica over several nodes"


@pytest.mark.parametrize("name", SGLANG)
def test_sglang_understands_the_line_as_the_plan_means_it(
    name: str, matrix: list[Case], answers: Callable[[str], Answers]
) -> None:
    differing = []
    for case, verdicts in judged(name, matrix, answers(name)):
        assert case.plan
        parallel = case.plan.deployment.parallel
        expected = {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "expert": parallel.tensor if parallel.expert else 1,
            "nodes": len(case.plan.nodes) // case.plan.deployment.replicas or 1,
        }
        memory = case.plan.memory
        for verdict in verdicts:
            found = {key: verdict.facts.get(key) for key in expected}
            if verdict.accepted and found != expected:
                differing.append(f"{verdict.question.label}: SGLang has {found}, the plan {expected}")
            if verdict.accepted and memory.limit and memory.gpu_bytes:
                spare = verdict.facts["memory_fraction"] * memory.gpu_bytes - (memory.limit - memory.runtime)
                if not 0 <= spare < memory.gpu_bytes / 1000:
                    differing.append(
                        f"{verdict.question.label}: weights and KV cache get {spare:,.0f} B more than planned"
                    )
    assert not differing, "\n".join([f"{len(differing)} lines:", *differing[:SHOWN]])


@pytest.mark.parametrize("name", RAY)
def test_every_port_that_ray_chooses_is_in_the_plan(
    name: str, matrix: list[Case], answers: Callable[[str], Answers]
) -> None:
    """A port that the plan does not list is neither opened between peers nor looked at by preflight."""
    missing = set()
    for case in matrix:
        for _, process in processes(PROGRAMS[name], case):
            facts = answers(name).by_question[question(case, process)].facts
            if "--head" in process.argv and facts["client_port"] not in {port.port for port in process.ports}:
                missing.add(f"Ray's client server on {facts['client_port']}: pin it with --ray-client-server-port")
    assert not missing, "\n".join(sorted(missing))
