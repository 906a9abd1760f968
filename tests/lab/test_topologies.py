"""Replicas over two real nodes: deployed by the ordinary verbs, broken as clusters break, brought back by one rerun."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from deployed import PASSED, Deployed
from real_lab import NOTED, REPOSITORY, RealLab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]


def over_both(lab: RealLab, topology: str, **variables: str) -> Deployed:
    """A replica on both nodes."""
    return Deployed(lab, deployment_parallel="TP2", deployment_topology=topology, **variables)


@pytest.fixture(scope="module")
def ray(lab: RealLab) -> Iterator[Deployed]:
    """vLLM on two nodes over Ray, its bytes fetched and its environments made once for the module."""
    replica = over_both(lab, "ray")
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


def test_two_nodes_serve_over_ray_and_a_rerun_changes_nothing(ray: Deployed) -> None:
    assert re.search(r"ray TP2, 1 replica\(s\) on node1, node2\n", ray.first)  # type: ignore[attr-defined]
    assert ray.changes() == {0}
    assert "changed=1" not in ray.deploy("--check", "--diff")
    assert ray.status() == {("node1", "ray-0"): "ready", ("node1", "vllm-0"): "ready", ("node2", "ray-0"): "ready"}


@pytest.mark.nightly
def test_the_network_is_chosen_by_asking_the_peers_and_can_be_declared(ray: Deployed) -> None:
    """The nodes' own names lead to 127.0.1.1, their interfaces differ, and two networks join them."""
    nodes = ray.lab.nodes
    assert f"network: node1 {nodes['node1']['interface']} {nodes['node1']['address']}, node2" in ray.first  # type: ignore[attr-defined]
    declared = json.dumps({"deployment_interface": "nic9"})
    refused = ray.deploy("--check", "-e", declared, check=False)
    assert "deployment_interface of node2: nic9; its interfaces: lan0 " in refused
    wished = {name: nodes[name]["storage_address"] for name in nodes}
    chosen = ray.deploy("--check", "-e", json.dumps({"deployment_address": "{{ lab_storage_address }}"}), check=False)
    assert f"network: node1 eth1 {wished['node1']}, node2 san0 {wished['node2']}: set in the inventory" in chosen


@pytest.mark.nightly
def test_a_worker_that_loses_power_under_load(ray: Deployed) -> None:
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


def test_a_cut_between_the_nodes(ray: Deployed) -> None:
    ray.lab.run("cut", "node1", "node2")
    phases = ray.status()
    assert phases["node1", "vllm-0"] != "ready", "status called an engine ready that has lost a rank"
    refused = ray.deploy(check=False)
    assert re.search(r"network between node1 and its peers: .* is not reached from node2", refused)
    assert re.search(r"network between node2 and its peers: .* is not reached from node1", refused)
    ray.lab.run("heal")
    ray.bring_back("ray: cut between the nodes", f"status: engine {phases['node1', 'vllm-0']}, deploy: not reached")


@pytest.mark.nightly
def test_a_head_that_loses_power(ray: Deployed) -> None:
    ray.lab.run("kill", "node1")
    phases = ray.status()
    assert phases["node1", "-"] == "unreachable"
    ray.lab.run("start", "node1")
    ray.bring_back("ray: head loses power", "status: unreachable")


@pytest.mark.nightly
def test_a_node_that_restarts(ray: Deployed) -> None:
    ray.lab.run("reboot", "node2")
    phases = ray.status()
    ray.bring_back("ray: worker's node restarts", f"status once it is up: {_told(phases)}")


@pytest.mark.nightly
def test_another_ray_on_one_node_is_refused_before_anything_starts(ray: Deployed) -> None:
    found = "f=$(ls -d /var/lib/stepladder/venvs/vllm-*-ray-*/lib/python3*/site-packages/ray-*.dist-info/METADATA)"
    ray.lab.ssh("node2", f"{found}; cp $f /root/METADATA; sed -i 's/^Version: .*/Version: 2.59.0/' $f")
    try:
        refused = ray.deploy(check=False)
    finally:
        ray.lab.ssh("node2", f"{found}; cp /root/METADATA $f")
    assert re.search(r"node1: Ray 2\.60\.0 on Python 3\.\d+, node2: Ray 2\.59\.0 on Python 3\.\d+", refused)
    assert ray.ask(), "the replica that was refused a change does not serve any more"


@pytest.mark.nightly
def test_weights_that_are_gone_on_one_node(ray: Deployed) -> None:
    ray.lab.ssh("node2", "rm -r /var/lib/stepladder/models/stepladder--tiny-step3p5")
    printed = ray.bring_back("ray: weights gone on one node", "deploy fetches them")
    assert "all ranks are started again" in printed
    assert ray.changes() == {0}


@pytest.mark.nightly
def test_an_engine_that_the_kernel_kills_while_it_loads(ray: Deployed) -> None:
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
def test_a_node_that_loses_power_in_the_middle_of_a_deploy(ray: Deployed) -> None:
    ray.lab.play("stop")
    with _deploying(ray, until="vllm-0: loading") as deploy:
        ray.lab.run("kill", "node2")
        killed = time.monotonic()
        printed, _ = deploy.communicate(timeout=600)
    took = time.monotonic() - killed
    assert deploy.returncode != 0
    assert re.search(r"node2: UNREACHABLE|node2 cannot be reached|because node2 failed", printed), printed[-3000:]
    assert took < 180, f"a deploy waited {took:.0f} s for a node without power"
    ray.lab.run("start", "node2")
    ray.bring_back("ray: node loses power in the middle of a deploy", f"the deploy names it after {took:.0f} s")


@pytest.mark.nightly
def test_a_controller_that_is_killed_half_way(ray: Deployed) -> None:
    ray.lab.play("stop")
    with _deploying(ray, until="vllm-0: loading") as deploy:
        deploy.kill()
        deploy.wait()
    ray.bring_back("ray: controller killed while the engine loads", "nobody, it loads on")
    assert ray.changes() == {0}


def _told(phases: dict[tuple[str, str], str]) -> str:
    return ", ".join(f"{node} {process} {phase}" for (node, process), phase in sorted(phases.items()))


@contextmanager
def _deploying(replica: Deployed, until: str) -> Iterator[subprocess.Popen[str]]:
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
    replica = over_both(lab, topology, deployment_engine=engine)
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
