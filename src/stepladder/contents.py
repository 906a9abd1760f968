"""What goes into a planned environment, read from the catalogue on the controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepladder.catalogue import Catalogue, content_sha256
from stepladder.errors import CatalogueError
from stepladder.planner import CONTAINER_STORE


def folder_mark(folder: str) -> str:
    """A mark of all files in a folder, which changes with any of them.

    Raises:
        CatalogueError: if there are none.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    if not files:
        raise CatalogueError(f"{folder}: there are no files")
    return content_sha256({path.name: path.read_text() for path in files})[:16]


def venv_requirements(venv: Mapping[str, Any], catalogue: str, own_lock: str | None = None) -> str:
    """The text of an environment's locks, one after the other.

    Args:
        venv: the environment in a node's slice of the plan; it has no `lock` where the operator's own is installed.
        catalogue: directory of the catalogue.
        own_lock: file with that one.

    Raises:
        CatalogueError: if a lock is not there.
    """
    known = Catalogue(Path(catalogue))
    first = known.lock_path(venv["lock"]) if venv["lock"] else Path(own_lock or "")
    return "".join(path.read_text() for path in [first, *map(known.lock_path, venv.get("extra_locks", []))])


def known_images(deployment: Mapping[str, Any], catalogue: str) -> list[str]:
    """The images that the catalogue has for a deployment's engine and platform, newest first.

    Args:
        deployment: `deployment` of a node's slice of the plan.
        catalogue: directory of the catalogue.
    """
    engine = Catalogue(Path(catalogue)).engines[deployment["engine"]]
    images = [image for release in engine.releases if release.platform == deployment["platform"]
              for image in release.images.values()]  # fmt: skip
    return list(dict.fromkeys(images))


def image_seekers(variables: Mapping[str, Any], hosts: Sequence[str], image: str) -> list[str]:
    """Of the hosts those that lack an image, in order; the first is the one that it is spread from.

    Args:
        variables: by host; what the role engine_image found there is read.
        hosts: nodes that are deployed to.
        image: its name, as planned.
    """

    return [host for host, seen in _image_seen(variables, hosts, image).items() if seen.get("changed")]


def image_digest(variables: Mapping[str, Any], hosts: Sequence[str], image: str) -> str:
    """The digest by which nodes that lack an image pull it, so that all run the same one; empty where none is known.

    What other nodes have goes before what the registry has under the name now, which may have been moved.

    Args:
        variables: by host; what the role engine_image found there is read.
        hosts: nodes that are deployed to.
        image: its name, as planned.
    """
    seen = _image_seen(variables, hosts, image).values()
    found = [one["digest"] for one in sorted(seen, key=lambda one: bool(one.get("changed"))) if one.get("digest")]
    return next(iter(found), "")


def _image_seen(variables: Mapping[str, Any], hosts: Sequence[str], image: str) -> dict[str, Mapping[str, Any]]:
    """What the role engine_image found, of those of the hosts that are planned to have an image."""

    def plans(host: str) -> bool:
        return image in (variables[host].get("deployment_slice") or {}).get("node", {}).get("images", ())

    return {host: variables[host].get("__engine_image_brought") or {} for host in hosts if plans(host)}


def image_bytes(node_slice: Mapping[str, Any]) -> int:
    """Bytes that the image of a node's slice of the plan takes below Docker's data root."""
    space = node_slice["node"]["requirements"]["space"]
    return int(next(need["minimum_free_bytes"] for need in space if need["path"] == CONTAINER_STORE))


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
