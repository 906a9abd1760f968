"""Who measures whom, what iperf3 says, and which node or link is to blame."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import link_speed
from ansible_collections.stepladder.core.plugins.module_utils.link_speed import Place

from stepladder import acceptance
from stepladder.all_reduce import Outcome
from stepladder.bisection import Group, blame
from stepladder.gpu_acceptance import Row

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16])
def test_every_pair_meets_once_and_nobody_has_two_peers_at_a_time(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    rounds = acceptance.pairings(names)
    met = [frozenset(pair) for one in rounds for pair in one]
    assert sorted(map(sorted, met)) == sorted(map(list, itertools.combinations(sorted(names), 2)))
    assert all(len(set(itertools.chain(*one))) == 2 * len(one) for one in rounds)
    assert len(rounds) == count - 1 + count % 2


def test_both_sides_of_a_round_agree() -> None:
    variables = {name: {"acceptance_at": f"198.18.0.{at}"} for at, name in enumerate(NAMES, 1)}
    variables["e"] = {}
    own = {name: acceptance.rounds_of(variables, NAMES, name) for name in NAMES}
    assert own["e"] == []
    for name, rounds in own.items():
        for one in rounds:
            [other] = [two for two in own[one["peer"]] if two["number"] == one["number"]]
            assert (other["peer"], other["sends"]) == (name, not one["sends"])
            assert one["address"] == variables[one["peer"]]["acceptance_at"]
    assert [one["number"] for one in own["a"]] == sorted(one["number"] for one in own["a"])


def links(rates: dict[tuple[str, str], float | None], names: list[str] = NAMES) -> dict[str, list[dict[str, Any]]]:
    """What nodes would return: 9400 Mbit/s, but for what is given."""
    return {
        one: [
            {"peer": two, "mbit": rates.get((one, two), 9400.0), "problem": ""} for two in names if two != one
        ]
        for one in names
    }  # fmt: skip


def report(network: acceptance.Verdict | None = None, **parts: Any) -> acceptance.Report:
    given = {"level": "quick", "gpus": {}, "gpu_rows": (), "all_reduce": None, "silent": ()}
    return acceptance.report(network=network, **{**given, **parts})


def slow_node(
    name: str, mbit: float | None = 950.0, *, names: list[str] = NAMES
) -> dict[tuple[str, str], float | None]:
    return {pair: mbit for pair in itertools.permutations(names, 2) if name in pair}


CASES = {
    "all are alike": ({}, [], []),
    "one node": (slow_node("c"), ["c"], []),
    "one node, only what it sends": ({("c", two): 950.0 for two in NAMES if two != "c"}, ["c"], []),
    "one link": ({("a", "d"): 950.0, ("d", "a"): 940.0}, [], [("a", "d"), ("d", "a")]),
    "one direction of one link": ({("a", "d"): 950.0}, [], [("a", "d")]),
    "a node and a link beside it": ({**slow_node("c"), ("a", "b"): 100.0}, ["c"], [("a", "b")]),
    "two nodes": ({**slow_node("c"), **slow_node("e")}, ["c", "e"], []),
    "a link without any traffic": ({("a", "d"): None}, [], [("a", "d")]),
    "a dead link and slow ones beside it blame no node": (
        {("c", "a"): None, ("c", "b"): 950.0, ("c", "d"): 950.0, ("c", "e"): 950.0},
        [], [("c", "a"), ("c", "b"), ("c", "d"), ("c", "e")],
    ),
    "a node that nobody reaches": (slow_node("b", None), ["b"], []),
}  # fmt: skip


@pytest.mark.parametrize(("rates", "nodes", "expected"), CASES.values(), ids=CASES)
def test_what_is_to_blame(rates: dict[Any, Any], nodes: list[str], expected: list[tuple[str, str]]) -> None:
    found = acceptance.judge(links(rates), 0)
    assert sorted(found.slow_nodes) == nodes
    assert [(link.source, link.to) for link in found.slow_links] == expected
    assert found.accepted == (not nodes and not expected)


def test_of_two_nodes_neither_is_to_blame() -> None:
    pair = ["a", "b"]
    found = acceptance.judge(links(slow_node("a", names=pair), pair), 5000.0)
    assert (found.slow_nodes, len(found.slow_links)) == ((), 2)
    [row, _] = report(found).rows
    assert (row.node, row.part, row.found, row.needed) == ("a", "network to b", "950 Mbit/s", "5.00 Gbit/s")


def test_a_node_that_did_not_answer_is_no_slow_one() -> None:
    found = acceptance.judge({**links({}, NAMES[:4]), "e": None}, 0)
    assert (found.silent, found.slow_nodes, found.slow_links, found.accepted) == (("e",), (), (), False)
    assert acceptance.sentences(report(found, silent=found.silent))[0] == "No answer: e."


def test_a_minimum_finds_what_all_share() -> None:
    everything = dict.fromkeys(itertools.permutations(NAMES, 2), 950.0)
    assert acceptance.judge(links(everything), 0).accepted
    assert not acceptance.judge(links(everything), 9000.0).accepted


MEASURES: dict[str, tuple[float, list[float], float, tuple[float, str]]] = {
    "a figure": (5000.0, [10.0], 9400.0, (5000.0, "acceptance_minimum_gbit")),
    "the line rate": (0, [10.0, 10.0], 950.0, (6000.0, "60% of the line rate, 10 Gbit/s")),
    "a port that came up too slow is no measure": (
        0, [1.0, 25.0, 25.0], 0.0, (10000.0, "what iperf3 moves on one core; the line rate is 25 Gbit/s"),
    ),
    "a line that one core does not fill, and peers that do better": (
        0, [400.0], 40000.0, (24000.0, "60% of 40.00 Gbit/s, the middle one of what the nodes reach"),
    ),
    "no driver tells": (
        0, [], 9000.0,
        (5400.0, "60% of 9.00 Gbit/s, the middle one of what the nodes reach; no driver tells a line rate"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("minimum", "lines", "middle", "expected"), MEASURES.values(), ids=MEASURES)
def test_what_a_link_has_to_have(
    minimum: float, lines: list[float], middle: float, expected: tuple[float, str]
) -> None:
    found = acceptance.wanted(minimum, lines, middle)
    assert (pytest.approx(found[0]), found[1]) == expected


def test_nodes_that_all_share_a_fault_are_held_against_the_line_rate() -> None:
    everything = dict.fromkeys(itertools.permutations(NAMES, 2), 950.0)
    found = acceptance.judge(links(everything), 0, dict.fromkeys(NAMES, 10.0))
    assert (found.slow_nodes, len(found.slow_links)) == (("a", "b", "c"), 2), "of the last two neither is to blame"
    told = acceptance.sentences(report(found))
    assert "A link has to have 6.00 Gbit/s (60% of the line rate, 10 Gbit/s)." in told


OWN = {"198.18.0.11": "eth0", "198.19.0.11": "eth1"}
PLACES = {
    "its own address": (("198.19.0.11", ["198.19.0.11"], "198.18.0.11"), Place("198.19.0.11")),
    "a name that means its own": (("node1", ["127.0.1.1", "198.19.0.11"], "198.18.0.11"), Place("198.19.0.11")),
    "a name that means its loopback": (("node1", ["127.0.1.1"], "198.18.0.11"), Place("198.18.0.11")),
    "a name that only the controller knows": (("node1", [], "198.18.0.11"), Place("198.18.0.11")),
    "behind NAT": (("203.0.113.7", ["203.0.113.7"], "198.18.0.11"), Place("198.18.0.11")),
    "behind NAT, not by SSH": (("203.0.113.7", ["203.0.113.7"], ""), Place("203.0.113.7")),
    "a name, not by SSH": (
        ("node1", ["127.0.1.1"], ""),
        Place(problem="'node1' means 127.0.1.1 on the node itself, which is none of its own addresses beyond the "
              "loopback. Set deployment_address to the one that peers reach: 198.18.0.11 (eth0), 198.19.0.11 (eth1)."),
    ),
    "the loopback, through a tunnel": (
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        Place(problem="'127.0.0.1' means 127.0.0.1 on the node itself, which is none of its own addresses beyond the "
              "loopback. Set deployment_address to the one that peers reach: 198.18.0.11 (eth0), 198.19.0.11 (eth1)."),
    ),
    "a name that nobody knows": (
        ("node1", [], ""),
        Place(problem="'node1' does not resolve on the node itself; no peer could be told where it is. Set "
              "deployment_address to the one that peers reach: 198.18.0.11 (eth0), 198.19.0.11 (eth1)."),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), PLACES.values(), ids=PLACES)
def test_where_peers_meet_a_node(given: tuple[str, list[str], str], expected: Place) -> None:
    told, resolved, reached = given
    assert link_speed.place(told, OWN, resolved, reached) == expected


def test_the_role_refuses_them_before_anything_is_measured(tmp_path: Path) -> None:
    """The real playbook; both nodes are this machine, which has its own addresses but once."""
    at = {"a": {"ansible_host": "node-a.invalid"}, "b": {"ansible_host": "127.0.1.1"}}
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    engines = {"hosts": at, "vars": {**local, "acceptance_install": False}}
    (tmp_path / "hosts.yml").write_text(json.dumps({"all": {"children": {"engines": engines}}}))
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", "hosts.yml", str(ROOT / "playbooks/acceptance.yml")],
        cwd=tmp_path, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Refuse nodes that no peer could meet: FAILED" in done.stdout
    assert "Set deployment_address" in done.stdout
    assert "Every link" not in done.stdout


def test_all_nodes_that_could_not_be_met_are_named() -> None:
    told = {
        "a": {"acceptance_line": {"address": "198.18.0.1", "problem": ""}},
        "b": {"acceptance_line": {"address": "", "problem": "'b' means 127.0.1.1."}},
        "c": {"acceptance_line": {"unreachable": True}},
        "d": {},
    }
    assert acceptance.unmet(told, list("acd")) == ""
    told["d"] = told["a"]
    assert acceptance.unmet(told, list("abcd")) == (
        "b: 'b' means 127.0.1.1.\na, d: all would be met at 198.18.0.1. Set deployment_address of each to its own."
    )


def test_iperf3_listens_on_the_nodes_own_address_and_else_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """iperf3 is a stand-in that keeps its arguments."""
    program = tmp_path / "iperf3"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(link_speed.peer_network, "interfaces", lambda: [{"address": "198.18.0.11"}])
    rounds = [{"number": 0, "peer": "b", "address": "198.18.0.12", "sends": False}]
    for address in ("198.18.0.11", "203.0.113.7", "127.0.1.1", "2001:db8::7"):
        link_speed.measure(rounds, address, 5201, 1, 5)
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "--server --one-off --bind 198.18.0.11 --port 5201", *["--server --one-off --port 5201"] * 3,
    ]  # fmt: skip


def test_two_nodes_need_a_measure_only_where_no_driver_tells() -> None:
    known, unknown = {"acceptance_line": {"line_gbit": 25.0}}, {"acceptance_line": {"line_gbit": None}}
    assert acceptance.immeasurable({"a": known, "b": {}}, ["a", "b"], 0) == ""
    assert acceptance.immeasurable({"a": unknown, "b": {}}, ["a", "b"], 5) == ""
    assert acceptance.immeasurable(dict.fromkeys("abc", unknown), ["a", "b", "c"], 0) == ""
    assert acceptance.immeasurable({"a": unknown, "b": {}}, ["a", "b"], 0) == (
        "No driver tells the line rate of a and b, and of two nodes neither is the measure for the other. Give the "
        "rate that their link has to have (-e acceptance_minimum_gbit=GBIT), or leave it out "
        """(-e '{"acceptance_without": ["network"]}')."""
    )


WISH = {"minimum_gbit": 0.0, "all_reduce_gbit": 0.0, "seconds": 1.0, "all_reduce_seconds": 3.0, "port": 5201,
        "rendezvous_port": 5301}  # fmt: skip
WRONG: dict[str, tuple[list[str], dict[str, float], list[str]]] = {
    "all is well": (["a", "b"], {}, []),
    "a node alone": (["a"], {}, []),
    "a rate below 0, which every link has": (["a", "b"], {"minimum_gbit": -5}, ["acceptance_minimum_gbit is -5, and"]),
    "no number": (["a", "b"], {"all_reduce_gbit": float("nan")}, ["acceptance_all_reduce_gbit is nan, and"]),
    "no time": (
        ["a"], {"seconds": 0, "all_reduce_seconds": -1},
        ["acceptance_seconds is 0", "acceptance_all_reduce_seconds is -1"],
    ),
    "no port": (["a", "b"], {"port": 80000}, ["acceptance_port is 80000, and 2 ports from there on"]),
    "too few above": (["a", "b", "c"], {"port": 65533}, ["acceptance_port is 65533, and 6 ports from there on"]),
    "too few for all rounds": (["a"], {"rendezvous_port": 65530}, ["acceptance_rendezvous_port is 65530"]),
    "a host that is none": (["a", "z"], {}, ["acceptance_hosts: z is no host of the inventory"]),
}  # fmt: skip


@pytest.mark.parametrize(("hosts", "wishes", "expected"), WRONG.values(), ids=WRONG)
def test_what_nothing_could_be_measured_by(hosts: list[str], wishes: dict[str, float], expected: list[str]) -> None:
    found = acceptance.wish_problems(hosts, ["a", "b", "c"], {**WISH, **wishes}).splitlines()
    assert [part in text for part, text in zip(expected, found, strict=True)] == [True] * len(expected), found


def test_a_bond_sends_to_one_peer_over_one_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of sysfs are made by the test; the VLAN lies on the bond."""
    names = ("vlan", "nic", "veth")
    own = [{"name": name, "address": name, "speed_mbit": 50000} for name in names]
    monkeypatch.setattr(link_speed.peer_network, "interfaces", lambda: own)
    net = tmp_path / "class/net"
    for folder in ("nic/device", "vlan/lower_bond", "bond/bonding", "bond/lower_m1", "bond/lower_m2", "m1", "m2"):
        (net / folder).mkdir(parents=True)
    (net / "bond/bonding/slaves").write_text("m1 m2\n")
    for member in ("m1", "m2"):
        (net / member / "speed").write_text("25000\n")
    assert [link_speed.line_gbit(name, tmp_path) for name in (*names, "none")] == [25.0, 50.0, None, None]


def test_texts() -> None:
    found = report(acceptance.judge(links(slow_node("c", names=NAMES[:3]), NAMES[:3]), 5000.0))
    assert acceptance.text(found, "human") == (
        "from / to            a            b            c\n"
        "a                    -  9.40 Gbit/s   950 Mbit/s\n"
        "b          9.40 Gbit/s            -   950 Mbit/s\n"
        "c           950 Mbit/s   950 Mbit/s            -\n"
        "\n"
        "      NODE  WHAT     NEEDED       FOUND\n"
        "SLOW  c     network  5.00 Gbit/s  slow with each of its peers, 950 Mbit/s at worst\n"
        "      look at its cable, its port at the switch, its NIC's speed and PCIe lanes\n"
        "\n"
        "Not accepted: 1 slow (c).\n"
        "A link has to have 5.00 Gbit/s (acceptance_minimum_gbit).\n"
        "No GPU was measured."
    )
    told = json.loads(acceptance.text(found, "json"))
    assert (told["accepted"], told["slow_nodes"], told["wanted"]) == (False, ["c"], 5000.0)


def test_what_was_not_measured_counts_at_level_full() -> None:
    missing = Row(node="a", part="diagnosis", found="dcgmi is not there", mend="install it", severity="unmeasured")
    setting = Row(node="a", part="GPU 0, DCGM's test software", found="Persistence Mode", severity="warning")
    quick, full = (report(level=level, gpu_rows=[missing, setting]) for level in ("quick", "full"))
    assert (quick.accepted, full.accepted) == (True, False)
    assert acceptance.sentences(full)[0] == "Not accepted: 1 unmeasured (a)."
    assert acceptance.text(quick, "human").startswith(
        "            NODE  WHAT                         NEEDED  FOUND\n"
        "UNMEASURED  a     diagnosis                            dcgmi is not there\n"
        "      install it\n"
        "WARNING     a     GPU 0, DCGM's test software          Persistence Mode"
    )


def test_all_reduces_between_nodes_in_the_report() -> None:
    groups = [
        Group(names=("a", "b", "c"), gbit=0.1),
        Group(names=("a", "b"), gbit=0.09),
        Group(names=("a", "c"), gbit=2.5),
        Group(names=("b", "c"), problem="c: it did not answer"),
    ]
    outcome = Outcome(backend="gloo", groups=tuple(groups), wanted=1.0, why="a figure", blame=blame(groups, 1.0))
    found = report(all_reduce=outcome, level="full")
    [row] = found.rows
    assert (row.node, row.found, row.needed) == ("b", "90 Mbit/s at best, with any of 2 peers", "1.00 Gbit/s")
    told = acceptance.text(found, "human")
    assert "all-reduce (gloo)  reached\na, b, c            100 Mbit/s\n" in told
    assert "b, c               nothing (c: it did not answer)\n" in told
    lacks = report(all_reduce=Outcome(backend="gloo", lacking={"a": "no environment with torch"}), level="full")
    assert (lacks.accepted, lacks.rows[0].severity, lacks.rows[0].found) == (
        False, "unmeasured", "no environment with torch",
    )  # fmt: skip


# `iperf3 --json` 3.12 (Debian 12), the keys that are read, between two nodes of a lab; and without a server there.
IPERF = {
    "a rate": ('{"end":{"sum_received":{"bits_per_second":7351234567.8}}}', (7351.2345678, "")),
    "refused": (
        '{"start":{},"intervals":[],"end":{},"error":"error - unable to connect to server: Connection refused"}',
        (None, "error - unable to connect to server: Connection refused"),
    ),
    "nothing": ("", (None, "iperf3 gave no answer that can be read")),
    "no rate": ('{"end":{}}', (None, "iperf3 tells no rate")),
}


@pytest.mark.parametrize(("text", "expected"), IPERF.values(), ids=IPERF)
def test_iperf3(text: str, expected: tuple[float | None, str]) -> None:
    assert link_speed.parse(text) == expected


def test_a_peer_that_does_not_come_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "iperf3"
    program.write_text(
        '#!/bin/sh\ncase "$1" in --server) exec sleep 30;; *) echo \'{"error":"refused"}\'; exit 1;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(link_speed, "PROGRAM", str(program))
    rounds = [{"number": 0, "peer": "b", "address": "127.0.0.1", "sends": True}]
    assert link_speed.measure(rounds, "127.0.0.1", 5201, 0.1, 0.3) == [
        {"peer": "b", "mbit": None, "problem": "refused"}
    ]
    start = time.monotonic()
    receiving = [{**rounds[0], "sends": False}]
    assert link_speed.measure(receiving, "127.0.0.1", 5201, 0.1, 0.3) == []
    assert time.monotonic() - start < 3


def test_one_slow_node_of_three_is_found() -> None:
    """As measured in a lab, node2 slowed to 200 Mbit/s: the middle one of the links is slow itself."""
    names = ["node1", "node2", "node3"]
    rates = {**slow_node("node2", 193.0, names=names), ("node1", "node3"): 2390.0, ("node3", "node1"): 2980.0}
    assert acceptance.judge(links(rates, names), 0).slow_nodes == ("node2",)
