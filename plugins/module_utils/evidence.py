"""What a person needs to see why something does not run, from one node: kept there, or put into an archive.

Everything passes the log's own cleaning (`engine_state.clean_line`), and every secret that the node's releases know is
masked wherever it stands, so that none lands in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import socket
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import asking, engine_state, release

FOLDER = "evidence"
COMMAND_SECONDS = 20.0
KNOCK_SECONDS = 3.0
# Of a deployment's log, its own last lines; of each command's output too.
LOG_LINES = 5000
COMMANDS = {
    "processes.txt": ("ps", "-eo", "pid,ppid,stat,etimes,rss,user,comm", "--sort=-rss"),
    "kernel.txt": ("dmesg", "--ctime"),
    "memory.txt": ("free", "-m"),
    "disks.txt": ("df", "-h"),
    "gpus.txt": ("nvidia-smi",),
}
# What a colleague needs beside that, who cannot look at the node.
MORE_COMMANDS = {
    "gpus-full.txt": ("nvidia-smi", "-q"),
    "gpus-topology.txt": ("nvidia-smi", "topo", "-m"),
    "gpus-amd.txt": ("amd-smi", "list"),
    "gpus-amd-metric.txt": ("amd-smi", "metric"),
    "network/addresses.txt": ("ip", "-br", "address"),
    "network/routes.txt": ("ip", "route"),
    "network/listeners.txt": ("ss", "-ltn"),
    "network/infiniband.txt": ("ibstat",),
    "containers.txt": ("docker", "ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Image}} {{.Status}} {{.Names}}"),
    "docker.journal.txt": ("journalctl", "--no-pager", "--lines=300", "--output=short-iso", "--unit=docker.service"),
}  # fmt: skip
MORE_FILES = ("/proc/driver/nvidia/version", "/proc/meminfo", "/proc/loadavg", "/etc/os-release", "/etc/hosts")
_SECRET_FILE = re.compile(r"^\w+=\$\(read_secret (.+)\)$", re.MULTILINE)
_KEY_END = "-----END"
LEFT_OUT = "(what stood before was left out)"


def folder_name(plan_id: str, now: float) -> str:
    """The folder of one attempt: sorted by name is sorted by time. now: seconds since 1970."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{plan_id}"


def clean(lines: Iterable[str], limit: int, secrets: Collection[str] = ()) -> str:
    """Lines for human eyes, secrets masked; the last ones where all are more than `limit` bytes.

    secrets: values that are masked wherever they stand.
    """
    kept: list[str] = []
    size = 0
    # The longest first: one may begin with another.
    hidden = sorted(secrets, key=len, reverse=True)
    for line in reversed([engine_state.clean_line(_masked(line, hidden)) for line in _without_keys(lines)]):
        size += len(line.encode()) + 1
        if size > limit:
            kept.append(LEFT_OUT)
            break
        kept.append(line)
    return "\n".join([*reversed(kept), ""])


def _masked(line: str, secrets: Collection[str]) -> str:
    for secret in secrets:
        if secret in line:
            line = line.replace(secret, engine_state.MASK)
    return line


def _without_keys(lines: Iterable[str]) -> Iterable[str]:
    """The lines without what stands within a private key in PEM."""
    inside = False
    for line in lines:
        if inside and _KEY_END not in line:
            continue
        shown, inside = engine_state.mask_keys(line[line.index(_KEY_END) :] if inside else line)
        yield shown


def share(sizes: Sequence[int], limit: int) -> list[int]:
    """Bytes for each of several texts, together at most `limit`: small ones whole, the rest in equal parts."""
    left, result = limit, [0] * len(sizes)
    for place, (position, size) in enumerate(sorted(enumerate(sizes), key=lambda item: item[1])):
        result[position] = min(size, left // (len(sizes) - place))
        left -= result[position]
    return result


def known_secrets(path: str) -> set[str]:
    """Values that the releases of a deployment keep as secrets, or are given as such: of variables, flags and files.

    Args:
        path: the deployment's directory.
    """
    found: set[str] = set()
    root = Path(path)
    files = [file for file in root.glob("secrets/*") if file.is_file()]
    for run in root.glob("releases/*/*/run"):
        text = _read(run)
        _, _, command = text.partition("exec \\\n")
        with contextlib.suppress(ValueError):
            argv = shlex.split(command.replace(" \\\n    ", " "))
            found |= _hidden(argv)
            files += [Path(shlex.split(word)[0]) for word in _SECRET_FILE.findall(text)]
    for env in root.glob("releases/*/*/env"):
        with contextlib.suppress(ValueError):
            pairs = (word.partition("=")[::2] for word in shlex.split(_read(env)))
            found |= {value for name, value in pairs if release.is_secret_name(name)}
    for file in files:
        found |= set(_read(file).split())
    return {value for value in found if len(value) >= release.MIN_MASKED}


def _hidden(argv: Sequence[str]) -> set[str]:
    """The values that `release.mask_argv` hides."""
    pairs = zip(argv, release.mask_argv(argv))  # noqa: B905 - Python 3.9 has no strict
    return {word.partition("=")[2] if word.startswith("--") else word for word, shown in pairs if word != shown}


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def gather(path: str, units: Mapping[str, str], manager: str) -> dict[str, list[str]]:
    """Lines by file name: logs, what the manager says, units, the release without its secrets, and the machine.

    Args:
        path: the deployment's directory.
        units: unit of each process by the process's name.
        manager: systemd or supervisor.
    """
    texts = {
        f"logs/{file.name}": engine_state.tail(file, LOG_LINES) for file in sorted(Path(path, "logs").glob("*.log"))
    }
    current = Path(path, "current")
    for name, text in release.shown_files(current).items():
        texts[f"release/{name}"] = text.splitlines()
    plan = current / "plan.json"
    if plan.is_file():
        texts["release/plan.json"] = _lines_of_json(_read(plan))
    commands = dict(COMMANDS)
    for name, unit in units.items() if manager == "systemd" else ():
        file = Path("/etc/systemd/system", f"{unit}.service")
        if file.is_file():
            texts[f"units/{file.name}"] = file.read_text(errors="replace").splitlines()
        commands[f"units/{name}.status.txt"] = ("systemctl", "status", "--no-pager", "--lines=0", f"{unit}.service")
        journal = ("journalctl", "--no-pager", "--lines=1000", "--output=short-iso", f"--unit={unit}.service")
        commands[f"units/{name}.journal.txt"] = journal
    texts.update({name: lines for name, command in commands.items() if (lines := _output(command))})
    return texts


def _lines_of_json(text: str) -> list[str]:
    """A document over many lines: one alone would be cut as a log's too long line is."""
    with contextlib.suppress(ValueError):
        return json.dumps(json.loads(text), indent=1).splitlines()
    return text.splitlines()


def gather_more(path: str, peers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What a colleague needs beside `gather`: driver, network, peers, gateway, watchdog, earlier failures, the log.

    Args:
        path: the deployment's directory.
        peers: `address` and `ports` of the other nodes of the replica, by node.
    """
    root = Path(path)
    state = root.parent.parent
    texts: dict[str, list[str]] = {
        name: lines for name, command in MORE_COMMANDS.items() if (lines := _output(command))
    }
    for name in MORE_FILES:
        texts[f"machine/{name.strip('/').replace('/', '-')}"] = _read(Path(name)).splitlines()
    texts["machine.json"] = json.dumps(_machine(), indent=1).splitlines()
    if peers:
        texts["network/peers.txt"] = [knock(name, peer["address"], peer["ports"]) for name, peer in peers.items()]
    for part in ("gateway", "watchdog"):
        for file in sorted(Path(f"{path}-{part}", "logs").glob("*.log")):
            texts[f"{part}/{file.name}"] = engine_state.tail(file, LOG_LINES)
    watchdog = state / "watchdog" / root.name
    for file in (watchdog / "state.json", *sorted(watchdog.glob("stalls/*.txt"))):
        texts[f"watchdog/{file.name}"] = _read(file).splitlines()
    for file in sorted(root.glob("outcomes/*")):
        texts[f"releases/{file.name}"] = _read(file).splitlines()
    texts["releases/there.txt"] = sorted(f"releases/{entry.name}" for entry in root.glob("releases/[!.]*"))
    attempts = sorted(root.glob(f"{FOLDER}/*"))
    texts["releases/kept-evidence.txt"] = [str(entry) for entry in attempts]
    if attempts:
        # The last failed start, which a way back has since replaced.
        for file in sorted(attempts[-1].glob("logs/*.log")):
            texts[f"last-failure/{file.name}"] = engine_state.tail(file, LOG_LINES)
    texts["audit.jsonl"] = engine_state.tail(state / "audit/audit.jsonl", 200)
    texts["lease.json"] = _read(state / "lease/lease.json").splitlines()
    return {name: lines for name, lines in texts.items() if lines}


def knock(name: str, address: str, ports: Sequence[int]) -> str:
    """Whether a peer can be reached at one of a few ports: that it refuses is an answer too."""
    problem = ""
    for port in ports:
        try:
            with socket.create_connection((address, port), timeout=KNOCK_SECONDS):
                return f"{name} {address}: answers at port {port}"
        except ConnectionRefusedError:
            return f"{name} {address}: is there, refuses port {port}"
        except OSError as error:
            problem = str(error.strerror or error)
    return f"{name} {address}: does not answer ({problem})"


def _machine() -> dict[str, Any]:
    """Which machine it is, and its clock in the form of the kernel's log."""
    return {
        "hostname": platform.node(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "local_time": time.ctime(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _output(command: Sequence[str]) -> list[str]:
    """A command's output in lines, or why it gave none; nothing where the node has no such program."""
    ended = asking.run(command, COMMAND_SECONDS)
    if ended.problem.endswith("is not there"):
        return []
    text: str = ended.problem or ended.said + ended.complained
    return text.splitlines()[-LOG_LINES:]


def capped(texts: Mapping[str, Sequence[str]], limit: int, secrets: Collection[str] = ()) -> dict[str, str]:
    """Texts by file name, cleaned, together of at most about `limit` bytes."""
    whole = {name: clean(lines, limit, secrets) for name, lines in texts.items() if lines}
    shares = share([len(text.encode()) for text in whole.values()], limit)
    return {
        name: text if len(text.encode()) <= room else clean(text.splitlines(), room)
        for (name, text), room in zip(whole.items(), shares)  # noqa: B905 - Python 3.9 has no strict
    }


def keep(  # noqa: PLR0917 - what is written and its bounds
    path: str, plan_id: str, texts: Mapping[str, Sequence[str]], limit: int, attempts: int,
    secrets: Collection[str] = (),
) -> str:  # fmt: skip
    """Write one attempt's folder, and remove the oldest beyond `attempts`.

    Args:
        path: the deployment's directory.
        plan_id: of the release that failed.
        texts: lines by file name.
        limit: bytes that all files together may have.
        attempts: folders that stay.
        secrets: values that are masked wherever they stand.

    Returns:
        The folder's path.
    """
    root = Path(path, FOLDER)
    root.mkdir(mode=release.DIRECTORY_MODE, parents=True, exist_ok=True)
    older = sorted(entry for entry in root.iterdir() if entry.is_dir())
    # First room, then what is new: the disk may be what is full.
    for entry in older[: max(0, len(older) - attempts + 1)]:
        shutil.rmtree(entry)
    folder = root / folder_name(plan_id, time.time())
    folder.mkdir(mode=release.DIRECTORY_MODE)
    for name, text in capped(texts, limit, secrets).items():
        file = folder / name
        file.parent.mkdir(mode=release.DIRECTORY_MODE, parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o600)
    return str(folder)


def archive(
    texts: Mapping[str, Sequence[str]], limit: int, secrets: Collection[str] = (), places: Sequence[str] = ()
) -> str:
    """Put texts into a compressed archive of its owner alone, in a temporary folder of the node.

    Args:
        texts: lines by file name.
        limit: bytes that all files together may have before they are compressed.
        secrets: values that are masked wherever they stand.
        places: folders to try, in order; unset are the system's own and memory, as the disk may be what is full.

    Returns:
        The archive's path; whoever asked for it removes it.

    Raises:
        OSError: where no place has room for it.
    """
    whole = capped(texts, limit, secrets)
    tried = list(places or (tempfile.gettempdir(), "/dev/shm"))  # noqa: S108
    for place in tried:
        path = ""
        try:
            descriptor, path = tempfile.mkstemp(prefix="stepladder-diagnose-", suffix=".tar.gz", dir=place)
            with os.fdopen(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as tar:
                for name, text in whole.items():
                    add_text(tar, name, text)
        except OSError:
            if path:
                Path(path).unlink()
            if place == tried[-1]:
                raise
        else:
            return path
    raise AssertionError("the last place returns or raises")


def add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    """Add a text to an archive as a file of its owner alone."""
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
    tar.addfile(entry, io.BytesIO(data))
