#!/usr/bin/env python3
"""What `prepare` costs on lab nodes: seconds and changed tasks, the first time and the second, by number of nodes.

    python3 tests/bench/prepare.py 1 2 8

The driver comes from a signed repository on this machine, as stand-ins: what is measured is the toolkit, apt and dpkg,
not a download of gigabytes and the build of a kernel module. Needs what a lab needs (docs/lab.md), apt-utils and gpg.
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

VERSION = "580.126.20"


def run(environ: dict[str, str], *arguments: str) -> str:
    """A verb that has to succeed; what it printed."""
    done = subprocess.run(
        [sys.executable, "bin/stepladder", *arguments], cwd=REPOSITORY, env=environ, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return done.stdout


def measure(nodes: int, scratch: Path) -> list[str]:
    """Rows for a number of nodes: which run, seconds, changed tasks of all nodes."""
    environ = {**os.environ, "XDG_STATE_HOME": str(scratch / "state")}
    inventory = str(scratch / "inventory")
    lab = ("--name", "bench-prepare")
    rows = []
    try:
        run(environ, "lab", "up", *lab, "--nodes", str(nodes), "--inventory", inventory)
        subnet = json.loads(run(environ, "lab", "status", *lab, "--json"))["subnet"]
        key = signed_repository.new_key(scratch / "key")
        signed_repository.build(scratch / "www", signed_repository.driver_packages(VERSION, platform.release()))
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
                changed = sum(map(int, re.findall(r"(?m)^\S+\s+: ok=\d+\s+changed=(\d+)", output)))
                rows.append(f"{nodes:5}  {which:6}  {seconds:7.1f}  {changed:7}")
    finally:
        run(environ, "lab", "down", *lab)
    return rows


def main() -> None:
    """Measure each number of nodes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int, nargs="+")
    if lacking := signed_repository.lacking():
        sys.exit(f"this machine lacks {lacking}")
    print("nodes  run     seconds  changed", flush=True)
    for nodes in parser.parse_args().nodes:
        with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as scratch:
            for row in measure(nodes, Path(scratch)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
