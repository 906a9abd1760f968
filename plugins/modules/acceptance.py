#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: acceptance
short_description: Show which links between nodes are slow, and stop where one is
version_added: 0.2.0
description:
  - Puts together what M(stepladder.core.link_speed) measured on every node, and names the slow node or link.
author:
  - Stepladder contributors (@stepladder)
options:
  hosts:
    description: The nodes.
    type: list
    elements: str
    required: true
  result:
    description: Name of the variable in which each host registered its measurements.
    type: str
    required: true
  format:
    description: A table for people, or JSON.
    type: str
    choices: [human, json]
    default: human
  minimum_gbit:
    description: Rate that each link has to have, in Gbit/s; 0 takes 60 % of what most nodes reach.
    type: float
    default: 0
attributes:
  check_mode:
    description: Reads only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Name the slow link
  stepladder.core.acceptance:
    hosts: "{{ ansible_play_hosts_all }}"
    result: acceptance_links
  run_once: true
"""

RETURN = r"""
slow_nodes:
  description: Nodes all of whose links are slow.
  returned: always
  type: list
  elements: str
"""
