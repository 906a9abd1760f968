"""What the role engine_venv leaves on a node."""

from __future__ import annotations

import json

import pytest
from testinfra.host import Host

VENVS = "/var/lib/stepladder/venvs"


@pytest.fixture
def venv(host: Host) -> str:
    """The one environment of an engine."""
    (found,) = host.check_output(f"ls -d {VENVS}/transformers-*-cpu-*/bin").split()
    return found.removesuffix("/bin")


def test_the_engine_runs_in_the_lock_s_version(host: Host, venv: str) -> None:
    version = host.check_output(f"{venv}/bin/python -c 'import transformers; print(transformers.__version__)'")
    assert venv.startswith(f"{VENVS}/transformers-{version.strip()}-cpu-")


def test_it_has_what_the_lock_names_and_nothing_for_gpus(host: Host, venv: str) -> None:
    marker = json.loads(host.file(f"{venv}/.stepladder.json").content_string)
    names = host.check_output(f"ls -d {venv}/lib/python*/site-packages/*.dist-info").splitlines()
    assert len(names) == marker["packages"]
    assert not [name for name in names if "/nvidia_" in name]
