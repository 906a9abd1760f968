"""The verbs' own playbooks run in a project of a test's, with roles that stand in for what reaches nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(project: Path, verb: str, variables: Mapping[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    """Run a verb on `inventory.yml` of the project, whose `roles` go before ours."""
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "inventory.yml", str(ROOT / f"playbooks/{verb}.yml")]
    environ = {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "XDG_STATE_HOME": str(project / "state"),
        "ANSIBLE_ROLES_PATH": f"{project / 'roles'}:{ROOT / 'roles'}",
    }  # fmt: skip
    return subprocess.run(
        [*command, "-e", json.dumps(variables), *options],
        cwd=project, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
