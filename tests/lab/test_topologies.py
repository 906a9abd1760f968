"""Replicas over two real nodes: deployed by the ordinary verbs, broken as clusters break, brought back by one rerun."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from real_lab import NOTED, REPOSITORY, RealLab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

PASSED = re.compile(r"(\d) of \1 checks passed")
LOGS = "/var/lib/stepladder/deployments/lab/logs"


class Replica:
    """A replica on both nodes of the lab: what was asked for, and what its verbs print."""

    def __init__(self, lab: RealLab, topology: str, **variables: Any) -> None:
        self.lab = lab
        wish = {"deployment_parallel": "TP2", "deployment_topology": topology, **variables}
        self.arguments = ("-e", json.dumps(wish))
        port = 30000 if variables.get("deployment_engine") == "sglang" else 8000
        self.url = f"http://{lab.address('node1')}:{port}/v1/completions"

    def deploy(self, *arguments: str, check: bool = True) -> str:
        """Deploy, hold that the endpoint was verified, and return what was printed."""
        done = self.lab.play("deploy", *self.arguments, *arguments, check=check)
        if check and "--check" not in arguments:
            assert PASSED.search(done.stdout), done.stdout[-3000:]
        return done.stdout + done.stderr

    def changes(self) -> set[int]:
        """Deploy again; how much the nodes say that they changed."""
        return {int(number) for number in re.findall(r"changed=(\d+)", self.deploy())}

    def bring_back(self, fault: str, told: str) -> str:
        """The one rerun after a fault, timed for the summary; every process is ready after it."""
        started = time.monotonic()
        printed = self.deploy()
        NOTED.append(f"{fault}: {told}; one rerun, {time.monotonic() - started:.0f} s")
        assert set(self.status().values()) == {"ready"}
        return printed

    def status(self) -> dict[tuple[str, str], str]:
        """Phase by node and process."""
        done = self.lab.play("status", "-e", "status_format=json", check=False)
        document = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
        rows = [row for row in document["processes"] if row["phase"] != "unused"]
        return {(row["node"], row["process"]): row["phase"] for row in rows}

    def ask(self, timeout: float = 10) -> bool:
        """Whether the endpoint gives a token within the time."""
        body = json.dumps({"model": "tiny-step3p5", "prompt": "a", "max_tokens": 1}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return bool(json.load(answer)["choices"])
        except (OSError, http.client.HTTPException, ValueError):
            return False

    @contextmanager
    def under_load(self) -> Iterator[list[float]]:
        """Requests one after the other; yields the times at which one failed."""
        failed: list[float] = []
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                if not self.ask():
                    failed.append(time.monotonic())
                    done.wait(0.5)

        worker = threading.Thread(target=load)
        worker.start()
        try:
            yield failed
        finally:
            done.set()
            worker.join()


@pytest.fixture(scope="module")
def ray(lab: RealLab) -> Iterator[Replica]:
    """vLLM on two nodes over Ray, its bytes fetched and its environments made once for the module."""
    replica = Replica(lab, "ray")
    foreseen = replica.deploy("--check", "--diff")
    assert re.search(r"changed=[1-9]\d* +unreachable=0 +failed=0", foreseen), foreseen[-3000:]
    assert lab.ssh("node2", "ls /var/lib/stepladder", check=False).returncode != 0, "a check wrote something"
    replica.first = replica.deploy()  # type: ignore[attr-defined]
    yield replica
    lab.play("remove", "-e", "confirm_approved=true")


@pytest.fixture(autouse=True)
def _whole(lab: RealLab) -> Iterator[None]:
    """No test leaves its fault to the next one."""
    yield
    lab.run("heal")
    for node in ("node1", "node2"):
        lab.run("start", node)


def test_two_nodes_serve_over_ray_and_a_rerun_changes_nothing(ray: Replica) -> None:
    assert re.search(r"ray TP2, 1 replica\(s\) on node1, node2\n", ray.first)  # type: ignore[attr-defined]
    assert ray.changes() == {0}
    assert "changed=1" not in ray.deploy("--check", "--diff")
    assert ray.status() == {("node1", "ray-0"): "ready", ("node1", "vllm-0"): "ready", ("node2", "ray-0"): "ready"}


def test_the_network_is_chosen_by_asking_the_peers_and_can_be_declared(ray: Replica) -> None:
    """The nodes' own names lead to 127.0.1.1, their interfaces differ, and two networks join them."""
    nodes = ray.lab.nodes
    assert f"network: node1 {nodes['node1']['interface']} {nodes['node1']['address']}, node2" in ray.first  # type: ignore[attr-defined]
    declared = json.dumps({"deployment_interface": "nic9"})
    refused = ray.deploy("--check", "-e", declared, check=False)
    assert "deployment_interface of node2: nic9; its interfaces: lan0 " in refused
    wished = {name: nodes[name]["storage_address"] for name in nodes}
    chosen = ray.deploy("--check", "-e", json.dumps({"deployment_address": "{{ lab_storage_address }}"}), check=False)
    assert f"network: node1 eth1 {wished['node1']}, node2 san0 {wished['node2']}: set in the inventory" in chosen


def test_a_worker_that_loses_power_under_load(ray: Replica) -> None:
    with ray.under_load() as failed:
        time.sleep(3)
        assert not failed, "requests failed before anything was broken"
        killed = time.monotonic()
        ray.lab.run("kill", "node2")
        time.sleep(12)
    noticed = failed[0] - killed
    assert noticed < 15, "a lost worker was not noticed"
    phases = ray.status()
    assert phases["node2", "-"] == "unreachable"
    assert phases["node1", "vllm-0"] != "ready"
    refused = ray.deploy(check=False)
    assert re.search(r"node2: UNREACHABLE", refused)
    ray.lab.run("start", "node2")
    ray.bring_back("ray: worker loses power under load", f"requests fail after {noticed:.0f} s, status: unreachable")
    assert ray.changes() == {0}


def test_a_cut_between_the_nodes(ray: Replica) -> None:
    ray.lab.run("cut", "node1", "node2")
    phases = ray.status()
    assert phases["node1", "vllm-0"] != "ready", "status called an engine ready that has lost a rank"
    refused = ray.deploy(check=False)
    assert re.search(r"network between node1 and its peers: .* is not reached from node2", refused)
    assert re.search(r"network between node2 and its peers: .* is not reached from node1", refused)
    ray.lab.run("heal")
    ray.bring_back("ray: cut between the nodes", f"status: engine {phases['node1', 'vllm-0']}, deploy: not reached")


@pytest.mark.nightly
def test_a_head_that_loses_power(ray: Replica) -> None:
    ray.lab.run("kill", "node1")
    phases = ray.status()
    assert phases["node1", "-"] == "unreachable"
    ray.lab.run("start", "node1")
    ray.bring_back("ray: head loses power", "status: unreachable")


@pytest.mark.nightly
def test_a_node_that_restarts(ray: Replica) -> None:
    ray.lab.run("reboot", "node2")
    phases = ray.status()
    ray.bring_back("ray: worker's node restarts", f"status once it is up: {_told(phases)}")


@pytest.mark.nightly
def test_another_ray_on_one_node_is_refused_before_anything_starts(ray: Replica) -> None:
    found = "f=$(ls -d /var/lib/stepladder/venvs/vllm-*-ray-*/lib/python3*/site-packages/ray-*.dist-info/METADATA)"
    ray.lab.ssh("node2", f"{found}; cp $f /root/METADATA; sed -i 's/^Version: .*/Version: 2.59.0/' $f")
    try:
        refused = ray.deploy(check=False)
    finally:
        ray.lab.ssh("node2", f"{found}; cp /root/METADATA $f")
    assert re.search(r"node1: Ray 2\.60\.0 on Python 3\.\d+, node2: Ray 2\.59\.0 on Python 3\.\d+", refused)
    assert ray.ask(), "the replica that was refused a change does not serve any more"


@pytest.mark.nightly
def test_weights_that_are_gone_on_one_node(ray: Replica) -> None:
    ray.lab.ssh("node2", "rm -r /var/lib/stepladder/models/stepladder--tiny-step3p5")
    printed = ray.bring_back("ray: weights gone on one node", "deploy fetches them")
    assert "all ranks are started again" in printed
    assert ray.changes() == {0}


@pytest.mark.nightly
def test_an_engine_that_the_kernel_kills_while_it_loads(ray: Replica) -> None:
    ray.lab.play("stop")
    with _deploying(ray, until="vllm-0: loading") as deploy:
        ray.lab.ssh("node1", "kill -9 $(systemctl show -p MainPID --value lab-vllm-0)")
        killed = time.monotonic()
        printed, _ = deploy.communicate(timeout=600)
    took = time.monotonic() - killed
    NOTED.append(f"ray: engine killed while it loads: systemd starts it again, the deploy ends well after {took:.0f} s")
    assert deploy.returncode == 0, printed[-3000:]
    assert PASSED.search(printed)


@pytest.mark.nightly
def test_a_controller_that_is_killed_half_way(ray: Replica) -> None:
    ray.lab.play("stop")
    with _deploying(ray, until="vllm-0: loading") as deploy:
        deploy.kill()
        deploy.wait()
    ray.bring_back("ray: controller killed while the engine loads", "nobody, it loads on")
    assert ray.changes() == {0}


def _told(phases: dict[tuple[str, str], str]) -> str:
    return ", ".join(f"{node} {process} {phase}" for (node, process), phase in sorted(phases.items()))


@contextmanager
def _deploying(replica: Replica, until: str) -> Iterator[subprocess.Popen[str]]:
    """A deploy in the background, once it has printed a text; ended with its children if it still runs."""
    command = [sys.executable, "bin/stepladder", "deploy", "-i", str(replica.lab.inventory), *replica.arguments]
    deploy = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert deploy.stdout
    try:
        for line in deploy.stdout:
            if until in line:
                break
        yield deploy
    finally:
        if deploy.poll() is None:
            deploy.send_signal(signal.SIGTERM)
            deploy.wait(60)


@pytest.mark.nightly
@pytest.mark.parametrize(("engine", "topology"), [("vllm", "mp"), ("sglang", "dist_init")])
def test_engines_that_join_their_ranks_themselves(lab: RealLab, engine: str, topology: str) -> None:
    replica = Replica(lab, topology, deployment_engine=engine)
    replica.deploy()
    assert replica.changes() == {0}
    process = f"{engine}-0"
    # A rank is lost: nobody asks for it alone.
    lab.run("kill", "node2")
    phases = replica.status()
    assert phases["node1", process] != "ready", "status called an engine ready that has lost a rank"
    lab.run("start", "node2")
    replica.bring_back(f"{topology}: follower loses power", f"status: {_told(phases)}")
    lab.run("cut", "node1", "node2")
    phases = replica.status()
    assert phases["node1", process] != "ready", "status called an engine ready that has lost a rank"
    lab.run("heal")
    replica.bring_back(f"{topology}: cut between the nodes", f"status: {_told(phases)}")
    # The head first, then its followers.
    lab.play("stop")
    assert set(replica.status().values()) == {"stopped"}
    lab.play("remove", "-e", "confirm_approved=true")
