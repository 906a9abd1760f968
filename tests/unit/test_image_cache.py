"""The copy of a registry that an image is spread from: its settings, its commands, and what it is filled with."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_image
from ansible_collections.stepladder.core.plugins.module_utils import image_cache as ic
from ansible_collections.stepladder.core.plugins.module_utils.docker_settings import proxy_file
from ansible_collections.stepladder.core.plugins.modules import image_cache

from stepladder.catalogue import DEFAULT_DIRECTORY
from stepladder.contents import image_digest, image_seekers, known_images

HUB = "https://registry-1.docker.io"
# As Docker 20.10 says it of `insecure-registries: ["reg.example:5000", "198.18.7.0/24"]`, what is read of it.
CONFIG = {
    "InsecureRegistryCIDRs": ["198.18.7.0/24", "127.0.0.0/8"],
    "IndexConfigs": {"docker.io": {"Secure": True}, "reg.example:5000": {"Secure": False}},
    "Mirrors": ["https://mirror.example/", "https://other.example/"],
}


@pytest.mark.parametrize(
    ("registry", "config", "urls"),
    [
        ("docker.io", {}, [HUB]),
        ("docker.io", CONFIG, ["https://mirror.example", "https://other.example", HUB]),
        # Docker asks mirrors for images of its hub alone.
        ("198.18.8.1:5000", CONFIG, ["https://198.18.8.1:5000"]),
        ("reg.example:5000", CONFIG, ["https://reg.example:5000", "http://reg.example:5000"]),
        ("198.18.7.1:5000", CONFIG, ["https://198.18.7.1:5000", "http://198.18.7.1:5000"]),
        ("localhost:5000", CONFIG, ["https://localhost:5000", "http://localhost:5000"]),
    ],
)
def test_where_the_copy_may_get_what_it_lacks(registry: str, config: dict[str, Any], urls: list[str]) -> None:
    assert ic.remotes(registry, config) == urls


def test_proxies_are_read_as_they_are_written() -> None:
    given = {"https_proxy": 'http://u:p"q@198.18.0.9:3128', "no_proxy": "localhost,.example"}
    found = ic.proxy_variables(proxy_file(given))
    assert found == {
        name: value for key, value in given.items() for name, value in ((key, value), (key.upper(), value))
    }


class Registry(http.server.BaseHTTPRequestHandler):
    """A registry that is asked for `/v2/` and answers what its server says."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def registry(status: int) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        server.status = status  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_who_answers() -> None:
    """One that is silent has a deadline, one without TLS is told from one with it, and a login may be wanted."""
    with registry(200) as open_, registry(401) as closed, registry(502) as broken, socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        assert ic.silence(f"http://{open_}") == ic.silence(f"http://{closed}") == ""
        assert ic.silence(f"http://{broken}") == "answers 502"
        assert "SSL" in ic.silence(f"https://{open_}")
        begun = time.monotonic()
        assert "timed out" in ic.silence(f"http://127.0.0.1:{mute.getsockname()[1]}", 0.3)
        assert time.monotonic() - begun < 3
        port = mute.getsockname()[1]
    assert "refused" in ic.silence(f"http://127.0.0.1:{port}")


def test_credentials_stand_in_the_file_and_in_no_command() -> None:
    settings = ic.settings_text("198.18.0.1", 5055, "/x", "https://reg.example", ("user", "secret"))
    assert json.loads(settings)["proxy"] == {
        "remoteurl": "https://reg.example", "username": "user", "password": "secret",
    }  # fmt: skip
    assert "username" not in ic.settings_text("198.18.0.1", 5055, "/x", "https://reg.example", ("", ""))
    by_token = (ic.TOKEN_USER, "refresh")
    assert "refresh" not in ic.settings_text("198.18.0.1", 5055, "/x", "https://reg.example", by_token)
    assert "secret" not in " ".join(ic.cache_command("/usr/bin/docker-registry", "/run/c.yml", ""))


def test_a_copy_whose_deploy_was_killed_ends_and_takes_its_settings_with_it() -> None:
    command = ic.cache_command("/usr/bin/docker-registry", "/run/c.yml", "")
    assert "--property=RuntimeMaxSec=7200" in command
    assert "--property=ExecStopPost=/bin/rm -f /run/c.yml" in command


@pytest.mark.parametrize("starts", [True, False])
def test_the_login_lies_on_disk_only_while_the_copy_starts(
    starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd-run is a stand-in that notes what the copy could read."""
    seen, config = tmp_path / "seen", tmp_path / "image-cache.yml"
    for name, text in {
        "systemd-run": f"cp {config} {seen}; exit {0 if starts else 1}",
        "docker-registry": "true",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.suppress(ic.CacheError):
        ic.start_cache("secret", config, "", "127.0.0.1", server.getsockname()[1])
    assert seen.read_text() == "secret"
    assert not config.exists()


def test_the_authority_is_the_mirrors_own(tmp_path: Path) -> None:
    (tmp_path / "198.18.0.1:5000").mkdir()
    (tmp_path / "198.18.0.1:5000/ca.crt").touch()
    assert ic.authority_of("https://198.18.0.1:5000", tmp_path) == f"{tmp_path}/198.18.0.1:5000/ca.crt"
    assert ic.authority_of("https://other.example", tmp_path) == ""


def test_an_authority_is_trusted_by_file() -> None:
    authority = "/etc/docker/certs.d/198.18.0.1:5000/ca.crt"
    assert f"--setenv=SSL_CERT_FILE={authority}" in ic.cache_command("/r", "/c", authority)
    assert not [word for word in ic.cache_command("/r", "/c", "") if "SSL_CERT_FILE" in word]


INDEX = {
    "manifests": [
        {"digest": "sha256:att", "platform": {"os": "unknown", "architecture": "unknown"}},
        {"digest": "sha256:arm", "platform": {"os": "linux", "architecture": "arm64"}},
    ]
}


def test_the_manifest_of_the_machine() -> None:
    assert ic.child(INDEX, "aarch64") == "sha256:arm"
    with pytest.raises(ic.CacheError, match="not built for linux/amd64, but for unknown/unknown, linux/arm64"):
        ic.child(INDEX, "x86_64")


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Copy(http.server.BaseHTTPRequestHandler):
    """A copy that keeps what is asked for, whether or not the one who asked stays; `stuck` never comes."""

    bodies: ClassVar[dict[str, bytes]] = {}
    stuck: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []
    storage: ClassVar[Path]

    def do_GET(self) -> None:
        body, kind = self.bodies.get(self.path), self.path.split("/")[-2]
        self.asked.append(self.path.split("/")[-1])
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"none")))
        self.end_headers()
        if body is not None and kind == "blobs" and self.asked[-1] not in self.stuck:
            file = ic.kept(self.storage, self.asked[-1])
            file.parent.mkdir(parents=True)
            file.write_bytes(body)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body or b"none")

    def log_message(self, *arguments: object) -> None:
        pass


LAYERS = [b"a" * 100, b"b" * 50]


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[ic.Copy]:
    manifest: dict[str, Any] = {
        "config": {"digest": digest(b"{}"), "size": 2},
        # The same layer twice is fetched once.
        "layers": [{"digest": digest(layer), "size": len(layer)} for layer in [*LAYERS, LAYERS[0]]],
    }
    Copy.stuck, Copy.asked, Copy.storage = set(), [], tmp_path
    Copy.bodies = {f"/v2/a/b/blobs/{digest(data)}": data for data in [b"{}", *LAYERS]}
    Copy.bodies["/v2/a/b/manifests/sha256:m"] = json.dumps(manifest).encode()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Copy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ic.Copy("127.0.0.1", server.server_address[1], "a/b")
        server.shutdown()


def filled(monkeypatch: pytest.MonkeyPatch, copy: ic.Copy, tmp_path: Path, mirrors: list[str], has: str) -> Any:
    """The module's work, with a Docker that has mirrors and a copy that only one of them fills."""
    manifest = Copy.bodies.pop("/v2/a/b/manifests/sha256:m")

    def start(settings: str, *_: object) -> None:
        proxy = json.loads(settings)["proxy"]
        Copy.bodies |= {"/v2/a/b/manifests/sha256:m": manifest} if proxy["remoteurl"] == has else {}
        logins.append((proxy["remoteurl"], proxy.get("username", "")))

    logins: list[tuple[str, str]] = []
    docker = engine_image.Docker
    monkeypatch.setattr(docker, "info", lambda _: {"RegistryConfig": {"Mirrors": mirrors}})
    monkeypatch.setattr(docker, "login", lambda _, name: ("me", "secret") if name == "docker.io" else ("", ""))
    monkeypatch.setattr(ic, "start_cache", start)
    monkeypatch.setattr(ic, "stop_units", lambda: None)
    monkeypatch.setattr(ic, "HUB_URL", mirrors[0])
    given = {"address": copy.address, "port": copy.port, "name": "a/b:1", "digest": "sha256:m", "socket": "/none",
             "storage": str(tmp_path), "progress_file": None}  # fmt: skip
    return image_cache.filled(given), logins


def test_mirrors_are_asked_in_their_order_until_one_has_the_image(
    copy: ic.Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed, registry(200) as empty, registry(401) as good:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        mirrors = [dead, f"http://{empty}", f"http://{good}"]
        result, logins = filled(monkeypatch, copy, tmp_path, mirrors, mirrors[2])
        assert (result["remote"], result["bytes"]) == (mirrors[2], 152)
        assert [one.partition(": ")[0] for one in result["passed_over"]] == mirrors[:2]
        assert "Connection refused" in result["passed_over"][0]
        assert "404" in result["passed_over"][1]
        assert logins == [(mirrors[1], ""), (mirrors[2], "")], "the hub's login is sent to no mirror"
        with pytest.raises(ic.CacheError, match=r"nobody gives a/b:1 to the copy for all nodes: http://\S+: "):
            filled(monkeypatch, copy, tmp_path, mirrors, "nobody")


def test_every_piece_is_asked_for_once_and_a_rerun_asks_for_none(copy: ic.Copy, tmp_path: Path) -> None:
    said: list[str] = []
    assert ic.fill(copy, "sha256:m", tmp_path, said.append) == 152
    assert Copy.asked == ["sha256:m", *(digest(data) for data in [b"{}", *LAYERS])]
    assert said[-1] == "0.00 of 0.00 GB in the copy for all nodes"
    Copy.asked.clear()
    assert ic.fill(copy, "sha256:m", tmp_path, said.append) == 152
    assert Copy.asked == ["sha256:m"]


def test_a_piece_that_never_comes_ends_the_wait(copy: ic.Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ic, "STALLED_SECONDS", 0.3)
    Copy.stuck = {digest(LAYERS[1])}
    part = tmp_path / "docker/registry/v2/repositories/a/b/_uploads/1/data"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 25)
    with pytest.raises(
        ic.CacheError, match=r"sent nothing of sha256:\w+ for 0 s, after 25 of 50 bytes; see journalctl"
    ):
        ic.fill(copy, "sha256:m", tmp_path, lambda _: None)


def test_what_the_registry_has_not(copy: ic.Copy, tmp_path: Path) -> None:
    with pytest.raises(ic.CacheError, match="answers 404 to manifests/sha256:other"):
        ic.fill(copy, "sha256:other", tmp_path, lambda _: None)


def test_no_room_for_the_copy(copy: ic.Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(ic.CacheError, match="set engine_image_spread to false: then every node pulls for itself"):
        ic.fill(copy, "sha256:m", tmp_path, lambda _: None)
    # Another image's pieces spare none of this one's; what an earlier run brought of it counts as there.
    for each in (b"another", LAYERS[0]):
        piece = ic.kept(tmp_path, digest(each))
        piece.parent.mkdir(parents=True)
        piece.write_bytes(each * 100)
        if each == b"another":
            with pytest.raises(ic.CacheError, match="free, and the copy of a/b takes"):
                ic.fill(copy, "sha256:m", tmp_path, lambda _: None)
    assert ic.fill(copy, "sha256:m", tmp_path, lambda _: None) == 152


def test_the_first_that_lacks_the_image_gives_it_to_the_others() -> None:
    def host(changed: bool, image: str = "a/b:1") -> dict[str, Any]:
        return {"__engine_image_brought": {"changed": changed}, "deployment_slice": {"node": {"images": [image]}}}

    variables = {"n1": host(False), "n2": host(True), "n3": host(True), "n4": host(True, "a/b:2"), "n5": {}}
    assert image_seekers(variables, list(variables), "a/b:1") == ["n2", "n3"]


@pytest.mark.parametrize(
    ("found", "digest"),
    [
        # The name was moved since the first node got it.
        ([(False, "sha256:old"), (True, "sha256:new")], "sha256:old"),
        ([(True, "sha256:new"), (False, "sha256:old")], "sha256:old"),
        # From an archive: no registry's digest is known.
        ([(False, ""), (True, "sha256:new")], "sha256:new"),
        ([(True, "sha256:new"), (True, "sha256:new")], "sha256:new"),
        ([(True, "")], ""),
    ],
)
def test_nodes_that_lack_an_image_get_the_one_that_others_have(found: list[tuple[bool, str]], digest: str) -> None:
    variables = {
        f"n{i}": {
            "__engine_image_brought": {"changed": changed, "digest": known},
            "deployment_slice": {"node": {"images": ["a/b:1"]}},
        }
        for i, (changed, known) in enumerate(found)
    }
    variables["other"] = {
        "__engine_image_brought": {"changed": False, "digest": "sha256:other"},
        "deployment_slice": {"node": {"images": ["a/b:2"]}},
    }
    assert image_digest(variables, list(variables), "a/b:1") == digest


def test_what_the_catalogue_knows_of_an_engine() -> None:
    known = known_images({"engine": "sglang", "platform": "rocm"}, str(DEFAULT_DIRECTORY))
    assert known[0] == "lmsysorg/sglang:v0.5.23-rocm720-mi30x"
    assert len(known) == len(set(known)) == 4
