"""Settings of a node's system: what is set now, and what is set when it starts, as one thing.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAD = "# Written by stepladder; a rerun writes it again.\n"
LIMIT_NAMES = {"memlock": "MEMLOCK", "nofile": "NOFILE", "stack": "STACK"}  # limits.conf(5), systemd-system.conf(5)
# Pages come back from a disk at tens of MB/s; half an hour is for some 64 GB.
SWAPOFF_SECONDS = 1800
SWAP_MARK = "# off by stepladder: "


@dataclass(frozen=True)
class Wanted:
    """What shall be set.

    Args:
        name: what the files are called after.
        sysctl: value by name. reasons: why, by name of a setting; it goes into the files.
        sysfs: value by path below /sys, with the shell's wild cards.
        limits: of what a user or service may hold, by name of limits.conf: a number or `unlimited`.
        swap_off: whether swap is switched off.
    """

    name: str
    sysctl: Mapping[str, str] = field(default_factory=dict)
    sysfs: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    swap_off: bool = False


@dataclass
class Plan:
    """What is to be done: files by path, values by path, and what cannot be had here with why."""

    files: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    swap: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)

    def actions(self) -> list[str]:
        """In words."""
        done = [f"write {path}" for path in self.files]
        done += [f"set {path} to {value}" for path, value in self.values.items()]
        return done + [f"switch off swap on {device}" for device in self.swap]


# ---- pure ------------------------------------------------------------------------------------------------------------


def sysctl_path(name: str) -> str:
    """Where a sysctl lies below /proc/sys; a slash in the name stays a part of it, as in `net.ipv4.conf.eth0/1.x`."""
    return "/".join(part.replace("/", ".") for part in name.split("."))


def same(found: str, wanted: str) -> bool:
    """Whether a value is the wanted one; the kernel parts several with tabs, and marks the chosen one of a list."""
    chosen = re.search(r"\[([^]]+)\]", found)
    return (chosen[1] if chosen else " ".join(found.split())) == " ".join(wanted.split())


def rendered(wanted: Wanted, there: Sequence[str]) -> dict[str, str]:
    """The files that set it when the node starts; empty text for one that is not needed.

    Args:
        wanted: what shall be set.
        there: names and paths of `sysctl` and `sysfs` that this kernel knows.
    """
    stem = f"stepladder-{wanted.name}"
    sysctl = "".join(f"{_why(wanted, n)}{n} = {v}\n" for n, v in wanted.sysctl.items() if n in there)
    sysfs = "".join(f"{_why(wanted, p)}w {p} - - - - {v}\n" for p, v in wanted.sysfs.items() if p in there)
    limits = "".join(f"{_why(wanted, n)}*    -  {n}  {v}\nroot -  {n}  {v}\n" for n, v in wanted.limits.items())
    values = {n: "infinity" if v == "unlimited" else v for n, v in wanted.limits.items()}
    services = "".join(f"{_why(wanted, n)}DefaultLimit{LIMIT_NAMES[n]}={v}\n" for n, v in values.items())
    texts = {
        f"/etc/sysctl.d/60-{stem}.conf": sysctl,
        f"/etc/tmpfiles.d/{stem}.conf": sysfs,
        f"/etc/security/limits.d/60-{stem}.conf": limits,
        f"/etc/systemd/system.conf.d/60-{stem}.conf": services and f"[Manager]\n{services}",
    }
    return {path: HEAD + text if text else "" for path, text in texts.items()}


def _why(wanted: Wanted, name: str) -> str:
    return f"# {wanted.reasons[name]}\n" if name in wanted.reasons else ""


def without_swap(fstab: str) -> str:
    """The text of /etc/fstab with every swap left out, as a comment that says so."""
    lines = []
    for line in fstab.splitlines(keepends=True):
        fields = line.split()
        is_swap = len(fields) > 2 and fields[2] == "swap" and not line.lstrip().startswith("#")
        lines.append(f"{SWAP_MARK}{line}" if is_swap else line)
    return "".join(lines)


def parse_swaps(text: str) -> dict[str, int]:
    """Read /proc/swaps: bytes used by device."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return {row[0]: int(row[3]) * 1024 for row in rows if len(row) >= 4}


def problems(wanted: Wanted) -> list[str]:
    """What is wrong with how settings are given."""
    found = [f"limits: '{name}' is unknown; known are {', '.join(LIMIT_NAMES)}" for name in wanted.limits
             if name not in LIMIT_NAMES]  # fmt: skip
    found += [f"limits: {name} is '{value}', which is neither a number nor 'unlimited'" for name, value in
              wanted.limits.items() if not (value == "unlimited" or value.isdigit())]  # fmt: skip
    return found + [f"sysfs: {path} is not below /sys" for path in wanted.sysfs if not path.startswith("/sys/")]


# ---- the node --------------------------------------------------------------------------------------------------------


def look(wanted: Wanted, root: Path = Path("/")) -> Plan:
    """Hold the node against what is wanted. What this kernel does not know is left out, as is what needs no file."""
    plan = Plan()
    there = []
    for name, value in wanted.sysctl.items():
        if _compare(plan, root / "proc/sys" / sysctl_path(name), value):
            there.append(name)
    for pattern, value in wanted.sysfs.items():
        known = [path for path in sorted(root.glob(pattern.lstrip("/"))) if _compare(plan, path, value)]
        there += [pattern] if known else []
    for path, text in rendered(wanted, there).items():
        found = _text(root / path.lstrip("/"))
        if found != text and (text or found):
            plan.files[path] = text
            plan.before[path] = found
    if wanted.swap_off:
        _look_at_swap(plan, root)
    return plan


def _compare(plan: Plan, path: Path, value: str) -> bool:
    """Note a value that differs; whether the kernel knows the setting."""
    try:
        found = path.read_text()
    except OSError:
        return False
    if not same(found, value):
        plan.values[str(path)] = value
        plan.before[str(path)] = found.strip()
    return True


def _look_at_swap(plan: Plan, root: Path) -> None:
    used = parse_swaps(_text(root / "proc/swaps"))
    fstab = _text(root / "etc/fstab")
    if (changed := without_swap(fstab)) != fstab:
        plan.files["/etc/fstab"] = changed
        plan.before["/etc/fstab"] = fstab
    available = re.search(r"(?m)^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))
    if available and sum(used.values()) > int(available[1]) * 1024:
        plan.unmet.append(
            f"swap: {sum(used.values()) / 1e9:.1f} GB are in use and {int(available[1]) / 1e6:.1f} GB of memory are "
            "free; stop what uses it, then run again"
        )
    else:
        plan.swap = sorted(used)


def apply(plan: Plan, root: Path = Path("/")) -> None:
    """Carry a plan out; what the kernel refuses is added to `unmet` and taken out of the rest.

    Raises:
        OSError: a file cannot be written.
    """
    for path, text in plan.files.items():
        _write(root / path.lstrip("/"), text)
    if any("systemd/system.conf.d" in path for path in plan.files) and shutil.which("systemctl"):
        # New defaults hold for services that start from now on; nothing that runs is restarted. Before all that takes
        # long: a rerun after an interruption finds the files equal.
        subprocess.run(["systemctl", "daemon-reexec"], capture_output=True, check=False)
    for path, value in list(plan.values.items()):
        try:
            Path(path).write_text(value)
        except OSError as error:
            plan.unmet.append(f"{path} stays {plan.before[path]}, {value} is refused: {error.strerror}")
            del plan.values[path]
    for device in list(plan.swap):
        if fault := _swapoff(device):
            plan.unmet.append(f"swap on {device} stays: {fault}")
            plan.swap.remove(device)


def _swapoff(device: str) -> str:
    """Switch swap off; what kept it on, empty for nothing."""
    try:
        argv = ["swapoff", device]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SWAPOFF_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (
            f"it was read back into memory for {SWAPOFF_SECONDS} s, which was not enough; stop what uses memory "
            "(free -h), or restart the node, which comes up without it, then run again"
        )
    return done.stderr.strip() or f"swapoff ended with {done.returncode}" if done.returncode else ""


def _write(path: Path, text: str) -> None:
    if not text:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.stepladder")
    fresh.write_text(text)
    fresh.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
    fresh.replace(path)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def refused(plan: Plan) -> list[str]:
    """What this kernel will refuse, as far as can be told without trying: files that even root cannot write."""
    return [
        f"{path} stays {plan.before[path]}, {value} is refused here"
        for path, value in plan.values.items()
        if not os.access(path, os.W_OK) or os.statvfs(path).f_flag & os.ST_RDONLY
    ]


def as_result(plan: Plan) -> dict[str, Any]:
    """The module's answer."""
    shown = {**plan.files, **plan.values}
    before = {**dict.fromkeys(shown, ""), **{path: plan.before.get(path, "") for path in shown}}
    return {
        "changed": bool(plan.actions()),
        "actions": plan.actions(),
        "unmet": plan.unmet,
        "diff": {
            "before": "".join(f"{path}: {text}\n" for path, text in before.items()),
            "after": "".join(f"{path}: {text}\n" for path, text in shown.items()),
        },
    }
