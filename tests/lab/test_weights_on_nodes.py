"""Weights over real nodes: each byte leaves the hub once, and a node that is switched off is replaced.

Nodes that share a file system have one writer, and another one when that is switched off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shared_folder
from real_lab import REPOSITORY, RealLab

import hub

pytestmark = [pytest.mark.lab, pytest.mark.nightly]

MODEL = "stepladder/tiny-step3p5"
STORE = "/var/lib/stepladder/models/stepladder--tiny-step3p5/master"
FILES, SIZE = 12, 20_000_000


@pytest.fixture
def served(lab: RealLab, tmp_path: Path) -> Iterator[hub.Hub]:
    """A hub on this machine's end of the lab's network, with a model of random bytes under the tiny one's name."""
    root = tmp_path / "hub" / MODEL
    root.mkdir(parents=True)
    for number in range(FILES):
        (root / f"model-{number}.safetensors").write_bytes(os.urandom(SIZE))
    gateway = lab.address("node1").rpartition(".")[0] + ".1"
    with hub.Hub(tmp_path / "hub", host=gateway) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    for node in ("node1", "node2"):
        lab.ssh(node, f"rm -rf {Path(STORE).parent}")


def arguments(served: hub.Hub, *more: str) -> list[str]:
    return ["-e", "deployment_parallel=TP2", "-e", f"deployment_weights_endpoint={served.url}", *more]


def fetched(lab: RealLab, node: str) -> int:
    return int(lab.ssh(node, f"cat {STORE}/*.safetensors 2>/dev/null | wc -c").stdout)


def test_nodes_divide_the_files_and_a_lost_one_is_replaced(lab: RealLab, served: hub.Hub) -> None:
    slow = arguments(served, "-e", "model_weights_hub_bytes_per_second=8000000", "-e", "model_weights_max_workers=1")
    run = subprocess.Popen(
        [sys.executable, "bin/stepladder", "weights", "-i", str(lab.inventory), *slow],
        cwd=REPOSITORY, env={**os.environ, **lab.environ}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 400
    while sum(served.bytes_sent.values()) < 3 * SIZE and time.monotonic() < until:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.2)
    lab.run("kill", "node2")
    try:
        said = run.communicate(timeout=400)[0]
        assert run.returncode != 0
        assert "node2" in said
        assert lab.ssh("node1", f"test -e {STORE}/.stepladder/complete", check=False).returncode == 0, said
        assert fetched(lab, "node1") == FILES * SIZE
        first = sum(served.bytes_sent.values())
        assert first <= (FILES + FILES // 2) * SIZE
    finally:
        lab.run("start", "node2")
    before = fetched(lab, "node2")
    done = lab.play("weights", *arguments(served))
    assert "changed=1" in done.stdout
    assert fetched(lab, "node2") == FILES * SIZE
    assert sum(served.bytes_sent.values()) == first, f"node2 had {before} bytes, and node1 has all of it"
    again = lab.play("weights", *arguments(served))
    assert again.stdout.count("changed=0") == 2
    checked = lab.play("weights", *arguments(served, "-e", "weights_check=full"))
    assert checked.stdout.count("failed=0") == 2


def test_of_nodes_that_share_a_file_system_one_writes_and_another_takes_its_place(
    lab: RealLab, served: hub.Hub, tmp_path: Path
) -> None:
    if reason := shared_folder.why_not():
        pytest.skip(f"this machine lacks {reason}")
    options = arguments(served, "-e", "model_weights_shared=true")
    slow = [*options, "-e", "model_weights_hub_bytes_per_second=4000000", "-e", "model_weights_max_workers=1"]
    with shared_folder.shared(lab, ["node1", "node2"], tmp_path / "models", str(Path(STORE).parents[1])):
        run = lab.start("weights", *slow)
        until = time.monotonic() + 120
        while sum(served.bytes_sent.values()) < 3 * SIZE and time.monotonic() < until:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.2)
        lease = json.loads(lab.ssh("node1", f"cat {STORE}.lease").stdout)
        writer, other = lease["host"], ({"node1", "node2"} - {lease["host"]}).pop()
        lab.run("kill", writer)
        try:
            said = run.communicate(timeout=400)[0]
        finally:
            lab.run("start", writer)
        assert run.returncode != 0
        assert f"waiting for {writer} (process {lease['pid']}), which writes {STORE}: " in said
        assert lab.ssh(other, f"test -e {STORE}/.stepladder/complete", check=False).returncode == 0, said
        assert fetched(lab, other) == FILES * SIZE
        # Whole files of the one that is gone were read, not fetched; the one that it was at may have come twice.
        sent = sum(served.bytes_sent.values())
        assert sent <= (FILES + 1) * SIZE
        place = (tmp_path / "models").with_name(f"models-{writer}")
        shared_folder.show(lab, writer, place, str(Path(STORE).parents[1]))
        again = lab.play("weights", *options)
        assert again.stdout.count("changed=0") == 2
        assert sum(served.bytes_sent.values()) == sent
        listed = lab.play("weights-prune", *options)
        assert f"node1: {STORE} (0.2 GB, complete) stays: wanted by the inventory" in listed.stdout
