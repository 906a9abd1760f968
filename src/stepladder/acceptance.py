"""Which links and nodes are slow, and all that an acceptance found, as one report."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict

from stepladder.all_reduce import Outcome
from stepladder.bisection import MOST_ROUNDS, Blame, Group
from stepladder.fitness import table
from stepladder.gpu_acceptance import Figure, Row, figures, summary

# A sound link gets its line rate less headers, and what others of its kind get; they differ by a few percent.
SLOW_SHARE = 0.6
# iperf3 before 3.16 moves all its streams on one core, which may hold no more; a faster line asks no more of it.
IPERF_MOST_GBIT = 10.0
LAST_PORT = 65535
LINE = "acceptance_line"
CORNER = "from / to"
PROBLEM_WIDTH = 120
MEND_NODE = "look at its cable, its port at the switch, its NIC's speed and PCIe lanes"
MEND_LINK = "look at what lies between the two: switches, their uplinks, routes"
MEND_TOGETHER = "look at the switches between them, and at uplinks that all of them share"
BRING_TORCH = "deploy an engine into an environment, or give acceptance_python or acceptance_image, with torch"


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


def line_rates(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, float]:
    """Line rate of each node whose driver tells one, in Gbit/s."""
    told = {host: (variables[host].get(LINE) or {}).get("line_gbit") for host in hosts}
    return {host: float(gbit) for host, gbit in told.items() if gbit}


def unmet(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """Which nodes no peer could meet, all of them; empty where there is none.

    Args:
        variables: of every host, `acceptance_line` among them.
        hosts: that are measured.
    """
    told = {host: variables[host].get(LINE) or {} for host in hosts}
    found = [f"{host}: {one['problem']}" for host, one in told.items() if one.get("problem")]
    by_address: dict[str, list[str]] = {}
    for host, one in told.items():
        if one.get("address"):
            by_address.setdefault(str(one["address"]), []).append(host)
    found += [
        f"{', '.join(names)}: all would be met at {address}. Set deployment_address of each to its own."
        for address, names in by_address.items()
        if len(names) > 1
    ]
    return "\n".join(found)


def wish_problems(hosts: Sequence[str], known: Iterable[str], wishes: Mapping[str, float]) -> str:
    """What of the wishes nothing could be measured by, or held against; all of it, empty for none.

    Args:
        hosts: that are to be measured. known: those of the inventory.
        wishes: by name without `acceptance_`: `minimum_gbit` and `all_reduce_gbit`, `seconds` and
            `all_reduce_seconds`, `port` and `rendezvous_port`.
    """
    strange = [host for host in hosts if host not in set(known)]
    told = [f"acceptance_hosts: {', '.join(strange)} is no host of the inventory"] if strange else []
    for name in ("minimum_gbit", "all_reduce_gbit"):
        if not 0 <= wishes[name] < math.inf:
            told.append(f"acceptance_{name} is {wishes[name]:g}, and a rate is 0 (none is given) or more")
    for name in ("seconds", "all_reduce_seconds"):
        if not 0 < wishes[name] < math.inf:
            told.append(f"acceptance_{name} is {wishes[name]:g}, and has to be more than 0")
    for name, count in (("port", max(1, 2 * len(pairings(hosts)))), ("rendezvous_port", MOST_ROUNDS)):
        first = int(wishes[name])
        if not 1 <= first <= first + count - 1 <= LAST_PORT:
            told.append(
                f"acceptance_{name} is {first}, and {count} ports from there on have to lie in 1 to {LAST_PORT}"
            )
    return "\n".join(told)


def immeasurable(variables: Mapping[str, Any], hosts: Sequence[str], minimum_gbit: float) -> str:
    """Why the links of these nodes could not be judged; empty where they can.

    Args:
        variables: of every host, `acceptance_line` among them.
        hosts: that are measured.
        minimum_gbit: acceptance_minimum_gbit.
    """
    if len(hosts) != 2 or minimum_gbit or line_rates(variables, hosts):
        return ""
    return (
        f"No driver tells the line rate of {' and '.join(hosts)}, and of two nodes neither is the measure for the "
        "other. Give the rate that their link has to have (-e acceptance_minimum_gbit=GBIT), or leave it out "
        """(-e '{"acceptance_without": ["network"]}')."""
    )


def wanted(minimum_mbit: float, lines: Iterable[float], middle: float) -> tuple[float, str]:
    """Mbit/s that a link has to have, and where the figure is from: the stricter one of line rate and peers.

    Args:
        minimum_mbit: that was given; 0 for none.
        lines: Gbit/s that drivers tell. The middle one counts: a port that came up too slow is a fault, no measure.
        middle: Mbit/s that the middle one of the nodes reaches at its best.
    """
    if minimum_mbit:
        return minimum_mbit, "acceptance_minimum_gbit"
    of_peers = f"{SLOW_SHARE:.0%} of {rate(middle)}, the middle one of what the nodes reach"
    known = list(lines)
    if not known:
        return SLOW_SHARE * middle, f"{of_peers}; no driver tells a line rate"
    line = statistics.median_low(known)
    share = min(SLOW_SHARE * line, IPERF_MOST_GBIT) * 1000
    if SLOW_SHARE * middle > share:
        return SLOW_SHARE * middle, of_peers
    if SLOW_SHARE * line > IPERF_MOST_GBIT:
        return share, f"what iperf3 moves on one core; the line rate is {line:g} Gbit/s"
    return share, f"{SLOW_SHARE:.0%} of the line rate, {line:g} Gbit/s"


def judge(
    results: Mapping[str, Sequence[Mapping[str, Any]] | None],
    minimum_mbit: float,
    lines: Mapping[str, float] = MappingProxyType({}),
) -> Verdict:
    """Find what is slow: against a figure that was given, else the line rate and what nodes reach at their best.

    The middle one of all links is no measure: one slow node of three makes four of six links slow. Of the best link of
    each node the middle one is sound as long as most nodes are.
    A node is named when all its links are slow in one direction or the other: its own wire, not those of all its peers.

    Args:
        results: by node, `links` as `stepladder.core.link_speed` returned them; none where it did not answer.
        minimum_mbit: that each link has to have; 0 for none.
        lines: Gbit/s of the nodes whose drivers tell their line rate.
    """
    links = [Link(source=node, to=one["peer"], mbit=one["mbit"], problem=one["problem"])
             for node, found in results.items() for one in found or ()]  # fmt: skip
    best = {
        name: max((link.mbit or 0 for link in links if name in {link.source, link.to}), default=0) for name in results
    }
    middle = statistics.median([value for name, value in best.items() if results[name] is not None] or [0.0])
    needed, why = wanted(minimum_mbit, lines.values(), middle)
    silent = tuple(node for node, found in results.items() if found is None)
    slow = [link for link in links if (link.mbit or 0) < needed and link.to not in silent]
    answering = [name for name in results if name not in silent]
    nodes: list[str] = []
    # A way on which nothing passes is another matter than a slow one: the two together blame no node.
    for group in ([one for one in slow if one.mbit is None], [one for one in slow if one.mbit is not None]):
        while worst := _worst([one for one in group if not {one.source, one.to} & {*nodes}], answering, nodes):
            nodes.append(worst)
    slow = [link for link in slow if not {link.source, link.to} & {*nodes}]
    return Verdict(
        links=tuple(links), wanted=needed, why=why, slow_nodes=tuple(nodes), slow_links=tuple(slow), silent=silent
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


class Report(BaseModel):
    """All that was measured, and what is wrong.

    Args:
        level: quick or full.
        network: of the links; none where they were not measured.
        figures: of the GPUs.
        all_reduce: of those between nodes; none where there were none.
        rows: everything that is slow, broken or was not measured.
        silent: nodes that did not answer.
    """

    model_config = ConfigDict(frozen=True)

    level: str
    network: Verdict | None = None
    figures: tuple[Figure, ...] = ()
    all_reduce: Outcome | None = None
    rows: tuple[Row, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def bad(self) -> list[Row]:
        """What keeps the nodes from being accepted: at level `full` what was not measured, too."""
        kinds = {"slow", "broken", *(["unmeasured"] if self.level == "full" else [])}
        return [row for row in self.rows if row.severity in kinds]

    @property
    def accepted(self) -> bool:
        """Whether all answered, and nothing is bad."""
        return not (self.bad or self.silent)


def report(
    *,
    level: str,
    network: Verdict | None,
    gpus: Mapping[str, Mapping[str, Any]],
    gpu_rows: Sequence[Row],
    all_reduce: Outcome | None,
    silent: Sequence[str],
) -> Report:
    """Put together what the parts found.

    Args:
        level: quick or full.
        network: of the links.
        gpus: by node, what `stepladder.core.gpu_speed` returned.
        gpu_rows: what `gpu_acceptance.judge` makes of it.
        all_reduce: of those between nodes.
        silent: nodes that did not answer.
    """
    rows = [*_network_rows(network), *gpu_rows, *_all_reduce_rows(all_reduce)]
    return Report(
        level=level,
        network=network,
        figures=tuple(figures(gpus)),
        all_reduce=all_reduce,
        rows=tuple(rows),
        silent=tuple(silent),
    )


def _network_rows(verdict: Verdict | None) -> Iterator[Row]:
    if verdict is None:
        return
    needed = rate(verdict.wanted)
    for name in verdict.slow_nodes:
        own = [link.mbit for link in verdict.links if name in {link.source, link.to} and link.mbit is not None]
        found = f"slow with each of its peers, {rate(min(own, default=None))} at worst"
        yield Row(node=name, part="network", found=found, needed=needed, mend=MEND_NODE)
    for link in verdict.slow_links:
        problem = f" ({link.problem})" if link.problem else ""
        found = f"{rate(link.mbit)}{problem}"
        yield Row(node=link.source, part=f"network to {link.to}", found=found, needed=needed, mend=MEND_LINK)


def _all_reduce_rows(outcome: Outcome | None) -> Iterator[Row]:
    if outcome is None:
        return
    for node, problem in outcome.lacking.items():
        yield Row(node=node, part="between nodes", found=problem, mend=BRING_TORCH, severity="unmeasured")
    needed = rate(outcome.wanted * 1000)
    told = {frozenset(group.names): group for group in outcome.groups}
    for node in outcome.blame.nodes:
        own = [group for group in outcome.groups if len(group.names) == 2 and node in group.names]
        best = max(own, key=lambda group: group.gbit or 0)
        found = f"{_reached(best)} at best, with any of {len(own)} peers"
        yield Row(node=node, part="all-reduce between nodes", found=found, needed=needed, mend=MEND_NODE)
    for one, other in outcome.blame.links:
        found = _reached(told[frozenset((one, other))])
        yield Row(node=one, part=f"all-reduce with {other}", found=found, needed=needed, mend=MEND_LINK)
    for names in outcome.blame.together:
        found = f"{_reached(told[frozenset(names)])} together, no smaller group that was measured is slow"
        yield Row(node=", ".join(names), part="all-reduce", found=found, needed=needed, mend=MEND_TOGETHER)
    if not outcome.finished:
        found = f"more is slow than {len(outcome.groups)} groups could tell"
        yield Row(node="all", part="all-reduce", found=found, mend="mend what is named, and measure again")


def _reached(group: Group) -> str:
    problem = textwrap.shorten(group.problem, PROBLEM_WIDTH, placeholder=" ...")
    return rate(None if group.gbit is None else group.gbit * 1000) + (f" ({problem})" if problem else "")


def text(found: Report, form: str) -> str:
    """The report for people or programs."""
    if form == "json":
        network = found.network.model_dump() if found.network else {}
        document = {
            "format_version": 1,
            "accepted": found.accepted,
            "level": found.level,
            **network,
            "silent": list(found.silent),
            "figures": [one.model_dump() for one in found.figures],
            "all_reduce": found.all_reduce.model_dump() if found.all_reduce else None,
            "findings": [row.model_dump() for row in found.rows],
        }
        return json.dumps(document, indent=1, sort_keys=True)
    parts = [_matrix(found.network) if found.network else "", "\n".join(summary(found.figures))]
    parts += [_rounds(found.all_reduce) if found.all_reduce else "", _findings(found.rows)]
    return "\n\n".join([*filter(None, parts), "\n".join(sentences(found))])


def _matrix(verdict: Verdict) -> str:
    names = list(dict.fromkeys(link.source for link in verdict.links))
    width = max([len(CORNER), *map(len, names)])
    cells = {(link.source, link.to): rate(link.mbit) for link in verdict.links}
    column = max([len(value) for value in cells.values()] + [len(name) for name in names], default=0)
    lines = ["  ".join([f"{CORNER:<{width}}", *(f"{name:>{column}}" for name in names)])] if names else []
    for name in names:
        row = (cells.get((name, other), "-") for other in names)
        lines.append("  ".join([f"{name:<{width}}", *(f"{value:>{column}}" for value in row)]))
    return "\n".join(lines)


def _rounds(outcome: Outcome) -> str:
    cells = [(f"all-reduce ({outcome.backend})", "reached")]
    cells += [(", ".join(group.names), _reached(group)) for group in outcome.groups]
    return table(cells) if outcome.groups else ""


def _findings(rows: Sequence[Row]) -> str:
    """What is wrong, a row for each; under those that share it, what to look at."""
    if not rows:
        return ""
    cells = [("", "NODE", "WHAT", "NEEDED", "FOUND")]
    cells += [(row.severity.upper(), row.node, row.part, row.needed, row.found) for row in rows]
    heading, *lines = table(cells).splitlines()
    told = [heading]
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        told.append(line)
        last = number + 1 == len(rows) or rows[number + 1].mend != row.mend
        if row.mend and last:
            told.append(f"      {row.mend}")
    return "\n".join(told)


def sentences(found: Report) -> list[str]:
    """The verdict: how much is bad, who did not answer, what was held against what."""
    told = []
    if found.bad:
        kinds = [row.severity for row in found.bad]
        counts = [f"{kinds.count(kind)} {kind}" for kind in ("slow", "broken", "unmeasured") if kind in kinds]
        nodes = ", ".join(dict.fromkeys(row.node for row in found.bad))
        told.append(f"Not accepted: {', '.join(counts)} ({nodes}).")
    if found.silent:
        told.append(f"No answer: {', '.join(found.silent)}.")
    if found.network:
        sound = not found.network.slow_nodes and not found.network.slow_links
        words = "Every link has {} or more ({})." if sound else "A link has to have {} ({})."
        told.append(words.format(rate(found.network.wanted), found.network.why))
    if found.all_reduce and found.all_reduce.groups:
        sound = found.all_reduce.blame == Blame()
        words = "The all-reduce has {} or more ({})." if sound else "The all-reduce has to have {} ({})."
        told.append(words.format(rate(found.all_reduce.wanted * 1000), found.all_reduce.why))
    if not found.figures and all(not row.part.startswith("GPU") for row in found.rows):
        told.append("No GPU was measured.")
    return told
