#!/usr/bin/env python3
"""Restarts a replica that gives no tokens, as a whole, and says so.

It reads what runs from the release that is current, so that it follows every deploy and rollback by itself. It judges
an engine only after its first token, leaves the node alone while a run holds its lease, and waits longer from restart
to restart. A restart is the end of all of the engine's processes; their manager starts it again. Before that it writes
down what it saw.

    watchdog.py SETTINGS      (JSON, see roles/watchdog)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lease
from engine_progress import STALLED, Observer, Verdict, Watch

TICK = 2.0
LOOK_EVERY = 5.0
PROBE_AFTER, PROBE_SECONDS = 30.0, 30.0
FIRST_PAUSE, LONGEST_PAUSE = 300.0, 3600.0
# A replica that held out so long starts with the first pause again.
FORGIVEN_AFTER = 6 * 3600.0
WRITE_EVERY = 15.0
KEPT_REPORTS = 5


@dataclass
class History:
    """What a watchdog remembers of an engine, beyond its own life. Times are of the day, in seconds."""

    stalls: int = 0
    restarts: int = 0
    in_a_row: int = 0
    last_restart: float = 0.0


def pause_after(in_a_row: int) -> float:
    """Seconds from one restart to the next: 5 minutes, then twice as long each time, an hour at most."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** max(0, in_a_row - 1)) if in_a_row else 0.0


def why_not(now: float, history: History, mode: str, held: str, alone: str) -> str:
    """Why a stalled engine is not restarted; empty where it is to be.

    Args:
        now: time of the day, in seconds.
        history: of the engine.
        mode: `restart`, or `observe`.
        held: who is at work on the node, empty for nobody.
        alone: why this program cannot restart the replica as a whole, empty where it can.
    """
    if mode != "restart":
        return "watchdog_mode is observe"
    if alone:
        return alone
    if held:
        return held
    # A clock that was set back does not keep a restart off for ever.
    since = abs(now - history.last_restart)
    rest = pause_after(0 if since > FORGIVEN_AFTER else history.in_a_row) - since
    return f"it was restarted {since:.0f} s ago, the next restart may be in {rest:.0f} s" if rest > 0 else ""


def note_restart(now: float, history: History) -> None:
    """Count a restart."""
    forgiven = abs(now - history.last_restart) > FORGIVEN_AFTER
    history.in_a_row = 1 if forgiven else history.in_a_row + 1
    history.restarts += 1
    history.last_restart = now


def watched(release: Mapping[str, Any], root: bool) -> dict[str, dict[str, Any]]:
    """The engines of a node's slice that answer clients: where to ask, and what stands against a restart; by name.

    One lost rank is a new start for all. SGLang's ranks end themselves when the head is gone, and their managers start
    all of them again (seen with 0.5.23); of vLLM over several nodes that is not known, so it is left to `deploy`.

    Args:
        release: the slice.
        root: whether this program may end what runs in containers.
    """
    node, engine = release["node"], release["deployment"].get("engine")
    found = {}
    for process in node["processes"]:
        health = process["health"]
        if not health.get("model"):
            continue
        against = ""
        if node.get("ranks") and engine != "sglang":
            against = f"it spans {len(node['ranks'])} nodes: run 'deploy', which starts all ranks again"
        elif process.get("image") and not root:
            against = "it runs in a container, which only root can end: run 'deploy'"
        target = {"host": local(health["host"]), "port": health["port"], "model": health["model"]}
        found[process["name"]] = {"target": target, "against": against}
    return found


def local(host: str) -> str:
    """Where a process that listens everywhere is asked."""
    return "127.0.0.1" if host in ("0.0.0.0", "", "::") else host  # noqa: S104


def lease_holder(state_directory: str) -> str:
    """Who is at work on the node; empty for nobody. A lease that cannot be read holds, as it does for people."""
    try:
        held = lease.read(state_directory)
    except lease.LeaseError as error:
        return str(error)
    if held is None or held.state(lease.Clock.now()) == lease.EXPIRED:
        return ""
    return f"{held.who} is at work on the node ({held.verb})"


def processes_of(deployment_path: str, process: str, proc: Path = Path("/proc")) -> list[int]:
    """Those that carry the mark of one of a deployment's processes in their environment, and all below them.

    vLLM's engine and workers write their titles over their environment, so the mark alone does not find them.
    """
    wanted = {f"STEPLADDER_DEPLOYMENT={deployment_path}".encode(), f"STEPLADDER_PROCESS={process}".encode()}
    found: list[int] = []
    children: dict[int, list[int]] = {}
    for entry in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
            if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    for pid in found:
        found += [child for child in children.get(pid, []) if child not in found]
    return sorted(found)


def contained(deployment_path: str, process: str, proc: Path = Path("/proc")) -> list[int]:
    """Those of the container that a process runs in, known by its id in their control groups; none without one."""
    try:
        container = Path(deployment_path, "containers", f"{process}.id").read_text().strip()
    except OSError:
        return []
    found = []
    for entry in proc.glob("[0-9]*") if container else ():
        with contextlib.suppress(OSError):
            if container in (entry / "cgroup").read_text():
                found.append(int(entry.name))
    return sorted(found)


def report(verdict: Verdict, pids: list[int], proc: Path = Path("/proc")) -> str:
    """What was seen of an engine before it was ended: what each process was at."""
    lines = [verdict.detail]
    for pid in pids:
        with contextlib.suppress(OSError):
            name, _, rest = (proc / str(pid) / "stat").read_text().partition("(")[2].rpartition(")")
            waits = ""
            with contextlib.suppress(OSError):
                waits = (proc / str(pid) / "wchan").read_text()
            lines.append(f"process {pid} {name}: state {rest.split()[0]}, in {waits or '-'}")
    return "\n".join(lines) + "\n"


def metrics_text(deployment: str, verdicts: Mapping[str, Verdict], histories: Mapping[str, History]) -> str:
    """For Prometheus, in its text format."""
    rows = [
        ("stepladder_engine_stalled", "gauge", "1 while the engine owes a token and gives none",
         {name: int(verdict.state == STALLED) for name, verdict in verdicts.items()}),
        ("stepladder_watchdog_stalls_total", "counter", "stalls found",
         {name: history.stalls for name, history in histories.items()}),
        ("stepladder_watchdog_restarts_total", "counter", "restarts by the watchdog",
         {name: history.restarts for name, history in histories.items()}),
    ]  # fmt: skip
    lines = []
    for metric, kind, text, values in rows:
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        lines += [
            f'{metric}{{deployment="{deployment}",process="{name}"}} {value}' for name, value in sorted(values.items())
        ]
    return "\n".join(lines) + "\n"


def put(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file by rename, so that nobody reads half of it, and a full disk keeps none."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text)
        fresh.chmod(mode)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


class Watchdog:
    """Watches the engines of one deployment on this node."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.deployment_path = settings["deployment_path"]
        self.deployment = Path(self.deployment_path).name
        self.directory = Path(settings["directory"])
        self.release: str | None = None
        self.observers: dict[str, Observer] = {}
        self.against: dict[str, str] = {}
        self.histories = self.remembered()
        self.said: dict[str, str] = {}
        self.written = 0.0

    def remembered(self) -> dict[str, History]:
        """What an earlier run of this program wrote down."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads((self.directory / "state.json").read_text())["engines"]
            return {name: History(**{key: entry[key] for key in asdict(History())}) for name, entry in kept.items()}
        return {}

    def follow(self) -> None:
        """Watch what the current release runs."""
        link = Path(self.deployment_path, "current")
        current = link.readlink().name if link.is_symlink() else None
        if current == self.release:
            return
        try:
            wanted = watched(json.loads((link / "plan.json").read_text()), os.geteuid() == 0) if current else {}
        except (OSError, ValueError, KeyError) as error:
            self.say("-", f"the release cannot be read: {error}")
            return
        for name, observer in list(self.observers.items()):
            if name not in wanted or observer.target != wanted[name]["target"]:
                self.observers.pop(name).end()
        for name, engine in wanted.items():
            self.against[name] = engine["against"]
            self.histories.setdefault(name, History())
            if name not in self.observers:
                stall = float(self.settings["stall_seconds"])
                watch = Watch(stall, min(PROBE_AFTER, stall / 3))
                self.observers[name] = Observer(
                    engine["target"], watch, min(LOOK_EVERY, stall / 10), min(PROBE_SECONDS, stall / 3)
                )
                self.observers[name].start()
        self.release = current
        self.say("-", f"watches {', '.join(self.observers) or 'nothing'} of release {current}")

    def tick(self) -> None:
        """Judge all engines once, and restart what has to be."""
        self.follow()
        verdicts = {name: observer.verdict() for name, observer in self.observers.items()}
        for name, verdict in verdicts.items():
            if verdict.state == STALLED:
                self.stalled(name, verdict)
            else:
                self.say(name, verdict.state)
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write(verdicts)

    def stalled(self, name: str, verdict: Verdict) -> None:
        """Restart a stalled engine, or say why not."""
        if not self.said.get(name, "").startswith(STALLED):
            self.histories[name].stalls += 1
        now, history = time.time(), self.histories[name]
        held = lease_holder(self.settings["state_directory"])
        reason = why_not(now, history, self.settings["mode"], held, self.against[name])
        if reason:
            self.say(name, f"{STALLED}: {verdict.detail}; not restarted: {reason}", once=f"{STALLED} not restarted")
            return
        # First what runs in a container: its client, started again, would go on with one that still runs.
        pids = [*dict.fromkeys(contained(self.deployment_path, name) + processes_of(self.deployment_path, name))]
        self.keep_report(name, report(verdict, pids))
        note_restart(now, history)
        self.write({name: verdict})  # before the end of it: what is counted is not lost with this program
        self.say(name, f"{STALLED}: {verdict.detail}; restarted, {len(pids)} process(es) ended")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.observers[name].restarted()

    def keep_report(self, name: str, text: str) -> None:
        """Keep what was seen, of the last few stalls."""
        folder = self.directory / "stalls"
        with self.told_of(folder):
            folder.mkdir(exist_ok=True)
            put(folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{name}.txt", text)
            for old in sorted(folder.glob("*.txt"))[:-KEPT_REPORTS]:
                old.unlink()

    def write(self, verdicts: Mapping[str, Verdict]) -> None:
        """Write down what is known, for status and for Prometheus."""
        engines = {
            name: {**asdict(history), **(asdict(verdicts[name]) if name in verdicts else {})}
            for name, history in self.histories.items()
        }
        content = {"format_version": 1, "at": time.time(), "mode": self.settings["mode"], "engines": engines}
        text = metrics_text(self.deployment, verdicts, self.histories)
        files = [
            (self.directory / "state.json", json.dumps(content, indent=1, sort_keys=True) + "\n", 0o600),
            (self.directory / "metrics.prom", text, 0o600),
        ]
        if self.settings.get("textfile_directory"):
            # The exporter runs as another user.
            textfile = Path(self.settings["textfile_directory"], f"stepladder-{self.deployment}.prom")
            files.append((textfile, text, 0o644))
        for path, written, mode in files:
            with self.told_of(path):
                put(path, written, mode)
        self.written = time.monotonic()

    @contextlib.contextmanager
    def told_of(self, path: Path) -> Iterator[None]:
        """Say that a path cannot be written, and go on: a full disk is no reason to leave a stalled engine alone."""
        try:
            yield
        except OSError as error:
            self.say(str(path), f"cannot be written: {error.strerror}")
        else:
            self.said.pop(str(path), None)

    def say(self, name: str, text: str, once: str = "") -> None:
        """Write a line to the log, if that takes one, when something turns. once: what counts as the same."""
        if self.said.get(name) != (once or text):
            with contextlib.suppress(OSError):
                print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {name}: {text}", flush=True)
        self.said[name] = once or text


def main(path: str) -> None:
    """Watch for ever."""
    watchdog = Watchdog(json.loads(Path(path).read_text()))
    pause = min(TICK, watchdog.settings["stall_seconds"] / 10)
    while True:
        watchdog.tick()
        time.sleep(pause)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
