"""What a node is and has, read in one go; the checks of it are in preflight_checks.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import platform
import pwd
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import asking, gpu_health, kernel_log
from ansible_collections.stepladder.core.plugins.module_utils import gpus as gpu_tools
from ansible_collections.stepladder.core.plugins.module_utils import machine as machines

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - its size is asked for, nothing is written
DEPLOYMENT_VARIABLE = "STEPLADDER_DEPLOYMENT"
LONGEST_LINE_OF_DESCENT = 32
LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h
COMMAND_CHARACTERS = 160
ADMIN_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on the PATH of an ssh login without root
SECRET_PARTS = frozenset(
    (
        "key",
        "keys",
        "apikey",
        "token",
        "secret",
        "password",
        "passwd",
        "passphrase",
        "credential",
        "credentials",
        "auth",
    )
)
# Shapes of keys of common services: OpenAI, Hugging Face, ModelScope, GitHub, GitLab, Slack.
SECRET_VALUE = re.compile(r"(sk|hf|ms|ghp|gho|glpat|xox[abp])[-_][\w-]{8,}")
URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+@")
MASK = "********"
FAILURE, WARNING = "failure", "warning"
# Packages whose releases have to agree between the nodes of a replica.
PACKAGES_ALIKE = ("ray", "sglang", "torch", "vllm")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which check, about what, what was found, what is needed, how to mend it.

    A `failure` makes the node unfit, a `warning` does not.
    """

    check: str
    what: str
    found: str
    needed: str
    mend: str
    severity: str = FAILURE


@dataclass(frozen=True)
class Listener:
    """A TCP socket that listens, and the process that holds it; pid 0 where none could be seen."""

    host: str
    port: int
    uid: int
    inode: int
    pid: int = 0
    user: str = ""
    command: str = ""
    deployment: str = ""


@dataclass(frozen=True)
class Disk:
    """A wanted path, what is to come onto it, and the file system that it is or will be on; sizes in bytes."""

    path: str
    purpose: str
    needed_bytes: int
    mount: str
    device: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Facts:
    """What was found on the node."""

    hostname: str = ""
    kernel: str = ""
    os: str = ""
    architecture: str = ""
    cpus: int = 0
    cpu_flags: frozenset[str] = frozenset()
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    own_memory_bytes: int = 0
    python: str = ""
    python_version: str = ""
    user: str = ""
    listeners: tuple[Listener, ...] = ()
    foreign_hosts: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
    missing_packages: Mapping[str, str] = field(default_factory=dict)
    can_install: bool = False
    shared_memory_bytes: int = 0
    unwritable: Mapping[str, str] = field(default_factory=dict)
    gpus: gpu_tools.Found = field(default_factory=gpu_tools.Found)
    runs_here: bool = False
    gpu_vendor: str = ""
    health: gpu_health.FoundHealth = field(default_factory=gpu_health.FoundHealth)
    kernel_events: tuple[kernel_log.Event, ...] = ()
    machine: machines.Machine = field(default_factory=machines.Machine)
    installed: Mapping[str, str] = field(default_factory=dict)
    image_digests: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    def as_result(self) -> dict[str, Any]:
        """The facts that the module returns."""
        return {
            "hostname": self.hostname,
            "kernel": self.kernel,
            "os": self.os,
            "architecture": self.architecture,
            "cpus": self.cpus,
            "memory_total_bytes": self.memory_total_bytes,
            "memory_available_bytes": self.memory_available_bytes,
            "own_memory_bytes": self.own_memory_bytes,
            "disks": [
                {"path": one.path, "mount": one.mount, "total_bytes": one.total_bytes, "free_bytes": one.free_bytes}
                for one in self.disks
            ],
            "python": {"executable": self.python, "version": self.python_version},
            "packages_to_install": self.packages_to_install,
            "gpus": [vars(one) for one in self.gpus.gpus],
            "rocm_release": self.gpus.release,
            "gpu_vendor": self.gpu_vendor,
            "gpu_health": [asdict(one) for one in self.health.gpus],
            "kernel_events": [asdict(one) for one in self.kernel_events],
            **asdict(self.machine),
            "installed": dict(self.installed),
            "image_digests": dict(self.image_digests),
            "user": self.user,
            "unread": dict(self.unread),
        }

    @property
    def packages_to_install(self) -> list[str]:
        """Packages that are missing and can be installed here, by the system's own means and as this user."""
        return sorted(set(self.missing_packages.values())) if self.can_install else []


@dataclass(frozen=True)
class Wanted:
    """What the deployment needs of the node; the fields are the module's parameters."""

    deployment: str = ""
    ports: Sequence[Mapping[str, Any]] = ()
    paths: Sequence[Mapping[str, Any]] = ()
    minimum_memory_bytes: int = 0
    minimum_python: str = ""
    python: str = "python3"
    cpu_flags_any: Sequence[Sequence[str]] = ()
    commands: Sequence[Mapping[str, Any]] = ()
    libraries: Sequence[Mapping[str, Any]] = ()
    minimum_shared_memory_bytes: int = 0
    architectures: Sequence[str] = ()
    writable_paths: Sequence[str] = ()
    gpus: Mapping[str, Any] | None = None
    interface: str = ""
    ranks: int = 1
    environment: str = ""
    images: Sequence[str] = ()
    minimum_docker: str = ""
    minimum_toolkit: str = ""


# ---- pure: the kernel's texts ----------------------------------------------------------------------------------------


def parse_meminfo(text: str) -> dict[str, int]:
    """Read `Name: number kB` lines, as in /proc/meminfo and /proc/<pid>/smaps_rollup, into bytes (proc(5))."""
    return {name: int(number) * 1024 for name, number in re.findall(r"^([\w()]+):\s+(\d+) kB$", text, re.MULTILINE)}


def parse_proc_net_tcp(text: str) -> list[Listener]:
    """Read the listening sockets of /proc/net/tcp or tcp6 (Documentation/networking/proc_net_tcp.rst).

    Addresses stand there as 32-bit words in the byte order of the node; x86-64 and aarch64 are little-endian.
    """
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10 or fields[3] != LISTEN:
            continue
        address, port = fields[1].split(":")
        found.append(Listener(parse_address(address), int(port, 16), uid=int(fields[7]), inode=int(fields[9])))
    return found


def parse_address(words: str) -> str:
    """`0100007F` is 127.0.0.1; an IPv4 address inside an IPv6 one is written as IPv4."""
    raw = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_cpu_flags(text: str) -> frozenset[str]:
    """Read the flags of the first CPU of /proc/cpuinfo: `flags` on x86-64, `Features` on aarch64."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def parse_os_release(text: str) -> str:
    """The distribution's name for people, from os-release(5)."""
    found = re.search(r"^PRETTY_NAME=(.*)$", text, re.MULTILINE)
    return " ".join(shlex.split(found[1])) if found else "unknown"


def parse_environ(raw: bytes) -> dict[str, str]:
    """Read /proc/<pid>/environ."""
    pairs = (entry.partition("=") for entry in raw.decode("utf-8", "replace").split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs}


def mask(argv: Sequence[str]) -> list[str]:
    """Blot out arguments that are, or look like, keys, tokens and passwords.

    `--api-key a b` (vLLM takes several), `--api-key=a`, `API_KEY=a`, `sk-...`, and the password in a URL.
    """
    shown = []
    secret_follows = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if argument.startswith("-") or (equals and re.fullmatch(r"\w+", name)):
            names_secret = bool(SECRET_PARTS & set(re.split(r"[-_.]+", name.lower())))
            secret_follows = names_secret and not equals
            shown.append(f"{name}={MASK}" if names_secret and equals else plain(argument))
        else:
            shown.append(MASK if secret_follows else plain(argument))
    return shown


def plain(argument: str) -> str:
    """An argument without what looks like a secret wherever it stands."""
    return URL_PASSWORD.sub(rf"\1{MASK}@", SECRET_VALUE.sub(MASK, argument))


def command_line(argv: Sequence[str]) -> str:
    """A process's arguments for a message: masked, and shortened to 160 characters."""
    line = " ".join(mask(argv))
    return line if len(line) <= COMMAND_CHARACTERS else line[: COMMAND_CHARACTERS - 3] + "..."


# ---- the node --------------------------------------------------------------------------------------------------------


def user_name(uid: int) -> str:
    """The user's name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_text(path: Path) -> str:
    """A file's text; '' where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processes(proc: Path) -> Iterator[Path]:
    """The directories of all processes."""
    return (entry for entry in proc.iterdir() if entry.name.isdigit())


def deployment_of(process: Path) -> str:
    """Whose process it is, by its environment or that of the nearest ancestor that says so; '' for others.

    Workers of vLLM and Ray write their title over their environment.
    """
    return inherited(process, DEPLOYMENT_VARIABLE)


def inherited(process: Path, variable: str) -> str:
    """A variable of a process's environment, or of the nearest ancestor's that has it; '' where none does."""
    for _ in range(LONGEST_LINE_OF_DESCENT):
        try:
            named = parse_environ((process / "environ").read_bytes()).get(variable, "")
        except OSError:
            named = ""
        fields = read_text(process / "stat").rpartition(")")[2].split()
        parent = int(fields[1]) if len(fields) > 1 else 0
        if named or parent <= 1:
            return named
        process = process.with_name(str(parent))
    return ""


def open_sockets(process: Path) -> set[int]:
    """Inodes of the sockets that a process has open; none where that cannot be read."""
    found = set()
    try:
        for entry in (process / "fd").iterdir():
            link = str(entry.readlink())
            if link.startswith("socket:["):
                found.add(int(link[8:-1]))
    except OSError:
        pass
    return found


def find_owners(listeners: Sequence[Listener], deployment: str, proc: Path) -> list[Listener]:
    """Add to each listener the process that holds it: one of this deployment if any does, else the oldest."""
    holders: dict[int, list[Path]] = {}
    wanted = {one.inode for one in listeners}
    for process in processes(proc) if wanted else ():
        for inode in open_sockets(process) & wanted:
            holders.setdefault(inode, []).append(process)
    found = []
    for one in listeners:
        there = sorted(holders.get(one.inode, []), key=lambda process: int(process.name))
        ours = [process for process in there if deployment_of(process) == deployment]
        holder = next(iter(ours or there), None)
        argv = read_text(holder / "cmdline").rstrip("\0").split("\0") if holder else []
        found.append(
            Listener(
                one.host,
                one.port,
                one.uid,
                one.inode,
                pid=int(holder.name) if holder else 0,
                user=user_name(one.uid),
                command=command_line(argv),
                deployment=deployment_of(holder) if holder else "",
            )
        )
    return found


def own_memory(deployment: str, proc: Path) -> int:
    """Bytes that come free when this deployment's processes end.

    Their proportional share of anonymous and shared memory: pages of files count as available already (proc(5)).
    """
    total = 0
    for process in processes(proc):
        if deployment_of(process) == deployment:
            sizes = parse_meminfo(read_text(process / "smaps_rollup"))
            total += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
    return total


def find_gpus(vendor: str, proc: Path) -> gpu_tools.Found:
    """What the vendor's tool says of the GPUs, with whose each process is that holds their memory."""
    if not vendor:
        return gpu_tools.Found()
    found = gpu_tools.find(vendor)
    holders = {user.pid: proc / str(user.pid) for user in found.users}
    commands = {
        pid: command_line(read_text(process / "cmdline").rstrip("\0").split("\0"))
        for pid, process in holders.items()
        if process.exists()
    }
    return gpu_tools.with_owners(found, {pid: deployment_of(process) for pid, process in holders.items()}, commands)


def vendor_here() -> str:
    """Whose GPUs the node has, by what its driver and its tools leave behind; empty for none."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *asking.TOOL_PATHS])
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi", path=search):
        return "nvidia"
    if Path("/dev/kfd").exists() or shutil.which("amd-smi", path=search) or shutil.which("rocm-smi", path=search):
        return "amd"
    return ""


def installed_in(environment: str) -> dict[str, str]:
    """The Python of an environment, and the releases in it that have to agree between nodes; empty where it is not."""
    # Not as pyvenv.cfg tells it: an environment goes along with the Python that it was made of.
    version = python_version(str(Path(environment, "bin/python")))
    found = {"python": version} if version else {}
    for entry in Path(environment).glob("lib/python3*/site-packages/*.dist-info"):
        name, _, release = entry.name[: -len(".dist-info")].partition("-")
        if name.lower() in PACKAGES_ALIKE:
            found[name.lower()] = release
    return dict(sorted(found.items()))


def digest_of(image: str) -> str:
    """The digest of an image that is here; empty where it is not."""
    text, problem = asking.ask(("docker", "image", "inspect", "--format", '{{join .RepoDigests " "}}', image))
    return "" if problem else text.strip().partition("@")[2].split(" ")[0]


def nearest_existing(path: Path) -> Path:
    """The path, or the closest of its parents that is there."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def bytes_under(path: str) -> int:
    """Bytes of all files below a path; 0 where there is none."""
    if not path:
        return 0
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_size
            except OSError:
                continue
    return total


def read_disk(want: Mapping[str, Any]) -> Disk:
    """The file system of a wanted path."""
    here = nearest_existing(Path(want["path"]))
    found = os.statvfs(here)
    mount = here.resolve()
    while not mount.is_mount():
        mount = mount.parent
    return Disk(
        path=want["path"],
        purpose=want.get("purpose") or want["path"],
        needed_bytes=max(0, want["minimum_free_bytes"] - bytes_under(want.get("existing_bytes_path") or "")),
        mount=str(mount),
        device=here.stat().st_dev,
        total_bytes=found.f_blocks * found.f_frsize,
        free_bytes=found.f_bavail * found.f_frsize,
    )


def unwritable_reason(path: str) -> str:
    """Why a directory cannot be written or made there; '' when it can."""
    here = nearest_existing(Path(path))
    if not here.is_dir():
        return f"{here} is not a directory"
    if os.access(here, os.W_OK | os.X_OK):
        return ""
    if os.statvfs(here).f_flag & os.ST_RDONLY:
        return f"{here} is on a read-only file system"
    stat = here.stat()
    return f"{here} belongs to {user_name(stat.st_uid)}, mode {stat.st_mode & 0o7777:04o}"


def python_version(executable: str) -> str:
    """What an interpreter says it is; '' where it cannot be run."""
    code = "import platform; print(platform.python_version())"
    try:
        answer = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def missing_packages(wanted: Wanted) -> dict[str, str]:
    """What is missing of the system, and the package of Debian and Ubuntu that brings it."""
    missing = {want["soname"]: want["package"] for want in wanted.libraries if not loads(want["soname"])}
    if wanted.minimum_python and python_version(wanted.python) and not makes_environments(wanted.python):
        missing["the module venv"] = f"{Path(wanted.python).name}-venv"
    return missing


def loads(soname: str) -> bool:
    """Whether the dynamic linker finds a shared library."""
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def makes_environments(executable: str) -> bool:
    """Whether an interpreter has all that `-m venv` needs; Debian ships that apart."""
    answer = subprocess.run([executable, "-c", "import ensurepip, venv"], capture_output=True, timeout=30, check=False)
    return answer.returncode == 0


def size_of(path: str) -> int:
    """Bytes of the file system at a path, 0 where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def gather(wanted: Wanted, proc: Path = Path("/proc")) -> Facts:
    """Read the node. What other programs are asked runs side by side: each may take its whole time to say nothing."""
    vendor = wanted.gpus["vendor"] if wanted.gpus else vendor_here()
    places = list(dict.fromkeys(["/", *(want["path"] for want in wanted.paths)]))
    with ThreadPoolExecutor(4) as pool:
        found = pool.submit(find_gpus, vendor, proc)
        healthy = pool.submit(gpu_health.find, vendor) if vendor else None
        log = pool.submit(kernel_log.read) if vendor else None
        machine = pool.submit(machines.read, places, proc)
        facts = gather_own(wanted, proc)
    health = healthy.result() if healthy else gpu_health.FoundHealth()
    events, not_told = log.result() if log else ([], "")
    gpus = found.result()
    unread = {} if gpus.problem else dict(health.unread or {})
    if not_told:
        unread["kernel log"] = not_told
    return replace(
        facts,
        gpus=gpus,
        gpu_vendor=vendor,
        health=health,
        kernel_events=tuple(events),
        machine=machine.result(),
        image_digests={image: digest_of(image) for image in wanted.images},
        unread=unread,
    )


def is_foreign(host: str) -> bool:
    """Whether nothing can listen on an address because it is none of this machine's own."""
    if not host:
        return False
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(where)
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


def gather_own(wanted: Wanted, proc: Path) -> Facts:
    """Read what no other program has to be asked for."""
    memory = parse_meminfo(read_text(proc / "meminfo"))
    ports = {want["port"] for want in wanted.ports}
    listening = [
        one
        for name in ("tcp", "tcp6")
        for one in parse_proc_net_tcp(read_text(proc / "net" / name))
        if one.port in ports
    ]
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *ADMIN_PATHS])
    return Facts(
        hostname=socket.gethostname(),
        kernel=platform.release(),
        os=parse_os_release(read_text(Path("/etc/os-release"))),
        architecture=platform.machine(),
        cpus=os.cpu_count() or 0,
        cpu_flags=parse_cpu_flags(read_text(proc / "cpuinfo")),
        memory_total_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0),
        own_memory_bytes=own_memory(wanted.deployment, proc) if wanted.minimum_memory_bytes else 0,
        python=shutil.which(wanted.python) or wanted.python,
        python_version=python_version(wanted.python) if wanted.minimum_python else "",
        user=user_name(os.geteuid()),
        listeners=tuple(find_owners(listening, wanted.deployment, proc)),
        foreign_hosts=tuple(
            sorted(host for host in {str(want.get("host") or "") for want in wanted.ports} if is_foreign(host))
        ),
        disks=tuple(read_disk(want) for want in wanted.paths),
        missing_packages=missing_packages(wanted),
        can_install=os.geteuid() == 0 and shutil.which("apt-get", path=search) is not None,
        shared_memory_bytes=size_of(SHARED_MEMORY),
        commands={want["name"]: shutil.which(want["name"], path=search) or "" for want in wanted.commands},
        unwritable={path: unwritable_reason(path) for path in wanted.writable_paths},
        installed=installed_in(wanted.environment) if wanted.environment else {},
        runs_here=bool(wanted.gpus) and any(deployment_of(one) == wanted.deployment for one in processes(proc)),
    )
