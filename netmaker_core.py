# SPDX-License-Identifier: Apache-2.0
"""What the server of netmaker-lite knows and remembers: settings, rules of the mesh, the database, the cache in front of it.

netmaker_lite.py stands on this and is what runs: the agents' protocol, users and their rights, the
API, the web server. Nothing here answers a request or decides who may ask.

Contents
    IMPORTS     the standard library, peewee, PyNaCl, and what must be the same in the agent
    SETTINGS    the table of settings; flag, environment, file, default
    ERRORS      what can go wrong, each with its HTTP status
    ADDRESSES   ranges, host numbers and which address is next; pure
    TOKENS      the server's key, access keys, challenges, passwords
    MODELS      the tables and their numbered migrations
    STORE       connections, and a change as one batch of conditional statements
    MESH        what nodes hear of each other: records, settings, observed endpoints; pure
    RENDER      texts made of values: install script and line, clients' configurations, QR pictures, CoreDNS files; pure
    MEMBERS     the networks in memory, proven fresh by one keyed read
    ACTIONS     one function for each thing that an administrator or an agent can do
"""

from __future__ import annotations

import ast
import base64
import bisect
import builtins
import fcntl
import io
import ipaddress
import json
import keyword
import logging

# --------------------------------------------------------------------------------------------------
# IMPORTS
# --------------------------------------------------------------------------------------------------
import os
import random
import re
import secrets
import socket
import sqlite3
import sys
import threading
import time
import tokenize
from collections import Counter
from functools import lru_cache, partial
from hashlib import blake2b, sha256
from itertools import product
from string import ascii_lowercase
from typing import (
    AbstractSet as Set,
)
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
    Union,
)

import nacl.exceptions
import nacl.pwhash
import nacl.secret
import peewee

import netclient_lite as agent
from netclient_lite import (
    Invalid,
    b64,
    check_address,
    check_network,
    endpoint,
    is_public,
    label_key,
    split_endpoint,
    unb64,
)

Row = Dict[str, Any]  # a row of the database by column
log = logging.getLogger("netmaker-lite")
logging.getLogger("peewee").setLevel(logging.INFO)  # statements would come with their values, hashes and capabilities among them

# --------------------------------------------------------------------------------------------------
# SETTINGS
# --------------------------------------------------------------------------------------------------


class Whole:
    """A check of texts: a whole number from one to another."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text, re.ASCII) or not self.low <= int(text) <= self.high:
            raise Invalid("takes a whole number from %d to %d, not %.40r" % (self.low, self.high, text))
        return int(text)

    @property
    def schema(self) -> Row:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


class Pattern:
    """A check of texts: of one form, which the sentence `says`."""

    def __init__(self, expression: str, says: str) -> None:
        self.expression, self.says = expression, says

    def __call__(self, text: str) -> str:
        if not re.fullmatch(self.expression, text, re.ASCII):
            raise Invalid("%.80r is %s" % (text, self.says))
        return text

    @property
    def schema(self) -> Row:
        return {"type": "string", "pattern": "^(%s)$" % self.expression}


def one_of(*names: str) -> Pattern:
    return Pattern("|".join(names), "not supported here: there is " + ", ".join(names))


def check_master(text: str) -> str:
    """A master key is as good as an administrator's password on every machine: none by default, no short one."""
    if text and (len(text) < 20 or len(set(text)) < 8):
        raise Invalid("too easy to guess: take 20 random characters or more, or leave it out")
    return text


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
    secret: bool = False


SETTINGS = (
    Setting("NETMAKER_DATA", "/var/lib/netmaker-lite", "the data folder"),
    Setting("SERVER_BIND", "", "where to listen; :: for both families (default: as SERVER_HOST)"),
    Setting("API_PORT", "8081", "port to listen on", Whole(1, 65535)),
    Setting("GRPC_PORT", "0", "a second port with the same API (none)", Whole(0, 65535)),
    Setting("SERVER_HOST", "", "name or address that tokens carry (default: the default route's)", check_host),
    Setting("SERVER_API_CONN_STRING", "", "HOST:PORT or URL for tokens instead, comma-separated", check_urls),
    Setting("SERVER_BACKEND", "waitress", "waitress, gevent or wsgiref", one_of("waitress", "gevent", "wsgiref")),
    Setting("SERVER_KEY_FILE", "", "the server's key (default: server.key in the data folder)"),
    Setting("DATABASE", "sqlite", "where the data are kept: sqlite", one_of("sqlite")),
    Setting("CHECKIN_INTERVAL", "15", "seconds between two check-ins of an agent", Whole(2, 100000)),
    Setting("DEFAULT_NODE_LIMIT", "999999999", "nodes that a new network may have", Whole(0, 1 << 53)),
    Setting("CLIENT_MODE", "on", "the server's host is in new networks: on, off, contained", one_of("on", "off", "contained")),
    Setting("DNS_MODE", "on", "write hosts file and Corefile for CoreDNS: on or off", one_of("on", "off")),
    Setting("COREDNS_ADDR", "", "address of that nameserver, which agents are told", lambda text: text and check_address(text)),
    Setting("TRUSTED_PROXIES", "", "addresses or ranges whose X-Forwarded-For is believed", check_proxies),
    Setting("POLL_LIMIT", "64", "long-polls held at once", Whole(1, 100000)),
    Setting("MASTER_KEY", "", "a bearer token that is an administrator's (off)", check_master, True),
    Setting("CORS_ALLOWED_ORIGIN", "", "origins whose pages may call the API, comma-separated, or * (none)"),
    Setting("REST_BACKEND", "on", "the administrators' half of the API", one_of("on", "off")),
    Setting("AGENT_BACKEND", "on", "the agents' half of the API", one_of("on", "off")),
    Setting("AUDIT_DAYS", "90", "days that the audit log reaches back", Whole(1, 36500)),
    Setting("VERBOSITY", "1", "0 errors, 1 warnings, 2 events, 3 everything", Whole(0, 3)),
)
OLD_SETTINGS = (  # of the original; taken, and of no meaning here
    *("SERVER_HTTP_HOST", "SERVER_GRPC_HOST", "SERVER_GRPC_CONN_STRING", "GRPC_SSL", "DISABLE_DEFAULT_NET", "IS_SPLIT_DNS"),
    *("DISPLAY_KEYS", "DISABLE_REMOTE_IP_CHECK", "SERVER_CHECKIN_INTERVAL", "DNS_KEY", "NETMAKER_ENV", "POD_IP", "RCE"),
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
        elif name not in SETTING_NAMES and name not in OLD_SETTINGS:
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
        self.doubts += ["%s is of Netmaker's and changes nothing here" % name for name in OLD_SETTINGS if name in found]
        self._values: dict[str, Any] = {}
        for setting in SETTINGS:
            text = found.get(setting.name, setting.default)
            try:
                self._values[setting.name] = setting.check(text)
            except Invalid as bad:
                raise Invalid("%s=%s: %s" % (setting.name, "(hidden)" if setting.secret else text, bad)) from bad

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @property
    def key_file(self) -> str:
        return self["SERVER_KEY_FILE"] or os.path.join(self.data, "server.key")


# --------------------------------------------------------------------------------------------------
# ERRORS
# --------------------------------------------------------------------------------------------------
# A bad value is the agent's Invalid, 400: server and agent speak of bad values in the same sentences.


class ServerError(Exception):
    """An expected failure: one sentence with cause and cure, no traceback."""

    http = 500


class Unknown(ServerError):
    """Who are you?"""

    http = 401


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
            raise Invalid("%s would send all traffic of every node there: name the ranges (clients have `internet`)" % word)
        if block.is_loopback or block.is_multicast or block.is_link_local:
            raise Invalid("%s is a loopback, multicast or link-local range: no node can own it" % word)
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


def write_private(path: str, data: bytes, replace: bool, mode: int = 0o600) -> bool:
    """Write a file that is 0600 from its first byte and appears whole; False when it is already there."""
    temporary = "%s.%s" % (path, secrets.token_hex(4))
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
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
        self._hosts = self._derived(b"netmaker-lite hosts")
        self._groups = self._derived(b"netmaker-lite groups")

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

    def host_secret(self, network: str) -> bytes:
        """The access key's secret by which the server's own host joins a network."""
        return blake2b(network.encode(), key=self._hosts, digest_size=32).digest()

    def group(self, network: str) -> str:
        """By which the nodes of a network know each other in a LAN: all of them hear it, nobody else."""
        return b64(blake2b(network.encode(), key=self._groups, digest_size=16).digest())

    def challenge(self, node: str, number: str, address: str) -> str:
        """What only somebody can know who gets our answers at that address."""
        text = " ".join((node, number, address)).encode()
        return b64(blake2b(text, key=self._challenges, digest_size=16).digest())


def new_bearer(kind: str) -> str:
    """A session or an API token; the prefix tells people and secret scanners what it is."""
    return "nm%s_%s" % (kind, b64(secrets.token_bytes(32)))


def fingerprint(bearer: str) -> str:
    """What the database knows of a bearer token, or of the setup code: 256 random bits need no salt and no stretching."""
    return b64(blake2b(bearer.encode(errors="replace"), digest_size=32).digest())


_hashing = threading.BoundedSemaphore(2)  # argon2id takes 64 MiB each


def hash_password(password: str) -> str:
    with _hashing:
        return str(nacl.pwhash.argon2id.str(password.encode()).decode())


def is_password(hashed: str, password: str) -> bool:
    with _hashing:
        try:
            return bool(nacl.pwhash.verify(hashed.encode(), password.encode()))
        except nacl.exceptions.CryptoError:
            return False


@lru_cache(maxsize=None)
def nobody() -> str:
    """The hash that the password of an unknown user is compared with."""
    return hash_password(secrets.token_hex(16))


def check_lifetime(text: str) -> int:
    """Seconds of `90s`, `30m`, `24h`, `7d`."""
    found = re.fullmatch("([0-9]{1,6})([smhdw])", text)
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
    client_dns = _text()  # what external clients ask for names
    names = _number()  # counter of the last change of names that are not nodes'
    hosted = peewee.BooleanField(default=False)  # the server's own host shall be a node of it
    hub = peewee.BooleanField(default=False)  # nodes know the server's host alone
    silent = _number()  # seconds after which a node that is not heard of is removed; 0: never
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
    local6 = _text()  # its own public IPv6 address
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
    egress = _text()  # {"ranges", "interface", "nat"} as JSON; "": no egress gateway
    ingress = peewee.BooleanField(default=False)
    relay = peewee.BooleanField(default=False)
    via = _text()  # the node that relays it
    relayed = _text()  # {peer: [relay, since when or until when]} as JSON: pairs that had no handshake, see RELAYS; both have it
    deny = _text()  # nodes that it must not know, each with a comma after it; they have it in theirs
    mac = _text()
    postup = _text()
    postdown = _text()
    next_key = _text()  # what it will have after a refresh of its key
    keyed = peewee.BooleanField(default=False)  # its user gave it its key
    refresh = _text()  # how far that is, and since when (switching: at what time it is to happen)
    refresh_at = _number()
    host = peewee.BooleanField(default=False)  # the server's own host
    hooks = _text()  # "accepted; …" where its root lets it run postup and postdown, with what went wrong


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


class Client(peewee.Model):
    """An external client: a machine with a plain WireGuard configuration, known to one ingress gateway."""

    id = peewee.TextField(primary_key=True)
    network = peewee.TextField()
    gateway = peewee.TextField(index=True)
    name = peewee.TextField()
    key = peewee.TextField()
    private = _text()  # sealed; forgotten some minutes after `keyed`
    keyed = _number()
    ip = _text()
    ip6 = _text()
    resolver = _text()  # the nameservers in its configuration
    internet = peewee.BooleanField(default=False)
    enabled = peewee.BooleanField(default=True)
    made = _text()  # hash of the configuration that it was given
    created = _number()
    modified = _number()


class Dns(peewee.Model):
    """A name that an administrator wrote down."""

    network = peewee.TextField()
    name = peewee.TextField()
    ip = _text()
    ip6 = _text()

    class Meta:
        primary_key = peewee.CompositeKey("network", "name")


class User(peewee.Model):
    """Who may use the API: an administrator, or somebody with some networks. `user` is a word of SQL's own."""

    name = peewee.TextField(primary_key=True)
    password = peewee.TextField()
    admin = peewee.BooleanField(default=False)
    networks = _text()  # comma-separated
    created = _number()
    modified = _number()

    class Meta:
        table_name = "account"


class Session(peewee.Model):
    """A bearer token: of somebody who signed in, or with a name, an API token."""

    id = peewee.TextField(primary_key=True)  # fingerprint of the token
    owner = peewee.TextField(index=True)
    name = _text()
    write = peewee.BooleanField(default=True)
    networks = _text()  # less than the owner's, where not ""
    expires = _number(null=True, default=None)
    created = _number()


class Audit(peewee.Model):
    """One change: who, when, from where, what."""

    id = peewee.AutoField()
    time = _number(index=True)
    who = peewee.TextField()
    source = _text()
    network = _text(index=True)
    action = peewee.TextField()
    target = _text()
    detail = _text()


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
MUTE = peewee.SQL("endpoint = ''")
Observed.add_index(Observed.index(Observed.network, Observed.node, Observed.observer, where=MUTE, name="observed_mute"))
Client.add_index(Client.index(Client.network, Client.name, unique=True))
Client.add_index(Client.index(Client.network, Client.key, unique=True))
Session.add_index(Session.index(Session.owner, Session.name))

MODELS = (Meta, Network, Node, Lease, AccessKey, Revision, Gone, Observed, Joined, User, Session, Audit, Client, Dns)
SCHEMA = 4
# version → the statements that lead to it from the one before; tables that are missing are made after them
MIGRATIONS: dict[int, tuple[str, ...]] = {
    2: (
        "INSERT INTO meta (key, value) VALUES ('users', ''), ('setup', ''), ('nameserver', '')",
        "ALTER TABLE network ADD COLUMN silent BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE network ADD COLUMN hosted BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE network ADD COLUMN client_dns TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE network ADD COLUMN names BIGINT NOT NULL DEFAULT 0",
        *(
            "ALTER TABLE node ADD COLUMN %s TEXT NOT NULL DEFAULT ''" % name
            for name in ("egress", "via", "deny", "mac", "postup", "postdown", "next_key", "refresh")
        ),
        *("ALTER TABLE node ADD COLUMN %s BOOLEAN NOT NULL DEFAULT 0" % name for name in ("ingress", "relay", "keyed")),
        "ALTER TABLE node ADD COLUMN refresh_at BIGINT NOT NULL DEFAULT 0",
    ),
    3: (
        "ALTER TABLE node ADD COLUMN local6 TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE node ADD COLUMN host BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE node ADD COLUMN relayed TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE network ADD COLUMN hub BOOLEAN NOT NULL DEFAULT 0",
    ),
    4: ("ALTER TABLE node ADD COLUMN hooks TEXT NOT NULL DEFAULT ''",),
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

TABLES = ("node", "lease", "access_key", "revision", "gone", "observed", "joined", "client", "dns")  # with a column `network`
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
        self.note = ""  # for the audit log: what is changed
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
        self.network, self.now = network, int(now)
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


class ListBatch(Batch):
    """A change of which networks or users there are: stamped in the row of the table `meta` for that."""

    def __init__(self, what: str = "networks") -> None:
        super().__init__("meta", "key", what, "value")


class _Upset(Exception):
    """A precondition did not hold; takes the transaction back."""


def _connection(path: str) -> peewee.SqliteDatabase:
    pragmas = {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL: what an agent was told must stand after a power cut
        "foreign_keys": 1,
        "busy_timeout": 5000,
        "cache_size": -256,  # more is only a copy of what the kernel has
    }
    options: Row = {"thread_safe": False, "check_same_thread": False, "timeout": 5, "cached_statements": 24}
    return peewee.SqliteDatabase(path, pragmas=pragmas, **options)


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
            if type(problem) is peewee.DatabaseError:  # what SQLite says of a file that it cannot read as its own
                sentence = "%s is damaged (%s): put a backup in its place (move it away, then netmaker-lite restore FILE)"
                raise ServerError(sentence % (self.path, problem)) from problem
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
            with self.writer.atomic("IMMEDIATE"), self.writer.bind_ctx(MODELS):
                for statement in MIGRATIONS[version]:
                    self._write(statement, ())
                self.writer.create_tables(MODELS)
                self._write("UPDATE meta SET value = ? WHERE key = ?", (str(version), "schema"))
            log.warning("the database is of schema %d now", version)

    def _create(self) -> None:
        names = ("schema", "incarnation", "networks", "users", "setup", "pin", "urls", "nameserver")
        first = {**dict.fromkeys(names, ""), "schema": str(SCHEMA), "incarnation": new_incarnation()}
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

    def each(self, sql: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Row by row, for what is too long to be held twice."""
        with self._reading:
            yield from self.execute(self.reader, sql, values)

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

    def count(self, query: Any) -> int:
        with self._reading:
            return int(query.count(self.reader))

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
    names: int = 0
    local_range: str = ""
    hub: bool = False

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
    egress: str = ""
    ingress: bool = False
    relay: bool = False
    via: str = ""
    deny: str = ""
    relayed: str = ""
    local6: str = ""
    next_key: str = ""
    refresh: str = ""
    refresh_at: int = 0
    host: bool = False
    postup: str = ""
    postdown: str = ""
    hooks: str = ""


class ClientState(NamedTuple):
    """An enabled external client as its gateway hears of it; the fields are columns."""

    id: str
    key: str
    ip: str
    ip6: str
    internet: bool


# A change of these columns must be heard by the others, or by the node itself.
RECORD_COLUMNS = frozenset((
    "name", "key", "next_key", "ip", "ip6", "ips", "static", "port", "public", "at", "local", "local6", "lan", "punch",
    "egress", "ingress", "via",
))  # fmt: skip
OWN_COLUMNS = frozenset((
    "name", "ip", "ip6", "port", "keepalive", "mtu", "dns", "forwarding", "punch", "is_local", "egress", "ingress", "relay",
    "deny", "refresh", "relayed", "postup", "postdown", "hooks",
))  # fmt: skip


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


def hosts(ip: str, ip6: str) -> list[str]:
    """The addresses of a node or client as ranges."""
    return [ip + "/32"] * bool(ip) + [ip6 + "/128"] * bool(ip6)


def egress_ranges(egress: str) -> list[str]:
    """The ranges in that column of a node."""
    return list(json.loads(egress)["ranges"]) if egress else []


def record(node: NodeState, network: NetworkState, clients: Iterable[ClientState] = ()) -> bytes:
    """What every node of the network hears of this one, the same bytes for all."""
    punch = network.punch and node.punch and not network.is_local
    fields = {
        "id": node.id,
        "name": node.name,
        "key": node.key,
        "next": node.next_key,
        "ip": node.ip,
        "ip6": node.ip6,
        "ips": [
            *filter(None, node.ips.split(",")),
            *egress_ranges(node.egress),
            *(ip for each in clients for ip in hosts(*each[2:4])),
        ],
        "via": node.via,
        "static": _endpoint(node.static, node.port),
        "at": node.at if punch else "",
        "seen": seen_endpoint(node, network),
        "local": _endpoint(node.local, node.port),
        "local6": "" if network.is_local or node.local6 == node.public else _endpoint(node.local6, node.port),
        "lan": node.lan,
    }
    return dump({name: value for name, value in fields.items() if value})


def pairs_of(relayed: str) -> dict[str, tuple[str, int]]:
    """That column of a node: by peer, the relay between them, and when both go direct again (0: not yet)."""
    return {peer: (relay, until) for peer, (relay, until) in json.loads(relayed or "{}").items()}


def own_settings(node: NodeState, network: NetworkState, clients: Iterable[ClientState] = ()) -> dict[str, Any]:
    """`me`: what only the node itself hears. From `dns` on only where they are not the default."""
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
    roles = {
        "egress": node.egress and json.loads(node.egress),
        "ingress": node.ingress and {"clients": [{k: v for k, v in each._asdict().items() if v} for each in clients]},
        "forward": bool(node.ingress or node.relay or node.host) and not network.hub,
        "deny": node.deny.split(",")[:-1],
        "relayed": {peer: relay for peer, (relay, _) in pairs_of(node.relayed).items()},
        "localrange": network.local_range,
        "hooks": [node.postup, node.postdown] if node.hooks and (node.postup or node.postdown) else [],
    }
    return {**fields, **{name: value for name, value in roles.items() if value}}


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
    found = {place for place in found if place[0] != "["} or found  # its IPv6 address has no NAT before it, and is known
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


class Standing(NamedTuple):
    """A node as the choice of relays sees it."""

    here: bool  # seen within two intervals
    relay: bool  # it may carry others' traffic
    apart: frozenset[str]  # nodes that it must not know
    relayed: Mapping[str, tuple[str, int]]
    ready: bool = True  # as a relay: it has set itself up for that
    bound: bool = False  # its ways are chosen otherwise: it has a relay by hand, or its network takes none


Pair = Tuple[str, str]  # two nodes, the lesser id first


def next_relays(
    pairs: Iterable[Pair], nodes: Mapping[str, Standing], alive: Set[Pair], mute: Set[Pair], now: int, lead: int
) -> dict[Pair, tuple[str, int] | None]:
    """What changes between pairs: the relay and when both go direct again (0: not yet); None: no relay any more (SPEC, §10).

    pairs: also those that a node of the others carries. nodes: the pairs' own, and all that may be a relay or have one. alive,
    mute: pairs of (observer, node) with a fresh handshake, and without one although the observer sends.
    """

    def both(found: Set[Pair], one: str, other: str) -> bool:
        return (one, other) in found and (other, one) in found

    def fits(relay: str, pair: Pair) -> bool:
        standing = nodes.get(relay)
        if standing is None or not (standing.here and standing.relay) or standing.bound or relay in pair:
            return False
        if not standing.apart.isdisjoint(pair) or any(ordered(relay, end) in held for end in pair):  # a relay is no second one's
            return False
        return all((end, relay) in alive or (relay, end) in alive for end in pair)

    def ordered(one: str, other: str) -> Pair:
        return (one, other) if one < other else (other, one)

    def change(pair: Pair) -> tuple[str, int] | None:
        """What shall be of a pair."""
        one, other = pair
        way = relay, until = held.get(pair, ("", 0))
        ends = [nodes[end] for end in pair if end in nodes]
        if len(ends) < 2 or other in ends[0].apart or any(end.bound for end in ends):
            return None
        if until:  # at once where the relay itself is lost meanwhile
            return None if now > until + lead or not fits(relay, pair) else way
        if relay and both(alive, one, other):
            return relay, now + lead
        wanted = both(mute, one, other) and all(end.here for end in ends)
        if not fits(relay, pair) and (relay or wanted):  # also for who is away: it shall find a way
            found = [each for each in nodes if nodes[each].ready and fits(each, pair)]
            best = min(found, key=lambda each: (load[each], each), default="")
            return (best, 0) if best else None
        return way if relay else None

    held = {ordered(node, peer): way for node, standing in nodes.items() for peer, way in standing.relayed.items()}
    before, load = dict(held), Counter(relay for relay, _ in held.values())
    todo = sorted(pairs)
    while todo:  # a relay that gets one itself is none for those that it carried
        pair = todo.pop(0)
        chosen = change(pair)
        if chosen == held.get(pair):
            continue
        if chosen:
            held[pair] = chosen
            load[chosen[0]] += 1
            todo += [each for each, (relay, _) in held.items() if relay in pair and each not in todo]
        else:
            del held[pair]
    return {pair: held.get(pair) for pair in {*before, *held} if held.get(pair) != before.get(pair)}


def free_port(wanted: int, taken: Iterable[int]) -> int:
    """The port a new node is told to listen on: no other node behind the same address may have it."""
    used = set(taken)
    while wanted in used:
        wanted = wanted + 1 if wanted < 65535 else 1024
    return wanted


# --------------------------------------------------------------------------------------------------
# RENDER
# --------------------------------------------------------------------------------------------------

FILES_PATH = "/meshclient/files/"

# Two lines, because OpenWrt's BusyBox drops what goes beyond 511 bytes of one. The hash proves the script, so neither http nor
# a certificate needs to be trusted; the token goes by the environment, which other users cannot read.
INSTALL_LINE = """KEY={token} sh -c '
f=`mktemp`||exit;trap "rm -f $f" 0 1 2 15;u=$0{path};for g in "curl -fgkLsm60 -o" "wget -q{trust} -O" \
"uclient-fetch -qT20{trust} -O";do $g $f "$u"&&break;done 2>/dev/null;case `sha256sum<$f` in {hash}*)NM_SERVER=$0 sh $f "$@";;\
*)echo "$u: no answer, or not the script of this line: check the network, or get a new line">&2;exit 1;;esac' {url}"""


class Cut(NamedTuple):
    """A part of a source, by row and column of its begin and end, and what comes there instead."""

    start: tuple[int, int]
    end: tuple[int, int]
    instead: str = ""


def notes(source: str) -> Iterator[Cut]:
    """The annotations: nobody reads them when a program runs. Those of fields in classes have to be there, but say nothing."""
    lines = source.splitlines(keepends=True)

    def place(row: int, offset: int) -> tuple[int, int]:
        return row, len(lines[row - 1].encode()[:offset].decode())  # ast counts bytes

    def end(node: Any) -> tuple[int, int]:
        return place(node.end_lineno, node.end_col_offset)

    tree = ast.parse(source)
    fields = {each for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for each in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            row, column = place(node.lineno, node.col_offset)
            yield Cut((row, column + len(node.arg)), end(node))
        elif isinstance(node, ast.FunctionDef) and node.returns:
            row, column = place(node.returns.lineno, node.returns.col_offset)
            yield Cut((row, lines[row - 1].rindex(" -> ", 0, column)), end(node.returns))
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield Cut(place(node.lineno, node.col_offset), end(node))
        elif isinstance(node, ast.AnnAssign) and node in fields:
            yield Cut(place(node.annotation.lineno, node.annotation.col_offset), end(node.annotation), "0")
        elif isinstance(node, ast.AnnAssign) and node.value:
            yield Cut(end(node.target), end(node.annotation))


def slim(source: str) -> str:
    """A program without comments, docstrings, annotations and blanks that nothing needs: what machines get.

    A router's flash is small and its Python compiles slowly; who reads the source has the repository. The first comment lines
    (interpreter, licence) stay.
    """
    parts = (token[:1] + token[2:4] for token in tokenize.generate_tokens(io.StringIO(source).readline))
    spots = [(kind, start, end) for kind, start, end in parts if kind != tokenize.NL]
    lines = source.splitlines(keepends=True)
    head = next((row for row, line in enumerate(lines, 1) if not line.startswith("#")), len(lines))
    cuts = [Cut(start, end) for kind, start, end in spots if kind == tokenize.COMMENT and start[0] > head]
    inside = {row for _, start, end in spots for row in range(start[0] + 1, end[0] + 1)}  # lines that begin within a string
    spots = [spot for spot in spots if spot[0] != tokenize.COMMENT]
    pairs = zip(spots, spots[1:])  # beside an operator no blank is needed
    gaps = [Cut(one[2], two[1]) for one, two in pairs if one[2][0] == two[1][0] and tokenize.OP in (one[0], two[0])]
    depths: dict[int, int] = {}  # of the lines that begin a statement
    depth, before = 0, tokenize.NEWLINE
    for (kind, start, end), after, last in zip(spots, spots[1:], spots[2:]):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            depths[start[0]] = depth
            if kind == tokenize.STRING and after[0] == tokenize.NEWLINE:  # a block cannot be empty
                cuts.append(Cut(start, end, '""' if last[0] == tokenize.DEDENT else ""))
        before = kind
    cuts = sorted([*cuts, *notes(source)])
    starts = [cut.start for cut in cuts]
    for gap in gaps:
        before_it = bisect.bisect_right(starts, gap.start) - 1
        if gap.start < gap.end and (before_it < 0 or cuts[before_it].end <= gap.start):
            cuts.append(gap)
    for (row, column), (end_row, end_column), instead in sorted(cuts, reverse=True):
        lines[row - 1 : end_row] = [lines[row - 1][:column] + instead + lines[end_row - 1][end_column:], *[""] * (end_row - row)]
        inside.difference_update(range(row + 1, end_row + 1))
    out: list[str] = []
    for row, line in enumerate(lines, 1):
        whole = line if row + 1 in inside else line.rstrip() + "\n"
        bare = whole if row in inside else whole.lstrip()
        if (
            bare
            and row > head
            and row not in depths
            and row not in inside
            and (out[-1][-2:-1] in ("(", "[", "{") or bare[0] in ")]}")
        ):
            out[-1] = out[-1][:-1]  # a bracket needs no line of its own
        out += [" " * depths.get(row, 0) + bare] if bare else []
    return folded(shortened("".join(out)))


def shortened(source: str) -> str:
    """A program with short names for what is local to a function and the functions within it.

    Left alone: parameters, what is global or built in anywhere, what stands in an f-string (which Pythons before 3.12 give no
    places for), what is a keyword of a call.
    """
    tree = ast.parse(source)
    outside = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    common = {*dir(builtins), *keyword.kwlist, *(name.id for node in outside for name in names_in(node))}
    common |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            common |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Global):
            common |= {*node.names}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bodies = (tree.body, *(each.body for each in classes))
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    instead: dict[int, dict[str, str]] = {}  # by row
    for function in functions:
        inside = list(ast.walk(function))
        used = Counter(name.id for name in names_in(function))
        kept = {node.arg for node in inside if isinstance(node, (ast.arg, ast.keyword))} | common
        kept |= {node.name for node in inside if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        kept |= {name.id for node in inside if isinstance(node, ast.JoinedStr) for name in names_in(node)}
        own = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.name for node in inside if isinstance(node, ast.ExceptHandler) and node.name}
        free = (name for size in (1, 2) for name in map("".join, product(ascii_lowercase, repeat=size)))
        free = (name for name in free if name not in used and name not in kept)
        chosen = sorted(own - kept, key=lambda name: (-used[name], name))
        table = {name: next(free) for name in chosen if len(name) > 2}  # what is short stays: a slim program is slim
        instead.update(dict.fromkeys(range(function.lineno, (function.end_lineno or 0) + 1), table))
    lines, before = source.splitlines(keepends=True), ""
    cuts = []
    for kind, word, start, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == tokenize.NAME and before != "." and word in instead.get(start[0], ()):
            cuts.append(Cut(start, end, instead[start[0]][word]))
        before = word
    for (row, column), (_, end_column), name in reversed(cuts):
        lines[row - 1] = lines[row - 1][:column] + name + lines[row - 1][end_column:]
    return "".join(lines)


def names_in(node: ast.AST) -> Iterator[ast.Name]:
    return (each for each in ast.walk(node) if isinstance(each, ast.Name))


BLOCKS = ("if", "elif", "else", "for", "while", "try", "except", "finally", "with", "def", "class", "@", "async")
WIDE = 160  # characters of a line: a traceback shows one


def folded(source: str) -> str:
    """A slim program with what fits on one line: simple statements, and a block of them behind its head."""
    lines = source.splitlines(keepends=True)
    begin = next((row for row, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head, depth, first = "".join(lines[:begin]), 0, ""
    joined: list[tuple[int, str, bool]] = []  # depth, text, whether it is simple
    for kind, word, _, (row, _), _ in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.NEWLINE:
            text, simple = "".join(lines[begin:row]).strip(" \n"), first not in BLOCKS
            if simple and joined and joined[-1][::2] == (depth, True) and len(joined[-1][1]) + len(text) < WIDE:
                text = joined.pop()[1] + ";" + text
            joined.append((depth, text, simple))
            first, begin = "", row
        elif kind in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            first = first or word
    out: list[tuple[int, str]] = []
    for (depth, text, simple), (below, _, _) in zip(joined, [*joined[1:], (0, "", True)]):
        alone = simple and out and out[-1][0] == depth - 1 and out[-1][1].endswith(":") and below < depth
        if alone and len(out[-1][1]) + len(text) < WIDE:
            text = out.pop()[1] + text
            depth -= 1
        out.append((depth, text))
    return head + "".join(" " * depth + text + "\n" for depth, text in out)


def install_script(template: str, agent_bytes: bytes, look: bytes = b"") -> str:
    """The install script as the server hands it out: it knows the hashes of the agent and of netclient-look."""
    script = template.replace("\nAGENT_SHA256=\n", "\nAGENT_SHA256=%s\n" % sha256(agent_bytes).hexdigest(), 1)
    return script.replace("\nLOOK_SHA256=\n", "\nLOOK_SHA256=%s\n" % sha256(look).hexdigest(), 1) if look else script


def install_line(url: str, token: str, script_sha256: str) -> str:
    """What to paste into a root shell: fetches the install script, compares its hash and runs it. Flags of join may follow."""
    quoted = url if re.fullmatch("[A-Za-z0-9:/._-]+", url) else "'%s'" % url.replace("'", "'\\''")
    trust = " --no-check-certificate" if url.startswith("https:") else ""
    path = FILES_PATH + "install.sh"
    return INSTALL_LINE.format(token=token, path=path, trust=trust, hash=script_sha256, url=quoted)


def client_endpoint(network: Row, gateway: Row) -> str:
    """Where a stranger finds a gateway; "" when nowhere."""
    found = gateway["local"] if network["is_local"] else gateway["public"] or gateway["local6"]
    return _endpoint(gateway["static"] or found, gateway["port"])


def client_config(network: Row, gateway: Row, client: Row, routes: Iterable[str], private: str = "", preshared: str = "") -> str:
    """The configuration of an external client, as phones and wg-quick take it."""
    keepalive, mtu = (network[name] if gateway[name] is None else gateway[name] for name in ("keepalive", "mtu"))
    allowed = ["0.0.0.0/0", "::/0"] if client["internet"] else [network["range"], network["range6"], *routes]
    lines = {
        "[Interface]\nPrivateKey": private or "# the client's own: it is not kept here",
        "Address": ", ".join(hosts(client["ip"], client["ip6"])),
        "DNS": client["resolver"] or network["client_dns"],
        "MTU": mtu,
        "\n[Peer]\nPublicKey": gateway["key"],
        "PresharedKey": preshared,
        "AllowedIPs": ", ".join(filter(None, allowed)),
        "Endpoint": client_endpoint(network, gateway),
        "PersistentKeepalive": keepalive,
    }
    return "".join("%s = %s\n" % line for line in lines.items() if line[1] != "")


def qr(text: str, kind: str) -> bytes:
    """A text as a QR picture: png or svg."""
    try:
        import segno
    except ImportError as missing:
        raise Busy("QR pictures need segno, which is not installed on the server: pip install segno") from missing
    out = io.BytesIO()
    segno.make(text, error="l").save(out, kind=kind, scale=3)  # some 250 pixels
    return out.getvalue()


def hosts_file(entries: Iterable[Row]) -> str:
    """Names as CoreDNS' hosts plugin, dnsmasq and /etc/hosts take them."""
    lines = ("%s %s.%s\n" % (row[kind], row["name"], row["network"]) for row in entries for kind in ("ip", "ip6") if row[kind])
    return "# written by netmaker-lite; whatever is changed here is lost\n" + "".join(lines)


COREDNS_ZONES = """%s {
    hosts netmaker.hosts {
        ttl 60
        reload 5s
        fallthrough
    }
    forward . /etc/resolv.conf
    errors
}
"""
# A network may be called as a domain out there is (dev, cloud, home): what no node has is asked there. No cache: changes show.


def corefile(networks: Iterable[str]) -> str:
    """CoreDNS' configuration, for a CoreDNS that is started in the folder of this file."""
    zones = " ".join(networks)
    own = COREDNS_ZONES % zones if zones else ""
    return own + ". {\n    reload 15s\n    forward . /etc/resolv.conf\n    cache 30\n    errors\n}\n"


# --------------------------------------------------------------------------------------------------
# MEMBERS
# --------------------------------------------------------------------------------------------------
# A cache of what the hot path needs. Nothing in it is believed until the network's word, read anew for
# each look and exchange, equals the word it was filled at; else the rows that changed since are read.

UNKNOWN = 1 << 62  # the sequence number of a node whose last one this process does not know


class Member:
    """One node in memory: its row, its keys, its record, and what is only written behind."""

    __slots__ = (
        "answer_key", "clients", "dirty", "epoch", "have", "last_mac", "last_time", "mesh", "parked", "record",
        "request_key", "row", "seal_key", "seen", "sequence",
    )  # fmt: skip

    def __init__(self, mesh: Any, row: NodeState) -> None:
        self.mesh, self.row = mesh, row
        self.clients: Sequence[ClientState] = ()
        self.epoch, self.sequence = row.epoch, UNKNOWN
        self.last_mac, self.last_time = "", 0.0
        self.seen, self.dirty = row.last_seen, False
        self.have, self.parked = -1, 0.0  # the newest counter that it has applied; until when its look waits
        self.request_key = self.answer_key = self.seal_key = self.record = b""

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
        self.host: Member | None = None  # the server's own, where it is an active node
        self.log: list[tuple[int, str]] = []  # (counter, node) in order, for deltas
        self.gone: dict[str, int] = {}
        self.refreshing: set[str] = set()  # nodes that are at the refresh of their key
        self.relayed: set[str] = set()  # nodes that have a relay to some peer
        self.tags: dict[int, str] = {}  # of words that this network has had
        self.blobs: dict[int, bytes] = {}  # since which counter → what all nodes share of the answer
        self.names = b""
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
        parts = [b'"peers":[', b",".join(map(self.record_of, active)), b"]"]
        gone = [node for node, counter in self.gone.items() if counter > since >= 0]
        gone = [node for node in gone if not self._is_active(node)]
        if gone:
            parts += [b',"gone":', dump(gone)]
        return b"".join(parts)

    def record_of(self, member: Member) -> bytes:
        member.record = member.record or record(member.row, self.state, member.clients)
        return member.record

    def _is_active(self, node: str) -> bool:
        member = self.members.get(node)
        return member is not None and member.row.state == ACTIVE


NODE_SELECT = composed("SELECT %s FROM node WHERE ", ", ".join(NodeState._fields))
NETWORK_SELECT = composed("SELECT %s FROM network WHERE id = ?", ", ".join(NetworkState._fields))


NAMES = (
    "SELECT * FROM (SELECT network, name, ip, ip6, 'node' AS kind FROM node WHERE state = 'active' UNION ALL"
    " SELECT network, name, ip, ip6, 'client' FROM client WHERE enabled UNION ALL"
    " SELECT network, name, ip, ip6, 'custom' FROM dns) AS named WHERE ? IN ('', network) ORDER BY network, name"
)


class Members:
    """All networks in memory, by network, node and look capability."""

    def __init__(self, store: Store, nameserver: str = "", clock: Callable[[], float] = time.time) -> None:
        self.store, self.clock = store, clock
        self.own = {"nameserver": nameserver} if nameserver else {}
        self.group: Callable[[str], str] | None = None  # see ServerKey.group
        self.port = 0  # by which nodes of a hub network reach this server through their tunnel; 0: by none
        self.meshes: dict[str, Mesh] = {}
        self.nodes: dict[str, Member] = {}
        self.looks: dict[str, Member] = {}
        self.places: dict[str, Member] = {}  # by overlay address
        self._lock = threading.RLock()

    def node(self, node: str) -> Member | None:
        return self.nodes.get(node) or self._find("id = ?", node)

    def by_look(self, capability: str) -> Member | None:
        return self.looks.get(capability) or self._find("look = ?", capability)

    def underlay(self, source: str) -> str:
        """Where a request comes from: one through a tunnel of this host from where its node was last seen outside of it."""
        member = self.places.get(source)
        if member is None or member.mesh.host is None or source not in (member.row.ip, member.row.ip6):
            return source
        return member.row.source if member.row.state == ACTIVE and member.row.source else source

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
        else:  # with the old values where they are the same: a few new ones among many leave holes in the memory
            member.renew(NodeState._make(old if old == new else new for old, new in zip(member.row, row)))
        for address in (row.ip, row.ip6):
            if address and row.state == ACTIVE:
                self.places[address] = member
        if row.host:
            mesh.host = member if row.state == ACTIVE else None if mesh.host is member else mesh.host
        member.clients = self._clients(row.id) if row.ingress else ()
        at_it = row.refresh not in ("", QUEUED) and row.state == ACTIVE
        (mesh.refreshing.add if at_it else mesh.refreshing.discard)(row.id)
        (mesh.relayed.add if row.relayed and row.state == ACTIVE else mesh.relayed.discard)(row.id)
        return member

    def _clients(self, gateway: str) -> list[ClientState]:
        sql = "SELECT id, key, ip, ip6, internet FROM client WHERE gateway = ? AND enabled ORDER BY id"
        return [ClientState._make((*row[:4], bool(row[4]))) for row in self.store.rows(sql, (gateway,))]

    def _names(self, network: str) -> bytes:
        """The names that no node has, as all nodes hear of them."""
        rows = self.store.rows(NAMES.replace("ORDER", "AND kind != 'node' ORDER"), (network,))
        return dump({name: [ip for ip in places if ip] for _, name, *places, _ in rows})

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
                for address in (member.row.ip, member.row.ip6):
                    if self.places.get(address) is member:
                        del self.places[address]
                member.mesh.members.pop(node, None)
                member.mesh.refreshing.discard(node)
                member.mesh.relayed.discard(node)
                if member.mesh.host is member:
                    member.mesh.host = None

    def forget_removed(self) -> None:
        """Removed nodes that have fallen silent; one that comes after all is read again."""
        for member in list(self.nodes.values()):
            if member.row.state == REMOVED and member.seen <= self.clock() - 3600:
                self.forget(member.row.id)

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
            for row in map(NodeState._make, self.store.each(NODE_SELECT + "network = ? ORDER BY changed", (network,))):
                self._put(mesh, row)
                mesh.log.append((row.changed, row.id))
            mesh.gone = self._gone_since(network, -1)
            mesh.names = self._names(network) if mesh.state.names else b""
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
            if mesh.state.names > since:
                mesh.names = self._names(network)
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
            parts = [b'{"word":' + dump(mesh.word)]
            if mesh.state.hub and not row.host and row.state == ACTIVE:
                return parts[0] + self._from_hub(mesh, member) + b"}"
            since = self.in_history(mesh, have)
            if row.state != ACTIVE:
                since = -1
                parts.append(b'"peers":[],"state":' + dump(row.state))
            elif since < 0 or row.since > since:
                since = -1
                parts.append(mesh.shared(-1))
            else:
                parts += [b'"from":' + dump(have), mesh.shared(since)]
            if row.state == ACTIVE and mesh.state.names > max(since, 0):
                parts.append(b'"names":' + mesh.names)
            if max(row.own_changed, mesh.state.settings) > since:
                parts.append(b'"me":' + dump(self._own(row, mesh, member)))
            left = {**self._instants(mesh, mesh.members), **self._direct(row)}
            if left:
                parts.append(b'"in":' + dump(left))
            return b",".join(parts) + b"}"

    def _own(self, row: NodeState, mesh: Mesh, member: Member) -> dict[str, Any]:
        group = {} if mesh.state.hub or not self.group else {"group": self.group(mesh.state.id)}
        return {**own_settings(row, mesh.state, member.clients), **self.own, **group}

    def _from_hub(self, mesh: Mesh, member: Member) -> bytes:
        """What a node of a hub network hears, always whole: of the hub, and of itself."""
        hub = mesh.host
        me = self._own(member.row, mesh, member)
        if hub and self.port:
            me["server"] = "http://" + endpoint(hub.row.ip or hub.row.ip6, self.port)
        shown = [each for each in (hub, member) if each]
        records = b",".join(map(mesh.record_of, shown))
        left = self._instants(mesh, [each.row.id for each in shown])
        return b',"peers":[' + records + b'],"me":' + dump(me) + (b',"in":' + dump(left) if left else b"")

    def _instants(self, mesh: Mesh, shown: Container[str]) -> dict[str, float]:
        """Seconds until keys change, by node."""
        rows = [mesh.members[node].row for node in list(mesh.refreshing) if node in shown and node in mesh.members]
        times = {each.id: each.refresh_at - self.clock() for each in rows if each.refresh == SWITCHING}
        return {node: round(seconds, 2) for node, seconds in times.items() if seconds > -60}  # not of a restored database

    def _direct(self, row: NodeState) -> dict[str, float]:
        """Seconds until this node needs no relay to a peer any more."""
        ends = {peer: until for peer, (_, until) in pairs_of(row.relayed).items() if until} if row.relayed else {}
        return {agent.DIRECT + peer: round(until - self.clock(), 2) for peer, until in ends.items()}

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
HOST, HOST_KEY = "netmaker", "host"  # the node that the server's own host is; the access key with which it joins
NO_AGENT = "none-"  # begins the auth key of a node without our agent: no key at all, and never two alike
SETTLED = 3600  # seconds after its start in which the server takes nobody's silence for an absence: it was absent itself
LEFT = "it left by itself"
LIVING = "id = ? AND state != 'removed'"


class Caller(NamedTuple):
    """Who asks for something. `networks`: those of a user, None for all: an administrator."""

    name: str
    source: str = ""
    networks: frozenset[str] | None = None
    may_write: bool = True
    session: str = ""
    token: str = ""  # the name of the API token that speaks for the user

    def may(self, network: str) -> bool:
        return self.networks is None or network.lower() in self.networks


def audit(batch: Batch, caller: Caller, now: int, action: str, network: str = "", target: str = "") -> None:
    """The line of a change in the audit log."""
    who = "/".join(filter(None, (caller.name, caller.token)))
    row = {"time": now, "who": who, "source": caller.source, "network": network}
    batch.insert("audit", {**row, "action": action, "target": target, "detail": batch.note[:500]})


class Core:
    """What every action needs: settings, the database, the server's key, the time, and who asks for it."""

    def __init__(self, settings: Settings, store: Store, key: ServerKey, clock: Callable[[], float] = time.time) -> None:
        self.settings, self.store, self.key, self.clock = settings, store, key, clock
        self.caller, self.started = Caller("server"), self.now

    def by(self, caller: Caller) -> Core:
        """The same for somebody else."""
        core = Core(self.settings, self.store, self.key, self.clock)
        core.caller = caller
        return core

    @property
    def now(self) -> int:
        return int(self.clock())

    def change(self, build: Callable[[], Batch | None], action: str, network: str = "", target: str = "") -> None:
        """A change with its line in the audit log, both or neither."""

        def audited() -> Batch | None:
            batch = build()
            if batch is not None:
                audit(batch, self.caller, self.now, action, network, target)
            return batch

        self.store.change(audited)


def told(values: Row) -> str:
    """Changed columns for the audit log."""
    return " ".join("%s=%s" % (name, int(value) if isinstance(value, bool) else value) for name, value in values.items())


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
        cure = "name the server's folder with --data, or begin with `netmaker-lite serve`"
        raise Missing("there is no database in %s: %s" % (settings.data, cure))
    store = Store(settings.data)
    try:
        return Core(settings, store, _own_key(settings, store))
    except BaseException:
        store.close()
        raise


def give_up_key(settings: Settings, caller: Caller) -> int:
    """Forget a lost server key with the access keys that it sealed, and count them; the next start makes another."""
    if is_there(settings.key_file):
        raise Clash("%s is there, and --new-key is for a lost one: move it away first" % settings.key_file)
    store = Store(settings.data)
    try:
        lost = len(store.rows("SELECT id FROM access_key"))
        batch = ListBatch()
        batch.delete("access_key", "id != ''")
        batch.update("client", {"private": ""}, "private != ''")
        batch.update("meta", {"value": ""}, "key = 'pin'")
        batch.note = "access keys removed: %d" % lost
        audit(batch, caller, int(time.time()), "server new key")
        store.apply(batch)
        return lost
    finally:
        store.close()


def blank(model: Any) -> Row:
    """A row of defaults."""
    empty = {name: None for name, field in model._meta.fields.items() if field.null}
    return {**empty, **model._meta.get_default_dict()}


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
    check_routes("%(range)s %(range6)s" % own, _claims(core, ""))


def add_network(core: Core, name: str, values: Row) -> Row:
    """A network with the given columns; Clash when name or range is taken."""
    new = {**blank(Network), **values, "id": check_network(name), "tag": secrets.token_hex(4)}
    new.update(counter=1, settings=1, created=core.now, modified=core.now, nodes_modified=core.now)
    new["display"] = new["display"] or new["id"]
    new["interface"] = new["interface"] or "nm-" + new["id"]
    new["node_limit"] = values.get("node_limit", core.settings["DEFAULT_NODE_LIMIT"])
    new["hosted"] = values.get("hosted", core.settings["CLIENT_MODE"] != "off") or new["hub"]

    def build() -> Batch:
        if core.store.row("SELECT 1 FROM network WHERE id = ?", (new["id"],)):
            raise Clash("there is a network %s already" % new["id"])
        for other in networks(core):  # else an entry of the one could be a name of the other
            short, long = sorted(("." + new["id"], "." + other["id"]), key=len)
            if long.endswith(short):
                raise Clash("%s would stand among the names of %s: choose another name" % (long[1:], short[1:]))
        _check_ranges(core, new)
        batch = ListBatch()
        batch.when("value = ?", core.store.meta("networks"))
        batch.insert("network", new)
        batch.note = told(values)
        first = {"network": new["id"], "counter": 1, "tag": new["tag"]}
        batch.insert("revision", first)
        return batch

    core.change(build, "network add", new["id"])
    write_host(core)
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
    """Readdress every node and external client in the same transaction."""
    stamp = core.store.meta("networks")
    batch.update("meta", {"value": batch.stamp}, "key = 'networks' AND value = ?", stamp, must=True)
    batch.when("counter = ?", old["counter"])
    states = (ACTIVE, DISABLED, EXPIRED)
    condition = (Node.network == old["id"]) & Node.state.in_(states)
    members = core.store.select(Node.select(Node.id, Node.ip, Node.ip6).where(condition))
    clients_ = core.store.select(Client.select(Client.id, Client.ip, Client.ip6).where(Client.network == old["id"]))
    if clients_:
        batch.set("names = counter + 1")
    moved = {
        column: renumber([*members, *clients_], column, old[ranges], values[ranges])
        for column, ranges in (("ip", "range"), ("ip6", "range6"))
        if ranges in values
    }
    batch.delete("lease", "network = ?", old["id"])
    highest = 0
    ranges = [{**old, **values}[name] for name in ("range", "range6")]
    for node in [*members, *clients_]:
        new = {**node, **{column: places[node["id"]] for column, places in moved.items()}}
        for address in filter(None, (new["ip"], new["ip6"])):
            highest = max([highest, *(each.host(address) for each in pools(*ranges))])
            batch.insert("lease", _lease(old["id"], address, node["id"]))
        change = {"ip": new["ip"], "ip6": new["ip6"]}
        batch.update("client", change, "id = ?", node["id"])
        change.update(changed=batch.counter, own_changed=batch.counter)
        batch.update("node", change, "id = ?", node["id"])
    last = min(each.last for each in pools(*ranges))
    batch.set("cursor = ?", min(highest, last) + 1)


def set_network(core: Core, name: str, values: Row) -> Row:
    """Change columns of a network; every node hears of it. A hub is the server's host."""
    values = {**values, "hosted": True} if values.get("hub") else values

    def build() -> Batch | None:
        old = need_network(core, name)
        new = {key: value for key, value in values.items() if old[key] != value}
        if not new:
            return None
        batch = NetworkBatch(old["id"], core.now)
        batch.note = told(new)
        if {"range", "range6"} & new.keys():
            _check_ranges(core, {**old, **new})
            _change_ranges(core, batch, old, new)
        for column, value in new.items():
            batch.set('"%s" = ?' % column, value)
        batch.set("settings = counter + 1, modified = ?", core.now)
        if {"punch", "is_local"} & new.keys():  # every record shows other endpoints now
            batch.update("node", {"changed": batch.counter}, "network = ?", old["id"])
        if "hub" in new:  # what they know is no base for a delta
            batch.update("node", {"changed": batch.counter, "since": batch.counter}, "network = ?", old["id"])
        return batch

    core.change(build, "network set", need_network(core, name)["id"])
    write_host(core)
    return need_network(core, name)


def remove_network(core: Core, name: str) -> Row:
    """Forget a network that has no nodes but the server's own, whose agent leaves by itself."""
    network = need_network(core, name)

    def build() -> Batch:
        living = "network = ? AND state != 'removed' AND NOT host"
        somebody = composed("SELECT 1 FROM node WHERE %s", living)
        if core.store.row(somebody, (network["id"],)):
            raise Clash("the network %s has nodes: remove them first" % network["id"])
        batch = ListBatch()
        batch.when("NOT EXISTS (%s)" % somebody, network["id"])
        for table in TABLES:
            batch.delete(table, "network = ?", network["id"])
        batch.delete("network", "id = ?", network["id"])
        for name, text in core.store.rows("SELECT name, networks FROM account WHERE networks != ''"):
            rest = [each for each in text.split(",") if each != network["id"]]
            batch.update("account", {"networks": ",".join(rest)}, "name = ? AND networks = ?", name, text, must=True)
        for session, text in core.store.rows("SELECT id, networks FROM session WHERE networks != ''"):
            left = ",".join(each for each in text.split(",") if each != network["id"])
            batch.update("session", {"networks": left}, "id = ?", session)
            if not left:  # which would be no limit at all
                batch.delete("session", "id = ?", session)
        return batch

    core.change(build, "network remove", network["id"])
    write_host(core)
    return network


def write_host(core: Core, url: str | None = None) -> None:
    """`host.json`, by which the agent on the server's host knows its networks. `url`: the server's there; None: as it stands."""
    path = os.path.join(core.store.folder, "host.json")
    text = agent.read_text(path)
    try:
        url = json.loads(text)["server"] if url is None else url
    except (ValueError, KeyError):
        return  # `serve` has not run yet
    keys = {each["id"]: "%s.%s" % (HOST_KEY, b64(core.key.host_secret(each["id"]))) for each in networks(core) if each["hosted"]}
    told = {"version": 1, "server": url, "pin": b64(core.key.pin), "networks": keys if url else {}}
    if text != json.dumps(told):
        write_private(path, json.dumps(told).encode(), True)


def host_url(settings: Settings) -> str:
    """The server's URL for the agent on its own host; "" where that shall be in no network."""
    bind = settings["SERVER_BIND"]
    place = "127.0.0.1" if bind in ("0.0.0.0", "::", "") else bind  # noqa: S104
    return "" if settings["CLIENT_MODE"] == "off" else "http://" + endpoint(place, settings["API_PORT"])


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


def bind_address(settings: Settings) -> str:
    """Where to listen: a server that is told to others by an IPv6 address has to hear that, too."""
    given: str = settings["SERVER_BIND"]
    return given or ("::" if ":" in (settings["SERVER_HOST"] or default_address()) else "0.0.0.0")  # noqa: S104


def server_urls(core: Core) -> tuple[str, ...]:
    """The addresses that tokens carry: what `serve` wrote down, else what it would write."""
    written = core.store.meta("urls")
    return tuple(written.split()) if written else own_urls(core.settings)


def client_files() -> dict[str, bytes]:
    """What `/meshclient/files/` has: the agent, and the scripts where they are installed with this module or beside it."""
    source = os.path.splitext(os.path.abspath(agent.__file__))[0] + ".py"
    above = os.path.dirname(source)
    folders = [above + "/shell/"]
    for _ in range(4):  # of a wheel, from PREFIX/lib/python3.X/site-packages up
        folders.append(above + "/share/netmaker-lite/shell/")
        above = os.path.dirname(above)
    places = ([source], *([folder + name for folder in folders] for name in ("install.sh", "netclient-look")))
    paths = [next(filter(os.path.isfile, choice), "") for choice in places]
    return _client_files(*((path, os.stat(path).st_mtime_ns) if path else ("", 0) for path in paths))


@lru_cache(maxsize=1)
def _client_files(source: tuple[str, int], script: tuple[str, int], look: tuple[str, int]) -> dict[str, bytes]:
    """Read once, and again when a file is another: an agent updated under a running server gets its hash."""
    files: dict[str, bytes] = {}
    for name, (path, _) in {"netclient-look": look, "netclient_lite.py": source, "install.sh": script}.items():
        if not path and name == "netclient-look":
            continue
        if not path:
            log.warning("%s is not installed with this server: keys come without the line that installs the agent", name)
            return files
        with open(path, "rb") as stream:
            files[name] = stream.read()
    files["netclient_lite.py"] = slim(files["netclient_lite.py"].decode()).encode()
    known = files["netclient_lite.py"], files.get("netclient-look", b"")
    files["install.sh"] = install_script(files["install.sh"].decode(), *known).encode()
    return files


def line_for(url: str, token: str) -> str:
    """The line that installs and joins with a token; "" where this server has no script."""
    script = client_files().get("install.sh")
    return install_line(url, token, sha256(script).hexdigest()) if script else ""


def add_key(core: Core, network: str, name: str = "", uses: int | None = 1, lifetime: int | None = None) -> Row:
    """An access key; `value`, `accessstring` and `install` are in the answer this one time."""
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
        batch.note = "uses=%s expires=%s" % (uses or "unlimited", new["expires"] or "never")
        return batch

    core.change(build, "key add", owner["id"], new["name"])
    value = "%s.%s" % (key_id, secret)
    urls = server_urls(core)
    token = agent.make_token(agent.Token(urls, core.key.pin, owner["id"], value))
    return {**new, "value": value, "accessstring": token, "install": line_for(urls[0], token)}


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

    core.change(build, "key remove", owner["id"], found["name"])
    return found


# ---- nodes


def nodes(core: Core, network: str) -> list[Row]:
    name = need_network(core, network)["id"]
    found = Node.select().where((Node.network == name) & (Node.state != REMOVED))
    return [_with_relayed(core, row) for row in core.store.select(found.order_by(Node.name))]


def need_node(core: Core, network: str, text: str) -> Row:
    """A node by its id, name or address, or by a MAC address that no other has."""
    name = need_network(core, network)["id"]
    living, folded = (Node.network == name) & (Node.state != REMOVED), text.lower()
    for column in (Node.id, Node.name, Node.ip, Node.ip6, Node.mac) if text else ():
        found = core.store.select(Node.select().where(living & (column == folded)).limit(2))
        if len(found) == 1:
            return _with_relayed(core, found[0])
    raise Missing("%s has no node %s: `netmaker-lite node list %s` shows which there are" % (name, text, name))


def _with_relayed(core: Core, node: Row) -> Row:
    """A relay with the addresses that it relays."""
    if node["relay"]:
        sql = "SELECT ip, ip6 FROM node WHERE network = ? AND via = ? ORDER BY name"
        node["relayaddrs"] = [ip or ip6 for ip, ip6 in core.store.rows(sql, (node["network"], node["id"]))]
    return node


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
    """Addresses for a node that becomes active, and its place in the network, where the server's own does not count."""
    if node["host"]:
        return _settle(core, batch, network, node)
    if network["members"] >= network["node_limit"]:
        raise Clash(
            "the network has as many nodes as its limit allows (%d): raise nodelimit, or remove nodes" % network["node_limit"]
        )
    batch.when("members < node_limit")
    batch.set("members = members + 1")
    return _settle(core, batch, network, node)


def _settle(core: Core, batch: NetworkBatch, network: Row, node: Row) -> Row:
    """Addresses for a node or external client: the wished ones, or the next."""
    ranges = pools(network["range"], network["range6"])
    held, released_ = partial(core.store.held, network["id"]), partial(core.store.released, network["id"])
    placement = place(ranges, network["cursor"], (node["ip"], node["ip6"]), held, released_)
    batch.when("cursor = ?", network["cursor"])
    batch.set("cursor = ?", placement.cursor)
    for address in placement.addresses:
        _take(batch, network["id"], address, node["id"])
    by_version = {each.version: text for each, text in zip(ranges, placement.addresses)}
    return {"ip": by_version.get(4, ""), "ip6": by_version.get(6, "")}


def _check_key_free(core: Core, node: Row) -> None:
    sql = "SELECT '%s ' || name FROM %s WHERE network = ? AND key IN (?, ?) AND id != ?"
    sql = composed(sql + " AND state != 'removed' UNION ALL " + sql + " UNION ALL ", "node", "node", "client", "client")
    sql += "SELECT 'node ' || name FROM node WHERE network = ? AND next_key IN (?, ?) AND id != ? AND state != 'removed'"
    keys = node["key"], node.get("next_key") or node["key"]
    other = core.store.row(sql, (node["network"], *keys, node["id"]) * 3)
    if other:
        raise Clash("the WireGuard key belongs to the %s: make a new one" % other)


NAMED = (
    "(SELECT network, name, id FROM node WHERE state != 'removed' UNION ALL SELECT network, name, id FROM client"
    " UNION ALL SELECT network, name, name FROM dns) AS named WHERE network = ? AND id != ?"
)


def unused_name(core: Core, network: str, wish: str, node: str = "") -> str:
    """The wished name, or with -2, -3, … where something else of the network has it."""
    sql = composed("SELECT name FROM %s AND name LIKE ?", NAMED)
    return free_name(wish, (row[0] for row in core.store.rows(sql, (network, node, wish[:50] + "%"))))


def _check_name_free(core: Core, network: str, name: str, whose: str) -> None:
    if core.store.row(composed("SELECT 1 FROM %s AND name = ?", NAMED), (network, whose, name)):
        raise Clash("the name %s is taken: choose another" % name)


def _new_node(core: Core, network: Row, who: Joining) -> Row:
    new = {**blank(Node), **who.values, "id": secrets.token_hex(8), "network": network["id"]}
    new.update(auth=who.auth, look=b64(secrets.token_bytes(16)), source=who.source)
    new.update(public=who.public, created=core.now, modified=core.now, last_seen=core.now)
    new["state"] = ACTIVE if who.access_key else PENDING
    _check_key_free(core, new)
    new["host"] = who.access_key == HOST_KEY
    new["name"] = unused_name(core, network["id"], HOST if new["host"] else new.get("name") or "node")
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
    if key_id == HOST_KEY:
        batch.when("hosted = ?", True)
        return
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
        batch.when("names = ?", network["names"])
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

    if who.access_key == HOST_KEY:  # there is one: what was before has lost its files
        former = (Node.network == who.network) & Node.host & (Node.state != REMOVED) & (Node.auth != who.auth)
        for node in core.store.select(Node.select().where(former)):
            remove_node(core, node, LEFT)
    core.by(Caller("node", who.source)).change(build, "node join", who.network, who.values["name"])
    mine = (Node.network == who.network) & (Node.auth == who.auth)
    found = core.store.get(Node.select().where(mine))
    if found is None:
        raise Busy("the node was removed while it joined: try again")
    log.info("%s: node %s (%s) from %s is %s", who.network, found["name"], found["id"], who.source, found["state"])
    return found


def add_node(core: Core, network: str, values: Row) -> Row:
    """A node for a machine without our agent: an administrator gives its WireGuard key and endpoint."""
    owner = need_network(core, network)
    if "key" not in values:
        raise Invalid("publickey is missing: make a key pair on the machine (wg genkey, wg pubkey) and give the public half")
    new: Row = {}

    def build() -> Batch:
        found = need_network(core, owner["id"])
        batch = NetworkBatch(owner["id"], core.now)
        batch.when("names = ?", found["names"])
        who = Joining(owner["id"], "", "administrator", "", "", values)
        new.update(_new_node(core, found, who), auth=NO_AGENT + secrets.token_hex(8), os="")
        new.update(_move_in(core, batch, found, new))
        if values.get("ips"):
            new["ips"] = check_routes(values["ips"], _owned(core, found, new))
            batch.when("counter = ?", found["counter"])
        batch.insert("node", {**new, **dict.fromkeys(("changed", "own_changed", "since"), batch.counter)})
        batch.note = told(values)
        return batch

    core.change(build, "node add", owner["id"], values.get("name", ""))
    return need_node(core, owner["id"], new["id"])


def _leave_lists(batch: NetworkBatch, node: Row) -> None:
    """Take a node out of what the others hear."""
    batch.delete("gone", "network = ? AND node = ?", node["network"], node["id"])
    row = {"network": node["network"], "node": node["id"], "counter": batch.counter}
    batch.insert("gone", row)
    batch.delete("observed", "network = ? AND ? IN (node, observer)", node["network"], node["id"])


def _without_vain_wishes(core: Core, network: Row, node: Row) -> Row:
    """A pending node whose wished address somebody else got meanwhile, or another range left out, takes the next one."""
    ranges = pools(network["range"], network["range6"])

    def wish(address: str) -> str:
        inside = address and any(each.host(address) for each in ranges)
        return address if inside and not core.store.held(network["id"], address) else ""

    return {**node, **{name: wish(node[name]) for name in ("ip", "ip6")}}


def _set_state(core: Core, node: Row, action: str, state: str, before: Sequence[str], more: Row | None = None) -> Row:
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

    core.change(build, "node " + action, node["network"], node["name"])
    return need_node(core, node["network"], node["id"])


def approve(core: Core, node: Row) -> Row:
    return _set_state(core, node, "approve", ACTIVE, (PENDING,))


def disable(core: Core, node: Row) -> Row:
    return _set_state(core, node, "disable", DISABLED, (ACTIVE, EXPIRED))


def enable(core: Core, node: Row) -> Row:
    if node["state"] == PENDING:
        words = (node["name"], node["network"], node["name"])
        raise Clash("the node %s waits for approval: `netmaker-lite node approve %s %s`" % words)
    over = {"expires": None} if node["expires"] and node["expires"] <= core.now else None
    return _set_state(core, node, "enable", ACTIVE, (DISABLED, EXPIRED), over)


def remove_node(core: Core, node: Row, farewell: str = "an administrator removed this node") -> Row:
    """End a membership. The row stays until the agent has confirmed that it heard of it."""

    def build() -> Batch | None:
        now = core.store.get(Node.select().where(Node.id == node["id"]))
        if now is None or now["state"] == REMOVED:
            return None
        batch = NetworkBatch(node["network"], core.now)
        batch.note = farewell
        if now["state"] != PENDING and not now["host"]:
            batch.set("members = members - 1")
        new: Row = {"state": REMOVED, "removed": core.now, "farewell": farewell, **_without_roles(batch, now)}
        new.update(changed=batch.counter, own_changed=batch.counter, since=batch.counter)
        as_read = (now["id"], now["state"], now["ingress"])  # an ingress has clients that go with it
        batch.update("node", new, "id = ? AND state = ? AND ingress = ?", *as_read, must=True)
        free = {"node": None, "released": core.now}
        batch.update("lease", free, "network = ? AND node = ?", node["network"], now["id"])
        _leave_lists(batch, now)
        return batch

    core.change(build, "node remove", node["network"], node["name"])
    return node


def _without_roles(batch: NetworkBatch, node: Row) -> Row:
    """The columns of a node that has gone; its clients go too, and whom it relayed is by itself again."""
    if node["ingress"]:
        _drop_clients(batch, node)
    _set_free(batch, node)
    rest = {"deny": Expression("REPLACE(deny, ?, '')", (node["id"] + ",",)), "own_changed": batch.counter}
    batch.update("node", rest, "network = ? AND deny LIKE ?", node["network"], "%" + node["id"] + "%")
    return {name: blank(Node)[name] for name in ("ip", "ip6", "egress", "via", "relayed", "deny", "ingress", "relay")}


def _set_free(batch: NetworkBatch, relay: Row) -> None:
    batch.update("node", {"via": "", "changed": batch.counter}, "network = ? AND via = ?", batch.network, relay["id"])


def _drop_clients(batch: NetworkBatch, gateway: Row, client: str = "") -> None:
    """Forget the clients of a gateway, or one of them."""
    mine, which = "IN (SELECT id FROM client WHERE gateway = ? AND ? IN ('', id))", (gateway["id"], client)
    batch.update("lease", {"node": None, "released": batch.now}, "node " + mine, *which)
    batch.delete("client", "id " + mine, *which)
    batch.set("names = counter + 1")


def reject(core: Core, node: Row) -> Row:
    if node["state"] != PENDING:
        words = (node["name"], node["state"], node["network"], node["name"])
        raise Clash("the node %s is %s, not pending: `netmaker-lite node remove %s %s`" % words)
    return remove_node(core, node, "an administrator turned this node away")


def forget_node(core: Core, network: str, node: str) -> None:
    """Drop the row of a removed node: its agent knows."""

    def build() -> Batch:
        batch = NetworkBatch(network, core.now, heard=False)
        batch.delete("node", "id = ? AND state = 'removed'", node)
        unkeyed = "node = ? AND access_key NOT IN ('', 'host') AND access_key NOT IN (SELECT id FROM access_key)"
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
        _check_name_free(core, node["network"], values["name"], node["id"])
        batch.when("names = ?", network["names"])
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
    own = dict.fromkeys((network["range"], network["range6"]), "the network's own range")
    return {**own, **_claims(core, network["id"], node["id"], "ips")}


def _claims(core: Core, network: str, node: str = "", column: str = "") -> dict[str, str]:
    """Ranges that nodes of a network ("": of any) have and whose they are, but for what is in a column of a node."""
    sql = "SELECT id, name, ips, egress FROM node WHERE ? IN ('', network) AND state != 'removed' AND (ips != '' OR egress != '')"
    found = {}
    for id_, name, *texts in core.store.rows(sql, (network,)):
        ranges = {"ips": texts[0].split(","), "egress": egress_ranges(texts[1])}
        for kind in ranges.keys() - ({column} if id_ == node else ()):
            found.update(dict.fromkeys(filter(None, ranges[kind]), "a range of the node " + name))
    return found


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
        batch.note = told(new)
        batch.update("node", columns, LIVING, now["id"], must=True)
        return batch

    core.change(build, "node set", node["network"], node["name"])
    found = need_node(core, node["network"], node["id"])
    over = found["expires"] is not None and found["expires"] <= core.now
    return enable(core, found) if found["state"] == EXPIRED and not over else found


def sweep(core: Core) -> None:
    """What time alone changes: nodes expire, sign-ups lapse, nodes that left are forgotten."""
    due = (Node.state == ACTIVE) & (Node.expires <= core.now)
    for node in core.store.select(Node.select().where(due)):
        _set_state(core, node, "expire", EXPIRED, (ACTIVE,))
    lapsed = (Node.state == PENDING) & (Node.created <= core.now - PENDING_DAYS * 86400)
    for node in core.store.select(Node.select().where(lapsed)):
        remove_node(core, node, LEFT)
    for network in networks(core) if core.now - core.started > SETTLED else ():
        limit = core.now - network["silent"] if network["silent"] else 0
        here = (Node.network == network["id"]) & (Node.state == ACTIVE) & ~Node.auth.startswith(NO_AGENT)
        for node in core.store.select(Node.select().where(here & (Node.last_seen < limit))):
            remove_node(core, node, "this node was silent for longer than %s allows" % network["id"])
    if core.store.row("SELECT 1 FROM client WHERE private != '' AND keyed <= ?", (core.now - KEPT,)):
        batch = ListBatch()
        batch.update("client", {"private": ""}, "keyed <= ?", core.now - KEPT)
        core.store.apply(batch)
    left = (Node.state == REMOVED) & (Node.farewell == LEFT) & (Node.removed <= core.now - 86400)
    for node in core.store.select(Node.select().where(left)):
        forget_node(core, node["network"], node["id"])


# ---- key refresh


def refresh_keys(core: Core, network: str) -> Row:
    """Put all nodes of a network whose agent makes its key in the queue for a new one."""
    name = str(need_network(core, network)["id"])
    _queue(core, name, "", "id != ''")
    return need_network(core, name)


def refresh_key(core: Core, node: Row) -> Row:
    """Put one node in the queue for a new key."""
    if node["keyed"]:
        raise Clash("the key of %s was given by its user: join --force there takes another" % node["name"])
    if node["state"] != ACTIVE or not node["confirmed"]:
        raise Clash("the node %s is not active, or has no agent that could make a key" % node["name"])
    _queue(core, node["network"], node["name"], "id = ?", node["id"])
    return need_node(core, node["network"], node["id"])


def _queue(core: Core, network: str, target: str, which: str, *bound: str) -> None:
    def build() -> Batch:
        batch = NetworkBatch(network, core.now, heard=False)
        able = "network = ? AND state = 'active' AND confirmed AND NOT keyed AND refresh IN ('', 'silent') AND "
        batch.update("node", {"refresh": QUEUED, "refresh_at": core.now}, able + which, network, *bound)
        return batch

    core.change(build, "key refresh", network, target)
    start_refresh(core, network)


NOBODYS_TURN = (
    "NOT EXISTS (SELECT 1 FROM node WHERE network = ? AND state = 'active' AND refresh IN ('asked', 'listed', 'switching'))"
)


def start_refresh(core: Core, network: str) -> None:
    """Give the first in the queue its turn, unless it is another's. Who was seen lately comes first."""
    sql = "network = ? AND state = 'active' AND refresh = 'queued' AND %s ORDER BY last_seen < ?, refresh_at, name LIMIT 1"
    found = core.store.row(NODE_SELECT + composed(sql, NOBODYS_TURN), (network, network, core.now - 120))
    if found is not None:
        node = NodeState._make(found)
        step_refresh(core, node, LISTED if node.next_key else ASKED, core.now)


def step_refresh(core: Core, node: NodeState, state: str, at: int) -> None:
    """Bring a node's refresh from the state that it was seen in to the next."""

    def build() -> Batch | None:
        same = "id = ? AND state = 'active' AND refresh = ? AND refresh_at = ?"
        seen: tuple[Any, ...] = (node.id, node.refresh, node.refresh_at)
        if node.refresh == QUEUED:  # another process may have given another node its turn
            same, seen = same + " AND " + NOBODYS_TURN, (*seen, node.network)
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


# ---- gateways

Work = Callable[[Row, Row, NetworkBatch], Union[Row, None]]


def _arrange(core: Core, node: Row, action: str, work: Work, target: str = "") -> Row:
    """Change what a node is for others. `work`: (network, node, batch) to its new columns, None for nothing to do.

    Nothing of the network may change meanwhile, so `work` can go by all that it reads there.
    """

    def build() -> Batch | None:
        network = need_network(core, node["network"])
        now = need_node(core, network["id"], node["id"])
        batch = NetworkBatch(network["id"], core.now)
        batch.when("counter = ?", network["counter"])
        new = work(network, now, batch)
        if new is None:
            return None
        heard = (("changed", RECORD_COLUMNS), ("own_changed", OWN_COLUMNS))
        marks = {column: batch.counter for column, columns in heard if columns & new.keys()}
        batch.update("node", {**new, **marks, "modified": core.now}, LIVING, now["id"], must=True)
        batch.note = batch.note or told(new)
        return batch

    core.change(build, action, node["network"], target or node["name"])
    return need_node(core, node["network"], node["id"])


def _fixed_places(core: Core, network: Row, gateway: Row) -> dict[str, str]:
    """Addresses to which no route through the mesh may lead, and whose they are."""
    hosts_ = (agent.split_url(url)[1] for url in server_urls(core))
    found = {host: "the server's address" for host in hosts_ if ":" in host or host.replace(".", "").isdigit()}
    for node in nodes(core, network["id"]):
        for place in filter(None, (node["static"], node["at"], node["public"], node["local6"])):
            found[split_endpoint(_endpoint(place, 1))[0]] = "the endpoint of the node " + node["name"]
        near = node["source"] == gateway["source"] or node["lan"] == gateway["lan"] != ""
        if node["local"] and not near:
            found[node["local"]] = "in the LAN of the node " + node["name"]
    return found


def create_egress(core: Core, node: Row, ranges: Sequence[str], interface: str = "", nat: bool = True, **hooks: str) -> Row:
    """Make a node the gateway to these ranges behind it, and to no others any more. `hooks`: postup, postdown."""
    interface = interface and agent.check_interface(interface)

    def work(network: Row, now: Row, _: NetworkBatch) -> Row:
        taken = {}
        for row in networks(core):
            whose = "the network " + row["id"] if core.caller.may(row["id"]) else "another network"
            taken.update(dict.fromkeys((row["range"], row["range6"]), "the range of " + whose))
        taken.update(_fixed_places(core, network, now))
        found = check_routes(",".join(ranges), {**taken, **_claims(core, network["id"], now["id"], "egress")})
        if not found:
            raise Invalid("an egress gateway needs ranges, like 192.168.7.0/24")
        egress = {"ranges": found.split(","), "interface": interface, "nat": nat}
        return {**hooks, "egress": dump(egress).decode()}

    return _arrange(core, node, "node egress", work)


def create_ingress(core: Core, node: Row) -> Row:
    """Let external clients in at a node."""

    def work(_: Row, now: Row, __: NetworkBatch) -> Row | None:
        if now["auth"].startswith(NO_AGENT):
            raise Clash("no agent runs on %s that could let clients in" % now["name"])
        return None if now["ingress"] else {"ingress": True}

    return _arrange(core, node, "node ingress", work)


def create_relay(core: Core, node: Row, others: Sequence[str]) -> Row:
    """Let a node carry the traffic of others (id, name or address), and of no others any more."""

    def work(network: Row, now: Row, batch: NetworkBatch) -> Row:
        if now["via"]:
            raise Clash("%s is relayed itself: take it off that relay first" % now["name"])
        _set_free(batch, now)
        for text in others:
            other = need_node(core, network["id"], text)
            if other["id"] == now["id"] or other["relay"] or other["via"] not in ("", now["id"]):
                raise Clash("%s is a relay, or has one: it cannot be relayed by %s" % (other["name"], now["name"]))
            batch.update("node", {"via": now["id"], "changed": batch.counter}, LIVING, other["id"], must=True)
        batch.note = " ".join(others)
        return {"relay": True}

    return _arrange(core, node, "node relay", work)


def set_relays(core: Core, network: str, changes: Mapping[Pair, tuple[str, int] | None]) -> None:
    """Have pairs go through a relay, or no longer; nothing else of the network may change meanwhile."""

    def build() -> Batch | None:
        owner = core.store.get(Network.select().where(Network.id == network))
        if owner is None:
            return None
        before = dict(core.store.rows("SELECT id, relayed FROM node WHERE network = ? AND state != 'removed'", (network,)))
        after = {end: pairs_of(before[end]) for pair in changes for end in pair if end in before}
        for pair, chosen in changes.items():
            for one, other in (pair, pair[::-1]):
                if one in after:
                    after[one].pop(other, None)
                    after[one].update({other: chosen} if chosen and other in after else {})
        batch = NetworkBatch(network, core.now)
        batch.when("counter = ?", owner["counter"])
        for node, pairs in after.items():
            text = json.dumps(pairs, sort_keys=True) if pairs else ""
            if text != before[node]:
                batch.update("node", {"relayed": text, "own_changed": batch.counter}, LIVING, node)
        return batch

    core.store.change(build)


def delete_role(core: Core, node: Row, role: str) -> Row:
    """Make a node no egress, ingress or relay any more. The clients of an ingress go with it."""

    def work(_: Row, now: Row, batch: NetworkBatch) -> Row | None:
        if now[role] and role == "ingress":
            _drop_clients(batch, now)
        if role == "relay":
            _set_free(batch, now)
        return {role: blank(Node)[role]} if now[role] else None

    return _arrange(core, node, "node %s off" % role, work)


# ---- external clients

KEPT = 15 * 60  # seconds that a client's private key is kept, sealed, for its file and picture


def clients(core: Core, network: str = "") -> list[Row]:
    """External clients of a network ("": of all), each with its gateway's `endpoint`, its configuration as of now (`file`)
    and whether that is another than it was given (`outdated`). `secret`: its private key, as long as that is kept."""
    found = []
    for owner in [need_network(core, network)] if network else networks(core):
        here = (Node.network == owner["id"]) & (Node.ingress | (Node.egress != ""))
        gateways = {node["id"]: node for node in core.store.select(Node.select().where(here).order_by(Node.id))}
        routes = [text for node in gateways.values() if node["state"] == ACTIVE for text in egress_ranges(node["egress"])]
        for row in core.store.select(Client.select().where(Client.network == owner["id"]).order_by(Client.name)):
            gateway = gateways.get(row["gateway"])
            if gateway is None:
                continue  # came or went between the two reads
            config = partial(client_config, owner, gateway, row, routes)
            made = blake2b(config().encode(), digest_size=8).hexdigest()
            kept = row["private"] and core.now < row["keyed"] + KEPT
            secret = _base64(core.key.unseal(row["id"], row["private"])) if kept else ""
            row.update(endpoint=client_endpoint(owner, gateway), outdated=made != row["made"], made=made, secret=secret)
            found.append({**row, "file": config(secret, preshared_key(core, gateway, row))})
    return found


def need_client(core: Core, network: str, text: str) -> Row:
    """An external client by its id or name."""
    for row in clients(core, network):
        if text.lower() in (row["id"], row["name"]):
            return row
    raise Missing("%s has no client %s: `netmaker-lite client list %s` shows which there are" % (network, text, network))


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def preshared_key(core: Core, gateway: Row, client: Row) -> str:
    """What gateway and client share beside their keys; the gateway computes the same (docs/protocol.md)."""
    auth = unb64(gateway["auth"])
    key = label_key(core.key.shared(auth), "client", auth, core.key.pin, gateway["network"])
    return _base64(blake2b((client["id"] + "\n" + client["key"]).encode(), key=key, digest_size=32).digest())


def picture_of(client: Row, kind: str) -> bytes:
    """The configuration of a client as a QR picture: png or svg."""
    if not client["secret"]:
        raise UsedUp("the private key of %s is not here any more: renew the client, or take the file" % client["name"])
    return qr(client["file"], kind)


def _keyed(core: Core, client: str, key: str) -> Row:
    """The columns of a key that somebody has, or of a pair made now."""
    private = "" if key else agent.new_private()
    sealed = private and core.key.seal(client, b64(base64.b64decode(private)))
    return {"key": key or agent.derived_public(private), "private": sealed, "keyed": core.now}


def _given(core: Core, network: str, client: str) -> Row:
    """A client as it is answered once, with its private key: it has the configuration as of now."""
    row = need_client(core, network, client)
    batch = NetworkBatch(row["network"], core.now, heard=False)
    batch.update("client", {"made": row["made"]}, "id = ?", client)
    core.store.apply(batch)
    return {**row, "outdated": False, "privatekey": row["secret"], "config": row["file"]}


def add_client(core: Core, gateway: Row, values: Row) -> Row:
    """An external client at an ingress gateway. `values`: columns name, key, resolver, internet."""
    new = {**blank(Client), **values, "id": secrets.token_hex(8), "network": gateway["network"], "gateway": gateway["id"]}
    new.update(_keyed(core, new["id"], values.get("key", "")), created=core.now, modified=core.now)

    def work(network: Row, now: Row, batch: NetworkBatch) -> Row:
        if not now["ingress"]:
            words = (now["name"], network["id"], now["name"])
            raise Clash("%s is no ingress gateway: `netmaker-lite node ingress %s %s` makes it one" % words)
        if not client_endpoint(network, now):
            raise Clash("nobody outside can reach %s: set its endpoint first" % now["name"])
        row = {**new, "name": values.get("name") or unused_name(core, network["id"], "client")}
        _check_key_free(core, row)
        if values.get("name"):  # one that we chose may be taken since, which upsets the change: it is tried again
            _check_name_free(core, row["network"], row["name"], row["id"])
        batch.set("names = counter + 1")
        batch.insert("client", {**row, **_settle(core, batch, network, row)})
        batch.note = told({"gateway": now["name"], **values})
        return {"ingress": True}

    _arrange(core, gateway, "client add", work, values.get("name", ""))
    return _given(core, new["network"], new["id"])


def set_client(core: Core, client: Row, values: Row, action: str = "client set") -> Row:
    """Change name, enabled, resolver or internet of a client."""

    def work(network: Row, now: Row, batch: NetworkBatch) -> Row | None:
        old = need_client(core, network["id"], client["id"])
        new = differences(old, values)
        if not new:
            return None
        _check_key_free(core, {**old, **new})
        _check_name_free(core, old["network"], {**old, **new}["name"], old["id"])
        batch.set("names = counter + 1")
        batch.update("client", {**new, "modified": core.now}, "id = ?", client["id"], must=True)
        batch.note = told({column: value for column, value in new.items() if column not in ("private", "keyed")})
        return {"ingress": True}

    _arrange(core, need_node(core, client["network"], client["gateway"]), action, work, client["name"])
    return need_client(core, client["network"], client["id"])


def renew_client(core: Core, client: Row, key: str = "") -> Row:
    """A new pair, or a key that somebody has, and the configuration as of now."""
    set_client(core, client, _keyed(core, client["id"], key), "client renew")
    return _given(core, client["network"], client["id"])


def remove_client(core: Core, client: Row) -> None:
    def work(_: Row, now: Row, batch: NetworkBatch) -> Row:
        _drop_clients(batch, now, client["id"])
        batch.note = told({"gateway": now["name"]})
        return {"ingress": True}

    _arrange(core, need_node(core, client["network"], client["gateway"]), "client remove", work, client["name"])


# ---- names


def each_name(core: Core, network: str) -> Iterator[Row]:
    """The names of a network ("": of all); `kind` is node, client or custom."""
    return (dict(zip(("network", "name", "ip", "ip6", "kind"), row)) for row in core.store.each(NAMES, (network,)))


def names(core: Core, network: str = "") -> list[Row]:
    return list(each_name(core, need_network(core, network)["id"] if network else ""))


def need_name(core: Core, network: str, name: str) -> Row:
    """A name that somebody wrote down."""
    for row in names(core, network):
        if (row["name"], row["kind"]) == (name.lower(), "custom"):
            return row
    raise Missing("%s has no entry %s: `netmaker-lite dns list %s` shows which there are" % (network, name, network))


def set_name(core: Core, network: str, name: str, values: Row | None) -> Row:
    """Write down a name, or change what `name` is: columns name, ip, ip6; None forgets it."""
    new: Row = {}

    def build() -> Batch:
        owner = need_network(core, network)
        batch = NetworkBatch(owner["id"], core.now)
        batch.when("counter = ?", owner["counter"])
        batch.set("names = counter + 1")
        old = need_name(core, network, name) if name else {"network": owner["id"], "name": "", "ip": "", "ip6": ""}
        new.update({**old, **(values or {})})
        batch.delete("dns", "network = ? AND name = ?", owner["id"], old["name"])
        if values is not None:
            if not new["name"] or not new["ip"] + new["ip6"]:
                raise Invalid("an entry needs a name and an address")
            _check_name_free(core, owner["id"], new["name"], old["name"])
            batch.insert("dns", {column: new[column] for column in ("network", "name", "ip", "ip6")})
            batch.note = told(values)
        return batch

    target = name or (values or {}).get("name", "")
    core.change(build, "dns remove" if values is None else "dns set", network.lower(), target)
    return new


def write_names(core: Core) -> None:
    """The files for CoreDNS, in the folder `dnsconfig`: those that are not yet as they should be."""
    folder = os.path.join(core.store.folder, "dnsconfig")
    os.makedirs(folder, mode=0o755, exist_ok=True)
    zones = corefile(row["id"] for row in networks(core))
    texts = {"netmaker.hosts": hosts_file(each_name(core, "")), "Corefile": zones}
    for name, text in texts.items():
        path = os.path.join(folder, name)
        if agent.read_text(path) != text:
            write_private(path, text.encode(), True, 0o644)


def tell_nameserver(core: Core) -> str:
    """The nameserver's address that agents are told; all hear of another one."""
    address = str(core.settings["COREDNS_ADDR"]) if core.settings["DNS_MODE"] == "on" else ""
    if address != core.store.meta("nameserver"):
        core.store.set_meta("nameserver", address)
        for network in networks(core):
            batch = NetworkBatch(network["id"], core.now)
            batch.set("settings = counter + 1")
            core.store.apply(batch)
    return address


# ---- access between nodes


def _pair(one: Row, other: Row) -> Row:
    return {"node1": one["id"], "name1": one["name"], "node2": other["id"], "name2": other["name"]}


def denials(core: Core, network: str) -> list[Row]:
    """The pairs of nodes that must not know each other."""
    found = {node["id"]: node for node in nodes(core, network)}
    pairs = [(node, found[other]) for node in found.values() for other in node["deny"].split(",")[:-1]]
    return [_pair(one, other) for one, other in pairs if one["name"] < other["name"]]


def set_denied(core: Core, network: str, node1: str, node2: str, denied: bool) -> Row:
    """Whether two nodes must not know each other: neither configures the other then."""
    one, other = need_node(core, network, node1), need_node(core, network, node2)
    if one["id"] == other["id"]:
        raise Invalid("a pair is of two nodes")

    def build() -> Batch | None:
        if (other["id"] in need_node(core, network, one["id"])["deny"]) == denied:
            return None
        batch = NetworkBatch(one["network"], core.now)
        for node, far in ((one, other), (other, one)):
            mark = far["id"] + ","
            rest = {"deny": Expression("REPLACE(deny, ?, '') || ?", (mark, mark * denied)), "own_changed": batch.counter}
            batch.update("node", rest, LIVING, node["id"], must=True)
        batch.note = other["name"]
        return batch

    core.change(build, "acl deny" if denied else "acl allow", one["network"], one["name"])
    return _pair(one, other)


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


def _tables(source: sqlite3.Connection) -> set[str]:
    return {row[0] for row in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _make_new(source: sqlite3.Connection) -> None:
    """What was captured or revoked before a restore must be worth nothing after it, and every node must hear."""
    if "session" in _tables(source):  # whether one was revoked since, nobody knows any more
        source.execute("DELETE FROM session")
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
    path = settings.key_file
    if "server_key" in _tables(source):
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


def restore(settings: Settings, path: str, caller: Caller) -> Restored:
    """Take over a backup: a new incarnation, a new word for every network, no session and no API token."""
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
    core.by(caller).change(ListBatch, "server restore")
    now = core.store.select(Node.select().where(Node.state != REMOVED).order_by(Node.name))
    core.store.close()
    back = [node for node in now if had_nodes and node["id"] not in present]
    return Restored(len(now), back)


COUNTED = "state IN ('active', 'disabled', 'expired')"
CHECKS = {
    **{
        "%s of a %s without a lease" % (column, table): composed(
            "SELECT name, network FROM %s AS one WHERE %s AND %s != '' AND NOT EXISTS (SELECT 1 FROM lease"
            " WHERE lease.network = one.network AND address = %s AND lease.node = id)", table, living, column, column
        )
        for column in ("ip", "ip6")
        for table, living in (("node", COUNTED), ("client", "gateway IN (SELECT id FROM node WHERE ingress)"))
    },
    "client without its gateway": "SELECT name, network FROM client WHERE gateway NOT IN (SELECT id FROM node WHERE ingress)",
    "node relayed by none": "SELECT name, network FROM node WHERE via != '' AND via NOT IN (SELECT id FROM node WHERE relay)",
    "lease without a node": "SELECT address, network FROM lease WHERE node IS NOT NULL AND NOT EXISTS"
    " (SELECT 1 FROM node WHERE id = lease.node AND address IN (ip, ip6))"
    " AND NOT EXISTS (SELECT 1 FROM client WHERE id = lease.node AND address IN (ip, ip6))",
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
        "SELECT members, id FROM network WHERE members !="
        " (SELECT COUNT(*) FROM node WHERE network = network.id AND NOT host AND %s)",
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
