"""What roles ask about weights; the logic is in `stepladder.spread` and `.stores`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import split_patterns

from stepladder import spread, stores
from stepladder.errors import StepladderError


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda item: dict(item) if isinstance(item, Mapping) else list(item)))


def _with_ansibles_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def filtered(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (KeyError, ValueError, StepladderError) as error:
            raise AnsibleFilterError(str(error)) from error

    return filtered


def exchange(  # noqa: PLR0917 - as a filter is called
    variables: Mapping[str, Any], hosts: Sequence[str], host: str, key: str, port: int, above: int = 0
) -> dict[str, Any]:
    """A node's part in the exchange; empty where it is better alone.

    Args:
        variables: by host.
        hosts: nodes that bring weights now.
        host: the node asked about.
        key: variable in which each node keeps what it looked up.
        port: of the exchange.
        above: bytes that nodes lack in all for which there is one.
    """
    return spread.exchanges(_listed(variables, hosts, key), int(port), int(above)).get(host, {})


def listing(variables: Mapping[str, Any], hosts: Sequence[str], key: str, wish: Mapping[str, Any]) -> list[Any]:
    """What the first node that has everything has; empty where none has.

    Args:
        variables: by host.
        hosts: nodes that bring or give weights now.
        key: variable in which each node keeps what it looked up.
        wish: which weights, as the modules take it.
    """
    wanted: dict[str, Any] = {name: str(wish[name]) for name in ("model_id", "revision")}
    wanted |= {name: [*split_patterns(_plain(wish[name]))] for name in ("include", "exclude")}
    for one in _listed(variables, hosts, key).values():
        if one["complete"] and {name: one[name] for name in wanted} == wanted:
            return list(one["listing"])
    return []


def exchange_part(found: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A node's part in the exchange with what it runs it with; empty where it has none."""
    return {**_plain(found), **_plain(own)} if found else {}


def _listed(variables: Mapping[str, Any], hosts: Sequence[str], key: str) -> dict[str, Any]:
    return {host: _plain(variables[host][key]) for host in hosts if variables[host].get(key)}


def prune_text(variables: Mapping[str, Any], hosts: Sequence[str], key: str, shared: Any) -> str:
    """`stores.prune_text` of what each node keeps in a variable."""
    return stores.prune_text(_listed(variables, hosts, key), boolean(shared))


def progress_text(variables: Mapping[str, Any], hosts: Sequence[str], key: str) -> str:
    """What is being fetched on all nodes, a line each; empty for nothing."""
    lines = [stores.progress_text(host, _plain(variables[host].get(key) or [])) for host in hosts]
    return "\n".join(filter(None, lines))


def removable(variables: Mapping[str, Any], hosts: Sequence[str], host: str, key: str, shared: Any) -> list[str]:
    """`stores.removable` of what each node keeps in a variable."""
    return stores.removable(_listed(variables, hosts, key), host, boolean(shared))


def check_code(look: Mapping[str, Any], name: str, accepted: str, trusted: bool) -> str:
    """The report on a model's Python code; refuses a change that nobody accepted, where an engine runs it."""
    files, before = _plain(look["remote_code"]), _plain(look["remote_code_before"])
    if trusted and not look["remote_code_unknown"]:
        stores.check_code(name, files, before, str(accepted or ""), str(look["remote_code_before_name"]))
    return stores.code_text(name, files, trusted=trusted)


def begun_text(variables: Mapping[str, Any], hosts: Sequence[str], key: str, deadline: float) -> str:
    """`stores.begun_text` of the nodes whose variable says that a job was begun."""
    return stores.begun_text([host for host in hosts if (variables[host].get(key) or {}).get("begun")], float(deadline))


def code_plan(look: Mapping[str, Any], name: str) -> str:
    """`stores.code_plan_text` of what a node or the controller has looked up."""
    return stores.code_plan_text(
        name,
        _plain(look["remote_code"]),
        _plain(look["remote_code_before"]),
        str(look["remote_code_before_name"]),
        str(look["remote_code_unknown"]),
    )


def trusts_code(processes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of a node's planned processes runs a model's own Python code."""
    return any({"--trust-remote-code", "--trust_remote_code"} & set(process["argv"]) for process in processes)


class FilterModule:
    """Filters of the collection about weights."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters."""
        named: dict[str, Callable[..., Any]] = {
            "weights_begun_text": begun_text,
            "weights_code": check_code,
            "weights_code_plan": code_plan,
            "weights_exchange": exchange,
            "weights_exchange_part": exchange_part,
            "weights_listing": listing,
            "weights_progress_text": progress_text,
            "weights_prune_text": prune_text,
            "weights_removable": removable,
            "weights_trust": trusts_code,
        }
        return {name: _with_ansibles_errors(function) for name, function in named.items()}
