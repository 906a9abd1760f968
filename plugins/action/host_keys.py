"""Shows the host keys that are not pinned yet, and says which of them may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder import first_contact
from stepladder.errors import StepladderError


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "hosts": {"type": "list", "elements": "str", "required": True},
                "result": {"type": "str", "required": True},
                "accept": {"type": "raw", "default": []},
                "shown": {"type": "path", "required": True},
            }
        )
        variables = (task_vars or {})["hostvars"]
        seen = {host: variables[host].get(arguments["result"]) or {} for host in arguments["hosts"]}
        problems = [f"{host}: {one['problem']}" for host, one in seen.items() if one.get("problem")]
        if problems:
            return result | {"failed": True, "msg": "\n".join(problems)}
        unknown = {host: one for host, one in seen.items() if one.get("state") == first_contact.UNKNOWN}
        shown_file = Path(arguments["shown"])
        try:
            fingerprints, what_was_shown = first_contact.parse_accepted(arguments["accept"])
        except StepladderError as error:
            return result | {"failed": True, "msg": str(error)}
        if what_was_shown:
            before = first_contact.shown_before(shown_file)
            fingerprints |= {
                one["fingerprint"] for one in unknown.values() if before.get(one["name"]) == one["fingerprint"]
            }
        open_ones = {host: one for host, one in unknown.items() if one["fingerprint"] not in fingerprints}
        if open_ones:
            show(
                "Host keys that are not pinned. Compare them with what the servers' consoles or your provider show\n"
                "(ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub on the server):\n"
                + first_contact.keys_table(open_ones)
            )
            if not self._task.check_mode:
                kept = {one["name"]: one["fingerprint"] for one in unknown.values()}
                try:
                    first_contact.keep_shown(shown_file, kept)
                except StepladderError as error:
                    return result | {"failed": True, "msg": str(error)}
        return result | {
            "changed": False,
            "accepted": sorted(fingerprints),
            "open": sorted({one["fingerprint"] for one in open_ones.values()}),
            "nodes": sorted(open_ones),
        }
