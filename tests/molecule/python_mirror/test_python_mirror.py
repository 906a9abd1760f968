"""What the role python_mirror leaves on a node."""

from __future__ import annotations

import configparser
import tomllib

from testinfra.host import Host


def test_pip_and_uv_ask_the_sites_own_index_too(host: Host) -> None:
    pip = configparser.ConfigParser()
    pip.read_string(host.file("/etc/pip.conf").content_string)
    assert pip["global"]["index-url"] == "https://mirror.example/simple"
    assert pip["global"]["extra-index-url"].split() == ["https://own.example/simple"]
    indexes = tomllib.loads(host.file("/etc/uv/uv.toml").content_string)["index"]
    assert [one["url"] for one in indexes] == ["https://own.example/simple", "https://mirror.example/simple"]


def test_nobody_but_root_reads_the_password(host: Host) -> None:
    assert host.file("/root/.netrc").mode == 0o600
    assert "machine own.example login reader password stand-in\n" in host.file("/root/.netrc").content_string
    assert host.run("grep -rl stand-in /etc/pip.conf /etc/uv").stdout == ""


def test_what_the_node_had_is_kept_beside(host: Host) -> None:
    """The lab gives its nodes a pip.conf; the scenario's clean-up puts it back."""
    assert len(host.run("ls /etc/pip.conf.*~").stdout.split()) <= 1
