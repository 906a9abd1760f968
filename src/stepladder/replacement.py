"""Nodes that take the places of others, while all other replicas stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepladder.errors import PlanRefusedError, Violation, unknown_name

VARIABLE = "deployment_replaced"


def in_place(hosts: Sequence[str], replaced: Mapping[str, str]) -> list[str]:
    """The hosts in rank order, each newcomer at the place of the one that it stands for.

    Args:
        hosts: in the inventory's order.
        replaced: by host that is out of service the one that takes its place.
    """
    newcomers = {*replaced.values()}
    return [replaced.get(host, host) for host in hosts if host not in newcomers]


def require(hosts: Sequence[str], replaced: Mapping[str, str]) -> None:
    """Refuse replacements that name a host wrongly or twice.

    Raises:
        PlanRefusedError: with every reason found.
    """
    broken = []
    newcomers = list(replaced.values())
    for old, new in replaced.items():
        if old not in hosts and new in hosts:
            found = f"{old} is no host of the group 'engines' any more"
            mend = f"Put {new} where {old} stood in the inventory, which decides the ranks, and take the line out."
            broken.append(Violation(VARIABLE, found, mend))
        elif old not in hosts:
            broken.append(unknown_name(f"host in {VARIABLE}", old, hosts))
        if new not in hosts:
            broken.append(unknown_name(f"host in {VARIABLE}", str(new), hosts))
        if new in replaced:
            found = f"{new} takes the place of {old}, and is replaced itself"
            broken.append(Violation(VARIABLE, found, f"Say of {old} which host takes its place in the end."))
        if newcomers.count(new) > 1 and old == next(name for name, other in replaced.items() if other == new):
            found = f"{new} takes the places of {', '.join(sorted(o for o, n in replaced.items() if n == new))}"
            broken.append(Violation(VARIABLE, found, "Give each place a host of its own."))
    if broken:
        raise PlanRefusedError(broken)


def with_another(
    hosts: Sequence[str], replaced: Mapping[str, str], used: Sequence[str], old: str, new: str
) -> dict[str, str]:
    """The replacements with one more.

    Args:
        hosts: in the inventory's order.
        replaced: those that the inventory has already.
        used: hosts that the plan without the new one uses.
        old: host whose place is taken.
        new: host that takes it.

    Raises:
        PlanRefusedError: one of the two cannot be used so.
    """
    if replaced.get(old) == new:
        return {**replaced}
    broken = [
        Violation(f"-e {name}", "it is not given", f"Add -e {name}=HOST, {meaning}.")
        for name, host, meaning in (
            ("node", old, "the host that goes out of service"),
            ("by", new, "the one that takes its place"),
        )
        if not host
    ]
    broken += [unknown_name("host", host, hosts) for host in (old, new) if host and host not in hosts]
    if not broken and old not in used:
        found = f"the deployment does not use {old}"
        broken.append(Violation("-e node", found, f"It uses {', '.join(used)}. Name one of these."))
    if not broken and new in used:
        spare = [host for host in hosts if host not in used and host not in replaced]
        mend = f"Name one that is spare: {', '.join(spare)}." if spare else "Add a host to the group 'engines'."
        broken.append(Violation("-e by", f"the deployment uses {new} itself", mend))
    if broken:
        raise PlanRefusedError(broken)
    # A newcomer that goes out of service in turn: its successor takes the place that both stood for.
    first = next((host for host, other in replaced.items() if other == old), old)
    return {**replaced, first: new}
