"""Weights that come while the engine is installed, for real up to there: what becomes of them when that fails.

No engine starts: its packages are asked of an index that is not there. One deployment serves all tests of this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hub

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL, SIZE = "stepladder/tiny-step3p5", 8_000_000

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]

HOST = {
    "ansible_connection": "local",
    "ansible_python_interpreter": "{{ ansible_playbook_python }}",
    "deployment_address": "127.0.0.1",
}
GROUPS = ("engines", "cpu")


class SlowHub(hub.Hub):
    """Rests after each chunk of a file."""

    rest = 1.0

    def count(self, path: str, sent: int) -> None:
        super().count(path, sent)
        time.sleep(self.rest)


class Node:
    """This machine as the only node, its state and its hub."""

    def __init__(self, state: Path, scratch: Path, served: SlowHub) -> None:
        self.state, self.served = state, served
        self.playbook = scratch / "playbook.yml"
        inventory = scratch / "inventory"
        inventory.mkdir()
        groups = {group: {"hosts": {"localhost": None}} for group in GROUPS}
        (inventory / "hosts.yml").write_text(json.dumps({"all": {"hosts": {"localhost": HOST}, "children": groups}}))
        shutil.copytree(REPOSITORY / "inventories/local/group_vars", inventory / "group_vars")
        settings = {
            "stepladder_state_directory": str(state), "deployment_name": "e2e", "deployment_port": 18700,
            "deployment_weights_endpoint": served.url, "engine_venv_index_url": "http://127.0.0.1:9/simple",
            "node_tools_index_url": "",
        }  # fmt: skip
        self.options = ["-i", str(inventory), "-e", json.dumps(settings)]

    @property
    def store(self) -> Path:
        return self.state / "models/stepladder--tiny-step3p5/master"

    def run(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "bin/stepladder", verb, *self.options, *more],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    def play(self, *roles: dict[str, str], **settings: object) -> subprocess.CompletedProcess[str]:
        """The node's plan, then these roles, each in a play of its own."""
        plays = [
            {"hosts": "engines", "gather_facts": False, "tasks": [{"ansible.builtin.include_role": role}]}
            for role in ({"name": "deployment"}, *roles)
        ]
        self.playbook.write_text(json.dumps(plays))
        # The root's group_vars lie beside the playbooks, and have to be read for this one too.
        beside = self.playbook.with_name("group_vars")
        if not beside.exists():
            beside.symlink_to(REPOSITORY / "group_vars")
        command = [Path(sys.executable).with_name("ansible-playbook"), self.playbook, *self.options]
        return subprocess.run(
            [*command, "-e", json.dumps(settings)],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    def sent(self) -> int:
        return sum(self.served.bytes_sent.values())


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    scratch = tmp_path_factory.mktemp("weights")
    root = scratch / "hub" / MODEL
    root.mkdir(parents=True)
    (root / "modeling.py").write_text("x = 1")
    for number in range(10):
        (root / f"model-{number}.safetensors").write_bytes(os.urandom(SIZE))
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    with SlowHub(scratch / "hub") as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield Node(state, scratch, served)
        served.shutdown()
        thread.join()
    shutil.rmtree(state, ignore_errors=True)


def test_a_check_begins_nothing(node: Node) -> None:
    done = node.run("deploy", "--check")
    assert node.sent() == 0, done.stdout
    assert not node.state.exists()


def test_an_installation_that_fails_leaves_the_download_and_says_so(node: Node) -> None:
    node.served.rest = 4.0  # slow enough to be caught at work by the next test
    done = node.run("deploy", "-e", "model_weights_max_workers=2")
    assert done.returncode != 0
    assert "The weights come on localhost while the engine is installed." in done.stdout, done.stdout
    begun = done.stdout.index("The weights come on")
    failed = done.stdout.index("127.0.0.1:9")
    assert begun < failed
    assert "they go on coming, for 1 d at most" in done.stdout
    assert "Bring the weights" not in done.stdout
    assert node.store.is_dir()
    assert not (node.store / ".stepladder/complete").exists()


def test_a_rerun_takes_the_download_up_and_no_byte_comes_twice(node: Node) -> None:
    command = [sys.executable, "bin/stepladder", "weights", *node.options]
    run = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert run.stdout
    said = []
    for line in run.stdout:
        said.append(line)
        if "waiting for process " in line:
            assert f"which works on {node.store}: downloaded " in line
            node.served.rest = 0.1
    assert run.wait() == 0, said
    assert node.served.rest == 0.1, said
    assert node.sent() == 10 * SIZE + len("x = 1")
    assert (node.store / ".stepladder/complete").exists()


def test_weights_that_are_there_are_not_begun_with(node: Node) -> None:
    done = node.run("deploy")
    assert done.returncode != 0
    assert "The weights come on" not in done.stdout


def test_the_plan_shows_the_code_by_its_hash(node: Node) -> None:
    done = node.run("plan", "-e", "plan_diff=true")
    assert done.returncode == 0, done.stdout
    assert f"  {hashlib.sha256(b'x = 1').hexdigest()[:16]}  modeling.py" in done.stdout


BEGIN, BRING = {"name": "model_weights", "tasks_from": "begin"}, {"name": "model_weights"}


def emptied(node: Node) -> None:
    subprocess.run(["rm", "-rf", str(node.store)], check=True)
    node.served.bytes_sent.clear()


def test_what_was_begun_is_shown_and_waited_for_later_in_the_run(node: Node) -> None:
    emptied(node)
    done = node.play(BEGIN, BRING)
    assert done.returncode == 0, done.stdout
    assert "The weights come on localhost" in done.stdout
    assert "downloaded " in done.stdout
    assert "changed=1 " in done.stdout
    assert node.sent() == 10 * SIZE + len("x = 1")
    again = node.play(BEGIN, BRING)
    assert "changed=0 " in again.stdout
    assert node.sent() == 10 * SIZE + len("x = 1")


def test_a_failure_of_the_weights_is_told_where_they_are_waited_for(node: Node) -> None:
    emptied(node)
    node.served.rest = 1.0
    node.served.faults.cut(f"{MODEL}/model-3.safetensors", 1_000_000)
    done = node.play(BEGIN, BRING, model_weights_deadline=4)
    assert done.returncode != 0
    assert "did not end in 4 s (deadline) and was stopped. What was fetched is kept" in done.stdout, done.stdout
    node.served.rest = 0.0
    assert node.play(BEGIN, BRING).returncode == 0


def test_changed_code_is_refused_before_the_first_byte_until_it_is_accepted(node: Node) -> None:
    release = node.state / "deployments/e2e/releases/aa"
    release.mkdir(parents=True)
    runs = {"path": str(node.store), "model_id": MODEL, "revision": "master"}
    (release / "plan.json").write_text(json.dumps({"format_version": 1, "node": {"weights": runs}}))
    (node.state / "deployments/e2e/current").symlink_to("releases/aa")
    emptied(node)
    (node.served.tree.files(MODEL)["modeling.py"]).write_text("x = 2")
    old, new = (hashlib.sha256(text).hexdigest()[:16] for text in (b"x = 1", b"x = 2"))
    done = node.play(BEGIN, BRING)
    assert done.returncode != 0
    assert f"modeling.py: {old} -> {new}" in done.stdout, done.stdout
    assert node.sent() == 0
    accepted = re.search(r"-e weights_accept_code=(\w{12})", done.stdout)
    assert accepted, done.stdout
    done = node.play(BEGIN, BRING, weights_accept_code=accepted[1])
    assert done.returncode == 0, done.stdout
    assert (node.store / "modeling.py").read_text() == "x = 2"
