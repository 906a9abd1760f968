"""A deploy is whole: what would run a part of it is refused before anything is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_TAGS = "deploy runs as a whole: it has no tags"
NO_PLAN = "--start-at-task left out the plan, without which nothing is done"


def deploy(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bin/stepladder", "deploy", "-i", "inventories/local", *options]
    return subprocess.run(
        [*command, "-e", f"stepladder_state_directory={state}"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tags", "model_weights", NO_TAGS),
        ("--skip-tags", "verify", NO_TAGS),
        ("--start-at-task", "Check that the node is fit for its slice of the plan", NO_PLAN),
        ("--start-at-task", "Bring the weights", NO_PLAN),
    ],
)
def test_a_part_of_a_deploy_is_refused(option: str, value: str, message: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = deploy(state, option, value)
    assert done.returncode in {1, 2}, done.stdout[-2000:]
    assert message in done.stdout + done.stderr
    assert not state.exists()


@pytest.mark.nightly
def test_a_whole_one_is_not(tmp_path: Path) -> None:
    done = deploy(tmp_path / "state", "--check")
    assert done.returncode == 0, done.stdout[-2000:]
