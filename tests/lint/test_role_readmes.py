"""Every role's README says what its argument specification says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stepladder.role_docs import BEGIN, END, ROLES, readme

SPECIFICATION = {
    "argument_specs": {
        "main": {
            "short_description": "Do it",
            "description": "With C(care).",
            "options": {
                "x_a": {"type": "str", "required": True, "description": "A."},
                "x_b": {"type": "list", "elements": "int", "default": [1], "description": "B."},
            },
        },
        "undo": {"short_description": "Undo it", "description": "Fully.", "options": {}},
    }
}


@pytest.mark.parametrize("role", sorted(path.parents[1] for path in ROLES.glob("*/meta/argument_specs.yml")), ids=str)
def test_readme_is_up_to_date(role: Path) -> None:
    before = (role / "README.md").read_text() if (role / "README.md").exists() else ""
    after = readme(role.name, yaml.safe_load((role / "meta" / "argument_specs.yml").read_text()), before)
    assert after == before, "run: .venv/bin/python -m stepladder.role_docs"


def test_a_new_readme_names_every_variable_and_entry_point() -> None:
    text = readme("x", SPECIFICATION, "")
    assert "Do it. With `care`." in text
    assert "| `x_a` | str | required | A. |" in text
    assert "| `x_b` | list of int | `[1]` | B. |" in text
    assert "- `undo`: Undo it. Fully." in text


def test_what_was_written_by_hand_stays() -> None:
    old = f"# x\n\nMine.\n\n{BEGIN}\nold\n{END}\n\nAlso mine.\n"
    text = readme("x", SPECIFICATION, old)
    assert text.startswith("# x\n\nMine.\n")
    assert text.endswith("\nAlso mine.\n")
    assert "\nold\n" not in text
