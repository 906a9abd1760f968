"""Exit statuses of the verbs, beside Ansible's own: 2 where a task failed, 4 where a node did not answer."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """What a program that runs a verb can tell apart; docs/on-call.md has the same table.

    The numbers leave out those that Ansible, shells and signals use.
    """

    UNREACHABLE = 4
    NOT_READY = 10
    DIFFERS = 11
    WENT_BACK = 20
    NO_WAY_BACK = 21
    NOTHING_TO_GO_BACK_TO = 22
    NOT_DRAINED = 23
    HELD = 30
    FROZEN = 31
    NOT_CONFIRMED = 32


def status_of(name: str) -> int:
    """The number of a status by its name in lower case.

    Raises:
        ValueError: for a name that does not exist, naming those that do.
    """
    try:
        return int(ExitStatus[name.upper()])
    except KeyError:
        known = ", ".join(status.name.lower() for status in ExitStatus)
        raise ValueError(f"exit_status '{name}' is unknown. Choose one of: {known}.") from None
