"""Names the first layer that fails, and puts what was gathered on all nodes into one archive on the controller."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.stepladder.core.plugins.module_utils import evidence
from ansible_collections.stepladder.core.plugins.module_utils.engine_state import tail
from ansible_collections.stepladder.core.plugins.plugin_utils import run as this_run
from ansible_collections.stepladder.core.plugins.plugin_utils.showing import show

from stepladder import diagnosis
from stepladder.exit_status import status_of

FETCHED = "diagnose"
README = """

What is in this archive
  README.txt            this text; summary.json has the same for programs
  nodes/NODE/           of each node: logs/ of the processes, units/, release/ (plan, commands, environment), releases/
                        (outcomes), last-failure/, kernel.txt, gpus*.txt, network/, machine/, gateway/, watchdog/
  controller/           the last lines of the log of what was changed from there
Secrets are masked: those of the releases wherever they stand, and all that looks like a token, key or password. Still
look through it before it goes to strangers: it names machines, addresses and paths.
"""


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, given = self.validate_argument_spec(
            {
                "state": {"type": "str", "choices": ["begun", "done"], "required": True},
                "directory": {"type": "path", "required": True},
                "deployment": {"type": "str", "required": True},
                "hosts": {"type": "list", "elements": "str", "default": []},
                "exit_status": {"type": "str", "default": "not_ready"},
            }
        )
        directory = Path(given["directory"]).resolve()
        fetched = Path(constants.DEFAULT_LOCAL_TMP, FETCHED)
        if given["state"] == "begun":
            refuse_directory(directory)
            fetched.mkdir(mode=0o700, parents=True, exist_ok=True)
            return result | {"changed": False, "folder": str(fetched)}
        at = time.gmtime()
        variables = task_vars or {}
        hostvars = variables["hostvars"]
        nodes = [node_of(host, hostvars[host].get("diagnose_found"), fetched) for host in given["hosts"]]
        engines = variables["groups"].get("engines", [])
        found = diagnosis.diagnose(nodes, unasked=[host for host in engines if host not in given["hosts"]])
        told = diagnosis.text(found, given["deployment"], time.strftime("%Y-%m-%dT%H:%M:%SZ", at))
        show(told)
        name = f"stepladder-{given['deployment']}-{time.strftime('%Y%m%dT%H%M%SZ', at)}"
        texts = {
            "README.txt": told + README,
            "summary.json": diagnosis.document(found, given["deployment"], time.strftime("%Y-%m-%dT%H:%M:%SZ", at)),
            "controller/audit.jsonl": evidence.clean(tail(this_run.audit_file(), 200), 200_000),
        }
        path = directory / f"{name}.tar.gz"
        pack(path, name, texts, nodes)
        show(f"\nArchive: {path} ({path.stat().st_size / 1e6:.1f} MB, secrets masked)")
        first = found.first.layer if found.first else ""
        answer = result | {"changed": False, "archive": str(path), "first_failing_layer": first}
        if first or not found.deployed:
            answer["stepladder"] = {"exit_status": status_of(given["exit_status"])}
        return answer


def refuse_directory(directory: Path) -> None:
    """Fail where an archive could not be written, before minutes go into gathering.

    Raises:
        AnsibleActionFail: with what is wrong and how to mend it.
    """
    mend = "Give another folder: -e diagnose_directory=FOLDER. Nothing was gathered."
    if not directory.is_dir():
        raise AnsibleActionFail(f"The folder {directory} for the archive is not there. {mend}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise AnsibleActionFail(
            f"The folder {directory} for the archive may not be written by {this_run.who()}. {mend}"
        )


def node_of(host: str, found: Mapping[str, Any] | None, fetched: Path) -> diagnosis.Node:
    """What is known of a host, with the texts of its archive."""
    found = found or {"reached": False, "problem": "nothing is known of it"}
    texts = {}
    archive = fetched / f"{host}.tar.gz"
    problem = str(found.get("problem") or "")
    if archive.is_file():
        try:
            texts = read_archive(archive)
        except (OSError, tarfile.TarError, EOFError) as error:
            problem = problem or f"what it sent cannot be read: {error}"
    gateway = found.get("gateway")
    return diagnosis.Node(
        name=host,
        reached=bool(found.get("reached")),
        problem=problem,
        rows=[dict(row) for row in found.get("rows") or ()],
        missing=list(found.get("missing") or ()),
        since=str(found.get("since") or ""),
        texts=texts,
        gateway=gateway and {**gateway, "servers": [dict(each) for each in gateway["servers"]]},
        endpoints=[dict(each) for each in found.get("endpoints") or ()],
        at_work=str(found.get("at_work") or ""),
    )


def read_archive(path: Path) -> dict[str, list[str]]:
    """Lines by file name; nothing is written to a disk, so that a name in it can do no harm."""
    texts = {}
    with tarfile.open(path) as tar:
        for entry in tar:
            stream = tar.extractfile(entry) if entry.isfile() else None
            if stream and ".." not in Path(entry.name).parts and not entry.name.startswith("/"):
                texts[entry.name] = stream.read().decode("utf-8", "replace").splitlines()
    return texts


def pack(path: Path, name: str, texts: Mapping[str, str], nodes: list[diagnosis.Node]) -> None:
    """Write the archive, whole or not at all, for its owner alone; the summary comes first.

    Raises:
        AnsibleActionFail: the disk is full.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as tar:
            for file, text in texts.items():
                evidence.add_text(tar, f"{name}/{file}", text)
            for node in nodes:
                for file, lines in sorted(node.texts.items()):
                    evidence.add_text(tar, f"{name}/nodes/{node.name}/{file}", "\n".join([*lines, ""]))
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise AnsibleActionFail(
            f"The archive {path} could not be written: {error.strerror or error}. What fails stands above; for the "
            "archive give another folder: -e diagnose_directory=FOLDER."
        ) from None
