# SPDX-License-Identifier: Apache-2.0
"""The server's own host as a node, hub networks, and requests that come through a tunnel: what the server makes of them."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serverkit import Client, Server, make_core, settle

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

HOME = "127.0.0.1"


def host_key(home: Server, network: str = "default") -> str:
    return "host." + agent.b64(home.core.key.host_secret(network))


def host(home: Server, network: str = "default", source: str = HOME) -> Client:
    return Client(home, network, source).join(host_key(home, network))


@pytest.fixture
def comms(home: Server) -> str:
    home.network("comms", "10.99.0.0/24", hub=True)
    return "comms"


# ---- the server's own host


def told(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "host.json").read_text())
    return found


def test_the_agent_on_the_servers_host_is_told_of_its_networks(tmp_path: Path) -> None:
    core = make_core(str(tmp_path))
    netmaker_core.add_network(core, "early", {"range": "10.1.0.0/24"})
    assert not Path(tmp_path, "host.json").exists(), "whether a server runs here is not known yet"
    netmaker_core.write_host(core, netmaker_core.host_url(core.settings))
    assert stat.S_IMODE(Path(tmp_path, "host.json").stat().st_mode) == 0o600
    netmaker_core.add_network(core, "late", {"range": "10.2.0.0/24"})
    server_, pin, keys = agent.parse_host(Path(tmp_path, "host.json").read_text())
    assert (server_, pin, sorted(keys)) == ("http://127.0.0.1:8081", core.key.pin, ["early", "late"])
    before = Path(tmp_path, "host.json").stat().st_ino
    netmaker_core.set_network(core, "late", {"keepalive": 7})
    assert Path(tmp_path, "host.json").stat().st_ino == before, "written only when it says something else"
    netmaker_core.set_network(core, "early", {"hosted": False})
    netmaker_core.remove_network(core, "late")
    assert told(str(tmp_path))["networks"] == {}
    core.store.close()


def test_client_mode_off_hosts_nothing(tmp_path: Path) -> None:
    core = make_core(str(tmp_path), CLIENT_MODE="off")
    assert not netmaker_core.add_network(core, "one", {"range": "10.1.0.0/24"})["hosted"]
    assert netmaker_core.add_network(core, "comms", {"range": "10.2.0.0/24", "hub": True})["hosted"]
    netmaker_core.write_host(core, netmaker_core.host_url(core.settings))
    netmaker_core.set_network(core, "one", {"hosted": True})
    assert told(str(tmp_path))["networks"] == {}
    core.store.close()


def test_the_host_is_netmaker_at_the_servers_public_address_and_no_nodes_place_is_lost_to_it(home: Server) -> None:
    netmaker_core.set_network(home.core, "default", {"node_limit": 1})
    mine = host(home)
    row = home.node(mine)
    assert (row["name"], row["public"], row["source"], bool(row["host"])) == ("netmaker", "203.0.113.10", HOME, True)
    Client(home).join(home.key())
    assert Client(home, source="198.51.100.2").try_join(home.key()).status == 409, "the limit holds for the others"
    mine.exchange()
    assert mine.me["forward"] is True
    assert netmaker_core.check(home.core) == []
    anew = host(home)
    assert [node["name"] for node in netmaker_core.nodes(home.core, "default") if node["host"]] == ["netmaker"]
    assert home.node(anew)["id"] != row["id"], "the former one, whose files are lost, is gone"
    anew.exchange({"leave": True})
    host(home)
    assert netmaker_core.check(home.core) == []


@pytest.mark.parametrize("case", ["from the internet", "another network's", "not hosted"])
def test_the_hosts_key_is_good_at_home_for_a_hosted_network_alone(home: Server, case: str) -> None:
    home.network("other", "10.99.0.0/24")
    key, source = host_key(home, "other" if case == "another network's" else "default"), HOME
    if case == "not hosted":
        netmaker_core.set_network(home.core, "default", {"hosted": False})
    if case == "from the internet":
        source = "198.51.100.1"
    assert Client(home, source=source).try_join(key).status == 403


def test_strangers_do_not_use_up_the_hosts_tries(home: Server) -> None:
    for number in range(30):
        assert Client(home, source="198.51.100.%d" % (number + 1)).try_join("host." + "A" * 43).status == 403
    assert host(home).name == "netmaker"


def test_a_network_with_the_host_alone_can_be_removed(home: Server) -> None:
    mine, other = host(home), Client(home).join(home.key())
    with pytest.raises(netmaker_core.Clash):
        netmaker_core.remove_network(home.core, "default")
    other.exchange({"leave": True})
    netmaker_core.remove_network(home.core, "default")
    assert netmaker_core.check(home.core) == []
    mine.sequence += 1
    status, _, _ = home.post(agent.EXCHANGE_PATH, mine.line(), b"", HOME)
    assert status == 404


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"version":2}', '{"version":1,"server":"ftp://x","pin":"","networks":{}}',
        '{"version":1,"server":"http://127.0.0.1:8081","pin":"%s","networks":{"../x":"host.%s"}}' % ("A" * 43, "A" * 43),
        '{"version":1,"server":"http://127.0.0.1:8081","pin":"%s","networks":{"x":"host.$(id)"}}' % ("A" * 43),
        '{"version":1,"server":"file:///etc/passwd","pin":"%s","networks":{"x":"host.%s"}}' % ("A" * 43, "A" * 43),
    ],
)  # fmt: skip
def test_an_odd_host_file_says_nothing(text: str) -> None:
    with pytest.raises(agent.MALFORMED):
        agent.parse_host(text)


# ---- hub networks

STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "exchange", "report", "disable", "set", "host", "unhost"]), st.integers(0, 9)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_nodes_of_a_hub_network_hear_of_nobody_but_the_hub(home: Server, steps: list[tuple[str, int]]) -> None:
    """Over any history: no id, name, key or address of another node is in any answer to a node."""
    network = "h%d" % len(netmaker_core.networks(home.core))
    home.network(network, "10.%d.0.0/24" % (100 + len(netmaker_core.networks(home.core))), hub=True)
    key, leaves, hub = home.key(network), [], None
    for number, (step, which) in enumerate(steps):
        leaf = leaves[which % len(leaves)] if leaves else None
        if step == "join" or leaf is None:
            leaf = Client(home, network, "198.51.100.%d" % (number + 1))
            leaf.wishes = {"name": "secret-%d" % number}
            leaves.append(leaf.join(key))
        elif step == "leave":
            leaves.remove(leaf)
            leaf.exchange({"leave": True})
            leaf.exchange({"confirm": True})
            continue
        elif step == "report":
            leaf.exchange({"seen": {other.node: "203.0.113.%d:5" % number for other in leaves}})
        elif step == "disable":
            netmaker_core.disable(home.core, home.node(leaf))
            netmaker_core.enable(home.core, home.node(leaf))
        elif step == "set":
            netmaker_core.set_network(home.core, network, {"keepalive": which})
        elif step == "host":
            hub = host(home, network)
        elif step == "unhost" and hub:
            hub.exchange({"leave": True})
            hub = None
        said = leaf.exchange()
        mine = home.node(leaf)
        others = [row for row in netmaker_core.nodes(home.core, network) if row["id"] != mine["id"] and not row["host"]]
        text = said.body.decode()
        for row in others:
            told = [kind for kind in ("id", "name", "key", "ip", "public") if re.search('"%s[":]' % re.escape(row[kind]), text)]
            assert not told, text
        assert leaf.names() == {mine["name"]} | ({"netmaker"} if hub else set())
        assert leaf.me.get("server") == ("http://%s:8081" % home.node(hub)["ip"] if hub else None)
    if hub:
        hub.exchange()
        assert hub.names() == {"netmaker"} | {home.node(leaf)["name"] for leaf in leaves}


def test_a_network_that_becomes_or_ceases_to_be_a_hub_tells_its_nodes(home: Server) -> None:
    nodes = [Client(home, source="198.51.100.%d" % number).join(home.key()) for number in (1, 2)]
    mine = host(home)
    settle([*nodes, mine])
    assert len(nodes[0].peers) == 3
    netmaker_core.set_network(home.core, "default", {"hub": True})
    settle(nodes)
    assert nodes[0].names() == {nodes[0].name, "netmaker"}
    netmaker_core.set_network(home.core, "default", {"hub": False})
    settle(nodes)
    assert len(nodes[0].peers) == 3


def test_a_server_on_one_address_alone_is_not_heard_in_the_tunnel(tmp_path: Path) -> None:
    core = make_core(str(tmp_path), SERVER_BIND="127.0.0.1")
    assert server.Agents(core, server.Sight(core.settings)).members.port == 0
    core.store.close()


# ---- requests from inside of a tunnel


def test_a_request_through_the_tunnel_moves_nobody(home: Server, comms: str) -> None:
    """Same source and endpoint as before, no challenge, no new revision, and looks from there count; also at a join."""
    hub, leaf, other = host(home, comms), Client(home, comms).join(home.key(comms)), Client(home).join(home.key())
    settle([hub, leaf, other])
    inside = leaf.me["ip"]
    before = {client.node: home.node(client) for client in (leaf, other)}
    for client in (leaf, other):
        assert client.exchange().status == 204
        client.source = inside
        for _ in range(3):
            client.sequence += 1
            assert client.ask().status == 204, "no challenge, nothing new"
        assert client.looked() == client.have
        client.source = "198.51.100.1"
        assert client.looked() == client.have and client.exchange().status == 204
        row = home.node(client)
        assert [row[kind] for kind in ("source", "public", "changed")] == [
            before[client.node][kind] for kind in ("source", "public", "changed")
        ]
    joiner = Client(home, source=inside).join(home.key())
    assert [home.node(joiner)[kind] for kind in ("source", "public", "port")] == ["198.51.100.1", "198.51.100.1", 51823], (
        "next to its other two"
    )
    free = Client(home, source="10.99.0.77").join(home.key())
    assert home.node(free)["public"] == "", "an overlay address of nobody is nobody's endpoint either"


def test_a_node_that_moves_behind_its_tunnel_is_seen_by_the_hub(home: Server, comms: str) -> None:
    hub, leaf, other = host(home, comms), Client(home, comms).join(home.key(comms)), Client(home).join(home.key())
    settle([hub, leaf, other])
    leaf.source = other.source = leaf.me["ip"]
    for place in ("198.51.100.200:4000", "10.99.0.9:1", "192.168.1.9:51821", "[2001:db8::9]:1"):
        hub.exchange({"seen": {leaf.node: place}})
    for client in (leaf, other):
        client.exchange()
        assert [home.node(client)[kind] for kind in ("source", "public")] == ["198.51.100.200"] * 2
        assert client.looked() in (client.have, "!")
    assert netmaker_core.check(home.core) == []


@pytest.mark.parametrize(
    "url", ["http://203.0.113.9:8081", "https://evil.example", "http://10.99.0.1 x:1", 7, "http://10.98.0.1:8081", "-x"]
)
def test_only_an_address_of_the_network_is_taken_for_the_servers_in_it(url: Any) -> None:
    me = {"name": "a", "ip": "10.99.0.2", "range": "10.99.0.0/24", "port": 51821, "keepalive": 20, "mtu": 1280}
    assert agent.parse_me({**me, "server": "http://10.99.0.1:8081"})["server"] == "http://10.99.0.1:8081"
    with pytest.raises(agent.MALFORMED):
        agent.parse_me({**me, "server": url})
