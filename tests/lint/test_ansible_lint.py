"""Playbooks and roles, by ansible-lint's strictest profile; nothing is fetched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.lint
def test_ansible_lint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("ansible-lint")
    environ = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    argv = [program, "--offline", "--strict", "--profile", "production"]
    result = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run: .venv/bin/ansible-lint --offline\n{result.stdout}{result.stderr}"
