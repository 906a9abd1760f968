#!/usr/bin/python
"""Module stepladder.core.system_packages: the parameters and the result; the work is in module_utils."""

from __future__ import annotations

DOCUMENTATION = r"""
module: system_packages
short_description: Have repositories, packages and holds on a node
version_added: 0.1.0
description:
  - Adds package repositories whose keys are pinned by fingerprint, installs packages in exact versions, and holds them.
  - A key that is not the pinned one is refused, with both fingerprints, before anything is written.
  - Before a file is written the repositories are asked, in a copy of apt's world, whether they have what is wanted; so
    check mode on a fresh node tells the very versions that would come.
  - dnf has no such copy. Where a repository or a module stream is not there yet, check mode tells versions as they are
    asked for, and a run that is refused has set those; the message says so.
  - Waits for another package manager up to O(lock_timeout) and names its process. What an interruption left half
    configured is finished first.
  - Debian and Ubuntu with apt; Red Hat's family with dnf, which was never run by this project's tests.
options:
  name:
    description: What the file of O(pins) is called after.
    type: str
    default: node
  repositories:
    description: Package repositories to have.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Names its files; of a-z, 0-9 and -.
        type: str
        required: true
      url:
        description:
          - Where it is, C(https://), C(http://) or C(file:/).
          - Not with a password, which belongs into C(/etc/apt/auth.conf.d).
        type: str
        required: true
      suites:
        description: apt's suites; C(/) for a flat repository.
        type: list
        elements: str
        default: [/]
      components:
        description: apt's components; none for a flat repository.
        type: list
        elements: str
        default: []
      key:
        description: Its armoured public key.
        type: str
        no_log: false
      key_url:
        description: Where the node fetches the key from, instead of O(repositories[].key).
        type: str
        no_log: false
      fingerprints:
        description: Fingerprints of all primary keys that may be in the key's file.
        type: list
        elements: str
        required: true
      priority:
        description: apt's priority of all that comes from there, or dnf's, of which the lower goes first.
        type: int
  pins:
    description: Versions that packages are kept at by apt's preferences.
    type: list
    elements: dict
    default: []
    suboptions:
      packages:
        description: Names, with apt's wild cards.
        type: list
        elements: str
        required: true
      version:
        description: The version, with apt's wild cards.
        type: str
        required: true
  packages:
    description: Packages, C(name) or C(name=version) with the shell's wild cards in the version.
    type: list
    elements: str
    default: []
  hold:
    description: Installed packages to hold, C(name) or C(name=version) with the shell's wild cards in both.
    type: list
    elements: str
    default: []
  module_streams:
    description: dnf's module streams to enable, such as C(nvidia-driver:580-open).
    type: list
    elements: str
    default: []
  allow_change:
    description:
      - Whether a package of O(packages) may go from one installed version to another.
      - What is named in O(pins) may then be removed for it, as far as the new version excludes it.
    type: bool
    default: false
  lock_timeout:
    description: Seconds to wait for another package manager.
    type: int
    default: 600
  progress_file:
    description: File that takes the newest line of progress; set by the action plugin.
    type: path
attributes:
  check_mode:
    support: full
    description: Fetches keys and lists into a temporary folder, changes nothing.
  diff_mode:
    support: full
author: The Stepladder authors
"""

EXAMPLES = r"""
- name: Have the driver from the site's mirror
  stepladder.core.system_packages:
    name: gpu-driver
    repositories:
      - name: nvidia-driver
        url: http://mirror.example/nvidia/debian12/x86_64/
        key_url: http://mirror.example/nvidia/3bf863cc.pub
        fingerprints: [EB693B3035CD5710E231E123A4B469963BF863CC]
    packages: [nvidia-driver-cuda=580.126.20-*, nvidia-fabricmanager=580.126.20-*]
    hold: ["*=580.126.20-*"]
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode.
  type: list
  elements: str
  returned: always
  sample: [write /etc/apt/sources.list.d/stepladder-nvidia-driver.sources, install nvidia-fabricmanager 580.126.20-1]
versions:
  description: Versions of the packages asked for and of those held.
  type: dict
  returned: always
  sample: {nvidia-fabricmanager: 580.126.20-1}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import package_sources, progress, system_packages
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Spec
from ansible_collections.stepladder.core.plugins.module_utils.package_sources import Pin

STRINGS: dict[str, Any] = {"type": "list", "elements": "str"}
REPOSITORY: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "url": {"type": "str", "required": True},
    "suites": {**STRINGS, "default": ["/"]},
    "components": {**STRINGS, "default": []},
    "key": {"type": "str", "no_log": False},
    "key_url": {"type": "str", "no_log": False},
    "fingerprints": {**STRINGS, "required": True},
    "priority": {"type": "int"},
}
PIN = {"packages": {**STRINGS, "required": True}, "version": {"type": "str", "required": True}}
ARGUMENTS: dict[str, Any] = {
    "name": {"type": "str", "default": "node"},
    "repositories": {"type": "list", "elements": "dict", "default": [], "options": REPOSITORY},
    "pins": {"type": "list", "elements": "dict", "default": [], "options": PIN},
    "packages": {**STRINGS, "default": []},
    "hold": {**STRINGS, "default": []},
    "module_streams": {**STRINGS, "default": []},
    "allow_change": {"type": "bool", "default": False},
    "lock_timeout": {"type": "int", "default": 600},
    "progress_file": {"type": "path"},
}


def main() -> None:
    """Read the parameters, make the node equal to them, answer once."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    params = module.params
    wanted = system_packages.Wanted(
        name=params["name"],
        repositories=package_sources.parsed(params["repositories"]),
        pins=[Pin(**each) for each in params["pins"]],
        packages=[Spec.of(text) for text in params["packages"]],
        hold=[Spec.of(text) for text in params["hold"]],
        module_streams=params["module_streams"],
        allow_change=params["allow_change"],
    )
    if problem := system_packages.not_root():
        module.fail_json(msg=problem)
    report = progress.ProgressFile(params["progress_file"]).write
    try:
        outcome = system_packages.converge(wanted, module.check_mode, report, params["lock_timeout"])
    except system_packages.PackagesError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**outcome.as_result())


if __name__ == "__main__":
    main()
