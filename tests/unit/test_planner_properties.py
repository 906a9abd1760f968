"""Whatever is asked of the planner: a plan that keeps every rule, or a refusal that says what works; never a crash."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.catalogue import Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.matrix import layouts
from stepladder.plan import Plan
from stepladder.planner import make_plan, settle
from stepladder.request import FEATURES, Parallel, parse_request
from stepladder.rules import SETTING_RULES, violations

CATALOGUE = Catalogue()
VARIANTS = sorted({name for model in CATALOGUE.models.values() for name in model.variants})
VERSIONS = sorted({release.version for engine in CATALOGUE.engines.values() for release in engine.releases})
NAMES = st.text(max_size=12)

PARALLEL = st.one_of(
    st.just("auto"),
    st.builds(
        lambda tensor, pipeline, data, expert: {"tensor": tensor, "pipeline": pipeline, "data": data, "expert": expert},
        st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([1, 2, 3, 8, 16]),
        st.booleans(),
    ),
)
WISHES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(CATALOGUE.models)),
        "engine": st.sampled_from(sorted(CATALOGUE.engines)),
        "parallel": PARALLEL,
    },
    optional={
        "variant": st.sampled_from(VARIANTS),
        "topology": st.sampled_from(["auto", "single", "ray", "mp", "dist_init"]),
        "replicas": st.integers(1, 9),
        "features": st.sets(st.sampled_from(sorted(FEATURES))).map(sorted),
        "context_length": st.integers(1, 400_000),
        "concurrency": st.integers(1, 64),
        "engine_version": st.sampled_from(VERSIONS),
        "install": st.sampled_from(["auto", "venv", "container"]),
    },
)
FLEETS = st.tuples(st.sampled_from(sorted(CATALOGUE.gpus)), st.integers(1, 6), st.booleans())


def request_of(wish: dict[str, Any], fleet: tuple[str, int, bool]) -> Any:
    gpu, count, declared = fleet
    interface = {"interface": "eth1"} if declared else {}
    nodes = [{"name": f"n{i}", "address": f"198.18.0.{i + 1}", "gpu": gpu, **interface} for i in range(count)]
    return parse_request({"deployment": wish, "nodes": nodes})


@settings(max_examples=300, deadline=None)
@given(WISHES, FLEETS)
def test_a_plan_keeps_every_rule_and_a_refusal_says_what_works(
    wish: dict[str, Any], fleet: tuple[str, int, bool]
) -> None:
    request = request_of(wish, fleet)
    try:
        plan = make_plan(request, CATALOGUE)
    except PlanRefusedError as refusal:
        assert refusal.violations
        assert all(violation.rule and violation.found and violation.mend for violation in refusal.violations)
        check_advice(wish, fleet, refusal)
        return
    assert violations(settle(request, CATALOGUE), plan.deployment.parallel) == []
    check_invariants(plan)


def check_advice(wish: dict[str, Any], fleet: tuple[str, int, bool], refusal: PlanRefusedError) -> None:
    """A refusal over the layout names one that is taken as it stands, or says of how many nodes one would be."""
    own = [violation for violation in refusal.violations if violation.rule == "nearest layout"]
    try:
        setting = settle(request_of(wish, fleet), CATALOGUE)
    except PlanRefusedError:
        assert not own, "no layout was looked at yet"
        return
    hopeless = [rule for rule in SETTING_RULES if rule(setting, Parallel())]
    if not own:
        assert hopeless
        return
    (advice,) = own
    gpu, count, declared = fleet
    if named := re.fullmatch(r"(TP\S+) works here(, once the above is mended)?\.", advice.mend):
        assert bool(named[2]) == bool(hopeless)
        if not hopeless:
            make_plan(request_of({**wish, "parallel": named[1]}, fleet), CATALOGUE)
    elif elsewhere := re.search(r"; on (\d+) nodes (TP\S+) does\.$", advice.mend):
        assert int(elsewhere[1]) > count
        if not hopeless:
            make_plan(request_of({**wish, "parallel": elsewhere[2]}, (gpu, int(elsewhere[1]), declared)), CATALOGUE)
    else:
        assert advice.mend.startswith("No layout works on nodes of ")
        for layout in layouts(setting.gpus_per_node, setting.nodes, experts=True):
            assert violations(setting, layout), f"{layout} works"


def check_invariants(plan: Plan) -> None:
    """What holds of every plan, whatever was asked for."""
    assert Plan.from_document(json.loads(plan.to_json())) == plan
    assert plan.memory.margin is None or plan.memory.margin >= 0
    for node in plan.nodes:
        names = [process.name for process in node.processes]
        assert names
        assert len(names) == len(set(names))
        ports = [(port.port, port.host) for process in node.processes for port in process.ports]
        assert len(ports) == len(set(ports)), "two processes of a node listen on one port"
        for process in node.processes:
            assert all(isinstance(word, str) and word for word in process.argv)
            assert not re.search(r"token=|api-key", " ".join(process.argv))
            assert (process.image is None) == (node.venv is not None)
    gpus = [
        (node.name, gpu)
        for node in plan.nodes
        for process in node.processes
        for gpu in process.env.get("CUDA_VISIBLE_DEVICES", process.env.get("HIP_VISIBLE_DEVICES", "")).split(",")
        if gpu and not process.name.startswith("ray")
    ]
    assert len(gpus) == len(set(gpus)), "two replicas share a GPU"
    assert len({endpoint.base_url for endpoint in plan.endpoints}) == plan.deployment.replicas


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["name", "model", "engine", "variant", "topology", "parallel", "replicas", "port", "features"]),
        st.one_of(
            NAMES, st.integers(), st.none(), st.lists(NAMES, max_size=3), st.dictionaries(NAMES, NAMES, max_size=2)
        ),
    )
)
def test_nonsense_is_refused_without_a_crash(wish: dict[str, Any]) -> None:
    try:
        make_plan(request_of(wish, ("h200", 1, True)), CATALOGUE)
    except PlanRefusedError as refusal:
        assert "variable" in str(refusal) or "unknown" in str(refusal)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(1, 64)] * 3, st.booleans()))
def test_a_layout_reads_back_as_it_is_printed(sizes: tuple[int, int, int, bool]) -> None:
    tensor, pipeline, data, expert = sizes
    parallel = Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=expert)
    wish = {"model": "step3", "engine": "vllm", "parallel": str(parallel)}
    assert request_of(wish, ("h200", 1, True)).deployment.parallel == parallel
