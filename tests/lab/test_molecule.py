"""Roles by themselves on the lab's nodes: molecule calls them four times, testinfra looks at what they leave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from real_lab import REPOSITORY, RealLab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

SCENARIOS = sorted(path.parent.name for path in (REPOSITORY / "tests/molecule").glob("*/molecule.yml"))
EVERY_RUN = {"service"}
SEQUENCE = ["check", "converge", "check", "idempotence", "verify", "cleanup"]
STEP = re.compile(r"\[\w+ > (\w+)\] Executing$(.*?)(?=\[\w+ > \w+\] Executed)", re.M | re.S)


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly) for name in SCENARIOS]
)
def test_a_role_foresees_what_it_does_and_does_it_once(lab: RealLab, scenario: str) -> None:
    programs = Path(sys.executable).parent
    environ = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
        "STEPLADDER_LAB_INVENTORY": str(lab.inventory),
        "STEPLADDER_REPOSITORY": str(REPOSITORY),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [programs / "molecule", "-c", "molecule/base.yml", "test", "-s", scenario], cwd=REPOSITORY / "tests",
        env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    steps = [(name, sum(map(int, re.findall(r"changed=(\d+)", text)))) for name, text in STEP.findall(done.stdout)]
    assert [name for name, _ in steps] == SEQUENCE, done.stdout
    foreseen, worked, left = (changed for _, changed in steps[:3])
    assert foreseen, "a check on a fresh node foresees nothing"
    assert worked, "the scenario does nothing"
    assert left == 0, "a check on a converged node foresees a change"
