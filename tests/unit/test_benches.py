"""What makes the benches of a node's preparation fail; they themselves run in labs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize("program", sorted(BENCH.glob("*.py")), ids=lambda program: program.stem)
def test_a_bench_starts_as_it_says(program: Path) -> None:
    """`python3` is one without the environment's packages."""
    found = re.search(rf"^ *(\S*python3?) tests/bench/{program.name}", program.read_text(), re.MULTILINE)
    assert found, "it does not say how it is started"
    bare = ["-S", "-E"] if found[1] == "python3" else []
    argv = [sys.executable, *bare, str(program), "--help"]
    done = subprocess.run(argv, cwd=BENCH.parents[1], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def bench(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A bench as a module; what it puts on the search path is taken off again."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECAP = (
    "PLAY RECAP ***\nnode1    : ok=9    changed={}    unreachable=0\nnode2    : ok=9    changed={}    unreachable=0\n"
)


def test_a_second_prepare_that_changes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = bench("prepare", monkeypatch)
    assert prepare.changed_tasks(RECAP.format(7, 0), 2) == {"node1": 7, "node2": 0}
    with pytest.raises(SystemExit, match="the recap has 2 of 8 nodes"):
        prepare.changed_tasks(RECAP.format(7, 0), 8)
    assert prepare.fault("first", {"node1": 7, "node2": 0}) == "the first run changed nothing on node2"
    assert prepare.fault("second", {"node1": 7, "node2": 0}) == "the second run changed something on node1 (7)"
    assert prepare.fault("first", {"node1": 7}) == prepare.fault("second", {"node1": 0}) == ""


def test_a_preflight_that_leaves_a_node_out(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight = bench("preflight", monkeypatch)
    told = {"fit": True, "unfit": [], "nodes": [{"node": "node1", "facts": {"hostname": "node1"}}]}
    assert preflight.fault(json.dumps(told), 1) == ""
    assert preflight.fault(json.dumps(told), 2) == "preflight read 1 of 2 nodes: node1"
    unfit = json.dumps(told | {"fit": False, "unfit": ["node1"]})
    assert preflight.fault(unfit, 1) == "preflight says that they are not fit: ['node1']"


def test_a_spreading_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = bench("image_spread", monkeypatch)
    assert spread.faults({True: 1.0, False: 3.0}, 3.4, 6) == []
    assert spread.faults({True: 3.0, False: 1.0}, 9.0, 6) == [
        "spreading let 3.0 copies leave the registry, and one is to",
        "each for itself, the nodes got 1.0 copies from the registry, and there are 3",
        "spreading took 9.0 times a copy at line rate, and at most 6 are allowed",
    ]
