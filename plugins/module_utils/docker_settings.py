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
# are looked for at the start alone.
LIVE = frozenset(
    ("debug", "insecure-registries", "labels", "live-restore", "log-level", "max-concurrent-downloads",
     "max-concurrent-uploads", "max-download-attempts", "registry-mirrors", "shutdown-timeout")
)  # fmt: skip
# A daemon that comes back with another one of these knows nothing of the containers that still run.
FORGETS = frozenset(("data-root", "exec-root", "storage-driver"))
NONE, RELOAD, RESTART = "none", "reload", "restart"
ANSWER_SECONDS = 90.0


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
        with os.fdopen(descriptor, "w") as stream:
            stream.write(self.content)
            os.fchmod(stream.fileno(), self.mode)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self.path)


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


def restart(files: Sequence[File], before: Mapping[Path, str | None], report: Callable[[str], object]) -> None:
    """Start Docker anew; where it does not come back, with the files that it had before.

    Raises:
        SettingsError: it did not start with the new files.
    """
    report("starting Docker anew")
    systemctl("daemon-reload")
    systemctl("reset-failed", "docker.service")
    done = systemctl("restart", "docker.service")
    if done.returncode == 0 and wait_answer(report):
        return
    log = subprocess.run(
        ["journalctl", "-u", "docker.service", "-n", "12", "--no-pager", "-o", "cat"],
        capture_output=True, text=True, timeout=30, check=False,
    ).stdout.strip()  # fmt: skip
    for file in files:
        File(file.path, before[file.path], file.mode).write()
    systemctl("daemon-reload")
    systemctl("reset-failed", "docker.service")
    back = systemctl("restart", "docker.service").returncode == 0 and wait_answer(report)
    state = "runs again with the files that it had" if back else "does not run with the files that it had either"
    raise SettingsError(f"Docker did not start with the new settings and {state}. Its log says:\n{log}")
