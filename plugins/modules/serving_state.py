#!/usr/bin/python
"""Tell how a node's gateway and watchdog are."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: serving_state
short_description: Tell how a node's gateway and watchdog are
description:
  - Asks HAProxy's admin socket which replicas are in rotation, and reads what the watchdog wrote. Changes nothing.
options:
  gateway_directory:
    description: The gateway's directory.
    type: path
    required: true
  watchdog_directory:
    description: The watchdog's directory.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: See the gateway and the watchdog
  stepladder.core.serving_state:
    gateway_directory: /var/lib/stepladder/gateway/step3
    watchdog_directory: /var/lib/stepladder/watchdog/step3
"""

RETURN = r"""
gateway:
  description: >-
    What is wrong with the gateway, empty where nothing is, and its replicas; null where there is none. C(taken_out_by)
    is the run of the rollout that took one out, empty where an earlier version did, which wrote down no run.
    C(agent_problem) is what HAProxy says where the gateway's agent answers for no replica.
  returned: always
  type: dict
  sample:
    problem: ''
    agent_problem: ''
    servers:
      - {replica: 0, place: "198.18.0.5:8000", status: DRAIN, in_rotation: false, drained: true, taken_out: true,
         taken_out_by: 5f0c, in_flight: 3}
watchdog:
  description: What the watchdog saw and did; null where there is none.
  returned: always
  type: dict
  sample: {problem: '', mode: observe, engines: [{process: vllm-0, state: busy, stalls: 0, restarts: 0}]}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import serving_state


def main() -> None:
    """Read and answer."""
    module = AnsibleModule(
        argument_spec={
            "gateway_directory": {"type": "path", "required": True},
            "watchdog_directory": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    module.exit_json(
        changed=False,
        gateway=serving_state.gateway(module.params["gateway_directory"]),
        watchdog=serving_state.watchdog(module.params["watchdog_directory"]),
    )


if __name__ == "__main__":
    main()
