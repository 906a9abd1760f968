"""What keeps a node's time, by the role itself: chrony, timesyncd, systemd and apt are stand-ins that keep their state.

Debian's chrony.service has no ExecReload (4.3-2+deb12u3), and its chrony.conf names sources.d; Red Hat's does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepladder.preparing import time_keeper

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["chrony", "chronyd", "systemd-timesyncd", "ntp"]
KEEPERS: dict[str, tuple[list[str], list[str], bool, str]] = {
    "nothing keeps it": (["inactive"] * 4, [], False, "chrony"),
    "nothing, in a container": (["inactive"] * 4, ["a"], True, ""),
    "timesyncd, no servers": (["inactive", "inactive", "active", "inactive"], [], False, ""),
    "timesyncd, servers": (["inactive", "inactive", "active", "inactive"], ["a"], False, "timesyncd"),
    "chrony, servers": (["active", "active", "inactive", "inactive"], ["a"], False, "chrony"),
    "both, servers": (["active", "active", "active", "inactive"], ["a"], False, "chrony"),
    "another, no servers": (["inactive", "inactive", "inactive", "active"], [], False, ""),
    "another, servers: chrony's package says that it excludes it": (
        ["inactive", "inactive", "inactive", "active"], ["a"], False, "chrony",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("states", "servers", "container", "expected"), KEEPERS.values(), ids=KEEPERS)
def test_what_is_set_up(states: list[str], servers: list[str], container: bool, expected: str) -> None:
    assert time_keeper(NAMES, states, servers, container) == expected


STAND_IN = """\
#!{python}
import pathlib, sys
world = pathlib.Path({world!r})
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
def flag(what):
    return world / "is" / what
def reads(service):
    # What a service knows is what lay there when it last looked.
    sources, settings = world / "sources.d/s.sources", world / "timesyncd.d/s.conf"
    if service.startswith("chrony") and (flag("debian").exists() or "sourcedir" in (world / "chrony.conf").read_text()):
        flag("known").write_text(sources.read_text() if sources.exists() else "")
    if service.startswith("systemd-timesyncd"):
        flag("known").write_text(settings.read_text().partition("NTP=")[2] if settings.exists() else "")
def ends(status, text=""):
    print(text)
    sys.exit(status)
unit = words[-1].removesuffix(".service") if words else ""
if name == "systemd-detect-virt":
    ends(1, "none")
if name == "dpkg-query":
    ends(0, "chrony\\t4.3\\tii" if flag("installed").exists() else "")
if name == "apt-get":
    if "-s" in words:
        ends(0, "Inst chrony (4.3 x [amd64])")
    if "install" in words:
        flag("installed").touch(), flag("chrony").touch(), reads("chrony")
if name == "timedatectl":
    ends(0, flag("known").read_text() if flag("known").exists() else "")
if name == "chronyc":
    if words != ["reload", "sources"] or not (flag("chrony").exists() or flag("chronyd").exists()):
        ends(1, "506 Cannot talk to daemon")
    reads("chrony")
if name == "systemctl":
    verb = next(word for word in words if not word.startswith("-"))
    if verb == "is-active":
        states = ["active" if flag(each).exists() else "inactive" for each in words[1:]]
        ends(0 if "active" in states else 3, "\\n".join(states))
    if verb == "show":
        state = "active" if flag(unit).exists() else "inactive"
        ends(0, "LoadState=loaded\\nActiveState=" + state + "\\nUnitFileState=enabled")
    if verb == "is-enabled":
        ends(0, "enabled")
    if verb == "reload":
        ends(1, "Failed to reload: Job type reload is not applicable for unit " + unit)
    if verb in ("start", "restart"):
        flag(unit).touch(), reads(unit)
"""


class World:
    """A machine of stand-ins, and the role on it."""

    def __init__(self, folder: Path, *states: str) -> None:
        self.folder = folder
        for name in ("bin", "is", "tmp"):
            (folder / name).mkdir()
        for name in states:
            (folder / "is" / name).touch()
        (folder / "chrony.conf").write_text("pool 2.example.org iburst\n")
        text = STAND_IN.replace("{python}", sys.executable).replace("{world!r}", repr(str(folder)))
        for name in ["systemctl", "systemd-detect-virt", "chronyc", "timedatectl", "apt-get", "apt-mark", "dpkg-query"]:
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        family = "Debian" if "debian" in states else "RedHat"
        tasks: list[dict[str, Any]] = [
            {"ansible.builtin.set_fact": {"os_family": family, "cacheable": True}},
            {"ansible.builtin.set_fact": {"host_changes": []}},
            {"ansible.builtin.include_role": {"name": "host", "tasks_from": "time"}},
            {"ansible.builtin.debug": {"msg": "CHANGES {{ host_changes | to_json }}"}},
        ]
        play = {"hosts": "localhost", "gather_facts": False, "tasks": tasks}
        play["environment"] = {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
        (folder / "play.yml").write_text(json.dumps([play]))

    def run(self, *servers: str, check: bool = False) -> str:
        """Run the role; its output, once it has succeeded."""
        places = {
            "__host_chrony_sources": f"{self.folder}/sources.d/s.sources",
            "__host_chrony_config": f"{self.folder}/chrony.conf",
            "__host_timesyncd_servers": f"{self.folder}/timesyncd.d/s.conf",
        }
        variables = json.dumps({"host_time_servers": servers, "host_lock_timeout": 5, **places})
        options = ["-i", "localhost,", "-c", "local", "-e", variables, *(["--check"] if check else [])]
        command = [str(Path(sys.executable).with_name("ansible-playbook")), *options, str(self.folder / "play.yml")]
        environ = {
            **os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable, "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
        }  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        return done.stdout

    def known(self) -> list[str]:
        """The servers that what keeps the time was told of."""
        file = self.folder / "is" / "known"
        text = file.read_text() if file.exists() else ""
        return text.replace("server ", "").replace(" iburst", "").split()


@pytest.mark.skipif(os.geteuid() != 0, reason="packages need root, here a stand-in's too")
class TestRole:
    @pytest.mark.nightly
    def test_debian_reads_them_from_its_first_start_and_every_change_of_them(self, tmp_path: Path) -> None:
        world = World(tmp_path, "debian")
        assert "install chrony 4.3" in world.run("198.18.0.1")
        assert world.known() == ["198.18.0.1"]
        out = world.run("198.18.0.2", "198.18.0.3")
        assert world.known() == ["198.18.0.2", "198.18.0.3"]
        assert "changed=1" in out
        (tmp_path / "is" / "known").write_text("")  # as after a run that was interrupted
        assert "changed=0" in world.run("198.18.0.2", "198.18.0.3")
        assert world.known() == ["198.18.0.2", "198.18.0.3"]
        world.run()
        assert world.known() == []

    @pytest.mark.nightly
    def test_red_hats_chrony_is_made_to_look_into_the_folder(self, tmp_path: Path) -> None:
        world = World(tmp_path, "chronyd", "installed")
        out = world.run("198.18.0.1")
        assert world.known() == ["198.18.0.1"]
        assert f"change {tmp_path}/chrony.conf" in out

    @pytest.mark.nightly
    def test_timesyncd_goes_on_with_the_sites_servers(self, tmp_path: Path) -> None:
        """Ubuntu's default: chrony would put it out, and a removal is refused."""
        world = World(tmp_path, "debian", "systemd-timesyncd")
        world.run("198.18.0.1", "198.18.0.2")
        assert world.known() == ["198.18.0.1", "198.18.0.2"]
        assert not (tmp_path / "is" / "installed").exists()
        (tmp_path / "is" / "known").write_text("")  # as after a run that was interrupted
        world.run("198.18.0.1", "198.18.0.2")
        assert world.known() == ["198.18.0.1", "198.18.0.2"]
        (tmp_path / "is" / "known").write_text("198.18.0.9 198.18.0.1 198.18.0.2")  # with one of the machine's own
        assert "changed=0" in world.run("198.18.0.1", "198.18.0.2")
