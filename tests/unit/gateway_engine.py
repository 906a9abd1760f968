"""A small HTTP server that behaves as an engine does towards a gateway: health, a stream, metrics, a hang.

It is no engine and proves nothing about one; HAProxy in front of it is the real one.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Engine(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.port = self.server_address[1]
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.tokens = 0
        self.running = 0
        self.hung = threading.Event()
        self.unhealthy = threading.Event()
        self.unknown: set[str] = set()
        self.broken_off = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        self.broken_off += 1


class _Handler(BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        engine = self.server
        if self.path in engine.unknown:
            self._send(404, "")
        elif self.path in ("/health", "/ready"):
            self._send(503 if engine.unhealthy.is_set() else 200, "")
        elif self.path == "/metrics":
            text = f'vllm:generation_tokens_total{{engine="0"}} {engine.tokens}\n'
            text += f'vllm:num_requests_running{{engine="0"}} {engine.running}\n'
            self._send(200, text)
        else:
            self._note()
            self._send(200, json.dumps({"engine": engine.port}))

    def do_POST(self) -> None:
        engine = self.server
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._note()
        with engine.lock:
            engine.running += 1
        try:
            end = time.monotonic() + (0 if asked.get("stream") else asked.get("pause", 0))
            while engine.hung.is_set() or time.monotonic() < end:
                if self._client_is_gone():
                    engine.broken_off += 1
                    return
                time.sleep(0.001)
            if asked.get("stream"):
                self._stream(asked["count"], asked["pause"])
            else:
                engine.tokens += 1
                self._send(200, json.dumps({"engine": engine.port, "choices": [{"message": {"content": "x"}}]}))
        finally:
            with engine.lock:
                engine.running -= 1

    def _client_is_gone(self) -> bool:
        """As engines do, which stop working then."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _stream(self, count: int, pause: float) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(count):
            self._chunk(f"data: {number}\n\n")
            self.server.tokens += 1
            time.sleep(pause)
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def _note(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers))

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def engines(count: int) -> Iterator[list[Engine]]:
    """So many of them, each on a free port of the loopback."""
    servers = [Engine() for _ in range(count)]
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.hung.clear()
            server.shutdown()
            server.server_close()
