"""Weights that are carried in: from a directory or a shared file system, or out of a tar archive."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO

from ansible_collections.stepladder.core.plugins.module_utils.weights_hub import refuse_unsafe, selected
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import (
    BLOCK_BYTES,
    Listed,
    files_under,
    parse_manifest,
    read_or_empty,
    sync_directory,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import (
    BOOKKEEPING,
    Request,
    WeightsError,
)

MANIFEST = f"{BOOKKEEPING}/manifest.json"
CARRIED_SUMS = "SHA256SUMS"
UNFINISHED_SUFFIX = ".incomplete"
COPIES_AT_A_TIME = 8
MOST_LINKS_NAMED = 5


def parse_sums(text: str) -> dict[str, str]:
    """Hashes by path, as `sha256sum` writes them; lines of another form are passed over."""
    found = {}
    for line in text.splitlines():
        digest, _, path = line.partition(" ")
        if len(digest) == 64 and path:
            found[path.lstrip(" *").removeprefix("./")] = digest.lower()
    return found


def known_hashes(manifest: str, sums: str) -> dict[str, str]:
    """What a source says of its files: a manifest of ours, or `SHA256SUMS` beside the files."""
    ours = parse_manifest(manifest)
    return {**parse_sums(sums), **({one.path: one.sha256 for one in ours["files"]} if ours else {})}


def list_source(request: Request) -> list[Listed]:
    """What a directory or an archive holds of the wanted files, with the hashes that it carries.

    Raises WeightsError when it cannot be read, or holds nothing that is wanted.
    """
    try:
        files = _list_directory(request) if request.source == "directory" else _list_archive(request)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise WeightsError(
            f"the {request.source} {request.source_path} cannot be read: {error}. "
            "Give source_path as it is on the node; an archive is a tar file, compressed or not."
        ) from error
    refuse_unsafe(files, request.source_path)
    wanted: list[Listed] = selected(files, request.include, request.exclude)
    if not wanted:
        raise WeightsError(
            f"the {request.source} {request.source_path} has no files that include {list(request.include)} and "
            f"exclude {list(request.exclude)} leave. Check source_path and the patterns."
        )
    return wanted


def _list_directory(request: Request) -> list[Listed]:
    root = Path(request.source_path)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no directory")
    hashes = known_hashes(read_or_empty(root / MANIFEST), read_or_empty(root / CARRIED_SUMS))
    names = [Listed(name, 0, "") for name, _ in files_under(root) if name != CARRIED_SUMS]
    wanted = [one.path for one in selected(names, request.include, request.exclude)]
    lost = sorted(name for name in wanted if not (root / name).exists())
    if lost:
        shown = "".join(f"\n  {name} -> {(root / name).readlink()}" for name in lost[:MOST_LINKS_NAMED])
        more = f"\n  and {len(lost) - MOST_LINKS_NAMED} more" if len(lost) > MOST_LINKS_NAMED else ""
        raise WeightsError(
            f"the directory {root} has {len(lost)} links that lead nowhere on this node:{shown}{more}\n"
            "Bring what they point to, carry the files themselves (cp --dereference), or leave them out with "
            "model_weights_exclude."
        )
    return [Listed(name, (root / name).stat().st_size, hashes.get(name, "")) for name in wanted]


def _list_archive(request: Request) -> list[Listed]:
    found: dict[str, int] = {}
    carried = {MANIFEST: "", CARRIED_SUMS: ""}
    with tarfile.open(request.source_path) as archive:
        for name, member in _members(archive):
            if name in carried:
                carried[name] = _text(archive, member)
            elif not name.startswith(f"{BOOKKEEPING}/"):
                found[name] = member.size
    hashes = known_hashes(carried[MANIFEST], carried[CARRIED_SUMS])
    return [Listed(name, size, hashes.get(name, "")) for name, size in found.items()]


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    for member in archive:
        if member.isfile():
            yield member.name.removeprefix("./"), member
        elif not member.isdir():
            raise WeightsError(
                f"{archive.name!s} holds {member.name}, no file: pack the files themselves (tar --dereference)."
            )


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    stream = archive.extractfile(member)
    return stream.read().decode("utf-8", "replace") if stream else ""


def bring(
    request: Request,
    missing: Sequence[Listed],
    tick: Callable[[], object],
    read: Callable[[str, str], object],
) -> None:
    """Copy the missing files to their places; each has its name only once it is whole.

    Args:
        tick: called after each file.
        read: told each file's path and the SHA-256 of what was read of it, before it has its name.

    Raises:
        WeightsError: the source cannot be read, or is no longer what it was when it was listed.
    """
    try:
        (_copy_directory if request.source == "directory" else _unpack)(request, missing, tick, read)
    except (tarfile.TarError, EOFError) as error:
        raise WeightsError(
            f"the archive {request.source_path} broke off: {error}. Files that are whole are kept: carry it in again."
        ) from error


def _copy_directory(
    request: Request, missing: Sequence[Listed], tick: Callable[[], object], read: Callable[[str, str], object]
) -> None:
    def copy(one: Listed) -> None:
        with (Path(request.source_path) / one.path).open("rb") as source:
            _put(request, one, source, read)

    with ThreadPoolExecutor(max_workers=COPIES_AT_A_TIME) as pool:
        for _ in pool.map(copy, missing):
            tick()


def _unpack(
    request: Request, missing: Sequence[Listed], tick: Callable[[], object], read: Callable[[str, str], object]
) -> None:
    wanted = {one.path: one for one in missing}
    with tarfile.open(request.source_path) as archive:
        for name, member in _members(archive):
            if name in wanted:
                stream = archive.extractfile(member)
                assert stream is not None  # noqa: S101 - only files are members here; for the type checker
                with closing(stream):
                    _put(request, wanted[name], stream, read)
                tick()


def _put(request: Request, one: Listed, source: IO[bytes], read: Callable[[str, str], object]) -> None:
    target = Path(request.path) / one.path
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + UNFINISHED_SUFFIX)
    digest = hashlib.sha256()
    with unfinished.open("wb") as out:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
        # What is read again is what lies on the disk, and no page of what was written.
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read(one.path, digest.hexdigest())
    unfinished.replace(target)
    sync_directory(target.parent)
