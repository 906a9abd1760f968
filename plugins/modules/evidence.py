#!/usr/bin/python
"""Keep what shows why a start failed."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: evidence
short_description: Keep what shows why a start failed
description:
  - Writes logs, what the process manager says, units, the release without its secrets, and the state of the machine
    to C(evidence/<time>-<plan id>/) in the deployment directory.
  - Secrets are masked as in logs. Starts and stops nothing.
options:
  path:
    description: The deployment directory.
    type: path
    required: true
  plan_id:
    description: The release that failed.
    type: str
    required: true
  units:
    description: The unit of each process, by the process's name.
    type: dict
    default: {}
  manager:
    description: What keeps the processes.
    type: str
    choices: [systemd, supervisor]
    required: true
  limit_bytes:
    description: What one attempt may take in all; of what is too long the end is kept.
    type: int
    default: 20000000
  attempts:
    description: Attempts that stay; the oldest go.
    type: int
    default: 5
attributes:
  check_mode:
    support: full
    description: Writes nothing.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Keep what shows why it failed
  stepladder.core.evidence:
    path: /var/lib/stepladder/deployments/step3
    plan_id: 3f9a1c77ab02
    units: {vllm-0: step3-vllm-0}
    manager: systemd
"""

RETURN = r"""
folder:
  description: Where it lies on the node; empty in check mode.
  returned: always
  type: str
  sample: /var/lib/stepladder/deployments/step3/evidence/20261120T031500Z-3f9a1c77ab02
files:
  description: What was kept.
  returned: always
  type: list
  elements: str
  sample: [logs/vllm-0.log, units/vllm-0.journal.txt]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import evidence


def main() -> None:
    """Gather, write, answer."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "plan_id": {"type": "str", "required": True},
            "units": {"type": "dict", "default": {}},
            "manager": {"type": "str", "choices": ["systemd", "supervisor"], "required": True},
            "limit_bytes": {"type": "int", "default": 20_000_000},
            "attempts": {"type": "int", "default": 5},
        },
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, folder="", files=[])
    try:
        texts = evidence.gather(given["path"], given["units"], given["manager"])
        folder = evidence.keep(given["path"], given["plan_id"], texts, given["limit_bytes"], given["attempts"])
    except OSError as error:
        module.fail_json(msg=f"what shows why it failed could not be kept: {error}")
    module.exit_json(changed=False, folder=folder, files=sorted(name for name, lines in texts.items() if lines))


if __name__ == "__main__":
    main()
