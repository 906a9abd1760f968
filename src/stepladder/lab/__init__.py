"""`bin/stepladder lab`: a cluster of real nodes on one machine, for the ordinary playbooks over ordinary SSH.

The nodes are containers that boot systemd and sshd. `arguments` reads the command line, `cluster` makes nodes on an
`engine` from an `image`, `record` remembers what was made, `faults` breaks it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stepladder.errors import StepladderError

INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Run `bin/stepladder lab` and return its exit status: 0, 1 with what went wrong, 2 for a wrong command line."""
    from stepladder.lab.verbs import run  # noqa: PLC0415 - a wrong command line needs none of it

    try:
        return run(arguments)
    except StepladderError as error:
        print(f"stepladder lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nstepladder lab: interrupted; the same command goes on from there, `lab down` removes it", file=sys.stderr
        )
        return INTERRUPTED
