"""What the gate of a deploy measures of a release, and what it makes of it; see docs/on-call.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.request import Parallel

REFUSE = "refuse"


def endpoints(kept: Mapping[str, Any], host: str) -> list[dict[str, Any]]:
    """The endpoints that a node answers on, with what has to be equal for their speed to be compared.

    Args:
        kept: the node's slice of the plan.
        host: the node's inventory name.

    Returns:
        `replica`, `base_url` and `terms`. The engine and its version are no terms: to compare those is the purpose.
    """
    chosen, node = kept["deployment"], kept["node"]
    nodes = max(1, len(node.get("ranks") or ()))
    terms = {
        "the model": f"{chosen['model']} {chosen['variant']}",
        "the hardware": f"{nodes} x {node['gpus']} {node['gpu']}",
        "the layout": f"{chosen['topology']} {Parallel.model_validate(chosen['parallel'])}",
    }
    return [
        {"replica": each["replica"], "base_url": each["base_url"], "terms": terms}
        for each in kept["endpoints"]
        if each["node"] == host
    ]


def by_release(variables: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """What there is to ask of what is deployed: each replica as the release of its own node promises.

    Args:
        variables: of every host; `release_slice` as the role `release` keeps it, empty or absent where nothing is.
        hosts: the nodes that were looked at.

    Returns:
        `slices`, one a release, with the endpoints that are to be asked; `told`: which nodes have which where they do
        not agree, and what is not asked then; empty where they do.
    """
    kept = {host: found for host in hosts if (found := variables[host].get("release_slice"))}
    having: dict[str, list[str]] = {}
    for host, found in kept.items():
        having.setdefault(found["plan_id"], []).append(host)
    first = {name: kept[found[0]] for name, found in having.items()}
    if len(first) == 1:
        return {"slices": [*first.values()], "told": ""}
    slices = [
        {**found, "endpoints": [each for each in found["endpoints"] if each["node"] in having[name]]}
        for name, found in first.items()
    ]
    elsewhere = {
        f"replica {each['replica']} on {each['node']}": None
        for found in first.values()
        for each in found["endpoints"]
        if each["node"] not in kept
    }
    where = "; ".join(f"{', '.join(found)} has {name}" for name, found in having.items())
    lines = [f"The nodes do not agree on the release: {where}. 'deploy' makes them equal; 'lease' says who is at work."]
    if elsewhere:
        lines.append(f"Not asked, for it is not known of which release it is: {', '.join(elsewhere)}.")
    return {"slices": [found for found in slices if found["endpoints"]], "told": "\n".join(lines)}


def speeds(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is to be kept with the release, by the number of the replica.

    Args:
        results: of `stepladder.core.speed`, one for each of `endpoints`.
    """
    # A release that is slower than itself runs on a machine that changed; what it was stays the measure.
    return {
        str(each["item"]["replica"]): dict(each["speed"])
        for each in results
        if each.get("speed") and not (each["verdict"] == "slower" and each["proven_before"])
    }


def verdict(results: Sequence[Mapping[str, Any]], gate: str) -> bool | str:
    """True where nothing is against the release, else why it is given up.

    Args:
        results: of `stepladder.core.speed`, one for each of `endpoints`.
        gate: refuse gives up a release that is slower than the one before; every other word lets it pass.
    """
    lines = []
    for each in results:
        if each["verdict"] == "broke":
            lines.append(f"{each['item']['base_url']}: {each['text']}")
        elif each["verdict"] == "slower" and gate == REFUSE and not each["proven_before"]:
            lines.append(f"{each['item']['base_url']} is slower than release {each['compared_with']}: {each['text']}")
    if not lines:
        return True
    told = any(each["verdict"] == "slower" for each in results)
    return "\n".join([*lines, *(["To deploy it all the same: -e deploy_speed_gate=tell"] if told else [])])


def told(results: Sequence[Mapping[str, Any]]) -> str:
    """What the release that was brought back gives, and whether that clears the one that was slower."""
    lines = []
    for each in results:
        if each["verdict"] == "slower" and each["proven_before"]:
            lines.append(f"{each['line']}: slower than when it was proven too, so look at the machine first")
        elif each.get("line"):
            lines.append(str(each["line"]))
    return "\n".join(lines)


def told_of_all(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """What was measured on some nodes; empty where nothing was.

    Args:
        variables: of every host; `release_told` is what `told` gave there.
        hosts: the nodes.
    """
    return "\n".join(f"{host}: {text}" for host in hosts if (text := variables[host].get("release_told")))
