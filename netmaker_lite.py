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
import secrets
import signal
import socket
import socketserver
import sqlite3
import threading
import time
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
    Optional,
    Sequence,
    Tuple,
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
    same,
    split_endpoint,
    unb64,
    unseal,
)

Row = Dict[str, Any]  # a row of the database by column
log = logging.getLogger("netmaker-lite")

# --------------------------------------------------------------------------------------------------
# SETTINGS
# --------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One setting: its name in environment and file, its default, what it does, its flag if any."""

    name: str
    default: str
    help: str
    flag: str = ""


SETTINGS = (
    Setting("NETMAKER_DATA", "/var/lib/netmaker-lite", "the data folder", "--data"),
    Setting("SERVER_BIND", "0.0.0.0", "address to listen on; :: for IPv6 and IPv4", "--host"),  # noqa: S104
    Setting("API_PORT", "8081", "port to listen on", "--port"),
    Setting("SERVER_HOST", "", "name or address that tokens carry (default: the default route's)"),
    Setting("SERVER_API_CONN_STRING", "", "HOST:PORT or URL for tokens, comma-separated, instead"),
    Setting("SERVER_BACKEND", "waitress", "waitress, gevent or wsgiref"),
    Setting("SERVER_KEY_FILE", "", "the server's key (default: server.key in the data folder)"),
    Setting("DATABASE", "sqlite", "sqlite"),
    Setting("CHECKIN_INTERVAL", "15", "seconds between two check-ins of an agent"),
    Setting("DEFAULT_NODE_LIMIT", "999999999", "nodes that a new network may have"),
    Setting("TRUSTED_PROXIES", "", "addresses or ranges whose X-Forwarded-For is believed"),
    Setting("POLL_LIMIT", "64", "long-polls held at once"),
    Setting("VERBOSITY", "1", "0 errors, 1 warnings and events, 2 requests, 3 everything"),
)
SETTINGS_FILE = "netmaker.env"


def read_settings_file(path: str) -> dict[str, str]:
    """NAME=value lines; # starts a comment; quotes around the value go."""
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [line.strip() for line in stream]
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.replace("export ", "").strip(): value.strip().strip("'\"") for name, _, value in pairs}


class Settings:
    """What holds for this process: flag over environment over file over default."""

    def __init__(self, flags: Mapping[str, str], environment: Mapping[str, str]) -> None:
        known = {setting.name: setting.default for setting in SETTINGS}
        self.values: dict[str, str] = dict(known)
        given = {name: value for name, value in {**environment, **flags}.items() if name in known}
        self.values.update(given)
        file = read_settings_file(os.path.join(self.data, SETTINGS_FILE))
        self.values.update({name: value for name, value in file.items() if name in known})
        self.values.update(given)
        if self.values["DATABASE"] != "sqlite":
            raise Invalid(
                "DATABASE=%s is not supported by this version, which keeps its data in SQLite: "
                "set DATABASE=sqlite" % self.values["DATABASE"]
            )

    def number(self, name: str, low: int, high: int) -> int:
        text = self.values[name]
        if not text.isdigit() or not low <= int(text) <= high:
            raise Invalid("%s=%s is no whole number from %d to %d" % (name, text, low, high))
        return int(text)

    @property
    def data(self) -> str:
        return self.values["NETMAKER_DATA"]

    @property
    def key_file(self) -> str:
        return self.values["SERVER_KEY_FILE"] or os.path.join(self.data, "server.key")

    @property
    def port(self) -> int:
        return self.number("API_PORT", 1, 65535)

    @property
    def interval(self) -> int:
        return self.number("CHECKIN_INTERVAL", 2, 100000)

    @property
    def poll_limit(self) -> int:
        return self.number("POLL_LIMIT", 1, 100000)

    @property
    def trusted(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        try:
            words = self.values["TRUSTED_PROXIES"].replace(",", " ").split()
            return tuple(ipaddress.ip_network(word, strict=False) for word in words)
        except ValueError as bad:
            raise Invalid("TRUSTED_PROXIES: %s" % bad) from bad


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


def check_range(text: str, version: int) -> str:
    """The canonical text of a network's range; Invalid with a sentence when it cannot be one."""
    try:
        block: IPNetwork = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError as bad:
        raise Invalid("%r is no range: ADDRESS/BITS, like 10.20.30.0/24" % text) from bad
    shortest, longest = PREFIXES[version]
    if block.version != version:
        raise Invalid("%s is no IPv%d range" % (text, version))
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
    return one.version == other.version and one.overlaps(other)  # type: ignore[arg-type]


class Pool(NamedTuple):
    """The addresses of one range that nodes may have: host numbers 1 to `last`.

    Number 0 is the network address (IPv6: the routers' anycast), the one after `last` the broadcast
    address. Neither is ever given out.
    """

    version: int
    base: int
    last: int

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


class Leases:
    """What `place` asks of the leases; the store answers, tests too."""

    def held(self, address: str) -> bool | None:
        """True: a node has it. False: it was released. None: nobody ever had it."""
        raise NotImplementedError

    def released(self) -> Iterable[str]:
        """Released addresses, the longest released one first."""
        raise NotImplementedError


class Placement(NamedTuple):
    """Addresses for a node, in the order of the pools, and where to go on next time."""

    addresses: tuple[str, ...]
    cursor: int


def next_free(ranges: Sequence[Pool], cursor: int, leases: Leases) -> tuple[int, int]:
    """(host number that is free in every pool, new cursor); Clash when there is none."""
    last = min(each.last for each in ranges)
    for host in range(cursor, last + 1):
        if all(leases.held(each.address(host)) is None for each in ranges):
            return host, host + 1
    for address in leases.released():
        host = max(each.host(address) for each in ranges)
        if 0 < host <= last and not any(leases.held(each.address(host)) for each in ranges):
            return host, max(cursor, last + 1)
    raise Clash("every address of the network is taken: remove nodes, or add another network")


def place(ranges: Sequence[Pool], cursor: int, wishes: Sequence[str], leases: Leases) -> Placement:
    """Addresses for a new node: its wishes where they can be met, else the next free host number."""
    found = {}
    for wish in filter(None, wishes):
        home = next((each for each in ranges if each.host(wish)), None)
        if home is None:
            raise Invalid("%s is no address that a node of this network can have" % wish)
        if leases.held(wish):
            raise Clash("the address %s is taken: wish for another, or for none" % wish)
        found[home] = home.host(wish)
    open_ranges = [each for each in ranges if each not in found]
    for each in list(open_ranges):
        host = next(iter(found.values()), 0)
        if 0 < host <= each.last and leases.held(each.address(host)) is None:
            found[each] = host
            open_ranges.remove(each)
    if open_ranges:
        host, cursor = next_free(open_ranges, cursor, leases)
        found.update(dict.fromkeys(open_ranges, host))
    return Placement(tuple(each.address(found[each]) for each in ranges), cursor)


def check_routes(text: str, taken: Iterable[str]) -> str:
    """More allowed IPs of a node, comma-separated, canonical; no default route, nothing twice."""
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
        if other or blocks.count(block_text) > 1:
            raise Clash("%s overlaps %s, which has an owner" % (block_text, other or block_text))
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
        if not os.path.exists(path):
            write_private(path, b64(secrets.token_bytes(agent.KEY_BYTES)).encode() + b"\n", False)
        with open(path, encoding="ascii") as stream:
            try:
                return cls(unb64(stream.read().strip()))
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


def server_url(text: str) -> str:
    """A server address for tokens: a URL, or HOST:PORT."""
    url = text if "://" in text else "http://" + text
    try:
        agent.split_url(url)
    except ValueError as bad:
        raise Invalid("%s, as SERVER_API_CONN_STRING has it" % bad) from bad
    return url.rstrip("/")


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


Node.add_index(Node.index(Node.network, Node.auth, unique=True))
Node.add_index(
    Node.index(
        Node.network, Node.name, unique=True, where=(Node.state != REMOVED), name="node_name"
    )
)
Node.add_index(Node.index(Node.network, Node.changed))
Node.add_index(Node.index(Node.network, Node.own_changed))
Node.add_index(Node.index(Node.source))
Lease.add_index(Lease.index(Lease.network, Lease.node, Lease.released))
AccessKey.add_index(AccessKey.index(AccessKey.network, AccessKey.name, unique=True))

MODELS = (Meta, Network, Node, Lease, AccessKey, Revision, Gone, Observed, Joined)
SCHEMA = 1
MIGRATIONS: dict[int, tuple[str, ...]] = {}  # version → the statements that lead to it from the one before
