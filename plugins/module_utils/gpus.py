"""What the vendors' tools say of a node's GPUs, and how it differs from what a deployment was planned for.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import asking

NVIDIA_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "driver_version", "pci.bus_id")
CSV = "--format=csv,noheader,nounits"
NVIDIA_GPUS = ("nvidia-smi", f"--query-gpu={','.join(NVIDIA_FIELDS)}", CSV)
NVIDIA_USERS = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", CSV)
AMD_STATIC = ("amd-smi", "static", "--asic", "--vram", "--driver", "--json")
AMD_LIST = ("amd-smi", "list", "--json")
AMD_USED = ("amd-smi", "metric", "--mem-usage", "--json")
ROCM_GPUS = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showdriverversion", "--json")
ROCM_RELEASE = "/opt/rocm/.info/version"
TOOL_PATHS = asking.TOOL_PATHS
# Without persistence the driver starts every GPU anew for each question, which takes seconds for each.
TOOL_SECONDS = 60
# Boards of one type report the same memory to the MiB; types that share a name differ by a third and more.
MEMORY_TOLERANCE = 0.02
# An idle GPU shows up to some hundred MiB of its driver's own (28 on an H20 with a display server, 283 on an MI355X).
IDLE_MIB = 1024


@dataclass(frozen=True)
class Gpu:
    """One GPU as its vendor's tool reports it; what the tool does not tell is empty or none."""

    index: int
    name: str
    memory_mib: int | None
    used_mib: int | None = None
    driver: str = ""
    uuid: str = ""
    bus: str = ""


@dataclass(frozen=True)
class User:
    """A process that holds memory of a GPU; deployment: the directory of ours that it belongs to, '' for none."""

    uuid: str
    pid: int
    used_mib: int | None
    deployment: str = ""
    command: str = ""


@dataclass(frozen=True)
class Found:
    """All that was found out; `problem` says why nothing was, `release` is ROCm's where it is told."""

    gpus: tuple[Gpu, ...] = ()
    users: tuple[User, ...] = ()
    problem: str = ""
    tool: str = ""
    release: str = ""


# ---- pure: the tools' texts ------------------------------------------------------------------------------------------


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Read the answer to `NVIDIA_GPUS`; a value that is not told stands in brackets, as in [N/A]."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(NVIDIA_FIELDS) and cells[0].isdigit():
            index, uuid, name, total, used, driver, bus = cells
            gpus.append(Gpu(int(index), name, _number(total), _number(used), driver, uuid, bus))
    return gpus


def parse_nvidia_users(text: str) -> list[User]:
    """Read the answer to `NVIDIA_USERS`."""
    users = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[1].isdigit():
            users.append(User(cells[0], int(cells[1]), _number(cells[2])))
    return users


def parse_amd_smi(static: str, listed: str = "", used: str = "") -> list[Gpu]:
    """Read the answers to `AMD_STATIC`, `AMD_LIST` and `AMD_USED`.

    Since ROCm 6.4 some come as `{"gpu_data": [...]}` instead of a list; what amd-smi calls MB is MiB (an MI300X of
    192 GiB has 196592 of them). Where the kernel's own driver is used, its version is the kernel's whole line.
    """
    places = {entry.get("gpu"): entry for entry in _gpu_entries(listed)}
    usage = {entry.get("gpu"): entry.get("mem_usage") or {} for entry in _gpu_entries(used)}
    gpus = []
    for entry in _gpu_entries(static):
        index = entry.get("gpu")
        if not isinstance(index, int) or not isinstance(entry.get("asic"), dict):
            continue
        place = places.get(index, {})
        version = str((entry.get("driver") or {}).get("version") or "")
        gpus.append(
            Gpu(
                index,
                _told(entry["asic"].get("market_name")),
                _mebibytes((entry.get("vram") or {}).get("size")),
                _mebibytes(usage.get(index, {}).get("used_vram")),
                version if re.fullmatch(r"[\d.]+(-\S+)?", version) else "",
                _told(place.get("uuid")),
                _told(place.get("bdf")),
            )
        )
    return gpus


def parse_rocm_smi(text: str) -> list[Gpu]:
    """Read the answer to `ROCM_GPUS`; the case of its keys changed between releases ("Card series", "Card Series")."""
    document = parse_json(text)
    if not isinstance(document, dict):
        return []
    cards = {name: _lowered(card) for name, card in document.items() if re.fullmatch(r"card\d+", name)}
    driver = _told(_lowered(document.get("system")).get("driver version"))
    return [
        Gpu(
            int(name[4:]),
            _told(card.get("card series")) or _told(card.get("device name")),
            _from_bytes(card.get("vram total memory (b)")),
            _from_bytes(card.get("vram total used memory (b)")),
            driver,
            _told(card.get("unique id")),
        )
        for name, card in sorted(cards.items(), key=lambda item: int(item[0][4:]))
    ]


def _gpu_entries(text: str) -> list[dict[str, Any]]:
    document = parse_json(text)
    if isinstance(document, dict):
        document = document.get("gpu_data", [document])
    return [entry for entry in document if isinstance(entry, dict)] if isinstance(document, list) else []


def parse_json(text: str) -> Any:
    """The JSON in a tool's answer; warnings may stand before it, and after it."""
    for start in re.finditer(r"^[ \t]*[\[{]", text, re.MULTILINE):
        try:
            return json.JSONDecoder().raw_decode(text[start.end() - 1 :])[0]
        except ValueError:
            continue
    return None


def _lowered(card: object) -> dict[str, Any]:
    return {str(key).lower(): value for key, value in card.items()} if isinstance(card, dict) else {}


def _told(value: object) -> str:
    text = str(value or "").strip()
    return "" if text in {"N/A", "None"} else text


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _from_bytes(value: object) -> int | None:
    return int(str(value)) >> 20 if str(value).isdigit() else None


def _mebibytes(size: object) -> int | None:
    """`{"value": 196592, "unit": "MB"}`, the number alone, or N/A."""
    value, unit = (size.get("value"), size.get("unit", "MB")) if isinstance(size, dict) else (size, "MB")
    if not isinstance(value, int):
        return None
    return {"B": value >> 20, "KB": value >> 10, "MB": value, "GB": value << 10}.get(str(unit).upper())


# ---- pure: declared against discovered -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One thing that is not as planned: about what, what was found, what is needed, how to mend it."""

    what: str
    found: str
    needed: str
    mend: str


def differences(found: Found, needed: Mapping[str, Any], deployment: str, runs: bool) -> Iterator[Difference]:
    """How a node's GPUs differ from what a deployment was planned for, all of it.

    Args:
        found: what the tools said.
        needed: vendor, count, model, memory_mib, minimum_driver and indices, as the module's parameter has them.
        deployment: directory of the deployment, whose own processes may hold memory.
        runs: whether processes of it run here.
    """
    plan = "or declare what is there (deployment_gpu, deployment_gpus)"
    if found.problem:
        tool = "the driver and its nvidia-smi" if needed["vendor"] == "nvidia" else "the amdgpu driver and amd-smi"
        yield Difference("GPUs", found.problem, f"{needed['count']} x {needed['model']}", f"install {tool}, {plan}")
        return
    if len(found.gpus) != needed["count"]:
        hint = "see whether one fell off the bus (dmesg) or is partitioned"
        yield Difference("number of GPUs", f"{len(found.gpus)} ({found.tool})", str(needed["count"]), f"{hint}, {plan}")
    yield from _other_types(found, needed, plan)
    yield from _old_driver(found, needed)
    for gpu in found.gpus:
        if gpu.index in needed["indices"] and (gpu.used_mib or 0) > IDLE_MIB:
            yield from _in_use(gpu, found, deployment, runs)


def _other_types(found: Found, needed: Mapping[str, Any], plan: str) -> Iterator[Difference]:
    wanted, word = needed["memory_mib"], re.compile(rf"\b{re.escape(needed['model'])}\b", re.IGNORECASE)
    other: dict[str, list[str]] = {}
    for gpu in found.gpus:
        name_differs = bool(gpu.name) and not word.search(gpu.name)
        memory_differs = gpu.memory_mib is None or abs(gpu.memory_mib - wanted) > wanted * MEMORY_TOLERANCE
        if name_differs or memory_differs:
            memory = "memory not told" if gpu.memory_mib is None else f"{gpu.memory_mib} MiB"
            other.setdefault(f"{gpu.name or 'no name'}, {memory}", []).append(str(gpu.index))
    for kind, indices in other.items():
        needs = f"{needed['model']}, {wanted} MiB within {MEMORY_TOLERANCE:.0%}"
        yield Difference(f"type of GPU {', '.join(indices)}", kind, needs, f"use nodes of one type, {plan}")


def _old_driver(found: Found, needed: Mapping[str, Any]) -> Iterator[Difference]:
    floor = needed.get("minimum_driver")
    if not floor:
        return
    nvidia = needed["vendor"] == "nvidia"
    versions = sorted({gpu.driver for gpu in found.gpus if gpu.driver}) if nvidia else [found.release or ""]
    old = [version for version in versions if version and numbers(version) < numbers(floor)]
    if old:
        kind = "driver" if nvidia else "ROCm"
        mend = f"install {kind} {floor} or newer, or plan an older release (deployment_engine_version)"
        yield Difference(kind, ", ".join(old), f"{floor} or newer", mend)


def _in_use(gpu: Gpu, found: Found, deployment: str, runs: bool) -> Iterator[Difference]:
    users = [user for user in found.users if user.uuid == gpu.uuid]
    strangers = [user for user in users if user.deployment != deployment]
    if not strangers and (users or runs):
        return  # this deployment's own, which a deploy replaces
    who = "; ".join(_holder(user) for user in strangers) or "by no process that can be seen from here"
    mend = (
        "stop them" if strangers else "find it (a container, another user's: fuser -v /dev/nvidia* /dev/kfd, as root)"
    )
    yield Difference(f"memory of GPU {gpu.index}", f"{gpu.used_mib} MiB in use {who}", "idle", f"{mend}, or wait")


def _holder(user: User) -> str:
    of = f" of deployment {Path(user.deployment).name}" if user.deployment else ""
    return f"by pid {user.pid}{of} ({user.command or 'not visible'})"


def numbers(version: str) -> tuple[int, ...]:
    """`570.86.10` for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


# ---- the node --------------------------------------------------------------------------------------------------------


def find(vendor: str) -> Found:
    """Ask the vendor's tool."""
    return _find_nvidia() if vendor == "nvidia" else _find_amd()


def _find_nvidia() -> Found:
    text, problem = _ask(NVIDIA_GPUS)
    gpus = parse_nvidia_smi(text)
    if problem or not gpus:
        return Found(problem=problem or f"nvidia-smi lists none: {asking.first_line(text)}")
    return Found(tuple(gpus), tuple(parse_nvidia_users(_ask(NVIDIA_USERS)[0])), tool="nvidia-smi")


def _find_amd() -> Found:
    static, problem = _ask(AMD_STATIC)
    gpus = parse_amd_smi(static, _ask(AMD_LIST)[0], _ask(AMD_USED)[0]) if not problem else []
    tool = "amd-smi"
    if not gpus:
        text, problem_of_rocm = _ask(ROCM_GPUS)
        gpus, tool = parse_rocm_smi(text), "rocm-smi"
        problem = problem or problem_of_rocm or f"rocm-smi lists none: {asking.first_line(text)}"
    if not gpus:
        return Found(problem=problem)
    try:
        release = Path(ROCM_RELEASE).read_text(encoding="utf-8").strip()
    except OSError:
        release = ""
    return Found(tuple(gpus), tool=tool, release=release)


def _ask(command: Sequence[str]) -> tuple[str, str]:
    """What a tool answers, and why it does not."""
    text, problem = asking.ask(command, TOOL_SECONDS, TOOL_PATHS)
    return text, f"{problem}: a GPU or its driver hangs" if "does not answer" in problem else problem


def with_owners(found: Found, deployment_of: Mapping[int, str], command_of: Mapping[int, str]) -> Found:
    """The same with what is known of each process that holds memory."""
    users = tuple(
        replace(user, deployment=deployment_of.get(user.pid, ""), command=command_of.get(user.pid, ""))
        for user in found.users
    )
    return replace(found, users=users)
