"""First contact with a server that knows only a password: its host key is pinned, the operator's key is put there.

A password is sent to nobody whose host key was not pinned or accepted before.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import paramiko

from stepladder.errors import StepladderError

CONNECT_SECONDS = 15.0
ANSWER_SECONDS = 60.0
# sshd hangs up after MaxAuthTries failures, 6 by default and 4 where it is hardened (CIS benchmark); a password is one.
KEYS_TRIED = 3
NO_KNOWN_HOSTS = "{} cannot be read as a known_hosts file"
ELSEWHERE = "Name another place: bootstrap_known_hosts=FILE."
SAME, UNKNOWN, CHANGED = "same", "unknown", "changed"

# Prints a line `change: ...` for all that it changes, or would change; needs root for another user, and for sudo.
SCRIPT = r"""
set -eu
umask 077
change() { echo "change: $1"; [ "$apply" = yes ]; }
fail() { echo "$1" >&2; exit 1; }
home=$(getent passwd "$user" | cut -d: -f6)
if [ -z "$home" ]; then
  change "make the user $user" || home=/home/$user
  if [ "$apply" = yes ]; then
    useradd --create-home --shell /bin/bash "$user"
    home=$(getent passwd "$user" | cut -d: -f6)
  fi
fi
keys=$home/.ssh/authorized_keys
if ! grep -qsF -- "$body" "$keys"; then
  if change "put the key into $keys"; then
    mkdir -p "$home/.ssh"
    chmod 700 "$home/.ssh"
    # A last line without an end would run into the key.
    [ ! -s "$keys" ] || [ -z "$(tail -c 1 "$keys")" ] || echo >>"$keys"
    printf '%s\n' "$key" >>"$keys"
    chmod 600 "$keys"
    [ "$(id -u)" != 0 ] || chown -R "$user": "$home/.ssh"
    command -v restorecon >/dev/null && restorecon -R "$home/.ssh" || true
  fi
fi
if [ "$sudo" = yes ]; then
  # sudo reads no file with a dot in its name: neither an unfinished one, nor that of a user with a dot.
  file=/etc/sudoers.d/stepladder-$(printf %s "$user" | tr . _)
  line="$user ALL=(ALL:ALL) NOPASSWD: ALL"
  if [ "$(cat "$file" 2>/dev/null)" != "$line" ]; then
    command -v visudo >/dev/null || fail "sudo is not installed; as root: apt-get install -y sudo (or dnf install sudo)"
    if change "allow $user sudo without a password in $file"; then
      new=$(mktemp /etc/sudoers.d/.stepladder.XXXXXX)
      trap 'rm -f "$new"' EXIT
      echo "$line" >"$new"
      visudo -cqf "$new" || fail "visudo refuses: $line"
      chmod 440 "$new"
      mv "$new" "$file"
    fi
  fi
fi
"""


class ContactError(StepladderError):
    """A server cannot be taken in; the message says why and what mends it."""


@dataclass(frozen=True)
class HostKey:
    """A server's public key as known_hosts writes it."""

    kind: str
    body: str

    @property
    def fingerprint(self) -> str:
        """As ssh-keygen -l prints it."""
        digest = hashlib.sha256(base64.b64decode(self.body)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@dataclass(frozen=True)
class Server:
    """Where a server is reached."""

    host: str
    port: int = 22

    @property
    def name(self) -> str:
        """As known_hosts names it."""
        return self.host if self.port == 22 else f"[{self.host}]:{self.port}"


@dataclass(frozen=True)
class Seen:
    """A server's host key, against the pinned ones; `pinned` are their fingerprints."""

    key: HostKey
    state: str
    pinned: tuple[str, ...] = ()


# ---- known_hosts -----------------------------------------------------------------------------------------------------


def pinned_keys(path: Path, name: str) -> list[HostKey]:
    """The keys of a server in a known_hosts file, hashed names among them; none where there is no file.

    Raises:
        ContactError: the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        found = paramiko.HostKeys(str(path)).lookup(name) or {}
    except OSError as error:
        raise ContactError(f"{path} cannot be read: {error.strerror}") from error
    except paramiko.hostkeys.InvalidHostKey as error:
        raise ContactError(f"{NO_KNOWN_HOSTS.format(path)}: '{error.line}': take the line out") from error
    except UnicodeDecodeError as error:
        raise ContactError(
            f"{NO_KNOWN_HOSTS.format(path)}: "
            f"the line with {error.object[: error.end][-12:]!r} is no text: take the line out"
        ) from error
    return [HostKey(kind, key.get_base64()) for kind, key in found.items()]


def judge(offered: HostKey, pinned: Sequence[HostKey]) -> Seen:
    """Whether an offered key is the pinned one."""
    if not pinned:
        return Seen(offered, UNKNOWN)
    state = SAME if offered in pinned else CHANGED
    return Seen(offered, state, tuple(key.fingerprint for key in pinned))


def pin(path: Path, name: str, key: HostKey) -> bool:
    """Write a key into a known_hosts file, whole or not at all, also where others do so at the same time.

    Raises:
        ContactError: another key stands there, or the file cannot be written.
    """
    try:
        return _pinned(path, name, key)
    except OSError as error:
        raise ContactError(f"The host key cannot be pinned in {path}: {error.strerror}. {ELSEWHERE}") from error


def _pinned(path: Path, name: str, key: HostKey) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        seen = judge(key, pinned_keys(path, name))
        if seen.state == SAME:
            return False
        if seen.state == CHANGED:
            raise ContactError(changed_text(name, seen, path))
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            text += "\n"
        handle, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(f"{text}{name} {key.kind} {key.body}\n")
            os.fchmod(handle, 0o644)
        Path(new).replace(path)
        return True


def keep_shown(path: Path, shown: Mapping[str, str]) -> None:
    """Keep fingerprints by the name of their server, beside those that were shown before.

    Raises:
        ContactError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps({**shown_before(path), **shown}, indent=1, sort_keys=True))
    except OSError as error:
        raise ContactError(f"What was shown cannot be kept in {path}: {error.strerror}. {ELSEWHERE}") from error


def shown_before(path: Path) -> dict[str, str]:
    """What was kept; none where there is no such file."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def changed_text(name: str, seen: Seen, path: Path) -> str:
    """The message for a server that shows another key than the pinned one."""
    return (
        f"THE HOST KEY OF {name} HAS CHANGED. It shows {seen.key.fingerprint} ({seen.key.kind}), pinned is "
        f"{' or '.join(seen.pinned)}. Either somebody is between you and it, or it was installed anew. Nothing was "
        f"sent to it. If you know that it was installed anew: ssh-keygen -f {path} -R '{name}', then run this again."
    )


def parse_accepted(wish: object) -> tuple[frozenset[str], bool]:
    """What `bootstrap_accept_host_keys` means: fingerprints, and whether what was shown before is accepted.

    Raises:
        ContactError: it names neither.
    """
    words = wish.replace(",", " ").split() if isinstance(wish, str) else [str(word) for word in _items(wish)]
    wrong = [word for word in words if word != "shown" and not word.startswith("SHA256:")]
    if wrong:
        raise ContactError(
            f"bootstrap_accept_host_keys: {', '.join(wrong)} is no fingerprint. Give fingerprints as they were shown "
            "(SHA256:...), or the word 'shown' for those that the last run showed."
        )
    return frozenset(words) - {"shown"}, "shown" in words


def _items(wish: object) -> Iterator[object]:
    if isinstance(wish, Sequence | frozenset | set):
        yield from wish


# ---- the wire --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(server: Server, kinds: Sequence[str] = ()) -> Iterator[paramiko.Transport]:
    """A connection on which keys were exchanged and nobody is logged in yet.

    Args:
        server: to reach.
        kinds: of host keys that are known; they are asked for first, as OpenSSH does.

    Raises:
        ContactError: it does not answer as an SSH server does.
    """
    try:
        wire = socket.create_connection((server.host, server.port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise ContactError(f"{server.name} cannot be reached: {error.strerror or error}") from error
    except UnicodeError as error:  # of a name that DNS could not have
        raise ContactError(f"{server.name} cannot be reached: it is no host's name: {error}") from error
    transport = paramiko.Transport(wire)
    try:
        transport.banner_timeout = transport.handshake_timeout = CONNECT_SECONDS
        options = transport.get_security_options()
        first = [kind for kind in options.key_types if kind in kinds]
        options.key_types = [*first, *(kind for kind in options.key_types if kind not in first)]
        try:
            transport.start_client(timeout=CONNECT_SECONDS)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise ContactError(f"{server.name} does not answer as an SSH server: {error}") from error
        yield transport
    finally:
        transport.close()


def offered(transport: paramiko.Transport) -> HostKey:
    """The host key that a server showed."""
    key = transport.get_remote_server_key()
    return HostKey(key.get_name(), key.get_base64())


def look(server: Server, known_hosts: Path) -> Seen:
    """A server's host key, against the pinned ones.

    Raises:
        ContactError: it does not answer.
    """
    pinned = pinned_keys(known_hosts, server.name)
    with connected(server, [key.kind for key in pinned]) as transport:
        return judge(offered(transport), pinned)


@dataclass(frozen=True)
class Wish:
    """What a server shall have.

    Args:
        user: who shall be let in with the key.
        login: who logs in now.
        public_key: the line for authorized_keys.
        private_key: file of its other half; none where only an agent has it.
        sudo: whether the user shall become root without a password.
    """

    user: str
    login: str
    public_key: str
    private_key: Path | None
    sudo: bool

    @property
    def body(self) -> str:
        """The public key itself, without its kind and comment."""
        return self.public_key.split()[1]

    @property
    def needs_root(self) -> bool:
        """Whether it is about more than the own account."""
        return self.login != "root" and (self.user != self.login or self.sudo)


def lets_in(transport: paramiko.Transport, wish: Wish) -> bool:
    """Log in with the operator's key, from its file or the agent, else with another of the agent's; False for none."""
    keys: list[paramiko.PKey] = []
    if wish.private_key and wish.private_key.exists():
        with contextlib.suppress(paramiko.PasswordRequiredException, paramiko.SSHException):
            keys.append(paramiko.PKey.from_path(str(wish.private_key)))
    read = {key.get_base64() for key in keys}
    others = [key for key in paramiko.Agent().get_keys() if key.get_base64() not in read]
    keys += sorted(others, key=lambda key: key.get_base64() != wish.body)
    for key in keys[:KEYS_TRIED]:
        with contextlib.suppress(paramiko.AuthenticationException):
            transport.auth_publickey(wish.login, key)
            return True
    return False


def take_in(server: Server, known_hosts: Path, wish: Wish, password: Callable[[], str], *, apply: bool) -> list[str]:
    """Make a pinned server what it shall be.

    Args:
        server: whose host key is pinned.
        known_hosts: the file that pins it.
        wish: what it shall have.
        password: asked for only where the key does not do.
        apply: whether to change it, or only to say what would change.

    Returns: what was, or would be, changed; empty where nothing was to do.

    Raises:
        ContactError: it is not the pinned one, refuses the password, or something on it failed.
    """
    pinned = pinned_keys(known_hosts, server.name)
    with connected(server, [key.kind for key in pinned]) as transport:
        seen = judge(offered(transport), pinned)
        if seen.state == CHANGED:
            raise ContactError(changed_text(server.name, seen, known_hosts))
        if seen.state != SAME:
            raise ContactError(f"The host key of {server.name} is not pinned; nothing was sent to it.")
        secret = ""
        try:
            if not lets_in(transport, wish):
                secret = password()
                _with_password(transport, server, wish.login, secret)
        except paramiko.SSHException as error:
            raise ContactError(
                f"{server.name} hung up while {wish.login} was logging in: {error}. It may allow fewer tries than "
                "there are keys (MaxAuthTries): with SSH_AUTH_SOCK= before the command none of your agent's is tried."
            ) from error
        return _run(transport, server, wish, secret or None, password, apply=apply)


def _with_password(transport: paramiko.Transport, server: Server, user: str, password: str) -> None:
    if not password:
        raise ContactError(
            f"{server.name} does not let {user} in with the key, and no password is known. Give one at the prompt, or "
            "a file that only you can read: STEPLADDER_BOOTSTRAP_PASSWORD_FILE=FILE, or bootstrap_password_file."
        )
    try:
        try:
            transport.auth_password(user, password)
        except paramiko.BadAuthenticationType as error:
            if "keyboard-interactive" not in error.allowed_types:
                raise
            transport.auth_interactive(user, lambda _title, _text, prompts: [password for _ in prompts])
    except paramiko.BadAuthenticationType as error:
        raise ContactError(
            f"{server.name} takes no passwords for {user}, only: {', '.join(error.allowed_types)}. Put the key there "
            "on its console, or allow PasswordAuthentication until this has run."
        ) from error
    except paramiko.AuthenticationException as error:
        if not transport.is_active():
            raise
        raise ContactError(f"{server.name} refuses the password of {user}.") from error


def _run(
    transport: paramiko.Transport,
    server: Server,
    wish: Wish,
    secret: str | None,
    password: Callable[[], str],
    *,
    apply: bool,
) -> list[str]:
    values = {
        "user": wish.user,
        "key": wish.public_key,
        "body": wish.body,
        "sudo": "yes" if wish.sudo and wish.user != "root" else "no",
        "apply": "yes" if apply else "no",
    }
    script = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()) + SCRIPT
    command, typed = f"sh -c {shlex.quote(script)}", ""
    if wish.needs_root:
        status, _, _ = _execute(transport, server, "sudo -n true", "")
        if status:
            secret = secret or password()
            if not secret:
                raise ContactError(f"On {server.name} sudo wants the password of {wish.login}, and none is known.")
            typed = f"{secret}\n"
        command = f"sudo {'-S' if status else '-n'} -p '' {command}"
    status, told, complained = _execute(transport, server, command, typed)
    if status:
        why = (complained or told).strip().splitlines()
        raise ContactError(f"On {server.name}, as {wish.login}: {why[-1] if why else f'it ended with {status}'}")
    return [line.removeprefix("change: ") for line in told.splitlines() if line.startswith("change: ")]


def _execute(transport: paramiko.Transport, server: Server, command: str, typed: str) -> tuple[int, str, str]:
    try:
        channel = transport.open_session(timeout=CONNECT_SECONDS)
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ContactError(f"{server.name} lets nothing be run: {error}") from error
    try:
        channel.settimeout(ANSWER_SECONDS)
        channel.exec_command(command)
        if typed:
            channel.sendall(typed.encode())
        channel.shutdown_write()
        told = channel.makefile("r").read()
        complained = channel.makefile_stderr("r").read()
        return channel.recv_exit_status(), _text(told), _text(complained)
    except (TimeoutError, paramiko.SSHException) as error:
        raise ContactError(f"{server.name} did not answer within {ANSWER_SECONDS:.0f} s") from error
    finally:
        channel.close()


def _text(told: bytes | str) -> str:
    return told.decode("utf-8", "replace") if isinstance(told, bytes) else told


# ---- the operator's side ---------------------------------------------------------------------------------------------


def public_key(named: str, private_key: str, home: Path) -> tuple[str, Path | None]:
    """The operator's public key, and the file of its other half.

    Args:
        named: file of the public key; empty takes the private one's neighbour, then the usual ones.
        private_key: that the inventory names, or empty.
        home: the operator's.

    Raises:
        ContactError: there is none, or it is no public key.
    """
    usual = [home / ".ssh" / f"id_{kind}.pub" for kind in ("ed25519", "ecdsa", "rsa")]
    places = [Path(named)] if named else [Path(f"{private_key}.pub")] if private_key else usual
    place = next((one for one in places if one.expanduser().is_file()), None)
    if place is None:
        raise ContactError(
            f"There is no public key: {', '.join(map(str, places))}. Make one with ssh-keygen -t ed25519, or name it: "
            "bootstrap_public_key=FILE."
        )
    line = place.expanduser().read_text(errors="replace").strip()
    words = line.split()
    if len(words) < 2 or not words[0].startswith(("ssh-", "ecdsa-", "sk-")) or "\n" in line:
        raise ContactError(f"{place} is no public key: it has to be one line such as 'ssh-ed25519 AAAA... name'.")
    other = Path(private_key).expanduser() if private_key else place.expanduser().with_suffix("")
    return line, other if other.is_file() else None


def password_of(path: str) -> str:
    """The first line of a file that only its owner can read.

    Raises:
        ContactError: it cannot be read, others can read it, or it is empty.
    """
    file = Path(path).expanduser()
    try:
        mode = file.stat().st_mode
        text = file.read_text()
    except OSError as error:
        raise ContactError(f"The password file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ContactError(f"The password file {path} is not UTF-8: write it anew in that encoding") from None
    if mode & 0o077:
        raise ContactError(f"Others may read the password file {path} (mode {mode & 0o7777:04o}): chmod 600 {path}")
    line = text.splitlines()[0] if text else ""
    if not line:
        raise ContactError(f"The password file {path} is empty.")
    return line


def keys_table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Host keys for a person to compare: by node where it is, its fingerprint and kind."""
    width = max(map(len, found), default=0)
    places = max((len(one["name"]) for one in found.values()), default=0)
    return "\n".join(
        f"  {node:<{width}}  {one['name']:<{places}}  {one['fingerprint']}  {one['kind']}"
        for node, one in found.items()
    )
