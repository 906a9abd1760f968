"""What operators are told about weights: stores and their users, what is being fetched, code that comes along."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from stepladder.errors import StepladderError
from stepladder.show import gigabytes

CODE_DIGITS = 12
FRESH_SECONDS = 60


class CodeError(StepladderError):
    """Code of a model that is not the accepted one."""


def removable(stores: Sequence[Mapping[str, Any]], kept: Sequence[str] = ()) -> list[str]:
    """Paths of stores that nothing uses and that the inventory's own deployment does not name."""
    return [one["path"] for one in stores if not one["used_by"] and one["path"] not in kept]


def prune_text(variables: Mapping[str, Any], hosts: Sequence[str], stores_key: str, remove_key: str) -> str:
    """Every store of every node with its size, and what will become of it.

    Args:
        variables: by host.
        hosts: nodes concerned.
        stores_key: variable with the stores as `stepladder.core.weights_stores` lists them.
        remove_key: variable with the paths to remove.
    """
    lines, freed = [], 0
    for host in hosts:
        doomed = variables[host].get(remove_key) or []
        for one in variables[host].get(stores_key) or []:
            goes = one["path"] in doomed
            freed += one["bytes"] if goes else 0
            state = "complete" if one["complete"] else "unfinished"
            why = ", ".join(one["used_by"]) or "wanted by the inventory"
            fate = "will be removed" if goes else f"stays: {why}"
            lines.append(f"{host}: {one['path']} ({gigabytes(one['bytes'])}, {state}) {fate}")
    if not lines:
        return "There are no weights on these nodes."
    return "\n".join([*lines, f"{gigabytes(freed)} will be freed." if freed else "Nothing is to be removed."])


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
        since = "" if age is None else f" ({age:.0f} s ago)" if age <= FRESH_SECONDS else f" (last told {told['at']})"
        lines.append(f"{host}: weights {one['path']}: {text}{since}")
    return "\n".join(lines)


def code_digest(files: Sequence[Mapping[str, str]]) -> str:
    """Twelve hexadecimal digits that stand for a set of Python files: their paths and hashes. Empty for none."""
    lines = sorted(f"{one['sha256']}  {one['path']}" for one in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:CODE_DIGITS] if lines else ""


def code_text(name: str, files: Sequence[Mapping[str, str]], *, trusted: bool) -> str:
    """The Python files of a model with their hashes, for the report; empty for none."""
    use = "which the engine runs" if trusted else "which the engine does not run"
    if not files:
        return ""
    lines = [f"  {one['sha256'][:16]}  {one['path']}" for one in sorted(files, key=lambda one: one["path"])]
    return "\n".join([f"Python code of {name}, {use} (set {code_digest(files)}):", *lines])


def check_code(
    name: str, files: Sequence[Mapping[str, str]], before: Sequence[Mapping[str, str]], accepted: str
) -> list[str]:
    """Say how a model's code differs from that of the revision before it.

    Args:
        name: of the model and revision.
        files: its Python files, `path` and `sha256`.
        before: those of the revision that the node had; empty where it had none.
        accepted: digest of the set that somebody has read and accepted.

    Raises:
        CodeError: it differs, and nobody has accepted it.
    """
    new, old = ({one["path"]: one["sha256"] for one in group} for group in (files, before))
    changes = [f"  {path}: new, {new[path][:16]}" for path in sorted(new.keys() - old.keys())]
    changes += [f"  {path}: gone" for path in sorted(old.keys() - new.keys())]
    changes += [
        f"  {path}: {old[path][:16]} -> {new[path][:16]}"
        for path in sorted(new)
        if old.get(path, new[path]) != new[path]
    ]
    if before and changes and code_digest(files) != accepted:
        raise CodeError(
            f"The Python code of {name} is not that of the revision before, and the engine runs it:\n"
            + "\n".join(sorted(changes))
            + f"\nRead it, and accept this set with -e weights_accept_code={code_digest(files) or 'none'}."
        )
    return sorted(changes) if before else []
