#!/usr/bin/python
"""Have an engine's image on a node, or take it away."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: engine_image
short_description: Have an engine's image on a node, or take it away
description:
  - Pulls an image by the digest that its registry has under the wanted tag, through a peer's copy of the registry where
    one is named, or loads it from an archive.
  - An image that lies on the node under the wanted name stays; where a digest is wanted, only the one that has it.
  - Where the name was moved since, the image that O(record) has is still the one, as long as it is there.
  - Credentials are those that C(docker login) keeps on the node.
  - Returns the image's id, which a container can be made of whatever becomes of the tag.
options:
  name:
    description: Name of the image with a tag, a digest or both.
    type: str
    required: true
  state:
    description: Whether the image is to be there.
    type: str
    choices: [present, absent]
    default: present
  archive:
    description: File on the node that C(docker save) wrote; it is loaded instead of asking a registry.
    type: path
  through:
    description: C(host:port) of a copy of the image's registry, asked instead of the registry itself.
    type: str
  digest:
    description: Digest that the registry has the image under, where it was asked already.
    type: str
  known:
    description: Images that the catalogue has for the engine, for the message about a tag that is gone.
    type: list
    elements: str
    default: []
  minimum_free_bytes:
    description: Bytes that have to be free below Docker's data root before anything is fetched.
    type: int
    default: 0
  docker_required:
    description: Whether check mode fails where Docker does not answer, or only warns.
    type: bool
    default: false
  record:
    description: File that keeps what was brought, and how.
    type: path
    required: true
  socket:
    description: Docker's socket.
    type: path
    default: /var/run/docker.sock
  progress_file:
    description: File for the newest line of progress.
    type: path
attributes:
  check_mode:
    support: full
    description: >-
      Says what would be pulled or loaded, and asks the registry for its digest. A node without Docker is told in a
      warning.
  diff_mode:
    support: full
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Have the engine's image
  stepladder.core.engine_image:
    name: vllm/vllm-openai:v0.33.0
    minimum_free_bytes: 35000000000
    record: /var/lib/stepladder/images/vllm.json
  register: __example_image
"""

RETURN = r"""
id:
  description: Id of the image on the node; empty in check mode where it is not there yet.
  returned: always
  type: str
  sample: sha256:4f1c...
digest:
  description: Digest that its registry has it under; empty for an image from elsewhere whose digest nobody named.
  returned: always
  type: str
  sample: sha256:9a0b...
bytes:
  description: Bytes that it takes on the node, unpacked.
  returned: always
  type: int
  sample: 21500000000
actions:
  description: What was done, or would be.
  returned: always
  type: list
  elements: str
  sample: [pull vllm/vllm-openai:v0.33.0 from docker.io]
"""

import json
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import engine_image, progress, watched


def present(module: AnsibleModule, docker: engine_image.Docker) -> dict[str, Any]:
    """Have the image there; in check mode say what would be done."""
    given = module.params
    wanted = engine_image.Wanted(
        name=given["name"],
        archive=given["archive"] or "",
        through=given["through"] or "",
        digest=given["digest"] or "",
        known=tuple(given["known"]),
        needed=given["minimum_free_bytes"],
        record=Path(given["record"]),
    )
    reference = engine_image.parse(wanted.name)
    answers, found = True, None
    try:
        found = docker.look(reference.local)
    except engine_image.ImageError as error:
        if given["docker_required"] or not module.check_mode:
            raise
        module.warn(str(error))
        answers = False
    record = engine_image.read_record(wanted.record)
    if found:
        found = engine_image.recorded_of(docker, found, record)
    before = record if found and record.get("id") == found.id else {}
    if found and engine_image.is_wanted(found, reference, record):
        kept = {"id": found.id, "bytes": found.size, "digest": before.get("digest") or found.digest_in(reference)}
        return {"changed": False, "actions": [], **kept}
    digest = reference.digest
    if module.check_mode and not wanted.archive and answers:
        digest = docker.resolve(reference, wanted.known)
    action = engine_image.way(wanted, reference, digest)
    result = {"changed": True, "actions": [action], "id": "", "digest": digest, "bytes": 0}
    result["diff"] = {"before": f"{json.dumps(before)}\n" if before else "", "after": f"{action}\n"}
    if not module.check_mode:
        report = progress.ProgressFile(given["progress_file"]).write
        record = engine_image.bring(docker, wanted, report)
        wanted.record.parent.mkdir(parents=True, exist_ok=True)
        watched.write_line(wanted.record, json.dumps(record, sort_keys=True))
        result.update({key: record[key] for key in ("id", "digest", "bytes")})
        result["actions"] = [f"{action}: {record['bytes'] / 1e9:.2f} GB unpacked, {record['seconds']} s"]
    return result


def absent(module: AnsibleModule, docker: engine_image.Docker) -> dict[str, Any]:
    """Take the image away."""
    name, record = engine_image.parse(module.params["name"]).local, Path(module.params["record"])
    try:
        found = docker.look(name)
    except engine_image.ImageError:
        if record.exists() and engine_image.is_installed():
            raise  # it has the image still, and without the record nobody would know whose it is
        found = None  # without Docker there is no image
    changed = found is not None or record.exists()
    if changed and not module.check_mode:
        if found is not None:
            docker.remove(name)
        record.unlink(missing_ok=True)
    return {"changed": changed, "actions": [f"remove {name}"] if changed else [], "id": "", "digest": "", "bytes": 0}


def main() -> None:
    """Look, bring or remove, answer once."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "archive": {"type": "path"},
            "through": {"type": "str"},
            "digest": {"type": "str"},
            "known": {"type": "list", "elements": "str", "default": []},
            "minimum_free_bytes": {"type": "int", "default": 0},
            "docker_required": {"type": "bool", "default": False},
            "record": {"type": "path", "required": True},
            "socket": {"type": "path", "default": engine_image.SOCKET},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    docker = engine_image.Docker(module.params["socket"])
    work = present if module.params["state"] == "present" else absent
    try:
        result = work(module, docker)
    except engine_image.ImageError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or module.params['record']}: {error.strerror}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
