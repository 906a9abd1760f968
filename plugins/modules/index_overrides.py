#!/usr/bin/python
"""Module stepladder.core.index_overrides: the parameters and the result; the work is in module_utils."""

from __future__ import annotations

DOCUMENTATION = r"""
module: index_overrides
short_description: Say what goes before the site's package indexes on a node
version_added: 0.1.0
description:
  - Looks at the files of the user that it runs as, C(~/.pip/pip.conf), C(~/.config/pip/pip.conf) and
    C(~/.config/uv/uv.toml), at C(/etc/environment) and at the variables that programs get, for what pip and uv heed
    more than C(/etc/pip.conf) and C(/etc/uv/uv.toml).
  - Names places and options, never values. Changes nothing; the answer is the same in check mode.
options:
  pip_conf:
    description: The text of C(/etc/pip.conf), empty where the site writes none.
    type: str
    default: ''
  uv_toml:
    description: The text of C(/etc/uv/uv.toml), empty where the site writes none.
    type: str
    default: ''
attributes:
  check_mode:
    support: full
    description: Reads only.
  diff_mode:
    support: none
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: See what goes before the site's index
  stepladder.core.index_overrides:
    pip_conf: |
      [global]
      index-url = https://mirror.example/simple
"""

RETURN = r"""
overrides:
  description: All that goes before the files; empty for none.
  returned: always
  type: list
  elements: str
  sample: ["/root/.config/pip/pip.conf sets index-url, which goes before /etc/pip.conf: take it out there"]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import index_overrides


def main() -> None:
    """Look, answer once."""
    text = {"type": "str", "default": ""}
    module = AnsibleModule(argument_spec={"pip_conf": text, "uv_toml": text}, supports_check_mode=True)
    module.exit_json(changed=False, overrides=index_overrides.here(**module.params))


if __name__ == "__main__":
    main()
