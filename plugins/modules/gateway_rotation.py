#!/usr/bin/python
"""Take replicas out of a gateway's rotation for a rollout, or put back what a rollout took out."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: gateway_rotation
short_description: Take replicas out of a gateway's rotation for a rollout, or put them back
description:
  - What it takes out is marked as this run's in the gateway's directory; so is what a run before had taken out. A job
    that a killed run left behind puts back only what is still its own. What a person drained with
    M(stepladder.core.gateway_replica) is left as it is, either way.
  - A gateway that is not there, does not run or does not know a replica is no failure; RV(said) tells of it.
options:
  directory:
    description: The gateway's own directory.
    type: path
    required: true
  deployment:
    description: Name of the deployment, for messages.
    type: str
    required: true
  replicas:
    description: Numbers of the replicas.
    type: list
    elements: int
    required: true
  state:
    description: V(out) drains them, V(back) puts back those that are marked.
    type: str
    choices: [out, back]
    required: true
  patient:
    description: Those of O(replicas) whose requests are waited for, with O(state=out).
    type: list
    elements: int
    default: []
  deadline:
    description: Seconds until nothing is in flight, or until the replicas get requests.
    type: int
    default: 600
  urls:
    description:
      - By number of a replica where it answers now, with O(state=back). One that the gateway has at another place stays
        out until the gateway's next configuration.
    type: dict
    default: {}
  may_break:
    description:
      - Go on where requests are left after O(deadline), or where no other replica takes requests.
      - Without it either is a failure, and what was taken out is back.
    type: bool
    default: false
  only_own:
    description: With O(state=back), leave what another run took over since.
    type: bool
    default: false
  run:
    description: Filled in by the action plugin, the mark of this run.
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
    support: none
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Take replica 1 out of rotation
  stepladder.core.gateway_rotation:
    directory: /var/lib/stepladder/gateway/step3
    deployment: step3
    replicas: [1]
    patient: [1]
    state: out
"""

RETURN = r"""
said:
  description: What the operator should know, a sentence each.
  returned: always
  type: list
  elements: str
  sample: ["there is no gateway for step3 yet"]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import haproxy, rotation
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile


def main() -> None:
    """Change, wait, answer."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "deployment": {"type": "str", "required": True},
            "replicas": {"type": "list", "elements": "int", "required": True},
            "state": {"type": "str", "choices": ["out", "back"], "required": True},
            "patient": {"type": "list", "elements": "int", "default": []},
            "deadline": {"type": "int", "default": 600},
            "urls": {"type": "dict", "default": {}},
            "may_break": {"type": "bool", "default": False},
            "only_own": {"type": "bool", "default": False},
            "run": {"type": "str", "default": ""},
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
    """Take them out or put them back."""
    if why := rotation.not_there(given["directory"], given["deployment"]):
        return {"changed": False, "said": [f"{why}: nothing to drain"] if given["state"] == "out" else []}
    master = haproxy.Master(given["directory"])
    if given["state"] == "back":
        urls = {int(number): url for number, url in given["urls"].items()}
        run = given["run"] if given["only_own"] else None
        back = rotation.put_back(master, given["replicas"], given["deadline"], check_mode, urls, run=run)
        return {"changed": bool(back), "said": []}
    wanted = rotation.Wanted(given["replicas"], given["patient"], given["deadline"], given["may_break"], given["run"])
    changed, said = rotation.take_out(master, wanted, ProgressFile(given["progress_file"]).write, check_mode)
    return {"changed": changed, "said": said}


if __name__ == "__main__":
    main()
