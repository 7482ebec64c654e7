# SPDX-License-Identifier: Apache-2.0
"""The story by which this product is measured: Ubuntu, a Mac, an OpenWrt router and a phone, each in a LAN of its own, become one
mesh; then the LAN behind the router is opened to all. (A Linux host stands for the Mac, one with nothing but `wg` for the phone.)
"""

from __future__ import annotations

import json

import pytest
from lab import Host, Lab, adjacency, unfit, wait_for
from mesh import SERVER_IP, Member, Mesh
from openwrtkit import make_openwrt

UNFIT = unfit("wg", "wg-quick", "zbarimg", "curl", "busybox")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(300)]
MASTER = "a-master-key-for-one-test-alone"
DATA = "/var/lib/netmaker-lite"


def sign_up(mesh: Mesh, host: Host) -> Member:
    """As the article types it: without a key, and then an administrator approves."""
    flags = ("--dnson", "no", "--name", host.name, "--network", "demo", "--daemon", "off")
    host.agent("join", *flags, "--apiserver", f"{SERVER_IP}:8081", "--grpcserver", f"{SERVER_IP}:50051", "--accept-key")
    mesh.admin("node", "approve", "demo", host.name)
    return Member(mesh, host, "demo")


def test_four_lans_and_a_phone(lab: Lab) -> None:
    mesh = Mesh(
        lab, "demo", "--manual-signup", "yes", range4="10.8.0.0/16", serving={"SERVER_HOST": SERVER_IP, "MASTER_KEY": MASTER}
    )
    mesh.host.agent("checkin", "--server-data", DATA)  # the server's host is a node by itself
    hub = Member(mesh, mesh.host, "demo")
    assert hub.status["node"] == "netmaker"
    ubuntu = lab.site("ubuntu", lab.router("home1", "203.0.113.21"))
    mac = lab.site("mac", lab.router("home2", "203.0.113.22", lan="192.168.2.0/24"))
    openwrt = lab.router("openwrt", "203.0.113.23", lan="192.168.100.0/24")
    printer = lab.site("printer", openwrt)  # knows nothing of WireGuard
    make_openwrt(openwrt)
    phone = lab.site("phone", lab.router("cell", "203.0.113.24", lan="192.168.4.0/24"))
    routes = openwrt.run("ip", "route").stdout
    members = [hub, *(sign_up(mesh, host) for host in (ubuntu, mac, openwrt))]
    mesh.settle(members, timeout=60)
    addresses = {member.host: member.address for member in members}
    assert not [pair for pair, loss in adjacency(addresses).items() if loss.lost and pair[1] != "openwrt"]  # its firewall is shut

    mesh.admin("node", "ingress", "demo", "netmaker")
    with members[1].host.pinging(members[2].address, 0.05) as ping:
        mesh.admin("node", "egress", "demo", "openwrt", "192.168.100.0/24")
        mesh.admin("client", "add", "demo", "netmaker", "--name", "android")
        for member in reversed(members):
            member.checkin()
        url = "http://127.0.0.1:8081/api/extclients/demo/android/qr"
        mesh.host.run("curl", "-fsS", "-H", f"Authorization: Bearer {MASTER}", "-o", "/tmp/android.png", url)
        phone.write("/etc/wireguard/demo.conf", mesh.host.run("zbarimg", "-q", "--raw", "/tmp/android.png").stdout)
        phone.run("wg-quick", "up", "demo", env={"WG_QUICK_USERSPACE_IMPLEMENTATION": "wireguard-go"})
        assert not [pair for pair, loss in adjacency(addresses).items() if loss.lost]
        for member in members[:3]:
            assert "192.168.100.0/24 dev nm-demo" in member.host.run("ip", "route").stdout  # by itself
        for host in (phone, *(member.host for member in members[:3])):
            wait_for(lambda host=host: not host.ping(printer.ip, count=2).lost, 20, f"{host.name} to reach the printer")
        (client,) = json.loads(mesh.admin("client", "list", "demo", "--json"))
        for member in members:
            wait_for(
                lambda member=member: not member.host.ping(client["address"], count=2).lost,
                20,
                f"{member.name} to reach the phone",
            )
        assert ping.stop().lost == 0

    mesh.admin("node", "egress", "demo", "openwrt", "off")
    for member in members:
        member.checkin()
    assert "192.168.100.0" not in "".join(member.host.run("ip", "route").stdout for member in members[:3])
    mesh.kill()
    for member in members:
        member.leave()
    assert openwrt.run("ip", "route").stdout == routes
    assert "netclient" not in openwrt.run("nft", "list", "ruleset").stdout
