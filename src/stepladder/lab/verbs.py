"""The subcommands of `bin/stepladder lab`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stepladder.environment import node_helper
from stepladder.lab import cluster, engine, faults, machine, record, stand_ins
from stepladder.lab.addresses import MOST_NODES
from stepladder.lab.cluster import Cluster, Wish
from stepladder.lab.places import (
    REPOSITORY,
    LabError,
    Places,
    checked_name,
    default_inventory,
    default_name,
    places,
)

LOCK_SECONDS = 600.0


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default=default_name(REPOSITORY), help="of the lab; default: %(default)s")
    main = argparse.ArgumentParser(
        prog="bin/stepladder lab", allow_abbrev=False, description="A cluster of real nodes on this machine."
    )
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    up = verb("up", "make a lab, or what it lacks, and write its inventory")
    up.add_argument("--nodes", type=nodes, default=None, metavar="N", help="how many; default: 2, or those there")
    up.add_argument("--gpu", default=None, metavar="TYPE", help="the GPU type that the nodes pretend to have")
    up.add_argument("--docker", action="store_true", help="nodes have a Docker engine")
    up.add_argument("--second-network", action="store_true", help="nodes have a second network and interface")
    up.add_argument("--cpus", default=None, help="limit of each node, such as 1.5")
    up.add_argument("--memory", default=None, help="limit of each node, such as 8g")
    up.add_argument("--inventory", type=Path, default=None, metavar="DIR", help="where the hosts file goes")
    up.add_argument("--install", action="store_true", help="install what this machine lacks, with apt-get")
    verb("down", "remove everything that the lab made")
    status = verb("status", "what every node is and does, and which faults are in force")
    status.add_argument("--json", action="store_true")
    cut = verb("cut", "drop all traffic between two nodes, or between one and all others")
    cut.add_argument("node")
    cut.add_argument("peer", nargs="?", default="")
    reach = cut.add_mutually_exclusive_group()
    reach.add_argument(
        "--peers-only", action="store_false", dest="all", default=False, help="the controller keeps its SSH (default)"
    )
    reach.add_argument("--all", action="store_true", help="the controller cannot reach the node either")
    heal = verb("heal", "end faults: all, those of a node, or the cut between two")
    heal.add_argument("node", nargs="?", default="")
    heal.add_argument("peer", nargs="?", default="")
    slow = verb("slow", "make a node's links slow, in both directions")
    slow.add_argument("node")
    slow.add_argument("--rate", default="", help="such as 250mbit")
    slow.add_argument("--delay", default="", help="such as 20ms, each way; needs the kernel's netem")
    fill = verb("fill", "fill the file system that holds a path; `heal` frees it")
    fill.add_argument("node")
    fill.add_argument("path")
    for name, text in (
        ("kill", "switch a node off without warning"),
        ("start", "switch a node on"),
        ("reboot", "let systemd restart a node, and wait for it"),
    ):
        verb(name, text).add_argument("node")
    ssh = verb("ssh", "a shell on a node, or a command there")
    ssh.add_argument("node")
    ssh.add_argument("command", nargs=argparse.REMAINDER)
    return main


def nodes(text: str) -> int:
    """A number of nodes.

    Raises:
        argparse.ArgumentTypeError: it is none, or out of bounds.
    """
    if not text.isdigit() or not 1 <= int(text) <= MOST_NODES:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 to {MOST_NODES}")
    return int(text)


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says.

    Raises:
        StepladderError: with what stopped it.
    """
    options = parser().parse_args(arguments)
    checked_name(options.name)
    where = places(os.environ, Path.home())
    if options.verb == "up":
        return _up(options, where)
    if options.verb == "down":
        return _down(options.name, where)
    found = _existing(options.name, where)
    if options.verb == "status":
        return _status(found, options.json)
    if options.verb == "ssh":
        cluster.exec_ssh(found, options.node, options.command)
    with node_helper("watched").exclusive(where.state / "lock", LOCK_SECONDS, _waiting):
        print(_break(_existing(options.name, where), options))
    return 0


def _break(found: Cluster, options: argparse.Namespace) -> str:
    """Bring about what a verb about faults asks for; what happened, in words."""
    node = options.node
    if options.verb in {"cut", "slow"}:
        if options.verb == "cut":
            faults.cut(found, node, options.peer, options.all)
        else:
            faults.slow(found, node, options.rate, options.delay)
        return f"{node} is {faults.told(found.lab.faults[-1])}"
    if options.verb == "fill":
        return faults.fill(found, node, options.path)
    if options.verb == "heal":
        return "\n".join(f"healed: {line}" for line in faults.heal(found, node, options.peer)) or "nothing to heal"
    if options.verb == "start":
        return f"{node} is on" if faults.start(found, node) else f"{node} was on already"
    {"kill": faults.kill, "reboot": faults.reboot}[options.verb](found, node)
    return f"{node} is off" if options.verb == "kill" else f"{node} has rebooted"


def _up(options: argparse.Namespace, where: Places) -> int:
    started = time.monotonic()
    if options.gpu:
        stand_ins.entry(options.gpu)
    found = machine.read_packages(sys.executable)
    machine.require(where, found, engine.find(where) is not None, options.install)
    known = record.load(where.lab(options.name))
    inventory = options.inventory.absolute() if options.inventory else default_inventory(options.name, REPOSITORY)
    wish = Wish(
        nodes=options.nodes or (len(known.nodes) if known and known.nodes else 2),
        inventory=inventory,
        gpu=options.gpu,
        docker=options.docker,
        second_network=options.second_network,
        cpus=options.cpus,
        memory=options.memory,
    )
    with node_helper("watched").exclusive(where.state / "lock", LOCK_SECONDS, _waiting):
        made, count = cluster.up(options.name, wish, where, found, say)
        faults.apply(made, [node.name for node in made.lab.nodes if made.lab.faults])
    total = len(made.lab.nodes)
    if not count:
        print(f"lab '{options.name}': nothing to do, {total} node(s) are on")
    else:
        print(f"lab '{options.name}': {count} of {total} node(s) switched on in {time.monotonic() - started:.0f} s")
    for node in made.lab.nodes:
        print(f"  {node.name}  {node.address}  {node.interface}")
    print(f"Try: bin/stepladder deploy -i {_shown(Path(made.lab.inventory))}")
    return 0


def _down(name: str, where: Places) -> int:
    with node_helper("watched").exclusive(where.state / "lock", LOCK_SECONDS, _waiting):
        lab = record.load(where.lab(name))
        if lab is None:
            cluster.end_idle_engine(where, say)
            print(f"lab '{name}': nothing to do, there is none")
            return 0
        cluster.down(lab, where, say)
    print(f"lab '{name}' is removed")
    return 0


def _status(found: Cluster, as_json: bool) -> int:
    rows = cluster.facts(found)
    lab = found.lab
    for row in rows:
        in_force = [fault for fault in lab.faults if fault.node == row["name"]]
        row["faults"] = [dataclasses.asdict(fault) for fault in in_force]
        row["faults_lost"] = row["state"] == "on" and faults.lost(found, row["name"])
    if as_json:
        print(
            json.dumps(
                {
                    "name": lab.name,
                    "subnet": lab.subnet,
                    "gpu": lab.gpu,
                    "inventory": lab.inventory,
                    "stand_ins": stand_ins.tools(lab.gpu),
                    "nodes": rows,
                },
                indent=2,
            )
        )
        return 0
    print(f"lab '{lab.name}', network {lab.subnet}, engine {lab.host}")
    for row in rows:
        parts = [row["name"], row["address"], row["interface"], row["state"]]
        if row["state"] == "on":
            parts += [row["systemd"], f"load {row['load']:.2f}", f"{row['memory_bytes'] / 1e6:.0f} MB"]
        print("  " + "  ".join(parts))
        for fault in (fault for fault in lab.faults if fault.node == row["name"]):
            print(f"      fault: {faults.told(fault)}")
        if row["faults_lost"]:
            print("      not in force since the node restarted; `lab up` brings it about again")
    if tools := stand_ins.tools(lab.gpu):
        print(f"stand-ins: {', '.join(tools)} replay what {lab.gpu} reports; there is no GPU here")
    return 0


def _existing(name: str, where: Places) -> Cluster:
    lab = record.load(where.lab(name))
    if lab is None:
        others = sorted(folder.name for folder in (where.state / "labs").glob("*"))
        hint = f" Labs: {', '.join(others)} (name one with --name)." if others else ""
        raise LabError(f"there is no lab '{name}'.{hint} `bin/stepladder lab up` makes one")
    docker = cluster.connect(lab, where)
    if docker is None:
        raise LabError(
            f"lab '{name}' is switched off, its Docker engine too; `lab up` starts it, `lab down` removes it"
        )
    return Cluster(lab, where, docker, say)


def _waiting(holder: str) -> None:
    say(f"waiting for {holder}, which is at work on a lab")


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
