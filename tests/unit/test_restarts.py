"""Restarts of the role gpu_driver, so many at a time; a command stands in for the restart itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# STAND-INS: what each restart does is to write down the node's name, and what is looked at after it is found right.
RESTART = 'ansible.builtin.reboot:\n        reboot_timeout: "{{ gpu_driver_reboot_timeout }}"\n        msg:'
NOTED = (
    "ansible.builtin.shell:\n        cmd: N={{ inventory_hostname }}; echo $N >> {{ noted }}; [ $N != {{ lost }} ] #"
)
RIGHT = "- ansible.builtin.set_fact: {gpu_driver_reboot: []}\n"
DUE = {"gpu_driver_reboot": ["driver 580 is installed, in the kernel none runs"], "gpu_driver_system_reboot": [],
       "gpu_driver_plan": {"module": "nvidia"}}  # fmt: skip
NOT_DUE = DUE | {"gpu_driver_reboot": []}


def restart(folder: Path, at_a_time: int, lost: str) -> tuple[list[str], str]:
    """Five nodes of which four are to be restarted: those that were, in their order, and what was said."""
    role = folder / "roles" / "gpu_driver"
    shutil.copytree(ROOT / "roles" / "gpu_driver", role)
    text = (role / "tasks" / "reboot.yml").read_text()
    assert RESTART in text
    (role / "tasks" / "reboot.yml").write_text(text.replace(RESTART, NOTED))
    (role / "tasks" / "verify.yml").write_text(RIGHT)
    hosts = {name: NOT_DUE if name == "b" else DUE for name in "abcde"}
    common = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "noted": str(folder / "noted"),
        "lost": lost, "gpu_driver_reboot_allowed": True, "gpu_driver_reboot_at_a_time": at_a_time,
    }  # fmt: skip
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": common}}))
    task = {"ansible.builtin.include_role": {"name": "gpu_driver", "tasks_from": "restart"}}
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": [task]}]))
    environ = {
        **os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_LOCAL_TEMP": str(folder / "tmp"),
        "ANSIBLE_ROLES_PATH": f"{folder}/roles:{ROOT}/roles", "ANSIBLE_REMOTE_TEMP": str(folder / "tmp"),
        "ANSIBLE_STDOUT_CALLBACK": "default",
    }  # fmt: skip
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", folder / "hosts.json", folder / "play.yml"],
        cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is (lost == "none"), done.stdout + done.stderr
    return (folder / "noted").read_text().split(), done.stdout


def test_nodes_are_restarted_so_many_at_a_time(tmp_path: Path) -> None:
    noted, said = restart(tmp_path, 3, "none")
    assert sorted(noted[:3]) == ["a", "c", "d"]
    assert noted[3:] == ["e"]
    assert "failed=1" not in said


@pytest.mark.parametrize(("at_a_time", "lost", "restarted"), [(1, "a", "a"), (2, "c", "ac"), (1, "e", "acde")])
def test_a_node_that_does_not_come_back_keeps_the_rest_from_being_restarted(
    tmp_path: Path, at_a_time: int, lost: str, restarted: str
) -> None:
    noted, said = restart(tmp_path, at_a_time, lost)
    assert sorted(noted) == [*restarted]
    text = " ".join(said.split())
    for name in sorted({*"acde"} - {*restarted}):
        assert f"{name} was not restarted: {lost} was restarted before, and did not come back" in text
    assert "b was not restarted" not in text
