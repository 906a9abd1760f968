"""Shows what is slow or broken, and stops where something is."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder import acceptance, all_reduce, gpu_acceptance
from stepladder.catalogue import Catalogue

LINKS = "acceptance_links"
GPUS = "acceptance_gpus"


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "hosts": {"type": "list", "elements": "str", "required": True},
                "level": {"type": "str", "choices": ["quick", "full"], "default": "quick"},
                "format": {"type": "str", "choices": ["human", "json"], "default": "human"},
                "minimum_gbit": {"type": "float", "default": 0.0},
                "all_reduce_gbit": {"type": "float", "default": 0.0},
            }
        )
        variables = (task_vars or {})["hostvars"]
        hosts = arguments["hosts"]
        links = {host: variables[host].get(LINKS) or {} for host in hosts}
        network = None
        if any("links" in told for told in links.values()):
            told = {host: one.get("links") for host, one in links.items()}
            network = acceptance.judge(told, arguments["minimum_gbit"] * 1000, acceptance.line_rates(variables, hosts))
        gpus = {host: dict(variables[host].get(GPUS) or {}) for host in hosts}
        declared = {host: str(variables[host].get("deployment_gpu") or "") for host in hosts}
        between = None
        if any(variables[host].get(all_reduce.LOOKED) for host in hosts):
            between = all_reduce.outcome(variables, hosts, arguments["all_reduce_gbit"])
        quiet = network.silent if network else ()
        silent = [host for host in hosts if "gpus" not in gpus[host] or host in quiet]
        rows = gpu_acceptance.judge(
            {host: told for host, told in gpus.items() if host not in silent}, declared, Catalogue().gpus
        )
        report = acceptance.report(
            level=arguments["level"], network=network, gpus=gpus, gpu_rows=rows, all_reduce=between, silent=silent
        )
        show(acceptance.text(report, arguments["format"]))
        result |= {"changed": False, "slow_nodes": list(network.slow_nodes) if network else [], "no_answer": silent}
        if report.accepted:
            return result
        kind = "failed" if report.bad else "unreachable"
        return result | {kind: True, "msg": "\n".join(acceptance.sentences(report))}
