"""Fitness of a fleet: nodes against each other, accepted failures, the table, the JSON, the verdict."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from stepladder import fitness
from stepladder.catalogue import Catalogue
from stepladder.planner import make_plan
from stepladder.request import parse_request

FACTS: dict[str, Any] = {
    "hostname": "gpu1",
    "os": "Ubuntu 24.04.1 LTS",
    "kernel": "6.8.0-45-generic",
    "architecture": "x86_64",
    "cpus": 192,
    "memory_total_bytes": 2048 * 2**30,
    "gpus": [{"index": 0, "name": "NVIDIA H20", "memory_mib": 97871, "driver": "580.95.05"}] * 8,
    "python": {"version": "3.11.9"},
    "nics": [{"name": "ens1", "up": True, "virtual": False, "speed_mbit": 400000, "mtu": 4200}],
    "rdma": [{"state": "ACTIVE"}] * 8,
    "installed": {"python": "3.11.9", "ray": "2.60.0"},
}
PORT = {
    "check": "port", "what": "0.0.0.0:8000", "found": "held by pid 812", "needed": "free", "mend": "stop process 812",
    "severity": "failure",
}  # fmt: skip
CLOCK = {
    "check": "clock", "what": "time", "found": "not synchronised", "needed": "it is", "mend": "start chrony",
    "severity": "warning",
}  # fmt: skip
PLAN = {"id": "abc", "nodes": [{"name": f"node{n}", "replica": n // 3, "interface": "ens1"} for n in (1, 2, 3)]}


def answer(host: str, *findings: dict[str, Any], offset: float = 0.0, **facts: Any) -> dict[str, Any]:
    told = {**copy.deepcopy(FACTS), "hostname": host, **facts}
    return {"findings": list(findings), "facts": told, "clock": {"offset": offset, "error": 0.5}, "problem": ""}


def judge(results: dict[str, Any], plan: dict[str, Any] | None = PLAN, accept: tuple[str, ...] = ()) -> fitness.Fitness:
    return fitness.judge(results, plan, "", accept)


def test_a_fit_fleet() -> None:
    found = judge({"node1": answer("a"), "node2": answer("b", CLOCK)})
    assert (found.unfit, found.unreachable) == ([], [])
    assert fitness.verdict(found) == "2 of 2 nodes fit; 0 failures, 1 warning."


def test_a_node_without_an_answer_is_a_row_and_not_unfit() -> None:
    found = judge({"node1": answer("a"), "node2": {"problem": "Connection timed out"}, "node3": None})
    assert (found.unfit, found.unreachable) == ([], ["node2", "node3"])
    assert fitness.verdict(found) == "1 of 3 nodes fit; 0 failures, 0 warnings. No answer: node2, node3."
    table = fitness.findings_table(found, with_warnings=True)
    assert "FAIL  node2  reach  ssh   an answer  Connection timed out" in table
    assert "FAIL  node3  reach  ssh   an answer  it was not asked" in table


@pytest.mark.parametrize(
    ("problem", "mend"),
    [("Host key verification failed.", "verb bootstrap"), ("Permission denied (publickey).", "verb bootstrap"),
     ("Connection timed out", "see that it is on")],
)  # fmt: skip
def test_how_to_reach_a_node(problem: str, mend: str) -> None:
    assert mend in fitness.findings_table(judge({"node1": {"problem": problem}}), with_warnings=False)


ALIKE = {
    "driver": ({"gpus": [{**FACTS["gpus"][0], "driver": "570.1"}]}, "driver", "570.1", "warning"),
    "Python, of which the environment will be made": (
        {"python": {"version": "3.11.2"}, "installed": {}}, "Python", "3.11.2", "failure",
    ),
    "Python of the environment": ({"installed": {"python": "3.11.2", "ray": "2.60.0"}}, "Python", "3.11.2", "failure"),
    "Ray": ({"installed": {"ray": "2.59.0"}}, "ray", "2.59.0", "failure"),
    "NIC speed": (
        {"nics": [{**FACTS["nics"][0], "speed_mbit": 100000}]}, "NIC speed", "100 Gbit/s", "warning",
    ),
    "MTU": ({"nics": [{**FACTS["nics"][0], "mtu": 1500}]}, "MTU", "1500", "warning"),
    "GPUs": (
        {"gpus": [{"name": "NVIDIA H200", "memory_mib": 143771, "driver": "580.95.05"}]},
        "GPUs", "NVIDIA H200, 143771 MiB", "failure",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "trait", "value", "severity"), ALIKE.values(), ids=ALIKE)
def test_nodes_of_a_replica_that_differ(facts: dict[str, Any], trait: str, value: str, severity: str) -> None:
    found = judge({"node1": answer("a"), "node2": answer("b", **facts), "node3": answer("c", **facts)})
    [only] = [one for node in found.nodes for one in node.findings]
    assert (only.node, only.check, only.what) == ("node2", "alike", f"{trait} in replica 0")
    assert (only.found, only.severity) == (value, severity)
    assert only.needed.endswith(", as on node1")


def test_the_nodes_own_python_does_not_matter_to_an_environment_that_is_there() -> None:
    """Ray wants one Python on all nodes, and runs by the environment's."""
    found = judge({"node1": answer("a"), "node2": answer("b", python={"version": "3.11.2"})})
    assert [one.findings for one in found.nodes] == [(), ()]


def test_the_nodes_own_python_does_not_matter_to_a_container() -> None:
    facts = [{"installed": {}, "python": {"version": version}} for version in ("3.11.9", "3.11.9", "3.12.3")]
    results = {f"node{n}": answer(str(n), **one) for n, one in enumerate(facts, 1)}
    found = judge(results, {**PLAN, "deployment": {"install": "container"}, "nodes": [
        {**node, "replica": 0} for node in PLAN["nodes"]
    ]})  # fmt: skip
    [only] = [one for node in found.nodes for one in node.findings]
    assert (only.node, only.what, only.found, only.severity) == ("node3", "Python in replica 0", "3.12.3", "warning")
    assert found.unfit == []


def test_without_a_plan_nothing_that_differs_makes_unfit() -> None:
    found = judge({"node1": answer("a"), "node2": answer("b", python={"version": "3.9.1"}, installed={})}, plan=None)
    [only] = found.nodes[1].findings
    assert (only.what, only.severity) == ("Python in the inventory", "warning")


def test_images_are_held_against_each_other() -> None:
    digests = [{"vllm:1": "sha256:a"}, {"vllm:1": "sha256:b"}, {"vllm:1": ""}]
    found = judge({f"node{n}": answer(str(n), image_digests=one) for n, one in enumerate(digests, 1)})
    assert [(one.what, one.severity) for node in found.nodes for one in node.findings] == [
        ("image vllm:1 in replica 0", "failure")
    ]


def test_two_nodes_of_one_name() -> None:
    found = judge({"node1": answer("a"), "node2": answer("a")})
    assert [one.findings[0].found for one in found.nodes] == ["the name of node1, node2 alike"] * 2


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (2.4, []),
        (-3.5, [("3 s behind this machine's", "warning")]),
        (90.5, [("90 s ahead of this machine's", "failure")]),
    ],
)
def test_clocks(offset: float, expected: list[tuple[str, str]]) -> None:
    """Half the time that asking took, 0.5 s, is not known."""
    found = judge({"node1": answer("a", offset=offset)})
    assert [(one.found, one.severity) for one in found.nodes[0].findings] == expected


def test_an_accepted_failure_is_a_warning_and_says_so() -> None:
    found = judge({"node1": answer("a", PORT)}, accept=("port",))
    assert found.unfit == []
    assert found.nodes[0].findings[0].mend == "accepted; else stop process 812"
    assert judge({"node1": answer("a", PORT)}, accept=("xid",)).unfit == ["node1"]


def test_one_table_of_all_nodes() -> None:
    results = {f"node{n}": answer(str(n), CLOCK, *([PORT] if n == 2 else [])) for n in range(1, 7)}
    found = fitness.judge(results, None, "no model", ())
    assert fitness.human(found) == (
        "NODE   SYSTEM                                CPUS  MEMORY    GPUS                       NETWORK\n"
        + "".join(
            f"node{n}  Ubuntu 24.04.1 LTS, 6.8.0-45-generic  192   2048 GiB  8 x NVIDIA H20, 580.95.05  "
            "ens1 400 Gbit/s, 8 RDMA\n"
            for n in range(1, 7)
        )
        + "\n"
        "      NODE   CHECK  WHAT          NEEDED  FOUND\n"
        "FAIL  node2  port   0.0.0.0:8000  free    held by pid 812\n"
        "      to mend: stop process 812\n"
        "warn  all 6  clock  time          it is   not synchronised\n"
        "      to mend: start chrony\n"
        "\n"
        "Only what needs no plan was checked: no model\n"
        "\n"
        "5 of 6 nodes fit; 1 failure, 6 warnings. Not fit: node2."
    )
    assert fitness.failures_text(found) == (
        "5 of 6 nodes fit; 1 failure, 6 warnings. Not fit: node2.\n"
        "      NODE   CHECK  WHAT          NEEDED  FOUND\n"
        "FAIL  node2  port   0.0.0.0:8000  free    held by pid 812\n"
        "      to mend: stop process 812"
    )


def test_json_for_programs() -> None:
    told = json.loads(fitness.to_json(judge({"node1": answer("a", PORT), "node2": {"problem": "gone"}})))
    assert (told["fit"], told["unfit"], told["unreachable"], told["plan"]) == (False, ["node1"], ["node2"], "abc")
    assert told["nodes"][0]["findings"] == [PORT]
    assert (told["nodes"][1]["answered"], told["nodes"][1]["problem"]) == (False, "gone")
    assert told["nodes"][0]["facts"]["kernel"] == "6.8.0-45-generic"


def test_wishes_of_a_real_plan_are_what_the_module_takes() -> None:
    nodes = [{"name": f"n{n}", "address": f"198.18.0.{n}", "gpu": "h20-96", "gpus": 8} for n in (1, 2)]
    request = parse_request(
        {"deployment": {"name": "s", "model": "step3", "engine": "vllm", "parallel": "TP16"}, "nodes": nodes,
         "state_directory": "/var/lib/stepladder"}
    )  # fmt: skip
    [first, _] = make_plan(request, Catalogue()).slices().values()
    wished = fitness.wishes(first, "/var/lib/stepladder", minimum_toolkit="2.0")
    known = Catalogue().containers
    assert (wished["minimum_docker"], wished["minimum_toolkit"]) == (known.docker, "2.0")
    assert fitness.wishes(first, "/x")["minimum_toolkit"] == known.toolkit
    assert wished["deployment"] == "/var/lib/stepladder/deployments/s"
    assert (wished["ranks"], wished["gpus"]["model"], wished["gpus"]["count"]) == (2, "H20", 8)
    assert {port["port"] for port in wished["ports"]} >= {8000, 6379}
    assert fitness.wishes({}, "/srv")["paths"][0]["path"] == "/srv"
