# SPDX-License-Identifier: Apache-2.0
"""Two symmetric NATs: no hole can be punched, so a relay carries the pair until one can."""

from __future__ import annotations

import time

import pytest
from lab import Lab, unfit, wait_for
from mesh import Cron, Mesh

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(420)]


def test_a_pair_is_relayed_by_itself_and_goes_direct_again(lab: Lab) -> None:
    """By cron's check-ins; relayed within 90 s; the server starts anew meanwhile; others lose nothing at any change."""
    mesh = Mesh(lab)
    homes = [
        lab.router("home1", "203.0.113.21", symmetric=True),
        lab.router("home2", "203.0.113.22", lan="192.168.100.0/24", symmetric=True),
    ]
    vps, bystander = mesh.join(mesh.host), mesh.join(lab.public("by", "203.0.113.40"))
    mesh.admin("node", "relay", "demo", "server", "by")  # by hand: this one may relay
    mesh.admin("node", "relay", "demo", "server")
    left, right = (mesh.join(lab.site(name, home)) for name, home in zip(("left", "right"), homes))
    everyone = [vps, bystander, left, right]
    joined = time.monotonic()
    with Cron(everyone):
        wait_for(lambda: not left.host.ping(right.address, count=1).lost, 90, "the relayed pair")
        relayed_after = time.monotonic() - joined
        status = next(peer for peer in left.status["peers"] if peer["name"] == "right")
        assert (status["path"], status["via"]) == ("relayed", "server")
        wait_for(lambda: right.path(left) == "relayed", 20, "the other end to know")
        others = [(bystander, left), (bystander, right), (vps, left)]
        pings = [one.host.pinging(other.address, 0.05) for one, other in others]
        pair = left.host.pinging(right.address, 0.05)
        mesh.kill()
        mesh.serve()
        time.sleep(16)
        assert pair.stop().lost == 0
        pair = left.host.pinging(right.address, 0.05)
        for home, far in zip(homes, homes[::-1]):
            home.symmetric = False
            home._boot()  # connections that stand keep their ports, but for the pair's
            home.run("conntrack", "-D", "-d", far.ip, check=False)
        wait_for(lambda: left.path(right) == right.path(left) == "direct", 120, "the direct way")
        time.sleep(2)
        lost = pair.stop().lost
        assert [ping.stop().lost for ping in pings] == [0, 0, 0]
    print(f"relayed after {relayed_after:.0f} s; the pair lost {lost} of its pings on the way back")
    assert left.host.ping(right.address).lost == 0 and lost <= 20


def test_a_relay_by_hand_carries_all_of_a_node(lab: Lab) -> None:
    mesh = Mesh(lab)
    members = [mesh.join(host) for host in (mesh.host, lab.public("one", "203.0.113.41"), lab.public("two", "203.0.113.42"))]
    vps, one, two = members
    mesh.settle(members)
    mesh.admin("node", "relay", "demo", "server", "one")
    for member in (vps, one, two):
        member.checkin()
    assert len(one.peers()) == 1 and one.path(two) == two.path(one) == "relayed"
    wait_for(lambda: not one.host.ping(two.address, count=2).lost, 15, "the way through the relay")
    mesh.admin("node", "relay", "demo", "server", "off")
    for member in (vps, one, two):
        member.checkin()
    mesh.settle(members)
    assert one.path(two) == "direct" and not one.host.ping(two.address).lost
