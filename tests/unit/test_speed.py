"""The gate's measurement: its statistics against noise, whom it counts as others, and what it asks an endpoint."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import release, speed
from ansible_collections.stepladder.core.plugins.module_utils.speed import Load, Round, Taken
from hypothesis import given
from hypothesis import strategies as st

from stepladder import gate, way_back

BAND = 0.5
TERMS = {"the model": "step3 bf16", "the hardware": "2 x 8 h20-96", "the layout": "ray TP16"}


def rounds(*, first: float = 0.2, alone: float = 30.0, together: float = 100.0, count: int = 6) -> tuple[Round, ...]:
    return (Round(first, alone, together, 4.5, 320),) * count


def summary(*found: Round, **terms: str) -> dict[str, Any]:
    made = speed.summary(Taken(found or rounds()), {**TERMS, **terms})
    assert made
    return made


# --- the statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "verdict", "text"),
    [
        ({}, "as_before", ""),
        ({"alone": 60.0, "together": 250.0, "first": 0.01}, "as_before", ""),
        # 30 tokens/s to 20 is half as much time again, exactly what is let pass.
        ({"alone": 20.0}, "as_before", ""),
        ({"alone": 15.2}, "slower", "15.2 tokens/s, before 30.0: 97% more time, 50% are let pass"),
        ({"together": 40.0}, "slower",
         "40.0 tokens/s with 4 requests at once, before 100: 150% more time, 50% are let pass"),
        ({"first": 0.45}, "slower", "0.45 s to the first token, before 0.20 s: 125% more time, 50% are let pass"),
        # Nobody notices a tenth of a second.
        ({"first": 0.3}, "as_before", ""),
        ({"alone": 10.0, "together": 30.0}, "slower",
         "10.0 tokens/s, before 30.0: 200% more time, 50% are let pass; 30.0 tokens/s with 4 requests at once, before "
         "100: 233% more time, 50% are let pass"),
    ],
)  # fmt: skip
def test_what_is_slower(now: dict[str, float], verdict: str, text: str) -> None:
    judgement = speed.judge(summary(*rounds(**now)), summary(), BAND)
    assert (judgement.verdict, judgement.text) == (verdict, text)


@pytest.mark.parametrize(
    ("before", "text"),
    [
        (summary(**{"the layout": "ray TP8xPP2"}), "the layout was ray TP8xPP2, is ray TP16"),
        (summary(**{"the hardware": "2 x 8 h200", "the model": "step3 fp8"}),
         "the hardware was 2 x 8 h200, is 2 x 8 h20-96, the model was step3 fp8, is step3 bf16"),
        (summary(**{"prompt words": "50"}), "prompt words was 50, is None"),
        ({**summary(), "format_version": 2}, "it was measured by another version of this toolkit"),
        ({"format_version": 0}, "it was measured by another version of this toolkit"),
    ],
)  # fmt: skip
def test_only_the_like_is_compared(before: dict[str, Any], text: str) -> None:
    now = summary(*rounds(alone=1.0))
    judgement = speed.judge(now, before, BAND)
    assert (judgement.verdict, judgement.text) == ("not_comparable", f"not compared with the release before: {text}")
    assert "(before:" not in speed.line(now, before, judgement)


def noisy(random_: random.Random, within: float, between: float, slower: float = 1.0) -> dict[str, Any]:
    """A measurement of a release with noise in each round, in the whole, and a stall in every twentieth round."""
    whole = slower * random_.lognormvariate(0, between)
    found = []
    for _ in range(6):
        stall = 1 + (random_.expovariate(1) if random_.random() < 0.05 else 0)
        factors = [whole * stall * random_.lognormvariate(0, within) for _ in range(3)]
        found.append(Round(0.2 * factors[0], 30 / factors[1], 100 / factors[2], 4.5 * whole, 320))
    return summary(*found)


def called_slower(random_: random.Random, within: float, between: float, slower: float = 1.0) -> bool:
    """As the action does it: measured a second time before it is called slower. The machine is as it was then."""
    before, whole = noisy(random_, within, between), random_.lognormvariate(0, between)
    return all(
        speed.judge(noisy(random_, within, 0, slower * whole), before, BAND).verdict == "slower" for _ in range(2)
    )


@pytest.mark.parametrize(
    ("within", "between", "most"),
    # Parts of the figure, one standard deviation: within a measurement, and from one start of an engine to the next.
    [(0.02, 0.02, 0), (0.05, 0.05, 0), (0.10, 0.10, 0.01), (0.30, 0.10, 0.01)],
)
def test_noise_alone_is_hardly_ever_called_slower(within: float, between: float, most: float) -> None:
    random_ = random.Random(20261121)
    alarms = sum(called_slower(random_, within, between) for _ in range(2000))
    assert alarms <= most * 2000, f"{alarms} of 2000"


def test_a_release_twice_as_slow_is_found_through_noise() -> None:
    random_ = random.Random(20261121)
    missed = sum(not called_slower(random_, 0.05, 0.03, 2.0) for _ in range(1000))
    assert missed <= 5, f"{missed} of 1000"


JITTER = st.lists(st.floats(0.9, 1.1), min_size=6, max_size=6)


@given(before=JITTER, now=JITTER, slower=st.floats(2, 1000))
def test_twice_as_slow_is_always_found_where_no_figure_is_off_by_more_than_a_tenth(
    before: list[float], now: list[float], slower: float
) -> None:
    old = summary(*(Round(0.2, 30 * factor, 100, 4.5, 320) for factor in before))
    new = summary(*(Round(0.2, 30 * factor / slower, 100, 4.5, 320) for factor in now))
    assert speed.judge(new, old, BAND).verdict == "slower"


def test_figures_that_say_nothing_are_not_judged() -> None:
    wild = [Round(0.2, alone, 100, 4.5, 320) for alone in (2, 9, 30, 80, 250, 600)]
    judgement = speed.judge(summary(*wild), summary(*wild), BAND)
    assert judgement.verdict == "noisy"
    assert judgement.text.startswith("not judged: two measurements may differ by ")


UNDONE = Taken((), elapsed=300.0)


@pytest.mark.parametrize(
    ("taken", "before", "verdict", "text"),
    [
        (Taken(rounds()), None, "first", "nothing to compare with: no release before it was measured"),
        (Taken(rounds(alone=10.0), counted=False), summary(), "busy",
         "10.0 tokens/s, before 30.0: 200% more time, 50% are let pass; not judged: its metrics do not say whether "
         "others asked meanwhile"),
        (Taken(rounds(count=2), disturbed=9), summary(), "busy", "not judged: others used it in 9 of 11 rounds"),
        (Taken((), trouble="HTTP 404: no completions here"), summary(), "not_measured",
         "not measured: HTTP 404: no completions here"),
        # So slow that it cannot even be measured: what took 4.5 s a round does no three rounds in five minutes.
        (UNDONE, summary(), "slower", "0 rounds in 300 s, where one round took 4.5 s before"),
        (UNDONE, None, "not_measured", "not measured: 0 rounds in 300 s, 3 are needed"),
        (Taken((), elapsed=300.0, counted=False), summary(), "not_measured",
         "not measured: 0 rounds in 300 s, 3 are needed"),
        (Taken((), elapsed=30.0), summary(), "not_measured", "not measured: 0 rounds in 30 s, 3 are needed"),
        (Taken(rounds(), broke=True, trouble="Connection reset by peer"), summary(), "broke",
         "it broke while it was measured, by up to 4 requests at once: Connection reset by peer"),
    ],
)  # fmt: skip
def test_what_an_unfinished_measurement_means(
    taken: Taken, before: dict[str, Any] | None, verdict: str, text: str
) -> None:
    judgement = speed.judge_taken(taken, speed.summary(taken, TERMS), before, BAND)
    assert (judgement.verdict, judgement.text) == (verdict, text)


def test_the_line_for_the_operator() -> None:
    now, before = summary(*rounds(alone=28.0)), summary()
    line = "0.20 s to the first token, 28.0 tokens/s, 100 with 4 at once"
    assert speed.line(now, before, speed.judge(now, before, BAND)) == f"{line} (before: 0.20 s, 30.0, 100)"
    first = speed.judge_taken(Taken(rounds()), now, None, BAND)
    assert speed.line(now, None, first) == f"{line}; nothing to compare with: no release before it was measured"


# --- who else asks ---------------------------------------------------------------------------------------------------

QUIET = [Load(0, 10 + 5 * n, 1000 + 320 * n) for n in range(4)]


@pytest.mark.parametrize(
    ("looks", "verdicts"),
    [
        (QUIET, [True, True, True]),
        # Counters that lag behind are no one else's, nor is it when they catch up.
        ([QUIET[0], Load(0, 11, 1100), Load(0, 20, 1640), QUIET[3]], [True, True, True]),
        # A probe for life: one request, one token.
        ([*QUIET[:2], Load(0, 21, 1641), Load(0, 26, 1961)], [True, True, True]),
        # A client in the second round.
        ([*QUIET[:2], Load(0, 22, 1900), Load(0, 27, 2220)], [True, False, True]),
        # One that is not done yet.
        ([*QUIET[:2], Load(1, 20, 1645), Load(0, 26, 2400)], [True, False, False]),
        # A long answer of another's, seen by its tokens alone.
        ([QUIET[0], Load(0, 15, 1400), Load(0, 20, 1800), Load(0, 25, 2200)], [False, False, False]),
    ],
)
def test_rounds_in_which_others_asked(looks: list[Load], verdicts: list[bool]) -> None:
    assert speed.undisturbed(looks, [*rounds(count=3)]) == verdicts


@pytest.mark.parametrize(
    ("text", "load"),
    [
        # vLLM 0.32.0 on the CPU, 2026-11, shortened
        ('vllm:num_requests_running{engine="0",model_name="m"} 1.0\nvllm:num_requests_waiting{engine="0"} 2.0\n'
         'vllm:generation_tokens_total{engine="0"} 321.0\nvllm:request_success_total{finished_reason="stop"} 3.0\n'
         'vllm:request_success_total{finished_reason="abort"} 1.0\n', Load(3, 4, 321)),
        # SGLang 0.5.23: the gauge of what runs stands still for half a minute, so it is not read.
        ('sglang:num_running_reqs{model="m"} 4.0\nsglang:num_requests_total{is_streaming="true"} 9.0\n'
         'sglang:realtime_tokens_total{mode="prefill_compute"} 900.0\n'
         'sglang:realtime_tokens_total{mode="decode"} 80.0\n',
         Load(0, 9, 80)),
        ("python_info 1.0\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_load_in_an_engines_metrics(text: str, load: Load | None) -> None:
    assert speed.read_load(text) == load


# --- the endpoint ----------------------------------------------------------------------------------------------------


class StandIn:
    """A stand-in for an engine: streams tokens at a pace, and fails as told. It proves nothing about an engine."""

    def __init__(self) -> None:
        self.pace = 0.001
        self.delay = 0.01
        self.knows_ignore_eos = True
        self.breaks_at: float = float("inf")
        self.others = 0
        self.metrics = True
        self.prompts: list[str] = []
        self.keys: set[str | None] = set()
        self.finished = self.written = 0
        self.lock = threading.Lock()

    def text(self) -> str:
        counted = (self.finished + self.others, self.written + 100 * self.others)
        return (
            f"vllm:num_requests_running 0.0\nvllm:num_requests_waiting 0.0\n"
            f"vllm:request_success_total {counted[0]}\nvllm:generation_tokens_total {counted[1]}\n"
        )


@contextmanager
def serving(engine: StandIn) -> Iterator[speed.Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(200 if engine.metrics else 404, engine.text())

        def do_POST(self) -> None:
            wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with engine.lock:
                engine.prompts.append(wish["prompt"])
                engine.keys.add(self.headers["Authorization"])
                broken = len(engine.prompts) > engine.breaks_at
            if broken:
                self.reply(500, "EngineDeadError")
            elif "ignore_eos" in wish and not engine.knows_ignore_eos:
                self.reply(400, "unknown field ignore_eos")
            else:
                self.stream(wish["max_tokens"])

        def reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def stream(self, tokens: int) -> None:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            time.sleep(engine.delay)
            for _ in range(tokens):
                self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')
                time.sleep(engine.pace)
            self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % tokens)
            with engine.lock:
                engine.finished += 1
                engine.written += tokens
            self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield speed.Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "tiny", "sk-key", context_length=80)
    finally:
        server.shutdown()
        server.server_close()


def test_an_endpoint_is_measured_with_fresh_prompts_of_one_length() -> None:
    engine = StandIn()
    engine.delay, engine.pace = 0.05, 0.01
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 1.0, 30)
    assert (taken.disturbed, taken.counted, taken.trouble) == (0, True, "")
    now = speed.summary(taken, TERMS)
    assert now
    assert now["rounds"] >= speed.LEAST_ROUNDS
    figures = {name: each["median"] for name, each in now["figures"].items()}
    # Bounds that a loaded machine keeps too: it is never faster than told.
    assert 0.05 <= figures["first_token"] < 0.5
    assert 5 < figures["alone"] <= 10 / 0.14
    assert figures["alone"] < figures["together"] <= 4 * 10 / 0.14


def test_a_stream_that_comes_in_one_lump_is_no_faster_for_it() -> None:
    engine = StandIn()
    engine.delay, engine.pace = 0.2, 0.0
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 0.5, 30)
    assert all(each.alone <= 10 / 0.2 for each in taken.rounds)
    assert len(engine.prompts) == len(set(engine.prompts)), "the engine's prefix cache would answer for it"
    assert {len(prompt) for prompt in engine.prompts} == {len(engine.prompts[0])}
    assert engine.keys == {"Bearer sk-key"}


def test_an_engine_that_knows_no_ignore_eos_is_measured_without() -> None:
    engine = StandIn()
    engine.knows_ignore_eos = False
    with serving(engine) as endpoint:
        assert len(speed.take(endpoint, 0.1, 30).rounds) >= speed.LEAST_ROUNDS


def test_one_that_others_use_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StandIn()
    text = engine.text

    def busier() -> str:
        engine.others += 2
        return text()

    monkeypatch.setattr(engine, "text", busier)
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 0.1, 30)
    assert (taken.rounds, taken.counted) == ((), True)
    assert taken.disturbed > 0


def test_one_without_counters_is_measured_and_not_judged_slower() -> None:
    engine = StandIn()
    engine.metrics = False
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 0.1, 30)
    assert (len(taken.rounds) >= speed.LEAST_ROUNDS, taken.counted) == (True, False)


def test_one_that_breaks_under_several_at_once_has_broken_and_one_that_goes_on_has_not() -> None:
    engine = StandIn()
    engine.breaks_at = 13
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 0.1, 30)
    assert (taken.broke, taken.trouble) == (True, "HTTP 500: EngineDeadError")
    with serving(engine) as endpoint:
        engine.breaks_at = float("inf")
        engine.prompts.clear()
        limited, endpoint.answers = endpoint.round, lambda _: True  # type: ignore[method-assign]
        engine.breaks_at = 13
        taken = speed.take(endpoint, 0.1, 30)
        assert limited
    assert (taken.broke, taken.trouble) == (False, "HTTP 500: EngineDeadError")


def test_a_measurement_ends_at_its_deadline() -> None:
    engine = StandIn()
    engine.pace = 0.2
    began = time.monotonic()
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 0.1, 1.0)
    assert (taken.rounds, taken.trouble) == ((), "")
    assert time.monotonic() - began < 5


def test_one_that_falls_silent_has_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECOND_CHANCE", 0.5)
    engine = StandIn()
    engine.delay = 20
    with serving(engine) as endpoint:
        taken = speed.take(endpoint, 0.1, 0.5)
    assert (taken.rounds, taken.broke, taken.trouble) == ((), True, "no answer within 0 s")


def test_nobody_there_is_a_break() -> None:
    with serving(StandIn()) as endpoint:
        pass
    taken = speed.take(endpoint, 0.1, 5)
    assert taken.broke
    assert "refused" in taken.trouble


# --- what the deploy makes of it -------------------------------------------------------------------------------------

SLICE = {
    "deployment": {"model": "step3", "variant": "bf16", "topology": "ray", "parallel": {"tensor": 16}},
    "node": {"gpus": 8, "gpu": "h20-96", "ranks": [{"node": "a"}, {"node": "b"}]},
    "endpoints": [{"replica": 0, "node": "a", "base_url": "http://a:8000/v1"}],
}


def test_an_endpoint_is_measured_where_it_is() -> None:
    assert gate.endpoints(SLICE, "a") == [{"replica": 0, "base_url": "http://a:8000/v1", "terms": TERMS}]
    assert gate.endpoints(SLICE, "b") == []


def result(verdict: str, *, proven_before: bool = False) -> dict[str, Any]:
    return {
        "verdict": verdict, "proven_before": proven_before, "compared_with": "old", "text": "15.2 tokens/s, before 30",
        "line": "0.20 s", "item": {"replica": 0, "base_url": "http://a:8000/v1"}, "speed": {"rounds": 6},
    }  # fmt: skip


SLOWER = (
    "http://a:8000/v1 is slower than release old: 15.2 tokens/s, before 30\n"
    "To deploy it all the same: -e deploy_speed_gate=tell"
)


@pytest.mark.parametrize(
    ("found", "word", "verdict", "kept"),
    [
        (result("as_before"), "refuse", True, True),
        (result("slower"), "refuse", SLOWER, True),
        (result("slower"), "tell", True, True),
        # It was right once: the machine changed, and what it was stays the measure.
        (result("slower", proven_before=True), "refuse", True, False),
        (result("as_before", proven_before=True), "refuse", True, True),
        (result("broke"), "tell", "http://a:8000/v1: 15.2 tokens/s, before 30", True),
        *[(result(v), "refuse", True, True) for v in ("first", "not_comparable", "busy", "noisy", "not_measured")],
    ],
)
def test_what_becomes_of_the_release(found: dict[str, Any], word: str, verdict: bool | str, kept: bool) -> None:
    assert gate.verdict([found], word) == verdict
    assert gate.speeds([found]) == ({"0": {"rounds": 6}} if kept else {})


def test_the_release_that_came_back_is_told_of() -> None:
    assert gate.told([result("as_before")]) == "0.20 s"
    again = gate.told([result("slower", proven_before=True)])
    assert again == "0.20 s: slower than when it was proven too, so look at the machine first"
    choice = {"plan_id": "old", "nodes": ["n0"], "refusal": ""}
    failed = {"plan_id": "new", "reason": f"n0: {SLOWER}"}
    facts = {"release_given_up": failed, "release_choice": choice, "release_went": True, "release_told": again}
    facts |= {"release_too_slow": True, "release_tried_at": 1.0}
    assert way_back.ending({"n0": facts}, ["n0"], 91)["text"].splitlines()[-2:] == [
        "Release old serves again: it was asked and answers as promised, at most 90 s after it was stopped, and the "
        "slower one answered meanwhile.",
        f"  n0: {again}",
    ]


def test_it_is_kept_with_the_release_and_older_releases_stay_readable(tmp_path: Any) -> None:
    root = tmp_path / "deployments/d"
    for plan_id in ("p1", "p2"):
        wanted = release.wanted_release(str(root), plan_id, {"plan_id": plan_id}, [])
        release.converge(str(root), wanted, 3, False)
        release.record_outcome(str(root), plan_id, "proven", "")
    old = root / "outcomes/p1.json"
    written = json.loads(old.read_text())
    del written["speed"]
    old.write_text(json.dumps(written))
    assert release.read_outcomes(str(root))["p1"]["speed"] == {}
    release.record_outcome(str(root), "p2", "proven", "", speed={"0": summary()})
    # Another replica, or none, takes nothing away.
    release.record_outcome(str(root), "p2", "proven", "", speed={"1": summary()})
    release.record_outcome(str(root), "p2", "failed", "later")
    release.record_outcome(str(root), "p2", "proven", "")
    kept = release.read_outcomes(str(root))["p2"]
    assert (kept["outcome"], kept["speed"]) == ("proven", {"0": summary(), "1": summary()})
    assert release.previous_release(str(root)) == "p1"
