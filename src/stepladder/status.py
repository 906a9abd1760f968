"""What runs where, from the state that each node reports: one row per process, and one verdict for all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

HEALTHY = {"ready"}
UNUSED = "unused"
SECONDS_PER_UNIT = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


class StatusRow(BaseModel):
    """One process as its node reports it; `phase` as `stepladder.core.engine_state` names them.

    `members` are the nodes that the deployment has, as far as this one knows.
    """

    model_config = ConfigDict(frozen=True)

    node: str
    process: str = "-"
    phase: str
    detail: str
    release: str | None = None
    seconds: float | None = None
    pid: int | None = None
    endpoint: str | None = None
    last_line: str | None = None
    members: tuple[str, ...] = ()


def rows(host: str, deployment: Mapping[str, Any] | None, states: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one node.

    Args:
        host: inventory name.
        deployment: the slice that the node's current release keeps, none where nothing was deployed.
        states: `processes` as `stepladder.core.engine_state` returned them.
    """
    if not deployment:
        return [_empty_row(host, "absent", "nothing is deployed here")]
    urls = {endpoint["node"]: endpoint["base_url"] for endpoint in deployment["endpoints"]}
    result = []
    for state in states:
        tail = state.get("log_tail") or []
        row = StatusRow(
            node=host,
            process=state["name"],
            phase=state["phase"],
            detail=state["detail"],
            release=deployment["plan_id"],
            seconds=state.get("since"),
            pid=state.get("pid"),
            endpoint=urls.get(host),
            last_line=tail[-1] if tail and state["phase"] not in HEALTHY else None,
            members=(*urls, *(rank["node"] for rank in deployment.get("node", {}).get("ranks", ()))),
        )
        result.append(row.model_dump())
    return result


def report(variables: Mapping[str, Any], hosts: Sequence[str], form: str = "human") -> str:
    """The rows that every host kept in `status_rows`, as one text; a host without them did not answer.

    Raises:
        ValueError: for a format that does not exist.
    """
    found: list[Mapping[str, Any]] = []
    for host in hosts:
        kept = variables[host].get("status_rows")
        found += [_empty_row(host, "unreachable", "the node did not answer")] if kept is None else kept
    return text(found, form)


def text(all_rows: Sequence[Mapping[str, Any]], form: str = "human") -> str:
    """All rows as a table, or as JSON with the verdict.

    Raises:
        ValueError: for a format that does not exist.
    """
    found = _without_strangers([StatusRow.model_validate(row) for row in all_rows])
    if form == "json":
        processes = [row.model_dump(exclude={"members"}) for row in found]
        document = {"format_version": 1, "ready": is_ready(found), "processes": processes}
        return json.dumps(document, indent=1, sort_keys=True)
    if form != "human":
        raise ValueError(f"status_format '{form}' is unknown. Choose one of: human, json.")
    header = ("NODE", "PROCESS", "PHASE", "SINCE", "RELEASE", "DETAIL")
    cells = [header, *(_cells(row) for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += [f"  {row.node} {row.process} last said: {row.last_line}" for row in found if row.last_line]
    lines += sorted({f"Endpoint: {row.endpoint}" for row in found if row.endpoint})
    return "\n".join(lines)


def logs_text(states: Sequence[Mapping[str, Any]], host: str) -> str:
    """The last lines of each process's log, under its name and path."""
    parts = []
    for state in states:
        lines = state.get("log_tail") or ["(nothing was written)"]
        parts.append("\n".join([f"== {host} {state['name']}: {state.get('log') or 'no log'}", *lines]))
    return "\n\n".join(parts)


def is_ready(found: Sequence[StatusRow]) -> bool:
    """Whether there is something and all of it is ready; a node that the deployment has not plays no part."""
    used = [row for row in found if row.phase != UNUSED]
    return bool(used) and all(row.phase in HEALTHY for row in used)


def _without_strangers(found: Sequence[StatusRow]) -> list[StatusRow]:
    """The rows, with nodes told apart that have nothing because the deployment does not need them."""
    members = {member for row in found for member in row.members}
    unused = {"phase": UNUSED, "detail": "the deployment does not need this node"}
    return [
        row.model_copy(update=unused) if members and row.phase == "absent" and row.node not in members else row
        for row in found
    ]


def duration(seconds: float | None) -> str:
    """A duration in its two largest units: '3 h 12 min'."""
    if seconds is None:
        return "-"
    parts: list[str] = []
    rest = int(seconds)
    for unit, size in SECONDS_PER_UNIT:
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _empty_row(host: str, phase: str, detail: str) -> dict[str, Any]:
    return StatusRow(node=host, phase=phase, detail=detail).model_dump()


def _cells(row: StatusRow) -> tuple[str, ...]:
    return (row.node, row.process, row.phase, duration(row.seconds), row.release or "-", row.detail)
