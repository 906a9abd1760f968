"""Two real nodes, brought up once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_lab import NOTED, RealLab, own_lab


@pytest.fixture(scope="session")
def lab() -> Iterator[RealLab]:
    """Two nodes with two networks; tests leave them on, healed and as they found them."""
    with own_lab("--nodes", "2", "--second-network") as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def noted(notes: dict[str, list[str]]) -> None:
    """What the tests note is shown at the end."""
    notes["noted"] = NOTED
