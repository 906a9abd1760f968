#!/usr/bin/python
"""Clear what no deployment uses from the state directory."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: tidy
short_description: Clear what no deployment uses from the state directory
description:
  - Removes empty directories, and once nothing is deployed on the node also lock files and shared directories.
  - Environments and weights are not touched; M(stepladder.core.python_venv) and M(stepladder.core.model_weights) remove
    them.
options:
  state_directory:
    description: Where the toolkit keeps everything on the node.
    type: path
    required: true
  shared:
    description: Names of directories below it that any deploy makes again.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    support: full
    description: Says what it would remove.
  diff_mode:
    support: full
    description: Lists what is removed.
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Clear what no deployment uses
  stepladder.core.tidy:
    state_directory: /var/lib/stepladder
    shared: [tools, cache]
"""

RETURN = r"""
removed:
  description: Paths that were removed, or would be in check mode.
  returned: always
  type: list
  elements: str
  sample: [/var/lib/stepladder/tools]
"""

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.tidy import plan_tidying


def main() -> None:
    """Plan, remove unless in check mode, answer."""
    module = AnsibleModule(
        argument_spec={
            "state_directory": {"type": "path", "required": True},
            "shared": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    removed = plan_tidying(Path(module.params["state_directory"]), module.params["shared"])
    try:
        for path in [] if module.check_mode else removed:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}")
    names = [str(path) for path in removed]
    module.exit_json(changed=bool(removed), removed=names, diff={"before": "\n".join(names), "after": ""})


if __name__ == "__main__":
    main()
