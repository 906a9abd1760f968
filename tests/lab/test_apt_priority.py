"""Priorities of apt's repositories, by the real apt of this machine in a copy of its world: nothing here is changed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import signed_repository
from ansible_collections.stepladder.core.plugins.module_utils import apt, package_sources, system_packages
from ansible_collections.stepladder.core.plugins.module_utils.package_plan import Spec
from ansible_collections.stepladder.core.plugins.module_utils.package_sources import Repository
from signed_repository import StandIn

FRESH = "stepladder-stand-in-fm"


@pytest.fixture
def mirror(tmp_path: Path) -> dict[str, Repository]:
    """Two repositories of one host, this machine; each has the same package, the second in a newer version."""
    lacking = signed_repository.lacking() or ("" if shutil.which("apt-get") else "apt-get")
    if lacking:
        pytest.skip(f"no signed repository on this machine: it lacks {lacking}")
    fingerprint = signed_repository.new_key(tmp_path / "key")
    found = {}
    for name, version, priority in (("vendor", "1", 600), ("site", "2", None)):
        folder = tmp_path / name
        signed_repository.build(folder, [StandIn(FRESH, version)])
        release = folder / "Release"
        names = f"Origin: stand-in {name}\n" if name == "vendor" else ""
        release.write_text(release.read_text().replace("Origin: stand-in\n", names).replace("Label: stand-in\n", ""))
        signed_repository.sign(folder, tmp_path / "key")
        key = f"{folder.as_uri()}/key.asc"
        found[name] = Repository(
            name, f"{folder.as_uri()}/", key_url=key, fingerprints=[fingerprint], priority=priority
        )
    return found


def policy(files: dict[str, bytes]) -> str:
    """The version of the package that apt would install with these files."""
    manager = apt.Apt(print, 1)
    with apt.scratch(files) as root:
        manager.update([str(path) for path in (root / "sources").glob("stepladder-*")], root)
        asked = ["apt-cache", *apt.scratch_options(root), "policy", FRESH]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return re.findall(r"Candidate: (\S+)", told)[0]


def test_a_priority_raises_its_repository_and_no_other_of_the_host(mirror: dict[str, Repository]) -> None:
    whole: dict[str, Any] = {"repositories": [*mirror.values()], "packages": [Spec.of(FRESH)]}
    outcome = system_packages.converge(system_packages.Wanted(**whole), True, print, 1)
    path = f"{package_sources.APT_PINS}/stepladder-vendor"
    assert "Pin: release o=stand-in vendor\n" in outcome.after[path]
    assert outcome.after[FRESH] == "1"
    files = {
        path: content
        for one in mirror.values()
        for path, content in package_sources.apt_files(one, package_sources.fetch_key(one)).items()
    }
    assert policy(files) == "2"
    assert policy(files | {path: outcome.after[path].encode()}) == "1"
    by_host = package_sources.apt_priority_file(mirror["vendor"], ())
    assert policy(files | by_host) == "2", "what was done before: both were raised"
