# SPDX-License-Identifier: Apache-2.0
"""WireGuard of the kernel: a machine in QEMU joins the server outside with BusyBox and Python alone; its tunnel works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lab import Lab, unfit, wait_for
from mesh import Mesh
from vmkit import make_ram_disk, start_vm, unfit_for_vm

UNFIT = unfit("wg") or unfit_for_vm()
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(480)]

SCRIPT = """
agent() { python3 -I -S /root/netclient_lite.py "$@"; }
agent join -t %s --name vm --daemon off || exit 1
echo "== kernel $(ls /sys/module/wireguard >/dev/null && echo yes) $(cat /sys/class/net/nm-demo/mtu)"
for second in 1 2 3 4 5 6 7 8 9 10; do
	agent checkin -n all
	ping -c 1 -W 1 %s >/dev/null && break
	sleep 1
done
ping -c 3 %s | grep packets
/etc/netclient/netclient checkin -n all
for turn in 1 2 3; do
	wg show nm-demo dump | cut -f 1,2,3,4 >/tmp/before
	/etc/netclient/netclient checkin -n all
	wg show nm-demo dump | cut -f 1,2,3,4 | cmp - /tmp/before && echo "== same"
done
busybox time -f "== memory %%M" python3 -I -S /root/netclient_lite.py checkin -n all --force
echo "== ready"
until ip route | grep -q 10.99.0.0/24; do sleep 1; /etc/netclient/netclient checkin -n all; done
echo "== changed"
agent leave -n all
ip link show nm-demo >/dev/null 2>&1 || echo "== gone"
"""


def test_a_machine_with_wireguard_in_its_kernel(lab: Lab, tmp_path: Path) -> None:
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21", lan="192.168.1.0/24")
    hub = mesh.join(mesh.host)
    script = SCRIPT % (mesh.token(), hub.address, hub.address)
    disk = make_ram_disk(tmp_path, {"script": script}, "192.168.1.50/24", "192.168.1.1")
    machine = start_vm(home, disk)

    def said(pattern: str) -> str:
        found = re.search(pattern, home.log())
        if not found and machine.poll() is not None:
            pytest.fail(home.log()[-4000:])
        return found.group(0) if found else ""

    assert wait_for(lambda: said("== kernel .*"), 150, "the machine to join").split() == ["==", "kernel", "yes", "1280"]
    wait_for(lambda: hub.checkin() and said("== ready"), 150, "the tunnel")
    assert "3 packets received" in said(".*packets transmitted.*")
    assert home.log().count("== same") == 3
    # Debian's BusyBox shows four times the KiB that the kernel tells
    assert int(said("== memory [0-9]+").split()[-1]) // 4 <= 32 * 1024
    assert not hub.host.ping("10.20.30.2").lost
    mesh.host.run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    mesh.host.run("sh", "-c", "ip addr add 10.99.0.1/24 dev lan0; ip link set lan0 up; ip link set lan1 up")
    mesh.admin("node", "egress", "demo", hub.name, "10.99.0.0/24")
    wait_for(lambda: hub.checkin() and said("== gone"), 120, "the route to come, and the machine to leave")
    assert "== changed" in home.log()
