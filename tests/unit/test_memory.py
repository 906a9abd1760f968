"""The memory budget against published and independently calculated figures."""

from __future__ import annotations

from itertools import pairwise

import pytest

from stepladder.catalogue import Catalogue
from stepladder.memory import MemoryBudget, count_parameters, kv_cache_bytes, stage_layers, weight_bytes_per_gpu
from stepladder.request import Parallel

STEP3_LAYOUTS = [
    (Parallel(tensor=16), 40.2, 39.5),
    (Parallel(tensor=8, data=2), 43.3, 42.1),
    (Parallel(tensor=4, data=4), 49.7, 47.2),
    (Parallel(tensor=2, data=8), 62.3, 57.3),
    (Parallel(data=16), 87.7, 77.7),
    # By hand: the second stage has 30 of 56 layers with experts (158.5B), 30 of 61 of the rest (9.1B), the head (0.9B).
    (Parallel(tensor=8, pipeline=2), 42.1, 42.1),
]


def test_step3_has_the_published_number_of_parameters() -> None:
    assert round(count_parameters(Catalogue().models["step3"]).served / 1e9, 1) == 321.3


def test_step_3_5_flash_has_the_published_number_of_parameters() -> None:
    assert count_parameters(Catalogue().models["step-3.5-flash"]).served / 1e9 == pytest.approx(196.8, abs=0.2)


@pytest.mark.parametrize(("parallel", "whole", "text_only"), STEP3_LAYOUTS, ids=str)
def test_step3_bf16_weights_per_gpu(parallel: Parallel, whole: float, text_only: float) -> None:
    model = Catalogue().models["step3"]
    found = [
        weight_bytes_per_gpu(model, model.variants["bf16"], parallel, vision=vision, mtp=False) / 1e9
        for vision in (True, False)
    ]
    assert [round(size, 1) for size in found] == [whole, text_only]


def test_a_mistyped_number_of_stages_costs_nothing() -> None:
    model = Catalogue().models["step3"]
    weight_bytes_per_gpu(model, model.variants["bf16"], Parallel(pipeline=10**9), vision=True, mtp=False)


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(61, 2, [31, 30]), (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]), (45, 1, [45]), (6, 4, [1, 2, 2, 1]), (4, 4, [1, 1, 1, 1])],
)
def test_layers_of_pipeline_stages(layers: int, stages: int, sizes: list[int]) -> None:
    found = stage_layers(layers, stages)
    assert [end - start for start, end in found] == sizes
    assert (found[0][0], found[-1][1]) == (0, layers)
    assert all(end == start for (_, end), (start, _) in pairwise(found))


@pytest.mark.parametrize(
    ("name", "parallel", "per_token", "per_sequence"),
    [
        ("step3", Parallel(), 62_464, 0),
        ("step3", Parallel(tensor=16), 62_464, 0),  # one KV head is repeated on every rank
        ("step-3.5-flash", Parallel(), 49_152, 69_206_016),
        ("step-3.5-flash", Parallel(tensor=4), 12_288, 17_301_504),
        ("step-3.5-flash", Parallel(tensor=16), 6_144, 8_650_752),  # eight KV heads: no smaller than at TP8
    ],
)
def test_kv_cache(name: str, parallel: Parallel, per_token: int, per_sequence: int) -> None:
    assert kv_cache_bytes(Catalogue().models[name], parallel) == (per_token, per_sequence)


def test_expert_parallelism_does_not_change_the_weights_of_a_gpu() -> None:
    model = Catalogue().models["step-3.5-flash"]
    sizes = {
        weight_bytes_per_gpu(model, model.variants["fp8"], Parallel(tensor=4, expert=expert), vision=False, mtp=False)
        for expert in (True, False)
    }
    assert len(sizes) == 1


def budget(limit: int | None) -> MemoryBudget:
    return MemoryBudget(
        weights=40,
        runtime=10,
        kv_bytes_per_token=2,
        kv_bytes_per_sequence=5,
        context_length=10,
        concurrency=2,
        limit=limit,
    )


@pytest.mark.parametrize(("limit", "margin", "sequences"), [(100, 0, 2), (99, -1, 1), (200, 100, 6), (20, -80, 0)])
def test_margin_and_full_sequences(limit: int, margin: int, sequences: int) -> None:
    found = budget(limit)
    assert (found.needed, found.margin, found.full_sequences) == (100, margin, sequences)


def test_without_a_limit_nothing_is_claimed() -> None:
    assert (budget(None).margin, budget(None).full_sequences) == (None, None)
