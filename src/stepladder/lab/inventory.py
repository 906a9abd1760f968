"""The inventory of a lab, for the ordinary playbooks over ordinary SSH."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from stepladder.lab.places import LabError
from stepladder.lab.record import Lab

HOSTS = "hosts.yml"
HEAD = "# Written by `bin/stepladder lab up` for lab '{name}', removed by `lab down`; changes here are lost.\n---\n"
DEPLOYMENT_GROUPS = ("engines", "rehearsal_hub")


def ssh_options(folder: Path) -> list[str]:
    """SSH's options for a lab: its own pinned keys, and no other identity of the user's.

    Args:
        folder: the lab's.
    """
    return [
        "-o", f'UserKnownHostsFile="{folder / "known_hosts"}"', "-o", "GlobalKnownHostsFile=/dev/null",
        "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes",
    ]  # fmt: skip


def gpu_group(gpu: str, group_vars: Path) -> tuple[str, dict[str, str]]:
    """The group of a GPU type, and the variables that it lacks.

    Args:
        gpu: the type's name in the catalogue.
        group_vars: the project's folder, where some groups set `deployment_gpu`.
    """
    for path in sorted(group_vars.glob("*.yml")):
        if (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("deployment_gpu") == gpu:
            return path.stem, {}
    return gpu.replace("-", "_"), {"deployment_gpu": gpu}


def text(lab: Lab, folder: Path, sockets: Path, group: str, variables: dict[str, str]) -> str:
    """The hosts file.

    Args:
        lab: with its nodes.
        folder: the lab's.
        sockets: where SSH's shared connections lie.
        group: of the GPU type.
        variables: of that group.
    """
    hosts: dict[str, dict[str, str]] = {}
    for node in lab.nodes:
        hosts[node.name] = {"ansible_host": node.address}
        if node.storage_address:
            hosts[node.name]["lab_storage_address"] = node.storage_address
    members: dict[str, None] = dict.fromkeys(hosts)
    kind: dict[str, Any] = {"hosts": dict(members)}
    if variables:
        kind["vars"] = dict(variables)
    first = lab.nodes[0].name if lab.nodes else None
    content: dict[str, Any] = {
        "all": {
            "vars": {
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(folder / "key"),
                "ansible_ssh_common_args": shlex.join(ssh_options(folder)),
                "ansible_control_path_dir": str(sockets),
            },
            "hosts": hosts,
            "children": {
                "engines": {"hosts": dict(members)},
                group: kind,
                "rehearsal_hub": {"hosts": {first: None} if first else {}},
            },
        }
    }
    return HEAD.format(name=lab.name) + yaml.safe_dump(content, sort_keys=False, width=100).replace(": null\n", ":\n")


def is_ours(path: Path, name: str) -> bool:
    """Whether a hosts file was written for that lab."""
    try:
        return path.read_text(encoding="utf-8").startswith(HEAD.format(name=name))
    except OSError:
        return False


def write(directory: Path, content: str, lab: Lab, group_vars: Path) -> None:
    """Write a lab's inventory; the group variables are the committed ones, linked where they are elsewhere.

    Raises:
        LabError: another lab's or a person's hosts file is there.
    """
    path = directory / HOSTS
    if path.exists() and not is_ours(path, lab.name):
        raise LabError(
            f"{path} is there and was not written for lab '{lab.name}'; name another folder with --inventory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    link = directory / "group_vars"
    if not link.exists():
        link.symlink_to(group_vars)


def remove(directory: Path, lab: Lab) -> None:
    """Remove a lab's inventory: what `write` wrote, and the folder if nothing else is in it."""
    if is_ours(directory / HOSTS, lab.name):
        (directory / HOSTS).unlink()
    link = directory / "group_vars"
    if link.is_symlink():
        link.unlink()
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
