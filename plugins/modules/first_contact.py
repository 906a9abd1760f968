#!/usr/bin/python
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: first_contact
short_description: Pin a server's host key and let the operator's key in, with a password
version_added: 0.2.0
description:
  - Runs on the controller and speaks SSH itself, as the server may not know any key yet.
  - Sends nothing to a server whose host key is neither pinned nor accepted, and refuses one whose key changed.
author:
  - Stepladder contributors (@stepladder)
options:
  host:
    description: Address or name of the server.
    type: str
    required: true
  port:
    description: Its port.
    type: int
    default: 22
  known_hosts:
    description: File in which host keys are pinned. Two runs may write it at the same time.
    type: path
    required: true
  look:
    description: Whether to look at the host key only.
    type: bool
    default: false
  accepted:
    description: Fingerprints (C(SHA256:...)) that may be pinned.
    type: list
    elements: str
    default: []
  user:
    description: Who shall be let in; made where there is no such user.
    type: str
    default: root
  login:
    description: Who logs in now.
    type: str
    default: root
  sudo:
    description: Whether the user shall become root without a password.
    type: bool
    default: false
  public_key:
    description: File of the operator's public key; empty takes the private key's neighbour, else the usual ones.
    type: str
    default: ''
  private_key:
    description: File of the operator's private key; empty takes the public one's neighbour.
    type: str
    default: ''
  password_in:
    description: Name of the variable in which M(ansible.builtin.pause) registered the password.
    type: str
    default: ''
  password_file:
    description: File with the password in its first line, which nobody else may read.
    type: str
    default: ''
attributes:
  check_mode:
    description: Says what it would change; of a server whose key is not pinned only that.
    support: full
  diff_mode:
    description: Shows what is pinned and names what is changed on the server.
    support: full
"""

EXAMPLES = r"""
- name: Look at the host key
  stepladder.core.first_contact:
    host: 198.18.0.11
    known_hosts: inventories/h20/known_hosts
    look: true
  register: seen
"""

RETURN = r"""
state:
  description: Whether the host key is the pinned one (C(same)), C(unknown) or C(changed); C(silent) without an answer.
  returned: with O(look)
  type: str
fingerprint:
  description: Of the host key, as C(ssh-keygen -l) prints it.
  returned: with O(look), when the server answers
  type: str
changes:
  description: What was, or would be, changed.
  returned: without O(look)
  type: list
  elements: str
"""
