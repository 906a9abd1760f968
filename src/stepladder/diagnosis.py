"""The first layer of a deployment that fails, from what was gathered on its nodes; pure.

Layers stand in the order in which a deployment needs them, so the first that fails is the cause and what fails after it
its consequence. A line in a log counts only where something does not run: old errors of what runs well are no failure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from stepladder import signatures, status
from stepladder.catalogue import LAYERS, Signature

LAYER_TITLES = {
    "node": "the machine: reachable, memory, disks, ports",
    "driver": "GPUs and their driver",
    "container": "image or environment of the engine",
    "weights": "the model's files on the node",
    "network": "between the nodes of a replica",
    "rendezvous": "the ranks find each other",
    "load": "the engine starts and loads",
    "serve": "tokens come, and clients reach them",
}
DRIVER_TEXTS = ("gpus.txt", "gpus-amd.txt")
# By phase of a process, where no signature knows more: layer and cure.
PHASES = {
    "failed": ("load", "See the first errors in its log; `deploy` starts it again, `rollback` goes back."),
    "crash_looping": ("load", "See the first errors in its log; `rollback` goes back to the release before."),
    "stopped": ("load", "`deploy` starts it."),
    "absent": ("load", "`deploy` writes its unit again and starts it."),
    "starting": ("load", "Wait a moment, then look again with `status`."),
    "loading": ("load", "Wait, `status -e status_watch=true` shows it; `logs` says what it is at."),
    "unhealthy": (
        "serve",
        "It runs and gives no tokens: `redeploy -e redeploy_force=true` starts it again; `watchdog` does so by itself.",
    ),
}


class Finding(BaseModel):
    """Something that fails: in which layer, on which node, the line that shows it, and what mends it.

    `signature`: id in the catalogue, empty where none knew it. `place`: file in the archive and line.
    """

    model_config = ConfigDict(frozen=True)

    layer: str
    node: str
    title: str
    cure: str
    line: str = ""
    place: str = ""
    process: str = ""
    references: tuple[str, ...] = ()
    signature: str = ""
    known: str = ""


@dataclass(frozen=True)
class Node:
    """What is known of a node.

    Args:
        name: inventory name.
        problem: why it could not be looked at, empty where it could; `reached` whether it answered at all.
        rows: as `status.rows` gives them, for a node that is to run engines.
        missing: files that the current release needs and the node lacks.
        since: when that release became current, UTC; empty where it is not known.
        texts: lines by file name, as gathered on the node.
        gateway: as `stepladder.core.serving_state` tells it, and whether it is `left_behind`; none where it runs none.
        endpoints: that its current release names, of all replicas.
        at_work: the run that lives and holds its lease; empty where none does.
    """

    name: str
    reached: bool = True
    problem: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    missing: Sequence[str] = ()
    since: str = ""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gateway: Mapping[str, Any] | None = None
    endpoints: Sequence[Mapping[str, Any]] = ()
    at_work: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What fails, the first layer's first, and what was seen beside that and is no failure."""

    findings: tuple[Finding, ...]
    remarks: tuple[Finding, ...]
    rows: tuple[status.StatusRow, ...]
    deployed: bool

    @property
    def first(self) -> Finding | None:
        """The first that fails."""
        return self.findings[0] if self.findings else None


def diagnose(
    nodes: Sequence[Node], known: Sequence[Signature] | None = None, unasked: Collection[str] = ()
) -> Diagnosis:
    """Name what fails.

    Args:
        nodes: all that were asked.
        known: signatures to look for; unset takes the catalogue's.
        unasked: nodes for engines that --limit left out; what a gateway has is held against those of all of them only.
    """
    rows = status.seen([row for node in nodes for row in node.rows])
    unknown = [row for row in rows if row.phase == status.UNKNOWN]
    deployed = bool(unknown) or any(row.release for row in rows)
    untroubled = {*status.HEALTHY, status.UNUSED, status.UNKNOWN, "unreachable"}
    troubled = [row for row in rows if row.phase not in untroubled]
    failing = [*_silent(nodes), *(_unreadable(row) for row in unknown)]
    failing += [_left_behind(node) for node in nodes if node.gateway and node.gateway.get("left_behind")]
    fronts = [node for node in nodes if node.gateway and not node.gateway.get("left_behind")]
    if deployed:
        failing += [finding for node in nodes for finding in _missing(node, troubled)]
        failing += [finding for row in troubled for finding in _process(row, nodes, known)]
        live = {node.at_work for node in nodes if node.at_work}
        named = {row.replica for row in troubled}
        for node in fronts:
            # While a rollout lives the gateway comes last.
            astray = {} if live or unasked else _astray(node, nodes)
            failing += [_made_for_another(node, [*astray.values()])] if astray else []
            failing += _gateway(node, live, {*named, *astray})
    elif not unasked and all(node.reached and not node.problem for node in nodes):
        failing += [_nothing_behind(node) for node in fronts if not (node.gateway or {})["problem"]]
    machine = [finding for node in nodes for finding in _machine(node, known)]
    # What the machine says of itself is a cause only where something does not run.
    failing += [finding for finding, phases in machine if _counts(finding, phases, troubled)]
    counted = set(failing)
    remarks = [finding for finding, _ in machine if finding not in counted]
    ordered = sorted(dict.fromkeys(failing), key=lambda finding: LAYERS.index(finding.layer))
    return Diagnosis(tuple(ordered), tuple(dict.fromkeys(remarks)), tuple(rows), deployed)


def _silent(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        if not node.reached:
            cure = f"Look at its power and its network, and try `ssh {node.name}` as the inventory has it."
            yield Finding(layer="node", node=node.name, title="The node does not answer", line=node.problem, cure=cure)
        elif node.problem:
            cure = "What it says has to be mended on the node; then run `diagnose` again."
            title = "The node could not be looked at in full"
            yield Finding(layer="node", node=node.name, title=title, line=node.problem, cure=cure)


def _unreadable(row: status.StatusRow) -> Finding:
    """Of a node whose release cannot be read: what runs there is not known."""
    cure = "`deploy` writes the release again."
    return Finding(layer="node", node=row.node, title="The release cannot be read", line=row.detail, cure=cure)


def _missing(node: Node, troubled: Sequence[status.StatusRow]) -> Iterator[Finding]:
    """Environment or weights that are gone, of a node where something does not run."""
    for path in node.missing if any(row.node == node.name for row in troubled) else ():
        weights = path.endswith("manifest.json")
        title = "The weights are gone or not complete" if weights else "The environment is gone or not complete"
        cure = "`deploy` brings what is missing."
        layer = "weights" if weights else "container"
        yield Finding(layer=layer, node=node.name, title=title, line=f"{path} is not there", cure=cure)


def _process(row: status.StatusRow, nodes: Sequence[Node], known: Sequence[Signature] | None) -> list[Finding]:
    """Why a process is not ready: by its own log, else by those of the replica's other processes, else by its phase."""
    own = [node for node in nodes if node.name == row.node]
    others = [node for node in nodes if node.name in row.members and node.name != row.node]
    texts = [(node, f"logs/{row.process}.log") for node in own]
    texts += [(node, f"units/{row.process}.journal.txt") for node in own]
    beside = [
        (node, name)
        for node in [*own, *others]
        for name in node.texts
        if name.startswith("logs/") and name.endswith(".log") and (node, name) not in texts
    ]
    for group in (texts, beside if len(set(row.members)) > 1 else []):
        if found := [finding for node, name in group for finding in _in_text(node, name, row, known)]:
            return found
    layer, cure = PHASES.get(row.phase, ("load", "See its log (`logs`)."))
    if row.process.startswith("ray") and layer == "load":
        layer = "rendezvous"
    title = f"{row.process} is {row.phase}: {row.detail}"
    return [Finding(layer=layer, node=row.node, process=row.process, title=title, line=row.last_line or "", cure=cure)]


def _in_text(node: Node, name: str, row: status.StatusRow, known: Sequence[Signature] | None) -> list[Finding]:
    lines = list(node.texts.get(name, ()))
    if name.startswith("logs/"):
        # One that runs and hangs was not brought to it by what ended an earlier start.
        found = signatures.match_log(lines, known, node.since, back=row.phase != "unhealthy")
    else:
        found = signatures.match(lines, "journal", known)
    return [_finding(node, name, each, row.process) for each in found]


def _finding(node: Node, name: str, found: signatures.Match, process: str = "") -> Finding:
    signature = found.signature
    return Finding(
        layer=signature.layer, node=node.name, process=process, title=signature.title, cure=signature.cure.strip(),
        line=found.line, place=f"nodes/{node.name}/{name}:{found.number}", references=signature.references,
        signature=signature.id, known=signature.known,
    )  # fmt: skip


def _machine(node: Node, known: Sequence[Signature] | None) -> Iterator[tuple[Finding, tuple[str, ...]]]:
    """What the machine says of itself, each with the phases of a process that it explains; none explain any."""
    texts = node.texts
    try:
        now = json.loads("\n".join(texts.get("machine.json", ["{}"]))).get("local_time", "")
    except ValueError:
        now = ""
    for found in signatures.match_kernel(list(texts.get("kernel.txt", ())), now, known):
        yield _finding(node, "kernel.txt", found), found.signature.phases
    places = [*((name, "driver") for name in DRIVER_TEXTS), ("disks.txt", "disk"), ("network/peers.txt", "peers")]
    for name, where in (*places, ("docker.journal.txt", "journal")):
        for found in signatures.match(list(texts.get(name, ())), where, known):
            yield _finding(node, name, found), found.signature.phases


def _counts(finding: Finding, phases: Sequence[str], troubled: Sequence[status.StatusRow]) -> bool:
    """Whether something does not run that what a machine says explains."""
    here = [row for row in troubled if finding.node == row.node or finding.node in row.members]
    return any(not phases or row.phase in phases for row in here)


def _left_behind(node: Node) -> Finding:
    """Of a gateway on a node that was taken out of the group; it may serve on."""
    cure = "`gateway` removes it. Until then whoever asks it is let in with keys that nobody changes any more."
    title = "A gateway is left behind where the inventory has none any more"
    return Finding(layer="serve", node=node.name, title=title, line=_servers_text(node), cure=cure)


def _nothing_behind(node: Node) -> Finding:
    """Of a gateway that runs while no node has anything deployed."""
    cure = "`deploy` puts engines behind it; `remove` takes it away."
    title = "The gateway runs, and nothing is deployed behind it"
    return Finding(layer="serve", node=node.name, title=title, line=_servers_text(node), cure=cure)


def _servers_text(node: Node) -> str:
    gateway = node.gateway or {}
    return gateway["problem"] or ", ".join(
        f"replica {each['replica']} at {_place(each)}" for each in gateway["servers"]
    )


def _place(server: Mapping[str, Any]) -> str:
    return str(server.get("place") or "a place that it does not tell")


def _astray(node: Node, nodes: Sequence[Node]) -> dict[int, str]:
    """What a gateway has otherwise than the releases on the nodes, by replica; empty where it has all as they have."""
    servers = {each["replica"]: each for each in (node.gateway or {})["servers"]}
    own: dict[int, set[str]] = {}
    told: dict[int, set[str]] = {}
    for each in nodes:
        for point in each.endpoints:
            place = urlsplit(point["base_url"]).netloc
            told.setdefault(point["replica"], set()).add(place)
            if point["node"] == each.name:
                own.setdefault(point["replica"], set()).add(place)
    # A node knows best where it answers; of one that does not answer its peers do.
    right = {**told, **own}
    if not servers or not right:
        return {}
    found = {}
    for number, server in servers.items():
        if number not in right:
            found[number] = f"it has replica {number} at {_place(server)}, and no node has that replica"
        elif server.get("place") and server["place"] not in right[number]:
            answers = " or ".join(sorted(right[number]))
            found[number] = f"it has replica {number} at {server['place']}, and it answers at {answers}"
    # Where nodes have several releases, one of them may be left over from before.
    if len({row["release"] for each in nodes for row in each.rows if row["release"]}) == 1:
        for number in sorted(right.keys() - servers.keys()):
            found[number] = f"it does not know replica {number}, which answers at {' or '.join(sorted(right[number]))}"
    return found


def _made_for_another(node: Node, lines: Sequence[str]) -> Finding:
    cure = (
        "`gateway` gives it the replicas of the plan. Where the inventory says something else than what runs, as after "
        "a `rollback` with --limit, put there first what runs, or run `deploy`."
    )
    title = "The gateway was made for another release than the one that runs"
    return Finding(layer="serve", node=node.name, title=title, line="; ".join(lines), cure=cure)


def _gateway(node: Node, live: Collection[str], named: Collection[int | None]) -> Iterator[Finding]:
    """What keeps clients from the replicas, beside the engines themselves.

    Args:
        node: that runs a gateway, or none.
        live: the runs that are at work.
        named: replicas of which a process is told of already; that the gateway leaves those out follows from it.
    """
    if node.gateway is None:
        return
    gateway = status.judged(node.gateway, live)
    if gateway["problem"]:
        cure = "`gateway` starts it again; its log is in the archive."
        yield Finding(
            layer="serve", node=node.name, title="The gateway does not run", line=gateway["problem"], cure=cure
        )
    elif not any(server["in_rotation"] for server in gateway["servers"]):
        told = ", ".join(status.replica_text(server) for server in gateway["servers"])
        cure = (
            "`undrain -e replica=N` for those that a person took out; the others come back when their engine answers."
        )
        title = "The gateway has no replica to send requests to"
        yield Finding(layer="serve", node=node.name, title=title, line=told, cure=cure)
    else:
        for server in gateway["servers"]:
            if status.gets_nothing(server) and server["replica"] not in named:
                yield _unreached(node.name, server)
    if said := gateway.get("agent_problem"):
        cure = (
            "Without it a replica that hangs with a green health check stays in rotation. `gateway` starts it again; "
            "where its log says that its port is taken, end what has it, or set gateway_agent_port to another first."
        )
        title = "The gateway's agent does not answer"
        yield Finding(layer="serve", node=node.name, title=title, line=said, cure=cure)
    for server in gateway["servers"]:
        if server["left_out"]:
            title = "A rollout took a replica out of rotation, and ended before it put it back"
            line = status.replica_text(server)
            cure = "`deploy` finishes it, and puts it back."
            yield Finding(layer="serve", node=node.name, title=title, line=line, cure=cure)


def _unreached(host: str, server: Mapping[str, Any]) -> Finding:
    """Of a replica that the gateway on this host leaves out, though nothing is known against its engine."""
    place = server.get("place") or "ADDRESS:PORT"
    cure = (
        f"Ask it from {host}, `curl http://{place}/health`: where nothing answers, look at the firewall and the route "
        "between them, and at the address that the engine listens on. Where the agent says down it gives no tokens: "
        "`redeploy -e redeploy_force=true` starts it again."
    )
    title = "The gateway leaves out a replica that nobody drained"
    return Finding(layer="serve", node=host, title=title, line=status.replica_text(server), cure=cure)


def node_found(
    host: str,
    release: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    serving: Mapping[str, Any],
    expected: Mapping[str, bool],
) -> dict[str, Any]:
    """What a node that answers tells, for `diagnose`.

    Args:
        host: inventory name.
        release: `slice` that its current release keeps, empty where nothing is deployed, `known`, the releases
            that lie on it, and its `lease`, as `stepladder.core.deployments` tells them; `unreadable` has the file of
            the current one and why it cannot be read, or is empty.
        states: of its processes, as `stepladder.core.engine_state` returned them.
        serving: as `stepladder.core.serving_state` tells it.
        expected: whether it is to run `engines`, and the `gateway`.
    """
    current: Mapping[str, Any] = next((kept for kept in release["known"] if kept["current"]), {})
    front = serving.get("gateway")
    if front:
        front = {**front, "left_behind": not expected["gateway"]}
    elif expected["gateway"]:
        front = {"problem": "it was never installed here, or was removed", "servers": []}
    return {
        "reached": True,
        "problem": "",
        "rows": status.rows(host, release["slice"], states, release["unreadable"]) if expected["engines"] else [],
        "missing": list(current.get("missing", ())),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(current["since"])) if current.get("since") else "",
        "gateway": front,
        "endpoints": list(release["slice"].get("endpoints", ())),
        "at_work": status.run_at_work(release["lease"]),
    }


def peers(host: str, deployment: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Address and ports of the other nodes of a node's replica: ssh's and those of its processes.

    Any answer at one of them will do, a refusal too.
    """
    node = deployment.get("node", {})
    ports = [22, *(process["health"]["port"] for process in node.get("processes", ()) if process["health"].get("port"))]
    others = [rank for rank in node.get("ranks", ()) if rank["node"] != host]
    return {rank["node"]: {"address": rank["address"], "ports": list(dict.fromkeys(ports))} for rank in others}


# --- texts -----------------------------------------------------------------------------------------------------------


def text(found: Diagnosis, deployment: str, at: str) -> str:
    """The summary for a person.

    Args:
        found: what fails.
        deployment: its name.
        at: time of day, UTC.
    """
    first = found.first
    head = f"Diagnosis of {deployment}, {at}:"
    if first:
        lines = [f"{head} the first layer that fails is '{first.layer}' ({LAYER_TITLES[first.layer]})", *_told(first)]
    elif found.deployed:
        lines = [f"{head} no layer fails"]
    else:
        lines = [f"{head} nothing is deployed under this name. Run the verb 'deploy'."]
    if first:
        lines += ["", "Layer by layer:", *_layers(found)]
    if first and not found.deployed:
        lines += ["", "On the nodes that answer nothing is deployed under this name."]
    for title, several in (("It fails there too:", found.findings[1:]), ("Seen, no failure by itself:", found.remarks)):
        if several:
            lines += ["", title, *(f"  {each.layer}, {_where(each)}: {each.title}{_line(each)}" for each in several)]
    return "\n".join(lines)


def _told(finding: Finding) -> list[str]:
    line = f"{finding.place}: {finding.line}" if finding.place else finding.line
    known = {"reported": ", as reported there; not met here", "source": ", from the program's source"}
    rows = [
        ("where", _where(finding)),
        ("what", finding.title),
        ("line", line),
        ("cure", finding.cure),
        ("reference", ", ".join(finding.references) + known.get(finding.known, "") if finding.references else ""),
    ]
    return [f"  {name:<9}  {value}" for name, value in rows if value]


def _where(finding: Finding) -> str:
    return f"{finding.node} {finding.process}".strip()


def _line(finding: Finding) -> str:
    return f" ({finding.line[:200]})" if finding.line else ""


def _layers(found: Diagnosis) -> list[str]:
    """A line a layer: what comes after the first that fails is known only where it fails itself."""
    failing = {finding.layer: finding for finding in reversed(found.findings)}
    first = LAYERS.index(found.findings[0].layer)
    lines = []
    for position, layer in enumerate(LAYERS):
        if layer in failing:
            lines.append(f"  {layer:<10}  FAILS on {_where(failing[layer])}: {failing[layer].title}")
        elif position < first:
            lines.append(f"  {layer:<10}  nothing found")
    unknown = [layer for layer in LAYERS[first + 1 :] if layer not in failing]
    return [*lines, f"  not known while {LAYERS[first]} fails: {', '.join(unknown)}"] if unknown else lines


def document(found: Diagnosis, deployment: str, at: str) -> str:
    """The same for programs."""
    content = {
        "format_version": 1,
        "deployment": deployment,
        "at": at,
        "deployed": found.deployed,
        "first_failing_layer": found.first.layer if found.first else None,
        "findings": [finding.model_dump() for finding in found.findings],
        "remarks": [finding.model_dump() for finding in found.remarks],
        "processes": [row.model_dump(exclude={"members"}) for row in found.rows],
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
