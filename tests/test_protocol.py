# SPDX-License-Identifier: Apache-2.0
"""The protocol's server side over real HTTP: join, exchange, look, and everything that must have no effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from make_vectors import vectors
from serverkit import Client, Server, clients, settle, wireguard_key

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

ROOT = Path(__file__).resolve().parent.parent


def test_vectors_are_as_written():
    """docs/protocol.md by example; other clients are written against these."""
    written = json.loads((ROOT / "tests" / "data" / "vectors.json").read_text())
    assert vectors() == written


# ---- join


@pytest.mark.parametrize("sealed", [False, True])
def test_join_exchange_and_hear_of_each_other(home, sealed):
    nodes = clients(home, 3, home.key(), sealed=sealed)
    settle(nodes)
    for node in nodes:
        assert node.names() == {"node", "node-2", "node-3"}
        assert node.me["ip"] == node.peers[node.node]["ip"]
        assert node.exchange().status == 204
    assert {node.me["ip"] for node in nodes} == {"10.20.30.1", "10.20.30.2", "10.20.30.3"}
    assert nodes[0].peers[nodes[1].node]["seen"] == nodes[1].source + ":51821"


def test_the_first_request_asks_nothing_and_proves_the_server(home):
    client = Client(home)
    line = client.join_line(b"", "-", os.urandom(16))
    said = client.opened(line, *home.post(agent.JOIN_PATH, line, b"", client.source)[1:])
    assert said.status == 409 and said["incarnation"] == home.core.store.incarnation
    assert said.answer.address == client.source
    assert netmaker_core.nodes(home.core, "default") == []


def test_a_retry_before_the_first_exchange_is_the_same_node(home):
    client, key = Client(home), home.key(uses=1)
    first, second = client.try_join(key), client.try_join(key)
    assert first.value == second.value
    client.node = first["node"]
    assert client.exchange().status == 200
    assert client.try_join(key).status == 409


def test_a_captured_join_makes_no_ghost(home):
    client, key = Client(home), home.key()
    client.join(key)
    captured = client.sent
    client.exchange()
    assert replayed(client, captured) == 409  # in use
    netmaker_core.remove_node(home.core, home.node(client))
    assert replayed(client, captured) == 403  # removed
    assert client.exchange({"confirm": True}).status == 410
    assert replayed(client, captured) == 403  # forgotten
    netmaker_core.remove_key(home.core, "default", netmaker_core.access_keys(home.core, "default")[0]["name"])
    assert replayed(client, captured) == 403  # the key is gone
    assert netmaker_core.nodes(home.core, "default") == []


def replayed(client, captured):
    line, body = captured
    return client.opened(line, *client.home.post(agent.JOIN_PATH, line, body, "192.0.2.66")[1:]).status


@pytest.mark.parametrize("part", range(7))
def test_a_join_altered_anywhere_is_refused(home, part):
    client, key = Client(home), home.key()
    client.try_join(key)
    other = Client(home)
    other.facts = {"key": wireguard_key()}
    other.incarnation = home.core.store.incarnation
    nonce = os.urandom(16)
    body = other.join_body(key, nonce)
    line = other.join_line(body, other.incarnation, nonce)
    fields = line.split(" ")
    fields[part] = "2" if part == 0 else flipped(fields[part])
    status, headers, _ = home.post(agent.JOIN_PATH, " ".join(fields), body, other.source)
    assert status in (400, 403, 404) and "nm-lite" not in headers
    status, headers, _ = home.post(agent.JOIN_PATH, line, body.replace(b"facts", b"fact2"), other.source)
    assert status == 403 and "nm-lite" not in headers
    assert len(netmaker_core.nodes(home.core, "default")) == 1


def flipped(text):
    return ("A" if text[0] != "A" else "B") + text[1:]


@pytest.mark.parametrize(
    "spoil, status, word",
    [
        ({"key": "zzzzzzzz.AAAAAAAAAAAAAAAAAAAAAA"}, 403, "no such access key: ask for another"),
        ({"secret": "AAAAAAAAAAAAAAAAAAAAAA"}, 403, "no such access key"),
        ({"network": "nowhere"}, 404, "no network"),
        ({"facts": {"key": "short"}}, 400, "no WireGuard key"),
        ({"facts": {}}, 400, "no WireGuard key"),
        ({"facts": {"key": "", "colour": "red"}}, 400, "unknown field 'colour'"),
        ({"wishes": {"address": "10.99.0.1"}}, 400, "no address that a node"),
        ({"wishes": {"mtu": "big"}}, 400, "no whole number"),
        ({"wishes": {"dnson": "yes"}}, 400, "neither true nor false"),
        ({"none": True}, 403, "without an access key"),
    ],
)
def test_joins_that_cannot_be_have_their_sentence(home, spoil, status, word):
    key = home.key()
    client = Client(home, network=spoil.get("network", "default"))
    if "colour" in spoil.get("facts", {}):
        client.facts["colour"] = "red"
    elif "facts" in spoil:
        client.facts = spoil["facts"]
    client.wishes = spoil.get("wishes", {})
    if "secret" in spoil:
        key = key.split(".")[0] + "." + spoil["secret"]
    said = client.try_join("" if "none" in spoil else spoil.get("key", key))
    assert said.status == status and word in said["error"]
    assert netmaker_core.nodes(home.core, "default") == []


def test_a_key_used_up_says_so(home):
    key = home.key(uses=1)
    Client(home).join(key)
    said = Client(home).try_join(key)
    assert said.status == 410 and "used up" in said["error"]


def test_wishes_are_met_or_refused(home):
    key = home.key()
    client = Client(home)
    client.wishes = {"name": "nas", "address": "10.20.30.77", "keepalive": 0, "mtu": 1400, "dnson": False}
    client.join(key).exchange()
    assert (client.me["name"], client.me["ip"], client.me["keepalive"]) == ("nas", "10.20.30.77", 0)
    assert (client.me["mtu"], client.me["dns"]) == (1400, False)
    other = Client(home)
    other.wishes = {"address": "10.20.30.77"}
    said = other.try_join(key)
    assert said.status == 409 and "taken" in said["error"]
    assert "choose another" in said["error"]
    other.wishes = {"name": "nas"}
    assert other.try_join(key)["name"] == "nas-2"


def test_a_wished_name_that_is_taken_gets_a_number_in_an_exchange_too(home):
    one, two, three = clients(home, 3, home.key())
    for node in (one, two, three, two):
        assert node.exchange({"wishes": {"name": "nas"}}).status in (200, 204)
    assert [node.me["name"] for node in (one, two, three)] == ["nas", "nas-2", "nas-3"]
    assert one.exchange({"wishes": {"name": "other"}}).status == 200
    two.exchange({"wishes": {"name": "nas"}})
    assert two.me["name"] == "nas"


def test_long_names_that_are_taken_get_numbers_as_well(home):
    key = home.key()
    for number in range(1, 12):
        client = Client(home, source="198.51.100.%d" % number)
        client.wishes = {"name": "n" * 62}
        client.join(key)
        assert client.name == ("n" * 62 if number == 1 else "%s-%d" % ("n" * (61 - len(str(number))), number))


def test_nodes_get_the_networks_port_and_interface_unless_their_user_fixed_one(home):
    home.network("other", "10.21.0.0/16", port=40000, interface="wg7")
    key = home.key("other")
    nodes = [Client(home, "other") for _ in range(4)]
    nodes[2].facts.update(fixed=True, port=45000)
    nodes[3].facts.update(port=1024)
    for node in nodes:
        node.join(key).exchange()
    assert [node.me["port"] for node in nodes] == [40000, 40001, 45000, 40002]
    assert {node.me["interface"] for node in nodes} == {"wg7"}


def test_neighbours_behind_one_address_get_different_ports(home):
    key = home.key()
    one, two, three = Client(home).join(key), Client(home).join(key), Client(home)
    three.facts["fixed"] = True
    three.join(key)
    settle([one, two, three])
    assert [node.me["port"] for node in (one, two, three)] == [51821, 51822, 51821]
    two.exchange({"facts": {"port": 40000}})
    assert two.me["port"] == 40000


def test_failed_joins_are_slowed_down(home):
    home.key()
    for _ in range(25):
        client = Client(home, source="192.0.2.1")
        line = client.join_line(b"", "-", os.urandom(16))
        status = home.post(agent.JOIN_PATH, flipped_mac(line), b"", client.source)[0]
    assert status == 429
    assert Client(home, source="192.0.2.2").try_join(home.key()).status == 200
    home.core.clock.now += 60
    assert home.post(agent.JOIN_PATH, flipped_mac(line), b"", "192.0.2.1")[0] == 403


def flipped_mac(line):
    head, _, mac = line.rpartition(" ")
    return head + " " + flipped(mac)


def test_guessing_one_key_is_slowed_down_from_everywhere(home):
    key_id = home.key().split(".")[0]
    for number in range(25):
        said = Client(home, source="192.0.2.%d" % number).try_join(key_id + ".AAAAAAAAAAAAAAAAAAAAAA")
    assert said.status == 429


def test_sign_up_approve_and_reject(home):
    netmaker_core.set_network(home.core, "default", {"manual": True})
    old = Client(home).join(home.key())
    one, two = Client(home, source="192.0.2.1").join(), Client(home, source="192.0.2.2").join()
    for node in (old, one, two):
        node.exchange()
    said = one.exchange()
    assert said.status == 204 and one.peers == {} and one.me["ip"] == ""
    assert old.names() == {"node"}
    netmaker_core.approve(home.core, home.node(one))
    netmaker_core.reject(home.core, home.node(two))
    settle([old, one])
    assert one.names() == old.names() == {"node", one.name}
    assert one.me["ip"] == "10.20.30.2"
    said = two.exchange()
    assert said.status == 410 and "turned this node away" in said["message"]


# ---- exchange: what must have no effect


def exchange_of(home):
    client = Client(home).join(home.key())
    other = Client(home, source="198.51.100.2").join(home.key())
    settle([client, other])
    return client, other


def test_a_captured_exchange_is_refused_from_anywhere(home):
    client, _ = exchange_of(home)
    client.exchange({"facts": {"os": "one"}})
    captured = client.sent
    client.exchange({"facts": {"os": "two"}})
    for source in (client.source, "192.0.2.66"):
        said = client.send(*captured, source=source)
        assert said.status == 409 and "epoch" in said.value
    assert home.node(client)["os"] == "two" and home.node(client)["source"] == client.source


def test_an_identical_repeat_has_no_second_effect(home):
    client, other = exchange_of(home)
    client.sequence += 1
    first = client.ask({"facts": {"os": "one"}})
    captured = client.sent
    word = home.core.store.word("default")
    other.exchange({"facts": {"local": "192.168.1.2"}})
    again = client.send(*captured)
    assert (first.status, again.status) == (204, 200)  # answered from the present state
    assert home.core.store.word("default")[0] == word[0] + 1
    home.core.clock.now += 61
    assert client.send(*captured).status == 409


def test_a_captured_exchange_is_worth_nothing_after_a_restart(home, tmp_path, clock):
    """Also when what was to be written behind is lost, as by a crash."""
    client, _ = exchange_of(home)
    client.exchange({"facts": {"os": "one"}})
    client.sequence += 1
    client.ask()
    captured = client.sent
    home.stop(flush=False)
    again = Server(home.folder, clock)
    client.home = again
    assert client.send(*captured).status == 409
    assert client.send(*captured, source="192.0.2.66").status == 409
    client.exchange({"facts": {"os": "two"}})
    assert again.node(client)["os"] == "two" and client.epoch > 0
    assert client.send(*captured).status == 409
    again.stop()
    home.core.store = again.core.store  # the fixture stops the first once more
    home.stop = lambda: None


def test_a_number_is_taken_once(home):
    client, _ = exchange_of(home)
    client.exchange()
    assert client.ask().status == 409  # the same number with another nonce
    client.epoch, client.sequence = 7, 0
    assert client.ask().status == 204
    client.epoch, client.sequence = 6, 99
    assert client.ask().status == 409


@pytest.mark.parametrize("part", range(9))
def test_an_exchange_altered_anywhere_is_refused(home, part):
    client, _ = exchange_of(home)
    client.sequence += 1
    body = b'{"facts":{"os":"x"}}'
    fields = client.line(body).split(" ")
    fields[part] = "2" if part == 0 else flipped(fields[part])
    status, headers, _ = home.post(agent.EXCHANGE_PATH, " ".join(fields), body, client.source)
    assert status in (400, 403, 404) and "nm-lite" not in headers
    assert home.node(client)["os"] == ""


@pytest.mark.parametrize("at", range(0, 20, 3))
def test_a_body_altered_anywhere_is_refused(home, at):
    client, _ = exchange_of(home)
    client.sequence += 1
    body = bytearray(b'{"facts":{"os":"x"}}')
    line = client.line(bytes(body))
    body[at] ^= 1
    status, headers, _ = home.post(agent.EXCHANGE_PATH, line, bytes(body), client.source)
    assert status == 403 and "nm-lite" not in headers


def test_an_exchange_for_the_join_path_is_none(home):
    """The path is under the MAC."""
    client, _ = exchange_of(home)
    client.sequence += 1
    fields = client.line().split(" ")[1:-1]
    line = agent.signed(client.key("request mac"), agent.JOIN_PATH, fields)
    assert home.post(agent.EXCHANGE_PATH, line, b"", client.source)[0] == 403


def test_another_incarnation_is_refused(home):
    client, _ = exchange_of(home)
    client.sequence += 1
    body = b'{"facts":{"os":"x"}}'
    said = client.send(client.line(body, incarnation="AAAAAAAAAAA"), body)
    assert said.status == 409 and said["incarnation"] == home.core.store.incarnation
    assert home.node(client)["os"] == ""


@pytest.mark.parametrize(
    "report, word",
    [
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"facts": {"ip": "10.0.0.1"}}, "unknown field 'ip'"),
        ({"facts": {"port": 80}}, "no port"),
        ({"facts": {"port": True}}, "no port"),
        ({"facts": {"local": 7}}, "no text"),
        ({"facts": []}, "no object"),
        ({"seen": {"x": None}}, "no node"),
        ({"seen": {"0" * 16: "1.2.3.4"}}, "no endpoint"),
        ({"mute": {"0" * 16: "yes"}}, "neither true nor false"),
        ({"leave": "yes"}, "neither true nor false"),
        ({"wishes": {"address": "10.20.30.255"}}, "no address that a node"),
        ({"facts": {"os": "x" * 81}}, "form"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_taken(home, report, word):
    client, _ = exchange_of(home)
    client.sequence += 1
    said = client.ask({"facts": {"version": "9"}, **report})
    assert said.status == 400 and word in said["error"], said.value
    assert home.node(client)["version"] == ""
    assert client.send(*client.sent).status in (400, 409)  # not answered as if it had been taken
    client.sequence += 1
    assert client.ask({"facts": {"version": "9"}}).status == 204


@pytest.mark.parametrize("body", [b"[" * 5000, b"[]", b"nonsense", b'{"seen":' + b'{"a":' * 30, b"{}NaN", b'{"mute":NaN}'])
def test_bodies_that_are_no_json_object(home, body):
    client, _ = exchange_of(home)
    client.sequence += 1
    assert client.send(client.line(body), body).status == 400


def test_a_sealed_client_takes_and_sends_sealed_bodies(home):
    client = Client(home, sealed=True).join(home.key())
    client.exchange({"facts": {"os": "OpenWrt"}})
    assert home.node(client)["os"] == "OpenWrt"
    assert b"OpenWrt" not in client.sent[1]
    client.sequence += 1
    body = b'{"facts":{"os":"x"}}'
    line = client.line(body)
    status, headers, answer = home.post(agent.EXCHANGE_PATH, line, body, client.source)
    assert client.opened(line, headers, answer).status == status == 400


def test_what_is_too_large_is_refused_unread(home):
    client, _ = exchange_of(home)
    line = client.line()
    request = agent.post("127.0.0.1", home.port, "", agent.EXCHANGE_PATH, line, b"")
    request = request.replace(b"Content-Length: 0", b"Content-Length: 9999999")
    assert b" 413 " in home.raw(request + b"x" * 100).split(b"\r\n")[0]
    body = b"{" + b" " * (server.MAX_UNPROVEN + 10) + b"}"
    line = Client(home).join_line(body, "-", os.urandom(16))
    assert home.post(agent.JOIN_PATH, line, body)[0] == 413


# ---- addresses


def test_a_new_address_counts_only_with_the_challenge(home):
    client, other = exchange_of(home)
    client.exchange()
    word = home.core.store.word("default")
    client.source = "192.0.2.50"
    client.sequence += 1
    said = client.ask()
    assert said.status == 409 and said.answer.address == "192.0.2.50"
    assert home.node(client)["source"] == "198.51.100.1"
    assert client.ask(challenge=flipped(said["challenge"])).status == 409
    assert client.ask(challenge=said["challenge"]).status == 200
    assert home.node(client)["source"] == "192.0.2.50"
    assert home.core.store.word("default")[0] == word[0] + 1
    other.exchange()
    assert other.peers[client.node]["seen"] == "192.0.2.50:51821"


def test_a_challenge_is_for_one_address_and_one_number(home):
    client, _ = exchange_of(home)
    client.source = "192.0.2.50"
    client.sequence += 1
    challenge = client.ask()["challenge"]
    client.source = "192.0.2.51"
    assert client.ask(challenge=challenge).status == 409
    client.source = "192.0.2.50"
    client.sequence += 1
    assert client.ask(challenge=challenge).status == 409


def test_a_private_source_is_never_given_out(home):
    client = Client(home, source="192.168.77.1").join(home.key())
    client.exchange()
    assert "seen" not in client.peers[client.node]


def test_this_hosts_own_nodes_are_told_as_server_host(home):
    client = Client(home, source="127.0.0.2").join(home.key())
    client.exchange()
    assert client.peers[client.node]["seen"] == "203.0.113.10:51821"


def test_forwarded_addresses_are_believed_from_trusted_proxies_only(tmp_path):
    home = Server(str(tmp_path), None, TRUSTED_PROXIES="10.0.0.1")
    assert home.get("/api/getip", "203.0.113.77")[2] == b"127.0.0.1"
    home.stop()
    home = Server(str(tmp_path), None, TRUSTED_PROXIES="127.0.0.1 10.0.0.0/8")
    for said, believed in (
        ("203.0.113.77", b"203.0.113.77"),
        ("1.2.3.4, 203.0.113.77", b"203.0.113.77"),  # the client's own invention is not looked at
        ("203.0.113.77, 10.1.1.1", b"203.0.113.77"),
        ("::ffff:203.0.113.77", b"203.0.113.77"),
        ("2001:DB8::7", b"2001:db8::7"),
        ("nonsense", b"127.0.0.1"),
    ):
        assert home.get("/api/getip", said)[2] == believed
    home.stop()


def test_observed_endpoints_are_spread_and_move_once_a_minute(home):
    client, other = exchange_of(home)
    third = Client(home, source="198.51.100.3").join(home.key())
    settle([client, other, third])
    other.exchange({"seen": {client.node: "198.51.100.1:40007"}})
    third.exchange()
    assert third.peers[client.node]["at"] == "198.51.100.1:40007"
    other.exchange({"seen": {client.node: "198.51.100.1:40008"}})
    third.exchange()
    assert third.peers[client.node]["at"] == "198.51.100.1:40007"  # not yet
    home.core.clock.now += 61
    home.agents.settle_due()
    third.exchange()
    assert third.peers[client.node]["at"] == "198.51.100.1:40008"
    home.core.clock.now += 61
    third.exchange({"seen": {client.node: "198.51.100.1:40009"}})  # two at once: a hard NAT
    other.exchange()
    assert "at" not in other.peers[client.node]


def test_a_clone_is_refused_and_a_move_is_not(home):
    client, _ = exchange_of(home)
    assert client.exchange({"facts": {"machine": "first"}}).status == 204
    assert client.exchange({"facts": {"machine": "second"}}).status == 204  # a move
    said = client.exchange({"facts": {"machine": "first"}})
    assert said.status == 409 and "another machine" in said["error"]
    home.core.clock.now += 3601
    assert client.exchange({"facts": {"machine": "first"}}).status == 204


# ---- the end of a membership


def test_a_removed_node_is_told_until_it_confirms(home):
    client, other = exchange_of(home)
    netmaker_core.remove_node(home.core, home.node(client))
    for _ in range(2):
        said = client.exchange()
        assert said.status == 410 and said["state"] == "removed" and said["message"]
    other.exchange()
    assert other.names() == {"node-2"}
    assert client.exchange({"confirm": True}).status == 410
    client.sequence += 1
    line = client.line()
    status, headers, _ = home.post(agent.EXCHANGE_PATH, line, b"", client.source)
    assert status == 404 and "nm-lite" not in headers
    who = "%s@%s@%s" % (client.node, agent.b64(client.public), client.network)
    assert client.send(client.line(who=who), b"").status == 404
    assert netmaker_core.check(home.core) == []


def test_leaving(home):
    client, other = exchange_of(home)
    assert client.exchange({"leave": True}).status == 410
    assert client.send(*client.sent).status in (409, 410)
    other.exchange()
    assert other.names() == {"node-2"}
    home.core.clock.now += 86401
    netmaker_core.sweep(home.core)
    assert home.core.store.rows("SELECT COUNT(*) FROM node") == [(1,)]


def test_a_disabled_node_has_no_peers_and_comes_back(home):
    client, other = exchange_of(home)
    netmaker_core.disable(home.core, home.node(client))
    said = client.exchange()
    assert said["state"] == "disabled" and client.peers == {}
    other.exchange()
    assert other.names() == {"node-2"}
    netmaker_core.enable(home.core, home.node(client))
    settle([client, other])
    assert client.names() == other.names() == {"node", "node-2"}


def test_a_removed_network_is_unknown(home):
    client, other = exchange_of(home)
    for node in (client, other):
        netmaker_core.remove_node(home.core, home.node(node))
    netmaker_core.remove_network(home.core, "default")
    client.sequence += 1
    line = client.line()
    assert home.post(agent.EXCHANGE_PATH, line, b"", client.source)[0] == 404


# ---- look


def test_looks(home):
    client, other = exchange_of(home)
    client.exchange()
    assert client.looked() == client.have
    assert client.looked(source="192.0.2.9") == "!"
    assert home.get(agent.LOOK_PATH + "AAAAAAAAAAAAAAAAAAAAAA?have=-")[2] == b"!"
    other.exchange({"facts": {"local": "192.168.1.2"}})
    assert client.looked() not in (client.have, "!")
    netmaker_core.remove_node(home.core, home.node(client))
    assert client.looked() == "!"


def polled(client, **more):
    """A long-poll in a thread: (answer, seconds that it took)."""
    found = []

    def run():
        start = time.monotonic()
        answer = client.looked(wait=20, **more)
        found.append((answer, time.monotonic() - start))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def parked(home, count=1):
    end = time.monotonic() + 5
    while home.agents.bell.parked < count and time.monotonic() < end:
        time.sleep(0.01)
    assert home.agents.bell.parked == count


def test_a_long_poll_hears_of_a_change_here(home):
    client, other = exchange_of(home)
    client.exchange()
    thread, found = polled(client)
    parked(home)
    other.exchange({"facts": {"local": "192.168.1.2"}})
    thread.join(10)
    assert found[0][0] == "%d.%s" % home.core.store.word("default") and found[0][1] < 5


def test_a_long_poll_hears_of_the_command_line(home):
    client, _ = exchange_of(home)
    client.exchange()
    thread, found = polled(client)
    parked(home)
    changed = time.monotonic()
    command = [sys.executable, str(ROOT / "netmaker_lite.py"), "network", "set", "default", "mtu=1400"]
    subprocess.run([*command, "--data", home.folder], check=True, capture_output=True)
    started = time.monotonic() - changed
    thread.join(10)
    assert found[0][0] == "%d.%s" % home.core.store.word("default")
    assert found[0][1] < 5 + started
    client.exchange()
    assert client.me["mtu"] == 1400


def test_a_long_poll_of_a_node_that_is_removed(home):
    client, _ = exchange_of(home)
    client.exchange()
    thread, found = polled(client)
    parked(home)
    netmaker_core.remove_node(home.core, home.node(client))
    thread.join(10)
    assert found[0][0] == "!"


def test_parked_polls_are_bounded_and_shut_nobody_out(tmp_path):
    home = Server(str(tmp_path), None, POLL_LIMIT="3")
    home.network()
    nodes = clients(home, 2, home.key())
    settle(nodes)
    threads = [polled(nodes[0]) for _ in range(3)]
    parked(home, 3)
    _, headers, body = home.get("%s%s?have=%s&wait=20" % (agent.LOOK_PATH, nodes[1].look, nodes[1].have), nodes[1].source)
    assert headers["retry-after"] == "15" and body.decode() == nodes[1].have
    assert nodes[1].exchange().status == 204
    home.agents.bell.stop()
    for thread, _ in threads:
        thread.join(10)
    home.stop()


# ---- what it costs: counts, never times


class Trace:
    """The statements of both connections."""

    def __init__(self, store):
        self.store, self.reads, self.writes = store, [], []

    def __enter__(self):
        self.store.reader.connection().set_trace_callback(self.reads.append)
        self.store.writer.connection().set_trace_callback(self.writes.append)
        return self

    def __exit__(self, *problem):
        self.store.reader.connection().set_trace_callback(None)
        self.store.writer.connection().set_trace_callback(None)


def test_an_unchanged_exchange_reads_one_row_and_commits_nothing(home):
    nodes = clients(home, 12, home.key())
    settle(nodes)
    for node in nodes:
        node.exchange()
    with Trace(home.core.store) as trace:
        assert nodes[0].exchange().status == 204
    assert len(trace.reads) == 1 and "FROM network WHERE id" in trace.reads[0], trace.reads
    assert trace.writes == []
    with Trace(home.core.store) as trace:
        assert nodes[1].looked() == nodes[1].have
    assert len(trace.reads) == 1 and trace.writes == []


def test_an_unchanged_exchange_fits_into_400_bytes(home):
    client, _ = exchange_of(home)
    client.exchange()
    client.sequence += 1
    request = agent.post("203.0.113.10", 8081, "", agent.EXCHANGE_PATH, client.line())
    first, _, rest = request.partition(b"\r\n")
    answer = home.raw(first + b"\r\nX-Forwarded-For: " + client.source.encode() + b"\r\n" + rest)
    assert answer.startswith(b"HTTP/1.0 204 ")
    assert len(answer) <= 185, answer
    assert len(request) + len(answer) <= 400


def test_last_seen_is_written_behind_in_one_transaction(home):
    nodes = clients(home, 5, home.key())
    settle(nodes)
    home.core.clock.now += 100
    for node in nodes:
        node.exchange()
    with Trace(home.core.store) as trace:
        home.agents.flush()
        home.agents.flush()
    assert sum(statement.startswith("BEGIN") for statement in trace.writes) == 1
    assert all(home.node(node)["last_seen"] == home.core.now for node in nodes)


# ---- the web


def test_errors_are_json(home):
    for path in ("/nowhere", "/api/agent/v1/join"):
        status, headers, body = home.get(path)
        assert status in (404, 405) and headers["content-type"] == "application/json"
        assert json.loads(body)["Message"]
    status, headers, body = home.post(agent.JOIN_PATH, "nonsense", b"")
    assert status == 400 and "docs/protocol.md" in json.loads(body)["Message"]


def test_a_failure_of_ours_is_json_without_a_traceback(home, monkeypatch, capfd):
    monkeypatch.setattr(home.agents.core.store, "meta", lambda key: 1 / 0)
    status, _, body = home.get("/api/health")
    assert status == 500 and b"Traceback" not in body and b"division" not in body
    assert json.loads(body)["Code"] == 500


def test_what_anyone_may_ask(home):
    assert json.loads(home.get("/api/health")[2])["status"] == "ok"
    assert json.loads(home.get(agent.HELLO_PATH)[2])["pin"] == agent.b64(home.pin)
    slim = netmaker_core.slim((ROOT / "netclient_lite.py").read_text())
    assert home.get("/meshclient/files/netclient_lite.py")[2] == slim.encode()
