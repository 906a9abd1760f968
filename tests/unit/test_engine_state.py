"""The truth about processes: parsers on recorded output, the rules of the phases, log ends, a real process tree."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import engine_state as es

# supervisorctl -c conf status, supervisor 4.3.0, recorded 2026-11-21, exit status 3.
SUPERVISOR = """\
dep:grouped                      RUNNING   pid 7061, uptime 0:00:04
exit0                            EXITED    Nov 21 12:01 AM
exit2                            EXITED    Nov 21 12:01 AM
fatal                            FATAL     Exited too quickly (process log may have details)
good                             RUNNING   pid 7066, uptime 0:00:04
killed                           EXITED    Nov 21 12:01 AM
nocmd                            FATAL     can't find command '/nonexistent/x'
off                              STOPPED   Not started
starting                         STARTING  
toofast                          BACKOFF   Exited too quickly (process log may have details)
nosuch: ERROR (no such process)
"""  # noqa: W291  (recorded as it was printed)

# systemctl show -p Id,LoadState,ActiveState,SubState,MainPID,NRestarts,ExecMainCode,ExecMainStatus,Result a b c ...,
# in the form that systemd 252 prints; composed, not recorded.
SYSTEMD = """\
Id=run.service
LoadState=loaded
ActiveState=active
SubState=running
MainPID=4711
NRestarts=2
ExecMainCode=0
ExecMainStatus=0
Result=success

Id=again.service
LoadState=loaded
ActiveState=activating
SubState=auto-restart
MainPID=0
NRestarts=7
ExecMainCode=1
ExecMainStatus=1
Result=exit-code

Id=oom.service
LoadState=loaded
ActiveState=failed
SubState=failed
MainPID=0
NRestarts=0
ExecMainCode=2
ExecMainStatus=9
Result=oom-kill

Id=off.service
LoadState=loaded
ActiveState=inactive
SubState=dead
MainPID=0
NRestarts=0
ExecMainCode=2
ExecMainStatus=15
Result=success

Id=nosuch.service
LoadState=not-found
ActiveState=inactive
SubState=dead
MainPID=0
NRestarts=0
ExecMainCode=0
ExecMainStatus=0
Result=success
"""


@pytest.mark.parametrize(
    ("name", "state", "pid", "uptime", "note"),
    [
        ("dep:grouped", es.RUNNING, 7061, 4.0, ""),
        ("grouped", es.RUNNING, 7061, 4.0, ""),
        ("fatal", es.FAILED, 0, None, "Exited too quickly (process log may have details)"),
        ("nocmd", es.FAILED, 0, None, "can't find command '/nonexistent/x'"),
        ("exit2", es.FAILED, 0, None, "Nov 21 12:01 AM"),
        ("off", es.STOPPED, 0, None, "Not started"),
        ("starting", es.STARTING, 0, None, ""),
        ("toofast", es.RESTARTING, 0, None, "Exited too quickly (process log may have details)"),
        ("nosuch", es.ABSENT, 0, None, ""),
    ],
)
def test_supervisor_4_3_0_recorded_2026_11_21(name, state, pid, uptime, note):
    found = es.parse_supervisor(SUPERVISOR)[name]
    assert (found.state, found.pid, found.uptime, found.note) == (state, pid, uptime, note)


def test_supervisor_uptime_of_days():
    line = "a    RUNNING   pid 12, uptime 3 days, 1:02:03"
    assert es.parse_supervisor(line)["a"].uptime == ((3 * 24 + 1) * 60 + 2) * 60 + 3


@pytest.mark.parametrize(
    "text", ["", "unix:///tmp/s.sock no such file", "error: <class 'xmlrpc.client.Fault'>, <Fault 6: 'SHUTDOWN_STATE'>"]
)
def test_supervisor_that_does_not_answer_gives_no_process(text):
    assert es.parse_supervisor(text) == {}


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [(0, es.STOPPED, "exit status 0"), (2, es.FAILED, "exit status 2"), (-1, es.FAILED, "ended by a signal")],
)
def test_supervisor_exit_status_tells_an_end_from_a_failure(code, state, words):
    found = es.add_supervisor_info(es.parse_supervisor(SUPERVISOR)["exit2"], {"exitstatus": code, "pid": 0})
    assert (found.state, found.exit) == (state, words)


@pytest.mark.parametrize(
    ("unit", "raw", "state", "restarts", "words"),
    [
        ("run.service", "active (running)", es.RUNNING, 2, None),
        ("again.service", "activating (auto-restart)", es.RESTARTING, 7, "exit status 1"),
        ("oom.service", "failed (failed)", es.FAILED, 0, "killed by SIGKILL by the kernel's OOM killer"),
        ("off.service", "inactive (dead)", es.STOPPED, 0, "killed by SIGTERM"),
        ("nosuch.service", "not-found", es.ABSENT, None, None),
    ],
)
def test_systemctl_show(unit, raw, state, restarts, words):
    found = es.parse_systemctl(SYSTEMD)[unit]
    assert (found.raw, found.state, found.restarts, found.exit) == (raw, state, restarts, words)


REFUSED, OPEN, TIMEOUT, NONE = es.Probe("refused"), es.Probe("open"), es.Probe("timeout"), es.Probe("none")


def status(code):
    return es.Probe("status", code)


@pytest.mark.parametrize(
    ("manager", "alive", "kind", "probe", "ever", "phase"),
    [
        (es.ABSENT, False, "vllm", NONE, False, "absent"),
        (es.STOPPED, False, "vllm", NONE, False, "stopped"),
        (es.STOPPING, True, "vllm", status(200), True, "stopped"),
        (es.FAILED, False, "vllm", NONE, False, "failed"),
        (es.RESTARTING, False, "vllm", NONE, False, "crash_looping"),
        (es.STARTING, True, "vllm", status(200), False, "starting"),
        (es.RUNNING, False, "vllm", NONE, False, "failed"),
        (es.RUNNING, True, "vllm", REFUSED, False, "loading"),
        (es.RUNNING, True, "vllm", REFUSED, True, "unhealthy"),
        (es.RUNNING, True, "vllm", status(200), False, "ready"),
        (es.RUNNING, True, "vllm", status(503), False, "unhealthy"),
        (es.RUNNING, True, "vllm", TIMEOUT, False, "unhealthy"),
        (es.RUNNING, True, "sglang", REFUSED, False, "loading"),
        (es.RUNNING, True, "sglang", status(503), False, "loading"),
        (es.RUNNING, True, "sglang", status(503), True, "unhealthy"),
        (es.RUNNING, True, "sglang", status(200), False, "ready"),
        (es.RUNNING, True, "sglang", TIMEOUT, False, "unhealthy"),
        (es.RUNNING, True, "http", status(404), False, "unhealthy"),
        (es.RUNNING, True, "tcp", OPEN, False, "ready"),
        (es.RUNNING, True, "tcp", REFUSED, False, "loading"),
        (es.RUNNING, True, "none", NONE, False, "ready"),
    ],
)
def test_phase(manager, alive, kind, probe, ever, phase):
    assert es.phase(manager, alive, kind, probe, ever) == phase


def test_a_stranger_on_the_port_is_not_taken_for_a_ready_engine():
    facts = es.Facts(es.Managed("RUNNING", es.RUNNING, 5), status(200), stranger=77, port=8000)
    assert es.decide(facts, True, "vllm") == (
        "unhealthy",
        "port 8000 is held by process 77, which is not part of this one: end it",
    )


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        ("\x1b[32mINFO\x1b[0m ok", "INFO ok"),
        (" 10%|#  |\r 99%|## |\r100%|###|", "100%|###|"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ********"),
        ("sent bearer abc123 to", "sent bearer ******** to"),
        (
            "non-default args: {'api_key': ['sk-a', 'b'], 'max_tokens': 5}",
            "non-default args: {'api_key': ********, 'max_tokens': 5}",
        ),
        ("GET /?token=abc&x=1", "GET /?token=********&x=1"),
        ("vllm serve --api-key abc --port 1", "vllm serve --api-key ******** --port 1"),
        ("max_tokens=100 num_tokens: 7", "max_tokens=100 num_tokens: 7"),
        ("using hf_abcdefghijklmnopqrst", "using ********"),
    ],
)
def test_log_lines_are_cleaned(line, clean):
    assert es.clean_line(line) == clean


@pytest.mark.parametrize("block", [1, 7, 65536])
def test_tail_reads_the_end_in_blocks(tmp_path, block):
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"x" * 50 + b"\n\xff bad byte\nsecond last\nlast without newline")
    assert es.tail(log, 3, block=block) == ["\ufffd bad byte", "second last", "last without newline"]
    assert es.tail(log, 99, block=block)[0] == "first"
    assert es.tail(log, 0) == []
    assert es.tail(tmp_path / "missing", 3) == []


def test_tail_of_a_huge_line_is_bounded(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 300_000)
    assert [len(line) for line in es.tail(log, 5, block=1000, limit=10_000)] == [es.LINE_LIMIT + 3]


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if self.path == "/dead" else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd.server_address[1]
        httpd.shutdown()


def test_probe_of_real_ports(server):
    def ask(kind="vllm", path="/health", port=server):
        return es.probe({"kind": kind, "host": "0.0.0.0", "port": port, "path": path}, 0.3)

    assert ask() == status(200)
    assert ask(path="/dead") == status(503)
    assert ask("tcp") == OPEN
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        assert ask(port=unheard.getsockname()[1]) == REFUSED
        unheard.listen()
        assert ask(port=unheard.getsockname()[1]) == TIMEOUT


@pytest.fixture
def child(tmp_path):
    env = {
        **os.environ,
        "STEPLADDER_DEPLOYMENT": str(tmp_path / "d"),
        "STEPLADDER_PROCESS": "a",
        "STEPLADDER_FINGERPRINT": "0123456789abcdef",
    }
    # As vLLM's engine core does, which writes its title over its environment.
    code = "import subprocess as s; p = s.Popen(['sleep', '60'], env={}); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as started:
        grandchild = int(started.stdout.readline())
        yield started.pid, grandchild
        os.kill(grandchild, 9)


def test_a_deployment_of_the_same_name_elsewhere_is_left_alone(tmp_path, child):
    """Its processes are nobody's orphans here: ending them would end another site's engine."""
    pid, grandchild = child
    other = tmp_path / "elsewhere" / "d"
    (other / "releases" / "p1").mkdir(parents=True)
    (other / "current").symlink_to("releases/p1")
    asked = {"name": "a", "unit": "u", "health": {"kind": "none"}}
    (mine,) = es.look(str(tmp_path / "d"), {"u": es.Managed("STOPPED", es.STOPPED, 0)}, [asked], 5, 0.3)
    (others,) = es.look(str(other), {"u": es.Managed("STOPPED", es.STOPPED, 0)}, [asked], 5, 0.3)
    assert sorted(mine["orphans"]) == sorted([pid, grandchild])
    assert others["orphans"] == []


def test_look_at_a_real_process(tmp_path, child):
    pid, grandchild = child
    root = tmp_path / "d"
    (root / "releases" / "p1").mkdir(parents=True)
    (root / "current").symlink_to("releases/p1")
    asked = {"name": "a", "unit": "u", "health": {"kind": "none"}, "wanted_fingerprint": "other"}
    (state,) = es.look(str(root), {"u": es.Managed("RUNNING", es.RUNNING, pid)}, [asked], 5, 0.3)
    assert (state["phase"], state["fingerprint"], state["outdated"]) == ("ready", "0123456789abcdef", True)
    assert state["release"] == "p1"
    assert state["orphans"] == []
    assert state["rss_bytes"] > 1_000_000
    assert 0 <= state["since"] < 60
    assert state["work"]["read"] > 0
    assert state["work"]["cpu"] > 0
    assert state["work"]["rss"] >= state["rss_bytes"]
    assert es.work_of([pid], {}, tmp_path) == {"read": 0, "cpu": 0, "rss": 0}, "one that ended meanwhile"
    # The manager is gone, its processes are not.
    (lost,) = es.look(str(root), {"u": es.Managed(es.UNREACHABLE, es.STOPPED, note="no socket")}, [asked], 5, 0.3)
    assert (lost["phase"], lost["orphans"], lost["outdated"]) == ("stopped", sorted([pid, grandchild]), None)
    assert lost["detail"].startswith("the process manager does not answer (no socket); left over from an earlier start")


def test_one_that_wrote_nothing_yet_has_not_the_last_words_of_the_one_before(tmp_path, child):
    log = tmp_path / "a.log"
    log.write_text("stepladder: starting a at 10:00\nEngineDeadError\nstepladder: starting a at 10:01\n")
    asked = {"name": "a", "unit": "u", "health": {"kind": "none"}, "log": str(log)}
    (state,) = es.look(str(tmp_path / "d"), {"u": es.Managed("RUNNING", es.RUNNING, child[0])}, [asked], 5, 0.3)
    assert state["log_tail"] == ["stepladder: starting a at 10:01"]


def test_a_process_that_is_gone_is_failed_whatever_the_manager_says(tmp_path):
    asked = {"name": "a", "unit": "u", "health": {"kind": "vllm", "port": 1}}
    (state,) = es.look(str(tmp_path), {"u": es.Managed("RUNNING", es.RUNNING, 2**22 + 1)}, [asked], 5, 0.3)
    assert (state["phase"], state["running"]) == ("failed", False)
    assert state["detail"] == "the process manager says RUNNING, but process 4194305 is gone"


def test_the_port_of_another_process_is_seen(server):
    table = es.process_table()
    assert es.stranger_on_port(server, [1], table) == os.getpid()
    assert es.stranger_on_port(server, [os.getpid()], table) == 0


def test_the_processes_of_a_container_are_known_by_its_control_group(tmp_path):
    """Two control groups as nodes have them (version 1 and 2), one of another container, one process that is gone."""
    container, other = "c" * 64, "d" * 64
    (tmp_path / "a.id").write_text(container)
    groups = {
        1: "0::/init.scope\n",
        2: f"12:pids:/docker/{container}\n11:memory:/docker/{container}\n",
        3: f"0::/system.slice/docker-{container}.scope\n",
        4: f"0::/system.slice/docker-{other}.scope\n",
    }
    for pid, text in groups.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(text)
    assert es.contained(str(tmp_path / "a.id"), [*groups, 5], tmp_path) == [2, 3]
    assert es.contained(str(tmp_path / "none.id"), [*groups], tmp_path) == []
    (tmp_path / "empty.id").write_text("")
    assert es.contained(str(tmp_path / "empty.id"), [*groups], tmp_path) == []


def test_a_manager_that_is_not_there_is_said_so():
    found = es.read_managers("supervisor", ["/nonexistent/supervisorctl"], ["a"], {})
    assert found["a"] == es.Managed(
        "unreachable", es.STOPPED, note="/nonexistent/supervisorctl: No such file or directory"
    )


def test_arguments_are_checked_all_at_once():
    processes = [{"name": "a", "health": {"kind": "vllm"}}, {"name": "b", "health": {"kind": "none"}}]
    assert es.check_arguments("supervisor", [], processes) == [
        "supervisorctl is empty: give the program and its arguments, like [supervisorctl, -c, <file>]",
        "process a: health.kind is vllm, which needs health.port",
    ]


LOG_OF_TWO_STARTS = [
    "stepladder: starting vllm-0 at 2026-11-20T01:00:00Z",
    "ValueError: an old one",
    "stepladder: starting vllm-0 at 2026-11-20T01:05:00Z",
    "INFO loading",
    "ERROR Failed to import from vllm._C: ImportError('libnuma.so.1: cannot open shared object file')",
    "  File x.py, line 3",
    "AttributeError: '_C' object has no attribute 'init'",
    "AttributeError: '_C' object has no attribute 'init'",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
]


@pytest.mark.parametrize(
    ("lines", "errors", "since"),
    [
        (LOG_OF_TWO_STARTS, [LOG_OF_TWO_STARTS[4], LOG_OF_TWO_STARTS[6]], LOG_OF_TWO_STARTS[3:]),
        ([*LOG_OF_TWO_STARTS, "stepladder: starting vllm-0 at x", "INFO"], LOG_OF_TWO_STARTS[4:7:2], ["INFO"]),
        (["INFO fine", "no error here: 0 errors"], [], ["INFO fine", "no error here: 0 errors"]),
        (["Killed"], ["Killed"], ["Killed"]),
        ([], [], []),
    ],
)
def test_the_cause_is_told_from_what_follows_and_one_start_from_another(lines, errors, since):
    assert es.first_errors(lines) == errors
    assert es.since_start(lines) == since
