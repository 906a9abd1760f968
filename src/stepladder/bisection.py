"""An all-reduce of many nodes is as fast as its worst node: which groups to measure next until that one is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict

# All, halves down to pairs, the pairs across two sound halves, and the suspects beside sound nodes: 16 nodes end in 13.
MOST_ROUNDS = 24


class Group(BaseModel):
    """Nodes that made an all-reduce together, and its bus bandwidth in Gbit/s; `problem` is why it has none."""

    model_config = ConfigDict(frozen=True)

    names: tuple[str, ...]
    gbit: float | None = None
    problem: str = ""


class Blame(BaseModel):
    """Who is slow.

    Args:
        nodes: slow with each of several peers.
        links: pairs that no such node explains.
        together: groups that are slow though all pairs of them that were measured are not.
    """

    model_config = ConfigDict(frozen=True)

    nodes: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    together: tuple[tuple[str, ...], ...] = ()


def next_groups(names: Sequence[str], done: Iterable[Group], wanted: float) -> list[tuple[str, ...]]:
    """The groups to measure at the same time in the next round: no node is in two; none when all is known.

    First all nodes. Where a group is slow its halves, down to pairs. Where both halves of it are sound, the pairs
    across them. Both nodes of a slow pair then beside nodes of sound groups, which tells a slow node from a slow link.

    Args:
        names: all nodes, in the inventory's order.
        done: what was measured.
        wanted: Gbit/s that a group has to have.
    """
    found = {frozenset(group.names): group for group in done}
    if len(names) < 2 or frozenset(names) not in found:
        return [tuple(names)] if len(names) > 1 else []
    slow = {members for members, group in found.items() if _slow(group, wanted)}
    wishes: list[frozenset[str]] = []
    for members in sorted(slow, key=lambda one: (len(one), sorted(map(list(names).index, one)))):
        wishes += _inside(members, slow, found, names)
    return _apart([one for one in wishes if one not in found], names)


def _inside(
    members: frozenset[str], slow: set[frozenset[str]], found: dict[frozenset[str], Group], names: Sequence[str]
) -> list[frozenset[str]]:
    """What tells more of a slow group."""
    ordered = [name for name in names if name in members]
    if len(ordered) == 2:
        return _beside(members, slow, found, names)
    if len(ordered) == 3:
        return [frozenset(pair) for pair in combinations(ordered, 2)]
    middle = len(ordered) // 2
    halves = [ordered[:middle], ordered[middle:]]
    parts = [frozenset(half) for half in halves]
    if any(part not in found for part in parts):
        return parts
    if any(part in slow for part in parts):
        return []
    return [frozenset((one, other)) for one in halves[0] for other in halves[1]]


def _beside(
    pair: frozenset[str], slow: set[frozenset[str]], found: dict[frozenset[str], Group], names: Sequence[str]
) -> list[frozenset[str]]:
    """Each node of a slow pair beside two others: nodes that are sound with somebody, else any."""
    sound = {name for members in found if members not in slow for name in members}
    others = sorted(
        (name for name in names if name not in pair), key=lambda name: (name not in sound, names.index(name))
    )
    wishes = []
    for name in (one for one in names if one in pair):
        known = [one for one in found if len(one) == 2 and name in one and one != pair]
        wishes += [frozenset((name, other)) for other in others if frozenset((name, other)) not in known][
            : max(0, 2 - len(known))
        ]
    return wishes


def _apart(wishes: Iterable[frozenset[str]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """As many wishes as fit into one round, each node in one group at most."""
    busy: set[str] = set()
    chosen = []
    for wish in wishes:
        if not wish & busy:
            busy |= wish
            chosen.append(tuple(name for name in names if name in wish))
    return chosen


def blame(done: Iterable[Group], wanted: float) -> Blame:
    """Name nodes and links from the pairs; a group that nothing smaller explains is named whole."""
    groups = list(done)
    slow = [group for group in groups if _slow(group, wanted)]
    pairs = [frozenset(group.names) for group in groups if len(group.names) == 2]
    bad = [frozenset(group.names) for group in slow if len(group.names) == 2]
    nodes: list[str] = []
    while worst := _worst([pair for pair in bad if not pair & {*nodes}], pairs, nodes):
        nodes.append(worst)
    links = [group.names for group in slow if len(group.names) == 2 and not {*group.names} & {*nodes}]
    explained = [*({node} for node in nodes), *map(set, links)]
    together: list[tuple[str, ...]] = []
    for group in sorted(slow, key=lambda one: len(one.names)):
        if len(group.names) > 2 and not any(one <= {*group.names} for one in explained):
            together.append(group.names)
            explained.append({*group.names})
    return Blame(nodes=tuple(nodes), links=tuple((one[0], one[1]) for one in links), together=tuple(together))


def _worst(bad: Sequence[frozenset[str]], pairs: Sequence[frozenset[str]], named: Sequence[str]) -> str:
    """The node with the most slow pairs among those of which none is sound; pairs with named nodes do not count."""
    counted: dict[str, int] = {}
    for name in dict.fromkeys(name for pair in bad for name in sorted(pair)):
        own = [pair for pair in pairs if name in pair and not pair & {*named}]
        if len(own) > 1 and all(pair in bad for pair in own):
            counted[name] = len(own)
    return max(counted, key=lambda name: counted[name], default="")


def _slow(group: Group, wanted: float) -> bool:
    return group.gbit is None or group.gbit < wanted
