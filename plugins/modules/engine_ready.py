#!/usr/bin/python
"""Documentation of engine_ready; the work is done by the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: engine_ready
short_description: Wait until the processes of a deployment are ready
description:
  - Looks with M(stepladder.core.engine_state) again and again until every process is ready.
  - Fails at once when a process failed, when it was started again more often than O(allowed_restarts), when two looks
    in a row find it about to be restarted, or when three looks in a row find that it does not run.
  - The message names the process to blame, its phase, last exit, log and the log's last lines.
  - Shows a line when a phase changes and every 15 seconds.
  - In check mode it looks once and does not wait.
  - Where several nodes wait together (O(ranks)), the failure of one ends the wait of all, so that the message names the
    node to blame and nobody waits in vain for it. A node that cannot be reached for 60 seconds counts as failed.
options:
  ranks:
    description: Inventory names of the nodes of a replica that wait together; none where a node waits alone.
    type: list
    elements: str
    default: []
  deadline:
    description: Seconds until all have to be ready.
    type: int
    required: true
  progress_deadline:
    description:
      - Seconds that may pass without any sign of work of the deployment's processes; V(0) is no limit. Signs are a new
        line in a log, bytes read, processor time and memory taken.
      - A process that waits in a loop which takes processor time is not told from one that works, and has O(deadline).
      - Of nodes that wait together (O(ranks)) the work of any counts.
    type: int
    default: 900
  allowed_restarts:
    description: How often a process may be started again while waiting.
    type: int
    default: 1
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
        description: Whether this same process was seen ready before this wait; what the wait sees is added to it.
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
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Wait until the engine is ready
  stepladder.core.engine_ready:
    deadline: 1800
    deployment_path: /var/lib/stepladder/deployments/step3
    manager: systemd
    processes:
      - name: vllm-0
        unit: step3-vllm-0
        health: {kind: vllm, port: 8000}
        log: /var/lib/stepladder/deployments/step3/logs/vllm-0.log
"""

RETURN = r"""
seconds:
  description: How long the wait took, in seconds.
  returned: always
  type: float
  sample: 312.4
states:
  description: The last look, as M(stepladder.core.engine_state) returns it.
  returned: always
  type: list
  elements: dict
  sample: [{name: vllm-0, phase: ready}]
"""
