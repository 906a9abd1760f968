"""`stepladder.core.speed`: runs the module of the same name, and once more before a release is called slower."""

from __future__ import annotations

import time
from typing import Any

from ansible import constants as C  # noqa: N812 - Ansible's own name for it
from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

# What made it slow for a moment, such as another job on the node, is given this many seconds to end.
PAUSE = 10.0
SECONDS = 20.0


class ActionModule(ActionBase):
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        if self._task.check_mode:
            return result | self._measure(variables)
        where = f"{variables.get('inventory_hostname', '?')} | {self._task.args.get('base_url', '')}"
        seconds = float(self._task.args.get("seconds") or SECONDS)
        show(f"  {where}: measuring how fast it answers, for {seconds:.0f} s after a warm-up")
        answer = self._measure(variables)
        if answer.get("verdict") == "slower" and not answer["proven_before"]:
            show(f"  {where}: {answer['line']}\n  {where}: slower, measuring once more to be sure", C.COLOR_WARN)
            time.sleep(PAUSE)
            answer = self._measure(variables)
        if "line" in answer:
            bad = answer["verdict"] in ("slower", "broke")
            show(f"  {where}: {answer['line']}", C.COLOR_ERROR if bad else C.COLOR_OK)
        return result | answer

    def _measure(self, variables: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(module_name="stepladder.core.speed", task_vars=variables)
        return answer
