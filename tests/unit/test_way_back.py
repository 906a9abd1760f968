"""Which release is gone back to, and what is said when a new one is given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import deployments, evidence, release

from stepladder import exit_status, way_back


def kept(plan_id: str, mark: str = "", outcome: str = "proven", **more: Any) -> dict[str, Any]:
    return {
        "plan_id": plan_id, "current": mark == "current", "previous": mark == "previous", "written": 1.7e9,
        "since": None, "outcome": outcome, "reason": "", "runs": "step3 vllm", "missing": [], **more,
    }  # fmt: skip


def node(*releases: dict[str, Any], members: tuple[str, ...] = ("n0",), ranks: tuple[str, ...] = ()) -> dict[str, Any]:
    """members: where the replicas answer; ranks: the nodes of this one's replica, where it has several."""
    kept_slice = {
        "endpoints": [{"node": name} for name in members],
        "node": {"ranks": [{"node": name, "address": "198.18.0.1"} for name in ranks]},
    }
    return {"release_known": list(releases), "release_slices": {each["plan_id"]: kept_slice for each in releases}}


TWO = {"n0": node(kept("new", "current"), kept("old", "previous"))}


@pytest.mark.parametrize(
    ("nodes", "wanted", "chosen", "taking_part", "leaving"),
    [
        (TWO, "", "old", ["n0"], []),
        (TWO, "new", "new", ["n0"], []),
        (TWO, "ol", "old", ["n0"], []),
        (TWO, "current", "new", ["n0"], []),
        # A node that the deployment left has the release too, and is part of the way back.
        (
            {
                "n0": node(kept("new", "current"), kept("old", "previous"), members=("n0", "n1")),
                "n1": node(kept("old", "previous"), members=("n0", "n1")),
            },
            "", "old", ["n0", "n1"], [],
        ),
        # A node that came with the new release has no part in the old one.
        ({**TWO, "n1": node(kept("new", "current"))}, "", "old", ["n0"], ["n1"]),
    ],
)  # fmt: skip
def test_choice(nodes: dict[str, Any], wanted: str, chosen: str, taking_part: list[str], leaving: list[str]) -> None:
    assert way_back.choose(nodes, list(nodes), wanted) == {
        "plan_id": chosen, "nodes": taking_part, "leaves": leaving, "left": "", "refusal": "",
    }  # fmt: skip


BOTH = (kept("new", "current", "unknown"), kept("old", "previous"))
PAIR = ("n0", "n1")
# Two replicas of a node each, and two of two nodes each.
SINGLES = {name: node(*BOTH, members=PAIR) for name in PAIR}
DOUBLES = {
    name: node(*BOTH, members=("n0", "n2"), ranks=ranks) for ranks in (("n0", "n1"), ("n2", "n3")) for name in ranks
}
EMPTY = {"n0": node(), "n1": SINGLES["n1"]}
NO_WEIGHTS = {"n0": node(BOTH[0], kept("old", "previous", missing=["/v"]), members=PAIR), "n1": SINGLES["n1"]}


@pytest.mark.parametrize(
    ("nodes", "answering", "by_hand", "left", "by_itself", "leaving"),
    [
        (SINGLES, PAIR, ["n0", "n1"], "", ["n0", "n1"], []),
        (SINGLES, ("n1",), ["n1"], "Not brought back: n0 did not answer.", ["n1"], []),
        # Whole replicas only; by itself, what runs the release that was given up is stopped.
        (DOUBLES, ("n1", "n2", "n3"), ["n2", "n3"],
         "Not brought back: n0 did not answer; n1, whose replica has n0.", ["n2", "n3"], ["n1"]),
        (EMPTY, PAIR, "  n0 has no such release\n",
         "Not brought back: n0 has no such release.", ["n1"], []),
        (NO_WEIGHTS, PAIR, "  n0 has no /v\n", "Not brought back: n0 has no /v.", ["n1"], ["n0"]),
        (DOUBLES, ("n1",), "  n0 did not answer\n  n2 did not answer\n", None,
         "  n0 did not answer\n  n2 did not answer\n", []),
    ],
)  # fmt: skip
def test_what_is_dead_keeps_no_healthy_replica_from_the_way_back(
    nodes: dict[str, Any], answering: tuple[str, ...], by_hand: Any, left: str, by_itself: Any, leaving: list[str]
) -> None:
    mine = way_back.choose(nodes, answering, asked=list(nodes))
    own = way_back.automatic(nodes, answering, "new", True, list(nodes))
    for choice, expected in ((mine, by_hand), (own, by_itself)):
        if isinstance(expected, str):
            assert choice["refusal"].startswith(f"Release old cannot be brought back:\n{expected}")
            assert choice["nodes"] == []
        else:
            assert (choice["nodes"], choice["refusal"], choice["left"]) == (expected, "", left)
    assert own["leaves"] == leaving
    assert mine["leaves"] == []


def test_a_limit_is_told_all_nodes_that_it_lacks() -> None:
    names = ("n0", "n1", "n2", "n3")
    one = {name: node(*BOTH, members=("n0",), ranks=names) for name in names[:2]}
    refusal = way_back.choose(one, ["n0", "n1"], asked=["n0", "n1"])["refusal"]
    assert refusal.splitlines()[1:3] == [
        f"  {name} was not asked, and is in a replica with n0, n1: add it to --limit" for name in ("n2", "n3")
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected a mapping, found list"),
        (None, "No such file or directory"),
        # As one that another user may not read.
        ("a folder", "Is a directory"),
    ],
)
def test_a_release_that_is_there_and_cannot_be_read_is_named(tmp_path: Path, content: str | None, fault: str) -> None:
    for name in ("broken", "well"):
        (tmp_path / f"deployments/{name}/releases/p").mkdir(parents=True)
        (tmp_path / f"deployments/{name}/current").symlink_to("releases/p")
    (tmp_path / "deployments/gone/releases").mkdir(parents=True)
    (tmp_path / "deployments/well/current/plan.json").write_text("{}")
    file = tmp_path / "deployments/broken/current/plan.json"
    if content == "a folder":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    found, faults = deployments.read_deployments(str(tmp_path))
    assert found == {"well": {}}
    assert len(faults) == 1
    assert faults[0].startswith(f"{file}: ")
    assert fault in faults[0]
    assert deployments.read_deployments(str(tmp_path / "nothing")) == ({}, [])


def test_limit_names_whole_replicas() -> None:
    one = way_back.choose(DOUBLES, ["n2", "n3"], asked=["n2", "n3"])
    assert (one["nodes"], one["left"]) == (["n2", "n3"], "Not brought back: n0 was not asked.")
    half = way_back.choose(DOUBLES, ["n1", "n2", "n3"], asked=["n1", "n2", "n3"])
    assert half["refusal"].startswith(
        "Release old cannot be brought back:\n  n0 was not asked, and is in a replica with n1: add it to --limit\nKnown"
    )


@pytest.mark.parametrize(
    ("nodes", "wanted", "message"),
    [
        ({"n0": node()}, "current", "Nothing is deployed. Run the verb 'deploy'. No release is known."),
        ({"n0": node(kept("a", "current")), "n1": node(kept("b", "current"))}, "current",
         "The nodes do not agree on the release that is current (n0: a; n1: b). Run the verb 'deploy'. "
         "Known releases:\n   a  2023-11-14 22:13 UTC  proven, runs now  step3 vllm  on n0\n"
         "   b  2023-11-14 22:13 UTC  proven, runs now  step3 vllm  on n1"),
        ({"n0": node()}, "", "There is nothing to go back to: no release before the one that runs is known to have run "
         "right. No release is known."),
        ({"n0": node(kept("new", "current"), kept("bad", outcome="failed"))}, "",
         "There is nothing to go back to: no release before the one that runs is known to have run right. "
         "Known releases:\n   new  2023-11-14 22:13 UTC  proven, runs now  step3 vllm  on n0\n"
         "   bad  2023-11-14 22:13 UTC  never ran right  step3 vllm  on n0"),
        (TWO, "zzz", "There is no release zzz. Known releases:"),
        ({"n0": node(kept("aa1", "current"), kept("aa2"))}, "aa", "More than one release begins with aa. Known"),
        ({**TWO, "n1": node(kept("new", "current"), kept("older", "previous"))}, "",
         "The nodes do not agree on the release before (n0: old; n1: older). Name one with -e rollback_to=ID."),
        ({"n0": node(kept("new", "current"), kept("old", "previous", missing=["/v/.stepladder.json"]))}, "",
         "Release old cannot be brought back:\n  n0 has no /v/.stepladder.json\nKnown"),
    ],
)  # fmt: skip
def test_refusals(nodes: dict[str, Any], wanted: str, message: str) -> None:
    choice = way_back.choose(nodes, list(nodes), wanted)
    assert (choice["plan_id"], choice["nodes"], choice["leaves"]) == ("", [], [])
    assert choice["refusal"].startswith(message)


FAILED = {"n0": node(kept("new", "current", "unknown"), kept("old", "previous"))}


@pytest.mark.parametrize(
    ("nodes", "allowed", "chosen", "refusal"),
    [
        (FAILED, True, "old", ""),
        (FAILED, False, "", "deploy_way_back is false, so nothing was brought back."),
        # It failed before it became current: what runs is what is brought back.
        (
            {"n0": node(kept("new", outcome="unknown"), kept("old", "current"), kept("older", "previous"))},
            True, "old", "",
        ),
        # On one node it had become current, on the other not yet.
        (
            {
                "n0": node(kept("new", "current", "unknown"), kept("old", "previous")),
                "n1": node(kept("old", "current"), kept("older", "previous")),
            },
            True, "old", "",
        ),
        (TWO, True, "", "Release new ran right before, so the fault need not be its own, and no other release was "
         "brought back. The verb 'rollback' does that."),
        ({"n0": node(kept("new", "current", "failed"))}, True, "",
         "There is nothing to go back to: no release before it is known to have run right."),
        (
            {
                "n0": node(kept("new", "current", "unknown"), kept("old", "previous")),
                "n1": node(kept("new", "current", "unknown"), kept("older", "previous")),
            },
            True, "", "The nodes do not agree on the release before it: old on n0; older on n1.",
        ),
    ],
)  # fmt: skip
def test_what_is_brought_back_by_itself(nodes: dict[str, Any], allowed: bool, chosen: str, refusal: str) -> None:
    choice = way_back.automatic(nodes, list(nodes), "new", allowed)
    assert (choice["plan_id"], choice["refusal"]) == (chosen, refusal)


@pytest.mark.parametrize(
    ("attempt", "chosen"),
    [
        # Other replicas never stopped, or nothing at all was stopped: what ran before is the truth.
        ({"release_before": {"plan_id": "old"}, "release_tried_at": 1.0, "release_others": True}, "old"),
        ({"release_before": {"plan_id": "old"}}, "old"),
        # It was the only replica; it was the same release, started again by force.
        ({"release_before": {"plan_id": "old"}, "release_tried_at": 1.0, "release_others": False}, ""),
        ({"release_before": {"plan_id": "new"}, "release_tried_at": 1.0, "release_others": True}, ""),
        ({"release_before": {}}, ""),
    ],
)
def test_one_that_ran_right_before_is_replaced_where_the_one_before_still_runs(
    attempt: dict[str, Any], chosen: str
) -> None:
    nodes = {"n0": {**TWO["n0"], **attempt}}
    assert way_back.automatic(nodes, ["n0"], "new", True)["plan_id"] == chosen


def told(went: object, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "n0": {
            "release_given_up": {"plan_id": "new", "reason": "n0: Ask every endpoint:\n  chat failed"},
            "release_choice": choice,
            "release_went": went,
            "release_evidence": "/e/1-new",
            "release_tried_at": 100.0,
        }
    }


@pytest.mark.parametrize(
    ("went", "choice", "status", "last"),
    [
        (True, {"plan_id": "old", "nodes": ["n0"], "refusal": ""}, "went_back",
         "Release old serves again: it was asked and answers as promised, at most 49 s after it was stopped."),
        ("Wait: dead", {"plan_id": "old", "nodes": ["n0"], "refusal": ""}, "no_way_back", "  n0: Wait: dead"),
        (False, {"plan_id": "", "nodes": [], "refusal": "Nothing to go back to."}, "no_way_back",
         "Nothing to go back to."),
    ],
)  # fmt: skip
def test_ending(went: object, choice: dict[str, Any], status: str, last: str) -> None:
    ending = way_back.ending(told(went, choice), ["n0"], 149.2)
    lines = ending["text"].splitlines()
    assert (ending["exit_status"], lines[-1]) == (status, last)
    assert lines[:5] == [
        "Release new did not run right and was given up:", "  n0: Ask every endpoint:", "    chat failed",
        "What shows why:", "  n0:/e/1-new",
    ]  # fmt: skip
    assert exit_status.status_of(status) in (20, 21)


@pytest.mark.parametrize(
    ("more", "outage"),
    [
        ({"release_others": True}, ", 49 s after its first replica was stopped; others answered all the time."),
        ({"release_tried_at": None}, "; nothing had been stopped."),
    ],
)
def test_ending_tells_what_was_away(more: dict[str, Any], outage: str) -> None:
    nodes = told(True, {"plan_id": "old", "nodes": ["n0"], "refusal": ""})
    nodes["n0"] |= more
    assert way_back.ending(nodes, ["n0"], 149.2)["text"].endswith(f"it was asked and answers as promised{outage}")


UNDRAINED = "Tell the gateways:\n  Replica 1 still has 3 request(s) in flight after 600 s."


@pytest.mark.parametrize(
    ("walked", "lines"),
    [
        (0, ["Nothing had been stopped.", "Replica 0, 1, 2, 3 runs on as before; "]),
        (2, ["Replica 0, 2 has it and answers as promised.", "Replica 1, 3 runs on as before; "]),
    ],
)
def test_ending_of_a_rollout_that_could_not_drain(walked: int, lines: list[str]) -> None:
    waves = [{"replicas": [2], "drain": [2]}, {"replicas": [0], "drain": [0]}, {"replicas": [1], "drain": [1]}]
    waves.append({"replicas": [], "drain": [3]})
    more = {"release_rollout": {"waves": waves}, "release_walked": walked, "deployment_slice": {"plan_id": "new"}}
    nodes = {
        "n0": {"release_went": True},
        "n1": {**more, "release_went": UNDRAINED, "release_not_drained": [1]},
    }
    assert way_back.is_undrained(nodes, ["n0", "n1"])
    ending = way_back.ending(nodes, ["n0", "n1"], 149.2)
    said = ending["text"].splitlines()
    assert ending["exit_status"] == "not_drained"
    assert said[:3] == [
        "Release new goes no further: replica 1 could not be taken out of rotation:", "  Tell the gateways:",
        "    Replica 1 still has 3 request(s) in flight after 600 s.",
    ]  # fmt: skip
    assert [said[3], said[4][: len(lines[1])]] == lines
    assert said[5] == (
        "Run the same command again (a rollback with -e rollback_to=new): it goes on from here. Or give requests "
        "longer: -e deploy_drain_seconds=..."
    )


CHOSEN = {"plan_id": "old", "nodes": ["n0", "n1"], "refusal": ""}
GIVEN_UP = {"release_given_up": {"plan_id": "new", "reason": "n1: Ask every endpoint:\n  chat failed"}}
TO_FINISH = (
    "To finish it: rollback -e rollback_to=old. Where requests are in the way, give them longer "
    "(-e deploy_drain_seconds=...), or add -e deploy_break_requests=true, which breaks them off."
)


@pytest.mark.parametrize(
    ("walked", "suspect", "head", "lines"),
    [
        (1, [], "is back but for replica 0, 2",
         ["Replica 1 has it and answers as promised.",
          "Replica 0, 2 runs on as it did; should one end by itself, it starts as release old."]),
        # Nobody could take out what is broken, as the gateway's host is down.
        (0, [1], "was to be brought back, and no replica has it yet",
         ["Replica 1 does not serve.",
          "Replica 0, 2 runs on as it did; should one end by itself, it starts as release old."]),
    ],
)  # fmt: skip
def test_a_way_back_that_cannot_drain_tells_what_is_back_and_how_to_finish(
    walked: int, suspect: list[int], head: str, lines: list[str]
) -> None:
    """Replica 0 had passed the gate with the new release, replica 1 is the red one."""
    waves = [{"replicas": [1], "drain": [1]}, {"replicas": [0], "drain": [0]}, {"replicas": [], "drain": [2]}]
    number = waves[walked]["drain"]
    more = {**GIVEN_UP, "release_choice": CHOSEN, "release_walked": walked, "release_rollout": {"waves": waves}}
    nodes = {
        "n0": {**more, "release_went": UNDRAINED, "release_not_drained": number, "release_suspect": []},
        "n1": {**more, "release_went": True, "release_not_drained": [], "release_suspect": suspect},
    }
    ending = way_back.ending(nodes, ["n0", "n1"], 149.2)
    assert ending["exit_status"] == "not_drained"
    assert ending["text"].splitlines() == [
        "Release new did not run right and was given up:", "  n1: Ask every endpoint:", "    chat failed",
        f"Release old {head}: replica {number[0]} could not be taken out of rotation:",
        "  Tell the gateways:", "    Replica 1 still has 3 request(s) in flight after 600 s.",
        *lines, TO_FINISH,
    ]  # fmt: skip


def test_a_way_back_that_fails_otherwise_is_no_matter_of_draining() -> None:
    """What was held up before the release was given up is forgotten by then."""
    more = {**GIVEN_UP, "release_choice": CHOSEN}
    nodes = {"n0": {**more, "release_went": "Wait: dead", "release_not_drained": []}, "n1": {**more}}
    assert way_back.ending(nodes, ["n0", "n1"], 149.2)["exit_status"] == "no_way_back"


def test_a_node_that_dies_while_evidence_is_gathered_takes_the_ending_not_with_it() -> None:
    choice = {"plan_id": "old", "nodes": ["n1"], "refusal": "", "left": "Not brought back: n0 did not answer."}
    nodes = {"n0": {**GIVEN_UP}, "n1": {**GIVEN_UP, "release_choice": choice, "release_went": True}}
    ending = way_back.ending(nodes, ["n0", "n1"], 149.2)
    assert ending["exit_status"] == "went_back"
    assert ending["text"].splitlines()[-2:] == [
        "Release old serves again: it was asked and answers as promised; nothing had been stopped.",
        "Not brought back: n0 did not answer.",
    ]


def test_where_no_node_came_to_choosing_nothing_was_brought_back() -> None:
    nodes = {"n0": {**GIVEN_UP, "release_others": True}, "n1": {**GIVEN_UP, "release_suspect": [1]}}
    ending = way_back.ending(nodes, ["n0", "n1"], 149.2)
    assert ending["exit_status"] == "no_way_back"
    assert ending["text"].splitlines() == [
        "Release new did not run right and was given up:", "  n1: Ask every endpoint:", "    chat failed",
        "No release was brought back: no node came to choosing one.",
        "Replica 1 does not serve, and gets no requests from a gateway. Replicas that the rollout had not reached run "
        "on as they did. 'deploy' goes on from here, 'rollback' goes back.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("others", "lines"),
    [
        ({}, []),
        ({"release_rollout": {"waves": [{"replicas": [0]}]}, "release_went": True},
         ["Replica 0 has it and answers as promised."]),
    ],
    ids=["before-the-others", "after-them"],
)  # fmt: skip
def test_ending_where_a_replica_that_goes_could_not_be_drained(others: dict[str, Any], lines: list[str]) -> None:
    held = {"release_went": UNDRAINED, "release_not_drained": [1], "release_dropped_for": "new"}
    ending = way_back.ending({"n0": others, "n1": held}, ["n0", "n1"], 149.2)
    assert ending == {
        "exit_status": "not_drained",
        "text": "\n".join(
            [
                "Release new goes no further: replica 1 could not be taken out of rotation:",
                "  n1: Tell the gateways:", "    Replica 1 still has 3 request(s) in flight after 600 s.", *lines,
                "Replica 1 runs on as before. Nothing was marked as failed, and nothing is brought back.",
                "Run the same command again (a rollback with -e rollback_to=new): it goes on from here. Or give "
                "requests longer: -e deploy_drain_seconds=...",
            ]
        ),
    }  # fmt: skip


def test_what_else_went_wrong_is_no_matter_of_draining() -> None:
    held = {"release_went": UNDRAINED, "release_not_drained": [1]}
    assert not way_back.is_undrained({"a": held, "b": {"release_went": "Wait: dead"}}, ["a", "b"])
    assert not way_back.is_undrained({"a": held, "b": {}}, ["a", "b"])
    assert not way_back.is_undrained({"a": {"release_went": "Wait: dead"}}, ["a"])


def test_ending_tells_what_a_rollout_without_a_way_back_leaves() -> None:
    nodes = told("Wait: dead", {"plan_id": "", "nodes": [], "refusal": "deploy_way_back is false."})
    nodes["n0"] |= {"release_others": True, "release_suspect": [1]}
    assert way_back.ending(nodes, ["n0"], 149.2)["text"].splitlines()[-2:] == [
        "deploy_way_back is false.",
        "Replica 1 does not serve, and gets no requests from a gateway. Replicas that the rollout had not reached run "
        "on as they did. 'deploy' goes on from here, 'rollback' goes back.",
    ]


def test_nothing_failed_is_done_and_an_unknown_status_names_the_known() -> None:
    assert way_back.ending({}, [], 0) == {"text": "", "exit_status": "done"}
    with pytest.raises(ValueError, match=r"exit_status 'nope' is unknown\. Choose one of: unreachable, not_ready,"):
        exit_status.status_of("nope")


def test_failures_name_nodes_that_went_silent() -> None:
    variables = {"a": {"release_went": True}, "b": {"release_went": "X: boom"}, "c": {}}
    assert way_back.failures(variables, ["a", "b", "c"]) == "b: X: boom\nc: did not answer"
    assert way_back.failures(variables, ["a"]) == ""


def test_a_long_failure_is_cut() -> None:
    shown = way_back.failure_text("Wait", {"msg": "\n".join(map(str, range(30)))}).splitlines()
    assert shown[:2] + shown[5:8] == ["Wait:", "  0", "  4", "    ...", "  20"]
    assert shown[-1] == "  29"


def test_of_a_loop_the_items_that_failed_are_told() -> None:
    items = [{"msg": "all well"}, {"failed": True, "msg": "gw2: 3 requests"}]
    result = {"msg": "One or more items failed", "results": items}
    assert way_back.failure_text("Drain", result) == "Drain:\n  gw2: 3 requests"
    assert way_back.failure_text("Drain", {"msg": "boom"}) == "Drain:\n  boom"


# --- on the node -----------------------------------------------------------------------------------------------------


def converge(root: Path, plan_id: str) -> dict[str, Any]:
    processes = [{"name": "vllm-0", "argv": ["/bin/echo", plan_id], "env": {}}]
    wanted = release.wanted_release(str(root), plan_id, {"plan_id": plan_id}, processes)
    found, steps = release.converge(str(root), wanted, 3, False, deadline=1)
    return release.result_of(found, wanted, steps, {})


def outcome(root: Path, plan_id: str, what: str) -> None:
    release.record_outcome(str(root), plan_id, what, "because", deadline=1)


def links(root: Path) -> tuple[str | None, str | None]:
    return release._release_of(root / "current"), release._release_of(root / "previous")


def test_a_release_that_never_ran_right_is_never_the_way_back(tmp_path: Path) -> None:
    root = tmp_path / "deployments" / "d"
    converge(root, "p1")
    outcome(root, "p1", "proven")
    converge(root, "p2")
    outcome(root, "p2", "failed")
    converge(root, "p3")
    assert links(root) == ("p3", "p1")
    # Cut before anything was said of p3: the one known to be right stays the way back.
    converge(root, "p4")
    assert links(root) == ("p4", "p1")
    outcome(root, "p4", "failed")
    converge(root, "p1")
    assert links(root) == ("p1", None), "neither what failed nor what was never asked"
    found, _ = deployments.read_releases(str(tmp_path), "d")
    assert {each["plan_id"]: each["outcome"] for each in found}.items() <= {
        "p1": "proven", "p2": "failed", "p3": "unknown", "p4": "failed",
    }.items()  # fmt: skip


def test_proven_stays_proven_and_an_unknown_release_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "d"
    converge(root, "p1")
    assert release.record_outcome(str(root), "p1", "failed", "slow disk", deadline=1)["outcome"] == "failed"
    assert release.record_outcome(str(root), "p1", "proven", "", deadline=1)["outcome"] == "proven"
    assert release.record_outcome(str(root), "p1", "failed", "later", deadline=1)["outcome"] == "proven"
    with pytest.raises(release.ReleaseError, match="there is no release p9 in"):
        release.record_outcome(str(root), "p9", "proven", "", deadline=1)


def test_a_dropped_node_keeps_the_way_back(tmp_path: Path) -> None:
    root = tmp_path / "d"
    converge(root, "p1")
    assert release.drop(str(root), check_mode=True)["changed"]
    assert links(root) == ("p1", None)
    assert release.drop(str(root), check_mode=False)["actions"] == ["unlink current, which was p1"]
    assert links(root) == (None, "p1")
    assert not release.drop(str(root), check_mode=False)["changed"]
    assert not release.drop(str(tmp_path / "nothing"), check_mode=False)["changed"]
    converge(root, "p1")
    assert links(root) == ("p1", None)


def test_what_a_release_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.stepladder.json").write_text("{}")
    found = {"node": {"venv": {"path": str(tmp_path / "venv")}, "weights": {"path": "/no"}, "tools": None}}
    assert deployments.missing(found) == ["/no/.stepladder/manifest.json"]


def test_evidence_is_capped_cleaned_and_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-" + "x" * 24
    texts = {"logs/a.log": [f"line {n}" for n in range(1000)], "small.txt": [f"--api-key {secret}", "token=abcdefgh"]}
    folders = []
    for second in range(4):
        monkeypatch.setattr(evidence.time, "time", lambda second=second: 1.7e9 + second)
        folders.append(Path(evidence.keep(str(tmp_path), "p1", texts, 1000, 3)))
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    files = [file for file in folders[-1].rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 1000 + len("(what stood before was left out)\n")
    log = (folders[-1] / "logs/a.log").read_text().splitlines()
    assert (log[0], log[-1]) == ("(what stood before was left out)", "line 999")
    small = (folders[-1] / "small.txt").read_text()
    assert secret not in small
    assert "abcdefgh" not in small


@pytest.mark.parametrize(
    ("sizes", "limit", "shares"), [([10, 500, 900], 1000, [10, 495, 495]), ([5, 5], 100, [5, 5]), ([], 9, [])]
)
def test_share(sizes: list[int], limit: int, shares: list[int]) -> None:
    assert evidence.share(sizes, limit) == shares


def test_the_docs_name_every_exit_status() -> None:
    text = Path(__file__).resolve().parents[2].joinpath("docs/on-call.md").read_text()
    table = {int(line.split("|")[1]) for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()}
    assert table == {0, 2, *exit_status.ExitStatus}
