"""The environment that the role node_tools leaves on a node."""

from __future__ import annotations

import pytest
from testinfra.host import Host

VENVS = "/var/lib/stepladder/venvs"


@pytest.mark.parametrize(("program", "argument"), [("supervisord", "--version"), ("modelscope", "--version")])
def test_its_programs_run(host: Host, program: str, argument: str) -> None:
    found = host.check_output(f"ls -d {VENVS}/tools-*/bin").split()
    assert len(found) == 1
    assert host.run(f"{found[0]}/{program} {argument}").succeeded
