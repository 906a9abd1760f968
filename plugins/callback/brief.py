"""Output for people: what is done in which order, what changed, what failed; no line for what was right."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import shutil
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any

from ansible import constants
from ansible.plugins.callback.default import CallbackModule as Default
from ansible_collections.stepladder.core.plugins.module_utils.lease import append, utc
from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run

from stepladder.notification import tell_end

DOCUMENTATION = """
name: brief
type: stdout
short_description: Plays, changes and failures
description:
  - The default output without tasks that changed nothing. Progress of long tasks is shown by the tasks themselves.
  - With C(-v) it is the default output.
extends_documentation_fragment: [default_callback, result_format_callback]
"""


def failure_text(result: Mapping[str, Any]) -> str:
    """What a failed task said: its message, then what its command printed."""
    parts = [str(result.get("msg") or "no message; run again with -v")]
    streams = ("stdout", "stderr", "module_stdout", "module_stderr")
    parts += [f"{stream}: {result[stream]}" for stream in streams if result.get(stream)]
    return "\n".join(parts)


def refuse_empty_run(display: Any, stats: Any) -> None:
    """End with an error where no play had a host: nothing was done, and that must not look like success.

    Raises:
        SystemExit: always, if no host was met.
    """
    if not stats.processed:
        display.display(
            "Nothing was done: no host of the inventory is in the group 'engines', or --limit leaves none, or "
            "--start-at-task left out the plan, without which nothing is done.",
            color=constants.COLOR_ERROR,
            stderr=True,
        )
        sys.stdout.flush()
        os._exit(1)  # an exception in a callback is only a warning to Ansible


def import_before_forks() -> None:
    """Import what our filters and the planner import, once and here.

    Ansible forks a worker for each task and host, and what a worker imports goes with it: 0.4 s of a core each time.
    The collector would touch, and so copy, all of it in every worker; it leaves alone what is frozen.
    """
    for name in ("filter.plans", "filter.preparing", "filter.weights", "action.plan"):
        importlib.import_module(f"ansible_collections.stepladder.core.plugins.{name}")
    gc.freeze()


def _ignore_broken_pipes() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def leave(status: int) -> None:
    """End the run with an exit status of its own; Ansible knows none but its few.

    An exception in a callback is only a warning to Ansible, so the process ends here and what Ansible would have
    removed at its end is removed before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    shutil.rmtree(constants.DEFAULT_LOCAL_TMP, ignore_errors=True)
    os._exit(status)


class CallbackModule(Default):
    """The default output, less what went well and changed nothing."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    # Where programs read the output, what failed has to stand elsewhere.
    TROUBLE_TO_STDERR = False
    CALLBACK_NAME = "stepladder.core.brief"

    _heading = ""
    # How far the play has come, as one of its tasks said.
    _stage = ""
    _exit_status = 0
    _repeat_after = 0
    # What the run changes and why, once a task has said that it changes anything.
    _audited: Mapping[str, Any] | None = None

    def __init__(self) -> None:
        """Write line by line also into a pipe, and end when nobody reads it any more."""
        super().__init__()
        import_before_forks()
        self._started = time.monotonic()
        self._nodes: set[str] = set()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        # Workers do not: one that sends a module to a node that is gone writes to an ssh that has ended, and has to
        # say so rather than be ended.
        os.register_at_fork(after_in_child=_ignore_broken_pipes)

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Name the play in a line."""
        self._play = play
        self._stage = ""
        if self._display.verbosity:
            super().v2_playbook_on_play_start(play)
            return
        self._heading = play.get_name().strip()

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Name the play before its first task; a play that no host is left for is not named at all."""
        self._say_what_it_does(task)
        if self._display.verbosity:
            super().v2_playbook_on_task_start(task, is_conditional)
        elif self._heading:
            self._display.display(self._heading, color=constants.COLOR_HIGHLIGHT)
            self._heading = ""

    def v2_playbook_on_no_hosts_matched(self) -> None:
        """Print nothing: a play that concerns no node is left out; a run that concerns none is told of at the end."""

    def v2_runner_on_ok(self, result: Any) -> None:
        """Print a line where something changed, with the difference where it was asked for."""
        self._note(result)
        if self._display.verbosity:
            super().v2_runner_on_ok(result)
        elif result.is_changed() and "results" not in result.result:
            self._changed(result, result.task.get_name())

    def v2_runner_item_on_ok(self, result: Any) -> None:
        """Print a line where an item changed."""
        if self._display.verbosity:
            super().v2_runner_item_on_ok(result)
        elif result.is_changed():
            self._changed(result, f"{result.task.get_name()}: {self._get_item_label(result.result)}")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Print what is wrong, as the task said it."""
        self._note(result)
        if self._display.verbosity or ignore_errors:
            super().v2_runner_on_failed(result, ignore_errors=ignore_errors)
        elif "results" not in result.result:
            self._failed(result, result.task.get_name())

    def v2_runner_item_on_failed(self, result: Any) -> None:
        """Print what is wrong with an item."""
        if self._display.verbosity:
            super().v2_runner_item_on_failed(result)
        else:
            self._failed(result, f"{result.task.get_name()}: {self._get_item_label(result.result)}")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Print which node did not answer, and what the connection said."""
        if self._display.verbosity:
            super().v2_runner_on_unreachable(result)
            return
        # A task of one node that tells of all names those that it is about.
        names = result.result.get("no_answer") or [result.host.get_name()]
        self._trouble(f"{', '.join(names)}: UNREACHABLE", result, constants.COLOR_UNREACHABLE)

    def v2_runner_on_skipped(self, result: Any) -> None:
        """Print nothing."""
        if self._display.verbosity:
            super().v2_runner_on_skipped(result)

    def v2_runner_item_on_skipped(self, result: Any) -> None:
        """Print nothing."""
        if self._display.verbosity:
            super().v2_runner_item_on_skipped(result)

    def v2_playbook_on_include(self, included_file: Any) -> None:
        """Print nothing."""
        if self._display.verbosity:
            super().v2_playbook_on_include(included_file)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the recap; a run that met no host is a failure, whatever Ansible says."""
        super().v2_playbook_on_stats(stats)
        self._end(stats)

    def _note(self, result: Any) -> None:
        """Remember how a task wants the run to end; the first that says so is right."""
        told = result.result.get("stepladder") or {}
        self._exit_status = self._exit_status or int(told.get("exit_status", 0))
        self._repeat_after = self._repeat_after or int(told.get("repeat_after", 0))
        self._stage = told.get("doing", self._stage)
        if told.get("audit"):
            self._nodes.add(result.host.get_name())
            if self._audited is None:
                self._audited = told["audit"]
                self._write_audit({"event": "begin"})

    def _say_what_it_does(self, task: Any) -> None:
        """For those who look at a node meanwhile; what renews the node's lease carries it there."""
        if self._audited is not None:
            with contextlib.suppress(OSError):
                at = ", ".join(part for part in (self._play.get_name().strip(), self._stage) if part)
                this_run.doing_file().write_text(f"{at}: {task.get_name().strip()}")

    def _write_audit(self, record: Mapping[str, Any]) -> None:
        """Add a line to the controller's log; a log that cannot be written is said so, and stops nothing."""
        path = this_run.audit_file()
        line = {"format_version": 1, "at": utc(), "who": this_run.who(), "pid": os.getpid(), **(self._audited or {})}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            append(path, {**line, **record, "nodes": sorted(self._nodes)})
        except OSError as error:
            self._display.warning(f"The log {path} could not be written: {error.strerror}")

    def _tell(self, ended: Mapping[str, Any]) -> None:
        """Tell a chat how the run ended, where its beginning was told."""
        by = {"who": this_run.who(), "origin": socket.gethostname(), "nodes": sorted(self._nodes)}
        if line := tell_end(this_run.notify_file(), {**ended, **by}):
            self._display.display(line)

    def _end(self, stats: Any) -> None:
        """End the run as its tasks want it."""
        if self._audited is not None:
            red = bool(stats.failures or stats.dark)
            seconds = round(time.monotonic() - self._started, 1)
            outcome = "failed" if red else str(self._audited.get("outcome", "done"))
            ended = {"outcome": outcome, "exit_status": self._exit_status, "seconds": seconds}
            self._write_audit({"event": "end", **ended})
            self._tell({**self._audited, **ended})
        refuse_empty_run(self._display, stats)
        if self._repeat_after:
            self._again()
        if self._exit_status:
            leave(self._exit_status)

    def _again(self) -> None:
        """Make the whole run again after a while, until a person has seen enough."""
        try:
            time.sleep(self._repeat_after)
        except KeyboardInterrupt:
            leave(self._exit_status)
        shutil.rmtree(constants.DEFAULT_LOCAL_TMP, ignore_errors=True)
        # Ansible keeps its children from these; what comes now is no child.
        for descriptor in (0, 1, 2):
            os.set_inheritable(descriptor, True)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - the same run again, no shell

    def _failed(self, result: Any, what: str) -> None:
        self._trouble(f"{result.host.get_name()} | {what}: FAILED", result, constants.COLOR_ERROR)

    def _trouble(self, heading: str, result: Any, color: str) -> None:
        text = textwrap.indent(f"{heading}\n{textwrap.indent(failure_text(result.result), '  ')}", "  ")
        self._display.display(text, color=color, stderr=self.TROUBLE_TO_STDERR)

    def _changed(self, result: Any, what: str) -> None:
        text = f"  {result.host.get_name()} | {what}: changed"
        self._display.display(text, color=constants.COLOR_CHANGED, stderr=self.TROUBLE_TO_STDERR)
