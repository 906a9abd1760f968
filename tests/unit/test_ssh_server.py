"""On which ports a node lets people in by SSH; the processes are real, those of /proc that cannot be are files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import ssh_server
from ansible_collections.stepladder.core.plugins.module_utils.ssh_server import Connection

CONNECTIONS = {
    "IPv4": ("198.18.9.1 50412 198.18.0.11 2222", Connection("198.18.0.11", 2222)),
    "IPv6": ("2001:2::9 50412 2001:2::1 22", Connection("2001:2::1", 22)),
    "none": ("", Connection()),
    "something else": ("UNKNOWN 65535 UNKNOWN", Connection()),
}


@pytest.mark.parametrize(("text", "expected"), CONNECTIONS.values(), ids=CONNECTIONS)
def test_connection(text: str, expected: Connection) -> None:
    assert ssh_server.parse_connection(text) == expected


# The form of `systemctl show --property=ActiveState,Listen ssh.socket sshd.socket`, systemctl(1); written by hand.
SOCKETS = {
    "active, both kinds of addresses": (
        "Listen=0.0.0.0:2222 (Stream)\nListen=[::]:2222 (Stream)\nActiveState=active\n\nActiveState=inactive\n", {2222}
    ),
    "sshd listens itself": ("Listen=[::]:22 (Stream)\nActiveState=inactive\n\nActiveState=inactive\n", set()),
    "no TCP": ("Listen=vsock::22 (Stream)\nListen=/run/ssh.sock (Stream)\nActiveState=active\n", set()),
    "the second one": ("ActiveState=inactive\n\nListen=198.18.0.11:30022 (Stream)\nActiveState=active\n", {30022}),
    "no systemd": ("", set()),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), SOCKETS.values(), ids=SOCKETS)
def test_sockets_of_systemd(text: str, expected: set[int]) -> None:
    assert ssh_server.parse_sockets(text) == expected


PROCESSES = {
    "before OpenSSH 8.2": ("sshd", "/usr/sbin/sshd\0-D\0", True),
    "since": ("sshd", "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups\0", True),
    "a session, with ports that its client forwards": ("sshd", "sshd: root@notty\0", False),
    "a session of before 9.8": ("sshd", "sshd: me [priv]\0", False),
    "a session since": ("sshd-session", "sshd-session: root@notty\0", False),
    "another": ("nginx", "nginx: master process\0", False),
}


@pytest.mark.parametrize(("name", "title", "expected"), PROCESSES.values(), ids=PROCESSES)
def test_who_is_the_server(name: str, title: str, expected: bool) -> None:
    assert ssh_server.is_server(name, title) is expected


def stand_in(tmp_path: Path, name: str) -> tuple[subprocess.Popen[str], int]:
    """A process of that name which listens on a port of the system's choice."""
    program = tmp_path / name
    program.symlink_to(sys.executable)
    listens = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    process = subprocess.Popen(
        [str(program), "-S", "-c", listens], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, int(process.stdout.readline())


def test_ports_of_a_server_that_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel tells them; another process's port is not among them."""
    monkeypatch.setattr(ssh_server, "connection", lambda _: Connection("198.18.0.11", 4022))
    server, port = stand_in(tmp_path, "sshd")
    try:
        with socket.create_server(("", 0)) as other:
            found = ssh_server.ports()
            assert {port, 4022} <= {*found}
            assert other.getsockname()[1] not in found
            assert found == sorted(found)
    finally:
        server.communicate("\n")


def test_sudo_hides_the_connection_and_its_parent_tells(tmp_path: Path) -> None:
    for pid, parent, environment in (
        (os.getpid(), 700, b"LANG=C\0"),
        (700, 600, b"SSH_CONNECTION=198.18.9.1 50412 198.18.0.11 2222\0"),
        (600, 1, b""),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_bytes(environment)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (sh) S {parent} 1 1\n")
    assert ssh_server.connection(tmp_path) == Connection("198.18.0.11", 2222)
    (tmp_path / "700" / "environ").write_bytes(b"")
    assert ssh_server.connection(tmp_path) == Connection()
