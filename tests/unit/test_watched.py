"""Programs run under watch, one at a time for a target."""

import ctypes
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepladder.environment import node_helper

watched = node_helper("watched")


def test_lines_come_as_they_are_written_and_the_last_are_kept() -> None:
    code = "import sys; print('a'); print('b\\rc', file=sys.stderr, flush=True); print('d', end=''); sys.exit(3)"
    lines: list[str] = []
    status, tail = watched.run([sys.executable, "-u", "-c", code], os.environ, on_line=lines.append, tail_lines=2)
    assert (status, lines, tail) == (3, ["a", "b", "c", "d"], ["c", "d"])


def test_a_silent_program_still_ticks() -> None:
    ticks: list[float] = []
    watched.run(["sleep", "0.5"], os.environ, on_tick=ticks.append, tick_s=0.1)
    assert len(ticks) >= 3
    assert ticks == sorted(ticks)


def test_an_interrupted_run_ends_its_program(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def interrupt(line: str) -> None:
        pid_file.write_text(line)
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        watched.run(["sh", "-c", "echo $$; exec sleep 60"], os.environ, on_line=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert time.monotonic() - start < 5


def test_the_second_waits_names_the_first_and_gives_up(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    waits: list[str] = []
    with (
        watched.exclusive(lock, 1),
        pytest.raises(watched.LockTimeoutError) as caught,
        watched.exclusive(lock, 0.3, waits.append, poll_s=0.1),
    ):
        pass
    assert waits == [f"process {os.getpid()}"]
    assert str(caught.value) == (
        f"{lock} was held for 0 s by process {os.getpid()}; let it finish, or end it, and run again"
    )


def test_a_killed_parents_child_keeps_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    with watched.exclusive(lock, 1) as held:
        child = subprocess.Popen(["sleep", "0.6"], pass_fds=(held,))
    start = time.monotonic()
    with watched.exclusive(lock, 5, poll_s=0.05):
        assert time.monotonic() - start > 0.3
    child.wait()


def test_a_lock_removed_by_its_holder_is_not_held_twice(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    waiting = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(watched.__file__).parent)!r})\n"
        "import watched\n"
        "with watched.exclusive(pathlib.Path(sys.argv[1]), 10, on_wait=lambda h: print('waiting', flush=True)):\n"
        "    print(pathlib.Path(sys.argv[1]).exists())\n"
    )
    with watched.exclusive(lock, 1):
        argv = [sys.executable, "-c", waiting, str(lock)]
        other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n"
        lock.unlink()
    assert other.communicate()[0] == "True\n"


def test_a_line_is_written_by_rename(tmp_path: Path) -> None:
    target = tmp_path / "progress"
    watched.write_line(target, "resolving")
    before = target.stat().st_ino
    watched.write_line(target, "resolved 3 packages")
    assert target.read_text() == "resolved 3 packages\n"
    assert target.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["progress"]


def test_a_line_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, str]] = []

    def record(descriptor: int) -> None:
        target = tmp_path / "marker"
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        there = target.read_text() if target.exists() else ""
        synced.append((path.read_text() if path.is_file() else path.name, there))

    monkeypatch.setattr(os, "fsync", record)
    watched.write_line(tmp_path / "marker", "whole")
    assert synced == [("whole\n", ""), (tmp_path.name, "whole\n")]


def test_a_file_system_is_synced_or_it_is_told_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.sync_filesystem(tmp_path)

    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def syncfs(self, descriptor: int) -> int:
            assert Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path
            ctypes.set_errno(errno.EIO)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Broken)
    with pytest.raises(OSError, match="Input/output error") as failed:
        watched.sync_filesystem(tmp_path)
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, str(tmp_path))
