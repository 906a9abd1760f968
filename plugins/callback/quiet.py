"""Output for verbs that only read: what they print themselves, and what failed."""

from __future__ import annotations

from typing import Any

from ansible_collections.stepladder.core.plugins.callback.brief import CallbackModule as Brief

DOCUMENTATION = """
name: quiet
type: stdout
short_description: What tasks print themselves, and failures
description: For verbs whose output is read by people or programs as it is, such as plan and status.
extends_documentation_fragment: [default_callback, result_format_callback]
"""


class CallbackModule(Brief):
    """Brief output without plays and without the recap."""

    CALLBACK_NAME = "stepladder.core.quiet"
    TROUBLE_TO_STDERR = True

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Keep the play for messages, without naming it."""
        self._play = play

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print no recap: the exit status says whether it went well."""
        self._end(stats)
