"""Package repositories of a node: which files describe them, and whether their keys are the pinned ones.

Standard library only: this runs on the node, under any Python from 3.9 on. What is pure stands first.
"""

from __future__ import annotations

import http.client
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.stepladder.core.plugins.module_utils import openpgp, pip_config

HEAD = "# Written by stepladder; a rerun writes it again.\n"
APT_KEYS, APT_SOURCES, APT_PINS = "/etc/apt/keyrings", "/etc/apt/sources.list.d", "/etc/apt/preferences.d"
DNF_KEYS, DNF_SOURCES = "/etc/pki/rpm-gpg", "/etc/yum.repos.d"
KEY_SECONDS = 30
LARGEST_KEY = 1 << 20
RELEASE_FORMAT = "$(REPO_URI)\t$(ORIGIN)\t$(LABEL)"
EXACT = 1001  # apt_preferences(5): above 1000 also goes back to an older version


@dataclass(frozen=True)
class Repository:
    """One repository; the fields are those of the module's parameter.

    Args:
        name: lower case, the files are called after it.
        url: where it is; no password in it, these files are read by all.
        suites: of apt, `/` for a flat one. components: of apt, none for a flat one.
        key: the key itself; key_url: where the node fetches it from, one of both.
        fingerprints: of all primary keys that may be in it.
        priority: apt's for all that comes from there, none for apt's own 500; or dnf's, of which the lower goes first.
    """

    name: str
    url: str
    suites: Sequence[str] = ("/",)
    components: Sequence[str] = ()
    key: str = ""
    key_url: str = ""
    fingerprints: Sequence[str] = ()
    priority: int | None = None


@dataclass(frozen=True)
class Release:
    """A repository that apt has lists of: where it is, and what it calls itself; one of both names may be empty."""

    uri: str
    origin: str
    label: str


@dataclass(frozen=True)
class Pin:
    """Versions that packages are kept at: names with apt's wild cards, and a version with them."""

    packages: Sequence[str]
    version: str


def problems(repository: Repository) -> list[str]:
    """What is wrong with how a repository is described."""
    found = []
    place = f"repository {repository.name}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", repository.name):
        found.append(f"{place}: a name is of a-z, 0-9 and '-'")
    if not re.match(r"(https?|file)://?\S+$", repository.url):
        found.append(
            f"{place}: url '{pip_config.redact(repository.url)}' is not of the form https://, http:// or file:/"
        )
    # A user alone is told as well: many registries of packages take a token for one.
    if pip_config.carries_login(repository.url):
        found.append(
            f"{place}: url {pip_config.redact(repository.url)} carries a password or a user, and its file is read by "
            "every user; put them into /etc/apt/auth.conf.d (mode 0600) and leave them out here"
        )
    if pip_config.carries_login(repository.key_url):  # urllib takes it for the port, and would tell it in a traceback
        found.append(
            f"{place}: key_url {pip_config.redact(repository.key_url)} carries a password or a user, with which no key "
            "can be fetched; give the key itself (key)"
        )
    if not repository.fingerprints:
        found.append(f"{place}: no fingerprint of its key is pinned (fingerprints)")
    if bool(repository.key) == bool(repository.key_url):
        found.append(f"{place}: give its key or the key's address (key_url), one of both")
    return found


def key_problem(repository: Repository, key: bytes) -> str:
    """Why a key is not the pinned one, with both fingerprints; empty if it is.

    Every primary key in the file has to be pinned: who can add a key to a file could else sign with it.
    """
    pinned = {openpgp.normalised(each) for each in repository.fingerprints}
    origin = pip_config.redact(repository.key_url) or "the key that was given"
    try:
        found = openpgp.primary_fingerprints(key)
    except openpgp.BadKeyError as error:
        return f"repository {repository.name}: {origin}: {error}"
    strange = [each for each in found if each not in pinned]
    if not strange:
        return ""
    return (
        f"repository {repository.name}: {origin} has the key {', '.join(strange)}, and {', '.join(sorted(pinned))} is "
        "pinned. Nothing was written. If the vendor has changed its key, compare it with the vendor's own page and "
        "change the pinned fingerprint; else the mirror serves another's key"
    )


def apt_files(repository: Repository, key: bytes, keys: str = APT_KEYS, sources: str = APT_SOURCES) -> dict[str, bytes]:
    """The files that make a repository known to apt, by path; its priority has a file of its own.

    Args:
        repository: which.
        key: its key, checked.
        keys, sources: folders.
    """
    stem = f"stepladder-{repository.name}"
    keyring = f"{keys}/{stem}.{'asc' if openpgp.is_armoured(key) else 'gpg'}"
    fields = {
        "Types": "deb",
        "URIs": repository.url,
        "Suites": " ".join(repository.suites),
        "Components": " ".join(repository.components),
        "Signed-By": keyring,
    }
    text = HEAD + "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
    return {keyring: key, f"{sources}/{stem}.sources": text.encode()}


def parse_releases(text: str) -> list[Release]:
    """The repositories that call themselves something, from `apt-get indextargets --format RELEASE_FORMAT`.

    apt leaves the word in the format where there is nothing to fill in: no such field, or no list of that source yet.
    """
    rows = (line.split("\t") for line in re.sub(r"\$\((ORIGIN|LABEL)\)", "", text).splitlines())
    told = (Release(*row) for row in rows if len(row) == len(RELEASE_FORMAT.split("\t")))
    return list(dict.fromkeys(one for one in told if one.origin or one.label))


def apt_priority_file(
    repository: Repository, releases: Sequence[Release], there: bytes | None = None, folder: str = APT_PINS
) -> dict[str, bytes]:
    """The file that has apt ask a repository before others, or after them; none without a priority.

    A pin by host would raise all that the site's mirror serves. So it is by Origin and Label of its own Release file
    (apt_preferences(5)); by host only where it has neither, or another host's has the same.

    Args:
        repository: which.
        releases: that apt has lists of.
        there: the file's content as it is, kept as long as apt knows no name of this repository.
        folder: of the file.
    """
    if repository.priority is None:
        return {}
    path, url = f"{folder}/stepladder-{repository.name}", urlsplit(repository.url)
    own = {(one.origin, one.label) for one in releases if _place(one.uri) == _place(repository.url)}
    if not own and there is not None and f"\nPin-Priority: {repository.priority}\n".encode() in there:
        return {path: there}
    pin = f'origin "{url.hostname or ""}"'
    if len(own) == 1 and _is_plain("".join(*own)):
        ((origin, label),) = own
        elsewhere = [one for one in releases if urlsplit(one.uri).hostname != url.hostname]
        if not [one for one in elsewhere if origin in ("", one.origin) and label in ("", one.label)]:
            pin = "release " + ",".join(f"{key}={value}" for key, value in (("o", origin), ("l", label)) if value)
    return {path: f"{HEAD}Package: *\nPin: {pin}\nPin-Priority: {repository.priority}\n".encode()}


def _place(uri: str) -> str:
    """A URI as apt tells it, or as it was written, in one form."""
    return re.sub("^file:/+", "file:/", uri).rstrip("/")


def _is_plain(text: str) -> bool:
    """Whether a name means itself in a pin, where wild cards, expressions and lists have signs of their own."""
    return bool(text) and not re.search(r"[$,/*?\[\]\\]", text)


def apt_pin_file(name: str, pins: Sequence[Pin], folder: str = APT_PINS) -> dict[str, bytes]:
    """The file that keeps packages at a version; none for no pins."""
    stanzas = [
        f"Package: {' '.join(pin.packages)}\nPin: version {pin.version}\nPin-Priority: {EXACT}\n" for pin in pins
    ]
    return {f"{folder}/stepladder-{name}-version": (HEAD + "\n".join(stanzas)).encode()} if stanzas else {}


def dnf_files(repository: Repository, key: bytes, keys: str = DNF_KEYS, sources: str = DNF_SOURCES) -> dict[str, bytes]:
    """The files that make a repository known to dnf, by path."""
    keyring = f"{keys}/RPM-GPG-KEY-stepladder-{repository.name}"
    options = {
        "name": f"{repository.name} (stepladder)",
        "baseurl": repository.url,
        "enabled": "1",
        "gpgcheck": "1",
        "gpgkey": f"file://{keyring}",
        "priority": "" if repository.priority is None else str(repository.priority),
    }
    text = f"{HEAD}[stepladder-{repository.name}]\n" + "".join(f"{n}={v}\n" for n, v in options.items() if v)
    return {keyring: key, f"{sources}/stepladder-{repository.name}.repo": text.encode()}


def parsed(repositories: Sequence[Mapping[str, Any]]) -> list[Repository]:
    """Repositories from the module's parameter, whose unset keys are none."""
    return [Repository(**{name: value for name, value in each.items() if value is not None}) for each in repositories]


# ---- the node --------------------------------------------------------------------------------------------------------


class KeyFetchError(Exception):
    """A key could not be fetched; the text says from where and why."""


def apt_proxy(url: str) -> str:
    """The proxy that apt would fetch a URL through; empty for none, and where the environment names one.

    Source: apt-transport-http(1), and apt-transport-https(1), whose settings fall back to those of http.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.scheme in urllib.request.getproxies():
        return ""
    try:
        told = subprocess.run(
            ["apt-config", "dump", "--format", "%f %v%n"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    pairs = (line.partition(" ") for line in told.splitlines())
    settings = {name.lower(): value.strip() for name, _, value in pairs}
    for scheme in dict.fromkeys((parts.scheme, "http")):
        for name in (f"acquire::{scheme}::proxy::{parts.hostname}", f"acquire::{scheme}::proxy"):
            if value := settings.get(name, ""):
                return "" if value.upper() == "DIRECT" else value
    return ""


def fetch_key(repository: Repository) -> bytes:
    """A repository's key as it was given, or from where it is.

    Raises:
        KeyFetchError: it cannot be had.
    """
    if repository.key:
        return repository.key.encode()
    where = pip_config.redact(repository.key_url)
    try:
        proxy = apt_proxy(repository.key_url)
        given = [urllib.request.ProxyHandler({urlsplit(repository.key_url).scheme: proxy})] if proxy else []
        with urllib.request.build_opener(*given).open(repository.key_url, timeout=KEY_SECONDS) as answer:
            content: bytes = answer.read(LARGEST_KEY + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = pip_config.redact(str(getattr(error, "reason", error)))
        raise KeyFetchError(
            f"repository {repository.name}: its key cannot be fetched from {where}: {reason}. Can the node reach it? "
            "Behind a mirror, set the repository's URL and its key's to the mirror's; a proxy is taken from apt's "
            "settings or https_proxy"
        ) from error
    if len(content) > LARGEST_KEY:
        raise KeyFetchError(f"repository {repository.name}: {where} is no key, it has over a MiB")
    return content


def key_on_node(repository: Repository) -> bytes | None:
    """The key that an earlier run wrote, if it is the pinned one: a rerun needs no network for it."""
    stem = f"stepladder-{repository.name}"
    paths = [f"{APT_KEYS}/{stem}.asc", f"{APT_KEYS}/{stem}.gpg", f"{DNF_KEYS}/RPM-GPG-KEY-{stem}"]
    for path in paths:
        try:
            key = Path(path).read_bytes()
        except OSError:
            continue
        if not key_problem(repository, key):
            return key
    return None


def checked_keys(repositories: Sequence[Repository]) -> tuple[dict[str, bytes], list[str]]:
    """The keys by the repository's name, and everything that is wrong with any of them."""
    keys, wrong = {}, []
    for repository in repositories:
        found = problems(repository)
        if not found:
            try:
                keys[repository.name] = key_on_node(repository) or fetch_key(repository)
                problem = key_problem(repository, keys[repository.name])
                found = [problem] if problem else []
            except KeyFetchError as error:
                found = [str(error)]
        wrong += found
    return keys, wrong
