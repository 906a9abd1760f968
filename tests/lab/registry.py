"""A real registry for the lab: Debian's docker-registry, over TLS with an authority of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

from rehearsal_images import run

PROGRAM = "docker-registry"
START_SECONDS = 20.0
# A play that brings the image of a deployment to its nodes, and does nothing else.
PULL = """
- hosts: engines
  gather_facts: false
  any_errors_fatal: true
  roles:
    - role: deployment
    - role: service
      vars: {service_tools: /nonexistent}
    - role: engine_image
"""


def why_not() -> str:
    """What this machine lacks for a registry; empty where it lacks nothing."""
    return "" if shutil.which(PROGRAM) else f"the program {PROGRAM} (package {PROGRAM})"


class Registry:
    """A registry that nodes reach over TLS, and this machine over loopback, which Docker trusts as it is.

    Args:
        folder: for its images, certificates and logs.
        address: of this machine, as the nodes see it.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address
        self.port, self.loopback_port = free_port(address), free_port("127.0.0.1")
        self.running: list[subprocess.Popen[bytes]] = []

    @property
    def host(self) -> str:
        """As images of it are called."""
        return f"{self.address}:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate that nodes have to trust."""
        return self.folder / "ca.crt"

    def __enter__(self) -> Registry:
        self.folder.mkdir(parents=True, exist_ok=True)
        certify(self.folder, self.address)
        tls = f"\n  tls: {{certificate: {self.folder}/server.crt, key: {self.folder}/server.key}}"
        for name, address, extra in (("tls", self.host, tls), ("loopback", f"127.0.0.1:{self.loopback_port}", "")):
            settings = self.folder / f"{name}.yml"
            settings.write_text(
                f"version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\n"
                f"storage:\n  filesystem: {{rootdirectory: {self.folder}/images}}\n"
                f"http:\n  addr: {address}{extra}\n"
            )
            with (self.folder / f"{name}.log").open("wb") as log:
                self.running.append(
                    subprocess.Popen(
                        [PROGRAM, "serve", str(settings)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        for address, port in ((self.address, self.port), ("127.0.0.1", self.loopback_port)):
            wait_open(address, port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.running:
            process.terminate()
            process.wait(timeout=20)

    def push(self, docker: list[str], image: str, name: str) -> str:
        """Put an image of an engine into the registry under a name with a tag; returns how nodes call it."""
        local = f"127.0.0.1:{self.loopback_port}/{name}"
        run([*docker, "tag", image, local])
        try:
            run([*docker, "push", local])
        finally:
            run([*docker, "rmi", local])
        return f"{self.host}/{name}"

    def sent(self) -> int:
        """Bytes of layers that left it towards nodes, by its own log."""
        total = 0
        for line in (self.folder / "tls.log").read_text(errors="replace").splitlines():
            words = line.split('"')
            if len(words) > 2 and words[1].startswith("GET ") and "/blobs/" in words[1]:
                total += int(words[2].split()[1])
        return total


def certify(folder: Path, address: str) -> None:
    """An authority, and a certificate of it for an address."""
    if (folder / "server.crt").exists():
        return
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    run([*make, "-subj", "/CN=rehearsal authority", "-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.crt")])
    run(
        [*make, "-subj", f"/CN={address}", "-addext", f"subjectAltName=IP:{address}", "-CA", str(folder / "ca.crt"),
         "-CAkey", str(folder / "ca.key"), "-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt")]
    )  # fmt: skip


def free_port(address: str) -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def wait_open(address: str, port: int) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {address}:{port} after {START_SECONDS:.0f} s"
            time.sleep(0.1)
        else:
            return
