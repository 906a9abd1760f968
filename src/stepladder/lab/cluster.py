"""Nodes: containers that boot systemd and sshd, each with an address, a disk and keys of its own."""

from __future__ import annotations

import concurrent.futures
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepladder.lab import addresses, disk, engine, image, inventory, machine, record, stand_ins
from stepladder.lab.engine import Engine, Say, run
from stepladder.lab.machine import Packages
from stepladder.lab.places import REPOSITORY, LabError, Places
from stepladder.lab.record import Lab, Node

BOOT = "/sbin/stepladder-lab-boot"
BOOT_SECONDS = 90.0
SSH_SECONDS = 30.0
SHARED_MEMORY = "1g"


@dataclass(frozen=True)
class Wish:
    """What `up` was asked for; None for what was left to the lab that is there, or to the default."""

    nodes: int
    inventory: Path
    gpu: str | None = None
    docker: bool = False
    second_network: bool = False
    cpus: str | None = None
    memory: str | None = None


# A node has no business with the machine's modules, clock and memory.
WITHHELD = ("SYS_MODULE", "SYS_RAWIO", "SYS_TIME")


def create_command(lab: Lab, node: Node, lacking: Iterable[str], folders: Iterable[str]) -> list[str]:
    """The arguments of `docker create` for a node.

    Not `--privileged`: with it systemd would find the machine's consoles and devices, and not every machine can.

    Args:
        lab: that it belongs to.
        node: with its address and disk.
        lacking: capabilities that the machine itself has not.
        folders: of the machine, which the node sees read-only at the same place.
    """
    arguments = [
        "create", "--name", lab.container(node.name), "--hostname", node.name, "--label", lab.label,
        "--network", lab.network(), "--ip", node.address, "--cap-add", "ALL",
        *(part for name in dict.fromkeys((*WITHHELD, *lacking)) for part in ("--cap-drop", name)),
        "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined", "--cgroupns", "private",
        "--tmpfs", "/run:exec,mode=755", "--tmpfs", "/run/lock", "--shm-size", SHARED_MEMORY,
        "--stop-signal", "SIGRTMIN+3", "--stop-timeout", "20", "--restart", "unless-stopped",
        "--env", "container=docker", "--log-opt", "max-size=1m",
        *(part for folder in folders for part in ("--volume", f"{folder}:{folder}:ro")),
    ]  # fmt: skip
    if node.disk:
        arguments += ["--mount", f"type=bind,source={disk.var(Path(node.disk))},target=/var"]
    if lab.cpus:
        arguments += ["--cpus", lab.cpus]
    if lab.memory:
        arguments += ["--memory", lab.memory]
    return [*arguments, lab.image, BOOT]


def settings_files(node: Node, key: str) -> dict[str, tuple[bytes, int]]:
    """The files that make a container this node: path to content and mode."""
    interfaces = f"{node.address} {node.interface}\n"
    if node.storage_address:
        interfaces += f"{node.storage_address} {node.storage_interface}\n"
    # Debian's installer writes the own name beside 127.0.1.1: peers that are told the name get a loopback address.
    hosts = f"127.0.0.1\tlocalhost\n127.0.1.1\t{node.name}\n\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    return {
        "/etc/stepladder-lab/hosts": (hosts.encode(), 0o644),
        "/etc/stepladder-lab/hostname": (f"{node.name}\n".encode(), 0o644),
        "/etc/stepladder-lab/interfaces": (interfaces.encode(), 0o644),
        "/root/.ssh/authorized_keys": (key.encode(), 0o600),
    }


class Cluster:
    """One lab and the engine that it runs on.

    Args:
        lab: its record.
        places: the folders of all labs.
        docker: its engine.
        say: where a line of progress goes.
    """

    def __init__(self, lab: Lab, places: Places, docker: Engine, say: Say) -> None:
        self.lab = lab
        self.places = places
        self.docker = docker
        self.say = say
        self.folder = places.lab(lab.name)
        self.sockets = places.sockets(lab.token)

    def save(self) -> None:
        """Write the record."""
        record.save(self.lab, self.folder)

    def state(self, node: str) -> dict[str, Any]:
        """Docker's own words about a node's container; empty where there is none."""
        try:
            found = json.loads(self.docker.call("inspect", "--type", "container", self.lab.container(node)))[0]
        except LabError:
            return {}
        return dict(found["State"]) if found["Config"]["Labels"].get("stepladder.lab") == self.lab.token else {}

    def running(self, node: str) -> bool:
        """Whether a node is switched on."""
        return bool(self.state(node).get("Running"))

    def inside(self, node: str, *arguments: str, seconds: float = engine.CALL_SECONDS) -> str:
        """What a program prints that runs on a node, not by way of SSH."""
        return self.docker.inside(self.lab.container(node), *arguments, seconds=seconds)

    def machine_end(self, name: str, interface: str) -> int:
        """The index of the machine's end of a node's interface."""
        return int(self.inside(name, "cat", f"/sys/class/net/{interface}/iflink"))

    def sweep(self) -> None:
        """Delete wires of nodes that are gone.

        A connection that could not say goodbye, as behind a cut, keeps a dead node's network alive for minutes, and
        with it the node's address. Docker does not find the interface that we gave another name.
        """
        links = json.loads(run(["ip", "-json", "link"]))
        bridges = {self.lab.bridge(), self.lab.bridge(storage=True)}
        wires = {link["ifindex"]: link["ifname"] for link in links if link.get("master") in bridges}
        for node in self.lab.nodes:
            if self.running(node.name):
                for interface in filter(None, (node.interface, node.storage_interface)):
                    wires.pop(self.machine_end(node.name, interface), None)
        for name in wires.values():
            succeeds(["ip", "link", "delete", name])  # it may have gone by itself

    # Networks

    def make_networks(self) -> None:
        """Make the lab's networks, and let its nodes out where the engine leaves that to the lab."""
        for storage, subnet in ((False, self.lab.subnet), (True, self.lab.storage_subnet)):
            if not subnet:
                continue
            name, bridge = self.lab.network(storage), self.lab.bridge(storage)
            if not self.docker.call("network", "ls", "--quiet", "--filter", f"name=^{name}$"):
                self.docker.call(
                    "network", "create", "--driver", "bridge", "--label", self.lab.label, "--subnet", subnet,
                    "--gateway", addresses.gateway(subnet),
                    "--opt", f"com.docker.network.bridge.name={bridge}", name,
                )  # fmt: skip
            if self.docker.own:
                for rule in machine_rules(bridge, subnet):
                    if not succeeds(rule_command("-C", rule)):
                        run(rule_command("-I", rule))
                forward = Path("/proc/sys/net/ipv4/ip_forward")
                if forward.read_text().strip() != "1":
                    self.say("switching on net.ipv4.ip_forward, which lets nodes reach other networks")
                    forward.write_text("1\n")

    def remove_networks(self) -> None:
        """Remove the lab's networks and firewall rules."""
        for storage, subnet in ((False, self.lab.subnet), (True, self.lab.storage_subnet)):
            if subnet and self.docker.own:
                for rule in machine_rules(self.lab.bridge(storage), subnet):
                    while succeeds(rule_command("-C", rule)):
                        run(rule_command("-D", rule))
        for network in self.docker.call("network", "ls", "--quiet", "--filter", f"label={self.lab.label}").split():
            self.docker.call("network", "rm", network)

    # Nodes

    def make_node(self, node: Node, archive: Path, found: Packages) -> None:
        """Make a node's container, switched off."""
        if node.disk and not Path(node.disk).exists():
            disk.make(Path(node.disk), archive)
        lacking = machine.missing_capabilities(Path("/proc/self/status").read_text())
        container = self.lab.container(node.name)
        self.docker.call(*create_command(self.lab, node, lacking, found.folders))
        if node.storage_address:
            self.docker.call("network", "connect", "--ip", node.storage_address, self.lab.network(True), container)
        key = (self.folder / "key.pub").read_text()
        files = {**machine.node_files(found), **settings_files(node, key), **stand_ins.files(self.lab.gpu, node.name)}
        self.docker.call("cp", "-", f"{container}:/", data=machine.archive(files))

    def start(self, names: list[str]) -> None:
        """Switch nodes on and wait until they answer over SSH.

        Raises:
            LabError: one did not boot or answer in time; with what it says about itself.
        """
        mount_disks(self.lab)
        with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(self._boot, names))
        self.sweep()

    def _boot(self, name: str) -> None:
        started = time.monotonic()
        self.docker.call("start", self.lab.container(name))
        self.wait_booted(name)
        self.say(f"  {name} has booted after {time.monotonic() - started:.1f} s")

    def wait_booted(self, name: str) -> None:
        """Wait until systemd on a node has started everything; a unit that failed is told, not hidden.

        Raises:
            LabError: it did not in time; with its last words.
        """
        deadline = time.monotonic() + BOOT_SECONDS
        said = ""
        while time.monotonic() < deadline:
            if not self.running(name):
                logs = self.docker.call("logs", "--tail", "15", self.lab.container(name))
                raise LabError(f"{name} went down while it booted. Its last words:\n{logs or '  (none)'}")
            done = subprocess.run(
                self.docker.command("exec", self.lab.container(name), "systemctl", "is-system-running"),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=engine.CALL_SECONDS,
            )  # fmt: skip
            said = done.stdout.strip() or done.stderr.strip()
            if said == "running":
                return
            if said == "degraded":
                failed = self.inside(name, "systemctl", "--failed", "--no-legend", "--plain")
                self.say(f"  {name} is degraded; units that failed:\n    " + failed.replace("\n", "\n    "))
                return
            time.sleep(0.1)
        jobs = self.inside(name, "systemctl", "list-jobs", "--no-legend")
        raise LabError(f"{name} has not booted within {BOOT_SECONDS:.0f} s: systemd says '{said}'. Its jobs:\n{jobs}")

    def pin_keys(self) -> None:
        """Write the lab's known_hosts from the host keys that lie on the nodes, read past the network."""
        lines = []
        for node in self.lab.nodes:
            key = self.inside(node.name, "cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()
            lines.append(f"{node.address} {key[0]} {key[1]}\n")
        (self.folder / "known_hosts").write_text("".join(lines))

    def wait_ssh(self, names: Iterable[str]) -> None:
        """Wait until nodes answer over SSH with the pinned keys.

        Raises:
            LabError: one did not in time; with SSH's own message.
        """
        for name in names:
            deadline = time.monotonic() + SSH_SECONDS
            while True:
                command = [*self.ssh_command(self.lab.node(name)), "true"]
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
                )
                if done.returncode == 0:
                    break
                if time.monotonic() > deadline:
                    raise LabError(f"{name} does not answer over SSH after {SSH_SECONDS:.0f} s: {done.stderr.strip()}")
                time.sleep(0.2)

    def ssh_command(self, node: Node) -> list[str]:
        """The argument list of SSH to a node, without a command."""
        return [
            "ssh", "-i", str(self.folder / "key"), *inventory.ssh_options(self.folder), "-o", "ConnectTimeout=10",
            f"root@{node.address}",
        ]  # fmt: skip

    def write_inventory(self) -> None:
        """Write the inventory."""
        group, variables = inventory.gpu_group(self.lab.gpu, REPOSITORY / "group_vars")
        content = inventory.text(self.lab, self.folder, self.sockets, group, variables)
        committed = REPOSITORY / "inventories" / "lab" / "group_vars"
        inventory.write(Path(self.lab.inventory), content, self.lab, committed)

    def remove(self) -> None:
        """Remove everything that the lab made; whatever is gone already is passed over."""
        found = self.docker.call("ps", "--all", "--quiet", "--filter", f"label={self.lab.label}").split()
        if found:
            self.say(f"removing {len(found)} node(s)")
            self.docker.call("rm", "--force", "--volumes", *found)
        self.remove_networks()

    def remove_files(self) -> None:
        """Remove the lab's disks, keys, inventory and record."""
        for node in self.lab.nodes:
            if node.disk:
                disk.remove(Path(node.disk))
        if self.lab.inventory:
            inventory.remove(Path(self.lab.inventory), self.lab)
        shutil.rmtree(self.sockets, ignore_errors=True)
        shutil.rmtree(self.folder)


def machine_rules(bridge: str, subnet: str) -> list[list[str]]:
    """The firewall rules of the machine that let a lab's nodes reach each other and other networks."""
    mark = ["-m", "comment", "--comment", f"stepladder lab {bridge}"]
    return [
        ["-t", "nat", "POSTROUTING", "-s", subnet, "!", "-o", bridge, *mark, "-j", "MASQUERADE"],
        ["-t", "filter", "FORWARD", "-i", bridge, *mark, "-j", "ACCEPT"],
        ["-t", "filter", "FORWARD", "-o", bridge, *mark, "-j", "ACCEPT"],
    ]


def rule_command(action: str, rule: list[str]) -> list[str]:
    """The iptables command that checks, inserts or deletes a rule of `machine_rules`."""
    return ["iptables", "-w", "10", *rule[:2], action, *rule[2:]]


def succeeds(argv: list[str]) -> bool:
    """Whether a command ends with 0."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def taken_subnets(places: Places) -> list[str]:
    """What a lab's subnet must not overlap with: the machine's routes and addresses, and other labs' subnets."""
    routes = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]) or "[]")
    taken = [str(route["dst"]) for route in routes]
    for folder in (places.state / "labs").glob("*"):
        other = record.load(folder)
        taken += [subnet for subnet in (other.subnet, other.storage_subnet) if subnet] if other else []
    return taken


def new_lab(name: str, wish: Wish, docker: Engine, places: Places) -> Lab:
    """The record of a lab that is not there yet."""
    subnets = addresses.free_subnets(taken_subnets(places), 2 if wish.second_network else 1)
    return Lab(
        name=name, token=secrets.token_hex(8), host=docker.host, own_engine=docker.own, subnet=subnets[0],
        storage_subnet=subnets[1] if wish.second_network else "", gpu=wish.gpu or "cpu", docker=wish.docker,
        cpus=wish.cpus or "", memory=wish.memory or "", inventory=str(wish.inventory),
    )  # fmt: skip


def new_node(lab: Lab, number: int, folder: Path) -> Node:
    """The node with that number."""
    return Node(
        name=f"node{number}",
        address=addresses.address(lab.subnet, number),
        interface=addresses.interface(number),
        storage_address=addresses.address(lab.storage_subnet, number) if lab.storage_subnet else "",
        storage_interface=addresses.interface(number, storage=True) if lab.storage_subnet else "",
        disk=str(folder / "disks" / f"node{number}.img") if disk.possible() else "",
    )


def make_key(folder: Path) -> None:
    """Make the lab's own key pair, if it is not there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / "key").exists():
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "stepladder-lab", "-f", str(folder / "key")])


def different(lab: Lab, wish: Wish) -> list[str]:
    """What was asked for that a lab which is there cannot become."""
    told = []
    for name, wanted, found in (
        ("--gpu", wish.gpu, lab.gpu),
        ("--cpus", wish.cpus, lab.cpus),
        ("--memory", wish.memory, lab.memory),
    ):
        if wanted is not None and wanted != found:
            told.append(f"{name} {wanted}: its nodes have {found or 'no limit'}")
    if wish.docker and not lab.docker:
        told.append("--docker: its nodes have no Docker engine")
    if wish.second_network and not lab.storage_subnet:
        told.append("--second-network: its nodes have one network")
    if wish.nodes < len(lab.nodes):
        told.append(f"--nodes {wish.nodes}: it has {len(lab.nodes)}")
    return told


def up(name: str, wish: Wish, places: Places, found: Packages, say: Say) -> tuple[Cluster, int]:
    """Make what a lab lacks: engine, image, networks, nodes; switch on what is off.

    Returns: the cluster, and how many nodes were made or switched on.

    Raises:
        LabError: what could not be made; what was made stays recorded, for the next `up` or `down`.
    """
    folder = places.lab(name)
    lab = record.load(folder)
    if lab and (told := different(lab, wish)):
        lines = "".join(f"  - {line}\n" for line in told)
        raise LabError(
            f"lab '{name}' is there and cannot become what was asked for:\n{lines}`lab down` first, or another --name"
        )
    archive = image.ensure_archive(found, lab.docker if lab else wish.docker, places, say)
    docker = connect(lab, places) or start_engine(places, say)
    if lab is None:
        lab = new_lab(name, wish, docker, places)
    cluster = Cluster(lab, places, docker, say)
    make_key(folder)
    cluster.save()
    name_of_image = image.ensure_image(docker, archive, say)
    if lab.image != name_of_image:
        lab.image = name_of_image
        cluster.save()
    cluster.make_networks()
    for number in range(len(lab.nodes) + 1, wish.nodes + 1):
        lab.nodes.append(new_node(lab, number, folder))
    cluster.save()
    made = [node for node in lab.nodes if not cluster.state(node.name)]
    if made:
        say(f"making {', '.join(node.name for node in made)}")
    for node in made:
        cluster.make_node(node, archive, found)
    started = [node.name for node in lab.nodes if not cluster.running(node.name)]
    cluster.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
    if started:
        cluster.start(started)
        cluster.pin_keys()
        cluster.wait_ssh(started)
    cluster.write_inventory()
    return cluster, len(started)


def connect(lab: Lab | None, places: Places) -> Engine | None:
    """The engine of a lab, or any that answers for a new one; None where the labs' own is to be started.

    Raises:
        LabError: the lab was made on the machine's own engine, and that one does not answer.
    """
    if lab is None:
        return engine.find(places)
    docker = Engine(lab.host, lab.own_engine)
    if docker.answers():
        return docker
    if lab.own_engine:
        return None
    raise LabError(f"the Docker engine at {lab.host}, on which lab '{lab.name}' was made, does not answer; start it")


def down(lab: Lab, places: Places, say: Say) -> None:
    """Remove a lab, and the labs' own engine with the last one on it."""
    docker = connect(lab, places) or start_engine(places, say)
    cluster = Cluster(lab, places, docker, say)
    cluster.remove()
    cluster.remove_files()
    end_idle_engine(places, say)


def labs_on_own_engine(places: Places) -> list[Lab]:
    """The labs that need the labs' own engine."""
    found = [record.load(folder) for folder in sorted((places.state / "labs").glob("*"))]
    return [lab for lab in found if lab and lab.own_engine]


def start_engine(places: Places, say: Say) -> Engine:
    """Start the labs' own engine, which switches on the nodes that were on: their disks first."""
    for lab in labs_on_own_engine(places):
        mount_disks(lab)
    return engine.start(places, say)


def end_idle_engine(places: Places, say: Say) -> None:
    """End the labs' own engine if no lab needs it, as after the last one or an `up` that failed early."""
    if not labs_on_own_engine(places):
        engine.stop(places, say)
        engine.remove(places)


def mount_disks(lab: Lab) -> None:
    """Mount the disks of a lab's nodes, those that are made."""
    for node in lab.nodes:
        if node.disk and Path(node.disk).exists():
            disk.mount(Path(node.disk))


def facts(cluster: Cluster) -> list[dict[str, Any]]:
    """What every node says about itself."""
    rows = []
    for node in cluster.lab.nodes:
        state = cluster.state(node.name)
        row: dict[str, Any] = {"name": node.name, "address": node.address, "interface": node.interface}
        if node.storage_address:
            row |= {"storage_address": node.storage_address, "storage_interface": node.storage_interface}
        row["state"] = "missing" if not state else "on" if state["Running"] else "off"
        if row["state"] == "on":
            script = (
                "systemctl is-system-running; cut -d' ' -f1 /proc/loadavg; "
                "cat /sys/fs/cgroup/memory.current 2>/dev/null || cat /sys/fs/cgroup/memory/memory.usage_in_bytes"
            )
            systemd, load, memory = cluster.inside(node.name, "sh", "-c", script).split()
            row |= {"systemd": systemd, "load": float(load), "memory_bytes": int(memory)}
        rows.append(row)
    return rows


def exec_ssh(cluster: Cluster, name: str, command: list[str]) -> None:
    """Become SSH to a node."""
    argv = [*cluster.ssh_command(cluster.lab.node(name)), *command]
    os.execvp(argv[0], argv)  # noqa: S606 - no shell is the point
