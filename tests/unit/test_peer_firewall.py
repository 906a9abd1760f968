"""The firewall's rules as text, and what is refused; tests/lab/test_prepare.py sends packets through them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.stepladder.core.plugins.module_utils import peer_firewall, ssh_server
from ansible_collections.stepladder.core.plugins.module_utils.peer_firewall import Wanted
from ansible_collections.stepladder.core.plugins.modules import peer_firewall as peer_firewall_module

from stepladder import preparing

ROOT = Path(__file__).resolve().parents[2]
GOOD = Wanted(["198.18.0.11", "198.18.0.12"], ["198.18.1.0/24"], ["6379", "29500-65535"], ["30000"], ["22"])
RULES = """\
# Written by stepladder; a rerun writes it again.
add table inet stepladder
delete table inet stepladder
table inet stepladder {
    set peers4 { type ipv4_addr; flags interval; elements = { 198.18.0.11/32, 198.18.0.12/32 } }
    set clients4 { type ipv4_addr; flags interval; elements = { 198.18.1.0/24 } }
    set ports { type inet_service; flags interval; elements = { 6379, 29500-65535 } }
    chain input {
        type filter hook input priority -5; policy accept;
        iif lo accept comment "stepladder d7289ef6c4ee12a4"
        ct state established,related accept
        tcp dport { 22 } accept
        ip saddr @peers4 accept
        ip saddr @clients4 tcp dport { 30000 } accept
        tcp dport @ports counter drop
        udp dport @ports counter drop
    }
}
"""


def changed(**fields: Any) -> Wanted:
    return Wanted(**{**vars(GOOD), **fields})


def test_rules() -> None:
    assert peer_firewall.rendered(GOOD) == RULES


def test_both_kinds_of_addresses_and_overlapping_ones() -> None:
    text = peer_firewall.rendered(changed(peers=["198.18.0.11", "198.18.0.0/16", "2001:2::7"], clients=[]))
    assert "set peers4 { type ipv4_addr; flags interval; elements = { 198.18.0.0/16 } }" in text
    assert "set peers6 { type ipv6_addr; flags interval; elements = { 2001:2::7/128 } }" in text
    assert "ip6 saddr @peers6 accept" in text
    assert "clients" not in text


def test_nothing_but_the_ports_named_is_dropped() -> None:
    """Who loads this over SSH stays connected, whatever the sets hold: SSH and what is open come before any drop."""
    lines = [line.strip() for line in peer_firewall.rendered(changed(ports=["1-65535"])).splitlines()]
    assert lines.index("tcp dport { 22 } accept") < lines.index("tcp dport @ports counter drop")
    assert [line for line in lines if line.endswith("drop")] == [
        "tcp dport @ports counter drop",
        "udp dport @ports counter drop",
    ]
    assert "policy accept;" in RULES
    assert "flush" not in RULES


WRONG = {
    "good": (GOOD, []),
    "a name": (
        changed(peers=["node1"], clients=["gateway"]),
        ["peers: 'node1' is no address and no network; set deployment_address of the node that is called so, or "
         "host_firewall_peers",
         "clients: 'gateway' is no address and no network; set deployment_address of the gateway that is called so, or "
         "host_firewall_clients"],
    ),
    "no port": (
        changed(ports=["30000-20000", "x", "70000"]),
        ["ports: '30000-20000' is no port and no range", "ports: 'x' is no port and no range",
         "ports: '70000' is no port and no range"],
    ),
    "nothing at all": (
        Wanted(ssh_ports=[]),
        ["peers: none; every rank would be cut off from every other", "ports: none; there is nothing to protect",
         "ssh_ports: none, whoever runs this could be locked out; the node shows no sshd that listens, no ssh.socket, "
         "and no SSH connection that this run came over: set ansible_port or host_firewall_ssh_ports to the port on "
         "which it lets you in"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "expected"), WRONG.values(), ids=WRONG)
def test_problems(wanted: Wanted, expected: list[str]) -> None:
    assert peer_firewall.problems(wanted) == expected


SSH = {
    "another port than Ansible's": (["2222"], [50022], ["2222", "50022"]),
    "the same": (["22"], [22], ["22"]),
    "in a range that was given": (["20-30"], [22, 50022], ["20-30", "50022"]),
    "only what was found": ([], [22], ["22"]),
    "nothing": ([], [], []),
    "no port": (["ssh"], [22], ["ssh", "22"]),
}


@pytest.mark.parametrize(("given", "found", "expected"), SSH.values(), ids=SSH)
def test_ssh_ports(given: list[str], found: list[int], expected: list[str]) -> None:
    assert peer_firewall.with_found(given, found) == expected


def run_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **given: Any) -> dict[str, Any]:
    """What the module answers in check mode, as root on a node without nft and with no file of ours."""
    monkeypatch.setattr(peer_firewall, "nft", lambda: "")
    monkeypatch.setattr(peer_firewall, "current", lambda: "")
    monkeypatch.setattr(peer_firewall_module.system_packages, "not_root", lambda: "")
    with patch_module_args({"_ansible_check_mode": True, **given}), pytest.raises(SystemExit):
        peer_firewall_module.main()
    return dict(json.loads(capsys.readouterr().out))


def test_the_port_that_sshd_listens_on_is_open_though_ansible_does_not_know_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ansible's own may be that of address translation, or none: ssh finds it in ~/.ssh/config."""
    wish = {"peers": ["198.18.0.11"], "ports": ["29500-65535"]}
    monkeypatch.setattr(ssh_server, "ports", lambda: [50022])
    after = run_module(monkeypatch, capsys, **wish)["diff"]["after"]
    assert "        tcp dport { 50022 } accept\n" in after
    assert after.index("50022") < after.index("drop")
    monkeypatch.setattr(ssh_server, "ports", list)
    assert run_module(monkeypatch, capsys, **wish)["msg"] == peer_firewall.problems(changed(ssh_ports=[]))[0]
    assert "tcp dport { 22 } accept" in run_module(monkeypatch, capsys, ssh_ports=["22"], **wish)["diff"]["after"]


# nft 1.0.6 (Debian 12), `nft list table inet stepladder` after RULES were loaded, 2026-11-21.
LISTING = """\
table inet stepladder {
	set peers4 {
		type ipv4_addr
		flags interval
		elements = { 198.18.0.11, 198.18.0.12 }
	}

	set clients4 {
		type ipv4_addr
		flags interval
		elements = { 198.18.1.0/24 }
	}

	set ports {
		type inet_service
		flags interval
		elements = { 6379, 29500-65535 }
	}

	chain input {
		type filter hook input priority filter - 5; policy accept;
		iif "lo" accept comment "stepladder d7289ef6c4ee12a4"
		ct state established,related accept
		tcp dport 22 accept
		ip saddr @peers4 accept
		ip saddr @clients4 tcp dport 30000 accept
		tcp dport @ports counter packets 0 bytes 0 drop
		udp dport @ports counter packets 0 bytes 0 drop
	}
}
"""
LOAD, ENABLE = "load the rules", "have them loaded at every start"
NODES: dict[str, tuple[str, bool, bool, list[str]]] = {
    "all is there": (LISTING, True, True, []),
    "ended before systemctl enable": (LISTING, True, False, [ENABLE]),
    "no systemd": (LISTING, False, False, []),
    "not loaded": ("", True, True, [LOAD]),
    "of a version before": (LISTING.replace(' comment "stepladder d7289ef6c4ee12a4"', ""), True, True, [LOAD]),
    "of other addresses": (LISTING.replace("d7289ef6c4ee12a4", "0123456789abcdef"), True, True, [LOAD]),
    "a rule was taken out": (LISTING.replace("\t\ttcp dport 22 accept\n", ""), True, True, [LOAD]),
    "one was put in": (LISTING.replace("\t\ttcp dport 22", '\t\tudp dport 1 accept comment "x"\n\t\ttcp dport 22'),
                       True, True, [LOAD]),
}  # fmt: skip


@pytest.mark.parametrize(("listing", "systemd", "enabled", "actions"), NODES.values(), ids=NODES)
def test_what_is_to_be_done_on_a_node_that_has_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, systemd: bool, enabled: bool, actions: list[str]
) -> None:
    """nft and systemctl are stand-ins that answer as recorded."""
    (tmp_path / "listing").write_text(listing)
    (tmp_path / "nft").write_text(f"#!/bin/sh\n[ -s {tmp_path}/listing ] && cat {tmp_path}/listing\n")
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{'true' if enabled else 'false'}\n")
    for name in ("nft", "systemctl"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(peer_firewall, "SYSTEMD", tmp_path if systemd else tmp_path / "none")
    kept = peer_firewall.files(GOOD, str(tmp_path / "nft"))
    monkeypatch.setattr(peer_firewall, "_text", kept.__getitem__)
    assert peer_firewall.plan(GOOD) == actions


def test_a_reload_of_the_systems_own_rules_loads_ours_again() -> None:
    """Debian's nftables.service (1.0.6-2+deb12u2) reloads by `nft -f /etc/nftables.conf`, which flushes every table."""
    lines = peer_firewall.unit("/usr/sbin/nft").splitlines()
    for line in (
        "After=nftables.service firewalld.service",
        "ReloadPropagatedFrom=nftables.service",
        "ExecReload=/usr/sbin/nft -f /etc/stepladder/peers.nft",
    ):
        assert line in lines


def test_a_start_of_the_systems_own_rules_loads_ours_again() -> None:
    """Seen in a lab: `systemctl enable --now nftables` left its own table alone."""
    kept = peer_firewall.files(GOOD, "/usr/sbin/nft")
    assert tuple(kept) == peer_firewall.FILES
    text = kept["/etc/systemd/system/nftables.service.d/stepladder.conf"]
    assert text.splitlines()[1:] == ["[Service]", "ExecStartPost=-/usr/sbin/nft -f /etc/stepladder/peers.nft"]


def test_peers_are_all_addresses_that_the_inventory_tells() -> None:
    rows = {
        "a": {"deployment_address": "198.18.5.1", "ansible_host": "198.18.0.1", "lab_storage_address": None},
        "b": {"ansible_host": "198.18.0.2", "lab_storage_address": "198.19.0.2"},
        "c": {},
        "d": {"deployment_address": "198.18.5.4", "ansible_host": "d.site"},
        "e": {"ansible_host": "e.site"},
    }
    addresses = ["198.18.5.1", "198.18.0.1", "198.18.0.2", "198.19.0.2", "c", "198.18.5.4", "e.site"]
    assert preparing.firewall_peers(rows) == addresses


def test_what_the_role_has_the_module_do(tmp_path: Path) -> None:
    """The role's defaults beside the project's own group_vars, as Ansible reads them; nobody is connected to."""
    engines = {"plain": {}, "port": {"ansible_port": 2222}, "local": {"ansible_connection": "local"}}
    gateway = {"ansible_host": "198.18.0.21", "deployment_address": "198.18.5.21"}
    groups = {"engines": {"hosts": engines}, "gateway": {"hosts": {"edge": gateway}}}
    (tmp_path / "hosts.yml").write_text(json.dumps({"all": {"children": groups}}))
    (tmp_path / "group_vars").symlink_to(ROOT / "group_vars")
    keep = {"ansible.builtin.set_fact": {"told": "{{ [host_firewall_clients, host_firewall_ssh_ports] }}"}}
    write = {"ansible.builtin.copy": {"content": "{{ told | to_json }}", "mode": "0600",
                                      "dest": f"{tmp_path}/{{{{ inventory_hostname }}}}.json"},
             "delegate_to": "localhost"}  # fmt: skip
    play = {"hosts": "engines", "gather_facts": False, "vars_files": [str(ROOT / "roles/host/defaults/main.yml")],
            "tasks": [keep, write]}  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", "hosts.yml", "play.yml"], cwd=tmp_path,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    clients = ["198.18.5.21", "198.18.0.21"]
    told = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in engines}
    assert told == {"plain": [clients, []], "port": [clients, ["2222"]], "local": [clients, ["22"]]}
