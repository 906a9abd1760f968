"""Releases on a node: what is written, what a rerun does after a cut at any step, what is refused, what is masked."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import release


def process(name="vllm-0", argv=("/bin/echo", "hello"), **more):
    return {"name": name, "argv": list(argv), "env": {}, "secret_env_files": {}, "working_directory": "/", **more}


def converge(root, plan_id, processes, keep=3, check_mode=False):
    wanted = release.wanted_release(str(root), plan_id, {"plan": plan_id}, processes)
    before = release.current_fingerprints(str(root))
    found, steps = release.converge(str(root), wanted, keep, check_mode, deadline=1)
    return release.result_of(found, wanted, steps, before)


def tree(root):
    """Every path with its mode and content; the directory's own name in them is left out, so that two compare."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        content = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else ""
        content = content.replace(str(root), "ROOT")
        found[str(path.relative_to(root))] = (mode, content)
    return found


def test_first_release_then_the_same_again_changes_nothing(tmp_path):
    root = tmp_path / "deployments" / "step3"
    foreseen = converge(root, "p1", [process()], check_mode=True)
    assert not root.exists()
    done = converge(root, "p1", [process()])
    assert foreseen == done
    assert done["current"] == "p1"
    assert done["previous"] is None
    assert done["changed_processes"] == ["vllm-0"]
    before = tree(root)
    assert converge(root, "p1", [process()], check_mode=True)["changed"] is False
    assert converge(root, "p1", [process()])["actions"] == []
    assert tree(root) == before
    modes = {name: oct(mode) for name, (mode, _) in before.items()}
    assert modes["logs"] == modes["releases"] == modes["releases/p1"] == modes["releases/p1/vllm-0"] == "0o700"
    assert (modes["releases/p1/vllm-0/env"], modes["releases/p1/vllm-0/run"]) == ("0o400", "0o500")
    assert json.loads((root / "current" / "plan.json").read_text()) == {"format_version": 1, "plan": "p1"}


def test_next_release_keeps_the_way_back_and_leaves_unchanged_commands_alone(tmp_path):
    root = tmp_path / "d"
    converge(root, "p1", [process("a"), process("b"), process("gone")])
    result = converge(root, "p2", [process("a"), process("b", argv=["/bin/echo", "other"]), process("new")])
    assert (result["current"], result["previous"]) == ("p2", "p1")
    assert result["changed_processes"] == ["b", "new"]
    assert result["removed_processes"] == ["gone"]
    back = converge(root, "p1", [process("a"), process("b"), process("gone")])
    assert (back["current"], back["previous"]) == ("p1", "p2")
    assert back["actions"] == ["link previous -> p2", "link current -> p1"]


@pytest.mark.parametrize(
    ("keep", "left", "removed"),
    [(1, {"p4", "p5"}, ["p3"]), (2, {"p4", "p5"}, ["p3"]), (3, {"p3", "p4", "p5"}, []), (9, {"p3", "p4", "p5"}, [])],
)
def test_old_releases_are_removed_but_never_current_or_previous(tmp_path, keep, left, removed):
    root = tmp_path / "d"
    for number in range(1, 5):
        converge(root, f"p{number}", [process()], keep=2)
        os.utime(root / "releases" / f"p{number}", (number, number))
    converge(root, "p3", [process()], keep=9)
    converge(root, "p4", [process()], keep=9)
    result = converge(root, "p5", [process()], keep=keep)
    assert result["removed_releases"] == removed
    assert {path.name for path in (root / "releases").iterdir()} == left


class CutError(Exception):
    """The run was cut off."""


def test_a_run_cut_at_any_step_is_completed_by_the_next(tmp_path):
    old, new = [process("a"), process("b")], [process("a", argv=["/bin/true"]), process("c")]

    def start(root):
        for plan_id, age in (("p0", 100), ("p1", 200)):
            converge(root, plan_id, old)
            os.utime(root / "releases" / plan_id, (age, age))
        # A release of the wanted name that was tampered with has to be replaced on the way.
        shutil.copytree(root / "releases" / "p1", root / "releases" / "p2")
        os.utime(root / "releases" / "p2", (50, 50))

    wanted_tree = None
    for cut_at in itertools.count():
        root = tmp_path / str(cut_at) / "d"
        start(root)
        if wanted_tree is None:
            whole = tmp_path / "whole" / "d"
            start(whole)
            converge(whole, "p2", new, keep=2)
            wanted_tree = tree(whole)
        wanted = release.wanted_release(str(root), "p2", {"plan": "p2"}, new)
        steps = release.plan(release.observe(str(root), wanted), wanted, 2)
        count = itertools.count()

        def cut(label, count=count, cut_at=cut_at):
            if next(count) == cut_at:
                raise CutError(label)

        try:
            release.apply(str(root), wanted, steps, after=cut)
        except CutError:
            current = str((root / "current").readlink())
            assert current in ("releases/p1", "releases/p2")
            assert converge(root, "p2", new, keep=2)["current"] == "p2"
            assert tree(root) == wanted_tree, f"cut at {cut_at}"
            assert converge(root, "p2", new, keep=2)["changed"] is False
        else:
            break
    assert cut_at > 12


def test_a_first_run_cut_at_any_step_is_completed_by_the_next(tmp_path):
    converge(tmp_path / "whole" / "d", "p1", [process()])
    for cut_at in range(12):
        root = tmp_path / str(cut_at) / "d"
        wanted = release.wanted_release(str(root), "p1", {"plan": "p1"}, [process()])
        count = itertools.count()

        def cut(label, count=count, cut_at=cut_at):
            if next(count) == cut_at:
                raise CutError(label)

        try:
            release.apply(str(root), wanted, release.plan(release.observe(str(root), wanted), wanted, 3), after=cut)
        except CutError:
            converge(root, "p1", [process()])
        assert tree(root) == tree(tmp_path / "whole" / "d")


def test_a_damaged_current_release_is_mended(tmp_path):
    root = tmp_path / "d"
    converge(root, "p1", [process()])
    before = tree(root)
    script = root / "releases" / "p1" / "vllm-0" / "run"
    script.chmod(0o700)
    script.write_text("#!/bin/sh\necho changed by hand\n")
    assert converge(root, "p1", [process()])["actions"] == ["build p1"]
    assert tree(root) == before


def test_the_run_script_runs_the_command_with_its_environment(tmp_path):
    root = tmp_path / "d"
    secret = tmp_path / "secret"
    secret.write_text("s3cret $HOME\n")
    odd = 'it\'s "odd" $HOME `id`\nsecond line'
    script = 'printf "%s|%s|%s|%s|%s|%s" "$1" "$ODD" "$API" "$STEPLADDER_DEPLOYMENT" "$STEPLADDER_PROCESS" "$PWD"'
    one = process(
        argv=["/bin/sh", "-c", script, "x", odd],
        env={"ODD": odd},
        secret_env_files={"API": str(secret)},
        working_directory="/tmp",
    )
    result = converge(root, "p1", [one])
    run = root / "current" / "vllm-0" / "run"
    out = subprocess.run([run], capture_output=True, text=True, check=True).stdout
    started, _, rest = out.partition("\n")
    assert started.startswith("stepladder: starting vllm-0 at 20")
    assert rest == f"{odd}|{odd}|s3cret $HOME|{root}|vllm-0|/tmp"
    assert "s3cret" not in "".join(p.read_text() for p in root.rglob("*") if p.is_file())
    assert f"STEPLADDER_FINGERPRINT='{result['fingerprints']['vllm-0']}'" in run.read_text()
    assert "    -c \\\n" in run.read_text()
    secret.unlink()
    failed = subprocess.run([run], capture_output=True, text=True, check=False)
    assert failed.returncode == 78
    assert f"secret file {secret} is missing or not readable" in failed.stderr


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"name": "other"}, True),
        ({"argv": ["/bin/echo", "hello", ""]}, False),
        ({"argv": ["/bin/echo hello"]}, False),
        ({"env": {"A": "1"}}, False),
        ({"secret_env_files": {"A": "/s"}}, False),
        ({"working_directory": "/tmp"}, False),
    ],
)
def test_fingerprint_follows_the_command_only(change, same):
    assert (release.fingerprint({**process(), **change}) == release.fingerprint(process())) is same


def test_diff_shows_scripts_and_hides_secrets_on_both_sides(tmp_path):
    root = tmp_path / "d"
    old = process(
        argv=["/bin/x", "--api-key", "oldkey", "--max-tokens", "5"], env={"HF_TOKEN": "hf_old", "LEVEL": "INFO"}
    )
    new = process(
        argv=["/bin/x", "--api-key=newkey", "--max-tokens", "6"], env={"HF_TOKEN": "hf_new", "LEVEL": "DEBUG"}
    )
    converge(root, "p1", [old])
    diff = release.diff_of(str(root), "p2", "p1", [new])
    text = json.dumps(diff)
    for hidden in ("oldkey", "newkey", "hf_old", "hf_new"):
        assert hidden not in text
    by_name = {part["before_header"]: part for part in diff}
    assert by_name[f"{root}/current"]["before"] == "p1\n"
    assert by_name["vllm-0/env"]["before"] == "HF_TOKEN=********\nLEVEL='INFO'\n"
    assert by_name["vllm-0/env"]["after"] == "HF_TOKEN=********\nLEVEL='DEBUG'\n"
    assert "--max-tokens \\\n    5\n" in by_name["vllm-0/run"]["before"]
    assert "--max-tokens \\\n    6\n" in by_name["vllm-0/run"]["after"]
    assert release.diff_of(str(root), "p1", "p1", [old]) == []


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (
            ["serve", "--api-key", "one", "two", "--port", "1"],
            ["serve", "--api-key", release.MASK, release.MASK, "--port", "1"],
        ),
        (["--api-key=one", "m", "-x", "y"], [f"--api-key={release.MASK}", "m", "-x", "y"]),
        (["--hf-token", "one", "-tp", "8"], ["--hf-token", release.MASK, "-tp", "8"]),
        (["--api-key"], ["--api-key"]),
    ],
)
def test_every_value_of_a_secret_flag_is_masked(argv, shown):
    """vLLM's --api-key takes several."""
    assert release.mask_argv(argv) == shown


def test_all_faults_of_the_arguments_are_told_at_once():
    bad = process(
        "a/b",
        argv=[],
        env={"1A": "x", "B": "y", "STEPLADDER_X": "z"},
        secret_env_files={"B": "relative"},
    )
    assert release.check_arguments("/", "../x", [bad, bad], 0)[:4] == [
        "path is '/': give the absolute path of one deployment, like /var/lib/stepladder/deployments/step3",
        "plan_id is '../x': letters, digits, '.', '_' and '-' only, the first a letter or digit",
        "keep is 0: at least 1 release has to stay",
        "process name 'a/b' is given 2 times",
    ]
    assert release.check_arguments("/var/x/d", "p", [bad], 1) == [
        "process name 'a/b': letters, digits, '.', '_' and '-' only, the first a letter or digit",
        "process a/b: argv is empty, nothing to run",
        "process a/b: '1A' is not a name of an environment variable",
        "process a/b: STEPLADDER_X is set by the run script itself, take it out",
        "process a/b: B is in env and in secret_env_files, keep one",
        "process a/b: secret file of B is 'relative', an absolute path is needed",
    ]


def test_a_strangers_directory_is_neither_used_nor_removed(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    path = str(tmp_path / "home")
    with pytest.raises(release.ReleaseError, match=r"holds thesis.txt and no file .stepladder: it was not made by"):
        converge(path, "p1", [process()])
    with pytest.raises(release.ReleaseError, match=r"has no file .stepladder, so it was not made by stepladder"):
        release.absent(path, check_mode=False)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_removal_cut_at_any_step_is_completed_by_the_next(tmp_path):
    for cut_at in range(7):
        root = tmp_path / str(cut_at) / "d"
        converge(root, "p1", [process()])
        converge(root, "p2", [process()])
        assert release.absent(str(root), check_mode=True)["changed"] is True
        count = itertools.count()

        def cut(label, count=count, cut_at=cut_at):
            if next(count) == cut_at:
                raise CutError(label)

        try:
            release.remove(str(root), after=cut)
        except CutError:
            assert release.absent(str(root), check_mode=False)["changed"] is True
        assert not root.exists()
        assert release.absent(str(root), check_mode=False)["changed"] is False


def test_the_second_of_two_runs_names_the_holder_of_the_lock(tmp_path):
    path = str(tmp_path / "d")
    words = f"held by process {os.getpid()} for longer than 0 s"
    with release.lock(path), pytest.raises(release.ReleaseError, match=words), release.lock(path, deadline=0.3):
        pass
    assert not Path(path).exists()
