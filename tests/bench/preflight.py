#!/usr/bin/env python3
"""What preflight costs on a fleet: seconds, beside a plain ssh to all nodes at once, on a lab of its own.

    python3 tests/bench/preflight.py 2 8 16

Both sides in turn, medians of `--runs`; each side over connections of its own. Needs what a lab needs (docs/lab.md),
and no engines: a node takes some 60 MB of memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from fleet import Fleet


def measure(fleet: Fleet, nodes: int, runs: int) -> str:
    """A line for a fleet of so many nodes."""
    fleet.up(nodes)
    preflights, knocks = [], []
    for _ in range(runs):
        start = time.monotonic()
        # A shared connection that is still open would make the later runs look better than a first one is.
        fleet.run("preflight", "-i", str(fleet.inventory), "-e", "ansible_ssh_extra_args='-o ControlPath=none'")
        preflights.append(time.monotonic() - start)
        fleet.knock()
        knocks.append(fleet.knocked)
    whole, plain = statistics.median(preflights), statistics.median(knocks)
    return f"{nodes:3} nodes: preflight {whole:5.1f} s, ssh true {plain:5.2f} s, ratio {whole / plain:5.1f} (median)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[2, 8, 16])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sl-preflight-", dir="/var/tmp"))
    fleet = Fleet(scratch)
    try:
        for nodes in options.sizes:
            print(measure(fleet, nodes, options.runs), flush=True)
    finally:
        fleet.down()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
