"""What roles ask about plans, units and states; the logic is in `stepladder.show`, `.status` and `.units`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from stepladder import (
    acceptance,
    all_reduce,
    contents,
    diagnosis,
    difference,
    drift,
    fitness,
    gate,
    gateway,
    lease_text,
    leftovers,
    replacement,
    replica,
    rollout,
    runtime,
    show,
    status,
    units,
    way_back,
)
from stepladder.errors import StepladderError
from stepladder.plan import Plan

FORMATS: dict[str, Callable[[Plan], str]] = {
    "human": show.human,
    "json": Plan.to_json,
    "summary": show.summary,
    "example": show.client_example,
    "markdown": show.markdown,
    "shell": show.script,
}


def plan_text(document: dict[str, Any], form: str = "human") -> str:
    """Render a plan document in one of the formats.

    Raises:
        AnsibleFilterError: for a format that does not exist, naming those that do.
    """
    if form not in FORMATS:
        raise AnsibleFilterError(f"plan_format '{form}' is unknown. Choose one of: {', '.join(FORMATS)}.")
    return FORMATS[form](Plan.from_document(document))


def _plain(value: Any) -> Any:
    """Data as the brain knows it: Ansible hands in lists and mappings whose items are read only when asked for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _on_plain_data(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the brain's errors into Ansible's, which name the task and the expression."""

    @functools.wraps(function)
    def filtered(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*(_plain(argument) for argument in arguments), **_plain(named))
        except (ValueError, KeyError, StepladderError) as error:
            raise AnsibleFilterError(str(error)) from error

    return filtered


def _status_report(
    variables: Mapping[str, Any], hosts: list[str], form: str = "human", gateways: list[str] | None = None
) -> dict[str, str]:
    """`status.report` on plain rows."""
    told = ("rows", "problem", "release", "watchdog", "gateway", "left_gateway")
    names = [f"status_{name}" for name in told]
    wanted = dict.fromkeys([*hosts, *(gateways or ())])
    kept = {host: {name: _plain(variables[host].get(name)) for name in names} for host in wanted}
    return status.report(kept, hosts, form, gateways or ())


def _rollout(variables: Mapping[str, Any], hosts: list[str], max_unavailable: Any, again: bool) -> dict[str, Any]:
    """`rollout.rollout` on plain data."""
    names = ("deployment_slice", "release_before", "release_ready", "release_suspect", "service_states")
    kept = {host: {name: _plain(variables[host].get(name)) for name in names} for host in hosts}
    points = [point for host in hosts for point in (kept[host]["deployment_slice"] or {}).get("endpoints", ())]
    for other in {point["node"] for point in points} - kept.keys():
        if other in variables:
            kept[other] = {"release_seen": _plain(variables[other].get("release_seen"))}
    try:
        return rollout.rollout(kept, hosts, max_unavailable, again)
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from error


def _order_text(variables: Mapping[str, Any], hosts: list[str], max_unavailable: Any) -> str:
    """`difference.order_text` on plain data."""
    names = ("deployment_slice", "release_slice", "release_seen")
    kept = {host: {name: _plain(variables[host].get(name)) for name in names} for host in hosts}
    try:
        return difference.order_text(kept, hosts, max_unavailable)
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from error


def _in_place(hosts: list[str], replaced: Any) -> list[str]:
    """`replacement.in_place`; what is no mapping is refused by the plan, which names the variable."""
    return replacement.in_place(hosts, _plain(replaced)) if isinstance(replaced, Mapping) else hosts


def _replacement(
    hosts: list[str], replaced: Mapping[str, str], used: Mapping[str, Any], old: str, new: str
) -> dict[str, Any]:
    """`replacement.with_another`; a refusal is an answer here, which the playbook shows as it is."""
    try:
        return {"replaced": replacement.with_another(hosts, _plain(replaced), list(used), old, new), "refused": ""}
    except StepladderError as error:
        return {"replaced": {}, "refused": str(error)}


def _leaving(
    variables: Mapping[str, Any], hosts: list[str], changing: list[str], host: str, replicas: int
) -> list[int]:
    """`rollout.leaving` on plain data."""
    names = ("release_slice", "deployment_slice")
    kept = {name: {key: _plain(variables[name].get(key)) for key in names} for name in {*hosts, *changing}}
    return rollout.leaving(kept, hosts, changing, host, replicas)


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters."""
        named: dict[str, Callable[..., Any]] = {
            "gigabytes": show.gigabytes,
            "gpu_vendor": runtime.gpu_vendor,
            "image_bytes": contents.image_bytes,
            "known_images": contents.known_images,
            "gateway_text": gateway.gateway_text,
            "gateway_apart": gateway.apart,
            "gives_tokens": units.gives_tokens,
            "logs_text": status.logs_text,
            "diagnose_found": diagnosis.node_found,
            "diagnose_peers": diagnosis.peers,
            "difference_text": difference.node_text,
            "gateway_agent_settings": gateway.agent_settings,
            "gateway_drain_warning": gateway.drain_warning,
            "gateway_configuration": gateway.configuration,
            "gateway_in_front_of": gateway.in_front_of,
            "gateway_slice": gateway.gateway_slice,
            "lease_broken_text": lease_text.broken,
            "folder_mark": contents.folder_mark,
            "failure_text": way_back.failure_text,
            "orphan_pids": units.orphan_pids,
            "plan_text": plan_text,
            "prune_removable": leftovers.removable,
            "planned_ports": units.planned_ports,
            "preflight_wishes": fitness.wishes,
            "release_processes": units.release_processes,
            "speed_endpoints": gate.endpoints,
            "speed_told": gate.told,
            "speed_verdict": gate.verdict,
            "speeds": gate.speeds,
            "runtime_faults": runtime.runtime_faults,
            "runtime_floors": runtime.floors,
            "runtime_wish_problems": runtime.wish_problems,
            "in_place": _in_place,
            "replacement": _replacement,
            "rollout_doing": rollout.doing,
            "rollout_leaving": _leaving,
            "rollout_goes_last": rollout.goes_last,
            "rollout_refusal": rollout.refusal,
            "service_units": units.service_units,
            "standalone_slice": units.standalone_slice,
            "superseded_processes": units.superseded,
            "status_gateway": status.front,
            "status_release": status.release,
            "status_rows": status.rows,
            "units_to_end": units.units_to_end,
            "unit_names": units.unit_names,
            "units_to_restart": units.units_to_restart,
            "units_to_stop": units.units_to_stop,
            "used_elsewhere": units.used_elsewhere,
            "venv_requirements": contents.venv_requirements,
            "venv_stand_ins": contents.venv_stand_ins,
            "watchdog_text": units.watchdog_text,
            "watched_units": units.watched_units,
        }
        plain = {name: _on_plain_data(function) for name, function in named.items()}
        # These read single variables of many hosts; copying all of every host's would cost minutes.
        return plain | {
            "acceptance_immeasurable": acceptance.immeasurable,
            "acceptance_rounds": acceptance.rounds_of,
            "acceptance_unmet": acceptance.unmet,
            "acceptance_wish_problems": acceptance.wish_problems,
            "all_reduce_backend": all_reduce.backend_of,
            "all_reduce_left": all_reduce.is_left,
            "all_reduce_part": all_reduce.part_of,
            "image_digest": contents.image_digest,
            "image_seekers": contents.image_seekers,
            "drift_report": drift.report,
            "gate_told": gate.told_of_all,
            "drift_work": drift.work,
            "lease_at_work": lease_text.at_work,
            "lease_in_the_way": lease_text.in_the_way,
            "lease_lost": lease_text.lost,
            "lease_refusal": lease_text.refusal,
            "lease_text": lease_text.text,
            "network_seen": replica.seen,
            "peer_addresses": replica.peer_addresses,
            "automatic_way_back": way_back.automatic,
            "release_asked": gate.by_release,
            "release_choice": way_back.choose,
            "release_ending": way_back.ending,
            "release_failures": way_back.failures,
            "release_is_undrained": way_back.is_undrained,
            "prune_text": leftovers.prune_text,
            "rollout": _rollout,
            "order_text": _order_text,
            "rollout_back_text": rollout.back_text,
            "rollout_goes_on": rollout.goes_on,
            "rollout_is_red": rollout.is_red,
            "rollout_is_started": rollout.is_started,
            "removal_text": show.removal,
            "replica_fault": replica.fault_of,
            "replica_left_out": replica.left_out,
            "replica_parts": replica.parts,
            "status_report": _status_report,
            "unlike": replica.unlike,
            "watched_nodes": units.watched_nodes,
        }
