"""What was proven of a directory of weights: its manifest, and the checks of its files against it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import Progress, amount
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import (
    BOOKKEEPING,
    Request,
    WeightsError,
    endpoint_of,
)

FORMAT_VERSION = 2
OLD_FORMAT = 1  # it had no marker: its manifest was the marker
BLOCK_BYTES = 4 * 1024 * 1024
GIT_BLOB = (
    "git:"  # before git's own hash of a small file, where a hub lists no SHA-256 (SHA-1 of a header and the bytes)
)
LARGEST_GIT_BLOB = 64 * 1024 * 1024
INCOMPLETE = "no complete manifest"
MANIFEST = "manifest.json"
OTHER = "the manifest is for "


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it: size in bytes, SHA-256 in hex ('' where the hub has none)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Proven:
    """A file as it was when its hash was right; mtime_ns and inode tell later whether it was touched since.

    `git_blob` is git's hash of it, worked out for files that are small enough to be listed by it.
    """

    path: str
    size: int
    sha256: str
    mtime_ns: int
    inode: int
    git_blob: str = ""


@dataclass(frozen=True)
class BadFile:
    """A file that is not what the manifest or the listing says; `quarantine` is where it lies now ('' if nowhere)."""

    path: str
    reason: str
    expected: str
    found: str
    quarantine: str = ""


@dataclass(frozen=True)
class Current:
    """What is on disk: `missing` says why the directory is not complete ('' when it is).

    `good` are then the files that an unfinished run has proven and that nobody touched since. `created` is when a
    complete one was fetched or mended last.
    """

    missing: str = ""
    created: str = ""
    good: tuple[Proven, ...] = ()
    bad: tuple[BadFile, ...] = ()
    touched: tuple[str, ...] = ()
    hashed_bytes: int = 0
    hash_seconds: float = 0.0


def parse_manifest(text: str) -> dict[str, Any] | None:
    """Read a manifest; None when it is none, or of a later format than this one knows."""
    try:
        data = json.loads(text)
        if data["format_version"] > FORMAT_VERSION:
            return None
        data["files"] = [Proven(**one) for one in data["files"]]
    except (ValueError, KeyError, TypeError):
        return None
    return dict(data)


def content_of(text: str) -> str:
    """What a manifest proves, and when that was fetched or mended; empty where it is none."""
    manifest = parse_manifest(text)
    if manifest is None:
        return ""
    return "\n".join([str(manifest.get("created")), *(f"{one.sha256}  {one.path}" for one in manifest["files"])])


def unusable(manifest: dict[str, Any] | None, request: Request) -> str:
    """Say why a manifest does not speak for this request; '' when it does."""
    if manifest is None:
        return INCOMPLETE
    wanted = {
        "model_id": request.model_id,
        "revision": request.revision,
        "include": list(request.include),
        "exclude": list(request.exclude),
    }
    other = [
        f"{key} {manifest.get(key)!r} instead of {value!r}"
        for key, value in wanted.items()
        if manifest.get(key) != value
    ]
    return f"{OTHER}{', '.join(other)}" if other else ""


def render_manifest(request: Request, files: Sequence[Proven], created: str) -> str:
    """The manifest's text; the same input gives the same bytes."""
    data = {
        "format_version": FORMAT_VERSION,
        "model_id": request.model_id,
        "revision": request.revision,
        "source": request.source,
        "endpoint": endpoint_of(request) or request.source_path,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "created": created,
        "files": [asdict(one) for one in sorted(files, key=lambda one: one.path)],
    }
    return json.dumps(data, indent=1) + "\n"


def cheap_check(one: Proven, stat: os.stat_result | None) -> str:
    """Compare a file's size, mtime and inode with its entry: '' the same, 'missing', 'size', or 'touched'."""
    if stat is None:
        return "missing"
    if stat.st_size != one.size:
        return "size"
    return "" if (stat.st_mtime_ns, stat.st_ino) == (one.mtime_ns, one.inode) else "touched"


def needs_full_check(request: Request, total_bytes: int) -> bool:
    """Whether every byte is read again, or only what the cheap check suspects."""
    return bool(request.verify == "full") or total_bytes <= request.full_check_below_bytes


def compare(wanted: Sequence[Listed], found: dict[str, Proven]) -> list[BadFile]:
    """Hold the files on disk (by path) against the listing; an entry for each that differs."""
    bad = []
    for one in wanted:
        there = found.get(one.path)
        if there is None:
            bad.append(BadFile(one.path, "missing", describe(one.size, one.sha256), "nothing"))
        elif there.size != one.size:
            bad.append(BadFile(one.path, "size", f"{one.size} bytes", f"{there.size} bytes"))
        elif one.sha256.startswith(GIT_BLOB):
            if there.git_blob != one.sha256[len(GIT_BLOB) :]:
                bad.append(BadFile(one.path, "git blob", one.sha256, GIT_BLOB + there.git_blob))
        elif one.sha256 and there.sha256 != one.sha256:
            bad.append(BadFile(one.path, "sha256", one.sha256, there.sha256))
    return bad


def describe(size: int, sha256: str) -> str:
    """A file's size and hash for a message."""
    return f"{size} bytes, sha256 {sha256 or 'not listed'}"


def write_whole(path: Path, text: str) -> None:
    """Replace a file by rename; it and its name are on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """What was renamed, made or removed in a directory is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stat_or_none(path: Path) -> os.stat_result | None:
    """The file's stat; None when there is no regular file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if path.is_file() else None


def files_under(path: Path) -> Iterator[tuple[str, int]]:
    """Every file below `path` with its size in bytes, the bookkeeping left out."""
    for directory, names, files in os.walk(path):
        here = Path(directory)
        if here == path and BOOKKEEPING in names:
            names.remove(BOOKKEEPING)
        for name in files:
            with contextlib.suppress(OSError):  # the client renames while this looks
                yield (here / name).relative_to(path).as_posix(), (here / name).lstat().st_size


def hash_file(root: Path, name: str, durable: bool) -> Proven:
    """Read a file once and return its entry.

    durable: its bytes are on the disk when this returns. Raises WeightsError when it changed meanwhile.
    """
    digest = hashlib.sha256()
    git = None
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with (root / name).open("rb", buffering=0) as source:
        if not durable:
            # A check is about the disk: a page that was read before a bit flipped there would answer for it.
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = os.fstat(source.fileno())
        if before.st_size <= LARGEST_GIT_BLOB:
            git = hashlib.sha1(b"blob %d\0" % before.st_size, usedforsecurity=False)
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            if git:
                git.update(buffer[:count])
        if durable:
            os.fsync(source.fileno())
        after = os.fstat(source.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise WeightsError(
            f"{root / name} was written while it was being checked. Stop what writes there, then run this again."
        )
    blob = git.hexdigest() if git else ""
    return Proven(name, after.st_size, digest.hexdigest(), after.st_mtime_ns, after.st_ino, blob)


def hash_files(
    root: Path, files: Sequence[Listed | Proven], progress: Progress, durable: bool
) -> tuple[dict[str, Proven], float]:
    """Hash files side by side (the digest runs without the interpreter's lock); returns the entries and the seconds."""
    started = time.monotonic()
    found: dict[str, Proven] = {}
    total = sum(one.size for one in files)
    with ThreadPoolExecutor(max_workers=hash_workers()) as pool:
        # The largest first: a large one that begins last would keep a single core busy while the others rest.
        order = sorted(files, key=lambda one: -one.size)
        waiting = [pool.submit(hash_file, root, one.path, durable) for one in order]
        try:
            for future in as_completed(waiting):
                one = future.result()
                found[one.path] = one
                done = sum(entry.size for entry in found.values())
                text = f"checking {len(found)} of {len(files)} files, {amount(done)} of {amount(total)}"
                progress.say("checking", text, done=done, total=total)
        finally:
            for future in waiting:
                future.cancel()
    return found, time.monotonic() - started


def set_aside(request: Request, bad: Sequence[BadFile]) -> list[BadFile]:
    """Move wrong files into the quarantine; returns them with the place where each lies now."""
    moved = []
    for one in bad:
        source = Path(request.path) / one.path
        if one.reason == "missing" or not source.exists():
            moved.append(one)
            continue
        number = 1
        while (target := request.bookkeeping / "quarantine" / f"{one.path}.{number}").exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        moved.append(BadFile(one.path, one.reason, one.expected, one.found, str(target)))
    return moved


class Prover:
    """Hashes files as they arrive, beside whatever fetches them, and notes in the journal those that are right.

    Args:
        request: whose directory it is.
        wanted: what every file has to be.
    """

    def __init__(self, request: Request, wanted: Iterable[Listed]) -> None:
        self._request = request
        self._wanted = {one.path: one for one in wanted}
        self._pool = ThreadPoolExecutor(max_workers=hash_workers())
        self._open: dict[str, Future[Proven]] = {}
        self.proven: dict[str, Proven] = {}
        self.bad: dict[str, BadFile] = {}
        self.hashed_bytes = 0
        self.hash_seconds = 0.0

    def look(self, *, wait: bool = False, progress: Progress | None = None) -> list[Proven]:
        """Take up what lies under its final name in full length; returns what was proven since the last look.

        Args:
            wait: until all of it is read.
            progress: is told how far that is.
        """
        root = Path(self._request.path)
        for path, one in self._wanted.items():
            if path not in self.proven and path not in self._open and path not in self.bad:
                stat = stat_or_none(root / path)
                if stat is not None and stat.st_size == one.size:
                    self._open[path] = self._pool.submit(self._hash, path)
        fresh = []
        opened = list(self._open.items())
        total, done = sum(self._wanted[path].size for path, _ in opened), 0
        for number, (path, future) in enumerate(opened, 1):
            if wait or future.done():
                found = future.result()
                done += found.size
                if progress:
                    text = f"checking {number} of {len(opened)} files, {amount(done)} of {amount(total)}"
                    progress.say("checking", text, done=done, total=total)
                del self._open[path]
                wrong = compare([self._wanted[path]], {path: found})
                if wrong:
                    self.bad[path] = wrong[0]
                else:
                    self.proven[path] = found
                    fresh.append(found)
        note(self._request, fresh)
        return fresh

    def _hash(self, path: str) -> Proven:
        started = time.monotonic()
        found = hash_file(Path(self._request.path), path, durable=True)
        self.hash_seconds += time.monotonic() - started
        self.hashed_bytes += found.size
        return found

    def expect(self, path: str, sha256: str) -> None:
        """Hold a file for which the source has no hash against that of what was read from it."""
        if not self._wanted[path].sha256:
            self._wanted[path] = replace(self._wanted[path], sha256=sha256)

    def expected(self, one: Listed) -> Listed:
        """A file as it is held against: with a hash where the source has none and it was read by this run."""
        return self._wanted.get(one.path, one)

    def forget(self, path: str) -> None:
        """A wrong file was taken away: what comes in its place is looked at again."""
        self.bad.pop(path, None)

    def close(self) -> None:
        """End the threads; what they were hashing is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def hash_workers() -> int:
    """How many files are hashed side by side: one for each core that this process may use, at most 32."""
    return max(1, min(32, len(os.sched_getaffinity(0))))


def parse_journal(text: str) -> dict[str, Proven]:
    """What unfinished runs have proven, by path; a line that a power cut left in half is passed over."""
    found = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            one = Proven(**json.loads(line))
            found[one.path] = one
    return found


def note(request: Request, files: Sequence[Proven]) -> None:
    """Add proven files to the journal; their bytes are on the disk already."""
    if not files:
        return
    with request.journal.open("a", encoding="utf-8") as out:
        for one in files:
            out.write(json.dumps(asdict(one)) + "\n")


def read_or_empty(path: Path) -> str:
    """A text file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def code_of(files: Sequence[Listed | Proven]) -> list[dict[str, str]]:
    """The Python files, which an engine runs where remote code is trusted; git's hash of each where it is known."""
    return [
        {"path": one.path, "sha256": one.sha256, "git_blob": getattr(one, "git_blob", "")}
        for one in files
        if one.path.endswith(".py")
    ]


def code_file_of(path: Path) -> Path:
    """The note beside a store of the Python files that it was completed with; it outlives the store's renewal."""
    return path.with_name(path.name + ".code")


def known_code(path: Path) -> list[dict[str, str]] | None:
    """The Python files that a store was completed with last; None where that is not known."""
    manifest = parse_manifest(read_or_empty(path / BOOKKEEPING / MANIFEST))
    if manifest:
        return code_of(manifest["files"])
    try:
        noted = json.loads(code_file_of(path).read_text(encoding="utf-8"))
        return [{key: str(one[key]) for key in ("path", "sha256", "git_blob")} for one in noted]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def seal(request: Request, files: Sequence[Proven], created: str) -> None:
    """Write the manifest, make everything read-only, and write the marker as the very last thing."""
    text = render_manifest(request, files, created)
    write_whole(code_file_of(Path(request.path)), json.dumps(code_of(files)) + "\n")
    write_whole(request.manifest, text)
    set_writable(Path(request.path), [one.path for one in files], writable=False)
    mark = {"format_version": 1, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_whole(request.marker, json.dumps(mark) + "\n")
    request.journal.unlink(missing_ok=True)


def unseal(request: Request, kept: Sequence[Proven]) -> None:
    """Take the marker away first, then make the directories writable; what stays right stays known."""
    request.bookkeeping.mkdir(parents=True, exist_ok=True)
    note(request, kept)
    if request.marker.exists() or read_or_empty(request.manifest):
        request.marker.unlink(missing_ok=True)
        request.manifest.unlink(missing_ok=True)
        sync_directory(request.bookkeeping)
    set_writable(Path(request.path), [], writable=True)


def set_writable(root: Path, names: Iterable[str], *, writable: bool) -> None:
    """Let directories below root (the bookkeeping aside) be written or not, and these files be read only."""
    for name in names:
        (root / name).chmod(0o644 if writable else 0o444)
    for directory, below, _ in os.walk(root, topdown=False):
        if BOOKKEEPING not in Path(directory).relative_to(root).parts:
            Path(directory).chmod(0o755 if writable else 0o555)
        del below


def inspect(request: Request, progress: Progress) -> Current:
    """Say of each file of the manifest whether it is still what was proven. Reads only."""
    root = Path(request.path)
    text = read_or_empty(request.manifest)
    manifest = parse_manifest(text)
    missing = unusable(manifest, request)
    marked = manifest is not None and is_marked(request, manifest, text)
    if manifest is None or missing or not marked:
        # One without its marker may be that of a run that was killed as it took away what it had found wrong.
        known = {one.path: one for one in manifest["files"]} if manifest and marked else {}
        known.update(parse_journal(read_or_empty(request.journal)))
        if request.verify == "full":  # what lies there is read and held against the source's hashes before it is kept
            known = {}
        intact = [one for one in known.values() if not cheap_check(one, stat_or_none(root / one.path))]
        return Current(missing=missing or INCOMPLETE, good=tuple(intact))
    entries: list[Proven] = manifest["files"]
    full = needs_full_check(request, sum(one.size for one in entries))
    verdicts = {one.path: cheap_check(one, stat_or_none(root / one.path)) for one in entries}
    read = [] if full else [Proven(**one) for one in request.seen]
    seen = {one.path: one for one in read if not cheap_check(one, stat_or_none(root / one.path))}
    suspects = [one for one in entries if verdicts[one.path] == "touched" or (full and not verdicts[one.path])]
    suspects = [one for one in suspects if one.path not in seen]
    hashed, seconds = hash_files(root, suspects, progress, durable=False) if suspects else ({}, 0.0)
    good, bad = [], []
    for one in entries:
        verdict, now = verdicts[one.path], hashed.get(one.path) or seen.get(one.path)
        if verdict == "missing":
            bad.append(BadFile(one.path, "missing", describe(one.size, one.sha256), "nothing"))
        elif verdict == "size":
            bad.append(BadFile(one.path, "size", f"{one.size} bytes", f"{(root / one.path).stat().st_size} bytes"))
        elif now is not None and now.sha256 != one.sha256:
            bad.append(BadFile(one.path, "sha256", one.sha256, now.sha256))
        else:
            good.append(now or one)
    return Current(
        created=str(manifest.get("created") or ""),
        good=tuple(good),
        bad=tuple(bad),
        touched=tuple(sorted(one.path for one in set(good) - set(entries))),
        hashed_bytes=sum(one.size for one in hashed.values()),
        hash_seconds=seconds,
    )


def is_marked(request: Request, manifest: dict[str, Any], text: str) -> bool:
    """Whether the marker is there and means this manifest; one of the old format is its own marker."""
    if manifest["format_version"] == OLD_FORMAT:
        return True
    try:
        mark = json.loads(read_or_empty(request.marker))
        return bool(mark["manifest_sha256"] == hashlib.sha256(text.encode()).hexdigest())
    except (ValueError, KeyError, TypeError):
        return False
