"""Tells a chat of what a changing run does, from the controller; that it cannot fails nothing and is said in a line."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.parsing.vault import is_encrypted_file
from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.module_utils.engine_state import clean_line
from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder.notification import EVENTS, NotifyError, Settings, check, not_told, send

FILES = {"url": "url_file", "secret": "secret_file"}
RUN = ("deployment", "verb", "why", "plan_id", "reason")


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, given = self.validate_argument_spec(
            {
                "event": {"type": "str", "choices": list(EVENTS), "required": True},
                "settings": {"type": "dict", "default": {}, "no_log": True},
                "nodes": {"type": "list", "elements": "str", "default": []},
                **{name: {"type": "str", "default": ""} for name in RUN},
            }
        )
        answer = result | {"changed": False}
        if self._task.check_mode:
            return answer
        told = {name: given[name] for name in (*RUN, "nodes") if given[name]}
        if "reason" in told:
            told["reason"] = "\n".join(clean_line(line) for line in told["reason"].splitlines())
        try:
            if given["event"] == "start":
                told = {**told, "who": this_run.who(), "origin": socket.gethostname()}
                self._keep(given["settings"], told)
            settings = Settings.read(this_run.notify_file())
            if settings:
                send(settings, given["event"], told)
        except (NotifyError, AnsibleError, OSError, ValueError, TypeError) as error:
            show(not_told(error))
        return answer

    def _keep(self, settings: dict[str, Any], run: dict[str, Any]) -> None:
        """Keep the settings for the rest of the run, where it is to tell anybody, and what it said of itself.

        Raises:
            NotifyError: with what is wrong with them.
        """
        files = {name: settings.pop(file, None) for name, file in FILES.items()}
        for name, file in files.items():
            if file and not settings.get(name):
                settings[name] = self._read(f"notify_{FILES[name]}", str(file))
        if settings.get("url"):
            replace(check(settings), run=run).write(this_run.notify_file())

    def _read(self, name: str, file: str) -> str:
        path = Path(self._loader.path_dwim(file))
        try:
            mode = path.stat().st_mode & 0o777
            with path.open("rb") as stream:
                encrypted = is_encrypted_file(stream)
            if not encrypted and mode & 0o077:
                mend = f"run: chmod 0400 {path}, or encrypt it with ansible-vault"
                raise NotifyError(f"{name} {path} is readable by others (mode {mode:04o}): {mend}")
            # Read from its place, or from a copy that vault decrypted and Ansible removes again.
            text = Path(self._loader.get_real_file(str(path))).read_text(encoding="utf-8").strip()
        except (OSError, ValueError, AnsibleError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise NotifyError(f"{name} {path}: {cause}: name a readable file on the controller") from None
        if not text:
            raise NotifyError(f"{name} {path} is empty")
        return text
