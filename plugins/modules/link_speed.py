#!/usr/bin/python
"""Module stepladder.core.link_speed: the parameters and the result; the work is in module_utils/link_speed.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: link_speed
short_description: Measure how fast a node's links to its peers are
version_added: 0.2.0
description:
  - Sends with iperf3 to each peer and receives from each, in the rounds of C(stepladder.core.acceptance_rounds).
  - All nodes of the rounds have to run it at the same time.
  - Without rounds it only looks where peers meet the node, and at the line rate.
author:
  - Stepladder contributors (@stepladder)
options:
  rounds:
    description: The rounds that this node has a part in, in order.
    type: list
    elements: dict
    required: true
    suboptions:
      number:
        description: Of the round, from 0.
        type: int
        required: true
      peer:
        description: The peer's name.
        type: str
        required: true
      address:
        description: The peer's address.
        type: str
        required: true
      sends:
        description: Whether this node sends.
        type: bool
        required: true
  address:
    description:
      - This node's address or name, on which it receives.
      - Where it is none of the node's own addresses, the one at which Ansible's ssh arrived is taken if there is one.
    type: str
    required: true
  port:
    description: TCP port of round 0; each round has the next one.
    type: int
    default: 5201
  seconds:
    description: How long one measurement takes.
    type: float
    default: 1
  patience:
    description: Seconds by which nodes may begin apart, and that a pair may take beyond its measurements.
    type: float
    default: 10
attributes:
  check_mode:
    description: Measures nothing.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Measure the links between all nodes
  stepladder.core.link_speed:
    rounds: "{{ hostvars | stepladder.core.acceptance_rounds(groups['engines'], inventory_hostname) }}"
    address: "{{ ansible_host }}"
"""

RETURN = r"""
address:
  description: Where peers meet the node; empty where that is not known.
  returned: always
  type: str
  sample: 198.18.0.11
problem:
  description: Why it is not known.
  returned: always
  type: str
line_gbit:
  description: The line rate towards one peer in Gbit/s, none where no driver tells.
  returned: always
  type: float
  sample: 25.0
links:
  description: For each peer that this node sent to, what arrived there.
  returned: always
  type: list
  elements: dict
  sample: [{peer: node2, mbit: 9412.7, problem: ""}]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.link_speed import (
    line_gbit,
    measure,
    place_here,
    there,
)


def main() -> None:
    """Take part in the rounds, answer once."""
    text, number = {"type": "str", "required": True}, {"type": "int", "required": True}
    one_round = {"number": number, "peer": text, "address": text, "sends": {"type": "bool", "required": True}}
    module = AnsibleModule(
        argument_spec={
            "rounds": {"type": "list", "elements": "dict", "required": True, "options": one_round},
            "address": text,
            "port": {"type": "int", "default": 5201},
            "seconds": {"type": "float", "default": 1.0},
            "patience": {"type": "float", "default": 10.0},
        },
        supports_check_mode=True,
    )
    given = module.params
    place = place_here(given["address"])
    result = {**place._asdict(), "line_gbit": line_gbit(place.address)}
    if module.check_mode or not given["rounds"]:
        module.exit_json(changed=False, links=[], **result)
    if place.problem:
        module.fail_json(msg=place.problem)
    if not there():
        module.fail_json(msg="iperf3 is not there: apt-get install -y iperf3, or let acceptance_install be true.")
    module.exit_json(changed=False, links=measure(**{**given, "address": place.address}), **result)


if __name__ == "__main__":
    main()
