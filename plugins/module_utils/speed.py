"""How fast an endpoint answers, and whether that is slower than before by more than noise.

The first half is pure: it judges figures. The second half asks the endpoint, from the node that it runs on, so that a
figure does not depend on where the operator sits. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.stepladder.core.plugins.module_utils.engine_progress import read_metrics

# Of what is kept. A measurement in another version is told of as one that cannot be compared.
FORMAT_VERSION = 1
# One request alone, then this many at once: a round.
STREAMS = 4
OUTPUT_TOKENS, PROMPT_WORDS = 64, 300
# First requests of a shape compile kernels.
WARM_UP = 2
LEAST_ROUNDS, ENOUGH_ROUNDS, MOST_ROUNDS = 3, 5, 15
# Standard errors of the two medians that never count as slower. With 4, one comparison in 30000 of pure noise would.
NOISE = 4.0
# The median of n values is 1.2533 times as uncertain as their mean, for large n and normal noise.
MEDIAN_ERROR = 1.2533
# From here on a release twice as slow could hide in the noise of one measurement.
TOO_NOISY = 0.9
# How long an endpoint that failed a request may take for another one.
SECOND_CHANCE = 60.0
# What a person does not notice (Nielsen, Usability Engineering, 1993, chapter 5), and scheduling alone may take.
LEAST_DELAY = 0.1

FIRST_TOKEN, ALONE, TOGETHER = "first_token", "alone", "together"

AS_BEFORE, SLOWER, FIRST, NOT_COMPARABLE, BUSY, NOISY, NOT_MEASURED, BROKE = (
    "as_before", "slower", "first", "not_comparable", "busy", "noisy", "not_measured", "broke",
)  # fmt: skip

# vLLM 0.33.0 (aborted requests are counted too) and SGLang 0.5.23, whose gauge of running requests stands still for
# half a minute after the last one; its realtime tokens move every few steps.
_FINISHED = re.compile(r"^(?:vllm:request_success_total|sglang:num_requests_total)(?:\{[^}]*\})? (\S+)", re.M)
_WRITTEN = re.compile(
    r'^(?:vllm:generation_tokens_total(?:\{[^}]*\})?|sglang:realtime_tokens_total\{[^}]*mode="decode"[^}]*\}) (\S+)',
    re.M,
)
# Tokens that a probe for life asks for, and what counters and our own count may differ by.
FOREIGN_TOKENS = 8


@dataclass(frozen=True)
class Round:
    """One request alone and STREAMS at once.

    first_token: seconds to the first token, alone. alone: output tokens/s of that one, from the question to the end.
    together: the same of all STREAMS in sum. seconds: what the round took. tokens: all that it was given.
    """

    first_token: float
    alone: float
    together: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """What the engine's own counters say of all its clients.

    pending: requests that run or wait. finished: requests so far. written: output tokens so far.
    """

    pending: float
    finished: float
    written: float


@dataclass(frozen=True)
class Taken:
    """What a measurement brought. rounds: those in which nobody else asked.

    disturbed: rounds in which somebody did. counted: whether the engine's counters could tell. elapsed: seconds.
    trouble: why it ended early; broke: whether that was the engine's fault.
    """

    rounds: tuple[Round, ...]
    disturbed: int = 0
    counted: bool = True
    elapsed: float = 0.0
    trouble: str = ""
    broke: bool = False


@dataclass(frozen=True)
class Judgement:
    """verdict: one of the constants above. text: it in words; what is slower, with both figures."""

    verdict: str
    text: str = ""


# --- figures ---------------------------------------------------------------------------------------------------------


def summary(taken: Taken, terms: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is kept of a measurement: each figure's median, and the spread of single rounds as a part of it.

    Args:
        taken: what was measured; too few rounds have no summary.
        terms: what has to be equal for two measurements to be compared.
    """
    rounds = taken.rounds
    if len(rounds) < LEAST_ROUNDS or taken.broke:
        return None
    figures = {}
    for name in (FIRST_TOKEN, ALONE, TOGETHER):
        values = [float(getattr(each, name)) for each in rounds]
        middle = statistics.median(values)
        # 1.4826 times the median deviation is the standard deviation of normal noise, and one outlier does not move it.
        spread = 1.4826 * statistics.median(abs(value - middle) for value in values) / middle
        figures[name] = {"median": round(middle, 6), "spread": round(spread, 4)}
    return {
        "format_version": FORMAT_VERSION,
        "terms": dict(terms),
        "rounds": len(rounds),
        "round_seconds": round(statistics.median(each.seconds for each in rounds), 3),
        "figures": figures,
    }


def more_time(name: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """How much more time it takes than before, as a part of that: 1.0 is twice the time; negative is faster."""
    new, old = now["figures"][name]["median"], before["figures"][name]["median"]
    return float((new / old if name == FIRST_TOKEN else old / new) - 1)


def noise(name: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """By how much two medians differ at most where nothing changed but the noise within each measurement."""
    # Six values tell their spread poorly; the larger of the two is the safer.
    spread = max(each["figures"][name]["spread"] for each in (now, before))
    return NOISE * MEDIAN_ERROR * float(spread) * math.sqrt(1 / now["rounds"] + 1 / before["rounds"])


def judge(now: Mapping[str, Any], before: Mapping[str, Any], band: float) -> Judgement:
    """Hold a measurement against the one before.

    A figure is slower when its time grew by more than `band`, and by more than the noise of the two measurements;
    seconds to the first token by more than LEAST_DELAY too.
    """
    if faults := differences(now, before):
        return Judgement(NOT_COMPARABLE, "not compared with the release before: " + ", ".join(faults))
    slower, noisy = [], []
    for name in (FIRST_TOKEN, ALONE, TOGETHER):
        grown, uncertain = more_time(name, now, before), noise(name, now, before)
        delay = now["figures"][name]["median"] - before["figures"][name]["median"]
        if name == FIRST_TOKEN and delay <= LEAST_DELAY:
            continue
        if grown > max(band, uncertain):
            slower.append(name)
        elif uncertain > max(band, TOO_NOISY):
            noisy.append(name)
    if slower:
        return Judgement(SLOWER, "; ".join(_slower_text(name, now, before, band) for name in slower))
    if noisy:
        worst = max(noise(name, now, before) for name in noisy)
        return Judgement(NOISY, f"not judged: two measurements may differ by {worst:.0%} by chance alone")
    return Judgement(AS_BEFORE)


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What keeps two measurements from being compared, in words."""
    if before.get("format_version") != FORMAT_VERSION:
        return ["it was measured by another version of this toolkit"]
    new, old = now["terms"], before["terms"]
    return [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted({*new, *old})
        if new.get(name) != old.get(name)
    ]


def judge_taken(
    taken: Taken, now: Mapping[str, Any] | None, before: Mapping[str, Any] | None, band: float
) -> Judgement:
    """Say what a measurement means, whether it could be finished or not.

    Args:
        taken: what was measured.
        now: its summary; None where it has fewer than LEAST_ROUNDS rounds.
        before: the summary kept with the release before; None where there is none.
        band: as for `judge`.
    """
    if taken.broke:
        return Judgement(BROKE, f"it broke while it was measured, by up to {STREAMS} requests at once: {taken.trouble}")
    if now is None:
        return _unfinished(taken, before, band)
    if before is None:
        return Judgement(FIRST, "nothing to compare with: no release before it was measured")
    judgement = judge(now, before, band)
    if judgement.verdict == SLOWER and not taken.counted:
        return Judgement(
            BUSY,
            f"{judgement.text}; not judged: its metrics do not say whether others asked meanwhile",
        )
    return judgement


def _unfinished(taken: Taken, before: Mapping[str, Any] | None, band: float) -> Judgement:
    done = len(taken.rounds)
    if taken.disturbed:
        return Judgement(BUSY, f"not judged: others used it in {taken.disturbed} of {done + taken.disturbed} rounds")
    if taken.trouble:
        return Judgement(NOT_MEASURED, f"not measured: {taken.trouble}")
    text = f"{done} rounds in {taken.elapsed:.0f} s"
    if before is not None and before.get("format_version") == FORMAT_VERSION:
        usual = before["round_seconds"] * (WARM_UP + LEAST_ROUNDS)
        if taken.counted and taken.elapsed > usual * (1 + max(band, TOO_NOISY)):
            return Judgement(SLOWER, f"{text}, where one round took {before['round_seconds']:.1f} s before")
    return Judgement(NOT_MEASURED, f"not measured: {text}, {LEAST_ROUNDS} are needed")


def _slower_text(name: str, now: Mapping[str, Any], before: Mapping[str, Any], band: float) -> str:
    new, old = now["figures"][name]["median"], before["figures"][name]["median"]
    what = {
        FIRST_TOKEN: f"{new:.2f} s to the first token, before {old:.2f} s",
        ALONE: f"{rate(new)} tokens/s, before {rate(old)}",
        TOGETHER: f"{rate(new)} tokens/s with {STREAMS} requests at once, before {rate(old)}",
    }[name]
    limit = max(band, noise(name, now, before))
    return f"{what}: {more_time(name, now, before):.0%} more time, {limit:.0%} are let pass"


def rate(value: float) -> str:
    """Tokens per second, in as many digits as mean something."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def line(now: Mapping[str, Any] | None, before: Mapping[str, Any] | None, judgement: Judgement) -> str:
    """One line for the operator: what was measured, what it was before, and what is to be said of it."""
    if now is None:
        return judgement.text
    first, alone, together = (now["figures"][name]["median"] for name in (FIRST_TOKEN, ALONE, TOGETHER))
    text = f"{first:.2f} s to the first token, {rate(alone)} tokens/s, {rate(together)} with {STREAMS} at once"
    if before is not None and not differences(now, before):
        old = [before["figures"][name]["median"] for name in (FIRST_TOKEN, ALONE, TOGETHER)]
        text += f" (before: {old[0]:.2f} s, {rate(old[1])}, {rate(old[2])})"
    return text + (f"; {judgement.text}" if judgement.text and judgement.verdict != SLOWER else "")


def undisturbed(looks: Sequence[Load], rounds: Sequence[Round]) -> list[bool]:
    """For each round, whether nobody else asked the engine for more than a sign of life meanwhile.

    looks: before the first round and after each.
    """
    # Counters may move a moment after a request ended: what lags behind is no one else's.
    requests = tokens = 0.0
    own_requests = own_tokens = 0
    verdicts = []
    for number, each in enumerate(rounds):
        before, after = looks[number], looks[number + 1]
        own_requests, own_tokens = own_requests + 1 + STREAMS, own_tokens + each.tokens
        more_requests = max(requests, after.finished - looks[0].finished - own_requests)
        more_tokens = max(tokens, after.written - looks[0].written - own_tokens)
        quiet = more_requests - requests <= 1 and more_tokens - tokens <= FOREIGN_TOKENS
        verdicts.append(quiet and before.pending == after.pending == 0)
        requests, tokens = more_requests, more_tokens
    return verdicts


def read_load(metrics: str) -> Load | None:
    """The load that an engine's metrics tell; None where they do not."""
    finished, written = _FINISHED.findall(metrics), _WRITTEN.findall(metrics)
    pending = 0.0 if "sglang:" in metrics else read_metrics(metrics).pending
    if not written or pending is None:
        return None
    return Load(pending, sum(map(float, finished)), sum(map(float, written)))


# --- the endpoint ----------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """The endpoint does not take such a request."""


class _BrokeError(Exception):
    """The endpoint took a request, or was there a moment ago, and gave no whole answer."""


@dataclass(frozen=True)
class _Stream:
    started: float
    first: float
    last: float
    tokens: int


class Endpoint:
    """Asks one endpoint for text of a fixed length.

    Args:
        base_url: ends in /v1; plain HTTP.
        model: the served name.
        api_key: the bearer token; empty sends none.
        context_length: tokens that the endpoint takes, prompt and answer together.
    """

    def __init__(self, base_url: str, model: str, api_key: str = "", context_length: int = 8192) -> None:
        parts = urlsplit(base_url)
        self.host, self.port, self.path = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        self.model = model
        self.headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        }
        # A word takes up to four tokens of a small vocabulary.
        self.words = min(PROMPT_WORDS, context_length // 8)
        self.tokens = min(OUTPUT_TOKENS, context_length // 8)
        # Text beyond the end of an answer: every stream has the same length. Not in OpenAI's own protocol.
        self.ignore_eos = True

    @property
    def shape(self) -> dict[str, int]:
        """What of the requests has to be equal for two measurements to be compared."""
        return {"prompt words": self.words, "tokens an answer": self.tokens, "requests at once": STREAMS}

    def load(self) -> Load | None:
        """What its counters say; None where they do not."""
        status, text = _get(self.host, self.port, "/metrics")
        return read_load(text) if status == 200 else None

    def round(self, deadline: float) -> Round:
        """One request alone, then STREAMS at once. deadline: by time.monotonic().

        Raises TimeoutError where it passes, _RefusedError and _BrokeError.
        """
        began = time.monotonic()
        single = self._ask(deadline)
        together = time.monotonic()
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [job.result() for job in [pool.submit(self._ask, deadline) for _ in range(STREAMS)]]
        ended = max(stream.last for stream in streams)
        return Round(
            first_token=single.first - single.started,
            # From the question on: where engine or client is short of processor time a stream comes in a few lumps, and
            # the time between its first and its last part says nothing (seen: 122811 tokens/s).
            alone=single.tokens / max(single.last - single.started, 1e-6),
            together=sum(stream.tokens for stream in streams) / max(ended - together, 1e-6),
            seconds=ended - began,
            tokens=single.tokens + sum(stream.tokens for stream in streams),
        )

    def answers(self, seconds: float) -> bool:
        """Whether it gives a whole answer within that time."""
        try:
            self._ask(time.monotonic() + seconds)
        except (TimeoutError, _RefusedError, _BrokeError):
            return False
        return True

    def _ask(self, deadline: float) -> _Stream:
        try:
            return self._stream(deadline)
        except _RefusedError:
            if not self.ignore_eos:
                raise
            self.ignore_eos = False
            return self._stream(deadline)

    def _stream(self, deadline: float) -> _Stream:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection = http.client.HTTPConnection(self.host, self.port, timeout=left)
        try:
            started = time.monotonic()
            connection.request("POST", f"{self.path}/completions", self._wish(), self.headers)
            answer = connection.getresponse()
            if answer.status != 200:
                text = answer.read(500).decode("utf-8", "replace")
                raise (_BrokeError if answer.status >= 500 else _RefusedError)(
                    f"HTTP {answer.status}: {' '.join(text.split())[:160]}"
                )
            return self._read(answer, started, deadline)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _BrokeError(str(error) or type(error).__name__) from error
        finally:
            connection.close()

    def _read(self, answer: http.client.HTTPResponse, started: float, deadline: float) -> _Stream:
        times: list[float] = []
        counted = 0
        while raw := answer.readline():
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError
            data = raw.decode("utf-8", "replace").partition("data:")[2].strip()
            if not data or data == "[DONE]":
                continue
            try:
                part = json.loads(data)
                times += [now] if part.get("choices") else []
                counted = int((part.get("usage") or {}).get("completion_tokens") or counted)
            except (ValueError, AttributeError, TypeError) as error:
                raise _BrokeError(f"a stream that cannot be read: {data[:80]!r}") from error
            if "error" in part:
                raise _BrokeError(f"the stream broke off: {str(part['error'])[:160]}")
        tokens = counted or len(times)
        if tokens < 2 or len(times) < 2:
            raise _RefusedError(f"an answer of {tokens} tokens in {len(times)} parts, too short to measure")
        return _Stream(started, times[0], times[-1], tokens)

    def _wish(self) -> str:
        # Blanks between the digits: as many tokens whatever they are. Without them the second measurement of a release
        # would find the first one's prompts in the engine's prefix cache.
        salt = " ".join(f"{secrets.randbits(32):08x}")
        wish = {
            "model": self.model,
            "prompt": f"{salt} {prompt(self.words)}",
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps({**wish, "ignore_eos": True} if self.ignore_eos else wish)


def prompt(words: int) -> str:
    """A text of so many words, always the same one."""
    sentence = "Tell me in plain words how a train finds its way through a large station at night and why it stops."
    known = sentence.split()
    return " ".join(known[number % len(known)] for number in range(words))


def _get(host: str, port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=5.0)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error)
    finally:
        connection.close()


def take(endpoint: Endpoint, seconds: float, deadline: float) -> Taken:
    """Measure: warm up, then rounds until the time is used.

    Args:
        endpoint: whom to ask.
        seconds: how long to measure; shorter with MOST_ROUNDS, longer until ENOUGH_ROUNDS were not disturbed.
        deadline: seconds after which it ends with what there is.
    """
    began = time.monotonic()
    ends = began + deadline
    at_first = endpoint.load()
    rounds: list[Round] = []
    looks: list[Load | None] = []
    trouble, broke = "", False
    try:
        for _ in range(WARM_UP):
            endpoint.round(ends)
        looks.append(endpoint.load())
        measured_from = time.monotonic()
        while _goes_on(time.monotonic() - measured_from, seconds, len(rounds), len(_clean(rounds, looks))):
            rounds.append(endpoint.round(ends))
            looks.append(endpoint.load())
    except TimeoutError:
        # Slow, or silent for good.
        if not endpoint.answers(SECOND_CHANCE):
            trouble, broke = f"no answer within {SECOND_CHANCE:.0f} s", True
    except _RefusedError as error:
        trouble = str(error)
    except _BrokeError as error:
        # One that takes no more than a few requests at once refuses the others, and goes on answering.
        trouble, broke = str(error), not endpoint.answers(SECOND_CHANCE)
    clean = _clean(rounds, looks)
    return Taken(
        rounds=tuple(clean),
        disturbed=len(rounds) - len(clean) or int(not clean and at_first is not None and at_first.pending > 0),
        counted=at_first is not None and None not in looks,
        elapsed=time.monotonic() - began,
        trouble=trouble,
        broke=broke,
    )


def _goes_on(passed: float, seconds: float, done: int, clean: int) -> bool:
    if done >= MOST_ROUNDS:
        return False
    if passed < seconds or done < ENOUGH_ROUNDS:
        return True
    # Where others go on asking, no wait brings rounds of our own.
    return clean < ENOUGH_ROUNDS and passed < 3 * seconds


def _clean(rounds: Sequence[Round], looks: Sequence[Load | None]) -> list[Round]:
    """The rounds in which nobody else asked; all of them where the counters do not say."""
    known = [look for look in looks if look is not None]
    if len(known) < len(looks):
        return [*rounds]
    quiet = undisturbed(known, rounds)
    return [each for number, each in enumerate(rounds) if quiet[number]]
