#!/usr/bin/env python3
"""What preflight costs on a fleet: seconds, beside a plain ssh to all nodes at once, on a lab of its own.

    python3 tests/bench/preflight.py 2 8 16

Both sides in turn, medians of `--runs`; each side over connections of its own. Needs what a lab needs (docs/lab.md),
and no engines: a node takes some 60 MB of memory. Ends with status 1 where preflight does not tell of every node, or
takes more than `--most-ratio` times the plain ssh.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fleet import Fleet


def fault(told: str, nodes: int) -> str:
    """What is wrong with the answer of a fleet whose nodes are all fit; empty where nothing is."""
    report = json.loads(told)
    names = [one["node"] for one in report["nodes"] if one["facts"]]
    if len(names) != nodes:
        return f"preflight read {len(names)} of {nodes} nodes: {', '.join(names)}"
    return "" if report["fit"] else f"preflight says that they are not fit: {report['unfit']}"


def measure(fleet: Fleet, nodes: int, runs: int, most_ratio: float) -> str:
    """Print a line for a fleet of so many nodes; what is wrong."""
    fleet.up(nodes)
    preflights, knocks, faults = [], [], []
    for _ in range(runs):
        start = time.monotonic()
        # A shared connection that is still open would make the later runs look better than a first one is.
        told = fleet.run(
            "preflight", "-i", str(fleet.inventory), "-e", "preflight_format=json",
            "-e", "ansible_ssh_extra_args='-o ControlPath=none'",
        )  # fmt: skip
        preflights.append(time.monotonic() - start)
        faults.append(fault(told, nodes))
        fleet.knock()
        knocks.append(fleet.knocked)
    whole, plain = statistics.median(preflights), statistics.median(knocks)
    print(
        f"{nodes:3} nodes: preflight {whole:5.1f} s, ssh true {plain:5.2f} s, ratio {whole / plain:5.1f} (median)",
        flush=True,
    )
    if whole / plain > most_ratio:
        faults.append(f"ratio {whole / plain:.1f}, at most {most_ratio:g}")
    return "".join(f"{nodes} nodes: {one}\n" for one in dict.fromkeys(faults) if one)


def main() -> None:
    """Measure and print; status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[2, 8, 16])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--most-ratio", type=float, default=math.inf)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sl-preflight-", dir="/var/tmp"))
    fleet, faults = Fleet(scratch), ""
    try:
        for nodes in options.sizes:
            faults += measure(fleet, nodes, options.runs, options.most_ratio)
    finally:
        fleet.down()
        shutil.rmtree(scratch, ignore_errors=True)
    if faults:
        sys.exit(faults.rstrip())


if __name__ == "__main__":
    main()
