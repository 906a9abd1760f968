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
from collections.abc import Sequence
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
CHANGED = re.compile(r"^\S+\s+:\s+ok=\d+\s+changed=(\d+)", re.M)


@dataclass(frozen=True)
class Step:
    """One verb of the smoke; `failure` is none where it went well."""

    name: str
    seconds: float
    failure: str | None
    tail: str


def main(arguments: Sequence[str]) -> int:
    """Run the smoke and return its exit status: 0 if all is well, 1 if not, 130 if it was interrupted."""
    options, handed_on = _parser().parse_known_args(arguments)
    options.report.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    handed_on += ["-e", f"deployment_name={DEPLOYMENT}"]
    steps: list[Step] = []
    try:
        for name, verb, judge in (("deploy", "deploy", None), ("verify", "verify", None), ("rerun", "deploy", _unchanged)):
            left = options.budget - (time.monotonic() - started)
            steps.append(_run(name, verb, handed_on, left, options.report, judge))
            if steps[-1].failure:
                _show_engine_logs(handed_on, options.report)
                break
    except KeyboardInterrupt:
        steps.append(Step("interrupted", 0.0, "interrupted", ""))
    if not options.keep:
        approval = [*handed_on, "-e", "confirm_approved=true"]
        steps.append(_run("remove", "remove", approval, REMOVAL_SECONDS, options.report, None))
    junit = options.report / "smoke.xml"
    junit.write_bytes(junit_document(steps))
    print(f"\n{summary(steps, time.monotonic() - started, options.budget)}\nReport: {junit}", flush=True)
    if any(step.failure == "interrupted" for step in steps):
        return 130
    return 1 if any(step.failure for step in steps) else 0


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
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


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


def _unchanged(output: str) -> str | None:
    count = changed_tasks(output)
    return f"the rerun changed {count} task(s) instead of none" if count else None


def _run(
    name: str, verb: str, arguments: Sequence[str], seconds: float, report: Path, judge: object = None
) -> Step:
    """Run a verb with its output shown and kept; a verb that outlasts its seconds is ended with all its children."""
    print(f"\n--- smoke: {name} (bin/stepladder {verb}), {max(0.0, seconds):.0f} s left", flush=True)
    started = time.monotonic()
    log = report / f"smoke-{name}.log"
    command = [sys.executable, str(REPOSITORY / "bin" / "stepladder"), verb, *arguments]
    with log.open("w+b") as kept, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=kept, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            in_time = _follow(process, log, started + seconds)
        except KeyboardInterrupt:
            _end(process)
            raise
        if not in_time:
            _end(process)
    output = log.read_text(errors="replace")
    failure = None
    if not in_time:
        failure = f"the time budget was spent after {time.monotonic() - started:.0f} s of it"
    elif process.returncode:
        failure = f"exit status {process.returncode}"
    elif callable(judge):
        failure = judge(output)
    return Step(name, time.monotonic() - started, failure, "\n".join(output.splitlines()[-TAIL_LINES:]))


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


def _show_engine_logs(arguments: Sequence[str], report: Path) -> None:
    _run("logs", "logs", [*arguments, "-e", f"logs_lines={TAIL_LINES}"], REMOVAL_SECONDS, report)


def _printable(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(character for character in text if character in "\t\n" or character >= " ")
