"""Lanes for the whole suite, and what tests have to say beside pass or fail.

With `-n2` one worker takes units and then engines on this machine, the other what only computes, at the lowest
priority, and then nodes of a lab. In a lane each test is by itself, in its order.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

LANES = {"computes": ("tests/conformance/", "tests/lint/"), "nodes": ("tests/lab/",)}
LOWEST_PRIORITY = 19
NOTES = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture(scope="session")
def notes(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Lines for the end of the run, by their heading."""
    return request.config.stash.setdefault(NOTES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show what the tests noted, whether they passed or not."""
    for heading, lines in config.stash.get(NOTES, {}).items():
        if lines:
            terminalreporter.section(heading)
            for line in lines:
                terminalreporter.write_line(line)


def lane(nodeid: str) -> str:
    """The lane of a test."""
    return next((name for name, folders in LANES.items() if nodeid.startswith(folders)), "runs")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A worker's folder has no longer a name than anybody's: a socket's address has 107 bytes, and many lie there."""
    if hasattr(config, "workerinput"):
        config.option.basetemp = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Units first: they fail soonest, and leave a core to what computes, as engines that load do not."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/unit/"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A worker that computes stands back for the one that runs things; root, whom a lab needs, may step forth again."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        priority = LOWEST_PRIORITY if lane(item.nodeid) == "computes" else 0
        if priority or os.geteuid() == 0:
            os.setpriority(os.PRIO_PROCESS, 0, priority)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """A lane for a worker, the longest first; who is done takes the next."""

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    return Lanes(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker's tests noted; one that crashed has nothing to hand over."""
    notes = node.config.stash.setdefault(NOTES, {})
    for heading, lines in getattr(node, "workeroutput", {}).get("notes", {}).items():
        notes.setdefault(heading, []).extend(lines)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its notes over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = session.config.stash.get(NOTES, {})
