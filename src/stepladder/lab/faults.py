"""Faults of a lab: nodes that cannot hear each other, slow links, full disks, and nodes that are off.

Traffic is dropped where it arrives, in a node's own network name space: a sender that dropped its own packets would be
told so, and a cut cable tells nobody.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from stepladder.lab import disk
from stepladder.lab.cluster import Cluster
from stepladder.lab.engine import run
from stepladder.lab.places import LabError
from stepladder.lab.record import Fault, Lab, Node

CHAIN = "STEPLADDER-LAB"
JUMP = ["PREROUTING", "!", "-i", "lo", "-j", CHAIN]
EVERYTHING = "0.0.0.0/0"
BALLAST = ".stepladder-lab-ballast"
REBOOT_SECONDS = 60.0
RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)?bit")
DELAY = re.compile(r"\d+(?:\.\d+)?(?:us|ms|s)")
# A fault in memory takes the machine's; more than this is no fault of a node any more.
MOST_MEMORY_BYTES = 2 * 1024**3
# Allocates what is left without writing it: on a sparse disk the machine's own stays as it is.
FILL = """
import os, sys
with open(sys.argv[1], "ab") as file:
    step = 1 << 40
    while step >= 4096:
        try:
            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)
        except OSError:
            step //= 2
left = os.statvfs(os.path.dirname(sys.argv[1]))
print(left.f_bavail * left.f_frsize)
"""


def addresses_of(node: Node) -> list[str]:
    """Every address of a node on the lab's networks."""
    return [address for address in (node.address, node.storage_address) if address]


def dropped(lab: Lab, name: str) -> list[str]:
    """The sources whose packets a node must not hear, by the cuts in force.

    Args:
        lab: with its nodes and faults.
        name: the node's.
    """
    sources: dict[str, None] = {}
    for fault in lab.faults:
        if fault.kind != "cut":
            continue
        if fault.node == name and fault.settings.get("controller"):
            return [EVERYTHING]
        for node in lab.nodes:
            apart = {fault.node, fault.peer} if fault.peer else {fault.node, node.name}
            if node.name != name and (apart == {name, node.name} or (fault.node == node.name and not fault.peer)):
                sources.update(dict.fromkeys(addresses_of(node)))
    return list(sources)


def drop_table(sources: Iterable[str]) -> str:
    """The chain that drops packets from some sources, for iptables-restore."""
    rules = "".join(f"-A {CHAIN} -s {source} -j DROP\n" for source in sources)
    return f"*raw\n:{CHAIN} - [0:0]\n{rules}COMMIT\n"


def rate_bits(text: str) -> float:
    """Bits a second of a rate such as `250mbit`.

    Raises:
        LabError: it is no rate.
    """
    match = RATE.fullmatch(text)
    if not match or not float(match[1]):
        raise LabError(f"'{text}' is no rate; write it like 250mbit, 1gbit or 800kbit")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}.get(match[2] or "", 1.0)


def checked_delay(text: str) -> str:
    """A delay such as `20ms`.

    Raises:
        LabError: it is none.
    """
    if not DELAY.fullmatch(text):
        raise LabError(f"'{text}' is no delay; write it like 20ms, 500us or 1s")
    return text


def slow_discipline(rate: str, delay: str) -> list[str]:
    """The arguments of tc for an interface that is slow in sending.

    Args:
        rate: such as `250mbit`; empty for no limit.
        delay: such as `20ms`, empty for none; needs the kernel's netem.
    """
    if delay:
        return ["netem", "delay", delay, *(["rate", rate] if rate else [])]
    # A bucket of 10 ms and at least one big segment: smaller ones stay below the rate.
    burst = max(int(rate_bits(rate) / 8 / 100), 128 * 1024)
    return ["tbf", "rate", rate, "burst", str(burst), "latency", "100ms"]


def told(fault: Fault) -> str:
    """A fault in words."""
    if fault.kind == "cut":
        apart = f"cut from {fault.peer or 'all nodes'}"
        return f"{apart} and the controller" if fault.settings.get("controller") else apart
    if fault.kind == "slow":
        return "slow: " + ", ".join(f"{name} {value}" for name, value in fault.settings.items() if value)
    return f"{fault.settings['mount']} is full"


def in_name_space(cluster: Cluster, node: str) -> list[str]:
    """The beginning of a command of the machine that works on a node's network."""
    return ["nsenter", "--target", str(cluster.state(node)["Pid"]), "--net"]


def apply(cluster: Cluster, names: Iterable[str]) -> None:
    """Make the networks of nodes equal to the faults in force; those that are off are left out."""
    for name in names:
        if cluster.running(name):
            _apply_cuts(cluster, name)
            _apply_slow(cluster, name)


def _apply_cuts(cluster: Cluster, name: str) -> None:
    inside = in_name_space(cluster, name)
    iptables = [*inside, "iptables", "-w", "10", "-t", "raw"]
    sources = dropped(cluster.lab, name)
    present = subprocess.run([*iptables, "-C", *JUMP], capture_output=True, check=False).returncode == 0
    if sources or present:
        run([*inside, "iptables-restore", "-w", "10", "--noflush"], data=drop_table(sources).encode())
    if sources and not present:
        run([*iptables, "-I", *JUMP])
    elif present and not sources:
        run([*iptables, "-D", *JUMP])
        run([*iptables, "-X", CHAIN])


def _apply_slow(cluster: Cluster, name: str) -> None:
    """Make both directions slow: what the node sends on its interface, what it gets at the machine's end."""
    node = cluster.lab.node(name)
    slow = next((fault for fault in cluster.lab.faults if fault.kind == "slow" and fault.node == name), None)
    inside = in_name_space(cluster, name)
    for interface in filter(None, (node.interface, node.storage_interface)):
        for where, end in ((inside, interface), (list[str](), _machine_end(cluster, name, interface))):
            tc = [*where, "tc", "qdisc"]
            if slow:
                discipline = slow_discipline(slow.settings.get("rate", ""), slow.settings.get("delay", ""))
                run([*tc, "replace", "dev", end, "root", *discipline])
            elif re.search(r"qdisc (tbf|netem) \S+ root", run([*tc, "show", "dev", end])):
                run([*tc, "del", "dev", end, "root"])


def _machine_end(cluster: Cluster, name: str, interface: str) -> str:
    index = cluster.machine_end(name, interface)
    links = json.loads(run(["ip", "-json", "link"]))
    return str(next(link["ifname"] for link in links if link["ifindex"] == index))


def lost(cluster: Cluster, name: str) -> bool:
    """Whether a node that is on has shed its faults, as it does when it restarts on its own."""
    chain = [*in_name_space(cluster, name), "iptables", "-w", "10", "-t", "raw", "-C", *JUMP]
    if dropped(cluster.lab, name) and subprocess.run(chain, capture_output=True, check=False).returncode:
        return True
    slow = any(fault.kind == "slow" and fault.node == name for fault in cluster.lab.faults)
    shown = run([*in_name_space(cluster, name), "tc", "qdisc", "show", "dev", cluster.lab.node(name).interface])
    return slow and not re.search(r"qdisc (tbf|netem) \S+ root", shown)


def cut(cluster: Cluster, name: str, peer: str, controller: bool) -> None:
    """Cut a node off from one other, or from all of them.

    Args:
        cluster: the lab.
        name: the node's.
        peer: the other's; empty for all.
        controller: whether the machine cannot reach the node either, but for `lab`, which does not use the network.

    Raises:
        LabError: there is no such node, or both are the same.
    """
    lab = cluster.lab
    lab.node(name)
    if peer:
        lab.node(peer)
        if peer == name:
            raise LabError(f"{name} cannot be cut from itself; name another node, or none for all")
        if controller:
            raise LabError("--all cuts a node from everything; name one node")
    settings = {"controller": "yes"} if controller else {}
    lab.faults = [f for f in lab.faults if not (f.kind == "cut" and f.node == name and f.peer == peer)]
    lab.faults.append(Fault("cut", name, peer, settings))
    cluster.save()
    apply(cluster, [node.name for node in lab.nodes])


def slow(cluster: Cluster, name: str, rate: str, delay: str) -> None:
    """Make a node's links slow, in both directions.

    Raises:
        LabError: there is no such node, nothing was asked for, or the kernel cannot.
    """
    lab = cluster.lab
    lab.node(name)
    if not rate and not delay:
        raise LabError("slow needs --rate, --delay or both")
    if not cluster.running(name):
        raise LabError(f"{name} is off; `lab start {name}` first")
    if rate:
        rate_bits(rate)
    if delay:
        checked_delay(delay)
    before = list(lab.faults)
    lab.faults = [f for f in before if not (f.kind == "slow" and f.node == name)]
    lab.faults.append(Fault("slow", name, settings={"rate": rate, "delay": delay}))
    try:
        apply(cluster, [name])
    except LabError as error:
        lab.faults = before
        apply(cluster, [name])
        if delay and "qdisc" in str(error):
            raise LabError(
                "a delay cannot be had here: this machine's kernel has no netem (`modprobe sch_netem` brings it where "
                "the module is there); --rate alone works"
            ) from None
        raise
    cluster.save()


def fill(cluster: Cluster, name: str, path: str) -> str:
    """Fill the file system that holds a path on a node, and say what was done.

    Raises:
        LabError: it is the machine's own, or it did not get full.
    """
    cluster.lab.node(name)
    if not path.startswith("/"):
        raise LabError(f"'{path}' is no absolute path")
    if not cluster.running(name):
        raise LabError(f"{name} is off; `lab start {name}` first")
    script = 'p=$1; while [ ! -e "$p" ]; do p=$(dirname "$p"); done; df --output=target,fstype,size -B1 "$p" | tail -1'
    target, kind, size = cluster.inside(name, "sh", "-c", script, "sh", path).split()
    if refusal := cannot_fill(target, kind, int(size), bool(cluster.lab.node(name).disk)):
        raise LabError(f"{path} on {name} cannot be filled: {refusal}")
    settings = {"mount": target}
    if not any(f.kind == "fill" and f.node == name and f.settings == settings for f in cluster.lab.faults):
        cluster.lab.faults.append(Fault("fill", name, settings=settings))
        cluster.save()
    left = cluster.inside(name, "python3", "-c", FILL, f"{target.rstrip('/')}/{BALLAST}")
    if int(left) >= 4096:
        raise LabError(f"{target} on {name} still has {left} bytes")
    return f"{target} on {name} is full ({int(size) / 1e9:.1f} GB, {kind})"


def cannot_fill(target: str, kind: str, size: int, has_disk: bool) -> str:
    """Why a file system must not be filled; empty where it may.

    Args:
        target: where it is mounted.
        kind: its type.
        size: in bytes.
        has_disk: whether the node has a disk of its own.
    """
    if kind == "overlay":
        disk_text = (
            "/var is the node's own" if has_disk else "this machine has no loop devices, so nodes have no own disk"
        )
        return f"it lies on the machine's own disk ({disk_text})"
    if kind == "tmpfs" and size > MOST_MEMORY_BYTES:
        return f"it is {size / 1024**3:.0f} GiB of the machine's memory"
    if kind not in {"ext4", "tmpfs"} or (kind == "ext4" and target != "/var"):
        return f"{target} is not the node's own ({kind})"
    return ""


def heal(cluster: Cluster, name: str = "", peer: str = "") -> list[str]:
    """End faults: all, those of a node, or the cut between two.

    Returns: what ended, in words.
    """
    lab = cluster.lab
    for known in filter(None, (name, peer)):
        lab.node(known)

    def meant(fault: Fault) -> bool:
        if peer:
            return fault.kind == "cut" and {fault.node, fault.peer} == {name, peer}
        return not name or name in {fault.node, fault.peer}

    ended = [fault for fault in lab.faults if meant(fault)]
    for fault in ended:
        if fault.kind == "fill":
            _empty(cluster, fault)
    lab.faults = [fault for fault in lab.faults if not meant(fault)]
    apply(cluster, [node.name for node in lab.nodes])
    cluster.save()
    return [f"{fault.node}: {told(fault)}" for fault in ended]


def _empty(cluster: Cluster, fault: Fault) -> None:
    node = cluster.lab.node(fault.node)
    if fault.settings["mount"] == "/var" and node.disk:
        (disk.var(Path(node.disk)) / BALLAST).unlink(missing_ok=True)
    elif cluster.running(node.name):
        cluster.inside(node.name, "rm", "-f", f"{fault.settings['mount'].rstrip('/')}/{BALLAST}")


def kill(cluster: Cluster, name: str) -> None:
    """Switch a node off without warning, as a power cut does."""
    cluster.lab.node(name)
    if not cluster.running(name):
        raise LabError(f"{name} is off already")
    cluster.docker.call("kill", cluster.lab.container(name))
    cluster.sweep()


def start(cluster: Cluster, name: str) -> bool:
    """Switch a node on; its faults are in force again when it has booted.

    Returns: whether it was off.
    """
    cluster.lab.node(name)
    if cluster.running(name):
        return False
    cluster.start([name])
    _after_boot(cluster, name)
    return True


def reboot(cluster: Cluster, name: str) -> None:
    """Let systemd restart a node and wait until it answers; its disk stays, its processes do not.

    Raises:
        LabError: it did not go down or come back in time.
    """
    cluster.lab.node(name)
    before = cluster.state(name)
    if not before.get("Running"):
        raise LabError(f"{name} is off; `lab start {name}` switches it on")
    subprocess.run(
        cluster.docker.command("exec", cluster.lab.container(name), "systemctl", "reboot"),
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=REBOOT_SECONDS,
    )  # fmt: skip
    deadline = time.monotonic() + REBOOT_SECONDS
    while True:
        state = cluster.state(name)
        if state.get("Running") and state.get("StartedAt") != before["StartedAt"]:
            break
        if time.monotonic() > deadline:
            if state.get("StartedAt") == before["StartedAt"] and state.get("Running"):
                jobs = cluster.inside(name, "systemctl", "list-jobs", "--no-legend")
                raise LabError(f"{name} has not gone down within {REBOOT_SECONDS:.0f} s. systemd's jobs:\n{jobs}")
            raise LabError(f"{name} went down and did not come back; `lab start {name}` switches it on")
        time.sleep(0.1)
    cluster.wait_booted(name)
    cluster.sweep()
    _after_boot(cluster, name)


def _after_boot(cluster: Cluster, name: str) -> None:
    apply(cluster, [name])
    cut_off = any(f.kind == "cut" and f.node == name and f.settings.get("controller") for f in cluster.lab.faults)
    if not cut_off:
        cluster.wait_ssh([name])
