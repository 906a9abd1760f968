"""The vendors' tools on nodes of a declared GPU type: stand-ins, which answer from a file and say so."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from stepladder.catalogue import DEFAULT_DIRECTORY
from stepladder.errors import unknown_name
from stepladder.lab.places import REPOSITORY, LabError

FOLDER = REPOSITORY / "lab" / "stand_ins"
TOOLS = {
    "nvidia": ("nvidia-smi", "nvbandwidth", "dcgmi", "all_reduce_perf"),
    "amd": ("amd-smi", "rocm-smi", "TransferBench", "all_reduce_perf"),
}
# What recordings reach of the catalogued figure: nvbandwidth of GB200 and H100, TransferBench and rccl-tests of MI350X.
SHARES = {
    "nvidia": {"memory": 0.83, "to_gpu": 0.8, "from_gpu": 0.8, "peer": 0.82, "all_reduce": 0.8},
    "amd": {"memory": 0.53, "to_gpu": 0.7, "from_gpu": 0.86, "peer": 0.75, "all_reduce": 0.68},
}
HOST_GB_S = 64
DATA = "/usr/share/stepladder-lab/gpus.json"


def entry(gpu: str, catalog: Path = DEFAULT_DIRECTORY) -> dict[str, Any]:
    """A GPU type's entry in the catalogue.

    Raises:
        LabError: there is none of that name.
    """
    entries = {found["name"]: found for found in yaml.safe_load((catalog / "gpus.yml").read_text(encoding="utf-8"))}
    if gpu not in entries:
        raise LabError(str(unknown_name("GPU type", gpu, entries)))
    return dict(entries[gpu])


def tools(gpu: str) -> tuple[str, ...]:
    """The tools that stand in for a GPU type's own."""
    return TOOLS.get(entry(gpu)["vendor"], ())


def data(gpu: str, node: str, catalog: Path = DEFAULT_DIRECTORY, folder: Path = FOLDER) -> dict[str, Any]:
    """What the tools of a node answer.

    Args:
        gpu: the type's name.
        node: the node's name, from which UUIDs are made up.
        catalog: the catalogue's folder.
        folder: the stand-ins'.
    """
    known = entry(gpu, catalog)
    recorded = {found["name"]: found for found in yaml.safe_load((folder / "gpus.yml").read_text(encoding="utf-8"))}
    seen = recorded.get(gpu, {})
    gpus = []
    for index in range(known["gpus_per_node"]):
        word = hashlib.sha256(f"{node} {index}".encode()).hexdigest()
        uuid = "-".join((word[:8], word[8:12], word[12:16], word[16:20], word[20:32]))
        gpus.append(
            {
                "index": index,
                "uuid": f"GPU-{uuid}" if known["vendor"] == "nvidia" else uuid,
                "product": seen.get("product", known["title"]),
                "memory_mib": seen.get("memory_mib", known["memory_mib"]),
                "driver": seen.get("driver", "0.0.0"),
                "bus_id": f"00000000:{0x10 * (index + 1):02X}:00.0",
                "architecture": known["architecture"],
                "compute_cap": _compute_capability(known["architecture"]),
            }
        )
    return {
        "stand_in": "made by `bin/stepladder lab`; there is no GPU here",
        "gpus": gpus,
        "speed": _speed(known),
        # For tests: [{"kind": "memory", "gpu": 3, "share": 0.5}] and [{"test": "memory", "gpu": 3, "warning": "..."}].
        "slow": [],
        "failing": [],
    }


def _speed(known: dict[str, Any]) -> dict[str, float]:
    """GB/s of a type's GPUs: the catalogue's, times what the tools reach of it."""
    speed = known["speed"]
    host = speed.get("host_gb_s", HOST_GB_S)
    most = {"memory": speed["memory_gb_s"], "to_gpu": host, "from_gpu": host, "peer": speed["peer_gb_s"],
            "all_reduce": speed["fabric_gb_s"]}  # fmt: skip
    return {kind: round(share * most[kind], 2) for kind, share in SHARES[known["vendor"]].items()}


def files(gpu: str, node: str) -> dict[str, tuple[bytes, int]]:
    """What a node of a declared GPU type has: path to content and mode; nothing for a type without GPUs."""
    names = tools(gpu)
    if not names:
        return {}
    found = {f"/usr/bin/{name}": ((FOLDER / name).read_bytes(), 0o755) for name in names}
    found[DATA] = ((json.dumps(data(gpu, node), indent=1) + "\n").encode(), 0o644)
    return found


def _compute_capability(architecture: str) -> str:
    """The compute capability as nvidia-smi writes it: `9.0` for sm_90, `10.3` for sm_103; N/A elsewhere."""
    match = re.fullmatch(r"sm_(\d+)(\d)", architecture)
    return f"{match[1]}.{match[2]}" if match else "N/A"
