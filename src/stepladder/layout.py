"""Cutting a model into GPUs and placing it on nodes: candidates, the rules they must keep, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stepladder.catalogue import Engine, EngineInstall, Gpu, Model, Variant
from stepladder.errors import Violation
from stepladder.memory import MIB, MemoryBudget, kv_cache_bytes, weight_bytes_per_gpu
from stepladder.request import Deployment, Parallel

GIGA = 1e9
MTP_MINIMUM_VERSION = (0, 33, 0)


@dataclass(frozen=True)
class Setting:
    """What a layout is judged against: one replica's model, engine and hardware."""

    deployment: Deployment
    model: Model
    variant: Variant
    engine: Engine
    install: EngineInstall
    gpu: Gpu
    gpus_per_node: int
    nodes: int

    @property
    def wants_vision(self) -> bool:
        """Whether the vision tower is loaded."""
        return self.model.modality == "vision" and "text_only" not in self.deployment.features

    @property
    def wants_mtp(self) -> bool:
        """Whether the layers for multi-token prediction are loaded."""
        return "mtp" in self.deployment.features

    @property
    def context_length(self) -> int:
        """Tokens per sequence: as wished, or the model's own."""
        return self.deployment.context_length or self.model.context_length


Rule = Callable[[Setting, Parallel], Violation | None]


def memory_budget(setting: Setting, parallel: Parallel) -> MemoryBudget:
    """The budget of the fullest GPU of a replica in this layout."""
    per_token, per_sequence = kv_cache_bytes(setting.model, parallel)
    memory = setting.gpu.memory_mib
    return MemoryBudget(
        weights=weight_bytes_per_gpu(
            setting.model, setting.variant, parallel, vision=setting.wants_vision, mtp=setting.wants_mtp
        ),
        runtime=setting.install.runtime_memory_bytes,
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_sequence,
        context_length=setting.context_length,
        concurrency=setting.deployment.concurrency,
        limit=None if memory is None else round(memory * MIB * setting.engine.defaults.memory_fraction),
    )


def heads_divide(setting: Setting, parallel: Parallel) -> Violation | None:
    """Every attention group's query heads are shared out evenly over tensor parallel ranks (engines' own assertion)."""
    for group in setting.model.shape.attention:
        if group.query_heads % parallel.tensor:
            return Violation(
                "attention heads",
                f"{group.query_heads} heads over tensor parallel size {parallel.tensor}",
                f"Choose a tensor parallel size that divides {group.query_heads}.",
            )
    return None


def experts_divide(setting: Setting, parallel: Parallel) -> Violation | None:
    """With expert parallelism whole experts are shared out over tensor times data parallel ranks."""
    moe = setting.model.shape.moe
    ranks = parallel.tensor * parallel.data
    if not parallel.expert:
        return None
    if moe is None:
        return Violation("expert parallelism", f"{setting.model.title} has no experts", "Leave expert out.")
    if moe.experts % ranks:
        return Violation(
            "experts",
            f"{moe.experts} experts over {ranks} ranks",
            f"Choose tensor x data parallel ranks that divide {moe.experts}, or leave expert parallelism out.",
        )
    return None


def quantisation_blocks_fit(setting: Setting, parallel: Parallel) -> Violation | None:
    """An expert's shard is a whole number of quantisation blocks (vLLM recipes: FP8 at TP4 and TP8 needs EP)."""
    block, moe = setting.variant.quantisation.block, setting.model.shape.moe
    if block is None or moe is None or parallel.expert:
        return None
    width, rest = divmod(moe.expert_width, parallel.tensor * parallel.data)
    if rest or width % block:
        return Violation(
            "quantisation blocks",
            f"expert width {moe.expert_width} over {parallel.tensor * parallel.data} ranks is {width}, "
            f"not a multiple of the {setting.variant.quantisation.format} block of {block}",
            "Set deployment_parallel.expert to true: experts stay whole then.",
        )
    return None


def number_format_supported(setting: Setting, parallel: Parallel) -> Violation | None:
    """The GPU computes in the checkpoint's number format."""
    found = setting.variant.quantisation.format
    if found in setting.gpu.formats:
        return None
    return Violation(
        "number format",
        f"{setting.gpu.title} does not compute in {found} ({parallel})",
        f"Choose a variant in one of: {', '.join(setting.gpu.formats)}.",
    )


def mtp_supported(setting: Setting, parallel: Parallel) -> Violation | None:
    """Multi-token prediction: models that have the layers, and vLLM from 0.33.0 (earlier: IndexError at load)."""
    if not setting.wants_mtp:
        return None
    if not setting.model.mtp_layers:
        return Violation(
            "multi-token prediction", f"{setting.model.title} has no such layers", "Leave the feature mtp out."
        )
    if setting.engine.name == "vllm" and version_tuple(setting.install.version) < MTP_MINIMUM_VERSION:
        return Violation(
            "multi-token prediction",
            f"vLLM {setting.install.version} fails on it with {parallel} or any other layout",
            "Leave the feature mtp out; it needs vLLM 0.33.0.",
        )
    return None


def whole_nodes(setting: Setting, parallel: Parallel) -> Violation | None:
    """A replica fills part of one node, or several nodes to the last GPU."""
    world, size = parallel.world_size, setting.gpus_per_node
    if world > setting.nodes * size:
        return Violation(
            "GPUs",
            f"{parallel} takes {world} GPUs, the inventory has {setting.nodes} x {size}",
            f"Choose at most {setting.nodes * size} GPUs a replica, or add nodes.",
        )
    if world > size and world % size:
        return Violation(
            "GPUs",
            f"{parallel} takes {world} GPUs, which is not a whole number of nodes of {size}",
            f"Choose a multiple of {size}, or at most {size}.",
        )
    return None


def data_parallel_placed(setting: Setting, parallel: Parallel) -> Violation | None:
    """Data parallel ranks are whole on a node; SGLang's repeat the experts, so replicas are the better way there."""
    if parallel.data == 1:
        return None
    if setting.engine.name == "sglang":
        return Violation(
            "data parallel", f"{parallel} on SGLang", "Use deployment_replicas instead of data parallel ranks."
        )
    nodes, rest = divmod(parallel.world_size, setting.gpus_per_node)
    if not rest and nodes > 1 and parallel.data % nodes:
        return Violation(
            "data parallel",
            f"{parallel.data} data parallel ranks over {nodes} nodes",
            f"Choose a multiple of {nodes}: a rank that spans nodes is not supported.",
        )
    return None


def fits_in_memory(setting: Setting, parallel: Parallel) -> Violation | None:
    """Weights, runtime and the wanted KV cache fit into the engine's share of the GPU."""
    budget = memory_budget(setting, parallel)
    if budget.margin is None or budget.margin >= 0:
        return None
    return Violation(
        "GPU memory",
        f"{parallel} needs {budget.needed / GIGA:.1f} GB per GPU (weights {budget.weights / GIGA:.1f}, runtime "
        f"{budget.runtime / GIGA:.1f}, KV cache {budget.kv_wanted / GIGA:.1f}), the engine's share of "
        f"{setting.gpu.title} is {(budget.limit or 0) / GIGA:.1f} GB",
        "Use more GPUs, a smaller variant, a shorter deployment_context_length or less deployment_concurrency.",
    )


RULES: tuple[Rule, ...] = (
    number_format_supported,
    mtp_supported,
    whole_nodes,
    heads_divide,
    experts_divide,
    quantisation_blocks_fit,
    data_parallel_placed,
    fits_in_memory,
)


def violations(setting: Setting, parallel: Parallel) -> list[Violation]:
    """Every rule that a layout breaks."""
    return [found for rule in RULES if (found := rule(setting, parallel))]


def choose_layout(setting: Setting) -> tuple[Parallel | None, list[Violation]]:
    """The layout as wished, or for `auto` the smallest that keeps all rules; with the violations if there is none.

    When nothing works, the violations are those of the largest candidate, which comes nearest to fitting, followed by
    what the wished layout could be replaced with.
    """
    wished = setting.deployment.parallel
    if isinstance(wished, Parallel):
        broken = violations(setting, wished)
        if not broken:
            return wished, []
        by_distance = sorted(candidates(setting), key=lambda c: abs(c.world_size - wished.world_size))
        nearest = next((c for c in by_distance if not violations(setting, c)), None)
        advice = f"{nearest} works here." if nearest else "No layout of this model works on these nodes."
        return None, [*broken, Violation("nearest layout", f"instead of {wished}", advice)]
    last: list[Violation] = []
    for candidate in candidates(setting):
        last = violations(setting, candidate)
        if not last:
            return candidate, []
    return None, last


def candidates(setting: Setting) -> Iterator[Parallel]:
    """Layouts worth weighing, best first: fewest nodes, then fewest GPUs, tensor parallel before expert parallel."""
    total = setting.nodes * setting.gpus_per_node
    sizes = [2**power for power in range(total.bit_length()) if 2**power <= total]
    for size in sizes:
        yield Parallel(tensor=size)
        if setting.model.shape.moe and size > 1:
            yield Parallel(tensor=size, expert=True)


def version_tuple(version: str) -> tuple[int, ...]:
    """Numbers of a version for comparison: '0.33.0+cpu' is (0, 33, 0)."""
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdigit())
