#!/usr/bin/env python3
"""How fast weights come, spread and are checked, each beside the plain way, in turn, medians of --runs.

    .venv/bin/python tests/bench/weights.py spread 1 3 7     # one source to so many nodes, on shaped links; needs root
    .venv/bin/python tests/bench/weights.py egress 1 3 7     # what leaves the hub, in units of the model's size; root
    .venv/bin/python tests/bench/weights.py client           # many files: our module beside bare `modelscope download`
    .venv/bin/python tests/bench/weights.py check            # full check, GB/s by cores, beside `sha256sum`
    .venv/bin/python tests/bench/weights.py cheap            # complete weights: 500 sparse files of 1 GB

`spread` and `egress` make network namespaces on a bridge of their own, each link shaped by `tc tbf` in both directions;
all nodes share this machine's cores and disk, so what hashes and copies on real nodes at once does so here in turn.
The ratio is seconds / (bytes / link rate): 1.0 is one link's time for the whole model. rsync runs as a daemon, without
ssh. In between nothing is in the page cache's way: files are written anew, and read from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "roles" / "rehearsal_hub" / "files"), str(REPOSITORY / "src")]

from ansible_collections.stepladder.core.plugins.module_utils import weights, weights_manifest  # noqa: E402
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request  # noqa: E402

import hub  # noqa: E402 - found only after the path is set
from stepladder.spread import exchanges  # noqa: E402

MODEL = "bench/model"
BIN = Path(sys.executable).parent
PROGRAM = REPOSITORY / "roles" / "model_weights" / "files" / "spread.py"
OWN = os.getpid() % 10000  # two runs on one machine do not meet
BRIDGE, PREFIX, NETWORK = f"slwb{OWN}", f"slw{OWN}n", "198.19.254"  # of the range set aside for benchmarks
PORT = 29870
LOOPBACK = "127.0.0.1"
RUN = """
import json, sys
from ansible_collections.stepladder.core.plugins.module_utils import weights
weights.ensure(weights.Request(**json.loads(sys.argv[1])), "present")
"""


def sh(command: str) -> None:
    """Run a command that has to succeed."""
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def network(nodes: int, rate: str) -> Iterator[list[str]]:
    """Namespaces 0..nodes on one bridge with shaped links; their addresses."""
    addresses = [f"{NETWORK}.{10 + number}" for number in range(nodes + 1)]
    try:
        sh(f"ip link add {BRIDGE} type bridge && ip link set {BRIDGE} up")
        shape = f"root tbf rate {rate} burst 256kb latency 50ms"
        for number, address in enumerate(addresses):
            name = f"{PREFIX}{number}"
            sh(f"ip netns add {name} && ip link add {name} type veth peer name eth0 netns {name}")
            sh(f"ip link set {name} master {BRIDGE} up && ip -n {name} addr add {address}/24 dev eth0")
            sh(f"ip -n {name} link set eth0 up && ip -n {name} link set lo up")
            sh(f"tc qdisc add dev {name} {shape} && ip netns exec {name} tc qdisc add dev eth0 {shape}")
        yield addresses
    finally:
        for number in range(nodes + 1):
            # A namespace takes its links along some time after it is gone: too late for the next network.
            subprocess.run(["ip", "link", "del", f"{PREFIX}{number}"], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", f"{PREFIX}{number}"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, stderr=subprocess.DEVNULL)


def inside(number: int, *argv: object) -> subprocess.Popen[bytes]:
    """Start a program in a namespace."""
    return subprocess.Popen(
        ["ip", "netns", "exec", f"{PREFIX}{number}", *map(str, argv)],
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def all_end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for programs that have to succeed."""
    for one in started:
        if one.wait(1200):
            sys.exit(f"{one.args} ended with {one.returncode}")


def end(started: subprocess.Popen[bytes]) -> None:
    """End a program and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def make_model(folder: Path, files: int, size: int) -> int:
    """A model of random bytes; its size."""
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"model-{number:05}.safetensors").write_bytes(os.urandom(size))
    return files * size


def request(scratch: Path, name: str, **more: object) -> Request:
    """What a node is asked for."""
    return Request(MODEL, str(scratch / name / "master"), client=str(BIN / "modelscope"), **more)


def ours(scratch: Path, addresses: Sequence[str], source: Path | None) -> float:
    """Seconds until every node has its marker; node 0 has the model first where there is a source."""
    names = [f"n{number}" for number in range(len(addresses))]
    first = 0 if source else 1
    if source:
        first_node = request(scratch, "n0", source="directory", source_path=str(source))
        weights.ensure(first_node, "present")
    root = source or scratch / "hub" / MODEL
    wanted = [{"path": path.name, "size": path.stat().st_size} for path in sorted(root.iterdir())]
    looked = {
        name: {
            "address": address, "model_id": MODEL, "revision": "master", "wanted": wanted,
            "complete": bool(source) and name == "n0", "have": [],
        }
        for name, address in zip(names[first:], addresses[first:], strict=True)
    }  # fmt: skip
    parts = exchanges(looked, PORT)
    served = serve(scratch / "hub", addresses[0])  # for its listing; with a source no file is fetched from it
    started, begun = [], time.monotonic()
    for number in range(first, len(names)):
        part = parts[names[number]]
        part |= {"python": sys.executable, "program": str(PROGRAM)} if part else {}
        wish = request(scratch, names[number], endpoint=f"http://{addresses[0]}:8970", spread=part)
        fields = {key: getattr(wish, key) for key in Request.__dataclass_fields__}
        started.append(inside(number, sys.executable, "-c", RUN, json.dumps(fields)))
    markers = [scratch / name / "master" / ".stepladder" / "complete" for name in names]
    while not all(marker.exists() for marker in markers[first:]):
        time.sleep(0.05)
        if any(one.poll() for one in started):
            sys.exit("a node failed; what it said is above")
    seconds = time.monotonic() - begun
    all_end(started)
    end(served)
    return seconds


def rsync(scratch: Path, source: Path, addresses: Sequence[str], *, at_once: bool) -> float:
    """Seconds of rsync from node 0 to the others."""
    config = scratch / "rsyncd.conf"
    config.write_text(f"use chroot = no\n[model]\npath = {source}\nread only = yes\n")
    daemon = inside(0, "rsync", "--daemon", "--no-detach", f"--config={config}", f"--address={addresses[0]}")
    time.sleep(0.5)
    begun = time.monotonic()
    started = []
    for number in range(1, len(addresses)):
        target = scratch / f"rsync{number}"
        started.append(inside(number, "rsync", "-a", "--whole-file", f"rsync://{addresses[0]}/model/", target))
        if not at_once:
            all_end(started)
    all_end(started)
    seconds = time.monotonic() - begun
    end(daemon)
    return seconds


def from_hub(scratch: Path, addresses: Sequence[str]) -> float:
    """Seconds of the bare client on every node at once, from a hub on node 0."""
    served = serve(scratch / "hub", addresses[0])
    begun = time.monotonic()
    environ = ["env", f"MODELSCOPE_ENDPOINT=http://{addresses[0]}:8970", "TQDM_DISABLE=1"]
    quietly = ["sh", "-c", 'exec "$@" 2> "$0"']
    all_end([
        inside(number, *quietly, scratch / f"hub{number}.log", *environ, f"MODELSCOPE_CACHE={scratch}/cache{number}",
               BIN / "modelscope", "download", MODEL, f"--local-dir={scratch}/hub{number}", "--max-workers=8")
        for number in range(1, len(addresses))
    ])  # fmt: skip
    seconds = time.monotonic() - begun
    end(served)
    return seconds


def serve(root: Path, address: str) -> subprocess.Popen[bytes]:
    """A hub on node 0, or on this machine's loopback; its output in `hub.log` beside its files."""
    program = Path(hub.__file__)
    log = root.parent / "hub.log"
    shell = f"exec {sys.executable} -u {program} --root {root} --host {address} --port 8970 > {log} 2>&1"
    argv = ["sh", "-c", shell]
    started = subprocess.Popen(argv, start_new_session=True) if address == LOOPBACK else inside(0, *argv)
    while "is served at" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.05)
    return started


def traffic(nodes: int) -> Iterator[tuple[str, int, int]]:
    """Bytes that every node's link has carried, out and in, headers included."""
    for number in range(nodes + 1):
        argv = ["ip", "netns", "exec", f"{PREFIX}{number}", "cat", "/proc/net/dev"]
        line = re.search(r"eth0:(.*)", subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        fields = line[1].split() if line else ["0"] * 9
        yield f"n{number}", int(fields[8]), int(fields[0])


def cpu_seconds() -> float:
    """Seconds that all cores of this machine have been busy with anything; what waits for the disk is not."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def spread(options: argparse.Namespace) -> None:
    """One source to several nodes, in four ways."""
    bits = float(re.match(r"\d+", options.rate)[0]) * 1e6
    for nodes in options.nodes:
        seconds: dict[str, list[float]] = {"ours": [], "rsync, one by one": [], "rsync, at once": [], "from a hub": []}
        seconds = {way: found for way, found in seconds.items() if options.only in way}
        busy: dict[str, list[float]] = {way: [] for way in seconds}
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as name:
                scratch = Path(name)
                source = scratch / "hub" / MODEL
                size = make_model(source, options.files, options.mebibytes * 2**20 // options.files)
                ways: dict[str, Callable[[Sequence[str]], float]] = {
                    "ours": lambda at, scratch=scratch, source=source: ours(scratch, at, source),
                    "rsync, one by one": lambda at, s=scratch, f=source: rsync(s / "1", f, at, at_once=False),
                    "rsync, at once": lambda at, s=scratch, f=source: rsync(s / "2", f, at, at_once=True),
                    "from a hub": lambda at, scratch=scratch: from_hub(scratch, at),
                }
                for number in (1, 2):
                    (scratch / str(number)).mkdir()
                for way, run in ways.items():
                    if way not in seconds:
                        continue
                    with network(nodes, options.rate) as addresses:
                        before, begun = cpu_seconds(), time.monotonic()
                        seconds[way].append(run(addresses))
                        cores = os.cpu_count() or 1
                        busy[way].append((cpu_seconds() - before) / (time.monotonic() - begun) / cores)
                        if options.traffic:
                            print(
                                way,
                                *(
                                    f"{name} sent {out / size:.2f} took {into / size:.2f}"
                                    for name, out, into in traffic(nodes)
                                ),
                                sep="; ",
                            )
                    for pattern in ("n[0-9]*", "[12]/rsync[0-9]*", "hub[0-9]*"):
                        for place in scratch.glob(pattern):
                            shutil.rmtree(place) if place.is_dir() else place.unlink()
        for way, found in seconds.items():
            median = statistics.median(found)
            ratio, cpu = median / (size * 8 / bits), statistics.median(busy[way])
            print(f"1 source to {nodes}: {way:<18} {median:6.1f} s  ratio {ratio:.2f}  CPU {cpu:.0%}", flush=True)


def egress(options: argparse.Namespace) -> None:
    """What leaves the hub for several nodes."""
    for nodes in options.nodes:
        with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as name:
            scratch = Path(name)
            size = make_model(scratch / "hub" / MODEL, options.files, options.mebibytes * 2**20 // options.files)
            with network(nodes, options.rate) as addresses:
                seconds = ours(scratch, addresses, None)
            lines = re.findall(r"GET \S*FilePath=.* length=(\d+)", (scratch / "hub.log").read_text())
            print(f"hub to {nodes} nodes: egress {sum(map(int, lines)) / size:.3f} models, {seconds:.1f} s", flush=True)


def client(options: argparse.Namespace) -> None:
    """Many small files: our module beside the bare client, in turn who begins."""
    endpoint = f"http://{LOOPBACK}:8970"

    def bare(scratch: Path) -> None:
        environ = {**os.environ, "MODELSCOPE_ENDPOINT": endpoint, "TQDM_DISABLE": "1"}
        environ["MODELSCOPE_CACHE"] = str(scratch / "cache")
        argv = [str(BIN / "modelscope"), "download", MODEL, f"--local-dir={scratch}/bare", "--max-workers=8"]
        subprocess.run(argv, env=environ, check=True, capture_output=True)

    ways: dict[str, Callable[[Path], object]] = {
        "ours": lambda scratch: weights.ensure(request(scratch, "ours", endpoint=endpoint), "present"),
        "modelscope download": bare,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as name:
            scratch = Path(name)
            make_model(scratch / "hub" / MODEL, 300, 2**20)
            served = serve(scratch / "hub", LOOPBACK)
            for way in [*ways][:: 1 if run % 2 else -1]:
                begun = time.monotonic()
                ways[way](scratch)
                seconds[way].append(time.monotonic() - begun)
            end(served)
    mine, theirs = (statistics.median(found) for found in seconds.values())
    print(f"300 files of 1 MiB: ours {mine:.1f} s, modelscope download {theirs:.1f} s, ratio {mine / theirs:.2f}")


def check(options: argparse.Namespace) -> None:
    """A full check by cores, beside sha256sum on as many; files are in the page cache before each."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as name:
        scratch = Path(name)
        size = make_model(scratch / "source", 8, 128 * 2**20)
        wish = request(scratch, "store", source="directory", source_path=str(scratch / "source"))
        weights.ensure(wish, "present")
        shutil.rmtree(scratch / "source")
        files = [str(path) for path in Path(wish.path).glob("*.safetensors")]
        # The module asks the disk itself; here both read from memory, so that the hash is what is measured.
        weights_manifest.os.posix_fadvise = lambda *_: None
        for count in range(1, len(cores) + 1):
            os.sched_setaffinity(0, cores[:count])
            rates: dict[str, list[float]] = {"ours": [], "sha256sum": []}
            for _ in range(options.runs):
                for path in files:
                    Path(path).read_bytes()
                begun = time.monotonic()
                full = Request(**{**{k: getattr(wish, k) for k in Request.__dataclass_fields__}, "verify": "full"})
                assert weights.ensure(full, "present")["hashed_bytes"] == size
                rates["ours"].append(size / (time.monotonic() - begun) / 1e9)
                begun = time.monotonic()
                argv = ["xargs", "-0", "-n1", f"-P{count}", "sha256sum"]
                subprocess.run(argv, input="\0".join(files), text=True, check=True, stdout=subprocess.DEVNULL)
                rates["sha256sum"].append(size / (time.monotonic() - begun) / 1e9)
            mine, plain = (statistics.median(found) for found in rates.values())
            print(f"full check on {count} cores: ours {mine:.2f} GB/s, sha256sum {plain:.2f} GB/s, "
                  f"ours a core {mine / count:.2f}")  # fmt: skip
        os.sched_setaffinity(0, cores)


def cheap(options: argparse.Namespace) -> None:
    """What a look at complete weights costs, the start of Python included."""
    with tempfile.TemporaryDirectory(prefix="sl-bench-", dir="/var/tmp") as name:
        wish = Request(MODEL, f"{name}/store/master")
        Path(wish.path).mkdir(parents=True)
        proven = []
        for number in range(500):
            path = Path(wish.path) / f"model-{number:05}.safetensors"
            with path.open("wb") as out:
                out.truncate(10**9)  # sparse: the cheap check reads none of it, so its hash may be any
            stat = path.stat()
            proven.append(weights_manifest.Proven(path.name, stat.st_size, "0" * 64, stat.st_mtime_ns, stat.st_ino))
        weights_manifest.unseal(wish, [])
        weights_manifest.seal(wish, proven, "2026-11-21T03:00:00Z")
        fields = json.dumps({key: getattr(wish, key) for key in Request.__dataclass_fields__})
        code = RUN + "\nassert weights.look(weights.Request(**json.loads(sys.argv[1])))['complete']"
        found = []
        for _ in range(options.runs):
            begun = time.monotonic()
            subprocess.run([sys.executable, "-c", code, fields], check=True)
            found.append(time.monotonic() - begun)
        print(f"complete weights, 500 files of 1 GB: {statistics.median(found):.2f} s for look and module")


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {"spread": spread, "egress": egress, "client": client, "check": check, "cheap": cheap}
    parser.add_argument("what", choices=verbs)
    parser.add_argument("nodes", nargs="*", type=int, default=[1, 3, 7])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", default="250mbit", help="of every link; default: %(default)s")
    parser.add_argument("--mebibytes", type=int, default=384, help="of the model that is spread; default: %(default)s")
    parser.add_argument("--files", type=int, default=24, help="that it has; default: %(default)s")
    parser.add_argument("--traffic", action="store_true", help="what every node's link carried, in models")
    parser.add_argument("--only", default="", help="of the ways of spreading those with this in their name")
    options = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    verbs[options.what](options)


if __name__ == "__main__":
    main()
