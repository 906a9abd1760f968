#!/usr/bin/python
"""Give the gateway its configuration, and have it taken up without losing a request."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gateway
short_description: Give the gateway its configuration, and have it taken up without losing a request
description:
  - With O(state=checked) only judges the files of the controller and reaches no node.
  - With O(state=written) puts the files into place, after HAProxy itself has checked them; what runs is left alone.
  - With O(state=loaded) has a running HAProxy take up what was written. A new process gets new connections, the old one
    finishes its own. Does nothing where that is so already.
  - The action plugin of the same name reads the files of the controller; API keys stay there, only their hashes go on.
options:
  state:
    description: What is wanted.
    type: str
    choices: [checked, written, loaded]
    default: written
  certificate_file:
    description: File on the controller with the certificate and those between it and its root; vault may encrypt it.
    type: path
  private_key_file:
    description: File on the controller with the certificate's private key, without a password; vault may encrypt it.
    type: path
  api_keys_file:
    description: File on the controller with one API key a line, as C(NAME KEY); vault may encrypt it.
    type: path
  directory:
    description: The gateway's own directory; not needed with O(state=checked).
    type: path
  configuration:
    description: Text of the configuration, as the filter C(stepladder.core.gateway_configuration) gives it.
    type: str
    default: ""
  program:
    description: Where HAProxy is.
    type: path
    default: /usr/sbin/haproxy
  deadline:
    description: Seconds until the new configuration has to be taken up, and the same again for O(require_replicas).
    type: int
    default: 30
  if_running:
    description:
      - With O(state=loaded), leave a HAProxy that does not run to whoever starts it, and wait for no replica.
    type: bool
    default: false
  require_replicas:
    description: With O(state=loaded), fail unless every replica that is not drained gets requests.
    type: bool
    default: false
  put_back:
    description:
      - With O(state=loaded), put replicas back into rotation that a rollout took out and did not come to put back.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    description: Builds and checks the files aside, where HAProxy is there already, and changes nothing.
  diff_mode:
    support: full
    description: Shows the configuration and the names of the keys; a certificate only as changed or not.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Write the configuration
  stepladder.core.gateway:
    directory: /var/lib/stepladder/gateway/step3
    configuration: "{{ plan.gateway | stepladder.core.gateway_configuration('step3', directory, true) }}"

- name: Take it up
  stepladder.core.gateway:
    directory: /var/lib/stepladder/gateway/step3
    state: loaded
"""

RETURN = r"""
generation:
  description: Digest of the files; the running process tells it as its description.
  returned: always
  type: str
  sample: 5f0c6d1e2b3a
put_back:
  description: Replicas that a rollout had taken out of rotation and that are back in it.
  returned: with O(state=loaded)
  type: list
  elements: int
  sample: [1]
taking_requests:
  description: How many replicas get requests.
  returned: with O(state=loaded), outside of check mode and without O(if_running)
  type: int
  sample: 2
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import haproxy, rotation


def main() -> None:
    """Write or load, and answer."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["written", "loaded"], "default": "written"},
            "directory": {"type": "path", "required": True},
            "configuration": {"type": "str", "default": ""},
            "keys_map": {"type": "str", "default": "", "no_log": True},
            "certificate": {"type": "str", "default": "", "no_log": True},
            "program": {"type": "path", "default": "/usr/sbin/haproxy"},
            "deadline": {"type": "int", "default": 30},
            "if_running": {"type": "bool", "default": False},
            "require_replicas": {"type": "bool", "default": False},
            "put_back": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        answer = write(given, module.check_mode) if given["state"] == "written" else load(given, module.check_mode)
    except (haproxy.GatewayError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**answer)


def write(given: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Put the files into place."""
    wanted = haproxy.wanted_files(given["configuration"], given["keys_map"], given["certificate"])
    found = haproxy.observe(given["directory"])
    if fault := haproxy.check_directory(given["directory"]):
        raise haproxy.GatewayError(fault)
    changed = not haproxy.is_current(found, wanted)
    if changed and not check_mode:
        if fault := haproxy.version_fault(given["program"]):
            raise haproxy.GatewayError(fault)
        haproxy.apply(given["directory"], wanted, given["program"])
    elif changed and Path(given["program"]).exists():
        with tempfile.TemporaryDirectory() as aside:
            haproxy.build(Path(aside, "new"), wanted)
            if said := haproxy.complaints(given["program"], Path(aside, "new")):
                raise haproxy.GatewayError(f"HAProxy does not take the configuration:\n{said}")
    diff = [{"before": shown(found.files), "after": shown(wanted.files), "before_header": "gateway"}]
    return {"changed": changed, "generation": wanted.generation, "diff": diff if changed else []}


def shown(files: Any) -> str:
    """The files for human eyes: names of keys without their hashes, no certificate."""
    if not files:
        return ""
    keys = [line.partition(" ")[2] for line in files.get("keys.map", "").splitlines()]
    marks = [f"# key of {name}" for name in sorted(keys)]
    if "tls.pem" in files:
        digest = hashlib.sha256(files["tls.pem"].encode()).hexdigest()[:12]
        marks.append(f"# certificate and private key {digest}")
    return "\n".join([files[haproxy.CONFIGURATION], *marks]) + "\n"


def load(given: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Have it taken up."""
    wanted = haproxy.observe(given["directory"]).current
    master = haproxy.Master(given["directory"])
    running = master.generation()
    if given["if_running"] and running is None:
        return {"changed": False, "generation": wanted or "", "put_back": []}
    changed = running != wanted
    if changed and wanted and not check_mode:
        master.reload(wanted, given["deadline"])
    back: list[int] = []
    if given["put_back"] and rotation.marked(given["directory"]):
        back = rotation.put_back(master, None, 0, check_mode)
    changed = changed or bool(back)
    if check_mode or given["if_running"]:
        return {"changed": changed, "generation": wanted or "", "put_back": back}
    return {
        "changed": changed,
        "generation": wanted,
        "put_back": back,
        "taking_requests": taking_requests(master, given),
    }


def taking_requests(master: haproxy.Master, given: dict[str, Any]) -> int:
    """How many replicas get requests; waits for those that are to."""
    servers = haproxy.wait_for_replicas(master.servers, given["deadline"] if given["require_replicas"] else 0)
    if given["require_replicas"] and (out := haproxy.left_out(servers)):
        faults = [
            f"replica {server.name.rpartition('-')[2]} at {server.address}: {server.status} ({server.check})"
            for server in out
        ]
        raise haproxy.GatewayError(
            f"The gateway gives no requests to {', '.join(faults)}. Does its host reach that address? It gives them as "
            "soon as the replica is healthy."
        )
    return sum(haproxy.in_rotation(server) for server in servers.values())


if __name__ == "__main__":
    main()
