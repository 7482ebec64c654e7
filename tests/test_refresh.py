# SPDX-License-Identifier: Apache-2.0
"""Keys are refreshed make-before-break: SPEC §8. The lab's stories, and the rules one by one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest
from agentkit import Clock as AgentClock
from agentkit import Standing, node_of, record, view_of
from kernel import key_like
from lab import Lab, Loss, unfit, wait_for
from mesh import Cron, Member, Mesh
from serverkit import Client, Clock, Server, clients, settle, wireguard_key

import netclient_lite as agent
import netmaker_core

UNFIT = unfit("wg")
MARKS = (pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(600))
INTERVAL = 3  # seconds between two check-ins in these stories
MEMORY = "/var/run/netclient/demo.memory"
CRASH = str(Path(__file__).resolve().parent / "crash.py")


class Refresh:
    """A public node and two homes behind NAT, meshed; and what an administrator does and sees of a refresh."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.mesh = mesh = Mesh(lab, "demo", "--checkin-interval", str(INTERVAL))
        homes = lab.router("home1", "203.0.113.21"), lab.router("home2", "203.0.113.22", lan="192.168.100.0/24")
        self.hub = mesh.join(lab.public("hub", "203.0.113.30"))
        self.left = mesh.join(lab.site("left", homes[0]))
        self.right = mesh.join(lab.site("right", homes[1]))
        self.all = [self.hub, self.left, self.right]
        mesh.settle(self.all)
        self.addresses = {member: member.address for member in self.all}

    def order(self, name: str = "") -> None:
        if name:
            self.mesh.admin("node", "refresh-key", "demo", name)
        else:
            self.mesh.admin("network", "refresh-keys", "demo")

    def shown(self, field: str) -> dict[str, str]:
        """A field of every node, as an administrator sees it."""
        return {node["name"]: str(node[field]) for node in self.mesh.nodes()}

    def states(self) -> dict[str, str]:
        return self.shown("keyrefresh")

    def keys(self) -> dict[str, str]:
        return self.shown("publickey")

    def reach(self, name: str, *states: str, timeout: float = 60) -> None:
        wait_for(lambda: self.states()[name] in states, timeout, f"{name} to be {states}")

    def over(self, timeout: float = 120) -> None:
        wait_for(lambda: not any(self.states().values()), timeout, "the refresh to be over")

    def public(self, member: Member) -> str:
        """The key that a node's interface has."""
        return member.host.run("wg", "show", "nm-demo", "public-key").stdout.strip()

    def owned(self, member: Member) -> bool:
        """Whether all others send the node's traffic to that key."""
        line = f"{self.public(member)}\t{self.addresses[member]}/32\n"
        return all(
            line in other.host.run("wg", "show", "nm-demo", "allowed-ips").stdout for other in self.all if other is not member
        )

    @contextlib.contextmanager
    def pings(self) -> Iterator[Callable[[], dict[tuple[str, str], Loss]]]:
        """A hundred a second between each pair; what they lost."""
        pairs = [(a, b) for a in self.all for b in self.all if a is not b]
        with contextlib.ExitStack() as stack:
            sent = {(a.name, b.name): stack.enter_context(a.host.pinging(self.addresses[b])) for a, b in pairs}
            yield lambda: {pair: ping.stop() for pair, ping in sent.items()}


def story(test: Callable[..., None]) -> Callable[..., None]:
    for mark in MARKS:
        test = mark(test)
    return test


@pytest.fixture
def refresh(lab: Lab) -> Refresh:
    return Refresh(lab)


@story
@pytest.mark.parametrize("way", ["cron", "daemon"])
def test_all_keys_of_a_network_change_and_hardly_a_packet_is_lost(refresh: Refresh, way: str) -> None:
    before = refresh.keys()
    with contextlib.ExitStack() as stack:
        if way == "cron":
            stack.enter_context(Cron(refresh.all, INTERVAL))
        else:
            for member in refresh.all:
                member.daemon()
        lost = stack.enter_context(refresh.pings())
        refresh.order()
        refresh.over()
        losses = lost()
    after = refresh.keys()
    assert not set(before.values()) & set(after.values())
    print({pair: loss.lost for pair, loss in losses.items()})
    assert all(loss.lost <= 200 and loss.sent > 500 for loss in losses.values()), losses  # each tunnel is refreshed twice
    for member in refresh.all:
        assert member.peers() == set(after.values()) - {after[member.name]}
        assert member.host.run("stat", "-c", "%a", "/etc/netclient/config/wgkey-demo").stdout.strip() == "600"
        assert len(member.host.read("/etc/netclient/config/wgkey-demo").split()) == 1


@story
def test_an_announced_switch_needs_no_server(refresh: Refresh) -> None:
    for member in refresh.all:
        member.daemon()
    before = refresh.keys()["left"]
    with refresh.pings() as lost:
        refresh.order("left")
        refresh.reach("left", "switching")
        wait_for(lambda: all('"switch":{"' in m.host.read(MEMORY) for m in refresh.all), 4, "all to have heard")
        refresh.mesh.kill()
        wait_for(lambda: refresh.public(refresh.left) != before, 10, "the switch")
        wait_for(lambda: refresh.owned(refresh.left), 5, "all to have moved")
        losses = lost()
    assert all(loss.lost <= 100 for loss in losses.values()), losses
    assert losses["hub", "right"].lost == losses["right", "hub"].lost == 0
    refresh.mesh.serve()
    refresh.over()
    assert refresh.keys()["left"] == refresh.public(refresh.left) != before


@story
def test_a_server_that_dies_and_comes_back_goes_on(refresh: Refresh) -> None:
    with Cron(refresh.all, INTERVAL), refresh.pings() as lost:
        refresh.order("left")
        for state in ("asked", "listed", "switching"):
            refresh.reach("left", state, "switching", "")
            refresh.mesh.kill()
            refresh.mesh.serve()
        refresh.over()
        losses = lost()
    assert all(loss.lost <= 100 for loss in losses.values()), losses
    assert losses["hub", "right"].lost == losses["right", "hub"].lost == 0


@story
def test_a_node_that_is_away_holds_nobody_up_and_follows_later(refresh: Refresh) -> None:
    hub, left, right = refresh.all
    with Cron(refresh.all, INTERVAL):
        right.host.cut()
        pings = [a.host.pinging(refresh.addresses[b]) for a, b in ((hub, left), (left, hub))]
        refresh.order()
        wait_for(lambda: not refresh.states()["hub"] and not refresh.states()["left"], 120, "those that are here")
        assert all(ping.stop().lost <= 200 for ping in pings)
        assert refresh.states()["right"] == "asked"
        right.host.mend()
        refresh.over()
        wait_for(lambda: not any(a.host.ping(refresh.addresses[b]).lost for a in refresh.all for b in refresh.all), 60, "all")


@story
def test_a_node_that_loses_its_power_at_the_instant_gets_its_new_key_later(refresh: Refresh) -> None:
    hub, left, right = refresh.all
    with Cron([hub, right], INTERVAL):
        refresh.order("left")
        wait_for(lambda: left.checkin() and refresh.states()["left"] == "listed", 30, "its new key to be told")
        refresh.reach("left", "switching", timeout=15)
        left.host.reboot()
        with hub.host.pinging(refresh.addresses[right]) as ping:
            time.sleep(INTERVAL + 12)
            with Cron([left], INTERVAL):
                refresh.over()
                wait_for(lambda: not left.host.ping(refresh.addresses[right]).lost, 60, "the tunnels to be back")
            assert ping.stop().lost == 0


@story
@pytest.mark.parametrize("state", ["listed", "switching"])
def test_a_node_is_disabled_in_the_middle(refresh: Refresh, state: str) -> None:
    hub, left, right = refresh.all
    with Cron(refresh.all, INTERVAL), hub.host.pinging(refresh.addresses[right]) as ping:
        refresh.order()
        refresh.reach("hub", "")
        refresh.reach("left", state, "switching")
        refresh.mesh.admin("node", "disable", "demo", "left")
        refresh.over()
        refresh.mesh.admin("node", "enable", "demo", "left")
        wait_for(lambda: not left.host.ping(refresh.addresses[right]).lost, 60, "the tunnels to be back")
        assert ping.stop().lost <= 200
    assert left.host.read("/etc/netclient/config/wgkey-demo").count("=") == 1


@story
def test_a_server_restored_from_before_the_refresh_cuts_no_tunnel(refresh: Refresh) -> None:
    mesh = refresh.mesh
    with Cron(refresh.all, INTERVAL):
        mesh.admin("backup", "/root/backup")
        refresh.order()
        refresh.over()
        after = refresh.keys()
        with refresh.pings() as lost:
            mesh.kill()
            mesh.admin("restore", "/root/backup")
            assert not set(refresh.keys().values()) & set(after.values())
            mesh.serve()
            wait_for(lambda: refresh.keys() == after, 30, "the nodes to tell their keys")
            time.sleep(2 * INTERVAL)
            losses = lost()
    assert [loss.lost for loss in losses.values()] == [0] * 6
    assert all(member.peers() == set(after.values()) - {after[member.name]} for member in refresh.all)


@story
@pytest.mark.parametrize("killed", ["left", "right"])
def test_an_agent_killed_at_any_step_is_healed_by_the_next_runs(refresh: Refresh, killed: str) -> None:
    """The node that gets the key, or one that follows."""
    hub, left, right = refresh.all
    victim = left if killed == "left" else right
    others = [member for member in refresh.all if member is not victim]
    # After an effect is before the next. Every other one for each of the two, all of them with NM_EVERY=yes (minutes more).
    every = os.environ.get("NM_EVERY") == "yes"
    at, step, done = (0, 2, False) if every else (-2 if killed == "left" else 0, 4, False)
    while not done:
        at += step
        before = refresh.keys()["left"]
        with Cron(others, INTERVAL):
            refresh.order("left")
            done = True
            for _ in range(4):  # check-ins of the victim, until one comes to that effect
                run = victim.host.run(refresh.lab.python, CRASH, str(at), "/root/effects", "checkin", check=False)
                assert run.returncode in (0, -9, 137), run.stderr
                if run.returncode:
                    done = False
                    break
            with Cron([victim], INTERVAL):
                refresh.over()
                wait_for(lambda: not left.host.ping(refresh.addresses[hub], count=1).lost, 30, f"left and hub after {at}")
                wait_for(lambda: not left.host.ping(refresh.addresses[right], count=1).lost, 30, f"left and right after {at}")
        assert refresh.keys()["left"] == refresh.public(left) != before
    assert at > 8


# ---- the server's part, by the protocol


class Two:
    """Two nodes of a server, both here."""

    def __init__(self, home: Server, clock: Clock) -> None:
        self.home, self.clock = home, clock
        self.a, self.b = clients(home, 2, home.key())
        settle((self.a, self.b))
        netmaker_core.refresh_keys(home.core, "default")
        self.new = wireguard_key()

    def state(self, client: Client) -> str:
        return str(self.home.node(client)["refresh"])

    def listed(self) -> None:
        """As far as: both know the new key."""
        self.a.exchange()
        self.a.exchange({"facts": {"next": self.new}})
        settle((self.a, self.b))

    def switched(self) -> None:
        self.listed()
        self.clock.now += 21
        self.a.exchange({"facts": {"key": self.new, "next": ""}})


@pytest.fixture
def two(home: Server, clock: Clock) -> Two:
    return Two(home, clock)


def test_one_node_after_the_other_makes_a_key_that_all_list_before_it_counts(two: Two) -> None:
    a, b = two.a, two.b
    old = a.facts["key"]
    assert (two.state(a), two.state(b)) == ("asked", "queued")
    a.exchange()
    b.exchange()
    assert a.me["refresh"] is True and "refresh" not in b.me
    a.exchange({"facts": {"next": two.new}})
    assert two.state(a) == "listed"
    a.exchange()
    assert two.state(a) == "listed"  # b has not heard of it
    said = b.exchange()
    assert (b.peers[a.node]["key"], b.peers[a.node]["next"]) == (old, two.new)
    assert "in" not in said.value
    said = b.exchange()
    assert two.state(a) == "switching"
    assert said["in"] == {a.node: 21.0}  # by cron, each comes within 15 s
    two.clock.now += 10
    assert a.exchange()["in"] == {a.node: 11.0}
    two.clock.now += 12
    said = a.exchange({"facts": {"key": two.new, "next": ""}})
    assert said.status == 200 and "in" not in said.value and "refresh" not in a.me
    b.exchange()
    assert b.peers[a.node]["key"] == two.new and "next" not in b.peers[a.node]
    assert (two.state(a), two.state(b)) == ("", "asked")


def test_who_waits_in_long_polls_hears_at_once(two: Two) -> None:
    polls = [threading.Thread(target=client.looked, kwargs={"wait": 50}) for client in (two.a, two.b)]
    for poll in polls:
        poll.start()
    wait_for(lambda: two.home.agents.bell.parked == 2 or not any(poll.is_alive() for poll in polls), 5, "the polls")
    two.listed()
    row = two.home.node(two.a)
    assert (row["refresh"], row["refresh_at"] - two.clock.now) == ("switching", 6)
    two.home.agents.bell.stop()
    for poll in polls:
        poll.join()


def test_a_node_that_does_nothing_is_given_up_and_tried_again_when_it_is_back(two: Two) -> None:
    a, b = two.a, two.b
    two.clock.now += 601
    two.home.agents.refresh_due()
    assert two.state(a) == "silent"
    assert two.state(b) == "asked"
    two.clock.now += 601
    two.home.agents.refresh_due()
    assert two.state(b) == "silent"
    two.clock.now += 3600
    two.home.agents.refresh_due()
    assert two.state(a) == "silent"  # it is not here
    a.exchange()
    two.home.agents.refresh_due()
    assert two.state(a) == "asked"
    a.exchange({"facts": {"next": two.new}})
    assert two.state(a) == "listed"


def test_a_switch_that_its_node_missed_is_told_no_longer(two: Two) -> None:
    two.listed()
    assert two.state(two.a) == "switching"
    two.clock.now += 21 + 2 * 20 + 31
    two.home.agents.refresh_due()
    assert two.state(two.a) == "silent"
    said = two.b.exchange()
    assert "in" not in said.value
    assert two.b.peers[two.a.node]["next"] == two.new  # both stay, whichever it has
    two.a.exchange({"facts": {"key": two.new, "next": ""}})
    assert two.state(two.a) == ""
    assert two.home.node(two.a)["key"] == two.new


def test_an_announced_switch_outlives_the_server(two: Two) -> None:
    two.listed()
    again = Server(two.home.folder, two.clock)
    try:
        for client in (two.a, two.b):
            client.home = again
            client.have = "-"
        assert two.b.exchange()["in"] == {two.a.node: 21.0}
    finally:
        again.stop()


@pytest.mark.parametrize("how", [netmaker_core.disable, netmaker_core.remove_node])
def test_a_node_that_goes_lets_the_next_have_its_turn(two: Two, how: Callable[..., netmaker_core.Row]) -> None:
    two.listed()
    how(two.home.core, two.home.node(two.a))
    two.home.agents.refresh_due()
    assert two.state(two.b) == "asked"
    if how is netmaker_core.disable:
        row = netmaker_core.enable(two.home.core, two.home.node(two.a))
        assert (row["refresh"], row["next_key"]) == ("", "")


def test_a_node_that_lost_its_new_key_makes_another(two: Two) -> None:
    two.listed()
    two.a.exchange({"facts": {"next": ""}})
    assert two.state(two.a) == "asked"
    two.b.exchange()
    assert "next" not in two.b.peers[two.a.node]


def test_nodes_whose_key_is_their_users_are_left_out(home: Server) -> None:
    given, made = clients(home, 2, home.key())
    given.exchange({"facts": {"keyed": True}})
    made.exchange()
    netmaker_core.refresh_keys(home.core, "default")
    assert [home.node(client)["refresh"] for client in (given, made)] == ["", "asked"]
    with pytest.raises(netmaker_core.Clash, match="given by its user"):
        netmaker_core.refresh_key(home.core, home.node(given))
    assert netmaker_core.refresh_key(home.core, home.node(made))["refresh"] == "asked"


def test_nobody_takes_a_key_that_another_has_or_will_have(two: Two) -> None:
    two.listed()
    for taken in (two.a.facts["key"], two.new):
        for fact in ("key", "next"):
            said = two.b.exchange({"facts": {fact: taken}})
            assert (said.status, "belongs to" in said["error"]) == (400, True)


# ---- the agent's part, on the model of an interface

OLD, NEW = key_like("b"), key_like("b next")


class Follower:
    """A node that knows that the key of its peer b is being refreshed, and has a session with the old one."""

    def __init__(self, root: Path, clock: AgentClock) -> None:
        self.clock = clock
        b = record("b", ip="10.20.30.5", spare=NEW, seen="203.0.113.7:51821")
        self.standing = Standing(root, view_of(b))
        self.node, self.peers = self.standing.node, self.standing.kernel.peers
        self.standing.settle()
        self.shake(OLD)

    def shake(self, key: str, ago: float = 0) -> None:
        """A handshake, from where the peer is."""
        live = self.peers[key]
        self.peers[key] = live._replace(handshake=int(self.clock.wall - ago), rx=live.rx + 1, endpoint="203.0.113.7:40007")

    def owner(self) -> str:
        return next(key for key, peer in self.peers.items() if peer.allowed)


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Follower:
    clock = AgentClock()
    monkeypatch.setattr(agent, "time", clock)
    return Follower(tmp_path, clock)


def test_a_next_key_is_a_bare_peer(follower: Follower) -> None:
    assert follower.peers[NEW][1:4] == ("", frozenset(), 0)
    assert follower.owner() == OLD


def test_at_the_instant_all_moves_with_one_command(follower: Follower) -> None:
    node, kernel = follower.node, follower.standing.kernel
    node.memory.switch = {node_of("b"): follower.clock.now + 12}
    node.switch(5)
    assert follower.owner() == OLD  # too far away for this run
    begin, sleep = follower.clock.now, follower.clock.sleep

    def asleep(seconds: float) -> None:
        sleep(seconds)
        if follower.clock.now >= begin + 12.3:
            follower.shake(NEW)

    follower.clock.sleep = asleep  # type: ignore[method-assign]
    before = len(kernel.ran)
    node.switch(900)
    assert follower.owner() == NEW
    assert len(kernel.ran) == before + 1
    assert follower.peers[NEW].endpoint == "203.0.113.7:40007" and follower.peers[NEW].keepalive == 20
    assert follower.peers[OLD].keepalive == 0 and not follower.peers[OLD].allowed
    assert not node.memory.switch


def test_a_node_that_does_not_come_with_its_new_key_keeps_the_old_one(follower: Follower) -> None:
    node = follower.node
    for _ in range(2):  # told again meanwhile
        node.memory.switch = {node_of("b"): follower.clock.now}
        node.switch(900)
        assert follower.owner() == OLD
    assert follower.clock.now < 10_000 + 2 * agent.SWITCH_WITHIN  # tried once
    follower.clock.sleep(20)
    follower.shake(NEW)
    follower.standing.settle()
    follower.standing.settle()
    assert follower.owner() == NEW


def test_whoever_missed_the_instant_moves_at_the_first_handshake(follower: Follower) -> None:
    follower.clock.sleep(30)
    follower.shake(NEW)
    follower.standing.settle()
    assert follower.owner() == NEW
    follower.clock.sleep(30)
    follower.shake(OLD)  # it came back with the old one
    follower.standing.settle()
    assert follower.owner() == OLD


def test_both_keys_are_tried_while_neither_answers(follower: Follower) -> None:
    for _ in range(12):
        follower.clock.sleep(20)
        follower.standing.settle()
    assert [peer.keepalive for peer in follower.peers.values()] == [20, 20]
    assert follower.peers[NEW].endpoint


def test_a_new_private_key_kicks_every_peer(follower: Follower) -> None:
    node, kernel = follower.node, follower.standing.kernel
    node.spare = (key_like("our next"), key_like("its public half"))
    node.memory.switch = {node.secret.node: follower.clock.now + 5}
    before = len(kernel.ran)
    node.switch(900)
    set_key, kick = kernel.ran[before:]
    assert set_key[3:5] == ("private-key", "/dev/stdin") and set_key.count("persistent-keepalive") == 2
    assert kick.count("persistent-keepalive") == 2
    assert kernel.private == key_like("our next") and node.spare is None
    assert follower.clock.now >= 10_000 + 5 + agent.SWITCH_AFTER
    assert agent.parse_keys(Path(node.file("wgkey")).read_text()) == (key_like("our next"), None)
    assert node.facts()["key"] == kernel.actual().public


def test_a_key_file_holds_one_key_or_three_words() -> None:
    assert agent.parse_keys(OLD + "\n") == (OLD, None)
    assert agent.parse_keys(f"{OLD}\n{NEW} {OLD}\n") == (OLD, (NEW, OLD))
    for damaged in ("", f"{OLD}\n{NEW}\n", f"{OLD}\nx y\n"):
        with pytest.raises(ValueError):
            agent.parse_keys(damaged)


def test_seconds_to_go_are_bounded_whatever_is_told() -> None:
    told = {"a": 5, "b": -3.5, "c": 1e9, "d": "x", "e": float("nan")}
    assert agent.parse_switch(told, 100.0) == {"a": 105.0, "b": 100.0, "c": 1000.0, "e": 100.0}
    assert agent.parse_switch([1], 100.0) == {}


def test_a_change_awaited_in_one_network_holds_no_other_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def check_in(context: object, network: str, afresh: bool, retell: bool, patience: float) -> bool:
        calls.append((network, patience))
        return network != "b" and not patience

    monkeypatch.setattr(agent, "check_in", check_in)
    monkeypatch.setattr(agent, "need_root", lambda verb: None)
    monkeypatch.setattr(agent, "stay_for_neighbours", lambda context, began: None)
    monkeypatch.setattr(agent, "chosen_networks", lambda context, options: ["a", "b", "c"])
    agent.cmd_checkin(None, agent.Options(verb="checkin", force=False, server_data=None))  # type: ignore[arg-type]
    assert calls == [("a", 0), ("b", 0), ("c", 0), ("a", agent.LONGEST), ("c", agent.LONGEST)]
