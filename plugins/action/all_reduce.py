"""Says who measures with whom, then takes part in the all-reduce."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show


class ActionModule(ActionBase):
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        group = self._task.args.get("group") or {}
        if group and group["rank"] == 0 and not self._task.check_mode:
            # The table at the end is for programs too, this is not.
            show(f"  all-reduce of {', '.join(group['names'])}", stderr=True)
        return result | self._execute_module(module_args=self._task.args, task_vars=task_vars)
