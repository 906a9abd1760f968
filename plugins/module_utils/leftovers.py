"""What a node has of environments, images and caches that no release needs any more: who uses it, and its removal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ansible_collections.stepladder.core.plugins.module_utils import engine_image, python_venv
from ansible_collections.stepladder.core.plugins.module_utils.weights_store import process_users, tree_bytes

ENVIRONMENT, IMAGE, CACHE = "environment", "image", "cache"
# Of one engine's build and one GPU each; the others are of releases that had one for all.
CACHES = ("cache/engines/*", "cache/huggingface", "cache/sglang", "cache/vllm")


class LeftoversError(Exception):
    """What cannot be removed and why; nothing was removed then."""


class Images(Protocol):
    """What is asked of Docker."""

    def call(self, method: str, path: str) -> tuple[int, Any]:
        """Status and answer of a call."""

    def remove(self, name: str) -> None:
        """Take a name, and with its last one the image, away."""


@dataclass(frozen=True)
class Leftover:
    """An environment or image that the toolkit brought, or a cache that an engine filled.

    Args:
        kind: environment, image or cache.
        name: path of an environment or a cache; of an image the record that the toolkit keeps of it.
        shown: for people.
        bytes: that it takes.
        used_by: releases and processes, in words.
    """

    kind: str
    name: str
    shown: str
    bytes: int
    used_by: tuple[str, ...]


def find(state_directory: str, docker: Images) -> list[Leftover]:
    """All environments and images that the toolkit brought to the node, and the engines' caches."""
    root = Path(state_directory)
    venvs, caches = _folders(root, "venvs/*"), _folders(root, *CACHES)
    paths = [*venvs, *caches]
    records = sorted(root.glob("images/*.json"))
    users: dict[str, list[str]] = {str(path): [] for path in (*paths, *records)}
    for name, user in release_users(root, [str(path) for path in paths], records):
        users[name].append(user)
    for name, user in process_users([str(path) for path in paths]):
        users[name].append(user)
    used = {name: tuple(sorted(set(by))) for name, by in users.items()}
    found = [Leftover(ENVIRONMENT, str(path), str(path), tree_bytes(path), used[str(path)]) for path in venvs]
    found += [Leftover(CACHE, str(path), f"cache {path}", tree_bytes(path), used[str(path)]) for path in caches]
    for record in records:
        names, size = image_of(record, docker)
        shown = names[0] if names else f"{record.stem} (Docker has it no more)"
        found.append(Leftover(IMAGE, str(record), f"image {shown}", size, used[str(record)]))
    return found


def _folders(root: Path, *patterns: str) -> list[Path]:
    found = (path for pattern in patterns for path in sorted(root.glob(pattern)))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def release_users(root: Path, paths: Sequence[str], records: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Environments, caches and images with the release that names them: the one that runs, and those to go back to.

    Whatever names a path anywhere in its plan uses it: kept too long it costs space, removed too soon a way back.
    """
    for path in sorted(root.glob("deployments/*/releases/*/plan.json")):
        deployment, release = path.parts[-4], path.parts[-2]
        current = path.parents[2] / "current"
        runs = current.exists() and current.resolve() == path.parent.resolve()
        user = f"deployment {deployment} ({'runs' if runs else f'release {release}, to go back to'})"
        text = path.read_text(encoding="utf-8", errors="replace")
        for name in paths:
            if name in text:
                yield name, user
        stems = {engine_image.record_stem(name) for name in _images(text)}
        # A container is made of an image's id, which may have had another name when it was brought.
        scripts = "".join(script.read_text(errors="replace") for script in path.parent.glob("*/run"))
        for record in records:
            identity = str(engine_image.read_record(record).get("id") or "")
            if record.stem in stems or (identity and identity in scripts):
                yield str(record), user


def _images(text: str) -> Iterable[str]:
    try:
        return [str(name) for name in json.loads(text)["node"].get("images") or ()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()


def image_of(record: Path, docker: Images) -> tuple[list[str], int]:
    """Names by which Docker has a recorded image, the recorded one first, and its bytes; none where it has it not."""
    try:
        identity = str(json.loads(record.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], 0
    status, found = docker.call("GET", f"/images/{identity}/json")
    if status != 200 or not isinstance(found, dict):
        return [], 0
    names = [*(found.get("RepoTags") or ()), *(found.get("RepoDigests") or ())]
    names.sort(key=lambda name: engine_image.record_stem(name) not in record.stem)
    return [str(name) for name in names] or [identity], int(found.get("Size") or 0)


def prune(state_directory: str, names: Sequence[str], docker: Images, check_mode: bool = False) -> list[str]:
    """Remove environments, caches and images that nothing uses; returns those removed.

    Args:
        state_directory: where the toolkit keeps everything on a node.
        names: `name` of each.
        docker: the node's.
        check_mode: remove nothing.

    Raises:
        LeftoversError: before anything is removed, with all that are in use or are none of the toolkit's.
    """
    found = {one.name: one for one in find(state_directory, docker)}
    there = [name for name in names if Path(name).exists()]
    faults = [f"{name} is no environment, cache or image of the toolkit's" for name in there if name not in found]
    faults += [
        f"{found[name].shown} is used by {', '.join(found[name].used_by)}"
        for name in there
        if name in found and found[name].used_by
    ]
    if faults:
        raise LeftoversError("\n".join([*faults, "Nothing was removed. Leave these out."]))
    for name in there if not check_mode else ():
        if found[name].kind == ENVIRONMENT:
            python_venv.remove(Path(name))
        elif found[name].kind == CACHE:
            shutil.rmtree(name)
        else:
            # The image stays where others gave it names, too.
            for image in image_of(Path(name), docker)[0][:1]:
                docker.remove(image)
            Path(name).unlink(missing_ok=True)
    return there
