"""The command generators of SGLang's documentation, run as they are, against the plan for every choice they offer."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stepladder.catalogue import Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CATALOGUE = Catalogue()
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node.js (package nodejs) to run SGLang's own generators")

EVERY_CHOICE = """
const choices = ([first, ...rest], values) => {
  if (!first) return [values];
  const items = first.getDynamicItems ? first.getDynamicItems(values) : first.items;
  return items.flatMap(item => choices(rest, { ...values, [first.name]: item.id }));
};
const all = choices(Object.values(options), {}).map(values => ({ values, command: generateCommand(values) }));
process.stdout.write(JSON.stringify(all));
"""
GPUS = {  # what a generator's group of hardware stands for
    "hopper": ["h100", "h200", "h20-96", "h20-141"],
    "b200_b300": ["b200", "b300"],
    "gb200_gb300": ["gb200", "gb300"],
}
FEATURES = {"reasoningParser": "reasoning", "toolcall": "tool_calls", "speculative": "mtp"}


class Page(NamedTuple):
    """A generator: its file, the model that it is for, and how many choices it offers."""

    file: str
    model: str
    choices: int


PAGES = [Page("step35_generator.js", "step-3.5-flash", 80), Page("step37_generator.js", "step-3.7-flash", 64)]

# Where the plan and the generators mean to differ: by flag, or REFUSED where there is no plan, with the reason.
INTENDED = {
    "--model-path": "the plan serves a downloaded and proven revision; an id would be fetched by each node at start",
    "--served-model-name": "without it clients must ask for the model by its path (SGLang 0.5.23, /v1/models)",
    "--host": "SGLang listens on 127.0.0.1 alone by default (SGLang 0.5.23, server_args.py)",
    "--port": "written out, so that what is probed is what is served (SGLang 0.5.23, server_args.py)",
    "--mem-fraction-static": "weights and KV cache as the memory table promises them (SGLang 0.5.23, memory_hook.py)",
    "--enable-metrics": "without it /metrics is not there (SGLang 0.5.23, http_server.py)",
    "--watchdog-timeout": "kernels are compiled at a first start for longer than 300 s (SGLang 0.5.23, server_args.py)",
    "REFUSED multi-token prediction": "the page itself marks it 'Not supported with NVFP4' (SGLang cookbook, Step-3.7)",
}

Flags = dict[str, str]


@cache
def offered(file: str) -> list[dict[str, Any]]:
    """Every choice that a generator offers, with the command that it prints."""
    script = (GOLDEN / file).read_text() + EVERY_CHOICE
    assert NODE
    done = subprocess.run([NODE, "-"], input=script, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def flags_of(words: list[str]) -> Flags:
    flags: Flags = {}
    for word in words:
        if word.startswith("--"):
            # The generators' --tp is a prefix that the parser completes.
            word = "--tp-size" if word == "--tp" else word  # noqa: PLW2901
            flags[word] = ""
        else:
            flags[list(flags)[-1]] += word
    return flags


def generated(command: str) -> Flags:
    program, verb, *words = shlex.split(command.replace("\\\n", " "))
    assert (program, verb) == ("sglang", "serve")
    return flags_of(words)


def plan_for(model: str, gpu: str, values: dict[str, str], parallel: str) -> Plan:
    features = [feature for option, feature in FEATURES.items() if values[option] == "enabled"]
    wish = {"model": model, "engine": "sglang", "variant": values["quantization"], "features": features}
    node = {"name": "n0", "address": "198.18.0.1", "gpu": gpu}
    return make_plan(parse_request({"deployment": {**wish, "parallel": parallel}, "nodes": [node]}), CATALOGUE)


def planned(plan: Plan) -> Flags:
    process = plan.nodes[0].processes[0]
    argv = list(process.argv)
    return flags_of(argv[argv.index("serve") + 1 :])


def differences(page: Page) -> Counter[str]:
    """Each difference, with the number of plans that have it."""
    found: Counter[str] = Counter()
    for choice in offered(page.file):
        values, theirs = choice["values"], generated(choice["command"])
        parallel = f"TP{theirs['--tp-size']}" + ("+EP" if "--ep" in theirs else "")
        for gpu in GPUS.get(values["hardware"], [values["hardware"]]):
            try:
                ours = planned(plan_for(page.model, gpu, values, parallel))
            except PlanRefusedError as refused:
                rules = [violation.rule for violation in refused.violations if violation.rule != "nearest layout"]
                found.update(f"REFUSED {rule}" for rule in rules)
                continue
            found.update(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
            found["plans"] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.model)
def test_the_generator_offers_what_the_page_shows(page: Page) -> None:
    assert len(offered(page.file)) == page.choices


def test_plans_differ_from_the_generators_where_it_is_meant_and_nowhere_else() -> None:
    found = sum((differences(page) for page in PAGES), Counter[str]())
    # Four plans of each NVFP4 choice are refused: four GPU types, two parsers on or off.
    assert found.pop("plans") == 80 + 160 - 16
    assert found.keys() == INTENDED.keys()


def test_what_the_generators_name_is_what_the_plan_downloads() -> None:
    for page in PAGES:
        for choice in offered(page.file):
            values, theirs = choice["values"], generated(choice["command"])
            if values["speculative"] == "enabled":
                continue
            gpu = GPUS.get(values["hardware"], [values["hardware"]])[0]
            assert plan_for(page.model, gpu, values, "auto").nodes[0].weights.model_id == theirs["--model-path"]


def test_auto_never_takes_more_gpus_than_the_generator() -> None:
    for page in PAGES:
        for choice in offered(page.file):
            values, theirs = choice["values"], generated(choice["command"])
            if values["quantization"] == "nvfp4" and values["speculative"] == "enabled":
                continue
            for gpu in GPUS.get(values["hardware"], [values["hardware"]]):
                parallel = plan_for(page.model, gpu, values, "auto").deployment.parallel
                assert parallel.world_size <= int(theirs["--tp-size"]), (values, gpu, str(parallel))
                if "--ep" in theirs and gpu.startswith("mi"):
                    assert parallel.expert or parallel.world_size == 1
