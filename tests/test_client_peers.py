# SPDX-License-Identifier: Apache-2.0
"""External clients at their gateway: peers beside the nodes, with a preshared key that never stands on a command line."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel import Kernel, key_like

import netclient_lite as agent
from netclient_lite import BadAnswer, Config, View, desire, parse_dump, parse_news, plan, plan_peers, preshared_key

KEY = bytes(range(32))
ME = {
    **{"name": "vps", "ip": "10.20.30.1", "range": "10.20.30.0/24", "ip6": "fd44::1", "range6": "fd44::/64"},
    **{"port": 51821, "keepalive": 20, "mtu": 1280, "look": "-"},
}


def client(number: int, **values: Any) -> dict[str, Any]:
    return {"id": "%016x" % number, "key": key_like(f"client {number}"), "ip": "10.20.30.%d" % (100 + number), **values}


def told(*clients: dict[str, Any]) -> View:
    news = {"word": "1.00000001", "me": {**ME, "ingress": {"clients": list(clients)}, "forward": True}}
    return parse_news(View(), news)


def wanted(view: View) -> agent.Desired:
    return desire(view, "own", Config({"interface": "nm-demo"}), key_like("private"), {}, (), KEY)[0]


@pytest.mark.parametrize(
    "odd",
    [
        {"id": "x"},
        {"key": "short"},
        {"ip": "192.0.2.7"},  # not the network's: it would take another's traffic
        {"ip": "10.20.30.7/24"},
        {"ip6": "2001:db8::1"},
        {"ip6": "10.20.30.9"},
        {"key": "A" * 43 + "=\nEndpoint"},
    ],
)
def test_an_odd_client_is_refused_with_all_that_came_with_it(odd):
    with pytest.raises(BadAnswer):
        told(client(1), client(2, **odd))


def test_a_client_is_a_peer_that_calls():
    view = told(client(1, ip6="fd44::65", internet=True), client(2))
    peers = wanted(view).peers
    one, two = (peers[key_like(f"client {number}")] for number in (1, 2))
    assert (one.endpoint, one.keepalive, one.allowed) == ("", 0, {"10.20.30.101/32", "fd44::65/128"})
    assert one.preshared != two.preshared and len(base64.b64decode(one.preshared)) == 32
    assert [each["internet"] for each in view.me["clients"]] == [True, False]


def test_the_preshared_key_is_the_documented_one():
    each = client(1)
    text = each["id"].encode() + b"\n" + each["key"].encode()
    assert base64.b64decode(preshared_key(KEY, each)) == hashlib.blake2b(text, key=KEY, digest_size=32).digest()


def test_no_preshared_key_stands_on_a_command_line_or_is_shown(capsys):
    view = told(*(client(number) for number in range(1, 4)))
    steps = plan_peers(agent.Actual(), wanted(view))
    assert [step.argv for step in steps] == [("wg", "addconf", "nm-demo", "/dev/stdin")]  # one process for all
    assert steps[0].secret and steps[0].stdin.count("PresharedKey = ") == 3
    agent.Run(dry=True).apply(steps)
    secrets = {peer.preshared for peer in wanted(view).peers.values()}
    assert not [secret for secret in secrets if secret in capsys.readouterr().out]


def test_a_peer_that_should_have_none_loses_it():
    view = told()
    view.peers = {"n": {"id": "n", "name": "nas", "key": key_like("nas"), "ip": "10.20.30.2"}}
    line = "\t".join((key_like("nas"), key_like("psk"), "(none)", "10.20.30.2/32", "0", "0", "0", "20"))
    live = parse_dump("\t".join((key_like("private"), key_like("public"), "51821", "off")) + "\n" + line + "\n")
    (step,) = plan_peers(live, wanted(view))
    assert step.argv == ("wg", "set", "nm-demo", "peer", key_like("nas"), "preshared-key", "/dev/null")


numbers = st.lists(st.integers(1, 6), unique=True, max_size=5)


@given(numbers, numbers, st.sets(st.integers(1, 6)))
def test_any_clients_become_any_others_and_then_nothing_differs(before, after, taken):
    kernel = Kernel("nm-demo")
    create = agent.Step(("ip", "link", "add", "dev", "nm-demo", "type", "wireguard"), "make it")
    for each in (before, after):
        view = told(*(client(number) for number in each))
        view.peers = {
            str(number): {
                "id": str(number),
                "name": f"n{number}",
                "key": key_like(f"n{number}"),
                "ip": "10.20.30.%d" % (100 + number),
            }
            for number in taken
        }
        desired = wanted(view)
        owned = [text for peer in desired.peers.values() for text in peer.allowed]
        assert len(owned) == len(set(owned))  # nobody's address goes to two
        kernel.replay(plan(kernel.actual(), desired, create))
        assert plan(kernel.actual(), desired, create) == []
