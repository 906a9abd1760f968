"""Ray's own verdict on `ray start` lines: its command with all of its checks, up to the point where it starts a node.

Runs in an environment that has Ray. Only the node itself stands in: it takes the parameters and starts nothing.
"""

from __future__ import annotations

from typing import Any

import answering
import ray
import ray._private.node
import ray._private.services
from ray.scripts import scripts


class Started(Exception):  # noqa: N818 - not an error: Ray got as far as starting the node
    """Everything before the start of processes was accepted."""


class StandInNode:
    """Looks for two parts on one port, as Ray's own node does first, and starts nothing."""

    def __init__(self, parameters: Any, **_more: Any) -> None:
        parameters.update_pre_selected_port()
        raise Started(parameters)


def _examine(argv: list[str], _gpu: dict[str, Any]) -> dict[str, Any]:
    try:
        scripts.cli.main(args=argv, prog_name="ray", standalone_mode=False)
    except Started as started:
        parameters = started.args[0]
        return {
            "head_address": parameters.gcs_address,
            "client_port": parameters.ray_client_server_port,
            "dashboard": [parameters.dashboard_host, parameters.dashboard_port],
            "worker_ports": [parameters.min_worker_port, parameters.max_worker_port],
            "gpus": parameters.num_gpus,
        }
    raise answering.Rejected("'ray start' ended before it started a node")


def main() -> None:
    """Judge."""
    ray._private.node.Node = StandInNode
    answering.answer_all("ray start", ray.__version__, ["ray"], _examine, lambda: None)


if __name__ == "__main__":
    main()
