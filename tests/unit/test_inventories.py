"""The inventories that come with the toolkit: each can be planned, and every GPU type has its group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
INVENTORIES = sorted(hosts.parent for hosts in REPOSITORY.glob("inventories/*/hosts.yml") if hosts.parent.name != "lab")
# What an inventory gives as it is: engine, platform, install, tensor and expert parallelism, replicas.
EXPECTED = {
    "b200": ("vllm", "cuda", "venv", (1, False), 1),
    "ci": ("vllm", "cuda", "venv", (4, True), 1),
    "h20": ("vllm", "cuda", "venv", (16, False), 1),
    "h200": ("vllm", "cuda", "venv", (4, True), 2),
    "local": ("vllm", "cpu", "venv", (1, False), 1),
    "mi355x": ("sglang", "rocm", "container", (4, True), 1),
}


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda inventory: inventory.name)
def test_inventory_is_planned(inventory: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, "bin/stepladder", "plan", "-i", str(inventory), "-e", f"plan_out={out}"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(out.read_text())["deployment"]
    layout = (plan["parallel"]["tensor"], plan["parallel"]["expert"])
    assert (plan["engine"], plan["platform"], plan["install"], layout, plan["replicas"]) == EXPECTED[inventory.name]


def test_every_gpu_of_the_catalogue_has_a_group() -> None:
    known = {gpu["name"] for gpu in yaml.safe_load((REPOSITORY / "catalog/gpus.yml").read_text())}
    groups = {
        file.stem: yaml.safe_load(file.read_text())["deployment_gpu"]
        for file in REPOSITORY.glob("group_vars/*.yml")
        if "deployment_gpu" in file.read_text()
    }
    assert set(groups.values()) == known
    assert len(groups) == len(known)
