#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_keys
short_description: Show host keys that are not pinned, and say which of them may be
version_added: 0.2.0
description:
  - Fails, naming all of them, when servers do not answer or show another key than the pinned one.
  - Keeps what it showed, so that exactly that can be accepted later.
author:
  - Stepladder contributors (@stepladder)
options:
  hosts:
    description: The hosts.
    type: list
    elements: str
    required: true
  result:
    description: Name of the variable in which each host registered what M(stepladder.core.first_contact) saw.
    type: str
    required: true
  accept:
    description: Fingerprints, or the word C(shown) for those that were shown before; a list, or with commas.
    type: raw
    default: []
  shown:
    description: File that keeps what was shown.
    type: path
    required: true
attributes:
  check_mode:
    description: Keeps nothing.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Show host keys that are not pinned
  stepladder.core.host_keys:
    hosts: "{{ ansible_play_hosts_all }}"
    result: bootstrap_seen
    shown: inventories/h20/known_hosts.shown
  run_once: true
"""

RETURN = r"""
accepted:
  description: Fingerprints that may be pinned.
  returned: success
  type: list
  elements: str
open:
  description: Fingerprints that nobody accepted yet.
  returned: success
  type: list
  elements: str
nodes:
  description: The hosts that show them.
  returned: success
  type: list
  elements: str
"""
