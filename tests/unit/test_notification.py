"""Messages to chats, against a real HTTP server on loopback that answers as each of them does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stepladder import notification
from stepladder.notification import NotifyError, Settings, check, send

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "7f3a-secret-token"
SECRET = "SECsecretsecret"
RUN = {
    "deployment": "step3", "verb": "redeploy", "who": "ann", "origin": "ops1", "why": "new flags <&>", "plan_id": "abc",
    "nodes": ["n0", "n1"],
}  # fmt: skip


@dataclass
class Chat:
    """A webhook on loopback. answers: status and body of each request in turn, the last for all that follow."""

    url: str
    answers: list[tuple[int, str]]
    got: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] = lambda: None


@pytest.fixture
def chat() -> Iterator[Chat]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.got.append((self.path, json.loads(body)))
            found.before()
            status, text = found.answers[min(len(found.got), len(found.answers)) - 1]
            self.send_response(status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    # A client that gave up is no news.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    found = Chat(f"http://127.0.0.1:{server.server_port}/hook/{TOKEN}?access_token={TOKEN}", [(200, "ok")])
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# What each chat answers to a message that it took, as its documents have it.
TAKEN = {
    "json": (202, ""),
    "slack": (200, "ok"),
    "feishu": (200, '{"StatusCode":0,"StatusMessage":"success","code":0,"data":{},"msg":"success"}'),
    "dingtalk": (200, '{"errcode":0,"errmsg":"ok"}'),
}
START = "[step3] redeploy of release abc begins on n0, n1, by ann from ops1\nwhy: new flags <&>"


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("slack", {"text": START.replace("<&>", "&lt;&amp;&gt;")}),
        ("feishu", {"msg_type": "text", "content": {"text": START}}),
        ("dingtalk", {"msgtype": "text", "text": {"content": START}}),
    ],
)
def test_each_format(chat: Chat, form: str, body: dict[str, Any]) -> None:
    chat.answers = [TAKEN[form]]
    send(Settings(form, chat.url), "start", RUN)
    assert chat.got == [(f"/hook/{TOKEN}?access_token={TOKEN}", body)]


def test_plain_json_has_everything(chat: Chat) -> None:
    chat.answers = [TAKEN["json"]]
    send(Settings("json", chat.url), "end", {**RUN, "outcome": "failed", "exit_status": 20, "seconds": 61.0})
    ((_, body),) = chat.got
    assert body.pop("at").endswith("Z")
    assert body == {
        "format_version": 1, "event": "end", **RUN, "outcome": "failed", "exit_status": 20, "seconds": 61.0,
        "text": "[step3] redeploy of release abc ended RED on n0, n1 after 1 min 1 s: failed, the new release failed, "
        "the one before serves again; by ann from ops1\nwhy: new flags <&>",
    }  # fmt: skip


def test_feishu_signs_in_the_body(chat: Chat) -> None:
    chat.answers = [TAKEN["feishu"]]
    send(Settings("feishu", chat.url, SECRET), "start", RUN)
    body = chat.got[0][1]
    wanted = hmac.new(f"{body['timestamp']}\n{SECRET}".encode(), digestmod=hashlib.sha256).digest()
    assert base64.b64decode(body["sign"]) == wanted
    assert abs(int(body["timestamp"]) - time.time()) < 60


def test_dingtalk_signs_in_the_address(chat: Chat) -> None:
    chat.answers = [TAKEN["dingtalk"]]
    send(Settings("dingtalk", chat.url, SECRET), "start", RUN)
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(chat.got[0][0]).query)
    wanted = hmac.new(SECRET.encode(), f"{query['timestamp'][0]}\n{SECRET}".encode(), hashlib.sha256).digest()
    assert base64.b64decode(query["sign"][0]) == wanted
    assert query["access_token"] == [TOKEN]
    assert abs(int(query["timestamp"][0]) / 1000 - time.time()) < 60


@pytest.mark.parametrize(
    ("form", "answer", "words", "requests"),
    [
        ("feishu", (200, '{"code":19021,"data":{},"msg":"sign match fail or timestamp is not within one hour"}'),
         "error 19021: sign match fail or timestamp is not within one hour", 1),
        ("feishu", (200, '{"StatusCode":9499,"StatusMessage":"Bad Request"}'), "error 9499: Bad Request", 1),
        ("feishu", (200, "<html>proxy</html>"), "it answers '<html>proxy</html>', which is not feishu's", 1),
        ("dingtalk", (200, '{"errcode":310000,"errmsg":"keywords not in content"}'),
         "error 310000: keywords not in content", 1),
        ("dingtalk", (200, "[]"), "it answers '[]', which is not dingtalk's", 1),
        ("slack", (403, "invalid_token"), "HTTP 403: invalid_token", 1),
        ("slack", (200, "<html>sign in</html>"), "it answers '<html>sign in</html>' where Slack answers 'ok'", 1),
        ("json", (404, ""), "HTTP 404", 1),
        ("json", (500, "broken"), "HTTP 500: broken", 3),
        ("json", (429, "slow down"), "HTTP 429: slow down", 3),
    ],
)  # fmt: skip
def test_what_a_chat_refuses_is_a_failure_whatever_its_status(
    chat: Chat, form: str, answer: tuple[int, str], words: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification, "PAUSE_SECONDS", 0.01)
    chat.answers = [answer]
    with pytest.raises(NotifyError) as raised:
        send(Settings(form, chat.url), "start", RUN)
    assert str(raised.value) == words
    assert len(chat.got) == requests


def test_a_second_try_is_enough(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notification, "PAUSE_SECONDS", 0.01)
    chat.answers = [(503, ""), (200, "ok")]
    send(Settings("slack", chat.url), "start", RUN)
    assert len(chat.got) == 2


def test_a_silent_chat_costs_no_more_than_the_deadline(chat: Chat) -> None:
    chat.before = lambda: time.sleep(3)
    begun = time.monotonic()
    with pytest.raises(NotifyError, match=r"^(no answer within 0.3 s|timed out)$"):
        send(Settings("slack", chat.url, seconds=0.3), "start", RUN)
    assert time.monotonic() - begun < 2


def test_nobody_is_led_elsewhere(chat: Chat) -> None:
    chat.answers = [(302, "")]
    chat.headers = {"Location": f"http://127.0.0.1:9/{TOKEN}"}
    with pytest.raises(NotifyError, match=r"^HTTP 302$"):
        send(Settings("json", chat.url), "start", RUN)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://127.0.0.1:9/{TOKEN}", "Connection refused"),
        (f"http://127.0.0.1:9/{TOKEN}\x7f", "the address is not one line that begins with https:// or http://"),
        (f"ftp://h/{TOKEN}", "the address is not one line that begins with https:// or http://"),
    ],
)
def test_no_complaint_has_the_address(url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notification, "PAUSE_SECONDS", 0.01)
    with pytest.raises(NotifyError) as raised:
        send(check({"format": "json", "url": url, "seconds": 5, "events": ["start"]}), "start", RUN)
    assert words in str(raised.value)
    assert TOKEN not in str(raised.value)


def test_an_answer_that_repeats_the_address_is_masked(chat: Chat) -> None:
    chat.answers = [(404, f"no hook /hook/{TOKEN} with {TOKEN}")]
    with pytest.raises(NotifyError) as raised:
        send(Settings("json", chat.url), "start", RUN)
    assert str(raised.value) == "HTTP 404: no hook ******** with ********"
    # Slack's and Feishu's secret is the end of the path, and nowhere else.
    with pytest.raises(NotifyError) as raised:
        send(Settings("json", chat.url.partition("?")[0]), "start", RUN)
    assert str(raised.value) == "HTTP 404: no hook ******** with ********"


GOOD = {"format": "json", "url": "https://h/x", "seconds": 5, "events": ["start"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "teams"}, "notify_format 'teams' is unknown, choose one of: json, slack, feishu, dingtalk"),
        ({"events": ["start", "lunch"]}, "notify_events 'lunch' is unknown, choose of: start, green, red, back, end"),
        ({"seconds": 0}, "notify_seconds is 0, give 1 to 60"),
        ({"secret": "s", "format": "slack"}, "notify_format slack has no signature: take notify_secret_file out"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotifyError) as raised:
        check({**GOOD, **changes})
    assert str(raised.value) == words


def test_settings_show_no_secret_and_survive_the_run(tmp_path: Path) -> None:
    settings = check({**GOOD, "format": "feishu", "url": f"https://h/{TOKEN}", "secret": SECRET})
    assert TOKEN not in repr(settings)
    assert SECRET not in repr(settings)
    settings.write(tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600
    assert Settings.read(tmp_path / "kept") == settings
    assert Settings.read(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("", "[step3] redeploy of release abc is green on n0, n1: it gave the right answers"),
        (
            "n0: 31 tokens/s",
            "[step3] redeploy of release abc is green on n0, n1: it gave the right answers\nn0: 31 tokens/s",
        ),
    ],
)
def test_a_green_gate_is_told_with_what_was_measured(chat: Chat, reason: str, text: str) -> None:
    chat.answers = [TAKEN["json"]]
    send(
        check({"format": "json", "url": chat.url, "seconds": 5, "events": ["green"]}),
        "green",
        {**RUN, "reason": reason},
    )
    assert chat.got[0][1]["text"] == text


def test_an_event_that_is_not_wanted_is_not_sent(chat: Chat) -> None:
    send(Settings("slack", chat.url, events=("end",)), "start", RUN)
    assert chat.got == []


# --- a real run ------------------------------------------------------------------------------------------------------

PLAY = """
- hosts: localhost
  gather_facts: false
  vars:
    deployment_name: step3
    lease_verb: redeploy
    lease_plan_id: abc
    lease_why: "because"
  tasks:
    - ansible.builtin.include_role: {name: lease}
      when: changes | bool
    - stepladder.core.notify:
        event: red
        deployment: step3
        reason: "n0: token=abcdefgh12345"
    - ansible.builtin.assert:
        that: good | bool
"""


@dataclass
class Runner:
    """Runs a play with the project's own roles and callback."""

    folder: Path

    def __call__(self, *variables: str) -> str:
        (self.folder / "play.yml").write_text(PLAY)
        more = [
            word
            for variable in (f"stepladder_state_directory={self.folder}/state", *variables)
            for word in ("-e", variable)
        ]
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local", "-vvv"]
        environ = {
            "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", "HOME": str(self.folder),
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(REPOSITORY / "roles"),
            "XDG_STATE_HOME": str(self.folder / "xdg"), "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        done = subprocess.run(
            [*command, *more, str(self.folder / "play.yml"), "-e", f"ansible_python_interpreter={sys.executable}"],
            cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_a_run_tells_its_beginning_its_failure_and_its_end_and_no_secret(
    chat: Chat, runner: Runner, tmp_path: Path
) -> None:
    chat.answers = [TAKEN["json"]]
    file = tmp_path / "hook"
    file.write_text(chat.url + "\n")
    file.chmod(0o600)
    output = runner("changes=true", "good=false", f"notify_url_file={file}")
    events = [body["event"] for _, body in chat.got]
    assert events == ["start", "red", "end"], output
    start, red, end = (body for _, body in chat.got)
    assert (start["verb"], start["plan_id"], start["why"], start["nodes"]) == (
        "redeploy",
        "abc",
        "because",
        ["localhost"],
    )
    assert red["reason"] == "n0: token=********"
    assert red["text"] == "[step3] redeploy of release abc is RED on localhost\nn0: token=********"
    assert (end["outcome"], end["exit_status"]) == ("failed", 0)
    assert TOKEN not in output
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert [str(path) for path in kept if TOKEN in path.read_text(errors="replace")] == []


def test_a_run_that_changes_nothing_sends_nothing_and_one_tells_only_what_is_wanted(
    chat: Chat, runner: Runner, tmp_path: Path
) -> None:
    file = tmp_path / "hook"
    file.write_text(chat.url)
    file.chmod(0o600)
    runner("changes=false", "good=true", f"notify_url_file={file}")
    assert chat.got == []
    (tmp_path / "vault.yml").write_text(f"notify_url: {chat.url}\n")
    output = runner("changes=true", "good=true", f"@{tmp_path}/vault.yml", '{"notify_events": ["end"]}')
    assert [body["event"] for _, body in chat.got] == ["end"]
    assert TOKEN not in output


def test_what_keeps_a_run_from_telling_fails_nothing(chat: Chat, runner: Runner, tmp_path: Path) -> None:
    file = tmp_path / "hook"
    file.write_text(chat.url)
    file.chmod(0o644)
    output = runner("changes=true", "good=true", f"notify_url_file={file}")
    mend = f"run: chmod 0400 {file}, or encrypt it with ansible-vault"
    refused = (
        f"The chat was not told, the run goes on: notify_url_file {file} is readable by others (mode 0644): {mend}"
    )
    assert refused in output
    assert "failed=0" in output
    assert chat.got == []
    file.unlink()
    gone = runner("changes=true", "good=true", f"notify_url_file={file}")
    assert f"notify_url_file {file}: No such file or directory: name a readable file on the controller" in gone
    assert "failed=0" in gone
