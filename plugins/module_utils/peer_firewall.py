"""A firewall of our own table: the ports of engines and ranks are for peers only, all else is left alone.

Standard library only: this runs on the node, under any Python from 3.9 on. What is pure stands first.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = "stepladder"
RULES = "/etc/stepladder/peers.nft"
UNIT = "/etc/systemd/system/stepladder-firewall.service"
BESIDE = "/etc/systemd/system/nftables.service.d/stepladder.conf"
FILES = (RULES, UNIT, BESIDE)
SYSTEMD = Path("/run/systemd/system")
# A name could lead elsewhere tomorrow, and what a node finds under its own is often a loopback address.
MEND_NAME = {
    "peers": "set deployment_address of the node that is called so, or host_firewall_peers",
    "clients": "set deployment_address of the gateway that is called so, or host_firewall_clients",
}
MEND_SSH = (
    "the node shows no sshd that listens, no ssh.socket, and no SSH connection that this run came over: set "
    "ansible_port or host_firewall_ssh_ports to the port on which it lets you in"
)
MARK = "stepladder "
HEAD = "# Written by stepladder; a rerun writes it again.\n"


class FirewallError(Exception):
    """The firewall could not be made as it is wanted; the text says why."""


@dataclass(frozen=True)
class Wanted:
    """What shall get through.

    Args:
        peers: addresses or networks that reach every port.
        clients: addresses or networks that reach `client_ports` too.
        ports: that are for peers only: numbers or ranges `20000-30000`.
        client_ports: of those, the ones that clients reach.
        ssh_ports: that are open to all, whatever else is said: those given and those found on the node.
    """

    peers: Sequence[str] = ()
    clients: Sequence[str] = ()
    ports: Sequence[str] = ()
    client_ports: Sequence[str] = ()
    ssh_ports: Sequence[str] = ()


def problems(wanted: Wanted) -> list[str]:
    """What is wrong with what is wanted, all of it."""
    found = []
    for name in ("peers", "clients"):
        for each in getattr(wanted, name):
            try:
                ipaddress.ip_network(each, strict=False)
            except ValueError:
                found.append(f"{name}: '{each}' is no address and no network; {MEND_NAME[name]}")
    for name in ("ports", "client_ports", "ssh_ports"):
        found += [f"{name}: '{each}' is no port and no range" for each in getattr(wanted, name) if not _is_port(each)]
    if not wanted.peers:
        found.append("peers: none; every rank would be cut off from every other")
    if not wanted.ports:
        found.append("ports: none; there is nothing to protect")
    if not wanted.ssh_ports:
        found.append(f"ssh_ports: none, whoever runs this could be locked out; {MEND_SSH}")
    return found


def with_found(given: Sequence[str], found: Sequence[int]) -> list[str]:
    """The SSH ports that were given, and of those found the ones that these do not hold: nft refuses overlaps.

    Args:
        given: numbers or ranges; what is neither is left for `problems`.
        found: on the node.
    """
    spans = [[int(end) for end in each.split("-")] for each in given if _is_port(each)]
    return [*given, *(str(port) for port in found if not any(span[0] <= port <= span[-1] for span in spans))]


def _is_port(text: str) -> bool:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    return bool(found) and 1 <= int(found[1]) <= int(found[2] or found[1]) <= 65535 if found else False


def rendered(wanted: Wanted) -> str:
    """The rules, replaced in one transaction: a packet meets the old ones or the new ones, never none.

    Only the ports named are dropped for strangers; the policy accepts, other tables are not touched, and what they drop
    stays dropped. What began before goes on (`established`).
    """
    tables = [*_families("peers", wanted.peers), *_families("clients", wanted.clients)]
    lines = [f"    set {name} {{ type {kind}; flags interval; elements = {{ {', '.join(all_)} }} }}"
             for name, kind, all_ in tables]  # fmt: skip
    lines.append(f"    set ports {{ type inet_service; flags interval; elements = {{ {', '.join(wanted.ports)} }} }}")
    rules = [
        "ct state established,related accept",
        f"tcp dport {{ {', '.join(wanted.ssh_ports)} }} accept",
    ]
    rules += [f"{_field(name)} saddr @{name} accept" for name, _, _ in tables if name.startswith("peers")]
    if wanted.client_ports:
        allowed = ", ".join(wanted.client_ports)
        names = [name for name, _, _ in tables if name.startswith("clients")]
        rules += [f"{_field(name)} saddr @{name} tcp dport {{ {allowed} }} accept" for name in names]
    rules += ["tcp dport @ports counter drop", "udp dport @ports counter drop"]
    chain = ["    chain input {", "        type filter hook input priority -5; policy accept;"]
    # What is loaded is known by it again: nft lists sets and rules in other words than they were given in.
    digest = hashlib.sha256("\n".join([*lines, *rules]).encode()).hexdigest()[:16]
    rules = [f'iif lo accept comment "{MARK}{digest}"', *rules]
    body = [*lines, *chain, *(f"        {rule}" for rule in rules), "    }"]
    return "\n".join(
        [f"{HEAD}add table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{", *body, "}", ""]
    )


def _families(name: str, networks: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Addresses by IP version: nft's sets hold one kind each; overlapping ones are joined."""
    parsed = [ipaddress.ip_network(each, strict=False) for each in networks]
    four = ipaddress.collapse_addresses(each for each in parsed if isinstance(each, ipaddress.IPv4Network))
    six = ipaddress.collapse_addresses(each for each in parsed if isinstance(each, ipaddress.IPv6Network))
    found = [(f"{name}4", "ipv4_addr", [*map(str, four)]), (f"{name}6", "ipv6_addr", [*map(str, six)])]
    return [each for each in found if each[2]]


def _field(name: str) -> str:
    return "ip" if name.endswith("4") else "ip6"


def unit(nft: str) -> str:
    """The service that loads the rules when the node starts, and again after the system's own has flushed all.

    Its reload flushes, too (Debian's /etc/nftables.conf begins with `flush ruleset`), and PartOf= hands on no reload.
    After= orders the two: ours is loaded last.
    """
    return (
        f"{HEAD}[Unit]\nDescription=Stepladder's rules for peers\nAfter=nftables.service firewalld.service\n"
        "PartOf=nftables.service\nReloadPropagatedFrom=nftables.service\nBefore=network-online.target\n\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={nft} -f {RULES}\n"
        f"ExecReload={nft} -f {RULES}\n"
        f"ExecStop=-{nft} delete table inet {TABLE}\n\n[Install]\nWantedBy=multi-user.target\n"
    )


def beside(nft: str) -> str:
    """An addition to nftables.service: no dependency hands on its start, which flushes as its reload does."""
    return f"{HEAD}[Service]\nExecStartPost=-{nft} -f {RULES}\n"


def files(wanted: Wanted, nft: str) -> dict[str, str]:
    """The files that keep the rules, by path."""
    return {RULES: rendered(wanted), UNIT: unit(nft), BESIDE: beside(nft)}


def identity(rules: str) -> tuple[list[str], int, int]:
    """What tells rules from others, as written or as listed by nft: their mark, how many accept, how many drop.

    The mark tells what was loaded; the numbers, what somebody took out or put in since.
    """
    accept, drop = (re.findall(rf"(?m)\b{verdict}(?: comment .*)?$", rules) for verdict in ("accept", "drop"))
    return re.findall(rf'comment "{MARK}(\w+)"', rules), len(accept), len(drop)


# ---- the node --------------------------------------------------------------------------------------------------------


def nft() -> str:
    """The program, '' where there is none."""
    return shutil.which("nft", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])) or ""


def is_loaded(wanted: Wanted) -> bool:
    """Whether the table in the kernel is ours, as it is wanted."""
    done = _nft("list", "table", "inet", TABLE)
    return done.returncode == 0 and identity(done.stdout) == identity(rendered(wanted))


def is_enabled() -> bool:
    """Whether the rules are loaded at every start; also where there is no systemd that could."""
    if not SYSTEMD.is_dir():
        return True
    told = subprocess.run(["systemctl", "is-enabled", Path(UNIT).name], capture_output=True, check=False)
    return told.returncode == 0


def plan(wanted: Wanted | None) -> list[str]:
    """What is to be done, in words; `wanted` none for no firewall."""
    there = {path: _text(path) for path in FILES}
    if wanted is None:
        loaded = bool(nft()) and _nft("list", "table", "inet", TABLE).returncode == 0
        return [f"remove {path}" for path, text in there.items() if text] + (["take the rules out"] if loaded else [])
    due = files(wanted, nft() or "/usr/sbin/nft")
    actions = [f"write {path}" for path, text in due.items() if there[path] != text]
    actions += ["load the rules"] if not nft() or actions or not is_loaded(wanted) else []
    return actions + ([] if is_enabled() else ["have them loaded at every start"])


def current() -> str:
    """The rules that an earlier run wrote."""
    return _text(RULES)


def check(wanted: Wanted) -> None:
    """Have the rules judged by nft, without loading them.

    Raises:
        FirewallError: it refuses them.
    """
    done = _nft("-c", "-f", "-", text=rendered(wanted))
    if done.returncode:
        raise FirewallError(f"nft refuses the rules, nothing was changed:\n{done.stderr.strip()}")


def apply(wanted: Wanted) -> None:
    """Write and load the rules, and have them loaded at every start.

    Raises:
        FirewallError: nft or systemd refuses.
        OSError: a file cannot be written.
    """
    check(wanted)
    for path, text in files(wanted, nft()).items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    done = _nft("-f", RULES)
    if done.returncode:
        raise FirewallError(f"the rules could not be loaded, the old ones are in force:\n{done.stderr.strip()}")
    for argv in (["daemon-reload"], ["enable", "--now", Path(UNIT).name]):
        told = subprocess.run(["systemctl", *argv], capture_output=True, text=True, check=False)
        if told.returncode:
            raise FirewallError(f"systemctl {' '.join(argv)}: {told.stderr.strip()}")


def remove() -> None:
    """Take the rules out, now and for the next start."""
    subprocess.run(["systemctl", "disable", "--now", Path(UNIT).name], capture_output=True, check=False)
    for path in FILES:
        Path(path).unlink(missing_ok=True)
    subprocess.run(["systemctl", "daemon-reload"], capture_output=True, check=False)
    if nft():
        _nft("delete", "table", "inet", TABLE)


def _nft(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([nft(), *arguments], input=text, capture_output=True, text=True, check=False)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
