"""Action plugins for modules that take minutes: the module runs as a job on the node, its progress is shown meanwhile.

The parts that decide what to show and when to look again are plain functions and classes without Ansible's objects.
"""

from __future__ import annotations

import posixpath
import secrets
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

display = Display()

DEADLINE = 7200
FIRST_INTERVAL, LAST_INTERVAL, GROWTH = 0.5, 5.0, 1.5
SHORT_JOB, SHORT_INTERVAL = 15.0, 1.0  # seconds in which a job that is short ends, and that it may wait to be seen
SHOW_EVERY, HEARTBEAT_EVERY = 5.0, 30.0
UNREACHABLE_FOR = 120.0
QUIET = "stepladder.core.quiet"
_RUNNING = '"finished": false'


def is_for_programs() -> bool:
    """Whether this run's standard output is the answer of a verb that only reads, be it for people or programs."""
    return bool(constants.DEFAULT_STDOUT_CALLBACK == QUIET)


class Interrupted(KeyboardInterrupt):
    """The controller was told to stop (SIGINT or SIGTERM)."""


class ProgressLines:
    """Decides which lines to show: a changed text at most every 5 s, and a sign of life every 30 s."""

    def __init__(self, show_every: float = SHOW_EVERY, heartbeat_every: float = HEARTBEAT_EVERY) -> None:
        self.show_every = show_every
        self.heartbeat_every = heartbeat_every
        self._shown_text = ""
        self._shown_at: float | None = None

    def next(self, text: str, elapsed: float) -> str | None:
        """The line to show now, None for none. elapsed: seconds since the start."""
        since = elapsed - (self._shown_at or 0.0)
        if text and text != self._shown_text and (self._shown_at is None or since >= self.show_every):
            line = text
        elif since >= self.heartbeat_every:
            line = f"{text or 'at work'} ({elapsed:.0f} s)"
        else:
            return None
        self._shown_text, self._shown_at = text, elapsed
        return line


def intervals(first: float = FIRST_INTERVAL, last: float = LAST_INTERVAL) -> Iterator[float]:
    """Seconds to wait between two looks, growing from first to last; not beyond a second while a short job may end."""
    short, waited = max(first, SHORT_INTERVAL), 0.0
    while True:
        yield first
        waited += first
        first = min(last if waited >= SHORT_JOB else short, first * GROWTH)


def parse_deadline(value: object) -> int:
    """Seconds of progress_deadline. Raises AnsibleActionFail naming the value."""
    try:
        deadline = int(str(value))
    except ValueError:
        deadline = 0
    if deadline <= 0:
        raise AnsibleActionFail(f"progress_deadline is {value!r}: give a number of seconds greater than 0")
    return deadline


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted: Ansible's worker would end itself at once and leave the node's job."""

    def handle(number: int, frame: FrameType | None) -> None:
        # Ansible's main process sends a second signal soon; it must not cut the cleaning up short.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressAction(ActionBase):
    """Base of an action plugin for a long module of the same name that takes `progress_file`.

    First the module runs in check mode: if nothing is to be done, or it fails, or the user asked for check mode, that
    is the answer. Else it runs as a job on the node while its progress is shown. The argument `progress_deadline`
    (seconds, 7200) is taken out of the module's arguments.

    So are `begin` and `begun`. With the first a job is started and left to itself; the answer's `begun`, given to a
    later task as that argument, has it shown and waited for there, its deadline counted from its start.
    """

    TRANSFERS_FILES = False
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look in check mode, then do the work as a job."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        self._vars = task_vars or {}
        self._name = f"{self._vars.get('inventory_hostname', '?')} | {self._task.get_name().strip()}"
        arguments = dict(self._task.args)
        deadline = parse_deadline(arguments.pop("progress_deadline", DEADLINE))
        begin, begun = arguments.pop("begin", False), arguments.pop("begun", None)
        try:
            if begun:
                return {**result, **self._take_up(begun, deadline)}
            foreseen = self._foresee(arguments)
            if (
                foreseen.get("failed")
                or foreseen.get("skipped")
                or self._task.check_mode
                or not self._is_needed(foreseen)
            ):
                return {**result, **foreseen}
            done = (self._begin if begin else self._run_job)(arguments, deadline)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return {**result, **done}

    def _is_needed(self, foreseen: dict[str, Any]) -> bool:
        """Whether there is something to do, after the look in check mode."""
        return bool(foreseen.get("changed"))

    def _heard(self, data: str) -> None:
        """Takes what the module said for programs beside its line for people."""

    def _foresee(self, arguments: dict[str, Any]) -> dict[str, Any]:
        asked = self._task.check_mode
        self._task.check_mode = True
        try:
            answer: dict[str, Any] = self._execute_module(module_args=dict(arguments), task_vars=self._vars)
        finally:
            self._task.check_mode = asked
        return answer

    def _run_job(self, arguments: dict[str, Any], deadline: int) -> dict[str, Any]:
        started = time.monotonic()
        self._job = self._job_file = ""
        return self._watched(lambda: self._start_job(arguments, deadline) or self._follow(started, deadline))

    def _begin(self, arguments: dict[str, Any], deadline: int) -> dict[str, Any]:
        started = time.monotonic()
        # The change is told by the task that waits for it.
        return self._start_job(arguments, deadline) or {
            "changed": False,
            "begun": {
                "job": self._job,
                "job_file": self._job_file,
                "progress_file": self._progress_file,
                "started": started,
            },
        }

    def _take_up(self, begun: dict[str, Any], deadline: int) -> dict[str, Any]:
        self._job, self._job_file = str(begun["job"]), str(begun["job_file"])
        self._progress_file = str(begun["progress_file"])
        return self._watched(lambda: self._follow(float(begun["started"]), deadline))

    def _start_job(self, arguments: dict[str, Any], deadline: int) -> dict[str, Any] | None:
        """Start the job, and keep how to find it; the answer where it could not be started."""
        # Not expanded here: the wrapper and the module expand it alike, in the environment of the job.
        directory = self.get_shell_option("async_dir", default="~/.ansible_async")
        self._progress_file = self._connection._shell.join_path(
            directory, f"stepladder-progress-{secrets.token_hex(8)}"
        )
        answer = self._start({**arguments, "progress_file": self._progress_file}, deadline)
        if answer.get("failed") or not answer.get("ansible_job_id"):
            return answer
        self._job, self._job_file = answer["ansible_job_id"], answer["results_file"]
        self._progress_file = self._beside_job(posixpath.basename(self._progress_file))
        return None

    def _watched(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do something with a job that has to end with this run, and clean up after it."""
        with signals_as_exceptions():
            try:
                return work()
            except Interrupted:
                self._end_job()
                show(f"  {self._name}: interrupted, ended its job on the node")
                raise
            finally:
                self._clean()

    def _beside_job(self, name: str) -> str:
        return posixpath.join(posixpath.dirname(self._job_file), name)

    def _start(self, arguments: dict[str, Any], deadline: int) -> dict[str, Any]:
        before = self._task.async_val
        # The wrapper on the node is the backstop should the controller vanish; on time, this side ends the job.
        self._task.async_val = deadline + 60
        try:
            answer: dict[str, Any] = self._execute_module(module_args=arguments, task_vars=self._vars, wrap_async=True)
        finally:
            self._task.async_val = before
            # The wrapper removes the directory that it was started from; later calls make and remove their own.
            self._cleanup_remote_tmp = True
        return answer

    def _follow(self, started: float, deadline: int) -> dict[str, Any]:
        lines = ProgressLines()
        last_contact, looked_for = time.monotonic(), 0.0
        text = ""
        for interval in intervals():
            time.sleep(interval)
            now = time.monotonic()
            elapsed = now - started
            look_for_process = elapsed - looked_for >= HEARTBEAT_EVERY
            try:
                running, alive, text = self._look(text, look_for_process)
                last_contact = now
            except AnsibleConnectionFailure:
                if now - last_contact > UNREACHABLE_FOR:
                    raise
                running, alive = True, True
            if look_for_process:
                looked_for = elapsed
            if not running or not alive:
                answer = self._status()
                if answer.get("finished"):
                    return self._finished(answer)
                if not alive:
                    return self._failure(
                        f"the module's process on the node is gone and left no result after {elapsed:.0f} s: it was "
                        "killed (see the kernel's log for the OOM killer) or the node restarted; run again",
                        text,
                    )
            if elapsed > deadline:
                self._end_job()
                return self._failure(
                    f"not finished after {elapsed:.0f} s (progress_deadline {deadline} s), ended its job on the node; "
                    "give a greater progress_deadline if the last progress shows that it was moving",
                    text,
                )
            line = lines.next(text, elapsed)
            if line:
                show(f"  {self._name}: {line}", stderr=is_for_programs())
        raise AssertionError("intervals never end")

    def _look(self, text: str, for_process: bool) -> tuple[bool, bool, str]:
        """One small command instead of a module call: a module call costs the controller a hundred times as much."""
        command = (
            f"cat {shlex.quote(self._job_file)} 2>/dev/null; echo; cat {shlex.quote(self._progress_file)} 2>/dev/null"
        )
        if for_process:
            command += f"; {_alive_command(self._job)} || echo {_GONE}"
        answer = self._low_level_execute_command(f"{{ {command}; true; }}")
        status, _, rest = answer.get("stdout", "").partition("\n")
        rest_lines = rest.strip().splitlines()
        alive = _GONE not in rest_lines
        said = [line for line in rest_lines if line != _GONE]
        if len(said) > 1:
            self._heard(said[0])
        return _RUNNING in status, alive, said[-1] if said else text

    def _status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(
            module_name="ansible.legacy.async_status",
            module_args={"jid": self._job, "mode": "status", "_async_dir": posixpath.dirname(self._job_file)},
            task_vars=self._vars,
        )
        return answer

    @staticmethod
    def _finished(answer: dict[str, Any]) -> dict[str, Any]:
        bookkeeping = ("ansible_job_id", "finished", "started", "results_file")
        return {key: value for key, value in answer.items() if key not in bookkeeping}

    @staticmethod
    def _failure(message: str, progress: str) -> dict[str, Any]:
        said = f"; last progress: {progress}" if progress else ""
        return {"failed": True, "changed": True, "msg": message + said, "progress": progress}

    def _end_job(self) -> None:
        """End the job's processes: SIGTERM, five seconds, SIGKILL. Best effort, the connection may be gone."""
        if not self._job:
            return
        try:
            self._low_level_execute_command(_end_command(self._job))
        except Exception as error:  # whatever it is, the first failure matters more
            display.warning(f"{self._name}: could not end the job {self._job} on the node: {error}")

    def _clean(self) -> None:
        if not self._job:
            return
        files = [self._progress_file, self._job_file]
        try:
            self._low_level_execute_command("rm -f " + " ".join(shlex.quote(file) for file in files))
        except Exception as error:  # two small files left behind must not fail a finished job
            display.vv(f"{self._name}: could not remove {files}: {error}")


_GONE = "stepladder-job-gone"


def _pattern(job: str) -> str:
    """A pattern that is a whole argument of the job's wrapper, and of no other process: not of the searching grep."""
    name = job.partition(".")[0]
    return f"[{name[0]}]{name[1:]}"


def _alive_command(job: str) -> str:
    return f"grep -qszx {_pattern(job)} /proc/[0-9]*/cmdline"


def _end_command(job: str) -> str:
    """Shell command that ends all processes of the job but its watcher, which then cleans up after itself.

    They are found by their session, not by their process group: the wrapper leads a session of its own (os.setsid), but
    puts its child into a group of its own only after it forked it, so that a module that starts sooner is not in it.
    Source: ansible-core's async_wrapper.py.
    """
    fields = r"sed 's/^\([0-9]*\) .*) /\1 /'"  # pid state parent group session ..., without the command's name
    return (
        'session=""; watcher=""; '
        f"for file in $(grep -lszx {_pattern(job)} /proc/[0-9]*/cmdline); do "
        f"set -- $({fields} ${{file%cmdline}}stat 2>/dev/null); "
        '[ $# -lt 5 ] || { session=$5; [ "$4" = "$1" ] || watcher=$1; }; done; '
        '[ -n "$session" ] || exit 0; '
        f"members() {{ {fields} /proc/[0-9]*/stat 2>/dev/null | while read -r pid state parent group sid rest; do "
        '[ "$sid" != "$session" ] || [ "$pid" = "$watcher" ] || [ "$state" = Z ] || printf " %s" "$pid"; done; }; '
        "kill -TERM $(members) 2>/dev/null; "
        'for second in 1 2 3 4 5; do sleep 1; [ -n "$(members)" ] || exit 0; done; '
        "kill -KILL $(members) 2>/dev/null; true"
    )
