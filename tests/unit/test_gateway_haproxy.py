"""The gateway with the real HAProxy on loopback, in front of small HTTP servers: what a client and an on-call see."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import haproxy, serving_state
from gateway_certificate import make_certificate
from gateway_engine import Engine, engines
from waiting import until

from stepladder import diagnosis, status
from stepladder.gateway import agent_settings, configuration
from stepladder.gateway_secrets import certificate_pem, keys_map

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
KEYS = {"alice": "a" * 32, "bob": "b" * 32}

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="haproxy is not installed: apt-get install -y haproxy"),
    pytest.mark.timeout(60),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gateway:
    """HAProxy as the role runs it, and what a client and the admin do with it."""

    def __init__(self, directory: Path, servers: list[Engine], **more: Any) -> None:
        self.directory, self.servers = directory, servers
        self.port, self.metrics_port, self.agent_port = free_port(), free_port(), free_port()
        self.more, self.certificate, self.keys = more, "", KEYS
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"

    def plan(self) -> dict[str, Any]:
        return {
            "nodes": [{"name": "gw", "base_url": f"http://127.0.0.1:{self.port}/v1"}],
            "servers": [
                {"replica": number, "node": "n", "address": "127.0.0.1", "port": server.port}
                for number, server in enumerate(self.servers)
            ],
            "bind_address": "127.0.0.1", "port": self.port, "tls": bool(self.certificate), "keys": True,
            "metrics_address": "127.0.0.1", "metrics_port": self.metrics_port, "agent_port": self.agent_port,
            "paths": ["GET /v1/models", "POST /v1/chat/completions"], "check_path": "/health",
            "max_body_bytes": 1000, "answer_seconds": 60, "stall_seconds": 100, "affinity_header": None, **self.more,
        }  # fmt: skip

    def write(self) -> haproxy.Wanted:
        text = configuration(self.plan(), "test", str(self.directory), os.getuid() == 0)
        listed = keys_map("\n".join(f"{name} {key}" for name, key in self.keys.items()), "keys")
        wanted = haproxy.wanted_files(text, listed, self.certificate)
        haproxy.apply(str(self.directory), wanted, str(PROGRAM))
        return wanted

    def start(self, up: int | None = None) -> None:
        self.write()
        arguments = ["-W", "-S", f"{self.directory}/master.sock,mode,600", "-f"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(PROGRAM), *arguments, f"{self.directory}/current/haproxy.cfg"], stdout=log, stderr=log
            )
        wanted = len(self.servers) if up is None else up
        until(lambda: wanted < 0 or len(self.up()) == wanted, 10)

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self.process
        self.process.send_signal(number)
        self.process.wait(10)

    def up(self) -> list[str]:
        try:
            return [server.name for server in self.master.servers().values() if haproxy.in_rotation(server)]
        except haproxy.GatewayError:
            return []

    @property
    def master(self) -> haproxy.Master:
        return haproxy.Master(str(self.directory))

    def connect(self) -> http.client.HTTPConnection:
        if not self.certificate:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        context = ssl.create_default_context(cadata=self.certificate)
        return http.client.HTTPSConnection("localhost", self.port, timeout=90, context=context)

    def ask(
        self, path: str = "/v1/chat/completions", body: Any = None, key: str | None = KEYS["alice"], **headers: str
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        connection = self.connect()
        head = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            head["Authorization"] = f"Bearer {key}"
        method = "POST" if body is not None else "GET"
        connection.request(method, path, None if body is None else json.dumps(body), head)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text, answer

    def stream(self, count: int, pause: float) -> tuple[list[str], list[float]]:
        """Lines of a stream and when each came."""
        connection = self.connect()
        body = json.dumps({"stream": True, "count": count, "pause": pause})
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEYS['alice']}"})
        answer = connection.getresponse()
        assert answer.status == 200
        lines, times = [], []
        while line := answer.readline():
            if line.strip():
                lines.append(line.decode().strip())
                times.append(time.monotonic())
        connection.close()
        return lines, times


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Engine]]:
    with engines(2) as servers:
        yield servers


@pytest.fixture
def gateway(tmp_path: Path, two: list[Engine]) -> Iterator[Gateway]:
    made = Gateway(tmp_path, two)
    made.start()
    yield made
    made.stop()


REFUSALS = [
    pytest.param({"body": {}, "key": None}, 401, "Give a valid API key", id="no-key"),
    pytest.param({"body": {}, "key": "a" * 31}, 401, "Give a valid API key", id="almost-a-key"),
    pytest.param({"body": {}, "key": hashlib.sha256(b"a" * 32).hexdigest()}, 401, "valid API key", id="a-keys-hash"),
    pytest.param({"path": "/tokenize", "body": {}}, 404, "does not serve this path", id="dangerous-path"),
    pytest.param({"path": "/v1/../tokenize", "body": {}}, 404, "does not serve this path", id="dots"),
    pytest.param({"path": "//v1/chat/completions", "body": {}}, 404, "does not serve", id="slashes"),
    pytest.param({"path": "/v1/chat/completions"}, 404, "path and method", id="method"),
    pytest.param({"path": "/metrics"}, 404, "path and method", id="engines-metrics"),
    pytest.param({"body": {"x": "y" * 2000}}, 413, "longer than the gateway takes", id="long-body"),
]


def test_what_a_client_may_and_may_not(gateway: Gateway, two: list[Engine]) -> None:
    for case in REFUSALS:
        wish, status, message = case.values
        found, body, answer = gateway.ask(**wish)
        assert (found, message in body["error"]["message"]) == (status, True), (case.id, found, body)
        assert answer.getheader("content-type") == "application/json"
    assert not two[0].seen
    assert not two[1].seen
    for key in KEYS.values():
        assert gateway.ask(body={}, key=key)[0] == 200
    assert gateway.ask("/v1/models", x_request_id="mine")[0] == 200
    assert gateway.ask("/health", key=None)[0] == 200
    passed = [entry for server in two for entry in server.seen]
    assert {path for _, path, _ in passed} == {"/v1/chat/completions", "/v1/models"}
    assert all("authorization" not in headers for _, _, headers in passed)
    assert all(len(headers["x-request-id"]) == 36 for _, _, headers in passed)
    log = gateway.log.read_text()
    assert " alice POST /v1/chat/completions 200 " in log
    assert not any(key in log for key in KEYS.values())
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as raw:
        head = f"Host: x\r\nAuthorization: Bearer {KEYS['bob']}\r\nTransfer-Encoding: chunked"
        raw.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 411 ")


def test_tokens_come_one_by_one_and_silence_breaks_nothing(gateway: Gateway) -> None:
    lines, times = gateway.stream(4, 0.3)
    assert lines == ["data: 0", "data: 1", "data: 2", "data: 3", "data: [DONE]"]
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps[:-1]) > 0.2, "chunks were held back and came together"


@pytest.mark.parametrize(
    "body", [{"stream": True, "count": 200, "pause": 0.05}, {"pause": 20}], ids=["stream", "whole"]
)
def test_a_client_that_goes_away_ends_its_request_at_the_engine(
    gateway: Gateway, two: list[Engine], body: dict[str, Any]
) -> None:
    connection = gateway.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEYS['bob']}"})
    until(lambda: sum(server.running for server in two) == 1, 5)
    connection.close()
    until(lambda: sum(server.running for server in two) == 0, 5)


def test_keys_are_rotated_and_nothing_fails_meanwhile(gateway: Gateway) -> None:
    load = Load(gateway)
    gateway.keys = {"alice": KEYS["alice"], "carol": "c" * 32}
    gateway.master.reload(gateway.write().generation, 10)
    until(lambda: gateway.ask(body={}, key="c" * 32)[0] == 200, 5)
    assert gateway.ask(body={}, key=KEYS["bob"])[0] == 401
    assert load.end() == []


class Load:
    """Clients that ask without a pause, each request on a connection of its own, and streams; what failed."""

    def __init__(self, gateway: Gateway, clients: int = 4) -> None:
        self.gateway, self.over = gateway, threading.Event()
        self.failures: list[str] = []
        self.requests = 0
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(clients)]
        for thread in self.threads:
            thread.start()
        until(lambda: self.requests > 10, 10)

    def run(self, number: int) -> None:
        while not self.over.is_set():
            try:
                if number == 0:
                    lines, _ = self.gateway.stream(10, 0.02)
                    failed = "" if lines[-1:] == ["data: [DONE]"] else f"a stream ended with {lines[-1:]}"
                else:
                    status, body, _ = self.gateway.ask(body={"pause": 0.002})
                    failed = "" if status == 200 else f"{status} {body}"
            except (OSError, http.client.HTTPException) as error:
                failed = repr(error)
            self.requests += 1
            if failed:
                self.failures.append(failed)

    def end(self) -> list[str]:
        self.over.set()
        for thread in self.threads:
            thread.join()
        return self.failures


def test_no_request_fails_over_ten_reloads_under_load_and_streams_survive(gateway: Gateway) -> None:
    kept: list[list[str]] = []
    long = threading.Thread(target=lambda: kept.append(gateway.stream(60, 0.05)[0]))
    long.start()
    load = Load(gateway)
    for number in range(10):
        gateway.more["max_body_bytes"] = 1001 + number
        gateway.master.reload(gateway.write().generation, 10)
    failures = load.end()
    long.join()
    assert failures == []
    assert load.requests > 100
    assert kept[0] == [*(f"data: {number}" for number in range(60)), "data: [DONE]"]
    until(lambda: len(gateway.master.workers()) == 1, 10)


def test_a_configuration_that_haproxy_refuses_changes_nothing(gateway: Gateway) -> None:
    before = haproxy.observe(str(gateway.directory))
    gateway.more["affinity_header"] = "a b"
    with pytest.raises(haproxy.GatewayError, match=r"(?s)does not take the configuration, nothing was changed:.*ALERT"):
        gateway.write()
    assert haproxy.observe(str(gateway.directory)) == before
    assert gateway.ask(body={})[0] == 200


def drain(gateway: Gateway, replica: int, state: str = "drained", *, check: bool = False, **more: Any) -> Any:
    """Take it out of rotation, or put it back."""
    arguments = {"directory": str(gateway.directory), "deployment": "test", "replica": replica, "state": state, **more}
    return module("gateway_replica", arguments | {"_ansible_check_mode": check})


def module(name: str, arguments: dict[str, Any]) -> Any:
    """A module, as Ansible runs it; its answer."""
    done = subprocess.run(
        [sys.executable, "-m", f"ansible_collections.stepladder.core.plugins.modules.{name}"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_drain_waits_for_streams_of_before_a_reload_and_outlives_reload_and_crash(
    gateway: Gateway, two: list[Engine]
) -> None:
    # Long enough to outlast a reload on a slow machine.
    streams = [threading.Thread(target=gateway.stream, args=(120, 0.04)) for _ in range(4)]
    for thread in streams:
        thread.start()
    until(lambda: all(server.running == 2 for server in two), 5)
    gateway.more["max_body_bytes"] = 900
    gateway.master.reload(gateway.write().generation, 10)

    late = drain(gateway, 1, deadline=0)
    assert late["failed"]
    assert "Replica 1 still has 2 request(s) in flight after 0 s. It gets no new ones." in late["msg"]
    assert drain(gateway, 1, check=True)["changed"], "there is still something to wait for"
    again = drain(gateway, 1, deadline=20)
    assert (again["changed"], again["in_flight"]) == (False, 0)
    assert two[1].running == 0
    for thread in streams:
        thread.join()

    def only_the_first_is_asked() -> None:
        before = len(two[1].seen)
        assert {gateway.ask(body={})[1]["engine"] for _ in range(6)} == {two[0].port}
        assert len(two[1].seen) == before

    only_the_first_is_asked()
    gateway.more["max_body_bytes"] = 901
    gateway.master.reload(gateway.write().generation, 10)
    only_the_first_is_asked()
    gateway.stop(signal.SIGKILL)
    until(lambda: not port_open(gateway.port), 5)
    gateway.start(up=1)  # as the process manager does
    assert gateway.master.servers()["replica-1"].status.startswith("DRAIN")

    assert drain(gateway, 1, "ready", deadline=10)["changed"]
    assert not drain(gateway, 1, "ready", deadline=10)["changed"]
    assert {gateway.ask(body={})[1]["engine"] for _ in range(8)} == {server.port for server in two}
    gateway.stop(signal.SIGKILL)
    gateway.start()  # with both


def test_a_drained_replica_that_moves_stays_drained_at_its_new_place(gateway: Gateway, two: list[Engine]) -> None:
    assert drain(gateway, 1, deadline=5)["changed"]
    gateway.servers = two[::-1]
    gateway.master.reload(gateway.write().generation, 10)
    found = {name: (server.status[:5], server.address) for name, server in gateway.master.servers().items()}
    assert found["replica-1"] == ("DRAIN", f"127.0.0.1:{two[0].port}")
    assert {gateway.ask(body={})[1]["engine"] for _ in range(4)} == {two[1].port}


def port_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_tls_and_a_new_certificate_without_a_break(tmp_path: Path, two: list[Engine]) -> None:
    gateway = Gateway(tmp_path, two)
    first, second = (certificate_pem(*make_certificate())[0] for _ in range(2))
    gateway.certificate = first
    gateway.start()
    try:
        assert gateway.ask(body={})[0] == 200
        stream = threading.Thread(target=gateway.stream, args=(20, 0.05))
        stream.start()
        gateway.certificate = second
        gateway.master.reload(gateway.write().generation, 10)
        assert gateway.ask(body={})[0] == 200
        stream.join()
        files = [tmp_path / "current/tls.pem", tmp_path / "current/keys.map", tmp_path / "master.sock"]
        assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o400", "0o400", "0o600"]
    finally:
        gateway.stop()


def test_an_engine_that_crashes_fails_what_it_had_and_nothing_more(gateway: Gateway, two: list[Engine]) -> None:
    load = Load(gateway)
    two[0].shutdown()
    two[0].server_close()
    until(lambda: gateway.up() == ["replica-1"], 20)
    assert len(load.end()) <= len(load.threads), load.failures
    # HAProxy answers 502 when it finds out while it reads, and closes without a word when it does while it sends.
    broken_off = ("502 ", "a stream ended", "IncompleteRead", "RemoteDisconnected", "ConnectionResetError")
    assert all(failure.startswith(broken_off) for failure in load.failures), load.failures
    assert gateway.ask(body={})[1]["engine"] == two[1].port
    two[1].unhealthy.set()
    until(lambda: gateway.up() == [], 10)
    status, body, answer = gateway.ask(body={})
    assert (status, answer.getheader("retry-after")) == (503, "5")
    assert "No replica takes requests now" in body["error"]["message"]
    assert gateway.ask("/health", key=None)[0] == 503


def test_metrics_are_on_their_own_port(gateway: Gateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.metrics_port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert 'haproxy_server_status{proxy="engines",server="replica-1",state="UP"} 1' in text


def test_a_header_keeps_a_session_on_one_replica_and_others_where_they_were(tmp_path: Path, two: list[Engine]) -> None:
    gateway = Gateway(tmp_path, two, affinity_header="x-session")
    gateway.start()
    try:

        def places() -> dict[str, int]:
            return {f"s{n}": gateway.ask(body={}, x_session=f"s{n}")[1]["engine"] for n in range(20)}

        def moved() -> list[str]:
            return [name for name, place in places().items() if place != before[name]]

        before = places()
        assert len(set(before.values())) == 2
        # A replica that has half as much again as its share hands a session on: one at most here, one by one.
        assert len(moved()) <= 1
        drain(gateway, 1, deadline=5)
        assert set(places().values()) == {two[0].port}
        drain(gateway, 1, "ready", deadline=5)
        assert len(moved()) <= 1
    finally:
        gateway.stop()


DRAIN_REFUSALS = [
    pytest.param(
        {"replica": 5}, "There is no replica 5: the gateway in front of test has 0, 1. Give -e replica=NUMBER."
    ),
    pytest.param({"replica": 0, "weight": 0, "state": "ready"}, "weight is 0: give percent, 1 to 100"),
    pytest.param({"replica": 0, "directory": "/nowhere"}, "There is no gateway for test here. Run the verb 'gateway'"),
]


def test_what_drain_refuses(gateway: Gateway) -> None:
    for case in DRAIN_REFUSALS:
        more, message = case.values
        answer = drain(gateway, **{"state": "drained", **more}) if "directory" not in more else elsewhere(gateway)
        assert answer["failed"]
        assert message in answer["msg"]
    assert drain(gateway, 0, deadline=5)["changed"]
    last = drain(gateway, 1, deadline=5)
    assert (
        "Replica 1 was not drained, no other replica takes requests (replica 0: drained): clients would get 503. Bring "
        in last["msg"]
    )
    assert drain(gateway, 1, deadline=5, allow_last=True)["changed"]
    assert drain(gateway, 0, "ready", weight=20, deadline=5)["servers"][0]["weight"] == 20
    gateway.stop()
    assert "admin socket" in drain(gateway, 0)["msg"]
    gateway.start(up=1)


def elsewhere(gateway: Gateway) -> Any:
    moved = Gateway(gateway.directory / "nowhere", [])
    return drain(moved, 0)


def test_it_is_not_called_healthy_before_it_was_asked(tmp_path: Path) -> None:
    gone = Engine()
    gone.server_close()
    gateway = Gateway(tmp_path, [gone])
    gateway.start(up=-1)
    try:
        until((tmp_path / "master.sock").exists, 10)
        assert module("gateway", {"state": "loaded", "directory": str(tmp_path)})["taking_requests"] == 0
    finally:
        gateway.stop()


def start_agent(gateway: Gateway, stall_seconds: float) -> subprocess.Popen[bytes]:
    """The agent as the role installs it."""
    folder = gateway.directory / "agent"
    folder.mkdir()
    for file in ("roles/gateway/files/gateway_agent.py", "plugins/module_utils/engine_progress.py"):
        shutil.copy(REPOSITORY / file, folder)
    settings = json.loads(agent_settings(gateway.plan(), "tiny")) | {"stall_seconds": stall_seconds}
    (folder / "settings.json").write_text(json.dumps(settings))
    return subprocess.Popen([sys.executable, str(folder / "gateway_agent.py"), str(folder / "settings.json")])


def test_the_agent_takes_out_an_engine_that_hangs_with_green_health(gateway: Gateway, two: list[Engine]) -> None:
    agent = start_agent(gateway, stall_seconds=2)
    try:
        until(lambda: gateway.master.servers()["replica-1"].agent, 10)
        two[1].hung.set()
        until(lambda: gateway.up() == ["replica-0"], 20)
        assert "no token for" in gateway.master.servers()["replica-1"].agent
        assert {gateway.ask(body={})[1]["engine"] for _ in range(6)} == {two[0].port}
        gateway.more["max_body_bytes"] = 900  # a new process knows it from its first request on
        gateway.master.reload(gateway.write().generation, 10)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert gateway.ask(body={})[1]["engine"] == two[0].port
        two[1].hung.clear()
        until(lambda: len(gateway.up()) == 2, 20)
        agent.kill()
        agent.wait()
        time.sleep(3)
        assert len(gateway.up()) == 2, "without the agent HAProxy keeps to its own checks"
    finally:
        agent.kill()
        agent.wait()


def test_a_deploy_is_told_which_replica_the_gateway_does_not_reach(gateway: Gateway, two: list[Engine]) -> None:
    load = {"state": "loaded", "directory": str(gateway.directory), "require_replicas": True}
    assert module("gateway", load | {"deadline": 5})["taking_requests"] == 2
    two[1].unhealthy.set()
    until(lambda: gateway.up() == ["replica-0"], 10)
    answer = module("gateway", load | {"deadline": 1})
    wanted = f"The gateway gives no requests to replica 1 at 127.0.0.1:{two[1].port}: DOWN (L7STS Service Unavailable)."
    assert wanted in answer["msg"]
    drain(gateway, 1, deadline=5)
    answer = module("gateway", load | {"deadline": 5})
    assert answer.get("taking_requests") == 1, answer
    assert not module("gateway", load | {"require_replicas": False})["changed"]


def test_a_reload_that_fails_leaves_the_old_one_at_work_and_the_next_one_mends_it(gateway: Gateway) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        own, gateway.metrics_port = gateway.metrics_port, taken.getsockname()[1]
        with pytest.raises(
            haproxy.GatewayError, match="did not take up its new configuration and goes on with the old"
        ):
            gateway.master.reload(gateway.write().generation, 2)
        assert gateway.ask(body={})[0] == 200
    gateway.metrics_port = own
    gateway.master.reload(gateway.write().generation, 10)
    assert gateway.ask(body={})[0] == 200


def lines_of_status(gateway: Gateway) -> list[str]:
    told = status.front({"gateway": serving_state.gateway(str(gateway.directory))})
    return status.gateway_lines("gw", told)


AGENT_SILENT = "  WARNING: its agent does not answer ({}): a replica that hangs stays in rotation"


class Another(socketserver.BaseRequestHandler):
    """What took the agent's port after a reboot."""

    def handle(self) -> None:
        self.request.recv(100)
        self.request.sendall(b"SSH-2.0-x\r\n")


def diagnosis_of(gateway: Gateway) -> list[tuple[str, str, str]]:
    kept = {"plan_id": "a", "endpoints": [{"node": "n0", "replica": 0, "base_url": "http://198.18.0.2:8000/v1"}]}
    ready = {"name": "vllm-0", "phase": "ready", "detail": "", "since": 60.0}
    front = serving_state.gateway(str(gateway.directory))
    nodes = [diagnosis.Node("n0", rows=status.rows("n0", kept, [ready])), diagnosis.Node("gw", gateway=front)]
    return [(each.layer, each.title, each.line) for each in diagnosis.diagnose(nodes).findings]


def test_status_tells_that_the_agent_is_dead_or_another_has_its_port(gateway: Gateway) -> None:
    refused = AGENT_SILENT.format("L4CON Connection refused")
    until(lambda: lines_of_status(gateway)[1:2] == [refused], 10)
    agent = start_agent(gateway, stall_seconds=100)
    until(lambda: len(lines_of_status(gateway)) == 3, 10)
    agent.kill()
    agent.wait()
    until(lambda: lines_of_status(gateway)[1:2] == [refused], 10)
    assert diagnosis_of(gateway) == [("serve", "The gateway's agent does not answer", "L4CON Connection refused")]
    with socketserver.ThreadingTCPServer(("127.0.0.1", gateway.agent_port), Another, bind_and_activate=False) as other:
        other.allow_reuse_address = True
        other.server_bind()
        other.server_activate()
        threading.Thread(target=other.serve_forever, daemon=True).start()
        wanted = AGENT_SILENT.format("CHECKED agent reports an error : SSH-2.0-x")
        until(lambda: lines_of_status(gateway)[1:2] == [wanted], 10)
        other.shutdown()


def test_status_shows_who_is_out_and_who_drained_it(gateway: Gateway, two: list[Engine]) -> None:
    def lines() -> list[str]:
        return [line for line in lines_of_status(gateway) if "its agent" not in line]

    assert lines() == [
        "Gateway on gw: 2 of 2 replicas in rotation",
        "  replica 0: in rotation, 0 request(s)",
        "  replica 1: in rotation, 0 request(s)",
    ]
    drain(gateway, 1, deadline=5, who="ann", origin="ops1")
    assert re.fullmatch(r"  replica 1: out, drained by ann from ops1 since \S+Z, 0 request\(s\) left", lines()[2])
    drain(gateway, 1, "ready", deadline=5)
    assert lines()[2] == "  replica 1: in rotation, 0 request(s)"
    two[0].unhealthy.set()
    until(lambda: "OUT, DOWN" in lines()[1], 15)
    gateway.stop()
    assert re.fullmatch(r"Gateway on gw: DOWN, The gateway's admin socket .* does not answer .*", lines()[0])
    gateway.start(up=1)


def test_one_that_runs_moves_to_another_port_and_one_that_does_not_is_left_alone(
    gateway: Gateway, two: list[Engine]
) -> None:
    """What has to be so before anybody waits for the new port."""
    stream: list[list[str]] = []
    client = threading.Thread(target=lambda: stream.append(gateway.stream(40, 0.05)[0]))
    client.start()
    until(lambda: sum(server.running for server in two) == 1, 5)
    old, gateway.port = gateway.port, free_port()
    gateway.write()
    load = {"state": "loaded", "directory": str(gateway.directory), "if_running": True}
    answers = [module("gateway", load | {"_ansible_check_mode": check}) for check in (True, False, True, False)]
    assert [answer.get("changed") for answer in answers] == [True, True, False, False], answers
    assert gateway.ask(body={})[0] == 200
    client.join()
    assert stream[0][-1] == "data: [DONE]"
    until(lambda: not port_open(old), 10)
    gateway.stop()
    for directory in (gateway.directory, gateway.directory / "never"):
        answer = module("gateway", load | {"directory": str(directory)})
        assert (answer.get("failed"), answer["changed"]) == (None, False), answer
    gateway.start()


DAEMON = ["sh", "-c", 'exec "$@" -D > /dev/null 2>&1', "sh"]
# What keeps the processes, in short: it starts what does not run, and waits for the port as the role `service` does.
KEEPER = {
    "manager": [
        {"ansible.builtin.setup": {"gather_subset": ["!all", "!min", "user"]}},
        {"ansible.builtin.set_fact": {"service_manager_used": "systemd", "service_launcher": []}},
    ],
    "start": [
        {
            "ansible.builtin.command": {
                "argv": "{{ daemon + __gateway_slice.node.processes[1].argv }}",
                "creates": "{{ __gateway_directory }}/master.sock",
            }
        },
        {
            "ansible.builtin.wait_for": {"port": "{{ gateway_plan.gateway.port }}", "timeout": 5},
            "when": "not ansible_check_mode",
        },
    ],
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_role_brings_a_gateway_to_a_new_port(tmp_path: Path, two: list[Engine]) -> None:
    """The role itself, from its first installation on; only the process manager is a stand-in."""
    gateway = Gateway(tmp_path / "gateway/test", two)
    (tmp_path / "roles/service/tasks").mkdir(parents=True)
    for name, tasks in KEEPER.items():
        (tmp_path / f"roles/service/tasks/{name}.yml").write_text(json.dumps(tasks))
    common = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "test"}
    host = {
        **common, "stepladder_state_directory": str(tmp_path), "deployment_hosts": ["gw"], "gateway_hosts": ["gw"],
        "gateway_program": PROGRAM, "daemon": DAEMON,
    }  # fmt: skip
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"hosts": {"gw": host}}}))
    play = {"hosts": "gw", "gather_facts": False, "roles": ["gateway"]}
    (tmp_path / "play.yml").write_text(json.dumps([play]))

    def run(*more: str) -> None:
        plan = {
            "gateway": {**gateway.plan(), "keys": False}, "deployment": {"served_name": "tiny"},
            "nodes": [{"tools": {"path": "/none"}}],
        }  # fmt: skip
        done = subprocess.run(
            [
                *(sys.executable, "-m", "ansible", "playbook", "-i", "inventory.yml", "play.yml"),
                *("-e", json.dumps({"deployment_plan": plan}), *more),
            ],
            cwd=tmp_path,
            env={
                **os.environ, "ANSIBLE_CONFIG": f"{REPOSITORY}/ansible.cfg",
                "ANSIBLE_ROLES_PATH": f"{tmp_path}/roles:{REPOSITORY}/roles",
            },
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run("--check")
        assert not gateway.directory.exists()
        run()
        assert gateway.ask(body={}, key=None)[0] == 200
        old, gateway.port = gateway.port, free_port()
        run()
        assert gateway.ask(body={}, key=None)[0] == 200
        until(lambda: not port_open(old), 10)
    finally:
        if (gateway.directory / "master.sock").exists():
            master = re.search(r"(?m)^(\d+)\s+master", gateway.master.ask("show proc"))
            assert master
            os.kill(int(master[1]), signal.SIGTERM)
