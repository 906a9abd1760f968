"""How a long module says where it is: one human line in a file, which the action plugin on the controller shows."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


class ProgressFile:
    """The file that holds the newest line of progress.

    path: where to write, None to write nowhere. interval: seconds between two writes at least; lines that come sooner
    are dropped, unless forced. A file that cannot be written never fails the work that it reports on.
    """

    def __init__(self, path: str | None, interval: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = Path(path) if path else None
        self.interval = interval
        self._clock = clock
        self._last_time: float | None = None
        self._last_text = ""

    def write(self, text: str, force: bool = False, data: str = "") -> bool:
        """Put a line into the file by atomic replace, however soon when forced. Returns whether it wrote.

        data: a line for programs, without line breaks; it stands before the line for people.
        """
        line = " ".join(text.split())
        now = self._clock()
        too_soon = self._last_time is not None and now - self._last_time < self.interval
        if self.path is None or line == self._last_text or (too_soon and not force):
            return False
        self._last_time, self._last_text = now, line
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as stream:
                stream.write(f"{data}\n{line}\n" if data else line + "\n")
            fresh.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            return False
        return True
