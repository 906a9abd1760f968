"""Reads and judges the gateway's files on the controller; API keys stay there, only their hashes go to a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.parsing.vault import is_encrypted_file
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from stepladder.errors import StepladderError
from stepladder.gateway_secrets import GatewayFileError, certificate_pem, keys_map

FILES = ("certificate_file", "private_key_file", "api_keys_file")


class ActionModule(ActionBase):
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        files = {name: arguments.pop(name, None) for name in FILES}
        if arguments.get("state") == "loaded":
            return result | self._execute_module(module_args=arguments, task_vars=task_vars)
        try:
            secrets = self._secrets(files)
        except StepladderError as error:
            return result | {"failed": True, "msg": str(error)}
        if arguments.get("state") == "checked":
            return result | {"changed": False}
        return result | self._execute_module(module_args=arguments | secrets, task_vars=task_vars)

    def _secrets(self, files: dict[str, str | None]) -> dict[str, str]:
        """What goes to the node: hashes of the keys, and the certificate with its key.

        Raises:
            GatewayFileError: with all that is wrong with the files.
        """
        texts, faults = {}, []
        for name, file in files.items():
            try:
                texts[name] = self._read(name, file) if file else ""
            except GatewayFileError as error:
                faults.append(str(error))
        if faults:
            raise GatewayFileError("\n".join(faults))
        secrets = {"keys_map": "", "certificate": ""}
        try:
            if files["api_keys_file"]:
                secrets["keys_map"] = keys_map(texts["api_keys_file"], str(files["api_keys_file"]))
        except GatewayFileError as error:
            faults.append(str(error))
        try:
            if files["certificate_file"]:
                pem, warning = certificate_pem(texts["certificate_file"], texts["private_key_file"])
                secrets["certificate"] = pem
                if warning:
                    Display().warning(warning)
        except GatewayFileError as error:
            faults.append(str(error))
        if faults:
            raise GatewayFileError("\n".join(faults))
        return secrets

    def _read(self, name: str, file: str) -> str:
        path = Path(self._loader.path_dwim(file))
        try:
            mode = path.stat().st_mode & 0o777
            with path.open("rb") as stream:
                encrypted = is_encrypted_file(stream)
            if name != "certificate_file" and not encrypted and mode & 0o077:
                mend = f"run: chmod 0400 {path}, or encrypt it with ansible-vault"
                raise GatewayFileError(f"gateway_{name} {path} is readable by others (mode {mode:04o}): {mend}")
            # Read from its place, or from a copy that vault decrypted and Ansible removes again.
            return Path(self._loader.get_real_file(str(path))).read_text(encoding="utf-8")
        except (OSError, ValueError, AnsibleError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise GatewayFileError(f"gateway_{name} {path}: {cause}: name a readable file on the controller") from None
