"""A node's disk: a sparse file that holds an ext4 for its /var, so that it can be full while the machine's is not."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from stepladder.lab.engine import run
from stepladder.lab.places import LabError

BYTES = 48 * 1024**3
MOUNT_SECONDS = 60.0


def possible() -> bool:
    """Whether this machine has loop devices."""
    return Path("/dev/loop-control").exists()


def mount_point(disk: Path) -> Path:
    """Where a disk is mounted on the machine."""
    return disk.with_suffix("")


def var(disk: Path) -> Path:
    """What a node sees as its /var: a folder that is there only while the disk is mounted.

    An engine that starts with the machine cannot boot a node on an empty folder then.
    """
    return mount_point(disk) / "var"


def is_mounted(disk: Path) -> bool:
    """Whether a disk is mounted where it belongs."""
    return os.path.ismount(mount_point(disk))


def make(disk: Path, archive: Path) -> None:
    """Make a disk that holds the /var of a root file system; it takes what is in it, not its size.

    Args:
        disk: the file.
        archive: the root file system's archive.

    Raises:
        LabError: it cannot be made or mounted.
    """
    disk.parent.mkdir(parents=True, exist_ok=True)
    fresh = disk.with_suffix(".new")
    with fresh.open("wb") as file:
        file.truncate(BYTES)
    # No blocks kept back: a disk is full for root as well. The journal is small, for it is really written.
    run(["mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=8", "-E", "lazy_itable_init=1,nodiscard", str(fresh)])
    fresh.rename(disk)
    mount(disk)
    try:
        with tarfile.open(archive) as tar:
            members = [member for member in tar if f"{member.name.removeprefix('./')}/".startswith("var/")]
            tar.extractall(mount_point(disk), members=members, filter="fully_trusted")  # noqa: S202 - made by ensure_archive
    except (OSError, tarfile.TarError) as error:
        raise LabError(f"{mount_point(disk)} cannot be filled from {archive}: {error}") from None


def mount(disk: Path) -> None:
    """Mount a disk, if it is not."""
    mount_point(disk).mkdir(mode=0o755, parents=True, exist_ok=True)
    if not is_mounted(disk):
        run(["mount", "-o", "loop,discard", str(disk), str(mount_point(disk))], seconds=MOUNT_SECONDS)


def remove(disk: Path) -> None:
    """Unmount a disk and delete it."""
    if is_mounted(disk):
        run(["umount", str(mount_point(disk))], seconds=MOUNT_SECONDS)
    disk.unlink(missing_ok=True)
    disk.with_suffix(".new").unlink(missing_ok=True)
    if mount_point(disk).is_dir():
        mount_point(disk).rmdir()
