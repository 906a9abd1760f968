#!/usr/bin/env python3
"""How long an image takes to three nodes whose links are shaped, beside one copy at line rate.

    .venv/bin/python tests/bench/image_spread.py --rate 250mbit --megabytes 256

The image is of random bytes, which no compression shortens. Each node's link is shaped in both directions by the kernel
(`lab slow`, a token bucket); the registry's own is not. Printed are one copy at line rate, the spreading by the role
engine_image, and every node pulling for itself, with the bytes that left the registry each time. Needs what a lab needs
(docs/lab.md), Debian's docker-registry and 4 GB of disk. Ends with status 1 where spreading lets more than one copy
leave the registry or takes more than `--most-ratio` times the copy at line rate, or where each for itself the nodes get
another number of copies than there are nodes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path += [str(REPOSITORY / "src"), str(REPOSITORY / "tests" / "lab")]

from real_lab import RealLab  # noqa: E402
from registry import PULL, Registry  # noqa: E402
from rehearsal_images import run  # noqa: E402

from stepladder.lab import engine  # noqa: E402
from stepladder.lab.places import places  # noqa: E402

NODES, LAYERS = 3, 4
# What a copy weighs beside its layers, and what of it may be sent twice.
SLACK = 0.1
# The first node's link carries a copy in, and then one for each other node; as much again for unpacking.
MOST_RATIO = 2.0 * NODES


def image(docker: list[str], registry: Registry, megabytes: int) -> str:
    """An image of random layers in the registry; returns its name there."""
    made = ""
    for layer in range(LAYERS):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            content = os.urandom(megabytes * 1024 * 1024 // LAYERS)
            entry = tarfile.TarInfo(f"layer{layer}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        if not made:
            done = subprocess.run([*docker, "import", "-"], input=packed.getvalue(), capture_output=True, check=True)
            made = done.stdout.decode().strip()
            continue
        container = run([*docker, "create", made, "true"]).strip()
        subprocess.run([*docker, "cp", "-", f"{container}:/"], input=packed.getvalue(), check=True)
        made = run([*docker, "commit", container]).strip()
        run([*docker, "rm", container])
    return registry.push(docker, made, "bench/random:1")


def bring(lab: RealLab, settings: dict[str, object]) -> tuple[float, float]:
    """From nothing: seconds that the bytes took, as the role says it, and of the whole run with Ansible's own."""
    for node in lab.nodes:
        lab.ssh(node, "docker images --quiet | xargs -r docker rmi --force", check=False)
        lab.ssh(node, "rm -rf /var/lib/stepladder/images /var/lib/stepladder/cache")
    with tempfile.TemporaryDirectory() as folder:
        play = Path(folder, "play.yml")
        play.write_text(PULL)
        command = [str(REPOSITORY / ".venv/bin/ansible-playbook"), str(play), "-i", str(lab.inventory)]
        start = time.monotonic()
        done = subprocess.run(
            [*command, "-e", json.dumps(settings)], cwd=REPOSITORY, env={**os.environ, **lab.environ},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stdout[-4000:])
        wall = time.monotonic() - start
        filled = [float(found) for found in re.findall(r"from the registry in ([\d.]+) s", done.stdout)]
        pulled = [float(found) for found in re.findall(r"unpacked, ([\d.]+) s", done.stdout)]
        if len(pulled) != NODES or len(filled) != settings["engine_image_spread"]:
            sys.exit(f"{len(pulled)} nodes pulled, {len(filled)} was filled for all:\n{done.stdout[-4000:]}")
        return sum(filled) + max(pulled), wall


def faults(copies: dict[bool, float], ratio: float, most_ratio: float) -> list[str]:
    """What is wrong with the figures.

    Args:
        copies: that left the registry, with the spreading and without.
        ratio: of the seconds of the spreading to those of one copy at line rate.
        most_ratio: that it may have.
    """
    found = []
    if not 1 - SLACK <= copies[True] <= 1 + SLACK:
        found.append(f"spreading let {copies[True]:.1f} copies leave the registry, and one is to")
    if not NODES - SLACK <= copies[False] <= NODES + SLACK:
        found.append(
            f"each for itself, the nodes got {copies[False]:.1f} copies from the registry, and there are {NODES}"
        )
    if ratio > most_ratio:
        found.append(f"spreading took {ratio:.1f} times a copy at line rate, and at most {most_ratio:g} are allowed")
    return found


def measure(lab: RealLab, rate: str, megabytes: int, most_ratio: float) -> list[str]:
    """Print the figures; what is wrong with them."""
    found = engine.find(places(lab.environ, Path.home()))
    assert found is not None
    gateway = lab.address("node1").rpartition(".")[0] + ".1"
    with Registry(lab.state / "registry", gateway) as registry:
        name = image(found.command(), registry, megabytes)
        for node in lab.nodes:
            certificate, folder = registry.authority.read_text(), f"/etc/docker/certs.d/{registry.host}"
            lab.ssh(node, f"mkdir -p {folder} && printf %s '{certificate}' > {folder}/ca.crt")
        # The program is there before the links are shaped: what is measured is the image.
        package = "apt-get install -y -q --no-install-recommends docker-registry"
        lab.ssh("node1", f"systemctl mask docker-registry; apt-get update -q; {package}")
        settings: dict[str, object] = {
            "deployment_hosts": sorted(lab.nodes), "deployment_name": "bench", "deployment_model": "tiny-step3p5",
            "deployment_engine": "transformers", "deployment_gpu": "cpu", "deployment_replicas": NODES,
            "deployment_image": name, "stepladder_state_directory": "/var/lib/stepladder",
            "engine_image_catalogue": str(REPOSITORY / "catalog"),
        }  # fmt: skip
        for node in lab.nodes:
            lab.run("slow", node, "--rate", rate)
        line = megabytes * 1024 * 1024 * 8 / (float(rate.removesuffix("mbit")) * 1e6)
        print(f"{NODES} nodes, {megabytes} MiB of random layers, {rate} each way at each node")
        print(f"one copy at line rate        {line:6.1f} s")
        copies, ratios = {}, {}
        for spread in (True, False):
            before = registry.sent()
            seconds, wall = bring(lab, {**settings, "engine_image_spread": spread})
            sent = (registry.sent() - before) / (megabytes * 1024 * 1024)
            copies[spread], ratios[spread] = sent, seconds / line
            words = "spread from the first node" if spread else "each node for itself"
            print(
                f"{words:<28} {seconds:6.1f} s, {seconds / line:4.1f} x line rate, {sent:3.1f} copies left the registry"
            )
            print(f"{'':<28} {wall:6.1f} s with Ansible's own", flush=True)
        return faults(copies, ratios[True], most_ratio)


def main() -> None:
    """Measure and print; status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="250mbit")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--most-ratio", type=float, default=MOST_RATIO)
    options = parser.parse_args()
    state = Path(tempfile.mkdtemp(prefix="sl-spread-", dir="/var/tmp"))
    lab = RealLab("spread", state, state / "inventory", environ={"XDG_STATE_HOME": str(state)})
    try:
        lab.run("up", "--nodes", str(NODES), "--docker", "--inventory", str(lab.inventory))
        wrong = measure(lab, options.rate, options.megabytes, options.most_ratio)
    finally:
        lab.run("down", check=False)
        shutil.rmtree(state, ignore_errors=True)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
