"""What `stepladder.core.preflight` found on every node, as one answer: which are fit, and all that is wrong, once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stepladder import runtime
from stepladder.units import planned_ports

FORMATS = ("human", "json", "failures")
# A clock that is off by more than this confuses logs; by more than the second, certificates and tokens.
CLOCK_WARNING_SECONDS, CLOCK_FAILURE_SECONDS = 2.0, 60.0
NODES_NAMED = 4


class Finding(BaseModel):
    """One thing that is wrong with a node, as the module tells it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: str
    check: str
    what: str
    found: str
    needed: str
    mend: str
    severity: Literal["failure", "warning"] = "failure"


class NodeFitness(BaseModel):
    """What a node answered; `problem` is why it did not."""

    model_config = ConfigDict(frozen=True)

    node: str
    problem: str = ""
    findings: tuple[Finding, ...] = ()
    facts: dict[str, Any] = {}

    @property
    def fit(self) -> bool:
        """Whether it answered and nothing makes it unfit."""
        return not self.problem and all(one.severity != "failure" for one in self.findings)


class Fitness(BaseModel):
    """The answer for all nodes.

    Args:
        nodes: in the order of the inventory.
        plan_id: of the plan that they were held against; none where there is none.
        plan_refused: why there is none.
    """

    model_config = ConfigDict(frozen=True)

    nodes: tuple[NodeFitness, ...]
    plan_id: str | None = None
    plan_refused: str | None = None

    @property
    def unfit(self) -> list[str]:
        """Nodes that answered and are not fit."""
        return [one.node for one in self.nodes if not one.fit and not one.problem]

    @property
    def unreachable(self) -> list[str]:
        """Nodes that did not answer."""
        return [one.node for one in self.nodes if one.problem]


def wishes(
    deployment_slice: Mapping[str, Any], state_directory: str, minimum_docker: str = "", minimum_toolkit: str = ""
) -> dict[str, Any]:
    """The parameters of `stepladder.core.preflight` for a node.

    Args:
        deployment_slice: the node's slice of the plan; an empty one asks for nothing.
        state_directory: where the toolkit keeps everything on a node.
        minimum_docker, minimum_toolkit: oldest Docker that is given GPUs, and oldest NVIDIA container toolkit; empty
            for the catalogue's.
    """
    if not deployment_slice:
        space = {"path": state_directory, "minimum_free_bytes": 0, "purpose": "everything of the toolkit"}
        return {"paths": [space]}
    node = deployment_slice["node"]
    oldest = runtime.floors(minimum_docker, minimum_toolkit)
    required = node["requirements"]
    result = {
        "deployment": f"{state_directory}/deployments/{deployment_slice['deployment']['name']}",
        "ports": planned_ports(node["processes"]),
        "paths": required["space"],
        "minimum_memory_bytes": required["minimum_memory_bytes"],
        "minimum_python": required["python"],
        "python": node["tools"]["python"],
        "cpu_flags_any": required["cpu_flags_any"],
        "libraries": required["libraries"],
        "minimum_shared_memory_bytes": required["minimum_shared_memory_bytes"],
        "architectures": required["architectures"],
        "interface": node["interface"] or "",
        "ranks": max(1, len(node["ranks"])),
        "environment": (node["venv"] or {}).get("path", ""),
        "images": node["images"],
        "minimum_docker": oldest["docker"],
        "minimum_toolkit": oldest["toolkit"],
    }
    return result | ({"gpus": required["gpus"]} if required["gpus"] else {})


def judge(
    results: Mapping[str, Mapping[str, Any] | None], plan: Mapping[str, Any] | None, refused: str, accept: Iterable[str]
) -> Fitness:
    """Put together what the nodes answered, and hold nodes against each other.

    Args:
        results: by node, what the module returned, with `problem` where it could not be asked.
        plan: the whole plan, none where there is none.
        refused: why there is none.
        accept: names of checks whose failures are only to be warnings.
    """
    replicas: dict[str, list[str]] = {}
    for node in (plan or {}).get("nodes", ()):
        replicas.setdefault(f"replica {node['replica']}", []).append(node["name"])
    facts = {node: dict((result or {}).get("facts") or {}) for node, result in results.items()}
    interfaces = {node["name"]: node.get("interface") for node in (plan or {}).get("nodes", ())}
    in_containers = ((plan or {}).get("deployment") or {}).get("install") == "container"
    between = list(_same_names(facts))
    for name, members in (replicas or {"the inventory": list(results)}).items():
        known = {node: facts[node] for node in members if facts.get(node)}
        between += unlike(known, interfaces, name, strict=bool(replicas), in_containers=in_containers)
    accepted = frozenset(accept)
    nodes = []
    for node, result in results.items():
        told = [Finding(node=node, **one) for one in (result or {}).get("findings") or ()]
        told += [*_clock(node, result or {}), *(one for one in between if one.node == node)]
        nodes.append(
            NodeFitness(
                node=node,
                problem="it was not asked" if result is None else result.get("problem") or "",
                findings=tuple(_accept(one, accepted) for one in told),
                facts=facts[node],
            )
        )
    plan_id = (plan or {}).get("id")
    return Fitness(nodes=tuple(nodes), plan_id=plan_id, plan_refused=refused or None)


def _accept(finding: Finding, accepted: frozenset[str]) -> Finding:
    if finding.severity == "warning" or finding.check not in accepted:
        return finding
    return finding.model_copy(update={"severity": "warning", "mend": f"accepted; else {finding.mend}"})


def _clock(node: str, result: Mapping[str, Any]) -> Iterator[Finding]:
    """The node's clock against this machine's; half the time that asking took is what is not known."""
    told = result.get("clock")
    if not told:
        return
    off = max(0.0, abs(told["offset"]) - told["error"])
    if off > CLOCK_WARNING_SECONDS:
        yield Finding(
            node=node,
            check="clock",
            what="clock",
            found=f"{off:.0f} s {'ahead of' if told['offset'] > 0 else 'behind'} this machine's",
            needed=f"within {CLOCK_WARNING_SECONDS:g} s",
            mend="set it (chronyc makestep, timedatectl), and let something keep it right",
            severity="failure" if off > CLOCK_FAILURE_SECONDS else "warning",
        )


def _same_names(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Two nodes with one name: logs, metrics and Ray's own view cannot tell them apart."""
    names: dict[str, list[str]] = {}
    for node, told in facts.items():
        if told.get("hostname"):
            names.setdefault(told["hostname"], []).append(node)
    for name, members in names.items():
        for node in members if len(members) > 1 else ():
            yield Finding(
                node=node,
                check="name",
                what=name,
                found=f"the name of {', '.join(members)} alike",
                needed="a name of its own",
                mend="hostnamectl set-hostname, another name on each",
                severity="warning",
            )


def traits(facts: Mapping[str, Any], interface: str | None, in_containers: bool) -> dict[str, tuple[str, bool]]:
    """What has to be alike in a replica: by name what the node has, and whether the replica breaks where it differs.

    Ray wants the same Python on all nodes. The engine's is its environment's, where there is none yet the node's own,
    of which it will be made; in a container it is the image's, and the node's own is only told.
    """
    drivers = sorted({gpu["driver"] for gpu in facts.get("gpus") or () if gpu.get("driver")})
    kinds = sorted({f"{gpu['name']}, {gpu['memory_mib']} MiB" for gpu in facts.get("gpus") or ()})
    nic = next((one for one in facts.get("nics") or () if one["name"] == interface), None) or _fastest(facts)
    installed = dict(facts.get("installed") or {})
    python = installed.pop("python", "") or (facts.get("python") or {}).get("version") or ""
    found = {
        "architecture": (facts.get("architecture") or "", True),
        "GPUs": (" and ".join(kinds), True),
        "driver": (", ".join(drivers) or facts.get("rocm_release") or "", False),
        "Python": (python, not in_containers),
        "kernel": (facts.get("kernel") or "", False),
        "system": (facts.get("os") or "", False),
        "NIC speed": (_speed(nic.get("speed_mbit")) if nic else "", False),
        "MTU": (str(nic["mtu"]) if nic else "", False),
    }
    found |= {name: (release, True) for name, release in installed.items()}
    found |= {f"image {name}": (digest, True) for name, digest in (facts.get("image_digests") or {}).items()}
    return {name: told for name, told in found.items() if told[0]}


def _fastest(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest interface that is up; one of hardware where there is any."""
    up = [one for one in facts.get("nics") or () if one["up"]]
    return max(up, key=lambda one: (not one["virtual"], one["speed_mbit"] or 0), default=None)


def _speed(mbit: int | None) -> str:
    return f"{mbit / 1000:g} Gbit/s" if mbit else ""


def unlike(
    facts: Mapping[str, Mapping[str, Any]],
    interfaces: Mapping[str, str | None],
    group: str,
    *,
    strict: bool,
    in_containers: bool,
) -> list[Finding]:
    """How nodes that belong together differ; a finding for each node and trait that is not what most have.

    Args:
        facts: by node.
        interfaces: by node, the network interface that the plan names.
        group: what they are together, for the message.
        strict: whether a difference can make them unfit.
        in_containers: whether the engine runs in containers, and so by the image's Python.
    """
    told = {node: traits(one, interfaces.get(node), in_containers) for node, one in facts.items()}
    found = []
    for trait in dict.fromkeys(name for one in told.values() for name in one):
        values = {node: one[trait] for node, one in told.items() if trait in one}
        by_value: dict[str, list[str]] = {}
        for node, (value, _) in values.items():
            by_value.setdefault(value, []).append(node)
        if len(by_value) < 2:
            continue
        usual = max(by_value, key=lambda value: len(by_value[value]))
        for value, members in by_value.items():
            found += [
                Finding(
                    node=node,
                    check="alike",
                    what=f"{trait} in {group}",
                    found=value,
                    needed=f"{usual}, as on {', '.join(by_value[usual][:NODES_NAMED])}",
                    mend="make the nodes of a replica alike, or let replicas be of nodes that are",
                    severity="failure" if strict and values[node][1] else "warning",
                )
                for node in members
                if value != usual
            ]
    return found


# ---- texts -----------------------------------------------------------------------------------------------------------


def to_json(fitness: Fitness) -> str:
    """The whole answer for programs, facts of every node among it."""
    return json.dumps(
        {
            "format_version": 1,
            "fit": not fitness.unfit and not fitness.unreachable,
            "unfit": fitness.unfit,
            "unreachable": fitness.unreachable,
            "plan": fitness.plan_id,
            "plan_refused": fitness.plan_refused,
            "nodes": [
                {
                    "node": one.node,
                    "fit": one.fit,
                    "answered": not one.problem,
                    "problem": one.problem or None,
                    "findings": [finding.model_dump(exclude={"node"}) for finding in one.findings],
                    "facts": one.facts,
                }
                for one in fitness.nodes
            ],
        },
        indent=1,
        sort_keys=True,
    )


def human(fitness: Fitness) -> str:
    """What the nodes are, then all that is wrong with them, then the verdict."""
    parts = [table([("NODE", "SYSTEM", "CPUS", "MEMORY", "GPUS", "NETWORK"), *map(_summary, fitness.nodes)])]
    if findings := findings_table(fitness, with_warnings=True):
        parts.append(findings)
    if fitness.plan_id is None:
        why = fitness.plan_refused or "the inventory sets no deployment_model"
        parts.append(f"Only what needs no plan was checked: {why}")
    return "\n\n".join([*parts, verdict(fitness)])


def verdict(fitness: Fitness) -> str:
    """How many nodes are fit, in a sentence or two."""
    count = len(fitness.nodes)
    all_findings = [one for node in fitness.nodes for one in node.findings]
    failures = sum(one.severity == "failure" for one in all_findings)
    told = f"{_many(failures, 'failure')}, {_many(len(all_findings) - failures, 'warning')}"
    sentences = [f"{count - len(fitness.unfit) - len(fitness.unreachable)} of {_many(count, 'node')} fit; {told}."]
    if fitness.unfit:
        sentences.append(f"Not fit: {', '.join(fitness.unfit)}.")
    if fitness.unreachable:
        sentences.append(f"No answer: {', '.join(fitness.unreachable)}.")
    return " ".join(sentences)


def failures_text(fitness: Fitness) -> str:
    """Only what keeps nodes from a deployment, for the message of one that stops."""
    return f"{verdict(fitness)}\n{findings_table(fitness, with_warnings=False)}"


def findings_table(fitness: Fitness, *, with_warnings: bool) -> str:
    """Findings as text: a row for each, with the nodes that share it, and under it what mends it."""
    rows: dict[tuple[str, str, str, str, str, str], list[str]] = {}
    for node in fitness.nodes:
        if node.problem:
            key = ("failure", "reach", "ssh", node.problem, "an answer", _mend_reach(node.problem))
            rows.setdefault(key, []).append(node.node)
        for one in node.findings:
            if with_warnings or one.severity == "failure":
                row = (one.severity, one.check, one.what, one.found, one.needed, one.mend)
                rows.setdefault(row, []).append(node.node)
    if not rows:
        return ""
    ordered = sorted(rows, key=lambda key: key[0] != "failure")
    cells = [("", "NODE", "CHECK", "WHAT", "NEEDED", "FOUND")]
    for key in ordered:
        severity, check, what, found, needed, _ = key
        mark = "FAIL" if severity == "failure" else "warn"
        cells.append((mark, _named(rows[key], len(fitness.nodes)), check, what, needed, found))
    heading, *lines = table(cells).splitlines()
    shown = [heading]
    for key, line in zip(ordered, lines, strict=True):
        shown += [line, f"      to mend: {key[5]}"]
    return "\n".join(shown)


def _mend_reach(problem: str) -> str:
    if "Host key verification failed" in problem or "Permission denied" in problem:
        return "let the verb bootstrap show and pin its host key, and put your key there"
    return "see that it is on, and that ssh reaches it as the inventory says (ssh -v)"


def _named(nodes: Sequence[str], total: int) -> str:
    if len(nodes) == total > NODES_NAMED:
        return f"all {total}"
    more = f" and {len(nodes) - NODES_NAMED} more" if len(nodes) > NODES_NAMED else ""
    return ", ".join(nodes[:NODES_NAMED]) + more


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _summary(node: NodeFitness) -> tuple[str, ...]:
    if node.problem:
        return (node.node, "no answer", "", "", "", "")
    facts = node.facts
    kinds: dict[str, int] = {}
    for gpu in facts.get("gpus") or ():
        driver = f", {gpu['driver']}" if gpu.get("driver") else ""
        kinds[f"{gpu['name']}{driver}"] = kinds.get(f"{gpu['name']}{driver}", 0) + 1
    nic = _fastest(facts)
    rdma = sum(port["state"] == "ACTIVE" for port in facts.get("rdma") or ())
    network = [f"{nic['name']} {_speed(nic['speed_mbit']) or 'speed not told'}"] if nic else []
    network += [f"{rdma} RDMA"] if rdma else []
    return (
        node.node,
        ", ".join(filter(None, (facts.get("os"), facts.get("kernel")))),
        str(facts.get("cpus") or ""),
        f"{facts.get('memory_total_bytes', 0) / 2**30:.0f} GiB",
        "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none seen",
        ", ".join(network) or "none up",
    )


def table(cells: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells in columns; the last column is as wide as it comes."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in cells
    )
