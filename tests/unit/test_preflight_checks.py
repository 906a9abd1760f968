"""The checks of preflight that are about the machine: as tables of what was found and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import preflight_checks
from ansible_collections.stepladder.core.plugins.module_utils.gpu_health import FoundHealth, Health
from ansible_collections.stepladder.core.plugins.module_utils.gpus import Found
from ansible_collections.stepladder.core.plugins.module_utils.kernel_log import Event
from ansible_collections.stepladder.core.plugins.module_utils.machine import (
    Clock,
    Docker,
    Gid,
    Machine,
    Nic,
    RdmaPort,
    Storage,
)
from ansible_collections.stepladder.core.plugins.module_utils.preflight import Disk, Facts, Wanted

from stepladder.catalogue import Catalogue

NIC = Nic("ens1", True, 100000, 1500)
ACTIVE = RdmaPort("mlx5_0", 1, "ACTIVE", "LinkUp", "Ethernet", 400.0, gids=(Gid(3, "x", "RoCE v2", "e", "10.0.0.1"),))
ENGINE = Docker("28.2.2", cdi_folders=("/etc/cdi",), cdi=("nvidia.com/gpu=all",), toolkit="1.19.1")
SLICED = Wanted("flash", images=("vllm",))
BIG = {"path": "/models", "minimum_free_bytes": 240 * 10**9}
GPUS = {"vendor": "nvidia", "count": 1, "model": "H20", "memory_mib": 1, "indices": []}


def on(**machine: Any) -> Facts:
    return Facts(user="root", machine=Machine(**machine))


def amd(**machine: Any) -> Facts:
    return replace(on(**machine), gpu_vendor="amd")


def nvidia(**facts: Any) -> Facts:
    return replace(Facts(user="root", gpu_vendor="nvidia"), **facts)


FATAL = Event("Xid 79", "0000:01:00", True, "GPU has fallen off the bus.")
PASSING = Event("Xid 31", "0000:01:00", False, "MMU Fault", 3)
CASES: dict[str, tuple[Facts, Wanted, list[tuple[str, str, str, str]]]] = {
    "an interface as planned": (on(nics=(NIC,)), Wanted(interface="ens1", ranks=2), []),
    "no such interface": (
        on(nics=(NIC,)), Wanted(interface="eth0"),
        [("network", "interface eth0", "not there; there are ens1", "failure")],
    ),
    "a cable out": (
        on(nics=(replace(NIC, up=False),)), Wanted(interface="ens1"),
        [("network", "interface ens1", "down", "failure")],
    ),
    "slow between ranks": (
        on(nics=(replace(NIC, speed_mbit=1000),)), Wanted(interface="ens1", ranks=2),
        [("network", "interface ens1", "1000 Mbit/s", "warning")],
    ),
    "slow for one node alone": (on(nics=(replace(NIC, speed_mbit=1000),)), Wanted(interface="ens1"), []),
    "RDMA as it should be": (on(rdma=(ACTIVE,), limits={"locked_memory_bytes": None}), Wanted(), []),
    "no subnet manager": (
        on(rdma=(replace(ACTIVE, state="INIT", link="InfiniBand"),)), Wanted(),
        [("rdma", "mlx5_0 port 1", "state INIT, cable in", "warning")],
    ),
    "no cable in an RDMA port": (on(rdma=(replace(ACTIVE, state="DOWN", physical="Disabled"),)), Wanted(), []),
    "RoCE without an address, and little memory to lock": (
        on(rdma=(replace(ACTIVE, gids=()),), limits={"locked_memory_bytes": 8 << 20}), Wanted(),
        [("rdma", "mlx5_0 port 1", "no RoCE v2 entry with an IPv4 address", "warning"),
         ("rdma", "memory that may be locked", "8 MiB", "warning")],
    ),
    "a clock that nothing keeps": (
        on(clock=Clock(1.0, False)), Wanted(),
        [("clock", "time synchronisation", "the kernel's clock is not synchronised", "warning")],
    ),
    "a clock of which nothing is known": (on(clock=Clock(1.0, None)), Wanted(), []),
    "a name that is not found": (
        on(own_name={"name": "gpu7", "problem": "Name or service not known", "seconds": 0.1}), Wanted(),
        [("name", "gpu7", "not found: Name or service not known", "warning")],
    ),
    "a name that takes long": (
        on(own_name={"name": "gpu7", "problem": "", "seconds": 5.01}), Wanted(),
        [("name", "gpu7", "found after 5.01 s", "warning")],
    ),
    "few files": (on(limits={"open_files": 1024}), Wanted(), [("limits", "open files", "1024", "warning")]),
    "AMD's settings": (
        amd(sysctl={"kernel.numa_balancing": 1}), Wanted(),
        [("kernel", "numa_balancing", "1: memory is moved under the GPUs' feet", "warning"),
         ("kernel", "iommu", "not iommu=pt", "warning"),
         ("kernel", "pci=realloc", "not pci=realloc=off", "warning")],
    ),
    "AMD's settings are right": (
        amd(sysctl={"kernel.numa_balancing": 0}, boot_options=("iommu=pt", "pci=realloc=off")), Wanted(), [],
    ),
    "weights on a hard disk": (
        replace(on(storage=(Storage("/models", "/", "xfs", "sda", "hdd"),)),
                disks=(Disk("/models", "", 0, "/", 1, 10**13, 10**12),)),
        Wanted(paths=[BIG]),
        [("disk", "/models", "on a hard disk (sda): 240.0 GB take about 20 minutes to read", "warning")],
    ),
    "no engine for containers": (
        nvidia(machine=Machine(docker=Docker(problem="docker is not there"))), SLICED,
        [("docker", "container engine", "docker is not there", "failure")],
    ),
    "no engine, none needed": (nvidia(machine=Machine(docker=Docker(problem="docker is not there"))), Wanted(), []),
    "the kernel's log": (
        nvidia(kernel_events=(FATAL, PASSING)), Wanted(),
        [("xid", "Xid 79 of 0000:01:00", "GPU has fallen off the bus.", "failure"),
         ("xid", "Xid 31 of 0000:01:00", "3 times, last: MMU Fault", "warning")],
    ),
    "a GPU that is ill": (
        nvidia(health=FoundHealth((Health(0, remap_pending=True),))), Wanted(),
        [("gpu", "memory of GPU 0", "a bad row waits to be replaced", "failure")],
    ),
    "a tool that gets no answer, without a plan": (
        nvidia(gpus=Found(problem="nvidia-smi does not answer within 60 s")), Wanted(),
        [("gpu", "GPUs", "nvidia-smi does not answer within 60 s", "failure")],
    ),
    "what could not be read": (
        replace(Facts(user="plain"), unread={"kernel log": "dmesg ends with 1"}), Wanted(),
        [("unread", "kernel log", "dmesg ends with 1", "warning")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "wanted", "expected"), CASES.values(), ids=CASES)
def test_checks(facts: Facts, wanted: Wanted, expected: list[tuple[str, str, str, str]]) -> None:
    found = preflight_checks.findings(facts, wanted)
    assert [(one.check, one.what, one.found, one.severity) for one in found if one.check != "shared memory"] == expected
    assert all(one.needed and one.mend for one in found)


def test_amds_boot_options_are_those_that_prepare_sets() -> None:
    known = {gpu.driver.kernel_parameters for gpu in Catalogue().gpus.values() if gpu.vendor == "amd" and gpu.driver}
    assert known == {preflight_checks.AMD_BOOT_OPTIONS}


NO_CDI = ("GPUs in containers", "no CDI device of NVIDIA")
NO_FOLDER = ("devices by CDI", "Docker does not look for them")
CONTAINERS: dict[str, tuple[Docker, str, list[tuple[str, str]]]] = {
    "as they should be": (ENGINE, "nvidia", []),
    "the runtime nvidia alone, which the plan does not use": (
        replace(ENGINE, runtimes=("nvidia", "runc"), cdi=()), "nvidia", [NO_CDI],
    ),
    "devices of another vendor": (replace(ENGINE, cdi=("amd.com/gpu=all",)), "nvidia", [NO_CDI]),
    "an old Docker": (
        replace(ENGINE, version="20.10.24+dfsg1", cdi_folders=()), "nvidia", [("Docker", "20.10.24+dfsg1")],
    ),
    "a Docker that was not told": (replace(ENGINE, version="27.5.1", cdi_folders=()), "nvidia", [NO_FOLDER]),
    "a toolkit with a hole": (
        replace(ENGINE, toolkit="1.19.0"), "nvidia", [("NVIDIA container toolkit", "1.19.0")],
    ),
    "no toolkit": (
        replace(ENGINE, toolkit=""), "nvidia",
        [("NVIDIA container toolkit", "nvidia-ctk is not there, or tells no version")],
    ),
    "no GPUs planned": (Docker("20.10.24"), "", []),
    "AMD's": (Docker("20.10.24"), "amd", [("GPUs in containers", "no /dev/kfd")]),
}  # fmt: skip


@pytest.mark.parametrize(("docker", "vendor", "expected"), CONTAINERS.values(), ids=CONTAINERS)
def test_what_containers_are_given_gpus_by(docker: Docker, vendor: str, expected: list[tuple[str, str]]) -> None:
    gpus = GPUS | {"vendor": vendor} if vendor else None
    wanted = replace(SLICED, gpus=gpus, minimum_docker="25.0", minimum_toolkit="1.19.1")
    found = list(preflight_checks.check_containers(on(docker=docker, amd_devices=("/dev/dri",)), wanted))
    assert [(one.what, one.found) for one in found] == expected
    assert all(one.needed and one.mend and one.severity == "failure" for one in found)
    both = on(docker=docker, amd_devices=("/dev/kfd", "/dev/dri"))
    assert vendor != "amd" or list(preflight_checks.check_containers(both, wanted)) == []


def test_how_to_read_what_was_not() -> None:
    unread = {"a": "dmesg ends with 1: not permitted", "b": "nvidia-smi is not there"}
    told = preflight_checks.check_unread(replace(Facts(user="plain"), unread=unread))
    assert [one.mend for one in told] == ["read it as root (-e ansible_become=true)", "install it"]
