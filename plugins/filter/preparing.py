"""What the roles of `prepare` ask; the logic is in `stepladder.driver`, `.preparing`, `.python_sources` and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from stepladder import driver, mirrors, preparing, python_sources, role_variables
from stepladder.errors import StepladderError, Violation


def _plain(value: Any) -> Any:
    """Data as the brain knows it: Ansible hands in lists and mappings whose items are read only when asked for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _driver_plan(wish: Mapping[str, Any], facts: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """`driver.driver_plan` with the few facts that it reads."""
    try:
        return driver.driver_plan(_plain(wish), {name: facts.get(name) for name in driver.FACTS}, directory)
    except StepladderError as error:
        raise AnsibleFilterError(str(error)) from error


def _mixed_types(hosts: list[str], variables: Mapping[str, Any], host: str) -> list[dict[str, str]]:
    """`driver.mixed_types` of what the inventory says of some hosts."""
    types = {name: str(variables[name].get("deployment_gpu") or "unset") for name in hosts}
    deployments = {name: str(variables[name].get("deployment_name") or "") for name in hosts}
    return driver.mixed_types(types, deployments, host)


def _misspelt(variables: Mapping[str, Any], host: str, roles: list[str]) -> list[dict[str, str]]:
    """Misspelt variables of a host, as faults that `stepladder.core.preparation` tells with its own."""
    beside = {*preparing.FACTS, *preparing.PROBLEMS}
    found = role_variables.misspelt(list(variables[host]), _plain(roles), beside)
    return [driver.fault(one) for one in found]


def _setting_faults(problems: list[str]) -> list[dict[str, str]]:
    """Texts about settings, as faults that `stepladder.core.preparation` tells with its own."""
    return [driver.fault(Violation("setting", text, "")) for text in problems]


def _misspelt_text(variables: Mapping[str, Any], hosts: list[str], roles: list[str], beside: list[str]) -> str:
    """Misspelt variables of several hosts, each name once."""
    names = dict.fromkeys(name for host in hosts for name in variables[host])
    return "\n".join(map(str, role_variables.misspelt(list(names), _plain(roles), _plain(beside))))


def _preparation_report(
    variables: Mapping[str, Any], hosts: list[str], failed: list[str], check: bool, refused: str
) -> str:
    """`preparing.report` on plain rows; the variables of hosts are read one by one, all of them would cost minutes."""
    rows = {
        name: {key: _plain(variables[name].get(key)) for key in preparing.FACTS if variables[name].get(key) is not None}
        for name in hosts
    }
    return preparing.report(rows, failed, check, refused)


def _in_containers(slices: Mapping[str, Any], install: str | None, image: str | None) -> bool:
    """`preparing.in_containers` of the first slice alone: a whole plan is long, and all have the same deployment."""
    name = next(iter(slices), None)
    first = {} if name is None else {name: {"deployment": _plain(slices[name]["deployment"])}}
    return preparing.in_containers(first, install or "", image or "")


def _firewall_peers(hosts: list[str], variables: Mapping[str, Any]) -> list[str]:
    """`preparing.firewall_peers` of what the inventory says of some hosts."""
    return preparing.firewall_peers(
        {name: {key: variables[name].get(key) for key in preparing.ADDRESSES} for name in hosts}
    )


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters."""
        return {
            "driver_plan": _driver_plan,
            "firewall_peers": _firewall_peers,
            "in_containers": _in_containers,
            "listed": lambda value: role_variables.listed(_plain(value)),
            "mirrored": lambda known, mirror: mirrors.mirrored(_plain(known), _plain(mirror)),
            "misspelt": _misspelt,
            "misspelt_text": _misspelt_text,
            "mixed_types": _mixed_types,
            "pip_conf": lambda values: python_sources.pip_conf(_plain(values)),
            "preparation_report": _preparation_report,
            "python_source_problems": lambda values: python_sources.problems(_plain(values)),
            "setting_faults": _setting_faults,
            "time_keeper": lambda names, states, servers, container: preparing.time_keeper(
                _plain(names), _plain(states), _plain(servers), container
            ),
            "uv_toml": lambda values: python_sources.uv_toml(_plain(values)),
        }
