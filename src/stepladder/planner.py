"""From a wish to a plan: pure, the same input gives the same plan to the byte, nothing is reached or touched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from stepladder.catalogue import Catalogue, Engine, EngineRelease, Gpu, Model, Variant, Verified, content_sha256
from stepladder.engines import sglang, tensorrt_llm, transformers, vllm
from stepladder.engines.common import Rendered, Replica, visible_gpu_indices
from stepladder.errors import PlanRefusedError, Violation, unknown_name
from stepladder.gateway import gateway_notes, plan_gateway
from stepladder.layout import Weighed, choose_layout
from stepladder.memory import MIB
from stepladder.own_lock import OwnLock, read_own_lock
from stepladder.plan import (
    FORMAT_VERSION,
    ID_DIGITS,
    Candidate,
    Chosen,
    Endpoint,
    GpusNeeded,
    Installer,
    MemoryTable,
    NodePlan,
    Note,
    Plan,
    PlannedStandIn,
    Process,
    Rank,
    Requirements,
    SpaceNeeded,
    Venv,
    Verification,
    Weights,
)
from stepladder.request import (
    DEFAULT_FEATURES,
    EVERYWHERE,
    FEATURES,
    PRIVATE,
    Deployment,
    Node,
    Parallel,
    PlanRequest,
    is_ip_address,
)
from stepladder.setting import Setting, memory_budget

RENDERERS = {
    "sglang": sglang.render,
    "tensorrt_llm": tensorrt_llm.render,
    "transformers": transformers.render,
    "vllm": vllm.render,
}
HIGHEST_PORT = 65535
CHOOSE_PORT = "Set deployment_port to another one."
MINIMUM_PYTHON = "3.11"
CONTAINER_STORE = "/var/lib/docker"

EXPLANATIONS = {
    Verified.NO: "never run and never parsed",
    Verified.PARSER: "accepted by the engine's own argument parser; never run on this GPU",
    Verified.CPU: "served for real on a CPU",
    Verified.GPU: "served for real on this GPU",
}


@dataclass(frozen=True)
class Supplies:
    """What is installed and downloaded, the same on every node."""

    installer: Installer
    tools: Venv
    venv: Venv | None
    image: str | None
    weights: Weights


def make_plan(request: PlanRequest, catalogue: Catalogue) -> Plan:
    """Work out every process of every node.

    Args:
        request: what is wanted, and on which nodes.
        catalogue: what is known about models, GPUs and engines.

    Raises:
        PlanRefusedError: with all reasons why it cannot work.
        CatalogueError: if a catalogue file cannot be used.
    """
    setting = settle(request, catalogue)
    parallel, broken, weighed = choose_layout(setting)
    if parallel is None:
        raise PlanRefusedError(broken)
    topology = _choose_topology(setting, parallel)
    supplies = _supplies(request, setting, catalogue, topology)
    replicas = _place(request, setting, parallel, topology, supplies)
    node_plans, notes = _render(setting, replicas, supplies)
    gateway = plan_gateway(request.gateway, replicas, node_plans, setting.engine.name) if request.gateway else None
    return Plan(
        format_version=FORMAT_VERSION,
        state_directory=request.state_directory,
        deployment=_chosen(request.deployment, setting, parallel, topology, replicas),
        not_deployable=setting.engine.not_deployable,
        nodes=tuple(node_plans),
        memory=_memory_table(setting, parallel),
        candidates=tuple(_candidate(candidate, parallel) for candidate in weighed),
        endpoints=tuple(
            Endpoint(replica=replica.index, node=replica.head.name, base_url=replica.client_url())
            for replica in replicas
        ),
        gateway=gateway,
        bytes_from_hub=setting.variant.bytes_on_disk * len({node.name for r in replicas for node in r.nodes}),
        verification=_verification(setting),
        notes=tuple(_general_notes(request, setting, parallel, topology, replicas) + gateway_notes(gateway) + notes),
    )


def settle(request: PlanRequest, catalogue: Catalogue) -> Setting:
    """Look up every name of the request; all unknown ones are reported together."""
    deployment, broken = request.deployment, []
    model = catalogue.models.get(deployment.model)
    engine = catalogue.engines.get(deployment.engine)
    if model is None:
        broken.append(unknown_name("model", deployment.model, catalogue.models))
    if engine is None:
        broken.append(unknown_name("engine", deployment.engine, catalogue.engines))
    broken += [unknown_name("feature", name, FEATURES) for name in deployment.features if name not in FEATURES]
    variant = _variant(model, deployment, broken) if model else None
    if engine and deployment.topology not in (*engine.topologies, "auto"):
        broken.append(unknown_name(f"topology for {engine.title}", deployment.topology, (*engine.topologies, "auto")))
    gpu, gpus_per_node = _hardware(request.nodes, catalogue, broken)
    release = _release(engine, gpu, deployment, broken) if engine and gpu else None
    own_lock = _own_lock(deployment, release.platform, broken) if release else None
    if model and variant and engine and deployment.engine not in variant.engines:
        reason = variant.not_served or f"it is served by {', '.join(variant.engines)}"
        broken.append(
            Violation(f"{engine.title} and {variant.modelscope}", reason, f"Choose one of: {_served_variants(model)}.")
        )
    if variant and deployment.weights_source == "huggingface" and not variant.huggingface:
        broken.append(
            Violation(
                "weights from HuggingFace",
                f"the catalogue knows no repository of {variant.modelscope} there",
                "Take model_weights_source: modelscope, or add 'huggingface' to the variant in catalog/models/.",
            )
        )
    if broken or not (model and variant and engine and gpu and release):
        raise PlanRefusedError(broken)
    deployment = deployment.model_copy(update={"features": _offered(deployment, engine)})
    drivers = tuple((node.name, node.driver) for node in request.nodes if node.driver)
    nodes = len(request.nodes)
    return Setting(deployment, model, variant, engine, release, gpu, gpus_per_node, nodes, drivers, own_lock)


def _offered(deployment: Deployment, engine: Engine) -> tuple[str, ...]:
    """The wished features without those default ones that the engine has not; the rest is for the rules to judge."""
    return tuple(name for name in deployment.features if name in engine.features or name not in DEFAULT_FEATURES)


def _variant(model: Model, deployment: Deployment, broken: list[Violation]) -> Variant | None:
    name = deployment.variant or model.default_variant
    if name not in model.variants:
        broken.append(unknown_name(f"variant of {model.title}", name, model.variants))
    return model.variants.get(name)


def _served_variants(model: Model) -> str:
    return ", ".join(
        f"{name} ({', '.join(variant.engines)})" for name, variant in model.variants.items() if variant.engines
    )


def _hardware(nodes: Sequence[Node], catalogue: Catalogue, broken: list[Violation]) -> tuple[Gpu | None, int]:
    if not nodes:
        broken.append(Violation("nodes", "the inventory names none", "Put at least one host into the group 'engines'."))
        return None, 0
    types = {node.gpu for node in nodes}
    broken += [unknown_name("GPU type", name, catalogue.gpus) for name in sorted(types - catalogue.gpus.keys())]
    if len(types) > 1:
        broken.append(
            Violation("GPU types", f"{', '.join(sorted(types))} in one deployment", "Use one inventory for each type.")
        )
    gpu = catalogue.gpus.get(nodes[0].gpu)
    if gpu is None:
        return None, 0
    counts = {node.gpus or gpu.gpus_per_node for node in nodes}
    if len(counts) > 1:
        broken.append(
            Violation("GPUs per node", f"{sorted(counts)} in one deployment", "Use nodes with the same number of GPUs.")
        )
    names = [node.name for node in nodes]
    if len(set(names)) < len(names):
        broken.append(Violation("nodes", f"a name stands twice: {', '.join(names)}", "Name each node once."))
    addresses = [node.address for node in nodes]
    if len(set(addresses)) < len(addresses):
        broken.append(
            Violation("addresses", f"two nodes share one: {', '.join(addresses)}", "Set deployment_address per host.")
        )
    return gpu, min(counts)


def _release(engine: Engine, gpu: Gpu, deployment: Deployment, broken: list[Violation]) -> EngineRelease | None:
    """The wished release for the GPU's platform, or the newest one."""
    releases = [release for release in engine.releases if release.platform == gpu.platform]
    if not releases:
        platforms = ", ".join(sorted({release.platform for release in engine.releases}))
        found = f"the catalogue has {engine.title} for: {platforms}"
        broken.append(Violation(f"{engine.title} on {gpu.title}", found, "Choose another engine or GPU type."))
        return None
    wished = deployment.engine_version
    if wished is None:
        return releases[0]
    for release in releases:
        if release.version == wished:
            return release
    broken.append(unknown_name(f"release of {engine.title} for {gpu.title}", wished, [r.version for r in releases]))
    return None


def _own_lock(deployment: Deployment, platform: str, broken: list[Violation]) -> OwnLock | None:
    found = read_own_lock(deployment.lock, deployment.engine, platform) if deployment.lock else None
    if isinstance(found, Violation):
        broken.append(found)
        return None
    return found


def _choose_topology(setting: Setting, parallel: Parallel) -> str:
    wished, engine = setting.deployment.topology, setting.engine
    if parallel.world_size <= setting.gpus_per_node:
        return "single"
    if wished != "auto":
        return wished
    multi_node = "mp" if setting.in_container and engine.name == "vllm" else engine.default_multi_node
    assert multi_node is not None, engine.name  # noqa: S101 - `rules.nodes_can_join` refuses that
    return multi_node


def _supplies(request: PlanRequest, setting: Setting, catalogue: Catalogue, topology: str) -> Supplies:
    tools = catalogue.tools
    return Supplies(
        installer=Installer(
            version=tools.uv,
            lock=tools.uv_lock,
            path=f"{request.state_directory}/tools",
            cache=f"{request.state_directory}/cache/uv",
        ),
        tools=_tools(request, catalogue),
        venv=None if setting.in_container else _venv(request, setting, catalogue, topology),
        image=setting.image if setting.in_container else None,
        weights=_weights(request, setting),
    )


def _venv(request: PlanRequest, setting: Setting, catalogue: Catalogue, topology: str) -> Venv:
    install = setting.release
    name = f"{setting.engine.name}-{setting.version}-{setting.gpu.platform}"
    name += f"-{topology}" if topology in install.extra_locks else ""
    own = setting.own_lock
    lock = None if own else install.lock
    packages, shims = own.beside(install) if own else (install.packages, install.metadata_shims)
    extra_locks = install.locks_for(topology)[1:]
    stand_ins = _stand_ins(install, catalogue, topology)
    parts = [
        *([own.text] if own else []),
        *packages,
        *(f"{shim.name}={shim.version}" for shim in shims),
        *(catalogue.lock_path(lock).read_text() for lock in extra_locks),
        *(f"{each.name}={each.version} {each.sha256}" for each in stand_ins),
    ]
    return Venv(
        name=name,
        path=f"{request.state_directory}/venvs/{name}-{catalogue.digest(lock, *parts)}",
        python=install.python,
        lock=lock,
        extra_locks=extra_locks,
        packages=packages,
        package_index=install.package_index,
        metadata_shims=shims,
        stand_ins=stand_ins,
        forbidden_packages=install.forbidden_packages,
        download_bytes=install.download_bytes,
        installed_bytes=install.installed_bytes,
    )


def _stand_ins(install: EngineRelease, catalogue: Catalogue, topology: str) -> tuple[PlannedStandIn, ...]:
    return tuple(
        PlannedStandIn(name=each.name, version=each.version, sha256=content_sha256(catalogue.stand_in_files(each.name)))
        for each in install.stand_ins_for(topology)
    )


def _tools(request: PlanRequest, catalogue: Catalogue) -> Venv:
    tools = catalogue.tools
    return Venv(
        name="tools",
        path=f"{request.state_directory}/venvs/tools-{catalogue.digest(tools.lock)}",
        python=tools.python,
        lock=tools.lock,
        packages=(),
        package_index=None,
        metadata_shims=(),
        forbidden_packages=(),
        download_bytes=tools.download_bytes,
        installed_bytes=tools.installed_bytes,
    )


def _weights(request: PlanRequest, setting: Setting) -> Weights:
    variant, wish = setting.variant, request.deployment
    on_huggingface = wish.weights_source == "huggingface"
    model_id = (variant.huggingface if on_huggingface else None) or variant.modelscope
    folder, revision = model_id.replace("/", "--"), wish.revision or variant.revision
    return Weights(
        model_id=model_id,
        # The hubs call the branch that a repository begins with by two names.
        revision="main" if on_huggingface and revision == "master" else revision,
        path=f"{request.state_directory}/models/{folder}/{revision}",
        bytes=variant.bytes_on_disk,
        endpoint=request.deployment.weights_endpoint,
    )


def _place(
    request: PlanRequest, setting: Setting, parallel: Parallel, topology: str, supplies: Supplies
) -> list[Replica]:
    """Give each replica its nodes in inventory order: part of one, or several whole ones."""
    deployment, size = request.deployment, setting.gpus_per_node
    per_node = max(1, size // parallel.world_size)
    nodes_each = max(1, parallel.world_size // size)
    first_port = deployment.port or setting.engine.defaults.http_port
    replicas = []
    for index in range(deployment.replicas):
        slot = index % per_node
        first = index // per_node if nodes_each == 1 else index * nodes_each
        nodes = request.nodes[first : first + nodes_each]
        loopback_only = nodes[0].on_loopback
        replicas.append(
            Replica(
                index=index,
                nodes=nodes,
                topology=topology,
                parallel=parallel,
                served_name=deployment.served_name or setting.model.served_name,
                bind_address=_bind_address(request, nodes[0], loopback_only),
                port=first_port + slot,
                first_gpu=slot * parallel.world_size,
                model_path=supplies.weights.path,
                venv_path=supplies.venv.path if supplies.venv else None,
                deployment=deployment.name,
                deployment_path=f"{request.state_directory}/deployments/{deployment.name}",
                programs_path=f"{request.state_directory}/programs/{deployment.name}",
                cache_path=f"{request.state_directory}/cache/engines/{_cache_name(setting, supplies)}",
            )
        )
    return replicas


def _cache_name(setting: Setting, supplies: Supplies) -> str:
    """Compiled kernels are of one build of an engine and one GPU; engines tell arguments apart below that."""
    if supplies.venv:
        build = supplies.venv.path.rpartition("/")[2]
    else:
        _, _, digest = setting.image.partition("@sha256:")
        digest = digest or hashlib.sha256(setting.image.encode()).hexdigest()
        build = f"{setting.engine.name}-{setting.release.version}-image-{digest[:ID_DIGITS]}"
    return f"{build}-{setting.gpu.name}"


def _bind_address(request: PlanRequest, head: Node, loopback_only: bool) -> str:
    wished = request.deployment.bind_address
    if wished == PRIVATE:
        return head.address
    if wished or loopback_only:
        return wished or "127.0.0.1"
    # Whoever reaches an engine's port goes around the gateway's keys and paths: none but where the gateway asks. Not by
    # name, which the node itself may take for its loopback.
    reached = head.client_address or head.address
    return reached if request.gateway and request.gateway.hosts and is_ip_address(reached) else EVERYWHERE


def _render(setting: Setting, replicas: Sequence[Replica], supplies: Supplies) -> tuple[list[NodePlan], list[Note]]:
    """Node slices in inventory order; replicas that share a node share its slice."""
    slices: dict[str, NodePlan] = {}
    notes: list[Note] = []
    for replica in replicas:
        rendered: Rendered = RENDERERS[setting.engine.name](setting, replica)
        notes += [note for note in rendered.notes if note not in notes]
        for rank, (node, processes) in enumerate(zip(replica.nodes, rendered.processes, strict=True)):
            if node.name in slices:
                slices[node.name] = _with_another_replica(slices[node.name], processes, setting, supplies)
                continue
            slices[node.name] = NodePlan(
                name=node.name,
                address=node.address,
                interface=node.interface,
                gpu=node.gpu,
                gpus=setting.gpus_per_node,
                replica=replica.index,
                rank=rank,
                ranks=_ranks(replica),
                follows=replica.seen_by_peers(rendered.head_health) if rank else None,
                installer=supplies.installer,
                tools=supplies.tools,
                venv=supplies.venv,
                images=(supplies.image,) if supplies.image else (),
                weights=supplies.weights,
                programs=rendered.programs,
                processes=processes,
                requirements=_requirements(setting, supplies),
                load_deadline_seconds=setting.engine.defaults.load_deadline_seconds,
            )
    _refuse_shared_ports(list(slices.values()))
    if setting.gpu.vendor != "cpu":
        slices = {name: _with_gpus(setting, node) for name, node in slices.items()}
    return list(slices.values()), notes


def _with_another_replica(
    node: NodePlan, processes: tuple[Process, ...], setting: Setting, supplies: Supplies
) -> NodePlan:
    """A node's slice with one more replica: its processes, and the memory that it takes beside the others'."""
    own, found = _requirements(setting, supplies), node.requirements
    needed = found.model_copy(
        update={
            "minimum_memory_bytes": found.minimum_memory_bytes + own.minimum_memory_bytes,
            "minimum_shared_memory_bytes": found.minimum_shared_memory_bytes + own.minimum_shared_memory_bytes,
        }
    )
    return node.model_copy(update={"processes": node.processes + processes, "requirements": needed})


def _ranks(replica: Replica) -> tuple[Rank, ...]:
    if len(replica.nodes) == 1:
        return ()
    return tuple(Rank(node=node.name, address=node.address) for node in replica.nodes)


def _refuse_shared_ports(nodes: Sequence[NodePlan]) -> None:
    """Each port of a node exists and is one process's alone."""
    broken: dict[str, Violation] = {}
    for node in nodes:
        taken: dict[int, str] = {}
        for process in node.processes:
            for port in process.ports:
                use = f"{process.name} ({port.purpose})"
                if port.port > HIGHEST_PORT:
                    found = f"{use} would listen on {port.port}, the highest is {HIGHEST_PORT}"
                    broken[use] = Violation("ports", found, CHOOSE_PORT)
                elif port.port in taken:
                    found = f"{taken[port.port]} and {use} would both listen on {port.port} of {node.name}"
                    broken.setdefault(use, Violation("ports", found, CHOOSE_PORT))
                taken.setdefault(port.port, use)
    if broken:
        raise PlanRefusedError(list(broken.values()))


def _with_gpus(setting: Setting, node: NodePlan) -> NodePlan:
    """A node's slice with the GPUs that it must have, once all that runs there is known."""
    gpu, every = setting.gpu, tuple(range(setting.gpus_per_node))
    assert gpu.vendor != "cpu"  # noqa: S101 - the caller has asked
    pinned = [visible_gpu_indices(process.env) for process in node.processes]
    used = every if None in pinned else tuple(sorted({index for indices in pinned for index in indices or ()}))
    needed = GpusNeeded(
        vendor=gpu.vendor,
        count=setting.gpus_per_node,
        model=gpu.reported_as or "",
        memory_mib=gpu.memory_mib or 0,
        minimum_driver=setting.release.minimum_driver or "",
        indices=used,
    )
    return node.model_copy(update={"requirements": node.requirements.model_copy(update={"gpus": needed})})


def _requirements(setting: Setting, supplies: Supplies) -> Requirements:
    on_cpu = setting.gpu.platform == "cpu"
    tools, weights, install = supplies.tools, supplies.weights, setting.release
    space = [_space(tools.path, tools.installed_bytes + tools.download_bytes, "the toolkit's own tools")]
    if supplies.venv:
        needed = install.installed_bytes + install.download_bytes
        space.append(_space(supplies.venv.path, needed, f"{setting.engine.title} with its packages"))
    if supplies.image:
        space.append(_space(CONTAINER_STORE, install.installed_bytes, f"the image {supplies.image}"))
    space.append(_space(weights.path, weights.bytes, f"weights of {weights.model_id}"))
    return Requirements(
        minimum_memory_bytes=setting.release.runtime_memory_bytes + weights.bytes if on_cpu else 0,
        cpu_flags_any=tuple((flag,) for flag in setting.release.cpu_flags),
        architectures=() if setting.gpu.machine == "any" else (setting.gpu.machine,),
        python=MINIMUM_PYTHON,
        minimum_driver=install.minimum_driver,
        libraries=() if setting.in_container else install.libraries,
        minimum_shared_memory_bytes=install.shared_memory_bytes,
        space=tuple(space),
    )


def _space(path: str, needed: int, purpose: str) -> SpaceNeeded:
    return SpaceNeeded(path=path, minimum_free_bytes=needed, existing_bytes_path=path, purpose=purpose)


def _chosen(
    deployment: Deployment, setting: Setting, parallel: Parallel, topology: str, replicas: Sequence[Replica]
) -> Chosen:
    return Chosen(
        name=deployment.name,
        model=setting.model.name,
        model_title=setting.model.title,
        variant=deployment.variant or setting.model.default_variant,
        engine=setting.engine.name,
        engine_version=setting.release.version,
        install="container" if setting.in_container else "venv",
        platform=setting.gpu.platform,
        topology=topology,
        parallel=parallel,
        replicas=deployment.replicas,
        features=tuple(sorted(setting.deployment.features)),
        context_length=setting.context_length,
        concurrency=deployment.concurrency,
        served_name=replicas[0].served_name,
    )


def _candidate(weighed: Weighed, chosen: Parallel) -> Candidate:
    return Candidate(
        layout=str(weighed.parallel),
        gpus=weighed.parallel.world_size,
        weights=weighed.budget.weights,
        margin=weighed.budget.margin,
        chosen=weighed.parallel == chosen,
        against=", ".join(violation.rule for violation in weighed.broken) or None,
    )


def _memory_table(setting: Setting, parallel: Parallel) -> MemoryTable:
    budget, memory = memory_budget(setting, parallel), setting.gpu.memory_mib
    return MemoryTable(
        gpu=setting.gpu.title,
        gpu_bytes=None if memory is None else memory * MIB,
        fraction=setting.engine.defaults.memory_fraction,
        limit=budget.limit,
        weights=budget.weights,
        runtime=budget.runtime,
        kv_bytes_per_token=budget.kv_bytes_per_token,
        kv_bytes_per_sequence=budget.kv_bytes_per_sequence,
        kv_wanted=budget.kv_wanted,
        context_length=budget.context_length,
        concurrency=budget.concurrency,
        margin=budget.margin,
        full_sequences=budget.full_sequences,
    )


def _verification(setting: Setting) -> Verification:
    level = Verified.NO if setting.own_lock else setting.release.verified
    rehearsal = setting.model.rehearsal
    return Verification(
        level=level.value,
        explanation=f"{EXPLANATIONS[level]}{_of_own_lock(setting)}",
        exact=rehearsal.exact.model_dump() if rehearsal else None,
    )


def _of_own_lock(setting: Setting) -> str:
    if setting.own_lock is None:
        return ""
    kind = "a release" if setting.own_lock.released else "no release of its project"
    return f": {setting.engine.title} {setting.version}, {kind}, is from deployment_lock"


def _general_notes(
    request: PlanRequest, setting: Setting, parallel: Parallel, topology: str, replicas: Sequence[Replica]
) -> list[Note]:
    notes = []
    if left_out := sorted({*request.deployment.features} - {*setting.deployment.features}):
        text = f"{setting.engine.title} parses nothing out of an answer: what belongs to it stands in its text."
        notes.append(Note(kind="note", topic=f"without {' and '.join(left_out)}", text=text))
    if setting.deployment.parallel == "auto":
        text = f"{parallel} is the smallest layout that keeps every rule and holds the wanted KV cache."
        notes.append(Note(kind="note", topic="deployment_parallel: auto", text=text))
    if setting.own_lock:
        text = f"{setting.engine.title} {setting.version} gets the command line of {setting.release_name}, and what is "
        text += "known about that release is taken to hold for it."
        notes.append(Note(kind="warning", topic="deployment_lock", text=text))
    for each in () if setting.in_container else setting.release.stand_ins_for(topology):
        text = f"{each.name} {each.version}, rehearsal only: {each.reason}"
        notes.append(Note(kind="note", topic="stand-in", text=text, source=f"catalog/stand_ins/{each.name}"))
    if setting.gpu.platform != "cpu":
        text = "An engine asks for no key and answers anyone who reaches its port"
        if replicas[0].bind_address != EVERYWHERE:
            text += ": it listens on its node's own address alone; let only the gateway and this machine reach that."
        elif request.gateway:
            text += ": set deployment_bind_address to 'private', so that it listens on its node's own address alone."
        else:
            text += ": keep it on a private network, or put the gateway in front (docs/gateway.md)."
        notes.append(Note(kind="warning", topic="access", text=text))
    published = setting.model.published_on
    if published and setting.gpu.name not in published:
        text = f"Nobody is known to have published a run of {setting.model.title} on it; published are "
        text += f"{', '.join(published)}."
        notes.append(
            Note(kind="warning", topic=setting.gpu.title, text=text, source=f"catalog/models/{setting.model.name}.yml")
        )
    if reason := setting.engine.not_deployable:
        notes.append(Note(kind="warning", topic="deploy", text=reason))
    return notes
