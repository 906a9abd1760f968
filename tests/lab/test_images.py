"""A real Docker and a real registry: what comes under a tag, what stays, what is said when it is gone. Nothing runs."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_image as ei
from real_lab import RealLab
from registry import Registry, why_not
from rehearsal_images import run

from stepladder.lab import engine
from stepladder.lab.places import places

NAME = "rehearsal/tiny:1"

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def command(lab: RealLab) -> list[str]:
    """How the engine that the lab runs on is called."""
    found = engine.find(places(lab.environ, Path.home()))
    assert found is not None
    return found.command()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if reason := why_not():
        pytest.skip(f"this machine lacks {reason}")
    with Registry(tmp_path_factory.mktemp("registry"), "127.0.0.1") as served:
        yield served


@pytest.fixture
def docker(command: list[str], registry: Registry, tmp_path: Path) -> Iterator[ei.Docker]:
    yield ei.Docker(command[2].removeprefix("unix://"), tmp_path)
    images = run([*command, "images", "--quiet", "--filter", f"reference={registry.host}/*/*"]).split()
    for image in dict.fromkeys(images):
        run([*command, "rmi", "--force", image])


def pushed(command: list[str], registry: Registry, content: bytes) -> str:
    """An image of one file in the registry, and not in Docker; returns its name there."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("content")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    made = subprocess.run([*command, "import", "-"], input=packed.getvalue(), capture_output=True, check=True)
    image = made.stdout.decode().strip()
    name = registry.push(command, image, NAME)
    run([*command, "rmi", "--force", image])
    return name


def wanted(name: str, folder: Path, archive: str = "") -> ei.Wanted:
    return ei.Wanted(name, archive, "", "", ("rehearsal/tiny:0",), 0, folder / "record.json")


def test_a_tag_that_moves_brings_nothing_new_until_it_is_asked_for(
    command: list[str], registry: Registry, docker: ei.Docker, tmp_path: Path
) -> None:
    name = pushed(command, registry, b"first")
    said: list[str] = []
    first = ei.bring(docker, wanted(name, tmp_path), said.append)
    assert first["digest"] == docker.resolve(ei.parse(name))
    # Of a layer that is there at once Docker tells no bytes.
    assert said[-1].startswith(f"{name}: ")
    assert said[-1].endswith(" 1 of 1 layers there")
    pushed_again = pushed(command, registry, b"second")
    assert pushed_again == name
    found = docker.look(name)
    assert found is not None
    assert ei.is_wanted(found, ei.parse(name), first), "what lies there is the wanted one, wherever the tag is"
    # By digest the one or the other is meant, and nothing else.
    second = docker.resolve(ei.parse(name))
    assert second != first["digest"]
    assert not ei.is_wanted(found, ei.parse(f"{name}@{second}"), first)
    other = ei.bring(docker, wanted(f"{name}@{second}", tmp_path), said.append)
    assert other["id"] != first["id"]
    assert docker.look(first["id"]) is not None, "the way back is gone"


def test_a_tag_that_is_gone(command: list[str], registry: Registry, docker: ei.Docker, tmp_path: Path) -> None:
    name = pushed(command, registry, b"there").replace(":1", ":9")
    with pytest.raises(
        ei.ImageError, match=r"has no image .*:9 \(manifest unknown.* The catalogue knows: rehearsal/tiny:0"
    ):
        ei.bring(docker, wanted(name, tmp_path), lambda _: None)


def test_an_archive_needs_no_registry(
    command: list[str], registry: Registry, docker: ei.Docker, tmp_path: Path
) -> None:
    name = pushed(command, registry, b"carried in")
    first = ei.bring(docker, wanted(name, tmp_path), lambda _: None)
    archive = tmp_path / "image.tar"
    run([*command, "save", "-o", str(archive), name])
    run([*command, "rmi", "--force", first["id"]])
    assert docker.look(name) is None
    again = ei.bring(docker, wanted(name, tmp_path, str(archive)), lambda _: None)
    assert (again["id"], again["from"]) == (first["id"], str(archive))
    archive.write_bytes(b"no archive")
    with pytest.raises(ei.ImageError, match=r"is not an archive of 'docker save' that Docker can load"):
        ei.bring(docker, wanted(name, tmp_path, str(archive)), lambda _: None)
