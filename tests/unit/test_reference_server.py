"""The reference server's protocol, asked with the client that its users have; a stand-in takes the model's place."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import reference_server
from reference_generation import Ended
from reference_server import Refused, Server, read_wish, until

NAME = "tiny"
CHAIN = ["The ", "quick ", "brown ", "fox."]


class StandInGeneration:
    """Gives out the chain's pieces; a token each."""

    def __init__(self, limit: int, failure: Exception | None) -> None:
        self.limit, self.failure, self.made, self.cancelled = limit, failure, 0, False

    def __iter__(self) -> Iterator[str]:
        while self.made < min(len(CHAIN), self.limit) and not self.cancelled:
            self.made += 1
            yield CHAIN[self.made - 1]
            if self.failure:
                raise self.failure

    def cancel(self) -> None:
        self.cancelled = True

    def wait(self) -> None:
        pass

    @property
    def ended(self) -> Ended:
        return Ended("stop" if self.made == len(CHAIN) else "length", self.made)


class StandInModel:
    """A token for each word of a prompt."""

    context_length = 20

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.generations: list[StandInGeneration] = []

    def encode_chat(self, messages: list[Any], tools: list[Any] | None, options: dict[str, Any]) -> list[int]:
        if messages[0].get("role") == "nobody":
            raise ValueError("Unexpected role")
        return self.encode_text(" ".join(message["content"] for message in messages))

    def encode_text(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def generate(self, prompt: list[int], limit: int) -> StandInGeneration:
        self.generations.append(StandInGeneration(limit, self.failure))
        return self.generations[-1]


def address_of(server: Server) -> tuple[str, int]:
    return "127.0.0.1", server.server_address[1]


@pytest.fixture
def model() -> StandInModel:
    return StandInModel()


@pytest.fixture
def served(model: StandInModel) -> Iterator[Server]:
    server = Server("127.0.0.1", 0, NAME)
    thread = threading.Thread(target=server.serve, args=(model,))
    thread.start()
    for _ in range(500):  # until it listens
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(address_of(server), timeout=5):
            break
        time.sleep(0.01)
    yield server
    server.shutdown()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def client(served: Server) -> openai.OpenAI:
    url = f"http://127.0.0.1:{served.server_address[1]}/v1"
    return openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0, timeout=10)


QUESTION: list[Any] = [{"role": "user", "content": "Say it now"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=QUESTION)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "".join(CHAIN), "stop")
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)


def test_streamed_chat(client: openai.OpenAI) -> None:
    events = list(
        client.chat.completions.create(
            model=NAME, messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, usage = events
    assert [part.choices[0].delta.content for part in parts] == ["", *CHAIN, None]
    assert [part.choices[0].finish_reason for part in parts] == [None] * 5 + ["stop"]
    assert usage.usage
    assert (usage.choices, usage.usage.total_tokens) == ([], 7)
    assert len({event.id for event in events}) == 1


def test_completion_cut_by_its_limit(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="Say it", max_tokens=2)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("The quick ", "length")
    streamed = client.completions.create(model=NAME, prompt=[1, 2, 3], max_tokens=2, stream=True)
    assert [event.choices[0].text for event in streamed] == ["The ", "quick ", ""]


def test_a_stop_text_ends_the_generation(client: openai.OpenAI, model: StandInModel) -> None:
    answer = client.chat.completions.create(model=NAME, messages=QUESTION, stop=["k b", "never"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("The quic", "stop")
    assert (model.generations[0].cancelled, model.generations[0].made) == (True, 3)


def test_models_and_health(client: openai.OpenAI, served: Server) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    connection = http.client.HTTPConnection(*address_of(served), timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


REFUSALS = [
    pytest.param({"model": "other"}, 404, "the model 'other' does not exist; served is 'tiny'", id="model"),
    pytest.param([], 400, "the body is not a JSON object", id="list"),
    pytest.param({"messages": []}, 400, "messages is not a list of at least one message", id="empty"),
    pytest.param({"messages": "x"}, 400, "messages is not a list of at least one message", id="text"),
    pytest.param(
        {"messages": [{"role": "nobody", "content": ""}]}, 400,
        "the chat template refuses the messages: Unexpected role", id="template",
    ),
    pytest.param({"n": 2, "logprobs": True}, 400, "not offered by the reference server: n, logprobs", id="not-offered"),
    pytest.param({"tool_choice": "required"}, 400, "not offered by the reference server: tool_choice", id="choice"),
    pytest.param({"max_tokens": 18}, 400, "3 tokens of prompt and 18 of answer exceed the context of 20", id="long"),
    pytest.param({"max_tokens": -1}, 400, "max_tokens is -1, expected a whole number from 1", id="negative"),
    pytest.param({"max_tokens": "5"}, 400, "max_tokens is '5', expected a whole number from 1", id="number-as-text"),
    pytest.param({"max_tokens": True}, 400, "max_tokens is True, expected a whole number from 1", id="bool"),
    pytest.param({"stop": [1]}, 400, "stop is not a text or a list of texts", id="stop"),
    pytest.param({"stop": 5}, 400, "stop is not a text or a list of texts", id="stop-number"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "message"), REFUSALS)
def test_a_request_that_cannot_be_answered(change: Any, status: int, message: str, model: StandInModel) -> None:
    body = {"messages": QUESTION, **change} if isinstance(change, dict) else change
    with pytest.raises(Refused, match=f"^{re.escape(message)}$") as caught:
        read_wish(reference_server.CHAT, body, NAME, model)
    assert caught.value.status == status


@pytest.mark.parametrize("prompt", [None, {}, [], ["a", "b"], [1, "b"]])
def test_a_prompt_that_cannot_be_read(prompt: object, model: StandInModel) -> None:
    with pytest.raises(Refused, match=r"^prompt is not a text, a list of one text or a list of token ids$"):
        read_wish(reference_server.COMPLETION, {"prompt": prompt}, NAME, model)


def test_a_refusal_reaches_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        client.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="not offered"):
        client.chat.completions.create(model=NAME, messages=QUESTION, n=3)


def test_a_failure_of_the_model_is_told(client: openai.OpenAI, model: StandInModel) -> None:
    model.failure = RuntimeError("out of memory")
    with pytest.raises(openai.InternalServerError, match="RuntimeError: out of memory"):
        client.chat.completions.create(model=NAME, messages=QUESTION)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(client.chat.completions.create(model=NAME, messages=QUESTION, stream=True))
    model.failure = None
    assert client.chat.completions.create(model=NAME, messages=QUESTION).choices


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        pytest.param(b"POST /v1/completions HTTP/1.0\r\n\r\n", 411, id="no-length"),
        pytest.param(b"POST /v1/completions HTTP/1.0\r\nContent-Length: 99999999999\r\n\r\n", 413, id="huge"),
        pytest.param(b"POST /v1/completions HTTP/1.0\r\nContent-Length: 3\r\n\r\n{]x", 400, id="not-json"),
        pytest.param(b"POST /v1/nothing HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", 404, id="post-path"),
        pytest.param(b"GET /v1/nothing HTTP/1.0\r\n\r\n", 404, id="get-path"),
    ],
)
def test_http_that_cannot_be_answered(request_text: bytes, status: int, served: Server) -> None:
    with socket.create_connection(address_of(served), timeout=10) as connection:
        connection.sendall(request_text)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["code"] == status


def test_until_the_model_is_there_connections_are_refused() -> None:
    server = Server("127.0.0.1", 0, NAME)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address_of(server), timeout=5)
    server.server_close()


def test_a_taken_port_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["--model-path", "/nowhere", "--served-model-name", NAME, "--port", port, "--context-length", "9"]
        assert reference_server.main(arguments) == 1
    assert capsys.readouterr().err == f"127.0.0.1:{port} cannot be listened on: Address already in use\n"


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd"], (), ["ab", "cd"]),
        (["ab", "cd"], ("d",), ["ab", "c"]),
        (["ab", "cd"], ("bc",), ["a"]),
        (["ab", "c"], ("cx",), ["a", "b", "c"]),
        (["stop"], ("stop",), []),
        (["xab"], ("b", "a"), ["x"]),
        ([], ("a",), []),
    ],
)
def test_text_up_to_a_stop(pieces: list[str], stops: tuple[str, ...], expected: list[str]) -> None:
    assert list(until(pieces, stops)) == expected
