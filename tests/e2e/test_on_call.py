"""What the on-call engineer lives through, for real: two good releases, bad ones, a controller that dies.

One deployment serves all tests, in the order in which they stand. Random moments come from a seed that is printed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_local_deployment import REPOSITORY, Local, answers, descendants, diagnose

from stepladder.exit_status import ExitStatus

OTHER = json.dumps({"deployment_extra_arguments": ["--disable-log-stats"]})
# Starts and calls itself healthy; every answer is another one than the model's. Without braces it would name a file.
WRONG = json.dumps({"deployment_extra_arguments": ["--chat-template", "wrong {}"]})
KILLS = 4

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def service() -> Iterator[Local]:
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    found = Local(state)
    found.run("deploy")
    yield found
    found.run("remove", "-e", "confirm_approved=true", check=False)
    shutil.rmtree(state, ignore_errors=True)


def release(service: Local) -> str:
    return str(service.status()["nodes"]["localhost"]["release"])


def test_rollback_needs_no_hub_and_no_index(service: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    first = release(service)
    service.run("deploy", "-e", OTHER)
    second = release(service)
    assert first != second
    hub = next(
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"hub.py" in (line := path.read_bytes()) and str(service.state).encode() in line
    )
    os.kill(hub, signal.SIGSTOP)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    try:
        service.run("rollback")
        assert release(service) == first
        service.run("rollback", "-e", f"rollback_to={second[:7]}")
        assert release(service) == second
    finally:
        os.kill(hub, signal.SIGCONT)
    assert answers()


def test_a_release_that_answers_wrongly_is_given_up(service: Local) -> None:
    before = release(service)
    done = service.run("deploy", "-e", WRONG, check=False)
    assert done.returncode == ExitStatus.WENT_BACK, done.stdout[-3000:]
    assert "Ask each endpoint, as a client does:" in done.stdout
    assert f"Release {before} serves again" in done.stdout
    assert release(service) == before


def test_an_engine_that_hangs_while_it_loads_is_given_up_long_before_its_deadline(service: Local) -> None:
    before = release(service)
    wish = json.dumps(
        {"service_progress_deadline": 20, "deployment_extra_arguments": ["--disable-log-stats", "--seed=1"]}
    )
    command = [sys.executable, "bin/stepladder", "deploy", *service.options, "-e", wish]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    stopped: list[int] = []
    shown, hung_at, seen_after = "", 0.0, 0.0
    for line in process.stdout:
        shown += line
        if not stopped and "vllm-0: loading" in line:
            stopped = [pid for pid in _processes(service) if not _gone(pid, signal.SIGSTOP)]
            hung_at = time.monotonic()
        if stopped and not seen_after and "did nothing for" in line:
            seen_after = time.monotonic() - hung_at
            # It ends when it is told to, as a process that waits in a system call does.
            for pid in stopped:
                _gone(pid, signal.SIGCONT)
    process.wait(timeout=60)
    print(f"hung while it loaded, given up after {seen_after:.0f} s")
    assert process.returncode == ExitStatus.WENT_BACK, shown[-3000:]
    assert re.search(r"vllm-0 did nothing for 2\d s: .* phase loading", shown)
    assert seen_after < 60
    assert release(service) == before
    assert answers()


def _processes(service: Local) -> list[int]:
    """The deployment's processes, the one that the manager keeps aside."""
    mark = f"STEPLADDER_DEPLOYMENT={service.state}/deployments/e2e\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            command = (path.parent / "cmdline").read_bytes()
            found += [int(path.parent.name)] if mark in path.read_bytes() and b"reaper.py" not in command else []
        except OSError:
            continue
    return found


def _gone(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return True
    return False


def test_without_a_way_back_the_failed_release_stays(service: Local) -> None:
    before = release(service)
    done = service.run("deploy", "-e", WRONG, "-e", "deploy_way_back=false", check=False)
    assert done.returncode == ExitStatus.NO_WAY_BACK
    assert "deploy_way_back is false" in done.stdout
    assert release(service) != before
    service.run("rollback")
    assert release(service) == before


def test_diagnose_names_the_layer_of_a_hang_and_of_a_release_that_does_not_start(
    service: Local, tmp_path: Path
) -> None:
    main = service.engine_pid()
    cores = [pid for pid in descendants(main) if "Engine" in Path(f"/proc/{pid}/comm").read_text()]
    assert cores
    for pid in cores:
        os.kill(pid, signal.SIGSTOP)
    try:
        status, told, _ = diagnose(service, tmp_path)
    finally:
        for pid in cores:
            os.kill(pid, signal.SIGCONT)
    assert status == ExitStatus.NOT_READY, told
    assert "the first layer that fails is 'serve'" in told
    assert "gave no token" in told
    bad = json.dumps({"deployment_extra_arguments": ["--no-such-flag"], "deploy_way_back": False})
    service.run("deploy", "-e", bad, check=False)
    status, told, _ = diagnose(service, tmp_path)
    assert status == ExitStatus.NOT_READY, told
    assert "the first layer that fails is 'load'" in told
    assert "unrecognized arguments: --no-such-flag" in told
    service.run("rollback")


def test_a_controller_killed_at_random_moments_leaves_a_truth_and_one_rerun_converges(service: Local) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    for number in range(KILLS):
        wish = OTHER if number % 2 else "{}"
        command = [sys.executable, "bin/stepladder", "deploy", *service.options, "-e", wish]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(2, 25))
        process.kill()
        process.wait()
        told = service.status()
        assert told["ready"] is answers()
        service.run("deploy", "-e", wish)
        after = service.status()
        assert after["ready"]
        assert after["nodes"]["localhost"]["outcome"] == "proven"
        assert after["nodes"]["localhost"]["lease"] is None
