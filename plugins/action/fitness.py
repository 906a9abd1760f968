"""Shows what preflight found on all nodes, and stops where one is not fit or did not answer."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder import fitness


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "hosts": {"type": "list", "elements": "str", "required": True},
                "result": {"type": "str", "required": True},
                "format": {"type": "str", "choices": list(fitness.FORMATS), "default": "human"},
                "plan": {"type": "dict"},
                "plan_refused": {"type": "str", "default": ""},
                "accept": {"type": "list", "elements": "str", "default": []},
            }
        )
        variables = (task_vars or {})["hostvars"]
        found = fitness.judge(
            {host: variables[host].get(arguments["result"]) for host in arguments["hosts"]},
            arguments["plan"] or None,
            arguments["plan_refused"],
            arguments["accept"],
        )
        if arguments["format"] == "failures":
            text = fitness.failures_text(found)
        else:
            show(fitness.to_json(found) if arguments["format"] == "json" else fitness.human(found))
            text = fitness.verdict(found)
        result |= {"changed": False, "unfit": found.unfit, "no_answer": found.unreachable}
        result["verdict"] = fitness.verdict(found)
        if found.unfit:
            return result | {"failed": True, "msg": text}
        if found.unreachable:
            return result | {"unreachable": True, "msg": text}
        return result
