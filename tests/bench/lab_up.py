#!/usr/bin/env python3
"""What a lab costs: seconds from `lab up` to nodes that answer over SSH, and to nothing again.

    python3 tests/bench/lab_up.py             # warm: the root file system is in the cache; median of --runs
    python3 tests/bench/lab_up.py --cold      # once before that, with an empty cache

Uses a lab of its own in folders of its own, and removes it. Needs what a lab needs: docs/lab.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def seconds(environ: dict[str, str], *arguments: str) -> float:
    """Wall time of a `lab` verb that has to succeed."""
    command = [sys.executable, "bin/stepladder", "lab", *arguments, "--name", "bench"]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.monotonic() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sl-bench-", dir="/var/tmp"))
    up = ["up", "--nodes", str(options.nodes), "--inventory", str(scratch / "inventory")]
    rows = []
    environ = {"XDG_STATE_HOME": str(scratch / "state")}
    try:
        subprocess.run(
            [sys.executable, "bin/stepladder", "lab", "--help"], cwd=REPOSITORY, capture_output=True, check=True
        )
        if options.cold:
            rows.append(("up, empty cache", seconds(environ | {"XDG_CACHE_HOME": str(scratch / "cache")}, *up)))
            seconds(environ, "down")
        seconds(environ, *up)
        seconds(environ, "down")
        times: dict[str, list[float]] = {
            "up, warm": [],
            "up again, nothing to do": [],
            "reboot of a node": [],
            "down": [],
        }
        for _ in range(options.runs):
            times["up, warm"].append(seconds(environ, *up))
            times["up again, nothing to do"].append(seconds(environ, *up))
            times["reboot of a node"].append(seconds(environ, "reboot", "node1"))
            times["down"].append(seconds(environ, "down"))
        rows += [(name, statistics.median(values)) for name, values in times.items()]
    finally:
        seconds(environ, "down")
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"A lab of {options.nodes} nodes, median of {options.runs}")
    for name, value in rows:
        print(f"  {name:<26} {value:6.1f} s")


if __name__ == "__main__":
    main()
