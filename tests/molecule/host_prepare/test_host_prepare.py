"""What the role host, as prepare calls it, leaves on a node."""

from __future__ import annotations

from testinfra.host import Host


def test_limits_hold_for_logins_and_for_services(host: Host) -> None:
    assert host.check_output("ulimit -Sn; ulimit -Hn").split() == ["8192", "8192"]
    assert host.check_output("systemctl show -p DefaultLimitNOFILE --value") == "8192"
    assert "memlock" not in host.file("/etc/security/limits.d/60-stepladder-host.conf").content_string


def test_a_kernel_setting_is_set_and_comes_back_with_its_reason(host: Host) -> None:
    assert host.sysctl("net.core.somaxconn") == 4096
    lines = host.file("/etc/sysctl.d/60-stepladder-host.conf").content_string.splitlines()
    assert lines[1:] == [
        "# clients that connect at once are refused beyond the system's 4096 or less", "net.core.somaxconn = 4096",
    ]  # fmt: skip


def test_nothing_else_was_touched(host: Host) -> None:
    assert not host.file("/etc/tmpfiles.d/stepladder-host.conf").exists
    assert not host.file("/etc/stepladder/peers.nft").exists
