"""What may be cleared from the state directory when deployments have gone."""

from __future__ import annotations

import os
from pathlib import Path


def plan_tidying(root: Path, shared: list[str]) -> list[Path]:
    """Paths to remove, innermost first: shared directories once nothing is deployed, lock files, empty directories.

    Args:
        root: the state directory.
        shared: names below it that every deployment uses and any deploy makes again.
    """
    if not root.is_dir():
        return []
    deployed = any((root / "deployments").glob("*/current"))
    doomed: set[Path] = set() if deployed else {root / name for name in shared if (root / name).exists()}
    doomed_locks = set() if deployed else {path for path in root.glob("**/*.lock") if not _below(path, doomed)}
    removed = doomed | doomed_locks
    for folder, _, _ in os.walk(root, topdown=False):
        path = Path(folder)
        if not path.is_symlink() and not _below(path, doomed) and all(child in removed for child in path.iterdir()):
            removed.add(path)
    return sorted(removed, key=lambda path: (-len(path.parts), str(path)))


def _below(path: Path, parents: set[Path]) -> bool:
    return any(parent in path.parents for parent in parents)
