"""`prepare` on real nodes without a way out: a signed apt repository, its key, pins and holds are real.

The driver's packages are stand-ins (signed_repository.py), and no GPU is there; kernel settings that a container may
not set are told and not made (`host_strict: false`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import signed_repository
from real_lab import REPOSITORY, RealLab, own_lab
from signed_repository import StandIn

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

VERSION, NEWER = signed_repository.DRIVER_VERSION, signed_repository.NEWER_DRIVER_VERSION
# One change more, the headers of kernels to come, where this machine runs a kernel of Debian's.
HEADERS_TO_COME = int(platform.release().endswith("-amd64"))
LOGIN = "site:correct-horse"
SLOW = "nvidia-kernel-open-dkms"  # a real one takes minutes to be built


@dataclass
class Mirror:
    """What the operator carried in, and the variables that point prepare at it."""

    url: str
    fingerprint: str
    other_fingerprint: str
    folder: Path

    def variables(self, **changes: Any) -> dict[str, Any]:
        """Extra variables of a node with eight H20, as far as a lab can be one."""
        mirror = {
            "url": f"{self.url}nvidia/",
            "key_url": f"{self.url}nvidia/key.asc",
            "fingerprints": [self.fingerprint],
        }
        own = {
            "deployment_gpu": "h20-96",
            "gpu_driver_check_bus": False,
            "gpu_driver_mirrors": {"nvidia-driver": mirror},
            "host_strict": False,
            "host_swap_off": False,
            "gpu_driver_lock_timeout": 60,
        }
        return own | changes


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    """Two releases of the driver, signed by one key; and the same ones signed by a stranger's."""
    if reason := signed_repository.lacking():
        pytest.skip(f"no signed repository on this machine: it lacks {reason}")
    folder = tmp_path_factory.mktemp("mirror")
    good, other = (signed_repository.new_key(folder / "keys" / name) for name in ("good", "other"))
    www = folder / "www"
    packages = signed_repository.driver_packages(VERSION, platform.release(), SLOW)
    packages += signed_repository.driver_packages(NEWER, "")
    signed_repository.build(www / "nvidia", packages)
    signed_repository.sign(www / "nvidia", folder / "keys" / "good")
    for part, packages in signed_repository.amd_packages(platform.release()).items():
        signed_repository.build(www / part, packages, suite="jammy")
        signed_repository.sign(www / part, folder / "keys" / "good")
    signed_repository.build(www / "strange", [StandIn("nvidia-driver-cuda", f"{VERSION}-1")])
    signed_repository.sign(www / "strange", folder / "keys" / "other")
    with signed_repository.served(www, "0.0.0.0", LOGIN) as url:
        yield Mirror(url, good, other, www)


def at(mirror: Mirror, lab: RealLab) -> Mirror:
    """The mirror by the address that this machine has on the lab's network."""
    gateway = lab.status()["subnet"].replace(".0/24", ".1")
    return Mirror(mirror.url.replace("0.0.0.0", gateway), mirror.fingerprint, mirror.other_fingerprint, mirror.folder)


def prepare(
    lab: RealLab, variables: dict[str, Any], *options: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `prepare` with extra variables from a file."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(variables, file)
        file.flush()
        return lab.play("prepare", "-e", f"@{file.name}", *options, check=check)


@contextmanager
def started(lab: RealLab, variables: dict[str, Any], *options: str) -> Iterator[subprocess.Popen[str]]:
    """`prepare` while it runs."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(variables, file)
        file.flush()
        yield lab.start("prepare", "-e", f"@{file.name}", *options)


def changed_tasks(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Changed tasks by node, from the recap."""
    return {name: int(count) for name, count in re.findall(r"(?m)^(\S+)\s+: ok=\d+\s+changed=(\d+)", done.stdout)}


def files(lab: RealLab, node: str) -> str:
    """Every file of ours on a node, with its checksum; what is installed, and what is held."""
    places = (
        "/etc/apt /etc/sysctl.d /etc/tmpfiles.d /etc/security/limits.d /etc/systemd/system.conf.d /etc/uv /etc/pip.conf"
    )
    script = f"find {places} -type f 2>/dev/null | sort | xargs sha256sum; dpkg-query -W; apt-mark showhold"
    return lab.ssh(node, script).stdout


# ---- on the nodes that all tests share: nothing may change -----------------------------------------------------------


def test_check_on_fresh_nodes_tells_the_very_versions_and_changes_nothing(lab: RealLab, mirror: Mirror) -> None:
    """A node with a fault keeps no other from it; the report tells of both."""
    before = files(lab, "node1")
    hosts = lab.inventory / "host_vars"
    hosts.mkdir()
    try:
        (hosts / "node2.yml").write_text("gpu_driver_minimum_free_bytes: {/var: 1000000000000000}\n")
        done = prepare(lab, at(mirror, lab).variables(), "--check", "--diff", check=False)
    finally:
        shutil.rmtree(hosts)
    assert done.returncode == 2
    assert f"node1: can be prepared; {16 + HEADERS_TO_COME} changes to make; no reboot is due" in done.stdout
    assert "node2: not prepared, see above; nothing to change" in done.stdout
    assert f"+nvidia-fabricmanager: {VERSION}-1" in done.stdout
    assert "+hold of libnvidia-ml1: yes" in done.stdout
    assert files(lab, "node1") == before


def test_everything_that_is_in_the_way_is_told_at_once(lab: RealLab, mirror: Mirror) -> None:
    """A stranger's key, too little space, a driver below the engine's floor: one message, and nothing is changed."""
    before = files(lab, "node1")
    here = at(mirror, lab)
    variables = here.variables(gpu_driver_minimum_free_bytes={"/var": 10**15}, gpu_driver_check_bus=True)
    variables["gpu_driver_mirrors"]["nvidia-driver"] |= {
        "url": f"{here.url}strange/", "key_url": f"{here.url}strange/key.asc"
    }  # fmt: skip
    done = prepare(lab, variables, "--limit", "node1", check=False)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert "node1 cannot be prepared, nothing was changed: 3 faults" in said
    assert f"strange/key.asc has the key {here.other_fingerprint}, and {here.fingerprint} is pinned." in said
    assert re.search(r"- space on /var: [\d.]+ GB free \(needed: 1000000.0 GB\)", said)
    assert "- GPUs on the PCI bus: none (needed: GPUs of NVIDIA)" in said
    assert files(lab, "node1") == before


def test_unlike_gpus_in_one_deployment_are_told_of_each_node(lab: RealLab, mirror: Mirror) -> None:
    variables = at(mirror, lab).variables(gpu_driver_check_bus=False)
    del variables["deployment_gpu"]
    hosts = lab.inventory / "host_vars"
    hosts.mkdir()
    try:
        (hosts / "node1.yml").write_text("deployment_gpu: h20-96\n")
        (hosts / "node2.yml").write_text("deployment_gpu: h200\n")
        done = prepare(lab, variables, check=False)
    finally:
        shutil.rmtree(hosts)
    said = done.stdout + done.stderr
    assert "GPU types of one deployment: h20-96 here, h200 on node2" in said
    assert "GPU types of one deployment: h200 here, h20-96 on node1" in said


def test_a_driver_below_the_engines_floor_is_refused(lab: RealLab, mirror: Mirror) -> None:
    variables = at(mirror, lab).variables(gpu_driver_version="570.86.15")
    done = prepare(lab, variables, "--limit", "node1", check=False)
    said = done.stdout + done.stderr
    assert "- driver: 570.86.15; vLLM" in said
    assert "and its image need 580 or newer" in said


# ---- on nodes of their own, without a way out ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def island(mirror: Mirror) -> Iterator[RealLab]:
    """Two nodes that reach each other and this machine, and nothing else."""
    with own_lab("--nodes", "2") as lab:
        carry_in(lab, mirror)
        for node in ("node1", "node2"):
            lab.ssh(node, "ip route del default; rm -rf /etc/pip.conf /var/lib/apt/lists/*_*; : >/etc/environment")
        yield lab


def carry_in(lab: RealLab, mirror: Mirror) -> None:
    """Put the real package nftables into the mirror, with what it needs on a node; no stand-in."""
    planned = lab.ssh(
        "node1", "apt-get update -q >/dev/null && apt-get -s install --no-install-recommends nftables"
    ).stdout
    names = re.findall(r"(?m)^Inst (\S+)", planned)
    packages = mirror.folder / "packages"
    packages.mkdir()
    subprocess.run(["apt-get", "download", *names], cwd=packages, check=True, capture_output=True, timeout=120)
    signed_repository.build(mirror.folder / "debian", [], [*packages.iterdir()], suite="site")
    signed_repository.sign(mirror.folder / "debian", mirror.folder.parent / "keys" / "good")


def visitor(lab: RealLab, name: str, network: str) -> None:
    """A host beside node1 on a network of its own: what it sends is not changed by any other lab on this machine."""
    lab.ssh("node1", f"ip netns add {name}; ip link add {name} type veth peer name eth0 netns {name}; "
            f"ip address add {network}.1/24 dev {name}; ip link set {name} up; "
            f"ip -n {name} address add {network}.2/24 dev eth0; ip -n {name} link set eth0 up")  # fmt: skip


def reaches(lab: RealLab, name: str, network: str, port: int) -> bool:
    """Whether a visitor gets a connection to node1."""
    code = f"import socket; socket.create_connection(('{network}.1', {port}), 3)"
    return lab.ssh("node1", f'ip netns exec {name} python3 -c "{code}"', check=False).returncode == 0


def forget(lab: RealLab, node: str) -> None:
    """Make a node fresh again."""
    script = (
        "systemctl stop stand-in-holder 2>/dev/null; rm -f /run/stand-in-hangs; dpkg --configure -a >/dev/null 2>&1; "
        "apt-mark unhold $(apt-mark showhold) >/dev/null 2>&1; "
        "names=$(dpkg-query -W -f '${Package} ${Description}\\n' | awk '$2 == \"STAND-IN\" {print $1}'); "
        '[ -z "$names" ] || dpkg --purge $names >/dev/null; '
        "find /etc/apt /etc/sysctl.d /etc/tmpfiles.d /etc/security /etc/systemd -name '*stepladder*' -delete; "
        "rm -rf /etc/uv /etc/pip.conf /root/.netrc /var/lib/apt/lists/*nvidia*"
    )
    lab.ssh(node, script)


@pytest.mark.nightly
def test_first_run_installs_second_changes_nothing(island: RealLab, mirror: Mirror) -> None:
    here = at(mirror, island)
    assert island.ssh("node1", "ip route show default").stdout == ""
    variables = here.variables()
    first = prepare(island, variables)
    assert all(count > 0 for count in changed_tasks(first).values())
    for node in ("node1", "node2"):
        assert f"{node}: prepared; {18 + HEADERS_TO_COME} changes; a reboot is due" in first.stdout
        held = island.ssh(node, "apt-mark showhold").stdout.split()
        assert held == ["libnvidia-ml1", "libnvidia-nscq", "nvidia-driver-cuda", "nvidia-fabricmanager",
                        "nvidia-kernel-open-dkms", "nvidia-persistenced"]  # fmt: skip
        versions = island.ssh(node, "dpkg-query -W -f '${Version} ' 'nvidia-*' 'libnvidia-*'").stdout.split()
        assert set(versions) == {f"{VERSION}-1"}
        enabled = island.ssh(node, "systemctl is-enabled nvidia-fabricmanager nvidia-persistenced").stdout.split()
        assert enabled == ["enabled", "enabled"]
    assert f"reboot: driver {VERSION} is installed, in the kernel none runs" in first.stdout
    second = prepare(island, variables)
    assert changed_tasks(second) == {"node1": 0, "node2": 0}
    assert "node2: prepared; nothing changed; a reboot is due" in second.stdout
    third = prepare(island, variables, "--check", "--diff")
    assert changed_tasks(third) == {"node1": 0, "node2": 0}


@pytest.mark.nightly
def test_upgrades_leave_the_driver_alone(island: RealLab, mirror: Mirror) -> None:
    """A newer release lies in the repository: neither the hold alone nor the pin alone lets it in."""
    prepare(island, at(mirror, island).variables(), "--limit", "node1")
    policy = island.ssh("node1", "apt-cache policy nvidia-fabricmanager").stdout
    assert f"{NEWER}-1" in policy
    assert f"Candidate: {VERSION}-1" in policy
    assert "Inst " not in island.ssh("node1", "apt-get -s dist-upgrade").stdout
    island.ssh("node1", "apt-mark unhold $(apt-mark showhold) >/dev/null")
    assert "Inst " not in island.ssh("node1", "apt-get -s dist-upgrade").stdout
    again = prepare(island, at(mirror, island).variables(), "--limit", "node1")
    assert "driver: hold libnvidia-ml1 libnvidia-nscq" in again.stdout
    island.ssh("node1", "rm /etc/apt/preferences.d/stepladder-gpu-driver-version")
    assert "Inst " not in island.ssh("node1", "apt-get -s dist-upgrade").stdout


@pytest.mark.nightly
def test_another_version_is_a_decision(island: RealLab, mirror: Mirror) -> None:
    variables = at(mirror, island).variables(gpu_driver_version=NEWER)
    prepare(island, at(mirror, island).variables(), "--limit", "node2")
    refused = prepare(island, variables, "--limit", "node2", check=False)
    said = refused.stdout + refused.stderr
    assert f"- driver: {VERSION} is installed (needed: {NEWER})" in said
    assert "-e gpu_driver_change_allowed=true" in said
    prepare(island, variables | {"gpu_driver_change_allowed": True}, "--limit", "node2")
    versions = island.ssh("node2", "dpkg-query -W -f '${Version} ' 'nvidia-*' 'libnvidia-*'").stdout.split()
    assert set(versions) == {f"{NEWER}-1"}
    back = at(mirror, island).variables(gpu_driver_change_allowed=True)
    prepare(island, back, "--limit", "node2")
    versions = island.ssh("node2", "dpkg-query -W -f '${Version} ' 'nvidia-*' 'libnvidia-*'").stdout.split()
    assert set(versions) == {f"{VERSION}-1"}


@pytest.mark.nightly
def test_who_holds_apt_is_named_and_waited_for(island: RealLab, mirror: Mirror) -> None:
    forget(island, "node1")
    code = "import fcntl,time;f=open('/var/lib/dpkg/lock-frontend','w');fcntl.lockf(f,fcntl.LOCK_EX);time.sleep(600)"
    island.ssh("node1", f'systemd-run -q --unit=stand-in-holder python3 -c "{code}"')
    refused = prepare(island, at(mirror, island).variables(gpu_driver_lock_timeout=5), "--limit", "node1", check=False)
    said = refused.stdout + refused.stderr
    assert re.search(
        r"/var/lib/dpkg/lock-frontend was held for 5 s by process \d+ \(/usr/bin/python3 -c import fcntl", said
    )
    with started(island, at(mirror, island).variables(), "--limit", "node1") as running:
        assert running.stdout is not None
        lines: list[str] = []
        for line in running.stdout:
            lines.append(line)
            if "waiting for process" in line:
                island.ssh("node1", "systemctl stop stand-in-holder")
        assert running.wait() == 0, "".join(lines)
    assert any("waiting for process" in line for line in lines)
    assert any("node1: prepared" in line for line in lines)


@pytest.mark.nightly
def test_a_full_disk_is_told_and_a_rerun_goes_on(island: RealLab, mirror: Mirror) -> None:
    forget(island, "node2")
    island.run("fill", "node2", "/var")
    try:
        refused = prepare(island, at(mirror, island).variables(), "--limit", "node2", check=False)
        said = refused.stdout + refused.stderr
        assert "- space on /var: 0.0 GB free (needed: 4.0 GB)" in said
        unforeseen = at(mirror, island).variables(gpu_driver_minimum_free_bytes={})
        refused = prepare(island, unforeseen, "--limit", "node2", check=False)
        assert "No space left on device" in refused.stdout + refused.stderr
    finally:
        island.run("heal", "node2")
    assert "node2: prepared" in prepare(island, at(mirror, island).variables(), "--limit", "node2").stdout


@pytest.mark.nightly
def test_a_run_that_was_killed_in_dpkg_is_finished_by_the_next(island: RealLab, mirror: Mirror) -> None:
    """And a node that falls out half way keeps no other from being prepared; the report names both."""
    for node in ("node1", "node2"):
        forget(island, node)
    island.ssh("node1", "touch /run/stand-in-hangs")
    variables = at(mirror, island).variables()
    with started(island, variables) as running:
        deadline = time.monotonic() + 180
        while island.ssh("node1", "pgrep -f [s]leep.600", check=False).returncode:
            assert time.monotonic() < deadline, "dpkg never came to the package that hangs"
            time.sleep(1)
        island.run("kill", "node1")
        said, _ = running.communicate(timeout=400)
    assert running.returncode != 0
    assert "node1: not prepared, see above" in said, said[-3000:]
    assert re.search(r"node2: prepared; \d+ changes; a reboot is due", said), said[-3000:]
    held = island.ssh("node2", "apt-mark showhold").stdout.split()
    assert SLOW in held, "the other node was finished"
    island.run("start", "node1")
    island.ssh("node1", "ip route del default 2>/dev/null; rm -f /run/stand-in-hangs")
    status = island.ssh("node1", f"dpkg-query -W -f '${{db:Status-Abbrev}}' {SLOW}").stdout
    assert status.strip() in {"iF", "iU", "iH"}
    done = prepare(island, variables)
    assert "finish what an earlier dpkg left" in done.stdout
    assert changed_tasks(done)["node2"] == 0
    status = island.ssh("node1", f"dpkg-query -W -f '${{db:Status-Abbrev}}' {SLOW}").stdout
    assert status.strip() == "hi"
    assert changed_tasks(prepare(island, variables)) == {"node1": 0, "node2": 0}


@pytest.mark.nightly
def test_without_root_nothing_is_tried(island: RealLab, mirror: Mirror) -> None:
    island.ssh(
        "node1",
        "id guest >/dev/null 2>&1 || useradd -m guest; cp -r /root/.ssh /home/guest; chown -R guest: /home/guest",
    )
    done = prepare(island, at(mirror, island).variables(ansible_user="guest"), "--limit", "node1", check=False)
    said = done.stdout + done.stderr
    assert "- user: guest (needed: root)" in said
    assert "to mend: set ansible_become: true" in said


@pytest.mark.nightly
def test_the_firewall_lets_peers_in_and_strangers_not(island: RealLab, mirror: Mirror) -> None:
    here = at(mirror, island)
    site = {"name": "site", "url": f"{here.url}debian/", "key_url": f"{here.url}debian/key.asc",
            "suites": ["site"], "components": ["main"], "fingerprints": [here.fingerprint]}  # fmt: skip
    peer, stranger = ("peer", "198.19.77"), ("stranger", "198.19.78")
    peers = [*(island.address(node) for node in ("node1", "node2")), "198.19.77.2"]
    variables = here.variables(host_repositories=[site], host_firewall=True, host_firewall_peers=peers)
    for name, network in (peer, stranger):
        visitor(island, name, network)
    for port in (8000, 2222):
        island.ssh("node1", f"systemd-run -q --unit=stand-in-{port} python3 -m http.server {port}")
    deadline = time.monotonic() + 30
    while not (reaches(island, *stranger, 8000) and reaches(island, *peer, 8000)):
        assert time.monotonic() < deadline, "the node's server did not come up"
        time.sleep(0.5)
    prepare(island, variables)
    assert not reaches(island, *stranger, 8000)
    assert reaches(island, *stranger, 2222)
    assert reaches(island, *stranger, 22)
    assert reaches(island, *peer, 8000)
    assert changed_tasks(prepare(island, variables)) == {"node1": 0, "node2": 0}
    assert changed_tasks(prepare(island, variables, "--check", "--diff")) == {"node1": 0, "node2": 0}
    island.ssh("node1", "nft add table inet theirs; nft delete rule inet stepladder input handle "
               "$(nft -a list table inet stepladder | sed -n 's/.*tcp dport @ports.*# handle //p')")  # fmt: skip
    assert reaches(island, *stranger, 8000)
    assert "host: load the rules" in prepare(island, variables, "--limit", "node1").stdout
    assert not reaches(island, *stranger, 8000)
    prepare(island, variables | {"host_firewall_clients": ["198.19.78.0/24"]}, "--limit", "node1")
    assert reaches(island, *stranger, 8000)
    prepare(island, variables | {"host_firewall": False}, "--limit", "node1")
    tables = island.ssh("node1", "nft list tables").stdout
    assert "stepladder" not in tables
    assert "theirs" in tables


@pytest.mark.nightly
def test_amd_gets_rocm_groups_and_kernel_settings(island: RealLab, mirror: Mirror) -> None:
    forget(island, "node2")
    here = at(mirror, island)
    # Suite and component are the vendor's: the catalogue's own line has to fit.
    mirrors = {
        part: {"url": f"{here.url}{part}/", "key_url": f"{here.url}{part}/key.asc", "fingerprints": [here.fingerprint]}
        for part in ("amdgpu", "rocm")
    }
    # Engines for this GPU come as containers, and this site has no Docker to give. Asked for otherwise there is no
    # plan, and drivers are prepared all the same.
    variables = here.variables(
        deployment_gpu="mi355x", deployment_install="venv", gpu_driver_mirrors=mirrors, gpu_driver_strict=False,
        gpu_driver_users=["serving"],
    )  # fmt: skip
    island.ssh("node2", "id serving >/dev/null 2>&1 || useradd serving")
    prepare(island, variables, "--limit", "node2", "--check", "--diff")
    first = prepare(island, variables, "--limit", "node2")
    assert "AMD Instinct MI355X: ROCm 7.2.4, amdgpu 30.30.4" in first.stdout
    assert "reboot: the kernel runs without iommu=pt pci=realloc=off" in first.stdout
    assert "not possible here: there is no GRUB: start the kernel with iommu=pt pci=realloc=off" in first.stdout
    assert "render" in island.ssh("node2", "id -nG serving").stdout.split()
    held = island.ssh("node2", "apt-mark showhold").stdout.split()
    assert held == ["amd-smi-lib", "amdgpu-dkms", "rocm-core", "rocm-smi-lib", "rocminfo"]
    sysctl = island.ssh("node2", "cat /etc/sysctl.d/60-stepladder-gpu.conf 2>/dev/null", check=False).stdout
    assert "kernel.numa_balancing = 0" in sysctl or not Path("/proc/sys/kernel/numa_balancing").exists()
    assert changed_tasks(prepare(island, variables, "--limit", "node2")) == {"node2": 0}


def ad_hoc(lab: RealLab, node: str, module: str, arguments: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """One module of ours on one node."""
    ansible = Path(sys.executable).with_name("ansible")
    command = [ansible, node, "-i", lab.inventory, "-m", f"stepladder.core.{module}", "-a", json.dumps(arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.nightly
def test_environments_are_made_from_the_sites_index_alone(island: RealLab, mirror: Mirror, tmp_path: Path) -> None:
    """The module that makes engines' environments, on a node without a way out: uv and a package come from a static
    index that asks for a password, and nobody but root reads that."""
    here = at(mirror, island)
    host = here.url.split("/")[2].rpartition(":")[0]
    tools = (REPOSITORY / "catalog/tools.yml").read_text()
    uv_version = re.search(r"(?m)^uv: (\S+)$", tools)
    assert uv_version
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    subprocess.run([*download, f"uv=={uv_version[1]}", "six"], check=True, timeout=300)
    wheels = sorted(tmp_path.glob("*.whl"))
    signed_repository.index(mirror.folder / "private/simple", wheels)
    six = next(wheel for wheel in wheels if wheel.name.startswith("six-"))
    digest = hashlib.sha256(six.read_bytes()).hexdigest()
    user, _, password = LOGIN.partition(":")
    variables = {
        "deployment_gpu": "cpu",
        "python_mirror_index_url": f"{here.url}private/simple/",
        "python_mirror_trusted_hosts": [host],
        "python_mirror_credentials": [{"host": host, "user": user, "password": password}],
    }
    leaky = variables | {"python_mirror_index_url": f"http://{LOGIN}@{host}/simple/"}
    refused = prepare(island, leaky, "--limit", "node2", check=False)
    assert f"the address of {host} carries a password" in refused.stdout + refused.stderr
    shown = prepare(island, variables, "--limit", "node2", "--diff", "-vv")
    assert "python: write /root/.netrc" in shown.stdout
    assert password not in shown.stdout + shown.stderr
    assert changed_tasks(prepare(island, variables, "--limit", "node2")) == {"node2": 0}
    assert island.ssh("node2", "stat -c '%a %U' /root/.netrc").stdout == "600 root\n"
    assert island.ssh("node2", f"grep -rl {password} /etc /var/log /tmp 2>/dev/null", check=False).stdout == ""
    made = ad_hoc(
        island, "node2", "python_venv",
        {
            "path": "/var/lib/stepladder/venvs/probe",
            "requirements": f"six=={six.name.split('-')[1]} --hash=sha256:{digest}\n",
            "uv_version": uv_version[1],
            "uv_requirement": (REPOSITORY / "catalog/locks/uv.txt").read_text(),
            "tools_dir": "/var/lib/stepladder/tools",
            "cache_dir": "/var/lib/stepladder/cache",
        },
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-2000:]
    assert island.ssh("node2", "/var/lib/stepladder/venvs/probe/bin/python -c 'import six'").returncode == 0
