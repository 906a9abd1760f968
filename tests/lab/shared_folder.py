"""A folder that several nodes of a lab see, as over NFS: the same inodes; locks of the kernel end at each node.

Each node has it through bindfs (Debian's package), a file system of its own in front of the folder; the kernel keeps
locks on such a one apart from those on any other.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_lab import RealLab
from rehearsal_images import run

from stepladder.lab import engine
from stepladder.lab.places import places

PROGRAM = "bindfs"
# linux/mount.h, linux/sched.h, and the numbers that every 64-bit platform has for these calls.
OPEN_TREE, MOVE_MOUNT, HERE = 428, 429, -100
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, CLONE_NEWNS = 1, 4, 0x20000


def why_not() -> str:
    """What this machine lacks, in a word; empty where it lacks nothing."""
    return "" if shutil.which(PROGRAM) else PROGRAM


@contextmanager
def shared(lab: RealLab, nodes: list[str], folder: Path, target: str) -> Iterator[None]:
    """Have nodes see a folder of this machine at `target`; afterwards they see again what was there."""
    places_of = {node: folder.with_name(f"{folder.name}-{node}") for node in nodes}
    folder.mkdir()
    try:
        for node, place in places_of.items():
            place.mkdir()
            run([PROGRAM, str(folder), str(place)])
            show(lab, node, place, target)
        yield
    finally:
        for node, place in places_of.items():
            lab.ssh(node, f"umount {target}", check=False)  # a node that was switched off has lost it
            run(["umount", str(place)])


def show(lab: RealLab, node: str, place: Path, target: str) -> None:
    """Mount a folder of this machine in a node that runs."""
    lab.ssh(node, f"mkdir -p {target}")
    found = engine.find(places(lab.environ, Path.home()))
    assert found is not None
    pid = run([*found.command(), "inspect", "--format", "{{.State.Pid}}", f"sl-{lab.name}-{node}"]).strip()
    # In a process of its own: what enters another mount namespace has to have one thread.
    subprocess.run([sys.executable, __file__, str(place), pid, target], check=True)


def carry(place: str, pid: str, target: str) -> None:
    """Take a mount of this namespace into that of a process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        done = int(libc.syscall(number, *arguments))
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done

    tree = call(OPEN_TREE, HERE, place.encode(), OPEN_TREE_CLONE)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    if libc.setns(namespace, CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    call(MOVE_MOUNT, tree, b"", HERE, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)


if __name__ == "__main__":
    carry(*sys.argv[1:])
