#!/usr/bin/python
"""Have Docker's settings on a node, beside those that others made."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: docker_settings
short_description: Have Docker's settings on a node, beside those that others made
description:
  - Puts settings into C(daemon.json). Keys that somebody else set stay; where one has another value than the wanted,
    nothing is changed and the message has both values. Lists get what they lack.
  - Writes limits and proxies for C(docker.service) into files of its own.
  - Lets a running daemon take over what it can, and starts it anew for the rest. Containers that would end by that are
    named, and nothing is done, unless O(restart_allowed).
  - A daemon that does not come back, or refuses the settings, goes on with the files that it had, and its log is shown.
  - What was written and is not in force yet stands in C(docker/stepladder.pending), so that a rerun goes on after an
    interruption.
options:
  settings:
    description: Settings, as C(daemon.json) has them. A value of null is left out.
    type: dict
    default: {}
  limits:
    description: Limits of C(docker.service) by systemd's names, such as C(MEMLOCK).
    type: dict
    default: {}
  proxies:
    description: Proxies that Docker pulls through, C(http_proxy), C(https_proxy) and C(no_proxy).
    type: dict
    default: {}
  restart_allowed:
    description: Whether containers may end when Docker is started anew.
    type: bool
    default: false
  root:
    description: Folder that holds C(docker) and C(systemd/system).
    type: path
    default: /etc
  progress_file:
    description: File for the newest line of progress.
    type: path
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Pull through the site's mirror
  stepladder.core.docker_settings:
    settings:
      registry-mirrors: ["https://mirror.example"]
      live-restore: true
"""

RETURN = r"""
actions:
  description: What was done, or would be.
  returned: always
  type: list
  elements: str
  sample: ["daemon.json: live-restore, registry-mirrors", reload Docker]
"""

import json
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import docker_settings as core
from ansible_collections.stepladder.core.plugins.module_utils import progress


def converge(params: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Compare, and make equal unless in check mode; returns the module's answer."""
    root = Path(params["root"])
    daemon, record = root / "docker/daemon.json", root / "docker/stepladder.json"
    unit, proxies = root / "systemd/system/docker.service.d/stepladder.conf", root / "docker/stepladder-proxy.env"
    wanted = {key: value for key, value in params["settings"].items() if value is not None}
    current, earlier = core.read_settings(daemon), core.read_settings(record)
    merged = core.merge(current, wanted, earlier)
    if merged.conflicts:
        raise core.SettingsError("\n".join(merged.conflicts))
    given = {key: value for key, value in params["proxies"].items() if value}
    has_unit = bool(given or params["limits"])
    files = [
        core.File(unit, core.drop_in(params["limits"], str(proxies) if given else "") if has_unit else None, 0o644),
        core.File(proxies, core.proxy_file(given) if given else None, 0o400),
    ]
    of_unit = [file for file in files if file.differs()]
    files = [*of_unit, core.File(record, core.as_text(wanted) if wanted else None, 0o644)]
    if merged.changed:
        files.append(core.File(daemon, core.as_text(merged.settings), 0o644))
    files = [file for file in files if file.differs()]
    former = tuple(core.File(file.path, file.found, file.mode) for file in files)
    pending = root / "docker/stepladder.pending"
    due = core.Pending.read(pending).joined(core.Pending(merged.changed, bool(of_unit), former))
    force = core.how(due.changed, due.unit) if core.answers() else core.RESTART if due.former else core.NONE
    running = core.running_containers() if force == core.RESTART else []
    # What a reload brings into force is in force before the restart.
    live = core.outlives() or (merged.settings.get("live-restore") is True)
    moved = core.moved_store(due.changed, merged.settings) if running else ()
    if fault := core.obstacle((*due.changed, *moved), running, live, params["restart_allowed"]):
        raise core.SettingsError(fault)
    actions = [f"daemon.json: {', '.join(merged.changed)}"] if merged.changed else []
    actions += [f"write {file.path}" if file.content is not None else f"remove {file.path}" for file in of_unit]
    actions += [] if force == core.NONE else [_words(force, running, live)]
    result = {
        "changed": bool(files) or force != core.NONE,
        "actions": actions,
        "diff": {"before": core.as_text(current), "after": core.as_text(merged.settings)},
    }
    if due.former and not check_mode:
        steps = [core.reload] if force == core.RELOAD or (force == core.RESTART and running and live) else []
        steps += [core.restart] if force == core.RESTART else []
        core.enforce(files, due, pending, steps, progress.ProgressFile(params["progress_file"]).write)
    return result


def _words(force: str, running: list[str], live: bool) -> str:
    """What becomes of Docker, in words."""
    if force == core.RELOAD:
        return "let Docker read its settings anew, without a restart"
    if not running:
        return "start Docker anew; no container runs"
    return f"start Docker anew; {', '.join(running)} " + ("run on meanwhile (live-restore)" if live else "end by that")


def main() -> None:
    """Make the settings so, answer once."""
    module = AnsibleModule(
        argument_spec={
            "settings": {"type": "dict", "default": {}},
            "limits": {"type": "dict", "default": {}},
            "proxies": {"type": "dict", "default": {}, "no_log": True},
            "restart_allowed": {"type": "bool", "default": False},
            "root": {"type": "path", "default": "/etc"},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, module.check_mode)
    except core.SettingsError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")
    module.exit_json(**json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
