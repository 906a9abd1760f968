"""Several replicas: side by side on one node, and a node each."""

from __future__ import annotations

import re
import time

import pytest
from deployed import PASSED, Deployed
from real_lab import NOTED, RealLab

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(900)]


def test_two_replicas_on_one_node_and_then_on_two(lab: RealLab) -> None:
    """vLLM twice on a node that is declared to have two GPUs; then the second one moves to the other node."""
    beside = Deployed(lab, deployment_parallel="TP1", deployment_replicas=2, deployment_gpus=2)
    printed = beside.deploy()
    endpoints = [f"http://{lab.address('node1')}:{port}/v1" for port in (8000, 8001)]
    assert re.search(r"single TP1, 2 replica\(s\) on node1\n", printed)
    assert len(PASSED.findall(printed)) == len(endpoints)
    assert all(endpoint in printed for endpoint in endpoints)
    assert beside.changes() == {0}
    assert beside.status() == {("node1", "vllm-0"): "ready", ("node1", "vllm-1"): "ready"}

    # One ends: the other answers on, and systemd starts the first again by itself.
    lab.ssh("node1", "kill -9 $(systemctl show -p MainPID --value lab-vllm-0)")
    killed = time.monotonic()
    assert not beside.ask()
    assert beside.ask(port=8001)
    while not beside.ask():
        assert time.monotonic() - killed < 120, "systemd did not bring the replica back"
        time.sleep(1)
    NOTED.append(
        f"replicas: one of two killed: the other answers on, back by itself, {time.monotonic() - killed:.0f} s"
    )

    apart = Deployed(lab, deployment_parallel="TP1", deployment_replicas=2)
    printed = apart.deploy()
    assert len(PASSED.findall(printed)) == len(endpoints)
    assert f"http://{lab.address('node2')}:8000/v1" in printed
    assert apart.changes() == {0}
    assert apart.status() == {("node1", "vllm-0"): "ready", ("node2", "vllm-1"): "ready"}
    assert "vllm-1" not in lab.ssh("node1", "systemctl list-units --all 'lab-*'").stdout

    lab.play("remove", "-e", "confirm_approved=true")
    for node in ("node1", "node2"):
        assert lab.ssh(node, "ls /var/lib/stepladder", check=False).returncode != 0
