"""What a rollout does at a gateway: replicas out of rotation before their engines stop, and back after the gate.

What a rollout took out is marked in a file beside the gateway's own with the run that did, so that a later run can tell
it from what a person drained, and put it back where the first run did not come to that. A job on this host outlives a
controller that was killed: it puts back only what is still marked as its own run's.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ansible_collections.stepladder.core.plugins.module_utils import haproxy, watched

MARKS = "rollout.json"
LOCK = "rollout.lock"
LOCK_SECONDS = 20.0


@dataclass(frozen=True)
class Wanted:
    """What a rollout wants of a gateway.

    patient: replicas whose requests are waited for, `seconds` at most. may_break: go on where requests will be broken
    off, or no replica is left to give them to. run: the rollout's mark.
    """

    replicas: Sequence[int]
    patient: Sequence[int]
    seconds: float
    may_break: bool = False
    run: str = ""


def marks(directory: str) -> dict[int, str]:
    """Replicas that a rollout took out and nobody put back yet, with its run; a file of before names no run."""
    try:
        found = json.loads(Path(directory, MARKS).read_text())["replicas"]
        runs = found if isinstance(found, dict) else dict.fromkeys(found, "")
        return {int(number): str(run) for number, run in runs.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def marked(directory: str) -> set[int]:
    """The replicas alone."""
    return {*marks(directory)}


def mark(directory: str, replicas: Mapping[int, str]) -> None:
    """Write down whom rollouts took out, and which run it was."""
    path = Path(directory, MARKS)
    if replicas:
        named = {str(number): replicas[number] for number in sorted(replicas)}
        haproxy.write_private(path, json.dumps({"format_version": 2, "replicas": named}))
    else:
        path.unlink(missing_ok=True)


def forget(directory: str, replica: int) -> None:
    """From now on a person decides about the replica."""
    if replica in marks(directory):
        with _alone(directory):
            mark(directory, {number: run for number, run in marks(directory).items() if number != replica})


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """One at a time reads marks, changes servers and writes marks; for milliseconds."""
    try:
        with watched.exclusive(Path(directory, LOCK), LOCK_SECONDS, poll_s=0.05):
            yield
    except watched.LockTimeoutError as error:
        raise haproxy.GatewayError(str(error)) from None


def not_there(directory: str, deployment: str) -> str:
    """Why nobody asks through this gateway; empty where it runs."""
    if not Path(directory, "current").is_dir():
        return f"there is no gateway for {deployment} yet"
    try:
        haproxy.Master(directory).current()
    except haproxy.GatewayError as error:
        return f"the gateway for {deployment} does not run ({error})"
    return ""


def to_drain(servers: dict[str, haproxy.Server], wanted: Wanted, marks: Collection[int]) -> tuple[list[int], list[str]]:
    """The replicas to take out now, and what is to be said of the others.

    Raises:
        GatewayError: no replica would be left to give requests to.
    """
    take, lines = [], []
    for number in wanted.replicas:
        server = servers.get(f"replica-{number}")
        if server is None:
            lines.append(f"the gateway does not know replica {number} yet: nothing to drain")
        elif not server.drained:
            take.append(number)
        elif number not in marks:
            lines.append(f"replica {number} was drained before, and stays so until somebody runs 'undrain'")
    names = {f"replica-{number}" for number in wanted.replicas}
    taking = [name for name, server in servers.items() if haproxy.in_rotation(server)]
    if any(name in names for name in taking) and not any(name not in names for name in taking):
        others = [s for name, s in sorted(servers.items()) if name not in names]
        seen = ", ".join(f"{s.name.replace('-', ' ')}: {'drained' if s.drained else s.status}" for s in others)
        text = f"no other replica takes requests ({seen or 'there is none'})"
        if not wanted.may_break:
            raise haproxy.GatewayError(
                f"Replica {_listed(take)} was not drained, {text}: clients would get 503. Nothing was stopped here. "
                "Bring another one up ('status', 'undrain'), or add -e deploy_break_requests=true."
            )
        lines.append(f"{text}: clients get 503 until replica {_listed(take)} is back")
    return take, lines


def take_out(
    master: haproxy.Master, wanted: Wanted, tell: Callable[[str], object], check_mode: bool
) -> tuple[bool, list[str]]:
    """Drain replicas and wait for their requests; whether anything changed, and what is to be said.

    Raises:
        GatewayError: requests are left when the time is over, those that were taken out are back then; or somebody else
            put one back meanwhile.
    """
    directory = str(master.directory)
    found = marks(directory)
    servers = master.servers()
    take, lines = to_drain(servers, wanted, found)
    waited = [number for number in wanted.patient if f"replica-{number}" in servers]
    # What a run of before took out is this one's from now on, so that no job that it left behind puts it back.
    ours = [number for number in wanted.replicas if number in take or (number in found and _known(servers, number))]
    fresh = [number for number in ours if number in take or found[number] != wanted.run]
    if check_mode:
        return bool(fresh or _in_flight(master, waited)), lines
    if fresh:
        _drain(master, take, fresh, wanted.run)
    name = f"replica {_listed(waited)}"
    left, end = 0, time.monotonic() + wanted.seconds
    while waited:
        seconds = end - time.monotonic()
        left = haproxy.wait_until_idle(lambda: _in_flight(master, waited), seconds, tell, name)
        again = _not_drained(master, ours, wanted.run)
        if again:
            _drain(master, again, again, wanted.run)
        if left or not again:
            break
    if left and not wanted.may_break:
        put_back(master, ours, 0, check_mode=False, run=wanted.run)
        gets = "gets requests again" if {*waited} <= {*ours} else "stays out of rotation as it was before"
        raise haproxy.GatewayError(
            f"{name.capitalize()} still has {left} request(s) in flight after {wanted.seconds:.0f} s. It was not "
            f"stopped, and {gets}. Give them longer (-e deploy_drain_seconds=...), or add -e "
            "deploy_break_requests=true, which breaks them off."
        )
    if left:
        lines.append(f"{name}: {left} request(s) are left after {wanted.seconds:.0f} s and will be broken off")
    return bool(take), lines


def _known(servers: Mapping[str, haproxy.Server], number: int) -> bool:
    return f"replica-{number}" in servers


def _drain(master: haproxy.Master, take: Sequence[int], ours: Sequence[int], run: str) -> None:
    """Drain some, and mark them and others as a run's."""
    directory = str(master.directory)
    with _alone(directory):
        # First, so that what is drained is never without its mark.
        mark(directory, marks(directory) | dict.fromkeys(ours, run))
        for number in take:
            master.change(f"set server {haproxy.BACKEND}/replica-{number} state drain")
        if take:
            master.keep_state()


def _not_drained(master: haproxy.Master, ours: Sequence[int], run: str) -> list[int]:
    """Which of those that a run took out get requests all the same.

    Raises:
        GatewayError: a person put one back, or another run has taken it over. One that a person drained stays out.
    """
    found, servers = marks(str(master.directory)), master.servers()
    there = [number for number in ours if not servers[f"replica-{number}"].drained]
    if other := [n for n in ours if found.get(n, run) != run or (n in there and n not in found)]:
        raise haproxy.GatewayError(
            f"Replica {_listed(other)} was not stopped: while its requests were waited for, somebody else put it back "
            "or took it over ('status' shows it)."
        )
    return there


def put_back(
    master: haproxy.Master,
    replicas: Collection[int] | None,
    seconds: float,
    check_mode: bool,
    urls: Mapping[int, str] | None = None,
    *,
    run: str | None = None,
) -> list[int]:
    """Put back what a rollout took out, and tell which those are.

    Args:
        master: HAProxy's.
        replicas: of these; none is all that are marked.
        seconds: to wait until each gets requests; 0 does not wait.
        check_mode: whether to say only which.
        urls: by replica where it answers now. One that the gateway still has at another place stays out and marked: the
            gateway's next configuration has the place, and puts it back.
        run: only what is marked as this run's; none is every run's.

    Raises:
        GatewayError: one gets no requests in that time.
    """
    directory = str(master.directory)
    with contextlib.nullcontext() if check_mode else _alone(directory):
        found = marks(directory)
        stay = _moved(master, urls or {})
        ours = [number for number in found if replicas is None or number in replicas]
        ours = sorted(number for number in ours if number not in stay and run in (None, found[number]))
        servers = master.servers()
        back = [number for number in ours if _known(servers, number) and servers[f"replica-{number}"].drained]
        if check_mode:
            return back
        for number in back:
            master.change(f"set server {haproxy.BACKEND}/replica-{number} state ready")
        if back:
            master.keep_state()
        if ours:
            mark(directory, {number: run for number, run in found.items() if number not in ours})
    end = time.monotonic() + seconds
    out = []
    for number in back if seconds else ():
        server = _wait_until_up(master, f"replica-{number}", end)
        if not haproxy.in_rotation(server):
            said = "; ".join(part for part in (server.check, server.agent) if part)
            out.append(f"replica {number} at {server.address}: {server.status} ({said})")
    if out:
        raise haproxy.GatewayError(
            f"No longer drained, but without requests after {seconds:.0f} s: {', '.join(out)}. The engine answered "
            "when it was asked directly: does the gateway's host reach that address?"
        )
    return back


def _moved(master: haproxy.Master, urls: Mapping[int, str]) -> set[int]:
    """Replicas that answer at another place than the gateway has them at."""
    places = master.addresses()
    return {number for number, url in urls.items() if places.get(f"replica-{number}") != urlsplit(url).netloc}


def _wait_until_up(master: haproxy.Master, name: str, end: float) -> haproxy.Server:
    return haproxy.wait_until_up(lambda: master.servers()[name], end - time.monotonic())


def _in_flight(master: haproxy.Master, replicas: Collection[int]) -> int:
    return sum(master.in_flight(f"replica-{number}") for number in replicas)


def _listed(replicas: Sequence[int]) -> str:
    return ", ".join(str(number) for number in replicas)
