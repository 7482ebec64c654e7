# SPDX-License-Identifier: Apache-2.0
"""Networks with gateways for tests: nodes in a store, and the rule of docs/protocol.md by which agents read their records."""

from __future__ import annotations

import ipaddress
import json
import os
from typing import Any, Collection, Mapping

from serverkit import wireguard_key

import netclient_lite as agent
import netmaker_core


def join(core: netmaker_core.Core, name: str, network: str = "default", **values: Any) -> netmaker_core.Row:
    """A node that has joined, behind a public address of its own unless `source` says which."""
    number = len(core.store.rows("SELECT 1 FROM joined")) + 1
    key = netmaker_core.access_keys(core, network) or [netmaker_core.add_key(core, network, uses=None)]
    source = values.pop("source", "198.51.%d.%d" % (100 + number // 250, number % 250 + 1))
    facts = {"key": wireguard_key(), "port": 51821, "name": name, **values}
    auth = agent.b64(os.urandom(32))
    return netmaker_core.join(core, netmaker_core.Joining(network, auth, key[0]["id"], source, source, facts))


def heard(core: netmaker_core.Core, node: str, members: netmaker_core.Members | None = None) -> dict[str, Any]:
    """The snapshot that a node gets."""
    found = members or netmaker_core.Members(core.store)
    member = found.node(node)
    assert member is not None and found.prove(member.mesh)
    said: dict[str, Any] = json.loads(found.answer(member, "-") or b"{}")
    said["peers"].sort(key=lambda record: record["id"])
    return said


def owned(record: Mapping[str, Any]) -> set[str]:
    """Everything that belongs to a node."""
    return set(agent.allowed_ips(record))


def allowed(viewer: str, records: Collection[Mapping[str, Any]], deny: Collection[str] = ()) -> dict[str, set[str]]:
    """Peers of a node and what goes to each, as docs/protocol.md says."""
    found = {record["id"]: record for record in records}
    mine = found[viewer].get("via", "")
    peers: dict[str, set[str]] = {}
    for node, record in found.items():
        if node == viewer or node in deny:
            continue
        via = record.get("via", "")
        if via == viewer or via not in found:
            via = ""
        if mine in found:
            via = mine
        peer = via or node
        if peer not in deny:
            peers.setdefault(peer, set()).update(owned(record))
    return peers


def owners(peers: Mapping[str, Collection[str]], address: str) -> list[str]:
    """The peers to which an address belongs: at most one, or WireGuard would take it from all but the last."""
    place: Any = ipaddress.ip_network(address)
    blocks: list[tuple[str, Any]] = [(node, ipaddress.ip_network(text)) for node, texts in peers.items() for text in texts]
    return [node for node, block in blocks if block.version == place.version and block.overlaps(place)]
