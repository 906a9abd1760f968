#!/usr/bin/env python3
"""What a deployment over nodes costs, on a lab of its own: two nodes by phase, and how a rerun grows with the fleet.

    python3 tests/bench/fleet.py two              # vLLM over Ray on two nodes: seconds by phase, warm package caches
    python3 tests/bench/fleet.py rerun 2 8 16     # a replica a node; a deploy that changes nothing, beside a plain ssh

`rerun` serves with Transformers, the smallest of the engines: what a deploy costs that changes nothing does not depend
on it. Beside each stands `ssh NODE true` on all nodes at once, each over a connection of its own. Medians of `--runs`,
both sides in turn. Needs what a lab needs (docs/lab.md) and 1.5 GB of disk and 1 GB of memory for a node.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from local_deploy import timed_phases

REPOSITORY = Path(__file__).resolve().parents[2]
# What a node takes with its engine, at most.
NODE_BYTES = 1_000_000_000


class Fleet:
    """A lab in folders of its own."""

    def __init__(self, scratch: Path) -> None:
        self.inventory = scratch / "inventory"
        self.environ = {**os.environ, "XDG_STATE_HOME": str(scratch / "state")}

    def run(self, *arguments: str) -> str:
        """A verb that has to succeed; what it printed."""
        done = subprocess.run(
            [sys.executable, "bin/stepladder", *arguments], cwd=REPOSITORY, env=self.environ,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        return done.stdout

    def up(self, nodes: int) -> None:
        """Have so many nodes."""
        self.run("lab", "up", "--name", "bench", "--nodes", str(nodes), "--inventory", str(self.inventory))

    def down(self) -> None:
        """Remove the lab."""
        self.run("lab", "down", "--name", "bench")

    def knock(self) -> None:
        """`ssh NODE true` on all nodes at once, as the inventory connects, over no connection that is open already."""
        listed = subprocess.run(
            [REPOSITORY / ".venv/bin/ansible-inventory", "-i", self.inventory, "--list"],
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
        commands = [
            ["ssh", "-i", host["ansible_ssh_private_key_file"], *shlex.split(host["ansible_ssh_common_args"]),
             "-o", "ControlPath=none", f"{host['ansible_user']}@{host['ansible_host']}", "true"]
            for host in json.loads(listed.stdout)["_meta"]["hostvars"].values()
            if "ansible_ssh_private_key_file" in host
        ]  # fmt: skip
        start = time.monotonic()
        running = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
        if any(process.wait() for process in running):
            sys.exit("a node does not answer over ssh")
        self.knocked = time.monotonic() - start


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def two(fleet: Fleet) -> None:
    """Print the phases of a deployment over Ray on two nodes."""
    fleet.up(2)
    command = [sys.executable, "bin/stepladder", "deploy", "-i", str(fleet.inventory), "-e", "deployment_parallel=TP2"]
    phases = timed_phases(command, REPOSITORY, fleet.environ)
    print("vLLM over Ray on two nodes, empty nodes, warm caches of packages")
    for name, value in phases.items():
        print(f"  {name:<18} {value:6.1f} s")
    print(f"  {'all':<18} {sum(phases.values()):6.1f} s")


def free_bytes() -> int:
    """Memory that this machine can still give."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def rerun(fleet: Fleet, sizes: list[int], runs: int) -> None:
    """Print a line for each size of the fleet."""
    empty = free_bytes()
    for nodes in sizes:
        if empty < nodes * NODE_BYTES:
            print(f"{nodes:3} nodes: left out, they need {nodes * NODE_BYTES / 1e9:.0f} GB, {empty / 1e9:.0f} are free")
            continue
        fleet.up(nodes)
        wish = json.dumps({"deployment_engine": "transformers", "deployment_replicas": nodes})
        deploy = ("deploy", "-i", str(fleet.inventory), "-e", wish)
        first = seconds(lambda arguments=deploy: fleet.run(*arguments))
        deploys, knocks = [], []
        for _ in range(runs):
            start = time.monotonic()
            printed = fleet.run(*deploy)
            deploys.append(time.monotonic() - start)
            if set(re.findall(r"changed=(\d+)", printed)) != {"0"}:
                sys.exit(f"a second deploy changed something:\n{printed[-2000:]}")
            fleet.knock()
            knocks.append(fleet.knocked)
        again, plain = statistics.median(deploys), statistics.median(knocks)
        print(
            f"{nodes:3} nodes: first deploy {first:6.1f} s, a rerun {again:6.1f} s, ssh true {plain:5.2f} s, "
            f"ratio {again / plain:6.1f} (median of {runs}), {(empty - free_bytes()) / nodes / 1e9:.1f} GB a node",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["two", "rerun"])
    parser.add_argument("sizes", type=int, nargs="*", default=[2, 8, 16])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sl-fleet-", dir="/var/tmp"))
    fleet = Fleet(scratch)
    try:
        if options.what == "two":
            two(fleet)
        else:
            rerun(fleet, options.sizes, options.runs)
    finally:
        fleet.down()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
