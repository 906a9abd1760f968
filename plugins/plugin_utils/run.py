"""The run of a verb on the controller: its mark, whether another one still lives, and its own log."""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible import constants

# What the run is at, for those who look at a node meanwhile: written by the callback, read by what renews the lease.
DOING = "stepladder-doing"
NOTIFY = "stepladder-notify"
REFUSED = "stepladder-refused"


def controller(pid: int) -> dict[str, Any]:
    """What tells on this machine, and only on it, whether a process still lives.

    Boot and PID namespace belong to it: a pid of another container is another process.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "namespace": str(Path("/proc/self/ns/pid").readlink()), "pid": pid, "started": started(pid)}


def started(pid: int) -> str:
    """When a process started, in ticks since boot; empty where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def is_gone(other: Mapping[str, Any]) -> bool:
    """Whether a run is known to live no more: it ran on this machine, and its process is not there."""
    try:
        pid = int(other["pid"])
        here = controller(pid)
        same = all(other[name] == here[name] for name in ("boot", "namespace"))
        return same and other["started"] != here["started"]
    except (KeyError, TypeError, ValueError, OSError):
        return False


def mark(found: Mapping[str, Any]) -> str:
    """Name of a run, the same in all its processes."""
    text = "|".join([socket.gethostname(), *(str(found[name]) for name in sorted(found))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def who() -> str:
    """The person: who became root by sudo is told by the name before."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def doing_file() -> Path:
    """Where the run writes what it is at."""
    return Path(constants.DEFAULT_LOCAL_TMP, DOING)


def notify_file() -> Path:
    """Where the run keeps whom to tell; removed with the run's other temporary files."""
    return Path(constants.DEFAULT_LOCAL_TMP, NOTIFY)


def refused_file() -> Path:
    """There once a node's lease was not to be had: the run asks no further node for its own."""
    return Path(constants.DEFAULT_LOCAL_TMP, REFUSED)


def audit_file() -> Path:
    """The controller's log of what was changed from here."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state, "stepladder", "audit.jsonl")
