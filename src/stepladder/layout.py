"""Choosing how a model is cut into GPUs: the candidates, and the smallest that keeps every rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stepladder.errors import Violation
from stepladder.memory import MemoryBudget
from stepladder.request import Parallel
from stepladder.rules import LAYOUT_RULES, SETTING_RULES, violations
from stepladder.setting import Setting, memory_budget


@dataclass(frozen=True)
class Weighed:
    """A candidate with its memory and the rules that it breaks."""

    parallel: Parallel
    budget: MemoryBudget
    broken: tuple[Violation, ...]


def choose_layout(setting: Setting) -> tuple[Parallel | None, list[Violation], list[Weighed]]:
    """The layout as wished, or for `auto` the smallest that keeps all rules.

    Returns:
        The layout or none; the violations if there is none, with a layout that works where there is one; and for
        `auto` the candidates that were weighed, in the order of preference.
    """
    wished = setting.deployment.parallel
    if isinstance(wished, Parallel):
        broken = violations(setting, wished)
        return (wished, [], []) if not broken else (None, [*broken, _nearest(setting, wished)], [])
    hopeless = [found for rule in SETTING_RULES if (found := rule(setting, Parallel()))]
    if hopeless:
        return None, hopeless, []
    weighed = [weigh(setting, candidate) for candidate in candidates(setting)]
    chosen = next((candidate.parallel for candidate in weighed if not candidate.broken), None)
    return chosen, [] if chosen else list(_closest(weighed).broken), weighed


def weigh(setting: Setting, parallel: Parallel) -> Weighed:
    """A candidate's memory, and the rules about layouts that it breaks."""
    broken = tuple(found for rule in LAYOUT_RULES if (found := rule(setting, parallel)))
    return Weighed(parallel, memory_budget(setting, parallel), broken)


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


def _nearest(setting: Setting, wished: Parallel) -> Violation:
    """What to take instead of a layout that does not work: the nearest in size that does."""
    working = [candidate for candidate in candidates(setting) if not violations(setting, candidate)]
    if not working:
        return Violation("nearest layout", f"instead of {wished}", "No layout of this works on these nodes.")
    nearest = min(working, key=lambda candidate: abs(candidate.world_size - wished.world_size))
    return Violation("nearest layout", f"instead of {wished}", f"{nearest} works here.")


def _closest(weighed: list[Weighed]) -> Weighed:
    """The candidate that comes nearest to working: fewest broken rules, then most GPUs."""
    return min(weighed, key=lambda candidate: (len(candidate.broken), -candidate.parallel.world_size))
