"""Two real nodes, brought up once for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_lab import NOTED, RealLab, why_not


@pytest.fixture(scope="session")
def lab() -> Iterator[RealLab]:
    """Two nodes with two networks; tests leave them on, healed and as they found them."""
    if reason := why_not():
        pytest.skip(f"no lab on this machine: it lacks {reason}")
    state = Path(tempfile.mkdtemp(prefix="sl-lab-", dir="/var/tmp"))
    found = RealLab("t" + state.name.removeprefix("sl-lab-").lower().replace("_", "-"), state, state / "inventory")
    found.environ = {"XDG_STATE_HOME": str(state)}
    try:
        up = found.run("up", "--nodes", "2", "--second-network", "--inventory", str(found.inventory))
        found.first_up = up.stdout
        yield found
    finally:
        done = found.run("down", check=False)
        assert done.returncode == 0, f"the lab in {state} was not removed:\n{done.stdout}{done.stderr}"
        shutil.rmtree(state, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests noted, whether they passed or not."""
    if NOTED:
        terminalreporter.section("noted")
        for line in NOTED:
            terminalreporter.write_line(line)
