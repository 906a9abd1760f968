"""Weights from a directory or an archive: what they are held against, and what is said where there is nothing."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.filter import weights as filters
from ansible_collections.stepladder.core.plugins.module_utils import weights, weights_copy
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError

SIZE = 5000
FILES = {"config.json": b"{}" * (SIZE // 2), "sub/a.safetensors": b"ab" * (SIZE // 2)}


@pytest.fixture
def wish(tmp_path: Path) -> Request:
    """A directory without any hashes."""
    for name, content in FILES.items():
        path = tmp_path / "carried" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    path = tmp_path / "models" / "x--y" / "v1"
    return Request("x/y", str(path), "v1", source="directory", source_path=str(tmp_path / "carried"))


def packed(wish: Request) -> Request:
    archive = f"{wish.source_path}.tar"
    subprocess.run(["tar", "-C", wish.source_path, "-cf", archive, "."], check=True)
    return replace(wish, source="archive", source_path=archive)


def sums(wish: Request, *names: str) -> None:
    lines = [f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in names]
    Path(wish.source_path, "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("kind", ["directory", "archive"])
def test_files_without_a_hash_are_told(wish: Request, kind: str) -> None:
    sums(wish, "config.json")
    wish = packed(wish) if kind == "archive" else wish
    done = weights.ensure(wish, "present")
    assert done["warnings"] == [
        f"1 of 2 files of x/y@v1 have no hash to hold against, first sub/a.safetensors: the {kind} {wish.source_path} "
        "lists none, so they are taken as they were read. Put SHA256SUMS beside the files at their origin: "
        "sha256sum $(find -type f)."
    ]
    assert weights.ensure(wish, "present")["warnings"] == []


def test_nothing_is_told_where_all_have_one(wish: Request) -> None:
    sums(wish, *FILES)
    assert weights.ensure(wish, "present")["warnings"] == []


class Flipping:
    """A disk that turns a byte of the first file around while it is written."""

    def __init__(self, file: object) -> None:
        self.file = file

    def write(self, block: bytes) -> None:
        self.file.write(bytes([block[0] ^ 1]) + block[1:])

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> Flipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("kind", ["directory", "archive"])
def test_a_byte_that_flips_while_it_is_copied_is_no_truth(
    wish: Request, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = packed(wish) if kind == "archive" else wish
    broken = [True]
    opened = Path.open

    def flips(path: Path, mode: str = "r", *rest: object, **more: object) -> object:
        file = opened(path, mode, *rest, **more)
        wrong = broken and mode == "wb" and path.name == f"config.json{weights_copy.UNFINISHED_SUFFIX}"
        return Flipping(file) if wrong else file

    monkeypatch.setattr(Path, "open", flips)
    with pytest.raises(WeightsError) as error:
        weights.ensure(wish, "present")
    expected = hashlib.sha256(FILES["config.json"]).hexdigest()
    assert f"\n  config.json: sha256: expected {expected}, found " in str(error.value)
    assert not wish.marker.exists()
    # What it copied wrong is not what the next one finds.
    assert not (Path(wish.path) / "config.json").exists()
    broken.clear()
    weights.ensure(wish, "present")
    assert {name: (Path(wish.path) / name).read_bytes() for name in FILES} == FILES


def test_what_a_killed_run_copied_and_did_not_prove_is_copied_again(wish: Request) -> None:
    Path(wish.path).mkdir(parents=True)
    (Path(wish.path) / "config.json").write_bytes(bytes(SIZE))
    weights.ensure(wish, "present")
    assert (Path(wish.path) / "config.json").read_bytes() == FILES["config.json"]


def test_links_that_lead_nowhere_are_named(wish: Request) -> None:
    for number in range(7):
        (Path(wish.source_path) / f"model-{number}.safetensors").symlink_to(f"../../blobs/{number}")
    with pytest.raises(WeightsError) as error:
        weights.ensure(wish, "present")
    assert str(error.value).splitlines() == [
        f"the directory {wish.source_path} has 7 links that lead nowhere on this node:",
        *[f"  model-{number}.safetensors -> ../../blobs/{number}" for number in range(5)],
        "  and 2 more",
        "Bring what they point to, carry the files themselves (cp --dereference), or leave them out with "
        "model_weights_exclude.",
    ]
    weights.ensure(replace(wish, exclude=("model-*",)), "present")


def test_a_node_that_is_complete_tells_the_others_what_to_hold_against(wish: Request, tmp_path: Path) -> None:
    Path(wish.source_path, "modeling.py").write_text("x = 1")
    assert weights.look(wish, local=True)["listing"] == []
    weights.ensure(wish, "present")
    seen = weights.look(replace(wish, source_path="/nonexistent"), local=True)
    assert [sorted(one) for one in seen["listing"]] == [["git_blob", "path", "sha256", "size"]] * 3
    other = replace(
        wish, path=str(tmp_path / "n2" / "x--y" / "v1"), listing=tuple(seen["listing"]), source_path="/nonexistent"
    )
    # The source is not asked: it is not there.
    found = weights.look(other)
    assert [one["path"] for one in found["wanted"]] == [one["path"] for one in seen["listing"]]
    assert found["remote_code"] == seen["remote_code"]
    assert weights.look(replace(other, source="huggingface"))["remote_code"][0]["sha256"].startswith("git:")
    # What comes is held against it, from wherever.
    Path(wish.source_path, "config.json").write_bytes(bytes(SIZE))
    with pytest.raises(WeightsError, match=r"1 of 3 files .* are not what the source lists:\n  config.json: sha256"):
        weights.ensure(replace(other, source_path=wish.source_path), "present")


def looked(complete: bool, name: str, **more: object) -> dict:
    told = {"model_id": "x/y", "revision": "v1", "include": [], "exclude": ["*.bin", "*.pth"]}
    return {"seen": {**told, "complete": complete, "listing": [{"path": name}] if complete else [], **more}}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"n1": looked(False, "a"), "n2": looked(True, "b"), "n3": looked(True, "c")}, [{"path": "b"}]),
        ({"n1": looked(False, "a"), "n2": {}}, []),
        ({"n1": looked(True, "a", revision="v2"), "n2": looked(True, "b", exclude=[])}, []),
    ],
    ids=["the first that has everything", "nobody has", "others have another revision, and other patterns"],
)
def test_whose_list_counts(nodes: dict, expected: list) -> None:
    wish = {"model_id": "x/y", "revision": "v1", "include": [], "exclude": ["*.bin,*.pth"]}
    assert filters.listing(nodes, [*nodes], "seen", wish) == expected
