#!/usr/bin/python
"""Module stepladder.core.preflight: the parameters and the result; the work is in module_utils/preflight.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight
short_description: Read what a node is and has, and say what keeps it from a deployment
version_added: 0.1.0
description:
  - Reads everything in one call - system, CPUs, NUMA, memory, disks, GPUs and how well they are, the kernel's log about
    them, network, RDMA, names, clock, limits, container engine - and names all that is wrong, each with what was found,
    what is needed and what mends it. It does not fail; who asks decides.
  - Needs no root; what could not be read without it is among the findings. Every program that is asked has a deadline.
  - A port that is held by a process of the same deployment is fine, and so is the memory that its processes hold. They
    are known by C(STEPLADDER_DEPLOYMENT) in their environment.
  - Changes nothing; the answer is the same in check mode.
author:
  - Stepladder contributors (@stepladder)
options:
  deployment:
    description:
      - The deployment's directory, which marks its processes (C(STEPLADDER_DEPLOYMENT)).
      - Unset where none is planned; then only what needs no plan is checked.
    type: str
    default: ''
  ports:
    description: TCP ports that the deployment will listen on.
    type: list
    elements: dict
    default: []
    suboptions:
      port:
        description: The port.
        type: int
        required: true
      host:
        description: Address that will be listened on. A name other than C(localhost) is taken for any address.
        type: str
        default: 0.0.0.0
      process:
        description: The plan's name of the process.
        type: str
        default: ''
      purpose:
        description: What the port is for.
        type: str
        default: ''
  paths:
    description: Paths that need disk space. Those on one file system need it together.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path; it need not exist yet.
        type: path
        required: true
      minimum_free_bytes:
        description: Space needed, in bytes.
        type: int
        required: true
      purpose:
        description: What comes there.
        type: str
        default: ''
      existing_bytes_path:
        description: What is below this path already is subtracted from the need.
        type: path
        default: ''
  minimum_memory_bytes:
    description: Memory needed, in bytes, against the kernel's C(MemAvailable) and what the deployment itself holds.
    type: int
    default: 0
  minimum_python:
    description: Version that O(python) has at least, for example C(3.11). Empty asks for none.
    type: str
    default: ''
  python:
    description: The interpreter, by name or path.
    type: path
    default: python3
  cpu_flags_any:
    description: Groups of CPU flags as in C(/proc/cpuinfo); all those of at least one group are there.
    type: list
    elements: list
    default: []
  commands:
    description: Commands that are on the PATH, the administrator's directories included.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The command.
        type: str
        required: true
      package:
        description: The package that brings it, if it has another name.
        type: str
        default: ''
  libraries:
    description:
      - Shared libraries that the dynamic linker finds.
      - Missing ones, and Python's module venv, are returned in C(packages_to_install) where this user can install
        packages with apt, and are failures elsewhere.
    type: list
    elements: dict
    default: []
    suboptions:
      soname:
        description: The library, such as C(libnuma.so.1).
        type: str
        required: true
      package:
        description: The package of Debian and Ubuntu that brings it.
        type: str
        required: true
  minimum_shared_memory_bytes:
    description: Size of C(/dev/shm) needed, in bytes.
    type: int
    default: 0
  architectures:
    description: Machine architectures allowed, for example C(x86_64). Empty allows any.
    type: list
    elements: str
    default: []
  writable_paths:
    description: Directories that this user can write, or make.
    type: list
    elements: path
    default: []
  gpus:
    description:
      - The GPUs that the deployment was planned for, held against what the vendor's tool reports; unset asks for none.
      - Memory that processes of the deployment itself hold is fine, they are replaced.
    type: dict
    suboptions:
      vendor:
        description: Whose tool is asked, C(nvidia-smi), or C(amd-smi) and C(rocm-smi).
        type: str
        choices: [nvidia, amd]
        required: true
      count:
        description: Number of GPUs.
        type: int
        required: true
      model:
        description: Word that stands in the name that the tool reports, such as C(H20).
        type: str
        required: true
      memory_mib:
        description: Memory of each, in MiB; 2 % more or less is the same type.
        type: int
        required: true
      minimum_driver:
        description: Oldest driver (NVIDIA) or ROCm release (AMD), such as C(580); empty asks for none.
        type: str
        default: ''
      indices:
        description: GPUs that the deployment uses, by their numbers; they are idle.
        type: list
        elements: int
        default: []
  interface:
    description: The network interface that the deployment's ranks talk over.
    type: str
    default: ''
  ranks:
    description: Number of nodes of the replica that this node belongs to.
    type: int
    default: 1
  environment:
    description: Python environment whose releases are told, to be held against those of the other nodes.
    type: path
    default: ''
  images:
    description: Container images that the deployment runs.
    type: list
    elements: str
    default: []
  minimum_docker:
    description: Oldest Docker that gives containers GPUs by CDI, where there are O(images).
    type: str
    default: ''
  minimum_toolkit:
    description: Oldest NVIDIA container toolkit, where there are O(images).
    type: str
    default: ''
attributes:
  check_mode:
    description: Reads only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Check the node
  stepladder.core.preflight:
    deployment: flash
    architectures: [x86_64]
    cpu_flags_any: [[avx2], [avx512f]]
    minimum_memory_bytes: 68719476736
    minimum_python: "3.11"
    python: /usr/bin/python3.11
    commands:
      - name: iptables
    paths:
      - path: /var/lib/stepladder/models
        minimum_free_bytes: 212500000000
        purpose: weights of Step-3.5-Flash
        existing_bytes_path: /var/lib/stepladder/models/stepfun-ai--Step-3.5-Flash/master
    ports:
      - port: 8000
        process: flash-0
        purpose: API
    writable_paths: [/var/lib/stepladder]
"""

RETURN = r"""
findings:
  description: All that is wrong; the node is fit when none is a C(failure).
  returned: always
  type: list
  elements: dict
  sample:
    - check: port
      what: 0.0.0.0:8000
      found: "held by pid 812, user root: python3 -m http.server 8000"
      needed: free for flash-0 (API)
      mend: stop process 812, or choose another port for flash-0
      severity: failure
facts:
  description: The node, as it was found; sizes in bytes. The sample is the beginning of it.
  returned: always
  type: dict
  sample:
    hostname: gpu7
    kernel: 6.8.0-45-generic
    os: Ubuntu 24.04.1 LTS
    architecture: x86_64
    cpus: 192
    memory_total_bytes: 2164179529728
    memory_available_bytes: 2105427968000
    own_memory_bytes: 0
    disks: [{path: /var/lib/stepladder/models, mount: /data, total_bytes: 7681501126656, free_bytes: 6912364609536}]
    python: {executable: /usr/bin/python3.11, version: 3.11.9}
    packages_to_install: [libnuma1]
    gpus:
      - {index: 0, name: NVIDIA H20, memory_mib: 97871, used_mib: 1, driver: 580.95.05, uuid: GPU-..., bus: "..."}
    rocm_release: ""
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.preflight import Wanted, gather
from ansible_collections.stepladder.core.plugins.module_utils.preflight_checks import findings


def text(default: str = "") -> dict[str, str]:
    """An optional text."""
    return {"type": "str", "default": default}


def many(elements: str, **options: object) -> dict[str, object]:
    """A list that is empty unless given; options: those of its dictionaries."""
    return {"type": "list", "elements": elements, "default": [], **({"options": options} if options else {})}


GPUS = {
    "vendor": {"type": "str", "choices": ["nvidia", "amd"], "required": True},
    "count": {"type": "int", "required": True},
    "model": {"type": "str", "required": True},
    "memory_mib": {"type": "int", "required": True},
    "minimum_driver": text(),
    "indices": many("int"),
}


def main() -> None:
    """Read the node, hold it against what is wanted, answer once."""
    number, path = {"type": "int", "required": True}, {"type": "path", "required": True}
    needed = {"type": "str", "required": True}
    module = AnsibleModule(
        argument_spec={
            "deployment": text(),
            "ports": many("dict", port=number, host=text("0.0.0.0"), process=text(), purpose=text()),  # noqa: S104
            "paths": many(
                "dict",
                path=path,
                minimum_free_bytes=number,
                purpose=text(),
                existing_bytes_path={"type": "path", "default": ""},
            ),
            "minimum_memory_bytes": {"type": "int", "default": 0},
            "minimum_python": text(),
            "python": {"type": "path", "default": "python3"},
            "cpu_flags_any": many("list"),
            "commands": many("dict", name=needed, package=text()),
            "libraries": many("dict", soname=needed, package=needed),
            "minimum_shared_memory_bytes": {"type": "int", "default": 0},
            "architectures": many("str"),
            "writable_paths": many("path"),
            "gpus": {"type": "dict", "options": GPUS},
            "interface": text(),
            "ranks": {"type": "int", "default": 1},
            "environment": {"type": "path", "default": ""},
            "images": many("str"),
            "minimum_docker": text(),
            "minimum_toolkit": text(),
        },
        supports_check_mode=True,
    )
    wanted = Wanted(**module.params)
    facts = gather(wanted)
    module.exit_json(changed=False, findings=[vars(one) for one in findings(facts, wanted)], facts=facts.as_result())


if __name__ == "__main__":
    main()
