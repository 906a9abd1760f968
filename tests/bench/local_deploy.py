#!/usr/bin/env python3
"""What the local deployment costs: from a clone to the first answer, a second deploy, and beside the same by hand.

    python3 tests/bench/local_deploy.py cold      # a fresh clone, empty caches: seconds by phase, MB received
    python3 tests/bench/local_deploy.py rerun     # a second deploy against one `ansible -m ping`
    python3 tests/bench/local_deploy.py by-hand   # deploy against a shell script that does the same, both warm
    python3 tests/bench/local_deploy.py overlap   # weights from a slow hub, beside the installation and after it

Medians of `--runs` (default 3), the two sides of a ratio one after the other in each run. Standard library only; needs
the network for packages. Uses a deployment of its own on ports 19000 and 19970, and removes it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BY_HAND = Path(__file__).with_name("by_hand.sh")
PORT, HUB_PORT = 19000, 19970
# Phases by the line that opens each; the first is everything before any.
OPENINGS = {
    "Plan": "plan, preflight",
    "Install the tools": "tools",
    "Install the engine": "engine install",
    "Serve the model for a rehearsal": "model and hub",
    "Bring the weights": "weights",
    "Start the engine and prove that it answers": "release and Ray",
    "| vllm-0: ": "engine load and verify",
}


def settings(state: Path) -> list[str]:
    """Arguments for a deployment of its own below a directory."""
    values = {
        "stepladder_state_directory": str(state),
        "deployment_name": "bench",
        "deployment_port": PORT,
        "deployment_weights_endpoint": f"http://127.0.0.1:{HUB_PORT}",
        "rehearsal_hub_port": HUB_PORT,
    }
    return ["-i", "inventories/local", "-e", json.dumps(values)]


def bytes_received() -> int:
    """Bytes that came in over every interface but the loopback."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    fields = {name.strip(): numbers.split() for name, _, numbers in (line.partition(":") for line in lines)}
    return sum(int(numbers[0]) for name, numbers in fields.items() if name != "lo")


def timed_phases(command: list[str], directory: Path, environ: Mapping[str, str]) -> dict[str, float]:
    """Run a command; seconds by phase, told by the lines that it prints."""
    phases: dict[str, float] = {}
    phase, since = "environment", time.monotonic()
    process = subprocess.Popen(
        command, cwd=directory, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        opened = next(
            (name for text, name in OPENINGS.items() if line.strip() == text or (text[0] == "|" and text in line)), None
        )
        if opened and opened != phase and opened not in phases:
            now = time.monotonic()
            phases[phase], phase, since = phases.get(phase, 0.0) + now - since, opened, now
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines[-40:])}")
    phases[phase] = phases.get(phase, 0.0) + time.monotonic() - since
    return phases


def seconds(command: list[str], directory: Path = REPOSITORY, environ: Mapping[str, str] = os.environ) -> float:
    """Wall time of a command that has to succeed."""
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=directory, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return time.monotonic() - start


def remove(directory: Path, state: Path) -> None:
    """Take the deployment away."""
    seconds([sys.executable, "bin/stepladder", "remove", *settings(state), "-e", "confirm_approved=true"], directory)


def show(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a small table."""
    print(title)
    for name, value in rows:
        print(f"  {name:<28} {value:>10}")


def cold(scratch: Path) -> None:
    """A clone, no environment, no caches; then the same once more with warm caches."""
    clone, state = scratch / "clone", scratch / "s"
    clone_seconds = seconds(["git", "clone", "-q", str(REPOSITORY), str(clone)])
    caches = {name: str(scratch / name) for name in ("XDG_CACHE_HOME", "UV_CACHE_DIR", "PIP_CACHE_DIR")}
    environ = {**os.environ, **caches}
    for title in ("From a clone to the verified endpoint, empty caches", "The same again, warm caches"):
        before = bytes_received()
        phases = timed_phases([sys.executable, "bin/stepladder", "deploy", *settings(state)], clone, environ)
        received = (bytes_received() - before) / 1e6
        rows = [("clone", f"{clone_seconds:.1f} s"), *((name, f"{value:.1f} s") for name, value in phases.items())]
        show(
            title, [*rows, ("all", f"{clone_seconds + sum(phases.values()):.1f} s"), ("received", f"{received:.0f} MB")]
        )
        remove(clone, state)
        shutil.rmtree(clone / ".venv")


def rerun(scratch: Path, runs: int) -> None:
    """A deploy that has nothing to do, beside one ping."""
    state = scratch / "s"
    deploy = [sys.executable, "bin/stepladder", "deploy", *settings(state)]
    ping = [str(REPOSITORY / ".venv/bin/ansible"), "all", "-i", "inventories/local", "-m", "ansible.builtin.ping"]
    seconds(deploy)
    pairs = [(seconds(deploy), seconds(ping)) for _ in range(runs)]
    remove(REPOSITORY, state)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    rows = [("second deploy", f"{medians[0]:.1f} s"), ("ansible -m ping", f"{medians[1]:.1f} s")]
    show(f"Nothing to do, median of {runs}", [*rows, ("ratio", f"{medians[0] / medians[1]:.1f}")])


def by_hand(scratch: Path, runs: int) -> None:
    """A whole deploy beside a shell script that installs, downloads and serves the same."""
    state = scratch / "s"
    deploy = [sys.executable, "bin/stepladder", "deploy", *settings(state)]
    lock = REPOSITORY / "catalog/locks/vllm-0.32.0-cpu.txt"
    tools = REPOSITORY / "catalog/locks/tools.txt"
    programs = REPOSITORY / "roles/rehearsal_hub/files"
    results: dict[str, list[float]] = {"stepladder deploy": [], "by hand with uv": [], "by hand with pip": []}
    for _ in range(runs):
        results["stepladder deploy"].append(seconds(deploy))
        remove(REPOSITORY, state)
        for installer in ("uv", "pip"):
            work = scratch / "hand"
            script = ["bash", str(BY_HAND), str(work), str(lock), str(tools), str(programs), str(PORT), str(HUB_PORT)]
            uv = {"INSTALLER": installer, "UV": str(REPOSITORY / ".venv/bin/uv")}
            results[f"by hand with {installer}"].append(seconds(script, environ={**os.environ, **uv}))
            shutil.rmtree(work)
    medians = {name: statistics.median(values) for name, values in results.items()}
    rows = [(name, f"{value:.1f} s") for name, value in medians.items()]
    for installer in ("uv", "pip"):
        ratio = medians["stepladder deploy"] / medians[f"by hand with {installer}"]
        rows.append((f"ratio to {installer}", f"{ratio:.2f}"))
    show(f"From nothing installed to the first answer, packages from a near index, median of {runs}", rows)


def overlap(scratch: Path, runs: int, mebibytes: int) -> None:
    """A deploy from an empty state directory, the weights from a hub that gives a mebibyte a second.

    The model is the tiny one with a file beside it that no engine reads, so that it takes a while to come.
    """
    sys.path.insert(0, str(REPOSITORY / "roles/rehearsal_hub/files"))
    import hub  # noqa: PLC0415 - found only now, and the other measurements do without

    class SlowHub(hub.Hub):
        def count(self, path: str, sent: int) -> None:
            super().count(path, sent)
            time.sleep(sent / 2**20)

    folder = scratch / "hub/stepladder/tiny-step3p5"
    maker = REPOSITORY / "roles/rehearsal_hub/files/tiny_model.py"
    seconds([str(REPOSITORY / ".venv/bin/python"), str(maker), str(folder)])
    (folder / "padding.dat").write_bytes(os.urandom(mebibytes * 2**20))
    inventory = scratch / "inventory"
    inventory.mkdir()
    shutil.copytree(REPOSITORY / "inventories/local/group_vars", inventory / "group_vars")
    host = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    groups = {group: {"hosts": {"localhost": None}} for group in ("engines", "cpu")}
    hosts = {"localhost": {**host, "deployment_address": "127.0.0.1"}}
    (inventory / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts, "children": groups}}))
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with SlowHub(scratch / "hub", port=HUB_PORT) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        for _ in range(runs):
            for early, phases in found.items():
                state = scratch / f"s{len(phases)}{early:d}"
                chosen = ["-i", str(inventory), *settings(state)[2:], "-e", json.dumps({"model_weights_early": early})]
                deploy = [sys.executable, "bin/stepladder", "deploy", *chosen]
                phases.append(timed_phases(deploy, REPOSITORY, os.environ))
                seconds([sys.executable, "bin/stepladder", "remove", *chosen, "-e", "confirm_approved=true"])
        served.shutdown()
    for early, phases in found.items():
        names = list(phases[0])
        rows = [(name, f"{statistics.median(one.get(name, 0.0) for one in phases):.1f} s") for name in names]
        total = statistics.median(sum(one.values()) for one in phases)
        title = "Weights beside the installation" if early else "Weights after the installation"
        show(f"{title}, median of {runs}, load {os.getloadavg()[0]:.1f}", [*rows, ("all", f"{total:.1f} s")])


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cold", "rerun", "by-hand", "overlap"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mebibytes", type=int, default=30, help="that the weights of 'overlap' have more")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="slb-", dir="/tmp"))
    try:
        if options.what == "cold":
            cold(scratch)
        elif options.what == "rerun":
            rerun(scratch, options.runs)
        elif options.what == "overlap":
            overlap(scratch, options.runs, options.mebibytes)
        else:
            by_hand(scratch, options.runs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
