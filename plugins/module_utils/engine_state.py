"""What is true about the processes of a deployment: the manager's word, the process itself, its port, its log.

The first half is pure (parsers and rules), the second half reads the machine. Nothing here changes anything.
"""

from __future__ import annotations

import configparser
import contextlib
import http.client
import os
import re
import signal
import subprocess
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils.one_token import ask
from ansible_collections.stepladder.core.plugins.module_utils.release import START_MARK
from ansible_collections.stepladder.core.plugins.module_utils.unix_http import UnixConnection

MASK = "********"
SYSTEMD_PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "MainPID",
    "NRestarts",
    "ExecMainCode",
    "ExecMainStatus",
    "Result",
)
LINE_LIMIT = 2000
COMMAND_TIMEOUT = 15.0
UNREACHABLE = "unreachable"
_OPEN = ("open", "status", "timeout")

# A manager's word in our terms.
ABSENT, STOPPED, STARTING, RUNNING, STOPPING, RESTARTING, FAILED = (
    "absent",
    "stopped",
    "starting",
    "running",
    "stopping",
    "restarting",
    "failed",
)


@dataclass(frozen=True)
class Managed:
    """What the process manager says about one process.

    raw: its own words. state: one of the constants above. pid: 0 when none. uptime: seconds, None when not said.
    restarts: how often it was started again, None when the manager does not count. exit: last exit in words, None when
    not known.
    """

    raw: str
    state: str
    pid: int = 0
    uptime: float | None = None
    restarts: int | None = None
    exit: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Probe:
    """The answer of a port. result: none, refused, unreachable, timeout, open, or status (then status holds it)."""

    result: str
    status: int | None = None


@dataclass(frozen=True)
class Facts:
    """All that is known of a process before its phase is decided. stranger: pid of another that holds its port."""

    managed: Managed
    probe: Probe
    ever_ready: bool = False
    uptime: float | None = None
    stranger: int = 0
    orphans: tuple[int, ...] = ()
    port: int | None = None


# --- parsers ---------------------------------------------------------------------------------------------------------

_SUPERVISOR_STATES = {
    "STOPPED": STOPPED,
    "STARTING": STARTING,
    "RUNNING": RUNNING,
    "BACKOFF": RESTARTING,
    "STOPPING": STOPPING,
    "EXITED": FAILED,
    "FATAL": FAILED,
    "UNKNOWN": FAILED,
}
_SUPERVISOR_LINE = re.compile(r"^(?P<name>\S+)\s+(?P<state>[A-Z]+)(?:\s+(?P<words>.*?))?\s*$")
_SUPERVISOR_PID = re.compile(r"^pid (\d+), uptime (?:(\d+) days?, )?(\d+):(\d\d):(\d\d)$")


def parse_supervisor(text: str) -> dict[str, Managed]:
    """`supervisorctl status`, by program name; `group:name` is found under the program's own name too."""
    found: dict[str, Managed] = {}
    for line in text.splitlines():
        if "ERROR (no such" in line:
            found[line.split(":")[0].strip()] = Managed("no such process", ABSENT)
            continue
        match = _SUPERVISOR_LINE.match(line)
        if not match or match["state"] not in _SUPERVISOR_STATES:
            continue
        words = match["words"] or ""
        running = _SUPERVISOR_PID.match(words)
        pid, uptime = 0, None
        if running:
            days, hours, minutes, seconds = (int(part or 0) for part in running.groups()[1:])
            pid, uptime = int(running[1]), float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
        managed = Managed(match["state"], _SUPERVISOR_STATES[match["state"]], pid, uptime, note="" if pid else words)
        found[match["name"]] = managed
        found.setdefault(match["name"].rpartition(":")[2], managed)
    return found


def add_supervisor_info(managed: Managed, info: Mapping[str, Any] | None) -> Managed:
    """Complete a line of `supervisorctl status` by getProcessInfo: exit status, and pid while starting."""
    if not info:
        return managed
    code, pid = int(info.get("exitstatus") or 0), int(info.get("pid") or 0)
    if managed.raw == "EXITED":
        # Supervisor gives -1 for a process that a signal ended; which one, it says in its log only.
        words = "ended by a signal" if code < 0 else f"exit status {code}"
        return replace(managed, state=FAILED if code else STOPPED, exit=words)
    if managed.raw in ("BACKOFF", "FATAL") and code:
        return replace(managed, exit="ended by a signal" if code < 0 else f"exit status {code}")
    return replace(managed, pid=managed.pid or pid)


def parse_systemctl(text: str) -> dict[str, Managed]:
    """`systemctl show -p <SYSTEMD_PROPERTIES> unit...`, by unit name: blocks of key=value, blank lines between."""
    found = {}
    for block in re.split(r"\n\s*\n", text.strip()):
        values = dict(line.partition("=")[::2] for line in block.splitlines() if "=" in line)
        if values.get("Id"):
            found[values["Id"]] = _systemd_managed(values)
    return found


def _systemd_managed(values: Mapping[str, str]) -> Managed:
    active, sub = values.get("ActiveState", ""), values.get("SubState", "")
    result = values.get("Result", "success")
    if active == "activating":
        # Newer systemd says auto-restart-queued for the last instant before the start.
        state = RESTARTING if sub.startswith("auto-restart") else STARTING
    elif active == "inactive":
        state = STOPPED if result in ("success", "") else FAILED
    else:
        state = {"active": RUNNING, "reloading": RUNNING, "deactivating": STOPPING, "failed": FAILED}.get(
            active, FAILED
        )
    if values.get("LoadState") == "not-found" and state in (STOPPED, FAILED):
        return Managed("not-found", ABSENT)
    return Managed(
        raw=f"{active} ({sub})",
        state=state,
        pid=int(values.get("MainPID") or 0),
        restarts=int(values.get("NRestarts") or 0),
        exit=_systemd_exit(values.get("ExecMainCode", "0"), values.get("ExecMainStatus", "0"), result),
        note="" if result in ("success", "") else result,
    )


def _systemd_exit(code: str, status: str, result: str) -> str | None:
    """ExecMainCode is waitid's: 1 exited, 2 killed, 3 dumped; 0 while it has never ended."""
    number = int(status or 0)
    if code == "1":
        return f"exit status {number}"
    if code in ("2", "3"):
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}" + (" by the kernel's OOM killer" * (result == "oom-kill"))
        return f"killed by signal {number}"
    return None


# --- rules -----------------------------------------------------------------------------------------------------------


def phase(manager_state: str, alive: bool, kind: str, probe: Probe, ever_ready: bool) -> str:
    """The phase of a process.

    manager_state: one of this file's constants. alive: whether its process is there. kind: the health contract.
    ever_ready: whether this same process answered as ready before; tells an engine that loads from one that broke.
    Source of the rules: vLLM refuses connections while it loads and answers 503 when its engine is dead. SGLang 0.5.23,
    seen on the CPU in 2026-11: refuses while it loads, answers 503 while it warms up and while it stops, and does not
    answer /health in time while a rank hangs; when a rank is dead it ends itself.
    """
    if manager_state in (ABSENT, STOPPED, STOPPING, FAILED):
        return STOPPED if manager_state == STOPPING else manager_state
    if manager_state == RESTARTING:
        return "crash_looping"
    if manager_state == STARTING:
        # Even when the port answers: a process that dies on a port which another one holds looks ready here.
        return STARTING
    if not alive:
        return FAILED
    return _probe_phase(kind, probe, ever_ready)


def _probe_phase(kind: str, probe: Probe, ever_ready: bool) -> str:
    waiting = "unhealthy" if ever_ready else "loading"
    if kind == "none":
        return "ready"
    if probe.result in ("refused", "unreachable"):
        return waiting
    if kind == "tcp":
        return "ready" if probe.result == "open" else "unhealthy"
    if probe.status is not None and 200 <= probe.status < 300:
        return "ready"
    if probe.status == 503 and kind in ("sglang", "http"):
        return waiting
    return "unhealthy"


def decide(facts: Facts, alive: bool, kind: str) -> tuple[str, str]:
    """Phase and one sentence on it."""
    decided = phase(facts.managed.state, alive, kind, facts.probe, facts.ever_ready)
    if facts.stranger and decided in ("ready", "unhealthy", "loading"):
        decided = "unhealthy"
    return decided, detail(decided, facts, alive)


def detail(decided: str, facts: Facts, alive: bool) -> str:
    """One sentence that says why the phase is what it is."""
    managed, age = facts.managed, f" for {facts.uptime:.0f} s" if facts.uptime is not None else ""
    if facts.stranger and decided == "unhealthy":
        return f"port {facts.port} is held by process {facts.stranger}, which is not part of this one: end it"
    reasons = ", ".join(part for part in (managed.exit, managed.note) if part)
    reasons = f" ({reasons})" if reasons else ""
    if decided == ABSENT:
        sentence = "the process manager does not know it"
    elif decided == STOPPED and managed.raw == UNREACHABLE:
        sentence = f"the process manager does not answer{reasons}"
    elif decided == STOPPED:
        sentence = f"is being stopped{reasons}" if managed.state == STOPPING else f"does not run{reasons}"
    elif decided == FAILED and managed.state == RUNNING and not alive:
        sentence = f"the process manager says {managed.raw}, but process {managed.pid} is gone"
    elif decided == FAILED:
        sentence = f"ended and will not be started again{reasons}"
    elif decided == "crash_looping":
        sentence = f"ended and is about to be started again{reasons}"
    elif decided == STARTING:
        sentence = "was just started"
    else:
        sentence = f"{_answer(facts)}, up{age}" if age else _answer(facts)
    if facts.orphans:
        pids = " ".join(str(pid) for pid in facts.orphans)
        sentence += f"; left over from an earlier start and still alive: {pids}"
    return sentence


def _answer(facts: Facts) -> str:
    port = f"port {facts.port}"
    if facts.probe.status is not None:
        return f"{port} answers {facts.probe.status}"
    return {
        "none": "runs, no health check",
        "open": f"{port} is open",
        "refused": f"{port} refuses connections",
        "unreachable": f"{port} cannot be reached",
        "timeout": f"{port} is open but does not answer in time",
    }[facts.probe.result]


def is_outdated(alive: bool, marks: tuple[bool, str | None], wanted: str | None) -> bool | None:
    """Whether a running process has another command than the wanted one; None when that cannot be known.

    marks: whether the process's environment could be read, and the fingerprint in it.
    """
    readable, running = marks
    if not alive or wanted is None or not readable:
        return None
    return running != wanted


# --- log -------------------------------------------------------------------------------------------------------------

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SECRETS = (
    (re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic)\s+)?)[^\s'\",}]+"), r"\1" + MASK),
    (re.compile(r"(?i)(\bbearer\s+)[^\s'\",}]+"), r"\1" + MASK),
    (
        # token=..., 'api_key': ['...'], --api-key ...; not max_tokens=100 and not num_tokens: 5.
        re.compile(
            r"(?i)((?:\b|_|-)(?:token|api[-_]?key|secret|password)['\"]?\s*[=:]\s*)"
            r"(\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s'\",}&]+)"
        ),
        r"\1" + MASK,
    ),
    (re.compile(r"(?i)(--(?:[\w-]*-)?(?:token|api-key|secret|password)\s+)(?!-)\S+"), r"\1" + MASK),
    (re.compile(r"(?i)((?:secret[-_])?access[-_]key(?:[-_]id)?['\"]?\s*[=:]\s*['\"]?)[^\s'\",}&]+"), r"\1" + MASK),
    # Of https://user:password@proxy:3128 the password.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^/\s:@]*:)[^@/\s]+(?=@)"), r"\1" + MASK),
    # Whoever knows the address of a chat's webhook may write there.
    (re.compile(r"(hooks\.slack\.com/\w+/|/open-apis/bot/v2/hook/)[\w/-]+"), r"\1" + MASK),
    (re.compile(r"\b(?:hf_|sk-|ms-|gh[opsu]_)[A-Za-z0-9_-]{16,}"), MASK),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"), MASK),
)
# A private key in PEM as far as it stands on one line, the end of which may be on a later one.
_KEY = re.compile(r"(-----BEGIN [\w ]*PRIVATE KEY[\w ]*-----).*?(-----END|\Z)", re.DOTALL)


SEARCHED_LINES = 2000
# The second alternative is how argparse refuses a command line.
_ERROR = re.compile(
    r"^[\w./-]+: error: |\b\w*(?:Error|Exception)\b.{0,3}[:(]|\b(?:FATAL|CRITICAL)\b|[Oo]ut of memory|Killed"
)
_CONSEQUENCE = re.compile(r"[Ss]ee (?:root cause|stack trace) above|\bWARNING\b")


def mask_keys(line: str) -> tuple[str, bool]:
    """A line without what stands within private keys in PEM, and whether the last of them goes on in the next line."""
    found = [key[2] for key in _KEY.finditer(line)]
    return _KEY.sub(rf"\1 {MASK}\2", line), bool(found) and not found[-1]


def clean_line(line: str) -> str:
    """A log line for human eyes: no escape sequences, a progress bar's last state, secrets masked, cut to length."""
    # Keys first: what follows may leave a part of one without its beginning.
    text = mask_keys(_ANSI.sub("", line))[0].rstrip("\r\n").rpartition("\r")[2]
    text = "".join(character for character in text if character == "\t" or character.isprintable())
    for pattern, masked in _SECRETS:
        text = pattern.sub(masked, text)
    return text if len(text) <= LINE_LIMIT else text[:LINE_LIMIT] + "..."


def tail(path: str | Path, lines: int, block: int = 65536, limit: int = 4 * 1024 * 1024) -> list[str]:
    """The last lines of a file, read from its end in blocks; [] when unreadable. block, limit: bytes."""
    if lines <= 0:
        return []
    data = b""
    try:
        with Path(path).open("rb") as stream:
            position = stream.seek(0, os.SEEK_END)
            end = position
            while position > 0 and data.count(b"\n") <= lines and end - position < limit:
                step = min(block, position)
                position -= step
                stream.seek(position)
                data = stream.read(step) + data
    except OSError:
        return []
    raw_lines = data.removesuffix(b"\n").split(b"\n") if data else []
    return [clean_line(raw.decode("utf-8", "replace")) for raw in raw_lines[-lines:]]


def since_start(lines: Sequence[str]) -> list[str]:
    """What the running process wrote: the lines after the last start; all of them where no start is noted."""
    return _starts(lines)[-1]


def first_errors(lines: Sequence[str], most: int = 3) -> list[str]:
    """The first lines that name an error, of the last start that has any.

    An engine's last lines say that it failed; why stands above, once, before what follows from it.
    """
    for written in reversed(_starts(lines)):
        found = [line for line in written if _ERROR.search(line) and not _CONSEQUENCE.search(line)]
        if found:
            return list(dict.fromkeys(found))[:most]
    return []


def _starts(lines: Sequence[str]) -> list[list[str]]:
    """The lines start by start; what stands before the first noted one comes first."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.startswith(START_MARK):
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


# --- the machine -----------------------------------------------------------------------------------------------------


def read_managers(
    manager: str, supervisorctl: Sequence[str], units: Sequence[str], environ: Mapping[str, str]
) -> dict[str, Managed]:
    """Ask the process manager about all units in one call; when it does not answer, each gets its complaint."""
    if manager == "systemd":
        command = ["systemctl", "show", "-p", ",".join(SYSTEMD_PROPERTIES), *units]
    else:
        command = [*supervisorctl, "status"]
    text, complaint = _run(command, environ)
    if manager == "systemd":
        found = parse_systemctl(text)
        found.update({n.rpartition(".service")[0]: m for n, m in list(found.items()) if n.endswith(".service")})
    else:
        found = parse_supervisor(text)
        info = supervisor_info(supervisorctl) if found else {}
        found = {name: add_supervisor_info(known, info.get(name)) for name, known in found.items()}
    answered = bool(found) or not complaint
    for unit in units:
        if unit not in found:
            found[unit] = Managed("not found", ABSENT) if answered else Managed(UNREACHABLE, STOPPED, note=complaint)
    return found


def _run(command: Sequence[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """Output of a read-only command, and what to say when it gave nothing."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            env={**environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not answer within {COMMAND_TIMEOUT:.0f} s"
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return done.stdout, ""
    words = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[0]
    return done.stdout, f"{Path(command[0]).name}: {words}"


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection = UnixConnection(self.path, COMMAND_TIMEOUT)
        return connection


def supervisor_info(supervisorctl: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Supervisor's getAllProcessInfo by program name, over its local socket; empty when it cannot be had.

    `supervisorctl status` does not say exit statuses; the socket does.
    """
    words = list(supervisorctl)
    if "-c" not in words[:-1]:
        return {}
    conf = Path(words[words.index("-c") + 1])
    parser = configparser.RawConfigParser(strict=False, inline_comment_prefixes=(" ;", "\t;"))
    try:
        parser.read(conf)
        url = parser.get("supervisorctl", "serverurl").replace("%(here)s", str(conf.parent))
        if not url.startswith("unix://"):
            return {}
        server = xmlrpc.client.ServerProxy("http://localhost", transport=_UnixTransport(url[len("unix://") :]))
        answer = server.supervisor.getAllProcessInfo()
    except (configparser.Error, OSError, xmlrpc.client.Error, http.client.HTTPException):
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for info in answer if isinstance(answer, list) else []:
        found[info["name"]] = info
        found[f"{info['group']}:{info['name']}"] = info
    return found


def probe(health: Mapping[str, Any], timeout: float) -> Probe:
    """Ask a process's port once. timeout: seconds. Proxies of the environment play no part."""
    if health["kind"] == "none":
        return Probe("none")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(health.get("host") or "", health.get("host"))  # noqa: S104
    connection = http.client.HTTPConnection(str(host), int(health["port"]), timeout=timeout)
    try:
        connection.connect()
    except ConnectionRefusedError:
        return Probe("refused")
    except OSError:
        return Probe("unreachable")
    try:
        if health["kind"] == "tcp":
            return Probe("open")
        connection.request("GET", health.get("path") or "/health")
        return Probe("status", connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return Probe("timeout")
    finally:
        connection.close()


def head_state(health: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The rank that answers clients, as a node that follows it sees it: ready or loading, and why.

    A follower says nothing of itself but that it runs; whether the ranks have met, only the head knows.
    """
    answer = probe(health, timeout)
    where = f"{health['host']}:{health['port']}"
    words = {"refused": "refuses connections", "unreachable": "cannot be reached", "timeout": "does not answer in time"}
    said = f"answers {answer.status}" if answer.status is not None else words.get(answer.result, answer.result)
    ready = answer.status is not None and 200 <= answer.status < 300
    return {
        "name": "head",
        "unit": "",
        "phase": "ready" if ready else "loading",
        "detail": f"{where} {said}",
        "pid": 0,
        "running": True,
        "orphans": [],
    }


@dataclass(frozen=True)
class Process:
    """One line of the process table. started: seconds after boot. rss: bytes. cpu: seconds of processor time so far."""

    pid: int
    parent: int
    name: str
    state: str
    started: float
    rss: int
    cpu: float = 0.0


def process_table(proc: Path = Path("/proc")) -> dict[int, Process]:
    """All processes of the node, read in one pass."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    table = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            head, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
            fields = rest.split()
            pid = int(entry.name)
            table[pid] = Process(
                pid,
                int(fields[1]),
                head.partition("(")[2],
                fields[0],
                int(fields[19]) / ticks,
                int(fields[21]) * page,
                (int(fields[11]) + int(fields[12])) / ticks,
            )
    return table


def work_of(pids: Iterable[int], table: Mapping[int, Process], proc: Path = Path("/proc")) -> dict[str, float] | None:
    """What some processes did so far, to tell one that loads from one that hangs; None where it may not be read.

    Returns: `read` bytes (from files, sockets and disks), `cpu` seconds and `rss` bytes, of all together.
    """
    total = {"read": 0.0, "cpu": 0.0, "rss": 0.0}
    for pid in pids:
        try:
            lines = (proc / str(pid) / "io").read_text().splitlines()
        except PermissionError:
            return None
        except OSError:
            continue
        counted = dict(line.split(": ", 1) for line in lines)
        # What is mapped into memory is read from the disk and through no system call.
        total["read"] += int(counted.get("rchar", 0)) + int(counted.get("read_bytes", 0))
        if pid in table:
            total["cpu"] += table[pid].cpu
            total["rss"] += table[pid].rss
    return total


def tree(pid: int, table: Mapping[int, Process]) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found = [pid] if pid in table else []
    for member in found:
        found += children.get(member, [])
    return found


def orphaned(marked: Iterable[int], family: Iterable[int], table: Mapping[int, Process]) -> tuple[int, ...]:
    """Marked processes outside of a family, with their descendants: one that writes its title loses the mark."""
    of_family = {*family}
    return tuple(sorted({one for pid in marked if pid not in of_family for one in tree(pid, table)} - of_family))


def environment(pid: int, proc: Path = Path("/proc")) -> dict[str, str] | None:
    """The environment that a process was started with; None when it may not be read."""
    try:
        data = (proc / str(pid) / "environ").read_bytes()
    except OSError:
        return None
    return dict(item.decode("utf-8", "replace").partition("=")[::2] for item in data.split(b"\0") if b"=" in item)


def marked_processes(deployment: str, table: Iterable[int], proc: Path = Path("/proc")) -> dict[str, set[int]]:
    """Pids that carry this deployment's mark in their environment, by process name."""
    needle = f"STEPLADDER_DEPLOYMENT={deployment}".encode()
    found: dict[str, set[int]] = {}
    for pid in table:
        try:
            items = (proc / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if needle in items:
            for item in items:
                if item.startswith(b"STEPLADDER_PROCESS="):
                    found.setdefault(item.partition(b"=")[2].decode("utf-8", "replace"), set()).add(pid)
    return found


def listeners(port: int, proc: Path = Path("/proc")) -> set[str]:
    """Inodes of the sockets that listen on a TCP port."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def stranger_on_port(port: int, family: Sequence[int], table: Mapping[int, Process], proc: Path = Path("/proc")) -> int:
    """Pid that listens on a port without being of the family; 0 when the family does, or when it cannot be known."""
    links = {f"socket:[{inode}]" for inode in listeners(port, proc)}
    if not links or any(_holds(pid, links, proc) for pid in family):
        return 0
    return next((pid for pid in table if pid not in family and _holds(pid, links, proc)), 0)


def contained(id_file: str, table: Iterable[int], proc: Path = Path("/proc")) -> list[int]:
    """Pids of a container's processes, known by its id in their control groups; none where nothing runs of it.

    They are no children of the container's client, which the process manager keeps.
    """
    try:
        container = Path(id_file).read_text().strip()
    except OSError:
        return []
    found = []
    for pid in table if container else ():
        with contextlib.suppress(OSError):
            if container in (proc / str(pid) / "cgroup").read_text():
                found.append(pid)
    return found


def _holds(pid: int, links: set[str], proc: Path) -> bool:
    try:
        descriptors = list((proc / str(pid) / "fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in links:  # noqa: PTH115  (a socket's link is no path)
                return True
    return False


def check_arguments(manager: str, supervisorctl: Sequence[str], processes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that is wrong with the arguments, a sentence each."""
    faults = []
    if manager == "supervisor" and not supervisorctl:
        faults.append("supervisorctl is empty: give the program and its arguments, like [supervisorctl, -c, <file>]")
    for process in processes:
        health = process["health"]
        if health["kind"] != "none" and not health.get("port"):
            faults.append(f"process {process['name']}: health.kind is {health['kind']}, which needs health.port")
    return faults


def look(
    deployment_path: str,
    managers: Mapping[str, Managed],
    processes: Sequence[Mapping[str, Any]],
    log_lines: int,
    http_timeout: float,
    *,
    ask_timeout: float = 0,
) -> list[dict[str, Any]]:
    """The state of each process, in the order given.

    ask_timeout: seconds for a token of an engine that answers as healthy; 0 does not ask.
    """
    table = process_table()
    current = Path(deployment_path, "current")
    release = current.readlink().name if current.is_symlink() else None
    marked = marked_processes(deployment_path.rstrip("/"), table)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    # An engine's ranks may be children of another process of the deployment, as under Ray.
    members = set().union(*marked.values())
    states = []
    for process in processes:
        managed, health = managers[process["unit"]], process["health"]
        entry = table.get(managed.pid)
        alive = entry is not None and entry.state not in ("Z", "X")
        family = tree(managed.pid, table) if alive else []
        if alive and process.get("container_id_file"):
            family += [pid for pid in contained(process["container_id_file"], table) if pid not in family]
        members.update(family)
        environ = environment(managed.pid) if alive else None
        fingerprint = (environ or {}).get("STEPLADDER_FINGERPRINT")
        answer = probe(health, http_timeout) if alive else Probe("none")
        facts = Facts(
            managed=managed,
            probe=answer,
            ever_ready=bool(process.get("ever_ready")),
            uptime=max(0.0, uptime - entry.started) if entry and alive else None,
            stranger=stranger_on_port(int(health["port"]), family, table) if answer.result in _OPEN else 0,
            orphans=orphaned(marked.get(process["name"], set()), family, table),
            port=health.get("port"),
        )
        written = tail(process["log"], SEARCHED_LINES) if process.get("log") else []
        decided, sentence = decide(facts, alive, health["kind"])
        if decided == "ready" and ask_timeout > 0 and health.get("model") and (fault := ask(health, ask_timeout)):
            decided, sentence = "unhealthy", f"{sentence}, but {fault}"
        states.append(
            {
                "name": process["name"],
                "unit": process["unit"],
                "manager_state": managed.raw,
                "pid": managed.pid,
                "running": alive,
                "since": None if facts.uptime is None else round(facts.uptime, 1),
                "restarts": managed.restarts,
                "exit": managed.exit,
                "fingerprint": fingerprint,
                "release": release,
                "outdated": is_outdated(alive, (environ is not None, fingerprint), process.get("wanted_fingerprint")),
                "phase": decided,
                "detail": sentence,
                "http_status": answer.status,
                "orphans": list(facts.orphans),
                "log": process.get("log"),
                # One that wrote nothing yet has the line that notes its start, not the last words of the one before.
                "log_tail": ((since_start(written) or written[-1:]) if alive else written)[-log_lines:],
                "first_errors": first_errors(written),
                "rss_bytes": sum(table[pid].rss for pid in family),
            }
        )
    work = work_of(members, table)
    return [{**state, "work": work} for state in states]
