# SPDX-License-Identifier: Apache-2.0
"""Real resolvers on nodes, each from its Debian package: they ask the mesh's nameserver for its names, and nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import SERVER_IP, Mesh
from test_names_lab import ask

PARTS = Path(os.environ.get("NM_TEST_VENV") or sys.prefix).absolute() / "parts"
WANTED = ("systemd-resolved", "openresolv", "resolvconf")
MISSING = [part for part in WANTED if not (PARTS / part).is_dir()]
UNFIT = unfit("wg", "dnsmasq", "dbus-daemon") or (f"shell/test.sh unpacks {', '.join(MISSING)}" if MISSING else "")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(240)]

ISP = "203.0.113.53"
NAMESERVER = "10.20.30.1"
OURS, ISPS, WEB = "192.0.2.77", "192.0.2.66", "198.51.100.1"  # only.demo of the mesh's and of the ISP's, and web.example

RESTART = """#!/bin/sh
read -r pid </run/dnsmasq.pid && kill "$pid" && while kill -0 "$pid"; do sleep 0.1; done
exec dnsmasq -u root --no-hosts --conf-file=/run/dnsmasq.conf --resolv-file=/run/dnsmasq.resolv --pid-file=/run/dnsmasq.pid \
    --bind-interfaces --listen-address=127.0.0.1 --cache-size=0
"""
OPENRESOLV = """
name_servers=127.0.0.1
dnsmasq_conf=/run/dnsmasq.conf
dnsmasq_resolv=/run/dnsmasq.resolv
dnsmasq_restart="sh /restart 2>/dev/null"
"""


def unpack(host: Host, part: str) -> None:
    host.run("sh", "-ec", f"tar -C {PARTS / part} -cf - . | tar -C / -xf - --keep-directory-symlink")


def answers(host: Host, name: str) -> str:
    """What resolved says."""
    said = host.run("resolvectl", "query", "--cache=no", "--legend=no", name, check=False).stdout
    return said.split("--")[0].partition(":")[2].strip()


def test_resolvers_ask_the_mesh_for_its_own_names_alone(lab: Lab) -> None:
    mesh = Mesh(lab, serving={"SERVER_HOST": SERVER_IP, "COREDNS_ADDR": NAMESERVER})
    isp = lab.public("isp", ISP)
    serve = ("dnsmasq", "-k", "-u", "root", "--no-resolv", "--no-hosts", "--pid-file=")
    isp.start(*serve, f"--address=/only.demo/{ISPS}", f"--address=/web.example/{WEB}")
    mesh.host.start(*serve, f"--address=/only.demo/{OURS}")
    hub = mesh.join(mesh.host)
    assert hub.address == NAMESERVER

    modern, local = lab.public("modern", "203.0.113.61"), lab.public("local", "203.0.113.62")
    bare, debian = lab.public("bare", "203.0.113.63"), lab.public("debian", "203.0.113.64")
    for host in (modern, bare):
        host.write("/etc/resolv.conf", f"nameserver {ISP}\n")

    unpack(modern, "systemd-resolved")
    modern.run(
        "sh", "-ec", "echo systemd-resolve:x:993:993::/:/bin/false >>/etc/passwd; echo systemd-resolve:x:993: >>/etc/group"
    )
    modern.run("install", "-d", "/run/dbus")
    modern.run("install", "-d", "-o", "systemd-resolve", "-g", "systemd-resolve", "/run/systemd/resolve")
    modern.start("dbus-daemon", "--system", "--nofork", "--nopidfile")
    wait_for(lambda: modern.run("test", "-S", "/run/dbus/system_bus_socket", check=False).returncode == 0, 10, "dbus")
    modern.start("/lib/systemd/systemd-resolved")
    wait_for(lambda: answers(modern, "web.example") == WEB, 20, "resolved to ask the ISP")

    for host in (local, bare):
        unpack(host, "openresolv")
    local.write("/etc/resolvconf.conf", OPENRESOLV)
    local.write("/restart", RESTART)
    local.run("resolvconf", "-a", "eth0", input=f"nameserver {ISP}\nsearch lan\n")
    unpack(debian, "resolvconf")
    debian.run("mkdir", "-p", "/run/resolvconf/interface")
    debian.run("ln", "-sf", "/run/resolvconf/resolv.conf", "/etc")
    debian.run("resolvconf", "--enable-updates")
    debian.run("resolvconf", "-a", "eth0", input=f"nameserver {ISP}\n")
    hosts = (modern, local, bare, debian)
    before = [(host.read("/etc/hosts"), host.read("/etc/resolv.conf")) for host in hosts]
    assert all("nameserver" in resolv for _, resolv in before)

    members = [mesh.join(host) for host in hosts]
    assert [member.status["names"] for member in members] == ["resolved", "openresolv", "hosts", "hosts"]
    assert "; names: resolved\n" in modern.agent("status").stdout
    assert [host.read("/etc/resolv.conf") for host in (modern, bare, debian)] == [before[i][1] for i in (0, 2, 3)]
    assert local.read("/etc/resolv.conf").splitlines()[1:] == ["search lan demo", "nameserver 127.0.0.1"]
    mesh.settle([hub, *members[:2]])
    wait_for(lambda: answers(modern, "only.demo") == OURS, 20, "resolved to ask the mesh's nameserver")
    assert answers(modern, "web.example") == WEB
    wait_for(lambda: ask(local, "127.0.0.1", "only.demo") == OURS, 20, "dnsmasq to ask the mesh's nameserver")
    assert ask(local, "127.0.0.1", "web.example") == WEB
    for member in members[:2]:  # nothing differs: nothing is done
        assert "resolv" not in member.checkin("--force", "--dry-run").stdout

    modern.run("resolvectl", "revert", "nm-demo")  # somebody takes it away
    members[0].checkin("--force")
    assert answers(modern, "only.demo") == OURS
    mesh.kill()  # the nameserver is given up
    mesh.serving = {"SERVER_HOST": SERVER_IP}
    mesh.serve()
    for member in members[:2]:
        member.checkin("--force")
        assert member.status["names"] == "hosts"
    assert answers(modern, "only.demo") == ISPS == ask(local, "127.0.0.1", "only.demo")
    assert local.read("/etc/resolv.conf") == before[1][1]
    assert answers(modern, "isp.demo") == "" and answers(modern, "server.demo") == NAMESERVER  # from /etc/hosts
    mesh.kill()
    mesh.serving = {"SERVER_HOST": SERVER_IP, "COREDNS_ADDR": NAMESERVER}
    mesh.serve()
    for member in members[:2]:
        member.checkin("--force")
    assert [member.status["names"] for member in members[:2]] == ["resolved", "openresolv"]
    mesh.kill()
    for host, member in zip(hosts, members):
        assert host.run("getent", "ahostsv4", "server.demo").stdout.split()[0] == NAMESERVER
        member.leave()
    assert [(host.read("/etc/hosts"), host.read("/etc/resolv.conf")) for host in hosts] == before
    assert answers(modern, "only.demo") == ISPS == ask(local, "127.0.0.1", "only.demo")
