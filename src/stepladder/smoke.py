"""The smoke test of one node, as CI runs it: deploy, verify, deploy again, remove, within a time budget.

It drives the same verbs that a person types, so what it proves is what a person gets.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOYMENT = "smoke"
BUDGET_SECONDS = 1800
# What removal may take after the budget is spent: a smoke must not leave an engine on the node.
REMOVAL_SECONDS = 300
END_SECONDS = 30
TAIL_LINES = 40
INTERRUPTED = 130
Judge = Callable[[str], str | None]
CHANGED = re.compile(r"^\S+\s+:\s+ok=\d+\s+changed=(\d+)", re.M)


@dataclass(frozen=True)
class Step:
    """One verb of the smoke; `failure` is none where it went well."""

    name: str
    seconds: float
    failure: str | None
    tail: str


class Runner:
    """Runs verbs with the same arguments, keeps their output in a folder, and remembers how each went."""

    def __init__(self, arguments: Sequence[str], report: Path, budget: float) -> None:
        """`budget` in seconds, for all verbs together but the removal."""
        self.arguments = [*arguments, "-e", f"deployment_name={DEPLOYMENT}"]
        self.report = report
        self.budget = budget
        self.started = time.monotonic()
        self.steps: list[Step] = []

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def rehearse(self) -> None:
        """Deploy, verify, deploy again; the first failure ends it, with the engine's last log lines."""
        for name, verb, judge in (
            ("deploy", "deploy", None),
            ("verify", "verify", None),
            ("rerun", "deploy", unchanged),
        ):
            step = self.run(name, verb, self.budget - self.seconds, judge)
            if step.failure:
                self.run("logs", "logs", REMOVAL_SECONDS, more=["-e", f"logs_lines={TAIL_LINES}"])
                return

    def remove(self) -> None:
        """Take everything away again, whatever happened before."""
        self.run("remove", "remove", REMOVAL_SECONDS, more=["-e", "confirm_approved=true"])

    def run(self, name: str, verb: str, seconds: float, judge: Judge | None = None, more: Sequence[str] = ()) -> Step:
        """Run a verb with its output shown and kept; one that outlasts its seconds is ended with all its children."""
        print(f"\n--- smoke: {name} (bin/stepladder {verb}), {max(0.0, seconds):.0f} s left", flush=True)
        started = time.monotonic()
        log = self.report / f"smoke-{name}.log"
        command = [sys.executable, str(REPOSITORY / "bin" / "stepladder"), verb, *self.arguments, *more]
        with (
            log.open("w+b") as kept,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=kept, stderr=subprocess.STDOUT, start_new_session=True
            ) as process,
        ):
            try:
                in_time = _follow(process, log, started + seconds)
            except KeyboardInterrupt:
                _end(process)
                raise
            if not in_time:
                _end(process)
        output, took = log.read_text(errors="replace"), time.monotonic() - started
        failure = None
        if not in_time:
            failure = f"the time budget was spent after {took:.0f} s of it"
        elif process.returncode:
            failure = f"exit status {process.returncode}"
        elif judge:
            failure = judge(output)
        self.steps.append(Step(name, took, failure, "\n".join(output.splitlines()[-TAIL_LINES:])))
        return self.steps[-1]


def main(arguments: Sequence[str]) -> int:
    """Run the smoke and return its exit status: 0 if all is well, 1 if not, 130 if it was interrupted."""
    options, handed_on = _parser().parse_known_args(arguments)
    options.report.mkdir(parents=True, exist_ok=True)
    runner = Runner(handed_on, options.report, options.budget)
    interrupted = False
    try:
        runner.rehearse()
    except KeyboardInterrupt:
        interrupted = True
    if not options.keep:
        runner.remove()
    junit = options.report / "smoke.xml"
    junit.write_bytes(junit_document(runner.steps))
    print(f"\n{summary(runner.steps, runner.seconds, options.budget)}\nReport: {junit}", flush=True)
    if interrupted:
        return INTERRUPTED
    return 1 if any(step.failure for step in runner.steps) else 0


def unchanged(output: str) -> str | None:
    """Why a rerun was not one that changes nothing, none if it was."""
    count = changed_tasks(output)
    return f"the rerun changed {count} task(s) instead of none" if count else None


def summary(steps: Sequence[Step], seconds: float, budget: float) -> str:
    """One line a step and one for all of them."""
    lines = [f"  {'FAILED' if step.failure else 'ok':<6}  {step.name:<8} {step.seconds:6.1f} s" for step in steps]
    for number, step in enumerate(steps):
        if step.failure:
            lines[number] += f"  {step.failure}"
    verdict = "failed" if any(step.failure for step in steps) else "passed"
    return "\n".join([f"Smoke {verdict} in {seconds:.0f} s of {budget:.0f} s:", *lines])


def junit_document(steps: Sequence[Step]) -> bytes:
    """The steps as JUnit XML, the last lines of output with each failure."""
    suite = ElementTree.Element(
        "testsuite",
        name="stepladder.smoke",
        tests=str(len(steps)),
        failures=str(sum(1 for step in steps if step.failure)),
        time=f"{sum(step.seconds for step in steps):.3f}",
    )
    for step in steps:
        case = ElementTree.SubElement(
            suite, "testcase", classname="stepladder.smoke", name=step.name, time=f"{step.seconds:.3f}"
        )
        if step.failure:
            failure = ElementTree.SubElement(case, "failure", message=step.failure)
            failure.text = _printable(step.tail)
    document: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return document


def changed_tasks(output: str) -> int:
    """How many tasks changed something, over all hosts of a recap."""
    return sum(int(count) for count in CHANGED.findall(output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/stepladder smoke",
        description="Deploy, verify, deploy again and remove on one node; other arguments go to ansible-playbook.",
        allow_abbrev=False,
    )
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--report", type=Path, default=Path("report"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave the deployment running")
    return parser


def _follow(process: subprocess.Popen[bytes], log: Path, deadline: float) -> bool:
    """Show what a process writes to its log until it ends; false if it did not end in time."""
    with log.open("rb") as written:
        while True:
            ended = process.poll() is not None
            sys.stdout.write(written.read().decode(errors="replace"))
            sys.stdout.flush()
            if ended:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process group, first as Ctrl-C would, so that nodes are left in order."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def _printable(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(character for character in text if character in "\t\n" or character >= " ")
