#!/usr/bin/python
"""Module stepladder.core.weights_look: parameters and result; the work is in module_utils/weights.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: weights_look
short_description: Say which weights are there, and what their source has
version_added: 0.2.0
description:
  - Looks at a directory as M(stepladder.core.model_weights) fills it. Where files are missing or wrong, the
    source is asked for its files, and the free space is held against what is still to come.
  - It is run on every node before the first byte is fetched on any.
author:
  - Stepladder contributors (@stepladder)
extends_documentation_fragment: stepladder.core.weights_source
options:
  current_release:
    description:
      - Directory of the release that runs, with its C(plan.json).
      - The Python code of its weights is what a new revision's is held against.
    type: path
    default: ''
  code_only:
    description: Whether only the Python code is asked about; space does not matter then, nor a source that is silent.
    type: bool
    default: false
  local:
    description: Whether the source is left alone; RV(wanted) is empty then.
    type: bool
    default: false
attributes:
  check_mode:
    description: A source that does not answer at once is no failure, for it may be a hub that is not there yet.
    support: full
  diff_mode:
    description: It changes nothing.
    support: none
"""

EXAMPLES = r"""
- name: See what is there and what the source has
  stepladder.core.weights_look:
    model_id: stepfun-ai/Step-3.5-Flash
    path: /var/lib/stepladder/models/stepfun-ai--Step-3.5-Flash/master
  register: __example_look
"""

RETURN = r"""
complete:
  description: Whether every file is there and right; some may have been touched.
  returned: success
  type: bool
  sample: false
actions:
  description: What is to be done; one sentence each.
  returned: success
  type: list
  elements: str
  sample: ["fetch stepfun-ai/Step-3.5-Flash@master into /var/lib/stepladder/models/x/master (no complete manifest)"]
touched:
  description: What was read of files that are right and whose stamps changed, as O(seen) takes it.
  returned: success
  type: list
  elements: dict
  sample: []
wanted:
  description: Every file that the source has of it, with its bytes; empty where it is complete.
  returned: success
  type: list
  elements: dict
  sample: [{path: config.json, size: 1234}]
listing:
  description: Every file with its bytes and SHA-256, for other nodes; empty where it is not complete.
  returned: success
  type: list
  elements: dict
  sample: []
have:
  description: Paths of the wanted files that are there and proven.
  returned: success
  type: list
  elements: str
  sample: []
remote_code:
  description: Python files of the revision, which an engine runs where remote code is trusted.
  returned: success
  type: list
  elements: dict
  sample:
    - path: modeling_step.py
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      git_blob: 4a1f4c1d3a4e0a0c8d9a7c5b6e2f1d0c9b8a7f6e
remote_code_unknown:
  description: Why they are not known; empty where they are.
  returned: success
  type: str
  sample: ""
remote_code_before:
  description: Those of the release that runs, where it serves the same model; else of the revision completed last.
  returned: success
  type: list
  elements: dict
  sample: []
remote_code_before_name:
  description: Which of the two it is, in words; empty where there is neither.
  returned: success
  type: str
  sample: the release that runs (v1)
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.weights import look
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import (
    SOURCE_ARGUMENTS,
    Request,
    WeightsError,
)


def main() -> None:
    """Read the parameters, look, answer once."""
    module = AnsibleModule(
        argument_spec={
            **SOURCE_ARGUMENTS,
            "current_release": {"type": "path", "default": ""},
            "code_only": {"type": "bool", "default": False},
            "local": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    current_release = module.params.pop("current_release")
    kinds = {name: module.params.pop(name) for name in ("code_only", "local")}
    try:
        answer = look(Request.of(module.params), module.check_mode, current_release, **kinds)
    except (WeightsError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
