"""Known failures found in lines of logs, by the signatures of the catalogue."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stepladder.catalogue import Catalogue, Signature

# As in plugins/module_utils/release.py: what each start of a process begins its log with.
START_MARK = "stepladder: starting "
_KERNEL_TIME = "%a %b %d %H:%M:%S %Y"


@dataclass(frozen=True)
class Match:
    """A signature and the line that it knows. number: of the line in its text, from 1."""

    signature: Signature
    line: str
    number: int


@functools.cache
def known() -> tuple[Signature, ...]:
    """The project's own catalogue of them."""
    return Catalogue().signatures


def match(lines: Sequence[str], where: str, signatures: Sequence[Signature] | None = None) -> list[Match]:
    """Every signature that the lines have, the first layer's first, of each the first line.

    Args:
        lines: of one text.
        where: what text it is, as `where` in the catalogue.
        signatures: to look for; unset takes the catalogue's.
    """
    found = []
    for signature in known() if signatures is None else signatures:
        if where in signature.where and (position := signature.find(lines)) is not None:
            found.append(Match(signature, lines[position].strip(), position + 1))
    return found


def match_log(
    lines: Sequence[str], signatures: Sequence[Signature] | None = None, since: str = "", back: bool = True
) -> list[Match]:
    """What the log of a process says of its last start that has any known failure.

    Args:
        lines: of the log, of all starts.
        signatures: to look for; unset takes the catalogue's.
        since: when the release became current, `2026-11-21T01:00:00Z`; earlier starts were another's. Empty for any.
        back: whether earlier starts than the last tell anything, as they do of what is started again and again.

    Returns:
        Matches with numbers of the whole log.
    """
    beginnings = [0, *(position for position, line in enumerate(lines) if line.startswith(START_MARK))]
    starts = list(zip(beginnings, [*beginnings[1:], len(lines)], strict=True))
    mine = [start for start in starts if _started(lines, start[0]) >= since]
    for begin, end in reversed((mine or starts[-1:]) if back else starts[-1:]):
        if found := match(lines[begin:end], "log", signatures):
            return [Match(each.signature, each.line, each.number + begin) for each in found]
    return []


def _started(lines: Sequence[str], begin: int) -> str:
    """When a start was noted; empty where it was not."""
    line = lines[begin] if begin < len(lines) else ""
    return line.rpartition(" at ")[2].strip() if line.startswith(START_MARK) else ""


def match_kernel(lines: Sequence[str], now: str, signatures: Sequence[Signature] | None = None) -> list[Match]:
    """What the kernel's log (`dmesg --ctime`) says that is recent enough to count.

    Args:
        lines: of the log; those without a time count.
        now: the node's time in the same form, `Sat Nov 21 10:00:00 2026`; empty where it is not known.
        signatures: to look for; unset takes the catalogue's.
    """
    moment = _seconds(now)
    found = []
    for signature in known() if signatures is None else signatures:
        recent = [line if _is_recent(line, moment, signature.hours) else "" for line in lines]
        found += match(recent, "kernel", [signature])
    return found


def _is_recent(line: str, now: float | None, hours: int) -> bool:
    at = _seconds(line.partition("[")[2].partition("]")[0])
    return at is None or now is None or now - at <= hours * 3600


def _seconds(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text.strip(), _KERNEL_TIME))
    except ValueError:
        return None


def cure(lines: Sequence[str]) -> str:
    """What mends the first known failure of a log's lines, in a sentence or two; empty where none is known."""
    found = match(lines, "log")
    return f"{found[0].signature.title}. {told_cure(found[0].signature)}" if found else ""


def told_cure(signature: Signature) -> str:
    """A signature's cure with where to read on."""
    return f"{signature.cure.strip()} ({', '.join(signature.references)})"
