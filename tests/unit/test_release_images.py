"""Which image a release's containers are made of: written, looked at, started again, gone back to. Docker stands in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.stepladder.core.plugins.module_utils import (
    deployments,
    engine_image,
    node_state,
    release,
    release_images,
)
from ansible_collections.stepladder.core.plugins.modules import release as release_module
from jinja2.nativetypes import NativeEnvironment

from stepladder.catalogue import Catalogue
from stepladder.planner import make_plan
from stepladder.request import parse_request
from stepladder.units import release_processes, service_units, watched_units

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "reg.example:5000/vllm/vllm-openai:v0.33.0"
OLD, NEW = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
# Program and arguments that the role `service` found; a container has its own.
LAUNCHER = ["/opt/reaper"]


class Docker(engine_image.Docker):
    """Stands in for a node's Docker: images by name, those that lie there under no name any more, and containers."""

    def __init__(self, named: str = "", *others: str) -> None:
        super().__init__("/nowhere")
        self.named, self.ids = named, {*others, named} - {""}
        self.running: list[str] = []
        self.asked = 0
        self.silent = False

    def look(self, name: str) -> engine_image.Local | None:
        self._answer()
        identity = self.named if name == IMAGE else name
        return engine_image.Local(identity) if identity in self.ids else None

    def containers(self, label: str) -> list[str]:
        self._answer()
        assert label.startswith("stepladder.deployment=/"), label
        return self.running

    def _answer(self) -> None:
        self.asked += 1
        if self.silent:
            raise engine_image.ImageError("Docker does not answer at /nowhere")


class Node:
    """A node of a replica of two in containers, with the steps of the roles that write and compare a release."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, f"{root}/deployments/step3"
        self.docker = Docker(OLD)

    def slice(self, host: str = "n0", **deployment: Any) -> dict[str, Any]:
        wanted = {"name": "step3", "model": "step3", "engine": "vllm", "topology": "mp", "image": IMAGE}
        hosts = [
            {"name": f"n{i}", "address": f"198.18.0.{i + 1}", "gpu": "h20-96", "interface": "eth1"} for i in range(2)
        ]
        request = {"deployment": wanted | deployment, "nodes": hosts, "state_directory": str(self.root)}
        kept = json.loads(json.dumps(make_plan(parse_request(request), Catalogue()).slices()[host]))
        # What tells the rest of a node has tests of its own.
        kept["node"] |= {"weights": None, "tools": None, "venv": None}
        return dict(kept)

    def processes(self, kept: dict[str, Any]) -> list[dict[str, Any]]:
        return release.as_text(release_processes(kept["node"], LAUNCHER, self.path))

    def write(self, kept: dict[str, Any], by_name: bool = False) -> str:
        """Write a release and make it current; returns the fingerprint of its process."""
        processes, plan_id = self.processes(kept), kept["plan_id"]
        if not by_name:
            images = release_images.Images(self.docker)
            processes = release_images.with_ids(self.path, plan_id, processes, images)
        wanted = release.wanted_release(self.path, plan_id, kept, processes)
        release.converge(self.path, wanted, 3, False, deadline=1)
        units = [unit["unit"] for unit in service_units(kept["node"]["processes"], self.path)]
        described = {"described_by": "m1"}
        for file in node_state.described_files("systemd", units, str(self.root), "step3"):
            Path(file).write_text("[Unit]\n")
            described[file] = node_state.digest(file)
        release.record_outcome(self.path, plan_id, release.PROVEN, "", described=described, deadline=1)
        (fingerprint,) = wanted.fingerprints.values()
        return fingerprint

    def image_of(self, kept: dict[str, Any]) -> str:
        (process,) = self.processes(kept)
        return release_images.written(self.path, kept["plan_id"], process)

    def reasons(self, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What the look of a deploy and of `drift` says, with the fingerprint that it wants kept in `wanted`."""
        asked: list[Any] = []
        monkeypatch.setattr(node_state.engine_state, "read_managers", lambda *_: {})
        monkeypatch.setattr(node_state.engine_state, "look", lambda *given, **_: asked.extend(given[2]) or [])
        given = {
            "state_directory": str(self.root), "deployment": "step3", "slice": kept, "manager": "systemd",
            "launchers": {"systemd": LAUNCHER}, "processes": self.processes(kept), "described_by": "m1",
            "units": watched_units(service_units(kept["node"]["processes"], self.path)), "supervisorctl": [], "keep": 3,
            "weights": {}, "ask_timeout": 1.0,
        }  # fmt: skip
        found = node_state.look(given, {}, self.docker)["reasons"]
        self.wanted = asked[0]["wanted_fingerprint"]
        return list(found)

    def missing(self, kept: dict[str, Any]) -> list[str]:
        """What `rollback` and `start` say that the node lacks for a release."""
        told, _ = deployments.read_releases(str(self.root), "step3", self.docker)
        return next(list(one["missing"]) for one in told if one["plan_id"] == kept["plan_id"])

    def record(self, identity: str) -> None:
        """What the role engine_image writes down when it brings an image."""
        file = self.root / "images" / f"{engine_image.record_stem(IMAGE)}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"id": identity}))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    (tmp_path / "systemd").mkdir()
    monkeypatch.setattr(node_state, "SYSTEMD_UNITS", str(tmp_path / "systemd"))
    return Node(tmp_path)


@pytest.mark.parametrize("host", ["n0", "n1"])
def test_a_healthy_container_equals_its_release(node: Node, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = node.slice(host)
    fingerprint = node.write(kept)
    assert node.image_of(kept) == OLD
    assert node.reasons(kept, monkeypatch) == []
    assert node.wanted == fingerprint


def test_a_tag_that_is_moved_changes_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = node.slice()
    fingerprint = node.write(kept)
    node.docker = Docker(NEW, OLD)
    assert node.reasons(kept, monkeypatch) == []
    # As `start` does, and a deploy that had something else to do.
    assert node.write(kept) == fingerprint
    assert node.missing(kept) == []


def test_a_way_back_finds_what_it_ran_before(node: Node) -> None:
    before, after = node.slice(), node.slice(context_length=4096)
    fingerprint = node.write(before)
    # Another one was brought under the same name.
    node.docker = Docker(NEW, OLD)
    node.record(NEW)
    node.write(after)
    assert (node.image_of(before), node.image_of(after)) == (OLD, NEW)
    assert node.write(before) == fingerprint
    assert node.image_of(before) == OLD


def test_a_new_release_is_made_of_the_image_that_was_brought(node: Node) -> None:
    node.record(OLD)
    node.docker = Docker(NEW, OLD)
    first, second = node.slice(), node.slice(context_length=4096)
    node.write(first)
    assert node.image_of(first) == OLD
    # Only once it is gone the one under the name counts.
    node.docker = Docker(NEW)
    node.write(second)
    assert node.image_of(second) == NEW


def test_an_image_that_is_gone_is_a_difference_and_keeps_from_going_back(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = node.slice()
    fingerprint = node.write(kept)
    node.docker = Docker(NEW)
    assert node.reasons(kept, monkeypatch) == [f"image {IMAGE} (sha256:aaaaaaaaaaaa): is not there"]
    assert node.missing(kept) == [f"image {IMAGE} (sha256:aaaaaaaaaaaa)"]
    # A deploy puts it right.
    assert node.write(kept) != fingerprint
    assert node.reasons(kept, monkeypatch) == []
    assert node.image_of(kept) == NEW


def test_another_image_in_the_plan_is_a_difference(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, other = node.slice(), node.slice(image=f"{IMAGE}-1")
    node.write(kept)
    assert node.reasons(other, monkeypatch) == [
        f"release: {kept['plan_id']} is current, {other['plan_id']} is wanted",
        f"image {IMAGE}-1: is not there",
    ]


def test_a_release_by_its_tag_is_left_as_it_is(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `start` and `rollback` of an earlier version wrote it."""
    kept = node.slice()
    fingerprint = node.write(kept, by_name=True)
    assert node.image_of(kept) == IMAGE
    assert node.reasons(kept, monkeypatch) == []
    node.record(OLD)
    assert node.write(kept) == fingerprint


def test_a_run_script_that_was_changed_is_made_of_what_was_brought(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = node.slice()
    fingerprint = node.write(kept)
    node.record(OLD)
    script = Path(node.path, "releases", kept["plan_id"], kept["node"]["processes"][0]["name"], "run")
    text = script.read_text()
    for changed in ("#!/bin/sh\n", text.replace(OLD, NEW), text.replace(OLD, "other:1")):
        script.chmod(0o700)
        script.write_text(changed)
        (reason,) = node.reasons(kept, monkeypatch)[:1]
        assert reason == f"release: files differ from what they are made of: {script.parent.name}/run"
        assert node.write(kept) == fingerprint


def test_a_check_of_a_fresh_node_has_the_name(node: Node) -> None:
    (process,) = node.processes(node.slice())
    for images in (release_images.Images(Docker()), None):
        (foreseen,) = release_images.with_ids(node.path, "p", [process], images)
        assert foreseen["argv"] == process["argv"]
        assert IMAGE in foreseen["argv"]


def test_a_docker_that_does_not_answer_is_told_and_asked_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = node.slice(), node.slice(context_length=4096)
    node.write(first)
    node.write(second)
    node.docker.silent, node.docker.asked = True, 0
    fault = "Docker does not answer at /nowhere"
    assert node.missing(first) == [f"image that can be run: {fault}"]
    assert node.docker.asked == 1
    assert node.reasons(second, monkeypatch) == [fault]
    with pytest.raises(engine_image.ImageError, match=fault):
        node.write(second)


def test_only_a_check_goes_on_without_docker(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (process,) = node.processes(node.slice())
    node.docker.silent = True
    monkeypatch.setattr(engine_image, "Docker", lambda: node.docker)
    given = SimpleNamespace(check_mode=True, params={"path": node.path, "plan_id": "p"})
    assert release_module.with_ids(given, [process])[0]["argv"] == process["argv"]
    given.check_mode = False
    with pytest.raises(engine_image.ImageError, match="Docker does not answer"):
        release_module.with_ids(given, [process])


def test_a_container_that_no_process_has_is_a_difference(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = node.slice()
    node.write(kept)
    node.docker.running = ["stray", "step3-vllm-0"]
    assert node.reasons(kept, monkeypatch) == ["container stray: the plan has no such process"]


def test_docker_is_not_asked_for_environments(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = node.slice()
    for process in kept["node"]["processes"]:
        process["image"] = None
    node.docker.silent = True
    node.write(kept)
    assert node.reasons(kept, monkeypatch) == []
    assert node.missing(kept) == []
    assert node.docker.asked == 0


def test_who_writes_a_release_and_who_compares_it_say_the_same(tmp_path: Path) -> None:
    """The roles' own tasks: a container's command and launcher are no other in the look than in what is written."""
    node = Node(tmp_path)
    kept = node.slice()
    tasks = ROOT / "roles/release/tasks"
    environment = NativeEnvironment()
    environment.filters["stepladder.core.release_processes"] = release_processes
    found = []
    for file, module in (("main.yml", "release"), ("state.yml", "node_state")):
        task = next(one for one in yaml.safe_load((tasks / file).read_text()) if f"stepladder.core.{module}" in one)
        values = {
            "deployment_slice": kept, "release_wanted": kept, "release_launcher": [], "__release_path": node.path,
        }  # fmt: skip
        text = task[f"stepladder.core.{module}"]["processes"]
        found.append(environment.from_string(text).render(values))
    assert found[0] == found[1]
    assert found[0][0]["launcher"][-2:] == ["step3-vllm-0", f"{node.path}/containers/vllm-0.id"]
