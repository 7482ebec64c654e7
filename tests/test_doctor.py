# SPDX-License-Identifier: Apache-2.0
"""`netclient-lite doctor`: silent on a healthy node, and a sentence with its cure for each thing that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lab import Host, Lab, unfit
from mesh import Mesh

from netclient_lite import INSTALLERS, Run, install_hint

UNFIT = unfit("wg")


def test_each_installer_names_its_own_packages() -> None:
    class Only(Run):
        def __init__(self, program: str) -> None:
            self.program = program

        def has(self, program: str) -> bool:
            return program == self.program

    assert install_hint(Only("opkg"), "ip") == "opkg install ip-full"
    assert install_hint(Only("apt-get"), "wg") == "apt-get install wireguard-tools"
    assert install_hint(Only("pacman"), "ip") == "pacman -S iproute2"
    assert install_hint(Only(""), "ping") == "install iputils-ping"
    assert all(install_hint(Only(name), "wg").endswith("wireguard-tools") for name in INSTALLERS)


def found(host: Host) -> list[dict[str, Any]]:
    """What it has to say, without what is in order."""
    done = host.agent("doctor", "--json", check=False)
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == any(each["level"] == "bad" for each in listed), done.stderr
    return [each for each in listed if each["level"] != "ok"]


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(280)
def test_ten_things_that_are_wrong(lab: Lab) -> None:
    mesh = Mesh(lab)
    one, two = (mesh.join(lab.public(name, ip)) for name, ip in (("one", "203.0.113.30"), ("two", "203.0.113.31")))
    host = one.host
    mesh.settle([one, two])

    def complaint(check: str, *words: str) -> None:
        """There is one of this kind, with a cure, that says these words."""
        listed = found(host)
        texts = [each["what"] + " | " + each["cure"] for each in listed if each["check"] == check]
        assert any(all(word in text for word in words) for text in texts), listed
        assert all(each["cure"] for each in listed), listed

    before = one.snapshot()
    files = host.run("sh", "-c", "find /etc/netclient -type f | xargs md5sum").stdout
    assert found(host) == []
    assert "nothing is wrong" in host.agent("doctor").stdout

    def shell(command: str) -> None:
        host.run("sh", "-c", command)

    shell("chmod 644 /etc/netclient/config/wgkey-demo")
    complaint("files", "wgkey-demo can be read by others", "chmod 600")
    shell("chmod 600 /etc/netclient/config/wgkey-demo")

    shell("touch -d '+2 hours' /etc/netclient/config/peers-demo")
    complaint("clock", "s behind the agent's own files")
    shell("touch /etc/netclient/config/peers-demo")

    shell("ip link add odd type veth peer name odder; ip addr add 10.20.30.200/28 dev odd; ip link set odd up")
    complaint("addresses", "10.20.30.200/28 on odd overlaps")
    shell("ip link del odd")

    shell("echo 1 >/proc/sys/net/ipv4/conf/nm-demo/rp_filter; echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter")
    complaint("rp_filter", "strict", "sysctl -w")
    shell("echo 0 >/proc/sys/net/ipv4/conf/nm-demo/rp_filter; echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter")

    shell(
        "nft add table inet f; nft add chain inet f input '{ type filter hook input priority 0; policy drop; }'; "
        "nft add rule inet f input ct state established,related accept; nft add rule inet f input iif lo accept"
    )
    complaint("firewall", "no rule for UDP port 51821", "udp dport 51821")
    shell("nft delete table inet f")

    shell(
        "nft add table inet g; nft add chain inet g out '{ type filter hook output priority 0; }'; "
        "nft add rule inet g out udp dport 51821-51830 meta length \\> 1200 drop"
    )
    complaint("mtu", "are lost, of", "--mtu")
    shell("nft delete table inet g")

    shell(
        "ip link add wg7 type veth peer name wg8; ip link set wg7 up; ip link set wg8 up; ip addr add 192.0.2.1/24 dev wg7; "
        "ip route add 203.0.113.31/32 dev wg7"
    )
    complaint("routes", "203.0.113.31 go into wg7: another VPN")
    shell("ip link del wg7")

    shell("ip link set nm-demo down")
    complaint("interface", "nm-demo is down", "--force")
    one.checkin("--force")

    secret = host.read("/etc/netclient/config/secret-demo")
    words = secret.split()[:-1]
    host.write("/etc/netclient/config/secret-demo", " ".join([*words, words[-1]]) + "\n")
    complaint("server", "has another key", "ask its administrator")
    host.write("/etc/netclient/config/secret-demo", secret)

    mesh.kill()
    complaint("server", "refuses the connection")
    shell("mv $(command -v ping) /tmp/ping; mkdir /tmp/none")
    complaint("tools", "ping is not installed", "install")
    shell("mv /tmp/ping /usr/bin/ping")
    assert one.snapshot() == before
    assert host.run("sh", "-c", "find /etc/netclient -type f | xargs md5sum").stdout == files


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
def test_a_machine_that_has_joined_nothing(lab: Lab) -> None:
    host = lab.public("nas", "203.0.113.30")
    assert [each["check"] for each in found(host)] == ["networks"]
    assert "netclient-lite join -t TOKEN" in host.agent("doctor").stdout
