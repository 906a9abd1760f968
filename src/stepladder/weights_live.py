"""The verb `weights`: its playbook, and on a terminal a table of all nodes that moves while it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stepladder.show import gigabytes

PLAYBOOK = Path(__file__).resolve().parents[2] / "playbooks" / "weights.yml"
FOLDER_VARIABLE = "STEPLADDER_PROGRESS"
REFRESH_SECONDS = 0.5
PLAIN_FLAGS = re.compile(r"-[kK]$|--ask-|--check$|-C$|--syntax-check$|--list-|-v+$")
# What the table says already.
REPEATED = re.compile(r"^  \S+ \| model_weights : .*: (downloaded|checking|has everything|everybody has) ")


@dataclass(frozen=True)
class Row:
    """A node's line: bytes there and in all, bytes per second; seconds left, None where that cannot be said."""

    node: str
    phase: str
    done: int
    total: int
    rate: float
    left: float | None


def row(node: str, state: Mapping[str, Any]) -> Row:
    """What a node's job told last, as a line."""
    phase, total = str(state.get("phase", "")), int(state.get("total", 0))
    done = total if phase in {"passing-on", "done"} else int(state.get("done", 0))
    rate = float(state.get("bytes_per_second", 0))
    left = (total - done) / rate if rate > 0 and phase == "fetching" else None
    return Row(node, phase, done, total, rate, left)


def total_row(rows: Sequence[Row]) -> Row:
    """All nodes together; it lasts as long as the slowest."""
    lefts = [one.left for one in rows if one.left is not None]
    return Row(
        "all",
        f"{sum(one.phase in {'passing-on', 'done'} for one in rows)} of {len(rows)} have it",
        sum(one.done for one in rows),
        sum(one.total for one in rows),
        sum(one.rate for one in rows if one.phase == "fetching"),
        max(lefts, default=None),
    )


def duration(seconds: float | None) -> str:
    """Seconds for people; empty where they are not known."""
    if seconds is None:
        return ""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def read_states(folder: Path) -> dict[str, dict[str, Any]]:
    """What every node's job told last, by node."""
    found = {}
    for path in sorted(folder.glob("*")):
        if path.suffix != ".new":
            try:
                found[path.name] = dict(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
    return found


def table(rows: Iterable[Row]) -> Table:
    """The lines as rich draws them."""
    drawn = Table(box=None, padding=(0, 1), show_header=False)
    for one in rows:
        bar = ProgressBar(total=max(one.total, 1), completed=one.done, width=30)
        rate = f"{one.rate / 1e6:,.0f} MB/s" if one.phase == "fetching" or one.node == "all" else ""
        sizes = f"{gigabytes(one.done)} of {gigabytes(one.total)}" if one.total else ""
        drawn.add_row(one.node, bar, sizes, rate, duration(one.left), one.phase)
    return drawn


def draw(folder: Path) -> Table | Group:
    """The table now; nothing while no node has told anything."""
    rows = [row(node, state) for node, state in read_states(folder).items()]
    if not rows:
        return Group()
    return table([*rows, total_row(rows)] if len(rows) > 1 else rows)


def watch(command: Sequence[str], console: Console) -> int:
    """Run the playbook, what it prints above the table; its exit status."""
    with tempfile.TemporaryDirectory(prefix="stepladder-") as name:
        folder = Path(name)
        environ = {**os.environ, FOLDER_VARIABLE: name, "ANSIBLE_FORCE_COLOR": "1"}
        child = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, errors="replace")
        with Live(console=console, refresh_per_second=1 / REFRESH_SECONDS) as live:

            def redraw() -> None:
                while child.poll() is None:
                    live.update(draw(folder))
                    time.sleep(REFRESH_SECONDS)

            threading.Thread(target=redraw, daemon=True).start()
            assert child.stdout is not None  # noqa: S101 - stdout=PIPE above; for the type checker
            try:
                for line in child.stdout:
                    text = Text.from_ansi(line.rstrip("\n"))
                    if not REPEATED.match(text.plain):
                        live.console.print(text)
            except KeyboardInterrupt:
                child.wait()  # it had the signal too, and ends its jobs on the nodes
            live.update(draw(folder))
        return child.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: of ansible-playbook.

    Returns: its exit status. Where nobody watches, or it may ask for a password, it runs without the table.
    """
    program = Path(sys.executable).with_name("ansible-playbook")
    command = [str(program), str(PLAYBOOK), *arguments]
    console = Console()
    if not console.is_terminal or any(PLAIN_FLAGS.match(argument) for argument in arguments):
        os.execv(command[0], command)  # noqa: S606 - no shell is the point
    return watch(command, console)
