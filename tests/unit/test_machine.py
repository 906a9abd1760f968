"""What a node is beside its GPUs: recorded texts and small trees in the kernel's layout, read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import machine
from ansible_collections.stepladder.core.plugins.module_utils.machine import Gid, Nic, RdmaPort

GUESTS_CPU = """\
processor	: 0
model name	: Intel(R) Xeon(R) Processor
physical id	: 0
processor	: 1
model name	: Intel(R) Xeon(R) Processor
physical id	: 1
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_cpuinfo() -> None:
    assert machine.parse_cpuinfo(GUESTS_CPU) == ("Intel(R) Xeon(R) Processor", 2)
    assert machine.parse_cpuinfo("Features\t: fp asimd\n") == ("", 1)


def test_numa_nodes(tmp_path: Path) -> None:
    files = {
        "node0/cpulist": "0-47,96-143\n",
        "node0/meminfo": "Node 0 MemTotal:       1056430372 kB\nNode 0 MemFree: 1 kB\n",
        "node10/cpulist": "48-95,144-191\n",
        "has_cpu": "0-1\n",
    }
    assert machine.numa_nodes(tree(tmp_path, files)) == {
        0: {"cpus": "0-47,96-143", "memory_bytes": 1056430372 * 1024},
        10: {"cpus": "48-95,144-191", "memory_bytes": 0},
    }


# cat /proc/self/mountinfo, lines of it; Linux 6.18.44 with Debian 12, and the form of proc(5)
MOUNTS = """\
18 1 254:0 / / rw,relatime - ext4 /dev/root rw
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684084k
40 18 259:3 / /data rw,noatime shared:7 - xfs /dev/nvme0n1p1 rw
41 18 253:0 / /big rw shared:8 - ext4 /dev/mapper/vg-big rw
42 18 0:50 / /nfs rw shared:9 - nfs4 10.0.0.1:/srv rw
43 18 8:1 / /with\\040space rw - ext4 /dev/sda1 rw
44 18 0:60 / /pool rw - btrfs /dev/sdc rw
"""


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A small /sys: an NVMe disk with a partition, a volume over two disks, one of which turns."""
    disks = {"nvme0n1": "0", "sda": "1", "sdb": "0", "sdc": "0"}
    for name, turning in disks.items():
        tree(tmp_path, {f"devices/pci/{name}/queue/rotational": f"{turning}\n"})
        link(tmp_path / "class" / "block" / name, tmp_path / "devices" / "pci" / name)
    tree(tmp_path, {"devices/pci/nvme0n1/nvme0n1p1/partition": "1\n", "devices/pci/sda/sda1/partition": "1\n"})
    for name in ("sda", "sdb"):
        link(tmp_path / "devices/virtual/block/dm-0/slaves" / name, tmp_path / "devices" / "pci" / name)
    for number, device in {
        "259:3": "pci/nvme0n1/nvme0n1p1", "253:0": "virtual/block/dm-0", "8:1": "pci/sda/sda1",
    }.items():  # fmt: skip
        link(tmp_path / "dev" / "block" / number, tmp_path / "devices" / device)
    return tmp_path / "dev" / "block"


STORAGE = {
    "/data/models": ("/data", "nvme0n1", "nvme"),
    "/database": ("/", "/dev/root", "unknown"),
    "/big/x": ("/big", "sda, sdb", "hdd"),
    "/nfs/models": ("/nfs", "10.0.0.1:/srv", "network"),
    "/dev/shm/x": ("/dev/shm", "tmpfs", "memory"),
    "/with space": ("/with space", "sda", "hdd"),
    "/pool": ("/pool", "sdc", "ssd"),
}


@pytest.mark.parametrize(("path", "expected"), STORAGE.items(), ids=STORAGE)
def test_storage(path: str, expected: tuple[str, str, str], blocks: Path) -> None:
    found = machine.storage_of(path, machine.parse_mountinfo(MOUNTS), blocks)
    assert (found.mount, found.device, found.speed) == expected


def test_interfaces(tmp_path: Path) -> None:
    """Values of a ConnectX-7 port at 400 Gbit/s, a bond without a cable, a bridge that tells no speed."""
    net = tmp_path / "class" / "net"
    pci = tree(tmp_path / "devices/pci0000:15/0000:19:00.0", {"numa_node": "0\n"})
    link(pci / "driver", tree(tmp_path / "bus/pci/drivers/mlx5_core", {"x": ""}))
    for name, values in {
        "ens1np0": {"operstate": "up", "speed": "400000", "mtu": "4200"},
        "bond0": {"operstate": "down", "speed": "-1", "mtu": "1500"},
        "docker0": {"operstate": "up", "mtu": "1500"},
        "lo": {"operstate": "unknown", "mtu": "65536"},
    }.items():
        tree(net / name, {key: f"{value}\n" for key, value in values.items()})
    (net / "bonding_masters").write_text("bond0\n")
    link(net / "ens1np0" / "device", pci)
    link(net / "ens1np0" / "master", net / "bond0")
    assert machine.nics(net) == [
        Nic("bond0", False, None, 1500, virtual=True),
        Nic("docker0", True, None, 1500, virtual=True),
        Nic("ens1np0", True, 400000, 4200, "mlx5_core", "0000:19:00.0", 0, False, "bond0"),
    ]


# The GID table of mlx5_6 as `ibv_devinfo -vvv` tells it in Juniper's "AI DC multitenancy" guide, in the layout and with
# the texts of Documentation/ABI/stable/sysfs-class-infiniband.
GIDS = {
    0: ("fe80:0000:0000:0000:a288:c2ff:fe3b:506a", "IB/RoCE v1"),
    1: ("fe80:0000:0000:0000:a288:c2ff:fe3b:506a", "RoCE v2"),
    2: ("0000:0000:0000:0000:0000:ffff:0ac8:010a", "IB/RoCE v1"),
    3: ("0000:0000:0000:0000:0000:ffff:0ac8:010a", "RoCE v2"),
    10: ("0000:0000:0000:0000:0000:0000:0000:0000", ""),
}


def test_rdma(tmp_path: Path) -> None:
    port = "mlx5_6/ports/1"
    files = {
        "mlx5_6/fw_ver": "28.39.1002\n",
        f"{port}/state": "4: ACTIVE\n",
        f"{port}/phys_state": "5: LinkUp\n",
        f"{port}/link_layer": "Ethernet\n",
        f"{port}/rate": "400 Gb/sec (4X NDR)\n",
    }
    for index, (gid, kind) in GIDS.items():
        files |= {f"{port}/gids/{index}": f"{gid}\n", f"{port}/gid_attrs/types/{index}": f"{kind}\n"}
        files[f"{port}/gid_attrs/ndevs/{index}"] = "gpu6_eth\n"
    [found] = machine.rdma_ports(tree(tmp_path, files))
    assert (found.device, found.state, found.physical, found.link, found.rate_gbit, found.firmware) == (
        "mlx5_6", "ACTIVE", "LinkUp", "Ethernet", 400.0, "28.39.1002",
    )  # fmt: skip
    assert [gid.index for gid in found.gids] == [0, 1, 2, 3]
    assert found.gids[3] == Gid(3, GIDS[3][0], "RoCE v2", "gpu6_eth", "10.200.1.10")
    assert found.gids[1].address == ""


def test_no_rdma(tmp_path: Path) -> None:
    assert machine.rdma_ports(tmp_path / "infiniband") == []
    assert RdmaPort("a", 1, "", "", "", None).gids == ()


# `docker info --format '{{json .}}'`, keys that are read: client 28.2.2 without an engine; with engine 20.10.24 of
# Debian 12; and as clients before 23 told of an engine that does not answer (docs of the field ServerErrors).
ENGINE_OFF = '{"ID":"","ServerVersion":"","Driver":"","Runtimes":null,"DockerRootDir":""}'
ENGINE_ON = (
    '{"ServerVersion":"20.10.24+dfsg1","Driver":"overlay2","DockerRootDir":"/var/lib/docker","Runtimes":'
    '{"io.containerd.runc.v2":{"path":"runc"},"runc":{"path":"runc"}},"DiscoveredDevices":null}'
)
ERRORS = '{"ServerVersion":"","ServerErrors":["Cannot connect to the Docker daemon"]}'


def test_docker() -> None:
    assert machine.parse_docker(ENGINE_OFF).problem == "docker info names no engine"
    assert machine.parse_docker(ERRORS).problem == "Cannot connect to the Docker daemon"
    assert machine.parse_docker("permission denied").problem == "docker info says: permission denied"
    found = machine.parse_docker(ENGINE_ON)
    assert (found.version, found.root, found.runtimes, found.problem) == (
        "20.10.24+dfsg1", "/var/lib/docker", ("io.containerd.runc.v2", "runc"), "",
    )  # fmt: skip


def test_devices_by_cdi() -> None:
    """As Docker 28.3 tells them (API 1.51, SystemInfo), and `nvidia-ctk cdi list` of toolkit 1.17.8."""
    on = machine.parse_docker(
        '{"ServerVersion":"28.3.0","CDISpecDirs":["/etc/cdi","/var/run/cdi"],"DiscoveredDevices":'
        '[{"Source":"cdi","ID":"nvidia.com/gpu=all"},{"Source":"cdi","ID":"nvidia.com/gpu=0"}]}'
    )
    assert on.cdi_folders == ("/etc/cdi", "/var/run/cdi")
    assert on.cdi == ("nvidia.com/gpu=0", "nvidia.com/gpu=all")
    assert machine.parse_docker(ENGINE_ON).cdi_folders == ()
    listed = 'time="x" level=info msg="Found 2 CDI devices"\nnvidia.com/gpu=0\nnvidia.com/gpu=all\n'
    assert machine.parse_cdi(listed) == on.cdi


def test_toolkit() -> None:
    assert machine.parse_toolkit("NVIDIA Container Toolkit CLI version 1.17.8\ncommit: f202b80a\n") == "1.17.8"
    assert machine.parse_toolkit("") == ""


def test_a_resolver_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading  # noqa: PLC0415 - needed here only

    forever = threading.Event()
    monkeypatch.setattr(machine, "RESOLVE_SECONDS", 0.2)
    monkeypatch.setattr(machine.socket, "getaddrinfo", lambda *_, **__: [str(forever.wait(5))][:0])
    found = machine.own_name()
    forever.set()
    assert (found["problem"], found["addresses"]) == ("no answer within 0.2 s", [])


def test_this_machine() -> None:
    found = machine.read(["/"], Path("/proc"))
    assert found.own_name["name"] == socket.gethostname()
    assert found.storage[0].mount == "/"
    assert found.clock.synchronised in {True, False}
    assert found.sockets >= 1
