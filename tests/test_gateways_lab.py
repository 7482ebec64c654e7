# SPDX-License-Identifier: Apache-2.0
"""Gateways on real kernels: LANs whose hosts know nothing of WireGuard, behind firewalls that drop; all of it undone."""

from __future__ import annotations

import json
import re

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import Member, Mesh
from openwrtkit import make_openwrt

UNFIT = unfit("wg", "iptables", "ip6tables")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(240)]

SWITCHES = 'for f in /proc/sys/net/ipv[46]/conf/*/*; do case $f in */nm-*) ;; *) echo "$f $(cat "$f" 2>/dev/null)";; esac; done'


def tables(host: Host, *more: str) -> str:
    """Firewall and switches of a machine, without what counts by itself."""
    texts = [host.run(*command).stdout for command in (("nft", "list", "ruleset"), ("iptables-save",), ("ip6tables-save",))]
    texts += [host.run("sh", "-c", SWITCHES + " | grep -E '/(forwarding|send_redirects|accept_ra|rp_filter) '").stdout]
    texts += [host.run("ip", *family, "route").stdout for family in ((), ("-6",))] if "routes" in more else []
    text = "\n".join(texts)
    return re.sub(r"(?m)^#.*$| expires \d+sec|counter packets \d+ bytes \d+|\[\d+:\d+\]", "", text)


def shut(home: Host) -> None:
    """Its own firewall takes nothing from outside but answers."""
    home.run("nft", "add chain ip home input { policy drop; }")
    home.run("nft", "add rule ip home input ct state established,related accept")
    home.run("nft", "add rule ip home input iifname != wan accept")


def reached(host: Host, *addresses: str) -> None:
    lost = {address: loss for address in addresses for loss in [host.ping(address, 2)] if loss.lost}
    assert not lost, f"{host.name}: {lost}"


ADVERTISE = """
import socket
sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
router_advertisement = bytes([134, 0, 0, 0, 64, 0, 7, 8]) + bytes(8)  # a default router for 1,800 s
sock.sendto(router_advertisement, ("ff02::1", 0, 0, socket.if_nametoindex("br-inet")))
"""


def advertised(internet: Host, home: Host) -> bool:
    internet.run(internet.lab.python, "-c", ADVERTISE, check=False)  # not before its own address has settled
    return "default via fe80::" in home.run("ip", "-6", "route").stdout


def everywhere(members: list[Member]) -> None:
    for member in members:
        member.checkin()


def test_two_opened_lans_behind_routers_that_drop(lab: Lab) -> None:
    """Without NAT, host to host; IPv6 beside; nothing lost by others; a flushed firewall is repaired; all undone."""
    mesh = Mesh(lab)
    homes = [lab.router("home1", "203.0.113.21"), lab.router("home2", "203.0.113.22", lan="192.168.100.0/24")]
    tvs = [lab.site("tv1", homes[0]), lab.site("tv2", homes[1])]
    for number, (home, tv) in enumerate(zip(homes, tvs)):
        home.write("/proc/sys/net/ipv6/conf/all/forwarding", "0")  # its own network has IPv4 only
        home.run("ip", "-6", "addr", "add", f"fd07:{number}::1/64", "dev", "br-lan", "nodad")
        tv.run("ip", "-6", "addr", "add", f"fd07:{number}::10/64", "dev", "eth0", "nodad")
        tv.run("ip", "-6", "route", "add", "default", "via", f"fd07:{number}::1")
        shut(home)
    wait_for(lambda: advertised(lab.internet, homes[0]), 10, "a route from a router advertisement")
    blank = [tables(home, "routes") for home in homes]
    hub, near, far = mesh.join(mesh.host), mesh.join(homes[0]), mesh.join(homes[1])
    members = [hub, near, far]
    mesh.settle(members)
    before = [tables(home) for home in homes]
    with hub.host.pinging(far.address, 0.02) as pinging:
        mesh.admin("node", "egress", "demo", "home1", "192.168.1.0/24", "fd07:0::/64", "--no-nat")
        mesh.admin("node", "egress", "demo", "home2", "192.168.100.0/24", "fd07:1::/64", "--interface", "br-lan", "--no-nat")
        everywhere(members)
        everywhere(members)
        assert pinging.stop().lost == 0
    ips = [tv.ip for tv in tvs]
    reached(hub.host, *ips)
    reached(tvs[0], tvs[1].ip, hub.address, far.address, "fd07:1::10")
    reached(tvs[1], tvs[0].ip, hub.address, near.address, "fd07:0::10")
    assert homes[0].read("/proc/sys/net/ipv6/conf/wan/accept_ra") == "2\n"
    assert "default via fe80::" in homes[0].run("ip", "-6", "route").stdout
    assert "192.168.100.0/24 dev nm-demo" in hub.host.run("ip", "route").stdout
    opened = [tables(home) for home in homes]
    everywhere(members)
    assert [tables(home) for home in homes] == opened

    homes[0]._boot()  # its own firewall anew
    shut(homes[0])
    homes[0].run("nft", "flush", "table", "inet", "netclient")
    homes[0].run("conntrack", "-F")
    assert tvs[1].ping(tvs[0].ip, 1).lost
    near.checkin("--force")
    reached(tvs[1], tvs[0].ip)

    with hub.host.pinging(near.address, 0.02) as pinging:
        mesh.admin("node", "egress", "demo", "home2", "off")
        everywhere(members)
        assert pinging.stop().lost == 0
    assert tables(homes[1]) == before[1]
    assert "192.168.100.0/24" not in hub.host.run("ip", "route").stdout
    mesh.kill()
    near.leave()
    far.leave()
    assert tables(homes[1], "routes") == blank[1]
    assert tables(homes[0], "routes") == blank[0]


def test_a_nas_with_docker_opens_its_lan(lab: Lab) -> None:
    """iptables -P FORWARD DROP, forwarding off, NAT, two networks on one machine."""
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21")
    nas, tv = lab.site("nas", home), lab.site("tv", home)
    for tool in ("iptables", "ip6tables"):
        nas.run(tool, "-P", "FORWARD", "DROP")
        nas.run(tool, "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT")
        nas.run(tool, "-t", "nat", "-A", "POSTROUTING", "-o", "docker0", "-j", "MASQUERADE")
    blank = tables(nas, "routes")
    hub, member = mesh.join(mesh.host), mesh.join(nas)
    mesh.admin("network", "add", "second", "--range", "10.99.0.0/24")
    other = mesh.join(nas, network="second")
    far = mesh.join(mesh.host, network="second")
    mesh.settle([hub, member])
    for network, ranges in (("demo", "192.168.1.0/24"), ("second", "192.168.1.12/32")):
        mesh.admin("node", "egress", network, "nas", ranges)
    before = tables(nas)
    shown = nas.agent("checkin", "-n", "demo", "--dry-run").stdout
    assert "nft -f - <<<" in shown and "echo 1 > /proc/sys/net/ipv4/conf/eth0/forwarding" in shown
    assert tables(nas) == before
    nas.agent("checkin", "-n", "demo")
    only = tables(nas)
    nas.agent("checkin", "-n", "second")
    hub.checkin()
    reached(hub.host, tv.ip)
    assert "-j netclient-F-demo" in nas.run("iptables-save").stdout
    kept = json.loads(nas.read("/var/run/netclient/switches"))
    assert kept["/proc/sys/net/ipv4/conf/eth0/forwarding"] == ["0", "demo", "second"]
    assert nas.read("/proc/sys/net/ipv4/ip_forward").strip() == "0"
    nas.run("iptables", "-D", "FORWARD", "-j", "netclient-F-demo")
    assert hub.host.ping(tv.ip, 1).lost
    member.checkin("--force")
    reached(hub.host, tv.ip)
    other.leave()
    assert tables(nas) == only
    reached(hub.host, tv.ip)
    mesh.kill()
    member.leave()
    assert tables(nas, "routes") == blank
    far.leave()


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_iptables_alone(lab: Lab, kind: str) -> None:
    """A machine without nft: the ranges alone are opened, for nothing else was forwarded before."""
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21")
    nas, tv = lab.site("nas", home), lab.site("tv", home)
    nas.run("ip", "addr", "add", "192.168.1.200/32", "dev", "eth0")
    for tool in ("iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"):
        nas.run("ln", "-sf", f"/usr/sbin/xtables-{kind}-multi", f"/usr/sbin/{tool}")
    nas.run("iptables", "-P", "FORWARD", "DROP")
    for table in ("filter", "nat"):
        nas.run("ip6tables", "-t", table, "-A", "OUTPUT", "-j", "ACCEPT")
        nas.run("iptables", "-t", table, "-A", "OUTPUT", "-j", "ACCEPT")
    nas.run("rm", "/usr/sbin/nft")

    def saved() -> str:
        text = "".join(nas.run(tool + "-save").stdout for tool in ("iptables", "ip6tables"))
        return re.sub(r"(?m)^#.*$|\[\d+:\d+\]", "", text)

    blank = saved()
    hub, member = mesh.join(mesh.host), mesh.join(nas)
    mesh.settle([hub, member])
    mesh.admin("node", "egress", "demo", "nas", f"{tv.ip}/32")
    everywhere([member, hub])
    reached(hub.host, tv.ip)
    opened = saved()
    assert "MASQUERADE" in opened and "-i nm-demo -m comment" in opened
    member.checkin("--force")
    assert saved() == opened
    nas.run("iptables", "-F", "netclient-F-demo")
    member.checkin("--force")
    assert saved() == opened
    mesh.admin("node", "egress", "demo", "nas", "off")
    everywhere([member])
    # the built-in chains of a table stay once it was used
    assert sorted(set(saved().split("\n")) - set(blank.split("\n"))) in ([], [":INPUT ACCEPT "], [":POSTROUTING ACCEPT "])


def test_an_openwrt_router_opens_its_lan(lab: Lab) -> None:
    """By UCI, written once; what the server takes away goes, and so does what a crash left behind."""
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21")
    tv = lab.site("tv", home)
    make_openwrt(home)
    blank, config = home.run("nft", "list", "ruleset").stdout, home.read("/etc/config/firewall")
    hub, member = mesh.join(mesh.host), mesh.join(home)
    mesh.settle([hub, member])
    assert home.read("/etc/config/firewall") == config
    mesh.admin("node", "egress", "demo", "home", "192.168.1.0/24")
    everywhere([member, hub])
    reached(hub.host, tv.ip)
    reached(tv, hub.address)
    for _ in range(2):
        member.checkin("--force")
    assert home.read("/tmp/commits") == "x" and home.read("/tmp/reloads") == "xx"
    home.run("fw4", "-q", "reload")
    reached(tv, hub.address)
    home.reboot()
    home.run("nft", "flush", "ruleset")
    home.run("fw4", "-q", "reload")
    mesh.admin("node", "egress", "demo", "home", "off")
    member.checkin()
    assert home.read("/etc/config/firewall") == config
    mesh.admin("node", "egress", "demo", "home", "192.168.1.0/24")
    member.checkin()
    assert home.read("/etc/config/firewall") != config
    mesh.kill()
    member.leave()
    assert home.read("/etc/config/firewall") == config and home.run("nft", "list", "ruleset").stdout == blank


# A machine whose own scripts take offence at a gateway's rules: while those are there, it lets nothing out to the server.
OFFENDED = """#!/bin/sh
/usr/sbin/nft "$@" || exit
[ "$1" = -f ] || exit 0
/usr/sbin/nft -f - <<END
table ip offended
delete table ip offended
$(/usr/sbin/nft list tables | grep -q 'netclient' && echo 'table ip offended {
	chain output { type filter hook output priority 0; ip daddr 203.0.113.10 drop; }
}')
END
"""


def test_a_role_that_cuts_the_server_off_is_taken_back(lab: Lab) -> None:
    """Within seconds, without losing a packet of the others' tunnels; not tried again; the administrator is told."""
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21", lan="192.168.1.0/24")
    gateway, other = mesh.join(home), mesh.join(lab.public("other", "203.0.113.30"))
    mesh.settle([gateway, other])
    home.write("/usr/local/sbin/nft", OFFENDED)
    home.run("chmod", "755", "/usr/local/sbin/nft")
    before = tables(home)
    with other.host.pinging(gateway.address, interval=0.05) as pinging:
        mesh.admin("node", "egress", "demo", "home", "192.168.1.0/24")
        assert "roles are taken back" in gateway.checkin(check=False).stderr
        assert tables(home) == before
        gateway.checkin()
        gateway.checkin()
        assert tables(home) == before, "what was taken back is tried again"
        loss = pinging.stop()
    assert not loss.lost, loss
    shown = json.loads(mesh.admin("node", "show", "demo", "home", "--json"))["rejected"]
    assert re.match(r"\d+\.[0-9a-f]{8} ", shown), shown

    home.run("rm", "/usr/local/sbin/nft")
    mesh.admin("node", "egress", "demo", "home", "192.168.1.0/24,192.168.2.0/24")  # another revision is another try
    gateway.checkin()
    assert "netclient" in tables(home)
    gateway.checkin()
    assert json.loads(mesh.admin("node", "show", "demo", "home", "--json"))["rejected"] == ""
