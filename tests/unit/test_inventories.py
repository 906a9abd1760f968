"""The inventories that come with the toolkit: each can be planned, and every GPU type has its group."""

from __future__ import annotations

import json
import os
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


def test_a_directory_with_pinned_host_keys_is_still_an_inventory(tmp_path: Path) -> None:
    """What `bootstrap -i DIRECTORY` leaves there is no inventory source, nor are notes."""
    (tmp_path / "hosts.yml").write_text("all: {hosts: {198.18.0.11: {}}}\n")
    for name in ("known_hosts", "known_hosts.shown", "known_hosts.old", "known_hosts2", "notes.md"):
        (tmp_path / name).write_text("[198.18.0.11]:2222 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA: {\n")
    (tmp_path / ".known_hosts.lock").touch()
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-inventory"), "-i", str(tmp_path), "--list"],
        cwd=REPOSITORY, env={**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ungrouped"]["hosts"] == ["198.18.0.11"]
