"""What roles ask about plans, units and states; the logic is in `stepladder.show`, `.status` and `.units`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from stepladder import show, status, units
from stepladder.plan import Plan

FORMATS: dict[str, Callable[[Plan], str]] = {
    "human": show.human,
    "json": Plan.to_json,
    "summary": show.summary,
    "example": show.client_example,
}


def plan_text(document: dict[str, Any], form: str = "human") -> str:
    """Render a plan document in one of the formats.

    Raises:
        AnsibleFilterError: for a format that does not exist, naming those that do.
    """
    if form not in FORMATS:
        raise AnsibleFilterError(f"plan_format '{form}' is unknown. Choose one of: {', '.join(FORMATS)}.")
    return FORMATS[form](Plan.from_document(document))


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters."""
        return {
            "plan_text": plan_text,
            "service_units": units.service_units,
            "status_rows": status.rows,
            "status_text": status.text,
            "units_to_restart": units.units_to_restart,
            "used_elsewhere": units.used_elsewhere,
            "watched_units": units.watched_units,
        }
