# SPDX-License-Identifier: Apache-2.0
"""What the agent's tests share: where things are, keys and nodes to speak of, and the worlds that hypothesis draws."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Mapping

from hypothesis import strategies as st
from kernel import HAND_ADDRESSES, HAND_ROUTES, Kernel, RefusedByKernel, hand_commands, key_like

from netclient_lite import (
    Actual,
    CommandFailed,
    Config,
    Context,
    Desired,
    Files,
    Node,
    Paths,
    Peer,
    Run,
    Secret,
    Step,
    System,
    View,
    networks_of,
)

REPO = Path(__file__).resolve().parent.parent
AGENT = REPO / "netclient_lite.py"
DATA = REPO / "tests" / "data"

IF = "nm-demo"
CREATE = Step(("ip", "link", "add", "dev", IF, "type", "wireguard"), f"make {IF}")


def recorded(what: str, tool: str = "") -> dict[str, str]:
    """The recorded outputs called so, by file name: one for each version of each tool (tests/data/record.sh makes them)."""
    found = {path.name: path.read_text("utf-8") for path in sorted(DATA.glob(f"{what}.{tool}*.txt"))}
    assert found, f"no recording of {what}"
    return found


def node_of(name: str) -> str:
    """The node id that belongs to a name."""
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def record(name: str, **fields: Any) -> dict[str, Any]:
    """A peer record as the server sends it."""
    return {"id": node_of(name), "name": name, "key": key_like(name), **fields}


def own_settings(**fields: Any) -> dict[str, Any]:
    """`me` as the server sends it."""
    usual = {"name": "me", "ip": "10.20.30.2", "range": "10.20.30.0/24", "port": 51821, "keepalive": 20, "mtu": 1280}
    return {**usual, "look": "cap", **fields}


def view_of(*records: Mapping[str, Any], **me: Any) -> View:
    """A view with these peers beside the node "me" itself."""
    mine = own_settings(**me)
    own = record("me", ip=mine["ip"])
    peers = {str(each["id"]): dict(each) for each in (own, *records)}
    return View({"word": "1.00000001", "incarnation": "i", "state": "active", "me": mine, "peers": peers})


def config_of(**fields: Any) -> Config:
    return Config({"network": "demo", "interface": IF, "servers": ["http://203.0.113.10:8081"], **fields})


class ModelRun(Run):
    """The door to processes, with the model of one interface behind it."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def __call__(self, *argv: str, stdin: str = "", detached: bool = False) -> str:
        try:
            return self.kernel(*argv, stdin=stdin)
        except RefusedByKernel as no:
            raise CommandFailed(argv, 2, str(no)) from no


LAN = """2: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether 02:00:00:00:00:01 brd ff:ff:ff:ff:ff:ff
    inet 192.168.1.10/24 scope global eth0
       valid_lft forever preferred_lft forever
"""


class ModelSystem(System):
    """What is asked of the machine beside its tools: nothing here depends on the one that the tests run on."""

    def port_is_free(self, port: int) -> bool:
        return True

    def sources(self) -> dict[int, str]:
        return {}

    def exists(self, interface: str) -> bool:
        return interface in self.links()

    def step_clock(self, known: float, whose: str) -> str:
        return ""  # the servers of tests live in a time of their own, and this machine's clock is not to follow them


class Standing:
    """A node on a machine whose interface is the model: up, in the LAN 192.168.1.0/24, without a server to speak to."""

    def __init__(self, root: Path, view: View, interface: str = IF) -> None:
        self.said: list[str] = []
        self.kernel = Kernel(interface)
        self.kernel("wireguard-go", interface)
        self.kernel.others = LAN
        run = ModelRun(self.kernel)
        context = Context(Paths(str(root)), run, Files(), ModelSystem(run, str(root)), self.said.append)
        secret = Secret("demo", node_of("me"), "cap", b"a" * 32, b"z" * 32, b"s" * 32)
        self.node = Node(context, config_of(port=51821, fixed=True, interface=interface), secret, PRIVATE)
        self.node.memory.view = view

    def settle(self) -> None:
        """Read the machine and make it as the view says."""
        self.node.read()
        self.node.apply(self.node.memory.view)


class Clock:
    """Stands in for the module `time` in the agent: it moves when it is told to."""

    def __init__(self) -> None:
        self.now, self.wall = 10_000.0, 1_800_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.now, self.wall = self.now + seconds, self.wall + seconds


# -- worlds ----------------------------------------------------------------------------------------------------------------

KEYS = tuple(key_like(name) for name in "abcdef")
ENDPOINTS = ("203.0.113.7:51821", "203.0.113.7:40007", "198.51.100.4:51821", "192.168.1.10:51821", "[2001:db8::7]:51821")
OWNED = (
    *("10.20.30.5/32", "10.20.30.6/32", "10.20.30.0/24", "192.168.7.0/24", "192.168.0.0/16", "172.29.0.0/16"),
    *("fd00:20::5/128", "fd00:20::6/128", "fd00:7::/48", "2001:db8:7::/64"),
)
PRIVATE = key_like("our private key")

keys = st.sampled_from(KEYS)
endpoints = st.sampled_from(ENDPOINTS)
keepalives = st.sampled_from((0, 20, 25))
ports = st.sampled_from((51821, 51822, 40000))


@st.composite
def kernels(draw: st.DrawFn) -> Kernel:
    """An interface in whatever state people, other programs and earlier versions of the mesh may have left it in."""
    kernel = Kernel(IF)
    if draw(st.integers(0, 9)) == 0:
        return kernel
    kernel(*CREATE.argv)
    kernel.private = draw(st.sampled_from((PRIVATE, PRIVATE, key_like("another private key"), "")))
    kernel.port = draw(ports)
    if draw(st.integers(0, 3)):
        kernel("ip", "link", "set", "dev", IF, "up")
    for command in draw(st.lists(st.sampled_from(hand_commands(IF)), max_size=8)):
        with contextlib.suppress(RefusedByKernel):
            kernel(*command)
    for key in draw(st.lists(keys, unique=True)):
        words = ["peer", key, "persistent-keepalive", str(draw(keepalives))]
        words += ["allowed-ips", ",".join(draw(st.lists(st.sampled_from(OWNED), max_size=3, unique=True)))]
        if draw(st.booleans()):
            words += ["endpoint", draw(endpoints)]
        kernel("wg", "set", IF, *words)
        live = kernel.peers[key]
        kernel.peers[key] = live._replace(handshake=draw(st.sampled_from((0, 1_800_000_000))), rx=draw(st.integers(0, 999)))
    kernel.ran = []
    return kernel


@st.composite
def wishes(draw: st.DrawFn, kernel: Kernel) -> Desired:
    """An interface as `desire` asks for it: one address of a kind, routes that hold their networks, nothing owned twice."""
    kind = draw(st.sampled_from(("v4", "v6", "dual")))
    choice = {version: [text for text in HAND_ADDRESSES if (":" in text) == (version == "v6")] for version in ("v4", "v6")}
    chosen = [draw(st.sampled_from(choice[version])) for version in ("v4", "v6") if kind in (version, "dual")]
    addresses = frozenset(text for text in chosen if not text.endswith(("/32", "/128")))
    routes = networks_of(addresses) | frozenset(draw(st.lists(st.sampled_from(HAND_ROUTES), max_size=5)))
    owned = {text: draw(keys) for text in draw(st.lists(st.sampled_from(OWNED), unique=True))}
    there = draw(st.lists(keys, unique=True))
    peers: dict[str, Peer] = {}
    for key in there:
        mine = frozenset(text for text, owner in owned.items() if owner == key)
        wish = Peer(key, draw(st.one_of(st.just(""), endpoints)), mine, draw(keepalives))
        live = kernel.peers.get(key)
        taken = {text for peer in peers.values() for text in peer.allowed}
        if live and draw(st.booleans()) and not live.allowed & taken:  # many peers are as they shall be
            wish = Peer(key, draw(st.sampled_from(("", live.endpoint))), live.allowed, live.keepalive)
            owned = {text: owner for text, owner in owned.items() if text not in live.allowed}
        peers[key] = wish
    mtu = draw(st.sampled_from((1280, 1420)))
    return Desired(IF, PRIVATE, draw(ports), mtu, addresses, routes, peers)


@st.composite
def changes(draw: st.DrawFn) -> tuple[Kernel, Desired]:
    """An interface as it is, and as it shall be."""
    kernel = draw(kernels())
    return kernel, draw(wishes(kernel))


def differs(actual: Actual, wish: Peer) -> bool:
    """Whether a peer is not as it shall be."""
    live = actual.peers.get(wish.key)
    if live is None:
        return True
    return (live.allowed, live.keepalive) != (wish.allowed, wish.keepalive) or wish.endpoint not in ("", live.endpoint)
