"""What operators are told about environments, images and caches that nothing needs any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.show import gigabytes


def removable(leftovers: Sequence[Mapping[str, Any]], node: Mapping[str, Any]) -> list[str]:
    """Names of what nothing uses and the inventory's own deployment does not want.

    Args:
        leftovers: as `stepladder.core.leftovers` lists them.
        node: `node` of the plan's slice of this node; empty where there is no plan.
    """
    wanted = {node[part]["path"] for part in ("venv", "tools") if node.get(part)}
    images = [str(name) for name in node.get("images") or ()]
    values = [value for process in node.get("processes") or () for value in process["env"].values()]
    return [
        one["name"]
        for one in leftovers
        if not one["used_by"]
        and one["name"] not in wanted
        and not any(value.startswith(f"{one['name']}/") for value in values)
        and not any(one["shown"].endswith(name.partition("@")[0]) for name in images)
    ]


def prune_text(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """Everything of every node with its size, and what will become of it.

    Args:
        variables: by host; `prune_found` and `prune_doomed` as the role keeps them.
        hosts: nodes concerned.
    """
    lines, freed = [], []
    for host in hosts:
        doomed = variables[host].get("prune_doomed") or []
        for one in variables[host].get("prune_found") or []:
            goes = one["name"] in doomed
            freed += [one["bytes"]] if goes else []
            fate = "will be removed" if goes else f"stays: {', '.join(one['used_by']) or 'wanted by the inventory'}"
            lines.append(f"{host}: {one['shown']} ({gigabytes(one['bytes'])}) {fate}")
    if not lines:
        return "There are no environments, images or caches of the toolkit's on these nodes."
    return "\n".join([*lines, f"{gigabytes(sum(freed))} will be freed." if freed else "Nothing is to be removed."])
