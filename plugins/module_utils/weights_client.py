"""The hub's own client, unmodified: run, watched, tried again, stopped."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from ansible_collections.stepladder.core.plugins.module_utils.weights_hub import literal_pattern
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import files_under
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import Progress, full_disk
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError, endpoint_of

CLIENT_LINES = 15
TERMINATE_SECONDS = 10.0
# What the client leaves behind of a file that it has not finished: `.incomplete`, and the parts of a ranged download.
UNFINISHED = re.compile(r"(\.incomplete|\.parallel_tmp|_\d+_\d+)$")
# Errors of the clients that another try will not mend: hash mismatch after its own three tries, refused, not found. The
# last two are those of HuggingFace's (huggingface_hub 2.4.0).
PERMANENT = re.compile(
    r"\[E2020\]|\| code=40[134]\b|code=40[134]$|Client error '40[134] |\b403 Forbidden\b", re.MULTILINE
)
# Set for the child from the parameters alone, so that a login or a variable left on the node cannot change the source.
OWN_VARIABLES = (
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_CACHE",
    "MODELSCOPE_DOMAIN",
    "MODELSCOPE_ENDPOINT",
    "MODELSCOPE_HOME",
    "MODELSCOPE_PREFER_AI_SITE",
    "PYTHONHOME",
    "PYTHONPATH",
)
HF_LEFTOVERS = ".cache/huggingface"  # where HuggingFace's client keeps its notes and unfinished files
# Ends with the module, even by SIGKILL (prctl(2), PR_SET_PDEATHSIG), then becomes the client. It is ended by SIGKILL
# itself: a halted process would take SIGTERM only once somebody has it go on.
LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
TICK_SECONDS = 0.5
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two runs of the client


@dataclass(frozen=True)
class Transfer:
    """What the client is run for: single files of a repair (none: all), the sizes of all wanted files in bytes.

    `tick` is called about twice a second while it runs, and `saw` with the bytes on the disk. `until` is when it is
    given up, in monotonic seconds. `streams` are connections for each large file, where the client knows them.
    """

    only: tuple[str, ...]
    token: str
    sizes: dict[str, int]
    progress: Progress
    tick: Callable[[], object] = lambda: None
    until: float = math.inf
    streams: int = 1
    saw: Callable[[int], object] = lambda there: None


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


def client_environment(request: Request, base: dict[str, str], token: str, streams: int = 1) -> dict[str, str]:
    """The client's environment: the node's own, less what could change the source, plus what the request says."""
    own = {key: value for key, value in base.items() if key not in OWN_VARIABLES}
    # Its locks live with the weights: two nodes on one shared directory then exclude each other.
    home = str(request.bookkeeping / "client")
    own.update({"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"})
    if request.source == "huggingface":
        own.update({"HF_ENDPOINT": endpoint_of(request), "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"})
        own.update({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})
        return own
    own.update(
        {
            "MODELSCOPE_ENDPOINT": endpoint_of(request),
            "MODELSCOPE_CACHE": home,
            "MODELSCOPE_HOME": home,
            "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(request.total_timeout),
        }
    )
    if streams > 1:  # of files of more than 500 MiB (modelscope_hub/constants.py, DOWNLOAD_PARALLEL_THRESHOLD)
        own["MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS"] = str(streams)
    if token:
        own["MODELSCOPE_API_TOKEN"] = token
    return own


def last_lines(text: str, token: str, count: int = CLIENT_LINES) -> list[str]:
    """The last lines that say something (the client's banner does not), with the token blotted out."""
    if token:
        text = text.replace(token, "********")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if re.search(r"[^\W\d_]{3}", line)][-count:]


def bytes_there(path: Path, sizes: Mapping[str, int]) -> int:
    """Bytes of the wanted files (path to size) that are on disk, unfinished ones included."""
    return sum(bytes_by_file(path, sizes).values())


def bytes_by_file(path: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes that are on disk of every wanted file (path to size) that was begun with."""
    counted: dict[str, int] = {}
    begun = begun_files(sizes)
    for name, size in files_under(path):
        file = name if name in sizes else meant_by(name, begun)
        if file in sizes:
            counted[file] = min(sizes[file], counted.get(file, 0) + size)
    return counted


def remove_unfinished(path: Path, file: str, sizes: Mapping[str, int]) -> None:
    """Remove what the client left of a file that came from elsewhere."""
    begun = begun_files(sizes)
    for name, _ in list(files_under(path)):
        if name not in sizes and meant_by(name, begun) == file:
            (path / name).unlink(missing_ok=True)


def begun_files(files: Iterable[str]) -> dict[str, str]:
    """Where HuggingFace's client writes each of these files until it is whole, up to the first dot of the name.

    As it names them: huggingface_hub 2.4.0, _local_folder.py (incomplete_path), file_download.py.
    """
    found = {}
    for file in files:
        folder, slash, name = file.rpartition("/")
        digest = hashlib.sha1(f"{name}.metadata".encode(), usedforsecurity=False).digest()
        found[f"{HF_LEFTOVERS}/download/{folder}{slash}{base64.urlsafe_b64encode(digest).decode()}"] = file
    return found


def meant_by(name: str, begun: Mapping[str, str]) -> str:
    """The file that an unfinished one is of; `begun` are `begun_files`."""
    return begun.get(re.sub(r"\.[^/]*$", "", name)) or UNFINISHED.sub("", name)


def remove_begun(path: Path) -> None:
    """Remove what HuggingFace's client has begun with: it goes on with none of it, and once killed leaves it there."""
    for unfinished in list((path / HF_LEFTOVERS).rglob("*.incomplete")):
        unfinished.unlink(missing_ok=True)


def start_client(request: Request, transfer: Transfer, out: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the client, which ends with this process.

    Raises WeightsError when there is no such program.
    """
    if shutil.which(request.client) is None:
        raise WeightsError(
            f"the client {request.client} cannot be started: No such program. "
            f"Give the path of the {'hf' if request.source == 'huggingface' else 'modelscope'} executable in the "
            "environment that has it."
        )
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *client_argv(request, transfer.only)],
        env=client_environment(request, dict(os.environ), transfer.token, transfer.streams),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_client(request: Request, transfer: Transfer) -> tuple[int, str]:
    """Run the client once, showing its progress; returns its exit status and what it printed.

    Raises WeightsError when it cannot be started, or when its time is up.
    """
    log = request.bookkeeping / "client.log"
    root = Path(request.path)
    log.touch(mode=0o600)
    remove_begun(root)
    with log.open("wb") as out:
        child = start_client(request, transfer, out)
        brake = Brake(child, request.bytes_per_second, bytes_there(root, transfer.sizes))
        total, looked = sum(transfer.sizes.values()), 0.0
        try:
            while child.poll() is None:
                now = time.monotonic()
                if now >= transfer.until:
                    raise late(request, last_lines(log.read_text("utf-8", "replace"), transfer.token))
                if request.bytes_per_second:
                    brake.hold(bytes_there(root, transfer.sizes))
                if now - looked >= TICK_SECONDS:
                    looked = now
                    there = bytes_there(root, transfer.sizes)
                    transfer.progress.fetching(there, total)
                    transfer.saw(there)
                    transfer.tick()
                time.sleep(0.1)
        finally:
            brake.release()
            stop(child)
        return child.returncode, log.read_text("utf-8", "replace")


class Brake:
    """Keeps a client that knows no limit within one: it is halted while it is ahead, and TCP holds the hub back.

    Args:
        child: leads a process group of its own.
        bytes_per_second: the limit, 0 for none.
        there: bytes on the disk at the start.
    """

    def __init__(self, child: subprocess.Popen[bytes], bytes_per_second: int, there: int) -> None:
        self._child, self._limit, self._before = child, bytes_per_second, there
        self._started = time.monotonic()
        self._halted = False

    def hold(self, there: int) -> None:
        """Halt it or let it go on, by the bytes on the disk now."""
        now = time.monotonic()
        if there <= self._before:  # it is starting: what it did not use then is not due to it later
            self._started = now
        allowed = self._limit * (now - self._started)
        halt = bool(self._limit) and there - self._before > allowed
        if halt != self._halted:
            self._signal(signal.SIGSTOP if halt else signal.SIGCONT)
            self._halted = halt

    def release(self) -> None:
        """Let it go on, so that it can end."""
        if self._halted:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and its whole process group: asked first, killed after ten seconds."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATE_SECONDS)


class Patience:
    """When to try again after a client that failed, and when to give up: not while bytes come.

    Args:
        seconds: without a byte before it is given up.
        there: bytes on the disk now.
    """

    def __init__(self, seconds: float, there: int) -> None:
        self._seconds, self._most = seconds, there
        self._since = time.monotonic()
        self._failures, self._came = 0, False

    def saw(self, there: int) -> None:
        """Take note of the bytes on the disk; some clients remove them again when they fail."""
        if there > self._most:  # more than ever: a wrong part that is fetched anew is no progress
            self._most, self._since, self._came = there, time.monotonic(), True

    def failed(self, there: int) -> float:
        """Seconds to wait before another try; negative: give up."""
        self.saw(there)
        now = time.monotonic()
        if self._came:
            self._failures, self._came = 0, False
            return FIRST_PAUSE
        self._failures += 1
        if now - self._since >= self._seconds:
            return -1.0
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**self._failures, self._since + self._seconds - now)

    @property
    def empty_handed(self) -> float:
        """Seconds without a byte."""
        return time.monotonic() - self._since


def download(request: Request, transfer: Transfer) -> None:
    """Run the client until it succeeds, or no byte came for as long as the request has `patience`.

    Raises WeightsError with the client's last lines; at once where another try cannot help.
    """
    root, tries = Path(request.path), 0
    patience = Patience(request.patience, bytes_there(root, transfer.sizes))
    transfer = replace(transfer, saw=patience.saw)
    while True:
        tries += 1
        status, printed = run_client(request, transfer)
        if status == 0:
            (request.bookkeeping / "client.log").unlink()
            return
        lines = last_lines(printed, transfer.token)
        full = full_disk(request.path)
        if full:
            raise WeightsError(full, client_status=status, client_output=lines)
        permanent = PERMANENT.search(printed) is not None
        pause = patience.failed(bytes_there(root, transfer.sizes))
        if permanent or pause < 0:
            break
        rest(request, transfer, pause, lines[-1] if lines else f"exit status {status}")
    why = "the error is a lasting one" if permanent else f"no byte came for {patience.empty_handed:.0f} s"
    raise WeightsError(
        f"{request.client} could not fetch {request.name}: exit status {status} after {tries} "
        f"{'try' if tries == 1 else 'tries'}, {why}. "
        "Files that are whole are kept: mend what its last lines name, then run this again to go on.\n"
        + "\n".join(lines),
        client_status=status,
        client_output=lines,
    )


def rest(request: Request, transfer: Transfer, seconds: float, said: str) -> None:
    """Wait before another try of the client, and do meanwhile what is done beside it.

    Raises WeightsError when its time is up.
    """
    until = time.monotonic() + seconds
    for _ in range(math.ceil(seconds / TICK_SECONDS)):
        left = until - time.monotonic()
        if left <= 0:
            break
        if time.monotonic() >= transfer.until:
            raise late(request, [said])
        transfer.tick()
        transfer.progress.say("waiting", f"the hub gave nothing ({said}): asked again in {left:.0f} s")
        time.sleep(min(TICK_SECONDS, left))


def late(request: Request, lines: Sequence[str]) -> WeightsError:
    """Its time is up."""
    return WeightsError(
        f"the download of {request.name} did not end in {request.deadline:g} s (deadline) and was "
        "stopped. What was fetched is kept: run this again to go on, or give a longer deadline.",
        client_output=list(lines),
    )
