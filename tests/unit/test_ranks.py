"""What the nodes of a replica tell each other, and ask of each other, while they start."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_state, one_token, peer_network, ray_cluster
from ansible_collections.stepladder.core.plugins.plugin_utils.ranks import Together

WANTED = [{"node": "a", "address": "198.18.0.1"}, {"node": "b", "address": "198.18.0.2"}]


def ray_node(address: str, alive: bool = True, gpus: float = 8) -> dict[str, Any]:
    return {"address": address, "alive": alive, "gpus": gpus}


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ([ray_node("198.18.0.1"), ray_node("198.18.0.2")], []),
        ([ray_node("198.18.0.1")], ["b (198.18.0.2) has not joined"]),
        ([ray_node("198.18.0.1"), ray_node("198.18.0.2", alive=False)], ["b (198.18.0.2) has left the cluster"]),
        # A node that left and came back is told twice.
        ([ray_node("198.18.0.1"), ray_node("198.18.0.2", alive=False), ray_node("198.18.0.2")], []),
        ([ray_node("198.18.0.1", gpus=7), ray_node("198.18.0.2")], ["a (198.18.0.1) brings 7 of 8 GPUs"]),
        ([], ["a (198.18.0.1) has not joined", "b (198.18.0.2) has not joined"]),
    ],
)
def test_what_each_planned_node_lacks(found: list[dict[str, Any]], missing: list[str]) -> None:
    assert ray_cluster.missing(found, WANTED, 8) == missing


def test_the_wait_for_a_cluster_ends_when_it_is_complete_or_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "ASK_EVERY", 0)
    answers = iter([[], [ray_node("198.18.0.1")], [ray_node("198.18.0.1"), ray_node("198.18.0.2")]])
    said: list[str] = []
    assert ray_cluster.wait(lambda: next(answers), WANTED, 8, 60, lambda text: bool(said.append(text))) == []
    assert said[-1] == "waiting for the cluster: b (198.18.0.2) has not joined"

    def dead() -> list[dict[str, Any]]:
        raise ray_cluster.AskError("Ray at 198.18.0.1:6379 did not answer within 60 s")

    assert ray_cluster.wait(dead, WANTED, 8, 0, lambda _: True) == ["Ray at 198.18.0.1:6379 did not answer within 60 s"]


def test_ray_that_fails_is_quoted(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho 'AuthenticationError: wrong token' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ray_cluster.AskError, match=r"^Ray at 198\.18\.0\.1:6379: AuthenticationError: wrong token$"):
        ray_cluster.ask(str(program), "198.18.0.1:6379", {})


def test_the_first_of_a_replica_that_fails_is_the_one_to_blame(tmp_path: Path) -> None:
    first, second = (Together(str(tmp_path), ["a", "b"], host) for host in ("a", "b"))
    other = Together(str(tmp_path), ["c", "d"], "c")
    alone = Together(str(tmp_path), [], "a")
    assert (first.to_blame(), second.to_blame()) == ("", "")
    second.fail()
    first.fail()
    alone.fail()
    assert (first.to_blame(), second.to_blame(), other.to_blame(), alone.to_blame()) == ("b", "", "", "")


@contextmanager
def engine(complete: Callable[[], tuple[int, dict[str, Any]]], tokens: Callable[[], int]) -> Iterator[dict[str, Any]]:
    """An endpoint that answers as told; yields the health of its process."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.answer(200, f'# HELP x\nvllm:generation_tokens_total{{model="m"}} {tokens()}.0\n')
            else:
                self.answer(200, "")

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            assert json.loads(self.rfile.read(length)) == {
                "model": "m",
                "prompt": "a",
                "max_tokens": 1,
                "temperature": 0,
            }
            status, body = complete()
            self.answer(status, json.dumps(body))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {"kind": "vllm", "host": "127.0.0.1", "port": server.server_port, "model": "m"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_one_token_is_enough() -> None:
    with engine(lambda: (200, {"choices": [{}]}), lambda: 0) as health:
        assert one_token.ask(health, 5) == ""


def test_an_engine_that_lost_a_rank_answers_an_error() -> None:
    with engine(lambda: (500, {}), lambda: 7) as health:
        assert one_token.ask(health, 5) == "answered 500 when asked for a token"


@pytest.mark.parametrize(("moves", "fault"), [(0, "gave no token: no answer within 1 s"), (5, "")])
def test_an_engine_that_hangs_is_told_from_one_that_is_busy(moves: int, fault: str) -> None:
    hanging, counted = threading.Event(), iter(range(100, 200, moves) if moves else [100] * 9)

    def complete() -> tuple[int, dict[str, Any]]:
        hanging.wait(10)
        return 200, {}

    with engine(complete, lambda: next(counted)) as health:
        try:
            assert one_token.ask(health, 1).endswith(fault)
            assert bool(fault) == bool(one_token.ask(health, 1))
        finally:
            hanging.set()


def test_a_follower_sees_whether_its_head_is_ready() -> None:
    with engine(lambda: (200, {}), lambda: 0) as health:
        ready = engine_state.head_state({**health, "path": "/health"}, 5)
        assert (ready["phase"], ready["detail"]) == ("ready", f"127.0.0.1:{health['port']} answers 200")
    gone = engine_state.head_state({**health, "path": "/health"}, 5)
    assert (gone["phase"], gone["detail"]) == ("loading", f"127.0.0.1:{health['port']} refuses connections")


def test_addresses_that_answer_or_refuse_are_reached_and_own_ones_are_no_peers() -> None:
    own = [{"name": "lo", "address": "127.0.0.1"}]
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        found = peer_network.reach({"b": ["127.0.0.2", "127.0.0.3", "127.0.0.1"]}, own, port, 2)
    assert found == {"b": {"127.0.0.2": "lo", "127.0.0.3": "lo", "127.0.0.1": None}}


def test_interfaces_are_listed_without_loopback() -> None:
    found = peer_network.interfaces()
    assert not [one for one in found if one["address"].startswith("127.")]
    assert all(set(one) == {"name", "address", "network", "speed_mbit"} for one in found)


def test_a_node_that_waits_for_another_that_works_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ["a", "b"]
    waits, works = Together(str(tmp_path), ranks, "a"), Together(str(tmp_path), ranks, "b")
    alone = Together(str(tmp_path), [], "c")
    mark = next(tmp_path.glob("worked-*"))
    os.utime(mark, (0, 0))
    later = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert [round(each.idle(), -2) for each in (waits, works, alone)] == [1000, 1000, 1000]
    works.worked()
    assert [round(each.idle()) for each in (waits, works)] == [0, 0]
    assert round(alone.idle(), -2) == 1000
