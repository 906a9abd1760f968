"""What is said about the leases of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.durations import duration

MEND = (
    "Wait for it, or ask them. A run that is gone for good loses its lease by itself; to take it away before: "
    "bin/stepladder lease -e lease_break_reason=TEXT"
)


def holder(lease: Mapping[str, Any]) -> str:
    """Who holds a lease, for what, since when, and when it ends by itself."""
    what = " ".join(str(part) for part in (lease["verb"], lease["deployment"], lease["plan_id"]) if part)
    why = f" ({lease['why']})" if lease["why"] else ""
    return (
        f"{lease['who']} from {lease['origin']}: {what}{why}, since {lease['since']} ({duration(lease['age'])}), "
        f"last heard of {duration(lease['silent'])} ago, free by itself in {duration(lease['expires_in'])}"
    )


def frozen(freeze: Mapping[str, Any]) -> str:
    """Who froze a node, since when and why."""
    return f"frozen by {freeze['who']} from {freeze['origin']} since {freeze['since']}: {freeze['why']}"


def refusal(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, str]:
    """Why the leases of all nodes were not to be had, and the exit status for it; an empty text where they were.

    Args:
        variables: of every host; `lease_taken` as the role `lease` keeps it.
        hosts: the nodes of the play.
    """
    told = {host: variables[host].get("lease_taken") or {} for host in hosts}
    cold = {host: answer["frozen"] for host, answer in told.items() if answer.get("frozen") and not answer.get("taken")}
    held = {host: answer["holder"] for host, answer in told.items() if answer.get("holder") and not answer.get("taken")}
    stale = [host for host, answer in told.items() if answer.get("stale")]
    asked = [host for host, answer in told.items() if not (answer.get("taken") or answer.get("not_asked"))]
    silent = [host for host in asked if host not in {*cold, *held, *stale}]
    if not (cold or held or silent or stale):
        return {"text": "", "exit_status": ""}
    lines = ["This run may not change the nodes, and changed nothing:", *_reasons(cold, held)]
    lines += [f"  {host}: another run changed it since it was looked at; run the same again" for host in stale]
    lines += [f"  {host}: did not answer" for host in silent]
    lines += _cures(cold, held)
    return {"text": "\n".join(lines), "exit_status": "frozen" if cold else "held" if held or stale else "unreachable"}


def in_the_way(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, str]:
    """Why gateway and watchdog are not to be touched, and the exit status for it; an empty text where they may be.

    Args:
        variables: of every host; `lease_seen` as the role `lease` keeps it. This run's own lease is in nobody's way,
            and where it has one it began before the nodes were frozen, and goes on.
        hosts: the nodes of the play.
    """
    seen = {host: variables[host]["lease_seen"] for host in hosts}
    began = any(told.get("mine") for told in seen.values())
    cold = {host: told["frozen"] for host, told in seen.items() if told["frozen"] and not began}
    others = {host: told["holder"] or {} for host, told in seen.items() if not told.get("mine")}
    held = {host: lease for host, lease in others.items() if lease.get("state") == "held"}
    if not (cold or held):
        return {"text": "", "exit_status": ""}
    head = "Every node is as planned. Gateway and watchdog were left as they are; run the same again later:"
    return {
        "text": "\n".join([head, *_reasons(cold, held), *_cures(cold, held)]),
        "exit_status": "frozen" if cold else "held",
    }


def at_work(variables: Mapping[str, Any], hosts: Sequence[str], deployment: str) -> str:
    """Whose run changes a deployment just now; empty where none does, as far as the nodes answered.

    Args:
        variables: of every host; `lease_seen` as the role `lease` keeps it.
        hosts: the nodes that were asked.
        deployment: its name.
    """
    held = [(variables[host].get("lease_seen") or {}).get("holder") or {} for host in hosts]
    live = [lease for lease in held if lease.get("state") == "held" and lease["deployment"] == deployment]
    return holder(live[0]) if live else ""


def _reasons(cold: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    lines = [f"  {host}: {frozen(answer)}" for host, answer in cold.items()]
    return lines + [f"  {host}: held by {holder(answer)}" for host, answer in held.items()]


def _cures(cold: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    unfreeze = "To end a freeze: bin/stepladder unfreeze -e freeze_reason=TEXT"
    return [*([unfreeze] if cold else []), *([MEND] if held else [])]


def lost(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """What a run is told that lost the lease of a node; empty where it holds all.

    Args:
        variables: of every host; `lease_held` as the role `lease` keeps it.
        hosts: the nodes of the play.
    """
    found = {host: (variables[host].get("lease_held") or {}).get("lost") for host in hosts}
    lines = [f"  {host}: {why}" for host, why in found.items() if why]
    head = "This run lost its lease and ends here, with the nodes as they are now ('status' shows them):"
    return "\n".join([head, *lines]) if lines else ""


def text(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """A line for each node: whose lease it is."""
    lines = []
    for host in hosts:
        seen = variables[host].get("lease_seen") or {}
        if seen.get("unreachable") or "holder" not in seen:
            lines.append(f"{host}: did not answer")
            continue
        parts = [frozen(seen["frozen"])] if seen.get("frozen") else []
        if seen["holder"]:
            expired = "expired, was " if seen["holder"]["state"] == "expired" else ""
            parts.append(f"{expired}held by {holder(seen['holder'])}")
        lines.append(f"{host}: {'; '.join(parts) or 'free'}")
    return "\n".join(lines)


def broken(answer: Mapping[str, Any]) -> str:
    """Whose lease was broken, or would be: a check changes nothing."""
    lease = answer.get("holder")
    if not lease:
        return "nobody holds a lease here, nothing was broken."
    if lease.get("unreadable"):
        return "a lease that could not be read was removed."
    if not answer["changed"]:
        return f"would break the lease of {holder(lease)}."
    return f"broke the lease of {holder(lease)}. That run stops before it starts or replaces anything more."
