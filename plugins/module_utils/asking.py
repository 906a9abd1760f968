"""Asking a program of the node something, so that one that hangs is an answer too.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Not on the PATH of an ssh login without root; and where ROCm puts its tools.
TOOL_PATHS = ("/opt/rocm/bin", "/usr/local/sbin", "/usr/sbin", "/sbin")
TOOL_SECONDS = 20.0
END_SECONDS = 2.0
SHOWN = 200


class Answer(NamedTuple):
    """What a program printed, and why it did not answer; one of the two is empty."""

    text: str
    problem: str


class Ran(NamedTuple):
    """What a program printed and how it ended; `problem` is why it did not end by itself, or was not started."""

    said: str = ""
    complained: str = ""
    status: int = 0
    problem: str = ""


def ask(command: Sequence[str], seconds: float | None = None, paths: Sequence[str] | None = None) -> Answer:
    """Run a program that only reads, for which another exit status than 0 is no answer.

    Args:
        command: the program's name and arguments.
        seconds: that it may take; unset takes `TOOL_SECONDS`.
        paths: to look in after the PATH; unset takes `TOOL_PATHS`.
    """
    ran = run(command, seconds, paths)
    if ran.status:
        name = Path(command[0]).name
        return Answer("", f"{name} ends with {ran.status}: {first_line(ran.complained + ran.said)}")
    return Answer(ran.said, ran.problem)


def run(
    command: Sequence[str], seconds: float | None = None, paths: Sequence[str] | None = None, given: str | None = None
) -> Ran:
    """Run a program, and end it when its time is over.

    A program that waits inside the kernel for a dead GPU cannot be ended, not even by SIGKILL; it is left behind, as
    waiting for it would hang this process too.

    Args:
        command: the program's name and arguments.
        seconds: that it may take; unset takes `TOOL_SECONDS`.
        paths: to look in after the PATH; unset takes `TOOL_PATHS`.
        given: what it reads from its standard input.
    """
    seconds = TOOL_SECONDS if seconds is None else seconds
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *(TOOL_PATHS if paths is None else paths)])
    program = shutil.which(command[0], path=search)
    name = Path(command[0]).name
    if not program:
        return Ran(problem=f"{name} is not there")
    reads = subprocess.DEVNULL if given is None else subprocess.PIPE
    try:
        process = subprocess.Popen(
            [program, *command[1:]], stdin=reads, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except OSError as error:
        return Ran(problem=f"{name} cannot be run: {error.strerror}")
    try:
        said, complained = process.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        _leave(process)
        return Ran(problem=f"{name} does not answer within {seconds:g} s")
    return Ran(said, complained, process.returncode)


def first_line(text: str) -> str:
    """The first line that says something, at most 200 characters of it."""
    return next((line.strip()[:SHOWN] for line in text.splitlines() if line.strip()), "it says nothing")


def _leave(process: subprocess.Popen[str]) -> None:
    """End a program and all that it started; wait for it a moment, not for ever."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            with contextlib.suppress(OSError):  # what it did not read any more
                pipe.close()
