# SPDX-License-Identifier: Apache-2.0
"""Relays over time: packets follow the nodes' own readings hop by hop, and the server's choice is told to real clients."""

from __future__ import annotations

from typing import Any, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel import key_like
from serverkit import Client, Clock, Server, clients, settle

import netclient_lite as agent
import netmaker_core
from netclient_lite import View, carrier, guarded
from netmaker_core import Standing, next_relays

NAMES = "abcdef"
RELAYS = "ef"
LEAD = 5
PAIRS = [(one, other) for one in NAMES for other in NAMES if one < other]


class World:
    """A network as server and nodes know it, without either."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.via: dict[str, str] = {}
        self.denied: set[frozenset[str]] = set()
        self.away: set[str] = set()
        self.told: dict[tuple[str, str], bool] = {}  # by (observer, node): whether there is a handshake
        self.relayed: dict[tuple[str, str], tuple[str, int]] = {}

    def apart(self, node: str) -> frozenset[str]:
        return frozenset(other for other in NAMES if frozenset((node, other)) in self.denied)

    def relayed_of(self, node: str) -> dict[str, tuple[str, int]]:
        return {pair[pair[0] == node]: way for pair, way in self.relayed.items() if node in pair}

    def step(self) -> None:
        """What the server does."""
        nodes = {
            node: Standing(node not in self.away, node in RELAYS, self.apart(node), self.relayed_of(node), True, node in self.via)
            for node in NAMES
        }
        mute = {pair for pair, shaken in self.told.items() if not shaken}
        alive = {pair for pair, shaken in self.told.items() if shaken}
        for pair, chosen in next_relays(PAIRS, nodes, alive, mute, self.now, LEAD).items():
            if chosen:
                self.relayed[pair] = chosen
            else:
                del self.relayed[pair]

    def view(self, node: str) -> View:
        """What a node knows; the instant of a pair that goes direct has passed or not at both ends alike."""
        records: dict[str, Any] = {
            name: {
                "id": name,
                "name": name,
                "key": key_like(name),
                "ip": f"10.20.30.{ord(name)}",
                "ips": [f"172.16.{ord(name)}.0/24"],
            }
            for name in NAMES
        }
        for name, relay in self.via.items():
            records[name]["via"] = relay
        relayed = {peer: relay for peer, (relay, until) in self.relayed_of(node).items() if not 0 < until <= self.now}
        return View({"me": {"range": "10.20.30.0/24", "deny": sorted(self.apart(node)), "relayed": relayed}, "peers": records})

    def walk(self, start: str, end: str) -> tuple[list[str], bool]:
        """The nodes that a packet passes, and whether it came to its end: each also has to take it from there."""
        passed, here = [start], start
        while here != end:
            there = carrier(self.view(here), here, end)
            if not there or carrier(self.view(there), there, start) != here:
                return passed, False
            assert there not in passed, "a circle"
            passed.append(there)
            here = there
        return passed, True


pairs = st.sampled_from(PAIRS)
EVENTS = st.one_of(
    st.tuples(st.just("mute"), pairs),
    st.tuples(st.just("mute"), pairs),
    st.tuples(st.just("shaken"), pairs),
    st.tuples(st.just("seen"), st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))),
    st.tuples(st.just("via"), st.tuples(st.sampled_from("abcd"), st.sampled_from(RELAYS + "-"))),
    st.tuples(st.just("deny"), pairs),
    st.tuples(st.just("away"), st.tuples(st.sampled_from(NAMES), st.just(""))),
    st.tuples(st.just("time"), st.just(("", ""))),
)


def happen(world: World, what: str, one: str, other: str) -> None:
    if what in ("mute", "shaken"):
        world.told.update({(one, other): what == "shaken", (other, one): what == "shaken"})
    elif what == "seen" and one != other:
        world.told[one, other] = True
    elif what == "via":
        world.via.pop(one, None)
        world.via.update({one: other} if other != "-" else {})
    elif what == "deny":
        world.denied ^= {frozenset((one, other))}
    elif what == "away":
        world.away ^= {one}
    world.now += 7 if what == "time" else 1


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=25))
def test_packets_come_to_their_end_by_relays_alone_and_back_the_same_way(events: list[Any]) -> None:
    world = World()
    world.told = {(one, other): True for one in NAMES for other in NAMES if one != other}
    for what, (one, other) in events:
        happen(world, what, one, other)
        for start, end in PAIRS:  # before the server has heard: no circle
            world.walk(start, end)
        world.step()
        for start, end in PAIRS:
            there, arrived = world.walk(start, end)
            back, returned = world.walk(end, start)
            assert {*there[1:], *back[1:]} - {start, end} <= {*RELAYS}
            nodes = {*there, *back, end, world.via.get(start, end), world.via.get(end, end)}
            nodes |= {relay for relay, _ in world.relayed.values()}
            if not any(frozenset((a, b)) in world.denied for a in nodes for b in nodes):
                assert arrived and returned and there == back[::-1]
        for node in NAMES:
            owned = [text for texts in guarded(world.view(node), node, [])[0].values() for text in texts]
            assert len(owned) == len(set(owned))
        for (one, other), (relay, _) in world.relayed.items():
            assert not {one, other} & {*world.via} and frozenset((one, other)) not in world.denied
            assert relay not in (one, other)


# -- what clients hear


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Trio:
    """Two nodes that do not reach each other, and one that both reach; the server in this process, its time in our hands."""

    def __init__(self, home: Server, clock: Clock) -> None:
        self.home, self.clock = home, clock
        self.one, self.other, self.relay = self.all = clients(home, 3, home.key())
        settle(self.all)
        for end in self.ends:
            end.exchange({"seen": {self.relay.node: "203.0.113.9:51821"}})

    @property
    def ends(self) -> tuple[Client, Client]:
        return self.one, self.other

    def make_relay(self) -> None:
        netmaker_core.create_relay(self.home.core, self.home.node(self.relay), [])

    def tick(self, seconds: int = 1) -> None:
        """Time passes, everybody comes by, the server tidies up."""
        self.clock.now += seconds
        settle(self.all)
        self.home.agents.relay_due()
        settle(self.all)

    def report(self, kind: str, value: Any) -> None:
        for end, peer in (self.ends, self.ends[::-1]):
            end.exchange({kind: {peer.node: value}})

    def ways(self) -> list[str]:
        """By which node each end reaches the other."""
        found = []
        for end, peer in (self.ends, self.ends[::-1]):
            view = View({"me": agent.parse_me(end.me), "peers": end.peers})
            found.append(carrier(view, end.node, peer.node))
        return found

    @property
    def is_relayed(self) -> bool:
        ways = self.ways()
        assert ways in ([self.relay.node] * 2, [self.other.node, self.one.node])
        return ways[0] == self.relay.node


@pytest.fixture
def trio(tmp_path: Any, clock: Clock) -> Iterator[Trio]:
    home = Server(str(tmp_path), clock)
    home.network()
    yield Trio(home, clock)
    home.stop()


def test_a_pair_is_relayed_goes_direct_and_is_relayed_again(trio: Trio) -> None:
    trio.report("mute", True)
    trio.tick()
    assert not trio.is_relayed  # nobody may carry it yet
    trio.make_relay()
    trio.home.agents.relay_due()
    settle(trio.ends)
    assert not trio.is_relayed  # the relay has not heard of it
    trio.tick()
    assert trio.is_relayed and trio.relay.me["forward"] is True
    row = trio.home.node(trio.one)
    assert netmaker_core.pairs_of(row["relayed"]) == {trio.other.node: (trio.relay.node, 0)}
    before = trio.relay.have
    trio.tick()
    assert trio.relay.have == before  # nothing new, nothing said
    direct = {"seen": {trio.other.node: "198.51.100.2:51821"}, "mute": {trio.other.node: None}}  # at once, as agents tell it
    trio.one.exchange(direct)
    assert "in" not in (trio.one.exchange().value or {})  # one end alone proves nothing
    said = trio.other.exchange({"seen": {trio.one.node: "198.51.100.1:51821"}, "mute": {trio.one.node: None}})
    left = {trio.other: said["in"], trio.one: trio.one.exchange()["in"]}
    assert left == {trio.other: {agent.DIRECT + trio.one.node: 20}, trio.one: {agent.DIRECT + trio.other.node: 20}}
    assert trio.is_relayed  # until then
    trio.tick(41)
    assert not trio.is_relayed
    trio.report("mute", True)
    trio.tick()
    assert trio.is_relayed


@pytest.mark.parametrize("how", ["off", "disabled", "removed", "silent", "away from one"])
def test_without_its_relay_a_pair_tries_the_direct_way_and_comes_back_to_it(trio: Trio, how: str) -> None:
    trio.make_relay()
    trio.report("mute", True)
    trio.tick()
    assert trio.is_relayed
    core, row = trio.home.core, trio.home.node(trio.relay)
    if how == "off":
        netmaker_core.delete_role(core, row, "relay")
    elif how == "disabled":
        netmaker_core.disable(core, row)
    elif how == "removed":
        netmaker_core.remove_node(core, row)
    elif how == "silent":
        trio.clock.now += 31
        settle(trio.ends)
    else:
        trio.one.exchange({"seen": {trio.relay.node: None}})
    trio.home.agents.relay_due()
    settle(trio.ends)
    assert not trio.is_relayed and "relayed" not in trio.one.me
    if how == "removed":
        return
    if how == "disabled":
        netmaker_core.enable(core, trio.home.node(trio.relay))
    trio.make_relay()
    for end in trio.ends:
        end.exchange({"seen": {trio.relay.node: "203.0.113.9:51821"}})
    trio.tick()
    assert trio.is_relayed


def test_other_settings_of_a_relay_do_not_unsettle_its_pairs(trio: Trio) -> None:
    trio.make_relay()
    trio.report("mute", True)
    trio.tick()
    netmaker_core.set_node(trio.home.core, trio.home.node(trio.relay), {"keepalive": 25})
    trio.home.agents.relay_due()  # it has not fetched them yet
    settle(trio.ends)
    assert trio.is_relayed


def test_a_server_that_was_away_finds_all_as_it_was(tmp_path: Any, clock: Clock) -> None:
    home = Server(str(tmp_path), clock)
    home.network()
    trio = Trio(home, clock)
    trio.make_relay()
    trio.report("mute", True)
    trio.tick()
    assert trio.is_relayed
    home.stop()
    clock.now += 3600
    again = Server(str(tmp_path), clock)
    again.core.started = int(clock.now)
    try:
        trio.home = again
        for each in trio.all:
            each.home = again
        settle(trio.ends)  # the relay comes last
        again.agents.relay_due()
        settle(trio.ends)
        assert trio.is_relayed
        trio.tick()
        assert trio.is_relayed
    finally:
        again.stop()


@pytest.mark.parametrize("how", ["by hand", "denied", "end removed", "end disabled"])
def test_what_ends_a_pair_ends_it_at_both_ends(trio: Trio, how: str) -> None:
    trio.make_relay()
    trio.report("mute", True)
    trio.tick()
    core, row = trio.home.core, trio.home.node(trio.one)
    if how == "by hand":
        netmaker_core.create_relay(core, trio.home.node(trio.relay), [trio.one.node])
    elif how == "denied":
        netmaker_core.set_denied(core, "default", trio.one.node, trio.other.node, True)
    elif how == "end removed":
        netmaker_core.remove_node(core, row)
    else:
        netmaker_core.disable(core, row)
    trio.home.agents.relay_due()
    assert core.store.rows("SELECT 1 FROM node WHERE relayed != ''") == []


def test_an_unconcerned_check_in_reads_one_row_beside_relayed_pairs(trio: Trio) -> None:
    trio.make_relay()
    trio.report("mute", True)
    trio.tick()
    store, counted = trio.home.core.store, []
    execute = store.execute
    store.execute = lambda connection, sql, values=(): (counted.append(sql), execute(connection, sql, values))[1]
    try:
        assert trio.one.exchange().status == 204
    finally:
        del store.execute
    assert len(counted) == 1
