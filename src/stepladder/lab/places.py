"""Where a lab keeps what it makes, and what its parts are called."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stepladder.errors import StepladderError

REPOSITORY = Path(__file__).resolve().parents[3]
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


class LabError(StepladderError):
    """A lab that cannot do what was asked: what was found, and what to run or change."""


@dataclass(frozen=True)
class Places:
    """Folders of all labs of a user.

    Args:
        state: what has to survive until `down`: records, keys, disks, the engine's data.
        cache: what can be made again: root file systems.
        run: sockets and process ids; short, for Linux allows 107 characters for a socket's address.
    """

    state: Path
    cache: Path
    run: Path

    def lab(self, name: str) -> Path:
        """One lab's folder."""
        return self.state / "labs" / name

    def sockets(self, token: str) -> Path:
        """Where SSH's shared connections to one lab lie; a later lab has the same addresses, not the same token."""
        return self.run / token


def places(environ: Mapping[str, str], home: Path) -> Places:
    """The folders, by the XDG base directory specification."""
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "stepladder" / "lab"
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "stepladder" / "lab"
    return Places(state, cache, Path("/run/stepladder-lab") / hashlib.sha256(os.fsencode(state)).hexdigest()[:8])


def default_name(repository: Path) -> str:
    """A lab's name that follows its clone, so that two clones have two labs."""
    word = re.sub(r"[^a-z0-9]+", "-", repository.name.lower()).strip("-")[:20].strip("-") or "clone"
    return f"{word}-{hashlib.sha256(os.fsencode(repository)).hexdigest()[:6]}"


def checked_name(name: str) -> str:
    """The name, if containers, networks and folders can be called so.

    Raises:
        LabError: it has other characters than lower-case letters, digits and dashes, or is too long.
    """
    if not NAME.fullmatch(name):
        raise LabError(
            f"a lab cannot be called '{name}': 1 to 31 lower-case letters, digits and dashes, a dash not first"
        )
    return name


def default_inventory(name: str, repository: Path) -> Path:
    """Where a lab's inventory goes: `inventories/lab` for the clone's own, a folder beside it for another."""
    folder = "lab" if name == default_name(repository) else f"lab-{name}"
    return repository / "inventories" / folder
