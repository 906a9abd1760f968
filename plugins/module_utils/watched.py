"""A program run under watch, one at a time for a target, its progress told in one line.

For work of minutes on a node. Python 3.9 and the standard library only; `stepladder.environment` loads it by its place.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class LockTimeoutError(Exception):
    """Another process held the lock until the deadline; the text names it."""


@contextlib.contextmanager
def exclusive(
    lock: Path, timeout_s: float, on_wait: Callable[[str], None] = lambda holder: None, poll_s: float = 0.5
) -> Iterator[int]:
    """Hold a lock file for the length of a block; it yields the file's descriptor.

    The descriptor handed to a child (`run`'s `keep_open`) keeps the lock held while the child lives, so a killed
    parent does not let a second run into what the child still writes.

    Args:
        lock: the lock file, made where it is missing; it holds the last holder's process id. It stays, unless the
            holder removes it within the block.
        timeout_s: how long to wait for another holder, in seconds.
        on_wait: called once with who holds it, when there is a wait.
        poll_s: how often to look again, in seconds.

    Raises:
        LockTimeoutError: it was still held after `timeout_s`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(lock)
    deadline = time.monotonic() + timeout_s
    waited = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, lock):
                    break
                os.close(descriptor)  # the holder before removed the file, with what it guarded
                descriptor = _open(lock)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process just started"
                if time.monotonic() >= deadline:
                    raise LockTimeoutError(
                        f"{lock} was held for {timeout_s:.0f} s by {holder}; let it finish, or end it, and run again"
                    ) from None
                if not waited:
                    on_wait(holder)
                    waited = True
                time.sleep(poll_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _open(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_line(path: Path, text: str) -> None:
    """Put one line into a file by rename, so that a reader never sees half of it, nor does one after a power cut."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with fresh.open("w") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)
    with _opened(path.parent) as descriptor:
        os.fsync(descriptor)


def sync_filesystem(path: Path) -> None:
    """Everything that was written to the file system of a path is on the disk when this returns.

    For a tree of files, before a file is written that says that the tree is whole: after a power cut one can be there
    and the others empty. One call, as to wait for the disk at each of tens of thousands of files takes minutes.

    Raises:
        OSError: something of it could not be written (told from Linux 5.8 on).
    """
    with _opened(path) as descriptor:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    on_line: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[float], None] = lambda seconds: None,
    tick_s: float = 2.0,
    keep_open: Sequence[int] = (),
    tail_lines: int = 20,
) -> tuple[int, list[str]]:
    """Run a program to its end, handing on each line of its output.

    Args:
        argv: the program and its arguments.
        environ: its whole environment.
        on_line: called with each line of stdout and stderr, in the order they came.
        on_tick: called about every `tick_s` seconds with the seconds since the start.
        tick_s: seconds between ticks.
        keep_open: descriptors that the program inherits.
        tail_lines: how many of the last lines to keep.

    Returns: exit status (negative: the signal that ended it) and the last lines.

    Raises:
        OSError: the program cannot be started.
    """
    tail: collections.deque[str] = collections.deque(maxlen=tail_lines)
    start = last_tick = time.monotonic()
    process = subprocess.Popen(
        list(argv),
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=tuple(keep_open),
        start_new_session=True,
    )
    assert process.stdout is not None  # noqa: S101 - stdout=PIPE above; for the type checker
    rest = ""

    def emit(line: str) -> None:
        if line.strip():
            tail.append(line.rstrip())
            on_line(line.rstrip())

    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=tick_s):
                    chunk = os.read(process.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    *lines, rest = (rest + chunk.decode(errors="replace")).replace("\r", "\n").split("\n")
                    for line in lines:
                        emit(line)
                if time.monotonic() - last_tick >= tick_s:
                    last_tick = time.monotonic()
                    on_tick(last_tick - start)
        emit(rest)
        return process.wait(), list(tail)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        process.stdout.close()
