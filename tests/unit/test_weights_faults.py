"""What goes wrong while weights come: after each, one rerun ends right, and what was right is not fetched again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import (
    weights,
    weights_client,
    weights_hub,
    weights_manifest,
    weights_progress,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError
from test_weights import (
    MODEL,
    SIZES,
    SlowHub,
    clients_of,
    contents,
    flip,
    offline,
    origin,
    served,
    start,
    wait_for,
    wanted,
)

import spread

__all__ = ["served", "wanted"]  # fixtures

BIG = "model-1.safetensors"
TOTAL = sum(SIZES.values())

# ---- the hub ---------------------------------------------------------------------------------------------------------

HUB_FAULTS = {
    "cut in mid-file": (lambda faults, path: faults.cut(path, 1_500_000), SIZES[BIG]),
    "a wrong byte": (lambda faults, path: faults.flip(path, 1_000_000), 2 * SIZES[BIG]),
    "a short file": (lambda faults, path: faults.short(path, 1_000_000), SIZES[BIG] + 1_000_000),
    "elsewhere": (lambda faults, path: faults.redirect(path), SIZES[BIG]),
}


@pytest.mark.parametrize(("plan", "most"), HUB_FAULTS.values(), ids=HUB_FAULTS)
def test_hub_faults_end_right_and_fetch_nothing_else_again(
    served: SlowHub, wanted: Request, plan: object, most: int
) -> None:
    plan(served.faults, f"{MODEL}/{BIG}")
    weights.ensure(replace(wanted, retries=3), "present")
    assert contents(Path(wanted.path)) == origin(served)
    sent = served.fetched()
    assert sent.pop(BIG) <= most
    assert sent == {name: size for name, size in SIZES.items() if size and name != BIG}


@pytest.mark.parametrize(
    ("status", "requests"),
    [(429, 1), *(pytest.param(status, 3, marks=pytest.mark.nightly) for status in (429, 500, 503)), (500, 1)],
)
def test_a_hub_that_refuses_its_listing_for_a_while(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch, status: int, requests: int
) -> None:
    monkeypatch.setattr(weights.time, "sleep", lambda seconds: time.monotonic())
    served.faults.answer(status, requests)
    try:
        weights.ensure(replace(wanted, retries=2), "present")
    except WeightsError as error:
        assert f"HTTP {status}" in str(error)
        weights.ensure(replace(wanted, retries=3), "present")
    assert contents(Path(wanted.path)) == origin(served)
    assert served.fetched() == {name: size for name, size in SIZES.items() if size}


@pytest.mark.parametrize(
    ("status", "requests"),
    # The client itself asks five times more; beyond, it is run again.
    [(429, 1), (500, 1), pytest.param(503, 8, marks=[pytest.mark.nightly, pytest.mark.timeout(300)])],
)
def test_a_hub_that_refuses_a_file_for_a_while(served: SlowHub, wanted: Request, status: int, requests: int) -> None:
    served.faults.answer_file(f"{MODEL}/{BIG}", status, requests)
    weights.ensure(replace(wanted, patience=120), "present")
    assert served.faults.take_file_status(f"{MODEL}/{BIG}") is None  # all were met
    assert contents(Path(wanted.path)) == origin(served)
    assert served.fetched() == {name: size for name, size in SIZES.items() if size}


class Answering(BaseHTTPRequestHandler):
    """A host that sends every request elsewhere, or answers it by an empty listing; it keeps the requests' headers."""

    elsewhere = ""

    def do_GET(self) -> None:
        type(self).seen.append(dict(self.headers))
        body = b'{"Data": {"Files": []}}'
        self.send_response(302 if self.elsewhere and "again" not in self.path else 200)
        self.send_header("Location", self.elsewhere)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(("other", "handed_on"), [(True, False), (False, True)], ids=["another host", "the same"])
def test_the_token_stays_with_its_host(other: bool, handed_on: bool) -> None:
    with contextlib.ExitStack() as opened:
        handlers = [type("Host", (Answering,), {"seen": []}) for _ in range(2)]
        servers = [opened.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler)) for handler in handlers]
        for server in servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            opened.callback(server.shutdown)
        first, second = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
        handlers[0].elsewhere = f"{second if other else first}/again"
        request = Request(MODEL, "/srv/models/tiny", endpoint=first, retries=1)
        assert weights_hub.ask_hub(request, "s3cret", f"{first}/list")[0] == '{"Data": {"Files": []}}'
    seen = [headers for handler in handlers for headers in handler.seen]
    assert len(seen) == 2
    for name, value in (("Authorization", "Bearer s3cret"), ("Cookie", "m_session_id=s3cret")):
        assert [headers.get(name) for headers in seen] == [value, value if handed_on else None]


@pytest.mark.parametrize(
    ("source", "status"), [("modelscope", 403), ("huggingface", 401), ("huggingface", 403), ("huggingface", 404)]
)
def test_a_hub_that_refuses_a_file_for_good_is_told_at_once(
    served: SlowHub, wanted: Request, source: str, status: int
) -> None:
    if source == "huggingface":
        wanted = on_huggingface(wanted)
    served.faults.answer_file(f"{MODEL}/{BIG}", status, 100)
    with pytest.raises(WeightsError, match=r"exit status 1 after 1 try, the error is a lasting one\. ") as error:
        weights.ensure(replace(wanted, patience=30), "present")
    assert str(status) in str(error.value)


# ---- kill -9 at each step between the last byte and the marker -------------------------------------------------------

KILLED = """
import json, os, signal, sys
from ansible_collections.stepladder.core.plugins.module_utils import weights, weights_manifest
where, calls = sys.argv[2], [int(sys.argv[3])]
module = os if where in ("unlink", "rename") else weights if where in ("seal", "listing") else weights_manifest
step = getattr(module, where)
def killed(*arguments, **named):
    calls[0] -= 1
    if calls[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **named)
setattr(module, where, killed)
weights.ensure(weights.Request(**json.loads(sys.argv[1])), "present")
"""

STEPS = {
    "before the files are proven": ("hash_file", 0),
    "while they are": ("hash_file", 2),
    "before the manifest": ("seal", 0),
    "while its code is noted": ("write_whole", 0),
    "while it is written": ("write_whole", 1),
    "before everything is made read-only": ("set_writable", 1),
    "before the marker": ("write_whole", 2),
}


@pytest.mark.parametrize(
    ("where", "calls"),
    # Every step nightly; those next to the marker always.
    [pytest.param(*step, id=name, marks=() if name.startswith("before the m") else pytest.mark.nightly)
     for name, step in STEPS.items()],
)  # fmt: skip
def test_killed_between_the_last_byte_and_the_marker(served: SlowHub, wanted: Request, where: str, calls: int) -> None:
    ensure_until_killed(wanted, where, calls)
    assert not wanted.marker.exists()
    sent = served.fetched()
    again = weights.ensure(wanted, "present")
    for name, size in served.fetched().items():
        sent[name] = sent.get(name, 0) + size
    assert contents(Path(wanted.path)) == origin(served)
    assert sum(sent.values()) <= TOTAL + (0 if where != "hash_file" else SIZES[BIG])
    if where in {"seal", "write_whole", "set_writable"}:
        assert (again["bytes_fetched"], again["hashed_bytes"]) == (0, 0)
    assert weights.ensure(offline(wanted), "present")["changed"] is False


MENDING_STEPS = {
    "before the marker goes": ("unlink", 0),
    "before the manifest goes": ("unlink", 1),
    "before anything is set aside": ("rename", 0),
    "before the second file is set aside": ("rename", 1),
    "before the hub is asked": ("listing", 0),
    "while what came is proven": ("hash_file", 4),
    "before the manifest is written": ("seal", 0),
    "before the marker is written": ("write_whole", 2),
}


@pytest.mark.parametrize(
    ("where", "calls"),
    [pytest.param(*step, id=name, marks=() if name == "before the manifest goes" else pytest.mark.nightly)
     for name, step in MENDING_STEPS.items()],
)  # fmt: skip
def test_killed_while_wrong_files_are_mended(served: SlowHub, wanted: Request, where: str, calls: int) -> None:
    wrong = {BIG: SIZES[BIG], "model-2.safetensors": 100_000}
    (served.tree._root / MODEL / "model-2.safetensors").write_bytes(os.urandom(100_000))
    weights.ensure(wanted, "present")
    for name in wrong:
        flip(Path(wanted.path) / name, keep_mtime=True)
    served.fetched()
    ensure_until_killed(replace(wanted, verify="full"), where, calls)
    sent = served.fetched()
    # Cheap again: what the full check found must not be lost with it once the marker is gone.
    full = wanted.marker.exists()
    weights.ensure(replace(wanted, verify="full") if full else wanted, "present")
    for name, size in served.fetched().items():
        sent[name] = sent.get(name, 0) + size
    assert contents(Path(wanted.path)) == origin(served)
    assert sent == wrong
    assert weights.ensure(offline(wanted), "present")["changed"] is False


def ensure_until_killed(wanted: Request, where: str, calls: int) -> None:
    """Have a process bring the weights that is killed when it calls a function once more than so often."""
    arguments = json.dumps({name: getattr(wanted, name) for name in Request.__dataclass_fields__})
    done = subprocess.run(
        [sys.executable, "-c", KILLED, arguments, where, str(calls)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for_clients_to_end(wanted)


def wait_for_clients_to_end(wanted: Request) -> None:
    wait_for(lambda: not clients_of(wanted))
    time.sleep(0.2)


@pytest.mark.nightly
def test_a_journal_cut_in_half_by_a_power_cut_costs_a_hash(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    weights_manifest.unseal(wanted, [])
    entries = [weights_manifest.hash_file(Path(wanted.path), name, True) for name in sorted(SIZES)]
    weights_manifest.note(wanted, entries)
    text = wanted.journal.read_text()
    wanted.journal.write_text(text[: len(text) - 20])
    served.fetched()
    again = weights.ensure(wanted, "present")
    assert served.fetched() == {}
    assert again["hashed_bytes"] == SIZES[sorted(SIZES)[-1]]


# ---- what lies there ------------------------------------------------------------------------------------------------


def test_a_complete_store_is_read_only_and_an_unfinished_one_has_no_marker(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    root = Path(wanted.path)
    modes = {path.relative_to(root).as_posix(): path.stat().st_mode & 0o777 for path in root.rglob("*")}
    assert {mode for name, mode in modes.items() if name in SIZES} == {0o444}
    assert modes["sub"] == root.stat().st_mode & 0o777 == 0o555
    assert modes[".stepladder"] == 0o755


def test_a_marker_that_means_another_manifest_is_none(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    wanted.manifest.write_text(wanted.manifest.read_text().replace('"size": 90', '"size": 91'))
    served.fetched()
    again = weights.ensure(wanted, "present")
    assert again["actions"] == [f"fetch {MODEL}@master into {wanted.path} (no complete manifest)"]
    assert served.fetched() == {}


def test_the_manifest_of_another_revision_is_not_believed_and_what_is_right_stays(
    served: SlowHub, wanted: Request
) -> None:
    weights.ensure(wanted, "present")
    manifest = json.loads(wanted.manifest.read_text())
    manifest["revision"] = "v2"
    text = json.dumps(manifest)
    wanted.manifest.write_text(text)
    wanted.marker.write_text(json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))
    served.fetched()
    again = weights.ensure(wanted, "present")
    assert again["actions"] == [
        f"fetch {MODEL}@master into {wanted.path} (the manifest is for revision 'v2' instead of 'master')"
    ]
    assert served.fetched() == {}
    assert weights.ensure(offline(wanted), "present")["changed"] is False


def test_files_of_another_revision_are_set_aside_and_fetched(served: SlowHub, wanted: Request) -> None:
    root = Path(wanted.path)
    root.mkdir(parents=True)
    (root / "config.json").write_bytes(b"x" * SIZES["config.json"])
    (root / "modeling_step.py").write_bytes(b"short")
    done = weights.ensure(wanted, "present")
    assert {one["path"]: one["reason"] for one in done["bad_files"]} == {
        "config.json": "sha256",
        "modeling_step.py": "size",
    }
    assert contents(root) == origin(served)


def test_a_full_check_believes_nothing_of_a_store_that_is_not_complete(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.ensure(wanted, "present")
    root = Path(wanted.path)
    proven = [weights_manifest.Proven(**one) for one in json.loads(wanted.manifest.read_text())["files"]]
    weights_manifest.unseal(wanted, proven)
    (root / "config.json").unlink()  # the download stopped before it
    flip(root / BIG, keep_mtime=True)
    served.fetched()
    told: list[str] = []
    monkeypatch.setattr(weights.Progress, "say", lambda self, phase, text, **numbers: told.append(text))
    done = weights.ensure(replace(wanted, verify="full"), "present")
    assert [(one["path"], one["reason"]) for one in done["bad_files"]] == [(BIG, "sha256")]
    assert served.fetched() == {name: SIZES[name] for name in (BIG, "config.json")}
    assert contents(root) == origin(served)
    assert "checking 4 of 4 files, 3.0 MB of 3.0 MB" in told


def test_a_store_of_the_version_before_is_believed(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    manifest = json.loads(wanted.manifest.read_text())
    manifest["format_version"] = 1
    for one in manifest["files"]:
        del one["git_blob"]
    wanted.manifest.write_text(json.dumps(manifest))
    wanted.marker.unlink()
    assert weights.ensure(offline(wanted), "present")["changed"] is False


def test_stamps_of_another_time_change_nothing(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    for moment in (0.0, 4_102_444_800.0):  # 1970 and 2100
        for path in (wanted.marker, wanted.manifest, wanted.bookkeeping):
            os.utime(path, (moment, moment))
        again = weights.ensure(offline(wanted), "present")
        assert (again["changed"], again["hashed_bytes"]) == (False, 0)


def test_nothing_that_waits_or_decides_reads_a_clock_that_can_jump() -> None:
    """A jump itself cannot be made here: it would be every process's."""
    sources = [Path(spread.__file__), *Path(weights.__file__).parent.glob("weights*.py")]
    assert len(sources) > 10
    calls = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\b|\butc_now\(")
    found = [
        (source.name, line.strip())
        for source in sources
        for line in source.read_text().splitlines()
        if calls.search(line)
    ]
    told = {"def utc_now() -> str:", '"at": utc_now(),'}
    assert [(name, line) for name, line in found if line not in told and not line.startswith("seal(")] == []


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of two megabytes needs root to be mounted")
def test_a_full_disk_is_named_and_what_was_written_is_kept(
    served: SlowHub, wanted: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode()}")
    try:
        there = replace(wanted, path=str(small / "models" / "tiny"))
        with pytest.raises(WeightsError, match=r"^too little space for the weights in "):
            weights.ensure(there, "present")
        assert served.fetched() == {}
        with monkeypatch.context() as patched:
            patched.setattr(weights, "free_bytes", lambda path: 10**12)  # somebody else fills it meanwhile
            with pytest.raises(WeightsError, match="No space left on "):
                weights.ensure(there, "present")
        wait_for_clients_to_end(there)
        kept = contents(Path(there.path))
        served.fetched()
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        weights.ensure(there, "present")
        assert contents(Path(there.path)) == origin(served)
        again = served.fetched()
        whole = {name for name, content in kept.items() if name in SIZES and len(content) == SIZES[name]}
        assert set(again) == {name for name, size in SIZES.items() if size} - whole
        assert again[BIG] == SIZES[BIG] - len(kept.get(f"{BIG}.incomplete", b""))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# ---- other sources ---------------------------------------------------------------------------------------------------


def carried(tmp_path: Path, kind: str, sums: bool) -> Path:
    folder = tmp_path / "carried"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "sub/a.safetensors"):
        (folder / name).write_bytes(os.urandom(5000))
    if sums:
        names = "config.json sub/a.safetensors"
        subprocess.run(f"sha256sum {names} > SHA256SUMS", shell=True, cwd=folder, check=True)
    if kind == "directory":
        return folder
    subprocess.run(["tar", "-C", str(folder), "-czf", str(tmp_path / "model.tar.gz"), "."], check=True)
    return tmp_path / "model.tar.gz"


@pytest.mark.parametrize("kind", ["directory", "archive"])
@pytest.mark.parametrize("sums", [True, False])
def test_weights_that_are_carried_in(tmp_path: Path, kind: str, sums: bool) -> None:
    place = carried(tmp_path, kind, sums)
    wish = Request(MODEL, str(tmp_path / "m" / "master"), source=kind, source_path=str(place))
    done = weights.ensure(wish, "present")
    expected = {name: (tmp_path / "carried" / name).read_bytes() for name in ("config.json", "sub/a.safetensors")}
    assert contents(Path(wish.path)) == expected
    assert done["bytes_fetched"] == 10_000
    shutil.rmtree(tmp_path / "carried")
    assert weights.ensure(wish, "present")["changed"] is False


@pytest.mark.parametrize("kind", ["directory", "archive"])
def test_a_wrong_byte_in_what_is_carried_in_is_found(tmp_path: Path, kind: str) -> None:
    place = carried(tmp_path, "directory", True)
    (place / "config.json").write_bytes(bytes(5000))
    if kind == "archive":
        subprocess.run(["tar", "-C", str(place), "-cf", str(tmp_path / "model.tar"), "."], check=True)
        place = tmp_path / "model.tar"
    wish = Request(MODEL, str(tmp_path / "m" / "master"), source=kind, source_path=str(place))
    with pytest.raises(WeightsError, match=r"1 of 2 files .* are not what the source lists:\n  config.json: sha256"):
        weights.ensure(wish, "present")
    assert not wish.marker.exists()


CARRIED_REFUSALS = {
    "no path": ("directory", "", "source is 'directory' and source_path is ''"),
    "nothing there": ("archive", "/nonexistent.tar", "the archive /nonexistent.tar cannot be read: "),
    "no tar": ("archive", __file__, f"the archive {__file__} cannot be read: "),
}


@pytest.mark.parametrize(("kind", "place", "message"), CARRIED_REFUSALS.values(), ids=CARRIED_REFUSALS)
def test_carried_refusals(tmp_path: Path, kind: str, place: str, message: str) -> None:
    with pytest.raises(WeightsError) as error:
        weights.ensure(Request(MODEL, str(tmp_path / "m" / "master"), source=kind, source_path=place), "present")
    assert str(error.value).startswith(message)


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    (tmp_path / "evil").write_text("x")
    subprocess.run(
        ["tar", "-C", str(tmp_path), "--transform", "s,evil,../../evil,", "-Pcf", str(tmp_path / "e.tar"), "evil"],
        check=True,
    )
    wish = Request(MODEL, str(tmp_path / "m" / "master"), source="archive", source_path=str(tmp_path / "e.tar"))
    with pytest.raises(WeightsError, match=r"names that lead out of the model's directory: ../../evil"):
        weights.ensure(wish, "present")


LIMIT = 8_000_000


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_limit_for_the_hub_holds(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source == "huggingface":
        wanted = on_huggingface(wanted)
    size = 4 * LIMIT
    (served.tree._root / MODEL / "large.safetensors").write_bytes(os.urandom(size))
    moments: list[float] = []
    monkeypatch.setattr(served, "count", lambda path, sent: moments.append(time.monotonic()))
    hold, seen = weights_client.Brake.hold, []
    monkeypatch.setattr(weights_client.Brake, "hold", lambda self, there: seen.append(there) or hold(self, there))

    def seconds(limit: int) -> float:
        """From the hub's first byte to the end: neither the client's start counts nor what sockets hold."""
        moments.clear()
        place = str(Path(wanted.path).with_name(f"at-{limit}"))
        weights.ensure(replace(wanted, path=place, bytes_per_second=limit, max_workers=1), "present")
        assert (Path(place) / "large.safetensors").stat().st_size == size
        return time.monotonic() - moments[0]

    assert size / LIMIT / 2 < seconds(LIMIT) < size / LIMIT + 6
    if source == "huggingface":  # it writes 10 MiB at a time; held back while the file comes, not once it is whole
        assert any(10 << 20 <= there < size for there in seen)
    else:
        assert seconds(0) < size / LIMIT / 2


# ---- HuggingFace -----------------------------------------------------------------------------------------------------

HF = Path(sys.executable).with_name("hf")


def on_huggingface(wanted: Request) -> Request:
    if not HF.exists():
        pytest.skip("no hf client; it comes with requirements/test.txt")
    return replace(wanted, source="huggingface", client=str(HF), revision="main", exclude=("empty.txt",))


def test_what_huggingfaces_client_left_when_it_was_killed_takes_no_room(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, large = on_huggingface(wanted), "large.safetensors"
    root, size = Path(chosen.path), 25_000_000
    (served.tree._root / MODEL / large).write_bytes(os.urandom(size))
    served.rest = 0.3
    run = start(chosen)
    try:  # the client writes 10 MiB at a time
        wait_for(lambda: weights_progress.read_state(chosen.bookkeeping).get("done", 0) >= 10 << 20)
    finally:
        run.kill()
        run.communicate(timeout=20)
    wait_for_clients_to_end(chosen)
    assert not (root / large).exists()
    left = weights_client.bytes_by_file(root, {large: size})[large]
    assert left >= 10 << 20
    served.rest = 0.0
    # A disk that the model just fits on.
    total = sum(len(content) for content in origin(served).values())

    def free(path: Path) -> int:
        return total - sum(entry.stat().st_size for entry in root.rglob("*") if entry.is_file())

    monkeypatch.setattr(weights, "free_bytes", lambda path: free(path) + 100_000)  # what is noted beside the weights
    assert weights.look(chosen)["wanted"]
    assert weights_client.bytes_by_file(root, {large: size})[large] == left
    done = weights.ensure(chosen, "present")
    assert contents(root) == {name: content for name, content in origin(served).items() if name != "empty.txt"}
    assert done["bytes_fetched"] >= size  # it goes on with nothing


def test_huggingfaces_client_fetches_and_a_flipped_byte_of_a_small_file_is_found(
    served: SlowHub, wanted: Request
) -> None:
    chosen = on_huggingface(wanted)
    done = weights.ensure(chosen, "present")
    expected = {name: content for name, content in origin(served).items() if name != "empty.txt"}
    assert contents(Path(chosen.path)) == expected
    assert done["bytes_fetched"] == TOTAL
    assert weights.ensure(offline(chosen), "present")["changed"] is False
    served.fetched()
    (Path(chosen.path) / "config.json").write_bytes(b"x" * SIZES["config.json"])
    weights.ensure(chosen, "present")
    assert served.fetched() == {"config.json": SIZES["config.json"]}
    # What lies there unproven is held against git's own hash, the only one that this hub lists of small files.
    weights_manifest.unseal(chosen, [])
    (Path(chosen.path) / "config.json").write_bytes(b"y" * SIZES["config.json"])
    mended = weights.ensure(chosen, "present")
    assert [(one["path"], one["reason"]) for one in mended["bad_files"]] == [("config.json", "git blob")]
    assert contents(Path(chosen.path)) == expected
