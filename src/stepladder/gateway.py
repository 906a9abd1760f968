"""The gateway: what the plan says of it, and HAProxy's configuration made from that. Pure; nothing is reached."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from stepladder.engines.common import Replica
from stepladder.errors import PlanRefusedError, Violation
from stepladder.exit_status import ExitStatus
from stepladder.plan import ID_DIGITS, Gateway, GatewayNode, GatewayServer, NodePlan, Note
from stepladder.request import EVERYWHERE, GatewayHost, GatewayWish, host_and_port

# What says quickly that an engine takes requests. SGLang's /health generates a token, and waits in the queue for it.
CHECK_PATHS = {"sglang": "/ready", "vllm": "/health", "transformers": "/health"}
DEFAULT_CHECK_PATH = "/health"
BACKEND = "engines"
# The files beside the configuration, see `plugins/module_utils/gateway.py`.
KEYS_MAP, CERTIFICATE = "keys.map", "tls.pem"
# Filled in with the digest of all files, so that a running process says which configuration it has.
GENERATION = "@GENERATION@"
INITIAL_WEIGHT = 100
# A replica takes at most this share of the mean load before its sessions spill over to others.
AFFINITY_LOAD_PERCENT = 150
# A reload lets old processes run on for their streams; the new one takes as many connections again.
MAXIMUM_CONNECTIONS = 8192
MESSAGES = {
    401: ("invalid_request_error", "Give a valid API key: Authorization: Bearer KEY."),
    404: ("invalid_request_error", "The gateway does not serve this path and method."),
    411: ("invalid_request_error", "Give the length of the body (Content-Length)."),
    413: ("invalid_request_error", "The body is longer than the gateway takes."),
    502: ("server_error", "The engine broke off its answer."),
    503: ("server_error", "No replica takes requests now. Try again soon."),
    504: ("server_error", "The engine gave no answer in time."),
}


def plan_gateway(
    wish: GatewayWish, replicas: Sequence[Replica], nodes: Sequence[NodePlan], engine: str
) -> Gateway | None:
    """The gateway in front of the replicas; none where the inventory names no host for it.

    Raises:
        PlanRefusedError: an engine that a gateway's host cannot reach, ports that are taken there.
    """
    if not wish.hosts:
        return None
    tls = bool(wish.certificate_file)
    gateway = Gateway(
        nodes=tuple(GatewayNode(name=host.name, base_url=_base_url(wish, host, tls)) for host in wish.hosts),
        servers=tuple(
            GatewayServer(replica=replica.index, node=replica.head.name, address=replica.client_host, port=replica.port)
            for replica in replicas
        ),
        bind_address=wish.bind_address,
        port=wish.port,
        tls=tls,
        keys=bool(wish.api_keys_file),
        metrics_address=wish.metrics_address,
        metrics_port=wish.metrics_port,
        agent_port=wish.agent_port,
        paths=wish.paths,
        check_path=CHECK_PATHS.get(engine, DEFAULT_CHECK_PATH),
        max_body_bytes=wish.max_body_bytes,
        answer_seconds=wish.answer_seconds,
        stall_seconds=wish.stall_seconds,
        affinity_header=wish.affinity_header,
    )
    if broken := [*_open(gateway, wish), *_unreachable(gateway), *_taken(gateway, nodes)]:
        raise PlanRefusedError(broken)
    return gateway


def _base_url(wish: GatewayWish, host: GatewayHost, tls: bool) -> str:
    address = host.address if wish.bind_address == EVERYWHERE else wish.bind_address
    return f"{'https' if tls else 'http'}://{host_and_port(address, wish.port)}/v1"


def _open(gateway: Gateway, wish: GatewayWish) -> list[Violation]:
    """A door without a lock that nobody asked for."""
    if gateway.keys or wish.open or _is_loopback(gateway.bind_address):
        return []
    bound = host_and_port(gateway.bind_address, gateway.port)
    found = f"it would listen on {bound} and answer anyone, for it has no keys"
    mend = "Set gateway_api_keys_file, or gateway_open to true where whoever reaches it may ask."
    return [Violation("gateway", found, mend)]


def _unreachable(gateway: Gateway) -> list[Violation]:
    """Engines on a loopback that is not the gateway's own."""
    mend = "Set deployment_bind_address to private, or run the gateway on that node alone."
    return [
        Violation("gateway", f"{node.name} cannot reach replica {server.replica}: {found}", mend)
        for server in gateway.servers
        for node in gateway.nodes
        if node.name != server.node
        and _is_loopback(server.address)
        and (found := f"it answers on {server.address} of {server.node} alone")
    ]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _taken(gateway: Gateway, nodes: Sequence[NodePlan]) -> list[Violation]:
    """The gateway's ports among each other and against those of the engines on the same machine."""
    own = {"gateway_port": gateway.port, "gateway_metrics_port": gateway.metrics_port}
    own["gateway_agent_port"] = gateway.agent_port
    broken = []
    names = list(own)
    for position, name in enumerate(names):
        for other in names[:position]:
            if own[name] == own[other]:
                broken.append(Violation("ports", f"{other} and {name} are both {own[name]}", f"Set another {name}."))
    hosts = {node.name for node in gateway.nodes}
    for node in nodes:
        used = {port.port: process.name for process in node.processes for port in process.ports}
        broken += [
            Violation("ports", f"{name} is {number}, which {used[number]} has on {node.name}", f"Set another {name}.")
            for name, number in own.items()
            if node.name in hosts and number in used
        ]
    return broken


def gateway_notes(gateway: Gateway | None) -> list[Note]:
    """What its user should know: an open door first."""
    if gateway is None:
        return []
    notes = []
    if not gateway.keys:
        text = "gateway_api_keys_file is not set: the gateway answers anyone who reaches its port."
        notes.append(Note(kind="warning", topic="gateway without keys", text=text))
    elif not gateway.tls:
        text = "gateway_certificate_file is not set: keys and prompts cross the network as plain text."
        notes.append(Note(kind="warning", topic="gateway without TLS", text=text))
    return notes


def configuration(plan: Mapping[str, Any], deployment: str, directory: str, as_root: bool) -> str:
    """HAProxy's configuration (2.6 or newer) for a planned gateway; the same input gives the same text.

    Args:
        plan: the plan's `gateway`.
        deployment: its name.
        directory: the gateway's own on its host, with the admin socket and the kept state.
        as_root: whether HAProxy is started by root, and has to become a user of its own.
    """
    gateway = Gateway.model_validate(plan)
    parts = [
        _global(gateway, directory, as_root),
        _defaults(gateway),
        _clients(gateway),
        _metrics(gateway),
        _engines(gateway),
    ]
    head = f"# The gateway of {deployment}. Made by stepladder: change it with the verb 'gateway'."
    return "\n\n".join([head, *("\n    ".join(lines) for lines in parts)]) + "\n"


def _global(gateway: Gateway, directory: str, as_root: bool) -> list[str]:
    return [
        "global",
        f"description {GENERATION}",
        "default-path config",
        "log stdout format raw local0 info",
        f"maxconn {MAXIMUM_CONNECTIONS}",
        # Streams of before a reload run on for so long at most.
        f"hard-stop-after {gateway.answer_seconds}s",
        # What is out of rotation stays so over a reload and a crash.
        f"server-state-file {directory}/servers.state",
        *(["user haproxy", "group haproxy"] if as_root else []),
        "ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets",
    ]


def _defaults(gateway: Gateway) -> list[str]:
    errors = [
        f"http-error status {status} content-type application/json string {_error(status)}"
        + (' hdr Retry-After "5"' if status == 503 else "")
        for status in (502, 503, 504)
    ]
    return [
        "defaults",
        "mode http",
        "log global",
        "option dontlognull",
        # A refused connection is tried again, on another replica at last; nothing of the request was sent by then.
        "retries 3",
        "option redispatch 1",
        # Each token goes out when it comes.
        "option http-no-delay",
        # A client that went away ends its request, so that the engine does not work for nobody.
        "option abortonclose",
        "timeout connect 5s",
        "timeout http-request 30s",
        "timeout http-keep-alive 60s",
        # How long a client may take for the next bytes while it sends or reads.
        "timeout client 300s",
        "timeout client-fin 30s",
        "timeout queue 60s",
        "timeout check 5s",
        # Silence of the engine: an answer without streaming comes all at its end.
        f"timeout server {gateway.answer_seconds}s",
        "load-server-state-from-file global",
        *errors,
    ]


def _clients(gateway: Gateway) -> list[str]:
    tls = f" ssl crt {CERTIFICATE} alpn h2,http/1.1" if gateway.tls else ""
    key = "req.hdr(authorization),regsub('^[Bb]earer +',''),sha2(256),hex,lower"
    authenticate = [
        f"http-request set-var(txn.key) {key},map_str({KEYS_MAP})",
        f"http-request return {_refusal(401)} hdr WWW-Authenticate Bearer unless {{ var(txn.key) -m found }}",
    ]
    rules = [rule.split(" ", 1) for rule in gateway.paths]
    allowed = [f"acl allowed_{method.lower()} path -m str {path}" for method, path in rules]
    methods = sorted({method for method, _ in rules})
    passes = " || ".join(f"METH_{method} allowed_{method.lower()}" for method in methods)
    return [
        "frontend clients",
        f"bind {host_and_port(gateway.bind_address, gateway.port)}{tls}",
        # Who asked (the key's name), what, from which replica, how long; neither keys nor what stands behind a '?'.
        'log-format "%ci [%tr] %[var(txn.key)] %HM %HPO %ST %B B %s %TR/%Tw/%Tc/%Tr/%Ta ms %tsc %fc/%bc/%sc %ID"',
        "unique-id-format %[uuid()]",
        "unique-id-header x-request-id",
        # For a balancer in front: whether this gateway has a replica to give.
        "monitor-uri /health",
        f"monitor fail if {{ nbsrv({BACKEND}) lt 1 }}",
        *(authenticate if gateway.keys else []),
        *allowed,
        f"http-request return {_refusal(404)} unless {passes}",
        f"http-request return {_refusal(411)} if METH_POST !{{ req.hdr(content-length) -m found }}",
        f"http-request return {_refusal(413)} if {{ req.body_size gt {gateway.max_body_bytes} }}",
        # The engines ask for no key, and their logs are to hold none.
        "http-request del-header authorization",
        "http-request del-header x-request-id",
        f"default_backend {BACKEND}",
    ]


def _metrics(gateway: Gateway) -> list[str]:
    return [
        "frontend metrics",
        f"bind {host_and_port(gateway.metrics_address, gateway.metrics_port)}",
        "no log",
        "http-request use-service prometheus-exporter if { path /metrics }",
        "http-request return status 404",
    ]


def _engines(gateway: Gateway) -> list[str]:
    balance = ["balance leastconn"]
    if gateway.affinity_header:
        balance = [f"balance hdr({gateway.affinity_header})", "hash-type consistent"]
        balance += [f"hash-balance-factor {AFFINITY_LOAD_PERCENT}"]
    servers = []
    for server in gateway.servers:
        name = server_name(server.replica)
        servers.append(f'server {name} {host_and_port(server.address, server.port)} agent-send "{server.replica}\\n"')
    agent = f"agent-check agent-addr 127.0.0.1 agent-port {gateway.agent_port} agent-inter 2s"
    return [
        f"backend {BACKEND}",
        *balance,
        # Whether it takes requests; whether tokens come is the agent's matter, which knows busy from hung.
        f"option httpchk GET {gateway.check_path}",
        # While replicas change from an engine to another the path is unknown to some of them, which take requests.
        "http-check expect rstatus ^(200|404)$",
        f"default-server check inter 2s fastinter 500ms fall 3 rise 2 weight {INITIAL_WEIGHT} {agent}",
        *servers,
    ]


def gateway_text(plan: Mapping[str, Any], host: str, taking_requests: int) -> str:
    """What stands where, once it does."""
    gateway = Gateway.model_validate(plan)
    url = next(node.base_url for node in gateway.nodes if node.name == host)
    return f"The gateway is up: {url} ({host}), {taking_requests} of {len(gateway.servers)} replica(s) get requests"


def apart(seen: Mapping[str, Any], kept: Mapping[str, Any]) -> str:
    """Where gateways have other replicas, or other places of them, than a release; empty where none has.

    A gateway that does not say what it has is left to the verb 'status'.

    Args:
        seen: `results` of `stepladder.core.serving_state`, one for each `item`, a host.
        kept: a slice of the release.
    """
    wanted = {point["replica"]: urlsplit(point["base_url"]).netloc for point in kept["endpoints"]}
    lines = []
    for one in seen.get("results", ()):
        host, servers = one["item"], (one.get("gateway") or {}).get("servers") or ()
        has = {server["replica"]: server["place"] for server in servers}
        for number in sorted({*wanted, *has} if has else ()):
            if number not in wanted:
                lines.append(f"  {host}: it still has replica {number}, which the release has not")
            elif number not in has:
                lines.append(f"  {host}: it does not know replica {number}, which answers at {wanted[number]}")
            elif has[number] != wanted[number]:
                lines.append(f"  {host}: it has replica {number} at {has[number]}, and it answers at {wanted[number]}")
    if not lines:
        return ""
    head = f"Release {kept['plan_id']} runs and answers, but the gateway was made for another one:"
    mend = (
        "Put into the inventory what this release has, and run 'deploy', which starts nothing that runs so already, or "
        "'gateway' where the nodes are frozen. Until then clients get 503 where no replica is at its place."
    )
    return "\n".join([head, *lines, mend])


def drain_warning(plan: Mapping[str, Any], drain_seconds: int) -> str:
    """That a rollout may stop at a request that the gateway allows; empty where it does not.

    Args:
        plan: the plan as a document.
        drain_seconds: how long a rollout waits for the requests of a replica.
    """
    allowed = plan["gateway"]["answer_seconds"] if plan.get("gateway") else 0
    if plan["deployment"]["replicas"] == 1 or drain_seconds >= allowed:
        return ""
    return (
        f"Warning: an answer may be silent for {allowed} s (gateway_answer_seconds), and a deploy waits "
        f"{drain_seconds} s for those of a replica (deploy_drain_seconds): one that takes longer stops it before that "
        f"replica, with exit status {ExitStatus.NOT_DRAINED:d}. To wait as long: -e deploy_drain_seconds={allowed}"
    )


def server_name(replica: int) -> str:
    """What a replica is called in HAProxy."""
    return f"replica-{replica}"


def _refusal(status: int) -> str:
    return f"status {status} content-type application/json string {_error(status)}"


def _error(status: int) -> str:
    """An error in OpenAI's shape, quoted for HAProxy."""
    kind, message = MESSAGES[status]
    return f"'{json.dumps({'error': {'message': message, 'type': kind, 'code': status}})}'"


def agent_settings(plan: Mapping[str, Any], served_name: str) -> str:
    """What the agent watches, as its configuration file."""
    gateway = Gateway.model_validate(plan)
    engines = [
        {"replica": server.replica, "host": server.address, "port": server.port, "model": served_name}
        for server in gateway.servers
    ]
    settings = {"port": gateway.agent_port, "stall_seconds": gateway.stall_seconds, "engines": engines}
    return json.dumps(settings, indent=1, sort_keys=True) + "\n"


def gateway_slice(
    plan: Mapping[str, Any], deployment: str, directory: str, program: str, agent: Mapping[str, Any]
) -> dict[str, Any]:
    """The gateway's processes on its host, in the shape of a slice, so that the verbs for deployments work on it too.

    Args:
        plan: the plan's `gateway`.
        deployment: its name.
        directory: the gateway's own on its host.
        program: where HAProxy is.
        agent: its command as `argv`, and `digest`, which changes with what it runs or reads.
    """
    gateway = Gateway.model_validate(plan)
    host = "127.0.0.1" if gateway.bind_address == EVERYWHERE else gateway.bind_address
    haproxy = [program, "-W", "-S", f"{directory}/master.sock,mode,600", "-f", f"{directory}/current/haproxy.cfg"]
    processes = [
        _process("agent", agent["argv"], {"AGENT_DIGEST": agent["digest"]}, "127.0.0.1", gateway.agent_port),
        _process("haproxy", haproxy, {}, host, gateway.port),
    ]
    text = json.dumps([processes, plan], sort_keys=True)
    return {
        "plan_id": hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS],
        "deployment": {"name": f"{deployment}-gateway"},
        "endpoints": [],
        "node": {"processes": processes},
        "gateway": gateway.model_dump(mode="json"),
    }


def in_front_of(kept: Mapping[str, Any], release: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan the role is told to have a gateway as it is, with the replicas of a release.

    Args:
        kept: the gateway's own slice, as `gateway_slice` made it.
        release: a slice of the release.

    Raises:
        PlanRefusedError: the gateway's host does not reach a replica, or keeps no plan of the gateway.
    """
    if "gateway" not in kept:
        found = "it was made by a version that did not keep its plan"
        raise PlanRefusedError([Violation("gateway", found, "Run 'gateway'.")])
    servers = []
    for point in release["endpoints"]:
        # As it is written: `hostname` of it would be in lower case, and another name for those who compare.
        address, _, port = urlsplit(point["base_url"]).netloc.rpartition(":")
        place = {"address": address.strip("[]"), "port": int(port)}
        servers.append(GatewayServer.model_validate({"replica": point["replica"], "node": point["node"], **place}))
    check_path = CHECK_PATHS.get(release["deployment"]["engine"], DEFAULT_CHECK_PATH)
    gateway = Gateway.model_validate({**kept["gateway"], "servers": servers, "check_path": check_path})
    if broken := _unreachable(gateway):
        raise PlanRefusedError(broken)
    return {
        "gateway": gateway.model_dump(mode="json"),
        "deployment": release["deployment"],
        "nodes": [release["node"]],
    }


def _process(name: str, argv: Sequence[str], env: Mapping[str, str], host: str, port: int) -> dict[str, Any]:
    health = {"kind": "tcp", "host": host, "port": port, "path": ""}
    return {"name": name, "argv": [*argv], "env": {**env}, "stop_seconds": 10, "health": health}
