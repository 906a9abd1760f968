"""The plan: everything that will run, typed, in one canonical JSON whose hash is its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stepladder.catalogue import Library, Shim
from stepladder.request import Parallel

FORMAT_VERSION = 1
ID_DIGITS = 12


class Part(BaseModel):
    """Base of all parts of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Note(Part):
    """Something worth knowing about the plan: what differs from published commands and why, or a risk."""

    kind: Literal["note", "warning"]
    topic: str
    text: str
    source: str | None = None


class Port(Part):
    """A port that a process listens on; `scope` says who must reach it."""

    port: int
    host: str
    purpose: str
    scope: Literal["clients", "peers", "node"]


class Health(Part):
    """How readiness is asked for; followers that answer nothing have kind 'none'.

    `model` is the served name to ask for a token, where the process is one that answers clients.
    """

    kind: Literal["vllm", "sglang", "tcp", "none"]
    host: str
    port: int
    path: str
    model: str | None = None


class Process(Part):
    """One process of one node: exactly what is executed, in which environment.

    `image` is what its container is made of; without one it runs in the node's environment. Ray's processes start
    before the engine's; `stop_step` orders the stop over all nodes of a replica, the lowest first.
    """

    name: str
    purpose: str
    part: Literal["ray", "engine"] = "engine"
    stop_step: int = 0
    image: str | None = None
    argv: tuple[str, ...]
    env: dict[str, str]
    ports: tuple[Port, ...]
    health: Health
    stop_seconds: int


class PlannedStandIn(Part):
    """A stand-in of the catalogue that goes into an environment, with the SHA-256 of its files."""

    name: str
    version: str
    sha256: str


class Venv(Part):
    """A Python environment that a node needs; the digest in its path changes with its contents.

    `lock` is the catalogue's; there is none where the operator's own is installed. `extra_locks` are installed together
    with it. `stand_ins` are only ever in a rehearsal's environment.
    """

    name: str
    path: str
    python: str
    lock: str | None
    extra_locks: tuple[str, ...] = ()
    packages: tuple[str, ...]
    package_index: str | None
    metadata_shims: tuple[Shim, ...]
    stand_ins: tuple[PlannedStandIn, ...] = ()
    forbidden_packages: tuple[str, ...]
    download_bytes: int
    installed_bytes: int


class Installer(Part):
    """The program that makes environments on a node, itself pinned by a lock."""

    version: str
    lock: str
    path: str
    cache: str


class Weights(Part):
    """A model revision that a node needs, and where it lies."""

    model_id: str
    revision: str
    path: str
    bytes: int
    endpoint: str | None


class SpaceNeeded(Part):
    """Bytes that must be free below a path before anything is downloaded; what is there already counts."""

    path: str
    minimum_free_bytes: int
    existing_bytes_path: str
    purpose: str


class GpusNeeded(Part):
    """The GPUs that a plan was made for, as `stepladder.core.preflight` holds them against those of the node.

    `model` is a word of the name that the vendor's tool reports; `indices` are those that are used, and to be idle.
    """

    vendor: Literal["nvidia", "amd"]
    count: int
    model: str
    memory_mib: int
    minimum_driver: str
    indices: tuple[int, ...]


class Requirements(Part):
    """What a node must have before it is touched; preflight reports everything that is missing at once."""

    minimum_memory_bytes: int
    cpu_flags_any: tuple[tuple[str, ...], ...]
    architectures: tuple[str, ...]
    python: str
    minimum_driver: str | None
    libraries: tuple[Library, ...]
    minimum_shared_memory_bytes: int
    gpus: GpusNeeded | None = None
    space: tuple[SpaceNeeded, ...]


class Rank(Part):
    """A node of a replica, as its peers know it."""

    node: str
    address: str


class NodePlan(Part):
    """What one node has to be and to run.

    `ranks` are the nodes of its replica in rank order where there are several; `follows` is how a node that does not
    answer clients asks whether the one that does is ready. `programs`
    are the toolkit's own that processes run, by path.
    """

    name: str
    address: str
    interface: str | None
    gpu: str
    gpus: int
    replica: int
    rank: int
    ranks: tuple[Rank, ...] = ()
    follows: Health | None = None
    installer: Installer
    tools: Venv
    venv: Venv | None
    images: tuple[str, ...]
    weights: Weights
    programs: tuple[str, ...] = ()
    processes: tuple[Process, ...]
    requirements: Requirements
    load_deadline_seconds: int


class MemoryTable(Part):
    """Bytes on the fullest GPU of a replica; see `stepladder.memory.MemoryBudget`."""

    gpu: str
    gpu_bytes: int | None
    fraction: float
    limit: int | None
    weights: int
    runtime: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    kv_wanted: int
    context_length: int
    concurrency: int
    margin: int | None
    full_sequences: int | None


class Candidate(Part):
    """A layout that was weighed for `auto`: what it takes of a GPU, and the rules against it."""

    layout: str
    gpus: int
    weights: int
    margin: int | None
    chosen: bool
    against: str | None


class Endpoint(Part):
    """Where a replica answers, in OpenAI's protocol."""

    replica: int
    node: str
    base_url: str


class GatewayNode(Part):
    """A machine that the gateway runs on, and where clients reach it there."""

    name: str
    base_url: str


class GatewayServer(Part):
    """A replica as the gateway reaches it."""

    replica: int
    node: str
    address: str
    port: int


class Gateway(Part):
    """The endpoint in front of all replicas; see `stepladder.gateway` for what is made of it.

    `check_path` answers quickly whether an engine takes requests; whether tokens come, the agent on `agent_port` knows.
    """

    nodes: tuple[GatewayNode, ...]
    servers: tuple[GatewayServer, ...]
    bind_address: str
    port: int
    tls: bool
    keys: bool
    metrics_address: str
    metrics_port: int
    agent_port: int
    paths: tuple[str, ...]
    check_path: str
    max_body_bytes: int
    answer_seconds: int
    stall_seconds: int
    affinity_header: str | None


class Chosen(Part):
    """The deployment with every default and every `auto` resolved."""

    name: str
    model: str
    model_title: str
    variant: str
    engine: str
    engine_version: str
    install: str
    platform: str
    topology: str
    parallel: Parallel
    replicas: int
    features: tuple[str, ...]
    context_length: int
    concurrency: int
    served_name: str


class Verification(Part):
    """How far this combination was proven, and what the gate may expect of its answers."""

    level: str
    explanation: str
    exact: dict[str, Any] | None


class Plan(Part):
    """What a deploy will do. Build one with `stepladder.planner.make_plan`.

    `not_deployable` says why the roles of this version cannot carry the plan out, where that is so.
    """

    format_version: int
    state_directory: str
    deployment: Chosen
    not_deployable: str | None
    nodes: tuple[NodePlan, ...]
    memory: MemoryTable
    candidates: tuple[Candidate, ...]
    endpoints: tuple[Endpoint, ...]
    gateway: Gateway | None = None
    bytes_from_hub: int
    verification: Verification
    notes: tuple[Note, ...]

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json")).encode()).hexdigest()[:ID_DIGITS]

    def as_document(self) -> dict[str, Any]:
        """The plan with its id, as plain data."""
        return {"id": self.id, **self.model_dump(mode="json")}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Plan:
        """Read a plan back from `as_document`."""
        return cls.model_validate({key: value for key, value in document.items() if key != "id"})

    def slices(self) -> dict[str, dict[str, Any]]:
        """By node name: all that a node's roles read, and what its release keeps for later verbs."""
        document = self.as_document()
        shared = {key: document[key] for key in ("format_version", "deployment", "endpoints", "verification")}
        return {node["name"]: {"plan_id": document["id"], **shared, "node": node} for node in document["nodes"]}

    def to_json(self) -> str:
        """Canonical JSON: the same plan is the same bytes."""
        return _canonical(self.as_document()) + "\n"


def _canonical(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, sort_keys=True, indent=1)
