#!/usr/bin/python
"""Write a release's files on a node and make it current."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: release
short_description: Write a release's files on a node and make it current
description:
  - Writes the node's slice of the plan and, for each process, an env file and a run script
    under C(releases/<plan id>/).
  - The release is built under a temporary name and renamed; then the links C(current) and C(previous) are swung
    by rename. A run that is cut off at any point is completed by the next run.
  - Starts and stops nothing. Compare RV(fingerprints) with what runs (module M(stepladder.core.engine_state)) to see
    what has to be restarted; RV(changed_processes) compares with the release that was current, so that it is empty on
    the run after an interrupted one.
  - Writers take the lock file C(.<deployment>.lock) beside the deployment directory; it stays there after a removal.
options:
  path:
    description:
      - The deployment directory, C(<state directory>/deployments/<name>). Its last part is the deployment's name.
    type: path
    required: true
  state:
    description:
      - V(absent) removes the deployment directory, if it has stepladder's marker file, and refuses otherwise.
      - V(proven) and V(failed) write down what became of the release O(plan_id); a failed one is never made the way
        back. A release that was proven once stays so.
      - V(dropped) lets no release be current, for a node that the deployment has no use for any more.
    type: str
    choices: [present, absent, proven, failed, dropped]
    default: present
  reason:
    description: Why the release failed, for O(state=failed).
    type: str
    default: ""
  manager:
    description: For V(proven), what keeps the processes; without it nothing is noted of their units.
    type: str
    choices: [systemd, supervisor]
  units:
    description: For V(proven), the names of the processes' units, whose files are noted to tell a later change of them.
    type: list
    elements: str
    default: []
  described_by:
    description: For V(proven), a mark of what the units are made of.
    type: str
    default: ""
  speed:
    description:
      - For V(proven), how fast it answers, by the number of the replica, as M(stepladder.core.speed) measured it.
      - Without it what is known stays.
    type: dict
    default: {}
  plan_id:
    description: The plan's id, which names the release. Required for V(present), V(proven) and V(failed).
    type: str
  slice:
    description:
      - The node's slice of the plan, written as C(plan.json) with sorted keys.
        C(format_version) is added when it has none.
    type: dict
  processes:
    description: The processes of this node.
    type: list
    elements: dict
    suboptions:
      name:
        description: Name of the process, unique on the node.
        type: str
        required: true
      argv:
        description: The command, one argument an item. The first is a program's absolute path, or is looked up in PATH.
        type: list
        elements: str
        required: true
      env:
        description:
          - Environment variables; written to a file that only the owner can read.
          - Secrets belong in O(processes[].secret_env_files).
        type: dict
        default: {}
      secret_env_files:
        description: >-
          Environment variables whose values are read from files (absolute paths) when the process starts and are
          never stored in the release. A changed content of such a file does not change the fingerprint.
        type: dict
        default: {}
      started_from:
        description: >-
          Files whose content tells whether what the process has read at its start is still what lies there, such as
          the manifest of the weights. They are part of the fingerprint.
        type: list
        elements: path
        default: []
      launcher:
        description: Program and arguments that run the command. A changed one alone is no reason to restart.
        type: list
        elements: str
        default: []
      image:
        description:
          - Image of a container, as planned; it stands in O(processes[].argv).
          - Written is its id, the one that this release was made of before, else the one that was brought to the node,
            so that a tag which is moved changes nothing.
        type: str
      working_directory:
        description: Directory to start in.
        type: path
        default: /
  keep:
    description: How many releases stay on the node, the current and the previous one counted; these two always stay.
    type: int
    default: 3
  lock_deadline:
    description: Seconds to wait for another run on the same deployment.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Write the release and make it current
  stepladder.core.release:
    path: /var/lib/stepladder/deployments/step3
    plan_id: 20261120-3f9a1c
    slice: "{{ node_slice }}"
    processes:
      - name: vllm-0
        argv: [/var/lib/stepladder/venvs/vllm-1a2b3c4d/bin/vllm, serve, /models/step3, --port, "8000"]
        env:
          VLLM_LOGGING_LEVEL: INFO
        secret_env_files:
          VLLM_API_KEY: /etc/stepladder/secrets/api-key
  register: release_written

- name: Remove the deployment's files
  stepladder.core.release:
    path: /var/lib/stepladder/deployments/step3
    state: absent
"""

RETURN = r"""
fingerprints:
  description: The mark of each process's command, 16 hex digits.
  returned: when state is present
  type: dict
  sample: {vllm-0: 5f0c6d1e2b3a4958}
changed_processes:
  description: Processes that are new or whose command differs from the one in the release that was current.
  returned: when state is present
  type: list
  elements: str
  sample: [vllm-0]
removed_processes:
  description: Processes of the release that was current which the new one does not have.
  returned: when state is present
  type: list
  elements: str
  sample: []
current:
  description: Plan id of the current release.
  returned: when state is present
  type: str
  sample: 20261120-3f9a1c
previous:
  description: Plan id of the release before, the way back; null when there is none.
  returned: when state is present
  type: str
  sample: 20261118-77ab02
removed_releases:
  description: Plan ids of the releases that were removed because of O(keep).
  returned: when state is present
  type: list
  elements: str
  sample: []
outcome:
  description: What is written down of the release.
  returned: when state is proven or failed
  type: str
  sample: proven
actions:
  description: The changes on disk, in order.
  returned: always
  type: list
  elements: str
  sample: [build 20261120-3f9a1c, link current -> 20261120-3f9a1c]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import (
    engine_image,
    node_state,
    release,
    release_images,
    weights_store,
)

PROCESS_SPEC = {
    "name": {"type": "str", "required": True},
    "argv": {"type": "list", "elements": "str", "required": True},
    "env": {"type": "dict", "default": {}},
    "secret_env_files": {"type": "dict", "default": {}},
    "started_from": {"type": "list", "elements": "path", "default": []},
    "launcher": {"type": "list", "elements": "str", "default": []},
    "image": {"type": "str"},
    "working_directory": {"type": "path", "default": "/"},
}


def described_now(given: dict[str, Any]) -> dict[str, str]:
    """The units' files as they are, and what they are made of; empty where nobody asked."""
    if not given["manager"]:
        return {}
    place, _, name = given["path"].rstrip("/").rpartition("/")
    state_directory = place.rpartition("/")[0]
    paths = node_state.described_files(given["manager"], given["units"], state_directory, name)
    return {"described_by": given["described_by"], **{path: node_state.digest(path) for path in paths}}


def note_users(module: AnsibleModule) -> None:
    """Tell other nodes that share a store of weights who points at it."""
    state_directory = module.params["path"].rstrip("/").rpartition("/deployments/")[0]
    if state_directory and not module.check_mode:
        for fault in weights_store.note_users(state_directory):
            module.warn(f"That a release uses {fault}, could not be noted there: nodes that share it may remove it.")


def with_ids(module: AnsibleModule, processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Containers by their images' ids; a check may be of a node that has no Docker yet."""
    path, plan_id = module.params["path"], module.params["plan_id"]
    made: list[dict[str, Any]]
    try:
        made = release_images.with_ids(path, plan_id, processes, release_images.Images(engine_image.Docker()))
    except engine_image.ImageError:
        if not module.check_mode:
            raise
        made = release_images.with_ids(path, plan_id, processes, None)
    return made


def main() -> None:
    """Read, plan, apply, answer."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {
                "type": "str",
                "choices": ["present", "absent", "proven", "failed", "dropped"],
                "default": "present",
            },
            "reason": {"type": "str", "default": ""},
            "manager": {"type": "str", "choices": ["systemd", "supervisor"]},
            "units": {"type": "list", "elements": "str", "default": []},
            "described_by": {"type": "str", "default": ""},
            "speed": {"type": "dict", "default": {}},
            "plan_id": {"type": "str"},
            "slice": {"type": "dict"},
            "processes": {"type": "list", "elements": "dict", "options": PROCESS_SPEC},
            "keep": {"type": "int", "default": 3, "no_log": False},
            "lock_deadline": {"type": "int", "default": 60},
        },
        required_if=[
            ("state", "present", ("plan_id", "slice", "processes")),
            ("state", "proven", ("plan_id",)),
            ("state", "failed", ("plan_id",)),
        ],
        supports_check_mode=True,
    )
    given = module.params
    path, plan_id = given["path"], given["plan_id"]
    processes = release.as_text(given["processes"] or [])
    module.no_log_values.update(release.secret_values(processes))
    faults = release.check_arguments(path, plan_id or "none", processes, given["keep"])
    if faults:
        module.fail_json(msg="\n".join(faults))
    try:
        if given["state"] == "absent":
            answer = release.absent(path, module.check_mode, given["lock_deadline"])
            note_users(module)
        elif given["state"] == "dropped":
            answer = release.drop(path, module.check_mode, given["lock_deadline"])
        elif given["state"] in (release.PROVEN, release.FAILED):
            answer = {"changed": False, "outcome": given["state"], "actions": []}
            if not module.check_mode:
                answer = release.record_outcome(
                    path,
                    plan_id,
                    given["state"],
                    given["reason"],
                    described=described_now(given),
                    speed=given["speed"],
                    deadline=given["lock_deadline"],
                )
        else:
            processes = with_ids(module, processes)
            wanted = release.wanted_release(path, plan_id, given["slice"], processes)
            before = release.current_fingerprints(path)
            diff = release.diff_of(path, plan_id, release.current_release(path), processes)
            found, steps = release.converge(path, wanted, given["keep"], module.check_mode, given["lock_deadline"])
            answer = {**release.result_of(found, wanted, steps, before), "diff": diff}
            note_users(module)
    except (release.ReleaseError, engine_image.ImageError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
