"""In which order the replicas of a deployment are changed, so that the others answer meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepladder.engines.common import visible_gpu_indices
from stepladder.units import longest_stop


@dataclass
class _Replica:
    """A replica on the nodes that change.

    parts: by node the names of its processes. gpus: by node those that it takes. url: where it answers. ports: those
    that are asked, with their nodes. states: of its processes, held against what is wanted. earlier: by node the states
    of what an earlier release runs of it under another name, as after a change of the engine.
    """

    number: int
    parts: dict[str, list[str]] = field(default_factory=dict)
    gpus: dict[str, tuple[int, ...]] = field(default_factory=dict)
    url: str | None = None
    ports: set[tuple[str, int | None]] = field(default_factory=set)
    states: list[Mapping[str, Any]] = field(default_factory=list)
    earlier: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def answers(self) -> bool:
        return _all_ready(self.states) or self.answers_as_before

    @property
    def answers_as_before(self) -> bool:
        """Whether an earlier release's engine does; Ray alone answers nobody."""
        programs: dict[str, list[Mapping[str, Any]]] = {}
        for state in (state for states in self.earlier.values() for state in states):
            programs.setdefault(state["name"].rpartition("-")[0], []).append(state)
        return any(_all_ready(states) for program, states in programs.items() if program != "ray")

    @property
    def outdated(self) -> bool:
        return any(state["outdated"] for state in self.states) or not _all_ready(self.states)

    def see(self, host: str, state: Mapping[str, Any]) -> None:
        """Take in the state of a process; one on a node that the replica leaves is nothing of its future."""
        if state["name"] in self.parts.get(host, ()):
            self.states.append(state)
        elif host in self.parts:
            self.earlier.setdefault(host, []).append(state)


def _all_ready(states: Sequence[Mapping[str, Any]]) -> bool:
    return bool(states) and all(state["running"] and state["phase"] == "ready" for state in states)


def replica_of(process: str) -> int:
    """The number of the replica that a process belongs to, as the planner names processes (`vllm-0`)."""
    return int(process.rpartition("-")[2])


def rollout(variables: Mapping[str, Any], hosts: Sequence[str], max_unavailable: Any, again: bool) -> dict[str, Any]:
    """The waves in which replicas are changed: first those that do not answer, then the others a few at a time.

    Args:
        variables: of every host; `deployment_slice` is what is wanted, `release_before` the slice that was current,
            `service_states` what runs, of what earlier releases named otherwise too. `release_seen` of nodes that do
            not change says how they were found, where this run looked at them. `release_ready` says that the node came
            so far; `release_suspect` are the replicas of a wave that did not come to its end, whatever they say of
            themselves.
        hosts: the nodes that change.
        max_unavailable: how many replicas that answer may be out at the same time.
        again: whether what runs as wanted is started anew, too.

    Returns:
        `waves`, see `_wave`; none where a node is not ready. `text` for the operator. `outage`, whether nothing that
        was looked at answers meanwhile though something does now; `others`, whether replicas answer all the time;
        `not_seen`, the replicas that nobody looked at.

    Raises:
        ValueError: `max_unavailable` is no number of replicas.
    """
    most = _number(max_unavailable)
    if not all(variables[host].get("release_ready") for host in hosts):
        return {"waves": [], "text": "", "outage": False, "others": False, "not_seen": []}
    slices = {host: variables[host]["deployment_slice"] for host in hosts}
    kept = slices[hosts[0]]
    wanted = _replicas(slices)
    before = _replicas({host: variables[host].get("release_before") or {} for host in hosts})
    before |= _left_over(variables, hosts, {*wanted, *before})
    for host in hosts:
        for state in variables[host]["service_states"]:
            if each := wanted.get(replica_of(state["name"])) or before.get(replica_of(state["name"])):
                each.see(host, state)
    gone = [before[number] for number in sorted(before.keys() - wanted.keys())]
    count = int(kept["deployment"]["replicas"])
    suspect = {number for host in hosts for number in variables[host].get("release_suspect") or ()}
    broken = [each for each in wanted.values() if not each.answers or each.number in suspect]
    right = [each for each in wanted.values() if not each.outdated and not again and each not in broken]
    rest = [each for each in wanted.values() if each not in broken and each not in right]
    elsewhere = {point["replica"]: point["node"] for point in kept["endpoints"] if point["replica"] not in wanted}
    standing = [number for number, host in elsewhere.items() if _found_well(variables, host)]
    not_seen = sorted(elsewhere.keys() - {*standing})
    # What goes answers until the last wave.
    going = [each for each in gone if each.answers]
    why = _why_at_once(before, wanted, bool(rest) or not going, count + len(going), most)
    waves = []
    if why:
        waves = [_wave([*wanted.values()], [], [], kept)]
    else:
        if broken or right:
            drained = [each.number for each in broken] if count + len(going) > len(broken) else []
            waves.append(_wave(broken + right, drained, [], kept))
        for start in range(0, len(rest), most):
            batch = [each.number for each in rest[start : start + most]]
            waves.append(_wave(rest[start : start + most], batch, batch, kept))
        if gone:
            waves.append(_last_wave(gone, wanted))
    _complete(waves, variables, wanted, bool(why), again)
    if not why and rest and not (standing or right or broken or going) and len(rest) <= most:
        why = "no other one was looked at"
    outage = bool(why and rest and not standing)
    if why:
        text = _text_at_once(slices.values(), waves[0]["replicas"], why, outage, bool(not_seen))
    else:
        text = _text_in_order(waves, broken)
    text += f" Not looked at: {_named(not_seen)}." if not_seen else ""
    others = bool(standing or (not why and (rest or right)))
    text = text if rest or (gone and not why) else ""
    return {"waves": waves, "text": text, "outage": outage, "others": others, "not_seen": not_seen}


def foretold(variables: Mapping[str, Any], hosts: Sequence[str], max_unavailable: Any) -> str:
    """How replicas will be changed, as far as it can be said without a look at what answers; empty where none is.

    Args:
        variables: of every host; `deployment_slice` is what is wanted, `release_slice` what is current, empty where
            nothing is.
        hosts: the nodes of the plan.
        max_unavailable: how many replicas that answer may be out at the same time.

    Raises:
        ValueError: `max_unavailable` is no number of replicas.
    """
    most = _number(max_unavailable)
    slices = {host: variables[host]["deployment_slice"] for host in hosts}
    current = {host: variables[host].get("release_slice") or {} for host in hosts}
    before, wanted = _replicas(current), _replicas(slices)
    if not before or all(current[host].get("plan_id") == slices[host]["plan_id"] for host in hosts):
        return ""
    count = int(slices[hosts[0]]["deployment"]["replicas"])
    why = _why_at_once(before, wanted, True, count + len(before.keys() - wanted.keys()), most)
    if why:
        return _text_at_once(slices.values(), [*wanted], why, outage=True, unsure=False)
    return "One replica after the other, while those that answer now go on."


def _complete(
    waves: Sequence[dict[str, Any]],
    variables: Mapping[str, Any],
    wanted: Mapping[int, _Replica],
    at_once: bool,
    again: bool,
) -> None:
    """Number the waves, and tell each node of one what it stops and starts there."""
    for number, wave in enumerate(waves):
        later = {host for each in waves[number + 1 :] for host in each["nodes"]}
        wave |= {"number": number, "at_once": at_once}
        for host, part in wave["nodes"].items():
            part["forget"] = host not in later
            earlier = [state for number in wave["replicas"] for state in wanted[number].earlier.get(host, ())]
            part["ends"] = [s["name"] for s in earlier if s["running"] or s["phase"] == "crash_looping"]
            part["again"] = _again(
                variables[host]["service_states"], part["processes"], again and bool(wave["replicas"])
            )


def _found_well(variables: Mapping[str, Any], host: str) -> bool:
    """Whether this run looked at a node that does not change, and found it as wanted, its engine giving tokens."""
    seen = (variables[host].get("release_seen") if host in variables else None) or {}
    return seen.get("reasons") == []


def leaving(
    variables: Mapping[str, Any], hosts: Sequence[str], changing: Sequence[str], host: str, replicas: int
) -> list[int]:
    """Numbers of the replicas whose requests are waited for before a node stops what it has no part in any more.

    Those that end, and those that move to other nodes now, but where no replica is left to answer meanwhile. One that
    answers elsewhere already has nothing to do with what a node that was lost still runs.

    Args:
        variables: of every host; `release_slice` is what is current there, empty where nothing is, and
            `deployment_slice` what is wanted.
        hosts: the nodes without a part in the plan.
        changing: the nodes with one that change.
        host: the one that asks.
        replicas: how many the deployment will have.
    """
    current = {name: _numbers(variables[name].get("release_slice")) for name in hosts}
    moving = {number for name in changing for number in _numbers(variables[name].get("deployment_slice"))}
    untouched = {*range(replicas)} - {number for numbers in current.values() for number in numbers}
    return sorted(number for number in current[host] if number >= replicas or (untouched and number in moving))


def goes_last(variables: Mapping[str, Any], host: str, changing: Sequence[str], replicas: int) -> bool:
    """Whether a node without a part in the plan is stopped after all waves: what it runs ends and is in nobody's way.

    One whose replica moves, or has another node that changes, is stopped before: a replica runs once, and a rank that
    was left over could join the new ranks (Ray's nodes look for their head for ever).

    Args:
        variables: of every host; `release_slice` is what is current there, empty where nothing is.
        host: the node.
        changing: the nodes with a part in the plan that change.
        replicas: how many the deployment will have.
    """
    kept = variables[host].get("release_slice") or {}
    mates = {rank["node"] for rank in kept.get("node", {}).get("ranks") or ()}
    return all(number >= replicas for number in _numbers(kept)) and not mates & {*changing}


def _numbers(kept: Mapping[str, Any] | None) -> set[int]:
    """Of the replicas that a slice has processes of."""
    return {replica_of(process["name"]) for process in (kept or {}).get("node", {}).get("processes", ())}


def refusal(max_unavailable: Any) -> str:
    """Why a value is no number of replicas that may be out at the same time; empty where it is one."""
    try:
        _number(max_unavailable)
    except ValueError as error:
        return str(error)
    return ""


def _number(value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"deploy_max_unavailable is {value!r}: give a number of replicas, 1 or more")
    return number


def _replicas(slices: Mapping[str, Mapping[str, Any]]) -> dict[int, _Replica]:
    """The replicas that have processes on some nodes, by number."""
    found: dict[int, _Replica] = {}
    for host, kept in slices.items():
        urls = {endpoint["replica"]: endpoint["base_url"] for endpoint in kept.get("endpoints", ())}
        for process in kept.get("node", {}).get("processes", ()):
            number = replica_of(process["name"])
            each = found.setdefault(number, _Replica(number))
            each.parts.setdefault(host, []).append(process["name"])
            each.gpus[host] = tuple(sorted({*each.gpus.get(host, ()), *(visible_gpu_indices(process["env"]) or ())}))
            each.ports.add((host, process["health"]["port"]))
            each.url = urls.get(number)
    return dict(sorted(found.items()))


def _left_over(variables: Mapping[str, Any], hosts: Sequence[str], known: set[int]) -> dict[int, _Replica]:
    """What a run that was broken off had still to stop, after it had made the new release current."""
    found: dict[int, _Replica] = {}
    for host in hosts:
        for state in variables[host]["service_states"]:
            number = replica_of(state["name"])
            if state["running"] and number not in known:
                found.setdefault(number, _Replica(number)).parts.setdefault(host, []).append(state["name"])
    return found


def _why_at_once(
    before: Mapping[int, _Replica], wanted: Mapping[int, _Replica], changes: bool, count: int, most: int
) -> str:
    """Why replicas cannot be changed one after the other; empty where they can.

    Args:
        before: the replicas that are current, by number.
        wanted: those that are to be.
        changes: whether any that answers is to change; otherwise some only go.
        count: how many there are, with those that go.
        most: how many that answer may be out at the same time.
    """
    if moved := _moved(before, wanted):
        return f"{_named(moved)} will have another node, port or GPUs"
    if not changes:
        return ""
    if count == 1:
        return "there is no other one"
    return f"deploy_max_unavailable is {most}" if most >= count else ""


def _moved(before: Mapping[int, _Replica], wanted: Mapping[int, _Replica]) -> list[int]:
    """The replicas that change their place, or need a port that another one still has."""
    held = {spot: number for number, each in before.items() for spot in each.ports}
    return [
        number
        for number, each in wanted.items()
        if (old := before.get(number))
        and ((old.gpus, old.url) != (each.gpus, each.url) or any(held.get(p, number) != number for p in each.ports))
    ]


def _wave(
    replicas: Sequence[_Replica], drain: Sequence[int], patient: Sequence[int], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """One wave.

    Returns:
        `replicas` by number; `drain`, those to be taken out of rotation before, `patient`, those of them whose requests
        are waited for; `nodes`, by name the `processes` to look after; `first`, the node that does what is done once;
        `endpoints`, those to be asked.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for each in sorted(replicas, key=lambda one: one.number):
        for host, names in each.parts.items():
            nodes.setdefault(host, {"processes": []})["processes"].extend(names)
    numbers = sorted(each.number for each in replicas)
    return {
        "replicas": numbers,
        "drain": [*drain],
        "patient": [*patient],
        "nodes": nodes,
        "first": next(iter(nodes)),
        "endpoints": [endpoint for endpoint in kept["endpoints"] if endpoint["replica"] in numbers],
    }


def _last_wave(gone: Sequence[_Replica], wanted: Mapping[int, _Replica]) -> dict[str, Any]:
    """The wave that stops what the slices do not have any more: its nodes forget it, and start nothing."""
    numbers = [each.number for each in gone]
    hosts = {host for each in gone for host in each.parts}
    nodes = {
        host: {"processes": [name for each in wanted.values() for name in each.parts.get(host, ())]} for host in hosts
    }
    first = sorted(hosts)[0]
    return {"replicas": [], "drain": numbers, "patient": numbers, "nodes": nodes, "first": first, "endpoints": []}


def _again(states: Sequence[Mapping[str, Any]], processes: Sequence[str], every: bool) -> list[str]:
    """Which of the processes are started again whatever they run: all of them, or those that run and do not serve."""
    return [
        state["name"] for state in states if state["name"] in processes and (every or state["phase"] == "unhealthy")
    ]


def _text_at_once(
    slices: Iterable[Mapping[str, Any]], numbers: Sequence[int], why: str, outage: bool, unsure: bool
) -> str:
    head = f"{_named(numbers).capitalize()} at once, because {why}"
    if not outage:
        return f"{head}; replicas on other nodes answer meanwhile."
    nodes = [kept["node"] for kept in slices]
    stop = longest_stop([process for node in nodes for process in node["processes"]])
    seconds = stop + max(node["load_deadline_seconds"] for node in nodes)
    nothing = "nothing that was looked at" if unsure else "nothing"
    return f"{head}: {nothing} answers from the stop until the new start is ready, {seconds} s at most."


def _text_in_order(waves: Sequence[Mapping[str, Any]], broken: Sequence[_Replica]) -> str:
    steps = [_named(wave["replicas"]) for wave in waves if wave["patient"] and wave["replicas"]]
    if broken:
        steps.insert(0, f"{_named([each.number for each in broken])}, which does not serve")
    if not waves[-1]["replicas"]:
        steps.append(f"{_named(waves[-1]['drain'])}, which goes")
    return f"One after the other, while the others answer: {'; then '.join(steps)}."


def _named(numbers: Sequence[int]) -> str:
    listed = ", ".join(str(number) for number in numbers)
    return f"replica {listed}" if len(numbers) == 1 else f"replicas {listed}"


def doing(wave: Mapping[str, Any], count: int) -> str:
    """How far a rollout of so many waves has come, for `status`."""
    return f"wave {wave['number'] + 1} of {count}: {_named(wave['replicas'] or wave['drain'])}"


def goes_on(variables: Mapping[str, Any], hosts: Sequence[str], number: int) -> bool:
    """Whether a wave comes about: every node has come through all waves before it, and nothing is red.

    Args:
        variables: of every host; `release_walked` counts the waves that it came through, `release_went` is a text
            where something failed.
        hosts: the nodes that change.
        number: of the wave.
    """
    return not is_red(variables, hosts) and all(variables[host].get("release_walked") == number for host in hosts)


def is_red(variables: Mapping[str, Any], hosts: Sequence[str]) -> bool:
    """Whether something failed on one of the nodes."""
    return any(isinstance(variables[host].get("release_went"), str) for host in hosts)


def is_started(variables: Mapping[str, Any], wave: Mapping[str, Any]) -> bool:
    """Whether all nodes of a wave have started their part of it."""
    return all(variables[host].get("release_started") == wave["number"] for host in wave["nodes"])


def back_text(variables: Mapping[str, Any], wave: Mapping[str, Any], now: float) -> str:
    """How long the replicas of a wave were away; empty where none answered before.

    Args:
        variables: of every host; `release_stopped_at` in seconds since 1970, and `release_rollout` on the wave's first.
        wave: that is over.
        now: seconds since 1970.
    """
    seconds = now - min(variables[host]["release_stopped_at"] for host in wave["nodes"])
    plan = variables[wave["first"]]["release_rollout"]
    if plan["outage"]:
        nothing = "Nothing that was looked at" if plan["not_seen"] else "Nothing"
        return f"{nothing} answered for {seconds:.0f} s at most, from the stop to the right answers."
    return f"  {_named(wave['patient'])}: stopped, started, asked in {seconds:.0f} s" if wave["patient"] else ""
