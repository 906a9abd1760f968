#!/usr/bin/python
"""Measure how fast an endpoint answers, and hold it against the release before."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: speed
short_description: Measure how fast an endpoint answers, and hold it against the release before
description:
  - Runs on the node of the endpoint, so that a figure does not depend on where the operator sits. Warms up, then asks
    in rounds for answers of a fixed length, one request alone and four at once, and takes seconds to the first token
    and output tokens per second.
  - Compares with what is kept of the release before (the link C(previous)), or of this release where it was proven
    earlier. Only a measurement of the same terms is compared.
  - Rounds in which others asked the endpoint too, by the engine's own counters, are not used.
  - What is slower is measured a second time before it is called so.
  - Writes nothing. RV(speed) is for M(stepladder.core.release).
options:
  base_url:
    description: The endpoint, ending in V(/v1).
    type: str
    required: true
  served_name:
    description: The model's name in the API.
    type: str
    required: true
  api_key:
    description: The endpoint's key; unset sends none.
    type: str
  context_length:
    description: Tokens that the endpoint takes; a short one makes the requests shorter.
    type: int
    default: 8192
  path:
    description: The deployment directory, in which measurements are kept with the releases.
    type: path
    required: true
  plan_id:
    description: The release that answers now.
    type: str
    required: true
  replica:
    description: Number of the endpoint's replica.
    type: int
    default: 0
  terms:
    description: What has to be equal for two measurements to be compared, such as model and hardware.
    type: dict
    default: {}
  band:
    description: By how much more time a figure may take, as a part of the time before, and is not called slower.
    type: float
    default: 0.5
  seconds:
    description: How long to measure; slow endpoints take longer, up to O(deadline).
    type: float
    default: 20
  deadline:
    description: Seconds after which a measurement ends with what there is.
    type: float
    default: 300
attributes:
  check_mode:
    support: full
    description: Asks nothing and is skipped.
  diff_mode:
    support: none
author: Stepladder contributors
"""

EXAMPLES = r"""
- name: Measure it
  stepladder.core.speed:
    base_url: http://10.0.0.11:8000/v1
    served_name: step3
    path: /var/lib/stepladder/deployments/step3
    plan_id: 3f9a1c77ab02
    terms: {model: step3 bf16, gpus: 8 x h20}
  register: example_speed
"""

RETURN = r"""
verdict:
  description:
    - V(slower) than before by more than noise; V(broke) when it ended or failed while it was asked.
    - All others are no fault.
  returned: always
  type: str
  choices: [as_before, slower, first, not_comparable, busy, noisy, not_measured, broke]
  sample: as_before
proven_before:
  description: Whether this release ran right before, so that its being slow is hardly its own fault.
  returned: always
  type: bool
  sample: false
compared_with:
  description: The release that it was compared with; empty where there was none.
  returned: always
  type: str
  sample: 77ab023f9a1c
line:
  description: One line for the operator.
  returned: always
  type: str
  sample: 0.21 s to the first token, 31.0 tokens/s, 101 with 4 at once
text:
  description: The verdict in words; what is slower, with both figures.
  returned: always
  type: str
  sample: ""
speed:
  description: What to keep of it; empty where it could not be measured.
  returned: always
  type: dict
  sample: {format_version: 1, rounds: 7}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stepladder.core.plugins.module_utils import release, speed


def before(path: str, plan_id: str, replica: int) -> tuple[str, dict[str, Any] | None, bool]:
    """The release to compare with, its measurement, and whether that is this same release, proven earlier."""
    outcomes = release.read_outcomes(path)
    proven = outcomes.get(plan_id, {}).get("outcome") == release.PROVEN
    other = plan_id if proven else release.previous_release(path) or ""
    return other, outcomes.get(other, {}).get("speed", {}).get(str(replica)), proven


def main() -> None:
    """Measure, compare, answer."""
    module = AnsibleModule(
        argument_spec={
            "base_url": {"type": "str", "required": True},
            "served_name": {"type": "str", "required": True},
            "api_key": {"type": "str", "no_log": True},
            "context_length": {"type": "int", "default": 8192},
            "path": {"type": "path", "required": True},
            "plan_id": {"type": "str", "required": True},
            "replica": {"type": "int", "default": 0},
            "terms": {"type": "dict", "default": {}},
            "band": {"type": "float", "default": 0.5},
            "seconds": {"type": "float", "default": 20.0},
            "deadline": {"type": "float", "default": 300.0},
        },
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg=f"check mode: no request is made to {given['base_url']}")
    endpoint = speed.Endpoint(given["base_url"], given["served_name"], given["api_key"] or "", given["context_length"])
    other, kept, proven = before(given["path"], given["plan_id"], given["replica"])
    taken = speed.take(endpoint, given["seconds"], given["deadline"])
    terms = {**given["terms"], **endpoint.shape}
    now = speed.summary(taken, terms)
    judgement = speed.judge_taken(taken, now, kept, given["band"])
    module.exit_json(
        changed=False,
        verdict=judgement.verdict,
        proven_before=proven,
        compared_with=other if kept else "",
        line=speed.line(now, kept, judgement),
        text=judgement.text,
        speed=now or {},
    )


if __name__ == "__main__":
    main()
