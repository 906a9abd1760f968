"""Which driver a node gets, from where and as which packages: the catalogue's answer for a GPU type on a system."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepladder.catalogue import Catalogue, DriverRelease, DriverSystem, EngineRelease, Gpu, KernelFlavours
from stepladder.errors import Violation, unknown_name
from stepladder.mirrors import filled, mirrored, problems
from stepladder.versions import older

RED_HAT = {"RedHat", "CentOS", "Rocky", "AlmaLinux", "OracleLinux"}
PERSISTENCE = "nvidia-persistenced"
FABRIC_SERVICES = {
    "nvswitch": ["nvidia-fabricmanager"],
    "nvlink5": ["nvidia-fabricmanager"],
    "imex": ["nvidia-imex"],
}
# Of Ansible's facts those that tell a node's system.
FACTS = ("distribution", "distribution_version", "distribution_release", "architecture", "kernel")
QUOTE = "Put it into quotes."
# Of a wish what is text.
TEXTS = ("gpu", "branch", "version", "engine", "engine_version")
# What the kernel's part of a driver is called, and a library of the other part whose file carries its version.
MODULES = {"nvidia": "nvidia", "amd": "amdgpu"}
LIBRARIES = {"nvidia": "libnvidia-ml.so.1", "amd": ""}


@dataclass(frozen=True)
class System:
    """A node's system, from Ansible's facts.

    Args:
        distribution: as the catalogue has it: `debian12`, `ubuntu2404`, `rhel9`.
        release: `12.8`, `24.04`, `9.6`.
        codename: `bookworm`; empty on Red Hat's family.
        machine: `x86_64`. kernel: the running kernel's release.
        flavour: of the packages that follow that kernel, empty for none known.
    """

    distribution: str
    release: str
    codename: str
    machine: str
    kernel: str
    flavour: str = ""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> System:
        """Read `distribution`, `distribution_version`, `distribution_release`, `architecture` and `kernel`."""
        name, release = str(facts.get("distribution", "")), str(facts.get("distribution_version", ""))
        major = release.partition(".")[0]
        known = {"Debian": f"debian{major}", "Ubuntu": f"ubuntu{release.replace('.', '')}"}
        distribution = f"rhel{major}" if name in RED_HAT else known.get(name, f"{name} {release}".strip())
        codename = "" if name in RED_HAT else str(facts.get("distribution_release", ""))
        return cls(distribution, release, codename, str(facts.get("architecture", "")), str(facts.get("kernel", "")))


@dataclass(frozen=True)
class Wish:
    """What the inventory says about a node's driver.

    Args:
        gpu: the GPU type. branch, version: other than the catalogue's; a version of a branch that it knows.
        mirrors: by the repository's name `url`, `key_url`, `key`, `fingerprints`, `suites`, each instead of its own.
        packages: instead of the catalogue's own.
        install: whether it is installed; else only the one that is there is looked at.
        engine, engine_version: whose floor the driver has to reach; empty for none, and for the newest.
        reboot_at_a_time: nodes that are restarted at the same time.
    """

    gpu: str
    branch: str = ""
    version: str = ""
    mirrors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    packages: Sequence[str] = ()
    install: bool = True
    engine: str = ""
    engine_version: str = ""
    reboot_at_a_time: int = 1


def driver_plan(wish: Mapping[str, Any], facts: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """What a node's driver takes, as the role `gpu_driver` carries it out; `faults` says why it cannot.

    Args:
        wish: fields of `Wish`; what is none counts as not said.
        facts: of the node's system, as `System.of` reads them.
        directory: of the catalogue.

    Returns: `vendor` (cpu where there is nothing to do), `title`, `summary`, `version`, `packages`, `repositories`,
        `pins`, `hold`, `module_streams`, `services`, `kernel_modules`, `kernel_parameters`, `sysctl`, `module`,
        `library`, `main_package`, `own_packages` (the main packages of all branches), `branch_packages` (the names of
        those that carry their branch, with wild cards in its place), `branches` (that the catalogue has, where a
        version begins with its own), `same_version` (packages with the versions that fit), `minimum` and `minimum_of`
        (oldest driver and whose need it is, where the node's own is only looked at), and `faults`, each with `what`,
        `found`, `needed` and `mend`.

    Raises:
        CatalogueError: the catalogue is broken.
    """
    wanted = Wish(**{name: _as_text(name, value) for name, value in wish.items() if value is not None})
    catalogue = _catalogue(directory)
    if misread := _misread(wish, catalogue):
        return _nothing("unknown", "not known") | {"faults": [fault(each) for each in misread]}
    gpu = catalogue.gpus.get(wanted.gpu)
    if gpu is None:
        violation = unknown_name("GPU type", wanted.gpu or "(deployment_gpu is not set)", catalogue.gpus)
        return _nothing("unknown", "unknown GPU type") | {"faults": [fault(violation)]}
    if gpu.driver is None:
        return _nothing(gpu.vendor, f"{gpu.title}: there is nothing to do for a driver")
    if not wanted.install:
        return _as_found(wanted, gpu, catalogue)
    system = System.of(facts)
    system = replace(system, flavour=_flavour(system, catalogue.drivers.kernels))
    faults: list[Violation] = []
    faults += _below_floor(wanted, gpu, catalogue)
    release = None if faults else _release(wanted, gpu, catalogue, faults)
    known = _system(gpu, release, system, catalogue, faults) if release else None
    if not release or not known:
        return _nothing(gpu.vendor, gpu.title) | {"faults": [fault(each) for each in faults]}
    return _plan(wanted, gpu, release, known, system) | {
        "own_packages": _own_packages(gpu, system, catalogue),
        "branch_packages": _branch_packages(gpu, system, catalogue),
        "branches": [each.branch for each in catalogue.drivers.releases if each.platform == gpu.platform == "cuda"],
        "faults": [fault(each) for each in faults],
    }


def _as_text(name: str, value: Any) -> Any:
    """A value of a wish, text where `Wish` has text: YAML reads an unquoted 580 as a number."""
    return str(value) if name in TEXTS else int(value) if name == "reboot_at_a_time" else value


def _misread(wish: Mapping[str, Any], catalogue: Catalogue) -> list[Violation]:
    """What of a wish would be taken for something else than what was meant, or for nothing at all."""
    broken = [
        Violation(
            f"gpu_driver_{name}",
            f"the number {wish[name]}, of which a nought at its end would be gone",
            "Put it into quotes.",
        )
        for name in ("branch", "version")
        if isinstance(wish.get(name), float)
    ]
    if int(wish.get("reboot_at_a_time") or 0) < 1 and "reboot_at_a_time" in wish:
        found = f"{wish['reboot_at_a_time']}, with which all nodes would be restarted at once"
        broken.append(Violation("gpu_driver_reboot_at_a_time", found, "Give 1 or more."))
    known = {one.name for system in catalogue.drivers.systems for one in system.repositories}
    for name, mirror in (wish.get("mirrors") or {}).items():
        if name not in known:
            broken.append(unknown_name("repository in gpu_driver_mirrors", name, known))
        else:
            broken += problems(f"gpu_driver_mirrors.{name}", mirror)
    return broken


@functools.cache
def _catalogue(directory: str) -> Catalogue:
    """A catalogue, read once for all nodes."""
    return Catalogue(Path(directory))


def mixed_types(types: Mapping[str, str], deployments: Mapping[str, str], host: str) -> list[dict[str, str]]:
    """The fault of a node whose deployment names several GPU types.

    Args:
        types: GPU type by host. deployments: name of the deployment by host.
        host: the node.
    """
    own = {name: types[name] for name in types if deployments.get(name) == deployments.get(host)}
    if len(set(own.values())) < 2:
        return []
    others = [name for name, kind in own.items() if kind != own[host]]
    found = f"{own[host]} here, {', '.join(f'{own[name]} on {name}' for name in others)}"
    mend = "use one inventory for each type; a replica over unlike GPUs does not start"
    return [{"what": "GPU types of one deployment", "found": found, "needed": "one type", "mend": mend}]


def _release(wanted: Wish, gpu: Gpu, catalogue: Catalogue, faults: list[Violation]) -> DriverRelease | None:
    assert gpu.driver is not None  # noqa: S101 - for the type checker
    releases = {each.branch: each for each in catalogue.drivers.releases if each.platform == gpu.platform}
    branch = wanted.branch or (_branch_of(wanted.version, releases) if wanted.version else gpu.driver.branch)
    release = releases.get(branch)
    if release is None:
        faults.append(unknown_name("driver branch", branch, releases))
        return None
    if wanted.version and not f"{wanted.version}.".startswith(f"{branch}."):
        mend = f"Set gpu_driver_version to one of {branch}, or gpu_driver_branch to the version's own."
        faults.append(Violation("gpu_driver_version", f"{wanted.version} is not of branch {branch}", mend))
        return None
    if wanted.version not in ("", release.version) and release.kernel_driver:
        found = f"{wanted.version}, and which amdgpu goes with it is not known; known is {release.version}"
        mend = "Leave it out, or add the release with its kernel_driver to catalog/drivers.yml."
        faults.append(Violation("gpu_driver_version", found, mend))
        return None
    return release.model_copy(update={"version": wanted.version}) if wanted.version else release


def _branch_of(version: str, known: Mapping[str, object]) -> str:
    """The known branch that a version is of, or what looks like its branch."""
    return next((branch for branch in known if f"{version}.".startswith(f"{branch}.")), version.partition(".")[0])


def _system(
    gpu: Gpu, release: DriverRelease, system: System, catalogue: Catalogue, faults: list[Violation]
) -> DriverSystem | None:
    of_platform = [each for each in catalogue.drivers.systems if each.platform == gpu.platform]
    named = [each for each in of_platform if system.distribution in each.distributions]
    if not named:
        known = sorted({name for each in of_platform for name in each.distributions})
        mend = (
            f"Its packages and their key are not known. Use one of {', '.join(known)}, or install the driver by hand "
            "and set gpu_driver_install: false."
        )
        faults.append(Violation("the node's system", f"{system.distribution or 'unknown'}", mend))
        return None
    fitting = [each for each in named if _is_for(each, release.branch)]
    if not fitting or system.machine not in fitting[0].machines:
        there = ", ".join(fitting[0].machines) if fitting else "another branch"
        found = f"{system.machine or 'unknown'} with {system.distribution}"
        faults.append(Violation("the node's machine", found, f"Packages of {release.branch} are there for {there}."))
        return None
    return fitting[0]


def _is_for(known: DriverSystem, branch: str) -> bool:
    below = known.below_branch is None or older(branch, known.below_branch)
    return below and (known.from_branch is None or not older(branch, known.from_branch))


def _own_packages(gpu: Gpu, system: System, catalogue: Catalogue) -> list[str]:
    """The main packages of every branch that the catalogue has for a system: a driver of one of them is ours."""
    found = [
        filled(known.packages[0], {"branch": release.branch})
        for known in catalogue.drivers.systems
        for release in catalogue.drivers.releases
        if known.platform == release.platform == gpu.platform
        and system.distribution in known.distributions
        and _is_for(known, release.branch)
    ]
    return list(dict.fromkeys(found))


def _branch_packages(gpu: Gpu, system: System, catalogue: Catalogue) -> list[str]:
    """What the main package of a branch is called that the catalogue once had, where names carry it (580)."""
    known = [each for each in catalogue.drivers.systems if each.platform == gpu.platform]
    names = [each.packages[0] for each in known if system.distribution in each.distributions]
    return [filled(name, {"branch": "[0-9][0-9][0-9]"}) for name in names if "{branch}" in name]


def _floor(wanted: Wish, gpu: Gpu, catalogue: Catalogue) -> tuple[str, str]:
    """The oldest driver that the engine's release runs on, and that release by name; both empty for none."""
    engine = catalogue.engines.get(wanted.engine)
    releases = [each for each in engine.releases if each.platform == gpu.platform] if engine else []
    wished: EngineRelease | None = next((r for r in releases if r.version == wanted.engine_version), None)
    chosen = wished or (releases[0] if releases else None)
    if not engine or not chosen or not chosen.minimum_driver:
        return "", ""
    return chosen.minimum_driver, f"{engine.title} {chosen.version}"


def _below_floor(wanted: Wish, gpu: Gpu, catalogue: Catalogue) -> list[Violation]:
    """The driver to be installed is older than what the engine's release needs, or its image."""
    version = wanted.version or wanted.branch or (gpu.driver.branch if gpu.driver else "")
    floor, release = _floor(wanted, gpu, catalogue)
    if not floor or not older(version, floor):
        return []
    kind = "driver" if gpu.vendor == "nvidia" else "ROCm"
    found = f"{version}; {release} and its image need {floor} or newer"
    return [Violation(kind, found, "Set gpu_driver_branch and gpu_driver_version, or deployment_engine_version.")]


def _as_found(wanted: Wish, gpu: Gpu, catalogue: Catalogue) -> dict[str, Any]:
    """The plan where the driver is not ours to install: nothing is set, what is there is held against the floor."""
    floor, release = _floor(wanted, gpu, catalogue)
    return _nothing(gpu.vendor, f"{gpu.title}: the driver that is there") | {
        "title": gpu.title,
        "module": MODULES[gpu.vendor],
        "library": LIBRARIES[gpu.vendor],
        "minimum": floor,
        "minimum_of": release,
    }


def _flavour(system: System, kernels: Sequence[KernelFlavours]) -> str:
    """The flavour whose packages follow the kernel that runs: `amd64`, `generic-hwe-22.04`; empty for none known."""
    for each in kernels:
        fitting = [name for name in each.flavours if system.kernel.endswith(f"-{name}")]
        if system.distribution in each.distributions and fitting:
            later = each.first and not system.kernel.startswith(f"{each.first}.")
            return max(fitting, key=len) + (each.enablement if later else "")
    return ""


def _plan(wanted: Wish, gpu: Gpu, release: DriverRelease, known: DriverSystem, system: System) -> dict[str, Any]:
    assert gpu.driver is not None  # noqa: S101 - for the type checker
    words = {
        "distribution": system.distribution,
        "codename": known.codenames.get(system.distribution, system.codename),
        "release": system.release,
        "major": system.release.partition(".")[0],
        "machine": known.machines[system.machine],
        "branch": release.branch,
        "version": release.version,
        "kernel": system.kernel,
        "kernel_version": system.kernel.removesuffix(f".{system.machine}"),
        "kernel_flavour": system.flavour,
        "kernel_driver": release.kernel_driver,
        "version_number": _number(release.version),
        "kernel_driver_number": _number(release.kernel_driver),
    }
    fabric = gpu.driver.fabric
    parts = [*(wanted.packages or known.packages), *known.fabric_packages.get(fabric, ())]
    names = [filled(name, words) for name in parts]
    patterns = {name: known.package_versions.get(name, known.package_version) for name in names}
    versioned = [name if "=" in name else f"{name}={filled(patterns[name], words)}" for name in names]
    kernels = [name for name in known.kernel_packages if system.flavour or "{kernel_flavour}" not in name]
    beside = [*kernels, *known.companions.get(fabric, ())]
    nvidia = gpu.vendor == "nvidia"
    return {
        "vendor": gpu.vendor,
        "title": gpu.title,
        "summary": _summary(gpu, release),
        "version": release.version,
        "packages": [filled(name, words) for name in beside] + versioned,
        "repositories": [
            mirrored(each.model_dump(), wanted.mirrors.get(each.name, {}), words) for each in known.repositories
        ],
        "pins": [{"packages": list(known.pin), "version": f"{release.version}-*"}] if known.pin else [],
        "hold": list(known.hold) or [f"*={release.version}-*", *known.companions.get(fabric, ())],
        "module_streams": [filled(each, words) for each in known.module_streams.get(system.distribution, ())],
        "services": [*([PERSISTENCE] if nvidia else []), *FABRIC_SERVICES.get(fabric, [])],
        "kernel_modules": list(known.kernel_modules.get(fabric, ())),
        "kernel_parameters": list(gpu.driver.kernel_parameters),
        "sysctl": dict(gpu.driver.sysctl),
        "module": MODULES[gpu.vendor],
        "library": LIBRARIES[gpu.vendor],
        "main_package": names[0].partition("=")[0],
        "same_version": versioned,
        "minimum": "",
        "minimum_of": "",
    }


def _number(version: str) -> str:
    """A version as AMD's packages carry it: 70204 for 7.2.4."""
    first, *rest = version.split(".")
    return first + "".join(part.zfill(2) for part in rest)


def _summary(gpu: Gpu, release: DriverRelease) -> str:
    joined = {
        "nvswitch": ", fabric manager",
        "nvlink5": ", fabric manager and NVLink subnet manager",
        "imex": ", IMEX",
        "none": "",
    }
    assert gpu.driver is not None  # noqa: S101 - for the type checker
    if gpu.vendor == "amd":
        return f"{gpu.title}: ROCm {release.version}, amdgpu {release.kernel_driver}"
    return f"{gpu.title}: driver {release.version} with the open kernel module{joined[gpu.driver.fabric]}"


def _nothing(vendor: str, summary: str) -> dict[str, Any]:
    lists = [
        *("packages", "repositories", "pins", "hold", "module_streams", "services", "kernel_modules"),
        *("kernel_parameters", "own_packages", "branch_packages", "branches", "same_version", "faults"),
    ]
    texts = ("title", "version", "module", "library", "main_package", "minimum", "minimum_of")
    return {"vendor": vendor, "summary": summary, "sysctl": {}} | {n: [] for n in lists} | dict.fromkeys(texts, "")


def fault(violation: Violation) -> dict[str, str]:
    """A violation as `stepladder.core.preparation` takes faults that were found elsewhere."""
    return {"what": violation.rule, "found": violation.found, "needed": "", "mend": violation.mend}
