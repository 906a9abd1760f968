"""Whether a node can be prepared, and what its driver is: facts are read, faults are pure functions of them.

Standard library only: this runs on the node, under any Python from 3.9 on. Nothing on the node is changed.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import (
    apt,
    dnf,
    gpus,
    package_plan,
    package_sources,
    preflight,
)

PCI_VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
# Classes of PCI devices that compute: VGA, 3D, other display controllers, processing accelerators (pci.ids).
PCI_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
TITLES = {"nvidia": "NVIDIA", "amd": "AMD", "cpu": "none"}
# What the role gpu_driver has apt keep the driver's version with: it is there where the driver came by it.
OWN_PIN = "etc/apt/preferences.d/stepladder-gpu-driver-version"
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


ALLOW_ONCE = "drain the node, then allow it once: -e gpu_driver_change_allowed=true"


@dataclass(frozen=True)
class Fault:
    """One thing that is in the way: about what, what was found, what is needed, how to mend it."""

    what: str
    found: str
    needed: str
    mend: str


@dataclass(frozen=True)
class Wanted:
    """What the node is to have; the fields are the module's parameters.

    Args:
        vendor: `nvidia`, `amd`, or `cpu` for a node without a driver.
        version: of the driver. module: of the kernel. library: whose file's name ends with the version.
        main_package: is there if the driver was installed by us, or one of own_packages, the main ones of all branches.
        branch_packages: what such are called whose names carry their branch, with wild cards; branches: known ones.
        same_version: packages with their versions, `name=version` with wild cards.
        minimum_free_bytes: by path, as far as the driver is not installed yet.
        check_bus: whether the vendor's GPUs have to be on the PCI bus.
        allow_change: whether a driver may go from one version to another.
        install: whether the driver is ours to install; else what is there is only looked at.
        minimum: oldest driver (NVIDIA) or ROCm (AMD) that it may be then, and minimum_of whose need that is.
    """

    vendor: str = "cpu"
    version: str = ""
    module: str = ""
    library: str = ""
    main_package: str = ""
    same_version: Sequence[str] = ()
    kernel_parameters: Sequence[str] = ()
    minimum_free_bytes: Mapping[str, int] = field(default_factory=dict)
    check_bus: bool = True
    allow_change: bool = False
    install: bool = True
    minimum: str = ""
    minimum_of: str = ""
    own_packages: Sequence[str] = ()
    branch_packages: Sequence[str] = ()
    branches: Sequence[str] = ()


@dataclass(frozen=True)
class Facts:
    """What was found on the node; versions are empty where there is none.

    Args:
        loaded: version of the kernel's module that runs. on_disk: of the one that the running kernel would load.
        library: version of the library. rocm: ROCm's release.
        packages: version of each of `same_version`, of the main package and of other branches' main packages.
        dropped: the same of the main packages that we installed, of branches that are not known any more.
        installed_at, booted_at: seconds since 1970; the first is 0 where the driver is not there that is wanted.
        gpus: number of GPUs on the PCI bus by vendor.
        reboot_wanted: what the system itself says about a reboot that is due.
        next_kernel: release of the newest kernel that is installed, where it is newer than the running one: the node
            comes up with it. next_module: version of the module for it.
    """

    hostname: str = ""
    user: str = "root"
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    loaded: str = ""
    on_disk: str = ""
    library: str = ""
    rocm: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    installed_at: float = 0
    booted_at: float = 0
    command_line: Sequence[str] = ()
    gpus: Mapping[str, int] = field(default_factory=dict)
    reboot_wanted: str = ""
    next_kernel: str = ""
    next_module: str = ""

    def as_result(self) -> dict[str, Any]:
        """The facts that the module returns."""
        return {
            "loaded": self.loaded,
            "on_disk": self.on_disk,
            "library": self.library,
            "rocm": self.rocm,
            "packages": dict(self.packages),
            "gpus": dict(self.gpus),
        }


# ---- pure ------------------------------------------------------------------------------------------------------------


def parse_loaded_nvidia(text: str) -> str:
    """The version in /proc/driver/nvidia/version.

    `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ...`, without Open for the other.
    """
    found = re.search(r"(?m)^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else ""


def version_of_library(real_path: str) -> str:
    """The version that a library's file is called after: `libnvidia-ml.so.580.95.05`."""
    found = re.search(r"\.so\.(\d+\.\d+(?:\.\d+)?)$", real_path)
    return found[1] if found else ""


def upstream(version: str) -> str:
    """A package's version without epoch and the distribution's revision: `1:580.126.20-1ubuntu1` is 580.126.20."""
    return version.partition(":")[2].partition("-")[0] if ":" in version else version.partition("-")[0]


def faults_before(facts: Facts, wanted: Wanted) -> Iterator[Fault]:
    """All that keeps a node from being prepared; nothing is written while there is one."""
    if wanted.vendor == "cpu":
        return  # what else is wanted of such a node says itself what it needs
    if facts.user != "root":
        mend = "set ansible_become: true (and --ask-become-pass where sudo asks), or log in as root"
        yield Fault("user", facts.user, "root", mend)
    ours = _is_ours(facts, wanted)
    if not ours and wanted.install:
        for path, needed in wanted.minimum_free_bytes.items():
            free = facts.free_bytes.get(path, 0)
            if free < needed:
                yield Fault(
                    f"space on {path}", f"{free / 1e9:.1f} GB free", f"{needed / 1e9:.1f} GB",
                    "free some there: a driver that is half unpacked keeps dpkg from everything else",
                )  # fmt: skip
    yield from _other_gpus(facts, wanted)
    if wanted.install:
        yield from _other_driver(facts, wanted, ours)
        return
    if not facts.loaded and not facts.library:
        mend = "install one by the means of this system, or set gpu_driver_install: true"
        yield Fault("driver", "none, and gpu_driver_install is false", "one", mend)
    yield from _below_minimum(facts, wanted)


def _below_minimum(facts: Facts, wanted: Wanted) -> Iterator[Fault]:
    """A driver that is not ours to install is older than the engine needs it."""
    nvidia = wanted.vendor == "nvidia"
    version = facts.loaded or facts.library if nvidia else facts.rocm
    if version and wanted.minimum and gpus.numbers(version) < gpus.numbers(wanted.minimum):
        yield Fault(
            "driver" if nvidia else "ROCm", f"{version} as found",
            f"{wanted.minimum} or newer for {wanted.minimum_of} and its image",
            "replace it by the means that brought it, or plan an older release (deployment_engine_version)",
        )  # fmt: skip


def _other_gpus(facts: Facts, wanted: Wanted) -> Iterator[Fault]:
    if not wanted.check_bus or facts.gpus.get(wanted.vendor):
        return
    others = ", ".join(f"{count} of {TITLES[vendor]}" for vendor, count in sorted(facts.gpus.items()) if count)
    yield Fault(
        "GPUs on the PCI bus", others or "none", f"GPUs of {TITLES[wanted.vendor]}",
        "see lspci, and whether the host is in the group of its GPU type (deployment_gpu); where the bus does not "
        "tell, set gpu_driver_check_bus: false",
    )  # fmt: skip


def _is_ours(facts: Facts, wanted: Wanted) -> bool:
    """Whether the driver that is there was installed by us, of whatever branch."""
    return bool(facts.dropped) or any(facts.packages.get(name) for name in (wanted.main_package, *wanted.own_packages))


def _other_driver(facts: Facts, wanted: Wanted, ours: bool) -> Iterator[Fault]:
    """A driver that other means installed, or ours in another version."""
    if wanted.vendor == "nvidia" and not ours and (facts.loaded or facts.library):
        there = facts.library or facts.loaded
        yield Fault(
            "driver", f"{there}, not from the package {wanted.main_package}", "none, or ours",
            "remove it (the system's own packages, or nvidia-uninstall for a .run file), or keep it with "
            "gpu_driver_install: false",
        )  # fmt: skip
    others = {name: version for name, version in misfits(facts, wanted).items() if version}
    if not facts.packages.get(wanted.main_package):
        # Of another branch, whose packages can be called otherwise.
        others |= {name: facts.packages[name] for name in wanted.own_packages if facts.packages.get(name)}
        others |= facts.dropped
    if others and not wanted.allow_change:
        versions = sorted(set(map(upstream, others.values())))
        named = ", ".join(f"{name} {version}" for name, version in others.items())
        found, mend = f"{versions[0] if len(versions) == 1 else named} is installed", ALLOW_ONCE
        if unknown := unknown_branches(versions, wanted.branches):
            known = ", ".join(wanted.branches)
            found += f", of branch {', '.join(unknown)}, which the catalogue does not have: it has {known}"
            mend += "; or keep it (gpu_driver_install: false), or give its branch back to catalog/drivers.yml"
        yield Fault("driver", found, wanted.version, mend)


def unknown_branches(versions: Sequence[str], known: Sequence[str]) -> list[str]:
    """Branches of versions that are none of those known; none where a version does not tell its own."""
    branches = dict.fromkeys(version.partition(".")[0] for version in versions if known)
    return [branch for branch in branches if branch not in known]


def dropped(packages: Mapping[str, str], wanted: Wanted) -> dict[str, str]:
    """Main packages of branches that are none of ours any more, by the pattern of their names, with versions."""
    known = {wanted.main_package, *wanted.own_packages}
    return {
        name: version
        for name, version in packages.items()
        if name not in known and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted.branch_packages)
    }


def misfits(facts: Facts, wanted: Wanted) -> dict[str, str]:
    """Packages that are not there in the version wanted, with the one that is; empty for none."""
    specs = map(package_plan.Spec.of, wanted.same_version)
    found = {spec: facts.packages.get(spec.name, "") for spec in specs}
    return {
        spec.name: version for spec, version in found.items() if not version or not spec.matches(spec.name, version)
    }


def reboot_reasons(facts: Facts, wanted: Wanted) -> list[str]:
    """Why the driver waits for a reboot; none where the node runs the one that it has."""
    reasons = []
    if wanted.vendor == "nvidia" and facts.library and facts.loaded != facts.library and _not_rebooted(facts):
        runs = f"{facts.loaded} runs" if facts.loaded else "none runs"
        reasons.append(f"driver {facts.library} is installed, in the kernel {runs}")
    there = facts.packages.get(wanted.main_package) or not wanted.install
    if wanted.vendor == "amd" and there and _not_rebooted(facts):
        runs = f"{facts.loaded} runs" if facts.loaded else "none runs"
        if not facts.loaded or (facts.on_disk and facts.loaded != facts.on_disk):
            reasons.append(f"amdgpu {facts.on_disk or 'of this release'} is installed, in the kernel {runs}")
    if missing := missing_parameters(facts.command_line, wanted.kernel_parameters):
        reasons.append(f"the kernel runs without {' '.join(missing)}")
    return reasons


def reboot_reasons_of_the_system(facts: Facts) -> list[str]:
    """Why the system itself asks for a reboot. The driver works until then: libc6 was renewed, or a kernel came."""
    return [f"the system asks for it ({facts.reboot_wanted})"] if facts.reboot_wanted else []


def _not_rebooted(facts: Facts) -> bool:
    return facts.booted_at <= facts.installed_at


def missing_parameters(command_line: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Parameters that a kernel was started without."""
    return [parameter for parameter in wanted if parameter not in command_line]


def faults_after(facts: Facts, wanted: Wanted) -> Iterator[Fault]:
    """All that does not fit once the driver is installed; what a reboot mends is none."""
    if wanted.vendor == "cpu":
        return
    for name, version in misfits(facts, wanted).items() if wanted.install else ():
        mend = f"run prepare again; apt-cache policy {name} on the node tells what there is"
        yield Fault(f"package {name}", version or "not installed", wanted.version, mend)
    yield from _below_minimum(facts, wanted)
    if wanted.library and not facts.library:
        mend = "run prepare again" if wanted.install else "install a driver, or set gpu_driver_install: true"
        yield Fault(f"library {wanted.library}", "not there", wanted.version if wanted.install else "a driver", mend)
    elif wanted.library and wanted.install and facts.library != wanted.version:
        yield Fault(
            f"library {wanted.library}", facts.library, wanted.version,
            "another driver's library is in its place: ldconfig -p | grep nvidia-ml, dpkg -S on what it says",
        )  # fmt: skip
    if facts.on_disk and facts.next_kernel and not facts.next_module:
        kernel = facts.next_kernel
        yield Fault(
            f"kernel {kernel}", f"installed, and has no module {wanted.module}", "one with it",
            f"the node would come up without GPUs: install linux-headers-{kernel} (kernel-devel-{kernel}) and run dkms "
            "autoinstall, or take that kernel out",
        )  # fmt: skip
    if _fits(facts, wanted):
        return
    if not _not_rebooted(facts) and (facts.library or wanted.vendor == "amd"):
        disk = f"; on disk is {facts.on_disk}" if facts.on_disk else "; none was built for the running kernel"
        yield Fault(
            f"kernel module {wanted.module}", f"{facts.loaded or 'none runs'}{disk}", facts.library or "one that runs",
            f"the node has rebooted since: dkms status; journalctl -k | grep -i {wanted.module}; Secure Boot refuses "
            "modules that are not signed (mokutil --sb-state)",
        )  # fmt: skip


def _fits(facts: Facts, wanted: Wanted) -> bool:
    """Whether the module that runs is of the version of what is installed."""
    if wanted.vendor == "amd" and not wanted.install and not facts.on_disk:
        return bool(facts.loaded)  # the kernel's own module has no version to be held against
    return bool(facts.loaded) and facts.loaded == (facts.library or facts.on_disk)


def table(faults: Sequence[Fault], hostname: str, heading: str) -> str:
    """All faults as text: what, found and needed on one line, and under each what mends it."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    lines = [f"{hostname} {heading}: {count}"]
    for one in faults:
        needed = f" (needed: {one.needed})" if one.needed else ""
        lines.append(f"- {one.what}: {one.found}{needed}")
        if one.mend:
            lines.append(f"  to mend: {one.mend}")
    return "\n".join(lines)


# ---- the node --------------------------------------------------------------------------------------------------------


def gather(wanted: Wanted, root: Path = Path("/")) -> Facts:
    """Read from the node what the faults are judged by."""
    there = _packages([wanted.main_package, *wanted.own_packages, *wanted.branch_packages])
    named = (wanted.main_package, *wanted.own_packages, *(each.partition("=")[0] for each in wanted.same_version))
    packages = {name: there[name] for name in named if name in there}
    library = _library(wanted.library, root)
    next_kernel = _next_kernel(root)
    return Facts(
        hostname=os.uname().nodename,
        user="root" if os.geteuid() == 0 else preflight.user_name(os.geteuid()),
        free_bytes={path: _free(path) for path in wanted.minimum_free_bytes},
        loaded=_loaded(wanted, root),
        on_disk=_modinfo(wanted.module),
        library=version_of_library(library),
        rocm=preflight.read_text(root / gpus.ROCM_RELEASE.lstrip("/")).strip() if wanted.vendor == "amd" else "",
        packages=packages,
        dropped=dropped(there, wanted) if (root / OWN_PIN).is_file() else {},
        installed_at=_installed_at(wanted, packages, library, root),
        booted_at=_booted_at(root),
        command_line=preflight.read_text(root / "proc/cmdline").split(),
        gpus=_on_bus(root),
        reboot_wanted=_reboot_wanted(root),
        next_kernel=next_kernel,
        next_module=_modinfo(wanted.module, kernel=next_kernel) if next_kernel else "",
    )


def _packages(wanted: Sequence[str]) -> dict[str, str]:
    """Versions of all packages that are whole; none where nothing is wanted of them."""
    manager = apt.Apt(str, 0) if apt.is_there() else dnf.Dnf(str, 0) if dnf.is_there() else None
    found = manager.installed() if manager and any(wanted) else {}
    return {name: one.version for name, one in found.items() if one.status in {"ii", "hi"}}


def _free(path: str) -> int:
    found = os.statvfs(preflight.nearest_existing(Path(path)))
    return found.f_bavail * found.f_frsize


def _loaded(wanted: Wanted, root: Path) -> str:
    if wanted.vendor == "nvidia":
        return parse_loaded_nvidia(preflight.read_text(root / "proc/driver/nvidia/version"))
    if wanted.vendor == "amd" and (root / "sys/module/amdgpu").is_dir():
        # The kernel's own module has no version; then its release says which it is.
        return preflight.read_text(root / "sys/module/amdgpu/version").strip() or os.uname().release
    return ""


def _next_kernel(root: Path) -> str:
    """Release of the newest kernel in /boot, with which the node comes up; empty where none is newer than this one."""
    running = os.uname().release
    releases = [path.name.partition("-")[2] for path in (root / "boot").glob("vmlinuz-*")]
    newest = max([running, *(each for each in releases if "rescue" not in each)], key=_kernel_key)
    return "" if newest == running else newest


def _kernel_key(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def _modinfo(module: str, what: str = "version", kernel: str = "") -> str:
    program = shutil.which("modinfo", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if not module or not program:
        return ""
    of = ["-k", kernel] if kernel else []
    done = subprocess.run([program, *of, "-F", what, module], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _library(name: str, root: Path) -> str:
    """The file that a library's name leads to; empty where it is not there."""
    links = [root / folder.lstrip("/") / name for folder in LIBRARY_FOLDERS] if name else []
    return next((os.path.realpath(link) for link in links if link.exists()), "")


def _installed_at(wanted: Wanted, packages: Mapping[str, str], library: str, root: Path) -> float:
    """When the driver was last installed; 0 where the one that is wanted is not there.

    Of one that is not ours the library and the module tell it, by the time of their last change: packages give files
    the time of their build. Of ours it is the main package's: dpkg writes its list of files then, rpm keeps the time.
    """
    if not wanted.install:
        files = [Path(each) for each in (library, _modinfo(wanted.module, "filename")) if each]
        return max((path.stat().st_ctime for path in files if path.exists()), default=0.0)
    if not packages.get(wanted.main_package):
        return 0.0
    lists = sorted((root / "var/lib/dpkg/info").glob(f"{wanted.main_package}*.list"))
    if not lists and dnf.is_there():
        installed_s: float = dnf.Dnf(str, 0).installed_at(wanted.main_package)
        return installed_s
    return max((path.stat().st_mtime for path in lists), default=0.0)


def _booted_at(root: Path) -> float:
    found = re.search(r"(?m)^btime (\d+)$", preflight.read_text(root / "proc/stat"))
    return float(found[1]) if found else 0.0


def _on_bus(root: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    devices = root / "sys/bus/pci/devices"
    for device in devices.iterdir() if devices.is_dir() else ():
        vendor = PCI_VENDORS.get(preflight.read_text(device / "vendor").strip(), "")
        if vendor and preflight.read_text(device / "class").strip().startswith(PCI_CLASSES):
            counts[vendor] = counts.get(vendor, 0) + 1
    return counts


def _reboot_wanted(root: Path) -> str:
    """What Debian's and Ubuntu's packages leave in /run/reboot-required.pkgs."""
    if not (root / "run/reboot-required").exists():
        return ""
    names = preflight.read_text(root / "run/reboot-required.pkgs").split()
    return ", ".join(dict.fromkeys(names)) or "/run/reboot-required"


def key_faults(repositories: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """What is wrong with the keys of the repositories that would be added."""
    _, wrong = package_sources.checked_keys(package_sources.parsed(repositories))
    return [Fault("package repository", text, "", "") for text in wrong]
