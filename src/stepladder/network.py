"""Which address and interface each node of a replica meets the others with: the one that all of them reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stepladder.errors import PlanRefusedError, Violation
from stepladder.request import Node

Interface = Mapping[str, Any]


class Seen(NamedTuple):
    """What a node told: its interfaces, and by peer and address the interface over which that one answered.

    Both as `stepladder.core.peer_network` returns them.
    """

    interfaces: Sequence[Interface]
    reached: Mapping[str, Mapping[str, str | None]]


def settle(nodes: Sequence[Node], seen: Mapping[str, Seen]) -> list[Node]:
    """The nodes of one replica with the address and interface that they meet over, and why.

    What the inventory declares narrows the choice. Of the networks that join all nodes the fastest is taken, of equally
    fast ones that of the declared addresses.

    Args:
        nodes: of one replica, in rank order.
        seen: what each told, by name.

    Raises:
        PlanRefusedError: naming every declared interface that is not there, and every node that a peer does not reach.
    """
    broken: list[Violation] = []
    offered = {node.name: _offered(node, seen[node.name], broken) for node in nodes}
    if broken:
        raise PlanRefusedError(broken)
    usable = {node.name: [i for i in offered[node.name] if _reached_by_all(node, i, nodes, seen)] for node in nodes}
    for node in nodes:
        if not usable[node.name]:
            broken.append(_unreached(node, offered[node.name], nodes, seen))
    if broken:
        raise PlanRefusedError(broken)
    network, reason = _common_network(nodes, usable)
    return [_settled(node, usable[node.name], network, reason) for node in nodes]


def _offered(node: Node, seen: Seen, broken: list[Violation]) -> list[Interface]:
    found = list(seen.interfaces)
    for variable, key, wished in (
        ("deployment_interface", "name", node.interface),
        ("deployment_address", "address", node.address if node.address_declared else None),
    ):
        if wished is None:
            continue
        if not any(interface[key] == wished for interface in found):
            there = ", ".join(f"{interface['name']} {interface['address']}" for interface in seen.interfaces) or "none"
            broken.append(
                Violation(
                    f"{variable} of {node.name}", f"{wished}; its interfaces: {there}", "Correct it, or unset it."
                )
            )
            return []
        found = [interface for interface in found if interface[key] == wished]
    return found


def _reached_by_all(node: Node, interface: Interface, nodes: Sequence[Node], seen: Mapping[str, Seen]) -> bool:
    return all(
        seen[peer.name].reached.get(node.name, {}).get(interface["address"]) for peer in nodes if peer.name != node.name
    )


def _unreached(node: Node, offered: Sequence[Interface], nodes: Sequence[Node], seen: Mapping[str, Seen]) -> Violation:
    tried = ", ".join(f"{interface['address']} ({interface['name']})" for interface in offered) or "no address"
    deaf = [
        peer.name
        for peer in nodes
        if peer.name != node.name and not any(seen[peer.name].reached.get(node.name, {}).values())
    ]
    askers = ", ".join(deaf) or "all other nodes at once"
    return Violation(
        f"network between {node.name} and its peers",
        f"{tried} is not reached from {askers}",
        "Mend the network or its firewall, or set deployment_address and deployment_interface of the node.",
    )


def _common_network(nodes: Sequence[Node], usable: Mapping[str, Sequence[Interface]]) -> tuple[str | None, str]:
    shared = set.intersection(*({interface["network"] for interface in usable[node.name]} for node in nodes))
    if not shared:
        return None, "no network joins all nodes; its peers reach it there"

    def speed(network: str) -> int:
        return min(_speed_in(usable[node.name], network) for node in nodes)

    def declared(network: str) -> int:
        return sum(
            any(i["address"] == node.address and i["network"] == network for i in usable[node.name]) for node in nodes
        )

    best = max(sorted(shared), key=lambda network: (speed(network), declared(network)))
    others = [network for network in shared if network != best]
    if not others:
        return best, f"{best} is the only network that joins all nodes"
    if any(speed(network) < speed(best) for network in others):
        return best, f"{best} is the fastest network that joins all nodes ({speed(best)} Mbit/s)"
    return best, f"{best} joins all nodes and has the inventory's addresses"


def _speed_in(interfaces: Sequence[Interface], network: str) -> int:
    return max(interface["speed_mbit"] or 0 for interface in interfaces if interface["network"] == network)


def _settled(node: Node, usable: Sequence[Interface], network: str | None, reason: str) -> Node:
    inside = [interface for interface in usable if network in (None, interface["network"])]
    chosen = max(inside, key=lambda interface: (interface["address"] == node.address, interface["speed_mbit"] or 0))
    if node.interface or node.address_declared:
        reason = "set in the inventory"
    return node.model_copy(
        update={
            "address": chosen["address"],
            "interface": chosen["name"],
            "interface_reason": reason,
            "client_address": node.client_address or node.address,
        }
    )
