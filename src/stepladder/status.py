"""What runs where, from the state that each node reports: one row per process, and one verdict for all."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from stepladder import signatures
from stepladder.durations import duration
from stepladder.lease_text import frozen, holder
from stepladder.rollout import replica_of

HEALTHY = {"ready"}
UNUSED = "unused"
# Of a node that answers and could not be looked at.
UNKNOWN = "unknown"
YOUNG = {"starting", "loading"}
# Of a gateway's host that did not answer.
SILENT: dict[str, Any] = {
    "asked": True, "reachable": False, "problem": "the host did not answer", "servers": [], "left_behind": False,
}  # fmt: skip
NOT_ASKED: dict[str, Any] = {**SILENT, "asked": False, "problem": "it is outside of --limit"}
# Of a gateway on a node that was taken out of the group; it may serve on, with keys that nobody changes any more.
LEFT_BEHIND: dict[str, Any] = {
    "asked": True, "reachable": True, "servers": [], "left_behind": True,
    "problem": "the inventory has none here any more; run the verb 'gateway', which removes it",
}  # fmt: skip


class Around(NamedTuple):
    """By host what stands beside the engines: gateways as `front` tells them, watchdogs as their node does."""

    gateways: Mapping[str, Mapping[str, Any]]
    watchdogs: Mapping[str, Mapping[str, Any]]


class StatusRow(BaseModel):
    """One process as its node reports it; `phase` as `stepladder.core.engine_state` names them.

    `rank` is the node's place among those of the `replica`, 0 where it has no other. `members` are the nodes that the
    deployment has, as far as this one knows.
    """

    model_config = ConfigDict(frozen=True)

    node: str
    process: str = "-"
    replica: int | None = None
    rank: int | None = None
    phase: str
    detail: str
    release: str | None = None
    seconds: float | None = None
    pid: int | None = None
    endpoint: str | None = None
    last_line: str | None = None
    cure: str | None = None
    members: tuple[str, ...] = ()


def rows(
    host: str, deployment: Mapping[str, Any] | None, states: Sequence[Mapping[str, Any]], unreadable: str = ""
) -> list[dict[str, Any]]:
    """The rows of one node.

    Args:
        host: inventory name.
        deployment: the slice that the node's current release keeps, none where nothing was deployed.
        states: `processes` as `stepladder.core.engine_state` returned them.
        unreadable: file of the current release and why it cannot be read; empty where it can, or there is none.
    """
    if unreadable:
        # Never 'absent': what it runs goes on, and beside a replica of others it would be taken for a spare node.
        mend = "run the verb 'deploy', which writes it again"
        return [_empty_row(host, UNKNOWN, f"its release cannot be read, {unreadable}; {mend}")]
    if not deployment:
        return [_empty_row(host, "absent", "nothing is deployed here")]
    urls = {(endpoint["node"], endpoint["replica"]): endpoint["base_url"] for endpoint in deployment["endpoints"]}
    node = deployment.get("node", {})
    members = dict.fromkeys([*(name for name, _ in urls), *(rank["node"] for rank in node.get("ranks", ()))])
    result = []
    for state in states:
        tail, ill = state.get("log_tail") or [], state["phase"] not in HEALTHY
        # What its log tells of may be of an earlier start.
        young = state["phase"] in YOUNG
        replica = replica_of(state["name"])
        row = StatusRow(
            node=host,
            process=state["name"],
            replica=replica,
            rank=node.get("rank", 0),
            phase=state["phase"],
            detail=state["detail"],
            release=deployment["plan_id"],
            seconds=state.get("since"),
            pid=state.get("pid"),
            endpoint=urls.get((host, replica)),
            last_line=tail[-1] if tail and ill else None,
            cure=signatures.cure([*(state.get("first_errors") or []), *tail]) or None if ill and not young else None,
            members=tuple(members),
        )
        result.append(row.model_dump())
    return result


def release(known: Sequence[Mapping[str, Any]], at_work: Mapping[str, Any]) -> dict[str, Any]:
    """What a node tells of its current release and of who is at work on it.

    Args:
        known: the releases that lie on the node.
        at_work: `lease`, `frozen` and `now`, the node's time of day in seconds since 1970.
    """
    current: Mapping[str, Any] = next((kept for kept in known if kept["current"]), {})
    since = current.get("since")
    return {
        "release": current.get("plan_id"),
        "outcome": current.get("outcome"),
        "since": _utc(since) if since else None,
        "seconds": round(max(0.0, at_work["now"] - since), 1) if since else None,
        "before": next((kept["plan_id"] for kept in known if kept["previous"]), None),
        "lease": at_work.get("lease"),
        "frozen": at_work.get("frozen"),
    }


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def report(
    variables: Mapping[str, Any], hosts: Sequence[str], form: str = "human", gateways: Sequence[str] = ()
) -> dict[str, str]:
    """The rows that every host kept in `status_rows`, as one text; a host without them did not answer.

    Args:
        variables: of every host; `status_rows`, `status_release`, `status_watchdog`, `status_gateway` and
            `status_left_gateway`; `status_problem` says why a host that answers could not be looked at.
        hosts: the nodes that were to be looked at.
        form: human or json.
        gateways: the hosts that are to run the gateway; those without `status_gateway` were not asked.

    Returns:
        `text`, and the name of the `exit_status`, empty where all is ready.

    Raises:
        ValueError: for a format that does not exist.
    """
    found: list[Mapping[str, Any]] = []
    for host in hosts:
        kept, problem = variables[host].get("status_rows"), variables[host].get("status_problem")
        if problem:
            found.append(_empty_row(host, UNKNOWN, problem))
        else:
            found += [_empty_row(host, "unreachable", "the node did not answer")] if kept is None else kept
    told = {host: kept for host in hosts if (kept := variables[host].get("status_release"))}
    looked = seen(found)
    live = {run for kept in told.values() if (run := run_at_work(kept["lease"]))}
    fronts = {host: judged(variables[host].get("status_gateway") or NOT_ASKED, live) for host in gateways}
    fronts |= {host: LEFT_BEHIND for host in hosts if variables[host].get("status_left_gateway")}
    watchdogs = {host: kept for host in hosts if (kept := variables[host].get("status_watchdog"))}
    silent = any(row.phase == "unreachable" for row in looked) or any(
        front["asked"] and not front["reachable"] for front in fronts.values()
    )
    well = is_ready(looked) and not any(gateway_faults(front) for front in fronts.values())
    status = "unreachable" if silent else "" if well else "not_ready"
    return {"text": text(found, form, told, Around(fronts, watchdogs)), "exit_status": status}


def text(
    all_rows: Sequence[Mapping[str, Any]],
    form: str = "human",
    told: Mapping[str, Mapping[str, Any]] | None = None,
    around: Around | None = None,
) -> str:
    """All rows as a table, or as JSON with the verdict.

    Args:
        all_rows: of all nodes.
        form: human or json.
        told: by node, what `release` says of it.
        around: gateways and watchdogs.

    Raises:
        ValueError: for a format that does not exist.
    """
    nodes, beside = told or {}, around or Around({}, {})
    found = seen(all_rows)
    if form == "json":
        processes = [row.model_dump(exclude={"members"}) for row in found]
        well = is_ready(found) and not any(gateway_faults(front) for front in beside.gateways.values())
        document = {
            "format_version": 1,
            "ready": well,
            "processes": processes,
            "nodes": nodes,
            "gateways": beside.gateways,
            "watchdogs": beside.watchdogs,
        }
        return json.dumps(document, indent=1, sort_keys=True)
    if form != "human":
        raise ValueError(f"status_format '{form}' is unknown. Choose one of: human, json.")
    header = ("NODE", "PROCESS", "PHASE", "SINCE", "RELEASE", "DETAIL")
    several = {row.replica for row in found if row.rank}
    cells = [header, *(_cells(row, row.replica in several) for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row in found:
        lines += [f"  {row.node} {row.process} last said: {row.last_line}"] if row.last_line else []
        lines += [f"  {row.node} {row.process} is known for: {row.cure}"] if row.cure else []
    lines += _release_lines(nodes)
    lines += [line for host, front in beside.gateways.items() for line in gateway_lines(host, front)]
    lines += [line for host, kept in beside.watchdogs.items() for line in _watchdog_lines(host, kept)]
    lines += sorted({f"Endpoint: {row.endpoint}" for row in found if row.endpoint})
    return "\n".join(lines)


def front(serving: Mapping[str, Any] | None, why: str = "") -> dict[str, Any]:
    """What a gateway's host tells, for `report`.

    Args:
        serving: as `stepladder.core.serving_state` tells it; none where it did not answer.
        why: what the connection said of a host that did not answer.
    """
    if serving is None:
        return {**SILENT, "problem": why or SILENT["problem"]}
    kept = serving.get("gateway") or {"problem": "it was never installed here: run the verb 'gateway'", "servers": []}
    return {"asked": True, "reachable": True, "left_behind": False, **kept}


def run_at_work(lease: Mapping[str, Any] | None) -> str:
    """The run that lives and holds a node's lease, as `deployments` tells it; empty where none does."""
    return str(lease["run"]) if lease and lease["state"] == "held" else ""


def judged(front: Mapping[str, Any], live: Collection[str]) -> dict[str, Any]:
    """A gateway with `left_out` at each replica: taken out by a rollout that did not come to putting it back.

    Args:
        front: as the function of that name gives it.
        live: the runs that are at work on the nodes. Any of them may be the rollout of a mark that names none, which an
            earlier version made.
    """
    servers = [
        {**each, "left_out": bool(each.get("taken_out")) and not _lives(each, live)} for each in front["servers"]
    ]
    return {**front, "servers": servers}


def _lives(server: Mapping[str, Any], live: Collection[str]) -> bool:
    """Whether the rollout that took a replica out is one of the runs that are at work."""
    by = server.get("taken_out_by")
    return by in live if by else bool(live)


def gateway_faults(front: Mapping[str, Any]) -> list[str]:
    """What is wrong with a gateway, `judged`: it does not say, or a replica that nobody drained gets no requests."""
    if not front["asked"]:
        return []
    if front["problem"]:
        return [front["problem"]]
    return [replica_text(each) for each in front["servers"] if each["left_out"] or gets_nothing(each)]


def gets_nothing(server: Mapping[str, Any]) -> bool:
    """Whether a replica gets no requests though nobody drained it."""
    return not server["in_rotation"] and not server["drained"]


def gateway_lines(host: str, front: Mapping[str, Any]) -> list[str]:
    """A gateway for people: a line, and one for each replica."""
    if not front["asked"]:
        return [f"Gateway on {host}: not asked, {front['problem']}"]
    if not front["reachable"]:
        return [f"Gateway on {host}: unreachable, {front['problem']}"]
    if front["problem"]:
        return [f"Gateway on {host}: {'LEFT BEHIND' if front['left_behind'] else 'DOWN'}, {front['problem']}"]
    servers = front["servers"]
    count = sum(each["in_rotation"] for each in servers)
    lines = [f"Gateway on {host}: {count} of {len(servers)} replicas in rotation"]
    if said := front.get("agent_problem"):
        hangs = "a replica that hangs stays in rotation"
        lines.append(f"  WARNING: its agent does not answer ({said}): {hangs}")
    return lines + [f"  {replica_text(each)}" for each in servers]


def _watchdog_lines(host: str, kept: Mapping[str, Any]) -> list[str]:
    if kept["problem"]:
        return [f"Watchdog on {host}: {kept['problem']}"]
    lines = []
    for engine in kept["engines"]:
        ago = f", the last {duration(engine['last_restart_ago'])} ago" if engine["restarts"] else ""
        now = f"; STALLED now: {engine['detail']}" if engine["state"] == "stalled" else ""
        counts = f"{engine['stalls']} stall(s), {engine['restarts']} restart(s){ago}{now}"
        lines.append(f"Watchdog on {host} ({kept['mode']}): {engine['process']}: {counts}")
    return lines


def _release_lines(nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which release runs since when and whether it was proven, and who is at work on which nodes."""
    by_text: dict[str, list[str]] = {}
    for host, told in nodes.items():
        if told["release"]:
            proof = {"proven": "proven", "failed": "NEVER RAN RIGHT"}.get(told["outcome"], "not proven yet")
            before = f", before it {told['before']}" if told["before"] else ""
            by_text.setdefault(f"Release {told['release']}: {proof}{before}", []).append(host)
    since = {host: f"{told['since']} ({duration(told['seconds'])})" for host, told in nodes.items() if told["since"]}
    lines = [f"{line}, current since {since[hosts[0]]} on {', '.join(hosts)}" for line, hosts in by_text.items()]
    at_work: dict[str, list[str]] = {}
    for host, told in nodes.items():
        held = told["lease"]
        if held:
            expired = "expired lease of" if held["state"] == "expired" else "Lease of"
            doing = f"; now at: {held['doing']}" if held["doing"] else ""
            at_work.setdefault(f"{expired} {holder(held)}{doing}", []).append(host)
        if told["frozen"]:
            at_work.setdefault(f"{frozen(told['frozen'])}", []).append(host)
    return [*lines, *(f"{', '.join(hosts)}: {line}" for line, hosts in at_work.items())]


def logs_text(states: Sequence[Mapping[str, Any]], host: str) -> str:
    """The last lines of each process's log, under its name and path."""
    parts = []
    for state in states:
        lines = state.get("log_tail") or ["(nothing was written)"]
        parts.append("\n".join([f"== {host} {state['name']}: {state.get('log') or 'no log'}", *lines]))
    return "\n\n".join(parts)


def replica_text(server: Mapping[str, Any]) -> str:
    """A replica as a gateway sees it, in a few words.

    Args:
        server: as `stepladder.core.serving_state` gives it and `judged` completes it.
    """
    by = server.get("drained_by") or {}
    who = f" by {by['who']} from {by['origin']} since {by['since']}" if by else ""
    left = f"{server['in_flight']} request(s) left"
    if server.get("left_out"):
        word = f"OUT, {left}, taken out by a rollout that ended; run deploy"
    elif server.get("taken_out"):
        word = f"out, {left}, taken out by the rollout that is under way"
    elif server["drained"]:
        word = f"out, drained{who}, {left}"
    elif server["in_rotation"]:
        share = f" at {server['weight']} %" if server["weight"] != 100 else ""
        word = f"in rotation{share}, {server['in_flight']} request(s)"
    else:
        said = "; ".join(part for part in (server["check"], server["agent"]) if part)
        word = f"OUT, {server['status']} ({said})" if said else f"OUT, {server['status']}"
    return f"replica {server['replica']}: {word}"


def is_ready(found: Sequence[StatusRow]) -> bool:
    """Whether there is something and all of it is ready; a node that the deployment has not plays no part."""
    used = [row for row in found if row.phase != UNUSED]
    return bool(used) and all(row.phase in HEALTHY for row in used)


def seen(found: Sequence[Mapping[str, Any]]) -> list[StatusRow]:
    """Rows as `rows` made them on each node, put together."""
    return _without_strangers([StatusRow.model_validate(row) for row in found])


def _without_strangers(found: Sequence[StatusRow]) -> list[StatusRow]:
    """The rows, with nodes told apart that have nothing because the deployment does not need them."""
    members = {member for row in found for member in row.members}
    unused = {"phase": UNUSED, "detail": "the deployment does not need this node"}
    return [
        row.model_copy(update=unused) if members and row.phase == "absent" and row.node not in members else row
        for row in found
    ]


def _empty_row(host: str, phase: str, detail: str) -> dict[str, Any]:
    return StatusRow(node=host, phase=phase, detail=detail).model_dump()


def _cells(row: StatusRow, of_several: bool) -> tuple[str, ...]:
    """Of a row for people; of_several: whether its replica has other nodes."""
    process = f"{row.process} rank {row.rank}" if of_several else row.process
    return (row.node, process, row.phase, duration(row.seconds), row.release or "-", row.detail)
