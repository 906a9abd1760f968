"""Containers as processes: what is planned, what starts them, and the launcher with a Docker that stands in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar, trust_as_template
from ansible_collections.stepladder.core.plugins.module_utils import package_sources

from stepladder.catalogue import DEFAULT_DIRECTORY, Catalogue
from stepladder.errors import PlanRefusedError
from stepladder.mirrors import mirrored
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import parse_request
from stepladder.runtime import floors, gpu_vendor, runtime_faults, version_in, wish_problems
from stepladder.units import CONTAINER_LAUNCHER, release_processes, service_units, watched_units
from stepladder.versions import older

ROOT = Path(__file__).resolve().parents[2]
PATH = "/var/lib/stepladder/deployments/step3"
DIGEST = f"sha256:{'a' * 64}"


def plan_for(gpu: str = "h20-96", nodes: int = 2, **deployment: Any) -> Plan:
    wanted = {"name": "step3", "model": "step3", "engine": "vllm", "install": "container", "topology": "mp"}
    hosts = [{"name": f"n{i}", "address": f"198.18.0.{i + 1}", "gpu": gpu, "interface": "eth1"} for i in range(nodes)]
    return make_plan(parse_request({"deployment": wanted | deployment, "nodes": hosts}), Catalogue())


def test_no_container_is_given_more_than_it_needs() -> None:
    for plan in (plan_for(), plan_for("mi300x", 1, engine="sglang", topology="auto", model="step-3.5-flash")):
        for process in (process for node in plan.nodes for process in node.processes):
            options = process.argv[: process.argv.index(str(process.image))]
            assert "--privileged" not in options
            assert not [word for word in options if ".sock" in word]
            assert options[options.index("--security-opt") + 1] == "no-new-privileges"
            weights = f"{plan.nodes[0].weights.path}:{plan.nodes[0].weights.path}:ro"
            assert weights in options


def test_no_value_of_a_variable_stands_in_the_command() -> None:
    plan = plan_for(extra_environment={"SITE_TOKEN": "canary-7"})
    (process,) = plan.nodes[0].processes
    assert process.env["SITE_TOKEN"] == "canary-7"
    assert "SITE_TOKEN" in process.argv
    assert "canary-7" not in " ".join(process.argv)


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        ("reg.example:5000/a/b:1", ""),
        (f"a/b:1@{DIGEST}", ""),
        (f"a/b@{DIGEST}", ""),
        ("a/b", "Write it as HOST:PORT/NAME:TAG"),
        ("a/b:1@sha256:12", "Write it as HOST:PORT/NAME:TAG"),
        ("https://reg.example/a:1", "Write it as HOST:PORT/NAME:TAG"),
        ("a b:1", "Write it as HOST:PORT/NAME:TAG"),
    ],
)
def test_an_image_of_the_operators_own(image: str, fault: str) -> None:
    if fault:
        with pytest.raises(PlanRefusedError, match=f"deployment_image(.|\n)*{fault}"):
            plan_for(image=image)
    else:
        plan = plan_for(image=image)
        assert {process.image for node in plan.nodes for process in node.processes} == {image}
        assert plan.nodes[0].images == (image,)


def test_an_image_makes_auto_a_container_and_contradicts_an_environment() -> None:
    assert plan_for(image="a/b:1", install="auto").deployment.install == "container"
    with pytest.raises(PlanRefusedError, match="Set deployment_install to container, or leave deployment_image out"):
        plan_for(image="a/b:1", install="venv")


def test_a_container_has_a_launcher_of_its_own_and_the_name_of_its_image() -> None:
    """By which id the node has that, and so what is written: test_release_images.py."""
    node = plan_for().slices()["n0"]["node"]
    (written,) = release_processes(node, ["reaper"], PATH)
    assert written["image"] == node["images"][0]
    assert written["argv"][written["argv"].index(written["image"]) + 1] == "serve"
    assert written["launcher"][-2:] == ["step3-vllm-0", f"{PATH}/containers/vllm-0.id"]


def test_unit_and_command_name_the_same_container() -> None:
    (process,) = plan_for().slices()["n1"]["node"]["processes"]
    (unit,) = service_units([process], PATH)
    argv = process["argv"]
    assert unit["container"] == argv[argv.index("--name") + 1] == unit["unit"]
    assert unit["container_id_file"] == argv[argv.index("--cidfile") + 1]
    assert watched_units([unit])[0]["container_id_file"] == unit["container_id_file"]


DOCKER = """#!/bin/sh
echo "$*" >> {log}
case "$1 $2" in
"container inspect") {inspect} ;;
*) exit 0 ;;
esac
"""
KEPT = "echo 'true A=1 STEPLADDER_FINGERPRINT=f00 B=2 '"


@pytest.mark.parametrize(
    ("inspect", "calls", "said"),
    [
        ("exit 1", ["run x"], ""),
        (KEPT, ["attach --no-stdin c"], "stepladder: going on with container c, which still runs\n"),
        ("echo 'true STEPLADDER_FINGERPRINT=f000 '", ["rm --force c", "run x"], ""),
        ("echo 'false STEPLADDER_FINGERPRINT=f00 '", ["rm --force c", "run x"], ""),
    ],
    ids=["none there", "the same command runs", "another command runs", "it has ended"],
)
def test_the_launcher_goes_on_with_its_own_container_alone(
    tmp_path: Path, inspect: str, calls: list[str], said: str
) -> None:
    """Docker is a stand-in that answers and notes its calls."""
    log, identity = tmp_path / "calls", tmp_path / "deep" / "c.id"
    program = tmp_path / "docker"
    program.write_text(DOCKER.format(log=log, inspect=inspect))
    program.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-ec", CONTAINER_LAUNCHER, "container", "c", str(identity), "docker", "run", "x"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "STEPLADDER_FINGERPRINT": "f00"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert log.read_text().splitlines()[1:] == calls
    assert done.stdout == said
    assert identity.parent.is_dir()


FLOORS = {"docker": "25.0", "toolkit": "1.19.1"}
TOOLKIT = "NVIDIA Container Toolkit CLI version {}\ncommit: 0123abc\n"
DEVICES = "INFO[0000] Found 2 CDI devices\nnvidia.com/gpu=0\nnvidia.com/gpu=all\n"


@pytest.mark.parametrize(
    ("docker", "toolkit", "devices", "vendor", "faults"),
    [
        ("29.1.2\n", TOOLKIT.format("1.19.1"), DEVICES, "nvidia", []),
        ("20.10.24+dfsg1", "", "", "none", []),
        ("20.10.24+dfsg1", "", "/dev/dri /dev/kfd", "amd", []),
        ("20.10.24+dfsg1", "", "/dev/dri", "amd", ["There is no /dev/kfd, by which containers are given AMD's GPUs"]),
        ("", "", "", "none", ["Docker does not answer"]),
        ("24.0.9", TOOLKIT.format("1.18.2"), "", "nvidia",
         ["Docker is 24.0.9, and devices by CDI need 25.0", "toolkit is 1.18.2, which has known holes; 1.19.1",
          "CDI knows no GPU"]),
        ("29.1.2", "", "", "nvidia", ["There is no nvidia-ctk"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_a_runtime_is_told_at_once(
    docker: str, toolkit: str, devices: str, vendor: str, faults: list[str]
) -> None:
    found = runtime_faults({"docker": docker, "toolkit": toolkit, "devices": devices}, FLOORS, vendor)
    assert len(found) == len(faults), found
    for text, part in zip(found, faults, strict=True):
        assert part in text


def test_programs_that_hang_are_named_together(tmp_path: Path) -> None:
    """The role's own tasks, on this machine; Docker and the toolkit are stand-ins that accept and say nothing."""
    for name in ("docker", "nvidia-ctk"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    role = {"name": "container_runtime", "tasks_from": "check"}
    play = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.import_role": role}]}
    (tmp_path / "play.json").write_text(json.dumps([play]))
    variables = {
        "container_runtime_gpus": "nvidia", "container_runtime_catalogue": str(DEFAULT_DIRECTORY),
        "ansible_python_interpreter": sys.executable, "__container_runtime_patience": 1,
    }  # fmt: skip
    environ = {
        **os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_STDOUT_CALLBACK": "default",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [*command, "-e", json.dumps(variables), tmp_path / "play.json"],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    for command in ("Docker did not answer in 1 s (docker version)", "nvidia-ctk --version", "nvidia-ctk cdi list"):
        assert command in told, told


PEM = (ROOT / "tests/molecule/container_runtime/authority.pem").read_text()
WISHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all is well": (
        {"authorities": {"r.example:5000": f"# ours\n{PEM}", "[fd00::1]:5000": PEM + PEM}, "mirrors": ["https://m:5000"],
         "proxies": {"HTTPS_PROXY": "http://me:hunter2@p:3128", "no_proxy": None},
         "repositories": {"x": {"url": "http://m/", "key": "k"}}},
        [],
    ),
    "a registry by its address": ({"authorities": {"https://r:5000": PEM}}, ["as its images do, host or host:port"]),
    "a file's name": ({"authorities": {"r": "/etc/ssl/ca.pem"}}, ["'r': no certificate in PEM ("]),
    "a certificate that is cut": (
        {"authorities": {"r": PEM.replace(PEM.splitlines()[2], "x")}}, ["'r': no certificate in PEM ("],
    ),
    "nothing": ({"authorities": {"r": None}}, ["'r': no certificate in PEM ("]),
    "a private key": (
        {"authorities": {"r": f"{PEM}-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n"}},
        ["there is a private key in it"],
    ),
    "a mirror without a scheme": ({"mirrors": ["m.example"]}, ["'m.example' is not of the form https://HOST"]),
    "a mirror with a password": ({"mirrors": ["https://me:hunter2@m"]}, ["'https://***@m' is not of the form"]),
    "a proxy of another name": (
        {"proxies": {"https": "http://me:hunter2@p"}}, ["'https' is unknown; known are http_proxy"],
    ),
    "a list of names": ({"proxies": {"no_proxy": ["a", "b"]}}, ["no_proxy is a list: give text"]),
    "a repository's field": ({"repositories": {"x": {"uri": "http://m/"}}}, ["unknown field of x: 'uri'."]),
}  # fmt: skip


@pytest.mark.parametrize(("wishes", "expected"), WISHES.values(), ids=WISHES)
def test_wishes_that_docker_could_not_follow(wishes: dict[str, Any], expected: list[str]) -> None:
    none: dict[str, Any] = {"authorities": {}, "mirrors": [], "proxies": {}, "repositories": {}}
    found = wish_problems(**none | wishes)
    assert [part in text for part, text in zip(expected, found, strict=True)] == [True] * len(expected), found
    assert "hunter2" not in str(found)


def test_an_authority_that_was_written_is_a_change_in_the_report() -> None:
    (task,) = [one for one in yaml.safe_load((ROOT / "roles/container_runtime/tasks/settings.yml").read_text())
               if one["name"] == "Keep what was changed"]  # fmt: skip
    text = trust_as_template(task["ansible.builtin.set_fact"]["container_runtime_changes"])
    written = [{"changed": number == 1, "item": {"key": f"r{number}"}} for number in range(3)]
    values = {"__container_runtime_set": {"actions": ["reload Docker"]}}
    assert Templar(None, values).template(text) == ["reload Docker"]
    values["__container_runtime_trusted"] = {"results": written}
    assert Templar(None, values).template(text) == ["trust the authority of r1", "reload Docker"]


def test_a_driver_that_waits_for_a_restart_is_no_fault_of_containers() -> None:
    """The first `prepare` of a bare node: no GPU is known yet, and the report says that a reboot is due."""
    bare = {"docker": "29.1.2", "toolkit": TOOLKIT.format("1.18.2"), "devices": ""}
    (fault,) = runtime_faults(bare, FLOORS, "nvidia", reboot_due=True)
    assert "toolkit is 1.18.2" in fault
    assert runtime_faults(bare, FLOORS, "amd", reboot_due=True) == []


def test_the_floors_are_the_catalogues_or_the_inventorys() -> None:
    known = Catalogue().containers
    assert floors() == {"docker": known.docker, "toolkit": known.toolkit}
    assert floors("26.0", "") == {"docker": "26.0", "toolkit": known.toolkit}


def test_the_oldest_docker_reads_what_the_oldest_toolkit_writes() -> None:
    """Source: release notes of NVIDIA's toolkit 1.19.1, known issues: CDI 0.7, which Docker reads from 26.1.0 on."""
    known = floors()
    assert known["toolkit"] == "1.19.1"
    assert not older(known["docker"], "26.1")


@pytest.mark.parametrize(
    ("family", "machine", "folder"),
    [("Debian", "x86_64", "deb/amd64"), ("Debian", "aarch64", "deb/arm64"), ("RedHat", "aarch64", "rpm/$basearch")],
)
def test_the_toolkit_is_looked_for_by_the_machines_name(family: str, machine: str, folder: str) -> None:
    variables = yaml.safe_load((ROOT / "roles/container_runtime/vars/main.yml").read_text())
    facts = {"os_family": family, "architecture": machine}
    values = {name: trust_as_template(value) if isinstance(value, str) else value for name, value in variables.items()}
    values |= {"ansible_facts": facts}
    url = trust_as_template(variables["__container_runtime_toolkit_repository"]["url"])
    assert Templar(None, values).template(url) == f"https://nvidia.github.io/libnvidia-container/stable/{folder}"


def test_the_drivers_repository_does_not_go_before_the_toolkits() -> None:
    """NVIDIA's repository of drivers has the toolkit too, later or signed by another key (its issue 116)."""
    variables = yaml.safe_load((ROOT / "roles/container_runtime/vars/main.yml").read_text())
    priority = trust_as_template(variables["__container_runtime_toolkit_repository"]["priority"])
    own = {family: int(Templar(None, {"__container_runtime_debian": family == "Debian"}).template(priority))
           for family in ("Debian", "RedHat")}  # fmt: skip
    systems = [one for one in Catalogue().drivers.systems if one.platform == "cuda"]
    drivers = {
        manager: {repository.priority for one in systems if one.manager == manager for repository in one.repositories}
        for manager in ("apt", "dnf")
    }
    assert drivers == {"apt": {own["Debian"]}, "dnf": {None}}, "of equals apt takes the newest version"
    assert own["RedHat"] < 99, "dnf.conf(5): 99 is what a repository has that says none, and lower ones go first"


@pytest.mark.parametrize(
    ("root", "vendor", "features"),
    [
        (None, "nvidia", {"cdi": True}),
        ("", "none", {}),
        ("/data/docker", "nvidia", {"cdi": True, "containerd-snapshotter": False}),
        ("/data/docker", "amd", {"containerd-snapshotter": False}),
    ],
)
def test_images_lie_below_the_data_root_that_is_wanted(
    root: str | None, vendor: str, features: dict[str, bool]
) -> None:
    """containerd's store, the default of a fresh Docker 29, would have them on the system's disk."""
    variables = yaml.safe_load((ROOT / "roles/container_runtime/vars/main.yml").read_text())
    wanted = trust_as_template(variables["__container_runtime_settings"]["features"])
    values = {"container_runtime_data_root": root, "__container_runtime_vendor": vendor}
    assert Templar(None, values).template(wanted) == features


def test_a_mirror_may_bring_its_key_along() -> None:
    """The vendors' repositories of the role, as the module that installs from them takes them."""
    variables = yaml.safe_load((ROOT / "roles/container_runtime/vars/main.yml").read_text())
    for name in ("docker", "toolkit"):
        known = variables[f"__container_runtime_{name}_repository"] | {"url": "https://vendor.example/x"}
        mirror = {"url": "http://198.18.0.5/x", "key": "-----BEGIN", "fingerprints": ["AB" * 20]}
        (repository,) = package_sources.parsed([mirrored(known, mirror)])
        assert (repository.url, repository.key, repository.key_url) == ("http://198.18.0.5/x", "-----BEGIN", "")
        assert package_sources.problems(repository) == []
        assert f"__container_runtime_{name}_repository | stepladder.core.mirrored(" in str(variables)
    both = package_sources.parsed([mirrored({"name": "a", "key_url": "http://a/1"}, {"key": "k", "key_url": "http://b/2"})
                                   | {"url": "http://a/", "fingerprints": ["A"]}])[0]  # fmt: skip
    assert package_sources.problems(both) == ["repository a: give its key or the key's address (key_url), one of both"]


def test_whose_gpus_a_node_has() -> None:
    catalogue = str(Catalogue().directory)
    assert [gpu_vendor("auto", gpu, catalogue) for gpu in ("h20-96", "mi300x", "cpu", "")] == [
        "nvidia", "amd", "none", "none",
    ]  # fmt: skip
    assert gpu_vendor("none", "h20-96", catalogue) == "none"
    assert version_in("nothing here") == ""
