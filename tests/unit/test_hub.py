"""The hub, asked by ModelScope's own client and by plain HTTP."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import hub

MODEL = "stepfun-ai/Tiny-Model.1"
WEIGHTS = "model-00001-of-00001.safetensors"
FILES = {
    "config.json": b'{"architectures": ["Step3p5ForCausalLM"]}',
    WEIGHTS: random.Random(0).randbytes(5_000_000),
    "sub/deep/notes on it.txt": "a name with blanks, and ü".encode(),
    "empty.txt": b"",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "root" / MODEL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "root" / MODEL / ".git").mkdir()
    (tmp_path / "root" / MODEL / ".git" / "config").write_text("hidden")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "root"


@pytest.fixture
def served(root: Path) -> Iterator[hub.Hub]:
    with hub.serving(root, hub.Faults()) as running:
        yield running


def get(served: hub.Hub, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(served.url + path, method=method, headers=headers)
    response: http.client.HTTPResponse | urllib.error.HTTPError
    try:
        response = urllib.request.urlopen(request, timeout=5)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status or 0, dict(response.headers), response.read()


def get_file(served: hub.Hub, name: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return get(served, f"/api/v1/models/{MODEL}/repo?Revision=master&FilePath={quote(name, safe='')}", **headers)


def listed(served: hub.Hub, query: str = "Revision=master&Recursive=True") -> dict[str, dict[str, Any]]:
    status, _, body = get(served, f"/api/v1/models/{MODEL}/repo/files?{query}")
    assert status == 200
    return {entry["Path"]: entry for entry in json.loads(body)["Data"]["Files"]}


class TestClient:
    """The client as it is published, unchanged."""

    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def download(self, served: hub.Hub, target: Path, model: str = MODEL, **more: str) -> None:
        client = pytest.importorskip("modelscope", reason="ModelScope's client is not installed")
        client.snapshot_download(model, local_dir=str(target), endpoint=served.url, **more)

    def content(self, target: Path) -> dict[str, bytes]:
        return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}

    def test_whole_download_is_equal(self, served: hub.Hub, tmp_path: Path) -> None:
        self.download(served, tmp_path / "got")
        assert self.content(tmp_path / "got") == FILES
        assert served.bytes_sent == {f"{MODEL}/{name}": len(content) for name, content in FILES.items() if content}

    def test_second_download_fetches_nothing(self, served: hub.Hub, tmp_path: Path) -> None:
        self.download(served, tmp_path / "got")
        served.bytes_sent.clear()
        self.download(served, tmp_path / "got")
        assert not served.bytes_sent

    def test_a_selected_file_comes_alone(self, served: hub.Hub, tmp_path: Path) -> None:
        self.download(served, tmp_path / "got", allow_patterns="sub/*")
        assert list(self.content(tmp_path / "got")) == ["sub/deep/notes on it.txt"]

    def test_a_cut_in_mid_file_is_resumed(
        self, served: hub.Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        served.faults.cut(f"{MODEL}/{WEIGHTS}", after_bytes=3_000_000)
        self.download(served, tmp_path / "got")
        assert self.content(tmp_path / "got") == FILES
        resumed = re.findall(rf"FilePath={WEIGHTS} .* range=bytes=(\d+)- status=206", capsys.readouterr().out)
        assert len(resumed) == 1
        assert 1_000_000 < int(resumed[0]) <= 3_000_000
        assert served.bytes_sent[f"{MODEL}/{WEIGHTS}"] == 3_000_000 + 5_000_000 - int(resumed[0])

    def test_a_flipped_byte_is_caught_and_fetched_again(self, served: hub.Hub, tmp_path: Path) -> None:
        served.faults.flip(f"{MODEL}/{WEIGHTS}", offset=4_000_000)
        self.download(served, tmp_path / "got")
        assert self.content(tmp_path / "got") == FILES
        assert served.bytes_sent[f"{MODEL}/{WEIGHTS}"] == 10_000_000
        assert served.bytes_sent[f"{MODEL}/config.json"] == len(FILES["config.json"])

    def test_a_hub_that_is_busy_for_a_moment_is_asked_again(self, served: hub.Hub, tmp_path: Path) -> None:
        served.faults.answer(503)
        self.download(served, tmp_path / "got")
        assert self.content(tmp_path / "got") == FILES

    def test_a_corrected_file_is_fetched_again_alone(self, served: hub.Hub, root: Path, tmp_path: Path) -> None:
        self.download(served, tmp_path / "got")
        served.bytes_sent.clear()
        (root / MODEL / "config.json").write_bytes(b"{}")
        self.download(served, tmp_path / "got")
        assert served.bytes_sent == {f"{MODEL}/config.json": 2}
        assert (tmp_path / "got" / "config.json").read_bytes() == b"{}"

    @pytest.mark.parametrize(
        ("model", "revision", "message"),
        [
            ("stepfun-ai/other", "master", "there is no model stepfun-ai/other on this hub"),
            (MODEL, "v2", f"{MODEL} has no revision 'v2', this hub serves 'master' only"),
        ],
    )
    def test_what_is_unknown_is_said(
        self, model: str, revision: str, message: str, served: hub.Hub, tmp_path: Path
    ) -> None:
        requests = pytest.importorskip("requests", reason="comes with ModelScope's client, which is not installed")
        with pytest.raises(requests.exceptions.HTTPError, match=re.escape(message)):
            self.download(served, tmp_path / "got", model, revision=revision)
        assert self.content(tmp_path / "got") == {}


def test_listing_tells_sizes_digests_and_folders(served: hub.Hub) -> None:
    entries = listed(served)
    assert {path: entry["Type"] for path, entry in entries.items()} == {
        **dict.fromkeys(FILES, "blob"),
        "sub": "tree",
        "sub/deep": "tree",
    }
    for name, content in FILES.items():
        assert (entries[name]["Size"], entries[name]["Sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert entries[name]["IsLFS"] == (name == WEIGHTS)
    assert entries["sub/deep/notes on it.txt"]["Name"] == "notes on it.txt"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Recursive=False", ["config.json", "empty.txt", WEIGHTS, "sub"]),
        ("Recursive=True&Root=sub", ["sub/deep", "sub/deep/notes on it.txt"]),
        ("Recursive=False&Root=sub", ["sub/deep"]),
        ("Recursive=True&Root=su", []),
    ],
)
def test_listing_of_a_part(query: str, expected: list[str], served: hub.Hub) -> None:
    assert list(listed(served, query)) == expected


def test_digest_is_worked_out_again_only_for_another_state_of_the_file(served: hub.Hub, root: Path) -> None:
    path = root / MODEL / "config.json"
    before = path.stat()
    first = listed(served)["config.json"]["Sha256"]
    changed = b"x" * before.st_size
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listed(served)["config.json"]["Sha256"] == first
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert listed(served)["config.json"]["Sha256"] == hashlib.sha256(changed).hexdigest()


@pytest.mark.parametrize(
    ("asked", "status", "part", "content_range"),
    [
        ("bytes=0-9", 206, slice(0, 10), "bytes 0-9/5000000"),
        ("bytes=4999990-", 206, slice(4_999_990, None), "bytes 4999990-4999999/5000000"),
        ("bytes=4999990-9999999", 206, slice(4_999_990, None), "bytes 4999990-4999999/5000000"),
        ("bytes=-10", 206, slice(-10, None), "bytes 4999990-4999999/5000000"),
        ("bytes=-9999999", 206, slice(None), "bytes 0-4999999/5000000"),
        ("bytes=9-3", 200, slice(None), None),
        ("bytes=-", 200, slice(None), None),
        ("bytes=0-1,5-6", 200, slice(None), None),
        ("lines=1-2", 200, slice(None), None),
    ],
)
def test_ranges(asked: str, status: int, part: slice, content_range: str | None, served: hub.Hub) -> None:
    got, headers, body = get_file(served, WEIGHTS, Range=asked)
    assert (got, headers.get("Content-Range")) == (status, content_range)
    assert body == FILES[WEIGHTS][part]
    assert headers["X-Linked-ETag"] == hashlib.sha256(FILES[WEIGHTS]).hexdigest()


def test_another_revision_has_its_own_files_and_an_unknown_one_is_said(served: hub.Hub, root: Path) -> None:
    folder = root / f"{MODEL}@v2"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"second")
    listed_files = listed(served, "Revision=v2&Recursive=True")
    assert list(listed_files) == ["config.json"]
    assert get(served, f"/api/v1/models/{MODEL}/repo?Revision=v2&FilePath=config.json")[2] == b"second"
    assert get(served, f"/{MODEL}/resolve/v2/config.json")[2] == b"second"
    assert "second" not in str(get_file(served, "config.json")[2])
    status, _, body = get(served, f"/api/v1/models/{MODEL}/repo/files?Revision=v3")
    assert (status, json.loads(body)["Message"]) == (
        404, f"{MODEL} has no revision 'v3', this hub serves 'master' and 'v2' only",
    )  # fmt: skip
    assert get(served, f"/api/models/{MODEL}/tree/v3")[0] == 404


def test_a_cut_breaks_the_connection_once(served: hub.Hub) -> None:
    served.faults.cut(f"{MODEL}/{WEIGHTS}", after_bytes=1000)
    # A connection that the client means to keep: were it left open, the client would wait for the rest.
    client = http.client.HTTPConnection("127.0.0.1", served.server_address[1], timeout=5)
    client.request("GET", f"/api/v1/models/{MODEL}/repo?FilePath={WEIGHTS}")
    with pytest.raises(http.client.IncompleteRead) as broken:
        client.getresponse().read()
    client.close()
    assert broken.value.partial == FILES[WEIGHTS][:1000]
    assert get_file(served, WEIGHTS)[2] == FILES[WEIGHTS]


def test_a_flip_changes_one_byte_once_and_only_where_it_is_asked_for(served: hub.Hub) -> None:
    served.faults.flip(f"{MODEL}/{WEIGHTS}", offset=1_500_000)
    assert get_file(served, WEIGHTS, Range="bytes=0-1499999")[2] == FILES[WEIGHTS][:1_500_000]
    body = get_file(served, WEIGHTS, Range="bytes=1000000-")[2]
    changed = [
        offset for offset, (got, true) in enumerate(zip(body, FILES[WEIGHTS][1_000_000:], strict=True)) if got != true
    ]
    assert changed == [500_000]
    assert get_file(served, WEIGHTS)[2] == FILES[WEIGHTS]


@pytest.mark.parametrize(
    ("name", "asked", "total"), [(WEIGHTS, "bytes=5000000-", 5_000_000), (WEIGHTS, "bytes=-0", 5_000_000)]
)
def test_a_range_beyond_the_end_is_refused(name: str, asked: str, total: int, served: hub.Hub) -> None:
    status, headers, body = get_file(served, name, Range=asked)
    assert (status, headers["Content-Range"]) == (416, f"bytes */{total}")
    assert json.loads(body)["Message"] == f"{asked} is beyond {total} bytes"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"/api/v1/models/{MODEL}/repo?FilePath=nothing.bin", f"there is no file 'nothing.bin' in {MODEL}"),
        (f"/api/v1/models/{MODEL}/repo", f"there is no file '' in {MODEL}"),
        (f"/api/v1/models/{MODEL}/repo?FilePath=sub", f"there is no file 'sub' in {MODEL}"),
        ("/api/v1/models/a/b/repo/files", "there is no model a/b on this hub"),
        ("/api/v1/models/a/b", "there is no model a/b on this hub"),
        ("/api/v1/datasets/a/b/repo/tree", "this hub does not know /api/v1/datasets/a/b/repo/tree"),
        ("/", "this hub does not know /"),
    ],
)
def test_what_is_not_there(path: str, message: str, served: hub.Hub) -> None:
    status, headers, body = get(served, path)
    assert status == 404
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"Code": 10010205001, "Message": message, "Success": False}


@pytest.mark.parametrize(
    "path",
    [
        f"/api/v1/models/{MODEL}/repo?FilePath=../../../secret.txt",
        f"/api/v1/models/{MODEL}/repo?FilePath=sub/../../../../secret.txt",
        f"/api/v1/models/{MODEL}/repo?FilePath=..%2F..%2F..%2Fsecret.txt",
        f"/api/v1/models/{MODEL}/repo?FilePath=%2Fetc%2Fpasswd",
        f"/api/v1/models/{MODEL}/repo?FilePath=link.txt",
        f"/api/v1/models/{MODEL}/repo?FilePath=.git/config",
        "/api/v1/models/../root/repo?FilePath=secret.txt",
        "/api/v1/models/%2e%2e/%2e%2e/repo?FilePath=secret.txt",
        "/api/v1/models/stepfun-ai/../repo?FilePath=secret.txt",
        "/api/v1/models/stepfun-ai/.hidden/repo?FilePath=config.json",
        f"/{MODEL}/config.json",
        "/../secret.txt",
    ],
)
def test_nothing_outside_a_model_is_served(path: str, served: hub.Hub, root: Path) -> None:
    (root / MODEL / "link.txt").symlink_to(root.parent / "secret.txt")
    (root / "stepfun-ai" / ".hidden").mkdir()
    (root / "stepfun-ai" / ".hidden" / "config.json").write_text("secret")
    status, _, body = get(served, path)
    assert status == 404
    assert b'"Success": false' in body
    assert set(listed(served)) == {*FILES, "sub", "sub/deep"}


def test_head_tells_the_size_and_sends_nothing(served: hub.Hub) -> None:
    status, headers, body = get(served, f"/api/v1/models/{MODEL}/repo?FilePath={WEIGHTS}", method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, "5000000", b"")
    assert not served.bytes_sent


def test_healthz_is_ok_even_while_other_requests_fail(served: hub.Hub) -> None:
    served.faults.answer(500, requests=1)
    assert get(served, "/healthz")[::2] == (200, b"ok")
    assert get(served, "/api/v1/repos/internalAccelerationInfo")[0] == 500
    status, _, body = get(served, "/api/v1/repos/internalAccelerationInfo")
    assert (status, json.loads(body)["Data"]) == (200, {"InternalRegionQueryAddress": ""})


def test_each_request_is_one_line_and_cannot_forge_another(served: hub.Hub, capsys: pytest.CaptureFixture[str]) -> None:
    get_file(served, "config.json", Range="bytes=2-5")
    with socket.create_connection(served.server_address[:2]) as client:
        client.sendall(b"GET /\x1b[31mx HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while client.recv(4096):
            pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(
        f'"GET /api/v1/models/{MODEL}/repo?Revision=master&FilePath=config.json HTTP/1.1" '
        "range=bytes=2-5 status=206 length=4"
    )
    assert "\\x1b[31m" in lines[1]


def test_a_file_that_cannot_be_read_is_said(served: hub.Hub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hub, "_sha256", fail)
    status, _, body = get_file(served, "config.json")
    message = f"the hub cannot read {root / MODEL / 'config.json'}: Input/output error"
    assert (status, json.loads(body)) == (500, {"Code": 500, "Message": message, "Success": False})


def test_many_clients_at_once_are_counted_right(served: hub.Hub) -> None:
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda _: get_file(served, WEIGHTS)[2], range(8)))
    assert all(body == FILES[WEIGHTS] for body in bodies)
    assert served.bytes_sent[f"{MODEL}/{WEIGHTS}"] == 8 * 5_000_000


class TestCommand:
    """The script as a process."""

    SCRIPT = str(Path(hub.__file__))

    def test_serves_until_it_is_stopped(self, root: Path) -> None:
        command = [sys.executable, self.SCRIPT, "--root", str(root), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline().strip()
                match = re.fullmatch(rf"{re.escape(str(root))} is served at (http://127\.0\.0\.1:\d+)", line)
                assert match, line
                with urllib.request.urlopen(f"{match[1]}/healthz", timeout=10) as response:
                    assert response.read() == b"ok"
            finally:
                process.terminate()

    def test_a_taken_port_is_said(self, root: Path, served: hub.Hub, capsys: pytest.CaptureFixture[str]) -> None:
        port = served.server_address[1]
        assert hub.main(["--root", str(root), "--port", str(port)]) == 1
        assert capsys.readouterr().err == (
            f"cannot listen on 127.0.0.1:{port}: Address already in use. "
            "Stop what listens there, or choose another --host or --port.\n"
        )

    def test_a_root_that_is_not_there_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            hub.main(["--root", str(tmp_path / "none"), "--port", "0"])
        assert stopped.value.code == 2
        assert f"--root: {tmp_path}/none is not a folder; make it, with <owner>/<name>/ folders in it" in (
            capsys.readouterr().err
        )
