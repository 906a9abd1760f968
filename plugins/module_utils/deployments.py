"""Which deployments a node has, from the releases that lie on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_deployments(state_directory: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The current slice of each deployment by name, and what could not be read.

    Returns:
        Slices by deployment name, and one sentence for each release that is there but unreadable.
    """
    found: dict[str, dict[str, Any]] = {}
    faults = []
    for path in sorted(Path(state_directory).glob("deployments/*/current/plan.json")):
        name = path.parts[-3]
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            faults.append(f"{path}: {error}")
            continue
        if isinstance(content, dict):
            found[name] = content
        else:
            faults.append(f"{path}: expected a mapping, found {type(content).__name__}")
    return found, faults
