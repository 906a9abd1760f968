from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible_collections.stepladder.core.plugins.module_utils import python_venv
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction


class ActionModule(ProgressAction):
    """Runs the module of the same name as a job on the node and shows its progress.

    Passwords are refused here, before the module's parameters are in the node's log or in the output of -vvv.
    """

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Refuse addresses with passwords, then run the module."""
        if problems := python_venv.address_problems(self._task.args):
            raise AnsibleActionFail("\n".join(problems))
        return super().run(tmp, task_vars)
