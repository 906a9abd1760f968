"""Real nodes: they boot, answer over SSH with pinned keys, break as they are told to, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_lab import REPOSITORY, RealLab, why_not

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_up_tells_nodes_addresses_and_what_to_try(lab: RealLab) -> None:
    assert re.search(r"2 of 2 node\(s\) switched on in \d+ s\n  node1  198\.1[89]\.\d+\.11  eth0\n", lab.first_up)
    assert f"Try: bin/stepladder deploy -i {lab.inventory}" in lab.first_up


def test_nodes_have_booted_systemd(lab: RealLab) -> None:
    for name in lab.nodes:
        assert lab.ssh(name, "systemctl is-system-running").stdout.strip() == "running"
        assert lab.ssh(name, "readlink /proc/1/exe").stdout.strip().endswith("/systemd")
        assert lab.ssh(name, "systemctl is-active ssh dbus").stdout.split() == ["active", "active"]


def test_ansible_reaches_every_node_by_the_inventory(lab: RealLab) -> None:
    ansible = Path(sys.executable).with_name("ansible")
    done = subprocess.run(
        [ansible, "engines", "-i", lab.inventory, "-m", "ansible.builtin.command", "-a", "hostname", "-o"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("CHANGED") + done.stdout.count("SUCCESS") == 2


def test_a_node_with_another_key_is_refused(lab: RealLab) -> None:
    """The keys were pinned past the network: a node that changes its key is a stranger."""
    lab.ssh("node2", "cp -a /etc/ssh /root/keys; rm /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' "
            "-f /etc/ssh/ssh_host_ed25519_key; systemctl restart ssh")  # fmt: skip
    try:
        refused = lab.ssh("node2", "true", check=False)
        assert refused.returncode == 255
        assert "Host key verification failed" in refused.stderr
    finally:
        container = f"sl-{lab.name}-node2"
        host = json.loads((lab.state / "stepladder/lab/labs" / lab.name / "lab.json").read_text())["host"]
        script = "cp -a /root/keys/. /etc/ssh/ && rm -r /root/keys && systemctl restart ssh"
        subprocess.run(["docker", "--host", host, "exec", container, "sh", "-c", script], check=True, timeout=60)
    lab.ssh("node2", "true")


def test_own_name_leads_to_loopback_as_on_debian(lab: RealLab) -> None:
    assert lab.ssh("node1", "hostname").stdout.strip() == "node1"
    assert lab.ssh("node1", "getent hosts node1").stdout.split()[0] == "127.0.1.1"
    assert "node2" not in lab.ssh("node1", "cat /etc/hosts").stdout
    # a file like any other: programs replace it by rename
    lab.ssh("node1", "cp /etc/hosts /etc/hosts.new && mv /etc/hosts.new /etc/hosts && rm -f /etc/hosts.new")


def test_interfaces_are_called_differently_and_carry_the_addresses(lab: RealLab) -> None:
    nodes = lab.nodes
    assert [nodes[name]["interface"] for name in ("node1", "node2")] == ["eth0", "lan0"]
    for name, node in nodes.items():
        shown = json.loads(lab.ssh(name, "ip -json -4 address").stdout)
        found = {link["ifname"]: link["addr_info"][0]["local"] for link in shown}
        assert found[node["interface"]] == node["address"]
        assert found[node["storage_interface"]] == node["storage_address"]
        assert f"dev {node['interface']}" in lab.ssh(name, "ip route show default").stdout
    assert lab.hears("node1", nodes["node2"]["address"])
    assert lab.hears("node1", nodes["node2"]["storage_address"])


def test_shared_memory_and_settings_are_those_of_a_server(lab: RealLab) -> None:
    assert int(lab.ssh("node1", "df --output=size -B1 /dev/shm | tail -1").stdout) >= 1024**3
    lab.ssh("node1", "sysctl -qw net.core.somaxconn=4000")
    # the machine's own settings are out of a node's reach
    assert lab.ssh("node1", "sysctl -qw vm.swappiness=59", check=False).returncode != 0
    assert lab.ssh("node1", "mkdir /sys/fs/cgroup/systemd/t 2>/dev/null || mkdir /sys/fs/cgroup/t").returncode == 0


def test_packages_come_from_where_the_machine_has_them(lab: RealLab) -> None:
    lab.ssh("node1", "apt-get update -q && apt-get install -y -q --no-install-recommends bc && echo 6*7 | bc")
    lab.ssh("node1", "python3 -m venv /tmp/v && /tmp/v/bin/pip install -q --no-deps six && rm -r /tmp/v")


def test_second_up_does_nothing(lab: RealLab) -> None:
    before = lab.ssh("node1", "cat /proc/sys/kernel/random/boot_id; systemctl show -p ActiveEnterTimestamp ssh").stdout
    started = time.monotonic()
    done = lab.run("up")
    assert "nothing to do, 2 node(s) are on" in done.stdout
    assert time.monotonic() - started < 20
    after = lab.ssh("node1", "cat /proc/sys/kernel/random/boot_id; systemctl show -p ActiveEnterTimestamp ssh").stdout
    assert after == before


def test_what_a_lab_cannot_become_is_refused(lab: RealLab) -> None:
    refused = lab.run("up", "--nodes", "1", "--gpu", "h100", check=False)
    assert refused.returncode == 1
    assert "--gpu h100: its nodes have cpu\n  - --nodes 1: it has 2\n" in refused.stderr


def test_cut_between_two_nodes_and_heal(lab: RealLab) -> None:
    nodes = lab.nodes
    assert lab.run("cut", "node1", "node2").stdout == "node1 is cut from node2\n"
    for address in (nodes["node2"]["address"], nodes["node2"]["storage_address"]):
        assert not lab.hears("node1", address)
    assert not lab.hears("node2", nodes["node1"]["address"])
    assert lab.nodes["node1"]["faults"] == [{"kind": "cut", "node": "node1", "peer": "node2", "settings": {}}]
    assert lab.run("heal", "node2", "node1").stdout == "healed: node1: cut from node2\n"
    assert lab.hears("node1", nodes["node2"]["address"])
    assert lab.run("heal").stdout == "nothing to heal\n"


@pytest.mark.nightly
def test_cut_with_the_controller_outlives_a_reboot(lab: RealLab) -> None:
    lab.run("cut", "node2", "--all")
    refused = lab.ssh("node2", "true", check=False)
    assert refused.returncode == 255
    assert "timed out" in refused.stderr
    lab.run("reboot", "node2")
    assert lab.nodes["node2"]["faults_lost"] is False
    assert lab.ssh("node2", "true", check=False).returncode == 255
    lab.run("heal", "node2")
    lab.ssh("node2", "true")


def test_kill_and_start(lab: RealLab) -> None:
    lab.ssh("node2", "echo kept >/var/lib/kept; echo kept >/root/kept; sync")
    address = lab.address("node2")
    lab.run("kill", "node2")
    assert lab.nodes["node2"]["state"] == "off"
    assert not lab.hears("node1", address)
    again = lab.run("kill", "node2", check=False)
    assert (again.returncode, again.stderr) == (1, "stepladder lab: node2 is off already\n")
    lab.run("start", "node2")
    assert lab.ssh("node2", "cat /var/lib/kept /root/kept").stdout.split() == ["kept", "kept"]
    assert lab.nodes["node2"]["interface"] in lab.ssh("node2", "ip -br link").stdout


def test_reboot_restarts_every_process_and_keeps_the_disk(lab: RealLab) -> None:
    lab.ssh("node1", "echo kept >/var/lib/kept; systemd-run --unit=left sleep 1000")
    assert lab.ssh("node1", "systemctl is-active left").stdout.strip() == "active"
    lab.run("reboot", "node1")
    assert lab.ssh("node1", "systemctl is-active left", check=False).stdout.strip() == "inactive"
    assert lab.ssh("node1", "cat /var/lib/kept").stdout.strip() == "kept"


def test_fill_is_a_real_full_disk_and_spares_the_machine(lab: RealLab) -> None:
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")
    before = os.statvfs(lab.state).f_bavail * os.statvfs(lab.state).f_frsize
    assert "/var on node1 is full" in lab.run("fill", "node1", "/var/lib/stepladder/models").stdout
    full = lab.ssh("node1", "echo x >/var/lib/x", check=False)
    assert full.returncode != 0
    assert "No space left on device" in full.stderr
    assert lab.ssh("node1", "df --output=avail /var | tail -1").stdout.strip() == "0"
    after = os.statvfs(lab.state).f_bavail * os.statvfs(lab.state).f_frsize
    assert before - after < 1024**3
    lab.ssh("node2", "echo x >/var/lib/x")
    assert lab.run("heal", "node1").stdout == "healed: node1: /var is full\n"
    lab.ssh("node1", "echo x >/var/lib/x")
    refused = lab.run("fill", "node1", "/root", check=False)
    assert refused.returncode == 1
    assert "lies on the machine's own disk (/var is the node's own)" in refused.stderr


def test_slow_link_is_slow(lab: RealLab) -> None:
    lab.run("slow", "node2", "--rate", "20mbit")
    lab.ssh("node2", "true")
    started = time.monotonic()
    lab.ssh("node2", "head -c 5000000 /dev/zero")  # 2 s at 20 Mbit/s
    took = time.monotonic() - started
    lab.run("heal", "node2")
    assert 1.5 < took < 15
    started = time.monotonic()
    lab.ssh("node2", "head -c 5000000 /dev/zero")
    assert time.monotonic() - started < took


def test_one_more_node_and_every_node_knows_its_faults(lab: RealLab) -> None:
    lab.run("cut", "node1")
    done = lab.run("up", "--nodes", "3")
    assert "1 of 3 node(s) switched on" in done.stdout
    assert "node3" in (lab.inventory / "hosts.yml").read_text()
    assert not lab.hears("node3", lab.address("node1"))
    assert lab.hears("node3", lab.address("node2"))
    lab.run("heal")
    assert lab.hears("node3", lab.address("node1"))


def test_unknown_node_and_lab_are_told_with_those_there_are(lab: RealLab) -> None:
    wrong = lab.run("kill", "node9", check=False)
    assert wrong.returncode == 1
    assert f"lab '{lab.name}' has no node 'node9'. Nodes: node1, node2" in wrong.stderr
    other = lab._done([sys.executable, "bin/stepladder", "lab", "status", "--name", "nobody"], check=False)
    assert other.returncode == 1
    assert f"there is no lab 'nobody'. Labs: {lab.name} (name one with --name)." in other.stderr


def test_lab_of_gpu_nodes_after_a_crash_of_everything_leaves_nothing(tmp_path: Path) -> None:
    """A lab of its own: its engine is killed with its nodes, as a power cut does; `up` mends, `down` removes all."""
    if reason := why_not():
        pytest.skip(f"no lab on this machine: it lacks {reason}")
    before = leftovers()
    lab = RealLab("crash", tmp_path, tmp_path / "inventory", environ={"XDG_STATE_HOME": str(tmp_path)})
    try:
        lab.run("up", "--nodes", "1", "--gpu", "h20-96", "--inventory", str(lab.inventory))
        assert "NVIDIA H20" in lab.ssh("node1", "nvidia-smi -L").stdout
        assert "stand-ins: nvidia-smi, nvbandwidth, " in lab.run("status").stdout
        record = json.loads((tmp_path / "stepladder/lab/labs/crash/lab.json").read_text())
        if record["own_engine"]:
            crash(Path(record["host"].removeprefix("unix://")).parent)
            assert "its Docker engine too; `lab up` starts it" in lab.run("status", check=False).stderr
            lab.run("up")
            assert "NVIDIA H20" in lab.ssh("node1", "nvidia-smi -L").stdout
    finally:
        lab.run("down")
    assert "nothing to do, there is none" in lab.run("down").stdout
    assert leftovers() == before
    assert list(tmp_path.rglob("*.img")) == []
    assert not lab.inventory.exists()


def crash(run: Path) -> None:
    """Kill a labs' engine and everything that it runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(run).encode() in line and int(path.parent.name) != os.getpid():
            children = Path(f"/proc/{path.parent.name}/task/{path.parent.name}/children").read_text().split()
            for pid in (*children, path.parent.name):
                subprocess.run(["kill", "-9", pid], check=False, capture_output=True)
    time.sleep(1)


def leftovers() -> dict[str, list[str]]:
    """What a lab makes on a machine outside its folders."""
    links = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout)
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    return {
        "bridges": sorted(link["ifname"] for link in links if re.match(r"s[ls][0-9a-f]{8}$", link["ifname"])),
        "rules": sorted(line for line in rules.splitlines() if "stepladder lab" in line),
        "mounts": sorted(
            place
            for place in (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
            if "stepladder" in place and "overlay2" not in place and "/exec/netns/" not in place
        ),
        "sockets": sorted(path.name for path in Path("/run/stepladder-lab").glob("*")),
    }
