"""Which node brings which file of a model, where several nodes need it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

SMALL_BYTES = 16_000_000
BUNDLES_A_NODE = 8


def shares(sizes: Mapping[str, int], have: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Divide files among the nodes that lack them, so that each brings about the same number of bytes.

    Args:
        sizes: every file with its bytes.
        have: by node, in the order of the inventory, what it holds already, proven.

    A file that some of these nodes hold already is brought by nobody. Small files go in bundles: one run of the hub's
    client fetches many.
    """
    held = {path for paths in have.values() for path in paths}
    needy = [node for node, paths in have.items() if not set(sizes) <= set(paths)]
    load = dict.fromkeys(needy, 0)
    result: dict[str, list[str]] = {node: [] for node in needy}
    if not needy:
        return result
    givers_have = {path for node, paths in have.items() if node not in needy for path in paths}
    open_files = sorted(
        (path for path in sizes if path not in held or path in givers_have), key=lambda path: (-sizes[path], path)
    )
    small = sorted(path for path in open_files if sizes[path] < SMALL_BYTES)
    most = max(SMALL_BYTES, sum(sizes[path] for path in open_files) // (BUNDLES_A_NODE * len(needy)))
    large = [[path] for path in open_files if sizes[path] >= SMALL_BYTES]
    for group in [*large, *bundles(small, sizes, most)]:
        node = min(needy, key=lambda name: (load[name], needy.index(name)))
        result[node] += group
        load[node] += sum(sizes[path] for path in group)
    return {node: sorted(paths) for node, paths in result.items()}


def bundles(paths: Sequence[str], sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Small files together, up to so many bytes."""
    result: list[list[str]] = []
    filled = most + 1
    for path in paths:
        if filled + sizes[path] > most:
            result.append([])
            filled = 0
        result[-1].append(path)
        filled += sizes[path]
    return result


def exchanges(nodes: Mapping[str, Mapping[str, Any]], port: int, above: int = 0) -> dict[str, dict[str, Any]]:
    """Who exchanges what with whom: nodes that need the same revision, and those that hold it already.

    Args:
        nodes: by name in the order of the inventory: `address`, `model_id`, `revision`, `complete`, and for those that
            are not complete `wanted` (path and size of every file); `have` where there is something.
        port: of the exchange on every node.
        above: bytes that nodes lack in all for which an exchange is worth its seconds.

    Returns: by node what `stepladder.core.model_weights` takes as `spread`; empty for a node that is better alone.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, node in nodes.items():
        patterns = json.dumps([node.get("include", []), node.get("exclude", [])])
        key: tuple[str, ...] = (node["model_id"], node["revision"], patterns)
        groups.setdefault(key, []).append(name)
    result: dict[str, dict[str, Any]] = {name: {} for name in nodes}
    for key, names in groups.items():
        needy = [name for name in names if not nodes[name]["complete"]]
        addresses = [nodes[name]["address"] for name in names]
        loopback = any(address.startswith("127.") or address == "localhost" for address in addresses)
        if not needy or len(names) < 2 or loopback or len(set(addresses)) < len(addresses):
            continue
        sizes = {one["path"]: int(one["size"]) for one in nodes[needy[0]]["wanted"]}
        have = {name: list(sizes) if nodes[name]["complete"] else nodes[name].get("have", []) for name in names}
        if sum(sizes[path] for name in needy for path in sizes.keys() - set(have[name])) < above:
            continue
        divided = shares(sizes, have)
        run = hashlib.sha256("\n".join([*key, *sorted(sizes)]).encode()).hexdigest()[:16]
        for name in names:
            result[name] = {
                "run": run,
                "name": name,
                "address": nodes[name]["address"],
                "port": port,
                "peers": {other: nodes[other]["address"] for other in names if other != name},
                "shares": divided,
                "givers": [other for other in names if nodes[other]["complete"]],
                "held": {other: sorted(have[other]) for other in needy if have[other]},
            }
    return result
