"""Output for people: what is done in which order, what changed, what failed; no line for what was right."""

from __future__ import annotations

import io
import os
import signal
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

from ansible import constants
from ansible.plugins.callback.default import CallbackModule as Default

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


class CallbackModule(Default):
    """The default output, less what went well and changed nothing."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    # Where programs read the output, what failed has to stand elsewhere.
    TROUBLE_TO_STDERR = False
    CALLBACK_NAME = "stepladder.core.brief"

    _heading = ""

    def __init__(self) -> None:
        """Write line by line also into a pipe, and end when nobody reads it any more."""
        super().__init__()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Name the play in a line."""
        if self._display.verbosity:
            super().v2_playbook_on_play_start(play)
            return
        self._play = play
        self._heading = play.get_name().strip()

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Name the play before its first task; a play that no host is left for is not named at all."""
        if self._display.verbosity:
            super().v2_playbook_on_task_start(task, is_conditional)
        elif self._heading:
            self._display.display(self._heading, color=constants.COLOR_HIGHLIGHT)
            self._heading = ""

    def v2_runner_on_ok(self, result: Any) -> None:
        """Print a line where something changed, with the difference where it was asked for."""
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
        self._trouble(f"{result.host.get_name()}: UNREACHABLE", result, constants.COLOR_UNREACHABLE)

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
        refuse_empty_run(self._display, stats)

    def _failed(self, result: Any, what: str) -> None:
        self._trouble(f"{result.host.get_name()} | {what}: FAILED", result, constants.COLOR_ERROR)

    def _trouble(self, heading: str, result: Any, color: str) -> None:
        text = textwrap.indent(f"{heading}\n{textwrap.indent(failure_text(result.result), '  ')}", "  ")
        self._display.display(text, color=color, stderr=self.TROUBLE_TO_STDERR)

    def _changed(self, result: Any, what: str) -> None:
        self._display.display(f"  {result.host.get_name()} | {what}: changed", color=constants.COLOR_CHANGED)
