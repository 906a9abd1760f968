#!/usr/bin/env python3
"""What clients see of a redeploy: two real vLLM replicas on the CPU beside each other, behind the real gateway.

    python3 tests/bench/rolling.py                 # a changed setting, replica by replica
    python3 tests/bench/rolling.py never-ready     # a release that does not start: the way back
    python3 tests/bench/rolling.py wrong           # a release that starts and answers wrongly
    python3 tests/bench/rolling.py slow            # one that answers rightly and slowly
    python3 tests/bench/rolling.py --replicas 1    # the same with an outage, as long as it is

Clients ask without a pause, half of them for streams, before, during and after, until `--requests` are done; greedy
answers of the tiny model are compared with the one of before. Uses a deployment of its own on ports 19100 to 19199, and
removes it unless `--keep`. Needs haproxy; standard library only. It deploys first (minutes).
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PORT, HUB_PORT, GATEWAY_PORT, METRICS_PORT, AGENT_PORT = 19100, 19190, 19180, 19181, 19182
MODEL, KEY = "tiny-step3p5", "b" * 40
WISHES = {
    "rolling": {"deployment_extra_arguments": ["--disable-log-stats"]},
    "never-ready": {"deployment_extra_arguments": ["--no-such-flag"]},
    # Every answer is another one than the model's.
    "wrong": {"deployment_extra_arguments": ["--chat-template", "wrong {}"]},
    # Right answers, one request at a time and sixteen tokens of a prompt a step.
    "slow": {
        "deployment_extra_arguments": ["--max-num-seqs", "1", "--max-num-batched-tokens", "16"],
        "deploy_speed_gate": "refuse",
    },
}
WENT_BACK = 20
STATUS = 'haproxy_server_status{proxy="engines"'


class Deployment:
    """The deployment and the settings of its own."""

    def __init__(self, scratch: Path, replicas: int) -> None:
        local = {
            "ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            "deployment_address": "127.0.0.1", "deployment_gpus": 2,
        }  # fmt: skip
        groups = ("engines", "gateway", "cpu", "rehearsal_hub")
        hosts = {
            "all": {
                "hosts": {"localhost": local},
                "children": {group: {"hosts": {"localhost": None}} for group in groups},
            }
        }
        self.inventory = scratch / "inventory"
        shutil.copytree(REPOSITORY / "inventories/local/group_vars", self.inventory / "group_vars")
        (self.inventory / "hosts.yml").write_text(json.dumps(hosts))
        keys = scratch / "keys"
        keys.write_text(f"bench {KEY}\n")
        keys.chmod(0o400)
        settings = {
            "stepladder_state_directory": str(scratch / "s"), "deployment_name": "bench", "deployment_port": PORT,
            "deployment_replicas": replicas, "deployment_weights_endpoint": f"http://127.0.0.1:{HUB_PORT}",
            "rehearsal_hub_port": HUB_PORT, "gateway_port": GATEWAY_PORT, "gateway_metrics_port": METRICS_PORT,
            "gateway_agent_port": AGENT_PORT, "gateway_api_keys_file": str(keys),
        }  # fmt: skip
        self.options = ["-i", str(self.inventory), "-e", json.dumps(settings)]

    def run(self, verb: str, *more: str) -> tuple[int, list[tuple[float, str]]]:
        """Exit status, and each line with when it came."""
        command = [sys.executable, "bin/stepladder", verb, *self.options, *more]
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = [(time.monotonic(), line.rstrip()) for line in process.stdout or ()]
        return process.wait(), lines


class Clients:
    """They ask without a pause; what each answer was."""

    def __init__(self, count: int) -> None:
        self.answer = self.ask(stream=False)
        self.over = threading.Event()
        self.requests = self.streams = self.broken = self.wrong = 0
        self.failures: list[str] = []
        self.right: list[float] = [time.monotonic()]
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._run, args=(number % 2 == 0,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    @staticmethod
    def ask(stream: bool) -> str:
        """The whole answer.

        Raises:
            OSError, HTTPException, ValueError: where there is none, or not all of it.
        """
        body = {
            "model": MODEL, "stream": stream, "temperature": 0, "max_tokens": 24,
            "messages": [{"role": "user", "content": "Hello"}],
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", GATEWAY_PORT, timeout=120)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        if not stream:
            return _said(json.loads(text)["choices"][0]["message"])
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            raise EOFError("the stream broke off")
        return "".join(_said(each["delta"]) for event in events[:-1] for each in json.loads(event)["choices"])

    def _run(self, stream: bool) -> None:
        while not self.over.is_set():
            try:
                answer, failure = self.ask(stream), ""
            except (OSError, EOFError, http.client.HTTPException, ValueError) as error:
                answer, failure = "", f"{type(error).__name__} {error}"
                broken = stream and isinstance(error, (EOFError, http.client.IncompleteRead))
            with self.lock:
                self.requests += 1
                self.streams += stream
                if failure:
                    self.failures.append(failure)
                    self.broken += broken
                elif answer == self.answer:
                    self.right.append(time.monotonic())
                else:
                    self.wrong += 1
            if failure:
                time.sleep(0.1)

    def end(self) -> None:
        """Let them finish what they have."""
        self.over.set()
        for thread in self.threads:
            thread.join()


def _said(message: dict[str, str | None]) -> str:
    return "".join(message.get(name) or "" for name in ("reasoning", "reasoning_content", "content"))


class Watch:
    """How many replicas answer when they are asked directly, and how many the gateway gives requests to."""

    def __init__(self, replicas: int) -> None:
        self.replicas, self.over = replicas, threading.Event()
        self.seen: list[tuple[float, int, int]] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.over.wait(0.1):
            ready = sum(_get(f"http://127.0.0.1:{PORT + number}/health") is not None for number in range(self.replicas))
            metrics = _get(f"http://127.0.0.1:{METRICS_PORT}/metrics") or ""
            of_replicas = [line for line in metrics.splitlines() if line.startswith(STATUS)]
            up = sum('state="UP"' in line and line.endswith(" 1") for line in of_replicas)
            self.seen.append((time.monotonic(), ready, up))

    def end(self) -> None:
        """Look no more."""
        self.over.set()
        self.thread.join()


def _get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


def measure(deployment: Deployment, case: str, replicas: int, requests: int, clients: int) -> int:
    """Redeploy under load and print what was seen; 0 where it ended as it had to, 1 with what does not hold."""
    load, watch = Clients(clients), Watch(replicas)
    time.sleep(3)
    start = time.monotonic()
    status, lines = deployment.run("deploy", "-e", json.dumps(WISHES[case]))
    end = time.monotonic()
    while load.requests < requests and time.monotonic() < end + 300:
        time.sleep(0.5)
    load.end()
    watch.end()
    gaps = [(after - before) for before, after in zip(load.right, load.right[1:], strict=False)]
    rows = [
        ("requests", f"{load.requests}, {load.streams} of them streams"),
        ("failed", f"{len(load.failures)} {sorted(set(load.failures))[:4] if load.failures else ''}"),
        ("broken streams", str(load.broken)),
        ("wrong answers", str(load.wrong)),
        ("longest time without an answer", f"{max(gaps, default=0.0):.1f} s"),
        ("fewest replicas that answer", f"{min(ready for _, ready, _ in watch.seen)} of {replicas}"),
        ("fewest in rotation", f"{min(up for _, _, up in watch.seen)} of {replicas}"),
        ("the run took", f"{end - start:.1f} s, exit status {status}"),
    ]
    red = next((at for at, line in lines if line.endswith(": FAILED") or " is slower than release " in line), None)
    if red:
        back = [at for at, _, up in watch.seen if at > red and up == replicas]
        rows.append(("from the red to all in rotation", f"{back[0] - red:.1f} s" if back else "never"))
    said = [line.strip() for _, line in lines if "stopped, started, asked" in line or "serves again" in line]
    said += [line.strip() for _, line in lines if "Nothing answered" in line or "One after the other" in line]
    print(f"{case}, {replicas} replica(s), {clients} clients")
    for name, value in rows:
        print(f"  {name:<34} {value}")
    for line in said:
        print(f"  said: {line}")
    wanted = 0 if case == "rolling" else WENT_BACK
    rotation = [up for _, _, up in watch.seen]
    faults = [
        text
        for text, found in (
            (f"the run was to end with {wanted}", status != wanted),
            (f"fewer than {requests} requests", load.requests < requests),
            ("no replica was taken out: nothing was changed", min(rotation) == replicas),
            ("not all replicas are back in rotation", rotation[-1] != replicas),
            ("more than one replica was out at a time", min(rotation) < replicas - 1),
            ("requests failed", replicas > 1 and bool(load.failures)),
            ("the wrong release answered clients", replicas > 1 and bool(load.wrong)),
        )
        if found
    ]
    for text in faults:
        print(f"  DOES NOT HOLD: {text}")
    if faults:
        print("\n".join(line for _, line in lines[-40:]))
    return 1 if faults else 0


def main() -> int:
    """Deploy, measure, remove."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes its deployment away, as after Ctrl-C
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", choices=[*WISHES])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="a directory for the deployment, which stays there")
    parser.add_argument("--stands", action="store_true", help="it was deployed by a run before, with --keep")
    given = parser.parse_args()
    scratch = given.keep or Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    shutil.rmtree(scratch / "inventory", ignore_errors=True)
    (scratch / "keys").unlink(missing_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    deployment = Deployment(scratch, given.replicas)
    try:
        # A slow release is known by the speed of the one before, which is measured only where that is asked for.
        measured = ["-e", "deploy_speed_gate=tell"] if "slow" in given.case else []
        status, lines = (0, []) if given.stands else deployment.run("deploy", *measured)
        if status:
            print("\n".join(line for _, line in lines[-40:]))
            return status
        return max(
            measure(deployment, case, given.replicas, given.requests, given.clients)
            for case in given.case or ["rolling"]
        )
    finally:
        if not given.keep:
            deployment.run("remove", "-e", "confirm_approved=true")
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
