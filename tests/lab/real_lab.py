"""A lab for tests, in folders of its own beside any lab that the machine has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.plugin_utils.run import controller, is_gone

from stepladder.lab import engine, machine
from stepladder.lab.places import places

# What tests found out beside passing, such as the time that a recovery took; shown at the end of the run.
NOTED: list[str] = []
REPOSITORY = Path(__file__).resolve().parents[2]
PLACE, PREFIX, OWNER = Path("/var/tmp"), "sl-lab-", "owner.json"


@dataclass
class RealLab:
    """A lab and the way to it.

    Args:
        name: of the lab.
        state: the folder that holds everything it makes.
        inventory: the folder for `-i`.
    """

    name: str
    state: Path
    inventory: Path
    first_up: str = ""
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, verb: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`bin/stepladder lab VERB` with this lab's name."""
        command = [sys.executable, "bin/stepladder", "lab", verb, "--name", self.name, *arguments]
        return self._done(command, check)

    def play(self, verb: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """An ordinary verb, such as deploy, with this lab's inventory."""
        return self._done([sys.executable, "bin/stepladder", verb, "-i", str(self.inventory), *arguments], check)

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        """An ordinary verb with this lab's inventory, not waited for."""
        command = [sys.executable, "bin/stepladder", verb, "-i", str(self.inventory), *arguments]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **self.environ}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def ssh(self, node: str, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command on a node, over SSH with the pinned keys."""
        return self.run("ssh", node, command, check=check)

    def status(self) -> dict[str, Any]:
        """What `lab status --json` says."""
        return dict(json.loads(self.run("status", "--json").stdout))

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes by name, as status tells them."""
        return {node["name"]: node for node in self.status()["nodes"]}

    def address(self, node: str) -> str:
        """A node's address."""
        return str(self.nodes[node]["address"])

    def hears(self, node: str, address: str) -> bool:
        """Whether a node gets an answer from an address."""
        return self.ssh(node, f"ping -c 2 -i 0.2 -W 1 {address}", check=False).returncode == 0

    def _done(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**os.environ, **self.environ}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        if check:
            output = f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
            assert done.returncode == 0, f"{' '.join(command[1:])} ended with {done.returncode}:\n{output}"
        return done


def why_not() -> str:
    """What this machine lacks for a lab, in a line; empty where it lacks nothing."""
    where = places(os.environ, Path.home())
    lacks, _ = machine.look(where, machine.read_packages(sys.executable), engine.find(where) is not None)
    return "; ".join(lacks)


@contextmanager
def own_lab(*options: str) -> Iterator[RealLab]:
    """A lab of its own, removed at the end; where the machine lacks something the test is skipped.

    Args:
        options: of `lab up`.
    """
    if reason := why_not():
        pytest.skip(f"no lab on this machine: it lacks {reason}")
    for state in PLACE.glob(f"{PREFIX}*"):
        _remove_orphan(state)
    state = Path(tempfile.mkdtemp(prefix=PREFIX, dir=PLACE))
    (state / OWNER).write_text(json.dumps(controller(os.getpid())))
    lab = _in(state)
    try:
        lab.first_up = lab.run("up", *options, "--inventory", str(lab.inventory)).stdout
        yield lab
    finally:
        _remove(lab)


def _in(state: Path) -> RealLab:
    name = "t" + state.name.removeprefix(PREFIX).lower().replace("_", "-")
    return RealLab(name, state, state / "inventory", environ={"XDG_STATE_HOME": str(state)})


def _remove(lab: RealLab) -> None:
    done = lab.run("down", check=False)
    assert done.returncode == 0, f"the lab in {lab.state} was not removed:\n{done.stdout}{done.stderr}"
    shutil.rmtree(lab.state, ignore_errors=True)


def _remove_orphan(state: Path) -> None:
    """Remove a lab whose tests were killed: it takes memory and a subnet for as long as the machine is up."""
    owner = state / OWNER
    if owner.exists() and is_gone(json.loads(owner.read_text())):
        _remove(_in(state))
