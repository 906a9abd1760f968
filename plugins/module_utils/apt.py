"""apt and dpkg on a node: asked and driven, with their locks waited for and named.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ansible_collections.stepladder.core.plugins.module_utils import (
    package_plan,
    package_sources,
    pip_config,
    preflight,
    watched,
)
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Foreseen, Package, Spec

LOCKS = (
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/dpkg/lock",
    "/var/lib/apt/lists/lock",
    "/var/cache/apt/archives/lock",
)
LISTS = "/var/lib/apt/lists"
QUIET = {
    "LC_ALL": "C.UTF-8",
    "LANGUAGE": "",  # it goes before every locale but C: Ubuntu sets it, and what apt says is read here
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_SUSPEND": "1",  # Ubuntu's asks, or restarts what runs
}
KEEP_SETTINGS = ("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold")
STEP_SECONDS = 3600.0  # a kernel's module is built for minutes; an hour is no longer work
FLOCK = "hhqqi"  # struct flock of 64-bit Linux (fcntl(2)): type, whence, start, length, pid


class PackagesError(Exception):
    """Packages could not be made as they are wanted; the text says why and what to do."""


def lock_holder(path: str) -> int:
    """The process that holds a lock file of apt or dpkg; 0 for none."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    finally:
        os.close(descriptor)
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def holder_text(pid: int, proc: Path = Path("/proc")) -> str:
    """A process for a message: its number and its command, without secrets."""
    try:
        raw = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        raw = b""
    command = preflight.command_line([part.decode(errors="replace") for part in raw.split(b"\0") if part])
    return f"process {pid} ({command or 'of another user or container'})"


def wait_for_locks(
    seconds: float, report: Callable[[str], object], locks: Sequence[str] = LOCKS, poll_s: float = 1.0
) -> None:
    """Wait until no other process holds a lock of apt or dpkg.

    Args:
        seconds: how long at most.
        report: takes a line on who is waited for.
        locks: the lock files.
        poll_s: how often to look, in seconds.

    Raises:
        PackagesError: one was still held; it names the holder.
    """
    deadline = time.monotonic() + seconds
    while True:
        holders = {path: pid for path in locks if (pid := lock_holder(path))}
        if not holders:
            return
        path, pid = next(iter(holders.items()))
        if time.monotonic() >= deadline:
            raise PackagesError(
                f"{path} was held for {seconds:.0f} s by {holder_text(pid)}. Let it finish, or end it (unattended "
                "upgrades: systemctl stop unattended-upgrades apt-daily.service apt-daily-upgrade.service), then run "
                "again. Nothing was changed"
            )
        report(f"waiting for {holder_text(pid)}, which holds {path}")
        time.sleep(poll_s)


def newest_descendant(pid: int, proc: Path = Path("/proc")) -> int:
    """The process at the end of the youngest line of children; the process itself where it has none."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            state, _, rest = preflight.read_text(entry / "stat").rpartition(")")[2].strip().partition(" ")
            if state and state != "Z":
                children.setdefault(int(rest.split()[0]), []).append(int(entry.name))
    while pid in children:
        pid = max(children[pid])
    return pid


def run_limited(
    step: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    report: Callable[[str], object],
    seconds: float = STEP_SECONDS,
) -> tuple[int, list[str]]:
    """Run a step of a package manager to its end; `watched.run` with a limit.

    Args:
        step: what it does, for messages.
        argv, environ: the program.
        report: takes a line on where it stands.
        seconds: how long at most.

    Returns: exit status and the last lines.

    Raises:
        PackagesError: it was not done in time and was ended; it names what was at work.
    """  # fmt: skip
    last = ""

    def line(text: str) -> None:
        nonlocal last
        last = pip_config.redact(text)
        report(f"{step}: {last}")

    def tick(spent: float) -> None:
        if spent >= seconds:
            raise PackagesError(
                f"Failed to {step}: not done within {seconds:.0f} s, and ended. At work was "
                f"{holder_text(newest_descendant(os.getpid()))}; the last line: {last}. See "
                "why it hangs (journalctl), then run again: what is half done is finished first"
            )

    status, lines = watched.run(argv, environ, on_line=line, on_tick=tick, tick_s=min(2.0, seconds))
    return status, lines


class Apt:
    """One node's apt.

    Args:
        report: takes a line on where it stands.
        lock_seconds: how long to wait for another package manager.
    """

    def __init__(self, report: Callable[[str], object], lock_seconds: float) -> None:
        self._report = report
        self._lock_seconds = lock_seconds
        self._environ = {**os.environ, **QUIET}

    def installed(self) -> dict[str, Package]:
        """All packages that are there, whole or not."""
        text = self._ask(["dpkg-query", "-W", f"-f={package_plan.DPKG_FORMAT}"])
        found: dict[str, Package] = package_plan.parse_dpkg(text)
        return found

    def held(self) -> set[str]:
        """Names of the packages that are held."""
        return {name.partition(":")[0] for name in self._ask(["apt-mark", "showhold"]).split()}

    def interrupted(self, installed: Mapping[str, Package]) -> bool:
        """Whether an earlier dpkg was ended before it was done."""
        journal = Path("/var/lib/dpkg/updates")
        pending = journal.is_dir() and any(entry.name.isdigit() for entry in journal.iterdir())
        return pending or bool(package_plan.half_done(installed))

    def finish_interrupted(self) -> None:
        """Configure what is only unpacked, and mend dependencies.

        Raises:
            PackagesError: that failed.
        """
        self._do(
            "finish what an earlier dpkg left", ["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"]
        )
        self._do("mend dependencies", ["apt-get", "install", "-y", "-q", "--fix-broken", *KEEP_SETTINGS])

    def update(self, sources: Sequence[str] | None, into: Path | None = None) -> None:
        """Fetch lists of packages.

        Args:
            sources: paths of the sources to ask, none for all of the node's. Others' lists are left as they are: on a
                node without a way out only the mirror answers.
            into: a scratch folder as `scratch` makes it; none for the node's own lists.

        Raises:
            PackagesError: one could not be fetched or is not signed by its key.
        """
        with tempfile.TemporaryDirectory(prefix="stepladder-") as folder:
            options = scratch_options(into) if into else []
            if sources is not None:
                for path in sources:
                    Path(folder, Path(path).name).symlink_to(path)
                options += ["-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={folder}"]
                options += ["-o", "APT::Get::List-Cleanup=0"]
            # Without it apt takes old lists for good where none can be fetched.
            self._do("fetch the lists of packages", ["apt-get", "update", "-q", "--error-on=any", *options], not into)

    def releases(self, into: Path | None = None) -> list[package_sources.Release]:
        """The repositories that there are lists of.

        Args:
            into: a scratch folder; none for the node's own lists.
        """
        options = scratch_options(into) if into else []
        text = self._ask(["apt-get", "indextargets", *options, "--format", package_sources.RELEASE_FORMAT])
        found: list[package_sources.Release] = package_sources.parse_releases(text)
        return found

    def wait(self) -> None:
        """Wait for another package manager.

        Raises:
            PackagesError: it was at work until the deadline; it is named.
        """
        wait_for_locks(self._lock_seconds, self._report)

    def simulate(self, specs: Sequence[Spec], allow_change: bool, into: Path | None = None) -> Foreseen:
        """What installing would do; nothing is changed.

        Args:
            specs: what to install.
            allow_change: whether holds may be passed over.
            into: a scratch folder; none for the node itself.

        Raises:
            PackagesError: it cannot be done.
        """
        if not specs:
            return Foreseen({})
        options = scratch_options(into) if into else []
        argv = ["apt-get", "-s", *install_arguments(self._exact(specs, options), allow_change), *options]
        done = subprocess.run(argv, env=self._environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackagesError(_failure("install", (done.stdout + done.stderr).splitlines()[-12:]))
        return package_plan.parse_simulation(done.stdout)

    def install(self, specs: Sequence[Spec], allow_change: bool) -> None:
        """Install packages in the versions asked for.

        Raises:
            PackagesError: that failed.
        """
        self._do("install", ["apt-get", *install_arguments(self._exact(specs), allow_change), *KEEP_SETTINGS])

    def _exact(self, specs: Sequence[Spec], options: Sequence[str] = ()) -> list[Spec]:
        """The same with the newest version that fits, where apt-get does not understand the wild cards.

        One that no repository has stays as it is, for apt-get to name.
        """
        named = [spec.name for spec in specs if not apt_understands(spec.version)]
        known = parse_madison(self._ask(["apt-cache", *options, "madison", *named])) if named else []
        return [
            next((Spec(*each) for each in known if each[0] == spec.name and spec.matches(*each)), spec)
            if spec.name in named
            else spec
            for spec in specs
        ]

    def hold(self, names: Sequence[str]) -> None:
        """Keep packages as they are until they are let go: `apt-get upgrade` and unattended upgrades leave them out.

        Raises:
            PackagesError: that failed.
        """
        self._do("hold packages", ["apt-mark", "hold", *names])

    def _ask(self, argv: list[str]) -> str:
        return subprocess.run(argv, env=self._environ, capture_output=True, text=True, check=False).stdout

    def _do(self, step: str, argv: list[str], locked: bool = True) -> None:
        for attempt in (1, 2, 3):
            if locked:
                self.wait()
            status, tail = run_limited(step, argv, self._environ, self._report)
            if not status:
                return
            if attempt == 3 or "could not get lock" not in "\n".join(tail).lower():
                raise PackagesError(_failure(step, tail[-12:]))


def apt_understands(version: str) -> bool:
    """Whether apt-get takes a version: it knows one wild card, a star at the end (`apt-pkg/versionmatch.cc`)."""
    return not re.search(r"[*?\[]", version.removesuffix("*"))


def parse_madison(text: str) -> list[tuple[str, str]]:
    """Packages with the versions that repositories have, newest first, of `apt-cache madison`."""
    rows = [[field.strip() for field in line.split("|")] for line in text.splitlines()]
    return [(row[0], row[1]) for row in rows if len(row) > 1]


def install_arguments(specs: Sequence[Spec], allow_change: bool) -> list[str]:
    """What follows `apt-get` to install packages; with a change allowed, dependencies that are held move along."""
    change = ["--ignore-hold", "--allow-change-held-packages", "--allow-downgrades"] if allow_change else []
    return ["install", "-y", "-q", "--no-install-recommends", *change, *map(str, specs)]


def _failure(step: str, tail: Sequence[str]) -> str:
    lines = "\n".join(f"  {pip_config.redact(line)}" for line in tail)
    return f"Failed to {step}. The last lines:\n{lines}\n{package_plan.apt_advice(tail)}"


# ---- a look ahead that leaves the node as it is ----------------------------------------------------------------------


@contextlib.contextmanager
def scratch(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A copy of apt's world with files added, to try them before they are written.

    Args:
        files: content by the path where they will be; paths within them are changed to the copy's.
    """
    with tempfile.TemporaryDirectory(prefix="stepladder-apt-") as name:
        root = Path(name)
        for part in ("sources", "preferences", "keyrings", "lists/partial", "cache/archives/partial"):
            (root / part).mkdir(parents=True)
        _link_all(Path(package_sources.APT_SOURCES), root / "sources")
        _link_all(Path(package_sources.APT_PINS), root / "preferences")
        _link_all(Path(LISTS), root / "lists")
        place(files, root)
        yield root


def place(files: Mapping[str, bytes], root: Path) -> None:
    """Put files into a scratch folder, in place of those that are there.

    Args:
        files: as `scratch` has them.
        root: the folder.
    """
    places = {
        package_sources.APT_SOURCES: root / "sources",
        package_sources.APT_PINS: root / "preferences",
        package_sources.APT_KEYS: root / "keyrings",
    }
    for path, content in files.items():
        target = places[str(Path(path).parent)] / Path(path).name
        target.unlink(missing_ok=True)
        if path.endswith(".sources"):
            keys = package_sources.APT_KEYS.encode()
            content = content.replace(b"Signed-By: " + keys, b"Signed-By: " + str(root / "keyrings").encode())  # noqa: PLW2901
        target.write_bytes(content)


def _link_all(origin: Path, target: Path) -> None:
    for entry in origin.iterdir() if origin.is_dir() else ():
        if entry.is_file() and entry.name != "lock":
            (target / entry.name).symlink_to(entry)


def scratch_options(root: Path) -> list[str]:
    """What makes apt work in a scratch folder."""
    settings = {
        "Dir::Etc::SourceParts": root / "sources",
        "Dir::Etc::PreferencesParts": root / "preferences",
        "Dir::State::Lists": root / "lists",
        "Dir::Cache": root / "cache",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",  # the user _apt cannot write into a folder of root's
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def is_there() -> bool:
    """Whether the node has apt."""
    return shutil.which("apt-get") is not None
