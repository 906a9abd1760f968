"""What `prepare` tells at its end: of each node what was changed, and whether a reboot is due."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

# Facts that the roles leave behind, and what they are about.
CHANGES = {
    "host_changes": "host",
    "gpu_driver_changes": "driver",
    "container_runtime_changes": "containers",
    "python_mirror_changes": "python",
}
REBOOTS = ("gpu_driver_reboot", "gpu_driver_system_reboot")
FACTS = (
    *CHANGES, *REBOOTS, "gpu_driver_plan", "gpu_driver_loaded", "gpu_driver_unmet", "host_unmet",
    "python_mirror_overrides",
)  # fmt: skip
# And those that they leave before anything is changed.
PROBLEMS = ("container_runtime_problems", "python_mirror_problems")
MOST_LINES = 12
# Where the inventory says at which addresses a node is.
ADDRESSES = ("deployment_address", "ansible_host", "lab_storage_address")


def in_containers(slices: Mapping[str, Mapping[str, Any]], install: str, image: str) -> bool:
    """Whether the engine runs in containers, so that every node wants Docker, a spare one too.

    Args:
        slices: of the plan, by node; none where there is no plan, and then the inventory's wish counts.
        install: `deployment_install`, empty or auto where it does not say. image: `deployment_image`.
    """
    for one in slices.values():
        return bool(one["deployment"]["install"] == "container")
    return install == "container" or (install in ("", "auto") and bool(image))


def report(rows: Mapping[str, Mapping[str, Any]], failed: Sequence[str], check: bool = False, refused: str = "") -> str:
    """A line for each node, and below it what was changed.

    Args:
        rows: by node, of `FACTS` those that its roles have set.
        failed: nodes that a fault stopped; what it was stands above.
        check: whether it was only looked at.
        refused: why there is no plan, where one was wanted.
    """
    lines = []
    for name, row in rows.items():
        changes = [f"{part}: {action}" for key, part in CHANGES.items() for action in row.get(key) or []]
        reboot, of_system = (row.get(key) or [] for key in REBOOTS)
        state = "not prepared, see above" if name in failed else "can be prepared" if check else "prepared"
        number = f"{len(changes)} change{'s' if len(changes) > 1 else ''}{' to make' if check else ''}"
        count = number if changes else "nothing to change" if check else "nothing changed"
        due = "a reboot is due" if reboot else "the system asks for a reboot" if of_system else "no reboot is due"
        lines.append(f"{name}: {state}; {count}; {due}")
        summary = _driver(row)
        lines += [f"    {summary}"] if summary else []
        lines += [f"    reboot: {reason}" for reason in [*reboot, *of_system]]
        unmet = [*(row.get("host_unmet") or []), *(row.get("gpu_driver_unmet") or [])]
        lines += [f"    not possible here: {text}" for text in unmet]
        lines += [f"    not in force: {text}" for text in row.get("python_mirror_overrides") or []]
        lines += [f"    {change}" for change in changes[:MOST_LINES]]
        if len(changes) > MOST_LINES:
            lines.append(f"    and {len(changes) - MOST_LINES} more; -v shows all")
    waiting = [name for name, row in rows.items() if row.get("gpu_driver_reboot") and name not in failed]
    if waiting and not check:
        lines.append(
            f"Not asked yet whether they are fit: {', '.join(waiting)}. Restart them (gpu_driver_reboot_allowed), then "
            "run prepare again."
        )
    if refused:
        lines.append(f"Prepared without a plan; whether Docker is wanted, deployment_install alone said. {refused}")
    return "\n".join(lines)


def _driver(row: Mapping[str, Any]) -> str:
    """What driver a node gets; one that is only looked at (its plan has no version) by the version that runs."""
    plan, loaded = row.get("gpu_driver_plan") or {}, row.get("gpu_driver_loaded")
    if loaded and plan["title"] and not plan["version"]:
        return f"{plan['title']}: driver {loaded} as found"
    return str(plan.get("summary") or "")


def firewall_peers(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The addresses of all nodes that the inventory tells; a node that it only names is told by its name, and refused.

    Args:
        rows: by node its `ADDRESSES`.
    """
    found: dict[str, None] = {}
    for name, row in rows.items():
        told = [str(row[key]) for key in ADDRESSES if row.get(key)] or [name]
        found |= dict.fromkeys([each for each in told if _is_address(each)] or told)
    return list(found)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def time_keeper(names: Sequence[str], states: Sequence[str], servers: Sequence[str], container: bool) -> str:
    """What is to be set up to keep a node's time: chrony, timesyncd, or empty where all is well.

    Args:
        names: services that keep time. states: each one's state, as `systemctl is-active` prints it.
        servers: the site's time servers.
        container: whether the node is one; then the machine outside keeps the time.
    """
    active = {name for name, state in zip(names, states, strict=False) if state == "active"}
    if container or (active and not servers):
        return ""
    # Others than these two are not ours to set up; chrony's package excludes them, and that is told.
    return "timesyncd" if "systemd-timesyncd" in active and not active & {"chrony", "chronyd"} else "chrony"
