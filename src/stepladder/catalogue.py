"""What is known about models, GPUs and engines, read from `catalog/` and checked on load.

A new model, GPU or engine release is a new entry in a file and no code. Every group of figures names its source.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from stepladder.errors import CatalogueError
from stepladder.request import FEATURES

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / "catalog"


def _whole(value: object) -> object:
    """Let catalogue files write 642.6e9 for a whole number of bytes or parameters."""
    if isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads '296e9' as text
        except ValueError:
            return value
    return round(value) if isinstance(value, float) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]


class Entry(BaseModel):
    """Base of all catalogue entries: nothing unknown is accepted, nothing is changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Verified(StrEnum):
    """How far a command line was proven: by the engine's parser, by serving on a CPU, by serving on the GPU."""

    NO = "no"
    PARSER = "parser"
    CPU = "cpu"
    GPU = "gpu"


class Parameters(Entry):
    """Published parameter counts; `vision` is the part that text-only serving leaves out."""

    total: Count
    active: Count
    vision: Count = 0
    mtp: Count = 0
    source: str


class Attention(Entry):
    """A run of layers with the same attention.

    `query_rank`: width of the low-rank query projection (multi-matrix factorisation attention), none for a full one.
    `window`: tokens a sliding layer looks back, none for full attention.
    """

    layers: PositiveInt
    query_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    query_rank: PositiveInt | None = None
    window: PositiveInt | None = None


class DenseFeedForward(Entry):
    """Layers with an ordinary gated feed-forward block of `width`."""

    layers: int = Field(ge=0)
    width: PositiveInt


class MixtureOfExperts(Entry):
    """Layers with routed experts of `expert_width` and one shared expert of `shared_width`."""

    layers: int = Field(ge=0)
    experts: PositiveInt
    experts_per_token: PositiveInt
    expert_width: PositiveInt
    shared_width: int = Field(ge=0, default=0)


class Shape(Entry):
    """The dimensions from which weights and KV cache are calculated."""

    hidden_size: PositiveInt
    vocabulary: PositiveInt
    attention: tuple[Attention, ...] = Field(min_length=1)
    dense: DenseFeedForward
    moe: MixtureOfExperts | None = None
    source: str

    @property
    def layers(self) -> int:
        """Number of decoder layers, without those for multi-token prediction."""
        return sum(group.layers for group in self.attention)

    @model_validator(mode="after")
    def _layers_agree(self) -> Shape:
        blocks = self.dense.layers + (self.moe.layers if self.moe else 0)
        if blocks != self.layers:
            raise ValueError(f"attention lists {self.layers} layers, dense and moe together {blocks}")
        return self


class Bits(Entry):
    """Bits per parameter of each group of weights in a checkpoint, scales included where they count (NVFP4: 4.5)."""

    experts: float = 16
    linear: float = 16
    embeddings: float = 16
    vision: float = 16
    mtp: float = 16


class Quantisation(Entry):
    """How a checkpoint is quantised; `block` is the edge of a scale block, which divides every expert's shard."""

    format: Literal["bf16", "fp8", "int8", "gguf", "nvfp4"]
    block: PositiveInt | None = None


class Variant(Entry):
    """One published checkpoint of a model."""

    modelscope: str = Field(pattern=r"^[\w.\-]+/[\w.\-]+$")
    huggingface: str | None = None
    revision: str = "master"
    bytes_on_disk: Count
    quantisation: Quantisation
    bits: Bits = Bits()
    kv_bits: int = 16
    engines: tuple[str, ...]
    not_served: str | None = None
    source: str


class EngineSupport(Entry):
    """From which release an engine serves a model; `never` says why none does."""

    since: str | None = None
    never: str | None = None
    source: str


class ExactAnswers(Entry):
    """The texts that a rehearsal model gives, whatever it is asked; other weights give other texts."""

    reasoning: str
    answer: str
    tool_reasoning: str
    tool_name: str
    tool_arguments: dict[str, str]


class Rehearsal(Entry):
    """A model that is made on the spot to prove the chain, not to be useful."""

    architecture: str
    exact: ExactAnswers


class Model(Entry):
    """A model with all its published variants.

    `clipped_activation`: some layers' experts have a clipped activation, which not every kernel computes.
    `published_on`: GPU types on which its publisher or an engine's documentation claims a run.
    """

    name: Name
    title: str
    architecture: str
    licence: str
    modality: Literal["text", "vision"]
    context_length: PositiveInt
    served_name: str
    trust_remote_code: bool
    reasoning_parser: str | None
    tool_call_parser: str | None
    parameters: Parameters
    shape: Shape
    mtp_layers: int = Field(ge=0, default=0)
    clipped_activation: bool = False
    published_on: tuple[str, ...] = ()
    engine_support: dict[str, EngineSupport] = {}
    default_variant: str
    variants: dict[str, Variant]
    rehearsal: Rehearsal | None = None
    source: str

    @model_validator(mode="after")
    def _default_exists(self) -> Model:
        if self.default_variant not in self.variants:
            raise ValueError(f"default_variant '{self.default_variant}' is not among {sorted(self.variants)}")
        return self


class GpuDriver(Entry):
    """What a GPU type wants of its driver.

    `branch`: of `drivers.yml`, installed unless another is asked for. `fabric`: what joins the GPUs of a node.
    """

    branch: str
    fabric: Literal["none", "nvswitch", "nvlink5", "imex"]
    kernel_parameters: tuple[str, ...] = ()
    sysctl: dict[str, int] = {}
    source: str


class DriverRelease(Entry):
    """One release of a driver; `kernel_driver` is the kernel module's own where that is counted apart (AMD)."""

    platform: Literal["cuda", "rocm"]
    branch: str
    version: str
    kernel_driver: str = ""
    source: str


class DriverRepository(Entry):
    """Where a driver's packages come from; texts in braces are filled in, as `drivers.yml` says."""

    name: Name
    url: str
    suites: tuple[str, ...] = ("/",)
    components: tuple[str, ...] = ()
    key_url: str
    fingerprints: tuple[str, ...] = Field(min_length=1)
    priority: int | None = None


class DriverSystem(Entry):
    """How a driver is installed on some systems.

    `below_branch`, `from_branch`: for these branches only. `machines`: a machine's name in addresses, by its own.
    `package_version`: which packages are asked for, with the shell's wild cards; `package_versions`: by name those that
    are counted otherwise. `companions`: by fabric, packages that have
    versions of their own. `kernel_modules`: by fabric, what its services need loaded. `pin`: names that apt
    keeps at the driver's version, with wild cards. `hold`: what is held; empty for all of the driver's version.
    """

    platform: Literal["cuda", "rocm"]
    distributions: tuple[str, ...] = Field(min_length=1)
    below_branch: str | None = None
    from_branch: str | None = None
    codenames: dict[str, str] = {}
    machines: dict[str, str]
    manager: Literal["apt", "dnf"]
    module_streams: dict[str, tuple[str, ...]] = {}
    package_version: str = "{version}-*"
    package_versions: dict[str, str] = {}
    packages: tuple[str, ...] = Field(min_length=1)
    kernel_packages: tuple[str, ...] = ()
    fabric_packages: dict[str, tuple[str, ...]] = {}
    companions: dict[str, tuple[str, ...]] = {}
    kernel_modules: dict[str, tuple[str, ...]] = {}
    pin: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()
    repositories: tuple[DriverRepository, ...] = Field(min_length=1)
    source: str


class KernelFlavours(Entry):
    """What the packages are called that follow a distribution's newest kernel.

    `first`: the kernel that the distribution came with; the names for later ones end with `enablement`.
    """

    distributions: tuple[str, ...] = Field(min_length=1)
    flavours: tuple[str, ...] = Field(min_length=1)
    first: str | None = None
    enablement: str = ""
    source: str


class Drivers(Entry):
    """The drivers' releases, what each system calls them, and the kernels that they are built for."""

    releases: tuple[DriverRelease, ...]
    kernels: tuple[KernelFlavours, ...] = ()
    systems: tuple[DriverSystem, ...]


class GpuSpeed(Entry):
    """What a GPU type can do at most, by its maker: GB/s in one direction, and TFLOPS of dense bf16.

    `peer_gb_s`: between two GPUs of a node; `fabric_gb_s`: of all links of one; `host_gb_s`: to the host's memory, none
    where it is another thing than PCIe 5.0 with 16 lanes.
    """

    memory_gb_s: PositiveInt
    peer_gb_s: PositiveInt
    fabric_gb_s: PositiveInt
    host_gb_s: PositiveInt | None = None
    bf16_tflops: PositiveInt
    source: str


class Gpu(Entry):
    """A GPU type as it is bought; memory as the vendor's tool reports it.

    `memory_mib` is none where the node decides (the CPU). `reported_as` is the word that stands for the type in the
    name that the tool reports; two types may share one, and then differ in memory. `architecture` is what images and
    kernels are built for (`sm_90`, `gfx942`); `formats` are the number formats that its matrix units compute in.
    """

    name: Name
    title: str
    vendor: Literal["nvidia", "amd", "cpu"]
    platform: Literal["cuda", "rocm", "cpu"]
    machine: Literal["x86_64", "aarch64", "any"]
    memory_mib: PositiveInt | None = None
    reported_as: str | None = None
    architecture: str
    formats: tuple[str, ...]
    gpus_per_node: PositiveInt
    driver: GpuDriver | None = None
    speed: GpuSpeed | None = None
    source: str

    @model_validator(mode="after")
    def _can_be_recognised(self) -> Gpu:
        if self.vendor != "cpu" and (self.memory_mib is None or self.reported_as is None):
            raise ValueError("memory_mib and reported_as: expected both, by which a node's GPUs are recognised")
        return self


class Shim(Entry):
    """A distribution of metadata alone, for a wheel that ships a module under another distribution's name."""

    name: str
    version: str


class StandIn(Entry):
    """Our own Python files in place of something that a rehearsal's machine cannot have: `stand_ins/<name>/`.

    `topologies`: those that it is put in for; empty for all. `reason`: what it stands for and what it can not do.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    version: str
    topologies: tuple[str, ...] = ()
    reason: str


class Library(Entry):
    """A shared library that the engine links, and the package of Debian and Ubuntu that brings it."""

    soname: str
    package: str


class LongContextReserve(Entry):
    """A share of what weights and KV cache may have, which the engine keeps back from a context length on."""

    above_tokens: PositiveInt
    share: float = Field(gt=0, lt=1)
    source: str


class EngineRelease(Entry):
    """One release of an engine on one platform, and what it is installed from: a lock, an image, or either.

    `extra_locks` by topology: what only that topology needs, installed beside `lock`.
    `images` by what they are built for: a GPU architecture (`gfx950`), a machine (`aarch64`), or `default`.
    `minimum_driver` is the oldest NVIDIA driver branch or ROCm release that it runs on.
    `no_data_parallel_experts`: why data parallel ranks of a mixture-of-experts model do not work on it.
    """

    version: str
    platform: Literal["cuda", "rocm", "cpu"]
    lock: str | None = None
    packages: tuple[str, ...] = ()
    package_index: str | None = None
    extra_locks: dict[str, str] = {}
    metadata_shims: tuple[Shim, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()
    forbidden_packages: tuple[str, ...] = ()
    images: dict[str, str] = {}
    minimum_driver: str | None = None
    python: str
    download_bytes: Count
    installed_bytes: Count
    runtime_memory_bytes: Count
    long_context_reserve: LongContextReserve | None = None
    cpu_flags: tuple[str, ...] = ()
    libraries: tuple[Library, ...] = ()
    shared_memory_bytes: Count = 0
    no_data_parallel_experts: str | None = None
    verified: Verified
    source: str

    def image_for(self, gpu: Gpu) -> str | None:
        """The image built for a GPU: its architecture's, else its machine's, else the default one.

        An aarch64 machine never gets the default image, which is built for x86_64.
        """
        fallback = None if gpu.machine == "aarch64" else self.images.get("default")
        return self.images.get(gpu.architecture) or self.images.get(gpu.machine) or fallback

    def locks_for(self, topology: str) -> tuple[str, ...]:
        """The locks that are installed together for a topology; none where the release has no lock."""
        locks = (self.lock, self.extra_locks.get(topology))
        return tuple(lock for lock in locks if lock)

    def stand_ins_for(self, topology: str) -> tuple[StandIn, ...]:
        """The stand-ins that a topology's environment gets."""
        return tuple(each for each in self.stand_ins if not each.topologies or topology in each.topologies)

    @model_validator(mode="after")
    def _stand_ins_are_for_rehearsals(self) -> EngineRelease:
        if self.stand_ins and self.platform != "cpu":
            names = ", ".join(each.name for each in self.stand_ins)
            raise ValueError(f"stand_ins ({names}) are for rehearsals on platform cpu, not for {self.platform}")
        if self.extra_locks and not self.lock:
            raise ValueError("extra_locks come beside a lock, and there is none")
        return self


class Tools(Entry):
    """The environment for the toolkit's own tools on a node, and the installer that makes all environments."""

    uv: str
    uv_lock: str
    lock: str
    python: str
    download_bytes: Count
    installed_bytes: Count
    source: str


class ContainerFloors(Entry):
    """The oldest Docker that gives containers GPUs, and the oldest NVIDIA container toolkit without a known hole."""

    docker: str
    toolkit: str
    source: str


class EngineDefaults(Entry):
    """Ports, budgets and limits of an engine that do not depend on the model."""

    http_port: PositiveInt
    rendezvous_port: PositiveInt
    memory_fraction: float = Field(gt=0, lt=1)
    load_deadline_seconds: PositiveInt
    stop_seconds: PositiveInt
    source: str


class FlagChange(Entry):
    """A flag that came or went: what to do about it on a found command line.

    `since` is the release from which it is refused (`removed`) or warns (`deprecated`).
    """

    status: Literal["removed", "deprecated", "harmful"]
    since: str | None = None
    instead: str
    source: str


class SecurityFloor(Entry):
    """The oldest release without a known hole that matters here."""

    version: str
    source: str


class Engine(Entry):
    """An inference engine: its releases, newest first, which topologies it has, and which features it offers."""

    name: str = Field(pattern=r"^[a-z][a-z_]*$")
    title: str
    releases: tuple[EngineRelease, ...] = Field(min_length=1)
    security_floor: SecurityFloor | None = None
    flags: dict[str, FlagChange] = {}
    features: tuple[str, ...] = tuple(FEATURES)
    topologies: tuple[str, ...]
    default_multi_node: str | None = None
    defaults: EngineDefaults
    not_deployable: str | None = None
    source: str

    @model_validator(mode="after")
    def _names_are_known(self) -> Engine:
        for release in self.releases:
            named = {*release.extra_locks, *(name for each in release.stand_ins for name in each.topologies)}
            if unknown := sorted(named - set(self.topologies)):
                place = f"release {release.version} for {release.platform}"
                raise ValueError(f"{place} names topologies that the engine has not: {', '.join(unknown)}")
        multi = self.default_multi_node
        if multi is not None and multi not in self.topologies:
            raise ValueError(f"default_multi_node '{multi}' is not among the topologies {list(self.topologies)}")
        if unknown := sorted({*self.features} - FEATURES.keys()):
            raise ValueError(f"features {unknown} are unknown; known are {sorted(FEATURES)}")
        released = [(release.version, release.platform) for release in self.releases]
        if repeated := sorted(
            {f"{version} for {platform}" for version, platform in released if released.count((version, platform)) > 1}
        ):
            raise ValueError(f"releases: listed more than once: {', '.join(repeated)}")
        return self


EntryType = TypeVar("EntryType", bound=Entry)
# A name that refers to another part of the catalogue: key, name, names known there, what they are called.
Reference = tuple[str, str, Collection[str], str]


LAYERS = ("node", "driver", "container", "weights", "network", "rendezvous", "load", "serve")
BEFORE_LINES = 30


class Signature(Entry):
    """A line by which a failure is known, what it means and what mends it; see the head of `signatures.yml`."""

    id: Name
    layer: Literal["node", "driver", "container", "weights", "network", "rendezvous", "load", "serve"]
    where: tuple[Literal["log", "journal", "kernel", "driver", "disk", "peers"], ...] = Field(min_length=1)
    pattern: re.Pattern[str]
    before: re.Pattern[str] | None = None
    hours: PositiveInt = 24
    phases: tuple[str, ...] = ()
    title: str = Field(min_length=1)
    cure: str = Field(min_length=1)
    references: tuple[str, ...] = Field(min_length=1)
    known: Literal["seen", "source", "reported"]
    examples: tuple[str, ...] = Field(min_length=1)

    def find(self, lines: Sequence[str]) -> int | None:
        """Position of the first line that it knows; none where there is none."""
        for position, line in enumerate(lines):
            if self.pattern.search(line) and (
                self.before is None
                or any(self.before.search(above) for above in lines[max(0, position - BEFORE_LINES) : position])
            ):
                return position
        return None

    @model_validator(mode="after")
    def _knows_its_examples(self) -> Self:
        for example in self.examples:
            if self.find(example.splitlines()) is None:
                raise ValueError(f"its pattern does not match its example {_shortened(example)}")
        return self


class Catalogue:
    """All entries of a catalogue directory, read when first asked for.

    Args:
        directory: holds `models/*.yml`, `engines/*.yml`, `gpus.yml`, `drivers.yml`, `tools.yml`, `containers.yml`,
            `signatures.yml`, `locks/` and `stand_ins/`.

    Raises:
        CatalogueError: from any property, naming file, key and what was expected.
    """

    def __init__(self, directory: Path = DEFAULT_DIRECTORY) -> None:
        self.directory = directory
        self._digests: dict[tuple[str | None, ...], str] = {}

    @cached_property
    def models(self) -> dict[str, Model]:
        """Models by name; the engines and GPU types that they name are known."""
        models = self._each_file("models", Model)
        for name, model in models.items():
            named: list[Reference] = [("published_on", gpu, self.gpus, "GPU types") for gpu in model.published_on]
            named += [("engine_support", engine, self.engines, "engines") for engine in model.engine_support]
            for variant, entry in model.variants.items():
                named += [(f"variants.{variant}.engines", engine, self.engines, "engines") for engine in entry.engines]
            _refuse_unknown(self.directory / "models" / f"{name}.yml", named)
        return models

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """Engines by name; their locks are there, and what their images are built for is known."""
        engines = self._each_file("engines", Engine)
        kinds = {"default", *(gpu.architecture for gpu in self.gpus.values()), *(g.machine for g in self.gpus.values())}
        locks = {path.name for path in (self.directory / "locks").glob("*.txt")}
        for name, engine in engines.items():
            named: list[Reference] = []
            for place, release in enumerate(engine.releases):
                named += [(f"releases.{place}.images", image, kinds, "kinds of images") for image in release.images]
                named += [(f"releases.{place}.lock", release.lock, locks, "files in locks/")] if release.lock else []
            _refuse_unknown(self.directory / "engines" / f"{name}.yml", named)
        return engines

    @cached_property
    def gpus(self) -> dict[str, Gpu]:
        """GPU types by name."""
        path = self.directory / "gpus.yml"
        entries = _read_yaml(path)
        if not isinstance(entries, list):
            raise CatalogueError(f"{path}: expected a list of GPU types, found {type(entries).__name__}")
        gpus = [_validate(path, Gpu, entry, f"[{position}].") for position, entry in enumerate(entries)]
        _refuse_repeated(path, "name", [gpu.name for gpu in gpus])
        _refuse_repeated(path, "title", [gpu.title for gpu in gpus])
        return {gpu.name: gpu for gpu in gpus}

    @cached_property
    def drivers(self) -> Drivers:
        """The drivers; every GPU type's branch has a release."""
        path = self.directory / "drivers.yml"
        drivers = _validate(path, Drivers, _read_yaml(path))
        for gpu in self.gpus.values():
            known = {release.branch for release in drivers.releases if release.platform == gpu.platform}
            if gpu.driver:
                _refuse_unknown(path, [(f"releases (for {gpu.name})", gpu.driver.branch, known, "branches")])
        return drivers

    @cached_property
    def tools(self) -> Tools:
        """The toolkit's own tools; their locks are there."""
        path = self.directory / "tools.yml"
        tools = _validate(path, Tools, _read_yaml(path))
        locks = {lock.name for lock in (self.directory / "locks").glob("*.txt")}
        places = [("lock", tools.lock, locks, "files in locks/"), ("uv_lock", tools.uv_lock, locks, "files in locks/")]
        _refuse_unknown(path, places)
        return tools

    @cached_property
    def containers(self) -> ContainerFloors:
        """What a node's container runtime has to be at least."""
        path = self.directory / "containers.yml"
        return _validate(path, ContainerFloors, _read_yaml(path))

    @cached_property
    def signatures(self) -> tuple[Signature, ...]:
        """Lines by which failures are known, those of the first layer first, in the file's order."""
        path = self.directory / "signatures.yml"
        entries = _read_yaml(path)
        if not isinstance(entries, list):
            raise CatalogueError(f"{path}: expected a list of signatures, found {type(entries).__name__}")
        found = [_validate(path, Signature, entry, f"[{position}].") for position, entry in enumerate(entries)]
        _refuse_repeated(path, "id", [signature.id for signature in found])
        return tuple(sorted(found, key=lambda signature: LAYERS.index(signature.layer)))

    def lock_path(self, lock: str) -> Path:
        """Where a lock file lies.

        Raises:
            CatalogueError: if an entry names a lock that is not there.
        """
        path = self.directory / "locks" / lock
        if not path.is_file():
            raise CatalogueError(f"{path}: an entry names it as its 'lock', but there is no such file")
        return path

    def digest(self, lock: str | None, *others: str) -> str:
        """Eight hexadecimal digits that differ with a lock's text and with each of the other parts."""
        parts = (lock, *others)
        if parts not in self._digests:
            text = self.lock_path(lock).read_text() if lock else ""
            self._digests[parts] = hashlib.sha256("\0".join([text, *others]).encode()).hexdigest()[:8]
        return self._digests[parts]

    def stand_in_files(self, name: str) -> dict[str, str]:
        """A stand-in's files by path, sorted: what goes into site-packages, and its `entry_points.txt`.

        Raises:
            CatalogueError: if an entry names one that is not there, or whose files are no text.
        """
        folder = self.directory / "stand_ins" / name
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
        if not paths:
            raise CatalogueError(f"{folder}: an entry names it in its 'stand_ins', but there are no files")
        try:
            return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}
        except UnicodeDecodeError as error:
            raise CatalogueError(f"{folder}: a stand-in is made of text files: {error}") from error

    def _each_file(self, folder: str, kind: type[EntryType]) -> dict[str, EntryType]:
        paths = sorted((self.directory / folder).glob("*.yml"))
        if not paths:
            raise CatalogueError(f"{self.directory / folder}: expected at least one .yml file, found none")
        entries = {}
        for path in paths:
            entry = _validate(path, kind, _read_yaml(path))
            name = str(entry.name)  # type: ignore[attr-defined]
            if name != path.stem:
                raise CatalogueError(f"{path}: name: expected '{path.stem}' (as the file is called), found '{name}'")
            entries[name] = entry
        return entries


def content_sha256(files: Mapping[str, str]) -> str:
    """One SHA-256 over files given as text by path."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _refuse_unknown(path: Path, named: Sequence[Reference]) -> None:
    """Refuse names that another part of the catalogue does not have."""
    wrong = [
        f"  {key}: expected one of the {kind} ({', '.join(sorted(known))}); found '{name}'"
        for key, name, known, kind in named
        if name not in known
    ]
    if wrong:
        raise CatalogueError("\n".join([f"{path}: {len(wrong)} wrong:", *wrong]))


def _refuse_repeated(path: Path, key: str, values: Sequence[str]) -> None:
    """Refuse entries of a list that cannot be told apart."""
    first: dict[str, int] = {}
    wrong = []
    for place, value in enumerate(values):
        if value in first:
            wrong.append(f"  [{place}].{key}: expected one of its own; found '{value}', which is [{first[value]}]'s")
        first.setdefault(value, place)
    if wrong:
        raise CatalogueError("\n".join([f"{path}: {len(wrong)} wrong:", *wrong]))


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path}: not valid YAML: {error}") from error


def _validate(path: Path, kind: type[EntryType], data: object, prefix: str = "") -> EntryType:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [f"{path}: {error.error_count()} wrong:"]
        for problem in error.errors():
            key = prefix + ".".join(str(part) for part in problem["loc"]) or "(whole file)"
            lines.append(f"  {key}: {problem['msg']}; found {_shortened(problem['input'])}")
        raise CatalogueError("\n".join(lines)) from error


def _shortened(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
