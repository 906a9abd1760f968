"""First contact: known_hosts under two writers, and a real SSH server (paramiko's) that takes a password or a key."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import getpass
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
import yaml
from ansible.template import Templar, trust_as_template

from stepladder import first_contact
from stepladder.first_contact import CHANGED, SAME, UNKNOWN, ContactError, HostKey, Server, Wish

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "correct horse"


def new_key() -> paramiko.PKey:
    return paramiko.ECDSAKey.generate()


def written(key: paramiko.PKey) -> HostKey:
    return HostKey(key.get_name(), key.get_base64())


class Doorman(paramiko.ServerInterface):
    """Lets the user in by password, and by the keys in the home's authorized_keys; hangs up as sshd does."""

    def __init__(self, sshd: Sshd, transport: paramiko.Transport) -> None:
        self.home, self.seen, self.ways, self.tries = sshd.home, sshd.seen, sshd.ways, sshd.tries
        self.transport, self.channels = transport, sshd.channels

    def _failed(self) -> int:
        self.tries -= 1
        if not self.tries:
            self.transport.close()
        return paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return self.ways

    def check_auth_password(self, username: str, password: str) -> int:
        self.seen.append(f"password {password}")
        right = password == PASSWORD and "password" in self.ways
        return paramiko.AUTH_SUCCESSFUL if right else self._failed()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.seen.append(f"key {key.get_base64()[-9:]}")
        keys = self.home / ".ssh" / "authorized_keys"
        known = keys.exists() and key.get_base64() in keys.read_text()
        return paramiko.AUTH_SUCCESSFUL if known else self._failed()

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED if self.channels else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command.decode()), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: str) -> None:
        tools = self.home.parent / "tools"
        done = subprocess.run(
            ["/bin/sh", "-c", command], env={"PATH": f"{tools}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
            capture_output=True, check=False,
        )  # fmt: skip
        channel.sendall(done.stdout)
        channel.sendall_stderr(done.stderr)
        channel.send_exit_status(done.returncode)
        channel.close()


class Sshd:
    """An SSH server on a free port of loopback, whose commands see a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.key, self.ways, self.seen, self.tries = new_key(), "password,publickey", list[str](), 6
        self.channels = True
        self.home = folder / "home"
        self.home.mkdir()
        tools = folder / "tools"
        tools.mkdir()
        (tools / "getent").write_text(f"#!/bin/sh\necho {getpass.getuser()}:x:0:0::{self.home}:/bin/sh\n")
        (tools / "chown").write_text("#!/bin/sh\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.at = Server("127.0.0.1", self.listening.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                wire, _ = self.listening.accept()
            except OSError:
                return
            transport = paramiko.Transport(wire)
            transport.add_server_key(self.key)
            transport.start_server(server=Doorman(self, transport), event=threading.Event())


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    server = Sshd(tmp_path)
    yield server
    server.listening.close()


@pytest.fixture
def wish(tmp_path: Path) -> Wish:
    key = new_key()
    key.write_private_key_file(str(tmp_path / "id"))
    user = getpass.getuser()
    return Wish(user, user, f"{key.get_name()} {key.get_base64()} op@desk", tmp_path / "id", sudo=False)


def take_in(sshd: Sshd, known_hosts: Path, wish: Wish, password: str = PASSWORD, **how: Any) -> list[str]:
    return first_contact.take_in(sshd.at, known_hosts, wish, lambda: password, **{"apply": True, **how})


def test_nothing_is_sent_to_a_server_that_is_not_pinned(sshd: Sshd, tmp_path: Path, wish: Wish) -> None:
    seen = first_contact.look(sshd.at, tmp_path / "known_hosts")
    assert (seen.state, seen.key) == (UNKNOWN, written(sshd.key))
    with pytest.raises(ContactError, match=r"is not pinned; nothing was sent to it"):
        take_in(sshd, tmp_path / "known_hosts", wish)
    assert sshd.seen == []


def test_the_key_is_put_there_once(sshd: Sshd, tmp_path: Path, wish: Wish) -> None:
    known_hosts = tmp_path / "known_hosts"
    assert first_contact.pin(known_hosts, sshd.at.name, written(sshd.key))
    (sshd.home / ".ssh").mkdir()
    keys = sshd.home / ".ssh" / "authorized_keys"
    keys.write_text("ssh-ed25519 AAAA other")  # without an end
    expected = [f"put the key into {keys}"]
    assert take_in(sshd, known_hosts, wish, apply=False) == expected
    assert keys.read_text() == "ssh-ed25519 AAAA other"
    assert take_in(sshd, known_hosts, wish) == expected
    assert keys.read_text() == f"ssh-ed25519 AAAA other\n{wish.public_key}\n"
    assert keys.stat().st_mode & 0o777 == 0o600
    sshd.seen.clear()
    assert take_in(sshd, known_hosts, wish, password="") == []
    assert [each.split()[0] for each in sshd.seen] == ["key"], "with the key there no password is needed"


def crowd_agent(monkeypatch: pytest.MonkeyPatch, *last: paramiko.PKey) -> None:
    """Give the agent six keys that no server knows, and these behind them."""
    keys = (*(new_key() for _ in range(6)), *last)
    monkeypatch.setattr(paramiko.Agent, "get_keys", lambda _self: keys)


@pytest.mark.parametrize("tries", [4, 6])
def test_many_keys_in_the_agent_leave_room_for_the_password(
    sshd: Sshd, tmp_path: Path, wish: Wish, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    sshd.tries = tries
    first_contact.pin(tmp_path / "known_hosts", sshd.at.name, written(sshd.key))
    own = paramiko.PKey.from_path(str(tmp_path / "id"))
    crowd_agent(monkeypatch, own)
    assert len(take_in(sshd, tmp_path / "known_hosts", wish)) == 1
    assert sshd.seen[0] == f"key {own.get_base64()[-9:]}"
    assert [each.split()[0] for each in sshd.seen] == ["key", "key", "key", "password"]


def test_the_operators_key_is_tried_first_where_only_the_agent_has_it(
    sshd: Sshd, tmp_path: Path, wish: Wish, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_contact.pin(tmp_path / "known_hosts", sshd.at.name, written(sshd.key))
    take_in(sshd, tmp_path / "known_hosts", wish)
    sshd.seen.clear()
    own = paramiko.PKey.from_path(str(tmp_path / "id"))
    crowd_agent(monkeypatch, own)
    take_in(sshd, tmp_path / "known_hosts", dataclasses.replace(wish, private_key=None), password="")
    assert sshd.seen == [f"key {own.get_base64()[-9:]}"]


@pytest.mark.parametrize("tries", [2, 3])
def test_a_server_that_hangs_up_is_told(
    sshd: Sshd, tmp_path: Path, wish: Wish, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    sshd.tries = tries
    first_contact.pin(tmp_path / "known_hosts", sshd.at.name, written(sshd.key))
    crowd_agent(monkeypatch)
    with pytest.raises(
        ContactError, match=r"hung up while \w+ was logging in: .*\(MaxAuthTries\).*SSH_AUTH_SOCK= before"
    ):
        take_in(sshd, tmp_path / "known_hosts", wish)


def test_a_changed_host_key_is_refused_before_anything_is_sent(sshd: Sshd, tmp_path: Path, wish: Wish) -> None:
    known_hosts = tmp_path / "known_hosts"
    first_contact.pin(known_hosts, sshd.at.name, written(sshd.key))
    before, sshd.key = known_hosts.read_text(), new_key()
    assert first_contact.look(sshd.at, known_hosts).state == CHANGED
    with pytest.raises(ContactError, match=r"^THE HOST KEY OF \[127\.0\.0\.1\]:\d+ HAS CHANGED\. It shows SHA256:"):
        take_in(sshd, known_hosts, wish)
    with pytest.raises(ContactError, match="HAS CHANGED"):
        first_contact.pin(known_hosts, sshd.at.name, written(sshd.key))
    assert (sshd.seen, known_hosts.read_text()) == ([], before)


def test_refusals_say_what_to_do(sshd: Sshd, tmp_path: Path, wish: Wish) -> None:
    known_hosts = tmp_path / "known_hosts"
    first_contact.pin(known_hosts, sshd.at.name, written(sshd.key))
    with pytest.raises(ContactError, match=r"refuses the password of "):
        take_in(sshd, known_hosts, wish, password="wrong")
    with pytest.raises(ContactError, match=r"no password is known\. Give one at the prompt, or a file"):
        take_in(sshd, known_hosts, wish, password="")
    sshd.ways = "publickey"
    with pytest.raises(ContactError, match=r"takes no passwords for \w+, only: publickey"):
        take_in(sshd, known_hosts, wish)
    sshd.listening.close()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = Server("127.0.0.1", gone.getsockname()[1])
    with pytest.raises(ContactError, match=r"cannot be reached: Connection refused"):
        first_contact.look(nobody, known_hosts)


def test_a_server_that_lets_nothing_be_run_is_told(sshd: Sshd, tmp_path: Path, wish: Wish) -> None:
    sshd.channels = False
    first_contact.pin(tmp_path / "known_hosts", sshd.at.name, written(sshd.key))
    with pytest.raises(ContactError, match=r"lets nothing be run: .*Administratively prohibited"):
        take_in(sshd, tmp_path / "known_hosts", wish)


def test_what_fails_on_the_server_is_told(sshd: Sshd, tmp_path: Path, wish: Wish) -> None:
    known_hosts = tmp_path / "known_hosts"
    first_contact.pin(known_hosts, sshd.at.name, written(sshd.key))
    sshd.home.rmdir()
    sshd.home.write_text("no directory")
    with pytest.raises(ContactError, match=r"On \[127\.0\.0\.1\]:\d+, as \w+: mkdir: cannot create directory"):
        take_in(sshd, known_hosts, wish)


def test_many_writers_of_known_hosts(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    path.write_text("# mine, without an end")
    keys = {f"198.18.0.{number}": written(new_key()) for number in range(24)}
    script = (
        "import sys; from pathlib import Path; from stepladder.first_contact import HostKey, pin\n"
        "for line in sys.stdin: pin(Path(sys.argv[1]), line.split()[0], HostKey(*line.split()[1:]))"
    )
    lines = [f"{name} {key.kind} {key.body}\n" for name, key in keys.items()]

    def run(own: list[str]) -> None:
        environ = {**os.environ, "PYTHONPATH": str(Path(first_contact.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", script, path], input="".join(own), text=True, check=True, env=environ)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [lines[:12], lines[12:], lines[::2], lines]))
    text = path.read_text().splitlines()
    assert text[0] == "# mine, without an end"
    assert sorted(text[1:]) == sorted(line.rstrip() for line in lines)
    assert all(
        first_contact.judge(key, first_contact.pinned_keys(path, name)).state == SAME for name, key in keys.items()
    )
    assert sorted(one.name for one in tmp_path.iterdir()) == [".known_hosts.lock", "known_hosts"]


def test_a_writer_of_known_hosts_waits_for_the_other(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    with (tmp_path / ".known_hosts.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=first_contact.pin, args=(path, "198.18.0.1", written(new_key())))
        writer.start()
        writer.join(0.5)
        assert not path.exists()
    writer.join(10)
    assert len(path.read_text().splitlines()) == 1


BROKEN = {
    "a line that is cut": b"198.18.0.1 ssh-ed25519 AAAAC\n",
    "no text": b"198.18.0.1\xe4 ssh-ed25519 AAAA\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_known_hosts_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    path.write_bytes(content)
    with pytest.raises(ContactError, match=f"{path} cannot be read as a known_hosts file: .*take the line out"):
        first_contact.pinned_keys(path, "198.18.0.1")
    with pytest.raises(ContactError, match="Is a directory"):
        first_contact.pinned_keys(tmp_path, "198.18.0.1")


def test_a_known_hosts_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "known_hosts"
    with pytest.raises(ContactError, match=f"The host key cannot be pinned in {path}: .*bootstrap_known_hosts"):
        first_contact.pin(path, "198.18.0.1", written(new_key()))
    with pytest.raises(ContactError, match=f"What was shown cannot be kept in {path}: .*bootstrap_known_hosts"):
        first_contact.keep_shown(path, {"198.18.0.1": "SHA256:x"})


@pytest.mark.parametrize(
    "server", [Server("a" * 70 + ".example"), Server("127.0.0.1", 70000), Server("[::1]", 1)],
    ids=["a label too long", "no port", "an address in brackets"],
)  # fmt: skip
def test_an_address_that_cannot_be_is_told(server: Server) -> None:
    with pytest.raises(ContactError, match="cannot be reached: "), first_contact.connected(server):
        pass


@pytest.mark.parametrize(
    ("files", "asked"), [(["f", ""], True), (["", "f"], True), (["f", "f"], False), (["f", None], True)]
)
def test_a_password_is_asked_for_where_any_servers_has_no_file(files: list[str | None], asked: bool) -> None:
    """The task runs once, and its condition by itself would be that of the first server."""
    (task,) = [one for one in yaml.safe_load((ROOT / "roles/bootstrap/tasks/main.yml").read_text())
               if one["name"].startswith("Ask for the password")]  # fmt: skip
    *_, kept = yaml.safe_load((ROOT / "roles/bootstrap/tasks/accept.yml").read_text())
    own = {name: trust_as_template(text) for name, text in kept["ansible.builtin.set_fact"].items() if "asks" in name}
    variables = {
        f"n{number}": Templar(None, {"bootstrap_password_file": file}).template(own)
        for number, file in enumerate(files)
    }
    every = {"hostvars": variables, "ansible_play_hosts_all": list(variables), "bootstrap_password_file": files[0]}
    assert Templar(None, every).evaluate_conditional(trust_as_template(task["when"])) is asked


def test_files_that_are_no_text_are_named_without_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"h\xe4nter2\n")
    path.chmod(0o600)
    with pytest.raises(ContactError, match=f"The password file {path} is not UTF-8") as told:
        first_contact.password_of(str(path))
    assert "nter2" not in str(told.value)
    with pytest.raises(ContactError, match=f"{path} is no public key"):
        first_contact.public_key(str(path), "", tmp_path)


def test_ssh_is_given_a_known_hosts_whose_path_has_spaces(sshd: Sshd, tmp_path: Path) -> None:
    """As the role proves the login, and as it tells the inventory's line: ssh parts an unquoted name at spaces."""
    known_hosts = tmp_path / "my servers" / "known_hosts"
    first_contact.pin(known_hosts, sshd.at.name, written(sshd.key))
    prove, say = yaml.safe_load((ROOT / "roles/bootstrap/tasks/prove.yml").read_text())
    line = say["stepladder.core.show"]["text"].splitlines()[1].strip()
    for option in (prove["vars"]["ansible_ssh_extra_args"], yaml.safe_load(line)["ansible_ssh_common_args"]):
        words = shlex.split(option.replace("{{ bootstrap_known_hosts }}", str(known_hosts)))
        done = subprocess.run(
            ["ssh", "-p", str(sshd.at.port), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", *words,
             "127.0.0.1"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert "Permission denied" in done.stderr, done.stderr


def test_hashed_names_are_found(tmp_path: Path) -> None:
    key = new_key()
    name = paramiko.HostKeys.hash_host("198.18.0.1")
    (tmp_path / "known_hosts").write_text(f"{name} {key.get_name()} {key.get_base64()}\n")
    assert first_contact.pinned_keys(tmp_path / "known_hosts", "198.18.0.1") == [written(key)]


def test_a_fingerprint_is_the_one_that_ssh_keygen_prints(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    kind, body, *_ = (tmp_path / "id.pub").read_text().split()
    told = subprocess.run(["ssh-keygen", "-lf", tmp_path / "id.pub"], capture_output=True, text=True, check=True).stdout
    assert told.split()[1] == HostKey(kind, body).fingerprint


ACCEPTED = {
    "nothing": ([], frozenset(), False),
    "with commas": ("SHA256:a, SHA256:b", frozenset({"SHA256:a", "SHA256:b"}), False),
    "a list": (["SHA256:a"], frozenset({"SHA256:a"}), False),
    "shown": ("shown", frozenset(), True),
}


@pytest.mark.parametrize(("wished", "fingerprints", "shown"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_accepted(wished: object, fingerprints: frozenset[str], shown: bool) -> None:
    assert first_contact.parse_accepted(wished) == (fingerprints, shown)


@pytest.mark.parametrize("wished", ["yes", "all", "MD5:aa:bb"])
def test_what_accepts_nothing(wished: str) -> None:
    with pytest.raises(ContactError, match=f"bootstrap_accept_host_keys: {wished} is no fingerprint"):
        first_contact.parse_accepted(wished)


def test_password_files(tmp_path: Path) -> None:
    file = tmp_path / "pw"
    file.write_text("first line\nsecond\n")
    file.chmod(0o640)
    with pytest.raises(ContactError, match=r"Others may read the password file .* \(mode 0640\): chmod 600"):
        first_contact.password_of(str(file))
    file.chmod(0o600)
    assert first_contact.password_of(str(file)) == "first line"
    file.write_text("\n")
    with pytest.raises(ContactError, match="is empty"):
        first_contact.password_of(str(file))
    with pytest.raises(ContactError, match="cannot be read: No such file"):
        first_contact.password_of(str(tmp_path / "none"))


def test_the_operators_key(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    with pytest.raises(ContactError, match=r"There is no public key: .*id_ed25519\.pub.*ssh-keygen -t ed25519"):
        first_contact.public_key("", "", tmp_path)
    (tmp_path / ".ssh" / "id_ed25519.pub").write_text("ssh-ed25519 AAAA me\n")
    assert first_contact.public_key("", "", tmp_path) == ("ssh-ed25519 AAAA me", None)
    (tmp_path / "key").write_text("private")
    (tmp_path / "key.pub").write_text("ssh-ed25519 BBBB me\n")
    assert first_contact.public_key("", str(tmp_path / "key"), tmp_path) == ("ssh-ed25519 BBBB me", tmp_path / "key")
    with pytest.raises(ContactError, match="is no public key"):
        first_contact.public_key(str(tmp_path / "key"), "", tmp_path)
