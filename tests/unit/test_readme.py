"""What the README tells a newcomer to type is what CI types."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def first_commands() -> list[str]:
    block = re.search(r"## Try it.*?\n\n((?:    .*\n)+)", (REPOSITORY / "README.md").read_text(), re.S)
    assert block
    return [line.strip() for line in block[1].splitlines()]


def test_the_first_command_is_the_one_that_the_end_to_end_test_runs() -> None:
    deploy = first_commands()[0]
    text = (REPOSITORY / "tests/e2e/test_local_deployment.py").read_text()
    program, verb, *options = deploy.split()
    assert f'"{program}", verb, *self.options' in text
    assert f'local.run("{verb}"' in text
    assert "[" + ", ".join(f'"{option}"' for option in options) in text


def test_the_second_command_is_the_one_that_ci_runs() -> None:
    assert first_commands()[1] == "bin/stepladder test"
    assert re.search(r'^bin/stepladder test "\$@"', (REPOSITORY / ".ci/run").read_text(), re.M)


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / "README.md").read_text())
    assert len(links) >= 3
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_inventory_of_the_readme_is_there() -> None:
    named = set(re.findall(r"-i (inventories/\w+)", (REPOSITORY / "README.md").read_text()))
    assert named >= {"inventories/local", "inventories/h20"}
    # The lab's hosts are written by `lab up`.
    made = {"inventories/lab"}
    assert [name for name in named - made if not (REPOSITORY / name / "hosts.yml").exists()] == []
    assert (REPOSITORY / "inventories/lab/group_vars/engines.yml").exists()
