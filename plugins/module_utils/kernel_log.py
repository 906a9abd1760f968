"""What the kernel's log says of GPUs: NVIDIA's Xid and SXid, and amdgpu's errors.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ansible_collections.stepladder.core.plugins.module_utils import asking

# After these a GPU is of no use until it was reset or the node restarted: it stopped (46, 109, 110, 158), uncorrected
# memory (48, 64, 95, 140, 156), its firmware (62, 119, 120, 143), NVLink (74, 136, 155), gone from the bus (79).
# Source: NVIDIA, Xid catalog, those whose immediate action is RESET_GPU or RESTART_BM, and the workflows of 48 and 74.
FATAL_XIDS = frozenset((46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158))
# NVLink 5, from B200 on: each line says itself whether it is fatal, `149, NETIR_LINK_EVT Fatal XC0 i0 Link 00 (...)` or
# `145, RLW_RXPIPE Nonfatal ...`. Source: NVIDIA, Xid Errors; lines as gpud's tests have them.
NVLINK5_XIDS = range(144, 151)
NVLINK5_FATAL = re.compile(r"(?<![\w-])Fatal\b")
# What the driver asks for, `GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)`: the last one
# holds. Source: NVIDIA, Xid Errors; open-gpu-kernel-modules, issues of 2026.
RECOVERY_XID = 154
XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:, (.*))?")
SXID = re.compile(r"nvidia-nvswitch\d+: SXid \(PCI:([0-9a-fA-F:.]+)\): (\d+), (Fatal|Non-fatal)(?:, (.*))?")
LOST = re.compile(r"NVRM: (?:The NVIDIA GPU |GPU (?=[0-9a-fA-F]{4,8}:))([0-9a-fA-F:.]+)(.*)")
AMD = re.compile(
    r"amdgpu ([0-9a-fA-F:.]+): .*?((?:uncorrectable hardware error|GPU reset begin|GPU reset end with ret = -)\S*.*)"
)
SHOWN = 120


@dataclass(frozen=True)
class Event:
    """One kind of error of one device: how often, and how it was told last.

    Args:
        kind: `Xid 79`, `SXid 20034`, `off the bus`, `amdgpu`.
        fatal: whether the device is of no use since.
    """

    kind: str
    device: str
    fatal: bool
    text: str
    count: int = 1


def parse(text: str) -> list[Event]:
    """Read the kernel's log, with or without times before the lines; an event for each kind and device."""
    found: dict[tuple[str, str], Event] = {}
    for event in _events(text.splitlines()):
        before = found.get((event.kind, event.device))
        count = before.count + 1 if before else 1
        kept = before is not None and before.fatal and event.kind != f"Xid {RECOVERY_XID}"
        fatal = event.fatal or kept
        found[event.kind, event.device] = Event(event.kind, event.device, fatal, event.text, count)
    return list(found.values())


def _events(lines: Sequence[str]) -> Iterator[Event]:
    for position, line in enumerate(lines):
        if xid := XID.search(line):
            number, said = int(xid[2]), (xid[3] or "").strip()
            yield Event(f"Xid {number}", xid[1], _is_fatal(number, said), said[:SHOWN])
        elif sxid := SXID.search(line):
            yield Event(f"SXid {sxid[2]}", sxid[1], sxid[3] == "Fatal", (sxid[4] or "").strip()[:SHOWN])
        elif lost := LOST.search(line):
            # Newer drivers spread the sentence over several lines.
            if "fallen off the bus" in " ".join(lines[position : position + 3]):
                yield Event("off the bus", lost[1].rstrip(":"), True, "GPU has fallen off the bus")
        elif amd := AMD.search(line):
            yield Event("amdgpu", amd[1], "uncorrectable" in amd[2] or "ret = -" in amd[2], amd[2].strip()[:SHOWN])


def _is_fatal(number: int, said: str) -> bool:
    """Whether the GPU is of no use after a Xid with that text."""
    if number in NVLINK5_XIDS:
        return NVLINK5_FATAL.search(said) is not None
    if number == RECOVERY_XID:
        return not said.endswith("(None)")
    return number in FATAL_XIDS


def read() -> tuple[list[Event], str]:
    """The events since the kernel's start, and why the log could not be read where it could not."""
    text, problem = asking.ask(("dmesg",))
    if problem:
        text, problem_of_journal = asking.ask(("journalctl", "--dmesg", "--boot", "--output=cat", "--quiet"))
        # Without the right to it the journal answers with nothing, not with an error.
        if problem_of_journal or not text.strip():
            return [], problem
    return parse(text), ""
