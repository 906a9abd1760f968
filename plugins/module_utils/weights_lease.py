"""One writer for a store of weights, also where several nodes share its file system.

On one node a lock of the kernel decides, which ends with its process. Between nodes a lease file does: its holder
renews it, and it is stale when a waiter has seen it unchanged for a minute of the waiter's own steady clock, so that
no wrong or jumping clock can end it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ansible_collections.stepladder.core.plugins.module_utils.watched import LockTimeoutError, exclusive
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import read_state
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import BOOKKEEPING, WeightsError

RENEW_SECONDS = 5.0
STALE_SECONDS = 60.0
SETTLE_SECONDS = 2.0
POLL_SECONDS = 1.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def lock_of(path: Path) -> Path:
    """The lock file beside a store, for the processes of one node."""
    return path.with_name(path.name + ".lock")


def lease_of(path: Path) -> Path:
    """The lease file beside a store, for nodes that share its file system."""
    return path.with_name(path.name + ".lease")


@contextlib.contextmanager
def locked(path: Path, timeout: float, say: Callable[[str], object] = lambda text: None) -> Iterator[None]:
    """Be the only writer of a store.

    Args:
        timeout: seconds to wait for another.
        say: told for whom this waits, and how far that one is.

    Raises:
        WeightsError: another holds it after `timeout` seconds; the text names it.
    """
    until = time.monotonic() + timeout
    held = threading.Event()

    def tell(holder: str) -> None:
        while not held.is_set():
            told = read_state(path / BOOKKEEPING).get("text", "it has told nothing yet")
            say(f"waiting for {holder}, which works on {path}: {told}")
            held.wait(POLL_SECONDS)

    def waits(holder: str) -> None:
        threading.Thread(target=tell, args=(holder,), daemon=True).start()

    try:
        with exclusive(lock_of(path), timeout, on_wait=waits, poll_s=0.2):
            held.set()
            with leased(path, until, say):
                yield
    except LockTimeoutError as error:
        raise WeightsError(f"another run works on {path}: {error}. What it has fetched is kept.") from error
    finally:
        held.set()


@contextlib.contextmanager
def leased(path: Path, until: float, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the lease; the node's own lock is held already."""
    lease = lease_of(path)
    token = secrets.token_hex(8)
    own = {"host": socket.gethostname(), "boot": read(BOOT_ID).strip(), "pid": os.getpid(), "token": token}
    fresh = lease.with_name(f"{lease.name}.{token}")
    ended = threading.Event()
    lost: list[str] = []
    try:
        take(path, own, fresh, until, say)
        renewal = threading.Thread(target=renew, args=(lease, own, fresh, ended, lost), daemon=True)
        renewal.start()
        try:
            yield
        except WeightsError as error:
            if lost:  # it ended this process, by a signal that says nothing of it
                text = f"the lease on {path} {lost[0]}. What was fetched is kept: run this again to go on."
                raise WeightsError(text, **error.facts) from error
            raise
        finally:
            ended.set()
            renewal.join()
            if holder(read(lease)).get("token") == token:
                lease.unlink(missing_ok=True)
    finally:
        fresh.unlink(missing_ok=True)


def take(path: Path, own: dict[str, object], fresh: Path, until: float, say: Callable[[str], object]) -> None:
    """Get the lease, by making it, or by taking over one that nobody renews any more."""
    lease = lease_of(path)
    seen, since = "", time.monotonic()
    while True:
        fresh.write_text(json.dumps(own))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, lease)  # made whole or not at all, on NFS too
            return
        text = read(lease)
        if text != seen:
            seen, since = text, time.monotonic()
        other = holder(text)
        # This node's lock is held here, so a lease of this node is one that a dead process left.
        left_here = (other.get("host"), other.get("boot")) == (own["host"], own["boot"])
        if text and (left_here or time.monotonic() - since >= STALE_SECONDS):
            fresh.replace(lease)
            if not left_here:
                time.sleep(SETTLE_SECONDS)  # two that take it over at once: the last one has it
            if holder(read(lease)).get("token") == own["token"]:
                return
            continue
        who = f"{other.get('host', 'an unknown node')} (process {other.get('pid', 'unknown')})"
        told = str(read_state(path / BOOKKEEPING).get("text", "it has told nothing yet"))
        if time.monotonic() >= until:
            raise WeightsError(
                f"{who} still writes {path}, and the time to wait is over; it told last: {told}. "
                f"Wait for it, or end it; where it is gone, {lease} is taken over a minute after its last sign of life."
            )
        say(f"waiting for {who}, which writes {path}: {told}")
        time.sleep(POLL_SECONDS)


def renew(lease: Path, own: dict[str, object], fresh: Path, ended: threading.Event, lost: list[str]) -> None:
    """Give a sign of life until the end; end this process where that is not possible any more, `lost` says why.

    What a file system cannot tell for a moment is no loss; that nobody saw a sign of life for so long that another
    may take the lease over is one.
    """
    count, renewed = 0, time.monotonic()
    while not ended.wait(RENEW_SECONDS):
        trouble = "what is in it is no lease"
        try:
            text = lease.read_text(encoding="utf-8")
            other = holder(text)
            if other.get("token") == own["token"]:
                count += 1
                fresh.write_text(json.dumps({**own, "signs_of_life": count}))
                fresh.replace(lease)
                renewed = time.monotonic()
                continue
            if other.get("token"):
                lost.append(f"was taken over by {other.get('host')} (process {other.get('pid')})")
        except FileNotFoundError:
            lost.append(f"was taken away: {lease} is gone")
        except (OSError, ValueError) as error:
            trouble = str(error)
        # A renewal's time before others take it over.
        if not lost and time.monotonic() - renewed >= STALE_SECONDS - RENEW_SECONDS:
            lost.append(f"could not be renewed: {trouble}")
        if lost:
            os.kill(os.getpid(), signal.SIGTERM)  # another one may write now: what is running here must not
            return


def read(path: Path) -> str:
    """A small text file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def holder(text: str) -> dict[str, object]:
    """Who holds a lease; empty where its text says nothing."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
