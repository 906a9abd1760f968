"""One revision of a model in a directory of its own: fetched, proven by SHA-256, then never written again.

Standard library only: this runs on the node, under any Python from 3.9 on.

The directory is complete when `<path>/.stepladder/complete` is there and names the manifest beside it: it is written
last, by rename, after every file was hashed against the hub's own listing. Everything else is an unfinished run, whose
bytes the next one uses: what it has proven stands in `proven.jsonl` and is not read again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile
from ansible_collections.stepladder.core.plugins.module_utils.weights_client import (
    HF_LEFTOVERS,
    Transfer,
    bytes_there,
    download,
    remove_begun,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_copy import bring, list_source
from ansible_collections.stepladder.core.plugins.module_utils.weights_hub import (
    ONE_TRY_SECONDS,
    read_token,
    wanted_files,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_lease import locked
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import (
    GIT_BLOB,
    OTHER,
    BadFile,
    Current,
    Listed,
    Proven,
    Prover,
    code_of,
    compare,
    files_under,
    hash_file,
    inspect,
    known_code,
    parse_manifest,
    read_or_empty,
    seal,
    set_aside,
    stat_or_none,
    unseal,
    unusable,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_progress import (
    PROGRESS_SECONDS,
    Progress,
    amount,
    free_bytes,
    full_disk,
    space_problem,
    utc_now,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import (
    BOOKKEEPING,
    Request,
    WeightsError,
    endpoint_of,
    problems,
)
from ansible_collections.stepladder.core.plugins.module_utils.weights_spread import Exchange
from ansible_collections.stepladder.core.plugins.module_utils.weights_store import remove, tree_bytes, users_of

MOST_WARNINGS = 10
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
CODE = ("path", "sha256", "git_blob")
LISTED = (*CODE, "size")
MOST_NAMED_FILES = 200  # in one run of the client, so that its command line stays short


@dataclass
class Outcome:
    """What was done, in the module's return values."""

    changed: bool = False
    actions: list[str] = field(default_factory=list)
    files: list[Proven] = field(default_factory=list)
    bytes_fetched: int = 0
    bytes_from_peers: int = 0
    warnings: list[str] = field(default_factory=list)
    bad_files: list[BadFile] = field(default_factory=list)
    extra_files: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    hashed_bytes: int = 0
    hash_seconds: float = 0.0

    def as_result(self, request: Request, seconds: float) -> dict[str, Any]:
        """Turn into what exit_json takes."""
        rate = self.hashed_bytes / self.hash_seconds / 1e9 if self.hash_seconds else 0.0
        return {
            "changed": self.changed,
            "actions": self.actions,
            "diff": {"before": self.before, "after": self.after},
            "files": len(self.files),
            "bytes": sum(one.size for one in self.files),
            "bytes_fetched": self.bytes_fetched,
            "bytes_from_peers": self.bytes_from_peers,
            "warnings": self.warnings[:MOST_WARNINGS],
            "seconds": round(seconds, 1),
            "manifest": str(request.manifest),
            "bad_files": [asdict(one) for one in self.bad_files],
            "extra_files": self.extra_files,
            "remote_code": code_of(self.files),
            "hashed_bytes": self.hashed_bytes,
            "hash_gigabytes_per_second": round(rate, 2),
        }


def plan(current: Current, request: Request) -> list[str]:
    """Say what would be done to get from what is there to what is wanted; an empty list is: nothing."""
    if current.missing:
        return [f"fetch {request.name} into {request.path} ({current.missing})"]
    return [
        f"fetch {one.path} again ({one.reason})"
        if one.reason == "missing"
        else f"set aside {one.path} ({one.reason}: expected {one.expected}, found {one.found}) and fetch it again"
        for one in current.bad
    ] + [f"note that {path} is still right, though it was touched" for path in current.touched]


def check_space(request: Request, needed: int, there: int) -> None:
    """Raise WeightsError when what is still to come does not fit."""
    problem = space_problem(request.path, free_bytes(Path(request.path)), needed, there)
    if problem:
        aside = request.bookkeeping / "quarantine"
        held = tree_bytes(aside)
        if held:
            problem += f" {amount(held)} are wrong files that were set aside in {aside}: look at them, and remove them."
        raise WeightsError(problem)


def listing(request: Request) -> list[Listed]:
    """What the source has of the wanted files, or a node that is complete.

    Raises WeightsError when the source cannot say, or has none.
    """
    if request.listing:
        return [Listed(str(one["path"]), int(one["size"]), str(one["sha256"])) for one in request.listing]
    found: list[Listed] = wanted_files(request, read_token(request)) if request.lists_hashes else list_source(request)
    return found


def list_within(request: Request, seconds: float) -> list[Listed]:
    """`listing` in one try and with a limit that holds for the look-up of names too, which knows none.

    Raises WeightsError when the source cannot say in time.
    """
    answers: queue.Queue[list[Listed] | WeightsError] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(listing(replace(request, retries=1)))
        except WeightsError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        source = endpoint_of(request) or request.source_path
        raise WeightsError(f"{source} gave no listing of {request.name} in {seconds:.0f} s.") from None
    if isinstance(answer, WeightsError):
        raise answer
    return answer


def fetch(request: Request, current: Current, progress: Progress, outcome: Outcome) -> None:
    """Fetch what is not proven yet, prove it, and seal the directory; what came of it goes into the outcome.

    Wrong files are set aside first, whatever the source says then: they must not be read again.
    Raises WeightsError when the source gives no listing, the space is too small, or a file stays wrong.
    """
    root = Path(request.path)
    until = time.monotonic() + request.deadline
    if current.bad:
        unseal(request, current.good)
        outcome.bad_files = set_aside(request, current.bad)
    token = read_token(request) if request.lists_hashes else ""
    wanted = listing(request)
    sizes = {one.path: one.size for one in wanted}
    remove_begun(root)
    there = bytes_there(root, sizes)
    kept = {one.path: one for one in current.good}
    missing = [one for one in wanted if compare([one], kept)]
    arrived = tidy_incoming(request, {one.path for one in missing} if request.spread else ())
    check_space(request, sum(sizes.values()), there + arrived)
    if not current.bad:
        unseal(request, current.good)
    prover = Prover(request, missing)

    def complete() -> None:
        prover.look(wait=True)
        expected = [prover.expected(one) for one in wanted]
        outcome.files = proven_files(request, expected, {**kept, **prover.proven}, prover.bad)
        tidy_incoming(request)
        seal(request, outcome.files, utc_now())

    drop_unproven(request, missing)
    transfer = Transfer((), token, sizes, progress, prover.look, until)
    exchange = Exchange(request, wanted, prover, transfer) if request.spread else None
    with contextlib.closing(prover), contextlib.ExitStack() as opened:
        if exchange:  # before what lies there is read: peers would give up a node that listens so late
            exchange.start(kept.values())
            opened.callback(exchange.close)
        prover.look(wait=True, progress=progress)
        outcome.bad_files += clear_leftovers(request, missing, prover)
        # What was wrong had been counted as there.
        check_space(request, sum(sizes.values()), bytes_there(root, sizes) + tree_bytes(request.incoming))
        fetch_index(request, missing, transfer, prover)
        missing = [one for one in missing if one.path not in prover.proven]
        if not any(one.path in INDEXES for one in missing):
            refuse_left_out(request, wanted)
        if exchange:
            exchange.run(prover.proven.values(), missing, complete)
            outcome.bad_files += exchange.bad
            outcome.bytes_from_peers, outcome.warnings = exchange.from_peers, exchange.troubles
        else:
            if missing:
                bring_missing(request, missing, transfer, prover)
            complete()
    outcome.warnings += without_hash(request, wanted)
    outcome.bytes_fetched = max(0, bytes_there(root, sizes) - there)
    outcome.hashed_bytes += prover.hashed_bytes
    outcome.hash_seconds += prover.hash_seconds


def proven_files(
    request: Request, wanted: Sequence[Listed], proven: dict[str, Proven], wrong: Mapping[str, BadFile]
) -> list[Proven]:
    """Every wanted file as it was proven; what the clients leave beside them is removed.

    Raises WeightsError, naming all, when some are not what the source lists.
    """
    root = Path(request.path)
    # The wrong ones as they are, for the message.
    found = {**proven, **{path: hash_file(root, path, durable=False) for path in wrong}}
    bad = compare(wanted, found)
    if bad:
        if not request.lists_hashes:  # the next run has nothing to see by that they are wrong
            set_aside(request, list(wrong.values()))
        raise WeightsError(
            f"{len(bad)} of {len(wanted)} files of {request.name} in {request.path} are not what the source lists:\n"
            + "\n".join(f"  {one.path}: {one.reason}: expected {one.expected}, found {one.found}" for one in bad)
            + "\nRun this again: a wrong file is fetched anew. If it stays, the revision moved meanwhile "
            "(pin a commit as deployment_revision), or something between this node and the source changes the data.",
            bad_files=[asdict(one) for one in bad],
        )
    refuse_left_out(request, wanted)
    shutil.rmtree(root / HF_LEFTOVERS, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds something of the model's, or was never there
        (root / HF_LEFTOVERS).parent.rmdir()
    return [proven[one.path] for one in wanted]


def refuse_left_out(request: Request, wanted: Sequence[Listed]) -> None:
    """Raise WeightsError when the patterns leave out files with tensors that the model's index names.

    vLLM refuses to load such a model, for a text-only start too (0.33.0, filter_duplicate_safetensors_files).
    """
    if not (request.include or request.exclude):
        return
    there = {one.path for one in wanted}
    for name in sorted(there & set(INDEXES)):
        try:
            named = set(json.loads((Path(request.path) / name).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the hub's own file, proven: whatever it is, it is no index
        lost = sorted(named - there)
        if lost:
            raise WeightsError(
                f"include {list(request.include)} and exclude {list(request.exclude)} leave out {len(lost)} of the "
                f"{len(named)} files that {name} of {request.name} names, first {lost[0]}: engines do not load it so, "
                "the vision tower of a text-only start included. Change the patterns; what was fetched is kept."
            )


def drop_unproven(request: Request, missing: Sequence[Listed]) -> None:
    """Remove what a killed run copied and did not read again, where nothing tells whether it is right."""
    for one in missing:
        if not one.sha256 and not request.lists_hashes:
            (Path(request.path) / one.path).unlink(missing_ok=True)


def without_hash(request: Request, wanted: Sequence[Listed]) -> list[str]:
    """What is said of files for which the source has no hash; empty where it has all."""
    bare = [one.path for one in wanted if not one.sha256]
    if not bare:
        return []
    mend = " Put SHA256SUMS beside the files at their origin: sha256sum $(find -type f)."
    return [
        f"{len(bare)} of {len(wanted)} files of {request.name} have no hash to hold against, first {bare[0]}: the "
        f"{request.source} {endpoint_of(request) or request.source_path} lists none, so they are taken as they were "
        f"read.{'' if request.lists_hashes else mend}"
    ]


def fetch_index(request: Request, missing: Sequence[Listed], transfer: Transfer, prover: Prover) -> None:
    """Bring the model's index before the rest and prove it, so that wrong patterns cost no hours.

    Not out of an archive, which would have to be read once more for it; and not where another node has everything.
    """
    index = [one for one in missing if one.path in INDEXES and one.path not in prover.proven]
    worth_it = request.source != "archive" and not request.listing
    if index and worth_it and (request.include or request.exclude):
        bring_missing(request, index, transfer, prover)
        prover.look(wait=True)


def tidy_incoming(request: Request, wanted: Collection[str] = ()) -> int:
    """Remove what a broken exchange left of files, but for those wanted; returns the bytes on the disk of these.

    Args:
        wanted: paths of files that the next exchange goes on with.
    """
    folder = request.incoming
    for name, _ in list(files_under(folder)):
        if name not in wanted:
            (folder / name).unlink(missing_ok=True)
    if not wanted:
        shutil.rmtree(folder, ignore_errors=True)  # empty folders
    left: int = tree_bytes(folder)
    return left


def pass_on(request: Request, files: Sequence[Proven], progress: Progress) -> list[str]:
    """Give the files of a complete directory to peers until each has them or is gone; returns what was amiss."""
    wanted = [Listed(one.path, one.size, one.sha256) for one in files]
    sizes = {one.path: one.size for one in wanted}
    prover = Prover(request, ())
    until = time.monotonic() + request.deadline
    exchange = Exchange(request, wanted, prover, Transfer((), "", sizes, progress, prover.look, until))
    with contextlib.closing(prover):
        exchange.start(files)
        with contextlib.closing(exchange):
            exchange.run((), (), prover.look)
    troubles: list[str] = exchange.troubles
    return troubles


def clear_leftovers(request: Request, missing: Sequence[Listed], prover: Prover) -> list[BadFile]:
    """Set aside files of an unfinished run, or of somebody else's, that lie under a wanted name and are wrong."""
    wrong = list(prover.bad.values())
    for one in missing:
        stat = stat_or_none(Path(request.path) / one.path)
        if stat is not None and stat.st_size != one.size:
            wrong.append(BadFile(one.path, "size", f"{one.size} bytes", f"{stat.st_size} bytes"))
    moved: list[BadFile] = set_aside(request, wrong)
    for one in wrong:
        prover.forget(one.path)
    return moved


def bring_missing(request: Request, missing: Sequence[Listed], transfer: Transfer, prover: Prover) -> None:
    """Fetch files from the source, proving them as they arrive; WeightsError when it does not give them.

    A hub's client is asked for the revision without naming files where nothing is there yet.
    """
    if not request.lists_hashes:
        total = sum(transfer.sizes.values())

        def tick() -> None:
            transfer.tick()
            transfer.progress.fetching(bytes_there(Path(request.path), transfer.sizes), total)

        bring(request, missing, tick, prover.expect)
        return
    names = [one.path for one in missing]
    if len(names) == len(transfer.sizes):
        download(request, transfer)
        return
    for start in range(0, len(names), MOST_NAMED_FILES):
        download(request, replace(transfer, only=tuple(names[start : start + MOST_NAMED_FILES])))


def look(
    request: Request,
    check_mode: bool = False,
    current_release: str = "",
    *,
    code_only: bool = False,
    local: bool = False,
) -> dict[str, Any]:
    """Say what is there, and what the source has of it; changes nothing.

    In check mode a source that does not answer, such as a hub that is to be started yet, is no failure.

    Args:
        current_release: directory of the release that runs; '' for none.
        code_only: only the Python code is asked about: space does not matter, and the source has a few seconds.
        local: the source is not asked.

    Raises:
        WeightsError: it cannot say, or what is to come does not fit.
    """
    found = problems(request)
    if found:
        raise WeightsError("\n".join(found))
    root = Path(request.path)
    current = inspect(request, Progress(ProgressFile(None), Path(os.devnull)))
    if not code_only:
        refuse_other_patterns(request, current)
    actions = plan(current, request)
    complete = not (current.missing or current.bad)
    before, files = code_before(root, request.model_id, current_release)
    answer = {
        "model_id": request.model_id,
        "revision": request.revision,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "complete": complete,
        "actions": actions,
        "touched": [asdict(one) for one in current.good if one.path in current.touched],
        "listing": [{key: getattr(one, key) for key in LISTED} for one in current.good] if complete else [],
        "wanted": [],
        "have": [],
        "remote_code": as_listed(request, code_of(current.good)),
        "remote_code_unknown": "",
        "remote_code_before": files,
        "remote_code_before_name": before,
    }
    if not (complete or local):
        try:
            wanted = list_within(request, ONE_TRY_SECONDS) if check_mode or code_only else listing(request)
        except WeightsError as error:
            if not (check_mode or code_only):
                raise
            return {**answer, "remote_code": [], "remote_code_unknown": str(error)}
        sizes = {one.path: one.size for one in wanted}
        if not code_only:
            # What a broken exchange left is gone on with, or makes room.
            there = bytes_there(root, sizes) + tree_bytes(request.incoming)
            check_space(request, sum(sizes.values()), there)
        kept = {one.path: one for one in current.good}
        answer["wanted"] = [{"path": one.path, "size": one.size} for one in wanted]
        answer["have"] = [one.path for one in wanted if not compare([one], kept)]
        told = [{key: str(one[key]) for key in CODE} for one in request.listing if str(one["path"]).endswith(".py")]
        answer["remote_code"] = as_listed(request, told or code_of(wanted))
    return answer


def as_listed(request: Request, code: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Python files of a store with the hashes that its hub lists, so that a set is called the same before and after."""
    git = request.source == "huggingface"
    return [
        {**one, "sha256": f"{GIT_BLOB}{one['git_blob']}" if git and one["git_blob"] else one["sha256"]} for one in code
    ]


def code_before(root: Path, model_id: str, current_release: str) -> tuple[str, list[dict[str, str]]]:
    """Whose Python code a revision's is held against, in words, and its files; ('', []) for nobody's.

    It is that of the release that runs, where it serves the same model; else that of the revision completed last.
    """
    try:
        wanted = json.loads((Path(current_release) / "plan.json").read_text(encoding="utf-8"))["node"]["weights"]
        path, same = Path(wanted["path"]), wanted["model_id"] == model_id
    except (OSError, ValueError, KeyError, TypeError):
        path, same = root, False  # nothing runs yet
    files = known_code(path) if same else None
    if files is not None:
        return f"the release that runs ({wanted['revision']})", files
    marks = [path for path in root.parent.glob(f"*/{BOOKKEEPING}/complete") if path.parents[1] != root]
    for mark in sorted(marks, key=lambda path: -path.stat().st_mtime_ns):
        files = known_code(mark.parents[1])
        if files is not None:
            return f"the revision before ({mark.parents[1].name})", files
    return "", []


def refuse_other_patterns(request: Request, current: Current) -> None:
    """Raise WeightsError where other patterns would change a complete store under those who use it.

    One that is for another model or revision is no such case: it is wrong for them, too.
    """
    other = unusable(parse_manifest(read_or_empty(request.manifest)), request)
    if not current.missing or not other.startswith((f"{OTHER}include ", f"{OTHER}exclude ")):
        return
    users = users_of(Path(request.path)) if request.marker.exists() else []
    if users:
        raise WeightsError(
            f"{request.path} is complete with other patterns ({other}), and {', '.join(users)} uses it: files would "
            "come and go under it. Give model_weights_include and model_weights_exclude as they were; or a commit or a "
            "tag as deployment_revision, whose store lies beside this one; or remove what uses it first."
        )


def ensure_present(request: Request, check_mode: bool = False) -> Outcome:
    """Make `path` hold the revision, proven; does nothing and asks nobody when it already does.

    Raises WeightsError when that cannot be done.
    """
    if check_mode:
        return present(request, check_mode=True)
    line = ProgressFile(request.progress_file, PROGRESS_SECONDS)
    with locked(Path(request.path), request.lock_timeout, line.write):
        return present(request, check_mode=False)


def present(request: Request, check_mode: bool) -> Outcome:
    """ensure_present, with the lock held (or in check mode, where nothing is written)."""
    root = Path(request.path)
    # A look changes nothing, the state that another run tells of itself least of all.
    folder = Path(os.devnull) if check_mode else request.bookkeeping
    progress = Progress(ProgressFile(request.progress_file, PROGRESS_SECONDS), folder)
    current = inspect(request, progress)
    refuse_other_patterns(request, current)
    known_files = [] if current.missing else list(current.good)
    outcome = Outcome(actions=plan(current, request), files=known_files, bad_files=list(current.bad))
    outcome.changed = bool(outcome.actions)
    outcome.hashed_bytes, outcome.hash_seconds = current.hashed_bytes, current.hash_seconds
    bad = [one.path for one in current.bad]
    outcome.before = {"complete": not current.missing, "bad_files": bad, "touched_files": list(current.touched)}
    outcome.after = {"complete": True, "bad_files": [], "touched_files": []}
    if outcome.changed and request.expected_bytes and current.missing:
        there = sum(size for _, size in files_under(root)) + tree_bytes(request.incoming)
        check_space(request, request.expected_bytes, there)
    if (current.missing or current.bad) and not check_mode:
        try:
            fetch(request, current, progress, outcome)
        except WeightsError as error:
            if not current.bad:
                raise
            # Why it had to be fetched at all must not get lost behind why it could not be.
            named = "\n".join(f"  {action}" for action in outcome.actions)
            facts = {"bad_files": [asdict(one) for one in outcome.bad_files], **error.facts}
            raise WeightsError(f"{error}\nThis was to mend the files in {request.path}:\n{named}", **facts) from error
    elif not check_mode:
        if current.touched:
            unseal(request, current.good)
            # The same content as before: what was started from it stays as it is.
            seal(request, current.good, current.created or utc_now())
        if request.spread:
            outcome.warnings = pass_on(request, current.good, progress)
    known = {one.path for one in outcome.files} | {one.path for one in current.bad}
    if known or not check_mode:
        outcome.extra_files = sorted(name for name, _ in files_under(root) if name not in known)
    if not check_mode and (outcome.changed or outcome.hashed_bytes or request.spread):
        total = sum(one.size for one in outcome.files)
        text = f"has everything: {len(outcome.files)} files, {amount(total)}, each proven"
        progress.say("done", text, done=total, total=total)
    return outcome


def ensure_absent(request: Request, check_mode: bool = False, leaving: str = "") -> Outcome:
    """Remove the directory, bookkeeping last, so that an interrupted removal can go on; one that is used stays.

    Args:
        leaving: in check mode, the deployment that would be removed before.

    Raises:
        WeightsError: the directory is not one that this module made.
    """
    root = Path(request.path)
    outcome = Outcome(before={"exists": os.path.lexists(root)}, after={"exists": False})
    if not os.path.lexists(root):
        return outcome
    if root.is_symlink() or not request.bookkeeping.is_dir():
        raise WeightsError(
            f"{root} is {'a link' if root.is_symlink() else 'no directory that this module filled'} "
            f"({request.bookkeeping} is what marks one). Look at it, and remove it by hand if it may go."
        )
    users = users_of(root, leaving if check_mode else "")
    if users:
        outcome.after = outcome.before
        outcome.warnings = [f"{root} stays: {', '.join(users)} uses it. 'weights-prune' removes it once nothing does."]
        return outcome
    outcome.changed, outcome.actions = True, [f"remove {root}"]
    if check_mode:
        return outcome
    with locked(root, request.lock_timeout):
        if root.exists():  # another node that shares it may have removed it meanwhile
            remove(root)
    return outcome


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM, SIGHUP and SIGINT into a WeightsError, so that the client is stopped on the way out."""

    def handler(number: int, frame: FrameType | None) -> None:
        for sign in before:  # a second one must not interrupt the stopping
            signal.signal(sign, signal.SIG_IGN)
        raise WeightsError(
            f"stopped by {signal.Signals(number).name}. What was fetched is kept: run this again to go on."
        )

    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    for sign in before:
        signal.signal(sign, handler)
    try:
        yield
    finally:
        for sign, old in before.items():
            signal.signal(sign, old)


def ensure(request: Request, state: str, check_mode: bool = False, leaving: str = "") -> dict[str, Any]:
    """Check the parameters, do what is asked, and return the module's result.

    Args:
        leaving: as `ensure_absent` takes it.

    Raises:
        WeightsError: with all wrong parameters at once, or with what stood in the way.
    """
    found = problems(request)
    if found:
        raise WeightsError("\n".join(found))
    started = time.monotonic()
    try:
        with stopped_by_signals():
            if state == "present":
                outcome = ensure_present(request, check_mode)
            else:
                outcome = ensure_absent(request, check_mode, leaving)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise WeightsError(full_disk(request.path) or f"{error}. Free space, and run this again.") from error
    return outcome.as_result(request, time.monotonic() - started)
