"""An engine's image on a node: what lies there, what is to be brought, and how, through Docker's own interface.

The first half is pure (names, decisions, words), the second half talks to Docker over its socket. Python 3.9 and the
standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from ansible_collections.stepladder.core.plugins.module_utils import pip_config
from ansible_collections.stepladder.core.plugins.module_utils.unix_http import UnixConnection

SOCKET = "/var/run/docker.sock"
DOCKER_HUB = "docker.io"
# What Docker's own files call its hub.
HUB_CREDENTIALS = "https://index.docker.io/v1/"
# As Docker's own client and its helpers call the user of a token (docker/cli, cli/config/credentials).
TOKEN_USER = "<token>"  # noqa: S105 - a user
CONTAINERD_CONFIG = Path("/etc/containerd/config.toml")
ANSWER_SECONDS = 60.0
# For whoever only looks; a Docker that hangs is not to hold him.
LOOK_SECONDS = 10.0
# A registry that sends nothing for so long is taken for dead; unpacking a layer of 10 GB says nothing for minutes.
SILENT_SECONDS = 1800.0
BLOCK = 1024 * 1024
_REFERENCE = re.compile(
    r"^(?P<path>[^@]+?)(?::(?P<tag>[A-Za-z0-9_][\w.\-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?$"
)


class ImageError(Exception):
    """Why an image cannot be brought: what was found, and what mends it.

    No password is in the text: Docker's complaint may have a proxy's address with one in it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(pip_config.redact(text))


@dataclass(frozen=True)
class Reference:
    """An image's name taken apart; `tag` and `digest` are empty where it has none."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository as Docker writes them."""
        if self.registry == DOCKER_HUB:
            return self.repository.removeprefix("library/") if "/" in self.repository else self.repository
        return f"{self.registry}/{self.repository}"

    @property
    def local(self) -> str:
        """The name that the image goes by on the node: its tag, or one made of its digest."""
        return f"{self.name}:{self.tag or self.digest.replace('sha256:', 'sha256-')[:19]}"


def parse(text: str) -> Reference:
    """Take an image's name apart, as Docker does.

    Raises:
        ImageError: for a text that is none.
    """
    match = _REFERENCE.match(text)
    if not match:
        raise ImageError(f"'{text}' is not the name of an image; one looks like vllm/vllm-openai:v0.33.0")
    first, slash, rest = match["path"].partition("/")
    # Docker's rule: a first part with a dot or a port, or localhost, is a registry.
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, repository = first, rest
    else:
        registry, repository = DOCKER_HUB, match["path"] if slash else f"library/{match['path']}"
    return Reference(registry, repository, match["tag"] or "", match["digest"] or "")


@dataclass(frozen=True)
class Local:
    """An image that lies on the node.

    `digests` are those of the registries it came from, `sources` the same behind the repositories' names; `size` in
    bytes.
    """

    id: str
    digests: tuple[str, ...] = ()
    size: int = 0
    sources: tuple[str, ...] = ()

    def digest_in(self, wanted: Reference) -> str:
        """The digest by which the wanted image's repository has it; empty where it came from elsewhere."""
        found = (text.rpartition("@") for text in self.sources)
        return next((digest for name, _, digest in found if name == wanted.name), "")


def is_wanted(found: Local | None, wanted: Reference, record: Mapping[str, Any]) -> bool:
    """Whether the image that lies there under the wanted name is the wanted one.

    Args:
        found: what lies there.
        wanted: where it names no digest, what lies there under its tag stays.
        record: what an earlier run wrote down of it: an image from an archive or a peer has no registry's digest.
    """
    if found is None:
        return False
    recorded = record.get("digest") == wanted.digest and record.get("id") == found.id
    return not wanted.digest or wanted.digest in found.digests or recorded


@dataclass
class Layers:
    """Progress of a pull, from what Docker says of each layer."""

    done: set[str] = field(default_factory=set)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any]) -> None:
        """One of Docker's messages."""
        layer, status, detail = event.get("id"), event.get("status", ""), event.get("progressDetail") or {}
        if not layer or status.startswith("Pulling from"):
            return
        current, total = self.seen.get(layer, (0, 0))
        if status == "Downloading":
            current, total = detail.get("current", current), detail.get("total", total)
        elif status in ("Download complete", "Verifying Checksum"):
            current = total
        elif status in ("Pull complete", "Already exists"):
            current = total
            self.done.add(layer)
        self.seen[layer] = (current, total)

    def __str__(self) -> str:
        current, total = (sum(each[part] for each in self.seen.values()) for part in (0, 1))
        size = f"{current / 1e9:.2f} of {total / 1e9:.2f} GB fetched, " if total else ""
        return f"{size}{len(self.done)} of {len(self.seen)} layers there"


def gone_text(wanted: Reference, complaint: str, known: Sequence[str], tags: Sequence[str] = ()) -> str:
    """What to say of an image that the registry has not.

    Args:
        known: images that the catalogue has for the engine.
        tags: of the repository, where the registry tells them.
    """
    others = [image for image in known if parse(image) != wanted]
    text = f"{wanted.registry} has no image {wanted.local} ({complaint})."
    text += f" The catalogue knows: {', '.join(others)}." if others else " The catalogue knows no other one."
    text += f" The registry has the tags {', '.join(sorted(tags)[-20:])}." if tags else ""
    return (
        text + " Choose one with deployment_engine_version or deployment_image, or bring it with engine_image_archive."
    )


def is_gone(complaint: str) -> bool:
    """Whether a registry's complaint says that there is no such image, and not that it cannot be asked."""
    return bool(re.search(r"manifest unknown|not found|name unknown|does not exist|no such manifest", complaint, re.I))


def login_text(wanted: Reference) -> str:
    """How the node is logged in to an image's registry."""
    registry = "" if wanted.registry == DOCKER_HUB else f" {wanted.registry}"
    return f"docker login{registry}, as root on this node"


def wants_login(complaint: str) -> bool:
    """Whether a registry's complaint is of who asks; Docker's hub says so of an image that is not there, too."""
    words = r"unauthorized|authentication required|no basic auth|(?<!permission )denied|docker login"
    return bool(re.search(words, complaint, re.I))


def is_throttled(complaint: str) -> bool:
    """Whether a registry has the image and gives no more of it for now."""
    return bool(re.search(r"too ?many ?requests|rate limit", complaint, re.I))


def store_folder(info: Mapping[str, Any], config: Path = CONTAINERD_CONFIG) -> str:
    """Where Docker's images lie.

    containerd's own store, the default of a fresh Docker 29, has them below containerd's root, whatever Docker's data
    root is. Source: Docker's manual, "containerd image store"; containerd-config.toml(5).

    Args:
        info: what Docker says of itself.
        config: containerd's settings.
    """
    root = str(info.get("DockerRootDir") or "/var/lib/docker")
    by_containerd = any("io.containerd.snapshotter" in str(row) for row in info.get("DriverStatus") or ())
    # A containerd that Docker itself has started keeps its own below Docker's data root.
    if not by_containerd or "/docker/" in str((info.get("Containerd") or {}).get("Address")):
        return root
    try:
        settings = f"\n{config.read_text()}".partition("\n[")[0]
    except OSError:
        settings = ""
    named = re.search(r"""(?m)^\s*root\s*=\s*["']([^"']+)["']""", settings)
    return named[1] if named else "/var/lib/containerd"


def is_installed() -> bool:
    """Whether the node has a Docker, be it that it does not answer."""
    return any(shutil.which(program) for program in ("dockerd", "/usr/bin/dockerd", "/usr/sbin/dockerd"))


def space_text(root: str, free: int, needed: int, name: str) -> str:
    """What to say where an image does not fit; empty where it does."""
    if free >= needed:
        return ""
    return (
        f"{root} has {free / 1e9:.1f} GB free, and {name} takes {needed / 1e9:.1f} GB. Free "
        f"{(needed - free) / 1e9:.1f} GB there (docker system df; docker image prune), or give Docker a larger disk "
        "with container_runtime_data_root."
    )


# --- Docker ----------------------------------------------------------------------------------------------------------


class Docker:
    """The Docker engine of the node.

    Args:
        path: its socket.
        credentials: the folder that holds Docker's `config.json`.
        seconds: that it has for an answer.
    """

    def __init__(self, path: str = SOCKET, credentials: Path | None = None, seconds: float = ANSWER_SECONDS) -> None:
        self.path = path
        self.seconds = seconds
        self.credentials = credentials or Path(os.environ.get("DOCKER_CONFIG", "~/.docker")).expanduser()

    @contextlib.contextmanager
    def _ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        seconds: float = ANSWER_SECONDS,
    ) -> Iterator[http.client.HTTPResponse]:
        connection = UnixConnection(self.path, seconds)
        try:
            try:
                connection.request(method, path, body=body, headers=dict(headers or {}))
            except (BrokenPipeError, ConnectionResetError):
                if body is None:
                    raise
                # Docker took no more of it; its answer says why.
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ImageError(
                f"Docker does not answer at {self.path}: {reason}. See systemctl status docker; the role "
                "container_runtime installs it."
            ) from error
        finally:
            connection.close()

    def call(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Status and answer of a call."""
        with self._ask(method, path, headers, seconds=self.seconds) as answer:
            text = answer.read().decode(errors="replace")
            try:
                return answer.status, json.loads(text) if text else None
            except ValueError:
                return answer.status, {"message": text.strip()}

    def info(self) -> dict[str, Any]:
        """What Docker says of itself."""
        return dict(self.call("GET", "/info")[1] or {})

    def look(self, name: str) -> Local | None:
        """An image by name or id; none where it is not there."""
        status, found = self.call("GET", f"/images/{quote(name, safe='')}/json")
        if status == 404:
            return None
        if status != 200:
            raise ImageError(f"Docker says of {name}: {(found or {}).get('message', status)}")
        sources = tuple(found.get("RepoDigests") or ())
        digests = tuple(text.partition("@")[2] for text in sources)
        return Local(found["Id"], digests, int(found.get("Size") or 0), sources)

    def containers(self, label: str) -> list[str]:
        """Names of the containers that have a label, those that ended among them.

        Args:
            label: `key=value`.

        Raises:
            ImageError: Docker does not tell.
        """
        query = urlencode({"all": "1", "filters": json.dumps({"label": [label]})})
        status, found = self.call("GET", f"/containers/json?{query}")
        if status != 200:
            raise ImageError(f"Docker does not tell its containers: {(found or {}).get('message', status)}")
        return [one["Names"][0].removeprefix("/") for one in found]

    def resolve(self, wanted: Reference, known: Sequence[str] = ()) -> str:
        """The digest that a registry has under a name, asked by Docker with its own certificates, mirrors and proxies.

        Raises:
            ImageError: the registry has it not, or cannot be asked.
        """
        if wanted.digest:
            return wanted.digest
        name = quote(f"{wanted.name}:{wanted.tag}", safe="")
        status, found = self.call("GET", f"/distribution/{name}/json", self.auth(wanted.registry))
        if status == 200:
            return str(found["Descriptor"]["digest"])
        raise self.refusal(wanted, (found or {}).get("message", f"status {status}"), known)

    def refusal(self, wanted: Reference, complaint: str, known: Sequence[str]) -> ImageError:
        """A registry's complaint with what mends it."""
        if is_gone(complaint):
            hint = f" If those who are logged in have it: {login_text(wanted)}." if wants_login(complaint) else ""
            return ImageError(gone_text(wanted, complaint, known) + hint)
        if is_throttled(complaint):
            return ImageError(
                f"{wanted.local} cannot be pulled: {complaint}. {wanted.registry} gives no more for now. Run again "
                f"later, log in ({login_text(wanted)}), name a mirror (container_runtime_mirrors), or load an archive "
                "with engine_image_archive."
            )
        if wants_login(complaint):
            return ImageError(
                f"{wanted.local} cannot be pulled: {complaint}. {wanted.registry} wants a login, or one that may read "
                f"it: {login_text(wanted)}; then run again."
            )
        if "no space left" in complaint:
            return ImageError(f"{wanted.local}: {complaint}. Free space where Docker keeps images and run again.")
        return ImageError(
            f"{wanted.local} cannot be pulled: {complaint}. Is {wanted.registry} reached from here? Mirrors, "
            "proxies and certificates are variables of container_runtime; an archive is loaded with "
            "engine_image_archive. A rerun goes on."
        )

    def pull(self, name: str, wanted: Reference, known: Sequence[str], report: Callable[[str], object]) -> None:
        """Pull an image.

        Args:
            name: what is asked for, with a tag or digest; it may be a peer's copy of what is wanted.
            wanted: what it is for the messages, and whose registry's credentials are sent.
            known: images of the catalogue.
            report: called with a line of progress.
        """
        image = parse(name)
        query = {"fromImage": f"{image.name}@{image.digest}" if image.digest else image.name}
        query |= {} if image.digest else {"tag": image.tag}
        layers = Layers()
        path, auth = f"/images/create?{urlencode(query)}", self.auth(image.registry)
        with self._ask("POST", path, auth, seconds=SILENT_SECONDS) as answer:
            if answer.status != 200:
                raise self.refusal(wanted, _message(answer.read()), known)
            for event in _events(answer):
                if event.get("error"):
                    raise self.refusal(wanted, str(event["error"]), known)
                layers.take(event)
                report(f"{wanted.local}: {layers}")

    def load(self, archive: Path, report: Callable[[str], object]) -> list[str]:
        """Load an archive of `docker save`; returns the names or ids that it brought.

        Raises:
            ImageError: Docker refuses it.
        """
        size = archive.stat().st_size
        with archive.open("rb") as stream:

            def blocks() -> Iterator[bytes]:
                sent = 0
                while block := stream.read(BLOCK):
                    sent += len(block)
                    report(f"{archive.name}: {sent / 1e9:.2f} of {size / 1e9:.2f} GB handed to Docker")
                    yield block

            headers = {"Content-Type": "application/x-tar", "Content-Length": str(size)}
            with self._ask("POST", "/images/load?quiet=1", headers, blocks(), SILENT_SECONDS) as answer:
                events = list(_events(answer))
        fault = next((event["error"] for event in events if event.get("error")), "")
        if "no space left" in fault:
            raise ImageError(
                f"{archive} cannot be loaded: {fault}. Free space where Docker keeps images (docker system df; docker "
                "image prune), or give it a larger disk with container_runtime_data_root; then run again."
            )
        if fault:
            raise ImageError(f"{archive} is not an archive of 'docker save' that Docker can load: {fault}")
        said = "".join(event.get("stream", "") for event in events)
        return re.findall(r"Loaded image(?: ID)?: (\S+)", said)

    def tag(self, source: str, name: str) -> None:
        """Give an image a name."""
        repository, _, tag = name.rpartition(":")
        query = urlencode({"repo": repository, "tag": tag})
        status, said = self.call("POST", f"/images/{quote(source, safe='')}/tag?{query}")
        if status != 201:
            raise ImageError(f"Docker cannot call {source} {name}: {(said or {}).get('message', status)}")

    def remove(self, name: str) -> None:
        """Take a name, and with its last one the image, away.

        Raises:
            ImageError: a container still uses it.
        """
        status, said = self.call("DELETE", f"/images/{quote(name, safe='')}")
        if status not in (200, 404):
            raise ImageError(f"{name} cannot be removed: {said.get('message', status)}")

    def auth(self, registry: str) -> dict[str, str]:
        """The header with the credentials for a registry; none where there are none."""
        user, secret = self.login(registry)
        if not user:
            return {}
        given = {"identitytoken": secret} if user == TOKEN_USER else {"username": user, "password": secret}
        given["serveraddress"] = credentials_key(registry)
        return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(given).encode()).decode()}

    def login(self, registry: str) -> tuple[str, str]:
        """User and password that `docker login` keeps for a registry; empty where it keeps none.

        Where the registry gave a token for the password, they are `TOKEN_USER` and the token.
        """
        key = credentials_key(registry)
        try:
            kept = json.loads((self.credentials / "config.json").read_text())
        except (OSError, ValueError):
            return "", ""
        helper = kept.get("credHelpers", {}).get(key) or kept.get("credsStore")
        if helper:
            command = [f"docker-credential-{helper}", "get"]
            done = subprocess.run(command, input=key, capture_output=True, text=True, timeout=60, check=False)
            found = json.loads(done.stdout) if done.returncode == 0 else {}
            return found.get("Username", ""), found.get("Secret", "")
        entry = kept.get("auths", {}).get(key, {})
        if token := entry.get("identitytoken"):
            return TOKEN_USER, token
        plain = base64.b64decode(entry.get("auth", "")).decode()
        user, _, secret = plain.partition(":")
        return user, secret


def credentials_key(registry: str) -> str:
    """What Docker's own files call a registry."""
    return HUB_CREDENTIALS if registry == DOCKER_HUB else registry


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Docker's messages, one JSON a line."""
    while line := answer.readline():
        if line.strip():
            try:
                event = json.loads(line)
            except ValueError:
                event = {"error": line.decode(errors="replace").strip()}
            if "message" in event and answer.status >= 400:
                event["error"] = event["message"]
            yield event


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()


# --- bringing one -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What the module was asked for.

    name: of the image, as planned. archive: file of `docker save`, empty for none. through: `host:port` of a copy of
    its registry, empty for none. digest: that the registry has it under, empty where it is to be asked. known: the
    catalogue's images. needed: bytes that have to be free. record: file that keeps what was brought.
    """

    name: str
    archive: str
    through: str
    digest: str
    known: tuple[str, ...]
    needed: int
    record: Path


def record_stem(image: str) -> str:
    """Name of the file that the role `engine_image` keeps of an image, without its suffix."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", image)


def read_record(path: Path) -> dict[str, Any]:
    """What an earlier run wrote down; empty where there is nothing that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def recorded_of(docker: Docker, found: Local, record: Mapping[str, Any]) -> Local:
    """The image that was brought, as long as Docker has it; else the one found under its name, which may be moved."""
    identity = str(record.get("id") or "")
    return (docker.look(identity) if identity and identity != found.id else None) or found


def way(wanted: Wanted, reference: Reference, digest: str) -> str:
    """In words, how the image would come; `digest` is empty where it is not known yet."""
    if wanted.archive:
        return f"load {reference.local} from {wanted.archive}"
    named = f" ({digest})" if digest else ""
    through = f" through {wanted.through}" if wanted.through else ""
    return f"pull {reference.local}{named} from {reference.registry}{through}"


def bring(docker: Docker, wanted: Wanted, report: Callable[[str], object]) -> dict[str, Any]:
    """Have the image on the node; returns what is to be written down of it.

    Raises:
        ImageError: with what was found and what mends it.
    """
    reference = parse(wanted.name)
    root = store_folder(docker.info())
    there = next(folder for folder in (Path(root), *Path(root).parents) if folder.exists())
    if fault := space_text(root, shutil.disk_usage(there).free, wanted.needed, reference.local):
        raise ImageError(fault)
    started, digest = time.monotonic(), reference.digest
    if wanted.archive:
        source = wanted.archive
        _load(docker, reference, Path(wanted.archive), report)
    else:
        source = wanted.through or reference.registry
        digest = wanted.digest or docker.resolve(reference, wanted.known)
        _pull(docker, reference, digest, wanted, report)
    found = docker.look(reference.local)
    if found is None:
        raise ImageError(f"Docker brought {reference.local} and has it not; run again, and see journalctl -u docker")
    seconds = round(time.monotonic() - started, 1)
    return {
        "name": wanted.name,
        "id": found.id,
        "digest": digest,
        "from": source,
        "bytes": found.size,
        "seconds": seconds,
    }


def _pull(docker: Docker, reference: Reference, digest: str, wanted: Wanted, report: Callable[[str], object]) -> None:
    host = wanted.through or reference.registry
    copy = Reference(host, reference.repository, digest=digest)
    asked = f"{copy.name}@{digest}"
    docker.pull(asked, reference, wanted.known, report)
    docker.tag(asked, reference.local)
    if wanted.through:
        docker.remove(asked)


def _load(docker: Docker, reference: Reference, archive: Path, report: Callable[[str], object]) -> None:
    if not archive.is_file():
        raise ImageError(
            f"engine_image_archive {archive} is not there. Carry it to the node, or leave the variable out."
        )
    brought = docker.load(archive, report)
    if reference.local in brought:
        return
    if len(brought) != 1:
        raise ImageError(
            f"{archive} brought {', '.join(brought) or 'nothing'}, and {reference.local} is wanted. Make it with: "
            f"docker save -o {archive.name} {reference.local}"
        )
    docker.tag(brought[0], reference.local)
