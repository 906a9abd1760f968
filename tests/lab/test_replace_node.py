"""A node dies for good, and a spare one takes its place: three nodes, two replicas, the gateway in front of them."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from deployed import PASSED, Deployed
from real_lab import NOTED, RealLab, own_lab

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(900)]

KEY = "k" * 40
GATEWAY = {"gateway": {"hosts": {"node1": None}}}


@pytest.fixture
def three() -> Iterator[RealLab]:
    """A lab of three nodes of its own, the first of them with the gateway."""
    with own_lab("--nodes", "3") as lab:
        (lab.inventory / "gateway.yml").write_text(json.dumps({"all": {"children": GATEWAY}}))
        (lab.state / "keys").write_text(f"test {KEY}\n")
        (lab.state / "keys").chmod(0o400)
        yield lab


def answers(lab: RealLab, seconds: float) -> bool:
    """Whether the gateway gives a token in that time."""
    body = json.dumps({"model": "tiny-step3p5", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    url = f"http://{lab.address('node1')}:8080/v1/chat/completions"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body.encode(), head), timeout=20) as answer:
                return bool(json.load(answer)["choices"])
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def served(lab: RealLab) -> list[str]:
    """The requests for files of the model that the stand-in hub, which is on node1, has answered so far."""
    log = lab.ssh("node1", "cat /var/lib/stepladder/deployments/rehearsal-hub/logs/*.log").stdout
    return [line for line in log.splitlines() if "FilePath=" in line]


def test_a_spare_node_takes_the_place_of_a_dead_one(three: RealLab) -> None:
    deployed = Deployed(
        three, deployment_engine="transformers", deployment_replicas=2, gateway_api_keys_file=f"{three.state}/keys"
    )
    deployed.deploy()
    assert deployed.status() == {("node1", "transformers-0"): "ready", ("node2", "transformers-1"): "ready"}

    before = served(three)
    assert before, "the hub's log tells of no file that was fetched"

    refused = three.play("replace-node", *deployed.arguments, "-e", "node=node2", "-e", "by=node1", check=False)
    assert refused.returncode != 0
    assert "the deployment uses node1 itself. Name one that is spare: node3." in refused.stdout

    three.run("kill", "node2")
    assert answers(three, 60), "the other replica does not answer"
    started = time.monotonic()
    exchange = three.play("replace-node", *deployed.arguments, "-e", "node=node2", "-e", "by=node3")
    NOTED.append(f"replace-node: a dead node's place is taken in {time.monotonic() - started:.0f} s")
    assert PASSED.search(exchange.stdout), exchange.stdout[-3000:]
    assert served(three) == before, "the hub gave bytes of a file that node1 has"
    assert 'Write deployment_replaced: {"node2": "node3"} into the inventory' in exchange.stdout
    taken = {("node1", "transformers-0"): "ready", ("node3", "transformers-1"): "ready"}
    assert taken.items() <= deployed.status().items()
    assert answers(three, 20)

    # The inventory says so from now on; the dead node comes back, and what it still runs is stopped.
    everywhere = {"children": GATEWAY, "vars": {"deployment_replaced": {"node2": "node3"}}}
    (three.inventory / "gateway.yml").write_text(json.dumps({"all": everywhere}))
    three.run("start", "node2")
    printed = three.play("deploy", *deployed.arguments).stdout
    assert "node2: runs release" in printed
    assert "had taken out" not in printed, "the replica that took the place was drained"
    assert deployed.changes() == {0}
    assert deployed.status() == taken
    assert "transformers-1" not in three.ssh("node2", "systemctl list-units --all 'lab-*'").stdout
    assert answers(three, 20)
