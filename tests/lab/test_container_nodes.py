"""Engines in containers, for real: an image from a registry over TLS, two nodes with a Docker each, fixed answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from real_lab import REPOSITORY, RealLab, why_not
from registry import PULL, Registry, free_port, wait_open
from registry import why_not as why_no_registry
from rehearsal_images import build, run

from stepladder.catalogue import Catalogue
from stepladder.lab import engine
from stepladder.lab.places import places

pytestmark = [pytest.mark.lab, pytest.mark.nightly, pytest.mark.timeout(2400)]

# What a lab's node may not set: settings of the kernel, the machine's swap, a higher limit of pinned memory.
OF_A_LAB = {"host_strict": False, "host_swap_off": False, "container_runtime_pin_memory": False}


class Site:
    """Two nodes, a registry with images of engines, and a hub: all that `prepare` and a deploy need."""

    def __init__(self, lab: RealLab, registry: Registry, hub: str) -> None:
        self.lab, self.registry, self.hub = lab, registry, hub
        found = engine.find(places(lab.environ, Path.home()))
        assert found is not None
        self.docker = found.command()
        self.images: dict[str, str] = {}
        self.foreseen: dict[str, int] = {}
        self.prepared: dict[str, int] = {}

    def image(self, name: str) -> str:
        """An engine's image in the registry, made when first asked for."""
        if name not in self.images:
            release = next(each for each in Catalogue().engines[name].releases if each.platform == "cpu")
            tag = f"rehearsal/{name}-cpu:{release.version}"
            base = run([*self.docker, "images", "--format", "{{.Repository}}:{{.Tag}}", "stepladder-lab"]).split()[0]
            build(self.docker, base, name, tag)
            self.images[name] = self.registry.push(self.docker, tag, tag)
            run([*self.docker, "rmi", tag])
        return self.images[name]

    def settle(self, **deployment: object) -> None:
        """Have an inventory for a deployment on both nodes."""
        hosts = self.lab.inventory / "hosts.yml"
        inventory = yaml.safe_load(hosts.read_text())
        # The rehearsal hub would run in an engine's environment, which no node has here.
        inventory["all"]["children"].pop("rehearsal_hub", None)
        hosts.write_text(yaml.safe_dump(inventory))
        settings = {
            "deployment_name": "boxed",
            "deployment_model": "tiny-step3p5",
            "deployment_context_length": 1024,
            "deployment_weights_endpoint": self.hub,
            "container_runtime_docker": "distribution",
            "container_runtime_gpus": "none",
            "container_runtime_authorities": {self.registry.host: self.registry.authority.read_text()},
            "container_runtime_mirrors": [f"https://{self.registry.host}"],
            **OF_A_LAB,
            **deployment,
        }
        folder = self.lab.inventory / "group_vars"
        if folder.is_symlink():  # to the project's own
            folder.unlink()
            folder.mkdir()
        (folder / "engines.yml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if reason := why_not() or why_no_registry():
        pytest.skip(f"this machine lacks {reason}")
    state = Path(tempfile.mkdtemp(prefix="sl-box-", dir="/var/tmp"))
    lab = RealLab("t" + state.name.removeprefix("sl-box-").lower().replace("_", "-"), state, state / "inventory")
    lab.environ = {"XDG_STATE_HOME": str(state)}
    hub = None
    try:
        lab.run("up", "--nodes", "2", "--docker", "--inventory", str(lab.inventory))
        gateway = lab.address("node1").rpartition(".")[0] + ".1"
        model, port = state / "hub/stepladder/tiny-step3p5", free_port(gateway)
        files = REPOSITORY / "roles/rehearsal_hub/files"
        run([sys.executable, str(files / "tiny_model.py"), str(model)])
        served = [sys.executable, str(files / "hub.py"), "--root", str(state / "hub"), "--host", gateway]
        hub = subprocess.Popen([*served, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_open(gateway, port)
        with Registry(state / "registry", gateway) as registry:
            found = Site(lab, registry, f"http://{gateway}:{port}")
            # node2 gets Docker from the role; what node1's daemon has for the lab has to stay as it is.
            lab.ssh("node2", "apt-get remove -y -q docker.io")
            found.settle(
                deployment_engine="transformers", deployment_replicas=2, deployment_image=f"{registry.host}/later:1"
            )
            foreseen = lab.play("prepare", "--check", "--diff")
            found.foreseen, found.prepared = changed(foreseen.stdout), changed(lab.play("prepare").stdout)
            yield found
    finally:
        if hub:
            hub.terminate()
            hub.wait(timeout=20)
        done = lab.run("down", check=False)
        assert done.returncode == 0, f"the lab in {state} was not removed:\n{done.stdout}{done.stderr}"
        shutil.rmtree(state, ignore_errors=True)


def changed(output: str) -> dict[str, int]:
    """Changed tasks of each node, by the recap."""
    recap = output[output.index("PLAY RECAP") :]
    lines = [line.split() for line in recap.splitlines() if "changed=" in line]
    return {line[0]: int(next(word for word in line if word.startswith("changed="))[8:]) for line in lines}


def test_prepare_sets_docker_up(site: Site) -> None:
    """By the role container_runtime: installed where it is missing, the authority, the mirror, live-restore."""
    lab = site.lab
    assert all(count > 0 for count in (*site.foreseen.values(), *site.prepared.values()))
    seen = "docker info --format '{{.LiveRestoreEnabled}} {{.RegistryConfig.Mirrors}}'"
    for node in ("node1", "node2"):
        assert lab.ssh(node, seen).stdout.split() == ["true", f"[https://{site.registry.host}/]"]
        settings = json.loads(lab.ssh(node, "cat /etc/docker/daemon.json").stdout)
        assert settings["bip"].startswith("198.19."), "what others set in daemon.json stays"
        # An image that is not there: the registry is reached and trusted.
        unknown = lab.ssh(node, f"docker pull {site.registry.host}/none:1", check=False)
        assert "manifest unknown" in unknown.stdout + unknown.stderr
        assert lab.ssh(node, "systemctl is-enabled docker").stdout.strip() == "enabled"
    assert changed(lab.play("prepare").stdout) == {"node1": 0, "node2": 0}
    assert changed(lab.play("prepare", "--check", "--diff").stdout) == {"node1": 0, "node2": 0}


def test_a_deploy_and_its_end(site: Site) -> None:
    lab, image = site.lab, site.image("transformers")
    site.settle(deployment_engine="transformers", deployment_replicas=2, deployment_image=image)
    before = site.registry.sent()
    foreseen = lab.play("deploy", "--check")
    assert f"pull {image} (sha256:" in foreseen.stdout
    # What describes the image are a few kB; its layers are megabytes.
    assert site.registry.sent() - before < 10_000, "a check pulls no layer"
    first = lab.play("deploy", "-v")
    assert first.stdout.count("exact") >= 4, "both replicas are asked, and answer with the fixed text"
    # One copy of each layer left the registry, for two nodes.
    size = sum(json.loads(run_manifest(site, image))["layers"][place]["size"] for place in range(2))
    assert size <= site.registry.sent() - before < 1.1 * size
    again = lab.play("deploy")
    assert "Nothing to do" in again.stdout
    assert set(changed(again.stdout).values()) == {0}
    lab.play("drift")  # which fails where anything differs
    assert set(changed(lab.play("deploy", "--check", "--diff").stdout).values()) == {0}
    status = json.loads(lab.play("status", "-e", "status_format=json").stdout)
    assert status["ready"]

    # Docker is started anew: the engine runs on, and its unit finds it again.
    pid = "docker inspect --format '{{.State.Pid}}' boxed-transformers-0"
    running = lab.ssh("node1", pid).stdout
    lab.ssh("node1", "systemctl restart docker")
    # The unit waits 5 s before it starts again.
    lab.ssh("node1", "sleep 8; systemctl is-active boxed-transformers-0")
    assert lab.ssh("node1", pid).stdout == running
    assert "ready" in lab.play("status").stdout
    assert "going on with container boxed-transformers-0" in lab.play("logs").stdout
    assert set(changed(lab.play("deploy").stdout).values()) == {0}

    # A container that no process of the plan has is ended and named.
    mark = "stepladder.deployment=/var/lib/stepladder/deployments/boxed"
    lab.ssh("node2", f"docker run --detach --name stray --label {mark} {image} sleep 900")
    assert "End those that no process of the plan has" in lab.play("deploy").stdout
    assert "stray" not in lab.ssh("node2", "docker ps --all").stdout

    # What runs goes on, by the image that it runs, wherever its tag points to now.
    nodes, runs = ("node1", "node2"), "docker inspect --format '{{.State.Pid}} {{.Image}}' $(docker ps --quiet)"
    before = {node: lab.ssh(node, runs).stdout.split() for node in nodes}
    for node in nodes:
        lab.ssh(node, f"docker commit --pause=false $(docker ps --quiet) {image}")
    lab.play("drift")
    lab.play("start")
    assert "Nothing to do" in lab.play("deploy").stdout
    assert {node: lab.ssh(node, runs).stdout.split() for node in nodes} == before

    # So does a way back.
    lab.play("deploy", "-e", json.dumps({"deployment_extra_environment": {"SITE_MARK": "1"}}))
    lab.play("rollback")
    assert {node: lab.ssh(node, runs).stdout.split()[1] for node in nodes} == {node: before[node][1] for node in nodes}
    assert "Nothing to do" in lab.play("deploy").stdout
    for node in nodes:
        lab.ssh(node, f"docker tag {before[node][1]} {image}; docker image prune --force")

    lab.play("stop")
    assert lab.ssh("node1", "docker ps --all --quiet").stdout.strip() == ""
    # Without the registry: what lies on the nodes is enough.
    lab.play("deploy")
    lab.play("remove", "-e", "confirm_approved=true")
    left = "docker ps --all --quiet; docker images --quiet; ls /var/lib/stepladder"
    for node in ("node1", "node2"):
        assert lab.ssh(node, left, check=False).stdout.strip() == ""


def run_manifest(site: Site, image: str) -> str:
    """The manifest that the registry has of an image."""
    repository, _, tag = image.removeprefix(f"{site.registry.host}/").rpartition(":")
    url = f"http://127.0.0.1:{site.registry.loopback_port}/v2/{repository}/manifests/{tag}"
    return run(["curl", "-fsS", "-H", "Accept: application/vnd.docker.distribution.manifest.v2+json", url])


def test_vllm_serves_from_an_image(site: Site) -> None:
    lab, image = site.lab, site.image("vllm")
    site.settle(deployment_engine="vllm", deployment_image=image)
    done = lab.play("deploy", "-v")
    assert done.stdout.count("exact") >= 2
    assert set(changed(lab.play("deploy").stdout).values()) == {0}
    lab.play("remove", "-e", "confirm_approved=true")


def test_without_a_way_out_each_node_pulls_from_the_sites_registry(site: Site) -> None:
    """Nothing but this machine is reached; without apt's lists the program that spreads an image cannot be had."""
    lab, image = site.lab, site.image("transformers")
    site.settle(deployment_engine="transformers", deployment_replicas=2, deployment_image=image)
    ways = {node: lab.ssh(node, "ip route show default").stdout.strip() for node in ("node1", "node2")}
    play = lab.state / "image.yml"
    play.write_text(PULL)
    try:
        for node in ways:
            lab.ssh(node, "docker images --quiet | xargs -r docker rmi --force; apt-get purge -y -q docker-registry; "
                          "apt-get clean; rm -rf /var/lib/apt/lists/*_*; ip route del default")  # fmt: skip
        before = site.registry.sent()
        settings = {
            "deployment_hosts": sorted(ways),
            "deployment_gpu": "cpu",
            "engine_image_catalogue": str(REPOSITORY / "catalog"),
            "stepladder_state_directory": "/var/lib/stepladder",
        }
        done = subprocess.run(
            [REPOSITORY / ".venv/bin/ansible-playbook", play, "-i", lab.inventory, "-e", json.dumps(settings)],
            cwd=REPOSITORY, env={**os.environ, **lab.environ}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        assert done.stdout.count(f"every node pulls {image} for itself") == 1, done.stdout[-3000:]
        size = sum(layer["size"] for layer in json.loads(run_manifest(site, image))["layers"])
        assert 2 * size <= site.registry.sent() - before < 2.2 * size
        for node in ways:
            assert lab.ssh(node, f"docker image inspect {image}").returncode == 0
    finally:
        for node, way in ways.items():
            lab.ssh(node, f"ip route add {way}; docker images --quiet | xargs -r docker rmi --force", check=False)
