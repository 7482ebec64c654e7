# SPDX-License-Identifier: Apache-2.0
"""From text to values: what tools print (recorded in tests/data), what the server sends, what lies on disk.

Parts: WG - IP - PROC - ARBITRARY TEXT - ADDRESSES AND NAMES - NEWS - FILES
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import string
import sys

import pytest
from agentkit import IF, PRIVATE, Standing, config_of, kernels, node_of, own_settings, record, recorded, view_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel import key_like

import netclient_lite as agent
from netclient_lite import (
    BadAnswer,
    Config,
    Counters,
    Invalid,
    Memory,
    NetclientError,
    Secret,
    View,
    b64,
    check_address,
    check_key,
    check_name,
    check_network,
    check_port,
    fold_name,
    is_public,
    parse_arp,
    parse_default_gateway,
    parse_dump,
    parse_links,
    parse_me,
    parse_news,
    parse_record,
    parse_routes,
    parse_token,
    split_endpoint,
    split_url,
    unb64,
)

usual = settings(max_examples=60, deadline=None)

# What a tool might print if it were of another kind than ours: any text, and what looks nearly right.
SCRAPS = (
    *("2: eth0: <UP> mtu 1500", "    inet 10.0.0.1/24 x", "    inet 10.0.0.1/99", "    inet6 fe80::1%eth0/64", "    inet peer"),
    *(
        "default via 10.0.0.1",
        "10.0.0.0/8 dev x",
        "fd00::/200",
        "unreachable",
        "throw 10.0.0.0/8",
        "00000000",
        "10.0.0.1 0x1 0x2 zz",
    ),
    *(
        "eth0 00000000 FFFFFFFFFF 3 0 0 100 00000000",
        "eth0 00000000 0101A8C0 3 0 0 x 00000000",
        "eth0 00000000 x 3 0 0 1 00000000",
    ),
    *("(none)\t(none)\t5\toff", "a\tb\tc\td", "k\tp\te\ta\t1\t2\t3\toff", "k\tp\te\ta\tx\t2\t3\t²", "\x1c", "\t" * 7, "W10", "²"),
)
texts = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(SCRAPS), st.text(string.printable, max_size=40))).map("\n".join))


# ---------------------------------------------------------------------------------------------------------------------
# WG
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", recorded("wg-dump-new").values(), ids=recorded("wg-dump-new"))
def test_a_new_interface_has_no_key_and_some_port(text):
    actual = parse_dump(text)
    assert (actual.exists, actual.private, actual.peers) == (True, "", {})
    assert actual.port > 0


@pytest.mark.parametrize("text", recorded("wg-dump-nopeers").values(), ids=recorded("wg-dump-nopeers"))
def test_an_interface_without_peers(text):
    actual = parse_dump(text)
    assert check_key(actual.private) == text.split("\t")[0]
    assert actual.port == 51821
    assert actual.peers == {}


@pytest.mark.parametrize("text", recorded("wg-dump-peers").values(), ids=recorded("wg-dump-peers"))
def test_peers_of_all_kinds(text):
    actual = parse_dump(text)
    peers = {peer.endpoint: peer for peer in actual.peers.values()}
    assert set(peers) == {"127.0.0.1:51822", "[2001:db8::7]:51821", "203.0.113.7:40007", ""}
    assert all(check_key(key) == peer.key for key, peer in actual.peers.items())
    met = peers["127.0.0.1:51822"]  # with a preshared key
    assert met.allowed == {"10.20.30.3/32", "fd00:20:30::3/128", "192.168.7.0/24", "fd00:99::/48"}
    assert met.keepalive == 1
    assert met.handshake > 1_500_000_000
    assert met.rx > 0
    assert met.tx > 0
    six, silent, bare = peers["[2001:db8::7]:51821"], peers["203.0.113.7:40007"], peers[""]
    assert (six.keepalive, six.handshake, six.rx, six.allowed) == (20, 0, 0, {"10.20.30.4/32"})
    assert (silent.keepalive, silent.handshake, silent.rx) == (0, 0, 0)
    assert (bare.allowed, bare.keepalive, bare.handshake, bare.tx) == (frozenset(), 0, 0, 0)


@pytest.mark.parametrize("text", recorded("wg-dump-peers").values(), ids=recorded("wg-dump-peers"))
def test_a_dump_that_was_cut_off_is_not_half_believed(text):
    whole = parse_dump(text)
    for cut in range(len(text)):
        with contextlib.suppress(Invalid):
            part = parse_dump(text[:cut])
            for key, peer in part.peers.items():  # whole lines, but for numbers at the very end
                assert key in whole.peers
                assert peer[:3] == whole.peers[key][:3]


# ---------------------------------------------------------------------------------------------------------------------
# IP
# ---------------------------------------------------------------------------------------------------------------------

LINKS = {
    "lo": (True, 65536, ["127.0.0.1/8", "::1/128"]),
    "lan": (True, 1500, []),
    "eth0": (True, 1500, ["192.168.1.10/24", "192.168.1.11/24", "2001:db8:1::10/64"]),
    "isp": (True, 1500, []),
    "ppp0": (True, 1500, ["100.64.0.2/32"]),
    "docker0": (False, 1500, ["172.17.0.1/16"]),
    "nm-demo": (True, 1280, ["10.20.30.2/24", "fd00:20:30::2/64"]),
    "other": (True, 1420, []),
}


def known(links):
    """Up, MTU and addresses: what every version of the parser tells."""
    return {name: tuple(link)[:3] for name, link in links.items()}


@pytest.mark.parametrize("text", recorded("ip-addr").values(), ids=recorded("ip-addr"))
def test_all_interfaces_of_a_machine(text):
    assert known(parse_links(text)) == LINKS


@pytest.mark.parametrize("text", recorded("ip-addr-dev").values(), ids=recorded("ip-addr-dev"))
def test_one_interface(text):
    assert known(parse_links(text)) == {"nm-demo": LINKS["nm-demo"]}


@pytest.mark.parametrize("text", recorded("ip-addr-dev-down").values(), ids=recorded("ip-addr-dev-down"))
def test_one_interface_that_is_down(text):
    assert known(parse_links(text)) == {"nm-demo": (False, *LINKS["nm-demo"][1:])}


@pytest.mark.parametrize("text", recorded("ip-addr").values(), ids=recorded("ip-addr"))
def test_only_real_networks_count_as_this_machines_own(text):
    system = agent.System(lambda *argv: text)
    assert list(system.subnets(system.links())) == ["192.168.1.10/24", "192.168.1.11/24", "2001:db8:1::10/64", "100.64.0.2/32"]


@pytest.mark.parametrize("text", recorded("ip-route-dev").values(), ids=recorded("ip-route-dev"))
def test_routes(text):
    assert parse_routes(text) == {"10.20.30.0/24", "10.99.0.1/32", "192.168.7.0/24"}


@pytest.mark.parametrize("text", recorded("ip-6-route-dev").values(), ids=recorded("ip-6-route-dev"))
def test_routes_of_ipv6(text):
    assert parse_routes(text) == {"fd00:20:30::/64", "fd00:98::1/128", "fd00:99::/48"}


@pytest.mark.parametrize("text", recorded("ip-route-dev-eth0").values(), ids=recorded("ip-route-dev-eth0"))
def test_the_default_route_is_not_ours(text):
    assert parse_routes(text) == {"192.168.1.0/24"}


@usual
@given(kernels())
def test_what_the_model_shows_is_read_back(kernel):
    system = agent.System(kernel)
    assert system.actual(IF, system.links()) == kernel.actual()


# ---------------------------------------------------------------------------------------------------------------------
# PROC
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.byteorder != "little", reason="/proc/net/route was recorded on a little-endian machine")
@pytest.mark.parametrize("text", recorded("proc-net-route").values(), ids=recorded("proc-net-route"))
def test_the_default_gateway_is_that_of_the_lowest_metric(text):
    assert parse_default_gateway(text) == ("eth0", "192.168.1.1")
    without = "".join(line for line in text.splitlines(keepends=True) if "0101A8C0" not in line)
    assert parse_default_gateway(without) == ("ppp0", "100.64.0.1")
    assert parse_default_gateway(text.splitlines()[0] + "\n") == ("", "")
    assert parse_default_gateway("") == ("", "")


@pytest.mark.parametrize("text", recorded("proc-net-arp").values(), ids=recorded("proc-net-arp"))
def test_the_mac_of_a_neighbour(text):
    assert parse_arp(text, "192.168.1.1") == "02:00:5e:10:00:01"
    assert parse_arp(text, "192.168.1.77") == ""  # asked, and no answer came
    assert parse_arp(text, "192.168.1.7") == ""
    assert parse_arp("", "192.168.1.1") == ""


# ---------------------------------------------------------------------------------------------------------------------
# ARBITRARY TEXT
# ---------------------------------------------------------------------------------------------------------------------


PARSERS = (
    *(parse_dump, parse_links, parse_routes, parse_default_gateway, parse_token, Config.parse),
    *(check_network, check_name, check_key, check_address, split_endpoint, agent.parse_stored),
)


def read_or_refused(parser, text):
    try:
        parser(text)
    except NetclientError as no:
        assert str(no)


@usual
@given(texts)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__qualname__)
def test_arbitrary_text_is_read_or_refused_by_a_sentence(parser, text):
    read_or_refused(parser, text)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__qualname__)
def test_nearly_right_text_is_read_or_refused_by_a_sentence(parser):
    for first in SCRAPS:
        for second in SCRAPS:
            for text in (first, f"{first}\n{second}"):
                read_or_refused(parser, text)
    read_or_refused(parser, b64(b"[" * 100_000))


@usual
@given(texts, texts)
def test_arbitrary_neighbours_are_read(text, address):
    assert isinstance(parse_arp(text, address), str)


@usual
@given(texts)
@pytest.mark.parametrize("parser", [split_url, unb64, lambda text: Secret.parse("demo", text), Counters, agent.fold_name])
def test_arbitrary_text_in_the_first_section_is_a_value_error_at_most(parser, text):
    with contextlib.suppress(ValueError):  # that section knows no error of ours
        parser(text)


# ---------------------------------------------------------------------------------------------------------------------
# ADDRESSES AND NAMES
# ---------------------------------------------------------------------------------------------------------------------


@usual
@given(st.one_of(st.ip_addresses(), st.ip_addresses(v=6)), st.integers(1, 65535))
def test_an_endpoint_comes_back_as_it_was(address, port):
    text = agent.endpoint(str(address), port)
    place, number = split_endpoint(text)
    assert number == port
    mapped = getattr(address, "ipv4_mapped", None)
    assert place == str(mapped or address)
    assert split_endpoint(agent.endpoint(place, number)) == (place, number)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "1.2.3.4", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:-1", "1.2.3.4:5 ", "1.2.3.4:x", "1.2.3.4:²"),
        *("host:51821", "::1:51821", "[::1]", "[1.2.3.4]:5", "[fe80::1%eth0]:5", "1.2.3:5", "[]:5"),
    ],
)
def test_what_is_no_endpoint(text):
    with pytest.raises(Invalid):
        split_endpoint(text)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://203.0.113.10:8081", (False, "203.0.113.10", 8081, "")),
        ("https://vpn.example.org", (True, "vpn.example.org", 443, "")),
        ("http://vpn.example.org/", (False, "vpn.example.org", 80, "")),
        ("https://[2001:db8::1]:8443/mesh/", (True, "2001:db8::1", 8443, "/mesh")),
        ("http://[::1]", (False, "::1", 80, "")),
        ("https://vpn.example.org/a/b", (True, "vpn.example.org", 443, "/a/b")),
    ],
)
def test_urls(url, parts):
    assert split_url(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        *("", "203.0.113.10:8081", "ftp://x", "http://", "http://:8081", "http://x:0", "http://x:65536", "http://x:y", "://x"),
        *(
            "http://2001:db8::1:8081",
            "http://[::1",
            "http://a b",
            "http://a\r\nX: y",
            "http://a/\r\nX: y",
            "http://u:p@h:1",
            "http://x:²",
        ),
    ],
)
def test_what_is_no_url(url):
    # a blank or a line feed in it would end up in the request
    with pytest.raises(ValueError, match="http"):
        split_url(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("203.0.113.7", True), ("8.8.8.8", True), ("2001:db8::7", True), ("2a00::1", True), ("11.0.0.1", True)),
        *(("10.0.0.1", False), ("172.16.0.1", False), ("172.32.0.1", True), ("192.168.1.1", False), ("127.0.0.1", False)),
        *(("100.64.0.1", False), ("100.128.0.1", True), ("169.254.1.1", False), ("224.0.0.1", False), ("255.255.255.255", False)),
        *(("0.0.0.0", False), ("::", False), ("::1", False), ("fd00::1", False), ("fe80::1", False), ("ff02::1", False)),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


@usual
@given(st.text())
def test_any_host_name_gives_a_node_name(text):
    assert check_name(fold_name(text)) == fold_name(text)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Router-1.lan", "router-1"),
        ("OpenWrt", "openwrt"),
        ("my_nas", "my-nas"),
        ("日本", "node"),
        ("-a-", "a"),
        ("x" * 80, "x" * 62),
    ],
)
def test_host_names(host, name):
    assert fold_name(host) == name


# ---------------------------------------------------------------------------------------------------------------------
# NEWS
# ---------------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


def whole_news(word="2.00000002", **more):
    peer = record(
        "b", ip="10.20.30.5", ip6="fd00:20::5", ips=["192.168.7.0/24"], at="203.0.113.7:40007", local="192.168.1.2:51821"
    )
    dual = own_settings(ip6="fd00:20::2", range6="fd00:20::/64", deny=[node_of("c")])
    return {"word": word, "peers": [peer, record("me", ip="10.20.30.2")], "me": dual, **more}


PLACES = (
    *((), ("word",), ("from",), ("gone",), ("state",), ("peers",), ("peers", 0), ("me",)),
    *(("peers", 0, name) for name in ("id", "name", "key", "ip", "ip6", "ips", "static", "at", "seen", "local", "lan")),
    *(("me", name) for name in (*own_settings(), "ip6", "range6", "dns", "forwarding", "punch", "local", "deny")),
)


@st.composite
def odd_news(draw):
    """An answer that is right but for one place, where anything stands."""
    news = json.loads(json.dumps(whole_news()))
    place, odd = draw(st.sampled_from(PLACES)), draw(json_values)
    if not place:
        return odd
    at = news
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = odd
    return news


def frozen(view):
    return json.dumps(view.values(), sort_keys=True)


@settings(max_examples=250, deadline=None)
@given(st.one_of(odd_news(), json_values))
def test_any_answer_is_a_view_or_a_bad_answer_and_what_was_known_stays(news):
    view = view_of(record("a", ip="10.20.30.4"))
    before = frozen(view)
    with contextlib.suppress(BadAnswer):
        after = parse_news(view, news)
        # whatever was taken can be made into an interface
        wanted, _ = agent.desire(after, node_of("me"), config_of(), PRIVATE, {}) if after.me else (None, [])
        if wanted:
            for peer in wanted.peers.values():
                assert check_key(peer.key) == peer.key
                assert all(str(ipaddress.ip_network(text)) == text for text in peer.allowed)
        for node, peer in after.peers.items():
            assert isinstance(node, str)
            for kind in {"static", "at", "seen", "local"} & set(peer):
                split_endpoint(peer[kind])
        json.dumps(after.values())
    assert frozen(view) == before


def answered(session, body, status=200):
    """The server's own answer, with its MAC, whatever the body says."""
    line = session.counters.line(session.secret)
    head = f"1 {status} 203.0.113.7 1800000000 15"
    proof = agent.mac(session.secret.key("answer mac"), head.encode(), line.rpartition(" ")[2].encode(), body)
    return session._verified(line, agent.Reply(status, {"nm-lite": f"{head} {proof}"}, body, ""))


@pytest.fixture
def session():
    quiet = agent.Session(config_of(), SECRET, Counters(), lambda: None, agent.System(agent.Run()))
    quiet.box = None
    return quiet


def test_an_authenticated_body_that_is_no_json_is_a_bad_answer(session):
    whole = json.dumps(whole_news()).encode()
    assert answered(session, whole)[1] == whole_news()
    assert answered(session, b"", 204)[1] is None
    odd = [whole[:cut] for cut in range(1, len(whole))]
    for body in (*odd, b"\xff\xfe", b"\0", b"[" * 200_000, b'{"a":' * 200_000):
        with pytest.raises(BadAnswer):
            answered(session, body)


def test_a_snapshot_replaces_and_a_delta_is_laid_over():
    view = parse_news(View(), whole_news())
    assert set(view.peers) == {node_of("b"), node_of("me")}
    assert (view.word, view.state) == ("2.00000002", "active")
    news = {"word": "3.00000003", "from": "2.00000002", "gone": [node_of("b")], "peers": [record("c", ip="10.20.30.6")]}
    after = parse_news(view, news)
    assert set(after.peers) == {node_of("me"), node_of("c")}
    assert after.me == view.me
    assert set(view.peers) == {node_of("b"), node_of("me")}
    again = parse_news(after, {"word": "4.00000004", "peers": [], "me": own_settings(), "state": "disabled"})
    assert (again.peers, again.state) == ({}, "disabled")


@pytest.mark.parametrize(
    "change",
    [
        {"from": "9.00000009"},
        {"word": "2"},
        {"word": "2.0000000g"},
        {"word": "2.00000002\n"},
        {"word": "٢.00000002"},
        {"peers": None},
        {"peers": [{"id": "x"}]},
        {"me": None},
        {"gone": 5},
    ],
    ids=str,
)
def test_answers_that_do_not_fit_are_refused(change):
    with pytest.raises(BadAnswer):
        parse_news(view_of(), whole_news(**change))


@pytest.mark.parametrize(
    "change",
    [
        *({"key": "x"}, {"key": key_like("a")[:-1]}, {"key": "A" * 43 + "="}, {"name": "a b"}, {"name": ""}, {"ip": "fd00::1"}),
        *(
            {"ip6": "10.0.0.1"},
            {"ip": "10.0.0.1/24"},
            {"ips": ["10.0.0.1/24"]},
            {"ips": ["x"]},
            {"static": "host:1"},
            {"at": "1.2.3.4"},
        ),
        *(
            {"local": "[fe80::1%eth0]:5"},
            {"seen": "1.2.3.4:0"},
            {"ip": 5},
            {"ip6": 5},
            {"ips": [5]},
            {"ips": [True]},
            {"ips": "10.0.0.0/8"},
        ),
    ],
    ids=str,
)
def test_odd_records_are_refused(change):
    with pytest.raises((Invalid, ValueError)):
        parse_record({**record("b"), **change})


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"port": 80},
            {"port": "51821"},
            {"port": True},
            {"mtu": 100},
            {"mtu": 1280.0},
            {"keepalive": -1},
            {"keepalive": 70000},
        ),
        *(
            {"ip": "10.99.0.1"},
            {"ip": 169090562, "range": 169090562},
            {"range": False},
            {"range": "10.20.30.1/24"},
            {"range": None},
            {"name": "-"},
            {"ip": "fd00::2"},
        ),
    ],
    ids=str,
)
def test_odd_own_settings_are_refused(change):
    with pytest.raises((Invalid, ValueError, TypeError, KeyError)):
        parse_me(own_settings(**change))


def test_unknown_fields_are_dropped():
    assert parse_record({**record("b", ip="10.20.30.5"), "relay": {"x": 1}}) == record("b", ip="10.20.30.5")
    assert "color" not in parse_me(own_settings(color="blue"))
    assert parse_news(View(), whole_news(color="blue")).word == "2.00000002"


# ---------------------------------------------------------------------------------------------------------------------
# FILES
# ---------------------------------------------------------------------------------------------------------------------

SECRET = Secret("demo", node_of("me"), b64(b"c" * 16), b"a" * 32, b"z" * 32, b"s" * 32)
words = st.text(string.ascii_letters + string.digits + ".-_:/", min_size=1, max_size=20)


@usual
@given(
    words, words, st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32)
)
def test_a_secret_comes_back_as_it_was(node, look, public, shared, pin):
    again = Secret.parse("demo", Secret("demo", node, look, public, shared, pin).text())
    assert (again.node, again.look, again.agent, again.z, again.pin) == (node, look, public, shared, pin)


def test_a_secret_that_was_cut_off_is_refused():
    text = SECRET.text()
    for cut in range(len(text) - 1):
        with pytest.raises(ValueError):
            Secret.parse("demo", text[:cut])


@usual
@given(words, st.integers(0, 10**9), st.integers(-1, 10**9), words, st.integers(0, 10**7), words, words)
def test_counters_come_back_as_they_were(incarnation, epoch, sequence, word, due, interface, local):
    counters = Counters()
    counters.incarnation, counters.epoch, counters.sequence, counters.word = incarnation, epoch, sequence, word
    counters.due, counters.interface, counters.local = float(due), interface, local
    again = Counters(counters.text())
    assert vars(again) == vars(counters)


def test_counters_that_were_cut_off_start_anew():
    text = "i 3 4 5.00000005 s http://203.0.113.10:8081 12345 mark nm-demo 192.168.1.10\n"
    assert Counters(text).text() == text
    for cut in range(text.rindex(" ") + 1):
        assert Counters(text[:cut]).text() == Counters().text()


def test_damaged_counters_start_anew():
    # a node that cannot read them must still check in
    for text in ("i x 4 w s u 1 m n l", "i 3 4.5 w s u 1 m n l", "i 3 4 w s u soon m n l", "\0" * 90, "\0 " * 10):
        assert Counters(text).text() == Counters().text()


@usual
@given(
    st.dictionaries(st.sampled_from(agent.WISHES), st.one_of(st.booleans(), st.integers(0, 100), words)),
    st.lists(words, max_size=3),
    st.integers(1024, 65535),
    st.booleans(),
)
def test_a_config_comes_back_as_it_was(wishes, servers, port, fixed):
    config = config_of(wishes=wishes, servers=servers, port=port, fixed=fixed)
    assert vars(Config.parse(config.text())) == vars(config)


def test_a_config_of_a_newer_agent_keeps_what_is_known_and_an_older_one_gets_defaults():
    values = json.loads(config_of(port=51821).text())
    values["color"] = "blue"
    del values["daemon"]
    config = Config.parse(json.dumps(values))
    assert (config.port, config.daemon) == (51821, "on")
    with pytest.raises(Invalid, match="newer"):
        Config.parse(json.dumps({**values, "version": 2}))


def test_a_config_that_was_cut_off_is_refused():
    text = config_of(wishes={"name": "router-1"}).text()
    for cut in range(len(text) - 1):
        with pytest.raises(Invalid):
            Config.parse(text[:cut])


def test_a_view_and_a_memory_come_back_as_they_were():
    memory = Memory()
    memory.view = parse_news(View(), whole_news())
    memory.facts, memory.seen, memory.kept, memory.trial = {"port": 51821}, {node_of("b"): "x"}, {"n": 5.5}, View().values()
    again = Memory(json.loads(memory.text()))
    assert again.text() == memory.text()
    assert frozen(View(json.loads(json.dumps(memory.view.values())))) == frozen(memory.view)


def test_a_memory_does_not_share_what_it_was_made_from():
    values = json.loads(Memory().text())
    one, other = Memory(values), Memory(values)
    one.seen["x"] = "y"
    one.view.peers["x"] = {}
    assert other.text() == Memory().text()


@pytest.mark.parametrize("kind", ["memory", "peers"])
def test_a_damaged_state_file_is_as_good_as_none(kind, tmp_path):
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5")))
    standing.node.save_memory()
    standing.node.save_good()
    context, secret = standing.node.context, standing.node.secret
    other = {"memory": "peers", "peers": "memory"}[kind]
    path = context.paths.of(kind, "demo")
    with open(path, encoding="utf-8") as stream:
        text = stream.read().rstrip("\n")
    context.files.remove(context.paths.of(other, "demo"))
    damaged = [text[:cut] for cut in range(0, len(text), 7)]
    damaged += ["null", "5", "[]", '{"view": 5}', '{"peers": [1]}', '{"seen": "ab", "peers": 5}', "\0" * 50, '{"me": 7, "rx": 7}']
    for content in damaged:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(content)
        node = agent.Node(context, config_of(), secret, PRIVATE)
        assert node.memory.view.peers == {}, content


def test_a_damaged_membership_names_the_file_and_the_cure_and_no_key(tmp_path):
    standing = Standing(tmp_path, view_of())
    paths, files = standing.node.paths, standing.node.files
    files.write(paths.of("netconfig", "demo"), config_of().text())
    files.write(paths.of("secret", "demo"), SECRET.text())
    files.write(paths.of("wgkey", "demo"), PRIVATE + "\n")
    assert agent.Node.load(standing.node.context, "demo").private == PRIVATE
    for kind in ("netconfig", "secret", "wgkey"):
        with open(paths.of(kind, "demo"), encoding="utf-8") as stream:
            text = stream.read()
        for content in ("", text[: len(text) - 4], text[1:], "\0" * len(text)):
            files.write(paths.of(kind, "demo"), content)
            with pytest.raises(NetclientError, match="--force") as caught:
                agent.Node.load(standing.node.context, "demo")
            assert f"{kind}-demo" in str(caught.value)
            assert PRIVATE[1:30] not in str(caught.value)
        files.write(paths.of(kind, "demo"), text)


@pytest.mark.parametrize("port", [1024, 51821, 65535])
def test_ports(port):
    assert check_port(port) == port


@pytest.mark.parametrize("port", [0, 80, 1023, 65536, -1, True, "51821", 51821.0, None])
def test_what_is_no_port(port):
    with pytest.raises(Invalid, match="1024"):
        check_port(port)
