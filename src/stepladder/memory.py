"""How many bytes a layout takes on one GPU: weights, KV cache and what the engine needs beside them.

The counts follow from a model's dimensions alone; for Step3 they give the published 321.3B parameters exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from stepladder.catalogue import Attention, Bits, Model, Variant
from stepladder.request import Parallel

MIB = 1024**2
GIGA = 1e9
KV_ELEMENT_BYTES = 2
GATED_FFN_MATRICES = 3


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by the way in which they are sharded and quantised."""

    experts: int
    linear: int
    embeddings: int
    vision: int
    mtp: int

    @property
    def served(self) -> int:
        """What the model card counts: everything but the layers for multi-token prediction."""
        return self.experts + self.linear + self.embeddings + self.vision


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes on one GPU; `limit` is the engine's share of the GPU, none where the node decides.

    `kv_bytes_per_token` is one GPU's part of one token; `kv_bytes_per_sequence` what a sequence takes however long.
    """

    weights: int
    runtime: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    context_length: int
    concurrency: int
    limit: int | None

    @property
    def kv_wanted(self) -> int:
        """KV cache for the wanted number of full-length sequences."""
        return self.concurrency * self.kv_of_one_sequence

    @property
    def kv_of_one_sequence(self) -> int:
        """KV cache of one full-length sequence."""
        return self.context_length * self.kv_bytes_per_token + self.kv_bytes_per_sequence

    @property
    def needed(self) -> int:
        """Bytes that the layout needs for what is wanted."""
        return self.weights + self.runtime + self.kv_wanted

    @property
    def margin(self) -> int | None:
        """Bytes left over; negative where the layout does not fit."""
        return None if self.limit is None else self.limit - self.needed

    @property
    def full_sequences(self) -> int | None:
        """How many full-length sequences the KV cache holds."""
        if self.limit is None:
            return None
        return max(0, (self.limit - self.weights - self.runtime) // self.kv_of_one_sequence)


def count_parameters(model: Model) -> ParameterCounts:
    """Count a model's parameters from its dimensions (projections and expert blocks; norms and biases are noise)."""
    shape = model.shape
    hidden = shape.hidden_size
    linear = sum(group.layers * _attention_parameters(group, hidden) for group in shape.attention)
    linear += shape.dense.layers * GATED_FFN_MATRICES * hidden * shape.dense.width
    experts = 0
    if shape.moe:
        moe = shape.moe
        experts = moe.layers * moe.experts * GATED_FFN_MATRICES * hidden * moe.expert_width
        linear += moe.layers * (GATED_FFN_MATRICES * hidden * moe.shared_width + hidden * moe.experts)
    return ParameterCounts(
        experts=experts,
        linear=linear,
        embeddings=2 * shape.vocabulary * hidden,
        vision=model.parameters.vision,
        mtp=model.parameters.mtp,
    )


def weight_bytes_per_gpu(model: Model, variant: Variant, parallel: Parallel, *, vision: bool, mtp: bool) -> int:
    """Bytes of weights on the fullest GPU of a replica.

    Routed experts are split over tensor times data parallel ranks, with or without expert parallelism; everything else
    is split over tensor parallel ranks and repeated in each data parallel one (vLLM: `flatten_tp_across_dp`).
    Pipeline stages hold whole layers: those without experts come first, the last stage has the output head, and the
    first one the vision tower and the embeddings.
    """
    counts, bits = count_parameters(model), variant.bits
    moe_layers = model.shape.moe.layers if model.shape.moe else 0
    first_moe = model.shape.layers - moe_layers
    # More stages than layers are refused; a number that somebody mistyped must not fill the memory before that.
    stages = stage_layers(model.shape.layers, min(parallel.pipeline, model.shape.layers))
    fullest = 0.0
    for start, end in stages:
        everywhere = counts.linear * bits.linear * (end - start) / model.shape.layers
        ends = (start == 0) + (end == model.shape.layers)
        everywhere += counts.embeddings * bits.embeddings * ends / 2
        everywhere += counts.vision * bits.vision if vision and start == 0 else 0
        everywhere += counts.mtp * bits.mtp if mtp and end == model.shape.layers else 0
        with_experts = max(0, end - max(start, first_moe))
        experts = counts.experts * bits.experts * with_experts / moe_layers if moe_layers else 0
        fullest = max(fullest, everywhere / parallel.tensor + experts / (parallel.tensor * parallel.data))
    return round(fullest / 8)


def stage_layers(layers: int, stages: int) -> list[tuple[int, int]]:
    """First layer of each pipeline stage, and the one after its last; what is over goes to the stages before the last
    one (vLLM 0.32.0, distributed/utils.py `get_pp_indices`).
    """
    each, over = divmod(layers, stages)
    sizes = [each] * stages
    for place in range(2, over + 2):
        sizes[-place] += 1
    return list(pairwise(accumulate(sizes, initial=0)))


def kv_cache_bytes(model: Model, parallel: Parallel, element_bytes: int = KV_ELEMENT_BYTES) -> tuple[int, int]:
    """KV cache of one GPU: bytes per token in full-attention layers, bytes per sequence in sliding ones.

    KV heads are split over tensor parallel ranks as far as there are any, then repeated.
    """
    per_token = per_sequence = 0
    for group in model.shape.attention:
        heads = -(-group.kv_heads // min(parallel.tensor, group.kv_heads))
        one_layer = 2 * heads * group.head_dim * element_bytes
        layers = -(-group.layers // parallel.pipeline)
        if group.window is None:
            per_token += layers * one_layer
        else:
            per_sequence += layers * one_layer * group.window
    return per_token, per_sequence


def checkpoint_bytes(model: Model, bits: Bits) -> int:
    """Bytes of a checkpoint as calculated, to hold a published size against."""
    counts = count_parameters(model)
    total_bits = counts.experts * bits.experts + counts.linear * bits.linear + counts.embeddings * bits.embeddings
    return round((total_bits + counts.vision * bits.vision + counts.mtp * bits.mtp) / 8)


def _attention_parameters(group: Attention, hidden: int) -> int:
    query_width = group.query_heads * group.head_dim
    if group.query_rank is None:
        query = hidden * query_width
    else:
        query = hidden * group.query_rank + group.query_rank * query_width
    key_value = 2 * hidden * group.kv_heads * group.head_dim
    return query + key_value + query_width * hidden
