"""Whether an engine makes progress: tokens, not `/health`, which answers 200 through a deadlock (vllm 39863).

The decision is pure and knows no clock but the one that it is told: `Watch`. Standard library only; roles copy this
file to nodes, where the watchdog and the gateway's agent run it.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What moves while an engine works. vLLM 0.33.0: tokens, and the steps of the engine, which move through a long prompt
# too. SGLang 0.5.23: its own token counters move when a request ends, the realtime ones every few steps.
_COUNTERS = re.compile(
    r"^(?:vllm:(?:generation_tokens_total|prompt_tokens_total|iteration_tokens_total_count)"
    r"|sglang:(?:realtime_tokens_total|generation_tokens_total|prompt_tokens_total))(?:\{[^}]*\})? (\S+)",
    re.M,
)
_PENDING = re.compile(
    r"^(?:vllm:num_requests_(?:running|waiting)|sglang:num_(?:running|queue)_reqs)(?:\{[^}]*\})? (\S+)", re.M
)
# What clients were given: more than none says that the engine has worked before.
_GENERATED = re.compile(r"^(?:vllm|sglang):generation_tokens_total(?:\{[^}]*\})? (\S+)", re.M)
# A saturated API server takes seconds for them (sglang 28157), and what it says late still proves tokens.
METRICS_TIMEOUT = 30.0

# What a look at the metrics or a probe found.
OK, SILENT, REFUSED, UNSUITABLE = "ok", "silent", "refused", "unsuitable"
# What is decided.
UNKNOWN, WORKING, IDLE, SUSPECT, STALLED = "unknown", "working", "idle", "suspect", "stalled"


@dataclass(frozen=True)
class Look:
    """What `/metrics` said. answer: OK, SILENT (no answer in time), REFUSED (nobody listens) or UNSUITABLE.

    progress: sum of what only grows; pending: requests that run or wait; generated: tokens since its start. None where
    the metrics do not say.
    """

    answer: str
    progress: float | None = None
    pending: float | None = None
    generated: float | None = None


@dataclass(frozen=True)
class Probe:
    """What a request for one token brought: OK, SILENT, REFUSED or UNSUITABLE, and in words why it was no token."""

    answer: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is known of an engine. state: one of the constants above. probe: whether to ask for a token now."""

    state: str
    detail: str
    probe: bool = False


class Watch:
    """Judges one engine from looks at its metrics and from probes.

    A token is proven when a counter moved or a probe was answered. An engine that gave none for `probe_after` seconds
    is asked for one; it is stalled when none was proven for `stall_after` seconds and a probe failed meanwhile. A
    saturated engine moves its counters and is never asked. One that loads refuses connections or says 503, and is not
    judged until it has given its first token (`armed`), which may have been before anybody looked.

    A stall is found `stall_after` seconds after the last look that proved a token was sent, not answered: a slow answer
    does not put it off.

    Args:
        stall_after: seconds without a token, of an engine that owes one.
        probe_after: seconds without one after which it is asked for one.
        armed: judge it before its first token too.
    """

    def __init__(self, stall_after: float, probe_after: float, *, armed: bool = False) -> None:
        self.stall_after = stall_after
        self.probe_after = probe_after
        self._armed_from_start = armed
        self._reset()

    def _reset(self) -> None:
        self._armed = self._armed_from_start
        self._proven: float | None = None
        self._since: float | None = None
        self._progress: float | None = None
        self._failure = ""
        self._pending: float | None = None

    def look(self, now: float, look: Look, took: float = 0.0) -> Verdict:
        """Take in what the metrics said.

        Args:
            now: seconds of any clock that only goes on.
            look: what they said.
            took: seconds until they did; a token that they prove counts as of when they were asked for.
        """
        if look.answer == REFUSED:
            # It ended or loads: the process manager's matter, and whoever stops or starts it.
            self._reset()
            return Verdict(UNKNOWN, "nobody listens: it loads or does not run")
        self._since = now if self._since is None else self._since
        self._pending = look.pending
        if look.progress is not None:
            if self._progress is not None and look.progress < self._progress:
                self._reset()  # another process than before
                self._since = now
            elif self._progress is not None and look.progress > self._progress:
                self._prove(now - took)
            self._progress = look.progress
        self._armed = self._armed or bool(look.generated)
        return self.verdict(now)

    def probed(self, now: float, probe: Probe) -> Verdict:
        """Take in what a probe brought."""
        if probe.answer == OK:
            self._prove(now)
        elif probe.answer == REFUSED:
            self._reset()
        elif probe.answer == SILENT:
            self._failure = probe.detail
        return self.verdict(now)

    def restarted(self) -> None:
        """Forget everything: it was started again."""
        self._reset()

    def _prove(self, moment: float) -> None:
        self._proven = moment if self._proven is None else max(moment, self._proven)
        self._armed, self._failure = True, ""

    def verdict(self, now: float) -> Verdict:
        """What is known at this moment."""
        start = self._proven if self._proven is not None else self._since
        silent = 0.0 if start is None else now - start
        ask = silent >= self.probe_after
        if not self._armed or self._progress is None:
            # Without counters a busy engine cannot be told from a hung one.
            why = "no token was seen since it started" if not self._armed else "its metrics count no tokens"
            return Verdict(UNKNOWN, why, probe=ask)
        owed = "" if self._pending is None else f", {self._pending:.0f} request(s) running or waiting"
        if silent >= self.stall_after and self._failure:
            return Verdict(STALLED, f"no token for {silent:.0f} s{owed}, and {self._failure}", probe=True)
        if self._failure or (ask and self._pending):
            return Verdict(SUSPECT, f"no token for {silent:.0f} s{owed}", probe=ask)
        return Verdict(WORKING if self._pending else IDLE, f"last token {silent:.0f} s ago", probe=ask)


class Observer(threading.Thread):
    """Looks at one engine again and again, and asks it for a token where its watch wants one, one of each at a time.

    A look that is not answered keeps no request for a token waiting. A look ends after a third of the watch's
    `stall_after` at most: two in a row, which it takes to see a counter move, fit into it.

    Args:
        target: host, port and model (the served name).
        watch: judges it.
        look_every: seconds from the end of a look to the next.
        probe_seconds: how long to wait for a token.
    """

    def __init__(self, target: Mapping[str, Any], watch: Watch, look_every: float, probe_seconds: float) -> None:
        super().__init__(daemon=True)
        self.target = target
        self._watch = watch
        self._look_every = look_every
        self._look_seconds = min(METRICS_TIMEOUT, watch.stall_after / 3)
        self._probe_seconds = probe_seconds
        self._lock = threading.Lock()
        self._asking = threading.Event()
        self._over = threading.Event()

    def run(self) -> None:
        """Observe until it is ended."""
        while not self._over.is_set():
            look = threading.Thread(target=self._look, daemon=True)
            look.start()
            while look.is_alive() and not self._over.is_set():
                look.join(self._look_every)
                if self.verdict().probe and not self._asking.is_set():
                    self._asking.set()
                    threading.Thread(target=self._ask, daemon=True).start()
            self._over.wait(self._look_every)

    def _look(self) -> None:
        asked = time.monotonic()
        look = look_at(self.target, self._look_seconds)
        with self._lock:
            now = time.monotonic()
            self._watch.look(now, look, now - asked)

    def _ask(self) -> None:
        try:
            probe = ask_for_token(self.target, self._probe_seconds)
            with self._lock:
                self._watch.probed(time.monotonic(), probe)
        finally:
            self._asking.clear()

    def verdict(self) -> Verdict:
        """What is known now."""
        with self._lock:
            return self._watch.verdict(time.monotonic())

    def restarted(self) -> None:
        """Forget what was seen: it was started again."""
        with self._lock:
            self._watch.restarted()

    def end(self) -> None:
        """Observe no more."""
        self._over.set()


def read_metrics(text: str) -> Look:
    """The look that an engine's metrics give."""
    return Look(OK, *(_sum(pattern, text) for pattern in (_COUNTERS, _PENDING, _GENERATED)))


def _sum(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.findall(text)
    return sum(float(number) for number in found) if found else None


def look_at(health: Mapping[str, Any], timeout: float = METRICS_TIMEOUT) -> Look:
    """Ask an engine for its metrics. health: host and port."""
    status, text, answer = _request(health, "GET", "/metrics", None, timeout)
    if answer != OK:
        return Look(answer)
    return read_metrics(text) if status == 200 else Look(UNSUITABLE)


def ask_for_token(health: Mapping[str, Any], timeout: float) -> Probe:
    """Ask an engine for one token, as a client does. health: host, port and model (the served name)."""
    message = {"role": "user", "content": "a"}
    wish = json.dumps({"model": health["model"], "messages": [message], "max_tokens": 1, "temperature": 0})
    status, text, answer = _request(health, "POST", "/v1/chat/completions", wish, timeout)
    if answer != OK:
        return Probe(answer, f"a request for one token had {text}")
    if status == 200:
        return Probe(OK)
    if status == 503:  # it loads, or ends
        return Probe(REFUSED, "answered 503")
    if status >= 500:
        return Probe(SILENT, f"a request for one token was answered {status}")
    return Probe(UNSUITABLE, f"a request for one token was answered {status}")


def _request(
    health: Mapping[str, Any], method: str, path: str, body: str | None, timeout: float
) -> tuple[int, str, str]:
    """Status, text, and whether there was an answer at all (else the text says what there was)."""
    connection = http.client.HTTPConnection(str(health["host"]), int(health["port"]), timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace"), OK
    except ConnectionRefusedError:
        return 0, "its connection refused", REFUSED
    except TimeoutError:
        return 0, f"no answer within {timeout:.0f} s", SILENT
    except (OSError, http.client.HTTPException) as error:
        return 0, f"no answer ({error or type(error).__name__})", SILENT
    finally:
        connection.close()
