"""One rank of an all-reduce between nodes, or the matrix rate of each GPU of a node; run by a Python that has torch.

It gets its task as JSON in the one argument and answers with a line of JSON. The same program measures on GPUs with
NCCL or RCCL (torch calls both "nccl") and on CPUs with gloo.
"""

from __future__ import annotations

import datetime
import json
import sys
import time

import torch
from torch import distributed as dist

MATRIX_SIZE, MATRIX_SECONDS = 8192, 1.0
MOST_REPEATS = 20


def all_reduce(task: dict) -> dict:
    """Take part as one rank; the answer of every rank is the same.

    Args:
        task: backend, rank, world, address and port of rank 0, device (of a GPU), mebibytes of the message,
            seconds that the measurement may take, and patience: seconds until a rank that is silent ends it.

    Returns: gbit, the bus bandwidth in Gbit/s: what each rank sends to the next in a ring, whatever their number
        (nccl-tests, doc/PERFORMANCE.md).
    """
    place = "cpu"
    if task["backend"] == "nccl":
        torch.cuda.set_device(task["device"])
        place = f"cuda:{task['device']}"
    dist.init_process_group(
        task["backend"],
        init_method=f"tcp://{task['address']}:{task['port']}",
        rank=task["rank"],
        world_size=task["world"],
        timeout=datetime.timedelta(seconds=task["patience"]),
    )
    data = torch.ones(task["mebibytes"] << 18, dtype=torch.float32, device=place)

    def took(repeats: int) -> float:
        dist.barrier()
        begun = time.monotonic()
        for _ in range(repeats):
            dist.all_reduce(data)
            data.div_(task["world"])
        if place != "cpu":
            torch.cuda.synchronize()
        slowest = torch.tensor([time.monotonic() - begun], dtype=torch.float64, device=place)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest) / repeats

    # The first one connects the ranks, the second tells how often there is time for it.
    took(1)
    seconds = took(1)
    repeats = max(1, min(MOST_REPEATS, int(task["seconds"] / seconds)))
    seconds = min(seconds, took(repeats))
    right = bool((data == 1).all())
    dist.destroy_process_group()
    moved = data.numel() * 4 * 2 * (task["world"] - 1) / task["world"]
    return {"gbit": moved * 8 / seconds / 1e9, "problem": "" if right else "the sums are wrong"}


def matrix() -> dict:
    """The rate of each GPU in multiplying matrices of bf16, TFLOPS by its index."""
    rates = {}
    for device in range(torch.cuda.device_count()):
        one = torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=f"cuda:{device}")
        for _ in range(5):
            one @ one
        torch.cuda.synchronize(device)
        begun, count = time.monotonic(), 0
        while time.monotonic() - begun < MATRIX_SECONDS:
            for _ in range(10):
                one @ one
            torch.cuda.synchronize(device)
            count += 10
        rates[str(device)] = 2 * MATRIX_SIZE**3 * count / (time.monotonic() - begun) / 1e12
    return {"tflops": rates, "problem": "" if rates else "torch sees no GPU"}


def main() -> None:
    """Do the task, say the answer."""
    task = json.loads(sys.argv[1])
    answer = matrix() if task["mode"] == "matrix" else all_reduce(task)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
