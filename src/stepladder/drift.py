"""What differs on the nodes from what is wanted, and so which of them a run has to change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

REASONS_SHOWN = 6
MOST_GIVERS = 4  # that together fill the link of a node that takes; the others serve on undisturbed


def work(
    variables: Mapping[str, Any], planned: Sequence[str], known: Sequence[str], force: bool = False
) -> dict[str, Any]:
    """Which nodes change, which are left, and why.

    Args:
        variables: of every host; `release_seen` as the role `release` keeps it, of those that were asked, and
            `deployment_slice` of planned ones.
        planned: nodes that the plan uses.
        known: nodes that the inventory has for engines.
        force: whether nodes change that are as wanted.

    Returns:
        `changing` nodes, all ranks of a replica or none; `giving` ones that are as wanted and give their weights to
        those that lack them; `dropped` ones that run a release and have no part in the plan; `lines` that say why.
    """
    hosts = [*planned, *(host for host in known if host not in planned and variables[host].get("release_seen"))]
    seen = {host: variables[host].get("release_seen") or {} for host in hosts}
    differing = [host for host in planned if force or seen.get(host, {}).get("reasons")]
    changing: set[str] = set()
    for host in differing:
        ranks = variables[host]["deployment_slice"]["node"].get("ranks") or ()
        changing.update((host, *(rank["node"] for rank in ranks)))
    dropped = {host: seen[host]["current"] for host in hosts if host not in planned and seen[host].get("current")}
    lines = [_reasons_line(host, seen[host]["reasons"]) for host in differing if seen[host].get("current")]
    lines += [
        f"{host}: runs release {name} and has no part in the plan: will be stopped" for host, name in dropped.items()
    ]
    lines += [
        f"{host}: did not answer, and has no part in the plan; what an earlier release may run there stays"
        for host in hosts
        if host not in planned and "current" not in seen[host]
    ]
    lines += strangers(seen, known)
    return {
        "changing": [host for host in planned if host in changing],
        "giving": givers({host: bool(seen[host].get("weights_complete")) for host in planned}, changing),
        "dropped": [*dropped],
        "lines": lines,
    }


def givers(complete: Mapping[str, bool], changing: Collection[str]) -> list[str]:
    """Nodes that do not change and give their weights to those that lack them; none where nobody lacks any.

    Args:
        complete: by planned node whether its weights are as wanted.
        changing: nodes that change; those of them that lack nothing give, too.
    """
    if all(complete[host] for host in changing):
        return []
    enough = MOST_GIVERS - sum(complete[host] for host in changing)
    return [host for host, whole in complete.items() if whole and host not in changing][: max(0, enough)]


def strangers(seen: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[str]:
    """Nodes that a release names and the inventory does not: nobody looks after them any more."""
    lines = []
    for name in sorted({member for told in seen.values() for member in told.get("members", ())} - {*known}):
        release = next(told["current"] for told in seen.values() if name in told.get("members", ()))
        lines.append(
            f"{name}: has a part in release {release} and is not in the group 'engines' any more: its processes may "
            "still run there. Put it back into the group and deploy, or stop them by hand."
        )
    return lines


def report(variables: Mapping[str, Any], hosts: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """What differs from the release on each node as a text, and whether anything does as far as they answered.

    Args:
        variables: of every host; `release_seen` as the role `release` keeps it.
        hosts: nodes that were to be looked at.
        known: nodes that the inventory has for engines.
    """
    lines, differs = [], False
    seen = {host: variables[host].get("release_seen") or {} for host in hosts}
    for host, told in seen.items():
        reasons = told.get("reasons")
        if reasons is None:
            lines.append(f"{host}: did not answer")
        elif not told["current"]:
            lines.append(f"{host}: nothing is deployed")
        else:
            lines.append(_reasons_line(host, reasons, 100) if reasons else f"{host}: equals release {told['current']}")
        differs = differs or bool(reasons)
    unknown = strangers(seen, known)
    return {"text": "\n".join([*lines, *unknown]), "differs": differs or bool(unknown)}


def _reasons_line(host: str, reasons: Sequence[str], most: int = REASONS_SHOWN) -> str:
    shown = [*reasons[:most], *([f"and {len(reasons) - most} more"] if len(reasons) > most else [])]
    return "\n".join([f"{host}: {shown[0] if shown else 'by force'}", *(f"  {line}" for line in shown[1:])])
