"""Settings of a node's system, on a copy of its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import node_settings
from ansible_collections.stepladder.core.plugins.module_utils.node_settings import Wanted

WANTED = Wanted(
    "host",
    sysctl={"net.core.somaxconn": "4096", "kernel.numa_balancing": "0"},
    sysfs={"/sys/kernel/mm/transparent_hugepage/enabled": "madvise", "/sys/cpu/cpu*/governor": "performance"},
    limits={"memlock": "unlimited", "nofile": "1048576"},
    reasons={"memlock": "RDMA pins what it sends"},
    swap_off=True,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node without NUMA balancing in its kernel, with two CPUs and a swap in its fstab that is off."""
    for path, text in {
        "proc/sys/net/core/somaxconn": "128\n",
        "proc/meminfo": "MemAvailable:   1000000 kB\n",
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
        "sys/cpu/cpu0/governor": "powersave\n",
        "sys/cpu/cpu1/governor": "performance\n",
        "etc/fstab": "UUID=1 / ext4 defaults 0 1\n# UUID=3 none swap sw 0 0\nUUID=2\tnone\tswap\tsw\t0\t0\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def text(root: Path, path: str) -> str:
    return (root / path).read_text()


def test_a_fresh_node_is_set_now_and_for_its_next_start(root: Path) -> None:
    plan = node_settings.look(WANTED, root)
    node_settings.apply(plan, root)
    assert text(root, "proc/sys/net/core/somaxconn") == "4096"
    assert text(root, "sys/cpu/cpu0/governor") == "performance"
    assert text(root, "etc/sysctl.d/60-stepladder-host.conf") == node_settings.HEAD + "net.core.somaxconn = 4096\n"
    assert text(root, "etc/tmpfiles.d/stepladder-host.conf") == node_settings.HEAD + (
        "w /sys/kernel/mm/transparent_hugepage/enabled - - - - madvise\nw /sys/cpu/cpu*/governor - - - - performance\n"
    )
    assert text(root, "etc/security/limits.d/60-stepladder-host.conf") == node_settings.HEAD + (
        "# RDMA pins what it sends\n*    -  memlock  unlimited\nroot -  memlock  unlimited\n"
        "*    -  nofile  1048576\nroot -  nofile  1048576\n"
    )
    assert text(root, "etc/systemd/system.conf.d/60-stepladder-host.conf") == node_settings.HEAD + (
        "[Manager]\n# RDMA pins what it sends\nDefaultLimitMEMLOCK=infinity\nDefaultLimitNOFILE=1048576\n"
    )
    assert text(root, "etc/fstab") == (
        "UUID=1 / ext4 defaults 0 1\n# UUID=3 none swap sw 0 0\n# off by stepladder: UUID=2\tnone\tswap\tsw\t0\t0\n"
    )


def test_a_second_look_finds_nothing(root: Path) -> None:
    node_settings.apply(node_settings.look(WANTED, root), root)
    # A kernel shows the one that is chosen.
    (root / "sys/kernel/mm/transparent_hugepage/enabled").write_text("always [madvise] never\n")
    assert node_settings.look(WANTED, root).actions() == []


def test_what_is_taken_back_is_taken_out_of_the_files(root: Path) -> None:
    node_settings.apply(node_settings.look(WANTED, root), root)
    plan = node_settings.look(Wanted("host", sysctl={"net.core.somaxconn": "4096"}), root)
    node_settings.apply(plan, root)
    left = sorted(str(path.relative_to(root)) for path in (root / "etc").rglob("*stepladder*"))
    assert left == ["etc/sysctl.d/60-stepladder-host.conf"]


def test_swap_that_does_not_fit_into_memory_stays(root: Path) -> None:
    (root / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/sda2 partition 8000000 2000000 -2\n")
    plan = node_settings.look(WANTED, root)
    assert plan.swap == []
    assert plan.unmet == ["swap: 2.0 GB are in use and 1.0 GB of memory are free; stop what uses it, then run again"]


@pytest.fixture
def tools(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for systemctl and swapoff, which note that they were called; a swap that is on."""
    folder = root / "tools"
    folder.mkdir()
    for name in ("systemctl", "swapoff"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{root}/calls\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (root / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/sda2 partition 8000000 2000 -2\n")
    return folder


def test_systemd_has_the_new_limits_before_swapoff_takes_its_time(root: Path, tools: Path) -> None:
    """Whoever is interrupted in swapoff finds the files equal the next time."""
    node_settings.apply(node_settings.look(WANTED, root), root)
    assert text(root, "calls").splitlines() == ["systemctl daemon-reexec", "swapoff /dev/sda2"]


def test_a_swapoff_that_takes_too_long_is_ended_and_told(
    root: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tools / "swapoff").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(node_settings, "SWAPOFF_SECONDS", 0.2)
    plan = node_settings.look(WANTED, root)
    node_settings.apply(plan, root)
    assert plan.swap == []
    assert plan.unmet == [
        "swap on /dev/sda2 stays: it was read back into memory for 0.2 s, which was not enough; stop what uses memory "
        "(free -h), or restart the node, which comes up without it, then run again"
    ]


SAME = {
    ("4096\n", "4096"): True,
    ("4096\t87380\t6291456\n", "4096 87380 6291456"): True,
    ("always [madvise] never\n", "madvise"): True,
    ("[always] madvise never\n", "madvise"): False,
    ("1\n", "0"): False,
}


@pytest.mark.parametrize(("values", "expected"), SAME.items(), ids=str)
def test_same(values: tuple[str, str], expected: bool) -> None:
    assert node_settings.same(*values) is expected


def test_paths_of_sysctl() -> None:
    assert node_settings.sysctl_path("net.core.somaxconn") == "net/core/somaxconn"
    assert node_settings.sysctl_path("net.ipv4.conf.eth0/1.rp_filter") == "net/ipv4/conf/eth0.1/rp_filter"


def test_everything_that_is_wrong_is_told() -> None:
    wrong = Wanted("host", limits={"core": "0", "nofile": "much"}, sysfs={"/proc/x": "1"})
    assert node_settings.problems(wrong) == [
        "limits: 'core' is unknown; known are memlock, nofile, stack",
        "limits: nofile is 'much', which is neither a number nor 'unlimited'",
        "sysfs: /proc/x is not below /sys",
    ]


def module(check: bool, **parameters: Any) -> dict[str, Any]:
    """Call the module as Ansible does."""
    arguments = {"ANSIBLE_MODULE_ARGS": {"_ansible_check_mode": check, "_ansible_remote_tmp": "/tmp", **parameters}}
    name = "ansible_collections.stepladder.core.plugins.modules.node_settings"
    code = (
        f"from ansible.module_utils.testing import patch_module_args; import json, sys; "
        f"import {name} as m; c = patch_module_args(json.load(sys.stdin)['ANSIBLE_MODULE_ARGS']); c.__enter__(); "
        "m.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(arguments), capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


def test_a_kernel_parameter_that_is_right_changes_nothing() -> None:
    here = Path("/proc/sys/net/core/somaxconn").read_text().strip()
    if os.geteuid():
        pytest.skip("settings need root")
    answer = module(True, name="test-of-stepladder", sysctl={"net.core.somaxconn": here})
    assert answer["actions"] == ["write /etc/sysctl.d/60-stepladder-test-of-stepladder.conf"]
    assert not Path("/etc/sysctl.d/60-stepladder-test-of-stepladder.conf").exists()
