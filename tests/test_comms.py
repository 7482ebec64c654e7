"""Client mode, hub networks and the tunnel to the server, on real WireGuard with the real server over HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import SERVER_IP, SERVER_URL, Mesh

UNFIT = unfit("wg", "nft")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(240)]
DATA = "/var/lib/netmaker-lite"
CLOSED = "table inet shut { chain c { type filter hook input priority 0; iifname != { lo, nm-* } tcp dport 8081 drop; }; }"


def statuses(host: Host) -> dict[str, dict[str, Any]]:
    return {entry["network"]: entry for entry in json.loads(host.agent("status", "--json").stdout)}


def nodes(mesh: Mesh, network: str) -> dict[str, dict[str, Any]]:
    return {node["name"]: node for node in json.loads(mesh.admin("node", "list", network, "--json"))}


def test_the_servers_host_comes_and_goes_by_itself_and_nodes_reach_the_server_through_its_tunnel(lab: Lab) -> None:
    """Client mode, register, a public port that closes, a tunnel that dies, and a host that leaves."""
    mesh = Mesh(lab)
    host = mesh.host
    nas, pi = (lab.site(name, lab.router("r" + name, ip)) for name, ip in (("nas", "203.0.113.21"), ("pi", "203.0.113.22")))
    assert oct(int(host.run("stat", "-c", "%a", DATA + "/host.json").stdout, 8)) == "0o600"

    # a daemon on a machine that is in no network picks them up
    host.start(*lab.agent_argv, "daemon", "--server-data", DATA)
    wait_for(lambda: "netmaker" in nodes(mesh, "demo"), 20, "the host to join demo")
    mesh.admin("network", "add", "comms", "--range", "10.99.0.0/24", "--hub")
    wait_for(lambda: "netmaker" in nodes(mesh, "comms"), 20, "the host to join comms")
    mine = nodes(mesh, "demo")["netmaker"]
    assert (mine["isserver"], mine["endpoint"]) == ("yes", SERVER_IP)

    # register: the next check-in goes through the tunnel, also that of another network
    for machine in (nas, pi):
        machine.agent("register", "-t", mesh.token(network="comms"), "--name", machine.name, "--daemon", "off")
    first = mesh.join(nas)
    inside = "http://%s:8081" % nodes(mesh, "comms")["netmaker"]["address"]
    wait_for(lambda: not nas.ping(inside[7:-5], count=1).lost, 20, "the tunnel")
    first.checkin("--force")
    assert {entry["server"] for entry in statuses(nas).values()} == {inside}
    before = {name: nodes(mesh, name)["nas"]["endpoint"] for name in ("demo", "comms")}
    assert set(before.values()) == {"203.0.113.21"}, "the overlay address is nobody's endpoint"
    known = {peer["name"] for peer in statuses(nas)["comms"]["peers"]}
    assert known == {"netmaker"}, "nodes of a hub network know the hub alone"
    seen = nodes(mesh, "comms")["pi"]["address"]
    assert nas.ping(seen, count=1).lost, "and reach nobody else"

    # the public port closes: check-ins, changes and joins go on
    host.run("nft", CLOSED)
    assert nas.run(
        lab.python, "-c", f"import urllib.request as u; u.urlopen('{SERVER_URL}/api/health', timeout=2)", check=False
    ).returncode
    pi.agent("checkin", "-n", "all", "--force")
    second = mesh.join(pi)
    first.checkin()
    assert {peer["name"] for peer in statuses(nas)["demo"]["peers"]} == {"netmaker", "pi"}
    mesh.settle([first, second])
    assert not nas.ping(second.address, count=3).lost
    revision = statuses(nas)["demo"]["revision"]
    for _ in range(3):
        first.checkin()
    assert statuses(nas)["demo"]["revision"] == revision, "nothing flaps"
    assert {name: nodes(mesh, name)["nas"]["endpoint"] for name in before} == before
    nas.start(*lab.agent_argv, "daemon")  # its looks go through the tunnel, too
    time.sleep(3)
    mesh.admin("network", "set", "demo", "defaultkeepalive=11")
    wait_for(lambda: "every 11 seconds" in nas.wg("nm-demo"), 8, "a change to come through the tunnel")

    # the interface is deleted: it comes back, also with the public port closed, and with it the tunnel
    pi.run("ip", "link", "del", "nm-comms")
    wait_for(lambda: pi.agent("checkin", "-n", "all", check=False).returncode == 0, 30, "pi's tunnel to be back")
    assert statuses(pi)["comms"]["server"] == inside
    # the tunnel is dead: the public port, once open, repairs it
    mesh.admin("node", "refresh-key", "comms", "netmaker")
    host.run("nft", "delete", "table", "inet", "shut")
    pi.run("nft", "table inet dead { chain c { type filter hook output priority 0; oifname nm-comms drop; }; }")
    pi.agent("checkin", "-n", "demo", "--force")
    assert statuses(pi)["demo"]["server"] == SERVER_URL
    pi.run("nft", "delete", "table", "inet", "dead")
    wait_for(
        lambda: pi.agent("checkin", "-n", "all", "--force") and statuses(pi)["demo"]["server"] == inside, 40, "the tunnel again"
    )

    # what is no longer the host's is left by itself, and a network with the host alone can be removed
    mesh.admin("network", "set", "demo", "hosted=no")
    wait_for(lambda: "netmaker" not in nodes(mesh, "demo"), 10, "the host to leave demo")
    mesh.admin("network", "add", "alone", "--range", "10.98.0.0/24")
    wait_for(lambda: "netmaker" in nodes(mesh, "alone"), 20, "the host to join alone")
    mesh.admin("network", "remove", "alone")
    wait_for(lambda: "nm-alone" not in host.run("ip", "link").stdout, 10, "the host to leave what is gone")
    assert "nm-comms" in host.run("ip", "link").stdout
    pi.agent("leave", "-n", "comms")
    pi.agent("checkin", "-n", "all", "--force")
    assert statuses(pi)["demo"]["server"] == SERVER_URL
