"""What a lab has made, in a file that outlives the process and the machine's uptime: `down` removes just that."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepladder.lab.places import LabError

FORMAT = 1
FILE = "lab.json"


@dataclass
class Node:
    """One node.

    Args:
        name: its hostname and its name in the inventory.
        address: on the lab's network, with the interface that carries it.
        storage_address: on the second network; empty without one.
        disk: the file that holds its /var; empty where the machine has no loop devices.
    """

    name: str
    address: str
    interface: str
    storage_address: str = ""
    storage_interface: str = ""
    disk: str = ""


@dataclass
class Fault:
    """One fault in force: its kind, the node, and what it was asked with."""

    kind: str
    node: str
    peer: str = ""
    settings: dict[str, str] = field(default_factory=dict)


@dataclass
class Lab:
    """One lab.

    Args:
        token: on every object that Docker made for it; told by chance, so that nothing else carries it.
        host: the address of its Docker engine.
        own_engine: whether the lab's own daemon is that engine.
        subnet: of its network; `storage_subnet` of the second one, empty without.
        gpu: the GPU type that the nodes pretend to have; `cpu` for none.
        inventory: the folder where the hosts file was written.
    """

    name: str
    token: str
    host: str
    own_engine: bool
    subnet: str
    storage_subnet: str = ""
    gpu: str = "cpu"
    docker: bool = False
    cpus: str = ""
    memory: str = ""
    image: str = ""
    inventory: str = ""
    nodes: list[Node] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def container(self, node: str) -> str:
        """The name of a node's container."""
        return f"sl-{self.name}-{node}"

    def network(self, storage: bool = False) -> str:
        """The name of one of its networks, as Docker calls it."""
        return f"sl-{self.name}-storage" if storage else f"sl-{self.name}"

    def bridge(self, storage: bool = False) -> str:
        """The name of a network's bridge; Linux allows 15 characters."""
        return f"{'ss' if storage else 'sl'}{self.token[:8]}"

    @property
    def label(self) -> str:
        """The label of everything that Docker made for this lab."""
        return f"stepladder.lab={self.token}"

    def node(self, name: str) -> Node:
        """A node by its name.

        Raises:
            LabError: the lab has none of that name.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"lab '{self.name}' has no node '{name}'. Nodes: {', '.join(n.name for n in self.nodes)}")


def save(lab: Lab, folder: Path) -> None:
    """Write the record, by rename: a reader sees the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{FILE}.{os.getpid()}"
    fresh.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(lab)}, indent=2) + "\n", encoding="utf-8")
    fresh.replace(folder / FILE)


def load(folder: Path) -> Lab | None:
    """The record of a lab, None where there is none.

    Raises:
        LabError: a record that this release cannot read.
    """
    path = folder / FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LabError(f"{path} is not readable ({error}); `docker ps -a` tells what it was about") from None
    if content.pop("format", None) != FORMAT:
        raise LabError(f"{path} was written by another release; end that lab with the release that made it")
    nodes = [Node(**node) for node in content.pop("nodes")]
    faults = [Fault(**fault) for fault in content.pop("faults")]
    return Lab(**content, nodes=nodes, faults=faults)
