#!/usr/bin/env python3
"""Tells HAProxy which replicas give tokens: HAProxy connects, names one, and is answered 'up' or 'down'.

A request for one token as HAProxy's own check would fail whenever an engine is saturated, and take all replicas away
when they are needed most. This program tells busy from hung by the engine's counters, asks for a token only when none
came for a while, and never has more than one such request under way to a replica. Where it does not run, HAProxy keeps
to its own checks.

    gateway_agent.py CONFIGURATION      (JSON: port, stall_seconds, engines: [{replica, host, port, model}])
"""

from __future__ import annotations

import json
import socketserver
import sys
from pathlib import Path
from typing import Any

from engine_progress import STALLED, Observer, Watch

LOOK_EVERY = 2.0
PROBE_AFTER = 30.0
PROBE_SECONDS = 60.0
LONGEST_QUESTION = 64


class Engine:
    """A replica and what is said of it."""

    def __init__(self, target: dict[str, Any], stall_seconds: float) -> None:
        self.replica = target["replica"]
        # Judged from the start: a replica that hung before this program began is to be found too.
        watch = Watch(stall_seconds, min(PROBE_AFTER, stall_seconds / 3), armed=True)
        self.observer = Observer(
            target, watch, min(LOOK_EVERY, stall_seconds / 10), min(PROBE_SECONDS, stall_seconds / 2)
        )
        self.stalled = False

    def answer(self) -> str:
        """For HAProxy; what follows '#' is shown in its statistics."""
        verdict = self.observer.verdict()
        stalled = verdict.state == STALLED
        if stalled != self.stalled:
            print(f"replica {self.replica}: {verdict.state}: {verdict.detail}", flush=True)
        self.stalled = stalled
        return f"down #{verdict.detail}\n" if stalled else f"up #{verdict.state}\n"


class Server(socketserver.ThreadingTCPServer):
    """Answers HAProxy's agent checks."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, engines: dict[str, Engine]) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engines = engines


class Handler(socketserver.StreamRequestHandler):
    """One question."""

    timeout = 5

    def handle(self) -> None:
        """Answer for the replica that is named; nothing for one that is not known."""
        assert isinstance(self.server, Server)  # noqa: S101 - for the type checker
        try:
            engine = self.server.engines.get(self.rfile.readline(LONGEST_QUESTION).decode("ascii", "replace").strip())
            if engine:
                self.wfile.write(engine.answer().encode("ascii", "replace"))
        except OSError:
            return


def main(path: str) -> None:
    """Watch all replicas of a configuration and answer for them."""
    settings = json.loads(Path(path).read_text())
    engines = {str(each["replica"]): Engine(each, settings["stall_seconds"]) for each in settings["engines"]}
    for engine in engines.values():
        engine.observer.start()
    print(f"gateway agent: watches {len(engines)} replica(s) on port {settings['port']}", flush=True)
    with Server(settings["port"], engines) as server:
        server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
