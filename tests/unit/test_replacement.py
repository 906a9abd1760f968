"""Who stands for whom: only the place of the node that goes is given away, and no name is wrong or twice."""

from __future__ import annotations

import pytest

from stepladder import replacement
from stepladder.errors import PlanRefusedError

HOSTS = ["n1", "n2", "n3", "n4", "s1", "s2"]
USED = HOSTS[:4]


@pytest.mark.parametrize(
    ("replaced", "places"),
    [
        ({}, HOSTS),
        ({"n2": "s1"}, ["n1", "s1", "n3", "n4", "s2"]),
        ({"n2": "s2", "n3": "s1"}, ["n1", "s2", "s1", "n4"]),
        # What is wrong is named by the plan; nothing is lost here.
        ({"x": "s1"}, ["n1", "n2", "n3", "n4", "s2"]),
    ],
)
def test_all_others_keep_their_places(replaced: dict[str, str], places: list[str]) -> None:
    assert replacement.in_place(HOSTS, replaced) == places


@pytest.mark.parametrize(
    ("replaced", "complaints"),
    [
        ({"n2": "s1"}, []),
        ({"gone": "s1"}, ["gone is no host of the group 'engines' any more. Put s1 where gone stood in the inventory"]),
        ({"n2": "s9"}, ["unknown host in deployment_replaced: 's9'. Did you mean '"]),
        ({"x": "y"}, ["unknown host in deployment_replaced: 'x'", "unknown host in deployment_replaced: 'y'"]),
        ({"n2": "s1", "s1": "s2"}, ["s1 takes the place of n2, and is replaced itself. Say of n2 which host"]),
        ({"n3": "s1", "n2": "s1"}, ["s1 takes the places of n2, n3. Give each place a host of its own."]),
    ],
)
def test_wrong_names_are_refused_all_at_once(replaced: dict[str, str], complaints: list[str]) -> None:
    if not complaints:
        replacement.require(HOSTS, replaced)
        return
    with pytest.raises(PlanRefusedError) as refused:
        replacement.require(HOSTS, replaced)
    assert len(refused.value.violations) == len(complaints)
    for complaint in complaints:
        assert complaint in str(refused.value)


@pytest.mark.parametrize(
    ("replaced", "old", "new", "wanted"),
    [
        ({}, "n2", "s1", {"n2": "s1"}),
        ({"n1": "s2"}, "n2", "s1", {"n1": "s2", "n2": "s1"}),
        # Once more changes nothing.
        ({"n2": "s1"}, "n2", "s1", {"n2": "s1"}),
    ],
)
def test_one_more(replaced: dict[str, str], old: str, new: str, wanted: dict[str, str]) -> None:
    assert replacement.with_another(HOSTS, replaced, USED, old, new) == wanted


def test_a_newcomer_that_goes_in_turn_gives_the_first_place_away() -> None:
    used = ["n1", "s1", "n3", "n4"]
    assert replacement.with_another(HOSTS, {"n2": "s1"}, used, "s1", "s2") == {"n2": "s2"}


@pytest.mark.parametrize(
    ("old", "new", "used", "complaint"),
    [
        ("", "s1", USED, "-e node: it is not given. Add -e node=HOST, the host that goes out of service."),
        ("n1", "", USED, "-e by: it is not given. Add -e by=HOST, the one that takes its place."),
        ("n9", "s1", USED, "unknown host: 'n9'. Did you mean '"),
        ("s1", "s2", USED, "the deployment does not use s1. It uses n1, n2, n3, n4. Name one of these."),
        ("n1", "n2", USED, "the deployment uses n2 itself. Name one that is spare: s1, s2."),
        ("n1", "n2", HOSTS, "the deployment uses n2 itself. Add a host to the group 'engines'."),
        ("n1", "n1", USED, "the deployment uses n1 itself."),
    ],
)
def test_an_exchange_that_cannot_be(old: str, new: str, used: list[str], complaint: str) -> None:
    with pytest.raises(PlanRefusedError) as refused:
        replacement.with_another(HOSTS, {}, used, old, new)
    assert complaint in str(refused.value)
