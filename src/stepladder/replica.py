"""Whether the ranks of a replica over several nodes belong together: one lost rank means a new start for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Ranks are started within seconds of each other; one that is this much younger was started again by itself.
STARTED_TOGETHER_SECONDS = 60.0


def fault(states: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Why all ranks have to be started again; empty where nothing runs yet or all is well.

    Args:
        states: by node in rank order, the processes as `stepladder.core.engine_state` returned them.
    """
    everything = [(node, state) for node, found in states.items() for state in found]
    if not any(state["running"] or state["phase"] == "crash_looping" for _, state in everything):
        return ""
    for node, state in everything:
        if not state["running"]:
            return f"{node} {state['name']} {state['detail']}"
        if state["outdated"]:
            return f"{node} {state['name']} runs another command than planned"
        if state["phase"] == "unhealthy":
            return f"{node} {state['name']}: {state['detail']}"
    return _started_apart(everything, next(iter(states)))


def _started_apart(everything: Sequence[tuple[str, Mapping[str, Any]]], head: str) -> str:
    """A rank that came later than the others waits for a meeting that is over; a ready head has proven otherwise.

    Only ranks of the same name are held against each other: an engine may start later than the Ray that it runs on.
    Ray's workers join whenever they come; only one that is older than the head's Ray has belonged to another cluster.
    """
    if all(state["phase"] == "ready" for _, state in everything):
        return ""
    ages: dict[str, list[tuple[float, str]]] = {}
    for node, state in everything:
        if state["since"] is not None:
            ages.setdefault(state["name"], []).append((state["since"], node))
    for name, found in ages.items():
        (young, late_node), (old, early_node) = min(found), max(found)
        if name.startswith("ray-"):
            young, late_node = next(((age, node) for age, node in found if node == head), (old, head))
        if old - young > STARTED_TOGETHER_SECONDS:
            return f"{name} on {late_node} was started {old - young:.0f} s after {name} on {early_node}"
    return ""


def peer_addresses(variables: Mapping[str, Any], ranks: Sequence[str], host: str, name: str) -> dict[str, list[str]]:
    """The addresses of a node's peers.

    Args:
        variables: of every host.
        ranks: nodes of the replica.
        host: the node that asks.
        name: variable with an answer of `stepladder.core.peer_network`.
    """
    peers = [rank for rank in ranks if rank != host]
    return {peer: [interface["address"] for interface in variables[peer][name]["interfaces"]] for peer in peers}


def seen(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """What each host told of its network; hosts that were not asked are left out."""
    told = {host: variables[host].get("peer_network_seen") for host in hosts}
    return {host: facts for host, facts in told.items() if facts}


def unlike(variables: Mapping[str, Any], ranks: Sequence[str], name: str) -> str:
    """How the nodes of a replica differ in a variable that has to be the same; empty where they agree or none is known.

    Args:
        variables: of every host.
        ranks: the nodes' inventory names.
        name: of the variable.
    """
    values = {rank: str(variables[rank].get(name) or "") for rank in ranks}
    known = {value for value in values.values() if value}
    return ", ".join(f"{rank}: {value or 'unknown'}" for rank, value in values.items()) if len(known) > 1 else ""


def left_out(variables: Mapping[str, Any], host: str, hosts: Sequence[str]) -> list[str]:
    """The nodes of the inventory that are in a replica with a host, and that a run leaves out.

    Args:
        variables: of every host; `release_slice` of the host.
        host: one of the run.
        hosts: the nodes of the run.
    """
    mates = _rank_names(variables[host].get("release_slice"))
    return [name for name in mates if name not in hosts and name in variables]


def parts(variables: Mapping[str, Any], hosts: Sequence[str], deployment: str) -> str:
    """Of which replicas a run has some of the nodes, in a sentence each; empty where it has whole ones.

    Args:
        variables: of every host; `release_slice`, and in `release_left_out` what `stepladder.core.deployments` answered
            for each node that `left_out` named, as a loop keeps it.
        hosts: the nodes of the run.
        deployment: its name.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for host in hosts:
        told = (variables[host].get("release_left_out") or {}).get("results", ())
        # A node that another one took the place of may keep an old release that names its peers.
        away = [one["item"] for one in told if host in _rank_names((one.get("deployments") or {}).get(deployment))]
        if away:
            found[tuple(_rank_names(variables[host]["release_slice"]))] = away
    together = "whose ranks run and stop together"
    return " ".join(
        f"--limit leaves out {', '.join(away)} of the replica on {', '.join(members)}, {together}."
        for members, away in found.items()
    )


def _rank_names(kept: Mapping[str, Any] | None) -> list[str]:
    """The nodes of the replica that a slice is of; none where it has one node alone."""
    return [rank["node"] for rank in (kept or {}).get("node", {}).get("ranks") or ()]


def fault_of(variables: Mapping[str, Any], ranks: Sequence[str]) -> str:
    """`fault` from what every node of a replica kept in `service_states`; a node that kept none is the fault."""
    states = {rank: variables[rank].get("service_states") for rank in ranks}
    unseen = [rank for rank, found in states.items() if found is None]
    if unseen:
        return f"{', '.join(unseen)} could not be looked at"
    return fault({rank: list(found) for rank, found in states.items()})
