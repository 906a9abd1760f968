"""What a node's container runtime has to be: versions of Docker and the toolkit, and GPUs that can be given."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepladder.catalogue import DEFAULT_DIRECTORY, Catalogue
from stepladder.environment import node_helper
from stepladder.mirrors import problems
from stepladder.versions import older

# Containers get AMD's GPUs by these, without AMD's container toolkit.
AMD_DEVICES = ("/dev/kfd", "/dev/dri")
# What timeout(1) ends with: by SIGTERM, and by SIGKILL where that is not obeyed.
EXPIRED = (124, 137)
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
CDI_GPU = re.compile(r"^nvidia\.com/gpu=", re.MULTILINE)


def gpu_vendor(wished: str, gpu: str, catalogue: str) -> str:
    """Whose GPUs containers are to be given: nvidia, amd or none.

    Args:
        wished: one of these, or auto.
        gpu: the node's GPU type, empty where the inventory names none.
        catalogue: directory of the catalogue.

    Raises:
        KeyError: for a GPU type that the catalogue has not.
    """
    if wished != "auto":
        return wished
    vendor = Catalogue(Path(catalogue)).gpus[gpu].vendor if gpu else "cpu"
    return "none" if vendor == "cpu" else vendor


def floors(docker: str = "", toolkit: str = "", catalogue: str = str(DEFAULT_DIRECTORY)) -> dict[str, str]:
    """The oldest `docker` and `toolkit` that will do.

    Args:
        docker, toolkit: the inventory's own, empty for the catalogue's.
        catalogue: its directory.

    Raises:
        CatalogueError: the catalogue is broken.
    """
    known = Catalogue(Path(catalogue)).containers
    return {"docker": docker or known.docker, "toolkit": toolkit or known.toolkit}


def runtime_faults(
    found: Mapping[str, str],
    floors: Mapping[str, str],
    vendor: str,
    reboot_due: bool = False,
    *,
    exits: Mapping[str, int] | None = None,
    patience: int = 0,
) -> list[str]:
    """Everything that keeps containers from being run here, a sentence each.

    Args:
        found: what was printed: `docker` (the server's version), `toolkit` (`nvidia-ctk --version`), `devices`
            (`nvidia-ctk cdi list`); empty where there is no such program or it does not answer. On AMD `devices` are
            those of `AMD_DEVICES` that are there, with spaces.
        floors: as `floors` tells them.
        vendor: whose GPUs containers are to be given.
        reboot_due: whether a driver waits for the node's restart: no GPU can be found before that.
        exits: exit statuses of what was asked, by the same names, under timeout(1).
        patience: seconds after which that ended it.
    """
    faults = []
    docker, toolkit = found["docker"].strip(), version_in(found["toolkit"])
    silent = {name for name, status in (exits or {}).items() if status in EXPIRED}
    if "docker" in silent:
        faults.append(
            f"Docker did not answer in {patience} s (docker version). See journalctl -u docker; "
            "systemctl restart docker starts it anew."
        )
    elif not docker:
        faults.append("Docker does not answer. See systemctl status docker.")
    # Without GPUs nothing is given by CDI, which is what the floor is about.
    elif vendor == "nvidia" and older(docker, floors["docker"]):
        text = (
            f"Docker is {docker}, and devices by CDI need {floors['docker']} or newer. Set container_runtime_docker to "
        )
        faults.append(text + "vendor, or name newer packages.")
    if "toolkit" in silent:
        faults.append(f"nvidia-ctk did not answer in {patience} s (nvidia-ctk --version). Run it on the node.")
    elif vendor == "nvidia" and not toolkit:
        faults.append("There is no nvidia-ctk. Set container_runtime_toolkit_packages to packages that bring it.")
    elif vendor == "nvidia" and older(toolkit, floors["toolkit"]):
        faults.append(
            f"The NVIDIA container toolkit is {toolkit}, which has known holes; {floors['toolkit']} or newer is needed "
            "(container_runtime_toolkit_floor)."
        )
    if "devices" in silent:
        faults.append(f"nvidia-ctk did not answer in {patience} s (nvidia-ctk cdi list). Run it on the node.")
    elif vendor == "nvidia" and toolkit and not reboot_due and not CDI_GPU.search(found["devices"]):
        faults.append(
            "CDI knows no GPU (nvidia-ctk cdi list). Is the driver loaded (nvidia-smi)? The toolkit's service "
            "nvidia-cdi-refresh describes the GPUs anew: systemctl restart nvidia-cdi-refresh."
        )
    if vendor == "amd" and not reboot_due and (missing := set(AMD_DEVICES) - set(found["devices"].split())):
        faults.append(
            f"There is no {' and no '.join(sorted(missing))}, by which containers are given AMD's GPUs. Is the driver "
            "loaded (lsmod | grep amdgpu)?"
        )
    return faults


def wish_problems(
    authorities: Mapping[str, Any],
    mirrors: Sequence[str],
    proxies: Mapping[str, Any],
    repositories: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """What of the wishes for a node's Docker would be taken for nothing, or would stop it; no password is in the text.

    Args:
        authorities: certificates by registry. mirrors: addresses. proxies: by the variable's name.
        repositories: mirrors of package repositories, by the variable that names them.
    """
    told = []
    for registry, text in authorities.items():
        place, hidden = f"container_runtime_authorities, {registry!r}", "PRIVATE KEY-----" in str(text)
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]+)?", registry):
            told.append(f"{place}: name the registry as its images do, host or host:port, or Docker never looks there")
        if hidden:
            told.append(f"{place}: there is a private key in it, which everybody on the node could read")
        elif fault := _certificate_fault(str(text or "")):
            told.append(f"{place}: no certificate in PEM ({fault}): give its text, not its file's name")
    hide = node_helper("pip_config")
    for address in mirrors:
        if not re.match(r"https?://[^/@\s]+/?$", address):
            told.append(
                f"container_runtime_mirrors: '{hide.redact(address)}' is not of the form https://HOST or http://HOST, "
                "without a user or password, and Docker would not start with it"
            )
    for name, value in proxies.items():
        if name.lower() not in PROXIES:
            told.append(f"container_runtime_proxies: '{name}' is unknown; known are {', '.join(PROXIES)}")
        elif not isinstance(value or "", str):
            told.append(
                f"container_runtime_proxies: {name} is a {type(value).__name__}: give text, several with commas"
            )
    return told + [str(one) for place, mirror in repositories.items() for one in problems(place, mirror)]


def _certificate_fault(text: str) -> str:
    """Why a text holds no certificates, empty where it does."""
    try:
        # A mistake in one of several would else be skipped without a word.
        for block in CERTIFICATE.findall(text) or [""]:
            ssl.create_default_context().load_verify_locations(cadata=block or "none")
    except (ssl.SSLError, ValueError) as error:
        return str(getattr(error, "reason", None) or error).lower().replace("_", " ")
    return ""


def version_in(text: str) -> str:
    """The version in what a program prints of itself; empty where there is none."""
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else ""
