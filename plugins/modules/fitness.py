#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fitness
short_description: Show what preflight found on all nodes, and stop where one is not fit
version_added: 0.2.0
description:
  - Puts together what M(stepladder.core.preflight) returned on every node, holds nodes that belong together against
    each other, and shows all of it once.
  - Fails when a node is not fit; is unreachable when all that answered are fit and one did not answer.
author:
  - Stepladder contributors (@stepladder)
options:
  hosts:
    description: The nodes, in the order of the table.
    type: list
    elements: str
    required: true
  result:
    description: Name of the variable in which each host registered what preflight returned.
    type: str
    required: true
  format:
    description: A table for people, JSON for programs, or only what makes nodes unfit, in the message.
    type: str
    choices: [human, json, failures]
    default: human
  plan:
    description: The whole plan, which says which nodes belong together.
    type: dict
  plan_refused:
    description: Why there is no plan.
    type: str
    default: ''
  accept:
    description: Checks whose failures are only warnings, such as C(xid).
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Reads only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Show the fitness of all nodes
  stepladder.core.fitness:
    hosts: "{{ ansible_play_hosts_all }}"
    result: preflight_result
  run_once: true
"""

RETURN = r"""
unfit:
  description: Nodes that answered and are not fit.
  returned: always
  type: list
  elements: str
verdict:
  description: How many nodes are fit, in a sentence or two.
  returned: always
  type: str
  sample: 2 of 2 nodes fit; 0 failures, 1 warning.
no_answer:
  description: Nodes that did not answer.
  returned: always
  type: list
  elements: str
"""
