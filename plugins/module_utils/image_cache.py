"""A copy of a registry for the length of a deploy: on one node, filled once, read by all over the network between them.

The copy is the distribution registry as a pull-through cache. Docker pulls from 127.0.0.1 without TLS, so each node has
a forwarder there (systemd-socket-proxyd); what comes is checked by Docker against the digest that is asked for.
Python 3.9 and the standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import platform
import shlex
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.stepladder.core.plugins.module_utils.engine_image import DOCKER_HUB, TOKEN_USER

CACHE_UNIT, FORWARD_UNIT = "stepladder-image-cache", "stepladder-image-forward"
HUB_URL = "https://registry-1.docker.io"
MANIFESTS = ", ".join(
    f"application/vnd.{name}+json"
    for name in (
        "oci.image.index.v1", "oci.image.manifest.v1", "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)  # fmt: skip
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
PROXY_DAEMONS = ("/lib/systemd/systemd-socket-proxyd", "/usr/lib/systemd/systemd-socket-proxyd")
PROXY_SETTINGS = "/etc/docker/stepladder-proxy.env"
CERTIFICATES = Path("/etc/docker/certs.d")
START_SECONDS = 20.0
# Of a mirror that does not answer the next one takes the place.
ANSWER_SECONDS = 10.0
SILENT_SECONDS = 300.0
STALLED_SECONDS = 60.0
# A copy whose deploy was killed gives the registry's images, with the node's login, to whoever reaches it.
LONGEST_SECONDS = 2 * 3600


class CacheError(Exception):
    """Why an image cannot be spread: what was found, and what mends it."""


@dataclass(frozen=True)
class Blob:
    """A piece of an image: its digest, and its size in bytes as it is sent."""

    digest: str
    size: int


def remotes(registry: str, config: Mapping[str, Any]) -> list[str]:
    """Where the copy may get what it lacks, in Docker's order: the hub's mirrors, then the registry itself.

    Docker asks mirrors for images of its hub alone. A registry of `insecure-registries` is asked by https first, as
    Docker does, then by http.

    Args:
        registry: of the image.
        config: `RegistryConfig` of what Docker says of itself.
    """
    if registry == DOCKER_HUB:
        return [*(str(one).rstrip("/") for one in config.get("Mirrors") or ()), HUB_URL]
    return [f"https://{registry}", *([f"http://{registry}"] if _is_insecure(registry, config) else [])]


def _is_insecure(registry: str, config: Mapping[str, Any]) -> bool:
    """Whether Docker takes a registry without TLS: it is named, or its address is in a network that is.

    Source: moby, registry/config.go, isSecureIndex.
    """
    known = (config.get("IndexConfigs") or {}).get(registry)
    if known:
        return not known.get("Secure", True)
    host = urlsplit(f"//{registry}").hostname or ""
    networks = [ipaddress.ip_network(one) for one in config.get("InsecureRegistryCIDRs") or ()]
    addresses: set[str] = set()
    with contextlib.suppress(OSError):
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(host, None)}
    return any(ipaddress.ip_address(address) in network for address in addresses for network in networks)


def authority_of(remote: str, certificates: Path = CERTIFICATES) -> str:
    """The certificate that Docker trusts for a registry or mirror beside the system's; empty where there is none."""
    file = certificates / urlsplit(remote).netloc / "ca.crt"
    return str(file) if file.exists() else ""


def proxy_variables(text: str) -> dict[str, str]:
    """What is in the file of proxies that the role container_runtime writes."""
    pairs = [word.partition("=") for line in text.splitlines() for word in shlex.split(line, comments=True)]
    return {name: value for name, _, value in pairs}


def settings_text(address: str, port: int, storage: str, remote: str, login: tuple[str, str]) -> str:
    """The registry's own settings, as JSON, which its YAML is read as too."""
    # The distribution registry knows no tokens in place of passwords.
    known = login[0] not in ("", TOKEN_USER)
    proxy = {"remoteurl": remote} | ({"username": login[0], "password": login[1]} if known else {})
    settings = {
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": storage}},
        "http": {"addr": f"{address}:{port}"},
        "proxy": proxy,
    }
    return json.dumps(settings, indent=1) + "\n"


def cache_command(program: str, config: str, authority: str) -> list[str]:
    """How the copy is started: as a unit that ends by itself, and takes its settings with it.

    Peers cannot be told from strangers here: IPAddressAllow= would hold for what the copy itself asks, too.

    Args:
        program: the registry's.
        config: its settings.
        authority: certificate that Docker trusts for the image's registry beside the system's, empty for none. A folder
            would not do: its name has the registry's port, and a colon ends an entry of SSL_CERT_DIR.
    """
    trusted = ["--setenv=SSL_CERT_DIR=/etc/ssl/certs:/etc/pki/tls/certs"]
    trusted += [f"--setenv=SSL_CERT_FILE={authority}"] if authority else []
    return [
        "systemd-run", f"--unit={CACHE_UNIT}", "--collect", *trusted,
        f"--property=RuntimeMaxSec={LONGEST_SECONDS}", f"--property=ExecStopPost=/bin/rm -f {config}",
        f"--property=EnvironmentFile=-{PROXY_SETTINGS}", program, "serve", config,
    ]  # fmt: skip


def forward_command(daemon: str, port: int, target: str) -> list[str]:
    """How a node's forwarder is started: 127.0.0.1:port leads to the target."""
    return [
        "systemd-run", f"--unit={FORWARD_UNIT}", "--collect", f"--socket-property=ListenStream=127.0.0.1:{port}",
        daemon, f"{target}:{port}",
    ]  # fmt: skip


def child(index: Mapping[str, Any], machine: str) -> str:
    """The digest of an index's manifest for a machine.

    Raises:
        CacheError: it has none.
    """
    wanted = f"linux/{MACHINES.get(machine, machine)}"
    found: dict[str, str] = {}
    for entry in index["manifests"]:
        system = entry.get("platform", {})
        found.setdefault(f"{system.get('os')}/{system.get('architecture')}", str(entry["digest"]))
    if wanted in found:
        return found[wanted]
    others = ", ".join(found)
    raise CacheError(f"the image is not built for {wanted}, but for {others}. Choose another one (deployment_image).")


def blobs_of(manifest: Mapping[str, Any]) -> list[Blob]:
    """The pieces that a manifest names, each once."""
    named = [manifest["config"], *manifest["layers"]]
    return list(dict.fromkeys(Blob(each["digest"], int(each["size"])) for each in named))


# --- the machine -----------------------------------------------------------------------------------------------------


def run(command: Sequence[str]) -> None:
    """Run a command.

    Raises:
        CacheError: it failed.
    """
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise CacheError(f"`{' '.join(command[:3])} ...` ended with {done.returncode}: {done.stderr.strip()}")


def stop_units() -> None:
    """End the copy and the forwarder, whether they run or not."""
    for name in (f"{FORWARD_UNIT}.socket", f"{FORWARD_UNIT}.service", f"{CACHE_UNIT}.service"):
        for verb in ("stop", "reset-failed"):
            subprocess.run(["systemctl", verb, name], capture_output=True, timeout=60, check=False)


def running() -> bool:
    """Whether any of them is there."""
    names = [f"{CACHE_UNIT}.service", f"{FORWARD_UNIT}.socket"]
    done = subprocess.run(["systemctl", "is-active", *names], capture_output=True, text=True, timeout=60, check=False)
    return "active" in done.stdout.split()


def silence(remote: str, seconds: float = ANSWER_SECONDS) -> str:
    """Why a registry does not answer; empty where it does, be it that it wants a login.

    Args:
        remote: its URL.
        seconds: that it has.
    """
    context = ssl.create_default_context()
    if authority := authority_of(remote):
        context.load_verify_locations(authority)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    try:
        opener.open(f"{remote}/v2/", timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return "" if error.code == HTTPStatus.UNAUTHORIZED else f"answers {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error or type(error).__name__)
    return ""


def start_cache(settings: str, config: Path, authority: str, address: str, port: int) -> None:
    """Start the copy and wait until it listens.

    Args:
        settings: its own.
        config: file for them, for the time of the start.
        authority: certificate that is trusted beside the system's; empty for none.
        address: where it listens.
        port: of that.

    Raises:
        CacheError: there is no such program, or it does not listen in time.
    """
    program = shutil.which("docker-registry") or shutil.which("registry")
    if not program:
        raise CacheError("there is no program docker-registry, which the package of that name brings")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.unlink(missing_ok=True)
    descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(settings)
    try:
        run(cache_command(program, str(config), authority))
        wait_listening(address, port, f"journalctl -u {CACHE_UNIT}")
    finally:
        config.unlink(missing_ok=True)  # it is read once; what is in it is no longer needed


def start_forward(target: str, port: int) -> None:
    """Start this node's forwarder.

    Raises:
        CacheError: systemd lacks it, or the copy cannot be reached.
    """
    daemon = next((path for path in PROXY_DAEMONS if Path(path).exists()), "")
    if not daemon:
        raise CacheError("systemd here has no systemd-socket-proxyd. Set engine_image_spread to false.")
    wait_listening(target, port, f"a firewall between this node and {target}")
    run(forward_command(daemon, port, target))


def wait_listening(address: str, port: int, culprit: str) -> None:
    """Wait until something listens.

    Raises:
        CacheError: nothing does in time, with where to look.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=2).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise CacheError(
                    f"{address}:{port} does not answer within {START_SECONDS:.0f} s ({error.strerror or error}); see "
                    f"{culprit}, or set engine_image_spread to false"
                ) from error
            time.sleep(0.2)
        else:
            return


@dataclass(frozen=True)
class Copy:
    """Where a repository's copy answers."""

    address: str
    port: int
    repository: str

    def open(self, connection: http.client.HTTPConnection, path: str) -> http.client.HTTPResponse:
        """Ask for something of the repository.

        Raises:
            CacheError: the copy has not got it, and cannot get it.
        """
        connection.request("GET", f"/v2/{self.repository}/{path}", headers={"Accept": MANIFESTS})
        answer = connection.getresponse()
        if answer.status != 200:
            said = answer.read().decode(errors="replace").strip()
            raise CacheError(f"the copy of the registry answers {answer.status} to {path}: {said}")
        return answer

    def manifest(self, digest: str) -> dict[str, Any]:
        """A manifest, or an index of manifests."""
        with contextlib.closing(http.client.HTTPConnection(self.address, self.port, timeout=SILENT_SECONDS)) as wire:
            return dict(json.loads(self.open(wire, f"manifests/{digest}").read()))

    def lack(self, digest: str) -> str:
        """Why the copy cannot get a manifest; empty where it can."""
        try:
            self.manifest(digest)
        except (CacheError, OSError, http.client.HTTPException) as error:
            return str(error)
        return ""

    def ask_for(self, piece: Blob) -> None:
        """Have the copy begin to fetch a piece, and hang up at the first byte.

        Distribution 2.8 fetches a piece that it lacks twice at the same time, once to keep it and once for who asked;
        the second ends when that one is gone (registry/proxy/proxyblobstore.go, ServeBlob).
        """
        with contextlib.closing(http.client.HTTPConnection(self.address, self.port, timeout=SILENT_SECONDS)) as wire:
            wire.connect()
            # Little may be on its way when the line is cut.
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.open(wire, f"blobs/{piece.digest}")


def kept(storage: Path, digest: str) -> Path:
    """Where the copy keeps a piece, once it is whole and its digest was found right."""
    algorithm, _, name = digest.partition(":")
    return storage / "docker/registry/v2/blobs" / algorithm / name[:2] / name / "data"


def coming(storage: Path, repository: str) -> int:
    """Bytes of pieces that are on their way."""
    total = 0
    for part in (storage / "docker/registry/v2/repositories" / repository / "_uploads").glob("*/data"):
        with contextlib.suppress(FileNotFoundError):
            total += part.stat().st_size
    return total


def wait_kept(copy: Copy, piece: Blob, storage: Path, report: Callable[[int], object]) -> None:
    """Wait until the copy has a piece.

    Args:
        report: gets the bytes of it that came.

    Raises:
        CacheError: nothing came for long.
    """
    seen, since = -1, time.monotonic()
    while not kept(storage, piece.digest).exists():
        count = coming(storage, copy.repository)
        if count != seen:
            seen, since = count, time.monotonic()
        if time.monotonic() - since > STALLED_SECONDS:
            raise CacheError(
                f"the registry sent nothing of {piece.digest} for {STALLED_SECONDS:.0f} s, after {max(seen, 0)} of "
                f"{piece.size} bytes; see journalctl -u {CACHE_UNIT}, and run again: whole pieces are kept"
            )
        report(max(seen, 0))
        time.sleep(0.1)


def fill(copy: Copy, digest: str, storage: Path, report: Callable[[str], object]) -> int:
    """Have the whole image in the copy; what is there is not fetched again.

    Returns: bytes of the image as they are sent.

    Raises:
        CacheError: a piece cannot be had, or there is no room for all.
    """
    manifest = copy.manifest(digest)
    if "manifests" in manifest:
        manifest = copy.manifest(child(manifest, platform.machine()))
    pieces = blobs_of(manifest)
    total, done = sum(piece.size for piece in pieces), 0
    # Of other images' pieces, and of those that a broken run had on their way, none is spared.
    there = sum(piece.size for piece in pieces if kept(storage, piece.digest).exists())
    free = shutil.disk_usage(storage).free
    if total - there > free:
        raise CacheError(
            f"{storage} has {free / 1e9:.1f} GB free, and the copy of {copy.repository} takes "
            f"{(total - there) / 1e9:.1f} GB. Free space there, or set engine_image_spread to false: then every node "
            "pulls for itself."
        )
    for piece in pieces:
        if not kept(storage, piece.digest).exists():
            copy.ask_for(piece)
            before = done
            wait_kept(copy, piece, storage, lambda count: report(_progress(before + count, total)))  # noqa: B023 - called now
        done += piece.size
        report(_progress(done, total))
    return total


def _progress(done: int, total: int) -> str:
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB in the copy for all nodes"
