"""Images of engines: their names, what is wanted of one that lies there, progress, and a Docker that answers badly."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_image as ei
from ansible_collections.stepladder.core.plugins.modules import engine_image as engine_image_module

DIGEST, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest", "local"),
    [
        ("vllm/vllm-openai:v0.33.0", "docker.io", "vllm/vllm-openai", "v0.33.0", "", "vllm/vllm-openai:v0.33.0"),
        ("debian:12", "docker.io", "library/debian", "12", "", "debian:12"),
        ("198.18.0.1:5000/a/b:1", "198.18.0.1:5000", "a/b", "1", "", "198.18.0.1:5000/a/b:1"),
        ("localhost/a:1", "localhost", "a", "1", "", "localhost/a:1"),
        (f"a/b:1@{DIGEST}", "docker.io", "a/b", "1", DIGEST, "a/b:1"),
        (f"reg.example/a@{DIGEST}", "reg.example", "a", "", DIGEST, "reg.example/a:sha256-aaaaaaaaaaaa"),
    ],
)
def test_a_name_is_taken_apart_as_docker_does(
    text: str, registry: str, repository: str, tag: str, digest: str, local: str
) -> None:
    found = ei.parse(text)
    assert (found.registry, found.repository, found.tag, found.digest, found.local) == (
        registry, repository, tag, digest, local,
    )  # fmt: skip


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(ei.ImageError, match=r"'a@b@c' is not the name of an image"):
        ei.parse("a@b@c")


@pytest.mark.parametrize(
    ("found", "wanted", "record", "stays"),
    [
        (None, "a/b:1", {}, False),
        (ei.Local("sha256:1"), "a/b:1", {}, True),
        (ei.Local("sha256:1", (DIGEST,)), f"a/b:1@{DIGEST}", {}, True),
        (ei.Local("sha256:1", (OTHER,)), f"a/b:1@{DIGEST}", {}, False),
        # From an archive or a peer: the registry's digest is known from what was written down.
        (ei.Local("sha256:1"), f"a/b:1@{DIGEST}", {"id": "sha256:1", "digest": DIGEST}, True),
        (ei.Local("sha256:2"), f"a/b:1@{DIGEST}", {"id": "sha256:1", "digest": DIGEST}, False),
    ],
)
def test_what_lies_there_stays_where_it_is_the_wanted_one(
    found: ei.Local | None, wanted: str, record: dict[str, Any], stays: bool
) -> None:
    assert ei.is_wanted(found, ei.parse(wanted), record) is stays


def test_progress_of_a_pull() -> None:
    layers = ei.Layers()
    for event in (
        {"status": "Pulling from a/b", "id": "1"},
        {"status": "Pulling fs layer", "id": "x"},
        {"status": "Already exists", "id": "y"},
        {"status": "Downloading", "id": "x", "progressDetail": {"current": 1_500_000_000, "total": 4_000_000_000}},
    ):
        layers.take(event)
    assert str(layers) == "1.50 of 4.00 GB fetched, 1 of 2 layers there"
    layers.take({"status": "Download complete", "id": "x"})
    layers.take({"status": "Pull complete", "id": "x"})
    assert str(layers) == "4.00 of 4.00 GB fetched, 2 of 2 layers there"


def test_a_tag_that_is_gone_names_those_of_the_catalogue() -> None:
    text = ei.gone_text(ei.parse("a/b:2"), "manifest unknown", ["a/b:1", "a/b:2"], ["1", "0"])
    assert text == (
        "docker.io has no image a/b:2 (manifest unknown). The catalogue knows: a/b:1. The registry has the tags 0, 1. "
        "Choose one with deployment_engine_version or deployment_image, or bring it with engine_image_archive."
    )


@pytest.mark.parametrize(
    ("complaint", "gone"),
    [
        ("manifest for a/b:2 not found: manifest unknown: manifest unknown", True),
        ("pull access denied for a/b, repository does not exist or may require 'docker login'", True),
        ("Get https://reg.example/v2/: dial tcp 198.18.0.1:443: connect: connection refused", False),
        ("x509: certificate signed by unknown authority", False),
    ],
)
def test_gone_is_told_from_not_reached(complaint: str, gone: bool) -> None:
    assert ei.is_gone(complaint) is gone


@pytest.mark.parametrize(
    ("complaint", "mend"),
    [
        ("toomanyrequests: You have reached your unauthenticated pull rate limit", "gives no more for now. Run again"),
        ("Head https://reg.example/v2/a/manifests/1: no basic auth credentials", "wants a login"),
        ("denied: requested access to the resource is denied\nunauthorized: authentication required", "a login"),
        ("pull access denied for a, repository does not exist or may require 'docker login'", "If those who"),
    ],
)
def test_a_registry_that_wants_another_asker_is_told_from_one_that_is_not_reached(
    docker: ei.Docker, complaint: str, mend: str
) -> None:
    for name, command in (("reg.example/a:1", "docker login reg.example,"), ("a/b:1", "docker login,")):
        said = str(docker.refusal(ei.parse(name), complaint, []))
        assert mend in said
        assert f"{command} as root on this node" in said
        assert "reached from here" not in said


def test_a_proxys_password_in_dockers_complaint_is_hidden(docker: ei.Docker) -> None:
    said = 'Get "https://registry-1.docker.io/v2/": invalid proxy address "http://me:hunter2@proxy:port": invalid port'
    text = str(docker.refusal(ei.parse("a/b:1"), said, []))
    assert "http://***@proxy:port" in text
    assert "hunter2" not in text


def test_a_refusal_of_the_machine_s_own_is_none_of_the_registry_s(docker: ei.Docker) -> None:
    said = str(docker.refusal(ei.parse("a/b:1"), "mkdir /data/docker/tmp: permission denied", []))
    assert "login" not in said


SNAPSHOTTER = [["driver-type", "io.containerd.snapshotter.v1"]]


@pytest.mark.parametrize(
    ("info", "settings", "folder"),
    [
        ({"DockerRootDir": "/data/docker", "DriverStatus": [["Backing Filesystem", "extfs"]]}, "", "/data/docker"),
        ({"DockerRootDir": "/data/docker", "DriverStatus": SNAPSHOTTER}, None, "/var/lib/containerd"),
        ({"DriverStatus": SNAPSHOTTER}, 'version = 2\n#root = "/a"\nroot = "/big"\n[grpc]\nroot = "/b"\n', "/big"),
        ({"DriverStatus": SNAPSHOTTER}, '[plugins]\nroot = "/b"\n', "/var/lib/containerd"),
        (
            {
                "DockerRootDir": "/data/docker",
                "DriverStatus": SNAPSHOTTER,
                "Containerd": {"Address": "/run/docker/containerd/containerd.sock"},
            },
            "",
            "/data/docker",
        ),
    ],
    ids=["graph driver", "containerd's store", "with a root of its own", "another section's", "Docker's containerd"],
)
def test_where_images_lie(tmp_path: Path, info: dict[str, Any], settings: str | None, folder: str) -> None:
    config = tmp_path / "config.toml"
    if settings is not None:
        config.write_text(settings)
    assert ei.store_folder(info, config) == folder


def test_no_space_says_how_much() -> None:
    assert not ei.space_text("/var/lib/docker", 10, 10, "a/b:1")
    assert ei.space_text("/var/lib/docker", int(3e9), int(13e9), "a/b:1") == (
        "/var/lib/docker has 3.0 GB free, and a/b:1 takes 13.0 GB. Free 10.0 GB there (docker system df; docker image "
        "prune), or give Docker a larger disk with container_runtime_data_root."
    )


class Answers(http.server.BaseHTTPRequestHandler):
    """A Docker that answers what a test wants: by method and path status, and lines of JSON."""

    table: ClassVar[dict[str, tuple[int, list[Any]]]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.asked.append((f"{self.command} {self.path}", self.headers.get("X-Registry-Auth")))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, lines = self.table.get(f"{self.command} {self.path.partition('?')[0]}", (404, [{"message": "no such"}]))
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[ei.Docker]:
    Answers.table, Answers.asked = {}, []
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "s"), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ei.Docker(str(tmp_path / "s"), tmp_path)
        server.shutdown()


def wanted(tmp_path: Path, **changed: Any) -> ei.Wanted:
    given = {
        "name": "a/b:1",
        "archive": "",
        "through": "",
        "digest": "",
        "known": ("a/b:0",),
        "needed": 0,
        "record": tmp_path / "r",
    }
    return ei.Wanted(**(given | changed))


def lies_there(digest: str = DIGEST) -> tuple[int, list[dict[str, Any]]]:
    return 200, [{"Id": "sha256:1", "RepoDigests": [f"a/b@{digest}"], "Size": 7}]


def test_a_tag_is_pulled_by_the_digest_that_the_registry_has(docker: ei.Docker, tmp_path: Path) -> None:
    Answers.table = {
        "GET /info": (200, [{"DockerRootDir": str(tmp_path)}]),
        "GET /distribution/a%2Fb%3A1/json": (200, [{"Descriptor": {"digest": DIGEST}}]),
        "POST /images/create": (200, [{"status": "Pull complete", "id": "x"}]),
        f"POST /images/a%2Fb%40{DIGEST.replace(':', '%3A')}/tag": (201, []),
        "GET /images/a%2Fb%3A1/json": lies_there(),
    }
    said: list[str] = []
    record = ei.bring(docker, wanted(tmp_path), said.append)
    assert (record["id"], record["digest"], record["from"]) == ("sha256:1", DIGEST, "docker.io")
    assert said == ["a/b:1: 1 of 1 layers there"]
    asked = [path for path, _ in Answers.asked]
    assert f"POST /images/create?fromImage=a%2Fb%40{DIGEST.replace(':', '%3A')}" in asked


def test_through_a_peer_the_same_digest_comes_and_no_name_of_the_peer_stays(docker: ei.Docker, tmp_path: Path) -> None:
    copy = f"127.0.0.1%3A5055%2Fa%2Fb%40{DIGEST.replace(':', '%3A')}"
    Answers.table = {
        "GET /info": (200, [{"DockerRootDir": str(tmp_path)}]),
        "POST /images/create": (200, []),
        f"POST /images/{copy}/tag": (201, []),
        f"DELETE /images/{copy}": (200, []),
        "GET /images/a%2Fb%3A1/json": lies_there(),
    }
    record = ei.bring(docker, wanted(tmp_path, name=f"a/b:1@{DIGEST}", through="127.0.0.1:5055"), lambda _: None)
    assert (record["digest"], record["from"]) == (DIGEST, "127.0.0.1:5055")
    assert not [path for path, _ in Answers.asked if "/distribution/" in path], "the registry itself was asked"
    assert f"DELETE /images/{copy}" in [path for path, _ in Answers.asked]


def test_an_error_in_the_middle_of_a_pull_is_one(docker: ei.Docker, tmp_path: Path) -> None:
    Answers.table = {"POST /images/create": (200, [{"status": "Downloading", "id": "x"}, {"error": "unexpected EOF"}])}
    with pytest.raises(ei.ImageError, match=r"a/b:1 cannot be pulled: unexpected EOF. Is docker.io reached from here"):
        docker.pull(f"a/b@{DIGEST}", ei.parse("a/b:1"), [], lambda _: None)


def test_a_name_that_the_registry_has_not(docker: ei.Docker) -> None:
    Answers.table = {"GET /distribution/a%2Fb%3A1/json": (404, [{"message": "manifest unknown: manifest unknown"}])}
    with pytest.raises(ei.ImageError, match=r"has no image a/b:1 .* The catalogue knows: a/b:0"):
        docker.resolve(ei.parse("a/b:1"), ["a/b:0"])


@pytest.mark.parametrize(
    ("said", "brought", "fault"),
    [
        ([{"stream": "Loaded image: a/b:1\n"}], ["a/b:1"], ""),
        ([{"stream": "Loaded image ID: sha256:9\n"}], ["sha256:9"], ""),
        ([{"error": "invalid tar header"}], [], "is not an archive of 'docker save' that Docker can load: invalid tar"),
    ],
)
def test_an_archive(docker: ei.Docker, tmp_path: Path, said: list[Any], brought: list[str], fault: str) -> None:
    Answers.table = {"POST /images/load": (200, said)}
    archive = tmp_path / "a.tar"
    archive.write_bytes(b"x" * 100)
    if fault:
        with pytest.raises(ei.ImageError, match=fault):
            docker.load(archive, lambda _: None)
    else:
        assert docker.load(archive, lambda _: None) == brought


def test_why_docker_took_no_more_of_an_archive(tmp_path: Path) -> None:
    path, archive = tmp_path / "s", tmp_path / "a.tar"
    archive.write_bytes(b"x" * 4 * ei.BLOCK)
    body = b'{"error": "write /data/layer.tar: no space left on device"}\n'

    def full(server: socket.socket) -> None:
        wire, _ = server.accept()
        wire.recv(4096)
        wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        wire.close()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        threading.Thread(target=full, args=(server,), daemon=True).start()
        with pytest.raises(ei.ImageError, match=r"a.tar cannot be loaded: .* no space left on device. Free space"):
            ei.Docker(str(path), tmp_path).load(archive, lambda _: None)


@pytest.mark.parametrize(("installed", "kept"), [(True, True), (False, False)], ids=["silent", "gone"])
def test_an_image_is_not_forgotten_while_its_docker_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, kept: bool
) -> None:
    record = tmp_path / "a_b_1.json"
    record.write_text("{}")
    monkeypatch.setattr(ei, "is_installed", lambda: installed)
    given = SimpleNamespace(params={"name": "a/b:1", "record": str(record)}, check_mode=False)
    with pytest.raises(ei.ImageError, match="Docker does not answer") if kept else contextlib.nullcontext():
        engine_image_module.absent(given, ei.Docker(str(tmp_path / "none"), tmp_path))
    assert record.exists() is kept


def test_credentials_are_those_of_docker_login(docker: ei.Docker, tmp_path: Path) -> None:
    auths = {"reg.example": {"auth": "dXNlcjpzZWNyZXQ="}}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    docker.resolve(ei.parse(f"reg.example/a@{DIGEST}"))
    with pytest.raises(ei.ImageError):
        docker.resolve(ei.parse("reg.example/a:1"))
    with pytest.raises(ei.ImageError):
        docker.resolve(ei.parse("other.example/a:1"))
    headers = [header for _, header in Answers.asked]
    assert headers[0] is not None
    assert headers[1] is None, "another registry was sent the credentials"


@pytest.mark.parametrize("helper", [False, True], ids=["in the file", "by a helper"])
def test_a_registry_that_gave_a_token_for_the_password_gets_it_back(
    docker: ei.Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: bool
) -> None:
    """As Docker's own client keeps what registries of Azure answer to `docker login`."""
    kept: dict[str, Any] = {"auths": {"reg.example": {"auth": "dXNlcjo=", "identitytoken": "refresh"}}}
    if helper:
        kept = {"credHelpers": {"reg.example": "some"}}
        told = json.dumps({"Username": "<token>", "Secret": "refresh"})
        (tmp_path / "docker-credential-some").write_text(f"#!/bin/sh\necho '{told}'\n")
        (tmp_path / "docker-credential-some").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (header,) = docker.auth("reg.example").values()
    assert json.loads(base64.urlsafe_b64decode(header)) == {"identitytoken": "refresh", "serveraddress": "reg.example"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, "sha256:2"),
        ({"id": "sha256:1"}, "sha256:1"),
        ({"id": "sha256:0"}, "sha256:2"),
        ({"id": "sha256:2"}, "sha256:2"),
    ],
    ids=["not brought by the toolkit", "moved since", "moved, and the old one is gone", "as it was brought"],
)
def test_the_image_that_was_brought_stays_the_one(docker: ei.Docker, record: dict[str, Any], expected: str) -> None:
    Answers.table = {"GET /images/sha256%3A1/json": lies_there()}
    assert ei.recorded_of(docker, ei.Local("sha256:2"), record).id == expected


def test_the_digest_of_an_image_is_that_of_its_own_repository(docker: ei.Docker) -> None:
    sources = [f"mirror.example/a/b@{OTHER}", f"a/b@{DIGEST}"]
    Answers.table = {"GET /images/a%2Fb%3A1/json": (200, [{"Id": "sha256:1", "RepoDigests": sources}])}
    found = docker.look("a/b:1")
    assert found is not None
    assert found.digest_in(ei.parse("a/b:1")) == DIGEST
    assert found.digest_in(ei.parse("mirror.example/a/b:1")) == OTHER
    assert found.digest_in(ei.parse("other.example/a/b:1")) == ""


def test_containers_by_their_label(docker: ei.Docker) -> None:
    Answers.table = {"GET /containers/json": (200, [[{"Names": ["/stray"]}, {"Names": ["/d-vllm-0"]}]])}
    assert docker.containers("stepladder.deployment=/d") == ["stray", "d-vllm-0"]
    ((asked, _),) = Answers.asked
    assert asked.endswith("?all=1&filters=%7B%22label%22%3A+%5B%22stepladder.deployment%3D%2Fd%22%5D%7D")
    Answers.table = {"GET /containers/json": (500, [{"message": "no"}])}
    with pytest.raises(ei.ImageError, match="Docker does not tell its containers: no"):
        docker.containers("a=b")


def test_no_docker_says_who_brings_it(tmp_path: Path) -> None:
    with pytest.raises(
        ei.ImageError, match=r"Docker does not answer at .*/none: No such file or directory. See systemctl"
    ):
        ei.Docker(str(tmp_path / "none"), tmp_path).look("a")
