"""Measures a node's GPUs as a job, and shows which tool is at work."""

from __future__ import annotations

from typing import Any

from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction


class ActionModule(ProgressAction):
    def _is_needed(self, foreseen: dict[str, Any]) -> bool:
        return bool(foreseen.get("gpus")) and not foreseen.get("problems")
