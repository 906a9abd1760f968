"""Stores of weights: who uses them, what may go, who may write; what operators are told of them and of models' code."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.action.model_weights import ActionModule
from ansible_collections.stepladder.core.plugins.module_utils import (
    weights,
    weights_lease,
    weights_manifest,
    weights_store,
)
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import Progress, read_state
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError
from ansible_collections.stepladder.core.plugins.module_utils.weights_store import find_stores, prune
from test_weights import MODEL, SlowHub, offline, served, wanted

from stepladder import stores, weights_live

__all__ = ["served", "wanted"]  # fixtures

# ---- the stores of a node --------------------------------------------------------------------------------------------


def fill(state: Path, name: str, revision: str, code: str = "x = 1") -> Path:
    source = state / "carried" / revision
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text("{}")
    (source / "modeling.py").write_text(code)
    path = state / "models" / name / revision
    weights.ensure(Request("x/y", str(path), revision, source="directory", source_path=str(source)), "present")
    return path


def deploy(state: Path, name: str, path: Path, plan_id: str = "aa", current: bool = True) -> None:
    release = state / "deployments" / name / "releases" / plan_id
    release.mkdir(parents=True)
    (release / "plan.json").write_text(json.dumps({"node": {"weights": {"path": str(path)}}}))
    if current:
        (state / "deployments" / name / "current").symlink_to(f"releases/{plan_id}")


def test_stores_and_their_users(tmp_path: Path) -> None:
    old, new, lost = (fill(tmp_path, "x--y", revision) for revision in ("v1", "v2", "v3"))
    (lost / ".stepladder" / "complete").unlink()
    (tmp_path / "models" / "x--y" / "mine").mkdir()
    deploy(tmp_path, "step", new, "bb")
    deploy(tmp_path, "step", old, "aa", current=False)
    found = {one.path: one for one in find_stores(str(tmp_path))}
    assert {path: one.used_by for path, one in found.items()} == {
        str(old): ("deployment step (release aa, to go back to)",),
        str(new): ("deployment step (runs)",),
        str(lost): (),
    }
    assert [found[str(path)].complete for path in (old, new, lost)] == [True, True, False]
    with pytest.raises(WeightsError) as error:
        prune(str(tmp_path), [str(old), str(lost), str(tmp_path / "models" / "x--y" / "mine")])
    assert str(error.value).splitlines() == [
        f"{tmp_path}/models/x--y/mine is no store of weights below {tmp_path}/models",
        f"{old} is used by deployment step (release aa, to go back to)",
        "Nothing was removed. Leave these out, or remove what uses them first.",
    ]
    assert lost.exists()
    assert prune(str(tmp_path), [str(lost)], check_mode=True) == [str(lost)]
    assert prune(str(tmp_path), [str(lost)]) == [str(lost)]
    assert not lost.exists()
    assert prune(str(tmp_path), [str(lost)]) == []


USERS = {
    "open": "import sys, time; file = open(sys.argv[1] + '/config.json'); print(flush=True); time.sleep(60)",
    "mapped": "import mmap, sys, time; file = open(sys.argv[1] + '/config.json', 'rb');"
    "held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); file.close(); print(flush=True); time.sleep(60)",
    "named": "import time; print(flush=True); time.sleep(60)",
}


@pytest.mark.parametrize("how", USERS)
def test_a_store_that_a_process_uses_stays(tmp_path: Path, how: str) -> None:
    path = fill(tmp_path, "x--y", "v1")
    process = subprocess.Popen([sys.executable, "-c", USERS[how], str(path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with pytest.raises(WeightsError, match=rf"{path} is used by process {process.pid} \("):
            prune(str(tmp_path), [str(path)])
    finally:
        process.kill()
        process.communicate()
    assert prune(str(tmp_path), [str(path)]) == [str(path)]


def on_another_node(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(weights_store.socket, "gethostname", lambda: name)


def test_a_store_that_nodes_share_stays_while_one_of_them_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {name: tmp_path / name for name in ("n1", "n2")}
    path = fill(nodes["n1"], "x--y", "v1")
    nodes["n2"].mkdir()
    (nodes["n2"] / "models").symlink_to(nodes["n1"] / "models")
    deploy(nodes["n1"], "step", path)
    on_another_node(monkeypatch, "n1")
    assert weights_store.note_users(str(nodes["n1"])) == weights_store.note_users(str(nodes["n1"])) == []
    # A run that knows nothing of n1.
    on_another_node(monkeypatch, "n2")
    seen = nodes["n2"] / "models" / "x--y" / "v1"
    note = next((seen / ".stepladder/users").iterdir())
    user = f"node n1 (deployment step (runs); if that node is gone for good, remove {note})"
    assert [one.used_by for one in find_stores(str(nodes["n2"]))] == [(user,)]
    with pytest.raises(WeightsError, match=r"v1 is used by node n1 \(deployment step \(runs\)"):
        prune(str(nodes["n2"]), [str(seen)])
    wish = Request("x/y", str(seen), "v1", source="directory", source_path=str(nodes["n1"] / "carried" / "v1"))
    left = weights.ensure(wish, "absent")
    assert (left["changed"], left["warnings"]) == (
        False, [f"{seen} stays: {user} uses it. 'weights-prune' removes it once nothing does."],
    )  # fmt: skip
    # What a check says before a deployment goes, and what is so once it went.
    assert weights.ensure(wish, "absent", check_mode=True, leaving="step")["changed"]
    assert not weights.ensure(wish, "absent", check_mode=True, leaving="other")["changed"]
    subprocess.run(["rm", "-rf", str(nodes["n1"] / "deployments")], check=True)
    on_another_node(monkeypatch, "n1")
    weights_store.note_users(str(nodes["n1"]))
    assert prune(str(nodes["n2"]), [str(seen)]) == [str(seen)]


def test_a_store_stays_where_a_release_to_go_back_to_uses_it(tmp_path: Path) -> None:
    path = fill(tmp_path, "x--y", "v1")
    deploy(tmp_path, "step", path, current=False)
    wish = Request("x/y", str(path), "v1", source="directory", source_path=str(tmp_path))
    (warning,) = weights.ensure(wish, "absent")["warnings"]
    assert warning.startswith(f"{path} stays: deployment step (release aa, to go back to) uses it.")
    assert path.exists()


def test_a_note_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    path = fill(tmp_path, "x--y", "v1")
    deploy(tmp_path, "step", path)
    (path / ".stepladder" / "users").write_text("")
    assert weights_store.note_users(str(tmp_path)) == [f"{path}: File exists"]


RUNS = "deployment x (runs)"


def store(path: str, inode: int, *used_by: str, gigabytes: int = 1, complete: bool = True) -> dict:
    return {"path": path, "inode": inode, "used_by": [*used_by], "bytes": gigabytes * 10**9, "complete": complete}


FATES = {
    "one node": (
        {"n1": ("/m/c", [store("/m/a", 1, RUNS), store("/m/b", 2, gigabytes=2, complete=False), store("/m/c", 3)])},
        False,
        {"n1": ["/m/b"]},
        [
            "n1: /m/a (1.0 GB, complete) stays: deployment x (runs)",
            "n1: /m/b (2.0 GB, unfinished) will be removed",
            "n1: /m/c (1.0 GB, complete) stays: wanted by the inventory",
            "2.0 GB will be freed.",
        ],
    ),
    "shared, and another node uses it": (
        {"n1": ("/m/b", [store("/m/a", 1, RUNS)]), "n2": ("/m/b", [store("/m/a", 1)])},
        False,
        {"n1": [], "n2": []},
        [
            "n1: /m/a (1.0 GB, complete) stays: deployment x (runs)",
            "n2: /m/a (1.0 GB, complete) stays: deployment x (runs) on n1",
            "Nothing is to be removed.",
        ],
    ),
    "shared by what the inventory says, under other inodes": (
        {"n1": ("/m/b", [store("/m/a", 1, RUNS)]), "n2": ("/m/b", [store("/m/a", 7)])},
        True,
        {"n1": [], "n2": []},
        [
            "n1: /m/a (1.0 GB, complete) stays: deployment x (runs)",
            "n2: /m/a (1.0 GB, complete) stays: deployment x (runs) on n1",
            "Nothing is to be removed.",
        ],
    ),
    "shared, and wanted on another node": (
        {"n1": ("/m/a", [store("/m/a", 1)]), "n2": ("/m/b", [store("/m/a", 1)])},
        False,
        {"n1": [], "n2": []},
        [
            "n1: /m/a (1.0 GB, complete) stays: wanted by the inventory",
            "n2: /m/a (1.0 GB, complete) stays: wanted by the inventory",
            "Nothing is to be removed.",
        ],
    ),
    "shared, and nobody's: one removes it": (
        {"n1": ("/m/b", [store("/m/a", 1)]), "n2": ("/m/b", [store("/m/a", 1)])},
        False,
        {"n1": ["/m/a"], "n2": []},
        [
            "n1: /m/a (1.0 GB, complete) will be removed",
            "n2: /m/a (1.0 GB, complete) stays: n1 removes it",
            "1.0 GB will be freed.",
        ],
    ),
    "each its own": (
        {"n1": ("/m/b", [store("/m/a", 1, RUNS)]), "n2": ("/m/b", [store("/m/a", 2)])},
        False,
        {"n1": [], "n2": ["/m/a"]},
        [
            "n1: /m/a (1.0 GB, complete) stays: deployment x (runs)",
            "n2: /m/a (1.0 GB, complete) will be removed",
            "1.0 GB will be freed.",
        ],
    ),
    "without a byte": (
        {"n1": ("/m/b", [store("/m/a", 1, gigabytes=0, complete=False)])},
        False,
        {"n1": ["/m/a"]},
        ["n1: /m/a (0.0 MB, unfinished) will be removed", "0.0 MB will be freed."],
    ),
    "none": ({"n1": ("/m/a", [])}, False, {"n1": []}, ["There are no weights on these nodes."]),
}


@pytest.mark.parametrize(("nodes", "shared", "goes", "said"), FATES.values(), ids=FATES)
def test_what_may_go_and_what_is_said_of_it(nodes: dict, shared: bool, goes: dict, said: list[str]) -> None:
    found = {name: {"wanted": wanted, "stores": there} for name, (wanted, there) in nodes.items()}
    assert {name: stores.removable(found, name, shared) for name in found} == goes
    assert stores.prune_text(found, shared).splitlines() == said


NOW = datetime(2026, 11, 21, 3, 0, 30, tzinfo=UTC)
TOLD = {"text": "downloaded 1.0 of 2.0 GB (50.0 %)", "at": "2026-11-21T03:00:20Z", "phase": "fetching"}
PROGRESS = {
    "being fetched": (False, TOLD, "n1: weights /m: downloaded 1.0 of 2.0 GB (50.0 %) (10 s ago)"),
    "nobody at work": (
        False,
        {**TOLD, "at": "2026-11-21T02:00:00Z"},
        "n1: weights /m: downloaded 1.0 of 2.0 GB (50.0 %) (last told 2026-11-21T02:00:00Z)",
    ),
    "the node's clock is ahead": (
        False,
        {**TOLD, "at": "2026-11-21T03:02:30Z"},
        "n1: weights /m: downloaded 1.0 of 2.0 GB (50.0 %) "
        "(told 2026-11-21T03:02:30Z by the node's clock, which is 120 s ahead of the one here)",
    ),
    "hardly": (
        False,
        {**TOLD, "at": "2026-11-21T03:00:32Z"},
        "n1: weights /m: downloaded 1.0 of 2.0 GB (50.0 %) (0 s ago)",
    ),
    "begun": (False, {}, "n1: weights /m: nothing told yet"),
    "complete": (True, TOLD, ""),
    "passing on": (
        True,
        {**TOLD, "phase": "passing-on", "text": "has everything, passes on to n2"},
        "n1: weights /m: has everything, passes on to n2 (10 s ago)",
    ),
    "passed on": (True, {**TOLD, "phase": "passing-on", "at": "2026-11-21T02:00:00Z"}, ""),
}


@pytest.mark.parametrize(("complete", "told", "expected"), PROGRESS.values(), ids=PROGRESS)
def test_progress_of_stores(complete: bool, told: dict, expected: str) -> None:
    assert stores.progress_text("n1", [{"path": "/m", "complete": complete, "progress": told}], NOW) == expected


def test_progress_is_told_to_people_and_to_programs(tmp_path: Path) -> None:
    told = Progress(ProgressFile(str(tmp_path / "line"), 0), tmp_path, 0)
    told.fetching(50, 100, received=7)
    numbers, text = (tmp_path / "line").read_text().splitlines()
    assert text == "downloaded 50 of 100 bytes (50.0 %)"
    assert json.loads(numbers) == {
        "phase": "fetching", "done": 50, "total": 100, "bytes_per_second": 0, "received": 7,
    }  # fmt: skip
    state = read_state(tmp_path)
    assert (state["text"], state["done"], state["pid"]) == (text, 50, os.getpid())
    (tmp_path / "progress.json").write_text("{")
    assert read_state(tmp_path) == {}


def test_the_last_word_is_that_it_is_done_however_soon_it_comes(tmp_path: Path) -> None:
    told = Progress(ProgressFile(str(tmp_path / "line"), 60), tmp_path, 60)
    told.fetching(97, 100)
    told.fetching(98, 100)
    assert weights_live.row("n1", read_state(tmp_path)).done == 97
    told.say("done", "has everything", done=100, total=100)
    numbers, text = (tmp_path / "line").read_text().splitlines()
    assert text == read_state(tmp_path)["text"] == "has everything"
    row = weights_live.row("n1", json.loads(numbers))
    assert (row.phase, row.done, row.total) == ("done", 100, 100)
    assert weights_live.total_row([row, row]).phase == "2 of 2 have it"


@pytest.mark.parametrize("names", [("10.0.0.1", "10.0.0.2"), ("node1.rack1", "node1.rack2"), ("n1", "n2")])
def test_what_nodes_tell_at_once_does_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    monkeypatch.setenv("STEPLADDER_PROGRESS", str(tmp_path))
    first, second = (ActionModule.__new__(ActionModule) for _ in names)
    first._name, second._name = (f"{name} | model_weights : Bring the weights" for name in names)
    replace = Path.replace

    def meanwhile(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        second._heard('{"done": 2}')  # in another of Ansible's processes, between the writing and the renaming
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    first._heard('{"done": 1}')
    assert weights_live.read_states(tmp_path) == {names[0]: {"done": 1}, names[1]: {"done": 2}}


def test_the_table_of_all_nodes() -> None:
    first = weights_live.row("n1", {"phase": "fetching", "done": 50, "total": 100, "bytes_per_second": 10})
    second = weights_live.row("n2", {"phase": "passing-on", "sent": 4})
    assert (first.left, second.left) == (5.0, None)
    both = weights_live.total_row([first, second])
    assert (both.phase, both.done, both.total, both.rate, both.left) == ("1 of 2 have it", 50, 100, 10, 5.0)


def test_other_patterns_are_refused_while_something_uses_the_store(tmp_path: Path) -> None:
    path = fill(tmp_path, "x--y", "v1")
    source = str(tmp_path / "carried" / "v1")
    wish = Request("x/y", str(path), "v1", source="directory", source_path=source, exclude=("*.py",))
    assert weights.ensure(wish, "present", check_mode=True)["changed"]
    deploy(tmp_path, "step", path)
    for call in (
        lambda: weights.look(wish),
        lambda: weights.ensure(wish, "present", check_mode=True),
        lambda: weights.ensure(wish, "present"),
    ):
        with pytest.raises(WeightsError) as error:
            call()
        assert str(error.value) == (
            f"{path} is complete with other patterns (the manifest is for exclude [] instead of ['*.py']), and "
            "deployment step (runs) uses it: files would come and go under it. Give model_weights_include and "
            "model_weights_exclude as they were; or a commit or a tag as deployment_revision, whose store lies beside "
            "this one; or remove what uses it first."
        )
    assert (path / ".stepladder/complete").exists()
    # One of another revision under this name is wrong for who uses it, and is mended.
    weights.ensure(Request("x/y", str(path), "v2", source="directory", source_path=source), "present")
    subprocess.run(["rm", "-rf", str(tmp_path / "deployments")], check=True)
    assert weights.ensure(wish, "present")["files"] == 1


# ---- the model's own code --------------------------------------------------------------------------------------------


def code(**hashes: str) -> list[dict[str, str]]:
    return [{"path": f"{name}.py", "sha256": digit * 64, "git_blob": digit * 40} for name, digit in hashes.items()]


OLD, NEW = code(a="a", b="b"), code(a="f", c="c")
GIT = [{"path": "a.py", "sha256": "git:" + "a" * 40, "git_blob": ""}, code(b="b")[0]]
CHANGES = {
    "the same in another order": (OLD[::-1], OLD, []),
    "all kinds": (
        NEW, OLD,
        ["  a.py: aaaaaaaaaaaaaaaa -> ffffffffffffffff", "  b.py: gone, was bbbbbbbbbbbbbbbb",
         "  c.py: new, cccccccccccccccc"],
    ),
    "a hub that lists git's own hash": (GIT, OLD, []),
    "and another of it": (GIT, code(a="e", b="b"), ["  a.py: eeeeeeeeeeeeeeee -> git:aaaaaaaaaaaa"]),
    "all gone": ([], code(a="a"), ["  a.py: gone, was aaaaaaaaaaaaaaaa"]),
    "the first": (code(a="a"), [], ["  a.py: new, aaaaaaaaaaaaaaaa"]),
}  # fmt: skip


@pytest.mark.parametrize(("files", "before", "expected"), CHANGES.values(), ids=CHANGES)
def test_code_changes(files: list, before: list, expected: list) -> None:
    assert stores.code_changes(files, before) == expected


ACCEPTANCE = {
    "nothing ran before": (NEW, [], "", "", None),
    "it is what runs": (OLD, OLD, "", "what runs", None),
    "changed": (NEW, OLD, "", "what runs", stores.code_digest(NEW)),
    "changed, and another set was accepted": (NEW, OLD, stores.code_digest(OLD), "what runs", stores.code_digest(NEW)),
    "changed and accepted": (NEW, OLD, stores.code_digest(NEW), "what runs", None),
    "the first code of a model that had none": (NEW, [], "", "what runs", stores.code_digest(NEW)),
    "gone": ([], OLD, "", "what runs", "none"),
    "gone and accepted": ([], OLD, "none", "what runs", None),
}


@pytest.mark.parametrize(("files", "before", "accepted", "whose", "asked"), ACCEPTANCE.values(), ids=ACCEPTANCE)
def test_changed_code_must_be_accepted(files: list, before: list, accepted: str, whose: str, asked: str | None) -> None:
    try:
        stores.check_code("x/y@v2", files, before, accepted, whose)
        said = []
    except stores.CodeError as error:
        said = str(error).splitlines()
    assert said == (
        [
            "The Python code of x/y@v2, which the engine runs, is not that of what runs:",
            *stores.code_changes(files, before),
            f"Read it, and accept this set with -e weights_accept_code={asked}.",
        ]
        if asked
        else []
    )


TITLE = "\nPython code of x/y@v2, which the engine runs\n"
PLANNED = {
    "not known": (
        [], [], "", "http://hub gave no listing.\nmore",
        TITLE + "  not known yet: deploy lists it before it fetches anything\n  http://hub gave no listing.",
    ),
    "none": ([], [], "", "", TITLE + "  none"),
    "first": (
        code(a="a"), [], "", "", TITLE + f"  set {stores.code_digest(code(a='a'))}\n  aaaaaaaaaaaaaaaa  a.py",
    ),
    "changed": (
        code(a="f"), code(a="a"), "what runs", "",
        TITLE + f"  set {stores.code_digest(code(a='f'))}\n  ffffffffffffffff  a.py\n"
        "It is not that of what runs:\n  a.py: aaaaaaaaaaaaaaaa -> ffffffffffffffff\n"
        f"deploy refuses it until somebody read it: -e weights_accept_code={stores.code_digest(code(a='f'))}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "before", "whose", "unknown", "expected"), PLANNED.values(), ids=PLANNED)
def test_code_in_the_plan(files: list, before: list, whose: str, unknown: str, expected: str) -> None:
    assert stores.code_plan_text("x/y@v2", files, before, whose, unknown) == expected


def carry(state: Path, revision: str, text: str) -> Request:
    source = state / "carried" / revision
    source.mkdir(parents=True, exist_ok=True)
    (source / "modeling.py").write_text(text)
    path = state / "models" / "x--y" / revision
    return Request("x/y", str(path), revision, source="directory", source_path=str(source))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_code_is_held_against_what_runs_and_else_against_the_revision_completed_last(tmp_path: Path) -> None:
    runs = fill(tmp_path, "x--y", "v1", "x = 1")
    wish = carry(tmp_path, "v2", "x = 2")
    current = tmp_path / "deployments" / "step" / "current"
    seen = weights.look(wish, current_release=str(current))
    assert (seen["remote_code_before_name"], seen["remote_code_before"][0]["sha256"]) == (
        "the revision before (v1)", sha("x = 1"),
    )  # fmt: skip
    assert (seen["complete"], seen["have"], len(seen["wanted"])) == (False, [], 1)
    fill(tmp_path, "x--y", "v3", "x = 3")  # fetched later, and never ran
    release = tmp_path / "deployments" / "step" / "releases" / "aa"
    release.mkdir(parents=True)
    entry = {"node": {"weights": {"path": str(runs), "model_id": "x/y", "revision": "v1"}}}
    (release / "plan.json").write_text(json.dumps(entry))
    current.symlink_to("releases/aa")
    seen = weights.look(wish, current_release=str(current))
    assert (seen["remote_code_before_name"], seen["remote_code_before"][0]["sha256"]) == (
        "the release that runs (v1)", sha("x = 1"),
    )  # fmt: skip
    # Fetched ahead of the deploy, it is still not what runs.
    weights.ensure(wish, "present")
    seen = weights.look(wish, current_release=str(current))
    assert (seen["complete"], seen["remote_code"][0]["sha256"]) == (True, sha("x = 2"))
    assert seen["remote_code_before"][0]["sha256"] == sha("x = 1")
    # A release of another model is no revision before.
    entry["node"]["weights"]["model_id"] = "x/z"
    (release / "plan.json").write_text(json.dumps(entry))
    assert weights.look(wish, current_release=str(current))["remote_code_before_name"] == "the revision before (v3)"


def test_a_store_that_was_removed_to_follow_its_branch_is_held_against_what_it_had(tmp_path: Path) -> None:
    path = fill(tmp_path, "x--y", "master", "x = 1")
    deploy(tmp_path, "step", path)
    plan = tmp_path / "deployments/step/releases/aa/plan.json"
    plan.write_text(json.dumps({"node": {"weights": {"path": str(path), "model_id": "x/y", "revision": "master"}}}))
    subprocess.run(["rm", "-rf", str(path)], check=True)
    wish = carry(tmp_path, "master", "x = 2")
    seen = weights.look(wish, current_release=str(tmp_path / "deployments/step/current"))
    assert seen["remote_code_before"][0]["sha256"] == sha("x = 1")
    assert [one["sha256"] for one in seen["remote_code"]] in ([""], [sha("x = 2")])
    weights.ensure(wish, "absent")
    assert weights_manifest.known_code(path) is not None
    weights.ensure(wish, "present")
    subprocess.run(["rm", "-rf", str(tmp_path / "deployments")], check=True)  # what is used is not removed
    weights.ensure(wish, "absent")
    assert weights_manifest.known_code(path) is None


def test_a_branch_that_moved_is_refused_until_its_code_is_accepted(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    state = Path(wanted.path).parents[2]
    deploy(state, "step", Path(wanted.path))
    plan = state / "deployments/step/releases/aa/plan.json"
    entry = {"path": wanted.path, "model_id": MODEL, "revision": "master"}
    plan.write_text(json.dumps({"node": {"weights": entry}}))
    current = str(state / "deployments/step/current")
    seen = weights.look(offline(wanted), current_release=current)
    assert stores.code_changes(seen["remote_code"], seen["remote_code_before"]) == []
    # The store is removed to follow the branch.
    old = (Path(wanted.path) / "modeling_step.py").read_bytes()
    served.tree.files(MODEL)["modeling_step.py"].write_bytes(b"x = 2")
    subprocess.run(["rm", "-rf", wanted.path], check=True)
    assert weights.look(offline(wanted), True, current)["remote_code_unknown"].startswith(
        "the hub at http://127.0.0.1:9 "
    )
    seen = weights.look(wanted, current_release=current, code_only=True)
    assert seen["remote_code_before_name"] == "the release that runs (master)"
    with pytest.raises(stores.CodeError) as error:
        stores.check_code(
            "x@master", seen["remote_code"], seen["remote_code_before"], "", seen["remote_code_before_name"]
        )
    hashes = [hashlib.sha256(content).hexdigest()[:16] for content in (old, b"x = 2")]
    assert f"  modeling_step.py: {hashes[0]} -> {hashes[1]}" in str(error.value).splitlines()
    # A set is called the same before it is fetched and after.
    digest = stores.code_digest(seen["remote_code"])
    weights.ensure(wanted, "present")
    assert stores.code_digest(weights.look(offline(wanted), current_release=current)["remote_code"]) == digest


# ---- one writer ------------------------------------------------------------------------------------------------------


def another_node(path: Path) -> Path:
    lease = weights_lease.lease_of(path)
    lease.write_text(json.dumps({"host": "node7", "boot": "other", "pid": 12, "token": "t"}))
    (path / ".stepladder").mkdir(parents=True)
    (path / ".stepladder" / "progress.json").write_text(json.dumps({"text": "downloaded 1 of 2 GB"}))
    return lease


def test_a_reader_waits_for_the_node_that_writes_and_says_why(tmp_path: Path) -> None:
    path, said = tmp_path / "store", []
    another_node(path)
    with pytest.raises(WeightsError) as error, weights_lease.locked(path, 0.1, said.append):
        pass
    assert said == [f"waiting for node7 (process 12), which writes {path}: downloaded 1 of 2 GB"]
    assert str(error.value).startswith(
        f"node7 (process 12) still writes {path}, and the time to wait is over; it told last: downloaded 1 of 2 GB. "
    )


def test_a_run_that_waits_for_another_of_its_node_says_how_far_that_is(tmp_path: Path) -> None:
    path, said = tmp_path / "store", []
    (path / ".stepladder").mkdir(parents=True)
    (path / ".stepladder" / "progress.json").write_text(json.dumps({"text": "downloaded 1 of 2 GB"}))
    with (
        weights_lease.locked(path, 1),
        pytest.raises(WeightsError, match="another run works on"),
        weights_lease.locked(path, 0.5, said.append),
    ):
        pass
    assert set(said) == {f"waiting for process {os.getpid()}, which works on {path}: downloaded 1 of 2 GB"}


def test_a_lease_that_nobody_renews_is_taken_over_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_lease, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(weights_lease, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(weights_lease, "SETTLE_SECONDS", 0.1)
    path = tmp_path / "store"
    lease = another_node(path)
    os.utime(lease, (4_102_444_800, 4_102_444_800))
    started = time.monotonic()
    with weights_lease.locked(path, 30):
        assert 1.5 <= time.monotonic() - started < 15
        assert json.loads(lease.read_text())["pid"] == os.getpid()
    assert not lease.exists()


def test_a_lease_that_a_dead_process_of_this_node_left_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with weights_lease.locked(path, 1):
        left = weights_lease.lease_of(path).read_text()
    weights_lease.lease_of(path).write_text(left)
    with weights_lease.locked(path, 1):
        pass


def test_who_lost_the_lease_ends(tmp_path: Path) -> None:
    path = tmp_path / "store"
    code = (
        "import sys, time; from pathlib import Path;"
        "from ansible_collections.stepladder.core.plugins.module_utils import weights_lease as lease;"
        "lease.RENEW_SECONDS = 0.1\n"
        "with lease.locked(Path(sys.argv[1]), 5):\n print(flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE)
    run.stdout.readline()
    another_node(path)
    assert run.wait(20) == -15
    run.stdout.close()
    assert json.loads(weights_lease.lease_of(path).read_text())["host"] == "node7"


@pytest.fixture
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(weights_lease, "STALE_SECONDS", 3.0)


def unreadable(path: Path) -> str:
    """Have a store's lease be one that every read of fails, as of a stale handle on NFS; what it said before."""
    lease = weights_lease.lease_of(path)
    told, loop = lease.read_text(), path.with_name("loop")
    loop.symlink_to(lease)
    loop.replace(lease)
    return told


def waits_out(path: Path, seconds: float) -> None:
    with weights.stopped_by_signals(), weights_lease.locked(path, 1):
        told = unreadable(path)
        time.sleep(seconds)
        back = path.with_name("back")
        back.write_text(told)
        back.replace(weights_lease.lease_of(path))
        time.sleep(0.5)
        assert "signs_of_life" in weights_lease.lease_of(path).read_text()


@pytest.mark.usefixtures("quick_renewals")
def test_a_lease_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path: Path) -> None:
    waits_out(tmp_path / "store", 0.5)
    assert not weights_lease.lease_of(tmp_path / "store").exists()


@pytest.mark.usefixtures("quick_renewals")
def test_a_lease_that_cannot_be_renewed_ends_its_holder_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with pytest.raises(WeightsError) as error:
        waits_out(path, 60)
    assert str(error.value) == (
        f"the lease on {path} could not be renewed: [Errno 40] Too many levels of symbolic links: '{path}.lease'. "
        "What was fetched is kept: run this again to go on."
    )


@pytest.mark.usefixtures("quick_renewals")
def test_who_lost_the_lease_says_to_whom(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with pytest.raises(WeightsError) as error, weights.stopped_by_signals(), weights_lease.locked(path, 1):
        another_node(path)
        time.sleep(60)
    assert str(error.value).startswith(f"the lease on {path} was taken over by node7 (process 12). ")
    assert weights_lease.lease_of(path).exists()
