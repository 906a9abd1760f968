"""What the operator wants and on which nodes: the planner's only input besides the catalogue."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from stepladder.errors import PlanRefusedError, Violation

FEATURES = {
    "tool_calls": "parse tool calls out of the answer",
    "reasoning": "split the reasoning off the answer",
    "text_only": "leave the vision tower out and give its memory to the KV cache",
    "mtp": "speculative decoding with the model's own multi-token prediction layers",
}
DEFAULT_FEATURES = ("reasoning", "tool_calls")


class Wish(BaseModel):
    """Base of all inputs: nothing unknown is accepted, nothing is changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Parallel(Wish):
    """How one replica is cut into GPUs; the world size is tensor * pipeline * data."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    data: PositiveInt = 1
    expert: bool = False

    @property
    def world_size(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}"]
        parts += [f"PP{self.pipeline}"] if self.pipeline > 1 else []
        parts += [f"DP{self.data}"] if self.data > 1 else []
        return "x".join(parts) + ("+EP" if self.expert else "")


class Deployment(Wish):
    """What is to be served, by which engine, and how.

    `context_length` in tokens (none: the model's own); `concurrency` is the number of full-length sequences that the
    KV cache should hold at once; `port` none takes the engine's own.
    """

    name: str = Field("default", pattern=r"^[a-z][a-z0-9\-]{0,40}$")
    model: str
    variant: str | None = None
    engine: str
    topology: str = "auto"
    parallel: Literal["auto"] | Parallel = "auto"
    replicas: PositiveInt = 1
    features: tuple[str, ...] = DEFAULT_FEATURES
    context_length: PositiveInt | None = None
    concurrency: PositiveInt = 1
    served_name: str | None = None
    bind_address: str | None = None
    port: int | None = Field(None, gt=0, lt=65536)
    weights_endpoint: str | None = None
    extra_arguments: tuple[str, ...] = ()
    extra_environment: dict[str, str] = {}


class Node(Wish):
    """A machine as the inventory declares it; `address` is where its peers reach it."""

    name: str
    address: str
    gpu: str
    gpus: PositiveInt | None = None
    interface: str | None = None

    @property
    def on_loopback(self) -> bool:
        """Whether only the machine itself can reach the address."""
        try:
            return ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            return self.address == "localhost"


class PlanRequest(Wish):
    """Everything a plan depends on; the same request and catalogue give the same plan to the byte."""

    deployment: Deployment
    nodes: tuple[Node, ...]
    state_directory: str = "/var/lib/stepladder"


def parse_request(data: Mapping[str, Any]) -> PlanRequest:
    """Read a request out of inventory variables.

    Raises:
        PlanRefusedError: with every variable that cannot be used, its value, and what was expected.
    """
    try:
        return PlanRequest.model_validate(data)
    except ValidationError as error:
        raise PlanRefusedError([_as_violation(problem) for problem in error.errors()]) from error


def _as_violation(problem: Any) -> Violation:
    where = [str(part) for part in problem["loc"]]
    if where[:1] == ["deployment"]:
        name = "_".join(part for part in where if part not in {"Parallel", "literal['auto']"})
    else:
        name = ".".join(where)
    return Violation(f"variable {name}", f"found {problem['input']!r}", f"{problem['msg']}.")
