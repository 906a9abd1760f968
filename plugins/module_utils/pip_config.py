"""pip's own files as uv needs them: uv reads neither pip's configuration nor a lock in parts.

One copy for both sides: modules import it on a node, `stepladder.environment` loads it by its place before any
environment exists. Python 3.9 and the standard library only.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# pip merges its sources in this order; a later one wins (pip's ConfigOptionParser).
_PRECEDENCE = ("global", "install", ":env:")

_TRUE = frozenset({"1", "true", "yes", "on", "y", "t"})

# Where Debian, Ubuntu, Red Hat and SUSE keep the bundle that pip trusts; uv trusts its own unless it is told.
SYSTEM_CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)


class UvSettings(NamedTuple):
    """What makes uv look where pip looks.

    Args:
        environment: variables for uv's process.
        arguments: what uv takes as an argument only.
        notes: what of pip's configuration was left out, and why; without credentials.
    """

    environment: dict[str, str]
    arguments: list[str]
    notes: list[str]


# User and password before a host; behind a colon that begins no port, a password with slashes that nobody has quoted.
_LOGIN = re.compile(r"""://(?:[^/\s'"]*|[^/\s:@'"]*:(?!\d+(?:[/\s'"]|$))[^\s'"]*)@""")


def redact(text: str) -> str:
    """The text with the user and password of every URL hidden."""
    return _LOGIN.sub("://***@", text)


def carries_login(text: str) -> bool:
    """Whether a URL in the text has a password or a user in it; many indexes take a token for a user."""
    return bool(_LOGIN.search(text))


def parse_listing(text: str) -> dict[str, str]:
    """The options in force, from the output of `pip config list`.

    Args:
        text: lines such as `global.index-url='https://...'`; values are Python literals, several entries in one
            value are parted by white space or line ends.

    Returns: option name with dashes, to its value; the environment wins over `install`, that over `global`.
    """
    ranked: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        key, equals, literal = line.strip().partition("=")
        section, dot, option = key.rpartition(".")
        if not equals or not dot or section not in _PRECEDENCE:
            continue
        try:
            value = str(ast.literal_eval(literal))
        except (ValueError, SyntaxError):
            value = literal
        rank = _PRECEDENCE.index(section)
        name = option.lower().replace("_", "-")
        if name not in ranked or rank >= ranked[name][0]:
            ranked[name] = (rank, value)
    return {name: value for name, (_rank, value) in ranked.items()}


def options_from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The options in pip's own variables: `PIP_EXTRA_INDEX_URL` is `extra-index-url`; empty ones do not count."""
    return {
        name[len("PIP_") :].lower().replace("_", "-"): value
        for name, value in environ.items()
        if name.startswith("PIP_") and value.strip()
    }


def uv_settings(  # noqa: PLR0912 - one branch for each of pip's options
    options: Mapping[str, str],
    base: Path,
    home: Path,
    exists: Callable[[str], bool] = os.path.exists,
) -> UvSettings:
    """pip's options as uv's environment and arguments.

    Several indexes are treated as pip treats them, as equals: the best version of any of them. uv's own default
    is the first index that knows the name, against someone who puts a foreign package of the same name elsewhere;
    here the locks carry a hash of every file, which is the stronger guard.

    Args:
        options: name with dashes to value, from `parse_listing` or `options_from_environ`.
        base: directory that relative paths are read from.
        home: directory that `~` stands for.
        exists: whether a path is there (uv stops at a missing find-links folder or certificate, pip goes on).
    """

    def path_of(value: str) -> str:
        expanded = str(home) + value[1:] if value == "~" or value.startswith("~/") else value
        return os.path.normpath(base / expanded)

    def location(value: str, as_url: bool) -> str:
        if "://" in value:
            return value
        if value.startswith("file:"):
            return "file://" + value[len("file:") :]
        path = path_of(value)
        return Path(path).as_uri() if as_url else path

    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    arguments: list[str] = []
    notes: list[str] = []
    if index := options.get("index-url", "").strip():
        environment["UV_DEFAULT_INDEX"] = location(index, as_url=True)
    if extra := options.get("extra-index-url", "").split():
        environment["UV_INDEX"] = " ".join(location(value, as_url=True) for value in extra)

    folders = []
    for value in options.get("find-links", "").split():
        place = location(value, as_url=False)
        local = place[len("file://") :] if place.startswith("file://") else place
        if "://" in local or exists(local):
            folders.append(place)
        else:
            notes.append(f"pip's find-links names {local}, which is not there; it is left out")
    if folders:
        environment["UV_FIND_LINKS"] = ",".join(folders)

    if certificate := options.get("cert", "").strip():
        path = path_of(certificate)
        if exists(path):
            environment["SSL_CERT_FILE"] = path
        else:
            notes.append(f"pip's cert names {path}, which is not there; it is left out")
    elif any(exists(bundle) for bundle in SYSTEM_CERTIFICATES):
        environment["UV_SYSTEM_CERTS"] = "true"
    if client := options.get("client-cert", "").strip():
        environment["SSL_CLIENT_CERT"] = path_of(client)
    if hosts := options.get("trusted-host", "").split():
        environment["UV_INSECURE_HOST"] = " ".join(hosts)
    if proxy := options.get("proxy", "").strip():
        address = proxy if "://" in proxy else f"http://{proxy}"
        environment.update(HTTP_PROXY=address, HTTPS_PROXY=address)
    seconds = (options.get("timeout") or options.get("default-timeout") or "").strip()
    if seconds.replace(".", "", 1).isdigit():
        environment["UV_HTTP_TIMEOUT"] = str(max(1, round(float(seconds))))
    if options.get("no-index", "").strip().lower() in _TRUE:
        arguments.append("--no-index")  # uv has no variable for it
    return UvSettings(environment, arguments, notes)


def merged_environment(environ: Mapping[str, str], settings: UvSettings) -> dict[str, str]:
    """The environment for uv: what the user set for uv stays, what pip is configured with fills the rest."""
    kept = {name for name in settings.environment if environ.get(name)}
    return {**environ, **{name: value for name, value in settings.environment.items() if name not in kept}}


def configured_options(pip: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What pip is configured with; from its variables alone where it cannot be asked.

    Args:
        pip: how pip is called, such as `[python, "-m", "pip"]`.
        environ: the environment to ask it in.
    """
    try:
        answer = subprocess.run(
            [*pip, "config", "list", "--disable-pip-version-check"],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return options_from_environ(environ)
    return parse_listing(answer.stdout) if answer.returncode == 0 else options_from_environ(environ)


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Locked(NamedTuple):
    """One entry of a lock: the name, its version, how many hashes it carries, and its lines."""

    name: str
    version: str
    hashes: int
    text: str


def lock_entries(lock: str) -> list[Locked]:
    """The entries of a requirements lock.

    Args:
        lock: text in pip's requirements format, one `name==version` an entry, hashes on continued lines.

    Raises:
        ValueError: an entry that is not pinned with `==`; options such as an index are refused too.
    """
    entries = []
    for block in re.split(r"(?m)^(?=\S)", re.sub(r"(?m)^\s*#.*\n?", "", lock)):
        if not block.strip():
            continue
        pinned = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?==([^\s;\\]+)", block)
        if pinned is None:
            raise ValueError(f"the lock's entry '{redact(block.splitlines()[0])}' is not of the form name==version")
        entries.append(Locked(normalised(pinned[1]), pinned[2], block.count("--hash="), block.rstrip() + "\n"))
    return entries


def lock_entry(lock: str, name: str) -> str:
    """The lines of one distribution in a lock, ready to be a requirements file of their own.

    Raises:
        ValueError: the lock does not pin that name.
    """
    lines = [entry.text for entry in lock_entries(lock) if entry.name == normalised(name)]
    if not lines:
        raise ValueError(f"the lock does not pin '{name}'")
    return "".join(lines)
