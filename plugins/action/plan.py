"""Works out the plan on the controller, from the inventory alone or with what the nodes told of their network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

from stepladder import replacement, role_variables
from stepladder.catalogue import Catalogue
from stepladder.difference import difference
from stepladder.errors import PlanRefusedError, StepladderError, Violation, unknown_name
from stepladder.network import Seen, settle
from stepladder.plan import Plan
from stepladder.planner import make_plan
from stepladder.request import Deployment, GatewayWish, PlanRequest, parse_request

# Variables of the role that are not fields of a deployment: of nodes, of the run, and what the role itself sets.
KNOWN_BESIDE = {
    *("deployment_gpu", "deployment_gpus", "deployment_driver", "deployment_interface", "deployment_address"),
    *("deployment_hosts", "deployment_replaced", "deployment_worked_out"),
    *("deployment_state_directory", "deployment_plan_file", "deployment_plan", "deployment_slice"),
    *("deployment_seen", "deployment_adopted"),
    "deployment_may_be_refused",
}
# Variables of the gateway's role that are not part of the plan.
GATEWAY_BESIDE = {
    *("gateway_address", "gateway_plan", "gateway_deployment", "gateway_state_directory", "gateway_program"),
    *("gateway_python", "gateway_tools", "gateway_replica", "gateway_weight", "gateway_drain_seconds"),
    *("gateway_ready_seconds", "gateway_allow_last", "gateway_require_replicas", "gateway_put_back"),
    *("gateway_replicas", "gateway_patient", "gateway_rotation", "gateway_may_break", "gateway_urls"),
    *("gateway_at_work", "gateway_allow_rollout", "gateway_reason"),
}
# Roles that a deploy runs, beside the gateway's, and whose variables are the operator's.
ROLES = ("engine_image", "engine_venv", "model_weights", "notify", "verify", "watchdog")
MAKE = "Make it anew with the verb 'plan' and -e plan_out=FILE, and look at it again."
NODE_VARIABLES = {
    "gpu": "deployment_gpu",
    "gpus": "deployment_gpus",
    "driver": "deployment_driver",
    "interface": "deployment_interface",
}


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        _, arguments = self.validate_argument_spec(
            {
                "deployment": {"type": "dict", "required": True},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "replaced": {"type": "dict", "default": {}},
                "state_directory": {"type": "path", "required": True},
                "gateway_hosts": {"type": "list", "elements": "str", "default": []},
                "plan_file": {"type": "path"},
                "seen": {"type": "dict"},
                "may_be_refused": {"type": "bool", "default": False},
            }
        )
        try:
            replacement.require(variables["groups"].get("engines", []), arguments["replaced"])
            _refuse_unknown_hosts("deployment_hosts", arguments["hosts"], variables["hostvars"])
            _refuse_unknown_hosts("gateway_hosts", arguments["gateway_hosts"], variables["hostvars"])
            _refuse_unknown_variables(variables)
            nodes = [_node(host, variables["hostvars"][host]) for host in arguments["hosts"]]
            request = parse_request(
                {
                    "deployment": {key: value for key, value in arguments["deployment"].items() if value is not None},
                    "nodes": nodes,
                    "gateway": _gateway(arguments["gateway_hosts"], variables),
                    "state_directory": arguments["state_directory"],
                }
            )
            plan = make_plan(request, Catalogue())
            if arguments["plan_file"]:
                _refuse_another_plan(plan, Path(arguments["plan_file"]))
            if arguments["seen"]:
                plan = make_plan(_with_networks(request, plan, arguments["seen"]), Catalogue())
            if not arguments["may_be_refused"]:  # who can do without a plan starts no ranks
                _refuse_half_replicas(plan, variables.get("ansible_play_hosts_all", []))
        except StepladderError as error:
            if arguments["may_be_refused"]:
                return result | {"changed": False, "plan": {}, "slices": {}, "refused": str(error)}
            return result | {"failed": True, "msg": str(error)}
        return result | {"changed": False, "plan": plan.as_document(), "slices": plan.slices()}


def _refuse_unknown_hosts(variable: str, hosts: list[str], hostvars: Any) -> None:
    broken = [unknown_name(f"host in {variable}", host, hostvars) for host in hosts if host not in hostvars]
    if broken:
        raise PlanRefusedError(broken)


def _refuse_unknown_variables(variables: dict[str, Any]) -> None:
    """A misspelt variable would silently leave the default in force."""
    known = {f"deployment_{name}" for name in Deployment.model_fields} | KNOWN_BESIDE
    found = sorted(name for name in variables if name.startswith("deployment_") and name not in known)
    broken = [unknown_name("variable", name, known) for name in found]
    if broken := [*broken, *role_variables.misspelt(list(variables), ROLES)]:
        raise PlanRefusedError(broken)


def _node(host: str, variables: Any) -> dict[str, Any]:
    """What the inventory says of one host; the planner names what is missing."""
    node = {key: variables.get(name) for key, name in NODE_VARIABLES.items() if variables.get(name) is not None}
    wished = variables.get("deployment_address")
    address = wished or variables.get("ansible_host") or host
    if "gpu" not in node:
        mend = "Put the host into the group of its GPU type, or set deployment_gpu."
        raise PlanRefusedError([Violation("variable deployment_gpu", f"not set for {host}", mend)])
    return {"name": host, "address": address, "address_declared": bool(wished), **node}


def _gateway(hosts: list[str], variables: dict[str, Any]) -> dict[str, Any] | None:
    """The wished gateway, from the variables of its first host; none where the inventory has no host for it."""
    if not hosts:
        return None
    first = variables["hostvars"][hosts[0]]
    known = {f"gateway_{name}" for name in GatewayWish.model_fields} | GATEWAY_BESIDE
    found = {name for name in (*variables, *first) if name.startswith("gateway_")} - known
    if found:
        raise PlanRefusedError([unknown_name("variable", name, known) for name in sorted(found)])
    names = {name: f"gateway_{name}" for name in GatewayWish.model_fields if name != "hosts"}
    wish = {name: first.get(variable) for name, variable in names.items() if first.get(variable) not in (None, "")}
    return wish | {"hosts": [{"name": host, "address": _client_address(host, variables)} for host in hosts]}


def _client_address(host: str, variables: dict[str, Any]) -> str:
    """Where clients reach a host of the gateway."""
    facts = variables["hostvars"][host]
    found = (facts.get(name) for name in ("gateway_address", "ansible_host", "deployment_address"))
    return next((address for address in found if address), host)


def _with_networks(request: PlanRequest, plan: Plan, told: dict[str, Any]) -> PlanRequest:
    """The request with the network that the nodes of each replica found to meet over.

    Args:
        plan: of the request as it stands; it says which nodes belong together.
        told: by host `interfaces` and `reached` of `stepladder.core.peer_network`.
    """
    seen = {host: Seen(facts["interfaces"], facts["reached"]) for host, facts in told.items()}
    nodes = {node.name: node for node in request.nodes}
    for ranks in {tuple(rank.node for rank in node.ranks) for node in plan.nodes if node.ranks}:
        nodes |= {node.name: node for node in settle([nodes[name] for name in ranks], seen)}
    return request.model_copy(update={"nodes": tuple(nodes.values())})


def _refuse_another_plan(plan: Plan, path: Path) -> None:
    """Run exactly the plan that was looked at, or say what has changed since."""
    try:
        document = json.loads(path.read_text())
        kept = Plan.from_document(document)
    except (OSError, ValueError) as error:
        raise PlanRefusedError(
            [Violation(f"plan_file {path}", f"it cannot be read as a plan: {error}", MAKE)]
        ) from error
    if document.get("id") != kept.id:
        found = f"its id is {document.get('id')}, its content's is {kept.id}: it was edited"
        raise PlanRefusedError([Violation(f"plan_file {path}", found, MAKE)])
    if kept.id != plan.id:
        changes = difference(kept.as_document(), plan.as_document()) or ["only notes and figures that explain it"]
        found = "\n       ".join(["inventory or catalogue changed since:", *changes])
        raise PlanRefusedError([Violation(f"plan_file {path}", found, f"\n     {MAKE}")])


def _refuse_half_replicas(plan: Plan, limited_to: list[str]) -> None:
    """`--limit` may leave out whole replicas, never single ranks: one rank is of no use without the others."""
    broken = []
    for replica in range(plan.deployment.replicas):
        members = [node.name for node in plan.nodes if node.replica == replica]
        missing = [name for name in members if name not in limited_to]
        if missing and len(missing) < len(members):
            found = f"it leaves out {', '.join(missing)} of replica {replica} ({', '.join(members)})"
            broken.append(Violation("--limit", found, "Limit to whole replicas, or leave --limit out."))
    if broken:
        raise PlanRefusedError(broken)
