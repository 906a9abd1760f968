"""preflight: parsers on recorded texts, checks as tables, and the whole of it on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import preflight, preflight_checks
from ansible_collections.stepladder.core.plugins.module_utils.preflight import Disk, Facts, Finding, Listener, Wanted

# ---- recorded: parsers -----------------------------------------------------------------------------------------------

KERNEL_TEXTS = "2026-11-21, Linux 6.18.44, x86_64, Debian 12"

MEMINFO = """\
MemTotal:       24684084 kB
MemFree:        18810320 kB
MemAvailable:   21751088 kB
Active(anon):       1560 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
ROLLUP = """\
55c2fcdac000-7ffc10435000 ---p 00000000 00:00 0                          [rollup]
Rss:                1856 kB
Pss:                 370 kB
Pss_Dirty:           148 kB
Pss_Anon:            148 kB
Pss_File:            222 kB
Pss_Shmem:             0 kB
"""
MEMORY = {
    f"cat /proc/meminfo (6 lines of it), {KERNEL_TEXTS}": (
        MEMINFO,
        {
            "MemTotal": 24684084 * 1024,
            "MemFree": 18810320 * 1024,
            "MemAvailable": 21751088 * 1024,
            "Active(anon)": 1560 * 1024,
            "Hugepagesize": 2048 * 1024,
        },
    ),
    f"cat /proc/self/smaps_rollup (7 lines of it), {KERNEL_TEXTS}": (
        ROLLUP,
        {
            "Rss": 1856 * 1024,
            "Pss": 370 * 1024,
            "Pss_Dirty": 148 * 1024,
            "Pss_Anon": 148 * 1024,
            "Pss_File": 222 * 1024,
            "Pss_Shmem": 0,
        },
    ),
    "nothing": ("", {}),
}


@pytest.mark.parametrize(("text", "expected"), MEMORY.values(), ids=MEMORY)
def test_meminfo(text: str, expected: dict[str, int]) -> None:
    assert preflight.parse_meminfo(text) == expected


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:B5D9 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11314 1 000000004fe409d3 100 0 0 10 0
   1: 00000000:487D 00000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 91509 2 00000000b2d864c3 100 0 0 10 0
1240: 0100007F:487D 0100007F:AF52 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0000000010f8999e 20 0 0 10 -1
1898: 0100007F:AF52 0100007F:487D 01 00000000:00000000 00:00000000 00000000     0        0 91510 2 0000000083f60f14 20 0 0 10 -1
"""  # noqa: E501  as the kernel prints it
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:487B 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 91506 1 000000005286562d 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:487E 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 91508 1 000000004339bae3 100 0 0 10 0
   2: 00000000000000000000000001000000:487C 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 91507 1 0000000026fdc751 100 0 0 10 0
"""  # noqa: E501  as the kernel prints it
SOCKETS = {
    f"cat /proc/net/tcp (2 listening, 2 connected), {KERNEL_TEXTS}": (
        TCP,
        [Listener("127.0.0.1", 46553, uid=0, inode=11314), Listener("0.0.0.0", 18557, uid=0, inode=91509)],
    ),
    f"cat /proc/net/tcp6 (3 listening), {KERNEL_TEXTS}": (
        TCP6,
        [
            Listener("::", 18555, uid=0, inode=91506),
            Listener("127.0.0.1", 18558, uid=0, inode=91508),
            Listener("::1", 18556, uid=0, inode=91507),
        ],
    ),
    "no IPv6": ("", []),
}


@pytest.mark.parametrize(("text", "expected"), SOCKETS.values(), ids=SOCKETS)
def test_proc_net_tcp(text: str, expected: list[Listener]) -> None:
    assert preflight.parse_proc_net_tcp(text) == expected


CPUINFO = """\
processor	: 0
model name	: Intel(R) Xeon(R) Processor
flags		: fpu vme sse sse2 avx f16c avx2 avx512f avx512_bf16 amx_bf16 arch_capabilities
bugs		: spectre_v1 spectre_v2
"""
FLAGS = {
    f"grep of /proc/cpuinfo, 11 of its flags, {KERNEL_TEXTS}": (
        CPUINFO,
        {"avx2", "avx512f", "amx_bf16", "fpu"},
        {"avx512_fp16"},
    ),
    "aarch64 writes Features (proc(5))": ("Features\t: fp asimd sve bf16\n", {"asimd", "bf16"}, {"avx2"}),
    "nothing": ("", set(), {"avx2"}),
}


@pytest.mark.parametrize(("text", "there", "absent"), FLAGS.values(), ids=FLAGS)
def test_cpu_flags(text: str, there: set[str], absent: set[str]) -> None:
    found = preflight.parse_cpu_flags(text)
    assert there <= found
    assert not absent & found


def test_os_release() -> None:
    text = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n'
    assert preflight.parse_os_release(text) == "Debian GNU/Linux 12 (bookworm)"


MASKED = {
    "a flag and its value": (
        "vllm serve m --api-key hunter2 --port 8000",
        "vllm serve m --api-key ******** --port 8000",
    ),
    "a flag with several values": (
        "vllm serve --api-key one two --port 1",
        "vllm serve --api-key ******** ******** --port 1",
    ),
    "a flag with =": ("x --hf-token=abc", "x --hf-token=********"),
    "a variable": ("env HF_TOKEN=abc NAME=value x", "env HF_TOKEN=******** NAME=value x"),
    "a key by its shape": ("x sk-proj-0123456789 ms-3f9a0c77-1111", "x ******** ********"),
    "inside a header": ("curl -H Authorization:Bearer_sk-0123456789", "curl -H Authorization:Bearer_********"),
    "a password in a URL": ("x redis://user:hunter2@host:1/0", "x redis://user:********@host:1/0"),
    "not secrets": (
        "x --tokenizer t --max-num-batched-tokens 8192 --ssl-keyfile /k.pem",
        "x --tokenizer t --max-num-batched-tokens 8192 --ssl-keyfile /k.pem",
    ),
}


@pytest.mark.parametrize(("line", "expected"), MASKED.values(), ids=MASKED)
def test_command_line_without_secrets(line: str, expected: str) -> None:
    assert preflight.command_line(line.split()) == expected


def test_command_line_is_shortened() -> None:
    shown = preflight.command_line(["x" * 300])
    assert (len(shown), shown[-4:]) == (160, "x...")


# ---- the checks ------------------------------------------------------------------------------------------------------

FACTS = Facts(
    hostname="gpu7",
    architecture="x86_64",
    cpu_flags=frozenset({"avx", "avx2", "fma"}),
    memory_total_bytes=64 * 2**30,
    memory_available_bytes=40 * 2**30,
    python_version="3.11.7",
    user="deploy",
    commands={"iptables": "/usr/sbin/iptables", "hwloc-ls": ""},
    unwritable={"/var/lib/stepladder": "", "/srv": "/srv belongs to root, mode 0755"},
)
MINE = Listener("0.0.0.0", 8000, 0, 1, pid=812, user="root", command="vllm serve", deployment="flash")
HIDDEN = Listener("127.0.0.1", 8000, 1003, 1, user="1003")
PORT = {"port": 8000, "host": "0.0.0.0", "process": "flash-0", "purpose": "API"}


def disk(path: str, needed: int, device: int = 1, purpose: str = "") -> Disk:
    return Disk(path, purpose or path, needed, "/data", device, 500 * 10**9, 100 * 10**9)


def of(**wanted: object) -> Wanted:
    return Wanted("flash", **wanted)


CHECKS = {
    "nothing wanted": (FACTS, of(), []),
    "architecture right": (FACTS, of(architectures=["aarch64", "x86_64"]), []),
    "architecture wrong": (
        FACTS,
        of(architectures=["aarch64"]),
        [
            Finding(
                "architecture",
                "machine",
                "x86_64",
                "aarch64",
                "take the node out of this deployment's group, or choose an engine build for its architecture",
            )
        ],
    ),
    "one group of flags suffices": (FACTS, of(cpu_flags_any=[["avx512f"], ["avx2", "fma"]]), []),
    "no group whole": (
        FACTS,
        of(cpu_flags_any=[["avx512f"], ["avx2", "avx_vnni"]]),
        [
            Finding(
                "cpu",
                "instructions",
                "only avx2",
                "avx512f or avx2+avx_vnni",
                "use a node whose CPU has them; in a virtual machine, let the host's CPU through (host-passthrough)",
            )
        ],
    ),
    "memory enough": (FACTS, of(minimum_memory_bytes=40 * 2**30), []),
    "memory enough with what the deployment itself holds": (
        replace(FACTS, own_memory_bytes=10 * 2**30),
        of(minimum_memory_bytes=50 * 2**30),
        [],
    ),
    "memory short": (
        replace(FACTS, own_memory_bytes=10 * 2**30),
        of(minimum_memory_bytes=60 * 2**30),
        [
            Finding(
                "memory",
                "available memory",
                "50.0 GiB of 64.0 GiB, 10.0 GiB of it held by this deployment",
                "60.0 GiB",
                "stop what uses it (ps -eo pid,user,rss,args --sort=-rss | head), or use a node with more",
            )
        ],
    ),
    "shared memory of a plain container": (
        replace(FACTS, shared_memory_bytes=64 * 2**20),
        of(minimum_shared_memory_bytes=512 * 2**20),
        [
            Finding(
                "shared memory",
                "/dev/shm",
                "64 MiB",
                "512 MiB",
                "start the container with --shm-size=1g or --ipc=host; on a machine: mount -o remount,size=1g /dev/shm",
            )
        ],
    ),
    "packages missing, no right to install them": (
        replace(FACTS, missing_packages={"libnuma.so.1": "libnuma1", "the module venv": "python3-venv"}),
        of(),
        [
            Finding("package", "libnuma.so.1", "not installed", "libnuma1", "as root: apt-get install -y libnuma1"),
            Finding(
                "package",
                "the module venv",
                "not installed",
                "python3-venv",
                "as root: apt-get install -y python3-venv",
            ),
        ],
    ),
    "packages missing, installed by the deploy itself": (
        replace(FACTS, missing_packages={"libnuma.so.1": "libnuma1"}, can_install=True),
        of(),
        [],
    ),
    "each fits alone, not together": (
        replace(FACTS, disks=(disk("/data/a", 60 * 10**9, purpose="weights"), disk("/data/b", 50 * 10**9))),
        of(),
        [
            Finding(
                "disk",
                "/data/a, /data/b",
                "100.0 GB free on /data",
                "110.0 GB (60.0 GB for weights + 50.0 GB for /data/b)",
                "free 10.0 GB on /data, or give a path on a larger file system",
            )
        ],
    ),
    "two file systems": (replace(FACTS, disks=(disk("/a", 60 * 10**9), disk("/b", 50 * 10**9, device=2))), of(), []),
    "just enough": (replace(FACTS, disks=(disk("/a", 100 * 10**9),)), of(), []),
    "not writable": (
        FACTS,
        of(writable_paths=["/var/lib/stepladder", "/srv"]),
        [
            Finding(
                "writable",
                "/srv",
                "/srv belongs to root, mode 0755",
                "a directory that deploy may write, or may make",
                "let deploy write there, or run with become, or give another path",
            )
        ],
    ),
    "port held by this deployment": (replace(FACTS, listeners=(MINE,)), of(ports=[PORT]), []),
    "port held by another deployment": (
        replace(FACTS, listeners=(replace(MINE, deployment="step3"),)),
        of(ports=[PORT]),
        [
            Finding(
                "port",
                "0.0.0.0:8000",
                "held by pid 812 of deployment step3, user root: vllm serve",
                "free for flash-0 (API)",
                "stop deployment step3, or choose another port for flash-0",
            )
        ],
    ),
    "port held by whom this user may not see": (
        replace(FACTS, listeners=(HIDDEN,)),
        of(ports=[{"port": 8000}]),
        [
            Finding(
                "port",
                "0.0.0.0:8000",
                "held by a process of uid 1003 on 127.0.0.1; deploy may not see which one",
                "free for flash",
                "find it (ss -ltnp, as root), or choose another port for it",
            )
        ],
    ),
    "port that root finds nobody at": (
        replace(FACTS, listeners=(HIDDEN,), user="root"),
        of(ports=[PORT]),
        [
            Finding(
                "port",
                "0.0.0.0:8000",
                "held by uid 1003 on 127.0.0.1; no process here has it open, so by a container's or the kernel",
                "free for flash-0 (API)",
                "find it (docker ps, lsns -t net), or choose another port for flash-0",
            )
        ],
    ),
    "the same port at another address": (
        replace(FACTS, listeners=(HIDDEN,)),
        of(ports=[{"port": 8000, "host": "10.0.0.7"}]),
        [],
    ),
    "another port": (replace(FACTS, listeners=(HIDDEN,)), of(ports=[{"port": 8001}]), []),
    "python new enough (3.9 is less than 3.11)": (FACTS, of(minimum_python="3.9"), []),
    "python too old": (
        replace(FACTS, python_version="3.9.18"),
        of(minimum_python="3.11", python="/usr/bin/python3"),
        [
            Finding(
                "python",
                "/usr/bin/python3",
                "Python 3.9.18",
                "Python 3.11 or later",
                "install Python 3.11 or later, or set python to the path of one",
            )
        ],
    ),
    "no python": (
        replace(FACTS, python_version=""),
        of(minimum_python="3.11", python="python3.12"),
        [
            Finding(
                "python",
                "python3.12",
                "no such interpreter, or it does not start",
                "Python 3.11 or later",
                "install Python 3.11 or later, or set python to the path of one",
            )
        ],
    ),
    "a command missing": (
        FACTS,
        of(commands=[{"name": "iptables"}, {"name": "hwloc-ls", "package": "hwloc"}]),
        [Finding("command", "hwloc-ls", "not on the PATH", "on the PATH", "install the package hwloc")],
    ),
}


@pytest.mark.parametrize(("facts", "wanted", "expected"), CHECKS.values(), ids=CHECKS)
def test_checks(facts: Facts, wanted: Wanted, expected: list[Finding]) -> None:
    assert preflight_checks.findings(facts, wanted) == expected


OVERLAPS = {
    ("127.0.0.1", "127.0.0.1"): True,
    ("127.0.0.1", "10.0.0.7"): False,
    ("localhost", "127.0.0.1"): True,
    ("localhost", "10.0.0.7"): False,
    ("0.0.0.0", "10.0.0.7"): True,
    ("10.0.0.7", "0.0.0.0"): True,
    ("10.0.0.7", "::"): True,
    ("::1", "127.0.0.1"): False,
    ("gpu7.rack2", "10.0.0.7"): True,
}


def test_packages_to_install_are_named_once_and_only_where_they_can_be() -> None:
    missing = {"liba.so.1": "a", "libb.so.1": "a", "the module venv": "python3-venv"}
    assert replace(FACTS, missing_packages=missing, can_install=True).packages_to_install == ["a", "python3-venv"]
    assert replace(FACTS, missing_packages=missing).packages_to_install == []


def test_libraries_are_asked_of_the_dynamic_linker() -> None:
    wanted = of(libraries=[{"soname": "libc.so.6", "package": "libc6"}, {"soname": "libnot.so.9", "package": "not9"}])
    assert preflight.gather(wanted).missing_packages == {"libnot.so.9": "not9"}


@pytest.mark.parametrize(("hosts", "expected"), OVERLAPS.items(), ids=str)
def test_overlaps(hosts: tuple[str, str], expected: bool) -> None:
    assert preflight_checks.overlaps(*hosts) is expected


# ---- this machine ----------------------------------------------------------------------------------------------------

LISTEN = """
import socket, sys, time
held = socket.create_server(("127.0.0.1", 0))
memory = b"x" * (64 * 2**20)
print(held.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process of the deployment `other` that holds a port, 64 MiB, and a key on its command line."""
    (tmp_path / "listen.py").write_text(LISTEN)
    process = subprocess.Popen(
        [sys.executable, "listen.py", "--api-key", "hunter2"],
        cwd=tmp_path,
        env={**os.environ, "STEPLADDER_DEPLOYMENT": "other"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    yield process, int(process.stdout.readline())
    process.communicate()


def failures(wanted: Wanted) -> list[Finding]:
    """What makes this machine unfit; warnings, of which it may have any, left out."""
    found = preflight_checks.findings(preflight.gather(wanted), wanted)
    return [one for one in found if one.severity == preflight.FAILURE]


def test_a_real_port_is_named_with_its_process(listening: tuple[subprocess.Popen[str], int]) -> None:
    process, port = listening
    wanted = of(ports=[{"port": port, "host": "127.0.0.1", "process": "flash-0"}])
    facts = preflight.gather(wanted)
    [found] = failures(wanted)
    assert found.found == (
        f"held by pid {process.pid} of deployment other, user {facts.user}: "
        f"{sys.executable} listen.py --api-key ********"
    )
    own = replace(wanted, deployment="other")
    assert failures(own) == []


def test_memory_of_the_deployment_itself_is_counted(listening: tuple[subprocess.Popen[str], int]) -> None:
    assert 64 * 2**20 < preflight.own_memory("other", Path("/proc")) < 256 * 2**20
    assert preflight.own_memory("nobody's", Path("/proc")) == 0


def test_a_closed_port_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    wanted = of(ports=[{"port": port, "host": "127.0.0.1"}])
    assert failures(wanted) == []


@pytest.mark.parametrize(("host", "foreign"), [("198.18.0.77", True), ("0.0.0.0", False), ("127.0.0.1", False)])
def test_an_address_that_the_node_does_not_have_is_named(host: str, foreign: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = failures(of(ports=[{"port": port, "host": host, "process": "flash-0"}]))
    assert [(one.what, one.mend) for one in found] == [
        (
            f"198.18.0.77:{port}",
            "set deployment_bind_address to 0.0.0.0, or ansible_host to an address of the node's own",
        )
    ] * foreign


def test_a_process_that_cannot_be_looked_into(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(TCP)
    (tmp_path / "812").mkdir()  # as for another user: the process is there, its fd and environ are not to be read
    facts = preflight.gather(of(ports=[{"port": 18557}]), proc=tmp_path)
    assert facts.listeners == (Listener("0.0.0.0", 18557, 0, 91509, user="root"),)


def test_disks_of_paths_that_are_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.bin").write_bytes(bytes(1000))
    wants = [
        {"path": str(tmp_path / "new" / "deep"), "minimum_free_bytes": 5, "purpose": "weights"},
        {"path": str(tmp_path), "minimum_free_bytes": 5000, "existing_bytes_path": str(tmp_path / "models")},
        {"path": str(tmp_path), "minimum_free_bytes": 5, "existing_bytes_path": str(tmp_path / "models")},
    ]
    found = preflight.gather(of(paths=wants)).disks
    assert [one.needed_bytes for one in found] == [5, 4000, 0]
    assert len({(one.device, one.mount) for one in found}) == 1
    assert Path(found[0].mount).is_mount()
    too_much = of(paths=[{"path": str(tmp_path), "minimum_free_bytes": 10**18}])
    assert [one.check for one in failures(too_much)] == ["disk"]


def test_writable_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reasons = {
        str(tmp_path / "new" / "deep"): "",
        str(tmp_path / "file" / "below"): f"{tmp_path / 'file'} is not a directory",
    }
    assert preflight.gather(of(writable_paths=list(reasons))).unwritable == reasons


def test_an_environments_python_is_asked_for_its_version(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib/python3.11/site-packages/ray-2.60.0.dist-info").mkdir(parents=True)
    (tmp_path / "pyvenv.cfg").write_text("version = 3.11.2\n")  # as it was made; the system's Python was renewed since
    assert preflight.installed_in(str(tmp_path)) == {"ray": "2.60.0"}
    (tmp_path / "bin/python").symlink_to(sys.executable)
    assert preflight.installed_in(str(tmp_path)) == {"python": sys.version.split()[0], "ray": "2.60.0"}


def test_facts_of_this_machine() -> None:
    facts = preflight.gather(
        of(minimum_python="3.9", python=sys.executable, commands=[{"name": "sh"}, {"name": "no-such"}])
    )
    assert facts.python_version == sys.version.split()[0]
    assert facts.commands["sh"].endswith("/sh")
    assert facts.commands["no-such"] == ""
    assert 0 < facts.memory_available_bytes < facts.memory_total_bytes
    assert preflight.python_version("/no/such/python") == ""
    assert json.loads(json.dumps(facts.as_result()))["hostname"] == socket.gethostname()
