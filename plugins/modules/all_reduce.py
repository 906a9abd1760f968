#!/usr/bin/python
"""Module stepladder.core.all_reduce: the parameters and the result; the work is in module_utils/all_reduce.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: all_reduce
short_description: Take part in an all-reduce between nodes
version_added: 0.3.0
description:
  - Starts our program on torch, a process for each GPU with NCCL or RCCL, or one on the CPU with gloo.
  - All nodes of the group have to run it at the same time; the first of them is met at its address.
  - Without a group it only looks whether the node could.
author:
  - Stepladder contributors (@stepladder)
options:
  group:
    description: Names of the nodes, this node's rank among them, address and port of the first; empty for none.
    type: dict
    default: {}
  backend:
    description: C(nccl) for GPUs of either vendor, C(gloo) for the CPU.
    type: str
    choices: [nccl, gloo]
    default: gloo
  processes:
    description: Processes on this node, one for each GPU.
    type: int
    default: 1
  vendor:
    description: Of the GPUs, for a container that is to see them.
    type: str
    default: ""
  address:
    description: This node's address, whose interface is used.
    type: str
    required: true
  seconds:
    description: How long the measurement may take.
    type: float
    default: 3
  program:
    description: Text of our program on torch.
    type: str
    required: true
  state_directory:
    description: Where the toolkit keeps everything on a node; environments with torch are looked for in it.
    type: str
    default: /var/lib/stepladder
  python:
    description: A Python with torch; empty looks for one.
    type: str
    default: ""
  image:
    description: A container image of the node with torch in its python3, in place of a Python.
    type: str
    default: ""
  environment:
    description: Variables for NCCL and gloo.
    type: dict
    default: {}
attributes:
  check_mode:
    description: Measures nothing.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Take part in an all-reduce of two nodes
  stepladder.core.all_reduce:
    group: {names: [node1, node2], rank: 0, address: 198.18.0.1, port: 5301}
    address: 198.18.0.1
    program: "{{ lookup('ansible.builtin.file', 'torch_speed.py') }}"
"""

RETURN = r"""
names:
  description: The nodes of the group.
  returned: always
  type: list
  elements: str
  sample: [node1, node2]
ready:
  description: Whether the node has a Python with torch.
  returned: always
  type: bool
line_gbit:
  description: The line rate of the node in Gbit/s, none where no driver tells.
  returned: always
  type: float
  sample: 400.0
gbit:
  description: Bus bandwidth in Gbit/s, none where there is none.
  returned: always
  type: float
  sample: 341.2
problem:
  description: Why there is none.
  returned: always
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import all_reduce, torch_runs


def main() -> None:
    """Look, take part, answer once."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(
        argument_spec={
            "group": {"type": "dict", "default": {}},
            "backend": {"type": "str", "choices": ["nccl", "gloo"], "default": "gloo"},
            "processes": {"type": "int", "default": 1},
            "vendor": text,
            "address": {"type": "str", "required": True},
            "seconds": {"type": "float", "default": 3.0},
            "program": {"type": "str", "required": True},
            "state_directory": {"type": "str", "default": "/var/lib/stepladder"},
            "python": text,
            "image": text,
            "environment": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    given = module.params
    group, backend = given["group"], given["backend"]
    line = all_reduce.line(given["address"], backend)
    all_reduce.set_environment(line["interface"], {key: str(value) for key, value in given["environment"].items()})
    limit = all_reduce.limit(backend, given["seconds"])
    run = torch_runs.command(
        given["state_directory"], given["python"], given["image"], given["vendor"], limit,
        environment=given["environment"],
    )  # fmt: skip
    result = {"names": group.get("names", []), "ready": bool(run), "line_gbit": line["gbit"], "gbit": None}
    if not run:
        module.exit_json(changed=False, problem=torch_runs.MISSING, **result)
    if not group or module.check_mode:
        module.exit_json(changed=False, problem="", **result)
    module.exit_json(changed=False, **{**result, **all_reduce.measure(given, run)})


if __name__ == "__main__":
    main()
