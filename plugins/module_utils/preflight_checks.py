"""The checks of a node: each a small pure function of what was found and what is wanted.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import gpu_health
from ansible_collections.stepladder.core.plugins.module_utils import gpus as gpu_tools
from ansible_collections.stepladder.core.plugins.module_utils.machine import AMD_DEVICES, Docker, RdmaPort
from ansible_collections.stepladder.core.plugins.module_utils.preflight import (
    FAILURE,
    SHARED_MEMORY,
    WARNING,
    Disk,
    Facts,
    Finding,
    Listener,
    Wanted,
)

SLOW_MBIT = 10_000
SLOW_NAME_SECONDS = 2.0
OPEN_FILES = 65536
AMD_BOOT_OPTIONS = ("iommu=pt", "pci=realloc=off")  # as `kernel_parameters` in catalog/gpus.yml
MUCH_BYTES = 10 * 10**9
HARD_DISK_BYTES_PER_SECOND = 200e6  # a modern drive, read from its outer tracks in one go

# ---- pure: the checks ------------------------------------------------------------------------------------------------


def findings(facts: Facts, wanted: Wanted) -> list[Finding]:
    """All that makes the node unfit or is worth a warning, in the order of the checks."""
    return [
        *check_architecture(facts, wanted),
        *check_cpu_flags(facts, wanted),
        *check_gpus(facts, wanted),
        *check_memory(facts, wanted),
        *check_shared_memory(facts, wanted),
        *check_disks(facts),
        *check_writable(facts, wanted),
        *check_ports(facts, wanted),
        *check_python(facts, wanted),
        *check_commands(facts, wanted),
        *check_packages(facts),
        *check_gpu_tools(facts, wanted),
        *check_gpu_health(facts, wanted),
        *check_kernel_log(facts, wanted),
        *check_interface(facts, wanted),
        *check_rdma(facts),
        *check_containers(facts, wanted),
        *check_disk_speed(facts, wanted),
        *check_clock(facts),
        *check_own_name(facts),
        *check_limits(facts),
        *check_kernel_settings(facts),
        *check_unread(facts),
    ]


def check_architecture(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """The machine's architecture is one of those allowed (none named: any)."""
    if wanted.architectures and facts.architecture not in wanted.architectures:
        yield Finding(
            "architecture",
            "machine",
            facts.architecture,
            " or ".join(wanted.architectures),
            "take the node out of this deployment's group, or choose an engine build for its architecture",
        )


def check_cpu_flags(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """The CPU has all flags of at least one group (no group: any CPU)."""
    groups = [set(group) for group in wanted.cpu_flags_any]
    if groups and not any(group <= facts.cpu_flags for group in groups):
        known = sorted(facts.cpu_flags & set().union(*groups))
        yield Finding(
            "cpu",
            "instructions",
            f"only {' '.join(known)}" if known else "none of them",
            " or ".join("+".join(group) for group in wanted.cpu_flags_any),
            "use a node whose CPU has them; in a virtual machine, let the host's CPU through (host-passthrough)",
        )


def check_gpus(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """The GPUs are those that were planned for, with a driver that is new enough, and idle (none asked for: any)."""
    if wanted.gpus:
        for one in gpu_tools.differences(facts.gpus, wanted.gpus, wanted.deployment, facts.runs_here):
            yield Finding("gpu", one.what, one.found, one.needed, one.mend)


def check_memory(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """There is memory enough; what this deployment's own processes hold counts as free, they are replaced."""
    there = min(facts.memory_total_bytes, facts.memory_available_bytes + facts.own_memory_bytes)
    if there < wanted.minimum_memory_bytes:
        own = f", {gib(facts.own_memory_bytes)} of it held by this deployment" if facts.own_memory_bytes else ""
        yield Finding(
            "memory",
            "available memory",
            f"{gib(there)} of {gib(facts.memory_total_bytes)}{own}",
            gib(wanted.minimum_memory_bytes),
            "stop what uses it (ps -eo pid,user,rss,args --sort=-rss | head), or use a node with more",
        )


def check_disks(facts: Facts) -> Iterator[Finding]:
    """Each file system has room for all that is to come onto it together."""
    by_device: dict[int, list[Disk]] = {}
    for disk in facts.disks:
        by_device.setdefault(disk.device, []).append(disk)
    for group in by_device.values():
        mount, free = group[0].mount, group[0].free_bytes
        needed = sum(disk.needed_bytes for disk in group)
        if needed <= free:
            continue
        parts = [f"{gb(disk.needed_bytes)} for {disk.purpose}" for disk in group if disk.needed_bytes]
        yield Finding(
            "disk",
            ", ".join(dict.fromkeys(disk.path for disk in group)),
            f"{gb(free)} free on {mount}",
            parts[0] if len(parts) == 1 else f"{gb(needed)} ({' + '.join(parts)})",
            f"free {gb(needed - free)} on {mount}, or give a path on a larger file system",
        )


def check_writable(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """What is to be written can be."""
    for path in wanted.writable_paths:
        if facts.unwritable.get(path):
            yield Finding(
                "writable",
                path,
                facts.unwritable[path],
                f"a directory that {facts.user} may write, or may make",
                f"let {facts.user} write there, or run with become, or give another path",
            )


def check_ports(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """No port is held by anything but this deployment itself."""
    for want in wanted.ports:
        if want.get("host") in facts.foreign_hosts:
            yield Finding(
                "port",
                f"{want['host']}:{want['port']}",
                f"{want['host']} is no address of this node, as behind address translation",
                f"an address that {want.get('process') or wanted.deployment} can listen on",
                "set deployment_bind_address to 0.0.0.0, or ansible_host to an address of the node's own",
            )
            continue
        host, port = want.get("host") or "0.0.0.0", want["port"]  # noqa: S104  the meaning of a port without an address
        for listener in facts.listeners:
            if listener.port != port or not overlaps(host, listener.host) or listener.deployment == wanted.deployment:
                continue
            purpose = f" ({want['purpose']})" if want.get("purpose") else ""
            yield Finding(
                "port",
                f"{host}:{port}",
                owner(listener, facts.user),
                f"free for {want.get('process') or wanted.deployment}{purpose}",
                mend_port(listener, want, facts.user),
            )
            break


def mend_port(listener: Listener, want: Mapping[str, Any], user: str) -> str:
    """How to get the port free; a deployment is stopped by its own verb, not by kill."""
    if listener.deployment:
        way = f"stop deployment {listener.deployment}"
    elif listener.pid:
        way = f"stop process {listener.pid}"
    else:
        way = "find it (docker ps, lsns -t net)" if user == "root" else "find it (ss -ltnp, as root)"
    return f"{way}, or choose another port for {want.get('process') or 'it'}"


def owner(listener: Listener, user: str) -> str:
    """Who holds a socket, as far as this user may see."""
    if listener.pid:
        of = f" of deployment {listener.deployment}" if listener.deployment else ""
        return f"held by pid {listener.pid}{of}, user {listener.user}: {listener.command}"
    uid = str(listener.uid) if listener.user == str(listener.uid) else f"{listener.uid} ({listener.user})"
    if user == "root":
        return f"held by uid {uid} on {listener.host}; no process here has it open, so by a container's or the kernel"
    return f"held by a process of uid {uid} on {listener.host}; {user} may not see which one"


def overlaps(wanted: str, taken: str) -> bool:
    """Whether a listener at `taken` keeps `wanted` from being bound; a name that is no address is taken for any."""
    if wanted == "localhost":
        wanted = "127.0.0.1"
    try:
        one, other = ipaddress.ip_address(wanted), ipaddress.ip_address(taken)
    except ValueError:
        return True
    return one == other or one.is_unspecified or other.is_unspecified


def check_python(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """The interpreter is there and new enough ('' asks for none)."""
    if not wanted.minimum_python:
        return
    if not facts.python_version or numbers(facts.python_version) < numbers(wanted.minimum_python):
        yield Finding(
            "python",
            wanted.python,
            f"Python {facts.python_version}" if facts.python_version else "no such interpreter, or it does not start",
            f"Python {wanted.minimum_python} or later",
            f"install Python {wanted.minimum_python} or later, or set python to the path of one",
        )


def numbers(version: str) -> tuple[int, ...]:
    """`3.11.7` for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def check_commands(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """Each command is on the PATH."""
    for want in wanted.commands:
        if not facts.commands.get(want["name"]):
            yield Finding(
                "command",
                want["name"],
                "not on the PATH",
                "on the PATH",
                f"install the package {want.get('package') or want['name']}",
            )


def check_packages(facts: Facts) -> Iterator[Finding]:
    """What packages of the system bring is there, or can be installed by the deploy itself."""
    if facts.can_install:
        return
    for name, package in sorted(facts.missing_packages.items()):
        yield Finding("package", name, "not installed", package, f"as root: apt-get install -y {package}")


def check_shared_memory(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """Shared memory is large enough for what the engine's processes pass to each other; containers get 64 MB."""
    if facts.shared_memory_bytes < wanted.minimum_shared_memory_bytes:
        yield Finding(
            "shared memory",
            SHARED_MEMORY,
            f"{facts.shared_memory_bytes / 2**20:.0f} MiB",
            f"{wanted.minimum_shared_memory_bytes / 2**20:.0f} MiB",
            "start the container with --shm-size=1g or --ipc=host; on a machine: mount -o remount,size=1g /dev/shm",
        )


def gib(count: int) -> str:
    """Memory for people: 23.5 GiB."""
    return f"{count / 2**30:.1f} GiB"


def gb(count: int) -> str:
    """Disk space for people, in the unit of the model's size: 212.5 GB."""
    return f"{count / 1e9:.1f} GB"


def check_gpu_tools(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """A vendor's tool that is there but gets no answer from its GPUs; where GPUs are planned, `check_gpus` says so."""
    if facts.gpus.problem and facts.gpu_vendor and not wanted.gpus:
        tool = "nvidia-smi" if facts.gpu_vendor == "nvidia" else "amd-smi"
        mend = f"run {tool} by hand, look into dmesg; a driver that hangs needs a restart of the node"
        yield Finding("gpu", "GPUs", facts.gpus.problem, f"an answer of {tool}", mend)


def check_gpu_health(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """Memory errors, rows to be replaced, links, lanes, the fabric, what the driver asks for."""
    for one in gpu_health.troubles(facts.health.gpus, whole_gpus=bool(wanted.gpus)):
        severity = FAILURE if one.serious else WARNING
        yield Finding("gpu", one.what, one.found, one.needed, one.mend, severity)


def check_kernel_log(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """GPU errors since the kernel's start. It does not say whether a GPU was reset since: what it tells now counts."""
    for event in facts.kernel_events:
        often = f"{event.count} times, last: " if event.count > 1 else ""
        yield Finding(
            "xid",
            f"{event.kind} of {event.device}",
            f"{often}{event.text}" or "no text",
            "none since the node's start",
            "restart the node and look whether it comes back; when the GPU was reset since, accept it: "
            "-e preflight_accept=xid"
            if event.fatal
            else "an application's fault as a rule; have the hardware tested when it comes back",
            FAILURE if event.fatal else WARNING,
        )


def check_interface(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """The network interface that the plan names is there, up, and fast enough for ranks that talk over it."""
    if not wanted.interface:
        return
    nic = next((one for one in facts.machine.nics if one.name == wanted.interface), None)
    name = f"interface {wanted.interface}"
    if nic is None:
        there = ", ".join(one.name for one in facts.machine.nics) or "none"
        mend = "name another one (deployment_interface), or leave that out"
        yield Finding("network", name, f"not there; there are {there}", "there", mend)
    elif not nic.up:
        yield Finding("network", name, "down", "up", f"see to the cable and the switch (ip link show {nic.name})")
    elif wanted.ranks > 1 and nic.speed_mbit is not None and nic.speed_mbit < SLOW_MBIT:
        mend = "put the ranks onto a faster network (deployment_interface, deployment_address)"
        needed = f"{SLOW_MBIT} Mbit/s between ranks"
        yield Finding("network", name, f"{nic.speed_mbit} Mbit/s", needed, mend, WARNING)


def check_rdma(facts: Facts) -> Iterator[Finding]:
    """Each RDMA port with a cable is active, and one over Ethernet has an address of RoCE v2."""
    for port in facts.machine.rdma:
        if port.physical == "LinkUp" and port.state != "ACTIVE":
            mend = "on InfiniBand a subnet manager has to run; on Ethernet bring the interface up"
            yield Finding("rdma", rdma_name(port), f"state {port.state}, cable in", "ACTIVE", mend, WARNING)
        elif port.state == "ACTIVE" and port.link == "Ethernet" and not roce_addresses(port):
            mend = "give its interface an IPv4 address"
            yield Finding("rdma", rdma_name(port), "no RoCE v2 entry with an IPv4 address", "one", mend, WARNING)
    locked = facts.machine.limits.get("locked_memory_bytes")
    if locked is not None and any(port.state == "ACTIVE" for port in facts.machine.rdma):
        mend = "set memlock to unlimited in /etc/security/limits.d for this user"
        yield Finding("rdma", "memory that may be locked", f"{locked >> 20} MiB", "unlimited", mend, WARNING)


def rdma_name(port: RdmaPort) -> str:
    """`mlx5_0 port 1`."""
    return f"{port.device} port {port.port}"


def roce_addresses(port: RdmaPort) -> list[str]:
    """The IPv4 addresses under which a port speaks RoCE v2."""
    return [gid.address for gid in port.gids if gid.kind == "RoCE v2" and gid.address]


def check_containers(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """Where the plan has images: an engine that answers, and the way by which the plan hands GPUs in."""
    if not wanted.images:
        return
    docker = facts.machine.docker
    if docker.problem:
        yield Finding(
            "docker", "container engine", docker.problem, "Docker answers", "run the verb prepare, or start it"
        )
        return
    vendor = wanted.gpus["vendor"] if wanted.gpus else ""
    if vendor == "nvidia":
        yield from _containers_of_nvidia(docker, wanted)
    missing = [path for path in AMD_DEVICES if path not in facts.machine.amd_devices] if vendor == "amd" else []
    if missing:
        mend = "load the driver (modprobe amdgpu; the verb prepare installs it)"
        yield Finding("docker", "GPUs in containers", f"no {', no '.join(missing)}", " and ".join(AMD_DEVICES), mend)


def _containers_of_nvidia(docker: Docker, wanted: Wanted) -> Iterator[Finding]:
    """The plan hands GPUs in by CDI alone; the runtime `nvidia` is of no use to it."""
    floor = wanted.minimum_docker
    if floor and numbers(docker.version) < numbers(floor):
        mend = "let the verb prepare install Docker's own (container_runtime_docker: vendor)"
        yield Finding("docker", "Docker", docker.version, f"{floor} or later, for devices by CDI", mend)
    elif not docker.cdi_folders:
        mend = "set features.cdi to true in /etc/docker/daemon.json and restart Docker (the verb prepare does)"
        yield Finding("docker", "devices by CDI", "Docker does not look for them", "it does", mend)
    if not any(one.startswith("nvidia.com/gpu=") for one in docker.cdi):
        mend = "with the driver loaded: systemctl restart nvidia-cdi-refresh; without it: run the verb prepare"
        yield Finding("docker", "GPUs in containers", "no CDI device of NVIDIA", "nvidia.com/gpu=all", mend)
    floor = wanted.minimum_toolkit
    if not docker.toolkit or (floor and numbers(docker.toolkit) < numbers(floor)):
        mend = f"upgrade nvidia-container-toolkit to {floor} or later" if docker.toolkit else "run the verb prepare"
        found = docker.toolkit or "nvidia-ctk is not there, or tells no version"
        yield Finding("docker", "NVIDIA container toolkit", found, f"{floor} or later" if floor else "there", mend)


def check_disk_speed(facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    """Large weights do not come from a disk that makes every start a long one."""
    kinds = {one.path: one for one in facts.machine.storage}
    for disk in facts.disks:
        one = kinds.get(disk.path)
        total = max((want["minimum_free_bytes"] for want in wanted.paths if want["path"] == disk.path), default=0)
        if one and one.speed == "hdd" and total > MUCH_BYTES:
            minutes = total / HARD_DISK_BYTES_PER_SECOND / 60
            found = f"on a hard disk ({one.device}): {gb(total)} take about {minutes:.0f} minutes to read"
            mend = "give a path on an SSD (stepladder_state_directory)"
            yield Finding("disk", disk.path, found, "an SSD", mend, WARNING)


def check_clock(facts: Facts) -> Iterator[Finding]:
    """Something keeps the clock right."""
    if facts.machine.clock.synchronised is False:
        mend = "start chrony or systemd-timesyncd (timedatectl set-ntp true)"
        yield Finding("clock", "time synchronisation", "the kernel's clock is not synchronised", "it is", mend, WARNING)


def check_own_name(facts: Facts) -> Iterator[Finding]:
    """The node can look up its own name, soon: engines and Ray do so when they start."""
    name = facts.machine.own_name
    if name.get("problem"):
        mend = f"add a line '127.0.1.1 {name['name']}' to /etc/hosts, or see to the name servers"
        yield Finding("name", str(name["name"]), f"not found: {name['problem']}", "an address", mend, WARNING)
    elif name.get("seconds", 0) > SLOW_NAME_SECONDS:
        mend = "see to the name servers in /etc/resolv.conf, or add the name to /etc/hosts"
        needed = f"at most {SLOW_NAME_SECONDS:g} s"
        yield Finding("name", str(name["name"]), f"found after {name['seconds']} s", needed, mend, WARNING)


def check_limits(facts: Facts) -> Iterator[Finding]:
    """An engine with many clients and ranks opens many files and sockets."""
    files = facts.machine.limits.get("open_files")
    if files is not None and files < OPEN_FILES:
        mend = f"set nofile to {OPEN_FILES} or more in /etc/security/limits.d"
        yield Finding("limits", "open files", str(files), f"{OPEN_FILES} or more", mend, WARNING)


def check_kernel_settings(facts: Facts) -> Iterator[Finding]:
    """Settings that cost speed. Sources: AMD's system optimisation guides for Instinct; vLLM on swap."""
    if facts.gpu_vendor == "amd" and facts.machine.sysctl.get("kernel.numa_balancing"):
        mend = "sysctl -w kernel.numa_balancing=0"
        yield Finding("kernel", "numa_balancing", "1: memory is moved under the GPUs' feet", "0", mend, WARNING)
    for option in AMD_BOOT_OPTIONS if facts.gpu_vendor == "amd" else ():
        if option not in facts.machine.boot_options:
            mend = f"add {option} to the kernel's command line and restart (the verb prepare adds it)"
            yield Finding("kernel", option.rpartition("=")[0], f"not {option}", option, mend, WARNING)
    if facts.machine.swap_bytes and facts.gpu_vendor:
        mend = "swapoff -a, and take it out of /etc/fstab"
        yield Finding("kernel", "swap", gib(facts.machine.swap_bytes), "none on a node with GPUs", mend, WARNING)


def check_unread(facts: Facts) -> Iterator[Finding]:
    """What could not be read is told, not passed over."""
    for what, why in facts.unread.items():
        mend = "install it" if "is not there" in why else "read it as root (-e ansible_become=true)"
        if facts.user == "root" and "is not there" not in why:
            mend = "run it by hand"
        yield Finding("unread", what, why, "readable", mend, WARNING)
