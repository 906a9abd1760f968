"""What a node is, beside its GPUs: CPUs, NUMA, disks, network, RDMA, clock, limits, names, containers.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import asking

NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|cifs|smb|ceph|lustre|beegfs|gpfs|gluster|9p|virtiofs|fuse\.(?!snap)|weka|wekafs"
)
MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))
# Types of network devices that exist only in software, by what their folder in sysfs holds or is named.
VIRTUAL = re.compile(r"/devices/virtual/")
# Those of the kernel's options that matter to GPUs; others may be nobody's business.
AMD_DEVICES = ("/dev/kfd", "/dev/dri")  # by which containers are given AMD's GPUs
BOOT_OPTIONS = re.compile(r"(amd_iommu|intel_iommu|iommu|pci|pcie_aspm|numa_balancing|hugepages|hugepagesz|nvidia\S*)=")
RESOLVE_SECONDS = 10.0
SYSCTLS = (
    "kernel.numa_balancing",
    "net.core.rmem_max",
    "net.core.somaxconn",
    "net.core.wmem_max",
    "vm.max_map_count",
    "vm.nr_hugepages",
    "vm.swappiness",
)


@dataclass(frozen=True)
class Storage:
    """The disk below a path: `speed` is nvme, ssd, hdd, network, memory or unknown."""

    path: str
    mount: str
    file_system: str
    device: str
    speed: str


@dataclass(frozen=True)
class Nic:
    """A network interface; speed in Mbit/s, None where it is not told."""

    name: str
    up: bool
    speed_mbit: int | None
    mtu: int
    driver: str = ""
    pci: str = ""
    numa: int | None = None
    virtual: bool = False
    master: str = ""


@dataclass(frozen=True)
class Gid:
    """An entry of an RDMA port's table: `kind` is `IB/RoCE v1` or `RoCE v2`, `address` the IPv4 address in it."""

    index: int
    gid: str
    kind: str
    interface: str
    address: str


@dataclass(frozen=True)
class RdmaPort:
    """A port of an RDMA device; rate in Gbit/s."""

    device: str
    port: int
    state: str
    physical: str
    link: str
    rate_gbit: float | None
    firmware: str = ""
    gids: tuple[Gid, ...] = ()


@dataclass(frozen=True)
class Clock:
    """The node's clock: seconds since the epoch, and whether something keeps it right as the kernel was told."""

    now: float = 0.0
    synchronised: bool | None = None


@dataclass(frozen=True)
class Docker:
    """The container engine; `problem` says why nothing is known.

    `cdi_folders` are those in which it looks for devices by CDI, none where it does not. `cdi` are the devices that it
    or NVIDIA's toolkit knows.
    """

    version: str = ""
    root: str = ""
    driver: str = ""
    runtimes: tuple[str, ...] = ()
    cdi_folders: tuple[str, ...] = ()
    cdi: tuple[str, ...] = ()
    toolkit: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """All of it."""

    cpu: str = ""
    sockets: int = 0
    numa: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    swap_bytes: int = 0
    storage: tuple[Storage, ...] = ()
    nics: tuple[Nic, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    clock: Clock = field(default_factory=Clock)
    own_name: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, int | None] = field(default_factory=dict)
    sysctl: Mapping[str, int] = field(default_factory=dict)
    boot_options: tuple[str, ...] = ()
    docker: Docker = field(default_factory=Docker)
    amd_devices: tuple[str, ...] = ()


# ---- pure: texts and trees -------------------------------------------------------------------------------------------


def parse_cpuinfo(text: str) -> tuple[str, int]:
    """The CPU's name and the number of sockets, from /proc/cpuinfo; aarch64 tells no name."""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))
    return (name[1].strip() if name else "", len(sockets) or 1)


def numa_nodes(system: Path) -> dict[int, dict[str, Any]]:
    """The NUMA nodes below /sys/devices/system/node: CPUs as the kernel writes them, and memory in bytes."""
    found = {}
    for folder in sorted(system.glob("node[0-9]*"), key=lambda one: int(one.name[4:])):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(folder / "meminfo"))
        found[int(folder.name[4:])] = {
            "cpus": _read(folder / "cpulist"),
            "memory_bytes": int(total[1]) * 1024 if total else 0,
        }
    return found


def parse_mountinfo(text: str) -> dict[str, tuple[str, str, str]]:
    """Read /proc/self/mountinfo (proc(5)): by mount point device numbers, type and source; the last mount wins."""
    found = {}
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        words, tail = before.split(), after.split()
        if dash and len(words) >= 5 and len(tail) >= 2:
            place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), words[4])
            found[place] = (words[2], tail[0], tail[1])
    return found


def storage_of(path: str, mounts: Mapping[str, tuple[str, str, str]], blocks: Path) -> Storage:
    """What lies below a path.

    Args:
        path: absolute; it need not exist.
        mounts: as `parse_mountinfo` gives them.
        blocks: the folder /sys/dev/block.
    """
    place = max((one for one in mounts if one in {"/", path} or path.startswith(one + "/")), key=len, default="/")
    number, kind, source = mounts.get(place, ("", "", ""))
    if NETWORK_FILE_SYSTEMS.match(kind):
        return Storage(path, place, kind, source, "network")
    if kind in MEMORY_FILE_SYSTEMS:
        return Storage(path, place, kind, source, "memory")
    device = blocks / number
    if not (number and device.exists()):
        # btrfs and overlays have numbers of their own; the source names the device where there is one.
        named = blocks.parent.parent / "class" / "block" / Path(source).name
        device = named if source.startswith("/dev/") and named.exists() else device
    disks = _disks(device.resolve()) if device.exists() else set()
    names = ", ".join(sorted(disk.name for disk in disks)) or source
    return Storage(path, place, kind, names, _slowest({_speed_class(disk) for disk in disks}))


def _disks(device: Path) -> set[Path]:
    """The whole disks that a block device lies on, through partitions, device mapper and md."""
    if (device / "partition").exists():
        return _disks(device.parent)
    below = [entry.resolve() for entry in (device / "slaves").glob("*")]
    return set().union(*map(_disks, below)) if below else {device}


def _speed_class(disk: Path) -> str:
    if disk.name.startswith("nvme"):
        return "nvme"
    turning = _read(disk / "queue" / "rotational")
    if re.match(r"vd|xvd|loop|zram|nbd|rbd", disk.name):
        return "unknown"  # what a virtual disk says about turning is its host's guess
    return {"1": "hdd", "0": "ssd"}.get(turning, "unknown")


def _slowest(classes: set[str]) -> str:
    return next((name for name in ("hdd", "unknown", "ssd", "nvme") if name in classes), "unknown")


def nics(system: Path) -> list[Nic]:
    """The interfaces below /sys/class/net, loopback left out."""
    found = []
    for folder in sorted(system.glob("*")):
        if folder.name == "lo" or not (folder / "operstate").exists():
            continue
        device = folder / "device"
        found.append(
            Nic(
                folder.name,
                up=_read(folder / "operstate") == "up",
                speed_mbit=_positive(_read(folder / "speed")),
                mtu=_positive(_read(folder / "mtu")) or 0,
                driver=(device / "driver").resolve().name if (device / "driver").exists() else "",
                pci=device.resolve().name if device.exists() else "",
                numa=_number(_read(device / "numa_node")),
                virtual=not device.exists() or VIRTUAL.search(str(folder.resolve())) is not None,
                master=(folder / "master").resolve().name if (folder / "master").exists() else "",
            )
        )
    return found


def rdma_ports(system: Path) -> list[RdmaPort]:
    """The ports below /sys/class/infiniband (Documentation/ABI/stable/sysfs-class-infiniband)."""
    found = []
    for port in sorted(system.glob("*/ports/*")):
        device = port.parent.parent
        rate = re.match(r"([\d.]+) Gb/sec", _read(port / "rate"))
        found.append(
            RdmaPort(
                device.name,
                int(port.name),
                state=_read(port / "state").rpartition(": ")[2],
                physical=_read(port / "phys_state").rpartition(": ")[2],
                link=_read(port / "link_layer"),
                rate_gbit=float(rate[1]) if rate else None,
                firmware=_read(device / "fw_ver"),
                gids=tuple(_gids(port)),
            )
        )
    return found


def _gids(port: Path) -> list[Gid]:
    found = []
    for entry in sorted((port / "gids").glob("*"), key=lambda one: int(one.name)):
        gid = _read(entry)
        if not gid.replace(":", "").strip("0"):
            continue  # an empty place of the table; its type cannot even be read
        kind = _read(port / "gid_attrs" / "types" / entry.name)
        interface = _read(port / "gid_attrs" / "ndevs" / entry.name)
        found.append(Gid(int(entry.name), gid, kind, interface, gid_address(gid)))
    return found


def gid_address(gid: str) -> str:
    """The IPv4 address in a GID; empty where it holds none."""
    mapped = re.fullmatch(r"(?:0{4}:){5}ffff:([0-9a-f]{2})([0-9a-f]{2}):([0-9a-f]{2})([0-9a-f]{2})", gid.lower())
    return ".".join(str(int(part, 16)) for part in mapped.groups()) if mapped else ""


def parse_docker(text: str) -> Docker:
    """Read `docker info --format '{{json .}}'`; the client answers with errors inside where the engine does not."""
    try:
        told = json.loads(text)
    except ValueError:
        return Docker(problem=f"docker info says: {asking.first_line(text)}")
    if not isinstance(told, dict):
        return Docker(problem=f"docker info says: {asking.first_line(text)}")
    if told.get("ServerErrors") or not told.get("ServerVersion"):
        return Docker(problem="; ".join(told.get("ServerErrors") or ["docker info names no engine"]))
    devices = [str(one.get("ID")) for one in told.get("DiscoveredDevices") or () if isinstance(one, dict)]
    return Docker(
        version=told["ServerVersion"],
        root=told.get("DockerRootDir") or "",
        driver=told.get("Driver") or "",
        runtimes=tuple(sorted(told.get("Runtimes") or ())),
        cdi_folders=tuple(told.get("CDISpecDirs") or ()),
        cdi=tuple(sorted(devices)),
    )


def parse_toolkit(text: str) -> str:
    """The version that `nvidia-ctk --version` tells: `NVIDIA Container Toolkit CLI version 1.17.8`."""
    found = re.search(r"version (\d[\w.]*)", text)
    return found[1] if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _positive(text: str) -> int | None:
    value = _number(text)
    return value if value and value > 0 else None


# ---- the node --------------------------------------------------------------------------------------------------------


class _Timex(ctypes.Structure):
    """struct timex of a 64-bit Linux (adjtimex(2)); what follows is not read."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 512),
    ]


def clock() -> Clock:
    """The clock, and whether the kernel takes it for synchronised; asking changes nothing."""
    synchronised: bool | None = None
    with contextlib.suppress(OSError, AttributeError):
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(_Timex()))
        synchronised = None if answer < 0 else answer != 5  # TIME_ERROR
    return Clock(time.time(), synchronised)


def own_name() -> dict[str, Any]:
    """What the node calls itself, the addresses that stand for it, and the seconds that took.

    The resolver has no deadline of its own that one could set; it is left behind when it takes too long.
    """
    name = socket.gethostname()
    answer: dict[str, Any] = {"name": name, "addresses": [], "problem": f"no answer within {RESOLVE_SECONDS:g} s"}

    def resolve() -> None:
        try:
            told = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
            answer["addresses"], answer["problem"] = sorted({str(one[4][0]) for one in told}), ""
        except OSError as error:
            answer["problem"] = str(error.strerror or error)

    start = time.monotonic()
    asker = threading.Thread(target=resolve, daemon=True)
    asker.start()
    asker.join(RESOLVE_SECONDS)
    return {**answer, "seconds": round(time.monotonic() - start, 2)}


def limits() -> dict[str, int | None]:
    """The hard limits that this user's processes run under; None for none."""
    kinds = {
        "open_files": resource.RLIMIT_NOFILE,
        "locked_memory_bytes": resource.RLIMIT_MEMLOCK,
        "processes": resource.RLIMIT_NPROC,
    }
    hard = {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in hard.items()}


def parse_cdi(text: str) -> tuple[str, ...]:
    """The devices in `nvidia-ctk cdi list`, a line each."""
    return tuple(line.strip() for line in text.splitlines() if re.fullmatch(r"[\w.-]+/[\w.-]+=\S+", line.strip()))


def docker() -> Docker:
    """The container engine and the vendor's toolkit."""
    if not shutil.which("docker", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *asking.TOOL_PATHS])):
        return Docker(problem="docker is not there")
    text, problem = asking.ask(("docker", "info", "--format", "{{json .}}"))
    found = Docker(problem=problem) if problem else parse_docker(text)
    version = parse_toolkit(asking.ask(("nvidia-ctk", "--version")).text)
    # Docker tells the devices from 28.2 on.
    devices = found.cdi or parse_cdi(asking.ask(("nvidia-ctk", "cdi", "list")).text if version else "")
    return Docker(**{**vars(found), "toolkit": version, "cdi": devices})


def read(paths: Sequence[str], proc: Path, system: Path = Path("/sys")) -> Machine:
    """Read the machine.

    Args:
        paths: whose disks are of interest.
        proc: the folder /proc.
        system: the folder /sys.
    """
    name, sockets = parse_cpuinfo(_read(proc / "cpuinfo"))
    mounts = parse_mountinfo(_read(proc / "self" / "mountinfo"))
    swap = re.search(r"^SwapTotal:\s+(\d+) kB$", _read(proc / "meminfo"), re.MULTILINE)
    settings = {name: _number(_read(proc / "sys" / name.replace(".", "/"))) for name in SYSCTLS}
    return Machine(
        cpu=name,
        sockets=sockets,
        numa=numa_nodes(system / "devices" / "system" / "node"),
        swap_bytes=int(swap[1]) * 1024 if swap else 0,
        storage=tuple(storage_of(path, mounts, system / "dev" / "block") for path in paths),
        nics=tuple(nics(system / "class" / "net")),
        rdma=tuple(rdma_ports(system / "class" / "infiniband")),
        clock=clock(),
        own_name=own_name(),
        limits=limits(),
        sysctl={name: value for name, value in settings.items() if value is not None},
        boot_options=tuple(word for word in _read(proc / "cmdline").split() if BOOT_OPTIONS.match(word)),
        docker=docker(),
        amd_devices=tuple(path for path in AMD_DEVICES if Path(path).exists()),
    )
