"""A plan for people: nodes, ranks, commands that can be pasted into a shell, memory, notes."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.contents import image_bytes
from stepladder.engines.common import NETWORK_TOPIC
from stepladder.memory import GIGA
from stepladder.plan import Candidate, Gateway, MemoryTable, NodePlan, Note, Plan, Process
from stepladder.request import host_and_port
from stepladder.units import longest_stop

WIDTH = 110
BRANCHES = ("master", "main")  # of a revision that nobody chose


def human(plan: Plan) -> str:
    """The whole plan as text, the same to the byte for the same plan."""
    sections = [
        _head(plan),
        *(_node(plan, node) for node in plan.nodes),
        _gateway(plan.gateway),
        _memory(plan.memory),
        _candidates(plan.candidates),
    ]
    sections += [_notes("Warnings", plan.notes, "warning"), _notes("Notes", plan.notes, "note")]
    return "\n\n".join(section for section in sections if section) + "\n"


def shell(process: Process) -> str:
    """A process as a command for a shell, environment in front, one argument with its value a line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in sorted(process.env.items())]
    return " \\\n  ".join(["env", *lines, *_argument_lines(process.argv)])


def script(plan: Plan) -> str:
    """Every command of every node, in start order, as a commented text for a shell."""
    parts = [f"# {summary(plan)}"]
    for node in plan.nodes:
        parts.append(f"# On {node.name} ({node.address}), replica {node.replica}, rank {node.rank}")
        parts += [f"# {process.name}: {process.purpose}\n{shell(process)}" for process in node.processes]
    return "\n\n".join(parts) + "\n"


def markdown(plan: Plan) -> str:
    """The plan for a ticket or a wiki."""
    parts = [f"# Plan {plan.id}", "\n".join(["| | |", "|---|---|", *_markdown_rows(_head_rows(plan))])]
    for node in plan.nodes:
        parts.append(f"## {node.name} ({node.address}): replica {node.replica}, rank {node.rank}")
        for process in node.processes:
            parts += [f"{process.name}: {process.purpose}; ports {_ports(process)}", f"```sh\n{shell(process)}\n```"]
    if plan.gateway:
        parts += ["## Gateway", "\n".join(["| | |", "|---|---|", *_markdown_rows(gateway_rows(plan.gateway))])]
    parts += ["## Memory", f"```text\n{_memory(plan.memory)}\n```"]
    for title, kind in (("Warnings", "warning"), ("Notes", "note")):
        lines = [f"- **{note.topic}** {note.text}" for note in plan.notes if note.kind == kind]
        parts += [f"## {title}", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def summary(plan: Plan) -> str:
    """The plan in a line, and in another one how the nodes meet, once that is known."""
    chosen = plan.deployment
    where = ", ".join(node.name for node in plan.nodes)
    networks = [f"network: {note.text}" for note in plan.notes if note.topic == NETWORK_TOPIC]
    return "\n".join(
        [
            f"plan {plan.id}: {chosen.model_title} ({chosen.variant}) on {chosen.engine} {chosen.engine_version}, "
            f"{chosen.topology} {chosen.parallel}, {chosen.replicas} replica(s) on {where}",
            *networks,
        ]
    )


def client_example(plan: Plan) -> str:
    """How to use the deployment: a curl line, a Python snippet, and where to look."""
    base_url, model = plan.endpoints[0].base_url, plan.deployment.served_name
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    lines = [f"  {endpoint.base_url}   (replica {endpoint.replica}, {endpoint.node})" for endpoint in plan.endpoints]
    if plan.gateway:
        base_url = plan.gateway.nodes[0].base_url
        lines = [f"  {node.base_url}   (gateway, {node.name})" for node in plan.gateway.nodes]
    urls = "\n".join(lines)
    with_key = plan.gateway is not None and plan.gateway.keys
    header = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    key = "KEY" if with_key else "EMPTY"
    return f"""The endpoint is up:
{urls}

Ask it from a shell:
  curl -s {base_url}/chat/completions -H 'Content-Type: application/json'{header} \\
    -d {shlex.quote(body)}

Or from Python:
  from openai import OpenAI
  client = OpenAI(base_url="{base_url}", api_key="{key}")
  reply = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello"}}])
  print(reply.choices[0].message.content)
"""


def gigabytes(count: int) -> str:
    """Bytes in decimal GB, or MB where GB would read 0.0."""
    return f"{count / GIGA:,.1f} GB" if count >= GIGA / 10 else f"{count / 1e6:,.1f} MB"


def _markdown_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"| {label} | {text.replace('|', chr(92) + '|')} |" for label, text in rows]


def _head(plan: Plan) -> str:
    return "\n".join([f"Plan {plan.id}", *(f"  {label:<12} {text}" for label, text in _head_rows(plan))])


def _head_rows(plan: Plan) -> list[tuple[str, str]]:
    chosen = plan.deployment
    return [
        ("deployment", chosen.name),
        ("model", f"{chosen.model_title} ({chosen.variant}), {plan.nodes[0].weights.model_id}{_at_revision(plan)}"),
        ("engine", f"{chosen.engine} {chosen.engine_version} ({chosen.platform}, {chosen.install})"),
        ("layout", f"{chosen.topology}, {chosen.parallel}, {chosen.replicas} replica(s)"),
        ("features", ", ".join(chosen.features) or "none"),
        ("context", f"{chosen.context_length:,} tokens, KV cache for {chosen.concurrency} full-length sequence(s)"),
        ("endpoints", ", ".join(endpoint.base_url for endpoint in plan.endpoints)),
        ("to download", _downloads(plan)),
        ("a redeploy", _redeploy(plan)),
        ("verified", f"{plan.verification.level}: {plan.verification.explanation}"),
    ]


def _redeploy(plan: Plan) -> str:
    """What clients see of one."""
    if plan.deployment.replicas > 1:
        return (
            "one replica after the other (deploy_max_unavailable), the others answering, unless one gets another node, "
            "port or GPUs: -e plan_diff=true tells"
        )
    stop = longest_stop([process.model_dump() for node in plan.nodes for process in node.processes])
    start = plan.nodes[0].load_deadline_seconds
    text = f"stops the only replica: nothing answers until it is ready again, {stop + start:,} s at most"
    return f"{text} (stop {stop}, start {start:,})"


def _downloads(plan: Plan) -> str:
    node = plan.nodes[0]
    packages = (
        f"about {gigabytes(node.venv.download_bytes)} of packages" if node.venv else f"the image {node.images[0]}"
    )
    each = f"{gigabytes(node.weights.bytes)} of weights and {packages}"
    return f"{each} per node, {gigabytes(plan.bytes_from_hub)} from the hub in all"


def _node(plan: Plan, node: NodePlan) -> str:
    title = f"Node {node.name}: replica {node.replica}, rank {node.rank}"
    rows = [
        ("address", node.address + (f" on {node.interface}" if node.interface else "")),
        ("hardware", _hardware(plan, node)),
        ("environment", node.venv.path if node.venv else f"image {node.images[0]}"),
        ("weights", node.weights.path),
    ]
    lines = [title, *(f"  {label:<12} {text}" for label, text in rows)]
    for process in node.processes:
        lines += ["", f"  {process.name}: {process.purpose}; ports {_ports(process)}"]
        lines += [textwrap.indent(shell(process), "    ")]
    return "\n".join(lines)


def _gateway(gateway: Gateway | None) -> str:
    if gateway is None:
        return ""
    return "\n".join(["Gateway", *(f"  {label:<12} {text}" for label, text in gateway_rows(gateway))])


def gateway_rows(gateway: Gateway) -> list[tuple[str, str]]:
    """What the gateway is, in labelled lines."""
    affinity = f"sessions by {gateway.affinity_header}" if gateway.affinity_header else "the least busy replica"
    servers = (f"replica {server.replica} {host_and_port(server.address, server.port)}" for server in gateway.servers)
    secured = f"{'TLS' if gateway.tls else 'no TLS'}, {'API keys' if gateway.keys else 'no keys'}"
    return [
        ("endpoints", ", ".join(f"{node.base_url} ({node.name})" for node in gateway.nodes)),
        ("access", f"{secured}; {', '.join(gateway.paths)}"),
        ("in front of", f"{', '.join(servers)}; {affinity}"),
        ("limits", f"body {gigabytes(gateway.max_body_bytes)}, silence {gateway.answer_seconds} s"),
        ("metrics", f"http://{host_and_port(gateway.metrics_address, gateway.metrics_port)}/metrics"),
    ]


def _hardware(plan: Plan, node: NodePlan) -> str:
    kind = {"cuda": "driver", "rocm": "ROCm"}.get(plan.deployment.platform)
    floor = node.requirements.minimum_driver
    needs = f", needs {kind} {floor} or newer" if kind and floor else ""
    return f"{node.gpus} x {plan.memory.gpu}{needs}"


def _ports(process: Process) -> str:
    if not process.ports:
        return "none"
    groups: dict[tuple[str, str], list[int]] = {}
    for port in process.ports:
        groups.setdefault((port.purpose, port.scope), []).append(port.port)
    return "; ".join(f"{_ranges(numbers)} ({purpose}, for {scope})" for (purpose, scope), numbers in groups.items())


def _ranges(numbers: list[int]) -> str:
    """Port numbers with runs joined: 5000-5010."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _memory(memory: MemoryTable) -> str:
    title = f"Memory per GPU, {memory.gpu}"
    rows = [("weights", memory.weights, ""), ("runtime", memory.runtime, "activations, graphs, buffers: an estimate")]
    per_token = f"{memory.context_length:,} tokens x {memory.kv_bytes_per_token:,} B"
    per_token += f" + {gigabytes(memory.kv_bytes_per_sequence)}" if memory.kv_bytes_per_sequence else ""
    rows += [("KV cache", memory.kv_wanted, f"{memory.concurrency} sequence(s) of {per_token}")]
    rows += [("needed", memory.weights + memory.runtime + memory.kv_wanted, "")]
    if memory.limit is None or memory.margin is None:
        lines = _memory_lines(rows)
        return "\n".join(
            [
                title,
                *lines,
                "  limit                     the node's own memory, checked on the node before anything is done",
            ]
        )
    rows += [("limit", memory.limit, f"{memory.fraction:.0%} of {gigabytes(memory.gpu_bytes or 0)}")]
    rows += [("margin", memory.margin, f"room for {memory.full_sequences} full-length sequence(s) in all")]
    return "\n".join([title, *_memory_lines(rows)])


def _memory_lines(rows: list[tuple[str, int, str]]) -> list[str]:
    return [f"  {label:<10} {gigabytes(count):>10}   {remark}".rstrip() for label, count, remark in rows]


def _candidates(candidates: tuple[Candidate, ...]) -> str:
    """What `auto` weighed, in its order of preference; the first without anything against it was taken."""
    if not candidates:
        return ""
    lines = ["Layouts weighed (fewest GPUs first)"]
    for candidate in candidates:
        margin = "" if candidate.margin is None else f"margin {candidate.margin / GIGA:8.1f} GB"
        verdict = (
            "TAKEN" if candidate.chosen else f"against it: {candidate.against}" if candidate.against else "works too"
        )
        text = (
            f"  {candidate.layout:<12} {candidate.gpus:>3} GPUs  weights {candidate.weights / GIGA:6.1f} GB  {margin}  "
        )
        lines.append(text + verdict)
    return "\n".join(lines)


def _notes(title: str, notes: tuple[Note, ...], kind: str) -> str:
    lines = []
    for note in notes:
        if note.kind == kind:
            source = f" [{note.source}]" if note.source else ""
            text = f"{note.topic}: {note.text}{source}"
            lines.append(textwrap.fill(text, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    return "\n".join([title, *lines]) if lines else ""


def _argument_lines(argv: tuple[str, ...]) -> list[str]:
    """Words grouped so that a flag stands with its value: ['vllm serve /models/x', '--port 8000', ...]."""
    lines: list[str] = []
    for word in argv:
        if lines and not word.startswith("-"):
            lines[-1] += " " + shlex.quote(word)
        else:
            lines.append(shlex.quote(word))
    return lines


def _at_revision(plan: Plan) -> str:
    revision = plan.nodes[0].weights.revision
    return "" if revision in BRANCHES else f"@{revision}"


def removal(variables: Mapping[str, Any], hosts: Sequence[str], with_weights: bool, with_environments: bool) -> str:
    """What removing a deployment takes away from each node, for the question before it.

    Args:
        variables: by host; `remove_slice` and `release_used_elsewhere` are read.
        hosts: nodes concerned.
        with_weights: whether weights go, where nothing else uses them.
        with_environments: whether environments go, likewise.
    """
    lines = []
    for host in hosts:
        kept = variables[host].get("remove_slice")
        if not kept:
            continue
        node, used = kept["node"], variables[host].get("release_used_elsewhere", [])
        name = kept["deployment"]["name"]
        if variables[host].get("release_slice"):
            lines.append(f"{host}: deployment {name} will be stopped and removed with its logs")
        else:
            lines.append(f"{host}: deployment {name} has no release; what a deploy may have left of it will be removed")
        parts = [(node["weights"]["path"], node["weights"]["bytes"], with_weights)]
        environments = [node[name] for name in ("venv", "tools") if node.get(name)]
        parts += [(found["path"], found["installed_bytes"], with_environments) for found in environments]
        parts += [(image, image_bytes(kept), with_environments) for image in node.get("images", ())]
        for path, size, goes in parts:
            fate = "stays, another deployment uses it" if path in used else "will be removed" if goes else "stays"
            lines.append(f"  {path} (about {gigabytes(size)}) {fate}")
    return "\n".join(lines) or "Nothing is deployed."
