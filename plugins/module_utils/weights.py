"""One revision of a model in a directory, fetched by the unmodified modelscope client and proven by SHA-256.

Standard library only: this runs on the node, under any Python from 3.9 on.

The directory is complete when `<path>/.stepladder/manifest.json` is there: it is written last, by rename, after every
file was hashed against the hub's own listing. Everything else is an unfinished run, whose bytes the next one uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from http.client import HTTPMessage
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import IO, Any

from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile
from ansible_collections.stepladder.core.plugins.module_utils.watched import LockTimeoutError, exclusive

FORMAT_VERSION = 1
BOOKKEEPING = ".stepladder"
DEFAULT_ENDPOINT = "https://www.modelscope.cn"
LISTING_LIMIT = 3000  # entries in one answer of the hub; the client calls it REPO_FILES_TRUNCATION_LIMIT
CLIENT_LINES = 15
PROGRESS_SECONDS = 2.0
TERMINATE_SECONDS = 10.0
BLOCK_BYTES = 4 * 1024 * 1024
MOST_NAMED_FILES = 200  # more than that in one repair: the whole revision is asked for, argv stays short

# What the client leaves behind of a file that it has not finished: `.incomplete`, and the parts of a ranged download.
UNFINISHED = re.compile(r"(\.incomplete|\.parallel_tmp|_\d+_\d+)$")
# Errors of the client that another try will not mend: hash mismatch after its own three tries, refused, not found.
PERMANENT = re.compile(r"\[E2020\]|\| code=40[134]\b|code=40[134]$", re.MULTILINE)
# Set for the child from the parameters alone, so that a login or a variable left on the node cannot change the source.
OWN_VARIABLES = (
    "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_CACHE",
    "MODELSCOPE_DOMAIN",
    "MODELSCOPE_ENDPOINT",
    "MODELSCOPE_HOME",
    "MODELSCOPE_PREFER_AI_SITE",
    "PYTHONHOME",
    "PYTHONPATH",
)


class WeightsError(Exception):
    """The weights are not there as asked; the message says what is wrong, what was found and how to mend it."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it: size in bytes, SHA-256 in hex ('' where the hub has none)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Proven:
    """A file as it was when its hash was right; mtime_ns and inode tell later whether it was touched since."""

    path: str
    size: int
    sha256: str
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class BadFile:
    """A file that is not what the manifest or the listing says; `quarantine` is where it lies now ('' if nowhere)."""

    path: str
    reason: str
    expected: str
    found: str
    quarantine: str = ""


@dataclass(frozen=True)
class Request:
    """What is wanted; the fields are the module's parameters (sizes in bytes, times in seconds)."""

    model_id: str
    path: str
    revision: str = "master"
    client: str = "modelscope"
    endpoint: str = ""
    token_file: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_workers: int = 8
    expected_bytes: int = 0
    total_timeout: int = 14400
    retries: int = 3
    deadline: float = 86400
    verify: str = "cheap"
    full_check_below_bytes: int = 0
    progress_file: str = ""
    lock_timeout: float = 600

    @classmethod
    def of(cls, params: dict[str, Any]) -> Request:
        """From the module's parameters; patterns are split at commas, as the client does."""
        patterns = {name: split_patterns(params[name]) for name in ("include", "exclude")}
        return cls(**{**params, **patterns})

    @property
    def name(self) -> str:
        """`owner/name@revision`, as it stands in messages."""
        return f"{self.model_id}@{self.revision}"

    @property
    def bookkeeping(self) -> Path:
        """The directory of the manifest, the quarantine and the client's own cache."""
        return Path(self.path) / BOOKKEEPING

    @property
    def manifest(self) -> Path:
        """The complete marker."""
        return self.bookkeeping / "manifest.json"


@dataclass(frozen=True)
class Current:
    """What is on disk: `missing` says why the manifest cannot be used ('' when it can)."""

    missing: str = ""
    good: tuple[Proven, ...] = ()
    bad: tuple[BadFile, ...] = ()
    touched: tuple[str, ...] = ()
    hashed_bytes: int = 0
    hash_seconds: float = 0.0


@dataclass
class Outcome:
    """What was done, in the module's return values."""

    changed: bool = False
    actions: list[str] = field(default_factory=list)
    files: list[Proven] = field(default_factory=list)
    bytes_fetched: int = 0
    bad_files: list[BadFile] = field(default_factory=list)
    extra_files: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    hashed_bytes: int = 0
    hash_seconds: float = 0.0

    def as_result(self, request: Request, seconds: float) -> dict[str, Any]:
        """Turn into what exit_json takes."""
        rate = self.hashed_bytes / self.hash_seconds / 1e9 if self.hash_seconds else 0.0
        return {
            "changed": self.changed,
            "actions": self.actions,
            "diff": {"before": self.before, "after": self.after},
            "files": len(self.files),
            "bytes": sum(one.size for one in self.files),
            "bytes_fetched": self.bytes_fetched,
            "seconds": round(seconds, 1),
            "manifest": str(request.manifest),
            "bad_files": [asdict(one) for one in self.bad_files],
            "extra_files": self.extra_files,
            "remote_code": [{"path": one.path, "sha256": one.sha256} for one in self.files if one.path.endswith(".py")],
            "hashed_bytes": self.hashed_bytes,
            "hash_gigabytes_per_second": round(rate, 2),
        }


# ---- pure: text and numbers in, decisions out ------------------------------------------------------------------------


def problems(request: Request) -> list[str]:
    """Say everything that is wrong with the parameters, one line each."""
    found = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", request.model_id):
        found.append(f"model_id is {request.model_id!r}: give it as owner/name, for example stepfun-ai/Step-3.5-Flash")
    if not request.revision or request.revision.startswith("-"):
        found.append(f"revision is {request.revision!r}: give a branch, a tag or a commit, for example master")
    if not request.path.startswith("/") or len(PurePosixPath(request.path).parts) < 3:
        found.append(
            f"path is {request.path!r}: give an absolute path of its own for the model, at least two levels deep"
        )
    if request.endpoint and not re.match(r"https?://[^/]+", request.endpoint):
        found.append(f"endpoint is {request.endpoint!r}: give a full URL, for example {DEFAULT_ENDPOINT}")
    for name in ("max_workers", "retries", "total_timeout"):
        if getattr(request, name) < 1:
            found.append(f"{name} is {getattr(request, name)}: give 1 or more")
    return found


def endpoint_of(request: Request) -> str:
    """The hub that both the listing and the client are asked at, without a slash at the end."""
    return (request.endpoint or DEFAULT_ENDPOINT).rstrip("/")


def listing_url(request: Request) -> str:
    """The address of the file listing (modelscope-hub 0.5.1, LegacyClient.list_repo_files)."""
    query = urllib.parse.urlencode({"Revision": request.revision, "Recursive": "True"})
    return f"{endpoint_of(request)}/api/v1/models/{request.model_id}/repo/files?{query}"


def parse_listing(text: str, source: str) -> list[Listed]:
    """Read the hub's listing.

    Raises WeightsError when it is no listing, when it is cut off, or when a name in it would leave the directory.
    """
    try:
        entries = json.loads(text)["Data"]["Files"] or []
        blobs = [one for one in entries if one.get("Type") != "tree"]
        files = [Listed(one["Path"], int(one["Size"]), (one.get("Sha256") or "").lower()) for one in blobs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{source} answered with something else than a file listing ({type(error).__name__}: {error}): "
            f"{text[:200]!r}. Check that endpoint is a model hub and no proxy answers in its place."
        ) from error
    if len(entries) >= LISTING_LIMIT:
        raise WeightsError(
            f"{source} listed {len(entries)} entries, and the hub cuts a listing off at {LISTING_LIMIT}: "
            "what it left out could not be proven. Choose the files with include."
        )
    unsafe = [one.path for one in files if not safe_name(one.path)]
    if unsafe:
        raise WeightsError(f"{source} lists names that lead out of the model's directory: {', '.join(unsafe)}")
    return files


def safe_name(path: str) -> bool:
    """Whether a name from the hub stays inside the directory and off the bookkeeping."""
    parts = path.split("/")
    return not (path.startswith("/") or "\0" in path or {"", ".", ".."} & set(parts) or parts[0] == BOOKKEEPING)


def split_patterns(patterns: Iterable[str]) -> tuple[str, ...]:
    """Split at commas, as the client does (cli/compat.py, normalize_patterns)."""
    return tuple(part.strip() for pattern in patterns for part in pattern.split(",") if part.strip())


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Match as the client does (_download.py, _matches_patterns), its reading of `.*` included."""
    return any(
        fnmatch.fnmatch(path, pattern) or (".*" in pattern and fnmatch.fnmatch(path, pattern.replace(".*", "*")))
        for pattern in patterns
    )


def selected(files: Sequence[Listed], include: Sequence[str], exclude: Sequence[str]) -> list[Listed]:
    """Leave of the listing what the patterns ask for."""
    return [
        one
        for one in files
        if (not include or matches(one.path, include)) and not (exclude and matches(one.path, exclude))
    ]


def literal_pattern(path: str) -> str:
    """Write a name as a pattern that means this name; the client splits at commas, so a comma becomes `?`."""
    return re.sub(r"([\[*?])", r"[\1]", path).replace(",", "?")


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


def unusable(manifest: dict[str, Any] | None, request: Request) -> str:
    """Say why a manifest does not speak for this request; '' when it does."""
    if manifest is None:
        return "no complete manifest"
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
    return f"the manifest is for {', '.join(other)}" if other else ""


def cheap_check(one: Proven, stat: os.stat_result | None) -> str:
    """Compare a file's size, mtime and inode with its entry: '' the same, 'missing', 'size', or 'touched'."""
    if stat is None:
        return "missing"
    if stat.st_size != one.size:
        return "size"
    return "" if (stat.st_mtime_ns, stat.st_ino) == (one.mtime_ns, one.inode) else "touched"


def needs_full_check(request: Request, total_bytes: int) -> bool:
    """Whether every byte is read again, or only what the cheap check suspects."""
    return request.verify == "full" or total_bytes <= request.full_check_below_bytes


def plan(current: Current, request: Request) -> list[str]:
    """Say what would be done to get from what is there to what is wanted; an empty list is: nothing."""
    if current.missing:
        return [f"fetch {request.name} into {request.path} ({current.missing})"]
    return [
        f"fetch {one.path} again ({one.reason})"
        if one.reason == "missing"
        else f"set aside {one.path} ({one.reason}: expected {one.expected}, found {one.found}) and fetch it again"
        for one in current.bad
    ] + [f"note that {path} is still right, though it was touched" for path in current.touched]


def space_problem(path: str, free: int, needed: int, there: int) -> str:
    """Say that the file system is too small for what is still to come; '' when it is not. All in bytes."""
    missing = max(0, needed - there)
    if missing <= free:
        return ""
    return (
        f"too little space for the weights in {path}: {amount(free)} free, {amount(missing)} needed "
        f"({amount(needed)} in all, {amount(there)} of it already there), {amount(missing - free)} short. "
        "Free that much on this file system, or give a path on a larger one."
    )


def amount(count: float) -> str:
    """Bytes for people, in decimal units: 212.5 GB."""
    value, unit = scaled(count, count)
    return f"{value} {unit}"


def scaled(count: float, largest: float) -> tuple[str, str]:
    """A number of bytes in the unit that suits the largest of its line."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return f"{count / factor:.1f}", unit
    return f"{count:.0f}", "bytes"


def progress_line(done: int, total: int, rate: float) -> str:
    """`downloaded 12.3 of 212.5 GB (5.8 %), 410 MB/s, about 8 min left`; done and total in bytes, rate in bytes/s."""
    have, unit = scaled(done, total)
    all_of_it = scaled(total, total)[0]
    line = f"downloaded {have} of {all_of_it} {unit} ({100 * done / total if total else 100:.1f} %)"
    if rate <= 0:
        return line
    left = (total - done) / rate
    wait = f"{left / 3600:.1f} h" if left >= 5400 else f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return f"{line}, {rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s, about {wait} left"


def client_argv(request: Request, only: Sequence[str]) -> list[str]:
    """The client's command line; `only` names single files of a repair, and replaces the patterns."""
    include = [literal_pattern(path) for path in only] or list(request.include)
    exclude = [] if only else list(request.exclude)
    return [
        request.client,
        "download",
        request.model_id,
        f"--revision={request.revision}",
        f"--local-dir={request.path}",
        f"--max-workers={request.max_workers}",
        *(f"--include={pattern}" for pattern in include),
        *(f"--exclude={pattern}" for pattern in exclude),
    ]


def client_environment(request: Request, base: dict[str, str], token: str) -> dict[str, str]:
    """The client's environment: the node's own, less what could change the source, plus what the request says."""
    own = {key: value for key, value in base.items() if key not in OWN_VARIABLES}
    own.update(
        {
            "MODELSCOPE_ENDPOINT": endpoint_of(request),
            # Its locks live with the weights: two nodes on one shared directory then exclude each other.
            "MODELSCOPE_CACHE": str(request.bookkeeping / "client"),
            "MODELSCOPE_HOME": str(request.bookkeeping / "client"),
            "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(request.total_timeout),
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
        }
    )
    if token:
        own["MODELSCOPE_API_TOKEN"] = token
    return own


def last_lines(text: str, token: str, count: int = CLIENT_LINES) -> list[str]:
    """The last lines that say something (the client's banner does not), with the token blotted out."""
    if token:
        text = text.replace(token, "********")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if re.search(r"[^\W\d_]{3}", line)][-count:]


def compare(wanted: Sequence[Listed], found: dict[str, Proven]) -> list[BadFile]:
    """Hold the files on disk (by path) against the listing; an entry for each that differs."""
    bad = []
    for one in wanted:
        there = found.get(one.path)
        if there is None:
            bad.append(BadFile(one.path, "missing", describe(one.size, one.sha256), "nothing"))
        elif there.size != one.size:
            bad.append(BadFile(one.path, "size", f"{one.size} bytes", f"{there.size} bytes"))
        elif one.sha256 and there.sha256 != one.sha256:
            bad.append(BadFile(one.path, "sha256", one.sha256, there.sha256))
    return bad


def describe(size: int, sha256: str) -> str:
    """A file's size and hash for a message."""
    return f"{size} bytes, sha256 {sha256 or 'not listed'}"


def render_manifest(request: Request, files: Sequence[Proven], created: str) -> str:
    """The manifest's text; the same input gives the same bytes."""
    data = {
        "format_version": FORMAT_VERSION,
        "model_id": request.model_id,
        "revision": request.revision,
        "endpoint": endpoint_of(request),
        "include": list(request.include),
        "exclude": list(request.exclude),
        "created": created,
        "files": [asdict(one) for one in sorted(files, key=lambda one: one.path)],
    }
    return json.dumps(data, indent=1) + "\n"


# ---- the node: files, the hub, the client ----------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Replace a file by rename; it and its name are on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold `<path>.lock` (flock: gone with the process, however it ends).

    Raises WeightsError naming the holder after `timeout` seconds.
    """
    try:
        with exclusive(path.with_name(path.name + ".lock"), timeout, poll_s=0.2):
            yield
    except LockTimeoutError as error:
        raise WeightsError(f"another run works on {path}: {error}. What it has fetched is kept.") from error


def utc_now() -> str:
    """Now, in UTC, as 2026-11-21T03:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


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


def bytes_there(path: Path, sizes: dict[str, int]) -> int:
    """Bytes of the wanted files (path to size) that are on disk, unfinished ones included."""
    counted: dict[str, int] = {}
    for name, size in files_under(path):
        file = name if name in sizes else UNFINISHED.sub("", name)
        if file in sizes:
            counted[file] = min(sizes[file], counted.get(file, 0) + size)
    return sum(counted.values())


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write on the file system where `path` is or will be."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def hash_file(root: Path, name: str, durable: bool) -> Proven:
    """Read a file once and return its entry.

    durable: its bytes are on the disk when this returns. Raises WeightsError when it changed meanwhile.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with (root / name).open("rb", buffering=0) as source:
        before = os.fstat(source.fileno())
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
        if durable:
            os.fsync(source.fileno())
        after = os.fstat(source.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise WeightsError(
            f"{root / name} was written while it was being checked. Stop what writes there, then run this again."
        )
    return Proven(name, after.st_size, digest.hexdigest(), after.st_mtime_ns, after.st_ino)


def hash_files(
    root: Path, names: Sequence[str], progress: ProgressFile, durable: bool
) -> tuple[dict[str, Proven], float]:
    """Hash files side by side (the digest runs without the interpreter's lock); returns the entries and the seconds."""
    started = time.monotonic()
    found: dict[str, Proven] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(hash_file, root, name, durable) for name in names]
        try:
            for future in as_completed(waiting):
                one = future.result()
                found[one.path] = one
                progress.write(f"checking {len(found)} of {len(names)} files")
        finally:
            for future in waiting:
                future.cancel()
    return found, time.monotonic() - started


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follow a redirect without handing the token to another host."""

    def redirect_request(  # noqa: PLR0917  the base class's signature
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Drop the credentials when the host changes."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.headers = {key: value for key, value in new.headers.items() if key not in ("Authorization", "Cookie")}
        return new


def fetch_listing(request: Request, token: str) -> list[Listed]:
    """Ask the hub for the revision's files.

    Raises WeightsError when it refuses (at once), or cannot be reached in `retries` tries.
    """
    url = listing_url(request)
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    opener = urllib.request.build_opener(SameHost)
    failure = ""
    for attempt in range(request.retries):
        if attempt:
            time.sleep(2.0**attempt)
        try:
            with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as answer:  # noqa: S310  checked by problems()
                return parse_listing(answer.read().decode("utf-8", "replace"), url)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                may_read = f"check that the token in {request.token_file} may read it"
                raise WeightsError(
                    f"the hub answered {error.code} for {request.name} ({url}). Check model_id and revision; "
                    f"{may_read if token else 'if the model is private, give token_file'}."
                ) from error
            failure = f"HTTP {error.code}"
        except OSError as error:
            failure = str(getattr(error, "reason", error))
    raise WeightsError(
        f"the hub at {endpoint_of(request)} gave no listing of {request.name}, asked {request.retries} times: "
        f"{failure}. Check from this node: curl -sS '{url}'. "
        "Behind a proxy or a mirror, set endpoint or the proxy variables."
    )


def read_token(request: Request) -> str:
    """The hub's token, '' without a token file."""
    if not request.token_file:
        return ""
    try:
        token = Path(request.token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise WeightsError(
            f"token_file {request.token_file} cannot be read: {error.strerror}. Put the hub's token there."
        ) from error
    if not token:
        raise WeightsError(
            f"token_file {request.token_file} is empty. Put the hub's token there, or leave token_file out."
        )
    return token


def die_with_parent() -> None:
    """In the child, before exec: end when the module ends, even by SIGKILL (prctl(2), PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, signal.SIGTERM)


LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Transfer:
    """What the client is run for: single files of a repair (none: all), the sizes of all wanted files in bytes."""

    only: tuple[str, ...]
    token: str
    sizes: dict[str, int]
    progress: ProgressFile


def run_client(request: Request, transfer: Transfer, until: float) -> tuple[int, str]:
    """Run the client once, showing its progress; returns its exit status and what it printed.

    Raises WeightsError when it cannot be started, or when `until` (monotonic seconds) passes.
    """
    log = request.bookkeeping / "client.log"
    root = Path(request.path)
    log.touch(mode=0o600)
    with log.open("wb") as out:
        try:
            child = subprocess.Popen(
                client_argv(request, transfer.only),
                env=client_environment(request, dict(os.environ), transfer.token),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  the parent starts no thread before this
            )
        except OSError as error:
            raise WeightsError(
                f"the client {request.client} cannot be started: {error.strerror}. "
                "Give the path of the modelscope executable in the environment that has it."
            ) from error
        seen: deque[tuple[float, int]] = deque(maxlen=15)
        try:
            while child.poll() is None:
                now = time.monotonic()
                if now >= until:
                    raise WeightsError(
                        f"the download of {request.name} did not end in {request.deadline:g} s (deadline) and was "
                        "stopped. What was fetched is kept: run this again to go on, or give a longer deadline.",
                        client_output=last_lines(log.read_text("utf-8", "replace"), transfer.token),
                    )
                if not seen or now - seen[-1][0] >= PROGRESS_SECONDS:
                    seen.append((now, bytes_there(root, transfer.sizes)))
                    rate = (seen[-1][1] - seen[0][1]) / (now - seen[0][0]) if len(seen) > 1 else 0.0
                    transfer.progress.write(progress_line(seen[-1][1], sum(transfer.sizes.values()), rate))
                time.sleep(0.1)
        finally:
            stop(child)
        return child.returncode, log.read_text("utf-8", "replace")


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and its whole process group: asked first, killed after ten seconds."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATE_SECONDS)


def download(request: Request, transfer: Transfer) -> None:
    """Run the client until it succeeds, `retries` times at most.

    Raises WeightsError with the client's last lines; at once where another try cannot help.
    """
    until = time.monotonic() + request.deadline
    for attempt in range(1, request.retries + 1):
        status, printed = run_client(request, transfer, until)
        if status == 0:
            (request.bookkeeping / "client.log").unlink()
            return
        permanent = PERMANENT.search(printed) is not None
        if permanent or attempt == request.retries:
            break
        time.sleep(min(2.0**attempt, max(0.0, until - time.monotonic())))
    lines = last_lines(printed, transfer.token)
    tries = f"{attempt} of {request.retries} tries" + (", the error is a lasting one" if permanent else "")
    raise WeightsError(
        f"{request.client} could not fetch {request.name}: exit status {status} after {tries}. "
        "Files that are whole are kept: mend what its last lines name, then run this again to go on.\n"
        + "\n".join(lines),
        client_status=status,
        client_output=lines,
    )


def inspect(request: Request, progress: ProgressFile) -> Current:
    """Say of each file of the manifest whether it is still what was proven. Reads only."""
    try:
        text = request.manifest.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Current(missing=unusable(None, request))
    manifest = parse_manifest(text)
    missing = unusable(manifest, request)
    if manifest is None or missing:
        return Current(missing=missing)
    root = Path(request.path)
    entries: list[Proven] = manifest["files"]
    full = needs_full_check(request, sum(one.size for one in entries))
    verdicts = {one.path: cheap_check(one, stat_or_none(root / one.path)) for one in entries}
    suspects = [one.path for one in entries if verdicts[one.path] == "touched" or (full and not verdicts[one.path])]
    hashed, seconds = hash_files(root, suspects, progress, durable=False) if suspects else ({}, 0.0)
    good, bad = [], []
    for one in entries:
        verdict, now = verdicts[one.path], hashed.get(one.path)
        if verdict == "missing":
            bad.append(BadFile(one.path, "missing", describe(one.size, one.sha256), "nothing"))
        elif verdict == "size":
            bad.append(BadFile(one.path, "size", f"{one.size} bytes", f"{(root / one.path).stat().st_size} bytes"))
        elif now is not None and now.sha256 != one.sha256:
            bad.append(BadFile(one.path, "sha256", one.sha256, now.sha256))
        else:
            good.append(now or one)
    return Current(
        good=tuple(good),
        bad=tuple(bad),
        touched=tuple(sorted(one.path for one in set(good) - set(entries))),
        hashed_bytes=sum(one.size for one in hashed.values()),
        hash_seconds=seconds,
    )


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


def check_space(request: Request, needed: int, there: int) -> None:
    """Raise WeightsError when what is still to come does not fit."""
    problem = space_problem(request.path, free_bytes(Path(request.path)), needed, there)
    if problem:
        raise WeightsError(problem)


def wanted_files(request: Request, token: str) -> list[Listed]:
    """What the hub lists of the revision, less what the patterns leave out; WeightsError when nothing is left."""
    wanted = selected(fetch_listing(request, token), request.include, request.exclude)
    if not wanted:
        raise WeightsError(
            f"{request.name} has no files that include {list(request.include)} and exclude {list(request.exclude)} "
            "leave. Check the patterns: they match whole paths, * also across /."
        )
    return wanted


def fetch(request: Request, current: Current, progress: ProgressFile, outcome: Outcome) -> None:
    """Fetch what is not proven yet, prove it, and write the manifest; what came of it goes into the outcome.

    Raises WeightsError: before anything is changed when the hub gives no listing or the space is too small, after
    that without a manifest.
    """
    root = Path(request.path)
    token = read_token(request)
    wanted = wanted_files(request, token)
    sizes = {one.path: one.size for one in wanted}
    set_aside_bytes = bytes_there(root, {one.path: sizes[one.path] for one in current.bad if one.path in sizes})
    there = bytes_there(root, sizes) - set_aside_bytes
    check_space(request, sum(sizes.values()), there)
    request.bookkeeping.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        request.manifest.replace(request.manifest.with_name("manifest.before.json"))
    outcome.bad_files = set_aside(request, current.bad)
    kept = {one.path: one for one in current.good}
    missing = [one for one in wanted if compare([one], kept)]
    part = len(missing) < len(wanted) and len(missing) <= MOST_NAMED_FILES
    only = tuple(one.path for one in missing) if part else ()
    if missing:
        download(request, Transfer(only, token, sizes, progress))
    names = [one.path for one in missing if (root / one.path).is_file()]
    hashed, seconds = hash_files(root, names, progress, durable=True)
    proven = {**kept, **hashed}
    bad = compare(wanted, proven)
    if bad:
        raise WeightsError(
            f"{len(bad)} of {len(wanted)} files of {request.name} in {request.path} are not what the hub lists:\n"
            + "\n".join(f"  {one.path}: {one.reason}: expected {one.expected}, found {one.found}" for one in bad)
            + "\nRun this again: the client fetches a wrong file anew. If it stays, the revision moved meanwhile "
            "(pin a commit), or something between this node and the hub changes the data.",
            bad_files=[asdict(one) for one in bad],
        )
    outcome.files = [proven[one.path] for one in wanted]
    write_whole(request.manifest, render_manifest(request, outcome.files, utc_now()))
    outcome.bytes_fetched = max(0, bytes_there(root, sizes) - there)
    outcome.hashed_bytes += sum(one.size for one in hashed.values())
    outcome.hash_seconds += seconds


def ensure_present(request: Request, check_mode: bool = False) -> Outcome:
    """Make `path` hold the revision, proven; does nothing and asks nobody when it already does.

    Raises WeightsError when that cannot be done.
    """
    if check_mode:
        return present(request, check_mode=True)
    with locked(Path(request.path), request.lock_timeout):
        return present(request, check_mode=False)


def present(request: Request, check_mode: bool) -> Outcome:
    """ensure_present, with the lock held (or in check mode, where nothing is written)."""
    root = Path(request.path)
    progress = ProgressFile(request.progress_file, PROGRESS_SECONDS)
    current = inspect(request, progress)
    outcome = Outcome(actions=plan(current, request), files=list(current.good), bad_files=list(current.bad))
    outcome.changed = bool(outcome.actions)
    outcome.hashed_bytes, outcome.hash_seconds = current.hashed_bytes, current.hash_seconds
    bad = [one.path for one in current.bad]
    outcome.before = {"complete": not current.missing, "bad_files": bad, "touched_files": list(current.touched)}
    outcome.after = {"complete": True, "bad_files": [], "touched_files": []}
    if outcome.changed and request.expected_bytes and current.missing:
        there = sum(size for _, size in files_under(root))
        check_space(request, request.expected_bytes, there)
    if current.touched and not current.bad and not check_mode:
        write_whole(request.manifest, render_manifest(request, current.good, utc_now()))
    elif outcome.changed and not check_mode:
        try:
            fetch(request, current, progress, outcome)
        except WeightsError as error:
            if not current.bad:
                raise
            # Why it had to be fetched at all must not get lost behind why it could not be.
            named = "\n".join(f"  {action}" for action in outcome.actions)
            facts = {"bad_files": [asdict(one) for one in outcome.bad_files], **error.facts}
            raise WeightsError(f"{error}\nThis was to mend the files in {request.path}:\n{named}", **facts) from error
    known = {one.path for one in outcome.files} | {one.path for one in current.bad}
    if known or not check_mode:
        outcome.extra_files = sorted(name for name, _ in files_under(root) if name not in known)
    return outcome


def ensure_absent(request: Request, check_mode: bool = False) -> Outcome:
    """Remove the directory, bookkeeping last, so that an interrupted removal can go on.

    Raises WeightsError when the directory is not one that this module made.
    """
    root = Path(request.path)
    outcome = Outcome(before={"exists": os.path.lexists(root)}, after={"exists": False})
    if not os.path.lexists(root):
        return outcome
    if root.is_symlink() or not request.bookkeeping.is_dir():
        raise WeightsError(
            f"{root} is {'a link' if root.is_symlink() else 'no directory that this module filled'} "
            f"({request.bookkeeping} is what marks one). Look at it, and remove it by hand if it may go."
        )
    outcome.changed, outcome.actions = True, [f"remove {root}"]
    if check_mode:
        return outcome
    with locked(root, request.lock_timeout):
        request.manifest.unlink(missing_ok=True)
        for entry in root.iterdir():
            if entry.name != BOOKKEEPING:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        shutil.rmtree(root)
    return outcome


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM, SIGHUP and SIGINT into a WeightsError, so that the client is stopped on the way out."""

    def handler(number: int, frame: FrameType | None) -> None:
        for sign in before:  # a second one must not interrupt the stopping
            signal.signal(sign, signal.SIG_IGN)
        raise WeightsError(
            f"stopped by {signal.Signals(number).name}. What was fetched is kept: run this again to go on."
        )

    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    for sign in before:
        signal.signal(sign, handler)
    try:
        yield
    finally:
        for sign, old in before.items():
            signal.signal(sign, old)


def ensure(request: Request, state: str, check_mode: bool = False) -> dict[str, Any]:
    """Check the parameters, do what is asked, and return the module's result.

    Raises WeightsError with all wrong parameters at once, or with what stood in the way.
    """
    found = problems(request)
    if found:
        raise WeightsError("\n".join(found))
    started = time.monotonic()
    with stopped_by_signals():
        outcome = (ensure_present if state == "present" else ensure_absent)(request, check_mode)
    return outcome.as_result(request, time.monotonic() - started)
