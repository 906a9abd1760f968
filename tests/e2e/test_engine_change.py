"""A change of the engine, replica by replica, with the real roles and supervisor; small HTTP servers are the engines.

They prove nothing about an engine: what is seen is who is stopped and started when. One deployment serves all tests,
in the order in which they stand.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepladder.exit_status import ExitStatus

ROOT = Path(__file__).resolve().parents[2]
PORT = 18340
SERVER = """\
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]


class Changed:
    """The deployment: a release for each engine name."""

    def __init__(self, root: Path) -> None:
        self.root, self.tools = root, root / "tools"
        subprocess.run([sys.executable, "-m", "venv", self.tools], check=True)
        packages = ["supervisor==4.3.0", "setuptools<81"]
        subprocess.run([self.tools / "bin/pip", "install", "-q", *packages], check=True)
        # What a release needs to be brought back.
        (self.tools / ".stepladder.json").write_text("{}")
        (root / "server.py").write_text(SERVER)
        (root / "roles/verify/tasks").mkdir(parents=True)
        (root / "roles/verify/tasks/main.yml").write_text("[]")
        host = {
            "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "two",
            "stepladder_state_directory": str(root / "s"), "release_speed_gate": "off", "gateway_hosts": [],
            "service_manager": "supervisor", "release_described_by": "x",
        }  # fmt: skip
        (root / "inventory.yml").write_text(json.dumps({"all": {"hosts": {"n": host}}}))

    def slice(self, engine: str, plan_id: str, argument: str) -> dict[str, Any]:
        server = [str(self.tools / "bin/python"), str(self.root / "server.py")]
        processes = [
            {
                "name": f"{engine}-{port - PORT}", "purpose": "a stand-in", "env": {}, "ports": [], "stop_seconds": 10,
                "argv": [*server, argument or str(port)],
                "health": {"kind": engine, "host": "127.0.0.1", "port": port, "path": "/health", "model": None},
            }
            for port in (PORT, PORT + 1)
        ]  # fmt: skip
        endpoints = [{"replica": n, "node": "n", "base_url": f"http://127.0.0.1:{PORT + n}/v1"} for n in (0, 1)]
        chosen = {"name": "two", "engine": engine, "replicas": 2, "topology": "single"}
        node = {"tools": {"path": str(self.tools)}, "ranks": [], "processes": processes, "load_deadline_seconds": 60}
        return {"plan_id": plan_id, "deployment": chosen, "endpoints": endpoints, "node": node}

    def deploy(self, engine: str, plan_id: str, argument: str = "") -> subprocess.CompletedProcess[str]:
        """What deploy does from the lease on."""
        tasks: list[dict[str, Any]] = [
            {"ansible.builtin.group_by": {"key": "changing_nodes"}},
            {"ansible.builtin.set_fact": {"deployment_slice": self.slice(engine, plan_id, argument)}},
            {"ansible.builtin.include_role": {"name": "lease"}},
            {"ansible.builtin.include_role": {"name": "service"}},
        ]
        start = {"import_playbook": str(ROOT / "playbooks/_start.yml")}
        (self.root / "play.yml").write_text(
            json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}, start])
        )
        environ = {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "XDG_STATE_HOME": str(self.root / "state"),
            "ANSIBLE_ROLES_PATH": f"{self.root / 'roles'}:{ROOT / 'roles'}",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", "-i", "inventory.yml", "play.yml"], cwd=self.root,
            env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip

    def control(self, *words: str) -> str:
        command = [self.tools / "bin/supervisorctl", "-c", self.root / "s/supervisor/supervisord.conf", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def running(self) -> dict[str, str]:
        """Pid of each process that runs."""
        lines = [line.replace(",", "").split() for line in self.control("status").splitlines()]
        return {words[0]: words[3] for words in lines if words[1] == "RUNNING"}


@pytest.fixture(scope="module")
def changed() -> Iterator[Changed]:
    # Short on purpose: supervisor's socket lies below it.
    root = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    found = Changed(root)
    yield found
    found.control("shutdown")
    shutil.rmtree(root, ignore_errors=True)


class Watch(threading.Thread):
    """Which replicas answer, each change of it."""

    def __init__(self) -> None:
        super().__init__()
        self.over, self.seen = threading.Event(), [(True, True)]
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.1):
            answers = (self._answers(PORT), self._answers(PORT + 1))
            if answers != self.seen[-1]:
                self.seen.append(answers)

    @staticmethod
    def _answers(port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def end(self) -> list[tuple[bool, bool]]:
        self.over.set()
        self.join()
        return self.seen


def test_one_engine_takes_the_place_of_another_one_replica_after_the_other(changed: Changed) -> None:
    first = changed.deploy("vllm", "first")
    assert first.returncode == 0, first.stdout + first.stderr
    assert changed.running().keys() == {"two-vllm-0", "two-vllm-1"}
    watch = Watch()
    started = time.monotonic()
    done = changed.deploy("sglang", "second")
    seen = watch.end()
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"vllm to sglang: {time.monotonic() - started:.0f} s, answering: {seen}")
    assert "One after the other, while the others answer: replica 0; then replica 1." in done.stdout
    assert seen == [(True, True), (False, True), (True, True), (True, False), (True, True)]
    assert changed.running().keys() == {"two-sglang-0", "two-sglang-1"}
    assert "vllm" not in changed.control("status")


def test_the_way_back_from_another_engine_leaves_alone_what_was_not_reached(changed: Changed) -> None:
    before = changed.running()
    watch = Watch()
    done = changed.deploy("vllm", "third", "no-port")
    seen = watch.end()
    assert done.returncode == ExitStatus.WENT_BACK, done.stdout + done.stderr
    assert seen == [(True, True), (False, True), (True, True)]
    after = changed.running()
    assert after.keys() == {"two-sglang-0", "two-sglang-1"}
    assert after["two-sglang-1"] == before["two-sglang-1"]
