"""What a rollout does at the real HAProxy: whom it takes out, whom it puts back, and what is a person's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import haproxy, lease, rotation, serving_state
from gateway_engine import Engine, engines
from test_gateway_haproxy import PROGRAM, Gateway, drain, module
from waiting import until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="haproxy is not installed: apt-get install -y haproxy"),
    pytest.mark.timeout(60),
]


@pytest.fixture
def two() -> Iterator[list[Engine]]:
    with engines(2) as servers:
        yield servers


@pytest.fixture
def gateway(tmp_path: Path, two: list[Engine]) -> Iterator[Gateway]:
    made = Gateway(tmp_path, two)
    made.start()
    yield made
    made.stop()


def out(gateway: Gateway, *replicas: int, check: bool = False, **more: Any) -> tuple[bool, list[str]]:
    wanted = rotation.Wanted(replicas, more.pop("patient", replicas), more.pop("seconds", 5.0), **more)
    return rotation.take_out(gateway.master, wanted, lambda _: None, check)


def back(gateway: Gateway, *replicas: int, check: bool = False) -> list[int]:
    return rotation.put_back(gateway.master, replicas, 10, check)


def test_out_and_back(gateway: Gateway, two: list[Engine]) -> None:
    assert out(gateway, 1, check=True) == (True, [])
    assert gateway.up() == ["replica-0", "replica-1"]
    assert out(gateway, 1, run="r1") == (True, [])
    assert (gateway.up(), rotation.marked(str(gateway.directory))) == (["replica-0"], {1})
    told = serving_state.gateway(str(gateway.directory)) or {}
    assert [(server["taken_out"], server["taken_out_by"]) for server in told["servers"]] == [
        (False, None), (True, "r1"),
    ]  # fmt: skip
    assert [server["place"] for server in told["servers"]] == [f"127.0.0.1:{engine.port}" for engine in two]
    assert {gateway.ask(body={})[1]["engine"] for _ in range(4)} == {two[0].port}
    assert out(gateway, 1, run="r1") == (False, [])
    assert back(gateway, 1, check=True) == [1]
    assert back(gateway, 0, 1) == [1]
    assert (gateway.up(), rotation.marked(str(gateway.directory))) == (["replica-0", "replica-1"], set())
    assert back(gateway, 0, 1) == []


def test_a_replica_that_moved_stays_out_until_the_gateway_knows_the_place(gateway: Gateway) -> None:
    """Nothing waits for it at the old place, and nothing is sent there."""
    places = gateway.master.addresses()
    assert out(gateway, 1)[0]
    moved = {0: f"http://{places['replica-0']}/v1", 1: "http://198.18.0.9:8000/v1"}
    assert rotation.put_back(gateway.master, [0, 1], 10, False, moved) == []
    assert (gateway.up(), rotation.marked(str(gateway.directory))) == (["replica-0"], {1})
    there = {1: f"http://{places['replica-1']}/v1"}
    assert rotation.put_back(gateway.master, [0, 1], 10, False, there) == [1]
    assert (gateway.up(), rotation.marked(str(gateway.directory))) == (["replica-0", "replica-1"], set())


def hang(gateway: Gateway, engine: Engine) -> list[threading.Thread]:
    """Have requests in flight at an engine that do not end until it is let go."""
    engine.hung.set()
    asked: list[threading.Thread] = []

    def one_hangs() -> bool:
        asked.append(threading.Thread(target=gateway.ask, kwargs={"body": {}}))
        asked[-1].start()
        time.sleep(0.1)
        return engine.running > 0

    until(one_hangs, 10)
    return asked


def let_go(engine: Engine, asked: list[threading.Thread]) -> None:
    engine.hung.clear()
    for thread in asked:
        thread.join()


class Job(threading.Thread):
    """What a run's job on the gateway's host does; `said` is how it ended."""

    def __init__(self, gateway: Gateway, *replicas: int, **more: Any) -> None:
        super().__init__()
        self.gateway, self.replicas, self.more, self.said = gateway, replicas, more, ""
        self.start()

    def run(self) -> None:
        try:
            out(self.gateway, *self.replicas, **self.more)
            self.said = "out"
        except haproxy.GatewayError as error:
            self.said = str(error)


def test_a_job_that_outlives_its_run_takes_nothing_back_from_the_run_after_it(
    gateway: Gateway, two: list[Engine]
) -> None:
    directory = str(gateway.directory)
    asked = hang(gateway, two[1])
    left_behind = Job(gateway, 1, seconds=2.0, run="killed")
    until(lambda: rotation.marks(directory) == {1: "killed"}, 5)
    rerun = Job(gateway, 1, seconds=20.0, run="rerun")
    until(lambda: rotation.marks(directory) == {1: "rerun"}, 5)
    left_behind.join()
    assert left_behind.said.startswith("Replica 1 was not stopped: while its requests were waited for, somebody else")
    assert (gateway.up(), rotation.marks(directory)) == (["replica-0"], {1: "rerun"})
    let_go(two[1], asked)
    rerun.join()
    assert (rerun.said, gateway.up(), rotation.marks(directory)) == ("out", ["replica-0"], {1: "rerun"})
    # The one that lives has the replica proven, whoever took it out.
    rotation.mark(directory, {1: "killed"})
    assert back(gateway, 1) == [1]


def test_what_gets_requests_again_is_drained_again_unless_a_person_wants_it_so(
    gateway: Gateway, two: list[Engine]
) -> None:
    directory = str(gateway.directory)
    asked = hang(gateway, two[1])
    job = Job(gateway, 1, seconds=20.0, run="mine")
    until(lambda: gateway.up() == ["replica-0"], 5)
    gateway.master.change(f"set server {haproxy.BACKEND}/replica-1 state ready")
    let_go(two[1], asked)
    job.join()
    assert (job.said, gateway.up()) == ("out", ["replica-0"])
    back(gateway, 1)

    asked = hang(gateway, two[1])
    job = Job(gateway, 1, seconds=20.0, run="mine")
    until(lambda: gateway.up() == ["replica-0"], 5)
    drain(gateway, 1, "ready", deadline=10)
    let_go(two[1], asked)
    job.join()
    assert job.said == (
        "Replica 1 was not stopped: while its requests were waited for, somebody else put it back or took it over "
        "('status' shows it)."
    )
    assert (gateway.up(), rotation.marks(directory)) == (["replica-0", "replica-1"], {})


def test_whether_it_gets_requests_again_is_told_as_it_is(gateway: Gateway, two: list[Engine]) -> None:
    asked = hang(gateway, two[1])
    # Taken out by a run of before.
    out(gateway, 1, patient=(), run="killed")
    with pytest.raises(haproxy.GatewayError, match="was not stopped, and gets requests again"):
        out(gateway, 1, seconds=0.2, run="rerun")
    until(lambda: gateway.up() == ["replica-0", "replica-1"], 5)
    drain(gateway, 1, deadline=0)
    with pytest.raises(haproxy.GatewayError, match="was not stopped, and stays out of rotation as it was before"):
        out(gateway, 1, seconds=0.2)
    assert gateway.up() == ["replica-0"]
    let_go(two[1], asked)


def test_requests_are_waited_for_and_those_that_do_not_end_keep_the_replica_in_rotation(
    gateway: Gateway, two: list[Engine]
) -> None:
    asked = hang(gateway, two[1])
    with pytest.raises(haproxy.GatewayError) as error:
        out(gateway, 1, seconds=0.2)
    assert str(error.value).startswith(
        f"Replica 1 still has {two[1].running} request(s) in flight after 0 s. It was not stopped, and gets requests"
    )
    until(lambda: gateway.up() == ["replica-0", "replica-1"], 5)
    assert rotation.marked(str(gateway.directory)) == set()

    changed, said = out(gateway, 1, seconds=0.2, may_break=True)
    assert (changed, said) == (
        True,
        [f"replica 1: {two[1].running} request(s) are left after 0 s and will be broken off"],
    )
    assert back(gateway, 1) == [1]
    # Nobody waits for those of an engine that gives no tokens.
    assert out(gateway, 1, patient=()) == (True, [])
    let_go(two[1], asked)


def test_the_last_one_is_not_taken_out(gateway: Gateway, two: list[Engine]) -> None:
    drain(gateway, 0, deadline=5)
    with pytest.raises(haproxy.GatewayError) as error:
        out(gateway, 1)
    assert str(error.value) == (
        "Replica 1 was not drained, no other replica takes requests (replica 0: drained): clients would get 503. "
        "Nothing was stopped here. Bring another one up ('status', 'undrain'), or add -e deploy_break_requests=true."
    )
    assert out(gateway, 1, may_break=True) == (
        True,
        ["no other replica takes requests (replica 0: drained): clients get 503 until replica 1 is back"],
    )
    # One that takes none anyway can go.
    assert back(gateway, 1) == [1]
    drain(gateway, 0, "ready", deadline=10)
    two[0].unhealthy.set()
    until(lambda: gateway.up() == ["replica-1"], 20)
    assert out(gateway, 0) == (True, [])


def test_what_a_person_drained_stays_a_persons(gateway: Gateway) -> None:
    drain(gateway, 1, deadline=5)
    assert out(gateway, 1) == (False, ["replica 1 was drained before, and stays so until somebody runs 'undrain'"])
    assert back(gateway, 1) == []
    assert gateway.up() == ["replica-0"]
    drain(gateway, 1, "ready", deadline=10)
    # One that a rollout took out and a person then wants out.
    out(gateway, 1)
    drain(gateway, 1, deadline=5)
    assert back(gateway, 1) == []


def test_what_a_living_rollout_took_out_is_not_a_persons_to_put_back(gateway: Gateway) -> None:
    out(gateway, 1, run="ann's")
    at_work = {"deadline": 10, "at_work": "ann from ops1: deploy two"}
    for check in (True, False):
        assert drain(gateway, 1, "ready", check=check, **at_work)["msg"] == (
            "Replica 1 was not put back: a rollout took it out, to stop its engine, and is still at work (ann from "
            "ops1: deploy two). It puts it back itself once it answers as promised. Wait for it, or add "
            "-e gateway_allow_rollout=true."
        )
    assert (gateway.up(), rotation.marks(str(gateway.directory))) == (["replica-0"], {1: "ann's"})
    assert drain(gateway, 1, "ready", allow_rollout=True, **at_work)["changed"]
    assert (gateway.up(), rotation.marks(str(gateway.directory))) == (["replica-0", "replica-1"], {})
    # The run is gone; and what a person drained is a person's at any time.
    out(gateway, 1, run="ann's")
    assert drain(gateway, 1, "ready", deadline=10)["changed"]
    drain(gateway, 1, deadline=5)
    assert drain(gateway, 1, "ready", **at_work)["changed"]


def test_a_rollout_that_ended_in_the_middle_is_put_right_by_the_next_deploy(gateway: Gateway) -> None:
    out(gateway, 1)
    gateway.stop(9)
    gateway.start(up=1)
    given = {"state": "loaded", "directory": str(gateway.directory), "put_back": True, "require_replicas": True}
    answers = [module("gateway", given | {"_ansible_check_mode": check}) for check in (True, False, True)]
    assert [(answer["changed"], answer["put_back"]) for answer in answers] == [(True, [1]), (True, [1]), (False, [])]
    assert answers[1]["taking_requests"] == 2
    assert gateway.up() == ["replica-0", "replica-1"]


def test_the_module_drains_once_and_says_what_is_not_there(gateway: Gateway, tmp_path: Path) -> None:
    given = {
        "directory": str(gateway.directory), "deployment": "two", "replicas": [1], "patient": [1], "state": "out",
        "deadline": 5,
    }  # fmt: skip
    answers = [module("gateway_rotation", given | {"_ansible_check_mode": check}) for check in (True, False, False)]
    assert [(answer["changed"], answer["said"]) for answer in answers] == [(True, []), (True, []), (False, [])]
    assert gateway.up() == ["replica-0"]
    others = given | {"state": "back", "run": "another", "only_own": True}
    assert not module("gateway_rotation", others)["changed"]
    assert gateway.up() == ["replica-0"]
    assert module("gateway_rotation", given | {"state": "back"})["changed"]
    elsewhere = module("gateway_rotation", given | {"directory": f"{tmp_path}/none"})
    assert elsewhere["said"] == ["there is no gateway for two yet: nothing to drain"]
    drain(gateway, 0, deadline=5)
    assert "Replica 1 was not drained, no other replica" in module("gateway_rotation", given)["msg"]


def rotate(folder: Path, hosts: dict[str, Any], gateways: list[str], **play: Any) -> subprocess.CompletedProcess[str]:
    """Run the role for replica 1 on those of the hosts that are no gateways."""
    common = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "two"}
    (folder / "inventory.yml").write_text(json.dumps({"all": {"hosts": hosts, "vars": common}}))
    given = {
        "gateway_rotation": "out", "gateway_replicas": [1], "gateway_patient": [1], "gateway_drain_seconds": 2,
        "gateway_hosts": gateways,
    }  # fmt: skip
    work = {"ansible.builtin.include_role": {"name": "gateway", "tasks_from": "rotate"}, "vars": given}
    nodes = ",".join(host for host in hosts if host not in gateways)
    (folder / "play.yml").write_text(json.dumps([{"hosts": nodes, "gather_facts": False, "tasks": [work], **play}]))
    environ = {
        "ANSIBLE_CONFIG": f"{ROOT}/ansible.cfg", "ANSIBLE_ROLES_PATH": f"{ROOT}/roles",
        "ANSIBLE_STDOUT_CALLBACK": "default",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", "inventory.yml", "play.yml"], cwd=folder,
        env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.mark.timeout(150)
def test_a_gateways_host_that_is_down_is_named_where_one_failure_ends_all(
    two: list[Engine], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("gw")
    place = tmp_path / "0/gateway/two"
    place.mkdir(parents=True)
    alive = Gateway(place, two)
    alive.start()
    hosts = {
        "node": {},
        "mate": {},
        "gw0": {"stepladder_state_directory": str(place.parents[1])},
        "gw1": {
            "stepladder_state_directory": str(tmp_path / "1"), "ansible_connection": "ssh", "ansible_host": "127.0.0.1",
            "ansible_port": 1,
        },
    }  # fmt: skip
    try:
        done = rotate(tmp_path, hosts, ["gw0", "gw1"], any_errors_fatal=True)
        assert done.returncode != 0
        assert "The gateway on gw1 did not answer, so nobody knows" in done.stdout, done.stdout + done.stderr
        until(lambda: alive.up() == ["replica-0", "replica-1"], 5)
        assert rotation.marks(str(alive.directory)) == {}
    finally:
        alive.stop()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("busy", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_what_one_gateway_cannot_take_out_is_back_at_all_of_them(
    two: list[Engine], tmp_path_factory: pytest.TempPathFactory, busy: int
) -> None:
    """The role itself, with two gateways in front of the same replicas; behind one a request does not end."""
    tmp_path = tmp_path_factory.mktemp("gw")  # short: a socket's address has 107 bytes, and HAProxy adds to its name
    places = {"gw0": tmp_path / "0/gateway/two", "gw1": tmp_path / "1/gateway/two"}
    made = [Gateway(place, two) for place in places.values()]
    hosts: dict[str, Any] = {"node": {}}
    for (name, place), one in zip(places.items(), made, strict=True):
        place.mkdir(parents=True)
        one.start()
        hosts[name] = {"stepladder_state_directory": str(place.parents[1])}
    try:
        asked = hang(made[busy], two[1])
        done = rotate(tmp_path, hosts, [*places])
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Replica 1 still has" in done.stdout
        # The second one takes nothing out where the first could not.
        drained = [name for name in places if f"changed: [node -> {name}" in done.stdout]
        assert drained == (["gw0"] if busy else [])
        for one in made:
            until(lambda one=one: one.up() == ["replica-0", "replica-1"], 5)
            assert rotation.marks(str(one.directory)) == {}
        let_go(two[1], asked)
    finally:
        for one in made:
            one.stop()


def test_another_engine_gets_requests_before_the_gateway_knows_how_to_ask_it(
    gateway: Gateway, two: list[Engine]
) -> None:
    """SGLang's check at vLLM, until the end of the rollout."""
    gateway.more["check_path"] = "/ready"
    gateway.master.reload(gateway.write().generation, 10)
    out(gateway, 1)
    two[1].unknown.add("/ready")
    assert back(gateway, 1) == [1]
    time.sleep(7)
    assert gateway.up() == ["replica-0", "replica-1"]


@pytest.mark.nightly
@pytest.mark.timeout(150)
def test_the_verb_undrain_asks_the_engines_nodes_whose_rollout_it_is(gateway: Gateway, tmp_path: Path) -> None:
    """One of the two nodes does not answer."""
    place = tmp_path / "gw/gateway/two"
    place.parent.mkdir(parents=True)
    place.symlink_to(gateway.directory)
    out(gateway, 1, run="ann's")
    holder = {
        "run": "ann's", "who": "ann", "origin": "ops1", "verb": "deploy", "why": "", "deployment": "two",
        "plan_id": "p", "ttl": 600.0, "controller": {},
    }  # fmt: skip
    assert lease.take(str(tmp_path / "a"), holder)["taken"]
    dead = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    common = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "two",
    }  # fmt: skip
    hosts = {
        name: {**common, "stepladder_state_directory": str(tmp_path / name), **more}
        for name, more in {"dead": dead, "a": {}, "gw": {}}.items()
    }
    groups = {"engines": {"hosts": {"dead": {}, "a": {}}}, "gateway": {"hosts": {"gw": {}}}}
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"hosts": hosts, "children": groups}}))

    def undrain(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ansible", "playbook", "-i", "inventory.yml"]
        return subprocess.run(
            [*command, f"{ROOT}/playbooks/undrain.yml", "-e", "replica=1", *more], cwd=tmp_path,
            env={**os.environ, "ANSIBLE_CONFIG": f"{ROOT}/ansible.cfg", "ANSIBLE_ROLES_PATH": f"{ROOT}/roles"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    refused = undrain()
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "and is still at work (ann from ops1: deploy two p, since" in " ".join(refused.stdout.split())
    assert gateway.up() == ["replica-0"]
    done = undrain("-e", "gateway_allow_rollout=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert gateway.up() == ["replica-0", "replica-1"]


def test_a_gateway_that_is_not_there_or_does_not_know_a_replica_is_said(gateway: Gateway, tmp_path: Path) -> None:
    assert rotation.not_there(f"{tmp_path}/none", "two") == "there is no gateway for two yet"
    assert rotation.not_there(str(gateway.directory), "two") == ""
    assert out(gateway, 7) == (False, ["the gateway does not know replica 7 yet: nothing to drain"])
    gateway.stop(9)
    assert rotation.not_there(str(gateway.directory), "two").startswith(
        "the gateway for two does not run (The gateway's"
    )
    gateway.start()


def test_marks_of_before_name_no_run_and_are_read(tmp_path: Path) -> None:
    (tmp_path / rotation.MARKS).write_text('{"format_version": 1, "replicas": [0, 2]}')
    assert rotation.marks(str(tmp_path)) == {0: "", 2: ""}
    rotation.forget(str(tmp_path), 0)
    assert (tmp_path / rotation.MARKS).read_text() == '{"format_version": 2, "replicas": {"2": ""}}'


def test_marks_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    for text in ("", "[]", '{"replicas": ["x"]}'):
        (tmp_path / rotation.MARKS).write_text(text)
        assert rotation.marked(str(tmp_path)) == set()
