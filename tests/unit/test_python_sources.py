"""Package indexes as pip's and uv's files; both tools read what is written, and no password gets into it."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stepladder import preparing, python_sources

ROOT = Path(__file__).resolve().parents[2]
MIRROR = "https://pypi.tuna.tsinghua.edu.cn/simple"
ALL: dict[str, Any] = {
    "index_url": MIRROR,
    "extra_index_urls": ["https://private/simple", "http://wheels/simple"],
    "find_links": ["/srv/wheels"],
    "certificate": "/etc/ssl/site.pem",
    "trusted_hosts": ["wheels"],
}
NONE: dict[str, Any] = {"index_url": None, "extra_index_urls": [], "find_links": [], "certificate": None}


def test_pip_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pip.conf"
    path.write_text(python_sources.pip_conf(ALL))
    environ = {"PIP_CONFIG_FILE": str(path), "HOME": str(tmp_path), "PATH": "/usr/bin"}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert f"global.index-url='{MIRROR}'" in listed
    assert "https://private/simple\\nhttp://wheels/simple" in listed
    assert "global.cert='/etc/ssl/site.pem'" in listed
    parser = configparser.ConfigParser()
    parser.read_string(path.read_text())
    assert parser["global"]["trusted-host"] == "wheels"


def test_uv_asks_the_private_index_first_and_the_main_one_last() -> None:
    """A name that the private index has is never looked for on the main one (uv: index strategy first-index)."""
    settings = tomllib.loads(python_sources.uv_toml(ALL))
    assert settings["index-strategy"] == "first-index"
    assert settings["index"] == [
        {"url": "https://private/simple"},
        {"url": "http://wheels/simple"},
        {"url": MIRROR, "default": True},
    ]
    assert settings["find-links"] == ["/srv/wheels"]
    assert settings["allow-insecure-host"] == ["wheels"]


def test_nothing_named_is_nothing_written() -> None:
    assert python_sources.pip_conf(NONE) == ""
    assert python_sources.uv_toml(NONE) == ""
    assert python_sources.problems(NONE) == []


def test_a_folder_alone_will_do() -> None:
    only = {**NONE, "find_links": ["/srv/wheels"]}
    assert python_sources.pip_conf(only).endswith("[global]\nfind-links = /srv/wheels\n")
    assert tomllib.loads(python_sources.uv_toml(only)) == {
        "index-strategy": "first-index",
        "find-links": ["/srv/wheels"],
    }


WRONG = {
    "a password": (
        {"index_url": "https://me:hunter2@private/simple"},
        ["the address of private carries a password or a user, and every user reads pip's and uv's files: name them in "
         "python_mirror_credentials (host, user, password; keep them in a vault) and leave them out"],
    ),
    "a token for a user": (
        {"index_url": MIRROR, "extra_index_urls": ["https://hunter2:@private/simple"]},
        ["the address of private carries a password or a user, and every user reads pip's and uv's files: name them in "
         "python_mirror_credentials (host, user, password; keep them in a vault) and leave them out"],
    ),
    "a token before a password that nobody quoted": (
        {"index_url": "https://hunter2:a/b@private/simple"},
        ["the address of private carries a password or a user, and every user reads pip's and uv's files: name them in "
         "python_mirror_credentials (host, user, password; keep them in a vault) and leave them out"],
    ),
    "no TLS": (
        {"index_url": "http://wheels/simple"},
        ["http://wheels has no TLS, so pip refuses it: use https, or name it in python_mirror_trusted_hosts (what is "
         "pinned by hash is safe then, nothing else is)"],
    ),
    "further ones alone": (
        {"extra_index_urls": ["https://private/simple"]},
        ["python_mirror_extra_index_urls without python_mirror_index_url: name the main index too"],
    ),
    "no scheme, which pip takes for a folder": (
        {"index_url": "pypi.example/simple"},
        ["python_mirror_index_url: 'pypi.example/simple' is neither an address (https://...) nor a folder (/...), and "
         "pip would take it for a folder of where it runs"],
    ),
    "two in the place of one": (
        {"index_url": ["https://a/simple", "https://b/simple"]},
        ["python_mirror_index_url: give one address; further ones are python_mirror_extra_index_urls"],
    ),
    "a trusted host with its port": ({"index_url": "http://wheels:3141/simple", "trusted_hosts": ["wheels:3141"]}, []),
    "all is well": (ALL, []),
}  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), WRONG.values(), ids=WRONG)
def test_problems(values: dict[str, Any], expected: list[str]) -> None:
    found = python_sources.problems(values)
    assert found == expected
    assert "hunter2" not in str(found)


CREDENTIALS = {
    "a name that is none": (
        {"host": "a", "user": "u", "passwrd": "hunter2"},
        ["python_mirror_credentials, the first: no password; unknown: passwrd"],
    ),
    "nothing where the password is": (
        {"host": "a", "user": "u", "password": None}, ["python_mirror_credentials, the first: no password"],
    ),
    "an address for the host": (
        {"host": "https://a/", "user": "u", "password": "hunter2"},
        ["python_mirror_credentials, the first: host is 'https://a/', and ~/.netrc is asked by the name alone: a"],
    ),
    "a host with its port": (
        {"host": "a:3141", "user": "u", "password": "hunter2"},
        ["python_mirror_credentials, the first: host is 'a:3141', and ~/.netrc is asked by the name alone: a"],
    ),
    "a password in several words": (
        {"host": "a", "user": "u", "password": "hunter2 and 3"},
        ["python_mirror_credentials, the first: white space in password, at which ~/.netrc parts words"],
    ),
    "a number": ({"host": "a", "user": "u", "password": 2}, []),
}  # fmt: skip


@pytest.mark.parametrize(("one", "expected"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_are_judged_without_being_told(one: dict[str, Any], expected: list[str]) -> None:
    """The task that writes them hides what is wrong with them, too."""
    found = python_sources.problems({**NONE, "credentials": [one]})
    assert found == expected
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"index_url": MIRROR}, 0),
        ({"index_url": "https://me:hunter2@private/simple"}, 2),
        ({"credentials": [{"host": "private", "user": "me", "passwd": "hunter2"}]}, 2),
    ],
    ids=["another's password in the file before", "a password in the index", "credentials that lack one"],
)
def test_no_password_is_in_the_roles_output(values: dict[str, Any], status: int, tmp_path: Path) -> None:
    """An image's own pip.conf may hold one, and a diff has what was there before."""
    done = by_the_role(values, tmp_path)
    assert done.returncode == status, done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    assert (MIRROR in (tmp_path / "pip.conf").read_text()) is (status == 0)


def test_what_is_not_on_the_node_is_not_written(tmp_path: Path) -> None:
    """pip stops at a certificate that is not there, and uv at a folder: every later one would."""
    (tmp_path / "ca.pem").write_text("")
    values: dict[str, Any] = {"index_url": MIRROR, "find_links": [f"{tmp_path}/wheels", "https://site/wheels"]}
    done = by_the_role({**values, "certificate": f"{tmp_path}/none.pem"}, tmp_path)
    assert done.returncode == 2, done.stdout
    assert f"{tmp_path}/none.pem, {tmp_path}/wheels" in done.stdout
    assert MIRROR not in (tmp_path / "pip.conf").read_text()
    (tmp_path / "wheels").mkdir()
    done = by_the_role({**values, "certificate": f"{tmp_path}/ca.pem"}, tmp_path)
    assert done.returncode == 0, done.stdout


def by_the_role(values: dict[str, Any], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The role itself, with files of the test's in the place of those of this machine."""
    for place in ("pip.conf", "uv/uv.toml"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("[global]\nindex-url = https://me:hunter2@elsewhere/simple\n")
    given = {f"python_mirror_{name}": value for name, value in values.items()}
    files = {"__python_mirror_pip_file": f"{tmp_path}/pip.conf", "__python_mirror_uv_folder": f"{tmp_path}/uv"}
    (tmp_path / "variables.json").write_text(json.dumps(given | files))
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "roles": ["python_mirror"]}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(tmp_path / "play.yml")]
    variables = ["-e", f"@{tmp_path}/variables.json", "-e", f"ansible_python_interpreter={sys.executable}"]
    return subprocess.run(
        [*command, *variables, "-vvv", "--diff"],
        cwd=ROOT, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


# ---- what prepare tells at its end -----------------------------------------------------------------------------------


def test_the_report_tells_changes_reboots_and_failures() -> None:
    rows: dict[str, dict[str, Any]] = {
        "a": {
            "gpu_driver_plan": {"summary": "NVIDIA H20: driver 580"},
            "gpu_driver_changes": [f"install p{number} 1" for number in range(13)],
            "gpu_driver_reboot": ["driver 580 is installed, in the kernel none runs"],
            "python_mirror_changes": ["write /etc/pip.conf"],
        },
        "b": {"host_changes": [], "host_unmet": ["swap: 2 GB are in use"]},
        "c": {"host_changes": ["write /x"]},
    }
    lines = preparing.report(rows, ["c"]).splitlines()
    assert lines[:3] == [
        "a: prepared; 14 changes; a reboot is due",
        "    NVIDIA H20: driver 580",
        "    reboot: driver 580 is installed, in the kernel none runs",
    ]
    assert lines[3] == "    driver: install p0 1"
    assert lines[15:-1] == [
        "    and 2 more; -v shows all",
        "b: prepared; nothing changed; no reboot is due",
        "    not possible here: swap: 2 GB are in use",
        "c: not prepared, see above; 1 change; no reboot is due",
        "    host: write /x",
    ]
    assert lines[-1].startswith("Not asked yet whether they are fit: a. Restart them")


def test_a_reboot_that_only_the_system_asks_for_is_told_and_not_waited_for() -> None:
    rows = {"a": {"gpu_driver_reboot": [], "gpu_driver_system_reboot": ["the system asks for it (libc6)"]}}
    assert preparing.report(rows, []).splitlines() == [
        "a: prepared; nothing changed; the system asks for a reboot",
        "    reboot: the system asks for it (libc6)",
    ]


def test_a_driver_that_was_not_installed_is_told_as_found() -> None:
    plan = {"title": "NVIDIA H20", "summary": "NVIDIA H20: the driver that is there", "version": ""}
    found = preparing.report({"a": {"gpu_driver_plan": plan, "gpu_driver_loaded": "580.95.05"}}, []).splitlines()
    assert found[1] == "    NVIDIA H20: driver 580.95.05 as found"
    ours = plan | {"summary": "NVIDIA H20: driver 580.126.20", "version": "580.126.20"}
    told = preparing.report({"a": {"gpu_driver_plan": ours, "gpu_driver_loaded": "580.126.20"}}, []).splitlines()
    assert told[1] == "    NVIDIA H20: driver 580.126.20"
    assert preparing.report({"a": {"gpu_driver_plan": plan}}, ["a"]).splitlines()[1] == f"    {plan['summary']}"


def test_the_report_of_a_look_tells_what_would_be_done() -> None:
    rows: dict[str, dict[str, Any]] = {"a": {"host_changes": ["write /x"]}, "b": {}, "c": {}}
    assert preparing.report(rows, ["c"], check=True).splitlines() == [
        "a: can be prepared; 1 change to make; no reboot is due",
        "    host: write /x",
        "b: can be prepared; nothing to change; no reboot is due",
        "c: not prepared, see above; nothing to change; no reboot is due",
    ]
