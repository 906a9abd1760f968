"""Verbs that change a node's weights or the node itself ask for its lease like a deploy; no engine is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import lease, weights
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request

import hub

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "stepladder/tiny-step3p5"
HELD, FROZEN = 30, 31

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(600)]

ANN = {
    "run": "aaaa", "who": "ann", "origin": "ops1", "verb": "deploy", "why": "", "deployment": "other",
    "plan_id": "3f9a", "ttl": 600.0, "controller": {},
}  # fmt: skip
HOST = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}


class Node:
    """This machine as the only node, with a complete store that no release names."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.state = folder, folder / "state"
        source = folder / "carried"
        source.mkdir()
        (source / "config.json").write_text("{}")
        self.store = self.state / "models/x--y/v1"
        weights.ensure(Request("x/y", str(self.store), "v1", source="directory", source_path=str(source)), "present")
        self.inventory = folder / "inventory"
        shutil.copytree(REPOSITORY / "inventories/local/group_vars", self.inventory / "group_vars")
        self.has({"localhost": HOST})
        settings = {
            "deployment_name": "e2e", "deployment_port": 18700, "deployment_weights_endpoint": endpoint,
            "confirm_approved": True,
        }  # fmt: skip
        self.options = ["-i", str(self.inventory), "-e", json.dumps(settings)]

    def has(self, hosts: dict[str, dict[str, str]]) -> None:
        named = {
            name: {"deployment_address": f"127.0.0.{number}", "stepladder_state_directory": str(self.state), **host}
            for number, (name, host) in enumerate(hosts.items(), 1)
        }
        groups = {group: {"hosts": dict.fromkeys(hosts)} for group in ("engines", "cpu")}
        (self.inventory / "hosts.yml").write_text(json.dumps({"all": {"hosts": named, "children": groups}}))

    def run(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "bin/stepladder", verb, *self.options, *more],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def log(self) -> list[tuple[Any, ...]]:
        lines = (self.state / "audit/audit.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [(one["event"], one["verb"], one.get("outcome", "")) for one in found]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    root = tmp_path / "hub" / MODEL
    root.mkdir(parents=True)
    (root / "config.json").write_text("{}")
    with hub.Hub(tmp_path / "hub") as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield Node(tmp_path, served.url)
        served.shutdown()


def test_weights_that_a_deploy_has_completed_are_not_removed_before_its_release(node: Node) -> None:
    assert lease.take(str(node.state), ANN) == {"taken": True}
    done = node.run("weights-prune")
    assert done.returncode == HELD, done.stdout + done.stderr
    assert "localhost: held by ann from ops1: deploy other 3f9a" in done.stdout + done.stderr
    assert (node.store / ".stepladder/complete").exists()
    assert node.run("weights-prune", "--check").returncode == 0
    assert (node.store / ".stepladder/complete").exists()
    lease.release(str(node.state), "aaaa", "done")
    done = node.run("weights-prune", "-e", "confirm_cluster=h20-prod")
    assert done.returncode != 0
    assert "Not confirmed, nothing was changed." in done.stdout + done.stderr
    assert node.store.exists()
    done = node.run("weights-prune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not node.store.exists()
    assert node.log()[-2:] == [("begin", "weights-prune", ""), ("end", "weights-prune", "done")]
    before = node.log()
    again = node.run("weights-prune")
    assert again.returncode == 0
    assert "changed=0 " in again.stdout
    assert node.log() == before


def test_a_node_that_the_plan_left_is_looked_at_too(node: Node) -> None:
    left = node.folder / "left"
    shutil.copytree(node.state, left)
    gone = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": "9"}
    node.has({"localhost": HOST, "left": {**HOST, "stepladder_state_directory": str(left)}, "gone": gone})
    done = node.run("weights-prune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gone has no part in the plan and does not answer: it is left as it is." in done.stdout
    assert not node.store.exists()
    assert not (left / node.store.relative_to(node.state)).exists()


# What `prepare` would set is left out: should it not be refused, it would set this very machine.
UNSET = ("-e", json.dumps({"host_tuned": False, "gpu_driver_install": False}))


@pytest.mark.parametrize(("verb", "options"), [("weights", ()), ("prepare", UNSET)])
def test_nothing_is_changed_on_a_frozen_node(node: Node, verb: str, options: tuple[str, ...]) -> None:
    lease.freeze(str(node.state), "ann", "ops1", "trade fair")
    done = node.run(verb, *options)
    assert done.returncode == FROZEN, done.stdout + done.stderr
    assert "localhost: frozen by ann from ops1" in done.stdout + done.stderr
    assert sorted(path.name for path in (node.state / "models").iterdir()) == ["x--y"]
    before = (node.state / "audit/audit.jsonl").read_bytes()
    done = node.run(verb, *options, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (node.state / "audit/audit.jsonl").read_bytes() == before


@pytest.mark.parametrize(("verb", "options"), [("weights", ()), ("prepare", UNSET)])
def test_a_lease_is_taken_and_given_back(node: Node, verb: str, options: tuple[str, ...]) -> None:
    done = node.run(verb, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert node.log() == [("begin", verb, ""), ("end", verb, "done")]
    assert "changed=0 " in node.run(verb, *options).stdout
    assert lease.read(str(node.state)) is None
