"""The machine that a lab runs on: what it lacks, and where its packages come from, for the nodes to do the same."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stepladder.environment import node_helper
from stepladder.lab.places import LabError, Places

# Program to the package that brings it (Debian, Ubuntu).
PROGRAMS = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "tc": "iproute2",
    "iptables": "iptables",
    "nsenter": "util-linux",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
# By number, from linux/capability.h.
CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
# What containers of containers often have not been given: no engine runs without them.
NEEDED_CAPABILITIES = ("NET_ADMIN", "SYS_ADMIN", "SYS_CHROOT", "MKNOD")
# A root file system, its image, and nodes that get packages and an engine's environment.
NEEDED_BYTES = 4 * 1024**3
# Of apt's settings those that say how archives are reached; the rest is the machine's own business.
APT_SETTING = re.compile(r"Acquire::(https?|ftp|Check-Valid-Until|Check-Date|Retries|ForceIPv[46]|Languages)\b")
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def missing_capabilities(status: str) -> list[str]:
    """The capabilities that a process lacks, by name, from the text of its `/proc/<pid>/status`.

    Docker refuses `--cap-add ALL` where it has not all of them itself.
    """
    bits = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapBnd:"))
    return [CAPABILITIES[bit] for bit in range(len(CAPABILITIES)) if not bits >> bit & 1]


def missing(
    *,
    root: bool,
    capabilities: Iterable[str],
    found: Callable[[str], object],
    free_bytes: int,
    sources: bool,
    state: Path,
    engine_answers: bool,
) -> tuple[list[str], list[str]]:
    """What a lab needs and this machine lacks.

    Args:
        root: whether this is root.
        capabilities: that the machine has not.
        found: tells whether a program is there.
        free_bytes: on the disk that holds the state.
        sources: whether apt has a source for the machine's own release.
        state: the folder that will hold the state.
        engine_answers: whether a Docker engine answers already; then none has to be started.

    Returns: a line for each lack, and the packages that would mend some of them.
    """
    lacks = [] if root else ["root: nodes are containers with capabilities, networks and mounts of their own"]
    if withheld := [name for name in NEEDED_CAPABILITIES if name in set(capabilities)]:
        lacks.append(f"the capabilities {', '.join(withheld)}, which this container was not given")
    programs = [
        name for name in PROGRAMS if not found(name) and not (engine_answers and name == "dockerd")
    ]  # fmt: skip
    packages = list(dict.fromkeys(PROGRAMS[name] for name in programs))
    lacks += [f"the program {name} (package {PROGRAMS[name]})" for name in programs]
    if free_bytes < NEEDED_BYTES:
        lacks.append(f"{NEEDED_BYTES / 1024**3:.0f} GiB of disk below {state}; {free_bytes / 1024**3:.1f} GiB are free")
    if not sources:
        lacks.append("apt sources of this machine's own release, from which the nodes are made")
    return lacks, packages


def missing_text(lacks: Iterable[str], packages: Iterable[str]) -> str:
    """The message for a machine that lacks something."""
    lines = "\n".join(f"  - {lack}" for lack in lacks)
    names = " ".join(packages)
    command = f"\nRun: apt-get update && apt-get install -y {names}\nor the same command with --install"
    return f"this machine lacks what a lab needs:\n{lines}{command if names else ''}"


def install(packages: Iterable[str]) -> None:
    """Install packages with apt-get, its output shown.

    Raises:
        LabError: apt-get failed.
    """
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", *packages]):
        if status := subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, check=False).returncode:
            raise LabError(f"`{' '.join(command)}` ended with {status}; its output is above")


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest one above that is there."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def codename(release: str) -> str:
    """The release's name for apt, from the text of /etc/os-release; empty where it names none."""
    match = re.search(r'(?m)^VERSION_CODENAME="?([\w-]+)"?$', release)
    return match[1] if match else ""


def of_release(suite: str, release: str) -> bool:
    """Whether a suite belongs to a release: itself, its updates, its security."""
    return suite == release or suite.startswith((f"{release}-", f"{release}/"))


def lines_of_release(text: str, release: str) -> list[str]:
    """The lines of a sources.list that are about a release's own packages."""
    kept = []
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[[^]]*\]\s+)?\S+\s+(\S+)\s+\S", line.strip())
        if match and of_release(match[1], release):
            kept.append(line.strip())
    return kept


def stanzas_of_release(text: str, release: str) -> list[str]:
    """The stanzas of a deb822 file that are about a release's own packages, without comments."""
    kept = []
    for stanza in re.split(r"\n\s*\n", text):
        body = "\n".join(line for line in stanza.splitlines() if line.strip() and not line.startswith("#"))
        found = re.findall(r"(?m)^([\w-]+):(.*(?:\n[ \t].*)*)", body)
        fields = {name.lower(): value.split() for name, value in found}
        suites = fields.get("suites", [])
        enabled = [word.lower() for word in fields.get("enabled", ["yes"])] not in (["no"], ["false"], ["0"])
        if enabled and "deb" in fields.get("types", []) and suites and all(of_release(s, release) for s in suites):
            kept.append(body)
    return kept


def keyrings(sources: str) -> list[str]:
    """The keyring files that sources are signed by."""
    return sorted(set(re.findall(r"(?im)signed-by\s*[:=]\s*(/[^\s\],]+)", sources)))


@dataclass(frozen=True)
class Packages:
    """Where this machine's packages come from.

    Args:
        release: the name of its release for apt.
        lines: of sources in the one-line format; `stanzas` in deb822.
        apt: apt's settings about reaching archives, as in apt.conf.
        pip: pip's options by name.
        environ: variables about proxies.
    """

    release: str
    lines: list[str]
    stanzas: list[str]
    apt: list[str]
    pip: dict[str, str]
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> str:
        """All sources, as text."""
        return "\n".join([*self.lines, *(f"\n{stanza}" for stanza in self.stanzas)])

    @property
    def folders(self) -> list[str]:
        """Local folders that pip's options name; the nodes see them at the same place."""
        found = {path for path in map(_local, self.pip.get("find-links", "").split()) if path}
        for word in f"{self.pip.get('index-url', '')} {self.pip.get('extra-index-url', '')}".split():
            if path := _local(word):
                # An index's pages link to files beside it.
                found.add(str(Path(path).parent) if len(Path(path).parts) > 3 else path)
        return sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found))


def packages(etc: Path, pip_options: Mapping[str, str], apt_dump: str, environ: Mapping[str, str]) -> Packages:
    """Read where this machine's packages come from.

    Args:
        etc: the folder `/etc`.
        pip_options: what pip is configured with.
        apt_dump: what `apt-config dump` prints.
        environ: the environment.
    """
    try:
        release = codename((etc / "os-release").read_text())
    except OSError:
        release = ""
    parts = sorted((etc / "apt" / "sources.list.d").glob("*"))
    lists = [path for path in (etc / "apt" / "sources.list", *parts) if path.suffix == ".list" and path.is_file()]
    lines = [line for path in lists for line in lines_of_release(path.read_text(), release)]
    deb822 = [path for path in parts if path.suffix == ".sources" and path.is_file()]
    stanzas = [stanza for path in deb822 for stanza in stanzas_of_release(path.read_text(), release)]
    apt = [line for line in apt_dump.splitlines() if APT_SETTING.match(line)]
    proxies = {name: environ.get(name) or environ.get(name.upper()) or "" for name in PROXIES}
    return Packages(release, lines, stanzas, apt, dict(pip_options), {k: v for k, v in proxies.items() if v})


def read_packages(python: str) -> Packages:
    """Read where this machine's packages come from, pip asked through a Python."""
    options = node_helper("pip_config").configured_options([python, "-m", "pip"], os.environ)
    try:
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        dump = ""
    return packages(Path("/etc"), options, dump, os.environ)


def node_files(found: Packages, root: Path = Path("/")) -> dict[str, tuple[bytes, int]]:
    """What makes a node reach the same archives as this machine: path to content and mode.

    Args:
        found: where this machine's packages come from.
        root: of the machine's file system.
    """
    files: dict[str, tuple[bytes, int]] = {}

    def take(path: str, mode: int = 0o644) -> None:
        source = root / path.lstrip("/")
        if source.is_file():
            files[path] = (source.read_bytes(), mode)

    for keyring in keyrings(found.sources):
        take(keyring)
    for secret in (root / "etc/apt/auth.conf", *(root / "etc/apt/auth.conf.d").glob("*.conf")):
        take(f"/{secret.relative_to(root)}", 0o600)
    for certificate in (root / "usr/local/share/ca-certificates").rglob("*.crt"):
        take(f"/{certificate.relative_to(root)}")
    for bundle in ("/etc/ssl/certs/ca-certificates.crt", found.pip.get("cert", ""), found.pip.get("client-cert", "")):
        if bundle.startswith("/"):
            take(bundle)
    files["/etc/apt/apt.conf.d/90machine"] = ("".join(f"{line}\n" for line in found.apt).encode(), 0o644)
    if found.pip:
        options = "".join(f"{name} = {_entries(value)}\n" for name, value in sorted(found.pip.items()))
        files["/etc/pip.conf"] = (f"[global]\n{options}".encode(), 0o644)
    for resolver in ("etc/resolv.conf", "run/systemd/resolve/resolv.conf"):
        if (root / resolver).is_file() and (lines := nameservers((root / resolver).read_text())):
            files["/etc/stepladder-lab/resolv.conf"] = ("".join(f"{line}\n" for line in lines).encode(), 0o644)
            break
    if found.environ:
        variables = "".join(f"{n}={v}\n{n.upper()}={v}\n" for n, v in sorted(found.environ.items()))
        files["/etc/environment"] = (variables.encode(), 0o644)
    return files


def nameservers(text: str) -> list[str]:
    """The lines of a resolv.conf that hold on a node too: nothing that names this machine's own loopback."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(nameserver|search|domain|options)\s", line)]
    kept = [line for line in lines if not re.match(r"nameserver\s+(127\.|::1)", line)]
    return kept if any(line.startswith("nameserver") for line in kept) else []


def archive(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A tar archive of files by path, owned by root."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, (content, mode) in sorted(files.items()):
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def look(places: Places, found: Packages, engine_answers: bool) -> tuple[list[str], list[str]]:
    """Hold this machine against what a lab needs; as `missing`."""
    return missing(
        root=os.geteuid() == 0,
        capabilities=missing_capabilities(Path("/proc/self/status").read_text()),
        found=shutil.which,
        free_bytes=free_bytes(places.state),
        sources=bool(found.release and (found.lines or found.stanzas)),
        state=places.state,
        engine_answers=engine_answers,
    )


def require(places: Places, found: Packages, engine_answers: bool, may_install: bool) -> None:
    """Hold the machine against what a lab needs, and install what is missing where that is allowed.

    Raises:
        LabError: with everything that is missing.
    """
    lacks, needed = look(places, found, engine_answers)
    if needed and may_install and os.geteuid() == 0:
        install(needed)
        lacks, needed = look(places, found, engine_answers)
    if lacks:
        raise LabError(missing_text(lacks, needed))


def _local(word: str) -> str:
    """The local folder that an entry of pip's options names; empty where it names none, or one that is not there."""
    path = unquote(urlsplit(word).path) if word.startswith("file:") else word
    path = path.rstrip("/")
    return path if path.startswith("/") and Path(path).is_dir() else ""


def _entries(value: str) -> str:
    """An option's value for an ini file; several entries stand on lines of their own."""
    words = value.split()
    return value if len(words) < 2 else "\n    ".join(["", *words])
