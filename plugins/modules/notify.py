#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: notify
short_description: Tell a chat of what a changing run does
description:
  - Sends one message to a webhook, from the controller. Sends nothing where the run has no settings, or in check mode.
  - A message that does not arrive fails nothing; it is said in a line, without the webhook's address.
  - The end of a run is told by the callback plugin, whatever way the run ended.
options:
  event:
    description: What is told. O(event=start) keeps the settings for the rest of the run.
    type: str
    choices: [start, green, red, back, end]
    required: true
  settings:
    description:
      - With O(event=start) C(format), C(url) or C(url_file), C(secret) or C(secret_file), C(seconds), C(events).
    type: dict
    default: {}
  nodes:
    description: The nodes that it concerns.
    type: list
    elements: str
    default: []
  deployment:
    description: Name of the deployment; what is unset is as it was with O(event=start).
    type: str
    default: ""
  verb:
    description: What the run does.
    type: str
    default: ""
  why:
    description: Why, in the operator's words.
    type: str
    default: ""
  plan_id:
    description: What is to run.
    type: str
    default: ""
  reason:
    description: What was measured, what failed, or what was brought back.
    type: str
    default: ""
attributes:
  check_mode:
    support: full
    description: Sends nothing.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Tell that the gate is red
  stepladder.core.notify:
    event: red
    deployment: step3
    reason: "h20-node1: exit status 1"
  run_once: true
"""

RETURN = "# nothing beyond Ansible's own keys"
