"""Who pulls an image for all, and what becomes of a node that cannot: the role's own tasks, on this machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTES = "#!/bin/sh\necho $0 $* >>${0%/*}/log\n"
# Nothing listens there, so that a pull ends at once, with Docker or without.
NAME = "127.0.0.1:9/none:1"
PLAY = [
    {
        "hosts": "all",
        "gather_facts": False,
        "any_errors_fatal": True,
        "tasks": [
            {"ansible.builtin.set_fact": {"__engine_image_brought": {"changed": True, "digest": f"sha256:{'a' * 64}"}}},
            {"ansible.builtin.include_role": {"name": "engine_image", "tasks_from": "bring"}},
        ],
    }
]


@pytest.mark.parametrize(
    ("apt", "reason"),
    [
        ("", "no docker-registry or registry is installed there, and no apt brings it"),
        ("#!/bin/sh\necho E: Unable to locate package docker-registry >&2; exit 100\n", "Unable to locate package"),
    ],
    ids=["without apt", "with an apt that knows no such package"],
)
def test_where_the_registrys_program_cannot_be_had_each_node_pulls_for_itself(
    apt: str, reason: str, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {"apt-get": apt, "dpkg-query": NOTES, "apt-mark": NOTES, "systemctl": NOTES}
    for name, text in stand_ins.items():
        if text:
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        "stepladder_state_directory": str(tmp_path / "state"),
        "deployment_slice": {
            "node": {"images": [NAME], "address": "127.0.0.1"}, "deployment": {"engine": "vllm", "platform": "cpu"},
        },
        "engine_image_minimum_free_bytes": 0,
        "engine_image_catalogue": str(ROOT / "catalog"),
    }  # fmt: skip
    hosts = {"all": {"hosts": {"n1": {}, "n2": {}}, "vars": variables}}
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    play = json.loads(json.dumps(PLAY))
    play[0]["environment"] = {"PATH": str(programs)}
    (tmp_path / "play.json").write_text(json.dumps(play))
    command = [ROOT / ".venv/bin/ansible-playbook", "-i", tmp_path / "hosts.json", tmp_path / "play.json"]
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    said = done.stdout + done.stderr
    assert said.count(f"every node pulls {NAME} for itself, since the distribution registry") == 1, said
    assert reason in said
    for node in ("n1", "n2"):
        assert f"{node} | engine_image : Have the image: FAILED" in said
    assert "End the copy of the registry" not in said
    calls = (programs / "log").read_text().splitlines() if apt else []
    assert [call.split()[1] for call in calls if "systemctl" in call] == (["mask", "unmask"] if apt else [])
