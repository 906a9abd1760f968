#!/usr/bin/python
"""Module stepladder.core.node_settings: the parameters and the result; the work is in module_utils/node_settings.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_settings
short_description: Set kernel parameters, limits and swap, now and for every start
version_added: 0.1.0
description:
  - Writes files for sysctl, systemd-tmpfiles, limits and systemd's defaults, and sets the running kernel alike.
  - What this kernel does not know is left out. What it refuses, as in a container, is returned in C(unmet), and is an
    error with O(strict).
options:
  name:
    description: What the files are called after.
    type: str
    required: true
  sysctl:
    description: Values by name.
    type: dict
    default: {}
  sysfs:
    description: Values by path below C(/sys), with the shell's wild cards.
    type: dict
    default: {}
  limits:
    description: C(memlock), C(nofile) and C(stack), a number or C(unlimited), for logins and for systemd's services.
    type: dict
    default: {}
  reasons:
    description: Why, by name of a setting; it goes into the files.
    type: dict
    default: {}
  swap_off:
    description: Whether swap is switched off, now and in C(/etc/fstab).
    type: bool
    default: false
  strict:
    description: Whether what cannot be set is an error.
    type: bool
    default: true
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Let engines lock their memory
  stepladder.core.node_settings:
    name: host
    limits: {memlock: unlimited, nofile: 1048576}
    sysctl: {net.core.somaxconn: 4096}
    reasons: {memlock: RDMA pins what it sends}
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode.
  type: list
  elements: str
  returned: always
  sample: [write /etc/sysctl.d/60-stepladder-host.conf, set /proc/sys/net/core/somaxconn to 4096]
unmet:
  description: What cannot be set here, and why.
  type: list
  elements: str
  returned: always
  sample: ["/proc/sys/vm/swappiness stays 60, 10 is refused: Read-only file system"]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import node_settings, system_packages
from ansible_collections.stepladder.core.plugins.module_utils.node_settings import Wanted

DICT: dict[str, Any] = {"type": "dict", "default": {}}
ARGUMENTS: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "sysctl": DICT,
    "sysfs": DICT,
    "limits": DICT,
    "reasons": DICT,
    "swap_off": {"type": "bool", "default": False},
    "strict": {"type": "bool", "default": True},
}


def main() -> None:
    """Read the parameters, look, set, answer once."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    params = module.params
    texts = {key: {n: str(v) for n, v in params[key].items()} for key in ("sysctl", "sysfs", "limits", "reasons")}
    wanted = Wanted(name=params["name"], swap_off=params["swap_off"], **texts)
    if wrong := node_settings.problems(wanted):
        module.fail_json(msg="\n".join(wrong))
    if problem := system_packages.not_root():
        module.fail_json(msg=problem)
    plan = node_settings.look(wanted)
    impossible = node_settings.refused(plan)
    plan.unmet += impossible
    for path in [path for path in plan.values if any(text.startswith(f"{path} ") for text in impossible)]:
        del plan.values[path]
    if plan.unmet and params["strict"]:
        module.fail_json(msg="this cannot be set here, nothing was changed:\n" + "\n".join(plan.unmet))
    try:
        if not module.check_mode:
            node_settings.apply(plan)
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}", **node_settings.as_result(plan))
    result = node_settings.as_result(plan)
    if plan.unmet and params["strict"]:
        module.fail_json(msg="this could not be set:\n" + "\n".join(plan.unmet), **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
