#!/usr/bin/python
"""Say what differs on a node from its slice of a plan."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: node_state
short_description: Say what differs on a node from its slice of a plan
description:
  - One call compares the release, the units, the environments, the weights and the processes with what is wanted.
  - An engine that calls itself ready is asked for a token.
  - Changes nothing.
options:
  state_directory:
    description: Where the toolkit keeps everything on the node.
    type: path
    required: true
  deployment:
    description: Name of the deployment.
    type: str
    required: true
  slice:
    description: The node's slice of the plan; without one only RV(current) and RV(manager) are told.
    type: dict
    default: {}
  processes:
    description: As for M(stepladder.core.release); only containers have launchers of their own.
    type: list
    elements: dict
    default: []
  units:
    description: As O(processes) of M(stepladder.core.engine_state).
    type: list
    elements: dict
    default: []
  launchers:
    description: Program and arguments that run each command, by process manager.
    type: dict
    default: {}
  manager:
    description: What keeps the processes; V(auto) is systemd where it runs and this is root.
    type: str
    choices: [auto, systemd, supervisor]
    default: auto
  supervisorctl:
    description: How supervisorctl is called.
    type: list
    elements: str
    default: []
  described_by:
    description: Mark of what the units are made of.
    type: str
    default: ""
  keep:
    description: As for M(stepladder.core.release).
    type: int
    default: 3
  weights:
    description: How the node's weights are wanted and checked.
    type: dict
    suboptions:
      include:
        description: As for M(stepladder.core.model_weights).
        type: list
        elements: str
        default: []
      exclude:
        description: As for M(stepladder.core.model_weights).
        type: list
        elements: str
        default: []
      verify:
        description: V(full) is a reason by itself; all of them is read where the progress is shown.
        type: str
        choices: [cheap, full]
        default: cheap
      full_check_below_bytes:
        description: Size of a model up to which all of it is read again.
        type: int
        default: 1000000000
  ask_timeout:
    description: Seconds to wait for one token from a process that calls itself ready; V(0) does not ask.
    type: float
    default: 30
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: See what differs
  stepladder.core.node_state:
    state_directory: /var/lib/stepladder
    deployment: step3
    slice: "{{ deployment_slice }}"
    processes: "{{ deployment_slice.node | stepladder.core.release_processes([], path) }}"
    units: "{{ deployment_slice.node.processes | stepladder.core.service_units(path) | stepladder.core.watched_units }}"
  register: seen
"""

RETURN = r"""
reasons:
  description: What differs, a sentence each; empty where the node is as wanted.
  returned: always
  type: list
  elements: str
  sample: ["vllm-0: stopped, not running"]
weights_complete:
  description: Whether the weights are there as wanted.
  returned: always
  type: bool
  sample: true
current:
  description: The release that is current, null where there is none.
  returned: always
  type: str
  sample: 3f9a1c77ab02
last_run:
  description: The run that had the node's lease last; empty where none had it.
  returned: always
  type: str
  sample: f2d7a099e029b174
members:
  description: The nodes that the current release names.
  returned: always
  type: list
  elements: str
  sample: [node1, node2]
manager:
  description: What keeps the processes.
  returned: always
  type: str
  sample: systemd
states:
  description: As M(stepladder.core.engine_state) returns them.
  returned: always
  type: list
  elements: dict
  sample: []
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import node_state, release

WEIGHTS_SPEC = {
    "include": {"type": "list", "elements": "str", "default": []},
    "exclude": {"type": "list", "elements": "str", "default": []},
    "verify": {"type": "str", "choices": ["cheap", "full"], "default": "cheap"},
    "full_check_below_bytes": {"type": "int", "default": 1_000_000_000},
}


def main() -> None:
    """Look once and answer."""
    module = AnsibleModule(
        argument_spec={
            "state_directory": {"type": "path", "required": True},
            "deployment": {"type": "str", "required": True},
            "slice": {"type": "dict", "default": {}},
            "processes": {"type": "list", "elements": "dict", "default": []},
            "units": {"type": "list", "elements": "dict", "default": []},
            "launchers": {"type": "dict", "default": {}},
            "manager": {"type": "str", "choices": ["auto", "systemd", "supervisor"], "default": "auto"},
            "supervisorctl": {"type": "list", "elements": "str", "default": []},
            "described_by": {"type": "str", "default": ""},
            "keep": {"type": "int", "default": 3, "no_log": False},
            "weights": {"type": "dict", "options": WEIGHTS_SPEC, "apply_defaults": True},
            "ask_timeout": {"type": "float", "default": 30.0},
        },
        supports_check_mode=True,
    )
    try:
        answer = node_state.look(module.params, os.environ)
    except (release.ReleaseError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
