"""Settings whose word for nothing is `off`: YAML reads it as false where it stands without quotes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar, trust_as_template

from stepladder import units

ROLES = Path(__file__).resolve().parents[2] / "roles"
WRITTEN = [("off", False), ("'off'", False), ("observe", True)]


def comes_about(file: str, name: str, condition: str, variables: dict[str, Any]) -> bool:
    """Whether the condition of a task that names a setting holds."""
    [task] = [task for task in yaml.safe_load((ROLES / file).read_text()) if task["name"] == name]
    conditions = task["when"] if isinstance(task["when"], list) else [task["when"]]
    [told] = [one for one in conditions if condition in one]
    return bool(Templar(None, variables).evaluate_conditional(trust_as_template(told.partition(" or ")[0])))


@pytest.mark.parametrize(("written", "runs"), WRITTEN)
def test_the_watchdog(written: str, runs: bool) -> None:
    mode = yaml.safe_load(f"watchdog_mode: {written}")
    assert units.watched_nodes({"n": mode, "other": {}}, ["n", "other"]) == (["n"] if runs else [])
    main = "watchdog/tasks/main.yml"
    assert comes_about(main, "Have it run", "watchdog_mode", mode) is runs
    assert comes_about(main, "Have it gone", "watchdog_mode", mode) is not runs


@pytest.mark.parametrize(("written", "runs"), [*WRITTEN[:2], ("tell", True)])
def test_the_gates_measurement(written: str, runs: bool) -> None:
    gate = yaml.safe_load(f"release_speed_gate: {written}")
    assert comes_about("release/tasks/wave.yml", "Measure them", "release_speed_gate", gate) is runs
