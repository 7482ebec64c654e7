# SPDX-License-Identifier: Apache-2.0
"""Ranges, host numbers and which address is next."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import netmaker_core
from netclient_lite import Invalid


class Book:
    """Leases in memory: address → node, or None once released."""

    def __init__(self):
        self.nodes = {}

    def __iter__(self):
        return iter((self.held, self.released))

    def held(self, address):
        return None if address not in self.nodes else self.nodes[address] is not None

    def released(self):
        return [address for address, node in self.nodes.items() if node is None]

    def take(self, placement, node):
        for address in placement.addresses:
            assert not self.held(address)
            self.nodes.pop(address, None)
            self.nodes[address] = node

    def release(self, node):
        for address in [a for a, n in self.nodes.items() if n == node]:
            del self.nodes[address]
            self.nodes[address] = None


@st.composite
def ranges(draw):
    four = six = ""
    kinds = draw(st.sampled_from(("4", "6", "46")))
    if "4" in kinds:
        prefix = draw(st.integers(8, 30))
        base = draw(st.integers(0, 2**prefix - 1)) << 32 - prefix
        four = "%s/%d" % (ipaddress.IPv4Address(base), prefix)
    if "6" in kinds:
        prefix = draw(st.integers(48, 126))
        base = (0xFD << 120 | draw(st.integers(0, 2**100))) >> 128 - prefix << 128 - prefix
        six = "%s/%d" % (ipaddress.IPv6Address(base), prefix)
    return four, six


@given(ranges(), st.lists(st.tuples(st.sampled_from("jjjw-"), st.integers(0, 40)), max_size=40))
def test_no_address_twice_nor_network_nor_broadcast(texts, story):
    """Joins, wishes and leavings in any order, in ranges of any size."""
    each = netmaker_core.pools(*texts)
    book, cursor, living = Book(), 1, set()
    for number, (what, choice) in enumerate(story):
        if what == "-":
            if living:
                node = sorted(living)[choice % len(living)]
                living.remove(node)
                book.release(node)
            continue
        wishes = [each[0].address(min(choice + 1, each[0].last))] if what == "w" else []
        try:
            placement = netmaker_core.place(each, cursor, wishes, *book)
        except netmaker_core.Clash:
            assert wishes or len(each) > 1 or len(living) == each[0].last
            continue
        assert not wishes or placement.addresses[0] == wishes[0]
        book.take(placement, number)
        living.add(number)
        cursor = placement.cursor
        for text, address in zip(filter(None, texts), placement.addresses):
            block = ipaddress.ip_network(text)
            assert ipaddress.ip_address(address) in block
            assert address not in (str(block.network_address), str(block.broadcast_address))


@pytest.mark.parametrize("text", ["10.0.0.0/30", "10.0.0.0/29", "10.9.8.0/28"])
def test_every_address_is_used_before_it_is_full(text):
    book, cursor, pool = Book(), 1, netmaker_core.pools(text)
    for node in range(pool[0].last):
        placement = netmaker_core.place(pool, cursor, (), *book)
        book.take(placement, node)
        cursor = placement.cursor
    with pytest.raises(netmaker_core.Clash, match="every address"):
        netmaker_core.place(pool, cursor, (), *book)
    book.release(1)
    book.release(0)
    assert netmaker_core.place(pool, cursor, (), *book).addresses == (pool[0].address(2),)  # the longest released


def test_dual_stack_shares_the_host_number():
    pools = netmaker_core.pools("10.20.30.0/24", "fd00:20:30::/64")
    placement = netmaker_core.place(pools, 7, (), *Book())
    assert placement == netmaker_core.Placement(("10.20.30.7", "fd00:20:30::7"), 8)
    wished = netmaker_core.place(pools, 7, ("10.20.30.99", ""), *Book())
    assert wished == netmaker_core.Placement(("10.20.30.99", "fd00:20:30::63"), 7)


@pytest.mark.parametrize("wish", ["10.20.30.0", "10.20.30.255", "10.20.31.1", "fd00::1"])
def test_a_wish_outside_is_refused(wish):
    with pytest.raises(Invalid, match=r"no address that a node .*: its range is 10\.20\.30\.0/24"):
        netmaker_core.place(netmaker_core.pools("10.20.30.0/24"), 1, (wish,), *Book())


@pytest.mark.parametrize(
    "text, version, word",
    [
        ("10.0.0.0/7", 4, "from /8 to /30"),
        ("10.0.0.0/31", 4, "from /8 to /30"),
        ("127.0.0.0/24", 4, "loopback"),
        ("224.0.0.0/24", 4, "multicast"),
        ("169.254.0.0/16", 4, "link-local"),
        ("fe80::/64", 6, "link-local"),
        ("fd00::/127", 6, "from /48 to /126"),
        ("fd00::/64", 4, "no IPv4 range: give it with --range6"),
        ("10.1.0.0/16", 6, "no IPv6 range: give it with --range$"),
        ("nonsense", 4, r"no range: ADDRESS/BITS, like 10\."),
        ("fd77::/129", 6, "no range: ADDRESS/BITS, like fd00:"),
    ],
)
def test_impossible_ranges_have_their_sentence(text, version, word):
    with pytest.raises(Invalid, match=word):
        netmaker_core.check_range(text, version)


def test_a_range_is_folded_to_its_network():
    assert netmaker_core.check_range("10.20.30.7/24", 4) == "10.20.30.0/24"


@given(st.lists(st.integers(1, 100), unique=True, max_size=60), st.integers(24, 29), st.integers(24, 29))
def test_renumbering_keeps_host_numbers_that_fit(hosts, before, after):
    old, new = "10.1.0.0/%d" % before, "10.2.0.0/%d" % after
    old_pool, new_pool = netmaker_core.pool(old), netmaker_core.pool(new)
    hosts = [host for host in hosts if host <= old_pool.last]
    nodes = [{"id": str(host), "ip": old_pool.address(host)} for host in hosts]
    if len(hosts) > new_pool.last:
        with pytest.raises(netmaker_core.Clash):
            netmaker_core.renumber(nodes, "ip", old, new)
        return
    moved = netmaker_core.renumber(nodes, "ip", old, new)
    assert len(set(moved.values())) == len(hosts)
    for node, address in moved.items():
        if int(node) <= new_pool.last:
            assert new_pool.host(address) == int(node)


def test_names_get_a_number():
    assert netmaker_core.free_name("nas", []) == "nas"
    assert netmaker_core.free_name("nas", ["nas", "nas-2"]) == "nas-3"
    assert len(netmaker_core.free_name("n" * 62, ["n" * 62])) <= 62


def test_extra_routes():
    assert netmaker_core.check_routes("192.168.7.1/24, fd01::/64", {"10.0.0.0/8": "mine", "": ""}) == "192.168.7.0/24,fd01::/64"
    with pytest.raises(Invalid, match="all traffic"):
        netmaker_core.check_routes("0.0.0.0/0", {})
    with pytest.raises(netmaker_core.Clash, match=r"overlaps 10\.0\.0\.0/8, which is mine"):
        netmaker_core.check_routes("10.1.0.0/16", {"10.0.0.0/8": "mine"})
    with pytest.raises(Invalid, match="twice"):
        netmaker_core.check_routes("10.1.0.0/16,10.1.2.3/16", {})


@pytest.mark.parametrize("text", ["10.20.30.0/24", "10.0.0.0/8", "10.1.2.4/30", "fd00::/64", "fd00::/126"])
def test_a_pool_names_its_range(text):
    assert netmaker_core.pool(text).text == text
