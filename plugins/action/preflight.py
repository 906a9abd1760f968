"""Asks a node what it is; a node that cannot be asked is an answer too, and its clock is held against this one."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        before = time.time()
        try:
            answer = self._execute_module(task_vars=task_vars)
        except AnsibleConnectionFailure as error:
            return result | _unanswered(str(error))
        except AnsibleError as error:  # become that wants a password, among others
            return result | _unanswered(f"it answers, but nothing can be run: {error}")
        after = time.time()
        if answer.get("unreachable"):
            return result | _unanswered(str(answer.get("msg")))
        if answer.get("failed") or "facts" not in answer:
            said = answer.get("msg") or answer.get("module_stderr") or answer.get("module_stdout") or "nothing"
            return result | _unanswered(f"it answers, but preflight does not run there: {said}")
        now = answer["facts"]["clock"]["now"]
        clock = {"offset": now - (before + after) / 2, "error": (after - before) / 2}
        return result | {**answer, "changed": False, "problem": "", "clock": clock}


def _unanswered(why: str) -> dict[str, Any]:
    return {"changed": False, "problem": " ".join(why.split()), "findings": [], "facts": {}}
