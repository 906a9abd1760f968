"""Which image each container of a release is made of: the one that the release ran, whatever its name means now.

A plan names an image, and a name may be moved. What a release is made of is the image's id; it stands in the release's
own run script, and a release that has none yet is made of the image that the role `engine_image` brought.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ansible_collections.stepladder.core.plugins.module_utils import engine_image

_ID = re.compile(r"sha256:[0-9a-f]{64}")
SHOWN_OF_ID = len("sha256:") + 12


class Docker(Protocol):
    """What is asked of Docker."""

    def look(self, name: str) -> engine_image.Local | None:
        """An image by name or id; none where it is not there."""


class Images:
    """The images of a node. A Docker that does not answer is asked once, so that nobody waits for it again.

    Raises:
        ImageError: from every method, where Docker does not answer.
    """

    def __init__(self, docker: Docker) -> None:
        self._docker = docker
        self._fault: engine_image.ImageError | None = None

    def find(self, name: str) -> str:
        """The id of an image by its id or planned name; empty where Docker has it not."""
        if self._fault:
            raise self._fault
        try:
            found = self._docker.look(name if name.startswith("sha256:") else engine_image.parse(name).local)
        except engine_image.ImageError as error:
            self._fault = error
            raise
        return found.id if found else ""


def written(path: str, plan_id: str, process: Mapping[str, Any]) -> str:
    """What the run script of a release makes a container of: an image's id, or the name that an earlier version of the
    toolkit left there; empty where there is no script or it says neither.

    Args:
        path: the deployment's directory.
        plan_id: of the release.
        process: with its `name` and the `image` that is planned.
    """
    try:
        script = Path(path, "releases", plan_id, process["name"], "run").read_text(errors="replace")
    except OSError:
        return ""
    # A command's words stand one a line, as `release.run_script` writes them.
    words = [line.strip().removesuffix(" \\") for line in script.splitlines() if line.startswith("    ")]
    made_of = next((word for word in words if _ID.fullmatch(word)), "")
    return made_of or (process["image"] if shlex.quote(process["image"]) in words else "")


def recorded(path: str, image: str) -> str:
    """The id of an image as the role `engine_image` wrote it down when it brought it; empty where it did not."""
    file = Path(path).parent.parent / "images" / f"{engine_image.record_stem(image)}.json"
    return str(engine_image.read_record(file).get("id") or "")


def with_ids(
    path: str, plan_id: str, processes: Sequence[Mapping[str, Any]], images: Images | None
) -> list[dict[str, Any]]:
    """Processes with the id of the image that each container is made of in the place of its planned name.

    The release's own comes first, so that it is never made of another; then the one that was brought, then the one
    that lies under the name. Where the node has none of them, as in a check on a fresh one, the name stays.

    Args:
        path: the deployment's directory.
        plan_id: of the release.
        processes: as `stepladder.core.release` takes them; those that have an `image` are containers.
        images: none takes what is written down without looking whether it is still there.

    Raises:
        ImageError: Docker does not answer.
    """
    made = []
    for process in processes:
        argv = list(process["argv"])
        if process.get("image"):
            argv[argv.index(process["image"])] = _identity(path, plan_id, process, images)
        made.append({**process, "argv": argv})
    return made


def _identity(path: str, plan_id: str, process: Mapping[str, Any], images: Images | None) -> str:
    planned = str(process["image"])
    known = [name for name in (written(path, plan_id, process), recorded(path, planned)) if name]
    if images is None:
        return next(iter(known), planned)
    return next((name for name in known if images.find(name)), "") or images.find(planned) or planned


def lacking(path: str, plan_id: str, processes: Sequence[Mapping[str, Any]], images: Images) -> list[str]:
    """Images without which a release does not run as it did and that the node has not, in words.

    Raises:
        ImageError: Docker does not answer.
    """
    found = {}
    for process in processes:
        if process.get("image"):
            own = written(path, plan_id, process)
            shown = f"image {process['image']}" + (f" ({own[:SHOWN_OF_ID]})" if own.startswith("sha256:") else "")
            found[shown] = own or recorded(path, process["image"]) or process["image"]
    return [shown for shown, name in found.items() if not images.find(name)]
