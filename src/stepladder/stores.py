"""What operators are told about weights: stores and their users, what is being fetched, code that comes along."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from stepladder.durations import duration
from stepladder.errors import StepladderError
from stepladder.show import gigabytes

CODE_DIGITS = 12
HASH_DIGITS = 16
NO_CODE = "none"
LINE = 110
FRESH_SECONDS = 60
CLOCKS_DIFFER_SECONDS = 5


class CodeError(StepladderError):
    """Code of a model that is not the accepted one."""


def kept_for(nodes: Mapping[str, Mapping[str, Any]], shared: bool = False) -> dict[str, dict[str, str]]:
    """By node and path why each store stays; empty for one that this node is to remove.

    Args:
        nodes: by name, `stores` as `stepladder.core.weights_stores` lists them and `wanted`, the inventory's own path.
        shared: whether all nodes' stores are known to lie on one file system. Stores of one path and one inode are
            taken for the same in any case: that errs on the side of what stays.
    """
    result: dict[str, dict[str, str]] = {}
    for name, node in nodes.items():
        result[name] = {}
        for one in node["stores"]:
            same = [
                other
                for other in nodes
                if other == name or any(_is_same(one, each, shared) for each in nodes[other]["stores"])
            ]
            reasons = [
                user if other == name else f"{user} on {other}"
                for other in same
                for each in nodes[other]["stores"]
                if each["path"] == one["path"]
                for user in each["used_by"]
            ]
            if one["path"] in [nodes[other]["wanted"] for other in same]:
                reasons.append("wanted by the inventory")
            reasons += [f"{same[0]} removes it"] if not reasons and same[0] != name else []
            result[name][one["path"]] = ", ".join(dict.fromkeys(reasons))
    return result


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any], shared: bool) -> bool:
    return bool(one["path"] == other["path"] and (shared or one["inode"] == other["inode"]))


def removable(nodes: Mapping[str, Mapping[str, Any]], name: str, shared: bool = False) -> list[str]:
    """Paths of stores that this node is to remove: nothing uses them, here or on a node that shares them."""
    return [path for path, why in kept_for(nodes, shared)[name].items() if not why]


def prune_text(nodes: Mapping[str, Mapping[str, Any]], shared: bool = False) -> str:
    """Every store of every node with its size, and what will become of it; the arguments are those of `kept_for`."""
    lines, freed = [], []
    kept = kept_for(nodes, shared)
    for name, node in nodes.items():
        for one in node["stores"]:
            why = kept[name][one["path"]]
            freed += [] if why else [one["bytes"]]
            state = "complete" if one["complete"] else "unfinished"
            fate = f"stays: {why}" if why else "will be removed"
            lines.append(f"{name}: {one['path']} ({gigabytes(one['bytes'])}, {state}) {fate}")
    if not lines:
        return "There are no weights on these nodes."
    return "\n".join([*lines, f"{gigabytes(sum(freed))} will be freed." if freed else "Nothing is to be removed."])


def progress_text(host: str, stores: Sequence[Mapping[str, Any]], now: datetime | None = None) -> str:
    """A line for each store that is not complete, and how old what its run told is; empty where all are."""
    moment = now or datetime.now(UTC)
    lines = []
    for one in stores:
        told = one["progress"]
        if one["complete"] and told.get("phase") != "passing-on":
            continue
        age = (moment - datetime.fromisoformat(str(told["at"]))).total_seconds() if told.get("at") else None
        if one["complete"] and (age is None or age > FRESH_SECONDS):
            continue
        text = told.get("text") or "nothing told yet"
        lines.append(f"{host}: weights {one['path']}: {text}{_since(age, told)}")
    return "\n".join(lines)


def _since(age: float | None, told: Mapping[str, Any]) -> str:
    if age is None:
        return ""
    if age < -CLOCKS_DIFFER_SECONDS:
        return f" (told {told['at']} by the node's clock, which is {-age:.0f} s ahead of the one here)"
    return f" ({max(age, 0):.0f} s ago)" if age <= FRESH_SECONDS else f" (last told {told['at']})"


def begun_text(nodes: Sequence[str], deadline: float) -> str:
    """What is said of weights that come while something else is done; empty for no nodes.

    Args:
        nodes: that bring some.
        deadline: seconds after which they are given up.
    """
    if not nodes:
        return ""
    return (
        f"The weights come on {', '.join(nodes)} while the engine is installed. Should this run end meanwhile, they go "
        f"on coming, for {duration(deadline)} at most: nothing starts with them, a rerun takes them up, and 'status' "
        "tells how far they are."
    )


def code_digest(files: Sequence[Mapping[str, str]]) -> str:
    """Twelve hexadecimal digits that stand for a set of Python files: their paths and hashes. Empty for none."""
    lines = sorted(f"{one['sha256']}  {one['path']}" for one in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:CODE_DIGITS] if lines else ""


def code_lines(files: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for each Python file with its hash."""
    return [f"  {one['sha256'][:HASH_DIGITS]}  {one['path']}" for one in sorted(files, key=lambda one: one["path"])]


def code_text(name: str, files: Sequence[Mapping[str, str]], *, trusted: bool) -> str:
    """The Python files of a model with their hashes, for the report; empty for none."""
    use = "which the engine runs" if trusted else "which the engine does not run"
    if not files:
        return ""
    return "\n".join([f"Python code of {name}, {use} (set {code_digest(files)}):", *code_lines(files)])


def code_changes(files: Sequence[Mapping[str, str]], before: Sequence[Mapping[str, str]]) -> list[str]:
    """How a set of Python files differs from another, a line for each file with its old and new hash.

    Args:
        files: `path` and `sha256`, which is git's own hash after `git:` where a hub lists no other.
        before: the same, and `git_blob` where it is known.
    """
    new, old = ({one["path"]: one for one in group} for group in (files, before))
    changes = []
    for path in sorted(new.keys() | old.keys()):
        hashes = {old[path]["sha256"], f"git:{old[path].get('git_blob')}"} if path in old else set()
        if path not in new:
            changes.append(f"  {path}: gone, was {old[path]['sha256'][:HASH_DIGITS]}")
        elif path not in old:
            changes.append(f"  {path}: new, {new[path]['sha256'][:HASH_DIGITS]}")
        elif new[path]["sha256"] not in hashes:
            shown = [one["sha256"][:HASH_DIGITS] for one in (old[path], new[path])]
            changes.append(f"  {path}: {shown[0]} -> {shown[1]}")
    return changes


def code_plan_text(
    name: str,
    files: Sequence[Mapping[str, str]],
    before: Sequence[Mapping[str, str]],
    whose: str,
    unknown: str,
) -> str:
    """What the plan says of the Python code that an engine will run.

    Args:
        name: of the model and revision.
        files: its Python files, as `code_changes` takes them.
        before: those of what runs now.
        whose: in words, whose files `before` are; empty where nothing is known to run.
        unknown: why `files` are not known; empty where they are.
    """
    title = f"\nPython code of {name}, which the engine runs"
    if unknown:
        why = textwrap.wrap(unknown.splitlines()[0], LINE, initial_indent="  ", subsequent_indent="  ")
        return "\n".join([title, "  not known yet: deploy lists it before it fetches anything", *why])
    lines = [title, *([f"  set {code_digest(files)}", *code_lines(files)] if files else ["  none"])]
    changes = code_changes(files, before) if whose else []
    if changes:
        lines += [f"It is not that of {whose}:", *changes]
        lines += [f"deploy refuses it until somebody read it: -e weights_accept_code={code_digest(files) or NO_CODE}"]
    return "\n".join(lines)


def check_code(
    name: str, files: Sequence[Mapping[str, str]], before: Sequence[Mapping[str, str]], accepted: str, whose: str
) -> None:
    """Refuse a model's code that differs from what ran before it.

    Args:
        name: of the model and revision.
        files: its Python files, as `code_changes` takes them.
        before: those that it is held against.
        accepted: digest of the set that somebody has read and accepted.
        whose: in words, whose files `before` are; empty where there are none to hold it against.

    Raises:
        CodeError: it differs, and nobody has accepted it.
    """
    changes = code_changes(files, before) if whose else []
    digest = code_digest(files) or NO_CODE
    if changes and digest != accepted:
        raise CodeError(
            f"The Python code of {name}, which the engine runs, is not that of {whose}:\n"
            + "\n".join(changes)
            + f"\nRead it, and accept this set with -e weights_accept_code={digest}."
        )
