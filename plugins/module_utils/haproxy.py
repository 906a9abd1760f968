"""The gateway's HAProxy on a node: its files, and what its admin socket says and does.

The first half is pure: files, parsers and decisions. Files are made whole under a name of their own and taken into use
by swinging a link, so that an interrupted run leaves the old ones or the new. The admin socket is the master's, a file
for its owner alone; asked through it, the processes of before a reload count too. HAProxy 2.6 or newer.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

CONFIGURATION = "haproxy.cfg"
GENERATION = "@GENERATION@"
SOCKET, KEPT, STATE = "master.sock", "generations", "servers.state"
BACKEND = "engines"
KEPT_GENERATIONS = 3
# Linux takes 107 bytes for a socket's address; HAProxy puts its process id and a suffix behind it for a moment.
LONGEST_SOCKET = 90
OLDEST = (2, 6)
SOCKET_TIMEOUT = 10.0
# Longer than three checks.
SETTLE_SECONDS = 8.0
_DOWN, _RUNNING = "0", "2"  # srv_op_state
_DRAIN = 8  # srv_admin_state: drained by the admin socket (management.txt, show servers state)
_WORKER = re.compile(r"^(\d+)\s+worker\b", re.M)


class GatewayError(Exception):
    """What is wrong and what mends it, for people."""


@dataclass(frozen=True)
class Server:
    """A replica as one HAProxy process sees it.

    sessions: requests in flight. status: HAProxy's own word; of one that is drained and unhealthy it is DOWN.
    """

    name: str
    status: str
    weight: int
    sessions: int
    queued: int
    check: str
    agent: str
    address: str
    drained: bool = False


@dataclass(frozen=True)
class Wanted:
    """The files of a configuration, by name, and the digest of all of them."""

    files: Mapping[str, str]
    generation: str


@dataclass
class Found:
    """What is in the gateway's directory. current: digest that the link names, none where there is none."""

    current: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def wanted_files(configuration: str, keys_map: str, certificate: str) -> Wanted:
    """Configuration and what lies beside it; the digest goes into the configuration, for the process to tell."""
    files = {CONFIGURATION: configuration, "keys.map": keys_map, "tls.pem": certificate}
    files = {name: text for name, text in files.items() if text}
    digest = hashlib.sha256("\0".join(f"{name}\0{files[name]}" for name in sorted(files)).encode()).hexdigest()[:12]
    files[CONFIGURATION] = configuration.replace(GENERATION, digest)
    return Wanted(files, digest)


def check_directory(directory: str) -> str:
    """What is wrong with the place, empty where nothing is."""
    path = f"{directory}/{SOCKET}"
    if len(path) <= LONGEST_SOCKET:
        return ""
    text = f"{path} has {len(path)} characters, and the admin socket may have {LONGEST_SOCKET}: "
    return text + "set stepladder_state_directory to a shorter path, or deployment_name to a shorter name"


def check_version(text: str) -> str:
    """What is wrong with `haproxy -v`, empty where nothing is."""
    match = re.search(r"version (\d+)\.(\d+)", text)
    if match and (int(match[1]), int(match[2])) >= OLDEST:
        return ""
    found = match[0] if match else repr(text[:60])
    wanted = ".".join(str(part) for part in OLDEST)
    return f"HAProxy {found} is too old: {wanted} or newer is needed (Debian 12 and Ubuntu 24.04 have it)"


def parse_workers(text: str) -> list[int]:
    """`show proc` of the master: the process ids of its workers, the current one first."""
    return [int(pid) for pid in _WORKER.findall(text)]


def parse_servers(text: str) -> dict[str, Server]:
    """`show stat`: the servers of the engines' backend by name."""
    lines = text.lstrip("# ").strip().splitlines()
    found = {}
    for row in csv.DictReader(lines):
        if row["pxname"] != BACKEND or row["svname"] in ("BACKEND", "FRONTEND"):
            continue
        found[row["svname"]] = Server(
            name=row["svname"],
            status=row["status"].replace("DRAIN (agent)", "DRAIN"),  # as it says where no agent answers
            weight=int(row["weight"] or 0),
            sessions=int(row["scur"] or 0),
            queued=int(row["qcur"] or 0),
            check=" ".join(part for part in (row["check_status"], row["last_chk"]) if part),
            agent=" ".join(part for part in (row["agent_status"], row["last_agt"]) if part),
            address=row["addr"],
        )
    return found


def parse_drained(text: str) -> set[str]:
    """`show servers state`: names of the servers that were drained by the admin."""
    return {row["srv_name"] for row in _state_rows(text) if int(row["srv_admin_state"]) & _DRAIN}


def _state_rows(text: str) -> list[dict[str, str]]:
    """The lines of the engines' backend, by the names of their columns."""
    lines = text.strip().splitlines()
    names = next((line[2:].split() for line in lines if line.startswith("# ")), [])
    rows = csv.DictReader([line for line in lines if " " in line and not line.startswith("#")], names, delimiter=" ")
    return [row for row in rows if row["be_name"] == BACKEND]


def in_rotation(server: Server) -> bool:
    """Whether it gets new requests."""
    return server.status.startswith(("UP", "no check")) and server.weight > 0


def kept_state(text: str, addresses: Mapping[str, str]) -> str:
    """`show servers state` cut down to what is to outlive the process: who is drained, down or has another weight.

    One that is not told of begins as healthy until its first check. Addresses are those of the configuration: the file
    would win over it.

    Args:
        text: as HAProxy gave it.
        addresses: by server name, address:port in the configuration to be read; others are left out.
    """
    head = next((line for line in text.splitlines() if line.startswith("# ")), "")
    kept = [text.strip().split("\n", 1)[0], head]
    for row in _state_rows(text):
        drained, down = int(row["srv_admin_state"]) & _DRAIN, row["srv_op_state"] == _DOWN
        changed = drained or down or row["srv_uweight"] != row["srv_iweight"]
        if row["srv_name"] not in addresses or not changed:
            continue
        host, _, port = addresses[row["srv_name"]].rpartition(":")
        fresh = {
            "srv_op_state": _DOWN if down else _RUNNING,
            "srv_admin_state": str(drained),
            "srv_addr": host.strip("[]"),
            "srv_port": port,
        }
        kept.append(" ".join({**row, **fresh}[name] for name in head[2:].split()))
    return "\n".join(kept) + "\n" if head else ""


def configured_addresses(configuration: str) -> dict[str, str]:
    """By server name, address:port as the configuration has it."""
    return dict(re.findall(r"(?m)^\s+server (\S+) (\S+)", configuration))


# --- the admin socket ------------------------------------------------------------------------------------------------


class Master:
    """HAProxy's master behind its socket."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.path = self.directory / SOCKET

    def ask(self, command: str, pid: int | None = None) -> str:
        """Answer to a command, of the master or of one of its workers.

        Raises:
            GatewayError: where nobody answers, or the worker is gone.
        """
        text = f"@!{pid} {command}" if pid else command
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(SOCKET_TIMEOUT)
                client.connect(str(self.path))
                client.sendall(text.encode() + b"\n")
                client.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: client.recv(65536), b"")).decode("utf-8", "replace")
        except OSError as error:
            reason = error.strerror or str(error)
            raise GatewayError(
                f"The gateway's admin socket {self.path} does not answer ({reason}). Run the verb 'gateway' again."
            ) from None
        if answer.startswith("Can't find the target"):
            raise GatewayError(f"HAProxy's process {pid} is gone")
        return answer

    def workers(self) -> list[int]:
        """Process ids, the current one first; old ones finish what they had before a reload."""
        return parse_workers(self.ask("show proc"))

    def current(self) -> int:
        """Process id of the current worker."""
        workers = self.workers()
        if not workers:
            raise GatewayError(f"HAProxy's master behind {self.path} has no worker; see the gateway's log")
        return workers[0]

    def servers(self) -> dict[str, Server]:
        """The replicas as the current worker sees them."""
        pid = self.current()
        drained = parse_drained(self.ask(f"show servers state {BACKEND}", pid))
        servers = parse_servers(self.ask("show stat", pid))
        return {name: replace(server, drained=name in drained) for name, server in servers.items()}

    def in_flight(self, name: str) -> int:
        """Requests to a server that are not finished, those of the processes before a reload among them."""
        count = 0
        for position, pid in enumerate(self.workers()):
            try:
                server = parse_servers(self.ask("show stat", pid)).get(name)
            except GatewayError:
                if position == 0:
                    raise
                continue  # an old one that has just finished
            count += server.sessions + server.queued if server else 0
        return count

    def generation(self) -> str | None:
        """Digest of the configuration that the current worker has; none where there is no worker."""
        with contextlib.suppress(GatewayError):
            match = re.search(r"(?m)^description: (\S+)$", self.ask("show info", self.current()))
            return match[1] if match else None
        return None

    def change(self, command: str) -> None:
        """Give the current worker a command that answers nothing when it worked."""
        answer = self.ask(command, self.current()).strip()
        if answer:
            raise GatewayError(f"HAProxy refused '{command}': {answer}")

    def addresses(self) -> dict[str, str]:
        """By server name, address:port as the current configuration has it."""
        return configured_addresses((self.directory / "current" / CONFIGURATION).read_text())

    def keep_state(self) -> None:
        """Write down who is drained, for the next process; by rename, so that nobody reads half of it."""
        text = kept_state(self.ask(f"show servers state {BACKEND}", self.current()), self.addresses())
        write_private(self.directory / STATE, text)

    def reload(self, wanted: str, deadline: float) -> None:
        """Take the current files into use: a new worker gets new connections, the old one finishes its own.

        Raises:
            GatewayError: where no worker has them in time; the old one goes on then.
        """
        before = self.current()
        self.keep_state()
        answer = self.ask("reload")
        # From 2.7 on the answer says how it ended; before, it is empty.
        end = time.monotonic() + (0 if answer.startswith("Success=0") else deadline)
        while time.monotonic() < end:
            with contextlib.suppress(GatewayError):
                if self.current() != before and self.generation() == wanted:
                    return
            time.sleep(0.1)
        said = f"; HAProxy said: {answer.strip()}" if answer.strip() else ""
        raise GatewayError(
            f"The gateway did not take up its new configuration and goes on with the old one, {deadline:.0f} s were "
            f"allowed; see its log{said}"
        )


# --- files -----------------------------------------------------------------------------------------------------------


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Put a text into a file that is its owner's alone, by rename."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
    fresh.replace(path)


def observe(directory: str) -> Found:
    """What is there now."""
    link = Path(directory, "current")
    if not link.is_symlink() or not link.is_dir():
        return Found()
    return Found(link.readlink().name, {path.name: path.read_text() for path in link.iterdir()})


def is_current(found: Found, wanted: Wanted) -> bool:
    """Whether there is nothing to do."""
    return found.current == wanted.generation and dict(found.files) == dict(wanted.files)


def build(folder: Path, wanted: Wanted) -> None:
    """Write the files into a directory of their own."""
    folder.mkdir(mode=0o700, parents=True)
    for name, text in wanted.files.items():
        write_private(folder / name, text, 0o400)


def complaints(program: str, folder: Path) -> str:
    """What HAProxy itself has against a configuration; empty where it takes it."""
    try:
        done = subprocess.run(
            [program, "-c", "-f", str(folder / CONFIGURATION)], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "[ALERT]" in line]
    return "\n".join(lines) or done.stderr.strip() or f"exit status {done.returncode}"


def version_fault(program: str) -> str:
    """What is wrong with the program, empty where nothing is."""
    try:
        done = subprocess.run([program, "-v"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} cannot be run ({error}): apt-get install -y haproxy"
    return check_version(done.stdout)


def apply(directory: str, wanted: Wanted, program: str) -> None:
    """Make the wanted files current.

    Raises:
        GatewayError: where HAProxy does not take them; what was current stays.
    """
    root = Path(directory)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = root / KEPT
    fresh = kept / f".new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        build(fresh, wanted)
        if said := complaints(program, fresh):
            raise GatewayError(f"HAProxy does not take the configuration, nothing was changed:\n{said}")
        place = kept / wanted.generation
        if place.exists():
            shutil.rmtree(place)
        fresh.rename(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if not (root / STATE).exists():
        write_private(root / STATE, "")
    link = root / f".current-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(f"{KEPT}/{wanted.generation}")
    link.replace(root / "current")
    _prune(kept, wanted.generation)


def _prune(kept: Path, current: str) -> None:
    others = [path for path in kept.iterdir() if path.name != current]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[KEPT_GENERATIONS - 1 :]:
        shutil.rmtree(path)


# --- rotation --------------------------------------------------------------------------------------------------------


def find(servers: Mapping[str, Server], replica: int, deployment: str) -> Server:
    """The replica's server.

    Raises:
        GatewayError: there is none, with those that there are.
    """
    server = servers.get(f"replica-{replica}")
    if server is None:
        known = ", ".join(name.rpartition("-")[2] for name in servers) or "none"
        raise GatewayError(
            f"There is no replica {replica}: the gateway in front of {deployment} has {known}. Give -e replica=NUMBER."
        )
    return server


def refuse_last(servers: Mapping[str, Server], name: str) -> str:
    """Why a replica should not be taken out; empty where another one takes requests."""
    if any(in_rotation(server) for server in servers.values() if server.name != name):
        return ""
    others = [
        f"{server.name.replace('-', ' ')}: {'drained' if server.drained else server.status}"
        for server in servers.values()
        if server.name != name
    ]
    rest = f" ({', '.join(others)})" if others else ""
    return f"no other replica takes requests{rest}: clients would get 503"


def wait_until_idle(
    count: Callable[[], int], seconds: float, tell: Callable[[str], object], name: str, interval: float = 0.5
) -> int:
    """Wait until no request is in flight; the number that is left when the time is over, else 0.

    Args:
        count: asks how many there are now.
        seconds: how long to wait.
        tell: takes a line of progress.
        name: of what is drained, for that line.
    """
    end = time.monotonic() + seconds
    while True:
        left = count()
        rest = end - time.monotonic()
        if left == 0 or rest <= 0:
            return left
        tell(f"{name}: {left} request(s) in flight, waiting for {rest:.0f} s more")
        time.sleep(min(interval, max(rest, 0.01)))


def wait_until_up(look: Callable[[], Server], seconds: float, interval: float = 0.25) -> Server:
    """Wait until a server gets requests again; as it was last seen where it does not."""
    end = time.monotonic() + seconds
    while True:
        server = look()
        if in_rotation(server) or time.monotonic() > end:
            return server
        time.sleep(interval)


def left_out(servers: Mapping[str, Server]) -> list[Server]:
    """Replicas that get no requests though nobody drained them."""
    return [s for s in servers.values() if not in_rotation(s) and not s.drained]


def is_settled(server: Server) -> bool:
    """Whether HAProxy has made up its mind; it begins with all as healthy, and says 'UP 1/3' on the way down."""
    return not server.check.startswith("INI") and "/" not in server.status


def wait_for_replicas(
    look: Callable[[], Mapping[str, Server]], seconds: float, interval: float = 0.25
) -> Mapping[str, Server]:
    """Wait until all that are not drained get requests; as they were last seen where they do not.

    Waits at least until it is settled which do, for a few seconds.
    """
    start = time.monotonic()
    while True:
        servers, waited = look(), time.monotonic() - start
        settled = waited > SETTLE_SECONDS or all(is_settled(server) for server in servers.values())
        if settled and (not left_out(servers) or waited > seconds):
            return servers
        time.sleep(interval)


def names_of(servers: Sequence[Server]) -> list[dict[str, object]]:
    """Servers as plain data, for an answer."""
    return [
        {
            "replica": int(s.name.rpartition("-")[2]),
            "status": s.status,
            "drained": s.drained,
            "weight": s.weight,
            "in_flight": s.sessions,
        }
        for s in servers
    ]
