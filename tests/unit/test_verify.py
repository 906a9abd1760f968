"""The endpoint checks, against a stand-in that answers rightly, or wrongly as servers do."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import time

import pytest
from openai_standin import ANSWER, REASONING, TOOL_REASONING, Script, serving
from pydantic import SecretStr, ValidationError

from stepladder.verify import (
    CheckResult,
    ExactTexts,
    Expectations,
    Report,
    Target,
    format_line,
    format_table,
    run_checks,
)

EXACT = ExactTexts(
    answer=ANSWER,
    reasoning=REASONING,
    tool_reasoning=TOOL_REASONING,
    tool_name="get_weather",
    tool_arguments={"city": "Paris"},
)
REHEARSAL = Expectations(served_name="tiny", reasoning=True, tool_calls=True, exact=EXACT)
# A model whose text nobody can foretell; the stand-in knows no capital.
REAL = Expectations(served_name="tiny", reasoning=True, tool_calls=True, sense=False)
CHAT = "/chat/completions"
USAGE = "usage with prompt and completion above 0, completion up to 64, total their sum"
OTHER_WEIGHTS = "other weights or a broken rank give other text"


def ask(script: Script, expectations: Expectations = REHEARSAL, deadline: float = 30.0, **target: object) -> Report:
    with serving(script) as server:
        where = Target(base_url=server.base_url, max_tokens=64, **{"request_timeout": 10.0, **target})
        return run_checks(where, expectations, deadline=deadline)


def failures(report: Report) -> dict[str, str]:
    """Check -> what was found -> expected; the port, which changes, as PORT."""
    told = {check.name: f"{check.detail} -> {check.expected}" for check in report.checks if check.name in report.failed}
    return {name: re.sub(r"127\.0\.0\.1:\d+", "PORT", line) for name, line in told.items()}


def test_a_right_rehearsal_passes_with_exact_proof():
    seen: list[CheckResult] = []
    with serving(Script()) as server:
        report = run_checks(Target(base_url=server.base_url), REHEARSAL, seen.append)
    assert report.passed
    assert seen == list(report.checks)
    assert [(check.name, check.basis, check.detail) for check in report.checks] == [
        ("models", "protocol", "tiny"),
        ("chat", "exact", f"'{ANSWER}'"),
        ("reasoning", "exact", f"reasoning '{REASONING}'"),
        ("streaming", "exact", f"6 chunks: '{ANSWER}'"),
        ("completion", "protocol", "' ro The Wh'"),
        ("tool call", "exact", 'get_weather {"city": "Paris"}, finish_reason stop'),
        ("unknown model", "protocol", "HTTP 404"),
    ]


def test_every_generation_asks_for_the_same_text_each_time():
    with serving(Script()) as server:
        run_checks(Target(base_url=server.base_url, max_tokens=64), REHEARSAL)
        generations = [asked for path, asked in server.requests if path != "/models"]
    assert len(generations) == 5
    assert {(asked["temperature"], asked["seed"]) for asked in generations} == {(0, 0)}
    assert [asked["max_tokens"] for asked in generations] == [64, 64, 16, 64, 64]


@pytest.mark.parametrize(
    ("script", "expectations", "names"),
    [
        pytest.param(
            Script(reasoning_field="reasoning_content", tool_finish_reason="tool_calls"),
            REHEARSAL,
            ["models", "chat", "reasoning", "streaming", "completion", "tool call", "unknown model"],
            id="SGLang's field for reasoning and its finish reason",
        ),
        pytest.param(
            Script(content=f"{REASONING}</think>\n{ANSWER}", reasoning=None),
            REHEARSAL.model_copy(update={"reasoning": False, "tool_calls": False}),
            ["models", "chat", "streaming", "completion", "unknown model"],
            id="no parsers, reasoning within the content",
        ),
        pytest.param(
            Script(unknown_model_status=200),
            REAL.model_copy(update={"rejects_unknown_model": False}),
            ["models", "chat", "reasoning", "streaming", "completion", "tool call"],
            id="a server that takes any model name",
        ),
        pytest.param(
            Script(content="The capital is Paris."),
            REAL.model_copy(update={"sense": True}),
            ["models", "chat", "reasoning", "streaming", "completion", "tool call", "unknown model", "sense"],
            id="a real model that knows its facts",
        ),
    ],
)
def test_what_is_right_for_this_deployment_passes(script: Script, expectations: Expectations, names: list[str]):
    report = ask(script, expectations)
    assert failures(report) == {}
    assert [check.name for check in report.checks] == names
    assert report.passed


def test_long_thinking_passes_the_chat_and_is_told():
    report = ask(Script(content=None, reasoning="Let me think about", finish_reason="length"), REAL)
    assert report.passed
    told = {check.name: check.detail for check in report.checks}
    assert told["chat"] == "only reasoning so far, cut by max_tokens before the answer"
    assert told["reasoning"] == "reasoning 'Let me think about', cut by max_tokens"
    assert told["streaming"] == "3 chunks: only reasoning so far, cut by max_tokens before the answer"


FAULTS = [
    pytest.param(
        Script(models=("tiny-awq", "lora")),
        REAL.model_copy(update={"rejects_unknown_model": False}),
        {
            "models": "the list holds tiny-awq, lora -> tiny in the list",
            **{
                name: f"http://PORT/v1{path}: HTTP 404: The model `tiny` does not exist. -> HTTP 200"
                for name, path in (
                    ("chat", CHAT),
                    ("streaming", CHAT),
                    ("completion", "/completions"),
                    ("tool call", CHAT),
                )
            },
        },
        id="another model is served",
    ),
    pytest.param(
        Script(models=(), unknown_model_status=200),
        REAL.model_copy(update={"rejects_unknown_model": False}),
        {"models": "the list holds no model -> tiny in the list"},
        id="model missing from the list",
    ),
    pytest.param(
        Script(content=f"<think>Hm.</think>\n{ANSWER}"),
        REHEARSAL,
        dict.fromkeys(
            ("reasoning", "streaming"),
            f"content holds think tags: '<think>Hm.</think>\\n{ANSWER}' -> "
            "reasoning split from content: start the server with the model's reasoning parser",
        ),
        id="think tags left in the content",
    ),
    pytest.param(
        Script(reasoning=None),
        REHEARSAL,
        {
            "reasoning": "no reasoning -> text in `reasoning` or `reasoning_content`",
            "streaming": "no reasoning in the stream -> text in `reasoning` or `reasoning_content`",
        },
        id="no reasoning",
    ),
    pytest.param(
        Script(content=None),
        REAL,
        {"reasoning": "all text is reasoning, content is empty -> the answer in content: is the parser right?"},
        id="the parser takes the answer for reasoning",
    ),
    pytest.param(
        Script(content=" ", reasoning=""),
        REAL.model_copy(update={"reasoning": False}),
        {
            "chat": "neither content nor reasoning -> text",
            "streaming": "chunks with text: 1 -> text in several chunks",
        },
        id="an empty answer",
    ),
    pytest.param(Script(role="user"), REHEARSAL, {"chat": "role 'user' -> role assistant"}, id="wrong role"),
    pytest.param(
        Script(finish_reason="abort"),
        REHEARSAL,
        dict.fromkeys(("chat", "streaming"), "finish_reason 'abort' -> finish_reason stop or length"),
        id="generation aborted",
    ),
    pytest.param(
        Script(tool_arguments='{"city": '),
        REHEARSAL,
        {
            "tool call": "arguments are not JSON: '{\"city\": ': Expecting value: line 1 column 10 (char 9)"
            " -> arguments as JSON text"
        },
        id="arguments not JSON",
    ),
    pytest.param(
        Script(tool_arguments='{"city": 75, "unit": "C"}'),
        REAL,
        {
            "tool call": 'arguments {"city": 75, "unit": "C"} violate the tool\'s schema: '
            "75 is not of type 'string'; "
            'arguments {"city": 75, "unit": "C"} violate the tool\'s schema: '
            "Additional properties are not allowed ('unit' was unexpected)"
            ' -> arguments like {"city": "Paris"}'
        },
        id="arguments against the schema, both faults told",
    ),
    pytest.param(
        Script(tool_arguments='{"city": "Lyon"}'),
        REHEARSAL,
        {"tool call": f'arguments \'{{"city": "Lyon"}}\': {OTHER_WEIGHTS} -> arguments \'{{"city": "Paris"}}\''},
        id="other arguments than the rehearsal model's",
    ),
    pytest.param(
        Script(tool_calls=0),
        REHEARSAL,
        {"tool call": "no tool call, content '' -> one call of get_weather"},
        id="no tool call",
    ),
    pytest.param(
        Script(tool_calls=2),
        REHEARSAL,
        {"tool call": "2 calls: get_weather, get_weather -> one call of get_weather"},
        id="two tool calls",
    ),
    pytest.param(
        Script(tool_calls=0, tool_finish_reason="length"),
        REHEARSAL,
        {"tool call": "max_tokens 64 ended before the call -> one call of get_weather: raise max_tokens"},
        id="tokens ended before the tool call",
    ),
    pytest.param(
        Script(stream_finishes=0),
        REHEARSAL,
        {"streaming": "0 finish reasons -> a stream that ends with one finish_reason"},
        id="stream without a finish",
    ),
    pytest.param(
        Script(stream_finishes=2, stream_usage=False),
        REHEARSAL,
        {
            "streaming": f"no usage counts; 2 finish reasons -> {USAGE}; a stream that ends with one finish_reason",
        },
        id="stream with two finishes and no usage, both faults told",
    ),
    pytest.param(
        Script(one_chunk=True),
        REHEARSAL,
        {"streaming": "chunks with text: 1 -> text in several chunks"},
        id="stream in one piece",
    ),
    pytest.param(
        Script(stream_error="EngineCore died"),
        REHEARSAL,
        {"streaming": f"http://PORT/v1{CHAT}: the stream broke off: EngineCore died -> a stream to its end"},
        id="error within the stream",
    ),
    pytest.param(
        Script(usage=(26, 12, 40)),
        REHEARSAL,
        {
            "chat": f"usage prompt 26, completion 12, total 40 -> {USAGE}",
            "streaming": f"usage prompt 26, completion 12, total 40 -> {USAGE}",
            "completion": f"usage prompt 26, completion 12, total 40 -> {USAGE.replace('64', '16')}",
        },
        id="usage inconsistent",
    ),
    pytest.param(
        Script(completion_text=" "), REHEARSAL, {"completion": "no text -> text"}, id="completion without text"
    ),
    pytest.param(
        Script(unknown_model_status=200),
        REHEARSAL,
        {"unknown model": "HTTP 200 for the model no-such-model -> HTTP 404 for the model no-such-model"},
        id="200 for an unknown model",
    ),
    pytest.param(
        Script(unknown_model_status=400),
        REHEARSAL,
        {"unknown model": "HTTP 400 for the model no-such-model -> HTTP 404 for the model no-such-model"},
        id="400 for an unknown model",
    ),
    pytest.param(
        Script(content="Hallo von den"),
        REHEARSAL,
        dict.fromkeys(("chat", "streaming"), f"answer 'Hallo von den': {OTHER_WEIGHTS} -> answer '{ANSWER}'"),
        id="wrong exact answer",
    ),
    pytest.param(
        Script(reasoning="Hm, hm."),
        REHEARSAL,
        dict.fromkeys(("reasoning", "streaming"), f"reasoning 'Hm, hm.': {OTHER_WEIGHTS} -> reasoning '{REASONING}'"),
        id="wrong exact reasoning",
    ),
    pytest.param(
        Script(content="Hello from", finish_reason="length"),
        REHEARSAL,
        dict.fromkeys(("chat", "streaming"), f"answer 'Hello from', cut by max_tokens -> answer '{ANSWER}'"),
        id="exact answer cut short is not blamed on the weights",
    ),
    pytest.param(
        Script(),
        REAL.model_copy(update={"sense": True}),
        {
            "sense": f"'\\n{ANSWER}': broken weights, a wrong data type or a broken rank give such text"
            " -> Paris in the answer"
        },
        id="fluent noise",
    ),
    pytest.param(
        Script(broken={"/completions": (500, '{"error": {"message": "EngineCore encountered an issue."}}')}),
        REHEARSAL,
        {"completion": "http://PORT/v1/completions: HTTP 500: EngineCore encountered an issue. -> HTTP 200"},
        id="500",
    ),
    pytest.param(
        Script(broken={"/completions": (503, "<html>\n<body>No server is available</body></html>")}),
        REHEARSAL,
        {
            "completion": "http://PORT/v1/completions: HTTP 503: "
            "<html> <body>No server is available</body></html> -> HTTP 200"
        },
        id="503 page of a gateway",
    ),
    pytest.param(
        Script(broken={"/completions": (200, "<html>Welcome</html>")}),
        REHEARSAL,
        {"completion": "an answer without choices: <html>Welcome</html> -> an answer with one choice"},
        id="200 with a page",
    ),
    pytest.param(
        Script(broken={"/completions": (200, '{"choices": [{"index": 0,')}),
        REHEARSAL,
        {
            "completion": "http://PORT/v1/completions: unreadable answer: JSONDecodeError: "
            "Expecting property name enclosed in double quotes: line 1 column 26 (char 25)"
            " -> an answer in the form of the OpenAI API"
        },
        id="200 with half an answer",
    ),
]


@pytest.mark.parametrize(("script", "expectations", "found"), FAULTS)
def test_a_fault_fails_its_checks_and_no_other(script: Script, expectations: Expectations, found: dict[str, str]):
    report = ask(script, expectations)
    assert failures(report) == found
    assert not report.passed


def test_without_a_chat_answer_the_reasoning_is_not_judged():
    report = ask(Script(broken={CHAT: (500, "{}")}))
    assert report.failed == ["chat", "streaming", "tool call", "unknown model"]
    assert report.not_run == ["reasoning"]
    assert report.checks[2].detail == "the chat request gave no answer"


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: the port refuses
        base_url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        report = run_checks(Target(base_url=base_url), REHEARSAL)
    assert report.failed == ["models"]
    assert report.checks[0].detail == f"{base_url}/models: [Errno 111] Connection refused"
    assert report.checks[0].expected == "a server that listens there: see its status and log"
    assert report.not_run == ["chat", "reasoning", "streaming", "completion", "tool call", "unknown model"]
    assert {check.detail for check in report.checks[1:]} == {"no request after the failure of models"}


@pytest.mark.parametrize(
    ("script", "failed"),
    [
        (Script(silent=("/models",)), "models"),
        (Script(silent=(CHAT,)), "chat"),
        (Script(dripping=(CHAT,)), "chat"),
    ],
    ids=["never answers", "lists models, never generates", "drips bytes for ever"],
)
def test_a_server_that_never_finishes_is_asked_once(script: Script, failed: str):
    started = time.monotonic()
    report = ask(script, request_timeout=0.5)
    assert time.monotonic() - started < 3
    path = "/models" if failed == "models" else CHAT
    assert failures(report) == {
        failed: f"http://PORT/v1{path}: no complete answer within 0.5 s"
        " -> an answer in time: read the server's log, or raise request_timeout"
    }
    assert len(report.not_run) == 7 - [check.name for check in report.checks].index(failed) - 1


def test_the_deadline_holds_whatever_one_request_may_take():
    started = time.monotonic()
    report = ask(Script(silent=(CHAT,)), deadline=0.5, request_timeout=60)
    assert time.monotonic() - started < 3
    assert re.search(r"no complete answer within 0\.\d s, which was left of the deadline", failures(report)["chat"])


def test_nothing_is_asked_after_the_deadline():
    report = ask(Script(), deadline=0)
    assert report.failed == []
    assert {check.detail for check in report.checks} == {"the deadline of 0 s had passed"}
    assert not report.passed


def test_a_wrong_key_ends_the_checks_and_is_never_shown():
    report = ask(Script(api_key="right"), api_key=SecretStr("sk-wrong"))
    assert failures(report) == {
        "models": "http://PORT/v1/models: HTTP 401: the API key was refused -> the key that the server was started with"
    }
    quoted = Script(broken={"/completions": (500, '{"error": {"message": "no route for Bearer sk-wrong"}}')})
    report = ask(quoted, api_key=SecretStr("sk-wrong"))
    assert failures(report) == {
        "completion": "http://PORT/v1/completions: HTTP 500: no route for Bearer ******** -> HTTP 200"
    }
    assert ask(Script(api_key="right"), api_key=SecretStr("right")).passed


def test_a_proxy_in_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(Script()).passed


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        ("http://h:8000", "'http://h:8000' does not end in /v1: write it as http://HOST:PORT/v1"),
        ("h:8000/v1", "'h:8000/v1' is not an http(s) URL: write it as http://HOST:PORT/v1"),
        ("http://u:secret@h/v1", "holds a user name or password: give the key as api_key"),
    ],
)
def test_a_wrong_base_url_is_refused(base_url: str, message: str):
    with pytest.raises(ValidationError) as error:
        Target(base_url=base_url)
    assert [item["msg"] for item in error.value.errors()] == [f"Value error, {message}"]


def test_equal_outcomes_are_equal_whatever_time_they_took():
    quick = ask(Script())
    slow = dataclasses.replace(quick, checks=tuple(dataclasses.replace(check, seconds=9.0) for check in quick.checks))
    assert slow == quick
    assert slow.to_dict() != quick.to_dict()


def test_the_report_as_json():
    report = ask(Script(completion_text=" "))
    data = json.loads(report.to_json())
    assert (data["passed"], data["model"], data["failed"], data["not_run"]) == (False, "tiny", ["completion"], [])
    assert data["endpoint"] == report.endpoint
    seconds = data["checks"][4].pop("seconds")
    assert 0 <= seconds < 10
    assert data["checks"][4] == {
        "name": "completion",
        "passed": False,
        "ran": True,
        "detail": "no text",
        "expected": "text",
        "basis": "protocol",
    }


TABLE = """\
+-------+---------+----------+-------+-------------------------------------------------------------+
|check  | result  | proof    |  time | seen                                                        |
+-------+---------+----------+-------+-------------------------------------------------------------+
|models | ok      | protocol | 0.0 s | [bold]tiny                                                  |
|chat   | FAILED  | exact    | 1.2 s | answer                                                      |
|       |         |          |       | 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx|
|       |         |          |       | xxxxxxxxxxx'                                                |
|       |         |          |       | expected: answer 'Hello'                                    |
|sense  | not run | sense    | 0.0 s | no request after the failure of chat                        |
+-------+---------+----------+-------+-------------------------------------------------------------+
1 failed, 1 not run, of 3 checks: tiny at http://h:1/v1
protocol: the answer has the form that the API promises; says nothing about the weights
exact: the fixed text of a rehearsal model: other weights or a broken rank give other text
sense: the model knows a fact: weights whole, every rank computing"""


def test_the_table_fits_and_names_the_kind_of_proof():
    checks = (
        CheckResult("models", True, "[bold]tiny", "protocol"),
        CheckResult("chat", False, f"answer '{'x' * 70}'", "exact", "answer 'Hello'", seconds=1.23),
        CheckResult("sense", False, "no request after the failure of chat", "sense", ran=False),
    )
    report = Report("http://h:1/v1", "tiny", checks)
    assert format_table(report) == TABLE
    assert "\x1b[31mFAILED" in format_table(report, terminal=True)
    assert format_line(checks[0]) == "ok      models (protocol, 0.0 s): [bold]tiny"
    assert len(format_line(checks[1])) == 100


def test_what_the_model_says_cannot_steer_the_terminal():
    report = ask(Script(content="\x1b[2Jgone"), REAL)
    assert report.checks[1].detail == r"'\x1b[2Jgone'"
    assert "\x1b" not in format_table(report)
