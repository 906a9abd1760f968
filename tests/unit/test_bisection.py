"""Bisection of an all-reduce: whatever node or link is slow is named, in a bounded number of rounds."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import all_reduce as node_side

from stepladder import all_reduce
from stepladder.bisection import MOST_ROUNDS, Blame, Group, blame, next_groups

WANTED = 6.0


def search(count: int, nodes: tuple[int, ...] = (), links: tuple[tuple[int, int], ...] = ()) -> tuple[int, Blame]:
    """Rounds and blame where these are slow; a group is as slow as the worst that it holds."""
    names = [f"n{index:02}" for index in range(count)]
    bad_nodes = {names[index] for index in nodes}
    bad_links = [{names[one], names[other]} for one, other in links]

    def rate(members: tuple[str, ...]) -> float:
        slow = bad_nodes & {*members} or any(link <= {*members} for link in bad_links)
        return 1.0 if slow else 10.0

    done: list[Group] = []
    for number in range(MOST_ROUNDS + 1):
        groups = next_groups(names, done, WANTED)
        if not groups:
            return number, blame(done, WANTED)
        flat = [name for members in groups for name in members]
        assert len(flat) == len(set(flat)), "a node has one group in a round"
        done += [Group(names=members, gbit=rate(members)) for members in groups]
    raise AssertionError(f"more than {MOST_ROUNDS} rounds")


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16, 32])
def test_sound_nodes_take_one_round(count: int) -> None:
    assert search(count) == (1, Blame())


@pytest.mark.parametrize("count", [3, 4, 5, 7, 8, 16])
def test_every_slow_node_and_every_slow_link_is_named(count: int) -> None:
    for node in range(count):
        rounds, found = search(count, (node,))
        assert (found, rounds <= 9) == (Blame(nodes=(f"n{node:02}",)), True)
    for link in combinations(range(count), 2):
        assert search(count, (), (link,))[1] == Blame(links=((f"n{link[0]:02}", f"n{link[1]:02}"),))


@pytest.mark.parametrize("count", [5, 8, 16])
def test_two_slow_nodes(count: int) -> None:
    for pair in combinations(range(count), 2):
        assert sorted(search(count, pair)[1].nodes) == [f"n{one:02}" for one in pair]


def test_a_link_across_32_nodes_is_the_most_work() -> None:
    rounds, found = search(32, (), ((0, 31),))
    assert (rounds, found.links) == (18, (("n00", "n31"),))


def test_of_two_nodes_neither_is_to_blame() -> None:
    assert search(2, (1,)) == (1, Blame(links=(("n00", "n01"),)))


def test_a_group_that_no_pair_explains() -> None:
    """A switch's uplink that is enough for each pair, and not for all of them at once."""
    names = ("a", "b", "c", "d")
    done = [Group(names=names, gbit=2.0)]
    while groups := next_groups(names, done, WANTED):
        done += [Group(names=members, gbit=10.0) for members in groups]
    assert blame(done, WANTED) == Blame(together=(names,))


def test_one_that_breaks_is_as_bad_as_a_slow_one() -> None:
    names = ("a", "b", "c")
    done = [Group(names=names, problem="b: it did not answer")]
    assert next_groups(names, done, WANTED) == [("a", "b")]


# ---- rounds from what nodes kept -------------------------------------------------------------------------------------


def kept(gbit: float | None, *names: str, problem: str = "") -> dict[str, Any]:
    return {"names": list(names), "gbit": gbit, "problem": problem}


def variables(**done: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        host: {
            "acceptance_at": f"198.18.0.{number}",
            all_reduce.LOOKED: {"ready": True, "line_gbit": 10.0},
            all_reduce.DONE: rounds,
        }
        for number, (host, rounds) in enumerate(done.items(), 1)
    }


def test_the_parts_of_a_round_agree() -> None:
    hosts = ["a", "b", "c"]
    fresh = variables(a=[], b=[], c=[])
    parts = [all_reduce.part_of(fresh, hosts, host, 5301, 0) for host in hosts]
    assert parts == [
        {"names": hosts, "rank": rank, "address": "198.18.0.1", "port": 5301} for rank in range(3)
    ]  # fmt: skip
    whole = kept(0.2, *hosts)
    second = variables(a=[whole], b=[whole], c=[whole])
    assert all_reduce.part_of(second, hosts, "b", 5301, 0) == {
        "names": ["a", "b"], "rank": 1, "address": "198.18.0.1", "port": 5302,
    }  # fmt: skip
    assert all_reduce.part_of(second, hosts, "c", 5301, 0) == {}
    assert all_reduce.is_left(second, hosts, 0)


def test_what_nodes_kept_becomes_groups() -> None:
    told = variables(
        a=[kept(5.0, "a", "b", "c"), kept(1.0, "a", "b")],
        b=[kept(5.0, "a", "b", "c"), kept(None, "a", "b", problem="process 0: timed out")],
        c=[{"unreachable": True}, kept(None)],
    )
    assert all_reduce.history(told, ["a", "b", "c"]) == [
        Group(names=("a", "b", "c"), problem="c: it did not answer"),
        Group(names=("a", "b"), problem="b: process 0: timed out"),
    ]


WISHES: dict[str, tuple[dict[str, Any], float, tuple[float, str]]] = {
    "a figure": ({"line_gbit": 10.0}, 3.0, (3.0, "acceptance_all_reduce_gbit")),
    "the line rate": ({"line_gbit": 10.0}, 0.0, (6.0, "60% of the line rate, 10 Gbit/s")),
    "no line is told, nor iperf3's rate": (
        {"line_gbit": None}, 0.0, (0.0, "10% of 0.00 Gbit/s, what iperf3 reaches between the nodes"),
    ),
    "a line that one core does not fill": (
        {"line_gbit": 400.0}, 0.0, (6.0, "what gloo reaches on one core; the line rate is 400 Gbit/s"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "minimum", "expected"), WISHES.values(), ids=WISHES)
def test_what_an_all_reduce_has_to_have(seen: dict[str, Any], minimum: float, expected: tuple[float, str]) -> None:
    told = {host: {all_reduce.LOOKED: {"ready": True, **seen}} for host in "ab"}
    assert all_reduce.wanted(told, ["a", "b"], minimum) == expected


def test_the_line_rate_is_of_hardware_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [{"name": name, "address": name, "speed_mbit": 10000} for name in ("veth", "nic", "bond")]
    monkeypatch.setattr(node_side.peer_network, "interfaces", lambda: own)
    (tmp_path / "class/net/nic/device").mkdir(parents=True)
    (tmp_path / "class/net/bond/lower_nic").mkdir(parents=True)
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        port = tmp_path / "class/infiniband" / device / "ports/1"
        port.mkdir(parents=True)
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "state").write_text(f"{state}\n")
    rates = {name: node_side.line(name, "gloo", tmp_path)["gbit"] for name in ("veth", "nic", "bond", "none")}
    assert rates == {"veth": None, "nic": 10.0, "bond": 10.0, "none": None}
    assert node_side.line("veth", "nccl", tmp_path) == {"interface": "veth", "gbit": 800.0}


def test_gpus_on_all_nodes_take_nccl() -> None:
    eight = {"vendor": "nvidia", "gpus": [{}] * 8}
    both = {"a": {"acceptance_gpus": eight}, "b": {"acceptance_gpus": eight}}
    assert all_reduce.backend_of(both, ["a", "b"]) == {"backend": "nccl", "processes": 8, "vendor": "nvidia"}
    one = {**both, "b": {"acceptance_gpus": {"vendor": "", "gpus": []}}}
    assert all_reduce.backend_of(one, ["a", "b"])["backend"] == "gloo"


def test_nodes_without_torch_are_named_and_the_others_measured() -> None:
    told = variables(a=[], b=[], c=[])
    told["b"][all_reduce.LOOKED] = {"ready": False, "problem": "no environment with torch"}
    hosts = ["a", "b", "c"]
    assert all_reduce.lacking(told, hosts) == {"b": "no environment with torch"}
    assert all_reduce.part_of(told, hosts, "a", 5301, 0)["names"] == ["a", "c"]
