"""Variables of roles as operators give them: text for a list, numbers for text, names that no role knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import verbs
import yaml
from ansible_collections.stepladder.core.plugins.action.plan import ROLES as PLANNED

from stepladder import role_variables

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"


def of_task(file: str, task: str, module: str, argument: str) -> str:
    """An argument of a task, as it is written."""
    [found] = [one for one in yaml.safe_load((ROLES / file).read_text()) if one["name"] == task]
    return str(found[module][argument])


SSH_PORTS = of_task(
    "host/tasks/firewall.yml", "Close the engines' ports to strangers", "stepladder.core.peer_firewall", "ssh_ports"
)
SYSFS = of_task(
    "host/tasks/settings.yml", "Set limits, kernel parameters and swap", "stepladder.core.node_settings", "sysfs"
)
GIVEN = {
    "an index": (
        "python_mirror", "{{ __python_mirror_sources.extra_index_urls }}",
        {"python_mirror_extra_index_urls": "https://a/simple"}, ["https://a/simple"],
    ),
    "two hosts, with a comma": (
        "python_mirror", "{{ __python_mirror_sources.trusted_hosts }}", {"python_mirror_trusted_hosts": "a, b"},
        ["a", "b"],
    ),
    "a folder": (
        "python_mirror", "{{ __python_mirror_sources.find_links }}", {"python_mirror_find_links": "/srv/w"}, ["/srv/w"],
    ),
    "a time server": ("host", "{{ __host_time_servers }}", {"host_time_servers": "ntp.example"}, ["ntp.example"]),
    "an SSH port": ("host", SSH_PORTS, {"host_firewall_ssh_ports": "2222"}, ["2222"]),
    "an SSH port as a number": ("host", SSH_PORTS, {"host_firewall_ssh_ports": 2222}, ["2222"]),
    "SSH ports as numbers": ("host", SSH_PORTS, {"host_firewall_ssh_ports": [22, 22, 2222]}, ["22", "2222"]),
    "a package of the driver": (
        "gpu_driver", "{{ __gpu_driver_wish.packages }}", {"gpu_driver_packages": "nvidia-open"}, ["nvidia-open"],
    ),
    "a mirror of Docker's hub": (
        "container_runtime", "{{ __container_runtime_settings['registry-mirrors'] }}",
        {"container_runtime_mirrors": "https://m", "__container_runtime_vendor": "cpu"}, ["https://m"],
    ),
    "Docker's package": (
        "container_runtime", "{{ __container_runtime_wanted }}",
        {"container_runtime_docker_packages": "docker.io", "__container_runtime_vendor": "nvidia"},
        ["docker.io", "nvidia-container-toolkit"],
    ),
    "nodes to measure": ("acceptance", "{{ __acceptance_hosts }}", {"acceptance_hosts": "n1,n2"}, ["n1", "n2"]),
    "a part that is left out": (
        "acceptance", "{{ __acceptance_without }}", {"acceptance_without": "network"}, ["network"],
    ),
    "no limit": (
        "host", "{{ __host_limits }}", {"host_limit_memlock": None, "host_limit_nofile": ""}, {},
    ),
    "a limit as a number": (
        "host", "{{ __host_limits }}", {"host_limit_memlock": "", "host_limit_nofile": 8192}, {"nofile": 8192},
    ),
    "no huge pages, no governor": (
        "host", SYSFS, {"host_transparent_hugepages": None, "host_cpu_governor": ""}, {},
    ),
    "nothing": ("host", "{{ __host_time_servers }}", {"host_time_servers": ""}, []),
    "a list": ("host", "{{ __host_time_servers }}", {"host_time_servers": ["a", "b"]}, ["a", "b"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The expressions, as Ansible fills them in with the roles' own defaults and constants and what was given."""
    folder = tmp_path_factory.mktemp("filled")
    tasks = [
        {"ansible.builtin.copy": {"content": f"{{{{ {expression[2:-2]} | to_json }}}}", "dest": f"{folder}/{number}"},
         "vars": given}
        for number, (_, expression, given, _) in enumerate(GIVEN.values())
    ]  # fmt: skip
    files = [str(ROLES / role / part / "main.yml") for role in sorted({case[0] for case in GIVEN.values()})
             for part in ("defaults", "vars")]  # fmt: skip
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars_files": files, "tasks": tasks}
    (folder / "play.yml").write_text(json.dumps([play]))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(folder / "play.yml")]
    done = subprocess.run(
        [*command, "-e", f"ansible_python_interpreter={sys.executable}"],
        cwd=ROOT, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HOME": str(folder)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((folder / str(number)).read_text()) for number, name in enumerate(GIVEN)}


@pytest.mark.parametrize("name", GIVEN)
def test_what_was_given_is_taken_as_it_was_meant(name: str, filled: dict[str, Any]) -> None:
    """Validation takes text for a list, and hands on what was given; a variable without a value is no text `None`."""
    assert filled[name] == GIVEN[name][3]


def prepare(folder: Path, **given: Any) -> subprocess.CompletedProcess[str]:
    """`prepare --check` of this machine, as a node without a GPU."""
    own = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "deployment_gpu": "cpu"}
    inventory = {"all": {"children": {"engines": {"hosts": {"a": {}}}}}}
    (folder / "inventory.yml").write_text(json.dumps(inventory))
    state = {"stepladder_state_directory": str(folder / "state")}
    return verbs.run(folder, "prepare", {**own, **state, **given}, "--check")


def test_nothing_has_to_be_planned(tmp_path: Path) -> None:
    """Servers are prepared before anybody knows what is to run there, nor by what name."""
    done = prepare(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a: can be prepared; nothing to change" in done.stdout


MISSPELT = {
    "a switch": ("gpu_driver_instal", ["Did you mean 'gpu_driver_install'?"]),
    "an index": ("python_mirror_indexurl", ["Did you mean 'python_mirror_index_url'?"]),
    "nothing like it": ("container_runtime_x", ["unknown variable: 'container_runtime_x'. "]),
    "the firewall": ("host_firewal", ["Did you mean 'host_firewall'?"]),
    "a word of the inventory's own": ("host_name", []),
    "another": ("host_type", []),
    "a known one": ("host_firewall", []),
    "one of the role's other entry point": ("host_lock_timeout", []),
    "another role's": ("deployment_nme", []),
}


@pytest.mark.parametrize(("name", "expected"), MISSPELT.values(), ids=MISSPELT)
def test_a_variable_that_no_role_knows_is_no_silent_default(name: str, expected: list[str]) -> None:
    roles = ["host", "gpu_driver", "container_runtime", "python_mirror", "preflight"]
    found = [str(one) for one in role_variables.misspelt([name, "ansible_host"], roles)]
    assert [all(part in one for part in expected) for one in found] == [True] * len(expected)


def test_prepare_tells_it_with_what_is_in_the_way(tmp_path: Path) -> None:
    done = prepare(tmp_path, host_firewal=True, python_mirror_index="https://a/simple")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nothing was changed: 2 faults" in done.stdout
    assert "'host_firewal'" in done.stdout
    assert "'python_mirror_index'" in done.stdout


@pytest.mark.parametrize(
    ("verb", "name"),
    [("acceptance", "acceptance_minimum"), ("preflight", "preflight_acept"), ("bootstrap", "bootstrap_sudoers")],
)
def test_other_verbs_refuse_it_too(verb: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"children": {"engines": {"hosts": {"a": {}}}}}}))
    done = verbs.run(tmp_path, verb, {"ansible_connection": "local", name: "x"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"unknown variable: '{name}'" in done.stdout + done.stderr


def test_bootstrap_says_itself_why_it_takes_no_password(tmp_path: Path) -> None:
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"children": {"engines": {"hosts": {"a": {}}}}}}))
    done = verbs.run(tmp_path, "bootstrap", {"ansible_connection": "local", "bootstrap_password": "s3cret"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert "would be on the command line" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr


def test_a_plan_refuses_those_of_the_roles_that_come_after_it(tmp_path: Path) -> None:
    hosts = {"a": {"deployment_gpu": "h20-96", "deployment_address": "198.18.0.1"}}
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"children": {"engines": {"hosts": hosts}}}}))
    wish = {"deployment_name": "d", "deployment_model": "step-3.5-flash", "deployment_engine": "vllm"}
    done = verbs.run(
        tmp_path, "plan", wish | {"watchdog_mod": "restart", "model_weights_hubs": "x", "deployment_nme": 1}
    )
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    for name, meant in (("deployment_nme", "deployment_name"), ("watchdog_mod", "watchdog_mode")):
        assert f"unknown variable: '{name}'. Did you mean '{meant}'?" in said
    assert "unknown variable: 'model_weights_hubs'." in said


def names_in(content: Any) -> Iterator[str]:
    """What tasks set and hand on: facts, results, variables of their own."""
    if isinstance(content, dict):
        yield from (str(content[key]) for key in ("register",) if isinstance(content.get(key), str))
        for key in ("ansible.builtin.set_fact", "vars"):
            yield from content.get(key) if isinstance(content.get(key), dict) else ()
        for value in content.values():
            yield from names_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from names_in(value)


def test_no_name_of_the_toolkits_own_is_taken_for_a_misspelt_one() -> None:
    files = [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("roles/*/vars/*.yml"), *ROOT.glob("playbooks/*.yml")]
    names = {name for file in files for name in names_in(yaml.safe_load(file.read_text()))}
    assert {"gpu_driver_plan", "preflight_told"} <= names
    assert role_variables.misspelt(names, PLANNED) == []
