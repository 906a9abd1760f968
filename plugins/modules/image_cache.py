#!/usr/bin/python
"""Have a copy of a registry on one node while an image is spread to several."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: image_cache
short_description: Have a copy of a registry on one node while an image is spread to several
description:
  - With O(state=filled) starts the distribution registry as a pull-through cache, as a transient unit, and has it fetch
    the whole image once. A rerun fetches only what it lacks.
  - For an image of Docker's hub the first of Docker's mirrors that has it is asked, else the hub. A registry that
    Docker takes without TLS is asked by https, then by http.
  - With O(state=forwarded) lets C(127.0.0.1) of a node lead to that copy, since Docker pulls from there without TLS.
    What comes is checked by Docker against the digest.
  - With O(state=absent) ends both.
  - Credentials are those that C(docker login) keeps on the node, of a mirror its own.
options:
  state:
    description: What to have.
    type: str
    choices: [filled, forwarded, absent]
    required: true
  address:
    description: Address of the node that has the copy, as its peers reach it.
    type: str
  port:
    description: Port of the copy, and of the forwarders.
    type: int
    default: 5055
  name:
    description: Name of the image.
    type: str
  digest:
    description: Its digest.
    type: str
  storage:
    description: Folder for what the copy holds.
    type: path
    required: true
  forget:
    description: Whether O(state=absent) deletes what the copy holds.
    type: bool
    default: false
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
    description: Does nothing and says that something would be done.
  diff_mode:
    support: none
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Have the image on the first node, for all
  stepladder.core.image_cache:
    state: filled
    address: 198.18.0.11
    name: vllm/vllm-openai:v0.33.0
    digest: sha256:9a0b...
    storage: /var/lib/stepladder/cache/images
"""

RETURN = r"""
bytes:
  description: Bytes of the image as they are sent.
  returned: with O(state=filled), not in check mode
  type: int
  sample: 8400000000
seconds:
  description: Seconds until the copy was whole.
  returned: with O(state=filled), not in check mode
  type: float
  sample: 71.5
remote:
  description: The mirror or registry that the copy was filled from.
  returned: with O(state=filled), not in check mode
  type: str
  sample: https://mirror.example
passed_over:
  description: Those before it, each with why it was not.
  returned: with O(state=filled), not in check mode
  type: list
  elements: str
  sample: ["https://old.example: [Errno 111] Connection refused"]
"""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import engine_image, image_cache, progress

CONFIG = Path("/run/stepladder/image-cache.yml")


def filled(given: dict[str, Any]) -> dict[str, Any]:
    """Start the copy and have the image in it."""
    report = progress.ProgressFile(given["progress_file"]).write
    reference, storage = engine_image.parse(given["name"]), Path(given["storage"])
    docker = engine_image.Docker(given["socket"])
    storage.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.environ.update(image_cache.proxy_variables(Path(image_cache.PROXY_SETTINGS).read_text()))
    copy = image_cache.Copy(given["address"], given["port"], reference.repository)
    passed_over: list[str] = []
    for remote in image_cache.remotes(reference.registry, docker.info().get("RegistryConfig") or {}):
        report(f"asking {remote}")
        complaint = image_cache.silence(remote)
        if not complaint:
            image_cache.stop_units()
            settings = image_cache.settings_text(
                given["address"], given["port"], str(storage), remote, docker.login(login_for(remote, reference))
            )
            authority = image_cache.authority_of(remote)
            image_cache.start_cache(settings, CONFIG, authority, given["address"], given["port"])
            complaint = copy.lack(given["digest"])
        if not complaint:
            started = time.monotonic()
            size = image_cache.fill(copy, given["digest"], storage, report)
            seconds = round(time.monotonic() - started, 1)
            return {"changed": True, "bytes": size, "seconds": seconds, "remote": remote, "passed_over": passed_over}
        passed_over.append(f"{remote}: {complaint}")
    raise image_cache.CacheError(
        f"nobody gives {given['name']} to the copy for all nodes: {'; '.join(passed_over)}. Mirrors, proxies and "
        "certificates are variables of container_runtime; with engine_image_spread set to false every node pulls for "
        "itself."
    )


def login_for(remote: str, reference: engine_image.Reference) -> str:
    """Whose login is sent there: a mirror gets its own, never the hub's."""
    is_mirror = reference.registry == engine_image.DOCKER_HUB and remote != image_cache.HUB_URL
    return urlsplit(remote).netloc if is_mirror else reference.registry


def absent(given: dict[str, Any], check_mode: bool) -> dict[str, Any]:
    """End the copy and the forwarder."""
    storage = Path(given["storage"])
    doomed = given["forget"] and storage.exists()
    changed = image_cache.running() or CONFIG.exists() or doomed
    if changed and not check_mode:
        image_cache.stop_units()
        CONFIG.unlink(missing_ok=True)
        if doomed:
            shutil.rmtree(storage)
    return {"changed": changed}


def main() -> None:
    """Do what the state asks for, answer once."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["filled", "forwarded", "absent"], "required": True},
            "address": {"type": "str"},
            "port": {"type": "int", "default": 5055},
            "name": {"type": "str"},
            "digest": {"type": "str"},
            "storage": {"type": "path", "required": True},
            "forget": {"type": "bool", "default": False},
            "socket": {"type": "path", "default": engine_image.SOCKET},
            "progress_file": {"type": "path"},
        },
        required_if=[("state", "filled", ["address", "name", "digest"]), ("state", "forwarded", ["address"])],
        supports_check_mode=True,
    )
    given = module.params
    result: dict[str, Any] = {"changed": True}
    try:
        if given["state"] == "absent":
            result = absent(given, module.check_mode)
        elif given["state"] == "filled" and not module.check_mode:
            result = filled(given)
        elif not module.check_mode:
            image_cache.start_forward(given["address"], given["port"])
    except (engine_image.ImageError, image_cache.CacheError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename or given['storage']}: {error.strerror}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
