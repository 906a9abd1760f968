"""The variables in every role's README, generated from its argument specification.

`python -m stepladder.role_docs` writes them; what stands outside the markers is written by hand and stays.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[2] / "roles"
BEGIN = "<!-- generated from meta/argument_specs.yml by python -m stepladder.role_docs -->"
BAR = "\\|"  # a bar within a cell of a table, also within code
END = "<!-- end of what is generated -->"


def readme(role: str, specification: Mapping[str, Any], before: str) -> str:
    """A role's README with the generated part renewed.

    Args:
        role: its name.
        specification: content of its `meta/argument_specs.yml`.
        before: the README as it is, empty for none.
    """
    generated = "\n".join([BEGIN, "", *_entry_points(specification["argument_specs"]), END])
    if BEGIN in before and END in before:
        head, _, rest = before.partition(BEGIN)
        return head + generated + rest.partition(END)[2]
    return f"# {role}\n\n{before.strip()}\n\n{generated}\n" if before.strip() else f"# {role}\n\n{generated}\n"


def write_all(roles: Path = ROLES) -> list[Path]:
    """Renew every README; returns those that were out of date."""
    renewed = []
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        target = path.parents[1] / "README.md"
        before = target.read_text() if target.exists() else ""
        after = readme(path.parents[1].name, yaml.safe_load(path.read_text()), before)
        if after != before:
            target.write_text(after)
            renewed.append(target)
    return renewed


def _entry_points(entries: Mapping[str, Any]) -> list[str]:
    lines = [*_description(entries["main"]), ""]
    if entries["main"].get("options"):
        lines += ["| variable | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, option) for name, option in entries["main"]["options"].items()]
        lines.append("")
    others = {name: entry for name, entry in entries.items() if name != "main"}
    if others:
        lines += ["Other entry points (`tasks_from`):", ""]
        lines += [f"- `{name}`: {' '.join(_description(entry))}" for name, entry in others.items()]
        lines.append("")
    return lines


def _description(entry: Mapping[str, Any]) -> list[str]:
    text = entry["description"]
    parts = text if isinstance(text, list) else [text]
    return [_plain(f"{entry['short_description']}. {' '.join(parts)}")]


def _row(name: str, option: Mapping[str, Any]) -> str:
    kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
    if "choices" in option:
        kind += ": " + ", ".join(option["choices"])
    default = "required" if option.get("required") else _default(option)
    cells = [f"`{name}`", kind, default, _plain(str(option["description"]))]
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _default(option: Mapping[str, Any]) -> str:
    if option.get("default") is None:
        return "unset"
    value = option["default"]
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "empty"


def _plain(text: str) -> str:
    """Ansible's marks for code and values as Markdown's."""
    for mark in ("C(", "V(", "O("):
        while mark in text:
            head, _, rest = text.partition(mark)
            inner, _, tail = rest.partition(")")
            text = f"{head}`{inner}`{tail}"
    return text


if __name__ == "__main__":
    for changed in write_all():
        print(changed.relative_to(ROLES.parent))
    sys.exit(0)
