#!/usr/bin/python
"""Module stepladder.core.peer_firewall: the parameters and the result; the work is in module_utils/peer_firewall.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: peer_firewall
short_description: Let only peers reach the ports of engines and ranks
version_added: 0.1.0
description:
  - Keeps one nftables table of its own, C(inet stepladder), replaced in one transaction. Other tables are not touched.
  - Its policy accepts; only the ports named are closed to strangers. SSH is open before anything else:
    the ports on which sshd or systemd's C(ssh.socket) listens, and that of this run's own connection.
  - Needs nft, which the role C(host) installs.
options:
  state:
    description: Whether there is a firewall.
    type: str
    choices: [present, absent]
    default: present
  peers:
    description: Addresses or networks that reach every port.
    type: list
    elements: str
    default: []
  clients:
    description: Addresses or networks that reach O(client_ports) too.
    type: list
    elements: str
    default: []
  ports:
    description: Ports and ranges that are for peers only.
    type: list
    elements: str
    default: []
  client_ports:
    description: Of those, the ones that clients reach.
    type: list
    elements: str
    default: []
  ssh_ports:
    description: Ports that are open to all, beside those on which the node lets people in by SSH.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    support: full
    description: Has nft judge the rules where it is there.
  diff_mode:
    support: full
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Let only the other ranks in
  stepladder.core.peer_firewall:
    peers: [198.18.0.11, 198.18.0.12]
    ports: ["6379", 20000-65535]
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode.
  type: list
  elements: str
  returned: always
  sample: [write /etc/stepladder/peers.nft, load the rules]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import peer_firewall, ssh_server, system_packages
from ansible_collections.stepladder.core.plugins.module_utils.peer_firewall import FirewallError, Wanted

STRINGS: dict[str, Any] = {"type": "list", "elements": "str", "default": []}
ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "peers": STRINGS,
    "clients": STRINGS,
    "ports": STRINGS,
    "client_ports": STRINGS,
    "ssh_ports": STRINGS,
}


def main() -> None:
    """Read the parameters, make the rules equal to them, answer once."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    present = module.params.pop("state") == "present"
    if present:
        # What Ansible connects to may be ssh's own wish (~/.ssh/config) or a port of address translation.
        module.params["ssh_ports"] = peer_firewall.with_found(module.params["ssh_ports"], ssh_server.ports())
    wanted = Wanted(**module.params) if present else None
    wrong = [*(peer_firewall.problems(wanted) if wanted else []), *filter(None, [system_packages.not_root()])]
    if wanted and not peer_firewall.nft() and not module.check_mode:
        wrong.append("there is no nft on this node: install the package nftables")
    if wrong:
        module.fail_json(msg="\n".join(wrong))
    actions = peer_firewall.plan(wanted)
    before = peer_firewall.current()
    try:
        if wanted and peer_firewall.nft():
            peer_firewall.check(wanted)
        if actions and not module.check_mode:
            if wanted:
                peer_firewall.apply(wanted)
            else:
                peer_firewall.remove()
    except FirewallError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")
    after = peer_firewall.rendered(wanted) if wanted else ""
    module.exit_json(
        changed=bool(actions), actions=actions, diff={"before": before, "after": after if actions else before}
    )


if __name__ == "__main__":
    main()
