"""Shows which links are slow, and stops where one is."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder import acceptance


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "hosts": {"type": "list", "elements": "str", "required": True},
                "result": {"type": "str", "required": True},
                "format": {"type": "str", "choices": ["human", "json"], "default": "human"},
                "minimum_gbit": {"type": "float", "default": 0.0},
            }
        )
        variables = (task_vars or {})["hostvars"]
        told = {host: variables[host].get(arguments["result"]) or {} for host in arguments["hosts"]}
        links = {host: answer.get("links") for host, answer in told.items()}
        verdict = acceptance.judge(links, arguments["minimum_gbit"] * 1000)
        show(acceptance.text(verdict, arguments["format"]))
        result |= {"changed": False, "slow_nodes": list(verdict.slow_nodes)}
        if verdict.accepted:
            return result
        kind = "failed" if verdict.slow_nodes or verdict.slow_links else "unreachable"
        return result | {kind: True, "msg": "\n".join(acceptance.sentences(verdict))}
