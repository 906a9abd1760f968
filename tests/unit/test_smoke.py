"""The smoke's order of verbs, its verdicts, its time budget and its report, with a stand-in for bin/stepladder."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stepladder import smoke

# A stand-in for bin/stepladder: notes each call, prints a recap, and fails or hangs where the test says so.
STANDIN = """
import sys, time
from pathlib import Path
here = Path(__file__).parent
verb = sys.argv[1]
calls = here / "calls"
calls.write_text((calls.read_text() if calls.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
count = calls.read_text().split().count(verb)
print(f"n0 : ok=9 changed={(here / 'changed').read_text() if verb == 'deploy' and count > 1 else 3} unreachable=0")
if (here / f"hang-{verb}").exists():
    time.sleep(60)
sys.exit(7 if (here / f"fail-{verb}").exists() else 0)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "stepladder").write_text(STANDIN)
    (tmp_path / "bin" / "changed").write_text("0")
    monkeypatch.setattr(smoke, "REPOSITORY", tmp_path)
    return tmp_path


def run(place: Path, *arguments: str) -> tuple[int, list[str], dict[str, str | None]]:
    """Exit status, the verbs called, and each step's failure by the JUnit report."""
    status = smoke.main(["--report", str(place / "report"), "-i", "inv", *arguments])
    calls = [line.split()[0] for line in (place / "bin" / "calls").read_text().splitlines()]
    suite = ElementTree.parse(place / "report" / "smoke.xml").getroot()
    failures = {}
    for case in suite.iter("testcase"):
        failure = case.find("failure")
        failures[case.attrib["name"]] = None if failure is None else failure.attrib["message"]
    assert int(suite.attrib["failures"]) == sum(1 for message in failures.values() if message)
    return status, calls, failures


def test_all_well(place: Path) -> None:
    status, calls, failures = run(place)
    assert (status, calls) == (0, ["deploy", "verify", "deploy", "remove"])
    assert failures == {"deploy": None, "verify": None, "rerun": None, "remove": None}
    first = (place / "bin" / "calls").read_text().splitlines()[0]
    assert first == "deploy -i inv -e deployment_name=smoke"


def test_a_failed_verb_ends_it_with_the_logs_and_the_removal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bin" / "fail-verify").touch()
    status, calls, failures = run(place)
    assert (status, calls) == (1, ["deploy", "verify", "logs", "remove"])
    assert failures["verify"] == "exit status 7"
    assert "FAILED  verify" in capsys.readouterr().out


def test_a_rerun_that_changes_something_is_red(place: Path) -> None:
    (place / "bin" / "changed").write_text("2")
    status, _, failures = run(place)
    assert status == 1
    assert failures["rerun"] == "the rerun changed 2 task(s) instead of none"


def test_a_verb_that_outlasts_the_budget_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What was started in the background ignores SIGINT, and is ended after that time.
    monkeypatch.setattr(smoke, "END_SECONDS", 2)
    (place / "bin" / "hang-deploy").touch()
    start = time.monotonic()
    status, calls, failures = run(place, "--budget", "1.5")
    assert time.monotonic() - start < 60
    assert (status, calls[-1]) == (1, "remove")
    assert str(failures["deploy"]).startswith("the time budget was spent after")


def test_a_failed_removal_is_red_too(place: Path) -> None:
    (place / "bin" / "fail-remove").touch()
    assert run(place)[0] == 1


def test_keep_leaves_the_deployment(place: Path) -> None:
    assert run(place, "--keep")[1] == ["deploy", "verify", "deploy"]


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ("n0                  : ok=70   changed=0    unreachable=0", 0),
        ("n0 : ok=1 changed=2 x\nn1 : ok=3 changed=4 y", 6),
        ("TASK [x]\nchanged: [n0]", 0),
    ],
)
def test_changed_tasks_are_read_from_the_recap(output: str, count: int) -> None:
    assert smoke.changed_tasks(output) == count
