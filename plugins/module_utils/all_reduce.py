"""A node's part in an all-reduce between nodes: our program on torch, a process for each GPU or one on the CPU.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import machine, peer_network, torch_runs

# A message that keeps the links busy, and on a link of 100 Mbit/s takes some seconds.
MEBIBYTES = {"gloo": 32, "nccl": 1024}
# NCCL builds its rings first, gloo connects only.
PATIENCE_SECONDS = {"gloo": 30, "nccl": 120}
START_SECONDS = 60


def line(address: str, backend: str, system: Path = Path("/sys")) -> dict[str, Any]:
    """The interface that carries the node's address, and the line rate that an all-reduce has.

    Args:
        address: of this node.
        backend: nccl takes all RDMA ports that are up, gloo the interface.
        system: of sysfs.

    Returns: interface (empty where no interface has the address) and gbit (None where no driver tells).
    """
    own = next((one for one in peer_network.interfaces() if one["address"] == address), None)
    rate = own["speed_mbit"] / 1000 if own and own["speed_mbit"] and _is_hardware(own["name"], system) else None
    ports = [
        port.rate_gbit
        for port in machine.rdma_ports(system / "class" / "infiniband")
        if port.state == "ACTIVE" and port.rate_gbit
    ]
    if backend == "nccl" and ports:
        rate = float(sum(ports))
    return {"interface": own["name"] if own else "", "gbit": rate}


def _is_hardware(interface: str, system: Path) -> bool:
    """Whether there is a NIC below, as below bonds and VLANs: a veth tells 10 Gbit/s that nothing holds it to."""
    folder = system / "class" / "net" / interface
    return (folder / "device").exists() or any(folder.glob("lower_*"))


def measure(given: Mapping[str, Any], run: Sequence[str]) -> dict[str, Any]:
    """Take part; all processes of a node end by the same deadline.

    Args:
        given: the module's parameters.
        run: what our program is run with.

    Returns: gbit and problem.
    """
    group, backend, here = given["group"], given["backend"], given["processes"]
    tasks = [
        {
            "mode": "all_reduce", "backend": backend, "rank": group["rank"] * here + number,
            "world": len(group["names"]) * here, "address": group["address"], "port": group["port"],
            "device": number, "mebibytes": MEBIBYTES[backend], "seconds": given["seconds"],
            "patience": PATIENCE_SECONDS[backend],
        }
        for number in range(here)
    ]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(here) as pool:
        deadline = limit(backend, given["seconds"])
        answers = list(pool.map(lambda task: torch_runs.answer(run, given["program"], task, deadline), tasks))
    problems = [f"process {number}: {one['problem']}" for number, one in enumerate(answers) if one["problem"]]
    if problems:
        return {"gbit": None, "problem": "; ".join(dict.fromkeys(problems))}
    return {"gbit": answers[0]["gbit"], "problem": ""}


def limit(backend: str, seconds: float) -> float:
    """Seconds after which a process is ended: the ranks wait for each other, then for the first silent operation."""
    return 2 * PATIENCE_SECONDS[backend] + START_SECONDS + 3 * seconds


def environment(interface: str, given: Mapping[str, str]) -> dict[str, str]:
    """Variables for NCCL and gloo: the interface of the node's address, unless others are given."""
    own = {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}
    return {**own, **given}


def set_environment(interface: str, given: Mapping[str, str]) -> None:
    """Set them for the processes that are started from here."""
    os.environ.update(environment(interface, given))
