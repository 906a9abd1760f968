"""The plays of `prepare` as they are, without the nodes: roles that work on a node are left out or stand in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder import preparing

ROOT = Path(__file__).resolve().parents[2]
PLAYS = yaml.safe_load((ROOT / "playbooks" / "prepare.yml").read_text())
SAYS = "- ansible.builtin.debug: {msg: 'STAND-IN for ROLE on {{ inventory_hostname }}'}\n"


class Run:
    """Some plays of `prepare` on hosts that are this machine, with stand-ins in place of some roles."""

    def __init__(self, folder: Path, stand_ins: dict[str, str]) -> None:
        self.folder = folder
        (folder / "playbooks").mkdir()
        for name in ("group_vars", "catalog"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "playbooks" / "group_vars").symlink_to(ROOT / "group_vars")
        for role, tasks in stand_ins.items():
            (folder / "roles" / role / "tasks").mkdir(parents=True)
            for entry in ("main", "hold"):
                (folder / "roles" / role / "tasks" / f"{entry}.yml").write_text(tasks.replace("ROLE", role))

    def __call__(self, plays: tuple[str, ...], hosts: dict[str, dict[str, Any]], **variables: Any) -> str:
        (self.folder / "playbooks" / "prepare.yml").write_text(
            yaml.safe_dump([play for play in PLAYS if play["name"] in plays], sort_keys=False)
        )
        common = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, **variables}
        inventory = {"all": {"vars": common, "children": {"engines": {"hosts": hosts}}}}
        (self.folder / "hosts.json").write_text(json.dumps(inventory))
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.folder / "hosts.json")]
        environ = {
            **os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_ROLES_PATH": f"{self.folder}/roles:{ROOT}/roles", "ANSIBLE_REMOTE_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_STDOUT_CALLBACK": "default",
        }  # fmt: skip
        done = subprocess.run(
            [*command, str(self.folder / "playbooks" / "prepare.yml")],
            cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        self.status = done.returncode
        return done.stdout + done.stderr


def test_settings_that_later_roles_could_not_use_are_told_before_anything_is_changed(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    said = run(
        ("See what is in the way",), {"a": {"deployment_gpu": "cpu"}},
        container_runtime_mirrors=["registry.site"], python_mirror_index_url="mirror/simple", host_firewal=True,
    )  # fmt: skip
    assert run.status == 2, said
    text = " ".join(said.split())
    assert ": 3 faults" in text
    assert "- setting: container_runtime_mirrors: 'registry.site' is not of the form https://HOST" in text
    assert "- setting: python_mirror_index_url: 'mirror/simple' is neither an address" in text
    assert "host_firewal" in text


H20 = {"deployment_gpu": "h20-96"}
STEP3 = {
    "deployment_name": "step3", "deployment_model": "step3", "deployment_engine": "vllm", "deployment_topology": "mp",
}  # fmt: skip
THREE = {name: H20 | {"deployment_address": f"198.18.0.{place}"} for place, name in enumerate("abc", 1)}


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        (STEP3 | {"deployment_install": "container"}, ""),
        (STEP3 | {"deployment_install": "container", "deployment_parallel": "TP7"}, "TP7"),
    ],
    ids=["a node to spare", "a plan that is refused"],
)
def test_docker_comes_to_every_node_where_the_engine_runs_in_containers(
    variables: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, {"container_runtime": SAYS, "lease": "[]\n"})
    said = run(("Plan", "Bring what containers run on", "Tell what came of it"), THREE, **variables)
    assert run.status == 0, said
    assert [name for name in THREE if f"STAND-IN for container_runtime on {name}" in said] == ["a", "b", "c"]
    assert "c: prepared; nothing changed; no reboot is due" in said
    assert ("Prepared without a plan" in said, refused in said) == (bool(refused), True)


def test_nodes_that_need_no_restart_are_asked_whether_they_are_fit(tmp_path: Path) -> None:
    """The real check on this machine: it is fit as long as no GPUs are planned."""
    run = Run(tmp_path, {})
    hosts = {
        "a": {"gpu_driver_system_reboot": ["the system asks for it (libc6)"]},
        "b": {"gpu_driver_reboot": ["driver 580 is installed, in the kernel none runs"]},
    }
    last = ("Plan", "Tell what came of it", "Say which nodes are fit")
    said = run(last, hosts, stepladder_state_directory=str(tmp_path / "state"))
    assert run.status == 0, said
    assert "Not asked yet whether they are fit: b. Restart them" in said
    assert "a: prepared; nothing changed; the system asks for a reboot" in said
    assert "1 of 1 node fit; 0 failures" in said
    planned = {name: THREE[name] | variables for name, variables in hosts.items()}
    said = run(
        last, planned, **STEP3 | {"deployment_topology": "auto"}, stepladder_state_directory=str(tmp_path / "state")
    )
    assert run.status == 2, said
    assert "Not fit: a." in said


SLICE = {"a": {"deployment": {"install": "venv"}}}


@pytest.mark.parametrize(
    ("slices", "install", "image", "expected"),
    [
        (SLICE, "auto", "", False),
        ({"a": {"deployment": {"install": "container"}}}, "auto", "", True),
        (SLICE, "", "", False),
        ({}, "container", "", True),
        ({}, "", "a/b:1", True),
        ({}, "auto", "a/b:1", True),
        ({}, "venv", "", False),
        ({}, "", "", False),
    ],
)
def test_who_wants_docker(slices: dict[str, Any], install: str, image: str, expected: bool) -> None:
    assert preparing.in_containers(slices, install, image) is expected
