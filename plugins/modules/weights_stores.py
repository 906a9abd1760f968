#!/usr/bin/python
"""Module stepladder.core.weights_stores: parameters and result; the work is in module_utils/weights_store.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: weights_stores
short_description: List the stores of weights on a node, and remove some that nothing uses
version_added: 0.2.0
description:
  - A store is one revision of a model, C(<state directory>/models/<owner>--<name>/<revision>).
  - A store is in use while a release of any deployment points at it, those to go back to included, or while a process
    has its files open or mapped or was started with its path. Other nodes that share the store's file system note their
    releases in it.
  - Nothing is removed when one of the stores named is in use or is none.
author:
  - Stepladder contributors (@stepladder)
options:
  state_directory:
    description: Where the toolkit keeps everything on a node.
    type: path
    required: true
  with_users:
    description: Whether to find out who uses them. Needed to remove any.
    type: bool
    default: true
  remove:
    description: Paths of stores to remove.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    description: Says what would be removed.
    support: full
  diff_mode:
    description: The stores before and after.
    support: full
"""

EXAMPLES = r"""
- name: See which weights lie on the node
  stepladder.core.weights_stores:
    state_directory: /var/lib/stepladder
  register: __example_stores
"""

RETURN = r"""
stores:
  description: What there is, or was before the removal. Bytes on the disk; C(progress) is what a run last told.
  returned: success
  type: list
  elements: dict
  sample:
    - path: /var/lib/stepladder/models/stepfun-ai--Step-3.5-Flash/master
      inode: 131075
      complete: true
      bytes: 212500000000
      set_aside_bytes: 0
      used_by: [deployment step35 (runs)]
      progress: {phase: done}
removed:
  description: Paths that were removed, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: []
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import WeightsError
from ansible_collections.stepladder.core.plugins.module_utils.weights_store import find_stores, prune


def main() -> None:
    """Read the parameters, do the work, answer once."""
    module = AnsibleModule(
        argument_spec={
            "state_directory": {"type": "path", "required": True},
            "with_users": {"type": "bool", "default": True},
            "remove": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    state_directory = module.params["state_directory"]
    stores = [asdict(one) for one in find_stores(state_directory, with_users=module.params["with_users"])]
    try:
        removed = prune(state_directory, module.params["remove"], check_mode=module.check_mode)
    except (WeightsError, OSError) as error:
        module.fail_json(msg=str(error))
    before = [one["path"] for one in stores]
    after = [path for path in before if path not in removed]
    module.exit_json(changed=bool(removed), stores=stores, removed=removed, diff={"before": before, "after": after})


if __name__ == "__main__":
    main()
