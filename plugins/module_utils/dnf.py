"""dnf and rpm on a node: asked and driven. Tested with the real dnf on Debian, never on Red Hat's own systems.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ansible_collections.stepladder.core.plugins.module_utils import apt, package_plan, pip_config
from ansible_collections.stepladder.core.plugins.module_utils.apt import PackagesError
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Foreseen, Package, Spec

RPM_FORMAT = "%{NAME}\\t%{VERSION}-%{RELEASE}\\n"
VERSIONLOCK = "python3-dnf-plugin-versionlock"
# A lock hides every other version, so that dnf only knows of no such package; what it would do is asked without.
PAST_LOCKS = "--disableplugin=versionlock"

LOCKED = 200
# Lists of repositories are fetched on the way to an answer.
ASK_SECONDS = 900.0
Answer = TypeVar("Answer")


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
    """Read the table that `dnf --assumeno` prints: ` name  arch  version  repository  size` under headings.

    A word that is longer than its column ends its line, and the row goes on, indented, in the next one (dnf 4.14,
    `dnf/cli/output.py`, fmtColumns): so it is with names of 23 letters.
    """
    installs: dict[str, str] = {}
    removes: list[str] = []
    heading = ""
    for line in re.sub(r"\n {2,}(?=\S)(?!replacing )", "  ", text).splitlines():
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
        lock_seconds: how long to wait for another dnf.
    """

    def __init__(self, report: Callable[[str], object], lock_seconds: float) -> None:
        self._report = report
        self._lock_seconds = lock_seconds
        self._environ = {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": ""}  # its tables are read, in English

    def installed(self) -> dict[str, Package]:
        """All packages that are there."""
        return parse_rpm(self._ask(["rpm", "-qa", "--qf", RPM_FORMAT]))

    def installed_at(self, name: str) -> float:
        """When a package that is there was installed last, in seconds since 1970."""
        answer = self._ask(["rpm", "-q", "--qf", "%{INSTALLTIME}\\n", name])
        return max(float(time_s) for time_s in answer.split())

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
            raise PackagesError(_failure("install", (done.stdout + done.stderr).splitlines()))
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
        """Run a question of dnf's or rpm's to its end.

        Raises:
            PackagesError: it did not end, or a lock was held until the deadline.
        """

        def once() -> tuple[subprocess.CompletedProcess[str], int, str]:
            try:
                done = subprocess.run(
                    at_once(argv), env=self._environ, capture_output=True, text=True, check=False, timeout=ASK_SECONDS
                )
            except subprocess.TimeoutExpired as error:
                text = f"`{' '.join(argv)}` gave no answer within {ASK_SECONDS:.0f} s and was ended. Does a repository "
                raise PackagesError(f"{text}hang (dnf -v makecache)?") from error
            return done, done.returncode, done.stdout + done.stderr

        return self._unlocked(once)

    def _do(self, step: str, argv: list[str]) -> None:
        def once() -> tuple[list[str], int, str]:
            status, tail = apt.run_limited(step, at_once(argv), self._environ, self._report)
            if status and not locked_by(status, "\n".join(tail)):
                raise PackagesError(_failure(step, tail))
            return tail, status, "\n".join(tail)

        self._unlocked(once)

    def _unlocked(self, once: Callable[[], tuple[Answer, int, str]], poll_s: float = 1.0) -> Answer:
        """What dnf answers once no other dnf has a lock: it is told to end at one, as its own wait has no end.

        Args:
            once: asks it; gives the answer, dnf's status, and what it printed.
            poll_s: how often to ask, in seconds.

        Raises:
            PackagesError: a lock was held until the deadline; it names the holder.
        """
        deadline = time.monotonic() + self._lock_seconds
        while True:
            answer, status, text = once()
            holder = locked_by(status, text)
            if not holder:
                return answer
            if time.monotonic() >= deadline:
                raise PackagesError(
                    f"dnf's lock was held for {self._lock_seconds:.0f} s by {apt.holder_text(holder)}. Let it finish, "
                    "or end it (systemctl stop dnf-automatic.timer dnf-makecache.timer), then run again"
                )
            self._report(f"waiting for {apt.holder_text(holder)}, which holds dnf's lock")
            time.sleep(poll_s)


def at_once(argv: Sequence[str]) -> list[str]:
    """A command of dnf's that ends at a lock instead of waiting for it; one of rpm's as it is."""
    return ["dnf", "--setopt=exit_on_lock=True", *argv[1:]] if argv[0] == "dnf" else list(argv)


def locked_by(status: int, text: str) -> int:
    """The process that holds the lock that dnf ended at (`dnf/cli/main.py`: status 200); 0 for none."""
    found = re.search(r"already locked by (\d+)", text) if status == LOCKED else None
    return int(found[1]) if found else 0


def _failure(step: str, said: Sequence[str]) -> str:
    """dnf's last lines, and what to do: the cause may stand before them, where a conflict has many lines."""
    lines = "\n".join(f"  {pip_config.redact(line)}" for line in said[-12:])
    return f"Failed to {step}. The last lines:\n{lines}\n{package_plan.dnf_advice(said)}"


def is_there() -> bool:
    """Whether the node has dnf."""
    return shutil.which("dnf") is not None
