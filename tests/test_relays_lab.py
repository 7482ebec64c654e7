# SPDX-License-Identifier: Apache-2.0
"""Two symmetric NATs: no hole can be punched, so a relay carries the pair until one can."""

from __future__ import annotations

import time

import pytest
from lab import Lab, Pinging, unfit, wait_for
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
    mesh.admin("node", "relay", "demo", "server")  # it may carry pairs that need it
    left, right = (mesh.join(lab.site(name, home)) for name, home in zip(("left", "right"), homes))
    joined = time.monotonic()

    def others() -> list[Pinging]:
        """Of both homes to nodes that they reach; from inside, so that a router that forgets its connections makes them again."""
        return [one.host.pinging(other.address, 0.05) for one in (left, right) for other in (bystander, vps)]

    with Cron([vps, bystander, left, right]):
        wait_for(lambda: {one.path(to) for one in (left, right) for to in (bystander, vps)} == {"direct"}, 40, "their sessions")
        pings = others()
        wait_for(lambda: not left.host.ping(right.address, count=1).lost, 90, "the relayed pair")
        relayed_after = time.monotonic() - joined
        assert (left.peer(right)["path"], left.peer(right)["via"]) == ("relayed", "server")
        wait_for(lambda: right.path(left) == "relayed", 20, "the other end to know")
        pair = left.host.pinging(right.address, 0.05)
        mesh.kill()
        mesh.serve()
        time.sleep(16)
        assert pair.stop().lost == 0
        assert [ping.stop().lost for ping in pings] == [0] * 4
        for home in homes:
            home.set_symmetric(False)
        pings, pair = others(), left.host.pinging(right.address, 0.05)
        wait_for(lambda: left.path(right) == right.path(left) == "direct", 120, "the direct way")
        time.sleep(2)
        lost = pair.stop().lost
        assert [ping.stop().lost for ping in pings] == [0] * 4
    print(f"relayed after {relayed_after:.0f} s; the pair lost {lost} of its pings on the way back")
    assert relayed_after < 90 and lost <= 20 and not left.host.ping(right.address).lost


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
