"""Texts that the reading verbs print, and the small decisions about units."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepladder import durations, show, status, units
from stepladder.catalogue import Catalogue
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request

ROOT = Path(__file__).resolve().parents[2]
KEPT = {"plan_id": "abc", "endpoints": [{"node": "n0", "replica": 0, "base_url": "http://127.0.0.1:8000/v1"}]}


def state(**changes: Any) -> dict[str, Any]:
    return {
        "name": "vllm-0", "unit": "local-vllm-0", "phase": "ready", "detail": "port 8000 answers 200", "since": 3725.0,
        "pid": 42, "running": True, "outdated": False, "orphans": [], "log": "/l/vllm-0.log", "log_tail": ["up"],
        **changes,
    }  # fmt: skip


def local_plan(**wish: Any) -> Plan:
    node = {"name": "localhost", "address": "127.0.0.1", "gpu": "cpu"}
    deployment = {"model": "tiny-step3p5", "engine": "vllm", "name": "local", **wish}
    return make_plan(parse_request({"deployment": deployment, "nodes": [node]}), Catalogue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert durations.duration(seconds) == text


def test_status_table_of_a_ready_and_a_silent_node() -> None:
    variables = {"n0": {"status_rows": status.rows("n0", KEPT, [state()])}, "n1": {}}
    told = status.report(variables, ["n0", "n1"])
    assert told["exit_status"] == "unreachable"
    assert told["text"].splitlines() == [
        "NODE  PROCESS  PHASE        SINCE      RELEASE  DETAIL",
        "n0    vllm-0   ready        1 h 2 min  abc      port 8000 answers 200",
        "n1    -        unreachable  -          -        the node did not answer",
        "Endpoint: http://127.0.0.1:8000/v1",
    ]


def test_two_replicas_of_a_node_have_an_endpoint_each() -> None:
    node = {"name": "n0", "address": "198.18.0.1", "gpu": "h200"}
    wish = {"model": "step-3.7-flash", "engine": "vllm", "parallel": "tp4", "replicas": 2}
    kept = make_plan(parse_request({"deployment": wish, "nodes": [node]}), Catalogue()).slices()["n0"]
    states = [state(name=process["name"]) for process in kept["node"]["processes"]]
    told = status.report({"n0": {"status_rows": status.rows("n0", kept, states)}}, ["n0"], "json")
    shown = ("process", "replica", "rank", "endpoint")
    assert [tuple(row[name] for name in shown) for row in json.loads(told["text"])["processes"]] == [
        ("vllm-0", 0, 0, "http://198.18.0.1:8000/v1"),
        ("vllm-1", 1, 0, "http://198.18.0.1:8001/v1"),
    ]


def test_ranks_of_a_replica_are_told_apart() -> None:
    nodes = [{"node": f"n{rank}", "address": f"198.18.0.{rank + 1}"} for rank in range(2)]
    rows = [
        row
        for rank in range(2)
        for row in status.rows(f"n{rank}", {**KEPT, "node": {"rank": rank, "ranks": nodes}}, [state()])
    ]
    told = json.loads(status.text(rows, "json"))["processes"]
    assert [(row["replica"], row["rank"], row["endpoint"]) for row in told] == [
        (0, 0, "http://127.0.0.1:8000/v1"),
        (0, 1, None),
    ]
    assert [line[4:19] for line in status.text(rows).splitlines()[1:3]] == ["  vllm-0 rank 0", "  vllm-0 rank 1"]


def test_a_node_that_the_deployment_does_not_need_is_no_fault() -> None:
    ranks = {"node": {"ranks": [{"node": "n0", "address": "198.18.0.1"}, {"node": "n1", "address": "198.18.0.2"}]}}
    rows = status.rows("n0", {**KEPT, **ranks}, [state()])
    lost, stranger = status.rows("n1", None, []), status.rows("n2", None, [])
    assert status.text(rows + stranger).splitlines()[2].split(maxsplit=5)[2:] == [
        "unused",
        "-",
        "-",
        "the deployment does not need this node",
    ]
    assert json.loads(status.text(rows + stranger, "json"))["ready"]
    assert not json.loads(status.text(rows + lost, "json"))["ready"]
    assert not json.loads(status.text(stranger, "json"))["ready"]


def test_last_log_line_is_shown_where_it_is_not_well() -> None:
    rows = status.rows("n0", KEPT, [state(phase="failed", detail="exit status 1", log_tail=["a", "Killed"])])
    assert "  n0 vllm-0 last said: Killed" in status.text(rows).splitlines()


def test_release_and_lease_stand_below_the_table() -> None:
    known = [
        {"plan_id": "abc", "current": True, "previous": False, "outcome": "proven", "since": 1_700_000_000.0},
        {"plan_id": "abb", "current": False, "previous": True, "outcome": "proven", "since": None},
    ]
    held = {
        "who": "ann", "origin": "ops1", "verb": "deploy", "deployment": "step3", "plan_id": "abd", "why": "",
        "age": 61.0, "since": "2023-11-14T22:20:00Z", "silent": 3.0, "expires_in": 117.0, "state": "held",
        "doing": "Install: tools", "run": "r1",
    }  # fmt: skip
    # The node's own clock tells the age: it may be an hour off.
    told = status.release(known, {"lease": held, "frozen": None, "now": 1_700_000_125.0})
    rows = status.rows("n0", KEPT, [state()])
    lines = status.report({"n0": {"status_rows": rows, "status_release": told}}, ["n0"])["text"].splitlines()
    assert lines[2:] == [
        "Release abc: proven, before it abb, current since 2023-11-14T22:13:20Z (2 min 5 s) on n0",
        "n0: Lease of ann from ops1: deploy step3 abd, since 2023-11-14T22:20:00Z (1 min 1 s), last heard of 3 s ago, "
        "free by itself in 1 min 57 s; now at: Install: tools",
        "Endpoint: http://127.0.0.1:8000/v1",
    ]
    nobody = status.release([], {"lease": None, "frozen": None, "now": 0.0})
    assert (nobody["release"], nobody["since"]) == (None, None)


@pytest.mark.parametrize(("phases", "ready"), [(["ready"], True), (["ready", "loading"], False), ([], False)])
def test_json_says_whether_all_of_it_is_ready(phases: list[str], ready: bool) -> None:
    rows = status.rows("n0", KEPT, [state(phase=phase) for phase in phases])
    assert json.loads(status.text(rows, "json"))["ready"] is ready
    assert (status.report({"n0": {"status_rows": rows}}, ["n0"])["exit_status"] == "") is ready


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"status_format 'yaml' is unknown\. Choose one of: human, json\."):
        status.text([], "yaml")


def test_units_to_restart_are_those_that_do_not_run_as_wanted() -> None:
    states = [
        state(unit="a"),
        state(unit="b", running=False),
        state(unit="c", outdated=True),
        state(unit="d", outdated=None),
    ]
    parts = {"a": "engine", "b": "ray", "c": "engine", "d": "engine"}
    described = [{"unit": unit, "part": part, "stop_step": 0} for unit, part in parts.items()]
    assert units.units_to_restart(states, described) == ["b", "c"]
    assert units.units_to_restart(states, described, "ray") == ["b"]
    assert units.units_to_restart(states, described, "engine") == ["c"]
    named = [{**each, "name": f"vllm-{each['unit']}"} for each in states]
    assert units.units_to_restart(named, described, "engine", ["vllm-a", "vllm-b"]) == ["a", "c"]


def test_a_stop_takes_as_long_as_its_steps_one_after_the_other() -> None:
    head, follower = {"stop_seconds": 150}, {"stop_seconds": 15, "stop_step": 1}
    assert units.longest_stop([head, follower, follower, {"stop_seconds": 30, "stop_step": 3}]) == 195


def test_units_to_stop_include_one_that_is_about_to_start_again() -> None:
    states = [state(unit="a"), state(unit="b", running=False, phase="stopped")]
    states.append(state(unit="c", running=False, phase="crash_looping"))
    described = [{"unit": unit, "part": "engine", "stop_step": step} for unit, step in (("a", 0), ("b", 0), ("c", 2))]
    assert [units.units_to_stop(states, described, step) for step in range(3)] == [["a"], [], ["c"]]


def test_units_without_a_request_to_finish_are_ended_at_once() -> None:
    phases = {"a": "ready", "b": "loading", "c": "unhealthy", "d": "crash_looping", "e": "starting"}
    states = [state(unit=unit, phase=phase, running=phase != "crash_looping") for unit, phase in phases.items()]
    states.append(state(unit="f", running=False, phase="stopped"))
    described = [{"unit": unit, "part": "engine", "stop_step": 1 if unit == "e" else 0} for unit in (*phases, "f")]
    assert units.units_to_end(states, described, 0) == ["b", "d"]
    assert units.units_to_end(states, described, 0, given_up=True) == ["b", "c", "d"]
    assert units.units_to_end(states, described, 1) == ["e"]


def test_orphans_of_all_processes_are_ended() -> None:
    assert units.orphan_pids([state(orphans=[7, 8]), state(), state(orphans=[9])]) == ["7", "8", "9"]


def test_paths_that_another_deployment_uses() -> None:
    def kept(venv: str) -> dict[str, Any]:
        return {"node": {"venv": {"path": venv}, "tools": {"path": "/t"}, "weights": {"path": "/w"}}}

    deployments = {"mine": kept("/v1"), "other": kept("/v2"), "rehearsal-hub": {"node": {"tools": {"path": "/t"}}}}
    assert units.used_elsewhere(deployments, "mine") == ["/t", "/v2", "/w"]
    assert units.used_elsewhere({"mine": kept("/v1")}, "mine") == []


def test_removal_says_what_goes_and_what_stays() -> None:
    kept = local_plan().slices()["localhost"]
    venv, weights = kept["node"]["venv"]["path"], kept["node"]["weights"]["path"]
    variables = {"localhost": {"remove_slice": kept, "release_slice": kept, "release_used_elsewhere": [venv]}}
    text = show.removal(variables, ["localhost"], False, True)
    assert "localhost: deployment local will be stopped and removed with its logs" in text
    assert f"{weights} (about 2.3 MB) stays" in text
    assert f"{venv} (about 2.8 GB) stays, another deployment uses it" in text
    bare = show.removal({"localhost": {"remove_slice": kept, "release_slice": {}}}, ["localhost"], True, True)
    assert "deployment local has no release; what a deploy may have left of it will be removed" in bare
    assert show.removal({"localhost": {}}, ["localhost"], True, True) == "Nothing is deployed."


def test_helper_has_a_release_of_its_own_that_follows_its_program() -> None:
    process = {"name": "hub", "argv": ["x"], "env": {}}
    first, second = (units.standalone_slice("hub", process, "/t", mark) for mark in ("a", "b"))
    assert first["plan_id"] != second["plan_id"]
    assert first["node"]["processes"][0]["env"] == {"PROGRAM_SHA1": "a"}


def test_human_plan_shows_commands_ports_memory_and_how_far_it_was_proven() -> None:
    text = show.human(local_plan(context_length=512))
    for expected in (
        "  verified     cpu: served for real on a CPU",
        "vllm-0: serves the API; ports 8000 (OpenAI-compatible API, for clients)",
        "      --tool-call-parser step3p5 \\\n",
        "      VLLM_CPU_KVCACHE_SPACE=1 \\\n",
        "the node's own memory, checked on the node before anything is done",
    ):
        assert expected in text


def test_shell_form_of_a_process_runs_as_written() -> None:
    process = local_plan(extra_arguments=["--chat-template", "a b"]).nodes[0].processes[0]
    text = show.shell(process)
    assert text.startswith("env \\\n  GLOO_SOCKET_IFNAME=lo \\\n  HF_HOME=")
    assert text.endswith("--chat-template 'a b'")


def test_example_names_endpoint_and_model() -> None:
    text = show.client_example(local_plan())
    assert "curl -s http://127.0.0.1:8000/v1/chat/completions" in text
    assert 'OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="EMPTY")' in text


SERVER = {
    "replica": 0, "status": "UP", "drained": False, "weight": 100, "in_flight": 3, "in_rotation": True, "check": "L7OK",
    "agent": "", "address": "a", "drained_by": None,
}  # fmt: skip
BY = {"who": "ann", "origin": "ops1", "since": "2026-11-21T01:00:00Z"}
DRAINED = {**SERVER, "replica": 1, "in_rotation": False, "drained": True, "drained_by": BY, "in_flight": 0}
TAKEN_OUT = {**DRAINED, "drained_by": None, "taken_out": True}
DOWN = {**SERVER, "replica": 1, "in_rotation": False, "status": "DOWN", "check": "L4CON", "agent": "down stalled"}


@pytest.mark.parametrize(
    ("serving", "lines", "exit_status"),
    [
        pytest.param(
            {"gateway": {"problem": "", "servers": [SERVER, DRAINED]}},
            [
                "Gateway on gw: 1 of 2 replicas in rotation",
                "  replica 0: in rotation, 3 request(s)",
                "  replica 1: out, drained by ann from ops1 since 2026-11-21T01:00:00Z, 0 request(s) left",
            ],
            "",
            id="drained",
        ),
        pytest.param(
            {"gateway": {"problem": "", "servers": [{**SERVER, "weight": 10}, DOWN]}},
            [
                "Gateway on gw: 1 of 2 replicas in rotation",
                "  replica 0: in rotation at 10 %, 3 request(s)",
                "  replica 1: OUT, DOWN (L4CON; down stalled)",
            ],
            "not_ready",
            id="out",
        ),
        pytest.param(
            {"gateway": {"problem": "", "agent_problem": "L4CON Connection refused", "servers": [SERVER]}},
            [
                "Gateway on gw: 1 of 1 replicas in rotation",
                "  WARNING: its agent does not answer (L4CON Connection refused): a replica that hangs "
                "stays in rotation",
                "  replica 0: in rotation, 3 request(s)",
            ],
            "",
            id="agent-dead",
        ),
        pytest.param(
            {"gateway": {"problem": "its socket does not answer", "servers": []}},
            ["Gateway on gw: DOWN, its socket does not answer"],
            "not_ready",
            id="down-while-the-replicas-are-well",
        ),
        pytest.param(
            {"gateway": None},
            ["Gateway on gw: DOWN, it was never installed here: run the verb 'gateway'"],
            "not_ready",
            id="never-installed",
        ),
        pytest.param(None, ["Gateway on gw: unreachable, No route to host"], "unreachable", id="host-down"),
    ],
)
def test_the_gateway_stands_below_the_table(serving: dict[str, Any] | None, lines: list[str], exit_status: str) -> None:
    variables = {
        "n0": {"status_rows": status.rows("n0", KEPT, [state()])},
        "gw": {"status_gateway": status.front(serving, "No route to host")},
    }
    told = status.report(variables, ["n0"], "human", ["gw"])
    assert told["text"].splitlines()[2:-1] == lines
    assert told["exit_status"] == exit_status
    document = json.loads(status.report(variables, ["n0"], "json", ["gw"])["text"])
    assert document["ready"] is (exit_status == "")
    assert document["gateways"]["gw"]["reachable"] is (serving is not None)


@pytest.mark.parametrize("form", ["human", "json"])
def test_a_gateway_outside_of_the_limit_is_no_fault(form: str) -> None:
    variables = {"n0": {"status_rows": status.rows("n0", KEPT, [state()])}, "gw": {}}
    told = status.report(variables, ["n0"], form, ["gw"])
    assert told["exit_status"] == ""
    if form == "human":
        assert told["text"].splitlines()[2:-1] == ["Gateway on gw: not asked, it is outside of --limit"]
    else:
        document = json.loads(told["text"])
        assert (document["ready"], document["gateways"]["gw"]["asked"]) == (True, False)


def test_a_gateway_that_is_left_behind_is_a_fault_with_its_cure() -> None:
    """It serves on, with keys that were withdrawn since."""
    well = {"gateway": {"problem": "", "servers": [SERVER]}}
    variables = {
        "n0": {"status_rows": status.rows("n0", KEPT, [state()]), "status_left_gateway": True},
        "gw": {"status_gateway": status.front(well)},
    }
    told = status.report(variables, ["n0"], "human", ["gw"])
    assert told["text"].splitlines()[2:-1] == [
        "Gateway on gw: 1 of 1 replicas in rotation",
        "  replica 0: in rotation, 3 request(s)",
        "Gateway on n0: LEFT BEHIND, the inventory has none here any more; run the verb 'gateway', which removes it",
    ]
    assert told["exit_status"] == "not_ready"
    document = json.loads(status.report(variables, ["n0"], "json", ["gw"])["text"])
    assert document["ready"] is False
    assert {host: front["left_behind"] for host, front in document["gateways"].items()} == {"gw": False, "n0": True}


def at_work(state: str, run: str = "r1") -> dict[str, Any]:
    held = {
        "who": "ann", "origin": "ops1", "verb": "deploy", "deployment": "step3", "plan_id": "abd", "why": "",
        "age": 61.0, "since": "2023-11-14T22:20:00Z", "silent": 3.0, "expires_in": 117.0, "state": state, "doing": "",
        "run": run,
    }  # fmt: skip
    return status.release([], {"lease": held if state else None, "frozen": None, "now": 0.0})


@pytest.mark.parametrize(
    ("lease", "line", "exit_status"),
    [
        ("held", "  replica 1: out, 0 request(s) left, taken out by the rollout that is under way", ""),
        ("expired", "  replica 1: OUT, 0 request(s) left, taken out by a rollout that ended; run deploy", "not_ready"),
        ("", "  replica 1: OUT, 0 request(s) left, taken out by a rollout that ended; run deploy", "not_ready"),
    ],
)
def test_what_a_dead_rollout_took_out_is_a_fault(lease: str, line: str, exit_status: str) -> None:
    """Its engine is well, and half of the capacity is away until somebody deploys."""
    variables = {
        "n0": {"status_rows": status.rows("n0", KEPT, [state()]), "status_release": at_work(lease)},
        "gw": {"status_gateway": status.front({"gateway": {"problem": "", "servers": [SERVER, TAKEN_OUT]}})},
    }
    told = status.report(variables, ["n0"], "human", ["gw"])
    assert line in told["text"].splitlines()
    assert told["exit_status"] == exit_status
    document = json.loads(status.report(variables, ["n0"], "json", ["gw"])["text"])
    assert document["ready"] is (exit_status == "")
    assert [server["left_out"] for server in document["gateways"]["gw"]["servers"]] == [False, exit_status != ""]


@pytest.mark.parametrize(
    ("by", "runs", "under_way"),
    [
        ("r1", ["r1"], True),
        # A run that has nothing to do with it, of another deployment on the same node, say.
        ("r1", ["r2"], False),
        ("r1", ["r2", "r1"], True),
        ("r1", [], False),
        # The mark is of an earlier version, which wrote down no run.
        ("", ["r2"], True),
        ("", [], False),
    ],
)
def test_only_the_run_that_took_a_replica_out_keeps_that_from_being_a_fault(
    by: str, runs: list[str], under_way: bool
) -> None:
    out = {**TAKEN_OUT, "taken_out_by": by}
    hosts = [f"n{number}" for number in range(max(1, len(runs)))]
    variables: dict[str, Any] = {host: {"status_rows": status.rows(host, KEPT, [state()])} for host in hosts}
    for host, run in zip(hosts, runs, strict=False):
        variables[host]["status_release"] = at_work("held", run)
    variables["gw"] = {"status_gateway": status.front({"gateway": {"problem": "", "servers": [SERVER, out]}})}
    told = status.report(variables, hosts, "human", ["gw"])
    assert ("taken out by the rollout that is under way" in told["text"]) is under_way
    assert told["exit_status"] == ("" if under_way else "not_ready")


def test_the_watchdog_tells_of_stalls_and_restarts() -> None:
    engine = {"process": "vllm-0", "state": "stalled", "detail": "no token for 120 s", "stalls": 2, "restarts": 1}
    kept = {"problem": "", "mode": "restart", "engines": [{**engine, "last_restart_ago": 61.0}]}
    quiet = {"problem": "it gave no sign of life for 100 s", "mode": "observe", "engines": []}
    variables = {
        "n0": {"status_rows": status.rows("n0", KEPT, [state()]), "status_watchdog": kept},
        "n1": {"status_rows": [], "status_watchdog": quiet},
    }
    assert status.report(variables, ["n0", "n1"])["text"].splitlines()[2:-1] == [
        "Watchdog on n0 (restart): vllm-0: 2 stall(s), 1 restart(s), the last 1 min 1 s ago; "
        "STALLED now: no token for 120 s",
        "Watchdog on n1: it gave no sign of life for 100 s",
    ]


def test_status_tells_of_nodes_that_are_all_down(tmp_path: Path) -> None:
    """Nothing listens at that port; a program still gets its document."""
    host = {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_connection": "ssh"}
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(json.dumps({"all": {"children": {"engines": {"hosts": {"n0": host}}}}}))
    command = [sys.executable, "bin/stepladder", "status", "-i", str(inventory), "-e", "deployment_name=local"]
    done = subprocess.run(
        [*command, "-e", "status_format=json"], cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    document = json.loads(done.stdout)
    assert (document["ready"], [row["phase"] for row in document["processes"]]) == (False, ["unreachable"])


def test_what_could_not_be_looked_at_is_named() -> None:
    told = status.report({"n0": {"status_problem": "Read what is deployed: lease.json cannot be read"}}, ["n0"])
    assert told["text"].splitlines()[1].split(maxsplit=5)[2:] == [
        "unknown", "-", "-", "Read what is deployed: lease.json cannot be read",
    ]  # fmt: skip
    assert told["exit_status"] == "not_ready"


def test_status_watch_looks_again(tmp_path: Path) -> None:
    node = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory = {"engines": {"hosts": {"n0": {**node, "stepladder_state_directory": str(tmp_path / "state")}}}}
    (tmp_path / "inventory.yml").write_text(json.dumps(inventory))
    command = [sys.executable, "bin/stepladder", "status", "-i", str(tmp_path / "inventory.yml")]
    command += ["-e", "status_watch=true", "-e", "status_watch_seconds=1", "-e", "deployment_name=local"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        told = [next((line.strip() for line in run.stdout if line.startswith("n0 ")), "") for _ in range(2)]
        run.kill()
    assert told == ["n0    -        absent  -      -        nothing is deployed here"] * 2
