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
extends_documentation_fragment: stepladder.core.engine_processes
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
