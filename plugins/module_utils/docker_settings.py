"""Docker's settings on a node: ours beside those that others made, and how they come into force.

The first half is pure, the second half reads and writes the machine. Python 3.9 and the standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Taken over by a running daemon on SIGHUP. Source: moby, daemon/reload.go. `features` is not among them: devices by CDI
# are looked for at the start alone. Nor is `log-level`: Docker 20.10 neither takes it over nor judges it on SIGHUP.
LIVE = frozenset(
    ("debug", "insecure-registries", "labels", "live-restore", "max-concurrent-downloads", "max-concurrent-uploads",
     "max-download-attempts", "registry-mirrors", "shutdown-timeout")
)  # fmt: skip
# A daemon that comes back with another one of these knows nothing of the containers that still run.
FORGETS = frozenset(("data-root", "exec-root", "storage-driver", "features.containerd-snapshotter"))
NONE, RELOAD, RESTART = "none", "reload", "restart"
ANSWER_SECONDS = 90.0
# Docker 20.10 took 10 ms.
RELOAD_SECONDS = 15.0


class SettingsError(Exception):
    """Why the settings cannot be made: all findings, one a line."""


@dataclass(frozen=True)
class Merged:
    """The settings as they are to be, the top-level keys that change, and what cannot be brought together."""

    settings: dict[str, Any]
    changed: tuple[str, ...]
    conflicts: tuple[str, ...]


def merge(current: Mapping[str, Any], wanted: Mapping[str, Any], earlier: Mapping[str, Any]) -> Merged:
    """Put our settings beside those that are there.

    A list gets what it lacks. A value of somebody else's that differs is a conflict; one that we set earlier gives way,
    and goes when it is wanted no more.

    Args:
        current: what daemon.json holds.
        wanted: what we want in it.
        earlier: what we set there before.
    """
    conflicts: list[str] = []
    settings = _merged(current, wanted, earlier, "", conflicts)
    changed = tuple(sorted(key for key in {*current, *settings} if current.get(key) != settings.get(key)))
    return Merged(settings, changed, tuple(conflicts))


def _merged(
    current: Mapping[str, Any], wanted: Mapping[str, Any], earlier: Mapping[str, Any], place: str, conflicts: list[str]
) -> dict[str, Any]:
    result = dict(current)
    for key in {**earlier, **wanted}:
        here, want, before = current.get(key), wanted.get(key), earlier.get(key)
        value = _value(here, want, before, f"{place}{key}", conflicts)
        if value is None or (value in ({}, []) and here is None):
            result.pop(key, None)
        else:
            result[key] = value
    return result


def _value(here: Any, want: Any, before: Any, place: str, conflicts: list[str]) -> Any:
    """What one key is to hold; none for nothing."""
    if isinstance(want or before, Mapping) and isinstance(here, (Mapping, type(None))):
        return _merged(here or {}, want or {}, before or {}, f"{place}.", conflicts) or None
    if isinstance(want or before, list) and isinstance(here, (list, type(None))):
        kept = [item for item in here or [] if item in (want or []) or item not in (before or [])]
        return kept + [item for item in want or [] if item not in kept] or None
    if want is None:
        return None if here == before else here
    if here is None or here in (want, before):
        return want
    conflicts.append(
        f"{place} is {json.dumps(here)} in daemon.json and {json.dumps(want)} is wanted: take it out there, or set the "
        "variable of container_runtime to what it is"
    )
    return here


def how(changed: Sequence[str], unit_changed: bool) -> str:
    """How changes come into force."""
    if unit_changed or not set(changed) <= LIVE:
        return RESTART
    return RELOAD if changed else NONE


def obstacle(changed: Sequence[str], running: Sequence[str], live_restore: bool, allowed: bool) -> str:
    """Why Docker may not be started anew; empty where it may.

    Args:
        changed: keys of daemon.json that change.
        running: names of containers that run.
        live_restore: whether containers outlive the daemon.
        allowed: whether the operator allows that they end.
    """
    if not running or allowed:
        return ""
    named = ", ".join(running)
    if forgets := sorted(set(changed) & FORGETS):
        return (
            f"{', '.join(forgets)} changes, and Docker would lose sight of {named}. Stop them (verb 'stop'), or set "
            "container_runtime_restart_allowed to true: they end."
        )
    if not live_restore:
        return (
            f"Docker has to be started anew ({', '.join(changed) or 'its unit'} changed), which would end {named}. "
            "Stop them (verb 'stop'), or set container_runtime_live_restore or container_runtime_restart_allowed to "
            "true."
        )
    return ""


def drop_in(limits: Mapping[str, str], environment_file: str) -> str:
    """What is added to docker.service: limits that containers may be given, and the file that names proxies."""
    lines = ["# Made by stepladder.", "[Service]", *(f"Limit{name}={value}" for name, value in sorted(limits.items()))]
    lines += [f"EnvironmentFile={environment_file}"] if environment_file else []
    return "\n".join(lines) + "\n"


def proxy_file(proxies: Mapping[str, str]) -> str:
    """Proxies as an environment file of systemd's; in both spellings, since programs differ."""
    lines = []
    for name, value in sorted(proxies.items()):
        quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        lines += [f"{name.upper()}={quoted}", f"{name.lower()}={quoted}"]
    return "".join(f"{line}\n" for line in lines)


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file as it is to be; `content` none for one that is not to be there."""

    path: Path
    content: str | None
    mode: int

    @property
    def found(self) -> str | None:
        """What it holds now."""
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def differs(self) -> bool:
        """Whether it is not as it is to be."""
        return self.found != self.content or (
            self.content is not None and self.path.stat().st_mode & 0o777 != self.mode
        )

    def write(self) -> None:
        """Make it so, by rename."""
        if self.content is None:
            self.path.unlink(missing_ok=True)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(self.content)
                os.fchmod(stream.fileno(), self.mode)
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(self.path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            # Of a full file system Python names no file.
            raise OSError(error.errno, error.strerror, str(self.path)) from error


@dataclass(frozen=True)
class Pending:
    """What was written and is not in force yet. Kept as a file, so that a rerun goes on after whoever was interrupted.

    Args:
        changed: keys of daemon.json that changed.
        unit: whether docker.service did.
        former: files as they were before, for the way back.
    """

    changed: tuple[str, ...] = ()
    unit: bool = False
    former: tuple[File, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Pending:
        """What an interrupted run left; nothing where there is no file.

        Raises:
            SettingsError: it is no JSON object.
        """
        found = read_settings(path)
        former = tuple(File(Path(name), text, mode) for name, text, mode in found.get("former", []))
        return cls(tuple(found.get("changed", [])), found.get("unit", False), former)

    def joined(self, later: Pending) -> Pending:
        """With what is to be written now; of a file that is in both, the older state is the way back."""
        older = {file.path for file in self.former}
        former = self.former + tuple(file for file in later.former if file.path not in older)
        return Pending(tuple(sorted({*self.changed, *later.changed})), self.unit or later.unit, former)

    def text(self) -> str:
        """As it is kept."""
        former = [[str(file.path), file.content, file.mode] for file in self.former]
        return json.dumps({"changed": self.changed, "unit": self.unit, "former": former}) + "\n"


def read_settings(path: Path) -> dict[str, Any]:
    """What a file of settings holds; empty where there is none.

    Raises:
        SettingsError: it is no JSON object.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON: {error}. Mend it, then run again.") from error
    if not isinstance(found, dict):
        raise SettingsError(
            f"{path} holds a {type(found).__name__}, and Docker wants an object. Mend it, then run again."
        )
    return found


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings as they are written."""
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    """Call systemctl."""
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=300, check=False)


def docker_words(*words: str) -> list[str]:
    """Lines that docker prints; none where it does not answer."""
    try:
        done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def running_containers() -> list[str]:
    """Names of the containers that run."""
    return sorted(docker_words("ps", "--format", "{{.Names}}"))


def outlives() -> bool:
    """Whether containers outlive the daemon as it runs now."""
    return docker_words("info", "--format", "{{.LiveRestoreEnabled}}") == ["true"]


def moved_store(changed: Sequence[str], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The key that has Docker keep images in another store than the one that it runs with; none where it keeps that.

    Args:
        changed: keys of daemon.json that change.
        settings: as they are to be.
    """
    wanted = (settings.get("features") or {}).get("containerd-snapshotter")
    if "features" not in changed or wanted is None:
        return ()
    here = any("io.containerd.snapshotter" in line for line in docker_words("info", "--format", "{{.DriverStatus}}"))
    return () if here == wanted else ("features.containerd-snapshotter",)


def answers() -> bool:
    """Whether Docker answers."""
    return bool(docker_words("version", "--format", "{{.Server.Version}}"))


def wait_answer(report: Callable[[str], object]) -> bool:
    """Wait until Docker answers; false where it does not in time."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while not answers():
        if time.monotonic() > deadline:
            return False
        report("waiting for Docker to answer")
        time.sleep(0.5)
    return True


def enforce(
    files: Sequence[File],
    due: Pending,
    pending: Path,
    steps: Sequence[Callable[[Sequence[File], Callable[[str], object]], None]],
    report: Callable[[str], object],
) -> None:
    """Write files and bring them into force; until that is done, a file says what is due.

    Args:
        files: to be written.
        due: what they change, with what an interrupted run left.
        pending: the file that says it.
        steps: `reload` and `restart`, those that it takes.
        report: takes a line of progress.

    Raises:
        SettingsError: Docker refused the settings, and has the former files again.
    """
    for file in [File(pending, due.text(), 0o400), *files]:
        file.write()
    try:
        for step in steps:
            step(due.former, report)
    except SettingsError:
        pending.unlink()
        raise
    pending.unlink()


def reload(former: Sequence[File], report: Callable[[str], object]) -> None:
    """Let a running Docker read its settings anew; where it refuses them, it goes on with the files that it had.

    systemctl only sends a signal. That it took the settings over Docker tells by an event, whatever its log level
    (moby, daemon/reload.go).

    Args:
        former: the files as they were.

    Raises:
        SettingsError: it refused the new ones.
    """
    report("letting Docker read its settings anew")
    began, deadline = time.time(), time.monotonic() + RELOAD_SECONDS
    done = systemctl("reload", "docker.service")
    while done.returncode == 0 and time.monotonic() < deadline:
        since = ("--since", f"{began:.3f}", "--until", f"{time.time():.3f}")
        if docker_words("events", *since, "--filter", "type=daemon", "--filter", "event=reload"):
            return
        time.sleep(0.2)
    log = done.stderr.strip() if done.returncode else _log("--since", f"@{int(began)}")
    _put_back(former)
    systemctl("reload", "docker.service")
    raise SettingsError(
        f"Docker did not take over the new settings within {RELOAD_SECONDS:.0f} s, and goes on with the files that it "
        f"had. Its log says:\n{log}"
    )


def restart(former: Sequence[File], report: Callable[[str], object]) -> None:
    """Start Docker anew; where it does not come back, with the files that it had before.

    Args:
        former: the files as they were.

    Raises:
        SettingsError: it did not start with the new files.
    """
    report("starting Docker anew")
    systemctl("daemon-reload")
    systemctl("reset-failed", "docker.service")
    done = systemctl("restart", "docker.service")
    if done.returncode == 0 and wait_answer(report):
        return
    log = _log()
    _put_back(former)
    systemctl("daemon-reload")
    systemctl("reset-failed", "docker.service")
    back = systemctl("restart", "docker.service").returncode == 0 and wait_answer(report)
    state = "runs again with the files that it had" if back else "does not run with the files that it had either"
    raise SettingsError(f"Docker did not start with the new settings and {state}. Its log says:\n{log}")


def _log(*since: str) -> str:
    """The last lines of Docker's log."""
    argv = ["journalctl", "-u", "docker.service", *since, "-n", "12", "--no-pager", "-o", "cat"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


def _put_back(former: Sequence[File]) -> None:
    for file in former:
        file.write()
