"""The watchdog: when it restarts, and the program itself against a process that stops in its tracks."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_progress, lease
from test_gateway_haproxy import free_port
from waiting import until

from stepladder import units

REPOSITORY = Path(__file__).resolve().parents[2]
UTILITIES = REPOSITORY / "plugins/module_utils"
PROGRAMS = [
    REPOSITORY / "roles/watchdog/files/watchdog.py", UTILITIES / "engine_progress.py", UTILITIES / "lease.py"
]  # fmt: skip

# As on a node, where all lie in one directory.
sys.modules.setdefault("engine_progress", engine_progress)
sys.modules.setdefault("lease", lease)
_specification = importlib.util.spec_from_file_location("watchdog", PROGRAMS[0])
assert _specification
assert _specification.loader
watchdog = importlib.util.module_from_spec(_specification)
sys.modules["watchdog"] = watchdog
_specification.loader.exec_module(watchdog)
History = watchdog.History

NOW = 1_000_000.0
REASONS = [
    pytest.param(History(), "restart", "", "", "", id="first"),
    pytest.param(History(), "observe", "", "", "watchdog_mode is observe", id="observe"),
    pytest.param(History(), "restart", "ann is at work on the node (deploy)", "", "ann is at work", id="lease"),
    pytest.param(History(), "restart", "", "it spans 2 nodes: run 'deploy'", "it spans 2 nodes", id="other-nodes"),
    pytest.param(History(1, 1, 1, NOW - 100), "restart", "", "", "the next restart may be in 200 s", id="too-soon"),
    pytest.param(History(1, 1, 1, NOW - 301), "restart", "", "", "", id="after-the-pause"),
    pytest.param(History(3, 3, 3, NOW - 1000), "restart", "", "", "the next restart may be in 200 s", id="third-pause"),
    pytest.param(History(9, 9, 9, NOW - 3601), "restart", "", "", "", id="an-hour-at-most"),
    pytest.param(History(9, 9, 9, NOW + 7200), "restart", "", "", "", id="clock-set-back"),
]


@pytest.mark.parametrize(("history", "mode", "held", "alone", "reason"), REASONS)
def test_when_a_stalled_engine_is_restarted(history: Any, mode: str, held: str, alone: str, reason: str) -> None:
    found = watchdog.why_not(NOW, history, mode, held, alone)
    assert (reason in found) if reason else found == ""


def test_pauses_grow_and_are_forgiven() -> None:
    history = History()
    moments = []
    now = NOW
    for _ in range(6):
        while watchdog.why_not(now, history, "restart", "", ""):
            now += 10
        watchdog.note_restart(now, history)
        moments.append(now - NOW)
    assert moments == [0, 300, 900, 2100, 4500, 8100]
    watchdog.note_restart(now + 7 * 3600, history)
    assert (history.in_a_row, history.restarts) == (1, 7)


def release(port: int, *, ranks: int = 0, engine: str = "vllm") -> dict[str, Any]:
    health = {"kind": "vllm", "host": "0.0.0.0", "port": port, "path": "/health", "model": "tiny"}
    follower = {"name": "ray-0", "health": {"kind": "tcp", "host": "127.0.0.1", "port": 6379}}
    node = {"processes": [follower, {"name": "vllm-0", "health": health}]}
    node["ranks"] = [{"node": f"n{number}", "address": "x"} for number in range(ranks)]
    return {"deployment": {"name": "d", "engine": engine}, "node": node}


SPANS, CONTAINER = "it spans 2 nodes: run 'deploy'", "it runs in a container, which only root can end: run 'deploy'"


@pytest.mark.parametrize(
    ("ranks", "engine", "image", "root", "against"),
    [
        (0, "vllm", "", False, ""), (2, "vllm", "", True, SPANS), (2, "sglang", "", False, ""),
        (0, "vllm", "v:1", True, ""), (0, "vllm", "v:1", False, CONTAINER), (2, "vllm", "v:1", True, SPANS),
    ],
)  # fmt: skip
def test_what_is_watched(ranks: int, engine: str, image: str, root: bool, against: str) -> None:
    wanted = release(8000, ranks=ranks, engine=engine)
    wanted["node"]["processes"][1]["image"] = image
    found = watchdog.watched(wanted, root)
    assert found["vllm-0"]["target"] == {"host": "127.0.0.1", "port": 8000, "model": "tiny"}
    assert found["vllm-0"]["against"].startswith(against)
    assert bool(found["vllm-0"]["against"]) is bool(against)


def test_all_of_a_container_is_found_and_nothing_of_another(tmp_path: Path) -> None:
    deployment, proc = tmp_path / "d", tmp_path / "proc"
    (deployment / "containers").mkdir(parents=True)
    groups = {
        1: "init.scope",
        20: "system.slice/docker-abc1.scope",
        21: "system.slice/docker-abc1.scope",
        30: "docker/ff",
    }
    for pid, group in groups.items():
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "cgroup").write_text(f"0::/{group}\n")
    assert watchdog.contained(str(deployment), "vllm-0", proc) == []
    (deployment / "containers/vllm-0.id").write_text("abc1\n")
    assert watchdog.contained(str(deployment), "vllm-0", proc) == [20, 21]
    # Docker writes it when it has made the container.
    (deployment / "containers/vllm-0.id").write_text("")
    assert watchdog.contained(str(deployment), "vllm-0", proc) == []


def planned(ranks: int, engine: str, model: str | None = "tiny") -> dict[str, Any]:
    node = {"ranks": [{}] * ranks, "processes": [{"health": {"model": model}}]}
    return {"deployment": {"engine": engine}, "nodes": [node]}


TELLS = "watchdog_mode restart: over several nodes the watchdog only tells of a stall and restarts nothing; run"
NEVER = "counts no tokens, so the watchdog judges it never and restarts nothing."


@pytest.mark.parametrize(
    ("plan", "mode", "text"),
    [
        (planned(0, "vllm"), "restart", ""), (planned(2, "vllm"), "restart", TELLS),
        (planned(2, "vllm"), "observe", ""), (planned(2, "vllm"), "off", ""), (planned(2, "sglang"), "restart", ""),
        (planned(0, "transformers"), "observe", f"watchdog_mode observe: transformers {NEVER}"),
        (planned(0, "tensorrt_llm", None), "restart", f"watchdog_mode restart: tensorrt_llm {NEVER}"),
    ],
)  # fmt: skip
def test_the_plan_says_what_a_watchdog_cannot_do(plan: dict[str, Any], mode: str, text: str) -> None:
    said = units.watchdog_text(plan, mode)
    assert said.startswith(text)
    assert bool(said) is bool(text)


def take(state: Path, boot: str, seconds: float) -> None:
    (state / "lease").mkdir(exist_ok=True)
    content = {
        "format_version": 1, "run": "1", "who": "ann", "origin": "ops1", "verb": "deploy", "why": "", "ttl": 120,
        "deployment": "d", "plan_id": "3f9a", "since": "2026-11-20T03:15:00Z", "controller": {},
        "taken": {"boot": boot, "seconds": seconds},
    }  # fmt: skip
    (state / "lease/lease.json").write_text(json.dumps(content))


AT_WORK = "ann is at work on the node (deploy)"
LEASES = [
    pytest.param("now 600.0", "", AT_WORK, id="just-taken"),
    pytest.param("now 1000.0", "", "", id="silent"),
    pytest.param("now 1000.0", "now 950.5 starting", AT_WORK, id="renewed"),
    # Started again, the node counts from zero: the run is heard of or not since then.
    pytest.param("later 60.0", "", AT_WORK, id="just-booted"),
    pytest.param("later 130.0", "now 950.5 starting", "", id="silent-since-the-boot"),
    pytest.param("later 300.0", "later 250.0 starting", AT_WORK, id="renewed-after-the-boot"),
    pytest.param("later 400.0", "later 250.0 starting", "", id="silent-after-the-boot"),
]


@pytest.mark.parametrize(("clock", "renewed", "holder"), LEASES)
def test_a_lease_is_respected_while_its_run_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str, renewed: str, holder: str
) -> None:
    boot, seconds = clock.split()
    monkeypatch.setattr(lease.Clock, "now", lambda: lease.Clock(boot, float(seconds)))
    take(tmp_path, "now", 500.0)
    if renewed:
        (tmp_path / "lease/renewed-1").write_text(renewed)
    assert watchdog.lease_holder(str(tmp_path)) == holder


def test_no_lease_holds_nothing_and_one_that_cannot_be_read_does(tmp_path: Path) -> None:
    assert watchdog.lease_holder(str(tmp_path)) == ""
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease/lease.json").write_text("{")
    assert "cannot be read" in watchdog.lease_holder(str(tmp_path))


ENGINE = """
import subprocess, sys
subprocess.Popen(["sleep", "600"], env={})  # as vLLM's, without a mark
import sys; sys.path.insert(0, sys.argv[1])
from gateway_engine import Engine
engine = Engine(int(sys.argv[2])); engine.tokens = 5; engine.serve_forever()
"""


class Node:
    """A node with one engine, which a manager (this test) starts again, and the watchdog."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.deployment = root / "deployments/d"
        self.directory = root / "watchdog/d"
        (self.deployment / "releases/1").mkdir(parents=True)
        (self.deployment / "current").symlink_to("releases/1")
        (self.deployment / "current/plan.json").write_text(json.dumps(release(self.port)))
        self.directory.mkdir(parents=True)
        for program in PROGRAMS:
            shutil.copy(program, self.directory)
        self.engine = self.start_engine()
        self.watchdog: subprocess.Popen[bytes] | None = None

    def start_engine(self) -> subprocess.Popen[bytes]:
        marks = {"STEPLADDER_DEPLOYMENT": str(self.deployment), "STEPLADDER_PROCESS": "vllm-0"}
        command = [sys.executable, "-c", ENGINE, str(Path(__file__).parent), str(self.port)]
        engine = subprocess.Popen(command, env={**os.environ, **marks})
        until(lambda: answers(self.port), 10)
        return engine

    def watch(self, mode: str) -> None:
        settings = {
            "mode": mode, "stall_seconds": 1.5, "deployment_path": str(self.deployment),
            "state_directory": str(self.root), "directory": str(self.directory),
            "textfile_directory": str(self.directory),
        }  # fmt: skip
        (self.directory / "settings.json").write_text(json.dumps(settings))
        command = [sys.executable, "-u", str(self.directory / "watchdog.py"), str(self.directory / "settings.json")]
        with (self.root / "log").open("wb") as log:
            self.watchdog = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: "vllm-0: idle" in self.log(), 20)

    def log(self) -> str:
        return (self.root / "log").read_text()

    def end(self) -> None:
        for process in (self.engine, self.watchdog):
            if process:
                process.kill()
                process.wait()


def answers(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
    except OSError:
        return False


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.end()


def test_an_engine_that_is_stopped_is_ended_counted_and_told_of(node: Node) -> None:
    node.watch("restart")
    node.engine.send_signal(signal.SIGSTOP)
    assert node.engine.wait(20) == -signal.SIGKILL
    until(lambda: "restarted, 2 process(es) ended" in node.log(), 5)
    counted = 'stepladder_watchdog_restarts_total{deployment="d",process="vllm-0"} 1'
    assert counted in (node.directory / "metrics.prom").read_text()
    assert counted in (node.directory / "stepladder-d.prom").read_text()
    assert (node.directory / "stepladder-d.prom").stat().st_mode & 0o777 == 0o644, "another user's exporter reads it"
    reports = list((node.directory / "stalls").glob("*-vllm-0.txt"))
    assert len(reports) == 1
    assert "no token for " in reports[0].read_text()
    assert f"process {node.engine.pid} " in reports[0].read_text()
    assert ": state T" in reports[0].read_text()
    # Started again it is watched again, and left alone for the length of the pause.
    node.engine = node.start_engine()
    until(lambda: node.log().count("vllm-0: idle") == 2, 20)
    node.engine.send_signal(signal.SIGSTOP)
    until(lambda: "not restarted: it was restarted" in node.log(), 20)
    assert node.engine.poll() is None


def test_while_a_run_holds_the_node_nothing_is_ended(node: Node) -> None:
    now = lease.Clock.now()
    take(node.root, now.boot, now.seconds)
    node.watch("restart")
    node.engine.send_signal(signal.SIGSTOP)
    until(lambda: "not restarted: ann is at work on the node (deploy)" in node.log(), 20)
    assert node.engine.poll() is None
    (node.root / "lease/lease.json").unlink()
    assert node.engine.wait(20) == -signal.SIGKILL


def test_a_disk_that_takes_nothing_keeps_no_stalled_engine(node: Node) -> None:
    (node.directory / "stalls").write_text("a file in the way of the folder")
    (node.directory / "state.json").mkdir()
    (node.directory / "metrics.prom").mkdir()
    node.watch("restart")
    node.engine.send_signal(signal.SIGSTOP)
    assert node.engine.wait(20) == -signal.SIGKILL
    until(lambda: "restarted, 2 process(es) ended" in node.log(), 5)
    assert node.log().count("state.json: cannot be written") == 1
    assert node.log().count("metrics.prom: cannot be written") == 1
    assert node.log().count("stalls: cannot be written: File exists") == 1
    counted = 'stepladder_watchdog_restarts_total{deployment="d",process="vllm-0"} 1'
    assert counted in (node.directory / "stepladder-d.prom").read_text(), "what can be written is"
    assert not list(node.directory.glob(".*.new")), "a full disk is not filled with halves"


def test_a_log_that_takes_nothing_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"deployment_path": str(tmp_path / "d"), "directory": str(tmp_path)}
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        watchdog.Watchdog(settings).say("vllm-0", "stalled")
        monkeypatch.undo()
