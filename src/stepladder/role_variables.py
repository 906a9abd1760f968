"""Variables of roles as an operator writes them: by the names and kinds that the roles' own specifications have."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepladder.errors import Violation, unknown_name

ROLES = Path(__file__).resolve().parents[2] / "roles"
# Roles whose prefix is a word that others begin names with, too: there only what is all but one of theirs is misspelt.
COMMON_WORDS = frozenset({"acceptance", "bootstrap", "host", "notify", "preflight", "verify", "watchdog"})
ALL_BUT_ONE = 0.86


@functools.cache
def known(role: str) -> frozenset[str]:
    """The public variables of a role, by all of its entry points."""
    specs = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    return frozenset(name for entry in specs.values() for name in entry.get("options") or ())


def misspelt(names: Iterable[str], roles: Iterable[str], beside: Collection[str] = ()) -> list[Violation]:
    """Variables that begin like a role's and are none: they would silently leave the default in force.

    Args:
        names: of a node's variables.
        roles: whose they could be.
        beside: names that roles set themselves.
    """
    found = []
    for role in roles:
        own = sorted(name for name in names if name.startswith(f"{role}_") and name not in beside)
        for name in (name for name in own if name not in known(role)):
            if role not in COMMON_WORDS or difflib.get_close_matches(name, known(role), n=1, cutoff=ALL_BUT_ONE):
                found.append(unknown_name("variable", name, known(role)))
    return found


def listed(value: Any) -> list[Any]:
    """A role's variable that is a list, as its validation understands it: text is parted at commas, a number is one.

    `-e name=value` gives text, and what goes over that as over a list gets letters.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence):
        return [str(value)]
    return [item if isinstance(item, Mapping) else str(item) for item in value]
