"""dnf and rpm on a node: asked and driven. Tested with the real dnf on Debian, never on Red Hat's own systems.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence

from ansible_collections.stepladder.core.plugins.module_utils import watched
from ansible_collections.stepladder.core.plugins.module_utils.apt import PackagesError
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Foreseen, Package, Spec

RPM_FORMAT = "%{NAME}\\t%{VERSION}-%{RELEASE}\\n"
VERSIONLOCK = "python3-dnf-plugin-versionlock"
# A lock hides every other version, so that dnf only knows of no such package; what it would do is asked without.
PAST_LOCKS = "--disableplugin=versionlock"


def parse_rpm(text: str) -> dict[str, Package]:
    """Read the answer of `rpm -qa --qf RPM_FORMAT`."""
    pairs = (line.split("\t") for line in text.splitlines() if line.count("\t") == 1)
    return {name: Package(version) for name, version in pairs}


def parse_versionlock(text: str) -> dict[str, set[str]]:
    """Locked versions by name; versionlock lists `[epoch:]name-version-release.*` or `name-epoch:version-release.*`."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if entry := re.fullmatch(r"(?:\d+:)?([A-Za-z0-9][\w.+-]*)-(?:\d+:)?(\d[^-]*-[^-]+)\.\*", line.strip()):
            found.setdefault(entry[1], set()).add(entry[2])
    return found


def parse_transaction(text: str) -> Foreseen:
    """Read the table that `dnf --assumeno` prints: ` name  arch  version  repository  size` under headings."""
    installs: dict[str, str] = {}
    removes: list[str] = []
    heading = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            heading = line
        elif found := re.match(r" (\S+)\s+(?:\S+)\s+((?:\d+:)?\d\S*)\s+\S+\s+[\d.]+ ?[kMG]?", line):
            if heading.startswith("Removing"):
                removes.append(found[1])
            else:
                installs[found[1]] = found[2].rpartition(":")[2]
    return Foreseen(installs, removes)


def operands(specs: Sequence[Spec]) -> list[str]:
    """Packages as dnf takes them: `name` or `name-version`."""
    return [spec.name if spec.version == "*" else f"{spec.name}-{spec.version}" for spec in specs]


class Dnf:
    """One node's dnf.

    Args:
        report: takes a line on where it stands.
        lock_seconds: how long to wait for another package manager; dnf itself waits and names the holder.
    """

    def __init__(self, report: Callable[[str], object], lock_seconds: float) -> None:
        self._report = report
        self._lock_seconds = lock_seconds
        self._environ = {**os.environ, "LC_ALL": "C.UTF-8"}

    def installed(self) -> dict[str, Package]:
        """All packages that are there."""
        return parse_rpm(self._ask(["rpm", "-qa", "--qf", RPM_FORMAT]))

    def held(self, installed: Mapping[str, Package]) -> set[str]:
        """Names of the packages that are locked to the version that they have."""
        locked = parse_versionlock(self._ask(["dnf", "-q", "versionlock", "list"]))
        return {name for name, one in installed.items() if one.version in locked.get(name, ())}

    def enabled_modules(self, streams: Sequence[str]) -> list[str]:
        """Those of some module streams (`nvidia-driver:580-open`) that are not enabled yet."""
        listed = self._ask(["dnf", "-q", "module", "list", "--enabled"])
        found = set(re.findall(r"(?m)^(\S+)\s+(\S+) \[", listed))
        return [stream for stream in streams if tuple(stream.split(":", 1)) not in found]

    def enable_modules(self, streams: Sequence[str]) -> None:
        """Take packages from other streams of a module.

        Raises:
            PackagesError: that failed.
        """
        self._do(
            "switch the module stream", ["dnf", "-y", "-q", "module", "reset", *(s.split(":")[0] for s in streams)]
        )
        self._do("switch the module stream", ["dnf", "-y", "-q", "module", "enable", *streams])

    def simulate(self, specs: Sequence[Spec]) -> Foreseen:
        """What installing would do; nothing is changed. Locks are passed over: what they forbid is to be named, too.

        Raises:
            PackagesError: it cannot be done.
        """
        if not specs:
            return Foreseen({})
        argv = ["dnf", PAST_LOCKS, "install", "--assumeno", *operands(specs)]
        done = self._run(argv)
        foreseen = parse_transaction(done.stdout)
        if not foreseen.installs and "Nothing to do" not in done.stdout:  # --assumeno ends with 1 either way
            raise PackagesError(_failure("install", (done.stdout + done.stderr).splitlines()[-12:]))
        return foreseen

    def install(self, specs: Sequence[Spec], allow_change: bool) -> None:
        """Install packages in the versions asked for.

        Args:
            specs: what to install.
            allow_change: whether locks may be passed over.

        Raises:
            PackagesError: that failed.
        """
        self._do("install", ["dnf", "-y", *([PAST_LOCKS] if allow_change else []), "install", *operands(specs)])

    def hold(self, names: Sequence[str]) -> None:
        """Lock packages to the version that they have.

        Raises:
            PackagesError: that failed.
        """
        if self._run(["dnf", "-q", "versionlock", "list"]).returncode:
            self._do("lock versions", ["dnf", "-y", "-q", "install", VERSIONLOCK])
        # A lock on a version that was there before would go on beside the new one, and allow both.
        self._do("lock versions", ["dnf", "-y", "-q", "versionlock", "delete", *names])
        self._do("lock versions", ["dnf", "-y", "-q", "versionlock", "add", *names])

    def _ask(self, argv: list[str]) -> str:
        return self._run(argv).stdout

    def _run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=self._environ, capture_output=True, text=True, check=False)

    def _do(self, step: str, argv: list[str]) -> None:
        argv = ["timeout", f"{self._lock_seconds + 3600:.0f}", *argv]
        status, tail = watched.run(argv, self._environ, on_line=lambda line: self._report(f"{step}: {line}"))
        if status:
            raise PackagesError(_failure(step, tail[-12:]))


def _failure(step: str, tail: Sequence[str]) -> str:
    return f"Failed to {step}. The last lines:\n" + "\n".join(f"  {line}" for line in tail)


def is_there() -> bool:
    """Whether the node has dnf."""
    return shutil.which("dnf") is not None
