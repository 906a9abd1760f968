"""Every deployment that the catalogue lets an operator ask for, planned or refused: what tests walk over.

Nothing here knows a model, a GPU type or an engine: an entry that is new in the catalogue is walked over at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

from stepladder.catalogue import Catalogue, Engine, Gpu, Model
from stepladder.errors import PlanRefusedError, Violation
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import DEFAULT_FEATURES, FEATURES, Deployment, Node, Parallel, PlanRequest

NODE_COUNTS = (1, 2)
STATE_DIRECTORY = "/var/lib/stepladder"
# Settings that add or change flags whatever the layout: each is asked for once, with everything else automatic.
SINGLE_CHANGES: tuple[dict[str, Any], ...] = (
    {"context_length": 1024},
    {"concurrency": 2},
    {"replicas": 2},
    {"install": "container"},
    {"install": "venv"},
    {"served_name": "house-name", "bind_address": "127.0.0.1", "port": 18000},
)


@dataclass(frozen=True)
class Case:
    """A request with the planner's answer: a plan, or every reason why there is none."""

    request: PlanRequest
    plan: Plan | None
    violations: tuple[Violation, ...] = ()

    def __str__(self) -> str:
        wish, nodes = self.request.deployment, self.request.nodes
        features = "+".join(wish.features) or "plain"
        return (
            f"{wish.model} {wish.variant} {wish.engine} {len(nodes)}x {nodes[0].gpu} {wish.topology} "
            f"{wish.parallel} {features}"
        )


@dataclass(frozen=True)
class Tally:
    """How many cases there are, and which rules refuse how many of them (a case may break several)."""

    valid: int
    refused: int
    by_rule: dict[str, int]

    @property
    def total(self) -> int:
        """All cases."""
        return self.valid + self.refused


def cases(
    catalogue: Catalogue, node_counts: Sequence[int] = NODE_COUNTS, state_directory: str = STATE_DIRECTORY
) -> Iterator[Case]:
    """Ask the planner for every combination of the catalogue's entries.

    Args:
        catalogue: whose models, variants, GPU types and engines are combined.
        node_counts: how many nodes there are, one inventory each.
        state_directory: the nodes' state directory, below which the plans' paths lie.

    Raises:
        CatalogueError: if a catalogue file cannot be used.
    """
    for request in requests(catalogue, node_counts, state_directory):
        yield answered(request, catalogue)


def answered(request: PlanRequest, catalogue: Catalogue) -> Case:
    """One request with the planner's answer to it."""
    try:
        return Case(request, make_plan(request, catalogue))
    except PlanRefusedError as refusal:
        return Case(request, None, refusal.violations)


def tally(found: Iterable[Case]) -> Tally:
    """Count valid and refused cases."""
    valid, refused, rules = 0, 0, Counter[str]()
    for case in found:
        valid += case.plan is not None
        refused += case.plan is None
        rules.update({violation.rule for violation in case.violations})
    return Tally(valid, refused, dict(rules.most_common()))


def requests(
    catalogue: Catalogue, node_counts: Sequence[int] = NODE_COUNTS, state_directory: str = STATE_DIRECTORY
) -> Iterator[PlanRequest]:
    """Every combination as a request; where an engine cannot serve a variant on a GPU type, that is asked for once."""
    for model, gpu, engine, count in product(
        catalogue.models.values(), catalogue.gpus.values(), catalogue.engines.values(), node_counts
    ):
        inventory = nodes(gpu, count)
        for variant, entry in model.variants.items():
            runs_here = any(release.platform == gpu.platform for release in engine.releases)
            possible = engine.name in entry.engines and runs_here
            for wish in _wishes(model, gpu, engine, count) if possible else [{}]:
                deployment = Deployment(model=model.name, variant=variant, engine=engine.name, **wish)
                yield PlanRequest(deployment=deployment, nodes=inventory, state_directory=state_directory)


def nodes(gpu: Gpu, count: int) -> tuple[Node, ...]:
    """An inventory of one GPU type, with addresses from the block that is set aside for tests (RFC 2544)."""
    return tuple(Node(name=f"n{i}", address=f"198.18.0.{i + 1}", gpu=gpu.name, interface="eth1") for i in range(count))


def feature_sets(model: Model) -> list[tuple[str, ...]]:
    """Every set of the features that mean something for a model, the empty one included."""
    lacking = {
        "reasoning": model.reasoning_parser is None,
        "tool_calls": model.tool_call_parser is None,
        "text_only": model.modality != "vision",
        "mtp": not model.mtp_layers,
    }
    relevant = [name for name in FEATURES if not lacking.get(name, False)]
    return [chosen for size in range(len(relevant) + 1) for chosen in combinations(relevant, size)]


def layouts(gpus_per_node: int, node_count: int, experts: bool) -> Iterator[Parallel]:
    """Every way to cut a model into powers of two that its nodes have GPUs for; a pipeline has a stage a node at most.

    Args:
        gpus_per_node: GPUs of each node.
        node_count: nodes of the inventory.
        experts: whether expert parallelism is asked for too.
    """
    total = gpus_per_node * node_count
    sizes = [2**power for power in range(total.bit_length())]
    for tensor, pipeline, data in product(sizes, sizes, sizes):
        if pipeline > node_count or tensor * pipeline * data > total:
            continue
        yield Parallel(tensor=tensor, pipeline=pipeline, data=data)
        if experts and tensor * data > 1:
            yield Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=True)


def _wishes(model: Model, gpu: Gpu, engine: Engine, node_count: int) -> Iterator[dict[str, Any]]:
    """What is asked for beside model, engine and nodes.

    Every layout goes with the default features and with all, every set of features with the automatic layout: flags
    for features and for layouts do not depend on each other, so their full product would only be longer.
    """
    sets = feature_sets(model)
    default = tuple(name for name in DEFAULT_FEATURES if name in sets[-1])
    automatic: Literal["auto"] = "auto"
    for features, topology in product(sets, (automatic, *engine.topologies)):
        yield {"parallel": automatic, "topology": topology, "features": features}
    releases = {release.version for release in engine.releases if release.platform == gpu.platform}
    changes = [*SINGLE_CHANGES, *({"engine_version": version} for version in sorted(releases))]
    for change in changes:
        yield {"features": default, **change}
    for parallel in layouts(gpu.gpus_per_node, node_count, model.shape.moe is not None):
        across = parallel.world_size > gpu.gpus_per_node
        if node_count > 1 and not across:
            continue  # that is what one node is asked for
        topologies = engine.topologies if across else (automatic,)
        for features, topology in product(dict.fromkeys((default, sets[-1])), topologies):
            yield {"parallel": parallel, "topology": topology, "features": features}
