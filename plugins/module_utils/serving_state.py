"""What stands between clients and engines on a node: its gateway and its watchdog. Changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.stepladder.core.plugins.module_utils import haproxy, rotation

DRAINED = "drained.json"
# HAProxy's words for an agent check that the agent answered, and for one that was not asked yet (HAProxy 2.6). What has
# taken its port is CHECKED, L7RSP or L7TOUT.
AGENT_ANSWERED, AGENT_UNASKED = {"L7OK", "L7STS"}, {"INI", ""}
# A watchdog writes its state every 15 s.
SILENT_SECONDS = 60.0


def gateway(directory: str) -> dict[str, Any] | None:
    """The gateway's replicas, and what is wrong where it does not say; none where there is no gateway.

    Args:
        directory: the gateway's own, as the role makes it.
    """
    if not Path(directory, "current").is_dir():
        return None
    try:
        master = haproxy.Master(directory)
        servers, places = master.servers(), master.addresses()
    except (haproxy.GatewayError, OSError) as error:
        return {"problem": str(error), "agent_problem": "", "servers": []}
    by, marks = drained_by(directory), rotation.marks(directory)
    told = [
        {**_server(server, by.get(server.name), marks), "place": places.get(server.name, "")}
        for server in servers.values()
    ]
    return {"problem": "", "agent_problem": agent_problem([*servers.values()]), "servers": told}


def agent_problem(servers: Sequence[haproxy.Server]) -> str:
    """What HAProxy says of the agent's silence where it answered for no replica; empty where it answered for one."""
    # A check that is under way stands behind '* '.
    said = [server.agent[2:] if server.agent.startswith("* ") else server.agent for server in servers]
    asked = [each for each in said if each.partition(" ")[0] not in AGENT_UNASKED]
    silent = not any(each.partition(" ")[0] in AGENT_ANSWERED for each in asked)
    return asked[0] if asked and silent else ""


def _server(server: haproxy.Server, by: Any, marks: Mapping[int, str]) -> dict[str, Any]:
    told = haproxy.names_of([server])[0]
    taken_out = server.drained and told["replica"] in marks
    more = {
        "in_rotation": haproxy.in_rotation(server), "check": server.check, "agent": server.agent,
        "address": server.address, "drained_by": by if server.drained else None,
        "taken_out": taken_out, "taken_out_by": marks[told["replica"]] if taken_out else None,
    }  # fmt: skip
    return {**told, **more}


def drained_by(directory: str) -> dict[str, dict[str, str]]:
    """Who drained which replica, by the server's name; HAProxy itself does not know."""
    try:
        kept = json.loads(Path(directory, DRAINED).read_text())
        return {str(name): {str(key): str(value) for key, value in by.items()} for name, by in kept.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def note_drained(directory: str, name: str, who: str, origin: str) -> None:
    """Write down who drained a replica; an empty `who` strikes it off."""
    kept = drained_by(directory)
    kept.pop(name, None)
    if who:
        kept[name] = {"who": who, "origin": origin, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    haproxy.write_private(Path(directory, DRAINED), json.dumps(kept, sort_keys=True) + "\n")


def watchdog(directory: str, now: float | None = None) -> dict[str, Any] | None:
    """What the node's watchdog saw and did; none where there is none.

    Args:
        directory: the watchdog's own, as the role makes it.
        now: time of day in seconds since 1970; unset is this moment.
    """
    if not Path(directory, "settings.json").is_file():
        return None
    try:
        state = json.loads(Path(directory, "state.json").read_text())
        moment = time.time() if now is None else now
        silent = max(0.0, moment - float(state["at"]))
        engines = [
            {
                "process": name,
                "state": str(engine.get("state", "")),
                "detail": str(engine.get("detail", "")),
                "stalls": int(engine["stalls"]),
                "restarts": int(engine["restarts"]),
                "last_restart_ago": max(0.0, moment - engine["last_restart"]) if engine["restarts"] else None,
            }
            for name, engine in sorted(state["engines"].items())
        ]
    except FileNotFoundError:
        return {"problem": "it has written nothing yet", "mode": "", "engines": []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {"problem": f"{directory}/state.json cannot be read: {error}", "mode": "", "engines": []}
    problem = f"it gave no sign of life for {silent:.0f} s" if silent > SILENT_SECONDS else ""
    return {"problem": problem, "mode": str(state["mode"]), "engines": engines}
