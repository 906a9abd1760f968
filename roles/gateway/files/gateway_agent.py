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
import threading
import time
from pathlib import Path
from typing import Any

from engine_progress import STALLED, Verdict, Watch, ask_for_token, look_at

LOOK_EVERY = 2.0
PROBE_AFTER = 30.0
PROBE_SECONDS = 60.0
LONGEST_QUESTION = 64


class Engine(threading.Thread):
    """Watches one replica."""

    def __init__(self, target: dict[str, Any], stall_seconds: float) -> None:
        super().__init__(daemon=True)
        self.target = target
        probe_after = min(PROBE_AFTER, stall_seconds / 3)
        # Judged from the start: a replica that hung before this program began is to be found too.
        self.watch = Watch(stall_seconds, probe_after, armed=True)
        self.probe_seconds = min(PROBE_SECONDS, stall_seconds / 2)
        self.lock = threading.Lock()
        self.asking = threading.Event()
        self.last = Verdict("unknown", "not looked at yet")

    def run(self) -> None:
        """Look again and again; ask for a token where the watch wants one."""
        while True:
            look = look_at(self.target)
            with self.lock:
                self.note(self.watch.look(time.monotonic(), look))
                ask = self.last.probe and not self.asking.is_set()
            if ask:
                self.asking.set()
                threading.Thread(target=self.ask, daemon=True).start()
            time.sleep(LOOK_EVERY)

    def ask(self) -> None:
        """Ask for one token."""
        try:
            probe = ask_for_token(self.target, self.probe_seconds)
            with self.lock:
                self.note(self.watch.probed(time.monotonic(), probe))
        finally:
            self.asking.clear()

    def note(self, verdict: Verdict) -> None:
        """Keep the verdict, and write down when it turns."""
        if (verdict.state == STALLED) != (self.last.state == STALLED):
            print(f"replica {self.target['replica']}: {verdict.state}: {verdict.detail}", flush=True)
        self.last = verdict

    def answer(self) -> str:
        """For HAProxy; what follows '#' is shown in its statistics."""
        with self.lock:
            verdict = self.last
        return f"down #{verdict.detail}\n" if verdict.state == STALLED else f"up #{verdict.state}\n"


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
        engine.start()
    print(f"gateway agent: watches {len(engines)} replica(s) on port {settings['port']}", flush=True)
    with Server(settings["port"], engines) as server:
        server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
