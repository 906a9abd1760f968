"""Prints a text to the operator as it is, without Ansible's frame around it."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder.exit_status import status_of


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "text": {"type": "str", "default": ""},
                "exit_status": {"type": "str"},
                "fails": {"type": "bool", "default": False},
                "repeat_after": {"type": "int"},
                "audit": {"type": "dict"},
                "doing": {"type": "str"},
            }
        )
        # The callback plugins read what stands under this key.
        told = {}
        if arguments["exit_status"]:
            told["exit_status"] = status_of(arguments["exit_status"])
        for name in ("repeat_after", "audit", "doing"):
            if arguments[name]:
                told[name] = arguments[name]
        answer = result | {"changed": False} | ({"stepladder": told} if told else {})
        if arguments["fails"]:
            return answer | {"failed": True, "msg": arguments["text"]}
        if arguments["text"]:
            show(arguments["text"])
        return answer
