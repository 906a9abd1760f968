"""Verbs that take no lease: who may run them, and what they leave in the log; the playbooks and roles themselves.

Stand-ins take the place of the roles that reach gateways and engines.
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
import verbs
from ansible_collections.stepladder.core.plugins.module_utils import lease
from verbs import ROOT

from stepladder.exit_status import ExitStatus

BUILTIN = "ansible.builtin"
SLICE = {"plan_id": "p", "node": {"ranks": []}}
STAND_INS = (
    *("gateway/drain", "gateway/undrain", "gateway/main", "gateway/check", "gateway/remove"),
    *("watchdog/main", "stop/check", "stop/main"),
)
NAMED = ("confirm", "prod")
REPLICA = ("replica", "1")
nightly = pytest.mark.nightly


def note(what: str) -> dict[str, Any]:
    return {"stepladder.core.show": {"text": f"noted: {what} on {{{{ inventory_hostname }}}}"}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """One engine of a protected cluster and a gateway on a host of its own, both on this machine."""
    tasks = {name: [note(name)] for name in STAND_INS}
    # A stand-in that fails, as a drain does whose requests do not end.
    tasks["gateway/drain"].append({f"{BUILTIN}.assert": {"that": "breaks | default('no') == 'no'"}})
    tasks["gateway/main"].append({f"{BUILTIN}.assert": {"that": "gateway_plan.nodes | length == 1"}})
    tasks["gateway/undrain"].append({f"{BUILTIN}.assert": {"that": "gateway_at_work == ''"}})
    for name in ("defaults", "vars"):
        shutil.copytree(ROOT / "roles/gateway" / name, tmp_path / "roles/gateway" / name)
    plan = {"gateway": "{{ gateway_hosts | first | default(none) }}", "nodes": [{"tools": {"path": "/none"}}]}
    for name in ("deployment/main", "release/require"):
        tasks[name] = [{f"{BUILTIN}.set_fact": {"deployment_slice": SLICE, "deployment_plan": plan}}]
    for name, content in tasks.items():
        role, _, file = name.partition("/")
        (tmp_path / f"roles/{role}/tasks").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"roles/{role}/tasks/{file}.yml").write_text(json.dumps(content))
    for name in ("left_behind", "within_limit"):
        shutil.copy(ROOT / f"roles/gateway/tasks/{name}.yml", tmp_path / "roles/gateway/tasks")
    common = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_name": "d",
    }  # fmt: skip
    # Of the host, which the project's own for all groups do not override.
    hosts = {name: {"stepladder_state_directory": str(tmp_path / name)} for name in ("a", "g")}
    groups = {
        "engines": {"hosts": {"a": hosts["a"]}, "vars": {"confirm_cluster": "prod"}},
        "gateway": {"hosts": {"g": hosts["g"]}},
    }
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"children": groups, "vars": common}}))
    return tmp_path


def run(project: Path, verb: str, *variables: tuple[str, str], limit: str = "all") -> subprocess.CompletedProcess[str]:
    return verbs.run(project, verb, dict(variables), "--limit", limit)


def lines(log: Path) -> list[tuple[str, ...]]:
    """What a log says of each verb: event, verb, why and outcome."""
    told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(each["event"], each.get("verb", ""), each["why"], each.get("outcome", "")) for each in told]


def because(verb: str) -> tuple[str, str]:
    return f"{verb}_reason", "it is sick"


VERBS = [
    pytest.param(
        "drain", [REPLICA, because("drain")], "gateway/drain on g", "g", "replica 1: it is sick", id="drain"
    ),
    pytest.param("drain", [REPLICA], "gateway/drain on g", "g", "replica 1", id="drain-without-reason", marks=nightly),
    pytest.param(
        "undrain", [REPLICA, because("undrain")], "gateway/undrain on g", "g", "replica 1: it is sick", id="undrain",
        marks=nightly,
    ),
    pytest.param("gateway", [], "gateway/main on g", "g", "", id="gateway-without-reason", marks=nightly),
    pytest.param(
        "gateway", [because("gateway")], "gateway/main on g", "g", "it is sick", id="gateway", marks=nightly
    ),
    pytest.param(
        "watchdog", [because("watchdog")], "watchdog/main on a", "a", "off: it is sick", id="watchdog", marks=nightly
    ),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "more", "does", "host", "why"), VERBS)
def test_what_goes_through_a_freeze_asks_for_the_name_and_is_written_down(
    project: Path, verb: str, more: list[tuple[str, str]], does: str, host: str, why: str
) -> None:
    assert lease.freeze(str(project / "a"), "ann", "ops1", "trade fair")
    refused = run(project, verb, *more, ("confirm", "prod2"))
    assert refused.returncode == ExitStatus.NOT_CONFIRMED, refused.stdout + refused.stderr
    assert "protected cluster prod, and 'prod2' was given" in refused.stdout
    assert does not in refused.stdout
    done = run(project, verb, *more, NAMED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert does in re.findall("noted: (.*)", done.stdout)
    expected = [("begin", verb, why, ""), ("end", verb, why, "done")]
    assert [line for line in lines(project / host / "audit/audit.jsonl") if line[0] != "freeze"] == expected
    assert lines(project / "state/stepladder/audit.jsonl") == expected


@pytest.mark.parametrize("reason", ["", pytest.param("maintenance of the rack", marks=nightly)])
def test_what_takes_the_lease_says_why(project: Path, reason: str) -> None:
    """As its own verb says, and not as another one of the same inventory."""
    ran = run(project, "stop", NAMED, ("stop_reason", reason), because("redeploy"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for log in ("a/audit/audit.jsonl", "state/stepladder/audit.jsonl"):
        assert lines(project / log) == [("begin", "stop", reason, ""), ("end", "stop", reason, "done")]


def test_a_deploy_with_the_reason_of_a_redeploy_has_one() -> None:
    asked = [sys.executable, "-m", "ansible", "adhoc", "-i", "localhost,", "--playbook-dir", "playbooks", "localhost"]
    said = ["-c", "local", "-m", "ansible.builtin.debug", "-a", "msg={{ deploy_reason }}", "-e", "redeploy_reason=rack"]
    done = subprocess.run([*asked, *said], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "rack" in done.stdout, done.stdout + done.stderr


def test_the_reason_of_every_verb_is_in_the_manual() -> None:
    files = [*ROOT.glob("playbooks/*.yml"), *ROOT.glob("roles/*/*/*.yml")]
    found = {verb for file in files for verb in re.findall(r"lease_verb: ([a-z-]+)", file.read_text())}
    manual = (ROOT / "docs/on-call.md").read_text()
    assert {"deploy", "weights-prune"} <= found
    assert [verb for verb in sorted(found) if f"`{verb.replace('-', '_')}_reason`" not in manual] == []


@pytest.mark.parametrize(
    ("host", "left", "done"),
    [
        pytest.param("g", True, ["gateway/check on a", "gateway/main on g", "gateway/remove on a"], id="moved"),
        pytest.param("", True, ["gateway/remove on a"], id="given-up", marks=nightly),
        pytest.param("", False, ["gateway/check on a"], id="never-there", marks=nightly),
        pytest.param("a", True, ["gateway/check on a", "gateway/main on a"], id="at-its-place", marks=nightly),
    ],
)
def test_a_gateway_that_is_left_behind_goes_after_the_other_is_there(
    project: Path, host: str, left: bool, done: list[str]
) -> None:
    inventory = json.loads((project / "inventory.yml").read_text())
    inventory["all"]["hosts"] = inventory["all"]["children"]["gateway"]["hosts"]
    inventory["all"]["children"]["gateway"]["hosts"] = {host: {}} if host else {}
    (project / "inventory.yml").write_text(json.dumps(inventory))
    if left:
        (project / "a/gateway/d/current").mkdir(parents=True)
    ran = run(project, "gateway", NAMED)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.findall("noted: (.*)", ran.stdout) == done
    if done[-1] == "gateway/remove on a":
        assert lines(project / "a/audit/audit.jsonl")[-1] == ("end", "gateway", "left behind", "done")


@pytest.mark.parametrize(
    ("limit", "variables", "done"),
    [
        pytest.param("g", [], False, id="nobody-asked"),
        pytest.param("g", [("gateway_allow_rollout", "true")], True, id="whatever-it-is", marks=nightly),
        pytest.param("g,engines", [], True, id="asked", marks=nightly),
    ],
)
def test_undrain_refuses_where_nobody_was_asked_for_a_rollout(
    project: Path, limit: str, variables: list[tuple[str, str]], done: bool
) -> None:
    """The lease of a rollout lies on the engines' nodes, and --limit may leave them out."""
    ran = run(project, "undrain", REPLICA, NAMED, *variables, limit=limit)
    assert (ran.returncode == 0) is done, ran.stdout + ran.stderr
    assert ("noted: gateway/undrain on g" in ran.stdout) is done
    said = "outside of --limit: a. So nobody knows whether a rollout that is still at work took the replica out."
    assert (said in " ".join(ran.stdout.split())) is not done
    assert lines(project / "g/audit/audit.jsonl")[1:] == ([("end", "undrain", "replica 1", "done")] if done else [])


@pytest.mark.parametrize("verb", ["drain", *(pytest.param(verb, marks=nightly) for verb in ("undrain", "gateway"))])
def test_a_limit_that_leaves_the_gateway_out_is_refused(project: Path, verb: str) -> None:
    ran = run(project, verb, REPLICA, NAMED, limit="engines")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    said = "The gateway's host g lies outside of --limit engines, so nothing would be done there."
    assert said in " ".join(ran.stdout.split())
    assert "noted: " not in ran.stdout
    # Another engine than the first of the inventory is enough.
    inventory = json.loads((project / "inventory.yml").read_text())
    inventory["all"]["children"]["engines"]["hosts"]["b"] = {"stepladder_state_directory": str(project / "b")}
    (project / "inventory.yml").write_text(json.dumps(inventory))
    both = run(project, verb, REPLICA, NAMED, ("gateway_allow_rollout", "true"), limit="b,g")
    assert both.returncode == 0, both.stdout + both.stderr
    assert f"noted: gateway/{verb.replace('gateway', 'main')} on g" in both.stdout


@pytest.mark.parametrize("verb", ["gateway", "status", "diagnose"])
def test_a_limit_that_leaves_every_engine_out_is_refused(project: Path, verb: str) -> None:
    ran = run(project, verb, NAMED, limit="g")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "Every node of engines lies outside of --limit" in ran.stdout
    assert "noted: " not in ran.stdout


def test_what_an_engine_has_beside_a_gateway_that_is_left_behind_stays(project: Path) -> None:
    """The role's own removal."""
    shutil.copy(ROOT / "roles/gateway/tasks/remove.yml", project / "roles/gateway/tasks")
    shutil.copytree(ROOT / "roles/release", project / "roles/release", dirs_exist_ok=True)
    for place in ("gateway/d/current", "gateway/other/current", "cache/engines/empty"):
        (project / "a" / place).mkdir(parents=True)
    ran = run(project, "gateway", NAMED)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not (project / "a/gateway/d").exists()
    assert (project / "a/gateway/other/current").is_dir()
    assert (project / "a/cache/engines/empty").is_dir()


@nightly
def test_a_drain_that_fails_is_written_down_as_such(project: Path) -> None:
    done = run(project, "drain", REPLICA, NAMED, ("breaks", "yes"))
    assert done.returncode == 2, done.stdout + done.stderr
    for log in ("g/audit/audit.jsonl", "state/stepladder/audit.jsonl"):
        assert [line[-1] for line in lines(project / log)] == ["", "failed"], log


FREEZE_WORDS = "is written down with its reason: add -e \"freeze_reason='...'\". Nothing was changed."
REFUSALS = [
    pytest.param("stop", [NAMED], ExitStatus.FROZEN, "a: frozen by ann from ops1", id="frozen"),
    pytest.param("unfreeze", [("freeze_reason", "over")], ExitStatus.NOT_CONFIRMED, "no name was given", id="unfreeze"),
    pytest.param("unfreeze", [NAMED], 2, f"Why? The end of a freeze {FREEZE_WORDS}", id="why-unfreeze", marks=nightly),
    pytest.param("freeze", [NAMED], 2, f"Why? A freeze {FREEZE_WORDS}", id="why-freeze", marks=nightly),
    pytest.param(
        "lease", [("lease_break_reason", "gone")], ExitStatus.NOT_CONFIRMED, "no name was given", id="break",
        marks=nightly,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "variables", "status", "words"), REFUSALS)
def test_what_is_refused_changes_nothing(
    project: Path, verb: str, variables: list[tuple[str, str]], status: int, words: str
) -> None:
    assert lease.freeze(str(project / "a"), "ann", "ops1", "trade fair")
    before = {path: path.read_bytes() for path in (project / "a").rglob("*") if path.is_file()}
    done = run(project, verb, *variables)
    assert done.returncode == status, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert words in " ".join(said.split())
    assert {path: path.read_bytes() for path in (project / "a").rglob("*") if path.is_file()} == before


@nightly
def test_the_right_name_ends_a_freeze_and_breaks_a_lease(project: Path) -> None:
    state = str(project / "a")
    other = dict.fromkeys(("run", "who", "origin", "verb", "why", "deployment", "plan_id"), "x")
    assert lease.take(state, {**other, "ttl": 1200.0, "controller": {}})["taken"]
    assert lease.freeze(state, "ann", "ops1", "trade fair")
    assert run(project, "unfreeze", ("freeze_reason", "over"), NAMED).returncode == 0
    assert run(project, "lease", ("lease_break_reason", "gone"), NAMED).returncode == 0
    assert (lease.read(state), lease.read_freeze(state)) == (None, None)


@pytest.mark.parametrize(
    ("verb", "between", "status"),
    [
        pytest.param("rollback", True, ExitStatus.HELD, id="rollback"),
        pytest.param("start", True, ExitStatus.HELD, id="start", marks=nightly),
        # The stand-in for what comes after the lease ends the run.
        pytest.param("rollback", False, 2, id="nobody-between"),
    ],
)
def test_what_was_looked_at_before_another_run_is_not_acted_on(
    project: Path, verb: str, between: bool, status: int
) -> None:
    """Another run ends while this one waits for the name to be typed."""
    state = project / "a"
    others = dict.fromkeys(("run", "who", "origin", "verb", "why", "deployment", "plan_id"), "x")
    assert lease.take(str(state), {**others, "ttl": 120.0, "controller": {}})["taken"]
    assert lease.release(str(state), "x", "done")
    releases = state / "deployments/d/releases"
    for link, name in (("current", "new"), ("previous", "old")):
        (releases / name).mkdir(parents=True)
        (releases / name / "plan.json").write_text(json.dumps({**SLICE, "plan_id": name}))
        (releases.parent / link).symlink_to(f"releases/{name}")
    last = {"content": "another\n", "dest": f"{state}/lease/last", "mode": "0600"}
    for role in ("release", "deployment"):
        shutil.copytree(ROOT / "roles" / role, project / "roles" / role, dirs_exist_ok=True)
    (project / "roles/confirm/tasks").mkdir(parents=True)
    (project / "roles/confirm/tasks/cluster.yml").write_text(json.dumps([{f"{BUILTIN}.copy": last}] if between else []))
    (project / "roles/service/tasks").mkdir(parents=True)
    (project / "roles/service/tasks/main.yml").write_text(json.dumps([note("service"), {f"{BUILTIN}.fail": {}}]))
    done = run(project, verb)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("a: another run changed it since it was looked at; run the same again" in done.stdout) is between
    assert ("noted: service on a" in done.stdout) is not between
