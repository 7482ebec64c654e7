# SPDX-License-Identifier: Apache-2.0
"""A phone: a machine with nothing but WireGuard, set up from the picture or the file that the server gives."""

from __future__ import annotations

import json
import re

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import SERVER_IP, Member, Mesh

UNFIT = unfit("wg", "zbarimg", "wg-quick", "curl")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(240)]
MASTER = "a-master-key-for-one-test-alone"


def fetch(mesh: Mesh, path: str, to: str) -> None:
    """A file of the API, as an administrator's browser loads it."""
    url = f"http://127.0.0.1:8081/api/extclients/demo/{path}"
    mesh.host.run("curl", "-fsS", "-H", f"Authorization: Bearer {MASTER}", "-o", to, url)


def scanned(host: Host, picture: str) -> str:
    return host.run("zbarimg", "-q", "--raw", picture).stdout.strip()


def switched_on(phone: Host, config: str) -> None:
    phone.run("wg-quick", "down", "phone", check=False)
    phone.write("/etc/wireguard/phone.conf", config + "\n")
    phone.run("wg-quick", "up", "phone", env={"WG_QUICK_USERSPACE_IMPLEMENTATION": "wireguard-go"})


def reaches(host: Host, address: str) -> None:
    wait_for(lambda: not host.ping(address, count=2).lost, 20, f"{host.name} to reach {address}")


def follow(members: list[Member]) -> None:
    for member in members:
        member.checkin()


def listed(mesh: Mesh) -> dict[str, object]:
    (client,) = json.loads(mesh.admin("client", "list", "demo", "--json"))
    return dict(client)


def test_a_phone_joins_by_picture_and_is_let_out_and_in_again(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--range6", "fd44::/64", serving={"SERVER_HOST": SERVER_IP, "MASTER_KEY": MASTER})
    home, far = lab.router("home", "203.0.113.21"), lab.router("far", "203.0.113.22", lan="192.168.9.0/24")
    web = lab.public("web", "203.0.113.99")
    gateway, nas = mesh.join(lab.public("vps", "203.0.113.30")), mesh.join(lab.site("nas", home))
    members = [gateway, nas]
    mesh.settle(members)
    phone = lab.site("phone", far)
    mesh.admin("node", "ingress", "demo", "vps")
    made = json.loads(mesh.admin("client", "add", "demo", "vps", "--name", "phone", "--json"))
    fetch(mesh, "phone/qr", "/tmp/phone.png")
    fetch(mesh, "phone/file", "/tmp/phone.conf")
    config = scanned(mesh.host, "/tmp/phone.png")
    assert config == mesh.host.read("/tmp/phone.conf").strip()
    assert {"PrivateKey", "Address", "MTU", "PresharedKey", "Endpoint", "PersistentKeepalive"} <= set(
        re.findall(r"(\w+) = ", config)
    )
    follow(members)
    switched_on(phone, config)
    addresses = [text.split("/")[0] for text in re.findall(r"Address = (.*)", config)[0].split(", ")]
    with gateway.host.pinging(nas.address) as ping:
        for address in (gateway.address, nas.address, nas.address6):
            reaches(phone, address)
        for address in addresses:
            reaches(nas.host, address)
        (shown,) = gateway.status["clients"]
        assert shown["address"] == addresses[0] and shown["handshake_age"] is not None
        assert phone.ping(web.ip).lost == 0  # past the tunnel, by its own way
        mesh.admin("client", "disable", "demo", "phone")
        follow(members)
        assert phone.ping(nas.address, count=2).received == 0 and gateway.status["clients"] == []
        mesh.admin("client", "enable", "demo", "phone")
        follow(members)
        reaches(phone, nas.address)
        switched_on(phone, re.sub(r"PresharedKey = .*", "PresharedKey = " + "A" * 43 + "=", config))
        assert phone.ping(nas.address, count=2).received == 0
        gateway.host.run("ip", "addr", "add", "203.0.113.31/24", "dev", "eth0")
        mesh.admin("node", "set", "demo", "vps", "endpoint=203.0.113.31", "isstatic=yes")
        follow(members)
        assert listed(mesh)["outdated"] == "yes"
        renewed = json.loads(mesh.admin("client", "renew", "demo", "phone", "--json"))
        assert listed(mesh)["outdated"] == "no" and renewed["privatekey"] != made["privatekey"]
        follow(members)
        switched_on(phone, renewed["config"])
        reaches(phone, nas.address)
        assert ping.stop().lost == 0
    mesh.admin("client", "remove", "demo", "phone")
    follow(members)
    assert phone.ping(nas.address, count=2).received == 0
    # with a key of its own, and the whole internet through the gateway
    public = phone.run("sh", "-c", "wg genkey | tee /root/own | wg pubkey").stdout.strip()
    own = json.loads(
        mesh.admin("client", "add", "demo", "vps", "--name", "laptop", "--public-key", public, "--internet", "--json")
    )
    assert not own.get("privatekey") and "AllowedIPs = 0.0.0.0/0, ::/0" in own["config"]
    follow(members)
    switched_on(phone, re.sub(r"PrivateKey = .*", "PrivateKey = " + phone.read("/root/own").strip(), own["config"]))
    reaches(phone, nas.address)
    reaches(phone, web.ip)
    assert "masquerade" in gateway.host.run("nft", "list", "table", "inet", "netclient").stdout
