"""What changes between two plans, in words that name the flag, the path and both values."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder.catalogue import Catalogue
from stepladder.difference import difference, node_text, order_text
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request


def plan_for(**wish: Any) -> Plan:
    node = {"name": "n0", "address": "198.18.0.1", "gpu": "h200"}
    deployment = {"model": "step-3.5-flash", "variant": "fp8", "engine": "vllm", **wish}
    return make_plan(parse_request({"deployment": deployment, "nodes": [node]}), Catalogue())


def test_the_same_plan_has_no_difference() -> None:
    assert difference(plan_for().as_document(), plan_for().as_document()) == []


def test_a_changed_flag_is_named_with_both_values() -> None:
    before, after = (plan_for(context_length=length, parallel="TP4+EP").as_document() for length in (4096, 8192))
    lines = difference(before, after)
    path = "nodes[n0].processes[vllm-0].argv"
    assert f"- {path}: --max-model-len 4096" in lines
    assert f"+ {path}: --max-model-len 8192" in lines
    assert "~ deployment.context_length: 4096 -> 8192" in lines
    assert not any("--tensor-parallel-size" in line for line in lines)


def test_a_new_process_is_added_and_an_old_one_removed() -> None:
    one, two = (plan_for(parallel="TP4+EP", replicas=count).as_document() for count in (1, 2))
    assert "+ nodes[n0].processes[vllm-1].name: vllm-1" in difference(one, two)
    assert "- nodes[n0].processes[vllm-1].name: vllm-1" in difference(two, one)


def test_notes_and_ids_are_no_difference() -> None:
    document = plan_for().as_document()
    assert difference(document, {**document, "id": "other", "notes": []}) == []


def test_text_for_a_node() -> None:
    kept = plan_for(parallel="TP4+EP").slices()["n0"]
    assert node_text("n0", {}, kept) == "n0: nothing is deployed yet."
    assert node_text("n0", kept, kept) == "n0: nothing changes."
    changed = node_text("n0", kept, plan_for(parallel="TP8+EP").slices()["n0"])
    assert changed.splitlines()[0] == f"n0: against {kept['plan_id']}, which runs now:"
    assert "  + node.processes[vllm-0].argv: --tensor-parallel-size 8" in changed


def test_what_is_wrong_on_a_node_is_told_where_the_plan_is_the_same() -> None:
    kept = plan_for(parallel="TP4+EP").slices()["n0"]
    dead, moved = "vllm-0: stopped, not running", f"release: {kept['plan_id']} is current, x is wanted"
    assert node_text("n0", kept, kept, [dead, "unit /u: was changed since the release was proven"]).splitlines() == [
        "n0: the plan is the same; a deploy puts right:",
        "  vllm-0: stopped, not running",
        "  unit /u: was changed since the release was proven",
    ]
    other = plan_for(parallel="TP8+EP").slices()["n0"]
    both = node_text("n0", kept, other, [moved, "vllm-0: runs another command than wanted", "environment /v: is gone"])
    assert both.splitlines()[-2:] == ["  beside that a deploy puts right:", "    environment /v: is gone"]
    assert "put" not in node_text("n0", kept, other, [moved])


WELL = {"running": True, "phase": "ready", "outdated": False}
DEAD = {"running": False, "phase": "stopped", "outdated": False}
OLD = {**WELL, "outdated": True}


@pytest.mark.parametrize(
    ("states", "reasons", "text"),
    [
        ([WELL, WELL], [], ""),
        # Nobody loses anything: what does not answer comes first.
        ([DEAD, WELL], ["vllm-0: stopped, not running"], ""),
        ([OLD, OLD], ["unit"], "One after the other, while the others answer: replica 0; then replica 1."),
    ],
)
def test_the_order_is_told_where_the_plan_is_the_same(
    states: list[dict[str, Any]], reasons: list[str], text: str
) -> None:
    kept = plan_for(parallel="TP4+EP", replicas=2).slices()["n0"]
    named = [{"name": f"vllm-{number}", **each} for number, each in enumerate(states)]
    seen = {"current": kept["plan_id"], "reasons": reasons, "states": named}
    variables = {"n0": {"deployment_slice": kept, "release_slice": kept, "release_seen": seen}}
    assert order_text(variables, ["n0"], 1) == text
