"""The whole local deployment, for real: environment, engine, hub, weights, process, answers, faults, removal.

One deployment serves all tests of this file, in the order in which they stand; each leaves it answering.
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
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.action.diagnose import read_archive

from stepladder.exit_status import ExitStatus
from stepladder.smoke import changed_tasks

REPOSITORY = Path(__file__).resolve().parents[2]
PORT, HUB_PORT = 18000, 18970

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@dataclass
class Local:
    """A local deployment of its own, beside any that the machine may have."""

    state: Path

    @property
    def options(self) -> list[str]:
        settings = {
            "stepladder_state_directory": str(self.state),
            "deployment_name": "e2e",
            "deployment_port": PORT,
            "deployment_weights_endpoint": f"http://127.0.0.1:{HUB_PORT}",
            "rehearsal_hub_port": HUB_PORT,
        }
        return ["-i", "inventories/local", "-e", json.dumps(settings)]

    def run(self, verb: str, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "bin/stepladder", verb, *self.options, *more]
        done = subprocess.run(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
        )
        if check:
            output = f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == 0, f"{verb} ended with {done.returncode}:\n{output}"
        return done

    def status(self) -> dict[str, Any]:
        done = self.run("status", "-e", "status_format=json", check=False)
        found = json.loads(done.stdout)
        assert done.returncode == (0 if found["ready"] else ExitStatus.NOT_READY)
        return found

    def engine_pid(self) -> int:
        """The engine's main process: the one that the manager's own runs."""
        managed = int(self.status()["processes"][0]["pid"])
        return int(Path(f"/proc/{managed}/task/{managed}/children").read_text().split()[0])

    @property
    def weights(self) -> Path:
        return self.state / "models/stepladder--tiny-step3p5/master/model.safetensors"


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    # Short on purpose: supervisor's socket lies below it, and Linux allows 107 characters for its address.
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    deployment = Local(state)
    yield deployment
    deployment.run("remove", "-e", "confirm_approved=true", check=False)
    shutil.rmtree(state, ignore_errors=True)


def processes_that_name(text: str) -> list[str]:
    """Command lines of running processes that have a text in them, this one's own aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def answers() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_check_mode_on_a_fresh_node_changes_nothing(local: Local) -> None:
    done = local.run("deploy", "--check", "--diff")
    assert not local.state.exists()
    assert changed_tasks(done.stdout) > 0


def test_remove_and_status_where_nothing_was_deployed(local: Local) -> None:
    assert local.status() == {
        "format_version": 1,
        "ready": False,
        "processes": [
            {
                "node": "localhost", "process": "-", "phase": "absent", "detail": "nothing is deployed here",
                "release": None, "seconds": None, "pid": None, "endpoint": None, "last_line": None,
                "cure": None, "replica": None, "rank": None,
            }
        ],
        "nodes": {
            "localhost": {
                "release": None, "outcome": None, "since": None, "seconds": None, "before": None, "lease": None,
                "frozen": None,
            }
        },
        "gateways": {},
        "watchdogs": {},
    }  # fmt: skip
    done = local.run("verify", check=False)
    assert done.returncode != 0
    assert "Nothing is deployed under the name e2e" in done.stderr
    assert changed_tasks(local.run("remove", "-e", "confirm_approved=true").stdout) == 0


def test_deploy_ends_with_an_endpoint_that_gives_the_exact_answers(local: Local, tmp_path: Path) -> None:
    report = tmp_path / "verify-%d.json"
    done = local.run("deploy", "-e", f"verify_report={report}")
    found = json.loads((tmp_path / "verify-0.json").read_text())
    assert {check["name"]: check["basis"] for check in found["checks"] if check["passed"]}.items() >= {
        ("models", "protocol"), ("chat", "exact"), ("reasoning", "exact"), ("streaming", "exact"),
        ("completion", "protocol"), ("tool call", "exact"), ("unknown model", "protocol"),
    }  # fmt: skip
    line = re.search(r"curl -s .*?}'", done.stdout, re.S)
    assert line, done.stdout
    reply = subprocess.run(["bash", "-c", line[0]], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"].strip() == "Hello from the tiny CPU model!"


def test_a_rerun_and_a_check_change_nothing(local: Local) -> None:
    pid = local.engine_pid()
    done = local.run("deploy")
    assert changed_tasks(done.stdout) == 0
    assert "Nothing to do: every node is equal to the plan" in done.stdout
    assert changed_tasks(local.run("deploy", "--check", "--diff").stdout) == 0
    assert local.engine_pid() == pid


def test_status_tells_the_truth_as_table_and_as_json(local: Local) -> None:
    found = local.status()
    assert found["ready"] is True
    assert found["processes"][0]["endpoint"] == f"http://127.0.0.1:{PORT}/v1"
    assert re.search(r"localhost +vllm-0 +ready ", local.run("status").stdout)
    assert "Application startup complete" in local.run("logs", "-e", "logs_lines=200").stdout


def diagnose(local: Local, folder: Path) -> tuple[int, str, dict[str, list[str]]]:
    """Exit status, what was printed, and the files of the archive."""
    done = local.run("diagnose", "-e", f"diagnose_directory={folder}", check=False)
    archive = max(folder.glob("stepladder-e2e-*.tar.gz"), default=None)
    assert archive, done.stdout + done.stderr
    texts = read_archive(archive)
    archive.unlink()
    return done.returncode, done.stdout, texts


def test_diagnose_finds_no_fault_in_what_is_well_and_lets_no_secret_out(local: Local, tmp_path: Path) -> None:
    planted = "sk-planted0123456789abcdef"
    with (local.state / "deployments/e2e/logs/vllm-0.log").open("a") as log:
        log.write(f"CUDA out of memory, says a line that a person wrote with {planted}\n")
    status, told, texts = diagnose(local, tmp_path)
    assert status == 0, told
    assert told.splitlines()[0].endswith(": no layer fails")
    lines = [line for text in texts.values() for line in text]
    assert any("says a line that a person wrote with ********" in line for line in lines)
    assert not [line for line in lines if planted in line]


def test_a_release_that_does_not_start_is_given_up_and_the_one_before_serves_again(local: Local) -> None:
    """Meanwhile a second operator is refused, status says who is at work, and what shows why holds no secret."""
    before = local.status()["nodes"]["localhost"]["release"]
    planted = "sk-planted0123456789abcdef"
    wish = {"deployment_extra_arguments": ["--no-such-flag"], "deployment_extra_environment": {"X_API_KEY": planted}}
    command = [sys.executable, "bin/stepladder", "deploy", *local.options, "-e", json.dumps(wish)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    shown = ""
    for line in process.stdout:
        shown += line
        if "vllm-0: " in line:
            break
    second = local.run("stop", check=False)
    assert second.returncode == ExitStatus.HELD, second.stdout
    assert re.search(r"localhost: held by \S+ from \S+: deploy e2e [0-9a-f]{12}, since ", second.stdout)
    rest, _ = process.communicate(timeout=600)
    assert process.returncode == ExitStatus.WENT_BACK, rest[-4000:]
    assert re.search(r"Release [0-9a-f]{12} did not run right and was given up:", rest)
    assert "unrecognized arguments: --no-such-flag" in rest
    assert re.search(rf"Release {before} serves again: .* at most \d+ s after it was stopped", rest)
    assert answers()
    told = local.status()["nodes"]["localhost"]
    assert (told["release"], told["outcome"], told["lease"]) == (before, "proven", None)
    kept = next((local.state / "deployments/e2e/evidence").iterdir())
    texts = {path.name: path.read_text() for path in kept.rglob("*") if path.is_file()}
    assert "--no-such-flag" in texts["vllm-0.log"]
    assert not [name for name, text in texts.items() if planted in text]
    nothing = local.run("rollback", check=False)
    assert nothing.returncode == ExitStatus.NOTHING_TO_GO_BACK_TO
    assert "never ran right" in nothing.stdout
    log = [json.loads(line) for line in (local.state / "audit/audit.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in log if line["event"] == "end"] == ["done", "went_back"]


def test_what_was_changed_by_hand_is_named_and_mended(local: Local) -> None:
    assert local.run("drift").stdout.startswith("localhost: equals release ")
    places = (local.state / "supervisor/conf.d/e2e.conf", Path("/etc/systemd/system/e2e-vllm-0.service"))
    described = next(path for path in places if path.exists())
    described.write_text(described.read_text() + "; by hand\n")
    found = local.run("drift", check=False)
    assert found.returncode == ExitStatus.DIFFERS
    assert found.stdout == f"localhost: unit {described}: was changed since the release was proven\n"
    assert "was changed since" in local.run("deploy").stdout
    assert local.run("drift").returncode == 0


def test_killed_engine_is_started_again_and_a_rerun_finds_it_ready(local: Local) -> None:
    before = local.engine_pid()
    workers = descendants(before)
    assert workers
    os.kill(before, signal.SIGKILL)
    time.sleep(2)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "workers outlived the engine"
    assert local.status()["ready"] is False
    done = local.run("deploy")
    assert changed_tasks(done.stdout) <= 1
    assert local.engine_pid() != before
    assert answers()


@pytest.mark.nightly
def test_flipped_byte_in_the_weights_is_found_and_fetched_again(local: Local) -> None:
    content = local.weights.read_bytes()
    stamps = local.weights.stat()
    position = len(content) // 2
    flipped = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    local.weights.chmod(0o600)
    with local.weights.open("r+b") as file:
        file.write(flipped)
    os.utime(local.weights, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    before = local.engine_pid()
    done = local.run("deploy")
    assert changed_tasks(done.stdout) >= 1
    assert local.weights.read_bytes() == content
    assert local.engine_pid() != before, "an engine that may have read the damaged weights is still running"


def test_port_taken_by_another_process_is_named(local: Local) -> None:
    local.run("stop")
    assert not answers()
    told = local.run("plan", "-e", "plan_diff=true").stdout
    assert "localhost: the plan is the same; a deploy puts right:\n  vllm-0: stopped" in told
    squatter = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(PORT), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(1)
        done = local.run("deploy", check=False)
    finally:
        squatter.terminate()
        squatter.wait(10)
    assert done.returncode != 0
    assert f"{PORT}" in done.stdout
    assert f"pid {squatter.pid}" in done.stdout
    assert "http.server" in done.stdout


def test_interrupted_deploy_is_finished_by_the_next_one(local: Local) -> None:
    """Ctrl-C while the engine loads: the engine was started by then, the next run waits for it and verifies."""
    command = [sys.executable, "bin/stepladder", "deploy", *local.options]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if "vllm-0: " in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Traceback" not in rest
    local.run("deploy")
    assert answers()


def test_remove_asks_and_then_leaves_nothing(local: Local) -> None:
    refused = local.run("remove", check=False)
    assert refused.returncode != 0
    assert "Not approved, nothing was changed" in refused.stdout
    assert answers()
    local.run("remove", "-e", "confirm_approved=true")
    assert not answers()
    assert not local.state.exists()
    # What kept the lease ends a moment after the run.
    deadline = time.monotonic() + 15
    while processes_that_name(str(local.state)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert processes_that_name(str(local.state)) == []


# In every run the smoke is that of Transformers (test_reference_deployment.py).
@pytest.mark.nightly
def test_smoke_deploys_verifies_changes_nothing_again_and_removes(tmp_path: Path) -> None:
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    deployment = Local(state)
    command = [
        sys.executable,
        "bin/stepladder",
        "smoke",
        *deployment.options,
        "--report",
        str(tmp_path),
        "--budget",
        "600",
    ]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800, check=False)
    finally:
        shutil.rmtree(state, ignore_errors=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(
        r"Smoke passed in \d+ s of 600 s:\n  ok +deploy .*\n  ok +verify .*\n  ok +rerun .*\n  ok +remove ", done.stdout
    )
    assert 'failures="0"' in (tmp_path / "smoke.xml").read_text()
