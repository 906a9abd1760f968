"""What the role service leaves on a node that runs systemd."""

from __future__ import annotations

from testinfra.host import Host

DEPLOYMENT = "/var/lib/stepladder/deployments/molecule"


def test_the_process_runs_and_starts_with_the_machine(host: Host) -> None:
    unit = host.service("molecule-beat")
    assert unit.is_running
    assert unit.is_enabled
    assert host.socket("tcp://127.0.0.1:8099").is_listening


def test_it_runs_what_the_release_says(host: Host) -> None:
    process = host.process.get(comm="python3", user="root", args="python3 -u -m http.server --bind 127.0.0.1 "
                               "--directory /mnt 8099")  # fmt: skip
    environment = host.file(f"/proc/{process.pid}/environ").content_string.split("\0")
    assert "WORD=a b" in environment
    assert host.file(f"{DEPLOYMENT}/current").linked_to.startswith(f"{DEPLOYMENT}/releases/")
    assert host.file(f"{DEPLOYMENT}/current/beat/env").mode == 0o400


def test_it_is_started_again_when_it_ends(host: Host) -> None:
    before = host.check_output("systemctl show molecule-beat -p Restart -p MainPID")
    assert "Restart=always" in before
