#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: diagnose
short_description: Name the first layer that fails, and put what was gathered into one archive
description:
  - Runs on the controller. With O(state=begun) it only makes sure that the archive can be written.
  - Reads of every host C(diagnose_found), which the role sets, and the archive that was fetched from it.
  - A host without C(diagnose_found) did not answer.
options:
  state:
    description: Whether it begins, before anything is gathered, or ends with the archive.
    type: str
    choices: [begun, done]
    required: true
  directory:
    description: Folder on the controller for the archive.
    type: path
    required: true
  deployment:
    description: Name of the deployment.
    type: str
    required: true
  hosts:
    description: All hosts that were asked.
    type: list
    elements: str
    default: []
  exit_status:
    description: Name of the exit status where something fails.
    type: str
    default: not_ready
attributes:
  check_mode:
    support: full
    description: Changes nothing on a node in either mode.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Name what fails
  stepladder.core.diagnose:
    state: done
    directory: .
    deployment: step3
    hosts: [h20-node1, h20-node2]
  run_once: true
"""

RETURN = r"""
folder:
  description: Where the archives of the nodes are to be fetched to.
  returned: when begun
  type: str
  sample: /root/.ansible/tmp/x/diagnose
archive:
  description: The archive on the controller.
  returned: when done
  type: str
  sample: /root/stepladder-step3-20261121T031500Z.tar.gz
first_failing_layer:
  description: Name of the layer; empty where none fails.
  returned: when done
  type: str
  sample: rendezvous
"""
