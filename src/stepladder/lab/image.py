"""The nodes' image: a root file system of the machine's own release, made once from its own archives."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from stepladder.environment import node_helper
from stepladder.lab.engine import Engine, Say
from stepladder.lab.machine import Packages
from stepladder.lab.places import REPOSITORY, LabError, Places

FOLDER = REPOSITORY / "lab" / "node"
# What an ordinary small server has when it is handed over.
PACKAGES = (
    "bzip2", "ca-certificates", "dbus", "iproute2", "iptables", "iputils-ping", "kmod", "less", "libnuma1",
    "libpam-systemd", "netbase", "openssh-server", "procps", "python3", "python3-venv", "sudo", "systemd",
    "systemd-sysv", "xz-utils",
)  # fmt: skip
DOCKER_PACKAGES = ("docker.io",)
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
IMPORT_SECONDS = 300.0


def wanted_packages(docker: bool) -> tuple[str, ...]:
    """The packages of a node, with an engine of its own or without."""
    return (*PACKAGES, *(DOCKER_PACKAGES if docker else ()))


def digest(found: Packages, docker: bool, scripts: Path = FOLDER) -> str:
    """What names a root file system: it changes with everything that it is made from but the archives' own content."""
    parts = {
        "machine": platform.machine(),
        "release": found.release,
        "sources": found.sources,
        "packages": wanted_packages(docker),
        "left out": LEFT_OUT,
        "scripts": {path.name: path.read_text() for path in sorted(scripts.iterdir()) if path.is_file()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def bootstrap_command(release: str, docker: bool, target: Path, settings: Path, sources: list[Path]) -> list[str]:
    """The argument list that makes a root file system.

    Args:
        release: its name for apt.
        docker: whether nodes have an engine.
        target: the archive to write.
        settings: a file of apt's settings; a proxy's password is no argument.
        sources: files in one of apt's formats.
    """
    return [
        "mmdebstrap",
        "--variant=minbase",
        "--mode=root",
        "--format=tar",
        f"--include={','.join(wanted_packages(docker))}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        f"--aptopt={settings}",
        f'--customize-hook={FOLDER / "customise"} "$1"',
        release,
        str(target),
        *map(str, sources),
    ]


def ensure_archive(found: Packages, docker: bool, places: Places, say: Say) -> Path:
    """The root file system's archive, made where it is not in the cache.

    Raises:
        LabError: mmdebstrap failed; with its last lines.
    """
    archive = places.cache / f"node-{found.release}-{digest(found, docker)}.tar"
    if archive.exists():
        return archive
    places.cache.mkdir(parents=True, exist_ok=True)
    say(f"making the nodes' root file system with mmdebstrap, once; it is kept as {archive}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="new-", dir=places.cache) as scratch:
        settings = Path(scratch) / "apt.conf"
        settings.write_text("".join(f"{line}\n" for line in found.apt))
        sources = []
        for name, text in (("machine.list", "\n".join(found.lines)), ("machine.sources", "\n\n".join(found.stanzas))):
            if text:
                sources.append(Path(scratch) / name)
                sources[-1].write_text(f"{text}\n")
        fresh = Path(scratch) / "node.tar"

        def on_line(line: str) -> None:
            if line.startswith("I: ") and line.endswith("..."):
                say(f"  {time.monotonic() - started:4.0f} s  {line[3:-3]}")

        environ = {**os.environ, "TMPDIR": scratch}
        status, tail = node_helper("watched").run(
            bootstrap_command(found.release, docker, fresh, settings, sources), environ, on_line=on_line
        )
        if status:
            lines = "\n".join(f"  {line}" for line in tail)
            raise LabError(f"mmdebstrap ended with {status}. Its last lines:\n{lines}")
        fresh.chmod(0o600)  # sources may carry a password
        fresh.rename(archive)
    say(f"  {time.monotonic() - started:4.0f} s  {archive.stat().st_size / 1e6:.0f} MB")
    return archive


def ensure_image(engine: Engine, archive: Path, say: Say) -> str:
    """The image's name in an engine, the archive imported where it is not there."""
    name = f"stepladder-lab:{archive.stem}"
    try:
        engine.call("image", "inspect", name)
    except LabError:
        say("importing the root file system into Docker")
        engine.call("import", str(archive), name, seconds=IMPORT_SECONDS)
    return name
