"""How well a node's GPUs are: memory errors, links, lanes, what the driver asks for; from the vendors' tools.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from ansible_collections.stepladder.core.plugins.module_utils import asking

NVIDIA_ALL = ("nvidia-smi", "-q", "-x")
NVIDIA_LINKS = ("nvidia-smi", "nvlink", "-s")
NVIDIA_TOPOLOGY = ("nvidia-smi", "topo", "-m")
AMD_METRIC = ("amd-smi", "metric", "--pcie", "--ecc", "--json")
AMD_BUS = ("amd-smi", "static", "--bus", "--json")
AMD_TOPOLOGY = ("amd-smi", "topology", "--access", "--link-type", "--json")
# Each question makes the driver look at every GPU; without persistence mode it starts each of them anew for that.
SECONDS = 60.0
# Reasons for low clocks that the hardware gives itself: heat, power supply, an external brake.
SLOWED_BY_HARDWARE = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


@dataclass(frozen=True)
class Health:
    """One GPU's state; None, or empty, where the tool does not tell.

    Args:
        uncorrectable: memory errors that could not be corrected, since the driver was loaded.
        uncorrectable_ever: the same over the GPU's life.
        remap_pending, remap_failed: of memory rows (pages on older GPUs) that are to be taken out of use.
        asks_for: what the driver says has to be done, such as `Reset`.
        fabric: state of the NVSwitch fabric, such as `Completed`, with what is wrong with it.
        slowed: why the hardware holds the clocks down.
        links: NVLink links that are up.
        peers: by GPU, how it is joined to this one, such as `NV18`, `SYS`, `XGMI`, `PCIE`.
    """

    index: int
    bus: str = ""
    ecc: str = ""
    uncorrectable: int | None = None
    uncorrectable_ever: int | None = None
    remap_pending: bool = False
    remap_failed: bool = False
    remapped_rows: int | None = None
    asks_for: str = ""
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    mig: str = ""
    persistence: str = ""
    compute_mode: str = ""
    fabric: str = ""
    slowed: tuple[str, ...] = ()
    links: int | None = None
    peers: Mapping[int, str] | None = None


@dataclass(frozen=True)
class FoundHealth:
    """What was found out of all GPUs, and by question what could not be: the reason."""

    gpus: tuple[Health, ...] = ()
    unread: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong with a GPU; `serious` when it must not serve as it is."""

    what: str
    found: str
    needed: str
    mend: str
    serious: bool = True


# ---- pure: the tools' texts ------------------------------------------------------------------------------------------


def parse_nvidia_xml(text: str) -> list[Health]:
    """Read `nvidia-smi -q -x`, layouts 11 to 13.

    Raises:
        ValueError: it is not whole.
    """
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - nvidia-smi's own answer
    except ElementTree.ParseError as error:
        raise ValueError(f"its XML is not whole: {error}") from error
    return [_nvidia_gpu(index, gpu) for index, gpu in enumerate(root.findall("gpu"))]


def _nvidia_gpu(index: int, gpu: ElementTree.Element) -> Health:
    def told(path: str) -> str:
        value = (gpu.findtext(path) or "").strip()
        return "" if value in {"N/A", "[N/A]", "None"} or value.startswith("Requested functionality") else value

    def count(path: str) -> int | None:
        value = told(path).rstrip("x")
        return int(value) if value.isdigit() else None

    reset = "Reset" if told("gpu_reset_status/reset_required") == "Yes" else ""
    rows = [count("remapped_rows/remapped_row_corr"), count("remapped_rows/remapped_row_unc")]
    return Health(
        index,
        bus=told("pci/pci_bus_id"),
        ecc=told("ecc_mode/current_ecc"),
        uncorrectable=_uncorrectable(gpu.find("ecc_errors/volatile")),
        uncorrectable_ever=_uncorrectable(gpu.find("ecc_errors/aggregate")),
        remap_pending="Yes" in {told("remapped_rows/remapped_row_pending"), told("retired_pages/pending_retirement")},
        remap_failed="Yes" in {told("remapped_rows/remapped_row_failure"), told("ecc_errors/unrepairable_memory")},
        remapped_rows=sum(row for row in rows if row is not None) if any(row is not None for row in rows) else None,
        asks_for=told("gpu_recovery_action") or reset,
        pcie_width=count("pci/pci_gpu_link_info/link_widths/current_link_width"),
        pcie_width_most=count("pci/pci_gpu_link_info/link_widths/max_link_width"),
        mig=told("mig_mode/current_mig"),
        persistence=told("persistence_mode"),
        compute_mode=told("compute_mode"),
        fabric=_fabric(told("fabric/state"), told("fabric/status"), told("fabric/health/summary")),
        slowed=tuple(_slowed(gpu)),
    )


def _uncorrectable(errors: ElementTree.Element | None) -> int | None:
    """The sum of what cannot be corrected: the names of its parts changed from layout to layout."""
    if errors is None:
        return None
    parts = [part.text or "" for part in errors if "_uncorrectable" in part.tag]
    parts += [part.text or "" for part in errors.findall("double_bit/total")]
    counts = [int(part) for part in parts if part.strip().isdigit()]
    return sum(counts) if counts else None


def _fabric(state: str, status: str, health: str) -> str:
    wrong = [word for word in (status, health) if word not in {"", "Success", "Healthy"}]
    return f"{state} ({', '.join(wrong)})" if wrong else state


def _slowed(gpu: ElementTree.Element) -> Iterator[str]:
    for block in ("clocks_event_reasons", "clocks_throttle_reasons"):
        for reason in gpu.find(block) or ():
            name = reason.tag.partition("_reason_")[2]
            if name in SLOWED_BY_HARDWARE and (reason.text or "").strip() == "Active":
                yield name


def parse_nvlink(text: str) -> dict[int, int]:
    """Read `nvidia-smi nvlink -s`: by GPU, the number of links that are up; GPUs without NVLink are left out."""
    up: dict[int, int] = {}
    gpu = -1
    for line in text.splitlines():
        heading = re.match(r"GPU (\d+):", line)
        if heading:
            gpu = int(heading[1])
        link = re.match(r"\s+Link \d+: (.*)", line)
        if link and gpu >= 0:
            up[gpu] = up.get(gpu, 0) + (re.match(r"[\d.]+ GB/s", link[1]) is not None and float(link[1].split()[0]) > 0)
    return up


def parse_topology(text: str) -> dict[int, dict[int, str]]:
    """Read `nvidia-smi topo -m`: by GPU, how each other GPU is joined to it."""
    lines = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]
    heading = next((words for words in lines if words[0] == "GPU0"), [])
    columns = [int(word[3:]) for word in heading if re.fullmatch(r"GPU\d+", word)]
    found: dict[int, dict[int, str]] = {}
    for words in lines:
        if words is not heading and re.fullmatch(r"GPU\d+", words[0]) and len(words) > len(columns):
            gpu = int(words[0][3:])
            found[gpu] = {other: how for other, how in zip(columns, words[1:]) if other != gpu}  # noqa: B905
    return found


def parse_amd_health(metric: str, bus: str = "", topology: str = "") -> list[Health]:
    """Read the answers to `AMD_METRIC`, `AMD_BUS` and `AMD_TOPOLOGY`."""
    most = {entry["gpu"]: entry.get("bus") or {} for entry in _amd_entries(bus)}
    peers = {entry["gpu"]: _amd_peers(entry) for entry in _amd_entries(topology)}
    found = []
    for entry in _amd_entries(metric):
        index, pcie, ecc = entry["gpu"], entry.get("pcie") or {}, entry.get("ecc") or {}
        found.append(
            Health(
                index,
                bus=_text(most.get(index, {}).get("bdf")),
                uncorrectable=_count(ecc.get("total_uncorrectable_count")),
                pcie_width=_count(pcie.get("width")),
                pcie_width_most=_count(most.get(index, {}).get("max_pcie_width")),
                peers=peers.get(index),
            )
        )
    return found


def _amd_peers(entry: Mapping[str, Any]) -> dict[int, str]:
    return {
        link["gpu"]: _text(link.get("link_type")) + (" (disabled)" if link.get("link_status") == "DISABLED" else "")
        for link in entry.get("links") or ()
        if isinstance(link, dict) and isinstance(link.get("gpu"), int) and link["gpu"] != entry["gpu"]
    }


def _amd_entries(text: str) -> list[dict[str, Any]]:
    start = re.search(r"^[ \t]*[\[{]", text, re.MULTILINE)
    try:
        document = json.JSONDecoder().raw_decode(text[start.end() - 1 :])[0] if start else []
    except ValueError:
        return []
    if isinstance(document, dict):
        document = document.get("gpu_data", [document])
    if not isinstance(document, list):
        return []
    return [entry for entry in document if isinstance(entry, dict) and isinstance(entry.get("gpu"), int)]


def _count(value: object) -> int | None:
    if isinstance(value, dict):
        value = value.get("value")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str:
    return "" if value in (None, "N/A") else str(value)


# ---- pure: what is wrong ---------------------------------------------------------------------------------------------


def troubles(found: Sequence[Health], whole_gpus: bool) -> Iterator[Trouble]:
    """All that is wrong with a node's GPUs.

    Args:
        found: the GPUs.
        whole_gpus: whether a deployment wants them undivided.
    """
    for gpu in found:
        yield from _memory(gpu)
        yield from _driver(gpu, whole_gpus)
    yield from _links(found)
    yield from _lanes(found)


def _memory(gpu: Health) -> Iterator[Trouble]:
    """Source: NVIDIA, GPU Memory Error Management."""
    name = f"memory of GPU {gpu.index}"
    if gpu.remap_failed:
        yield Trouble(name, "a bad row could not be replaced", "sound memory", "have the GPU replaced (RMA)")
    if gpu.remap_pending:
        mend = f"reset the GPU (nvidia-smi --gpu-reset -i {gpu.index}) or restart the node"
        yield Trouble(name, "a bad row waits to be replaced", "none waiting", mend)
    if gpu.uncorrectable:
        mend = "reset the GPU or restart the node, and test it; have it replaced when they come back"
        yield Trouble(
            name, f"{gpu.uncorrectable} errors that could not be corrected", "0 since the driver's start", mend
        )
    elif gpu.uncorrectable_ever:
        found = f"{gpu.uncorrectable_ever} errors in its life that could not be corrected"
        yield Trouble(name, found, "0", "keep an eye on it: none since the driver's start", serious=False)


def _driver(gpu: Health, whole_gpus: bool) -> Iterator[Trouble]:
    name = f"GPU {gpu.index}"
    if gpu.asks_for:
        yield Trouble(name, f"its driver asks for: {gpu.asks_for}", "nothing to be asked for", "do that, idle")
    if gpu.compute_mode == "Prohibited":
        mend = f"nvidia-smi -c 0 -i {gpu.index}"
        yield Trouble(name, "compute mode Prohibited: no process may use it", "Default", mend)
    if gpu.mig == "Enabled" and whole_gpus:
        yield Trouble(name, "divided (MIG)", "a whole GPU", f"nvidia-smi -mig 0 -i {gpu.index}, idle")
    if gpu.fabric and gpu.fabric != "Completed":
        mend = "start the fabric manager of exactly the driver's version (systemctl status nvidia-fabricmanager)"
        yield Trouble(f"NVSwitch fabric of GPU {gpu.index}", gpu.fabric, "Completed", mend)
    if gpu.slowed:
        mend = "see to its cooling and power supply (nvidia-smi -q -d PERFORMANCE)"
        yield Trouble(f"clocks of GPU {gpu.index}", f"held down: {', '.join(gpu.slowed)}", "free", mend, serious=False)
    if gpu.persistence == "Disabled":
        mend = (
            "systemctl enable --now nvidia-persistenced; where its unit has --no-persistence-mode (Ubuntu's own), give "
            "it an ExecStart without that (systemctl edit)"
        )
        yield Trouble(name, "persistence mode is off: each first use starts it anew", "on", mend, serious=False)


def _links(found: Sequence[Health]) -> Iterator[Trouble]:
    """GPUs of one node have the same number of links, whatever that is: a bridge uses 12 of 18."""
    links = {gpu.index: gpu.links for gpu in found if gpu.links is not None}
    most = max(links.values(), default=0)
    mend = "see the kernel's log for Xid 74 and SXid, restart the fabric manager, then the node"
    for index, up in links.items():
        if up < most:
            yield Trouble(f"NVLink of GPU {index}", f"{up} links up", f"{most} as on its neighbours", mend)
    kinds = {(gpu.index, other): how for gpu in found for other, how in (gpu.peers or {}).items()}
    fast = {how for how in kinds.values() if re.fullmatch(r"NV\d+|XGMI", how)}
    for (index, other), how in kinds.items():
        if fast and how not in fast and index < other:
            name = f"GPU {index} to GPU {other}"
            yield Trouble(name, f"joined by {how}", f"{' or '.join(sorted(fast))} as others", mend)


def _lanes(found: Sequence[Health]) -> Iterator[Trouble]:
    for gpu in found:
        if gpu.pcie_width and gpu.pcie_width_most and gpu.pcie_width < gpu.pcie_width_most:
            mend = "reseat the card or its riser; some machines and virtual ones give fewer lanes by design"
            needed = f"x{gpu.pcie_width_most}, which both ends can do"
            yield Trouble(f"PCIe lanes of GPU {gpu.index}", f"x{gpu.pcie_width}", needed, mend, serious=False)


# ---- the node --------------------------------------------------------------------------------------------------------


def find(vendor: str) -> FoundHealth:
    """Ask the vendor's tool."""
    return _find_nvidia() if vendor == "nvidia" else _find_amd()


def _find_nvidia() -> FoundHealth:
    unread: dict[str, str] = {}
    text = _ask(NVIDIA_ALL, unread)
    try:
        gpus = parse_nvidia_xml(text) if text else []
    except ValueError as error:
        gpus, unread[" ".join(NVIDIA_ALL)] = [], str(error)
    if any("does not answer" in reason for reason in unread.values()):
        return FoundHealth(tuple(gpus), unread)  # one that hangs is not asked again
    links = parse_nvlink(_ask(NVIDIA_LINKS, unread)) if len(gpus) > 1 else {}
    peers = parse_topology(_ask(NVIDIA_TOPOLOGY, unread)) if len(gpus) > 1 else {}
    known = [replace(gpu, links=links.get(gpu.index), peers=peers.get(gpu.index)) for gpu in gpus]
    return FoundHealth(tuple(known), unread)


def _find_amd() -> FoundHealth:
    unread: dict[str, str] = {}
    metric = _ask(AMD_METRIC, unread)
    if not metric:
        return FoundHealth((), unread)
    found = parse_amd_health(metric, _ask(AMD_BUS, unread), _ask(AMD_TOPOLOGY, unread))
    return FoundHealth(tuple(found), unread)


def _ask(command: Sequence[str], unread: dict[str, str]) -> str:
    text, problem = asking.ask(command, SECONDS)
    if problem:
        unread[" ".join(command)] = problem
    return str(text)
