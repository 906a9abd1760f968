"""The catalogue loads, and a broken file is named with its key and what was expected."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from stepladder.catalogue import DEFAULT_DIRECTORY, Catalogue, content_sha256
from stepladder.contents import venv_requirements, venv_stand_ins
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
    (
        "engines/vllm.yml",
        '    minimum_driver: "580"\n',
        '    minimum_driver: "580"\n    stand_ins: [{name: kernel, version: "1", reason: none}]\n',
        "releases.0: Value error, stand_ins (kernel) are for rehearsals on platform cpu, not for cuda",
    ),
    ("engines/vllm.yml", "    lock: vllm-0.32.0-cpu.txt\n", "", "extra_locks come beside a lock, and there is none"),
    (
        "engines/vllm.yml",
        "topologies: [ray]",
        "topologies: [rey]",
        "release 0.32.0 for cpu names topologies that the engine has not: rey",
    ),
    (
        "engines/vllm.yml",
        "extra_locks: {ray:",
        "extra_locks: {rey:",
        "release 0.32.0 for cpu names topologies that the engine has not: rey",
    ),
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
    releases = [release for engine in catalogue.engines.values() for release in engine.releases]
    locks = [lock for release in releases for lock in (release.lock, *release.extra_locks.values())]
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


def test_locks_that_are_installed_together_have_nothing_twice() -> None:
    catalogue = Catalogue()
    together = [
        release.locks_for(topology)
        for engine in catalogue.engines.values()
        for release in engine.releases
        for topology in release.extra_locks
    ]
    assert together
    for locks in together:
        names = [re.findall(r"(?m)^([\w.-]+)==", catalogue.lock_path(lock).read_text()) for lock in locks]
        assert all(names)
        assert set.intersection(*map(set, names)) == set(), locks


def test_every_stand_in_is_there_and_none_is_left_over() -> None:
    catalogue = Catalogue()
    releases = [release for engine in catalogue.engines.values() for release in engine.releases]
    named = {each.name for release in releases for each in release.stand_ins}
    assert named == {path.name for path in (catalogue.directory / "stand_ins").iterdir()}
    for name in named:
        files = catalogue.stand_in_files(name)
        assert files
        for path, text in files.items():
            compile(text, path, "exec") if path.endswith(".py") else None


def test_files_of_a_stand_in(copied: Path) -> None:
    folder = copied / "stand_ins" / "vllm_cpu_ray"
    before = Catalogue(copied).stand_in_files("vllm_cpu_ray")
    names = ("__init__.py", "communicator.py", "platform.py")
    assert list(before) == ["entry_points.txt", *(f"vllm_cpu_ray/{name}" for name in names)]
    (folder / "vllm_cpu_ray/__pycache__").mkdir()
    (folder / "vllm_cpu_ray/__pycache__/platform.pyc").write_bytes(b"\xff")
    assert Catalogue(copied).stand_in_files("vllm_cpu_ray") == before
    (folder / "kernel.so").write_bytes(b"\xff")
    with pytest.raises(CatalogueError, match=r"stand_ins/vllm_cpu_ray: a stand-in is made of text files"):
        Catalogue(copied).stand_in_files("vllm_cpu_ray")
    with pytest.raises(CatalogueError, match=r"stand_ins/other: an entry names it .* but there are no files"):
        Catalogue(copied).stand_in_files("other")


def test_contents_of_a_planned_environment_are_read_and_held_against_the_plan(copied: Path) -> None:
    files = Catalogue(copied).stand_in_files("vllm_cpu_ray")
    planned = {"name": "vllm_cpu_ray", "version": "1", "sha256": content_sha256(files)}
    venv = {"lock": "tools.txt", "extra_locks": ["ray-2.60.0-cpu.txt"], "stand_ins": [planned]}
    assert venv_stand_ins(venv, str(copied)) == [{"name": "vllm_cpu_ray", "version": "1", "files": files}]
    assert venv_requirements(venv, str(copied)) == "".join(
        (copied / "locks" / lock).read_text() for lock in ("tools.txt", "ray-2.60.0-cpu.txt")
    )
    (copied / "stand_ins/vllm_cpu_ray/vllm_cpu_ray/platform.py").write_text("")
    with pytest.raises(
        CatalogueError, match=r"stand_ins/vllm_cpu_ray was changed since the plan was made\. Plan again"
    ):
        venv_stand_ins(venv, str(copied))
