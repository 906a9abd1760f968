"""Docker's settings: ours beside other people's, and what becomes of containers that run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import docker_settings as ds
from ansible_collections.stepladder.core.plugins.modules import docker_settings

MIRROR, OTHER = "https://mirror.example", "https://other.example"


@pytest.mark.parametrize(
    ("current", "wanted", "earlier", "settings", "changed"),
    [
        ({}, {"live-restore": True}, {}, {"live-restore": True}, ("live-restore",)),
        ({"bip": "198.19.254.1/24"}, {"live-restore": True}, {}, {"bip": "198.19.254.1/24", "live-restore": True},
         ("live-restore",)),
        ({"live-restore": True}, {"live-restore": True}, {}, {"live-restore": True}, ()),
        # A list gets what it lacks; what others put there stays, what we put there earlier goes.
        ({"registry-mirrors": [OTHER]}, {"registry-mirrors": [MIRROR]}, {}, {"registry-mirrors": [OTHER, MIRROR]},
         ("registry-mirrors",)),
        ({"registry-mirrors": [OTHER, MIRROR]}, {}, {"registry-mirrors": [MIRROR]}, {"registry-mirrors": [OTHER]},
         ("registry-mirrors",)),
        ({"registry-mirrors": [MIRROR]}, {}, {"registry-mirrors": [MIRROR]}, {}, ("registry-mirrors",)),
        # A value that we set earlier gives way to the new one, and goes when none is wanted.
        ({"data-root": "/a"}, {"data-root": "/b"}, {"data-root": "/a"}, {"data-root": "/b"}, ("data-root",)),
        ({"data-root": "/a", "debug": True}, {}, {"data-root": "/a"}, {"debug": True}, ("data-root",)),
        ({"data-root": "/theirs"}, {}, {"data-root": "/a"}, {"data-root": "/theirs"}, ()),
        # Inside a mapping the same holds for each key.
        ({"features": {"b": 1}}, {"features": {"cdi": True}}, {}, {"features": {"b": 1, "cdi": True}}, ("features",)),
        ({"features": {"b": 1, "cdi": True}}, {}, {"features": {"cdi": True}}, {"features": {"b": 1}}, ("features",)),
    ],
)  # fmt: skip
def test_settings_of_others_stay(
    current: dict[str, Any], wanted: dict[str, Any], earlier: dict[str, Any], settings: dict[str, Any], changed: Any
) -> None:
    merged = ds.merge(current, wanted, earlier)
    assert (merged.settings, merged.changed, merged.conflicts) == (settings, changed, ())
    again = ds.merge(merged.settings, wanted, wanted)
    assert again.changed == (), "a second run changes something"


def test_all_conflicts_are_told_with_both_values() -> None:
    current = {"data-root": "/theirs", "default-ulimits": {"memlock": {"Hard": 1}}, "registry-mirrors": "x"}
    wanted = {"data-root": "/b", "default-ulimits": {"memlock": {"Hard": -1}}, "registry-mirrors": [MIRROR]}
    mend = ": take it out there, or set the variable of container_runtime to what it is"
    assert ds.merge(current, wanted, {}).conflicts == (
        f'data-root is "/theirs" in daemon.json and "/b" is wanted{mend}',
        f"default-ulimits.memlock.Hard is 1 in daemon.json and -1 is wanted{mend}",
        f'registry-mirrors is "x" in daemon.json and ["{MIRROR}"] is wanted{mend}',
    )


@pytest.mark.parametrize(
    ("changed", "unit", "how"),
    [((), False, "none"), (("live-restore", "registry-mirrors"), False, "reload"), (("features",), False, "restart"),
     ((), True, "restart"), (("registry-mirrors", "data-root"), False, "restart")],
)  # fmt: skip
def test_a_running_docker_takes_over_what_it_can(changed: tuple[str, ...], unit: bool, how: str) -> None:
    assert ds.how(changed, unit) == how


@pytest.mark.parametrize(
    ("changed", "running", "live", "allowed", "obstacle"),
    [
        (("features",), [], False, False, ""),
        (("features",), ["step3-vllm-0"], True, False, ""),
        (("features",), ["step3-vllm-0"], False, True, ""),
        (
            ("features",),
            ["a", "b"],
            False,
            False,
            "Docker has to be started anew (features changed), which would end a, b.",
        ),
        ((), ["a"], False, False, "Docker has to be started anew (its unit changed), which would end a."),
        (("data-root",), ["a"], True, False, "data-root changes, and Docker would lose sight of a."),
    ],
)
def test_no_container_ends_unasked(
    changed: tuple[str, ...], running: list[str], live: bool, allowed: bool, obstacle: str
) -> None:
    found = ds.obstacle(changed, running, live, allowed)
    assert found.startswith(obstacle)
    assert bool(found) == bool(obstacle)


def test_what_systemd_is_given() -> None:
    assert ds.drop_in({"MEMLOCK": "infinity"}, "/etc/docker/p.env") == (
        "# Made by stepladder.\n[Service]\nLimitMEMLOCK=infinity\nEnvironmentFile=/etc/docker/p.env\n"
    )
    assert ds.proxy_file({"http_proxy": 'http://u:a"b\\c@p.example'}) == (
        'HTTP_PROXY="http://u:a\\"b\\\\c@p.example"\nhttp_proxy="http://u:a\\"b\\\\c@p.example"\n'
    )


@pytest.mark.parametrize(("text", "fault"), [("{", "is not JSON"), ("[]", "holds a list, and Docker wants an object")])
def test_a_broken_file_is_left_alone(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "daemon.json"
    file.write_text(text)
    with pytest.raises(ds.SettingsError, match=fault):
        ds.read_settings(file)
    assert file.read_text() == text


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    file = ds.File(tmp_path / "deep" / "p.env", "secret\n", 0o400)
    assert file.differs()
    file.write()
    assert not file.differs()
    assert file.path.stat().st_mode & 0o777 == 0o400
    ds.File(file.path, None, 0o400).write()
    assert not file.path.exists()


def test_a_full_file_system_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        ds.File(tmp_path / "daemon.json", "{}\n", 0o644).write()
    assert caught.value.filename == str(tmp_path / "daemon.json")
    assert list(tmp_path.iterdir()) == []


DOCKER = """\
#!/bin/sh
# Stand-in for docker and systemctl: notes what changes something; Docker tells of a reload unless `refuses` is there.
cd {folder}
case "$1" in
  version) echo 29.1.2 ;;
  info) case "$3" in *DriverStatus*) cat store 2>/dev/null || echo '[[Backing extfs]]' ;; *) echo true ;; esac ;;
  ps) [ ! -e running ] || cat running ;;
  events) [ ! -e reloaded ] || echo reload ;;
  reload) echo "$1" >>calls; echo "Warning: the unit changed on disk" >&2; [ -e refuses ] || touch reloaded ;;
  restart) echo "$1" >>calls; ! grep -qs refused etc/docker/daemon.json ;;
esac
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose Docker answers; `calls` has what it was told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("docker", "systemctl"):
        (tools / name).write_text(DOCKER.format(folder=tmp_path))
        (tools / name).chmod(0o755)
    (tools / "journalctl").write_text("#!/bin/sh\necho 'level=error msg=\"invalid mirror\"'\n")
    (tools / "journalctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(ds, "RELOAD_SECONDS", 1.0)
    (tmp_path / "calls").touch()
    return tmp_path


def converge(node: Path, settings: dict[str, Any], check: bool = False, **limits: str) -> dict[str, Any]:
    params = {"settings": settings, "limits": limits, "proxies": {}, "restart_allowed": False, "progress_file": None}
    return docker_settings.converge({"root": str(node / "etc"), **params}, check)


def daemon(node: Path) -> Any:
    file = node / "etc/docker/daemon.json"
    return json.loads(file.read_text()) if file.exists() else None


INTERRUPTED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "before a reload": ({"registry-mirrors": [MIRROR]}, {}, "let Docker read its settings anew, without a restart"),
    "before a restart": ({"features": {"cdi": True}}, {}, "start Docker anew; no container runs"),
    "before a restart for the unit": ({}, {"MEMLOCK": "infinity"}, "start Docker anew; no container runs"),
}


@pytest.mark.parametrize(("settings", "limits", "action"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_what_an_interruption_left_is_brought_into_force(
    node: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], limits: dict[str, str], action: str
) -> None:
    def interrupt(*_: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ds, "systemctl", interrupt)
        converge(node, settings, **limits)
    assert (node / "calls").read_text() == ""
    foreseen = converge(node, settings, check=True, **limits)
    assert (foreseen["changed"], foreseen["actions"]) == (True, [action])
    assert converge(node, settings, **limits) == foreseen
    assert (node / "calls").read_text() == ("reload\n" if "registry-mirrors" in settings else "restart\n")
    again = converge(node, settings, **limits)
    assert (again["changed"], again["actions"]) == (False, [])


def test_settings_that_docker_refuses_to_take_over_are_taken_back(node: Path) -> None:
    converge(node, {"registry-mirrors": [MIRROR]})
    (node / "reloaded").unlink()
    (node / "refuses").touch()
    words = (
        r'^Docker did not take over .* within 1 s, and goes on with the files that it had\. Its log says:\n.*mirror"$'
    )
    with pytest.raises(ds.SettingsError, match=words):
        converge(node, {"registry-mirrors": ["mirror.example:5000"]})
    assert daemon(node) == {"registry-mirrors": [MIRROR]}
    assert (node / "calls").read_text() == "reload\n" * 3
    assert converge(node, {"registry-mirrors": [MIRROR]})["changed"] is False


def test_a_log_level_is_proved_by_a_restart(node: Path) -> None:
    """Docker 20.10 says that it read a mistyped one, and would not start with it."""
    with pytest.raises(ds.SettingsError, match="did not start with the new settings and runs again"):
        converge(node, {"log-level": "refused"})
    assert daemon(node) is None


def test_the_way_back_leads_past_an_interrupted_run(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever saw Docker not come back and pressed Ctrl-C gets the files that it ran with."""
    converge(node, {"debug": True})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ds, "wait_answer", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        converge(node, {"debug": True, "bip": "198.19.254.1/24"})
    settings = {"debug": True, "bip": "198.19.254.1/24", "log-level": "refused"}
    with pytest.raises(ds.SettingsError, match="runs again with the files that it had"):
        converge(node, settings)
    assert daemon(node) == {"debug": True}
    assert sorted(path.name for path in (node / "etc/docker").iterdir()) == ["daemon.json", "stepladder.json"]


def test_what_an_interruption_left_ends_no_container_either(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ds, "systemctl", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        converge(node, {"data-root": "/b"})
    (node / "running").write_text("step3-vllm-0\n")
    with pytest.raises(ds.SettingsError, match="data-root changes, and Docker would lose sight of step3-vllm-0"):
        converge(node, {"data-root": "/b"})


def test_containers_in_the_other_store_of_images_are_not_lost_sight_of(node: Path) -> None:
    """A Docker that comes back with another store knows nothing of what runs, live-restore or not."""
    settings = {"features": {"cdi": True, "containerd-snapshotter": False}}
    (node / "running").write_text("step3-vllm-0\n")
    (node / "store").write_text("[[driver-type io.containerd.snapshotter.v1]]\n")
    with pytest.raises(ds.SettingsError, match=r"^features.containerd-snapshotter changes, and Docker would lose"):
        converge(node, settings)
    assert converge(node, {"features": {"cdi": True}})["changed"]
    (node / "store").unlink()
    assert converge(node, settings)["changed"], "it keeps images in that store already"
