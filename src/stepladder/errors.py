"""What can be wrong with a wish, told in full: all reasons at once, each with the way to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One broken rule: which rule, what was found, and what to change."""

    rule: str
    found: str
    mend: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}. {self.mend}"


class StepladderError(Exception):
    """An error whose text is meant for the operator; it is shown without a traceback."""


class CatalogueError(StepladderError):
    """A catalogue file that cannot be used: file, key, what was expected."""


class PlanRefusedError(StepladderError):
    """A deployment that cannot work, with every reason found.

    Args:
        violations: at least one broken rule, in the order in which an operator would look at them.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        count = len(self.violations)
        head = "The plan is refused" + (":" if count == 1 else f" for {count} reasons:")
        super().__init__("\n".join([head, *(f"  {number}. {v}" for number, v in enumerate(self.violations, 1))]))


def unknown_name(kind: str, found: str, known: Iterable[str]) -> Violation:
    """A name that nothing goes by, with the nearest one that exists and the whole list."""
    names = sorted(known)
    nearest = difflib.get_close_matches(found.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
    return Violation(f"unknown {kind}", f"'{found}'", f"{hint}Known: {', '.join(names)}.")
