"""Packages of a driver by the real dnf and rpm: seen, foreseen, installed, locked, changed and refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import signed_rpms
from real_lab import REPOSITORY, RealLab
from signed_rpms import FOLDER, STREAM

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(300)]

NODE = "node2"
VERSION, NEWER = "580.126.20", "580.159.04"
LOCKED = ["kmod-nvidia-open-dkms", "libnvidia-ml", "nvidia-driver-cuda"]
REPO_FILE = "/etc/yum.repos.d/stepladder-nvidia-driver.repo"


class Node:
    """The node with dnf, and the module called on it by ansible itself."""

    def __init__(self, lab: RealLab, fingerprint: str) -> None:
        self.lab, self.fingerprint = lab, fingerprint

    def packages(self, version: str = VERSION, *options: str, **changes: Any) -> dict[str, Any]:
        """What the module answers when it is asked for the driver."""
        source = {
            "name": "nvidia-driver",
            "url": f"file://{FOLDER}/repo",
            "key_url": f"file://{FOLDER}/repo/key.asc",
            "fingerprints": [self.fingerprint],
        }
        wanted = {
            "repositories": [source],
            "packages": [f"nvidia-driver-cuda={version}-*", f"kmod-nvidia-open-dkms={version}-*"],
            "hold": ["nvidia-driver*", "kmod-nvidia*", "libnvidia*"],
            "module_streams": [STREAM],
        }
        with tempfile.TemporaryDirectory() as answers:
            command = [
                Path(sys.executable).parent / "ansible", NODE, "-i", self.lab.inventory, "--tree", answers,
                "-m", "stepladder.core.system_packages", "-a", json.dumps(wanted | changes), *options,
            ]  # fmt: skip
            done = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            return {"failed": done.returncode != 0, **json.loads(Path(answers, NODE).read_text())}

    def there(self) -> dict[str, str]:
        """Packages of rpm by name."""
        listed = self.lab.ssh(NODE, "rpm -qa --qf '%{NAME} %{VERSION}\\n' | grep -v gpg-pubkey; true").stdout
        return dict(line.split() for line in listed.splitlines() if line.count(" ") == 1)

    def locks(self) -> list[str]:
        """What versionlock holds, with versions."""
        return sorted(
            line for line in self.lab.ssh(NODE, "dnf -q versionlock list").stdout.splitlines() if line.endswith(".*")
        )


@pytest.fixture(scope="module")
def node(lab: RealLab) -> Iterator[Node]:
    with signed_rpms.repository(lab, NODE, signed_rpms.driver_packages([VERSION, NEWER])) as fingerprint:
        yield Node(lab, fingerprint)


def test_a_driver_from_the_first_look_to_a_newer_one(node: Node) -> None:
    stranger = node.packages(repositories=[
        {"name": "nvidia-driver", "url": f"file://{FOLDER}/repo", "key_url": f"file://{FOLDER}/repo/key.asc",
         "fingerprints": ["0" * 40]},
    ])  # fmt: skip
    assert stranger["failed"]
    assert "0" * 40 in stranger["msg"]
    assert node.lab.ssh(NODE, f"test -e {REPO_FILE}", check=False).returncode == 1

    foreseen = node.packages(VERSION, "--check")
    assert foreseen["changed"]
    assert f"enable module stream {STREAM}" in foreseen["actions"]
    assert node.there() == {}
    assert node.lab.ssh(NODE, f"test -e {REPO_FILE}", check=False).returncode == 1

    first = node.packages()
    assert first["changed"], first
    assert node.there() == dict.fromkeys(LOCKED, VERSION)
    assert node.locks() == [f"{name}-0:{VERSION}-1.el9.*" for name in LOCKED]
    assert first["versions"] | dict.fromkeys(LOCKED, f"{VERSION}-1.el9") == first["versions"]
    assert not node.packages()["changed"]
    assert not node.packages(VERSION, "--check")["changed"]

    refused = node.packages(NEWER)
    assert refused["failed"]
    assert f"nvidia-driver-cuda {VERSION}-1.el9 would become {NEWER}-1.el9" in refused["msg"]
    assert "made only where it is allowed (allow_change)" in refused["msg"]
    # Nobody else's upgrade moves it either.
    assert node.lab.ssh(NODE, "dnf -y -q upgrade").returncode == 0
    assert node.there() == dict.fromkeys(LOCKED, VERSION)

    assert node.packages(NEWER, allow_change=True)["changed"]
    assert node.there() == dict.fromkeys(LOCKED, NEWER)
    assert node.locks() == [f"{name}-0:{NEWER}-1.el9.*" for name in LOCKED], "the old version is still let in"
    assert node.packages(VERSION, allow_change=True)["changed"], "and back"
    assert node.there() == dict.fromkeys(LOCKED, VERSION)
    assert not node.packages(allow_change=True)["changed"]


def test_what_no_repository_has(node: Node) -> None:
    before = node.there()
    refused = node.packages("999.1")
    assert refused["failed"]
    assert "Unable to find a match: nvidia-driver-cuda-999.1-*" in refused["msg"]
    assert node.there() == before


def test_packages_whose_signature_is_not_the_pinned_keys(node: Node) -> None:
    """The repository's key stays the pinned one, and somebody put another package in."""
    strip = f"rpm --delsign noarch/nvidia-persistenced-{VERSION}-1.el9.noarch.rpm"
    index = "createrepo_c -q . && modifyrepo_c --mdtype=modules ../modules.yaml repodata"
    node.lab.ssh(NODE, f"cp -r {FOLDER}/repo {FOLDER}/kept && cd {FOLDER}/repo && {strip} && {index}")
    try:
        node.lab.ssh(NODE, "dnf -q clean expire-cache")
        refused = node.packages(packages=[f"nvidia-persistenced={VERSION}-*"])
    finally:
        node.lab.ssh(NODE, f"rm -r {FOLDER}/repo && mv {FOLDER}/kept {FOLDER}/repo && dnf -q clean expire-cache")
    assert refused["failed"]
    assert "is not signed" in refused["msg"]
    assert "nvidia-persistenced" not in node.there()
