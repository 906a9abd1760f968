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
  deployment:
    description: Deployment whose releases are told of in full; unset tells of none.
    type: str
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
releases:
  description: The releases of O(deployment) that lie on the node, newest first.
  returned: always
  type: list
  elements: dict
  contains:
    plan_id: {description: Name of the release., type: str, sample: e167fbadabe4}
    current: {description: Whether it is what runs now., type: bool, sample: true}
    previous: {description: Whether it is the way back., type: bool, sample: false}
    written: {description: When it was written in seconds since 1970 by the node's clock., type: float, sample: 1.7e9}
    since: {description: Since when it is current in seconds since 1970 or null., type: float, sample: 1.7e9}
    outcome: {description: 'proven, failed or unknown.', type: str, sample: proven}
    reason: {description: Why it failed., type: str, sample: ""}
    runs: {description: Model and engine., type: str, sample: step3 bf16 vllm 0.32.0}
    missing: {description: Files without which it cannot start., type: list, elements: str, sample: []}
slices:
  description: The slices of the plan of these releases by plan id.
  returned: always
  type: dict
  sample: {}
lease:
  description: Whose lease the node is, as M(stepladder.core.lease) tells it; null where it is free.
  returned: always
  type: dict
  sample: null
last_run:
  description: The run that had the lease last, for M(stepladder.core.lease); empty where none ever had it.
  returned: always
  type: str
  sample: 3f9a1c77ab02d5e8
frozen:
  description: Who froze the node; null where nobody did.
  returned: always
  type: dict
  sample: null
now:
  description: The node's time of day in seconds since 1970, to tell ages without comparing two clocks.
  returned: always
  type: float
  sample: 1.7e9
faults:
  description: Releases that are there and cannot be read, one sentence each.
  returned: always
  type: list
  elements: str
  sample: []
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import lease
from ansible_collections.stepladder.core.plugins.module_utils.deployments import read_deployments, read_releases


def main() -> None:
    """Read and answer."""
    module = AnsibleModule(
        argument_spec={"state_directory": {"type": "path", "required": True}, "deployment": {"type": "str"}},
        supports_check_mode=True,
    )
    given = module.params
    # Before all that is read: what changes meanwhile is a later run's.
    last_run = lease.last_run(given["state_directory"])
    try:
        deployments, faults = read_deployments(given["state_directory"])
        releases, slices = (
            read_releases(given["state_directory"], given["deployment"]) if given["deployment"] else ([], {})
        )
    except OSError as error:
        module.fail_json(msg=f"The releases cannot be read: {error}")
    try:
        held = lease.read(given["state_directory"])
        lease_told = held.told(lease.Clock.now()) if held else None
    except lease.LeaseError as error:
        faults.append(str(error))
        lease_told = None
    frozen = lease.read_freeze(given["state_directory"])
    module.exit_json(
        changed=False,
        deployments=deployments,
        faults=faults,
        releases=releases,
        slices=slices,
        lease=lease_told,
        last_run=last_run,
        frozen=frozen,
        now=time.time(),
    )


if __name__ == "__main__":
    main()
