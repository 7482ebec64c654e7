# SPDX-License-Identifier: Apache-2.0
"""From what is known to what is done: choosing endpoints, guarding ranges, the plan and its replay, what is watched and reported.

Parts: THE PLAN - THE MODEL - ENDPOINTS - GUARDS - DESIRE - WATCH - REPORT - LINGERING - STORIES - WITH THE SERVER
"""

from __future__ import annotations

import contextlib
import copy
import io
import ipaddress
import os
import subprocess
import sys

import pytest
from agentkit import (
    CREATE,
    ENDPOINTS,
    IF,
    OWNED,
    PRIVATE,
    REPO,
    Clock,
    Standing,
    changes,
    config_of,
    differs,
    kernels,
    node_of,
    record,
    view_of,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from kernel import Kernel, RefusedByKernel, key_like
from lab import unfit

import netclient_lite as agent
import netmaker_core
from netclient_lite import (
    Desired,
    LivePeer,
    Memory,
    Peer,
    Place,
    Run,
    allowed_ips,
    candidates,
    choose_endpoint,
    cuts_off,
    desire,
    guarded,
    inside,
    is_public,
    lingering,
    networks_of,
    plan,
    proven_local,
    report,
    reported,
    split_endpoint,
    watch,
)

thorough = settings(max_examples=120, deadline=None)
usual = settings(max_examples=50, deadline=None)

UNFIT = unfit("wg", "wireguard-go", "busybox")


# ---------------------------------------------------------------------------------------------------------------------
# THE PLAN
# ---------------------------------------------------------------------------------------------------------------------


@thorough
@given(changes())
def test_a_plan_brings_what_was_asked_for_and_leaves_nothing_to_do(change):
    kernel, desired = change
    first = plan(kernel.actual(), desired, CREATE)
    kernel.replay(first)
    now = kernel.actual()
    assert now.exists
    assert now.up
    assert (now.private, now.port, now.mtu) == (desired.private, desired.port, desired.mtu)
    assert set(now.addresses) == desired.addresses
    assert now.routes == desired.routes
    assert set(now.peers) == set(desired.peers)
    for wish in desired.peers.values():
        assert not differs(now, wish)
    assert plan(now, desired, CREATE) == [], first


@thorough
@given(changes(), st.integers(0, 30))
def test_a_plan_cut_off_anywhere_is_finished_by_the_next(change, cut):
    kernel, desired = change
    kernel.replay(plan(kernel.actual(), desired, CREATE)[:cut])
    kernel.replay(plan(kernel.actual(), desired, CREATE))
    assert plan(kernel.actual(), desired, CREATE) == []


def own_words(step, key):
    """What a step says of one peer."""
    at = step.argv.index(key)
    return step.argv[at : step.argv.index("peer", at) if "peer" in step.argv[at:] else None]


@thorough
@given(changes())
def test_what_does_not_differ_is_in_no_step_and_what_does_is_named_once(change):
    kernel, desired = change
    actual = kernel.actual()
    steps = plan(actual, desired, CREATE)
    words = {word for step in steps for word in step.argv}
    rekeyed = actual.private not in ("", desired.private)  # then each peer is kicked into a handshake
    for key, wish in desired.peers.items():
        assert (key in words) == (differs(actual, wish) or (rekeyed and key in actual.peers))
    if (actual.private, actual.port) == (desired.private, desired.port):
        assert not {"private-key", "listen-port"} & words
    if actual.exists and actual.up and not cuts_off(actual, desired):
        assert not {"addr", "route"} & words
    for step in steps:
        for key in set() if {"remove", "private-key"} & set(step.argv) else set(step.argv) & set(actual.peers):
            mine, live, wish = own_words(step, key), actual.peers[key], desired.peers[key]
            assert ("allowed-ips" in mine) == (live.allowed != wish.allowed)
            assert ("persistent-keepalive" in mine) == (rekeyed or live.keepalive != wish.keepalive)
            assert ("endpoint" in mine) == (wish.endpoint not in ("", live.endpoint))
        if "route" in step.argv and "del" in step.argv:
            assert step.argv[step.argv.index("del") + 1] not in desired.routes


@thorough
@given(changes())
def test_sessions_live_on_and_each_tool_runs_once_for_each_purpose(change):
    kernel, desired = change
    before, steps = kernel.actual(), plan(kernel.actual(), desired, CREATE)
    assert [step for step in steps if step.argv == CREATE.argv] == ([] if kernel.exists else [CREATE])
    for step in steps:
        assert not {"setconf", "syncconf", "addconf", "flush", "down"} & set(step.argv)
        assert not {"link", "del"} <= set(step.argv)
        assert step.why
    device = [step for step in steps if {"private-key", "listen-port"} & set(step.argv)]
    removals = [step for step in steps if step.argv[0] == "wg" and "remove" in step.argv]
    others = [step for step in steps if step.argv[0] == "wg" and step not in device + removals]
    assert max(len(device), len(removals), len(others)) <= 1
    kernel.replay(steps)
    for key in set(before.peers) & set(desired.peers):  # also where the peer was changed
        assert kernel.peers[key][4:] == before.peers[key][4:]


@thorough
@given(changes())
def test_with_and_without_batch_the_end_is_the_same(change):
    kernel, desired = change
    plain = copy.deepcopy(kernel)
    plain.busybox = True
    kernel.replay(plan(kernel.actual(), desired, CREATE, batch=True))
    plain.replay(plan(plain.actual(), desired, CREATE, batch=False))
    assert kernel.actual() == plain.actual()
    assert len([argv for argv in kernel.ran if argv[0] == "ip" and "-batch" in argv]) <= 2


@usual
@given(changes())
def test_the_private_key_is_on_standard_input_alone_and_never_shown(change):
    kernel, desired = change
    steps = plan(kernel.actual(), desired, CREATE)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        Run(dry=True).apply(steps)
    assert PRIVATE not in shown.getvalue()
    for step in steps:
        assert PRIVATE not in " ".join(step.argv) + step.why
        assert (PRIVATE in step.stdin) == step.secret
    assert len(shown.getvalue().splitlines()) == len(steps)


def test_a_dry_run_starts_nothing(capsys):
    steps = [agent.Step(("/bin/sh", "-c", "kill $PPID"), "end it all"), agent.Step(("no-such-program",), "never")]
    Run(dry=True).apply(steps)
    shown = capsys.readouterr()
    assert [line[:14] for line in (shown.out + shown.err).splitlines()] == ["[#] /bin/sh -c", "[#] no-such-pr"]


def test_a_new_interface_is_made_in_the_order_that_linux_needs():
    peer = Peer(key_like("a"), "203.0.113.7:51821", frozenset({"10.20.30.5/32", "192.168.7.0/24"}), 20)
    routes = frozenset({"10.20.30.0/24", "192.168.7.0/24"})
    desired = Desired(IF, PRIVATE, 51821, 1280, frozenset({"10.20.30.2/24"}), routes, {peer.key: peer})
    steps = plan(agent.Actual(), desired, CREATE)
    assert [" ".join(step.argv) for step in steps] == [
        f"ip link add dev {IF} type wireguard",
        f"wg set {IF} listen-port 51821 private-key /dev/stdin",
        f"ip link set dev {IF} mtu 1280",
        f"ip addr add 10.20.30.2/24 dev {IF}",
        f"ip link set dev {IF} up",
        f"wg set {IF} peer {peer.key} endpoint {peer.endpoint} persistent-keepalive 20 allowed-ips 10.20.30.5/32,192.168.7.0/24",
        f"ip route replace 192.168.7.0/24 dev {IF} metric {agent.METRIC}",
    ]


@usual
@given(changes(), st.booleans())
def test_no_route_takes_the_place_of_somebody_elses(change, batch):
    # `ip route replace` takes the place of whatever has the same destination and metric, also on another interface: the way to a
    # LAN behind a second router would be lost, and not come back when we leave. Metrics: 0 by default, 1024 with IPv6.
    kernel, desired = change
    for step in plan(kernel.actual(), desired, CREATE, batch):
        for line in [*step.stdin.splitlines(), " ".join(step.argv)]:
            if "route replace" in line:
                assert int(line.rpartition(" metric ")[2]) > 1024


def test_a_second_address_by_hand_goes_and_ours_stays():
    # 10.20.30.9 came first, so it is the primary one, and takes ours along when it is deleted
    kernel = Kernel(IF)
    for command in (CREATE.argv, ("ip", "link", "set", "dev", IF, "up")):
        kernel(*command)
    kernel("ip", "addr", "add", "10.20.30.9/24", "dev", IF)
    kernel("ip", "addr", "add", "10.20.30.2/24", "dev", IF)
    desired = Desired(IF, "", 0, kernel.mtu, frozenset({"10.20.30.2/24"}), frozenset({"10.20.30.0/24"}), {})
    kernel.replay(plan(kernel.actual(), desired, CREATE))
    assert set(kernel.actual().addresses) == {"10.20.30.2/24"}
    assert kernel.actual().routes == {"10.20.30.0/24"}


def test_ten_thousand_peers_fit_on_the_command_lines():
    ceiling = os.sysconf("SC_ARG_MAX") - 128 * 1024  # what Linux takes, less the environment
    peers = {}
    for number in range(10_000):
        address = str(ipaddress.IPv4Address(0x0A140000 + number))
        own = frozenset({f"{address}/32", f"fd00:20::{number:x}/128"})
        peers[key_like(address)] = Peer(key_like(address), f"198.51.100.{number % 250}:{40000 + number}", own, 20)
    desired = Desired(IF, PRIVATE, 51821, 1280, frozenset(), frozenset(), peers)
    for step in plan(agent.Actual(), desired, CREATE):
        assert sum(len(word) + 1 + 8 for word in step.argv) < ceiling


# ---------------------------------------------------------------------------------------------------------------------
# THE MODEL
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.parametrize("tool", ["iproute2", "busybox"])
def test_the_model_does_what_this_machine_does(tool, tmp_path):
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if tool == "busybox":
        (tmp_path / "ip").symlink_to(subprocess.check_output(["which", "busybox"], text=True).strip())
        path = f"{tmp_path}:{path}"
    apart = ["unshare", "-n", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
    walk = [sys.executable, str(REPO / "tests" / "kernel.py"), "80", f"a walk with {tool}"]
    done = subprocess.run([*apart, *walk], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@usual
@given(kernels())
def test_a_system_reads_the_model(kernel):
    def run(*argv):
        return kernel(*argv)

    system = agent.System(run)
    assert system.actual(IF, system.links()) == kernel.actual()


def test_the_model_refuses_what_linux_refuses():
    kernel = Kernel(IF)
    kernel(*CREATE.argv)
    up = ("ip", "link", "set", "dev", IF, "up")
    for before, refused in (
        ((), CREATE.argv),
        ((), ("ip", "route", "replace", "192.168.7.0/24", "dev", IF)),
        ((("ip", "addr", "add", "10.20.30.2/24", "dev", IF), up), ("ip", "addr", "add", "10.20.30.2/24", "dev", IF)),
        ((), ("ip", "addr", "del", "10.20.30.3/24", "dev", IF)),
        ((), ("ip", "-6", "route", "replace", "192.168.7.0/24", "dev", IF)),
        ((), ("wg", "set", IF, "peer", key_like("a"), "color", "blue")),
        ((), ("wg", "set", "nm-other", "listen-port", "1")),
        ((), ("rm", "-rf", "/")),
    ):
        for command in before:
            kernel(*command)
        with pytest.raises(RefusedByKernel):
            kernel(*refused)


# ---------------------------------------------------------------------------------------------------------------------
# ENDPOINTS
# ---------------------------------------------------------------------------------------------------------------------

LOCAL, AT, SEEN, STATIC = "192.168.1.20:51821", "203.0.113.7:40007", "203.0.113.7:51821", "198.51.100.4:51821"
HERE = Place("203.0.113.7", ("192.168.1.10/24", "2001:db8:1::10/64"), "9f31c2aa")

places = st.builds(
    Place,
    st.sampled_from(("203.0.113.7", "198.51.100.1", "")),
    st.sampled_from((("192.168.1.10/24",), ("10.0.0.4/8", "2001:db8:1::10/64"), ())),
    st.sampled_from(("9f31c2aa", "00000001", "")),
    st.booleans(),
    st.booleans(),
    st.frozensets(st.sampled_from((4, 6))),
)
records = st.fixed_dictionaries(
    {},
    optional={
        "static": st.sampled_from((STATIC, "192.168.1.30:51821")),
        "at": st.sampled_from((AT, "[2001:db8:9::7]:40007")),
        "seen": st.sampled_from((SEEN, "198.51.100.9:51821")),
        "local": st.sampled_from((LOCAL, "10.0.0.20:51821", "192.168.1.20:40000")),
        "local6": st.sampled_from(("[2001:db8:1::20]:51821", "[2001:db8:9::9]:51821")),
        "lan": st.sampled_from(("9f31c2aa", "00000001")),
    },
).map(lambda fields: record("b", **fields))
turns = st.integers(0, 12)
lives = st.one_of(st.just(""), st.sampled_from((*ENDPOINTS, LOCAL, AT, SEEN, STATIC)))


@thorough
@given(records, places, lives, turns, lives)
def test_a_fresh_endpoint_moves_only_to_an_address_proven_to_be_in_the_same_lan(peer, place, live, turn, saved):
    chosen = choose_endpoint(peer, place, live, True, turn, saved)
    assert chosen in ("", peer.get("local", ""))
    if chosen:
        assert proven_local(peer, place)
        assert peer["lan"] == place.lan
        assert inside(split_endpoint(chosen)[0], place.subnets)
        assert not peer.get("static")


@thorough
@given(records, places, lives, turns, lives)
def test_only_what_is_known_of_a_peer_is_chosen(peer, place, live, turn, saved):
    known = {peer.get(kind) for kind in ("static", "at", "seen", "local", "local6")} | {saved, ""}
    assert choose_endpoint(peer, place, live, False, turn, saved) in known
    assert set(candidates(peer, place)) <= known - {""}


@usual
@given(records, places, lives, turns, lives)
def test_static_comes_first_and_alone(peer, place, live, turn, saved):
    peer = {**peer, "static": STATIC}
    place = place._replace(local_only=False, ways=place.ways | {4})
    assert candidates(peer, place) == [STATIC]
    assert (choose_endpoint(peer, place, live, False, turn, saved) or live) == STATIC
    assert choose_endpoint(peer, place, live, True, turn, saved) == ""


@usual
@given(records, places, lives, turns, lives, st.booleans())
def test_a_local_only_network_uses_no_public_endpoint(peer, place, live, turn, saved, fresh):
    place = place._replace(local_only=True)
    for chosen in (*candidates(peer, place), choose_endpoint(peer, place, live, fresh, turn, saved)):
        assert not chosen or not is_public(split_endpoint(chosen)[0])


@usual
@given(records, places, lives, turns)
def test_a_local_only_network_takes_the_local_address_whatever_the_subnet(peer, place, live, turn):
    assume(not peer.get("static"))
    chosen = choose_endpoint(peer, place._replace(local_only=True), live, False, turn)
    assert (chosen or live) == peer.get("local", live)


@usual
@given(records, places, turns)
def test_without_hole_punching_observed_endpoints_are_not_used(peer, place, turn):
    place = place._replace(punch=False)
    without = {name: value for name, value in peer.items() if name != "at"}
    assert candidates(peer, place) == candidates(without, place)
    assert peer.get("at", "none") not in candidates(peer, place)


@usual
@given(records, places, lives)
def test_without_a_handshake_every_candidate_gets_its_turn(peer, place, live):
    known = candidates(peer, place)
    assert len(set(known)) == len(known)
    tried = set()
    for turn in range(len(known) + 1):
        live = choose_endpoint(peer, place, live, False, turn) or live
        tried.add(live)
    assert set(known) <= tried


@usual
@given(records, places)
def test_a_local_address_without_proof_comes_last_and_only_behind_the_same_public_address(peer, place):
    assume(not peer.get("static") and not place.local_only and not proven_local(peer, place))
    known = candidates(peer, place)
    if peer.get("local") in known:
        public = candidates({**peer, "local": ""}, place)
        assert known == [*public, peer["local"]]
        assert inside(split_endpoint(peer["local"])[0], place.subnets)
        assert not public or place.seen in {split_endpoint(text)[0] for text in public}


@pytest.mark.parametrize(
    ("fields", "place", "expected"),
    [
        ({}, HERE, []),
        ({"seen": SEEN}, HERE, [SEEN]),
        ({"at": AT, "seen": SEEN}, HERE, [AT, SEEN]),
        ({"at": AT, "seen": SEEN}, HERE._replace(punch=False), [SEEN]),
        ({"at": AT, "seen": SEEN, "local": LOCAL}, HERE, [AT, SEEN, LOCAL]),
        ({"at": AT, "seen": SEEN, "local": LOCAL, "lan": "9f31c2aa"}, HERE, [LOCAL, AT, SEEN]),
        ({"at": AT, "seen": SEEN, "local": LOCAL, "lan": "00000001"}, HERE, [AT, SEEN, LOCAL]),
        ({"seen": SEEN, "local": LOCAL}, HERE._replace(seen="198.51.100.1"), [SEEN]),
        ({"seen": SEEN, "local": "10.9.9.9:51821"}, HERE, [SEEN]),
        ({"seen": SEEN, "local": "[2001:db8:1::20]:51821"}, HERE, [SEEN, "[2001:db8:1::20]:51821"]),
        ({"local": LOCAL}, HERE, [LOCAL]),
        ({"seen": SEEN, "local": "10.9.9.9:51821"}, HERE._replace(local_only=True), ["10.9.9.9:51821"]),
        ({"static": STATIC, "seen": SEEN, "local": LOCAL}, HERE, [STATIC]),
    ],
)
def test_the_order_of_candidates(fields, place, expected):
    assert candidates(record("b", **fields), place) == expected


def test_after_a_reboot_the_endpoint_that_last_worked_is_tried_first():
    peer, worked = record("b", at=AT, seen=SEEN), "203.0.113.99:4444"
    tries = [choose_endpoint(peer, HERE, "" if turn == 0 else "x", False, turn, worked) for turn in range(4)]
    assert tries[0] == worked
    assert {AT, SEEN} <= set(tries)
    assert choose_endpoint(peer, HERE, "", False, 0, SEEN) == AT  # known anyway: the usual order


def test_a_peer_without_any_endpoint_is_left_as_it_is():
    assert choose_endpoint(record("b"), HERE, "203.0.113.9:1", False, 3) == ""


# ---------------------------------------------------------------------------------------------------------------------
# GUARDS
# ---------------------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")
keep_outs = st.lists(
    st.sampled_from(("203.0.113.10", "192.168.7.44", "192.168.1.10/24", "172.29.3.4", "2001:db8:7::1", "10.99.0.9")), max_size=4
)


@st.composite
def views(draw):
    """Nodes whose addresses and ranges may clash and overlap."""
    found = []
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        fields = {"ip": "10.20.30.%d" % draw(st.integers(5, 7))}
        if draw(st.booleans()):
            fields["ip6"] = "fd00:20::%d" % draw(st.integers(5, 7))
        ranges = draw(st.lists(st.sampled_from(OWNED), max_size=3, unique=True))
        found.append(record(name, ips=ranges, **fields) if ranges else record(name, **fields))
    denied = [node_of(name) for name in draw(st.lists(st.sampled_from(NAMES), max_size=2))]
    return view_of(*found, ip6="fd00:20::2", range6="fd00:20::/64", deny=denied)


@thorough
@given(views(), keep_outs)
def test_no_address_is_owned_twice(view, keep_out):
    kept, _ = guarded(view, node_of("me"), keep_out)
    owned = [text for ranges in kept.values() for text in ranges]
    assert len(owned) == len(set(owned))


@thorough
@given(views(), keep_outs)
def test_ranges_that_would_swallow_what_must_stay_outside_are_left_out_with_a_sentence(view, keep_out):
    kept, warnings = guarded(view, node_of("me"), keep_out)
    ranges = {view.me["range"], view.me["range6"]}
    for node, owned in kept.items():
        peer = view.peers[node]
        for text in set(peer.get("ips", ())) - ranges:
            caught = [out for out in keep_out if ipaddress.ip_network(out, strict=False).overlaps(ipaddress.ip_network(text))]
            if caught:
                assert text not in owned
                assert any(text in said and peer["name"] in said and caught[0] in said for said in warnings)
    lost = {(node, text) for node in kept for text in allowed_ips(view.peers[node]) if text not in kept[node]}
    assert len(warnings) >= len(lost)


@usual
@given(views(), keep_outs)
def test_only_others_that_may_be_known_are_configured(view, keep_out):
    kept, _ = guarded(view, node_of("me"), keep_out)
    assert set(kept) == set(view.peers) - {node_of("me")} - set(view.me["deny"])


def test_the_sentences_of_the_guard_name_range_node_and_reason():
    view = view_of(record("a", ip="10.20.30.5", ips=["192.168.7.0/24"]), record("b", ip="10.20.30.6", ips=["192.168.7.0/24"]))
    first, second = sorted(("a", "b"), key=node_of)
    _, warnings = guarded(view, node_of("me"), [])
    assert warnings == [f"192.168.7.0/24 of {second} is left out: {first} has it"]
    _, warnings = guarded(view, node_of("me"), ["192.168.7.44"])
    assert warnings == [
        f"192.168.7.0/24 of {name} is left out: it would take 192.168.7.44 into the tunnel" for name in (first, second)
    ]


@pytest.mark.parametrize(
    "everything", ["0.0.0.0/0", "::/0", "169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8", "127.0.0.0/8"]
)
def test_what_no_node_may_own_is_left_out(everything):
    # SPEC §11: the default routes are for external clients only; the others are nobody's to route
    kept, warnings = guarded(view_of(record("a", ip="10.20.30.5", ips=[everything])), node_of("me"), [])
    assert kept[node_of("a")] == {"10.20.30.5/32"}
    assert len(warnings) == 1


def test_a_wrong_overlay_address_does_not_take_the_server_into_the_tunnel():
    kept, warnings = guarded(view_of(record("a", ip="203.0.113.10")), node_of("me"), ["203.0.113.10"])
    assert kept[node_of("a")] == frozenset()
    assert len(warnings) == 1


def test_the_guard_costs_as_much_as_there_are_nodes_and_not_its_square(monkeypatch):
    calls = []
    real = ipaddress.ip_network

    def counted(*args, **kw):
        calls.append(args)
        return real(*args, **kw)

    monkeypatch.setattr(agent.ipaddress, "ip_network", counted)
    nodes = [record(f"n{number}", ip=f"10.20.{number // 250}.{number % 250 + 1}") for number in range(300)]
    guarded(view_of(*nodes, range="10.20.0.0/16"), node_of("me"), [f"198.51.100.{number % 250}" for number in range(300)])
    assert len(calls) < 10 * 300


# ---------------------------------------------------------------------------------------------------------------------
# DESIRE
# ---------------------------------------------------------------------------------------------------------------------


@usual
@given(views(), keep_outs, st.dictionaries(st.sampled_from([node_of(name) for name in NAMES]), st.sampled_from(ENDPOINTS)))
def test_the_desired_interface_holds_what_the_view_says(view, keep_out, chosen):
    wanted, _ = desire(view, node_of("me"), config_of(), PRIVATE, chosen, keep_out)
    kept, _ = guarded(view, node_of("me"), keep_out)
    assert wanted.addresses == {"10.20.30.2/24", "fd00:20::2/64"}
    assert (wanted.interface, wanted.private, wanted.port, wanted.mtu) == (IF, PRIVATE, 51821, 1280)
    assert networks_of(wanted.addresses) <= wanted.routes
    assert set(wanted.peers) == {view.peers[node]["key"] for node in kept}
    owned = set()
    for node, ranges in kept.items():
        peer = wanted.peers[view.peers[node]["key"]]
        assert (peer.allowed, peer.endpoint, peer.keepalive) == (ranges, chosen.get(node, ""), 20)
        owned |= ranges
    networks = [ipaddress.ip_network(text) for text in (view.me["range"], view.me["range6"])]
    for text in owned:  # everything that a peer owns has a way into the tunnel
        one = ipaddress.ip_network(text)
        assert text in wanted.routes or any(one.version == net.version and one.subnet_of(net) for net in networks)
    assert wanted.routes <= owned | {view.me["range"], view.me["range6"]}


@pytest.mark.parametrize("kind", ["v4", "v6", "dual"])
def test_one_kind_of_address_is_enough(kind):
    four = {"ip": "10.20.30.2", "range": "10.20.30.0/24"}
    six = {"ip6": "fd00:20::2", "range6": "fd00:20::/64"}
    me = {"v4": four, "v6": six, "dual": {**four, **six}}[kind]
    view = view_of()
    view.me = {**{name: value for name, value in view.me.items() if name not in ("ip", "range")}, **me}
    wanted, _ = desire(view, node_of("me"), config_of(), PRIVATE, {})
    assert wanted.addresses == {{"ip": "10.20.30.2/24", "ip6": "fd00:20::2/64"}[name] for name in me if name.startswith("ip")}
    assert wanted.routes == {value for name, value in me.items() if name.startswith("range")}


def test_an_interface_with_ipv6_has_the_mtu_that_ipv6_needs():
    # Linux takes IPv6 off an interface whose MTU is below 1280, and every `ip addr add` of an IPv6 address fails there
    wanted, _ = desire(view_of(ip6="fd00:20::2", range6="fd00:20::/64", mtu=1200), node_of("me"), config_of(), PRIVATE, {})
    kernel = Kernel(IF)
    kernel.replay(plan(kernel.actual(), wanted, CREATE))
    assert "fd00:20::2/64" in kernel.actual().addresses
    assert plan(kernel.actual(), wanted, CREATE) == []


# ---------------------------------------------------------------------------------------------------------------------
# WATCH
# ---------------------------------------------------------------------------------------------------------------------

WALL, NOW = 1_800_000_000.0, 50_000.0


def live(name, age=None, keepalive=20, rx=100, tx=100, where=SEEN):
    """A peer that had a handshake so many seconds ago, or never."""
    return LivePeer(key_like(name), where, frozenset(), keepalive, 0 if age is None else int(WALL - age), rx, tx)


def actual_of(*peers):
    return agent.Actual(True, peers={peer.key: peer for peer in peers})


@pytest.mark.parametrize(
    ("age", "fresh"),
    [(None, False), (0, True), (179, True), (180, False), (10_000, False), (-3, True)],
)
def test_a_session_lives_for_three_minutes_after_its_handshake(age, fresh):
    assert watch(Memory(), actual_of(live("a", age, keepalive=0)), WALL, NOW) == ({key_like("a")} if fresh else set())


def test_where_keepalives_are_sent_silence_is_noticed_before_the_session_ends():
    memory = Memory()
    assert watch(memory, actual_of(live("a", 5)), WALL, NOW)
    assert watch(memory, actual_of(live("a", 5 + 55)), WALL, NOW + 55)
    assert not watch(memory, actual_of(live("a", 5 + 65)), WALL, NOW + 65)
    assert memory.waiting == {key_like("a"): NOW + 65}
    assert watch(memory, actual_of(live("a", 5 + 70, rx=132)), WALL, NOW + 70)
    assert memory.waiting == {}


def test_without_keepalives_silence_means_nothing():
    memory = Memory()
    watch(memory, actual_of(live("a", 5, keepalive=0)), WALL, NOW)
    assert watch(memory, actual_of(live("a", 5 + 120, keepalive=0)), WALL, NOW + 120)


def test_the_clock_may_step_while_sessions_live():
    # ntpd sets the clock an hour forward: the handshakes are no older for that
    memory, peer = Memory(), live("a", 5)
    assert watch(memory, actual_of(peer), WALL, NOW)
    assert watch(memory, actual_of(peer._replace(rx=peer.rx + 32)), WALL + 3600 + 15, NOW + 15)


def test_the_clock_may_step_back_and_old_sessions_still_end():
    memory, peer = Memory(), live("a", 5, keepalive=0)
    assert watch(memory, actual_of(peer), WALL, NOW)
    assert not watch(memory, actual_of(peer), WALL - 3600, NOW + 300)


peer_states = st.builds(
    live,
    st.sampled_from(NAMES),
    st.one_of(st.none(), st.integers(-10, 400)),
    st.sampled_from((0, 20)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(("", SEEN, AT)),
)
histories = st.lists(st.tuples(st.lists(peer_states, unique_by=lambda peer: peer.key), st.integers(0, 200)), max_size=6)


@thorough
@given(histories)
def test_a_peer_with_keepalives_is_either_alive_or_waiting_and_nobody_else_is_remembered(history):
    memory, now = Memory(), NOW
    since = {}
    for peers, pause in history:
        now += pause
        actual = actual_of(*peers)
        fresh = watch(memory, actual, WALL + now - NOW, now)
        assert fresh | set(memory.waiting) >= {key for key, peer in actual.peers.items() if peer.keepalive}
        assert fresh | set(memory.waiting) <= set(actual.peers)
        assert not fresh & set(memory.waiting)
        assert set(memory.rx) == set(actual.peers)
        for key, began in memory.waiting.items():
            assert began == since.get(key, now)  # a wait that goes on keeps its beginning
        assert set(memory.waiting) <= set(actual.peers)
        since = dict(memory.waiting)
        assert all(actual.peers[key].handshake for key in fresh)
        memory = Memory(agent.json.loads(memory.text()))  # between two check-ins it is on tmpfs


# ---------------------------------------------------------------------------------------------------------------------
# REPORT
# ---------------------------------------------------------------------------------------------------------------------


@thorough
@given(histories, st.lists(st.dictionaries(st.sampled_from(("key", "port", "lan")), st.integers(0, 2)), min_size=6, max_size=6))
def test_what_was_reported_adds_up_to_what_is_and_nothing_is_told_twice(history, facts):
    memory = Memory()
    memory.view = view_of(*(record(name) for name in NAMES[:3]))  # d is a peer that the view does not know
    known, now = {"facts": {}, "seen": {}, "mute": {}}, NOW
    for (peers, pause), present in zip(history, facts):
        now += pause
        actual = actual_of(*peers)
        fresh = watch(memory, actual, WALL + now - NOW, now)
        told = report(memory, actual, fresh, present, {"name": "me"}, now)
        reported(memory, told)
        assert set(told) <= {"facts", "wishes", "seen", "mute", "rejected"}
        assert all(told.values())
        for kind in known:
            known[kind].update(told.get(kind, {}))
            known[kind] = {name: value for name, value in known[kind].items() if value is not None}
        assert present.items() <= known["facts"].items()
        names = {record(name)["key"]: node_of(name) for name in NAMES[:3]}
        assert known["seen"] == {
            names[key]: actual.peers[key].endpoint for key in fresh if key in names and actual.peers[key].endpoint
        }
        assert not set(known["mute"]) & set(known["seen"])
        assert report(memory, actual, fresh, present, {"name": "me"}, now) == {}


def test_a_peer_is_mute_when_we_send_for_a_minute_and_get_no_handshake():
    memory = Memory()
    memory.view = view_of(record("a"))
    actual = actual_of(live("a", None, tx=148))
    fresh = watch(memory, actual, WALL, NOW)
    assert report(memory, actual, fresh, {}, {}, NOW + 50) == {}
    assert report(memory, actual, fresh, {}, {}, NOW + 60) == {"mute": {node_of("a"): True}}
    reported(memory, {"mute": {node_of("a"): True}})
    actual = actual_of(live("a", 1, rx=192))
    fresh = watch(memory, actual, WALL, NOW + 70)
    assert report(memory, actual, fresh, {}, {}, NOW + 70) == {"seen": {node_of("a"): SEEN}, "mute": {node_of("a"): None}}


def test_a_rejected_revision_is_told_once():
    memory = Memory()
    memory.rejected = {"word": "7.aaaaaaaa", "reason": "cut off"}
    told = report(memory, agent.Actual(), set(), {}, {}, NOW)
    assert told == {"rejected": {"word": "7.aaaaaaaa", "reason": "cut off"}}
    reported(memory, told)
    assert report(memory, agent.Actual(), set(), {}, {}, NOW) == {}
    memory.rejected = {}  # the next one was fine
    told = report(memory, agent.Actual(), set(), {}, {}, NOW)
    assert told == {"rejected": {"word": "-"}}
    reported(memory, told)
    assert report(memory, agent.Actual(), set(), {}, {}, NOW) == {}


# ---------------------------------------------------------------------------------------------------------------------
# LINGERING
# ---------------------------------------------------------------------------------------------------------------------


def restored(memory, before, after, incarnation="j", now=NOW):
    """The first snapshot of a restored server."""
    after.incarnation = incarnation
    lingering(memory, before, after, True, now)
    return after


@given(now=st.floats(0, 1e9))
@example(now=2106.053351110693)  # plus 3600, less itself: more than 3600
def test_the_hour_begins_at_any_time(now):
    """A sum of floats less one of them is not quite the other."""
    memory, before = Memory(), view_of(record("a"), record("b"))
    assert set(restored(memory, before, view_of(record("a")), now=now).peers) == set(before.peers)


def test_peers_that_a_restored_server_forgot_stay_for_an_hour():
    memory, before = Memory(), view_of(record("a"), record("b"))
    after = restored(memory, before, view_of(record("a")))
    assert set(after.peers) == set(before.peers)
    again = view_of(record("a"))
    again.incarnation = "j"
    lingering(memory, after, again, True, NOW + 3599)  # another snapshot
    assert node_of("b") in again.peers
    last = view_of(record("a"))
    last.incarnation = "j"
    lingering(memory, again, last, True, NOW + 3601)
    assert set(last.peers) == {node_of("me"), node_of("a")}
    assert memory.kept == {}


def test_a_delta_leaves_lingering_peers_until_their_hour_is_over():
    memory, before = Memory(), view_of(record("a"), record("b"))
    view = restored(memory, before, view_of(record("a")))
    for later, there in ((60, True), (3599, True), (3601, False)):
        after = agent.View(view.values())  # a delta is laid over what is known
        after.word = "%d.00000000" % later
        lingering(memory, view, after, False, NOW + later)
        assert (node_of("b") in after.peers) == there, later
        view = after


def test_a_lingering_peer_that_is_said_to_be_gone_goes():
    memory, before = Memory(), view_of(record("a"), record("b"))
    view = restored(memory, before, view_of(record("a")))
    after = agent.View(view.values())
    del after.peers[node_of("b")]  # parse_news did that for "gone"
    lingering(memory, view, after, False, NOW + 60)
    assert node_of("b") not in after.peers


def test_a_peer_that_joined_again_replaces_the_lingering_one():
    memory, before = Memory(), view_of(record("a"), record("b", ip="10.20.30.6"))
    view = restored(memory, before, view_of(record("a")))
    after = agent.View(view.values())
    again = {**record("b", ip="10.20.30.6"), "id": "00000000000000bb"}  # the same key, a new node
    after.peers[again["id"]] = again
    lingering(memory, view, after, False, NOW + 60)
    assert node_of("b") not in after.peers
    assert again["id"] in after.peers


def test_a_new_node_with_a_lingering_peers_address_gets_it():
    memory, before = Memory(), view_of(record("b", ip="10.20.30.6"))
    view = restored(memory, before, view_of())
    for name in NAMES:  # whichever node id sorts first
        after = agent.View(view.values())
        new = {**record("new", ip="10.20.30.6"), "id": node_of(name)[:-1] + "f"}
        after.peers[new["id"]] = new
        lingering(Memory(agent.json.loads(memory.text())), view, after, False, NOW + 60)
        kept, _ = guarded(after, node_of("me"), [])
        assert "10.20.30.6/32" in kept[new["id"]]


def test_the_same_incarnation_takes_peers_away_at_once():
    memory, before = Memory(), view_of(record("a"), record("b"))
    after = restored(memory, before, view_of(record("a")), "i")
    assert node_of("b") not in after.peers
    assert memory.kept == {}


def test_a_first_snapshot_lingers_nobody():
    memory = Memory()
    after = restored(memory, agent.View(), view_of(record("a")))
    assert set(after.peers) == {node_of("me"), node_of("a")}


# ---------------------------------------------------------------------------------------------------------------------
# STORIES
# ---------------------------------------------------------------------------------------------------------------------
# A node on the model of a machine; the world outside is a few lines in each story.


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(agent, "time", clock)
    return clock


def heard(standing, key, clock):
    """The peer answers: a handshake when the last is two minutes old, and a keepalive."""
    peer = standing.kernel.peers[key]
    made = peer.handshake if clock.wall - peer.handshake < 120 else int(clock.wall)
    standing.kernel.peers[key] = peer._replace(handshake=made, rx=peer.rx + 32, tx=peer.tx + 32)


def lan_story(standing, clock, minutes, answers):
    """Check in every 15 s; the peer answers at some endpoints. The endpoints in use, one for each check-in."""
    key, used = key_like("b"), []
    for _ in range(minutes * 4):
        standing.settle()
        where = standing.kernel.peers[key].endpoint
        used.append(where)
        if where in answers:
            heard(standing, key, clock)
        else:
            peer = standing.kernel.peers[key]
            standing.kernel.peers[key] = peer._replace(tx=peer.tx + 148)
        clock.sleep(15)
    return used


@pytest.fixture
def neighbours(tmp_path, time, monkeypatch):
    """Two nodes in one LAN: the same public address, the same gateway."""
    monkeypatch.setattr(agent.System, "lan_hash", lambda self: "9f31c2aa")
    view = view_of(record("b", ip="10.20.30.5", seen="203.0.113.7:51822", local=LOCAL, lan="9f31c2aa"))
    view.peers[node_of("me")]["seen"] = "203.0.113.7:51821"
    return Standing(tmp_path, view)


def test_neighbours_meet_at_the_local_address_and_stay_there(neighbours, time):
    used = lan_story(neighbours, time, 10, {LOCAL, "203.0.113.7:51822"})
    assert set(used) == {LOCAL}


def test_neighbours_whose_lan_keeps_them_apart_stay_with_the_public_address(neighbours, time):
    # a wireless network that isolates its clients: the same gateway, and no way between them (SPEC §10: a local endpoint is
    # kept only if a handshake follows, else the public one returns)
    used = lan_story(neighbours, time, 40, {"203.0.113.7:51822"})
    assert used[-120:].count("203.0.113.7:51822") >= 110


def test_a_settled_node_changes_nothing(neighbours, time):
    lan_story(neighbours, time, 5, {LOCAL})
    neighbours.kernel.ran.clear()
    lan_story(neighbours, time, 25, {LOCAL})
    assert neighbours.kernel.ran == []


def idle_pair(tmp_path):
    """A peer without keepalives, that may be at either of two endpoints."""
    return Standing(tmp_path, view_of(record("b", ip="10.20.30.5", at=AT, seen="203.0.113.99:51821"), keepalive=0))


def test_an_idle_peer_without_keepalives_is_left_where_it_is(tmp_path, time):
    # it has no handshake because nobody has anything to say, which tells nothing against its endpoint
    standing = idle_pair(tmp_path)
    standing.settle()
    heard(standing, key_like("b"), time)
    standing.kernel.ran.clear()
    for _ in range(40):
        time.sleep(15)
        standing.settle()
    assert standing.kernel.ran == []


def test_a_peer_without_keepalives_that_does_not_answer_is_tried_elsewhere(tmp_path, time):
    standing = idle_pair(tmp_path)
    used = lan_story(standing, time, 5, set())
    assert set(used) == {AT, "203.0.113.99:51821"}


def test_lingering_peers_end_without_news_too(tmp_path, time, monkeypatch):
    standing = Standing(tmp_path, view_of(record("a", ip="10.20.30.5"), record("b", ip="10.20.30.6")))
    standing.settle()
    memory, before = standing.node.memory, standing.node.memory.view
    after = view_of(record("a", ip="10.20.30.5"))
    after.incarnation = "j"
    lingering(memory, before, after, True, time.now)
    memory.view = after
    monkeypatch.setattr(standing.node, "exchange", lambda: None)
    for later, there in ((1800, True), (3700, False)):
        time.now = 10_000.0 + later
        standing.node.check_in()
        assert (key_like("b") in standing.kernel.peers) == there


def test_an_interface_with_another_name_is_no_lan(tmp_path, time):
    # --interface mesh0: the overlay is not a LAN to take a local address from, nor one to keep out of the tunnel
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5")), interface="mesh0")
    standing.settle()
    assert "10.20.30.2/24" in standing.kernel.actual().addresses
    standing.node.read()
    assert standing.node.place.subnets == ("192.168.1.10/24",)


def test_the_server_is_kept_out_of_the_tunnel_also_when_it_has_a_name(tmp_path, time, monkeypatch):
    view = view_of(record("b", ip="10.20.30.5", ips=["203.0.113.0/24", "192.168.7.0/24"]))
    standing = Standing(tmp_path, view)
    monkeypatch.setattr(
        agent._socket, "getaddrinfo", lambda host, port, *_: [(2, 1, 6, "", ("203.0.113.10", port or 0))], raising=True
    )
    standing.node.counters.server = "http://vpn.example.org:8081"
    standing.settle()
    assert "203.0.113.0/24" not in standing.kernel.actual().routes
    assert "192.168.7.0/24" in standing.kernel.actual().routes


def test_a_change_that_cut_the_server_off_takes_its_ranges_back_too(tmp_path, time, monkeypatch):
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5")))
    standing.settle()
    node, before = standing.node, standing.node.memory.view
    node.memory.trial = before.values()
    node.memory.view = agent.View(view_of(record("b", ip="10.20.30.5", ips=["198.18.0.0/15"])).values())
    node.memory.view.word = "2.00000002"
    standing.settle()
    assert "198.18.0.0/15" in standing.kernel.actual().routes

    def nobody(*_):
        raise agent.Unreachable("nobody there")

    monkeypatch.setattr(node.session, "exchange", nobody)
    node._roll_back()
    assert "198.18.0.0/15" not in standing.kernel.actual().routes
    assert key_like("b") in standing.kernel.peers
    assert node.memory.rejected["word"] == "2.00000002"


def test_the_names_of_servers_are_not_asked_for_where_no_range_has_to_be_guarded(tmp_path, time, monkeypatch):
    # at boot there may be no resolver yet, and the mesh has to come up before it answers
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5")))
    standing.node.counters.server = "http://vpn.example.org:8081"

    def nobody(*_):
        raise AssertionError("a resolver was asked")

    monkeypatch.setattr(agent._socket, "getaddrinfo", nobody)
    standing.settle()
    assert key_like("b") in standing.kernel.peers


# ---------------------------------------------------------------------------------------------------------------------
# WITH THE SERVER
# ---------------------------------------------------------------------------------------------------------------------


class Machine(Standing):
    """A machine whose interface is the model, joined to a real server."""

    def __init__(self, root, home, key, **wishes):
        super().__init__(root, agent.View())
        self.context, scalar = self.node.context, os.urandom(32)
        secret = agent.Secret("default", "-", "-", agent.public_key(scalar), agent.x25519(scalar, home.pin), home.pin)
        url = f"http://127.0.0.1:{home.port}"
        config = config_of(network="default", servers=[url], port=51821, fixed=True, wishes=wishes)
        paths, files, private = self.context.paths, self.context.files, agent.new_private()
        texts = {"wgkey": private + "\n", "nettoken": key + "\n", "secret": secret.text(), "netconfig": config.text()}
        for kind, text in texts.items():
            files.write(paths.of(kind, "default"), text)
        self.node = agent.Node(self.context, config, secret, private)
        agent.enrol(self.node, config.wishes)
        self.checkin()

    def checkin(self):
        self.node.check_in()
        self.node.finish()

    def reboot(self):
        """The interface and what lies on tmpfs are gone."""
        for kind in ("memory", "state"):
            self.context.files.remove(self.context.paths.of(kind, "default"))
        self.kernel("ip", "link", "del", "dev", IF)
        self.kernel("wireguard-go", IF)
        self.node = agent.Node.load(self.context, "default")

    @property
    def name(self):
        return self.node.memory.view.me["name"]


def test_two_machines_of_one_name_check_in_after_a_reboot(tmp_path, home):
    # a LAN full of machines that are called openwrt; the second is given another name
    first, second = (Machine(tmp_path / name, home, home.key(), name="openwrt") for name in ("first", "second"))
    assert [first.name, second.name] == ["openwrt", "openwrt-2"]
    for machine in (second, first):
        machine.reboot()
        machine.checkin()
        machine.checkin()
    assert [first.name, second.name] == ["openwrt", "openwrt-2"]


def test_what_the_administrator_changed_outlives_a_reboot(tmp_path, home):
    machine = Machine(tmp_path, home, home.key(), name="nas", keepalive=25)
    netmaker_core.set_node(
        home.core, netmaker_core.need_node(home.core, "default", machine.node.secret.node), {"name": "archive"}
    )
    machine.checkin()
    assert machine.name == "archive"
    machine.reboot()
    machine.checkin()
    machine.checkin()
    assert machine.name == "archive"
