"""Printing from an action plugin while it runs."""

from __future__ import annotations

import signal

from ansible.utils.display import Display

ENDING = {signal.SIGINT, signal.SIGTERM}


def show(text: str, color: str | None = None, *, stderr: bool = False) -> None:
    """Print a text now, and let nobody end this process in the middle of it.

    A worker prints through a queue that it shares with Ansible's main process; one that is ended while it holds the
    queue's lock leaves the main process waiting for that lock for ever, Ctrl-C or not.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        Display().display(text, color=color, stderr=stderr)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
