# SPDX-License-Identifier: Apache-2.0
"""What an administrator decides, on real nodes: expiry, a node's limit, approval, ranges, and who is told what."""

from __future__ import annotations

import json

import pytest
from lab import Lab, unfit, wait_for
from mesh import Member, Mesh

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(300)]


def public_nodes(mesh: Mesh, *names: str) -> list[Member]:
    return [mesh.join(mesh.lab.public(name, "203.0.113.%d" % number)) for number, name in enumerate(names, 30)]


def state_of(mesh: Mesh, name: str) -> str:
    return str(json.loads(mesh.admin("node", "show", "demo", name, "--json"))["status"])


def test_a_node_expires_on_time_is_told_and_comes_back_when_it_is_extended(lab: Lab) -> None:
    mesh = Mesh(lab)
    a, b, c = public_nodes(mesh, "a", "b", "c")
    mesh.settle([a, b, c])
    key = b.host.run("wg", "show", "nm-demo", "public-key").stdout.strip()
    with a.host.pinging(c.address) as ping:
        mesh.admin("node", "set", "demo", "b", "expires=1s")
        wait_for(lambda: state_of(mesh, "b") == "expired", 25, "the server to see that its time is over")
        a.checkin()
        c.checkin()
        assert key not in a.peers() | c.peers()
        assert "time is over" in b.checkin().stderr
        assert b.peers() == set()
        assert "time is over" in b.host.agent("status").stdout
        mesh.admin("node", "set", "demo", "b", "expires=30d")
        for member in (b, a, c):
            member.checkin()
        mesh.settle([a, b, c])
        assert key in a.peers() & c.peers()
        assert ping.stop().lost == 0


def test_a_disabled_node_is_out_until_it_is_enabled(lab: Lab) -> None:
    mesh = Mesh(lab)
    a, b = public_nodes(mesh, "a", "b")
    mesh.settle([a, b])
    mesh.admin("node", "disable", "demo", "b")
    a.checkin()
    assert "disabled" in b.checkin().stderr
    assert a.peers() == b.peers() == set()
    mesh.admin("node", "enable", "demo", "b")
    a.checkin()
    assert "disabled" not in b.checkin().stderr
    mesh.settle([a, b])


def test_a_full_network_takes_nobody_and_says_why(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--node-limit", "1")
    public_nodes(mesh, "a")
    late = lab.public("late", "203.0.113.40")
    refused = late.agent("join", "-t", mesh.token(), "--daemon", "off", check=False)
    assert refused.returncode == 1
    assert "limit" in refused.stderr
    assert "nm-demo" not in late.run("ip", "link").stdout
    mesh.admin("network", "set", "demo", "node-limit=2")
    assert mesh.join(late).address == "10.20.30.2"


def test_a_pending_node_is_turned_away_or_let_in(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--manual-signup", "yes")
    (a,) = public_nodes(mesh, "a")
    wishes = [lab.public("good", "203.0.113.41"), lab.public("bad", "203.0.113.42")]
    for host in wishes:
        asked = host.agent(
            "join", "-n", "demo", "--apiserver", "203.0.113.10:8081", "--accept-key", "--name", host.name, "--daemon", "off"
        )
        assert "approve" in asked.stdout
    mesh.admin("node", "approve", "demo", "good")
    mesh.admin("node", "reject", "demo", "bad")
    good, bad = (Member(mesh, host, "demo") for host in wishes)
    told = bad.checkin(check=False)
    assert "turned this node away" in told.stderr
    assert "nm-demo" not in bad.host.run("ip", "link").stdout
    for member in (good, a):
        member.checkin()
    mesh.settle([a, good])


def test_both_ranges_change_in_one_step_and_the_mesh_is_whole_again(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--range6", "fd20:30::/64")
    a = mesh.join(lab.site("a", lab.router("home1", "203.0.113.21")))
    b = mesh.join(lab.site("b", lab.router("home2", "203.0.113.22", lan="192.168.100.0/24")))
    c = mesh.join(lab.public("c", "203.0.113.30"), "--address", "10.20.30.77")
    mesh.settle([a, b, c])
    mesh.admin("network", "set", "demo", "range=10.77.0.0/16", "range6=fd77::/64")
    for member in (a, b, c):
        member.checkin()
    assert [member.address for member in (a, b, c)] == ["10.77.0.1", "10.77.0.2", "10.77.0.77"]
    places = ("10.77.0.1", "10.77.0.2", "10.77.0.77", "fd77::1", "fd77::2", "fd77::4d")
    everywhere = [(member, place) for member in (a, b, c) for place in places]

    def whole() -> bool:
        for member in (a, b, c):
            member.checkin()
        return not any(member.host.ping(place, count=1).lost for member, place in everywhere)

    wait_for(whole, 40, "the mesh in its new ranges")
    for member in (a, b, c):
        left = member.host.run("ip", "addr").stdout + member.host.run("ip", "-6", "route").stdout
        assert "10.20.30" not in left and "fd20:30" not in left


def test_the_networks_local_range_chooses_the_local_address(lab: Lab) -> None:
    """A NAS with two LANs, of which the network lives in the one without a default route."""
    mesh = Mesh(lab, "demo", "--local-only")
    hosts = [lab.public(name, "203.0.113.%d" % number) for number, name in enumerate(("a", "b"), 30)]
    for number, host in enumerate(hosts, 5):
        host.run("ip", "link", "add", "lan9", "type", "veth", "peer", "name", "lan9-far")
        host.run("ip", "addr", "add", "10.55.0.%d/24" % number, "dev", "lan9")
        host.run("ip", "link", "set", "lan9", "up")
    a, b = (mesh.join(host) for host in hosts)

    def local(name: str) -> str:
        return str(json.loads(mesh.admin("node", "show", "demo", name, "--json"))["localaddress"])

    a.checkin()
    assert local("a") == "203.0.113.30"
    mesh.admin("network", "set", "demo", "local-range=10.55.0.0/24")
    for member in (a, b, a, b):  # hears of it, then tells
        member.checkin()
    assert (local("a"), local("b")) == ("10.55.0.5", "10.55.0.6")
