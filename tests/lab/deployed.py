"""A deployment on the nodes of a lab, for tests."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from real_lab import NOTED, RealLab

# Verified as a client does, or found equal to the plan with every engine giving a token.
PASSED = re.compile(r"(\d) of \1 checks passed|Nothing to do: every node is equal to the plan")


class Deployed:
    """A deployment on nodes of the lab: what was asked for, and what its verbs print."""

    def __init__(self, lab: RealLab, **variables: Any) -> None:
        self.lab = lab
        self.arguments = ("-e", json.dumps(variables))
        self.port = 30000 if variables.get("deployment_engine") == "sglang" else 8000
        self.address = lab.address("node1")

    def deploy(self, *arguments: str, check: bool = True) -> str:
        """Deploy, hold that the endpoint answers as promised, and return what was printed."""
        done = self.lab.play("deploy", *self.arguments, *arguments, check=check)
        if check and "--check" not in arguments:
            assert PASSED.search(done.stdout), done.stdout[-3000:]
        return done.stdout + done.stderr

    def changes(self) -> set[int]:
        """Deploy again; how much the nodes say that they changed."""
        return {int(number) for number in re.findall(r"changed=(\d+)", self.deploy())}

    def bring_back(self, fault: str, told: str) -> str:
        """The one rerun after a fault, timed for the summary; every process is ready after it."""
        started = time.monotonic()
        printed = self.deploy()
        NOTED.append(f"{fault}: {told}; one rerun, {time.monotonic() - started:.0f} s")
        assert set(self.status().values()) == {"ready"}
        return printed

    def status(self) -> dict[tuple[str, str], str]:
        """Phase by node and process."""
        done = self.lab.play("status", "-e", "status_format=json", check=False)
        document = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
        rows = [row for row in document["processes"] if row["phase"] != "unused"]
        return {(row["node"], row["process"]): row["phase"] for row in rows}

    def ask(self, timeout: float = 10, port: int | None = None) -> bool:
        """Whether the endpoint of the first node gives a token within the time."""
        body = json.dumps({"model": "tiny-step3p5", "prompt": "a", "max_tokens": 1}).encode()
        url = f"http://{self.address}:{port or self.port}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return bool(json.load(answer)["choices"])
        except (OSError, http.client.HTTPException, ValueError):
            return False

    @contextmanager
    def under_load(self) -> Iterator[list[float]]:
        """Requests one after the other; yields the times at which one failed."""
        failed: list[float] = []
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                if not self.ask():
                    failed.append(time.monotonic())
                    done.wait(0.5)

        worker = threading.Thread(target=load)
        worker.start()
        try:
            yield failed
        finally:
            done.set()
            worker.join()
