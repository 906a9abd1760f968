"""The stores of weights on a node: what each holds, who uses it, and how one is removed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.stepladder.core.plugins.module_utils.weights_lease import lease_of, lock_of, locked
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import (
    code_file_of,
    read_or_empty,
    set_writable,
    write_whole,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import read_state
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import BOOKKEEPING, WeightsError

OWN_FILES = ("complete", "manifest.json", "proven.jsonl", "progress.json")
USERS = "users"
MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True)
class Store:
    """One revision of a model on a node.

    `used_by` are releases and processes, in words; `bytes` is what its files take, what was set aside included. `inode`
    is the directory's, and so the same on all nodes that share its file system.
    """

    path: str
    inode: int
    complete: bool
    bytes: int
    set_aside_bytes: int
    used_by: tuple[str, ...]
    progress: dict[str, object]


def find_stores(state_directory: str, *, with_users: bool = True) -> list[Store]:
    """Every store below the state directory; who uses them is left out where nobody asks, for it reads all of /proc."""
    root = Path(state_directory)
    paths = [path for path in sorted(root.glob("models/*/*")) if is_store(path)]
    users: dict[str, list[str]] = {str(path): [] for path in paths}
    if with_users:
        for path, user in release_users(root):
            users.setdefault(path, []).append(user)
        for one in paths:
            users[str(one)] += noted_users(one, root)
        for path, user in process_users(users):
            users[path].append(user)
    return [look(path, users[str(path)]) for path in paths]


def is_store(path: Path) -> bool:
    """Whether a directory is one that was filled here, or was being filled."""
    return not path.is_symlink() and any((path / BOOKKEEPING / name).exists() for name in OWN_FILES)


def look(path: Path, used_by: Sequence[str]) -> Store:
    """What a store holds."""
    return Store(
        str(path),
        path.stat().st_ino,
        (path / BOOKKEEPING / "complete").exists(),
        tree_bytes(path),
        tree_bytes(path / BOOKKEEPING / "quarantine"),
        tuple(sorted(set(used_by))),
        read_state(path / BOOKKEEPING),
    )


def tree_bytes(path: Path) -> int:
    """Bytes that the files below a directory take on the disk; sparse ones take less than their length."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):  # it may go while this looks
                total += (Path(folder) / name).lstat().st_blocks * 512
    return total


def release_users(root: Path) -> Iterator[tuple[str, str]]:
    """Paths of weights with the release that points at them: the one that runs, and those to go back to."""
    for path in sorted(root.glob("deployments/*/releases/*/plan.json")):
        deployment, release = path.parts[-4], path.parts[-2]
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["node"]["weights"]["path"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        current = path.parents[2] / "current"
        runs = current.exists() and current.resolve() == path.parent.resolve()
        yield str(weights), f"deployment {deployment} ({'runs' if runs else f'release {release}, to go back to'})"


def note_name(root: Path) -> str:
    """What this node's note is called, by its own name, the machine and where it keeps its state."""
    machine = f"{read_or_empty(MACHINE_ID).strip()} {root}"
    return f"{socket.gethostname()}-{hashlib.sha256(machine.encode()).hexdigest()[:8]}.json"


def note_users(state_directory: str) -> list[str]:
    """Write into every store which releases of this node point at it, for other nodes that share its file system.

    Returns the stores that could not be written to, each with the reason.
    """
    root = Path(state_directory)
    users: dict[str, list[str]] = {str(path): [] for path in root.glob("models/*/*") if is_store(path)}
    for path, user in release_users(root):
        users.get(path, []).append(user)
    faults = []
    for path, told in users.items():
        note = Path(path) / BOOKKEEPING / USERS / note_name(root)
        text = json.dumps({"format_version": 1, "node": socket.gethostname(), "used_by": told}) + "\n"
        try:
            if told and read_or_empty(note) != text:
                note.parent.mkdir(parents=True, exist_ok=True)
                write_whole(note, text)
            elif not told:
                note.unlink(missing_ok=True)
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    return faults


def noted_users(path: Path, root: Path, leaving: str = "") -> Iterator[str]:
    """What other nodes have noted in a store, in words; nothing of a deployment that is about to leave."""
    for note in sorted((path / BOOKKEEPING / USERS).glob("*.json")):
        if note.name == note_name(root):
            continue
        try:
            told = json.loads(note.read_text(encoding="utf-8"))
            users = [user for user in told["used_by"] if not is_of(user, leaving)]
            if users:
                yield f"node {told['node']} ({', '.join(users)}; if that node is gone for good, remove {note})"
        except FileNotFoundError:
            continue  # it has just stopped using it
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"a node whose note cannot be read ({note}: {error})"


def is_of(user: str, deployment: str) -> bool:
    """Whether a user, in words, is a release of this deployment."""
    return user.startswith(f"deployment {deployment} (")


def users_of(path: Path, leaving: str = "") -> list[str]:
    """Who uses a store, in words: releases of this node and of others that share it, and processes.

    Args:
        leaving: a deployment that is about to be removed: its releases and all processes count as gone.
    """
    root = path.parent.parent.parent
    found = [user for used, user in release_users(root) if used == str(path) and not is_of(user, leaving)]
    found += noted_users(path, root, leaving)
    return found if leaving else [*found, *(user for _, user in process_users([str(path)]))]


def process_users(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Paths with a process that has files below them open or mapped, or was started with them as an argument."""
    wanted = list(paths)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        seen = "\n".join(process_files(entry))
        for path in wanted:
            if f"{path}/" in seen or f"{path}\n" in f"{seen}\n":
                yield path, f"process {entry.name} ({process_name(entry)})"


def process_files(entry: Path) -> Iterator[str]:
    """Files that a process has mapped or open, and its arguments; nothing of one that ends meanwhile."""
    with contextlib.suppress(OSError):
        for line in (entry / "maps").read_text(errors="replace").splitlines():
            yield line.partition("/")[1] + line.partition("/")[2]
    with contextlib.suppress(OSError):
        yield from (entry / "cmdline").read_text(errors="replace").split("\0")
    with contextlib.suppress(OSError):
        for link in (entry / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(link)  # noqa: PTH115 - pipes and sockets are no paths


def process_name(entry: Path) -> str:
    """A process's short name."""
    try:
        return (entry / "comm").read_text().strip()
    except OSError:
        return "ended meanwhile"


def remove(path: Path) -> None:
    """Take a store away, marker first, bookkeeping last, so that an interrupted removal can go on. Lock held."""
    for name in ("complete", "manifest.json"):
        (path / BOOKKEEPING / name).unlink(missing_ok=True)
    set_writable(path, [], writable=True)
    for entry in path.iterdir():
        if entry.name != BOOKKEEPING:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.rmtree(path)
    code_file_of(path).unlink(missing_ok=True)
    for left in path.parent.glob(f"{path.name}.lease.*"):  # of processes that were killed
        left.unlink(missing_ok=True)


def prune(state_directory: str, paths: Sequence[str], timeout: float = 1.0, *, check_mode: bool = False) -> list[str]:
    """Remove stores that nothing uses; returns those removed.

    Raises WeightsError, before anything is removed, when one of them is no store or is in use; all of them at once.
    """
    stores = {one.path: one for one in find_stores(state_directory)}
    there = [path for path in paths if Path(path).exists()]
    faults = [f"{path} is no store of weights below {state_directory}/models" for path in there if path not in stores]
    faults += [
        f"{path} is used by {', '.join(stores[path].used_by)}"
        for path in there
        if path in stores and stores[path].used_by
    ]
    if faults:
        raise WeightsError(
            "\n".join([*faults, "Nothing was removed. Leave these out, or remove what uses them first."])
        )
    if check_mode:
        return there
    for path in there:
        with locked(Path(path), timeout):
            remove(Path(path))
            lock_of(Path(path)).unlink(missing_ok=True)
            lease_of(Path(path)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other revisions of the model are still there
            Path(path).parent.rmdir()
    return there
