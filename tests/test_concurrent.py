# SPDX-License-Identifier: Apache-2.0
"""64 clients at once on one server: nothing is lost, nothing is given twice, nobody waits for ever.

NM_SECONDS says for how long (8; CI takes a minute).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable

import pytest
from restkit import PASSWORD, Rest
from serverkit import Client, Server, wireguard_key

import netmaker_core

SECONDS = float(os.environ.get("NM_SECONDS", "8"))
Crowd = Callable[["Party", int], None]


class Party:
    """What the clients share, and what they count."""

    def __init__(self, home: Server, admin: Rest) -> None:
        self.home, self.admin = home, admin
        self.end = time.monotonic() + SECONDS
        self.done: Counter[str] = Counter()  # what → how often it was made
        self.said: Counter[int] = Counter()

    def going(self) -> bool:
        return time.monotonic() < self.end

    def call(self, what: str, method: str, path: str, body: Any = None, *fine: int) -> Any:
        """The object of an answer, None for another that is `fine`, or for a server that is too busy, which says so."""
        said = self.admin.call(method, path, body)
        self.said[said.status] += 1
        if said.status == 200:
            self.done[what] += 1
            return said.value
        assert said.status in (*fine, 503) and said.sentence, (method, path, body, said)
        return None


def limits(party: Party, number: int) -> None:
    """One field of one network, each time another value."""
    value = 1000 + number * 1_000_000
    while party.going():
        value += 1
        shown = party.call("network set", "PUT", "/api/networks/default/nodelimit", {"nodelimit": value})
        assert shown is None or shown["nodelimit"] > 1000


def networks(party: Party, number: int) -> None:
    """Networks come and go, two clients for each name."""
    name = "net%d" % (number // 2)
    while party.going():
        made = party.call(
            "network add", "POST", "/api/networks", {"netid": name, "addressrange": "10.%d.0.0/24" % (100 + number)}, 409
        )
        if made:
            party.call("", "GET", "/api/networks/" + name, None, 404)
            party.call("key add", "POST", "/api/networks/%s/keys" % name, {}, 404)
            party.call("network remove", "DELETE", "/api/networks/" + name, None, 404, 409)


def agents(party: Party, number: int) -> None:
    """Machines join by the protocol, talk and are removed or stay."""
    key, count = party.home.key(uses=None), 0
    while party.going():
        count += 1
        client = Client(party.home, source="198.51.%d.%d" % (number, count % 250 + 1))
        said = client.try_join(key)
        if said.status == 503:
            continue
        assert said.status == 200, said.value
        party.done["node join"] += 1
        client.node, client.look = said["node"], said["look"]
        assert client.exchange().status in (200, 204, 503)
        if count % 3:
            party.call("node remove", "DELETE", "/api/nodes/default/" + client.node)


def scarce(party: Party, number: int) -> None:
    """One use, two machines at once."""
    while party.going():
        join = partial(Client.try_join, access_key=party.home.key(uses=1))
        with ThreadPoolExecutor(2) as pool:
            clients = [Client(party.home, source="203.0.113.%d" % (number * 2 + each)) for each in (0, 1)]
            said = [each.status for each in pool.map(join, clients)]
        assert said.count(200) <= 1 and set(said) <= {200, 410, 503}
        party.done["node join"] += said.count(200)


def machines(party: Party, number: int) -> None:
    """A node made by hand gets one name after the other, and has the last one in the end."""
    made = None
    while made is None:
        made = party.call("node add", "POST", "/api/nodes/default", {"name": "hand%d" % number, "publickey": wireguard_key()})
    path, name, count = "/api/nodes/default/" + made["id"], made["name"], 0
    while party.going():
        count += 1
        new = "hand%d-%d" % (number, count)
        if party.call("node set", "PUT", path, {"name": new}):
            name = new
        shown = party.call("", "GET", path)
        assert shown is None or shown["name"] == name


def people(party: Party, number: int) -> None:
    """Users, their sessions and tokens."""
    while party.going():
        name = "user%d" % number
        path = "/api/users/" + name
        if party.call("user add", "POST", path, {"password": PASSWORD, "networks": ["default"]}):
            token = party.call("token add", "POST", path + "/tokens", {"name": "t"})
            if token:
                rest = Rest(party.home, token["value"])
                assert rest.call("GET", "/api/nodes/default").status in (200, 503)
                assert party.call("user remove", "DELETE", path) is None or rest.call("GET", "/api/nodes").status in (401, 503)
                continue
        party.call("user remove", "DELETE", path, None, 404)


def readers(party: Party, number: int) -> None:
    """Who only looks sees the revision grow, and no address twice."""
    before = 0
    while party.going():
        shown = party.call("", "GET", "/api/networks/default")
        if shown:
            counter = int(shown["revision"].partition(".")[0])
            assert counter >= before
            before = counter
        found = party.call("", "GET", "/api/nodes/default") or []
        addresses = [node["address"] for node in found if node["address"]]
        assert len(set(addresses)) == len(addresses)
        for path in ("/api/audit?since=1h&per_page=100", "/api/server/status", "/metrics", "/api/networks/default/graph"):
            party.call("", "GET", path)


CROWDS: tuple[tuple[Crowd, int], ...] = (
    *((limits, 12), (networks, 10), (agents, 14), (scarce, 6)),
    *((machines, 10), (people, 4), (readers, 8)),
)


@pytest.mark.timeout(120 + 3 * int(SECONDS))
def test_64_at_once(home: Server, admin: Rest) -> None:
    core = home.core
    netmaker_core.set_network(core, "default", {"range": "10.20.0.0/16", "range6": "fd00:20::/64"})
    (first,) = core.store.rows("SELECT MAX(id), (SELECT counter FROM network WHERE id = 'default') FROM audit")
    party = Party(home, admin)
    crowd = [(work, number) for work, count in CROWDS for number in range(count)]
    assert len(crowd) == 64
    with ThreadPoolExecutor(64) as pool:
        for each in [pool.submit(work, party, number) for work, number in crowd]:
            each.result(SECONDS + 60)
    assert set(party.said) <= {200, 404, 409, 410, 503} and party.said[200] > 100, party.said
    # what was answered with 200 stands in the log, once, and nothing else does
    log = Counter(action for (action,) in core.store.rows("SELECT action FROM audit WHERE id > ?", (first[0],)))
    for what, count in party.done.items():
        assert not what or what == "key add" or log[what] == count, (what, count, log[what])
    # every change that somebody must hear of made one revision, in one line
    counters = [row[0] for row in core.store.rows("SELECT counter FROM revision WHERE network = 'default' ORDER BY counter")]
    (counter,) = core.store.row("SELECT counter FROM network WHERE id = 'default'") or ()
    assert counters[-1] == counter and counters == list(range(counters[0], counter + 1))
    heard = core.store.rows(
        "SELECT COUNT(*) FROM audit WHERE id > ? AND network = 'default' AND action NOT LIKE 'key %'", (first[0],)
    )
    assert counter - first[1] >= heard[0][0]
    leases = core.store.rows("SELECT address, node FROM lease WHERE network = 'default' AND node IS NOT NULL")
    assert len({address for address, _ in leases}) == len(leases)
    rows = netmaker_core.nodes(core, "default")
    assert {row["ip"] for row in rows} | {row["ip6"] for row in rows} == {address for address, _ in leases}
    assert (
        netmaker_core.need_network(core, "default")["members"]
        == len(rows)
        == party.done["node join"] + party.done["node add"] - party.done["node remove"]
    )
    assert netmaker_core.check(core) == []
