"""Against the odds: a restored server, agents without libraries, proxies, TLS, full disks, IPv6. On the lab's real WireGuard."""

from __future__ import annotations

import functools
import json

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import SERVER_IP, Member, Mesh

UNFIT = unfit("wg", "openssl")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(180)]


def public_nodes(mesh: Mesh, *names: str) -> list[Member]:
    return [mesh.join(mesh.lab.public(name, f"203.0.113.{30 + number}")) for number, name in enumerate(names)]


def test_an_old_backup_restored_cuts_nobody_off(lab: Lab) -> None:
    """What joined since stays a peer, and joins again by itself; who was removed since is named."""
    mesh = Mesh(lab)
    a, b, gone = public_nodes(mesh, "a", "b", "gone")
    token = mesh.token(uses=2)
    mesh.admin("backup", "/root/old.db")
    late = lab.public("late", "203.0.113.40")
    late.agent("join", "-t", token, "--name", "late", "--daemon", "off")
    c = Member(mesh, late, "demo")
    mesh.admin("node", "remove", "demo", "gone")
    gone.checkin()
    mesh.settle([a, b, c])
    address = c.address
    wait_for(lambda: not a.host.ping(address, count=50, interval=0.02).lost, 10, "a second without the birth pangs of a session")
    with a.host.pinging(address) as to_late, a.host.pinging(b.address) as to_b:
        mesh.kill()
        told = mesh.admin("restore", "/root/old.db")
        assert "gone" in told
        mesh.serve()
        for member in (a, b):
            member.checkin()
        assert "joining again" in c.checkin().stderr
        for member in (a, b, c):
            member.checkin()
        assert (to_late.stop().lost, to_b.stop().lost) == (0, 0)
    assert c.address == address
    assert sorted(node["name"] for node in mesh.nodes()) == ["a", "b", "gone", "late"]
    assert len(a.peers()) == 3


def test_a_copied_old_database_makes_no_node_miss_a_change(lab: Lab) -> None:
    mesh = Mesh(lab)
    a, b = public_nodes(mesh, "a", "b")
    data = "/var/lib/netmaker-lite"
    mesh.kill()
    mesh.host.run("cp", "-a", data, "/root/old")
    mesh.serve()
    mesh.admin("node", "set", "demo", "b", "mtu=1300")
    for member in (a, b):
        member.checkin()
    assert "mtu 1300" in b.host.run("ip", "link", "show", "nm-demo").stdout
    mesh.kill()
    mesh.host.run("sh", "-c", f"rm -r {data} && cp -a /root/old {data}")
    mesh.serve()
    mesh.admin("node", "set", "demo", "b", "mtu=1310")  # the counter is as before, the word is not
    for member in (a, b):
        member.checkin()
    assert "mtu 1310" in b.host.run("ip", "link", "show", "nm-demo").stdout


BARE = """
import runpy, sys
for name in ("nacl", "requests", "zeroconf"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_agent_on_the_standard_library_alone_is_a_full_node(lab: Lab) -> None:
    """Its requests and answers travel readable, MAC'd; those of its neighbour sealed. They meet."""
    mesh = Mesh(lab)
    rich = mesh.join(lab.public("rich", "203.0.113.30"))
    host = lab.public("bare", "203.0.113.31")
    host.write("/root/bare.py", BARE)

    def bare(*verb: str) -> str:
        return host.run(lab.python, "/root/bare.py", lab.agent_argv[1], *verb).stderr

    assert "readable on plain HTTP" in bare("join", "-t", mesh.token(), "--daemon", "off")
    node = Member(mesh, host, "demo")
    state = host.read("/var/run/netclient/demo.state").split()
    assert state[4] == "p"
    assert rich.host.read("/var/run/netclient/demo.state").split()[4] == "s"
    for _ in range(2):
        rich.checkin()
        bare("checkin")
    wait_for(lambda: not host.ping(rich.address, count=1).lost, 10, "the two to meet")
    bare("leave", "-n", "demo")
    assert [node["name"] for node in mesh.nodes()] == ["rich"]
    assert node.host.run("ls", "/etc/netclient/config").stdout == ""


TLS_PROXY = f"""
import socket, ssl, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/root/cert.pem", "/root/key.pem")
listener = socket.create_server(("0.0.0.0", 8443))
def serve(asked):
    try:
        inside = context.wrap_socket(asked, server_side=True)
    except OSError:
        return
    onward = socket.create_connection(("{SERVER_IP}", 8081))
    onward.sendall(inside.recv(1 << 20))
    while True:
        piece = onward.recv(65536)
        if not piece:
            break
        inside.sendall(piece)
    inside.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def test_over_https_the_pin_counts_and_not_the_certificate(lab: Lab) -> None:
    mesh = Mesh(lab)
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout /root/key.pem -out /root/cert.pem -days 1 -subj /CN=other"
    mesh.host.run(*command.split())
    mesh.host.write("/root/tls.py", TLS_PROXY)
    mesh.host.start(lab.python, "/root/tls.py")
    wait_for(lambda: ":8443" in mesh.host.run("ss", "-ltn").stdout, 5, "the TLS proxy to listen")
    host = lab.public("nas", "203.0.113.30")
    place = ("--apiserver", f"https://{SERVER_IP}:8443", "--daemon", "off")
    without_pin = host.agent("join", "-n", "demo", *place, check=False)
    assert without_pin.returncode == 1
    assert "certificate" in without_pin.stderr
    host.agent("join", "-t", mesh.token(), *place)
    member = Member(mesh, host, "demo")
    mesh.admin("node", "set", "demo", "nas", "mtu=1300")
    member.checkin()
    assert "mtu 1300" in host.run("ip", "link", "show", "nm-demo").stdout


HTTP_PROXY = """
import http.server, urllib.parse, http.client
class Proxy(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        place = urllib.parse.urlsplit(self.path)
        onward = http.client.HTTPConnection(place.hostname, place.port)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        onward.request(self.command, place.path, body, dict(self.headers))
        answer = onward.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST
http.server.ThreadingHTTPServer(("0.0.0.0", 3128), Proxy).serve_forever()
"""


def test_where_a_proxy_is_set_the_agent_goes_through_it(lab: Lab) -> None:
    mesh = Mesh(lab)
    proxy, host = lab.public("proxy", "203.0.113.30"), lab.public("office", "203.0.113.31")
    proxy.write("/root/proxy.py", HTTP_PROXY)
    proxy.start(lab.python, "/root/proxy.py")
    wait_for(lambda: ":3128" in proxy.run("ss", "-ltn").stdout, 5, "the proxy to listen")
    host.run("ip", "route", "add", "unreachable", SERVER_IP)
    token, through = mesh.token(), {"http_proxy": "http://203.0.113.30:3128"}
    assert host.agent("join", "-t", token, "--daemon", "off", check=False).returncode == 1
    host.agent("join", "-t", token, "--daemon", "off", env=through)
    assert host.agent("checkin", env=through).stderr == ""
    assert [node["name"] for node in mesh.nodes()] == ["office"]


def reached(host: Host, address: str) -> bool:
    return not host.ping(address, count=1).lost


def fill(host: Host, folder: str) -> None:
    host.run("mkdir", "-p", folder)
    host.run("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "disk", folder)
    host.run("sh", "-c", f"cat /dev/zero >{folder}/ballast", check=False)


@pytest.mark.parametrize("folder", ["/etc/netclient", "/etc/netclient/config"])
def test_a_full_disk_refuses_a_join_and_loses_nothing(lab: Lab, folder: str) -> None:
    """Before the server was asked, and after."""
    mesh = Mesh(lab)
    host = lab.public("nas", "203.0.113.30")
    fill(host, folder)
    token = mesh.token()
    full = host.agent("join", "-t", token, "--daemon", "off", check=False)
    assert full.returncode == 1
    assert "make room" in full.stderr and full.stderr.count("\n") == 1
    assert mesh.nodes() == []
    host.run("rm", f"{folder}/ballast")
    host.agent("join", "-t", token if folder == "/etc/netclient" else mesh.token(), "--daemon", "off")


def test_a_disk_that_fills_up_later_stops_no_change(lab: Lab) -> None:
    mesh = Mesh(lab)
    (a,) = public_nodes(mesh, "a")
    for folder in ("/etc/netclient/config", "/var/run/netclient"):
        name = f"{folder}/ballast"
        before = a.host.run("sh", "-c", f"mkdir /root/keep; cp -a {folder}/. /root/keep/")
        assert before.returncode == 0
        a.host.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "disk", folder)
        a.host.run("sh", "-c", f"cp -a /root/keep/. {folder}/; rm -r /root/keep; cat /dev/zero >{name}", check=False)
        address = mesh.join(lab.public(*("b", "203.0.113.50") if "config" in folder else ("c", "203.0.113.51"))).address
        done = a.checkin(check=False)
        assert "Traceback" not in done.stderr
        a.host.run("rm", name)
        a.checkin()
        wait_for(functools.partial(reached, a.host, address), 10, "the new node to be reached")


def test_dual_stack_overlay(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--range6", "fd20:30::/64")
    a = mesh.join(mesh.host)
    b = mesh.join(lab.site("b", lab.router("home", "203.0.113.21")))
    a.checkin()
    entry = json.loads(b.host.agent("list", "--json").stdout)[0]
    assert entry["address"] == "10.20.30.2"
    assert entry["address6"] == "fd20:30::2"
    reach = ((a.host, "fd20:30::2"), (b.host, "fd20:30::1"), (a.host, "10.20.30.2"))
    wait_for(lambda: not any(host.ping(other, count=1).lost for host, other in reach), 10, "both families to be reached")
    b.host.run("ip", "addr", "flush", "dev", "nm-demo")
    b.checkin()
    assert not b.host.ping("fd20:30::1").lost
    assert b.checkin().stderr == ""


def test_a_range_change_reaches_every_node(lab: Lab) -> None:
    """One command at the server; each node follows by itself, and the host parts stay."""
    mesh = Mesh(lab)
    a, b = public_nodes(mesh, "a", "b")
    mesh.settle([a, b])
    mesh.admin("network", "set", "demo", "addressrange=10.77.0.0/16")
    for member in (a, b, a):
        member.checkin()
    assert (a.address, b.address) == ("10.77.0.1", "10.77.0.2")
    wait_for(lambda: not a.host.ping("10.77.0.2", count=1).lost, 10, "the mesh in its new range")
    assert "10.20.30" not in a.host.run("ip", "route").stdout + a.host.run("ip", "addr").stdout
