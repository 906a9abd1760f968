"""The published commands against the plan for the same meaning: to the letter, with a reason for each difference."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stepladder.core.plugins.module_utils import weights_client, weights_request

from stepladder.catalogue import Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.plan import NodePlan, Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "seeds.yml"
BOOK: dict[str, Any] = yaml.safe_load(GOLDEN.read_text())
CASES: list[dict[str, Any]] = BOOK["cases"]
CATALOGUE = Catalogue()
PLANNED = [pytest.param(case, id=case["name"]) for case in CASES if "today" in case]
REFUSED = [pytest.param(case, id=case["name"]) for case in CASES if "refused" in case]

Flags = dict[str, tuple[str, ...]]


def plan_of(case: dict[str, Any]) -> Plan:
    nodes = [
        {"name": f"n{i}", "address": f"198.18.0.{i + 1}", "gpu": case["where"]["gpu"], "interface": "eth1"}
        for i in range(case["where"]["nodes"])
    ]
    return make_plan(parse_request({"deployment": case["deployment"], "nodes": nodes}), CATALOGUE)


def today(case: dict[str, Any]) -> str:
    """What the plan has for a case, without directories."""
    plan = plan_of(case)
    node = plan.nodes[case["where"].get("node", 0)]
    process = node.processes[case["where"].get("process", -1)]
    argv = [argument.replace(f"{plan.state_directory}/", "") for argument in process.argv]
    argv[0] = argv[0].rsplit("/", 1)[-1]
    image = argv.index(process.image) if process.image else None
    parts = {
        "serve": lambda: shlex.join(argv if image is None else [program_of(argv), *argv[image + 1 :]]),
        "container": lambda: shlex.join(argv[: (image or 0) + 1]),
        "images": lambda: shlex.join(["docker", "pull", *node.images]),
        "install": lambda: installed(node, case["today"]),
        "tools": lambda: installed(node, case["today"]),
        "weights": lambda: download(node, plan.state_directory),
    }
    return parts[case["part"]]()


def program_of(argv: list[str]) -> str:
    return argv[argv.index("--entrypoint") + 1]


def installed(node: NodePlan, expected: str) -> str:
    """The lock of the environment that holds the expected pins, and those of them that it does pin."""
    venvs = {venv.lock: venv for venv in (node.venv, node.tools) if venv and venv.lock}
    lock, *pins = expected.split()
    text = CATALOGUE.lock_path(lock).read_text() if lock in venvs else ""
    return " ".join([lock if lock in venvs else str(sorted(venvs)), *(pin for pin in pins if f"\n{pin} " in text)])


def download(node: NodePlan, state_directory: str) -> str:
    wanted = weights_request.Request(
        model_id=node.weights.model_id, path=node.weights.path, revision=node.weights.revision
    )
    return shlex.join(weights_client.client_argv(wanted, [])).replace(f"{state_directory}/", "")


# A prefix that SGLang's parser completes: the same flag.
SPELLED_OUT = {"--tp": "--tp-size"}


def split(command: str) -> tuple[list[str], Flags]:
    """Words that are no flags, and flags with all their values, as they are typed."""
    lines = [line for line in command.splitlines() if not line.startswith("#")]
    tokens = shlex.split("\n".join(lines).rstrip().removesuffix("\\").replace("\\\n", " "))
    words: list[str] = []
    flags: Flags = {}
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-"):
            words.append(token)
            continue
        name, equals, value = token.partition("=")
        if not equals and tokens and not tokens[0].startswith("-"):
            value = tokens.pop(0)
        name = SPELLED_OUT.get(name, name)
        flags[name] = (*flags.get(name, ()), value)
    return words, flags


def split_call(text: str) -> tuple[list[str], Flags]:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    keywords = {str(keyword.arg): (ast.literal_eval(keyword.value),) for keyword in call.keywords}
    return [ast.literal_eval(argument) for argument in call.args], keywords


def differing(case: dict[str, Any]) -> set[str]:
    """Everything in which the published command and today's are not the same."""
    if case["part"] == "weights":
        words, flags = split_call(case["command"])
        our_words, ours = split(case["today"])
        our_words, ours = our_words[2:], {name.strip("-").replace("-", "_"): value for name, value in ours.items()}
    else:
        words, flags = split(case["command"])
        our_words, ours = split(case["today"]) if case["part"] not in {"install", "tools"} else ([case["today"]], {})
    found = {name for name in flags.keys() | ours.keys() if flags.get(name) != ours.get(name)}
    found |= {"WORDS"} if words != our_words else set()
    return found | ({"BACKSLASH"} if case["command"].rstrip().endswith("\\") else set())


@pytest.mark.parametrize("case", PLANNED)
def test_todays_command_is_the_golden_one(case: dict[str, Any]) -> None:
    assert today(case) == case["today"]


@pytest.mark.parametrize("case", PLANNED)
def test_every_difference_has_a_reason_and_no_reason_is_left_over(case: dict[str, Any]) -> None:
    assert differing(case) == case["differs"].keys()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_its_reasons(case: dict[str, Any]) -> None:
    with pytest.raises(PlanRefusedError) as caught:
        plan_of(case)
    assert [str(violation) for violation in caught.value.violations] == case["refused"]


def test_the_book_of_reasons_is_whole_and_nothing_in_it_is_unused() -> None:
    used = [reason for case in CASES for reason in case.get("differs", {}).values()]
    assert set(used) == BOOK["reasons"].keys()
    assert {case["guide"] for case in CASES} == BOOK["guides"].keys()
    for name, reason in BOOK["reasons"].items():
        assert reason.keys() == {"text", "source"}, name
        assert re.fullmatch(r"[^.].*[^.]\.", reason["text"]), name


def test_names_are_unique_and_every_case_is_judged() -> None:
    names = [case["name"] for case in CASES]
    assert len(set(names)) == len(names) == len(PLANNED) + len(REFUSED)
