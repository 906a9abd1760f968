#!/usr/bin/env python3
"""Serve model folders to the unmodified clients of ModelScope and HuggingFace, as much as a download takes.

    hub.py --root DIR --host 127.0.0.1 --port 8100

serves DIR/<owner>/<name>/... as the models <owner>/<name>, revision "master", and DIR/<owner>/<name>@<revision>/... as
other revisions of them. Names that start with a dot are not served. There is no upload and no authentication: a token
that a client sends is ignored.

The protocols were read off the clients (modelscope 1.40.2 with modelscope-hub 0.5.1; huggingface_hub 2.4.0, where the
revision is "main" or "master"). Only the standard library is used, and nothing that Python 3.9 lacks: this runs on a
node before any environment is there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "master"
NOT_FOUND_CODE = 10010205001  # ModelScope's own number in the body of a 404
CHUNK_BYTES = 1 << 20
IDLE_SECONDS = 120

# A name starts with a letter, a digit or an underscore: no "..", and nothing hidden.
MODEL_PATH = re.compile(r"/api/v1/models/(?P<model>\w[\w.-]*/\w[\w.-]*)(?P<what>/repo|/repo/files|)")
HF_PATH = re.compile(r"/api/models/(?P<model>\w[\w.-]*/\w[\w.-]*)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
HF_FILE = re.compile(r"/(?P<model>\w[\w.-]*/\w[\w.-]*)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
HF_REVISIONS = {"main", REVISION}
LARGE = {".safetensors", ".bin", ".gguf"}
ACCELERATION_PATH = "/api/v1/repos/internalAccelerationInfo"
BYTE_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Failure(Exception):  # noqa: N818 - an answer of the protocol, not a fault of this program
    """A request that is answered by an error; `code` is ModelScope's number for it, `headers` go into the answer."""

    def __init__(
        self, status: int, message: str, code: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = status if code is None else code
        self.headers = headers or {}


class Faults:
    """What goes wrong on purpose: nothing, unless a test plans it. No request and no option reaches this.

    A path is "<owner>/<name>/<file>". Each planned fault happens once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cuts: dict[str, int] = {}
        self._flips: dict[str, int] = {}
        self._shorts: dict[str, int] = {}
        self._redirects: set[str] = set()
        self._statuses: list[int] = []
        self._file_statuses: dict[str, list[int]] = {}

    def cut(self, path: str, after_bytes: int) -> None:
        """Break the connection in the next answer with this file after so many bytes of its body."""
        with self._lock:
            self._cuts[path] = after_bytes

    def flip(self, path: str, offset: int) -> None:
        """Send another byte at this offset of the file, in the next answer that holds it."""
        with self._lock:
            self._flips[path] = offset

    def short(self, path: str, length: int) -> None:
        """Answer the next request for this file as if it had only so many bytes."""
        with self._lock:
            self._shorts[path] = length

    def redirect(self, path: str) -> None:
        """Send the next request for this file elsewhere: to the same file under another address."""
        with self._lock:
            self._redirects.add(path)

    def answer(self, status: int, requests: int = 1) -> None:
        """Answer the next requests, health checks aside, by this HTTP status."""
        with self._lock:
            self._statuses += [status] * requests

    def answer_file(self, path: str, status: int, requests: int = 1) -> None:
        """Answer the next requests for this file by this HTTP status."""
        with self._lock:
            self._file_statuses[path] = [status] * requests

    def take_file_status(self, path: str) -> int | None:
        """Give the status that this request for a file has to be answered by, if one is planned."""
        with self._lock:
            planned = self._file_statuses.get(path)
            return planned.pop(0) if planned else None

    def take_status(self) -> int | None:
        """Give the status that this request has to be answered by, if one is planned."""
        with self._lock:
            return self._statuses.pop(0) if self._statuses else None

    def take_cut(self, path: str) -> int | None:
        """Give after how many bytes this answer breaks off, if it does."""
        with self._lock:
            return self._cuts.pop(path, None)

    def take_short(self, path: str) -> int | None:
        """Give how many bytes the file is said to have, if that is to be wrong."""
        with self._lock:
            return self._shorts.pop(path, None)

    def take_redirect(self, path: str) -> bool:
        """Say whether this request is sent elsewhere."""
        with self._lock:
            there = path in self._redirects
            self._redirects.discard(path)
            return there

    def take_flip(self, path: str, first: int, last: int) -> int | None:
        """Give the offset of the byte to falsify, if it lies in first..last of the file."""
        with self._lock:
            if first <= self._flips.get(path, -1) <= last:
                return self._flips.pop(path)
            return None


class ByteRange(NamedTuple):
    """The bytes first..last of a file, both included; last is first - 1 for an empty one."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """How many bytes these are."""
        return self.last - self.first + 1


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Read a Range header (RFC 9110, section 14) against a file of `size` bytes.

    Returns:
        the bytes asked for, or None where the whole file is the answer: no header, or one that may be ignored

    Raises:
        Failure: 416, no byte of the file is in the range
    """
    match = BYTE_RANGE.fullmatch(header.strip()) if header else None
    if not match or match[0] == "bytes=-":
        return None
    if match[1]:
        asked = ByteRange(int(match[1]), min(int(match[2]) if match[2] else size - 1, size - 1))
        if match[2] and int(match[2]) < int(match[1]):
            return None
    else:
        asked = ByteRange(max(size - int(match[2]), 0), size - 1)
    if asked.length < 1:
        raise Failure(416, f"{header} is beyond {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return asked


class Tree:
    """The models below a folder, with digests that are worked out once for each state of a file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}

    def files(self, model: str) -> dict[str, Path]:
        """List a model's files by their path inside it. A link that leads out of the model is no file of it.

        Raises:
            Failure: 404, there is no such model
        """
        folder = (self._root / model).resolve()
        if not folder.is_dir():
            raise Failure(404, f"there is no model {model} on this hub", NOT_FOUND_CODE)
        found = {}
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in inside.parts)
            if not hidden and path.is_file() and folder in path.resolve().parents:
                found[inside.as_posix()] = path
        return found

    def at(self, model: str, revision: str) -> str:
        """Give the name under which the files of a model's revision are found here.

        Raises:
            Failure: 404, the model has no such revision
        """
        if revision == REVISION:
            return model
        others = {path.name.partition("@")[2] for path in (self._root / model).parent.glob(f"{Path(model).name}@*")}
        if revision not in others:
            known = " and ".join(repr(name) for name in [REVISION, *sorted(others)])
            message = f"{model} has no revision {revision!r}, this hub serves {known} only"
            raise Failure(404, message, NOT_FOUND_CODE, {"X-Error-Code": "RevisionNotFound"})
        return f"{model}@{revision}"

    def digest(self, path: Path) -> str:
        """Give the SHA-256 of a file; it is read again when its size or time of change is another one.

        Raises:
            Failure: 500, the file cannot be read
        """
        try:
            stat = path.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            with self._lock:
                known = self._digests.get(path)
                if known is None or known[0] != state:
                    with path.open("rb") as stream:
                        known = (state, _sha256(stream))
                    self._digests[path] = known
                return known[1]
        except OSError as error:
            raise Failure(500, f"the hub cannot read {path}: {error.strerror}") from error

    def listing(self, model: str, root: str, *, recursive: bool) -> list[dict[str, Any]]:
        """List files and folders of a model, below `root` where it is not empty, in ModelScope's fields.

        Raises:
            Failure: 404, there is no such model
        """
        files = self.files(model)
        folders = {parent.as_posix() for path in files for parent in Path(path).parents if parent != Path()}
        entries = [self._entry(path, files.get(path)) for path in sorted([*folders, *files])]
        if root:
            entries = [entry for entry in entries if entry["Path"].startswith(f"{root}/")]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["Path"][len(root) :].lstrip("/")]
        return entries

    def commit(self, model: str) -> str:
        """Forty digits that stand for a model's files as they are now."""
        text = "".join(f"{name} {self.digest(path)}" for name, path in self.files(model).items())
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def huggingface_listing(self, model: str) -> list[dict[str, Any]]:
        """List a model's files in HuggingFace's fields: SHA-256 of large files, git's own hash of small ones.

        Raises:
            Failure: 404, there is no such model
        """
        found: list[dict[str, Any]] = []
        for inside, path in self.files(model).items():
            size = path.stat().st_size
            entry: dict[str, Any] = {"type": "file", "path": inside, "size": size, "oid": "0" * 40}
            if path.suffix in LARGE:
                entry["lfs"] = {"oid": self.digest(path), "size": size, "pointerSize": 135}
            else:
                content = path.read_bytes()
                entry["oid"] = hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
            found.append(entry)
        return found

    def _entry(self, inside: str, path: Path | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"Path": inside, "Name": inside.rpartition("/")[2], "Revision": REVISION}
        if path is None:
            return {**entry, "Type": "tree", "Size": 0}
        digest = self.digest(path)
        large = path.suffix in LARGE
        return {**entry, "Type": "blob", "Size": path.stat().st_size, "Sha256": digest, "IsLFS": large}


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection of a client."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server: Hub

    def do_GET(self) -> None:
        """Answer a request by a file, by JSON, or by an error in JSON."""
        self._sent = 0
        try:
            try:
                self._answer()
            except Failure as failure:
                body = {"Code": failure.code, "Message": str(failure), "Success": False}
                self._send_json(failure.status, body, failure.headers)
        except OSError as error:
            # The client went away, or the file became unreadable in mid-answer: only closing tells it.
            self.close_connection = True
            self.log_message('"%s" broke off after %d bytes: %s', self.requestline, self._sent, error)

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing here: the line is written where the length of the answer is known."""

    def log_message(self, format: str, *args: object) -> None:
        """Write one line to standard output, control characters escaped."""
        line = (format % args).encode("unicode_escape").decode("ascii")
        sys.stdout.write(f"{self.log_date_time_string()} {self.client_address[0]} {line}\n")
        sys.stdout.flush()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if path == "/healthz":
            self._send(200, {"Content-Type": "text/plain"}, b"ok")
            return
        if status := self.server.faults.take_status():
            raise Failure(status, "planned by a test")
        if path == ACCELERATION_PATH:
            self._send_json(200, _success({"InternalRegionQueryAddress": ""}))
            return
        if match := HF_PATH.fullmatch(path) or HF_FILE.fullmatch(path):
            self._answer_huggingface(match.groupdict())
            return
        match = MODEL_PATH.fullmatch(path)
        if not match:
            raise Failure(404, f"this hub does not know {url.path}", NOT_FOUND_CODE)
        model, what = match["model"], match["what"]
        model = self.server.tree.at(model, query.get("Revision", REVISION))
        if what == "/repo/files":
            recursive = query.get("Recursive", "True").lower() == "true"
            entries = self.server.tree.listing(model, query.get("Root", "").strip("/"), recursive=recursive)
            self._send_json(200, _success({"Files": entries}))
        elif what == "/repo":
            self._send_file(model, query.get("FilePath", ""))
        else:
            self.server.tree.files(model)
            owner, _, name = model.partition("/")
            self._send_json(200, _success({"Path": owner, "Name": name}))

    def _answer_huggingface(self, asked: dict[str, str]) -> None:
        model, tree = asked["model"], self.server.tree
        if asked["revision"] not in HF_REVISIONS | {tree.commit(model)}:
            model = tree.at(model, asked["revision"])
        if "file" in asked:
            self._send_file(model, asked["file"], {"X-Repo-Commit": tree.commit(model)})
        elif asked["what"] == "tree":
            self._send_json(200, tree.huggingface_listing(model))
        else:
            names = [{"rfilename": name} for name in tree.files(model)]
            self._send_json(200, {"id": model, "modelId": model, "sha": tree.commit(model), "siblings": names})

    def _send_file(self, model: str, inside: str, more: dict[str, str] | None = None) -> None:
        # A look-up among the files that are listed, never a path put together: nothing outside can be named.
        path = self.server.tree.files(model).get(inside)
        if path is None:
            raise Failure(404, f"there is no file {inside!r} in {model}", NOT_FOUND_CODE)
        if self.server.faults.take_redirect(f"{model}/{inside}"):
            raise Failure(302, "elsewhere, planned by a test", headers={"Location": f"{self.path}&Elsewhere=1"})
        if status := self.server.faults.take_file_status(f"{model}/{inside}"):
            raise Failure(status, "planned by a test")
        digest = self.server.tree.digest(path)
        with path.open("rb") as stream:
            short = self.server.faults.take_short(f"{model}/{inside}")
            size = path.stat().st_size if short is None else short
            asked = parse_range(self.headers.get("Range"), size)
            headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "X-Linked-ETag": digest}
            headers.update({"ETag": f'"{digest}"', **more} if more else {})
            if asked:
                headers["Content-Range"] = f"bytes {asked.first}-{asked.last}/{size}"
            part = asked or ByteRange(0, size - 1)
            self._send_headers(206 if asked else 200, headers, part.length)
            if self.command != "HEAD":
                self._stream(stream, part, f"{model}/{inside}")

    def _stream(self, stream: BinaryIO, part: ByteRange, path: str) -> None:
        cut = self.server.faults.take_cut(path)
        flip = self.server.faults.take_flip(path, part.first, part.last)
        stream.seek(part.first)
        left = part.length if cut is None else min(cut, part.length)
        while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
            start = part.first + self._sent
            if flip is not None and start <= flip < start + len(chunk):
                falsified = bytearray(chunk)
                falsified[flip - start] ^= 0xFF
                chunk = bytes(falsified)
            # Counted first: a client that has the last byte may look at the count at once.
            self.server.count(path, len(chunk))
            self.wfile.write(chunk)
            self._sent += len(chunk)
            left -= len(chunk)
        if self._sent < part.length:
            # Less than was announced, cut on purpose or because the file shrank: only closing tells the client.
            self.close_connection = True

    def _send_json(
        self, status: int, body: dict[str, Any] | list[dict[str, Any]], headers: dict[str, str] | None = None
    ) -> None:
        content = json.dumps(body).encode()
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, content)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._send_headers(status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)
            self._sent = len(body)

    def _send_headers(self, status: int, headers: dict[str, str], length: int) -> None:
        # Before the answer, so that whoever has the answer finds the line.
        asked = self.headers.get("Range", "-")
        self.log_message('"%s" range=%s status=%d length=%d', self.requestline, asked, status, length)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _success(data: dict[str, Any]) -> dict[str, Any]:
    return {"Code": 200, "Success": True, "Message": "success", "Data": data}


class Hub(ThreadingHTTPServer):
    """The server; it listens once made, and answers while `serve_forever` runs.

    Args:
        root: folder with <owner>/<name>/ folders
        host: address to listen on
        port: port to listen on, 0 for a free one
        faults: what goes wrong on purpose, in tests

    Raises:
        OSError: the address cannot be listened on
    """

    daemon_threads = True

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 0, faults: Faults | None = None) -> None:
        self.tree = Tree(root)
        self.faults = faults or Faults()
        self.bytes_sent: Counter[str] = Counter()
        """Bytes of file content handed to connections, by "<owner>/<name>/<file>"."""
        self._count_lock = threading.Lock()
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """The endpoint to give to a client."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def count(self, path: str, sent: int) -> None:
        """Add bytes to what was handed to connections of a file."""
        with self._count_lock:
            self.bytes_sent[path] += sent


@contextlib.contextmanager
def serving(root: Path, faults: Faults | None = None) -> Iterator[Hub]:
    """Run a hub on a free port of the loopback address, for as long as the block runs."""
    with Hub(root, faults=faults) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line until it is stopped; exit status 1 if the address cannot be listened on."""
    parser = argparse.ArgumentParser(description="Serve model folders to ModelScope's client.")
    parser.add_argument("--root", type=Path, required=True, help="folder with <owner>/<name>/ folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, required=True, help="port to listen on, 0 for a free one")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        parser.error(f"--root: {options.root} is not a folder; make it, with <owner>/<name>/ folders in it")
    try:
        hub = Hub(options.root, options.host, options.port)
    except OSError as error:
        sys.stderr.write(
            f"cannot listen on {options.host}:{options.port}: {error.strerror}. "
            "Stop what listens there, or choose another --host or --port.\n"
        )
        return 1
    with hub, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(f"{options.root} is served at {hub.url}\n")
        sys.stdout.flush()
        hub.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
