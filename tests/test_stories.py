"""The stories that the product promises, on real WireGuard behind real NAT, with the real server over HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import pytest
from lab import Host, Lab, adjacency, unfit, wait_for
from mesh import Cron, Member, Mesh

import netclient_lite as agent

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(180)]


@pytest.fixture
def mesh(lab: Lab) -> Mesh:
    return Mesh(lab)


class Sites:
    """A public node and two homes behind NAT, meshed."""

    def __init__(self, mesh: Mesh) -> None:
        lab = mesh.lab
        self.mesh = mesh
        self.homes = lab.router("home1", "203.0.113.21"), lab.router("home2", "203.0.113.22", lan="192.168.100.0/24")
        self.hub = mesh.join(mesh.host)
        self.left = mesh.join(lab.site("left", self.homes[0]))
        self.right = mesh.join(lab.site("right", self.homes[1]))
        self.all = [self.hub, self.left, self.right]


@pytest.fixture
def sites(mesh: Mesh) -> Sites:
    sites = Sites(mesh)
    mesh.settle(sites.all)
    return sites


def whole(members: list[Member]) -> None:
    """Each reaches each, without a loss."""
    lost = {pair: loss for pair, loss in adjacency({m.host: m.address for m in members}).items() if loss.lost}
    assert not lost


def test_two_homes_and_a_public_node_are_meshed_within_30_s_of_the_last_join(mesh: Mesh) -> None:
    """By cron's check-ins alone, at most one in 15 s for each."""
    sites = Sites(mesh)
    joined = time.monotonic()
    addresses = {member.host: member.address for member in sites.all}
    with Cron(sites.all):
        wait_for(lambda: all(not loss.lost for loss in adjacency(addresses, count=1).values()), 30, "the mesh")
        assert time.monotonic() - joined < 30
        sent = [m.host.pinging(addresses[o.host], 0.05) for m in sites.all for o in sites.all if m is not o]
        time.sleep(16)  # a check-in of each in between
        assert [ping.stop().lost for ping in sent] == [0] * 6
    assert sites.left.path(sites.right) == "direct"


def test_changes_of_others_lose_no_packet(sites: Sites) -> None:
    """A node joins, one leaves, one is removed, one is approved: others follow at one check-in, and 100 pings/s lose nothing."""
    mesh, others = sites.mesh, [sites.hub, sites.left, sites.right]
    mesh.admin("network", "set", "demo", "allowmanualsignup=yes")
    third = mesh.lab.router("home3", "203.0.113.23", lan="192.168.3.0/24")
    with contextlib.ExitStack() as stack:
        pings = [stack.enter_context(a.host.pinging(b.address)) for a, b in ((sites.left, sites.right), (sites.right, sites.hub))]
        time.sleep(0.5)
        joiner, leaver = (mesh.join(mesh.lab.site(name, third)) for name in ("joiner", "leaver"))
        follow(others, 4)
        mesh.settle([*others, joiner])
        leaver.leave()
        follow(others, 3)
        mesh.admin("node", "remove", "demo", "joiner")
        follow(others, 2)
        told = joiner.checkin()
        assert "removed" in told.stderr
        assert joiner.host.run("ip", "link", "show", "nm-demo", check=False).returncode != 0
        assert joiner.host.agent("list", "--json").stdout.strip() == "[]"
        pin = token_pin(mesh)
        stranger = mesh.lab.site("stranger", third)
        flags = ("-n", "demo", "--apiserver", "203.0.113.10:8081", "--server-key", pin, "--daemon", "off")
        assert "approve" in stranger.agent("join", *flags).stdout
        follow(others, 2)
        pending = next(node for node in mesh.nodes() if node["ispending"] == "yes")
        mesh.admin("node", "approve", "demo", pending["id"])
        member = Member(mesh, stranger, "demo")
        member.checkin()
        follow(others, 3)
        mesh.settle([*others, member])
        losses = [ping.stop() for ping in pings]
    assert all(loss.sent > 100 for loss in losses), losses
    assert [loss.lost for loss in losses] == [0, 0]


def follow(members: list[Member], peers: int) -> None:
    """One check-in of each, and each has so many peers."""
    for member in members:
        member.checkin()
    assert [len(member.peers()) for member in members] == [peers] * len(members)


def token_pin(mesh: Mesh) -> str:
    """The server's key, out of a token, as a user who got it by another way would have it."""
    return agent.b64(agent.parse_token(mesh.token()).pin)


def test_what_a_hand_breaks_the_next_checkin_repairs(sites: Sites) -> None:
    left = sites.left
    before, peers = left.snapshot(), left.peers()
    with sites.right.host.pinging(sites.hub.address) as ping:
        for damage in (
            ("ip", "link", "del", "nm-demo"),
            ("ip", "addr", "flush", "dev", "nm-demo"),
            ("ip", "route", "del", "10.20.30.0/24"),
            ("ip", "link", "set", "nm-demo", "down"),
            ("ip", "link", "set", "nm-demo", "mtu", "1400"),
            ("wg", "set", "nm-demo", "peer", sorted(peers)[0], "remove"),
        ):
            left.host.run(*damage)
            left.checkin(*(["--force"] if damage[0] == "wg" or "mtu" in damage else []))
            assert left.peers() == peers, damage
            assert left.host.run("ip", "route").stdout.count("10.20.30.0/24") == 1, damage
            assert "mtu 1280" in left.host.run("ip", "link", "show", "nm-demo").stdout
            wait_for(lambda: not left.host.ping(sites.hub.address, count=1).lost, 15, f"{damage} to be healed")
        loss = ping.stop()
    assert loss.lost == 0
    sites.mesh.settle(sites.all)
    assert sorted(left.snapshot().split("\n")[0].split("\t")[0]) == sorted(before.split("\n")[0].split("\t")[0])


def test_the_mesh_lives_without_its_server(sites: Sites) -> None:
    """Killed: all goes on; a node reboots and comes up from disk; the server comes back and nodes go on where they were."""
    mesh, left, right = sites.mesh, sites.left, sites.right
    name = "/etc/netclient/config/peers-demo"  # written at most once a minute: the join's own was the last
    wait_for(lambda: left.checkin() and '"right"' in left.host.read(name), 70, "the last good state on disk")
    with sites.right.host.pinging(sites.hub.address) as ping:
        mesh.kill()
        dead = [member.checkin(check=False) for member in sites.all]
        assert [done.returncode for done in dead] == [1, 1, 1]
        assert all("refuses the connection" in done.stderr and done.stderr.count("\n") == 1 for done in dead)
        left.host.reboot()
        assert left.checkin(check=False).returncode == 1
        wait_for(lambda: not left.host.ping(right.address, count=1).lost, 30, "the rebooted node to reach its peers")
        assert ping.stop().lost == 0
    revision = right.status["revision"]
    mesh.serve()
    for member in sites.all:
        member.checkin()
    whole(sites.all)
    assert right.status["revision"].split(".")[0] == revision.split(".")[0]
    assert len(mesh.nodes()) == 3


def test_two_checkins_at_once_are_one(sites: Sites) -> None:
    results = []

    def run() -> None:
        results.append(sites.left.checkin("--force", check=False))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in results] == [0] * 4
    assert [done.stderr for done in results] == [""] * 4


def test_ten_daemons_apply_a_change_within_a_second(mesh: Mesh) -> None:
    lab = mesh.lab
    home = lab.router("home", "203.0.113.21")
    hosts = [
        mesh.host,
        *(lab.site(f"n{i}", home) for i in range(4)),
        *(lab.public(f"p{i}", f"203.0.113.{30 + i}") for i in range(4)),
    ]
    members = [mesh.join(host) for host in hosts]
    for member in members:
        member.daemon()
    wait_for(lambda: all(len(member.peers()) == 8 for member in members), 20, "all daemons to know all nodes")
    time.sleep(2)  # parked in their long-polls again
    tenth = lab.public("tenth", "203.0.113.50")
    token = mesh.token()
    tenth.agent("join", "-t", token, "--daemon", "off")
    begin = time.monotonic()
    wait_for(lambda: all(len(member.peers()) == 9 for member in members), 5, "all daemons to apply the join")
    assert time.monotonic() - begin < 1.5  # the wait itself starts nine `wg` one after the other
    mesh.admin("node", "remove", "demo", "tenth")
    begin = time.monotonic()
    wait_for(lambda: all(len(member.peers()) == 8 for member in members), 5, "all daemons to apply the removal")
    assert time.monotonic() - begin < 1.5


def test_two_nodes_behind_one_address_get_ports_of_their_own(mesh: Mesh) -> None:
    """A masquerade keeps only the first's port."""
    home = mesh.lab.router("home", "203.0.113.21")
    hub, one, two = mesh.join(mesh.host), mesh.join(mesh.lab.site("one", home)), mesh.join(mesh.lab.site("two", home))
    ports = {member.host.run("wg", "show", "nm-demo", "listen-port").stdout.strip() for member in (one, two)}
    assert len(ports) == 2
    mesh.settle([hub, one, two])
    whole([hub, one, two])
    assert one.path(two) == "local"


def test_an_overlay_over_the_own_lan_is_refused(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", range4="192.168.1.0/24")
    nas = lab.site("nas", lab.router("home", "203.0.113.21"))
    done = nas.agent("join", "-t", mesh.token(), "--daemon", "off", check=False)
    assert done.returncode == 1
    assert "192.168.1.0/24 overlaps" in done.stderr
    assert mesh.nodes() == []
    assert nas.run("ip", "link", "show", "nm-demo", check=False).returncode != 0
    assert nas.run("ls", "/etc/netclient/config").stdout == ""


def test_a_change_that_cuts_the_server_off_is_taken_back(mesh: Mesh) -> None:
    """Commit-confirm. A range that holds the server's address is guarded against; here the way breaks otherwise."""
    home = mesh.lab.router("home", "203.0.113.21")
    nas = mesh.join(mesh.lab.site("nas", home))
    before = nas.address
    mesh.admin("node", "set", "demo", "nas", "address=10.20.30.77")
    nas.host.write("/usr/local/sbin/ip", CUTTING_IP)
    nas.host.run("chmod", "755", "/usr/local/sbin/ip")
    done = nas.checkin(check=False)
    nas.host.run("rm", "/usr/local/sbin/ip")
    assert done.returncode == 1
    assert "taken back" in done.stderr
    assert before in nas.host.run("ip", "addr", "show", "dev", "nm-demo").stdout
    nas.host.run("ip", "route", "del", "unreachable", "203.0.113.10", check=False)
    nas.checkin()
    assert before in nas.host.run("ip", "addr", "show", "dev", "nm-demo").stdout
    mesh.admin("node", "set", "demo", "nas", "address=10.20.30.78")
    nas.checkin()
    assert "10.20.30.78" in nas.host.run("ip", "addr", "show", "dev", "nm-demo").stdout


CUTTING_IP = """#!/bin/sh
# adding the new address cuts the way to the server off; taking the old one back mends it
case "$*" in
*"addr add 10.20.30.77"*) /usr/sbin/ip route add unreachable 203.0.113.10 ;;
esac
exec /usr/sbin/ip "$@"
"""


def fake(host: Host, answer: str) -> None:
    """A server on port 8081 that is not ours: says `answer`, an HTTP message, to whoever asks, or hangs."""
    host.write("/root/fake.py", FAKE)
    host.write("/root/answer", answer)


FAKE = """
import socket, sys, time
answer = open("/root/answer", "rb").read()
listener = socket.create_server(("0.0.0.0", 8081))
while True:
    asked, _ = listener.accept()
    asked.settimeout(5)
    asked.recv(65536)
    if answer == b"hang":
        time.sleep(60)
    asked.sendall(answer)
    asked.close()
"""

HTML = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body>Welcome to the hotel</body></html>"
ANSWERS = {
    "garbage": "\x00\x01\x02garbage",
    "nothing": "",
    "html": HTML,
    "redirect": "HTTP/1.1 302 Found\r\nLocation: http://portal.example/\r\n\r\n",
    "empty list": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    "no content": "HTTP/1.1 204 No Content\r\n\r\n",
    "wrong mac": "HTTP/1.1 200 OK\r\nNM-Lite: 1 200 203.0.113.21 1795209600 15 " + "A" * 43 + "\r\nContent-Length: 2\r\n\r\n{}",
    "gone": 'HTTP/1.1 410 Gone\r\nContent-Length: 19\r\n\r\n{"state":"removed"}',
    "cut off": "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{",
    "hang": "hang",
}


def test_no_answer_but_the_servers_changes_anything(sites: Sites) -> None:
    mesh, left = sites.mesh, sites.left
    mesh.kill()
    before = left.snapshot()
    for name, answer in ANSWERS.items():
        fake(mesh.host, answer)
        process = mesh.host.start(mesh.lab.python, "/root/fake.py")
        wait_for(lambda: ":8081" in mesh.host.run("ss", "-ltn").stdout, 5, "the fake to listen")
        done = left.checkin(check=False)
        process.kill()
        process.wait()
        assert done.returncode == 1, name
        assert done.stderr.count("\n") == 1 and "demo" in done.stderr, (name, done.stderr)
        assert "Traceback" not in done.stderr
        assert left.snapshot() == before, name
    mesh.host.run("rm", "-r", "/var/lib/netmaker-lite")
    mesh.serve()
    done = left.checkin(check=False)
    assert done.returncode == 1
    assert "another key" in done.stderr
    assert left.snapshot() == before


def test_a_nat_that_moves_ports_is_punched_by_what_others_see(mesh: Mesh) -> None:
    """The server can only guess the port; the public node sees the real one, and its report reaches the others."""
    lab = mesh.lab
    moving = lab.router("moving", "203.0.113.21")
    rule = "oifname wan udp sport 51821 snat to 203.0.113.21:40007"
    moving.run("nft", "insert", "rule", "ip", "home", "postrouting", *rule.split())
    hub = mesh.join(mesh.host)
    left = mesh.join(lab.site("left", moving))
    right = mesh.join(lab.site("right", lab.router("home2", "203.0.113.22", lan="192.168.100.0/24")))
    mesh.settle([hub, left, right])
    whole([hub, left, right])
    peer = next(peer for peer in right.status["peers"] if peer["name"] == "left")
    assert peer["endpoint"] == "203.0.113.21:40007"


def test_a_settled_checkin_writes_nothing_to_disk_and_changes_nothing(sites: Sites) -> None:
    """A hundred unchanged check-ins: no file below /etc is touched, no `wg` or `ip` is started, the server writes no revision."""
    host = sites.left.host
    calm(sites.left)
    word = sites.left.status["revision"]
    for tool in ("wg", "ip"):
        host.write(
            f"/usr/local/sbin/{tool}",
            f'#!/bin/sh\necho "$*" >>/root/calls\nexec /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin {tool} "$@"\n',
        )
        host.run("chmod", "755", f"/usr/local/sbin/{tool}")
    host.run("touch", "/root/before")
    done = host.run("sh", "-c", "for i in $(seq 100); do /etc/netclient/netclient checkin -n all || exit; done")
    assert done.stdout + done.stderr == ""
    assert host.run("find", "/etc", "/var/lib", "-newer", "/root/before", "-type", "f").stdout == ""
    assert host.run("cat", "/root/calls", check=False).stdout == ""
    assert sites.left.status["revision"] == word


def calm(member: Member) -> None:
    """Let the time pass in which a node looks at its machine at every check-in: the agent's memory is on its tmpfs."""
    path = "/var/run/netclient/demo.memory"
    memory = json.loads(member.host.read(path))
    member.host.write(path, json.dumps({**memory, "unsettled": 0, "named": 0}))
    member.checkin()
