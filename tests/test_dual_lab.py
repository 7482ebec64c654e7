# SPDX-License-Identifier: Apache-2.0
"""IPv6 in the lab: an overlay of both families, an underlay of IPv6 alone, and nodes that do not share a family."""

from __future__ import annotations

import json
import re

import pytest
from lab import Host, Lab, adjacency, unfit, wait_for
from mesh import Member, Mesh

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(240)]

SERVER6 = "2001:db8::10"
NAME = "vpn.example.org"


def reach(members: list[Member], *, six: bool) -> None:
    """Each reaches each in the overlay, without a loss."""
    addresses = {member.host: member.address6 if six else member.address for member in members}
    assert all((":" in address) == six for address in addresses.values()), addresses
    assert not {pair: loss for pair, loss in adjacency(addresses).items() if loss.lost}


def knows(host: Host) -> Host:
    """Have a host know the server's name, which has addresses of both families."""
    host.run("sh", "-c", f"printf '203.0.113.10 {NAME}\\n{SERVER6} {NAME}\\n' >>/etc/hosts")
    return host


def test_an_overlay_of_both_families_over_ipv4(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--range6", "fd00:20:30::/64")
    home = lab.router("home", "203.0.113.21")
    members = [mesh.join(lab.public("hub", "203.0.113.30")), mesh.join(lab.site("left", home)), mesh.join(lab.site("nas", home))]
    mesh.settle(members)
    reach(members, six=False)
    reach(members, six=True)
    before = [member.snapshot() for member in members]
    for member in members:
        member.checkin("--force")
    assert [member.snapshot() for member in members] == before
    hub = members[0].host
    members[0].leave()
    assert "fd00:20:30:" not in hub.run("ip", "-6", "addr").stdout + hub.run("ip", "-6", "route").stdout


def test_ipv6_alone_below_and_above(lab: Lab) -> None:
    """No host but the routers' internet has an IPv4 address; two LANs behind firewalls that let nothing in unasked."""
    server = lab.public("server", "", SERVER6)
    mesh = Mesh(lab, "demo", "--range6", "FD00:20:30::/64", range4="", host=server, serving={"SERVER_HOST": SERVER6})
    homes = [lab.router(f"home{i}", "", lan="", wan6=f"2001:db8::2{i}", lan6=f"2001:db8:2{i}::/64") for i in (1, 2)]
    hub, left, right, near = members = [
        mesh.join(host) for host in (server, lab.site("left", homes[0]), lab.site("right", homes[1]), lab.site("near", homes[0]))
    ]
    assert server.ping(left.host.ip6, count=1, timeout=0.3).lost == 1
    mesh.settle(members)
    reach(members, six=True)
    assert {left.path(other) for other in (hub, right, near)} == {"direct"}
    # one form everywhere: WireGuard, status, list, REST
    said = dict(line.split("\t") for line in left.host.run("wg", "show", "nm-demo", "endpoints").stdout.splitlines())
    place = said[left.peer(right)["public_key"]]
    assert re.fullmatch(r"\[2001:db8:22::a\]:\d+", place)
    assert left.peer(right)["endpoint"] == place
    listed = json.loads(left.host.agent("list", "--json").stdout)[0]
    assert listed["address"] == "" and listed["address6"].startswith("fd00:20:30::")
    assert next(peer["endpoint"] for peer in listed["peers"] if peer["name"] == "right") == place
    assert left.status["server"] == f"http://[{SERVER6}]:8081"
    node = next(node for node in mesh.nodes() if node["name"] == "right")
    assert (node["endpoint"], node["localaddress"]) == (right.host.ip6, right.host.ip6)
    # privacy extensions make a new address each day, and the old one is not taken at once: no tunnel notices
    with left.host.pinging(right.address6) as ping:
        right.host.run("ip", "addr", "add", "2001:db8:22::beef/64", "dev", "eth0", "nodad")
        right.host.run("ip", "addr", "change", f"{right.host.ip6}/64", "dev", "eth0", "preferred_lft", "0")
        right.checkin("--force")
        node = next(node for node in mesh.nodes() if node["name"] == "right")
        assert node["endpoint"] == "2001:db8:22::beef"
        late = mesh.join(lab.site("late", homes[0]))
        mesh.settle([right, late])
        left.checkin("--force")
        assert late.peer(right)["endpoint"].startswith("[2001:db8:22::beef]:")
        assert ping.stop().lost == 0
    mesh.kill()
    for member in members:
        member.checkin("--force", check=False)
    reach(members, six=True)


def test_nodes_that_do_not_share_a_family(lab: Lab) -> None:
    """A server of both families, one node of each kind: who shares a family is meshed, the pair that does not is told so."""
    server = knows(lab.public("server", "203.0.113.10", SERVER6))
    mesh = Mesh(lab, host=server, serving={"SERVER_HOST": NAME, "SERVER_BIND": "::"})
    old = lab.router("old", "203.0.113.21")
    new = lab.router("new", "", lan="", wan6="2001:db8::22", lan6="2001:db8:22::/64")
    both = lab.router("both", "203.0.113.23", lan="192.168.3.0/24", wan6="2001:db8::23", lan6="2001:db8:23::/64")
    four, six, dual = members = [mesh.join(knows(lab.site(*place))) for place in (("four", old), ("six", new), ("dual", both))]
    own = next(node for node in mesh.nodes() if node["name"] == "dual")
    assert (own["endpoint"], own["localaddress6"]) == ("203.0.113.23", dual.host.ip6)

    def meshed() -> bool:
        for member in members:
            member.checkin()
        return [dual.path(four), dual.path(six), four.path(dual), six.path(dual)] == ["direct"] * 4

    wait_for(meshed, 60, "the dual one to be meshed with both others")
    reach([four, dual], six=False)
    reach([six, dual], six=False)
    assert dual.peer(four)["endpoint"].startswith("203.0.113.21:")
    assert dual.peer(six)["endpoint"].startswith(f"[{six.host.ip6}]:")
    assert six.peer(dual)["endpoint"].startswith(f"[{dual.host.ip6}]:")
    for one, other, family in ((four, six, 6), (six, four, 4)):
        told = one.peer(other)
        assert (told["path"], told["endpoint"], told["why"]) == (
            *("none", ""),
            f"it has IPv{family} only, for which this machine has no way out",
        )
        assert f"it has IPv{family} only" in one.host.agent("status").stdout


def test_a_local_only_network_of_unique_local_addresses(lab: Lab) -> None:
    """A LAN that is on no internet, with its server in it; beside it one of IPv4 that is not to be used."""
    home = lab.router("home", "", lan="192.168.1.0/24", lan6="fd12:3::/64")
    server = lab.site("server", home)
    settings = ("--local-only", "--local-range", "fd12:3::/64")
    mesh = Mesh(lab, "demo", *settings, host=server, serving={"SERVER_HOST": server.ip6})
    members = [mesh.join(server), mesh.join(lab.site("nas", home)), mesh.join(lab.site("pi", home, ip=""))]
    mesh.settle(members)
    reach(members, six=False)
    endpoints = [peer["endpoint"] for member in members for peer in member.status["peers"]]
    assert all(place.startswith("[fd12:3::") for place in endpoints), endpoints
