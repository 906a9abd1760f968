#!/usr/bin/python
"""List and remove environments, images and caches that no release needs any more."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: leftovers
short_description: List and remove environments, images and caches that no release needs any more
description:
  - Lists what the toolkit brought to the node, with its size and who uses it, every kept release among them.
  - What is in use is never removed; the module fails before it removes anything then.
options:
  state_directory:
    description: Where the toolkit keeps everything on the node.
    type: path
    required: true
  remove:
    description: Names to remove, as RV(leftovers) has them; none only lists.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: List what lies on the node
  stepladder.core.leftovers:
    state_directory: /var/lib/stepladder
"""

RETURN = r"""
leftovers:
  description: All environments and images that the toolkit brought and caches that engines filled, before a removal.
  returned: success
  type: list
  elements: dict
  contains:
    kind: {description: "environment, image or cache.", type: str, sample: environment}
    name: {description: What names it for removal., type: str, sample: /var/lib/stepladder/venvs/vllm-0.31.0-aa}
    shown: {description: For people., type: str, sample: /var/lib/stepladder/venvs/vllm-0.31.0-aa}
    bytes: {description: That it takes., type: int, sample: 9000000000}
    used_by: {description: Releases and processes., type: list, elements: str, sample: []}
removed:
  description: Names that were removed, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: []
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import engine_image, leftovers
from ansible_collections.stepladder.core.plugins.module_utils.python_venv import VenvError


def main() -> None:
    """Look, remove, answer once."""
    module = AnsibleModule(
        argument_spec={
            "state_directory": {"type": "path", "required": True},
            "remove": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    state_directory, docker = module.params["state_directory"], engine_image.Docker()
    try:
        found = leftovers.find(state_directory, docker)
        removed = leftovers.prune(state_directory, module.params["remove"], docker, module.check_mode)
    except (leftovers.LeftoversError, VenvError, engine_image.ImageError, OSError) as error:
        module.fail_json(msg=str(error))
    before = [one.shown for one in found]
    after = [one.shown for one in found if one.name not in removed]
    module.exit_json(
        changed=bool(removed),
        leftovers=[asdict(one) for one in found],
        removed=removed,
        diff={"before": "\n".join([*before, ""]), "after": "\n".join([*after, ""])},
    )


if __name__ == "__main__":
    main()
