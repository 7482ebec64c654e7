# SPDX-License-Identifier: Apache-2.0
"""Relays: the server's choice for pairs, the agent's reading of it, and both together on meshes of any shape."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel import key_like

import netclient_lite as agent
import netmaker_core
from netclient_lite import View, carrier, guarded
from netmaker_core import Standing, next_relays, pairs_of

NOW, LEAD = 1_000_000, 5


def standing(**values: Any) -> Standing:
    return Standing(**{"here": True, "relay": False, "apart": frozenset(), "relayed": {}, **values})


def nodes(**more: Any) -> dict[str, Standing]:
    """Two nodes that do not reach each other, and a relay."""
    found = {"a": standing(), "b": standing(), "r": standing(relay=True)}
    found.update({name: standing(**values) for name, values in more.items()})
    return found


MUTE = {("a", "b"), ("b", "a")}
ALIVE = {("a", "r"), ("b", "r")}
HELD = {"a": {"relayed": {"b": ("r", 0)}}, "b": {"relayed": {"a": ("r", 0)}}}


def asked(found: dict[str, Standing], mute: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that are relayed, and those with a word of silence."""
    held = ((one, other) for one, each in found.items() for other in each.relayed)
    return {(min(pair), max(pair)) for pair in (*held, *mute)}


def changes(found: dict[str, Standing], alive: set[tuple[str, str]], mute: set[tuple[str, str]], now: int = NOW) -> Any:
    return next_relays(asked(found, mute), found, alive, mute, now, LEAD)


def test_a_mute_pair_gets_a_relay_that_both_reach():
    assert changes(nodes(), ALIVE, MUTE) == {("a", "b"): ("r", 0)}
    assert changes(nodes(), {("r", "a"), ("b", "r")}, MUTE) == {("a", "b"): ("r", 0)}  # seen from either end


@pytest.mark.parametrize(
    ("found", "alive", "mute"),
    [
        (nodes(), ALIVE, {("a", "b")}),  # one end alone
        (nodes(), {("a", "r")}, MUTE),  # the relay reaches one of them
        (nodes(r={"relay": False}), ALIVE, MUTE),
        (nodes(r={"relay": True, "here": False}), ALIVE, MUTE),
        (nodes(r={"relay": True, "apart": frozenset("a")}), ALIVE, MUTE),
        (nodes(a={"apart": frozenset("b")}, b={"apart": frozenset("a")}), ALIVE, MUTE),
        (nodes(b={"here": False}), ALIVE, MUTE),
        (nodes(), set(), {("a", "r"), ("r", "a")}),  # a relay does not relay itself
    ],
)
def test_what_gets_no_relay(found, alive, mute):
    assert changes(found, alive, mute) == {}


def test_the_relay_with_the_fewest_pairs_is_taken():
    found = nodes(q={"relay": True}, c={"relayed": {"d": ("q", 0)}}, d={"relayed": {"c": ("q", 0)}})
    alive = {*ALIVE, ("a", "q"), ("b", "q"), ("c", "q"), ("d", "q")}
    assert changes(found, alive, MUTE) == {("a", "b"): ("r", 0)}


def test_a_pair_that_shakes_hands_goes_direct_at_one_instant():
    found, direct = nodes(**HELD), {*ALIVE, ("a", "b"), ("b", "a")}
    assert changes(found, ALIVE, MUTE) == {}
    assert changes(found, {*ALIVE, ("a", "b")}, set()) == {}  # both have to see it
    assert changes(found, direct, set()) == {("a", "b"): ("r", NOW + LEAD)}
    leaving = nodes(a={"relayed": {"b": ("r", NOW + LEAD)}}, b={"relayed": {"a": ("r", NOW + LEAD)}})
    assert changes(leaving, direct, set()) == {}
    assert changes(leaving, direct, set(), NOW + LEAD + LEAD + 1) == {("a", "b"): None}


def test_a_relay_that_is_gone_is_replaced_or_dropped():
    gone = nodes(**HELD, r={"relay": False})
    assert changes(gone, ALIVE, MUTE) == {("a", "b"): None}
    found = nodes(**HELD, r={"relay": False}, q={"relay": True})
    assert changes(found, {("a", "q"), ("b", "q")}, MUTE) == {("a", "b"): ("q", 0)}
    assert changes({"a": nodes(**HELD)["a"], "r": standing(relay=True)}, ALIVE, set()) == {("a", "b"): None}
    away = nodes(a={"here": False, **HELD["a"]}, b=HELD["b"], r={"relay": False})
    assert changes(away, ALIVE, MUTE) == {("a", "b"): None}
    away["q"] = standing(relay=True)  # who is away shall find a way
    assert changes(away, {*ALIVE, ("a", "q"), ("b", "q")}, MUTE) == {("a", "b"): ("q", 0)}


NAMES = "abcdef"
pairs = st.sets(st.sampled_from([(one, other) for one in NAMES for other in NAMES if one != other]), max_size=20)


@st.composite
def meshes(draw):
    """Nodes with records, denials, relays by hand; reports; what the server makes of them."""
    relays = draw(st.sets(st.sampled_from(NAMES), max_size=2))
    denied = {frozenset(pair) for pair in draw(pairs) if draw(st.booleans())}
    via = {node: draw(st.sampled_from(sorted(relays))) for node in NAMES if relays and node not in relays and draw(st.booleans())}
    apart = {node: frozenset(other for other in NAMES if frozenset((node, other)) in denied) for node in NAMES}
    found = {node: standing(relay=node in relays, apart=apart[node]) for node in NAMES if node not in via}
    alive, mute = draw(pairs), draw(pairs)
    chosen = next_relays(asked(found, mute), found, alive - mute, mute, NOW, LEAD)
    return apart, via, relays, chosen, mute


def view_of(node: str, apart: Any, via: Any, chosen: Any) -> View:
    records = {
        name: {"id": name, "name": name, "key": key_like(name), "ip": f"10.20.30.{number}", "ips": [f"192.168.{number}.0/24"]}
        for number, name in enumerate(NAMES, 1)
    }
    for name, relay in via.items():
        records[name]["via"] = relay
    relayed = {(pair[1] if pair[0] == node else pair[0]): relay for pair, (relay, _) in chosen.items() if node in pair}
    return View({"me": {"range": "10.20.30.0/24", "deny": sorted(apart[node]), "relayed": relayed}, "peers": records})


@given(meshes())
def test_no_address_is_owned_twice_and_every_way_is_a_peer_or_a_relay(mesh):
    apart, via, relays, chosen, _ = mesh
    for node in NAMES:
        view = view_of(node, apart, via, chosen)
        kept, _ = guarded(view, node, [])
        owned = list(itertools.chain(*kept.values()))
        assert len(owned) == len(set(owned))
        assert not {*kept} & ({node} | apart[node])
        for other in set(NAMES) - {node}:
            way = carrier(view, node, other)
            assert way in ("", other) or way in relays
            if other in apart[node]:
                assert way == "" and not any(f"10.20.30.{NAMES.index(other) + 1}/32" in own for own in kept.values())


@given(meshes())
def test_a_pair_relayed_by_itself_is_so_at_both_ends(mesh):
    apart, via, relays, chosen, mute = mesh
    for (one, other), (relay, until) in chosen.items():
        assert (one, other) in mute and (other, one) in mute and until == 0 and relay in relays
        assert other not in apart[one] and relay not in apart[one] | apart[other]
        for here, there in ((one, other), (other, one)):
            view = view_of(here, apart, via, chosen)
            assert carrier(view, here, there) == relay
            assert guarded(view, here, [])[0][there] == frozenset()  # listed bare, so that a handshake shows


def test_the_instant_of_going_direct_is_in_the_answer_and_heeded(core):
    from meshkit import heard, join

    one, other, relay = (join(core, name) for name in ("one", "other", "relay"))
    netmaker_core.create_relay(core, netmaker_core.need_node(core, "default", "relay"), [])
    pair = tuple(sorted((one["id"], other["id"])))
    netmaker_core.set_relays(core, "default", {pair: (relay["id"], 0)})
    said = heard(core, one["id"])
    assert said["me"]["relayed"] == {other["id"]: relay["id"]} and "in" not in said
    assert heard(core, relay["id"])["me"]["forward"] is True
    netmaker_core.set_relays(core, "default", {pair: (relay["id"], core.now + 7)})
    members = netmaker_core.Members(core.store, clock=core.clock)
    assert heard(core, other["id"], members)["in"] == {agent.DIRECT + one["id"]: 7}
    netmaker_core.set_relays(core, "default", {pair: None})
    assert "relayed" not in heard(core, one["id"])["me"]
    rows = core.store.rows("SELECT relayed FROM node")
    assert rows == [("",)] * 3 and pairs_of("") == {} and json.loads("{}") == {}
