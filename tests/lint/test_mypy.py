"""Types: strict for the brain and for what runs on nodes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.lint
@pytest.mark.parametrize("part", ["src", "plugins/module_utils", "plugins/modules", "plugins/filter"])
def test_types_hold(part: str) -> None:
    argv = [sys.executable, "-m", "mypy", part]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run: .venv/bin/mypy {part}\n{result.stdout}{result.stderr}"
