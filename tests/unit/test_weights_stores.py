"""Stores of weights: who uses them, what may go, who may write; what operators are told of them and of models' code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import weights, weights_lease
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import Progress, read_state
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError
from ansible_collections.stepladder.core.plugins.module_utils.weights_store import find_stores, prune

from stepladder import stores, weights_live

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


def test_what_may_go_and_what_is_said_of_it() -> None:
    found = [
        {"path": "/m/a", "used_by": ["deployment x (runs)"], "bytes": 10**9, "complete": True},
        {"path": "/m/b", "used_by": [], "bytes": 2 * 10**9, "complete": False},
        {"path": "/m/c", "used_by": [], "bytes": 10**9, "complete": True},
    ]
    assert stores.removable(found, ["/m/c"]) == ["/m/b"]
    said = stores.prune_text({"n1": {"s": found, "r": ["/m/b"]}, "n2": {}}, ["n1", "n2"], "s", "r")
    assert said.splitlines() == [
        "n1: /m/a (1.0 GB, complete) stays: deployment x (runs)",
        "n1: /m/b (2.0 GB, unfinished) will be removed",
        "n1: /m/c (1.0 GB, complete) stays: wanted by the inventory",
        "2.0 GB will be freed.",
    ]
    assert stores.prune_text({"n1": {}}, ["n1"], "s", "r") == "There are no weights on these nodes."


NOW = datetime(2026, 11, 21, 3, 0, 30, tzinfo=UTC)
TOLD = {"text": "downloaded 1.0 of 2.0 GB (50.0 %)", "at": "2026-11-21T03:00:20Z", "phase": "fetching"}
PROGRESS = {
    "being fetched": (False, TOLD, "n1: weights /m: downloaded 1.0 of 2.0 GB (50.0 %) (10 s ago)"),
    "nobody at work": (
        False,
        {**TOLD, "at": "2026-11-21T02:00:00Z"},
        "n1: weights /m: downloaded 1.0 of 2.0 GB (50.0 %) (last told 2026-11-21T02:00:00Z)",
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


def test_the_table_of_all_nodes() -> None:
    first = weights_live.row("n1", {"phase": "fetching", "done": 50, "total": 100, "bytes_per_second": 10})
    second = weights_live.row("n2", {"phase": "passing-on", "sent": 4})
    assert (first.left, second.left) == (5.0, None)
    both = weights_live.total_row([first, second])
    assert (both.phase, both.done, both.total, both.rate, both.left) == ("1 of 2 have it", 50, 100, 10, 5.0)


# ---- the model's own code --------------------------------------------------------------------------------------------

OLD = [{"path": "a.py", "sha256": "a" * 64}, {"path": "b.py", "sha256": "b" * 64}]
NEW = [{"path": "a.py", "sha256": "f" * 64}, {"path": "c.py", "sha256": "c" * 64}]


def test_changed_code_must_be_accepted() -> None:
    digest = stores.code_digest(NEW)
    assert stores.check_code("x/y@v2", NEW, [], "") == []
    assert stores.check_code("x/y@v2", OLD, OLD[::-1], "") == []
    for accepted in ("", "other"):
        with pytest.raises(stores.CodeError) as error:
            stores.check_code("x/y@v2", NEW, OLD, accepted)
        assert str(error.value).splitlines() == [
            "The Python code of x/y@v2 is not that of the revision before, and the engine runs it:",
            "  a.py: aaaaaaaaaaaaaaaa -> ffffffffffffffff",
            "  b.py: gone",
            "  c.py: new, cccccccccccccccc",
            f"Read it, and accept this set with -e weights_accept_code={digest}.",
        ]
    assert len(stores.check_code("x/y@v2", NEW, OLD, digest)) == 3


def test_the_code_before_is_that_of_the_revision_completed_last(tmp_path: Path) -> None:
    fill(tmp_path, "x--y", "v1", "x = 1")
    source = tmp_path / "carried" / "v2"
    source.mkdir()
    (source / "modeling.py").write_text("x = 2")
    wish = Request("x/y", str(tmp_path / "models" / "x--y" / "v2"), "v2", source="directory", source_path=str(source))
    seen = weights.look(wish)
    assert [one["path"] for one in seen["remote_code_before"]] == ["modeling.py"]
    assert (seen["complete"], seen["have"], len(seen["wanted"])) == (False, [], 1)
    weights.ensure(wish, "present")
    assert weights.look(wish)["complete"] is True


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
