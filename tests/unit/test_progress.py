"""Progress of long modules and the wait for engines: what is shown when, and a real run through ansible-playbook."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressLines, intervals, parse_deadline
from ansible_collections.stepladder.core.plugins.plugin_utils.readiness import Readiness

REPOSITORY = Path(__file__).parents[2]


def test_progress_file_is_throttled_and_whole(tmp_path):
    now = [0.0]
    file = ProgressFile(str(tmp_path / "p"), interval=1.0, clock=lambda: now[0])
    assert file.write("one\n  two") is True
    assert (tmp_path / "p").read_text() == "one two\n"
    now[0] = 0.5
    assert file.write("too soon") is False
    assert file.write("forced", force=True) is True
    now[0] = 1.6
    assert file.write("forced") is False
    assert file.write("later") is True
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_progress_file_never_fails_the_work(tmp_path):
    assert ProgressFile(None).write("x") is False
    assert ProgressFile(str(tmp_path / "missing" / "p")).write("x") is False


def test_lines_show_changes_at_most_every_5_s_and_a_heartbeat_every_30_s():
    lines = ProgressLines()
    said = [
        (0.5, ""), (2, "a"), (4, "b"), (8, "b"), (12, "b"), (30, "b"), (38, "b"), (40, "c"), (44, "c"), (80, "c"),
    ]  # fmt: skip
    shown = [(elapsed, line) for elapsed, text in said if (line := lines.next(text, elapsed))]
    assert shown == [(2, "a"), (8, "b"), (38, "b (38 s)"), (44, "c"), (80, "c (80 s)")]
    assert ProgressLines().next("", 31) == "at work (31 s)"


def test_looks_get_rarer_once_a_short_job_would_have_ended():
    found = [round(interval, 2) for interval in islice(intervals(), 22)]
    assert found == [0.5, 0.75, *[1.0] * 14, 1.5, 2.25, 3.38, 5.0, 5.0, 5.0]
    assert list(islice(intervals(first=2.0), 3)) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("value", ["soon", 0, -5, None])
def test_a_bad_deadline_is_refused(value):
    with pytest.raises(AnsibleActionFail, match=f"progress_deadline is {value!r}: give a number of seconds"):
        parse_deadline(value)


def state(phase, pid=1, name="vllm-0", **more):
    return {
        "name": name,
        "phase": phase,
        "pid": pid,
        "restarts": None,
        "detail": "why",
        "log_tail": [],
        "since": 2,
        **more,
    }


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([state("loading"), state("ready")], ""),
        ([state("loading"), state("loading")], None),
        ([state("unhealthy"), state("ready")], ""),
        (
            [state("failed", pid=0, exit="exit status 1")],
            "vllm-0 failed: phase failed, why\n  last exit: exit status 1",
        ),
        ([state("loading", 1), state("crash_looping", 0), state("loading", 2), state("ready", 2)], ""),
        (
            [state("loading", 1), state("loading", 2), state("loading", 3)],
            "vllm-0 was started again 2 times (1 allowed): phase loading, why\n  last exit: unknown",
        ),
        (
            [state("crash_looping", 0), state("crash_looping", 0)],
            "vllm-0 ends right after each start: phase crash_looping, why\n  last exit: unknown",
        ),
        ([state("starting", restarts=4), state("loading", restarts=5)], None),
        (
            [state("starting", restarts=4), state("loading", restarts=6)],
            "vllm-0 was started again 2 times (1 allowed): phase loading, why\n  last exit: unknown",
        ),
        ([state("stopped", 0), state("stopped", 0), state("ready", 1)], ""),
        (
            [state("stopped", 0)] * 3,
            "vllm-0 does not run and nothing starts it: phase stopped, why\n  last exit: unknown",
        ),
    ],
)
def test_verdict_of_a_wait(looks, expected):
    wait = Readiness(deadline=100, allowed_restarts=1)
    verdicts = [wait.verdict([look], 1.0) for look in looks]
    assert verdicts[-1] == expected
    assert verdicts[:-1] == [None] * (len(looks) - 1)


def test_deadline_names_every_process_that_is_not_ready():
    wait = Readiness(deadline=60, allowed_restarts=1)
    why = "not ready after 61 s (deadline 60 s): phase loading, why"
    slow = state("loading", name="b", log="/l/b.log", log_tail=["loading shard 3"])
    assert wait.verdict([state("ready"), slow], 61) == (
        f"b {why}\n  last exit: unknown\n  last lines of /l/b.log:\n    loading shard 3"
    )


IDLE = {"read": 1e9, "cpu": 100.0, "rss": 4e9}


@pytest.mark.parametrize(
    ("before", "now", "worked"),
    [
        # Two looks, ten seconds apart.
        ({}, {}, False),
        # What looks now and then and only waits.
        ({}, {"work": {"read": 1e9 + 9e5, "cpu": 100.9, "rss": 4e9 - 9e5}}, False),
        ({}, {"work": {**IDLE, "read": 1e9 + 1e6}}, True),
        ({}, {"work": {**IDLE, "cpu": 101.1}}, True),
        ({}, {"work": {**IDLE, "rss": 4.1e9}}, True),
        # A process of it ended.
        ({}, {"work": {**IDLE, "cpu": 60.0}}, True),
        ({}, {"work": None}, True),
        ({"work": None}, {}, True),
        ({"log_tail": ["INFO 11-21 10:00:01 Waiting for 1 core engine"]},
         {"log_tail": ["INFO 11-21 10:00:11 Waiting for 1 core engine"]}, False),
        ({"log_tail": ["10:00:01 shards:  4% 3/82"]}, {"log_tail": ["10:00:11 shards:  5% 4/82"]}, True),
        ({"log_tail": ["a", "b"]}, {"log_tail": ["b", "a"]}, False),
    ],
)  # fmt: skip
def test_signs_of_work_between_two_looks(before, now, worked):
    wait = Readiness(deadline=5400, allowed_restarts=1, progress_deadline=900)
    assert wait.worked([state("loading", **{"work": IDLE, **before})], 10.0) is True
    assert wait.worked([state("loading", **{"work": IDLE, **before, **now})], 20.0) is worked


def test_what_does_nothing_is_given_up_with_its_phase_and_last_line():
    wait = Readiness(deadline=5400, allowed_restarts=1, progress_deadline=900)
    hung = state("loading", log="/l/a.log", log_tail=["connecting to 10.0.0.12:29500"])
    assert wait.verdict([hung], 2000, 899.0) is None
    assert wait.verdict([hung, state("ready", name="b")], 2000, 901.0) == (
        "vllm-0 did nothing for 901 s: no new line in its log, nothing read, no processor time: phase loading, why\n"
        "  last exit: unknown\n  last lines of /l/a.log:\n    connecting to 10.0.0.12:29500"
    )
    assert wait.verdict([state("ready")], 2000, 901.0) == ""
    unlimited = Readiness(deadline=5400, allowed_restarts=1)
    assert unlimited.verdict([hung], 2000, 1999.0) is None


def test_lines_of_a_wait():
    wait = Readiness(deadline=100, allowed_restarts=1)
    shown = []
    for elapsed, phase in ((0, "loading"), (5, "loading"), (16, "loading"), (20, "ready"), (40, "ready")):
        look = [state(phase, since=elapsed, log_tail=["x" * 120])]
        shown += wait.lines(look, elapsed)
        wait.verdict(look, elapsed)
    long = "x" * 97 + "..."
    assert shown == [
        f"vllm-0: loading for 0 s: {long}",
        f"vllm-0: loading for 16 s: {long}",
        "vllm-0: ready for 20 s: why",
    ]


def test_ever_ready_is_of_the_same_process_only():
    wait = Readiness(deadline=100, allowed_restarts=1)
    wait.verdict([state("ready", 1)], 1)
    assert wait.ever_ready("vllm-0") is True
    wait.verdict([state("loading", 2)], 2)
    assert wait.ever_ready("vllm-0") is False


MODULE = """\
#!/usr/bin/python
import os, time
from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils.progress import ProgressFile


def main():
    module = AnsibleModule(
        dict(
            steps=dict(type="int", default=4),
            done=dict(type="path", required=True),
            progress_file=dict(type="path"),
            fail=dict(type="str"),
        ),
        supports_check_mode=True,
    )
    given = module.params
    if os.path.exists(given["done"]):
        module.exit_json(changed=False)
    if module.check_mode:
        module.exit_json(changed=True)
    with open(given["done"] + ".pid", "w") as stream:
        stream.write(str(os.getpid()))
    progress = ProgressFile(given["progress_file"], interval=0.1)
    for step in range(given["steps"]):
        progress.write("step %d" % step)
        time.sleep(0.5)
    if given["fail"]:
        module.fail_json(msg=given["fail"])
    open(given["done"], "w").close()
    module.exit_json(changed=True, answer=42)


main()
"""


@pytest.fixture
def playbook(tmp_path):
    """Starts a playbook of one task of a slow module, on this machine, with a collections path of its own."""
    collections = tmp_path / "collections" / "ansible_collections"
    plugins = collections / "trial" / "slow" / "plugins"
    (plugins / "modules").mkdir(parents=True)
    (plugins / "action").mkdir()
    (plugins / "modules" / "work.py").write_text(MODULE)
    (plugins / "action" / "work.py").write_text((REPOSITORY / "plugins" / "action" / "python_venv.py").read_text())
    (collections / "stepladder").mkdir()
    (collections / "stepladder" / "core").symlink_to(REPOSITORY)
    (tmp_path / "ansible.cfg").touch()
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"),
        "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
        "ANSIBLE_ASYNC_DIR": str(tmp_path / "async"),
    }

    def start(*options, between=None, stderr=subprocess.STDOUT, callback="ansible.builtin.default", **arguments):
        work = {"done": str(tmp_path / "done"), **arguments}
        tasks = [{"name": "Do slow work", "trial.slow.work": work}]
        if between:
            begin = {"name": "Begin", "trial.slow.work": {**work, "begin": True}, "register": "begin"}
            tasks[0]["trial.slow.work"] = {**work, "begun": "{{ begin.begun | default({}) }}"}
            tasks = [begin, {"name": "Something else", "ansible.builtin.command": between}, *tasks]
        play = tmp_path / "play.yml"
        play.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
        ansible = Path(sys.executable).with_name("ansible-playbook")
        command = [
            ansible,
            "-v",
            "-i",
            "localhost,",
            "-c",
            "local",
            "-e",
            f"ansible_python_interpreter={sys.executable}",
        ]
        return subprocess.Popen(
            [*command, *options, play], env={**environment, "ANSIBLE_STDOUT_CALLBACK": callback}, text=True,
            stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip

    return start


def finished(process):
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def left_over(tmp_path):
    return sorted(path.name for path in (tmp_path / "async").glob("*"))


def test_a_long_module_shows_its_progress_and_gives_its_result(playbook, tmp_path):
    assert '"changed": true' in finished(playbook("--check"))[1]
    assert not (tmp_path / "done").exists()
    code, out = finished(playbook(steps=4))
    assert code == 0, out
    assert "  localhost | Do slow work: step " in out
    assert '"answer": 42' in out
    assert "ansible_job_id" not in out
    assert left_over(tmp_path) == []
    code, out = finished(playbook())
    assert (code, "changed=0" in out, "Do slow work: step" in out) == (0, True, False)


def test_progress_keeps_out_of_the_answer_of_a_verb_that_reads(playbook):
    process = playbook(steps=4, stderr=subprocess.PIPE, callback="stepladder.core.quiet")
    out, said = process.communicate(timeout=120)
    assert (process.returncode, "Do slow work: step" in out) == (0, False)
    assert "  localhost | Do slow work: step " in said


def test_a_failure_comes_through_with_the_modules_own_message(playbook, tmp_path):
    code, out = finished(playbook(steps=1, fail="the disk is full"))
    assert code == 2
    assert '"msg": "the disk is full"' in out
    assert left_over(tmp_path) == []
    code, out = finished(playbook(nonsense=1))
    assert "Unsupported parameters for (trial.slow.work) module: nonsense" in out


def test_a_deadline_ends_the_job(playbook, tmp_path):
    code, out = finished(playbook(steps=200, progress_deadline=2))
    assert code == 2
    assert "(progress_deadline 2 s), ended its job on the node" in out
    assert not alive(tmp_path)


def test_a_job_that_was_begun_is_taken_up_later_in_the_run(playbook, tmp_path):
    code, out = finished(playbook(between="sleep 1", steps=12))
    assert code == 0, out
    assert "  localhost | Do slow work: step " in out
    assert ('"answer": 42' in out, "changed=2" in out) == (True, True)  # the job and the command
    assert left_over(tmp_path) == []
    code, out = finished(playbook(between="true"))
    assert (code, "changed=1" in out, "Do slow work: step" in out) == (0, True, False)


def test_a_job_that_was_begun_fails_where_it_is_taken_up_and_outlives_a_run_that_fails_before(playbook, tmp_path):
    code, out = finished(playbook(between="true", steps=1, fail="the disk is full"))
    assert (code, '"msg": "the disk is full"' in out) == (2, True)
    assert left_over(tmp_path) == []
    code, out = finished(playbook(between="false", steps=4))
    assert (code, "Do slow work: step" in out) == (2, False)
    assert alive(tmp_path)
    wait_for((tmp_path / "done").exists)
    wait_for(lambda: not alive(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_the_job(playbook, tmp_path, number):
    process = playbook(steps=200)
    wait_for((tmp_path / "done.pid").exists)
    time.sleep(1.5)
    process.send_signal(number)
    finished(process)
    wait_for(lambda: not alive(tmp_path))
    wait_for(lambda: left_over(tmp_path) == [])


def alive(tmp_path):
    pid = (tmp_path / "done.pid").read_text()
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    )


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.1)
