#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: show
short_description: Print a text to the operator
description: Prints a text as it is, also where the output of tasks is switched off.
options:
  text:
    description: What is printed.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Show the plan
  stepladder.core.show:
    text: "{{ deployment_plan | stepladder.core.plan_text('human') }}"
  run_once: true
"""

RETURN = "# nothing beyond Ansible's own keys"
