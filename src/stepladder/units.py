"""How a node's planned processes are called, started and watched by its process manager."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stepladder.engines.common import container_id_file
from stepladder.plan import ID_DIGITS

# Engines without counters in their metrics.
UNCOUNTED = {"transformers"}
# What runs a container's command: goes on with the container of this same command where it still runs, as after
# Docker was started anew beside it (live-restore), and clears away any other of its name. $1: the container, $2: the
# file for its id.
CONTAINER_LAUNCHER = """\
name=$1 id_file=$2; shift 2; mkdir -p "${id_file%/*}"
form='{{.State.Running}} {{range .Config.Env}}{{.}} {{end}}'
kept=$(docker container inspect --format "$form" "$name" 2>/dev/null) || kept=
case $kept in "true "*"STEPLADDER_FINGERPRINT=$STEPLADDER_FINGERPRINT "*)
  echo "stepladder: going on with container $name, which still runs"; exec docker attach --no-stdin "$name";;
esac
[ -z "$kept" ] || docker rm --force "$name" >/dev/null
rm -f "$id_file"; exec "$@"
"""


def service_units(
    processes: Sequence[Mapping[str, Any]],
    deployment_path: str,
    fingerprints: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What the service role and `stepladder.core.engine_state` need to know of each process.

    Args:
        processes: `processes` of a node's slice of the plan.
        deployment_path: the deployment's directory on the node; its last part is the deployment's name.
        fingerprints: mark of each process's wanted command, none where only what runs is looked at.
    """
    deployment = deployment_path.rstrip("/").rsplit("/", 1)[-1]
    wanted = fingerprints or {}
    return [
        {
            "name": process["name"],
            "unit": f"{deployment}-{process['name']}",
            "command": f"{deployment_path}/current/{process['name']}/run",
            "log": f"{deployment_path}/logs/{process['name']}.log",
            "stop_seconds": process["stop_seconds"],
            "part": process.get("part", "engine"),
            "stop_step": process.get("stop_step", 0),
            "health": {key: value for key, value in process["health"].items() if value is not None},
            "wanted_fingerprint": wanted.get(process["name"]),
            "container": f"{deployment}-{process['name']}" if process.get("image") else None,
            "container_id_file": container_id_file(deployment_path, process["name"]) if process.get("image") else None,
        }
        for process in processes
    ]


def unit_names(processes: Sequence[Mapping[str, Any]], deployment: str) -> dict[str, str]:
    """The unit of each process by the process's name."""
    return {unit["name"]: unit["unit"] for unit in service_units(processes, deployment)}


def superseded(
    known: Sequence[Mapping[str, Any]], slices: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Processes that releases on a node have and the wanted slice has not, as after a change of the engine.

    Of all releases: a run that was broken off has made the new one current while engines of the one before still run.

    Args:
        known: the releases, newest first, as `stepladder.core.deployments` tells them.
        slices: their slices of the plan by plan id.
        wanted: the node's slice that is to run.
    """
    names = {process["name"] for process in wanted["node"]["processes"]}
    found: dict[str, dict[str, Any]] = {}
    for kept in sorted(known, key=lambda kept: (not kept["current"], not kept["previous"])):
        for process in slices.get(kept["plan_id"], {}).get("node", {}).get("processes", ()):
            if process["name"] not in names:
                found.setdefault(process["name"], dict(process))
    return [*found.values()]


def planned_ports(processes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every port that the processes will listen on, as `stepladder.core.preflight` takes them."""
    return [
        {"port": port["port"], "host": port["host"], "process": process["name"], "purpose": port["purpose"]}
        for process in processes
        for port in process["ports"]
    ]


def release_processes(
    node: Mapping[str, Any],
    launcher: Sequence[str] = (),
    deployment_path: str = "",
) -> list[dict[str, Any]]:
    """A node's processes with what `stepladder.core.release` writes for them.

    Args:
        node: the node's part of its slice of the plan.
        launcher: what runs each command; none where the process manager starts it itself.
        deployment_path: the deployment's directory on the node; what runs a container's command is made of it.

    A container has the `image` that is planned; the node knows by which id it has that (`release_images.py`).
    A process is to be started again when its weights were mended, its environment was made anew or a program of the
    toolkit's own that it runs is another one: each has a file that changes then.
    """
    started_from = [f"{node['weights']['path']}/.stepladder/manifest.json"] if node.get("weights") else []
    started_from += [f"{node['venv']['path']}/.stepladder.json"] if node.get("venv") else []
    started_from += node.get("programs", [])
    return [
        {"name": process["name"], "env": process["env"], "started_from": started_from}
        | _command(process, launcher, deployment_path)
        for process in node["processes"]
    ]


def _command(process: Mapping[str, Any], launcher: Sequence[str], deployment_path: str) -> dict[str, Any]:
    if not process.get("image"):
        return {"argv": process["argv"], "launcher": [*launcher]}
    name = f"{deployment_path.rsplit('/', 1)[-1]}-{process['name']}"
    held = [
        "/bin/sh",
        "-ec",
        CONTAINER_LAUNCHER,
        "container",
        name,
        container_id_file(deployment_path, process["name"]),
    ]
    return {"argv": process["argv"], "launcher": held, "image": process["image"]}


def watched_units(units: Sequence[Mapping[str, Any]], part: str = "all") -> list[dict[str, Any]]:
    """The same units with only what `stepladder.core.engine_state` takes.

    Args:
        part: `ray` leaves out what is started after Ray; with `engine` Ray is still watched.
    """
    keys = ("name", "unit", "health", "log", "wanted_fingerprint", "container_id_file")
    watched = [unit for unit in units if part != "ray" or unit["part"] == "ray"]
    return [{key: unit[key] for key in keys if unit.get(key) is not None} for unit in watched]


def units_to_restart(
    states: Sequence[Mapping[str, Any]],
    units: Sequence[Mapping[str, Any]],
    part: str = "all",
    again: Sequence[str] = (),
) -> list[str]:
    """Units of a part that do not run, or run another command than the wanted one, and the processes `again`."""
    of_part = {unit["unit"] for unit in units if part in ("all", unit["part"])}
    found = [state for state in states if state["name"] in again or _not_as_planned(state)]
    return [state["unit"] for state in found if state["unit"] in of_part]


def _not_as_planned(state: Mapping[str, Any]) -> bool:
    return not state["running"] or bool(state["outdated"])


def orphan_pids(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Processes of earlier starts that are nobody's any more: they may hold memory and ports."""
    return [str(pid) for state in states for pid in state["orphans"]]


def used_elsewhere(deployments: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Paths of environments and weights, and names of images, that deployments other than `name` still use."""
    paths: set[str] = set()
    for other, kept in deployments.items():
        node = kept.get("node", {})
        if other != name and "venv" in node:  # a helper such as the rehearsal hub needs nothing that a deployment lacks
            paths.update(node[part]["path"] for part in ("tools", "venv", "weights") if node.get(part))
            paths.update(node.get("images", ()))
    return sorted(paths)


def units_to_stop(states: Sequence[Mapping[str, Any]], units: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    """Units that run, or that their manager is about to start again.

    Args:
        states: as `stepladder.core.engine_state` returned them.
        units: the same processes with their `stop_step`.
        step: only those of this step; where nothing has a step, all belong to step 0.
    """
    of_step = {unit["unit"] for unit in units if unit["stop_step"] == step}
    return [state["unit"] for state in states if state["unit"] in of_step and _is_there(state)]


def units_to_end(
    states: Sequence[Mapping[str, Any]], units: Sequence[Mapping[str, Any]], step: int, given_up: bool = False
) -> list[str]:
    """Of the units to stop those that have no request to finish, and are ended at once.

    vLLM 0.32.0 forgets a SIGTERM that comes while it loads, and one whose ranks are gone waits for requests that never
    end: either way a stop lasts until its deadline.

    Args:
        states: as `stepladder.core.engine_state` returned them.
        units: the same processes with their `stop_step`.
        step: only those of this step.
        given_up: whether the replica was judged to be broken, so that an unhealthy process will finish nothing.
    """
    idle = {"loading", "starting", "crash_looping", *(["unhealthy"] if given_up else [])}
    return units_to_stop([state for state in states if state["phase"] in idle], units, step)


def longest_stop(processes: Sequence[Mapping[str, Any]]) -> int:
    """Seconds that a replica's processes may take to stop, one step after the other; those of a step stop together."""
    steps: dict[int, int] = {}
    for process in processes:
        step = process.get("stop_step", 0)
        steps[step] = max(steps.get(step, 0), process["stop_seconds"])
    return sum(steps.values())


def _is_there(state: Mapping[str, Any]) -> bool:
    return bool(state["running"]) or state["phase"] == "crash_looping"


def gives_tokens(node: Mapping[str, Any]) -> bool:
    """Whether a node's slice has a process that answers clients, and not only ranks that follow one."""
    return any(process["health"].get("model") for process in node["processes"])


def watched_nodes(variables: Mapping[str, Any], hosts: Sequence[str]) -> list[str]:
    """Those of some nodes that the inventory wants a watchdog on.

    Args:
        variables: of every host.
        hosts: the nodes.
    """
    # Without quotes YAML reads off as false.
    return [host for host in hosts if variables[host].get("watchdog_mode", "off") not in ("off", False)]


def standalone_slice(name: str, process: Mapping[str, Any], tools_path: str, fingerprint: str) -> dict[str, Any]:
    """A slice for a helper that runs outside the plan, so that the verbs for deployments work on it too.

    Args:
        name: the helper's deployment name.
        process: one process as in a node's slice.
        tools_path: environment that has supervisor in it.
        fingerprint: changes whenever the helper's program does.
    """
    content = {"deployment": {"name": name}, "process": process, "program": fingerprint}
    text = json.dumps(content, sort_keys=True)
    return {
        "plan_id": hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS],
        "deployment": {"name": name},
        "endpoints": [],
        "node": {"processes": [{**process, "env": {**process["env"], "PROGRAM_SHA1": fingerprint}}],
                 "tools": {"path": tools_path}},
    }  # fmt: skip


def watchdog_text(plan: Mapping[str, Any], mode: str) -> str:
    """What a watchdog that is wanted cannot do for what is planned, in a line; empty where it can or is not wanted.

    Args:
        plan: the plan's document.
        mode: watchdog_mode.
    """
    engine = plan["deployment"]["engine"]
    if mode == "off":
        return ""
    if not any(gives_tokens(node) for node in plan["nodes"]) or engine in UNCOUNTED:
        return f"watchdog_mode {mode}: {engine} counts no tokens, so the watchdog judges it never and restarts nothing."
    if mode == "restart" and engine != "sglang" and any(node["ranks"] for node in plan["nodes"]):
        return (
            "watchdog_mode restart: over several nodes the watchdog only tells of a stall and restarts nothing; run "
            "'deploy' then, which starts all ranks again."
        )
    return ""
