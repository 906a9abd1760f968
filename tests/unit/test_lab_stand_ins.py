"""The stand-ins for the vendors' tools answer in the vendors' forms, from the catalogue's and recorded figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stepladder.lab import stand_ins
from stepladder.lab.places import LabError

ROOT = Path(__file__).resolve().parents[2]
QUERY = "--query-gpu=index,uuid,name,memory.total,driver_version,pci.bus_id"


def ask(tmp_path: Path, gpu: str, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool as a node of that GPU type has it."""
    data = tmp_path / "gpus.json"
    data.write_bytes(stand_ins.files(gpu, "node1")[stand_ins.DATA][0])
    environ = {**os.environ, "STEPLADDER_LAB_GPUS": str(data)}
    command = [sys.executable, str(stand_ins.FOLDER / tool), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=30)


def test_query_in_the_form_that_scripts_ask_for(tmp_path: Path) -> None:
    done = ask(tmp_path, "h20-96", "nvidia-smi", QUERY, "--format=csv,noheader,nounits")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 8)
    uuid = r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert re.fullmatch(rf"0, {uuid}, NVIDIA H20, 97871, 535\.183\.06, 00000000:10:00\.0", lines[0])
    assert len({line.split(", ")[1] for line in lines}) == 8


def test_query_with_header_and_units_in_any_order(tmp_path: Path) -> None:
    done = ask(
        tmp_path, "h100", "nvidia-smi", "--query-gpu", "memory.total,gpu_name,index", "--format", "csv", "-i", "3"
    )
    assert done.stdout == "memory.total [MiB], name, index\n81559 MiB, NVIDIA H100 80GB HBM3, 3\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--query-gpu=index,foo", "--format=csv"], 2, 'Field "foo" is not a valid field to query.\n\n'),
        (["--query-gpu=index"], 2, "\"--format=\" switch is missing. Please run 'nvidia-smi -h' for help.\n"),
        (["--query-gpu=index", "--format=csv", "-i", "9"], 6, "No devices were found\n"),
    ],
)
def test_wrong_questions(tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    done = ask(tmp_path, "h200", "nvidia-smi", *arguments)
    assert (done.returncode, done.stdout) == (status, said)


def test_what_was_not_recorded_is_refused_by_name(tmp_path: Path) -> None:
    done = ask(tmp_path, "h200", "nvidia-smi", "-q", "-x")
    assert done.returncode == 2
    assert "(stand-in of a lab: '-q' has not been recorded)" in done.stdout
    done = ask(tmp_path, "mi300x", "amd-smi", "metric", "--json")
    assert done.returncode == 1
    assert done.stderr == "amd-smi (stand-in of a lab): 'metric --json' has not been recorded\n"


def test_list_of_gpus(tmp_path: Path) -> None:
    lines = ask(tmp_path, "h20-141", "nvidia-smi", "-L").stdout.splitlines()
    assert len(lines) == 8
    assert re.fullmatch(r"GPU 7: NVIDIA H20-3e \(UUID: GPU-[0-9a-f-]{36}\)", lines[7])


def test_amd_tools_agree(tmp_path: Path) -> None:
    listing = json.loads(ask(tmp_path, "mi300x", "amd-smi", "list", "--json").stdout)
    static = json.loads(ask(tmp_path, "mi300x", "amd-smi", "static", "--json").stdout)["gpu_data"]
    older = json.loads(
        ask(tmp_path, "mi300x", "rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json").stdout
    )
    assert [gpu["bdf"] for gpu in listing] == [gpu["bus"]["bdf"] for gpu in static]
    assert static[0]["asic"]["market_name"] == older["card0"]["Card Series"] == "AMD Instinct MI300X"
    assert static[0]["vram"]["size"] == {"value": 196592, "unit": "MB"}
    assert older["card7"]["VRAM Total Memory (B)"] == "206141652992"


@pytest.mark.parametrize("tool", ["nvidia-smi", "amd-smi", "rocm-smi"])
def test_every_stand_in_says_that_it_is_one(tmp_path: Path, tool: str) -> None:
    gpu = "h100" if tool == "nvidia-smi" else "mi355x"
    assert ask(tmp_path, gpu, tool, "--help").stdout.startswith(f"A stand-in for {tool} on the nodes of a lab.")


def test_every_gpu_type_of_the_catalogue_has_its_tools() -> None:
    for entry in yaml.safe_load((ROOT / "catalog/gpus.yml").read_text()):
        files = stand_ins.files(entry["name"], "node1")
        assert bool(files) == (entry["vendor"] != "cpu")
        if files:
            assert len(json.loads(files[stand_ins.DATA][0])["gpus"]) == entry["gpus_per_node"]


def test_recorded_figures_name_known_types_and_sources() -> None:
    known = {entry["name"] for entry in yaml.safe_load((ROOT / "catalog/gpus.yml").read_text())}
    recorded = yaml.safe_load((stand_ins.FOLDER / "gpus.yml").read_text())
    assert {entry["name"] for entry in recorded} <= known
    assert all(entry["source"] for entry in recorded)


def test_unknown_gpu_type() -> None:
    with pytest.raises(LabError, match=r"unknown GPU type: 'h20'\. Did you mean 'h200'\?"):
        stand_ins.entry("h20")


def test_compute_capability(tmp_path: Path) -> None:
    done = ask(tmp_path, "b300", "nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0")
    assert done.stdout == "10.3\n"
