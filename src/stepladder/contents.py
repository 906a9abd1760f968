"""What goes into a planned environment, read from the catalogue on the controller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepladder.catalogue import Catalogue, content_sha256
from stepladder.errors import CatalogueError


def folder_mark(folder: str) -> str:
    """A mark of all files in a folder, which changes with any of them.

    Raises:
        CatalogueError: if there are none.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    if not files:
        raise CatalogueError(f"{folder}: there are no files")
    return content_sha256({path.name: path.read_text() for path in files})[:16]


def venv_requirements(venv: Mapping[str, Any], catalogue: str) -> str:
    """The text of an environment's locks, one after the other.

    Args:
        venv: the environment in a node's slice of the plan.
        catalogue: directory of the catalogue.

    Raises:
        CatalogueError: if a lock is not there.
    """
    locks = [venv["lock"], *venv.get("extra_locks", [])]
    return "".join(Catalogue(Path(catalogue)).lock_path(lock).read_text() for lock in locks)


def venv_stand_ins(venv: Mapping[str, Any], catalogue: str) -> list[dict[str, Any]]:
    """An environment's stand-ins with their files, as `stepladder.core.python_venv` takes them.

    Args:
        venv: the environment in a node's slice of the plan.
        catalogue: directory of the catalogue.

    Raises:
        CatalogueError: if one is not there, or is not what was planned.
    """
    found = []
    for planned in venv.get("stand_ins", []):
        files = Catalogue(Path(catalogue)).stand_in_files(planned["name"])
        if content_sha256(files) != planned["sha256"]:
            place = Path(catalogue) / "stand_ins" / planned["name"]
            raise CatalogueError(f"{place} was changed since the plan was made. Plan again.")
        found.append({"name": planned["name"], "version": planned["version"], "files": files})
    return found
