#!/usr/bin/python
"""Tell which deployments a node has."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: deployments
short_description: Tell which deployments a node has
description:
  - Reads the current release of every deployment on the node. Changes nothing.
options:
  state_directory:
    description: Where the toolkit keeps everything on the node.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: See what is deployed on the node
  stepladder.core.deployments:
    state_directory: /var/lib/stepladder
  register: __example_deployments
"""

RETURN = r"""
deployments:
  description: The slice of the plan that each deployment's current release keeps, by name.
  returned: always
  type: dict
  sample: {local: {plan_id: e167fbadabe4}}
faults:
  description: Releases that are there and cannot be read, one sentence each.
  returned: always
  type: list
  elements: str
  sample: []
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.deployments import read_deployments


def main() -> None:
    """Read and answer."""
    module = AnsibleModule(
        argument_spec={"state_directory": {"type": "path", "required": True}}, supports_check_mode=True
    )
    deployments, faults = read_deployments(module.params["state_directory"])
    module.exit_json(changed=False, deployments=deployments, faults=faults)


if __name__ == "__main__":
    main()
