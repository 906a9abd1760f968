"""Where the watchdog's metrics go when it goes, by the role itself: what keeps the processes is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STALLED = 'stepladder_engine_stalled{deployment="d",process="vllm-0"} 1\n'
EMPTY = {"plan_id": "a", "node": {"processes": [{"health": {"model": "tiny"}}], "tools": {"path": "/nowhere"}}}


class Node:
    """A node on this machine with the node exporter's folder, and another one."""

    def __init__(self, root: Path) -> None:
        self.root, self.state = root, root / "state"
        self.folders = [root / "exporter", root / "other"]
        for folder in self.folders:
            folder.mkdir()
        (self.state / "deployments").mkdir(parents=True)
        # A watchdog writes every 15 s until it is stopped or started again.
        writes = {
            "ansible.builtin.copy": {"dest": str(self.folders[0] / "stepladder-d.prom"), "content": STALLED},
            "when": "last_write | default(false)",
        }
        none = {"ansible.builtin.set_fact": {"service_launcher": "/bin/true", "release_deployments": {}}}
        for role, name, task in (
            ("service", "manager", none), ("service", "start", writes), ("service", "remove", writes),
            ("release", "look", none),
        ):  # fmt: skip
            place = root / "roles" / role / "tasks"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.yml").write_text(json.dumps([task]))

    def have(self, **variables: Any) -> None:
        """Run the role.

        Raises:
            AssertionError: it failed.
        """
        more = {
            "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "d",
            "stepladder_state_directory": str(self.state), "deployment_slice": EMPTY, **variables,
        }  # fmt: skip
        plays = [{"hosts": "all", "gather_facts": False, "roles": ["watchdog"]}]
        (self.root / "play.yml").write_text(json.dumps(plays))
        environ = {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_LOCAL_TEMP": str(self.root / "tmp"),
            "ANSIBLE_ROLES_PATH": f"{self.root / 'roles'}:{ROOT / 'roles'}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", "-i", "n0,", "play.yml", "-e", json.dumps(more)],
            cwd=self.root, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def exported(self) -> list[str]:
        """What the exporter's folder tells of."""
        return sorted(path.name for path in self.folders[0].iterdir())


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    directory = made.state / "watchdog/d"
    directory.mkdir(parents=True)
    (directory / "settings.json").write_text(json.dumps({"textfile_directory": str(made.folders[0])}))
    for name in ("d", "e"):
        (made.folders[0] / f"stepladder-{name}.prom").write_text(STALLED)
    return made


def test_the_metrics_of_a_watchdog_that_is_removed_go_with_it(node: Node) -> None:
    """Also where the setting went before; those of another deployment stay."""
    node.have(watchdog_mode="off", watchdog_textfile_directory="")
    assert node.exported() == ["stepladder-e.prom"]
    assert not (node.state / "watchdog/d").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("now", "left"), [("exporter/", ["stepladder-d.prom", "stepladder-e.prom"]), ("other", ["stepladder-e.prom"])]
)
def test_the_metrics_of_an_earlier_setting_go(node: Node, now: str, left: list[str]) -> None:
    node.have(watchdog_mode="observe", watchdog_textfile_directory=f"{node.root}/{now}", last_write=True)
    assert node.exported() == left
