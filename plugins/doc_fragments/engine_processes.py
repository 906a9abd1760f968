"""Options of every module that looks at the processes of a deployment: which, and how to ask them."""

from __future__ import annotations


class ModuleDocFragment:
    """The processes, and how to look at them."""

    DOCUMENTATION = r"""
options:
  deployment_path:
    description: The deployment directory; its last part is the deployment's name.
    type: path
    required: true
  manager:
    description: What keeps the processes.
    type: str
    choices: [systemd, supervisor]
    required: true
  supervisorctl:
    description: How supervisorctl is called, program and leading arguments. Needed for O(manager=supervisor).
    type: list
    elements: str
    default: []
  processes:
    description: The processes to look at.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the process in the plan.
        type: str
        required: true
      unit:
        description: Name of the systemd unit (with or without C(.service)) or of the supervisor program.
        type: str
        required: true
      health:
        description: How the process says that it is ready.
        type: dict
        default: {kind: none}
        suboptions:
          kind:
            description:
              - V(vllm), no answer while loading, 200 when ready, 503 when the engine is dead.
              - V(sglang) and V(http), 503 or no answer while starting, 200 when ready.
              - V(tcp), ready when the port is open. V(none), ready when the process runs.
            type: str
            choices: [vllm, sglang, tcp, http, none]
            default: none
          host:
            description: Address to ask. A wildcard address is asked on the loopback.
            type: str
            default: 127.0.0.1
          port:
            description: TCP port. Needed for every kind but V(none).
            type: int
          path:
            description: Path to get.
            type: str
            default: /health
          model:
            description: Served name to ask for a token, see O(ask_timeout).
            type: str
      log:
        description: The process's log file.
        type: path
      wanted_fingerprint:
        description: Mark of the wanted command, as M(stepladder.core.release) returned it.
        type: str
      container_id_file:
        description: File that holds the id of the process's container, where it runs in one.
        type: path
      ever_ready:
        description:
          - Whether this same process was seen ready before.
          - Tells an SGLang engine that loads from one that broke, since both answer 503.
        type: bool
        default: false
  log_lines:
    description: How many last lines of each log to return.
    type: int
    default: 20
  http_timeout:
    description: Seconds to wait for an answer of a port.
    type: float
    default: 3
  ask_timeout:
    description:
      - Seconds to wait for one token from a process that answers as healthy and has O(processes[].health.model).
      - An engine that lost a rank goes on calling itself healthy. V(0) does not ask.
      - One that gives none is unhealthy, unless its token counters move meanwhile.
    type: float
    default: 0
  follows:
    description:
      - Health of the rank that answers clients, asked for from a node that does not.
      - Adds a state C(head) to RV(states), ready or loading.
    type: dict
    suboptions:
      kind: {description: As for a process., type: str, choices: [vllm, sglang, tcp, http, none], default: none}
      host: {description: Address to ask., type: str, default: 127.0.0.1}
      port: {description: TCP port., type: int}
      path: {description: Path to get., type: str, default: /health}
      model: {description: Not used here., type: str}
"""
