"""A vendor's package repository with the site's mirror in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stepladder.environment import node_helper
from stepladder.errors import Violation, unknown_name

# As `stepladder.core.system_packages` takes a repository; the lists among them.
FIELDS = ("name", "url", "suites", "components", "key", "key_url", "fingerprints", "priority")
LISTS = ("suites", "components", "fingerprints")


def problems(place: str, mirror: Any) -> list[Violation]:
    """What of a mirror would not be taken as it was meant.

    Args:
        place: where it is named. mirror: its fields.
    """
    if not isinstance(mirror, Mapping):
        return [Violation(place, f"{type(mirror).__name__}, no mapping", "Give it fields: url: http://MIRROR/...")]
    return [unknown_name(f"field of {place}", name, FIELDS) for name in mirror if name not in FIELDS]


def mirrored(
    known: Mapping[str, Any], mirror: Mapping[str, Any], words: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A repository as `stepladder.core.system_packages` takes it; what the mirror does not say stays the vendor's.

    A password or a user in an address is hidden, so that none is in a fact or a module's parameters; that module
    refuses the address as it refuses one that carries them.

    Args:
        known: the vendor's. mirror: what differs; what is none or empty counts as not said. A `key` of its own takes
            the place of the vendor's `key_url`.
        words: filled in for what stands in braces in addresses, suites and components.
    """
    said = {name: value for name, value in mirror.items() if value not in (None, "")}
    said |= {name: [said[name]] for name in LISTS if isinstance(said.get(name), str)}
    merged = {**known, **said}
    if "key" in said and "key_url" not in said:
        merged.pop("key_url", None)
    if words:
        for name in ("url", "key_url"):
            merged[name] = filled(merged.get(name) or "", words)
        for name in ("suites", "components"):
            merged[name] = [filled(value, words) for value in merged.get(name) or ()]
    hide = node_helper("pip_config").redact
    merged |= {name: hide(merged[name]) for name in ("url", "key_url") if merged.get(name)}
    return {name: value for name, value in merged.items() if value not in (None, "")}


def filled(text: str, words: Mapping[str, str]) -> str:
    """A text with what stands in braces filled in; an unknown word stays, and shows."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)
