"""What the role engine_image leaves on a node."""

from __future__ import annotations

import json

from testinfra.host import Host

NAME = "molecule/stand-in:1"
RECORD = "/var/lib/stepladder/images/molecule_stand-in_1.json"


def test_docker_has_the_image_and_it_was_written_down_which(host: Host) -> None:
    record = json.loads(host.file(RECORD).content_string)
    assert host.check_output(f"docker image inspect --format '{{{{.Id}}}}' {NAME}") == record["id"]
    assert (record["name"], record["from"]) == (NAME, "/var/lib/stepladder/molecule-stand-in.tar")
    assert record["bytes"] > 0


def test_it_holds_what_the_archive_had(host: Host) -> None:
    made = host.check_output(f"docker create --name molecule-look {NAME} x")
    there = host.check_output(f"docker export {made} | tar -t")
    assert "hostname" in there.split()
    host.check_output("docker rm molecule-look")


def test_no_copy_of_a_registry_was_started(host: Host) -> None:
    assert not host.package("docker-registry").is_installed
    assert not host.socket("tcp://127.0.0.1:5055").is_listening
