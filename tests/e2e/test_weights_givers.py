"""A node that is added takes the model from those that have it: the plays of deploy, on three nodes that are folders.

All run in a network namespace of their own, where each node has an address: of loopback no exchange is made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from ansible_collections.stepladder.core.plugins.module_utils import weights
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request

import hub

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
MODEL, FILES, SIZE = "o/m", 4, 3_000_000
ADDRESSES = {"n1": "198.18.7.1", "n2": "198.18.7.2", "n3": "198.18.7.3"}
HUB = "198.18.7.9"
ALONE = ["unshare", "--map-root-user", "--net"]
UP = "ip link set lo up && for one in {addresses}; do ip address add $one/32 dev lo; done"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not shutil.which("unshare")
        or subprocess.run([*ALONE, "ip", "link"], check=False, capture_output=True).returncode != 0,
        reason="no network namespace can be made here",
    ),
]

RUN = """\
set -e
{up}
{python} {program} --root {root} --host {hub} --port 8100 >{log} 2>&1 & served=$!
trap 'kill $served' EXIT
{ansible} -i {inventory} {playbook}
"""


def store(folder: Path, node: str) -> Path:
    return folder / node / "models" / "o--m" / "master"


def node_slice(folder: Path, node: str) -> dict:
    tools = PROGRAMS.parent
    return {
        "deployment": {"name": "step"},
        "node": {
            "address": ADDRESSES[node], "processes": [],
            "weights": {
                "model_id": MODEL, "revision": "master", "path": str(store(folder, node)), "bytes": FILES * SIZE,
                "endpoint": f"http://{HUB}:8100",
            },
            # Of the second nothing runs: who only helps may fail.
            "tools": {"path": str(folder / "gone" if node == "n2" else tools)},
            "installer": {"path": str(folder / node)},
        },
    }  # fmt: skip


def inventory(folder: Path, settings: dict[str, str]) -> Path:
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    hosts = {
        name: {**local, "deployment_slice": node_slice(folder, name), "stepladder_state_directory": str(folder / name)}
        for name in ADDRESSES
    }
    path = folder / "hosts.yml"
    path.write_text(json.dumps({"all": {"hosts": hosts, "vars": settings}}))
    return path


def playbook(folder: Path, rehearsal: bool) -> Path:
    """The two plays of deploy as they are, after one that names the nodes as those before them do."""
    plays = yaml.safe_load((REPOSITORY / "playbooks/deploy.yml").read_text())
    chosen = [play for play in plays if play["name"] in {"Begin with the weights", "Bring the weights"}]
    assert len(chosen) == 2
    groups = {"n1": "giving_nodes", "n2": "giving_nodes", "n3": "changing_nodes"}
    name = {"ansible.builtin.group_by": {"key": "{{ groups_of[inventory_hostname] }}"}}
    hub_too = {"ansible.builtin.add_host": {"name": "elsewhere", "groups": ["rehearsal_hub"]}}
    first = {
        "hosts": "all", "gather_facts": False, "vars": {"groups_of": groups}, "tasks": [name, *([hub_too] * rehearsal)],
    }  # fmt: skip
    path = folder / "playbook.yml"
    path.write_text(json.dumps([first, *chosen]))
    return path


@pytest.mark.parametrize(
    ("rehearsal", "settings"),
    [
        pytest.param(False, {}, id="beside the installation"),
        pytest.param(True, {}, id="after it"),
        pytest.param(
            False, {"model_weights_source": "directory", "model_weights_source_path": "/nonexistent"},
            id="carried to the first alone",
        ),
    ],
)  # fmt: skip
def test_a_node_that_is_added_takes_all_from_those_that_have_it(
    tmp_path: Path, rehearsal: bool, settings: dict[str, str]
) -> None:
    root = tmp_path / "hub" / MODEL
    root.mkdir(parents=True)
    for number in range(FILES):
        (root / f"model-{number}.safetensors").write_bytes(os.urandom(SIZE))
    with hub.Hub(tmp_path / "hub") as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        for name in ("n1", "n2"):
            request = Request(
                MODEL, str(store(tmp_path, name)), client=str(PROGRAMS / "modelscope"), endpoint=served.url
            )
            weights.ensure(request, "present")
        served.shutdown()
    (tmp_path / "n3").mkdir()
    kept = {path.name: path.read_bytes() for path in root.iterdir()}
    # The branch moves on; a node that follows it would serve something else than its neighbours.
    (root / "model-0.safetensors").write_bytes(b"moved")
    before = store(tmp_path, "n1").joinpath(".stepladder/manifest.json").read_bytes()
    log = tmp_path / "hub.log"
    script = RUN.format(
        up=UP.format(addresses=" ".join([*ADDRESSES.values(), HUB])), python=sys.executable, program=hub.__file__,
        root=tmp_path / "hub", hub=HUB, log=log, ansible=PROGRAMS / "ansible-playbook",
        inventory=inventory(tmp_path, settings), playbook=playbook(tmp_path, rehearsal),
    )  # fmt: skip
    run = subprocess.run(
        [*ALONE, "sh", "-c", script], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    found = {path.name: path.read_bytes() for path in store(tmp_path, "n3").iterdir() if path.is_file()}
    assert found == kept
    assert (store(tmp_path, "n3") / ".stepladder/complete").exists()
    asked = log.read_text()
    assert "is served at" in asked
    assert not re.findall(r'"GET \S+', asked), "the hub was asked"
    assert store(tmp_path, "n1").joinpath(".stepladder/manifest.json").read_bytes() == before
    assert f"{tmp_path}/gone/bin/python cannot be started" in said, "what the second node could not do is told"
