"""model_weights: the decisions as tables, and the whole of it with the real client against the rehearsal hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import (
    weights,
    weights_client,
    weights_hub,
    weights_manifest,
    weights_progress,
    weights_request,
    weights_store,
)
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import BadFile, Current, Listed, Proven
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request, WeightsError

import hub

CLIENT = Path(sys.executable).with_name("modelscope")
MODEL = "stepfun-ai/tiny"
TOKEN = "ms-3f9a0c77-not-for-anyone"
SIZES = {
    "config.json": 90,
    "modeling_step.py": 40,
    "model-1.safetensors": 3_000_000,
    "sub/notes.txt": 2,
    "empty.txt": 0,
}
REQUEST = Request(model_id=MODEL, path="/srv/models/stepfun-ai--tiny/master")

# ---- pure ------------------------------------------------------------------------------------------------------------

PROBLEMS = {
    "nothing wrong": ({}, []),
    "everything wrong, all at once": (
        {"model_id": "tiny", "revision": "--force", "path": "models", "endpoint": "modelscope.cn", "retries": 0},
        [
            "model_id is 'tiny': give it as owner/name, for example stepfun-ai/Step-3.5-Flash",
            "revision is '--force': give a branch, a tag or a commit, for example master",
            "path is 'models': give an absolute path of its own for the model, at least two levels deep",
            "endpoint is 'modelscope.cn': give a full URL, for example https://www.modelscope.cn",
            "retries is 0: give 1 or more",
        ],
    ),
    "a path that is a top directory": (
        {"path": "/srv"},
        ["path is '/srv': give an absolute path of its own for the model, at least two levels deep"],
    ),
}


@pytest.mark.parametrize(("changes", "expected"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems(changes: dict, expected: list[str]) -> None:
    assert weights_request.problems(replace(REQUEST, **changes)) == expected


def listing(*entries: dict) -> str:
    return json.dumps({"Code": 200, "Data": {"Files": list(entries)}})


def blob(path: str) -> dict:
    return {"Path": path, "Type": "blob", "Size": 3, "Sha256": "AB" * 32}


def test_listing_leaves_directories_out_and_writes_hashes_small() -> None:
    text = listing({"Path": "sub", "Type": "tree", "Size": 0}, blob("sub/a.bin"))
    assert weights_hub.parse_listing(text, "http://hub") == [Listed("sub/a.bin", 3, "ab" * 32)]


WRONG_LISTINGS = {
    "a proxy's page": (
        "<html>login</html>",
        "http://hub answered with something else than a file listing (JSONDecodeError: Expecting value: line 1 column "
        "1 (char 0)): '<html>login</html>'. Check that endpoint is a model hub and no proxy answers in its place.",
    ),
    "no files key": (
        '{"Data": {}}',
        "http://hub answered with something else than a file listing (KeyError: 'Files'): '{\"Data\": {}}'. "
        "Check that endpoint is a model hub and no proxy answers in its place.",
    ),
    "names that lead out": (
        listing(blob("../../etc/passwd"), blob("/etc/shadow"), blob(".stepladder/manifest.json"), blob("fine")),
        "http://hub lists names that lead out of the model's directory: "
        "../../etc/passwd, /etc/shadow, .stepladder/manifest.json",
    ),
    "cut off": (
        listing(*[blob(f"{number}.bin") for number in range(3000)]),
        "http://hub listed 3000 entries, and the hub cuts a listing off at 3000: what it left out could not be proven. "
        "Choose the files with include.",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG_LISTINGS.values(), ids=WRONG_LISTINGS)
def test_wrong_listings(text: str, message: str) -> None:
    with pytest.raises(WeightsError) as error:
        weights_hub.parse_listing(text, "http://hub")
    assert str(error.value) == message


PATHS = ("config.json", "sub/a.json", "sub/b.bin", "model[1].bin", "a,b.bin", "modelx1y.bin")


@pytest.mark.parametrize(
    "patterns", [["*.json"], ["sub/*"], [r".*\.bin"], ["sub.*"], ["config.json,*.bin"], ["[mc]*"], ["nothing"], []]
)
def test_patterns_mean_what_they_mean_to_the_client(patterns: list[str]) -> None:
    client = pytest.importorskip("modelscope_hub._download")
    compat = pytest.importorskip("modelscope_hub.cli.compat")
    ours = [path for path in PATHS if weights_hub.matches(path, weights_request.split_patterns(patterns))]
    theirs = [path for path in PATHS if client._matches_patterns(path, compat.normalize_patterns(patterns))]
    assert ours == theirs


@pytest.mark.parametrize("path", PATHS)
def test_a_name_as_a_pattern_means_this_name(path: str) -> None:
    pattern = weights_request.split_patterns([weights_hub.literal_pattern(path)])
    assert len(pattern) == 1
    assert [other for other in PATHS if weights_hub.matches(other, pattern)] == [path]


PROVEN = Proven("a.bin", 3, "ab" * 32, mtime_ns=7, inode=11)
MANIFEST = json.loads(weights_manifest.render_manifest(REQUEST, [PROVEN], "2026-11-21T03:00:00Z"))
MANIFESTS = {
    "its own": (MANIFEST, REQUEST, ""),
    "another revision": (
        MANIFEST,
        replace(REQUEST, revision="v2"),
        "the manifest is for revision 'master' instead of 'v2'",
    ),
    "other patterns": (
        MANIFEST,
        replace(REQUEST, include=("*.json",)),
        "the manifest is for include [] instead of ['*.json']",
    ),
    "another hub with the same model: the hashes prove it": (MANIFEST, replace(REQUEST, endpoint="http://mirror"), ""),
    "a later format": ({**MANIFEST, "format_version": 3}, REQUEST, "no complete manifest"),
    "cut short": ({"format_version": 1}, REQUEST, "no complete manifest"),
}


@pytest.mark.parametrize(("manifest", "request_", "expected"), MANIFESTS.values(), ids=MANIFESTS)
def test_manifest_speaks_for_the_request(manifest: dict, request_: Request, expected: str) -> None:
    assert weights_manifest.unusable(weights_manifest.parse_manifest(json.dumps(manifest)), request_) == expected


def test_plan() -> None:
    bad = (BadFile("a.bin", "sha256", "aa", "bb"), BadFile("b.bin", "missing", "2 bytes, sha256 cc", "nothing"))
    assert weights.plan(Current(), REQUEST) == []
    assert weights.plan(Current(missing="no complete manifest"), REQUEST) == [
        "fetch stepfun-ai/tiny@master into /srv/models/stepfun-ai--tiny/master (no complete manifest)"
    ]
    assert weights.plan(Current(bad=bad), REQUEST) == [
        "set aside a.bin (sha256: expected aa, found bb) and fetch it again",
        "fetch b.bin again (missing)",
    ]


FULL_CHECKS = {
    "cheap": ({}, 10, False),
    "asked for": ({"verify": "full"}, 10**12, True),
    "small": ({"full_check_below_bytes": 10}, 10, True),
    "not small": ({"full_check_below_bytes": 10}, 11, False),
}


@pytest.mark.parametrize(("changes", "total", "expected"), FULL_CHECKS.values(), ids=FULL_CHECKS)
def test_full_check(changes: dict, total: int, expected: bool) -> None:
    assert weights_manifest.needs_full_check(replace(REQUEST, **changes), total) is expected


SPACE = {
    "just enough": (100, 150, 50, ""),
    "all there": (0, 150, 150, ""),
    "one byte short": (
        99,
        150,
        50,
        "too little space for the weights in /srv/m: 99 bytes free, 100 bytes needed (150 bytes in all, 50 bytes of it "
        "already there), 1 bytes short. Free that much on this file system, or give a path on a larger one.",
    ),
    "a model": (
        200_000_000_000,
        212_500_000_000,
        0,
        "too little space for the weights in /srv/m: 200.0 GB free, 212.5 GB needed (212.5 GB in all, 0 bytes of it "
        "already there), 12.5 GB short. Free that much on this file system, or give a path on a larger one.",
    ),
}


@pytest.mark.parametrize(("free", "needed", "there", "expected"), SPACE.values(), ids=SPACE)
def test_space(free: int, needed: int, there: int, expected: str) -> None:
    assert weights_progress.space_problem("/srv/m", free, needed, there) == expected


LINES = {
    "in the middle": (12_300_000_000, 212_500_000_000, 410e6, "12.3 of 212.5 GB (5.8 %), 410 MB/s, about 8 min left"),
    "no rate yet": (0, 3_000_000, 0.0, "0.0 of 3.0 MB (0.0 %)"),
    "slow": (0, 400_000_000_000, 5.5e6, "0.0 of 400.0 GB (0.0 %), 5.5 MB/s, about 20.2 h left"),
    "nearly there": (990, 1000, 1.0, "1.0 of 1.0 kB (99.0 %), 0.0 MB/s, about 10 s left"),
    "a model of no bytes": (0, 0, 0.0, "0 of 0 bytes (100.0 %)"),
}


@pytest.mark.parametrize(("done", "total", "rate", "expected"), LINES.values(), ids=LINES)
def test_progress_line(done: int, total: int, rate: float, expected: str) -> None:
    assert weights_progress.progress_line(done, total, rate) == f"downloaded {expected}"


def test_client_gets_the_token_by_its_environment_only() -> None:
    wanted = replace(
        REQUEST, client="/venv/bin/modelscope", endpoint="http://mirror/", include=("*.json",), exclude=("x",)
    )
    base = {"PATH": "/bin", "MODELSCOPE_DOMAIN": "other", "MODELSCOPE_API_TOKEN": "old", "https_proxy": "http://proxy"}
    assert weights_client.client_argv(wanted, ()) == [
        "/venv/bin/modelscope",
        "download",
        "stepfun-ai/tiny",
        "--revision=master",
        "--local-dir=/srv/models/stepfun-ai--tiny/master",
        "--max-workers=8",
        "--include=*.json",
        "--exclude=x",
    ]
    assert weights_client.client_argv(wanted, ("a[1].json",))[-1] == "--include=a[[]1].json"
    assert weights_client.client_environment(wanted, base, TOKEN) == {
        "PATH": "/bin",
        "https_proxy": "http://proxy",
        "MODELSCOPE_API_TOKEN": TOKEN,
        "MODELSCOPE_CACHE": "/srv/models/stepfun-ai--tiny/master/.stepladder/client",
        "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "14400",
        "MODELSCOPE_ENDPOINT": "http://mirror",
        "MODELSCOPE_HOME": "/srv/models/stepfun-ai--tiny/master/.stepladder/client",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }
    assert "MODELSCOPE_API_TOKEN" not in weights_client.client_environment(wanted, base, "")


PATIENCE = {
    # (seconds since the start, bytes there) of each failure, and how long is waited then
    "longer and longer": ([(5, 0), (12, 0), (20, 0), (30, 0)], [2, 4, 8, 16]),
    "a minute at most": ([(1, 0)] * 8, [2, 4, 8, 16, 32, 60, 60, 60]),
    "given up": ([(1, 0), (599, 0), (600, 0)], [2, 1, -1]),
    "a byte starts it anew": ([(1, 0), (590, 0), (599, 7), (1190, 7), (1200, 7)], [2, 4, 1, 2, -1]),
    "what came before, and is fetched anew, is none": ([(10, 50), (20, 20), (30, 50), (610, 50)], [1, 2, 4, -1]),
}  # fmt: skip


@pytest.mark.parametrize(("failures", "expected"), PATIENCE.values(), ids=PATIENCE)
def test_patience(failures: list, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(weights_client.time, "monotonic", lambda: clock[0])
    patience = weights_client.Patience(600, 0)
    found = []
    for seconds, there in failures:
        clock[0] = 1000.0 + seconds
        found.append(patience.failed(there))
    assert found == expected


def test_bytes_that_a_failed_client_removes_are_no_reason_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(weights_client.time, "monotonic", lambda: clock[0])
    patience = weights_client.Patience(600, 0)
    found = []
    # (seconds since the start, bytes there at most while the client ran, bytes there once it had failed)
    for seconds, most, there in ((700, 50, 0), (1400, 80, 0), (1450, 30, 0), (1999, 80, 0), (2000, 80, 0)):
        clock[0] = 1000.0 + seconds
        patience.saw(most)
        found.append(patience.failed(there))
    assert found == [1, 1, 2, 1, -1]


DRIP = """#!/bin/sh
# Brings a byte and fails, until all are there.
for word in "$@"; do case "$word" in --local-dir=*) folder=${word#*=};; esac; done
[ "$(stat -c %s "$folder/a.bin" 2>/dev/null || echo 0)" -lt 6 ] || exit 0
printf x >> "$folder/a.bin"; echo "error: [E1020] Connection failed"; exit 1
"""


def test_a_client_that_brings_some_bytes_each_time_is_never_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_client, "FIRST_PAUSE", 0.01)
    client = tmp_path / "client"
    client.write_text(DRIP)
    client.chmod(0o755)
    wish = replace(REQUEST, path=str(tmp_path / "m"), client=str(client), patience=0, retries=1)
    wish.bookkeeping.mkdir(parents=True)
    ticks: list[int] = []
    progress = weights_progress.Progress(ProgressFile(None), wish.bookkeeping)
    transfer = weights_client.Transfer((), "", {"a.bin": 6}, progress, lambda: ticks.append(1))
    weights_client.download(wish, transfer)
    assert (tmp_path / "m" / "a.bin").read_bytes() == b"xxxxxx"
    assert len(ticks) >= 6  # the rest of an exchange goes on while the hub is waited for
    (tmp_path / "m" / "a.bin").unlink()
    with pytest.raises(WeightsError, match=r"exit status 1 after 1 try, no byte came for 0 s\. "):
        weights_client.download(wish, replace(transfer, sizes={"b.bin": 6}))


REMOVING = """#!/bin/sh
# Brings three bytes of a file, and removes them when it fails, as HuggingFace's client does.
for word in "$@"; do case "$word" in --local-dir=*) folder=${word#*=};; esac; done
part="$folder/PART"
mkdir -p "$(dirname "$part")"; printf xxx > "$part"; sleep 1; rm "$part"
echo "Connection broken"; exit 1
"""


def test_a_client_that_removes_what_it_brought_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_client, "FIRST_PAUSE", 0.01)
    (begun,) = weights_client.begun_files(["a.bin"])
    client = tmp_path / "client"
    client.write_text(REMOVING.replace("PART", f"{begun}.etag.uuid.incomplete"))
    client.chmod(0o755)
    wish = replace(REQUEST, path=str(tmp_path / "m"), client=str(client), patience=0, source="huggingface")
    wish.bookkeeping.mkdir(parents=True)
    progress = weights_progress.Progress(ProgressFile(None), wish.bookkeeping, 0)
    with pytest.raises(WeightsError, match=r"exit status 1 after 2 tries, no byte came for "):
        weights_client.download(wish, weights_client.Transfer((), "", {"a.bin": 6}, progress))
    assert weights_progress.read_state(wish.bookkeeping)["done"] == 3


def test_last_lines_leave_the_banner_and_the_token_out() -> None:
    banner = " _   .-')\n( '.( OO )_  ,--.  `.'   |( OO'\n"
    text = banner + "".join(f"line {number}\n" for number in range(20)) + f"error: {TOKEN} refused\n\n"
    assert weights_client.last_lines(text, TOKEN) == [f"line {number}" for number in range(6, 20)] + [
        "error: ******** refused"
    ]


def test_compare_names_every_difference() -> None:
    wanted = [Listed("a.bin", 3, "aa"), Listed("b.bin", 3, "bb"), Listed("c.bin", 3, "cc"), Listed("d.bin", 3, "")]
    found = {"a.bin": Proven("a.bin", 3, "ff", 0, 0), "b.bin": Proven("b.bin", 4, "bb", 0, 0)}
    found["d.bin"] = Proven("d.bin", 3, "dd", 0, 0)  # a file that the hub lists without a hash is held by its size
    assert weights_manifest.compare(wanted, found) == [
        BadFile("a.bin", "sha256", "aa", "ff"),
        BadFile("b.bin", "size", "3 bytes", "4 bytes"),
        BadFile("c.bin", "missing", "3 bytes, sha256 cc", "nothing"),
    ]


def test_unfinished_files_count_as_there(tmp_path: Path) -> None:
    for name, size in {"a.bin": 10, "b.bin.incomplete": 4, "c.bin_0_4": 5, "c.bin_5_9": 2, "x.txt": 9}.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".stepladder").mkdir()
    (tmp_path / ".stepladder" / "a.bin").write_bytes(bytes(10))
    assert weights_client.bytes_there(tmp_path, {"a.bin": 10, "b.bin": 10, "c.bin": 10}) == 21


def test_what_huggingfaces_client_has_begun_counts_as_there_and_goes(tmp_path: Path) -> None:
    sizes = {"a.bin": 10, "sub/a.bin": 10, "c.bin": 10}
    first, second, _ = weights_client.begun_files(sizes)
    notes = ".cache/huggingface/download/c.bin.metadata"
    # Of two that killed runs left of a file, no more counts than the file has.
    left = {f"{first}.e.1.incomplete": 4, f"{second}.e.1.incomplete": 7, f"{second}.e.2.incomplete": 6, notes: 9}
    for name, size in left.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert weights_client.bytes_by_file(tmp_path, sizes) == {"a.bin": 4, "sub/a.bin": 10}
    weights_client.remove_unfinished(tmp_path, "a.bin", sizes)
    assert weights_client.bytes_there(tmp_path, sizes) == 10
    weights_client.remove_begun(tmp_path)
    assert [name for name, _ in weights_manifest.files_under(tmp_path)] == [notes]
    weights_client.remove_begun(tmp_path / "not there")


# ---- with the real client --------------------------------------------------------------------------------------------


class SlowHub(hub.Hub):
    """Rests after each chunk (1 MiB, or what is left of a file), for as many seconds as a test says."""

    rest = 0.0

    def count(self, path: str, sent: int) -> None:
        super().count(path, sent)
        time.sleep(self.rest)

    def fetched(self) -> dict[str, int]:
        """Bytes that went out since the last call, by file."""
        sent = {path.removeprefix(f"{MODEL}/"): count for path, count in self.bytes_sent.items()}
        self.bytes_sent.clear()
        return sent


@pytest.fixture
def served(tmp_path: Path) -> Iterator[SlowHub]:
    root = tmp_path / "hub" / MODEL
    for name, size in SIZES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(size))
    with SlowHub(tmp_path / "hub") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def wanted(served: SlowHub, tmp_path: Path) -> Request:
    if not CLIENT.exists():
        pytest.skip(f"no modelscope client at {CLIENT}; it comes with requirements/test.txt")
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    return Request(
        model_id=MODEL,
        path=str(tmp_path / "models" / "stepfun-ai--tiny" / "master"),
        client=str(CLIENT),
        endpoint=served.url,
        token_file=str(token),
        progress_file=str(tmp_path / "progress"),
        retries=1,
        patience=0,
    )


def contents(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name, _ in weights_manifest.files_under(root)}


def origin(served: SlowHub) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in served.tree.files(MODEL).items()}


def offline(wanted: Request) -> Request:
    """The same with neither hub nor client: whoever asks one of them fails."""
    return replace(wanted, client="/nonexistent", endpoint="http://127.0.0.1:9")


def flip(path: Path, keep_mtime: bool) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_mtime else 1)))


def test_fresh_then_unchanged_with_the_hub_down(served: SlowHub, wanted: Request) -> None:
    check = weights.ensure(wanted, "present", check_mode=True)
    assert not Path(wanted.path).exists()
    done = weights.ensure(wanted, "present")
    assert check["changed"] is done["changed"] is True
    assert (check["actions"], check["diff"]) == (done["actions"], done["diff"])
    assert done["actions"] == [f"fetch {MODEL}@master into {wanted.path} (no complete manifest)"]
    assert contents(Path(wanted.path)) == origin(served)
    assert (done["files"], done["bytes"], done["bytes_fetched"]) == (5, sum(SIZES.values()), sum(SIZES.values()))
    assert [one["path"] for one in done["remote_code"]] == ["modeling_step.py"]
    assert (done["bad_files"], done["extra_files"]) == ([], [])
    numbers, text = Path(wanted.progress_file).read_text().splitlines()
    assert text == "has everything: 5 files, 3.0 MB, each proven"
    assert json.loads(numbers) == {"phase": "done", "done": sum(SIZES.values()), "total": sum(SIZES.values())}
    told = weights_progress.read_state(wanted.bookkeeping)
    assert (told["phase"], told["text"]) == ("done", text)
    manifest = json.loads(Path(done["manifest"]).read_text())
    assert [one["path"] for one in manifest["files"]] == sorted(SIZES)

    (Path(wanted.path) / "notes.txt").write_text("mine")
    for again in (
        weights.ensure(offline(wanted), "present", check_mode=True),
        weights.ensure(offline(wanted), "present"),
    ):
        assert (again["changed"], again["actions"], again["hashed_bytes"]) == (False, [], 0)
        assert (again["files"], again["extra_files"]) == (5, ["notes.txt"])
    assert weights_progress.read_state(wanted.bookkeeping) == told


def test_a_pinned_revision_is_fetched_beside_another(served: SlowHub, wanted: Request, tmp_path: Path) -> None:
    weights.ensure(wanted, "present")
    pinned = tmp_path / "hub" / f"{MODEL}@v2"
    pinned.mkdir()
    (pinned / "config.json").write_bytes(b"second")
    chosen = replace(wanted, revision="v2", path=str(Path(wanted.path).with_name("v2")))
    assert weights.ensure(chosen, "present")["files"] == 1
    assert contents(Path(chosen.path)) == {"config.json": b"second"}
    assert contents(Path(wanted.path)) == origin(served)
    with pytest.raises(WeightsError, match=f"the hub answered 404 for {MODEL}@v3"):
        weights.ensure(replace(wanted, revision="v3", path=str(Path(wanted.path).with_name("v3"))), "present")


def test_a_touched_file_is_hashed_once(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    (Path(wanted.path) / "config.json").touch()
    for check_mode in (True, False):
        noted = weights.ensure(offline(wanted), "present", check_mode)
        assert noted["actions"] == ["note that config.json is still right, though it was touched"]
        assert (noted["changed"], noted["hashed_bytes"], noted["files"]) == (True, SIZES["config.json"], 5)
    again = weights.ensure(offline(wanted), "present")
    assert (again["changed"], again["hashed_bytes"]) == (False, 0)


def test_what_a_look_has_read_of_touched_files_is_not_read_again(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    file = Path(wanted.path) / "config.json"
    file.touch()
    seen = weights.look(offline(wanted))
    assert (seen["complete"], seen["wanted"], len(seen["listing"])) == (True, [], 5)
    assert seen["actions"] == ["note that config.json is still right, though it was touched"]
    assert [one["path"] for one in seen["touched"]] == ["config.json"]
    given = replace(offline(wanted), seen=tuple(seen["touched"]))
    assert weights.look(given)["touched"] == seen["touched"]
    assert weights.ensure(replace(given, verify="full"), "present", True)["hashed_bytes"] == sum(SIZES.values())
    noted = weights.ensure(given, "present")
    assert (noted["changed"], noted["hashed_bytes"]) == (True, 0)
    assert weights.ensure(offline(wanted), "present")["changed"] is False
    file.touch()  # since the look
    assert weights.ensure(given, "present")["hashed_bytes"] == SIZES["config.json"]
    flip(Path(wanted.path) / "model-1.safetensors", keep_mtime=False)
    stale = replace(given, seen=tuple(json.loads(wanted.manifest.read_text())["files"]))
    assert [one["path"] for one in weights.ensure(stale, "present", True)["bad_files"]] == ["model-1.safetensors"]


def test_a_store_whose_files_were_only_touched_is_given_to_peers(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.ensure(wanted, "present")
    (Path(wanted.path) / "config.json").touch()
    given: list[tuple[list[str], bool]] = []

    def pass_on(request: Request, files: list[Proven], progress: object) -> list[str]:
        given.append((sorted(one.path for one in files), request.marker.exists()))
        return []

    monkeypatch.setattr(weights, "pass_on", pass_on)
    weights.ensure(replace(offline(wanted), spread={"run": "r"}), "present", check_mode=True)
    assert given == []
    weights.ensure(replace(offline(wanted), spread={"run": "r"}), "present")
    assert given == [(sorted(SIZES), True)]


FLIPS = {
    "mtime changed, cheap check": (False, {}),
    "mtime unchanged, asked for": (True, {"verify": "full"}),
    "mtime unchanged, small model": (True, {"full_check_below_bytes": 10**9}),
}


@pytest.mark.parametrize(("keep_mtime", "changes"), FLIPS.values(), ids=FLIPS)
def test_flipped_byte_is_found_and_only_its_file_fetched(
    served: SlowHub, wanted: Request, keep_mtime: bool, changes: dict
) -> None:
    weights.ensure(wanted, "present")
    served.fetched()
    name = "model-1.safetensors"
    file = Path(wanted.path) / name
    flip(file, keep_mtime)
    wrong = file.read_bytes()
    if keep_mtime:
        assert weights.ensure(offline(wanted), "present")["changed"] is False  # what the cheap check cannot see
    check = weights.ensure(replace(offline(wanted), **changes), "present", check_mode=True)
    assert file.read_bytes() == wrong
    done = weights.ensure(replace(wanted, **changes), "present")
    assert (check["changed"], check["actions"]) == (done["changed"], done["actions"])
    assert served.fetched() == {name: SIZES[name]}
    quarantine = Path(wanted.path) / ".stepladder" / "quarantine" / f"{name}.1"
    expected, found = (weights_manifest.hash_file(path.parent, path.name, False).sha256 for path in (file, quarantine))
    assert done["bad_files"] == [
        {"path": name, "reason": "sha256", "expected": expected, "found": found, "quarantine": str(quarantine)}
    ]
    assert quarantine.read_bytes() == wrong
    assert contents(Path(wanted.path)) == origin(served)
    assert weights.ensure(replace(offline(wanted), **changes), "present")["changed"] is False


def test_missing_and_short_files_come_back_together(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    served.fetched()
    (Path(wanted.path) / "sub" / "notes.txt").unlink()
    (Path(wanted.path) / "config.json").write_bytes(b"{")
    done = weights.ensure(wanted, "present")
    assert [(one["path"], one["reason"], one["found"]) for one in done["bad_files"]] == [
        ("config.json", "size", "1 bytes"),
        ("sub/notes.txt", "missing", "nothing"),
    ]
    assert served.fetched() == {"config.json": SIZES["config.json"], "sub/notes.txt": SIZES["sub/notes.txt"]}
    assert contents(Path(wanted.path)) == origin(served)


def test_a_repair_asks_for_its_file_alone_and_while_it_lasts_nothing_is_complete(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.ensure(wanted, "present")
    flip(Path(wanted.path) / "model-1.safetensors", keep_mtime=False)
    run, seen = weights_client.run_client, []

    def watch(request: Request, transfer: weights_client.Transfer) -> tuple[int, str]:
        seen.append((transfer.only, wanted.marker.exists()))
        return run(request, transfer)

    monkeypatch.setattr(weights_client, "run_client", watch)
    weights.ensure(wanted, "present")
    # By name: asked for all, the client would read every file of the model again.
    assert seen == [(("model-1.safetensors",), False)]


def test_a_wrong_file_is_named_and_out_of_reach_when_the_hub_is_down(served: SlowHub, wanted: Request) -> None:
    weights.ensure(wanted, "present")
    flip(Path(wanted.path) / "model-1.safetensors", keep_mtime=True)
    with pytest.raises(WeightsError) as error:
        weights.ensure(replace(offline(wanted), verify="full"), "present")
    first, *rest = str(error.value).splitlines()
    assert first.startswith("the hub at http://127.0.0.1:9 gave no listing of stepfun-ai/tiny@master, asked 1 times: ")
    assert rest[0] == f"This was to mend the files in {wanted.path}:"
    assert rest[1].startswith("  set aside model-1.safetensors (sha256: expected ")
    (bad,) = error.value.facts["bad_files"]
    # No engine can start with it from now on, a running one keeps what it has read.
    assert not (Path(wanted.path) / "model-1.safetensors").exists()
    assert Path(bad["quarantine"]).stat().st_size == SIZES["model-1.safetensors"]
    assert not wanted.marker.exists()
    served.fetched()
    done = weights.ensure(wanted, "present")
    assert served.fetched() == {"model-1.safetensors": SIZES["model-1.safetensors"]}
    assert done["hashed_bytes"] == SIZES["model-1.safetensors"]


RUN = """
import json, sys
from ansible_collections.stepladder.core.plugins.module_utils import weights
try:
    print(json.dumps(weights.ensure(weights.Request(**json.loads(sys.argv[1])), "present")))
except weights.WeightsError as error:
    sys.exit(f"WeightsError: {error}")
"""


def start(wanted: Request) -> subprocess.Popen[str]:
    arguments = json.dumps({name: getattr(wanted, name) for name in Request.__dataclass_fields__})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: object, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def clients_of(wanted: Request) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if f"--local-dir={wanted.path}" in argv:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_killed_in_the_middle_then_run_again(served: SlowHub, wanted: Request, how: signal.Signals) -> None:
    served.rest = 1.0
    partial = Path(wanted.path) / "model-1.safetensors.incomplete"
    run = start(wanted)
    wait_for(lambda: partial.exists() and partial.stat().st_size >= 1 << 20)
    run.send_signal(how)
    _, said = run.communicate(timeout=20)
    if how == signal.SIGTERM:
        assert said == "WeightsError: stopped by SIGTERM. What was fetched is kept: run this again to go on.\n"
    wait_for(lambda: not clients_of(wanted))
    kept = partial.stat().st_size
    assert 0 < kept < SIZES["model-1.safetensors"]
    assert not wanted.marker.exists()
    served.rest = 0.0
    time.sleep(1.2)  # the hub's threads finish what they were at
    served.fetched()
    done = weights.ensure(wanted, "present")
    assert served.fetched()["model-1.safetensors"] == SIZES["model-1.safetensors"] - kept
    assert done["bytes_fetched"] <= sum(SIZES.values()) - kept
    assert contents(Path(wanted.path)) == origin(served)


def test_a_client_that_is_halted_ends_with_its_module(served: SlowHub, wanted: Request) -> None:
    served.rest = 0.2
    run = start(replace(wanted, bytes_per_second=1000))
    halted: list[int] = []

    def is_halted() -> bool:
        halted[:] = [pid for pid in clients_of(wanted) if "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()]
        return bool(halted)

    wait_for(is_halted)
    run.kill()
    run.communicate(timeout=20)
    try:
        wait_for(lambda: not clients_of(wanted), 5)
    finally:
        for pid in clients_of(wanted):
            os.kill(pid, signal.SIGKILL)


def test_deadline_stops_the_client(served: SlowHub, wanted: Request) -> None:
    served.rest = 2.0
    with pytest.raises(WeightsError) as error:
        weights.ensure(replace(wanted, deadline=1.5), "present")
    assert str(error.value) == (
        f"the download of {MODEL}@master did not end in 1.5 s (deadline) and was stopped. "
        "What was fetched is kept: run this again to go on, or give a longer deadline."
    )
    assert clients_of(wanted) == []
    assert not wanted.marker.exists()


def test_wrong_hash_in_the_listing_fails_in_the_client(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = served.tree.listing

    def wrong(model: str, root: str, *, recursive: bool) -> list[dict]:
        return [
            {**one, "Sha256": "0" * 64} if one["Path"] == "config.json" else one
            for one in right(model, root, recursive=recursive)
        ]

    monkeypatch.setattr(served.tree, "listing", wrong)
    with pytest.raises(WeightsError) as error:
        weights.ensure(replace(wanted, retries=3), "present")
    message = str(error.value)
    assert message.startswith(
        f"{CLIENT} could not fetch {MODEL}@master: exit status 1 after 1 try, the error is a lasting one. "
        "Files that are whole are kept: mend what its last lines name, then run this again to go on.\n"
    )
    assert "config.json: [E2020] Hash mismatch for config.json: expected 0000000000000000..." in message
    assert error.value.facts["client_status"] == 1
    assert not wanted.marker.exists()


def test_what_the_client_took_for_right_is_held_against_the_listing(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = served.tree.listing
    calls = iter([True])

    def wrong_once(model: str, root: str, *, recursive: bool) -> list[dict]:
        wrong = next(calls, False)
        return [
            {**one, "Sha256": "0" * 64} if wrong and one["Path"] == "config.json" else one
            for one in right(model, root, recursive=recursive)
        ]

    monkeypatch.setattr(served.tree, "listing", wrong_once)
    with pytest.raises(WeightsError) as error:
        weights.ensure(wanted, "present")
    found = weights_manifest.hash_file(Path(wanted.path), "config.json", False).sha256
    assert str(error.value) == (
        f"1 of 5 files of {MODEL}@master in {wanted.path} are not what the source lists:\n"
        f"  config.json: sha256: expected {'0' * 64}, found {found}\n"
        "Run this again: a wrong file is fetched anew. If it stays, the revision moved meanwhile (pin a commit as "
        "deployment_revision), or something between this node and the source changes the data."
    )
    assert not wanted.marker.exists()
    assert weights.ensure(wanted, "present")["changed"] is True


def test_a_large_file_comes_over_several_connections(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # What is large, and its parts, are smaller here.
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_PARALLEL_THRESHOLD_MB", "1")
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_PART_SIZE_MB", "1")
    wanted.bookkeeping.mkdir(parents=True)
    progress = weights_progress.Progress(ProgressFile(None), wanted.bookkeeping)
    name = "model-1.safetensors"
    weights_client.download(wanted, weights_client.Transfer((name,), TOKEN, SIZES, progress, streams=3))
    assert contents(Path(wanted.path)) == {name: origin(served)[name]}
    ranges = {line.partition("range=")[2].split()[0] for line in capfd.readouterr().out.splitlines() if name in line}
    assert ranges == {"bytes=0-1048575", "bytes=1048576-2097151", "bytes=2097152-2999999"}


def test_a_cut_connection_is_mended_by_the_client(served: SlowHub, wanted: Request) -> None:
    served.faults.cut(f"{MODEL}/model-1.safetensors", 1_500_000)
    weights.ensure(wanted, "present")
    assert contents(Path(wanted.path)) == origin(served)


def test_too_little_space_is_said_before_anything_is_asked(wanted: Request) -> None:
    with pytest.raises(
        WeightsError, match=rf"^too little space for the weights in {wanted.path}: .* 1000000\.0 TB needed"
    ):
        weights.ensure(replace(offline(wanted), expected_bytes=10**18), "present")


def test_too_little_space_for_what_the_hub_lists(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(
        WeightsError, match=r": 1\.0 MB free, 3\.0 MB needed \(3\.0 MB in all, 0 bytes of it already there"
    ):
        weights.ensure(wanted, "present")
    assert served.fetched() == {}


def test_what_turns_out_wrong_is_not_there_and_the_space_is_held_against_it_again(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, name = Path(wanted.path), "model-1.safetensors"
    root.mkdir(parents=True)
    (root / name).write_bytes(os.urandom(SIZES[name]))  # of the right size, and not what the hub lists
    monkeypatch.setattr(weights, "free_bytes", lambda path: 1_000_000)
    aside = wanted.bookkeeping / "quarantine"
    with pytest.raises(
        WeightsError,
        match=r": 1\.0 MB free, 3\.0 MB needed \(3\.0 MB in all, 0 bytes of it already there\), 2\.0 MB short\. .* "
        rf"3\.0 MB are wrong files that were set aside in {aside}: look at them, and remove them\.$",
    ):
        weights.ensure(wanted, "present")
    assert served.fetched() == {}
    assert (aside / f"{name}.1").stat().st_size == SIZES[name]
    shutil.rmtree(aside)
    monkeypatch.setattr(weights, "free_bytes", lambda path: 4_000_000)
    weights.ensure(wanted, "present")
    assert contents(root) == origin(served)


def test_what_a_broken_exchange_left_takes_no_room(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = wanted.incoming / "model-1.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1_000_000))
    total = sum(path.stat().st_size for path in served.tree.files(MODEL).values())
    # A disk that the model just fits on.
    monkeypatch.setattr(weights, "free_bytes", lambda path: total - weights_store.tree_bytes(wanted.incoming))
    assert weights.look(wanted)["wanted"]
    assert part.exists()
    assert weights.tidy_incoming(wanted, {"model-1.safetensors"}) >= 1_000_000
    weights.ensure(replace(wanted, expected_bytes=total), "present")
    assert not wanted.incoming.exists()
    assert contents(Path(wanted.path)) == origin(served)


def test_an_exchange_goes_on_with_what_a_broken_one_left(wanted: Request) -> None:
    (wanted.incoming / "sub").mkdir(parents=True)
    for name in ("sub/a", "b", "c"):
        (wanted.incoming / name).write_bytes(bytes(100_000))
    assert 100_000 <= weights.tidy_incoming(wanted, {"sub/a", "d"}) < 200_000
    assert [path.name for path in wanted.incoming.rglob("*") if path.is_file()] == ["a"]
    assert weights.tidy_incoming(wanted) == 0
    assert not wanted.incoming.exists()


def test_two_at_once(served: SlowHub, wanted: Request) -> None:
    served.rest = 0.5
    first, second = start(wanted), None
    try:
        wait_for(lambda: clients_of(wanted))
        with pytest.raises(WeightsError) as error:
            weights.ensure(replace(wanted, lock_timeout=0.1), "present")
        assert str(error.value).startswith(
            f"another run works on {wanted.path}: {wanted.path}.lock was held for 0 s by process {first.pid}; "
        )
        second = start(wanted)
        answers = [json.loads(run.communicate(timeout=60)[0]) for run in (first, second)]
    finally:
        for run in filter(None, (first, second)):
            run.kill()
    assert [one["changed"] for one in answers] == [True, False]
    assert served.fetched() == {name: size for name, size in SIZES.items() if size}


def test_patterns_choose_files(served: SlowHub, wanted: Request) -> None:
    chosen = replace(wanted, include=("*.json", "*.py"), exclude=("modeling*",))
    weights.ensure(chosen, "present")
    assert set(contents(Path(wanted.path))) == {"config.json"}
    assert weights.ensure(offline(chosen), "present")["changed"] is False
    widened = weights.ensure(wanted, "present")
    assert widened["actions"] == [
        f"fetch {MODEL}@master into {wanted.path} "
        "(the manifest is for include ['*.json', '*.py'] instead of [], exclude ['modeling*'] instead of [])"
    ]
    with pytest.raises(WeightsError, match="has no files that include"):
        weights.ensure(replace(wanted, include=("*.gguf",)), "present")


INDEX = {"weight_map": {"a": "model-1.safetensors", "vision_model.b": "model-2.safetensors"}}
LEFT_OUT = {
    "all that it names": ({"exclude": ("*.txt",)}, INDEX, ""),
    "a file with tensors": (
        {"exclude": ("model-2*",)}, INDEX,
        "include [] and exclude ['model-2*'] leave out 1 of the 2 files that model.safetensors.index.json of "
        "stepfun-ai/tiny@master names, first model-2.safetensors: engines do not load it so, the vision tower of a "
        "text-only start included. Change the patterns; what was fetched is kept.",
    ),
    "without patterns the hub is believed": ({}, {"weight_map": {"a": "model-3.safetensors"}}, ""),
    "no index": ({"exclude": ("model-2*",)}, ["weight_map"], ""),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "index", "message"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_patterns_that_leave_out_what_the_index_names(
    served: SlowHub, wanted: Request, tmp_path: Path, changes: dict, index: object, message: str
) -> None:
    root = tmp_path / "hub" / MODEL
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "model-2.safetensors").write_bytes(b"tower")
    said = ""
    try:
        weights.ensure(replace(wanted, **changes), "present")
    except WeightsError as error:
        said = str(error)
    assert said == message
    assert wanted.marker.exists() is not bool(message)
    if message:
        assert set(served.fetched()) == {"model.safetensors.index.json"}


REFUSALS = {
    "unknown model": ({"model_id": "stepfun-ai/none"}, 0, "the hub answered 404 for stepfun-ai/none@master ("),
    "unknown revision": ({"revision": "v9"}, 0, "the hub answered 404 for stepfun-ai/tiny@v9 ("),
    "no right to read": ({}, 403, "the hub answered 403 for stepfun-ai/tiny@master ("),
    "broken hub": ({}, 500, "the hub at http://127.0.0.1:"),
    "no client": (
        {"client": "/nonexistent/modelscope"},
        0,
        "the client /nonexistent/modelscope cannot be started: No such",
    ),
    "no token": ({"token_file": "/nonexistent/token"}, 0, "token_file /nonexistent/token cannot be read: No such file"),
}


@pytest.mark.parametrize(("changes", "status", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(served: SlowHub, wanted: Request, changes: dict, status: int, message: str) -> None:
    if status:
        served.faults.answer(status)
    with pytest.raises(WeightsError) as error:
        weights.ensure(replace(wanted, **changes), "present")
    assert str(error.value).startswith(message)
    assert not wanted.marker.exists()


def test_absent(served: SlowHub, wanted: Request) -> None:
    other = replace(wanted, path=str(Path(wanted.path).parent / "mine"))
    Path(other.path).mkdir(parents=True)
    with pytest.raises(WeightsError, match="is no directory that this module filled"):
        weights.ensure(other, "absent")
    weights.ensure(wanted, "present")
    for check_mode, changed in ((True, True), (False, True), (True, False), (False, False)):
        assert weights.ensure(wanted, "absent", check_mode)["changed"] is changed
    assert not Path(wanted.path).exists()


def test_the_token_is_sent_and_never_said(
    served: SlowHub, wanted: Request, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = []
    answer = hub.Handler._answer

    def answer_and_note(self: hub.Handler) -> None:
        sent.append(self.headers.get("Authorization"))
        answer(self)

    monkeypatch.setattr(hub.Handler, "_answer", answer_and_note)
    served.faults.cut(f"{MODEL}/config.json", 10)
    said = json.dumps(weights.ensure(wanted, "present"))
    assert f"Bearer {TOKEN}" in sent
    flip(Path(wanted.path) / "model-1.safetensors", keep_mtime=False)
    served.faults.answer(403)
    with pytest.raises(WeightsError) as error:
        weights.ensure(wanted, "present")
    said += str(error.value) + json.dumps(error.value.facts) + "".join(capfd.readouterr())
    files = [path for path in Path(wanted.path).parent.rglob("*") if path.is_file()]
    assert len(files) > len(SIZES)
    assert TOKEN not in said
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
