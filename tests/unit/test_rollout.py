"""In which waves replicas are changed, and when a rollout stops."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder import rollout, units


def process(name: str, port: int = 8000, gpus: str = "") -> dict[str, Any]:
    env = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    return {"name": name, "health": {"port": port}, "env": env, "stop_seconds": 150}


def a_slice(replicas: int, *processes: dict[str, Any], url: str = "http://n:{}/v1", name: str = "n") -> dict[str, Any]:
    return {
        "deployment": {"replicas": replicas},
        "endpoints": [
            {"replica": number, "node": name.format(number), "base_url": url.format(number)}
            for number in range(replicas)
        ],
        "node": {"processes": list(processes), "load_deadline_seconds": 600},
    }


def state(name: str, how: str) -> dict[str, Any]:
    """how: new (as wanted), old, broken (old, unhealthy), gone."""
    return {
        "name": name, "running": how != "gone", "outdated": how in ("old", "broken"),
        "phase": {"broken": "unhealthy", "gone": "stopped"}.get(how, "ready"),
    }  # fmt: skip


def node(wanted: dict[str, Any], *how: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    names = [each["name"] for each in wanted["node"]["processes"]]
    return {
        "deployment_slice": wanted, "release_before": wanted if before is None else before, "release_ready": True,
        "service_states": [state(name, each) for name, each in zip(names, how, strict=True)],
    }  # fmt: skip


def and_still(known: dict[str, Any], **states: str) -> dict[str, Any]:
    """A node that has processes of an earlier release under other names, too."""
    more = [state(name.replace("_", "-"), how) for name, how in states.items()]
    return known | {"service_states": known["service_states"] + more}


def half_nodes(count: int = 2, first: int = 8000, engine: str = "vllm") -> dict[str, Any]:
    """Replicas of TP4 beside each other on one node with eight GPUs."""
    gpus = ["0,1,2,3", "4,5,6,7", "8,9,10,11"]
    processes = (process(f"{engine}-{n}", first + n, gpus[n]) for n in range(count))
    return a_slice(count, *processes, url=f"http://n:{first}+{{}}/v1")


SGLANG = half_nodes(engine="sglang")
SWAPPED = a_slice(2, process("sglang-0", 8001, "0,1,2,3"), process("sglang-1", 8000, "4,5,6,7"))
ONE = a_slice(1, process("vllm-0"))
TWO = half_nodes()
THREE = {f"n{number}": a_slice(3, process(f"vllm-{number}"), name="n{}") for number in range(3)}
WELL: dict[str, Any] = {"release_seen": {"current": "p", "reasons": []}}
NOT_WELL = {"release_seen": {"current": "p", "reasons": ["vllm-0 is stopped"]}}


OUTAGE = ": nothing answers from the stop until the new start is ready, 750 s at most."
MAYBE = ": nothing that was looked at answers from the stop until the new start is ready, 750 s at most."


def told(found: dict[str, Any]) -> list[tuple[list[int], list[int], list[int]]]:
    return [(wave["replicas"], wave["drain"], wave["patient"]) for wave in found["waves"]]


def each_on_its_own(*how: str) -> dict[str, Any]:
    return {host: node(kept, one) for (host, kept), one in zip(THREE.items(), how, strict=True)}


@pytest.mark.parametrize(
    ("nodes", "most", "again", "waves", "text"),
    [
        # Nothing runs yet: all at the same time.
        ({"n": node(TWO, "gone", "gone", before={})}, 1, False, [([0, 1], [], [])], ""),
        # Half-node rolling.
        ({"n": node(TWO, "old", "old")}, 1, False, [([0], [0], [0]), ([1], [1], [1])],
         "One after the other, while the others answer: replica 0; then replica 1."),
        # One replica.
        ({"n": node(ONE, "old")}, 1, False, [([0], [], [])],
         "Replica 0 at once, because there is no other one" + OUTAGE),
        ({"n": node(ONE, "broken")}, 1, False, [([0], [], [])], ""),
        # As many as the operator lets go.
        ({"n": node(TWO, "old", "old")}, "2", False, [([0, 1], [], [])],
         "Replicas 0, 1 at once, because deploy_max_unavailable is 2" + OUTAGE),
        (each_on_its_own("old", "old", "old"), 2, False, [([0, 1], [0, 1], [0, 1]), ([2], [2], [2])],
         "One after the other, while the others answer: replicas 0, 1; then replica 2."),
        # What does not answer comes first, and nobody waits for its requests.
        (each_on_its_own("old", "broken", "old"), 1, False, [([1], [1], []), ([0], [0], [0]), ([2], [2], [2])],
         "One after the other, while the others answer: replica 1, which does not serve; then replica 0; then "
         "replica 2."),
        (each_on_its_own("broken", "broken", "gone"), 1, False, [([0, 1, 2], [], [])], ""),
        # A rollout that was broken off, or the way back from one: what is as wanted is asked and not stopped.
        ({"n": node(TWO, "new", "old")}, 1, False, [([0], [], []), ([1], [1], [1])],
         "One after the other, while the others answer: replica 1."),
        ({"n": node(TWO, "new", "broken")}, 1, False, [([0, 1], [1], [])], ""),
        ({"n": node(TWO, "new", "new")}, 1, False, [([0, 1], [], [])], ""),
        ({"n": node(TWO, "new", "new")}, 1, True, [([0], [0], [0]), ([1], [1], [1])],
         "One after the other, while the others answer: replica 0; then replica 1."),
        # Only one of three nodes changes, the others answer.
        ({"n1": node(THREE["n1"], "old"), "n0": WELL, "n2": WELL}, 1, False, [([1], [1], [1])],
         "One after the other, while the others answer: replica 1."),
        ({"n1": node(THREE["n1"], "gone", before={})}, 1, False, [([1], [1], [])], ""),
        # With --limit nobody looked at the others.
        ({"n1": node(THREE["n1"], "old")}, 1, False, [([1], [1], [1])],
         "Replica 1 at once, because no other one was looked at" + MAYBE + " Not looked at: replicas 0, 2."),
        ({"n1": node(THREE["n1"], "old"), "n0": WELL}, 1, False, [([1], [1], [1])],
         "One after the other, while the others answer: replica 1. Not looked at: replica 2."),
        ({"n1": node(THREE["n1"], "old"), "n0": NOT_WELL, "n2": WELL}, 3, False, [([1], [], [])],
         "Replica 1 at once, because deploy_max_unavailable is 3; replicas on other nodes answer meanwhile. "
         "Not looked at: replica 0."),
        ({"n1": node(THREE["n1"], "old"), "n2": node(THREE["n2"], "broken")}, 1, False,
         [([2], [2], []), ([1], [1], [1])],
         "One after the other, while the others answer: replica 2, which does not serve; then replica 1. "
         "Not looked at: replica 0."),
        ({"n1": node(THREE["n1"], "old"), "n2": node(THREE["n2"], "old")}, 2, False, [([1, 2], [1, 2], [1, 2])],
         "Replicas 1, 2 at once, because no other one was looked at" + MAYBE + " Not looked at: replica 0."),
        # A replica more, and one less.
        ({"n": node(half_nodes(3), "old", "old", "gone", before=TWO)}, 1, False,
         [([2], [2], []), ([0], [0], [0]), ([1], [1], [1])],
         "One after the other, while the others answer: replica 2, which does not serve; then replica 0; then "
         "replica 1."),
        ({"n": node(TWO, "old", "new", before=half_nodes(3))}, 1, False,
         [([1], [], []), ([0], [0], [0]), ([], [2], [2])],
         "One after the other, while the others answer: replica 0; then replica 2, which goes."),
        # One is left of two: the other one answers until its requests are done, and meanwhile where that changes.
        ({"n": and_still(node(half_nodes(1), "new", before=TWO), vllm_1="old")}, 1, False,
         [([0], [], []), ([], [1], [1])], "One after the other, while the others answer: replica 1, which goes."),
        ({"n": and_still(node(half_nodes(1), "new", before=TWO), vllm_1="old")}, 2, False,
         [([0], [], []), ([], [1], [1])], "One after the other, while the others answer: replica 1, which goes."),
        ({"n": and_still(node(half_nodes(1), "old", before=TWO), vllm_1="old")}, 1, False,
         [([0], [0], [0]), ([], [1], [1])],
         "One after the other, while the others answer: replica 0; then replica 1, which goes."),
        ({"n": and_still(node(half_nodes(1), "broken", before=TWO), vllm_1="old")}, 1, False,
         [([0], [0], []), ([], [1], [1])],
         "One after the other, while the others answer: replica 0, which does not serve; then replica 1, which goes."),
        ({"n": and_still(node(half_nodes(1), "old", before=TWO), vllm_1="gone")}, 1, False, [([0], [], [])],
         "Replica 0 at once, because there is no other one" + OUTAGE),
        # The run was broken off before it stopped what goes.
        ({"n": and_still(node(half_nodes(1), "new"), vllm_1="old")}, 1, False,
         [([0], [], []), ([], [1], [1])], "One after the other, while the others answer: replica 1, which goes."),
        ({"n": and_still(node(half_nodes(1), "new"), vllm_1="gone")}, 1, False, [([0], [], [])], ""),
        # Another engine in the same place: what runs of the one before answers until its replica's turn.
        ({"n": and_still(node(SGLANG, "gone", "gone", before=TWO), vllm_0="old", vllm_1="old")}, 1, False,
         [([0], [0], [0]), ([1], [1], [1])],
         "One after the other, while the others answer: replica 0; then replica 1."),
        ({"n": and_still(node(SGLANG, "gone", "gone", before=TWO), vllm_0="old", vllm_1="gone")}, 1, False,
         [([1], [1], []), ([0], [0], [0])],
         "One after the other, while the others answer: replica 1, which does not serve; then replica 0."),
        # The run was broken off after the first replica.
        ({"n": and_still(node(SGLANG, "new", "gone"), vllm_0="gone", vllm_1="old")}, 1, False,
         [([0], [], []), ([1], [1], [1])],
         "One after the other, while the others answer: replica 1."),
        ({"n": and_still(node(ONE, "gone"), ray_0="old")}, 1, False, [([0], [], [])], ""),
        ({"n": and_still(node(SWAPPED, "gone", "gone", before=TWO), vllm_0="old", vllm_1="old")}, 1, False,
         [([0, 1], [], [])],
         "Replicas 0, 1 at once, because replicas 0, 1 will have another node, port or GPUs" + OUTAGE),
        # What one takes the other still has.
        ({"n": node(TWO, "old", "old", before=half_nodes(2, first=8001))}, 1, False, [([0, 1], [], [])],
         "Replicas 0, 1 at once, because replicas 0, 1 will have another node, port or GPUs" + OUTAGE),
    ],
)  # fmt: skip
def test_waves(nodes: dict[str, Any], most: Any, again: bool, waves: list[Any], text: str) -> None:
    changing = [host for host, known in nodes.items() if "deployment_slice" in known]
    found = rollout.rollout(nodes, changing, most, again)
    assert (told(found), found["text"]) == (waves, text)
    assert [wave["number"] for wave in found["waves"]] == [*range(len(waves))]
    assert found["outage"] is ("nothing " in text)
    assert not (found["outage"] and found["others"])


@pytest.mark.parametrize(
    ("wanted", "before", "most", "text"),
    [
        (SGLANG, TWO, 1, "One replica after the other, while those that answer now go on."),
        (SGLANG, TWO, 2, "Replicas 0, 1 at once, because deploy_max_unavailable is 2" + OUTAGE),
        (SWAPPED, TWO, 1, "Replicas 0, 1 at once, because replicas 0, 1 will have another node, port or GPUs" + OUTAGE),
        (half_nodes(1), TWO, 1, "One replica after the other, while those that answer now go on."),
        (ONE, ONE, 1, "Replica 0 at once, because there is no other one" + OUTAGE),
        (TWO, {}, 1, ""),
    ],
)
def test_what_a_plan_foretells_is_what_the_rollout_decides(
    wanted: dict[str, Any], before: dict[str, Any], most: int, text: str
) -> None:
    known = {"deployment_slice": {"plan_id": "new", **wanted}, "release_slice": {"plan_id": "old", **before}}
    assert rollout.foretold({"n": known}, ["n"], most) == text
    same = {**known, "release_slice": known["deployment_slice"]}
    assert rollout.foretold({"n": same}, ["n"], most) == ""
    with pytest.raises(ValueError, match="deploy_max_unavailable is 'x'"):
        rollout.foretold({"n": known}, ["n"], "x")


def test_a_wave_names_its_nodes_its_processes_and_its_endpoints() -> None:
    """Replicas over two nodes each, with Ray; ranks of one are changed together."""
    nodes = {}
    for number in range(4):
        replica = number // 2
        kept = a_slice(2, process(f"ray-{replica}", 6379), process(f"vllm-{replica}"))
        nodes[f"n{number}"] = node(kept, "old", "old")
    first, second = rollout.rollout(nodes, list(nodes), 1, False)["waves"]
    part = {"processes": ["ray-0", "vllm-0"], "forget": True, "again": [], "ends": []}
    assert (first["nodes"], first["first"]) == ({"n0": part, "n1": part}, "n0")
    assert [endpoint["replica"] for endpoint in second["endpoints"]] == [1]
    assert list(second["nodes"]) == ["n2", "n3"]


def test_a_node_forgets_what_the_plan_has_not_in_its_last_wave() -> None:
    nodes = {"n": node(TWO, "old", "old", before=half_nodes(3))}
    waves = rollout.rollout(nodes, ["n"], 1, False)["waves"]
    assert [wave["nodes"]["n"]["forget"] for wave in waves] == [False, False, True]
    assert waves[2]["nodes"]["n"]["processes"] == ["vllm-0", "vllm-1"]


def test_each_wave_stops_what_an_earlier_engine_runs_of_its_own_replicas() -> None:
    nodes = {"n": and_still(node(SGLANG, "gone", "gone", before=TWO), vllm_0="old", vllm_1="old", vllm_2="old")}
    waves = rollout.rollout(nodes, ["n"], 1, False)["waves"]
    assert [wave["nodes"]["n"] for wave in waves] == [
        {"processes": ["sglang-0"], "forget": False, "again": [], "ends": ["vllm-0"]},
        {"processes": ["sglang-1"], "forget": False, "again": [], "ends": ["vllm-1"]},
        # Replica 2 goes.
        {"processes": ["sglang-0", "sglang-1"], "forget": True, "again": [], "ends": []},
    ]


def test_what_an_earlier_release_runs_is_told_by_all_releases() -> None:
    """The broken-off run had made the new one current already."""
    slices = {
        "new": SGLANG, "old": half_nodes(3), "older": a_slice(2, process("vllm-0", 9000), process("ray-0", 6379)),
    }  # fmt: skip
    known = [{"plan_id": name, "current": name == "new", "previous": name == "old"} for name in ("older", "new", "old")]
    found = units.superseded(known, slices, SGLANG)
    assert [(each["name"], each["health"]["port"]) for each in found] == [
        ("vllm-0", 8000), ("vllm-1", 8001), ("vllm-2", 8002), ("ray-0", 6379),
    ]  # fmt: skip
    assert units.superseded(known, {"new": SGLANG}, SGLANG) == []


def test_what_hangs_is_started_again_and_so_is_everything_by_force() -> None:
    nodes = {"n": node(TWO, "new", "broken")}
    for force, again in ((False, ["vllm-1"]), (True, ["vllm-1"])):
        assert rollout.rollout(nodes, ["n"], 1, force)["waves"][0]["nodes"]["n"]["again"] == again
    assert rollout.rollout(nodes, ["n"], 1, True)["waves"][1]["nodes"]["n"]["again"] == ["vllm-0"]


def test_the_way_back_begins_with_what_did_not_come_through_the_gate() -> None:
    """It calls itself healthy, and answered wrongly."""
    nodes = {"n": node(half_nodes(3), "new", "old", "old") | {"release_suspect": [1]}}
    found = rollout.rollout(nodes, ["n"], 1, False)
    assert told(found) == [([0, 1], [1], []), ([2], [2], [2])]
    assert found["text"].endswith(": replica 1, which does not serve; then replica 2.")


@pytest.mark.parametrize(
    ("current", "moving", "replicas", "wanted"),
    [
        # Replicas 1 and 2 end.
        ({"a": half_nodes(3)}, [], 1, {"a": [1, 2]}),
        # Replica 1 moves, and replica 0 answers meanwhile.
        ({"a": a_slice(2, process("vllm-1"))}, ["vllm-1"], 2, {"a": [1]}),
        # One of its two nodes does.
        ({"a": a_slice(2, process("vllm-1")), "b": {}}, ["vllm-1"], 2, {"a": [1], "b": []}),
        # It moved before, when this node did not answer.
        ({"a": a_slice(2, process("vllm-1"))}, [], 2, {"a": []}),
        ({"a": a_slice(2, process("vllm-1"))}, ["vllm-0"], 2, {"a": []}),
        # Nothing answers meanwhile: nobody would be helped by waiting.
        ({"a": a_slice(1, process("vllm-0"))}, ["vllm-0"], 1, {"a": []}),
        ({"a": a_slice(2, process("vllm-0")), "b": a_slice(2, process("vllm-1"))}, ["vllm-0", "vllm-1"], 2,
         {"a": [], "b": []}),
        ({"a": a_slice(2, process("vllm-0")), "b": a_slice(2, process("vllm-1"))}, ["vllm-0"], 1, {"a": [], "b": [1]}),
    ],
)  # fmt: skip
def test_whose_requests_are_waited_for_where_a_node_loses_its_part(
    current: dict[str, Any], moving: list[str], replicas: int, wanted: dict[str, list[int]]
) -> None:
    variables = {host: {"release_slice": kept} for host, kept in current.items()}
    variables["new"] = {"deployment_slice": a_slice(replicas, *(process(name) for name in moving))}
    assert {host: rollout.leaving(variables, [*current], ["new"], host, replicas) for host in current} == wanted


@pytest.mark.parametrize(
    ("current", "ranks", "replicas", "last"),
    [
        (a_slice(3, process("vllm-2")), [], 2, True),
        ({}, [], 2, True),
        # It moves, or moved while this node did not answer; one of two does.
        (a_slice(2, process("vllm-1")), [], 2, False),
        (half_nodes(3), [], 2, False),
        # Its other rank's node gets another replica now, or ends with this one.
        (a_slice(2, process("vllm-1")), ["gone", "new"], 1, False),
        (a_slice(2, process("vllm-1")), ["gone", "too"], 1, True),
    ],
)
def test_a_node_that_is_in_nobodys_way_is_stopped_last(
    current: dict[str, Any], ranks: list[str], replicas: int, last: bool
) -> None:
    if ranks:
        current = {**current, "node": {**current["node"], "ranks": [{"node": name} for name in ranks]}}
    assert rollout.goes_last({"gone": {"release_slice": current}}, "gone", ["new"], replicas) is last


def test_no_wave_where_a_node_is_not_ready() -> None:
    nodes = {"a": node(TWO, "old", "old"), "b": {"deployment_slice": TWO}}
    assert rollout.rollout(nodes, ["a", "b"], 1, False)["waves"] == []


@pytest.mark.parametrize("value", ["0", "", "all", -1, None])
def test_what_is_no_number_of_replicas_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"deploy_max_unavailable is .*: give a number of replicas, 1 or more"):
        rollout.rollout({"n": node(TWO, "old", "old")}, ["n"], value, False)
    assert rollout.refusal(value) == f"deploy_max_unavailable is {value!r}: give a number of replicas, 1 or more"


@pytest.mark.parametrize("value", [1, "2", " 3 "])
def test_a_number_of_replicas_is_not_refused(value: Any) -> None:
    assert rollout.refusal(value) == ""


@pytest.mark.parametrize(
    ("hosts", "number", "goes"),
    [
        ({"a": {"release_walked": 1}, "b": {"release_walked": 1, "release_went": False}}, 1, True),
        # Red; a node that did not come through the wave before; one that did not answer at all.
        ({"a": {"release_walked": 1, "release_went": "it: failed"}, "b": {"release_walked": 1}}, 1, False),
        ({"a": {"release_walked": 1}, "b": {"release_walked": 0}}, 1, False),
        ({"a": {"release_walked": 1}, "b": {}}, 1, False),
    ],
)
def test_the_first_red_stops_the_rollout(hosts: dict[str, Any], number: int, goes: bool) -> None:
    assert rollout.goes_on(hosts, list(hosts), number) is goes


def test_how_long_it_was_claims_nothing_of_what_nobody_looked_at() -> None:
    nodes = {"n1": node(THREE["n1"], "old") | {"release_stopped_at": 100.0}}
    found = rollout.rollout(nodes, ["n1"], 1, False)
    nodes["n1"]["release_rollout"] = found
    said = rollout.back_text(nodes, found["waves"][0], 142.0)
    assert said == "Nothing that was looked at answered for 42 s at most, from the stop to the right answers."
    nodes["n1"]["release_rollout"] = {**found, "not_seen": []}
    assert rollout.back_text(nodes, found["waves"][0], 142.0).startswith("Nothing answered for 42 s")


def test_how_far_it_has_come() -> None:
    waves = rollout.rollout({"n": node(TWO, "new", "old", before=half_nodes(3))}, ["n"], 1, False)["waves"]
    assert [rollout.doing(wave, len(waves)) for wave in waves] == [
        "wave 1 of 3: replica 0", "wave 2 of 3: replica 1", "wave 3 of 3: replica 2",
    ]  # fmt: skip
