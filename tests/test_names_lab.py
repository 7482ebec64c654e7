# SPDX-License-Identifier: Apache-2.0
"""Names in a mesh, answered by real nameservers: CoreDNS and dnsmasq on the server's files, dnsmasq on a node's."""

from __future__ import annotations

import shutil

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import Mesh

UNFIT = unfit("wg", "dnsmasq")
COREDNS = shutil.which("coredns") or ""
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(180)]

ASK = """
import socket, struct, sys
server, name, kind = sys.argv[1], sys.argv[2], {"A": 1, "AAAA": 28}[sys.argv[3]]
question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + struct.pack(">BHH", 0, kind, 1)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(2)
    sock.sendto(struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + question, (server, int(sys.argv[4])))
    said = sock.recv(4096)
at, found = 12 + len(question), []
for _ in range(struct.unpack(">H", said[6:8])[0]):
    at += 2 if said[at] >= 192 else said.index(0, at) - at + 1
    what, _, _, size = struct.unpack(">HHIH", said[at : at + 10])
    at += 10 + size
    if what == kind:
        found.append(socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, said[at - size : at]))
print(said[3] & 15, *sorted(found))
"""


def ask(host: Host, server: str, name: str, kind: str = "A", port: int = 53) -> str:
    """What a nameserver answers: the addresses; "3" where there is no such name."""
    done = host.run(host.lab.python, "-c", ASK, server, name, kind, str(port), check=False)
    code, *addresses = done.stdout.split() or ["-"]
    return " ".join(addresses) or code


def knows(host: Host, server: str, name: str, address: str, kind: str = "A") -> None:
    wait_for(lambda: ask(host, server, name, kind) == address, 20, f"{server} to say {address} for {name}")


def test_names_come_from_hosts_files_and_survive_the_server(lab: Lab) -> None:
    """A node's own files, and a dnsmasq beside them; the server goes; leave leaves no trace."""
    mesh = Mesh(lab, "demo", "--range6", "fd44::/64")
    nas, quiet = lab.public("nas", "203.0.113.30"), lab.public("quiet", "203.0.113.31")
    before = [host.read("/etc/hosts") for host in (nas, quiet)]
    where = ("--bind-interfaces", "--listen-address=127.0.0.1", "--no-resolv", "--pid-file=/run/dnsmasq.pid")
    nas.start("dnsmasq", "-k", "-u", "root", *where)
    hub = mesh.join(mesh.host)
    mesh.admin("node", "ingress", "demo", "server")
    mesh.admin("client", "add", "demo", "server", "--name", "phone")
    mesh.admin("dns", "add", "demo", "www.nas", "192.0.2.44")
    member, silent = mesh.join(nas), mesh.join(quiet, "--dnson", "no")
    assert quiet.read("/etc/hosts") == before[1] and silent.status["names"] == ""
    mesh.kill()
    assert nas.run("getent", "ahostsv4", "server.demo").stdout.split()[0] == hub.address
    for name, address in (("server.demo", hub.address), ("www.nas.demo", "192.0.2.44"), ("nas.demo", member.address)):
        knows(nas, "127.0.0.1", name, address)
    knows(nas, "127.0.0.1", "server.demo", hub.address6, "AAAA")
    assert ask(nas, "127.0.0.1", "phone.demo").startswith("10.20.30.")
    mesh.serve()
    nas.agent("join", "-t", mesh.token(), "--dnson", "no", "--daemon", "off")
    member.checkin()
    assert "server.demo" in nas.read("/etc/hosts")  # flash is written once a minute
    nas.run("sed", "-i", 's/"named": *[0-9.]*/"named": 0/', "/var/run/netclient/demo.memory")
    member.checkin()
    assert nas.read("/etc/hosts") == before[0]
    mesh.kill()
    for each in (member, silent):
        each.leave()
    assert [host.read("/etc/hosts") for host in (nas, quiet)] == before


@pytest.mark.skipif(not COREDNS, reason="CoreDNS is not here: it is built where Go is (shell/test.sh)")
def test_coredns_and_dnsmasq_serve_the_servers_files(lab: Lab) -> None:
    """A and AAAA of nodes, clients and entries; changes arrive by themselves; what goes is gone."""
    mesh = Mesh(lab, "demo", "--range6", "fd44::/64")
    host, folder = mesh.host, "/var/lib/netmaker-lite/dnsconfig"
    hub = mesh.join(host)
    mesh.admin("network", "add", "Office-2", "--range", "10.77.0.0/24")
    wait_for(lambda: "server.demo" in host.run("cat", f"{folder}/netmaker.hosts", check=False).stdout, 15, "the hosts file")
    other = lab.public("other", "203.0.113.40")
    other.start("dnsmasq", "-k", "-u", "root", "--no-resolv", "--pid-file=", "--address=/#/", "--address=/web.demo/198.51.100.1")
    host.write("/etc/resolv.conf", f"nameserver {other.ip}\n")
    host.start("sh", "-c", f"cd {folder} && exec {COREDNS}")
    knows(other, host.ip, "server.demo", hub.address)
    knows(other, host.ip, "server.demo", hub.address6, "AAAA")
    assert [ask(other, host.ip, name) for name in ("nobody.demo", "server.demo.nowhere")] == ["3", "3"]
    assert ask(other, host.ip, "web.demo") == "198.51.100.1"  # a domain out there may be called as the network
    mesh.admin("dns", "add", "office-2", "printer", "192.0.2.20")
    mesh.admin("node", "ingress", "demo", "server")
    mesh.admin("client", "add", "demo", "server", "--name", "phone")
    knows(other, host.ip, "printer.office-2", "192.0.2.20")
    wait_for(lambda: ask(other, host.ip, "phone.demo").startswith("10.20.30."), 20, "the phone's name")
    files = ("--no-resolv", "--no-hosts", f"--addn-hosts={folder}/netmaker.hosts")
    host.start("dnsmasq", "-k", "-u", "root", "--port=54", "--pid-file=", *files)
    wait_for(lambda: ask(other, host.ip, "printer.office-2", port=54) == "192.0.2.20", 10, "dnsmasq to read the same file")
    mesh.admin("dns", "remove", "office-2", "printer")
    wait_for(lambda: ask(other, host.ip, "printer.office-2") == "3", 20, "the name to be gone")
