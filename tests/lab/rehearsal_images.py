"""Images of engines for rehearsals: a root file system by mmdebstrap, and an environment from the pinned lock."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from real_lab import REPOSITORY

# Kept for the next run. The environment lies at the same place in the image: its programs name their interpreter so.
PLACE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder" / "rehearsal"
PLAY = """
- hosts: localhost
  gather_facts: false
  roles:
    - role: deployment
    - role: engine_venv
  tasks:
    - ansible.builtin.copy:
        content: "{{ deployment_slice.node.venv.path }}"
        dest: "{{ written }}"
        mode: "0644"
"""


def environment(engine: str) -> Path:
    """The engine's environment, made by the toolkit's own role of its lock, with the system's Python."""
    with tempfile.TemporaryDirectory() as folder:
        play, written = Path(folder, "play.yml"), Path(folder, "path")
        play.write_text(PLAY)
        settings = {
            "deployment_engine": engine,
            "deployment_hosts": ["localhost"],
            "deployment_gpu": "cpu",
            "stepladder_state_directory": str(PLACE),
            "engine_venv_catalogue": str(REPOSITORY / "catalog"),
            "written": str(written),
        }
        run(
            [str(REPOSITORY / ".venv/bin/ansible-playbook"), str(play), "-i", "inventories/local",
             "-e", json.dumps(settings)],
            # The node's own Python is the image's; pyenv's and its like are not there.
            env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )  # fmt: skip
        return Path(written.read_text())


def build(docker: list[str], base: str, engine: str, name: str) -> None:
    """Make an image of an engine: the root file system, and the environment beside it.

    Args:
        docker: how the engine that holds it is called.
        base: image of the root file system.
        engine: name of the engine in the catalogue.
        name: of the image, with a tag.
    """
    path = environment(engine)
    container = run([*docker, "create", base, "true"]).strip()
    try:
        # Docker makes the directories above with the archive's own entries.
        with subprocess.Popen(["tar", "-C", "/", "-c", str(path).lstrip("/")], stdout=subprocess.PIPE) as packed:
            subprocess.run([*docker, "cp", "-", f"{container}:/"], stdin=packed.stdout, check=True)
        assert packed.returncode == 0, "tar failed"
        path_line = f"ENV PATH={path}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        run([*docker, "commit", "--change", path_line, "--change", 'CMD ["true"]', container, name])
    finally:
        run([*docker, "rm", container])


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout
