"""preflight and bootstrap against real nodes: sshd, passwords, sudo, a node behind a cut."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_lab import REPOSITORY, RealLab

from stepladder.lab import stand_ins

PASSWORD = "correct-horse-battery"


def test_preflight_tells_programs_what_every_node_is(lab: RealLab) -> None:
    done = lab.play("preflight", "-e", "preflight_format=json", check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["fit"], told["unfit"]) == (0, True, []), done.stdout[-3000:]
    facts = {node["node"]: node["facts"] for node in told["nodes"]}
    assert [one["hostname"] for one in facts.values()] == ["node1", "node2"]
    assert all(one["numa"] and one["storage"] and one["nics"] and one["limits"] for one in facts.values())


@pytest.mark.nightly
def test_preflight_without_a_plan_and_with_a_node_cut_off(lab: RealLab) -> None:
    lab.run("cut", "node2", "--all")
    try:
        done = lab.play("preflight", "-e", "deployment_model=none-such", "-e", "ansible_timeout=4", check=False)
    finally:
        lab.run("heal", "node2")
    assert done.returncode == 4, done.stdout
    assert "unknown model: 'none-such'" in done.stdout
    assert "FAIL  node2" in done.stdout
    assert "1 of 2 nodes fit; 0 failures" in done.stdout
    assert "No answer: node2." in done.stdout


@pytest.mark.nightly
def test_preflight_as_a_plain_user_names_a_taken_port(lab: RealLab) -> None:
    lab.ssh("node1", "useradd -m looker; cp -r /root/.ssh /home/looker/; chown -R looker /home/looker/.ssh")
    lab.ssh("node1", "systemd-run --quiet --unit taken python3 -m http.server 8000")
    try:
        done = lab.play("preflight", "--limit", "node1", "-e", "ansible_user=looker", check=False)
    finally:
        lab.ssh("node1", "systemctl stop taken; userdel -rf looker", check=False)
    assert done.returncode == 2, done.stdout
    assert "FAIL  node1  port" in done.stdout
    assert "looker may not see which one" in done.stdout


class Stranger:
    """The lab's nodes as servers that know only the password of a user."""

    def __init__(self, lab: RealLab, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        hosts = {name: {"ansible_host": lab.address(name)} for name in ("node1", "node2")}
        variables = {
            "ansible_user": "ops", "ansible_ssh_private_key_file": str(folder / "key"),
            "ansible_ssh_common_args": f'-o UserKnownHostsFile="{folder}/known_hosts" -o IdentitiesOnly=yes',
        }  # fmt: skip
        inventory = {"all": {"vars": variables, "children": {"engines": {"hosts": hosts}}}}
        (folder / "hosts.json").write_text(json.dumps(inventory))
        (folder / "password").touch(0o600)
        (folder / "password").write_text(f"{PASSWORD}\n")
        self.known_hosts = folder / "known_hosts"

    def bootstrap(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ = {"STEPLADDER_BOOTSTRAP_PASSWORD_FILE": str(self.folder / "password"), **environ}
        return subprocess.run(
            [sys.executable, "bin/stepladder", "bootstrap", "-i", self.folder / "hosts.json", *arguments],
            cwd=REPOSITORY, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip


@pytest.fixture
def stranger(lab: RealLab, tmp_path: Path) -> Iterator[Stranger]:
    for node in ("node1", "node2"):
        lab.ssh(node, f"useradd -m -G sudo -s /bin/bash ops && echo ops:{PASSWORD} | chpasswd")
    yield Stranger(lab, tmp_path)
    for node in ("node1", "node2"):
        lab.ssh(node, "userdel -rf ops; rm -f /etc/sudoers.d/stepladder-*", check=False)


def changes(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.rpartition("changed=")[2].split()[0] for line in done.stdout.splitlines() if "changed=" in line]


def test_bootstrap_from_a_password_to_key_and_sudo(lab: RealLab, stranger: Stranger) -> None:
    told = stranger.bootstrap("-e", f"bootstrap_password={PASSWORD}")
    assert (told.returncode, "would be on the command line" in told.stdout) == (2, True)
    refused = stranger.bootstrap()
    fingerprint = lab.ssh("node1", "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").stdout.split()[1]
    assert refused.returncode == 2
    assert fingerprint in refused.stdout
    assert "were not accepted; nothing was sent to any server" in refused.stdout
    assert not stranger.known_hosts.exists()
    accepting = ("-e", "bootstrap_accept_host_keys=shown", "-e", "bootstrap_sudo=true", "--diff")
    both = [("--check", "1"), (None, "1"), ("--check", "0"), (None, "0")]
    for mode, expected in both:
        done = stranger.bootstrap(*accepting, *([mode] if mode else []))
        assert changes(done) == [expected] * 2, done.stdout
        assert PASSWORD not in done.stdout + done.stderr
    without = stranger.bootstrap("-e", "bootstrap_sudo=true", STEPLADDER_BOOTSTRAP_PASSWORD_FILE="")
    assert changes(without) == ["0", "0"], "the key is enough now"
    assert len(stranger.known_hosts.read_text().splitlines()) == 2


@pytest.mark.nightly
def test_a_host_key_that_changed_stops_all_of_bootstrap(stranger: Stranger) -> None:
    assert stranger.bootstrap().returncode == 2
    changes(stranger.bootstrap("-e", "bootstrap_accept_host_keys=shown"))
    text = stranger.known_hosts.read_text()
    first, second = (line.split() for line in text.splitlines())
    stranger.known_hosts.write_text(f"{first[0]} {second[1]} {second[2]}\n{' '.join(second)}\n")
    done = stranger.bootstrap("-e", "bootstrap_accept_host_keys=shown")
    assert done.returncode == 2
    assert f"THE HOST KEY OF {first[0]} HAS CHANGED" in done.stdout
    assert f"ssh-keygen -f {stranger.known_hosts} -R '{first[0]}'" in done.stdout


@pytest.mark.nightly
def test_two_bootstraps_side_by_side(stranger: Stranger) -> None:
    assert stranger.bootstrap().returncode == 2
    command = [
        sys.executable, "bin/stepladder", "bootstrap", "-i", str(stranger.folder / "hosts.json"),
        "-e", "bootstrap_accept_host_keys=shown",
    ]  # fmt: skip
    environ: dict[str, Any] = {**os.environ, "STEPLADDER_BOOTSTRAP_PASSWORD_FILE": str(stranger.folder / "password")}
    running = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [one.communicate(timeout=300) and one.returncode for one in running] == [0, 0]
    assert len(stranger.known_hosts.read_text().splitlines()) == 2


@pytest.mark.nightly
def test_acceptance_names_a_slow_link(lab: RealLab) -> None:
    """Of two nodes neither can be told from the other, and a figure has to be given."""
    refused = lab.play("acceptance", check=False)
    assert refused.returncode == 2
    assert "No driver tells the line rate of node1 and node2, and of two nodes neither is the measure" in refused.stderr
    quick = lab.play("acceptance", "-e", '{"acceptance_without": ["network"]}')
    assert "No GPU was measured." in quick.stdout
    sound = lab.play("acceptance", "-e", "acceptance_minimum_gbit=0.3")
    assert "Every link has 300 Mbit/s or more" in sound.stdout
    lab.run("slow", "node2", "--rate", "100mbit")
    try:
        done = lab.play("acceptance", "-e", "acceptance_minimum_gbit=0.3", "-e", "acceptance_format=json", check=False)
    finally:
        lab.run("heal", "node2")
    told = json.loads(done.stdout)
    assert (done.returncode, told["accepted"], told["slow_nodes"]) == (2, False, [])
    assert {(one["source"], one["to"]) for one in told["slow_links"]} == {("node1", "node2"), ("node2", "node1")}
    assert all(50 < one["mbit"] < 110 for one in told["slow_links"])


GPUS = "/usr/share/stepladder-lab/gpus.json"
FAULTS = {
    "slow": [{"kind": "memory", "gpu": 3, "share": 0.5}, {"kind": "peer", "gpu": 5, "share": 0.2}],
    "failing": [{"test": "memory", "gpu": 2, "warning": "an uncorrectable error"}],
}


@pytest.mark.nightly
def test_acceptance_names_slow_gpus(lab: RealLab) -> None:
    """With the lab's stand-ins on one node, as `lab up --gpu h200` puts them there: no GPU is measured."""
    content = json.dumps({**stand_ins.data("h200", "node1"), **FAULTS})
    files = {path: text.decode() for path, (text, _) in stand_ins.files("h200", "node1").items()} | {GPUS: content}
    try:
        for path, text in files.items():
            lab.ssh("node1", f"mkdir -p {Path(path).parent}; echo {shlex.quote(text)} > {path}; chmod 755 {path}")
        only = ("--limit", "node1", "-e", "acceptance_level=full", "-e", "acceptance_format=json")
        done = lab.play("acceptance", *only, check=False)
    finally:
        lab.ssh("node1", f"rm -f {' '.join(files)}", check=False)
    told = json.loads(done.stdout)
    found = {(row["severity"], row["part"]) for row in told["findings"]}
    assert (done.returncode, told["accepted"], found) == (2, False, {
        ("slow", "GPU 3, memory"), ("slow", "GPU 5, all its peers"), ("broken", "GPU 2, DCGM's test memory"),
        ("unmeasured", "matrix"),
    })  # fmt: skip
