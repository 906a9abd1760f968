"""Busy or hung: the decision in simulated time, for engines that are saturated, idle, loading, stopped, deadlocked."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_progress
from ansible_collections.stepladder.core.plugins.module_utils.engine_progress import Look, Probe, Verdict, Watch

STALL, PROBE_AFTER, PROBE_SECONDS, LOOK_EVERY = 100.0, 30.0, 30.0, 5.0
HOUR = 3600.0


class Simulation:
    """A watch as the watchdog runs it, on a clock of its own: looks every 5 s, one probe at a time, 30 s for a token.

    Args:
        look: what the metrics say at a moment; silence takes as long as a look may.
        answers: whether a request for a token sent at a moment is answered in time.
        look_takes: seconds for which a look sent at a moment waits before the metrics are read.
        agent: as the gateway's agent runs it: looks every 2 s, 50 s for a token.
    """

    def __init__(
        self, look: Callable[[float], Look], answers: Callable[[float], Probe], *,
        armed: bool = False, look_takes: Callable[[float], float] = lambda now: 0.0, agent: bool = False,
    ) -> None:  # fmt: skip
        self.look, self.answers, self.look_takes = look, answers, look_takes
        self.look_every, self.probe_seconds = (2.0, 50.0) if agent else (LOOK_EVERY, PROBE_SECONDS)
        self.watch = Watch(STALL, PROBE_AFTER, armed=armed)
        self.stalled_at: list[float] = []
        self.probes = 0
        self.verdict = Verdict("unknown", "")

    def looked(self, now: float, asked: float, takes: float) -> Look | None:
        """What a look that is under way has brought by now."""
        if now - asked >= engine_progress.METRICS_TIMEOUT:
            return Look("silent")
        if now - asked < takes:
            return None
        found = self.look(now)
        return None if found.answer == "silent" else found

    def run(self, seconds: float, start: float = 0.0) -> Simulation:
        now, next_look, looking, pending = start, start, None, None
        while now < start + seconds:
            if looking is None and now >= next_look:
                looking = (now, self.look_takes(now))
            if looking and (found := self.looked(now, *looking)):
                self.watch.look(now, found, now - looking[0])
                looking, next_look = None, now + self.look_every
            if pending and now >= pending[0]:
                self.watch.probed(now, pending[1])
                pending = None
            self.verdict = self.watch.verdict(now)
            if self.verdict.state == "stalled":
                self.stalled_at.append(now)
                self.watch.restarted()
            elif self.verdict.probe and pending is None:
                self.probes += 1
                probe = self.answers(now)
                pending = (now + (1.0 if probe.answer == "ok" else self.probe_seconds), probe)
            now += 1.0
        return self


def token(now: float) -> Probe:
    return Probe("ok")


def silence(now: float) -> Probe:
    return Probe("silent", "a request for one token had no answer within 30 s")


@pytest.mark.parametrize("seed", range(20))
def test_an_hour_at_saturation_brings_no_restart(seed: int) -> None:
    """64 requests run, 200 wait, every probe starves in the queue, /metrics is slow now and then: simulated time."""
    chance = random.Random(seed)
    counted = [1000.0, 0.0]

    def look(now: float) -> Look:
        # A step of the engine every few seconds at the slowest: long prompts in chunks, preemptions.
        while counted[1] <= now:
            counted[0] += chance.choice([0, 0, 0, 1, 40, 3000])
            counted[1] += LOOK_EVERY
        return Look("ok", counted[0], 264.0)

    def takes(now: float) -> float:
        return chance.uniform(1, 35) if chance.random() < 0.1 else 0.0

    simulation = Simulation(look, silence, look_takes=takes).run(HOUR)
    assert simulation.stalled_at == []


@pytest.mark.parametrize("agent", [False, True], ids=["watchdog", "agent"])
@pytest.mark.parametrize("look_takes", [6.0, 15.0, 28.0])
def test_a_saturated_engine_whose_metrics_stay_slow_is_left_alone(look_takes: float, agent: bool) -> None:
    """Its tokens come all the while, and every probe starves in the queue (sglang 28157: seconds for /metrics)."""

    def takes(now: float) -> float:
        return look_takes if now > 300 else 0.0

    slow = Simulation(lambda now: Look("ok", 1000.0 + now, 264.0), silence, look_takes=takes, agent=agent)
    assert slow.run(HOUR).stalled_at == []


def deadlocked_after(when: float, *, metrics: bool, pending: float) -> Callable[[float], Look]:
    def look(now: float) -> Look:
        if now < when:
            return Look("ok", 1000.0 + now, pending)
        return Look("ok", 1000.0 + when, pending + 1) if metrics else Look("silent")

    return look


@pytest.mark.parametrize("when", [61.0, 62.5, 64.0, 100.0, 119.9])
@pytest.mark.parametrize("metrics", [True, False], ids=["green-health", "stopped"])
@pytest.mark.parametrize("pending", [0.0, 5.0], ids=["idle", "busy"])
@pytest.mark.parametrize("look_takes", [0.0, 8.0, 28.0])
@pytest.mark.parametrize("agent", [False, True], ids=["watchdog", "agent"])
def test_a_stall_is_found_within_two_minutes(
    when: float, metrics: bool, pending: float, look_takes: float, agent: bool
) -> None:
    def answers(now: float) -> Probe:
        return token(now) if now < when - 1 else silence(now)

    engine = deadlocked_after(when, metrics=metrics, pending=pending)
    simulation = Simulation(engine, answers, look_takes=lambda now: look_takes, agent=agent).run(600)
    assert simulation.stalled_at
    assert simulation.stalled_at[0] - when <= 120
    assert len(simulation.stalled_at) == 1, "it is not judged again before its next token"


def test_an_idle_engine_is_asked_now_and_then_and_left_alone() -> None:
    simulation = Simulation(lambda now: Look("ok", 5.0, 0.0), token).run(HOUR)
    assert simulation.stalled_at == []
    assert simulation.verdict.state == "idle"
    assert 90 <= simulation.probes <= 130, "about one token every 30 s"


def test_a_busy_engine_is_not_asked() -> None:
    assert Simulation(lambda now: Look("ok", 5.0 + now, 3.0), silence).run(HOUR).probes == 0


LOADING = [
    pytest.param(lambda now: Look("refused"), silence, id="nobody-listens"),
    pytest.param(lambda now: Look("ok", 0.0, 0.0), lambda now: Probe("refused", "answered 503"), id="503"),
    pytest.param(lambda now: Look("silent"), silence, id="silent-from-the-start"),
    pytest.param(lambda now: Look("ok", 0.0, 0.0), silence, id="no-token-yet"),
]


@pytest.mark.parametrize(("look", "answers"), LOADING)
def test_what_gave_no_token_yet_is_not_judged(look: Callable[[float], Look], answers: Callable[[float], Probe]) -> None:
    simulation = Simulation(look, answers).run(HOUR)
    assert simulation.stalled_at == []
    assert simulation.verdict.state == "unknown"


def test_a_new_start_is_not_judged_by_the_old_ones_tokens() -> None:
    """It worked, ended, loads for half an hour with its port open, and works again."""

    def look(now: float) -> Look:
        if now < 300:
            return Look("ok", 1000 + now, 1.0)
        if now < 2100:
            return Look("ok", 0.0, 0.0)  # counters of another process
        return Look("ok", now, 1.0)

    assert Simulation(look, lambda now: silence(now) if now < 2100 else token(now)).run(HOUR).stalled_at == []


def test_an_engine_without_counters_is_never_judged() -> None:
    simulation = Simulation(lambda now: Look("unsuitable"), silence, armed=True).run(HOUR)
    assert (simulation.stalled_at, simulation.verdict.detail) == ([], "its metrics count no tokens")


def test_one_that_hung_before_anyone_looked_is_found_by_the_gateways_agent() -> None:
    assert Simulation(lambda now: Look("ok", 7.0, 4.0), silence, armed=True).run(200).stalled_at[0] <= 120


def test_one_that_hung_before_anyone_looked_is_found_where_it_gave_tokens_before() -> None:
    assert Simulation(lambda now: Look("ok", 7.0, 4.0, 3.0), silence).run(200).stalled_at[0] <= 120
    # A prompt was read, and no token given yet: it may compile its kernels.
    assert Simulation(lambda now: Look("ok", 7.0, 4.0, 0.0), silence).run(HOUR).stalled_at == []


@pytest.mark.parametrize("step", [1.0, 95.0])
def test_a_saturated_engine_that_is_first_looked_at_late_is_left_alone(step: float) -> None:
    """Its requests for a token starve; its counters move every few seconds, or only just in time."""
    moves = Simulation(lambda now: Look("ok", 500.0 + now // step, 90.0, 400.0 + now // step), silence).run(HOUR)
    assert moves.stalled_at == []


def test_errors_count_as_no_token_and_refusals_of_the_question_do_not() -> None:
    failing = Simulation(lambda now: Look("ok", min(now, 50.0), 1.0), lambda now: Probe("silent", "answered 500"))
    assert failing.run(300).stalled_at
    wrong = Simulation(lambda now: Look("ok", min(now, 50.0), 0.0), lambda now: Probe("unsuitable", "answered 404"))
    assert wrong.run(HOUR).stalled_at == []


# Lines of vLLM 0.33.0 and SGLang 0.5.23 as their sources name the metrics.
VLLM = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:generation_tokens_total{engine="0",model_name="m"} 100.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="m"} 1000.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 9.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 40.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 1100.0
"""
SGLANG = """sglang:num_running_reqs{model_name="m",tp_rank="0"} 1.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 4.0
sglang:realtime_tokens_total{mode="decode",model_name="m"} 50.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m"} 5.0
sglang:generation_tokens_total{model_name="m"} 7.0
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [(VLLM, (1140.0, 5.0, 100.0)), (SGLANG, (62.0, 5.0, 7.0)), ("x 1\n", (None, None, None))],
)
def test_metrics_are_read(text: str, found: tuple[float | None, ...]) -> None:
    assert engine_progress.read_metrics(text) == Look("ok", *found)
