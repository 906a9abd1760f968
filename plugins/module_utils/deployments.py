"""Which deployments a node has, from the releases that lie on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import engine_image, release_images
from ansible_collections.stepladder.core.plugins.module_utils.release import read_outcomes


def read_deployments(state_directory: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The current slice of each deployment by name, and what could not be read.

    Returns:
        Slices by deployment name, and one sentence for each release that is there but unreadable.

    Raises:
        OSError: where it cannot be seen which releases there are.
    """
    found: dict[str, dict[str, Any]] = {}
    faults = []
    # Not by a pattern for the files: one that is gone or behind a folder that may not be entered would be no release.
    for folder in sorted(Path(state_directory).glob("deployments/*")):
        try:
            (folder / "current").lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        content, fault = read_slice(folder / "current" / "plan.json")
        if fault:
            faults.append(fault)
        else:
            found[folder.name] = content
    return found, faults


def read_releases(
    state_directory: str, deployment: str, docker: release_images.Docker | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every release of one deployment that lies on the node.

    Args:
        state_directory: where the toolkit keeps everything on the node.
        deployment: its name.
        docker: that has the images, where the releases run containers.

    Returns:
        What a person needs to choose one, newest first, and their slices of the plan by plan id.
    """
    root = Path(state_directory, "deployments", deployment)
    outcomes = read_outcomes(str(root))
    images = release_images.Images(docker or engine_image.Docker(seconds=engine_image.LOOK_SECONDS))
    links = {name: _linked(root / name) for name in ("current", "previous")}
    folders = [path for path in root.glob("releases/*/plan.json") if not path.parent.name.startswith(".")]
    told, slices = [], {}
    for path in sorted(folders, key=lambda path: (-path.parent.stat().st_mtime_ns, path.parent.name)):
        plan_id = path.parent.name
        content, fault = read_slice(path)
        outcome = outcomes.get(plan_id, {})
        told.append(
            {
                "plan_id": plan_id,
                "current": plan_id == links["current"],
                "previous": plan_id == links["previous"],
                "written": path.parent.stat().st_mtime,
                "outcome": outcome.get("outcome", "unknown"),
                "reason": outcome.get("reason", ""),
                "since": (root / "current").lstat().st_mtime if plan_id == links["current"] else None,
                "runs": _in_words(content.get("deployment", {})),
                "missing": [fault]
                if fault
                else [*missing(content), *missing_images(str(root), plan_id, content, images)],
            }
        )
        if not fault:
            slices[plan_id] = content
    return told, slices


def read_slice(path: Path) -> tuple[dict[str, Any], str]:
    """A release's slice of the plan from its file, or the file and why it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        return {}, f"{path}: {error.strerror}"
    except ValueError as error:
        return {}, f"{path}: {error}"
    if not isinstance(content, dict):
        return {}, f"{path}: expected a mapping, found {type(content).__name__}"
    return content, ""


def missing(kept: Mapping[str, Any]) -> list[str]:
    """What a release needs on the node and cannot do without the network: its environments and its weights."""
    node = kept.get("node", {})
    needed = [f"{node[part]['path']}/.stepladder.json" for part in ("tools", "venv") if node.get(part)]
    if node.get("weights"):
        needed.append(f"{node['weights']['path']}/.stepladder/manifest.json")
    return [path for path in needed if not Path(path).is_file()]


def missing_images(path: str, plan_id: str, kept: Mapping[str, Any], images: release_images.Images) -> list[str]:
    """Images that a release ran and that the node has no more; why, where Docker does not tell."""
    try:
        lacking: list[str] = release_images.lacking(path, plan_id, kept.get("node", {}).get("processes") or (), images)
    except engine_image.ImageError as error:
        return [f"image that can be run: {error}"]
    return lacking


def _in_words(deployment: Mapping[str, Any]) -> str:
    words = (deployment.get("model"), deployment.get("variant"), deployment.get("engine"))
    return " ".join(str(word) for word in (*words, deployment.get("engine_version")) if word)


def _linked(link: Path) -> str:
    return link.readlink().name if link.is_symlink() else ""
