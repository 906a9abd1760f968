"""Packages of a node: what is planned from apt's and dpkg's own texts, and what is refused."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import (
    apt,
    dnf,
    package_plan,
    package_sources,
    system_packages,
)
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Foreseen, Package, Spec
from ansible_collections.stepladder.core.plugins.module_utils.package_sources import Pin, Release, Repository

from stepladder import mirrors

# ---- recorded: dpkg and apt of Debian 12 (apt 2.6.1), 2026-11, stand-ins of the lab's repository ---------------------

DPKG = """\
libnvidia-ml1	580.126.20-1	ii$
nvidia-kernel-open-dkms	580.126.20-1	hi$
nvidia-persistenced	580.126.20-1	iU$
libnvidia-nscq	580.126.20-1	iF$
docker.io	20.10.24	rc$
linux-image		un$
libc6	2.36-9	ii$
libc6	2.36-8	iU$
""".replace("$", " ")
SIMULATED = """\
Reading package lists...
The following NEW packages will be installed:
  libnvidia-ml1 nvidia-fabricmanager
Inst libnvidia-ml1 (580.126.20-1 stand-in [amd64])
Inst nvidia-fabricmanager [580.95.05-1] (580.126.20-1 stand-in [amd64]) []
Remv nvidia-driver-570 [570.86.15-1]
Remv libnvidia-ml1 [570.86.15-1]
Conf libnvidia-ml1 (580.126.20-1 stand-in [amd64])
"""


def test_dpkg_is_read_with_what_is_not_whole() -> None:
    assert package_plan.parse_dpkg(DPKG) == {
        "libnvidia-ml1": Package("580.126.20-1", "ii"),
        "nvidia-kernel-open-dkms": Package("580.126.20-1", "hi"),
        "nvidia-persistenced": Package("580.126.20-1", "iU"),
        "libnvidia-nscq": Package("580.126.20-1", "iF"),
        "libc6": Package("2.36-8", "iU"),
    }


def test_a_simulation_is_read() -> None:
    assert package_plan.parse_simulation(SIMULATED) == Foreseen(
        {"libnvidia-ml1": "580.126.20-1", "nvidia-fabricmanager": "580.126.20-1"}, ["nvidia-driver-570"]
    )


THERE = {
    "fm": Package("580.126.20-1ubuntu1"),
    "dkms": Package("1:6.16.13.30300400-2", "hi"),
    "half": Package("1", "iU"),
}
MISSING = {
    "there": (["fm"], []),
    "there in the version": (["fm=580.126.20-*"], []),
    "there in another": (["fm=580.126-*"], ["fm=580.126-*"]),
    "the epoch need not be named": (["dkms=6.16.13.30300400-*"], []),
    "nor is it in the way": (["dkms=1:6.16.13.30300400-*"], []),
    "half configured is missing": (["half"], ["half"]),
    "not there": (["fm", "nscq=1-*"], ["nscq=1-*"]),
}


@pytest.mark.parametrize(("wanted", "expected"), MISSING.values(), ids=MISSING)
def test_missing(wanted: list[str], expected: list[str]) -> None:
    assert [str(spec) for spec in package_plan.missing(map(Spec.of, wanted), THERE)] == expected


def test_half_done() -> None:
    assert package_plan.half_done(package_plan.parse_dpkg(DPKG)) == ["libc6", "libnvidia-nscq", "nvidia-persistenced"]


def test_holds_reach_what_is_and_what_will_be_installed() -> None:
    foreseen = Foreseen({"nscq": "580.126.20-1", "zlib": "1.2"}, ["gone"])
    installed = THERE | {"gone": Package("580.126.20-1")}
    specs = [Spec.of("*=580.126.20-*"), Spec.of("dk*")]
    assert package_plan.to_hold(specs, installed, foreseen, {"dkms"}) == ["fm", "nscq"]


REFUSED: dict[str, tuple[Foreseen, bool, list[str]]] = {
    "new": (Foreseen({"nscq": "1"}), False, []),
    "another version of what is asked for": (
        Foreseen({"fm": "580.159.04-1"}),
        False,
        ["fm 580.126.20-1ubuntu1 would become 580.159.04-1: a change of what runs is made only where it is allowed "
         "(allow_change)"],
    ),
    "the same, allowed": (Foreseen({"fm": "580.159.04-1"}), True, []),
    "a half configured one is no change": (Foreseen({"half": "2"}), False, []),
    "a removal, never": (
        Foreseen({}, ["docker.io"]),
        True,
        ["it would remove docker.io; remove them by hand if that is meant, or leave the packages that are there alone"],
    ),
    "a removal of what is pinned": (
        Foreseen({"nvidia-headless-open": "595.45.04-1"}, ["libnvidia-compute-580"]),
        False,
        ["it would remove libnvidia-compute-580; remove them by hand if that is meant, or leave the packages that are "
         "there alone"],
    ),
    "a removal of what is pinned, allowed": (
        Foreseen({"nvidia-headless-open": "595.45.04-1"}, ["libnvidia-compute-580"]), True, [],
    ),
    "of others beside it, never": (
        Foreseen({"nvidia-headless-open": "595.45.04-1"}, ["libnvidia-compute-580", "docker.io"]),
        True,
        ["it would remove docker.io; remove them by hand if that is meant, or leave the packages that are there alone"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("foreseen", "allowed", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(foreseen: Foreseen, allowed: bool, expected: list[str]) -> None:
    assert package_plan.refusals([Spec.of("fm"), Spec.of("half")], THERE, foreseen, allowed, ["*nvidia*"]) == expected


ADVICE = {
    "E: Write error - write (28: No space left on device)": "Free some space on the file system of /var",
    "E: Unable to locate package nvidia-open": "No repository of the node has it",
    "E: Version '580.1-*' for 'nvidia-fabricmanager' was not found": "No repository of the node has it",
    "The following signatures couldn't be verified because the public key is not available: NO_PUBKEY 1": "another key",
    "E: The repository 'http://m/nvidia  Release' is not signed.": "has no signature",
    "  Cannot initiate the connection to deb:80 (2a04::). - connect (101: Network is unreachable)": "did not reach",
    "E: Conflicting values set for option Signed-By regarding source http://m/ /: /a.asc != /b.gpg": "cuda-keyring?",
    "E: Release file for http://m/dists/b/InRelease is not valid yet (invalid for another 2h).": "clock is behind",
    "The certificate is NOT trusted. The certificate chain uses not yet valid certificate.": "clock is behind",
    "E: Release file for http://m/dists/b/InRelease is expired (invalid since 3d 5h).": "The mirror was not renewed",
    "The following signatures were invalid: EXPKEYSIG 9386B48A1A693C5C ROCm": "The repository's key has expired",
    "E: Failed to fetch https://m/InRelease  401  Unauthorized [IP: 198.18.0.5 443]": "/etc/apt/auth.conf.d",
    "  407  Proxy Authentication Required": "Acquire::http::Proxy",
    "Certificate verification failed: The certificate is NOT trusted.": "update-ca-certificates",
    "E: dpkg was interrupted": "Run again",
}


@pytest.mark.parametrize(("line", "expected"), ADVICE.items(), ids=ADVICE)
def test_advice(line: str, expected: str) -> None:
    assert expected in package_plan.apt_advice(["Reading package lists...", line])


# Texts of dnf 4 as public reports have them, shortened: (1) rocky-linux/rockylinux.org issue 201 (driver 580 of
# NVIDIA), (2) NVIDIA/yum-packaging-precompiled-kmod issue 28, (3) NVIDIA's images for CUDA, on the rotation of its key,
# (4) Arm's toolchains, on the rotation of theirs, (5) leapp's tests and Red Hat bug 1577041, (6) bootc on images that
# are read only, (7) ROCm's issue on amdgpu-install under RHEL, (8) dnf's own sources (`dnf/base.py`, `dnf/cli/cli.py`),
# (9) librepo's texts in reports on EPEL, Rocky Linux and Artifactory, (10) openEuler's guide on conflicts.
DNF_ADVICE = {
    "All matches were filtered out by modular filtering for argument: cuda-drivers\n"
    "Error: Unable to find a match: cuda-drivers": "A module hides it",  # (1)
    "  - package nvidia-settings-3:580.65.06-1.el10.x86_64 from cuda-rhel10 is filtered out by modular filtering\n"
    "(try to add '--skip-broken' to skip uninstallable packages)": "`dnf module list --enabled`",  # (1)
    "  - package kernel-core-4.18.0-305.19.1.el8_4.x86_64 is filtered out by exclude filtering": "excludepkgs",  # (2)
    "Public key for libnvjpeg-11-1-11.3.0.105-1.x86_64.rpm is not installed. Failing package is: libnvjpeg-11-1\n"
    "Error: GPG check FAILED": "another key than the pinned one",  # (3)
    'The GPG keys listed for the "Arm Toolchains" repository are already installed but they are not correct for this '
    "package.\nError: GPG check FAILED": "another key than the pinned one",  # (4)
    "Package x-1.rpm is not signed\nError: GPG check FAILED": "has no signature",  # (8)
    "GPG verification is enabled, but GPG signature is not available. This may be an error or the repository does not "
    "support GPG verification: Status code: 404 for http://m/repodata/repomd.xml.asc": "has no signature",  # (9)
    "Error: GPG check FAILED": "The signature does not fit",  # (8)
    "Disk Requirements:\n   At least 1120MB more space needed on the / filesystem.": "Free some space",  # (5)
    "  installing package kicad-1:4.0.7-1.fc27.x86_64 needs 691MB on the / filesystem": "Free some space",  # (5)
    "  installing package strace-6.9-1.fc40.x86_64 needs 2MB more space on the / filesystem": "Free some space",  # (6)
    "Failed to obtain the transaction lock (logged in as: root).": "came between; run again",  # (8)
    "error: can't create transaction lock on /var/lib/rpm/.rpm.lock (Resource temporarily unavailable)": "came between",
    "error: can't create transaction lock on /var/lib/rpm/.rpm.lock (Permission denied)": "set ansible_become",
    "Error: This command has to be run with superuser privileges (under the root user).": "Root is needed",  # (8)
    "[MIRROR] amdgpu-install.rpm: Status code: 404 for https://repo.radeon.com/amdgpu-install.rpm (IP: 10.78.90.46)\n"
    "Error: Error downloading packages: All mirrors were tried": "no such file: look at the repository's URL",  # (7)
    "  - Status code: 401 for https://m/artifactory/rpm/repodata/repomd.xml": "let it serve this node",  # (9)
    "  - Status code: 407 for https://m/repodata/repomd.xml": "proxy_username",  # (9)
    "  - Curl error (6): Couldn't resolve host name for https://mirrors.rockylinux.org/ [Could not resolve host]\n"
    "Error: Failed to download metadata for repo 'baseos'": "did not reach the repository",  # (9)
    "Curl error (60): SSL peer certificate or SSH remote key was not OK for https://m/ [SSL certificate problem: "
    "certificate is not yet valid]": "clock is behind",  # (9)
    "Curl error (60): SSL peer certificate or SSH remote key was not OK for https://m/ [SSL certificate problem: "
    "CA certificate key too weak]": "update-ca-trust",  # (9)
    "[MIRROR] x.rpm: Downloading successful, but checksum doesn't match. Calculated: 1(sha256)": "two states",  # (9)
    "  - nothing provides dkms needed by kmod-nvidia-open-dkms-3:580.126.20-1.el9.noarch": "dkms is in EPEL",
    "  - problem with installed package python2-blivet-1:3.1.1-5.noarch(try to add '--allowerasing' to command line to "
    "replace conflicting packages)": "--assumeno --allowerasing",  # (10)
    "Error: Transaction test error:\n  file /usr/share/gir-1.0/GLib-2.0.gir from install of glib2-devel-2.80.2-1.i686 "
    "conflicts with file from package glib2-devel-2.80.2-1.fc40.x86_64": "What is installed is in the way",
    "No match for argument: nvidia-driver-cuda\nError: Unable to find a match: nvidia-driver-cuda": "No repository of",
    "Error: something new": "Run again",
}  # fmt: skip


@pytest.mark.parametrize(("lines", "expected"), DNF_ADVICE.items(), ids=DNF_ADVICE)
def test_advice_for_dnf(lines: str, expected: str) -> None:
    assert expected in package_plan.dnf_advice(["Dependencies resolved.", *lines.splitlines()])


def test_a_failure_of_dnf_tells_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause stands before the last lines that are shown: dnf goes on with the conflict's other half."""
    (tmp_path / "dnf").write_text(
        "#!/bin/sh\necho '  - nothing provides dkms needed by kmod-nvidia-open-dkms'\n"
        'for line in 1 2 3 4 5 6 7 8 9 10 11; do echo "  - line $line"; done\n'
        "echo 'Status: https://me:hunter2@mirror/x' >&2\nexit 1\n"
    )
    (tmp_path / "dnf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    manager = dnf.Dnf(str, 0)
    for ask in (lambda: manager.install([Spec.of("fm")], False), lambda: manager.simulate([Spec.of("fm")])):
        with pytest.raises(apt.PackagesError) as failed:
            ask()
        assert str(failed.value).splitlines()[-1].startswith("No repository of the node has what a package needs")
        assert "hunter2" not in str(failed.value)


@pytest.mark.skipif(not apt.is_there(), reason="there is no apt-get here")
def test_apt_is_understood_whatever_the_node_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with apt 2.6: LANGUAGE, which Ubuntu's installer sets, goes before LC_ALL=C.UTF-8."""
    monkeypatch.setenv("LANGUAGE", "de")
    with pytest.raises(apt.PackagesError, match=r"Unable to locate package stepladder-none.*\n.*No repository of the"):
        apt.Apt(lambda _: None, 0).simulate([Spec("stepladder-none")], allow_change=False)


def test_dnf_is_asked_in_english(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LANGUAGE", "de")
    (tmp_path / "rpm").write_text('#!/bin/sh\nprintf "%s\\t%s\\n" "spoken${LANGUAGE:-}" 1-1\n')
    (tmp_path / "rpm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert dnf.Dnf(lambda _: None, 0).installed() == {"spoken": Package("1-1")}


def test_keys_can_be_read_by_apt_s_own_user_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        system_packages.write({f"{tmp_path}/apt/keyrings/stepladder-x.asc": b"key"})
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "apt", tmp_path / "apt/keyrings")]
    assert modes == [0o755, 0o755]


# ---- repositories ----------------------------------------------------------------------------------------------------

BODY = b"\x04" + bytes.fromhex("5f000000") + b"\x01" + b"\x00\x08\xc5" + b"\x00\x02\x03"
KEY = bytes([0x98, len(BODY)]) + BODY
PRINT = hashlib.sha1(b"\x99" + len(BODY).to_bytes(2, "big") + BODY).hexdigest().upper()
GOOD = Repository("nvidia-driver", "http://mirror/nvidia/", key_url="http://mirror/k", fingerprints=[PRINT])


def changed(**fields: Any) -> Repository:
    return Repository(**{**vars(GOOD), **fields})


WRONG = {
    "good": (GOOD, []),
    "a name that is a path": (changed(name="../x"), ["repository ../x: a name is of a-z, 0-9 and '-'"]),
    "a password in the URL": (
        changed(url="https://me:secret@mirror/nvidia/"),
        ["repository nvidia-driver: url https://***@mirror/nvidia/ carries a password or a user, and its file is read "
         "by every user; put them into /etc/apt/auth.conf.d (mode 0600) and leave them out here"],
    ),
    "a token for a user in the URL": (
        changed(url="https://secret@mirror/nvidia/"),
        ["repository nvidia-driver: url https://***@mirror/nvidia/ carries a password or a user, and its file is read "
         "by every user; put them into /etc/apt/auth.conf.d (mode 0600) and leave them out here"],
    ),
    "a password in the key's URL": (
        changed(key_url="https://me:secret@mirror/k"),
        ["repository nvidia-driver: key_url https://***@mirror/k carries a password or a user, with which no key can "
         "be fetched; give the key itself (key)"],
    ),
    "no scheme": (
        changed(url="mirror/nvidia"),
        ["repository nvidia-driver: url 'mirror/nvidia' is not of the form https://, http:// or file:/"],
    ),
    "all at once": (
        changed(fingerprints=[], key_url=""),
        ["repository nvidia-driver: no fingerprint of its key is pinned (fingerprints)",
         "repository nvidia-driver: give its key or the key's address (key_url), one of both"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("repository", "expected"), WRONG.values(), ids=WRONG)
def test_a_repository_that_cannot_be(repository: Repository, expected: list[str]) -> None:
    assert package_sources.problems(repository) == expected


@pytest.mark.parametrize("url", ["http://me:hunter2@mirror/", "http://me:hun/ter2@mirror/"])
def test_a_mirrors_password_is_in_no_fact(url: str) -> None:
    """What the module is given stands in the output of -vvv; it refuses what it cannot have, and says of what."""
    known = {"name": "nvidia-driver", "url": "https://vendor/", "key_url": "https://vendor/key", "fingerprints": ["A"]}
    mirror = {"url": url, "key_url": f"{url}key"}
    found = mirrors.mirrored(known, mirror)
    assert (found["url"], found["key_url"]) == ("http://***@mirror/", "http://***@mirror/key")
    place = "repository nvidia-driver"
    told = package_sources.problems(package_sources.parsed([found])[0])
    assert [text.partition(" carries")[0] for text in told] == [
        f"{place}: url http://***@mirror/", f"{place}: key_url http://***@mirror/key",
    ]  # fmt: skip


def test_a_wrong_key_is_told_with_both_fingerprints() -> None:
    assert package_sources.key_problem(GOOD, KEY) == ""
    told = package_sources.key_problem(changed(fingerprints=["EB69 3B30"]), KEY)
    assert f"http://mirror/k has the key {PRINT}, and EB693B30 is pinned. Nothing was written." in told


def test_a_file_with_a_further_key_is_refused() -> None:
    """Who can add a key to the file could else sign with it."""
    other = KEY.replace(b"\xc5", b"\xc7")
    assert "has the key" in package_sources.key_problem(GOOD, KEY + other)


def test_files_of_apt() -> None:
    assert package_sources.apt_files(changed(suites=["noble"], components=["main"]), KEY) == {
        "/etc/apt/keyrings/stepladder-nvidia-driver.gpg": KEY,
        "/etc/apt/sources.list.d/stepladder-nvidia-driver.sources": (
            b"# Written by stepladder; a rerun writes it again.\nTypes: deb\nURIs: http://mirror/nvidia/\n"
            b"Suites: noble\nComponents: main\nSigned-By: /etc/apt/keyrings/stepladder-nvidia-driver.gpg\n"
        ),
    }
    assert package_sources.apt_pin_file("gpu", [Pin(["*nvidia*"], "580.126.20-*")]) == {
        "/etc/apt/preferences.d/stepladder-gpu-version": (
            b"# Written by stepladder; a rerun writes it again.\nPackage: *nvidia*\nPin: version 580.126.20-*\n"
            b"Pin-Priority: 1001\n"
        )
    }


MIRROR, NVIDIA_CUDA = "http://mirror/nvidia", ("NVIDIA", "NVIDIA CUDA")
DEBIAN = Release("http://mirror/debian", "Debian", "Debian")
PRIORITIES: dict[str, tuple[list[Release], str]] = {
    "by what it calls itself": ([Release(f"{MIRROR}/", *NVIDIA_CUDA), DEBIAN], "release o=NVIDIA,l=NVIDIA CUDA"),
    "by one name": ([Release(MIRROR, "", "site-nvidia"), DEBIAN], "release l=site-nvidia"),
    "it has no names, or apt no list of it yet": ([DEBIAN], 'origin "mirror"'),
    "two suites of unlike names": ([Release(MIRROR, "a", "a"), Release(MIRROR, "b", "b")], 'origin "mirror"'),
    "another host's calls itself the same": (
        [Release(MIRROR, "Debian", "Debian"), Release("http://other/debian", "Debian", "Debian")],
        'origin "mirror"',
    ),
    "another's of the host calls itself the same": (
        [Release(MIRROR, "Debian", "Debian"), DEBIAN], "release o=Debian,l=Debian",
    ),
    "a name that would be a wild card": ([Release(MIRROR, "a*", "")], 'origin "mirror"'),
}  # fmt: skip


@pytest.mark.parametrize(("releases", "pin"), PRIORITIES.values(), ids=PRIORITIES)
def test_a_priority_is_for_one_repository(releases: list[Release], pin: str) -> None:
    ((path, content),) = package_sources.apt_priority_file(changed(priority=600), releases).items()
    assert path == "/etc/apt/preferences.d/stepladder-nvidia-driver"
    head = "# Written by stepladder; a rerun writes it again.\n"
    assert content.decode() == f"{head}Package: *\nPin: {pin}\nPin-Priority: 600\n"
    assert package_sources.apt_priority_file(GOOD, releases) == {}


def test_a_priority_stays_while_apt_has_no_list_of_its_repository() -> None:
    ((_, known),) = package_sources.apt_priority_file(
        changed(priority=600), [Release(MIRROR, *NVIDIA_CUDA)]
    ).items()  # fmt: skip
    assert [*package_sources.apt_priority_file(changed(priority=600), [DEBIAN], known).values()] == [known]
    assert [*package_sources.apt_priority_file(changed(priority=700), [DEBIAN], known).values()] != [known]


def test_releases_are_read_as_apt_tells_them() -> None:
    """`apt-get indextargets` of apt 2.6.1, once for a flat repository and twice for one with two components."""
    text = "http://mirror/nvidia/\tNVIDIA\tNVIDIA CUDA\n" + "http://mirror/debian\tDebian\tDebian\n" * 2 + "broken\n"
    assert package_sources.parse_releases(text) == [Release(f"{MIRROR}/", *NVIDIA_CUDA), DEBIAN]
    text = "file:/x/\t$(ORIGIN)\t$(LABEL)\nfile:/y/\t$(ORIGIN)\tsite\n"
    assert package_sources.parse_releases(text) == [Release("file:/y/", "", "site")]


def test_files_of_dnf() -> None:
    files = package_sources.dnf_files(GOOD, KEY)
    assert files["/etc/yum.repos.d/stepladder-nvidia-driver.repo"] == (
        b"# Written by stepladder; a rerun writes it again.\n[stepladder-nvidia-driver]\n"
        b"name=nvidia-driver (stepladder)\nbaseurl=http://mirror/nvidia/\nenabled=1\ngpgcheck=1\n"
        b"gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-stepladder-nvidia-driver\n"
    )


# ---- locks -----------------------------------------------------------------------------------------------------------


def held(path: Path) -> subprocess.Popen[str]:
    """A process that holds a file as apt does, with a password among its arguments."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('ok', flush=True); "
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), "--password", "hunter2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ok\n"
    return process


def test_who_holds_a_lock_is_named_after_the_deadline(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    process = held(lock)
    told: list[str] = []
    try:
        started = time.monotonic()
        with pytest.raises(apt.PackagesError) as caught:
            apt.wait_for_locks(0.3, told.append, [str(tmp_path / "none"), str(lock)], poll_s=0.1)
        assert 0.3 <= time.monotonic() - started < 5
        assert str(caught.value).startswith(f"{lock} was held for 0 s by process {process.pid} ({sys.executable} -c")
        assert "Nothing was changed" in str(caught.value)
        assert "hunter2" not in str(caught.value)
        assert told[0].startswith(f"waiting for process {process.pid}")
    finally:
        process.communicate("")


def test_a_lock_that_is_given_up_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    process = held(lock)

    def end(line: str) -> None:
        process.communicate("")

    apt.wait_for_locks(30, end, [str(lock)], poll_s=0.05)
    assert process.returncode == 0


def test_no_lock_file_is_no_lock_and_a_file_of_our_own_neither(tmp_path: Path) -> None:
    assert apt.lock_holder(str(tmp_path / "none")) == 0
    with (tmp_path / "free").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # a process does not stand in its own way
        assert apt.lock_holder(str(tmp_path / "free")) == 0


def test_what_hangs_is_ended_and_named(tmp_path: Path) -> None:
    """A package's script that waits for an answer would hold a deploy for ever."""
    program = tmp_path / "stuck.postinst"
    program.write_text("#!/bin/sh\necho Setting up fm; sleep 61; true\n")
    program.chmod(0o755)
    started = time.monotonic()
    with pytest.raises(apt.PackagesError) as caught:
        apt.run_limited("install", ["/bin/sh", "-c", f"{program}; true"], dict(os.environ), lambda line: None, 3)
    assert time.monotonic() - started < 30
    assert re.match(
        r"Failed to install: not done within 3 s, and ended. At work was process \d+ \(sleep 61\); the last line: "
        "Setting up fm. ", str(caught.value),
    )  # fmt: skip


DNF = """\
#!/bin/sh
echo "$*" >> {log}
[ "$(wc -l < {log})" -gt {held} ] && echo "nvidia-driver:580" && exit 0
echo "metadata already locked by {pid}" >&2
exit 200
"""


@pytest.mark.parametrize("ask", [True, False])
def test_dnfs_lock_is_waited_for(ask: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dnf's own wait has no end and says who holds it to nobody; dnf is a stand-in that is locked once."""
    log, told = tmp_path / "log", list[str]()
    (tmp_path / "dnf").write_text(DNF.format(log=log, held=1, pid=os.getpid()))
    (tmp_path / "dnf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    manager = dnf.Dnf(told.append, 30)
    manager.held({}) if ask else manager.install([Spec.of("fm")], False)
    asked = "-q versionlock list" if ask else "-y install fm"
    assert log.read_text().splitlines() == [f"--setopt=exit_on_lock=True {asked}"] * 2
    assert f"waiting for process {os.getpid()} (" in "".join(told)


def test_who_holds_dnfs_lock_is_named_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dnf").write_text(DNF.format(log=tmp_path / "log", held=99, pid=os.getpid()))
    (tmp_path / "dnf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(apt.PackagesError, match=rf"dnf's lock was held for 0 s by process {os.getpid()} \("):
        dnf.Dnf(str, 0).install([Spec.of("fm")], False)


def test_dnf_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dnf").write_text("#!/bin/sh\nexec sleep 61\n")
    (tmp_path / "dnf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(dnf, "ASK_SECONDS", 0.2)
    with pytest.raises(apt.PackagesError, match="`dnf -q versionlock list` gave no answer within 0 s and was ended"):
        dnf.Dnf(str, 0).held({})


FETCHED = "Get:1 https://site:p@ss@mirror/x Packages"
DENIED = "Error: Status code: 401 for https://site:p@ss@mirror/repodata/repomd.xml"
TELLS = f"""\
#!/bin/sh
case "$*" in *madison*) exit 0 ;; esac
echo "{FETCHED}"
echo "{DENIED}" >&2
exit 1
"""


@pytest.mark.parametrize("step", ["install", "simulate"])
@pytest.mark.parametrize("manager", ["apt-get", "dnf"])
def test_no_password_of_a_mirror_is_told(
    manager: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The managers are stand-ins that fail, with addresses as a site may have them in its own sources."""
    (tmp_path / manager).write_text(TELLS)
    (tmp_path / manager).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(apt, "LOCKS", ())
    told = list[str]()
    with pytest.raises(apt.PackagesError) as caught:
        if manager == "dnf":
            dnf_there = dnf.Dnf(told.append, 0)
            dnf_there.install([Spec.of("fm")], False) if step == "install" else dnf_there.simulate([Spec.of("fm")])
        else:
            getattr(apt.Apt(told.append, 0), step)([Spec.of("fm")], False)
    assert "  Error: Status code: 401 for https://***@mirror/repodata/repomd.xml" in str(caught.value)
    assert "ss@" not in str(caught.value) + "".join(told)
    if step == "install":
        assert "install: Get:1 https://***@mirror/x Packages" in told


def test_roles_install_by_the_module_that_waits_for_locks() -> None:
    """apt-get by itself gives up at once while unattended upgrades hold the lock, as after a machine's start."""
    raw = re.compile(r"apt-get (update|install) |builtin\.(apt|package|dnf|yum):")
    roles = Path(__file__).resolve().parents[2] / "roles"
    files = [*roles.glob("*/tasks/*.yml"), *roles.glob("*/vars/*.yml")]
    lines = [f"{file.relative_to(roles)}: {line}" for file in files for line in file.read_text().splitlines()]
    assert [line for line in lines if raw.search(line) and "fail_msg:" not in line] == []


# ---- the order of things ---------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a node's apt: answers from what it was given, and writes down what it is told to do."""

    def __init__(self, installed: dict[str, Package], foreseen: Foreseen | None = None) -> None:
        self.there, self.foreseen = installed, foreseen or Foreseen({})
        self.done: list[str] = []
        self.named: list[Release] = []  # what the repositories in the lists call themselves
        self.lacking = self.unreachable = 0  # how often it does not know a package, and does not get its lists

    def installed(self) -> dict[str, Package]:
        return self.there

    def held(self) -> set[str]:
        return set()

    def interrupted(self, installed: dict[str, Package]) -> bool:
        return bool(package_plan.half_done(installed))

    def finish_interrupted(self) -> None:
        self.done.append("finish")
        self.there = {name: Package(one.version, "ii") for name, one in self.there.items()}

    def update(self, sources: list[str] | None, into: Path | None = None) -> None:
        self.done.append(f"update{'' if sources else ' of all'}{' in a copy' if into else ''}")
        if self.unreachable:
            self.unreachable -= 1
            raise apt.PackagesError("Failed to fetch the lists of packages")

    def releases(self, into: Path | None = None) -> list[Release]:
        return self.named if "update in a copy" in self.done or "update" in self.done else []

    def wait(self) -> None:
        self.done.append("wait")

    def simulate(self, specs: list[Spec], allow_change: bool, into: Path | None = None) -> Foreseen:
        if self.lacking:
            self.lacking -= 1
            raise apt.PackagesError("Failed to install. Unable to locate package fm")
        return self.foreseen

    def install(self, specs: list[Spec], allow_change: bool) -> None:
        self.done.append(f"install {' '.join(map(str, specs))}")
        self.there = self.there | {name: Package(version) for name, version in self.foreseen.installs.items()}

    def hold(self, names: list[str]) -> None:
        self.done.append(f"hold {' '.join(names)}")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Recorder, Any]]:
    """Converge on a node whose files lie in a folder; the key comes from a file."""
    for name in ("APT_KEYS", "APT_SOURCES", "APT_PINS"):
        monkeypatch.setattr(package_sources, name, str(tmp_path / name))
    defaults = package_sources.apt_files.__defaults__
    folders = (str(tmp_path / "APT_KEYS"), str(tmp_path / "APT_SOURCES"))
    pins = (None, str(tmp_path / "APT_PINS"))
    monkeypatch.setattr(package_sources.apt_priority_file, "__defaults__", pins)
    monkeypatch.setattr(package_sources.apt_pin_file, "__defaults__", pins[1:])
    monkeypatch.setattr(package_sources.apt_files, "__defaults__", folders)
    assert defaults is not None
    (tmp_path / "key").write_bytes(KEY)
    here = changed(key_url=(tmp_path / "key").as_uri())

    def run(recorder: Recorder, check: bool = False, repository: Repository = here, **wanted: Any) -> Any:
        monkeypatch.setattr(apt, "is_there", lambda: True)
        monkeypatch.setattr(apt, "Apt", lambda report, seconds: recorder)
        whole = system_packages.Wanted(repositories=[repository], **wanted)
        return system_packages.converge(whole, check, lambda line: None, 1)

    return run


FRESH = Foreseen({"fm": "580.126.20-1"})
FRESH_OF_595 = Foreseen({"nvidia-headless-open": "595.45.04-1"}, ["libnvidia-compute-580"])


def test_first_the_copy_then_files_then_packages_then_holds(node: Callable[..., Any], tmp_path: Path) -> None:
    recorder = Recorder({}, FRESH)
    outcome = node(recorder, packages=[Spec.of("fm=580.126.20-*")], hold=[Spec.of("*=580.126.20-*")])
    assert recorder.done == ["update in a copy", "wait", "update", "install fm=580.126.20-*", "hold fm"]
    assert [action.split()[0] for action in outcome.actions] == ["write", "write", "install", "hold"]
    assert len(list(tmp_path.glob("APT_*/*"))) == 2


def test_a_priority_goes_by_what_the_repository_calls_itself_once_it_is_known(
    node: Callable[..., Any], tmp_path: Path
) -> None:
    repository = changed(key_url=(tmp_path / "key").as_uri(), priority=600)
    written = tmp_path / "APT_PINS" / "stepladder-nvidia-driver"
    for check in (True, False):
        recorder = Recorder({}, FRESH)
        recorder.named = [Release(MIRROR, *NVIDIA_CUDA)]
        outcome = node(recorder, check=check, repository=repository, packages=[Spec.of("fm")])
        assert "Pin: release o=NVIDIA,l=NVIDIA CUDA" in outcome.after[str(written)]
        assert written.exists() is not check
    assert b"Pin: release o=NVIDIA,l=NVIDIA CUDA" in written.read_bytes()
    assert (
        node(Recorder({"fm": Package("580.126.20-1")}), repository=repository, packages=[Spec.of("fm")]).actions == []
    )


def test_check_mode_writes_nothing_and_tells_the_same(node: Callable[..., Any], tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"packages": [Spec.of("fm")], "hold": [Spec.of("fm")]}
    foreseen = node(Recorder({}, FRESH), check=True, **wanted)
    assert list(tmp_path.glob("APT_*/*")) == []
    assert foreseen.actions == node(Recorder({}, FRESH), **wanted).actions


def test_a_rerun_does_nothing_and_needs_no_key_server(node: Callable[..., Any], tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"packages": [Spec.of("fm")]}
    node(Recorder({}, FRESH), **wanted)
    (tmp_path / "key").unlink()
    recorder = Recorder({"fm": Package("580.126.20-1")})
    assert node(recorder, **wanted).actions == []
    assert recorder.done == []


class Proxy(http.server.BaseHTTPRequestHandler):
    """A proxy that has the key of every mirror, for who is logged in to it."""

    def do_GET(self) -> None:
        known = self.headers.get("Proxy-Authorization") == "Basic dTpw" and self.path == "http://mirror.invalid/k"
        self.send_response(200 if known else 407)
        self.end_headers()
        self.wfile.write(KEY if known else b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.skipif(not apt.is_there(), reason="there is no apt-config here")
@pytest.mark.parametrize("host", ["", "::mirror.invalid"], ids=["for all", "for the host"])
def test_a_key_is_fetched_through_the_proxy_of_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """sudo drops the variables that name a proxy, and apt goes by its own settings."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "apt.conf").write_text(
            f'Acquire::http::Proxy{host} "http://u:p@127.0.0.1:{server.server_port}/";\n'
            'Acquire::http::Proxy::direct.invalid "DIRECT";\n'
        )
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
        assert package_sources.fetch_key(changed(key_url="http://mirror.invalid/k")) == KEY
        with pytest.raises(package_sources.KeyFetchError, match=r"http://direct.invalid/k: .*Errno"):
            package_sources.fetch_key(changed(key_url="http://direct.invalid/k"))
        server.shutdown()


def test_what_speaks_no_http_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def greet() -> None:
            with server.accept()[0] as wire:
                wire.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                wire.recv(4096)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(package_sources.KeyFetchError, match=r"its key cannot be fetched from http.*SSH-2.0"):
            package_sources.fetch_key(changed(key_url=f"http://127.0.0.1:{server.getsockname()[1]}/k"))


def test_a_wrong_key_writes_nothing(node: Callable[..., Any], tmp_path: Path) -> None:
    recorder = Recorder({}, FRESH)
    wrong = changed(key_url=(tmp_path / "key").as_uri(), fingerprints=["AB" * 20])
    with pytest.raises(apt.PackagesError, match=f"has the key {PRINT}, and {'AB' * 20} is pinned"):
        node(recorder, repository=wrong, packages=[Spec.of("fm")])
    assert recorder.done == []
    assert list(tmp_path.glob("APT_*/*")) == []


def test_what_an_interruption_left_is_finished_first(node: Callable[..., Any]) -> None:
    node(Recorder({}, FRESH), packages=[Spec.of("fm")])
    recorder = Recorder({"fm": Package("580.126.20-1", "iF")})
    outcome = node(recorder, packages=[Spec.of("fm")], hold=[Spec.of("fm")])
    assert recorder.done[:2] == ["wait", "finish"]
    assert recorder.done[-1] == "hold fm"
    assert outcome.actions == ["finish what an earlier dpkg left: fm", "hold fm"]


def test_lists_that_an_interruption_left_out_are_fetched_from_the_mirror_first(node: Callable[..., Any]) -> None:
    node(Recorder({}, FRESH), packages=[Spec.of("fm")])
    recorder = Recorder({}, FRESH)
    recorder.lacking = 1
    node(recorder, packages=[Spec.of("fm")])
    assert recorder.done == ["update in a copy", "wait", "install fm"]


def test_without_a_way_out_it_is_told_what_lacks_and_not_that_others_are_unreachable(node: Callable[..., Any]) -> None:
    node(Recorder({}, FRESH), packages=[Spec.of("fm")])
    recorder = Recorder({}, FRESH)
    recorder.lacking, recorder.unreachable = 3, 2
    with pytest.raises(apt.PackagesError, match=r"Unable to locate package fm"):
        node(recorder, packages=[Spec.of("fm")])
    assert recorder.done == ["update in a copy", "update of all in a copy"]


def test_a_removal_is_refused_before_a_file_is_written(node: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(apt.PackagesError, match=r"Nothing was changed: it would remove docker.io"):
        node(Recorder({}, Foreseen({"fm": "1"}, ["docker.io"])), packages=[Spec.of("fm")])
    assert list(tmp_path.glob("APT_*/*")) == []


def test_a_change_takes_away_what_is_pinned_and_says_so(node: Callable[..., Any]) -> None:
    recorder = Recorder({"libnvidia-compute-580": Package("580.126.20-1")}, FRESH_OF_595)
    pins = [Pin(["*nvidia*"], "595.45.04-*")]
    outcome = node(recorder, packages=[Spec.of("nvidia-headless-open")], pins=pins, allow_change=True)
    assert outcome.actions[-2:] == ["install nvidia-headless-open 595.45.04-1", "remove libnvidia-compute-580"]
    assert (outcome.before["libnvidia-compute-580"], outcome.after["libnvidia-compute-580"]) == ("580.126.20-1", "none")
    assert "install nvidia-headless-open" in recorder.done


# ---- dnf: its texts; tests/lab/test_dnf_node.py runs the real one ----------------------------------------------------


class DnfRecorder:
    """Stands in for a node's dnf with an older fabric manager, and writes down what it is told to do."""

    def __init__(self, streams: list[str]) -> None:
        self.streams = streams
        self.done: list[str] = []

    def installed(self) -> dict[str, Package]:
        return {"fm": Package("580.95.05-1.el9")}

    def held(self, installed: dict[str, Package]) -> set[str]:
        return set()

    def enabled_modules(self, streams: list[str]) -> list[str]:
        return self.streams

    def enable_modules(self, streams: list[str]) -> None:
        self.done.append(f"enable {' '.join(streams)}")

    def simulate(self, specs: list[Spec]) -> Foreseen:
        return Foreseen({"fm": "580.126.20-1.el9"})


CHANGE = "fm 580.95.05-1.el9 would become 580.126.20-1.el9: a change of what runs is made only where it is allowed"


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ([], "Nothing was changed"),
        (
            ["nvidia-driver:580-open"],
            "Done before: enable module stream nvidia-driver:580-open; nothing else was changed",
        ),
    ],
)
def test_a_refusal_of_dnf_tells_what_was_done_before(
    streams: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = DnfRecorder(streams)
    monkeypatch.setattr(apt, "is_there", lambda: False)
    monkeypatch.setattr(dnf, "is_there", lambda: True)
    monkeypatch.setattr(dnf, "Dnf", lambda report, seconds: recorder)
    wanted = system_packages.Wanted(packages=[Spec.of("fm=580.126.20-*")], module_streams=["nvidia-driver:580-open"])
    with pytest.raises(apt.PackagesError) as refused:
        system_packages.converge(wanted, False, lambda line: None, 1)
    assert str(refused.value) == f"{said}: {CHANGE} (allow_change)"
    assert recorder.done == [f"enable {stream}" for stream in streams]


def test_a_refusal_after_an_interruption_tells_what_was_done_before(node: Callable[..., Any]) -> None:
    node(Recorder({}, FRESH), packages=[Spec.of("fm")])

    class Interrupted(Recorder):
        def simulate(self, specs: list[Spec], allow_change: bool, into: Path | None = None) -> Foreseen:
            if "finish" not in self.done:
                raise apt.PackagesError("dpkg was interrupted")
            return self.foreseen

    recorder = Interrupted({"dkms": Package("3", "iF")}, Foreseen({"fm": "1"}, ["docker.io"]))
    said = "^Done before: finish what an earlier dpkg left: dkms; nothing else was changed: it would remove docker.io"
    with pytest.raises(apt.PackagesError, match=said):
        node(recorder, packages=[Spec.of("fm")])


def test_dnf_operands_and_locks() -> None:
    assert dnf.operands([Spec.of("nvidia-driver-cuda=580.126.20-*"), Spec.of("rocm-core")]) == [
        "nvidia-driver-cuda-580.126.20-*",
        "rocm-core",
    ]
    text = (
        "Last metadata expiration check\nkmod-nvidia-open-dkms-3:580.126.20-1.el9.*\n"
        "3:nvidia-persistenced-580.126.20-1.el9.*\n"
    )
    locked = {"580.126.20-1.el9"}
    assert dnf.parse_versionlock(text) == {"kmod-nvidia-open-dkms": locked, "nvidia-persistenced": locked}


def test_dnf_transaction_table() -> None:
    text = (
        "Dependencies resolved.\n Package  Architecture  Version  Repository  Size\nInstalling:\n"
        " nvidia-driver-cuda  x86_64  3:580.126.20-1.el9  stepladder-nvidia-driver  1.2 M\n"
        "Removing:\n nvidia-driver-470  x86_64  3:470.256.02-1.el9  @cuda  30 M\n\nOperation aborted.\n"
    )
    assert dnf.parse_transaction(text) == Foreseen({"nvidia-driver-cuda": "580.126.20-1.el9"}, ["nvidia-driver-470"])


def test_a_row_of_dnf_s_table_may_take_two_lines() -> None:
    """As dnf 4.14 prints it without a terminal where the longest of each column make 80 columns together."""
    text = (
        "Upgrading:\n nvidia-driver-cuda    x86_64 3:580.126.20-1.el9 stepladder-nvidia-driver 1.2 M\n"
        " nvidia-driver-cuda-libs\n                       x86_64 3:580.126.20-1.el9 stepladder-nvidia-driver  43 M\n"
        "     replacing  nvidia-libs.x86_64 3:470.256.02-1.el9\n"
        "Removing:\n nvidia-driver-cuda-more\n                       x86_64 3:470.256.02-1.el9 @cuda       30 M\n"
    )
    version = "580.126.20-1.el9"
    assert dnf.parse_transaction(text) == Foreseen(
        {"nvidia-driver-cuda": version, "nvidia-driver-cuda-libs": version}, ["nvidia-driver-cuda-more"]
    )


def test_root_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root, and this is user 1000: set ansible_become: true" in system_packages.not_root()


@pytest.mark.parametrize(
    ("version", "understood"),
    [("*", True), ("580.159.03-*", True), ("1.2-3", True), ("*.70204-*", False), ("1.?-2", False), ("[12].0*", False)],
)
def test_which_wild_cards_apt_knows(version: str, understood: bool) -> None:
    assert apt.apt_understands(version) is understood


def test_a_version_that_apt_does_not_understand_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As apt-cache madison of Debian 12 prints it, newest first; what no repository has stays, for apt to name."""
    answer = (
        " rocm-core | 7.3.0.70300-1 | https://mirror ./ Packages\n"
        " rocm-core | 7.2.4.70204-93~22.04 | https://mirror ./ Packages\n"
        "amdgpu-dkms | 1:6.16.13.30300400-2341068.22.04 | https://mirror ./ Packages\n"
    )
    asked: list[list[str]] = []
    manager = apt.Apt(lambda line: None, 1)
    monkeypatch.setattr(manager, "_ask", lambda argv: asked.append(argv) or answer)
    specs = [Spec.of(text) for text in ("rocm-core=*.70204-*", "amdgpu-dkms=*.30300400-*", "gone=*.1-*", "a=1-*", "b")]
    assert [str(spec) for spec in manager._exact(specs, ["-o", "x=y"])] == [
        "rocm-core=7.2.4.70204-93~22.04", "amdgpu-dkms=1:6.16.13.30300400-2341068.22.04", "gone=*.1-*", "a=1-*", "b",
    ]  # fmt: skip
    assert asked == [["apt-cache", "-o", "x=y", "madison", "rocm-core", "amdgpu-dkms", "gone"]]
