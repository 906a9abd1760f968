"""`catalog/flags/`: every flag that a release's own parser knows, for `lint-command`; drift fails here.

Made anew by `STEPLADDER_WRITE_FLAGS=1 bin/stepladder test tests/conformance/test_flag_lists.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from judging import Judge, Question
from programs import CATALOGUE, PROGRAMS

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

LISTED = sorted(name for name, program in PROGRAMS.items() if program.executable == program.engine)
CPU = (("count", 1), ("platform", "cpu"))


@pytest.mark.parametrize("name", LISTED)
def test_listed_flags_are_the_parsers_own(name: str, judge_of: Callable[[str], Judge]) -> None:
    (verdict,) = judge_of(name).ask([Question(("flags",), (), CPU)]).verdicts
    found = verdict.facts["flags"]
    assert len(found) > 100, verdict
    path = CATALOGUE.directory / "flags" / f"{name}.txt"
    if os.environ.get("STEPLADDER_WRITE_FLAGS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{flag}\n" for flag in found))
    listed = path.read_text().splitlines() if path.exists() else []
    new, gone = sorted(set(found) - set(listed)), sorted(set(listed) - set(found))
    assert (new, gone) == ([], []), f"{path.name} differs from the parser: run this test with STEPLADDER_WRITE_FLAGS=1"
