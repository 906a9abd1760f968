"""What a machine lacks for a lab, and what its nodes take over from it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from stepladder.lab import machine
from stepladder.lab.machine import Packages

GIB = 1024**3
DEB822 = """\
# from the installer
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main
Enabled: yes

Types: deb
URIs: http://vendor.example/node
Suites: nodistro
Components: main

Types: deb-src
URIs: http://mirror.example/debian
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: http://old.example/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """\
# deb http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/site.gpg] http://mirror.example/debian bookworm main contrib
deb http://mirror.example/security bookworm-security main
deb-src http://mirror.example/debian bookworm main
deb http://vendor.example/apt cloud-sdk-bookworm main
deb http://mirror.example/debian bookwormish main
"""


def lacks(**changes: object) -> tuple[list[str], list[str]]:
    whole = {
        "root": True,
        "capabilities": ["SYS_RESOURCE"],
        "found": lambda name: f"/usr/bin/{name}",
        "free_bytes": 100 * GIB,
        "sources": True,
        "state": Path("/s"),
        "engine_answers": False,
    }
    return machine.missing(**(whole | changes))  # type: ignore[arg-type]


def test_a_machine_with_everything_lacks_nothing() -> None:
    assert lacks() == ([], [])


def test_everything_that_is_missing_is_told_at_once_with_one_command() -> None:
    told, packages = lacks(
        root=False, capabilities=["SYS_ADMIN", "SYS_TIME", "NET_ADMIN"], found=lambda name: name == "ssh",
        free_bytes=GIB, sources=False,
    )  # fmt: skip
    assert told == [
        "root: nodes are containers with capabilities, networks and mounts of their own",
        "the capabilities NET_ADMIN, SYS_ADMIN, which this container was not given",
        *(
            f"the program {name} (package {package})"
            for name, package in machine.PROGRAMS.items()
            if name != "ssh"
        ),
        "4 GiB of disk below /s; 1.0 GiB are free",
        "apt sources of this machine's own release, from which the nodes are made",
    ]  # fmt: skip
    text = machine.missing_text(told, packages)
    assert text.count("\n  - ") == len(told)
    assert (
        "\nRun: apt-get update && apt-get install -y docker.io mmdebstrap iproute2 iptables util-linux mount e2fsprogs "
        "openssh-client\nor the same command with --install"
    ) in text


def test_no_daemon_is_needed_where_an_engine_answers() -> None:
    assert lacks(found=lambda name: name != "dockerd", engine_answers=True) == ([], [])
    assert lacks(found=lambda name: name != "dockerd")[1] == ["docker.io"]


def test_no_command_is_told_where_no_package_would_help() -> None:
    assert "apt-get" not in machine.missing_text(*lacks(root=False))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("000001ffffffffff", []),
        ("000001fffeffffff", ["SYS_RESOURCE"]),
        # what Docker gives a container that asks for nothing
        ("00000000a80425fb", [n for i, n in enumerate(machine.CAPABILITIES) if not 0xA80425FB >> i & 1]),
    ],
)
def test_missing_capabilities(bits: str, expected: list[str]) -> None:
    status = f"Name:\tpython\nCapEff:\t0000000000000000\nCapBnd:\t{bits}\n"
    assert machine.missing_capabilities(status) == expected


def test_stanzas_of_the_machines_own_release_are_taken() -> None:
    stanzas = machine.stanzas_of_release(DEB822, "bookworm")
    assert [line for stanza in stanzas for line in stanza.splitlines() if line.startswith("Suites")] == [
        "Suites: bookworm bookworm-updates",
        "Suites: bookworm-security",
    ]
    assert "installer" not in stanzas[0]


def test_lines_of_the_machines_own_release_are_taken() -> None:
    assert machine.lines_of_release(ONE_LINE, "bookworm") == [
        "deb [arch=amd64 signed-by=/usr/share/keyrings/site.gpg] http://mirror.example/debian bookworm main contrib",
        "deb http://mirror.example/security bookworm-security main",
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's file system, as far as a lab reads it."""
    for path, content in {
        "etc/os-release": 'ID=debian\nVERSION_CODENAME=bookworm\nVERSION_ID="12"\n',
        "etc/apt/sources.list": "",
        "etc/apt/sources.list.d/debian.sources": DEB822,
        "etc/apt/sources.list.d/site.list": ONE_LINE,
        "etc/apt/sources.list.d/old.list.disabled": "deb http://never.example/ bookworm main\n",
        "etc/apt/auth.conf.d/site.conf": "machine mirror.example login me password secret\n",
        "etc/resolv.conf": "nameserver 127.0.0.53\noptions edns0\n",
        "run/systemd/resolve/resolv.conf": "# by systemd\nnameserver 198.18.9.9\nsearch site.example\n",
        "usr/share/keyrings/debian.gpg": "key",
        "usr/share/keyrings/site.gpg": "site key",
        "usr/local/share/ca-certificates/site.crt": "ca",
        "etc/ssl/certs/ca-certificates.crt": "bundle",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    return tmp_path


def test_a_node_reaches_what_the_machine_reaches(root: Path) -> None:
    dump = 'Acquire::http::Proxy "http://proxy.example:3128";\nAcquire::Check-Valid-Until "false";\nAPT::Cmd "x";\n'
    pip = {"extra-index-url": "http://a.example/simple http://b.example/simple", "timeout": "20"}
    found = machine.packages(root / "etc", pip, dump, {"HTTPS_PROXY": "http://p.example", "HOME": "/root"})
    assert found.release == "bookworm"
    assert "never.example" not in found.sources
    files = machine.node_files(found, root)
    assert files["/etc/pip.conf"][0].decode() == (
        "[global]\nextra-index-url = \n    http://a.example/simple\n    http://b.example/simple\ntimeout = 20\n"
    )
    assert files["/etc/apt/apt.conf.d/90machine"][0].decode().splitlines() == dump.splitlines()[:2]
    assert files["/etc/environment"][0] == b"https_proxy=http://p.example\nHTTPS_PROXY=http://p.example\n"
    assert files["/etc/apt/auth.conf.d/site.conf"][1] == 0o600
    assert files["/usr/share/keyrings/debian.gpg"][0] == b"key"
    assert files["/usr/share/keyrings/site.gpg"][0] == b"site key"
    assert files["/usr/local/share/ca-certificates/site.crt"][0] == b"ca"
    assert files["/etc/ssl/certs/ca-certificates.crt"][0] == b"bundle"
    # the machine's own loopback is no name server of a node
    assert files["/etc/stepladder-lab/resolv.conf"][0] == b"nameserver 198.18.9.9\nsearch site.example\n"


def test_a_machine_without_sources_says_so(tmp_path: Path) -> None:
    found = machine.packages(tmp_path, {}, "", {})
    assert (found.release, found.sources, machine.node_files(found, tmp_path)) == (
        "", "", {"/etc/apt/apt.conf.d/90machine": (b"", 0o644)},
    )  # fmt: skip


def test_local_folders_of_pip_are_seen_by_nodes(tmp_path: Path) -> None:
    wheels, index = tmp_path / "my wheels", tmp_path / "index" / "simple"
    for folder in (wheels, index):
        folder.mkdir(parents=True)
    pip = {"find-links": f"{wheels.as_uri()} /no/such/folder http://links.example", "extra-index-url": index.as_uri()}
    # an index's pages link to the files beside it
    assert Packages("bookworm", [], [], [], pip).folders == sorted([str(wheels), str(index.parent)])


def test_archive_keeps_paths_modes_and_content() -> None:
    with tarfile.open(fileobj=io.BytesIO(machine.archive({"/etc/b": (b"2", 0o600), "/a": (b"", 0o755)}))) as tar:
        assert [(entry.name, entry.mode, entry.size) for entry in tar] == [("a", 0o755, 0), ("etc/b", 0o600, 1)]
