# SPDX-License-Identifier: Apache-2.0
"""Two tenants on one server: what is one's never shows in the other's answers, names, keys or packets."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from lab import Lab, unfit
from mesh import Mesh
from restkit import World, body_of, make_user, path_of, rows
from serverkit import Client, Server, settle

import netmaker_core
import netmaker_lite as server

UNFIT = unfit("wg", "nft")
HEARD = "table inet heard { chain c { type filter hook input priority 0; iifname nm-zeta ip saddr 10.20.30.0/24 counter; }; }"
SPOKEN = [route for route in server.ROUTES if route.role in ("user", "network", "self", "anyone")]


class Tenant:
    """A user with a network that has all there can be in one. Names are the same for every tenant."""

    def __init__(self, world: World, user: str, network: str, octet: int) -> None:
        home, core = world.home, world.home.core
        self.network = network
        home.network(network, "10.%d.7.0/24" % octet)
        access = home.key(network, uses=None, name="front")
        self.nodes = [Client(home, network, "198.51.%d.%d" % (octet, number)) for number in (1, 2)]
        for number, node in enumerate(self.nodes):
            node.wishes = {"name": "node-%d" % number}
            node.facts.update(endpoint="203.0.%d.7" % octet, fixed=True, local="192.168.%d.9" % octet)
            node.join(access)
        settle(self.nodes)
        gateway = netmaker_core.create_ingress(core, home.node(self.nodes[0]))
        netmaker_core.create_egress(core, home.node(self.nodes[1]), ["172.16.%d.0/24" % octet])
        client = netmaker_core.add_client(core, gateway, {"name": "phone"})
        netmaker_core.set_name(core, network, "", {"name": "printer", "ip": "192.168.%d.50" % octet, "ip6": ""})
        settle(self.nodes)
        self.rest = make_user(home, user, network)
        found = [home.node(node) for node in self.nodes]
        self.marks = {user, network, access, access.partition(".")[0], client["id"], client["key"], client["ip"]}
        self.marks |= {row[kind] for row in found for kind in ("id", "auth", "look", "key", "ip", "source", "local", "static")}
        self.marks |= {"172.16.%d." % octet, "192.168.%d." % octet, "10.%d.7." % octet} - {""}

    def found_in(self, text: str) -> set[str]:
        return {mark for mark in self.marks - {""} if re.search(r"(?<![\w.-])" + re.escape(mark), text)}


@pytest.fixture
def tenants(world: World) -> tuple[Tenant, Tenant]:
    return Tenant(world, "eve", "acme", 71), Tenant(world, "mallet", "zeta", 72)


def of(network: str, home: Server) -> dict[str, list[Any]]:
    return {table: [row for row in found if network in row] for table, found in rows(home).items() if table != "audit"}


def test_no_route_tells_one_tenant_of_the_other_or_lets_him_touch_it(world: World, tenants: tuple[Tenant, Tenant]) -> None:
    """Every route that a user may call, aimed at his own network and at the other's."""
    home = world.home
    mine, theirs = tenants
    before, seen = of(theirs.network, home), []

    def aimed(route: server.Route, whom: Tenant) -> str:
        path = path_of(route, world).replace("/default", "/" + whom.network)
        for known, node in ((world.node.node, whom.nodes[0]), (world.second.node, whom.nodes[1])):
            path = path.replace(known, node.node)
        return path.replace("/carol", "/eve" if whom is mine else "/mallet")

    for route in sorted(SPOKEN, key=lambda route: route.method != "GET"):  # what removes things last
        if route.path.endswith("/logout"):
            continue
        body = body_of(route, world) if "/<u>" not in route.path else {}
        for whom in (mine, theirs) if "<" in route.path else (mine,):
            for name in ("node-0", "") if "<node>" in route.path else ("",):
                path = aimed(route, whom)
                path = path.replace(whom.nodes[0].node, name) if name else path
                said = mine.rest.call(route.method, path, body)
                text = said.body.decode("utf-8", "replace")
                # what he asked for by name, a refusal may name
                asked = theirs.found_in(path + json.dumps(body))
                assert theirs.found_in(text) <= asked, (route.method, path, text)
                if whom is theirs and route.role != "anyone":
                    assert said.status == 403, (route.method, path, said)
                seen.append(said.status)
                if whom is theirs and route.role != "anyone" and not name:
                    # another's node under the own network's name
                    mixed = path.replace("/" + theirs.network, "/" + mine.network)
                    if theirs.found_in(mixed):
                        cross = mine.rest.call(route.method, mixed, body)
                        assert cross.status in (400, 403, 404), (route.method, mixed, cross)
    assert seen.count(200) > 15, "most of them do something"
    assert of(theirs.network, home) == before


def test_agents_of_one_tenant_hear_nothing_of_the_other(world: World, tenants: tuple[Tenant, Tenant]) -> None:
    for mine, theirs in (tenants, tenants[::-1]):
        for node in mine.nodes:
            node.have = "-"
            said = node.exchange()
            text = said.body.decode()
            assert mine.found_in(text) and not theirs.found_in(text)
            foreign = {other.node: "203.0.113.99:5" for other in theirs.nodes}
            assert node.exchange({"seen": foreign, "mute": dict.fromkeys(foreign, True)}).status in (200, 204)
        assert not world.home.core.store.rows("SELECT 1 FROM observed WHERE network = ?", (theirs.network,))
    key = world.home.key("acme", uses=None)
    assert Client(world.home, "zeta").try_join(key).status == 403, "nor is a key good for another network"


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(180)
def test_no_packet_passes_between_two_tenants_networks(lab: Lab) -> None:
    """Same names, same LAN, one host in both networks and in the hub's place: none forwards from one to the other."""
    mesh = Mesh(lab, "acme")
    mesh.admin("network", "add", "zeta", "--range", "10.40.0.0/24")
    home = lab.router("home", "203.0.113.21")
    first, second, both = (lab.site(name, home) for name in ("first", "second", "both"))
    one = mesh.join(first, "--name", "nas", network="acme")
    other = mesh.join(second, "--name", "nas", network="zeta")
    shared = {network: mesh.join(both, network=network) for network in ("acme", "zeta")}
    mesh.settle([one, shared["acme"]])
    mesh.settle([other, shared["zeta"]])
    assert {entry["name"] for entry in one.status["peers"]} == {"both"}
    assert not first.ping(shared["acme"].address, count=2).lost and not second.ping(shared["zeta"].address, count=2).lost
    assert not one.peers() & other.peers()
    # also where a tenant turns his own machine against the other, with routes by hand, and the host between is a router
    second.run("nft", HEARD)
    both.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    first.run("ip", "route", "add", "10.40.0.0/24", "dev", "nm-acme")
    first.run("wg", "set", "nm-acme", "peer", next(iter(one.peers())), "allowed-ips", "10.20.30.0/24,10.40.0.0/24")
    assert first.ping(other.address, count=3).lost == 3
    assert "counter packets 0 " in second.run("nft", "list", "table", "inet", "heard").stdout
