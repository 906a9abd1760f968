"""The walk over the catalogue: what it asks for, that it asks for everything, and how it counts."""

from __future__ import annotations

from collections import Counter

import pytest

from stepladder.catalogue import Catalogue
from stepladder.errors import Violation
from stepladder.matrix import Case, answered, cases, feature_sets, layouts, nodes, requests, tally
from stepladder.planner import make_plan
from stepladder.request import Deployment, Parallel, PlanRequest, parse_request

CATALOGUE = Catalogue()


@pytest.fixture(scope="module")
def asked() -> list[PlanRequest]:
    return list(requests(CATALOGUE))


@pytest.fixture(scope="module")
def sample(asked: list[PlanRequest]) -> list[Case]:
    """Every hundredth request, answered: enough to see plans and refusals, in a second."""
    return [answered(request, CATALOGUE) for request in asked[::100]]


def test_every_entry_of_the_catalogue_is_asked_for(asked: list[PlanRequest]) -> None:
    assert {wish.deployment.model for wish in asked} == CATALOGUE.models.keys()
    assert {wish.deployment.engine for wish in asked} == CATALOGUE.engines.keys()
    assert {wish.nodes[0].gpu for wish in asked} == CATALOGUE.gpus.keys()
    variants = {(model.name, variant) for model in CATALOGUE.models.values() for variant in model.variants}
    assert {(wish.deployment.model, wish.deployment.variant) for wish in asked} == variants
    topologies = {(engine.name, topology) for engine in CATALOGUE.engines.values() for topology in engine.topologies}
    assert {(wish.deployment.engine, wish.deployment.topology) for wish in asked} >= topologies
    releases = {(e.name, release.version) for e in CATALOGUE.engines.values() for release in e.releases}
    wished = {(wish.deployment.engine, wish.deployment.engine_version) for wish in asked}
    served = {name for model in CATALOGUE.models.values() for v in model.variants.values() for name in v.engines}
    assert {release for release in releases if release[0] in served} <= wished


def test_nothing_is_asked_for_twice(asked: list[PlanRequest]) -> None:
    counted = Counter(wish.model_dump_json() for wish in asked)
    assert [wish for wish, times in counted.items() if times > 1] == []


def test_what_fits_on_one_node_is_asked_of_one_node_alone(asked: list[PlanRequest]) -> None:
    again = [
        wish
        for wish in asked
        if len(wish.nodes) > 1
        and isinstance(wish.deployment.parallel, Parallel)
        and wish.deployment.parallel.world_size <= CATALOGUE.gpus[wish.nodes[0].gpu].gpus_per_node
    ]
    assert again == []


def test_what_no_engine_serves_is_asked_for_once_and_refused(asked: list[PlanRequest]) -> None:
    unserved = {
        (model.name, name)
        for model in CATALOGUE.models.values()
        for name, variant in model.variants.items()
        if not variant.engines
    }
    assert unserved
    wishes = [wish for wish in asked if (wish.deployment.model, wish.deployment.variant) in unserved]
    assert len(wishes) == len(unserved) * len(CATALOGUE.gpus) * len(CATALOGUE.engines) * 2


def test_a_request_is_what_an_inventory_would_say(asked: list[PlanRequest]) -> None:
    wish = next(wish for wish in asked if len(wish.nodes) == 2 and isinstance(wish.deployment.parallel, Parallel))
    assert parse_request(wish.model_dump(mode="json")) == wish


def test_a_case_holds_the_planners_own_answer(sample: list[Case]) -> None:
    planned = [case for case in sample if case.plan]
    refused = [case for case in sample if not case.plan]
    assert planned and refused
    assert planned[0].plan == make_plan(planned[0].request, CATALOGUE)
    assert all(case.violations for case in refused)
    assert not any(case.violations for case in planned)


def test_tally_counts_cases_and_the_rules_that_refuse_them() -> None:
    request = PlanRequest(deployment=Deployment(model="m", engine="e"), nodes=())
    heads, memory = Violation("attention heads", "a", "b"), Violation("GPU memory", "c", "d")
    plan = next(case.plan for case in cases(CATALOGUE, (1,)) if case.plan)
    found = tally([Case(request, plan), Case(request, None, (heads, memory)), Case(request, None, (memory, memory))])
    assert (found.valid, found.refused, found.total) == (1, 2, 3)
    assert found.by_rule == {"GPU memory": 2, "attention heads": 1}


@pytest.mark.parametrize(
    ("gpus", "count", "experts", "expected"),
    [
        (1, 1, True, ["TP1"]),
        (2, 1, False, ["TP1", "TP1xDP2", "TP2"]),
        (2, 1, True, ["TP1", "TP1xDP2", "TP1xDP2+EP", "TP2", "TP2+EP"]),
        (1, 2, False, ["TP1", "TP1xDP2", "TP1xPP2", "TP2"]),
    ],
)
def test_layouts(gpus: int, count: int, experts: bool, expected: list[str]) -> None:
    assert sorted(map(str, layouts(gpus, count, experts))) == expected


def test_layouts_of_two_nodes_hold_the_published_ones() -> None:
    found = set(map(str, layouts(8, 2, True)))
    assert {"TP16", "TP8xPP2", "TP8xDP2", "TP1xDP16+EP", "TP8+EP"} <= found


def test_feature_sets_leave_out_what_a_model_has_not() -> None:
    names = {name: {feature for chosen in feature_sets(model) for feature in chosen}
             for name, model in CATALOGUE.models.items()}  # fmt: skip
    assert names["step3"] == {"reasoning", "tool_calls", "text_only"}
    assert names["step-3.5-flash"] == {"reasoning", "tool_calls", "mtp"}
    assert len(feature_sets(CATALOGUE.models["step3"])) == 8


def test_nodes_have_addresses_of_their_own() -> None:
    made = nodes(CATALOGUE.gpus["h20-96"], 3)
    assert [node.address for node in made] == ["198.18.0.1", "198.18.0.2", "198.18.0.3"]
