"""`preflight` and `prepare` for one node of a replica: it is held against its part of the plan like all together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
    state = {"stepladder_state_directory": str(tmp_path / "state")}
    done = verbs.run(tmp_path, "preflight", {**STEP3, **state}, "--limit", "a")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Not fit: a." in done.stdout
    assert "8 x H20" in done.stdout
    assert "needs no plan" not in done.stdout
