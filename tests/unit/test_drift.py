"""What differs on a node, from real files; which nodes a run has to change for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import node_state, release, weights
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request

from stepladder import contents, drift
from stepladder.errors import CatalogueError


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A node whose release is whole and proven; its process manager and ports are not asked."""
    monkeypatch.setattr(node_state.engine_state, "read_managers", lambda *_: {})
    monkeypatch.setattr(node_state.engine_state, "look", lambda *_, **__: [])
    for part in ("tools", "venv"):
        (tmp_path / part / "bin").mkdir(parents=True)
        (tmp_path / part / ".stepladder.json").write_text("{}")
        (tmp_path / part / "bin/python").symlink_to("/bin/sh")
    weights = tmp_path / "weights"
    (weights / ".stepladder").mkdir(parents=True)
    (weights / "a.bin").write_bytes(b"good")
    stat = (weights / "a.bin").stat()
    proven = {
        "path": "a.bin", "size": 4, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino,
        "sha256": node_state.digest(str(weights / "a.bin")),
    }  # fmt: skip
    head = {"format_version": 2, "model_id": "o/m", "revision": "r", "include": [], "exclude": []}
    manifest = json.dumps({**head, "files": [proven]})
    (weights / ".stepladder/manifest.json").write_text(manifest)
    marker = {"format_version": 1, "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest()}
    (weights / ".stepladder/complete").write_text(json.dumps(marker))
    kept = {
        "plan_id": "p1",
        "endpoints": [{"node": "n0"}],
        "node": {
            **{part: {"path": str(tmp_path / part)} for part in ("tools", "venv")},
            "weights": {"path": str(weights), "model_id": "o/m", "revision": "r"},
            "ranks": [{"node": "n0"}, {"node": "n1"}],
        },
    }
    given = {
        "state_directory": str(tmp_path), "deployment": "d", "slice": kept, "launchers": {}, "manager": "supervisor",
        "processes": [{"name": "vllm-0", "argv": ["/bin/true"], "env": {"A": 1}}], "described_by": "m1",
        "units": [{"name": "vllm-0", "unit": "d-vllm-0"}], "supervisorctl": [], "keep": 3,
        "weights": {"include": [], "exclude": [], "verify": "cheap", "full_check_below_bytes": 100}, "ask_timeout": 1.0,
    }  # fmt: skip
    unit = tmp_path / "supervisor/conf.d/d.conf"
    unit.parent.mkdir(parents=True)
    unit.write_text("[program:d-vllm-0]\n")
    wanted = release.wanted_release(
        f"{tmp_path}/deployments/d", "p1", kept, release.as_text([{**given["processes"][0], "launcher": []}])
    )
    release.converge(f"{tmp_path}/deployments/d", wanted, 3, False, deadline=1)
    described = {"described_by": "m1", str(unit): node_state.digest(str(unit))}
    release.record_outcome(f"{tmp_path}/deployments/d", "p1", "proven", "", described=described, deadline=1)
    return given


def reasons(given: dict[str, Any], **more: Any) -> list[str]:
    return [
        reason.replace(given["state_directory"], "S") for reason in node_state.look({**given, **more}, {})["reasons"]
    ]


def test_a_node_as_wanted_has_no_reasons_and_names_its_members(node: dict[str, Any]) -> None:
    answer = node_state.look(node, {})
    assert (answer["reasons"], answer["current"], answer["members"]) == ([], "p1", ["n0", "n1"])
    assert answer["weights_complete"]
    assert node_state.look({**node, "slice": {}}, {})["current"] == "p1"


def test_a_release_that_cannot_be_read_is_no_equal_one(node: dict[str, Any]) -> None:
    """Whoever reads the slice from it has an empty one to hold the node against."""
    plan = Path(node["state_directory"], "deployments/d/current/plan.json")
    for content, fault in (
        ('{"plan_id": ', "Expecting value: line 1 column 13 (char 12)"),
        ("[]", "expected a mapping, found list"),
    ):
        edit(plan, content)
        assert reasons(node, slice={}) == [f"release: cannot be read: S/deployments/d/current/plan.json: {fault}"]
    plan.parent.chmod(0o700)
    plan.unlink()
    [reason] = reasons(node, slice={})
    assert reason.endswith("/plan.json: No such file or directory")
    shutil.rmtree(Path(node["state_directory"], "deployments"))
    assert reasons(node, slice={}) == []


def edit(path: Path, text: str) -> None:
    path.chmod(0o600)
    path.write_text(text)


def flip_and_hide(path: Path) -> None:
    """Another content under the same size and time stamp."""
    before = path.stat()
    path.write_bytes(b"evil")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


RUN = "deployments/d/releases/p1/vllm-0/run"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: edit(s / RUN, "#!/bin/sh\n"), ["release: files differ from what they are made of: vllm-0/run"]),
        (lambda s: (s / RUN).chmod(0o755), ["release: files differ from what they are made of: their permissions"]),
        (lambda s: (s / "deployments/d/current").unlink(), ["release: none is current, p1 is wanted"]),
        (lambda s: edit(s / "supervisor/conf.d/d.conf", "x"),
         ["unit S/supervisor/conf.d/d.conf: was changed since the release was proven"]),
        (lambda s: (s / "supervisor/conf.d/d.conf").unlink(), ["unit S/supervisor/conf.d/d.conf: is gone"]),
        (lambda s: (s / "deployments/d/outcomes/p1.json").unlink(),
         ["units: the release was never proven under this version of the toolkit"]),
        (lambda s: (s / "tools/.stepladder.json").unlink(), ["environment S/tools: is not there or not whole"]),
        (lambda s: (s / "tools/bin/python").unlink(), ["environment S/tools: its Python is gone"]),
        (lambda s: flip_and_hide(s / "weights/a.bin"), ["weights S/weights: a.bin (another content)"]),
        (lambda s: (s / "weights/a.bin").write_bytes(b"short"), ["weights S/weights: a.bin (size)"]),
        (lambda s: (s / "weights/a.bin").unlink(), ["weights S/weights: a.bin (missing)"]),
        (lambda s: (s / "weights/.stepladder/complete").unlink(), ["weights S/weights: no complete manifest"]),
    ],
)  # fmt: skip
def test_what_was_changed_is_named(node: dict[str, Any], change: Any, expected: list[str]) -> None:
    change(Path(node["state_directory"]))
    assert reasons(node) == expected
    assert node_state.look(node, {})["weights_complete"] == (not expected[0].startswith("weights"))


def test_other_wishes_are_named(node: dict[str, Any]) -> None:
    assert reasons(node, slice={**node["slice"], "plan_id": "p2"}) == ["release: p1 is current, p2 is wanted"]
    assert reasons(node, described_by="m2") == ["units: this version writes them otherwise"]
    # A launcher alone is no reason to start again, and the run script has it all the same.
    assert reasons(node, launchers={"supervisor": ["/bin/env"]}) == [
        "release: files differ from what they are made of: vllm-0/run"
    ]
    # Of a large model only size, time stamp and inode are compared.
    flip_and_hide(Path(node["state_directory"], "weights/a.bin"))
    assert reasons(node, weights={**node["weights"], "full_check_below_bytes": 3}) == []


@pytest.mark.parametrize(
    ("wish", "weights", "expected"),
    [
        ({"revision": "v2"}, {}, "the manifest is for revision 'r' instead of 'v2'"),
        ({"model_id": "o/n"}, {}, "the manifest is for model_id 'o/m' instead of 'o/n'"),
        ({}, {"exclude": ["*.bin, *.pth"]}, "the manifest is for exclude [] instead of ['*.bin', '*.pth']"),
        ({}, {"verify": "full"}, "a full check is asked for"),
    ],
)
def test_weights_that_are_wanted_otherwise_are_named(
    node: dict[str, Any], wish: dict[str, str], weights: dict[str, Any], expected: str
) -> None:
    node["slice"]["node"]["weights"].update(wish)
    told = node_state.weights_reasons(node["slice"]["node"]["weights"], {**node["weights"], **weights})
    assert told == [f"weights {node['state_directory']}/weights: {expected}"]


def test_remade_weights_and_environments_are_another_command(node: dict[str, Any]) -> None:
    manifest = Path(node["state_directory"], "weights/.stepladder/manifest.json")
    processes = [{**node["processes"][0], "started_from": [str(manifest)]}]
    assert reasons(node, processes=processes) == ["release: files differ from what they are made of: vllm-0/run"]


def test_touched_weights_are_the_same_command_and_mended_ones_another(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "SHA256SUMS").write_text(f"{node_state.digest(str(source / 'config.json'))}  config.json\n")
    path = tmp_path / "models" / "o--m" / "r"
    wish = Request("o/m", str(path), "r", source="directory", source_path=str(source))
    weights.ensure(wish, "present")
    command = {"argv": ["/bin/true"], "started_from": [str(path / ".stepladder/manifest.json")]}
    before = release.fingerprint(command)
    (path / "config.json").touch()
    assert weights.ensure(wish, "present")["changed"]
    assert release.fingerprint(command) == before
    time.sleep(1.1)  # the manifest tells seconds
    (path / "config.json").chmod(0o600)
    (path / "config.json").write_text("[]")
    assert weights.ensure(wish, "present")["changed"]
    assert release.fingerprint(command) != before


def process(**changes: Any) -> dict[str, Any]:
    return {"name": "vllm-0", "phase": "ready", "detail": "d", "outdated": False, "orphans": [], **changes}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (process(), []),
        (process(phase="stopped", detail="not running"), ["vllm-0: stopped, not running"]),
        (process(outdated=True), ["vllm-0: runs another command than wanted"]),
        (process(orphans=[7]), ["vllm-0: an earlier start left 1 processes behind"]),
    ],
)
def test_processes(state: dict[str, Any], expected: list[str]) -> None:
    assert node_state.process_reasons([state]) == expected


def test_units_that_the_plan_has_not_are_named(tmp_path: Path) -> None:
    for name, text in (("d-a", "Description=Stepladder d: a"), ("d-b", "Description=Stepladder d: b"), ("d-x", "")):
        (tmp_path / f"{name}.service").write_text(text)
    found = node_state.superfluous_units("d", [f"{tmp_path}/d-a.service"], str(tmp_path))
    assert found == [f"unit {tmp_path}/d-b.service: the plan has no such process"]


# --- over all nodes --------------------------------------------------------------------------------------------------


def seen(*found: str, current: str | None = "p1", ranks: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "release_seen": {"reasons": list(found), "current": current, "members": [], **more},
        "deployment_slice": {"node": {"ranks": [{"node": rank} for rank in ranks]}},
    }


PAIR = ("a", "b")


@pytest.mark.parametrize(
    ("nodes", "planned", "force", "changing", "dropped", "lines"),
    [
        ({"a": seen(), "b": seen()}, "ab", False, [], [], []),
        ({"a": seen(), "b": seen("x: gone", "y")}, "ab", False, ["b"], [], ["b: x: gone\n  y"]),
        # One rank differs: all of its replica are started again, others are left alone.
        (
            {"a": seen(ranks=PAIR), "b": seen("x", ranks=PAIR), "c": seen()},
            "abc", False, ["a", "b"], [], ["b: x"],
        ),
        ({"a": seen("none is current", current=None)}, "a", False, ["a"], [], []),
        ({"a": seen()}, "a", True, ["a"], [], ["a: by force"]),
        (
            {"a": seen(), "b": seen()}, "a", False, [], ["b"],
            ["b: runs release p1 and has no part in the plan: will be stopped"],
        ),
        ({"a": seen(), "b": seen(current=None)}, "a", False, [], [], []),
        # Left out by --limit: nobody asked it.
        ({"a": seen(), "b": {}}, "a", False, [], [], []),
        (
            {"a": seen(), "b": {"release_seen": {"unreachable": True}}}, "a", False, [], [],
            ["b: did not answer, and has no part in the plan; what an earlier release may run there stays"],
        ),
        (
            {"a": seen(members=["a", "z"])}, "a", False, [], [],
            ["z: has a part in release p1 and is not in the group 'engines' any more: its processes may still run "
             "there. Put it back into the group and deploy, or stop them by hand."],
        ),
    ],
)  # fmt: skip
def test_work(
    nodes: dict[str, Any], planned: str, force: bool, changing: list[str], dropped: list[str], lines: list[str]
) -> None:
    found = drift.work(nodes, list(planned), list(nodes), force)
    assert found == {"changing": changing, "giving": [], "dropped": dropped, "lines": lines}


WHOLE, LACKS = seen(weights_complete=True), seen("weights: no complete manifest", weights_complete=False)
GIVERS = {
    "nobody changes": ({"a": WHOLE, "b": WHOLE}, []),
    "who changes lacks nothing": ({"a": WHOLE, "b": seen("stopped", weights_complete=True)}, []),
    "one is added": ({"a": WHOLE, "b": WHOLE, "c": LACKS}, ["a", "b"]),
    "all are new": ({"a": LACKS, "b": LACKS}, []),
    "a large fleet": ({**dict.fromkeys("abcdef", WHOLE), "g": LACKS}, ["a", "b", "c", "d"]),
    "one that changes has them": (
        {**dict.fromkeys("abcdef", WHOLE), "g": LACKS, "h": seen("stopped", weights_complete=True)}, ["a", "b", "c"],
    ),
    "a rank changes with the one that lacks them": (
        {"a": WHOLE, "b": seen(ranks=("b", "c"), weights_complete=True),
         "c": seen("weights", ranks=("b", "c"), weights_complete=False)}, ["a"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "giving"), GIVERS.values(), ids=GIVERS)
def test_who_gives_weights_to_nodes_that_lack_them(nodes: dict[str, Any], giving: list[str]) -> None:
    found = drift.work(nodes, [*nodes], [*nodes])
    assert (found["giving"], set(found["giving"]) & set(found["changing"])) == (giving, set())


def test_report() -> None:
    nodes = {"a": seen(), "b": seen("x", "y"), "c": seen(current=None), "d": {}}
    found = drift.report(nodes, list(nodes), list(nodes))
    assert found["differs"]
    assert found["text"].splitlines() == [
        "a: equals release p1", "b: x", "  y", "c: nothing is deployed", "d: did not answer",
    ]  # fmt: skip
    assert not drift.report({"a": seen()}, ["a"], ["a"])["differs"]


def test_a_node_that_does_not_answer_is_no_difference() -> None:
    """The run ends with Ansible's own status for it then, 4; what other nodes differ in goes before that."""
    told = drift.report({"a": seen(), "b": {"unreachable": True}}, ["a", "b"], ["a", "b"])
    assert told == {"text": "a: equals release p1\nb: did not answer", "differs": False}
    assert drift.report({"a": seen("x"), "b": {}}, ["a", "b"], ["a", "b"])["differs"]


def test_the_mark_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="there are no files"):
        contents.folder_mark(str(tmp_path))
    (tmp_path / "a").write_text("1")
    first = contents.folder_mark(str(tmp_path))
    (tmp_path / "a").write_text("2")
    assert contents.folder_mark(str(tmp_path)) != first
