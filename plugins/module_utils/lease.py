"""The lease of a node: who may change it now, until when, and the log of who did.

A lease is judged by the node's own clock that only goes forward, seconds since boot, never by the time of day: a clock
that is an hour off, or is set while a run goes on, neither ends a lease nor keeps one alive. Times of day are written
beside it for people.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
DIRECTORY = "lease"
AUDIT = "audit"
AUDIT_BYTES = 1_000_000
AUDIT_FILES = 5
AUDITED = ("run", "who", "origin", "verb", "why", "deployment", "plan_id")
LOCK_SECONDS = 20.0
FREE, HELD, EXPIRED = "free", "held", "expired"


class LeaseError(Exception):
    """A lease file that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Clock:
    """A moment of a node: which boot, and seconds since it, suspended ones included."""

    boot: str
    seconds: float

    @classmethod
    def now(cls) -> Clock:
        """This moment."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, time.clock_gettime(time.CLOCK_BOOTTIME))

    def since(self, earlier: Clock) -> float:
        """Seconds from an earlier moment; where the node was started again since, at least so many."""
        return max(0.0, self.seconds - earlier.seconds) if self.boot == earlier.boot else self.seconds


@dataclass(frozen=True)
class Lease:
    """Who may change a node.

    run: the one run of a verb that holds it. controller: what tells whether that run still lives, on its own machine.
    taken, renewed: the node's clock. since: time of day, UTC, for people. ttl: seconds without a sign of life after
    which it is free. doing: what the run was at when it was last heard of.
    """

    run: str
    who: str
    origin: str
    verb: str
    why: str
    deployment: str
    plan_id: str
    since: str
    ttl: float
    taken: Clock
    renewed: Clock
    controller: Mapping[str, Any]
    doing: str = ""

    def state(self, now: Clock) -> str:
        """Held or expired."""
        return HELD if now.since(self.renewed) <= self.ttl else EXPIRED

    def told(self, now: Clock) -> dict[str, Any]:
        """What is shown of it: ages in seconds."""
        silent = now.since(self.renewed)
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("taken", "renewed")},
            "state": self.state(now),
            "age": round(now.since(self.taken), 1),
            "silent": round(silent, 1),
            "expires_in": round(max(0.0, self.ttl - silent), 1),
        }


def read(state_directory: str) -> Lease | None:
    """The lease that lies on the node, none where there is none.

    Raises:
        LeaseError: where it cannot be read: nobody may take it for free.
    """
    folder = Path(state_directory, DIRECTORY)
    try:
        content = json.loads((folder / "lease.json").read_text())
        taken = Clock(**content.pop("taken"))
        content.pop("format_version")
        lease = Lease(taken=taken, renewed=taken, **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LeaseError(
            f"{folder}/lease.json cannot be read ({error}). Look who is at work on this node; if nobody is, break it: "
            "bin/stepladder lease -e lease_break_reason=..."
        ) from error
    with contextlib.suppress(OSError, ValueError, IndexError):
        boot, seconds, doing = (folder / f"renewed-{lease.run}").read_text().split(" ", 2)
        renewed = Clock(boot, float(seconds))
        # A moment of another boot than this one was taken in says more than the start itself. One before the start is
        # of an earlier take by the same run, or cut off: /proc/uptime counts only hundredths of a second.
        later = renewed.boot != taken.boot or renewed.seconds > taken.seconds
        lease = replace(lease, renewed=renewed if later else taken, doing=doing.strip())
    return lease


def last_run(state_directory: str) -> str:
    """The run that had the node's lease last; empty where none ever had it."""
    try:
        return Path(state_directory, DIRECTORY, "last").read_text().strip()
    except OSError:
        return ""


def take(
    state_directory: str, wanted: Mapping[str, Any], supersede: str = "", seen: str | None = None
) -> dict[str, Any]:
    """Take the node's lease.

    Args:
        state_directory: where the toolkit keeps everything on the node.
        wanted: `run who origin verb why deployment plan_id ttl controller`, as in `Lease`.
        supersede: a run that is known to live no more; its lease is taken over.
        seen: the run that had it last when the node was looked at; None where nobody looked.

    Returns:
        `taken`, and where it was not: `holder` or `frozen`, the one in whose way this run is, or `stale` where another
        run was at work since the node was looked at.
    """
    with _locked(state_directory):
        now, held = Clock.now(), read(state_directory)
        frozen = read_freeze(state_directory)
        if frozen:
            return {"taken": False, "frozen": frozen}
        if held and held.run != wanted["run"]:
            if held.state(now) == HELD and held.run != supersede:
                return {"taken": False, "holder": held.told(now)}
            gone = (
                "the run is gone" if held.run == supersede else f"no sign of life for {now.since(held.renewed):.0f} s"
            )
            _end(state_directory, held, now, f"taken over: {gone}")
        if seen is not None and seen != last_run(state_directory):
            return {"taken": False, "stale": True}
        lease = Lease(since=utc(), taken=now, renewed=now, **wanted)
        # The log first: a run that cannot be written down does not begin.
        audit(state_directory, {"event": "begin", **_audited(lease)})
        _replace(Path(state_directory, DIRECTORY, "last"), f"{lease.run}\n")
        _write(Path(state_directory, DIRECTORY), lease)
    return {"taken": True}


def release(state_directory: str, run: str, outcome: str) -> bool:
    """Give the lease back; nothing happens where the run does not hold it. Whether it did."""
    if not Path(state_directory, DIRECTORY).is_dir():
        return False
    with _locked(state_directory):
        held = read(state_directory)
        if held is None or held.run != run:
            return False
        _end(state_directory, held, Clock.now(), outcome)
    return True


def break_it(state_directory: str, who: str, origin: str, why: str) -> dict[str, Any]:
    """Take a lease away from whoever has it; its run stops at its next step. What was broken, empty for nothing."""
    if not Path(state_directory, DIRECTORY).is_dir():
        return {}
    with _locked(state_directory):
        now = Clock.now()
        record = {"event": "break", "who": who, "origin": origin, "why": why}
        try:
            held = read(state_directory)
        except LeaseError as error:
            audit(state_directory, {**record, "unreadable": str(error)})
            Path(state_directory, DIRECTORY, "lease.json").unlink()
            return {"unreadable": True}
        if held is None:
            return {}
        audit(state_directory, {**record, "broken": _audited(held)})
        _end(state_directory, held, now, f"broken by {who} from {origin}: {why}")
    return held.told(now)


def holds(state_directory: str, run: str) -> str:
    """Why a run does not hold the node's lease; empty where it does. A lease that nobody took meanwhile is its own."""
    try:
        held = read(state_directory)
    except LeaseError as error:
        return str(error)
    if held is None:
        return "the lease was broken, or was given back"
    return (
        ""
        if held.run == run
        else f"the lease is held by {held.who} from {held.origin} for {held.verb} since {held.since}"
    )


def freeze(state_directory: str, who: str, origin: str, why: str) -> bool:
    """Let no run change the node until it is unfrozen. Whether that is new."""
    with _locked(state_directory):
        if (read_freeze(state_directory) or {}).get("why") == why:
            return False
        content = {"format_version": FORMAT_VERSION, "who": who, "origin": origin, "why": why, "since": utc()}
        _replace(Path(state_directory, "freeze.json"), json.dumps(content, sort_keys=True) + "\n")
        audit(state_directory, {"event": "freeze", "who": who, "origin": origin, "why": why})
    return True


def unfreeze(state_directory: str, who: str, origin: str, why: str) -> bool:
    """End a freeze. Whether there was one."""
    if not Path(state_directory, "freeze.json").exists():
        return False
    with _locked(state_directory):
        Path(state_directory, "freeze.json").unlink(missing_ok=True)
        audit(state_directory, {"event": "unfreeze", "who": who, "origin": origin, "why": why})
    return True


def read_freeze(state_directory: str) -> dict[str, Any] | None:
    """Who froze the node, since when and why; none where nobody did. A file that cannot be read freezes too."""
    path = Path(state_directory, "freeze.json")
    try:
        content = json.loads(path.read_text())
        return {name: str(content[name]) for name in ("who", "origin", "why", "since")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {"who": "unknown", "origin": "", "why": f"{path} cannot be read: {error}", "since": "unknown"}


def audit(state_directory: str, record: Mapping[str, Any]) -> None:
    """Add a line to the node's log; the oldest lines go when it has grown to five files of a megabyte.

    The line is on the disk when this returns.
    """
    folder = Path(state_directory, AUDIT)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    append(folder / "audit.jsonl", {"format_version": FORMAT_VERSION, "at": utc(), **record})


def log(state_directory: str, by: Mapping[str, Any], outcome: str) -> str:
    """Write down that a verb without a lease begins, or how it ended; why that cannot be written, empty where it was.

    A full disk is no reason to leave clients with a replica that is sick.

    Args:
        state_directory: where the toolkit keeps everything on the node.
        by: `run who origin verb why deployment plan_id`.
        outcome: how it ended, empty where it begins.
    """
    record = {"event": "begin"} if not outcome else {"event": "end", "outcome": outcome}
    try:
        audit(state_directory, {**record, **{name: by[name] for name in AUDITED}})
    except OSError as error:
        return f"{Path(state_directory, AUDIT)}/audit.jsonl could not be written: {error.strerror}"
    return ""


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a log that is kept within bounds, whole or not at all.

    Raises OSError, which names the file.
    """
    line = json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n"
    if path.exists() and path.stat().st_size + len(line.encode()) > AUDIT_BYTES:
        for number in range(AUDIT_FILES - 1, 0, -1):
            older = path.with_suffix(f".{number - 1}{path.suffix}") if number > 1 else path
            if older.exists():
                older.replace(path.with_suffix(f".{number}{path.suffix}"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        _add(descriptor, line.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _add(descriptor: int, content: bytes) -> None:
    before = os.fstat(descriptor).st_size
    written = os.write(descriptor, content)
    if written < len(content):
        # The next line would go on from here. Another one that was added meanwhile stays.
        if os.fstat(descriptor).st_size == before + written:
            os.ftruncate(descriptor, before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def fault_text(error: OSError, state_directory: str) -> str:
    """What to say where a lease or a log cannot be written, with what mends it."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    return (
        f"{error.filename or state_directory}: {error.strerror}. What cannot be written down does not begin. Free some "
        f"MB there by hand (du -xah {state_directory} | sort -h | tail shows what is large; old logs and "
        "evidence of deployments may go); then run again, or let prune and weights-prune free more."
    )


def utc() -> str:
    """The time of day."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _audited(lease: Lease) -> dict[str, Any]:
    return {name: getattr(lease, name) for name in AUDITED}


def _end(state_directory: str, held: Lease, now: Clock, outcome: str) -> None:
    """Log how a run ended, then free the node: cut between the two, the lease still expires by itself.

    A log that cannot be written, on a full disk, keeps no node occupied; the controller's has the line too.
    """
    seconds = round(now.since(held.taken), 1)
    with contextlib.suppress(OSError):
        audit(state_directory, {"event": "end", **_audited(held), "outcome": outcome, "seconds": seconds})
    folder = Path(state_directory, DIRECTORY)
    (folder / "lease.json").unlink(missing_ok=True)
    for file in folder.glob("renewed-*"):
        file.unlink(missing_ok=True)


def _write(folder: Path, lease: Lease) -> None:
    content = {name: value for name, value in asdict(lease).items() if name not in ("renewed", "doing")}
    _replace(folder / "lease.json", json.dumps({"format_version": FORMAT_VERSION, **content}, sort_keys=True) + "\n")


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    fresh.replace(path)


@contextlib.contextmanager
def _locked(state_directory: str) -> Iterator[None]:
    """One at a time may read and then write; held for milliseconds."""
    folder = Path(state_directory, DIRECTORY)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise LeaseError(f"{folder}/lock was held by another process for {LOCK_SECONDS:.0f} s") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def renewal(state_directory: str, run: str, doing: str) -> str:
    """Shell command that says on the node that a run still lives; exit status 3 where it holds the lease no more."""
    quoted = "'" + " ".join(doing.split()).replace("'", "'\"'\"'") + "'"
    folder = "'" + str(Path(state_directory, DIRECTORY)).replace("'", "'\"'\"'") + "'"
    return (
        f'cd {folder} 2>/dev/null && grep -qsF \'"run": "{run}"\' lease.json || exit 3; umask 077; '
        "read -r boot < /proc/sys/kernel/random/boot_id; read -r up rest < /proc/uptime; "
        f'printf \'%s %s %s\\n\' "$boot" "$up" {quoted} > renewed-{run}.new && mv renewed-{run}.new renewed-{run}'
    )
