"""Nodes of one replica that wait at the same time, each in a worker process of its own, on the controller."""

from __future__ import annotations

import hashlib
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
