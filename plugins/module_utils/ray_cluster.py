"""Which of the planned nodes have joined a Ray cluster with their GPUs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Asked of Ray itself: an open port says that something listens, not that it has joined this cluster.
PROGRAM = """
import json, sys
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps([
    {"address": node["NodeManagerAddress"], "alive": node["Alive"], "gpus": node["Resources"].get("GPU", 0)}
    for node in ray.nodes()
]))
"""
ASK_TIMEOUT = 60.0
ASK_EVERY = 2.0


class AskError(Exception):
    """Ray gave no answer; the text is its own last words."""


def missing(found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, str]], gpus: float) -> list[str]:
    """What each planned node lacks, a sentence each; empty when the cluster is complete.

    Args:
        found: nodes as Ray tells them: address, alive, gpus.
        wanted: planned nodes: node (its name), address.
        gpus: that each node has to bring.
    """
    alive = {node["address"]: node for node in found if node["alive"]}
    gone = {node["address"] for node in found} - alive.keys()
    faults = []
    for node in wanted:
        title = f"{node['node']} ({node['address']})"
        if node["address"] not in alive:
            faults.append(f"{title} {'has left the cluster' if node['address'] in gone else 'has not joined'}")
        elif alive[node["address"]]["gpus"] < gpus:
            faults.append(f"{title} brings {alive[node['address']]['gpus']:g} of {gpus:g} GPUs")
    return faults


def ask(python: str, address: str, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The cluster's nodes.

    Raises:
        AskError: where Ray does not answer.
    """
    try:
        done = subprocess.run(
            [python, "-c", PROGRAM, address],
            capture_output=True,
            text=True,
            env=dict(environment),
            timeout=ASK_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AskError(f"Ray at {address} did not answer within {ASK_TIMEOUT:.0f} s") from error
    except OSError as error:
        raise AskError(f"{python}: {error.strerror}") from error
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        raise AskError(f"Ray at {address}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    nodes: list[dict[str, Any]] = json.loads(lines[-1])
    return nodes


def wait(
    look: Callable[[], list[dict[str, Any]]],
    wanted: Sequence[Mapping[str, str]],
    gpus: float,
    deadline: float,
    progress: Callable[[str], bool],
) -> list[str]:
    """Look again and again until nothing is missing; what is missing at the deadline otherwise. deadline: seconds."""
    end = time.monotonic() + deadline
    while True:
        try:
            faults = missing(look(), wanted, gpus)
        except AskError as error:
            faults = [str(error)]
        if not faults or time.monotonic() >= end:
            return faults
        progress(f"waiting for the cluster: {'; '.join(faults)}")
        time.sleep(ASK_EVERY)
