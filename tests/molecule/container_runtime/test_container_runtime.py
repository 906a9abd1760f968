"""What the role container_runtime leaves on a node."""

from __future__ import annotations

import json

from testinfra.host import Host


def test_docker_answers_and_goes_by_what_was_asked_for(host: Host) -> None:
    asked = host.run("docker info --format '{{json .RegistryConfig.Mirrors}} {{.NoProxy}} {{.LiveRestoreEnabled}}'")
    assert asked.rc == 0, asked.stderr
    assert asked.stdout.split() == ['["https://mirror.example/"]', "mirror.example", "true"]
    settings = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert settings["default-shm-size"] == "1g"
    assert settings["max-concurrent-downloads"] == 2


def test_it_starts_with_the_machine_and_trusts_the_sites_registry(host: Host) -> None:
    assert host.service("docker").is_enabled
    assert "BEGIN CERTIFICATE" in host.file("/etc/docker/certs.d/mirror.example/ca.crt").content_string


def test_nobody_reaches_it_but_by_its_own_socket(host: Host) -> None:
    assert not [one for one in host.socket.get_listening_sockets() if ":2375" in one or ":2376" in one]
    assert host.file("/run/docker.sock").mode == 0o660
