"""What a layout is judged against: one deployment's model, engine release and hardware."""

from __future__ import annotations

from dataclasses import dataclass

from stepladder.catalogue import Engine, EngineRelease, Gpu, Model, Variant
from stepladder.memory import MIB, MemoryBudget, kv_cache_bytes, weight_bytes_per_gpu
from stepladder.own_lock import OwnLock
from stepladder.request import Deployment, Parallel

BITS_PER_BYTE = 8


@dataclass(frozen=True)
class Setting:
    """A deployment with every name looked up; `nodes` and `gpus_per_node` are what the inventory has in all.

    `drivers`: nodes whose driver (NVIDIA) or ROCm release (AMD) the inventory declares, with it. `own_lock` is
    installed in place of the release's, whose command line it gets.
    """

    deployment: Deployment
    model: Model
    variant: Variant
    engine: Engine
    release: EngineRelease
    gpu: Gpu
    gpus_per_node: int
    nodes: int
    drivers: tuple[tuple[str, str], ...] = ()
    own_lock: OwnLock | None = None

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

    @property
    def has_lock(self) -> bool:
        """Whether there is what an environment is made from here; the catalogue's locks are for x86_64."""
        return self.own_lock is not None or (self.release.lock is not None and self.gpu.machine != "aarch64")

    @property
    def in_container(self) -> bool:
        """Whether the engine runs in a container: as wished, or where an image is named or there is no lock."""
        wished = self.deployment.install
        return wished == "container" or (wished == "auto" and (self.deployment.image is not None or not self.has_lock))

    @property
    def image(self) -> str:
        """The engine's image for this GPU; only asked for once the rules have been kept."""
        image = self.known_image
        assert image is not None, f"no image for {self.gpu.name}"  # noqa: S101 - `rules.installable` refuses that
        return image

    @property
    def known_image(self) -> str | None:
        """The operator's own image, else the catalogue's for this GPU; none where there is neither."""
        return self.deployment.image or self.release.image_for(self.gpu)

    @property
    def version(self) -> str:
        """The engine's version that is installed: the release's, unless a lock of the operator's own has another."""
        return self.own_lock.version if self.own_lock else self.release.version

    @property
    def release_name(self) -> str:
        """The engine with its version."""
        return f"{self.engine.title} {self.release.version}"

    @property
    def engines_that_serve(self) -> set[str]:
        """Engines that any variant of the model names."""
        return {name for variant in self.model.variants.values() for name in variant.engines}


def memory_budget(setting: Setting, parallel: Parallel) -> MemoryBudget:
    """The budget of the fullest GPU of a replica in this layout."""
    per_token, per_sequence = kv_cache_bytes(setting.model, parallel, setting.variant.kv_bits // BITS_PER_BYTE)
    memory = setting.gpu.memory_mib
    limit = None if memory is None else round(memory * MIB * setting.engine.defaults.memory_fraction)
    return MemoryBudget(
        weights=weight_bytes_per_gpu(
            setting.model, setting.variant, parallel, vision=setting.wants_vision, mtp=setting.wants_mtp
        ),
        runtime=setting.release.runtime_memory_bytes + _kept_back(setting, limit),
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_sequence,
        context_length=setting.context_length,
        concurrency=setting.deployment.concurrency,
        limit=limit,
    )


def _kept_back(setting: Setting, limit: int | None) -> int:
    """Bytes that the engine keeps back for a long context, beside the release's runtime memory."""
    reserve = setting.release.long_context_reserve
    if limit is None or reserve is None or setting.context_length <= reserve.above_tokens:
        return 0
    return round((limit - setting.release.runtime_memory_bytes) * reserve.share)
