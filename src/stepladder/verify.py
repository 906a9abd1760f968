"""Checks of a deployed OpenAI-compatible endpoint, made with the client that its users have: the openai package.

A check proves one of three things, and says which (`CheckResult.basis`):

* exact: the text is the fixed one of a rehearsal model; other weights or a broken rank give other text;
* protocol: the answer has the form that the API promises; it says nothing about the weights;
* sense: the model knows a fact, so its weights are loaded whole and every rank computes with its own part.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from io import StringIO
from threading import Thread
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2
import jsonschema  # type: ignore[import-untyped]
import openai
from openai.types.shared_params import FunctionDefinition
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Basis = Literal["exact", "protocol", "sense"]

# A host that is off drops packets; no server that is up takes this long to accept a connection.
CONNECT_TIMEOUT = 10.0
TABLE_WIDTH = 100
QUOTE_LENGTH = 160

CHAT_PROMPT = "Reply with one short sentence."
COMPLETION_PROMPT = "The capital of France is"
COMPLETION_TOKENS = 16
TOOL_PROMPT = "What is the weather in Paris now? Use the tool."
SENSE_PROMPT = "What is the capital of France? Answer with its name only."
SENSE_ANSWER = "Paris"
UNKNOWN_MODEL = "no-such-model"
WEATHER_TOOL: FunctionDefinition = {
    "name": "get_weather",
    "description": "The weather in a city now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class ExactTexts(BaseModel):
    """The fixed answers of a rehearsal model; a field left out is not compared. Space at the ends does not count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    answer: str
    reasoning: str | None = None
    tool_reasoning: str | None = None
    tool_name: str | None = None
    tool_arguments: dict[str, Any] | None = None


class Expectations(BaseModel):
    """What a deployment is to answer.

    Args:
        served_name: the model's name in the API.
        reasoning: the server has a reasoning parser.
        tool_calls: the server has a tool call parser.
        exact: the fixed texts of a rehearsal model; None for a model whose text nobody can foretell.
        sense: ask for a fact, where there is no exact text; false for random weights.
        rejects_unknown_model: the server answers 404 for a name that it does not serve. vLLM does;
            SGLang answers as if the name were its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    served_name: str = Field(min_length=1)
    reasoning: bool
    tool_calls: bool
    exact: ExactTexts | None = None
    sense: bool = True
    rejects_unknown_model: bool = True


class Target(BaseModel):
    """Where to ask.

    Args:
        base_url: the endpoint, ending in /v1; without user name, password and query.
        api_key: the bearer token; never shown.
        request_timeout: seconds for one whole answer.
        max_tokens: tokens for one answer, reasoning included; with the prompt (up to 300 tokens) it must fit
            the server's context length.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str
    api_key: SecretStr = SecretStr("EMPTY")
    request_timeout: float = Field(default=120.0, gt=0)
    max_tokens: int = Field(default=512, gt=0)

    @field_validator("base_url")
    @classmethod
    def _plain_v1_url(cls, value: str) -> str:
        value = value.rstrip("/")
        parts = urlsplit(value)
        if "@" in parts.netloc:
            raise ValueError("holds a user name or password: give the key as api_key")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is not an http(s) URL: write it as http://HOST:PORT/v1")
        if not parts.path.endswith("/v1") or parts.query or parts.fragment:
            raise ValueError(f"{value!r} does not end in /v1: write it as http://HOST:PORT/v1")
        return value


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """One check's outcome; two are equal whatever time they took.

    Args:
        name: the check.
        passed: it was made and all was right.
        detail: what was seen, in short; for a check that was not made, why.
        basis: what kind of proof it is.
        expected: what should have been seen; only of a failed check.
        ran: false where the check was not made.
        seconds: time taken.
    """

    name: str
    passed: bool
    detail: str
    basis: Basis
    expected: str | None = None
    ran: bool = True
    seconds: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of one endpoint, in the order made."""

    endpoint: str
    model: str
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Every check was made and passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that were made and failed."""
        return [check.name for check in self.checks if check.ran and not check.passed]

    @property
    def not_run(self) -> list[str]:
        """Names of the checks that were not made."""
        return [check.name for check in self.checks if not check.ran]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "passed": self.passed,
            "endpoint": self.endpoint,
            "model": self.model,
            "failed": self.failed,
            "not_run": self.not_run,
            "checks": [{**dataclasses.asdict(check), "seconds": round(check.seconds, 3)} for check in self.checks],
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclasses.dataclass(frozen=True)
class _Fault:
    found: str
    expected: str


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What a check saw, and all that was wrong with it."""

    seen: str
    faults: list[_Fault] = dataclasses.field(default_factory=list)


class _CheckError(Exception):
    """The check cannot be finished; the others can."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.fault = _Fault(found, expected)


class _EndpointError(_CheckError):
    """No further request would be answered."""


class _NotRunError(Exception):
    """Another check's failure leaves nothing to judge."""


@dataclasses.dataclass
class _Session:
    client: openai.OpenAI
    target: Target
    expect: Expectations
    # The chat check's answer, which the reasoning check judges further: a model that thinks takes long for each.
    chat: _Answer | None = None


@dataclasses.dataclass(frozen=True)
class _Answer:
    content: str
    reasoning: str
    finish_reason: str | None

    @property
    def answer(self) -> str:
        """The content without reasoning that the server left in it."""
        return self.content.rpartition("</think>")[2].strip()

    @property
    def cut(self) -> str:
        return ", cut by max_tokens" if self.finish_reason == "length" else ""


@dataclasses.dataclass(frozen=True)
class _Check:
    name: str
    path: str
    make: Callable[[_Session], _Finding]
    basis: Basis


def run_checks(
    target: Target,
    expectations: Expectations,
    on_check: Callable[[CheckResult], None] | None = None,
    *,
    deadline: float = 600.0,
) -> Report:
    """Ask the endpoint and judge its answers; a failure of any kind is a result, not an exception.

    The first request that finds nobody, is refused for its key or gets no answer in time is the last one:
    the checks after it are reported as not run.

    Args:
        target: where to ask.
        expectations: what to expect.
        on_check: called with each result as it comes, in the caller's thread.
        deadline: seconds for all checks together.
    """
    ends = time.monotonic() + deadline
    # A proxy named in the environment is for the way out of the site, never for the way to its own servers.
    http_client = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(
        base_url=target.base_url,
        api_key=target.api_key.get_secret_value(),
        timeout=openai.Timeout(target.request_timeout, connect=min(CONNECT_TIMEOUT, target.request_timeout)),
        max_retries=0,
        http_client=http_client,
    )
    session = _Session(client, target, expectations)
    results: list[CheckResult] = []
    stopped = ""
    try:
        for check in _checks_for(expectations):
            if not stopped and time.monotonic() >= ends:
                stopped = f"the deadline of {deadline:g} s had passed"
            if stopped:
                result = CheckResult(check.name, False, stopped, check.basis, ran=False)
            else:
                result, fatal = _run_one(check, session, ends - time.monotonic())
                stopped = f"no request after the failure of {check.name}" if fatal else ""
            result = _without_key(result, target.api_key)
            results.append(result)
            if on_check is not None:
                on_check(result)
    finally:
        client.close()
    return Report(target.base_url, expectations.served_name, tuple(results))


def format_line(result: CheckResult) -> str:
    """One line about one check, for showing progress."""
    expected = f"; expected: {result.expected}" if result.expected else ""
    line = f"{_verdict(result):<7} {result.name} ({result.basis}, {result.seconds:.1f} s): {result.detail}{expected}"
    return line if len(line) <= TABLE_WIDTH else line[: TABLE_WIDTH - 3] + "..."


def format_table(report: Report, *, terminal: bool = False) -> str:
    """The report for a human, at most 100 columns wide.

    Args:
        report: what `run_checks` returned.
        terminal: true draws lines and colours; false is plain text.
    """
    text = StringIO()
    console = Console(
        file=text,
        width=TABLE_WIDTH,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD if terminal else box.ASCII2, pad_edge=False)
    for heading in ("check", "result", "proof"):
        table.add_column(heading, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("seen", overflow="fold")
    for check in report.checks:
        seen = check.detail if check.expected is None else f"{check.detail}\nexpected: {check.expected}"
        style = "green" if check.passed else "red" if check.ran else "yellow"
        table.add_row(
            Text(check.name), Text(_verdict(check), style), Text(check.basis), f"{check.seconds:.1f} s", Text(seen)
        )
    console.print(table)
    console.print(Text(_summary(report)))
    for basis in dict.fromkeys(check.basis for check in report.checks):
        console.print(Text(f"{basis}: {_PROOF[basis]}"))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


_PROOF: dict[Basis, str] = {
    "exact": "the fixed text of a rehearsal model: other weights or a broken rank give other text",
    "protocol": "the answer has the form that the API promises; says nothing about the weights",
    "sense": "the model knows a fact: weights whole, every rank computing",
}


def _summary(report: Report) -> str:
    if report.passed:
        return f"{len(report.checks)} of {len(report.checks)} checks passed: {report.model} at {report.endpoint}"
    counts = f"{len(report.failed)} failed, {len(report.not_run)} not run, of {len(report.checks)} checks"
    return f"{counts}: {report.model} at {report.endpoint}"


def _verdict(result: CheckResult) -> str:
    if result.passed:
        return "ok"
    return "FAILED" if result.ran else "not run"


def _checks_for(expect: Expectations) -> list[_Check]:
    exact = expect.exact
    text_basis: Basis = "exact" if exact else "protocol"
    reasoning_basis: Basis = "exact" if exact and exact.reasoning is not None else "protocol"
    tool_basis: Basis = "exact" if exact and exact.tool_arguments is not None else "protocol"
    checks = [
        _Check("models", "/models", _check_models, "protocol"),
        _Check("chat", "/chat/completions", _check_chat, text_basis),
    ]
    if expect.reasoning:
        checks.append(_Check("reasoning", "/chat/completions", _check_reasoning, reasoning_basis))
    checks += [
        _Check("streaming", "/chat/completions", _check_streaming, text_basis),
        _Check("completion", "/completions", _check_completion, "protocol"),
    ]
    if expect.tool_calls:
        checks.append(_Check("tool call", "/chat/completions", _check_tool_call, tool_basis))
    if expect.rejects_unknown_model:
        checks.append(_Check("unknown model", "/chat/completions", _check_unknown_model, "protocol"))
    if exact is None and expect.sense:
        checks.append(_Check("sense", "/chat/completions", _check_sense, "sense"))
    return checks


def _run_one(check: _Check, session: _Session, left: float) -> tuple[CheckResult, bool]:
    """One check within its time; the second value says that no further request makes sense."""
    started = time.monotonic()
    url = session.target.base_url + check.path
    limit = min(session.target.request_timeout, left)
    fatal = False
    try:
        finding = _within(limit, lambda: check.make(session))
    except _NotRunError as reason:
        return CheckResult(check.name, False, str(reason), check.basis, ran=False), False
    except Exception as error:  # what a broken server can provoke is not a closed list
        failure = _explain(error, url, limit, session.target.request_timeout)
        fatal = isinstance(failure, _EndpointError)
        finding = _Finding("", [failure.fault])
    seconds = time.monotonic() - started
    if not finding.faults:
        return CheckResult(check.name, True, finding.seen, check.basis, seconds=seconds), False
    found = "; ".join(fault.found for fault in finding.faults)
    expected = "; ".join(dict.fromkeys(fault.expected for fault in finding.faults))
    return CheckResult(check.name, False, found, check.basis, expected, seconds=seconds), fatal


def _within(seconds: float, work: Callable[[], _Finding]) -> _Finding:
    """The client limits the silence between two bytes; a server that drips would hold it for ever."""
    outcome: Future[_Finding] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    return outcome.result(timeout=seconds)


def _explain(error: Exception, url: str, limit: float, request_timeout: float) -> _CheckError:
    """The failure in a line that names the URL and the cause."""
    failure: _CheckError
    match error:
        case _CheckError():
            failure = error
        case openai.APITimeoutError() if isinstance(error.__cause__, httpx2.ConnectTimeout):
            waited = min(CONNECT_TIMEOUT, request_timeout)
            failure = _EndpointError(f"{url}: no connection within {waited:g} s", "a server that listens there")
        case openai.APITimeoutError() | TimeoutError():
            which = "" if limit == request_timeout else ", which was left of the deadline"
            failure = _EndpointError(
                f"{url}: no complete answer within {round(limit, 1):g} s{which}",
                "an answer in time: read the server's log, or raise request_timeout",
            )
        case openai.APIConnectionError():
            failure = _EndpointError(
                f"{url}: {_root_cause(error)}", "a server that listens there: see its status and log"
            )
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            failure = _EndpointError(
                f"{url}: HTTP {error.status_code}: the API key was refused", "the key that the server was started with"
            )
        case openai.APIStatusError():
            # The client puts "Error code: 500 - " before what a server says in JSON, and drops a gateway's page.
            said = error.message.partition(" - ")[2] or error.response.text
            failure = _CheckError(f"{url}: HTTP {error.status_code}: {_brief(said)}", "HTTP 200")
        case openai.APIError():
            failure = _CheckError(f"{url}: the stream broke off: {_brief(error.message)}", "a stream to its end")
        case _:
            failure = _CheckError(
                f"{url}: unreadable answer: {type(error).__name__}: {_brief(str(error))}",
                "an answer in the form of the OpenAI API",
            )
    return failure


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _brief(str(error)) or type(error).__name__


def _brief(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= QUOTE_LENGTH else flat[: QUOTE_LENGTH - 3] + "..."


def _quote(text: str) -> str:
    """The text so that every character can be seen, and no escape sequence reaches the terminal."""
    return repr(text if len(text) <= QUOTE_LENGTH else text[: QUOTE_LENGTH - 3] + "...")


def _without_key(result: CheckResult, api_key: SecretStr) -> CheckResult:
    """A server may quote the key in its refusal."""
    key = api_key.get_secret_value()
    if not key or key == "EMPTY" or key not in f"{result.detail}{result.expected}":
        return result
    expected = None if result.expected is None else result.expected.replace(key, "********")
    return dataclasses.replace(result, detail=result.detail.replace(key, "********"), expected=expected)


_ChoiceT_co = TypeVar("_ChoiceT_co", covariant=True)


class _WithChoices(Protocol[_ChoiceT_co]):
    @property
    def choices(self) -> Sequence[_ChoiceT_co]: ...


def _first_choice(answer: _WithChoices[_ChoiceT_co]) -> _ChoiceT_co:
    # The client hands over what came: a page of a gateway as str, an object with fields missing.
    choices = getattr(answer, "choices", None)
    if not choices:
        shown = answer.to_json(indent=None) if isinstance(answer, openai.BaseModel) else str(answer)
        raise _CheckError(f"an answer without choices: {_brief(shown)}", "an answer with one choice")
    return answer.choices[0]


def _reasoning_of(part: object) -> str:
    """vLLM calls the field `reasoning`, SGLang and older vLLM `reasoning_content`; the client has neither."""
    return getattr(part, "reasoning", None) or getattr(part, "reasoning_content", None) or ""


def _usage_faults(usage: object, max_tokens: int) -> list[_Fault]:
    expected = f"usage with prompt and completion above 0, completion up to {max_tokens}, total their sum"
    prompt, completion, total = (
        getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    if not (isinstance(prompt, int) and isinstance(completion, int) and isinstance(total, int)):
        return [_Fault("no usage counts", expected)]
    if prompt > 0 and 0 < completion <= max_tokens and total == prompt + completion:
        return []
    return [_Fault(f"usage prompt {prompt}, completion {completion}, total {total}", expected)]


def _finish_faults(finish_reason: str | None, allowed: tuple[str, ...] = ("stop", "length")) -> list[_Fault]:
    if finish_reason in allowed:
        return []
    return [_Fault(f"finish_reason {finish_reason!r}", f"finish_reason {' or '.join(allowed)}")]


def _text_fault(what: str, found: str, expected: str | None, cut: str = "") -> list[_Fault]:
    """Against a text that is known; None is not compared."""
    if expected is None or found.strip() == expected.strip():
        return []
    why = cut or ": other weights or a broken rank give other text"
    return [_Fault(f"{what} {_quote(found.strip())}{why}", f"{what} {_quote(expected.strip())}")]


def _leaked_tags(content: str) -> list[_Fault]:
    if "<think>" not in content and "</think>" not in content:
        return []
    return [
        _Fault(
            f"content holds think tags: {_quote(content)}",
            "reasoning split from content: start the server with the model's reasoning parser",
        )
    ]


def _seen_text(answer: _Answer) -> str:
    if answer.answer:
        return f"{_quote(answer.answer)}{answer.cut}"
    if answer.finish_reason == "length":
        return "only reasoning so far, cut by max_tokens before the answer"
    return f"only reasoning: {_quote(answer.reasoning)}"


def _ask(session: _Session, model: str, prompt: str) -> tuple[_Answer, str | None, object]:
    """One chat question without a stream: the answer, the role and the usage."""
    response = session.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        seed=0,
        max_tokens=session.target.max_tokens,
    )
    choice = _first_choice(response)
    message = choice.message
    answer = _Answer(message.content or "", _reasoning_of(message), choice.finish_reason)
    return answer, message.role, response.usage


def _check_models(session: _Session) -> _Finding:
    listing = session.client.models.list()
    names = [model.id for model in listing.data]
    seen = ", ".join(names) or "no model"
    if session.expect.served_name in names:
        return _Finding(seen)
    return _Finding(seen, [_Fault(f"the list holds {seen}", f"{session.expect.served_name} in the list")])


def _check_chat(session: _Session) -> _Finding:
    answer, role, usage = _ask(session, session.expect.served_name, CHAT_PROMPT)
    session.chat = answer
    faults = _finish_faults(answer.finish_reason) + _usage_faults(usage, session.target.max_tokens)
    if role != "assistant":
        faults.append(_Fault(f"role {role!r}", "role assistant"))
    exact = session.expect.exact
    if exact:
        faults += _text_fault("answer", answer.answer, exact.answer, answer.cut)
    elif not answer.content.strip() and not answer.reasoning.strip():
        faults.append(_Fault("neither content nor reasoning", "text"))
    return _Finding(_seen_text(answer), faults)


def _check_reasoning(session: _Session) -> _Finding:
    answer = session.chat
    if answer is None:
        raise _NotRunError("the chat request gave no answer")
    faults = _leaked_tags(answer.content)
    exact = session.expect.exact
    if not answer.reasoning.strip():
        faults.append(_Fault("no reasoning", "text in `reasoning` or `reasoning_content`"))
    elif exact:
        faults += _text_fault("reasoning", answer.reasoning, exact.reasoning, answer.cut)
    if answer.finish_reason == "stop" and not answer.content.strip():
        faults.append(_Fault("all text is reasoning, content is empty", "the answer in content: is the parser right?"))
    return _Finding(f"reasoning {_quote(answer.reasoning.strip())}{answer.cut}", faults)


def _check_streaming(session: _Session) -> _Finding:
    stream = session.client.chat.completions.create(
        model=session.expect.served_name,
        messages=[{"role": "user", "content": CHAT_PROMPT}],
        temperature=0,
        seed=0,
        max_tokens=session.target.max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    content = reasoning = ""
    text_chunks = 0
    finish_reasons: list[str] = []
    usage: object = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            part, thought = choice.delta.content or "", _reasoning_of(choice.delta)
            content += part
            reasoning += thought
            text_chunks += bool(part or thought)
            if choice.finish_reason:
                finish_reasons.append(choice.finish_reason)

    answer = _Answer(content, reasoning, finish_reasons[0] if finish_reasons else None)
    faults = _usage_faults(usage, session.target.max_tokens)
    if len(finish_reasons) == 1:
        faults += _finish_faults(finish_reasons[0])
    else:
        faults.append(_Fault(f"{len(finish_reasons)} finish reasons", "a stream that ends with one finish_reason"))
    if text_chunks < 2:
        faults.append(_Fault(f"chunks with text: {text_chunks}", "text in several chunks"))
    if session.expect.reasoning:
        faults += _leaked_tags(content)
    exact = session.expect.exact
    if exact:
        faults += _text_fault("answer", answer.answer, exact.answer, answer.cut)
        if session.expect.reasoning and reasoning.strip():
            faults += _text_fault("reasoning", reasoning, exact.reasoning, answer.cut)
    if session.expect.reasoning and not reasoning.strip():
        faults.append(_Fault("no reasoning in the stream", "text in `reasoning` or `reasoning_content`"))
    return _Finding(f"{text_chunks} chunks: {_seen_text(answer)}", faults)


def _check_completion(session: _Session) -> _Finding:
    max_tokens = min(COMPLETION_TOKENS, session.target.max_tokens)
    response = session.client.completions.create(
        model=session.expect.served_name,
        prompt=COMPLETION_PROMPT,
        temperature=0,
        seed=0,
        max_tokens=max_tokens,
    )
    choice = _first_choice(response)
    text = choice.text or ""
    faults = _finish_faults(choice.finish_reason) + _usage_faults(response.usage, max_tokens)
    if not text.strip():
        faults.append(_Fault("no text", "text"))
    return _Finding(_quote(text), faults)


def _check_tool_call(session: _Session) -> _Finding:
    response = session.client.chat.completions.create(
        model=session.expect.served_name,
        messages=[{"role": "user", "content": TOOL_PROMPT}],
        tools=[{"type": "function", "function": WEATHER_TOOL}],
        tool_choice={"type": "function", "function": {"name": WEATHER_TOOL["name"]}},
        temperature=0,
        seed=0,
        max_tokens=session.target.max_tokens,
    )
    choice = _first_choice(response)
    calls = [call for call in choice.message.tool_calls or [] if call.type == "function"]
    expected_call = f"one call of {WEATHER_TOOL['name']}"
    if not calls:
        if choice.finish_reason == "length":
            raise _CheckError(
                f"max_tokens {session.target.max_tokens} ended before the call", f"{expected_call}: raise max_tokens"
            )
        raise _CheckError(f"no tool call, content {_quote(choice.message.content or '')}", expected_call)
    function = calls[0].function
    # For a named choice vLLM says stop, other servers tool_calls.
    faults = _finish_faults(choice.finish_reason, ("stop", "tool_calls"))
    if len(calls) != 1 or function.name != WEATHER_TOOL["name"]:
        names = ", ".join(call.function.name for call in calls)
        faults.append(_Fault(f"{len(calls)} calls: {names}", expected_call))
    arguments, argument_faults = _judge_arguments(function.arguments)
    faults += argument_faults
    exact = session.expect.exact
    if exact:
        faults += _text_fault("tool", function.name, exact.tool_name)
        if session.expect.reasoning:
            faults += _text_fault("tool reasoning", _reasoning_of(choice.message), exact.tool_reasoning)
        if not argument_faults and exact.tool_arguments is not None:
            faults += _text_fault("arguments", _canonical(arguments), _canonical(exact.tool_arguments))
    return _Finding(f"{function.name} {_brief(function.arguments)}, finish_reason {choice.finish_reason}", faults)


def _judge_arguments(text: str) -> tuple[Any, list[_Fault]]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        return None, [_Fault(f"arguments are not JSON: {_quote(text)}: {error}", "arguments as JSON text")]
    validator = jsonschema.Draft202012Validator(WEATHER_TOOL["parameters"])
    wrong = sorted(error.message for error in validator.iter_errors(arguments))
    return arguments, [
        _Fault(f"arguments {_brief(text)} violate the tool's schema: {message}", 'arguments like {"city": "Paris"}')
        for message in wrong
    ]


def _canonical(arguments: object) -> str:
    return json.dumps(arguments, sort_keys=True, ensure_ascii=False)


def _check_unknown_model(session: _Session) -> _Finding:
    expected = f"HTTP 404 for the model {UNKNOWN_MODEL}"
    try:
        _ask(session, UNKNOWN_MODEL, CHAT_PROMPT)
    except openai.NotFoundError:
        return _Finding("HTTP 404")
    except openai.BadRequestError as error:
        raise _CheckError(f"HTTP {error.status_code} for the model {UNKNOWN_MODEL}", expected) from error
    raise _CheckError(f"HTTP 200 for the model {UNKNOWN_MODEL}", expected)


def _check_sense(session: _Session) -> _Finding:
    answer, _, _ = _ask(session, session.expect.served_name, SENSE_PROMPT)
    if SENSE_ANSWER.casefold() in f"{answer.reasoning}\n{answer.content}".casefold():
        return _Finding(_seen_text(answer))
    why = answer.cut or ": broken weights, a wrong data type or a broken rank give such text"
    return _Finding("", [_Fault(f"{_quote(answer.content or answer.reasoning)}{why}", f"{SENSE_ANSWER} in the answer")])
