"""The reaper with real processes: nothing outlives the command, signals reach it, its exit status comes through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REAPER = Path(__file__).resolve().parents[2] / "roles/service/files/reaper.py"

# A command with a child and a grandchild in sessions of their own, as an engine's workers may be; prints their pids.
FAMILY = """
import subprocess, sys, time
grandchild = (
    "import subprocess, time;"
    "print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True);"
    "time.sleep(60)"
)
child = subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""

SLOW_TO_END = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: (time.sleep(0.3), sys.exit(5)))
print("up", flush=True)
time.sleep(60)
"""


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(REAPER), *command], stdout=subprocess.PIPE, text=True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(reaper: int) -> int:
    """The pid of the command that a reaper runs."""
    return int(Path(f"/proc/{reaper}/task/{reaper}/children").read_text().split()[0])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143)])
def test_nothing_outlives_a_command_that_is_killed(number: int, status: int) -> None:
    with started(sys.executable, "-c", FAMILY) as reaper:
        assert reaper.stdout
        family = [int(pid) for pid in reaper.stdout.readline().split()]
        assert len(family) == 2
        assert all(alive(pid) for pid in family)
        os.kill(command_of(reaper.pid), number)
        assert reaper.wait(20) == status
        assert not any(alive(pid) for pid in family)


def test_the_command_ends_with_a_reaper_that_is_killed() -> None:
    with started("sleep", "60") as reaper:
        for _ in range(50):
            if children := Path(f"/proc/{reaper.pid}/task/{reaper.pid}/children").read_text().split():
                break
            time.sleep(0.1)
        reaper.kill()
        reaper.wait(20)
        time.sleep(0.2)
        assert children
        assert not alive(int(children[0]))


def test_a_signal_is_passed_on_and_the_command_may_take_its_time() -> None:
    with started(sys.executable, "-c", SLOW_TO_END) as reaper:
        assert reaper.stdout
        assert reaper.stdout.readline() == "up\n"
        begin = time.monotonic()
        reaper.terminate()
        assert reaper.wait(20) == 5
        assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(
    ("command", "status"), [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["/no/such/program"], 126)]
)
def test_the_exit_status_is_the_commands(command: list[str], status: int) -> None:
    with started(*command) as reaper:
        assert reaper.wait(20) == status


def test_without_a_command_it_says_how_it_is_used() -> None:
    done = subprocess.run([sys.executable, str(REAPER)], capture_output=True, text=True, check=False)
    assert done.returncode == 126
    assert "reaper.py COMMAND" in done.stderr
