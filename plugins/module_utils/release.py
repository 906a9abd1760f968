"""A release of a deployment on a node: its files, its links, and the steps from what is there to what is wanted.

Reading and deciding change nothing; only `apply` and `remove` write. A release is built under a temporary name and
renamed, links are swung by renaming a fresh link over the old one, so that an interrupted run leaves either the old or
the new state and a rerun ends the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import MANIFEST, content_of
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import BOOKKEEPING

FORMAT_VERSION = 1
MARKER = ".stepladder"
MARKER_TEXT = "This directory is made and removed by stepladder.\n"
MASK = "********"
MIN_MASKED = 8  # shorter values would blank out half of Ansible's output when masked everywhere

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_SECRET_FLAG = re.compile(
    r"^--?(?:[\w-]*[-_])?(?:key|token|secret|password)(?P<value>=.*)?$", re.IGNORECASE | re.DOTALL
)
# What each start begins its log with; engine_state.py looks for it.
START_MARK = "stepladder: starting "
_FINGERPRINT_LINE = re.compile(r"^STEPLADDER_FINGERPRINT='?([0-9a-f]{16})'?$", re.MULTILINE)
_OURS = {"releases", "current", "previous", "logs", "outcomes", "evidence", MARKER}
_BUILD = ".new-"
_RETIRED = ".old-"
# What became of a release: it answered as promised, or did not; one that was never asked has no outcome.
PROVEN, FAILED = "proven", "failed"
LONGEST_REASON = 2000

DIRECTORY_MODE = 0o700
ENV_MODE = 0o400
RUN_MODE = 0o500
PLAN_MODE = 0o400


class ReleaseError(Exception):
    """What is wrong with the arguments or the directory, all findings at once, one a line."""


@dataclass(frozen=True)
class File:
    """A file of a release: path relative to the release directory, content and permission bits."""

    path: str
    content: bytes
    mode: int


@dataclass(frozen=True)
class Wanted:
    """A release as it should be on the node."""

    plan_id: str
    files: tuple[File, ...]
    fingerprints: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """What a deployment directory holds.

    broken_modes: paths whose permission bits are not the owner's alone.
    leftovers: names under releases/ of interrupted runs.
    releases: the complete releases, newest first. intact: whether the wanted release is there byte for byte.
    outcomes: by plan id, what became of those that were asked or given up.
    """

    exists: bool
    marked: bool
    broken_modes: tuple[str, ...]
    missing_directories: tuple[str, ...]
    leftovers: tuple[str, ...]
    releases: tuple[str, ...]
    intact: bool
    current: str | None
    previous: str | None
    outcomes: Mapping[str, str]


@dataclass(frozen=True)
class Step:
    """One change: verb is make_directory, mark, chmod, clear, build, link, unlink or prune; name, target: on what."""

    verb: str
    name: str
    target: str = ""

    def __str__(self) -> str:
        return " ".join(
            part for part in (self.verb.replace("_", " "), self.name, self.target and f"-> {self.target}") if part
        )


def fingerprint(process: Mapping[str, Any]) -> str:
    """Mark of a process's command: 16 hex digits of SHA-256 over command, environment and what it starts from.

    The plan id is not in it: a new plan that leaves a process's command as it was gives the same mark, no restart.
    """
    parts = {
        "argv": list(process["argv"]),
        "env": dict(process.get("env") or {}),
        "secret_env_files": dict(process.get("secret_env_files") or {}),
        "working_directory": process.get("working_directory") or "/",
        "started_from": [_digest(path) for path in process.get("started_from") or []],
    }
    return hashlib.sha256(canonical_json(parts)).hexdigest()[:16]


def _digest(path: str) -> str:
    """What is in a file, for comparison; a file that is not there is something too.

    Of a manifest of weights it is what an engine reads by it: the time stamps of files that were only touched are not.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return "absent"
    if path.endswith(f"/{BOOKKEEPING}/{MANIFEST}"):
        content = content_of(content.decode(errors="replace")).encode() or content
    return hashlib.sha256(content).hexdigest()


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, two spaces, a newline at the end: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def check_arguments(path: str, plan_id: str, processes: Sequence[Mapping[str, Any]], keep: int) -> list[str]:
    """Everything that is wrong with the arguments, a sentence each."""
    faults = []
    if not path.startswith("/") or os.path.normpath(path).count("/") < 2:
        faults.append(
            f"path is {path!r}: give the absolute path of one deployment, like /var/lib/stepladder/deployments/step3"
        )
    if not _NAME.fullmatch(plan_id):
        faults.append(f"plan_id is {plan_id!r}: letters, digits, '.', '_' and '-' only, the first a letter or digit")
    if keep < 1:
        faults.append(f"keep is {keep}: at least 1 release has to stay")
    names = [process["name"] for process in processes]
    faults += [
        f"process name {name!r} is given {names.count(name)} times"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    for process in processes:
        faults += _process_faults(process)
    return faults


def _process_faults(process: Mapping[str, Any]) -> list[str]:
    name = process["name"]
    faults = []
    if not _NAME.fullmatch(name):
        faults.append(f"process name {name!r}: letters, digits, '.', '_' and '-' only, the first a letter or digit")
    if not process["argv"]:
        faults.append(f"process {name}: argv is empty, nothing to run")
    env = process.get("env") or {}
    secrets = process.get("secret_env_files") or {}
    for variable in sorted({*env, *secrets}):
        if not _VARIABLE.fullmatch(variable):
            faults.append(f"process {name}: {variable!r} is not a name of an environment variable")
        if variable.startswith("STEPLADDER_"):
            faults.append(f"process {name}: {variable} is set by the run script itself, take it out")
    faults += [
        f"process {name}: {v} is in env and in secret_env_files, keep one" for v in sorted(set(env) & set(secrets))
    ]
    faults += [
        f"process {name}: secret file of {v} is {file!r}, an absolute path is needed"
        for v, file in sorted(secrets.items())
        if not str(file).startswith("/")
    ]
    if any("\0" in str(text) for text in (*process["argv"], *env.values())):
        faults.append(f"process {name}: a NUL character in argv or env, which no process can be given")
    return faults


def env_file(env: Mapping[str, str], masked: bool = False) -> str:
    """The env file: NAME='value' lines in order of name, quoted for a POSIX shell.

    masked: hide the values whose name says that they are secret.
    """
    lines = [f"{name}={MASK if masked and is_secret_name(name) else _quote(env[name])}\n" for name in sorted(env)]
    return "".join(lines)


def as_text(processes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Processes whose env values are text: YAML gives 1 and true where the environment knows only "1" and "true"."""
    return [
        {**process, "env": {k: _as_text(v) for k, v in (process.get("env") or {}).items()}} for process in processes
    ]


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def secret_values(processes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Values that Ansible's output must never show: long enough, and under a secret's name."""
    values = {v for p in processes for k, v in p["env"].items() if is_secret_name(k)}
    return {value for value in values if len(value) >= MIN_MASKED}


def is_secret_name(name: str) -> bool:
    """Whether a variable's name says that its value is a secret."""
    return bool(_SECRET_NAME.search(name))


def mask_argv(argv: Sequence[str]) -> list[str]:
    """argv for human eyes: values of --api-key and its like are masked, up to the next flag (vLLM takes several)."""
    shown: list[str] = []
    hide = False
    for argument in argv:
        match = _SECRET_FLAG.match(argument)
        if argument.startswith("-"):
            hide = bool(match and not match["value"])
            shown.append(f"{argument.split('=', 1)[0]}={MASK}" if match and match["value"] else argument)
        else:
            shown.append(MASK if hide else argument)
    return shown


def run_script(deployment: str, process: Mapping[str, Any], masked: bool = False) -> str:
    """The script that starts a process: a shell reads the env file and the secret files, then becomes the command."""
    secrets = process.get("secret_env_files") or {}
    argv = mask_argv(process["argv"]) if masked else process["argv"]
    lines = [
        "#!/bin/sh",
        "# Made by stepladder, changed by a new release only.",
        "set -eu",
        # The link current/ is followed once, so that script and env file are of one release.
        'here=$(cd -P -- "$(dirname -- "$0")" && pwd)',
        "set -a",
        '. "$here/env"',
        f"STEPLADDER_DEPLOYMENT={_quote(deployment)}",
        f"STEPLADDER_PROCESS={_quote(process['name'])}",
        f"STEPLADDER_FINGERPRINT={_quote(fingerprint(process))}",
        "set +a",
    ]
    if secrets:
        lines += [
            "read_secret() {",
            '    [ -r "$1" ] || { echo "stepladder: secret file $1 is missing or not readable by $(id -un):'
            ' put it there, owned by that user, mode 0400" >&2; exit 78; }',
            '    cat -- "$1"',
            "}",
        ]
        for name in sorted(secrets):
            lines += [f"{name}=$(read_secret {_quote(secrets[name])})", f"export {name}"]
    # A line in the log that tells this start's output from what an earlier one wrote.
    lines.append(f'echo "{START_MARK}{process["name"]} at $(date -u +%Y-%m-%dT%H:%M:%SZ)"')
    lines.append(f"cd -- {_quote(process.get('working_directory') or '/')}")
    words = [*(process.get("launcher") or []), *argv]
    lines.append("exec \\\n" + " \\\n".join("    " + shlex.quote(str(word)) for word in words))
    return "\n".join(lines) + "\n"


def _quote(value: object) -> str:
    return "'" + str(value).replace("'", "'\"'\"'") + "'"


def wanted_release(
    path: str, plan_id: str, node_slice: Mapping[str, Any], processes: Sequence[Mapping[str, Any]]
) -> Wanted:
    """The files of a release, as a pure function of the module's arguments."""
    # The mark that tells this deployment's processes from all others, one of the same name elsewhere included.
    deployment = path.rstrip("/")
    files = [File("plan.json", canonical_json({"format_version": FORMAT_VERSION, **node_slice}), PLAN_MODE)]
    for process in processes:
        files.append(File(f"{process['name']}/env", env_file(process.get("env") or {}).encode(), ENV_MODE))
        files.append(File(f"{process['name']}/run", run_script(deployment, process).encode(), RUN_MODE))
    return Wanted(plan_id, tuple(files), {process["name"]: fingerprint(process) for process in processes})


def observe(path: str, wanted: Wanted) -> Found:
    """Read what is in a deployment directory.

    Raises ReleaseError when the path is no directory, or holds things which stepladder did not put there.
    """
    root = Path(path)
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise ReleaseError(f"{path} is not a directory: move it away, or give another path")
    releases = root / "releases"
    marked = (root / MARKER).is_file()
    if root.exists() and not marked:
        strangers = [e.name for e in root.iterdir() if e.name not in _OURS and not e.name.startswith(("lease", MARKER))]
        if strangers:
            raise ReleaseError(
                f"{path} holds {', '.join(sorted(strangers)[:5])} and no file {MARKER}: it was not made by stepladder; "
                "give another path, or move those away"
            )
    wanted_dirs = ("", "releases", "logs")
    missing = tuple(name for name in wanted_dirs if not (root / name).is_dir())
    broken = tuple(n for n in wanted_dirs if n not in missing and _mode(root / n) != DIRECTORY_MODE)
    entries = sorted(releases.iterdir(), key=_newest_first) if releases.is_dir() else []
    return Found(
        exists=root.exists(),
        marked=marked,
        broken_modes=broken,
        missing_directories=missing,
        leftovers=tuple(e.name for e in entries if e.name.startswith((_BUILD, _RETIRED))),
        releases=tuple(e.name for e in entries if not e.name.startswith(".")),
        intact=_intact(releases / wanted.plan_id, wanted),
        current=_release_of(root / "current"),
        previous=_release_of(root / "previous"),
        outcomes={plan_id: told["outcome"] for plan_id, told in read_outcomes(path).items()},
    )


def _newest_first(entry: Path) -> tuple[int, str]:
    return (-entry.lstat().st_mtime_ns, entry.name)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _release_of(link: Path) -> str | None:
    """The plan id that a link points to; None when there is no link or its release is gone."""
    return link.readlink().name if link.is_symlink() and link.is_dir() else None


def _intact(release: Path, wanted: Wanted) -> bool:
    if not release.is_dir():
        return False
    found = {str(p.relative_to(release)): p for p in release.rglob("*")}
    files = {f.path: f for f in wanted.files}
    directories = {str(Path(name).parent) for name in files} - {"."}
    if set(found) != set(files) | directories or _mode(release) != DIRECTORY_MODE:
        return False
    if any(_mode(found[name]) != DIRECTORY_MODE for name in directories):
        return False
    return all(_mode(found[name]) == f.mode and found[name].read_bytes() == f.content for name, f in files.items())


def plan(found: Found, wanted: Wanted, keep: int) -> list[Step]:
    """The steps from what is there to the wanted release being current; empty when nothing differs.

    keep counts all releases, current and previous among them; these two stay whatever keep says.
    """
    steps = [Step("make_directory", name) for name in found.missing_directories]
    if not found.marked:
        steps.append(Step("mark", MARKER))
        steps.sort(key=lambda step: (step.name != "", step.verb != "mark"))
    steps += [Step("chmod", name) for name in found.broken_modes]
    steps += [Step("clear", name) for name in found.leftovers]
    if not found.intact:
        steps.append(Step("build", wanted.plan_id))
    previous = found.previous
    if found.current != wanted.plan_id:
        previous = way_back(found, wanted.plan_id)
        # First the way back, then the way forward: cut between the two, a rerun does the second.
        if previous is None and found.previous is not None:
            steps.append(Step("unlink", "previous"))
        elif previous != found.previous:
            steps.append(Step("link", "previous", previous or ""))
        steps.append(Step("link", "current", wanted.plan_id))
    ordered = [wanted.plan_id, *(r for r in (previous,) if r and r != wanted.plan_id)]
    ordered += [r for r in found.releases if r not in ordered]
    protected = {wanted.plan_id, previous}
    steps += [Step("prune", name) for name in ordered[keep:] if name not in protected]
    return steps


def way_back(found: Found, wanted: str) -> str | None:
    """The release to go back to once `wanted` runs: the last that answered as promised, never one that failed.

    Where none was ever proven, the one that runs now, or the one before it: an older version of this toolkit kept no
    outcomes, and an interrupted run leaves none.
    """
    near = [name for name in (found.current, found.previous) if name]
    candidates = [name for name in dict.fromkeys((*near, *found.releases)) if name != wanted]
    proven = [name for name in candidates if found.outcomes.get(name) == PROVEN]
    unknown = [name for name in candidates if name in near and name not in found.outcomes]
    return next(iter((*proven, *unknown)), None)


def apply(path: str, wanted: Wanted, steps: Sequence[Step], after: Callable[[str], None] = lambda _: None) -> None:
    """Carry out the steps. after is called with a label after every single change on disk (tests cut the run there)."""
    root = Path(path)
    for step in steps:
        target = root / step.name
        if step.verb == "make_directory":
            target.mkdir(mode=DIRECTORY_MODE, parents=not step.name, exist_ok=True)
            target.chmod(DIRECTORY_MODE)
        elif step.verb == "mark":
            _write(root / MARKER, MARKER_TEXT.encode(), 0o600)
        elif step.verb == "chmod":
            target.chmod(DIRECTORY_MODE)
        elif step.verb in ("clear", "prune"):
            _retire(root / "releases", step.name, after)
            (root / "outcomes" / f"{step.name}.json").unlink(missing_ok=True)
        elif step.verb == "build":
            _build(root / "releases", wanted, after)
        elif step.verb == "link":
            _swing(target, f"releases/{step.target}", after)
        elif step.verb == "unlink":
            target.unlink(missing_ok=True)
        else:
            raise ValueError(step.verb)
        after(str(step))


def _build(releases: Path, wanted: Wanted, after: Callable[[str], None]) -> None:
    building, final = releases / f"{_BUILD}{wanted.plan_id}", releases / wanted.plan_id
    if building.exists():
        shutil.rmtree(building)
    building.mkdir(mode=DIRECTORY_MODE)
    after("make the build directory")
    for file in wanted.files:
        target = building / file.path
        target.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        _write(target, file.content, file.mode)
        after(f"write {file.path}")
    for directory in {building, *((building / f.path).parent for f in wanted.files)}:
        directory.chmod(DIRECTORY_MODE)
        _sync(directory)
    retired = releases / f"{_RETIRED}{wanted.plan_id}"
    if final.exists():
        final.rename(retired)
        after("retire the damaged release")
    building.rename(final)
    _sync(releases)
    after("rename the build directory")
    if retired.exists():
        shutil.rmtree(retired)


def _retire(releases: Path, name: str, after: Callable[[str], None]) -> None:
    """Remove a release: renamed first, so that no half of it keeps a release's name."""
    target = releases / name
    if not name.startswith("."):
        retired = releases / f"{_RETIRED}{name}"
        target.rename(retired)
        after(f"retire {name}")
        target = retired
    shutil.rmtree(target)


def _swing(link: Path, target: str, after: Callable[[str], None]) -> None:
    fresh = link.with_name(f"{MARKER}-{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    after(f"make the fresh link {link.name}")
    fresh.replace(link)
    _sync(link.parent)


def _write(path: Path, content: bytes, mode: int) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        os.fchmod(stream.fileno(), mode)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_outcomes(path: str) -> dict[str, dict[str, Any]]:
    """What became of each release: outcome, when and why, by plan id; a file that cannot be read counts as none."""
    found = {}
    for file in Path(path, "outcomes").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(file.read_text())
            found[file.stem] = {
                "outcome": told["outcome"],
                "at": told["at"],
                "reason": told.get("reason", ""),
                "described": dict(told.get("described") or {}),
                "speed": dict(told.get("speed") or {}),
            }
    return found


def record_outcome(
    path: str,
    plan_id: str,
    outcome: str,
    reason: str,
    *,
    described: Mapping[str, str] | None = None,
    speed: Mapping[str, Any] | None = None,
    deadline: float = 60.0,
) -> dict[str, Any]:
    """Write down what became of a release. One that was proven stays so: what fails later is not its own fault.

    described: SHA-256 of the files that describe the processes to their manager, by path, as they were then.
    speed: how fast it answers, by the number of the replica, as `speed.summary` says it; none keeps what is known.
    Raises ReleaseError where there is no such release.
    """
    with lock(path, deadline):
        if not Path(path, "releases", plan_id).is_dir():
            raise ReleaseError(f"there is no release {plan_id} in {path}: nothing to write down")
        before = read_outcomes(path).get(plan_id, {})
        told = before.get("outcome")
        known = dict(described or before.get("described") or {})
        measured = {**before.get("speed", {}), **(speed or {})}
        told_again = (known, measured) == (before.get("described"), before.get("speed"))
        if told not in (outcome, PROVEN) or (outcome == PROVEN and not told_again):
            folder = Path(path, "outcomes")
            folder.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            why = reason[:LONGEST_REASON]
            content = {
                "format_version": FORMAT_VERSION,
                "outcome": outcome,
                "at": at,
                "reason": why,
                "described": known,
                "speed": measured,
            }
            _write(folder / f"{plan_id}.json", canonical_json(content), 0o600)
            told = outcome
    # A note about a release is no change of the node.
    return {"changed": False, "outcome": told, "actions": []}


def drop(path: str, check_mode: bool, deadline: float = 60.0) -> dict[str, Any]:
    """Let nothing be current on a node that the deployment has no use for any more; its releases stay for the way back.

    Raises ReleaseError when the directory is not ours.
    """
    current = current_release(path) if may_remove(path) else None
    if current and not check_mode:
        with lock(path, deadline):
            if read_outcomes(path).get(current, {}).get("outcome") != FAILED:
                _swing(Path(path, "previous"), f"releases/{current}", lambda _: None)
            Path(path, "current").unlink(missing_ok=True)
    return {
        "changed": bool(current),
        "actions": [f"unlink current, which was {current}"] if current else [],
        "diff": [{"before": f"{current}\n" if current else "", "after": ""}],
    }


def current_fingerprints(path: str) -> dict[str, str]:
    """The fingerprints in the run scripts of the current release; empty when there is none."""
    found = {}
    for script in Path(path, "current").glob("*/run"):
        match = _FINGERPRINT_LINE.search(script.read_text(errors="replace"))
        if match:
            found[script.parent.name] = match[1]
    return found


def current_release(path: str) -> str | None:
    """Plan id of the current release, None when there is none."""
    return _release_of(Path(path, "current"))


def previous_release(path: str) -> str | None:
    """Plan id of the way back, None when there is none."""
    return _release_of(Path(path, "previous"))


def diff_of(path: str, plan_id: str, found: str | None, processes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Ansible's diff: plan id, then each run script and env file that differs, with secrets masked on both sides."""
    deployment = path.rstrip("/")
    diff = []
    if plan_id != found:
        header = f"{path}/current"
        diff.append(
            {
                "before_header": header,
                "after_header": header,
                "before": f"{found or ''}\n",
                "after": f"{plan_id or ''}\n",
            }
        )
    before = shown_files(Path(path, "current"))
    after = {}
    for process in processes:
        after[f"{process['name']}/env"] = env_file(process.get("env") or {}, masked=True)
        after[f"{process['name']}/run"] = run_script(deployment, process, masked=True)
    for name in sorted({*before, *after}):
        old, new = before.get(name, ""), after.get(name, "")
        if old != new:
            diff.append({"before_header": name, "after_header": name, "before": old, "after": new})
    return diff


def shown_files(release: Path) -> dict[str, str]:
    """The run scripts and env files of a release as people may see them: secrets masked."""
    shown = {}
    for file in (*release.glob("*/run"), *release.glob("*/env")):
        text = file.read_text(errors="replace")
        shown[f"{file.parent.name}/{file.name}"] = _mask_env_text(text) if file.name == "env" else _mask_run_text(text)
    return shown


def _mask_env_text(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError:
        return "(not readable as NAME='value' lines)\n"
    return env_file(dict(word.partition("=")[::2] for word in words), masked=True)


def _mask_run_text(text: str) -> str:
    head, separator, command = text.partition("exec \\\n")
    try:
        argv = shlex.split(command.replace(" \\\n    ", " "))
    except ValueError:
        return head + separator + "(not readable)\n"
    return head + separator + " \\\n".join("    " + shlex.quote(a) for a in mask_argv(argv)) + "\n"


def may_remove(path: str) -> bool:
    """Whether there is a deployment directory to remove. Raises ReleaseError when it is not ours."""
    root = Path(path)
    if root.is_symlink():
        raise ReleaseError(f"{path} is a link, not a deployment directory: remove it by hand")
    if not root.exists():
        return False
    if not root.is_dir() or (any(root.iterdir()) and not (root / MARKER).is_file()):
        raise ReleaseError(
            f"{path} has no file {MARKER}, so it was not made by stepladder: remove it by hand if it has to go"
        )
    return True


def remove(path: str, after: Callable[[str], None] = lambda _: None) -> None:
    """Remove a deployment directory, its marker last: a removal that was cut off is not taken for a stranger's."""
    root = Path(path)
    for entry in sorted(root.iterdir()):
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        after(f"remove {entry.name}")
    (root / MARKER).unlink(missing_ok=True)
    after("remove the marker")
    root.rmdir()


def absent(path: str, check_mode: bool, deadline: float = 60.0) -> dict[str, Any]:
    """Remove a deployment directory, under its lock, and give the module's answer."""
    changed = may_remove(path)
    if changed and not check_mode:
        with lock(path, deadline):
            if may_remove(path):
                remove(path)
    lines = {True: f"{path}\n", False: ""}
    return {
        "changed": changed,
        "actions": [f"remove {path}"] if changed else [],
        "diff": [{"before": lines[changed], "after": ""}],
    }


@contextlib.contextmanager
def lock(path: str, deadline: float = 60.0) -> Iterator[None]:
    """Hold the lock file beside a deployment directory.

    deadline: seconds to wait. Raises ReleaseError naming the holder's pid.
    """
    file = Path(path).with_name(f".{Path(path).name}.lock")
    file.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + deadline
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() >= end:
                    holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                    raise ReleaseError(
                        f"{file} is held by process {holder} for longer than {deadline:.0f} s: another run is at work "
                        f"on this deployment; wait for it, or end it with: kill {holder}"
                    ) from None
                time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def converge(
    path: str, wanted: Wanted, keep: int, check_mode: bool, deadline: float = 60.0
) -> tuple[Found, list[Step]]:
    """Make a node's deployment directory equal to the wanted release; in check mode only say what would be done."""
    if check_mode:
        found = observe(path, wanted)
        return found, plan(found, wanted, keep)
    with lock(path, deadline):
        found = observe(path, wanted)
        steps = plan(found, wanted, keep)
        apply(path, wanted, steps)
    return found, steps


def result_of(found: Found, wanted: Wanted, steps: Sequence[Step], before: Mapping[str, str]) -> dict[str, Any]:
    """The module's answer. before: the fingerprints of the release that was current."""
    links = {step.name: step.target for step in steps if step.verb == "link"}
    return {
        "changed": bool(steps),
        "fingerprints": dict(wanted.fingerprints),
        "changed_processes": sorted(n for n, mark in wanted.fingerprints.items() if before.get(n) != mark),
        "removed_processes": sorted(set(before) - set(wanted.fingerprints)),
        "current": links.get("current", found.current),
        "previous": links.get("previous", found.previous),
        "removed_releases": [step.name for step in steps if step.verb == "prune"],
        "actions": [str(step) for step in steps],
    }
