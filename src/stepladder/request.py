"""What the operator wants and on which nodes: the planner's only input besides the catalogue."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from stepladder.errors import PlanRefusedError, Violation

FEATURES = {
    "tool_calls": "parse tool calls out of the answer",
    "reasoning": "split the reasoning off the answer",
    "text_only": "leave the vision tower out and give its memory to the KV cache",
    "mtp": "speculative decoding with the model's own multi-token prediction layers",
}
PARALLEL_BRANCHES = {"Parallel", "literal['auto']"}  # how pydantic calls the two readings of `parallel`
DEFAULT_FEATURES = ("reasoning", "tool_calls")
PARALLEL_TEXT = re.compile(
    r"^(?:TP(?P<tensor>\d+))?x?(?:PP(?P<pipeline>\d+))?x?(?:DP(?P<data>\d+))?(?P<expert>\+EP)?$", re.I
)


class Wish(BaseModel):
    """Base of all inputs: nothing unknown is accepted, nothing is changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_ip_address(value: str) -> bool:
    """Whether it is an address and no name."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def host_and_port(host: str, port: int) -> str:
    """As a URL has them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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


SERVED_NAME = r"^[A-Za-z0-9][\w.\-/:]{0,199}$"
# host:port/path:tag@digest; a tag or a digest is named, for what 'latest' is changes from day to day.
IMAGE = (
    r"^(?:[a-zA-Z0-9.\-]+(?::\d+)?/)?[a-z0-9]+(?:[._\-/]+[a-z0-9]+)*"
    r"(?::[A-Za-z0-9_][\w.\-]{0,127}(?:@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})$"
)
LONGEST_SHOWN = 120
EVERYWHERE = "0.0.0.0"  # noqa: S104 - an endpoint for clients on other machines is the purpose
# Each replica answers on the address of its own node alone.
PRIVATE = "private"
# A deployment's helpers are called after it.
HELPERS = ("-gateway", "-watchdog")
RESERVED_NAMES = {"rehearsal-hub"}
# Plain names only: the path stands in scripts, unit files and sockets. Not the root, and no slash at the end.
STATE_DIRECTORY = r"^/[A-Za-z0-9._\-]+(/[A-Za-z0-9._\-]+)*$"
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.\-:]*[A-Za-z0-9])?$", max_length=253)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# What a process can be given: no NUL; an argument is not blank either.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Word = Annotated[str, Field(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")]
Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:@\-]+(,[A-Za-z0-9_.:@\-]+)*$", max_length=200)]


def _read_parallel(value: object) -> object:
    """Accept 'TP8xDP2+EP', as layouts are printed, beside the mapping."""
    if not isinstance(value, str) or value == "auto":
        return value
    match = PARALLEL_TEXT.match(value)
    if not match or not value:
        raise ValueError("expected auto, a text such as TP8xPP2xDP2+EP, or a mapping of tensor, pipeline, data, expert")
    sizes = {name: int(size) for name, size in match.groupdict().items() if size and name != "expert"}
    return {**sizes, "expert": match["expert"] is not None}


def _read_list(value: object) -> object:
    """Accept 'a,b' from a command line beside a list."""
    return [part for part in re.split(r"[,\s]+", value) if part] if isinstance(value, str) else value


def _read_list_of_rules(value: object) -> object:
    """Accept 'GET /a,POST /b' from a command line beside a list; a rule has a blank in it."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Deployment(Wish):
    """What is to be served, by which engine, and how.

    `revision` of the model's repository is a tag, a commit or a branch; none is the branch that it begins with.
    `context_length` in tokens (none: the model's own); `concurrency` is the number of full-length sequences that the
    KV cache should hold at once; `port` none takes the engine's own. `image` takes the place of the catalogue's, by
    tag, digest or both; `lock` that of the catalogue's lock, a file on the controller. `bind_address` private is the
    node's own address.
    """

    name: str = Field("default", pattern=r"^[a-z][a-z0-9\-]{0,40}$")
    model: str
    variant: str | None = None
    engine: str
    topology: str = "auto"
    parallel: Annotated[Parallel | Literal["auto"], BeforeValidator(_read_parallel)] = "auto"
    replicas: PositiveInt = 1
    features: Annotated[tuple[str, ...], BeforeValidator(_read_list)] = DEFAULT_FEATURES
    context_length: PositiveInt | None = None
    concurrency: PositiveInt = 1
    served_name: Annotated[str | None, Field(pattern=SERVED_NAME)] = None
    bind_address: Address | None = None
    port: int | None = Field(None, gt=0, lt=65536)
    engine_version: str | None = None
    install: Literal["auto", "venv", "container"] = "auto"
    image: Annotated[str | None, Field(pattern=IMAGE, max_length=400)] = None
    lock: Annotated[str | None, Field(pattern=r"^/[^\x00]+$", max_length=1000)] = None
    accept_unsafe_version: bool = False
    revision: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][\w.\-]{0,127}$")] = None
    weights_source: Literal["modelscope", "huggingface", "directory", "archive"] = "modelscope"
    weights_endpoint: Annotated[str | None, Field(pattern=r"^https?://[^\s/]+(/\S*)?$")] = None
    extra_arguments: tuple[Word, ...] = ()
    extra_environment: dict[VariableName, Text] = {}

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value in RESERVED_NAMES or value.endswith(HELPERS):
            raise ValueError(f"'{value}' is the name of a helper of the toolkit's own")
        return value

    @field_validator("extra_environment")
    @classmethod
    def _not_the_run_scripts_own(cls, value: dict[str, str]) -> dict[str, str]:
        if own := sorted(name for name in value if name.startswith("STEPLADDER_")):
            raise ValueError(f"{', '.join(own)}: the run scripts set what begins with STEPLADDER_ themselves")
        return value

    @field_validator("features")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))


class Node(Wish):
    """A machine as the inventory declares it.

    `address` is where its peers reach it, `client_address` where clients do, if not there too. `address_declared` says
    that the address was given for the peers and is more than the one that Ansible connects to; `interface_reason`
    tells why the interface was chosen, where nobody declared it. `driver` is the version of NVIDIA's
    driver or of ROCm, where it is declared.
    """

    name: str
    address: Address
    address_declared: bool = False
    client_address: Address | None = None
    gpu: str
    gpus: Annotated[int | None, Field(ge=1, le=128)] = None
    interface: Interface | None = None
    interface_reason: str | None = None
    driver: Annotated[str | None, Field(pattern=r"^\d+(\.\d+)*$")] = None

    @field_validator("address")
    @classmethod
    def _can_be_reached(cls, value: str) -> str:
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            return value
        if address.version != 4 or address.is_unspecified:
            raise ValueError("expected the IPv4 address or the name under which its peers reach the node")
        return value

    @property
    def on_loopback(self) -> bool:
        """Whether only the machine itself can reach the address."""
        try:
            return ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            return self.address == "localhost"


# What clients of the protocol need; everything else that an engine answers stays behind the gateway.
GATEWAY_PATHS = ("GET /v1/models", "POST /v1/chat/completions", "POST /v1/completions")
PathRule = Annotated[str, Field(pattern=r"^(GET|POST) /[A-Za-z0-9._~/\-]*$", max_length=200)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9\-]+$", max_length=60)]
PortNumber = Annotated[int, Field(gt=0, lt=65536)]


class GatewayHost(Wish):
    """A machine that the gateway runs on; `address` is where clients reach it."""

    name: str
    address: Address


class GatewayWish(Wish):
    """One endpoint in front of all replicas, on each of its hosts.

    `answer_seconds` is how long an engine may stay silent within an answer, and how long a reload lets streams run on;
    `affinity_header` names a header whose value decides the replica. `agent_port` is the loopback's alone. `open` says
    that whoever reaches it may ask without a key. The files lie on the controller; the plan knows only whether there
    are any.
    """

    hosts: tuple[GatewayHost, ...]
    bind_address: Address = EVERYWHERE
    port: PortNumber = 8080
    metrics_address: Address = "127.0.0.1"
    metrics_port: PortNumber = 8405
    agent_port: PortNumber = 8406
    paths: Annotated[tuple[PathRule, ...], BeforeValidator(_read_list_of_rules), Field(min_length=1)] = GATEWAY_PATHS
    max_body_bytes: PositiveInt = 33554432
    answer_seconds: PositiveInt = 3600
    stall_seconds: Annotated[int, Field(ge=30)] = 100
    affinity_header: HeaderName | None = None
    open: bool = False
    certificate_file: str | None = None
    private_key_file: str | None = None
    api_keys_file: str | None = None

    @field_validator("metrics_address")
    @classmethod
    def _private(cls, value: str) -> str:
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            return value
        if address.is_unspecified or address.is_global:
            raise ValueError("anyone may read the metrics there: expected a private address of the gateway's hosts")
        return value

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if bool(self.certificate_file) != bool(self.private_key_file):
            raise ValueError("gateway_certificate_file and gateway_private_key_file go together: set both or none")
        return self


class PlanRequest(Wish):
    """Everything a plan depends on; the same request and catalogue give the same plan to the byte."""

    deployment: Deployment
    nodes: tuple[Node, ...]
    gateway: GatewayWish | None = None
    state_directory: Annotated[str, Field(pattern=STATE_DIRECTORY, max_length=80)] = "/var/lib/stepladder"


def parse_request(data: Mapping[str, Any]) -> PlanRequest:
    """Read a request out of inventory variables.

    Raises:
        PlanRefusedError: with every variable that cannot be used, its value, and what was expected.
    """
    try:
        return PlanRequest.model_validate(data)
    except ValidationError as error:
        # Of the two readings of `parallel` only the one that was meant is worth reporting.
        problems = [problem for problem in error.errors() if problem["loc"][-1] != "literal['auto']"] or error.errors()
        raise PlanRefusedError([_as_violation(problem) for problem in problems]) from error


# How a value is written whose pattern says it to nobody.
FORMS = {
    "deployment_image": (
        "Write it as HOST:PORT/NAME:TAG without https://, with @sha256:DIGEST (64 hexadecimal digits) behind the tag "
        "or in its place; the host may be left out, tag and digest not both."
    )
}


def _as_violation(problem: Any) -> Violation:
    where = [str(part) for part in problem["loc"]]
    if where[:1] == ["gateway"]:
        name = "_".join(where[:2])
    elif where[:1] == ["deployment"]:
        name = "_".join(where[:2]) + "".join(f".{part}" for part in where[2:] if part not in PARALLEL_BRANCHES)
    else:
        name = ".".join(where)
    found = repr(problem["input"])
    found = found if len(found) <= LONGEST_SHOWN else f"{found[:LONGEST_SHOWN]}..."
    form = FORMS.get(name) if problem["type"] == "string_pattern_mismatch" else None
    return Violation(f"variable {name}", f"found {found}", form or f"{problem['msg']}.")
