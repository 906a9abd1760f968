"""Style and common mistakes, by the rules in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.lint
def test_ruff_finds_nothing() -> None:
    ruff = Path(sys.executable).with_name("ruff")
    files = ["src", "plugins", "tests", "roles", "bin/stepladder"]
    result = subprocess.run([ruff, "check", "--no-fix", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run: .venv/bin/ruff check {' '.join(files)}\n{result.stdout}{result.stderr}"
