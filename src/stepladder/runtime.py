"""What a node's container runtime has to be: versions of Docker and the toolkit, and GPUs that can be given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from stepladder.catalogue import Catalogue
from stepladder.setting import older

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


def runtime_faults(
    found: Mapping[str, str], floors: Mapping[str, str], vendor: str, reboot_due: bool = False
) -> list[str]:
    """Everything that keeps containers from being run here, a sentence each.

    Args:
        found: what was printed: `docker` (the server's version), `toolkit` (`nvidia-ctk --version`), `devices`
            (`nvidia-ctk cdi list`); empty where there is no such program or it does not answer.
        floors: oldest version of `docker` and of `toolkit`.
        vendor: whose GPUs containers are to be given.
        reboot_due: whether a driver waits for the node's restart: no GPU can be found before that.
    """
    faults = []
    docker, toolkit = found["docker"].strip(), version_in(found["toolkit"])
    if not docker:
        faults.append("Docker does not answer. See systemctl status docker.")
    # Without GPUs nothing is given by CDI, which is what the floor is about.
    elif vendor == "nvidia" and older(docker, floors["docker"]):
        text = (
            f"Docker is {docker}, and devices by CDI need {floors['docker']} or newer. Set container_runtime_docker to "
        )
        faults.append(text + "vendor, or name newer packages.")
    if vendor == "nvidia" and not toolkit:
        faults.append("There is no nvidia-ctk. Set container_runtime_toolkit_packages to packages that bring it.")
    elif vendor == "nvidia" and older(toolkit, floors["toolkit"]):
        faults.append(
            f"The NVIDIA container toolkit is {toolkit}, which has known holes; {floors['toolkit']} or newer is needed "
            "(container_runtime_toolkit_floor)."
        )
    if vendor == "nvidia" and toolkit and not reboot_due and not CDI_GPU.search(found["devices"]):
        faults.append(
            "CDI knows no GPU (nvidia-ctk cdi list). Is the driver loaded (nvidia-smi)? The toolkit's service "
            "nvidia-cdi-refresh describes the GPUs anew: systemctl restart nvidia-cdi-refresh."
        )
    return faults


def version_in(text: str) -> str:
    """The version in what a program prints of itself; empty where there is none."""
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else ""
