"""Which driver a node gets: the catalogue's answer for every GPU type and system, and what is refused."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import package_sources, preparation
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Package
from ansible_collections.stepladder.core.plugins.module_utils.preparation import Facts, Fault, Wanted

from stepladder.catalogue import DEFAULT_DIRECTORY, Catalogue
from stepladder.driver import System, driver_plan, mixed_types
from stepladder.versions import older

DEBIAN = {"distribution": "Debian", "distribution_version": "12.11", "distribution_release": "bookworm",
          "architecture": "x86_64", "kernel": "6.1.0-40-amd64"}  # fmt: skip
JAMMY = {"distribution": "Ubuntu", "distribution_version": "22.04", "distribution_release": "jammy",
         "architecture": "x86_64", "kernel": "6.8.0-45-generic"}  # fmt: skip
NOBLE = JAMMY | {"distribution_version": "24.04", "distribution_release": "noble"}
ROCKY = {"distribution": "Rocky", "distribution_version": "9.6", "distribution_release": "Blue Onyx",
         "architecture": "x86_64", "kernel": "5.14.0-570.el9.x86_64"}  # fmt: skip
ROCKY10 = ROCKY | {"distribution_version": "10.1", "kernel": "6.12.0-124.el10_1.x86_64"}
VENDOR = "https://developer.download.nvidia.com/compute/cuda/repos"


def plan(facts: dict[str, Any], **wish: Any) -> dict[str, Any]:
    return driver_plan({"gpu": "h20-96", "engine": "vllm", **wish}, facts, str(DEFAULT_DIRECTORY))


SYSTEMS = {
    "Debian 12": (DEBIAN, "debian12"),
    "Ubuntu 22.04": (JAMMY, "ubuntu2204"),
    "Ubuntu 24.04": (NOBLE, "ubuntu2404"),
    "Rocky 9": (ROCKY, "rhel9"),
    "Red Hat 8": (ROCKY | {"distribution": "RedHat", "distribution_version": "8.10"}, "rhel8"),
    "another": ({"distribution": "Fedora", "distribution_version": "44"}, "Fedora 44"),
}


@pytest.mark.parametrize(("facts", "expected"), SYSTEMS.values(), ids=SYSTEMS)
def test_systems_by_the_catalogues_name(facts: dict[str, Any], expected: str) -> None:
    assert System.of(facts).distribution == expected


PACKAGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "H20 on Debian 12": (
        DEBIAN,
        {},
        ["linux-headers-6.1.0-40-amd64", "linux-headers-amd64",
         "nvidia-driver-cuda=580.178.04-*", "nvidia-kernel-open-dkms=580.178.04-*",
         "nvidia-persistenced=580.178.04-*", "nvidia-fabricmanager=580.178.04-*", "libnvidia-nscq=580.178.04-*"],
    ),
    "H200 on Ubuntu 22.04, names with the branch": (
        JAMMY,
        {"gpu": "h200"},
        ["linux-headers-6.8.0-45-generic", "linux-headers-generic-hwe-22.04",
         "libnvidia-compute-580=580.178.04-*", "libnvidia-cfg1-580=580.178.04-*", "nvidia-dkms-580-open=580.178.04-*",
         "nvidia-utils-580=580.178.04-*", "nvidia-compute-utils-580=580.178.04-*", "nvidia-fabricmanager=580.178.04-*",
         "libnvidia-nscq=580.178.04-*"],
    ),
    "B200 on Ubuntu 24.04, branch 595, names without": (
        NOBLE,
        {"gpu": "b200", "branch": "595"},
        ["linux-headers-6.8.0-45-generic", "linux-headers-generic", "nvlsm", "nvidia-headless-open=595.91.07-*",
         "nvidia-persistenced=595.91.07-*", "nvidia-fabricmanager=595.91.07-*", "libnvidia-nscq=595.91.07-*",
         "libnvsdm=595.91.07-*"],
    ),
    "GB200 on Ubuntu 24.04, IMEX": (
        NOBLE | {"architecture": "aarch64"},
        {"gpu": "gb200", "packages": ["nvidia-open"]},
        ["linux-headers-6.8.0-45-generic", "linux-headers-generic",
         "nvidia-open=580.178.04-*", "nvidia-imex=580.178.04-*"],
    ),
    "H20 on Rocky 9": (
        ROCKY,
        {},
        ["kernel-devel=5.14.0-570.el9", "nvidia-driver-cuda=580.178.04-*", "kmod-nvidia-open-dkms=580.178.04-*",
         "nvidia-persistenced=580.178.04-*", "nvidia-fabricmanager=580.178.04-*", "libnvidia-nscq=580.178.04-*"],
    ),
    "MI355X on Ubuntu 24.04": (
        NOBLE,
        {"gpu": "mi355x"},
        ["linux-headers-6.8.0-45-generic", "linux-headers-generic", "linux-modules-extra-6.8.0-45-generic",
         "amdgpu-dkms=*.30300400-*", "rocm-core=*.70204-*", "rocminfo=*.70204-*",
         "rocm-smi-lib=*.70204-*", "amd-smi-lib=*.70204-*"],
    ),
    "MI300X on Debian 12, whose kernel is in one package": (
        DEBIAN,
        {"gpu": "mi300x"},
        ["linux-headers-6.1.0-40-amd64", "linux-headers-amd64",
         "amdgpu-dkms=*.30300400-*", "rocm-core=*.70204-*", "rocminfo=*.70204-*",
         "rocm-smi-lib=*.70204-*", "amd-smi-lib=*.70204-*"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "wish", "expected"), PACKAGES.values(), ids=PACKAGES)
def test_packages(facts: dict[str, Any], wish: dict[str, Any], expected: list[str]) -> None:
    found = plan(facts, **wish)
    assert found["faults"] == []
    assert found["packages"] == expected


@pytest.mark.parametrize(
    ("facts", "kernel", "expected"),
    [
        (DEBIAN, "6.1.0-40-cloud-amd64", ["linux-headers-cloud-amd64"]),
        (DEBIAN, "6.12.43+deb12-amd64", ["linux-headers-amd64"]),
        (JAMMY, "5.15.0-160-generic", ["linux-headers-generic"]),
        (NOBLE, "6.14.0-33-generic", ["linux-headers-generic-hwe-24.04"]),
        (NOBLE, "6.8.0-1040-nvidia", ["linux-headers-nvidia"]),
        (NOBLE, "6.8.0-1040-azure", []),
        (DEBIAN, "6.18.44-site", []),
    ],
)
def test_headers_of_kernels_to_come_are_installed_too(facts: dict[str, Any], kernel: str, expected: list[str]) -> None:
    """Else an upgrade of the kernel comes up without GPUs: DKMS builds for kernels whose headers are there."""
    found = plan(facts | {"kernel": kernel})["packages"]
    assert [name for name in found if name.startswith("linux-headers")] == [f"linux-headers-{kernel}", *expected]


def test_the_fabric_manager_has_the_drivers_version_wherever_there_are_switches() -> None:
    for name, gpu in Catalogue().gpus.items():
        if gpu.driver and gpu.driver.fabric in {"nvswitch", "nvlink5"}:
            packages = plan(NOBLE, gpu=name)["packages"]
            versions = {spec.partition("=")[2] for spec in packages if "nvidia" in spec}
            assert len(versions) == 1, name
            assert f"nvidia-fabricmanager={versions.pop()}" in packages, name


def test_kernel_modules_that_the_fabric_manager_refuses_to_start_without() -> None:
    for gpu, modules in {"b200": ["ib_umad"], "b300": ["ib_umad"], "h200": [], "gb200": []}.items():
        facts = NOBLE | ({"architecture": "aarch64"} if gpu == "gb200" else {})
        assert plan(facts, gpu=gpu)["kernel_modules"] == modules, gpu
    assert plan(DEBIAN, gpu="cpu")["kernel_modules"] == []


def test_repositories_are_the_vendors_or_the_sites() -> None:
    (vendors,) = plan(DEBIAN)["repositories"]
    assert vendors["url"] == f"{VENDOR}/debian12/x86_64/"
    assert vendors["key_url"] == f"{VENDOR}/debian12/x86_64/3bf863cc.pub"
    (arm,) = plan(NOBLE | {"architecture": "aarch64"}, gpu="gb200")["repositories"]
    assert arm["url"] == f"{VENDOR}/ubuntu2404/sbsa/"
    mirror = {"nvidia-driver": {"url": "http://mirror/{distribution}/", "key_url": None, "fingerprints": ["AB"]}}
    (sites,) = plan(DEBIAN, mirrors=mirror)["repositories"]
    assert (sites["url"], sites["key_url"], sites["fingerprints"]) == (
        "http://mirror/debian12/",
        vendors["key_url"],
        ["AB"],
    )
    (given,) = plan(DEBIAN, mirrors={"nvidia-driver": {"key": "-----BEGIN"}})["repositories"]
    assert "key_url" not in given
    amd = plan(DEBIAN, gpu="mi300x")["repositories"]
    assert [(each["url"], each["suites"]) for each in amd] == [
        ("https://repo.radeon.com/amdgpu/30.30.4/ubuntu", ["jammy"]),
        ("https://repo.radeon.com/rocm/apt/7.2.4", ["jammy"]),
    ]


def test_no_word_in_braces_is_left() -> None:
    for gpu in Catalogue().gpus:
        for facts in (DEBIAN, JAMMY, NOBLE, ROCKY):
            for machine in ("x86_64", "aarch64"):
                found = plan(facts | {"architecture": machine}, gpu=gpu)
                texts = [*found["packages"], *(str(value) for each in found["repositories"] for value in each.values())]
                assert [text for text in texts if "{" in text] == []


def test_what_amd_wants_of_the_kernel() -> None:
    found = plan(NOBLE, gpu="mi355x")
    assert found["kernel_parameters"] == ["iommu=pt", "pci=realloc=off"]
    assert found["sysctl"] == {"kernel.numa_balancing": 0}


def test_nothing_to_do_without_a_gpu() -> None:
    found = plan(DEBIAN, gpu="cpu")
    assert (found["vendor"], found["packages"], found["faults"]) == ("cpu", [], [])
    assert found["summary"] == "CPU (rehearsal only): there is nothing to do for a driver"


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "GPU type not set": (DEBIAN, {"gpu": ""}, "unknown GPU type", "'(deployment_gpu is not set)'"),
    "unknown GPU type": (DEBIAN, {"gpu": "h21"}, "unknown GPU type", "'h21'"),
    "unknown branch": (DEBIAN, {"branch": "999"}, "unknown driver branch", "'999'"),
    "a version of another branch": (
        DEBIAN,
        {"branch": "580", "version": "595.45.04"},
        "gpu_driver_version",
        "595.45.04 is not of branch 580",
    ),
    "unknown system": (SYSTEMS["another"][0], {}, "the node's system", "Fedora 44"),
    "Red Hat 10, whose key of NVIDIA's is not known": (ROCKY10, {}, "the node's system", "rhel10"),
    "machine without packages": (
        DEBIAN | {"architecture": "aarch64"}, {}, "the node's machine", "aarch64 with debian12",
    ),
    "below the floor": (
        DEBIAN, {"version": "570.86.15"}, "driver", "570.86.15; vLLM 0.33.0 and its image need 580 or newer",
    ),
    "a ROCm without a known amdgpu": (
        NOBLE, {"gpu": "mi355x", "version": "7.2.3"}, "gpu_driver_version",
        "7.2.3, and which amdgpu goes with it is not known; known is 7.2.4",
    ),
    "a number that has lost a nought": (
        DEBIAN, {"version": 580.1}, "gpu_driver_version",
        "the number 580.1, of which a nought at its end would be gone",
    ),
    "no node at a time, which Ansible takes for all": (
        DEBIAN, {"reboot_at_a_time": 0}, "gpu_driver_reboot_at_a_time",
        "0, with which all nodes would be restarted at once",
    ),
    "a mirror of no repository": (
        DEBIAN, {"mirrors": {"nvidia": {"url": "http://m/"}}}, "unknown repository in gpu_driver_mirrors", "'nvidia'",
    ),
    "a mirror that is its address": (
        DEBIAN, {"mirrors": {"nvidia-driver": "http://m/"}}, "gpu_driver_mirrors.nvidia-driver", "str, no mapping",
    ),
    "a mirror's field that is none": (
        DEBIAN, {"mirrors": {"nvidia-driver": {"uri": "http://m/"}}},
        "unknown field of gpu_driver_mirrors.nvidia-driver", "'uri'",
    ),
    "ROCm below the floor": (
        NOBLE, {"gpu": "mi355x", "branch": "7.0"}, "ROCm", "7.0; vLLM 0.33.0 and its image need 7.2 or newer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "wish", "what", "found"), FAULTS.values(), ids=FAULTS)
def test_faults(facts: dict[str, Any], wish: dict[str, Any], what: str, found: str) -> None:
    (fault,) = plan(facts, **wish)["faults"]
    assert fault["what"] == what
    assert fault["found"] == found
    assert fault["mend"]


def test_what_yaml_reads_as_a_number_is_text() -> None:
    assert plan(DEBIAN, branch=580)["version"].startswith("580.")
    assert plan(DEBIAN, engine="vllm", engine_version=0.33)["faults"] == []
    mirror = {"url": "http://m/", "fingerprints": "ABCD", "suites": "stable", "components": "main"}
    (repository,) = plan(DEBIAN, mirrors={"nvidia-driver": mirror})["repositories"]
    assert (repository["fingerprints"], repository["suites"]) == (["ABCD"], ["stable"])


def test_red_hat_10_is_refused_for_nvidias_driver_alone() -> None:
    (fault,) = plan(ROCKY10)["faults"]
    assert fault["mend"] == (
        "Its packages and their key are not known. Use one of debian12, rhel8, rhel9, ubuntu2204, ubuntu2404, or "
        "install the driver by hand and set gpu_driver_install: false."
    )
    assert plan(ROCKY10, gpu="mi355x")["faults"] == []


def test_no_driver_of_the_catalogue_has_a_hole_that_its_vendor_told_of() -> None:
    """Source: NVIDIA's security bulletin 5861, September 2026 (product-security/2026/5861)."""
    mended = {"580": "580.178.04", "595": "595.91.07"}
    known = {one.branch: one.version for one in Catalogue().drivers.releases if one.platform == "cuda"}
    assert [branch for branch, version in known.items() if older(version, mended[branch])] == []


def test_a_version_of_a_known_branch_needs_no_catalogue() -> None:
    assert "nvidia-fabricmanager=580.159.04-*" in plan(DEBIAN, version="580.159.04")["packages"]
    assert plan(NOBLE, version="595.71.05")["version"] == "595.71.05"


@pytest.mark.parametrize(("gpu", "minimum"), [("h20-96", "580"), ("mi355x", "7.2")])
def test_a_driver_that_is_only_looked_at(gpu: str, minimum: str) -> None:
    """Whatever the node's system is: nothing is installed, set or started, and the floor is asked of what is there."""
    found = plan({"distribution": "Amazon", "distribution_version": "2023"}, gpu=gpu, install=False, version="1.2")
    assert (found["faults"], found["version"], found["packages"], found["services"]) == ([], "", [], [])
    assert (found["minimum"], found["minimum_of"]) == (minimum, "vLLM 0.33.0")
    assert found["module"]
    assert plan({}, gpu=gpu, install=False, engine="")["minimum"] == ""


@pytest.mark.parametrize(
    ("facts", "gpu", "expected"),
    [
        (NOBLE, "h200", ["libnvidia-compute-580", "nvidia-headless-open"]),
        (DEBIAN, "h200", ["nvidia-driver-cuda"]),
        (ROCKY, "h200", ["nvidia-driver-cuda"]),
        (NOBLE, "mi355x", ["amdgpu-dkms"]),
    ],
)
def test_main_packages_of_all_branches_are_ours(facts: dict[str, Any], gpu: str, expected: list[str]) -> None:
    assert plan(facts, gpu=gpu)["own_packages"] == expected


@pytest.mark.parametrize(
    ("facts", "gpu", "names", "branches"),
    [
        (NOBLE, "h200", ["libnvidia-compute-[0-9][0-9][0-9]"], ["580", "595"]),
        (DEBIAN, "h200", [], ["580", "595"]),
        (NOBLE, "mi355x", [], []),
    ],
)
def test_packages_of_a_branch_that_was_dropped_are_known_by_their_name(
    facts: dict[str, Any], gpu: str, names: list[str], branches: list[str]
) -> None:
    found = plan(facts, gpu=gpu)
    assert (found["branch_packages"], found["branches"]) == (names, branches)


def test_mixed_types() -> None:
    types = {"a": "h20-96", "b": "h20-96", "c": "h200", "d": "mi355x"}
    deployments = {"a": "x", "b": "x", "c": "x", "d": "y"}
    assert mixed_types(types, deployments, "d") == []
    (fault,) = mixed_types(types, deployments, "a")
    assert fault["found"] == "h20-96 here, h200 on c"
    (fault,) = mixed_types(types, deployments, "c")
    assert fault["found"] == "h200 here, h20-96 on a, h20-96 on b"


# ---- what the node is held against -----------------------------------------------------------------------------------

LOADED = {
    "open module 580.95.05, Ubuntu 22.04 (a rented machine, 2025-09)": (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  "
        "(dvs-builder@U22-I3-B17-02-5)  Tue Sep 23 09:55:41 UTC 2025\n"
        "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04.2)\n",
        "580.95.05",
    ),
    "open module 615.71.09, Arch (2026-10)": (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  615.71.09  Release Build  (notroot@)  Sat Oct  3 "
        "18:52:37 UTC 2026\nGCC version:  Selected multilib: .;@m64\n",
        "615.71.09",
    ),
    "proprietary module 550.135 (2025-01)": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.135  Fri Jan 10 20:00:00 UTC 2025\n",
        "550.135",
    ),
    "none": ("", ""),
}


@pytest.mark.parametrize(("text", "version"), LOADED.values(), ids=LOADED)
def test_the_loaded_module_is_read(text: str, version: str) -> None:
    assert preparation.parse_loaded_nvidia(text) == version


def test_versions_of_libraries_and_packages() -> None:
    assert preparation.version_of_library("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.126.20") == "580.126.20"
    assert preparation.version_of_library("/usr/lib/libnvidia-ml.so.1") == ""
    assert preparation.upstream("1:580.126.20-1ubuntu1") == "580.126.20"
    assert preparation.upstream("") == ""


V = "580.126.20"
NVIDIA = Wanted(
    "nvidia",
    V,
    "nvidia",
    "libnvidia-ml.so.1",
    "cuda",
    [f"cuda={V}-*", f"fm={V}-*"],
    minimum_free_bytes={"/var": 4 * 10**9},
)
BARE = Facts("gpu1", free_bytes={"/var": 10**10}, gpus={"nvidia": 8}, booted_at=100)
DONE = Facts("gpu1", loaded=V, on_disk=V, library=V, packages={"cuda": f"{V}-1", "fm": f"{V}-1"}, installed_at=50,
             booted_at=100, gpus={"nvidia": 8})  # fmt: skip


FOUND = Wanted("nvidia", module="nvidia", library="libnvidia-ml.so.1", install=False, minimum="580",
               minimum_of="vLLM 0.33.0")  # fmt: skip


def having(facts: Facts, **changes: Any) -> Facts:
    return Facts(**{**vars(facts), **changes})


def wanting(**changes: Any) -> Wanted:
    return Wanted(**{**vars(NVIDIA), **changes})


BEFORE = {
    "bare": (BARE, NVIDIA, []),
    "done": (DONE, NVIDIA, []),
    "no root": (having(BARE, user="guest"), NVIDIA, ["user: guest"]),
    "no space": (having(BARE, free_bytes={"/var": 10**9}), NVIDIA, ["space on /var: 1.0 GB free"]),
    "no space is needed once it is installed": (having(DONE, free_bytes={"/var": 0}), NVIDIA, []),
    "no GPU": (having(BARE, gpus={}), NVIDIA, ["GPUs on the PCI bus: none"]),
    "another vendor's": (having(BARE, gpus={"amd": 8}), NVIDIA, ["GPUs on the PCI bus: 8 of AMD"]),
    "no GPU, not asked for": (having(BARE, gpus={}), wanting(check_bus=False), []),
    "a driver of other means": (
        having(BARE, loaded="570.86.15", library="570.86.15"),
        NVIDIA,
        ["driver: 570.86.15, not from the package cuda"],
    ),
    "a driver of other means that stays": (having(BARE, library="570.86.15"), wanting(install=False), []),
    "one that stays, new enough": (having(BARE, loaded="580.65.06"), FOUND, []),
    "one that stays, below the engine's floor": (
        having(BARE, loaded="550.54.15", library="580.65.06"), FOUND, ["driver: 550.54.15 as found"],
    ),
    "one that is to stay, and there is none": (BARE, FOUND, ["driver: none, and gpu_driver_install is false"]),
    "ours in another version": (
        having(DONE, packages={"cuda": "580.95.05-1"}),
        NVIDIA,
        ["driver: 580.95.05 is installed"],
    ),
    "ours in another version, allowed": (
        having(DONE, packages={"cuda": "580.95.05-1"}), wanting(allow_change=True), [],
    ),
    "ours of a branch whose packages are called otherwise": (
        having(DONE, packages={"cuda-470": "470.256.02-1"}), wanting(own_packages=["cuda-470", "cuda"]),
        ["driver: 470.256.02 is installed"],
    ),
    "ours of such a branch, allowed": (
        having(DONE, packages={"cuda-470": "470.256.02-1"}),
        wanting(own_packages=["cuda-470", "cuda"], allow_change=True),
        [],
    ),
    "ours of a branch that the catalogue dropped": (
        having(DONE, packages={}, dropped={"cuda-470": "470.256.02-1"}, free_bytes={"/var": 0}),
        wanting(branches=["580", "595"]),
        ["driver: 470.256.02 is installed, of branch 470, which the catalogue does not have: it has 580, 595"],
    ),
    "ours of such a branch, whose packages carry no branch": (
        having(DONE, packages={"cuda": "470.256.02-1", "fm": "470.256.02-1"}), wanting(branches=["580", "595"]),
        ["driver: 470.256.02 is installed, of branch 470, which the catalogue does not have: it has 580, 595"],
    ),
    "a dropped one, allowed": (
        having(DONE, packages={}, dropped={"cuda-470": "470.256.02-1"}),
        wanting(branches=["580", "595"], allow_change=True),
        [],
    ),
    "a transitional package of a dropped one beside ours": (
        having(DONE, dropped={"cuda-470": f"{V}-1"}), wanting(branches=["580", "595"]), [],
    ),
    "ours, with a package of such a branch left beside": (
        having(DONE, packages={**DONE.packages, "cuda-470": "470.256.02-1"}),
        wanting(own_packages=["cuda-470", "cuda"]),
        [],
    ),
    "all at once": (
        having(BARE, user="guest", free_bytes={}, gpus={}, library="1.2"),
        NVIDIA,
        ["user: guest", "space on /var: 0.0 GB free", "GPUs on the PCI bus: none",
         "driver: 1.2, not from the package cuda"],
    ),
    "without a GPU there is nothing to judge": (having(BARE, user="guest", gpus={}, free_bytes={}), Wanted(), []),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "wanted", "expected"), BEFORE.values(), ids=BEFORE)
def test_what_is_in_the_way(facts: Facts, wanted: Wanted, expected: list[str]) -> None:
    assert [f"{one.what}: {one.found}" for one in preparation.faults_before(facts, wanted)] == expected


def test_a_dropped_branch_can_be_kept_changed_or_given_back() -> None:
    dropped = having(DONE, packages={}, dropped={"cuda-470": "470.256.02-1"})
    (fault,) = preparation.faults_before(dropped, wanting(branches=["580", "595"]))
    assert fault.needed == V
    assert fault.mend == (
        "drain the node, then allow it once: -e gpu_driver_change_allowed=true; or keep it (gpu_driver_install: false)"
        ", or give its branch back to catalog/drivers.yml"
    )


@pytest.mark.parametrize("ours", [True, False])
def test_a_dropped_branch_is_ours_where_we_keep_its_version(
    ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"libnvidia-compute-470": Package("470.256.02-1"), "libnvidia-compute-470-server": Package("470.1-1")}
    monkeypatch.setattr(preparation.apt, "is_there", lambda: True)
    monkeypatch.setattr(preparation.apt.Apt, "installed", lambda self: there)
    if ours:
        (pin,) = package_sources.apt_pin_file("gpu-driver", [package_sources.Pin(["*nvidia*"], "470.256.02-*")])
        (tmp_path / pin.lstrip("/")).parent.mkdir(parents=True)
        (tmp_path / pin.lstrip("/")).touch()
    wanted = wanting(main_package="nvidia-headless-open", branch_packages=["libnvidia-compute-[0-9][0-9][0-9]"])
    found = preparation.gather(wanted, tmp_path).dropped
    assert found == ({"libnvidia-compute-470": "470.256.02-1"} if ours else {})


AFTER: dict[str, tuple[Facts, Wanted, list[str], list[str]]] = {
    "it fits": (DONE, NVIDIA, [], []),
    "installed, not restarted yet": (
        having(DONE, loaded="", installed_at=150),
        NVIDIA,
        [],
        [f"driver {V} is installed, in the kernel none runs"],
    ),
    "upgraded, not restarted yet": (
        having(DONE, loaded="580.95.05", installed_at=150),
        NVIDIA,
        [],
        [f"driver {V} is installed, in the kernel 580.95.05 runs"],
    ),
    "restarted, and the module was not built": (
        having(DONE, loaded="", on_disk=""),
        NVIDIA,
        ["kernel module nvidia: none runs; none was built for the running kernel"],
        [],
    ),
    "restarted, and an older module runs": (
        having(DONE, loaded="580.95.05", on_disk="580.95.05"),
        NVIDIA,
        ["kernel module nvidia: 580.95.05; on disk is 580.95.05"],
        [],
    ),
    "an upgrade split library and package": (
        having(DONE, library="580.159.04", packages={"cuda": f"{V}-1", "fm": "580.159.04-1"}),
        NVIDIA,
        ["package fm: 580.159.04-1", "library libnvidia-ml.so.1: 580.159.04",
         f"kernel module nvidia: {V}; on disk is {V}"],
        [],
    ),
    "nothing was installed": (
        BARE,
        NVIDIA,
        ["package cuda: not installed", "package fm: not installed", "library libnvidia-ml.so.1: not there"],
        [],
    ),
    "the driver is left alone, and there is none": (
        BARE,
        wanting(install=False),
        ["library libnvidia-ml.so.1: not there"],
        [],
    ),
    "a driver that is not ours fits": (
        having(DONE, packages={}, loaded="570.86.15", library="570.86.15"),
        wanting(install=False),
        [],
        [],
    ),
    "a driver that is not ours is below the floor": (
        having(DONE, packages={}, loaded="550.54.15", library="550.54.15"), FOUND, ["driver: 550.54.15 as found"], [],
    ),
    "one that is not ours was upgraded, not restarted yet": (
        having(DONE, packages={}, loaded="580.65.06", library="580.95.05", installed_at=150),
        FOUND,
        [],
        ["driver 580.95.05 is installed, in the kernel 580.65.06 runs"],
    ),
    "one that is not ours was upgraded, restarted, and does not fit": (
        having(DONE, packages={}, loaded="580.65.06", on_disk="580.65.06", library="580.95.05"),
        FOUND,
        ["kernel module nvidia: 580.65.06; on disk is 580.65.06"],
        [],
    ),
    "the newest kernel came without headers": (
        having(DONE, next_kernel="6.8.0-51-generic"),
        NVIDIA,
        ["kernel 6.8.0-51-generic: installed, and has no module nvidia"],
        [],
    ),
    "the newest kernel has its module": (having(DONE, next_kernel="6.8.0-51-generic", next_module=V), NVIDIA, [], []),
    "the kernel runs without its parameters": (
        having(DONE, command_line=["ro", "iommu=pt"]),
        wanting(kernel_parameters=["iommu=pt", "pci=realloc=off"]),
        [],
        ["the kernel runs without pci=realloc=off"],
    ),
    "the system asks": (
        having(DONE, reboot_wanted="linux-image-6.8"), NVIDIA, [], [],  # the driver does not wait for it
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "wanted", "faults", "reboot"), AFTER.values(), ids=AFTER)
def test_how_it_fits(facts: Facts, wanted: Wanted, faults: list[str], reboot: list[str]) -> None:
    assert [f"{one.what}: {one.found}" for one in preparation.faults_after(facts, wanted)] == faults
    assert preparation.reboot_reasons(facts, wanted) == reboot


def test_what_the_system_asks_for_is_told_apart_from_what_the_driver_waits_for() -> None:
    facts = having(DONE, reboot_wanted="libc6", loaded="", installed_at=150)
    assert preparation.reboot_reasons(facts, NVIDIA) == [f"driver {V} is installed, in the kernel none runs"]
    assert preparation.reboot_reasons_of_the_system(facts) == ["the system asks for it (libc6)"]
    assert preparation.reboot_reasons_of_the_system(DONE) == []


AMD_PACKAGES = ["amdgpu-dkms=*.30300400-*", "rocm-core=*.70204-*"]
AMD = Wanted("amd", "7.2.4", "amdgpu", "", "amdgpu-dkms", AMD_PACKAGES, kernel_parameters=["iommu=pt"])
AMD_THERE = {"amdgpu-dkms": "1:6.16.13.30300400-2341068.24.04", "rocm-core": "7.2.4.70204-93~24.04"}
AMD_OLD = {"amdgpu-dkms": "1:6.12.12.60401-2164967.24.04", "rocm-core": "6.4.1.60401-83~24.04"}
AMD_DONE = Facts("gpu1", packages=AMD_THERE, loaded="6.16.13", on_disk="6.16.13",
                 installed_at=50, booted_at=100, command_line=["iommu=pt"], gpus={"amd": 8})  # fmt: skip
AMD_CASES: dict[str, tuple[Facts, list[str], list[str]]] = {
    "it fits": (AMD_DONE, [], []),
    "the kernel's own still runs": (
        having(AMD_DONE, loaded="6.8.0-45-generic", installed_at=150),
        [],
        ["amdgpu 6.16.13 is installed, in the kernel 6.8.0-45-generic runs"],
    ),
    "an older ROCm stayed": (
        having(AMD_DONE, packages=AMD_OLD),
        ["package amdgpu-dkms: 1:6.12.12.60401-2164967.24.04", "package rocm-core: 6.4.1.60401-83~24.04"],
        [],
    ),
    "and after a restart too": (
        having(AMD_DONE, loaded="6.8.0-45-generic"),
        ["kernel module amdgpu: 6.8.0-45-generic; on disk is 6.16.13"],
        [],
    ),
}


@pytest.mark.parametrize(("facts", "faults", "reboot"), AMD_CASES.values(), ids=AMD_CASES)
def test_how_amds_fits(facts: Facts, faults: list[str], reboot: list[str]) -> None:
    assert [f"{one.what}: {one.found}" for one in preparation.faults_after(facts, AMD)] == faults
    assert preparation.reboot_reasons(facts, AMD) == reboot


AMD_FOUND = Wanted("amd", module="amdgpu", install=False, minimum="7.2", minimum_of="SGLang 0.5.23")
AMD_FOUND_CASES: dict[str, tuple[Facts, list[str], list[str]]] = {
    "the kernel's own, which has no version": (having(AMD_DONE, loaded="6.8.0-45-generic", on_disk=""), [], []),
    "AMD's": (AMD_DONE, [], []),
    "AMD's was upgraded, not restarted yet": (
        having(AMD_DONE, loaded="6.12.12", installed_at=150),
        [],
        ["amdgpu 6.16.13 is installed, in the kernel 6.12.12 runs"],
    ),
    "AMD's was installed over the kernel's own, not restarted yet": (
        having(AMD_DONE, loaded="6.8.0-45-generic", installed_at=150),
        [],
        ["amdgpu 6.16.13 is installed, in the kernel 6.8.0-45-generic runs"],
    ),
    "and after a restart too": (
        having(AMD_DONE, loaded="6.8.0-45-generic"),
        ["kernel module amdgpu: 6.8.0-45-generic; on disk is 6.16.13"],
        [],
    ),
    "none runs": (
        having(AMD_DONE, loaded="", on_disk=""),
        ["kernel module amdgpu: none runs; none was built for the running kernel"],
        [],
    ),
}


@pytest.mark.parametrize(("facts", "faults", "reboot"), AMD_FOUND_CASES.values(), ids=AMD_FOUND_CASES)
def test_how_amds_fits_that_is_not_ours(facts: Facts, faults: list[str], reboot: list[str]) -> None:
    found = having(facts, packages={})
    assert [f"{one.what}: {one.found}" for one in preparation.faults_after(found, AMD_FOUND)] == faults
    assert preparation.reboot_reasons(found, AMD_FOUND) == reboot


@pytest.mark.parametrize(
    ("rocm", "loaded", "expected"),
    [
        ("6.4.1", "6.12.12", [("ROCm", "6.4.1 as found", "7.2 or newer for SGLang 0.5.23 and its image")]),
        ("7.2.4", "6.16.13", []),
        ("", "6.16.13", []),  # it need not be outside of containers
        ("", "", [("driver", "none, and gpu_driver_install is false", "one")]),
    ],
)
def test_amds_as_found(rocm: str, loaded: str, expected: list[tuple[str, str, str]]) -> None:
    faults = preparation.faults_before(having(AMD_DONE, rocm=rocm, loaded=loaded), AMD_FOUND)
    assert [(one.what, one.found, one.needed) for one in faults] == expected


def test_an_older_rocm_is_no_green_prepare() -> None:
    (fault,) = preparation.faults_before(having(AMD_DONE, packages=AMD_OLD), AMD)
    there = "amdgpu-dkms 1:6.12.12.60401-2164967.24.04, rocm-core 6.4.1.60401-83~24.04 is installed"
    assert (fault.what, fault.found, fault.needed) == ("driver", there, "7.2.4")
    assert [*preparation.faults_before(AMD_DONE, AMD)] == []
    bare = having(AMD_DONE, packages={})
    assert [*preparation.faults_before(bare, AMD)] == []


def test_the_node_is_read_from_its_files(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("proc/driver/nvidia/version", LOADED["open module 615.71.09, Arch (2026-10)"][0])
    put("proc/cmdline", "BOOT_IMAGE=/vmlinuz ro iommu=pt\n")
    put("proc/stat", "cpu 1 2 3\nbtime 1763700000\n")
    put("usr/lib64/libnvidia-ml.so.580.126.20", "")
    (tmp_path / "usr/lib64/libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.126.20")
    for number, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x068000"), ("0x8086", "0x030000")]):
        put(f"sys/bus/pci/devices/{number}/vendor", f"{vendor}\n")
        put(f"sys/bus/pci/devices/{number}/class", f"{kind}\n")
    put("run/reboot-required", "")
    put("boot/vmlinuz-999.1.0-2-generic", "")
    put("boot/vmlinuz-2.6.32-1-generic", "")
    put("boot/vmlinuz-0-rescue-5a7e", "")
    put("run/reboot-required.pkgs", "linux-image-6.8\nlinux-image-6.8\nlibc6\n")
    facts = preparation.gather(Wanted("nvidia", V, "", "libnvidia-ml.so.1"), tmp_path)
    assert facts.loaded == "615.71.09"
    assert facts.library == V
    assert facts.booted_at == 1763700000
    assert facts.command_line == ["BOOT_IMAGE=/vmlinuz", "ro", "iommu=pt"]
    assert facts.gpus == {"nvidia": 1}  # an NVSwitch is a bridge, an Intel display no GPU of ours
    assert facts.reboot_wanted == "linux-image-6.8, libc6"
    assert (facts.next_kernel, facts.next_module) == ("999.1.0-2-generic", "")


MODINFO = """\
#!/bin/sh
case "$*" in
  "-F version nvidia") echo 580.95.05 ;;
  "-F filename nvidia") echo MODULE ;;
  "-k 999.1.0-28-amd64 -F version nvidia") echo 580.95.05 ;;
esac
"""


@pytest.fixture
def upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose driver was upgraded to 580.95.05, and runs 580.65.06; of the kernels -26 has no module."""
    running = "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Aug\n"
    kernels = [(f"boot/vmlinuz-999.1.0-{number}-amd64", "") for number in (9, 26, 28)]
    library = "usr/lib64/libnvidia-ml.so.580.95.05", ""
    program = "bin/modinfo", MODINFO.replace("MODULE", str(tmp_path / "nvidia.ko"))
    for path, text in (running, *kernels, library, program, ("nvidia.ko", "")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "usr/lib64/libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.95.05")
    (tmp_path / "bin/modinfo").chmod(0o755)
    (tmp_path / "proc/stat").write_text(f"btime {int(time.time()) - 60}\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def test_of_kernels_to_come_the_newest_counts(upgraded: Path) -> None:
    """The node comes up with that one alone; whether an older one has the module is nobody's concern."""
    facts = preparation.gather(FOUND, upgraded)
    assert (facts.next_kernel, facts.next_module) == ("999.1.0-28-amd64", "580.95.05")
    assert [*preparation.faults_after(facts, FOUND)] == []


def test_an_upgrade_by_other_means_since_the_start_asks_for_a_restart(upgraded: Path) -> None:
    reason = "driver 580.95.05 is installed, in the kernel 580.65.06 runs"
    for name in ("nvidia.ko", "usr/lib64/libnvidia-ml.so.580.95.05"):
        os.utime(upgraded / name, (0, 0))  # packages give files the time of their build
    facts = preparation.gather(FOUND, upgraded)
    assert [*preparation.faults_after(facts, FOUND)] == []
    assert preparation.reboot_reasons(facts, FOUND) == [reason]
    (upgraded / "proc/stat").write_text(f"btime {int(time.time()) + 60}\n")
    restarted = preparation.gather(FOUND, upgraded)
    (fault,) = preparation.faults_after(restarted, FOUND)
    assert (fault.what, fault.found) == ("kernel module nvidia", "580.65.06; on disk is 580.95.05")
    assert preparation.reboot_reasons(restarted, FOUND) == []
    (upgraded / "usr/lib64/libnvidia-ml.so.1").unlink()
    assert preparation.gather(FOUND, upgraded).installed_at == (upgraded / "nvidia.ko").stat().st_ctime
    (upgraded / "nvidia.ko").unlink()
    assert preparation.gather(FOUND, upgraded).installed_at == 0


RPM = """\
#!/bin/sh
case "$1 $4" in
  "-qa ") printf 'amdgpu-dkms\\t6.16.13.30300400-2341068.el9\\n' ;;
  "-q amdgpu-dkms") [ "$3" = '%{INSTALLTIME}\\n' ] && echo INSTALLED ;;
esac
"""


def test_rpm_tells_when_the_driver_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of AMD's driver lies in /usr/lib64, and much else does."""
    for path, text in {
        "bin/dnf": "#!/bin/sh\n", "bin/rpm": RPM.replace("INSTALLED", "1763700060"),
        "proc/stat": "btime 1763700000\n", "proc/cmdline": "iommu=pt\n", "sys/module/amdgpu/version": "6.12.12\n",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    (tmp_path / "usr/lib64").mkdir(parents=True)
    os.utime(tmp_path / "usr/lib64", (1, 1))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(preparation, "_modinfo", lambda module, what="version", kernel="": "6.16.13")
    wanted = Wanted("amd", "7.2.4", "amdgpu", "", "amdgpu-dkms", ["amdgpu-dkms=*.30300400-*"])
    due = preparation.gather(wanted, tmp_path)
    assert due.installed_at == 1763700060
    assert [*preparation.faults_after(due, wanted)] == []
    assert preparation.reboot_reasons(due, wanted) == ["amdgpu 6.16.13 is installed, in the kernel 6.12.12 runs"]
    os.utime(tmp_path / "usr/lib64")  # another package came since the restart
    (tmp_path / "proc/stat").write_text("btime 1763700120\n")
    (fault,) = preparation.faults_after(preparation.gather(wanted, tmp_path), wanted)
    assert (fault.what, fault.found) == ("kernel module amdgpu", "6.12.12; on disk is 6.16.13")


def test_faults_are_told_with_what_mends_them() -> None:
    text = preparation.table(
        [Fault("user", "this is user 1", "root", "become"), Fault("x", "y", "", "")], "gpu1", "stops"
    )
    assert text == "gpu1 stops: 2 faults\n- user: this is user 1 (needed: root)\n  to mend: become\n- x: y"
