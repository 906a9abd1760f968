#!/usr/bin/python
"""Module stepladder.core.gpu_speed: the parameters and the result; the work is in module_utils/gpu_speed.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_speed
short_description: Measure how fast a node's GPUs are
version_added: 0.3.0
description:
  - Runs the vendors' tools on NVIDIA's and AMD's GPUs, and our program on torch for the matrix rate, with deadlines.
  - A tool that is missing, hangs or fails is told in C(problems); the module does not fail for it.
  - Nothing is run while something holds memory of a GPU.
  - Nothing here was run on a GPU yet; the parsers read recorded output.
author:
  - Stepladder contributors (@stepladder)
options:
  level:
    description: How much is measured; C(quick) takes a minute, C(full) up to an hour.
    type: str
    choices: [quick, full]
    default: quick
  without:
    description: Parts that are left out, of C(bandwidth), C(diagnosis), C(all_reduce) and C(matrix).
    type: list
    elements: str
    default: []
  folders:
    description: Where tools are looked for beside the PATH and the usual places.
    type: list
    elements: str
    default: []
  program:
    description: Text of our program on torch, which measures the matrix rate at level C(full).
    type: str
    default: ""
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
  progress_file:
    description: Where a line of progress is written.
    type: str
attributes:
  check_mode:
    description: Measures nothing, only looks which GPUs there are.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Measure the GPUs
  stepladder.core.gpu_speed:
    level: full
    folders: [/opt/nccl-tests/build]
"""

RETURN = r"""
vendor:
  description: Whose GPUs were found; empty for none.
  returned: always
  type: str
  sample: nvidia
gpus:
  description: The GPUs, as the vendor's tool names them.
  returned: always
  type: list
  elements: dict
  sample: [{index: 0, name: NVIDIA H200, memory_mib: 143771}]
figures:
  description: Measurements in GB/s; C(matrix) in TFLOPS, C(stress) in GFLOPS.
  returned: always
  type: list
  elements: dict
  sample: [{kind: memory, gpu: 0, peer: null, value: 4210.5, tool: nvbandwidth}]
problems:
  description: What a tool finds wrong, and why something was not measured.
  returned: always
  type: list
  elements: dict
  sample: [{what: bandwidth, found: nvbandwidth is not there, mend: build it, severity: unmeasured, gpu: null}]
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import gpu_speed
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile


def main() -> None:
    """Look, measure, answer once."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(
        argument_spec={
            "level": {"type": "str", "choices": ["quick", "full"], "default": "quick"},
            "without": {"type": "list", "elements": "str", "default": []},
            "folders": {"type": "list", "elements": "str", "default": []},
            "program": text,
            "state_directory": {"type": "str", "default": "/var/lib/stepladder"},
            "python": text,
            "image": text,
            "progress_file": {"type": "str"},
        },
        supports_check_mode=True,
    )
    given = module.params
    os.environ.update(gpu_speed.ORDER)
    vendor, found = gpu_speed.look()
    seen = {
        "vendor": vendor,
        "gpus": [{"index": gpu.index, "name": gpu.name, "memory_mib": gpu.memory_mib} for gpu in found.gpus],
    }
    held = gpu_speed.in_use(found)
    if found.problem:
        mend = "mend the driver: bin/stepladder preflight tells more"
        held = [gpu_speed.Problem("GPUs", found.problem, mend)]
    if module.check_mode or held or not found.gpus:
        told = [gpu_speed.Told(problems=held)]
        module.exit_json(changed=False, **seen, **gpu_speed.as_json(told))
    progress = ProgressFile(given["progress_file"])
    told = []
    for tool in gpu_speed.tools(vendor, given["level"], len(found.gpus), given["without"]):
        progress.write(f"{tool.command[0]}: {tool.what} (at most {tool.seconds:g} s)", force=True)
        told.append(gpu_speed.use(tool, given["folders"]))
    if given["level"] == "full" and "matrix" not in given["without"]:
        progress.write("matrix rate", force=True)
        told.append(gpu_speed.matrix(given, vendor))
    module.exit_json(changed=False, **seen, **gpu_speed.as_json(told))


if __name__ == "__main__":
    main()
