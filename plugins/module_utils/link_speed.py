"""How fast a node's links to its peers are: iperf3 between pairs, in rounds in which a node has one peer only.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.stepladder.core.plugins.module_utils import all_reduce, peer_network, ssh_server

PROGRAM = "iperf3"
PAUSE_SECONDS = 0.1


class Place(NamedTuple):
    """Where peers meet a node: an address, or why none is known."""

    address: str = ""
    problem: str = ""


def place(told: str, own: Mapping[str, str], resolved: Sequence[str], reached: str) -> Place:
    """Where peers meet this node: at one of its own addresses if that can be found.

    A name often means 127.0.1.1 on the machine that has it (Debian's installer writes it into /etc/hosts), and an
    address behind NAT is none of the machine's own. Then the one counts at which Ansible's ssh arrived.

    Args:
        told: address or name under which peers reach it, as the inventory says.
        own: its addresses beyond the loopback, by address the interface.
        resolved: what `told` means on this node; itself where it is an address.
        reached: its end of this run's SSH connection; empty for none.
    """
    for address in (*resolved, reached):
        if address in own:
            return Place(address)
    if [told] == [*resolved] and not ipaddress.ip_address(told).is_loopback:
        # Peers may know a way there; it cannot be listened on by its address.
        return Place(told)
    means = (
        f"means {', '.join(resolved)} on the node itself, which" if resolved else "does not resolve on the node itself;"
    )
    have = ", ".join(f"{address} ({interface})" for address, interface in own.items()) or "none"
    verb = "is none of its own addresses beyond the loopback" if resolved else "no peer could be told where it is"
    return Place(problem=f"'{told}' {means} {verb}. Set deployment_address to the one that peers reach: {have}.")


def place_here(told: str) -> Place:
    """`place` of this node."""
    own = {one["address"]: one["name"] for one in peer_network.interfaces()}
    resolved = _resolved(told)
    reached = ssh_server.connection().address
    own.update((address, "IPv6") for address in (*resolved, reached) if _is_own_ipv6(address))
    return place(told, own, resolved, reached)


def _resolved(told: str) -> list[str]:
    try:
        answers = socket.getaddrinfo(told, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    return list(dict.fromkeys(str(one[4][0]) for one in answers))


def is_own(address: str) -> bool:
    """Whether this node has an address, which is not of its loopback."""
    return any(one["address"] == address for one in peer_network.interfaces()) or _is_own_ipv6(address)


def _is_own_ipv6(address: str) -> bool:
    """The kernel binds no address that it has not."""
    if ":" not in address or ipaddress.ip_address(address).is_loopback:
        return False
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as asking:
        try:
            asking.bind(socket.getaddrinfo(address, 0, flags=socket.AI_NUMERICHOST)[0][4])
        except OSError:
            return False
    return True


def line_gbit(address: str, system: Path = Path("/sys")) -> float | None:
    """Line rate towards one peer in Gbit/s, none where no driver tells.

    Of a bond that is one member's: its default policy sends all that one peer gets over the same one.
    Source: Linux, Documentation/networking/bonding.rst, xmit_hash_policy.

    Args:
        address: of this node.
        system: of sysfs.
    """
    found = all_reduce.line(address, "gloo", system)
    folder = system / "class" / "net" / found["interface"]
    while not (folder / "bonding").is_dir():
        below = [one.name.partition("_")[2] for one in folder.glob("lower_*")]
        if len(below) != 1:
            return None if found["gbit"] is None else float(found["gbit"])
        folder = folder.parent / below[0]
    members = (folder / "bonding" / "slaves").read_text().split()
    speeds = [peer_network.speed_of(folder.parent / one / "speed") for one in members]
    return max((speed / 1000 for speed in speeds if speed), default=None)


def parse(text: str) -> tuple[float | None, str]:
    """Read `iperf3 --json`: Mbit/s as they arrived, and why there are none."""
    try:
        told = json.loads(text)
    except ValueError:
        return None, "iperf3 gave no answer that can be read"
    if not isinstance(told, dict) or told.get("error"):
        return None, str(told.get("error") if isinstance(told, dict) else told)
    try:
        return float(told["end"]["sum_received"]["bits_per_second"]) / 1e6, ""
    except (KeyError, TypeError, ValueError):
        return None, "iperf3 tells no rate"


def measure(
    rounds: Sequence[Mapping[str, Any]], address: str, port: int, seconds: float, patience: float
) -> list[dict[str, Any]]:
    """Take part in the rounds that this node has a part in.

    Each round has a port of its own, so that a node that is ahead waits for its peer and disturbs nobody. Each pair has
    to be done by a time that is the same for all nodes: a node whose peer is dead is not late for the next one.

    Args:
        rounds: two for a pair: `number`, `peer` (its name), `address` (the peer's), `sends` (whether this node does).
        address: this node's, on which it listens; on all of its own where it has it not itself.
        port: of round 0.
        seconds: that one measurement takes.
        patience: seconds by which nodes may begin apart, and that a pair may take beyond its measurements.

    Returns: for each round in which this node sends, `peer`, `mbit` and `problem`.
    """
    begun = time.monotonic()
    found = []
    for one in rounds:
        deadline = begun + (one["number"] // 2 + 1) * (2 * seconds + patience) + patience
        if one["sends"]:
            mbit, problem = _send(one["address"], port + one["number"], seconds, deadline)
            found.append({"peer": one["peer"], "mbit": mbit, "problem": problem})
        else:
            _serve(address, port + one["number"], deadline)
    return found


def _send(address: str, port: int, seconds: float, deadline: float) -> tuple[float | None, str]:
    """Send to a peer; it may be busy with the round before. It is tried once at least."""
    command = [
        PROGRAM, "--client", address, "--port", str(port), "--time", f"{seconds:g}", "--parallel", "4",
        "--connect-timeout", "1000", "--json",
    ]  # fmt: skip
    while True:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + 10, check=False
            )
        except subprocess.TimeoutExpired:
            return None, f"iperf3 did not end within {seconds + 10:g} s: the way breaks off under load"
        mbit, problem = parse(done.stdout)
        if mbit is not None or time.monotonic() > deadline:
            return mbit, problem
        time.sleep(PAUSE_SECONDS)


def _serve(address: str, port: int, deadline: float) -> None:
    """Receive once; of a peer that does not come its own answer tells."""
    bound = ["--bind", address] if is_own(address) else []
    command = [PROGRAM, "--server", "--one-off", *bound, "--port", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def there() -> bool:
    """Whether iperf3 is."""
    return shutil.which(PROGRAM) is not None
