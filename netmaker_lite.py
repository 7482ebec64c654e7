#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""netmaker-lite: the server of a WireGuard mesh for routers, NAS boxes and small machines.

It knows the networks, their nodes and who may join; the agents (netclient_lite.py) ask it what their
mesh looks like and configure WireGuard themselves. No packet of the mesh passes through it, and the
mesh goes on without it.

    netmaker_lite.py network add default --range 10.20.30.0/24
    netmaker_lite.py serve                      listens on port 8081, prints the key that agents pin
    netmaker_lite.py key add default            prints the line that joins a machine
    netmaker_lite.py node list default          who is in it
    netmaker_lite.py backup FILE                a consistent copy, also while it runs

Every command works on the database directly, beside a running server or without one. Data come in
through the command line, the routes (one table) and the settings; they leave through the views, the
routes' answers and the database. Between them nothing sees a raw request.

Files, all in one folder (/var/lib/netmaker-lite, --data DIR or NETMAKER_DATA): netmaker.db, server.key
(0600; lose it and every agent must join again), netmaker.env (settings, if there), serve.lock.

Contents
    IMPORTS     the standard library, bottle, peewee, PyNaCl, and what must be the same in the agent
    SETTINGS    the table of settings; flag, environment, file, default
    ERRORS      what can go wrong, each with its HTTP status
    ADDRESSES   ranges, host numbers and which address is next; pure
    TOKENS      the server's key, access keys, challenges
    MODELS      the tables and their numbered migrations
    STORE       connections, and a change as one batch of conditional statements
    MESH        what nodes hear of each other: records, settings, observed endpoints; pure
    MEMBERS     the networks in memory, proven fresh by one keyed read
    ACTIONS     one function for each thing that an administrator or an agent can do
    AGENTS      the agent protocol: join, exchange, look (docs/protocol.md)
    VIEWS       rows to JSON objects with the original's field names, text to values
    ROUTES      the table of routes, each with the role that it needs
    SERVE       sockets, web servers, housekeeping
    CLI         the table of commands, the parser, main
"""

from __future__ import annotations

__version__ = "0.1.0"

# --------------------------------------------------------------------------------------------------
# IMPORTS
# --------------------------------------------------------------------------------------------------

import os
import sys

if "serve" in sys.argv[1:] and os.environ.get("SERVER_BACKEND") == "gevent":
    # gevent replaces sockets and locks, which works only before others have imported them (bottle
    # does the same for the same reason). A setting from the file comes here by a new start.
    import gevent.monkey

    gevent.monkey.patch_all()

import argparse
import bisect
import fcntl
import ipaddress
import json
import logging
import random
import re
import resource
import secrets
import signal
import socket
import socketserver
import sqlite3
import threading
import time
from functools import partial
from hashlib import blake2b
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    NoReturn,
    Sequence,
    Union,
)

try:
    import bottle
    import nacl.secret
    import peewee
except ImportError as missing:
    sys.stderr.write(
        "netmaker-lite: the server needs %s, which is not installed here: "
        "pip install bottle peewee pynacl waitress\n" % missing.name
    )
    raise SystemExit(1) from None

import netclient_lite as agent
from netclient_lite import (
    BadAnswer,
    Invalid,
    b64,
    check_address,
    check_key,
    check_name,
    check_network,
    check_port,
    endpoint,
    fold_name,
    is_public,
    label_key,
    mac,
    split_endpoint,
    unb64,
    unseal,
)

Row = Dict[str, Any]  # a row of the database by column
log = logging.getLogger("netmaker-lite")

# --------------------------------------------------------------------------------------------------
# SETTINGS
# --------------------------------------------------------------------------------------------------


def whole(low: int, high: int) -> Callable[[str], int]:
    """A check of texts: a whole number from one to another."""

    def checked(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise Invalid("takes a whole number from %d to %d, not %r" % (low, high, text))
        return int(text)

    return checked


def one_of(*names: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            raise Invalid("%r is not supported here: there is %s" % (text, ", ".join(names)))
        return text

    return checked


def check_proxies(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    try:
        return tuple(ipaddress.ip_network(word, strict=False) for word in text.replace(",", " ").split())
    except ValueError as bad:
        raise Invalid(str(bad)) from bad


def check_host(text: str) -> str:
    """A host name or an IP address, with or without brackets."""
    if not re.fullmatch(r"[A-Za-z0-9._-]*|\[?[0-9A-Fa-f:.]+\]?", text):
        raise Invalid("neither a host name nor an address")
    return text.strip("[]")


def check_urls(text: str) -> tuple[str, ...]:
    """Server addresses for tokens: URLs, or HOST:PORT."""
    words = text.replace(",", " ").split()
    urls = tuple((word if "://" in word else "http://" + word).rstrip("/") for word in words)
    try:
        return tuple(url for url in urls if agent.split_url(url))
    except ValueError as bad:
        raise Invalid(str(bad)) from bad


class Setting(NamedTuple):
    """One setting: its name in environment and file, its default, what it does, how it is read."""

    name: str
    default: str
    help: str
    check: Callable[[str], Any] = str


SETTINGS = (
    Setting("NETMAKER_DATA", "/var/lib/netmaker-lite", "the data folder"),
    Setting("SERVER_BIND", "0.0.0.0", "address to listen on; :: for IPv6 and IPv4"),  # noqa: S104
    Setting("API_PORT", "8081", "port to listen on", whole(1, 65535)),
    Setting("SERVER_HOST", "", "name or address that tokens carry (default: the default route's)", check_host),
    Setting("SERVER_API_CONN_STRING", "", "HOST:PORT or URL for tokens instead, comma-separated", check_urls),
    Setting("SERVER_BACKEND", "waitress", "waitress, gevent or wsgiref", one_of("waitress", "gevent", "wsgiref")),
    Setting("SERVER_KEY_FILE", "", "the server's key (default: server.key in the data folder)"),
    Setting("DATABASE", "sqlite", "where the data are kept: sqlite", one_of("sqlite")),
    Setting("CHECKIN_INTERVAL", "15", "seconds between two check-ins of an agent", whole(2, 100000)),
    Setting("DEFAULT_NODE_LIMIT", "999999999", "nodes that a new network may have", whole(0, 1 << 53)),
    Setting("TRUSTED_PROXIES", "", "addresses or ranges whose X-Forwarded-For is believed", check_proxies),
    Setting("POLL_LIMIT", "64", "long-polls held at once", whole(1, 100000)),
    Setting("VERBOSITY", "1", "0 errors, 1 warnings, 2 events, 3 everything", whole(0, 3)),
)
SETTING_NAMES = frozenset(each.name for each in SETTINGS)
SETTINGS_FILE = "netmaker.env"
FLAGS = {"data": "NETMAKER_DATA", "host": "SERVER_BIND", "port": "API_PORT"}  # of the command line


def read_settings_file(path: str, doubts: list[str]) -> dict[str, str]:
    """NAME=value lines; # starts a comment; quotes around the value go. What means nothing goes to `doubts`."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            lines = [line.strip() for line in stream]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:
        raise  # main says whose it is
    except OSError as problem:
        raise Invalid("cannot read %s: %s" % (path, problem.strerror)) from problem
    found = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        name = name.replace("export ", "").strip()
        if not line or line.startswith("#"):
            continue
        found[name] = value.strip().strip("'\"")
        if not equals:
            doubts.append("%s, line %d: %r is not NAME=value" % (path, number, line.split()[0]))
        elif name not in SETTING_NAMES:
            doubts.append("%s, line %d: there is no setting %s" % (path, number, name))
    return found


class Settings:
    """What holds for this process: flag over environment over file over default, all of it checked."""

    def __init__(self, flags: Mapping[str, str], environment: Mapping[str, str]) -> None:
        given = {**environment, **flags}
        self.data = given.get("NETMAKER_DATA") or SETTINGS[0].default
        self.doubts: list[str] = []  # what the file says in vain
        read = read_settings_file(os.path.join(self.data, SETTINGS_FILE), self.doubts)
        found = {**read, **given, "NETMAKER_DATA": self.data}
        self._values: dict[str, Any] = {}
        for setting in SETTINGS:
            text = found.get(setting.name, setting.default)
            try:
                self._values[setting.name] = setting.check(text)
            except Invalid as bad:
                raise Invalid("%s=%s: %s" % (setting.name, text, bad)) from bad

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @property
    def key_file(self) -> str:
        return self["SERVER_KEY_FILE"] or os.path.join(self.data, "server.key")


# --------------------------------------------------------------------------------------------------
# ERRORS
# --------------------------------------------------------------------------------------------------
# A bad value is the agent's Invalid, 400: both files speak of bad values in the same sentences.


class ServerError(Exception):
    """An expected failure: one sentence with cause and cure, no traceback."""

    http = 500


class Denied(ServerError):
    """Not yours."""

    http = 403


class Missing(ServerError):
    """None such."""

    http = 404


class Clash(ServerError):
    """Something else is already there."""

    http = 409


class UsedUp(ServerError):
    """It was good once."""

    http = 410


class TooLarge(ServerError):
    """More bytes than we parse."""

    http = 413


class SlowDown(ServerError):
    """Too many of these."""

    http = 429


class Busy(ServerError):
    """Not now."""

    http = 503


def http_status(problem: Exception) -> int:
    """The HTTP status of an expected failure."""
    return problem.http if isinstance(problem, ServerError) else 400


# --------------------------------------------------------------------------------------------------
# ADDRESSES
# --------------------------------------------------------------------------------------------------
# A node has one host number in a network; its IPv4 and IPv6 addresses are that number added to the two
# ranges, as long as nobody wishes otherwise. Numbers are handed out upwards, then the longest released
# address comes first: no scan, and an address is not given to somebody else the day it becomes free.

IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
PREFIXES = {4: (8, 30), 6: (48, 126)}
EXAMPLES = {4: "10.20.30.0/24", 6: "fd00:20:30::/64"}


def check_range(text: str, version: int) -> str:
    """The canonical text of a network's range; Invalid with a sentence when it cannot be one."""
    try:
        block: IPNetwork = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError as bad:
        raise Invalid("%r is no range: ADDRESS/BITS, like %s" % (text, EXAMPLES[version])) from bad
    shortest, longest = PREFIXES[version]
    if block.version != version:
        raise Invalid("%s is no IPv%d range: give it with --range%s" % (text, version, "6" if version == 4 else ""))
    if not shortest <= block.prefixlen <= longest:
        raise Invalid("%s has /%d: from /%d to /%d can be used" % (text, block.prefixlen, shortest, longest))
    if block.is_loopback or block.is_multicast or block.is_link_local or block.is_unspecified:
        raise Invalid("%s is a loopback, multicast or link-local range: take a private one" % text)
    return str(block)


def overlap(a: str, b: str) -> bool:
    """Whether two ranges share an address; "" shares none."""
    if not a or not b:
        return False
    one, other = ipaddress.ip_network(a), ipaddress.ip_network(b)
    return one.version == other.version and one.overlaps(other)


class Pool(NamedTuple):
    """The addresses of one range that nodes may have: host numbers 1 to `last`.

    Number 0 is the network address (IPv6: the routers' anycast), the one after `last` the broadcast
    address. Neither is ever given out.
    """

    version: int
    base: int
    last: int

    @property
    def text(self) -> str:
        bits = 32 if self.version == 4 else 128
        return "%s/%d" % (self.address(0), bits - (self.last + 1).bit_length())

    def address(self, host: int) -> str:
        whole = self.base + host
        return str(ipaddress.IPv4Address(whole) if self.version == 4 else ipaddress.IPv6Address(whole))

    def host(self, address: str) -> int:
        """The host number of an address, 0 when it is not one of the pool's."""
        parsed = ipaddress.ip_address(address)
        number = int(parsed) - self.base
        return number if parsed.version == self.version and 0 < number <= self.last else 0


def pool(text: str) -> Pool:
    block = ipaddress.ip_network(text)
    return Pool(block.version, int(block.network_address), block.num_addresses - 2)


def pools(*ranges: str) -> tuple[Pool, ...]:
    return tuple(pool(text) for text in ranges if text)


# What is known of an address: a node has it (True), it was released (False), nobody ever had it (None).
Held = Callable[[str], Union[bool, None]]
Released = Callable[[], Iterable[str]]  # the longest released address first


class Placement(NamedTuple):
    """Addresses for a node, in the order of the pools, and where to go on next time."""

    addresses: tuple[str, ...]
    cursor: int


def next_free(ranges: Sequence[Pool], cursor: int, held: Held, released: Released) -> tuple[int, int]:
    """(host number that is free in every pool, new cursor); Clash when there is none."""
    last = min(each.last for each in ranges)
    for host in range(cursor, last + 1):
        if all(held(each.address(host)) is None for each in ranges):
            return host, host + 1
    for address in released():
        host = max(each.host(address) for each in ranges)
        if 0 < host <= last and not any(held(each.address(host)) for each in ranges):
            return host, max(cursor, last + 1)
    raise Clash("every address of the network is taken: remove nodes, or add another network")


def place(ranges: Sequence[Pool], cursor: int, wishes: Sequence[str], held: Held, released: Released) -> Placement:
    """Addresses for a new node: its wishes where they can be met, else the next free host number."""
    found = {}
    for wish in filter(None, wishes):
        home = next((each for each in ranges if each.host(wish)), None)
        if home is None:
            given = " and ".join(each.text for each in ranges) or "of the other family"
            raise Invalid("%s is no address that a node of this network can have: its range is %s" % (wish, given))
        if held(wish):
            raise Clash("the address %s is taken: choose another" % wish)
        found[home] = home.host(wish)
    open_ranges = [each for each in ranges if each not in found]
    for each in list(open_ranges):
        host = next(iter(found.values()), 0)
        if 0 < host <= each.last and held(each.address(host)) is None:
            found[each] = host
            open_ranges.remove(each)
    if open_ranges:
        host, cursor = next_free(open_ranges, cursor, held, released)
        found.update(dict.fromkeys(open_ranges, host))
    return Placement(tuple(each.address(found[each]) for each in ranges), cursor)


def check_routes(text: str, taken: Mapping[str, str]) -> str:
    """More allowed IPs of a node, comma-separated, canonical; no default route, nothing twice. `taken`: range → whose."""
    blocks: list[str] = []
    for word in text.replace(",", " ").split():
        try:
            block = ipaddress.ip_network(word, strict=False)
        except ValueError as bad:
            raise Invalid("%r is no range: ADDRESS/BITS, like 192.168.7.0/24" % word) from bad
        if block.prefixlen == 0:
            raise Invalid("%s would send all traffic of every node there: name the ranges" % word)
        blocks.append(str(block))
    for block_text in blocks:
        other = next((range_ for range_ in taken if overlap(block_text, range_)), None)
        if other:
            raise Clash("%s overlaps %s, which is %s: choose another" % (block_text, other, taken[other]))
        if blocks.count(block_text) > 1:
            raise Invalid("%s is there twice" % block_text)
    return ",".join(blocks)


def free_name(wish: str, taken: Iterable[str]) -> str:
    """The wish, or the wish with -2, -3, … when it is taken."""
    names = set(taken)
    if wish not in names:
        return wish
    number = 2
    while "%s-%d" % (wish[: 61 - len(str(number))], number) in names:
        number += 1
    return "%s-%d" % (wish[: 61 - len(str(number))], number)


# --------------------------------------------------------------------------------------------------
# TOKENS
# --------------------------------------------------------------------------------------------------


def write_private(path: str, data: bytes, replace: bool) -> bool:
    """Write a file that is 0600 from its first byte and appears whole; False when it is already there."""
    temporary = "%s.%s" % (path, secrets.token_hex(4))
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            os.replace(temporary, path)
            return True
        os.link(temporary, path)  # unlike a rename it fails when somebody else was first
    except FileExistsError:
        return False
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return True


def new_private() -> bytes:
    """A private key whose pin can stand after a flag: it begins with no `-`."""
    while True:
        private = secrets.token_bytes(agent.KEY_BYTES)
        if not b64(agent.public_key(private)).startswith("-"):
            return private


class ServerKey:
    """The server's X25519 key and what is derived from it. Its public half is the pin."""

    def __init__(self, private: bytes) -> None:
        if len(private) != agent.KEY_BYTES:
            raise Invalid("the server's key is not 32 bytes of base64url: restore server.key from a backup")
        self.private = private
        self.pin = agent.public_key(private)
        self._box = nacl.secret.SecretBox(self._derived(b"netmaker-lite access keys"))
        self._challenges = self._derived(b"netmaker-lite challenges")

    @classmethod
    def load(cls, path: str) -> ServerKey:
        """Read the key, making it at the first start; of two starts at once both get the same."""
        try:
            if not os.path.exists(path):
                write_private(path, b64(new_private()).encode() + b"\n", False)
            with open(path, encoding="ascii") as stream:
                return cls(unb64(stream.read().strip()))
        except PermissionError:
            raise
        except OSError as problem:
            raise ServerError("cannot use %s: %s" % (path, problem.strerror)) from problem
        except ValueError as bad:
            raise ServerError("%s is damaged (%s): restore it from a backup" % (path, bad)) from bad

    def _derived(self, label: bytes) -> bytes:
        return blake2b(label, key=self.private, digest_size=32).digest()

    def shared(self, public: bytes) -> bytes:
        return agent.x25519(self.private, public)

    def seal(self, key_id: str, secret: str) -> str:
        """An access key's secret as the database keeps it: of no use without server.key."""
        return b64(bytes(self._box.encrypt((key_id + "." + secret).encode())))

    def unseal(self, key_id: str, sealed: str) -> bytes:
        """The secret of an access key; Missing when it was sealed by another server key."""
        try:
            found, _, secret = bytes(self._box.decrypt(unb64(sealed))).decode().partition(".")
            if found == key_id:
                return unb64(secret)
        except Exception:  # PyNaCl's CryptoError and ValueError: it does not open
            log.warning("the access key %s was made with another server.key", key_id)
        raise Denied("the access key is not this server's: ask for another")

    def challenge(self, node: str, number: str, address: str) -> str:
        """What only somebody can know who gets our answers at that address."""
        text = " ".join((node, number, address)).encode()
        return b64(blake2b(text, key=self._challenges, digest_size=16).digest())


def check_lifetime(text: str) -> int:
    """Seconds of `90s`, `30m`, `24h`, `7d`."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if not found or int(found[1]) == 0:
        raise Invalid("%r is no time: a number and s, m, h, d or w, like 24h" % text)
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def join_command(token: str) -> str:
    return "netclient_lite.py join -t " + token


# --------------------------------------------------------------------------------------------------
# MODELS
# --------------------------------------------------------------------------------------------------
# The schema. Values travel as rows (dicts and tuples): a model instance costs a hundred times as much.

PENDING, ACTIVE, DISABLED, EXPIRED, REMOVED = "pending", "active", "disabled", "expired", "removed"


def _text(**options: Any) -> peewee.TextField:
    return peewee.TextField(default="", **options)


def _number(**options: Any) -> peewee.BigIntegerField:
    return peewee.BigIntegerField(**{"default": 0, **options})


class Meta(peewee.Model):
    """What there is once: schema version, incarnation, pin, server URLs, stamp of the network list."""

    key = peewee.TextField(primary_key=True)
    value = peewee.TextField()


class Network(peewee.Model):
    """A network. (counter, tag) is its word; `stamp` is the id of the last change, see Batch."""

    id = peewee.TextField(primary_key=True)
    display = _text()
    range = _text()
    range6 = _text()
    cursor = _number(default=1)
    counter = _number()
    tag = _text()
    stamp = _text()
    settings = _number()  # counter of the last change of what every node's own settings show
    members = _number()  # nodes that count against the limit: all but pending and removed ones
    node_limit = _number()
    port = _number(default=51821)
    keepalive = _number(default=20)
    mtu = _number(default=1280)
    interface = _text()
    interval = _number(null=True, default=None)
    punch = peewee.BooleanField(default=True)
    manual = peewee.BooleanField(default=False)
    is_local = peewee.BooleanField(default=False)
    local_range = _text()
    created = _number()
    modified = _number()
    nodes_modified = _number()


class Node(peewee.Model):
    """A machine's membership in one network. Addresses are "" where there is none."""

    id = peewee.TextField(primary_key=True)
    network = peewee.TextField()
    auth = peewee.TextField()  # public half of the key that the agent made for this membership, b64
    look = peewee.TextField(unique=True)
    state = peewee.TextField()
    name = peewee.TextField()
    key = peewee.TextField()
    ip = _text()
    ip6 = _text()
    ips = _text()
    static = _text()
    port = _number()
    fixed = peewee.BooleanField(default=False)
    source = _text()  # address that its requests come from
    public = _text()  # what others may reach of that, "" when nothing
    at = _text()
    at_changed = _number()
    local = _text()
    lan = _text()
    os = _text()
    version = _text()
    machine = _text()
    machine_changed = _number()
    keepalive = _number(null=True, default=None)
    mtu = _number(null=True, default=None)
    dns = peewee.BooleanField(default=True)
    roaming = peewee.BooleanField(default=True)
    forwarding = peewee.BooleanField(default=True)
    punch = peewee.BooleanField(default=True)
    is_local = peewee.BooleanField(default=False)
    expires = _number(null=True, default=None, index=True)
    created = _number()
    modified = _number()
    last_seen = _number()
    confirmed = peewee.BooleanField(default=False)  # has made an exchange: its join is over
    epoch = _number()
    sequence = _number(default=-1)
    changed = _number()  # counters of the last change: of its record, of its own settings, of its state
    own_changed = _number()
    since = _number()
    rejected = _text()
    removed = _number()
    farewell = _text()
    next_key = _text()  # what it will have after a refresh of its key
    keyed = peewee.BooleanField(default=False)  # its user gave it its key
    refresh = _text()  # how far that is, and since when (switching: at what time it is to happen)
    refresh_at = _number()


class Lease(peewee.Model):
    """An address that a node has, or had (node is null)."""

    network = peewee.TextField()
    address = peewee.TextField()
    node = peewee.TextField(null=True)
    released = _number(null=True, default=None)

    class Meta:
        primary_key = peewee.CompositeKey("network", "address")


class AccessKey(peewee.Model):
    """The right to join, with uses and expiry. A used-up one stays, so that it can be called so."""

    id = peewee.TextField(primary_key=True)
    network = peewee.TextField()
    name = peewee.TextField()
    secret = peewee.TextField()
    uses = _number(null=True, default=None)  # left; null: unlimited
    expires = _number(null=True, default=None)
    created = _number()

    class Meta:
        table_name = "access_key"


class Revision(peewee.Model):
    """The words that a network has had, as far back as deltas reach."""

    network = peewee.TextField()
    counter = _number()
    tag = peewee.TextField()

    class Meta:
        primary_key = peewee.CompositeKey("network", "counter")


class Gone(peewee.Model):
    """When a node went out of the others' lists; kept as long as the history."""

    network = peewee.TextField()
    node = peewee.TextField()
    counter = _number()

    class Meta:
        primary_key = peewee.CompositeKey("network", "node")


class Observed(peewee.Model):
    """What an observer reports of a node: the endpoint of its fresh handshakes, "" for none at all."""

    network = peewee.TextField()
    node = peewee.TextField()
    observer = peewee.TextField(index=True)
    endpoint = peewee.TextField()

    class Meta:
        primary_key = peewee.CompositeKey("network", "node", "observer")


class Joined(peewee.Model):
    """Auth keys that have joined, so that a captured join makes no second node."""

    network = peewee.TextField()
    auth = peewee.TextField()
    access_key = peewee.TextField()
    node = peewee.TextField(index=True)

    class Meta:
        primary_key = peewee.CompositeKey("network", "auth")


NOT_REMOVED = peewee.SQL("state != 'removed'")  # as text: older peewees bind values here, which no database takes
Node.add_index(Node.index(Node.network, Node.auth, unique=True))
Node.add_index(Node.index(Node.network, Node.name, unique=True, where=NOT_REMOVED, name="node_name"))
Node.add_index(Node.index(Node.network, Node.key, unique=True, where=NOT_REMOVED, name="node_key"))
Node.add_index(Node.index(Node.network, Node.changed))
Node.add_index(Node.index(Node.network, Node.own_changed))
Node.add_index(Node.index(Node.network, Node.state))
Node.add_index(Node.index(Node.source))
Lease.add_index(Lease.index(Lease.network, Lease.node, Lease.released))
AccessKey.add_index(AccessKey.index(AccessKey.network, AccessKey.name, unique=True))

MODELS = (Meta, Network, Node, Lease, AccessKey, Revision, Gone, Observed, Joined)
SCHEMA = 2
MIGRATIONS: dict[int, tuple[str, ...]] = {  # version → the statements that lead to it from the one before
    2: (
        "ALTER TABLE node ADD COLUMN next_key TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE node ADD COLUMN keyed BOOLEAN NOT NULL DEFAULT FALSE",
        "ALTER TABLE node ADD COLUMN refresh TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE node ADD COLUMN refresh_at BIGINT NOT NULL DEFAULT 0",
    ),
}

# --------------------------------------------------------------------------------------------------
# STORE
# --------------------------------------------------------------------------------------------------
# Every change is one short transaction, built as a list of statements (Batch): the first is a
# conditional UPDATE that holds all preconditions and stamps its row with the change's random id; the
# others apply only where that stamp stands. So nothing is read now and written later without a
# condition, and a list can be sent as one piece to a database without interactive transactions.
#
# Two connections for the whole process, each behind a lock: one only reads, mostly the words of
# networks, and in WAL mode never waits for the other, which writes. A connection for each of the web
# server's threads would cost more memory than all nodes together.

TABLES = ("node", "lease", "access_key", "revision", "gone", "observed", "joined")  # with a column `network`
HISTORY = 4096  # words kept: how far back deltas reach
TRIES = 20  # of a change whose preconditions another process has upset meanwhile
DATABASE_FILE = "netmaker.db"


def composed(template: str, *names: str) -> str:
    """SQL with table and column names of this file put in. What comes from outside is always a bound value."""
    return template % names


class Expression(NamedTuple):
    """SQL in the place of a value."""

    sql: str
    values: tuple[Any, ...] = ()


class Batch:
    """A change as a list of statements; `when` are the preconditions, as SQL on the stamped row."""

    def __init__(self, table: str, key: str, identity: str, stamp: str = "stamp") -> None:
        self.stamp = secrets.token_hex(8)
        self._row = (table, key, stamp)
        self._identity = identity
        self._set = ["%s = ?" % stamp]
        self._set_values: list[Any] = [self.stamp]
        self._when = ["%s = ?" % key]
        self._when_values: list[Any] = [identity]
        self._rest: list[tuple[str, list[Any], bool]] = []

    def set(self, assignment: str, *values: Any) -> None:
        """A column of the stamped row."""
        self._set.append(assignment)
        self._set_values += values

    def when(self, condition: str, *values: Any) -> None:
        """A precondition of the whole change."""
        self._when.append(condition)
        self._when_values += values

    def insert(self, table: str, values: Mapping[str, Any]) -> None:
        marks, bound = self._marks(values)
        columns = ", ".join('"%s"' % name for name in values)
        sql = composed("INSERT INTO %s (%s) SELECT %s WHERE ", table, columns, ", ".join(marks))
        self._add(sql, bound, True)

    def update(self, table: str, values: Mapping[str, Any], where: str, *bound: Any, must: bool = False) -> None:
        """`must`: exactly one row has to change, or the whole batch does not apply."""
        marks, assigned = self._marks(values)
        pairs = ", ".join('"%s" = %s' % pair for pair in zip(values, marks))
        sql = composed("UPDATE %s SET %s WHERE %s AND ", table, pairs, where)
        self._add(sql, [*assigned, *bound], must)

    def delete(self, table: str, where: str, *bound: Any) -> None:
        self._add(composed("DELETE FROM %s WHERE %s AND ", table, where), list(bound), False)

    @staticmethod
    def _marks(values: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        marks: list[str] = []
        bound: list[Any] = []
        for value in values.values():
            marks.append(value.sql if isinstance(value, Expression) else "?")
            bound += value.values if isinstance(value, Expression) else [value]
        return marks, bound

    def _add(self, sql: str, bound: list[Any], must: bool) -> None:
        stamped = composed("EXISTS (SELECT 1 FROM %s WHERE %s = ? AND %s = ?)", *self._row)
        self._rest.append((sql + stamped, [*bound, self._identity, self.stamp], must))

    def statements(self) -> Iterator[tuple[str, list[Any], bool]]:
        parts = (self._row[0], ", ".join(self._set), " AND ".join(self._when))
        yield composed("UPDATE %s SET %s WHERE %s", *parts), [*self._set_values, *self._when_values], True
        yield from self._rest


class NetworkBatch(Batch):
    """A change of a network. With `heard` some node must hear of it: the word moves."""

    def __init__(self, network: str, now: float, heard: bool = True) -> None:
        super().__init__("network", "id", network)
        self.network = network
        self.counter = Expression("(SELECT counter FROM network WHERE id = ?)", (network,))
        if not heard:
            return
        self.set("counter = counter + 1, tag = ?, nodes_modified = ?", secrets.token_hex(4), int(now))
        self._add(
            "INSERT INTO revision (network, counter, tag) SELECT id, counter, tag FROM network WHERE id = ? AND ",
            [network],
            True,
        )
        for table in ("revision", "gone"):
            oldest = "counter <= (SELECT counter FROM network WHERE id = ?) - ?"
            self.delete(table, "network = ? AND " + oldest, network, network, HISTORY)


class NetworkListBatch(Batch):
    """A change of which networks there are: stamped in the row of the table `meta` for that."""

    def __init__(self) -> None:
        super().__init__("meta", "key", "networks", "value")


class _Upset(Exception):
    """A precondition did not hold; takes the transaction back."""


def _connection(path: str) -> peewee.SqliteDatabase:
    pragmas = {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL: what an agent was told must stand after a power cut
        "foreign_keys": 1,
        "busy_timeout": 5000,
        "cache_size": -1024,
    }
    return peewee.SqliteDatabase(path, pragmas=pragmas, thread_safe=False, check_same_thread=False, timeout=5)


def new_incarnation() -> str:
    return b64(secrets.token_bytes(8))


def make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as problem:
        sentence = "cannot make the data folder %s (%s): run this with sudo, or name another with --data"
        raise ServerError(sentence % (folder, problem.strerror)) from problem


class Store:
    """The database of one data folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, DATABASE_FILE)
        self.committed: Callable[[], None] = lambda: None  # told after every change of this process
        self._writing, self._reading = threading.RLock(), threading.RLock()
        self.writer, self.reader = _connection(self.path), _connection(self.path)
        make_folder(folder)
        try:
            self._open()
        except BaseException as problem:
            self.close()
            if isinstance(problem, PermissionError) or not isinstance(problem, (OSError, peewee.PeeweeException)):
                raise
            raise ServerError(
                "cannot use the data folder %s (%s): run as its owner, or name another by --data" % (folder, problem)
            ) from problem

    def _open(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        alone = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:  # of two first starts at once one waits for the other
            fcntl.flock(alone, fcntl.LOCK_EX)
            self._prepare()
        finally:
            os.close(alone)
        self.incarnation = self.meta("incarnation")

    def close(self) -> None:
        with self._writing, self._reading:
            self.reader.close()
            self.writer.close()

    # ---- schema

    def _prepare(self) -> None:
        """Make the tables, or bring them to this program's version, keeping a copy of the file."""
        if "meta" not in self.writer.get_tables():
            self._create()
        found = int(self.meta("schema"))
        if found > SCHEMA:
            raise ServerError(
                "%s was written by a newer netmaker-lite (schema %d, this one knows %d): "
                "install that version" % (self.path, found, SCHEMA)
            )
        for version in range(found + 1, SCHEMA + 1):
            self.copy("%s.before-%d" % (self.path, version))
            with self.writer.atomic("IMMEDIATE"):
                for statement in MIGRATIONS[version]:
                    self._write(statement, ())
                self._write("UPDATE meta SET value = ? WHERE key = ?", (str(version), "schema"))
            log.warning("the database is of schema %d now", version)

    def _create(self) -> None:
        first = {"schema": str(SCHEMA), "incarnation": new_incarnation(), "networks": "", "pin": "", "urls": ""}
        with self.writer.atomic("IMMEDIATE"), self.writer.bind_ctx(MODELS):
            self.writer.create_tables(MODELS)
            for pair in first.items():
                self._write("INSERT INTO meta (key, value) VALUES (?, ?)", pair)

    # ---- reading

    @staticmethod
    def execute(connection: Any, sql: str, values: Sequence[Any] = ()) -> Any:
        """A statement with `?` for each value; another database's marks would be put in here."""
        return connection.execute_sql(sql, values)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._reading:
            return list(self.execute(self.reader, sql, values).fetchall())

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        with self._reading:
            found: tuple[Any, ...] | None = self.execute(self.reader, sql, values).fetchone()
            return found

    def word(self, network: str) -> tuple[int, str] | None:
        """(counter, tag) of a network: the one keyed read that proves what is in memory fresh."""
        return self.row("SELECT counter, tag FROM network WHERE id = ?", (network,))

    def select(self, query: Any) -> list[Row]:
        """The rows of a peewee query, for what is not on the hot path."""
        with self._reading:
            return list(query.dicts().execute(self.reader))

    def get(self, query: Any) -> Row | None:
        return next(iter(self.select(query.limit(1))), None)

    def meta(self, key: str) -> str:
        found = self.row("SELECT value FROM meta WHERE key = ?", (key,))
        return str(found[0]) if found else ""

    def held(self, network: str, address: str) -> bool | None:
        found = self.row("SELECT node FROM lease WHERE network = ? AND address = ?", (network, address))
        return None if found is None else found[0] is not None

    def released(self, network: str) -> list[str]:
        sql = "SELECT address FROM lease WHERE network = ? AND node IS NULL ORDER BY released, address LIMIT 256"
        return [str(row[0]) for row in self.rows(sql, (network,))]

    # ---- writing

    def _write(self, sql: str, values: Sequence[Any]) -> int:
        return int(self.execute(self.writer, sql, values).rowcount)

    def set_meta(self, key: str, value: str) -> None:
        with self._writing:
            self._write("UPDATE meta SET value = ? WHERE key = ?", (value, key))

    def apply(self, batch: Batch) -> bool:
        """Commit a batch whole, or nothing of it when a precondition does not hold."""
        try:
            with self._writing, self.writer.atomic("IMMEDIATE"):
                for sql, values, must in batch.statements():
                    if self._write(sql, values) != 1 and must:
                        raise _Upset
        except (_Upset, peewee.IntegrityError):
            return False
        self.committed()
        return True

    def change(self, build: Callable[[], Batch | None]) -> None:
        """Apply what `build` makes of the present state; again from a fresh look when that moved.

        `build` raises the sentence when the change cannot be made, and gives None when it is made
        already. Changes of this process queue up here, so only other processes can upset one.
        """
        for _ in range(TRIES):
            with self._writing:
                batch = build()
                if batch is None or self.apply(batch):
                    return
            time.sleep(random.uniform(0, 0.02))  # noqa: S311
        raise Busy("too much is changing at once: try again")

    def write_behind(self, seen: Iterable[tuple[int, int, int, int, str]]) -> None:
        """Store (last seen, epoch, sequence, sequence, node), many at once in one transaction."""
        with self._writing, self.writer.atomic("IMMEDIATE"):
            for values in seen:
                self._write(
                    "UPDATE node SET last_seen = ?, sequence ="
                    " CASE WHEN epoch = ? AND sequence < ? THEN ? ELSE sequence END WHERE id = ?",
                    values,
                )

    # ---- whole copies (SQLite's own backup interface)

    def _raw(self) -> sqlite3.Connection:
        connection: Any = self.writer
        raw: sqlite3.Connection = connection.connection()
        return raw

    def copy(self, path: str) -> None:
        """A consistent copy as one file, also while others write."""
        temporary = "%s.%s" % (path, secrets.token_hex(4))
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            target = sqlite3.connect(temporary)
            with self._writing:
                self._raw().backup(target)
            target.execute("PRAGMA journal_mode = delete")
            target.close()
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def replace(self, source: sqlite3.Connection) -> None:
        """Take over another database's contents, in one transaction."""
        with self._writing:
            source.backup(self._raw())
        self.incarnation = self.meta("incarnation")


# --------------------------------------------------------------------------------------------------
# MESH
# --------------------------------------------------------------------------------------------------
# What nodes hear of each other. Pure: values in, values out.


class NetworkState(NamedTuple):
    """A network as MESH and MEMBERS see it; the fields are columns."""

    id: str
    range: str
    range6: str
    counter: int
    tag: str
    settings: int
    port: int
    keepalive: int
    mtu: int
    interface: str
    interval: int | None
    punch: bool
    is_local: bool

    @property
    def word(self) -> str:
        return "%d.%s" % (self.counter, self.tag)


class NodeState(NamedTuple):
    """A node as MESH and MEMBERS see it; the fields are columns."""

    id: str
    network: str
    auth: str
    look: str
    state: str
    name: str
    key: str
    ip: str
    ip6: str
    ips: str
    static: str
    port: int
    source: str
    public: str
    at: str
    at_changed: int
    local: str
    lan: str
    keepalive: int | None
    mtu: int | None
    dns: bool
    forwarding: bool
    punch: bool
    is_local: bool
    last_seen: int
    confirmed: bool
    epoch: int
    changed: int
    own_changed: int
    since: int
    farewell: str
    next_key: str = ""
    refresh: str = ""
    refresh_at: int = 0


# A change of these columns must be heard by the others, or by the node itself.
RECORD_COLUMNS = frozenset(
    ("name", "key", "next_key", "ip", "ip6", "ips", "static", "port", "public", "at", "local", "lan", "punch")
)
OWN_COLUMNS = frozenset(("name", "ip", "ip6", "port", "keepalive", "mtu", "dns", "forwarding", "punch", "is_local", "refresh"))


# How far the refresh of a node's key is (SPEC, §8): it waits for its turn; has to make a key; all shall list that; all change at
# the time told. Silent: it did not do its part in time, and others go first.
QUEUED, ASKED, LISTED, SWITCHING, SILENT = "queued", "asked", "listed", "switching", "silent"
PATIENCE = 600  # seconds for making a key, and for listing it
TRY_AGAIN = 3600  # seconds until a silent node that is back gets its turn again


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _endpoint(address: str, port: int) -> str:
    """An endpoint of an address, or of one that has its own port already; "" of nothing."""
    if not address or not re.fullmatch(r"[0-9a-f:]+|[0-9.]+", address):
        return address
    return endpoint(address, port)


def seen_endpoint(node: NodeState, network: NetworkState) -> str:
    """Where the server saw it. In a network inside one LAN public addresses are of no use."""
    return "" if network.is_local else _endpoint(node.public, node.port)


def record(node: NodeState, network: NetworkState) -> bytes:
    """What every node of the network hears of this one, the same bytes for all."""
    punch = network.punch and node.punch and not network.is_local
    fields = {
        "id": node.id,
        "name": node.name,
        "key": node.key,
        "next": node.next_key,
        "ip": node.ip,
        "ip6": node.ip6,
        "ips": node.ips.split(",") if node.ips else "",
        "static": _endpoint(node.static, node.port),
        "at": node.at if punch else "",
        "seen": seen_endpoint(node, network),
        "local": _endpoint(node.local, node.port),
        "lan": node.lan,
    }
    return dump({name: value for name, value in fields.items() if value})


def own_settings(node: NodeState, network: NetworkState) -> dict[str, Any]:
    """`me`: what only the node itself hears. The last five only where they are not the default."""
    fields: dict[str, Any] = {
        "name": node.name,
        "ip": node.ip,
        "ip6": node.ip6,
        "range": network.range,
        "range6": network.range6,
        "port": node.port,
        "keepalive": network.keepalive if node.keepalive is None else node.keepalive,
        "mtu": network.mtu if node.mtu is None else node.mtu,
        "interface": network.interface,
        "look": node.look,
    }
    unusual = {
        "dns": (bool(node.dns), True),
        "forwarding": (bool(node.forwarding), True),
        "punch": (bool(network.punch and node.punch), True),
        "local": (bool(network.is_local or node.is_local), False),
        "refresh": (node.refresh not in ("", QUEUED), False),
    }
    fields.update({name: value for name, (value, usual) in unusual.items() if value != usual})
    return fields


def parse_word(word: str) -> tuple[int, str]:
    """(counter, tag) of a word; (-1, "") of `-` and of what is none."""
    counter, _, tag = word.partition(".")
    return (int(counter), tag) if re.fullmatch("[0-9]{1,18}", counter) else (-1, "")


class Report(NamedTuple):
    """An endpoint of a node, and the address of the node that has a fresh handshake with it there."""

    endpoint: str
    source: str


def _usable(place: str, overlays: Sequence[str]) -> bool:
    address = split_endpoint(place)[0]
    parsed = ipaddress.ip_address(address)
    blocks = (ipaddress.ip_network(text) for text in overlays)
    inside = any(parsed.version == block.version and parsed in block for block in blocks)
    return is_public(address) and not inside


def observed_endpoint(node: NodeState, reports: Iterable[Report], overlays: Sequence[str], recorded: str) -> str:
    """The endpoint of a node that its peers see, "" for none worth giving out (SPEC, §8).

    An observer in the node's own LAN sees what others cannot use. Where the server saw a public
    address, only endpoints of that address count. Two ports at once are a hard NAT: every peer would
    see another one. `recorded`, the present one, stays when nobody reports anything.
    """
    seen = _endpoint(node.public, node.port)
    found = {report.endpoint for report in reports if report.source != node.source and _usable(report.endpoint, overlays)}
    if node.public:
        found = {place for place in found if split_endpoint(place)[0] == node.public}
        recorded = recorded if recorded and split_endpoint(recorded)[0] == node.public else ""
    if not found:
        return recorded
    if len({split_endpoint(place)[1] for place in found}) > 1:
        return ""
    best = recorded if recorded in found else min(found)
    return "" if best == seen else best


def next_refresh(node: NodeState, now: float, lead: int, here: bool, heard: bool, free: bool) -> tuple[str, int] | None:
    """The next state of a node's key refresh, and the time that goes with it; None for no change.

    lead: seconds in which every node that is here comes by; heard: all of them know the new key; free: no other one switches.
    """
    age = abs(now - node.refresh_at)  # also of a clock that went back
    if node.refresh == LISTED and here and free and (heard or age > PATIENCE):
        return SWITCHING, int(now) + lead + 1
    if node.refresh == SILENT:
        return (QUEUED, int(now)) if here and age > TRY_AGAIN else None
    return (SILENT, int(now)) if age > (2 * lead + 30 if node.refresh == SWITCHING else PATIENCE) else None


def free_port(wanted: int, taken: Iterable[int]) -> int:
    """The port a new node is told to listen on: no other node behind the same address may have it."""
    used = set(taken)
    while wanted in used:
        wanted = wanted + 1 if wanted < 65535 else 1024
    return wanted


# --------------------------------------------------------------------------------------------------
# MEMBERS
# --------------------------------------------------------------------------------------------------
# A cache of what the hot path needs. Nothing in it is believed until the network's word, read anew for
# each look and exchange, equals the word it was filled at; else the rows that changed since are read.

UNKNOWN = 1 << 62  # the sequence number of a node whose last one this process does not know


class Member:
    """One node in memory: its row, its keys, its record, and what is only written behind."""

    __slots__ = (
        "answer_key", "box", "dirty", "epoch", "have", "last_mac", "last_time", "mesh", "parked", "record",
        "request_key", "row", "seen", "sequence",
    )  # fmt: skip

    def __init__(self, mesh: Any, row: NodeState) -> None:
        self.mesh, self.row = mesh, row
        self.epoch, self.sequence = row.epoch, UNKNOWN
        self.last_mac, self.last_time = "", 0.0
        self.seen, self.dirty = row.last_seen, False
        self.have, self.parked = -1, 0.0  # the newest counter that it has applied; until when its look waits
        self.request_key = self.answer_key = self.record = b""
        self.box: Any = None

    def renew(self, row: NodeState) -> None:
        self.row, self.record = row, b""
        if row.epoch > self.epoch:
            self.epoch, self.sequence = row.epoch, UNKNOWN

    def see(self, now: float) -> None:
        self.seen, self.dirty = int(now), True


class Mesh:
    """One network in memory, at one word."""

    def __init__(self, state: NetworkState) -> None:
        self.state = state
        self.word = state.word
        self.members: dict[str, Member] = {}
        self.log: list[tuple[int, str]] = []  # (counter, node) in order, for deltas
        self.gone: dict[str, int] = {}
        self.refreshing: set[str] = set()  # nodes that are at the refresh of their key
        self.tags: dict[int, str] = {}  # of words that this network has had
        self.blobs: dict[int, bytes] = {}  # since which counter → what all nodes share of the answer
        self.lock = threading.RLock()

    def renew(self, state: NetworkState) -> None:
        if (state.punch, state.is_local) != (self.state.punch, self.state.is_local):
            for member in self.members.values():
                member.record = b""
        self.state, self.word = state, state.word
        self.blobs.clear()

    def note(self, counter: int, node: str) -> None:
        self.log.append((counter, node))
        if len(self.log) > 2 * len(self.members) + 64:
            self.log = sorted((member.row.changed, key) for key, member in self.members.items())

    def shared(self, since: int) -> bytes:
        """Records, and nodes that are gone, since a counter (-1: all): the members of the answer that all nodes share."""
        with self.lock:
            blob = self.blobs.get(since)
            if blob is None:
                blob = self._encoded(since)
                if len(self.blobs) < 256:
                    self.blobs[since] = blob
            return blob

    def _encoded(self, since: int) -> bytes:
        start = bisect.bisect_left(self.log, (since + 1, ""))
        changed = dict.fromkeys(node for _, node in self.log[start:])
        if since < 0:
            changed = dict.fromkeys(self.members)
        members = [self.members[node] for node in changed if node in self.members]
        active = [member for member in members if member.row.state == ACTIVE]
        parts = [b'"peers":[' + b",".join(map(self._record, active)) + b"]"]
        gone = [node for node, counter in self.gone.items() if counter > since >= 0]
        gone = [node for node in gone if not self._is_active(node)]
        if gone:
            parts.append(b'"gone":' + dump(gone))
        return b",".join(parts)

    def _record(self, member: Member) -> bytes:
        member.record = member.record or record(member.row, self.state)
        return member.record

    def _is_active(self, node: str) -> bool:
        member = self.members.get(node)
        return member is not None and member.row.state == ACTIVE


NODE_SELECT = composed("SELECT %s FROM node WHERE ", ", ".join(NodeState._fields))
NETWORK_SELECT = composed("SELECT %s FROM network WHERE id = ?", ", ".join(NetworkState._fields))


class Members:
    """All networks in memory, by network, node and look capability."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store, self.clock = store, clock
        self.meshes: dict[str, Mesh] = {}
        self.nodes: dict[str, Member] = {}
        self.looks: dict[str, Member] = {}
        self._lock = threading.RLock()

    def node(self, node: str) -> Member | None:
        return self.nodes.get(node) or self._find("id = ?", node)

    def by_look(self, capability: str) -> Member | None:
        return self.looks.get(capability) or self._find("look = ?", capability)

    def _find(self, condition: str, value: str) -> Member | None:
        """A node that is not in memory: just joined, or its network was never asked for."""
        with self._lock:  # reading inside: no older row may be put over a newer one
            found = self.store.row(NODE_SELECT + condition, (value,))
            if found is None:
                return None
            row = NodeState._make(found)
            if row.network not in self.meshes:
                self._load(row.network)
            mesh = self.meshes.get(row.network)
            return self._put(mesh, row) if mesh is not None else None

    def _put(self, mesh: Mesh, row: NodeState) -> Member:
        # what thousands of rows say alike is kept once: a database gives a copy with each
        public = row.source if row.public == row.source else row.public
        row = row._replace(network=mesh.state.id, state=sys.intern(row.state), public=public)
        member = self.nodes.get(row.id)
        if member is None:
            member = Member(mesh, row)
            self.nodes[row.id] = self.looks[row.look] = mesh.members[row.id] = member
        else:
            member.renew(row)
        at_it = row.refresh not in ("", QUEUED) and row.state == ACTIVE
        (mesh.refreshing.add if at_it else mesh.refreshing.discard)(row.id)
        return member

    def mesh(self, network: str) -> Mesh | None:
        """A network by its id, brought up to date."""
        if network not in self.meshes:
            self._load(network)
        if network in self.meshes:
            self.prove(self.meshes[network])
        return self.meshes.get(network)

    def reload(self, node: str) -> Member | None:
        """After a change of this process that moved no word: the node's row as it is now."""
        return self._find("id = ?", node)

    def forget(self, node: str) -> None:
        with self._lock:
            member = self.nodes.pop(node, None)
            if member is not None:
                self.looks.pop(member.row.look, None)
                member.mesh.members.pop(node, None)
                member.mesh.refreshing.discard(node)

    def prove(self, mesh: Mesh) -> bool:
        """Bring a network up to date; False when it is no more. One row read when nothing changed."""
        if self.store.word(mesh.state.id) == mesh.state[3:5]:
            return True
        with self._lock:  # another thread may have been faster: look again
            word = self.store.word(mesh.state.id)
            if word == mesh.state[3:5]:
                return True
            if word is not None and self._continues(mesh, word):
                self._catch_up(mesh)
                return True
            self._drop(mesh)  # the network is gone, or the database went back in time
            self._load(mesh.state.id)
            return word is not None

    def _continues(self, mesh: Mesh, word: tuple[int, str]) -> bool:
        sql = "SELECT tag FROM revision WHERE network = ? AND counter = ?"
        tag = self.store.row(sql, (mesh.state.id, mesh.state.counter))
        return word[0] > mesh.state.counter and tag == (mesh.state.tag,)

    def _drop(self, mesh: Mesh) -> None:
        for node in list(mesh.members):
            self.forget(node)
        self.meshes.pop(mesh.state.id, None)

    def _load(self, network: str) -> None:
        """All rows of a network. Tuples: models would cost 20 µs and a kilobyte each."""
        with self._lock:
            found = self.store.row(NETWORK_SELECT, (network,))
            if found is None:
                return
            mesh = Mesh(NetworkState._make(found))
            rows = self.store.rows(NODE_SELECT + "network = ? ORDER BY changed", (network,))
            for row in map(NodeState._make, rows):
                self._put(mesh, row)
                mesh.log.append((row.changed, row.id))
            mesh.gone = self._gone_since(network, -1)
            self.meshes[network] = mesh

    def _catch_up(self, mesh: Mesh) -> None:
        """The network's row first: a change that comes in between is then only read twice."""
        since, network = mesh.state.counter, mesh.state.id
        found = self.store.row(NETWORK_SELECT, (network,))
        if found is None:
            return
        sql = NODE_SELECT + "network = ? AND (changed > ? OR own_changed > ?) ORDER BY changed"
        rows = self.store.rows(sql, (network, since, since))
        gone = self._gone_since(network, since)
        with mesh.lock:
            mesh.renew(NetworkState._make(found))
            mesh.gone.update(gone)
            for row in map(NodeState._make, rows):
                self._put(mesh, row)
                if row.changed > since:
                    mesh.note(row.changed, row.id)
            oldest = mesh.state.counter - HISTORY
            if len(mesh.gone) > HISTORY:
                mesh.gone = {node: at for node, at in mesh.gone.items() if at > oldest}
            if len(mesh.tags) > HISTORY:
                mesh.tags = {counter: tag for counter, tag in mesh.tags.items() if counter > oldest}

    def _gone_since(self, network: str, since: int) -> dict[str, int]:
        sql = "SELECT node, counter FROM gone WHERE network = ? AND counter > ?"
        return dict(self.store.rows(sql, (network, since)))

    def in_history(self, mesh: Mesh, have: str) -> int:
        """The counter of a word that this network has had, as far back as deltas reach; else -1."""
        counter, tag = parse_word(have)
        if counter not in mesh.tags:
            sql = "SELECT tag FROM revision WHERE network = ? AND counter = ?"
            found = self.store.row(sql, (mesh.state.id, counter))
            if found is None:
                return -1
            mesh.tags[counter] = found[0]
        remembered = mesh.state.counter - HISTORY < counter <= mesh.state.counter
        return counter if remembered and mesh.tags[counter] == tag else -1

    def answer(self, member: Member, have: str) -> bytes | None:
        """What a node must hear that has applied `have`; None for nothing new."""
        mesh, row = member.mesh, member.row
        with mesh.lock:
            if have == mesh.word:
                return None
            parts = [b'"word":' + dump(mesh.word)]
            since = self.in_history(mesh, have)
            if row.state != ACTIVE:
                since = -1
                state = row.state if row.state == PENDING else DISABLED
                parts.append(b'"peers":[],"state":' + dump(state))
            elif since < 0 or row.since > since:
                since = -1
                parts.append(mesh.shared(-1))
            else:
                parts += [b'"from":' + dump(have), mesh.shared(since)]
            if max(row.own_changed, mesh.state.settings) > since:
                parts.append(b'"me":' + dump(own_settings(row, mesh.state)))
            rows = [mesh.members[node].row for node in list(mesh.refreshing) if node in mesh.members]
            times = {each.id: each.refresh_at - self.clock() for each in rows if each.refresh == SWITCHING}
            left = {node: round(seconds, 2) for node, seconds in times.items() if seconds > -60}  # not of a restored database
            if left:
                parts.append(b'"in":' + dump(left))
            return b"{" + b",".join(parts) + b"}"

    def dirty(self) -> list[tuple[int, int, int, int, str]]:
        """What is to be written behind; marked as written."""
        batch = []
        for member in list(self.nodes.values()):
            if member.dirty:
                member.dirty = False
                sequence = -1 if member.sequence == UNKNOWN else member.sequence
                batch.append((member.seen, member.epoch, sequence, sequence, member.row.id))
        return batch


# --------------------------------------------------------------------------------------------------
# ACTIONS
# --------------------------------------------------------------------------------------------------
# One function for each thing that can be done, one change each: values in, rows out. What an action
# needs to know it reads in `build`, what must still hold when it is committed it says in the batch.

PENDING_PER_NETWORK, PENDING_PER_SOURCE, PENDING_DAYS = 100, 5, 7
LEFT = "it left by itself"
LIVING = "id = ? AND state != 'removed'"


class Core:
    """What every action needs: settings, the database, the server's key, the time."""

    def __init__(self, settings: Settings, store: Store, key: ServerKey, clock: Callable[[], float] = time.time) -> None:
        self.settings, self.store, self.key, self.clock = settings, store, key, clock

    @property
    def now(self) -> int:
        return int(self.clock())


def is_there(path: str) -> bool:
    """Whether there is such a file; PermissionError where a folder hides that."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _own_key(settings: Settings, store: Store) -> ServerKey:
    """The server's key: the one that the database was made with."""
    known, path = store.meta("pin"), settings.key_file
    if known and not is_there(path):
        raise ServerError(
            "%s is missing: restore it (a backup --with-key holds it); lost for good, run netmaker-lite serve --new-key, "
            "and every agent joins again with --force" % path
        )
    key = ServerKey.load(path)
    if known not in ("", b64(key.pin)):
        raise ServerError(
            "%s is not the key that this database was made with (its pin is %s): restore that server.key" % (path, known)
        )
    store.set_meta("pin", b64(key.pin))
    return key


def open_core(settings: Settings, make: bool = True) -> Core:
    """The data folder of these settings; with `make` it is made where it is not there yet."""
    if not make and not is_there(os.path.join(settings.data, DATABASE_FILE)):
        raise Missing("there is no database in %s: name the server's folder with --data" % settings.data)
    store = Store(settings.data)
    try:
        return Core(settings, store, _own_key(settings, store))
    except BaseException:
        store.close()
        raise


def give_up_key(settings: Settings) -> int:
    """Forget a lost server key with the access keys that it sealed, and count them; the next start makes another."""
    if is_there(settings.key_file):
        raise Clash("%s is there, and --new-key is for a lost one: move it away first" % settings.key_file)
    store = Store(settings.data)
    try:
        lost = len(store.rows("SELECT id FROM access_key"))
        batch = NetworkListBatch()
        batch.delete("access_key", "id != ''")
        batch.update("meta", {"value": ""}, "key = 'pin'")
        store.apply(batch)
        return lost
    finally:
        store.close()


def blank(model: Any) -> Row:
    """A row of defaults."""
    return dict(model._meta.get_default_dict())


# ---- networks


def networks(core: Core) -> list[Row]:
    return core.store.select(Network.select().order_by(Network.id))


def need_network(core: Core, name: str) -> Row:
    found = core.store.get(Network.select().where(Network.id == name.lower()))
    if found is None:
        raise Missing("there is no network %s: `netmaker-lite network list` shows which there are" % name)
    return found


def _check_ranges(core: Core, own: Row) -> None:
    if not own["range"] and not own["range6"]:
        raise Invalid("a network needs a range: --range 10.20.30.0/24, --range6 fd00:20:30::/64, or both")
    sql = "SELECT id, range, range6 FROM network WHERE id != ?"
    for other, *ranges in core.store.rows(sql, (own["id"],)):
        for mine in (own["range"], own["range6"]):
            for theirs in ranges:
                if overlap(mine, theirs):
                    raise Clash("%s overlaps %s of the network %s: take another" % (mine, theirs, other))


def add_network(core: Core, name: str, values: Row) -> Row:
    """A network with the given columns; Clash when name or range is taken."""
    new = {**blank(Network), **values, "id": check_network(name), "tag": secrets.token_hex(4)}
    new.update(counter=1, settings=1, created=core.now, modified=core.now, nodes_modified=core.now)
    new["display"] = new["display"] or new["id"]
    new["interface"] = new["interface"] or "nm-" + new["id"]
    new["node_limit"] = values.get("node_limit", core.settings["DEFAULT_NODE_LIMIT"])

    def build() -> Batch:
        if core.store.row("SELECT 1 FROM network WHERE id = ?", (new["id"],)):
            raise Clash("there is a network %s already" % new["id"])
        _check_ranges(core, new)
        batch = NetworkListBatch()
        batch.when("value = ?", core.store.meta("networks"))
        batch.insert("network", new)
        first = {"network": new["id"], "counter": 1, "tag": new["tag"]}
        batch.insert("revision", first)
        return batch

    core.store.change(build)
    return need_network(core, new["id"])


def renumber(members: Iterable[Row], column: str, old: str, new: str) -> dict[str, str]:
    """New addresses by node for another range, keeping host numbers that fit it."""
    if not new:
        return {node["id"]: "" for node in members}
    target, source = pool(new), pool(old) if old else None
    hosts, rest = {}, []
    for node in members:
        host = source.host(node[column]) if source and node[column] else 0
        if 0 < host <= target.last:
            hosts[host] = node["id"]
        else:
            rest.append(node["id"])
    free = (host for host in range(1, target.last + 1) if host not in hosts)
    hosts.update({host: node_id for node_id, host in zip(rest, free)})
    found = {node_id: target.address(host) for host, node_id in hosts.items()}
    if set(rest) - set(found):
        raise Clash("%s has fewer addresses than the network has nodes: take a larger range" % new)
    return found


def _lease(network: str, address: str, node: str) -> Row:
    return {"network": network, "address": address, "node": node, "released": None}


def _change_ranges(core: Core, batch: NetworkBatch, old: Row, values: Row) -> None:
    """Readdress every node in the same transaction."""
    stamp = core.store.meta("networks")
    batch.update("meta", {"value": batch.stamp}, "key = 'networks' AND value = ?", stamp, must=True)
    batch.when("counter = ?", old["counter"])
    states = (ACTIVE, DISABLED, EXPIRED)
    condition = (Node.network == old["id"]) & Node.state.in_(states)
    members = core.store.select(Node.select(Node.id, Node.ip, Node.ip6).where(condition))
    moved = {
        column: renumber(members, column, old[ranges], values[ranges])
        for column, ranges in (("ip", "range"), ("ip6", "range6"))
        if ranges in values
    }
    batch.delete("lease", "network = ?", old["id"])
    highest = 0
    ranges = [{**old, **values}[name] for name in ("range", "range6")]
    for node in members:
        new = {**node, **{column: places[node["id"]] for column, places in moved.items()}}
        for address in filter(None, (new["ip"], new["ip6"])):
            highest = max([highest, *(each.host(address) for each in pools(*ranges))])
            batch.insert("lease", _lease(old["id"], address, node["id"]))
        change = {"ip": new["ip"], "ip6": new["ip6"]}
        change.update(changed=batch.counter, own_changed=batch.counter)
        batch.update("node", change, "id = ?", node["id"])
    last = min(each.last for each in pools(*ranges))
    batch.set("cursor = ?", min(highest, last) + 1)


def set_network(core: Core, name: str, values: Row) -> Row:
    """Change columns of a network; every node hears of it."""

    def build() -> Batch | None:
        old = need_network(core, name)
        new = {key: value for key, value in values.items() if old[key] != value}
        if not new:
            return None
        batch = NetworkBatch(old["id"], core.now)
        if {"range", "range6"} & new.keys():
            _check_ranges(core, {**old, **new})
            _change_ranges(core, batch, old, new)
        for column, value in new.items():
            batch.set('"%s" = ?' % column, value)
        batch.set("settings = counter + 1, modified = ?", core.now)
        if {"punch", "is_local"} & new.keys():  # every record shows other endpoints now
            batch.update("node", {"changed": batch.counter}, "network = ?", old["id"])
        return batch

    core.store.change(build)
    return need_network(core, name)


def remove_network(core: Core, name: str) -> Row:
    """Forget a network that has no nodes."""
    network = need_network(core, name)

    def build() -> Batch:
        living = "network = ? AND state != 'removed'"
        somebody = composed("SELECT 1 FROM node WHERE %s", living)
        if core.store.row(somebody, (network["id"],)):
            raise Clash("the network %s has nodes: remove them first" % network["id"])
        batch = NetworkListBatch()
        batch.when("NOT EXISTS (%s)" % somebody, network["id"])
        for table in TABLES:
            batch.delete(table, "network = ?", network["id"])
        batch.delete("network", "id = ?", network["id"])
        return batch

    core.store.change(build)
    return network


# ---- access keys


def access_keys(core: Core, network: str) -> list[Row]:
    name = need_network(core, network)["id"]
    found = AccessKey.select().where(AccessKey.network == name).order_by(AccessKey.created)
    return core.store.select(found)


def default_address() -> str:
    """This host's address towards the default route. Connecting a UDP socket sends nothing."""
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
                return str(probe.getsockname()[0])
            except OSError:
                continue
    return "127.0.0.1"


def own_urls(settings: Settings) -> tuple[str, ...]:
    host = settings["SERVER_HOST"] or default_address()
    given: tuple[str, ...] = settings["SERVER_API_CONN_STRING"]
    return given or ("http://" + endpoint(host, settings["API_PORT"]),)


def server_urls(core: Core) -> tuple[str, ...]:
    """The addresses that tokens carry: what `serve` wrote down, else what it would write."""
    written = core.store.meta("urls")
    return tuple(written.split()) if written else own_urls(core.settings)


def add_key(core: Core, network: str, name: str = "", uses: int | None = 1, lifetime: int | None = None) -> Row:
    """An access key; `value` and `accessstring` are in the answer this one time."""
    owner = need_network(core, network)
    secret = b64(secrets.token_bytes(16))
    key_id = secrets.token_hex(4)
    new = {"id": key_id, "network": owner["id"], "uses": uses, "created": core.now}
    new["name"] = name or "key-" + secrets.token_hex(3)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,20}", new["name"]):
        raise Invalid("%r is no name for a key: 1 to 20 letters, digits, '.', '_' or '-'" % name)
    new["expires"] = core.now + lifetime if lifetime else None
    new["secret"] = core.key.seal(key_id, secret)

    def build() -> Batch:
        taken = "SELECT 1 FROM access_key WHERE network = ? AND name = ?"
        if core.store.row(taken, (owner["id"], new["name"])):
            raise Clash("%s has a key %s already: take another name" % (owner["id"], new["name"]))
        batch = NetworkBatch(owner["id"], core.now, heard=False)
        batch.insert("access_key", new)
        return batch

    core.store.change(build)
    value = "%s.%s" % (key_id, secret)
    token = agent.Token(server_urls(core), core.key.pin, owner["id"], value)
    return {**new, "value": value, "accessstring": agent.make_token(token)}


def remove_key(core: Core, network: str, name: str) -> Row:
    owner = need_network(core, network)
    found = next((key for key in access_keys(core, network) if name in (key["name"], key["id"])), None)
    if found is None:
        raise Missing("%s has no key %s: `netmaker-lite key list %s` shows which there are" % (owner["id"], name, owner["id"]))

    def build() -> Batch:
        batch = NetworkBatch(owner["id"], core.now, heard=False)
        batch.delete("access_key", "id = ?", found["id"])
        # Captured joins are refused by the lack of the key from here on.
        gone = "access_key = ? AND node NOT IN (SELECT id FROM node WHERE network = ?)"
        batch.delete("joined", gone, found["id"], owner["id"])
        return batch

    core.store.change(build)
    return found


# ---- nodes


def nodes(core: Core, network: str) -> list[Row]:
    name = need_network(core, network)["id"]
    found = Node.select().where((Node.network == name) & (Node.state != REMOVED))
    return core.store.select(found.order_by(Node.name))


def need_node(core: Core, network: str, text: str) -> Row:
    """A node by its id or name."""
    name = need_network(core, network)["id"]
    living = (Node.network == name) & (Node.state != REMOVED)
    found = core.store.get(Node.select().where(living & (Node.id == text))) or core.store.get(
        Node.select().where(living & (Node.name == text.lower()))
    )
    if found is None:
        raise Missing("%s has no node %s: `netmaker-lite node list %s` shows which there are" % (name, text, name))
    return found


class Joining(NamedTuple):
    """Who wants to join: all of it checked. No access key: manual sign-up."""

    network: str
    auth: str
    access_key: str
    source: str
    public: str
    values: Row


def _joined_before(core: Core, who: Joining) -> bool:
    """Whether this is a retry of a join that was made; Denied when its time is over."""
    sql = "SELECT node FROM joined WHERE network = ? AND auth = ?"
    known = core.store.row(sql, (who.network, who.auth))
    if known is None:
        return False
    sql = "SELECT state, confirmed FROM node WHERE id = ?"
    state, confirmed = core.store.row(sql, known) or (REMOVED, True)
    if state == REMOVED:
        raise Denied("this join made a node that is gone: join again with a new key pair (--force)")
    if confirmed:
        raise Clash("this join made a node that is in use: nothing is to be joined")
    return True


def _take(batch: NetworkBatch, network: str, address: str, node: str) -> None:
    """Lease an address; the primary key is the guard against giving it twice."""
    free = "network = ? AND address = ? AND node IS NULL"
    batch.delete("lease", free, network, address)
    batch.insert("lease", _lease(network, address, node))


def _move_in(core: Core, batch: NetworkBatch, network: Row, node: Row) -> Row:
    """Addresses for a node that becomes active, and its place in the network."""
    if network["members"] >= network["node_limit"]:
        raise Clash(
            "the network has as many nodes as its limit allows (%d): raise nodelimit, or remove nodes" % network["node_limit"]
        )
    ranges = pools(network["range"], network["range6"])
    held, released_ = partial(core.store.held, network["id"]), partial(core.store.released, network["id"])
    placement = place(ranges, network["cursor"], (node["ip"], node["ip6"]), held, released_)
    batch.when("members < node_limit AND cursor = ?", network["cursor"])
    batch.set("members = members + 1, cursor = ?", placement.cursor)
    for address in placement.addresses:
        _take(batch, network["id"], address, node["id"])
    by_version = {each.version: text for each, text in zip(ranges, placement.addresses)}
    return {"ip": by_version.get(4, ""), "ip6": by_version.get(6, "")}


def _check_key_free(core: Core, node: Row) -> None:
    sql = "SELECT name FROM node WHERE network = ? AND state != 'removed' AND id != ? AND (key IN (?, ?) OR next_key IN (?, ?))"
    keys = node["key"], node["next_key"] or node["key"]
    other = core.store.row(sql, (node["network"], node["id"], *keys, *keys))
    if other:
        raise Clash("the WireGuard key belongs to the node %s: make a new one" % other[0])


def unused_name(core: Core, network: str, wish: str, node: str = "") -> str:
    """The wished name, or with -2, -3, … where another node of the network has it."""
    sql = "SELECT name FROM node WHERE network = ? AND state != 'removed' AND id != ? AND name LIKE ?"
    return free_name(wish, (row[0] for row in core.store.rows(sql, (network, node, wish[:50] + "%"))))


def _new_node(core: Core, network: Row, who: Joining) -> Row:
    new = {**blank(Node), **who.values, "id": secrets.token_hex(8), "network": network["id"]}
    new.update(auth=who.auth, look=b64(secrets.token_bytes(16)), source=who.source)
    new.update(public=who.public, created=core.now, modified=core.now, last_seen=core.now)
    new["state"] = ACTIVE if who.access_key else PENDING
    _check_key_free(core, new)
    new["name"] = unused_name(core, network["id"], new.get("name") or "node")
    new["port"] = (new["fixed"] and new["port"]) or network["port"]
    if not new["fixed"]:
        sql = "SELECT port FROM node WHERE source = ? AND state != 'removed'"
        taken = core.store.rows(sql, (who.source,))
        new["port"] = free_port(new["port"], (row[0] for row in taken))
    return new


def _sign_up(core: Core, batch: NetworkBatch, network: Row, who: Joining) -> None:
    """The conditions of a node without an access key."""
    if not network["manual"]:
        raise Denied("the network takes no node without an access key: ask its administrator for one")
    limits = (
        ("SELECT COUNT(*) FROM node WHERE network = ? AND state = 'pending'", PENDING_PER_NETWORK, ()),
        (
            "SELECT COUNT(*) FROM node WHERE network = ? AND state = 'pending' AND source = ?",
            PENDING_PER_SOURCE,
            (who.source,),
        ),
    )
    for sql, limit, more in limits:
        count = core.store.row(sql, (network["id"], *more))
        if count is not None and count[0] >= limit:
            raise SlowDown("too many nodes wait for approval: the administrator must decide on some first")
        batch.when("(%s) < ?" % sql, network["id"], *more, limit)
    batch.when("manual = ?", True)


def _use_key(core: Core, batch: NetworkBatch, key_id: str) -> None:
    """Take one use of an access key, in the transaction that makes the node."""
    usable = "id = ? AND (uses IS NULL OR uses > 0) AND (expires IS NULL OR expires > ?)"
    found = composed("SELECT 1 FROM access_key WHERE %s", usable)
    if core.store.row(found, (key_id, core.now)) is None:
        raise UsedUp("the access key is used up or expired: ask for another")
    batch.when("EXISTS (%s)" % found, key_id, core.now)
    batch.update("access_key", {"uses": Expression("uses - 1")}, usable, key_id, core.now, must=True)


def join(core: Core, who: Joining) -> Row:
    """The node of an auth key: made now, or by an earlier try of the same join."""

    def build() -> Batch | None:
        network = need_network(core, who.network)
        if _joined_before(core, who):
            return None
        values = _new_node(core, network, who)
        pending = not who.access_key
        batch = NetworkBatch(network["id"], core.now, heard=not pending)
        if pending:
            _sign_up(core, batch, network, who)
        else:
            _use_key(core, batch, who.access_key)
            values.update(_move_in(core, batch, network, values))
        same_key = {"changed": batch.counter, "own_changed": batch.counter, "since": batch.counter}
        batch.insert("node", {**values, **same_key})
        row = {"network": network["id"], "auth": who.auth}
        batch.insert("joined", {**row, "access_key": who.access_key, "node": values["id"]})
        return batch

    core.store.change(build)
    mine = (Node.network == who.network) & (Node.auth == who.auth)
    found = core.store.get(Node.select().where(mine))
    if found is None:
        raise Busy("the node was removed while it joined: try again")
    log.info("%s: node %s (%s) from %s is %s", who.network, found["name"], found["id"], who.source, found["state"])
    return found


def _leave_lists(batch: NetworkBatch, node: Row) -> None:
    """Take a node out of what the others hear."""
    batch.delete("gone", "network = ? AND node = ?", node["network"], node["id"])
    row = {"network": node["network"], "node": node["id"], "counter": batch.counter}
    batch.insert("gone", row)
    batch.delete("observed", "network = ? AND ? IN (node, observer)", node["network"], node["id"])


def _without_vain_wishes(core: Core, network: Row, node: Row) -> Row:
    """A pending node whose wished address somebody else got meanwhile takes the next one."""
    held = partial(core.store.held, network["id"])
    return {**node, **{name: "" if held(node[name]) else node[name] for name in ("ip", "ip6")}}


def _set_state(core: Core, node: Row, state: str, before: Sequence[str], more: Row | None = None) -> Row:
    """Bring a node from one of some states into another."""

    def build() -> Batch | None:
        now = need_node(core, node["network"], node["id"])
        if now["state"] == state:
            return None
        if now["state"] not in before:
            raise Clash("the node %s is %s" % (now["name"], now["state"]))
        batch = NetworkBatch(node["network"], core.now)
        new = {**(more or {}), "state": state, "modified": core.now}
        new.update(changed=batch.counter, own_changed=batch.counter, since=batch.counter)
        if now["state"] == PENDING and state == ACTIVE:
            network = need_network(core, node["network"])
            new.update(_move_in(core, batch, network, _without_vain_wishes(core, network, now)))
        if state != ACTIVE:
            new.update(next_key="", refresh="")
            _leave_lists(batch, now)
        batch.update("node", new, "id = ? AND state = ?", now["id"], now["state"], must=True)
        return batch

    core.store.change(build)
    return need_node(core, node["network"], node["id"])


def approve(core: Core, node: Row) -> Row:
    return _set_state(core, node, ACTIVE, (PENDING,))


def disable(core: Core, node: Row) -> Row:
    return _set_state(core, node, DISABLED, (ACTIVE, EXPIRED))


def enable(core: Core, node: Row) -> Row:
    if node["state"] == PENDING:
        words = (node["name"], node["network"], node["name"])
        raise Clash("the node %s waits for approval: `netmaker-lite node approve %s %s`" % words)
    over = {"expires": None} if node["expires"] and node["expires"] <= core.now else None
    return _set_state(core, node, ACTIVE, (DISABLED, EXPIRED), over)


def remove_node(core: Core, node: Row, farewell: str = "the administrator removed it") -> Row:
    """End a membership. The row stays until the agent has confirmed that it heard of it."""

    def build() -> Batch | None:
        now = core.store.get(Node.select().where(Node.id == node["id"]))
        if now is None or now["state"] == REMOVED:
            return None
        batch = NetworkBatch(node["network"], core.now)
        if now["state"] != PENDING:
            batch.set("members = members - 1")
        new: Row = {"state": REMOVED, "removed": core.now, "farewell": farewell, "ip": "", "ip6": ""}
        new.update(changed=batch.counter, own_changed=batch.counter, since=batch.counter)
        batch.update("node", new, "id = ? AND state = ?", now["id"], now["state"], must=True)
        free = {"node": None, "released": core.now}
        batch.update("lease", free, "network = ? AND node = ?", node["network"], now["id"])
        _leave_lists(batch, now)
        return batch

    core.store.change(build)
    return node


def reject(core: Core, node: Row) -> Row:
    if node["state"] != PENDING:
        words = (node["name"], node["state"], node["network"], node["name"])
        raise Clash("the node %s is %s, not pending: `netmaker-lite node remove %s %s`" % words)
    return remove_node(core, node, "an administrator turned it away")


def forget_node(core: Core, network: str, node: str) -> None:
    """Drop the row of a removed node: its agent knows."""

    def build() -> Batch:
        batch = NetworkBatch(network, core.now, heard=False)
        batch.delete("node", "id = ? AND state = 'removed'", node)
        unkeyed = "node = ? AND access_key != '' AND access_key NOT IN (SELECT id FROM access_key)"
        batch.delete("joined", unkeyed, node)
        return batch

    core.store.change(build)


def differences(node: Row, values: Row) -> Row:
    return {column: value for column, value in values.items() if node[column] != value}


def is_heard(values: Row) -> bool:
    """Whether somebody must hear of a change of these columns."""
    return bool((RECORD_COLUMNS | OWN_COLUMNS) & values.keys())


def _move(core: Core, batch: NetworkBatch, network: Row, node: Row, values: Row) -> None:
    """Give a node the addresses that it or an administrator asks for."""
    wanted = {column: values[column] for column in ("ip", "ip6") if column in values}
    if not wanted:
        return
    for column, address in wanted.items():
        ranges = pools(network["range" if column == "ip" else "range6"])
        place(ranges, 1, (address,), partial(core.store.held, network["id"]), tuple)
        gone = {"node": None, "released": core.now}
        batch.update("lease", gone, "network = ? AND address = ?", network["id"], node[column])
        _take(batch, network["id"], address, node["id"])


def amend(core: Core, batch: NetworkBatch, network: Row, node: Row, values: Row) -> Row:
    """The columns of a node's UPDATE for new values, checked against the others; leases go along."""
    new = dict(values)
    if "name" in values:
        sql = "SELECT 1 FROM node WHERE network = ? AND name = ? AND state != 'removed' AND id != ?"
        if core.store.row(sql, (node["network"], values["name"], node["id"])):
            raise Clash("the name %s is taken: choose another" % values["name"])
    if values.get("key") or values.get("next_key"):
        _check_key_free(core, {**node, **values})
    if node["state"] != PENDING:
        _move(core, batch, network, node, values)
    if values.keys() & RECORD_COLUMNS:
        new["changed"] = batch.counter
    if values.keys() & OWN_COLUMNS:
        new["own_changed"] = batch.counter
    return new


def _owned(core: Core, network: Row, node: Row) -> dict[str, str]:
    """The ranges that no node may claim for itself, and whose they are: the network's, and other nodes' extra ones."""
    sql = "SELECT name, ips FROM node WHERE network = ? AND id != ? AND ips != '' AND state != 'removed'"
    extra = core.store.rows(sql, (network["id"], node["id"]))
    own = dict.fromkeys((network["range"], network["range6"]), "the network's own range")
    return {**own, **{text: "a range of the node " + name for name, ips in extra for text in ips.split(",")}}


def set_node(core: Core, node: Row, values: Row) -> Row:
    """An administrator's edit."""

    def build() -> Batch | None:
        network = need_network(core, node["network"])
        now = need_node(core, node["network"], node["id"])
        new = differences(now, values)
        if not new:
            return None
        batch = NetworkBatch(network["id"], core.now, heard=is_heard(new))
        if "ips" in new:
            new["ips"] = check_routes(new["ips"], _owned(core, network, now))
            batch.when("counter = ?", network["counter"])
        columns = amend(core, batch, network, now, new)
        columns["modified"] = core.now
        batch.update("node", columns, LIVING, now["id"], must=True)
        return batch

    core.store.change(build)
    found = need_node(core, node["network"], node["id"])
    over = found["expires"] is not None and found["expires"] <= core.now
    return enable(core, found) if found["state"] == EXPIRED and not over else found


def sweep(core: Core) -> None:
    """What time alone changes: nodes expire, sign-ups lapse, nodes that left are forgotten."""
    due = (Node.state == ACTIVE) & (Node.expires <= core.now)
    for node in core.store.select(Node.select().where(due)):
        _set_state(core, node, EXPIRED, (ACTIVE,))
    lapsed = (Node.state == PENDING) & (Node.created <= core.now - PENDING_DAYS * 86400)
    for node in core.store.select(Node.select().where(lapsed)):
        remove_node(core, node, LEFT)
        forget_node(core, node["network"], node["id"])
    left = (Node.state == REMOVED) & (Node.farewell == LEFT) & (Node.removed <= core.now - 86400)
    for node in core.store.select(Node.select().where(left)):
        forget_node(core, node["network"], node["id"])


# ---- key refresh


def refresh_keys(core: Core, network: str) -> Row:
    """Put all nodes of a network whose agent makes its key in the queue for a new one."""
    name = str(need_network(core, network)["id"])
    _queue(core, name, "id != ''")
    return need_network(core, name)


def refresh_key(core: Core, node: Row) -> Row:
    """Put one node in the queue for a new key."""
    if node["keyed"]:
        raise Clash("the key of %s was given by its user: join --force there takes another" % node["name"])
    if node["state"] != ACTIVE or not node["confirmed"]:
        raise Clash("the node %s is not active, or has no agent that could make a key" % node["name"])
    _queue(core, node["network"], "id = ?", node["id"])
    return need_node(core, node["network"], node["id"])


def _queue(core: Core, network: str, which: str, *bound: str) -> None:
    def build() -> Batch:
        batch = NetworkBatch(network, core.now, heard=False)
        able = "network = ? AND state = 'active' AND confirmed AND NOT keyed AND refresh IN ('', 'silent') AND "
        batch.update("node", {"refresh": QUEUED, "refresh_at": core.now}, able + which, network, *bound)
        return batch

    core.store.change(build)
    start_refresh(core, network)


def start_refresh(core: Core, network: str) -> None:
    """Give the first in the queue its turn, unless it is another's. Who was seen lately comes first."""
    sql = """network = ? AND state = 'active' AND refresh = 'queued' AND NOT EXISTS (SELECT 1 FROM node
        WHERE network = ? AND state = 'active' AND refresh IN ('asked', 'listed', 'switching'))
        ORDER BY last_seen < ?, refresh_at, name LIMIT 1"""
    found = core.store.row(NODE_SELECT + sql, (network, network, core.now - 120))
    if found is not None:
        node = NodeState._make(found)
        step_refresh(core, node, LISTED if node.next_key else ASKED, core.now)


def step_refresh(core: Core, node: NodeState, state: str, at: int) -> None:
    """Bring a node's refresh from the state that it was seen in to the next."""

    def build() -> Batch | None:
        same = "id = ? AND state = 'active' AND refresh = ? AND refresh_at = ?"
        seen = (node.id, node.refresh, node.refresh_at)
        if core.store.row(composed("SELECT 1 FROM node WHERE %s", same), seen) is None:
            return None
        batch = NetworkBatch(node.network, core.now)
        new = {"refresh": state, "refresh_at": at, "own_changed": batch.counter}
        batch.update("node", new, same, *seen, must=True)
        return batch

    core.store.change(build)
    log.info("%s: the key refresh of %s is %s", node.network, node.name, state)


def refreshed(core: Core, node: Row, values: Row) -> Row:
    """The columns with what a node's report of its keys means for their refresh."""
    key, new = values.get("key", node["key"]), values.get("next_key", node["next_key"])
    if node["next_key"] and key == node["next_key"]:
        return {**values, "next_key": "", "refresh": ""}
    if new == node["next_key"]:
        return values
    lost = ASKED if node["refresh"] in (LISTED, SWITCHING) else node["refresh"]
    return {**values, "refresh": LISTED if new else lost, "refresh_at": core.now}


# ---- the whole


def as_owner(folder: str) -> None:
    """Run by root beside an unprivileged server, become that: root's files would lock it out."""
    if os.geteuid() == 0 and os.path.isdir(folder):
        owner = os.stat(folder)
        if owner.st_uid:
            os.setegid(owner.st_gid)
            os.seteuid(owner.st_uid)


def as_caller(work: Callable[[], Any]) -> Any:
    """Do it with the rights of who called us: the files that people name are theirs, not the data folder's owner's."""
    user, group = os.geteuid(), os.getegid()
    os.seteuid(os.getuid())
    os.setegid(os.getgid())
    try:
        return work()
    finally:
        os.setegid(group)
        os.seteuid(user)


def backup(core: Core, path: str, with_key: bool) -> None:
    """One file with everything, 0600; with the server's key only if asked for."""
    temporary = os.path.join(core.store.folder, "backup." + secrets.token_hex(4))
    try:
        core.store.copy(temporary)
        if with_key:
            copy = sqlite3.connect(temporary, isolation_level=None)
            copy.execute("CREATE TABLE server_key (private TEXT NOT NULL)")
            copy.execute("INSERT INTO server_key VALUES (?)", (b64(core.key.private),))
            copy.close()
        with open(temporary, "rb") as stream:
            content = stream.read()
    except OSError as problem:
        raise ServerError("cannot make a copy in %s: %s" % (core.store.folder, problem.strerror)) from problem
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    try:
        as_caller(partial(write_private, path, content, True))
    except OSError as problem:
        raise ServerError("cannot write %s: %s" % (path, problem.strerror)) from problem


class Restored(NamedTuple):
    """What a restore did: nodes in it now, those that had been removed since the backup."""

    nodes: int
    back: list[Row]


def _make_new(source: sqlite3.Connection) -> None:
    """What was captured before a restore must be worth nothing after it, and every node must hear."""
    source.execute("UPDATE meta SET value = ? WHERE key = 'incarnation'", (new_incarnation(),))
    for (network,) in source.execute("SELECT id FROM network").fetchall():
        tag = secrets.token_hex(4)
        sql = "UPDATE network SET counter = counter + 1, tag = ? WHERE id = ?"
        source.execute(sql, (tag, network))
        sql = "INSERT INTO revision (network, counter, tag) SELECT id, counter, tag FROM network WHERE id = ?"
        source.execute(sql, (network,))
    source.commit()


def _opened_backup(path: str) -> sqlite3.Connection:
    """A backup in memory, checked."""
    copy = sqlite3.connect(":memory:")
    try:
        _fill(copy, path)
    except BaseException:
        copy.close()
        raise
    return copy


def _fill(copy: sqlite3.Connection, path: str) -> None:
    try:
        with open(path, "rb") as stream:
            if stream.read(15) != b"SQLite format 3":
                raise Invalid("%s is no backup of netmaker-lite" % path)
        file = sqlite3.connect("file:%s?mode=ro" % path, uri=True)
        try:
            file.backup(copy)
        finally:
            file.close()
        state = copy.execute("PRAGMA integrity_check").fetchone()[0]
        schema = copy.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
    except OSError as problem:
        raise Invalid("cannot read %s: %s" % (path, problem.strerror)) from problem
    except sqlite3.Error as problem:
        raise Invalid("%s is no backup of netmaker-lite, or a damaged one (%s)" % (path, problem)) from problem
    if state != "ok" or schema is None:
        raise Invalid("%s is no backup of netmaker-lite, or a damaged one" % path)
    if int(schema[0]) > SCHEMA:
        raise Invalid("%s was made by a newer netmaker-lite: install that version" % path)


def _take_key(settings: Settings, source: sqlite3.Connection) -> None:
    """Put a backup's server key in its place; without one the present key must be the same."""
    names = {row[0] for row in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    path = settings.key_file
    if "server_key" in names:
        private = str(source.execute("SELECT private FROM server_key").fetchone()[0])
        source.execute("DROP TABLE server_key")
        source.commit()
        if os.path.exists(path) and ServerKey.load(path).private != unb64(private):
            os.replace(path, path + ".before-restore")
        write_private(path, private.encode() + b"\n", True)
        return
    pin = source.execute("SELECT value FROM meta WHERE key = 'pin'").fetchone()[0]
    if not os.path.exists(path) or b64(ServerKey.load(path).pin) != pin:
        raise Clash(
            "the backup belongs to another server key (pin %s) and does not hold it: put that "
            "server.key into %s first" % (pin, os.path.dirname(path))
        )


def open_core_anew(settings: Settings) -> Core:
    """The data folder as it is, whatever key its present database was made with."""
    return Core(settings, Store(settings.data), ServerKey.load(settings.key_file))


def restore(settings: Settings, path: str) -> Restored:
    """Take over a backup: a new incarnation, and a new word for every network."""
    folder = os.path.dirname(os.path.abspath(settings.key_file))
    make_folder(folder)
    source: sqlite3.Connection = as_caller(partial(_opened_backup, path))
    try:
        _take_key(settings, source)
        core = open_core_anew(settings)
        sql = "SELECT id FROM node WHERE state != 'removed'"
        present = {row[0] for row in core.store.rows(sql)}
        had_nodes = core.store.row("SELECT 1 FROM network") is not None
        _make_new(source)
        core.store.replace(source)
        core.store.set_meta("pin", b64(core.key.pin))
        core.store.close()
    finally:
        source.close()
    core = open_core(settings)
    now = core.store.select(Node.select().where(Node.state != REMOVED).order_by(Node.name))
    core.store.close()
    back = [node for node in now if had_nodes and node["id"] not in present]
    return Restored(len(now), back)


COUNTED = "state IN ('active', 'disabled', 'expired')"
CHECKS = {
    **{
        "%s without a lease" % column: composed(
            "SELECT name, network FROM node WHERE %s AND %s != '' AND NOT EXISTS (SELECT 1 FROM lease"
            " WHERE lease.network = node.network AND address = %s AND lease.node = id)", COUNTED, column, column
        )
        for column in ("ip", "ip6")
    },
    "lease without a node": "SELECT address, network FROM lease WHERE node IS NOT NULL AND NOT EXISTS"
    " (SELECT 1 FROM node WHERE id = lease.node AND address IN (ip, ip6))",
    "address held twice": composed(
        "SELECT ip, network FROM node WHERE ip != '' AND %s GROUP BY network, ip HAVING COUNT(*) > 1", COUNTED
    ),
    "word that is not in the history": "SELECT id, id FROM network WHERE NOT EXISTS (SELECT 1 FROM revision"
    " WHERE network = network.id AND counter = network.counter AND tag = network.tag)",
    "history from the future": "SELECT revision.counter, id FROM revision JOIN network ON id = network"
    " WHERE revision.counter > network.counter",
    "node changed in the future": "SELECT name, network FROM node JOIN network ON network.id = node.network"
    " WHERE changed > counter OR own_changed > counter OR since > counter",
    "wrong count of nodes": composed(
        "SELECT members, id FROM network WHERE members != (SELECT COUNT(*) FROM node WHERE network = network.id AND %s)",
        COUNTED,
    ),
    "report on or by a node that is not there": "SELECT observer, network FROM observed"
    " WHERE node NOT IN (SELECT id FROM node) OR observer NOT IN (SELECT id FROM node)",
    **{
        "row of %s without a network" % name: composed(
            "SELECT COUNT(*), network FROM %s WHERE network NOT IN (SELECT id FROM network) GROUP BY network", name
        )
        for name in TABLES
    },
}  # fmt: skip


def check(core: Core) -> list[str]:
    """What is wrong with the database: a sentence each, none when all is well."""
    found = ["the file is damaged: %s" % row[0] for row in core.store.rows("PRAGMA integrity_check") if row[0] != "ok"]
    for what, sql in CHECKS.items():
        found += ["%s: %s (network %s)" % (what, *row) for row in core.store.rows(sql)]
    for network in networks(core):
        ranges = pools(network["range"], network["range6"])
        for node in nodes(core, network["id"]):
            addresses = [text for text in (node["ip"], node["ip6"]) if text and node["state"] != PENDING]
            if any(not max(each.host(text) for each in ranges) for text in addresses):
                found.append("address outside its range: %s (network %s)" % (node["name"], network["id"]))
        for key in access_keys(core, network["id"]):
            try:
                core.key.unseal(key["id"], key["secret"])
            except Denied:
                found.append("key of another server.key: %s (network %s)" % (key["name"], network["id"]))
    return found


# --------------------------------------------------------------------------------------------------
# AGENTS
# --------------------------------------------------------------------------------------------------
# The server's side of docs/protocol.md. Whatever is answered after a request's MAC was right carries a
# line of its own; what comes before that proves nothing and is taken for nothing by the agent.

MAX_UNPROVEN = 64 << 10  # bytes of a body that are parsed without an access right behind the MAC
MAX_BODY = 1 << 20
MAX_DEPTH, MAX_ITEMS = 20, 10000
REPEAT = 60  # seconds in which the last request may come again, byte for byte
FRESH_REPORT = 360  # an observer that was silent for longer observes nothing
MOVE_EVERY = 60  # seconds between two moves of an observed endpoint
CLONE = 3600
MAX_WAIT = 50
Check = Callable[[Any], Any]


def as_text(check: Callable[[str], Any], empty: bool = False) -> Check:
    """A check of texts from one of any value; `empty` lets "" through."""

    def checked(value: Any) -> Any:
        if not isinstance(value, str) or len(value) > 256 or re.search("[\ud800-\udfff]", value):
            raise Invalid("%.80r is no text of at most 256 characters" % (value,))
        return value if empty and not value else check(value)

    return checked


def as_number(low: int, high: int) -> Check:
    def checked(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Invalid("%.80r is no whole number from %d to %d" % (value, low, high))
        return value

    return checked


def as_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Invalid("%.80r is neither true nor false" % (value,))
    return value


def as_pattern(expression: str) -> Check:
    def checked(value: str) -> str:
        if not re.fullmatch(expression, value, re.ASCII):
            raise Invalid("%.80r is not of the form %s" % (value, expression))
        return value

    return as_text(checked, True)


def _address(version: int = 0) -> Check:
    return as_text(lambda value: check_address(value, version), True)


KEEPALIVE, MTU = as_number(0, 1000), as_number(576, 9200)
PRINTABLE = r"[ -~]{0,80}"
FACTS: dict[str, tuple[str, Check]] = {  # name on the wire → column, check
    "key": ("key", as_text(check_key)),
    "next": ("next_key", as_text(check_key, True)),
    "keyed": ("keyed", as_flag),
    "port": ("port", check_port),
    "endpoint": ("static", _address()),
    "fixed": ("fixed", as_flag),
    "local": ("local", _address()),
    "lan": ("lan", as_pattern("[0-9a-f]{0,16}")),
    "os": ("os", as_pattern(PRINTABLE)),
    "version": ("version", as_pattern(PRINTABLE)),
    "machine": ("machine", as_pattern("[A-Za-z0-9_-]{0,64}")),
}
WISHES: dict[str, tuple[str, Check]] = {
    "name": ("name", as_text(check_name)),
    "address": ("ip", _address(4)),
    "address6": ("ip6", _address(6)),
    "keepalive": ("keepalive", KEEPALIVE),
    "mtu": ("mtu", MTU),
    "dnson": ("dns", as_flag),
    "roaming": ("roaming", as_flag),
    "ipforwarding": ("forwarding", as_flag),
    "udpholepunch": ("punch", as_flag),
    "islocal": ("is_local", as_flag),
}


def _measure(value: Any, depth: int) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if depth > MAX_DEPTH or len(inner) > MAX_ITEMS:
        raise Invalid("the body is too deep or has too many members")
    for each in inner:
        _measure(each, depth + 1)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body; Invalid when it is none, or deeper and larger than anything that we ask for."""
    try:
        value = json.loads(body.decode() or "{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as bad:
        raise Invalid("the body is no JSON") from bad
    if not isinstance(value, dict):
        raise Invalid("the body is no JSON object")
    _measure(value, 0)
    return value


def take(given: Any, table: Mapping[str, tuple[str, Check]], what: str) -> Row:
    """Columns from the members of an object; unknown ones are refused by name."""
    if not isinstance(given, dict):
        raise Invalid("%s is no object" % what)
    columns = {}
    for name, value in given.items():
        if name not in table:
            raise Invalid("unknown field %.40r in %s" % (name, what))
        column, check_value = table[name]
        try:
            columns[column] = check_value(value)
        except Invalid as bad:
            raise Invalid("%s of %s: %s" % (name, what, bad)) from bad
    return columns


def _observations(given: Any, what: str, check_value: Check) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Invalid("%s is no object" % what)
    for node, value in given.items():
        if not re.fullmatch("[0-9a-f]{16}", node):
            raise Invalid("%.40r in %s is no node" % (node, what))
        if value is not None:
            check_value(value)
    return given


class Exchange(NamedTuple):
    """The body of an exchange, checked."""

    values: Row
    seen: dict[str, str | None]
    mute: dict[str, bool | None]
    leave: bool
    confirm: bool


def parse_exchange(body: bytes) -> Exchange:
    given = read_json(body)
    known = {"facts", "wishes", "seen", "mute", "rejected", "leave", "confirm"}
    for name in given:
        if name not in known:
            raise Invalid("unknown field %.40r" % name)
    values = take(given.get("facts", {}), FACTS, "facts")
    wishes = take(given.get("wishes", {}), WISHES, "wishes")
    values.update({column: value for column, value in wishes.items() if value != ""})
    if "rejected" in given:
        table = {"word": ("word", as_pattern("[0-9.a-f-]{1,40}")), "reason": ("reason", lambda value: str(value)[:200])}
        rejected = take(given["rejected"], table, "rejected")
        words = "%s %s" % (rejected.get("word", "-"), rejected.get("reason", ""))
        values["rejected"] = " ".join(re.sub("[^ -~]", "?", words).split())  # it is shown on a terminal
    return Exchange(
        values,
        _observations(given.get("seen", {}), "seen", as_text(split_endpoint)),
        _observations(given.get("mute", {}), "mute", as_flag),
        as_flag(given.get("leave", False)),
        as_flag(given.get("confirm", False)),
    )


class Failures:
    """Counts failures per source and per key id: a bucket that refills, for each."""

    def __init__(self, size: int, per_second: float) -> None:
        self.size, self.rate = size, per_second
        self.buckets: dict[str, tuple[float, float]] = {}  # who → (failures, when)
        self._lock = threading.Lock()

    def count(self, who: str, now: float) -> float:
        failures, when = self.buckets.get(who, (0.0, now))
        return max(0.0, failures - (now - when) * self.rate)

    def check(self, now: float, *whom: str) -> None:
        if any(self.count(who, now) >= self.size for who in whom):
            raise SlowDown("too many failures from here: wait a minute")

    def add(self, now: float, *whom: str) -> None:
        with self._lock:
            if len(self.buckets) > 10000:
                self.buckets = {who: at for who, at in self.buckets.items() if self.count(who, now)}
            for who in whom:
                self.buckets[who] = (self.count(who, now) + 1, now)


class Bell:
    """Wakes what waits for a change, and bounds how much may wait."""

    def __init__(self, limit: int) -> None:
        self.limit, self.parked, self.rung, self.stopped = limit, 0, 0, False
        self._condition = threading.Condition()

    def ring(self) -> None:
        with self._condition:
            self.rung += 1
            self._condition.notify_all()

    def stop(self) -> None:
        self.stopped = True
        self.ring()

    def enter(self) -> bool:
        """Take a place among the waiting; False when there is none."""
        with self._condition:
            if self.parked >= self.limit:
                return False
            self.parked += 1
            self._condition.notify_all()
            return True

    def leave(self) -> None:
        with self._condition:
            self.parked -= 1

    def wait(self, rung: int, seconds: float) -> None:
        """Until it rings again after `rung`, or the time is over."""
        with self._condition:
            self._condition.wait_for(lambda: self.rung != rung or self.stopped, seconds)

    def occupied(self) -> bool:
        """Wait until somebody waits; False when the server stops."""
        with self._condition:
            self._condition.wait_for(lambda: self.parked or self.stopped)
            return not self.stopped


class Sight:
    """What others may reach of an address that a request came from."""

    def __init__(self, settings: Settings) -> None:
        self.host = settings["SERVER_HOST"]
        self._known: dict[str, str] = {}
        self._warned = False

    def public(self, source: str) -> str:
        found = self._known.get(source)
        if found is None:
            found = self._known[source] = self._public(source)
        return found

    def forget(self) -> None:
        """This host's addresses may have changed."""
        self._known.clear()

    def _public(self, source: str) -> str:
        if not source or not self._own(source):
            return source if source and is_public(source) else ""
        here = self._resolved() or (source if is_public(source) else default_address())
        if not is_public(here) and not self._warned:
            self._warned = True
            log.warning(
                "nodes on this host are told to others as %s, which only its own network reaches: "
                "set SERVER_HOST to the public address", here
            )  # fmt: skip
        return here

    def _resolved(self) -> str:
        try:
            found = socket.getaddrinfo(self.host, None) if self.host else []
            places = [check_address(str(each[4][0])) for each in found]
            return next((place for place in places if not ipaddress.ip_address(place).is_loopback), "")
        except (OSError, Invalid):
            return ""

    @staticmethod
    def _own(source: str) -> bool:
        """Only an address of this host can be bound."""
        if ipaddress.ip_address(source).is_loopback:
            return True
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((source, 0))
                return True
            except OSError:
                return False


class Reply(NamedTuple):
    """An answer as it goes out; `line` is empty where nothing can be proven."""

    status: int
    body: bytes = b""
    line: str = ""
    retry: int = 0


class Signer(NamedTuple):
    """What signs the answer to one request."""

    key: bytes
    request_mac: str
    box: Callable[[], Any] | None  # asked for only where there is a body: most answers have none
    source: str
    now: int
    interval: int

    def reply(self, status: int, value: Mapping[str, Any] | bytes | None = None) -> Reply:
        body = value if isinstance(value, bytes) else b"" if value is None else dump(value)
        if body and self.box is not None:
            body = bytes(self.box().encrypt(body))
        head = "%s %d %s %d %d" % (agent.PROTOCOL, status, self.source, self.now, self.interval)
        line = head + " " + mac(self.key, head.encode(), self.request_mac.encode(), body)
        return Reply(status, body, line)


class Request(NamedTuple):
    """The line of an exchange."""

    node: str
    mode: str
    incarnation: str
    number: str
    challenge: str
    have: str
    mac: str
    signed: bytes

    @property
    def order(self) -> tuple[int, int]:
        if not re.fullmatch(r"[0-9]{1,15}\.[0-9]{1,15}", self.number):
            raise Invalid("%.40r is no epoch and sequence" % self.number)
        epoch, _, sequence = self.number.partition(".")
        return int(epoch), int(sequence)


JOIN, EXCHANGE = b"POST " + agent.JOIN_PATH.encode(), b"POST " + agent.EXCHANGE_PATH.encode()


def is_signed(key: bytes, path: bytes, head: bytes, body: bytes, found: str) -> bool:
    return secrets.compare_digest(mac(key, path, head, body).encode(), found.encode())


class _NotFresh(Exception):
    """The request, or a newer one, was here before."""


def unb64_of(text: str, size: int) -> bytes:
    """So many bytes of b64; Invalid for anything else."""
    try:
        raw = unb64(text)
    except ValueError as bad:
        raise Invalid("%.60r is %s" % (text, bad)) from bad
    if len(raw) != size:
        raise Invalid("%.60r is not %d bytes of base64url" % (text, size))
    return raw


class Agents:
    """Everything that agents may ask for."""

    def __init__(self, core: Core, sight: Sight) -> None:
        self.core, self.sight = core, sight
        self.members = Members(core.store, lambda: core.clock())
        self.bell = Bell(core.settings["POLL_LIMIT"])
        self.failures = Failures(20, 20 / 60)
        self.interval = core.settings["CHECKIN_INTERVAL"]
        self.due: set[str] = set()  # nodes whose observed endpoint may move when its minute is over
        self._lock = threading.Lock()
        core.store.committed = self.bell.ring

    # ---- join

    def join(self, line: str, body: bytes, source: str) -> Reply:
        fields = line.split(" ")
        if len(fields) != 7 or fields[0] != agent.PROTOCOL or fields[3] not in ("s", "p"):
            raise Invalid("a join needs the header %s: see docs/protocol.md" % agent.HEADER)
        _, public, name, mode, incarnation, nonce, request_mac = fields
        now = self.core.clock()
        self.failures.check(now, source)
        if len(body) > MAX_UNPROVEN:
            raise TooLarge("a join has at most %d bytes" % MAX_UNPROVEN)
        keys = self._join_keys(public, name)
        signed = line.rpartition(" ")[0].encode()
        if not is_signed(keys("request mac"), JOIN, signed, body, request_mac):
            self.failures.add(now, source)
            raise Denied("the signature is wrong: the token is for another server, or the request was altered")
        box = nacl.secret.SecretBox(keys("seal")) if mode == "s" else None
        signer = Signer(keys("answer mac"), request_mac, (lambda: box) if box else None, source, int(now), self.interval)
        if incarnation != self.core.store.incarnation:
            return signer.reply(409, {"incarnation": self.core.store.incarnation})
        try:
            plain = unseal(box, body) if box else body
            return signer.reply(200, self._joined(public, name, keys("proof"), nonce, plain, source))
        except (ServerError, Invalid, BadAnswer) as problem:
            if isinstance(problem, Denied):
                self.failures.add(now, source)
            return signer.reply(http_status(problem), {"error": str(problem)})

    def _join_keys(self, public: str, network: str) -> Callable[[str], bytes]:
        """key(label) of an auth key."""
        raw = unb64_of(public, agent.KEY_BYTES)
        shared = self.core.key.shared(raw)
        return lambda label: label_key(shared, label, raw, self.core.key.pin, network)

    def _joined(self, public: str, name: str, proof_key: bytes, nonce: str, body: bytes, source: str) -> Row:
        given = read_json(body)
        for field in given:
            if field not in ("proof", "facts", "wishes"):
                raise Invalid("unknown field %.40r" % field)
        network = need_network(self.core, check_network(name))
        key_id = self._proven(network, given.get("proof"), proof_key, unb64_of(nonce, 16))
        values = take(given.get("facts", {}), FACTS, "facts")
        wishes = take(given.get("wishes", {}), WISHES, "wishes")
        values.update({column: value for column, value in wishes.items() if value != ""})
        if "key" not in values:
            raise Invalid("facts have no WireGuard key")
        values["name"] = values.get("name") or fold_name("node")
        who = Joining(network["id"], public, key_id, source, self.sight.public(source), values)
        node = join(self.core, who)
        member = self.members.reload(node["id"])
        if member is not None and not node["confirmed"]:
            member.epoch, member.sequence = 0, -1  # nothing can have been captured yet
        message = "" if node["state"] == ACTIVE else "an administrator has to approve this node"
        answer = {name: node[name] for name in ("state", "look", "name")}
        return {"node": node["id"], **answer, "message": message}

    def _proven(self, network: Row, proof: Any, proof_key: bytes, nonce: bytes) -> str:
        """The id of the access key that the joiner has shown to hold; "" for a manual sign-up."""
        if proof is None:
            return ""
        table = {"key": ("key", as_text(str)), "mac": ("mac", as_text(str))}
        claim = take(proof, table, "proof")
        now = self.core.clock()
        self.failures.check(now, "key " + str(claim.get("key")))
        condition = (AccessKey.id == claim.get("key")) & (AccessKey.network == network["id"])
        key = self.core.store.get(AccessKey.select().where(condition))
        secret = self.core.key.unseal(key["id"], key["secret"]) if key else b"\0"
        expected = agent.key_proof(secret, proof_key, nonce)
        if not key or not secrets.compare_digest(expected.encode(), str(claim.get("mac")).encode()):
            self.failures.add(now, "key " + str(claim.get("key")))
            raise Denied("the network %s has no such access key: ask for another" % network["id"])
        return str(key["id"])

    # ---- exchange

    def exchange(self, line: str, body: bytes, source: str) -> Reply:
        fields = line.split(" ")
        if len(fields) != 9 or fields[0] != agent.PROTOCOL or fields[2] not in ("s", "p"):
            raise Invalid("an exchange needs the header %s: see docs/protocol.md" % agent.HEADER)
        _, who, mode, incarnation, number, challenge, have, _, request_mac = fields
        signed = line[: -len(request_mac) - 1].encode()
        node = who.partition("@")[0]
        request = Request(node, mode, incarnation, number, challenge, have, request_mac, signed)
        member = self.members.node(node)
        if member is None:
            return self._unknown(who, request, body, source)
        self._keys(member)
        if not is_signed(member.request_key, EXCHANGE, signed, body, request_mac):
            raise Denied("the signature is wrong: the request was altered, or is another node's")
        if not self.members.prove(member.mesh):
            return self._unknown(who, request, body, source)
        member = self.members.nodes.get(node, member)
        self._keys(member)  # a network that was read anew has them no more
        box = partial(self._box, member) if mode == "s" else None
        interval = member.mesh.state.interval or self.interval
        now = self.core.clock()
        signer = Signer(member.answer_key, request_mac, box, source, int(now), interval)
        try:
            return self._exchanged(member, request, body, signer)
        except _NotFresh:
            order = {"epoch": member.epoch, "sequence": min(member.sequence, 1 << 53)}
            return signer.reply(409, {"incarnation": self.core.store.incarnation, **order})
        except (ServerError, Invalid, BadAnswer) as problem:
            return signer.reply(http_status(problem), {"error": str(problem)})

    def _keys(self, member: Member) -> None:
        """A node's keys, derived at its first exchange with this process."""
        if not member.request_key:
            keys = self._join_keys(member.row.auth, member.row.network)
            member.answer_key = keys("answer mac")
            member.request_key = keys("request mac")

    def _box(self, member: Member) -> Any:
        if member.box is None:
            keys = self._join_keys(member.row.auth, member.row.network)
            member.box = nacl.secret.SecretBox(keys("seal"))
        return member.box

    def _unknown(self, who: str, request: Request, body: bytes, source: str) -> Reply:
        """No such node: said so that it proves itself, where the client gives what that takes."""
        problem = {"error": "this server does not know the node: join again"}
        _, _, identity = who.partition("@")
        public, _, network = identity.partition("@")
        if not identity:
            return Reply(404, dump(problem))
        now = self.core.clock()
        self.failures.check(now, source)
        self.failures.add(now, source)
        keys = self._join_keys(public, network)
        if not is_signed(keys("request mac"), EXCHANGE, request.signed, body, request.mac):
            raise Denied("the signature is wrong: the request was altered, or is another node's")
        box = (lambda: nacl.secret.SecretBox(keys("seal"))) if request.mode == "s" else None
        signer = Signer(keys("answer mac"), request.mac, box, source, int(now), self.interval)
        return signer.reply(404, problem)

    def _exchanged(self, member: Member, request: Request, body: bytes, signer: Signer) -> Reply:
        """An exchange whose MAC is right."""
        row, order, now = member.row, request.order, self.core.clock()
        if request.incarnation != self.core.store.incarnation:
            raise _NotFresh
        if order <= (member.epoch, member.sequence):
            if request.mac != member.last_mac or now - member.last_time > REPEAT:
                raise _NotFresh
            return self._present(member, request, signer)
        moved = signer.source != row.source
        if moved and row.state != REMOVED:
            expected = self.core.key.challenge(row.id, request.number, signer.source)
            if not secrets.compare_digest(expected.encode(), request.challenge.encode()):
                return signer.reply(409, {"challenge": expected})
        told = None
        if body:
            told = parse_exchange(unseal(signer.box(), body) if signer.box else body)
        with self._lock:
            if order <= (member.epoch, member.sequence):
                raise _NotFresh
            member.epoch, member.sequence = order
        if row.state == REMOVED:
            return self._farewell(member, told, signer)
        if told is not None and told.leave:
            remove_node(self.core, {"id": row.id, "network": row.network}, LEFT)
            self.members.prove(member.mesh)
            return self._farewell(member, told, signer)
        public = row.public if row.public == signer.source else self.sight.public(signer.source)
        if told or moved or public != row.public or order[0] > row.epoch or not row.confirmed:
            self._commit(member, order, told, signer.source, public)
        member.see(now)
        member.last_mac, member.last_time = request.mac, now
        self._confirmed(member, request.have, told)
        return self._present(member, request, signer)

    def _present(self, member: Member, request: Request, signer: Signer) -> Reply:
        """The answer from the present state."""
        if member.row.state == REMOVED:
            return self._farewell(member, None, signer)
        blob = self.members.answer(member, request.have)
        return signer.reply(204 if blob is None else 200, blob)

    def _farewell(self, member: Member, told: Exchange | None, signer: Signer) -> Reply:
        """The membership is over; said until the agent confirms that it heard."""
        if told is not None and told.confirm:
            forget_node(self.core, member.row.network, member.row.id)
            self.members.forget(member.row.id)
        return signer.reply(410, {"state": REMOVED, "message": member.row.farewell})

    def _commit(self, member: Member, order: tuple[int, int], told: Exchange | None, source: str, public: str) -> None:
        """Everything that an exchange changes, in one transaction with its (epoch, sequence)."""
        core, row = self.core, member.row
        told = told or Exchange({}, {}, {}, False, False)
        reports: dict[str, str | None] = {**told.seen}
        reports.update({node: "" if mute else None for node, mute in told.mute.items()})

        def build() -> Batch:
            node = core.store.get(Node.select().where(Node.id == row.id))
            if node is None or node["state"] == REMOVED:
                raise Busy("the node was removed just now: ask again")
            if (node["epoch"], node["sequence"]) >= order:
                raise _NotFresh  # another replica has taken it
            values = {**told.values, "source": source, "public": public}
            if "name" in values:
                values["name"] = unused_name(core, row.network, values["name"], row.id)
            new = differences(node, self._checked(node, values))
            heard = is_heard(new) if node["state"] == ACTIVE else bool(OWN_COLUMNS & new.keys())
            batch = NetworkBatch(row.network, core.now, heard)
            try:
                columns = amend(core, batch, need_network(core, row.network), node, new)
            except Clash as problem:
                raise Invalid(str(problem)) from problem
            columns.update(epoch=order[0], sequence=order[1], confirmed=True, last_seen=core.now)
            if new:
                columns["modified"] = core.now
            newer = LIVING + " AND (epoch < ? OR (epoch = ? AND sequence < ?))"
            batch.update("node", columns, newer, row.id, order[0], *order, must=True)
            for node_id, place in reports.items():
                if self._is_peer(member, node_id):
                    self._observe(batch, row.id, node_id, place)
            return batch

        core.store.change(build)
        self.members.reload(row.id)
        self.members.prove(member.mesh)
        concerned = set(told.seen)
        if source != row.source:
            concerned.add(row.id)
        self.settle(member.mesh, concerned)

    def _checked(self, node: Row, values: Row) -> Row:
        """The columns with what follows from them; Clash where another machine speaks for the node."""
        machine = values.get("machine") or node["machine"]
        if node["machine"] and machine != node["machine"]:
            if self.core.now - node["machine_changed"] < CLONE:
                raise Clash(
                    "another machine uses this node's identity: is this a copy of its disk? Then join it again with --force"
                )
            values["machine_changed"] = self.core.now
        values = {**refreshed(self.core, node, values), "machine": machine}
        if node["at"] and values["public"] not in ("", split_endpoint(node["at"])[0]):
            values["at"] = ""
        return values

    @staticmethod
    def _is_peer(member: Member, node: str) -> bool:
        other = member.mesh.members.get(node)
        return other is not None and other is not member and other.row.state == ACTIVE

    @staticmethod
    def _observe(batch: NetworkBatch, observer: str, node: str, place: str | None) -> None:
        key = "network = ? AND node = ? AND observer = ?"
        batch.delete("observed", key, batch.network, node, observer)
        if place is not None:
            canonical = endpoint(*split_endpoint(place)) if place else ""
            row = {"network": batch.network, "node": node, "observer": observer}
            batch.insert("observed", {**row, "endpoint": canonical})

    # ---- observed endpoints

    def settle(self, mesh: Mesh, concerned: Iterable[str]) -> None:
        """Decide anew which observed endpoints are given out, each at most once a minute."""
        members = [mesh.members[node] for node in concerned if node in mesh.members]
        if not mesh.state.punch or not members:
            return
        overlays = [text for row in networks(self.core) for text in (row["range"], row["range6"]) if text]
        wanted = {}
        for member in members:
            row = member.row
            best = observed_endpoint(row, self._reports(member), overlays, row.at)
            if row.state != ACTIVE or best == row.at:
                continue
            if self.core.now - row.at_changed < MOVE_EVERY:
                self.due.add(row.id)
            else:
                wanted[row.id] = (row.at, best)
        if wanted:
            self._move_observed(mesh, wanted)

    def _reports(self, member: Member) -> list[Report]:
        sql = "SELECT observer, endpoint FROM observed WHERE network = ? AND node = ? AND endpoint != ''"
        rows = self.core.store.rows(sql, (member.row.network, member.row.id))
        observers = ((member.mesh.members.get(node), place) for node, place in rows)
        return [
            Report(place, observer.row.source)
            for observer, place in observers
            if observer is not None and observer.row.state == ACTIVE and self.core.now - observer.seen <= FRESH_REPORT
        ]

    def _move_observed(self, mesh: Mesh, wanted: Mapping[str, tuple[str, str]]) -> None:
        def build() -> Batch:
            batch = NetworkBatch(mesh.state.id, self.core.now)
            for node, (old, new) in wanted.items():
                change = {"at": new, "at_changed": self.core.now, "changed": batch.counter}
                batch.update("node", change, "id = ? AND at = ? AND state = 'active'", node, old)
            return batch

        self.core.store.change(build)
        self.members.prove(mesh)

    def settle_due(self) -> None:
        """The endpoints that had to wait for their minute."""
        due, self.due = self.due, set()
        for node in due:
            member = self.members.nodes.get(node)
            if member is not None and self.members.prove(member.mesh):
                self.settle(member.mesh, (node,))

    # ---- key refresh

    def _confirmed(self, member: Member, have: str, told: Exchange | None) -> None:
        """Note which revision a node has applied: a key refresh may have waited for that, or for its keys."""
        mesh = member.mesh
        counter = mesh.state.counter if have == mesh.word else member.have
        news = counter > member.have and mesh.refreshing
        member.have = counter
        if news or (told is not None and told.values.keys() & {"key", "next_key"}):
            self.refresh(mesh)

    def refresh(self, mesh: Mesh) -> None:
        """Take the key refresh of a network as far as it can go now."""
        now, interval = self.core.clock(), mesh.state.interval or self.interval
        active = [member for member in list(mesh.members.values()) if member.row.state == ACTIVE]
        here = [member for member in active if now - max(member.seen, member.parked) <= 2 * interval]
        lead = 5 + (0 if all(now - member.parked <= 2 * interval for member in here) else interval)
        at_it = [member for member in active if member.row.refresh not in ("", QUEUED)]
        for member in at_it:
            heard = all(other.have >= member.row.changed for other in here)
            free = all(other.row.refresh != SWITCHING for other in at_it)
            step = next_refresh(member.row, now, lead, member in here, heard, free)
            if step:
                step_refresh(self.core, member.row, *step)
                self.members.prove(mesh)
        if all(member.row.refresh in ("", QUEUED, SILENT) for member in at_it):
            start_refresh(self.core, mesh.state.id)
            self.members.prove(mesh)

    def refresh_due(self) -> None:
        """What time alone brings about in key refreshes, and what other processes have asked for."""
        for (network,) in self.core.store.rows("SELECT DISTINCT network FROM node WHERE refresh != '' AND state = 'active'"):
            mesh = self.members.mesh(network)
            if mesh is not None:
                self.refresh(mesh)

    # ---- look

    def look(self, capability: str, have: str, source: str, wait: float) -> Reply:
        """The present word, or "!" for "come with an exchange"; held until it is not `have`."""
        said = self._look(capability, source, min(wait, MAX_WAIT))
        if said != have or said == "!" or wait <= 0:  # a stranger waits for nothing
            return Reply(200, said.encode())
        if not self.bell.enter():
            return Reply(200, said.encode(), retry=self.interval)
        try:
            end = time.monotonic() + min(wait, MAX_WAIT)
            while said == have and not self.bell.stopped and time.monotonic() < end:
                rung = self.bell.rung
                said = self._look(capability, source, end - time.monotonic())
                if said == have:
                    self.bell.wait(rung, end - time.monotonic())
            return Reply(200, said.encode())
        finally:
            self.bell.leave()

    def _look(self, capability: str, source: str, wait: float) -> str:
        member = self.members.by_look(capability)
        if member is None or not self.members.prove(member.mesh):
            return "!"
        if member.row.state == REMOVED or member.row.source != source:
            return "!"
        member.see(self.core.clock())
        member.parked = max(member.parked, member.seen + wait) if wait > 0 else member.parked
        mesh: Mesh = member.mesh
        return mesh.word

    def flush(self) -> None:
        """Write behind who was seen."""
        batch = self.members.dirty()
        if batch:
            self.core.store.write_behind(batch)


# --------------------------------------------------------------------------------------------------
# VIEWS
# --------------------------------------------------------------------------------------------------
# The border between rows and JSON: one table for each kind, with the original's field names. Booleans
# are "yes" and "no" only here.


class Field(NamedTuple):
    """A member of a view: its name, the column or function that it shows, how text becomes a value.

    `check` is None for what cannot be set. `short` is its name on the command line, `help` that of its flag.
    """

    name: str
    source: str | Callable[[Row], Any]
    check: Callable[[str], Any] | None = None
    short: str = ""
    help: str = ""


def yes_no(text: str) -> bool:
    if text.lower() not in ("yes", "no", "on", "off", "true", "false"):
        raise Invalid("%r is neither yes nor no" % text)
    return text.lower() in ("yes", "on", "true")


def or_nothing(check_value: Callable[[str], Any], nothing: Any) -> Callable[[str], Any]:
    """The same check, where the empty text means the network's value, or none."""
    return lambda text: check_value(text) if text else nothing


def check_display(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_./;% ^#()!@$*-]{1,20}", text):
        raise Invalid("%r is no display name: 1 to 20 letters, digits, blanks or -_./;%%^#()!@$*" % text)
    return text


def check_interface(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", text):
        raise Invalid("%r is no interface name: 1 to 15 letters, digits, '.', '_' or '-'" % text)
    return text


def check_local_range(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as bad:
        raise Invalid("%r is no range: ADDRESS/BITS, like 192.168.1.0/24" % text) from bad


def check_static(text: str) -> str:
    """An endpoint set by hand: an address, or one with the port that others must use."""
    try:
        return check_address(text)
    except Invalid:
        return endpoint(*split_endpoint(text))


def check_expiry(text: str) -> int:
    """Unix time, or a time from now like 24h."""
    if text.isdigit():
        return whole(1, 1 << 40)(text)
    return int(time.time()) + check_lifetime(text)


def range_check(version: int) -> Callable[[str], str]:
    return or_nothing(lambda text: check_range(text, version), "")


PORT = whole(1024, 65535)
NETWORK_FIELDS = (
    Field("netid", "id"),
    Field("displayname", "display", check_display, "display", "name for people"),
    Field("addressrange", "range", range_check(4), "range", "IPv4 range, like 10.20.30.0/24"),
    Field("addressrange6", "range6", range_check(6), "range6", "IPv6 range, like fd00:20:30::/64"),
    Field("isdualstack", lambda row: bool(row["range"] and row["range6"])),
    Field("isipv4", lambda row: bool(row["range"])),
    Field("isipv6", lambda row: bool(row["range6"])),
    Field("islocal", "is_local", yes_no, "local-only", "all nodes are in one LAN"),
    Field("localrange", "local_range", or_nothing(check_local_range, ""), "local-range", "that LAN's range"),
    Field("defaultinterface", "interface", check_interface, "interface", "the nodes' interface (nm-NAME)"),
    Field("defaultlistenport", "port", PORT, "port", "the nodes' WireGuard port (51821)"),
    Field("defaultkeepalive", "keepalive", whole(0, 1000), "keepalive", "seconds, 0 for none (20)"),
    Field("defaultmtu", "mtu", whole(576, 9200), "mtu", "MTU of the interfaces (1280)"),
    Field("defaultudpholepunch", "punch", yes_no, "hole-punch", "use observed endpoints (yes)"),
    Field("nodelimit", "node_limit", whole(0, 1 << 53), "node-limit", "how many nodes it may have"),
    Field("allowmanualsignup", "manual", yes_no, "manual-signup", "let nodes ask without a key (no)"),
    Field("checkininterval", "interval", or_nothing(whole(2, 100000), None), "checkin-interval", "seconds"),
    Field("nodes", "members"),
    Field("revision", lambda row: "%d.%s" % (row["counter"], row["tag"])),
    Field("networklastmodified", "modified"),
    Field("nodeslastmodified", "nodes_modified"),
)


def shown_endpoint(row: Row) -> str:
    """The address at which others find a node, as far as the server knows."""
    return str(row["static"] or (split_endpoint(row["at"])[0] if row["at"] else row["public"]))


def leased(column: str) -> Callable[[Row], str]:
    """A pending node holds no address, only a wish."""
    return lambda row: "" if row["state"] == PENDING else str(row[column])


def node_status(row: Row) -> str:
    """How a node does: its state, or how long ago it was heard of."""
    if row["state"] != ACTIVE:
        return str(row["state"])
    silent = time.time() - row["last_seen"]
    return "healthy" if silent < 300 else "warning" if silent < 1800 else "error"


NODE_FIELDS = (
    Field("id", "id"),
    Field("name", "name", check_name),
    Field("network", "network"),
    Field("address", leased("ip"), lambda text: check_address(text, 4)),
    Field("address6", leased("ip6"), lambda text: check_address(text, 6)),
    Field("allowedips", lambda row: row["ips"].split(",") if row["ips"] else [], str),
    Field("publickey", "key"),
    Field("endpoint", shown_endpoint, or_nothing(check_static, "")),
    Field("listenport", "port", PORT, "port"),
    Field("localaddress", "local"),
    Field("isstatic", lambda row: bool(row["static"] or row["fixed"]), yes_no),
    Field("persistentkeepalive", "keepalive", or_nothing(whole(0, 1000), None), "keepalive"),
    Field("mtu", "mtu", or_nothing(whole(576, 9200), None)),
    Field("dnson", "dns", yes_no),
    Field("roaming", "roaming", yes_no),
    Field("ipforwarding", "forwarding", yes_no),
    Field("udpholepunch", "punch", yes_no, "hole-punch"),
    Field("islocal", "is_local", yes_no),
    Field("expdatetime", "expires", or_nothing(check_expiry, None), "expires"),
    Field("ispending", lambda row: row["state"] == PENDING),
    Field("status", node_status),
    Field("lastcheckin", "last_seen"),
    Field("lastmodified", "modified"),
    Field("os", "os"),
    Field("version", "version"),
    Field("observedendpoint", "at"),
    Field("rejected", "rejected"),
)

KEY_FIELDS = (
    Field("name", "name"),
    Field("network", "network"),
    Field("uses", "uses"),
    Field("expiration", "expires"),
    Field("created", "created"),
)

NODE_COLUMNS = {"address": "ip", "address6": "ip6", "allowedips": "ips", "endpoint": "static"}
BOOLEANS = frozenset(
    column for model in (Network, Node) for column, field in model._meta.fields.items() if isinstance(field, peewee.BooleanField)
)


def view(row: Row, fields: Sequence[Field]) -> Row:
    """A row as JSON shows it."""
    shown = {}
    for field in fields:
        value = field.source(row) if callable(field.source) else row[field.source]
        if isinstance(value, bool) or field.source in BOOLEANS:
            value = "yes" if value else "no"
        shown[field.name] = value
    return shown


def view_network(row: Row, settings: Settings) -> Row:
    return view({**row, "interval": row["interval"] or settings["CHECKIN_INTERVAL"]}, NETWORK_FIELDS)


def view_node(row: Row, network: Row) -> Row:
    """A node; what it has no value of its own for is the network's."""
    inherited = {name: network[name] for name in ("keepalive", "mtu") if row[name] is None}
    shown = view({**row, **inherited}, NODE_FIELDS)
    return {**shown, "interface": network["interface"]}


def view_key(row: Row) -> Row:
    """An access key; the secret parts are in the row only when it was just made."""
    shown = view(row, KEY_FIELDS)
    if "accessstring" in row:
        token = row["accessstring"]
        shown.update(value=row["value"], accessstring=token, join=join_command(token))
    return shown


def parse_fields(pairs: Iterable[str], fields: Sequence[Field], dashes: str = "") -> Row:
    """{field name: value} of `key=value` words; unknown and read-only ones are refused. `dashes`: before names in errors."""
    known = {name: field for field in fields if field.check for name in (field.name, field.short)}
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        field = known.get(name.lower())
        if not equals and field:
            raise Invalid("write %s=VALUE" % name)
        if field is None or field.check is None:
            names = ", ".join(sorted({field.name for field in known.values()}))
            raise Invalid("%r cannot be set: KEY=VALUE with one of %s" % (pair, names))
        try:
            found[field.name] = field.check(value)
        except Invalid as bad:
            between = " " if str(bad).startswith("takes ") else ": "
            raise Invalid(dashes + name + between + str(bad)) from bad
    return found


def network_columns(values: Row) -> Row:
    """Columns of a network from fields of its view."""
    columns = {field.name: field.source for field in NETWORK_FIELDS}
    return {str(columns[name]): value for name, value in values.items()}


def node_columns(values: Row, node: Row) -> Row:
    """Columns of a node from fields of its view. A port or endpoint that is set is static from then on."""
    sources = {field.name: field.source for field in NODE_FIELDS}
    columns = {}
    for name, value in values.items():
        source = sources[name]
        columns[source if isinstance(source, str) else NODE_COLUMNS.get(name, name)] = value
    static = columns.pop("isstatic", None)
    if static is False:
        columns.update(static="", fixed=False)
    elif static:
        columns.setdefault("static", node["static"] or node["public"])
        columns["fixed"] = True
    if "port" in columns:
        columns["fixed"] = True
    return columns


# --------------------------------------------------------------------------------------------------
# ROUTES
# --------------------------------------------------------------------------------------------------
# Roles: "anyone"; "agent" proves itself by the line of its request, not by a session.


class Route(NamedTuple):
    """One route: method, path, who may, and the name of the handler in Web."""

    method: str
    path: str
    role: str
    handler: str


ROUTES = (
    Route("GET", "/api/health", "anyone", "health"),
    Route("GET", "/api/getip", "anyone", "getip"),
    Route("GET", "/meshclient/files/netclient_lite.py", "anyone", "agent_file"),
    Route("GET", agent.HELLO_PATH, "anyone", "hello"),
    Route("POST", agent.JOIN_PATH, "agent", "join"),
    Route("POST", agent.EXCHANGE_PATH, "agent", "exchange"),
    Route("GET", agent.LOOK_PATH + "<capability>", "agent", "look"),
)


class Web:
    """The handlers: parse, act, answer."""

    def __init__(self, agents: Agents) -> None:
        self.agents = agents
        self.trusted = agents.core.settings["TRUSTED_PROXIES"]
        self._sources: dict[str, str] = {}

    # ---- border

    def source(self) -> str:
        """The address that a request came from; proxies are asked only where they are trusted."""
        peer = self._canonical(bottle.request.environ.get("REMOTE_ADDR", ""))
        forwarded = bottle.request.environ.get("HTTP_X_FORWARDED_FOR", "") if self.trusted else ""
        for hop in reversed(forwarded.split(",")):
            if not hop.strip() or not self._is_trusted(peer):
                break
            place = hop.strip()
            found = self._canonical(place.partition(":")[0] if place.count(":") == 1 else place)  # some add the port
            if not found:
                break  # what stands further left is anybody's word
            peer = found
        return peer

    def _canonical(self, text: str) -> str:
        found = self._sources.get(text)
        if found is None:
            try:
                found = check_address(text.partition("%")[0])
            except Invalid:
                found = ""
            if len(self._sources) > 4096:
                self._sources.clear()
            self._sources[text] = found
        return found

    def _is_trusted(self, address: str) -> bool:
        if not address:
            return False
        parsed = ipaddress.ip_address(address)
        return any(parsed.version == block.version and parsed in block for block in self.trusted)

    @staticmethod
    def body() -> bytes:
        environ = bottle.request.environ
        length = environ.get("CONTENT_LENGTH") or "0"
        if not length.isdigit() or int(length) > MAX_BODY:
            raise TooLarge("the body is larger than %d bytes" % MAX_BODY)
        return bytes(environ["wsgi.input"].read(int(length))) if int(length) else b""

    @staticmethod
    def send(reply: Reply, kind: str) -> bytes:
        response = bottle.response
        response.status = reply.status
        if reply.line:
            response.set_header(agent.HEADER, reply.line)
        if reply.retry:
            response.set_header("Retry-After", str(reply.retry))
        if reply.status != 204:
            response.content_type = kind
        return reply.body

    # ---- handlers

    def health(self) -> bytes:
        self.agents.core.store.meta("schema")
        return self.send(Reply(200, dump({"status": "ok", "version": __version__})), "application/json")

    def getip(self) -> bytes:
        return self.send(Reply(200, self.source().encode()), "text/plain")

    def agent_file(self) -> Any:
        folder, name = os.path.split(os.path.abspath(agent.__file__))
        kind = "text/x-python"
        return bottle.static_file(os.path.splitext(name)[0] + ".py", root=folder, mimetype=kind)

    def hello(self) -> bytes:
        said = {"pin": b64(self.agents.core.key.pin), "version": __version__}
        return self.send(Reply(200, dump(said)), "application/json")

    def join(self) -> bytes:
        line = bottle.request.environ.get("HTTP_NM_LITE", "")
        return self.send(self.agents.join(line, self.body(), self.source()), "application/octet-stream")

    def exchange(self) -> bytes:
        line = bottle.request.environ.get("HTTP_NM_LITE", "")
        reply = self.agents.exchange(line, self.body(), self.source())
        return self.send(reply, "application/octet-stream")

    def look(self, capability: str) -> bytes:
        query = bottle.request.query
        wait = query.get("wait", "0")
        seconds = float(wait) if re.fullmatch("[0-9]{1,3}", wait) else 0.0
        reply = self.agents.look(capability, query.get("have", "-"), self.source(), seconds)
        return self.send(reply, "text/plain")


def json_error(code: int, sentence: str) -> bytes:
    """An error in the original's envelope."""
    return dump({"Code": code, "Message": sentence, "error": sentence})


def expected_failures(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose expected failures are answers."""

    def safe(*args: Any, **named: Any) -> Any:
        try:
            return handler(*args, **named)
        except (ServerError, Invalid) as problem:
            status = http_status(problem)
            return Web.send(Reply(status, json_error(status, str(problem))), "application/json")
        except peewee.OperationalError as problem:
            log.error("database: %s", problem)
            return Web.send(Reply(503, json_error(503, "the database is busy: try again")), "application/json")

    return safe


def make_app(agents: Agents) -> Any:
    """The WSGI application: every route of the table, every error as JSON."""
    app = bottle.Bottle()
    web = Web(agents)
    for route in ROUTES:
        handler = expected_failures(getattr(web, route.handler))
        app.route(route.path, route.method, handler, name=route.handler, role=route.role)

    def unexpected(problem: Any) -> str:
        problem.content_type = "application/json"
        sentence = str(problem.body) if problem.status_code < 500 else "the server failed: its log tells why"
        return json_error(problem.status_code, sentence).decode()

    app.default_error_handler = unexpected
    return app


# --------------------------------------------------------------------------------------------------
# SERVE
# --------------------------------------------------------------------------------------------------

HOUSEKEEPING = 15.0  # seconds between two write-behinds
WATCH = 0.25  # seconds in which a change by another process wakes a long-poll


def listener(bind: str, port: int) -> socket.socket:
    """The listening socket; :: takes IPv4 too."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        sock.bind((bind, port))
    except OSError as problem:
        sock.close()
        raise ServerError(
            "cannot listen on %s port %d: %s. Is a server running already? Else choose another --port or --host"
            % (bind, port, problem.strerror)
        ) from problem
    sock.listen(1024)
    return sock


def lock_folder(folder: str) -> int:
    """Held while a server runs on a data folder."""
    handle = os.open(os.path.join(folder, "serve.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        os.close(handle)
        raise Clash("a server runs on %s: stop it first" % folder) from problem
    return handle


class _Threading(socketserver.ThreadingMixIn):
    daemon_threads = True


def waitress_server(app: Any, sock: socket.socket, polls: int) -> Any:
    import waitress.server

    return waitress.server.create_server(
        app,
        sockets=[sock],
        threads=polls + 8,  # parked polls can take no more than their part
        connection_limit=polls + 1000,
        asyncore_use_poll=True,  # select() ends at descriptor 1023
        channel_timeout=30,
        max_request_body_size=MAX_BODY,
        max_request_header_size=16384,
        clear_untrusted_proxy_headers=False,  # Web.source believes only TRUSTED_PROXIES
        ident=None,
    )


def run_waitress(app: Any, sock: socket.socket, polls: int) -> None:
    waitress_server(app, sock, polls).run()


def run_gevent(app: Any, sock: socket.socket, polls: int) -> None:
    import gevent.pywsgi

    gevent.pywsgi.WSGIServer(sock, app, log=None).serve_forever()


def run_wsgiref(app: Any, sock: socket.socket, polls: int) -> None:
    """The standard library's server with a thread for each request."""
    from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    class Server(_Threading, WSGIServer):
        address_family = sock.family

    ServerHandler.server_software = ""
    server = Server(sock.getsockname()[:2], Quiet, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    server.server_name, server.server_port = sock.getsockname()[:2]
    server.setup_environ()
    server.set_app(app)
    try:
        server.serve_forever()
    finally:
        server.server_close()


BACKENDS = {"waitress": run_waitress, "gevent": run_gevent, "wsgiref": run_wsgiref}


def backend(settings: Settings) -> Callable[[Any, socket.socket, int], None]:
    """The web server to run on: the one that is asked for, or what there is instead, with a word."""
    name = settings["SERVER_BACKEND"]
    if name == "gevent" and "gevent.monkey" not in sys.modules:
        os.environ["SERVER_BACKEND"] = name  # see IMPORTS: it has to be known before they are made
        os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *sys.argv[1:]])  # noqa: S606
    try:
        if name != "wsgiref":
            __import__(name)
    except ImportError:
        log.warning(
            "%s is not installed: serving with a thread for each request, which is slower "
            "(pip install %s)", name, name
        )  # fmt: skip
        name = "wsgiref"
    return BACKENDS[name]


class Housekeeping:
    """The two threads beside the web server: one for what time brings, one for other processes."""

    def __init__(self, agents: Agents) -> None:
        self.agents = agents
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self.tidy, self.watch)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Let go of what waits, write what is not written yet."""
        self.stopped.set()
        self.agents.bell.stop()
        for thread in self.threads:
            thread.join(5)
        self.agents.flush()

    def tidy(self) -> None:
        rounds = 0
        while not self.stopped.wait(HOUSEKEEPING):
            rounds += 1
            for task in (self.agents.flush, self.agents.settle_due, self.agents.refresh_due, partial(sweep, self.agents.core)):
                try:
                    task()
                except Exception as problem:  # whatever it is, the next round is needed
                    log.error("housekeeping: %r", problem)
            if rounds % 20 == 0:
                self.agents.sight.forget()

    def watch(self) -> None:
        """Wake long-polls for changes by the command line or another replica."""
        before: list[tuple[Any, ...]] = []
        while self.agents.bell.occupied():
            try:
                now = self.agents.core.store.rows("SELECT id, counter, tag FROM network")
            except peewee.PeeweeException as problem:
                log.error("watching: %s", problem)
                now = before
            if now != before:
                before = now
                self.agents.bell.ring()
            self.stopped.wait(WATCH)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def serve(settings: Settings, out: Callable[[str], None], new_key: bool = False) -> None:
    """Run the server until it is told to stop."""
    run = backend(settings)
    make_folder(settings.data)
    held = lock_folder(settings.data)
    try:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        with listener(settings["SERVER_BIND"], settings["API_PORT"]) as sock:
            if new_key:
                out("a new key; access keys that the old one sealed, removed: %d" % give_up_key(settings))
            _serve(open_core(settings), sock, run, out)
    finally:
        os.close(held)


def _serve(core: Core, sock: socket.socket, run: Callable[..., None], out: Callable[[str], None]) -> None:
    core.store.set_meta("urls", " ".join(own_urls(core.settings)))
    agents = Agents(core, Sight(core.settings))
    keeper = Housekeeping(agents)
    signal.signal(signal.SIGTERM, _terminate)
    out("listening on %s" % endpoint(*sock.getsockname()[:2]))
    out("agents reach it at %s" % core.store.meta("urls"))
    out("its key (pin): %s" % b64(core.key.pin))
    keeper.start()
    try:
        run(make_app(agents), sock, core.settings["POLL_LIMIT"])
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        keeper.stop()
        core.store.close()


# --------------------------------------------------------------------------------------------------
# CLI
# --------------------------------------------------------------------------------------------------


class Printed(NamedTuple):
    """What a command prints, the object for --json or the lines for people, and its exit status."""

    value: Any
    lines: list[str]
    status: int = 0


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value in ("", None) else str(value)


def aligned(rows: Sequence[Row], columns: Mapping[str, str], none: str) -> list[str]:
    """Aligned columns under their headings; columns: heading → field."""
    if not rows:
        return [none]
    cells = [list(columns)] + [[_cell(row[field]) for field in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _date(then: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(then))


def listing(row: Row) -> list[str]:
    """One object, a line for each field."""
    width = max(map(len, row))
    shown = {**row, **{name: _date(row[name]) for name in DATES & row.keys() if row[name]}}
    return ["%s  %s" % (name.ljust(width), _cell(value)) for name, value in shown.items()]


def ago(then: int) -> str:
    """How long ago, for people."""
    seconds = max(0, int(time.time()) - then)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return "%d %s ago" % (seconds // size, unit)
    return "%d s ago" % seconds if then else "never"


Arguments = argparse.Namespace
DATES = {"expdatetime", "lastcheckin", "lastmodified", "networklastmodified", "nodeslastmodified"}
NETWORK_COLUMNS = {
    "NETWORK": "netid", "RANGE": "addressrange", "RANGE6": "addressrange6", "NODES": "nodes",
    "REVISION": "revision",
}  # fmt: skip
NODE_TABLE = {
    "NAME": "name", "ID": "id", "ADDRESS": "address", "ADDRESS6": "address6", "ENDPOINT": "endpoint",
    "PORT": "listenport", "STATUS": "status", "SEEN": "seen",
}  # fmt: skip
KEY_COLUMNS = {"NAME": "name", "USES LEFT": "uses", "EXPIRES": "expires"}


def cmd_network_add(core: Core, args: Arguments) -> Printed:
    given = ((field.short, getattr(args, field.short.replace("-", "_"))) for field in NETWORK_FIELDS if field.short)
    words = ["%s=%s" % (name, {True: "yes"}.get(value, value)) for name, value in given if value]
    row = add_network(core, args.name, network_columns(parse_fields(words, NETWORK_FIELDS, "--")))
    where = " and ".join(filter(None, (row["range"], row["range6"])))
    lines = ["network %s: %s" % (row["id"], where), "next: netmaker-lite key add %s" % row["id"]]
    return Printed(view_network(row, core.settings), lines)


def cmd_network_list(core: Core, args: Arguments) -> Printed:
    shown = [view_network(row, core.settings) for row in networks(core)]
    none = "no networks: netmaker-lite network add NAME --range 10.20.30.0/24"
    return Printed(shown, aligned(shown, NETWORK_COLUMNS, none))


def cmd_network_show(core: Core, args: Arguments) -> Printed:
    shown = view_network(need_network(core, args.network), core.settings)
    return Printed(shown, listing(shown))


def cmd_network_set(core: Core, args: Arguments) -> Printed:
    values = network_columns(parse_fields(args.fields, NETWORK_FIELDS))
    shown = view_network(set_network(core, args.network, values), core.settings)
    return Printed(shown, listing(shown))


def cmd_network_remove(core: Core, args: Arguments) -> Printed:
    row = remove_network(core, args.network)
    return Printed(view_network(row, core.settings), ["network %s removed" % row["id"]])


def _until(key: Row) -> str:
    return ", until " + _date(key["expiration"]) if key["expiration"] else ""


def cmd_key_add(core: Core, args: Arguments) -> Printed:
    try:
        uses = None if args.uses == "unlimited" else whole(1, 1 << 31)(args.uses)
    except Invalid as bad:
        raise Invalid("--uses takes a whole number from 1 on, or unlimited, not %r" % args.uses) from bad
    lifetime = check_lifetime(args.expires) if args.expires else None
    shown = view_key(add_key(core, args.network, args.name, uses, lifetime))
    lines = [
        "key %s for %s, uses: %s%s" % (shown["name"], shown["network"], args.uses, _until(shown)),
        "  key    %s" % shown["value"],
        "  token  %s" % shown["accessstring"],
        "  join   %s" % shown["join"],
        "This is shown once.",
    ]
    return Printed(shown, lines)


def _expiry(end: int | None) -> str:
    return "never" if end is None else "expired" if end <= time.time() else _date(end)


def cmd_key_list(core: Core, args: Arguments) -> Printed:
    shown = [view_key(row) for row in access_keys(core, args.network)]
    for_people = [
        {
            **row,
            "uses": "unlimited" if row["uses"] is None else row["uses"],
            "expires": _expiry(row["expiration"]),
        }
        for row in shown
    ]
    none = "no keys: netmaker-lite key add %s" % args.network
    return Printed(shown, aligned(for_people, KEY_COLUMNS, none))


def cmd_key_remove(core: Core, args: Arguments) -> Printed:
    row = remove_key(core, args.network, args.key)
    return Printed(view_key(row), ["key %s removed: nobody can join with it any more" % row["name"]])


def cmd_node_list(core: Core, args: Arguments) -> Printed:
    network = need_network(core, args.network)
    shown = [view_node(row, network) for row in nodes(core, args.network)]
    for_people = [{**row, "seen": ago(row["lastcheckin"])} for row in shown]
    none = "no nodes: netmaker-lite key add %s prints the line that joins one" % network["id"]
    return Printed(shown, aligned(for_people, NODE_TABLE, none))


def cmd_node_show(core: Core, args: Arguments) -> Printed:
    node = need_node(core, args.network, args.node)
    shown = view_node(node, need_network(core, args.network))
    sql = (
        "SELECT node.name, observed.endpoint FROM observed JOIN node ON node.id = observed.observer"
        " WHERE observed.node = ? ORDER BY node.name"
    )
    seen_by = {name: place or "no handshake" for name, place in core.store.rows(sql, (node["id"],))}
    people = ["%s sees it at %s" % pair for pair in seen_by.items()]
    return Printed({**shown, "seenby": seen_by}, listing(shown) + people)


def node_command(action: Callable[[Core, Row], Row], done: str) -> Callable[[Core, Arguments], Printed]:
    """A command that does one thing to one node."""

    def command(core: Core, args: Arguments) -> Printed:
        node = action(core, need_node(core, args.network, args.node))
        shown = view_node(node, need_network(core, args.network))
        return Printed(shown, ["node %s %s" % (node["name"], done)])

    return command


def cmd_node_set(core: Core, args: Arguments) -> Printed:
    node = need_node(core, args.network, args.node)
    values = node_columns(parse_fields(args.fields, NODE_FIELDS), node)
    shown = view_node(set_node(core, node, values), need_network(core, args.network))
    return Printed(shown, listing(shown))


def cmd_backup(core: Core, args: Arguments) -> Printed:
    backup(core, args.file, args.with_key)
    note = "" if args.with_key else ", without server.key: keep that file too, or use --with-key"
    value = {"file": args.file, "with_key": "yes" if args.with_key else "no"}
    return Printed(value, ["backup written to %s%s" % (args.file, note)])


def cmd_check(core: Core, args: Arguments) -> Printed:
    found = check(core)
    lines = found or ["the database is in order"]
    return Printed({"findings": found}, lines, 1 if found else 0)


def cmd_restore(settings: Settings, args: Arguments) -> Printed:
    make_folder(settings.data)
    held = lock_folder(settings.data)
    try:
        done = restore(settings, args.file)
    finally:
        os.close(held)
    back = ["%s (%s, network %s)" % (node["name"], node["id"], node["network"]) for node in done.back]
    lines = ["restored: %d nodes" % done.nodes]
    lines += ["removed since the backup and back in now: " + each for each in back]
    value = {"nodes": done.nodes, "back": [node["id"] for node in done.back]}
    return Printed(value, lines)


def cmd_serve(settings: Settings, args: Arguments) -> Printed:
    serve(settings, write, args.new_key)
    return Printed(None, [])


def cmd_version(nothing: object, args: Arguments) -> Printed:
    return Printed({"version": __version__}, ["netmaker-lite " + __version__])


class Argument(NamedTuple):
    """An argument of a command, as argparse wants it."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]


def arg(*flags: str, **options: Any) -> Argument:
    return Argument(flags, options)


class Command(NamedTuple):
    """A command: its words, what it does, its arguments, what runs it, and whether on the open data or the settings alone."""

    words: str
    help: str
    arguments: tuple[Argument, ...]
    run: Callable[[Any, Arguments], Printed]
    on_data: bool = True


NETWORK = arg("network", metavar="NETWORK", help="its name")
NODE = arg("node", metavar="NODE", help="id or name")
PAIRS = arg("fields", metavar="KEY=VALUE", nargs="+", help="fields to set")
COMMANDS = (
    Command(
        "serve",
        "run the server",
        (
            arg("--host", metavar="ADDRESS", help="address to listen on (0.0.0.0)"),
            arg("--port", metavar="N", help="port to listen on (8081)"),
            arg("--new-key", action="store_true", help="the server.key is lost: make another, every agent joins again"),
        ),
        cmd_serve,
        False,
    ),
    Command(
        "network add",
        "make a network",
        (
            arg("name", metavar="NAME", help="1 to 12 letters, digits, '.', '_' or '-'"),
            arg("--local-only", action="store_true", help="all nodes are in one LAN"),
            *(
                arg("--" + field.short, metavar="X", help=field.help)
                for field in NETWORK_FIELDS
                if field.short and field.name != "islocal"
            ),
        ),
        cmd_network_add,
    ),
    Command("network list", "all networks", (), cmd_network_list),
    Command("network show", "one network", (NETWORK,), cmd_network_show),
    Command("network set", "change a network", (NETWORK, PAIRS), cmd_network_set),
    Command("network remove", "forget a network without nodes", (NETWORK,), cmd_network_remove),
    Command(
        "key add",
        "make an access key; print what joins a machine, once",
        (
            NETWORK,
            arg("--name", default="", metavar="N", help="its name (chosen by itself)"),
            arg("--uses", default="1", metavar="N", help="machines that may join, or `unlimited` (1)"),
            arg("--expires", default="", metavar="24h", help="how long it is good (for ever)"),
        ),
        cmd_key_add,
    ),
    Command("key list", "the access keys of a network", (NETWORK,), cmd_key_list),
    Command(
        "key remove",
        "make an access key useless",
        (NETWORK, arg("key", metavar="NAME", help="its name")),
        cmd_key_remove,
    ),
    Command("node list", "the nodes of a network", (NETWORK,), cmd_node_list),
    Command("node show", "one node", (NETWORK, NODE), cmd_node_show),
    Command("node approve", "let a pending node in", (NETWORK, NODE), node_command(approve, "approved")),
    Command("node reject", "turn a pending node away", (NETWORK, NODE), node_command(reject, "turned away")),
    Command("node disable", "take it out of the mesh", (NETWORK, NODE), node_command(disable, "disabled")),
    Command("node enable", "let it in again", (NETWORK, NODE), node_command(enable, "enabled")),
    Command("node remove", "end its membership", (NETWORK, NODE), node_command(remove_node, "removed")),
    Command("node set", "change a node", (NETWORK, NODE, PAIRS), cmd_node_set),
    Command(
        "backup",
        "write everything into one file",
        (
            arg("file", metavar="FILE", help="the backup"),
            arg("--with-key", action="store_true", help="with server.key: keep it like a password"),
        ),
        cmd_backup,
    ),
    Command("restore", "take over a backup", (arg("file", metavar="FILE", help="the backup"),), cmd_restore, False),
    Command("check", "look for faults in the database", (), cmd_check),
    Command("version", "print the version", (), cmd_version, False),
)
NOUNS = {"network": "networks", "key": "access keys", "node": "nodes"}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command table."""
    settings = ["  %-22s  %s%s" % (each.name, each.help, each.default and " [%s]" % each.default) for each in SETTINGS]
    parser = argparse.ArgumentParser(
        prog="netmaker-lite",
        description="Server of a WireGuard mesh, and its administrator's tool.",
        epilog="Settings (environment or netmaker.env): " + ", ".join(each.name for each in SETTINGS),
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    groups = {}
    for noun, what in NOUNS.items():
        group = verbs.add_parser(noun, help=what)
        groups[noun] = group.add_subparsers(metavar="VERB", required=True)
    for command in COMMANDS:
        noun, _, verb = command.words.rpartition(" ")
        place = groups[noun] if noun else verbs
        one = place.add_parser(verb, help=command.help, description=command.help)
        one.set_defaults(command=command, data="", json=False)
        if command.run is not cmd_version:
            one.add_argument("--data", metavar="DIR", help="the data folder")
        if command.run is not cmd_serve:
            one.add_argument("--json", action="store_true", help="print JSON")
        else:
            one.formatter_class = argparse.RawDescriptionHelpFormatter
            one.epilog = "settings (environment, or netmaker.env in the data folder):\n" + "\n".join(settings)
        for argument in command.arguments:
            one.add_argument(*argument.flags, **argument.options)
    return parser


def show(printed: Printed, as_json: bool) -> None:
    lines = [json.dumps(printed.value, indent=2)] if as_json and printed.value is not None else printed.lines
    for line in lines:
        write(line)


def run_command(args: Arguments, environment: Mapping[str, str]) -> int:
    """One command; its exit status."""
    command: Command = args.command
    if command.run is cmd_version:
        show(cmd_version(None, args), args.json)
        return 0
    given = FLAGS if command.run is cmd_serve else {"data": FLAGS["data"]}
    flags = {name: getattr(args, flag) for flag, name in given.items() if getattr(args, flag)}
    settings = Settings(flags, environment)
    level = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)[settings["VERBOSITY"]]
    logging.basicConfig(level=level, format="%(message)s")
    for doubt in settings.doubts:
        log.warning(doubt)
    as_owner(settings.data)
    core = open_core(settings, command.run is cmd_network_add) if command.on_data else None
    try:
        printed = command.run(core or settings, args)
    finally:
        if core is not None:
            core.store.close()
    show(printed, args.json)
    return printed.status


def not_ours(path: str) -> str:
    """Whose a file or folder is that we may not open, and what to do."""
    while not os.path.exists(path):  # also when a folder above hides it
        path = os.path.dirname(os.path.abspath(path))
    owner = os.stat(path).st_uid
    with open("/etc/passwd", encoding="utf-8", errors="replace") as stream:
        users = {words[2]: words[0] for words in (line.split(":") for line in stream) if len(words) > 2}
    cure = "run this with sudo" if os.getuid() else "give it to the owner of the data folder"
    return "%s belongs to %s: %s" % (path, users.get(str(owner), "user %d" % owner), cure)


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    args = make_parser().parse_args(argv)
    try:
        return run_command(args, environment)
    except (ServerError, Invalid) as problem:
        sys.stderr.write("netmaker-lite: %s\n" % problem)
        return 2 if isinstance(problem, Invalid) else 1
    except PermissionError as problem:
        sys.stderr.write("netmaker-lite: %s\n" % not_ours(problem.filename or "/"))
        return 1
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
