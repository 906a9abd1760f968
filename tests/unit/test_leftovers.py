"""Environments and images that no release needs: what is listed, what stays, what goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_image
from ansible_collections.stepladder.core.plugins.module_utils import leftovers as node_side

from stepladder import leftovers


class Docker:
    """Stands in for the node's Docker engine: what it has by id, and what was removed."""

    def __init__(self, images: dict[str, list[str]]) -> None:
        self.images = images
        self.removed: list[str] = []

    def call(self, method: str, path: str) -> tuple[int, Any]:
        identity = path.removeprefix("/images/").removesuffix("/json")
        if identity not in self.images:
            return 404, {"message": "no such image"}
        return 200, {"Id": identity, "RepoTags": self.images[identity], "RepoDigests": [], "Size": 5_000_000_000}

    def remove(self, name: str) -> None:
        self.removed.append(name)


def environment(root: Path, name: str) -> str:
    folder = root / "venvs" / name
    folder.mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "data").write_bytes(b"x" * 8192)
    return str(folder)


def release(root: Path, plan_id: str, node: dict[str, Any], current: bool = False) -> None:
    folder = root / "deployments/d/releases" / plan_id
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"node": node}))
    if current:
        (root / "deployments/d/current").symlink_to(f"releases/{plan_id}")


def record(root: Path, image: str, identity: str) -> str:
    file = root / "images" / f"{engine_image.record_stem(image)}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"id": identity, "digest": "sha256:aa"}))
    return str(file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tools, runs, before, old = (environment(tmp_path, name) for name in ("tools-1", "vllm-3", "vllm-2", "vllm-1"))
    release(tmp_path, "p3", {"venv": {"path": runs}, "tools": {"path": tools}, "images": ["vllm/vllm-openai:v3"]}, True)
    release(tmp_path, "p2", {"venv": {"path": before}, "tools": {"path": tools}})
    record(tmp_path, "vllm/vllm-openai:v3", "sha256:3")
    record(tmp_path, "vllm/vllm-openai:v1", "sha256:1")
    record(tmp_path, "vllm/vllm-openai:v0", "sha256:0")
    assert old
    return tmp_path


def docker() -> Docker:
    return Docker({"sha256:3": ["vllm/vllm-openai:v3"], "sha256:1": ["other/name:1", "vllm/vllm-openai:v1"]})


def test_what_a_kept_release_names_stays(root: Path) -> None:
    found = node_side.find(str(root), docker())
    told = {Path(one.shown).name if one.kind == "environment" else one.shown: one.used_by for one in found}
    assert told == {
        "tools-1": ("deployment d (release p2, to go back to)", "deployment d (runs)"),
        "vllm-3": ("deployment d (runs)",),
        "vllm-2": ("deployment d (release p2, to go back to)",),
        "vllm-1": (),
        "image vllm_vllm-openai_v0 (Docker has it no more)": (),
        "image vllm/vllm-openai:v1": (),
        "image vllm/vllm-openai:v3": ("deployment d (runs)",),
    }
    assert all(one.bytes >= 8192 for one in found if one.kind == "environment")


def test_an_image_stays_whose_id_a_kept_release_runs_under_another_name(root: Path) -> None:
    script = root / "deployments/d/releases/p2/vllm-0/run"
    script.parent.mkdir()
    script.write_text("exec \\\n    docker \\\n    sha256:1 \\\n    serve\n")
    used = {one.name: one.used_by for one in node_side.find(str(root), docker()) if one.kind == "image"}
    assert used[f"{root}/images/vllm_vllm-openai_v1.json"] == ("deployment d (release p2, to go back to)",)
    assert used[f"{root}/images/vllm_vllm-openai_v0.json"] == ()


def test_only_what_nothing_needs_goes(root: Path) -> None:
    engine = docker()
    plain = [vars(one) for one in node_side.find(str(root), engine)]
    doomed = leftovers.removable(plain, {})
    assert [Path(name).name for name in doomed] == [
        "vllm-1", "vllm_vllm-openai_v0.json", "vllm_vllm-openai_v1.json"
    ]  # fmt: skip
    assert node_side.prune(str(root), doomed, engine, check_mode=True) == doomed
    assert Path(doomed[0]).exists()
    assert node_side.prune(str(root), doomed, engine) == doomed
    assert not any(Path(name).exists() for name in doomed)
    assert engine.removed == ["vllm/vllm-openai:v1"]
    assert node_side.prune(str(root), doomed, engine) == []
    assert (root / "venvs/vllm-2/pyvenv.cfg").exists()


def test_a_cache_goes_with_the_last_release_of_its_engine_and_gpu(root: Path) -> None:
    names = ("engines/vllm-3-aa-h200", "engines/vllm-2-bb-h200", "engines/vllm-1-cc-h200", "vllm", "uv")
    caches = {name: root / "cache" / name for name in names}
    for path in caches.values():
        (path / "triton").mkdir(parents=True)
        (path / "triton/kernel").write_text("x")
    for plan_id, name in (("p5", "engines/vllm-3-aa-h200"), ("p4", "engines/vllm-2-bb-h200")):
        release(root, plan_id, {"processes": [{"env": {"TRITON_CACHE_DIR": f"{caches[name]}/triton"}}]})
    found = [one for one in node_side.find(str(root), docker()) if one.kind == "cache"]
    assert {Path(one.name).name: bool(one.used_by) for one in found} == {
        "vllm-3-aa-h200": True, "vllm-2-bb-h200": True, "vllm-1-cc-h200": False, "vllm": False,
    }  # fmt: skip
    plain = [vars(one) for one in found]
    wanted = {"processes": [{"env": {"TRITON_CACHE_DIR": f"{caches['engines/vllm-1-cc-h200']}/triton"}}]}
    assert leftovers.removable(plain, wanted) == [str(caches["vllm"])]
    doomed = leftovers.removable(plain, {})
    assert node_side.prune(str(root), doomed, docker()) == doomed
    assert [name for name, path in caches.items() if path.exists()] == [*names[:2], "uv"]


def test_what_the_inventory_wants_next_stays(root: Path) -> None:
    plain = [vars(one) for one in node_side.find(str(root), docker())]
    node = {"venv": {"path": str(root / "venvs/vllm-1")}, "images": ["vllm/vllm-openai:v1@sha256:aa"]}
    assert [Path(name).name for name in leftovers.removable(plain, node)] == ["vllm_vllm-openai_v0.json"]


def test_what_is_in_use_is_refused_and_nothing_goes(root: Path) -> None:
    engine = docker()
    names = [str(root / "venvs/vllm-1"), str(root / "venvs/vllm-2"), str(root / "deployments")]
    with pytest.raises(node_side.LeftoversError) as raised:
        node_side.prune(str(root), names, engine)
    assert str(raised.value).splitlines() == [
        f"{root}/deployments is no environment, cache or image of the toolkit's",
        f"{root}/venvs/vllm-2 is used by deployment d (release p2, to go back to)",
        "Nothing was removed. Leave these out.",
    ]
    assert Path(names[0]).exists()


def test_a_process_keeps_its_environment(root: Path) -> None:
    place = root / "venvs/vllm-1"
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"{place}/bin/vllm"])
    try:
        one = next(one for one in node_side.find(str(root), docker()) if one.name == str(place))
        assert one.used_by[0].startswith(f"process {process.pid} (")
    finally:
        process.kill()
        process.wait()


def test_the_list_says_what_becomes_of_each() -> None:
    env = {"kind": "environment", "name": "/v/a", "shown": "/v/a", "bytes": 2_000_000_000, "used_by": []}
    used = {**env, "name": "/v/b", "shown": "/v/b", "used_by": ["deployment d (runs)"]}
    variables = {"n0": {"prune_found": [env, used], "prune_doomed": ["/v/a"]}, "n1": {"prune_found": [env]}}
    assert leftovers.prune_text(variables, ["n0", "n1"]).splitlines() == [
        "n0: /v/a (2.0 GB) will be removed",
        "n0: /v/b (2.0 GB) stays: deployment d (runs)",
        "n1: /v/a (2.0 GB) stays: wanted by the inventory",
        "2.0 GB will be freed.",
    ]
    empty = {"n0": {"prune_found": [{**env, "bytes": 0}], "prune_doomed": ["/v/a"]}}
    assert leftovers.prune_text(empty, ["n0"]).splitlines()[-1] == "0.0 MB will be freed."
    assert leftovers.prune_text({"n0": {}}, ["n0"]) == (
        "There are no environments, images or caches of the toolkit's on these nodes."
    )
