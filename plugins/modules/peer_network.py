#!/usr/bin/python
"""Tell a node's addresses, and which of its peers' it reaches."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: peer_network
short_description: Tell a node's addresses, and which of its peers' it reaches
description:
  - Lists the IPv4 addresses of the interfaces that are up, and knocks at the addresses of the peers.
  - An address that the node has itself is never a peer's (every node with Docker has the same bridge address).
  - Changes nothing.
options:
  peers:
    description: Addresses by peer's name; none lists the node's own only.
    type: dict
    default: {}
  port:
    description: TCP port of the peers to knock at; that it refuses is an answer too.
    type: int
    default: 22
  timeout:
    description: Seconds to wait for each answer.
    type: float
    default: 3
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: See which addresses of the other node are reached
  stepladder.core.peer_network:
    peers:
      h20-node2: [198.18.0.12, 198.19.0.12]
"""

RETURN = r"""
interfaces:
  description: The node's own addresses.
  returned: always
  type: list
  elements: dict
  sample: [{name: eth0, address: 198.18.0.11, network: 198.18.0.0/24, speed_mbit: 10000}]
reached:
  description: By peer and address the interface over which it answered, null where it did not.
  returned: always
  type: dict
  sample: {h20-node2: {198.18.0.12: eth0, 198.19.0.12: null}}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import peer_network


def main() -> None:
    """Look and answer."""
    module = AnsibleModule(
        argument_spec={
            "peers": {"type": "dict", "default": {}},
            "port": {"type": "int", "default": 22},
            "timeout": {"type": "float", "default": 3.0},
        },
        supports_check_mode=True,
    )
    given = module.params
    own = peer_network.interfaces()
    reached = peer_network.reach(given["peers"], own, given["port"], given["timeout"])
    module.exit_json(changed=False, interfaces=own, reached=reached)


if __name__ == "__main__":
    main()
