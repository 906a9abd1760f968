"""What the role host leaves on a node."""

from __future__ import annotations

from testinfra.host import Host


def test_the_packages_are_there_and_work(host: Host) -> None:
    assert host.package("libnuma1").is_installed
    assert host.package("numactl").is_installed
    assert host.run("numactl --show").rc == 0
