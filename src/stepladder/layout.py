"""Choosing how a model is cut into GPUs: the candidates, and the smallest that keeps every rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import log2

from stepladder.errors import Violation
from stepladder.memory import MemoryBudget
from stepladder.request import Parallel
from stepladder.rules import LAYOUT_RULES, SETTING_RULES
from stepladder.setting import Setting, memory_budget

# Nodes for each replica that are tried where those of the inventory are too few.
MORE_NODES = (1, 2, 3, 4, 8, 16)
MOST_NODES = 4096


@dataclass(frozen=True)
class Weighed:
    """A candidate with its memory and the rules that it breaks."""

    parallel: Parallel
    budget: MemoryBudget
    broken: tuple[Violation, ...]


def choose_layout(setting: Setting) -> tuple[Parallel | None, list[Violation], list[Weighed]]:
    """The layout as wished, or for `auto` the smallest that keeps all rules.

    Returns:
        The layout or none; the violations if there is none, with a layout that works, or with what none works on; and
        for `auto` the candidates that were weighed, in the order of preference.
    """
    wished = setting.deployment.parallel
    hopeless = [found for rule in SETTING_RULES if (found := rule(setting, Parallel()))]
    if isinstance(wished, Parallel):
        broken = layout_violations(setting, wished)
        if not broken:
            return (None, hopeless, []) if hopeless else (wished, [], [])
        return None, [*hopeless, *broken, _instead(setting, wished, hopeless)], []
    if hopeless:
        return None, hopeless, []
    weighed: list[Weighed] = []
    chosen: Parallel | None = None
    for candidate in candidates(setting):
        if chosen and candidate.world_size > chosen.world_size:
            break
        weighed.append(weigh(setting, candidate))
        chosen = chosen or (None if weighed[-1].broken else candidate)
    if chosen:
        return chosen, [], weighed
    return None, [*_closest(weighed).broken, _none_works(setting, "auto")], weighed


def layout_violations(setting: Setting, parallel: Parallel) -> list[Violation]:
    """The rules about layouts that one breaks."""
    return [found for rule in LAYOUT_RULES if (found := rule(setting, parallel))]


def works(setting: Setting, parallel: Parallel) -> bool:
    """Whether a layout keeps all rules about layouts."""
    return not any(rule(setting, parallel) for rule in LAYOUT_RULES)


def weigh(setting: Setting, parallel: Parallel) -> Weighed:
    """A candidate's memory, and the rules about layouts that it breaks."""
    return Weighed(parallel, memory_budget(setting, parallel), tuple(layout_violations(setting, parallel)))


def candidates(setting: Setting) -> Iterator[Parallel]:
    """Layouts worth weighing, best first.

    Fewest GPUs first; for as many GPUs tensor parallel ranks alone (lowest latency), then with whole experts, and over
    several nodes last pipeline stages and data parallel ranks, which need less of the network between them.
    """
    total, size = setting.nodes * setting.gpus_per_node, setting.gpus_per_node
    if setting.engine.name == "transformers":
        yield from (Parallel(pipeline=count) for count in range(1, size + 1))
        return
    for world in sorted({*_powers_of_two(total), *(nodes * size for nodes in range(1, setting.nodes + 1))}):
        if world > size and world % size:
            continue
        yield Parallel(tensor=world)
        if setting.model.shape.moe and world > 1:
            yield Parallel(tensor=world, expert=True)
        if world > size:
            nodes = world // size
            yield Parallel(tensor=size, pipeline=nodes)
            yield Parallel(tensor=size, data=nodes)
            yield Parallel(tensor=size, data=nodes, expert=True)


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _instead(setting: Setting, wished: Parallel, hopeless: list[Violation]) -> Violation:
    """What to take instead of a layout that does not work: the one that is most like it and does."""
    for candidate in sorted(_like(setting, wished), key=lambda candidate: _unlikeness(candidate, wished)):
        if works(setting, candidate):
            condition = ", once the above is mended" if hopeless else ""
            return Violation("nearest layout", f"instead of {wished}", f"{candidate} works here{condition}.")
    return _none_works(setting, str(wished))


def _like(setting: Setting, wished: Parallel) -> set[Parallel]:
    """Every way to cut a model into powers of two, into what was wished and into the number of nodes."""
    total = setting.nodes * setting.gpus_per_node
    powers = _powers_of_two(total)
    sizes = [sorted({*powers, setting.nodes, min(own, total)}) for own in (wished.tensor, wished.pipeline, wished.data)]
    found = set(candidates(setting))
    for tensor, pipeline, data in product(*sizes):
        if tensor * pipeline * data <= total:
            for expert in (False, True):
                found.add(Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=expert))
    return found


def _unlikeness(candidate: Parallel, wished: Parallel) -> tuple[float, ...]:
    """How far a layout is from a wished one: kinds of ranks that it adds or lacks, then GPUs, ranks, experts."""
    pairs = [(getattr(candidate, kind), getattr(wished, kind)) for kind in ("data", "pipeline", "tensor")]
    kinds = sum((mine > 1) != (theirs > 1) for mine, theirs in pairs[:2])
    ranks = sum(abs(log2(mine / theirs)) for mine, theirs in pairs)
    gpus = abs(log2(candidate.world_size / wished.world_size))
    return (kinds, gpus, ranks, candidate.expert != wished.expert, *(mine for mine, _ in pairs))


def _none_works(setting: Setting, wished: str) -> Violation:
    """That no layout works here, and on how many nodes of the kind one would."""
    counts = [setting.deployment.replicas * nodes for nodes in MORE_NODES]
    for count in (count for count in counts if setting.nodes < count <= MOST_NODES):
        larger = replace(setting, nodes=count)
        for candidate in candidates(larger):
            if works(larger, candidate):
                here = f"No layout works on {setting.nodes} x {setting.gpus_per_node} GPUs"
                return Violation(
                    "nearest layout", f"instead of {wished}", f"{here}; on {count} nodes {candidate} does."
                )
    mend = f"No layout works on nodes of {setting.gpus_per_node} x {setting.gpu.title}, however many were tried."
    return Violation("nearest layout", f"instead of {wished}", mend)


def _closest(weighed: list[Weighed]) -> Weighed:
    """The candidate that comes nearest to working: fewest broken rules, least memory lacking, fewest GPUs."""

    def distance(candidate: Weighed) -> tuple[int, int, int]:
        return len(candidate.broken), max(0, -(candidate.budget.margin or 0)), candidate.parallel.world_size

    return min(weighed, key=distance)
