"""What goes before the site's package indexes: files of a user's own and variables, held against pip itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import index_overrides

from stepladder import preparing, python_sources

SITE = {
    "index_url": "https://mirror.example/simple",
    "extra_index_urls": ["https://own.example/simple"],
    "trusted_hosts": ["own.example"],
}
PIP, UV = python_sources.pip_conf(SITE), python_sources.uv_toml(SITE)
OTHER = "https://me:hunter2@other.example/simple"

FOUND = {
    "nothing": ({}, {}, []),
    "a user's pip.conf": (
        {".config/pip/pip.conf": f"[global]\nindex-url = {OTHER}\ntimeout = 5\n"}, {},
        ["HOME/.config/pip/pip.conf sets index-url, which goes before /etc/pip.conf: take it out there"],
    ),
    "the older place of it, several options, as pip spells them too": (
        {".pip/pip.conf": f"[install]\nindex_url = {OTHER}\ntrusted-host =\n    other\n    own.example\n"}, {},
        ["HOME/.pip/pip.conf sets index-url, trusted-host, which go before /etc/pip.conf: take them out there"],
    ),
    "the same as ours": (
        {".config/pip/pip.conf": PIP, ".config/uv/uv.toml": UV}, {"PIP_INDEX_URL": SITE["index_url"]}, [],
    ),
    "one that has other options only": (
        {".config/pip/pip.conf": "[global]\ntimeout = 5\n[list]\nformat = json\n"}, {}, [],
    ),
    "indexes are switched off": (
        {".config/pip/pip.conf": "[global]\nno-index = true\n"}, {},
        ["HOME/.config/pip/pip.conf sets no-index, which goes before /etc/pip.conf: take it out there"],
    ),
    "one that pip cannot read": (
        {".config/pip/pip.conf": "index-url = x\n"}, {},
        ["pip cannot read HOME/.config/pip/pip.conf, and installs nothing until it is mended or removed"],
    ),
    "a user's uv.toml": (
        {".config/uv/uv.toml": f'[[index]]\nname = "x"\nurl = "{OTHER}"\n\n[pip]\nfind-links = ["/w"]\n'}, {},
        ["HOME/.config/uv/uv.toml sets index, find-links, which go before /etc/uv/uv.toml: take them out there"],
    ),
    "uv's settings of other things": (
        {".config/uv/uv.toml": 'cache-dir = "/c"\n[tool.x]\nindex-url = "https://x"\n[[index]]\n'
                               'url = "https://mirror.example/simple"\n'}, {}, [],
    ),
    "variables for all": (
        {"/etc/environment": f'# site\nPIP_INDEX_URL="{OTHER}"\nexport UV_INDEX_URL={OTHER}\nPATH=/bin\n'},
        {"PIP_INDEX_URL": OTHER, "UV_INDEX_URL": OTHER},
        ["/etc/environment sets PIP_INDEX_URL, which goes before /etc/pip.conf: take it out there",
         "/etc/environment sets UV_INDEX_URL, which goes before /etc/uv/uv.toml: take it out there"],
    ),
    "variables of this user": (
        {}, {"PIP_EXTRA_INDEX_URL": OTHER, "PIP_CONFIG_FILE": "/dev/null", "PIP_TIMEOUT": "5", "UV_INDEX": ""},
        ["the environment of logins sets PIP_EXTRA_INDEX_URL, PIP_CONFIG_FILE, which go before /etc/pip.conf: take "
         "them out there"],
    ),
    "another folder of settings": (
        {"elsewhere/pip/pip.conf": f"[global]\nindex-url = {OTHER}\n", ".config/pip/pip.conf": "[global]\nno-index=1"},
        {"XDG_CONFIG_HOME": "HOME/elsewhere"},
        ["HOME/elsewhere/pip/pip.conf sets index-url, which goes before /etc/pip.conf: take it out there"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "environ", "expected"), FOUND.values(), ids=FOUND)
def test_what_goes_before_the_sites_indexes(
    files: dict[str, str], environ: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for path, text in files.items():
        place = tmp_path / path[1:] if path.startswith("/") else home / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    given = {name: value.replace("HOME", str(home)) for name, value in environ.items()}
    found = [line.replace(str(home), "HOME") for line in index_overrides.overrides(PIP, UV, home, given, tmp_path)]
    assert found == expected
    assert "hunter2" not in str(found)
    assert index_overrides.overrides("", "", home, given, tmp_path) == []


@pytest.mark.parametrize("place", [".pip/pip.conf", ".config/pip/pip.conf", "PIP_INDEX_URL"])
def test_pip_itself_goes_by_the_place_that_is_named(place: str, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    if place.startswith("PIP"):
        environ[place] = "https://other.example/simple"
    else:
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("[global]\nindex-url = https://other.example/simple\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url" if "/" in place else ":env:.index-url"],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "https://other.example/simple"
    (line,) = index_overrides.overrides(PIP, UV, tmp_path, environ, tmp_path)
    assert place in line


def test_the_report_names_them() -> None:
    line = "/root/.config/pip/pip.conf sets index-url, which goes before /etc/pip.conf: take it out there"
    assert preparing.report({"a": {"python_mirror_overrides": [line]}}, []).splitlines() == [
        "a: prepared; nothing changed; no reboot is due",
        f"    not in force: {line}",
    ]
