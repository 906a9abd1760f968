"""Which layer fails first, from lines of logs as they were met, and what of that comes out of a node."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.stepladder.core.plugins.action import diagnose as diagnose_action
from ansible_collections.stepladder.core.plugins.module_utils import engine_state, evidence, haproxy, serving_state

from stepladder import diagnosis, signatures, status
from stepladder.catalogue import LAYERS, Catalogue
from stepladder.errors import CatalogueError
from stepladder.exit_status import ExitStatus
from stepladder.planner import make_plan
from stepladder.request import parse_request

REPOSITORY = Path(__file__).resolve().parents[2]

KEPT: dict[str, Any] = {
    "plan_id": "abc",
    "endpoints": [{"node": "n0", "replica": 0, "base_url": "http://198.18.0.2:8000/v1"}],
    "node": {"ranks": [{"node": "n0", "address": "198.18.0.2"}, {"node": "n1", "address": "198.18.0.3"}]},
}
START = "stepladder: starting vllm-0 at 2026-11-21T01:00:00Z"
# Outputs of vLLM 0.32.0 on the CPU, of dmesg and df, met here; the line of an argument is argparse's.
BAD_ARGUMENT = "vllm: error: unrecognized arguments: --no-such-flag"
DEAD = (
    "(APIServer pid=16564) ERROR 11-21 10:03:08 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: "
    "EngineCore encountered an issue. See stack trace (above) for the root cause."
)
NOISE = [
    "(APIServer pid=5124) ERROR 11-21 00:06:50 [serving.py:274] Error with model error=ErrorInfo(message='The model "
    "`no-such-model` does not exist. Valid aliases: t.', type='NotFoundError', param='model', code=404)",
    'INFO:     127.0.0.1:35280 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error',
    "(APIServer pid=5124) WARNING 11-20 23:59:56 [system_utils.py:255] Found ulimit of 20000 and failed to "
    "automatically increase with error current limit exceeds maximum limit. This can cause fd limit errors like "
    "`OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n",
]
OOM = "[Sat Nov 21 09:11:09 2026] Out of memory: Killed process 30211 (VLLM::Worker_TP) total-vm:98372136kB"
XID = "[Sat Nov 21 09:00:00 2026] NVRM: Xid (PCI:0000:1b:00): 79, pid=1122, GPU has fallen off the bus."
OLD = [START, DEAD]
NO_DRIVER = ["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."]
FULL = [START, "OSError: [Errno 28] No space left on device"]
CUT = ["n1 198.18.0.3: does not answer (No route to host)"]
CLOCK = json.dumps({"local_time": "Sat Nov 21 10:00:00 2026"})


def state(**changes: Any) -> dict[str, Any]:
    return {
        "name": "vllm-0",
        "phase": "ready",
        "detail": "port 8000 answers 200",
        "since": 60.0,
        "log_tail": [],
        **changes,
    }


def node(name: str = "n0", texts: dict[str, list[str]] | None = None, **changes: Any) -> diagnosis.Node:
    states = [state(**changes)]
    return diagnosis.Node(name, rows=status.rows(name, KEPT, states), texts={"machine.json": [CLOCK], **(texts or {})})


def first(*nodes: diagnosis.Node) -> tuple[str, str, str]:
    found = diagnosis.diagnose(nodes).first
    return (found.layer, found.node, found.signature) if found else ("", "", "")


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_signature_is_the_first_that_its_own_examples_meet() -> None:
    for signature in Catalogue().signatures:
        for example in signature.examples:
            met = signatures.match(example.splitlines(), signature.where[0])
            assert met[0].signature.id == signature.id, example


def test_there_are_signatures_of_every_layer_and_verbs_in_their_cures_exist() -> None:
    known = Catalogue().signatures
    assert {signature.layer for signature in known} == set(LAYERS)
    assert len(known) >= 45
    verbs = {path.stem for path in (REPOSITORY / "playbooks").glob("[!_]*.yml")} | {"lint-command"}
    cures = [*(signature.cure for signature in known), *(cure for _, cure in diagnosis.PHASES.values())]
    named = {words[1] for cure in cures for words in re.finditer(r"`([a-z-]+)[ `]", cure)}
    assert named <= verbs


@pytest.mark.parametrize("line", NOISE)
def test_what_a_healthy_engine_writes_is_no_failure(line: str) -> None:
    assert [each.signature.id for each in signatures.match([line], "log")] == []


ENTRY = {
    "id": "x", "layer": "load", "where": ["log"], "pattern": "boom", "title": "T", "cure": "C", "references": ["r"],
    "known": "seen", "examples": ["it goes boom"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**ENTRY, "pattern": "["}], "[0].pattern: Input should be a valid regular expression"),
        ([{**ENTRY, "examples": ["quiet"]}], "its pattern does not match its example 'quiet'"),
        ([{**ENTRY, "layer": "moon"}], "[0].layer: Input should be 'node', 'driver'"),
        ([{**ENTRY, "cures": "C"}], "[0].cures: Extra inputs are not permitted"),
        ([{**ENTRY, "before": "never", "examples": ["boom"]}], "its pattern does not match"),
        ([ENTRY, ENTRY], "[1].id: expected one of its own; found 'x'"),
        ({"x": ENTRY}, "expected a list of signatures, found dict"),
    ],
)
def test_a_wrong_catalogue_is_named(entries: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "signatures.yml").write_text(json.dumps(entries))
    with pytest.raises(CatalogueError, match=re.escape(message)):
        _ = Catalogue(tmp_path).signatures


# --- which layer -----------------------------------------------------------------------------------------------------

ILL = {"phase": "crash_looping", "detail": "ended and is about to be started again (exit status 1)"}
HANGS = {"phase": "unhealthy", "detail": "port 8000 answers 200, but it gave no token within 10 s"}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        pytest.param([node()], ("", "", ""), id="healthy"),
        pytest.param([node(texts={"logs/vllm-0.log": OLD, "kernel.txt": [XID]})], ("", "", ""), id="old-errors"),
        pytest.param(
            [node(texts={"logs/vllm-0.log": [START, BAD_ARGUMENT]}, **ILL)], ("load", "n0", "bad-argument"), id="log"
        ),
        pytest.param(
            [node(texts={"logs/vllm-0.log": [START, BAD_ARGUMENT, START, "INFO loads"]}, **ILL)],
            ("load", "n0", "bad-argument"),
            id="the-start-before-the-one-that-goes-on",
        ),
        pytest.param(
            [node(texts={"logs/vllm-0.log": [START, "OSError: [Errno 28] x", START, DEAD]}, **ILL)],
            ("serve", "n0", "engine-dead"),
            id="an-earlier-start-plays-no-part",
        ),
        pytest.param(
            [node(texts={"logs/vllm-0.log": [START, DEAD], "kernel.txt": [OOM]}, **ILL)],
            ("node", "n0", "out-of-memory"),
            id="the-kernel-before-its-consequence",
        ),
        pytest.param(
            [node(texts={"kernel.txt": [OOM]}, **HANGS)], ("serve", "n0", ""), id="a-hang-is-not-the-oom-killer's"
        ),
        pytest.param(
            [node(texts={"kernel.txt": [OOM.replace("21 09", "21 01")]}, **ILL)], ("load", "n0", ""), id="too-long-ago"
        ),
        pytest.param(
            [node(texts={"gpus.txt": NO_DRIVER}, **ILL)],
            ("driver", "n0", "driver-gone"),
            id="driver",
        ),
        pytest.param(
            [node(texts={"disks.txt": ["/dev/sda1  9G  9G  0 100% /var", "/dev/loop1 9M 9M 0 100% /snap/x"]}, **ILL)],
            ("node", "n0", "disk-full"),
            id="disk",
        ),
        pytest.param(
            [node(texts={"disks.txt": ["/dev/loop1       64M   64M     0 100% /snap/core20"]}, **ILL)],
            ("load", "n0", ""),
            id="a-snap-is-always-full",
        ),
        pytest.param([diagnosis.Node("n0", reached=False, problem="no"), node("n1")], ("node", "n0", ""), id="down"),
        pytest.param(
            [node(**HANGS), node("n1", texts={"logs/vllm-1.log": FULL})],
            ("node", "n1", "disk-full-log"),
            id="the-cause-in-a-peers-log",
        ),
        pytest.param(
            [node(texts={"network/peers.txt": CUT}, **HANGS), node("n1")],
            ("network", "n0", "peer-silent"),
            id="network",
        ),
        pytest.param(
            [node(texts={"logs/vllm-0.log": [START, BAD_ARGUMENT, START, "INFO serves"]}, **HANGS)],
            ("serve", "n0", ""),
            id="a-hang-is-not-what-ended-an-earlier-start",
        ),
        pytest.param([node(name="n0", phase="stopped", detail="does not run")], ("load", "n0", ""), id="stopped"),
    ],
)  # fmt: skip
def test_the_first_layer_that_fails(nodes: list[diagnosis.Node], expected: tuple[str, str, str]) -> None:
    assert first(*nodes) == expected


def test_what_an_earlier_release_wrote_plays_no_part() -> None:
    later = START.replace("T01", "T02")
    loading = node(texts={"logs/vllm-0.log": [START, BAD_ARGUMENT, later, "INFO loads"]}, phase="loading", detail="d")
    assert first(loading)[2] == "bad-argument"
    assert first(dataclasses.replace(loading, since="2026-11-21T01:30:00Z"))[2] == ""
    assert first(dataclasses.replace(loading, since="2026-11-21T03:00:00Z"))[2] == ""


def test_gone_weights_of_what_does_not_run() -> None:
    rows = status.rows("n0", KEPT, [state(**ILL)])
    gone = diagnosis.Node("n0", rows=rows, missing=["/m/.stepladder/manifest.json"])
    assert first(gone)[0] == "weights"
    assert (
        first(diagnosis.Node("n0", rows=status.rows("n0", KEPT, [state()]), missing=["/v/.stepladder.json"]))[0] == ""
    )


SERVER = {
    "replica": 0, "status": "UP", "drained": False, "weight": 100, "in_flight": 3, "in_rotation": True, "check": "L7OK",
    "agent": "", "address": "a", "drained_by": None,
}  # fmt: skip
BY = {"who": "ann", "origin": "ops1", "since": "2026-11-21T01:00:00Z"}


@pytest.mark.parametrize(
    ("gateway", "layer", "line"),
    [
        ({"problem": "", "servers": [SERVER]}, "", ""),
        ({"problem": "socket does not answer", "servers": []}, "serve", "socket does not answer"),
        (
            {
                "problem": "",
                "servers": [{**SERVER, "in_rotation": False, "drained": True, "drained_by": BY, "in_flight": 0}],
            },
            "serve",
            "replica 0: out, drained by ann from ops1 since 2026-11-21T01:00:00Z, 0 request(s) left",
        ),
        (
            {"problem": "", "servers": [{**SERVER, "in_rotation": False, "status": "DOWN", "check": "L4CON refused"}]},
            "serve",
            "replica 0: OUT, DOWN (L4CON refused)",
        ),
    ],
)
def test_a_gateway_that_lets_nobody_through_fails_while_engines_are_well(
    gateway: dict[str, Any], layer: str, line: str
) -> None:
    found = diagnosis.diagnose([node(), diagnosis.Node("gw", gateway=gateway)])
    assert (found.first.layer, found.first.line) == (layer, line) if found.first else layer == ""


OUT = {**SERVER, "replica": 1, "in_rotation": False, "status": "DOWN", "check": "L4TOUT", "place": "n1:8000"}


def test_a_replica_that_the_gateway_does_not_reach_fails_while_its_engine_is_well() -> None:
    front = diagnosis.Node("gw", gateway={"problem": "", "servers": [SERVER, OUT]})
    found = diagnosis.diagnose([node(), front]).findings
    assert [(each.layer, each.node, each.line) for each in found] == [("serve", "gw", "replica 1: OUT, DOWN (L4TOUT)")]
    assert "curl http://n1:8000/health" in found[0].cure


HERE, THERE = "198.18.0.2:8000", "198.18.0.9:8000"
ENGINES, FRONT = {"engines": True, "gateway": False}, {"engines": False, "gateway": True}


def found_with(
    front: dict[str, Any], expected: dict[str, bool], kept: dict[str, Any] = KEPT, run: str = ""
) -> list[Any]:
    """What is found with an engine of this slice and a gateway, as the nodes tell it."""
    lease = {"state": "held", "run": run} if run else None
    release = {"slice": kept, "known": [], "lease": lease, "unreadable": ""}
    engine = diagnosis.node_found("n0", release, [state()] if kept else [], {}, ENGINES)
    told = diagnosis.node_found("gw", {**release, "slice": {}}, [], {"gateway": front}, expected)
    nodes = [diagnose_action.node_of(name, each, Path("/nowhere")) for name, each in (("n0", engine), ("gw", told))]
    return list(diagnosis.diagnose(nodes).findings)


@pytest.mark.parametrize(
    ("servers", "line"),
    [
        ([{**SERVER, "place": HERE}], ""),
        ([SERVER], ""),
        # What it does not reach is at the wrong place, and not told again as left out.
        (
            [{**OUT, "replica": 0, "place": THERE}],
            f"it has replica 0 at {THERE}, and it answers at {HERE}",
        ),
        (
            [{**SERVER, "place": HERE}, {**OUT, "place": THERE}],
            f"it has replica 1 at {THERE}, and no node has that replica",
        ),
        (
            [{**SERVER, "replica": 1, "place": THERE}],
            f"it has replica 1 at {THERE}, and no node has that replica; it does not know replica 0, which answers at "
            f"{HERE}",
        ),
    ],
)  # fmt: skip
def test_a_gateway_of_another_release_is_named_before_what_it_leaves_out(
    servers: list[dict[str, Any]], line: str
) -> None:
    title = "The gateway was made for another release than the one that runs"
    front = {"problem": "", "servers": servers}
    found = found_with(front, FRONT)
    first = [("serve", "gw", title, line)] if line else []
    assert [(each.layer, each.node, each.title, each.line) for each in found][:1] == first
    assert "The gateway leaves out a replica that nobody drained" not in [each.title for each in found]
    assert title not in [each.title for each in found_with(front, FRONT, run="r1")]


def test_a_gateway_with_no_engine_behind_it_and_one_that_is_left_behind_have_a_cure() -> None:
    front = {"problem": "", "servers": [{**SERVER, "place": HERE}]}
    alone = found_with(front, FRONT, {})
    assert [(each.layer, each.node, each.title, each.line) for each in alone] == [
        ("serve", "gw", "The gateway runs, and nothing is deployed behind it", f"replica 0 at {HERE}")
    ]
    assert alone[0].cure == "`deploy` puts engines behind it; `remove` takes it away."
    gw = diagnosis.Node("gw", gateway=front)
    # Nobody knows what those run that a limit leaves out.
    assert diagnosis.diagnose([gw], unasked=["n0"]).findings == ()
    left = found_with(front, {"engines": True, "gateway": False})
    title = "A gateway is left behind where the inventory has none any more"
    assert [(each.title, each.cure.partition(".")[0]) for each in left] == [(title, "`gateway` removes it")]


def test_an_agent_that_is_silent_is_named_as_its_host_tells_it() -> None:
    front = {"problem": "", "agent_problem": "L4CON refused", "servers": [{**SERVER, "place": HERE}]}
    found = found_with(front, FRONT)
    assert [(each.title, each.line) for each in found] == [("The gateway's agent does not answer", "L4CON refused")]


def test_a_replica_whose_engine_is_named_is_not_named_again_for_the_gateway() -> None:
    front = diagnosis.Node("gw", gateway={"problem": "", "servers": [SERVER, OUT]})
    ill = diagnosis.Node("n0", rows=status.rows("n0", KEPT, [{**state(**ILL), "name": "vllm-1"}]))
    found = diagnosis.diagnose([ill, front]).findings
    assert [(each.node, each.process) for each in found] == [("n0", "vllm-1")]
    other = {**SERVER, "replica": 0, "in_rotation": False, "status": "DOWN", "check": "L4TOUT"}
    front = diagnosis.Node("gw", gateway={"problem": "", "servers": [{**OUT, "in_rotation": True}, other]})
    assert [each.node for each in diagnosis.diagnose([ill, front]).findings] == ["n0", "gw"]


@pytest.mark.parametrize(
    ("by", "live", "fails"),
    [("r1", "", True), ("r1", "r1", False), ("r1", "r2", True), ("", "r2", False), ("", "", True)],
)
def test_what_a_dead_rollout_left_out_is_named(by: str, live: str, fails: bool) -> None:
    out = {**SERVER, "replica": 1, "in_rotation": False, "drained": True, "taken_out": True, "in_flight": 0}
    out["taken_out_by"] = by
    gateway = {"problem": "", "servers": [SERVER, out]}
    engine = dataclasses.replace(node(), at_work=live)
    found = diagnosis.diagnose([engine, diagnosis.Node("gw", gateway=gateway)]).first
    assert (found is not None) is fails
    if found:
        assert (found.layer, found.node, found.cure) == ("serve", "gw", "`deploy` finishes it, and puts it back.")
        assert found.line == "replica 1: OUT, 0 request(s) left, taken out by a rollout that ended; run deploy"
    serving = {"gateway": None}
    expired, lives = {"state": "expired", "run": "r1"}, {"state": "held", "run": "r1"}
    for held, expected in ((None, ""), (expired, ""), (lives, "r1")):
        release = {"slice": KEPT, "known": [], "lease": held, "unreadable": ""}
        told = diagnosis.node_found("n0", release, [], serving, {"engines": False, "gateway": False})
        assert diagnose_action.node_of("n0", told, Path("/nowhere")).at_work == expected


def test_a_release_that_cannot_be_read_is_not_nothing_deployed() -> None:
    release = {"slice": {}, "known": [], "lease": None, "unreadable": "/s/plan.json: Expecting value"}
    told = diagnosis.node_found("n0", release, [], {}, {"engines": True, "gateway": False})
    found = diagnosis.diagnose([diagnose_action.node_of("n0", told, Path("/nowhere")), node("n1")])
    assert [(each.layer, each.node, each.title) for each in found.findings] == [
        ("node", "n0", "The release cannot be read")
    ]
    assert "its release cannot be read, /s/plan.json: Expecting value" in found.findings[0].line
    assert "`deploy` writes the release again." in diagnosis.text(found, "step3", "2026-11-21T10:00:00Z")
    alone = diagnosis.diagnose([diagnose_action.node_of("n0", told, Path("/nowhere"))])
    assert "nothing is deployed" not in diagnosis.text(alone, "step3", "2026-11-21T10:00:00Z")


def test_the_text_names_layer_line_cure_and_reference() -> None:
    found = diagnosis.diagnose(
        [node(texts={"logs/vllm-0.log": ["x", START, BAD_ARGUMENT], "kernel.txt": [XID]}, **ILL)]
    )
    assert diagnosis.text(found, "step3", "2026-11-21T10:00:00Z").splitlines()[:8] == [
        "Diagnosis of step3, 2026-11-21T10:00:00Z: the first layer that fails is 'driver' (GPUs and their driver)",
        "  where      n0",
        "  what       A GPU has fallen off the bus",
        f"  line       nodes/n0/kernel.txt:1: {XID}",
        "  cure       Drain the node, restart it; if it comes again, have the GPU, its riser and its power looked at.",
        "  reference  NVIDIA: Xid 79",
        "",
        "Layer by layer:",
    ]
    text = diagnosis.text(found, "step3", "2026-11-21T10:00:00Z")
    assert "  load        FAILS on n0 vllm-0: The engine does not know an argument" in text
    assert "  node        nothing found" in text
    assert text.splitlines()[-5:] == [
        "  load        FAILS on n0 vllm-0: The engine does not know an argument",
        "  not known while driver fails: container, weights, network, rendezvous, serve",
        "",
        "It fails there too:",
        f"  load, n0 vllm-0: The engine does not know an argument ({BAD_ARGUMENT})",
    ]
    assert f"nodes/n0/logs/vllm-0.log:3: {BAD_ARGUMENT}" not in text
    document = json.loads(diagnosis.document(found, "step3", "now"))
    assert document["first_failing_layer"] == "driver"
    assert document["findings"][1]["place"] == "nodes/n0/logs/vllm-0.log:3"


def test_the_text_of_what_is_well_and_of_nothing() -> None:
    assert diagnosis.text(diagnosis.diagnose([node()]), "d", "T") == "Diagnosis of d, T: no layer fails"
    gateway = {"problem": "it was never installed here", "servers": []}
    empty = diagnosis.diagnose([diagnosis.Node("n0", rows=status.rows("n0", None, []), gateway=gateway)])
    assert diagnosis.text(empty, "d", "T") == (
        "Diagnosis of d, T: nothing is deployed under this name. Run the verb 'deploy'."
    )


def test_status_says_what_a_known_failure_is_and_what_mends_it() -> None:
    rows = status.rows("n0", KEPT, [state(log_tail=["usage: vllm", BAD_ARGUMENT], first_errors=[BAD_ARGUMENT], **ILL)])
    known = "  n0 vllm-0 is known for: The engine does not know an argument. It is in deployment_extra_arguments"
    assert known in status.text(rows)
    assert json.loads(status.text(rows, "json"))["processes"][0]["cure"].startswith("The engine does not know")
    for phase in ("ready", "loading"):
        assert "known for" not in status.text(status.rows("n0", KEPT, [state(phase=phase, log_tail=[BAD_ARGUMENT])]))


# --- what comes out of a node ----------------------------------------------------------------------------------------

SECRET = "zX7-planted-value"


def planted(tmp_path: Path) -> Path:
    """A deployment with the same secret in every place that a person may put one."""
    root = tmp_path / "state/deployments/d"
    release = root / "releases/p1/vllm-0"
    release.mkdir(parents=True)
    (root / "current").symlink_to("releases/p1")
    (root / "secrets").mkdir()
    (root / "secrets/ray-token").write_text("ray-" + SECRET + "\n")
    (tmp_path / "hf").write_text("file-" + SECRET + "\n")
    (release / "env").write_text(f"HF_TOKEN='{SECRET}'\nPLAIN='yes'\n")
    (release / "run").write_text(
        f"#!/bin/sh\nX=$(read_secret '{tmp_path / 'hf'}')\n"
        f"exec \\\n    vllm \\\n    serve \\\n    --api-key \\\n    flag-{SECRET}\n"
    )
    plan = {"node": {"processes": [{"argv": ["vllm", "--api-key", f"flag-{SECRET}"], "env": {"HF_TOKEN": SECRET}}]}}
    (root / "releases/p1/plan.json").write_text(json.dumps({**plan, "long": ["x" * 50] * 100}))
    logs = root / "logs"
    logs.mkdir()
    (logs / "vllm-0.log").write_text(
        f"INFO uses {SECRET} here and ray-{SECRET}, file-{SECRET}, flag-{SECRET}\n"
        "proxy http://ann:hunter2hunter2@198.18.0.9:3128/ AWS_SECRET_ACCESS_KEY=aws-aws-aws-aws\n"
        "https://hooks.slack.com/services/T0/B0/slackslack https://open.feishu.cn/open-apis/bot/v2/hook/feishufeishu\n"
        "Authorization: Bearer eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl\n"
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----\nafter the key\n"
    )
    return root


def test_no_planted_secret_comes_out(tmp_path: Path) -> None:
    root = planted(tmp_path)
    texts = {**evidence.gather(str(root), {}, "supervisor"), **evidence.gather_more(str(root), {})}
    path = Path(evidence.archive(texts, 10_000_000, evidence.known_secrets(str(root)), [str(tmp_path)]))
    assert path.stat().st_mode & 0o777 == 0o600
    whole = "\n".join(line for lines in diagnose_action.read_archive(path).values() for line in lines)
    for secret in (SECRET, "hunter2", "aws-aws", "slackslack", "feishufeishu", "eyJ", "MIIEpA"):
        assert secret not in whole, secret
    assert "INFO uses ******** here" in whole
    assert "after the key" in whole
    assert "PLAIN='yes'" in whole
    assert whole.count("x" * 50) == 100
    assert {"logs/vllm-0.log", "release/plan.json", "release/vllm-0/env", "processes.txt", "machine.json"} <= set(texts)


RSA, PKCS8 = "RSA PRIVATE KEY-----", "PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        # JSON in a log.
        ([f'{{"private_key": "-----BEGIN {PKCS8}\\nMIIEv\\n-----END {PKCS8}\\n", "id": 7}}', "after"],
         [f'{{"private_key": "-----BEGIN {PKCS8} ********-----END {PKCS8}\\n", "id": 7}}', "after"]),
        # Longer than a line of a log may be.
        ([f"a -----BEGIN {PKCS8}{'MIIEv' * 1000}-----END {PKCS8} b", "after"],
         [f"a -----BEGIN {PKCS8} ********-----END {PKCS8} b", "after"]),
        # Over several lines, with the key's beginning or end on one of the marks.
        ([f"-----BEGIN {RSA}", "MIIEv", f"-----END {RSA}", "after"],
         [f"-----BEGIN {RSA} ********", f"-----END {RSA}", "after"]),
        ([f"a -----BEGIN {RSA}\\nMIIEv", "MIIEv", f"MIIEv-----END {RSA} b", "after"],
         [f"a -----BEGIN {RSA} ********", f"-----END {RSA} b", "after"]),
        ([f"a -----BEGIN {RSA}\rMIIEv", "MIIEv", f"-----END {RSA}", "after"],
         [f"a -----BEGIN {RSA} ********", f"-----END {RSA}", "after"]),
        # Two on a line, the second of which goes on.
        ([f"-----BEGIN {RSA}MIIEv-----END {RSA} -----BEGIN {PKCS8}MIIEv", "MIIEv", f"-----END {PKCS8}", "after"],
         [f"-----BEGIN {RSA} ********-----END {RSA} -----BEGIN {PKCS8} ********", f"-----END {PKCS8}", "after"]),
        ([f"-----BEGIN {RSA}", f"MIIEv-----END {RSA} -----BEGIN {RSA}MIIEv", "MIIEv", f"-----END {RSA}", "after"],
         [f"-----BEGIN {RSA} ********", f"-----END {RSA} -----BEGIN {RSA} ********", f"-----END {RSA}", "after"]),
        # No private one.
        (["-----BEGIN CERTIFICATE-----", "MIIEv", "-----END CERTIFICATE-----"],
         ["-----BEGIN CERTIFICATE-----", "MIIEv", "-----END CERTIFICATE-----"]),
    ],
)  # fmt: skip
def test_private_keys_are_masked_however_they_stand_in_lines(
    tmp_path: Path, lines: list[str], shown: list[str]
) -> None:
    assert evidence.clean(lines, 100_000).splitlines() == shown
    log = tmp_path / "log"
    log.write_text("\n".join(lines))
    assert evidence.clean(engine_state.tail(log, 100), 100_000).splitlines() == shown


def test_a_secret_file_with_a_private_key_changes_nothing_about_where_a_key_ends() -> None:
    lines = [f"-----BEGIN {RSA}", "MIIEv", f"-----END {RSA}", "after"]
    shown = evidence.clean(lines, 100_000, ["-----BEGIN", "-----END", "KEY-----"]).splitlines()
    assert shown[2:] == ["after"]
    assert "MIIEv" not in shown[0] + shown[1]


def test_an_archive_goes_elsewhere_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, other = tmp_path / "full", tmp_path / "other"
    full.mkdir()
    other.mkdir()
    real = evidence.add_text

    def add(tar: tarfile.TarFile, name: str, text: str) -> None:
        if str(full) in str(getattr(tar.fileobj, "name", tar.name)) or next(iter(full.iterdir()), None):
            raise OSError(28, "No space left on device")
        real(tar, name, text)

    monkeypatch.setattr(evidence, "add_text", add)
    path = Path(evidence.archive({"a": ["b"]}, 1000, (), [str(full), str(other)]))
    assert path.parent == other
    assert list(full.iterdir()) == []
    with pytest.raises(OSError, match="No space left"):
        evidence.archive({"a": ["b"]}, 1000, (), [str(full)])


def test_an_archive_is_capped(tmp_path: Path) -> None:
    texts = {"logs/a.log": [f"line {number} {os.urandom(20).hex()}" for number in range(5000)], "b": ["short"]}
    whole = diagnose_action.read_archive(Path(evidence.archive(texts, 20_000, (), [str(tmp_path)])))
    assert sum(len(line) + 1 for lines in whole.values() for line in lines) < 20_100
    assert whole["b"] == ["short"]
    assert whole["logs/a.log"][0] == evidence.LEFT_OUT
    assert whole["logs/a.log"][-1].startswith("line 4999 ")


def test_a_program_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because'; exit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert evidence._output(("nvidia-smi",)) == ["NVIDIA-SMI has failed because"]
    program.write_text("#!/bin/sh\nsleep 20\n")
    monkeypatch.setattr(evidence, "COMMAND_SECONDS", 0.2)
    assert evidence._output(("nvidia-smi",)) == ["nvidia-smi does not answer within 0.2 s"]
    assert evidence._output(("no-such-program",)) == []


def test_a_knock_tells_who_is_there() -> None:
    assert evidence.knock("n1", "127.0.0.1", [9]) == "n1 127.0.0.1: is there, refuses port 9"
    assert evidence.knock("n1", "no-such-host.invalid", [9, 22]).startswith(
        "n1 no-such-host.invalid: does not answer ("
    )
    processes = [{"health": {"kind": "http", "port": 8000}}, {"health": {"kind": "none"}}]
    deployment = {"node": {**KEPT["node"], "processes": processes}}
    assert diagnosis.peers("n0", deployment) == {"n1": {"address": "198.18.0.3", "ports": [22, 8000]}}
    assert diagnosis.peers("n0", {}) == {}


# --- the archive on the controller -----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        AnsibleActionFail, match=r"The folder /no/such for the archive is not there\. Give another folder: -e diagnose_"
    ):
        diagnose_action.refuse_directory(Path("/no/such"))
    monkeypatch.setattr(diagnose_action.os, "access", lambda *_: False)
    with pytest.raises(AnsibleActionFail, match=r"may not be written by \S+\. Give another folder"):
        diagnose_action.refuse_directory(tmp_path)


def test_a_full_disk_leaves_no_half_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diagnose_action.evidence, "add_text", full)
    with pytest.raises(
        AnsibleActionFail, match=r"could not be written: No space left on device\. What fails stands above"
    ):
        diagnose_action.pack(tmp_path / "a.tar.gz", "a", {"README.txt": "x"}, [])
    assert list(tmp_path.iterdir()) == []


def test_the_archive_has_the_summary_first_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    diagnose_action.pack(path, "a", {"README.txt": "x"}, [node(texts={"logs/v.log": ["y"]})])
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a/README.txt", "a/nodes/n0/logs/v.log", "a/nodes/n0/machine.json"]


def test_what_a_node_sends_writes_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "n.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../../evil", "/etc/evil", "good"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert diagnose_action.read_archive(path) == {"good": ["x"]}
    path.write_bytes(b"no archive")
    assert diagnose_action.node_of("n", {"reached": True}, tmp_path).problem.startswith("what it sent cannot be read: ")
    assert not diagnose_action.node_of("m", None, tmp_path).reached


INVENTORY = """
all:
  hosts:
    here: {ansible_connection: local, ansible_python_interpreter: "{{ ansible_playbook_python }}"}
    gone: {ansible_host: 127.0.0.1, ansible_port: 9}
  children:
    engines: {hosts: {here: , gone: }}
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """For a state directory, whose path may have 80 characters."""
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_real_run_names_the_node_that_is_down_and_gathers_the_other(short_path: Path) -> None:
    """With a release on this machine whose environment is gone, and a node behind a port that refuses."""
    wish = {
        "deployment": {"model": "tiny-step3p5", "engine": "vllm", "name": "d"},
        "state_directory": f"{short_path}/state",
    }
    request = parse_request({**wish, "nodes": [{"name": "here", "address": "127.0.0.1", "gpu": "cpu"}]})
    root = planted(short_path)
    slice_of_it = make_plan(request, Catalogue()).slices()["here"]
    (root / "releases/p1/plan.json").write_text(json.dumps(slice_of_it))
    (short_path / "hosts.yml").write_text(INVENTORY)
    settings = {
        "deployment_name": "d",
        "stepladder_state_directory": f"{short_path}/state",
        "diagnose_directory": str(short_path),
    }
    command = [
        sys.executable,
        "bin/stepladder",
        "diagnose",
        "-i",
        str(short_path / "hosts.yml"),
        "-e",
        json.dumps(settings),
    ]
    folder = short_path / "tmp"
    folder.mkdir()
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == ExitStatus.NOT_READY, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "the first layer that fails is 'node'" in lines[0]
    assert lines[1:3] == ["  where      gone", "  what       The node does not answer"]
    assert "Connection refused" in lines[3]
    assert "  container   FAILS on here: The environment is gone or not complete" in lines
    (archive,) = short_path.glob("stepladder-d-*.tar.gz")
    found = diagnose_action.read_archive(archive)
    whole = "\n".join(line for part in found.values() for line in part)
    assert SECRET not in whole
    top = archive.name.removesuffix(".tar.gz")
    assert found[f"{top}/nodes/here/logs/vllm-0.log"][0] == "INFO uses ******** here and ********, ********, ********"
    assert json.loads("\n".join(found[f"{top}/summary.json"]))["first_failing_layer"] == "node"
    assert list(folder.glob("stepladder-diagnose-*")) == []


# --- gateway and watchdog --------------------------------------------------------------------------------------------


def test_who_drained_is_kept_and_struck_off(tmp_path: Path) -> None:
    serving_state.note_drained(str(tmp_path), "replica-1", "ann", "ops1")
    assert {**serving_state.drained_by(str(tmp_path))["replica-1"], "since": ""} == {**BY, "since": ""}
    serving_state.note_drained(str(tmp_path), "replica-1", "", "")
    assert serving_state.drained_by(str(tmp_path)) == {}
    (tmp_path / "drained.json").write_text("[]")
    assert serving_state.drained_by(str(tmp_path)) == {}


# As HAProxy 2.6.12 said on the loopback, 2026-11-22: nobody listens, silence, another program's answer.
REFUSED, SILENT, FOREIGN = "L4CON Connection refused", "* L7TOUT", "CHECKED agent reports an error : HTTP/1.1"
EMPTY = "L7RSP TCPCHK got an empty response at step 2"


@pytest.mark.parametrize(
    ("agents", "said"),
    [
        ([], ""), (["INI", "INI"], ""), ([""], ""), (["INI", REFUSED], REFUSED), ([REFUSED, REFUSED], REFUSED),
        (["L7OK via agent : up (idle)", REFUSED], ""), (["* L7STS via agent : down (x)", SILENT], ""),
        ([SILENT], "L7TOUT"), ([FOREIGN], FOREIGN), ([EMPTY], EMPTY),
    ],
)  # fmt: skip
def test_an_agent_that_answers_for_no_replica_is_told_of(agents: list[str], said: str) -> None:
    servers = [haproxy.Server(f"replica-{n}", "UP", 100, 0, 0, "L7OK", agent, "a") for n, agent in enumerate(agents)]
    assert serving_state.agent_problem(servers) == said


def test_a_gateway_without_its_processes_says_so(tmp_path: Path) -> None:
    assert serving_state.gateway(str(tmp_path)) is None
    (tmp_path / "current").mkdir()
    found = serving_state.gateway(str(tmp_path))
    assert found is not None
    assert "does not answer (No such file or directory). Run the verb 'gateway' again." in found["problem"]


def test_what_the_watchdog_wrote(tmp_path: Path) -> None:
    assert serving_state.watchdog(str(tmp_path)) is None
    (tmp_path / "settings.json").write_text("{}")
    assert serving_state.watchdog(str(tmp_path)) == {"problem": "it has written nothing yet", "mode": "", "engines": []}
    engine = {"stalls": 2, "restarts": 1, "in_a_row": 1, "last_restart": 900.0, "state": "busy", "detail": "d"}
    (tmp_path / "state.json").write_text(json.dumps({"at": 1000.0, "mode": "restart", "engines": {"vllm-0": engine}}))
    found = serving_state.watchdog(str(tmp_path), now=1010.0)
    assert found == {
        "problem": "",
        "mode": "restart",
        "engines": [
            {"process": "vllm-0", "state": "busy", "detail": "d", "stalls": 2, "restarts": 1, "last_restart_ago": 110.0}
        ],
    }
    silent = serving_state.watchdog(str(tmp_path), now=1100.0)
    assert silent is not None
    assert silent["problem"] == "it gave no sign of life for 100 s"
    (tmp_path / "state.json").write_text("{")
    broken = serving_state.watchdog(str(tmp_path))
    assert broken is not None
    assert "state.json cannot be read: " in broken["problem"]


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        ("max_tokens=100 and https://host/path@x", "max_tokens=100 and https://host/path@x"),
        ("pip index http://u:pw@h/simple", f"pip index http://u:{engine_state.MASK}@h/simple"),
    ],
)
def test_clean_line(line: str, clean: str) -> None:
    assert engine_state.clean_line(line) == clean
