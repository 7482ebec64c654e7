# SPDX-License-Identifier: Apache-2.0
"""Two families of addresses: what is told of both, which of them is tried, and what is said where none is shared."""

from __future__ import annotations

import contextlib
import http.client
import json

import pytest
from agentkit import Standing, node_of, record, view_of
from hypothesis import given
from hypothesis import strategies as st
from kernel import key_like
from restkit import PASSWORD
from serverkit import Client, Server
from test_holes import CREATE
from test_mesh import AT, NODE, observed, shown

import netclient_lite as agent
import netmaker_core

SEEN, SEEN6, OWN6 = "203.0.113.7:51821", "[2001:db8:7::7]:51821", "[2001:db8:7::a]:51821"
STATIC, STATIC6 = "198.51.100.4:51821", "[2001:db8:4::4]:51821"
LAN6 = """3: eth1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether 02:00:00:00:00:02 brd ff:ff:ff:ff:ff:ff
    inet6 2001:db8:1::10/64 scope global dynamic mngtmpaddr noprefixroute
       valid_lft forever preferred_lft forever
    inet6 fe80::1/64 scope link
       valid_lft forever preferred_lft forever
"""


def place(*ways: int, subnets: tuple[str, ...] = ("192.168.1.10/24",), **more) -> agent.Place:
    return agent.Place("203.0.113.9", subnets, ways=frozenset(ways), **more)


# ---- which endpoint


@pytest.mark.parametrize(
    ("fields", "ways", "expected"),
    [
        ({"seen": SEEN, "local6": OWN6}, (4, 6), [SEEN, OWN6]),
        ({"at": AT, "seen": SEEN, "local6": OWN6}, (4,), [AT, SEEN]),
        ({"at": AT, "seen": SEEN, "local6": OWN6}, (6,), [OWN6]),
        ({"seen": SEEN, "local6": OWN6}, (), [SEEN, OWN6]),  # not known: both are tried
        ({"seen": SEEN6}, (4,), []),
        ({"seen": SEEN6, "local6": SEEN6}, (6,), [SEEN6]),
        ({"static": STATIC, "seen": SEEN, "local6": OWN6}, (4, 6), [STATIC]),
        ({"static": STATIC, "seen": SEEN, "local6": OWN6}, (6,), [OWN6]),
        ({"static": STATIC6, "seen": SEEN, "local6": OWN6}, (4,), [SEEN]),
        ({"static": "192.168.7.4:51821", "local6": OWN6}, (6,), ["192.168.7.4:51821"]),  # by a route of its own, perhaps
        ({"seen": SEEN, "local": "192.168.1.20:51821"}, (6,), ["192.168.1.20:51821"]),
    ],
)
def test_only_families_that_lead_out_are_tried(fields, ways, expected):
    assert agent.candidates(record("b", **fields), place(*ways)) == expected


def test_a_neighbour_needs_no_way_out():
    here = place(4, subnets=("192.168.1.10/24", "2001:db8:7::b/64"))
    assert agent.candidates(record("b", seen=SEEN, local6=OWN6), here) == [SEEN, OWN6]


def test_without_hole_punching_its_own_address_counts():
    assert agent.candidates(record("b", at=AT, seen=SEEN, local6=OWN6), place(4, 6, punch=False)) == [SEEN, OWN6]


@pytest.mark.parametrize("local", ["[fd12:3::20]:51821", "192.168.9.20:51821"])
def test_a_local_only_network_takes_the_local_address_of_either_family(local):
    peer = record("b", local=local, local6=OWN6)
    for ways in ((4,), (6,), ()):
        assert agent.candidates(peer, place(*ways, local_only=True)) == [local]
        assert agent.apart(peer, place(*ways, local_only=True)) == ""


def test_on_an_ipv6_lan_the_address_that_the_server_saw_is_the_local_one():
    here = place(6, subnets=("2001:db8:7::b/64",), lan="9f31c2aa")
    for lan in ("9f31c2aa", ""):
        assert agent.candidates(record("b", seen=SEEN6, local=SEEN6, lan=lan), here) == [SEEN6]
    assert agent.candidates(record("b", seen=SEEN6, local=OWN6, lan="9f31c2aa"), here) == [OWN6, SEEN6]


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "static": st.sampled_from((STATIC, STATIC6)),
        "at": st.sampled_from((AT, "[2001:db8:7::7]:40007")),
        "seen": st.sampled_from((SEEN, SEEN6)),
        "local6": st.just(OWN6),
    },
)


@given(FIELDS, st.frozensets(st.sampled_from((4, 6))))
def test_who_cannot_be_called_is_said_to_be_so_and_nobody_else(fields, ways):
    peer, here = record("b", **fields), place(*ways)
    tried = agent.candidates(peer, here)
    assert bool(agent.apart(peer, here)) == (bool(fields) and not tried)
    assert all(6 if text[0] == "[" else 4 in ways for text in tried if ways)


# ---- as text


@given(st.ip_addresses(v=6), st.integers(1, 65535))
def test_an_ipv6_address_is_one_however_it_is_written(address, port):
    mapped = getattr(address, "ipv4_mapped", None)
    canonical = agent.endpoint(str(mapped or address), port)
    for text in (str(address), address.exploded, address.exploded.upper()):
        assert agent.endpoint(*agent.split_endpoint(f"[{text}]:{port}")) == canonical
        assert agent.split_url(f"http://[{text}]:{port}/nm/") == (False, text, port, "/nm")
        assert f"\r\nHost: [{text}]:{port}\r\n".encode() in agent.post(text, port, "", "/", "")
    line = "\t".join([key_like("b"), "(none)", f"[{address}]:{port}", "fd00::2/128", "0", "0", "0", "off"])
    device = agent.parse_dump(f"(none)\t{key_like('a')}\t51821\toff\n{line}\n")
    assert device.peers[key_like("b")].endpoint == canonical


@pytest.mark.parametrize(
    "text", ["[fe80::1%eth0]:51821", "fe80::1%eth0", "2001:db8::1:51821", "[203.0.113.7]:1", "[2001:db8::1]"]
)
def test_zones_and_bare_addresses_are_no_endpoints(text):
    with pytest.raises(agent.Invalid):
        agent.split_endpoint(text)


# ---- what is told


def test_a_pair_without_a_common_family_is_told_as_mute_after_a_minute(tmp_path):
    """So that the server finds a relay for it."""
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5", seen=SEEN6), record("c", ip="10.20.30.6", seen=SEEN)))
    node = standing.node
    node.system.sources = lambda: {4: "192.168.1.10"}
    standing.settle()
    assert {key: live.endpoint for key, live in standing.kernel.actual().peers.items()} == {
        key_like("b"): "",
        key_like("c"): SEEN,
    }
    node.memory.waiting = {key: since - 61 for key, since in node.memory.waiting.items()}
    lone = [each["key"] for each in node.others() if agent.apart(each, node.place)]
    told = agent.report(node.memory, node._live, set(), {}, {}, agent.time.monotonic(), lone)
    assert told["mute"][node_of("b")] is True
    peers = {peer["name"]: peer for peer in agent.status_of(node)["peers"]}
    assert peers["b"]["path"] == "none" and "IPv6 only" in peers["b"]["why"] and peers["c"]["why"] == "no answer yet"
    node.system.sources = lambda: {4: "192.168.1.10", 6: "2001:db8:1::10"}
    standing.settle()
    assert standing.kernel.actual().peers[key_like("b")].endpoint == SEEN6


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("2001:db8:1::10", "2001:db8:1::10"),
        ("2001:db8:1::11", ""),  # of a tunnel
        ("fd00::10", ""),
        ("", ""),
    ],
)
def test_the_own_address_is_one_of_a_card_that_needs_no_nat(tmp_path, source, told):
    standing = Standing(tmp_path, view_of())
    standing.kernel.others += LAN6 + "    inet6 fd00::10/64 scope global\n       valid_lft forever preferred_lft forever\n"
    standing.node.system.sources = lambda: {6: source} if source else {}
    standing.settle()
    assert standing.node.facts()["local6"] == told
    assert standing.node.facts()["local"] == "192.168.1.10"


def test_the_ways_out_of_a_machine():
    found = agent.System(agent.Run()).sources()
    assert set(found) <= {4, 6}
    for version, address in found.items():
        assert agent.check_address(address, version) == address


def test_a_name_with_addresses_of_both_families_is_called_by_ipv4_first(monkeypatch):
    """So the server sees what a NAT makes of it; the IPv6 address is a fact."""
    tried = []

    class Socket:
        def __init__(self, family, *_):
            self.family = family

        def connect(self, address):
            tried.append(address[0])
            raise OSError("no")

        settimeout = close = lambda *_: None

    both = [(family, 1, 6, "", (text, 80)) for family, text in ((10, "2001:db8::2"), (2, "203.0.113.2"), (2, "203.0.113.1"))]
    monkeypatch.setattr(agent._socket, "getaddrinfo", lambda *_: both)
    monkeypatch.setattr(agent._socket, "socket", Socket)
    with pytest.raises(OSError, match="no"):
        agent._connected("vpn.example.org", 80, 1)
    assert tried == ["203.0.113.2", "203.0.113.1", "2001:db8::2"]


# ---- the server


def test_a_record_has_the_other_family_where_there_is_one():
    node = NODE._replace(local6="2001:db8:7::a")
    assert shown(node)["local6"] == OWN6 and shown(node)["seen"] == SEEN
    assert "local6" not in shown(node._replace(public="2001:db8:7::a"))
    assert "local6" not in json.loads(netmaker_core.record(node, LOCAL_ONLY))


LOCAL_ONLY = netmaker_core.NetworkState("x", "10.0.0.0/24", "", 1, "0" * 8, 1, 51821, 20, 1280, "nm-x", None, True, True)


def test_an_observed_ipv6_endpoint_makes_no_nat_hard():
    unseen = NODE._replace(public="", source="192.168.1.10")
    assert observed((AT, "198.51.100.1"), (OWN6, "2001:db8::9"), node=unseen) == AT
    assert observed((OWN6, "2001:db8::9"), node=unseen) == OWN6


def test_both_families_of_a_node_are_spread(home):
    client = Client(home, source="203.0.113.7").join(home.key())
    client.exchange({"facts": {"local6": "2001:DB8:7:0::A", "port": 51821}})
    assert client.peers[client.node]["seen"] == SEEN and client.peers[client.node]["local6"] == OWN6
    assert agent.parse_record(client.peers[client.node])["local6"] == OWN6
    for bad in ("203.0.113.7", "fe80::1%eth0", "x", "[2001:db8::1]", "fd00::1", "fe80::1", "::ffff:203.0.113.7"):
        assert client.exchange({"facts": {"local6": bad}}).status == 400
    client.exchange({"facts": {"local6": ""}})
    assert "local6" not in client.peers[client.node]


def test_a_node_by_an_ipv6_server_is_seen_in_canonical_form(home):
    client = Client(home, source="2001:DB8:7::0:7").join(home.key())
    client.exchange()
    assert client.peers[client.node]["seen"] == "[2001:db8:7::7]:%d" % home.node(client)["port"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_on_a_socket_of_both_families_this_host_is_itself(tmp_path, address):
    """Through :: IPv4 comes as ::ffff:127.0.0.1: the first administrator's way in, and a trusted proxy's."""
    running = Server(str(tmp_path), None, bind="::", TRUSTED_PROXIES="127.0.0.1 ::1")
    account = json.dumps({"username": "ada", "password": PASSWORD})
    try:
        assert ask(running, address, "GET", "/api/getip") == (200, address.encode())
        assert ask(running, address, "GET", "/api/getip", X_Forwarded_For="::ffff:198.51.100.7") == (200, b"198.51.100.7")
        assert ask(running, address, "POST", CREATE, account, X_Forwarded_For="198.51.100.7")[0] == 403
        assert ask(running, address, "POST", CREATE, account)[0] == 200
    finally:
        running.stop()


def ask(running: Server, address: str, verb: str, path: str, body: str = "", **headers: str) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection(address, running.port, timeout=5)) as line:
        line.request(verb, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = line.getresponse()
        return answer.status, answer.read()
