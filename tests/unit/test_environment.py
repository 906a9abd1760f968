"""The environment in .venv: when it fits, when it is made again, and what is said when it cannot be made."""

import os
from pathlib import Path

import pytest

from stepladder import environment
from stepladder.environment import CONTROLLER, TEST, Environment, SetupError, node_helper

ROOT = Path(__file__).resolve().parents[2]
LOCK = b"uv==1\n"
FITTING = environment.stamp_text(LOCK, "/usr/bin/python3.11", "/clone")


@pytest.mark.parametrize(
    ("stamp", "reason", "afresh"),
    [
        (None, "an earlier run did not finish it", True),
        ("", "another release of stepladder made it", True),
        (FITTING.replace("format 1", "format 0"), "another release of stepladder made it", True),
        (FITTING.replace("/clone", "/old place"), "the clone was at /old place when it was made", True),
        (
            FITTING.replace("3.11", "3.9"),
            "it was made with /usr/bin/python3.9, which is now /usr/bin/python3.11",
            True,
        ),
        (environment.stamp_text(b"uv==2\n", "/usr/bin/python3.11", "/clone"), "x.txt has changed", False),
    ],
)
def test_misfit(stamp: str | None, reason: str, afresh: bool) -> None:
    assert environment.misfit(stamp, FITTING, "x.txt") == (reason, afresh)


def test_a_fitting_stamp_is_enough() -> None:
    assert environment.misfit(FITTING, FITTING, "x.txt") is None


@pytest.mark.parametrize(
    ("interpreter", "package"),
    [("/usr/bin/python3.12", "python3-venv"), ("/usr/bin/python3.13", "python3.13-venv")],
)
def test_venv_package(interpreter: str, package: str) -> None:
    assert environment.venv_package(interpreter, "/usr/bin/python3.12", (3, 13)) == package


@pytest.mark.parametrize(
    ("root", "sudo", "lists", "commands"),
    [
        (False, False, True, []),
        (True, False, True, ["apt-get install -y -q --no-install-recommends python3-venv"]),
        (
            True,
            False,
            False,
            ["apt-get update -q", "apt-get install -y -q --no-install-recommends python3-venv"],
        ),
        (False, True, True, ["sudo -n apt-get install -y -q --no-install-recommends python3-venv"]),
    ],
)
def test_apt_commands(root: bool, sudo: bool, lists: bool, commands: list[str]) -> None:
    found = environment.apt_commands("python3-venv", root, sudo, lists)
    assert [" ".join(command) for command in found] == commands


def test_failure_shows_the_last_lines() -> None:
    told = environment.failure_text("uv 1, with pip", 2, ["one", "two"])
    assert told.startswith("uv 1, with pip failed with exit status 2. Its last lines:\n    one\n    two\n")
    assert told.endswith("run the same command again: it goes on from there, what was downloaded is kept.")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose locks hold uv, and for the tests a tiny package."""
    root = tmp_path / "clone"
    (root / "requirements").mkdir(parents=True)
    pip_config = node_helper("pip_config")
    full = (ROOT / "requirements/test.txt").read_text()
    uv = pip_config.lock_entry(full, "uv")
    (root / "requirements/controller.txt").write_text(uv)
    (root / "requirements/test.txt").write_text(uv + pip_config.lock_entry(full, "iniconfig"))
    return root


def installed(clone: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in clone.glob(".venv/lib/python*/site-packages/*.dist-info")} - {
        "pip",
        "setuptools",
    }


def test_environment_is_made_once_and_mended_when_it_does_not_fit(clone: Path, tmp_path: Path) -> None:
    """For real, with the configured index."""
    said: list[str] = []

    def ensure(root: Path, lock: str) -> str:
        said.clear()
        Environment(root, os.environ, said.append).ensure(lock)
        return "\n".join(said)

    first = ensure(clone, CONTROLLER)
    assert "making the environment" in first
    assert "(there is none yet)" in first
    assert installed(clone) == {"uv"}
    (site,) = clone.glob(".venv/lib/python*/site-packages")
    assert (site / "ansible_collections/stepladder/core").resolve() == clone
    assert (site / "stepladder.pth").read_text() == f"{clone}/src\n"
    assert ensure(clone, CONTROLLER) == ""

    assert "adding what the tests need" in ensure(clone, TEST)
    assert installed(clone) == {"uv", "iniconfig"}
    assert ensure(clone, TEST) == ""

    lock = clone / "requirements/controller.txt"
    lock.write_text(lock.read_text() + "# changed\n")
    assert "updating the environment" in ensure(clone, CONTROLLER)
    assert installed(clone) == {"uv"}, "what the lock does not name is gone"

    moved = clone.rename(tmp_path / "moved")
    assert f"(the clone was at {clone} when it was made)" in ensure(moved, CONTROLLER)
    assert "moved" in (moved / ".venv/bin/pip").read_text().splitlines()[0]


def test_a_failed_installation_says_why_and_leaves_no_stamp(clone: Path) -> None:
    environ = {
        **os.environ,
        "PIP_INDEX_URL": "http://me:s3cret@127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    with pytest.raises(SetupError) as caught:
        Environment(clone, environ, lambda line: None).ensure(CONTROLLER)
    assert "with pip: python failed with exit status 1. Its last lines:\n" in str(caught.value)
    assert "No matching distribution found for uv==" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert not (clone / ".venv/.stepladder-controller").exists()


def test_a_foreign_directory_is_left_alone(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv/letters.txt").touch()
    with pytest.raises(SetupError, match=r"\.venv is there and is no Python environment; move it away and run again$"):
        Environment(clone, {}, lambda line: None).ensure(CONTROLLER)
    assert (clone / ".venv/letters.txt").exists()


def test_a_clone_without_its_lock_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        SetupError, match=r"controller\.txt cannot be read \(No such file or directory\); is the clone whole\?$"
    ):
        Environment(tmp_path, {}, lambda line: None).ensure(CONTROLLER)
