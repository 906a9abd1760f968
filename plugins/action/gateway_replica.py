from __future__ import annotations

import socket
from typing import Any

from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction


class ActionModule(ProgressAction):
    """Runs the module of the same name as a job on the node and shows its progress; says who asks."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        self._task.args = {**self._task.args, "who": this_run.who(), "origin": socket.gethostname()}
        return super().run(tmp, task_vars)
