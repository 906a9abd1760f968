"""The benchmarks name what they measure by what is there."""

from __future__ import annotations

import runpy
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_phases_of_a_measured_deploy_are_its_plays() -> None:
    found = runpy.run_path(str(REPOSITORY / "tests/bench/local_deploy.py"))["OPENINGS"]
    plays = {
        play["name"]
        for name in ("deploy", "_start")
        for play in yaml.safe_load((REPOSITORY / f"playbooks/{name}.yml").read_text())
    }
    assert {name for name in found if not name.startswith("|")} <= plays
