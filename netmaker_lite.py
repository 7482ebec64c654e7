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
    IMPORTS     the standard library, bottle, peewee, PyNaCl, and netmaker_core.py, which this stands on
    AGENTS      the agent protocol: join, exchange, look (docs/protocol.md)
    USERS       who may: users, sessions, API tokens, the first administrator, the audit log
    VIEWS       rows to JSON objects with the original's field names, text to values
    ROUTES      the table of routes, each with the role that it needs (docs/api.md)
    OPENAPI     the same table for machines
    SERVE       sockets, web servers, housekeeping
    CLI         the command line's ways into this process (its table is netmaker_admin.py)
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

import fcntl
import gc
import io
import ipaddress
import json
import logging
import re
import resource
import secrets
import signal
import socket
import socketserver
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    NoReturn,
    Sequence,
)
from urllib.parse import unquote_to_bytes

try:
    import bottle
    import nacl.secret
    import peewee
except ImportError as missing:
    sys.stderr.write(
        "netmaker-lite: the server needs %s, which is not installed here: "
        "pip install bottle peewee pynacl waitress (for a server elsewhere netmaker-admin needs none)\n" % missing.name
    )
    raise SystemExit(1) from None

import netclient_lite as agent
import netmaker_admin
from netclient_lite import (
    BadAnswer,
    Invalid,
    b64,
    check_address,
    check_host_name,
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
from netmaker_core import (
    ACTIVE,
    FILES_PATH,
    FLAGS,
    HOST_KEY,
    LEFT,
    LIVING,
    NO_AGENT,
    OWN_COLUMNS,
    PENDING,
    QUEUED,
    REMOVED,
    SCHEMA,
    SETTINGS,
    SILENT,
    SWITCHING,
    AccessKey,
    Audit,
    Batch,
    Busy,
    Caller,
    Clash,
    Client,
    Core,
    Denied,
    Joining,
    ListBatch,
    Member,
    Members,
    Mesh,
    Missing,
    Network,
    NetworkBatch,
    Node,
    Pattern,
    Report,
    Row,
    ServerError,
    Session,
    Settings,
    SlowDown,
    Standing,
    TooLarge,
    Unknown,
    User,
    Whole,
    access_keys,
    add_client,
    add_key,
    add_network,
    add_node,
    amend,
    approve,
    as_owner,
    backup,
    bind_address,
    blank,
    check,
    check_lifetime,
    check_range,
    client_files,
    clients,
    composed,
    create_egress,
    create_ingress,
    create_relay,
    default_address,
    delete_role,
    denials,
    differences,
    disable,
    dump,
    egress_ranges,
    enable,
    fingerprint,
    forget_node,
    give_up_key,
    hash_password,
    host_url,
    http_status,
    is_heard,
    is_password,
    join,
    join_command,
    log,
    make_folder,
    names,
    need_client,
    need_name,
    need_network,
    need_node,
    networks,
    new_bearer,
    next_refresh,
    next_relays,
    nobody,
    nodes,
    observed_endpoint,
    one_of,
    open_core,
    own_urls,
    pairs_of,
    picture_of,
    refresh_key,
    refresh_keys,
    refreshed,
    reject,
    remove_client,
    remove_key,
    remove_network,
    remove_node,
    renew_client,
    restore,
    server_urls,
    set_client,
    set_denied,
    set_name,
    set_network,
    set_node,
    set_relays,
    start_refresh,
    step_refresh,
    sweep,
    tell_nameserver,
    told,
    unused_name,
    write_host,
    write_names,
)

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


def _public6(text: str) -> str:
    address = check_address(text, 6)
    if not is_public(address):
        raise Invalid("%s is no public address" % address)
    return address


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
    "local6": ("local6", as_text(_public6, True)),
    "lan": ("lan", as_pattern("[0-9a-f]{0,16}")),
    "os": ("os", as_pattern(PRINTABLE)),
    "version": ("version", as_pattern(PRINTABLE)),
    "machine": ("machine", as_pattern("[A-Za-z0-9_-]{0,64}")),
    "hooks": ("hooks", as_pattern(PRINTABLE)),
    "mac": ("mac", as_pattern("([0-9a-f]{2}(:[0-9a-f]{2}){5})?")),
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


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Invalid("a member of the body is there twice")
    return found


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body; Invalid when it is none, or deeper and larger than anything that we ask for."""
    try:
        value = json.loads(body.decode() or "{}", parse_constant=_no_constant, object_pairs_hook=_once_each)
    except Invalid:
        raise
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
        words = "%s %s" % (rejected.get("word", "-").strip("-"), rejected.get("reason", ""))
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
        self._lock = threading.RLock()

    @staticmethod
    def _whose(who: str) -> str:
        """Whom it is counted for: an IPv6 host has a whole /64 to choose its address from."""
        try:
            return str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(who)) >> 64 << 64)) if ":" in who else who
        except ValueError:
            return who

    def count(self, who: str, now: float) -> float:
        failures, when = self.buckets.get(self._whose(who), (0.0, now))
        return max(0.0, failures - (now - when) * self.rate)

    def check(self, now: float, *whom: str) -> None:
        if any(self.count(who, now) >= self.size for who in whom):
            raise SlowDown("too many failures from here: wait a minute")

    def add(self, now: float, *whom: str) -> None:
        with self._lock:
            if len(self.buckets) > 10000:
                self.buckets = {who: at for who, at in self.buckets.items() if self.count(who, now)}
            for who in whom:
                self.buckets[self._whose(who)] = (self.count(who, now) + 1, now)

    def begin(self, now: float, *whom: str) -> None:
        """Count a try before it is made: of many at once no more may be made than one after the other."""
        with self._lock:
            self.check(now, *whom)
            self.add(now, *whom)

    def forgive(self, now: float, *whom: str) -> None:
        """It was no failure."""
        with self._lock:
            for who in whom:
                self.buckets[self._whose(who)] = (max(0.0, self.count(who, now) - 1), now)


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


HERE = "127.0.0.1"


class Sight:
    """What others may reach of an address that a request came from."""

    def __init__(self, settings: Settings) -> None:
        self.host = settings["SERVER_HOST"]
        self._known: dict[str, str] = {}
        self._warned = False

    def public(self, source: str) -> str:
        found = self._known.get(source)
        if found is None:
            if len(self._known) > 4096:
                self._known.clear()
            found = self._known[source] = self._public(source)
        return found

    def is_home(self, source: str) -> bool:
        """Whether a request may come from this host's own agent: not from the internet."""
        return not is_public(source) or self._own(source)

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
            places = sorted((check_address(str(each[4][0])) for each in found), key=lambda place: ":" in place)
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


BOTH_MUTE = (  # pairs of a network, or of one of its nodes
    "SELECT one.observer, one.node FROM observed AS one JOIN observed AS other ON other.network = one.network"
    " AND other.node = one.observer AND other.observer = one.node AND other.endpoint = ''"
    " WHERE one.network = ? AND one.endpoint = '' AND one.observer < one.node AND ? IN ('', one.observer, one.node)"
)


class Agents:
    """Everything that agents may ask for."""

    def __init__(self, core: Core, sight: Sight) -> None:
        self.core, self.sight = core, sight
        self.members = Members(core.store, core.store.meta("nameserver"), lambda: core.clock())
        self.members.group = core.key.group
        self.bell = Bell(core.settings["POLL_LIMIT"])
        self.failures = Failures(20, 20 / 60)
        self.interval = core.settings["CHECKIN_INTERVAL"]
        if core.settings["SERVER_BIND"] in ("0.0.0.0", "::", ""):  # noqa: S104 - heard inside of tunnels, too
            self.members.port = core.settings["API_PORT"]
        for network in networks(core):
            if network["hub"]:  # who comes through a tunnel is known by its address there
                self.members.mesh(network["id"])
        self.due: set[str] = set()  # nodes whose observed endpoint may move when its minute is over
        self._lock = threading.Lock()
        core.store.committed = self.bell.ring

    # ---- join

    def join(self, line: str, body: bytes, source: str) -> Reply:
        fields = line.split(" ")
        if len(fields) != 7 or fields[0] != agent.PROTOCOL or fields[3] not in ("s", "p"):
            raise Invalid("a join needs the header %s: see docs/protocol.md" % agent.HEADER)
        _, public, name, mode, incarnation, nonce, request_mac = fields
        source = self.members.underlay(source)
        now = self.core.clock()
        self.failures.check(now, source)
        if len(body) > MAX_UNPROVEN:
            raise TooLarge("a join has at most %d bytes" % MAX_UNPROVEN)
        keys = self._keys_of(public, name)
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

    def _keys_of(self, public: str, network: str) -> Callable[[str], bytes]:
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
        key_id = self._proven(network, given.get("proof"), proof_key, unb64_of(nonce, 16), source)
        values = take(given.get("facts", {}), FACTS, "facts")
        wishes = take(given.get("wishes", {}), WISHES, "wishes")
        values.update({column: value for column, value in wishes.items() if value != ""})
        if "key" not in values:
            raise Invalid("facts have no WireGuard key")
        values["name"] = values.get("name") or fold_name("node")
        seen = self.sight.public(HERE if key_id == HOST_KEY else source)
        who = Joining(network["id"], public, key_id, source, seen, values)
        node = join(self.core, who)
        member = self.members.reload(node["id"])
        if member is not None and not node["confirmed"]:
            member.epoch, member.sequence = 0, -1  # nothing can have been captured yet
        message = "" if node["state"] == ACTIVE else "an administrator has to approve this node"
        answer = {name: node[name] for name in ("state", "look", "name")}
        return {"node": node["id"], **answer, "message": message}

    def _proven(self, network: Row, proof: Any, proof_key: bytes, nonce: bytes, source: str) -> str:
        """The id of the access key that the joiner has shown to hold; "" for a manual sign-up."""
        if proof is None:
            return ""
        table = {"key": ("key", as_text(str)), "mac": ("mac", as_text(str))}
        claim = take(proof, table, "proof")
        now = self.core.clock()
        limited = "key " + str(claim.get("key"))
        if claim.get("key") == HOST_KEY:  # which everybody knows: strangers must not use its tries up
            limited += " " + source
        self.failures.check(now, limited)
        condition = (AccessKey.id == claim.get("key")) & (AccessKey.network == network["id"])
        key = self.core.store.get(AccessKey.select().where(condition))
        known = key is not None
        secret = self.core.key.unseal(key["id"], key["secret"]) if key else b"\0"
        if claim.get("key") == HOST_KEY and network["hosted"] and self.sight.is_home(source):
            known, secret = True, self.core.key.host_secret(network["id"])
        expected = agent.key_proof(secret, proof_key, nonce)
        if not known or not secrets.compare_digest(expected.encode(), str(claim.get("mac")).encode()):
            self.failures.add(now, limited)
            raise Denied("the network %s has no such access key: ask for another" % network["id"])
        return str(claim["key"])

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
        self._derive(member)
        if not is_signed(member.request_key, EXCHANGE, signed, body, request_mac):
            raise Denied("the signature is wrong: the request was altered, or is another node's")
        if not self.members.prove(member.mesh):
            return self._unknown(who, request, body, source)
        source = self.members.underlay(source)
        member = self.members.nodes.get(node, member)
        self._derive(member)  # a network that was read anew has them no more
        box = partial(nacl.secret.SecretBox, member.seal_key) if mode == "s" else None
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

    def _derive(self, member: Member) -> None:
        """A node's keys, at its first exchange with this process."""
        if not member.request_key:
            keys = self._keys_of(member.row.auth, member.row.network)
            member.answer_key, member.seal_key = keys("answer mac"), keys("seal")
            member.request_key = keys("request mac")  # last: it says that all are there

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
        keys = self._keys_of(public, network)
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
            by_itself = self.core.by(Caller("node", signer.source))
            remove_node(by_itself, {"id": row.id, "network": row.network, "name": row.name}, LEFT)
            self.members.prove(member.mesh)
            return self._farewell(member, told, signer)
        place = HERE if row.host else signer.source
        public = row.public if row.public == place else self.sight.public(place)
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
        reports: dict[str, str | None] = dict.fromkeys((*told.seen, *told.mute))  # mute no more, and seen: both are told at once
        reports.update({node: "" for node, mute in told.mute.items() if mute})
        reports.update({node: place for node, place in told.seen.items() if place})
        roamed = self._roamed(member, told.seen) if row.host and member.mesh.state.hub else {}

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
            for node_id, address in roamed.items():
                batch.update("node", {"source": address, "public": address}, LIVING, node_id)
            return batch

        core.store.change(build)
        for node_id in (row.id, *roamed):
            self.members.reload(node_id)
        self.members.prove(member.mesh)
        concerned = set(told.seen)
        if source != row.source:
            concerned.add(row.id)
        self.settle(member.mesh, concerned)
        if told.mute or (told.seen and row.id in member.mesh.relayed):
            self.relay(member.mesh, row.id)

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
        if other is None or other is member or other.row.state != ACTIVE:
            return False
        return bool(not member.mesh.state.hub or member.row.host or other.row.host)

    @staticmethod
    def _roamed(hub: Member, seen: Mapping[str, str | None]) -> dict[str, str]:
        """Public addresses that nodes have moved to, as the hub of their tunnels sees: their requests no longer tell."""
        found = {}
        for node, place in seen.items():
            other = hub.mesh.members.get(node)
            address = split_endpoint(place)[0] if place else ""
            if other is None or not other.row.public or not address or not is_public(address):
                continue
            if address != other.row.source and (":" in address) == (":" in other.row.source):
                found[node] = address
        return found

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

    # ---- relays

    def relay(self, mesh: Mesh, node: str = "") -> None:
        """Have pairs (those of a node, or all) without a handshake go through a relay, and direct again when they have one."""
        members, store, network = mesh.members, self.core.store, mesh.state.id
        pairs = {*store.rows(BOTH_MUTE, (network, node))}
        held = {}
        for one in list(mesh.relayed):
            held.update({(min(one, other), max(one, other)): way[0] for other, way in pairs_of(members[one].row.relayed).items()})
        more = {pair for pair in held if not node or node in pair}
        while not more <= pairs:
            pairs |= more
            ends = {end for pair in pairs for end in pair}
            more = {pair for pair, relay in held.items() if relay in ends}
        if not pairs:
            return
        ends = {end for pair in pairs for end in pair}
        relays = {each for each, member in list(members.items()) if member.row.relay or member.row.host}
        nodes = {each: self._standing(mesh, each) for each in {*ends, *relays, *mesh.relayed} if self._is_active(mesh, each)}
        asked = {*pairs, *(pair[::-1] for pair in pairs), *product(ends, relays), *product(relays, ends)}
        sql = "SELECT endpoint FROM observed WHERE network = ? AND observer = ? AND node = ?"
        told = {pair: store.row(sql, (network, *pair)) for pair in asked}
        alive = {pair for pair, found in told.items() if found and found[0]}
        mute = {pair for pair, found in told.items() if found and not found[0]}
        now, interval = self.core.clock(), mesh.state.interval or self.interval
        quick = all(now - members[end].parked <= 2 * interval for end in ends & nodes.keys())
        changes = next_relays(pairs, nodes, alive, mute, int(now), 5 if quick else interval + 5)
        if changes:
            set_relays(self.core, network, changes)
            self.members.prove(mesh)

    @staticmethod
    def _is_active(mesh: Mesh, node: str) -> bool:
        return node in mesh.members and mesh.members[node].row.state == ACTIVE

    def _standing(self, mesh: Mesh, node: str) -> Standing:
        member, now = mesh.members[node], self.core.clock()
        row, interval = member.row, mesh.state.interval or self.interval
        # a server that starts knows of nobody's silence
        here = now - max(member.seen, member.parked, self.core.started) <= 2 * interval
        ready = member.have < 0 or member.have >= row.own_changed  # not known: since before this server started
        bound = mesh.state.hub or mesh.state.is_local or self._is_active(mesh, row.via)
        apart = frozenset(row.deny.split(",")[:-1])
        return Standing(here, bool((row.relay or row.host) and row.forwarding), apart, pairs_of(row.relayed), ready, bound)

    def relay_due(self) -> None:
        """What time, other processes and an administrator have made of relays."""
        sql = "SELECT network FROM observed WHERE endpoint = '' UNION SELECT network FROM node WHERE relayed != ''"
        for (network,) in self.core.store.rows(sql):
            mesh = self.members.mesh(network)
            if mesh is not None:
                self.relay(mesh)

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
        if member.row.state == REMOVED or member.row.source != self.members.underlay(source):
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
        self.members.forget_removed()


# --------------------------------------------------------------------------------------------------
# USERS
# --------------------------------------------------------------------------------------------------
# Who may. A bearer token is 256 random bits of which the database has the fingerprint; what its owner
# may do is read anew for each request, so a change of rights holds from the next one on.

SESSION = 12 * 3600
check_user = Pattern("[a-z0-9][a-z0-9.@_+-]{2,39}", "no user name: 3 to 40 letters, digits, '.', '@', '_', '+' or '-'")
check_token_name = Pattern("[A-Za-z0-9._-]{1,40}", "no name for a token: 1 to 40 letters, digits, '.', '_' or '-'")


def fold_user(text: str) -> str:
    folded = text.lower()
    if folded in ("adm", "networks"):
        raise Invalid("%s is a word of the API's paths: take another name" % folded)
    return check_user(folded)


def check_password(text: str) -> str:
    if not 8 <= len(text) <= 128:
        raise Invalid("takes 8 to 128 characters")
    return text


def users(core: Core) -> list[Row]:
    return core.store.select(User.select().order_by(User.name))


def need_user(core: Core, name: str) -> Row:
    found = core.store.get(User.select().where(User.name == name.lower()))
    if found is None:
        raise Missing("there is no user %s: `netmaker-lite user list` shows which there are" % name)
    return found


def has_admin(core: Core) -> bool:
    return core.store.row("SELECT 1 FROM account WHERE admin = ?", (True,)) is not None


def _check_own_networks(core: Core, batch: Batch, names: str) -> None:
    for name in filter(None, names.split(",")):
        need_network(core, name)
        batch.when("EXISTS (SELECT 1 FROM network WHERE id = ?)", name)


def _new_user(core: Core, batch: Batch, values: Row) -> None:
    if "password" not in values:
        raise Invalid("password is missing")
    row = {**blank(User), **values, "created": core.now, "modified": core.now}
    batch.when("NOT EXISTS (SELECT 1 FROM account WHERE name = ?)", values["name"])
    batch.insert("account", row)
    batch.note = told({name: value for name, value in values.items() if name in ("admin", "networks")})


def _with_hash(values: Row) -> Row:
    """A password as the database keeps it; hashed once, before the change is tried."""
    return {**values, "password": hash_password(values["password"])} if "password" in values else values


def add_user(core: Core, values: Row) -> Row:
    new = _with_hash(values)

    def build() -> Batch:
        if core.store.row("SELECT 1 FROM account WHERE name = ?", (new["name"],)):
            raise Clash("there is a user %s already" % new["name"])
        batch = ListBatch("users")
        _check_own_networks(core, batch, new.get("networks", ""))
        _new_user(core, batch, new)
        return batch

    core.change(build, "user add", "", new["name"])
    return need_user(core, new["name"])


def new_setup_code(core: Core) -> str:
    """What proves that the first administrator has this machine's console; "" when there is one already."""
    if has_admin(core):
        return ""
    code = "-".join(secrets.token_hex(2) for _ in range(5))
    core.store.set_meta("setup", fingerprint(code))
    return code


def add_first_admin(core: Core, values: Row, at_home: bool, code: str) -> Row:
    """The first administrator, exactly once: from this machine, or with the setup code."""
    if has_admin(core):
        raise Clash("there is an administrator already: sign in, or make another by `netmaker-lite user add NAME --admin`")
    known = core.store.meta("setup")
    right = bool(known) and secrets.compare_digest(known, fingerprint(code.strip().lower()))
    if not at_home and not right:
        raise Denied(
            "the first administrator is made with the setup code that `netmaker-lite serve` prints, from the server's own host, "
            "or by `netmaker-lite user add NAME --admin` there"
        )
    new = _with_hash({**values, "admin": True})

    def build() -> Batch:
        if has_admin(core):
            raise Clash("there is an administrator already: sign in")
        batch = ListBatch("users")
        batch.when("NOT EXISTS (SELECT 1 FROM account WHERE admin = ?)", True)
        batch.update("meta", {"value": ""}, "key = 'setup'")
        _new_user(core, batch, new)
        return batch

    core.change(build, "user add", "", new["name"])
    return need_user(core, new["name"])


def _keep_an_admin(core: Core, batch: Batch, name: str) -> None:
    """Not the last one: an administrator besides, or this is none."""
    admin = "EXISTS (SELECT 1 FROM account WHERE admin = ? AND name %s ?)"
    safe, bound = composed("(%s OR NOT %s)", composed(admin, "!="), composed(admin, "=")), (True, name) * 2
    if core.store.row(composed("SELECT 1 WHERE %s", safe), bound) is None:
        raise Clash("%s is the only administrator: make another first" % name)
    batch.when(safe, *bound)


def set_user(core: Core, name: str, values: Row) -> Row:
    """Change password, rights or networks; a new password ends the sessions, not the API tokens."""
    new = _with_hash(values)

    def build() -> Batch | None:
        old = need_user(core, name)
        changed = differences(old, new)
        if not changed:
            return None
        batch = ListBatch("users")
        if not new.get("admin", True):
            _keep_an_admin(core, batch, old["name"])
        _check_own_networks(core, batch, changed.get("networks", ""))
        batch.update("account", {**changed, "modified": core.now}, "name = ?", old["name"], must=True)
        if "password" in changed:
            batch.delete("session", "owner = ? AND name = ''", old["name"])
        batch.note = told({**changed, "password": "(new)"} if "password" in changed else changed)
        return batch

    core.change(build, "user set", "", name.lower())
    return need_user(core, name)


def remove_user(core: Core, name: str) -> Row:
    user = need_user(core, name)

    def build() -> Batch:
        batch = ListBatch("users")
        _keep_an_admin(core, batch, user["name"])
        batch.delete("account", "name = ?", user["name"])
        batch.delete("session", "owner = ?", user["name"])
        return batch

    core.change(build, "user remove", "", user["name"])
    return user


# ---- sessions and API tokens


def _open_session(core: Core, owner: str, values: Row, action: str) -> Row:
    bearer = new_bearer("t" if values.get("name") else "s")
    if not values.get("name"):  # user interfaces look there for the end, as in a JWT; nobody believes it
        bearer += "." + b64(dump({"UserName": owner, "exp": values["expires"]}))
    row = {**blank(Session), **values, "id": fingerprint(bearer), "owner": owner, "created": core.now}

    def build() -> Batch:
        if row["name"] and core.store.row("SELECT 1 FROM session WHERE owner = ? AND name = ?", (owner, row["name"])):
            raise Clash("%s has a token %s already: take another name" % (owner, row["name"]))
        batch = ListBatch("users")
        batch.when("EXISTS (SELECT 1 FROM account WHERE name = ?)", owner)
        batch.when("NOT EXISTS (SELECT 1 FROM session WHERE owner = ? AND name = ? AND name != '')", owner, row["name"])
        batch.delete("session", "expires <= ?", core.now)
        batch.insert("session", row)
        batch.note = told({name: row[name] for name in ("write", "networks") if row["name"]})
        return batch

    core.change(build, action, "", row["name"] or owner)
    return {**row, "value": bearer}


def sign_in(core: Core, name: str, password: str) -> Row:
    """A session. An unknown name takes as long as a wrong password."""
    user = core.store.get(User.select().where(User.name == name.lower()))
    if not is_password(user["password"] if user else nobody(), password) or user is None:
        raise Unknown("wrong user name or password")
    signed = core.by(core.caller._replace(name=user["name"]))
    return _open_session(signed, user["name"], {"expires": core.now + SESSION}, "sign in")


def sign_out(core: Core) -> None:
    def build() -> Batch:
        batch = ListBatch("users")
        batch.delete("session", "id = ? AND name = ''", core.caller.session)
        return batch

    core.change(build, "sign out", "", core.caller.name)


def api_tokens(core: Core, owner: str) -> list[Row]:
    name = need_user(core, owner)["name"]
    mine = (Session.owner == name) & (Session.name != "")
    return core.store.select(Session.select().where(mine).order_by(Session.name))


def add_api_token(core: Core, owner: str, values: Row) -> Row:
    """An API token; `value` is in the answer this one time."""
    if "name" not in values:
        raise Invalid("name is missing: how is this token to be called?")
    for name in filter(None, values.get("networks", "").split(",")):
        if not core.caller.may(name):
            raise Missing("%s has no network %s" % (core.caller.name, name))
        need_network(core, name)
    return _open_session(core, need_user(core, owner)["name"], values, "token add")


def remove_api_token(core: Core, owner: str, name: str) -> None:
    user = need_user(core, owner)["name"]
    if name not in (each["name"] for each in api_tokens(core, user)):
        raise Missing("%s has no token %s" % (user, name))

    def build() -> Batch:
        batch = ListBatch("users")
        batch.delete("session", "owner = ? AND name = ?", user, name)
        return batch

    core.change(build, "token remove", "", name)


def caller_of(core: Core, bearer: str, source: str) -> Caller:
    """Whose bearer token it is; Unknown with a sentence when nobody's, or not any more."""
    master = core.settings["MASTER_KEY"]
    if master and secrets.compare_digest(master.encode(), bearer.encode()):
        return Caller("masterkey", source)
    session = fingerprint(bearer)
    sql = (
        "SELECT account.name, account.admin, account.networks, session.name, session.write, session.networks, session.expires"
        " FROM session JOIN account ON account.name = session.owner WHERE session.id = ?"
    )
    found = core.store.row(sql, (session,))
    if found is None:
        raise Unknown("this bearer token is not known: sign in, or ask for another")
    name, admin, own, token, may_write, fewer, expires = found
    if expires is not None and expires <= core.now:
        raise Unknown("the session is over: sign in again" if not token else "the API token has expired: make another")
    networks = None if admin else frozenset(filter(None, own.split(",")))
    if fewer:
        limit = frozenset(fewer.split(","))
        networks = limit if networks is None else networks & limit
    return Caller(name, source, networks, bool(may_write), session, token)


# ---- the audit log


class AuditLog:
    """Changes, the newest first; of somebody's own networks where the caller has not all. Only a slice's rows are read."""

    MOST = 1000  # without an end; the log is long, and a router's memory short

    def __init__(self, core: Core, network: str = "", since: int = 0) -> None:
        shown = [field for field in Audit._meta.sorted_fields if field is not Audit.id]
        found = Audit.select(*shown).where(Audit.time >= since).order_by(Audit.id.desc())
        if network:
            found = found.where(Audit.network == network.lower())
        if core.caller.networks is not None:
            found = found.where(Audit.network.in_(sorted(core.caller.networks)))
        self.store, self.found = core.store, found

    def __len__(self) -> int:
        return self.store.count(self.found)

    def __getitem__(self, part: slice) -> list[Row]:
        first = part.start or 0
        return self.store.select(self.found.offset(first).limit((part.stop or first + self.MOST) - first))


def forget_audit(core: Core) -> None:
    """Drop what is older than the log has to reach."""

    def build() -> Batch | None:
        oldest = core.now - core.settings["AUDIT_DAYS"] * 86400
        if core.store.row("SELECT 1 FROM audit WHERE time < ?", (oldest,)) is None:
            return None
        batch = ListBatch("users")
        batch.delete("audit", "time < ?", oldest)
        return batch

    core.store.change(build)


# --------------------------------------------------------------------------------------------------
# VIEWS
# --------------------------------------------------------------------------------------------------
# The border between rows and JSON: one table for each kind of object, with the original's field names.
# Booleans are "yes" and "no" only here (in users' and tokens' objects they are booleans, as the original has it).


class Field(NamedTuple):
    """A member of an object: its name, the column or function that it shows, how text becomes a value, what kind it is.

    `check` is None for what is not taken: it is ignored, since user interfaces send back whole objects.
    `source` is "" for what is not shown.
    """

    name: str
    source: str | Callable[[Row], Any] = ""
    check: Callable[[str], Any] | None = None
    kind: str = ""


TEXT: Row = {"type": "string"}
KINDS: dict[str, Row] = {  # what is not told by the check
    "": TEXT,
    "number": {"type": "integer"},
    "number or null": {"type": ["integer", "null"]},
    "flag": {"type": "string", "enum": ["yes", "no"]},
    "truth": {"type": "boolean"},
    "texts": {"type": "array", "items": TEXT},
    "object": {"type": "object"},
}


class Flag:
    """A check: yes or no."""

    def __init__(self, kind: str) -> None:
        self.schema = KINDS[kind]

    def __call__(self, text: str) -> bool:
        if text.lower() not in ("yes", "no", "on", "off", "true", "false"):
            raise Invalid("%.40r is neither yes nor no" % text)
        return text.lower() in ("yes", "on", "true")


YES_NO, TRUTH = Flag("flag"), Flag("truth")


class OrNothing:
    """The same check, where the empty text means the network's value, or none."""

    def __init__(self, check: Callable[[str], Any], nothing: Any = "") -> None:
        self.check, self.nothing, self.schema = check, nothing, getattr(check, "schema", TEXT)

    def __call__(self, text: str) -> Any:
        return self.check(text) if text else self.nothing


check_display = Pattern("[A-Za-z0-9_./;% ^#()!@$*-]{1,20}", "no display name: 1 to 20 letters, digits, blanks or -_./;%^#()!@$*")
check_mac = Pattern("([0-9a-f]{2}(:[0-9a-f]{2}){5})?", "no MAC address: six pairs of hex digits with colons between them")
check_hook = Pattern("[ -~]{0,1000}", "no line of at most 1000 plain characters")
check_interface = Pattern("[A-Za-z0-9][A-Za-z0-9._-]{0,14}", "no interface name: 1 to 15 letters, digits, '.', '_' or '-'")


def check_local_range(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as bad:
        raise Invalid("%.80r is no range: ADDRESS/BITS, like 192.168.1.0/24" % text) from bad


def check_addresses(text: str) -> str:
    return ", ".join(map(check_address, text.replace(",", " ").split()))


def check_static(text: str) -> str:
    """An endpoint set by hand: an address, or one with the port that others must use."""
    try:
        return check_address(text)
    except Invalid:
        return endpoint(*split_endpoint(text))


def check_until(text: str) -> int:
    """Unix time, or a time from now like 24h."""
    return unix_time(text) if text.isdigit() else int(time.time()) + check_lifetime(text)


def unix_time(text: str) -> int:
    """Unix time; a small number is a time from now whose unit was forgotten."""
    then = Whole(1, 1 << 40)(text)
    if then < 10**9:
        raise Invalid("%d has no unit: a number and s, m, h, d or w, like 24h, or unix time" % then)
    return then


def check_silence(text: str) -> int:
    """Seconds; 0, or at least an hour: a node that reboots is not gone."""
    seconds = 0 if text in ("", "0") else int(text) if re.fullmatch("[0-9]{1,12}", text) else check_lifetime(text)
    if seconds and not 3600 <= seconds <= 1 << 32:
        raise Invalid("%.40r is no time of an hour or more: 0 for never, or like 30d" % text)
    return seconds


def check_uses(text: str) -> int | None:
    """How many may join; None for any number."""
    if text == "unlimited":
        return None
    try:
        return Whole(1, 1 << 31)(text)
    except Invalid as bad:
        raise Invalid("takes a whole number from 1 on, or unlimited, not %.40r" % text) from bad


def check_names(text: str) -> str:
    """Networks, comma-separated."""
    return ",".join(sorted({check_network(name) for name in filter(None, text.replace(" ", "").split(","))}))


def range_check(version: int) -> OrNothing:
    return OrNothing(lambda text: check_range(text, version))


PORT, KEEPALIVE_SECONDS, MTU_BYTES = Whole(1024, 65535), Whole(0, 1000), Whole(576, 9200)
NETWORK_FIELDS = (
    Field("netid", "id", check_network),
    Field("displayname", "display", check_display),
    Field("addressrange", "range", range_check(4)),
    Field("addressrange6", "range6", range_check(6)),
    Field("isdualstack", lambda row: bool(row["range"] and row["range6"]), None, "flag"),
    Field("isipv4", lambda row: bool(row["range"]), None, "flag"),
    Field("isipv6", lambda row: bool(row["range6"]), None, "flag"),
    Field("islocal", "is_local", YES_NO),
    Field("localrange", "local_range", OrNothing(check_local_range)),
    Field("defaultinterface", "interface", check_interface),
    Field("defaultlistenport", "port", PORT),
    Field("defaultkeepalive", "keepalive", KEEPALIVE_SECONDS),
    Field("defaultmtu", "mtu", MTU_BYTES),
    Field("defaultudpholepunch", "punch", YES_NO),
    Field("nodelimit", "node_limit", Whole(0, 1 << 53)),
    Field("allowmanualsignup", "manual", YES_NO),
    Field("checkininterval", "interval", OrNothing(Whole(2, 100000), None)),
    Field("autoremove", "silent", check_silence, "number"),
    Field("nodes", "members", None, "number"),
    Field("revision", lambda row: "%d.%s" % (row["counter"], row["tag"])),
    Field("networklastmodified", "modified", None, "number"),
    Field("nodeslastmodified", "nodes_modified", None, "number"),
    Field("accesskeys", lambda row: [], None, "texts"),
    Field("keyupdatetimestamp", lambda row: 0, None, "number"),
    Field("defaultextclientdns", "client_dns", check_addresses),
    *(Field(name, lambda row: "") for name in ("defaultpostup", "defaultpostdown")),
    Field("defaultsaveconfig", lambda row: False, None, "flag"),
    Field("isgrpchub", "hub", YES_NO),
    Field("hosted", "hosted", YES_NO),
)


def shown_endpoint(row: Row) -> str:
    """The address at which others find a node, as far as the server knows."""
    return str(row["static"] or (split_endpoint(row["at"])[0] if row["at"] else row["public"]))


def leased(column: str) -> Callable[[Row], str]:
    """A pending node holds no address, only a wish."""
    return lambda row: "" if row["state"] == PENDING else str(row[column])


def node_status(row: Row) -> str:
    """How a node does: its state, or how long ago it was heard of, in its own check-ins (300 and 1800 s at 15 s)."""
    if row["state"] != ACTIVE:
        return str(row["state"])
    if row["auth"].startswith(NO_AGENT):
        return "unmanaged"
    silent = (time.time() - row["last_seen"]) / row["interval"]
    return "healthy" if silent < 20 else "warning" if silent < 120 else "error"


NODE_FIELDS = (
    Field("id", "id"),
    Field("macaddress", lambda row: row["mac"] or row["id"], lambda text: check_mac(text.lower())),
    Field("name", "name", check_name),
    Field("network", "network"),
    Field("address", leased("ip"), lambda text: check_address(text, 4)),
    Field("address6", leased("ip6"), lambda text: check_address(text, 6)),
    Field("allowedips", lambda row: row["ips"].split(",") if row["ips"] else [], str, "texts"),
    Field("publickey", "key"),
    Field("endpoint", shown_endpoint, OrNothing(check_static)),
    Field("listenport", "port", PORT),
    Field("localaddress", "local"),
    Field("localaddress6", "local6"),
    Field("isstatic", lambda row: bool(row["static"] or row["fixed"]), YES_NO),
    Field("isstaticendpoint", lambda row: bool(row["static"]), YES_NO),
    Field("isstaticport", "fixed", YES_NO),
    Field("persistentkeepalive", "keepalive", OrNothing(KEEPALIVE_SECONDS, None)),
    Field("mtu", "mtu", OrNothing(MTU_BYTES, None)),
    Field("interface", "interface"),
    Field("dnson", "dns", YES_NO),
    Field("roaming", "roaming", YES_NO),
    Field("ipforwarding", "forwarding", YES_NO),
    Field("udpholepunch", "punch", YES_NO),
    Field("islocal", "is_local", YES_NO),
    Field("isdualstack", lambda row: bool(row["ip"] and row["ip6"]), None, "flag"),
    Field(
        "expdatetime",
        lambda row: row["expires"] or 0,
        lambda text: check_until(text) if text not in ("", "0") else None,
        "number",
    ),
    Field("ispending", lambda row: row["state"] == PENDING, None, "flag"),
    Field("status", node_status),
    Field("lastcheckin", "last_seen", None, "number"),
    Field("lastmodified", "modified", None, "number"),
    Field("checkininterval", "interval", None, "number"),
    Field("os", "os"),
    Field("version", "version"),
    Field("observedendpoint", "at"),
    Field("rejected", "rejected"),
    Field("isegressgateway", lambda row: bool(row["egress"]), None, "flag"),
    Field("egressgatewayranges", lambda row: egress_ranges(row["egress"]), None, "texts"),
    Field("egressgatewayinterface", lambda row: json.loads(row["egress"])["interface"] if row["egress"] else ""),
    Field("egressgatewaynat", lambda row: row["egress"] != "" and json.loads(row["egress"])["nat"], None, "flag"),
    Field("isingressgateway", "ingress"),
    Field("ingressgatewayrange", lambda row: row["ranges"] if row["ingress"] else ""),
    Field("isrelay", "relay"),
    Field("isrelayed", lambda row: bool(row["via"]), None, "flag"),
    Field("relayaddrs", lambda row: row.get("relayaddrs", []), None, "texts"),
    *(Field(name, name, check_hook) for name in ("postup", "postdown")),
    Field("hooks", lambda row: row["hooks"] or ("not accepted" if row["postup"] or row["postdown"] else "")),
    *(Field(name, "", None, "object") for name in ("seenby", "relayed")),  # of one node only
    Field("isserver", "host", None, "flag"),
    Field("saveconfig", lambda row: False, None, "flag"),
    Field("pullchanges", lambda row: False, None, "flag"),
    Field("action", lambda row: "noop"),
    *(Field(name, lambda row: "") for name in ("password", "accesskey", "localrange")),
    Field("keyrefresh", "refresh"),
    Field("keyupdatetimestamp", "refresh_at", None, "number"),
    Field("lastpeerupdate", lambda row: 0, None, "number"),
)
NEW_NODE = tuple(Field("publickey", "key", check_key) if field.name == "publickey" else field for field in NODE_FIELDS)
NEW_NETWORK = tuple(field._replace(check=YES_NO) if field.name == "isdualstack" else field for field in NETWORK_FIELDS)
KEY_FIELDS = (
    Field("name", "name", Pattern("[A-Za-z0-9._-]{0,20}", "no name for a key: 1 to 20 letters, digits, '.', '_' or '-'")),
    Field("network", "network"),
    Field("uses", lambda row: row["uses"], check_uses, "number or null"),
    Field("expiration", lambda row: row["expires"], OrNothing(check_until, None), "number or null"),
    Field("created", "created", None, "number"),
    *(Field(name, lambda row, name=name: row.get(name, "")) for name in ("value", "accessstring", "join", "install")),  # type: ignore[misc]
)
USER_FIELDS = (
    Field("username", "name", fold_user),
    Field("password", "", check_password),
    Field("networks", lambda row: row["networks"].split(",") if row["networks"] else [], check_names, "texts"),
    Field("isadmin", "admin", TRUTH, "truth"),
)
OWN_USER_FIELDS = tuple(field if field.name == "password" else field._replace(check=None) for field in USER_FIELDS)
SIGN_IN = (Field("username", "", str), Field("password", "", str), Field("setupcode", "", str))
FIRST_ADMIN = (*USER_FIELDS[:2], SIGN_IN[2], *(field._replace(check=None) for field in USER_FIELDS[2:]))
TOKEN_FIELDS = (
    Field("name", "name", check_token_name),
    Field("scope", lambda row: "write" if row["write"] else "read", one_of("read", "write")),
    Field("networks", lambda row: row["networks"].split(",") if row["networks"] else [], check_names, "texts"),
    Field("expires", "expires", OrNothing(check_until, None), "number or null"),
    Field("created", "created", None, "number"),
    Field("value", lambda row: row.get("value", "")),
)
CLIENT_FIELDS = (
    Field("clientid", "name", check_name),
    Field("network", "network"),
    Field("publickey", "key", check_key),
    Field("address", "ip"),
    Field("address6", "ip6"),
    Field("ingressgatewayid", "gateway"),
    Field("ingressgatewayendpoint", "endpoint"),
    Field("dns", "resolver", check_addresses),
    Field("internet", "internet", YES_NO),
    Field("enabled", "enabled", YES_NO),
    Field("outdated", "outdated", None, "flag"),
    Field("created", "created", None, "number"),
    Field("lastmodified", "modified", None, "number"),
    Field("privatekey", lambda row: row.get("privatekey", "")),
    Field("config", lambda row: row.get("config", "")),
    Field("description", lambda row: ""),
)
CLIENT_CHANGES = tuple(field._replace(check=None) if field.name == "publickey" else field for field in CLIENT_FIELDS)
DNS_FIELDS = (
    Field("name", "name", check_host_name),
    Field("address", "ip", OrNothing(check_address)),
    Field("address6", "ip6", OrNothing(lambda text: check_address(text, 6))),
    Field("network", "network"),
)
DENIAL_FIELDS = (Field("node1", "node1", str), Field("name1", "name1"), Field("node2", "node2", str), Field("name2", "name2"))
GATEWAY_TAKES = (
    *(Field(name, "", str) for name in ("ranges", "rangestring", "interface")),
    *(
        Field("postup", "", check_hook),
        Field("postdown", "", check_hook),
        Field("nat", "", YES_NO),
        Field("nodeid"),
        Field("netid"),
    ),
)
RELAY_TAKES = (Field("relayaddrs", "", str, "texts"), *GATEWAY_TAKES[-2:])
AUDIT_FIELDS = tuple(
    Field(name, name, None, "number" if name == "time" else "")
    for name in ("time", "who", "source", "network", "action", "target", "detail")
)
KEY_TAKES = (
    *(KEY_FIELDS[0], KEY_FIELDS[2], KEY_FIELDS[3], Field("expires", "", OrNothing(check_until, None))),
    *map(Field, ("value", "accessstring")),
)
NEW_NODE_COLUMNS = ("name", "mac", "key", "ip", "ip6", "ips", "static", "port", "keepalive", "mtu", "expires")
BOOLEANS = frozenset(
    column
    for model in (Network, Node, Client)
    for column, field in model._meta.fields.items()
    if isinstance(field, peewee.BooleanField)
)


def view(row: Row, fields: Sequence[Field]) -> Row:
    """A row as JSON shows it."""
    shown = {}
    for field in fields:
        if field.source == "":
            continue
        value = field.source(row) if callable(field.source) else row[field.source]
        if field.kind == "truth":
            value = bool(value)
        elif isinstance(value, bool) or field.source in BOOLEANS:
            value = "yes" if value else "no"
        shown[field.name] = value
    return shown


def view_network(row: Row, settings: Settings) -> Row:
    return view({**row, "interval": row["interval"] or settings["CHECKIN_INTERVAL"]}, NETWORK_FIELDS)


def view_node(row: Row, network: Row, settings: Settings) -> Row:
    """A node; what it has no value of its own for is the network's."""
    inherited = {name: network[name] for name in ("keepalive", "mtu") if row[name] is None}
    rest = {"interface": network["interface"], "interval": network["interval"] or settings["CHECKIN_INTERVAL"]}
    rest["ranges"] = network["range"] or network["range6"]
    return view({**row, **inherited, **rest}, NODE_FIELDS)


def view_key(row: Row) -> Row:
    """An access key; the secret parts are in the row only when it was just made."""
    return view({**row, "join": join_command(row["accessstring"])} if "accessstring" in row else row, KEY_FIELDS)


def as_words(value: Any) -> str:
    """A member of a body as the text that checks read: numbers, booleans and lists of texts may come as what they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ",".join(value)
    if isinstance(value, str) and not re.search("[\ud800-\udfff\0]", value) and len(value) <= 4096:
        return value
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53):
        return str(int(value))
    raise Invalid("takes a text, a number or a list of texts of at most 4096 characters, not %.40r" % (value,))


def parse_fields(
    given: Mapping[str, Any],
    fields: Sequence[Field],
    shown: Mapping[str, Any] = MappingProxyType({}),
    left_out: Sequence[Any] = ("", 0),
) -> Row:
    """{field name: value} of the members of a body.

    User interfaces send back whole objects: null, what is read-only, and what says the same as is `shown` is
    not taken for a change, nor is "" or 0 where that is no value: Go writes so what was `left_out`. What the table
    does not know is refused by name.
    """
    known = {field.name: field for field in fields}
    found = {}
    for member, value in given.items():
        name = member.lower()
        field = known.get(name)
        if field is None:
            names = ", ".join(sorted(each.name for each in fields if each.check))
            raise Invalid("there is no field %.40r here: there is %s" % (member, names))
        if name in found:
            raise Invalid("%s is there twice" % name)
        if field.check is None or value is None or (name in shown and shown[name] == value):
            continue
        try:
            text = as_words(value)
            if name not in shown or as_words(shown[name]) != text:
                found[name] = field.check(text)
        except Invalid as bad:
            if value not in left_out:
                raise Invalid("%s%s%s" % (name, " " if str(bad).startswith("takes ") else ": ", bad)) from bad
    return found


def columns(values: Row, fields: Sequence[Field], others: Mapping[str, str] = MappingProxyType({})) -> Row:
    """Columns from fields; `others`: of fields that show more than a column."""
    sources = {field.name: field.source for field in fields}
    found = {}
    for name, value in values.items():
        source = sources[name]
        found[others.get(name) or (source if isinstance(source, str) and source else name)] = value
    return found


NODE_COLUMNS = {
    "macaddress": "mac",
    "address": "ip",
    "address6": "ip6",
    "allowedips": "ips",
    "endpoint": "static",
    "expdatetime": "expires",
}


def node_columns(values: Row, node: Row, insisted: bool = False) -> Row:
    """Columns of a node from fields of its view. Endpoint and port are taken where they are, or become, static.

    `insisted`: isstatic was said again, so a changed endpoint or port is meant.
    """
    given = dict(values)
    both = given.pop("isstatic", None)
    fixed = given.pop("isstaticport", both)
    static = given.pop("isstaticendpoint", both)
    found = columns(given, NODE_FIELDS, NODE_COLUMNS)
    if not (node["fixed"] or insisted if fixed is None else fixed):
        found.pop("port", None)
    if not (node["static"] or insisted if static is None else static):
        found.pop("static", None)
    if static is False:
        found["static"] = ""
    elif static:
        found.setdefault("static", node["static"] or node["public"])
    if fixed is not None or "port" in found:
        found["fixed"] = fixed is not False
    return found


# --------------------------------------------------------------------------------------------------
# ROUTES
# --------------------------------------------------------------------------------------------------
# Roles: "anyone"; "agent" proves itself by the line of its request; the others have a bearer token:
# "user" any, "network" one that has the network of the path, "self" the user of the path's, "admin".

CALLER = "netmaker.caller"  # in the WSGI environment: who calls in this process; no header can be called that
PER_PAGE = 1000
CROSS_ORIGIN = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Requested-With, Access-Control-Allow-Origin",
    "Access-Control-Expose-Headers": "X-Total-Count",
    "Access-Control-Max-Age": "600",
    "Vary": "Origin",
}


class Message(NamedTuple):
    """An answer in the original's envelope."""

    sentence: str
    response: Any = None


class Route(NamedTuple):
    """One route: method, path, who may, what answers, the fields of its body, the kind of its answer, what a stranger hears.

    `gives` is the name of an object of SCHEMAS, "[name]" for a list of them, or "" where the handler writes the answer itself.
    """

    method: str
    path: str
    role: str
    handler: Callable[..., Any]
    takes: Sequence[Field] = ()
    gives: str = ""
    refusal: str = ""


class Web:
    """The border to HTTP: where a request comes from, who sends it, its body, the answer's form."""

    def __init__(self, agents: Agents) -> None:
        self.agents, self.core = agents, agents.core
        self.trusted = agents.core.settings["TRUSTED_PROXIES"]
        self.origins = agents.core.settings["CORS_ALLOWED_ORIGIN"].replace(",", " ").split()
        self.sources, self.names = Failures(10, 1 / 30), Failures(60, 1 / 10)  # of signing in
        self.openapi: Callable[[], Row] = dict
        self._sources: dict[str, str] = {}

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
    def body(limit: int) -> bytes:
        environ = bottle.request.environ
        length = environ.get("CONTENT_LENGTH") or ("" if "HTTP_TRANSFER_ENCODING" in environ else "0")
        if not length:  # waitress has it even of chunks
            raise Invalid("the body has no Content-Length, which is needed here")
        if not length.isdecimal() or int(length) > limit:
            raise TooLarge("the body is larger than %d bytes" % limit)
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

    def caller(self, route: Route, path: Mapping[str, str]) -> Caller:
        """Who asks; a sentence where the route's role is not his."""
        if route.role == "nobody":
            raise Denied(route.refusal)
        environ = bottle.request.environ
        found: Caller | None = environ.get(CALLER)
        kind, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if found is None and route.role != "anyone":
            if kind.lower() != "bearer" or not bearer.strip():
                raise Denied(route.refusal) if route.refusal else Unknown("this needs a bearer token: sign in")
            found = caller_of(self.core, bearer.strip(), self.source())
        if found is None:
            return Caller("nobody", self.source(), frozenset(), False)
        if not found.may_write and route.method != "GET":
            raise Denied("this API token may only read: take one of scope write")
        own = found.networks is None
        if route.role == "network":
            own = found.may(path["n"])
        elif route.role == "self":  # not by an API token: one with fewer rights could make one with more
            own = own or (found.name == path["u"].lower() and not found.token)
        elif route.role == "user":
            own = True
        if not own and route.role != "anyone":
            raise Denied("%s may not do this: an administrator can" % found.name)
        return found

    @contextmanager
    def a_try(self, core: Core, name: str = "") -> Iterator[None]:
        """Something that can be guessed: only wrong guesses count, for who makes them and for the name."""
        now, wrong = core.clock(), False
        counted = [(self.sources, core.caller.source), *([(self.names, name)] if name else [])]
        for failures, who in counted:
            failures.begin(now, who)
        try:
            yield
        except (Denied, Unknown):
            wrong = True
            raise
        finally:
            if not wrong:
                for failures, who in counted:
                    failures.forgive(now, who)

    def fields(self, route: Route) -> Row:
        """The members of a body."""
        if not route.takes:
            return {}
        body = self.body(MAX_BODY if route.role != "anyone" else MAX_UNPROVEN)
        return read_json(body)

    def handler(self, route: Route) -> Callable[..., Any]:
        """What a route's requests are answered by."""
        if route.role == "agent" or (route.role == ANY and not route.gives):
            return partial(route.handler, self)
        return lambda **path: self.answer(route, path)

    def answer(self, route: Route, path: Mapping[str, str]) -> Any:
        """Admit, parse, act, show."""
        core = self.core.by(self.caller(route, path))
        body = self.fields(route)
        query = {name: bottle.request.query.getunicode(name) for name in bottle.request.query}
        if None in query.values():
            raise Invalid("the query is not UTF-8")
        found = route.handler(Call(self, core, path, body, query))
        if isinstance(found, Message):
            found = {"Code": 200, "Message": found.sentence, "Response": found.response}
        if not route.gives:
            return found
        if route.gives.startswith("["):
            found = self.page(found, query)
        return self.send(Reply(200, dump(found)), "application/json")

    @staticmethod
    def page(rows: list[Any] | AuditLog, query: Mapping[str, str]) -> list[Any]:
        """The rows that are asked for; all, or the most that one answer has, without ?page= or ?per_page=."""
        bottle.response.set_header("X-Total-Count", str(len(rows)))
        if "page" not in query and "per_page" not in query:
            return rows[:]
        try:
            name = "per_page"
            size = Whole(1, PER_PAGE)(query.get(name, "100"))
            name = "page"
            page = Whole(1, 1 << 31)(query.get(name, "1"))
        except Invalid as bad:
            raise Invalid("%s %s" % (name, bad)) from bad
        return rows[(page - 1) * size : page * size]

    def at_home(self) -> bool:
        """Whether a request comes from this very host, not through a proxy on it nor from a foreign page in its browser."""
        environ = bottle.request.environ
        through = any(name.startswith(("HTTP_FORWARDED", "HTTP_X_", "HTTP_VIA")) for name in environ)
        through |= environ.get("SERVER_PROTOCOL") == "HTTP/1.0"  # as nginx speaks that was told nothing else, under our own name
        peer, host = self._canonical(environ.get("REMOTE_ADDR", "")), environ.get("HTTP_HOST", "")
        foreign = environ.get("HTTP_ORIGIN", "http://" + host).partition("://")[2] != host
        name = re.sub(r":\d+$", "", host).strip("[]")
        return not through and not foreign and is_loopback(peer) and (name == "localhost" or is_loopback(name))

    def cross_origin(self) -> dict[str, str]:
        """What a browser wants to hear before a page from elsewhere may call this."""
        origin = bottle.request.get_header("Origin", "")
        if not origin or not {"*", origin}.intersection(self.origins):
            return {}
        return {**CROSS_ORIGIN, "Access-Control-Allow-Origin": "*" if "*" in self.origins else origin}

    def preflight(self) -> None:
        if bottle.request.method == "OPTIONS":
            raise bottle.HTTPResponse(status=204, headers=self.cross_origin())

    # ---- the agents' half, files, and what anybody may ask

    def health(self) -> bytes:
        self.agents.core.store.meta("schema")
        return self.send(Reply(200, dump({"status": "ok", "version": __version__})), "application/json")

    def getip(self) -> bytes:
        return self.send(Reply(200, self.source().encode()), "text/plain")

    def agent_file(self) -> bytes:
        return self.file("netclient_lite.py", "text/x-python")

    def look_file(self) -> bytes:
        return self.file("netclient-look", "text/x-shellscript")

    def install_file(self) -> bytes:
        return self.file("install.sh", "text/x-shellscript")

    def file(self, name: str, kind: str) -> bytes:
        body = client_files().get(name)
        if body is None:
            raise Missing("this server was installed without %s" % name)
        return self.send(Reply(200, body), kind)

    def hello(self) -> bytes:
        said = {"pin": b64(self.agents.core.key.pin), "version": __version__}
        return self.send(Reply(200, dump(said)), "application/json")

    def join(self) -> bytes:
        line = bottle.request.environ.get("HTTP_NM_LITE", "")
        return self.send(self.agents.join(line, self.body(MAX_BODY), self.source()), "application/octet-stream")

    def exchange(self) -> bytes:
        line = bottle.request.environ.get("HTTP_NM_LITE", "")
        reply = self.agents.exchange(line, self.body(MAX_BODY), self.source())
        return self.send(reply, "application/octet-stream")

    def look(self, capability: str) -> bytes:
        query = bottle.request.query
        wait = query.get("wait", "0")
        seconds = float(wait) if re.fullmatch("[0-9]{1,3}", wait) else 0.0
        reply = self.agents.look(capability, query.get("have", "-"), self.source(), seconds)
        return self.send(reply, "text/plain")


class Call(NamedTuple):
    """A request to a handler: by whom (in `core`), the path's parts, the body's members, the query."""

    web: Web
    core: Core
    path: Mapping[str, str]
    body: Row
    query: Mapping[str, str]

    @property
    def network(self) -> Row:
        return need_network(self.core, self.path["n"])

    @property
    def node(self) -> Row:
        return need_node(self.core, self.path["n"], self.path["node"])

    def show(self, node: Row) -> Row:
        return view_node(node, need_network(self.core, node["network"]), self.core.settings)


def is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


# ---- networks


def get_networks(call: Call) -> Any:
    found = [row for row in networks(call.core) if call.core.caller.may(row["id"])]
    return [view_network(row, call.core.settings) for row in found]


def new_network(call: Call) -> Any:
    """Empty members are the defaults; an IPv6 range that comes with `isdualstack` no, as the 0.8 form sends it, is not meant."""
    given = {name: value for name, value in call.body.items() if value or isinstance(value, bool)}
    values = columns(parse_fields(given, NEW_NETWORK), NETWORK_FIELDS)
    if "id" not in values:
        raise Invalid("netid is missing: a network needs a name")
    if not values.pop("isdualstack", True) and values.get("range"):
        values.pop("range6", None)
    return view_network(add_network(call.core, values.pop("id"), values), call.core.settings)


def get_network(call: Call) -> Any:
    return view_network(call.network, call.core.settings)


def put_network(call: Call) -> Any:
    shown = view_network(call.network, call.core.settings)
    values = columns(parse_fields(call.body, NETWORK_FIELDS, shown), NETWORK_FIELDS)
    if "id" in values:
        raise Invalid("netid: a network keeps its name; make another network instead")
    return view_network(set_network(call.core, call.path["n"], values), call.core.settings)


def delete_network(call: Call) -> Any:
    return Message("network %s deleted" % remove_network(call.core, call.path["n"])["id"])


def graph(call: Call) -> Any:
    """Who sees whom, as the nodes last reported it."""
    rows = nodes(call.core, call.path["n"])
    links = call.core.store.rows("SELECT observer, node, endpoint FROM observed WHERE network = ?", (call.network["id"],))
    ends = [{"from": one, "to": other, "endpoint": place, "handshake": bool(place)} for one, other, place in links]
    relays = [
        {"from": row["id"], "to": peer, "via": relay} for row in rows for peer, (relay, _) in pairs_of(row["relayed"]).items()
    ]
    names = ("id", "name", "address", "status")
    return {"nodes": [{name: row[name] for name in names} for row in map(call.show, rows)], "links": ends, "relayed": relays}


# ---- access keys


def get_keys(call: Call) -> Any:
    return [view_key(row) for row in access_keys(call.core, call.path["n"])]


def new_key(call: Call) -> Any:
    values = parse_fields(call.body, KEY_TAKES)
    end = values.get("expires") or values.get("expiration")
    lifetime = end - int(time.time()) if end else None
    if lifetime is not None and lifetime <= 0:
        raise Invalid("expires: that time is over: a time from now is like 24h")
    return view_key(add_key(call.core, call.path["n"], values.get("name", ""), values.get("uses", 1), lifetime))


def delete_key(call: Call) -> Any:
    name = remove_key(call.core, call.path["n"], call.path["name"])["name"]
    return Message("key %s deleted: nobody can join with it any more" % name)


def signup_token(call: Call) -> Any:
    network = call.network
    if not network["manual"]:
        raise Clash("%s takes no node without a key: set allowmanualsignup to yes first" % network["id"])
    token = agent.make_token(agent.Token(server_urls(call.core), call.core.key.pin, network["id"], ""))
    row = {"name": "", "network": network["id"], "uses": None, "expires": None, "created": call.core.now}
    return view_key({**row, "accessstring": token})


# ---- nodes


def get_nodes(call: Call) -> Any:
    names = [call.path["n"]] if "n" in call.path else [row["id"] for row in networks(call.core)]
    shown = ((need_network(call.core, name), nodes(call.core, name)) for name in names if call.core.caller.may(name))
    return [view_node(row, network, call.core.settings) for network, rows in shown for row in rows]


def new_node(call: Call) -> Any:
    values = columns(parse_fields(call.body, NEW_NODE), NODE_FIELDS, NODE_COLUMNS)
    taken = {name: value for name, value in values.items() if name in NEW_NODE_COLUMNS}
    taken["fixed"] = "port" in taken
    return call.show(add_node(call.core, call.path["n"], {**taken, "name": taken.get("name", "node")}))


def get_node(call: Call) -> Any:
    row = call.node
    sql = "SELECT node.name, observed.endpoint FROM observed JOIN node ON node.id = observed.observer WHERE observed.node = ?"
    names = dict(call.core.store.rows("SELECT id, name FROM node WHERE network = ?", (row["network"],)))
    relayed = {
        names[peer]: names[relay] for peer, (relay, _) in pairs_of(row["relayed"]).items() if {peer, relay} <= names.keys()
    }
    return {**call.show(row), "seenby": dict(call.core.store.rows(sql, (row["id"],))), "relayed": relayed}


def put_node(call: Call) -> Any:
    row = call.node
    values = parse_fields(call.body, NODE_FIELDS, call.show(row))
    insisted = as_words(call.body.get("isstatic") or "no").lower() == "yes"
    return call.show(set_node(call.core, row, node_columns(values, row, insisted)))


def delete_node(call: Call) -> Any:
    return Message("node %s deleted." % remove_node(call.core, call.node)["name"])


def approve_node(call: Call) -> Any:
    approve(call.core, call.node)
    return "SUCCESS"


def node_handler(action: Callable[[Core, Row], Row]) -> Callable[[Call], Any]:
    """A handler that does one thing to one node."""
    return lambda call: call.show(action(call.core, call.node))


def update_keys(call: Call) -> Any:
    """New WireGuard keys for all nodes of a network, one after the other, without a cut."""
    return view_network(refresh_keys(call.core, call.path["n"]), call.core.settings)


def last_modified(call: Call) -> Any:
    return call.network["nodes_modified"]


# ---- gateways and access


def make_egress(call: Call) -> Any:
    node, values = call.node, parse_fields(call.body, GATEWAY_TAKES)
    text, ranges = values.pop("rangestring", ""), values.pop("ranges", "")
    return call.show(create_egress(call.core, node, [ranges or text], **values))


def make_relay(call: Call) -> Any:
    node, values = call.node, parse_fields(call.body, RELAY_TAKES)
    return call.show(create_relay(call.core, node, values.get("relayaddrs", "").replace(",", " ").split()))


def role_ender(role: str) -> Callable[[Call], Any]:
    """A handler that ends what a node is for others."""
    handler = lambda call: call.show(delete_role(call.core, call.node, role.replace("gateway", "egress")))  # noqa: E731
    handler.__doc__ = "delete " + role
    return handler


def get_denials(call: Call) -> Any:
    return denials(call.core, call.path["n"])


def new_denial(call: Call) -> Any:
    given = {"node1": "", "node2": "", **parse_fields(call.body, DENIAL_FIELDS)}
    return set_denied(call.core, call.path["n"], **given, denied=True)


def delete_denial(call: Call) -> Any:
    pair = set_denied(call.core, call.path["n"], call.path["node1"], call.path["node2"], False)
    return Message("%(name1)s and %(name2)s may know each other" % pair)


# ---- external clients


def get_clients(call: Call) -> Any:
    return [
        view(row, CLIENT_FIELDS) for row in clients(call.core, call.path.get("n", "")) if call.core.caller.may(row["network"])
    ]


def _client_of(call: Call) -> Row:
    return need_client(call.core, call.path["n"], call.path["id"])


def get_client(call: Call) -> Any:
    return view(_client_of(call), CLIENT_FIELDS)


def client_file(call: Call) -> Any:
    """The configuration: as `file`, or as `qr` (PNG) or `svg` picture."""
    row, form = _client_of(call), call.path["type"]
    kinds = {"file": "text/plain; charset=utf-8", "qr": "image/png", "svg": "image/svg+xml"}
    if form not in kinds:
        raise Missing("there is %s of a client, not %s" % (", ".join(kinds), form))
    if not call.core.caller.may_write:
        raise Denied("this API token may only read, and there are keys in a client's configuration")
    bottle.response.set_header("Cache-Control", "no-store")
    if form == "file":
        bottle.response.set_header("Content-Disposition", 'attachment; filename="%s.conf"' % row["name"])
    body = row["file"].encode() if form == "file" else picture_of(row, form.replace("qr", "png"))
    return call.web.send(Reply(200, body), kinds[form])


def new_client(call: Call) -> Any:
    gateway, values = call.node, columns(parse_fields(call.body, CLIENT_FIELDS), CLIENT_FIELDS)
    return view(add_client(call.core, gateway, values), CLIENT_FIELDS)


def put_client(call: Call) -> Any:
    row = _client_of(call)
    values = columns(parse_fields(call.body, CLIENT_CHANGES, view(row, CLIENT_FIELDS)), CLIENT_FIELDS)
    return view(set_client(call.core, row, values), CLIENT_FIELDS)


def new_client_key(call: Call) -> Any:
    values = parse_fields(call.body, CLIENT_FIELDS)
    return view(renew_client(call.core, _client_of(call), values.get("publickey", "")), CLIENT_FIELDS)


def delete_client(call: Call) -> Any:
    row = _client_of(call)
    remove_client(call.core, row)
    return Message("client %s deleted" % row["name"])


# ---- names


def get_names(call: Call, *kinds: str) -> Any:
    found = names(call.core, call.path.get("n", ""))
    return [view(row, DNS_FIELDS) for row in found if not kinds or row["kind"] in kinds]


def get_own_names(call: Call) -> Any:
    return get_names(call, "node", "client")


def get_custom_names(call: Call) -> Any:
    return get_names(call, "custom")


def _name_values(call: Call, shown: Row) -> Row:
    found = columns(parse_fields(call.body, DNS_FIELDS, shown), DNS_FIELDS)
    if ":" in found.get("ip", ""):
        found["ip6"] = found.pop("ip")
    return found


def new_name(call: Call) -> Any:
    return view(set_name(call.core, call.path["n"], "", _name_values(call, {})), DNS_FIELDS)


def put_name(call: Call) -> Any:
    row = need_name(call.core, call.path["n"], call.path["name"])
    return view(set_name(call.core, row["network"], row["name"], _name_values(call, view(row, DNS_FIELDS))), DNS_FIELDS)


def delete_name(call: Call) -> Any:
    return Message("entry %s deleted" % set_name(call.core, call.path["n"], call.path["name"], None)["name"])


def push_names(call: Call) -> Any:
    """Write the files for CoreDNS now."""
    if call.core.settings["DNS_MODE"] != "on":
        raise Clash("DNS_MODE is off: no names are written")
    write_names(call.core)
    return Message("DNS pushed to CoreDNS")


# ---- users


def show_user(row: Row) -> Row:
    return view(row, USER_FIELDS)


def get_users(call: Call) -> Any:
    return [show_user(row) for row in users(call.core)]


def get_user(call: Call) -> Any:
    return show_user(need_user(call.core, call.path["u"]))


def new_user(call: Call) -> Any:
    values = columns(parse_fields(call.body, USER_FIELDS), USER_FIELDS)
    if values.setdefault("name", fold_user(call.path["u"])) != call.path["u"].lower():
        raise Invalid("username: the path says %s" % call.path["u"])
    return show_user(add_user(call.core, values))


def put_user(call: Call) -> Any:
    """An administrator changes anybody, a user the own password."""
    old = need_user(call.core, call.path["u"])
    fields = USER_FIELDS if call.core.caller.networks is None else OWN_USER_FIELDS
    values = columns(parse_fields(call.body, fields, show_user(old)), USER_FIELDS)
    if "name" in values:
        raise Invalid("username: a user keeps the name; make another user instead")
    return show_user(set_user(call.core, old["name"], values))


def delete_user(call: Call) -> Any:
    return Message("user %s deleted" % remove_user(call.core, call.path["u"])["name"])


def get_has_admin(call: Call) -> Any:
    return has_admin(call.core)


def create_admin(call: Call) -> Any:
    values = parse_fields(call.body, FIRST_ADMIN)
    code = values.pop("setupcode", "")
    with call.web.a_try(call.core):
        return show_user(add_first_admin(call.core, columns(values, USER_FIELDS), call.web.at_home(), code))


def authenticate(call: Call) -> Any:
    values = parse_fields(call.body, SIGN_IN)
    name, password = values.get("username", "").lower(), values.get("password", "")
    with call.web.a_try(call.core, name[:40]):
        session = sign_in(call.core, name, password)
    return Message("signed in until %d" % session["expires"], {"UserName": name, "AuthToken": session["value"]})


def log_out(call: Call) -> Any:
    if call.core.caller.token:
        raise Clash("an API token is not signed in: delete it instead")
    sign_out(call.core)
    return Message("signed out")


def get_tokens(call: Call) -> Any:
    return [view(row, TOKEN_FIELDS) for row in api_tokens(call.core, call.path["u"])]


def new_token(call: Call) -> Any:
    values = parse_fields(call.body, TOKEN_FIELDS, left_out=())  # an empty limit would be none
    write = values.pop("scope", "write") == "write"
    return view(add_api_token(call.core, call.path["u"], {**values, "write": write}), TOKEN_FIELDS)


def delete_token(call: Call) -> Any:
    remove_api_token(call.core, call.path["u"], call.path["name"])
    return Message("token %s deleted" % call.path["name"])


# ---- the server


def get_audit(call: Call) -> Any:
    since = call.query.get("since") or "0"
    start = 0 if since == "0" else unix_time(since) if since.isdigit() else call.core.now - check_lifetime(since)
    return AuditLog(call.core, call.query.get("network", ""), start)


def host_network(hosted: bool) -> Callable[[Call], Any]:
    """The server's host joins or leaves a network: its agent does, the server itself starts nothing as root."""

    def handler(call: Call) -> Any:
        name = set_network(call.core, call.path["n"], {"hosted": hosted})["id"]
        how = "run `netclient-lite daemon --server-data %s` there if it does not run yet" % call.core.settings.data
        return Message("the server's host %s %s by itself (%s)" % ("joins" if hosted else "leaves", name, how))

    return handler


def get_config(call: Call) -> Any:
    """The settings under the names that the original's configuration has."""
    settings = call.core.settings
    url = server_urls(call.core)[0]
    host = agent.split_url(url)[1]
    return {
        "APIConnString": url.partition("://")[2],
        "APIHost": host,
        "APIPort": str(settings["API_PORT"]),
        "MasterKey": "(hidden)",
        "AllowedOrigin": settings["CORS_ALLOWED_ORIGIN"],
        "RestBackend": settings["REST_BACKEND"],
        "AgentBackend": settings["AGENT_BACKEND"],
        "ClientMode": "on",  # where it is off, the 0.8 page forbids hole punching, which here is the nodes' own affair
        "DNSMode": settings["DNS_MODE"],
        "CoreDNSAddr": settings["COREDNS_ADDR"],
        "DefaultNodeLimit": settings["DEFAULT_NODE_LIMIT"],
        "Database": settings["DATABASE"],
        "CheckinInterval": str(settings["CHECKIN_INTERVAL"]),
        "Verbosity": settings["VERBOSITY"],
        "Version": __version__,
        "Platform": "linux",
    }


def _statuses(call: Call) -> Iterator[Row]:
    """Network, name, last contact and status of each node that the caller may see."""
    for network in networks(call.core):
        if call.core.caller.may(network["id"]):
            sql = "SELECT name, state, auth, last_seen FROM node WHERE network = ? AND state != 'removed'"
            interval = network["interval"] or call.core.settings["CHECKIN_INTERVAL"]
            for row in call.core.store.rows(sql, (network["id"],)):
                known = dict(zip(("name", "state", "auth", "last_seen"), row), interval=interval)
                yield {**known, "network": network["id"], "status": node_status(known)}


def status(call: Call) -> Any:
    """How the server does, in the networks that the caller has."""
    core, bell, found = call.core, call.web.agents.bell, [row["status"] for row in _statuses(call)]
    return {
        "version": __version__, "incarnation": core.store.incarnation, "pin": b64(core.key.pin),
        "uptime": core.now - call.web.core.started, "time": core.now, "urls": list(server_urls(core)),
        "networks": sum(core.caller.may(row["id"]) for row in networks(core)), "nodes": len(found),
        "status": {each: found.count(each) for each in sorted(set(found))}, "schema": SCHEMA,
        "database": core.settings["DATABASE"], "polls": bell.parked, "poll_limit": bell.limit,
    }  # fmt: skip


def metrics(call: Call) -> Any:
    """The same for Prometheus."""
    try:
        import prometheus_client as prometheus
    except ImportError as missing:
        raise Busy(
            "metrics need prometheus_client, which is not installed on the server: pip install prometheus_client"
        ) from missing
    registry = prometheus.CollectorRegistry()

    def gauge(name: str, what: str, *labels: str) -> Any:
        return prometheus.Gauge("netmaker_lite_" + name, what, labels, registry=registry)

    found = status(call)
    gauge("info", "What runs here", "version", "schema").labels(found["version"], found["schema"]).set(1)
    for name, what in GAUGES.items():
        gauge(name, what).set(found[name])
    revision = gauge("revision", "Changes that a network has had", "network")
    by_status = gauge("nodes", "Nodes of a network by their status", "network", "status")
    seen = gauge("node_last_seen_seconds", "When a node was last heard of, unix time", "network", "node")
    for row in networks(call.core):
        revision.labels(row["id"]).set(row["counter"])
    for row in _statuses(call):
        by_status.labels(row["network"], row["status"]).inc()
        seen.labels(row["network"], row["name"]).set(row["last_seen"])
    return call.web.send(Reply(200, prometheus.generate_latest(registry)), "text/plain; version=0.0.4")


GAUGES = {
    "uptime": "Seconds since the start",
    "networks": "Networks",
    "polls": "Long-polls held",
    "poll_limit": "Long-polls that may be held",
}


def openapi(call: Call) -> Any:
    """This API for machines; made when asked for, since it takes half a megabyte."""
    return call.web.openapi()


# ---- the table

ANY, USER, MINE, SELF, ADMIN = "anyone", "user", "network", "self", "admin"
NET, NODES, USERS = "/api/networks", "/api/nodes/<n>", "/api/users"
A_NODE = NODES + "/<node>"
ACLS, DNS, CLIENTS = NET + "/<n>/acls", "/api/dns", "/api/extclients"
A_CLIENT = CLIENTS + "/<n>/<id>"
NOT_AGENTS = (
    "agents of this server join with a token (netclient_lite.py join -t …); with a user's bearer token this makes a node by hand"
)
ROUTES = (
    Route("GET", "/api/health", ANY, Web.health),
    Route("GET", "/api/getip", ANY, Web.getip),
    Route("GET", FILES_PATH + "netclient_lite.py", ANY, Web.agent_file),
    Route("GET", FILES_PATH + "netclient-look", ANY, Web.look_file),
    Route("GET", FILES_PATH + "install.sh", ANY, Web.install_file),
    Route("GET", agent.HELLO_PATH, "agent", Web.hello),
    Route("POST", agent.JOIN_PATH, "agent", Web.join),
    Route("POST", agent.EXCHANGE_PATH, "agent", Web.exchange),
    Route("GET", agent.LOOK_PATH + "<capability>", "agent", Web.look),
    Route("GET", NET, USER, get_networks, (), "[Network]"),
    Route("POST", NET, ADMIN, new_network, NEW_NETWORK, "Network"),
    Route("GET", NET + "/<n>", MINE, get_network, (), "Network"),
    Route("PUT", NET + "/<n>", ADMIN, put_network, NETWORK_FIELDS, "Network"),
    Route("PUT", NET + "/<n>/nodelimit", ADMIN, put_network, NETWORK_FIELDS, "Network"),
    Route("DELETE", NET + "/<n>", ADMIN, delete_network, (), "message"),
    Route("POST", NET + "/<n>/keyupdate", MINE, update_keys, (), "Network"),
    Route("GET", NET + "/<n>/graph", MINE, graph, (), "Graph"),
    Route("GET", NET + "/<n>/keys", MINE, get_keys, (), "[AccessKey]"),
    Route("POST", NET + "/<n>/keys", MINE, new_key, KEY_TAKES, "AccessKey"),
    Route("DELETE", NET + "/<n>/keys/<name>", MINE, delete_key, (), "message"),
    Route("GET", NET + "/<n>/signuptoken", MINE, signup_token, (), "AccessKey"),
    Route("GET", "/api/nodes", USER, get_nodes, (), "[Node]"),
    Route("GET", "/api/nodes/adm/<n>/lastmodified", MINE, last_modified, (), "number"),
    Route("POST", "/api/nodes/adm/<n>/authenticate", "nobody", last_modified, (), "message", NOT_AGENTS),
    Route("GET", NODES, MINE, get_nodes, (), "[Node]"),
    Route("POST", NODES, MINE, new_node, NEW_NODE, "Node", NOT_AGENTS),
    Route("GET", A_NODE, MINE, get_node, (), "Node"),
    Route("PUT", A_NODE, MINE, put_node, NODE_FIELDS, "Node"),
    Route("DELETE", A_NODE, MINE, delete_node, (), "message"),
    Route("POST", A_NODE + "/approve", MINE, approve_node, (), "text"),
    Route("POST", A_NODE + "/reject", MINE, node_handler(reject), (), "Node"),
    Route("POST", A_NODE + "/disable", MINE, node_handler(disable), (), "Node"),
    Route("POST", A_NODE + "/enable", MINE, node_handler(enable), (), "Node"),
    Route("POST", A_NODE + "/refreshkey", MINE, node_handler(refresh_key), (), "Node"),
    Route("POST", A_NODE + "/creategateway", MINE, make_egress, GATEWAY_TAKES, "Node"),
    Route("POST", A_NODE + "/createingress", MINE, node_handler(create_ingress), (), "Node"),
    Route("POST", A_NODE + "/createrelay", MINE, make_relay, RELAY_TAKES, "Node"),
    *(Route("DELETE", A_NODE + "/delete" + way, MINE, role_ender(way), (), "Node") for way in ("gateway", "ingress", "relay")),
    Route("GET", ACLS, MINE, get_denials, (), "[Denial]"),
    Route("POST", ACLS, MINE, new_denial, DENIAL_FIELDS, "Denial"),
    Route("DELETE", ACLS + "/<node1>/<node2>", MINE, delete_denial, (), "message"),
    Route("GET", CLIENTS, USER, get_clients, (), "[ExtClient]"),
    Route("GET", CLIENTS + "/<n>", MINE, get_clients, (), "[ExtClient]"),
    Route("GET", A_CLIENT, MINE, get_client, (), "ExtClient"),
    Route("GET", A_CLIENT + "/<type>", MINE, client_file),
    Route("POST", CLIENTS + "/<n>/<node>", MINE, new_client, CLIENT_FIELDS, "ExtClient"),
    Route("PUT", A_CLIENT, MINE, put_client, CLIENT_CHANGES, "ExtClient"),
    Route("POST", A_CLIENT + "/renew", MINE, new_client_key, CLIENT_FIELDS, "ExtClient"),
    Route("DELETE", A_CLIENT, MINE, delete_client, (), "message"),
    Route("GET", DNS, ADMIN, get_names, (), "[DNSEntry]"),
    Route("GET", DNS + "/adm/<n>", MINE, get_names, (), "[DNSEntry]"),
    Route("GET", DNS + "/adm/<n>/nodes", MINE, get_own_names, (), "[DNSEntry]"),
    Route("GET", DNS + "/adm/<n>/custom", MINE, get_custom_names, (), "[DNSEntry]"),
    Route("POST", DNS + "/adm/pushdns", ADMIN, push_names, (), "message"),
    Route("POST", DNS + "/<n>", MINE, new_name, DNS_FIELDS, "DNSEntry"),
    Route("PUT", DNS + "/<n>/<name>", MINE, put_name, DNS_FIELDS, "DNSEntry"),
    Route("DELETE", DNS + "/<n>/<name>", MINE, delete_name, (), "message"),
    Route("GET", USERS + "/adm/hasadmin", ANY, get_has_admin, (), "truth"),
    Route("POST", USERS + "/adm/createadmin", ANY, create_admin, FIRST_ADMIN, "User"),
    Route("POST", USERS + "/adm/authenticate", ANY, authenticate, SIGN_IN, "message"),
    Route("POST", USERS + "/adm/logout", USER, log_out, (), "message"),
    Route("PUT", USERS + "/networks/<u>", ADMIN, put_user, USER_FIELDS, "User"),
    Route("GET", USERS, ADMIN, get_users, (), "[User]"),
    Route("GET", USERS + "/<u>", SELF, get_user, (), "User"),
    Route("POST", USERS + "/<u>", ADMIN, new_user, USER_FIELDS, "User"),
    Route("PUT", USERS + "/<u>", SELF, put_user, USER_FIELDS, "User"),
    Route("PUT", USERS + "/<u>/adm", ADMIN, put_user, USER_FIELDS, "User"),
    Route("DELETE", USERS + "/<u>", ADMIN, delete_user, (), "message"),
    Route("GET", USERS + "/<u>/tokens", SELF, get_tokens, (), "[Token]"),
    Route("POST", USERS + "/<u>/tokens", SELF, new_token, TOKEN_FIELDS, "Token"),
    Route("DELETE", USERS + "/<u>/tokens/<name>", SELF, delete_token, (), "message"),
    Route("GET", "/api/audit", USER, get_audit, (), "[Audit]"),
    Route("POST", "/api/server/addnetwork/<n>", ADMIN, host_network(True), (), "message"),
    Route("DELETE", "/api/server/removenetwork/<n>", ADMIN, host_network(False), (), "message"),
    Route("GET", "/api/server/getconfig", USER, get_config, (), "Config"),
    Route("GET", "/api/server/status", USER, status, (), "Status"),
    Route("GET", "/metrics", ADMIN, metrics),
    Route("GET", "/api/openapi.json", ANY, openapi, (), "object"),
)


# --------------------------------------------------------------------------------------------------
# OPENAPI
# --------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, Sequence[Field]] = {
    "Network": NETWORK_FIELDS, "AccessKey": KEY_FIELDS, "Node": NODE_FIELDS, "User": USER_FIELDS, "Token": TOKEN_FIELDS,
    "Audit": AUDIT_FIELDS, "ExtClient": CLIENT_FIELDS, "DNSEntry": DNS_FIELDS, "Denial": DENIAL_FIELDS,
}  # fmt: skip


def shape(texts: str, numbers: str = "", **others: Row) -> Row:
    """An object that always has these members."""
    found = {**dict.fromkeys(texts.split(), TEXT), **dict.fromkeys(numbers.split(), KINDS["number"]), **others}
    return {"type": "object", "properties": found, "required": sorted(found)}


def list_of(one: Row) -> Row:
    return {"type": "array", "items": one}


MESSAGE = shape("Message", "Code", Response={})
PROBLEM = shape("Message error", "Code")
OBJECTS: dict[str, Row] = {
    "Graph": shape(
        "", nodes=list_of(shape("id name address status")), links=list_of(shape("from to endpoint", handshake=KINDS["truth"])),
        relayed=list_of(shape("from to via")),
    ),
    "Config": shape(
        "APIConnString APIHost APIPort MasterKey AllowedOrigin RestBackend AgentBackend Database CheckinInterval Version "
        "DNSMode CoreDNSAddr Platform ClientMode", "DefaultNodeLimit Verbosity",
    ),
    "Status": shape(
        "version incarnation pin database", "uptime time networks nodes schema polls poll_limit",
        urls=KINDS["texts"], status={"type": "object", "additionalProperties": KINDS["number"]},
    ),
}  # fmt: skip
PLAIN = {"message": MESSAGE, "object": KINDS["object"], "text": TEXT, "number": KINDS["number"], "truth": KINDS["truth"]}
JSON, BYTES = "application/json", "application/octet-stream"
WRITTEN: dict[Any, tuple[str, Row]] = {  # by handlers themselves
    Web.health: (JSON, shape("status version")), Web.hello: (JSON, shape("pin version")), Web.getip: ("text/plain", TEXT),
    Web.look: ("text/plain", TEXT), Web.join: (BYTES, {}), Web.exchange: (BYTES, {}), metrics: ("text/plain", TEXT),
}  # fmt: skip
QUERIES: dict[Any, Row] = {get_audit: {"network": TEXT, "since": TEXT}, Web.look: {"have": TEXT, "wait": TEXT}}
PAGES = {"page": Whole(1, 1 << 31).schema, "per_page": Whole(1, PER_PAGE).schema}
PROBLEMS = {
    400: "bad input", 401: "who are you?", 403: "not yours", 404: "none such", 409: "something else is there, or in the way",
    410: "used up", 413: "too large", 429: "slow down", 503: "not now",
}  # fmt: skip
PART = "<([a-z0-9]+)>"


def field_schema(field: Field) -> Row:
    found: Row = KINDS[field.kind] if field.kind else getattr(field.check, "schema", TEXT)
    return KINDS["flag"] if field.source in BOOLEANS else found


def body_schema(fields: Sequence[Field]) -> Row:
    """Of a body: what is read-only is ignored, numbers and lists may come as texts too."""
    return {"type": "object", "properties": {field.name: {} if field.check is None else field_schema(field) for field in fields}}


def object_schema(fields: Sequence[Field]) -> Row:
    """Of an answer; a `Field` with no source and no check is there in some answers only."""
    shown = {field.name: field_schema(field) for field in fields if field.source != "" or field.check is None}
    return {"type": "object", "properties": shown, "required": [field.name for field in fields if field.source != ""]}


def answer_schema(gives: str) -> Row:
    name = gives.strip("[]")
    one = PLAIN.get(name) or {"$ref": "#/components/schemas/" + name}
    return list_of(one) if gives.startswith("[") else one


def operation(route: Route) -> Row:
    """One route as OpenAPI has it."""
    kind, schema = (JSON, answer_schema(route.gives)) if route.gives else WRITTEN.get(route.handler, ("*/*", {}))
    query = {**QUERIES.get(route.handler, {}), **(PAGES if route.gives.startswith("[") else {})}
    names, name = re.findall(PART, route.path), route.handler.__name__
    words = route.path.replace(">", "").split("/")[-1] if name.startswith("<") else name.replace("_", " ")
    found: Row = {
        "operationId": (route.method + re.sub("[^a-z0-9]+", "_", route.path)).lower(),
        "tags": [route.role],
        "summary": (route.handler.__doc__ or words).strip().split("\n")[0],
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": TEXT} for name in names),
            *({"name": name, "in": "query", "schema": what} for name, what in query.items()),
        ],
        "responses": {"200": {"description": "done", "content": {kind: {"schema": schema}}}},
    }
    if route.takes:
        found["requestBody"] = {"content": {JSON: {"schema": body_schema(route.takes)}}}
    if route.role in (USER, MINE, SELF, ADMIN):
        found["security"] = [{"bearer": []}]
    if route.role == "agent":
        found["responses"]["default"] = {"description": "docs/protocol.md tells"}
    else:
        found["responses"].update({str(number): {"$ref": "#/components/responses/%d" % number} for number in PROBLEMS})
    return found


def openapi_of(routes: Iterable[Route]) -> Row:
    """The routes as an OpenAPI 3.1 document."""
    paths: dict[str, Row] = {}
    for route in routes:
        paths.setdefault(re.sub(PART, r"{\1}", route.path), {})[route.method.lower()] = operation(route)
    about = {"title": "netmaker-lite", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}}
    errors = {str(n): {"description": what, "content": {JSON: {"schema": PROBLEM}}} for n, what in PROBLEMS.items()}
    parts = {
        "schemas": {**{name: object_schema(fields) for name, fields in SCHEMAS.items()}, **OBJECTS},
        "responses": errors,
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    }
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": parts}


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
            if status == 401:
                bottle.response.set_header("WWW-Authenticate", "Bearer")
            return Web.send(Reply(status, json_error(status, str(problem))), "application/json")
        except peewee.OperationalError as problem:
            log.error("database: %s", problem)
            return Web.send(Reply(503, json_error(503, "the database is busy: try again")), "application/json")

    return safe


def make_app(agents: Agents) -> Any:
    """The WSGI application: every route of the table, every error as JSON."""
    app = bottle.Bottle()
    web = Web(agents)
    settings = agents.core.settings
    for route in ROUTES:
        half = settings["AGENT_BACKEND" if route.role == "agent" else "REST_BACKEND"]
        if half == "on" or (route.role == "anyone" and not route.gives):
            app.route(route.path, route.method, expected_failures(web.handler(route)), role=route.role)
    web.openapi = partial(openapi_of, ROUTES)
    app.add_hook("before_request", web.preflight)
    if web.origins:  # else no request has to pay for it
        app.add_hook("after_request", lambda: bottle.response.headers.update(web.cross_origin()))

    def unexpected(problem: Any) -> str:
        problem.content_type = "application/json"
        sentence = str(problem.body) if problem.status_code < 500 else "the server failed: its log tells why"
        return json_error(problem.status_code, sentence).decode()

    app.default_error_handler = unexpected
    return app


# --------------------------------------------------------------------------------------------------
# SERVE
# --------------------------------------------------------------------------------------------------

HOST_JOINS = 60  # seconds after its start in which a server waits for the agent of its host
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


def waitress_server(app: Any, socks: Sequence[socket.socket], polls: int) -> Any:
    import waitress.channel
    import waitress.server
    import waitress.task

    class Refusal(waitress.task.ErrorTask):  # type: ignore[misc]
        """What waitress refuses by itself, in our form."""

        def execute(self) -> None:
            problem = self.request.error
            body = json_error(problem.code, "%s: %s" % (problem.reason, problem.body))
            self.status = "%d %s" % (problem.code, problem.reason)
            self.response_headers += [("Content-Type", "application/json"), ("Connection", "close")]
            self.close_on_finish = True
            self.content_length = len(body)
            self.write(body)

    waitress.channel.HTTPChannel.error_task_class = Refusal
    return waitress.server.create_server(
        app,
        sockets=list(socks),
        threads=polls + 8,  # parked polls can take no more than their part
        connection_limit=polls + 1000,
        asyncore_use_poll=True,  # select() ends at descriptor 1023
        channel_timeout=30,
        max_request_body_size=MAX_BODY,
        max_request_header_size=16384,
        clear_untrusted_proxy_headers=False,  # Web.source believes only TRUSTED_PROXIES
        ident=None,
    )


def run_waitress(app: Any, socks: Sequence[socket.socket], polls: int) -> None:
    waitress_server(app, socks, polls).run()


def run_gevent(app: Any, socks: Sequence[socket.socket], polls: int) -> None:
    import gevent.pywsgi

    first, *others = (gevent.pywsgi.WSGIServer(sock, app, log=None) for sock in socks)
    for other in others:
        other.start()
    first.serve_forever()


def run_wsgiref(app: Any, socks: Sequence[socket.socket], polls: int) -> None:
    """The standard library's server with a thread for each request."""
    for sock in socks[1:]:
        threading.Thread(target=run_wsgiref, args=(app, [sock], polls), daemon=True).start()
    sock = socks[0]
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


def backend(settings: Settings) -> Callable[[Any, Sequence[socket.socket], int], None]:
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
        self.alone = False  # that no agent runs here has been said
        self.named: list[tuple[Any, ...]] = []  # the words of networks whose names are written
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
            core = self.agents.core
            for task in (
                self.agents.flush,
                self.agents.settle_due,
                self.agents.refresh_due,
                self.agents.relay_due,
                partial(sweep, core),
                partial(forget_audit, core),
                self.push_names,
                self.miss_host,
            ):
                try:
                    task()
                except Exception as problem:  # whatever it is, the next round is needed
                    log.error("housekeeping: %r", problem)
            if rounds % 20 == 0:
                self.agents.sight.forget()

    def push_names(self) -> None:
        """Write CoreDNS' files after changes."""
        core = self.agents.core
        now = core.store.rows("SELECT id, tag FROM network ORDER BY id")
        if now != self.named and core.settings["DNS_MODE"] == "on":
            write_names(core)
            self.named = now

    def miss_host(self) -> None:
        """Say once that no agent makes this host a node of its networks."""
        core = self.agents.core
        if self.alone or core.settings["CLIENT_MODE"] == "off" or core.now - core.started < HOST_JOINS:
            return
        sql = "SELECT id FROM network WHERE hosted AND id NOT IN (SELECT network FROM node WHERE host AND state != 'removed')"
        missing = ", ".join(row[0] for row in core.store.rows(sql))
        if missing:
            self.alone = True
            log.warning(
                "this host is not a node of %s: run `netclient-lite daemon --server-data %s` as root, or set CLIENT_MODE=off",
                missing, core.settings.data,
            )  # fmt: skip

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


def serve(settings: Settings, out: Callable[[str], None], new_key: Caller | None = None) -> None:
    """Run the server until it is told to stop. `new_key`: who gives up the lost one."""
    run = backend(settings)
    make_folder(settings.data)
    held = lock_folder(settings.data)
    try:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        with ExitStack() as open_:
            ports = dict.fromkeys(filter(None, (settings["API_PORT"], settings["GRPC_PORT"])))
            bind = bind_address(settings)
            socks = [open_.enter_context(listener(bind, port)) for port in ports]
            if new_key:
                out("a new key; access keys that the old one sealed, removed: %d" % give_up_key(settings, new_key))
            _serve(open_core(settings), socks, run, out)
    finally:
        os.close(held)


def collect_often() -> None:
    """Closed connections are cycles of objects: free them soon, looking only at what was not there from the start."""
    gc.freeze()
    gc.collect()  # the share of new objects at which Python looks at all is that of those counted here
    gc.set_threshold(300, 3, 1)


def _serve(core: Core, socks: Sequence[socket.socket], run: Callable[..., None], out: Callable[[str], None]) -> None:
    core.store.set_meta("urls", " ".join(own_urls(core.settings)))
    tell_nameserver(core)
    write_host(core, host_url(core.settings))
    agents = Agents(core, Sight(core.settings))
    keeper = Housekeeping(agents)
    signal.signal(signal.SIGTERM, _terminate)
    out("listening on %s" % " and ".join(endpoint(*sock.getsockname()[:2]) for sock in socks))
    out("agents reach it at %s" % core.store.meta("urls"))
    out("its key (pin): %s" % b64(core.key.pin))
    code = new_setup_code(core)
    if code:
        out("no administrator yet; the setup code for the first one: %s" % code)
    keeper.start()
    app = make_app(agents)
    collect_often()
    try:
        run(app, socks, core.settings["POLL_LIMIT"])
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        keeper.stop()
        core.store.close()


# --------------------------------------------------------------------------------------------------
# CLI
# --------------------------------------------------------------------------------------------------


class InProcess:
    """The application, called without a socket by who may read the data folder: an administrator."""

    def __init__(self, core: Core, caller: Caller) -> None:
        self.core, self.caller = core, caller
        self.app = make_app(Agents(core, Sight(core.settings)))

    def call(self, method: str, path: str, body: Any) -> netmaker_admin.Answer:
        place, _, query = path.partition("?")
        data = b"" if body is None else dump(body)
        environ = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": unquote_to_bytes(place).decode("latin-1"),
            "QUERY_STRING": query, "CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(data)),
            "SERVER_NAME": "localhost", "SERVER_PORT": "0", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(data), "wsgi.errors": sys.stderr,
            "wsgi.multithread": False, "wsgi.multiprocess": True, "wsgi.run_once": True,
            CALLER: self.caller,
        }  # fmt: skip
        said: list[Any] = []
        parts = self.app(environ, lambda status, headers, *_: said.extend((status, dict(headers))))
        answer = b"".join(parts)
        is_json = said[1].get("Content-Type", "").startswith("application/json")
        return netmaker_admin.Answer(int(said[0][:3]), json.loads(answer) if is_json else None, answer)

    def close(self) -> None:
        self.core.store.close()


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Local:
    """What the command line can do on this host: the calls in this process, and what is no REST call."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        name = environment.get("SUDO_USER") or environment.get("USER") or "root"
        self.caller = Caller(name, "this host")
        self.settings = [(each.name, each.default, each.help) for each in SETTINGS]
        self.commands = {"serve": self.serve, "backup": self.backup, "restore": self.restore, "check": self.check}

    def _settings(self, args: Any, **forced: str) -> Settings:
        """The settings that hold for a command; root becomes the owner of the data."""
        flags = {**{name: getattr(args, flag, "") for flag, name in FLAGS.items()}, **forced}
        settings = Settings({name: value for name, value in flags.items() if value}, self.environment)
        level = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)[settings["VERBOSITY"]]
        logging.basicConfig(level=level, format="%(message)s")
        for doubt in settings.doubts:
            log.warning(doubt)
        as_owner(settings.data)
        return settings

    def open(self, args: Any) -> InProcess:
        return InProcess(open_core(self._settings(args, REST_BACKEND="on"), args.command.founds), self.caller)

    def serve(self, args: Any) -> netmaker_admin.Printed:
        serve(self._settings(args), write, self.caller if args.new_key else None)
        return netmaker_admin.Printed(None, [])

    def backup(self, args: Any) -> netmaker_admin.Printed:
        core = open_core(self._settings(args), False)
        try:
            backup(core, args.file, args.with_key)
        finally:
            core.store.close()
        note = "" if args.with_key else ", without server.key: keep that file too, or use --with-key"
        value = {"file": args.file, "with_key": "yes" if args.with_key else "no"}
        return netmaker_admin.Printed(value, ["backup written to %s%s" % (args.file, note)])

    def restore(self, args: Any) -> netmaker_admin.Printed:
        settings = self._settings(args)
        make_folder(settings.data)
        held = lock_folder(settings.data)
        try:
            done = restore(settings, args.file, self.caller)
        finally:
            os.close(held)
        back = ["%s (%s, network %s)" % (node["name"], node["id"], node["network"]) for node in done.back]
        lines = ["restored: %d nodes; all sessions and API tokens have ended" % done.nodes]
        lines += ["removed since the backup and back in now: " + each for each in back]
        return netmaker_admin.Printed({"nodes": done.nodes, "back": [node["id"] for node in done.back]}, lines)

    def check(self, args: Any) -> netmaker_admin.Printed:
        core = open_core(self._settings(args), False)
        try:
            found = check(core)
        finally:
            core.store.close()
        return netmaker_admin.Printed({"findings": found}, found or ["the database is in order"], 1 if found else 0)


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
    """The command line, with what this host adds to it."""
    try:
        return netmaker_admin.main(argv, environment, Local(environment))
    except (ServerError, Invalid) as problem:
        sys.stderr.write("netmaker-lite: %s\n" % problem)
        return 2 if isinstance(problem, Invalid) else 1
    except PermissionError as problem:
        sys.stderr.write("netmaker-lite: %s\n" % not_ours(problem.filename or "/"))
        return 1


if __name__ == "__main__":
    sys.exit(main())
