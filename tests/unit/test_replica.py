"""When the ranks of a replica belong together, and what is said when they do not."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder import replica


def state(name: str = "vllm-0", **values: Any) -> dict[str, Any]:
    defaults = {"running": True, "outdated": False, "phase": "ready", "detail": "port 8000 answers 200", "since": 500.0}
    return {"name": name, **defaults, **values}


GONE = {"running": False, "phase": "stopped", "detail": "does not run", "since": None}
LOADING = {"phase": "loading", "detail": "port 8000 refuses connections"}


@pytest.mark.parametrize(
    ("states", "fault"),
    [
        ({"a": [state()], "b": [state()]}, ""),
        ({"a": [state(**GONE)], "b": [state(**GONE)]}, ""),
        ({"a": [state()], "b": [state(**GONE)]}, "b vllm-0 does not run"),
        ({"a": [state(**GONE)], "b": [state()]}, "a vllm-0 does not run"),
        (
            {"a": [state(**{**GONE, "phase": "crash_looping"})], "b": [state(**GONE)]},
            "a vllm-0 does not run",
        ),
        ({"a": [state()], "b": [state(outdated=True)]}, "b vllm-0 runs another command than planned"),
        (
            {"a": [state(phase="unhealthy", detail="port 8000 answers 200, but gave no token")], "b": [state()]},
            "a vllm-0: port 8000 answers 200, but gave no token",
        ),
        ({"a": [state(**LOADING, since=20.0)], "b": [state(since=18.0)]}, ""),
        (
            {"a": [state(**LOADING, since=20.0)], "b": [state(since=300.0)]},
            "vllm-0 on a was started 280 s after vllm-0 on b",
        ),
        # A ready head has met its ranks, whenever they were started.
        ({"a": [state(since=20.0)], "b": [state(since=300.0)]}, ""),
        # An engine that was started again on a Ray that stayed up.
        ({"a": [state("ray-0", since=900.0), state(**LOADING, since=20.0)], "b": [state("ray-0", since=890.0)]}, ""),
        # A Ray worker that came back joins the cluster, and the engine goes on by itself (seen with vLLM 0.32.0).
        ({"a": [state("ray-0", since=900.0), state(**LOADING, since=20.0)], "b": [state("ray-0", since=10.0)]}, ""),
        (
            {
                "a": [state("ray-0", since=100.0), state(**LOADING, since=20.0)],
                "b": [state("ray-0", since=10.0)],
                "c": [state("ray-0", since=990.0)],
            },
            "ray-0 on a was started 890 s after ray-0 on c",
        ),
    ],
)
def test_one_lost_rank_means_a_new_start_for_all(states: dict[str, list[dict[str, Any]]], fault: str) -> None:
    assert replica.fault(states) == fault


def test_a_node_that_was_not_looked_at_is_the_fault() -> None:
    variables = {"a": {"service_states": [state()]}, "b": {}}
    assert replica.fault_of(variables, ["a", "b"]) == "b could not be looked at"


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ({"a": "Ray 2.60.0 on Python 3.11", "b": "Ray 2.60.0 on Python 3.11"}, ""),
        (
            {"a": "Ray 2.60.0 on Python 3.11", "b": "Ray 2.59.0 on Python 3.11"},
            "a: Ray 2.60.0 on Python 3.11, b: Ray 2.59.0 on Python 3.11",
        ),
        ({"a": "", "b": ""}, ""),
        ({"a": "Ray 2.60.0 on Python 3.11", "b": ""}, ""),
    ],
)
def test_nodes_that_differ_are_all_named(versions: dict[str, str], text: str) -> None:
    variables = {host: {"versions": version} for host, version in versions.items()}
    assert replica.unlike(variables, ["a", "b"], "versions") == text
