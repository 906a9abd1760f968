"""`preflight` and `prepare` for one node of a replica: it is held against its part of the plan like all together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import verbs

STEP3 = {
    "deployment_name": "step3", "deployment_model": "step3", "deployment_engine": "vllm", "deployment_gpu": "h20-96",
    "ansible_connection": "local", "ansible_python_interpreter": sys.executable,
}  # fmt: skip


def test_one_node_of_a_replica_is_held_against_the_plan(tmp_path: Path) -> None:
    """This machine has no eight H20, so it is not fit, whether the replica's other node is asked or not."""
    hosts = {name: {"deployment_address": f"198.18.0.{place}"} for place, name in enumerate("ab", 1)}
    inventory = {"all": {"children": {"engines": {"hosts": hosts}}}}
    (tmp_path / "inventory.yml").write_text(json.dumps(inventory))
    done = verbs.run(tmp_path, "preflight", {**STEP3, "stepladder_state_directory": "/srv/none"}, "--limit", "a")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Not fit: a." in done.stdout
    assert "8 x H20" in done.stdout
    assert "needs no plan" not in done.stdout


@pytest.mark.parametrize(("verb", "told"), [("preflight", {}), ("acceptance", {"acceptance_without": ["network"]})])
def test_the_node_that_does_not_answer_is_named_and_no_other(verb: str, told: dict[str, Any], tmp_path: Path) -> None:
    """The answer for all nodes is a task of the first one."""
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    hosts = {"a": local, "b": {"ansible_host": "127.0.0.1", "ansible_port": 1}}
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"children": {"engines": {"hosts": hosts}}}}))
    state = {"stepladder_state_directory": str(tmp_path / "state"), "deployment_gpu": "cpu"}
    done = verbs.run(tmp_path, verb, {**state, **told})
    assert done.returncode == 4, done.stdout + done.stderr
    assert "b: UNREACHABLE" in done.stdout
    assert "a: UNREACHABLE" not in done.stdout
