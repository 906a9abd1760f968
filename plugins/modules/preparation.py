#!/usr/bin/python
"""Module stepladder.core.preparation: the parameters and the result; the work is in module_utils/preparation.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preparation
short_description: Say of a node whether it can be prepared, and afterwards whether its driver fits
version_added: 0.1.0
description:
  - Reads root, space, the GPUs on the bus, the driver that is there and the keys of the repositories, and names all
    faults at once, each with what was found, what is needed and what mends it.
  - With O(stage=after) it holds the kernel's module, the library and the packages against each other, and says whether
    a reboot is due. What a reboot mends is no fault.
  - Changes nothing; the answer is the same in check mode.
options:
  stage:
    description: Before the driver is installed, or after.
    type: str
    choices: [before, after]
    default: before
  vendor:
    description: The GPUs' vendor, C(cpu) for none.
    type: str
    default: cpu
  version:
    description: The driver's version.
    type: str
    default: ''
  module:
    description: Name of the kernel's module.
    type: str
    default: ''
  library:
    description: Shared library whose file is called after the driver's version.
    type: str
    default: ''
  main_package:
    description: The package by which the driver is known to be ours.
    type: str
    default: ''
  own_packages:
    description: The same of other branches of the driver, whose packages can be called otherwise.
    type: list
    elements: str
    default: []
  branch_packages:
    description:
      - What the main packages of branches are called whose names carry the branch, with the shell's wild cards.
      - Such a one is ours too where the file is there that keeps the driver's version with apt, and it is none of
        O(own_packages) any more.
    type: list
    elements: str
    default: []
  branches:
    description: Branches that are known, to tell one that is not; empty where a version does not tell its own.
    type: list
    elements: str
    default: []
  same_version:
    description: Packages and their versions, C(name=version) with the shell's wild cards.
    type: list
    elements: str
    default: []
  kernel_parameters:
    description: Parameters that the kernel has to be started with.
    type: list
    elements: str
    default: []
  repositories:
    description: Repositories whose keys are fetched and compared, as M(stepladder.core.system_packages) takes them.
    type: list
    elements: dict
    default: []
  minimum_free_bytes:
    description: Space needed by path, in bytes, where the driver is not installed yet.
    type: dict
    default: {}
  check_bus:
    description: Whether GPUs of the vendor have to be on the PCI bus.
    type: bool
    default: true
  allow_change:
    description: Whether a driver may go from one version to another.
    type: bool
    default: false
  install:
    description: Whether the driver is to be installed; else what is there is only looked at.
    type: bool
    default: true
  minimum:
    description: Oldest driver (ROCm on AMD) that one that is not to be installed may be; empty for any.
    type: str
    default: ''
  minimum_of:
    description: Whose need O(minimum) is, for the message.
    type: str
    default: ''
  faults:
    description: Faults that are known already, with C(what), C(found), C(needed) and C(mend), told with those found.
    type: list
    elements: dict
    default: []
attributes:
  check_mode:
    support: full
    description: Reads only.
  diff_mode:
    support: none
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Say everything that is in the way
  stepladder.core.preparation:
    vendor: nvidia
    version: 580.126.20
    module: nvidia
    library: libnvidia-ml.so.1
    main_package: nvidia-driver-cuda
    minimum_free_bytes: {/var: 3000000000}
"""

RETURN = r"""
faults:
  description: All that is in the way; empty for none.
  returned: always
  type: list
  elements: dict
  sample: [{what: user, found: guest, needed: root, mend: "set ansible_become: true"}]
reboot:
  description: Why the driver waits for a reboot; empty for none.
  returned: always
  type: list
  elements: str
  sample: ["driver 580.126.20 is installed, in the kernel none runs"]
system_reboot:
  description: Why the system itself asks for a reboot, which the driver does not wait for; empty for none.
  returned: always
  type: list
  elements: str
  sample: ["the system asks for it (libc6)"]
facts:
  description: The driver that is there.
  returned: always
  type: dict
  sample: {loaded: 580.126.20, on_disk: 580.126.20, library: 580.126.20, rocm: "", packages: {}, gpus: {nvidia: 8}}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import preparation
from ansible_collections.stepladder.core.plugins.module_utils.preparation import Fault, Wanted

TEXT: dict[str, Any] = {"type": "str", "default": ""}
STRINGS: dict[str, Any] = {"type": "list", "elements": "str", "default": []}
DICTS: dict[str, Any] = {"type": "list", "elements": "dict", "default": []}
ARGUMENTS: dict[str, Any] = {
    "stage": {"type": "str", "choices": ["before", "after"], "default": "before"},
    "vendor": {"type": "str", "default": "cpu"},
    "version": TEXT,
    "module": TEXT,
    "library": TEXT,
    "main_package": TEXT,
    "own_packages": STRINGS,
    "branch_packages": STRINGS,
    "branches": STRINGS,
    "same_version": STRINGS,
    "kernel_parameters": STRINGS,
    "repositories": DICTS,
    "minimum_free_bytes": {"type": "dict", "default": {}},
    "check_bus": {"type": "bool", "default": True},
    "allow_change": {"type": "bool", "default": False},
    "install": {"type": "bool", "default": True},
    "minimum": TEXT,
    "minimum_of": TEXT,
    "faults": DICTS,
}


def main() -> None:
    """Read the node, judge, answer once."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    stage, repositories, known = (module.params.pop(name) for name in ("stage", "repositories", "faults"))
    module.params["minimum_free_bytes"] = {k: int(v) for k, v in module.params["minimum_free_bytes"].items()}
    wanted = Wanted(**module.params)
    facts = preparation.gather(wanted)
    found = [Fault(**each) for each in known]
    if stage == "before":
        found += [*preparation.faults_before(facts, wanted), *preparation.key_faults(repositories)]
        heading = "cannot be prepared, nothing was changed"
    else:
        found += preparation.faults_after(facts, wanted)
        heading = "has a driver that does not fit together"
    result = {
        "faults": [vars(one) for one in found],
        "reboot": preparation.reboot_reasons(facts, wanted),
        "system_reboot": preparation.reboot_reasons_of_the_system(facts),
        "facts": facts.as_result(),
    }
    if found:
        module.fail_json(msg=preparation.table(found, facts.hostname, heading), **result)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
