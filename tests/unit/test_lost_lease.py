"""A run that lost its lease starts, marks and replaces nothing more, on no node: the playbooks and roles themselves.

Stand-ins take the place of what reaches engines; what decides, holds the lease and writes outcomes is the real thing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stepladder.core.plugins.module_utils import lease

from stepladder.exit_status import ExitStatus

ROOT = Path(__file__).resolve().parents[2]
BUILTIN = "ansible.builtin"
NODES = {"processes": [], "forget": [], "again": []}
WAVE = {
    "number": 0, "replicas": [0], "drain": [0], "patient": [0], "first": "a", "endpoints": [], "at_once": False,
    "nodes": {"a": NODES, "b": NODES},
}  # fmt: skip
SLICE = {"plan_id": "new", "deployment": {"name": "d"}, "node": {"processes": []}}
KEPT = {"current": False, "missing": [], "written": 0, "runs": "vllm", "speed": {}}
KNOWN = [
    {**KEPT, "plan_id": "new", "current": True, "previous": False, "outcome": "unknown"},
    {**KEPT, "plan_id": "old", "previous": True, "outcome": "proven"},
]


# Of a task file that a stand-in replaces these tasks stay.
HOLD = {"name": "lease", "tasks_from": "hold"}


def fact(**values: Any) -> dict[str, Any]:
    return {"ansible.builtin.set_fact": values}


def note(what: str) -> dict[str, Any]:
    return {"stepladder.core.show": {"text": f"noted: {what}"}, "when": "inventory_hostname == 'a'"}


def broken_at(moment: str, node: str = "b") -> dict[str, Any]:
    """A colleague takes the lease of a node away at that moment."""
    arguments = {"state_directory": "{{ stepladder_state_directory }}", "state": "broken", "why": "ann is on a plane"}
    return {"stepladder.core.lease": arguments, "when": [f"inventory_hostname == '{node}'", f"lost_at == {moment}"]}


STAND_INS: dict[str, list[dict[str, Any]]] = {
    "describe": [
        note("described"),
        fact(release_ready=True, release_rollout={"waves": [WAVE], "text": "", "outage": False, "others": False}),
    ],
    "wave_drain": [note("drained"), broken_at("'drain'", "a"), fact(release_drained=0)],
    "wave_change": [
        note("started"),
        broken_at("('way back' if release_given_up is defined else 'start')"),
        fact(release_started=0, release_stopped_at=0),
        {**fact(release_went="engine_ready: failed"), "when": ["gate == 'red'", "release_given_up is not defined"]},
    ],
    "ask": [],
    "wave_back": [note("put back"), broken_at("'put back'", "a")],
    "evidence": [note("kept"), broken_at("'evidence'")],
    "look": [fact(release_known=KNOWN, release_slices={"new": SLICE, "old": {**SLICE, "plan_id": "old"}})],
    "mark_failed": [note("marked")],
    "part": [
        fact(release_went=False, deployment_slice={**SLICE, "plan_id": "old"}),
        {"ansible.builtin.group_by": {"key": "returning_nodes"}},
    ],
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A playbook that takes the lease of two nodes on this machine and then does what deploy does from there on."""
    role = tmp_path / "roles/release"
    shutil.copytree(ROOT / "roles/release", role)
    for name, tasks in STAND_INS.items():
        file = role / "tasks" / f"{name}.yml"
        holds = [task for task in yaml.safe_load(file.read_text()) if "ansible.builtin.include_role" in task]
        file.write_text(json.dumps([task for task in holds if HOLD in task.values()] + tasks))
    plays = [
        {
            "hosts": "all",
            "gather_facts": False,
            "tasks": [
                {"ansible.builtin.group_by": {"key": "changing_nodes"}},
                {**fact(deployment_slice=SLICE)},
                {"ansible.builtin.include_role": {"name": "lease"}},
            ],
        },
        {"import_playbook": str(ROOT / "playbooks/_start.yml")},
    ]
    (tmp_path / "play.yml").write_text(json.dumps(plays))
    common = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "d",
        "service_manager_used": "supervisor", "release_described_by": "x",
        "release_speed_gate": "off",
    }  # fmt: skip
    hosts = {name: {"stepladder_state_directory": str(tmp_path / name)} for name in ("a", "b")}
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"hosts": hosts, "vars": common}}))
    for name in hosts:
        for release in ("new", "old"):
            (tmp_path / name / "deployments/d/releases" / release).mkdir(parents=True)
    return tmp_path


def run(project: Path, options: Sequence[str] = (), **variables: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "inventory.yml", "play.yml", *options]
    environ = {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "XDG_STATE_HOME": str(project / "state"),
        "ANSIBLE_LOCAL_TEMP": str(project / "tmp"), "ANSIBLE_ROLES_PATH": f"{project / 'roles'}:{ROOT / 'roles'}",
    }  # fmt: skip
    return subprocess.run(
        [*command, "-e", json.dumps(variables)],
        cwd=project, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def proven(project: Path) -> list[str]:
    """The releases that a node has as proven."""
    found = project.glob("*/deployments/d/outcomes/*.json")
    return sorted({path.stem for path in found if json.loads(path.read_text())["outcome"] == "proven"})


WHOLE = ["described", "drained", "started"]
UNTIL_BACK = [*WHOLE, "kept", "marked", *WHOLE]
nightly = pytest.mark.nightly
CASES = [
    pytest.param("never", "red", ExitStatus.WENT_BACK, [*UNTIL_BACK, "put back"], ["old"], id="kept", marks=nightly),
    pytest.param("start", "red", 2, [*WHOLE, "kept"], [], id="lost-before-it-is-red"),
    pytest.param("start", "green", 2, WHOLE, [], id="lost-while-it-loads", marks=nightly),
    pytest.param("put back", "green", 2, [*WHOLE, "put back"], [], id="lost-before-it-is-proven", marks=nightly),
    pytest.param("drain", "green", 2, WHOLE[:2], [], id="lost-while-it-drains", marks=nightly),
    pytest.param("evidence", "red", 2, [*WHOLE, "kept"], [], id="lost-after-it-is-red", marks=nightly),
    pytest.param("way back", "red", 2, UNTIL_BACK, [], id="lost-while-the-way-back-loads", marks=nightly),
]


@pytest.mark.parametrize(("lost_at", "gate", "status", "steps", "outcomes"), CASES)
def test_what_a_run_does_that_loses_its_lease(
    project: Path, lost_at: str, gate: str, status: int, steps: list[str], outcomes: list[str]
) -> None:
    done = run(project, lost_at=lost_at, gate=gate)
    assert done.returncode == status, done.stdout + done.stderr
    noted = re.findall("noted: (.*)", done.stdout)
    assert noted == steps
    assert proven(project) == outcomes
    if lost_at != "never":
        assert "This run lost its lease" in done.stdout
        assert ": the lease was broken, or was given back" in done.stdout


@pytest.mark.nightly
def test_a_chat_is_told_of_a_green_gate(project: Path) -> None:
    told: list[dict[str, Any]] = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (project / "hook").write_text(f"http://127.0.0.1:{server.server_port}/")
        (project / "hook").chmod(0o400)
        done = run(project, lost_at="never", gate="green", notify_url_file=str(project / "hook"))
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(each["event"], each["nodes"]) for each in told] == [
        ("start", ["a", "b"]),
        ("green", ["a", "b"]),
        ("end", ["a", "b"]),
    ]


@pytest.mark.nightly
def test_a_run_says_which_wave_it_is_at(project: Path) -> None:
    """The role's own task files; what they reach on nodes is replaced by a look at what is said meanwhile."""
    waves = [{**WAVE, "endpoints": [{}]}, {**WAVE, "number": 1, "replicas": [], "drain": [2]}]
    rollout = {"waves": waves, "text": "", "outage": False, "others": True, "not_seen": []}
    (project / "roles/release/tasks/describe.yml").write_text(
        json.dumps([fact(release_ready=True, release_rollout=rollout)])
    )
    for name in ("wave_drain", "wave_change", "ask", "wave_back"):
        shutil.copy(ROOT / f"roles/release/tasks/{name}.yml", project / f"roles/release/tasks/{name}.yml")
    look = [
        {f"{BUILTIN}.shell": "cat $ANSIBLE_LOCAL_TEMP/*/stepladder-doing", "register": "at", "changed_when": False},
        {"stepladder.core.show": {"text": "noted: {{ at.stdout }}"}, "when": "inventory_hostname == 'a'"},
    ]
    for name in ("gateway/tasks/rotate", "e/tasks/start", "verify/tasks/main"):
        (project / f"roles/{name}.yml").parent.mkdir(parents=True)
        (project / f"roles/{name}.yml").write_text(json.dumps(look))
    done = run(project, lost_at="never", gate="green", deployment_slice={**SLICE, "deployment": {"engine": "e"}})
    said = re.findall("noted: Start the engine and prove that it answers, (.*): .* : ", done.stdout)
    assert said == [
        "wave 1 of 2: replica 0, draining", "wave 1 of 2: replica 0, starting", "wave 1 of 2: replica 0, asking",
        "wave 1 of 2: replica 0, putting back", "wave 2 of 2: replica 2, draining", "wave 2 of 2: replica 2, stopping",
    ], done.stdout  # fmt: skip


OTHERS = {
    "run": "r", "who": "ann", "origin": "ops1", "verb": "redeploy", "why": "", "deployment": "d", "plan_id": "p",
    "ttl": 1200.0, "controller": {},
}  # fmt: skip


def test_what_cannot_be_drained_ends_the_rollout_and_says_nothing_against_the_release(project: Path) -> None:
    """Replica 0 is through, replica 1 has a request that does not end."""
    tasks = project / "roles/release/tasks"
    second = {**WAVE, "number": 1, "replicas": [1], "drain": [1], "patient": [1]}
    waves = {"waves": [WAVE, second], "text": "", "outage": False, "others": True, "not_seen": []}
    (tasks / "describe.yml").write_text(
        json.dumps([note("described"), fact(release_ready=True, release_rollout=waves)])
    )
    shutil.copy(ROOT / "roles/release/tasks/wave_drain.yml", tasks)
    (project / "roles/gateway/tasks").mkdir(parents=True)
    in_flight = "Replica 1 still has 3 request(s) in flight after 600 s."
    stays = {f"{BUILTIN}.fail": {"msg": in_flight}, "when": "gateway_replicas == [1]"}
    (project / "roles/gateway/tasks/rotate.yml").write_text(json.dumps([note("rotated"), stays]))
    done = run(project, lost_at="never", gate="green")
    assert done.returncode == ExitStatus.NOT_DRAINED, done.stdout + done.stderr
    assert re.findall("noted: (.*)", done.stdout) == ["described", "rotated", "started", "put back", "rotated"]
    assert proven(project) == []
    assert not [*project.glob("*/deployments/d/outcomes/*.json")]
    assert "Release new goes no further: replica 1 could not be taken out of rotation:" in done.stdout
    assert in_flight in done.stdout
    assert "Replica 0 has it and answers as promised." in done.stdout
    assert [lease.read(str(project / name)) for name in "ab"] == [None, None]
    ends = [json.loads(line) for line in (project / "a/audit/audit.jsonl").read_text().splitlines()]
    assert ends[-1]["outcome"] == "not_drained"


@pytest.mark.parametrize(
    ("runs", "ends", "steps", "outcomes"),
    [
        # Replica 1 goes: last, when the release is proven.
        pytest.param("e-1", True, [*WHOLE, "put back", "requests", "dropped"], ["new"], id="goes"),
        pytest.param("e-1", False, [*WHOLE, "put back", "requests"], ["new"], id="goes-not"),
        # Replica 0 was here: first.
        pytest.param("e-0", True, ["requests", "dropped", *WHOLE, "put back"], ["new"], id="moves", marks=nightly),
        pytest.param("e-0", False, ["requests"], [], id="moves-not"),
    ],
)
def test_when_a_node_without_a_part_is_stopped_and_what_a_request_there_does_that_does_not_end(
    project: Path, runs: str, ends: bool, steps: list[str], outcomes: list[str]
) -> None:
    """Node a changes, b is dropped; the real drop, and stand-ins for the gateway and the engine there."""
    plays = json.loads((project / "play.yml").read_text())
    (project / "b/deployments/d/.stepladder").touch()
    moves = runs == "e-0"
    mine = {"name": "e-0", "stop_seconds": 10, "env": {}, "argv": ["e"], "health": {"port": 8000}}
    # Where it moves another replica answers, or nobody would wait for its requests.
    deployment = {"name": "d", "replicas": 2 if moves else 1}
    kept = {"plan_id": "new", "deployment": deployment, "node": {"processes": [mine] if moves else []}}
    before = {"plan_id": "old", "deployment": {"engine": "e"}, "node": {"processes": [{"name": runs}]}}
    group = "{{ 'changing_nodes' if inventory_hostname == 'a' else 'dropped_nodes' }}"
    plays[0]["tasks"][:2] = [{f"{BUILTIN}.group_by": {"key": group}}, fact(deployment_slice=kept)]
    (project / "play.yml").write_text(json.dumps(plays))
    wave = {**WAVE, "nodes": {"a": NODES}}
    rollout = {"waves": [wave], "text": "", "outage": False, "others": False, "not_seen": []}
    role = project / "roles/release/tasks"
    described = [note("described"), fact(release_ready=True, release_rollout=rollout)]
    (role / "describe.yml").write_text(json.dumps(described))
    (role / "look.yml").write_text(json.dumps([fact(release_deployments={"d": before})]))
    in_flight = {f"{BUILTIN}.fail": {"msg": "Replica has 3 request(s) in flight."}, "when": not ends}
    told = {"stepladder.core.show": {"text": "noted: {{ what }}"}}
    stand_ins = {
        "gateway/tasks/rotate": [{**told, "vars": {"what": "requests"}}, in_flight],
        "service/tasks/main": [],
        "e/tasks/remove": [{**told, "vars": {"what": "dropped"}}],
    }
    for name, tasks in stand_ins.items():
        (project / f"roles/{name}.yml").parent.mkdir(parents=True)
        (project / f"roles/{name}.yml").write_text(json.dumps(tasks))
    done = run(project, lost_at="never", gate="green")
    assert done.returncode == (0 if ends else ExitStatus.NOT_DRAINED), done.stdout + done.stderr
    assert re.findall("noted: (.*)", done.stdout) == steps
    assert proven(project) == outcomes
    text = f"Release new goes no further: replica {runs[-1]} could not be taken out of rotation:"
    assert (text in done.stdout) is not ends
    assert ("Replica has 3 request(s) in flight." in done.stdout) is not ends
    assert [lease.read(str(project / name)) for name in "ab"] == [None, None]
    audit = [json.loads(line) for line in (project / "b/audit/audit.jsonl").read_text().splitlines()]
    assert audit[-1]["outcome"] == ("done" if ends else "not_drained")


def test_a_run_that_is_refused_asks_no_node_after_that(project: Path) -> None:
    """The third of four in sorted order is held; the inventory has them in another."""
    names = ["d", "c", "b", "a"]
    inventory = json.loads((project / "inventory.yml").read_text())
    inventory["all"]["hosts"] = {name: {"stepladder_state_directory": str(project / name)} for name in names}
    (project / "inventory.yml").write_text(json.dumps(inventory))
    plays = json.loads((project / "play.yml").read_text())
    plays[0]["tasks"] = plays[0]["tasks"][:2]
    plays[1] = {"import_playbook": str(ROOT / "playbooks/_lease.yml")}
    (project / "play.yml").write_text(json.dumps(plays))
    assert lease.take(str(project / "c"), OTHERS)["taken"]
    done = run(project)
    assert done.returncode == ExitStatus.HELD, done.stdout + done.stderr
    assert "c: held by ann from ops1: redeploy d p" in done.stdout
    assert "did not answer" not in done.stdout
    asked = {name: (project / name / "lease/last").exists() for name in sorted(names)}
    assert asked == {"a": True, "b": True, "c": True, "d": False}
    assert [lease.read(str(project / name)) is None for name in "abd"] == [True] * 3
    assert not (project / "d/audit").exists()


def test_a_rollout_that_cannot_be_is_refused_before_the_lease(project: Path) -> None:
    """Later it would have the release marked as failed that it made current, and nothing could be brought back."""
    plays = json.loads((project / "play.yml").read_text())
    plays[0]["tasks"] = plays[0]["tasks"][:2]
    plays.insert(1, {"import_playbook": str(ROOT / "playbooks/_lease.yml")})
    (project / "play.yml").write_text(json.dumps(plays))
    before = sorted(project.glob("[ab]/**"))
    done = run(project, lost_at="never", gate="green", deploy_max_unavailable=0)
    assert done.returncode == 2, done.stdout + done.stderr
    words = "deploy_max_unavailable is 0: give a number of replicas, 1 or more. Nothing was changed."
    assert words in " ".join((done.stdout + done.stderr).split())
    assert "noted: " not in done.stdout
    assert sorted(project.glob("[ab]/**")) == before


def test_every_verb_that_rolls_out_takes_its_lease_there() -> None:
    imported = f"{BUILTIN}.import_playbook"
    started = []
    for path in sorted((ROOT / "playbooks").glob("*.yml")):
        imports = [play[imported] for play in yaml.safe_load(path.read_text()) if imported in play]
        if "_start.yml" in imports:
            started.append(path.stem)
            assert imports.index("_lease.yml") < imports.index("_start.yml"), path.name
    assert started == ["deploy", "rollback", "start"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fails", "status", "lines"),
    [
        ("drain", ExitStatus.NOT_DRAINED,
         ["Release old is back but for replica 0: replica 0 could not be taken out of rotation:",
          "Replica 1 has it and answers as promised.", "To finish it: rollback -e rollback_to=old."]),
        # What could not be drained on the way forth is no matter of the way back.
        ("start", ExitStatus.NO_WAY_BACK, ["Release old was to be brought back, and does not serve either:"]),
    ],
)  # fmt: skip
def test_a_way_back_that_cannot_drain_leaves_the_rest_as_it_is(
    project: Path, fails: str, status: int, lines: list[str]
) -> None:
    """Replica 1 is red; replica 0, which has the new release, has a request that does not end."""
    tasks = project / "roles/release/tasks"
    second = {**WAVE, "number": 1, "replicas": [1], "drain": [1], "patient": [1]}
    forth = {"waves": [WAVE, second], "text": "", "outage": False, "others": True, "not_seen": []}
    back = {**forth, "waves": [{**second, "number": 0}, {**WAVE, "number": 1}]}
    choose = "{{ back if release_given_up is defined else forth }}"
    (tasks / "describe.yml").write_text(
        json.dumps([note("described"), fact(release_ready=True, release_rollout=choose)])
    )
    shutil.copy(ROOT / "roles/release/tasks/wave_drain.yml", tasks)
    started = fact(release_started="{{ release_wave.number }}", release_stopped_at=0)
    forward = {"when": ["release_wave.number == 1", "release_given_up is not defined"]}
    red = {**fact(release_went="engine_ready: failed"), **forward}
    held = {**fact(release_not_drained="{{ [0] if inventory_hostname == 'a' else [] }}"), **forward}
    only = ["release_given_up is defined", "fails == 'start'", "inventory_hostname == 'a'"]
    dead = {**fact(release_went="engine_ready: dead"), "when": only}
    (tasks / "wave_change.yml").write_text(json.dumps([note("started"), started, red, held, dead]))
    (project / "roles/gateway/tasks").mkdir(parents=True)
    stays = {
        f"{BUILTIN}.fail": {"msg": "Replica 0 still has 3 request(s) in flight after 600 s."},
        "when": ["gateway_replicas == [0]", "release_given_up is defined", "fails == 'drain'"],
    }
    (project / "roles/gateway/tasks/rotate.yml").write_text(json.dumps([note("rotated"), stays]))
    done = run(project, lost_at="never", fails=fails, forth=forth, back=back)
    assert done.returncode == status, done.stdout + done.stderr
    for line in lines:
        assert line in done.stdout
    assert proven(project) == []
    assert [lease.read(str(project / name)) for name in "ab"] == [None, None]


@pytest.mark.nightly
def test_a_node_that_dies_while_evidence_is_gathered_takes_the_ending_not_with_it(project: Path) -> None:
    dies = {"stepladder.core.deployments": {"state_directory": "/nowhere"}, "when": "inventory_hostname == 'a'"}
    dead = {**dies, "vars": {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}}
    (project / "roles/release/tasks/evidence.yml").write_text(json.dumps([note("kept"), dead]))
    only = {"plan_id": "old", "nodes": ["b"], "leaves": [], "refusal": "", "left": "Not brought back: a died."}
    (project / "roles/release/tasks/part.yml").write_text(json.dumps([fact(release_choice=only), *STAND_INS["part"]]))
    done = run(project, lost_at="never", gate="red")
    assert done.returncode == ExitStatus.WENT_BACK, done.stdout + done.stderr
    assert "Release old serves again: it was asked and answers as promised" in done.stdout
    assert "Not brought back: a died." in done.stdout
    assert proven(project) == ["old"]
    assert lease.read(str(project / "b")) is None


@pytest.mark.parametrize("frozen", [pytest.param(False, id="free"), pytest.param(True, id="frozen-meanwhile")])
def test_a_deploy_keeps_its_lease_until_the_gateway_is_as_planned(project: Path, frozen: bool) -> None:
    """What deploy does from the start on; the gateway's stand-in looks whose the nodes are."""
    if frozen:
        arguments = {"state_directory": "{{ stepladder_state_directory }}", "state": "frozen", "why": "trade fair"}
        freeze = {"stepladder.core.lease": arguments}
        wave_back = project / "roles/release/tasks/wave_back.yml"
        wave_back.write_text(json.dumps([*json.loads(wave_back.read_text()), freeze]))
    plays = yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text())
    start = next(number for number, play in enumerate(plays) if "_start.yml" in json.dumps(play))
    plays[start][f"{BUILTIN}.import_playbook"] = str(ROOT / "playbooks/_start.yml")
    head = json.loads((project / "play.yml").read_text())[0]
    head["tasks"] += [{f"{BUILTIN}.group_by": {"key": name}} for name in ("planned_nodes", "gateway")]
    # The last one shows how to use it.
    (project / "play.yml").write_text(json.dumps([head, *plays[start:-1]]))
    (project / "roles/gateway/tasks").mkdir(parents=True)
    look = {"stepladder.core.lease": {"state_directory": "{{ stepladder_state_directory }}", "state": "read"}}
    said = note("{{ 'mine' if whose.mine else 'free' }}")
    (project / "roles/gateway/tasks/main.yml").write_text(json.dumps([{**look, "register": "whose"}, said]))
    done = run(project, lost_at="never", gate="green", watchdog_mode="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("noted: (.*)", done.stdout) == [*WHOLE, "put back", "mine"]
    for name in "ab":
        assert lease.read(str(project / name)) is None
        ends = [json.loads(line) for line in (project / name / "audit/audit.jsonl").read_text().splitlines()]
        ends = [line for line in ends if line["event"] != "freeze"]
        assert [(line["event"], line.get("outcome")) for line in ends] == [("begin", None), ("end", "done")]


ELSEWHERE = "a: it has replica 0 at 198.18.0.1:9000, and it answers at 198.18.0.1:8000"


@pytest.mark.parametrize(
    ("verb", "port", "follows", "limit", "status", "said"),
    [
        pytest.param("rollback", 9000, True, "all", 0, ["a: follows, mine"], id="rollback-elsewhere"),
        pytest.param("rollback", 9000, False, "all", 10, ["a: the gateway: it is ill", ELSEWHERE],
                     id="rollback-and-the-gateway-cannot-follow", marks=nightly),
        pytest.param("rollback", 9000, True, "a", 10, [ELSEWHERE], id="rollback-of-some", marks=nightly),
        pytest.param("rollback", 8000, True, "all", 0, [], id="rollback-there", marks=nightly),
        pytest.param("start", 9000, True, "all", 0, ["a: follows, mine"], id="start-elsewhere", marks=nightly),
    ],
)  # fmt: skip
def test_the_gateway_is_taken_along_to_where_a_release_is_back(
    project: Path, verb: str, port: int, follows: bool, limit: str, status: int, said: list[str]
) -> None:
    """What the verb does from the start on; the gateway's stand-in has replica 0 at the port, until it follows."""
    plays = yaml.safe_load((ROOT / f"playbooks/{verb}.yml").read_text())
    start = next(number for number, play in enumerate(plays) if "_start.yml" in json.dumps(play))
    for play in plays[start:]:
        play[f"{BUILTIN}.import_playbook"] = str(ROOT / "playbooks" / play[f"{BUILTIN}.import_playbook"])
    head = json.loads((project / "play.yml").read_text())[0]
    kept = {**SLICE, "endpoints": [{"replica": 0, "node": "a", "base_url": "http://198.18.0.1:8000/v1"}]}
    head["tasks"][1:2] = [{f"{BUILTIN}.group_by": {"key": "gateway"}}, fact(deployment_slice=kept)]
    (project / "play.yml").write_text(json.dumps([head, *plays[start:]]))
    (project / "roles/status/tasks").mkdir(parents=True)
    place = f"198.18.0.1:{{{{ front_port | default({port}) }}}}"
    fronts = {"results": [{"item": "a", "gateway": {"servers": [{"replica": 0, "place": place}]}}]}
    (project / "roles/status/tasks/fronts.yml").write_text(json.dumps([fact(status_fronts=fronts)]))
    (project / "roles/gateway/tasks").mkdir(parents=True)
    look = {"stepladder.core.lease": {"state_directory": "{{ stepladder_state_directory }}", "state": "read"}}
    lines = "{{ inventory_hostname }}: follows, {{ 'mine' if whose.mine else 'free' }}"
    follow = [{**look, "register": "whose"}, {"stepladder.core.show": {"text": lines}}, fact(front_port=8000)]
    ill = [{f"{BUILTIN}.fail": {"msg": "it is ill"}}]
    (project / "roles/gateway/tasks/follow.yml").write_text(json.dumps(follow if follows else ill))
    done = run(project, lost_at="never", gate="green", options=["--limit", limit] if limit != "all" else [])
    assert done.returncode == status, done.stdout + done.stderr
    assert proven(project) == ["new"]
    known = ["a: follows, mine", "a: the gateway: it is ill", ELSEWHERE]
    assert [line for line in known if line in done.stdout] == said
    assert [lease.read(str(project / name)) for name in "ab"] == [None, None]


@pytest.mark.parametrize(("somebody", "status"), [(False, 0), (True, ExitStatus.HELD)], ids=["nobody", "somebody"])
def test_a_deploy_that_has_nothing_to_do_leaves_the_gateway_to_who_is_at_work(
    project: Path, somebody: bool, status: int
) -> None:
    plays = yaml.safe_load((ROOT / "playbooks/deploy.yml").read_text())
    after = next(
        number for number, play in enumerate(plays) if "_start.yml" in play.get(f"{BUILTIN}.import_playbook", "")
    )
    groups = [{f"{BUILTIN}.group_by": {"key": name}} for name in ("planned_nodes", "gateway")]
    head = {"hosts": "all", "gather_facts": False, "tasks": groups}
    (project / "play.yml").write_text(json.dumps([head, *plays[after + 1 :]]))
    for role in ("gateway", "watchdog"):
        (project / f"roles/{role}/tasks").mkdir(parents=True)
        (project / f"roles/{role}/tasks/main.yml").write_text(json.dumps([note(role)]))
    if somebody:
        assert lease.take(str(project / "b"), OTHERS)["taken"]
    done = run(project, watchdog_mode="observe")
    assert done.returncode == status, done.stdout + done.stderr
    assert re.findall("noted: (.*)", done.stdout) == ([] if somebody else ["watchdog", "gateway"])
    assert ("b: held by ann from ops1: redeploy d p" in done.stdout) is somebody
