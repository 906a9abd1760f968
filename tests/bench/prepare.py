#!/usr/bin/env python3
"""What `prepare` costs on lab nodes: seconds and changed tasks, the first time and the second, by number of nodes.

    .venv/bin/python tests/bench/prepare.py 1 2 8

The driver comes from a signed repository on this machine, as stand-ins: what is measured is the toolkit, apt and dpkg,
not a download of gigabytes and the build of a kernel module. Needs what a lab needs (docs/lab.md), apt-utils and gpg.
Ends with status 1 where a first run changes nothing on a node, or a second one anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests" / "lab"), str(REPOSITORY / "src")]

import signed_repository  # noqa: E402 - found only after the path is set


def run(environ: dict[str, str], *arguments: str) -> str:
    """A verb that has to succeed; what it printed."""
    done = subprocess.run(
        [sys.executable, "bin/stepladder", *arguments], cwd=REPOSITORY, env=environ, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return done.stdout


def changed_tasks(output: str, nodes: int) -> dict[str, int]:
    """Changed tasks by node, from the recap, which has to have all nodes."""
    changed = {name: int(count) for name, count in re.findall(r"(?m)^(\S+)\s+: ok=\d+\s+changed=(\d+)", output)}
    if len(changed) != nodes:
        sys.exit(f"the recap has {len(changed)} of {nodes} nodes:\n{output[-2000:]}")
    return changed


def fault(which: str, changed: dict[str, int]) -> str:
    """What is wrong with a run; empty where nothing is."""
    if which == "first":
        idle = [name for name, count in changed.items() if not count]
        return f"the first run changed nothing on {', '.join(idle)}" if idle else ""
    again = [f"{name} ({count})" for name, count in changed.items() if count]
    return f"the second run changed something on {', '.join(again)}" if again else ""


def measure(nodes: int, scratch: Path) -> list[str]:
    """Print rows for a number of nodes (which run, seconds, changed tasks of all nodes); what is wrong with them."""
    environ = {**os.environ, "XDG_STATE_HOME": str(scratch / "state")}
    inventory = str(scratch / "inventory")
    lab = ("--name", "bench-prepare")
    faults = []
    try:
        run(environ, "lab", "up", *lab, "--nodes", str(nodes), "--inventory", inventory)
        subnet = json.loads(run(environ, "lab", "status", *lab, "--json"))["subnet"]
        key = signed_repository.new_key(scratch / "key")
        signed_repository.build(
            scratch / "www", signed_repository.driver_packages(signed_repository.DRIVER_VERSION, platform.release())
        )
        signed_repository.sign(scratch / "www", scratch / "key")
        with signed_repository.served(scratch / "www", subnet.replace(".0/24", ".1")) as url:
            mirror = {"url": url, "key_url": f"{url}key.asc", "fingerprints": [key]}
            variables = {
                "deployment_gpu": "h20-96",
                "gpu_driver_check_bus": False,
                "gpu_driver_mirrors": {"nvidia-driver": mirror},
                "host_strict": False,
                "host_swap_off": False,
            }
            (scratch / "variables.json").write_text(json.dumps(variables))
            for which in ("first", "second"):
                started = time.monotonic()
                output = run(environ, "prepare", "-i", inventory, "-e", f"@{scratch / 'variables.json'}")
                seconds = time.monotonic() - started
                changed = changed_tasks(output, nodes)
                faults.append(fault(which, changed))
                print(f"{nodes:5}  {which:6}  {seconds:7.1f}  {sum(changed.values()):7}", flush=True)
    finally:
        run(environ, "lab", "down", *lab)
    return [f"{nodes} nodes: {one}" for one in faults if one]


def main() -> None:
    """Measure each number of nodes, print a table, and end with status 1 where a run did what it may not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int, nargs="+")
    options = parser.parse_args()
    if lacking := signed_repository.lacking():
        sys.exit(f"this machine lacks {lacking}")
    print("nodes  run     seconds  changed", flush=True)
    faults: list[str] = []
    for nodes in options.nodes:
        with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as scratch:
            faults += measure(nodes, Path(scratch))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
