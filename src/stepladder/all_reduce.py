"""The rounds of an all-reduce between nodes: who measures with whom next, and what came out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from stepladder.bisection import MOST_ROUNDS, Blame, Group, blame, next_groups

LOOKED, DONE = "acceptance_all_reduce_seen", "acceptance_all_reduce_done"
# Of the line rate: what NCCL reaches on sound links is above 90 %, gloo on fast ones is bound by one CPU core.
LINE_SHARE = {"nccl": 0.6, "gloo": 0.6}
# Of what iperf3 reaches with four streams, where no driver tells a line rate: on a busy lab gloo had 15 % of it.
GLOO_OF_IPERF = 0.1
# One core moves and adds about as much.
GLOO_MOST_GBIT = 6.0


class Outcome(BaseModel):
    """What the all-reduces between nodes say.

    Args:
        backend: nccl or gloo.
        groups: that were measured, in order.
        wanted: Gbit/s that each has to have.
        why: where that figure is from.
        blame: who is slow.
        lacking: by node, why it could not take part; then nothing was measured.
        finished: whether nothing was left to measure.
    """

    model_config = ConfigDict(frozen=True)

    backend: str
    groups: tuple[Group, ...] = ()
    wanted: float = 0.0
    why: str = ""
    blame: Blame = Blame()
    lacking: dict[str, str] = {}
    finished: bool = True


def backend_of(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """What all nodes can do together: GPUs of one vendor and number on each, else the CPU.

    Returns: backend, processes for each node, vendor.
    """
    seen = [variables[host].get("acceptance_gpus") or {} for host in hosts]
    counts = {len(one.get("gpus") or ()) for one in seen}
    vendors = {one.get("vendor") or "" for one in seen}
    if len(counts) == len(vendors) == 1 and min(counts, default=0) > 0:
        return {"backend": "nccl", "processes": counts.pop(), "vendor": vendors.pop()}
    return {"backend": "gloo", "processes": 1, "vendor": ""}


def lacking(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, str]:
    """Why nodes could not take part; those that did not answer at all are told elsewhere."""
    seen = {host: variables[host].get(LOOKED) or {} for host in hosts}
    return {
        host: str(one.get("problem") or one.get("msg") or "it was not asked")
        for host, one in seen.items()
        if not one.get("ready") and not one.get("unreachable")
    }


def taking_part(variables: Mapping[str, Any], hosts: Sequence[str]) -> list[str]:
    """The nodes that can; with one that cannot there is nothing to compare it with, but the others are measured."""
    return [host for host in hosts if (variables[host].get(LOOKED) or {}).get("ready")]


def history(variables: Mapping[str, Any], hosts: Sequence[str]) -> list[Group]:
    """The groups that were measured, from what each node kept of each round."""
    found: dict[tuple[int, tuple[str, ...]], dict[str, Mapping[str, Any]]] = {}
    for host in hosts:
        for number, one in enumerate(variables[host].get(DONE) or ()):
            if one.get("names"):
                found.setdefault((number, tuple(one["names"])), {})[host] = one
    groups = []
    for (_, names), answers in sorted(found.items(), key=lambda item: item[0][0]):
        problems = {host: _problem(answers.get(host)) for host in names}
        told = "; ".join(f"{host}: {problem}" for host, problem in problems.items() if problem)
        gbit = None if told else float(answers[names[0]]["gbit"])
        groups.append(Group(names=names, gbit=gbit, problem=told))
    return groups


def _problem(answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return "it did not answer"
    return str(answer.get("problem") or answer.get("msg") or ("" if answer.get("gbit") else "it tells no rate"))


def wanted(variables: Mapping[str, Any], hosts: Sequence[str], minimum_gbit: float) -> tuple[float, str]:
    """Gbit/s that an all-reduce has to have, and where the figure is from.

    Args:
        variables: of every host.
        hosts: that are measured.
        minimum_gbit: acceptance_all_reduce_gbit; 0 takes a share of the line rate, or where no driver tells one of what
            iperf3 reached on the middle one of the nodes.
    """
    if minimum_gbit:
        return minimum_gbit, "acceptance_all_reduce_gbit"
    backend = backend_of(variables, hosts)["backend"]
    lines = [(variables[host].get(LOOKED) or {}).get("line_gbit") for host in taking_part(variables, hosts)]
    known = [float(one) for one in lines if one]
    if known:
        line = min(known)
        share = LINE_SHARE[backend] * line
        if backend == "gloo" and share > GLOO_MOST_GBIT:
            return GLOO_MOST_GBIT, f"what gloo reaches on one core; the line rate is {line:g} Gbit/s"
        return share, f"{LINE_SHARE[backend]:.0%} of the line rate, {line:g} Gbit/s"
    best = sorted(
        max((one["mbit"] or 0 for one in (variables[host].get("acceptance_links") or {}).get("links") or ()), default=0)
        for host in hosts
    )
    middle = best[len(best) // 2] / 1000 if best else 0.0
    return GLOO_OF_IPERF * middle, f"{GLOO_OF_IPERF:.0%} of {middle:.2f} Gbit/s, what iperf3 reaches between the nodes"


def part_of(
    variables: Mapping[str, Any], hosts: Sequence[str], node: str, port: int, minimum_gbit: float
) -> dict[str, Any]:
    """A node's part in the next round, as `stepladder.core.all_reduce` takes it; empty where it has none.

    Args:
        variables: of every host, `acceptance_at` among them: its address.
        hosts: that are measured.
        node: whose part.
        port: of the first round; each round has the next one.
        minimum_gbit: as of `wanted`.
    """
    done = history(variables, hosts)
    for names in _next(variables, hosts, done, minimum_gbit):
        if node in names:
            number = len(variables[node].get(DONE) or ())
            address = str(variables[names[0]]["acceptance_at"])
            return {"names": list(names), "rank": names.index(node), "address": address, "port": port + number}
    return {}


def is_left(variables: Mapping[str, Any], hosts: Sequence[str], minimum_gbit: float) -> bool:
    """Whether there is another round, within the most that are made."""
    rounds = max((len(variables[host].get(DONE) or ()) for host in hosts), default=0)
    return rounds < MOST_ROUNDS and bool(_next(variables, hosts, history(variables, hosts), minimum_gbit))


def _next(
    variables: Mapping[str, Any], hosts: Sequence[str], done: Sequence[Group], minimum_gbit: float
) -> list[tuple[str, ...]]:
    return next_groups(taking_part(variables, hosts), done, wanted(variables, hosts, minimum_gbit)[0])


def outcome(variables: Mapping[str, Any], hosts: Sequence[str], minimum_gbit: float) -> Outcome:
    """All that came out, after the last round."""
    needed, why = wanted(variables, hosts, minimum_gbit)
    groups = history(variables, hosts)
    return Outcome(
        backend=backend_of(variables, hosts)["backend"],
        groups=tuple(groups),
        wanted=needed,
        why=why,
        blame=blame(groups, needed),
        lacking=lacking(variables, hosts),
        finished=not _next(variables, hosts, groups, minimum_gbit),
    )
