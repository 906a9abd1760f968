"""A redeploy of two real replicas beside each other on one node, through the real gateway, while clients ask.

One deployment serves all tests, in the order in which they stand.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_gateway_deployment import GATEWAY_PORT, PORT, REPOSITORY, Load, Served, statuses, until

from stepladder.exit_status import ExitStatus

OTHER = json.dumps({"deployment_extra_arguments": ["--disable-log-stats"]})
# Starts and calls itself healthy; every answer is another one than the model's. Without braces it is a path.
WRONG = json.dumps({"deployment_extra_arguments": ["--chat-template", "wrong {}"]})
NEVER_READY = json.dumps({"deployment_extra_arguments": ["--no-such-flag"]})

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="haproxy is not installed"
    ),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Short on purpose: sockets lie below it, and Linux allows 107 characters for their addresses.
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    deployment = Served(state, tmp_path_factory.mktemp("rolling"))
    deployment.settings["watchdog_mode"] = "off"
    # In the inventory, where 'scale' finds another number than its own.
    hosts = json.loads((deployment.inventory / "hosts.yml").read_text())
    hosts["all"]["hosts"]["localhost"]["deployment_replicas"] = deployment.settings.pop("deployment_replicas")
    (deployment.inventory / "hosts.yml").write_text(json.dumps(hosts))
    deployment.run("deploy")
    yield deployment
    deployment.run("remove", "-e", "confirm_approved=true", check=False)
    shutil.rmtree(state, ignore_errors=True)


@contextmanager
def under_load(served: Served) -> Iterator[Load]:
    """Clients that ask meanwhile; none of their requests fails, and they end whatever happens."""
    load = Load(served)
    try:
        yield load
    finally:
        failures = load.end()
    assert failures == []
    print(f"{load.requests} requests, none failed")


def both_get_requests() -> bool:
    return statuses() == {"replica-0": "UP", "replica-1": "UP"}


def test_a_changed_setting_rolls_out_without_a_failed_request(served: Served) -> None:
    before = {replica: served.processes(replica) for replica in (0, 1)}
    with under_load(served):
        done = served.run("deploy", "-e", OTHER)
    assert "One after the other, while the others answer: replica 0; then replica 1." in done.stdout
    assert len(re.findall(r"replica \d: stopped, started, asked in \d+ s", done.stdout)) == 2
    assert all(not set(before[replica]) & set(served.processes(replica)) for replica in (0, 1))
    assert both_get_requests()
    assert "changed=0 " in served.run("deploy", "-e", OTHER).stdout.split("PLAY RECAP")[1]


@pytest.mark.parametrize("wish", [WRONG, NEVER_READY], ids=["answers-wrongly", "never-ready"])
def test_the_first_red_stops_the_rollout_and_the_other_replica_never_stops(served: Served, wish: str) -> None:
    before = served.processes(1)
    with under_load(served):
        done = served.run("deploy", "-e", wish, check=False)
    assert done.returncode == ExitStatus.WENT_BACK, done.stdout[-3000:]
    assert served.processes(1) == before
    assert re.search(r"serves again: .*, \d+ s after its first replica was stopped; others answered all", done.stdout)
    assert both_get_requests()


def test_a_rollout_whose_controller_dies_is_finished_by_the_next(served: Served) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    command = [sys.executable, "bin/stepladder", "deploy", "-i", str(served.inventory)]
    process = subprocess.Popen(
        [*command, "-e", json.dumps(served.settings)], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with under_load(served):
        until(lambda: any(status.startswith("DRAIN") for status in statuses().values()), 300)
        time.sleep(random.Random(seed).uniform(0, 10))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        served.run("deploy")
    assert both_get_requests()


def test_what_a_person_drained_stays_out_over_a_rollout(served: Served) -> None:
    served.run("drain", "-e", "replica=1")
    done = served.run("deploy", "-e", OTHER, check=False)
    # Replica 0 would leave nobody to ask.
    assert done.returncode == ExitStatus.NOT_DRAINED, done.stdout[-3000:]
    assert "no other replica takes requests (replica 1: drained)" in done.stdout
    assert "Nothing had been stopped." in done.stdout
    assert statuses() == {"replica-0": "UP", "replica-1": "DRAIN"}
    served.run("undrain", "-e", "replica=1")
    # What the stopped rollout left is not what the tests after this one begin with.
    served.run("deploy")


def test_one_replica_less_and_one_more(served: Served) -> None:
    kept = served.processes(0)
    refused = served.run("scale", "-e", "replicas=1", "-e", "deployment_replicas=2", check=False)
    assert "deployment_replicas is given with -e, too, as 2, and would win." in refused.stdout
    with under_load(served):
        one = served.run("scale", "-e", "replicas=1").stdout
        assert "The inventory says deployment_replicas 2. Write 1 there, too" in one
        assert "One after the other, while the others answer: replica 1, which goes." in one
        assert statuses() == {"replica-0": "UP"}
        assert served.processes(1) == []
        served.run("scale", "-e", "replicas=2")
    assert both_get_requests()
    assert served.processes(0) == kept


def test_the_gateway_goes_along_to_where_a_release_is_back(served: Served) -> None:
    # Both replicas move, so that none is left to ask meanwhile.
    served.run("deploy", "-e", f"deployment_port={PORT + 20}", "-e", "deploy_break_requests=true")
    assert both_get_requests()
    done = served.run("rollback", "-e", "deploy_break_requests=true")
    assert f":{GATEWAY_PORT}/v1 (localhost), 2 of 2 replica(s) get requests" in done.stdout
    assert both_get_requests()
    with under_load(served):
        assert "changed=0 " in served.run("deploy").stdout.split("PLAY RECAP")[1]


def test_what_was_stopped_starts_as_it_was(served: Served) -> None:
    current = served.state / "deployments/two/current"
    release = current.readlink()
    served.run("stop")
    until(lambda: statuses() == {"replica-0": "DOWN", "replica-1": "DOWN"}, 30)
    done = served.run("start", "-e", OTHER)
    assert "Starting release" in done.stdout
    until(both_get_requests, 20)
    assert current.readlink() == release


def test_by_force_every_engine_starts_again(served: Served) -> None:
    before = {replica: served.processes(replica) for replica in (0, 1)}
    with under_load(served):
        served.run("redeploy", "-e", "redeploy_force=true", "-e", "redeploy_reason=test")
    assert all(not set(before[replica]) & set(served.processes(replica)) for replica in (0, 1))
