"""What the roles preflight and host leave on a node together."""

from __future__ import annotations

from testinfra.host import Host


def test_the_library_that_the_engine_loads_is_there(host: Host) -> None:
    assert host.package("libnuma1").is_installed
    assert "libnuma.so.1" in host.check_output("ldconfig -p")
