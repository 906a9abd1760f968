#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: plan
short_description: Work out what a deployment will run
description:
  - Turns inventory variables and the catalogue into the plan. Reaches no node and touches nothing.
  - The same input gives the same plan to the byte.
options:
  deployment:
    description: What is wanted; keys are the C(deployment_*) variables without their prefix. Unset ones may be none.
    type: dict
    required: true
  hosts:
    description:
      - Inventory hosts that take part, in rank order.
      - Read from each are C(deployment_gpu), C(deployment_gpus), C(deployment_interface) and C(deployment_address).
    type: list
    elements: str
    required: true
  replaced:
    description:
      - By host that is out of service the one at its place in O(hosts), to refuse a name that is wrong.
    type: dict
    default: {}
  gateway_hosts:
    description:
      - Inventory hosts that the gateway runs on; none plans without one.
      - The C(gateway_*) variables of the first are read, and the C(gateway_address) of each.
    type: list
    elements: str
    default: []
  state_directory:
    description: Where the toolkit keeps everything on a node.
    type: path
    required: true
  plan_file:
    description: A plan that was written before; any other plan than exactly that one is refused, with what changed.
    type: path
  may_be_refused:
    description: Whether a refused plan is an answer, in C(refused), for those who can do without one. They start
      no ranks, and may be limited to some of a replica.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Work out the plan
  stepladder.core.plan:
    deployment: {model: step3, engine: vllm}
    hosts: "{{ groups['engines'] }}"
    state_directory: /var/lib/stepladder
  register: __example_plan
  run_once: true
"""

RETURN = r"""
refused:
  description: Why there is no plan; C(plan) and C(slices) are empty then.
  returned: when O(may_be_refused) and it was refused
  type: str
plan:
  description: The whole plan with its id.
  type: dict
  returned: success
  sample: {id: e167fbadabe4, format_version: 1}
slices:
  description: By host, what its roles read.
  type: dict
  returned: success
  sample: {node1: {plan_id: e167fbadabe4}}
"""
