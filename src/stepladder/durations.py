"""Durations for people."""

from __future__ import annotations

SECONDS_PER_UNIT = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float | None) -> str:
    """A duration in its two largest units: '3 h 12 min'."""
    if seconds is None:
        return "-"
    parts: list[str] = []
    rest = int(seconds)
    for unit, size in SECONDS_PER_UNIT:
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
