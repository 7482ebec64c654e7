# SPDX-License-Identifier: Apache-2.0
"""Neighbours in a LAN: packets of multicast DNS, who is believed, and real machines that lost each other."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lab import Lab, unfit, wait_for
from mesh import Cron, Mesh

from netclient_lite import Place, announced, choose_endpoint, make_query, make_record, parse_mdns, verified

GROUP, OTHER = bytes(range(16)), bytes(range(1, 17))
PLACES = ["192.168.7.20:51821"]
UNFIT = unfit("wg")


@given(st.binary(max_size=600))
@example(b"\0\0\x84\0\0\0\0\1\0\0\0\0" + b"\xc0\x0c" * 4)  # a name that points at itself
@example(b"\0\0\x84\0\xff\xff\xff\xff\xff\xff\xff\xff" + b"\x01a" * 200)
def test_any_bytes_are_a_packet_or_nothing(data):
    asks, texts = parse_mdns(data)
    assert (asks is None or len(asks) <= 32) and len(texts) <= 64


@given(st.integers(0, 250), st.binary(max_size=8), st.booleans())
def test_a_packet_that_is_damaged_says_nothing_false(at, noise, legacy):
    data = make_record("n1", 51821, announced(GROUP, "n1", PLACES), 7, legacy)
    for strings in parse_mdns(data[:at] + noise + data[at + len(noise) :])[1]:
        assert verified(GROUP, strings) in (("n1", PLACES, ""), ("", [], ""))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_announced_is_heard(legacy):
    data = make_record("n1", 51821, announced(GROUP, "n1", PLACES), 7, legacy)
    assert parse_mdns(data) == (None, [announced(GROUP, "n1", PLACES)])
    assert parse_mdns(make_query(7)) == ("", [])
    assert parse_mdns(make_query(7, "0123456789abcdef" * 2)) == ("0123456789abcdef" * 2, [])
    assert verified(GROUP, announced(GROUP, "n1", PLACES)) == ("n1", PLACES, "")
    assert verified(GROUP, announced(GROUP, "n1", PLACES, "ab")) == ("n1", PLACES, "ab")


def test_strangers_and_forgers_are_not_believed():
    strings = announced(GROUP, "n1", PLACES)
    assert verified(OTHER, strings) == ("", [], "")
    moved = [each.replace("192.168.7.20", "192.168.7.66") for each in strings]
    assert verified(GROUP, moved) == ("", [], "")
    assert verified(GROUP, [each.replace("n1", "n2") for each in strings]) == ("", [], "")
    assert verified(GROUP, [each.replace("c=", "c=ab") for each in strings]) == ("", [], "")  # the answer to another question
    assert verified(GROUP, []) == verified(GROUP, ["e=x", "i=n1"]) == verified(GROUP, ["e=192.168.7.20:51821"]) == ("", [], "")


@given(st.booleans(), st.integers(0, 9), st.booleans())
def test_an_endpoint_heard_of_is_tried_first_and_moves_a_fresh_session_only_in_the_own_lan(fresh, turn, deaf):
    record = {"seen": "203.0.113.7:51821", "local": "192.168.7.9:51821", "found": PLACES[0]}
    near, far = Place("", ("192.168.7.2/24",)), Place("", ("10.0.0.2/24",))
    chosen = choose_endpoint(record, near, "203.0.113.7:51821", fresh, turn, "", deaf)
    if fresh:
        assert chosen == ("" if deaf else PLACES[0])
        assert choose_endpoint(record, far, "203.0.113.7:51821", True, turn) == ""
    elif turn == 0 and not deaf:
        assert chosen == PLACES[0]


def test_a_session_in_the_lan_is_not_moved_to_an_older_place_that_the_server_knows():
    near = Place("", ("192.168.7.2/24",), "gateway")
    record = {"seen": "203.0.113.7:51821", "local": "192.168.7.9:51821", "lan": "gateway"}
    assert choose_endpoint(record, near, "203.0.113.7:51821", True, 0) == "192.168.7.9:51821"
    assert choose_endpoint(record, near, "192.168.7.20:51821", True, 0) == ""
    assert choose_endpoint({**record, "found": "192.168.7.30:51821"}, near, "192.168.7.20:51821", True, 0) == "192.168.7.30:51821"


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(240)
def test_machines_that_all_move_find_each_other_with_the_server_gone(lab: Lab) -> None:
    """A local-only network; by check-ins alone, and with a daemon at one end."""
    mesh = Mesh(lab, "demo", "--local-only")
    home = lab.router("home", "203.0.113.21", lan="192.168.7.0/24")
    hosts = [lab.site(name, home) for name in ("one", "two", "three")]
    members = [mesh.join(host) for host in hosts]
    mesh.settle(members)
    one, two, three = members
    mesh.kill()

    def renumber(first: int) -> None:
        for number, host in enumerate(hosts, first):
            host.run(
                "sh",
                "-c",
                f"ip addr flush dev eth0; ip addr add 192.168.7.{number}/24 dev eth0; ip route add default via 192.168.7.1",
            )

    renumber(100)
    with Cron(members):
        wait_for(lambda: not one.host.ping(two.address, count=1).lost, 45, "two that only check in to find each other")
    renumber(150)
    three.daemon()
    wait_for(
        lambda: one.checkin(check=False) is not None and not one.host.ping(three.address, count=1).lost,
        60,
        "the daemon to be found",
    )
    assert one.path(three) == "local"
