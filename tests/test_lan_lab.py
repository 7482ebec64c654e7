# SPDX-License-Identifier: Apache-2.0
"""LANs that are not what they look like: answers that somebody repeats, guests kept apart, equal ranges, two ways out."""

from __future__ import annotations

import json

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import Cron, Member, Mesh

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(300)]

# A stranger in the LAN: keeps what it hears of our service until it is told to (a file), then answers every question with it,
# and sends it unasked ten times a second.
PARROT = r"""
import os, select, socket, sys, time
own, folder = sys.argv[1:]
group = socket.inet_aton("224.0.0.251") + socket.inet_aton(own)
hears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
hears.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
hears.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
hears.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
hears.bind(("224.0.0.251", 5353))
asks = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asks.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
asks.bind((own, 0))
question = bytes((0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)) + b"\x0f_netclient-lite\x04_udp\x05local\0" + bytes((0, 12, 0, 1))
asks.sendto(question, ("224.0.0.251", 5353))
kept = set()
while True:
    speak = os.path.exists(folder + "/speak")
    for sock in select.select([hears, asks], [], [], 0.1)[0]:
        data, sender = sock.recvfrom(9000)
        if b"_netclient-lite" not in data:
            continue
        if data[2] & 0x80 and not speak:
            kept.add(data)
            open(folder + "/kept", "w").write(str(len(kept)))
        elif speak and not data[2] & 0x80:
            for each in kept:
                hears.sendto(data[:2] + each[2:], sender)
    for each in kept if speak else ():
        hears.sendto(each, ("224.0.0.251", 5353))
"""


def endpoint(one: Member, other: Member) -> str:
    return str(one.peer(other)["endpoint"])


def renumber(host: Host, address: str, gateway: str) -> None:
    commands = ("ip addr flush dev eth0", f"ip addr add {address}/24 dev eth0", f"ip route add default via {gateway}")
    host.run("sh", "-c", "; ".join(commands))


def test_who_repeats_an_old_answer_moves_no_session_that_lives(lab: Lab) -> None:
    """A record that was genuine once, played again while both nodes look for each other: not one packet is lost."""
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21", lan="192.168.7.0/24")
    one, two = [mesh.join(lab.site(name, home)) for name in ("one", "two")]
    stranger = lab.site("stranger", home)
    mesh.settle([one, two])
    two.daemon()
    stranger.start(lab.python, "-c", PARROT, stranger.ip, "/tmp")
    wait_for(
        lambda: stranger.run("test", "-e", "/tmp/kept", check=False).returncode == 0, 15, "the stranger to hear a genuine answer"
    )
    renumber(two.host, "192.168.7.150", "192.168.7.1")
    wait_for(
        lambda: one.checkin() and endpoint(one, two).startswith("192.168.7.150:"), 30, "the daemon's new address to be found"
    )
    stranger.run("touch", "/tmp/speak")
    with one.host.pinging(two.address, interval=0.02) as pinging:
        for number in range(3):  # a machine that has moved asks for all its neighbours
            one.host.run("ip", "addr", "add", f"192.168.7.{200 + number}/24", "dev", "eth0")
            one.checkin()
            one.checkin()
            assert endpoint(one, two).startswith("192.168.7.150:")
        loss = pinging.stop()
    assert loss.lost == 0, loss
    assert one.path(two) == "local"


# Another make of responder and browser: publishes a record whose text was made beforehand, or says what it hears of a service.
ZEROCONF = r"""
import json, socket, sys, time
from zeroconf import ServiceInfo, Zeroconf
own, strings = sys.argv[1], json.loads(sys.argv[2])
kind, name = "_netclient-lite._udp.local.", sys.argv[3] + "._netclient-lite._udp.local."
zero = Zeroconf([own])
if strings:
    properties = dict(text.partition("=")[::2] for text in strings)
    addresses = [socket.inet_aton(own)]
    zero.register_service(ServiceInfo(kind, name, port=51821, addresses=addresses, properties=properties, server="else.local."))
    print("published", flush=True)
    time.sleep(60)
info = zero.get_service_info(kind, name, 3000)
print(json.dumps([info.port, {key.decode(): value.decode() for key, value in info.properties.items()}]) if info else "null")
zero.close()
"""


def test_other_responders_and_browsers_understand(lab: Lab) -> None:
    """What a daemon tells is read by the zeroconf package; what that publishes for a node, as umdns or avahi would, is found."""
    mesh = Mesh(lab, "demo", "--local-only")
    home = lab.router("home", "203.0.113.21", lan="192.168.7.0/24")
    one, two = [mesh.join(lab.site(name, home)) for name in ("one", "two")]
    browser = lab.site("browser", home)
    mesh.settle([one, two])
    two.daemon()
    node = two.host.read("/etc/netclient/config/secret-demo").split()[1]
    heard = wait_for(
        lambda: json.loads(browser.run(lab.python, "-c", ZEROCONF, browser.ip, "[]", node).stdout),
        20,
        "the daemon to be heard",
    )
    assert heard[0] == 51822 and heard[1]["e"] == "192.168.7.11:51822"
    mesh.kill()
    two.host.reboot()  # with the daemon; it comes back elsewhere, and another program speaks for it
    renumber(two.host, "192.168.7.150", "192.168.7.1")
    two.checkin(check=False)
    port, *texts = two.host.agent("mdns").stdout.split()
    assert port == "51822" and "e=192.168.7.150:51822" in texts
    two.host.start(lab.python, "-c", ZEROCONF, "192.168.7.150", json.dumps(texts), node)
    wait_for(
        lambda: one.checkin(check=False) is not None and not one.host.ping(two.address, count=1).lost,
        30,
        "what it publishes to be found",
    )


def test_a_daemon_that_moves_is_found_in_seconds(lab: Lab) -> None:
    """Of a local-only network, with the server gone: the daemon tells its new address at once, check-ins find it by asking."""
    mesh = Mesh(lab, "demo", "--local-only")
    home = lab.router("home", "203.0.113.21", lan="192.168.7.0/24")
    one, two, three = [mesh.join(lab.site(name, home)) for name in ("one", "two", "three")]
    mesh.settle([one, two, three])
    two.daemon()
    three.daemon()
    mesh.kill()
    renumber(two.host, "192.168.7.150", "192.168.7.1")
    wait_for(lambda: not three.host.ping(two.address, count=1).lost, 10, "one daemon to hear the other")
    wait_for(
        lambda: one.checkin(check=False) is not None and not one.host.ping(two.address, count=1).lost, 10, "a check-in to find it"
    )


def test_guests_that_are_kept_apart_talk_by_the_public_way(lab: Lab) -> None:
    """Same LAN, same gateway, but nothing gets from one to the other there: the local address is tried, and given up."""
    mesh = Mesh(lab, "demo")
    hotel = lab.router("hotel", "203.0.113.21", lan="192.168.7.0/24")
    hub = mesh.join(mesh.host)
    mesh.admin("node", "relay", "demo", hub.name)
    guests = [lab.site(name, hotel) for name in ("one", "two")]
    hotel.lan.isolate()
    one, two = [mesh.join(guest) for guest in guests]
    with Cron([hub, one, two], interval=5):
        wait_for(lambda: not one.host.ping(two.address, count=1).lost, 120, "guests to reach each other")
        with hub.host.pinging(one.address, interval=0.05) as pinging:
            assert one.path(two) == "relayed"
            assert one.host.ping(two.address, count=10).lost == 0
            assert pinging.stop().lost == 0


def test_lans_that_look_alike_are_told_apart(lab: Lab) -> None:
    """Two homes with one private range, behind one address of a carrier's."""
    mesh = Mesh(lab)
    carrier = lab.router("carrier", "203.0.113.21", lan="100.64.0.0/24")
    left, right = (lab.router(name, ip, behind=carrier) for name, ip in (("left", "100.64.0.2"), ("right", "100.64.0.3")))
    hub = mesh.join(mesh.host)
    one, two = (mesh.join(lab.site(name, left)) for name in ("one", "two"))
    three = mesh.join(lab.site("three", right))
    assert one.host.ip == three.host.ip
    for member in [hub, one, two, three] * 3:
        member.checkin()
    assert one.path(two) == two.path(one) == "local"
    for member in (one, two):
        assert member.path(three) != "local"
        assert not endpoint(member, three).startswith("192.168.1."), "an address of its own LAN, for a node in another"
        assert not hub.host.ping(member.address, count=2).lost
    assert not hub.host.ping(three.address, count=2).lost


def test_a_lan_with_two_ways_out(lab: Lab) -> None:
    """Two gateways in one LAN: nothing proves to nodes behind different ones that it is the same, so they use the public way."""
    mesh = Mesh(lab)
    office = lab.router("office", "203.0.113.31", lan="192.168.9.0/24")
    second = lab.router("second", "203.0.113.32", lan="192.168.99.0/24")
    office._ip(f"link add second type veth peer name office netns {second.pid}", "link set second master br-lan up")
    second._ip("link set office master br-lan up", "address add 192.168.9.2/24 dev br-lan")
    hosts = [lab.site(name, office) for name in ("one", "two", "three")]
    hosts[1].run("ip", "route", "replace", "default", "via", "192.168.9.2")
    hub, one, two, three = (mesh.join(host) for host in (mesh.host, *hosts))
    mesh.settle([hub, one, two, three])
    assert one.path(three) == "local"
    wait_for(lambda: [each.checkin() for each in (hub, one, two)] and one.path(two) == "direct", 30, "the two to meet outside")
    assert not one.host.ping(two.address, count=3).lost
