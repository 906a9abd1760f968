#!/usr/bin/env python3
"""Serve a model with Transformers in one process, for reference answers: greedy, one request at a time.

    reference_server.py --model-path DIR --served-model-name NAME --host 127.0.0.1 --port 8000 --context-length 4096

It answers what OpenAI's protocol calls for on /v1/models, /v1/chat/completions and /v1/completions, streamed or not,
with the model's own chat template; /health answers once the model is loaded. temperature, top_p and seed change
nothing: the likeliest token is always taken. Reasoning and tool calls stay in the text. Fields that would change an
answer and are not offered are refused.

Transformers' own server cannot be used here: in 5.23.0 it looks an architecture up by its name alone and so does not
find Step-3.5's, lists what is in a download cache instead of what it serves, and knows no served name.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import socketserver
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from reference_generation import Generation, Model

LONGEST_BODY_BYTES = 64 << 20
IDLE_SECONDS = 60
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
# What would change an answer and is not offered, with the values that ask for nothing.
NOT_OFFERED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}


class Refused(Exception):  # noqa: N818 - an answer of the protocol, not a fault of this program
    """A request that is answered by an error: HTTP status and what is wrong with it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# ---- the protocol ----------------------------------------------------------------------------------------------------


class Wish(NamedTuple):
    """A request that has been read: what to ask the model, and the form of the answer."""

    chat: bool
    prompt: list[int]
    limit: int
    stops: tuple[str, ...]
    stream: bool
    usage_in_stream: bool


def read_wish(path: str, body: object, served_name: str, model: Model) -> Wish:
    """Read a request's body.

    Raises:
        Refused: with what cannot be used in it.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    if body.get("model", served_name) != served_name:
        raise Refused(404, f"the model {body['model']!r} does not exist; served is {served_name!r}")
    unknown = [name for name, harmless in NOT_OFFERED.items() if body.get(name) not in harmless]
    if unknown:
        raise Refused(400, f"not offered by the reference server: {', '.join(unknown)}")
    chat = path == CHAT
    prompt = _chat_prompt(body, model) if chat else _text_prompt(body.get("prompt"), model)
    room = model.context_length - len(prompt)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or max(1, room)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise Refused(400, f"max_tokens is {limit!r}, expected a whole number from 1")
    if limit > room:
        raise Refused(
            400, f"{len(prompt)} tokens of prompt and {limit} of answer exceed the context of {model.context_length}"
        )
    stops = body.get("stop") or ()
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop is not a text or a list of texts")
    options = body.get("stream_options") or {}
    in_stream = isinstance(options, dict) and bool(options.get("include_usage"))
    return Wish(chat, prompt, limit, tuple(stops), bool(body.get("stream")), in_stream)


def _chat_prompt(body: dict[str, Any], model: Model) -> list[int]:
    messages, tools = body.get("messages"), body.get("tools")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "messages is not a list of at least one message")
    try:
        return model.encode_chat(messages, tools or None, dict(body.get("chat_template_kwargs") or {}))
    except Refused:
        raise
    except Exception as error:  # a template raises what it likes
        raise Refused(400, f"the chat template refuses the messages: {error}") from error


def _text_prompt(prompt: object, model: Model) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return model.encode_text(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    raise Refused(400, "prompt is not a text, a list of one text or a list of token ids")


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of the stop texts, which is left out; what may begin one is held back."""
    held = ""
    longest = max((len(stop) for stop in stops), default=1)
    for piece in pieces:
        held += piece
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        ready = len(held) - (longest - 1)
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


class Answer:
    """One answer in OpenAI's words: whole, or as the events of a stream."""

    def __init__(self, wish: Wish, served_name: str, generation: Generation) -> None:
        """Take a generation, which is run through once by `document` or by `events`."""
        self.wish = wish
        self.generation = generation
        self.stopped = False
        self.common = {
            "id": f"{'chatcmpl' if wish.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served_name,
        }

    def document(self) -> dict[str, Any]:
        """The answer as one document."""
        text = "".join(self._texts())
        part: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.wish.chat else {"text": text}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": self._reason}
        kind = "chat.completion" if self.wish.chat else "text_completion"
        return {**self.common, "object": kind, "choices": [choice], "usage": self._usage()}

    def events(self) -> Iterator[str]:
        """The answer as the lines of server-sent events."""
        if self.wish.chat:
            yield self._event({"delta": {"role": "assistant", "content": ""}}, None)
        for text in self._texts():
            yield self._event({"delta": {"content": text}} if self.wish.chat else {"text": text}, None)
        yield self._event({"delta": {}} if self.wish.chat else {"text": ""}, self._reason)
        if self.wish.usage_in_stream:
            yield self._line({"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _texts(self) -> Iterator[str]:
        taken = 0
        seen = 0

        def counted() -> Iterator[str]:
            nonlocal seen
            for piece in self.generation:
                seen += len(piece)
                yield piece

        for text in until(counted(), self.wish.stops):
            taken += len(text)
            yield text
        self.stopped = taken < seen  # a stop text was found: what follows it is not wanted
        if self.stopped:
            self.generation.cancel()
            for _rest in self.generation:
                pass

    @property
    def _reason(self) -> str:
        return "stop" if self.stopped else self.generation.ended.reason

    def _usage(self) -> dict[str, int]:
        prompt, completion = len(self.wish.prompt), self.generation.ended.tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _event(self, part: dict[str, Any], reason: str | None) -> str:
        return self._line({"choices": [{"index": 0, **part, "logprobs": None, "finish_reason": reason}]})

    def _line(self, more: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.wish.chat else "text_completion"
        return f"data: {json.dumps({**self.common, 'object': kind, **more}, ensure_ascii=False)}\n\n"


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Takes its address at once and listens once a model is given: until then connections are refused."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, served_name: str) -> None:
        """Take the address.

        Raises:
            OSError: it is taken, or not one of this machine's.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler, bind_and_activate=False)
        self.server_bind()
        self.served_name = served_name
        self.started = int(time.time())
        self.model: Model | None = None
        self.one_at_a_time = threading.Lock()

    def serve(self, model: Model) -> None:
        """Listen and answer until `shutdown` is called; running requests end first."""
        self.model = model
        self.server_activate()
        self.serve_forever(poll_interval=0.2)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection with one request, as HTTP/1.0 has it: a stream ends with the connection."""

    server: Server
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """Health and the list of models."""
        path = self.path.partition("?")[0]
        if path == "/health":
            self._send(200, {"status": "ok"})
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [self._card()]})
        else:
            self._refuse(Refused(404, f"there is no {path}"))

    def do_POST(self) -> None:
        """Chat and text completions."""
        path = self.path.partition("?")[0]
        model = self.server.model
        if path not in (CHAT, COMPLETION) or model is None:
            self._refuse(Refused(404, f"there is no {path}"))
            return
        try:
            wish = read_wish(path, self._body(), self.server.served_name, model)
        except Refused as refusal:
            self._refuse(refusal)
            return
        with self.server.one_at_a_time:
            self._answer(Answer(wish, self.server.served_name, model.generate(wish.prompt, wish.limit)))

    def _answer(self, answer: Answer) -> None:
        begun = False
        try:
            if not answer.wish.stream:
                self._send(200, answer.document())
                return
            with closing(answer.events()) as events:
                first = next(events)
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Cache-Control", "no-cache")
                self.end_headers()
                begun = True
                self.wfile.write(first.encode())
                for event in events:
                    self.wfile.write(event.encode())
        except OSError as error:
            self.log_error("the client has gone: %s", error)
        except Exception as error:
            self.log_error("%s: %s", type(error).__name__, error)
            if begun:  # the status is out: an event says what became of the rest
                message = {"error": {"message": str(error), "type": type(error).__name__}}
                self.wfile.write(f"data: {json.dumps(message)}\n\n".encode())
            else:
                self._refuse(Refused(500, f"{type(error).__name__}: {error}"))
        finally:
            answer.generation.cancel()  # nothing where it is through; else the next one would share the machine
            answer.generation.wait()

    def _card(self) -> dict[str, Any]:
        card = {"id": self.server.served_name, "object": "model", "created": self.server.started}
        return {**card, "owned_by": "transformers", "max_model_len": getattr(self.server.model, "context_length", None)}

    def _body(self) -> object:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(411, "the request has no Content-Length") from None
        if not 0 <= length <= LONGEST_BODY_BYTES:
            raise Refused(413, f"the body has {length:,} bytes, at most {LONGEST_BODY_BYTES:,} are taken")
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from error

    def _refuse(self, refusal: Refused) -> None:
        kind = "NotFoundError" if refusal.status == 404 else "BadRequestError"
        self._send(refusal.status, {"error": {"message": str(refusal), "type": kind, "code": refusal.status}})

    def _send(self, status: int, document: Mapping[str, Any]) -> None:
        content = json.dumps(document, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log what is asked of the model; whoever asks for its health does so every few seconds."""
        if self.path != "/health":
            super().log_request(code, size)


def main(arguments: Sequence[str], load: Callable[[argparse.Namespace], Model] | None = None) -> int:
    """Load and serve until SIGTERM or SIGINT; 1 where the address cannot be had."""
    options = _parser().parse_args(arguments)
    try:
        server = Server(options.host, options.port, options.served_model_name)
    except OSError as error:
        print(f"{options.host}:{options.port} cannot be listened on: {error.strerror}", file=sys.stderr)
        return 1

    def end(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()

    started = time.monotonic()
    model = (load or _load)(options)
    print(f"loaded {options.model_path} in {time.monotonic() - started:.1f} s", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print(f"serving {options.served_model_name} at http://{options.host}:{options.port}", flush=True)
    server.serve(model)
    return 0


def _load(options: argparse.Namespace) -> Model:
    from reference_model import Loaded  # noqa: PLC0415 - takes seconds, and the address is to be had first

    loaded: Model = Loaded(
        options.model_path,
        options.context_length,
        trust_remote_code=options.trust_remote_code,
        device_map=options.device_map,
    )
    return loaded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Reference answers of a model, over HTTP.", allow_abbrev=False)
    parser.add_argument("--model-path", required=True, help="folder of the checkpoint")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--context-length", type=int, required=True, help="tokens of prompt and answer together")
    parser.add_argument("--device-map", help="'auto' cuts the model by layers over all GPUs; default: the CPU")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code where needed")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
