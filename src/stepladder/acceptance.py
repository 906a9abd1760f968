"""Who measures whom, and which link or node is slow."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

# A sound link gets what others of its kind get; on a quiet network they differ by a few percent.
SLOW_SHARE = 0.6
CORNER = "from / to"


class Link(BaseModel):
    """What arrived at `to` of what `source` sent, in Mbit/s; `problem` is why nothing did."""

    model_config = ConfigDict(frozen=True)

    source: str
    to: str
    mbit: float | None = None
    problem: str = ""


class Verdict(BaseModel):
    """What is slow, and against what.

    Args:
        links: all that were measured.
        wanted: Mbit/s that a link has to have.
        why: where that figure is from.
        slow_nodes: nodes all of whose links are slow.
        slow_links: slow links that no such node explains.
        silent: nodes that did not answer.
    """

    model_config = ConfigDict(frozen=True)

    links: tuple[Link, ...]
    wanted: float
    why: str
    slow_nodes: tuple[str, ...]
    slow_links: tuple[Link, ...]
    silent: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether all was measured and nothing is slow."""
        return not (self.slow_nodes or self.slow_links or self.silent)


def pairings(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """All pairs, in rounds in which each name stands once: the circle method of tournaments."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def rounds_of(variables: Mapping[str, Any], hosts: Sequence[str], node: str) -> list[dict[str, Any]]:
    """The rounds that a node has a part in, as `stepladder.core.link_speed` takes them: each pair in both directions.

    Args:
        variables: of every host, `acceptance_at` among them: its address.
        hosts: that are measured; those without an address did not answer.
        node: whose rounds.
    """
    known = {host: variables[host].get("acceptance_at") for host in hosts}
    addresses = {host: str(address) for host, address in known.items() if address}
    found = []
    for number, pairs in enumerate(pairings(list(addresses))):
        for pair in pairs:
            if node in pair:
                peer = pair[1] if pair[0] == node else pair[0]
                first = pair[0] == node
                found += [
                    {
                        "number": 2 * number + turn,
                        "peer": peer,
                        "address": addresses[peer],
                        "sends": first != bool(turn),
                    }
                    for turn in (0, 1)
                ]
    return found


def judge(results: Mapping[str, Sequence[Mapping[str, Any]] | None], minimum_mbit: float) -> Verdict:
    """Find what is slow: against a figure that was given, else against what nodes reach at their best.

    The middle one of all links is no measure: one slow node of three makes four of six links slow. Of the best link of
    each node the middle one is sound as long as most nodes are.
    A node is named when all its links are slow in one direction or the other: its own wire, not those of all its peers.

    Args:
        results: by node, `links` as `stepladder.core.link_speed` returned them; none where it did not answer.
        minimum_mbit: that each link has to have; 0 takes 60 % of what the middle one of the nodes reaches.
    """
    links = [Link(source=node, to=one["peer"], mbit=one["mbit"], problem=one["problem"])
             for node, found in results.items() for one in found or ()]  # fmt: skip
    best = {
        name: max((link.mbit or 0 for link in links if name in {link.source, link.to}), default=0) for name in results
    }
    middle = statistics.median([value for name, value in best.items() if results[name] is not None] or [0.0])
    wanted = minimum_mbit or SLOW_SHARE * middle
    why = (
        "acceptance_minimum_gbit"
        if minimum_mbit
        else f"{SLOW_SHARE:.0%} of {rate(middle)}, the middle one of what the nodes reach"
    )
    silent = tuple(node for node, found in results.items() if found is None)
    slow = [link for link in links if (link.mbit or 0) < wanted and link.to not in silent]
    answering = [name for name in results if name not in silent]
    nodes: list[str] = []
    # A way on which nothing passes is another matter than a slow one: the two together blame no node.
    for group in ([one for one in slow if one.mbit is None], [one for one in slow if one.mbit is not None]):
        while worst := _worst([one for one in group if not {one.source, one.to} & {*nodes}], answering, nodes):
            nodes.append(worst)
    slow = [link for link in slow if not {link.source, link.to} & {*nodes}]
    return Verdict(
        links=tuple(links), wanted=wanted, why=why, slow_nodes=tuple(nodes), slow_links=tuple(slow), silent=silent
    )


def _worst(slow: Sequence[Link], names: Sequence[str], found: Sequence[str]) -> str:
    """The node with the most slow links, if all to its peers are; of two nodes neither can be told from the other."""
    others = {name: [peer for peer in names if peer not in (name, *found)] for name in names if name not in found}
    peers = {name: {link.source if link.to == name else link.to for link in slow if name in {link.source, link.to}}
             for name in others}  # fmt: skip
    whole = [name for name, left in others.items() if len(left) > 1 and set(left) <= peers[name]]
    return max(whole, key=lambda name: (len(peers[name]), _share(slow, name)), default="")


def _share(slow: Sequence[Link], name: str) -> int:
    return sum(name in {link.source, link.to} for link in slow)


def rate(mbit: float | None) -> str:
    """For people: 9.41 Gbit/s."""
    if mbit is None:
        return "nothing"
    return f"{mbit / 1000:.2f} Gbit/s" if mbit >= 1000 else f"{mbit:.0f} Mbit/s"


def text(verdict: Verdict, form: str) -> str:
    """The verdict for people or programs."""
    if form == "json":
        document = {"format_version": 1, "accepted": verdict.accepted, **verdict.model_dump()}
        return json.dumps(document, indent=1, sort_keys=True)
    names = list(dict.fromkeys(link.source for link in verdict.links))
    width = max([len(CORNER), *map(len, names)])
    cells = {(link.source, link.to): rate(link.mbit) for link in verdict.links}
    column = max([len(value) for value in cells.values()] + [len(name) for name in names], default=0)
    lines = ["  ".join([f"{CORNER:<{width}}", *(f"{name:>{column}}" for name in names)])] if names else []
    for name in names:
        row = (cells.get((name, other), "-") for other in names)
        lines.append("  ".join([f"{name:<{width}}", *(f"{value:>{column}}" for value in row)]))
    return "\n".join([*lines, "", *sentences(verdict)])


def sentences(verdict: Verdict) -> list[str]:
    """What is slow, each in a sentence."""
    told = []
    for name in verdict.slow_nodes:
        own = [link.mbit for link in verdict.links if name in {link.source, link.to} and link.mbit is not None]
        told.append(
            f"{name} is slow: {rate(max(own, default=None))} at best, with any of its peers. Look at its cable, its "
            "port at the switch, its NIC's speed and PCIe lanes."
        )
    for link in verdict.slow_links:
        problem = f" ({link.problem})" if link.problem else ""
        told.append(
            f"{link.source} to {link.to} is slow: {rate(link.mbit)}{problem}, {rate(verdict.wanted)} are needed."
        )
    told += [f"{name} did not answer." for name in verdict.silent]
    if not told:
        told.append(f"Every link has {rate(verdict.wanted)} or more ({verdict.why}).")
    return told
