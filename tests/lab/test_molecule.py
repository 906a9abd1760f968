"""Roles by themselves on the lab's nodes: molecule calls them four times, testinfra looks at what they leave."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import signed_repository
from real_lab import REPOSITORY, RealLab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

SCENARIOS = sorted(path.parent.name for path in (REPOSITORY / "tests/molecule").glob("*/molecule.yml"))
EVERY_RUN = {"service"}
CHANGE_NOTHING = {"preflight"}
SEQUENCE = ["check", "converge", "check", "idempotence", "verify", "cleanup"]
STEP = re.compile(r"\[\w+ > (\w+)\] Executing$(.*?)(?=\[\w+ > \w+\] Executed)", re.M | re.S)


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly) for name in SCENARIOS]
)
def test_a_role_foresees_what_it_does_and_does_it_once(lab: RealLab, scenario: str, tmp_path: Path) -> None:
    with driver_mirror(lab, tmp_path) if scenario == "gpu_driver" else nullcontext({}) as variables:
        steps = run(lab, scenario, variables)
    foreseen, worked, left = (changed for _, changed in steps[:3])
    if scenario in CHANGE_NOTHING:
        assert (foreseen, worked) == (0, 0), "a role that only looks changes something"
    else:
        assert foreseen, "a check on a fresh node foresees nothing"
        assert worked, "the scenario does nothing"
    assert left == 0, "a check on a converged node foresees a change"


@contextmanager
def driver_mirror(lab: RealLab, folder: Path) -> Iterator[dict[str, str]]:
    """Two releases of STAND-INS for a driver, signed and served to the nodes; the variable that names them."""
    if reason := signed_repository.lacking():
        pytest.skip(f"no signed repository on this machine: it lacks {reason}")
    packages = signed_repository.driver_packages(signed_repository.DRIVER_VERSION, platform.release())
    packages += signed_repository.driver_packages(signed_repository.NEWER_DRIVER_VERSION, "")
    fingerprint = signed_repository.new_key(folder / "key")
    signed_repository.build(folder / "www/nvidia", packages)
    signed_repository.sign(folder / "www/nvidia", folder / "key")
    gateway = lab.status()["subnet"].replace(".0/24", ".1")
    with signed_repository.served(folder / "www", "0.0.0.0") as served:
        url = f"{served.replace('0.0.0.0', gateway)}nvidia/"
        mirror = {"url": url, "key_url": f"{url}key.asc", "fingerprints": [fingerprint]}
        yield {"STEPLADDER_DRIVER_MIRROR": json.dumps(mirror)}


def run(lab: RealLab, scenario: str, variables: dict[str, str]) -> list[tuple[str, int]]:
    """A scenario from its first check to its clean-up: the steps, and how many tasks changed something in each."""
    programs = Path(sys.executable).parent
    environ = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
        "STEPLADDER_LAB_INVENTORY": str(lab.inventory),
        "STEPLADDER_REPOSITORY": str(REPOSITORY),
        "NO_COLOR": "1",
        **variables,
    }
    done = subprocess.run(
        [programs / "molecule", "-c", "molecule/base.yml", "test", "-s", scenario], cwd=REPOSITORY / "tests",
        env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    steps = [(name, sum(map(int, re.findall(r"changed=(\d+)", text)))) for name, text in STEP.findall(done.stdout)]
    assert [name for name, _ in steps] == SEQUENCE, done.stdout
    return steps
