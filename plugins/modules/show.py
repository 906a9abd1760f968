#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: show
short_description: Print a text to the operator
description: Prints a text as it is, also where the output of tasks is switched off.
options:
  text:
    description: What is printed; nothing where it is empty.
    type: str
    default: ""
  exit_status:
    description: Name of the exit status that the whole run shall end with, see C(stepladder.exit_status).
    type: str
  fails:
    description: Whether the task fails, with the text as its message.
    type: bool
    default: false
  repeat_after:
    description: Seconds after which the whole run shall be made again, until it is interrupted.
    type: int
  audit:
    description: What is written to the controller's log of the run, with C(verb), C(why), C(deployment), C(plan_id).
    type: dict
  doing:
    description: How far the play has come, for those who look at a node meanwhile; until it says so again or ends.
    type: str
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
