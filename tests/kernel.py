# SPDX-License-Identifier: Apache-2.0
"""A model of what `wg set` and `ip` do to one WireGuard interface: plans are replayed on it.

    kernel = Kernel("nm-demo")
    kernel("ip", "link", "add", "dev", "nm-demo", "type", "wireguard")
    kernel.replay(plan(kernel.actual(), desired, create))
    assert kernel.actual() == …

What only asks (`wg show`, `ip addr show`, `ip route show`) is answered in the tools' own form, so that a System can read it.
It refuses what Linux refuses: an address that is there already, a route on an interface that is down, a word that the tool does
not know. What it knows of Linux was measured on 6.18, and can be measured again on this machine (root, wireguard-go):

    unshare -n -m -p --fork --kill-child --mount-proc python tests/kernel.py 300 SEED

walks 300 random commands on a real interface and on the model, and compares the two after each. The standard library alone.
"""

from __future__ import annotations

import binascii
import hashlib
import ipaddress
import os
import random
import shlex
import subprocess
import sys
import time
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from netclient_lite import Actual, CommandFailed, LivePeer, Run, Step, System

IPV6_MIN_MTU = 1280  # below it Linux has no IPv6 on the interface
NEW_MTU = 1420


class RefusedByKernel(Exception):
    """The tool would have returned another status than 0."""


class Address(NamedTuple):
    """An address of the interface. Linux lists primary addresses first, then the secondary ones."""

    text: str
    secondary: bool

    @property
    def network(self) -> str:
        return str(ipaddress.ip_interface(self.text).network)

    @property
    def version(self) -> int:
        return ipaddress.ip_interface(self.text).version


class Route(NamedTuple):
    """A route over the interface: the kernel's own for an address, or somebody's. Of two the lower metric comes first."""

    to: str
    kernel: bool
    metric: int

    @property
    def version(self) -> int:
        return ipaddress.ip_network(self.to).version


def kernel_route(to: str) -> Route:
    return Route(to, True, 256 if ":" in to else 0)


class Kernel:
    """One interface, and the tools that change it."""

    def __init__(self, interface: str, busybox: bool = False) -> None:
        self.interface, self.busybox = interface, busybox
        self.exists = False
        self.private, self.port, self.mtu, self.up = "", 0, NEW_MTU, False
        self.addresses: list[Address] = []
        self.routes: list[Route] = []
        self.peers: dict[str, LivePeer] = {}
        self.others = ""  # what `ip addr show` prints about other interfaces
        self.ran: list[tuple[str, ...]] = []

    def actual(self) -> Actual:
        """What the agent would read."""
        if not self.exists:
            return Actual()
        addresses = type(Actual().addresses)(address.text for address in self.addresses)
        routes = frozenset(route.to for route in self.routes)
        public = key_like(self.private) if self.private else "(none)"
        return Actual(True, self.private, self.port, self.mtu, self.up, addresses, routes, dict(self.peers), public)

    def replay(self, steps: Iterable[Step]) -> None:
        """Run the steps of a plan; the first refusal ends it, as it ends Run.apply."""
        for step in steps:
            self(*step.argv, stdin=step.stdin)

    def __call__(self, *argv: str, stdin: str = "") -> str:
        """Run one command; what it prints."""
        words = list(argv)
        if "show" in words:
            return self._show(words)
        self.ran.append(argv)
        if words == ["wireguard-go", self.interface] or words[1:] == ["link", "add", "dev", self.interface, "type", "wireguard"]:
            self._create()
        elif words == ["ip", "link", "del", "dev", self.interface]:
            self._refuse_if(not self.exists, "Cannot find device")
            self.exists = False
        elif words[:2] == ["wg", "set"]:
            self._wg(words[2:], stdin)
        elif words[:2] == ["wg", "addconf"]:
            self._addconf(words[2:], stdin)
        elif words[0] == "ip":
            self._ip(words[1:], stdin)
        else:
            raise RefusedByKernel(f"no such command: {shlex.join(argv)}")
        return ""

    def _create(self) -> None:
        self._refuse_if(self.exists, "File exists")
        self.__init__(self.interface, self.busybox)  # type: ignore[misc]
        self.exists = True

    def _refuse_if(self, wrong: bool, why: str) -> None:
        if wrong:
            raise RefusedByKernel(f"{self.interface}: {why}")

    # -- what it shows -------------------------------------------------------------------------------------------------

    def _show(self, words: list[str]) -> str:
        if words == ["ip", "addr", "show"]:
            return self.others + self._shown_link() if self.exists else self.others
        self._refuse_if(not self.exists or self.interface not in words, "No such device")
        if words[0] == "wg":
            return self._shown_dump()
        if "addr" in words:
            return self._shown_link()
        version = 6 if "-6" in words else 4
        return "".join(self._shown_route(route) for route in self.routes if route.version == version)

    def _shown_dump(self) -> str:
        public = key_like(self.private) if self.private else "(none)"
        lines: list[tuple[str, ...]] = [(self.private or "(none)", public, str(self.port), "off")]
        lines += [_shown_peer(peer) for peer in self.peers.values()]
        return "".join("\t".join(line) + "\n" for line in lines)

    def _shown_link(self) -> str:
        flags, state = ("UP,LOWER_UP", "UNKNOWN") if self.up else ("", "DOWN")
        flags = ("POINTOPOINT,MULTICAST,NOARP," + flags).rstrip(",")
        head = f"7: {self.interface}: <{flags}> mtu {self.mtu} qdisc noop state {state} group default qlen 500\n    link/none \n"
        return head + "".join(self._shown_address(address) for address in self.addresses)

    def _shown_address(self, address: Address) -> str:
        word, name = ("inet", f" {self.interface}") if address.version == 4 else ("inet6", " ")
        scope = "scope global secondary" if address.secondary else "scope global"
        return f"    {word} {address.text} {scope}{name}\n       valid_lft forever preferred_lft forever\n"

    def _shown_route(self, route: Route) -> str:
        bare = route.to[: -len("/32")] if route.to.endswith("/32") else route.to.replace("/128", "")
        tail = {4: "scope link", 6: "pref medium"}[route.version]
        metric = f"metric {route.metric} " if route.metric else ""
        return f"{bare} {'proto kernel ' if route.kernel else ''}{metric}{tail} \n"

    # -- wg ------------------------------------------------------------------------------------------------------------

    def _wg(self, words: list[str], stdin: str) -> None:
        self._refuse_if(not self.exists or words[:1] != [self.interface], "No such device")
        head, *peers = _split_before(words[1:], "peer")
        values = _pairs(head, ("listen-port", "private-key"))
        if "private-key" in values:
            self._refuse_if(values["private-key"] != "/dev/stdin" or len(stdin.strip()) != 44, "Key is not the correct length")
            self.private = stdin.strip()
        self.port = int(values.get("listen-port", self.port))
        for words in peers:
            self._peer(words[1], words[2:])

    def _addconf(self, words: list[str], stdin: str) -> None:
        """Peers with their preshared keys; a peer that is named again gets these allowed IPs and no others."""
        self._refuse_if(not self.exists or words != [self.interface, "/dev/stdin"], "No such device")
        for section in stdin.split("[Peer]\n")[1:]:
            values = dict(line.split(" = ") for line in section.strip().splitlines())
            allowed = values["AllowedIPs"].replace(" ", "")
            self._peer(values["PublicKey"], ("persistent-keepalive", values["PersistentKeepalive"], "allowed-ips", allowed))
            self.peers[values["PublicKey"]] = self.peers[values["PublicKey"]]._replace(preshared=values["PresharedKey"])

    def _peer(self, key: str, words: Sequence[str]) -> None:
        self._refuse_if(len(key) != 44, "Key is not the correct length or format")
        if list(words) == ["remove"]:
            self.peers.pop(key, None)
            return
        values = _pairs(words, ("endpoint", "persistent-keepalive", "allowed-ips", "preshared-key"))
        self._refuse_if(values.get("preshared-key", "/dev/null") != "/dev/null", "another file for each key")
        peer = self.peers.get(key, LivePeer(key, "", frozenset(), 0, 0, 0, 0))
        peer = peer._replace(
            endpoint=values.get("endpoint", peer.endpoint),
            keepalive=int(values.get("persistent-keepalive", peer.keepalive)),
            preshared="" if "preshared-key" in values else peer.preshared,
        )
        if "allowed-ips" in values:
            allowed = frozenset(
                str(ipaddress.ip_network(text, strict=False)) for text in values["allowed-ips"].split(",") if text
            )
            for other in list(self.peers.values()):  # an address moves from one peer to another
                self.peers[other.key] = other._replace(allowed=other.allowed - allowed)
            peer = peer._replace(allowed=allowed)
        self.peers[key] = peer

    # -- ip ------------------------------------------------------------------------------------------------------------

    def _ip(self, words: list[str], stdin: str) -> None:
        if words == ["-batch", "-"]:
            self._refuse_if(self.busybox, "invalid option -- b")
            for line in stdin.splitlines():
                self._ip(line.split(), "")
            return
        family = 0
        if words[0] in ("-4", "-6"):
            family = int(words.pop(0)[1])
        what, verb, *rest = words
        if (what, verb) == ("link", "set"):
            self._link(rest)
        elif what in ("addr", "route"):
            self._refuse_if(rest[1:3] != ["dev", self.interface], f"what is {rest[1:]}?")
            self._refuse_if(not self.exists, f'Cannot find device "{self.interface}"')
            if what == "route":
                getattr(self, f"_route_{verb}")(rest[0], family, _pairs(rest[3:], ("metric",)))
            else:
                self._refuse_if(len(rest) > 3, f"what is {rest[3:]}?")
                getattr(self, f"_addr_{verb}")(rest[0])
        else:
            self._refuse_if(True, f"what is ip {shlex.join(words)}?")

    def _link(self, words: Sequence[str]) -> None:
        self._refuse_if(not self.exists or list(words[:2]) != ["dev", self.interface], "Cannot find device")
        if words[2] == "mtu":
            self.mtu = int(words[3])
            if self.mtu < IPV6_MIN_MTU:
                self._lose_ipv6()
        elif words[2] == "up" and not self.up:
            self.up = True
            for address in self.addresses:
                self._connect(address)
        elif words[2] == "down" and self.up:
            self.up = False
            self._lose_ipv6()
            self.routes = []

    def _lose_ipv6(self) -> None:
        self.addresses = [address for address in self.addresses if address.version == 4]
        self.routes = [route for route in self.routes if route.version == 4]

    def _connect(self, address: Address) -> None:
        """The route that comes with an address: none for a secondary one, nor for a single IPv4 address."""
        route = kernel_route(address.network)
        if self.up and not address.secondary and not route.to.endswith("/32") and route not in self.routes:
            self.routes.append(route)

    def _addr_add(self, text: str) -> None:
        text = str(ipaddress.ip_interface(text))
        version, home = ipaddress.ip_interface(text).version, str(ipaddress.ip_interface(text).network)
        self._refuse_if(version == 6 and self.mtu < IPV6_MIN_MTU, "Invalid argument")
        bare = text.split("/")[0]
        for other in self.addresses:  # IPv6 knows an address once, IPv4 once with each prefix length
            same = other.text == text if version == 4 else other.text.split("/")[0] == bare
            self._refuse_if(same, "Address already assigned")
        secondary = version == 4 and any(other.network == home and not other.secondary for other in self.addresses)
        address = Address(text, secondary)
        self.addresses.append(address)
        self.addresses.sort(key=lambda one: (one.version, one.secondary))
        self._connect(address)

    def _addr_replace(self, text: str) -> None:
        if str(ipaddress.ip_interface(text)) not in [address.text for address in self.addresses]:
            self._addr_add(text)

    def _addr_del(self, text: str) -> None:
        found = [address for address in self.addresses if address.text == str(ipaddress.ip_interface(text))]
        self._refuse_if(not found, "Cannot assign requested address")
        address = found[0]
        self.addresses.remove(address)
        if address.version == 4 and not address.secondary:  # promote_secondaries is off
            self.addresses = [one for one in self.addresses if not (one.secondary and one.network == address.network)]
        if not any(one.network == address.network for one in self.addresses):
            self._disconnect(address)
        if address.version == 4 and not any(one.version == 4 for one in self.addresses):
            self.routes = [route for route in self.routes if route.version != 4]

    def _disconnect(self, address: Address) -> None:
        """IPv4 takes the kernel's own route away, IPv6 the first one there is."""
        routes = [route for route in self._ways(address.network) if route.kernel or route.version == 6]
        if routes:
            self.routes.remove(routes[0])

    def _ways(self, to: str) -> list[Route]:
        """The routes to a destination, in the order in which Linux keeps them."""
        return sorted((route for route in self.routes if route.to == to), key=lambda route: (route.metric, route.kernel))

    def _route_replace(self, to: str, family: int, more: Mapping[str, str]) -> None:
        text = str(ipaddress.ip_network(to))
        route = Route(text, False, int(more.get("metric", 1024 if ":" in text else 0)))
        self._refuse_if(bool(family) and family != route.version, "inet prefix is expected")
        self._refuse_if(not self.up, "Device for nexthop is not up")
        self._refuse_if(route.version == 6 and self.mtu < IPV6_MIN_MTU, "IPv6 is disabled on nexthop device")
        if route not in self.routes:
            if route._replace(kernel=True) in self.routes:
                self.routes.remove(route._replace(kernel=True))  # the same metric: it takes the kernel's place
            self.routes.append(route)

    def _route_del(self, to: str, family: int, more: Mapping[str, str]) -> None:
        metric = int(more.get("metric", 0))
        found = [route for route in self._ways(str(ipaddress.ip_network(to))) if metric in (0, route.metric)]
        self._refuse_if(not found, "No such process")
        self.routes.remove(found[0])


def key_like(text: str) -> str:
    """Some key that belongs to a text."""
    return binascii.b2a_base64(hashlib.blake2b(text.encode(), digest_size=32).digest(), newline=False).decode()


def _shown_peer(peer: LivePeer) -> tuple[str, ...]:
    ranges = ",".join(sorted(peer.allowed)) or "(none)"
    numbers = (str(peer.handshake), str(peer.rx), str(peer.tx))
    return (peer.key, peer.preshared or "(none)", peer.endpoint or "(none)", ranges, *numbers, str(peer.keepalive or "off"))


def _split_before(words: Sequence[str], mark: str) -> Iterator[list[str]]:
    """What stands before the first mark, then a list from each mark to the next."""
    part: list[str] = []
    for word in words:
        if word == mark:
            yield part
            part = []
        part.append(word)
    yield part


def _pairs(words: Sequence[str], known: Sequence[str]) -> Mapping[str, str]:
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or set(names) - set(known):
        raise RefusedByKernel(f"Invalid argument: {shlex.join(words)}")
    return dict(zip(names, values))


# -- by hand -------------------------------------------------------------------------------------------------------------
# What somebody may have done to the interface before the agent comes.

HAND_ADDRESSES = (
    *("10.20.30.2/24", "10.20.30.3/24", "10.20.30.4/24", "10.20.0.2/16", "10.99.0.1/24", "10.98.0.1/32"),
    *("fd00:20::2/64", "fd00:20::3/64", "fd00:99::1/64", "fd00:98::1/128"),
)
HAND_ROUTES = (
    *("10.20.30.0/24", "10.20.0.0/16", "192.168.7.0/24", "192.168.0.0/16", "10.98.0.1/32", "172.29.0.0/16"),
    *("fd00:20::/64", "fd00:7::/48", "fd00:98::1/128", "2001:db8:7::/64"),
)


HAND_PEERS = tuple(key_like(name) for name in "abc")
HAND_OWNED = ("10.20.30.5/32", "192.168.7.0/24", "192.168.0.0/16", "fd00:7::/48", "fd00:20::5/128")
HAND_ENDPOINTS = ("127.0.0.1:9", "203.0.113.7:51821", "[2001:db8::7]:51821")


def hand_peer_command(interface: str, chance: random.Random) -> tuple[str, ...]:
    """A change of some peers, as `wg set` takes it."""
    words: list[str] = []
    for key in chance.sample(HAND_PEERS, chance.randint(1, 3)):
        if chance.random() < 0.2:
            words += ["peer", key, "remove"]
            continue
        words += ["peer", key]
        if chance.random() < 0.5:
            words += ["allowed-ips", ",".join(chance.sample(HAND_OWNED, chance.randint(0, 3)))]
        if chance.random() < 0.3:
            words += ["endpoint", chance.choice(HAND_ENDPOINTS)]
        if chance.random() < 0.3:
            words += ["persistent-keepalive", chance.choice(("0", "20", "25"))]
    return ("wg", "set", interface, *words)


def hand_commands(interface: str, metrics: Sequence[str] = ("",)) -> list[tuple[str, ...]]:
    """Every change of addresses, routes and the link that the model knows; routes with each of these metrics, "" for none."""
    link = ("ip", "link", "set", "dev", interface)
    found: list[tuple[str, ...]] = [(*link, "up"), (*link, "down")]
    found += [(*link, "mtu", mtu) for mtu in ("1420", "1280", "1200")]
    for verb in ("add", "del"):
        found += [("ip", "addr", verb, text, "dev", interface) for text in HAND_ADDRESSES]
    for verb in ("replace", "del"):
        for text in HAND_ROUTES:
            family = ("-6",) if ":" in text else ()
            route = ("ip", *family, "route", verb, text, "dev", interface)
            found += [(*route, "metric", metric) if metric else route for metric in metrics]
    return found


# -- the walk ------------------------------------------------------------------------------------------------------------


def walk(steps: int, seed: str, interface: str = "nm-model") -> str:
    """Random commands on the model and on this machine; the first difference, or ""."""
    chance, run = random.Random(seed), Run()
    system, model = System(run), Kernel(interface)
    run("mount", "-t", "tmpfs", "none", "/run")
    run("wireguard-go", interface, detached=True)
    model("wireguard-go", interface)
    while not os.path.exists(f"/run/wireguard/{interface}.sock"):
        time.sleep(0.01)
    commands = hand_commands(interface, ("", "5000"))
    usual = [command for command in commands if "link" not in command]
    run("ip", "link", "set", "dev", interface, "up")
    model("ip", "link", "set", "dev", interface, "up")
    try:
        for number in range(steps):
            command = chance.choice(commands if number % 5 == 0 else usual)
            if number % 3 == 0:
                command = hand_peer_command(interface, chance)
            told = {"machine": _outcome(run, command), "model": _outcome(model, command)}
            real, ours = _known(system.actual(interface, system.links())), _known(model.actual())
            if told["machine"] != told["model"] or real != ours:
                return f"step {number}: {shlex.join(command)}: {told}\nmachine {real}\nmodel   {ours}"
    finally:
        run("ip", "link", "del", "dev", interface)  # and with it wireguard-go
    return ""


def _known(actual: Actual) -> Any:
    """What the model speaks of: the order counts among IPv4 addresses alone."""
    four = [text for text in actual.addresses if ":" not in text]
    peers = {key: peer._replace(handshake=0, rx=0, tx=0) for key, peer in actual.peers.items()}
    bare = actual._replace(port=0, private="", addresses=type(actual.addresses)(), peers=peers)
    return bare, four, frozenset(actual.addresses)


def _outcome(tool: Any, command: Sequence[str]) -> str:
    try:
        tool(*command)
    except (CommandFailed, RefusedByKernel):
        return "refused"
    return "done"


if __name__ == "__main__":
    print(subprocess.run(["ip", "-V"], capture_output=True, text=True, check=False).stdout.strip())
    difference = walk(int(sys.argv[1]), sys.argv[2])
    print(difference or "the model does what this machine does")
    sys.exit(bool(difference))
