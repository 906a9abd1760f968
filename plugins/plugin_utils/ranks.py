"""Nodes of one replica that wait at the same time, each in a worker process of its own, on the controller."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path


class Together:
    """Tells the others of a replica that one of them has failed, through a file in the run's own directory.

    directory: the run's temporary directory, the same for all its workers. ranks: the nodes' names; a node alone tells
    nobody.
    """

    def __init__(self, directory: str, ranks: Sequence[str], host: str) -> None:
        name = hashlib.sha256("\n".join(sorted(ranks)).encode()).hexdigest()[:16]
        self._mark = Path(directory, f"failed-{name}") if len(ranks) > 1 else None
        self._host = host
        self._worked_at = time.monotonic()
        self._work = self._mark.with_name(f"worked-{name}") if self._mark else None
        self.worked()

    def worked(self) -> None:
        """Say that this node's processes did something just now."""
        self._worked_at = time.monotonic()
        if self._work:
            # Of several nodes one may wait for another that loads: what counts is that any of them does something.
            # The time of day may be set meanwhile; all of them share this machine's clock since its boot.
            self._work.touch()
            os.utime(self._work, (self._worked_at, self._worked_at))

    def idle(self) -> float:
        """Seconds since any of the nodes did something."""
        last = self._work.stat().st_mtime if self._work else self._worked_at
        return max(0.0, time.monotonic() - max(last, self._worked_at))

    def fail(self) -> None:
        """Say that this node has failed; the first one that does is the one to blame."""
        if self._mark and not self._mark.exists():
            self._mark.write_text(self._host)

    def to_blame(self) -> str:
        """Another node that has failed; empty while none has."""
        if not self._mark or not self._mark.exists():
            return ""
        name = self._mark.read_text()
        return "" if name == self._host else name
