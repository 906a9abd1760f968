"""Where this node lets people in by SSH: the ports that its server listens on, and the connection of this run.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from ansible_collections.stepladder.core.plugins.module_utils import asking, preflight

PROC = Path("/proc")
# Where systemd listens for sshd, which then may not run at all: Debian's and Ubuntu's name, and everybody else's.
SOCKETS = ("ssh.socket", "sshd.socket")


class Connection(NamedTuple):
    """This node's end of an SSH connection; empty and 0 where there is none."""

    address: str = ""
    port: int = 0


def parse_connection(text: str) -> Connection:
    """Read SSH_CONNECTION: the client's address and port, then the server's (ssh(1), ENVIRONMENT)."""
    parts = text.split()
    return Connection(parts[2], int(parts[3])) if len(parts) == 4 and parts[3].isdigit() else Connection()


def parse_sockets(text: str) -> set[int]:
    """Read `systemctl show --property=ActiveState,Listen`: TCP ports of the sockets that are active."""
    active = (one for one in text.split("\n\n") if re.search(r"^ActiveState=active$", one, re.MULTILINE))
    return {int(port) for one in active for port in re.findall(r"^Listen=(?!vsock:).*:(\d+) \(Stream\)$", one, re.M)}


def is_server(name: str, title: str) -> bool:
    """Whether a process is the sshd that listens, by its name and its title.

    The process of a session holds sockets too, those that its client has forwarded (before OpenSSH 9.8 under the same
    name): ports that come and go, and that a client chose. Since 8.2 the server has `[listener]` in its title.
    """
    return name == "sshd" and (not title.startswith("sshd: ") or "[listener]" in title)


def connection(proc: Path = PROC) -> Connection:
    """The connection that this process was started over; sudo takes it out of the environment, so its parents count."""
    return parse_connection(preflight.inherited(proc / str(os.getpid()), "SSH_CONNECTION"))


def ports(proc: Path = PROC) -> list[int]:
    """The TCP ports on which people get in: of sshd, of systemd for it, and of this run's connection.

    Only root sees which process listens.
    """
    servers = [
        process
        for process in preflight.processes(proc)
        if is_server(preflight.read_text(process / "comm").strip(), preflight.read_text(process / "cmdline"))
    ]
    held = {inode for process in servers for inode in preflight.open_sockets(process)}
    tables = (preflight.read_text(proc / "net" / name) for name in ("tcp", "tcp6"))
    found = {one.port for table in tables for one in preflight.parse_proc_net_tcp(table) if one.inode in held}
    told, _ = asking.ask(("systemctl", "show", "--property=ActiveState,Listen", *SOCKETS))
    found |= parse_sockets(told)
    port = connection(proc).port
    return sorted(found | ({port} if port else set()))
