#!/usr/bin/python
"""Keep what shows why a start failed."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: evidence
short_description: Keep what shows why something does not run
description:
  - Writes logs, what the process manager says, units, the release without its secrets, and the state of the machine
    to C(evidence/<time>-<plan id>/) in the deployment directory.
  - Secrets are masked as in logs, and those that the deployment's releases know wherever they stand. Starts and stops
    nothing.
  - O(archive=true) puts that and more (driver, network, gateway, watchdog, earlier failures) into a compressed archive
    in a temporary folder instead, for a colleague. Whoever asked for it removes it.
options:
  path:
    description: The deployment directory.
    type: path
    required: true
  plan_id:
    description: The release that failed; not needed for an archive.
    type: str
    default: ""
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
  archive:
    description: Whether an archive is made, rather than a folder in the deployment directory.
    type: bool
    default: false
  peers:
    description: C(address) and C(ports) of the replica's other nodes, by node; an archive says whether they answer.
    type: dict
    default: {}
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
archive:
  description: Path of the archive on the node; empty where none was asked for.
  returned: always
  type: str
  sample: /tmp/stepladder-diagnose-k2x.tar.gz
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import evidence


def main() -> None:
    """Gather, write, answer."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "plan_id": {"type": "str", "default": ""},
            "units": {"type": "dict", "default": {}},
            "manager": {"type": "str", "choices": ["systemd", "supervisor"], "required": True},
            "limit_bytes": {"type": "int", "default": 20_000_000},
            "attempts": {"type": "int", "default": 5},
            "archive": {"type": "bool", "default": False},
            "peers": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, folder="", archive="", files=[])
    folder = archive = ""
    try:
        texts = evidence.gather(given["path"], given["units"], given["manager"])
        secrets = evidence.known_secrets(given["path"])
        if given["archive"]:
            texts.update(evidence.gather_more(given["path"], given["peers"]))
            archive = evidence.archive(texts, given["limit_bytes"], secrets)
        else:
            folder = evidence.keep(
                given["path"], given["plan_id"], texts, given["limit_bytes"], given["attempts"], secrets
            )
    except OSError as error:
        module.fail_json(msg=f"what shows why it does not run could not be kept: {error}")
    module.exit_json(
        changed=False, folder=folder, archive=archive, files=sorted(name for name, lines in texts.items() if lines)
    )


if __name__ == "__main__":
    main()
