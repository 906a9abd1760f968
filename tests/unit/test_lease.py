"""Leases: who gets a node, when one ends by itself, what is written down, whatever the time of day says."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.stepladder.core.plugins.action import lease as lease_action
from ansible_collections.stepladder.core.plugins.module_utils import lease
from ansible_collections.stepladder.core.plugins.modules import lease as lease_module
from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run

from stepladder import lease_text

MINE = {
    "run": "aaaa", "who": "ann", "origin": "ops1", "verb": "deploy", "why": "new weights", "deployment": "step3",
    "plan_id": "3f9a", "ttl": 120.0, "controller": {"boot": "b", "namespace": "n", "pid": 1, "started": "7"},
}  # fmt: skip
BOB = {**MINE, "run": "bbbb", "who": "bob", "origin": "ops2", "verb": "rollback", "why": ""}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node's clock that the test sets: boot and seconds since it."""

    class Hand:
        boot, seconds = "boot1", 1000.0

        def __call__(self) -> lease.Clock:
            return lease.Clock(self.boot, self.seconds)

    hand = Hand()
    monkeypatch.setattr(lease.Clock, "now", hand)
    return hand


def lines(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / "audit/audit.jsonl").read_text().splitlines()]


def test_the_second_is_told_whose_it_is_and_changes_nothing(tmp_path: Path, clock: Any) -> None:
    assert lease.take(str(tmp_path), MINE) == {"taken": True}
    clock.seconds += 63
    before = (tmp_path / "lease/lease.json").read_bytes()
    refused = lease.take(str(tmp_path), BOB)
    assert (refused["taken"], refused["holder"]["who"], refused["holder"]["age"]) == (False, "ann", 63.0)
    assert (tmp_path / "lease/lease.json").read_bytes() == before
    told = lease_text.refusal({"n1": {"lease_taken": refused}, "n2": {"lease_taken": {"taken": True}}}, ["n1", "n2"])
    since = refused["holder"]["since"]
    assert told["exit_status"] == "held"
    assert told["text"].splitlines()[:2] == [
        "This run may not change the nodes, and changed nothing:",
        f"  n1: held by ann from ops1: deploy step3 3f9a (new weights), since {since} (1 min 3 s), last heard of "
        "1 min 3 s ago, free by itself in 57 s",
    ]
    assert [line["event"] for line in lines(tmp_path)] == ["begin"]


@pytest.mark.parametrize(
    ("boot", "seconds", "free"),
    [
        ("boot1", 1119.0, False),
        ("boot1", 1121.0, True),
        # The node was started again: what is certain is only how long it is up.
        ("boot2", 30.0, False),
        ("boot2", 121.0, True),
    ],
)
def test_a_lease_ends_by_the_nodes_clock_since_boot(
    tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch, boot: str, seconds: float, free: bool
) -> None:
    lease.take(str(tmp_path), MINE)
    # An hour off, in either direction, plays no part.
    monkeypatch.setattr(lease, "utc", lambda: "1999-01-01T00:00:00Z")
    clock.boot, clock.seconds = boot, seconds
    assert lease.take(str(tmp_path), BOB)["taken"] is free
    if free:
        ended = lines(tmp_path)[1]
        assert (ended["event"], ended["who"]) == ("end", "ann")
        assert ended["outcome"].startswith("taken over: no sign of life for ")


def test_a_renewed_lease_lives_and_a_broken_one_cannot_be_renewed(tmp_path: Path) -> None:
    def renew() -> int:
        done = subprocess.run(["sh", "-c", lease.renewal(str(tmp_path), "aaaa", "Install: it's\nlong")], check=False)
        return done.returncode

    assert renew() == 3
    lease.take(str(tmp_path), MINE)
    taken = lease.read(str(tmp_path))
    assert taken
    assert renew() == 0
    renewed = lease.read(str(tmp_path))
    assert renewed
    assert renewed.doing == "Install: it's long"
    assert renewed.renewed.boot == taken.taken.boot
    old = replace(renewed, renewed=replace(renewed.renewed, seconds=renewed.renewed.seconds - 121))
    assert old.state(lease.Clock.now()) == "expired"
    assert lease.break_it(str(tmp_path), "bob", "ops2", "ann is on a plane")["who"] == "ann"
    assert renew() == 3
    assert lease.holds(str(tmp_path), "aaaa") == "the lease was broken, or was given back"
    assert [(line["event"], line.get("why")) for line in lines(tmp_path)] == [
        ("begin", "new weights"), ("break", "ann is on a plane"), ("end", "new weights"),
    ]  # fmt: skip
    assert not list((tmp_path / "lease").glob("renewed-*"))


@pytest.mark.parametrize(("moment", "renewed"), [("boot1 1000.00", 1000.004), ("boot1 1000.01", 1000.01)])
def test_a_renewal_in_the_hundredth_of_a_second_of_the_start_says_what_the_run_does(
    tmp_path: Path, clock: Any, moment: str, renewed: float
) -> None:
    clock.seconds = 1000.004
    lease.take(str(tmp_path), MINE)
    (tmp_path / "lease/renewed-aaaa").write_text(f"{moment} Install: engine\n")
    held = lease.read(str(tmp_path))
    assert held
    assert (held.renewed.seconds, held.doing) == (renewed, "Install: engine")


class Renewer(lease_action.ActionModule):
    """What a run leaves behind to renew its lease, over a connection of which the test says how each call ends.

    A renewal ends with an exit status, giving back with an answer, either with what the connection raises.
    """

    def __init__(self, beats: list[Any], answers: list[Any]) -> None:
        self.beats, self.answers, self.renewals, self.given_back = beats, answers, 0, 0
        self._mine = {"state_directory": "/s", "run": "aaaa", "ttl": "120"}
        self._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None))

    def _lives(self, main: int) -> bool:
        return bool(self.beats)

    def _low_level_execute_command(self, cmd: str, **_: Any) -> dict[str, Any]:
        self.renewals += 1
        return {"rc": ended(self.beats.pop(0))}

    def _call(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        self.given_back += 1
        return dict(ended(self.answers.pop(0)))

    def _remove_tmp_path(self, tmp_path: Any, force: bool = False) -> None:
        pass


def ended(how: Any) -> Any:
    if isinstance(how, Exception):
        raise how
    return how


BROKEN = AnsibleConnectionFailure("Failed to connect to the host via ssh: exit status 255")
GIVEN_BACK = {"released": True}
RENEWALS = [
    pytest.param([0, 0, 0], [GIVEN_BACK], (3, 1), 0, id="well"),
    pytest.param([0, BROKEN, 255, 0], [GIVEN_BACK], (4, 1), 0, id="connection-fails-once"),
    pytest.param([0, 3, 0, 0], [], (2, 0), 0, id="lost"),
    pytest.param([0], [BROKEN, {"failed": True, "msg": "x"}, GIVEN_BACK], (1, 3), 20, id="given-back-at-last"),
    pytest.param([0], [BROKEN] * 99, (1, 13), 120, id="given-up-when-it-has-ended-by-itself"),
]


@pytest.mark.parametrize(("beats", "answers", "calls", "seconds"), RENEWALS)
def test_a_connection_that_fails_ends_no_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: list[Any], answers: list[Any], calls: Any, seconds: float
) -> None:
    now = [0.0]
    monkeypatch.setattr(lease_action.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lease_action.time, "sleep", lambda wait: now.__setitem__(0, now[0] + wait))
    monkeypatch.setattr(lease_action.constants, "DEFAULT_LOCAL_TMP", str(tmp_path / "tmp"))
    renewer = Renewer([*beats], [*answers])
    renewer._renew(1, {})
    assert (renewer.renewals, renewer.given_back) == calls
    assert now[0] == seconds
    assert not (tmp_path / "tmp").exists()


def test_a_renewal_of_a_run_that_lost_its_lease_says_nothing_about_the_next_ones(tmp_path: Path, clock: Any) -> None:
    lease.take(str(tmp_path), MINE)
    (tmp_path / "lease/renewed-bbbb").write_text("boot1 99999.0 x\n")
    clock.seconds += 121
    assert lease.take(str(tmp_path), {**BOB, "run": "cccc"})["taken"]
    assert lease.holds(str(tmp_path), "aaaa").startswith("the lease is held by bob from ops2 for rollback since ")


def test_giving_back_is_only_for_the_holder_and_is_logged_with_how_it_went(tmp_path: Path, clock: Any) -> None:
    lease.take(str(tmp_path), MINE)
    clock.seconds += 5
    assert not lease.release(str(tmp_path), "bbbb", "done")
    assert lease.release(str(tmp_path), "aaaa", "done")
    assert not lease.release(str(tmp_path), "aaaa", "failed, interrupted or killed")
    assert (lines(tmp_path)[-1]["outcome"], lines(tmp_path)[-1]["seconds"]) == ("done", 5.0)
    assert lease.take(str(tmp_path), BOB)["taken"]
    assert not lease.release(str(tmp_path / "nothing here"), "aaaa", "done")
    assert not (tmp_path / "nothing here").exists()


def test_a_look_that_is_older_than_another_run_is_not_acted_on(tmp_path: Path, clock: Any) -> None:
    looked = lease.last_run(str(tmp_path))
    lease.take(str(tmp_path), MINE)
    lease.release(str(tmp_path), "aaaa", "done")
    refused = lease.take(str(tmp_path), BOB, seen=looked)
    assert refused == {"taken": False, "stale": True}
    told = lease_text.refusal({"n1": {"lease_taken": refused}}, ["n1"])
    assert told["text"].splitlines()[1] == "  n1: another run changed it since it was looked at; run the same again"
    assert told["exit_status"] == "held"
    assert lease.take(str(tmp_path), BOB, seen=lease.last_run(str(tmp_path)))["taken"]


def test_a_full_disk_begins_no_run_and_occupies_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    lease.take(str(tmp_path), MINE)
    monkeypatch.setattr(lease, "append", full)
    assert lease.release(str(tmp_path), "aaaa", "done")
    assert lease.read(str(tmp_path)) is None
    with pytest.raises(OSError, match="No space left"):
        lease.take(str(tmp_path), BOB)
    assert lease.read(str(tmp_path)) is None


def test_a_line_that_a_full_disk_takes_half_of_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.take(str(tmp_path), MINE)
    lease.release(str(tmp_path), "aaaa", "done")
    log = tmp_path / "audit/audit.jsonl"
    before, write = log.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[: len(content) // 2]))
    with pytest.raises(OSError, match="No space left") as full:
        lease.take(str(tmp_path), BOB)
    monkeypatch.undo()
    assert log.read_bytes() == before
    told = lease.fault_text(full.value, str(tmp_path))
    assert told.startswith(f"{log}: No space left on device. What cannot be written down does not begin.")
    assert lease.take(str(tmp_path), BOB)["taken"]


def test_a_full_disk_keeps_nobody_from_what_takes_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    by = {**dict.fromkeys(lease.AUDITED, ""), "verb": "drain"}
    assert lease.log(str(tmp_path), by, "") == ""
    monkeypatch.setattr(lease, "append", full)
    said = f"{tmp_path}/audit/audit.jsonl could not be written: No space left on device"
    assert lease.log(str(tmp_path), by, "done") == said


def test_a_run_that_is_gone_is_taken_over_from(tmp_path: Path, clock: Any) -> None:
    lease.take(str(tmp_path), MINE)
    assert lease.take(str(tmp_path), BOB, supersede="other")["taken"] is False
    assert lease.take(str(tmp_path), BOB, supersede="aaaa")["taken"]
    assert lines(tmp_path)[1]["outcome"] == "taken over: the run is gone"


def test_which_runs_are_known_to_be_gone(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    living = this_run.controller(sleeper.pid)
    assert not this_run.is_gone(living)
    assert this_run.is_gone({**living, "started": "1"}), "the number was given to another process"
    assert not this_run.is_gone({**living, "boot": "another machine", "started": "1"})
    assert not this_run.is_gone({**living, "namespace": "another container", "started": "1"})
    assert not this_run.is_gone({})
    sleeper.kill()
    sleeper.wait()
    assert this_run.is_gone(living)


def test_a_freeze_refuses_all_until_it_is_ended(tmp_path: Path) -> None:
    assert lease.freeze(str(tmp_path), "ann", "ops1", "trade fair")
    assert not lease.freeze(str(tmp_path), "ann", "ops1", "trade fair")
    refused = lease.take(str(tmp_path), BOB)
    assert (refused["taken"], refused["frozen"]["why"]) == (False, "trade fair")
    told = lease_text.refusal({"n1": {"lease_taken": refused}}, ["n1"])
    assert (told["exit_status"], "unfreeze -e freeze_reason=" in told["text"]) == ("frozen", True)
    (tmp_path / "freeze.json").write_text("{")
    assert "cannot be read" in lease.take(str(tmp_path), BOB)["frozen"]["why"]
    assert lease.unfreeze(str(tmp_path), "ann", "ops1", "over")
    assert not lease.unfreeze(str(tmp_path), "ann", "ops1", "over")
    assert lease.take(str(tmp_path), BOB)["taken"]


def seen(state: Path) -> dict[str, Any]:
    held = lease.read(str(state))
    holder = held.told(lease.Clock.now()) if held else None
    return {"lease_seen": {"holder": holder, "frozen": lease.read_freeze(str(state))}}


def test_gateway_and_watchdog_are_left_alone_while_somebody_is_at_work_or_in_a_freeze(
    tmp_path: Path, clock: Any
) -> None:
    free = {"lease_seen": {"holder": None, "frozen": None}}
    assert lease_text.in_the_way({"n1": free, "n2": seen(tmp_path)}, ["n1", "n2"])["text"] == ""
    lease.take(str(tmp_path), MINE)
    told = lease_text.in_the_way({"n1": free, "n2": seen(tmp_path)}, ["n1", "n2"])
    assert told["exit_status"] == "held"
    assert (
        told["text"].splitlines()[0].endswith("Gateway and watchdog were left as they are; run the same again later:")
    )
    assert (
        told["text"].splitlines()[1].startswith("  n2: held by ann from ops1: deploy step3 3f9a (new weights), since ")
    )
    assert told["text"].splitlines()[2] == lease_text.MEND
    own = {"lease_seen": {**seen(tmp_path)["lease_seen"], "mine": True}}
    assert lease_text.in_the_way({"n1": free, "n2": own}, ["n1", "n2"])["text"] == ""
    clock.seconds += 121
    assert lease_text.in_the_way({"n2": seen(tmp_path)}, ["n2"])["text"] == "", "its run is gone"
    lease.freeze(str(tmp_path), "ann", "ops1", "trade fair")
    told = lease_text.in_the_way({"n1": free, "n2": seen(tmp_path)}, ["n1", "n2"])
    assert told["exit_status"] == "frozen"
    assert "To end a freeze: bin/stepladder unfreeze -e freeze_reason=TEXT" in told["text"]
    # A run that had begun before goes on, on the nodes that it left alone too; not past another run.
    cold = seen(tmp_path)["lease_seen"]
    nodes = {"n1": {"lease_seen": {**cold, "holder": None}}, "n2": {"lease_seen": {**cold, "mine": True}}}
    assert lease_text.in_the_way(nodes, ["n1", "n2"])["text"] == ""
    clock.seconds -= 121
    told = lease_text.in_the_way({**nodes, "n3": seen(tmp_path)}, ["n1", "n2", "n3"])
    assert (told["exit_status"], "frozen" in told["text"]) == ("held", False)


def test_whose_run_changes_a_deployment_just_now(tmp_path: Path, clock: Any) -> None:
    silent: dict[str, Any] = {"lease_seen": {"unreachable": True}}
    lease.take(str(tmp_path), MINE)
    nodes = {"n1": {}, "n2": silent, "n3": seen(tmp_path)}
    assert lease_text.at_work(nodes, [*nodes], "step3").startswith("ann from ops1: deploy step3 3f9a (new weights)")
    assert lease_text.at_work(nodes, [*nodes], "other") == ""
    assert lease_text.at_work(nodes, ["n1", "n2"], "step3") == ""
    clock.seconds += 121
    assert lease_text.at_work({"n3": seen(tmp_path)}, ["n3"], "step3") == "", "its run is gone"


def test_who_lost_which_lease_is_told_for_all_nodes(tmp_path: Path) -> None:
    held, unreachable = {"lease_held": {"lost": ""}}, {"lease_held": {"unreachable": True}}
    lease.take(str(tmp_path), MINE)
    assert lease.holds(str(tmp_path), "aaaa") == ""
    (tmp_path / "lease/lease.json").write_text("{}")
    torn = {"lease_held": {"lost": lease.holds(str(tmp_path), "aaaa")}}
    assert lease_text.lost({"a": held, "b": unreachable, "c": {}}, ["a", "b", "c"]) == ""
    told = lease_text.lost({"a": held, "b": torn, "c": {"lease_held": {"lost": "it was broken"}}}, ["a", "b", "c"])
    lines = told.splitlines()
    assert lines[0] == "This run lost its lease and ends here, with the nodes as they are now ('status' shows them):"
    assert lines[1].startswith(f"  b: {tmp_path}/lease/lease.json cannot be read")
    assert lines[2:] == ["  c: it was broken"]


def test_a_lease_that_cannot_be_read_is_nobodys_to_take_but_can_be_broken(tmp_path: Path) -> None:
    lease.take(str(tmp_path), MINE)
    (tmp_path / "lease/lease.json").write_text("{}")
    with pytest.raises(lease.LeaseError, match="break it: bin/stepladder lease -e lease_break_reason="):
        lease.take(str(tmp_path), BOB)
    assert lease.break_it(str(tmp_path), "bob", "ops2", "torn") == {"unreadable": True}
    assert lease.take(str(tmp_path), BOB)["taken"]


def test_a_check_says_whose_lease_would_be_broken_and_breaks_none(tmp_path: Path) -> None:
    """As the module answers, with and without check mode."""
    lines = dict.fromkeys(lease_module.LINES, "")
    given = {**lines, "state_directory": str(tmp_path), "state": "broken", "why": "torn"}
    lease.take(str(tmp_path), MINE)
    told = lease_text.broken(lease_module.act(given, check_mode=True))
    assert told.startswith("would break the lease of ann from ops1: deploy step3 3f9a (new weights), since ")
    assert lease.holds(str(tmp_path), "aaaa") == ""
    told = lease_text.broken(lease_module.act(given, check_mode=False))
    assert told.startswith("broke the lease of ann from ops1: ")
    assert lease.holds(str(tmp_path), "aaaa")
    assert lease_text.broken(lease_module.act(given, check_mode=True)).startswith("nobody holds a lease here")


def test_the_log_is_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "AUDIT_BYTES", 300)
    for number in range(40):
        lease.audit(str(tmp_path), {"event": "begin", "number": number})
    files = sorted((tmp_path / "audit").iterdir())
    assert [file.name for file in files] == [*(f"audit.{n}.jsonl" for n in (1, 2, 3, 4)), "audit.jsonl"]
    assert all(file.stat().st_size <= 300 for file in files)
    assert lines(tmp_path)[-1]["number"] == 39
    newest = json.loads((tmp_path / "audit/audit.1.jsonl").read_text().splitlines()[-1])["number"]
    assert newest == lines(tmp_path)[0]["number"] - 1


def test_text_for_the_verb_lease(tmp_path: Path, clock: Any) -> None:
    lease.take(str(tmp_path), MINE)
    clock.seconds += 121
    held = lease.read(str(tmp_path))
    assert held
    seen = {"lease_seen": {"holder": held.told(lease.Clock.now()), "frozen": None}}
    free = {"lease_seen": {"holder": None, "frozen": None}}
    told = lease_text.text({"a": seen, "b": free, "c": {}}, ["a", "b", "c"]).splitlines()
    assert told[0].startswith("a: expired, was held by ann from ops1: deploy step3 3f9a (new weights), since ")
    assert told[1:] == ["b: free", "c: did not answer"]
