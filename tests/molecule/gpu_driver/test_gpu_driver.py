"""What the role gpu_driver leaves on a node; the packages are stand-ins, apt and its keys, pins and holds are real."""

from __future__ import annotations

from testinfra.host import Host

from stepladder.catalogue import Catalogue

VERSION = next(release.version for release in Catalogue().drivers.releases if release.branch == "580")
NEWER = "580.999.01"
NAMES = {
    "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager", "libnvidia-nscq",
}  # fmt: skip


def test_all_parts_are_of_one_version_and_held(host: Host) -> None:
    assert {host.package(name).version for name in NAMES} == {f"{VERSION}-1"}
    held = host.check_output("apt-mark showhold").split()
    assert set(held) >= NAMES


def test_apt_keeps_to_that_version_though_a_newer_one_is_there(host: Host) -> None:
    told = host.check_output("apt-cache policy nvidia-driver-cuda")
    assert f"{NEWER}-1" in told
    assert f"Candidate: {VERSION}-1" in told


def test_the_repository_is_asked_with_its_own_key(host: Host) -> None:
    source = host.file("/etc/apt/sources.list.d/stepladder-nvidia-driver.sources")
    assert "Signed-By: /etc/apt/keyrings/stepladder-nvidia-driver.asc\n" in source.content_string
    assert host.file("/etc/apt/keyrings/stepladder-nvidia-driver.asc").mode == 0o644


def test_services_start_with_the_node_and_wait_for_the_driver(host: Host) -> None:
    for name in ("nvidia-persistenced", "nvidia-fabricmanager"):
        assert host.service(name).is_enabled
        assert not host.service(name).is_running
