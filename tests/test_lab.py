"""The lab itself: its hosts are apart, its routers are as real ones, and nothing of it stays.

Real WireGuard (wireguard-go) runs in it, without netmaker-lite.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest
from lab import CommandFailed, Host, Lab, LabError, Loss, Router, adjacency, unfit, wait_for

UNFIT = unfit("wg", "wireguard-go")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT)]

PORT = "51821"


class Node(NamedTuple):
    """A host with a WireGuard interface wg0."""

    host: Host
    address: str
    key: str

    def meet(self, peer: Node, endpoint: str = "") -> None:
        """Make the other a peer, to be called at an endpoint where there is one."""
        where = ("endpoint", endpoint, "persistent-keepalive", "20") if endpoint else ()
        peers = ("peer", peer.key, "allowed-ips", f"{peer.address}/32", *where)
        self.host.run("wg", "set", "wg0", *peers)

    def show(self, peer: Node, what: str) -> str:
        """One field of `wg show` of a peer: endpoints, latest-handshakes."""
        lines = self.host.run("wg", "show", "wg0", what).stdout.splitlines()
        return dict(line.split("\t") for line in lines)[peer.key]


def node(host: Host, address: str) -> Node:
    """Bring up wg0 on a host."""
    private = host.run("wg", "genkey").stdout
    host.run("wireguard-go", "wg0")
    host.run("wg", "set", "wg0", "listen-port", PORT, "private-key", "/dev/stdin", input=private)
    host.run("ip", "address", "add", f"{address}/24", "dev", "wg0")
    host.run("ip", "link", "set", "wg0", "mtu", "1280", "up")
    return Node(host, address, host.run("wg", "pubkey", input=private).stdout.strip())


class Street(NamedTuple):
    """Two homes with a node each, both in touch with a public node."""

    lab: Lab
    homes: tuple[Router, Router]
    hub: Node
    left: Node
    right: Node


@pytest.fixture
def street() -> Iterator[Street]:
    with Lab() as lab:
        homes = lab.router("home1", "203.0.113.21"), lab.router("home2", "203.0.113.22")
        hub = node(lab.public("hub", "203.0.113.10"), "10.9.0.1")
        left = node(lab.site("left", homes[0]), "10.9.0.2")
        right = node(lab.site("right", homes[1]), "10.9.0.3")
        yield Street(lab, homes, hub, left, right)


def call_hub(street: Street) -> None:
    """Have both homes' nodes call the public one, so that it learns their endpoints."""
    for each in (street.left, street.right):
        street.hub.meet(each)
        each.meet(street.hub, f"{street.hub.host.ip}:{PORT}")
    wait_for(lambda: meets(street.hub, street.left), 6, "the left node to call the hub")
    wait_for(lambda: meets(street.hub, street.right), 6, "the right node to call the hub")


def punch(street: Street) -> None:
    """Tell both where the hub sees the other."""
    street.left.meet(street.right, street.hub.show(street.right, "endpoints"))
    street.right.meet(street.left, street.hub.show(street.left, "endpoints"))


def meets(one: Node, other: Node) -> bool:
    """Tell whether there was a handshake."""
    return one.show(other, "latest-handshakes") != "0"


def living(namespace: int) -> list[str]:
    """The processes in a network namespace, by its inode."""
    return [each.name for each in Path("/proc").glob("[0-9]*") if netns(each.name) == namespace]


def links() -> set[str]:
    """The machine's own links."""
    return {link.name for link in Path("/sys/class/net").iterdir()}


def netns(pid: object) -> int:
    """The inode of a process' network namespace; 0 when it is gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return 0


# NAT


def test_homes_that_keep_ports_are_punched(street: Street) -> None:
    call_hub(street)
    assert street.hub.show(street.left, "endpoints") == f"203.0.113.21:{PORT}"
    punch(street)
    wait_for(lambda: meets(street.left, street.right), 12, "a handshake through both NATs")
    with street.left.host.pinging(street.right.address) as ping:
        overlay = {each.host: each.address for each in (street.hub, street.left, street.right)}
        assert {loss.percent for loss in adjacency(overlay).values()} == {0}
        assert len(adjacency(overlay, count=1)) == 6
        assert ping.stop().lost == 0


def test_symmetric_homes_are_not(street: Street) -> None:
    for home in street.homes:
        home.set_symmetric(True)
    call_hub(street)
    assert street.hub.show(street.left, "endpoints") != f"203.0.113.21:{PORT}"
    punch(street)
    street.left.host.ping(street.right.address, count=1, timeout=6)  # WireGuard retries after 5 s
    assert not meets(street.left, street.right)
    assert not meets(street.right, street.left)
    assert street.left.host.ping(street.hub.address).lost == 0


def test_a_home_lets_out_what_it_does_not_let_in(lab: Lab) -> None:
    server = lab.public("server", "203.0.113.10")
    home = lab.router("home", "203.0.113.21", lan="192.168.100.0/24")
    nas, pi = lab.site("nas", home), lab.site("pi", home, "192.168.100.77")
    assert (nas.ip, pi.ip) == ("192.168.100.10", "192.168.100.77")
    assert nas.ping(server.ip, count=1) == nas.ping(pi.ip, count=1) == Loss(1, 1, 0.0)
    assert server.ping(home.ip, count=1, timeout=0.2).percent == 100
    server.run("ip", "route", "add", "192.168.100.0/24", "via", home.ip)
    assert server.ping(nas.ip, count=1, timeout=0.2).percent == 100
    home.reboot()
    assert nas.ping(server.ip, count=1).lost == 0


# Hosts


def test_what_a_host_writes_is_its_own(lab: Lab) -> None:
    one, two = lab.public("one", "203.0.113.11"), lab.public("two", "203.0.113.12")
    paths = [f"{top}/of-one/file" for top in ("/etc", "/run", "/var/run", "/usr/bin", "/root")]
    for path in paths:
        one.write(path, "mine\n")
        assert one.read(path) == "mine\n"
        assert two.run("cat", path, check=False).returncode
        assert not Path(path).exists()
    assert one.run("hostname").stdout == "one\n"
    assert one.run("ls", "/sys/class/net").stdout.split() == ["eth0", "lo"]


def test_a_command_gets_input_and_environment(lab: Lab) -> None:
    assert lab.internet.run("cat", input="word").stdout == "word"
    assert lab.internet.run("printenv", "WORD", env={"WORD": "x"}).stdout == "x\n"


def test_a_failed_command_shows_what_it_said(lab: Lab) -> None:
    with pytest.raises(CommandFailed, match=r"internet# sh[^$]*exit 3\nstdout: out\n\nstderr: err"):
        lab.internet.run("sh", "-c", "echo out; echo err >&2; exit 3")
    with pytest.raises(CommandFailed, match=r"no end of it in 0.1 s\nstdout: out"):
        lab.internet.run("sh", "-c", "echo out; sleep 60", timeout=0.1)


def test_a_started_command_is_in_the_log(lab: Lab) -> None:
    lab.internet.start("sh", "-c", "echo started; echo badly >&2").wait(timeout=5)
    assert lab.log() == "==> internet: 000 sh\nstarted\nbadly\n\n"


def test_names_and_addresses_are_taken_once(lab: Lab) -> None:
    lab.public("one", "203.0.113.11")
    with pytest.raises(LabError, match="'one'"):
        lab.public("one", "203.0.113.12")
    with pytest.raises(LabError, match=r"203\.0\.113\.11 is taken"):
        lab.public("two", "203.0.113.11")


def test_waiting_says_for_what() -> None:
    assert wait_for(lambda: "answer", 1, "an answer") == "answer"
    with pytest.raises(LabError, match=r"waited 0.1 s in vain: two and two to make five"):
        wait_for(lambda: 2 + 2 == 5, 0.1, "two and two to make five")


def test_a_cut_host_is_alone_until_mended(lab: Lab) -> None:
    one, two = lab.public("one", "203.0.113.11"), lab.public("two", "203.0.113.12")
    with one.pinging(two.ip) as ping:
        one.ping(two.ip)
        two.cut()
        assert one.ping(two.ip, count=1, timeout=0.2).percent == 100
        two.mend()
        assert one.ping(two.ip).lost == 0
        loss = ping.stop()
    assert loss.lost > 5
    assert loss.received > 5
    assert ping.stop() == loss


def test_a_reboot_leaves_the_disk_alone(street: Street) -> None:
    host = street.left.host
    host.write("/etc/netclient/kept", "kept")
    host.write("/run/netclient/lost", "lost")
    host.run("nft", "add table ip netclient")
    sleeper = host.start("sh", "-c", "sleep 60 & sleep 60")
    host.reboot()
    assert living(netns(host.pid)) == [str(host.pid)]
    assert sleeper.wait(timeout=1) == -signal.SIGKILL
    assert host.read("/etc/netclient/kept") == "kept"
    assert host.run("ls", "/run", "/sys/class/net").stdout.split() == [
        *("/run:", "/sys/class/net:"),
        *("eth0", "lo"),
    ]
    assert host.run("nft", "list", "ruleset").stdout == ""
    assert host.ping(street.hub.host.ip, count=1).lost == 0


# The end


def test_nothing_stays(street: Street) -> None:
    lab, hosts = street.lab, list(street.lab.hosts.values())
    folder = lab.folder
    assert folder
    namespaces = {netns(host.pid) for host in hosts}
    hosts[0].start("sh", "-c", "trap '' INT TERM HUP; setsid sleep 60 & sleep 60")
    assert len(namespaces) == len(hosts) == 6
    wait_for(lambda: sum(len(living(each)) for each in namespaces) >= 10, 5, "what was started")
    lab.close()
    assert [living(each) for each in namespaces] == [[]] * 6
    assert not folder.exists()
    assert str(folder) not in Path("/proc/mounts").read_text()
    assert not {"br-inet", "br-lan", "wan", "port1", "wg0"} & links()
    lab.close()


def test_nothing_stays_of_a_failed_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("lab.HOLDER", "echo no such luck; exit 1")
    with pytest.raises(LabError, match="internet is broken: no such luck"):
        Lab().__enter__()
    assert not list(tmp_path.iterdir())


def test_nothing_stays_when_the_tests_are_killed() -> None:
    code = (
        "import os, lab; own = lab.Lab().__enter__(); own.internet.run('wireguard-go', 'wg0');"
        "print(own.folder, os.stat(f'/proc/{own.internet.pid}/ns/net').st_ino, flush=True);"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tests:
        assert tests.stdout
        folder, namespace = tests.stdout.readline().split()
        assert len(living(int(namespace))) == 2
        tests.kill()
    wait_for(lambda: not living(int(namespace)), 5, "all of the lab to end with its tests")
    shutil.rmtree(folder)
