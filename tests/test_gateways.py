# SPDX-License-Identifier: Apache-2.0
"""Gateways, relays and denied pairs: what may be made, and what the nodes hear of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshkit import allowed, heard, join, owned, owners
from restkit import make_user
from serverkit import Client, Clock, clients, make_core, settle, wireguard_key

import netmaker_core
from netclient_lite import Invalid, parse_me, parse_record


@pytest.fixture
def core(tmp_path):
    made = make_core(str(tmp_path), Clock())
    netmaker_core.add_network(made, "default", {"range": "10.20.30.0/24", "range6": "fd00:20:30::/64"})
    yield made
    assert netmaker_core.check(made) == []
    made.store.close()


def node_of(core, row):
    return netmaker_core.need_node(core, row["network"], row["id"])


# ---- egress


def test_an_egress_gateway_owns_its_ranges(core):
    gateway, other = join(core, "gw"), join(core, "other")
    row = netmaker_core.create_egress(core, gateway, ["192.168.7.9/24, fd07::/64"], "br-lan", False)
    assert netmaker_core.egress_ranges(row["egress"]) == ["192.168.7.0/24", "fd07::/64"]
    told = heard(core, other["id"])
    record = next(record for record in told["peers"] if record["id"] == gateway["id"])
    assert record["ips"] == ["192.168.7.0/24", "fd07::/64"]
    assert "egress" not in told["me"]
    me = heard(core, gateway["id"])["me"]
    assert me["egress"] == {"ranges": ["192.168.7.0/24", "fd07::/64"], "interface": "br-lan", "nat": False}
    assert "forward" not in me
    row = netmaker_core.create_egress(core, gateway, ["192.168.8.0/24"])
    assert netmaker_core.egress_ranges(row["egress"]) == ["192.168.8.0/24"]
    netmaker_core.delete_role(core, gateway, "egress")
    assert "ips" not in next(record for record in heard(core, other["id"])["peers"] if record["id"] == gateway["id"])
    assert "egress" not in heard(core, gateway["id"])["me"]


def test_creating_the_same_gateway_again_says_nothing_new(core):
    gateway = join(core, "gw")
    netmaker_core.delete_role(core, gateway, "ingress")
    netmaker_core.create_ingress(core, gateway)
    before = core.store.word("default")
    netmaker_core.create_ingress(core, gateway)
    netmaker_core.delete_role(core, gateway, "egress")
    assert core.store.word("default") == before


@pytest.mark.parametrize(
    "ranges, word",
    [
        ("0.0.0.0/0", r"all traffic .* `internet`"),
        ("::/0", "all traffic"),
        ("", "needs ranges, like 192"),
        ("nonsense", "no range: ADDRESS/BITS"),
        ("127.0.0.0/8", "no node can own it"),
        ("fe80::/64", "no node can own it"),
        ("224.0.0.0/4", "no node can own it"),
        ("192.168.7.0/24,192.168.7.1/24", "twice"),
        ("10.20.0.0/16", "overlaps 10.20.30.0/24, which is the range of the network default"),
        ("10.77.1.0/24", "the range of the network else"),
        ("fd00:20:30::/80", "the range of the network default"),
        ("172.16.5.0/24", "which is a range of the node gw2"),
        ("172.17.0.0/16", "which is a range of the node extra"),
        ("172.30.0.0/16", "which is a range of the node gw: "),
        ("192.168.44.0/24", "192.168.44.5, which is in the LAN of the node far"),
        ("198.51.0.0/16", "the endpoint of the node"),
        ("203.0.113.0/24", "203.0.113.10, which is the server's address"),
    ],
)
def test_ranges_that_cannot_be_shared(core, ranges, word):
    netmaker_core.add_network(core, "else", {"range": "10.77.0.0/16"})
    gateway, far = join(core, "gw"), join(core, "far")
    netmaker_core.set_node(core, far, {"local": "192.168.44.5"})
    netmaker_core.set_node(core, gateway, {"local": "192.168.1.1", "ips": "172.30.1.0/24"})
    netmaker_core.create_egress(core, join(core, "gw2"), ["172.16.0.0/16"])
    netmaker_core.set_node(core, join(core, "extra"), {"ips": "172.17.8.0/24"})
    before = core.store.word("default")
    with pytest.raises((Invalid, netmaker_core.Clash), match=word):
        netmaker_core.create_egress(core, gateway, [ranges])
    assert core.store.word("default") == before


def test_neighbours_in_the_gateways_lan_do_not_hinder(core):
    gateway, near, behind = join(core, "gw", source="198.51.100.9"), join(core, "nas"), join(core, "tv", source="198.51.100.9")
    for row, address in ((gateway, "192.168.1.1"), (near, "192.168.1.2"), (behind, "192.168.1.3")):
        netmaker_core.set_node(core, row, {"local": address})
    netmaker_core.set_node(core, gateway, {"lan": "9f31c2aa"})
    with pytest.raises(netmaker_core.Clash, match="in the LAN of the node nas"):
        netmaker_core.create_egress(core, gateway, ["192.168.1.0/24"])
    netmaker_core.set_node(core, near, {"lan": "9f31c2aa"})
    netmaker_core.create_egress(core, gateway, ["192.168.1.0/24"])


def test_what_a_gateway_has_nobody_else_gets(core):
    gateway, other = join(core, "gw"), join(core, "other")
    netmaker_core.create_egress(core, gateway, ["192.168.7.0/24"])
    with pytest.raises(netmaker_core.Clash, match="a range of the node gw"):
        netmaker_core.set_node(core, other, {"ips": "192.168.0.0/16"})
    with pytest.raises(netmaker_core.Clash, match="a range of the node gw"):
        netmaker_core.set_node(core, gateway, {"ips": "192.168.7.0/25"})
    with pytest.raises(netmaker_core.Clash, match=r"overlaps 192\.168\.7\.0/24, which is a range of the node gw"):
        netmaker_core.add_network(core, "else", {"range": "192.168.0.0/16"})
    with pytest.raises(netmaker_core.Clash, match="a range of the node gw"):
        netmaker_core.set_network(core, "default", {"range": "192.168.7.0/24"})
    netmaker_core.remove_node(core, gateway)
    netmaker_core.set_node(core, other, {"ips": "192.168.0.0/16"})


@pytest.mark.parametrize("name", ["eth0; reboot", "-x", "a" * 16, "a b", "a\nb"])
def test_an_interface_is_a_name(core, name):
    with pytest.raises(Invalid, match="no interface name"):
        netmaker_core.create_egress(core, join(core, "gw"), ["192.168.7.0/24"], name)


def test_hooks_are_kept_and_told_to_nobody(core):
    gateway = join(core, "gw")
    row = netmaker_core.create_egress(core, gateway, ["192.168.7.0/24"], postup="echo up", postdown="echo down")
    assert (row["postup"], row["postdown"]) == ("echo up", "echo down")
    assert "echo" not in json.dumps(heard(core, gateway["id"]))


# ---- relays


def test_relayed_nodes_are_reached_through_their_relay(core):
    relay, far, near = join(core, "relay"), join(core, "far"), join(core, "near")
    netmaker_core.create_egress(core, far, ["192.168.7.0/24"])
    row = netmaker_core.create_relay(core, relay, ["far"])
    assert row["relay"] and row["relayaddrs"] == [far["ip"]]
    told = heard(core, near["id"])
    peers = allowed(near["id"], told["peers"])
    assert set(peers) == {relay["id"]}
    assert {far["ip"] + "/32", "192.168.7.0/24", relay["ip"] + "/32"} <= peers[relay["id"]]
    assert set(allowed(far["id"], heard(core, far["id"])["peers"])) == {relay["id"]}
    at_relay = heard(core, relay["id"])
    assert at_relay["me"]["forward"] is True
    assert set(allowed(relay["id"], at_relay["peers"])) == {far["id"], near["id"]}


def test_a_relay_that_is_not_there_is_gone_round(core):
    relay, far, near = join(core, "relay"), join(core, "far"), join(core, "near")
    netmaker_core.create_relay(core, relay, [far["ip"]])
    netmaker_core.disable(core, relay)
    assert set(allowed(near["id"], heard(core, near["id"])["peers"])) == {far["id"]}
    netmaker_core.remove_node(core, relay)
    assert node_of(core, far)["via"] == ""


def test_relays_are_no_chains(core):
    one, two, three = (join(core, name) for name in ("one", "two", "three"))
    netmaker_core.create_relay(core, one, ["two"])
    for node, other in ((one, "one"), (two, "three"), (three, "two"), (three, "one")):
        with pytest.raises(netmaker_core.Clash, match=r"relay(ed itself|, or has one)"):
            netmaker_core.create_relay(core, node, [other])
    with pytest.raises(netmaker_core.Missing):
        netmaker_core.create_relay(core, one, ["nobody"])
    assert node_of(core, one)["relayaddrs"] == [two["ip"]]
    assert netmaker_core.create_relay(core, one, ["three"])["relayaddrs"] == [three["ip"]]
    assert node_of(core, two)["via"] == ""
    netmaker_core.delete_role(core, one, "relay")
    assert node_of(core, three)["via"] == "" and "forward" not in heard(core, one["id"])["me"]


# ---- access


def test_a_denied_pair_hears_of_it_at_both_ends(core):
    one, two, three = (join(core, name) for name in ("one", "two", "three"))
    netmaker_core.set_denied(core, "default", one["id"], two["id"], True)
    netmaker_core.set_denied(core, "default", two["id"], one["id"], True)
    netmaker_core.set_denied(core, "default", one["id"], three["id"], True)
    assert heard(core, one["id"])["me"]["deny"] == [two["id"], three["id"]]
    assert heard(core, two["id"])["me"]["deny"] == [one["id"]]
    names = sorted([pair["name1"], pair["name2"]] for pair in netmaker_core.denials(core, "default"))
    assert names == [["one", "three"], ["one", "two"]]
    netmaker_core.set_denied(core, "default", two["id"], one["id"], False)
    assert "deny" not in heard(core, two["id"])["me"] and heard(core, one["id"])["me"]["deny"] == [three["id"]]
    netmaker_core.remove_node(core, three)
    assert "deny" not in heard(core, one["id"])["me"] and netmaker_core.denials(core, "default") == []
    with pytest.raises(Invalid, match="two nodes"):
        netmaker_core.set_denied(core, "default", one["id"], one["id"], True)


def test_others_do_not_hear_of_a_denied_pair(core):
    one, two, three = (join(core, name) for name in ("one", "two", "three"))
    members = netmaker_core.Members(core.store)
    before = heard(core, three["id"], members)["word"]
    netmaker_core.set_denied(core, "default", one["id"], two["id"], True)
    member = members.node(three["id"])
    members.prove(member.mesh)
    assert json.loads(members.answer(member, before))["peers"] == []


# ---- random histories

CHANGES = st.tuples(
    st.sampled_from(
        [
            *("join", "egress", "ingress", "relay", "client", "disableclient", "dropclient", "deny", "allow", "off", "remove"),
            *("range", "disable", "enable", "extra", "join", "client", "relay"),
        ]
    ),
    st.integers(0, 40),
    st.integers(0, 40),
)


class Story:
    """A network that is changed at random; what is refused is no change."""

    def __init__(self, folder):
        self.core = make_core(folder, Clock())
        netmaker_core.add_network(self.core, "default", {"range": "10.20.0.0/16"})
        one, two, *_ = (join(self.core, name) for name in "abcd")
        netmaker_core.create_egress(self.core, one, ["172.16.0.0/24"])
        netmaker_core.add_client(self.core, netmaker_core.create_ingress(self.core, one), {})
        netmaker_core.create_relay(self.core, two, ["c"])
        self.members = netmaker_core.Members(self.core.store)

    def change(self, what, one, two):
        core, rows = self.core, netmaker_core.nodes(self.core, "default")
        if what == "join" or not rows:
            return join(core, "n")
        node, other = rows[one % len(rows)], rows[two % len(rows)]
        gateways = [row for row in rows if row["ingress"]] or rows
        roles = [(row, role) for row in rows for role in ("egress", "ingress", "relay") if row[role]] or [(node, "relay")]
        found = netmaker_core.clients(core, "default")
        client = found[one % len(found)] if found else None
        if what == "range":
            return netmaker_core.set_network(core, "default", {"range": "10.%d.0.0/16" % (20 + one % 3)})
        if what in ("client", "dropclient", "disableclient") and not client and what != "client":
            return None
        actions = {
            "egress": lambda: netmaker_core.create_egress(core, node, ["172.16.%d.0/%d" % (two, 22 + two % 4)]),
            "extra": lambda: netmaker_core.set_node(core, node, {"ips": "172.16.%d.0/24" % two}),
            "ingress": lambda: netmaker_core.create_ingress(core, node),
            "relay": lambda: netmaker_core.create_relay(core, node, [other["id"]]),
            "client": lambda: netmaker_core.add_client(core, gateways[one % len(gateways)], {}),
            "dropclient": lambda: netmaker_core.remove_client(core, client),
            "disableclient": lambda: netmaker_core.set_client(core, client, {"enabled": not client["enabled"]}),
            "deny": lambda: netmaker_core.set_denied(core, "default", node["id"], other["id"], True),
            "allow": lambda: netmaker_core.set_denied(core, "default", node["id"], other["id"], False),
            "off": lambda: netmaker_core.delete_role(core, *roles[one % len(roles)]),
            "remove": lambda: netmaker_core.remove_node(core, node),
            "disable": lambda: netmaker_core.disable(core, node),
            "enable": lambda: netmaker_core.enable(core, node),
        }
        return actions[what]()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=4, max_size=30))
def test_no_address_belongs_to_two_and_what_is_known_from_deltas_is_the_truth(tmp_path_factory, changes):
    story = Story(str(tmp_path_factory.mktemp("story")))
    core, members = story.core, story.members
    for change in changes:
        try:
            story.change(*change)
        except (Invalid, netmaker_core.ServerError):
            continue
        assert netmaker_core.check(core) == []
        rows = [row for row in netmaker_core.nodes(core, "default") if row["state"] == "active"]
        told = {row["id"]: heard(core, row["id"], members) for row in rows}
        fresh = netmaker_core.Members(core.store)  # another process, with nothing in memory
        assert told == {row["id"]: heard(core, row["id"], fresh) for row in rows}
        if rows:
            check_ways(rows, told)
    core.store.close()


def check_ways(rows, told):
    """No address belongs to two, and all find each other but where that is denied."""
    deny = {node: said["me"].get("deny", ()) for node, said in told.items()}
    assert all(one in deny[other] for one in deny for other in deny[one] if other in deny)
    records = told[rows[0]["id"]]["peers"]
    for record in records:
        parse_record(record)
    ways = {row["id"]: allowed(row["id"], records, deny[row["id"]]) for row in rows}
    texts = {text for record in records for text in owned(record)}
    for row in rows:
        parse_me(told[row["id"]]["me"])
        assert all(len(owners(ways[row["id"]], text)) <= 1 for text in texts)
    for one in rows:
        for other in rows:
            both = owners(ways[one["id"]], other["ip"]) and owners(ways[other["id"]], one["ip"])
            assert both or one is other or denied_way(one, other, deny)


def denied_way(one, other, deny):
    """Whether a denied pair lies between two: they themselves, or one and the other's relay."""
    ends = [{row["id"], row["via"]} - {""} for row in (one, other)]
    return any(a in deny.get(b, ()) for a in ends[0] for b in ends[1]) or any(
        row["via"] in deny[row["id"]] for row in (one, other) if row["via"]
    )


# ---- over HTTP


def test_gateways_by_rest(home):
    key = home.key()
    gateway, far, near = clients(home, 3, key)
    home.network("elsewhere", "10.66.0.0/16")
    boss, other = make_user(home, "boss", admin=True), make_user(home, "joe", "elsewhere")
    path = "/api/nodes/default/" + gateway.node
    asked = {"rangestring": "192.168.7.0/24,fd07::/64", "ranges": [], "interface": "eth0", "nat": "no", "postup": "x"}
    made = boss.good("POST", path + "/creategateway", {**asked, "nodeid": gateway.node, "netid": "default"})
    assert (made["isegressgateway"], made["egressgatewayranges"]) == ("yes", ["192.168.7.0/24", "fd07::/64"])
    assert (made["egressgatewayinterface"], made["egressgatewaynat"], made["postup"]) == ("eth0", "no", "x")
    assert boss.good("PUT", path, made) == made
    settle((gateway, far, near))
    assert gateway.me["egress"]["nat"] is False and near.peers[gateway.node]["ips"] == ["192.168.7.0/24", "fd07::/64"]
    made = boss.good("POST", path + "/createingress")
    assert (made["isingressgateway"], made["ingressgatewayrange"]) == ("yes", "10.20.30.0/24")
    made = boss.good("POST", path + "/createrelay", {"relayaddrs": [far.me["ip"]]})
    assert (made["isrelay"], made["relayaddrs"]) == ("yes", [far.me["ip"]])
    assert boss.get("/api/nodes/default/" + far.node)["isrelayed"] == "yes"
    for what in ("gateway", "ingress", "relay"):
        row = boss.good("DELETE", "%s/delete%s" % (path, what))
    assert {row[name] for name in ("isegressgateway", "isingressgateway", "isrelay")} == {"no"}
    assert other.call("POST", path + "/createingress").status == 403
    said = boss.call("POST", path + "/creategateway", {"ranges": ["0.0.0.0/0"]})
    assert said.status == 400 and "all traffic" in said.sentence
    assert boss.call("POST", path + "/creategateway", {"ranges": ["10.66.1.0/24"]}).status == 409
    assert {"node egress", "node relay off"} <= {row["action"] for row in boss.get("/api/audit")}


def test_access_by_rest(home):
    one, two = clients(home, 2, home.key())
    boss = make_user(home, "boss", admin=True)
    path = "/api/networks/default/acls"
    made = boss.good("POST", path, {"node1": one.node, "node2": two.name})
    assert (made["node1"], made["node2"], made["name2"]) == (one.node, two.node, two.name)
    assert [{row["node1"], row["node2"]} for row in boss.get(path)] == [{one.node, two.node}]
    settle((one, two))
    assert one.me["deny"] == [two.node] and two.me["deny"] == [one.node]
    assert boss.good("DELETE", "%s/%s/%s" % (path, two.node, one.node))["Code"] == 200
    settle((one, two))
    assert "deny" not in one.me and boss.get(path) == []
    assert boss.call("POST", path, {"node1": one.node}).status == 404


def test_a_node_is_found_by_its_mac_address(home):
    node = Client(home)
    node.facts["mac"] = "02:00:5e:00:53:01"
    node.join(home.key())
    boss = make_user(home, "boss", admin=True)
    assert boss.get("/api/nodes/default/02:00:5E:00:53:01")["id"] == node.node
    twin = Client(home, source="198.51.100.2")
    twin.facts["mac"] = node.facts["mac"]
    twin.join(home.key())
    assert boss.call("GET", "/api/nodes/default/02:00:5e:00:53:01").status == 404
    made = boss.good("POST", "/api/nodes/default", {"publickey": wireguard_key(), "macaddress": "02:00:5E:00:53:09"})
    assert boss.get("/api/nodes/default/" + made["macaddress"])["id"] == made["id"]
    assert boss.get("/api/nodes/default/" + node.node)["macaddress"] == "02:00:5e:00:53:01"
    assert boss.good("PUT", "/api/nodes/default/" + node.node, {"macaddress": ""})["macaddress"] == node.node
