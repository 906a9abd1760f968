"""How fast a node's GPUs are, by the vendors' own tools: memory, host, peers, all-reduce, and DCGM's diagnosis.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.

The tools: `nvbandwidth` and `dcgmi diag` of NVIDIA, `TransferBench p2p` of AMD, and `all_reduce_perf`, which is one
program for both (nccl-tests, rccl-tests). None of this was run on a GPU; the parsers read recorded output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ansible_collections.stepladder.core.plugins.module_utils import asking, gpus, torch_runs

# Where these tools end up when they are built as their own pages say, beside where packages put them.
FOLDERS = (
    *gpus.TOOL_PATHS, "/usr/local/bin", "/usr/local/cuda/bin", "/opt/nvbandwidth", "/opt/nccl-tests/build",
    "/opt/rccl-tests/build", "/opt/TransferBench",
)  # fmt: skip
# DCGM_ERROR_CONFIG: somebody has to set something, nothing is broken.
DCGM_SETTING = 5
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
MATRIX_SECONDS = 180


class Figure(NamedTuple):
    """One measurement. kind: memory, to_gpu, from_gpu, peer, all_reduce (GB/s), stress (GFLOPS) or matrix (TFLOPS)."""

    kind: str
    gpu: int | None
    value: float
    tool: str
    peer: int | None = None


class Problem(NamedTuple):
    """Why something was not measured, or what a tool finds wrong. severity: broken, warning or unmeasured."""

    what: str
    found: str
    mend: str
    severity: str = "broken"
    gpu: int | None = None


class Told(NamedTuple):
    """What a tool's answer says."""

    figures: Sequence[Figure] = ()
    problems: Sequence[Problem] = ()


# ---- pure: the tools' texts ------------------------------------------------------------------------------------------

_NVBANDWIDTH = {
    "device_local_copy": "memory",
    "host_to_device_memcpy_ce": "to_gpu",
    "device_to_host_memcpy_ce": "from_gpu",
    "device_to_device_memcpy_read_ce": "peer",
}
_VALUE = r"(?:\d+\.\d+|N/A)"
_ROW = re.compile(rf"^\s*(\d+)((?:\s+{_VALUE})+)\s*$")


def parse_nvbandwidth(text: str) -> list[Figure]:
    """Read nvbandwidth's matrices, as versions 0.4 to 0.10 print them.

    A copy inside a GPU's memory reads and writes each byte, and is counted once: an RTX 3050 with 192 GB/s tells 84.
    Of several host nodes the best counts, which is the GPU's own.
    """
    best: dict[tuple[str, int, int | None], float] = {}
    kind = ""
    for line in text.splitlines():
        started = re.match(r"^Running (\w+)\.", line)
        if started:
            kind = _NVBANDWIDTH.get(started[1], "")
        row = _ROW.match(line)
        if not row or not kind:
            continue
        for column, cell in enumerate(row[2].split()):
            gpu, peer = (int(row[1]), column) if kind == "peer" else (column, None)
            if cell == "N/A" or gpu == peer:
                continue
            value = float(cell) * (2 if kind == "memory" else 1)
            best[kind, gpu, peer] = max(value, best.get((kind, gpu, peer), 0.0))
    return [Figure(kind, gpu, value, "nvbandwidth", peer) for (kind, gpu, peer), value in best.items()]


def read_nvbandwidth(ran: asking.Ran) -> Told:
    """The figures, and where it broke off."""
    figures = parse_nvbandwidth(ran.said)
    broken = re.search(r"^.*(?:ASSERT|ERROR|Invalid value|CUDA_ERROR).*$", ran.said + ran.complained, re.MULTILINE)
    if ran.status == 0 and not broken and figures:
        return Told(figures)
    tests = re.findall(r"^Running (\w+)\.", ran.said, re.MULTILINE)
    where = f" in {tests[-1]}" if tests else ""
    said = broken[0].strip()[: asking.SHOWN] if broken else asking.first_line(ran.complained + ran.said)
    mend = "look at dmesg for Xid and SXid, at nvidia-smi nvlink -s, and at the fabric manager"
    return Told(figures, [Problem("nvbandwidth", f"breaks off{where}: {said}", mend)])


def parse_transferbench(text: str) -> list[Figure]:
    """Read `TransferBench p2p`, its table of one direction at a time.

    A GPU's copy to itself is in its row and column, and reads and writes each byte. Of several CPUs the best counts.
    """
    columns: list[tuple[str, int]] = []
    best: dict[tuple[str, int, int | None], float] = {}
    for line in re.sub(r"[|│]", " ", text).splitlines():
        if line.lstrip().startswith("SRC+EXE"):
            columns = [(word, int(number)) for word, number in re.findall(r"(CPU|GPU) (\d+)", line)]
        row = re.match(rf"^\s*(CPU|GPU) (\d+)\s+->((?:\s+{_VALUE})+)\s*$", line)
        if not columns or not row:
            if line.startswith("Bidirectional"):
                break
            continue
        source, number = row[1], int(row[2])
        for (target, other), cell in zip(columns, row[3].split()):  # noqa: B905 - nodes may have Python 3.9
            place = _transfer(source, number, target, other)
            if cell != "N/A" and place:
                value = float(cell) * (2 if place[0] == "memory" else 1)
                best[place] = max(value, best.get(place, 0.0))
    return [Figure(kind, gpu, value, "TransferBench", peer) for (kind, gpu, peer), value in best.items()]


def _transfer(source: str, number: int, target: str, other: int) -> tuple[str, int, int | None] | None:
    if source == target == "CPU":
        return None
    if source == "CPU":
        return "to_gpu", other, None
    if target == "CPU":
        return "from_gpu", number, None
    return ("memory", number, None) if number == other else ("peer", number, other)


def read_transferbench(ran: asking.Ran) -> Told:
    """The figures, and why there are none."""
    figures = parse_transferbench(ran.said)
    broken = re.search(r"^\[ERROR\].*$", ran.said + ran.complained, re.MULTILINE)
    if ran.status == 0 and figures and not broken:
        return Told(figures)
    said = broken[0] if broken else asking.first_line(ran.complained + ran.said)
    mend = "look at dmesg for amdgpu's errors; a build for other GPUs than these says invalid device function"
    return Told(figures, [Problem("TransferBench", f"ends with {ran.status}: {said[: asking.SHOWN]}", mend)])


def read_all_reduce(ran: asking.Ran) -> Told:
    """The bus bandwidth of the largest message in place, of `all_reduce_perf`; and whether sums were wrong."""
    value = None
    for line in ran.said.splitlines():
        cells = line.split()
        if len(cells) >= 12 and cells[0].isdigit() and cells[1].isdigit():
            value = float(cells[-2])
    figures = [] if value is None else [Figure("all_reduce", None, value, "all_reduce_perf")]
    wrong = re.search(r"Out of bounds values : (\d+) FAILED", ran.said)
    look = "look at dmesg for Xid; peer access that corrupts data is the usual cause (IOMMU or ACS on)"
    if wrong:
        return Told(figures, [Problem("all-reduce in the node", f"{wrong[1]} values are wrong", look)])
    if ran.status == 0 and figures:
        return Told(figures)
    said = re.search(r"^.*(?:[Ff]ailure|[Ee]rror|WARN).*$", ran.said + "\n" + ran.complained, re.MULTILINE)
    line = said[0].strip()[: asking.SHOWN] if said else asking.first_line(ran.complained + ran.said)
    mend = "run it by hand with NCCL_DEBUG=INFO; a small /dev/shm and a missing fabric manager end it too"
    return Told(figures, [Problem("all-reduce in the node", f"all_reduce_perf ends with {ran.status}: {line}", mend)])


def read_dcgm(ran: asking.Ran) -> Told:
    """What `dcgmi diag -j` finds, as DCGM 3 (`gpu_ids`) and 4 (`entity_id`) tell it; its status is not 0 for a failure.

    DCGM 4 tells at most 16 lines of information in a run, so not every GPU has its rate (DCGM issue 215).
    """
    document = gpus.parse_json(ran.said) or {}
    keys = ("DCGM Diagnostic", "DCGM GPU Diagnostic")
    root: dict[str, Any] = next((document[key] for key in keys if key in document), {})
    figures: list[Figure] = []
    problems: list[Problem] = []
    passed = 0
    for category in root.get("test_categories") or ():
        for test in category.get("tests") or ():
            for result in test.get("results") or ():
                status = str(result.get("status", "")).lower()
                passed += status == "pass"
                figures += _dcgm_rates(result)
                if status in ("fail", "warn"):
                    problems += _dcgm_problems(str(test.get("name")), result, status)
    if not passed and not problems:
        said = root.get("runtime_error") or asking.first_line(ran.complained + ran.said)
        mend = "dcgmi needs its service: systemctl start nvidia-dcgm; run dcgmi diag -r 1 by hand"
        problems = [Problem("dcgmi diag", f"tested nothing (status {ran.status}): {said}", mend)]
    return Told(figures, problems)


def _dcgm_rates(result: Mapping[str, Any]) -> list[Figure]:
    told = result.get("info") or ()
    text = told if isinstance(told, str) else "\n".join(map(str, told))
    found = re.findall(r"GPU (\d+) calculated at approximately ([\d.]+) gigaflops", text)
    return [Figure("stress", int(gpu), float(rate), "dcgmi") for gpu, rate in found]


def _dcgm_problems(test: str, result: Mapping[str, Any], status: str) -> list[Problem]:
    warnings = [one if isinstance(one, dict) else {"warning": one} for one in _listed(result.get("warnings"))]
    text = "; ".join(str(one.get("warning")) for one in warnings) or "no reason is told"
    settings = bool(warnings) and all(one.get("error_severity") == DCGM_SETTING for one in warnings)
    severity = "warning" if status == "warn" or settings else "broken"
    mend = "mend the setting" if settings else "look at dmesg for Xid, reset the GPU, and have it replaced if it stays"
    known = result.get("entity_group", "GPU") == "GPU"
    named = [result.get("entity_id")] if "entity_id" in result else str(result.get("gpu_ids", "")).split(",")
    indices: list[int | None] = [int(str(one)) for one in named if str(one).isdigit()] if known else []
    what, found = f"DCGM's test {test}", text[: 2 * asking.SHOWN]
    return [Problem(what, found, mend, severity, gpu) for gpu in indices or [None]]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


# ---- which tool for what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A vendor's tool at a level.

    Args:
        command: it and its arguments.
        seconds: after which it is ended.
        read: its answer.
        bring: what puts it onto a node.
        what: the part of the measurements that it is, by which it can be left out.
    """

    command: Sequence[str]
    seconds: float
    read: Callable[[asking.Ran], Told]
    bring: str
    what: str


def tools(vendor: str, level: str, count: int, without: Sequence[str] = ()) -> list[Tool]:
    """What is run on a node, in order.

    Args:
        vendor: nvidia or amd.
        level: quick or full.
        count: GPUs of the node.
        without: parts to leave out.
    """
    full = level == "full"
    found = []
    if vendor == "nvidia":
        tests = [name for name, kind in _NVBANDWIDTH.items() if count > 1 or kind != "peer"]
        found = [
            Tool(
                ("nvbandwidth", "-t", *tests), 300 if full else 45, read_nvbandwidth,
                "build it from github.com/NVIDIA/nvbandwidth", "bandwidth",
            ),
            Tool(
                ("dcgmi", "diag", "-r", "3" if full else "1", "-j"), 2400 if full else 60, read_dcgm,
                "apt-get install datacenter-gpu-manager-4-cuda13 (or -cuda12), from the repository of the driver",
                "diagnosis",
            ),
        ]  # fmt: skip
    elif vendor == "amd":
        found = [
            Tool(
                ("TransferBench", "p2p"), 600 if full else 90, read_transferbench,
                "build it from github.com/ROCm/TransferBench", "bandwidth",
            )
        ]  # fmt: skip
    if full and count > 1 and found:
        name = "NVIDIA/nccl-tests" if vendor == "nvidia" else "ROCm/rccl-tests"
        found.append(
            Tool(
                ("all_reduce_perf", "-b", "256M", "-e", "4G", "-f", "4", "-g", str(count)), 300, read_all_reduce,
                f"build it from github.com/{name}", "all_reduce",
            )
        )  # fmt: skip
    return [tool for tool in found if tool.what not in without]


# ---- the node --------------------------------------------------------------------------------------------------------


def use(tool: Tool, folders: Sequence[str]) -> Told:
    """Run a tool, and say what stands in the way where it gives no answer."""
    name = tool.command[0]
    ran = asking.run(tool.command, tool.seconds, [*folders, *FOLDERS])
    if not ran.problem:
        return tool.read(ran)
    if ran.problem.endswith("is not there"):
        return Told(problems=[Problem(tool.what, ran.problem, tool.bring, "unmeasured")])
    mend = (
        f"a GPU or its driver hangs: look at dmesg, and whether {name} can be ended" if "answer" in ran.problem else ""
    )
    return Told(problems=[Problem(tool.what, ran.problem, mend or f"run {' '.join(tool.command)} by hand")])


def look() -> tuple[str, gpus.Found]:
    """The vendor whose tool finds GPUs, and what it tells; no vendor where neither does."""
    for vendor in ("nvidia", "amd"):
        found = gpus.find(vendor)
        # A tool that is there and fails is a broken driver, which another vendor's does not explain.
        if found.gpus or not found.problem.endswith("is not there"):
            return vendor, found
    return "", gpus.Found()


def in_use(found: gpus.Found) -> list[Problem]:
    """GPUs whose memory is held: figures of them would be wrong, and the tools take all memory."""
    mend = "stop what runs there (bin/stepladder stop) before it is measured"
    return [
        Problem("memory", f"{gpu.used_mib} MiB are in use, nothing was measured", mend, gpu=gpu.index)
        for gpu in found.gpus
        if (gpu.used_mib or 0) > gpus.IDLE_MIB
    ]  # fmt: skip


def as_json(told: Sequence[Told]) -> dict[str, Any]:
    """Of all tools, as the module returns it."""
    plain = {
        "figures": [one._asdict() for answer in told for one in answer.figures],
        "problems": [one._asdict() for answer in told for one in answer.problems],
    }
    return dict(json.loads(json.dumps(plain)))


def matrix(given: Mapping[str, Any], vendor: str) -> Told:
    """The matrix rate of each GPU by our program on torch.

    Args:
        given: program, state_directory, python and image, as the module takes them.
        vendor: of the GPUs.
    """
    what = "matrix"
    command = torch_runs.command(given["state_directory"], given["python"], given["image"], vendor, MATRIX_SECONDS)
    if not command:
        return Told(problems=[Problem(what, torch_runs.MISSING, torch_runs.BRING, "unmeasured")])
    answer = torch_runs.answer(command, given["program"], {"mode": "matrix"}, MATRIX_SECONDS)
    rates = (answer.get("tflops") or {}).items()
    figures = [Figure("matrix", int(gpu), float(rate), "torch") for gpu, rate in rates]
    mend = "run that Python by hand: import torch; torch.cuda.device_count()"
    return Told(figures, [Problem(what, answer["problem"], mend)] if answer["problem"] else [])
