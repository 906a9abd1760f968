#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: acceptance
short_description: Show which GPUs, links and nodes are slow or broken, and stop where something is
version_added: 0.2.0
description:
  - Puts together what the modules C(link_speed), C(gpu_speed) and C(all_reduce) measured.
  - It reads what each host registered as C(acceptance_line), C(acceptance_links), C(acceptance_gpus) and
    C(acceptance_all_reduce_seen).
  - GPUs are held against the catalogue and against each other.
author:
  - Stepladder contributors (@stepladder)
options:
  hosts:
    description: The nodes.
    type: list
    elements: str
    required: true
  level:
    description: At C(full), what was not measured is not accepted.
    type: str
    choices: [quick, full]
    default: quick
  format:
    description: A table for people, or JSON.
    type: str
    choices: [human, json]
    default: human
  minimum_gbit:
    description: Rate that each link has to have, in Gbit/s; 0 takes 60 % of the line rate, or of what most nodes reach.
    type: float
    default: 0
  all_reduce_gbit:
    description: Rate that an all-reduce between nodes has to have, in Gbit/s; 0 takes a share of the line rate.
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
- name: Name what is slow
  stepladder.core.acceptance:
    hosts: "{{ ansible_play_hosts_all }}"
    level: full
  run_once: true
"""

RETURN = r"""
slow_nodes:
  description: Nodes all of whose links are slow.
  returned: always
  type: list
  elements: str
no_answer:
  description: Nodes that did not answer.
  returned: always
  type: list
  elements: str
"""
