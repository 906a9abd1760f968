"""Docker's settings: ours beside other people's, and what becomes of containers that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import docker_settings as ds

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
