#!/usr/bin/python
"""Tell the truth about the processes of a deployment on a node."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: engine_state
short_description: Tell the truth about the processes of a deployment on a node
description:
  - One call reads, for each process, the process manager, the process itself, its port and the end of its log.
  - Changes nothing.
  - When no process manager answers, processes that carry the deployment's mark in their environment are still found
    (RV(states[].orphans)).
extends_documentation_fragment: stepladder.core.engine_processes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Look at the engine
  stepladder.core.engine_state:
    deployment_path: /var/lib/stepladder/deployments/step3
    manager: supervisor
    supervisorctl: [/var/lib/stepladder/venvs/supervisor/bin/supervisorctl, -c, /var/lib/stepladder/supervisor/conf]
    processes:
      - name: vllm-0
        unit: step3-vllm-0
        health: {kind: vllm, port: 8000}
        log: /var/lib/stepladder/deployments/step3/logs/vllm-0.log
        wanted_fingerprint: "{{ release_written.fingerprints['vllm-0'] }}"
  register: engine_seen
"""

RETURN = r"""
states:
  description: The state of each process, in the order asked.
  returned: always
  type: list
  elements: dict
  contains:
    name: {description: Name of the process., type: str, sample: vllm-0}
    unit: {description: Unit or program name., type: str, sample: step3-vllm-0}
    phase:
      description: >-
        absent, stopped, starting, loading, ready, unhealthy, failed (ended, will not be started again) or
        crash_looping (ended, will be started again).
      type: str
      sample: ready
    detail: {description: One sentence that says why., type: str, sample: "port 8000 answers 200, up for 310 s"}
    manager_state: {description: The process manager's own words., type: str, sample: RUNNING}
    pid: {description: Pid of the main process or 0., type: int, sample: 4711}
    running: {description: Whether that process is alive., type: bool, sample: true}
    since: {description: Seconds since the process started or null., type: float, sample: 310.2}
    restarts:
      description: How often systemd started it again; null under supervisor, which does not count (compare pids).
      type: int
      sample: 0
    exit: {description: How it last ended, when known., type: str, sample: exit status 1}
    fingerprint: {description: Mark in the running process's environment., type: str, sample: 5f0c6d1e2b3a4958}
    release: {description: Plan id that the link current names., type: str, sample: 20261120-3f9a1c}
    outdated:
      description: Whether the running command is another one than wanted; null when that cannot be known.
      type: bool
      sample: false
    http_status: {description: Status of the health answer or null., type: int, sample: 200}
    orphans:
      description: Pids with this process's mark outside its process tree, left over from an earlier start.
      type: list
      elements: int
      sample: []
    log: {description: Path of the log file., type: str, sample: /var/log/vllm-0.log}
    log_tail:
      description: Last lines of the log, without escape sequences, secrets masked.
      type: list
      elements: str
      sample: ["INFO: Application startup complete."]
    first_errors:
      description: First lines of the last start that failed which name an error; the cause stands above what follows.
      type: list
      elements: str
      sample: ["ImportError: libnuma.so.1: cannot open shared object file: No such file or directory"]
    rss_bytes:
      description: Resident memory of the process tree in bytes; a page that n processes share counts n times.
      type: int
      sample: 8123047936
    work:
      description: >-
        What all processes of the deployment on this node did so far, C(read) bytes, C(cpu) seconds and C(rss) bytes;
        null where it may not be read.
      type: dict
      sample: {read: 81230479360, cpu: 311.2, rss: 8123047936}
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import engine_state

HEALTH_SPEC = {
    "kind": {"type": "str", "choices": ["vllm", "sglang", "tcp", "http", "none"], "default": "none"},
    "host": {"type": "str", "default": "127.0.0.1"},
    "port": {"type": "int"},
    "path": {"type": "str", "default": "/health"},
    "model": {"type": "str"},
}
PROCESS_SPEC = {
    "name": {"type": "str", "required": True},
    "unit": {"type": "str", "required": True},
    "health": {"type": "dict", "options": HEALTH_SPEC, "default": {"kind": "none"}},
    "log": {"type": "path"},
    "wanted_fingerprint": {"type": "str"},
    "container_id_file": {"type": "path"},
    "ever_ready": {"type": "bool", "default": False},
}


def main() -> None:
    """Look once and answer."""
    module = AnsibleModule(
        argument_spec={
            "deployment_path": {"type": "path", "required": True},
            "manager": {"type": "str", "choices": ["systemd", "supervisor"], "required": True},
            "supervisorctl": {"type": "list", "elements": "str", "default": []},
            "processes": {"type": "list", "elements": "dict", "required": True, "options": PROCESS_SPEC},
            "log_lines": {"type": "int", "default": 20},
            "http_timeout": {"type": "float", "default": 3.0},
            "ask_timeout": {"type": "float", "default": 0.0},
            "follows": {"type": "dict", "options": HEALTH_SPEC},
        },
        supports_check_mode=True,
    )
    given = module.params
    faults = engine_state.check_arguments(given["manager"], given["supervisorctl"], given["processes"])
    if faults:
        module.fail_json(msg="\n".join(faults))
    units = [process["unit"] for process in given["processes"]]
    managers = engine_state.read_managers(given["manager"], given["supervisorctl"], units, os.environ)
    states = engine_state.look(
        given["deployment_path"],
        managers,
        given["processes"],
        given["log_lines"],
        given["http_timeout"],
        ask_timeout=given["ask_timeout"],
    )
    if given["follows"]:
        states.append(engine_state.head_state(given["follows"], given["http_timeout"]))
    module.exit_json(changed=False, states=states)


if __name__ == "__main__":
    main()
