# SPDX-License-Identifier: Apache-2.0
"""What nodes hear of each other: the pure rules, and deltas over random histories."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serverkit import Clock, make_core, wireguard_key

import netmaker_core
import netmaker_lite as server

NETWORK = netmaker_core.NetworkState(
    "default", "10.20.30.0/24", "", 1, "0" * 8, 1, 51821, 20, 1280, "nm-default", None, True, False
)
NODE = netmaker_core.NodeState(
    id="0123456789abcdef", network="default", auth="a", look="l", state="active", name="router-1",
    key="A" * 43 + "=", ip="10.20.30.2", ip6="", ips="", static="", port=51821, source="203.0.113.7",
    public="203.0.113.7", at="", at_changed=0, local="192.168.1.10", lan="9f31c2aa", keepalive=None,
    mtu=None, dns=True, forwarding=True, punch=True, is_local=False, last_seen=0, confirmed=True, epoch=0,
    changed=1, own_changed=1, since=1, farewell="",
)  # fmt: skip


def shown(node=NODE, network=NETWORK):
    return json.loads(netmaker_core.record(node, network))


def test_a_record_leaves_out_what_is_empty():
    assert shown() == {
        "id": "0123456789abcdef",
        "name": "router-1",
        "key": "A" * 43 + "=",
        "ip": "10.20.30.2",
        "seen": "203.0.113.7:51821",
        "local": "192.168.1.10:51821",
        "lan": "9f31c2aa",
    }


def test_static_endpoints_keep_their_own_port():
    assert shown(NODE._replace(static="198.51.100.4"))["static"] == "198.51.100.4:51821"
    assert shown(NODE._replace(static="198.51.100.4:1"))["static"] == "198.51.100.4:1"
    assert shown(NODE._replace(static="2001:db8::4"))["static"] == "[2001:db8::4]:51821"
    assert shown(NODE._replace(static="[2001:db8::4]:1"))["static"] == "[2001:db8::4]:1"


def test_a_local_network_gives_out_no_public_endpoint():
    found = shown(NODE._replace(at="203.0.113.7:4"), NETWORK._replace(is_local=True))
    assert "seen" not in found and "at" not in found and found["local"]


@pytest.mark.parametrize("off", ["node", "network"])
def test_without_hole_punching_no_observed_endpoint(off):
    node = NODE._replace(at="203.0.113.7:4", punch=off != "node")
    assert "at" in shown(NODE._replace(at="203.0.113.7:4"))
    assert "at" not in shown(node, NETWORK._replace(punch=off != "network"))


def test_own_settings_show_what_is_unusual():
    usual = netmaker_core.own_settings(NODE, NETWORK)
    assert (usual["keepalive"], usual["mtu"]) == (20, 1280)
    assert not {"dns", "forwarding", "punch", "local"} & usual.keys()
    node = NODE._replace(dns=False, forwarding=False, punch=False, is_local=True, keepalive=0, mtu=1400)
    found = netmaker_core.own_settings(node, NETWORK)
    assert [found[name] for name in ("dns", "forwarding", "punch", "local")] == [False, False, False, True]
    assert (found["keepalive"], found["mtu"]) == (0, 1400)


# ---- observed endpoints

OVERLAYS = ["10.20.30.0/24", "fd00:20:30::/64"]
AT = "203.0.113.7:40007"


def observed(*reports, node=NODE, recorded=""):
    reports = [netmaker_core.Report(*report) for report in reports]
    return netmaker_core.observed_endpoint(node, reports, OVERLAYS, recorded)


def test_one_observer_is_enough():
    assert observed((AT, "198.51.100.1")) == AT


def test_what_the_server_saw_is_not_said_twice():
    assert observed(("203.0.113.7:51821", "198.51.100.1")) == ""


def test_an_observer_in_the_same_lan_counts_for_nothing():
    assert observed((AT, "203.0.113.7")) == ""


@pytest.mark.parametrize("place", ["192.168.1.10:51821", "10.20.30.4:51821", "[fd00:20:30::4]:1", "[fe80::1]:1"])
def test_private_and_overlay_endpoints_count_for_nothing(place):
    assert observed((place, "198.51.100.1")) == ""


def test_another_address_counts_only_where_the_server_saw_none():
    other = "198.51.100.77:1234"
    assert observed((other, "198.51.100.1")) == ""
    unseen = NODE._replace(public="", source="192.168.1.10")
    assert observed((other, "198.51.100.1"), node=unseen) == other


def test_two_ports_at_once_are_a_hard_nat():
    assert observed((AT, "198.51.100.1"), ("203.0.113.7:40008", "198.51.100.2"), recorded=AT) == ""


def test_a_recorded_endpoint_stays_when_nobody_reports():
    assert observed(recorded=AT) == AT
    assert observed((AT, "198.51.100.1"), recorded=AT) == AT


def test_a_recorded_endpoint_goes_with_the_address():
    assert observed(recorded="198.51.100.99:1") == ""


ENDPOINTS = st.sampled_from(
    [AT, "203.0.113.7:40008", "203.0.113.7:51821", "192.168.1.10:1", "10.20.30.9:9", "198.51.100.77:5", "[fd00::1]:1"]
)
SOURCES = st.sampled_from(["198.51.100.1", "198.51.100.2", "203.0.113.7"])


@given(st.lists(st.tuples(ENDPOINTS, SOURCES), max_size=6), st.sampled_from(["", AT]))
def test_whatever_is_given_out_is_public_and_of_the_seen_address(reports, recorded):
    best = observed(*reports, recorded=recorded)
    if best:
        assert server.split_endpoint(best)[0] == "203.0.113.7" and best != "203.0.113.7:51821"
        assert best == recorded or any(best == place for place, _ in reports)
    assert best == observed(*reversed(reports), recorded=recorded)


def test_ports_behind_one_address():
    assert netmaker_core.free_port(51821, []) == 51821
    assert netmaker_core.free_port(51821, [51821, 51822]) == 51823
    assert netmaker_core.free_port(65535, [65535]) == 1024


@pytest.mark.parametrize("word", ["-", "", "x.y", "-1.aa", "1" * 30 + ".a", "1"])
def test_words_that_are_none(word):
    counter, tag = netmaker_core.parse_word(word)
    assert counter == -1 or tag == ""


# ---- deltas


class World:
    """A network in a real store, changed at random, beside the cache that follows it."""

    def __init__(self, folder):
        self.core = make_core(folder, Clock())
        netmaker_core.add_network(self.core, "default", {"range": "10.20.0.0/16", "manual": True})
        self.members = netmaker_core.Members(self.core.store)
        self.count = 0
        self.viewer = self.join()

    def join(self, access_key="k"):
        self.count += 1
        if access_key and not self.core.store.row("SELECT 1 FROM access_key"):
            key = netmaker_core.add_key(self.core, "default", uses=None)
            self.key_id = key["id"]
        values = {"key": wireguard_key(), "port": 51821, "name": "n%d" % self.count}
        who = netmaker_core.Joining(
            "default", "auth%d" % self.count, self.key_id if access_key else "", "198.51.100.%d" % self.count,
            "198.51.100.%d" % self.count, values,
        )  # fmt: skip
        return netmaker_core.join(self.core, who)

    def change(self, what, choice):
        nodes = [node for node in netmaker_core.nodes(self.core, "default") if node["id"] != self.viewer["id"]]
        if what == "join" or not nodes:
            return self.join()
        if what == "signup":
            return self.join("")
        if what == "mtu":
            return netmaker_core.set_network(self.core, "default", {"mtu": 1280 + choice})
        node = nodes[choice % len(nodes)]
        if what == "edit":
            return netmaker_core.set_node(self.core, node, {"port": 20000 + choice})
        actions = {
            "approve": netmaker_core.approve, "reject": netmaker_core.reject, "remove": netmaker_core.remove_node,
            "disable": netmaker_core.disable, "enable": netmaker_core.enable,
        }  # fmt: skip
        try:
            return actions[what](self.core, node)
        except netmaker_core.Clash:
            return None

    def snapshot(self):
        return self.hear("-")

    def hear(self, have):
        member = self.members.node(self.viewer["id"])
        self.members.prove(member.mesh)
        blob = self.members.answer(member, have)
        return json.loads(blob) if blob else None


def applied(before, answer):
    """What a client has after an answer."""
    if answer is None:
        return before
    records = {record["id"]: record for record in answer["peers"]}
    peers = {**before["peers"], **records} if "from" in answer else records
    for node in answer.get("gone", ()):
        peers.pop(node, None)
    return {"word": answer["word"], "peers": peers, "me": answer.get("me", before["me"])}


CHANGES = st.tuples(
    st.sampled_from(["join", "signup", "edit", "approve", "reject", "remove", "disable", "enable", "mtu"]),
    st.integers(0, 30),
)
EMPTY = {"word": "-", "peers": {}, "me": None}


@pytest.mark.parametrize("history", [4096, 6])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=st.lists(CHANGES, min_size=1, max_size=25))
def test_snapshot_and_delta_make_the_later_snapshot(tmp_path_factory, monkeypatch, history, story):
    monkeypatch.setattr(netmaker_core, "HISTORY", history)
    world = World(str(tmp_path_factory.mktemp("world")))
    states = [applied(EMPTY, world.snapshot())]
    for what, choice in story:
        world.change(what, choice)
        now = applied(EMPTY, world.snapshot())
        for earlier in [*states, EMPTY]:
            answer = world.hear(earlier["word"])
            assert applied(earlier, answer) == now
        fresh = netmaker_core.Members(world.core.store)  # another process, with nothing in memory
        member = fresh.node(world.viewer["id"])
        assert applied(EMPTY, json.loads(fresh.answer(member, "-"))) == now
        states.append(now)
    assert netmaker_core.check(world.core) == []
    world.core.store.close()


def test_a_delta_of_one_peer_is_small(tmp_path):
    world = World(str(tmp_path))
    before = world.snapshot()["word"]
    node = world.join()
    netmaker_core.set_node(world.core, node, {"local": "192.168.1.10", "lan": "9f31c2aa", "name": "router-1"})
    member = world.members.node(world.viewer["id"])
    world.members.prove(member.mesh)
    blob = world.members.answer(member, before)
    assert len(json.loads(blob)["peers"]) == 1
    assert len(blob) <= 256
    world.core.store.close()


def test_a_change_is_encoded_once_and_read_in_rows_of_changes(tmp_path):
    world = World(str(tmp_path))
    for _ in range(30):
        world.join()
    before = world.snapshot()["word"]
    world.change("edit", 3)
    statements = []
    world.core.store.reader.connection().set_trace_callback(statements.append)
    mesh = world.members.node(world.viewer["id"]).mesh
    world.members.prove(mesh)
    answers = [world.members.answer(member, before) for member in mesh.members.values()]
    world.core.store.reader.connection().set_trace_callback(None)
    assert len(answers) == 31 and len(mesh.blobs) == 1
    assert len(statements) <= 7, statements
    world.core.store.close()
