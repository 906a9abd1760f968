"""How the labs' own Docker engine is taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepladder.lab import engine
from stepladder.lab.places import LabError


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was asked of a program that stands in for umount: the place is in use twice, and then it is not."""
    log = tmp_path / "asked"
    program = tmp_path / "bin/umount"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n[ "$(grep -c . {log})" -gt 2 ] && exit 0\n'
        'echo "umount: $1: target is busy." >&2\nexit 32\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return log


def test_what_was_killed_lets_go_of_its_mounts_a_moment_later(asked: Path) -> None:
    engine.unmount("/x/engine")
    assert asked.read_text().splitlines() == ["/x/engine"] * 3


def test_what_stays_in_use_is_told(asked: Path) -> None:
    with pytest.raises(LabError, match=r"(?s)target is busy.*`fuser -vm /x/engine` shows who uses it"):
        engine.unmount("/x/engine", patience=0)
    assert asked.read_text().splitlines() == ["/x/engine"]
