from __future__ import annotations

import os
from typing import Any

from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction


class ActionModule(ProgressAction):
    """Runs the module of the same name as a job on the node and shows its progress; says which run this is."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        self._task.args = {**self._task.args, "run": this_run.mark(this_run.controller(os.getppid()))}
        return super().run(tmp, task_vars)
