"""The exchange of weights between nodes: who brings what, as tables; and the whole of it on loopback addresses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import yaml
from ansible.template import Templar, trust_as_template
from ansible_collections.stepladder.core.plugins.action.model_weights import ActionModule
from ansible_collections.stepladder.core.plugins.module_utils import weights, weights_manifest
from ansible_collections.stepladder.core.plugins.module_utils.weights_manifest import Listed, Proven
from ansible_collections.stepladder.core.plugins.module_utils.weights_request import Request
from ansible_collections.stepladder.core.plugins.module_utils.weights_spread import (
    Claims,
    Exchange,
    Fellow,
    View,
    batch,
    next_claims,
    rivalled,
    streams,
)
from ansible_collections.stepladder.core.plugins.plugin_utils.progress import ProgressAction
from test_weights import flip

import hub
import spread as program
from stepladder.spread import exchanges, shares

GB = 10**9
CLIENT = Path(sys.executable).with_name("modelscope")
MODEL = "stepfun-ai/tiny"
ROLE = Path(program.__file__).parents[1]
VARIABLES = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())
BRING = yaml.safe_load((ROLE / "tasks" / "bring.yml").read_text())

# ---- who brings what -------------------------------------------------------------------------------------------------

SIZES = {"a": 4 * GB, "b": 4 * GB, "c": 4 * GB, "d": 4 * GB, "config.json": 900, "code.py": 90}
SHARES = {
    "nobody has anything": (
        {"n1": [], "n2": []},
        {"n1": ["a", "c", "code.py", "config.json"], "n2": ["b", "d"]},
    ),
    "what one has proven before is fetched by nobody": (
        {"n1": ["a"], "n2": []},
        {"n1": ["b", "d"], "n2": ["c", "code.py", "config.json"]},
    ),
    "a node that has all gives it, each file to one of the others first": (
        {"n1": list(SIZES), "n2": [], "n3": []},
        {"n2": ["a", "c", "code.py", "config.json"], "n3": ["b", "d"]},
    ),
    "all have all": ({"n1": list(SIZES), "n2": list(SIZES)}, {}),
}


@pytest.mark.parametrize(("have", "expected"), SHARES.values(), ids=SHARES)
def test_shares(have: dict, expected: dict) -> None:
    assert shares(SIZES, have) == expected


def test_shares_of_a_real_model_are_even() -> None:
    sizes = {f"model-{number:05}.safetensors": 4 * GB for number in range(160)}
    loads = [sum(sizes[path] for path in paths) for paths in shares(sizes, {f"n{i}": [] for i in range(64)}).values()]
    assert max(loads) - min(loads) <= 4 * GB


def test_shares_of_many_small_files_are_even_too() -> None:
    sizes = {f"{number:04}.bin": 8_000_000 for number in range(300)}
    loads = [len(paths) for paths in shares(sizes, {"n1": [], "n2": [], "n3": []}).values()]
    assert max(loads) - min(loads) <= 12


def node(address: str, complete: bool = False, revision: str = "v1") -> dict:
    wanted = [] if complete else [{"path": "a", "size": GB}, {"path": "b", "size": GB}]
    return {"address": address, "model_id": "x/y", "revision": revision, "complete": complete, "wanted": wanted}


def test_exchanges_are_between_nodes_that_need_the_same() -> None:
    found = exchanges(
        {"n1": node("198.18.0.1"), "n2": node("198.18.0.2"), "n3": node("198.18.0.3", revision="v2")}, 29870
    )
    assert found["n3"] == {}
    assert found["n1"]["run"] == found["n2"]["run"]
    assert found["n2"]["peers"] == {"n1": "198.18.0.1"}
    assert found["n1"]["shares"] == {"n1": ["a"], "n2": ["b"]}
    assert found["n1"]["givers"] == []


ALONE = {
    "one node": {"n1": node("198.18.0.1")},
    "on loopback no peer can be reached": {"n1": node("127.0.0.1"), "n2": node("127.0.0.1")},
    "all have it": {"n1": node("198.18.0.1", True), "n2": node("198.18.0.2", True)},
}


FORESEEN = {
    "a look has just seen it": ({"missing": True}, False, True),
    "a string, as templates give": ({"missing": "False"}, False, False),
    "it may have to be passed on": ({"missing": False, "spread": {"run": "r"}}, False, True),
    "every byte would be read": ({"verify": "full"}, False, True),
    "the user wants to know": ({"missing": True, "spread": {"run": "r"}, "verify": "full"}, True, False),
}


@pytest.mark.parametrize(("arguments", "check_mode", "skipped"), FORESEEN.values(), ids=FORESEEN)
def test_no_second_look(arguments: dict, check_mode: bool, skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[dict] = []
    monkeypatch.setattr(ProgressAction, "_foresee", lambda self, arguments: looked.append(arguments) or {})
    action = ActionModule.__new__(ActionModule)
    action._task = SimpleNamespace(check_mode=check_mode)
    assert action._foresee(arguments) == ({"changed": True} if skipped else {})
    assert bool(looked) is not skipped
    assert "missing" not in arguments  # it is nothing that the module knows


TO_DO = ["note that a is still right, though it was touched"]
HOW = {
    # complete, actions, exchange, check: whether there is something to do, how, and whether all is read afterwards
    "nothing": (True, [], {}, "cheap", False, "cheap", False),
    "a full check of one that gives to nobody": (True, [], {}, "full", True, "full", False),
    "who gives does so first, and is read afterwards": (True, [], {"run": "r"}, "full", True, "cheap", True),
    "who gives and was touched": (True, TO_DO, {"run": "r"}, "cheap", True, "cheap", False),
    "touched": (True, TO_DO, {}, "cheap", True, "cheap", False),
    "one that lacks something reads first what it has": (False, ["fetch"], {"run": "r"}, "full", True, "full", False),
}


@pytest.mark.parametrize("case", HOW.values(), ids=HOW)
def test_how_weights_are_brought(case: tuple) -> None:
    complete, actions, exchange, check, due, verify, afterwards = case
    values = {
        **{name: trust_as_template(text) for name, text in VARIABLES.items() if isinstance(text, str)},
        "__model_weights_look": {"complete": complete, "actions": actions},
        "__model_weights_exchange": exchange,
        "model_weights_check": check,
    }
    templar = Templar(None, values)
    told = [templar.template(trust_as_template(f"{{{{ __model_weights_{name} }}}}")) for name in ("due", "verify")]
    assert told == [due, verify]
    (last,) = (task for task in BRING if task["name"] == "Read every byte of what was given to others")
    assert all(templar.evaluate_conditional(trust_as_template(one)) for one in last["when"]) is afterwards


@pytest.mark.parametrize(("above", "expected"), [(4 * GB, True), (4 * GB + 1, False)])
def test_an_exchange_is_worth_its_seconds(above: int, expected: bool) -> None:
    found = exchanges({"n1": node("198.18.0.1"), "n2": node("198.18.0.2")}, 29870, above)
    assert [bool(part) for part in found.values()] == [expected, expected]


@pytest.mark.parametrize("nodes", ALONE.values(), ids=ALONE)
def test_no_exchange(nodes: dict) -> None:
    assert exchanges(nodes, 29870) == {name: {} for name in nodes}


FILES = [Listed(name, 4 * GB, "") for name in "abcdef"]
OWNERS = {"a": "n1", "b": "n1", "c": "n2", "d": "n2", "e": "n3", "f": "n3"}
WISH = Claims("n1", OWNERS, workers=1)
HERE = Fellow(alive=True, met=True, done=False)
GONE = Fellow(alive=False, met=True, done=False)
NEW = Fellow(alive=True, met=False, done=False)


def holding(*paths: str, claims: tuple[str, ...] = ()) -> Fellow:
    return Fellow(alive=True, met=True, done=False, have=frozenset(paths), claims=frozenset(claims))


EIGHT = [Listed(name, 4 * GB, "") for name in "abcdefgh"]
SLOW = Claims("n1", dict.fromkeys("abcdefgh", "n2"), workers=8)


def fetches(*paths: str, left: int = 4 * GB, rate: float = -1.0) -> Fellow:
    return replace(holding(claims=paths), left=dict.fromkeys(paths, left), rate=rate)


CLAIMS = {
    "its own first, as many as one run takes": (WISH, FILES, {"n2": NEW, "n3": NEW}, [], ["a"]),
    "not what is arriving": (WISH, FILES[:2], {"n2": HERE}, ["a"], ["b"]),
    "not what a peer holds": (WISH, FILES[:2], {"n2": holding("a", "b")}, [], []),
    "not what a peer had before": (Claims("n1", OWNERS, (), {"n2": ["a", "b"]}, 1), FILES[:2], {"n2": NEW}, [], []),
    "nothing while somebody has all of it": (Claims("n1", OWNERS, ("n2",)), FILES[:2], {"n2": NEW}, [], []),
    "all of it where who had it is gone": (Claims("n1", OWNERS, ("n2",)), FILES[:2], {"n2": GONE}, [], ["a", "b"]),
    "what a lost peer should have brought, by turns": (
        Claims("n1", OWNERS, workers=8), FILES[2:4], {"n2": GONE, "n3": HERE}, [], ["c"],
    ),
    "the other half goes to the other": (
        Claims("n3", OWNERS, workers=8), FILES[2:4], {"n2": GONE, "n1": HERE}, [], ["d"],
    ),
    "a slow peer's last file, which it does not come to soon": (WISH, FILES[2:4], {"n2": HERE}, [], ["d"]),
    "not what a slow peer comes to next": (WISH, FILES[2:3], {"n2": HERE}, [], []),
    "nothing of a peer that was not met yet": (WISH, FILES[2:4], {"n2": NEW}, [], []),
    "nothing of a slow peer while something arrives": (WISH, FILES[2:4], {"n2": HERE}, ["c"], []),
    "half of what a slow peer has not begun with, as much as a minute brings": (
        SLOW, EIGHT, {"n2": fetches("a", "b")}, [], ["f", "g"],
    ),
    "less where its own hub is slow too": (
        replace(SLOW, rate=50e6), EIGHT, {"n2": fetches("a", "b")}, [], ["f"],
    ),
    "the only one that it has not begun with": (SLOW, EIGHT[:3], {"n2": fetches("a", "b")}, [], ["c"]),
    "what it fetches, where this node is done with it in under half the time": (
        SLOW, EIGHT[:2], {"n2": fetches("a", "b", left=2 * GB, rate=20e6)}, [], ["b"],
    ),
    "what it fetches, and nothing comes": (
        SLOW, EIGHT[:1], {"n2": fetches("a", left=1 * GB, rate=0.0)}, [], ["a"],
    ),
    "not what it fetches nearly as fast": (SLOW, EIGHT[:1], {"n2": fetches("a", left=4 * GB, rate=70e6)}, [], []),
    "not what it is about to have": (SLOW, EIGHT[:1], {"n2": fetches("a", left=GB // 10, rate=20e6)}, [], []),
    "not what it has just begun": (SLOW, EIGHT[:1], {"n2": fetches("a", left=4 * GB, rate=-1.0)}, [], []),
    "not what two fetch already": (
        SLOW, EIGHT[:1], {"n2": fetches("a", left=4 * GB, rate=1.0), "n3": fetches("a", left=4 * GB)}, [], [],
    ),
    "nothing of a peer that reads what lies there": (SLOW, EIGHT, {"n2": replace(HERE, busy=True)}, [], []),
    "not what a peer has lost that had all of it": (
        Claims("n1", OWNERS, ("n2",)), FILES[:2], {"n2": replace(HERE, lost=frozenset("b"))}, [], ["b"],
    ),
}  # fmt: skip
GIVEN = Claims("n1", OWNERS, ("n3",))
DOUBTED = {
    "its own, whoever holds it": (FILES[:2], {"n3": holding("a", "b")}, [], ["a"], ["a"]),
    "a fellow's is left to it while it fetches": (
        FILES[2:3], {"n3": holding("c"), "n2": holding(claims=("c",))}, [], ["c"], [],
    ),
    "and before it does": (FILES[2:3], {"n3": holding("c"), "n2": HERE}, [], ["c"], []),
    "not what comes from there now": (FILES[2:3], {"n3": holding("c"), "n2": holding("c")}, ["c"], ["c"], []),
    "what its owner has and does not come": (FILES[2:3], {"n3": holding("c"), "n2": holding("c")}, [], ["c"], ["c"]),
    "what its owner should have brought and is gone": (FILES[2:3], {"n3": holding("c"), "n2": GONE}, [], ["c"], ["c"]),
}  # fmt: skip


@pytest.mark.parametrize(("missing", "fellows", "coming", "doubted", "expected"), DOUBTED.values(), ids=DOUBTED)
def test_claims_of_what_came_wrong(missing: list, fellows: dict, coming: list, doubted: list, expected: list) -> None:
    done = {name: replace(one, done=True) if name == "n3" else one for name, one in fellows.items()}
    assert next_claims(GIVEN, missing, done, coming, doubted) == expected


BATCHES = {
    "two files of 4 GB, before a rate is known": ([4 * GB] * 8, 8, 130e6, 2),
    "as many as a minute brings": ([4 * GB] * 20, 8, 400e6, 6),
    "not more than the client fetches at a time": ([4 * GB] * 20, 8, 5e9, 8),
    "one at least": ([4 * GB] * 8, 8, 1.0, 1),
    "many small ones": ([1000] * 300, 8, 130e6, 200),
    "small ones beside large ones": ([4 * GB, 1000, 4 * GB, 1000, 4 * GB], 8, 130e6, 4),
}


@pytest.mark.parametrize(("sizes", "workers", "rate", "expected"), BATCHES.values(), ids=BATCHES)
def test_batch(sizes: list, workers: int, rate: float, expected: int) -> None:
    files = [Listed(str(number), size, "") for number, size in enumerate(sizes)]
    assert batch(files, workers, rate) == files[:expected]


@pytest.mark.parametrize(("sizes", "expected"), [([4 * GB], 8), ([4 * GB, 4 * GB, 9], 4), ([9] * 20, 8), ([GB] * 9, 1)])
def test_few_large_files_come_in_parts(sizes: list, expected: int) -> None:
    assert streams([Listed(str(number), size, "") for number, size in enumerate(sizes)], 8) == expected


DONE = Fellow(alive=True, met=True, done=True)
PARTING = {
    "nobody was asked yet": ({}, 99.0, False),
    "all know": ({"n2": replace(DONE, knows=True), "n3": replace(DONE, knows=True)}, 0.1, True),
    "one may not know": ({"n2": replace(DONE, knows=True), "n3": DONE}, 3.9, False),
    "and had its time": ({"n2": replace(DONE, knows=True), "n3": DONE}, 4.0, True),
    "one needs something": ({"n2": replace(HERE, knows=True)}, 99.0, False),
    "one may yet come": ({"n2": NEW}, 99.0, False),
    "who needed something is gone": ({"n2": GONE}, 0.1, True),
}


@pytest.mark.parametrize(("fellows", "seconds", "expected"), PARTING.values(), ids=PARTING)
def test_when_a_node_leaves_the_exchange(fellows: dict, seconds: float, expected: bool) -> None:
    exchange = Exchange.__new__(Exchange)
    exchange._view = View(fellows)
    assert exchange._left_alone(seconds) is expected


LOST = {
    "it has what it was seen to have": (["n1"], {}, "ab", []),
    "it had everything": (["n1"], {}, "a", ["b"]),
    "it had some of it": (["n2"], {"n1": ["b"]}, "a", ["b"]),
    "it was seen to have nothing": (["n2"], {"n2": ["b"]}, "", []),
}


@pytest.mark.parametrize(("givers", "held", "kept", "expected"), LOST.values(), ids=LOST)
def test_peers_are_told_of_what_a_node_has_no_more(givers: list, held: dict, kept: str, expected: list) -> None:
    part = {"name": "n1", "givers": givers, "held": held}
    request = Request(MODEL, "/srv/models/tiny", spread=part)
    exchange = Exchange(request, [Listed(path, 1, "") for path in "ab"], SimpleNamespace(), SimpleNamespace())
    told: list[dict] = []
    exchange._tell = lambda **command: told.append(command)
    exchange.begin([Proven(path, 1, "", 0, 0) for path in kept])
    assert [one["path"] for one in told[:-1]] == list(kept)
    assert told[-1] == {"do": "begin", "absent": expected}


RIVALS = {
    "nobody else": ({"n3": ["b"]}, set()),
    "its owner began with it": ({"n9": ["a"]}, {"a"}),
    "another idle one, first by name": ({"n1": ["a"]}, {"a"}),
    "another idle one, later by name": ({"n3": ["a"]}, set()),
}


@pytest.mark.parametrize(("fresh", "expected"), RIVALS.values(), ids=RIVALS)
def test_who_gives_way(fresh: dict, expected: set) -> None:
    assert rivalled("n2", ["a"], {"a": "n9"}, fresh) == expected


@pytest.mark.parametrize(("wish", "missing", "fellows", "coming", "expected"), CLAIMS.values(), ids=CLAIMS)
def test_next_claims(wish: Claims, missing: list, fellows: dict, coming: list, expected: list) -> None:
    assert next_claims(wish, missing, fellows, coming) == expected


def wish(**changes: object) -> program.Wish:
    given = {
        "run": "r", "name": "n2", "address": "", "port": 1, "root": "", "incoming": "", "torrents": "",
        "peers": {"n1": "", "n3": ""},
        "sizes": dict.fromkeys("abcd", 1), "owners": {"a": "n2", "b": "n3", "c": "n2", "d": "n3"}, "givers": ["n1"],
    }  # fmt: skip
    return program.Wish(**{**given, **changes})


SOURCES = {
    "the owner asks who had it": ("a", {"n1": True, "n3": False}, False, ["n1", "n3"]),
    "the others spare who had it": ("b", {"n1": True, "n3": False}, False, ["n3"]),
    "unless the owner has nothing of it": ("b", {"n1": True}, False, ["n1"]),
    "or nothing came for a while": ("b", {"n1": True, "n3": False}, True, ["n1", "n3"]),
}


@pytest.mark.parametrize(("path", "held", "still", "expected"), SOURCES.values(), ids=SOURCES)
def test_sources(path: str, held: dict, still: bool, expected: list) -> None:
    assert program.sources(path, wish(), held, still=still) == expected


def peer(have: str = "", part: str = "", seen: float | None = 100.0) -> program.Peer:
    return program.Peer("", frozenset(have), frozenset(part), seen=seen, started=0.0)


NEXT = {
    "the own ones first": ({"n1": peer("abcd"), "n3": peer(part="bd")}, [], ["a", "c", "b", "d"]),
    "what the owner has not begun waits": ({"n1": peer("abcd"), "n3": peer()}, [], ["a", "c"]),
    "not for an owner that is gone": ({"n1": peer("abcd"), "n3": peer(seen=10.0)}, [], ["a", "c", "b", "d"]),
    "only so many of others at a time": ({"n1": peer("abcd"), "n3": peer("bd")}, ["x"] * 5, ["a", "c", "b"]),
    "only so many of its own, and others beside them": (
        {"n1": peer("abcd"), "n3": peer("bd")},
        ["a", "a", "a"],
        ["b", "d"],
    ),
    "slow owners are not waited for with idle hands": ({"n1": peer("b"), "n3": peer()}, [], ["b"]),
    "nobody has anything": ({"n1": peer(), "n3": peer()}, [], []),
}


@pytest.mark.parametrize(("peers", "active", "expected"), NEXT.values(), ids=NEXT)
def test_next_files(peers: dict, active: list, expected: list) -> None:
    found = program.next_files(wish(), "abcd", active, peers, now=101.0)
    assert sorted(found[:2]) == sorted(expected[:2])
    assert sorted(found) == sorted(expected)


LACKING = {
    "nothing is here": ({}, "abcd"),
    "what is coming or offered": ({"handles": {"a": 1}}, "bcd"),
    "what is here, and about to be offered": ({"given": {"b"}}, "acd"),
    "what is fetched elsewhere": ({"claims": {"c"}}, "abd"),
    "what was here, and is wrong": ({"lost": {"d"}}, "abc"),
    "given up, and somebody has it whole again": ({"abandoned": {"a"}}, "abcd"),
    "given up, and nobody has more than a part": ({"abandoned": {"b", "c"}}, "ad"),
}


@pytest.mark.parametrize(("changes", "expected"), LACKING.values(), ids=LACKING)
def test_lacking(changes: dict, expected: str) -> None:
    none: dict = {"handles": {}, "given": set(), "claims": set(), "lost": set(), "abandoned": set()}
    swarm = SimpleNamespace(wish=wish(), **{**none, **changes})
    assert program.lacking(swarm, {"n1": peer("a"), "n3": peer(part="b")}, now=101.0) == list(expected)


ALIVE = {
    "it had little time yet": ({}, 14.0, True),
    "it was silent from the start": ({}, 16.0, False),
    "its machine answers, and it may come late": ({"near": True}, 59.0, True),
    "it is too late": ({"near": True}, 61.0, False),
    "it answered lately": ({"seen": 90.0}, 104.0, True),
    "it answered once, and is gone": ({"seen": 90.0, "near": True}, 106.0, False),
}


@pytest.mark.parametrize(("changes", "now", "expected"), ALIVE.values(), ids=ALIVE)
def test_a_peer_is_alive(changes: dict, now: float, expected: bool) -> None:
    assert program.Peer("", **{"started": 0.0, **changes}).alive(now) is expected


def test_who_was_not_met_is_named_once_with_what_to_open() -> None:
    wanted = wish(port=29870, peers={"n1": "198.18.0.1", "n3": "198.18.0.3"})
    peers = {
        "n1": program.Peer("198.18.0.1", why="port 29871: timed out", started=0.0),
        "n3": program.Peer("198.18.0.3", seen=1.0, started=0.0),
    }
    assert program.unmet(wanted, peers, now=14.0) == []
    assert program.unmet(wanted, peers, now=16.0) == [
        "n1 (198.18.0.1) was not met in 16 s: port 29871: timed out. Open TCP ports 29870 and 29871 between the nodes; "
        "its share is fetched by others too"
    ]
    assert program.unmet(wanted, peers, now=17.0) == []


@pytest.mark.parametrize(("peers", "soon", "expected"), [(1, True, 0.25), (8, True, 0.5), (63, True, 1), (1, False, 1)])
def test_seconds_between_two_questions(peers: int, soon: bool, expected: float) -> None:
    assert program.poll_seconds(peers, soon=soon) == expected


@pytest.mark.parametrize(("size", "piece"), [(1, 65536), (64_000_000, 65536), (4 * GB, 4194304), (10**12, 16777216)])
def test_pieces(size: int, piece: int) -> None:
    assert program.piece_bytes(size) == piece


# ---- the program alone -----------------------------------------------------------------------------------------------

# With shorter times than the program's own, in seconds.
IMPATIENT = "import sys, spread; spread.PEER_GONE_SECONDS = 3.0; spread.STILL_SECONDS = 1.0; spread.main(sys.argv[1:])"
PAIR = {"n1": "127.0.0.21", "n2": "127.0.0.22"}


class Programs:
    """Nodes that are one `spread.py` each, with the events that it said; n1 has the file `a` at the start."""

    def __init__(self, folder: Path, port: int, size: int, bytes_per_second: int) -> None:
        self.folder, self.size, self.port, self.limit = folder, size, port, bytes_per_second
        self.content = os.urandom(size)
        self.runs: dict[str, subprocess.Popen[str]] = {}
        self.said: dict[str, list[dict]] = {}
        (folder / "n1").mkdir(parents=True)
        (folder / "n1" / "a").write_bytes(self.content)

    def start(self, name: str) -> None:
        config = self.folder / f"{name}.json"
        wish = {
            "run": "r", "name": name, "address": PAIR[name], "port": self.port, "root": str(self.folder / name),
            "incoming": str(self.folder / name / "incoming"), "torrents": str(self.folder / name / "torrents"),
            "sizes": {"a": self.size}, "owners": {"a": "n2"},
            "peers": {other: PAIR[other] for other in PAIR if other != name}, "givers": ["n1"],
            "bytes_per_second": self.limit,
        }  # fmt: skip
        config.write_text(json.dumps(wish))
        run = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, str(config)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.runs[name], said = run, self.said.setdefault(name, [])
        threading.Thread(target=lambda: said.extend(json.loads(line) for line in run.stdout), daemon=True).start()
        if name == "n1":
            self.tell(name, do="give", path="a", key="a", fresh=False)
        self.tell(name, do="begin", absent=[])

    def end(self) -> None:
        for run in self.runs.values():
            run.kill()
            run.wait()
            run.stdin.close()

    def again(self) -> None:
        self.said.clear()
        for name in PAIR:
            self.start(name)

    def tell(self, name: str, **command: object) -> None:
        print(json.dumps(command), file=self.runs[name].stdin, flush=True)

    def last(self, kind: str, name: str = "n2") -> dict:
        """What a node said last of a kind; empty where it said nothing yet."""
        return next((one for one in reversed(self.said[name]) if one["event"] == kind), {})

    def wait_for(self, condition: Callable[[], object], seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited in vain; said last: {self.said['n2'][-3:]}"
            time.sleep(0.02)


@pytest.fixture
def programs(tmp_path: Path, unused_port: int) -> Iterator[Callable[[int, int], Programs]]:
    pytest.importorskip("libtorrent", reason="comes with requirements/test.txt")
    made: list[Programs] = []

    def make(size: int, bytes_per_second: int) -> Programs:
        made.append(Programs(tmp_path, unused_port, size, bytes_per_second))
        for name in PAIR:
            made[0].start(name)
        return made[0]

    yield make
    made[0].end()


def test_a_peers_limit_holds_on_a_private_network(programs: Callable) -> None:
    pair = programs(3_000_000, 1_000_000)
    pair.wait_for(lambda: pair.last("rates").get("coming"))
    begun = time.monotonic()
    pair.wait_for(lambda: pair.last("came"))
    assert time.monotonic() - begun >= 1.5  # less the second that libtorrent lets through at once


def test_torrents_are_kept_and_what_changed_since_is_given_to_nobody(programs: Callable) -> None:
    pair = programs(3_000_000, 0)
    kept = pair.folder / "n1" / "torrents" / "a"
    assert not kept.exists()
    pair.wait_for(lambda: pair.last("came"))
    pair.tell("n2", do="give", path="a", key="a", fresh=True)
    pair.wait_for((pair.folder / "n2" / "torrents" / "a").exists)
    assert kept.exists()
    pair.end()
    flip(pair.folder / "n1" / "a", keep_mtime=True)
    (pair.folder / "n2" / "a").unlink()
    (pair.folder / "n2" / "torrents" / "a").unlink()
    pair.again()
    pair.wait_for(lambda: pair.last("peers").get("peers", {}).get("n1", {}).get("lost") == ["a"])
    assert not kept.exists()
    assert any("weights_check=full" in one.get("text", "") for one in pair.said["n1"])
    assert not (pair.folder / "n2" / "a").exists()
    # Nor is it written there from elsewhere: it is in a store that is complete, and a full check is to find it.
    wrong = (pair.folder / "n1" / "a").stat()
    pair.wait_for(lambda: not pair.last("rates")["coming"])
    (pair.folder / "n2" / "a").write_bytes(pair.content)
    pair.tell("n2", do="give", path="a", key="a", fresh=True)
    pair.wait_for(lambda: pair.last("peers", "n1")["peers"]["n2"]["have"] == ["a"])
    looks = len(pair.said["n1"])
    pair.wait_for(lambda: len(pair.said["n1"]) >= looks + 3)
    assert not any(one["event"] == "came" for one in pair.said["n1"])
    now = (pair.folder / "n1" / "a").stat()
    assert (now.st_ino, now.st_mtime_ns) == (wrong.st_ino, wrong.st_mtime_ns)
    assert not (pair.folder / "n1" / "incoming").exists()


def test_a_file_whose_giver_dies_in_the_middle_is_fetched_elsewhere(programs: Callable) -> None:
    pair = programs(2_000_000, 500_000)
    pair.wait_for(lambda: pair.last("rates").get("incoming", 0) >= 400_000)
    pair.runs["n1"].kill()
    pair.wait_for(lambda: not pair.last("rates")["coming"], seconds=10)
    seen = pair.last("peers")["peers"]["n1"]
    assert not seen["alive"]
    fellow = Fellow(seen["alive"], seen["met"], seen["done"], frozenset(seen["have"]))
    wish = Claims("n2", {"a": "n2"}, ["n1"])
    assert next_claims(wish, [Listed("a", 2_000_000, "")], {"n1": fellow}, pair.last("rates")["coming"]) == ["a"]
    # It was not called wrong, and what came of it is not fetched again from a giver that comes back.
    pair.runs["n1"].wait()
    pair.start("n1")
    pair.wait_for(lambda: pair.last("came"))
    assert (pair.folder / "n2" / "a").read_bytes() == pair.content
    pair.wait_for(lambda: pair.said["n2"][-1]["event"] == "rates")
    assert pair.last("rates")["received"] <= 1_700_000


def test_what_came_of_a_file_in_part_makes_room_when_it_is_fetched_elsewhere(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text("part")
    swarm = SimpleNamespace(wish=wish(incoming=str(tmp_path)), handles={"b": "arrives"}, claims=set())
    program.obey(swarm, {"do": "claim", "paths": ["a", "b", "d"]})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b", "c"]


# ---- the whole of it -------------------------------------------------------------------------------------------------

RUN = """
import json, sys
from ansible_collections.stepladder.core.plugins.module_utils import weights
try:
    print(json.dumps(weights.ensure(weights.Request(**json.loads(sys.argv[1])), "present")))
except weights.WeightsError as error:
    sys.exit(f"WeightsError: {error}")
"""


class Cluster:
    """Nodes that are folders, with an address of 127.0.0.0/8 each; a hub that counts what leaves it."""

    def __init__(self, folder: Path, served: hub.Hub, port: int) -> None:
        self.folder, self.served, self.port = folder, served, port
        self.runs: dict[str, subprocess.Popen[str]] = {}

    def root(self, name: str) -> Path:
        return self.folder / name / "models" / "tiny" / "master"

    def start(
        self,
        nodes: dict[str, str],
        have: dict[str, list[str]] | None = None,
        only: Sequence[str] = (),
        limits: Mapping[str, int] | None = None,
        **more: object,
    ) -> None:
        """Begin on every node, or on some `only`.

        `nodes` are addresses by name, `have` what is proven there, `limits` of the hub, `more` is for the exchange.
        """
        origin = self.served.tree.files(MODEL)
        wanted = [{"path": name, "size": path.stat().st_size} for name, path in origin.items()]
        looked = {
            name: {
                "address": address, "model_id": MODEL, "revision": "master", "wanted": wanted,
                "have": (have or {}).get(name, []), "complete": len((have or {}).get(name, [])) == len(wanted),
            }
            for name, address in nodes.items()
        }  # fmt: skip
        # Loopback is refused for real nodes; here it is what keeps them apart.
        elsewhere = {name: {**one, "address": f"198.18.0.{len(name)}{name}"} for name, one in looked.items()}
        parts = exchanges(elsewhere, self.port)
        for name, part in parts.items():
            if only and name not in only:
                continue
            part.update(address=nodes[name], peers={other: nodes[other] for other in nodes if other != name})
            part.update({"python": sys.executable, "program": program.__file__, **more})
            request = {
                "model_id": MODEL, "path": str(self.root(name)), "client": str(CLIENT), "endpoint": self.served.url,
                "spread": part, "retries": 1, "patience": 0, "max_workers": 2,
                "bytes_per_second": (limits or {}).get(name, 0),
            }  # fmt: skip
            self.runs[name] = subprocess.Popen(
                [sys.executable, "-c", RUN, json.dumps(request)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip

    def begin_complete(self, name: str) -> None:
        """Have a node hold everything, proven, without an exchange."""
        request = Request(MODEL, str(self.root(name)), client=str(CLIENT), endpoint=self.served.url)
        weights.ensure(request, "present")
        self.served.bytes_sent.clear()

    def failure(self, name: str) -> str:
        """What a node that has to fail said."""
        _, err = self.runs[name].communicate(timeout=90)
        assert self.runs[name].returncode == 1, err
        return err

    def wait_for(self, condition: Callable[[], bool], seconds: float = 40) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "waited in vain"
            assert all(run.poll() is None for run in self.runs.values()), "a node ended too soon"
            time.sleep(0.02)

    def answers(self, *names: str) -> dict[str, dict]:
        found = {}
        for name in names or tuple(self.runs):
            out, err = self.runs[name].communicate(timeout=90)
            assert self.runs[name].returncode == 0, f"{name}: {err}"
            found[name] = json.loads(out)
        return found

    def names(self) -> list[str]:
        return [*self.served.tree.files(MODEL)]

    def egress(self) -> int:
        return sum(self.served.bytes_sent.values())

    def assert_right(self, *names: str) -> None:
        for name in names:
            for path, place in self.served.tree.files(MODEL).items():
                assert (self.root(name) / path).read_bytes() == place.read_bytes(), f"{name}: {path}"
            assert (self.root(name) / ".stepladder" / "complete").exists()
            assert not (self.root(name) / ".stepladder" / "incoming").exists()


@pytest.fixture
def cluster(tmp_path: Path, unused_port: int) -> Iterator[Cluster]:
    pytest.importorskip("libtorrent", reason="comes with requirements/test.txt")
    root = tmp_path / "hub" / MODEL
    root.mkdir(parents=True)
    for number in range(6):
        (root / f"model-{number}.safetensors").write_bytes(os.urandom(17_000_000))
    (root / "config.json").write_bytes(b"{}")
    with hub.Hub(tmp_path / "hub") as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        found = Cluster(tmp_path, served, unused_port)
        yield found
        for run in found.runs.values():
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
        served.shutdown()
        thread.join()


@pytest.fixture
def silent(unused_port: int) -> Iterator[str]:
    """An address whose ports take connections and say nothing, as behind a filter that drops what comes."""
    with contextlib.ExitStack() as opened:
        for port in (unused_port, unused_port + 1):
            opened.enter_context(socket.create_server(("127.0.0.19", port)))
        yield "127.0.0.19"


@pytest.fixture
def unused_port() -> int:
    """Of two in a row that nobody has; the lower half of what the system never hands out by itself."""
    return 20000 + os.getpid() % 5000 * 2


ADDRESSES = {"n1": "127.0.0.11", "n2": "127.0.0.12", "n3": "127.0.0.13"}
TOTAL = 6 * 17_000_000 + 2


def test_every_byte_leaves_the_hub_once(cluster: Cluster) -> None:
    cluster.start(ADDRESSES)
    answers = cluster.answers()
    cluster.assert_right(*ADDRESSES)
    assert cluster.egress() == TOTAL
    assert sum(one["bytes_from_peers"] for one in answers.values()) == 2 * TOTAL
    # A node that comes later takes all of it from those that have it.
    have = {name: [*cluster.served.tree.files(MODEL)] for name in ADDRESSES}
    cluster.runs.clear()
    cluster.start({**ADDRESSES, "n4": "127.0.0.14"}, have)
    assert cluster.answers()["n4"]["bytes_from_peers"] == TOTAL
    cluster.assert_right("n4")
    assert cluster.egress() == TOTAL


class Recorded:
    """Stands in for an exchange, and keeps when its parts are called."""

    calls: ClassVar[list[tuple]] = []

    def __init__(self, *arguments: object) -> None:
        self.calls.clear()
        self.bad, self.from_peers, self.troubles = [], 0, []

    def start(self, kept: Iterable[Proven]) -> None:
        self.calls.append(("start", [one.path for one in kept]))

    def run(self, proven: Iterable[Proven], missing: Sequence[Listed], complete: Callable[[], object]) -> None:
        self.calls.append(("run", [one.path for one in proven], [one.path for one in missing]))
        complete()

    def close(self) -> None:
        self.calls.append(("close",))


def test_a_node_listens_before_it_reads_what_lies_there(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cluster.root("n1")
    shutil.copytree(cluster.folder / "hub" / MODEL, root)  # by hand
    monkeypatch.setattr(weights, "Exchange", Recorded)
    hash_file = weights_manifest.hash_file
    monkeypatch.setattr(
        weights_manifest,
        "hash_file",
        lambda *arguments, **named: Recorded.calls.append(("read",)) or hash_file(*arguments, **named),
    )
    weights.ensure(Request(MODEL, str(root), endpoint=cluster.served.url, spread={"run": "r"}), "present")
    first, *reads, run, last = Recorded.calls
    assert (first, last) == (("start", []), ("close",))
    assert reads == [("read",)] * 7
    assert (sorted(run[1]), run[2]) == (sorted(cluster.names()), [])


@pytest.mark.parametrize("busy", [True, False])
def test_nothing_comes_while_a_node_reads_what_lies_there(busy: bool) -> None:
    swarm = SimpleNamespace(
        wish=wish(), busy=True, absent=set(), lost=set(), given={"a": "key"}, coming=set(), moving=set()
    )
    swarm.handles, swarm.claims, swarm.abandoned = {}, set(), set()
    if not busy:
        program.obey(swarm, {"do": "begin", "absent": ["a", "b"]})
        assert swarm.absent == {"b"}  # the other was given meanwhile
    asked: list[str] = []
    swarm.receive = lambda path, torrent: asked.append(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(program, "ask", lambda wish, address, what: b"")
        program.receive_more(swarm, {"n1": replace(peer("abcd"), seen=time.monotonic())})
    assert sorted(set(asked)) == ([] if busy else ["b", "c", "d"])


def hasty(folder: Path) -> str:
    """The program with a shorter time for peers to be met."""
    place = folder / "hasty.py"
    place.write_text(f"import sys\nsys.path.insert(0, {str(Path(program.__file__).parent)!r})\n{IMPATIENT}\n")
    return str(place)


def test_a_node_that_meets_no_peer_fetches_nothing(cluster: Cluster, silent: str) -> None:
    cluster.start({"n1": "127.0.0.11", "n2": silent}, only=["n1"], program=hasty(cluster.folder))
    said = cluster.failure("n1")
    port = cluster.port
    assert f"  n2 ({silent}): port {port + 1}: timed out" in said
    assert f"open TCP ports {port} and {port + 1} between the nodes, or set model_weights_without_peers to true" in said
    assert cluster.egress() == 0


@pytest.mark.nightly
def test_a_node_that_meets_no_peer_fetches_everything_where_that_is_accepted(cluster: Cluster, silent: str) -> None:
    changes = {"program": hasty(cluster.folder), "without_peers": True}
    cluster.start({"n1": "127.0.0.11", "n2": silent}, only=["n1"], **changes)
    answer = cluster.answers("n1")["n1"]
    cluster.assert_right("n1")
    assert any(f"n2 ({silent}) was not met in" in text for text in answer["warnings"]), answer["warnings"]


@pytest.mark.parametrize("which", [0, 1])
def test_who_holds_a_port_of_the_exchange_is_named(cluster: Cluster, which: int) -> None:
    port = cluster.port + which
    with socket.create_server(("127.0.0.11", port)):
        cluster.start({"n1": "127.0.0.11", "n2": "127.0.0.12"}, only=["n1"])
        said = cluster.failure("n1")
    assert f"127.0.0.11:{port} cannot be listened on: Address already in use; held by pid {os.getpid()}, user " in said
    assert sys.executable in said
    assert "set model_weights_spread_port to another one" in said
    assert cluster.egress() == 0


@pytest.mark.nightly
def test_a_slow_node_does_not_hold_up_the_rest(cluster: Cluster) -> None:
    pair = {name: ADDRESSES[name] for name in ("n1", "n2")}
    begun = time.monotonic()
    cluster.start(pair, limits={"n2": 300_000})
    answers = cluster.answers()
    cluster.assert_right(*pair)
    assert time.monotonic() - begun < 90  # two files at its own rate: 113 s
    assert cluster.egress() <= TOTAL + 2 * 17_000_000
    assert answers["n2"]["extra_files"] == []


@pytest.mark.nightly
@pytest.mark.parametrize("lost", ADDRESSES)
def test_a_node_that_dies_is_replaced(cluster: Cluster, lost: str) -> None:
    cluster.start(ADDRESSES)
    cluster.wait_for(lambda: cluster.egress() >= TOTAL // 4)
    os.killpg(cluster.runs[lost].pid, signal.SIGKILL)
    others = [name for name in ADDRESSES if name != lost]
    cluster.answers(*others)
    cluster.assert_right(*others)
    # Its bytes that it had not passed on leave the hub once more; nobody else's do.
    assert cluster.egress() <= TOTAL + TOTAL // 3 + 17_000_000
    kept = {path.name for path in cluster.root(lost).glob("*.safetensors")}
    before = cluster.egress()
    del cluster.runs[lost]
    cluster.start(ADDRESSES, dict.fromkeys(others, cluster.names()))
    done = cluster.answers()[lost]
    cluster.assert_right(lost)
    assert cluster.egress() == before
    assert done["bytes_from_peers"] <= TOTAL - len(kept) * 17_000_000


@pytest.mark.nightly
def test_a_source_that_dies_is_replaced_by_the_hub(cluster: Cluster) -> None:
    cluster.begin_complete("n1")
    cluster.start(ADDRESSES, {"n1": cluster.names()}, bytes_per_second=12_000_000)
    others = ("n2", "n3")
    cluster.wait_for(lambda: any(cluster.root(name).glob("*.safetensors") for name in others))
    os.killpg(cluster.runs["n1"].pid, signal.SIGKILL)
    cluster.answers(*others)
    cluster.assert_right(*others)
    assert 0 < cluster.egress() <= TOTAL
    before = cluster.egress()
    cluster.runs.clear()
    cluster.start(ADDRESSES, dict.fromkeys(ADDRESSES, cluster.names()))
    cluster.assert_right("n1")
    assert cluster.egress() == before


@pytest.mark.nightly
def test_a_wrong_byte_that_a_peer_does_not_know_of_is_fetched_from_the_hub(cluster: Cluster) -> None:
    cluster.begin_complete("n1")
    flip(cluster.root("n1") / "model-3.safetensors", keep_mtime=True)
    others = ("n2", "n3")
    cluster.start(ADDRESSES, {"n1": cluster.names()})
    answers = cluster.answers()
    cluster.assert_right(*others)
    assert 17_000_000 <= cluster.egress() <= 2 * 17_000_000
    wrong = [one for name in others for one in answers[name]["bad_files"]]
    assert {one["path"] for one in wrong} == {"model-3.safetensors"}
    assert any("n1" in text and "weights_check=full" in text for name in others for text in answers[name]["warnings"])


@pytest.mark.nightly
def test_a_file_that_its_giver_finds_wrong_itself_is_fetched_from_the_hub(cluster: Cluster) -> None:
    cluster.begin_complete("n1")
    flip(cluster.root("n1") / "model-3.safetensors", keep_mtime=False)  # after the look
    pair = {name: ADDRESSES[name] for name in ("n1", "n2")}
    cluster.start(pair, {"n1": cluster.names()})
    answers = cluster.answers()
    cluster.assert_right(*pair)
    assert cluster.egress() == 17_000_000
    assert answers["n1"]["bytes_from_peers"] == 17_000_000


@pytest.mark.nightly
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root to be mounted")
def test_a_full_disk_of_one_node_is_named_and_the_others_go_on(cluster: Cluster) -> None:
    small = cluster.root("n2").parents[1]
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (small / "somebody-elses").write_bytes(bytes(45_000_000))  # enough is free at the start
        cluster.start(ADDRESSES, bytes_per_second=20_000_000)
        cluster.wait_for(lambda: any(cluster.root("n2").glob("*.safetensors")))
        (small / "somebody-elses").write_bytes(bytes(120_000_000))
        assert "No space left on" in cluster.failure("n2")
        cluster.answers("n1", "n3")
        cluster.assert_right("n1", "n3")
        before = cluster.egress()
        (small / "somebody-elses").unlink()
        del cluster.runs["n2"]
        cluster.start(ADDRESSES, dict.fromkeys(("n1", "n3"), cluster.names()))
        cluster.answers()
        cluster.assert_right("n2")
        assert cluster.egress() == before
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.nightly
def test_a_hub_that_goes_away_is_said_by_all_and_a_rerun_goes_on(cluster: Cluster) -> None:
    cluster.start(ADDRESSES, bytes_per_second=8_000_000)
    cluster.wait_for(lambda: cluster.egress() >= TOTAL // 4)
    cluster.served.faults.answer(503, 10_000)
    said = [cluster.failure(name) for name in ADDRESSES]
    assert all("could not fetch" in text or "given up" in text for text in said), said
    with cluster.served.faults._lock:
        cluster.served.faults._statuses.clear()
    proven = {name: sum(path.stat().st_size for path in cluster.root(name).glob("*.safetensors")) for name in ADDRESSES}
    before = cluster.egress()
    cluster.runs.clear()
    have = {name: sorted(path.name for path in cluster.root(name).glob("*.safetensors")) for name in ADDRESSES}
    cluster.start(ADDRESSES, have)
    cluster.answers()
    cluster.assert_right(*ADDRESSES)
    distinct = {path for paths in have.values() for path in paths}
    assert cluster.egress() - before <= TOTAL - len(distinct) * 17_000_000, proven
