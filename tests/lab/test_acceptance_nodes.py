"""Acceptance between real processes: gloo's ranks on loopback, and three nodes of which one is slow."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import all_reduce, torch_runs
from real_lab import REPOSITORY, RealLab, own_lab
from registry import free_port
from rehearsal_images import PLACE, environment

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

PROGRAM = (REPOSITORY / "roles/acceptance/files/torch_speed.py").read_text()
BASE = REPOSITORY / ".cache/conformance/base"


@pytest.fixture(scope="module")
def with_torch() -> list[str]:
    """What our program is run with: an environment of an engine for the CPU, made where this machine has none."""
    for state in (str(PLACE), "/var/lib/stepladder"):
        if found := torch_runs.command(state, "", "", "", 60):
            return found
    if found := torch_runs.command("/none", str(BASE / "bin/python"), "", "", 60):
        return found
    return [str(environment("transformers") / "bin/python")]


def rank(run: list[str], names: list[str], number: int, port: int) -> dict[str, Any]:
    """One node's part, as the module does it: our program is started, and its answer is read by the real parser."""
    group = {"names": names, "rank": number, "address": "127.0.0.1", "port": port}
    given = {"group": group, "backend": "gloo", "processes": 1, "seconds": 0.5, "program": PROGRAM}
    return all_reduce.measure(given, run)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_on_loopback(count: int, with_torch: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    names, port = [f"n{number}" for number in range(count)], free_port("127.0.0.1")
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda number: rank(with_torch, names, number, port), range(count)))
    assert [one["problem"] for one in answers] == [""] * count
    rates = {one["gbit"] for one in answers}
    assert len(rates) == 1, "the slowest rank's time is everybody's"
    assert 0.01 < rates.pop() < 1000


def test_a_rank_that_does_not_come(with_torch: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setitem(all_reduce.PATIENCE_SECONDS, "gloo", 5)
    alone = rank(with_torch, ["a", "b"], 0, free_port("127.0.0.1"))
    assert alone["gbit"] is None
    assert alone["problem"].startswith("process 0: the program on torch ends with 1: ")
    assert "imed out" in alone["problem"] or "imeout" in alone["problem"]


TORCH = """
- hosts: engines
  gather_facts: false
  roles:
    - role: deployment
    - role: engine_venv
"""
# In a lab all links share one machine's CPUs: figures are given, as docs/fitness.md says.
FIGURES = {"acceptance_level": "full", "acceptance_format": "json", "acceptance_minimum_gbit": 0.3,
           "acceptance_all_reduce_gbit": 0.15}  # fmt: skip


@pytest.fixture(scope="module")
def three() -> Iterator[RealLab]:
    """Three nodes, each with an environment of the smallest engine, whose torch is for the CPU."""
    with own_lab("--nodes", "3") as lab:
        play = lab.state / "torch.json"
        play.write_text(TORCH)
        settings = {
            "deployment_hosts": sorted(lab.nodes),
            "deployment_name": "torch",
            "deployment_model": "tiny-step3p5",
            "deployment_gpu": "cpu",
            "deployment_engine": "transformers",
            "deployment_replicas": 3,
            "stepladder_state_directory": "/var/lib/stepladder",
            "engine_venv_catalogue": str(REPOSITORY / "catalog"),
        }
        done = subprocess.run(
            [REPOSITORY / ".venv/bin/ansible-playbook", play, "-i", lab.inventory, "-e", json.dumps(settings)],
            cwd=REPOSITORY, env={**os.environ, **lab.environ}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        yield lab


def accept(lab: RealLab) -> dict[str, Any]:
    """What acceptance found at level full, for programs."""
    done = lab.play("acceptance", "-e", json.dumps(FIGURES), check=False)
    told = dict(json.loads(done.stdout))
    assert (done.returncode == 0) == told["accepted"], done.stdout[-3000:]
    return told


def test_a_slow_node_is_named_by_iperf3_and_by_the_bisection(three: RealLab) -> None:
    three.run("slow", "node2", "--rate", "80mbit")
    try:
        slow = accept(three)
    finally:
        three.run("heal", "node2")
    assert not slow["accepted"]
    assert (slow["slow_nodes"], slow["slow_links"]) == (["node2"], [])
    assert slow["all_reduce"]["blame"] == {"nodes": ["node2"], "links": [], "together": []}
    measured = {tuple(group["names"]): group["gbit"] for group in slow["all_reduce"]["groups"]}
    assert measured["node1", "node3"] > 0.15, "the two sound ones are not"
    assert max(rate for names, rate in measured.items() if "node2" in names) < 0.1
    assert {row["node"] for row in slow["findings"]} == {"node2"}
