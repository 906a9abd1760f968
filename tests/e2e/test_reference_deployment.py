"""Transformers as an engine, for real: the smoke of one node with its own server and vLLM's fixed answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PORT, HUB_PORT = 18002, 18972

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_it_gives_the_fixed_answers_and_leaves_nothing(tmp_path: Path) -> None:
    # Short on purpose: supervisor's socket lies below it, and Linux allows 107 characters for its address.
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.rmdir()
    settings = {
        "stepladder_state_directory": str(state),
        "deployment_engine": "transformers",
        "deployment_port": PORT,
        "deployment_weights_endpoint": f"http://127.0.0.1:{HUB_PORT}",
        "rehearsal_hub_port": HUB_PORT,
        "verify_report": str(tmp_path / "verify.json"),
    }
    command = [sys.executable, "bin/stepladder", "smoke", "-i", "inventories/local", "-e", json.dumps(settings)]
    done = subprocess.run(
        [*command, "--report", str(tmp_path), "--budget", "700"], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(
        r"Smoke passed in \d+ s of 700 s:\n  ok +deploy .*\n  ok +verify .*\n  ok +rerun .*\n  ok +remove ", done.stdout
    )
    assert 'failures="0"' in (tmp_path / "smoke.xml").read_text()
    steps = [case.get("name") for case in ElementTree.parse(tmp_path / "smoke.xml").iter("testcase")]
    assert steps == ["deploy", "verify", "rerun", "remove"]
    checks = {check["name"]: check for check in json.loads((tmp_path / "verify.json").read_text())["checks"]}
    assert [checks[name]["basis"] for name in ("chat", "streaming")] == ["exact", "exact"]
    # The plan says what the server does not parse; nothing else keeps these from being asked.
    assert not checks.keys() & {"reasoning", "tool call"}
    assert not state.exists()
