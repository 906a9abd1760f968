"""What a person needs to see why a start failed, kept on the node before anything is stopped or replaced.

Everything that is written passes the log's own cleaning (`engine_state.clean_line`), so that no secret lands in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ansible_collections.stepladder.core.plugins.module_utils import engine_state, release

FOLDER = "evidence"
COMMAND_SECONDS = 20.0
# Of a deployment's log, its own last lines; of each command's output too.
LOG_LINES = 5000
COMMANDS = {
    "processes.txt": ("ps", "-eo", "pid,ppid,stat,etimes,rss,user,comm", "--sort=-rss"),
    "kernel.txt": ("dmesg", "--ctime"),
    "memory.txt": ("free", "-m"),
    "disks.txt": ("df", "-h"),
    "gpus.txt": ("nvidia-smi",),
}


def folder_name(plan_id: str, now: float) -> str:
    """The folder of one attempt: sorted by name is sorted by time. now: seconds since 1970."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{plan_id}"


def clean(lines: Iterable[str], limit: int) -> str:
    """Lines for human eyes, secrets masked; the last ones where all are more than `limit` bytes."""
    kept: list[str] = []
    size = 0
    for line in reversed([engine_state.clean_line(line) for line in lines]):
        size += len(line.encode()) + 1
        if size > limit:
            kept.append("(what stood before was left out)")
            break
        kept.append(line)
    return "\n".join([*reversed(kept), ""])


def share(sizes: Sequence[int], limit: int) -> list[int]:
    """Bytes for each of several texts, together at most `limit`: small ones whole, the rest in equal parts."""
    left, result = limit, [0] * len(sizes)
    for place, (position, size) in enumerate(sorted(enumerate(sizes), key=lambda item: item[1])):
        result[position] = min(size, left // (len(sizes) - place))
        left -= result[position]
    return result


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
        texts["release/plan.json"] = plan.read_text(errors="replace").splitlines()
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


def _output(command: Sequence[str]) -> list[str]:
    """A command's output in lines; nothing where the node has no such program."""
    if not shutil.which(command[0]):
        return []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=False,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"{' '.join(command)}: {error}"]
    return (done.stdout + done.stderr).splitlines()[-LOG_LINES:]


def keep(path: str, plan_id: str, texts: Mapping[str, Sequence[str]], limit: int, attempts: int) -> str:
    """Write one attempt's folder, and remove the oldest beyond `attempts`.

    Args:
        path: the deployment's directory.
        plan_id: of the release that failed.
        texts: lines by file name.
        limit: bytes that all files together may have.
        attempts: folders that stay.

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
    whole = {name: clean(lines, limit) for name, lines in texts.items() if lines}
    shares = share([len(text.encode()) for text in whole.values()], limit)
    for position, (name, text) in enumerate(whole.items()):
        room = shares[position]
        file = folder / name
        file.parent.mkdir(mode=release.DIRECTORY_MODE, parents=True, exist_ok=True)
        file.write_text(text if len(text.encode()) <= room else clean(text.splitlines(), room))
        file.chmod(0o600)
    return str(folder)
