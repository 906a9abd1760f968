"""Nodes for testinfra, over paramiko with the keys that the lab pinned; molecule runs these tests.

In an ordinary run of pytest they are left out: there is no converged node.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import paramiko
import pytest
from testinfra.backend.paramiko import ParamikoBackend
from testinfra.host import Host

collect_ignore_glob = [] if "MOLECULE_SCENARIO_NAME" in os.environ else ["*"]


class PinnedBackend(ParamikoBackend):
    """A way into a node that knows its host key; testinfra's own takes any."""

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__(f"{variables['ansible_user']}@{variables['ansible_host']}")
        self.variables = variables

    @functools.cached_property
    def client(self) -> paramiko.SSHClient:
        """The connection; refused where the node shows another key than the pinned one."""
        options = dict(
            option.split("=", 1) for option in shlex.split(self.variables["ansible_ssh_common_args"]) if "=" in option
        )
        client = paramiko.SSHClient()
        client.load_host_keys(options["UserKnownHostsFile"].strip('"'))
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        client.connect(
            self.variables["ansible_host"], username=self.variables["ansible_user"], timeout=10, allow_agent=False,
            key_filename=self.variables["ansible_ssh_private_key_file"], look_for_keys=False,
        )  # fmt: skip
        return client


@functools.cache
def nodes() -> dict[str, dict[str, Any]]:
    """The variables of the lab's nodes, by name in the order of the inventory."""
    inventory = Path(os.environ["STEPLADDER_LAB_INVENTORY"])
    done = subprocess.run(["ansible-inventory", "-i", inventory, "--list"], capture_output=True, check=True)
    listed = json.loads(done.stdout)
    return {name: listed["_meta"]["hostvars"][name] for name in listed["engines"]["hosts"]}


@pytest.fixture(scope="session")
def hosts() -> dict[str, Host]:
    """Every node of the lab."""
    return {name: Host(PinnedBackend(variables)) for name, variables in nodes().items()}


@pytest.fixture(scope="session")
def host(hosts: dict[str, Host]) -> Host:
    """The first node, where scenarios converge that need one."""
    return next(iter(hosts.values()))
