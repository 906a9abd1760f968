"""Looks at a server's host key, pins it, and lets the operator's key in; from the controller, not by Ansible's ssh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from stepladder import first_contact
from stepladder.errors import StepladderError


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "host": {"type": "str", "required": True},
                "port": {"type": "int", "default": 22},
                "known_hosts": {"type": "path", "required": True},
                "look": {"type": "bool", "default": False},
                "accepted": {"type": "list", "elements": "str", "default": []},
                "user": {"type": "str", "default": "root"},
                "login": {"type": "str", "default": "root"},
                "sudo": {"type": "bool", "default": False},
                "public_key": {"type": "str", "default": ""},
                "private_key": {"type": "str", "default": ""},
                "password_in": {"type": "str", "default": ""},
                "password_file": {"type": "str", "default": ""},
            }
        )
        server = first_contact.Server(arguments["host"], arguments["port"])
        known_hosts = Path(arguments["known_hosts"])
        try:
            if arguments["look"]:
                return result | _look(server, known_hosts)
            typed = (task_vars or {}).get(arguments["password_in"]) or {}
            return result | self._take_in(server, known_hosts, arguments, str(typed.get("user_input") or ""))
        except StepladderError as error:
            return result | {"failed": True, "msg": str(error)}

    def _take_in(
        self, server: first_contact.Server, known_hosts: Path, arguments: dict[str, Any], typed: str
    ) -> dict[str, Any]:
        apply = not self._task.check_mode
        seen = first_contact.look(server, known_hosts)
        changes = []
        pins = seen.state == first_contact.UNKNOWN and seen.key.fingerprint in arguments["accepted"]
        line = f"{server.name} {seen.key.kind} {seen.key.body}\n"
        if pins:
            changes.append(f"pin its host key in {known_hosts}")
            if not apply:
                return _changed(changes, known_hosts, line)
            first_contact.pin(known_hosts, server.name, seen.key)
        key, other_half = first_contact.public_key(arguments["public_key"], arguments["private_key"], Path.home())
        wish = first_contact.Wish(arguments["user"], arguments["login"], key, other_half, arguments["sudo"])
        changes += first_contact.take_in(
            server, known_hosts, wish, lambda: _password(arguments["password_file"], typed), apply=apply
        )
        return _changed(changes, known_hosts, line if pins else "")


def _password(file: str, typed: str) -> str:
    return first_contact.password_of(file) if file else typed


def _look(server: first_contact.Server, known_hosts: Path) -> dict[str, Any]:
    """The host key; a server that does not answer is told with the others, not before them."""
    try:
        seen = first_contact.look(server, known_hosts)
    except first_contact.ContactError as error:
        return {"changed": False, "state": "silent", "problem": str(error), "name": server.name}
    told = {"fingerprint": seen.key.fingerprint, "kind": seen.key.kind, "name": server.name, "state": seen.state}
    changed = first_contact.changed_text(server.name, seen, known_hosts)
    return {"changed": False, "problem": changed if seen.state == first_contact.CHANGED else "", **told}


def _changed(changes: list[str], known_hosts: Path, line: str) -> dict[str, Any]:
    before = {"before_header": str(known_hosts), "before": "", "after_header": str(known_hosts), "after": line}
    prepared = "".join(f"{change}\n" for change in changes)
    return {"changed": bool(changes), "changes": changes, "diff": [*([before] if line else []), {"prepared": prepared}]}
