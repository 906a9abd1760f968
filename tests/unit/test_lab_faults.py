"""Which packets a fault drops, what tc is told, what must not be filled, and how faults are told."""

from __future__ import annotations

import pytest

from stepladder.lab import faults
from stepladder.lab.places import LabError
from stepladder.lab.record import Fault, Lab, Node

ALL = ["0.0.0.0/0"]


def lab(*found: Fault) -> Lab:
    nodes = [Node("a", "198.18.0.11", "eth0", "198.18.1.11", "eth1"), Node("b", "198.18.0.12", "lan0"),
             Node("c", "198.18.0.13", "ens3")]  # fmt: skip
    return Lab("l", "t", "unix:///d", True, "198.18.0.0/24", nodes=nodes, faults=list(found))


A, B, C = ["198.18.0.11", "198.18.1.11"], ["198.18.0.12"], ["198.18.0.13"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], ([], [], [])),
        ([Fault("cut", "a", "b")], (B, A, [])),
        ([Fault("cut", "b", "a")], (B, A, [])),
        ([Fault("cut", "b")], (B, [*A, *C], B)),
        ([Fault("cut", "b", settings={"controller": "yes"})], (B, ALL, B)),
        ([Fault("cut", "a", "b"), Fault("cut", "a", "c")], ([*B, *C], A, A)),
        ([Fault("cut", "a", "b"), Fault("cut", "b", "a"), Fault("cut", "b")], (B, [*A, *C], B)),
        ([Fault("slow", "a", settings={"rate": "1mbit"}), Fault("fill", "b")], ([], [], [])),
    ],
)
def test_both_ends_of_a_cut_hear_nothing(found: list[Fault], expected: tuple[list[str], ...]) -> None:
    assert tuple(faults.dropped(lab(*found), name) for name in "abc") == expected


def test_drop_table_replaces_what_was_there() -> None:
    assert faults.drop_table(["198.18.0.12"]) == (
        "*raw\n:STEPLADDER-LAB - [0:0]\n-A STEPLADDER-LAB -s 198.18.0.12 -j DROP\nCOMMIT\n"
    )


@pytest.mark.parametrize(("text", "bits"), [("250mbit", 250e6), ("1.5gbit", 1.5e9), ("8kbit", 8e3), ("100bit", 100)])
def test_rates(text: str, bits: float) -> None:
    assert faults.rate_bits(text) == bits


@pytest.mark.parametrize("text", ["250", "250mbps", "0mbit", "-1mbit", "fast", "1mbit; reboot"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(LabError) as raised:
        faults.rate_bits(text)
    assert str(raised.value) == f"'{text}' is no rate; write it like 250mbit, 1gbit or 800kbit"


@pytest.mark.parametrize("text", ["20", "20 ms", "ms", "-1ms", "20msec"])
def test_what_is_no_delay(text: str) -> None:
    with pytest.raises(LabError, match="is no delay; write it like 20ms"):
        faults.checked_delay(text)


@pytest.mark.parametrize(
    ("rate", "delay", "expected"),
    [
        ("8mbit", "", "tbf rate 8mbit burst 131072 latency 100ms"),
        ("10gbit", "", "tbf rate 10gbit burst 12500000 latency 100ms"),
        ("", "20ms", "netem delay 20ms"),
        ("250mbit", "20ms", "netem delay 20ms rate 250mbit"),
    ],
)
def test_slow_links(rate: str, delay: str, expected: str) -> None:
    assert " ".join(faults.slow_discipline(rate, delay)) == expected


@pytest.mark.parametrize(
    ("target", "kind", "size", "has_disk", "refusal"),
    [
        ("/var", "ext4", 50 * 10**9, True, ""),
        ("/dev/shm", "tmpfs", 1024**3, True, ""),
        ("/run", "tmpfs", 12 * 1024**3, True, "it is 12 GiB of the machine's memory"),
        ("/", "overlay", 10**12, True, "it lies on the machine's own disk (/var is the node's own)"),
        ("/", "overlay", 10**12, False,
         "it lies on the machine's own disk (this machine has no loop devices, so nodes have no own disk)"),
        ("/opt/wheels", "ext4", 10**12, True, "/opt/wheels is not the node's own (ext4)"),
        ("/data", "nfs4", 10**12, True, "/data is not the node's own (nfs4)"),
    ],
)  # fmt: skip
def test_only_what_is_the_nodes_own_is_filled(target: str, kind: str, size: int, has_disk: bool, refusal: str) -> None:
    assert faults.cannot_fill(target, kind, size, has_disk) == refusal


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("cut", "a", "b"), "cut from b"),
        (Fault("cut", "a"), "cut from all nodes"),
        (Fault("cut", "a", settings={"controller": "yes"}), "cut from all nodes and the controller"),
        (Fault("slow", "a", settings={"rate": "1mbit", "delay": ""}), "slow: rate 1mbit"),
        (Fault("fill", "a", settings={"mount": "/var"}), "/var is full"),
    ],
)
def test_faults_in_words(fault: Fault, words: str) -> None:
    assert faults.told(fault) == words
