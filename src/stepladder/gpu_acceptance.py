"""Which GPUs are slow or broken: their figures against the catalogue's, and against those of their equals.

Rows of this module are what `acceptance` tells of everything; those of the network are made in `acceptance`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stepladder.catalogue import Gpu

Severity = Literal["slow", "broken", "unmeasured", "warning"]
# GPUs of one type under one load differ by a few percent; a link of an MI350X that was bad had 81 % of the others.
EQUALS_SHARE = 0.85
FEWEST_EQUALS = 3
MEMORY_TOLERANCE = 0.02
UNITS = {"matrix": "TFLOPS", "stress": "GFLOPS"}
NAMES = {
    "memory": "memory",
    "to_gpu": "host to GPU",
    "from_gpu": "GPU to host",
    "peer": "to a peer",
    "all_reduce": "all-reduce in the node",
    "matrix": "matrix rate (bf16)",
    "stress": "DCGM's matrix rate",
}
# What recordings reach of the catalogued figure, with room: nvbandwidth 83 % of a GB200's memory and 82 % between H100,
# TransferBench 53 % of an MI350X's memory, 75 % between and 70 % from the host; rccl-tests 68 % of its fabric.
SHARES = {"to_gpu": 0.55, "from_gpu": 0.55, "peer": 0.6, "all_reduce": 0.5, "matrix": 0.35}
MEMORY_SHARES = {"nvbandwidth": 0.7, "TransferBench": 0.4}
MEND = {
    "memory": "look at its clocks, its temperature and its rows to be replaced: bin/stepladder preflight",
    "to_gpu": "look at its PCIe lanes (preflight), at ACS and IOMMU, and at the board's slots",
    "from_gpu": "look at its PCIe lanes (preflight), at ACS and IOMMU, and at the board's slots",
    "peer": "look at its NVLink or XGMI links: bin/stepladder preflight",
    "all_reduce": "look at the links of all GPUs (preflight); run all_reduce_perf with NCCL_DEBUG=INFO",
    "matrix": "look at its clocks, power limit and temperature: bin/stepladder preflight",
    "stress": "look at its clocks, power limit and temperature: bin/stepladder preflight",
}


class Row(BaseModel):
    """One thing that is slow, broken or was not measured; `mend` is what to look at or to do."""

    model_config = ConfigDict(frozen=True)

    node: str
    part: str
    found: str
    needed: str = ""
    mend: str = ""
    severity: Severity = "slow"


class Figure(BaseModel):
    """A measurement as `stepladder.core.gpu_speed` returns it, with the node's name."""

    model_config = ConfigDict(frozen=True)

    node: str
    kind: str
    gpu: int | None = None
    peer: int | None = None
    value: float
    tool: str

    @property
    def part(self) -> str:
        """Of the node, for people."""
        if self.gpu is None:
            return NAMES[self.kind]
        other = f" GPU {self.peer}" if self.peer is not None else ""
        name = "to" if self.kind == "peer" else f"{NAMES[self.kind]},"
        return f"GPU {self.gpu} {name}{other}" if other else f"GPU {self.gpu}, {NAMES[self.kind]}"


def figures(results: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """All of all nodes, in their order."""
    return [Figure(node=node, **one) for node, result in results.items() for one in result.get("figures") or ()]


def judge(
    results: Mapping[str, Mapping[str, Any]], declared: Mapping[str, str], known: Mapping[str, Gpu]
) -> tuple[Row, ...]:
    """Everything that is wrong with the nodes' GPUs.

    Args:
        results: by node, what `stepladder.core.gpu_speed` returned.
        declared: by node, the inventory's GPU type; empty or missing where it names none.
        known: the catalogue's GPU types.
    """
    rows = []
    types = {node: type_of(result.get("gpus") or (), declared.get(node, ""), known) for node, result in results.items()}
    for node, result in results.items():
        for one in result.get("problems") or ():
            part = one["what"] if one["gpu"] is None else f"GPU {one['gpu']}, {one['what']}"
            rows.append(Row(node=node, part=part, found=one["found"], mend=one["mend"], severity=one["severity"]))
        rows += _missing(node, result, known.get(declared.get(node, "")))
    every = figures(results)
    equals: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in every:
        gpu = types[figure.node]
        names = {str(one["name"]) for one in results[figure.node].get("gpus") or ()}
        equals.setdefault((gpu.name if gpu else ", ".join(sorted(names)), figure.kind, figure.tool), []).append(figure)
    for group in equals.values():
        rows += _slow(group, types)
    order = list(results)
    return tuple(sorted(rows, key=lambda row: order.index(row.node)))


def type_of(found: Sequence[Mapping[str, Any]], declared: str, known: Mapping[str, Gpu]) -> Gpu | None:
    """The catalogue's type: the declared one, else the one whose name and memory the vendor's tool reports."""
    if not found:
        return None
    if declared in known:
        return known[declared]
    name, memory = str(found[0].get("name")), found[0].get("memory_mib") or 0
    for gpu in known.values():
        same = gpu.reported_as and re.search(rf"\b{re.escape(gpu.reported_as)}\b", name, re.IGNORECASE)
        if same and gpu.memory_mib and abs(gpu.memory_mib - memory) <= MEMORY_TOLERANCE * gpu.memory_mib:
            return gpu
    return None


def _missing(node: str, result: Mapping[str, Any], gpu: Gpu | None) -> Iterator[Row]:
    """GPUs that the inventory declares and no tool lists."""
    count = len(result.get("gpus") or ())
    if gpu is None or gpu.vendor == "cpu" or result.get("problems") or count == gpu.gpus_per_node:
        return
    mend = "see whether one fell off the bus (dmesg), or is partitioned; deployment_gpu declares the type"
    found = f"{count} of them" if count else "no tool of a vendor lists any"
    yield Row(
        node=node, part="GPUs", found=found, needed=f"{gpu.gpus_per_node} x {gpu.title}", mend=mend, severity="broken"
    )


def _slow(group: Sequence[Figure], types: Mapping[str, Gpu | None]) -> Iterator[Row]:
    """Of figures of one kind, tool and type: below the catalogue's share, or far below the middle one."""
    middle = statistics.median(one.value for one in group)
    floor = EQUALS_SHARE * middle if len(group) >= FEWEST_EQUALS else 0.0
    why = f"{EQUALS_SHARE:.0%} of {show(group[0].kind, middle)}, the middle one"
    slow: dict[Figure, str] = {}
    for one in group:
        most = _most(types[one.node], one.kind)
        share = MEMORY_SHARES.get(one.tool, 0.0) if one.kind == "memory" else SHARES.get(one.kind, 0.0)
        if most and one.value < share * most:
            slow[one] = f"{share:.0%} of {show(one.kind, most)}"
        elif one.value < floor:
            slow[one] = why
    for node, gpu in dict.fromkeys((one.node, one.gpu) for one in slow if one.peer is not None):
        own = [one for one in group if one.node == node and gpu in {one.gpu, one.peer}]
        bad = [one for one in own if one in slow]
        if len(own) > 2 and len(bad) == len(own):
            best = max(own, key=lambda one: one.value)
            part = f"GPU {gpu}, all its peers"
            yield _row(best, part, slow[best])
            slow = {one: reason for one, reason in slow.items() if one not in bad}
    for one, reason in slow.items():
        yield _row(one, one.part, reason)


def _row(figure: Figure, part: str, needed: str) -> Row:
    return Row(
        node=figure.node, part=part, found=show(figure.kind, figure.value), needed=needed, mend=MEND[figure.kind]
    )


def _most(gpu: Gpu | None, kind: str) -> float | None:
    if gpu is None or gpu.speed is None:
        return None
    speed = gpu.speed
    return {
        "memory": speed.memory_gb_s,
        "to_gpu": speed.host_gb_s,
        "from_gpu": speed.host_gb_s,
        "peer": speed.peer_gb_s,
        "all_reduce": speed.fabric_gb_s,
        "matrix": speed.bf16_tflops,
    }.get(kind)


def show(kind: str, value: float) -> str:
    """For people: 371 GB/s, 57.5 GB/s, 650 TFLOPS."""
    digits = 0 if value >= 100 else 1
    return f"{value:.{digits}f} {UNITS.get(kind, 'GB/s')}"


def summary(every: Sequence[Figure]) -> list[str]:
    """A line for each node and kind: the least and the most of its GPUs, and between them."""
    groups: dict[tuple[str, str], list[float]] = {}
    for one in every:
        groups.setdefault((one.node, one.kind), []).append(one.value)
    width = max((len(node) for node, _ in groups), default=0)
    column = max((len(NAMES[kind]) for _, kind in groups), default=0)
    lines = []
    for (node, kind), values in groups.items():
        low, high = show(kind, min(values)), show(kind, max(values))
        lines.append(f"{node:<{width}}  {NAMES[kind]:<{column}}  {low if low == high else f'{low} to {high}'}")
    return lines
