"""What differs between two plans, or between a node's slice of a plan and the release that runs on it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stepladder import drift, rollout

# Hashes and what explains a plan rather than being it.
IGNORED = {"id", "plan_id", "notes", "candidates", "format_version"}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Lines that say what changes, empty where nothing does.

    Commands and environments are compared word by word, everything else by its path.

    Args:
        before: plan document or slice as it was.
        after: as it would be.
    """
    old, new = _flat(before), _flat(after)
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) == new.get(path):
            continue
        if path.endswith(".argv"):
            lines += _command_lines(path, old.get(path), new.get(path))
        elif path not in old:
            lines.append(f"+ {path}: {_text(new[path])}")
        elif path not in new:
            lines.append(f"- {path}: {_text(old[path])}")
        else:
            lines.append(f"~ {path}: {_text(old[path])} -> {_text(new[path])}")
    return lines


def node_text(host: str, before: Mapping[str, Any], after: Mapping[str, Any], reasons: Sequence[str] = ()) -> str:
    """The difference between what runs on a node and what the plan has for it, as a text.

    Args:
        host: inventory name.
        before: the slice of the release that is current, empty where there is none.
        after: the slice of the plan.
        reasons: as `stepladder.core.node_state` gives them for the plan's slice.
    """
    if not before:
        return f"{host}: nothing is deployed yet."
    lines = difference(before, after)
    if not lines and not reasons:
        return f"{host}: nothing changes."
    if not lines:
        return "\n".join([f"{host}: the plan is the same; a deploy puts right:", *(f"  {line}" for line in reasons)])
    beside = [reason for reason in reasons if not _follows(reason)]
    lines = [*lines, *(["beside that a deploy puts right:"] if beside else []), *(f"  {line}" for line in beside)]
    return "\n".join([f"{host}: against {before['plan_id']}, which runs now:", *(f"  {line}" for line in lines)])


def _follows(reason: str) -> bool:
    """Whether it says no more than that the plan is another one."""
    return reason.startswith("release: ") or reason.endswith(": runs another command than wanted")


def order_text(variables: Mapping[str, Any], hosts: Sequence[str], max_unavailable: Any) -> str:
    """In which order a deploy would change replicas; empty where none that answers is changed.

    Args:
        variables: of every host; `deployment_slice` and `release_slice`, what is wanted and what is current;
            `release_seen` says how the node was found.
        hosts: the nodes of the plan.
        max_unavailable: how many replicas that answer may be out at the same time.

    Raises:
        ValueError: `max_unavailable` is no number of replicas.
    """
    changing = drift.work(variables, hosts, hosts)["changing"]
    text = rollout.foretold(variables, hosts, max_unavailable)
    if text or not changing:
        return text
    # The same plan: what was looked at has the names of what is wanted.
    seen = {
        host: {
            **variables[host],
            "release_before": variables[host].get("release_slice"),
            "service_states": (variables[host].get("release_seen") or {}).get("states") or [],
            "release_ready": True,
        }
        for host in hosts
    }
    return str(rollout.rollout(seen, changing, max_unavailable, again=False)["text"])


def _flat(value: object, path: str = "") -> dict[str, Any]:
    """Leaves by path; a command is one leaf, and lists of named things go by their names."""
    if isinstance(value, Mapping):
        result: dict[str, Any] = {}
        for key, item in value.items():
            if key not in IGNORED:
                result |= _flat(item, f"{path}.{key}" if path else str(key))
        return result
    if isinstance(value, list | tuple) and not path.endswith(".argv"):
        result = {}
        for position, item in enumerate(value):
            name = item.get("name", position) if isinstance(item, Mapping) else position
            result |= _flat(item, f"{path}[{name}]")
        return result
    return {path: list(value) if isinstance(value, list | tuple) else value}


def _command_lines(path: str, old: list[str] | None, new: list[str] | None) -> list[str]:
    words = difflib.ndiff(_flags(old or []), _flags(new or []))
    return [f"{word[0]} {path}: {word[2:]}" for word in words if word[0] in "+-"]


def _flags(argv: list[str]) -> list[str]:
    """Words of a command with each flag's values beside it."""
    flags: list[str] = []
    for word in argv:
        if flags and not word.startswith("-"):
            flags[-1] += f" {word}"
        else:
            flags.append(word)
    return flags


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
