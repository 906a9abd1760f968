"""Which release to go back to, over all nodes, and what is said when a new one was given up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

# What is given in place of a plan id for the release that is current.
CURRENT = "current"
# Of a long message the beginning says what, the end has the log's last lines.
FIRST_LINES, LAST_LINES = 5, 10


def choose(
    variables: Mapping[str, Any],
    hosts: Sequence[str],
    wanted: str = "",
    asked: Sequence[str] = (),
    by_itself: bool = False,
) -> dict[str, Any]:
    """The release to go back to and the nodes that take part: whole replicas, all of whose nodes can run it.

    Args:
        variables: of every host; `release_known` and `release_slices` as the role `release` keeps them.
        hosts: nodes to choose from, those that answer.
        wanted: plan id, or its beginning; empty takes what the links `previous` name, `current` what runs or ran last.
        asked: nodes that were to answer.
        by_itself: whether nobody is there to decide: what a node lacks keeps only its own replica from coming back, and
            what runs on it is stopped.

    Returns:
        `plan_id`, `nodes` that bring it back, `leaves`: nodes that run another release and have no part in it, `left`:
        what is not brought back and why, a sentence or empty, and `refusal`, empty where all is well: why nothing can
        be done, with the releases that there are.
    """
    known = {host: variables[host].get("release_known") or [] for host in hosts}
    refused: dict[str, Any] = {"plan_id": "", "nodes": [], "leaves": [], "left": ""}
    name, refusal = _name(known, wanted)
    if refusal:
        return {**refused, "refusal": f"{refusal} {releases_text(known)}"}
    having = {host: kept for host, found in known.items() for kept in found if kept["plan_id"] == name}
    slices = {host: (variables[host].get("release_slices") or {}).get(name, {}) for host in having}
    members = sorted({*having, *(member for kept in slices.values() for member in _members(kept))})
    unfit = {host: why for host in members if (why := _why_unfit(host, having, hosts, asked))}
    # By node those of its own replica without which that cannot run.
    mates = {
        host: lacking
        for host, kept in slices.items()
        if host not in unfit
        and (lacking := [rank["node"] for rank in kept.get("node", {}).get("ranks") or () if rank["node"] in unfit])
    }
    nodes = [host for host in having if host not in unfit and host not in mates]
    faults = [] if by_itself else _faults(unfit, mates, hosts, asked)
    if not nodes:
        faults = faults or [f"{host} {why}" for host, why in unfit.items()]
    if faults:
        text = "\n".join(f"  {fault}" for fault in faults)
        return {**refused, "refusal": f"Release {name} cannot be brought back:\n{text}\n{releases_text(known)}"}
    elsewhere = [host for host, found in known.items() if any(k["current"] and k["plan_id"] != name for k in found)]
    leaves = [host for host in elsewhere if host not in (nodes if by_itself else having)]
    left = [
        *(f"{host} {why}" for host, why in unfit.items()),
        *(f"{h}, whose replica has {', '.join(lacking)}" for h, lacking in mates.items()),
    ]
    return {
        "plan_id": name, "nodes": nodes, "leaves": leaves, "refusal": "",
        "left": f"Not brought back: {'; '.join(left)}." if left else "",
    }  # fmt: skip


def _why_unfit(host: str, having: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], asked: Sequence[str]) -> str:
    """Why a node of a release cannot run it; empty where it can."""
    if host in having:
        return f"has no {', '.join(having[host]['missing'])}" if having[host]["missing"] else ""
    if host in hosts:
        return "has no such release"
    return "did not answer" if host in asked else "was not asked"


def _faults(
    unfit: Mapping[str, str], mates: Mapping[str, Sequence[str]], hosts: Sequence[str], asked: Sequence[str]
) -> list[str]:
    """What a person has to decide before: nodes that answer and lack something, replicas that --limit cuts in two."""
    lines = [f"{host} {why}" for host, why in unfit.items() if host in hosts]
    beside: dict[str, list[str]] = {}
    for host, lacking in mates.items():
        for mate in lacking:
            beside.setdefault(mate, []).append(host)
    lines += [
        f"{mate} {unfit[mate]}, and is in a replica with {', '.join(found)}: add it to --limit"
        for mate, found in beside.items()
        if mate not in asked
    ]
    return lines


def _name(known: Mapping[str, Sequence[Mapping[str, Any]]], wanted: str) -> tuple[str, str]:
    """A plan id, or why there is none."""
    if wanted == CURRENT:
        return _current(known)
    every = list(dict.fromkeys(kept["plan_id"] for found in known.values() for kept in found))
    if wanted:
        fitting = [name for name in every if name == wanted] or [name for name in every if name.startswith(wanted)]
        if len(fitting) == 1:
            return fitting[0], ""
        return "", f"There is no release {wanted}." if not fitting else f"More than one release begins with {wanted}."
    before, where = _linked(known, "previous")
    if len(before) == 1:
        return before[0], ""
    if not before:
        return "", "There is nothing to go back to: no release before the one that runs is known to have run right."
    return "", f"The nodes do not agree on the release before ({where}). Name one with -e rollback_to=ID."


def _current(known: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, str]:
    """The plan id of the release that is current, or why there is none."""
    names, where = _linked(known, "current")
    if len(names) == 1:
        return names[0], ""
    if not names:
        return "", "Nothing is deployed. Run the verb 'deploy'."
    return "", f"The nodes do not agree on the release that is current ({where}). Run the verb 'deploy'."


def _linked(known: Mapping[str, Sequence[Mapping[str, Any]]], link: str) -> tuple[list[str], str]:
    """The releases that a link names on the nodes, and which on which."""
    found = [(host, kept["plan_id"]) for host, kept_there in known.items() for kept in kept_there if kept[link]]
    return list(dict.fromkeys(name for _, name in found)), "; ".join(f"{host}: {name}" for host, name in found)


def _members(kept: Mapping[str, Any]) -> list[str]:
    """The nodes that a slice of a release knows of."""
    ranks = kept.get("node", {}).get("ranks") or ()
    return [*(endpoint["node"] for endpoint in kept.get("endpoints", ())), *(rank["node"] for rank in ranks)]


def releases_text(known: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The releases that there are, newest first, with the nodes that have them."""
    rows: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for host, found in known.items():
        for kept in found:
            rows.setdefault(kept["plan_id"], (kept, []))[1].append(host)
    if not rows:
        return "No release is known."
    newest = sorted(rows.values(), key=lambda row: -row[0]["written"])
    return "\n".join(["Known releases:", *(_release_line(kept, hosts) for kept, hosts in newest)])


def _release_line(kept: Mapping[str, Any], hosts: Sequence[str]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(kept["written"]))
    marks = [word for word, is_so in (("runs now", kept["current"]), ("the way back", kept["previous"])) if is_so]
    words = {"proven": "proven", "failed": "never ran right", "unknown": "never asked"}[kept["outcome"]]
    return "  ".join(
        (" ", kept["plan_id"], written, ", ".join([words, *marks]), kept["runs"], f"on {', '.join(hosts)}")
    )


def failures(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """What went wrong with the new release, node by node; empty where nothing did.

    Args:
        variables: of every host; `release_went` is true or the failure's text, absent where the node did not answer.
        hosts: the nodes of the play.
    """
    lines = []
    for host in hosts:
        went = variables[host].get("release_went")
        if went is not True:
            lines.append(f"{host}: {went or 'did not answer'}")
    return "\n".join(lines)


def is_undrained(variables: Mapping[str, Any], hosts: Sequence[str]) -> bool:
    """Whether a rollout stopped for nothing but a replica that could not be taken out of rotation.

    Nothing of its wave was stopped then, what came before was proven, and nothing speaks against the release.

    Args:
        variables: of every host; `release_not_drained`, the replicas of a wave whose turn did not come, `release_went`.
        hosts: the nodes of the play.
    """
    held = [host for host in hosts if variables[host].get("release_not_drained")]
    return bool(held) and all(variables[host].get("release_went") is True for host in hosts if host not in held)


def failure_text(task: str, failed: Mapping[str, Any]) -> str:
    """A failed task in a few lines; the whole stood on the screen before.

    Args:
        task: its name.
        failed: its result; of a loop the messages of the items that failed count.
    """
    items = [str(item["msg"]) for item in failed.get("results", ()) if item.get("failed") and item.get("msg")]
    message = "\n".join(items) or failed.get("msg")
    found = [line.rstrip() for line in str(message or "no message").splitlines() if line.strip()]
    long = len(found) > FIRST_LINES + LAST_LINES
    shown = [*found[:FIRST_LINES], "  ...", *found[-LAST_LINES:]] if long else found
    return "\n".join([f"{task}:" if task else "it failed:", *(f"  {line}" for line in shown)])


def automatic(
    variables: Mapping[str, Any], hosts: Sequence[str], given_up: str, allowed: bool, asked: Sequence[str] = ()
) -> dict[str, Any]:
    """The release to bring back by itself after a new one was given up, in the form of `choose`.

    Args:
        variables: of every host, as for `choose`, and `release_before`, `release_tried_at`, `release_others`.
        hosts: nodes that can be reached.
        given_up: plan id of the release that did not run right.
        allowed: false where the operator switched the way back off.
        asked: nodes that the run was to change.
    """
    refused = {"plan_id": "", "nodes": [], "leaves": [], "left": ""}
    known = {host: variables[host].get("release_known") or [] for host in hosts}
    if not allowed:
        return {**refused, "refusal": "deploy_way_back is false, so nothing was brought back."}
    mine = [kept for found in known.values() for kept in found if kept["plan_id"] == given_up]
    if any(kept["outcome"] == "proven" for kept in mine) and not _another_runs(variables, hosts, given_up):
        return {
            **refused,
            "refusal": f"Release {given_up} ran right before, so the fault need not be its own, and no other release "
            "was brought back. The verb 'rollback' does that.",
        }
    before: dict[str, list[str]] = {}
    for host, found in known.items():
        marked = [kept for kept in found if kept["current"] and kept["plan_id"] != given_up] or [
            kept for kept in found if kept["previous"]
        ]
        for kept in marked:
            before.setdefault(kept["plan_id"], []).append(host)
    if not before:
        return {
            **refused,
            "refusal": "There is nothing to go back to: no release before it is known to have run right.",
        }
    if len(before) > 1:
        where = "; ".join(f"{name} on {', '.join(found)}" for name, found in before.items())
        return {**refused, "refusal": f"The nodes do not agree on the release before it: {where}."}
    return choose(variables, hosts, next(iter(before)), asked, by_itself=True)


def _another_runs(variables: Mapping[str, Any], hosts: Sequence[str], given_up: str) -> bool:
    """Whether the release before still runs: nothing had been stopped, or replicas that the rollout had not reached."""
    before = {(variables[host].get("release_before") or {}).get("plan_id") for host in hosts} - {None}
    stopped = any(variables[host].get("release_tried_at") for host in hosts)
    others = any(variables[host].get("release_others") for host in hosts)
    return bool(before) and given_up not in before and (others or not stopped)


def ending(variables: Mapping[str, Any], hosts: Sequence[str], now: float) -> dict[str, str]:
    """How a run ended that gave a release up: what is said, and the name of its exit status.

    Args:
        variables: of every host; `release_given_up`, `release_choice`, `release_went`, `release_evidence`,
            `release_told`, `release_too_slow`, `release_tried_at`, `release_others`, `release_suspect` as the role
            `release` keeps them; of a rollout that could not drain `release_not_drained`, `release_rollout`,
            `release_walked`, `deployment_slice`, and `release_dropped_for`, the release without a part for the node.
        hosts: the nodes that were looked at after the failure; none where nothing failed.
        now: seconds since 1970.
    """
    if not hosts:
        return {"text": "", "exit_status": "done"}
    failed, choice = (_first(variables, hosts, name) for name in ("release_given_up", "release_choice"))
    if not failed and any(variables[host].get("release_not_drained") for host in hosts):
        return {"text": _not_drained(variables, hosts), "exit_status": "not_drained"}
    lines = [f"Release {failed['plan_id']} did not run right and was given up:", _indented(failed["reason"])]
    kept = [
        f"{host}:{variables[host]['release_evidence']}" for host in hosts if variables[host].get("release_evidence")
    ]
    if kept:
        lines += ["What shows why:", _indented("\n".join(kept))]
    status = "no_way_back"
    if not choice:
        lines += ["No release was brought back: no node came to choosing one.", *_left(variables, hosts)]
    elif choice["refusal"]:
        lines += [choice["refusal"], *_left(variables, hosts)]
    elif is_undrained(variables, choice["nodes"]):
        lines += [_not_drained_back(variables, choice)]
        status = "not_drained"
    elif wrong := failures(variables, choice["nodes"]):
        lines += [f"Release {choice['plan_id']} was to be brought back, and does not serve either:", _indented(wrong)]
    else:
        outage = _outage(variables, hosts, now)
        lines += [f"Release {choice['plan_id']} serves again: it was asked and answers as promised{outage}."]
        measured = [f"{host}: {text}" for host in choice["nodes"] if (text := variables[host].get("release_told"))]
        lines += [_indented("\n".join(measured))] if measured else []
        lines += [choice["left"]] if choice.get("left") else []
        status = "went_back"
    return {"text": "\n".join(lines), "exit_status": status}


def _first(variables: Mapping[str, Any], hosts: Sequence[str], name: str) -> Any:
    """What the first host has that came so far as to have it; none where none did."""
    return next((found for host in hosts if (found := variables[host].get(name))), None)


def _stopped_at(variables: Mapping[str, Any], hosts: Sequence[str]) -> tuple[Mapping[str, Any], list[int], list[int]]:
    """The variables of the node that could not take a replica out, and the replicas before and from there on."""
    held = variables[next(host for host in hosts if variables[host].get("release_not_drained"))]
    waves, walked = held["release_rollout"]["waves"], held["release_walked"]
    done = [number for wave in waves[:walked] for number in wave["replicas"]]
    rest = [number for wave in waves[walked:] for number in wave["replicas"] or wave["drain"]]
    return held, done, rest


def _not_drained_back(variables: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    """How far a way back came that could not take a replica out of rotation, and how it is finished."""
    held, done, rest = _stopped_at(variables, choice["nodes"])
    suspect = {number for host in choice["nodes"] for number in variables[host].get("release_suspect") or ()}
    dead, as_before = [n for n in rest if n in suspect], [n for n in rest if n not in suspect]
    name = choice["plan_id"]
    back = f"is back but for replica {_listed(rest)}" if done else "was to be brought back, and no replica has it yet"
    starts = f"should one end by itself, it starts as release {name}"
    lines = [
        f"Release {name} {back}: replica {_listed(held['release_not_drained'])} could not be taken out of rotation:",
        _indented(held["release_went"]),
        *([f"Replica {_listed(done)} has it and answers as promised."] if done else []),
        *([f"Replica {_listed(dead)} does not serve."] if dead else []),
        *([f"Replica {_listed(as_before)} runs on as it did; {starts}."] if as_before else []),
        *([choice["left"]] if choice.get("left") else []),
        f"To finish it: rollback -e rollback_to={name}. Where requests are in the way, give them longer "
        "(-e deploy_drain_seconds=...), or add -e deploy_break_requests=true, which breaks them off.",
    ]
    return "\n".join(lines)


def _not_drained(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """Where a rollout stopped that could not take a replica out of rotation, and how it goes on."""
    if any("release_dropped_for" in variables[host] for host in hosts if variables[host].get("release_not_drained")):
        return _not_dropped(variables, hosts)
    held, done, rest = _stopped_at(variables, hosts)
    return _no_further(
        held["deployment_slice"]["plan_id"],
        held["release_not_drained"],
        [
            _indented(held["release_went"]),
            f"Replica {_listed(done)} has it and answers as promised." if done else "Nothing had been stopped.",
            f"Replica {_listed(rest)} runs on as before; should one end by itself, it starts as the new release. "
            "Nothing was marked as failed, and nothing is brought back.",
        ],
    )


def _not_dropped(variables: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """The same for replicas on nodes that the release has no part for."""
    held = {host: known for host in hosts if (known := variables[host]).get("release_not_drained")}
    numbers = sorted({number for known in held.values() for number in known["release_not_drained"]})
    walked = [variables[host]["release_rollout"]["waves"] for host in hosts if "release_rollout" in variables[host]]
    done = [number for wave in (walked[0] if walked else ()) for number in wave["replicas"]]
    return _no_further(
        next(iter(held.values()))["release_dropped_for"],
        numbers,
        [
            *(_indented(f"{host}: {known['release_went']}") for host, known in held.items()),
            *([f"Replica {_listed(done)} has it and answers as promised."] if done else []),
            f"Replica {_listed(numbers)} runs on as before. Nothing was marked as failed, and nothing is brought back.",
        ],
    )


def _no_further(plan_id: str, numbers: Sequence[int], lines: Sequence[str]) -> str:
    return "\n".join(
        [
            f"Release {plan_id} goes no further: replica {_listed(numbers)} could not be taken out of rotation:",
            *lines,
            f"Run the same command again (a rollback with -e rollback_to={plan_id}): it goes on from here. Or give "
            "requests longer: -e deploy_drain_seconds=...",
        ]
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def _left(variables: Mapping[str, Any], hosts: Sequence[str]) -> list[str]:
    """What a rollout that stopped leaves behind."""
    numbers = sorted({number for host in hosts for number in variables[host].get("release_suspect") or ()})
    if not numbers or not any(variables[host].get("release_others") for host in hosts):
        return []
    return [
        f"Replica {_listed(numbers)} does not serve, and gets no requests from a gateway. Replicas that the rollout "
        "had not reached run on as they did. 'deploy' goes on from here, 'rollback' goes back."
    ]


def _outage(variables: Mapping[str, Any], hosts: Sequence[str], now: float) -> str:
    """How long it was away, counted from the first stop."""
    tried = [variables[host]["release_tried_at"] for host in hosts if variables[host].get("release_tried_at")]
    if not tried:
        return "; nothing had been stopped"
    seconds = f"{now - min(tried):.0f} s"
    if any(variables[host].get("release_others") for host in hosts):
        return f", {seconds} after its first replica was stopped; others answered all the time"
    slow = any(variables[host].get("release_too_slow") for host in hosts)
    return f", at most {seconds} after it was stopped{', and the slower one answered meanwhile' if slow else ''}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
