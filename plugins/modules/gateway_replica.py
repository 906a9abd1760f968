#!/usr/bin/python
"""Take a replica out of the gateway's rotation, or put it back."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gateway_replica
short_description: Take a replica out of the gateway's rotation, or put it back
description:
  - A drained replica gets no new request. Those that it has are waited for, in the gateway's processes of before a
    reload too.
  - What is drained stays so over a reload and a crash of the gateway, and over a rollout.
options:
  directory:
    description: The gateway's own directory.
    type: path
    required: true
  deployment:
    description: Name of the deployment, for messages.
    type: str
    required: true
  replica:
    description: Number of the replica.
    type: int
    required: true
  state:
    description: What is wanted.
    type: str
    choices: [drained, ready]
    required: true
  weight:
    description: Percent of a full share of the requests, with O(state=ready).
    type: int
    default: 100
  deadline:
    description: Seconds to wait until nothing is in flight, or until the replica gets requests.
    type: int
    default: 600
  allow_last:
    description: Drain it even where no other replica takes requests.
    type: bool
    default: false
  at_work:
    description: Whose run changes the deployment just now, in words; empty where nobody's does.
    type: str
    default: ""
  allow_rollout:
    description: With O(state=ready), put back even what the rollout of O(at_work) took out.
    type: bool
    default: false
  who:
    description: Who drains it, for the verb status; the action plugin fills it in.
    type: str
    default: ""
  origin:
    description: The machine that is asked from; the action plugin fills it in.
    type: str
    default: ""
  progress_file:
    description: File that always holds one line on how far the module is.
    type: path
attributes:
  check_mode:
    support: full
    description: Says whether something would change, and does not wait.
  diff_mode:
    support: full
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Take replica 1 out of rotation
  stepladder.core.gateway_replica:
    directory: /var/lib/stepladder/gateway/step3
    deployment: step3
    replica: 1
    state: drained
    deadline: 900
"""

RETURN = r"""
servers:
  description: All replicas as the gateway sees them now.
  returned: always
  type: list
  elements: dict
  sample: [{replica: 0, status: UP, drained: false, weight: 100, in_flight: 3}]
in_flight:
  description: Requests that the replica still has.
  returned: always
  type: int
  sample: 0
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import haproxy, rotation, serving_state
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile


def main() -> None:
    """Change, wait, answer."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "deployment": {"type": "str", "required": True},
            "replica": {"type": "int", "required": True},
            "state": {"type": "str", "choices": ["drained", "ready"], "required": True},
            "weight": {"type": "int", "default": 100},
            "deadline": {"type": "int", "default": 600},
            "allow_last": {"type": "bool", "default": False},
            "at_work": {"type": "str", "default": ""},
            "allow_rollout": {"type": "bool", "default": False},
            "who": {"type": "str", "default": ""},
            "origin": {"type": "str", "default": ""},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    try:
        answer = change(module.params, module.check_mode)
    except (haproxy.GatewayError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**answer)


def change(given: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Bring the replica into the wanted state and wait for it."""
    name, deployment = f"replica-{given['replica']}", given["deployment"]
    if not Path(given["directory"], "current").is_dir():
        raise haproxy.GatewayError(f"There is no gateway for {deployment} here. Run the verb 'gateway' first.")
    if not 1 <= given["weight"] <= 100:
        raise haproxy.GatewayError(f"weight is {given['weight']}: give percent, 1 to 100; 'drain' takes it out")
    master = haproxy.Master(given["directory"])
    servers = master.servers()
    server = haproxy.find(servers, given["replica"], deployment)
    drain = given["state"] == "drained"
    before = shown(server)
    changed = not server.drained if drain else shown(server) != f"{name}: {given['weight']} %"
    if changed and drain and not given["allow_last"] and (why := haproxy.refuse_last(servers, name)):
        raise haproxy.GatewayError(
            f"Replica {given['replica']} was not drained, {why}. Bring another one up first, or add "
            "-e gateway_allow_last=true."
        )
    taken_out = given["replica"] in rotation.marked(given["directory"])
    if not drain and taken_out and given["at_work"] and not given["allow_rollout"]:
        raise haproxy.GatewayError(
            f"Replica {given['replica']} was not put back: a rollout took it out, to stop its engine, and is still at "
            f"work ({given['at_work']}). It puts it back itself once it answers as promised. Wait for it, or add "
            "-e gateway_allow_rollout=true."
        )
    if not check_mode:
        rotation.forget(given["directory"], given["replica"])
    if changed and not check_mode:
        if drain:
            master.change(f"set server {haproxy.BACKEND}/{name} state drain")
        else:
            master.change(f"set server {haproxy.BACKEND}/{name} weight {given['weight']}%")
            master.change(f"set server {haproxy.BACKEND}/{name} state ready")
        master.keep_state()
        serving_state.note_drained(given["directory"], name, given["who"] if drain else "", given["origin"])
    if check_mode:  # what calls this as a job goes on only where a first look says that there is something to do
        changed = changed or (master.in_flight(name) > 0 if drain else not haproxy.in_rotation(server))
    else:
        (wait_idle if drain else wait_ready)(master, name, given)
    after = f"{name}: drained" if drain else f"{name}: {given['weight']} %"
    seen = master.servers()
    return {
        "changed": changed,
        "servers": haproxy.names_of(list(seen.values())),
        "in_flight": master.in_flight(name),
        "diff": [{"before": f"{before}\n", "after": f"{after}\n"}] if changed else [],
    }


def shown(server: haproxy.Server) -> str:
    """Its share of the requests."""
    return f"{server.name}: drained" if server.drained else f"{server.name}: {server.weight} %"


def wait_idle(master: haproxy.Master, name: str, given: dict[str, Any]) -> None:
    """Wait until the replica has nothing in flight."""
    progress = ProgressFile(given["progress_file"])
    left = haproxy.wait_until_idle(lambda: master.in_flight(name), given["deadline"], progress.write, name)
    if left:
        raise haproxy.GatewayError(
            f"Replica {given['replica']} still has {left} request(s) in flight after {given['deadline']} s. It gets no "
            "new ones. Run 'drain' again to wait on (-e gateway_drain_seconds=...), 'undrain' to put it back; stopping "
            "its engine now breaks them off."
        )


def wait_ready(master: haproxy.Master, name: str, given: dict[str, Any]) -> None:
    """Wait until the replica gets requests."""
    server = haproxy.wait_until_up(lambda: master.servers()[name], given["deadline"])
    if not haproxy.in_rotation(server):
        said = "; ".join(part for part in (server.check, server.agent) if part)
        raise haproxy.GatewayError(
            f"Replica {given['replica']} is no longer drained but gets no requests after {given['deadline']} s: the "
            f"gateway sees it as {server.status} ({said}) at {server.address}. It gets them as soon as it is healthy."
        )


if __name__ == "__main__":
    main()
