"""The real SGLang on the CPU, deployed here: exact answers, a rerun, a dead worker, stop, status, logs, remove.

It took 4 min 50 s on two cores at a load of 6, its packages at hand. The tests share one deployment, in their order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stepladder.smoke import changed_tasks

REPOSITORY = Path(__file__).resolve().parents[2]
PORT, HUB_PORT = 18010, 18980

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@dataclass
class Local:
    """A local SGLang of its own, beside any deployment that the machine may have."""

    state: Path

    def run(self, verb: str, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        settings = {
            "stepladder_state_directory": str(self.state),
            "deployment_name": "sgl",
            "deployment_engine": "sglang",
            "deployment_port": PORT,
            "deployment_weights_endpoint": f"http://127.0.0.1:{HUB_PORT}",
            "rehearsal_hub_port": HUB_PORT,
        }
        command = [sys.executable, "bin/stepladder", verb, "-i", "inventories/local", "-e", json.dumps(settings), *more]
        done = subprocess.run(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500, check=False
        )
        if check:
            assert done.returncode == 0, f"{verb} ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr}"
        return done

    def state_of_engine(self) -> dict[str, Any]:
        return json.loads(self.run("status", "-e", "status_format=json", check=False).stdout)["processes"][0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    # Short on purpose: supervisor's socket lies below it, and Linux allows 107 characters for its address.
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    deployment = Local(state)
    yield deployment
    if state.exists():
        deployment.run("remove", "-e", "confirm_approved=true", check=False)
    shutil.rmtree(state, ignore_errors=True)


def answer(path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and content of an answer; 0 where nothing listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_until(true: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.5)


def scheduler_of(state: Path) -> int:
    """The process that computes, among those that were started from the deployment."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            computes = path.read_bytes().startswith(b"sglang::scheduler")
            ours = str(state).encode() in (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if computes and ours:
            return int(path.parent.name)
    raise AssertionError("no scheduler runs")


def test_deploy_ends_with_the_exact_answers(local: Local, tmp_path: Path) -> None:
    done = local.run("deploy", "-e", f"verify_report={tmp_path}/verify-%d.json")
    found = json.loads((tmp_path / "verify-0.json").read_text())
    assert {check["name"]: check["basis"] for check in found["checks"] if check["passed"]} == {
        "models": "protocol", "chat": "exact", "reasoning": "exact", "streaming": "exact", "completion": "protocol",
        "tool call": "exact",
    }  # fmt: skip
    assert "Hello from the tiny CPU model!" in done.stdout


def test_what_is_believed_of_the_server_is_so(local: Local) -> None:
    """What health checks and `verify` reckon with (`engine_state.phase`, `rejects_unknown_model`)."""
    assert [answer(path)[0] for path in ("/ready", "/health", "/v1/models", "/metrics")] == [200] * 4
    chat = {"model": "no-such-model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
    status, text = answer("/v1/chat/completions", chat)
    assert (status, json.loads(text)["model"]) == (200, "no-such-model")


def test_a_rerun_changes_nothing(local: Local) -> None:
    before = scheduler_of(local.state)
    assert changed_tasks(local.run("deploy").stdout) == 0
    assert scheduler_of(local.state) == before


@pytest.mark.nightly
def test_a_dead_worker_takes_the_server_with_it_and_both_are_started_again(local: Local) -> None:
    before = scheduler_of(local.state)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: answer("/health")[0] == 0, 60, "the server goes on without its worker")
    wait_until(lambda: answer("/health")[0] == 200, 180, "the server is not started again")
    assert scheduler_of(local.state) != before
    assert local.state_of_engine()["phase"] == "ready"


@pytest.mark.nightly
def test_stop_status_and_logs(local: Local) -> None:
    local.run("stop")
    assert answer("/ready")[0] == 0
    assert local.state_of_engine()["phase"] == "stopped"
    text = local.run("logs", "-e", "logs_lines=400").stdout
    assert "The server is fired up and ready to roll" in text
    assert re.search(r"Finished server process", text), "SIGTERM does not end it in order"


def test_remove_leaves_nothing(local: Local) -> None:
    local.run("remove", "-e", "confirm_approved=true")
    assert not local.state.exists()
    # What kept the lease ends a moment after the run.
    wait_until(lambda: not leftovers(local.state), 15, "processes are left")


def leftovers(state: Path) -> list[Path]:
    """Processes whose command names the state directory."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(state) in _text(path)]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
