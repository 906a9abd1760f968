"""What the role preflight leaves on a node: nothing."""

from __future__ import annotations

from testinfra.host import Host


def test_it_makes_none_of_the_toolkits_folders(host: Host) -> None:
    assert not host.file("/var/lib/stepladder/deployments").exists
    assert not host.file("/var/lib/stepladder/venvs").exists


def test_it_leaves_no_process_behind(host: Host) -> None:
    assert not [one for one in host.process.filter(user="root") if "AnsiballZ" in one.args]
