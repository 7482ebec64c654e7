"""Nodes and networks that mean harm, or that chance has made so, on the lab's real WireGuard."""

from __future__ import annotations

import time

import pytest
from lab import Host, Lab, unfit, wait_for
from mesh import SERVER_IP, Member, Mesh

import netclient_lite as agent

UNFIT = unfit("wg")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(180)]


def test_a_reboot_tells_no_old_wish_again(lab: Lab) -> None:
    """Two machines of one host name; another had its wished address moved: a reboot must not upset the server's say."""
    mesh = Mesh(lab)
    one = mesh.join(lab.public("one", "203.0.113.31"))
    two = mesh.join(lab.public("two", "203.0.113.32"), "--name", "one", "--address", "10.20.30.77")
    assert {node["name"] for node in mesh.nodes()} == {"one", "one-2"}
    two.checkin()
    mesh.admin("network", "set", "demo", "range=10.99.0.0/24")
    two.checkin()
    mesh.admin("node", "set", "demo", "one", "name=renamed")
    for member in (one, two):
        member.host.reboot()
        said = member.checkin(check=False)
        assert said.returncode == 0, said.stderr
    assert {node["name"] for node in mesh.nodes()} == {"renamed", "one-2"}
    assert two.address.startswith("10.99.0.")


def test_push_tells_no_old_wish_again(lab: Lab) -> None:
    mesh = Mesh(lab)
    mesh.join(lab.public("one", "203.0.113.31"))
    two = mesh.join(lab.public("two", "203.0.113.32"), "--name", "one")
    said = two.host.agent("push", "-n", "demo", check=False)
    assert said.returncode == 0, said.stderr


def test_a_refused_update_leaves_the_node_as_it_was(lab: Lab) -> None:
    mesh = Mesh(lab)
    one = mesh.join(lab.public("one", "203.0.113.31"))
    two = mesh.join(lab.public("two", "203.0.113.32"))
    said = two.host.agent("join", "-t", mesh.token(), "--address", one.address, "--daemon", "off", check=False)
    assert said.returncode == 1 and "taken" in said.stderr
    mesh.join(lab.public("three", "203.0.113.33"))
    said = two.checkin(check=False)
    assert said.returncode == 0, said.stderr
    assert len(two.peers()) == 2


def test_a_peer_that_sends_from_port_0_stops_no_checkin(lab: Lab) -> None:
    """A bad node makes its endpoint one that nobody can name; then the administrator removes it."""
    mesh = Mesh(lab)
    good = mesh.join(lab.public("good", "203.0.113.31"))
    bad = mesh.join(lab.public("bad", "203.0.113.32"))
    mesh.settle([good, bad])
    rule = "table ip odd { chain out { type filter hook postrouting priority 300; udp sport 51821 udp sport set 0; }; }"
    bad.host.run("nft", "-f", "-", input=rule)
    wait_for(
        lambda: bad.host.ping(good.address, 1) and ":0\n" in good.host.run("wg", "show", good.interface, "endpoints").stdout,
        10,
        "the odd endpoint",
    )
    mesh.admin("node", "remove", "demo", "bad")
    said = good.checkin(check=False)
    assert said.returncode == 0, said.stderr
    assert good.peers() == set()


def test_a_range_over_the_servers_address_is_refused(lab: Lab) -> None:
    """SPEC §9: never route the server's address in use into the tunnel."""
    mesh = Mesh(lab)
    mesh.admin("network", "add", "bad", "--range", "203.0.113.0/28")
    host = lab.site("nas", lab.router("home", "203.0.113.21"))
    host.agent("join", "-t", mesh.token(network="bad"), "--daemon", "off", check=False)
    assert "nm-bad" not in host.run("ip", "route", "get", SERVER_IP).stdout
    assert host.run("ip", "link", "show", "nm-bad", check=False).returncode != 0


def test_force_takes_no_other_networks_interface(lab: Lab) -> None:
    mesh = Mesh(lab)
    mesh.admin("network", "add", "other", "--range", "10.77.0.0/24")
    one = mesh.join(lab.public("one", "203.0.113.31"))
    said = one.host.agent(
        "join", "-t", mesh.token(network="other"), "--force", "--interface", one.interface, "--daemon", "off", check=False
    )
    one.checkin(check=False)
    assert said.returncode != 0


def test_a_pending_daemon_waits_quietly(lab: Lab) -> None:
    mesh = Mesh(lab, "demo", "--manual-signup", "yes")
    pin = agent.b64(agent.parse_token(mesh.token()).pin)
    host = lab.public("one", "203.0.113.31")
    host.agent("join", "-n", "demo", "--apiserver", SERVER_IP + ":8081", "--server-key", pin, "--daemon", "off")
    Member(mesh, host, "demo").daemon()
    time.sleep(3)
    before = sequence(host)
    time.sleep(8)
    assert sequence(host) - before <= 1


def sequence(host: Host) -> int:
    """How many exchanges the agent has made."""
    return int(host.read("/var/run/netclient/demo.state").split()[2])
