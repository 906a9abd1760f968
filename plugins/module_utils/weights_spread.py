"""Weights that several nodes fetch together: each brings its share, and they exchange files over their own network.

The bytes between nodes go by BitTorrent, in a program of its own (`spread.py`, beside the role) that this runs, tells
what is there and proven, and asks what came. Every file that came is held against the hub's hash like any other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import preflight, preflight_checks
from ansible_collections.stepladder.core.plugins.module_utils.weights_client import (
    LAUNCH,
    Transfer,
    bytes_by_file,
    bytes_there,
    download,
    remove_unfinished,
    stop,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import (
    BadFile,
    Listed,
    Proven,
    Prover,
    set_aside,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import full_disk
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError

SMALL_BYTES = 16_000_000
RANGED_BYTES = 500 * 1024 * 1024  # beyond, ModelScope's client can fetch parts of a file at a time
RUN_SECONDS = 60.0  # what one run of the client is to take: so long others may have to wait for a slow node
FIRST_RATE = 130e6  # bytes a second from the hub, before any was measured: two files of 4 GB a run
PACE_SECONDS = 10.0  # of a run, before its rate says something
SETTLE_SECONDS = 2.5  # longer than two looks of a peer
MOST_NAMED_FILES = 200
LINGER_SECONDS = 4.0  # at most, until all peers say that they know this one to be done
STALL_SECONDS = 600.0
MOST_WRONG = 3
STEP_SECONDS = 0.2


@dataclass(frozen=True)
class Fellow:
    """What a peer told: whether it answers, was ever met, has everything; what it holds, what it is fetching.

    `lost`: what it held before, and is wrong there. `busy`: it reads what lies there first. `left`: bytes that are to
    come of what it is fetching, at `rate` bytes a second; negative: not known yet. `knows`: that this node is done.
    `why` it was not met yet; empty where it was.
    """

    alive: bool
    met: bool
    done: bool
    have: frozenset[str] = frozenset()
    claims: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    busy: bool = False
    left: Mapping[str, int] = field(default_factory=dict)
    rate: float = -1.0
    knows: bool = False
    why: str = ""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Fellow:
        """From what the program says of it."""
        taken: dict[str, Any] = {key: frozenset(one) if isinstance(one, list) else one for key, one in told.items()}
        return cls(**taken)


@dataclass(frozen=True)
class Claims:
    """Who is to fetch what.

    Args:
        me: this node.
        owners: by path, the node that is to fetch it from the hub.
        givers: nodes that have everything.
        held: by node, what it had of it before, proven.
        workers: files that a run of the hub's client fetches at a time.
        rate: bytes a second that this node had from the hub.
    """

    me: str
    owners: Mapping[str, str]
    givers: Sequence[str] = ()
    held: Mapping[str, Sequence[str]] = field(default_factory=dict)
    workers: int = 8
    rate: float = FIRST_RATE


@dataclass
class View:
    """What is known of the exchange."""

    fellows: dict[str, Fellow] = field(default_factory=dict)
    coming: frozenset[str] = frozenset()
    received: int = 0
    sent: int = 0
    incoming: int = 0


def next_claims(
    wish: Claims,
    missing: Sequence[Listed],
    fellows: Mapping[str, Fellow],
    coming: Iterable[str],
    doubted: Iterable[str] = (),
) -> list[str]:
    """Files to fetch from the hub now: the own ones; those whose owner is gone; idle, those not begun, or far too slow.

    Args:
        wish: who is to fetch what.
        missing: what this node lacks, in the hub's order.
        fellows: the other nodes.
        coming: what is arriving from peers.
        doubted: what came wrong from peers: that they hold it is worth nothing, unless its owner fetched it anew.
    """
    me, arriving, wrong = wish.me, set(coming), set(doubted)
    answering = {name for name, fellow in fellows.items() if fellow.alive}
    fetching = {name for name in answering if not fellows[name].done}
    taken = {path for name in fetching for path in fellows[name].claims}
    held = {path for name in answering for path in fellows[name].have}
    promised = {path for name in answering for path in wish.held.get(name, ()) if path not in fellows[name].lost}
    spared = taken | arriving | ((held | promised) - wrong)
    givers = [fellows[name] for name in answering & set(wish.givers)]
    given = {one.path for one in missing if any(one.path not in giver.lost for giver in givers)} - wrong
    free = [one for one in missing if one.path not in spared | given]
    mine = [one for one in free if wish.owners.get(one.path) == me]
    orphans = [one for one in free if wish.owners.get(one.path) not in {*fetching, me}]
    if orphans and not mine:
        # All that are left divide them alike without asking each other: by turns, in the order of names.
        names = sorted([me, *fetching])
        mine = [one for at, one in enumerate(orphans) if names[at % len(names)] == me]
    if not mine and not arriving:
        # The owner has it and it does not come from there: it came wrong from there too.
        brought = {path for path, owner in wish.owners.items() if owner in answering and path in fellows[owner].have}
        mine = [one for one in free if one.path in brought]
    if not mine and not arriving and all(fellows[name].met and not fellows[name].busy for name in answering):
        mine = spare(free, wish, fellows)
        mine = mine or slowest([one for one in missing if one.path not in held | promised], wish, fellows)
    return [one.path for one in batch(mine, wish.workers, wish.rate)]


def spare(free: Sequence[Listed], wish: Claims, fellows: Mapping[str, Fellow]) -> list[Listed]:
    """Half of the files that a slow owner has not begun with, from their end.

    One that is between two runs of the client is about to take some more, from their beginning.
    """
    by_owner: dict[str, list[Listed]] = {}
    for one in free:
        by_owner.setdefault(wish.owners.get(one.path, ""), []).append(one)
    behind = [
        files if owner in fellows and fellows[owner].claims else files[len(batch(files, wish.workers, wish.rate)) :]
        for owner, files in by_owner.items()
    ]
    longest = max(behind, key=len, default=[])
    return longest[len(longest) // 2 :]


def slowest(missing: Sequence[Listed], wish: Claims, fellows: Mapping[str, Fellow]) -> list[Listed]:
    """The file that one peer alone is fetching and that takes it longest, where this node needs under half as long."""
    sizes = {one.path: one for one in missing}
    fetching = [one for one in fellows.values() if one.alive and not one.done]
    found = []
    for fellow in fetching:
        for path, left in fellow.left.items():
            claimed = sum(path in one.claims for one in fetching)
            if path in sizes and path in fellow.claims and claimed == 1 and fellow.rate >= 0:
                # Its rate is that of all that it is fetching.
                theirs = sum(fellow.left.values()) / fellow.rate if fellow.rate else math.inf
                own = sizes[path].size / max(wish.rate, 1.0)
                if max(2 * own, RUN_SECONDS / 2) < theirs:
                    found.append((theirs, left, sizes[path]))
    return [one for _, _, one in sorted(found, key=lambda each: each[:2])[-1:]]


def rivalled(
    me: str, names: Sequence[str], owners: Mapping[str, str], fresh: Mapping[str, Collection[str]]
) -> set[str]:
    """Files of others that this node leaves to who announced the same meanwhile: the owner, or who is first by name.

    Args:
        me: this node.
        names: what it announced.
        owners: by path, the node that is to fetch it.
        fresh: by node, what it began to fetch since.
    """
    rivals = {path: [name for name, claims in fresh.items() if path in claims] for path in names}
    return {path for path, who in rivals.items() if who and (owners.get(path) in who or min(who) < me)}


def batch(files: Sequence[Listed], workers: int, rate: float) -> list[Listed]:
    """As many as one run of the client takes: those of a minute, so that others can take over what is not begun.

    Args:
        files: that are to be fetched, in this order.
        workers: large files at most.
        rate: bytes a second that come from the hub.
    """
    chosen: list[Listed] = []
    large, total = 0, 0
    for one in files[:MOST_NAMED_FILES]:
        large += one.size >= SMALL_BYTES
        total += one.size
        if chosen and (large > workers or total > rate * RUN_SECONDS * 1.1):
            break
        chosen.append(one)
    return chosen


def streams(files: Iterable[Listed], workers: int) -> int:
    """Connections for each large file of a run, so that few files have as many as many files would."""
    large = [one for one in files if one.size > RANGED_BYTES]
    return max(1, workers // max(1, len(large)))


class EnoughError(Exception):
    """Peers have what this node's client is still fetching."""


def holders_of(port: int, proc: Path = Path("/proc")) -> str:
    """Who listens on a TCP port of this node, as far as this user may see: a download of an earlier run, for one."""
    listening = [
        one
        for name in ("tcp", "tcp6")
        for one in preflight.parse_proc_net_tcp(preflight.read_text(proc / "net" / name))
        if one.port == port
    ]
    user = preflight.user_name(os.geteuid())
    found = [preflight_checks.owner(one, user) for one in preflight.find_owners(listening, "", proc)]
    return "; ".join(sorted(set(found))) or "nobody listens there now"


def alone(fellows: Mapping[str, Fellow]) -> bool:
    """Whether no peer was met and none may come yet."""
    return not any(fellow.met or fellow.alive for fellow in fellows.values())


def all_know(fellows: Mapping[str, Fellow]) -> bool:
    """Whether every peer that answers knows this node to be done."""
    return all(fellow.knows for fellow in fellows.values() if fellow.alive)


def all_served(fellows: Mapping[str, Fellow]) -> bool:
    """Whether no peer needs anything any more: each has everything, or is gone."""
    return all(fellow.done or not fellow.alive for fellow in fellows.values())


class Exchange:
    """One node's part in an exchange; `start` and `close` go together, and `run` is between them.

    Args:
        request: with `spread` as the module takes it.
        wanted: every file of the revision.
        prover: proves what arrives.
        transfer: what the hub's client needs to know.
    """

    def __init__(self, request: Request, wanted: Sequence[Listed], prover: Prover, transfer: Transfer) -> None:
        self._request, self._wanted, self._prover, self._transfer = request, list(wanted), prover, transfer
        self._spread: dict[str, Any] = request.spread
        self._view = View()
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._moved = time.monotonic()
        self._child: subprocess.Popen[str]
        self.troubles: list[str] = []
        self.bad: list[BadFile] = []
        self._doubted: set[str] = set()
        self._given: set[str] = set()
        self._sizes = {one.path: one.size for one in self._wanted}
        self._fetching: tuple[str, ...] = ()
        self._begun, self._before, self._paced = 0.0, 0, 0.0
        self.from_peers = 0

    def start(self, kept: Iterable[Proven]) -> None:
        """Run the program, and offer what is proven already; nothing comes before `run`, which `close` follows."""
        spread, request = self._spread, self._request
        config = request.bookkeeping / "spread.json"
        owners = {path: name for name, paths in spread["shares"].items() for path in paths}
        self._claims = Claims(spread["name"], owners, spread["givers"], spread["held"], request.max_workers)
        wish = {
            "run": spread["run"],
            "name": spread["name"],
            "address": spread["address"],
            "port": spread["port"],
            "root": request.path,
            "incoming": str(request.incoming),
            "torrents": str(request.bookkeeping / "torrents"),
            "peers": spread["peers"],
            "sizes": self._sizes,
            "owners": owners,
            "givers": spread["givers"],
            "bytes_per_second": spread.get("bytes_per_second", 0),
        }
        config.write_text(json.dumps(wish), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        self._log = (request.bookkeeping / "spread.log").open("wb")
        try:
            self._child = subprocess.Popen(
                [spread["python"], "-c", LAUNCH, spread["python"], "-u", spread["program"], str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise WeightsError(f"{spread['python']} cannot be started: {error.strerror}. Run deploy again.") from error
        threading.Thread(target=self._read, daemon=True).start()
        for one in kept:
            self._give(one, fresh=False)

    def _read(self) -> None:
        assert self._child.stdout is not None  # noqa: S101 - stdout=PIPE above; for the type checker
        for line in self._child.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "ended"})

    def _tell(self, **command: object) -> None:
        assert self._child.stdin is not None  # noqa: S101 - stdin=PIPE above; for the type checker
        try:
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()
        except OSError:
            pass  # it ended: its last event says so, and why

    def step(self) -> None:
        """Take in what came from peers and from the hub's client, prove it, and offer it.

        Raises:
            WeightsError: the program for the exchange ended.
        """
        while not self._events.empty():
            self._take(self._events.get())
        fresh = self._prover.look()
        if fresh:
            self._moved = time.monotonic()
        for one in fresh:
            self._give(one, fresh=True)
        for path, wrong in list(self._prover.bad.items()):
            self._tell(do="drop", path=path)
            self.bad += set_aside(self._request, [wrong])
            self._prover.forget(path)
            self._doubt(path)
            if sum(one.path == path for one in self.bad) >= MOST_WRONG:
                raise WeightsError(
                    f"{path} came wrong {MOST_WRONG} times: expected {wrong.expected}, found {wrong.found}. What came "
                    f"lies in {self.bad[-1].quarantine}. Check the disks and the memory of the nodes that have it."
                )

    def _give(self, one: Proven, *, fresh: bool) -> None:
        self._given.add(one.path)
        self._tell(do="give", path=one.path, key=f"{one.sha256}-{one.size}", fresh=fresh)

    def _doubt(self, path: str) -> None:
        holders = {name for name, one in self._view.fellows.items() if path in one.have}
        first = {*self._claims.givers, *(name for name, paths in self._claims.held.items() if path in paths)}
        names = sorted(holders & first or holders)
        text = f"{path} came wrong and is fetched again from elsewhere"
        if names:
            text += f"; it lies on {', '.join(names)}: run 'weights' with -e weights_check=full, which reads it there"
        if path not in self._doubted:
            self.troubles.append(text)
        self._doubted.add(path)

    def run(self, proven: Iterable[Proven], missing: Sequence[Listed], complete: Callable[[], object]) -> None:
        """Bring what is missing, have it completed, and give it to the others; wrong files are in `bad` afterwards.

        proven: what was found to be right since the start.
        """
        self.begin(proven)
        self.bring(missing)
        complete()
        self.serve()

    def begin(self, proven: Iterable[Proven]) -> None:
        """Offer what was found to be right since the start, and let files come."""
        for one in proven:
            self._give(one, fresh=False)
        spread, lacks = self._spread, {one.path for one in self._wanted} - self._given
        # The others wait for what this node was seen to have; for what was found wrong since, they must not.
        seen = self._sizes if spread["name"] in spread["givers"] else spread["held"].get(spread["name"], ())
        self._tell(do="begin", absent=sorted(lacks & {*seen}))
        self._moved = time.monotonic()

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "peers":
            self._view.fellows = {name: Fellow.of(one) for name, one in event["peers"].items()}
        elif kind == "rates":
            if event["received"] + event["sent"] > self._view.received + self._view.sent:
                self._moved = time.monotonic()
            self._view.received, self._view.sent = event["received"], event["sent"]
            self._view.incoming, self._view.coming = event["incoming"], frozenset(event["coming"])
        elif kind == "came":
            self._moved = time.monotonic()
            self.from_peers += self._sizes[event["path"]]
            remove_unfinished(Path(self._request.path), event["path"], self._sizes)
        elif kind == "trouble" and event["text"] not in self.troubles:
            self.troubles.append(event["text"])
        elif kind in ("failed", "ended"):
            said = event.get("text") or (self._request.bookkeeping / "spread.log").read_text("utf-8", "replace")[-2000:]
            mend = event.get("mend") or "Run this again, or set model_weights_spread to false."
            if event.get("port"):
                said = f"{said}; {holders_of(int(event['port']))}"
            raise WeightsError(
                f"the exchange with other nodes ended: {said.strip() or 'it said nothing'}. What was fetched is kept. "
                + (full_disk(self._request.path) or mend)
            )

    def bring(self, missing: Sequence[Listed]) -> None:
        """Get every missing file, from the hub or from peers.

        Raises:
            WeightsError: the hub does not give what no peer has; nothing moved for ten minutes; the time is up.
        """
        left = list(missing)
        while left:
            left = [one for one in left if one.path not in self._prover.proven]
            self.step()
            names = self._next_claims(left)
            names = [name for name in names if name not in self._prover.proven]
            if names and self._request.lists_hashes:
                names = self._announce(names)
                if names:
                    self._fetch(names)
                self._tell(do="claim", paths=[])
            else:
                self._tick()
                time.sleep(STEP_SECONDS)
            self._watch(left)

    def _announce(self, names: list[str]) -> list[str]:
        """Tell peers what this node is about to fetch; of what is others', see first that nobody else is about to."""
        fellows = self._view.fellows
        self._tell(do="claim", paths=names)
        others = {name for name, one in fellows.items() if one.alive and not one.done}
        if not any(self._claims.owners.get(name) in others for name in names):
            return names
        before = {name: one.claims for name, one in fellows.items()}
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < until:
            self._tick()
            time.sleep(STEP_SECONDS)
        now = {name: one for name, one in self._view.fellows.items() if one.alive}
        fresh = {name: one.claims - before.get(name, frozenset()) for name, one in now.items()}
        held = {path for one in now.values() for path in one.have} - self._doubted
        left = rivalled(self._claims.me, names, self._claims.owners, fresh) | held | set(self._prover.proven)
        names = [name for name in names if name not in left]
        self._tell(do="claim", paths=names)
        return names

    def _fetch(self, names: Sequence[str]) -> None:
        chosen = [one for one in self._wanted if one.path in names]
        self._fetching = tuple(names)
        self._begun, self._before = time.monotonic(), self._there()
        run = replace(
            self._transfer, only=self._fetching, tick=self._tick, streams=streams(chosen, self._request.max_workers)
        )
        with contextlib.suppress(EnoughError):
            download(self._request, run)
        self._measure(chosen)
        self._fetching = ()
        self._prover.look(wait=True)
        self._moved = time.monotonic()
        for name in set(names) & set(self._prover.proven):
            self._give(self._prover.proven[name], fresh=True)

    def _measure(self, chosen: Sequence[Listed]) -> None:
        """Keep the rate of a run of the client, where it says something: not that of its start, or of small files."""
        seconds = time.monotonic() - self._begun
        if seconds >= PACE_SECONDS and any(one.size >= SMALL_BYTES for one in chosen):
            self._claims = replace(self._claims, rate=max(1.0, (self._there() - self._before) / seconds))

    def _there(self) -> int:
        there: int = bytes_there(Path(self._request.path), {name: self._sizes[name] for name in self._fetching})
        return there

    def _pace(self) -> None:
        """Tell peers how far the run of the client is.

        Raises EnoughError when they have what is left of it: one with time to spare was faster.
        """
        now = time.monotonic()
        if now - self._paced < 1.0 or not self._fetching:
            return
        self._paced = now
        there = bytes_by_file(Path(self._request.path), {name: self._sizes[name] for name in self._fetching})
        left = {name: self._sizes[name] - there.get(name, 0) for name in self._fetching}
        left = {name: count for name, count in left.items() if count}
        seconds = now - self._begun
        rate = (sum(there.values()) - self._before) / seconds if seconds >= PACE_SECONDS else -1.0
        self._tell(do="pace", left=left, rate=rate)
        held = {path for one in self._view.fellows.values() if one.alive for path in one.have} - self._doubted
        if left and set(left) <= held:
            raise EnoughError

    def _next_claims(self, left: Sequence[Listed]) -> list[str]:
        """`next_claims`, once a peer was met.

        Raises WeightsError where there is none to meet: all nodes would fetch everything, which somebody has to accept.
        """
        fellows = self._view.fellows
        if not any(one.met for one in fellows.values()):
            if left and fellows and alone(fellows) and not self._spread.get("without_peers"):
                raise WeightsError(self._met_nobody())
            if not (fellows and alone(fellows)):
                return []
        return next_claims(self._claims, left, fellows, self._view.coming, self._doubted)

    def _met_nobody(self) -> str:
        spread = self._spread
        port = int(spread["port"])
        found = [f"  {name} ({spread['peers'][name]}): {one.why}" for name, one in sorted(self._view.fellows.items())]
        return (
            f"{spread['name']} ({spread['address']}) met none of the nodes that it is to exchange "
            f"{self._request.name} with:\n" + "\n".join(found) + "\n"
            "Where one refuses, see what became of the weights there. Else open TCP ports "
            f"{port} and {port + 1} between the nodes, or set model_weights_without_peers to true: then every node "
            "fetches all of it from the hub."
        )

    def serve(self) -> None:
        """Help the others until each has everything or is gone."""
        self._tell(do="done")
        since = time.monotonic()
        while not self._left_alone(time.monotonic() - since):
            self.step()
            self._watch([])
            waits = sorted(name for name, one in self._view.fellows.items() if one.alive and not one.done)
            sent = self._view.sent
            text = f"has everything, passes on to {', '.join(waits)}" if waits else "everybody has everything"
            self._transfer.progress.say("passing-on", text, sent=sent, received=self._view.received)
            time.sleep(STEP_SECONDS)

    def _left_alone(self, seconds: float) -> bool:
        fellows = self._view.fellows
        return bool(fellows) and all_served(fellows) and (all_know(fellows) or seconds >= LINGER_SECONDS)

    def _tick(self) -> None:
        self.step()
        fellows = self._view.fellows
        if not any(one.met for one in fellows.values()) and not alone(fellows):
            told = ", ".join(f"{name} ({one.why})" for name, one in sorted(fellows.items()))
            self._transfer.progress.say("waiting", f"waits until a peer is met: {told}")
            return
        sizes = self._transfer.sizes
        there = bytes_there(Path(self._request.path), sizes) + self._view.incoming
        numbers = {"received": self._view.received, "sent": self._view.sent}
        self._transfer.progress.fetching(min(there, sum(sizes.values())), sum(sizes.values()), **numbers)
        self._pace()

    def _watch(self, left: Sequence[Listed]) -> None:
        now = time.monotonic()
        fellows = self._view.fellows
        silent = sorted(name for name, one in fellows.items() if not one.alive)
        if any(one.alive and one.busy for one in fellows.values()):  # whoever reads what lies there brings nothing yet
            self._moved = now
        still = max(STALL_SECONDS, self._request.patience + STALL_SECONDS / 10)  # whoever asks the hub gives up first
        if now >= self._transfer.until or (left and now - self._moved > still):
            why = "its time is up" if now >= self._transfer.until else f"nothing moved for {still:.0f} s"
            raise WeightsError(
                f"the exchange of {self._request.name} was given up: {why}. {len(left)} files are missing, first "
                f"{left[0].path if left else 'none'}; peers that do not answer: {', '.join(silent) or 'none'}. "
                "What was fetched is kept: run this again to go on."
            )

    def close(self) -> None:
        """End the program."""
        self._tell(do="end")
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            stop(self._child)
        self._log.close()
