"""Output for verbs that only read: what they print, and what failed, without a line per task."""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback.default import CallbackModule as Default

DOCUMENTATION = """
name: quiet
type: stdout
short_description: Shows failures and what tasks print themselves
description: For verbs whose output is read by people or programs as it is, such as plan and status.
extends_documentation_fragment: [default_callback, result_format_callback]
"""


class CallbackModule(Default):
    """The default output with everything left out that went well."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "stepladder.core.quiet"

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Keep the play for messages, without a banner."""
        self._play = play

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Print no banner."""

    def v2_runner_on_ok(self, result: Any) -> None:
        """Print nothing."""

    def v2_runner_on_skipped(self, result: Any) -> None:
        """Print nothing."""

    def v2_playbook_on_include(self, included_file: Any) -> None:
        """Print nothing."""

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print nothing: the exit code says whether it went well."""
