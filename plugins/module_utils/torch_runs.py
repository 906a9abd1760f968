"""Running our program on torch: which Python of the node has torch, and what the program answers.

Standard library only: this runs on the node, under any Python from 3.9 on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import asking

# Importing torch from a cold disk takes its time.
SEEK_SECONDS = 60
END_SECONDS = 5
# As the engines' own containers get them: by CDI, without a hook that runs as root.
DEVICES = {
    "nvidia": ("--device=nvidia.com/gpu=all",),
    "amd": ("--device", "/dev/kfd", "--device", "/dev/dri", "--group-add", "video"),
}
HAS_TORCH = ("-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)")
MISSING = "no environment with torch"
BRING = (
    "deploy an engine into an environment first, or give acceptance_python (a Python with torch) or acceptance_image"
)


def interpreters(state_directory: str, given: str = "") -> Iterator[str]:
    """Every Python of the node that may have torch: the given one, else those of the engines, newest first.

    Args:
        state_directory: where the toolkit keeps everything on a node.
        given: path of a Python.
    """
    if given:
        yield given
        return
    found = Path(state_directory, "venvs").glob("*/bin/python")
    yield from map(str, sorted(found, key=lambda path: path.lstat().st_mtime, reverse=True))


def command(
    state_directory: str, python: str, image: str, vendor: str, seconds: float, *, environment: Iterable[str] = ()
) -> list[str]:
    """What our program is to be run with; empty where nothing on the node has torch.

    Args:
        state_directory: where the toolkit keeps everything on a node.
        python: path of a Python with torch; empty looks for one.
        image: a container image with torch in its python3; it is not fetched.
        vendor: of the GPUs that a container is to see; empty for none.
        seconds: after which a container ends itself: it would outlive the client that started it.
        environment: names of further variables that a container gets from this process's own.
    """
    if image:
        return [
            "docker", "run", "--rm", "--interactive", "--pull", "never", "--network", "host", "--ipc", "host",
            "--ulimit", "memlock=-1", *DEVICES.get(vendor, ()), *_infiniband(), *_environment_names(environment),
            "--entrypoint", "timeout", image, "-k", str(END_SECONDS), f"{seconds:g}", "python3",
        ]  # fmt: skip
    for candidate in interpreters(state_directory, python):
        ran = asking.run([candidate, *HAS_TORCH], SEEK_SECONDS)
        if not ran.problem and ran.status == 0:
            return [candidate]
    return []


def _infiniband() -> tuple[str, ...]:
    return ("--device", "/dev/infiniband") if Path("/dev/infiniband").exists() else ()


def _environment_names(more: Iterable[str]) -> list[str]:
    """Names alone: docker takes the values from its own environment, where `ps` does not show them."""
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "CUDA_DEVICE_ORDER")
    return [part for name in dict.fromkeys((*names, *more)) for part in ("--env", name)]


def answer(command_: Sequence[str], program: str, task: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Run our program with a task; its answer, with `problem` where there is none."""
    ran = asking.run([*command_, "-", json.dumps(task)], seconds + 2 * END_SECONDS, given=program)
    if ran.problem:
        return {"problem": ran.problem.replace(Path(command_[0]).name, "the program on torch", 1)}
    return parse(ran)


def parse(ran: asking.Ran) -> dict[str, Any]:
    """Read the last line of JSON; libraries may print before it."""
    for line in reversed(ran.said.splitlines()):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                break
    last = next((line.strip() for line in reversed(ran.complained.splitlines()) if line.strip()), "it says nothing")
    return {"problem": f"the program on torch ends with {ran.status}: {last[: asking.SHOWN]}"}
