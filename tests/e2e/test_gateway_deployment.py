"""Two real replicas on the CPU behind the real gateway: keys, drain under load, a hang with green health, its restart.

One deployment serves all tests of this file, in the order in which they stand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PORT, HUB_PORT, GATEWAY_PORT, METRICS_PORT, AGENT_PORT = 18600, 18990, 18680, 18681, 18682
KEY = "k" * 40
MODEL = "tiny-step3p5"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="haproxy is not installed"
    ),
]

HOSTS = {
    "all": {
        "hosts": {
            "localhost": {
                "ansible_connection": "local",
                "ansible_python_interpreter": "{{ ansible_playbook_python }}",
                "deployment_address": "127.0.0.1",
                "deployment_gpus": 2,
            }
        },
        "children": {group: {"hosts": {"localhost": None}} for group in ("engines", "gateway", "cpu", "rehearsal_hub")},
    }
}


class Served:
    """The deployment, its gateway, and what is done with them."""

    def __init__(self, state: Path, scratch: Path) -> None:
        self.state = state
        self.inventory = scratch / "inventory"
        self.inventory.mkdir()
        (self.inventory / "hosts.yml").write_text(json.dumps(HOSTS))
        shutil.copytree(REPOSITORY / "inventories/local/group_vars", self.inventory / "group_vars")
        keys = scratch / "keys"
        keys.write_text(f"test {KEY}\n")
        keys.chmod(0o400)
        self.settings = {
            "stepladder_state_directory": str(state), "deployment_name": "two", "deployment_port": PORT,
            "deployment_replicas": 2, "deployment_weights_endpoint": f"http://127.0.0.1:{HUB_PORT}",
            "rehearsal_hub_port": HUB_PORT, "gateway_port": GATEWAY_PORT, "gateway_metrics_port": METRICS_PORT,
            "gateway_agent_port": AGENT_PORT, "gateway_api_keys_file": str(keys), "watchdog_mode": "restart",
        }  # fmt: skip

    def run(self, verb: str, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "bin/stepladder", verb, "-i", str(self.inventory), "-e", json.dumps(self.settings)]
        done = subprocess.run(
            [*command, *more], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{verb}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        return done

    def client(self, timeout: float = 120.0) -> openai.OpenAI:
        url = f"http://127.0.0.1:{GATEWAY_PORT}/v1"
        return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=timeout)

    def processes(self, replica: int, name: str = "") -> list[int]:
        """The engine's processes that are called so, the manager's reaper left out."""
        marks = (f"={self.state}/deployments/two\0".encode(), f"STEPLADDER_PROCESS=vllm-{replica}\0".encode())
        found: list[int] = []
        children: dict[int, list[int]] = {}
        commands: dict[int, bytes] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                pid, parent = int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[pid] = (entry / "cmdline").read_bytes()
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            children.setdefault(parent, []).append(pid)
            found += [pid] if all(mark in environ for mark in marks) else []
        for pid in found:
            found += [child for child in children.get(pid, []) if child not in found]
        return sorted(p for p in found if name.encode() in commands[p] and b"reaper.py" not in commands[p])

    def log(self) -> str:
        return (self.state / "deployments/two-watchdog/logs/watchdog.log").read_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Short on purpose: sockets lie below it, and Linux allows 107 characters for their addresses.
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    deployment = Served(state, tmp_path_factory.mktemp("gateway"))
    deployment.run("deploy")
    yield deployment
    deployment.run("remove", "-e", "confirm_approved=true", check=False)
    left = list(state.rglob("*")) if state.exists() else []
    shutil.rmtree(state, ignore_errors=True)
    assert left == []


class Load:
    """Clients that ask through the gateway again and again, half of them for streams; what failed.

    Answers have an end and pauses follow them: what runs beside the engines on the same cores is to get on.
    """

    def __init__(self, served: Served, clients: int = 4) -> None:
        self.client = served.client()
        self.over = threading.Event()
        self.failures: list[str] = []
        self.requests = 0
        self.threads = [threading.Thread(target=self.run, args=(number % 2 == 0,)) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self, stream: bool) -> None:
        wish: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
        while not self.over.wait(0.5):
            try:
                if stream:
                    parts = list(self.client.chat.completions.create(**wish, stream=True))
                    whole = any(part.choices and part.choices[0].finish_reason for part in parts)
                else:
                    reply = self.client.chat.completions.create(**wish)
                    whole = reply.choices[0].finish_reason is not None
            except openai.OpenAIError as error:
                whole = False
                self.failures.append(repr(error))
            else:
                self.failures += [] if whole else ["not whole"]
            self.requests += 1

    def end(self) -> list[str]:
        self.over.set()
        for thread in self.threads:
            thread.join()
        return self.failures


def until(condition: Callable[[], Any], seconds: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - start


def statuses() -> dict[str, str]:
    """Each replica's state, as the gateway's metrics tell it."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith('haproxy_server_status{proxy="engines"') and line.endswith(" 1"):
            labels = line.split('"')
            found[labels[3]] = labels[5]
    return found


def test_clients_come_through_the_gateway_with_a_key(served: Served) -> None:
    reply = served.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    assert reply.choices[0].message.content
    with pytest.raises(openai.AuthenticationError, match="Give a valid API key"):
        openai.OpenAI(base_url=served.client().base_url, api_key="wrong").models.list()
    assert statuses() == {"replica-0": "UP", "replica-1": "UP"}
    for path in [*served.state.rglob("*.log"), *served.state.rglob("plan.json"), *served.state.rglob("haproxy.cfg")]:
        assert KEY not in path.read_text(errors="replace"), path


def test_a_second_deploy_changes_nothing(served: Served) -> None:
    assert "changed=0 " in served.run("deploy").stdout.split("PLAY RECAP")[1]


def test_drain_and_undrain_under_load_fail_no_request(served: Served) -> None:
    load = Load(served)
    for replica in ("1", "0"):
        served.run("drain", "-e", f"replica={replica}")
        assert statuses()[f"replica-{replica}"] == "DRAIN"
        served.run("undrain", "-e", f"replica={replica}")
    served.run("gateway", "-e", "gateway_max_body_bytes=1000000")
    assert load.end() == []
    print(f"{load.requests} requests, none failed")


@pytest.mark.parametrize(("replica", "name"), [(1, "EngineCore"), (0, "bin/vllm")], ids=["engine-core", "api-server"])
def test_an_engine_that_stops_in_its_tracks_is_left_out_and_restarted(served: Served, replica: int, name: str) -> None:
    until(lambda: f"vllm-{replica}: idle" in served.log(), 120)
    before, hung = served.processes(replica), served.processes(replica, name)
    assert hung
    load = Load(served, clients=2)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    gone = until(lambda: not set(served.processes(replica)) & set(before), 120)
    restarted = f'stepladder_watchdog_restarts_total{{deployment="two",process="vllm-{replica}"}} 1'
    assert restarted in (served.state / "watchdog/two/metrics.prom").read_text()
    back = until(lambda: statuses()[f"replica-{replica}"] == "UP", 300)
    failures = load.end()
    print(f"{name} stopped: restarted after {gone:.0f} s, back {back:.0f} s later")
    print(f"{len(failures)} of {load.requests} requests failed")
    # Those that it had when it hung, and no more.
    assert len(failures) <= len(load.threads)
