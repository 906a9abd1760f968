"""When a wait for engines is over, and what it says: rules over the answers of `engine_state`, without Ansible."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

State = Mapping[str, Any]

SHOW_EVERY = 15.0
LOG_SHOWN = 100
# Looks in a row that may find a process not running at all before that counts: a restart passes through it.
STOPPED_LOOKS = 3
# Per second; below it is what processes do that only wait and look now and then.
READ_BYTES, CPU_SECONDS, RSS_BYTES = 100_000, 0.1, 100_000
_TIME = re.compile(r"\d{2,4}-\d\d(-\d\d)?|\d\d:\d\d:\d\d([.,]\d+)?")


@dataclass
class Watch:
    """What is remembered of one process between two looks."""

    phase: str = ""
    pid: int = 0
    restarts: int = 0
    manager_restarts: int | None = None
    looping: int = 0
    stopped: int = 0
    ready_pid: int = 0
    shown_at: float = 0.0


@dataclass
class Readiness:
    """Follows the processes from look to look.

    deadline: seconds from the start. allowed_restarts: how often a process may be started again. progress_deadline:
    seconds that may pass without any sign of work; 0 is no limit.
    """

    deadline: float
    allowed_restarts: int
    progress_deadline: float = 0
    watches: dict[str, Watch] = field(default_factory=dict)
    _lines: set[str] = field(default_factory=set)
    _work: Mapping[str, float] | None = None
    _worked_until: float = 0.0

    def lines(self, states: Sequence[State], elapsed: float) -> list[str]:
        """Lines to show for this look: where the phase changed, else every 15 s. Call before `verdict`."""
        shown = []
        for state in states:
            watch = self.watches.setdefault(state["name"], Watch())
            changed = state["phase"] != watch.phase
            if changed or (state["phase"] != "ready" and elapsed - watch.shown_at >= SHOW_EVERY):
                watch.shown_at = elapsed
                shown.append(_line(state, elapsed))
        return shown

    def worked(self, states: Sequence[State], elapsed: float) -> bool:
        """Whether anything was done since the look before: a new line in a log, bytes read, processor time, memory.

        Where that cannot be known it was. A line that differs from an earlier one by its time alone is not new.
        """
        fresh = {_TIME.sub("", line) for state in states for line in state.get("log_tail") or []} - self._lines
        self._lines |= fresh
        now = next((state["work"] for state in states if state.get("work")), None)
        before, passed = self._work, max(elapsed - self._worked_until, 0.1)
        self._work, self._worked_until = now, elapsed
        if fresh or now is None or before is None:
            return True
        # A process that ended takes its sums away with it.
        limits = {"read": READ_BYTES, "cpu": CPU_SECONDS, "rss": RSS_BYTES}
        return any(abs(now[name] - before[name]) / passed >= least for name, least in limits.items())

    def verdict(self, states: Sequence[State], elapsed: float, idle: float = 0.0) -> str | None:
        """None to go on waiting, "" when all are ready, else why the wait failed, naming the process to blame.

        idle: seconds without any sign of work, of this node and of all that wait with it.
        """
        faults = [fault for state in states if (fault := self._fault(state))]
        if faults:
            return "\n".join(faults)
        waiting = [state for state in states if state["phase"] != "ready"]
        if not waiting:
            return ""
        if self.progress_deadline and idle >= self.progress_deadline:
            reason = f"did nothing for {idle:.0f} s: no new line in its log, nothing read, no processor time"
            return "\n".join(complaint(state, reason) for state in waiting)
        if elapsed >= self.deadline:
            reason = f"not ready after {elapsed:.0f} s (deadline {self.deadline:.0f} s)"
            return "\n".join(complaint(state, reason) for state in waiting)
        return None

    def ever_ready(self, name: str) -> bool:
        """Whether the process that runs now was seen ready before."""
        watch = self.watches.get(name, Watch())
        return watch.ready_pid != 0 and watch.ready_pid == watch.pid

    def _fault(self, state: State) -> str | None:
        watch = self.watches.setdefault(state["name"], Watch())
        self._remember(watch, state)
        if state["phase"] == "failed":
            return complaint(state, "failed")
        if watch.restarts > self.allowed_restarts:
            return complaint(state, f"was started again {watch.restarts} times ({self.allowed_restarts} allowed)")
        if watch.looping >= 2:
            return complaint(state, "ends right after each start")
        if watch.stopped >= STOPPED_LOOKS:
            return complaint(state, "does not run and nothing starts it")
        return None

    @staticmethod
    def _remember(watch: Watch, state: State) -> None:
        pid, phase, counted = state["pid"], state["phase"], state.get("restarts")
        if counted is not None:
            watch.manager_restarts = counted if watch.manager_restarts is None else watch.manager_restarts
            # A counter that went back was reset by a start from outside; it is counted from there.
            watch.manager_restarts = min(watch.manager_restarts, counted)
            watch.restarts = counted - watch.manager_restarts
        elif pid and watch.pid and pid != watch.pid:
            watch.restarts += 1
        watch.pid = pid or watch.pid
        watch.phase = phase
        watch.looping = watch.looping + 1 if phase == "crash_looping" else 0
        watch.stopped = watch.stopped + 1 if phase in ("absent", "stopped") else 0
        if phase == "ready":
            watch.ready_pid = pid


def _line(state: State, elapsed: float) -> str:
    age = state.get("since")
    seconds = elapsed if age is None else age
    tail = [line for line in state.get("log_tail") or [] if line.strip()]
    words = tail[-1].strip() if tail and state["phase"] != "ready" else state["detail"]
    if len(words) > LOG_SHOWN:
        words = words[: LOG_SHOWN - 3] + "..."
    return f"{state['name']}: {state['phase']} for {seconds:.0f} s: {words}"


def complaint(state: State, reason: str) -> str:
    """What is wrong with one process: phase, exit, log path and the log's last lines."""
    parts = [f"{state['name']} {reason}: phase {state['phase']}, {state['detail']}"]
    parts.append(f"  last exit: {state.get('exit') or 'unknown'}")
    if state.get("first_errors"):
        parts.append("  first errors in its log:")
        parts += [f"    {line}" for line in state["first_errors"]]
    if state.get("log"):
        parts.append(f"  last lines of {state['log']}:")
    parts += [f"    {line}" for line in state.get("log_tail") or []]
    return "\n".join(parts)
