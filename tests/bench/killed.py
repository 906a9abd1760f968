#!/usr/bin/env python3
"""A redeploy whose controller is killed at random moments: what clients see, what status says, what a rerun does.

    .venv/bin/python tests/bench/killed.py --points 10 --seed 1      # the real vLLM on the CPU, about a minute a point
    .venv/bin/python tests/bench/killed.py --only 0-4 --keep /tmp/slk      # the first half of the same moments, and
    .venv/bin/python tests/bench/killed.py --only 5-9 --keep /tmp/slk      # the second, on a deployment that stays

Each point is a redeploy to the other of two releases, so that the engine is replaced each time; after `kill -9` (of
ansible-playbook alone, or with all its workers, in turn) a client goes on asking for text. Held against the point:

* where the engine's process is the same as before the kill, no request may have failed; where it is another, the time
  without an answer is reported, and ends without anybody's help or with the rerun;
* status says ready if, and only if, the endpoint answers before and after it was asked;
* one rerun ends with status 0 and a proven release and no lease; a second one changes nothing.

The moments are drawn from the time that a redeploy takes. Ends with status 1 where one of these does not hold, or where
a redeploy had ended before its moment. Uses a deployment of its own on ports 19000 and 19970.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_deploy import PORT, REPOSITORY, remove, settings

from stepladder.smoke import changed_tasks

MODEL = "tiny-step3p5"
WISHES = ({}, {"deployment_extra_arguments": ["--no-enable-log-requests"]})
LONGEST_SHOWN = 46
ENDED = "(it had ended)"


@dataclass
class Client:
    """Asks for eight tokens again and again."""

    over: threading.Event = field(default_factory=threading.Event)
    # When a request began and ended by time.monotonic(), and whether it was answered.
    asked: list[tuple[float, float, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.over.wait(0.05):
            began = time.monotonic()
            self.asked.append((began, 0.0, False))
            whole = answers(60)
            self.asked[-1] = (began, time.monotonic(), whole)

    def failed(self, since: float) -> int:
        """Requests that were begun since then and failed."""
        return sum(began >= since and ended > 0 and not whole for began, ended, whole in self.asked)

    def silence(self, since: float) -> float:
        """The longest time since then between two answers, in seconds; what still goes on counts."""
        answered = [ended for began, ended, whole in self.asked if whole and ended >= since]
        moments = [since, *answered, time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(moments))


def answers(timeout: float = 5) -> bool:
    """Whether the endpoint gives text."""
    wish = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 8}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", wish, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return bool(json.load(reply)["choices"][0]["text"])
    except (OSError, ValueError, LookupError):
        return False


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


class Bench:
    """The deployment and what went wrong with it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.faults: list[str] = []

    def command(self, verb: str, wish: dict[str, Any] | None = None) -> list[str]:
        """The command line of a verb."""
        return [sys.executable, "bin/stepladder", verb, *settings(self.state), "-e", json.dumps(wish or {})]

    def run(self, verb: str, wish: dict[str, Any] | None = None, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        return subprocess.run(
            [*self.command(verb, wish), *more], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip

    def deploy(self, wish: dict[str, Any]) -> float:
        """Deploy to its end; the seconds that it took. Nothing is measured where that fails."""
        begun = time.monotonic()
        done = self.run("deploy", wish)
        if done.returncode:
            sys.exit(f"a deploy that nobody killed ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return time.monotonic() - begun

    def status(self) -> dict[str, Any]:
        """What status says."""
        done = self.run("status", None, "-e", "status_format=json")
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            self.faults.append(f"status gave no JSON: {done.stdout[-300:]}{done.stderr[-300:]}")
            return {"ready": None, "processes": [{}], "nodes": {"localhost": {}}}

    def kill(self, wish: dict[str, Any], seconds: float, *, workers: bool) -> str:
        """Kill a redeploy after so many seconds; the last line that it printed, or that it had ended."""
        log = self.state.with_suffix(".out")
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command("deploy", wish), cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            time.sleep(seconds)
            ended = process.poll() is not None
            for pid in [process.pid, *(descendants(process.pid) if workers else [])] if not ended else []:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        return ENDED if ended else (lines or ["(nothing yet)"])[-1][:LONGEST_SHOWN]

    def hold(self, true: bool, fault: str) -> None:
        """Note a fault where something does not hold."""
        self.faults += [] if true else [fault]


def one(bench: Bench, client: Client, number: int, moment: float) -> str:
    """One point; the line about it."""
    wish = WISHES[(number + 1) % 2]
    before = bench.status()["processes"][0].get("pid")
    began = time.monotonic()
    where = bench.kill(wish, moment, workers=number % 2 == 1)
    first = answers()
    told = bench.status()
    second = answers()
    name = f"point {number}, killed after {moment:.1f} s at {where!r}"
    bench.hold(where != ENDED, f"point {number}: the redeploy had ended after {moment:.1f} s; take a smaller --longest")
    if first == second:
        bench.hold(told["ready"] is first, f"{name}: status says ready={told['ready']}, the endpoint says {first}")
    same = told["processes"][0].get("pid") == before
    failed, silence = client.failed(began), client.silence(began)
    if same:
        bench.hold(failed == 0, f"{name}: {failed} requests failed, though the engine was not touched")
    rerun_at = time.monotonic()
    done = bench.run("deploy", wish)
    rerun = time.monotonic() - rerun_at
    bench.hold(done.returncode == 0, f"{name}: the rerun ended with {done.returncode}:\n{done.stdout[-1500:]}")
    after = bench.status()
    node = after["nodes"]["localhost"]
    bench.hold(
        (after["ready"], node.get("outcome"), node.get("lease")) == (True, "proven", None),
        f"{name}: after the rerun ready={after['ready']}, {node.get('outcome')}, lease {node.get('lease')}",
    )
    whole = client.silence(began)
    again = bench.run("deploy", wish)
    bench.hold(again.returncode == 0 and changed_tasks(again.stdout) == 0, f"{name}: a second rerun changed something")
    state = "ready" if told["ready"] else told["processes"][0].get("phase", "?")
    engine, what = ("the old one" if same else "another"), ("all" if number % 2 else "main")
    return (
        f"{number:>3} {moment:>6.1f} {what:<5} {where:<{LONGEST_SHOWN}} {engine:<11} {state:<9}"
        f" {failed:>6} {silence:>7.1f} {whole:>7.1f} {rerun:>7.1f}"
    )


def main() -> None:
    """Deploy, kill again and again, report."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes its deployment away, as after Ctrl-C
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="FIRST-LAST of the points, counted from 0")
    parser.add_argument("--keep", type=Path, help="state directory of a deployment that is used, and stays")
    parser.add_argument("--longest", type=float, help="seconds of the latest moment; unset measures a redeploy first")
    options = parser.parse_args()
    first, _, last = options.only.partition("-")
    numbers = range(options.points)[int(first or 0) : int(last or options.points - 1) + 1]
    scratch = Path(tempfile.mkdtemp(prefix="slk-", dir="/tmp"))
    bench = Bench(options.keep or scratch / "s")
    try:
        begun = time.monotonic()
        bench.deploy(WISHES[(numbers[0] + 1) % 2])
        deployed = time.monotonic() - begun
        redeployed = bench.deploy(WISHES[numbers[0] % 2])
        longest = options.longest or redeployed
        moments = [random.Random(options.seed + n).uniform(1, longest) for n in range(options.points)]
        print(f"deployed in {deployed:.0f} s, redeployed in {redeployed:.0f} s; seed {options.seed}", flush=True)
        client = Client()
        print(
            f"  # killed  what  {'last line':<{LONGEST_SHOWN}} engine      status    failed silent  silent   rerun s\n"
            f"{'':>82} then   in all",
            flush=True,
        )
        for number in numbers:
            print(one(bench, client, number, moments[number]), flush=True)
        client.over.set()
        client.thread.join(90)
        print(f"{len(client.asked)} requests, {sum(not whole for *_, whole in client.asked)} without an answer")
    finally:
        if not options.keep:
            remove(REPOSITORY, bench.state)
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(bench.faults) or "All of it held.")
    sys.exit(1 if bench.faults else 0)


if __name__ == "__main__":
    main()
