"""Verbs where not every node has a part: spare nodes, and nodes that --limit leaves out or that do not answer.

The playbooks and the role `release` themselves; stand-ins take the place of what reaches gateways and engines.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from verbs import ROOT, run

from stepladder.exit_status import ExitStatus

STAND_INS = ("verify/main", "engine/status", "engine/logs", "watchdog/main")
ENDPOINT = {"node": "a-spare", "replica": 0, "base_url": "http://127.0.0.1:8000/v1"}
KEPT = {"plan_id": "p", "deployment": {"engine": "engine"}, "node": {"ranks": [], "processes": []}, "endpoints": []}
nightly = pytest.mark.nightly


def put_role(project: Path, name: str, tasks: list[dict[str, Any]]) -> None:
    role, _, file = name.partition("/")
    (project / f"roles/{role}/tasks").mkdir(parents=True, exist_ok=True)
    (project / f"roles/{role}/tasks/{file}.yml").write_text(json.dumps(tasks))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A spare node that comes first in the inventory, and one that a release runs on, both on this machine."""
    for name in STAND_INS:
        text = f"noted: {name} on {{{{ inventory_hostname }}}}"
        put_role(tmp_path, name, [{"stepladder.core.show": {"text": text}}])
    hosts = {name: {"stepladder_state_directory": str(tmp_path / name)} for name in ("a-spare", "b")}
    common = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "d",
    }  # fmt: skip
    groups = {"engines": {"hosts": hosts}}
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"children": groups, "vars": common}}))
    put_release(tmp_path, "b", json.dumps(KEPT))
    return tmp_path


def put_release(project: Path, host: str, text: str) -> None:
    root = project / host / "deployments/d"
    (root / "releases/p").mkdir(parents=True)
    (root / "releases/p/plan.json").write_text(text)
    (root / "current").symlink_to("releases/p")


def noted(ran: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall("noted: (.*)", ran.stdout)


@pytest.mark.parametrize(
    ("verb", "done"),
    [
        ("verify", ["verify/main on b"]),
        pytest.param("logs", ["engine/status on b", "engine/logs on b"], marks=nightly),
        pytest.param("watchdog", ["watchdog/main on b"], marks=nightly),
    ],
)
def test_a_spare_node_is_no_fault_of_what_runs_on_others(project: Path, verb: str, done: list[str]) -> None:
    ran = run(project, verb, {"watchdog_mode": "observe"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert noted(ran) == done


@nightly
def test_what_is_deployed_nowhere_is_refused(project: Path) -> None:
    shutil.rmtree(project / "b/deployments")
    ran = run(project, "verify", {})
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "Nothing is deployed under the name d here. Run the verb 'deploy' first." in ran.stdout
    assert not noted(ran)


@pytest.mark.parametrize(
    ("own", "asked", "told"),
    [
        # The first node of the inventory was not reached by a rollout that gave the second replica another port.
        pytest.param(
            ("old", "new"), [("old", [8000]), ("new", [8003])],
            ["The nodes do not agree on the release: a-spare has old; b has new."], id="half-way",
        ),
        pytest.param(
            ("old", "old"), [("old", [8000, 8001, 8002])], [], id="agreed", marks=nightly,
        ),
    ],
)  # fmt: skip
def test_verify_asks_every_replica_as_its_own_node_says(
    project: Path, own: tuple[str, str], asked: list[tuple[str, list[int]]], told: list[str]
) -> None:
    # The third is on a node that nobody asks.
    ports = {"old": (8000, 8001, 8002), "new": (8000, 8003, 8002)}
    shutil.rmtree(project / "b/deployments")
    for host, plan_id in zip(("a-spare", "b"), own, strict=True):
        points = [
            {"node": node, "replica": number, "base_url": f"http://127.0.0.1:{port}/v1"}
            for number, (node, port) in enumerate(zip(("a-spare", "b", "c"), ports[plan_id], strict=True))
        ]
        put_release(project, host, json.dumps(KEPT | {"plan_id": plan_id, "endpoints": points}))
    text = "noted: {{ verify_slice.plan_id }} {{ verify_slice.endpoints | map(attribute='base_url') | join(' ') }}"
    put_role(project, "verify/main", [{"stepladder.core.show": {"text": text}}])
    shutil.copytree(ROOT / "roles/verify/defaults", project / "roles/verify/defaults")
    ran = run(project, "verify", {})
    assert ran.returncode == (ExitStatus.NOT_READY if told else 0), ran.stdout + ran.stderr
    expected = [(name, " ".join(f"http://127.0.0.1:{port}/v1" for port in found)) for name, found in asked]
    assert noted(ran) == [f"{name} {urls}" for name, urls in expected]
    said = " ".join(ran.stdout.split())
    if told:
        assert told[0] in said
        assert "Not asked, for it is not known of which release it is: replica 2 on c." in said
    else:
        assert "do not agree" not in said


@pytest.fixture
def planned(project: Path) -> Path:
    """Three nodes of which a plan of the rehearsal's model needs the first; none is deployed."""
    inventory = json.loads((project / "inventory.yml").read_text())
    names = ("lost", "one", "two")
    inventory["all"]["children"] = {
        "engines": {
            "hosts": {
                name: {"stepladder_state_directory": str(project / name), "deployment_address": f"127.0.0.{number}"}
                for number, name in enumerate(names, 1)
            }
        },
        "cpu": {"hosts": {name: {} for name in names}},
    }
    inventory["all"]["vars"] |= {
        "deployment_model": "tiny-step3p5", "deployment_engine": "vllm", "deployment_context_length": 1024,
    }  # fmt: skip
    (project / "inventory.yml").write_text(json.dumps(inventory))
    return project


@pytest.mark.parametrize("verb", ["deploy", "plan"])
def test_what_would_be_done_on_nodes_that_the_plan_does_not_use_is_refused(planned: Path, verb: str) -> None:
    """Where nothing is done, that must neither look like success nor end in an error of Ansible's own."""
    ran = run(planned, verb, {}, "--limit", "two", "--check")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    said = " ".join(ran.stdout.split())
    assert "The plan uses lost, and none of them is within --limit two. Nothing was changed." in said
    assert "planned_nodes" not in ran.stdout + ran.stderr


def put_gateway(planned: Path) -> None:
    inventory = json.loads((planned / "inventory.yml").read_text())
    host = {"stepladder_state_directory": str(planned / "g"), "deployment_address": "127.0.0.9"}
    inventory["all"]["children"]["gateway"] = {"hosts": {"g": host}}
    for number, engine in enumerate(inventory["all"]["children"]["engines"]["hosts"].values(), 1):
        engine["deployment_address"] = f"198.18.0.{number}"
    inventory["all"]["vars"] |= {"gateway_open": True, "deployment_bind_address": "private"}
    (planned / "inventory.yml").write_text(json.dumps(inventory))


@pytest.mark.parametrize("verb", ["deploy", "plan"])
def test_a_limit_to_the_gateway_alone_does_nothing_and_says_so(planned: Path, verb: str) -> None:
    put_gateway(planned)
    ran = run(planned, verb, {}, "--limit", "g", "--check")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "Nothing was done: no host of the inventory is in the group 'engines', or --limit leaves none" in ran.stderr
    assert "FAILED" not in ran.stdout


@pytest.mark.parametrize(
    ("verb", "limit"),
    [("plan", "engines"), pytest.param("plan", "all", marks=nightly), pytest.param("deploy", "lost", marks=nightly)],
)
def test_a_limit_that_leaves_the_gateway_as_it_is_says_so(planned: Path, verb: str, limit: str) -> None:
    put_gateway(planned)
    put_role(planned, "preflight/main", [{"ansible.builtin.fail": {"msg": "so far it came"}}])
    ran = run(planned, verb, {"plan_code": False, "gateway_reason": "of no matter"}, "--limit", limit, "--check")
    assert ran.returncode == (2 if verb == "deploy" else 0), ran.stdout + ran.stderr
    said = (
        f"The gateway on g lies outside of --limit {limit}: it keeps its settings and the replicas that it has, at the "
        "places where it has them. Where those change, run 'gateway' afterwards."
    )
    assert (said in " ".join(ran.stdout.split())) is (limit != "all")


def test_a_lost_node_may_be_left_out_by_limit_where_another_takes_its_place(planned: Path) -> None:
    put_role(planned, "preflight/main", [{"ansible.builtin.fail": {"msg": "so far it came"}}])
    ran = run(planned, "replace-node", {"node": "lost", "by": "two"}, "--limit", "one,two", "--check")
    assert "has no attribute" not in ran.stdout + ran.stderr
    assert re.search(r"plan [0-9a-f]{12}: .* on two\n", ran.stdout), ran.stdout + ran.stderr
    assert "so far it came" in ran.stdout


@pytest.fixture
def fronted(project: Path) -> Path:
    """A gateway on a host of its own, in front of two engines."""
    inventory = json.loads((project / "inventory.yml").read_text())
    groups = inventory["all"]["children"]
    groups["engines"]["hosts"] = {name: {"stepladder_state_directory": str(project / name)} for name in ("a", "b")}
    groups["gateway"] = {"hosts": {"g": {"stepladder_state_directory": str(project / "g")}}}
    (project / "inventory.yml").write_text(json.dumps(inventory))
    kept = {"node": {"tools": {"path": "/tools/of/{{ inventory_hostname }}"}}}
    put_role(project, "remove/main", [{"ansible.builtin.set_fact": {"remove_slice": kept}}])
    put_role(project, "gateway/left_behind", [{"ansible.builtin.set_fact": {"gateway_left_behind": False}}])
    for name, more in (("remove/files", ""), ("watchdog/remove", ""), ("gateway/remove", " with {{ gateway_tools }}")):
        text = f"noted: {name} on {{{{ inventory_hostname }}}}{more}"
        put_role(project, name, [{"stepladder.core.show": {"text": text}}])
    return project


@pytest.mark.parametrize(
    ("limit", "status", "done", "said"),
    [
        # The first engine is dead and left out: the survivors and the gateway go.
        ("b,g", 0, ["watchdog/remove on b", "gateway/remove on g with /tools/of/b", "remove/files on b"], ""),
        pytest.param(
            "b", 0, ["watchdog/remove on b", "remove/files on b"],
            "The gateway on g lies outside of --limit b and stays as it is.", marks=nightly,
        ),
        pytest.param("g", 2, [], "Every node of engines that the deployment uses lies outside of", marks=nightly),
    ],
)  # fmt: skip
def test_remove_takes_the_gateway_along_whichever_engines_are_left(
    fronted: Path, limit: str, status: int, done: list[str], said: str
) -> None:
    ran = run(fronted, "remove", {}, "--limit", limit)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert noted(ran) == done
    assert said in ran.stdout
    assert ("stays as it is" in ran.stdout) is ("stays as it is" in said)


@pytest.mark.parametrize(
    ("limit", "status", "done", "said"),
    [
        pytest.param(
            "all", 4, [], "A node did not answer or failed before, as told above, so a could not be asked, and the "
            "gateway goes with the engines. Nothing was changed. Run this again when all nodes answer, or leave out "
            "those that do not (--limit 'all:!NODE').", id="silent",
        ),
        pytest.param(
            "b,g", 2, ["watchdog/remove on b"], "Every node of engines that the deployment uses lies outside of "
            "--limit b,g, and the gateway goes with it.", id="left-out", marks=nightly,
        ),
    ],
)  # fmt: skip
def test_remove_tells_engines_that_do_not_answer_from_those_that_are_left_out(
    fronted: Path, limit: str, status: int, done: list[str], said: str
) -> None:
    """One engine is dead, the other one spare."""
    inventory = json.loads((fronted / "inventory.yml").read_text())
    dead = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": "9"}
    inventory["all"]["children"]["engines"]["hosts"]["a"] |= dead
    (fronted / "inventory.yml").write_text(json.dumps(inventory))
    read = {"ansible.builtin.include_role": {"name": "release", "tasks_from": "read"}}
    put_role(fronted, "remove/main", [read, {"ansible.builtin.meta": "end_host"}])
    ran = run(fronted, "remove", {}, "--limit", limit)
    assert ran.returncode == status, ran.stdout + ran.stderr
    # The run ends for the spare one before or after it was asked, as the two answer.
    assert said in " ".join(ran.stdout.split()).replace("so a, b could", "so a could")
    assert noted(ran) == done


PAIR = KEPT | {
    "node": {"processes": [], "ranks": [{"node": "b", "address": "198.18.0.2"}, {"node": "c", "address": "198.18.0.3"}]}
}
ALONE = KEPT | {"node": {"processes": [], "ranks": []}}


@pytest.mark.parametrize(
    ("verb", "limit", "other", "refused"),
    [
        pytest.param("stop", "b", PAIR, True, id="a-rank-alone"),
        pytest.param("stop", "b,c", PAIR, False, id="all-ranks", marks=nightly),
        # Another node has its place by now.
        pytest.param("stop", "b", ALONE, False, id="a-stranger", marks=nightly),
        pytest.param("stop", "b", None, False, id="the-other-is-down"),
        pytest.param("remove", "b", PAIR, True, id="remove", marks=nightly),
    ],
)
def test_ranks_of_a_replica_stop_together(
    project: Path, verb: str, limit: str, other: dict[str, Any] | None, refused: bool
) -> None:
    inventory = json.loads((project / "inventory.yml").read_text())
    host = {"stepladder_state_directory": str(project / "c")}
    if other is None:
        host |= {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": "9"}
    inventory["all"]["children"]["engines"]["hosts"]["c"] = host
    (project / "inventory.yml").write_text(json.dumps(inventory))
    (project / "b/deployments/d/current/plan.json").write_text(json.dumps(PAIR))
    put_release(project, "c", json.dumps(other or PAIR))
    put_role(project, "engine/stop", [{"stepladder.core.show": {"text": "noted: stopped {{ inventory_hostname }}"}}])
    put_role(project, "remove/find", [{"ansible.builtin.include_role": {"name": "release", "tasks_from": "read"}}])
    shutil.copy(ROOT / "roles/remove/tasks/main.yml", project / "roles/remove/tasks")
    ran = run(project, verb, {}, "--limit", limit)
    assert ran.returncode == (2 if refused else 0), ran.stdout + ran.stderr
    said = (
        "--limit leaves out c of the replica on b, c, whose ranks run and stop together. Limit to whole replicas, or "
        "leave --limit out. Nothing was changed."
    )
    assert (said in " ".join(ran.stdout.split())) is refused
    assert noted(ran) == ([] if refused else [f"stopped {name}" for name in limit.split(",")])
    assert (project / "b/audit").exists() is not refused


@pytest.mark.parametrize("form", ["json", pytest.param("human", marks=nightly)])
def test_status_names_a_release_that_cannot_be_read(project: Path, form: str) -> None:
    """Also beside a node that runs another replica, where one without any release would be a spare one."""
    put_release(project, "a-spare", json.dumps(KEPT | {"endpoints": [ENDPOINT]}))
    states = [{"name": "engine-0", "phase": "ready", "detail": "port 8000 answers 200"}]
    put_role(project, "engine/status", [{"ansible.builtin.set_fact": {"service_states": states}}])
    file = project / "b/deployments/d/current/plan.json"
    file.write_text('{"plan_id": ')
    ran = run(project, "status", {"status_format": form})
    assert ran.returncode == ExitStatus.NOT_READY, ran.stdout + ran.stderr
    said = f"its release cannot be read, {file}: Expecting value: line 1 column 13 (char 12); run the verb 'deploy'"
    if form == "json":
        told, _ = json.JSONDecoder().raw_decode(ran.stdout, ran.stdout.index("{"))
        assert told["ready"] is False
        rows = {row["node"]: (row["phase"], row["detail"]) for row in told["processes"]}
        assert rows == {"a-spare": ("ready", states[0]["detail"]), "b": ("unknown", f"{said}, which writes it again")}
    else:
        assert said in ran.stdout
        assert "nothing is deployed" not in ran.stdout


@pytest.mark.parametrize("verb", ["stop", pytest.param("verify", marks=nightly)])
def test_a_release_that_cannot_be_read_is_not_taken_for_none(project: Path, verb: str) -> None:
    """What it runs goes on, and the verb must not end as though nothing did."""
    (project / "b/deployments/d/current/plan.json").write_text('{"plan_id": ')
    ran = run(project, verb, {})
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "b/deployments/d/current/plan.json: Expecting value" in ran.stdout
    assert "b: nothing is deployed" not in ran.stdout
    assert "Run the verb 'deploy': it writes the release again." in " ".join(ran.stdout.split())
