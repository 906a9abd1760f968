"""What of a release differs on its node from what is wanted, each with its reason: one look, nothing is changed.

The same look is the drift report, the reason for what a deploy is about to do, and the proof that it has nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import (
    deployments,
    engine_image,
    engine_state,
    lease,
    release,
    release_images,
    weights_manifest,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, split_patterns

SYSTEMD_UNITS = "/etc/systemd/system"
FILES_NAMED = 5


def manager_used(wanted: str) -> str:
    """systemd or supervisor, by the rule of the role `service`: systemd where it runs and the look is root's."""
    if wanted != "auto":
        return wanted
    return "systemd" if Path("/run/systemd/system").is_dir() and os.geteuid() == 0 else "supervisor"


def described_files(manager: str, units: Sequence[str], state_directory: str, deployment: str) -> list[str]:
    """The files that describe a deployment's processes to their manager."""
    if manager == "systemd":
        return [f"{SYSTEMD_UNITS}/{unit}.service" for unit in units]
    return [f"{state_directory}/supervisor/conf.d/{deployment}.conf"]


def digest(path: str) -> str:
    """SHA-256 of a file; empty where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def release_reasons(path: str, wanted: release.Wanted, keep: int) -> list[str]:
    """How the release differs: another one is current, or its own files were changed."""
    found = release.observe(path, wanted)
    if found.current != wanted.plan_id:
        return [f"release: {found.current or 'none'} is current, {wanted.plan_id} is wanted"]
    if not found.intact:
        names = ", ".join(changed_files(Path(path, "releases", wanted.plan_id), wanted))
        return [f"release: files differ from what they are made of: {names or 'their permissions'}"]
    return [f"release: {step}" for step in release.plan(found, wanted, keep)]


def changed_files(folder: Path, wanted: release.Wanted) -> list[str]:
    """Names of the files of a release whose content is not the wanted one, the first few."""
    names = []
    for file in wanted.files:
        try:
            same = (folder / file.path).read_bytes() == file.content
        except OSError:
            same = False
        if not same:
            names.append(file.path)
    return names[:FILES_NAMED]


def description_reasons(paths: Sequence[str], recorded: Mapping[str, str], described_by: str) -> list[str]:
    """How units differ from those under which the release was proven.

    Args:
        paths: of the files that describe the processes.
        recorded: their SHA-256 when the release was proven, and under `described_by` that of what they are made of.
        described_by: what they are made of now.
    """
    if not recorded:
        return ["units: the release was never proven under this version of the toolkit"]
    reasons = [] if recorded.get("described_by") == described_by else ["units: this version writes them otherwise"]
    for path in paths:
        now = digest(path)
        if not now:
            reasons.append(f"unit {path}: is gone")
        elif now != recorded.get(path):
            reasons.append(f"unit {path}: was changed since the release was proven")
    return reasons


def superfluous_units(deployment: str, paths: Sequence[str], folder: str = SYSTEMD_UNITS) -> list[str]:
    """Units of the deployment that the plan does not have."""
    found = []
    for file in sorted(Path(folder).glob(f"{deployment}-*.service")):
        if str(file) not in paths and f"Description=Stepladder {deployment}: " in _text(file):
            found.append(f"unit {file}: the plan has no such process")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def environment_reasons(node: Mapping[str, Any]) -> list[str]:
    """Environments that are not there or not whole; their contents are in their paths."""
    reasons = []
    for part in ("tools", "venv"):
        if not node.get(part):
            continue
        path = node[part]["path"]
        if not Path(path, ".stepladder.json").is_file():
            reasons.append(f"environment {path}: is not there or not whole")
        elif not os.access(f"{path}/bin/python", os.X_OK):
            reasons.append(f"environment {path}: its Python is gone")
    return reasons


def image_reasons(
    path: str, plan_id: str, processes: Sequence[Mapping[str, Any]], images: release_images.Images
) -> list[str]:
    """Images that the release is made of and the node has not."""
    try:
        return [f"{shown}: is not there" for shown in release_images.lacking(path, plan_id, processes, images)]
    except engine_image.ImageError as error:
        return [str(error)]


def superfluous_containers(path: str, units: Sequence[Mapping[str, Any]], docker: engine_image.Docker) -> list[str]:
    """Containers of the deployment that no process of the plan has."""
    planned = {unit["unit"] for unit in units}
    try:
        found = docker.containers(f"stepladder.deployment={path}")
    except engine_image.ImageError as error:
        return [str(error)]
    return [f"container {name}: the plan has no such process" for name in sorted(found) if name not in planned]


def weights_reasons(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """How the weights are not as wanted, or their files not as they were when their hashes were right.

    Small models are read again in full; of large ones size, time stamp and inode are compared. A full check that was
    asked for is a reason by itself: it takes long, and is done where its progress is shown.

    Args:
        wanted: `weights` of the node's slice.
        given: the module's `include`, `exclude`, `verify` and `full_check_below_bytes`.
    """
    root = Path(wanted["path"])
    request = Request(
        model_id=wanted["model_id"],
        path=str(root),
        revision=wanted["revision"],
        include=split_patterns(given["include"]),
        exclude=split_patterns(given["exclude"]),
        verify=given["verify"],
        full_check_below_bytes=given["full_check_below_bytes"],
    )
    text = weights_manifest.read_or_empty(request.manifest)
    manifest = weights_manifest.parse_manifest(text)
    other = weights_manifest.unusable(manifest, request)
    if manifest is None or other or not weights_manifest.is_marked(request, manifest, text):
        return [f"weights {root}: {other or weights_manifest.INCOMPLETE}"]
    if request.verify == "full":
        return [f"weights {root}: a full check is asked for"]
    files = manifest["files"]
    in_full = weights_manifest.needs_full_check(request, sum(one.size for one in files))
    wrong = []
    for one in files:
        path = root / one.path
        fault = weights_manifest.cheap_check(one, weights_manifest.stat_or_none(path))
        if not fault and in_full and digest(str(path)) != one.sha256:
            fault = "another content"
        if fault:
            wrong.append(f"{one.path} ({fault})")
    more = f" and {len(wrong) - FILES_NAMED} more" if len(wrong) > FILES_NAMED else ""
    return [f"weights {root}: {', '.join(wrong[:FILES_NAMED])}{more}"] if wrong else []


def process_reasons(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Processes that do not run as wanted, or are not ready."""
    reasons = []
    for state in states:
        if state["outdated"]:
            reasons.append(f"{state['name']}: runs another command than wanted")
        elif state["phase"] != "ready":
            reasons.append(f"{state['name']}: {state['phase']}, {state['detail']}")
        elif state["orphans"]:
            reasons.append(f"{state['name']}: an earlier start left {len(state['orphans'])} processes behind")
    return reasons


def members(path: str) -> list[str]:
    """The nodes that the current release names, as far as this one knows; none where there is none to be read."""
    try:
        kept = json.loads(Path(path, "current", "plan.json").read_text())
        ranks = kept["node"].get("ranks") or []
        return sorted({*(each["node"] for each in kept["endpoints"]), *(rank["node"] for rank in ranks)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def unreadable_reasons(path: str) -> list[str]:
    """Why the current release's slice cannot be read, as after an edit by hand: nothing is held against it then."""
    _, fault = deployments.read_slice(Path(path, "current", "plan.json"))
    return [f"release: cannot be read: {fault}"] if fault else []


def look(
    given: Mapping[str, Any], environ: Mapping[str, str], docker: engine_image.Docker | None = None
) -> dict[str, Any]:
    """Everything that differs on this node.

    Args:
        given: the module's parameters.
        environ: for the programs that are asked.
        docker: that has the containers, where the slice has any.
    """
    docker = docker or engine_image.Docker(seconds=engine_image.LOOK_SECONDS)
    place, name, kept = given["state_directory"], given["deployment"], given["slice"]
    path = f"{place}/deployments/{name}"
    manager = manager_used(given["manager"])
    answer: dict[str, Any] = {
        "manager": manager,
        "states": [],
        "reasons": [],
        "weights_complete": False,
        "current": release.current_release(path),
        "members": members(path),
        "last_run": lease.last_run(place),
    }
    if not kept:
        return {**answer, "reasons": unreadable_reasons(path) if answer["current"] else []}
    launcher = given["launchers"].get(manager) or []
    processes = release.as_text(
        [process if process.get("image") else {**process, "launcher": launcher} for process in given["processes"]]
    )
    processes = release_images.with_ids(path, kept["plan_id"], processes, None)
    wanted = release.wanted_release(path, kept["plan_id"], kept, processes)
    units = [{**unit, "wanted_fingerprint": wanted.fingerprints[unit["name"]]} for unit in given["units"]]
    described = described_files(manager, [unit["unit"] for unit in units], place, name)
    recorded = release.read_outcomes(path).get(kept["plan_id"], {}).get("described", {})
    reasons = release_reasons(path, wanted, given["keep"])
    reasons += environment_reasons(kept["node"])
    reasons += image_reasons(path, kept["plan_id"], processes, release_images.Images(docker))
    if kept["node"].get("weights"):
        told = weights_reasons(kept["node"]["weights"], given["weights"])
        answer["weights_complete"] = not told
        reasons += told
    if not reasons:
        reasons += description_reasons(described, recorded, given["described_by"])
        reasons += superfluous_units(name, described) if manager == "systemd" else []
        if any(process.get("image") for process in processes):
            reasons += superfluous_containers(path, units, docker)
    managers = engine_state.read_managers(manager, given["supervisorctl"], [unit["unit"] for unit in units], environ)
    # What is to be replaced anyway is not asked for a token.
    states = engine_state.look(path, managers, units, 3, 3.0, ask_timeout=0 if reasons else given["ask_timeout"])
    return {**answer, "states": states, "reasons": reasons + process_reasons(states)}
