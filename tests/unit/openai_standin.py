"""A stand-in for an inference server: scripted answers in the shapes recorded from vLLM 0.32.0, right or wrong.

It is no engine and proves nothing about one; it only lets a test say which wrong answer the client meets.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REASONING = "The user wants a smoke test reply."
ANSWER = "Hello from the tiny CPU model!"
TOOL_REASONING = "I should call get_weather now."
# Seconds that a path keeps silent or drips: a client that waits for it makes its test red, not stuck.
LONG = 6.0


@dataclasses.dataclass(frozen=True)
class Script:
    """What to answer; the defaults are right for a model named `tiny`."""

    models: tuple[str, ...] = ("tiny",)
    role: str = "assistant"
    content: str | None = f"\n{ANSWER}"
    reasoning: str | None = REASONING
    reasoning_field: str = "reasoning"
    finish_reason: str = "stop"
    completion_text: str = " ro The Wh"
    tool_calls: int = 1
    tool_arguments: str = '{"city": "Paris"}'
    tool_finish_reason: str = "stop"
    usage: tuple[int, int, int] = (26, 12, 38)
    stream_usage: bool = True
    stream_finishes: int = 1
    stream_error: str | None = None
    one_chunk: bool = False
    unknown_model_status: int = 404
    api_key: str | None = None
    # path -> (status, body) instead of an answer
    broken: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    # paths that take the request and never answer, and paths that send a byte now and then
    silent: tuple[str, ...] = ()
    dripping: tuple[str, ...] = ()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.requests: list[tuple[str, dict]] = []
        self.closing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, asked: dict) -> None:
        script = self.server.script
        path = self.path.removeprefix("/v1")
        self.server.requests.append((path, asked))
        if path in script.silent:
            self.server.closing.wait(LONG)
            return
        if path in script.dripping:
            self._drip()
            return
        if path in script.broken:
            self._send(*script.broken[path])
            return
        if script.api_key and self.headers["authorization"] != f"Bearer {script.api_key}":
            self._send(401, json.dumps({"error": f"not your key: {self.headers['authorization']}"}))
            return
        model = asked.get("model")
        if path == "/models":
            self._send(200, json.dumps({"object": "list", "data": [self._model(name) for name in script.models]}))
        elif model not in script.models and script.unknown_model_status != 200:
            error = {"message": f"The model `{model}` does not exist.", "type": "NotFoundError", "param": "model"}
            self._send(script.unknown_model_status, json.dumps({"error": error}))
        elif path == "/completions":
            choice = {"index": 0, "text": script.completion_text, "finish_reason": "length"}
            self._send(200, json.dumps(self._body("text_completion", [choice])))
        elif asked.get("stream"):
            self._stream(usage=asked.get("stream_options") == {"include_usage": True})
        else:
            self._send(200, json.dumps(self._body("chat.completion", [self._choice("tools" in asked)])))

    def _model(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}

    def _body(self, kind: str, choices: list[dict]) -> dict:
        return {"id": "x", "object": kind, "created": 0, "model": "tiny", "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict:
        return dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), self.server.script.usage, strict=True))

    def _choice(self, tools: bool) -> dict:
        script = self.server.script
        if not tools:
            message = {"role": script.role, "content": script.content, script.reasoning_field: script.reasoning}
            return {"index": 0, "message": message, "finish_reason": script.finish_reason}
        function = {"name": "get_weather", "arguments": script.tool_arguments}
        calls = [{"id": str(number), "type": "function", "function": function} for number in range(script.tool_calls)]
        message = {
            "role": "assistant",
            "content": "",
            script.reasoning_field: TOOL_REASONING,
            "tool_calls": calls or None,
        }
        return {"index": 0, "message": message, "finish_reason": script.tool_finish_reason}

    def _stream(self, *, usage: bool) -> None:
        script = self.server.script
        deltas: list[dict] = [{"role": "assistant", "content": ""}]
        for field, text in ((script.reasoning_field, script.reasoning), ("content", script.content)):
            deltas += [{field: part} for part in (text or "").partition(" ") if part]
        if script.one_chunk:
            deltas = [{script.reasoning_field: script.reasoning, "content": script.content}]
        events: list[dict] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        if script.stream_error:
            events.append({"error": {"message": script.stream_error, "type": "InternalServerError", "code": 500}})
        finish = {"index": 0, "delta": {}, "finish_reason": script.finish_reason}
        events += [{"choices": [finish]}] * script.stream_finishes
        if usage and script.stream_usage:
            events.append({"choices": [], "usage": self._usage()})
        head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "tiny"}
        lines = [f"data: {json.dumps(head | event)}\n\n" for event in events]
        self._send(200, "".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")

    def _send(self, status: int, text: str, kind: str = "application/json") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if text.startswith("<") else kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "100000")
        self.end_headers()
        for _ in range(int(LONG / 0.05)):
            self.wfile.write(b" ")
            if self.server.closing.wait(0.05):
                break


class Standin:
    """A running stand-in: where it is, and what it was asked."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"

    @property
    def requests(self) -> list[tuple[str, dict]]:
        return self._server.requests


@contextmanager
def serving(script: Script) -> Iterator[Standin]:
    """Serve the script on a free port of the loopback."""
    server = _Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Standin(server)
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
