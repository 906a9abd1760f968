#!/usr/bin/env python3
"""Seconds and memory of the planner alone, for 2, 64 and 1,000 nodes of H20 with Step3 in BF16 over Ray.

.venv/bin/python tests/bench/planner.py [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc

from stepladder.catalogue import Catalogue
from stepladder.planner import make_plan
from stepladder.request import parse_request


def plan_bytes(nodes: int) -> int:
    """Plan a fleet from scratch, catalogue included; the size of the plan's JSON."""
    fleet = [
        {"name": f"n{i:04}", "address": f"198.18.{i // 250}.{i % 250 + 1}", "gpu": "h20-96", "interface": "bond0"}
        for i in range(nodes)
    ]
    deployment = {"model": "step3", "engine": "vllm", "replicas": nodes // 2}
    return len(make_plan(parse_request({"deployment": deployment, "nodes": fleet}), Catalogue()).to_json())


def main() -> None:
    """Measure and print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    print(f"{'nodes':>6}  {'seconds':>8}  {'peak MB':>8}  {'plan MB':>8}   (median of {runs})")
    for nodes in (2, 64, 1000):
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            size = plan_bytes(nodes)
            times.append(time.perf_counter() - start)
        tracemalloc.start()
        plan_bytes(nodes)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        print(f"{nodes:>6}  {statistics.median(times):>8.3f}  {peak:>8.1f}  {size / 1e6:>8.2f}")


if __name__ == "__main__":
    main()
