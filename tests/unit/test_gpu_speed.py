"""Figures of GPUs: the vendors' tools read, each failure told with its reason; and which GPU is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.stepladder.core.plugins.module_utils import asking, gpu_speed, gpus, torch_runs
from ansible_collections.stepladder.core.plugins.module_utils.asking import Ran
from ansible_collections.stepladder.core.plugins.module_utils.gpu_speed import Figure, Problem
from ansible_collections.stepladder.core.plugins.modules import all_reduce

from stepladder import gpu_acceptance
from stepladder.catalogue import Catalogue
from stepladder.engines.common import NVIDIA_CONTAINER
from stepladder.gpu_acceptance import Row
from stepladder.lab import stand_ins

ROOT = Path(__file__).resolve().parents[2]
SAID = ROOT / "tests" / "fixtures" / "gpus"
KNOWN = Catalogue().gpus


def said(name: str) -> str:
    return (SAID / name).read_text()


def of(figures: Any, kind: str) -> dict[tuple[int | None, int | None], float]:
    return {(one.gpu, one.peer): one.value for one in figures if one.kind == kind}


# ---- parsers ---------------------------------------------------------------------------------------------------------


def test_nvbandwidth_between_eight_h100() -> None:
    told = gpu_speed.read_nvbandwidth(Ran(said("nvbandwidth-8xh100.txt")))
    peers = of(told.figures, "peer")
    assert (len(told.figures), len(peers), told.problems) == (56, 56, ())
    assert (peers[0, 7], peers[2, 4], peers[7, 0]) == (371.67, 372.96, 370.51)


def test_nvbandwidth_of_one_gpu_counts_a_local_copy_twice() -> None:
    figures = gpu_speed.parse_nvbandwidth(said("nvbandwidth-rtx3050.txt"))
    assert figures == [
        Figure("to_gpu", 0, 12.98, "nvbandwidth"),
        Figure("from_gpu", 0, 13.17, "nvbandwidth"),
        Figure("memory", 0, 168.66, "nvbandwidth"),
    ]


def test_transferbench_p2p() -> None:
    figures = gpu_speed.read_transferbench(Ran(said("transferbench-p2p-mi350x.txt"))).figures
    assert len(figures) == 8 * 7 + 3 * 8
    assert of(figures, "memory")[0, None] == 2 * 2132.28
    assert of(figures, "peer")[7, 1] == 46.66
    assert (of(figures, "to_gpu")[6, None], of(figures, "from_gpu")[6, None]) == (44.83, 54.57), "the nearer CPU's"


@pytest.mark.parametrize(
    ("name", "gbytes"), [("all-reduce-perf-8xmi350x.txt", 367.51), ("all-reduce-perf-8xa100.txt", 235.03)]
)
def test_all_reduce_perf(name: str, gbytes: float) -> None:
    told = gpu_speed.read_all_reduce(Ran(said(name)))
    assert told == ([Figure("all_reduce", None, gbytes, "all_reduce_perf")], ())


def test_dcgm_4() -> None:
    told = gpu_speed.read_dcgm(Ran(said("dcgmi-diag-r3-v4.json")))
    assert told == ([Figure("stress", 0, 859.08, "dcgmi"), Figure("stress", 1, 859.08, "dcgmi")], [])


def test_a_setting_that_dcgm_wants_is_a_warning() -> None:
    """As DCGM ends then: not with 0."""
    told = gpu_speed.read_dcgm(Ran(said("dcgmi-diag-r1-persistence.json"), status=226))
    assert [(one.gpu, one.severity) for one in told.problems] == [(gpu, "warning") for gpu in range(8)]
    assert told.problems[3].found == "Persistence Mode: Persistence mode for GPU 3 is disabled."


def test_the_older_form_of_dcgm() -> None:
    told = gpu_speed.read_dcgm(Ran(said("dcgmi-diag-v1.3-stress.json"), status=1))
    assert [(one.what, one.gpu, one.severity) for one in told.problems] == [
        ("DCGM's test sm_stress", gpu, "broken") for gpu in range(4)
    ]
    assert told.problems[0].found.startswith("Max stress level of 2128.7 did not exceed desired stress level of 3000.0")


WRONG = """\
   134217728      33554432     float     sum      -1    694.2  193.34  338.35     50    695.7  192.94  337.64     50
# Out of bounds values : 50 FAILED
"""
SKIPPED = json.dumps(
    {"DCGM Diagnostic": {"test_categories": [{"tests": [{"name": "pcie", "results": [{"status": "Skip"}]}]}]}}
)
FAILURES = {
    "nvbandwidth, corrupt data": (
        gpu_speed.read_nvbandwidth, Ran(said("nvbandwidth-partition.txt"), status=1),
        "breaks off in device_to_device_memcpy_read_ce: Invalid value when checking the pattern at 0x735f80000000",
    ),
    "nvbandwidth says nothing": (gpu_speed.read_nvbandwidth, Ran(), "breaks off: it says nothing"),
    "TransferBench for other GPUs": (
        gpu_speed.read_transferbench, Ran(said("transferbench-handle.txt"), status=1),
        "ends with 1: [ERROR] HIP Error: invalid resource handle",
    ),
    "wrong sums": (gpu_speed.read_all_reduce, Ran(WRONG), "50 values are wrong"),
    "NCCL": (
        gpu_speed.read_all_reduce,
        Ran("# nThread 1\nn1: Test NCCL failure common.cu:1005 'unhandled system error'\n", status=3),
        "all_reduce_perf ends with 3: n1: Test NCCL failure common.cu:1005 'unhandled system error'",
    ),
    "no host engine": (
        gpu_speed.read_dcgm, Ran("", "Error: unable to establish a connection to the specified host: localhost", 1),
        "tested nothing (status 1): Error: unable to establish a connection to the specified host: localhost",
    ),
    "DCGM skips all": (gpu_speed.read_dcgm, Ran(SKIPPED), f"tested nothing (status 0): {SKIPPED}"),
}  # fmt: skip


@pytest.mark.parametrize(("read", "ran", "found"), FAILURES.values(), ids=FAILURES)
def test_what_is_no_answer(read: Any, ran: Ran, found: str) -> None:
    [problem] = read(ran).problems
    assert (problem.found, problem.severity) == (found, "broken")
    assert problem.mend


# ---- running them ----------------------------------------------------------------------------------------------------


def test_a_tool_that_is_missing_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_speed, "FOLDERS", ())
    told = [gpu_speed.use(tool, []) for tool in gpu_speed.tools("nvidia", "full", 8)]
    assert [(one.what, one.found, one.severity) for answer in told for one in answer.problems] == [
        ("bandwidth", "nvbandwidth is not there", "unmeasured"),
        ("diagnosis", "dcgmi is not there", "unmeasured"),
        ("all_reduce", "all_reduce_perf is not there", "unmeasured"),
    ]
    assert told[2].problems[0].mend == "build it from github.com/NVIDIA/nccl-tests"


def test_a_tool_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    program = tmp_path / "dcgmi"
    program.write_text("#!/bin/sh\nsleep 60 & wait\n")
    program.chmod(0o755)
    tool = gpu_speed.Tool(("dcgmi", "diag"), 0.3, gpu_speed.read_dcgm, "", "diagnosis")
    begun = time.monotonic()
    [problem] = gpu_speed.use(tool, [str(tmp_path)]).problems
    assert time.monotonic() - begun < 4
    assert problem.found == "dcgmi does not answer within 0.3 s"
    assert problem.mend.startswith("a GPU or its driver hangs")


def test_which_tools() -> None:
    def names(*arguments: Any) -> list[str]:
        return [" ".join(tool.command) for tool in gpu_speed.tools(*arguments)]

    assert names("nvidia", "quick", 1) == [
        "nvbandwidth -t device_local_copy host_to_device_memcpy_ce device_to_host_memcpy_ce", "dcgmi diag -r 1 -j",
    ]  # fmt: skip
    assert names("amd", "full", 8) == ["TransferBench p2p", "all_reduce_perf -b 256M -e 4G -f 4 -g 8"]
    assert names("amd", "full", 8, ["bandwidth", "all_reduce"]) == names("", "full", 0) == []


def test_gpus_in_use_are_not_measured() -> None:
    found = gpus.Found((gpus.Gpu(0, "a", 1000, 20), gpus.Gpu(1, "a", 97871, 80000)))
    mend = "stop what runs there (bin/stepladder stop) before it is measured"
    assert gpu_speed.in_use(found) == [
        Problem("memory", "80000 MiB are in use, nothing was measured", mend, "broken", 1)
    ]


def test_the_program_on_torch(tmp_path: Path) -> None:
    """Whoever has torch, prints before the answer, or ends without one."""
    assert torch_runs.command(str(tmp_path), "", "", "", 5) == []
    assert torch_runs.command(str(tmp_path), "/none", "", "", 5) == []
    python = tmp_path / "venvs" / "engine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert list(torch_runs.interpreters(str(tmp_path))) == [str(python)]
    here = [sys.executable]
    echo = "import sys; print('a warning'); print(sys.argv[1])"
    assert torch_runs.answer(here, echo, {"problem": "", "n": 1}, 5) == {"problem": "", "n": 1}
    assert torch_runs.answer(here, "raise SystemExit('no device')", {}, 5) == {
        "problem": "the program on torch ends with 1: no device"
    }
    image = torch_runs.command(str(tmp_path), "", "an/image", "nvidia", 7)
    assert image[-5:] == ["an/image", "-k", "5", "7", "python3"]
    assert {*NVIDIA_CONTAINER} <= {*image}, "as the engines' own containers get GPUs"
    assert "--gpus" not in image


def test_a_container_gets_every_variable_and_no_value_is_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docker is a stand-in that keeps what it was started with."""
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nenv > {tmp_path}/environment\n'
        'echo \'{"gbit": 1.5, "problem": ""}\'\n'
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("NCCL_DEBUG", "NCCL_IB_HCA"):
        monkeypatch.setenv(name, "so that it is taken out again")
    given = {
        "group": {"names": ["a", "b"], "rank": 0, "address": "198.18.0.1", "port": 5301}, "address": "198.18.0.1",
        "program": "", "image": "an/image", "environment": {"NCCL_DEBUG": "marked", "NCCL_IB_HCA": "mlx5_0"},
    }  # fmt: skip
    with patch_module_args(given), pytest.raises(SystemExit):
        all_reduce.main()
    assert json.loads(capsys.readouterr().out)["gbit"] == 1.5
    arguments = (tmp_path / "arguments").read_text()
    assert "--env NCCL_DEBUG " in arguments
    assert arguments.count("--env NCCL_IB_HCA ") == 1
    assert "marked" not in arguments
    assert {"NCCL_DEBUG=marked", "NCCL_IB_HCA=mlx5_0"} <= {*(tmp_path / "environment").read_text().splitlines()}


# ---- who is slow -----------------------------------------------------------------------------------------------------


def result(text: str, read: Any, name: str, memory: int, count: int = 8) -> dict[str, Any]:
    told = read(Ran(text))
    seen = [{"index": index, "name": name, "memory_mib": memory} for index in range(count)]
    return {"gpus": seen, **gpu_speed.as_json([told])}


def h100(text: str) -> dict[str, Any]:
    return result(text, gpu_speed.read_nvbandwidth, "NVIDIA H100 80GB HBM3", 81559)


def found(rows: tuple[Row, ...]) -> list[tuple[str, str, str, str]]:
    return [(row.node, row.part, row.found, row.needed) for row in rows]


def test_the_recorded_bad_link_of_an_mi350x_is_named() -> None:
    name = "AMD Instinct MI350X"
    told = result(said("transferbench-p2p-mi350x.txt"), gpu_speed.read_transferbench, name, 294896)
    assert found(gpu_acceptance.judge({"n1": told}, {}, KNOWN)) == [
        ("n1", "GPU 7 to GPU 1", "46.7 GB/s", "85% of 57.5 GB/s, the middle one")
    ]


def test_sound_h100() -> None:
    assert gpu_acceptance.judge({"n1": h100(said("nvbandwidth-8xh100.txt"))}, {"n1": "h100"}, KNOWN) == ()


def test_a_gpu_slow_to_all_its_peers_is_named_once() -> None:
    told = h100(said("nvbandwidth-8xh100.txt"))
    for one in told["figures"]:
        if 3 in (one["gpu"], one["peer"]):
            one["value"] = 26.0
    assert found(gpu_acceptance.judge({"n1": told}, {"n1": "h100"}, KNOWN)) == [
        ("n1", "GPU 3, all its peers", "26.0 GB/s", "60% of 450 GB/s")
    ]


def test_one_that_is_far_below_its_equals_on_other_nodes() -> None:
    def node(memory: float) -> dict[str, Any]:
        figure = {"kind": "memory", "gpu": 0, "peer": None, "value": memory, "tool": "nvbandwidth"}
        return {"gpus": [{"index": 0, "name": "NVIDIA H100 80GB HBM3", "memory_mib": 81559}], "figures": [figure]}

    rows = gpu_acceptance.judge({"a": node(2900), "b": node(2400), "c": node(2910)}, {}, KNOWN)
    assert found(rows) == [("b", "GPU 0, memory", "2400 GB/s", "85% of 2900 GB/s, the middle one")]
    rows = gpu_acceptance.judge({"a": node(2000)}, {}, KNOWN)
    assert found(rows) == [("a", "GPU 0, memory", "2000 GB/s", "70% of 3350 GB/s")]


def test_gpus_that_are_declared_and_not_there() -> None:
    rows = gpu_acceptance.judge({"a": {"gpus": []}, "b": {"gpus": []}}, {"a": "h200", "b": "cpu"}, KNOWN)
    assert [(row.node, row.part, row.found, row.needed, row.severity) for row in rows] == [
        ("a", "GPUs", "no tool of a vendor lists any", "8 x NVIDIA H200 SXM (141 GB)", "broken")
    ]


def test_problems_become_rows() -> None:
    problem = Problem("diagnosis", "dcgmi is not there", "apt-get install it", "unmeasured")
    told = {"gpus": [{"index": 0, "name": "x", "memory_mib": 1}], "problems": [problem._asdict()]}
    [row] = gpu_acceptance.judge({"a": told}, {}, KNOWN)
    assert row == Row(
        node="a", part="diagnosis", found="dcgmi is not there", mend="apt-get install it", severity="unmeasured"
    )


def test_every_type_with_gpus_has_its_figures() -> None:
    assert [gpu.name for gpu in KNOWN.values() if (gpu.speed is None) != (gpu.vendor == "cpu")] == []


def test_the_module_on_a_machine_without_gpus(tmp_path: Path) -> None:
    """Run as Ansible runs it."""
    module = ROOT / "plugins" / "modules" / "gpu_speed.py"
    arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {"level": "full", "program": "1"}})
    environ = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(module)], input=arguments, env=environ, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert (answer["vendor"], answer["gpus"], answer["figures"], answer["problems"]) == ("", [], [], [])


def test_asking_keeps_its_answers() -> None:
    """`ask` is `run` with another exit status taken as no answer."""
    assert asking.run(["sh", "-c", "echo a; echo b >&2; exit 3"]) == Ran("a\n", "b\n", 3)
    assert asking.ask(["sh", "-c", "echo a; echo b >&2; exit 3"]) == ("", "sh ends with 3: b")
    assert asking.run(["cat"], given="text") == Ran("text")


# ---- the lab's stand-ins ---------------------------------------------------------------------------------------------


def stood_in(tmp_path: Path, gpu: str, **faults: Any) -> dict[str, Any]:
    """What the whole node's part finds with a lab's stand-ins of a GPU type."""
    content = {**stand_ins.data(gpu, "node1"), **faults}
    (tmp_path / "gpus.json").write_text(json.dumps(content))
    vendor = stand_ins.entry(gpu)["vendor"]
    told = [gpu_speed.use(tool, [str(stand_ins.FOLDER)]) for tool in gpu_speed.tools(vendor, "full", 8)]
    seen = [{"index": one["index"], "name": one["product"], "memory_mib": one["memory_mib"]} for one in content["gpus"]]
    return {"gpus": seen, **gpu_speed.as_json(told)}


@pytest.fixture
def lab_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPLADDER_LAB_GPUS", str(tmp_path / "gpus.json"))
    return tmp_path


@pytest.mark.parametrize("gpu", [name for name, one in KNOWN.items() if one.gpus_per_node == 8])
def test_sound_stand_ins_are_accepted(gpu: str, lab_gpus: Path) -> None:
    told = stood_in(lab_gpus, gpu)
    kinds = {one["kind"] for one in told["figures"]}
    assert kinds >= {"memory", "to_gpu", "from_gpu", "peer", "all_reduce"}
    assert gpu_acceptance.judge({"node1": told}, {"node1": gpu}, KNOWN) == ()


def test_faults_of_stand_ins_are_named(lab_gpus: Path) -> None:
    slow = [{"kind": "memory", "gpu": 3, "share": 0.5}, {"kind": "peer", "gpu": 5, "share": 0.2}]
    failing = [{"test": "memory", "gpu": 2, "warning": "an uncorrectable error"}]
    told = stood_in(lab_gpus, "h200", slow=slow, failing=failing)
    assert found(gpu_acceptance.judge({"node1": told}, {}, KNOWN)) == [
        ("node1", "GPU 2, DCGM's test memory", "an uncorrectable error", ""),
        ("node1", "GPU 3, memory", "1992 GB/s", "70% of 4800 GB/s"),
        ("node1", "GPU 5, all its peers", "73.8 GB/s", "60% of 450 GB/s"),
    ]
    told = stood_in(lab_gpus, "mi355x", slow=[{"kind": "all_reduce", "gpu": 0, "share": 0.4}])
    assert [row[1] for row in found(gpu_acceptance.judge({"node1": told}, {}, KNOWN))] == ["all-reduce in the node"]
