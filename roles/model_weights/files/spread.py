#!/usr/bin/env python3
"""Exchange whole files of a model with peers by BitTorrent (libtorrent), one torrent for a file.

    spread.py CONFIG.json        commands on standard input, events on standard output, a JSON object a line

It knows nothing of hubs, hashes and manifests. Whoever runs it says which files are there and proven (`give`), when
others may come (`begin`), which it is fetching itself (`claim`) and when it has everything (`done`); it says which
files came (`came`, at their place) and how the peers are (`peers`). Peers ask each other for what they hold by HTTP on
`port` + 1, every second, at the start more often; the bytes go by BitTorrent on `port`. Only the addresses of the peers
are answered.

Every file has one owner among the nodes that lack it. The owner gets it (from the hub, or from a node that had it at
the start) and the others take it from the owner and from each other while it is still coming: so a source sends each
byte about once, however many nodes there are. A node with nothing better to do asks every holder.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

POLL_SECONDS, FIRST_POLL_SECONDS, FIRST_SECONDS = 1.0, 0.25, 10.0
POLLS_A_SECOND = 16  # of all peers together, beyond one for each
PEER_GONE_SECONDS = 15.0
PEER_LATE_SECONDS = 60.0  # for one whose machine answers, but that has not begun
OWN_AT_A_TIME = 3
OTHERS_AT_A_TIME, OTHERS_OF_A_PEER = 6, 2
STILL_SECONDS = 5.0
HASHERS = 4
AHEAD = 4  # files whose torrents are asked for before there is room for them
PIECES_WANTED = 1000
SMALLEST_PIECE, LARGEST_PIECE = 64 * 1024, 16 * 1024 * 1024


@dataclass(frozen=True)
class Wish:
    """What is exchanged, and with whom.

    Args:
        run: the same on all nodes of one exchange; others are not spoken with.
        name: this node's.
        address: this node's, on the network of the exchange.
        port: of BitTorrent; the one after it is for questions.
        root: directory of the files.
        incoming: directory for what is not whole yet, on the same file system.
        torrents: directory for torrents of files that are here, so that a later exchange need not read these again.
        peers: address of every other node by name.
        sizes: every file with its bytes.
        owners: by file, who brings it among the nodes that lack it.
        givers: nodes that had everything that they have at the start.
        bytes_per_second: limit for what goes out, and for what comes in; 0 for none.
    """

    run: str
    name: str
    address: str
    port: int
    root: str
    incoming: str
    torrents: str
    peers: Mapping[str, str]
    sizes: Mapping[str, int]
    owners: Mapping[str, str]
    givers: Sequence[str] = ()
    bytes_per_second: int = 0


@dataclass
class Peer:
    """What is known of a peer: `have` it holds whole, `part` it is receiving, `claims` it is fetching elsewhere.

    Args:
        lost: it had, and has not any more, for it is wrong there.
        busy: it reads what lies there, and takes nothing yet.
        left: bytes to come of its claims, at `rate` bytes a second; negative: it does not know yet.
        knows: nodes that it knows to be done.
        parted: it was done, and listens no more.
        why: it was not met yet.
        near: its machine answers, so that it may yet begin.
        told: that it was not met was said.
    """

    address: str
    have: frozenset[str] = frozenset()
    part: frozenset[str] = frozenset()
    claims: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    busy: bool = False
    left: Mapping[str, int] = field(default_factory=dict)
    rate: float = -1.0
    done: bool = False
    knows: frozenset[str] = frozenset()
    parted: bool = False
    seen: float | None = None
    why: str = "it was not asked yet"
    near: bool = False
    told: bool = False
    started: float = field(default_factory=time.monotonic)

    def alive(self, now: float) -> bool:
        """Whether it answered lately, or had little time yet to begin."""
        if self.seen is None:
            return now - self.started < (PEER_LATE_SECONDS if self.near else PEER_GONE_SECONDS)
        return now - self.seen < PEER_GONE_SECONDS


def piece_bytes(size: int) -> int:
    """A piece size for a file: a power of two, for about a thousand pieces."""
    piece = SMALLEST_PIECE
    while piece < LARGEST_PIECE and size / piece > PIECES_WANTED:
        piece *= 2
    return piece


def holders(path: str, peers: Mapping[str, Peer], now: float) -> dict[str, bool]:
    """The living peers that hold a file, and whether each holds it whole."""
    return {
        name: path in peer.have
        for name, peer in peers.items()
        if peer.alive(now) and (path in peer.have or path in peer.part)
    }


def sources(path: str, wish: Wish, held: Mapping[str, bool], *, still: bool) -> list[str]:
    """Whom to ask for a file: the owner asks those that had it; the others spare these while it comes from the owner.

    still: nothing of the file came lately.
    """
    owner = wish.owners.get(path)
    fellows = [name for name in held if name not in wish.givers]
    if owner == wish.name or still or owner not in held:
        return sorted(held)
    return sorted(fellows) or sorted(held)


def next_files(
    wish: Wish, missing: Iterable[str], active: Sequence[str], peers: Mapping[str, Peer], now: float
) -> list[str]:
    """Which files to begin to receive now: some of the own ones, and beside them of the others', as these get them.

    A node that took its own first would leave its link half idle while the source is busy, and the source's after it.
    """
    paths = sorted(missing)
    names = sorted([wish.name, *wish.peers])
    turn = len(paths) * names.index(wish.name) // len(names)
    order = [*paths[turn:], *paths[:turn]]
    own, others = [], []
    for path in order:
        held = holders(path, peers, now)
        owner = wish.owners.get(path, "")
        waits = owner in peers and owner not in held and peers[owner].alive(now) and owner != wish.name
        if path not in active and held and not waits:
            (own if owner == wish.name else others).append(path)
    busy = sum(wish.owners.get(path) == wish.name for path in active)
    most = max(OTHERS_AT_A_TIME, OTHERS_OF_A_PEER * len(peers))
    ready = [*own[: max(0, OWN_AT_A_TIME - busy)], *others[: max(0, most - (len(active) - busy))]]
    if not ready and not active:  # the owners are slow, and there is nothing else to do
        ready = [path for path in order if any(holders(path, peers, now).values())][:most]
    return ready


class Swarm:
    """The torrents of one exchange. Its methods are called by one thread; HTTP reads `state` and `torrents`."""

    def __init__(self, wish: Wish) -> None:
        import libtorrent  # noqa: PLC0415 - what decides above is tested without it

        self.lt = libtorrent
        self.wish = wish
        self.torrents: dict[str, bytes] = {}
        self.handles: dict[str, Any] = {}
        self.have: set[str] = set()
        self.coming: set[str] = set()
        self.moving: set[str] = set()
        self.claims: set[str] = set()
        self.came: dict[str, tuple[int, float]] = {}
        self.wrong: dict[str, list[bytes]] = {}
        self.given: dict[str, str] = {}
        self.lost: set[str] = set()
        self.absent: set[str] = set()  # seen here before; unlike what is lost it may come, and is proven then
        self.busy = True
        self.left: dict[str, int] = {}
        self.rate = -1.0
        self._making: set[str] = set()
        self._choosing = threading.Lock()
        self.abandoned: set[str] = set()
        self.done = False
        self.knows: set[str] = set()
        self._hashers = ThreadPoolExecutor(HASHERS)
        self.made: queue.Queue[tuple[str, bytes]] = queue.Queue()
        limit = wish.bytes_per_second
        self.session = libtorrent.session(
            {
                "listen_interfaces": f"{wish.address}:{wish.port}",
                "outgoing_interfaces": wish.address,
                "listen_system_port_fallback": False,
                "max_retry_port_bind": 0,
                "enable_dht": False,
                "enable_lsd": False,
                "enable_upnp": False,
                "enable_natpmp": False,
                "enable_incoming_utp": False,
                "enable_outgoing_utp": False,
                "in_enc_policy": 2,  # plain: the peers are the site's own, and hashes prove every piece
                "out_enc_policy": 2,
                "allow_multiple_connections_per_ip": False,
                "connections_limit": 8000,
                "connection_speed": 200,
                "unchoke_slots_limit": 64,
                "unchoke_interval": 2,
                "min_reconnect_time": 1,
                "peer_timeout": 20,
                "request_timeout": 10,
                "piece_timeout": 10,
                "peer_turnover": 0,
                "max_out_request_queue": 2000,
                "send_buffer_watermark": 4 * 1024 * 1024,
                "rate_limit_ip_overhead": False,
                "upload_rate_limit": limit,
                "download_rate_limit": limit,
                "alert_mask": libtorrent.alert.category_t.status_notification
                | libtorrent.alert.category_t.error_notification
                | libtorrent.alert.category_t.storage_notification,
            }
        )
        allowed, limited = libtorrent.ip_filter(), libtorrent.ip_filter()
        everyone = ("0.0.0.0", "255.255.255.255")  # noqa: S104 - ruled on here, not listened on
        # libtorrent has peers on private networks in a class without limits; all are in the global one here.
        limited.add_rule(*everyone, 1 << libtorrent.session.global_peer_class_id)
        self.session.set_peer_class_filter(limited)
        allowed.add_rule(*everyone, 1)
        for address in wish.peers.values():
            allowed.add_rule(address, address, 0)
        self.session.set_ip_filter(allowed)

    @property
    def state(self) -> dict[str, Any]:
        """What peers are told."""
        return {
            "run": self.wish.run,
            "name": self.wish.name,
            "have": sorted(self.have),
            "part": sorted(self.coming),
            "claims": sorted(self.claims),
            "lost": sorted(self.lost | self.absent),
            "busy": self.busy,
            "left": self.left,
            "rate": self.rate,
            "done": self.done,
            "knows": sorted(self.knows),
        }

    def give(self, path: str, key: str, *, fresh: bool) -> None:
        """Offer a file that is at its place and proven.

        Args:
            path: of the file.
            key: names its content.
            fresh: it came just now, others need it too: its torrent is made at once. That of another is made when a
                peer asks for it, for that reads all of the file.
        """
        self.given[path] = key
        self.lost.discard(path)
        self.absent.discard(path)
        if path in self.handles:  # it came from a peer, with its torrent
            self._keep(path, self.torrents[path])
            return
        self.have.add(path)
        known = self._kept(path)
        if known is not None:
            self.offer(path, known)
        elif fresh:
            self.make([path])

    def _kept(self, path: str) -> bytes | None:
        try:
            torrent = (Path(self.wish.torrents) / self.given[path]).read_bytes()
            info = self.lt.torrent_info(self.lt.bdecode(torrent))
        except (OSError, RuntimeError):  # there is none, or what is there was cut short: it is made again
            return None
        same = info.name() == Path(path).name and info.layout().file_size(0) == self.wish.sizes[path]
        return torrent if same else None

    def _keep(self, path: str, torrent: bytes) -> None:
        place = Path(self.wish.torrents) / self.given[path]
        fresh = place.with_name(f".{place.name}")
        try:
            place.parent.mkdir(exist_ok=True)
            fresh.write_bytes(torrent)
            fresh.replace(place)
        except OSError as error:
            say(event="trouble", text=f"the torrent of {path} cannot be kept and is made again: {error}")

    def make(self, paths: Iterable[str]) -> None:
        """Begin to make the torrents of files that are here, beside the rest; any thread may ask."""
        with self._choosing:
            for path in paths:
                if path in self.given and path not in self.torrents and path not in self._making:
                    self._making.add(path)
                    self._hashers.submit(self._make, path)

    def _make(self, path: str) -> None:
        try:
            place = Path(self.wish.root) / path
            maker = self.lt.create_torrent(
                self.lt.list_files(str(place)), piece_bytes(self.wish.sizes[path]), flags=self.lt.create_torrent.v2_only
            )
            self.lt.set_piece_hashes(maker, str(place.parent))
            torrent = self.lt.bencode(maker.generate())
            self._keep(path, torrent)
            self.made.put((path, torrent))
        except Exception as error:
            say(event="trouble", text=f"{path} cannot be offered to peers: {type(error).__name__}: {error}")
            self.made.put((path, b""))

    def offer(self, path: str, torrent: bytes) -> None:
        """Seed a file whose torrent was made; an empty one: it could not be."""
        self._making.discard(path)
        if path in self.handles or path not in self.given:
            return
        if not torrent:
            self._lose(path)
            return
        self.torrents[path] = torrent
        self.have.add(path)
        # Should it turn out wrong, libtorrent must not write here: what is here counts as proven.
        flags = self.lt.torrent_flags.seed_mode | self.lt.torrent_flags.upload_mode
        self._add(path, torrent, (Path(self.wish.root) / path).parent, flags)

    def receive(self, path: str, torrent: bytes) -> bool:
        """Begin to receive a file. A torrent that is not of this file, or that it came wrong by, is refused."""
        if torrent in self.wrong.get(path, ()):
            return False
        info = self.lt.torrent_info(self.lt.bdecode(torrent))
        found = info.layout()
        padding = all(found.file_flags(at) & self.lt.file_flags_t.flag_pad_file for at in range(1, found.num_files()))
        if not padding or found.file_size(0) != self.wish.sizes[path] or info.name() != Path(path).name:
            text = f"a peer offers something else as {path}: {info.name()}, {found.file_size(0)} bytes"
            say(event="trouble", text=text)
            return False
        folder = (Path(self.wish.incoming) / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.torrents[path] = torrent
        self.coming.add(path)
        self._add(path, torrent, folder, 0)
        return True

    def _add(self, path: str, torrent: bytes, folder: Path, flags: int) -> None:
        lt = self.lt
        wanted = lt.add_torrent_params()
        wanted.ti = lt.torrent_info(lt.bdecode(torrent))
        wanted.save_path = str(folder)
        unmanaged = wanted.flags & ~lt.torrent_flags.auto_managed & ~lt.torrent_flags.paused
        # Peers would tell each other of the source, and all would ask it for everything.
        wanted.flags = unmanaged | lt.torrent_flags.disable_pex | flags
        self.handles[path] = self.session.add_torrent(wanted)

    def connect(self, path: str, addresses: Iterable[str]) -> None:
        """Have a file's torrent ask these peers."""
        for address in addresses:
            self.handles[path].connect_peer((address, self.wish.port))

    def still(self, path: str, now: float) -> float:
        """For how many seconds nothing of a file that is coming came."""
        done = self.handles[path].status().total_done
        before, since = self.came.get(path, (-1, now))
        if done != before:
            self.came[path] = (done, now)
            return 0.0
        return now - since

    def drop(self, path: str) -> None:
        """Stop with a file that turned out wrong, and take its torrent from nobody again."""
        key = self.given.pop(path, None)
        if key is not None:
            (Path(self.wish.torrents) / key).unlink(missing_ok=True)
        torrent = self._end(path)
        if torrent:
            self.wrong.setdefault(path, []).append(torrent)

    def _lose(self, path: str) -> None:
        self.drop(path)
        self.lost.add(path)

    def abandon(self, path: str) -> None:
        """Stop with a file that nobody left has whole. What came of it is kept: whoever has it later gives the rest."""
        self._end(path)
        self.abandoned.add(path)

    def _end(self, path: str) -> bytes | None:
        handle = self.handles.pop(path, None)
        if handle is not None:
            self.session.remove_torrent(handle)
        self.came.pop(path, None)
        for group in (self.have, self.coming, self.moving):
            group.discard(path)
        return self.torrents.pop(path, None)

    def step(self) -> bool:
        """Take in what libtorrent has done: finished files go to their place, and are told of there.

        Returns whether one was finished, so that another can be begun with.
        """
        finished = False
        while not self.made.empty():
            self.offer(*self.made.get())
        by_handle = {handle: path for path, handle in self.handles.items()}
        for alert in self.session.pop_alerts():
            kind = type(alert).__name__
            path = by_handle.get(getattr(alert, "handle", None), "")
            if kind == "torrent_finished_alert" and path in self.coming and path not in self.moving:
                target = (Path(self.wish.root) / path).parent
                target.mkdir(parents=True, exist_ok=True)
                self.moving.add(path)
                finished = True
                alert.handle.move_storage(str(target))
            elif kind == "storage_moved_alert" and path in self.moving:
                self.moving.discard(path)
                self.coming.discard(path)
                self.have.add(path)
                say(event="came", path=path)
            elif kind == "file_error_alert" and path in self.coming:
                # libtorrent halts a file that it cannot write, and nothing would go on.
                text = f"{path} cannot be written: {alert.error.message()}"
                say(event="failed", text=text, mend="Look at the disk, then run this again.")
            elif kind == "state_changed_alert" and path in self.have and self._leaves_seeding(alert):
                # What peers ask for is held against the torrent first: it was made of other bytes than are there now.
                self._lose(path)
                text = f"{path} is not what was proven here: run 'weights' with -e weights_check=full, which mends it"
                say(event="trouble", text=text)
            elif ("error" in kind or "failed" in kind) and kind not in {"peer_error_alert", "tracker_error_alert"}:
                say(event="trouble", text=f"{path}: {alert.message()}")
        return finished

    def _leaves_seeding(self, alert: Any) -> bool:
        states = self.lt.torrent_status.states
        return alert.state in (states.checking_files, states.downloading, states.downloading_metadata)

    def rates(self) -> dict[str, int]:
        """Bytes that came and went, in all."""
        status = [handle.status() for handle in self.handles.values()]
        return {
            "received": sum(one.total_payload_download for one in status),
            "sent": sum(one.total_payload_upload for one in status),
            "incoming": sum(
                one.total_done for path, one in zip(self.handles, status, strict=True) if path in self.coming
            ),
        }


def say(**event: Any) -> None:
    """Tell whoever runs this."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class Answers(BaseHTTPRequestHandler):
    """What peers may ask: the state, and a file's torrent."""

    swarm: Swarm
    timeout = 10

    def do_GET(self) -> None:
        """Answer a peer; anybody else is refused."""
        url = urllib.parse.urlsplit(self.path)
        if self.client_address[0] not in self.swarm.wish.peers.values():
            self.send_error(403, "not a peer of this exchange")
            return
        query = urllib.parse.parse_qs(url.query)
        path = query.get("path", [""])[0]
        if url.path == "/state":
            body = json.dumps(self.swarm.state).encode()
        elif url.path == "/torrent" and path in self.swarm.torrents:
            body = self.swarm.torrents[path]
            self.swarm.make(query.get("next", []))
        elif url.path == "/torrent" and path in self.swarm.given:
            self.swarm.make([path, *query.get("next", [])])
            self.send_error(503, "its torrent is being made")
            return
        else:
            self.send_error(404, "not offered here")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: standard output is for events."""


def ask(wish: Wish, address: str, what: str) -> bytes:
    """One answer of a peer. Raises OSError when it gives none within three seconds."""
    # From the address that it knows this node by; no proxy, for peers are on the site's own network.
    connection = http.client.HTTPConnection(address, wish.port + 1, timeout=3, source_address=(wish.address, 0))
    try:
        connection.request("GET", what)
        answer = connection.getresponse()
        body = answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"it broke off: {error}") from error
    finally:
        connection.close()
    if answer.status == 403:
        raise OSError(f"it does not take this node for {wish.address}: is there NAT between them?")
    if answer.status != 200:
        raise OSError(f"it answered {answer.status} to {what}")
    return body


def learn(wish: Wish, peer: Peer) -> None:
    """Ask a peer for its state; one that is silent or of another exchange stays as it was, and `why` is kept."""
    port = wish.port + 1
    try:
        state = json.loads(ask(wish, peer.address, "/state"))
        if state["run"] != wish.run:
            peer.why, peer.near = f"port {port}: it is at another exchange", True
            return
        if peer.seen is None:
            port = wish.port
            source = (wish.address, 0)
            socket.create_connection((peer.address, port), timeout=3, source_address=source).close()
        peer.have, peer.part = frozenset(state["have"]), frozenset(state["part"])
        peer.claims, peer.done = frozenset(state["claims"]), bool(state["done"])
        peer.left, peer.rate = dict(state["left"]), float(state["rate"])
        peer.busy = bool(state["busy"])
        peer.lost, peer.knows = frozenset(state["lost"]), frozenset(state["knows"])
        peer.seen, peer.parted = time.monotonic(), False
    except (OSError, ValueError, KeyError, TypeError) as error:
        refused = isinstance(error, ConnectionRefusedError)
        said = getattr(error, "strerror", None) or error
        peer.why, peer.near, peer.parted = f"port {port}: {said}", refused, peer.done and refused


def poll_seconds(peers: int, *, soon: bool) -> float:
    """Seconds between two questions to every peer; `soon`: all begin, or all have ended and wait to be told so."""
    return min(POLL_SECONDS, max(FIRST_POLL_SECONDS, peers / POLLS_A_SECOND)) if soon else POLL_SECONDS


def unmet(wish: Wish, peers: Mapping[str, Peer], now: float) -> list[str]:
    """Say of every peer that was never met, once, why, and what to open."""
    found = []
    for name, peer in peers.items():
        if peer.seen is None and not peer.told and not peer.alive(now):
            peer.told = True
            found.append(
                f"{name} ({peer.address}) was not met in {now - peer.started:.0f} s: {peer.why}. Open TCP ports "
                f"{wish.port} and {wish.port + 1} between the nodes; its share is fetched by others too"
            )
    return found


def obey(swarm: Swarm, command: Mapping[str, Any]) -> bool:
    """Carry out a command; False when it is the last."""
    match command["do"]:
        case "give":
            swarm.give(command["path"], command["key"], fresh=command["fresh"])
        case "begin":
            swarm.busy, swarm.absent = False, {*command["absent"]} - swarm.given.keys()
        case "claim":
            swarm.claims = set(command["paths"])
            swarm.left, swarm.rate = {}, -1.0
            for path in swarm.claims - swarm.handles.keys():  # room for what comes from elsewhere
                (Path(swarm.wish.incoming) / path).unlink(missing_ok=True)
        case "pace":
            swarm.left, swarm.rate = command["left"], command["rate"]
        case "drop":
            swarm.drop(command["path"])
        case "done":
            swarm.done = True
        case "end":
            return False
    return True


def lacking(swarm: Swarm, peers: Mapping[str, Peer], now: float) -> list[str]:
    """Files that may be begun with: not here, not coming, not being fetched elsewhere; nor what was lost.

    That is taken for proven on this node, so nobody would prove what came in its place: a full check mends it.
    Of one whose giver died nobody is asked who has only a part of it: that part is from the same giver.
    """
    busy = {*swarm.handles, *swarm.given, *swarm.claims, *swarm.lost}
    return [
        path
        for path in swarm.wish.sizes
        if path not in busy and (path not in swarm.abandoned or any(holders(path, peers, now).values()))
    ]


def receive_more(swarm: Swarm, peers: Mapping[str, Peer]) -> None:
    """Begin with further files, and have every file that is coming ask those that it should."""
    wish, now = swarm.wish, time.monotonic()
    if swarm.busy:  # a file that lies there and is not proven yet must not come a second time
        return
    missing = lacking(swarm, peers, now)
    active = sorted(swarm.coming - swarm.moving)
    fresh = next_files(wish, missing, active, peers, now)
    later = next_files(wish, set(missing) - set(fresh), [], peers, now)[:AHEAD] if fresh else []
    for path in fresh:
        held = holders(path, peers, now)
        for name in sorted(held, key=lambda one: not held[one]):
            with contextlib.suppress(OSError):
                query = urllib.parse.urlencode({"path": path, "next": later}, doseq=True)
                torrent = ask(wish, peers[name].address, f"/torrent?{query}")
                if swarm.receive(path, torrent):
                    break
    for path in sorted(swarm.coming - swarm.moving):
        held, still = holders(path, peers, now), swarm.still(path, now)
        if still >= PEER_GONE_SECONDS and not any(held.values()):
            swarm.abandon(path)
            continue
        chosen = sources(path, wish, held, still=still >= STILL_SECONDS)
        swarm.connect(path, [peers[name].address for name in chosen])


def no_port(wish: Wish, port: int, error: OSError) -> int:
    """Tell that a port cannot be listened on; the exit status."""
    text = f"{wish.address}:{port} cannot be listened on: {os.strerror(error.errno or 0)}"
    mend = "Free the port, or set model_weights_spread_port to another one, or model_weights_spread to false."
    say(event="failed", text=text, port=port, mend=mend)
    return 1


def main(arguments: Sequence[str]) -> int:
    """Run one exchange until standard input ends or says so."""
    wish = Wish(**json.loads(Path(arguments[0]).read_text()))
    try:  # libtorrent would go on without listening
        socket.create_server((wish.address, wish.port)).close()
    except OSError as error:
        return no_port(wish, wish.port, error)
    swarm = Swarm(wish)
    peers = {name: Peer(address) for name, address in wish.peers.items()}
    handler = type("Bound", (Answers,), {"swarm": swarm})
    try:
        server = ThreadingHTTPServer((wish.address, wish.port + 1), handler)
    except OSError as error:
        return no_port(wish, wish.port + 1, error)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    commands: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            commands.put(line)
        commands.put('{"do": "end"}')

    threading.Thread(target=read, daemon=True).start()
    asking = ThreadPoolExecutor(max(1, len(peers)))
    begun, polled, told = time.monotonic(), 0.0, ""
    while True:
        with contextlib.suppress(queue.Empty):
            if not obey(swarm, json.loads(commands.get(timeout=0.1))):
                break
            continue
        finished = swarm.step()
        now = time.monotonic()
        if finished:
            receive_more(swarm, peers)
        soon = now - begun < FIRST_SECONDS or (swarm.done and all(peer.done for peer in peers.values()))
        if now - polled >= poll_seconds(len(peers), soon=soon):
            polled = now
            list(asking.map(lambda peer: learn(wish, peer), peers.values()))
            now = time.monotonic()
            swarm.knows = {name for name, peer in peers.items() if peer.done}
            receive_more(swarm, peers)
            for text in unmet(wish, peers, now):
                say(event="trouble", text=text)
            view = {
                name: {
                    "alive": peer.alive(now),
                    "met": peer.seen is not None,
                    "done": peer.done,
                    "knows": peer.parted or wish.name in peer.knows,
                    "why": "" if peer.seen is not None else peer.why,
                    "have": sorted(peer.have),
                    "lost": sorted(peer.lost),
                    "busy": peer.busy,
                    "left": peer.left,
                    "rate": peer.rate,
                    "claims": sorted(peer.claims),
                }
                for name, peer in peers.items()
            }
            text = json.dumps(view)
            if text != told:
                told = text
                say(event="peers", peers=view)
            say(event="rates", coming=sorted(swarm.coming), **swarm.rates())
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
