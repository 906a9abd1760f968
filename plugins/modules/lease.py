#!/usr/bin/python
"""Take, hold or give back a node's lease; the action plugin of the same name keeps it alive while the run lives."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: lease
short_description: Say who may change a node
description:
  - One run at a time changes a node. Who, from where and why stands in C(lease/lease.json) of the state directory
    and in the log C(audit/audit.jsonl) there.
  - The action plugin fills in who runs this and from where, and renews the lease while the run lives. A lease that is
    not renewed expires by the node's own clock since boot; the time of day plays no part.
  - A run that still stands in the lease though its process on this very controller is gone is taken over from.
  - That a run has begun or ended is no change of the node, so RV(ignore:changed) is true only for V(broken), V(frozen)
    and V(unfrozen).
options:
  state_directory:
    description: Where the toolkit keeps everything on the node.
    type: path
    required: true
  state:
    description:
      - V(taken) takes the lease or says in RV(holder) or RV(frozen) why not; it does not fail for that.
      - V(held) says in RV(lost) why this run does not hold it.
      - V(released) gives it back. V(broken) takes it away from whoever has it.
      - V(frozen) and V(unfrozen) say whether any run may take it.
      - V(logged) writes into the log that a verb without a lease begins, or with RV(ignore:outcome) how it ended.
      - V(read) only looks.
    type: str
    choices: [taken, held, released, broken, frozen, unfrozen, logged, read]
    required: true
  why:
    description: The reason, in the operator's words. Required for V(broken), V(frozen) and V(unfrozen).
    type: str
    default: ""
  verb:
    description: What the run does.
    type: str
    default: ""
  deployment:
    description: Name of the deployment.
    type: str
    default: ""
  plan_id:
    description: What is to run.
    type: str
    default: ""
  ttl:
    description: Seconds without a sign of life after which the lease is free.
    type: float
    default: 120
  outcome:
    description: How the run ended, for V(released) and V(logged).
    type: str
    default: ""
  who:
    description: Filled in by the action plugin.
    type: str
    default: ""
  origin:
    description: Filled in by the action plugin, the controller's name.
    type: str
    default: ""
  run:
    description: Filled in by the action plugin, the mark of this run.
    type: str
    default: ""
  controller:
    description: Filled in by the action plugin, what tells whether the run still lives.
    type: dict
    default: {}
  seen:
    description: The run that had the lease last when the node was looked at; unset where nobody looked.
    type: str
  supersede:
    description: Filled in by the action plugin, a run that is known to be gone.
    type: str
    default: ""
attributes:
  check_mode:
    support: full
    description: Only looks; nothing is taken and nothing fails.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Take the lease of every node
  stepladder.core.lease:
    state_directory: /var/lib/stepladder
    state: taken
    verb: deploy
    why: new weights
    deployment: step3
    plan_id: 3f9a1c77ab02
  throttle: 1
  register: lease_taken
"""

RETURN = r"""
taken:
  description: Whether this run has the lease.
  returned: when state is taken
  type: bool
  sample: true
not_asked:
  description: Whether the node was left alone, because the lease of one before it was not to be had.
  returned: when that is so
  type: bool
  sample: true
lost:
  description: Why this run does not hold the lease; empty where it does.
  returned: when state is held, outside of check mode
  type: str
  sample: the lease was broken, or was given back
unwritten:
  description: Why the log could not be written; empty where it was.
  returned: when state is logged, outside of check mode
  type: str
  sample: "/var/lib/stepladder/audit/audit.jsonl could not be written: No space left on device"
stale:
  description: Whether another run was at work since the node was looked at.
  returned: when that is in the way
  type: bool
  sample: true
holder:
  description: Whose lease it is, since when, for what, and in how many seconds it expires; null where it is free.
  returned: when it is read, in the way or was broken
  type: dict
  sample: {who: ann, origin: ops1, verb: deploy, why: new weights, age: 81.3, expires_in: 114.0, state: held}
mine:
  description: Whether RV(holder) is this run itself.
  returned: when it is read
  type: bool
  sample: false
frozen:
  description: Who froze the node, since when and why; null where nobody did.
  returned: when it is read or in the way
  type: dict
  sample: {who: ann, origin: ops1, since: '2026-11-20T03:15:00Z', why: trade fair}
"""

from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import lease

LINES = ("why", "verb", "deployment", "plan_id", "outcome", "who", "origin", "run", "supersede")
REQUEST = ("run", "who", "origin", "verb", "why", "deployment", "plan_id", "ttl", "controller")

# What is no change of the node.
UNCHANGING: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "held": lambda path, given: {"lost": lease.holds(path, given["run"])},
    "released": lambda path, given: {"released": lease.release(path, given["run"], given["outcome"] or "ended")},
    "logged": lambda path, given: {"unwritten": lease.log(path, given, given["outcome"])},
}


def act(given: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """Carry a state out and give the answer."""
    path, state = given["state_directory"], given["state"]
    if check_mode or state == "read":
        held, frozen = lease.read(path), lease.read_freeze(path)
        holder = held.told(lease.Clock.now()) if held else None
        mine = bool(held and held.run == given["run"])
        return {"changed": False, "taken": True, "holder": holder, "frozen": frozen, "mine": mine}
    if state == "taken":
        return {
            "changed": False,
            **lease.take(path, {name: given[name] for name in REQUEST}, given["supersede"], given["seen"]),
        }
    if state in UNCHANGING:
        return {"changed": False, **UNCHANGING[state](path, given)}
    if state == "broken":
        holder = lease.break_it(path, given["who"], given["origin"], given["why"])
        return {"changed": bool(holder), "holder": holder or None}
    freezing = lease.freeze if state == "frozen" else lease.unfreeze
    return {"changed": freezing(path, given["who"], given["origin"], given["why"])}


def main() -> None:
    """Read the arguments, act, answer."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(
        argument_spec={
            "state_directory": {"type": "path", "required": True},
            "state": {
                "type": "str",
                "required": True,
                "choices": ["taken", "held", "released", "broken", "frozen", "unfrozen", "logged", "read"],
            },
            "ttl": {"type": "float", "default": 120.0},
            "controller": {"type": "dict", "default": {}},
            "seen": {"type": "str"},
            **dict.fromkeys(LINES, text),
        },
        supports_check_mode=True,
    )
    given = module.params
    if given["state"] in ("broken", "frozen", "unfrozen") and not given["why"].strip():
        module.fail_json(msg=f"why is empty: a lease is {given['state']} for a reason, which is written down")
    try:
        answer = act(given, module.check_mode)
    except lease.LeaseError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=lease.fault_text(error, given["state_directory"]))
    if answer.get("unwritten"):
        module.warn(answer["unwritten"])
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
