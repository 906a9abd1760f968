"""GPUs: what the vendors' tools say, read; and how it differs from what was planned for, all of it at once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import gpus
from ansible_collections.stepladder.core.plugins.module_utils.gpus import Found, Gpu, User

ROOT = Path(__file__).resolve().parents[2]
SAID = ROOT / "tests" / "fixtures" / "gpus"


def said(name: str) -> str:
    return (SAID / name).read_text()


def test_nvidia_smi() -> None:
    found = gpus.parse_nvidia_smi(said("nvidia-smi-h20.csv"))
    assert [gpu.index for gpu in found] == list(range(8))
    assert found[0] == Gpu(
        0, "NVIDIA H20", 97871, 28, "580.95.05", "GPU-00000000-aaaa-bbbb-cccc-000000000000", "00000000:10:00.0"
    )
    (shared,) = gpus.parse_nvidia_smi(said("nvidia-smi-gb10.csv"))
    assert (shared.name, shared.memory_mib, shared.used_mib) == ("NVIDIA GB10", None, None)


@pytest.mark.parametrize("text", ["", "No devices were found\n", "0, GPU-1\n", "x, a, b, 1, 2, 3, 4\n"])
def test_what_is_no_list_of_gpus(text: str) -> None:
    assert gpus.parse_nvidia_smi(text) == []
    assert gpus.parse_amd_smi(text) == []
    assert gpus.parse_rocm_smi(text) == []


def test_nvidia_smis_processes() -> None:
    text = "GPU-1, 4711, 91234\nGPU-1, 4712, [N/A]\nGPU-2, [Not Found], 5\n"
    assert gpus.parse_nvidia_users(text) == [User("GPU-1", 4711, 91234), User("GPU-1", 4712, None)]


def test_amd_smi_with_the_kernels_own_driver() -> None:
    assert gpus.parse_amd_smi(said("amd-smi-static-mi210.json")) == [Gpu(0, "AMD Instinct MI210", 65520)]


def test_amd_smi_as_a_list_after_a_warning() -> None:
    listed = json.dumps([{"gpu": 0, "bdf": "0000:05:00.0", "uuid": "76ff74a1-0000-1000-80a0-8c022586fed6"}])
    assert gpus.parse_amd_smi(said("amd-smi-static-mi300x.json"), listed) == [
        Gpu(
            0, "AMD Instinct MI300X", 196592, None, "6.10.5", "76ff74a1-0000-1000-80a0-8c022586fed6", "0000:05:00.0"
        )
    ]  # fmt: skip


def test_amd_smis_memory_in_use() -> None:
    static = json.dumps([{"gpu": index, "asic": {}, "vram": {"size": "N/A"}} for index in (0, 1)])
    found = gpus.parse_amd_smi(static, used=said("amd-smi-metric-mi355x.json"))
    assert [(gpu.name, gpu.memory_mib, gpu.used_mib) for gpu in found] == [("", None, 283), ("", None, 50000)]


def test_rocm_smi() -> None:
    assert gpus.parse_rocm_smi(said("rocm-smi-rx7900xt.json")) == [Gpu(0, "Radeon RX 7900 XT", 20464, 26)]
    older = {"card10": {"Card series": "N/A"}, "card9": {"Unique ID": "0x1a"}, "system": {"Driver version": "6.2.4"}}
    assert gpus.parse_rocm_smi(json.dumps(older)) == [
        Gpu(9, "", None, None, "6.2.4", "0x1a"), Gpu(10, "", None, None, "6.2.4"),
    ]  # fmt: skip


OURS = "/var/lib/stepladder/deployments/step3"
H20 = tuple(
    Gpu(index, "NVIDIA H20", 97871, 1, "580.95.05", f"GPU-{index}", f"00000000:0{index}:00.0") for index in range(8)
)
NEEDED: dict[str, Any] = {
    "vendor": "nvidia", "count": 8, "model": "H20", "memory_mib": 97871, "minimum_driver": "580",
    "indices": list(range(8)),
}  # fmt: skip
FOUND = Found(H20, tool="nvidia-smi")


def with_gpu(index: int, **change: Any) -> Found:
    changed = tuple(replace(gpu, **change) if gpu.index == index else gpu for gpu in H20)
    return replace(FOUND, gpus=changed)


def told(found: Found, needed: dict[str, Any] = NEEDED, runs: bool = False) -> list[tuple[str, str, str]]:
    return [(one.what, one.found, one.needed) for one in gpus.differences(found, needed, OURS, runs)]


AMD = Found((Gpu(0, "AMD Instinct MI300X", 196592, 283, "6.10.5"),), tool="amd-smi", release="7.0.2-98")
MI300X = {
    "vendor": "amd", "count": 1, "model": "MI300X", "memory_mib": 196592, "minimum_driver": "7.2", "indices": [0],
}  # fmt: skip
DIFFERENCES = [
    pytest.param(FOUND, NEEDED, [], id="as-planned"),
    pytest.param(
        Found(problem="nvidia-smi is not there"), NEEDED, [("GPUs", "nvidia-smi is not there", "8 x H20")], id="no-tool"
    ),
    pytest.param(
        replace(FOUND, gpus=H20[:7]), NEEDED, [("number of GPUs", "7 (nvidia-smi)", "8")], id="one-fell-off-the-bus"
    ),
    pytest.param(
        FOUND, {**NEEDED, "memory_mib": 143771},
        [("type of GPU 0, 1, 2, 3, 4, 5, 6, 7", "NVIDIA H20, 97871 MiB", "H20, 143771 MiB within 2%")],
        id="the-other-h20",
    ),
    pytest.param(
        with_gpu(3, name="NVIDIA H200", memory_mib=143771), NEEDED,
        [("type of GPU 3", "NVIDIA H200, 143771 MiB", "H20, 97871 MiB within 2%")], id="one-of-another-type",
    ),
    pytest.param(
        with_gpu(3, name="NVIDIA H200"), NEEDED,
        [("type of GPU 3", "NVIDIA H200, 97871 MiB", "H20, 97871 MiB within 2%")], id="another-name",
    ),
    pytest.param(with_gpu(3, name="NVIDIA H20-3e"), NEEDED, [], id="a-longer-name"),
    pytest.param(with_gpu(3, name=""), NEEDED, [], id="no-name"),
    pytest.param(
        with_gpu(3, memory_mib=None), NEEDED,
        [("type of GPU 3", "NVIDIA H20, memory not told", "H20, 97871 MiB within 2%")], id="no-memory",
    ),
    pytest.param(with_gpu(3, driver="575.57.08"), NEEDED, [("driver", "575.57.08", "580 or newer")], id="old-driver"),
    pytest.param(with_gpu(3, driver="575.57.08"), {**NEEDED, "minimum_driver": ""}, [], id="any-driver"),
    pytest.param(AMD, MI300X, [("ROCm", "7.0.2-98", "7.2 or newer")], id="old-rocm"),
    pytest.param(replace(AMD, release=""), MI300X, [], id="rocm-not-told"),
    pytest.param(
        with_gpu(5, used_mib=90000), NEEDED,
        [("memory of GPU 5", "90000 MiB in use by no process that can be seen from here", "idle")], id="in-use",
    ),
    pytest.param(with_gpu(5, used_mib=90000), {**NEEDED, "indices": [0, 1, 2, 3]}, [], id="another-one-in-use"),
    pytest.param(with_gpu(5, used_mib=1024), NEEDED, [], id="idle-enough"),
    pytest.param(
        replace(with_gpu(5, used_mib=90000), users=(User("GPU-5", 7, 90000, OURS, "vllm"),)), NEEDED, [], id="our-own"
    ),
    pytest.param(
        replace(
            with_gpu(5, used_mib=90000),
            users=(
                User("GPU-5", 7, 1, OURS, "vllm"),
                User("GPU-5", 8, 1, "/var/lib/stepladder/deployments/other", "py x"),
                User("GPU-5", 9, None),
            ),
        ),
        NEEDED,
        [("memory of GPU 5", "90000 MiB in use by pid 8 of deployment other (py x); by pid 9 (not visible)", "idle")],
        id="in-use-by-others-too",
    ),
    pytest.param(
        Found((Gpu(0, "NVIDIA A100-SXM4-80GB", 81920, 70000, "535.54.03", "GPU-0"),), tool="nvidia-smi"), NEEDED,
        [
            ("number of GPUs", "1 (nvidia-smi)", "8"),
            ("type of GPU 0", "NVIDIA A100-SXM4-80GB, 81920 MiB", "H20, 97871 MiB within 2%"),
            ("driver", "535.54.03", "580 or newer"),
            ("memory of GPU 0", "70000 MiB in use by no process that can be seen from here", "idle"),
        ],
        id="all-at-once",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("found", "needed", "expected"), DIFFERENCES)
def test_differences(found: Found, needed: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    assert told(found, needed) == expected


def test_memory_that_nobody_shows_is_ours_while_we_run() -> None:
    assert told(with_gpu(5, used_mib=90000), runs=True) == []


def test_every_difference_says_how_to_mend_it() -> None:
    for case in DIFFERENCES:
        found, needed, _ = case.values
        assert all(one.mend for one in gpus.differences(found, needed, OURS, False))  # type: ignore[arg-type]


# ---- stand-ins for the tools, on the PATH ----------------------------------------------------------------------------


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "TOOL_PATHS", ())
    monkeypatch.setattr(gpus, "TOOL_SECONDS", 0.5)
    return tmp_path


def test_nvidias_tool_is_asked(tools: Path) -> None:
    stand_in(
        tools, "nvidia-smi", f'case "$1" in *compute*) echo "GPU-1, 12, 3";; *) cat {SAID}/nvidia-smi-h20.csv;; esac'
    )
    found = gpus.find("nvidia")
    assert (len(found.gpus), found.users, found.problem) == (8, (User("GPU-1", 12, 3),), "")


def test_amds_tools_are_asked_the_newer_one_first(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tools / "version").write_text("7.2.3-81\n")
    monkeypatch.setattr(gpus, "ROCM_RELEASE", str(tools / "version"))
    stand_in(tools, "rocm-smi", f"cat {SAID}/rocm-smi-rx7900xt.json")
    found = gpus.find("amd")
    assert (found.tool, found.gpus[0].name, found.release) == ("rocm-smi", "Radeon RX 7900 XT", "7.2.3-81")
    stand_in(tools, "amd-smi", f'[ "$1" = static ] && cat {SAID}/amd-smi-static-mi300x.json')
    found = gpus.find("amd")
    assert (found.tool, found.gpus[0].name, found.problem) == ("amd-smi", "AMD Instinct MI300X", "")


PROBLEMS = [
    pytest.param("nvidia", "nvidia-smi", "echo No devices were found; exit 6",
                 "nvidia-smi ends with 6: No devices were found", id="no-devices"),
    pytest.param("nvidia", "nvidia-smi", "echo No devices were found",
                 "nvidia-smi lists none: No devices were found", id="none-listed"),
    pytest.param("nvidia", "nvidia-smi", "exec sleep 20",
                 "nvidia-smi does not answer within 0.5 s: a GPU or its driver hangs", id="hangs"),
    pytest.param("nvidia", "other", "", "nvidia-smi is not there", id="absent"),
    pytest.param("amd", "other", "", "amd-smi is not there", id="amd-absent"),
]  # fmt: skip


@pytest.mark.parametrize(("vendor", "tool", "script", "problem"), PROBLEMS)
def test_why_there_is_no_answer(tools: Path, vendor: str, tool: str, script: str, problem: str) -> None:
    stand_in(tools, tool, script)
    assert gpus.find(vendor) == Found(problem=problem)


@pytest.mark.parametrize("check", [False, True])
def test_the_module_reports_gpus_beside_all_else(tools: Path, check: bool) -> None:
    stand_in(tools, "nvidia-smi", f"cat {SAID}/nvidia-smi-h20.csv")
    arguments = {
        "deployment": OURS, "architectures": ["vax"], "gpus": {**NEEDED, "memory_mib": 143771, "count": 4},
        "_ansible_check_mode": check, "_ansible_remote_tmp": str(tools),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, ROOT / "plugins/modules/preflight.py"], input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True, text=True, check=False, env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools)},
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert not answer.get("failed")
    assert [one["what"] for one in answer["findings"] if one["severity"] == "failure"] == [
        "machine", "number of GPUs", "type of GPU 0, 1, 2, 3, 4, 5, 6, 7",
    ]  # fmt: skip
    assert answer["facts"]["gpus"][0]["driver"] == "580.95.05"
