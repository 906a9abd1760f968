#!/usr/bin/python
"""Module stepladder.core.model_weights: the parameters and the result; the work is in module_utils/weights.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_weights
short_description: Bring one revision of a model into a directory and prove it
version_added: 0.1.0
description:
  - Fetches a model with the hub's own client, unmodified, and holds every file's SHA-256 against the hub's listing.
  - "C(<path>/.stepladder/complete) is written last, by rename: a directory without it is an unfinished run. What such a
    run has fetched is kept, what it has proven is not read again, and the client goes on from there."
  - A complete directory is read-only. It is opened only to mend a file in it.
  - A directory that is complete for the same model, revision and patterns is checked on the node alone; the hub is not
    asked. So a branch that moved is not followed; give a commit to pin one, or remove the directory to fetch anew.
  - "The cheap check compares size, mtime and inode of every file, and hashes a file where one of them differs; a
    file that was only touched is noted in the manifest, which is a change. A byte that flipped
    on the disk with all three unchanged is found by O(verify=full) only."
  - A wrong file is set aside in C(<path>/.stepladder/quarantine/) before anything else and fetched again, alone. The
    quarantine is never emptied by the module.
  - Two runs on one O(path) exclude each other by C(<path>.lock).
  - The node needs the standard library of Python 3.9 or later, and the client in an environment of its own.
author:
  - Stepladder contributors (@stepladder)
extends_documentation_fragment: stepladder.core.weights_source
options:
  client:
    description: The C(modelscope) or C(hf) executable. Needed when O(state=present) has something to fetch from a hub.
    type: path
    default: modelscope
  max_workers:
    description: Files that the client fetches at a time.
    type: int
    default: 8
  expected_bytes:
    description:
      - Size of the whole, in bytes, to check the free space before the hub is asked. What is there is subtracted.
      - The sizes that the hub lists are checked in any case, before the first file is fetched.
    type: int
    default: 0
  total_timeout:
    description: Seconds that the client may take for one file (C(MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT)).
    type: int
    default: 14400
  retries:
    description: Times that the hub is asked for its listing before the module fails.
    type: int
    default: 3
  patience:
    description:
      - Seconds without a byte from the hub after which the module fails; until then its client is run again and again,
        with up to a minute in between.
      - An error that no other try mends, such as a file that is not there or stays wrong, is told at once.
    type: float
    default: 600
  deadline:
    description: Seconds that the download may take; the client is stopped then, and what it fetched is kept.
    type: float
    default: 86400
  verify:
    description: Whether a complete directory is checked by size, mtime and inode, or by reading all of it.
    type: str
    choices: [cheap, full]
    default: cheap
  progress_file:
    description: File that gets one line for people about every two seconds.
    type: path
    default: ''
  lock_timeout:
    description: Seconds to wait for another run on the same O(path).
    type: float
    default: 600
  bytes_per_second:
    description: Limit for what the hub's client fetches; 0 is none.
    type: int
    default: 0
  spread:
    description:
      - The node's part in an exchange with others, as the filter P(stepladder.core.weights_exchange#filter) works it
        out, and C(python), C(program) and C(bytes_per_second). Empty for none.
      - A node that has everything then gives it to its peers until each has it or is gone.
    type: dict
    default: {}
  state:
    description:
      - Whether the weights are there or not. V(absent) removes only a directory that this module filled, and leaves one
        that is used with a warning that says by whom.
    type: str
    choices: [present, absent]
    default: present
  leaving:
    description: Deployment that is about to be removed; with O(state=absent) in check mode it does not count as a user.
    type: str
    default: ''
attributes:
  check_mode:
    description: Reads and hashes as needed, asks no hub, writes nothing.
    support: full
  diff_mode:
    description: Whether the directory is complete, and which files are wrong.
    support: full
"""

EXAMPLES = r"""
- name: Bring the model onto the node
  stepladder.core.model_weights:
    model_id: stepfun-ai/Step-3.5-Flash
    path: /var/lib/stepladder/models/stepfun-ai--Step-3.5-Flash/master
    client: /var/lib/stepladder/venvs/modelscope-1a2b3c4d/bin/modelscope
    expected_bytes: 212500000000
    progress_file: /run/stepladder/weights.progress

- name: Read every byte of it again
  stepladder.core.model_weights:
    model_id: stepfun-ai/Step-3.5-Flash
    path: /var/lib/stepladder/models/stepfun-ai--Step-3.5-Flash/master
    client: /var/lib/stepladder/venvs/modelscope-1a2b3c4d/bin/modelscope
    verify: full
"""

RETURN = r"""
actions:
  description: What was done, or would be in check mode; one sentence each.
  returned: success
  type: list
  elements: str
  sample: ["fetch stepfun-ai/Step-3.5-Flash@master into /var/lib/stepladder/models/x/master (no complete manifest)"]
files:
  description: Number of proven files.
  returned: success
  type: int
  sample: 57
bytes:
  description: Their size in all, in bytes.
  returned: success
  type: int
  sample: 212500000000
bytes_fetched:
  description: Bytes by which the files on disk grew.
  returned: success
  type: int
  sample: 212500000000
bytes_from_peers:
  description: Bytes of files that came from other nodes.
  returned: success
  type: int
  sample: 141666666666
seconds:
  description: Seconds that the module took.
  returned: success
  type: float
  sample: 1834.2
manifest:
  description: Path of the manifest.
  returned: success
  type: str
  sample: /var/lib/stepladder/models/stepfun-ai--Step-3.5-Flash/master/.stepladder/manifest.json
bad_files:
  description: Files that were not as proven, and where each lies now. On failure, files that differ from the listing.
  returned: always, except where it failed before any file was looked at
  type: list
  elements: dict
  sample:
    - path: model-00001.safetensors
      reason: sha256
      expected: 8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4
      found: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      quarantine: /var/lib/stepladder/models/x/master/.stepladder/quarantine/model-00001.safetensors.1
extra_files:
  description: Files in the directory that are no part of what was proven; they are left there.
  returned: success
  type: list
  elements: str
  sample: [notes.txt]
remote_code:
  description: The proven files of Python code, which an engine runs where remote code is trusted.
  returned: success
  type: list
  elements: dict
  sample:
    - path: modeling_step.py
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      git_blob: 4a1f4c1d3a4e0a0c8d9a7c5b6e2f1d0c9b8a7f6e
hashed_bytes:
  description: Bytes that were read and hashed.
  returned: success
  type: int
  sample: 212500000000
hash_gigabytes_per_second:
  description: How fast that went, in 10^9 bytes a second; 0 when nothing was hashed.
  returned: success
  type: float
  sample: 3.1
client_status:
  description: The client's exit status.
  returned: when the client failed
  type: int
  sample: 1
client_output:
  description: The client's last 15 lines that say something.
  returned: when the client failed or was stopped
  type: list
  elements: str
  sample: ["error: [E1020] Connection failed"]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.weights import ensure
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import (
    SOURCE_ARGUMENTS,
    Request,
    WeightsError,
)


def main() -> None:
    """Read the parameters, do the work, answer once."""
    module = AnsibleModule(
        argument_spec={
            **SOURCE_ARGUMENTS,
            "client": {"type": "path", "default": "modelscope"},
            "max_workers": {"type": "int", "default": 8},
            "expected_bytes": {"type": "int", "default": 0},
            "total_timeout": {"type": "int", "default": 14400},
            "retries": {"type": "int", "default": 3},
            "patience": {"type": "float", "default": 600},
            "deadline": {"type": "float", "default": 86400},
            "verify": {"type": "str", "choices": ["cheap", "full"], "default": "cheap"},
            "progress_file": {"type": "path", "default": ""},
            "lock_timeout": {"type": "float", "default": 600},
            "bytes_per_second": {"type": "int", "default": 0},
            "spread": {"type": "dict", "default": {}},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "leaving": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    state, leaving = module.params.pop("state"), module.params.pop("leaving")
    request = Request.of(module.params)
    try:
        result = ensure(request, state, module.check_mode, leaving)
    except WeightsError as error:
        module.fail_json(msg=str(error), **error.facts)
    except OSError as error:
        module.fail_json(msg=f"{error}. Nothing is taken for complete; mend that on the node, then run this again.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
