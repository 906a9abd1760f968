#!/usr/bin/env python3
"""Runs a command and, when it has ended, ends all that it left behind.

Under systemd the control group does that. Where supervisor keeps the processes, an engine whose main process is killed
would leave its workers, and with them the memory of the GPUs. Processes whose parent has died become children of this
one (prctl(2), PR_SET_CHILD_SUBREAPER), so none is missed, whatever group or session it put itself into.

    reaper.py COMMAND [ARGUMENT ...]

Signals are passed on to the command. The exit status is the command's, or 128 and its signal's number.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
SIGNALLED = 128
CANNOT_RUN = 126

libc = ctypes.CDLL(None, use_errno=True)


def main(command: list[str]) -> int:
    """Run the command and clear up after it; returns the exit status."""
    if not command:
        print(__doc__, file=sys.stderr)
        return CANNOT_RUN
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        print(f"reaper: prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return CANNOT_RUN
    # Held back until there is somebody to pass them on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.fork()
    if not child:
        run(command)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = wait_for(child)
    end_the_rest()
    return status


def run(command: list[str]) -> None:
    """Become the command, which the kernel ends should this process be killed."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    try:
        os.execvp(command[0], command)  # noqa: S606 - running it is the purpose
    except OSError as error:
        print(f"reaper: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(CANNOT_RUN)


def wait_for(child: int) -> int:
    """The exit status of the child; whatever else ends meanwhile is taken from the process table."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else SIGNALLED - code


def end_the_rest() -> None:
    """End every descendant; as a parent dies its children come up to this process and are met in the next round."""
    while True:
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """Processes whose parent this is, ended ones that are not taken away yet included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
