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
Node.add_index(
    Node.index(Node.network, Node.key, unique=True, where=(Node.state != REMOVED), name="node_key")
)
Node.add_index(Node.index(Node.network, Node.changed))
Node.add_index(Node.index(Node.network, Node.own_changed))
Node.add_index(Node.index(Node.network, Node.state))
Node.add_index(Node.index(Node.source))
Lease.add_index(Lease.index(Lease.network, Lease.node, Lease.released))
AccessKey.add_index(AccessKey.index(AccessKey.network, AccessKey.name, unique=True))

MODELS = (Meta, Network, Node, Lease, AccessKey, Revision, Gone, Observed, Joined)
SCHEMA = 1
MIGRATIONS: dict[int, tuple[str, ...]] = {}  # version → the statements that lead to it from the one before

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

HISTORY = 4096  # words kept: how far back deltas reach
TRIES = 20  # of a change whose preconditions another process has upset meanwhile
DATABASE_FILE = "netmaker.db"


class Expression(NamedTuple):
    """SQL in the place of a value."""

    sql: str
    values: tuple[Any, ...] = ()


class Batch:
    """A change as a list of statements; `when` are the preconditions, as SQL on the stamped row."""

    def __init__(self, table: str, key: str, identity: str) -> None:
        self.stamp = secrets.token_hex(8)
        self._table, self._key, self._identity = table, key, identity
        self._set: list[str] = []
        self._set_values: list[Any] = []
        self._when: list[str] = []
        self._when_values: list[Any] = []
        self._rest: list[tuple[str, list[Any], bool]] = []

    def set(self, assignment: str, *values: Any) -> None:
        """A column of the stamped row."""
        self._set.append(assignment)
        self._set_values += values

    def when(self, condition: str, *values: Any) -> None:
        """A precondition of the whole change."""
        self._when.append(condition)
        self._when_values += values

    # The statements below are put together from this file's own names; what comes from outside is
    # always a bound value. SQL that differs between databases would be told apart here.

    def insert(self, table: str, values: Mapping[str, Any]) -> None:
        marks, bound = self._marks(values)
        columns = ", ".join('"%s"' % name for name in values)
        sql = "INSERT INTO %s (%s) SELECT %s WHERE " % (table, columns, ", ".join(marks))  # noqa: S608
        self._add(sql, bound, True)

    def update(
        self, table: str, values: Mapping[str, Any], where: str, *bound: Any, must: bool = False
    ) -> None:
        """`must`: exactly one row has to change, or the whole batch does not apply."""
        marks, assigned = self._marks(values)
        pairs = ", ".join('"%s" = %s' % pair for pair in zip(values, marks))
        sql = "UPDATE %s SET %s WHERE %s AND " % (table, pairs, where)  # noqa: S608
        self._add(sql, [*assigned, *bound], must)

    def delete(self, table: str, where: str, *bound: Any) -> None:
        self._add("DELETE FROM %s WHERE %s AND " % (table, where), list(bound), False)  # noqa: S608

    @staticmethod
    def _marks(values: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        marks: list[str] = []
        bound: list[Any] = []
        for value in values.values():
            marks.append(value.sql if isinstance(value, Expression) else "?")
            bound += value.values if isinstance(value, Expression) else [value]
        return marks, bound

    def _add(self, sql: str, bound: list[Any], must: bool) -> None:
        stamped = "EXISTS (SELECT 1 FROM %s WHERE %s = ? AND stamp = ?)"
        sql += stamped % (self._table, self._key)
        self._rest.append((sql, [*bound, self._identity, self.stamp], must))

    def statements(self) -> Iterator[tuple[str, list[Any], bool]]:
        pairs = ", ".join([*self._set, "stamp = ?"])
        conditions = " AND ".join(["%s = ?" % self._key, *self._when])
        sql = "UPDATE %s SET %s WHERE %s" % (self._table, pairs, conditions)  # noqa: S608
        yield sql, [*self._set_values, self.stamp, self._identity, *self._when_values], True
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
            "INSERT INTO revision (network, counter, tag)"
            " SELECT id, counter, tag FROM network WHERE id = ? AND ",
            [network],
            True,
        )
        for table in ("revision", "gone"):
            oldest = "counter <= (SELECT counter FROM network WHERE id = ?) - ?"
            self.delete(table, "network = ? AND " + oldest, network, network, HISTORY)


class NetworkListBatch(Batch):
    """A change of which networks there are: stamped in the row of the table `meta` for that."""

    def __init__(self) -> None:
        super().__init__("meta", "key", "networks")

    def _add(self, sql: str, bound: list[Any], must: bool) -> None:
        sql += "EXISTS (SELECT 1 FROM meta WHERE key = ? AND value = ?)"
        self._rest.append((sql, [*bound, "networks", self.stamp], must))

    def statements(self) -> Iterator[tuple[str, list[Any], bool]]:
        conditions = " AND ".join(["key = ?", *self._when])
        sql = "UPDATE meta SET value = ? WHERE %s" % conditions  # noqa: S608
        yield sql, [self.stamp, "networks", *self._when_values], True
        yield from self._rest


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
    return peewee.SqliteDatabase(
        path, pragmas=pragmas, thread_safe=False, check_same_thread=False, timeout=5
    )


class Store:
    """The database of one data folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, DATABASE_FILE)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self.committed: Callable[[], None] = lambda: None  # told after every change of this process
        self._writing, self._reading = threading.RLock(), threading.RLock()
        self.writer, self.reader = _connection(self.path), _connection(self.path)
        self._prepare()
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
                    self.writer.execute_sql(statement)
                self._write("UPDATE meta SET value = ? WHERE key = ?", (str(version), "schema"))
            log.warning("the database is of schema %d now", version)

    def _create(self) -> None:
        first = {"schema": str(SCHEMA), "incarnation": new_incarnation(), "networks": "", "pin": ""}
        with self.writer.atomic("IMMEDIATE"), self.writer.bind_ctx(MODELS):
            self.writer.create_tables(MODELS)
            for key, value in {**first, "urls": ""}.items():  # another start may have been first
                sql = "INSERT INTO meta (key, value) SELECT ?, ? WHERE NOT EXISTS"
                self._write(sql + " (SELECT 1 FROM meta WHERE key = ?)", (key, value, key))

    # ---- reading

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._reading:
            return list(self.reader.execute_sql(sql, values).fetchall())

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        with self._reading:
            found: tuple[Any, ...] | None = self.reader.execute_sql(sql, values).fetchone()
            return found

    def word(self, network: str) -> tuple[int, str] | None:
        """(counter, tag) of a network: the one keyed read that proves what is in memory fresh."""
        return self.row("SELECT counter, tag FROM network WHERE id = ?", (network,))  # type: ignore[return-value]

    def select(self, query: Any) -> list[Row]:
        """The rows of a peewee query, for what is not on the hot path."""
        with self._reading:
            return list(query.dicts().execute(self.reader))

    def get(self, query: Any) -> Row | None:
        return next(iter(self.select(query.limit(1))), None)

    def meta(self, key: str) -> str:
        found = self.row("SELECT value FROM meta WHERE key = ?", (key,))
        return str(found[0]) if found else ""

    # ---- writing

    def _write(self, sql: str, values: Sequence[Any]) -> int:
        return int(self.writer.execute_sql(sql, values).rowcount)

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

    def copy(self, path: str) -> None:
        """A consistent copy as one file, also while others write."""
        temporary = "%s.%s" % (path, secrets.token_hex(4))
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            target = sqlite3.connect(temporary)
            with self._writing:
                self.writer.connection().backup(target)
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
            source.backup(self.writer.connection())
        self.incarnation = self.meta("incarnation")


def new_incarnation() -> str:
    return b64(secrets.token_bytes(8))


class StoredLeases(Leases):
    """The leases of one network, as the database has them."""

    def __init__(self, store: Store, network: str) -> None:
        self.store, self.network = store, network

    def held(self, address: str) -> bool | None:
        sql = "SELECT node FROM lease WHERE network = ? AND address = ?"
        found = self.store.row(sql, (self.network, address))
        return None if found is None else found[0] is not None

    def released(self) -> Iterable[str]:
        sql = (
            "SELECT address FROM lease WHERE network = ? AND node IS NULL"
            " ORDER BY released, address LIMIT 256"
        )
        return [str(row[0]) for row in self.store.rows(sql, (self.network,))]


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


# A change of these columns must be heard by the others, or by the node itself.
RECORD_COLUMNS = frozenset(
    ("name", "key", "ip", "ip6", "ips", "static", "port", "public", "at", "local", "lan", "punch")
)
OWN_COLUMNS = frozenset(
    ("name", "ip", "ip6", "port", "keepalive", "mtu", "dns", "forwarding", "punch", "is_local")
)


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
    """`me`: what only the node itself hears. The last four only where they are not the default."""
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
    }
    fields.update({name: value for name, (value, usual) in unusual.items() if value != usual})
    return fields


def parse_word(word: str) -> tuple[int, str]:
    """(counter, tag) of a word; (-1, "") of `-` and of what is none."""
    counter, _, tag = word.partition(".")
    return (int(counter), tag) if counter.isdigit() and len(counter) < 19 else (-1, "")


class Report(NamedTuple):
    """An endpoint of a node, and the address of the node that has a fresh handshake with it there."""

    endpoint: str
    source: str


def observed_endpoint(
    node: NodeState, reports: Iterable[Report], overlays: Sequence[str], recorded: str
) -> str:
    """The endpoint of a node that its peers see, "" for none worth giving out (SPEC, §8).

    An observer in the node's own LAN sees what others cannot use. Where the server saw a public
    address, only endpoints of that address count. Two ports at once are a hard NAT: every peer would
    see another one. `recorded`, the present one, stays when nobody reports anything.
    """
    seen = _endpoint(node.public, node.port)
    found = {
        report.endpoint
        for report in reports
        if report.source != node.source and _usable(report.endpoint, overlays)
    }
    if node.public:
        found = {place for place in found if split_endpoint(place)[0] == node.public}
        recorded = recorded if recorded and split_endpoint(recorded)[0] == node.public else ""
    if not found:
        return recorded
    if len({split_endpoint(place)[1] for place in found}) > 1:
        return ""
    best = recorded if recorded in found else min(found)
    return "" if best == seen else best


def _usable(place: str, overlays: Sequence[str]) -> bool:
    address = split_endpoint(place)[0]
    parsed = ipaddress.ip_address(address)
    blocks = (ipaddress.ip_network(text) for text in overlays)
    inside = any(parsed.version == block.version and parsed in block for block in blocks)
    return is_public(address) and not inside


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
        "answer_key", "box", "dirty", "epoch", "last_mac", "last_time", "mesh", "record", "request_key",
        "row", "seen", "sequence",
    )  # fmt: skip

    def __init__(self, mesh: Mesh, row: NodeState) -> None:
        self.mesh, self.row = mesh, row
        self.epoch, self.sequence = row.epoch, UNKNOWN
        self.last_mac, self.last_time = "", 0.0
        self.seen, self.dirty = row.last_seen, False
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
        """Word, records and the gone ones since a counter (-1: all), without the braces."""
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


NODE_SELECT = "SELECT %s FROM node WHERE " % ", ".join(NodeState._fields)  # noqa: S608
NETWORK_SELECT = "SELECT %s FROM network WHERE id = ?" % ", ".join(NetworkState._fields)  # noqa: S608


class Members:
    """All networks in memory, by network, node and look capability."""

    def __init__(self, store: Store) -> None:
        self.store = store
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
            return mesh and self._put(mesh, row)

    def _put(self, mesh: Mesh, row: NodeState) -> Member:
        member = self.nodes.get(row.id)
        if member is None:
            member = Member(mesh, row)
            self.nodes[row.id] = self.looks[row.look] = mesh.members[row.id] = member
        else:
            member.renew(row)
        return member

    def reload(self, node: str) -> Member | None:
        """After a change of this process that moved no word: the node's row as it is now."""
        return self._find("id = ?", node)

    def forget(self, node: str) -> None:
        with self._lock:
            member = self.nodes.pop(node, None)
            if member is not None:
                self.looks.pop(member.row.look, None)
                member.mesh.members.pop(node, None)

    def prove(self, mesh: Mesh) -> bool:
        """Bring a network up to date; False when it is no more. One row read when nothing changed."""
        word = self.store.word(mesh.state.id)
        if word is not None and word == mesh.state[3:5]:
            return True
        with self._lock:
            if word is None:
                self._drop(mesh)
            elif self._continues(mesh, word):
                self._catch_up(mesh)
            else:  # the database went back in time
                self._drop(mesh)
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
        return dict(self.store.rows(sql, (network, since)))  # type: ignore[arg-type]

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

    def __init__(
        self, settings: Settings, store: Store, key: ServerKey, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings, self.store, self.key, self.clock = settings, store, key, clock

    @property
    def now(self) -> int:
        return int(self.clock())


def open_core(settings: Settings) -> Core:
    """The data folder of these settings, made where it is not there yet."""
    try:
        store = Store(settings.data)
        key = ServerKey.load(settings.key_file)
    except (OSError, peewee.OperationalError, peewee.DatabaseError) as problem:
        raise ServerError(
            "cannot use the data folder %s (%s): run as its owner, or name another by --data"
            % (settings.data, problem)
        ) from problem
    pin = b64(key.pin)
    if store.meta("pin") not in ("", pin):
        raise ServerError(
            "%s is not the key that this database was made with (its pin is %s): restore that server.key"
            % (settings.key_file, store.meta("pin"))
        )
    store.set_meta("pin", pin)
    return Core(settings, store, key)


def blank(model: Any) -> Row:
    """A row of defaults."""
    return dict(model._meta.get_default_dict())


def released(node: str) -> tuple[str, tuple[Any, ...]]:
    """Where-clause of what others know of a node, or it of others."""
    return "node = ? OR observer = ?", (node, node)


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
    limit = core.settings.number("DEFAULT_NODE_LIMIT", 0, 1 << 53)
    new["node_limit"] = values.get("node_limit", limit)

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


def renumber(nodes: Iterable[Row], column: str, old: str, new: str) -> dict[str, str]:
    """New addresses by node for another range, keeping host numbers that fit it."""
    if not new:
        return {node["id"]: "" for node in nodes}
    target, source = pool(new), pool(old) if old else None
    hosts, rest = {}, []
    for node in nodes:
        host = source.host(node[column]) if source and node[column] else 0
        if 0 < host <= target.last:
            hosts[host] = node["id"]
        else:
            rest.append(node["id"])
    free = (host for host in range(1, target.last + 1) if host not in hosts)
    for node_id, host in zip(rest, free):
        hosts[host] = node_id
    found = {node_id: target.address(host) for host, node_id in hosts.items()}
    if set(rest) - set(found):
        raise Clash("%s has fewer addresses than the network has nodes: take a larger range" % new)
    return found


def _change_ranges(core: Core, batch: NetworkBatch, old: Row, values: Row) -> None:
    """Readdress every node in the same transaction."""
    stamp = core.store.meta("networks")
    batch.update(
        "meta", {"value": batch.stamp}, "key = 'networks' AND value = ?", stamp, must=True
    )
    batch.when("counter = ?", old["counter"])
    states = (ACTIVE, DISABLED, EXPIRED)
    condition = (Node.network == old["id"]) & Node.state.in_(states)
    nodes = core.store.select(Node.select(Node.id, Node.ip, Node.ip6).where(condition))
    moved = {
        column: renumber(nodes, column, old[ranges], values[ranges])
        for column, ranges in (("ip", "range"), ("ip6", "range6"))
        if ranges in values
    }
    batch.delete("lease", "network = ?", old["id"])
    highest = 0
    ranges = [values.get(name, old[name]) for name in ("range", "range6")]
    for node in nodes:
        new = {**node, **{column: places[node["id"]] for column, places in moved.items()}}
        for address in filter(None, (new["ip"], new["ip6"])):
            highest = max([highest, *(each.host(address) for each in pools(*ranges))])
            batch.insert("lease", _lease(old["id"], address, node["id"]))
        change = {"ip": new["ip"], "ip6": new["ip6"]}
        change.update(changed=batch.counter, own_changed=batch.counter)
        batch.update("node", change, "id = ?", node["id"])
    last = min(each.last for each in pools(*ranges))
    batch.set("cursor = ?", min(highest, last) + 1)


def _lease(network: str, address: str, node: str) -> Row:
    return {"network": network, "address": address, "node": node, "released": None}


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
        if core.store.row("SELECT 1 FROM node WHERE " + living, (network["id"],)):  # noqa: S608
            raise Clash("the network %s has nodes: remove them first" % network["id"])
        batch = NetworkListBatch()
        nobody = "NOT EXISTS (SELECT 1 FROM node WHERE %s)" % living  # noqa: S608
        batch.when(nobody, network["id"])
        for table in ("node", "lease", "access_key", "revision", "gone", "observed", "joined"):
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


def server_urls(core: Core) -> tuple[str, ...]:
    """The addresses that tokens carry: what `serve` wrote down, else what it would write."""
    written = core.store.meta("urls")
    return tuple(written.split()) if written else own_urls(core.settings)


def own_urls(settings: Settings) -> tuple[str, ...]:
    given = settings.values["SERVER_API_CONN_STRING"].replace(",", " ").split()
    host = settings.values["SERVER_HOST"] or default_address()
    place = "[%s]" % host if ":" in host else host
    return tuple(map(server_url, given or ["%s:%d" % (place, settings.port)]))


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


def add_key(
    core: Core, network: str, name: str = "", uses: int | None = 1, lifetime: int | None = None
) -> Row:
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


def signup_token(core: Core, network: str) -> str:
    """A token without a key: who joins with it waits for approval."""
    owner = need_network(core, network)
    return agent.make_token(agent.Token(server_urls(core), core.key.pin, owner["id"], ""))


def remove_key(core: Core, network: str, name: str) -> Row:
    owner = need_network(core, network)
    found = next((key for key in access_keys(core, network) if name in (key["name"], key["id"])), None)
    if found is None:
        raise Missing("%s has no key %s: `netmaker-lite key list` shows which there are" % (network, name))

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
        raise Missing("%s has no node %s: `netmaker-lite node list` shows which there are" % (name, text))
    return found


class Joining(NamedTuple):
    """Who wants to join: all of it checked. No access key: manual sign-up."""

    network: str
    auth: str
    access_key: str
    source: str
    public: str
    values: Row


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
    return found


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


def _new_node(core: Core, network: Row, who: Joining) -> Row:
    new = {**blank(Node), **who.values, "id": secrets.token_hex(8), "network": network["id"]}
    new.update(auth=who.auth, look=b64(secrets.token_bytes(16)), source=who.source)
    new.update(public=who.public, created=core.now, modified=core.now, last_seen=core.now)
    new["state"] = ACTIVE if who.access_key else PENDING
    _check_key_free(core, new)
    wish = new.get("name") or "node"
    sql = "SELECT name FROM node WHERE network = ? AND state != 'removed' AND (name = ? OR name LIKE ?)"
    taken = core.store.rows(sql, (network["id"], wish, wish[:59] + "-%"))
    new["name"] = free_name(wish, (row[0] for row in taken))
    new["port"] = new["port"] or network["port"]
    if not new["fixed"]:
        sql = "SELECT port FROM node WHERE source = ? AND state != 'removed'"
        taken = core.store.rows(sql, (who.source,))
        new["port"] = free_port(new["port"], (row[0] for row in taken))
    return new


def _check_key_free(core: Core, node: Row) -> None:
    sql = "SELECT name FROM node WHERE network = ? AND key = ? AND state != 'removed' AND id != ?"
    other = core.store.row(sql, (node["network"], node["key"], node["id"]))
    if other:
        raise Clash("the WireGuard key belongs to the node %s: make a new one" % other[0])


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
    found = core.store.row("SELECT 1 FROM access_key WHERE " + usable, (key_id, core.now))  # noqa: S608
    if found is None:
        raise UsedUp("the access key is used up or expired: ask for another")
    exists = "EXISTS (SELECT 1 FROM access_key WHERE %s)" % usable  # noqa: S608
    batch.when(exists, key_id, core.now)
    batch.update("access_key", {"uses": Expression("uses - 1")}, usable, key_id, core.now, must=True)


def _move_in(core: Core, batch: NetworkBatch, network: Row, node: Row) -> Row:
    """Addresses for a node that becomes active, and its place in the network."""
    if network["members"] >= network["node_limit"]:
        raise Clash("the network has as many nodes as its limit allows (%d)" % network["node_limit"])
    ranges = pools(network["range"], network["range6"])
    leases = StoredLeases(core.store, network["id"])
    placement = place(ranges, network["cursor"], (node["ip"], node["ip6"]), leases)
    batch.when("members < node_limit AND cursor = ?", network["cursor"])
    batch.set("members = members + 1, cursor = ?", placement.cursor)
    for address in placement.addresses:
        _take(batch, network["id"], address, node["id"])
    by_version = {each.version: text for each, text in zip(ranges, placement.addresses)}
    return {"ip": by_version.get(4, ""), "ip6": by_version.get(6, "")}


def _take(batch: NetworkBatch, network: str, address: str, node: str) -> None:
    """Lease an address; the primary key is the guard against giving it twice."""
    free = "network = ? AND address = ? AND node IS NULL"
    batch.delete("lease", free, network, address)
    batch.insert("lease", _lease(network, address, node))


def _leave_lists(batch: NetworkBatch, node: Row) -> None:
    """Take a node out of what the others hear."""
    batch.delete("gone", "network = ? AND node = ?", node["network"], node["id"])
    row = {"network": node["network"], "node": node["id"], "counter": batch.counter}
    batch.insert("gone", row)
    where, values = released(node["id"])
    batch.delete("observed", "network = ? AND (%s)" % where, node["network"], *values)


def _set_state(
    core: Core, node: Row, state: str, before: Sequence[str], more: Row | None = None
) -> Row:
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
            _leave_lists(batch, now)
        batch.update("node", new, "id = ? AND state = ?", now["id"], now["state"], must=True)
        return batch

    core.store.change(build)
    return need_node(core, node["network"], node["id"])


def _without_vain_wishes(core: Core, network: Row, node: Row) -> Row:
    """A pending node whose wished address somebody else got meanwhile takes the next one."""
    leases = StoredLeases(core.store, network["id"])
    kept = {name: "" if leases.held(node[name] or "-") else node[name] for name in ("ip", "ip6")}
    return {**node, **kept}


def approve(core: Core, node: Row) -> Row:
    return _set_state(core, node, ACTIVE, (PENDING,))


def disable(core: Core, node: Row) -> Row:
    return _set_state(core, node, DISABLED, (ACTIVE, EXPIRED))


def enable(core: Core, node: Row) -> Row:
    if node["state"] == PENDING:
        raise Clash("the node %s waits for approval: `netmaker-lite node approve`" % node["name"])
    over = {"expires": None} if node["expires"] and node["expires"] <= core.now else None
    return _set_state(core, node, ACTIVE, (DISABLED, EXPIRED), over)


def reject(core: Core, node: Row) -> Row:
    if node["state"] != PENDING:
        raise Clash("the node %s is %s, not pending: `netmaker-lite node remove`" % (node["name"], node["state"]))
    return remove_node(core, node, "its sign-up was rejected")


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


def amend(core: Core, batch: NetworkBatch, network: Row, node: Row, values: Row) -> Row:
    """The columns of a node's UPDATE for new values, checked against the others; leases go along."""
    new = dict(values)
    if "name" in values:
        sql = "SELECT 1 FROM node WHERE network = ? AND name = ? AND state != 'removed' AND id != ?"
        if core.store.row(sql, (node["network"], values["name"], node["id"])):
            raise Clash("the name %s is taken: choose another" % values["name"])
    if "key" in values:
        _check_key_free(core, {**node, **values})
    if node["state"] != PENDING:
        _move(core, batch, network, node, values)
    if values.keys() & RECORD_COLUMNS:
        new["changed"] = batch.counter
    if values.keys() & OWN_COLUMNS:
        new["own_changed"] = batch.counter
    return new


def _move(core: Core, batch: NetworkBatch, network: Row, node: Row, values: Row) -> None:
    """Give a node the addresses that it or an administrator asks for."""
    wanted = {column: values[column] for column in ("ip", "ip6") if column in values}
    if not wanted:
        return
    leases = StoredLeases(core.store, network["id"])
    for column, address in wanted.items():
        ranges = pools(network["range" if column == "ip" else "range6"])
        place(ranges, 1, (address,), leases)
        gone = {"node": None, "released": core.now}
        batch.update("lease", gone, "network = ? AND address = ?", network["id"], node[column])
        _take(batch, network["id"], address, node["id"])


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


def _owned(core: Core, network: Row, node: Row) -> list[str]:
    """The ranges that no node may claim for itself: the network's, and other nodes' extra ones."""
    sql = "SELECT ips FROM node WHERE network = ? AND id != ? AND ips != '' AND state != 'removed'"
    extra = core.store.rows(sql, (network["id"], node["id"]))
    others = [text for row in extra for text in row[0].split(",")]
    return [text for text in (network["range"], network["range6"], *others) if text]


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


# ---- the whole


def backup(core: Core, path: str, with_key: bool) -> None:
    """One file with everything, 0600; with the server's key only if asked for."""
    temporary = "%s.%s" % (path, secrets.token_hex(4))
    try:
        core.store.copy(temporary)
        if with_key:
            with sqlite3.connect(temporary) as copy:
                copy.execute("CREATE TABLE server_key (private TEXT NOT NULL)")
                copy.execute("INSERT INTO server_key VALUES (?)", (b64(core.key.private),))
            copy.close()
        os.replace(temporary, path)
    except OSError as problem:
        raise ServerError("cannot write %s: %s" % (path, problem.strerror)) from problem
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


class Restored(NamedTuple):
    """What a restore did: nodes in it now, those that had been removed since the backup."""

    nodes: int
    back: list[Row]


def restore(settings: Settings, path: str) -> Restored:
    """Take over a backup: a new incarnation, and a new word for every network."""
    folder = os.path.dirname(os.path.abspath(settings.key_file))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    source = _opened_backup(path)
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


def open_core_anew(settings: Settings) -> Core:
    """The data folder as it is, whatever key its present database was made with."""
    return Core(settings, Store(settings.data), ServerKey.load(settings.key_file))


def _opened_backup(path: str) -> sqlite3.Connection:
    """A backup in memory, checked."""
    try:
        with open(path, "rb") as stream:
            if stream.read(15) != b"SQLite format 3":
                raise Invalid("%s is no backup of netmaker-lite" % path)
        copy = sqlite3.connect(":memory:")
        with sqlite3.connect("file:%s?mode=ro" % path, uri=True) as file:
            file.backup(copy)
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
    return copy


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


CHECKS = (
    (
        "address without a lease",
        "SELECT node.name, node.network FROM node WHERE state IN ('active', 'disabled', 'expired')"
        " AND ip != '' AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.network = node.network"
        " AND lease.address = node.ip AND lease.node = node.id)",
    ),
    (
        "IPv6 address without a lease",
        "SELECT node.name, node.network FROM node WHERE state IN ('active', 'disabled', 'expired')"
        " AND ip6 != '' AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.network = node.network"
        " AND lease.address = node.ip6 AND lease.node = node.id)",
    ),
    (
        "lease without a node",
        "SELECT lease.address, lease.network FROM lease WHERE node IS NOT NULL AND NOT EXISTS"
        " (SELECT 1 FROM node WHERE node.id = lease.node AND lease.address IN (node.ip, node.ip6))",
    ),
    (
        "address held twice",
        "SELECT ip, network FROM node WHERE ip != '' AND state IN ('active', 'disabled', 'expired')"
        " GROUP BY network, ip HAVING COUNT(*) > 1",
    ),
    (
        "word that is not in the history",
        "SELECT id, id FROM network WHERE NOT EXISTS (SELECT 1 FROM revision WHERE"
        " revision.network = network.id AND revision.counter = network.counter"
        " AND revision.tag = network.tag)",
    ),
    (
        "history from the future",
        "SELECT revision.counter, network.id FROM revision JOIN network"
        " ON network.id = revision.network WHERE revision.counter > network.counter",
    ),
    (
        "node changed in the future",
        "SELECT node.name, node.network FROM node JOIN network ON network.id = node.network"
        " WHERE MAX(node.changed, node.own_changed, node.since) > network.counter",
    ),
    (
        "wrong count of nodes",
        "SELECT members, id FROM network WHERE members != (SELECT COUNT(*) FROM node WHERE"
        " node.network = network.id AND state IN ('active', 'disabled', 'expired'))",
    ),
    *(
        (
            "row of %s without a network" % table,
            "SELECT COUNT(*), network FROM %s WHERE network NOT IN"  # noqa: S608
            " (SELECT id FROM network) GROUP BY network" % table,
        )
        for table in ("node", "lease", "access_key", "revision", "gone", "observed", "joined")
    ),
    (
        "report on or by a node that is not there",
        "SELECT observer, network FROM observed WHERE node NOT IN (SELECT id FROM node)"
        " OR observer NOT IN (SELECT id FROM node)",
    ),
)


def check(core: Core) -> list[str]:
    """What is wrong with the database: a sentence each, none when all is well."""
    found = [
        "the file is damaged: %s" % row[0]
        for row in core.store.rows("PRAGMA integrity_check")
        if row[0] != "ok"
    ]
    for what, sql in CHECKS:
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
