#!/usr/bin/python
"""Wait until all planned nodes have joined a Ray cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: ray_cluster
short_description: Wait until all planned nodes have joined a Ray cluster
description:
  - Asks Ray itself, on a node of the cluster, which nodes are alive and how many GPUs they bring.
  - Fails after O(deadline) with every node that is missing or brings too little. Changes nothing.
options:
  python:
    description: The Python of the environment that has Ray.
    type: path
    required: true
  address:
    description: Where the head's control service listens, as address:port.
    type: str
    required: true
  environment:
    description: Environment that Ray was started with; it names the token's file, never the token.
    type: dict
    default: {}
  nodes:
    description: The planned nodes.
    type: list
    elements: dict
    required: true
    suboptions:
      node: {description: Inventory name., type: str, required: true}
      address: {description: Address that it joins with., type: str, required: true}
  gpus:
    description: GPUs that each node has to bring.
    type: float
    required: true
  deadline:
    description: Seconds until the cluster has to be complete.
    type: int
    default: 180
  progress_file:
    description: File that always holds one line on how far the module is.
    type: path
attributes:
  check_mode:
    support: full
    description: Looks once and says changed where a wait would be needed; never fails.
  diff_mode:
    support: none
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Wait until every node is in the cluster
  stepladder.core.ray_cluster:
    python: /var/lib/stepladder/venvs/vllm-0.33.0-cuda-1a2b3c4d/bin/python
    address: 198.18.0.11:6379
    nodes:
      - {node: h20-node1, address: 198.18.0.11}
      - {node: h20-node2, address: 198.18.0.12}
    gpus: 8
"""

RETURN = r"""
missing:
  description: What each planned node lacks, a sentence each.
  returned: always
  type: list
  elements: str
  sample: ["h20-node2 (198.18.0.12) has not joined"]
seconds:
  description: How long the wait took, in seconds.
  returned: always
  type: float
  sample: 4.2
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import ray_cluster
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile


def main() -> None:
    """Wait and answer."""
    node = {"node": {"type": "str", "required": True}, "address": {"type": "str", "required": True}}
    module = AnsibleModule(
        argument_spec={
            "python": {"type": "path", "required": True},
            "address": {"type": "str", "required": True},
            "environment": {"type": "dict", "default": {}},
            "nodes": {"type": "list", "elements": "dict", "required": True, "options": node},
            "gpus": {"type": "float", "required": True},
            "deadline": {"type": "int", "default": 180},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    given = module.params
    started = time.monotonic()
    faults = ray_cluster.wait(
        lambda: ray_cluster.ask(given["python"], given["address"], given["environment"]),
        given["nodes"],
        given["gpus"],
        0 if module.check_mode else given["deadline"],
        ProgressFile(given["progress_file"]).write,
    )
    # What calls this as a job goes on only where a first look says that there is something to do.
    answer = {
        "changed": module.check_mode and bool(faults),
        "missing": faults,
        "seconds": round(time.monotonic() - started, 1),
    }
    if faults and not module.check_mode:
        summary = f"The Ray cluster at {given['address']} is not complete after {answer['seconds']:.0f} s:"
        module.fail_json(msg="\n  ".join([summary, *faults]), **answer)
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
