"""What an operator without a way out carries in: a signed apt repository and a package index, served from a folder.

Repository, key, index and server are real. The driver's packages in it are STAND-INS: they have the real names and
versions and say in their description that they are empty; no driver is in them.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stepladder.catalogue import Catalogue

NEEDED = {"apt-ftparchive": "apt-utils", "gpg": "gpg", "dpkg-deb": "dpkg"}
# What prepare installs on such nodes as it goes, and what an upgrade would find beside it.
DRIVER_VERSION = next(release.version for release in Catalogue().drivers.releases if release.branch == "580")
NEWER_DRIVER_VERSION = "580.999.01"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64")


@dataclass(frozen=True)
class StandIn:
    """An empty package: name, version, what it depends on, and files by path (a text, or `-> target` for a link)."""

    name: str
    version: str
    depends: str = ""
    files: Mapping[str, str] = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Repository:
    """A served folder: `url`, the key's address and its fingerprint."""

    folder: Path
    url: str
    fingerprint: str

    @property
    def key_url(self) -> str:
        """Where the key is."""
        return f"{self.url}key.asc"


def lacking() -> str:
    """What this machine lacks to make one, in a line."""
    return "; ".join(
        f"{program} (package {package})" for program, package in NEEDED.items() if not shutil.which(program)
    )


def headers(kernel: str) -> list[str]:
    """Names of the headers of a running kernel, and of those to come of Debian's flavours."""
    return [f"linux-headers-{name}" for name in (kernel, "amd64", "cloud-amd64", "rt-amd64")]


def driver_packages(version: str, kernel: str, broken: str = "") -> list[StandIn]:
    """Stand-ins for what Debian 12 gets for an H20: the names of NVIDIA's repository, at one version.

    Args:
        version: of the driver.
        kernel: the running kernel's release, for its headers.
        broken: name of a package whose configuration does not end, for a run that is killed in it.
    """
    same = f"{version}-1"
    library = f"/usr/lib/{platform.machine()}-linux-gnu/libnvidia-ml.so"
    unit = "[Unit]\nDescription=STAND-IN\n[Service]\nExecStart=/bin/false\n[Install]\nWantedBy=multi-user.target\n"
    made = [
        StandIn(
            "libnvidia-ml1", same, files={f"{library}.{version}": "", f"{library}.1": f"-> libnvidia-ml.so.{version}"}
        ),
        StandIn("nvidia-driver-cuda", same, f"libnvidia-ml1 (= {same})"),
        StandIn("nvidia-kernel-open-dkms", same),
        StandIn("nvidia-persistenced", same, files={"/lib/systemd/system/nvidia-persistenced.service": unit}),
        StandIn("nvidia-fabricmanager", same, files={"/lib/systemd/system/nvidia-fabricmanager.service": unit}),
        StandIn("libnvidia-nscq", same),
    ]
    if kernel:
        made += [StandIn(name, "1") for name in headers(kernel)]
    slow = {"/DEBIAN/postinst": "#!/bin/sh\n[ ! -e /run/stand-in-hangs ] || sleep 600\n"}
    return [StandIn(one.name, one.version, one.depends, {**(one.files or {}), **slow}) if one.name == broken else one
            for one in made]  # fmt: skip


def amd_packages(kernel: str) -> dict[str, list[StandIn]]:
    """Stand-ins for what Debian 12 gets for an MI355X, by AMD's repository: ROCm 7.2.4 and amdgpu 30.30.4."""
    versions = {
        "amdgpu": {"amdgpu-dkms": "1:6.16.13.30300400-2341068.22.04", **dict.fromkeys(headers(kernel), "1")},
        "rocm": {
            "rocm-core": "7.2.4.70204-93~22.04",
            "rocminfo": "1.0.0.70204-93~22.04",
            "rocm-smi-lib": "7.8.0.70204-93~22.04",
            "amd-smi-lib": "26.2.2.70204-93~22.04",
        },
    }
    return {part: [StandIn(name, version) for name, version in all_.items()] for part, all_ in versions.items()}


def build(folder: Path, packages: Sequence[StandIn], extra: Sequence[Path] = (), suite: str = "") -> None:
    """Make an apt repository of stand-ins and of real packages; it is signed by `sign`.

    Args:
        folder: for it.
        packages: stand-ins.
        extra: files of real packages.
        suite: what it has, with the one component `main`, as AMD's has; empty makes a flat one, as NVIDIA's is.
    """
    pool = folder / "pool" / "main" if suite else folder
    pool.mkdir(parents=True, exist_ok=True)
    for one in packages:
        tree = folder / "tree"
        files = {
            "/DEBIAN/control": (
                f"Package: {one.name}\nVersion: {one.version}\nArchitecture: {ARCHITECTURE}\n"
                "Maintainer: Tests <t@example.org>\n"
                + (f"Depends: {one.depends}\n" if one.depends else "")
                + f"Description: STAND-IN for {one.name}: empty, made by the tests\n"
            ),
            **(one.files or {}),
        }
        for path, text in files.items():
            target = tree / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("-> "):
                target.symlink_to(text[3:])
            else:
                target.write_text(text)
                target.chmod(0o755 if text.startswith("#!") else 0o644)
        _run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(pool)])
        shutil.rmtree(tree)
    for path in extra:
        shutil.copy(path, pool)
    top = folder / "dists" / suite if suite else folder
    listed = top / "main" / f"binary-{ARCHITECTURE}" if suite else folder
    listed.mkdir(parents=True, exist_ok=True)
    (listed / "Packages").write_text(_run(["apt-ftparchive", "packages", "pool" if suite else "."], folder))
    said = {"Origin": "stand-in", "Label": "stand-in"}
    if suite:
        said |= {"Suite": suite, "Codename": suite, "Components": "main", "Architectures": ARCHITECTURE}
    options = [word for key, value in said.items() for word in ("-o", f"APT::FTPArchive::Release::{key}={value}")]
    (top / "Release").unlink(missing_ok=True)
    (top / "Release").write_text(_run(["apt-ftparchive", *options, "release", "."], top))


def new_key(home: Path) -> str:
    """Make a key pair in a folder of its own; the fingerprint."""
    home.mkdir(mode=0o700, parents=True)
    _gpg(
        home, "--passphrase", "", "--quick-gen-key", f"STAND-IN {home.name} <t@example.org>", "rsa2048", "sign", "never"
    )
    _end_agent(home)
    listed = _gpg(home, "--with-colons", "--list-keys")
    return next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))


def sign(folder: Path, home: Path) -> None:
    """Sign a repository with a key and put the key beside it."""
    for release in (*folder.glob("Release"), *folder.glob("dists/*/Release")):
        signed = release.with_name("InRelease")
        signed.unlink(missing_ok=True)
        _gpg(home, "--clearsign", "-o", str(signed), str(release))
    _end_agent(home)
    (folder / "key.asc").write_text(_gpg(home, "--armor", "--export"))


def index(folder: Path, wheels: Sequence[Path]) -> None:
    """Make a static package index (PEP 503) of wheels: a page for each name, with the files' hashes."""
    pages: dict[str, list[str]] = {}
    for wheel in wheels:
        name = re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, folder / name)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        pages.setdefault(name, []).append(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    for name, links in pages.items():
        (folder / name / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")


@contextmanager
def served(folder: Path, address: str, login: str = "") -> Iterator[str]:
    """Serve a folder over HTTP on an address of this machine; the URL.

    Args:
        folder: what is served.
        address: where to listen.
        login: `user:password` that has to be given for what is below `private/`.
    """
    expected = f"Basic {base64.b64encode(login.encode()).decode()}"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/private/") and self.headers.get("Authorization") != expected:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="private"')
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((address, 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{address}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def _gpg(home: Path, *arguments: str) -> str:
    return _run(
        ["gpg", "--batch", "--yes", "--quiet", "--homedir", str(home), "--pinentry-mode", "loopback", *arguments]
    )


def _end_agent(home: Path) -> None:
    """gpg starts a process for its secret keys, which would outlive the tests."""
    _run(["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"])


def _run(argv: list[str], folder: Path | None = None) -> str:
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
