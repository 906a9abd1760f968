"""How well GPUs are: recorded answers of the vendors' tools and kernel logs, read; and what is wrong by them."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import asking, gpu_health, kernel_log
from ansible_collections.stepladder.core.plugins.module_utils.gpu_health import Health, Trouble
from ansible_collections.stepladder.core.plugins.module_utils.kernel_log import Event

from stepladder.catalogue import Catalogue

SAID = Path(__file__).resolve().parents[1] / "fixtures" / "gpus"


def said(name: str) -> str:
    return (SAID / name).read_text()


SOUND = Health(
    0, bus="00000000:01:00.0", ecc="Enabled", uncorrectable=0, uncorrectable_ever=0, pcie_width=16, pcie_width_most=16,
    persistence="Disabled", compute_mode="Default",
)  # fmt: skip
XML = {
    "nvidia-smi-q-a100.xml": replace(SOUND, mig="Enabled"),
    "nvidia-smi-q-t4.xml": replace(SOUND, bus="00000000:00:1E.0", pcie_width=8),
    "nvidia-smi-q-l4.xml": replace(SOUND, remapped_rows=0),
    "nvidia-smi-q-pro6000.xml": replace(
        SOUND, bus="00000000:61:00.0", ecc="Disabled", uncorrectable=None, uncorrectable_ever=None,
        remapped_rows=0, persistence="Enabled",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), XML.items(), ids=XML)
def test_nvidia_xml(name: str, expected: Health) -> None:
    assert gpu_health.parse_nvidia_xml(said(name)) == [expected]


# The recorded L4 with one value changed as NVIDIA's documents name it.
CHANGED = {
    "a pending row": ("row_pending>No", "row_pending>Yes", {"remap_pending": True}),
    "a row that could not be replaced": ("row_failure>No", "row_failure>Yes", {"remap_failed": True}),
    "a reset is due": ("reset_required>No", "reset_required>Yes", {"asks_for": "Reset"}),
    "errors since the driver's start": (
        "<dram_uncorrectable>0", "<dram_uncorrectable>3", {"uncorrectable": 3, "uncorrectable_ever": 3},
    ),
    "hot": ("hw_thermal_slowdown>Not Active", "hw_thermal_slowdown>Active", {"slowed": ("hw_thermal_slowdown",)}),
    "no fabric yet": (
        "<state>N/A</state>\n            <status>N/A", "<state>In Progress</state>\n            <status>N/A",
        {"fabric": "In Progress"},
    ),
    "a fabric that failed": (
        "<state>N/A</state>\n            <status>N/A", "<state>Completed</state>\n            <status>Unknown Error",
        {"fabric": "Completed (Unknown Error)"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), CHANGED.values(), ids=CHANGED)
def test_what_changes_in_the_xml(old: str, new: str, expected: dict[str, object]) -> None:
    text = said("nvidia-smi-q-l4.xml")
    assert old in text
    assert gpu_health.parse_nvidia_xml(text.replace(old, new)) == [replace(SOUND, remapped_rows=0, **expected)]


def test_an_answer_that_broke_off_is_told() -> None:
    with pytest.raises(ValueError, match="its XML is not whole: unclosed token"):
        gpu_health.parse_nvidia_xml(said("nvidia-smi-q-l4.xml")[:900])


def test_nvlink() -> None:
    assert gpu_health.parse_nvlink(said("nvidia-smi-nvlink-h100-pcie.txt")) == {0: 12, 1: 12}
    assert gpu_health.parse_nvlink("GPU 0: Tesla T4 (UUID: GPU-1)\n") == {}


def test_topology() -> None:
    switched = gpu_health.parse_topology(said("nvidia-smi-topo-nv18.txt"))
    assert set(switched) == set(range(6))
    assert all(set(peers.values()) == {"NV18"} and len(peers) == 5 for peers in switched.values())
    assert gpu_health.parse_topology(said("nvidia-smi-topo-5090.txt")) == {0: {1: "PHB"}, 1: {0: "PHB"}}
    assert gpu_health.parse_topology("\x1b[4m\tGPU0\tGPU1\x1b[0m\nGPU0\t X \tNV4\nGPU1\tNV4\t X\n")[0] == {1: "NV4"}


def test_amd() -> None:
    metric, bus = said("amd-smi-metric-ecc.json"), '[{"gpu": 0, "bus": {"bdf": "0000:08:00.0", "max_pcie_width": 16}}]'
    [found] = gpu_health.parse_amd_health(metric, bus, said("amd-smi-topology-xgmi.json"))
    assert found == Health(0, bus="0000:08:00.0", uncorrectable=0, pcie_width=16, pcie_width_most=16, peers={1: "XGMI"})
    [apart] = gpu_health.parse_amd_health(metric, "", said("amd-smi-topology-2.json"))
    assert apart.peers == {1: "PCIE (disabled)"}
    assert gpu_health.parse_amd_health("ERROR: no driver") == []
    broken = metric.replace('"total_uncorrectable_count": 0', '"total_uncorrectable_count": 2')
    assert gpu_health.parse_amd_health(broken)[0].uncorrectable == 2


GOOD = replace(SOUND, persistence="Enabled")
WRONG = {
    "nothing": ([GOOD], []),
    "bridges use 12 of 18 links": ([replace(GOOD, index=index, links=12) for index in (0, 1)], []),
    "no NVLink anywhere": ([replace(GOOD, peers={1: "SYS"}), replace(GOOD, index=1, peers={0: "SYS"})], []),
    "a link is down": (
        [replace(GOOD, links=18), replace(GOOD, index=1, links=17)],
        [("NVLink of GPU 1", "17 links up", "18 as on its neighbours", True)],
    ),
    "one pair goes over PCIe": (
        [replace(GOOD, peers={1: "NV18", 2: "NV18"}), replace(GOOD, index=1, peers={0: "NV18", 2: "SYS"}),
         replace(GOOD, index=2, peers={0: "NV18", 1: "SYS"})],
        [("GPU 1 to GPU 2", "joined by SYS", "NV18 as others", True)],
    ),
    "memory": (
        [replace(GOOD, uncorrectable=2, remap_pending=True)],
        [("memory of GPU 0", "a bad row waits to be replaced", "none waiting", True),
         ("memory of GPU 0", "2 errors that could not be corrected", "0 since the driver's start", True)],
    ),
    "memory, once": (
        [replace(GOOD, uncorrectable_ever=2)],
        [("memory of GPU 0", "2 errors in its life that could not be corrected", "0", False)],
    ),
    "half the lanes": (
        [replace(GOOD, pcie_width=8)], [("PCIe lanes of GPU 0", "x8", "x16, which both ends can do", False)],
    ),
    "the fabric manager does not run": (
        [replace(GOOD, fabric="In Progress")], [("NVSwitch fabric of GPU 0", "In Progress", "Completed", True)],
    ),
    "the driver wants a restart": (
        [replace(GOOD, asks_for="Reboot")], [("GPU 0", "its driver asks for: Reboot", "nothing to be asked for", True)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("gpus", "expected"), WRONG.values(), ids=WRONG)
def test_troubles(gpus: list[Health], expected: list[tuple[str, str, str, bool]]) -> None:
    found = list(gpu_health.troubles(gpus, whole_gpus=True))
    assert [(one.what, one.found, one.needed, one.serious) for one in found] == expected
    assert all(one.mend for one in found)


def test_persistence_that_the_daemons_own_unit_turns_off() -> None:
    """Ubuntu's starts the daemon with --no-persistence-mode: enabling it again changes nothing."""
    (found,) = gpu_health.troubles([replace(GOOD, persistence="Disabled")], whole_gpus=True)
    assert "systemctl enable --now nvidia-persistenced" in found.mend
    assert "--no-persistence-mode" in found.mend


def test_divided_gpus_matter_only_where_whole_ones_are_wanted() -> None:
    divided = [replace(GOOD, mig="Enabled")]
    assert list(gpu_health.troubles(divided, whole_gpus=False)) == []
    assert list(gpu_health.troubles(divided, whole_gpus=True)) == [
        Trouble("GPU 0", "divided (MIG)", "a whole GPU", "nvidia-smi -mig 0 -i 0, idle")
    ]


def test_kernel_log() -> None:
    assert [(one.kind, one.device, one.fatal) for one in kernel_log.parse(said("kernel-log.txt"))] == [
        ("Xid 13", "0000:01:00", False),
        ("Xid 79", "0000:01:00", True),
        ("off the bus", "0000:01:00.0", True),
        ("Xid 31", "0000:00:06", False),
        ("Xid 63", "0000:10:1c", False),
        ("off the bus", "0000:b3:00.0", True),
        ("SXid 20034", "0000:00:00.0", True),
        ("SXid 11004", "0000:00:08.0", False),
        ("amdgpu", "0000:68:00.0", True),
        ("amdgpu", "0000:0b:00.0", False),
    ]


def test_the_same_error_is_counted_and_told_as_last() -> None:
    text = "NVRM: Xid (PCI:0000:23:00): 63, first\n" * 3 + "NVRM: Xid (PCI:0000:23:00): 63, last\n"
    assert kernel_log.parse(text) == [Event("Xid 63", "0000:23:00", False, "last", 4)]


ACTION = "154, GPU recovery action changed from"
XIDS: dict[str, tuple[list[str], bool]] = {
    "NVLink 5, fatal": (["149, NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x026001c6 0x00000000)"], True),
    "NVLink 5, the first of its numbers": (["144, SAW_MVB Fatal XC0 i0 Link 0 (0x00000001)"], True),
    "NVLink 5, the last of its numbers": (["150, MSE Fatal XC0 i0 Link -1 (0x00000001)"], True),
    "NVLink 5, not fatal": (["145, RLW_RXPIPE Nonfatal XC0 i0 Link 13 (0x0409a0c2 0x00000008)"], False),
    "NVLink 5, not fatal after a fatal one": (["145, RLW_REMAP Fatal XC0 i0", "145, RLW_RXPIPE Nonfatal XC0 i0"], True),
    "a context switch that timed out": (
        ["109, pid=50754, name=python3, Ch 00000008, errorString CTX SWITCH TIMEOUT, Info 0x3c009"],
        True,
    ),
    "a part of it was retired, a reset is due": (["156, Resource Retirement Event"], True),
    "an application's alone": (["94, pid=7194, name=python, Contained: CE User Channel (0x9)"], False),
    "it stopped": (["46, pid='<unknown>', name=<unknown>, GPU stopped processing"], True),
    "a restart is asked for": ([f"{ACTION} 0x0 (None) to 0x2 (Node Reboot Required)"], True),
    "a reset is asked for": ([f"{ACTION} 0x0 (None) to 0x1 (GPU Reset Required)"], True),
    "nothing is asked for any more": (
        [f"{ACTION} 0x0 (None) to 0x1 (GPU Reset Required)", f"{ACTION} 0x1 (GPU Reset Required) to 0x0 (None)"],
        False,
    ),
    "asked for anew": (
        [f"{ACTION} 0x1 (GPU Reset Required) to 0x0 (None)", f"{ACTION} 0x0 (None) to 0x1 (PF FLR)"],
        True,
    ),
}


@pytest.mark.parametrize(("said_of_it", "fatal"), XIDS.values(), ids=XIDS)
def test_xids_that_tell_themselves_whether_they_are_fatal(said_of_it: list[str], fatal: bool) -> None:
    lines = [f"[ 61.{n}] NVRM: Xid (PCI:0000:19:00): {text}" for n, text in enumerate(said_of_it)]
    (event,) = kernel_log.parse("\n".join(lines))
    assert (event.device, event.fatal, event.count) == ("0000:19:00", fatal, len(said_of_it))


def test_diagnose_knows_the_same_numbers() -> None:
    """What has fallen off the bus is a signature of its own."""
    signature = next(one for one in Catalogue().signatures if one.id == "gpu-fatal-xid")
    lines = {number: f"NVRM: Xid (PCI:0000:19:00): {number}, text" for number in range(1, 200)}
    known = {number for number, line in lines.items() if re.search(signature.pattern, line)}
    assert known == kernel_log.FATAL_XIDS - {79}


def test_an_action_that_is_taken_back_is_so_for_its_gpu_alone() -> None:
    text = "".join(
        f"NVRM: Xid (PCI:0000:{gpu}:00): {ACTION} {change}\n"
        for gpu, change in [
            ("19", "0x0 (None) to 0x1 (GPU Reset Required)"),
            ("3b", "0x0 (None) to 0x1 (GPU Reset Required)"),
            ("19", "0x1 (GPU Reset Required) to 0x0 (None)"),
        ]
    )
    assert {one.device: one.fatal for one in kernel_log.parse(text)} == {"0000:19:00": False, "0000:3b:00": True}


# ---- asking ----------------------------------------------------------------------------------------------------------


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_tool_that_hangs_is_an_answer_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stand_in(tmp_path, "hangs", f"sleep 300 & echo $! > {tmp_path}/pid; wait")
    start = time.monotonic()
    assert asking.ask(["hangs"], 0.5) == ("", "hangs does not answer within 0.5 s")
    assert time.monotonic() - start < 2
    child = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_tool_that_cannot_be_ended_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits in the kernel for a dead GPU: SIGKILL does nothing to it."""
    monkeypatch.setattr(asking.os, "killpg", lambda *_: None)
    monkeypatch.setattr(asking, "END_SECONDS", 0.2)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stand_in(tmp_path, "dead", "exec sleep 3")
    start = time.monotonic()
    assert asking.ask(["dead"], 0.3).problem == "dead does not answer within 0.3 s"
    assert time.monotonic() - start < 2


def test_other_ways_not_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stand_in(tmp_path, "fails", "echo said; echo 'why it fails' >&2; exit 3")
    (tmp_path / "broken").write_bytes(b"\x7fELF no program")
    (tmp_path / "broken").chmod(0o755)
    assert asking.ask(["fails"]) == ("", "fails ends with 3: why it fails")
    assert asking.ask(["no-such-tool"]) == ("", "no-such-tool is not there")
    assert asking.ask(["broken"]) == ("", "broken cannot be run: Exec format error")


def test_a_hanging_nvidia_smi_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_health, "SECONDS", 0.3)
    stand_in(tmp_path, "nvidia-smi", f"echo asked >> {tmp_path}/asked; exec sleep 20")
    found = gpu_health.find("nvidia")
    assert found.unread == {"nvidia-smi -q -x": "nvidia-smi does not answer within 0.3 s"}
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_all_questions_to_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpu = said("nvidia-smi-q-l4.xml").split("<gpu id", 1)[1].rsplit("</gpu>", 1)[0]
    (tmp_path / "two.xml").write_text(f"<nvidia_smi_log>{f'<gpu id{gpu}</gpu>' * 2}</nvidia_smi_log>")
    stand_in(
        tmp_path, "nvidia-smi",
        f'case "$1" in -q) cat {tmp_path}/two.xml;; nvlink) cat {SAID}/nvidia-smi-nvlink-h100-pcie.txt;; '
        f"topo) cat {SAID}/nvidia-smi-topo-5090.txt;; esac",
    )  # fmt: skip
    found = gpu_health.find("nvidia")
    assert [(one.index, one.links, one.peers) for one in found.gpus] == [(0, 12, {1: "PHB"}), (1, 12, {0: "PHB"})]
    assert not found.unread
