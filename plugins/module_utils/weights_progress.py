"""How far a download is: numbers for people and, in a file beside the weights, for programs."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile

PROGRESS_SECONDS = 2.0
STATE_FILE = "progress.json"
RATE_SAMPLES = 15
FULL_BYTES = 2 * 1024 * 1024  # less than what is written at a time


def amount(count: float) -> str:
    """Bytes for people, in decimal units: 212.5 GB."""
    value, unit = scaled(count, count)
    return f"{value} {unit}"


def scaled(count: float, largest: float) -> tuple[str, str]:
    """A number of bytes in the unit that suits the largest of its line."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return f"{count / factor:.1f}", unit
    return f"{count:.0f}", "bytes"


def progress_line(done: int, total: int, rate: float) -> str:
    """`downloaded 12.3 of 212.5 GB (5.8 %), 410 MB/s, about 8 min left`; done and total in bytes, rate in bytes/s."""
    have, unit = scaled(done, total)
    all_of_it = scaled(total, total)[0]
    line = f"downloaded {have} of {all_of_it} {unit} ({100 * done / total if total else 100:.1f} %)"
    if rate <= 0:
        return line
    left = (total - done) / rate
    wait = f"{left / 3600:.1f} h" if left >= 5400 else f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return f"{line}, {rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s, about {wait} left"


def space_problem(path: str, free: int, needed: int, there: int) -> str:
    """Say that the file system is too small for what is still to come; '' when it is not. All in bytes."""
    missing = max(0, needed - there)
    if missing <= free:
        return ""
    return (
        f"too little space for the weights in {path}: {amount(free)} free, {amount(missing)} needed "
        f"({amount(needed)} in all, {amount(there)} of it already there), {amount(missing - free)} short. "
        "Free that much on this file system, or give a path on a larger one."
    )


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write on the file system where `path` is or will be."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def full_disk(path: str) -> str:
    """Say that nothing more can be written where something just failed; '' where that is not why."""
    free = free_bytes(Path(path))
    if free > FULL_BYTES:
        return ""
    return (
        f"No space left on the file system of {path}: {amount(free)} free. Something else filled it meanwhile. "
        "Free space there, and run this again: what was fetched is kept."
    )


def utc_now() -> str:
    """Now, in UTC, as 2026-11-21T03:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Progress:
    """Tells where a run is: a line for whoever watches, and a state file that outlives the controller.

    Args:
        line: gets one line for people.
        folder: gets `progress.json`; nothing is written while it does not exist.
        interval: seconds between two writes at least.
    """

    def __init__(self, line: ProgressFile, folder: Path, interval: float = PROGRESS_SECONDS) -> None:
        self.line = line
        self._state = folder / STATE_FILE
        self._interval = interval
        self._written = 0.0
        self._samples: deque[tuple[float, int]] = deque(maxlen=RATE_SAMPLES)

    def say(self, phase: str, text: str, **numbers: object) -> None:
        """Tell a phase (checking, waiting, fetching, passing-on, done) in words, with its numbers for programs."""
        numbers = {"phase": phase, **numbers}
        self.line.write(text, force=phase == "done", data=json.dumps(numbers))
        now = time.monotonic()
        if phase != "done" and self._written and now - self._written < self._interval:
            return
        self._written = now
        document = {
            "format_version": 1,
            "text": text,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "at": utc_now(),
            **numbers,
        }
        temporary = self._state.with_name(f".{STATE_FILE}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
            temporary.replace(self._state)
        except OSError:
            temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None

    def fetching(self, done: int, total: int, **numbers: object) -> None:
        """Tell how many of how many bytes are there; the rate is that of the last half minute."""
        now = time.monotonic()
        if not self._samples or now - self._samples[-1][0] >= self._interval:
            self._samples.append((now, done))
        (first, before), (last, latest) = self._samples[0], self._samples[-1]
        rate = max(0.0, (latest - before) / (last - first)) if last > first else 0.0
        text = progress_line(done, total, rate)
        self.say("fetching", text, done=done, total=total, bytes_per_second=round(rate), **numbers)


def read_state(path: Path) -> dict[str, Any]:
    """The state file in a folder of bookkeeping; empty where there is none that can be read."""
    try:
        found = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
