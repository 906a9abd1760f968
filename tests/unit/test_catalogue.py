"""The catalogue loads, and a broken file is named with its key and what was expected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stepladder.catalogue import DEFAULT_DIRECTORY, Catalogue
from stepladder.errors import CatalogueError
from stepladder.memory import checkpoint_bytes

BROKEN = [
    ("models/step3.yml", "layers: 61", "layers: 60", "attention lists 60 layers, dense and moe together 61"),
    ("models/step3.yml", "title: Step3", "titel: Step3", "titel: Extra inputs are not permitted; found 'Step3'"),
    ("models/step3.yml", "name: step3", "name: step4", "name: expected 'step3' (as the file is called), found 'step4'"),
    ("models/step3.yml", "default_variant: bf16", "default_variant: bf8", "default_variant 'bf8' is not among"),
    (
        "models/step3.yml",
        "context_length: 65536",
        "context_length: long",
        "context_length: Input should be a valid int",
    ),
    ("models/step3.yml", "title: Step3", "title: [Step3", "not valid YAML"),
    (
        "engines/vllm.yml",
        "memory_fraction: 0.9",
        "memory_fraction: 1.9",
        "defaults.memory_fraction: Input should be less",
    ),
    ("engines/vllm.yml", "verified: cpu", "verified: maybe", "releases.2.verified: Input should be"),
    ("gpus.yml", "gpus_per_node: 8", "gpus_per_node: 0", "[0].gpus_per_node: Input should be greater than 0"),
    (
        "engines/vllm.yml",
        "default_multi_node: ray",
        "default_multi_node: rai",
        "default_multi_node 'rai' is not among the topologies ['single', 'ray', 'mp']",
    ),
    (
        "engines/transformers.yml",
        "features: []",
        "features: [tool_cals]",
        "features ['tool_cals'] are unknown; known are ['mtp', 'reasoning', 'text_only', 'tool_calls']",
    ),
    (
        "engines/sglang.yml",
        "version: 0.5.9",
        "version: 0.5.23",
        "releases: listed more than once: 0.5.23 for rocm",
    ),
    (
        "engines/sglang.yml",
        "gfx942: lmsysorg",
        "gfx9x: lmsysorg",
        "  releases.1.images: expected one of the kinds of images (",
    ),
    (
        "engines/vllm.yml",
        "lock: vllm-0.33.0-cuda.txt",
        "lock: vllm-0.33.0.txt",
        "  releases.0.lock: expected one of the files in locks/ (",
    ),
    (
        "models/step3.yml",
        "engines: [vllm, sglang, transformers]",
        "engines: [vlm, sglng]",
        "2 wrong:\n  variants.bf16.engines: expected one of the engines (sglang, tensorrt_llm, transformers, vllm); "
        "found 'vlm'\n  variants.bf16.engines:",
    ),
    (
        "models/step-3.5-flash.yml",
        "published_on: [h20-141",
        "published_on: [h20",
        "published_on: expected one of the GPU",
    ),
    ("gpus.yml", "name: h20-141", "name: h20-96", "[1].name: expected one of its own; found 'h20-96', which is [0]'s"),
    ("tools.yml", "uv_lock: uv.txt", "uv_lock: u.txt", "  uv_lock: expected one of the files in locks/ ("),
    ("tools.yml", "lock: tools.txt", "lock: 7", "lock: Input should be a valid string; found 7"),
]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEFAULT_DIRECTORY, tmp_path / "catalog"))


def read_all(catalogue: Catalogue) -> None:
    _ = catalogue.models, catalogue.engines, catalogue.gpus, catalogue.tools


@pytest.mark.parametrize(("file", "before", "after", "message"), BROKEN, ids=[case[2] for case in BROKEN])
def test_broken_file_is_named_with_its_key(copied: Path, file: str, before: str, after: str, message: str) -> None:
    path = copied / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(CatalogueError) as caught:
        read_all(Catalogue(copied))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_lock_is_named(copied: Path) -> None:
    (copied / "locks" / "tools.txt").unlink()
    with pytest.raises(CatalogueError, match=r"tools\.txt: an entry names it as its 'lock', but there is no such file"):
        Catalogue(copied).digest("tools.txt")


def test_empty_folder_is_an_error(copied: Path) -> None:
    shutil.rmtree(copied / "engines")
    with pytest.raises(CatalogueError, match=r"engines: expected at least one \.yml file, found none"):
        _ = Catalogue(copied).engines


def test_every_lock_that_an_engine_names_is_there() -> None:
    catalogue = Catalogue()
    locks = [release.lock for engine in catalogue.engines.values() for release in engine.releases]
    named = [lock for lock in [*locks, catalogue.tools.lock, catalogue.tools.uv_lock] if lock]
    assert len(named) >= 4
    assert all(catalogue.lock_path(lock).stat().st_size for lock in named)


def test_digest_follows_the_lock_and_the_packages(copied: Path) -> None:
    catalogue = Catalogue(copied)
    before = catalogue.digest("tools.txt", "torch==1")
    assert before == Catalogue(copied).digest("tools.txt", "torch==1")
    assert before != catalogue.digest("tools.txt", "torch==2")
    path = copied / "locks" / "tools.txt"
    path.write_text(path.read_text() + "\n# changed\n")
    assert before != Catalogue(copied).digest("tools.txt", "torch==1")


def test_a_lock_is_read_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(copied)
    before = catalogue.digest("tools.txt")
    monkeypatch.setattr(Path, "read_text", lambda _path: pytest.fail("read again"))
    assert catalogue.digest("tools.txt") == before


def test_sizes_calculated_from_dimensions_agree_with_the_published_ones() -> None:
    """GGUF files pack 4.5 bits and more into what is called 4; all others agree within 2 %."""
    compared = 0
    for model in Catalogue().models.values():
        for variant in model.variants.values():
            if variant.quantisation.format == "gguf" or model.rehearsal:
                continue
            assert checkpoint_bytes(model, variant.bits) == pytest.approx(variant.bytes_on_disk, rel=0.02)
            compared += 1
    assert compared >= 5
