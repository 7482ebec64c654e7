#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""netclient-lite: the agent of netmaker-lite, one file on the standard library alone.

It makes this machine a node of WireGuard meshes: it asks the server what a mesh looks like, compares that with what the machine
has, and changes what differs with `wg` and `ip`, never more.

    netclient_lite.py join -t TOKEN            become a node; then check in every 15 s (--daemon on, the default)
    netclient_lite.py checkin -n all           one check-in; what cron, procd and systemd call
    netclient_lite.py daemon                   stay, and apply changes within a second
    netclient_lite.py status                   peers, their paths and the age of their handshakes
    netclient_lite.py leave -n all             take everything down and forget it, also with the server gone

Files: /etc/netclient/config/{netconfig,wgkey,secret,nettoken,peers}-NETWORK (0600), /var/run/netclient/ (tmpfs: counters, locks).
It never deletes an interface to change it, never touches another WireGuard interface, never runs a command that came from the
server, and never acts on silence: without an authenticated answer the machine stays as it is.

Contents
    WIRE        the protocol's line and MAC, HTTP over a socket, and the no-change check-in on C built-ins alone
    IMPORTS     the standard library; others are imported where they are used
    ERRORS      what can go wrong, each with its exit status
    TOKENS      the access token, X25519, keys by label, sealing
    SETTINGS    the flags with their environment names; where the files are
    VALUES      the named tuples that everything below speaks of
    PARSE       text to values: tool output, answers, addresses and names
    PLAN        desired state and actual state to the shortest list of steps; pure
    RUN         the only place that starts processes
    FILES       the only place that writes files; locks
    SYSTEM      this machine: WireGuard back ends, addresses, routes
    NAMES       the names of nodes for this machine's resolver
    GATEWAY     what a gateway forwards: fw4, nft or iptables, and the kernel's switches
    DISCOVER    neighbours in the LAN, by multicast DNS
    API         one membership's conversation with its server
    RECONCILE   one check-in: exchange, plan, apply, confirm, report
    SERVICE     what makes a check-in happen every 15 s
    COMMANDS    join, register, leave, connect, disconnect, cron, uninstall, checkin, pull, push, list, status, doctor, mdns,
                daemon, version
    CLI         the table of commands, the parser, main
"""

from __future__ import annotations

__version__ = "0.1.0"

# --------------------
# WIRE
# --------------------
# A check-in every 15 s is the hot path of the product, so this section imports C built-ins only: `import json` alone costs as
# much as starting Python.

import sys

try:
    import _socket
    import posix as _os
    from _blake2 import blake2b
except ImportError:  # another Python than CPython: slower, not different
    import os as _os  # type: ignore[no-redef]
    import socket as _socket  # type: ignore[no-redef]
    from hashlib import blake2b
import binascii
import errno
import time

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

    Fields = Mapping[str, Any]
    Words = Sequence[str]
    Row = dict[str, Any]
    Spare = tuple[str, str] | None  # a key that is not in force yet: both halves
    Told = tuple[bytes, str, list[str]]  # of an own node to its LANs: its group's key, its id, its endpoints there

PROTOCOL = "1"
HEADER = "NM-Lite"
EXCHANGE_PATH = "/api/agent/v1/exchange"
JOIN_PATH = "/api/agent/v1/join"
HELLO_PATH = "/api/agent/v1/hello"
LOOK_PATH = "/api/agent/v1/look/"
MAX_ANSWER = 8 << 20  # bytes; a snapshot of 10,000 peers is 2.4 MB
HTTP_TIMEOUT = 5.0  # seconds for connecting, and again for each silence
CHECK_EVERY = 300.0  # seconds; the machine is read and the server asked at least so often

_URLSAFE = bytes.maketrans(b"+/", b"-_")
_STANDARD = bytes.maketrans(b"-_", b"+/")


def b64(data: bytes) -> str:
    """base64url without padding, the form of everything binary in tokens and lines."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=").translate(_URLSAFE).decode()


def unb64(text: str) -> bytes:
    """The bytes of a canonical b64 text; ValueError for anything else."""
    try:
        raw = text.encode("ascii")
        data = binascii.a2b_base64(raw.translate(_STANDARD) + b"=" * (-len(raw) % 4))
    except ValueError as bad:  # binascii.Error and UnicodeEncodeError are ValueErrors
        raise ValueError("not base64url") from bad
    if b64(data) != text:
        raise ValueError("not canonical base64url")
    return data


def mac(key: bytes, *parts: bytes) -> str:
    """MAC(key, part, part, …) of docs/protocol.md: keyed BLAKE2b-256 over the parts joined by line feeds, as b64."""
    return b64(blake2b(b"\n".join(parts), key=key, digest_size=32).digest())


def same(a: str, b: str) -> bool:
    """Compare two MACs in constant time, without importing hmac."""
    key = _os.urandom(16)
    return blake2b(a.encode(), key=key).digest() == blake2b(b.encode(), key=key).digest()


def signed(key: bytes, path: str, fields: Words, body: bytes = b"") -> str:
    """The line of a request: the fields and their MAC."""
    line = " ".join((PROTOCOL, *fields))
    return line + " " + mac(key, b"POST " + path.encode(), line.encode(), body)


class BadAnswer(Exception):
    """An answer that proves nothing: no line, a wrong MAC, not HTTP, too large."""


class Answer:
    """A verified answer: status, address seen, server time (unix s), interval (s), body as sent, when it came (monotonic)."""

    def __init__(self, key: bytes, request_mac: str, line: str, body: bytes) -> None:
        fields = line.split(" ")
        if len(fields) != 6 or fields[0] != PROTOCOL:
            raise BadAnswer("the answer is not signed")
        head = " ".join(fields[:5]).encode()
        if not same(fields[5], mac(key, head, request_mac.encode(), body)):
            raise BadAnswer("the answer's signature is wrong: not our server, or altered on the way")
        self.status, self.address = int(fields[1]), fields[2]
        self.time, self.interval = int(fields[3]), int(fields[4])
        self.body, self.at = body, time.monotonic()


def http(
    host: str, port: int, tls: bool, request: bytes, timeout: float = HTTP_TIMEOUT, verify: bool = False
) -> tuple[int, dict[str, str], bytes, str]:
    """Send one HTTP/1.0 request and read the answer to its end: (status, headers by lower-case name, body, own address).

    OSError when the server cannot be reached, BadAnswer when what answers is not HTTP. The deadline is for each silence,
    and eight times that in all: a server that drips cannot hold a check-in up.
    """
    end = time.monotonic() + timeout * 8
    sock = _connected(host, port, timeout)
    try:
        own = sock.getsockname()[0]
        stream: Any = sock
        if tls:
            stream = _wrapped(sock, host, verify)
        stream.sendall(request)
        data = b""
        while True:
            piece = stream.recv(65536)
            if not piece:
                break
            data += piece
            if len(data) > MAX_ANSWER or time.monotonic() > end:
                raise BadAnswer("the answer is too long")
            if _complete(data):
                break
        return (*_parsed(data), own)
    finally:
        sock.close()


def _connected(host: str, port: int, timeout: float) -> Any:
    failure: OSError = OSError(errno.EHOSTUNREACH, "no address")
    # bytes: a str host name would import encodings.idna, stringprep and re
    found = _socket.getaddrinfo(host.encode(), port, 0, _socket.SOCK_STREAM)
    # IPv4 first: only the server sees what a NAT makes of that, an IPv6 address the machine knows itself
    for family, kind, proto, _, address in sorted(found, key=lambda place: place[0]):
        sock = _socket.socket(family, kind, proto)
        sock.settimeout(timeout)
        try:
            sock.connect(address)
            return sock
        except OSError as problem:
            sock.close()
            failure = problem
    raise failure


def _wrapped(sock: Any, host: str, verify: bool) -> Any:
    """TLS over a connected socket. Where the server's key is pinned, the certificate would prove nothing more."""
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if verify:
        context.load_default_certs()
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    timeout = sock.gettimeout()
    wrapped = socket.socket(fileno=_os.dup(sock.fileno()))
    wrapped.settimeout(timeout)
    return context.wrap_socket(wrapped, server_hostname=host)


def _complete(data: bytes) -> bool:
    """Whether the headers name a length and the body has it (else the end of the connection is the end)."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    if head.split(b" ", 2)[1:2] == [b"204"]:
        return True
    at = head.lower().find(b"\r\ncontent-length:")
    length = head[at + 17 :].split(b"\r\n", 1)[0].strip() if at >= 0 else b""
    return 0 <= _number(length) <= len(body)


def _number(text: bytes) -> int:
    """A number in a header; -1 where there is none (int() takes digits of all scripts)."""
    return int(text) if text.isdigit() and len(text) < 16 else -1


def _parsed(data: bytes) -> tuple[int, dict[str, str], bytes]:
    head, found, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    first = lines[0].split(b" ", 2)
    if not found or len(first) < 2 or not first[0].startswith(b"HTTP/") or _number(first[1]) < 0:
        raise BadAnswer("what answers there does not speak HTTP")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    length = _number(headers.get("content-length", "").encode("latin-1"))
    if length >= 0:
        if len(body) < length:
            raise BadAnswer("the answer was cut off")
        body = body[:length]
    return int(first[1]), headers, body


def addresses_of(host: str) -> list[str]:
    try:
        return sorted({str(place[4][0]) for place in _socket.getaddrinfo(host.encode(), 0, 0, _socket.SOCK_STREAM)})
    except OSError:
        return []


def post(host: str, port: int, prefix: str, path: str, line: str, body: bytes = b"") -> bytes:
    """The bytes of a POST with our line, of a GET without one. HTTP/1.0: no chunks, and the connection's end is the answer's."""
    name = f"[{host}]" if ":" in host else host
    verb, more = ("POST", "%s: %s\r\nContent-Length: %d\r\n" % (HEADER, line, len(body))) if line else ("GET", "")
    return ("%s %s%s HTTP/1.0\r\nHost: %s:%d\r\n%s\r\n" % (verb, prefix, path, name, port, more)).encode() + body


def label_key(z: bytes, label: str, agent: bytes, server: bytes, network: str) -> bytes:
    """key(label) of docs/protocol.md, from the shared X25519 secret, both public keys and the network's name."""
    text = b"netmaker-lite 1 " + label.encode() + b"\0" + agent + server + network.encode()
    return blake2b(text, key=z, digest_size=32).digest()


class Secret:
    """`secret-NETWORK`: who we are to one server. One line: the no-change check-in cannot afford json."""

    def __init__(self, network: str, node: str, look: str, agent: bytes, z: bytes, pin: bytes) -> None:
        self.network, self.node, self.look, self.agent, self.z, self.pin = network, node, look, agent, z, pin

    @classmethod
    def parse(cls, network: str, text: str) -> Secret:
        """ValueError for a damaged file."""
        version, node, look, agent, z, pin = text.split()
        keys = [unb64(agent), unb64(z), unb64(pin)]
        if version != PROTOCOL or [len(key) for key in keys] != [32, 32, 32]:
            raise ValueError("cut off, or written by another version")
        return cls(network, node, look, *keys)

    def text(self) -> str:
        return " ".join((PROTOCOL, self.node, self.look, b64(self.agent), b64(self.z), b64(self.pin))) + "\n"

    def key(self, label: str) -> bytes:
        return label_key(self.z, label, self.agent, self.pin, self.network)


class Counters:
    """`NETWORK.state` on tmpfs: what changes at every check-in. Lost without harm."""

    def __init__(self, text: str = "") -> None:
        try:
            self._take(text.split())
        except ValueError:  # too few, too many, no numbers
            self._take(["-", "0", "-1", "-", "p", "-", "0", "-", "-", "-"])

    def _take(self, fields: Words) -> None:
        self.incarnation, epoch, sequence, self.word, self.mode, self.server, due, self.mark, self.interface, self.local = fields
        self.epoch, self.sequence, self.due = int(epoch), int(sequence), float(due)

    def text(self) -> str:
        fields = (self.incarnation, self.epoch, self.sequence, self.word, self.mode)
        more = (self.server, int(self.due), self.mark, self.interface, self.local)
        return " ".join(map(str, fields + more)) + "\n"

    def line(self, secret: Secret, node: str = "", challenge: str = "-", body: bytes = b"") -> str:
        """The line of an exchange; the caller has taken the next sequence number."""
        number = "%d.%d" % (self.epoch, self.sequence)
        head = (node or secret.node, self.mode, self.incarnation, number, challenge, self.word)
        return signed(secret.key("request mac"), EXCHANGE_PATH, (*head, b64(_os.urandom(16))), body)


def split_url(url: str) -> tuple[bool, str, int, str]:
    """(tls, host, port, path prefix) of http[s]://host[:port][/prefix]; ValueError when it is something else."""
    scheme, found, rest = url.partition("://")
    place, _, prefix = rest.partition("/")
    if not found or scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is not an http:// or https:// address")
    host, _, port = place.rpartition(":") if not place.endswith("]") and ":" in place else (place, "", "")
    bracketed = host[:1] == "[" and host[-1:] == "]"
    name = host[1:-1] if bracketed else host
    # what stands here goes into a request: no blank, no control character
    odd = [c for c in name + prefix if c <= " " or c == "\x7f"] or set("@[]?#" if bracketed else "@[]?#:") & set(name)
    if not name or odd or (port and not port.isdecimal()) or not 0 < int(port or 80) < 65536:
        raise ValueError(f"{url!r} is not an http:// or https:// address")
    tls = scheme == "https"
    return tls, name, int(port or (443 if tls else 80)), "/" + prefix.rstrip("/") if prefix else ""


def read_text(path: str) -> str:
    """The text of a small file, "" when it is not there."""
    try:
        handle = _os.open(path, _os.O_RDONLY | _os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        data = b""
        while True:
            piece = _os.read(handle, 65536)
            if not piece:
                return data.decode("utf-8", "replace")
            data += piece
    finally:
        _os.close(handle)


def write_volatile(path: str, text: str) -> None:
    """Replace a file on tmpfs, by rename: no reader sees half of it."""
    flags = _os.O_WRONLY | _os.O_CREAT | _os.O_TRUNC | _os.O_CLOEXEC
    handle = _os.open(path + ".tmp", flags, 0o600)
    try:
        _os.write(handle, text.encode())
    finally:
        _os.close(handle)
    _os.rename(path + ".tmp", path)


def lock(path: str, wait: bool = False) -> int | None:
    """Take the lock file; its descriptor, or None when another run has it."""
    import fcntl

    handle = _os.open(path, _os.O_RDWR | _os.O_CREAT | _os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        _os.close(handle)
        return None


def routes_of(interface: str) -> list[str]:
    """The IPv4 routes of an interface and the default ones, in the kernel's order: shell/netclient-look compares them too."""
    words = (line.split() for line in read_text("/proc/net/route").split("\n"))
    mine = (word for word in words if len(word) > 7 and (word[0] == interface or word[1] == word[7] == "00000000"))
    return [" ".join((word[0], word[1], word[2], word[3], word[7])) for word in mine]


def machine_mark(interface: str) -> str:
    """A hash of what the kernel shows without a child: the interface, its routes and addresses, the default routes.

    What is flushed by hand shows in /proc/net/route and ipv6_route; counters in them are left out.
    """
    seen = [line.split(":")[0].strip() for line in read_text("/proc/net/dev").split("\n") if interface + ":" in line]
    seen += routes_of(interface)
    for line in read_text("/proc/net/if_inet6").split("\n"):
        word = line.split()
        if len(word) > 5 and word[5] == interface:
            seen.append(word[0] + word[2])
    for line in read_text("/proc/net/ipv6_route").split("\n"):
        word = line.split()
        if len(word) > 9 and word[9] != "lo" and (word[9] == interface or word[1] == "00"):
            seen.append(" ".join((word[0], word[1], word[4], word[9])))
    return b64(blake2b("\n".join(sorted(seen)).encode(), digest_size=8).digest())


def root_folder() -> str:
    """NETCLIENT_ROOT: another place for the whole tree (tests, containers); "" is /."""
    environment: Any = getattr(_os, "environb", _os.environ)
    return str(environment.get(b"NETCLIENT_ROOT", b"").decode()).rstrip("/")


DOWN = "down"  # in place of a server: the user has taken this network down
HANDED_OVER: dict[str, tuple[int, Answer | None]] = {}  # networks that the quick pass has locked, and its answer
QUICKLY_DONE: set[str] = set()  # networks for which it was enough


def glance(network: str) -> bool:
    """The no-change check-in of one network: one request, one answer of 204, no child process. False: it wants a full one."""
    root = root_folder()
    held = lock(root + "/var/run/netclient/" + network + ".lock")
    if held is None:
        return True
    HANDED_OVER[network] = (held, None)
    path = root + "/var/run/netclient/" + network + ".state"
    counters = Counters(read_text(path))
    if counters.server == DOWN:
        del HANDED_OVER[network]
        _os.close(held)
        QUICKLY_DONE.add(network)
        return True
    left = counters.due - time.monotonic()
    if not 0 < left <= CHECK_EVERY or counters.mark != machine_mark(counters.interface):
        return False
    secret = Secret.parse(network, read_text(root + "/etc/netclient/config/secret-" + network))
    tls, host, port, prefix = split_url(counters.server)
    counters.sequence += 1
    write_volatile(path, counters.text())
    line = counters.line(secret)
    _, headers, body, own = http(host, port, tls, post(host, port, prefix, EXCHANGE_PATH, line))
    answer = Answer(secret.key("answer mac"), line.rpartition(" ")[2], headers.get(HEADER.lower(), ""), body)
    if answer.status == 204 and own == counters.local:
        del HANDED_OVER[network]
        _os.close(held)
        QUICKLY_DONE.add(network)
        return True
    HANDED_OVER[network] = (held, answer)
    return False


def proxy_is_set() -> bool:
    environment: Any = getattr(_os, "environb", _os.environ)
    return any(environment.get(name) for name in (b"http_proxy", b"https_proxy", b"HTTPS_PROXY", b"all_proxy", b"ALL_PROXY"))


def quick_checkin(arguments: Words) -> bool:
    """`checkin [-n NETWORK|all]` where nothing is new: True. What is unusual is left to the rest."""
    wanted = list(arguments[1:])
    known = wanted[:1] in ([], ["-n"], ["--network"]) and len(wanted) in (0, 2)
    if arguments[:1] != ["checkin"] or not known or proxy_is_set():
        return False
    try:
        names = [name[7:] for name in _os.listdir(root_folder() + "/etc/netclient/config") if name.startswith("secret-")]
        names = names if wanted[1:] in ([], ["all"]) else [name for name in names if name == wanted[1]]
        return bool(names) and not [name for name in sorted(names) if not glance(name)]
    except (BadAnswer, OSError, ValueError):
        return False


if __name__ == "__main__":
    if quick_checkin(sys.argv[1:]):
        _os._exit(0)
    if sys.flags.no_site:  # `python3 -I -S`, as launchers start it: the rest may want PyNaCl
        import site

        site.main()

# --------------------
# IMPORTS
# --------------------
# Only what OpenWrt's python3-light and python3-openssl hold.

import argparse
import contextlib
import ipaddress
import json
import os
import re
import signal
import subprocess
import threading
from enum import IntEnum
from typing import NamedTuple

# --------------------
# ERRORS
# --------------------


class ExitStatus(IntEnum):
    """What the process returns: 0 also for pending, locked by another run, nothing joined."""

    OK = 0
    FAILED = 1
    USAGE = 2


class NetclientError(Exception):
    """An expected failure: one sentence with cause and cure for the user, no traceback."""

    status = ExitStatus.FAILED


class UsageError(NetclientError):
    """The command line asks for something that makes no sense."""

    status = ExitStatus.USAGE


class Invalid(NetclientError, ValueError):
    """A value from outside (token, file, answer, flag) is not what it must be."""

    status = ExitStatus.USAGE


class Unreachable(NetclientError):
    """No server of the list gave an answer that proves itself: nothing may change."""


MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading odd JSON may raise


class Refused(NetclientError):
    """The genuine server said no. `answer` is what it said; `code` its HTTP status."""

    def __init__(self, code: int, answer: Any) -> None:
        said = answer.get("error") or answer.get("message") if isinstance(answer, dict) else ""
        super().__init__(str(said or "the server answers %d without a word" % code)[:500])
        self.code, self.answer = code, answer or {}


class CommandFailed(NetclientError):
    """A program that we started returned another status than 0, or is not there."""

    def __init__(self, argv: Words, code: int, stderr: str) -> None:
        lines = [line.strip() for line in stderr.splitlines() if line.strip(" ^~\t")] or ["no message"]
        said = next((line for line in lines if "rror" in line), lines[-1])  # nft shows the place after it
        super().__init__("`%s` failed (status %d): %s" % (" ".join(argv[:8]), code, said))
        self.code, self.stderr = code, stderr


# --------------------
# TOKENS
# --------------------
# What server and agent must agree on. The server imports it from here.

CURVE_P = 2**255 - 19
KEY_BYTES = 32
ACCESS_KEY = r"([\w-]{1,32}\.[\w-]{22,86})?"


class Token(NamedTuple):
    """An access token opened: servers in the order to try, the pinned key or b"", the network, "id.secret" or ""."""

    servers: tuple[str, ...]
    pin: bytes
    network: str
    key: str


def _sum(raw: str) -> str:
    return blake2b(raw.encode(), digest_size=4).hexdigest()


def make_token(token: Token) -> str:
    """The text of a token: b64 of one JSON object that ends in its own checksum."""
    fields = {"v": 1, "server": list(token.servers), "pin": b64(token.pin), "network": token.network, "key": token.key}
    raw = json.dumps(fields, separators=(",", ":"))
    return b64((f'{raw[:-1]},"sum":"{_sum(raw)}"}}').encode())


def parse_token(text: str) -> Token:
    """Open a token, ours or Netmaker 0.8's. Invalid, with a sentence that tells damage from nonsense."""
    compact = "".join(text.split())
    try:
        padded = compact.translate(str.maketrans("-_", "+/")).rstrip("=")
        raw = binascii.a2b_base64(padded + "=" * (-len(padded) % 4)).decode()
        fields = json.loads(raw)
    except (ValueError, RecursionError) as bad:
        raise Invalid("the token is damaged or cut off: copy the whole line again, with nothing around it") from bad
    if isinstance(fields, dict) and "apiconn" in fields:
        return _original_token(fields)
    if not isinstance(fields, dict) or "v" not in fields:
        raise Invalid("this is not an access token: ask the server's administrator for one (netmaker-lite key add NETWORK)")
    if fields["v"] != 1:
        raise Invalid("the token is of version {!r}, which this agent does not know: update netclient-lite".format(fields["v"]))
    body, found, rest = raw.rpartition(',"sum":"')
    if not found or rest != _sum(body + "}") + '"}' or b64(raw.encode()) != compact:
        raise Invalid("the token is damaged (its checksum does not fit): copy the whole line again")
    try:
        servers = tuple(server for server in fields["server"] if split_url(server))
        token = Token(servers, unb64(fields["pin"]), check_network(fields["network"]), fields["key"])
        if not servers or len(token.pin) != KEY_BYTES or not re.fullmatch(ACCESS_KEY, token.key, re.ASCII):
            raise Invalid("no server, no key of it, or an access key of another form")
        return token
    except MALFORMED as bad:
        raise Invalid(f"the token is whole but says something impossible ({bad}): ask for another") from bad


def _original_token(fields: Fields) -> Token:
    """Netmaker 0.8's flat token. It carries no pin."""
    place = str(fields.get("apiconn") or "")
    server = place if "://" in place else "http://" + place
    try:
        split_url(server)
        return Token((server,), b"", check_network(str(fields.get("network", ""))), str(fields.get("key", "")))
    except ValueError as bad:
        raise Invalid(f"the token names no usable server or network ({bad})") from bad


def check_network(name: str) -> str:
    """A network's name, folded to lower case: 1-12 of letters, digits, `.`, `_`, `-`, a letter or digit first; not `all`."""
    folded = name.lower()
    # one with an empty label would end a nameserver; .tmp: a file half written
    if not re.fullmatch(r"(?!.*\.(?:\.|tmp$|$))[a-z0-9][a-z0-9._-]{0,11}", folded):
        raise Invalid(f"{name!r} is no network name: 1-12 letters, digits, '-', '_', single dots inside; letter or digit first")
    if folded == "all":
        raise Invalid("a network cannot be called 'all': that word means every network")
    return folded


def check_name(name: str) -> str:
    """A node's name, folded to lower case: a DNS label (RFC 1123) of 1-62 characters."""
    folded = name.lower()
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?", folded):
        raise Invalid(f"{name!r} is no node name: 1 to 62 letters, digits or '-', no '-' at either end")
    return folded


def check_host_name(name: str) -> str:
    """Labels of letters, digits and '-' with dots between them, folded: what stands before `.NETWORK` in a name."""
    folded = name.lower()
    if len(folded) > 192 or not all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", label) for label in folded.split(".")):
        raise Invalid(f"{name!r:.200} is no host name: letters, digits and '-', with dots between the parts")
    return folded


def fold_name(text: str) -> str:
    """The nearest node name to any host name: its first label, folded; "node" where nothing is left."""
    folded = re.sub(r"[^a-z0-9]+", "-", text.lower().split(".")[0]).strip("-")
    return folded[:62].rstrip("-") or "node"


def check_interface(name: str) -> str:
    """An interface name that is safe in a path and on a command line: 1-15 characters."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", name):
        raise Invalid(f"{name!r} is no interface name: 1 to 15 letters, digits, '_', '.' or '-', no '.' or '-' first")
    return name


def check_key(text: str) -> str:
    """A WireGuard public key: the one canonical base64 of 32 bytes."""
    try:
        raw = binascii.a2b_base64(text.encode("ascii"))
        if len(raw) == KEY_BYTES and binascii.b2a_base64(raw, newline=False).decode() == text and any(raw):
            return text
    except ValueError:
        pass
    raise Invalid(f"{text!r} is no WireGuard key: 44 characters of base64 that end in '='")


def check_address(text: str, version: int = 0) -> str:
    """An IP address in its canonical text; IPv4-mapped IPv6 becomes IPv4. `version` 4 or 6 asks for that kind."""
    try:
        address = ipaddress.ip_address(str(text))  # it takes numbers too
    except ValueError as bad:
        raise Invalid(f"{text!r} is no IP address") from bad
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if version and address.version != version:
        raise Invalid("%s is no IPv%d address" % (text, version))
    if "%" in str(address):
        raise Invalid(f"{text!r} has a zone, which means nothing on another machine")
    return str(address)


def check_port(value: Any) -> int:
    """A port that a node may listen on: 1024-65535, as in the original."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1024 <= value <= 65535:
        raise Invalid(f"{value!r} is no port: a whole number from 1024 to 65535")
    return value


def endpoint(address: str, port: int) -> str:
    """`203.0.113.7:51821` or `[2001:db8::7]:51821`, as `wg` writes and reads it."""
    return ("[%s]:%d" if ":" in address else "%s:%d") % (address, port)


def split_endpoint(text: str) -> tuple[str, int]:
    """(canonical address, port) of an endpoint; Invalid when it is none. A host name is none: no DNS."""
    place, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536 or (":" in place) != place.startswith("["):
        raise Invalid(f"{text!r} is no endpoint: ADDRESS:PORT or [ADDRESS]:PORT")
    return check_address(place.strip("[]")), int(port)


NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "224.0.0.0/3", "::/127", "fc00::/7", "fe80::/10", "ff00::/8"),
    )
)


def is_public(address: str) -> bool:
    """Whether the internet may reach the address. (ipaddress.is_global turns down documentation ranges too.)"""
    parsed = ipaddress.ip_address(address)
    return not any(parsed.version == block.version and parsed in block for block in NOT_PUBLIC)


def x25519(scalar: bytes, point: bytes) -> bytes:
    """X25519 (RFC 7748 §5): PyNaCl's where it is installed, else the Montgomery ladder. Invalid for an all-zero outcome (§6.1).

    The ladder does not run in constant time. The agent uses it at join, and once for each new key.
    """
    try:
        from nacl.bindings import crypto_scalarmult
    except ImportError:
        shared = ladder(scalar, point)
    else:
        try:
            shared = crypto_scalarmult(scalar, point)
        except Exception:  # PyNaCl raises its own RuntimeError for an all-zero outcome
            shared = bytes(KEY_BYTES)
    if not any(shared):
        raise Invalid("the other side's key is not a usable curve point: somebody tampers with the exchange")
    return shared


def ladder(scalar: bytes, point: bytes) -> bytes:
    """The ladder of RFC 7748 §5, in its own names: k clamped, u with its top bit masked."""
    k = int.from_bytes(scalar, "little") & ~7 & ~(1 << 255) | 1 << 254
    u = int.from_bytes(point, "little") & (1 << 255) - 1
    x_1, x_2, z_2, x_3, z_3 = u, 1, 0, u, 1
    swap = 0
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if swap ^ bit:
            x_2, x_3, z_2, z_3 = x_3, x_2, z_3, z_2
        swap = bit
        a, b, c, d = x_2 + z_2, x_2 - z_2, x_3 + z_3, x_3 - z_3
        da, cb, aa, bb = d * a, c * b, a * a, b * b
        e = aa - bb
        x_3, z_3 = (da + cb) ** 2 % CURVE_P, x_1 * (da - cb) ** 2 % CURVE_P
        x_2, z_2 = aa * bb % CURVE_P, e * (aa + 121665 * e) % CURVE_P
    if swap:
        x_2, z_2 = x_3, z_3
    return (x_2 * pow(z_2, CURVE_P - 2, CURVE_P) % CURVE_P).to_bytes(KEY_BYTES, "little")


def public_key(scalar: bytes) -> bytes:
    return x25519(scalar, b"\x09" + bytes(KEY_BYTES - 1))


def key_proof(secret: bytes, proof_key: bytes, nonce: bytes) -> str:
    """The proof that a joiner holds an access key, which itself never travels."""
    return b64(blake2b(proof_key + nonce, key=secret, digest_size=32).digest())


def secret_box(key: bytes) -> Any:
    """PyNaCl's SecretBox, or None where PyNaCl is not installed."""
    try:
        from nacl.secret import SecretBox
    except ImportError:
        return None
    return SecretBox(key)


def unseal(box: Any, body: bytes) -> bytes:
    """Open a sealed body; BadAnswer when it does not open. An empty body stays empty."""
    try:
        return bytes(box.decrypt(body)) if body else b""
    except Exception as bad:  # CryptoError, ValueError, TypeError: all mean the same here
        raise BadAnswer("a sealed body does not open") from bad


# --------------------
# SETTINGS
# --------------------


class Setting(NamedTuple):
    """One flag: name without dashes, environment name, meaning, the other spellings that the original takes."""

    name: str
    env: str
    help: str
    kind: str  # text | yesno | number | daemon
    aliases: tuple[str, ...]
    metavar: str
    bounds: tuple[int, int]


def _setting(line: str) -> Setting:
    name, env, kind, aliases, metavar, bounds, text = re.split(r" *\| *", line.strip())
    low, _, high = bounds.partition("-")
    known = kind or "text", tuple(aliases.split()), metavar, (int(low or 0), int(high or 0))
    return Setting(name, "NETCLIENT_" + (env or name.replace("-", "_").upper()), text, *known)


# name | environment name, where it is another, without NETCLIENT_ | kind | aliases | metavar | bounds | help
_SETTINGS = """\
network || | n | NET || network, or all (default)
token | ACCESSTOKEN || t ||| access token: server, network and access key in one
key | ACCESSKEY || k ||| access key (with --apiserver and -n)
apiserver | API_SERVER ||| HOST:PORT || HOST:PORT or URL of the server
server-key |||| K || the server's key, as `netmaker-lite serve` prints it
name |||||| name of this node (default: the host name)
endpoint ||| e | IP || public address; never replaced
port || number || PORT | 1024-65535 | UDP port to listen on; never replaced
address ||| a | IP || wished overlay address
address6 | ADDRESSIPV6 || addressIPv6 addressipv6 a6 | IP || wished IPv6 overlay address
interface ||| i | IF || interface to make (default nm-NETWORK)
localaddress |||| IP || this machine's address in its LAN
localrange |||| CIDR || the LAN to take the local address from
islocal | IS_LOCAL | yesno |||| others shall use the local address
dnson | DNS | yesno |||| set up names (default yes)
keepalive || number || S | 0-1000 | seconds between keepalives, 0 for none (default: the network's)
mtu || number || BYTES | 576-9200 | MTU of the interface (default: the network's)
udpholepunch | UDP_HOLEPUNCH | yesno |||| use the endpoints that other nodes see
ipforwarding || yesno |||| let this node forward (default yes)
roaming || yesno |||| follow changes of the own address (default yes)
accept-hooks || yesno |||| run the commands that the server has for this node (default no)
publickey ||| pubkey | KEY || WireGuard public key (with --privatekey)
privatekey ||| privkey | KEY || WireGuard private key (better by environment)
daemon || daemon |||| on: a check-in every 15 s (default); resident: stay; off: no service
server-data |||| DIR || of the server on this host: be in its networks as it says there
"""
SETTINGS = tuple(map(_setting, _SETTINGS.splitlines()))

# The original's that mean nothing here: taken, with a word.
IGNORED = {
    name: "NETCLIENT_" + env
    for name, env in {
        **{"grpcserver": "GRPC_SERVER", "password": "PASSWORD", "macaddress": "MACADDRESS", "operatingsystem": "OS"},
        **{"isdualstack": "IS_DUALSTACK", "postup": "POSTUP", "postdown": "POSTDOWN", "corednsaddr": "COREDNS_ADDR"},
    }.items()
}
IGNORED_ALIASES = {"p": "password", "m": "macaddress", "os": "operatingsystem"}

WISHES = ("name", "address", "address6", "keepalive", "mtu", "dnson", "roaming", "ipforwarding", "udpholepunch", "islocal")

YES = ("yes", "on", "true", "1")
NO = ("no", "off", "false", "0")


def setting_value(setting: Setting, text: str) -> Any:
    """The value of a flag or environment variable; UsageError with the words that would be right."""
    if setting.kind == "text":
        return text
    low = text.lower()
    if setting.kind == "yesno":
        if low not in YES + NO:
            raise UsageError(f"--{setting.name} takes yes or no, not {text!r}")
        return low in YES
    if setting.kind == "daemon":
        word = {"yes": "on", "true": "on", "no": "off", "false": "off"}.get(low, low)
        if word not in ("on", "off", "resident"):
            raise UsageError(f"--daemon takes on, off or resident, not {text!r}")
        return word
    least, most = setting.bounds
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UsageError(f"--{setting.name} takes a whole number from {least} to {most}, not {text!r}")
    return int(text)


MEMBERSHIP = ("wgkey", "nettoken", "secret", "netconfig")  # written in this order: with the last one it exists


class Paths:
    """Where the agent's files are, below a root that may be moved. `stage` is where a join is prepared."""

    def __init__(self, root: str, stage: str = "") -> None:
        self.root = root
        self.home = root + "/etc/netclient"
        self.config = self.home + "/" + (stage or "config")
        self.run = root + "/var/run/netclient" + ("/" + stage if stage else "")

    def staged(self) -> Paths:
        """The same for a join that the server has not accepted yet: what is there stays until then."""
        return Paths(self.root, "joining")

    def of(self, kind: str, network: str) -> str:
        """`netconfig`, `wgkey`, `secret`, `nettoken` and `peers` lie on flash, `lock`, `state` and `memory` on tmpfs."""
        if kind in ("lock", "state", "memory", "seen"):
            return f"{self.run}/{network}.{kind}"
        return f"{self.config}/{kind}-{network}"

    def networks(self) -> list[str]:
        try:
            names = os.listdir(self.config)
        except OSError:
            return []
        return sorted(name[10:] for name in names if name.startswith("netconfig-") and not name.endswith(".tmp"))


# --------------------
# VALUES
# --------------------

FRESH = 180  # seconds: WireGuard's REJECT_AFTER_TIME; a session older than that carries nothing
KEEP_AFTER_RESTORE = 3600.0  # seconds that peers unknown to a restored server stay
UNSETTLED = 120.0  # seconds after a change of peers in which every look ends in an exchange
HOPELESS = 600.0  # seconds after which a peer without a handshake is no reason to hurry any more
PEERS_AT_ONCE = 4000  # in one `wg set`: some 200 bytes each
DEAF = 3600.0  # seconds until a local address that did not answer is tried before the public ones again
SWITCH_AFTER = 0.3  # seconds by which a node changes its key later than all others
SWITCH_WITHIN = 3.0  # seconds in which its handshake follows, or the others go back
DIRECT = "direct:"  # before a node in `in` of an answer: when it needs no relay any more
LONGEST = 900.0  # seconds that a change of a key may be ahead
MUTE = 57.0  # seconds without a handshake until the server hears of it: four check-ins, which are no clocks
TURN = 20.0  # seconds an endpoint candidate is tried before the next: four handshake attempts (REKEY_TIMEOUT 5 s)


class Step(NamedTuple):
    """One command of a plan: its arguments, its standard input (secrets too), and why it is there."""

    argv: tuple[str, ...]
    why: str
    stdin: str = ""
    secret: bool = False  # standard input is never shown
    detached: bool = False  # it stays as a daemon


class Peer(NamedTuple):
    """A peer as it shall be. endpoint "": whatever it is now."""

    key: str
    endpoint: str
    allowed: frozenset[str]
    keepalive: int
    preshared: str = ""


class LivePeer(NamedTuple):
    """A peer as `wg show dump` tells: handshake in unix seconds (0: never), rx and tx in bytes."""

    key: str
    endpoint: str
    allowed: frozenset[str]
    keepalive: int
    handshake: int
    rx: int
    tx: int
    preshared: str = ""


class Actual(NamedTuple):
    """An interface as it is. The routes include those that the kernel made for the addresses."""

    exists: bool = False
    private: str = ""
    port: int = 0
    mtu: int = 0
    up: bool = False
    addresses: tuple[str, ...] = ()  # as Linux lists them: the primary one of a network before the secondary ones
    routes: frozenset[str] = frozenset()
    peers: Mapping[str, LivePeer] = {}
    public: str = ""


class Desired(NamedTuple):
    """An interface as it shall be. Addresses with the network's mask; routes beyond those that the addresses bring."""

    interface: str
    private: str
    port: int
    mtu: int
    addresses: frozenset[str]
    routes: frozenset[str]
    peers: Mapping[str, Peer]


class Flow(NamedTuple):
    """Packets of IPv4 or IPv6 between two interfaces; "": any. `back`: only the answers."""

    version: int
    entry: str
    exit: str
    source: str = ""
    target: str = ""
    back: bool = False


class Rules(NamedTuple):
    """What a gateway lets through, and what leaves it with its own address; the WireGuard port that must be open."""

    interface: str
    port: int
    passed: tuple[Flow, ...]
    masked: tuple[Flow, ...]
    closed: bool = False  # it forwarded nothing before: nothing else from the mesh may go through now


class Place(NamedTuple):
    """Where this machine stands: the address that the server sees, own subnets, LAN hash, the kind of network, ways out."""

    seen: str = ""
    subnets: tuple[str, ...] = ()
    lan: str = ""
    local_only: bool = False
    punch: bool = True
    ways: frozenset[int] = frozenset()  # 4, 6: which of them lead to the internet; none known: both are tried


class Kept:
    """Values that outlive a run: the annotated attributes are the fields with their defaults; JSON on disk."""

    def __init__(self, values: Fields | None = None) -> None:
        for name in type(self).__annotations__:
            default = getattr(type(self), name)
            value = (values or {}).get(name, default)
            setattr(self, name, type(default)(value) if isinstance(default, (dict, list)) else value)

    def values(self) -> Row:
        return {"version": 1, **vars(self)}


class Config(Kept):
    """`netconfig-NETWORK`: what the user asked for and which server it is; changes rarely."""

    network: str = ""
    servers: list[str] = []
    interface: str = ""
    port: int = 0
    fixed: bool = False
    endpoint: str = ""
    localaddress: str = ""
    localrange: str = ""
    keyed: bool = False  # the user gave the WireGuard key
    wishes: Row = {}
    accept_hooks: bool = False  # run what the server's administrator wants run here
    daemon: str = "on"
    down: bool = False  # taken down by its user
    hub: str = ""  # the server's URL inside of this network's tunnel
    hosted: str = ""  # the data folder of the server that has its own host join

    @classmethod
    def parse(cls, text: str) -> Config:
        """Invalid for a damaged file. Fields of a newer version are left alone, missing ones get their default."""
        try:
            values = json.loads(text)
            if values["version"] != 1:
                raise Invalid("it was written by a newer netclient-lite")
            return cls(values)
        except MALFORMED as bad:
            raise Invalid(f"the file is damaged ({bad})") from bad

    def text(self) -> str:
        return json.dumps(self.values(), indent=1, sort_keys=True) + "\n"


class View(Kept):
    """The mesh as the server last told it: own settings, the records of all nodes by id, the word."""

    incarnation: str = "-"
    word: str = "-"
    state: str = ""
    me: Row = {}
    peers: dict[str, Row] = {}
    names: dict[str, list[str]] = {}  # those that no node has, with their addresses
    endpoints: dict[str, str] = {}  # by public key: the last that had a handshake


class Memory(Kept):
    """`NETWORK.memory` on tmpfs: the view in use and what was reported of it. Times are of the monotonic clock."""

    facts: Row = {}
    wishes: Row = {}
    seen: dict[str, str] = {}
    mute: dict[str, bool] = {}
    # by key: bytes received and when that changed, the last handshake and when that was, bytes sent
    rx: dict[str, list[int]] = {}
    deaf: dict[str, float] = {}  # by key: until when its local address is not tried first
    found: dict[str, str] = {}  # by node: its endpoint in this LAN, as it says there
    homes: list[str] = []  # the own LAN addresses, when last looked at
    moved: float = 0.0  # when they were others before
    lonely: bool = False  # nodes are lost in the LAN, and nobody there knows of them
    waiting: dict[str, float] = {}  # by key: since when without a handshake
    renewed: dict[str, float] = {}  # by key: when there was something new to try meanwhile
    kept: dict[str, float] = {}  # by node: until when, after a restore
    switch: dict[str, float] = {}  # by node: when its key changes
    passed: dict[str, int] = {}  # by old key: its last handshake when the new one took over
    unsettled: float = 0.0
    flashed: float = 0.0
    exchanged: float = 0.0
    trial: Row | None = None  # the view before a change that the server has not confirmed
    rejected: dict[str, str] = {}
    said: str = ""
    warned: dict[str, list[str]] = {}
    server: list[str] = []  # its addresses when its name last resolved
    hooks: list[str] = []  # the server's PostUp and PostDown, of which the first has run
    unhooked: str = ""  # what went wrong with that
    names: str = ""  # how names are set up
    named: float = 0.0  # when they were last written to flash

    def __init__(self, values: Fields | None = None) -> None:
        super().__init__(values)
        self.view = View((values or {}).get("view"))

    def text(self) -> str:
        return json.dumps({**self.values(), "view": self.view.values()}, separators=(",", ":"))


# --------------------
# PARSE
# --------------------


def inside(address: str, networks: Iterable[str]) -> bool:
    parsed = ipaddress.ip_address(address)
    return any(parsed in ipaddress.ip_network(text, strict=False) for text in networks)


def parse_dump(text: str) -> Actual:
    """`wg show IF dump`: a line for the interface, one for each peer, fields parted by tabs."""
    lines = [line.split("\t") for line in text.splitlines() if line]
    try:
        if not lines or len(lines[0]) != 4 or any(len(line) != 8 for line in lines[1:]):
            raise ValueError("other fields")
        private = "" if lines[0][0] == "(none)" else lines[0][0]
        peers = {line[0]: _live_peer(line) for line in lines[1:]}
        return Actual(True, private, int(lines[0][2]), peers=peers, public=lines[0][1])
    except ValueError as bad:
        raise Invalid(f"`wg show … dump` printed something that this agent cannot read ({bad})") from bad


def _live_peer(field: Words) -> LivePeer:
    try:
        where = endpoint(*split_endpoint(field[2]))
    except Invalid:  # (none), or an odd one that its peer chose, which must not stop us
        where = ""
    allowed = frozenset() if field[3] == "(none)" else frozenset(field[3].split(","))
    keepalive = 0 if field[7] == "off" else int(field[7])
    preshared = "" if field[1] == "(none)" else field[1]
    return LivePeer(field[0], where, allowed, keepalive, int(field[4]), int(field[5]), int(field[6]), preshared)


class Link(NamedTuple):
    """An interface: whether up, MTU, addresses with prefix length; whether it is a tunnel."""

    up: bool
    mtu: int
    addresses: list[str]
    tunnel: bool = False


def parse_links(text: str) -> dict[str, Link]:
    """`ip addr show` of iproute2 or BusyBox, without link-local addresses."""
    links: dict[str, Link] = {}
    name = ""
    for line in text.splitlines():
        head = re.match(r"\d+: ([^:@\s]+)(?:@[^:]*)?: <([^>]*)>.* mtu (\d+)", line)
        if head:
            name = head.group(1)
            links[name] = Link("UP" in head.group(2).split(","), int(head.group(3)), [])
            continue
        if name and re.match(r"\s+link/(none|\[65534\])", line):  # WireGuard, TUN: no hardware below it
            links[name] = links[name]._replace(tunnel=True)
        address = re.match(r"\s+inet6? (\S+)(?: peer (\S+))?", line)
        if address and name:
            with contextlib.suppress(ValueError):
                parsed = ipaddress.ip_interface(address.group(1))  # a point-to-point one comes without a length
                if not parsed.is_link_local:
                    links[name].addresses.append(str(parsed))
    return links


def parse_routes(text: str) -> frozenset[str]:
    """`ip route show dev IF`: the destinations, as networks; without default, link-local and multicast ones."""
    found = set()
    for line in text.splitlines():
        word = line.split()
        if not word or word[0] in ("default", "unreachable", "blackhole", "broadcast", "multicast", "local", "anycast"):
            continue
        try:
            network = ipaddress.ip_network(word[0])
        except ValueError:
            continue
        if not network.is_link_local and not network.is_multicast:
            found.add(str(network))
    return frozenset(found)


def parse_ways(text: str, version: int) -> list[tuple[str, str]]:
    """`ip route show`: destinations and the interfaces that they leave by, in its order (the lower metric first)."""
    found = []
    for line in text.splitlines():
        way = re.match(r"(default|[0-9a-f.:/]+) (?:.* )?dev (\S+)", line)
        if way:
            with contextlib.suppress(ValueError):
                place = ("0.0.0.0/0" if version == 4 else "::/0") if way.group(1) == "default" else way.group(1)
                found.append((str(ipaddress.ip_network(place)), way.group(2)))
    return found


def parse_ruleset(text: str) -> dict[tuple[str, ...], list[str]]:
    """`nft -a list ruleset`: the lines of each chain by family, table and chain."""
    chains: dict[tuple[str, ...], list[str]] = {}
    table: tuple[str, ...] = ()
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(\t?)(table|chain|set|map|flowtable) (.+?) \{", line)
        if head and not head.group(1):
            table = tuple(head.group(3).split())
        elif head:
            lines = chains.setdefault((*table, head.group(3)), []) if head.group(2) == "chain" else []
        elif line.startswith("\t\t"):
            lines.append(line.strip())
    return chains


def parse_default_gateway(text: str) -> tuple[str, str]:
    """(interface, gateway) of the IPv4 default route with the lowest metric, from /proc/net/route; ("", "") without one."""
    best = (1 << 32, "", "")
    for line in text.splitlines()[1:]:
        word = line.split()
        if len(word) > 7 and word[1] == word[7] == "00000000":
            with contextlib.suppress(ValueError):
                # the kernel prints it in the machine's own byte order
                gateway = bytes.fromhex(word[2])[:: -1 if sys.byteorder == "little" else 1]
                best = min(best, (int(word[6]), word[0], str(ipaddress.IPv4Address(gateway))))
    return best[1:]


def parse_arp(text: str, address: str) -> str:
    """The MAC of an address in /proc/net/arp, "" when it is not (completely) known."""
    for line in text.splitlines()[1:]:
        word = line.split()
        if len(word) > 3 and word[0] == address and word[3] != "00:00:00:00:00:00":
            return word[3].lower()
    return ""


RECORD: dict[str, Callable[[Any], Any]] = {
    "next": check_key,
    "ip": lambda text: check_address(text, 4),
    "ip6": lambda text: check_address(text, 6),
    "ips": lambda texts: [str(ipaddress.ip_network(str(text))) for text in texts],
    "via": str,
    **dict.fromkeys(("static", "at", "seen", "local", "local6"), lambda text: endpoint(*split_endpoint(text))),
}


def parse_record(record: Any) -> Row:
    """Check one peer record of the server: an odd one must not reach a command line. Unknown fields are dropped."""
    if not isinstance(record, dict):
        raise Invalid("a peer record is no object")
    clean: Row = {"id": str(record["id"]), "name": check_name(record["name"]), "key": check_key(record["key"])}
    for kind, check in RECORD.items():
        if record.get(kind):
            clean[kind if kind != "next" else "spare"] = check(record[kind])
    if re.fullmatch(r"[0-9a-f]{1,16}", record.get("lan") or ""):
        clean["lan"] = record["lan"]
    return clean


def parse_clients(told: Any, homes: Words) -> list[Row]:
    """External clients that a gateway lets in: what they own lies in the network's ranges."""
    found = []
    for each in told["clients"]:
        client: Row = {"id": str(each["id"]), "key": check_key(each["key"]), "internet": each.get("internet") is True}
        client.update({kind: check_address(each[kind], version) for kind, version in (("ip", 4), ("ip6", 6)) if each.get(kind)})
        if not re.fullmatch("[0-9a-f]{16}", client["id"]) or not all(
            inside(client[kind], homes) for kind in ("ip", "ip6") if kind in client
        ):
            raise Invalid("an external client is odd, or its address is not the network's")
        found.append(client)
    return found


def parse_me(me: Any) -> Row:
    """Check the server's settings for this node."""
    if not isinstance(me, dict):
        raise Invalid("own settings are no object")
    clean: Row = {"name": check_name(me["name"]), "look": str(me.get("look", "-"))}
    for kind, version, width in (("ip", 4, "range"), ("ip6", 6, "range6")):
        if me.get(kind):
            clean[kind] = check_address(me[kind], version)
            network = ipaddress.ip_network(str(me[width]))
            if ipaddress.ip_address(clean[kind]) not in network:
                raise Invalid(f"the own address {clean[kind]} is not in {network}")
            clean[width] = str(network)
    clean["port"] = check_port(me["port"])
    for kind, low in (("keepalive", 0), ("mtu", 576)):
        if isinstance(me[kind], bool) or not isinstance(me[kind], int) or not low <= me[kind] <= 65535:
            raise Invalid(f"{kind} is {me[kind]!r}")
        clean[kind] = me[kind]
    for kind, usual in (("dns", True), ("forwarding", True), ("punch", True), ("local", False), ("refresh", False)):
        clean[kind] = me.get(kind, usual) is True
    if me.get("ingress"):
        clean["clients"] = parse_clients(me["ingress"], [clean[width] for width in ("range", "range6") if width in clean])
    clean["deny"] = [str(node) for node in me.get("deny", ())]
    clean["relayed"] = {str(node): str(relay) for node, relay in me.get("relayed", {}).items()}
    clean["interface"] = check_interface(me.get("interface") or "nm-")
    clean["forward"] = me.get("forward") is True
    if me.get("egress"):
        egress = me["egress"]
        ranges = [str(ipaddress.ip_network(str(text))) for text in egress["ranges"]]
        interface = check_interface(egress["interface"]) if egress.get("interface") else ""
        clean["egress"] = {"ranges": ranges, "interface": interface, "nat": egress.get("nat", True) is True}
    if me.get("server"):
        _, host, port, _ = split_url(me["server"])
        if not inside(host, [clean[width] for width in ("range", "range6") if width in clean]):
            raise Invalid(f"{host} is no address of the network")
        clean["server"] = "http://" + endpoint(check_address(host), port)
    if me.get("localrange"):
        clean["localrange"] = str(ipaddress.ip_network(me["localrange"]))
    if me.get("hooks"):
        clean["hooks"] = [str(text) for text in me["hooks"]][:2]
    if me.get("nameserver"):
        clean["nameserver"] = check_address(me["nameserver"])
    if me.get("group"):
        clean["group"] = b64(unb64(me["group"]))
    return clean


def parse_news(view: View, news: Any) -> View:
    """The view after a 200: a delta laid over what is known, or a snapshot. BadAnswer when it does not fit."""
    try:
        after = View(view.values())
        after.word, after.state = str(news["word"]), str(news.get("state", "active"))
        if not re.fullmatch(r"[0-9]{1,15}\.[0-9a-f]{8}", after.word):
            raise Invalid(f"the revision word is {after.word!r}")
        if "from" not in news:
            after.peers = {}
        elif news["from"] != view.word:
            raise Invalid("a delta from {} was not asked for".format(news["from"]))
        for node in news.get("gone", ()):
            after.peers.pop(str(node), None)
        for record in map(parse_record, news.get("peers", ())):
            after.peers[record["id"]] = record
        if "me" in news:
            after.me = parse_me(news["me"])
        if "names" in news or "from" not in news:
            told = news.get("names", {}).items()
            after.names = {check_host_name(name): [*map(check_address, addresses)] for name, addresses in told}
        return after
    except MALFORMED as bad:
        raise BadAnswer(f"the server sent something that this agent does not understand ({bad}): update netclient-lite?") from bad


def parse_host(text: str) -> tuple[str, bytes, dict[str, str]]:
    """`host.json` of a server: its URL on this host, its key, and the access keys of the networks to be in."""
    told = json.loads(text)
    server, pin, keys = str(told["server"]), unb64(told["pin"]), dict(told["networks"])
    odd = [key for key in keys.values() if not re.fullmatch(ACCESS_KEY, key, re.ASCII)]
    if told["version"] != 1 or odd or len(pin) != KEY_BYTES or (keys and not split_url(server)):
        raise Invalid("not of this version")
    return server, pin, {check_network(network): key for network, key in keys.items()}


def parse_switch(told: Any, at: float) -> dict[str, float]:
    """`in` of an answer that came at a time: when the keys of these nodes change."""
    if not isinstance(told, dict):
        return {}
    return {node: at + min(max(0.0, left), LONGEST) for node, left in told.items() if isinstance(left, (int, float))}


def parse_keys(text: str) -> tuple[str, Spare]:
    """`wgkey-NETWORK`: the private key in force, then, until it is, the next one with its public half."""
    private, *more = text.split()
    if len(more) not in (0, 2):
        raise Invalid("cut off, or written by another version")
    return check_key(private), (check_key(more[0]), check_key(more[1])) if more else None


SERVICE = (b"_netclient-lite", b"_udp", b"local")
A, PTR, TXT, SRV = 1, 12, 16, 33  # RFC 1035, RFC 2782


def dns_name(labels: Sequence[bytes]) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def make_query(number: int = 0, challenge: str = "") -> bytes:
    """An mDNS question for our service. RFC 6762 §6.7: asked from another port than 5353, it is answered to there.

    The challenge is one more question, for a name that nobody has: other responders pass over it.
    """
    names = [SERVICE, (challenge.encode(), *SERVICE)][: 2 if challenge else 1]
    head = number.to_bytes(2, "big") + bytes((0, 0, 0, len(names), 0, 0, 0, 0, 0, 0))
    return head + b"".join(dns_name(name) + bytes((0, PTR, 0, 1)) for name in names)


def make_record(instance: str, port: int, strings: Words, number: int = 0, legacy: bool = False) -> bytes:
    """An mDNS answer: that our service is there, where, and what it says. `legacy`: with the question, for a plain resolver."""
    name = dns_name((instance.encode(), *SERVICE))
    text = b"".join(bytes([len(each)]) + each for each in map(str.encode, strings))
    host = dns_name((instance.encode(), b"local"))
    where = bytes(4) + port.to_bytes(2, "big") + host
    addresses = [ipaddress.ip_address(split_endpoint(each)[0]) for each in strings[2][2:].split(",")]
    records = [(dns_name(SERVICE), PTR, 1, name), (name, SRV, 0x8001, where), (name, TXT, 0x8001, text)]
    records += [(host, A, 0x8001, address.packed) for address in addresses if address.version == 4]
    out = number.to_bytes(2, "big") + b"\x84\0" + bytes((0, legacy, 0, len(records), 0, 0, 0, 0))
    out += make_query()[12:] if legacy else b""
    for owner, kind, group, data in records:
        group &= 1 if legacy else 0xFFFF  # a plain resolver knows no cache-flush bit
        out += owner + b"".join(part.to_bytes(2, "big") for part in (kind, group, 0, 10 if legacy else 120, len(data))) + data
    return out


def _read_name(data: bytes, at: int) -> tuple[list[bytes], int]:
    """(labels, where it goes on); ValueError for what is no name: too long, or a loop of pointers."""
    labels: list[bytes] = []
    end = 0
    while len(labels) < 32:
        size = data[at]
        if size >= 192:
            end = end or at + 2
            to = int.from_bytes(data[at : at + 2], "big") & 0x3FFF
            if to >= at:  # RFC 1035 §4.1.4: to what came before
                break
            at = to
        elif size == 0:
            return labels, end or at + 1
        else:
            labels.append(data[at + 1 : at + 1 + size])
            at += 1 + size
    raise ValueError("no name")


def parse_mdns(data: bytes) -> tuple[str | None, list[list[str]]]:
    """What a packet that asks for our service has as its challenge ("" for none; None: it does not ask), and the texts of the
    services that it tells of. Of anything else, nothing.
    """
    asks: str | None = None
    texts = []
    try:
        counts = [int.from_bytes(data[at : at + 2], "big") for at in (4, 6, 8, 10)]
        at = 12
        for _ in range(min(counts[0], 16)):
            labels, at = _read_name(data, at)
            if not data[2] & 0x80 and tuple(map(bytes.lower, labels[-3:])) == SERVICE:
                asks = b"".join(labels[:-3]).decode("ascii")[:32] or asks or ""
            at += 4
        for _ in range(min(sum(counts[1:]), 64)):
            labels, at = _read_name(data, at)
            kind, size = int.from_bytes(data[at : at + 2], "big"), int.from_bytes(data[at + 8 : at + 10], "big")
            text, at = data[at + 10 : at + 10 + size], at + 10 + size
            if kind == TXT and tuple(map(bytes.lower, labels[1:])) == SERVICE and at <= len(data):
                strings = []
                while text:
                    strings.append(text[1 : 1 + text[0]].decode("ascii"))
                    text = text[1 + text[0] :]
                texts.append(strings)
    except (ValueError, IndexError):
        pass
    return asks, texts


def announced(group: bytes, node: str, places: Words, challenge: str = "") -> list[str]:
    """The TXT strings of a node (docs/lan.md): a tag of the network, the node, its endpoints, who asked, a MAC over them."""
    tag = blake2b(b"network", key=group, digest_size=4).hexdigest()
    where = ",".join(places)
    return [
        f"n={tag}",
        f"i={node}",
        f"e={where}",
        f"c={challenge}",
        "m=" + blake2b(f"{node} {where} {challenge}".encode(), key=group, digest_size=12).hexdigest(),
    ]


def verified(group: bytes, strings: Words) -> tuple[str, list[str], str]:
    """(node, endpoints, challenge) of TXT strings that somebody made who knows the group's key; ("", [], "") of any others."""
    told = dict(each.partition("=")[::2] for each in strings)
    try:
        places = [endpoint(*split_endpoint(text)) for text in told.get("e", "").split(",")]
        genuine = announced(group, told.get("i", ""), places, told.get("c", ""))
        return (told["i"], places, told["c"]) if same("".join(genuine), "".join(strings)) else ("", [], "")
    except (ValueError, KeyError):
        return "", [], ""


# --------------------
# PLAN
# --------------------


def within_reach(text: str, place: Place) -> bool:
    """Whether an endpoint is of a family in which this machine has a way to it: out to the internet, else to a LAN."""
    address = split_endpoint(text)[0]
    family = 6 if ":" in address else 4
    return family in (place.ways or (family,)) or not is_public(address) or inside(address, place.subnets)


def candidates(record: Fields, place: Place) -> list[str]:
    """The endpoints worth trying for a peer, best first: static; local in the same LAN; observed; seen by the server; its own
    public IPv6 address. Those that this machine has no way to are left out.

    A local address without proof that the LAN is the same comes last: tried in turn, only while there is no handshake.
    """
    local, static = record.get("found") or record.get("local", ""), record.get("static", "")
    if static and not (place.local_only and is_public(split_endpoint(static)[0])) and within_reach(static, place):
        return [static]
    near = bool(local) and inside(split_endpoint(local)[0], place.subnets)
    if place.local_only:
        return [local] if local else []
    kinds = ("at", "seen", "local6") if place.punch else ("seen", "local6")
    public = [*dict.fromkeys(text for text in map(record.get, kinds) if text and within_reach(text, place))]
    if not near:
        return public
    if proven_local(record, place):
        return [*dict.fromkeys((local, *public))]
    homes = {split_endpoint(text)[0] for text in public}
    return [*dict.fromkeys((*public, local))] if place.seen in homes or not homes else public


def apart(record: Fields, place: Place) -> str:
    """Why a peer whose endpoints are known cannot be called from here; "" where it can."""
    known = [text for text in map(record.get, ("static", "at", "seen", "local6")) if text and not within_reach(text, place)]
    if not known or place.local_only or candidates(record, place):
        return ""
    return "it has IPv%d only, for which this machine has no way out" % (6 if known[0][0] == "[" else 4)


def proven_local(record: Fields, place: Place) -> bool:
    """Whether a peer is known to be in this LAN: on one of its subnets, and it answered there or is behind the same gateway."""
    local = record.get("found") or record.get("local", "")
    same_lan = bool(record.get("found")) or (bool(place.lan) and record.get("lan") == place.lan)
    return same_lan and bool(local) and inside(split_endpoint(local)[0], place.subnets)


def choose_endpoint(record: Fields, place: Place, live: str, fresh: bool, turn: int, saved: str = "", deaf: bool = False) -> str:
    """The endpoint to set for a peer; "" leaves it as it is.

    live: what WireGuard has now; fresh: a session lives there; turn: how many TURNs it has been without one; saved: the last
    with a handshake before a reboot; deaf: the local address did not answer. A fresh endpoint moves only into the same LAN.
    """
    known = candidates(record, place)
    near = proven_local(record, place) and not record.get("static") and ("found" in record or not place.local_only)
    if (
        fresh
    ):  # in the LAN already it stays where it is, unless the peer just answered elsewhere: the server may know an older place
        lives = bool(live) and inside(split_endpoint(live)[0], place.subnets) and "found" not in record
        return known[0] if near and not deaf and not lives else ""
    if near and deaf:
        known = [*known[1:], known[0]]
    if saved and not live and saved not in known and not place.local_only and not record.get("static"):
        known = [saved, *known]
    return known[(turn - (near and deaf and turn > 0)) % len(known)] if known else ""


def allowed_ips(record: Fields) -> list[str]:
    own = [record["ip"] + "/32"] if record.get("ip") else []
    own += [record["ip6"] + "/128"] if record.get("ip6") else []
    return own + list(record.get("ips", ()))


def by_hand(view: View, node: str, other: str) -> str:
    """The peer to which what belongs to another goes by their records: the own relay, the other's, or itself."""
    own = view.peers.get(node, {}).get("via", "")
    via = view.peers[other].get("via", "")
    return str(own if own in view.peers else via if via in view.peers and via != node else other)


def carrier(view: View, node: str, other: str) -> str:
    """The peer to which what belongs to another goes, also where the pair has a relay; "" for nobody (docs/protocol.md)."""
    peers, deny = view.peers, view.me.get("deny", ())
    found = by_hand(view, node, other)
    relay = view.me.get("relayed", {}).get(found, "")
    if relay not in peers or relay == node or peers.get(node, {}).get("via") == found or peers[found].get("via") == node:
        relay = found
    return "" if any(each in deny for each in (other, found, relay)) else str(relay)


def guarded(view: View, node: str, keep_out: Words) -> tuple[dict[str, frozenset[str]], list[str]]:
    """Allowed IPs by peer: no address owned twice, no range that swallows one of `keep_out` (server, endpoints, own LAN).

    Returns them with a sentence for each range left out. A node that is relayed for this one alone stays a peer, with none.
    """
    owner: dict[str, str] = {}
    warnings = []
    kept: dict[str, list[str]] = {}
    homes = [ipaddress.ip_network(view.me[width]) for width in ("range", "range6") if view.me.get(width)]
    out = [(text, ipaddress.ip_network(text, strict=False)) for text in keep_out]  # once: there may be thousands
    for other in sorted(view.peers):
        record = view.peers[other]
        peer = "" if other == node else carrier(view, node, other)
        if not peer:
            continue
        if by_hand(view, node, other) == other:
            kept.setdefault(other, [])
        mine = kept.setdefault(peer, [])
        for text in allowed_ips(record):
            reason = _unfit(text, homes, out)
            if not reason and owner.setdefault(text, other) != other:
                reason = "{} has it".format(view.peers[owner[text]]["name"])
            if reason:
                warnings.append("{} of {} is left out: {}".format(text, record["name"], reason))
            else:
                mine.append(text)
    return {peer: frozenset(mine) for peer, mine in kept.items()}, warnings


def _within(network: Any, homes: Sequence[Any]) -> bool:
    return any(network.version == home.version and network.subnet_of(home) for home in homes)


def _unfit(text: str, homes: Sequence[Any], out: Sequence[tuple[str, Any]]) -> str:
    network: Any = ipaddress.ip_network(text)
    if _within(network, homes):
        return ""
    if network.prefixlen == 0:
        return "it would take everything into the tunnel"
    if network.is_link_local or network.is_multicast or network.is_loopback:
        return "no node can own it"
    swallowed = next((text for text, one in out if one.overlaps(network)), "")
    return f"it would take {swallowed} into the tunnel" if swallowed else ""


def keeping_keys(before: View, after: View, live: Mapping[str, LivePeer]) -> None:
    """Of two keys of a node news must not undo the one in use; what a restored server forgot is one, too. Changes `after`."""
    restored = before.incarnation not in ("-", after.incarnation)
    for node, record in after.peers.items():
        key = before.peers.get(node, record)["key"]
        other = key == record.get("spare") or (restored and key != record["key"])
        if other and key in live and live[key].handshake:
            after.peers[node] = {**record, "key": key, "spare": record["key"], "moved": True}


def desire(
    view: View, node: str, config: Config, private: str, endpoints: Mapping[str, str], keep_out: Words = (), key: bytes = b""
) -> tuple[Desired, list[str]]:
    """The interface that the view asks for, and the guards' warnings. `endpoints`: by node (or key of a second peer of it).

    key: what the preshared keys of external clients are made with.
    """
    me = view.me
    ranges = [me[width] for width in ("range", "range6") if me.get(width)]
    addresses = [me[kind] + "/" + me[width].split("/")[1] for kind, width in (("ip", "range"), ("ip6", "range6")) if me.get(kind)]
    allowed, warnings = guarded(view, node, keep_out)
    peers = {}
    for spare in filter(None, (view.peers[other].get("spare") for other in allowed)):
        where = endpoints.get(spare, "")
        peers[spare] = Peer(spare, where, frozenset(), me["keepalive"] if where else 0)
    for other, own in allowed.items():
        public = view.peers[other]["key"]
        peers[public] = Peer(public, endpoints.get(other, ""), own, me["keepalive"])
    for client in me.get("clients", ()):  # they call; the server gave these addresses to nobody else
        own = frozenset(allowed_ips(client)) - frozenset().union(*(peer.allowed for peer in peers.values()))
        peers.setdefault(client["key"], Peer(client["key"], "", own, 0, preshared_key(key, client)))
    homes = [ipaddress.ip_network(text) for text in ranges]
    beyond = {text for own in allowed.values() for text in own if not _within(ipaddress.ip_network(text), homes)}
    routes = frozenset(ranges) | beyond
    mtu = max(me["mtu"], 1280) if me.get("ip6") else me["mtu"]  # below 1280 Linux takes IPv6 off the interface
    return Desired(config.interface, private, me["port"], mtu, frozenset(addresses), routes, peers), warnings


def plan(actual: Actual, desired: Desired, create: Step, batch: bool = False) -> list[Step]:
    """The shortest list of steps from what is to what shall be; empty when nothing differs. Pure.

    `create` makes the interface; `batch`: `ip -batch` is there. Unchanged peers are in no step; no interface is deleted.
    """
    steps = [] if actual.exists else [create]
    steps += _device_steps(actual, desired)
    kicked = {key: actual.peers[key]._replace(keepalive=value) for key, value in _kicks(actual, desired).items()}
    actual = actual._replace(peers={**actual.peers, **kicked})
    dropped = [address for address in actual.addresses if address not in desired.addresses]
    stay = [address for address in actual.addresses if address in desired.addresses and not _falls(address, actual, desired)]
    added = desired.addresses - set(stay)
    steps += _route_steps(desired.interface, "del", actual.routes - desired.routes, batch)
    # the secondary ones first: a primary IPv4 address takes them along (promote_secondaries is off)
    steps += [_address_step(desired.interface, "del", address) for address in reversed(dropped)]
    if actual.mtu != desired.mtu:  # below 1280 there is no IPv6: lowered after old addresses, raised before new ones
        steps.append(Step(("ip", "link", "set", "dev", desired.interface, "mtu", str(desired.mtu)), "set MTU %d" % desired.mtu))
    steps += [_address_step(desired.interface, "add", address) for address in sorted(added)]
    if not actual.up:
        steps.append(Step(("ip", "link", "set", "dev", desired.interface, "up"), f"bring {desired.interface} up"))
    steps += plan_peers(actual, desired)
    have = networks_of(desired.addresses)  # the kernel brings an address's route with it
    if actual.up:
        left = actual.routes - (networks_of(dropped) - networks_of(stay))
        if dropped and not any("." in address for address in stay):  # the last IPv4 address takes all IPv4 routes along
            left = frozenset(route for route in left if ":" in route)
        have = left | networks_of(added)
    return steps + _route_steps(desired.interface, "replace", desired.routes - have, batch)


def _falls(address: str, actual: Actual, desired: Desired) -> bool:
    """Whether an address goes with the primary one of its network. Linux lists the primary ones first."""
    network = ipaddress.ip_interface(address).network
    first = next(other for other in actual.addresses if ipaddress.ip_interface(other).network == network)
    return network.version == 4 and first not in desired.addresses


def networks_of(addresses: Iterable[str]) -> frozenset[str]:
    return frozenset(str(ipaddress.ip_interface(text).network) for text in addresses)


def _device_steps(actual: Actual, desired: Desired) -> list[Step]:
    words: list[str] = []
    if actual.port != desired.port:
        words += ["listen-port", str(desired.port)]
    secret = actual.private != desired.private
    if secret:  # through standard input: every user sees arguments
        words += ["private-key", "/dev/stdin"]
    if words:
        why = "set " + " and ".join(words[::2]).replace("-key", " key").replace("listen-port", "port %d" % desired.port)
        for key, value in _kicks(actual, desired).items():
            words += ["peer", key, "persistent-keepalive", str(value)]
        return [Step(("wg", "set", desired.interface, *words), why, desired.private + "\n" if secret else "", secret)]
    return []


def _kicks(actual: Actual, desired: Desired) -> dict[str, int]:
    """By peer: a keepalive to set with a new private key. The right one, set after that, makes a packet, and so a handshake."""
    stay = sorted(actual.peers.keys() & desired.peers.keys()) if actual.private not in ("", desired.private) else ()
    return {key: 0 if desired.peers[key].keepalive else 1 for key in stay}


def _address_step(interface: str, verb: str, address: str) -> Step:
    return Step(("ip", "addr", verb, address, "dev", interface), f"{verb} address {address}")


TRY = "try another endpoint of"  # no news: a check-in does not speak of it


def preshared_key(key: bytes, client: Fields) -> str:
    """What the gateway and an external client share beside their keys (docs/protocol.md); it never travels to the gateway."""
    text = "{id}\n{key}".format(**client)
    return binascii.b2a_base64(blake2b(text.encode(), key=key, digest_size=32).digest(), newline=False).decode()


PEER_SECTION = "[Peer]\nPublicKey = {}\nPresharedKey = {}\nAllowedIPs = {}\nPersistentKeepalive = {}\n"


def plan_peers(actual: Actual, desired: Desired) -> list[Step]:
    """One `wg` for all removals, one for all others, with what differs: allowed-ips named again would be empty for a moment.

    One more for those with a preshared key, all in its input: `wg set` takes each from a file of its own.
    """
    gone = sorted(set(actual.peers) - set(desired.peers))
    changed, moved, sections = [], 0, []
    for key in sorted(desired.peers):
        peer = desired.peers[key]
        if peer.preshared:
            if _peer_words(actual.peers.get(key), peer):
                values = (key, peer.preshared, ", ".join(sorted(peer.allowed)), peer.keepalive)
                sections.append(PEER_SECTION.format(*values))
            continue
        differs = _peer_words(actual.peers.get(key), desired.peers[key])
        if differs:
            moved += key in actual.peers and len(differs) == 2 and differs[0] == "endpoint"
            changed.append(["peer", key, *differs])
    removed = _wg_steps(desired.interface, "remove", [["peer", key, "remove"] for key in gone])
    steps = removed + _wg_steps(desired.interface, "set" if moved < len(changed) else TRY, changed)
    if sections:
        why = "set " + _count(len(sections)).replace("peer", "external client")
        steps.append(Step(("wg", "addconf", desired.interface, "/dev/stdin"), why, "\n".join(sections), secret=True))
    return steps


def _wg_steps(interface: str, verb: str, peers: Sequence[Words]) -> list[Step]:
    """One `wg set` for all; a few only where thousands are more than a command line takes (2 MiB)."""
    steps = []
    for start in range(0, len(peers), PEERS_AT_ONCE):
        some = peers[start : start + PEERS_AT_ONCE]
        steps.append(Step(("wg", "set", interface, *(word for peer in some for word in peer)), f"{verb} {_count(len(some))}"))
    return steps


def _count(number: int) -> str:
    return "1 peer" if number == 1 else "%d peers" % number


def _peer_words(live: LivePeer | None, peer: Peer) -> list[str]:
    words: list[str] = []
    if peer.endpoint and (live is None or live.endpoint != peer.endpoint):
        words += ["endpoint", peer.endpoint]
    if (live.keepalive if live else 0) != peer.keepalive:
        words += ["persistent-keepalive", str(peer.keepalive)]
    if live is None or live.allowed != peer.allowed:
        words += ["allowed-ips", ",".join(sorted(peer.allowed))]
    if (live.preshared if live else "") != peer.preshared:
        words += ["preshared-key", "/dev/null"]
    return words


def host_lines(view: View, network: str) -> list[str]:
    """The names of a network as a hosts file has them. All end in the network's own."""
    if view.state != "active" or not view.me.get("dns"):
        return []
    found = [(record[kind], record["name"]) for record in view.peers.values() for kind in ("ip", "ip6") if record.get(kind)]
    found += [(address, name) for name, addresses in view.names.items() for address in addresses]
    return sorted(f"{address} {name}.{network}" for address, name in found)


BLOCK = re.compile(r"(?ms)^# netclient begin(,?)[^\n]*\n(.*?)^# netclient end(?:\n|\Z)")


def with_names(text: str, network: str, lines: Words) -> str:
    """A hosts file with these names of a network and no others of it. One block for all networks; the rest stays as it is."""
    inner, at = "", len(text)
    block = BLOCK.search(text)
    while block:  # more than one: somebody cut and pasted
        start = block.start() - (block.group(1) == ",")
        inner, at = inner + block.group(2), min(at, start)
        text = text[:start] + text[block.end() :]
        block = BLOCK.search(text)
    before, after = text[:at], text[at:]
    ours = re.compile(rf".* # {re.escape(network)}|# netclient begin.*")  # a second begin: somebody took the end away
    held = [line for line in inner.splitlines() if not ours.fullmatch(line)]
    held = sorted([*held, *(f"{line} # {network}" for line in lines)])
    if not held:
        return before + after
    joined = before and not before.endswith("\n")  # the comma remembers that its last line had no end
    head = "\n# netclient begin, written by netclient-lite" if joined else "# netclient begin (written by netclient-lite)"
    return before + "\n".join([head, *held, "# netclient end\n"]) + after


METRIC = 5000  # of our routes: `ip route replace` replaces what has the same destination and metric, on any interface


def _route_steps(interface: str, verb: str, routes: Iterable[str], batch: bool) -> list[Step]:
    chosen = sorted(routes)
    more = ("metric", str(METRIC)) if verb == "replace" else ()
    if batch and len(chosen) > 1:
        text = "".join(" ".join(("route", verb, route, "dev", interface, *more)) + "\n" for route in chosen)
        return [Step(("ip", "-batch", "-"), "%s %d routes" % (verb, len(chosen)), text)]
    steps = []
    for route in chosen:
        family = ("-6",) if ":" in route else ()
        steps.append(Step(("ip", *family, "route", verb, route, "dev", interface, *more), f"{verb} route {route}"))
    return steps


def cuts_off(actual: Actual, desired: Desired) -> bool:
    """Whether addresses or routes change on a live interface: what commit-confirm can take back."""
    return actual.exists and actual.up and (frozenset(actual.addresses), actual.routes) != (desired.addresses, desired.routes)


def roles(view: View) -> tuple[Any, ...]:
    """What the server wants this node to forward: egress, between peers, clients to the internet; each false where it is not."""
    clients = [client for client in view.me.get("clients", ()) if client.get("internet")]
    outside = view.state in ("disabled", "expired")
    return (None, False, []) if outside else (view.me.get("egress"), view.me.get("forward", False), clients)


def exits(text: str, ways: Sequence[tuple[str, str]]) -> list[str]:
    """The interfaces behind which a range lies: those of all routes inside it, else that of the narrowest one around it."""
    network: Any = ipaddress.ip_network(text)
    near = [(ipaddress.ip_network(to), name) for to, name in ways if (":" in to) == (":" in text)]
    around = [(to.prefixlen, name) for to, name in near if network.subnet_of(to)]
    narrowest = [name for length, name in around if length == max(around)[0]]
    return sorted({name for to, name in near if to.subnet_of(network)}) or narrowest[:1]


def gateway_rules(
    view: View, interface: str, port: int, ways: Sequence[tuple[str, str]], keep_out: Words, links: Iterable[str]
) -> tuple[Rules | None, list[str]]:
    """What this node shall forward (None: nothing), with a sentence for each range or client that is left out."""
    egress, forward, clients = roles(view)
    if not (egress or forward or clients):
        return None, []
    if not view.me.get("forwarding", True):
        return None, ["the server wants this node to forward, which --ipforwarding no forbids: it forwards nothing"]
    homes = [view.me[width] for width in ("range", "range6") if view.me.get(width)]
    out = [(text, ipaddress.ip_network(text, strict=False)) for text in (*homes, *keep_out)]
    passed, masked, warnings = [], [], []
    for text in egress["ranges"] if egress else ():
        version, named = 6 if ":" in text else 4, egress["interface"]
        found = [named] if named in links else [] if named else exits(text, ways)
        missing = f"there is no interface {named}" if named else "no route leads there (--interface names one)"
        reason = _unfit(text, (), out) or ("" if found else missing)
        if reason:
            warnings.append(f"the range {text} is not opened: {reason}")
            continue
        for name in found:
            passed += [Flow(version, interface, name, "", text), Flow(version, name, interface, text)]
            inward = [home for home in homes if egress["nat"] and (":" in home) == (":" in text)]
            masked += [Flow(version, "", name, home, text) for home in inward]
    passed += [Flow(6 if ":" in home else 4, interface, interface) for home in homes if forward]
    for address in [client[kind] for client in clients for kind in ("ip", "ip6") if client.get(kind)]:
        version, anywhere = (6, "::/0") if ":" in address else (4, "0.0.0.0/0")
        name = next((name for to, name in ways if to == anywhere), "")
        if name:
            passed += [Flow(version, interface, name, address), Flow(version, name, interface, "", address, True)]
            masked.append(Flow(version, "", name, address))
        else:
            warnings.append(f"the client {address} gets no internet: there is no default route")
    return (Rules(interface, port, tuple(passed), tuple(masked)) if passed else None), warnings


def mark(text: str) -> str:
    """What a rule is called in its comment: a hash of what it says. A rule that is there as it shall be has the right one."""
    return blake2b(text.encode(), digest_size=4).hexdigest()


def nft_match(flow: Flow, family: str = "inet") -> str:
    kind = "ip6" if flow.version == 6 else "ip"
    plain = family == "inet" and not (flow.source or flow.target)  # nft refuses it where it says nothing new
    words = ["meta nfproto ipv%d" % flow.version] if plain else []
    for word, value in (("iifname", flow.entry), ("oifname", flow.exit)):
        words += [f'{word} "{value}"'] if value else []
    for word, value in (("saddr", flow.source), ("daddr", flow.target)):
        words += [f"{kind} {word} {value}"] if value else []
    return " ".join([*words, *["ct state established,related"] * flow.back])


def nft_foreign(key: tuple[str, ...], rules: Rules | None, hook: str) -> list[str]:
    """The accepts for a chain of somebody else's, which drops."""
    if rules is None:
        return []
    if hook == "input":
        return ["udp dport %d accept" % rules.port]
    fit = {"ip": (4,), "ip6": (6,)}.get(key[0], (4, 6))
    return [nft_match(flow, key[0]) + " accept" for flow in rules.passed if flow.version in fit]


def nft_own(rules: Rules | None) -> dict[str, list[str]]:
    """The rules of the own chains by hook."""
    if rules is None:
        return {"forward": [], "postrouting": []}
    name = rules.interface
    clamp = "tcp flags syn / syn,rst tcp option maxseg size set rt mtu"
    forward = [f'iifname "{name}" {clamp}', f'oifname "{name}" {clamp}', *(nft_match(flow) + " accept" for flow in rules.passed)]
    forward += [f'iifname "{name}" drop'] if rules.closed else []
    return {"forward": forward, "postrouting": [nft_match(flow) + " masquerade" for flow in rules.masked]}


OWN_TABLE = ("inet", "netclient")
HOOKS = {"forward": "type filter hook forward priority 0;", "postrouting": "type nat hook postrouting priority 100;"}


def drops(key: tuple[str, ...], chains: Mapping[tuple[str, ...], Sequence[str]], seen: frozenset[str] = frozenset()) -> bool:
    """Whether packets may end in a chain, or in one that it leads to. Our own count as none."""
    if key[2] in seen or key[2].startswith("netclient-"):
        return False
    text = re.sub(r'"[^"]*"', "", "\n".join(chains.get(key, ())))
    further = re.findall(r"\b(?:jump|goto) ([\w./-]+)", text)
    return bool(re.search(r"\b(drop|reject)\b", text)) or any(drops((*key[:2], to), chains, seen | {key[2]}) for to in further)


def on_top(lines: Words) -> bool:
    """Whether all of ours, of any network, stand before all others'."""
    ours = [bool(re.search(r"\bnetclient[:-]", line)) for line in lines]
    return ours == sorted(ours, reverse=True)


def plan_nft(
    network: str, rules: Rules | None, chains: Mapping[tuple[str, ...], Sequence[str]], managed: Iterable[tuple[str, ...]] = ()
) -> str:
    """What to feed to `nft -f -`: own chains, and accepts at the top of others' that drop; "" when nothing differs.

    `managed`: tables that are left to iptables.
    """
    table, tag = " ".join(OWN_TABLE), f"netclient:{network}:"
    mine = re.compile(rf'comment "{re.escape(tag)}(\w+)" # handle (\d+)')
    lines, left = [], {key for key in chains if key[:2] == OWN_TABLE}

    def marked(text: str) -> str:
        return f'{text} comment "{tag}{mark(text)}"'

    for hook, texts in nft_own(rules).items():
        chain = f"{hook}-{network}"
        key: tuple[str, ...] = (*OWN_TABLE, chain)
        have = [found.group(1) for found in map(mine.search, chains.get(key, ())) if found]
        if texts and have != [mark(text) for text in texts]:
            lines += [f"add table {table}", f"add chain {table} {chain} {{ {HOOKS[hook]} }}", f"flush chain {table} {chain}"]
            lines += [f"add rule {table} {chain} {marked(text)}" for text in texts]
        elif not texts and key in chains:
            lines += [f"flush chain {table} {chain}", f"delete chain {table} {chain}"]
            left.discard(key)
    if rules is None and lines and not left:
        lines = [f"delete table {table}"]
    for key, body in chains.items():
        base = re.match(r"type filter hook (forward|input) ", body[0]) if body else None
        if not base or key[0] not in ("ip", "ip6", "inet") or key[:2] in (OWN_TABLE, *managed):
            continue
        texts = nft_foreign(key, rules, base.group(1)) if drops(key, chains) else []
        there = [found.groups() for found in map(mine.search, body) if found]
        if [name for name, _ in there] != [mark(text) for text in texts] or (texts and not on_top(body[1:])):
            place = " ".join(key)
            lines += [f"delete rule {place} handle {handle}" for _, handle in there]
            lines += [f"insert rule {place} {marked(text)}" for text in reversed(texts)]
    return "".join(line + "\n" for line in lines)


PARENTS = (("filter", "FORWARD"), ("filter", "INPUT"), ("nat", "POSTROUTING"))


def iptables_rules(rules: Rules, version: int, only: Words | None) -> dict[str, list[str]]:
    """The rules of the own chains by the chain that leads to each; `only`: accepts for these, as nft does the rest."""

    def words(flow: Flow, target: str) -> str:
        pairs = (("-i", flow.entry), ("-o", flow.exit), ("-s", flow.source), ("-d", flow.target))
        back = " -m conntrack --ctstate RELATED,ESTABLISHED" if flow.back else ""
        return "".join(f"{option} {value} " for option, value in pairs if value).rstrip() + back + " -j " + target

    clamp = "-p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"
    accepts = [words(flow, "ACCEPT") for flow in rules.passed if flow.version == version]
    port = "-p udp --dport %d -j ACCEPT" % rules.port
    if only is not None:
        return {parent: chosen for parent, chosen in (("FORWARD", accepts), ("INPUT", [port])) if parent in only}
    clamps = [f"{way} {rules.interface} {clamp}" for way in ("-i", "-o")]
    masked = [words(flow, "MASQUERADE") for flow in rules.masked if flow.version == version]
    closed = [f"-i {rules.interface} -j DROP"] * rules.closed
    return {"FORWARD": [*clamps, *accepts, *closed], "INPUT": [port], "POSTROUTING": masked}


def plan_iptables(network: str, wanted: Mapping[str, Words], listed: Mapping[str, str]) -> str:
    """What to feed to `iptables-restore -n`, from `-S` of each table; "" when nothing differs."""
    out = ""
    for table in listed:
        heads: list[str] = []
        lines: list[str] = []
        for parent in [parent for home, parent in PARENTS if home == table]:
            chain, rules = f"netclient-{parent[0]}-{network}", wanted.get(parent, ())
            said = listed[table].splitlines()
            have = [re.findall(r"--comment \"?(\w+)", line)[:1] for line in said if line.startswith(f"-A {chain} ")]
            jumps = [line.split(" -j ")[-1] for line in said if line.startswith(f"-A {parent} ")]
            led = jumps.count(chain) == 1 and on_top(jumps)
            if (led and have == [[mark(rule)] for rule in rules]) if rules else f"-N {chain}" not in said:
                continue
            lines += [f"-D {parent} -j {chain}"] * jumps.count(chain)
            if rules:
                heads.append(f":{chain} - [0:0]")
                lines += [f"-A {chain} -m comment --comment {mark(rule)} {rule}" for rule in rules]
                lines.append(f"-I {parent} 1 -j {chain}")
            else:
                lines += [f"-F {chain}", f"-X {chain}"]
        if lines:
            out += "".join(line + "\n" for line in (f"*{table}", *heads, *lines, "COMMIT"))
    return out


def section(network: str) -> str:
    """The name of a network's sections in UCI, which knows letters, digits and `_`."""
    return "netclient_" + re.sub(r"[^a-z0-9]", lambda odd: "_%02x" % ord(odd.group()), network)


def plan_uci(network: str, rules: Rules | None, zones: Mapping[str, str], listed: str) -> str:
    """What to feed to `uci batch`, from `uci show firewall` and the zones of the interfaces; "" when nothing differs.

    A zone for the interface (not where one of the package's is for all of ours), rules to and from other zones for what passes,
    and a rule for the WireGuard port.
    """
    base = section(network)
    made: list[tuple[str, dict[str, str]]] = []
    found = re.search(r"(?m)^firewall\.(\w+)\.device=.*'nm-\+'", listed)
    shared = re.search(rf"(?m)^firewall\.{found.group(1)}\.name='(\w+)'", listed) if found else None
    if rules and shared and rules.interface.startswith("nm-"):
        zones = {name: shared.group(1) if zone == base else zone for name, zone in zones.items()}
    else:
        shared = None
    if rules:
        kinds = {4: "ipv4", 6: "ipv6"}
        shut = {"input": "ACCEPT", "output": "ACCEPT", "forward": "REJECT", "mtu_fix": "1"}
        made += [] if shared else [("zone", {"name": base, "device": rules.interface, **shut})]
        made.append(("rule", {"src": "*", "proto": "udp", "dest_port": str(rules.port), "target": "ACCEPT"}))
        for flow in rules.passed:
            if not flow.back:  # fw4 lets answers through by itself
                places = {"src": zones[flow.entry], "dest": zones[flow.exit], "src_ip": flow.source, "dest_ip": flow.target}
                made.append(("rule", {**places, "family": kinds[flow.version], "proto": "all", "target": "ACCEPT"}))
        for flow in rules.masked:  # in these, src is where packets leave
            places = {"src": zones[flow.exit], "src_ip": flow.source, "dest_ip": flow.target}
            made.append(("nat", {**places, "family": kinds[flow.version], "proto": "all", "target": "MASQUERADE"}))
    wanted, lines = set(), []
    for number, (kind, options) in enumerate(made):
        name = "firewall." + base + ("_%d" % number if number else "")
        if kind != "zone":
            options = {"name": f"netclient {network}", **options}
        wanted |= {f"{name}={kind}", *(f"{name}.{option}='{value}'" for option, value in options.items() if value)}
        lines.append(f"set {name}={kind}")
        for option, value in options.items():
            verb = "add_list" if option == "device" else "set"
            lines += [f"{verb} {name}.{option}='{value}'"] if value else []
    own = [line for line in listed.splitlines() if re.match(rf"firewall\.{base}(_\d+)?[.=]", line)]
    if set(own) == wanted:
        return ""
    gone = [f"delete {line.split('=')[0]}" for line in own if "." not in line.split("=")[0][len("firewall.") :]]
    return "".join(line + "\n" for line in (*gone, *lines, "commit firewall"))


# --------------------
# RUN
# --------------------


def show(line: str, dry: bool) -> None:
    """A command or file as `[#] …`: on stdout where that is what was asked for, else on stderr."""
    print("[#] " + line, file=sys.stdout if dry else sys.stderr)


class Run:
    """The only place that starts processes: argument lists, never a shell; secrets through standard input.

    `echo` prints what changes the machine; `dry` does not run it either.
    """

    def __init__(self, dry: bool = False, echo: bool = False) -> None:
        self.dry, self.echo = dry, echo or dry
        path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/sbin:/opt/bin"
        self.environment = dict(os.environ, PATH=path.lstrip(":"), LC_ALL="C")  # cron's PATH lacks sbin

    def __call__(self, *argv: str, stdin: str = "", detached: bool = False) -> str:
        """What a program printed, run to its end, 30 s at most; CommandFailed for another status than 0."""
        pipe = subprocess.DEVNULL if detached else subprocess.PIPE  # a daemon would hold the pipes open
        try:
            done = subprocess.run(  # noqa: S603 - argument lists only
                argv,
                input=None if detached else stdin,
                stdin=pipe if detached else None,
                stdout=pipe,
                stderr=pipe,
                timeout=30,
                env=self.environment,
                start_new_session=detached,
                text=True,
                check=False,
            )
        except FileNotFoundError as bad:
            raise CommandFailed(argv, 127, f"{argv[0]} is not installed") from bad
        except (OSError, subprocess.TimeoutExpired) as bad:
            raise CommandFailed(argv, 126, str(bad)) from bad
        if done.returncode:
            raise CommandFailed(argv, done.returncode, done.stderr or "")
        return done.stdout or ""

    def where(self, program: str) -> str:
        """The path of a program, "" where there is none."""
        paths = (os.path.join(place, program) for place in self.environment["PATH"].split(":") if place)
        return next((path for path in paths if os.access(path, os.X_OK)), "")

    def has(self, program: str) -> bool:
        return bool(self.where(program))

    def apply(self, steps: Iterable[Step]) -> None:
        """Carry a plan out, in order; the first failure ends it (the next check-in plans anew)."""
        for step in steps:
            if self.echo:
                shown = step.stdin.rstrip("\n") if not step.secret else "(keys)"
                show(" ".join(step.argv) + (" <<< " + repr(shown) if step.stdin else ""), self.dry)
            if not self.dry:
                self(*step.argv, stdin=step.stdin, detached=step.detached)


# --------------------
# FILES
# --------------------


def read_exact(path: str) -> str:
    """Every byte of a file, "" when it is not there. OSError where it cannot be read: what is not known is not written anew."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return ""


class Files:
    """The only place that writes files that last: 0600, temp file + fsync + rename, and only what differs."""

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry

    def write(self, path: str, text: str, mode: int = 0o600) -> bool:
        """Replace a file that says something else; whether it was written. NetclientError on a full disk."""
        if read_text(path) == text and os.path.exists(path):
            return False
        if self.dry:
            show("write " + path, True)
            return True
        temporary = path + ".tmp"
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            os.fchmod(handle, mode)  # whatever the umask
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            self.keep(temporary, path)
        except OSError as bad:
            self._discard(temporary)
            raise NetclientError(f"cannot write {path} ({bad.strerror}): the old file is untouched; make room") from bad
        return True

    def remove_folders(self, *paths: str) -> None:
        """Folders that are empty by now; of those on tmpfs what is in them too."""
        for path in paths:
            with contextlib.suppress(OSError):
                for name in os.listdir(path) if path.endswith("/run/netclient") and not self.dry else ():
                    os.unlink(f"{path}/{name}")
            with contextlib.suppress(OSError):
                if not self.dry:
                    os.rmdir(path)

    def edit(self, path: str, text: str) -> None:
        """Replace a file of somebody else's, as `read_exact` read it: mode and owner stay; a mount is written in place."""
        if self.dry:
            show("write " + path, True)
            return
        path = os.path.realpath(path)
        temporary = path + ".netclient"
        try:
            self._put(temporary, text)
            if os.path.exists(path):
                info = os.stat(path)
                os.chown(temporary, info.st_uid, info.st_gid)
                os.chmod(temporary, info.st_mode & 0o7777)
            else:
                os.chmod(temporary, 0o644)
            self.keep(temporary, path)
        except OSError as bad:
            self._discard(temporary)
            try:
                if bad.errno not in (errno.EBUSY, errno.EXDEV, errno.EROFS):
                    raise
                self._put(path, text)
            except OSError as worse:
                raise NetclientError(f"cannot write {path} ({worse.strerror}): make it writable, or make room there") from worse

    @staticmethod
    def _put(path: str, text: str) -> None:
        """Write over what is there, so that a full disk costs no byte that stays the same."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
            file.truncate()

    def remove(self, path: str) -> None:
        if self.dry:
            if os.path.exists(path):
                show("remove " + path, True)
            return
        self._discard(path)

    @contextlib.contextmanager
    def _folder(self, path: str, verb: str) -> Iterator[None]:
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            yield
        except OSError as bad:
            raise NetclientError(f"cannot {verb} {path} ({bad.strerror}): make room there") from bad

    def volatile(self, path: str, text: str) -> None:
        if not self.dry:
            with self._folder(path, "write"):
                write_volatile(path, text)

    def switch(self, path: str, value: str) -> None:
        """Set a switch of the kernel that says something else. One that is not there (any more) needs nothing."""
        if read_text(path).strip() in (value, ""):
            return
        if self.dry:
            show(f"echo {value} > {path}", True)
            return
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
        except OSError as bad:
            raise NetclientError(f"cannot set {path} to {value} ({bad.strerror}): a container without rights?") from bad

    def lock(self, path: str, wait: bool = False) -> int | None:
        """Take a lock file; None when another run has it. A dry run without the folder has nothing to lock."""
        if self.dry and not os.path.isdir(os.path.dirname(path)):
            return os.open(os.devnull, os.O_RDONLY)
        with self._folder(path, "lock"):
            return lock(path, wait)

    def keep(self, temporary: str, path: str) -> None:
        """Put a written file in its place so that a power cut leaves the old or the new one."""
        self._sync(temporary)
        os.rename(temporary, path)
        self._sync(os.path.dirname(path))

    @staticmethod
    def _sync(path: str) -> None:
        handle = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some FUSE and network file systems cannot
            os.fsync(handle)
        os.close(handle)

    @staticmethod
    def _discard(path: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)


# --------------------
# SYSTEM
# --------------------

OVERLAY_OR_CONTAINER = re.compile(r"(lo|docker.*|br-[0-9a-f]{12}|veth.*|cni.*|virbr.*|tun.*|wg.*|nm-.*)$")
USERSPACE = ("wireguard-go", "boringtun-cli", "boringtun")


class KernelWireGuard:
    def __init__(self, run: Run) -> None:
        self.run = run

    def is_supported(self) -> bool:
        """Asked by making a link: the module loads by itself, and only this tells for sure."""
        if os.path.isdir("/sys/module/wireguard"):
            return True
        if self.run.dry:
            return False
        probe = "nm-%x" % (os.getpid() & 0xFFFFFF)
        try:
            self.run("ip", "link", "add", "dev", probe, "type", "wireguard")
            self.run("ip", "link", "del", "dev", probe)
            return True
        except CommandFailed:
            return False

    def create(self, interface: str) -> Step:
        return Step(("ip", "link", "add", "dev", interface, "type", "wireguard"), f"make {interface}")


class UserspaceWireGuard:
    """WG_QUICK_USERSPACE_IMPLEMENTATION, as wg-quick has it, else wireguard-go, else boringtun."""

    def __init__(self, run: Run) -> None:
        self.run = run
        asked = os.environ.get("WG_QUICK_USERSPACE_IMPLEMENTATION", "")
        self.programs = [asked] if asked else [name for name in USERSPACE if run.has(name)]

    def is_supported(self) -> bool:
        return bool(self.programs) and os.path.exists("/dev/net/tun")

    def create(self, interface: str) -> Step:
        return Step((self.programs[0], interface), f"make {interface} in userspace", detached=True)


YOUNG = 600.0  # seconds after booting in which a clock may be set


class System:
    """This machine, read anew each time: nothing about it is remembered."""

    def __init__(self, run: Run, root: str = "") -> None:
        self.run, self.root = run, root

    def backend(self) -> KernelWireGuard | UserspaceWireGuard:
        """The WireGuard to make interfaces with; NetclientError with what to install."""
        for backend in (KernelWireGuard(self.run), UserspaceWireGuard(self.run)):
            if backend.is_supported():
                return backend
        why = "this machine has no WireGuard in its kernel, and no wireguard-go or boringtun (with /dev/net/tun)"
        raise NetclientError(why + ": install kmod-wireguard (OpenWrt), wireguard-go, or a newer kernel")

    def exists(self, interface: str) -> bool:
        return any(line.split(":")[0].strip() == interface for line in read_text("/proc/net/dev").splitlines())

    def tunnels(self, pin: bytes) -> list[str]:
        """The URLs of a server inside of the hub networks that this machine is in."""
        paths, found = Paths(self.root), []
        for network in paths.networks():
            with contextlib.suppress(ValueError):
                config = Config.parse(read_text(paths.of("netconfig", network)))
                if config.hub and self.exists(config.interface):
                    found += [config.hub] * (Secret.parse(network, read_text(paths.of("secret", network))).pin == pin)
        return found

    def links(self) -> dict[str, Link]:
        return parse_links(self.run("ip", "addr", "show"))

    def actual(self, interface: str, links: Mapping[str, Link]) -> Actual:
        if interface not in links:
            return Actual()
        up, mtu, addresses, _ = links[interface]
        device = parse_dump(self.run("wg", "show", interface, "dump"))
        routes = self.run("ip", "route", "show", "dev", interface)
        if os.path.exists("/proc/net/if_inet6"):
            routes += self.run("ip", "-6", "route", "show", "dev", interface)
        return device._replace(up=up, mtu=mtu, addresses=tuple(addresses), routes=parse_routes(routes))

    def batch(self) -> bool:
        """Whether `ip` takes -batch (iproute2) or not (BusyBox)."""
        try:
            self.run("ip", "-batch", "-", stdin="")
            return True
        except CommandFailed:
            return False

    def subnets(self, links: Mapping[str, Link]) -> dict[str, str]:
        """Addresses with prefix length and their interface, without loopback, containers, tunnels and overlays."""
        up = ((name, link) for name, link in links.items() if link.up and not link.tunnel)
        real = {name: link for name, link in up if not OVERLAY_OR_CONTAINER.match(name)}
        return {text: name for name, link in real.items() for text in link.addresses}

    def ways(self, interface: str) -> list[tuple[str, str]]:
        """Where routes lead, without those into an interface."""
        found = parse_ways(self.run("ip", "route", "show"), 4)
        if os.path.exists("/proc/net/if_inet6"):
            found += parse_ways(self.run("ip", "-6", "route", "show"), 6)
        return [way for way in found if way[1] not in (interface, "lo")]

    def is_strict(self, interface: str) -> bool:
        """Whether packets are dropped whose way back is another interface's."""
        return max(read_text(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").strip() for name in ("all", interface)) == "1"

    def removal(self, interface: str) -> list[Step]:
        return [Step(("ip", "link", "del", "dev", interface), f"remove {interface}")] if self.exists(interface) else []

    def sources(self) -> dict[int, str]:
        """By family, the own address towards the internet, where there is a way. Connecting a UDP socket sends nothing."""
        found = {}
        for version, family, target in ((4, _socket.AF_INET, "192.0.2.1"), (6, _socket.AF_INET6, "2001:db8::1")):
            with contextlib.suppress(OSError):
                sock = _socket.socket(family, _socket.SOCK_DGRAM)
                with contextlib.closing(sock):
                    sock.connect((target, 9))
                    found[version] = str(sock.getsockname()[0])
        return found

    def resolved(self, name: str) -> list[str]:
        """The addresses that this machine's resolver has for a name."""
        try:
            return [str(found[4][0]) for found in _socket.getaddrinfo(name, None)]
        except OSError:
            return []

    def lan_hash(self) -> str:
        """A hash of the default gateway's MAC: machines that have the same one are in the same LAN."""
        gateway = parse_default_gateway(read_text("/proc/net/route"))[1]
        hardware = parse_arp(read_text("/proc/net/arp"), gateway) if gateway else ""
        return blake2b(hardware.encode(), digest_size=4).hexdigest() if hardware else ""

    def machine_hash(self) -> str:
        """A hash that stays with the hardware: the MACs of its cards, and the machine id."""
        cards, real = [], []
        for name in sorted(os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else ()):
            if not OVERLAY_OR_CONTAINER.match(name):
                folder = f"/sys/class/net/{name}/"  # assigned 0: for good
                lasting = os.path.exists(folder + "device") and read_text(folder + "addr_assign_type").strip() in ("", "0")
                cards.append(read_text(folder + "address").strip())
                real += cards[-1:] if lasting else []
        real = real or cards
        return blake2b(" ".join([*real, read_text("/etc/machine-id").strip()]).encode(), digest_size=8).hexdigest()

    def port_is_free(self, port: int) -> bool:
        """Whether a UDP port can be bound, on IPv4 and, where there is IPv6, on that too."""
        for family, anywhere in ((_socket.AF_INET, "0.0.0.0"), (_socket.AF_INET6, "::")):  # noqa: S104
            try:
                sock = _socket.socket(family, _socket.SOCK_DGRAM)
            except OSError:
                continue  # no such family here
            try:
                if family == _socket.AF_INET6:
                    sock.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
                sock.bind((anywhere, port))
            except OSError as bad:
                if bad.errno == errno.EADDRINUSE:
                    return False
            finally:
                sock.close()
        return True

    def step_clock(self, known: float, whose: str) -> str:
        """Compare with a time that has been; step forward, never back, where no RTC keeps the clock. What happened."""
        behind = known - time.time()
        if behind < 60:
            return ""
        kept = os.path.exists("/sys/class/rtc/rtc0") or os.environ.get("NETCLIENT_SET_CLOCK", "yes").lower() in NO
        if kept or self.run.dry or time.monotonic() > YOUNG:
            return f"the clock is {behind:.0f} s behind {whose}: WireGuard's peers may ignore this node until it is set (ntpd)"
        try:
            time.clock_settime(time.CLOCK_REALTIME, known)
        except OSError as bad:
            return f"the clock is {behind:.0f} s behind {whose} and cannot be set ({bad.strerror})"
        return f"the clock was {behind:.0f} s behind {whose} and has been set forward"


class Context(NamedTuple):
    """What every command works with: files, the doors to the machine, how to speak to the user."""

    paths: Paths
    run: Run
    files: Files
    system: System
    say: Callable[[str], None]


# --------------------
# NAMES
# --------------------
# Names stand in a hosts file, so they need neither server nor nameserver. Where a resolver can ask a nameserver for one domain
# alone, it is told of the network's too; no machine gets another resolver for anything else.


class Names:
    """The names of one network on this machine. `how`: dnsmasq (OpenWrt's), or hosts, with resolved or openresolv beside it."""

    def __init__(self, context: Context, network: str, interface: str) -> None:
        self.run, self.files, self.root = context.run, context.files, context.paths.root
        self.network, self.interface = network, interface
        self.hosts = self.root + "/etc/hosts"
        folder = self.root + "/tmp/hosts"  # noqa: S108 - OpenWrt's own, which its dnsmasq reads
        self.openwrt = os.path.isdir(folder) and os.path.exists(self.root + "/etc/openwrt_release")
        self.place = f"{folder}/netclient-{network}" if self.openwrt else self.hosts

    def differing(self, lines: Words) -> dict[str, str]:
        """The hosts files that shall say something else, with what."""
        hosts, own = read_exact(self.hosts), "".join(line + "\n" for line in lines)
        new = {self.hosts: (hosts, with_names(hosts, self.network, () if self.openwrt else lines))}
        if self.openwrt:
            new[self.place] = read_exact(self.place), own
        return {path: after for path, (before, after) in new.items() if before != after}

    def write(self, lines: Words) -> None:
        """Have the hosts files say these names."""
        held = self.files.lock(self.root + "/var/run/netclient/.hosts", wait=True)  # other networks write there, too
        try:
            for path, text in self.differing(lines).items():
                if text or path == self.hosts:
                    self.files.edit(path, text)
                else:
                    self.files.remove(path)
        finally:
            if held is not None:
                os.close(held)
        for folder in ("/var/run/", "/var/run/dnsmasq/"):  # it reads hosts files at its start, and when told
            for name in os.listdir(folder) if os.path.isdir(folder) and not self.run.dry else ():
                pid = read_text(folder + name).strip() if re.fullmatch(r"dnsmasq.*\.pid", name) else ""
                if pid.isdigit() and "dnsmasq" in read_text(f"/proc/{pid}/cmdline"):
                    os.kill(int(pid), signal.SIGHUP)

    def clear(self) -> None:
        """Whatever this network has there goes."""
        try:
            if self.differing(()):
                self.write(())
        finally:
            self.run.apply(self.split("")[1])

    def split(self, nameserver: str) -> tuple[str, list[Step]]:
        """What has the resolver ask a nameserver for this network's names alone ("": no more): how it is called, the steps."""
        if os.path.isdir("/run/systemd/resolve") and self.run.has("resolvectl"):
            said = [self._said("resolvectl", kind, self.interface) for kind in ("dns", "domain")]
            if all(said):  # it runs
                return "resolved", self._resolved(nameserver, [text.partition(":")[2].split() for text in said])
        if self.run.has("resolvconf") and "openresolv" in self._said("resolvconf", "--version"):
            return self._openresolv(nameserver)
        return "", []

    def _said(self, *argv: str) -> str:
        try:
            return self.run(*argv)
        except CommandFailed:
            return ""

    def _resolved(self, nameserver: str, have: list[list[str]]) -> list[Step]:
        """Per-link DNS, which goes with the interface."""
        if have == ([[nameserver], ["~" + self.network]] if nameserver else [[], []]):
            return []
        if not nameserver:
            return [Step(("resolvectl", "revert", self.interface), "ask no nameserver for names")]
        # the nameserver last: with no domain it would be asked for everything
        orders = (("domain", "~" + self.network), ("default-route", "false"), ("dns", nameserver))
        why = f"ask {nameserver} for names in {self.network}"
        return [Step(("resolvectl", kind, self.interface, value), why) for kind, value in orders]

    def _openresolv(self, nameserver: str) -> tuple[str, list[Step]]:
        """A private record, where a nameserver on this machine heeds it: else all it does is to rewrite resolv.conf."""
        local = nameserver and re.search(r"LOCALNAMESERVERS=['\" ]*[0-9a-f:]", self._said("resolvconf", "-v"))
        record = f"search {self.network}\nnameserver {nameserver}\n" if local else ""
        have = [line.strip() for line in self._said("resolvconf", "-l", self.interface).splitlines() if line[:1] not in ("#", "")]
        if have == record.splitlines():
            return "openresolv" * bool(record), []
        if not record:
            return "", [Step(("resolvconf", "-d", self.interface), "ask no nameserver for names")]
        why = f"ask {nameserver} for names in {self.network}"
        return "openresolv", [Step(("resolvconf", "-p", "-a", self.interface), why, record)]


# --------------------
# GATEWAY
# --------------------
# Each back end plans from what is there to what shall be; rules None: nothing shall be.


class Fw4:
    """OpenWrt: sections of its own in the firewall's configuration, which stay over reboots and reloads."""

    CONFIG = "/etc/config/firewall"
    UCI = ("uci", "-q", "-t", "/tmp/.uci-netclient")  # noqa: S108 - what the user has staged stays staged

    def __init__(self, run: Run) -> None:
        self.run = run

    def is_supported(self) -> bool:
        return os.access("/sbin/fw4", os.X_OK) and self.run.has("uci")

    def plan(self, network: str, rules: Rules | None) -> list[Step]:
        names = {name for flow in rules.passed for name in (flow.entry, flow.exit)} if rules else set()
        zones = {name: section(network) if rules and name == rules.interface else self._zone(name) for name in sorted(names)}
        text = plan_uci(network, rules, zones, self.run(*self.UCI, "show", "firewall"))
        why = f"set the firewall for {network}"
        return [Step((*self.UCI, "batch"), why, text), Step(("/sbin/fw4", "-q", "reload"), "reload it")] if text else []

    def _zone(self, interface: str) -> str:
        try:
            return self.run("/sbin/fw4", "-q", "device", interface).strip() or "*"
        except CommandFailed:
            return "*"


class Iptables:
    """iptables and ip6tables: own chains, led to from the top of FORWARD, INPUT and POSTROUTING."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def is_supported(self) -> bool:
        return self.run.has("iptables")

    def plan(self, network: str, rules: Rules | None) -> list[Step]:
        return [step for tool in ("iptables", "ip6tables") if self.run.has(tool) for step in self.steps(tool, network, rules)]

    def steps(self, tool: str, network: str, rules: Rules | None, only: Words | None = None) -> list[Step]:
        version = 6 if tool.startswith("ip6") else 4
        unused = not rules or all(flow.version != version for flow in rules.passed)
        try:
            listed = {table: self.run(tool, "-t", table, "-S") for table in (("filter", "nat") if only is None else ("filter",))}
        except CommandFailed:
            if unused:
                return []  # a kernel without it
            raise
        text = plan_iptables(network, iptables_rules(rules, version, only) if rules else {}, listed)
        return [Step((tool + "-restore", "-n"), f"set {tool} for {network}", text)] if text else []


class Nft:
    """nft: a table of its own, and accepts in chains of others that drop; where these are iptables', by iptables."""

    def __init__(self, run: Run) -> None:
        self.run, self.iptables = run, Iptables(run)

    def is_supported(self) -> bool:
        return self.run.has("nft")

    def plan(self, network: str, rules: Rules | None) -> list[Step]:
        chains = parse_ruleset(self.run("nft", "-a", "-t", "list", "ruleset"))
        managed, steps = [], []
        for family, tool in (("ip", "iptables"), ("ip6", "ip6tables")):
            there = [key for key in ((family, "filter", "FORWARD"), (family, "filter", "INPUT")) if key in chains]
            if there and self.run.has(tool):
                managed.append((family, "filter"))
                dropping = [key[2] for key in there if drops(key, chains)]
                mine = any((family, "filter", f"netclient-{letter}-{network}") in chains for letter in "FI")
                if mine or (rules and dropping):
                    steps += self.iptables.steps(tool, network, rules, dropping)
            legacy = tool + "-legacy"
            if "filter" in read_text(f"/proc/net/{family}_tables_names").split() and self.run.has(legacy):
                steps += self.iptables.steps(legacy, network, rules, ("FORWARD", "INPUT"))
        text = plan_nft(network, rules, chains, managed)
        return [*([Step(("nft", "-f", "-"), f"set nft for {network}", text)] if text else ()), *steps]


IPV4, IPV6 = "/proc/sys/net/ipv4/conf/", "/proc/sys/net/ipv6/conf/"


class Gateway:
    """What one network's node forwards on this machine. `switches` on tmpfs: originals, and the networks that want another."""

    def __init__(self, run: Run, files: Files, folder: str, network: str) -> None:
        self.run, self.files, self.folder, self.network = run, files, folder, network
        backends = (Fw4(run), Nft(run), Iptables(run))
        self.backend = next((backend for backend in backends if backend.is_supported()), None)
        self.kept: dict[str, list[str]] = {}

    def is_there(self) -> bool:
        """Whether there may be something to undo, without a process."""
        sections = re.search(rf"'{section(self.network)}(_\d+)?'", read_text(Fw4.CONFIG))
        return bool(sections) or f'"{self.network}"' in read_text(self.folder + "/switches")

    def apply(self, rules: Rules | None) -> list[Step]:
        """Make firewall and switches so; the steps that it took. Where there is and was nothing, this does nothing."""
        if rules is None and not self.is_there():
            return []
        held = self.files.lock(self.folder + "/switches.lock", wait=True)  # shared by all networks
        try:
            with contextlib.suppress(ValueError):
                self.kept = json.loads(read_text(self.folder + "/switches"))
            wanted = self._switches(rules) if rules else {}
            if rules:
                forwarded = (self._original(path + "/forwarding") for path in (IPV4 + rules.interface, IPV6 + "all"))
                rules = rules._replace(closed=not any(value == "1" for value in forwarded))
                for path in wanted:
                    entry = self.kept.setdefault(path, [self._original(path)])
                    entry += [self.network] if self.network not in entry[1:] else []
                self._save()
            else:
                self._restore(wanted)
            steps = self.backend.plan(self.network, rules) if self.backend else []
            self.run.apply(steps)
            for path, value in wanted.items():
                self.files.switch(path, value)
            if rules:
                self._restore(wanted)
            self._save()
            return steps
        finally:
            if held is not None:
                os.close(held)

    def _original(self, path: str) -> str:
        return self.kept[path][0] if path in self.kept else read_text(path).strip()

    def _save(self) -> None:
        text = json.dumps(self.kept)
        if text != (read_text(self.folder + "/switches") or "{}"):
            self.files.volatile(self.folder + "/switches", text)

    def _switches(self, rules: Rules) -> dict[str, str]:
        """The kernel's switches and their values: IPv4 by interface; IPv6 knows only one for all."""
        names = {name for flow in rules.passed if flow.version == 4 for name in (flow.entry, flow.exit)}
        wanted = {f"{IPV4}{name}/forwarding": "1" for name in sorted(names)}
        for name in ("all", rules.interface):  # it asks for either
            wanted[f"{IPV4}{name}/send_redirects"] = "0"
        if any(flow.version == 6 for flow in rules.passed) and self._original(IPV6 + "all/forwarding") == "0":
            routes = [line.split() for line in read_text("/proc/net/ipv6_route").splitlines()]
            learnt = {word[9] for word in routes if len(word) > 9 and int(word[8], 16) & 0x40000}  # RTF_ADDRCONF
            paths = {f"{IPV6}{name}/accept_ra" for name in learnt} | {path for path in self.kept if path.endswith("/accept_ra")}
            wanted.update((path, "2") for path in sorted(paths) if self._original(path) == "1")
            wanted[IPV6 + "all/forwarding"] = "1"
        return {path: value for path, value in wanted.items() if read_text(path)}

    def _restore(self, wanted: Mapping[str, str]) -> None:
        """Put switches back that no network wants any more."""
        for path, (original, *networks) in list(self.kept.items()):
            if self.network in networks and path not in wanted:
                self.kept[path].remove(self.network)
                if len(networks) == 1:
                    self.files.switch(path, original)
                    del self.kept[path]


# --------------------
# DISCOVER
# --------------------
# What is sent names nothing but keyed hashes, node ids and LAN endpoints. A record counts where its MAC is right; a handshake of
# WireGuard's then proves it.

MDNS = ("224.0.0.251", 5353)  # RFC 6762
ASK_FOR = 0.25  # seconds
ADDRESSES = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR of linux/rtnetlink.h
ANNOUNCE_EVERY = 60.0  # seconds in which a check-in stays at most once, for a neighbour that looks for it


def multicast_socket(own: str, port: int = 0) -> Any:
    """A UDP socket that sends multicasts from an address; on port 5353 it hears them, beside others that do."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    interface = _socket.inet_aton(own)
    sock.setsockopt(_socket.IPPROTO_IP, _socket.IP_MULTICAST_IF, interface)
    sock.setsockopt(_socket.IPPROTO_IP, _socket.IP_MULTICAST_TTL, 255)
    if port:
        for option in (_socket.SO_REUSEADDR, getattr(_socket, "SO_REUSEPORT", _socket.SO_REUSEADDR)):
            sock.setsockopt(_socket.SOL_SOCKET, option, 1)
        sock.setsockopt(_socket.IPPROTO_IP, _socket.IP_ADD_MEMBERSHIP, _socket.inet_aton(MDNS[0]) + interface)
        sock.bind((MDNS[0], port))
    else:
        sock.bind((own, 0))
    return sock


def ask_neighbours(addresses: Words, group: bytes) -> tuple[dict[str, str], set[str]]:
    """By node, its endpoint in a LAN of this machine, as said within ASK_FOR seconds; and the nodes that said so to this very
    question: what somebody repeats of an earlier answer moves no session that lives.
    """
    found: dict[str, str] = {}
    proven: set[str] = set()
    challenge = os.urandom(16).hex()
    for own in [text for text in addresses if "." in text]:
        with contextlib.suppress(OSError), contextlib.closing(multicast_socket(own.split("/")[0])) as sock:
            sock.sendto(make_query(int.from_bytes(os.urandom(2), "big"), challenge), MDNS)
            end = time.monotonic() + ASK_FOR
            while len(found) < 1000 and time.monotonic() < end:
                sock.settimeout(max(0.01, end - time.monotonic()))
                for node, place, answered in take_records(sock.recv(9000), group, [own]):
                    proven |= {node} if answered == challenge else set()
                    if answered == challenge or node not in proven:
                        found[node] = place
    return found, proven


def take_records(data: bytes, group: bytes, subnets: Words) -> Iterator[tuple[str, str, str]]:
    """Of each genuine record: the node, its endpoint in one of the subnets, the challenge that it answers."""
    for strings in parse_mdns(data)[1]:
        node, places, answered = verified(group, strings)
        here = [place for place in places if inside(split_endpoint(place)[0], subnets)]
        if here:
            yield node, here[0], answered


def be_there(own: Mapping[str, Told], heard: Callable[[str, str, str], None], addresses: Words, end: float) -> None:
    """Answer for the nodes of this machine (by network) on its LANs until `end` (monotonic), or until the kernel tells that an
    address came or went; `heard` is told of others' records: network, node, endpoint.
    """
    import select

    links: list[Any] = []
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError):  # rtnetlink(7) is Linux' own
            link = stack.enter_context(contextlib.closing(_socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW)))
            link.bind((0, ADDRESSES))
            links = [link]
        socks = {}
        for address in [text for text in addresses if "." in text]:
            with contextlib.suppress(OSError):  # the address may be gone already
                sock = stack.enter_context(contextlib.closing(multicast_socket(address.split("/")[0], MDNS[1])))
                socks[sock.fileno()] = sock, address
                for packet in (*own_records(own), make_query()):
                    sock.sendto(packet, MDNS)
        while time.monotonic() < end:
            ready = select.select([*socks, *links], (), (), max(0.0, end - time.monotonic()))[0]
            if links and links[0] in ready:
                return
            for number in ready:
                with contextlib.suppress(OSError):
                    take_packet(own, heard, *socks[number])


def own_records(own: Mapping[str, Told], number: int = 0, legacy: bool = False, challenge: str = "") -> list[bytes]:
    told = [each for each in own.values() if each[2]]
    texts = [(node, split_endpoint(places[0])[1], announced(group, node, places, challenge)) for group, node, places in told]
    return [make_record(*each, number, legacy) for each in texts]


def take_packet(own: Mapping[str, Told], heard: Callable[[str, str, str], None], sock: Any, address: str) -> None:
    data, sender = sock.recvfrom(9000)
    asked = parse_mdns(data)[0]
    if asked is not None and inside(sender[0], [address]):  # RFC 6762 §11: nobody from elsewhere is answered
        legacy = sender[1] != MDNS[1]
        for packet in own_records(own, int.from_bytes(data[:2], "big") * legacy, legacy, asked):
            sock.sendto(packet, sender if legacy else MDNS)
    for network, (group, node, _) in own.items():
        for other, place, _ in take_records(data, group, [address]):
            if other != node:
                heard(network, other, place)


# --------------------
# API
# --------------------


class Reply(NamedTuple):
    """What came over HTTP, not verified: status, headers by lower-case name, body, own address or ""."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    own: str


def why_not(bad: OSError) -> str:
    """What is behind a failed connection, for a person; to be read after the server's name."""
    if isinstance(bad, ConnectionRefusedError):
        return "refuses the connection (is the server running there?)"
    if isinstance(bad, (TimeoutError, _socket.timeout)):
        return "does not answer"
    if isinstance(bad, _socket.gaierror):
        return "has a name that does not resolve (DNS?)"
    return "cannot be reached (%s)" % (bad.strerror or bad)


class SocketTransport:
    """HTTP on socket and ssl: what every machine has, and enough where no proxy stands between."""

    def is_supported(self) -> bool:
        return not proxy_is_set()

    def send(self, url: str, path: str, line: str, body: bytes, timeout: float, verify: bool) -> Reply:
        tls, host, port, prefix = split_url(url)
        return Reply(*http(host, port, tls, post(host, port, prefix, path, line, body), timeout, verify))


class RequestsTransport:
    """The same through requests, which knows proxies and the system's CA store."""

    def is_supported(self) -> bool:
        try:
            import requests
        except ImportError:
            return False
        return bool(requests)

    def send(self, url: str, path: str, line: str, body: bytes, timeout: float, verify: bool) -> Reply:
        import requests

        method, headers = ("POST", {HEADER: line}) if line else ("GET", {})
        tls, host, port, prefix = split_url(url)
        place = "{}://{}{}{}".format("https" if tls else "http", endpoint(host, port), prefix, path)
        try:
            end, data = time.monotonic() + timeout * 8, b""
            with requests.request(
                method, place, data=body, headers=headers, timeout=timeout, verify=verify, allow_redirects=False, stream=True
            ) as got:
                for piece in got.iter_content(65536):
                    data += piece
                    if len(data) > MAX_ANSWER or time.monotonic() > end:
                        raise BadAnswer("the answer is too long")
        except requests.RequestException as bad:
            raise OSError(str(bad)) from bad
        return Reply(got.status_code, {name.lower(): value for name, value in got.headers.items()}, data, "")


def transport() -> SocketTransport | RequestsTransport:
    for one in (SocketTransport(), RequestsTransport()):
        if one.is_supported():
            return one
    return SocketTransport()


class Session:
    """One membership's conversation with its servers, tried in order, the one that answered last first."""

    def __init__(self, config: Config, secret: Secret, counters: Counters, save: Callable[[], None], system: System) -> None:
        self.config, self.secret, self.counters, self.save, self.system = config, secret, counters, save, system
        self.transport = transport()
        self.box = secret_box(secret.key("seal"))
        counters.mode = "p" if self.box is None else "s"
        self.own = ""
        self.server = ""

    def exchange(self, report: Fields | None = None) -> tuple[Answer, Any]:
        """(answer, its body from JSON or None). Refused when the server says no, Unreachable when none answers."""
        done: tuple[Answer, Any] = self._any_server(lambda server: self._exchange(server, report))
        return done

    def join(self, ask: Callable[[bytes], Fields]) -> Any:
        """Become a node: the server's answer. `ask` makes the body for a nonce."""
        return self._any_server(lambda server: self._join(server, ask))

    def prove(self) -> Answer:
        answer: Answer = self._any_server(self._prove)
        return answer

    def look(self, wait: int) -> str:
        """The current word or "!", after at most `wait` seconds; "" when the server holds too many looks already."""
        path = "%s%s?have=%s&wait=%d" % (LOOK_PATH, self.secret.look, self.counters.word, wait)
        servers = self._order()
        server = self.counters.server if self.counters.server in servers else servers[0]
        reply = self.transport.send(server, path, "", b"", wait + HTTP_TIMEOUT, False)
        if reply.status != 200 or "retry-after" in reply.headers:
            return ""
        return reply.body[:64].decode("ascii", "replace").strip()

    def _order(self) -> list[str]:
        """First through a tunnel that leads to this very server, where its interface is there."""
        last = self.counters.server
        return [*self.system.tunnels(self.secret.pin), *sorted(self.config.servers, key=lambda server: server != last)]

    def _any_server(self, ask: Callable[[str], Any]) -> Any:
        failures = []
        for server in self._order():
            try:
                outcome = ask(server)
            except (OSError, BadAnswer) as bad:
                failures.append(f"{server} {self._reason(server, bad)}")
                continue
            self.counters.server = self.server = server
            return outcome
        raise Unreachable("; ".join(failures))

    def _reason(self, server: str, bad: Exception) -> str:
        if isinstance(bad, OSError):
            return why_not(bad)
        try:
            other = fetch_pin(self.transport, server)
        except (OSError, BadAnswer, ValueError):
            return f"gives no answer that counts: {bad} (a captive portal?)"
        if other != self.secret.pin:
            keys = f"({b64(other)}, not {b64(self.secret.pin)})"
            return f"has another key than this agent trusts {keys}: refused. Was it made new on purpose, join --force"
        return f"gives no answer that counts: {bad}"

    def _send(self, server: str, path: str, line: str, body: bytes) -> Reply:
        reply = self.transport.send(server, path, line, body, HTTP_TIMEOUT, False)
        self.own = reply.own or self.own
        return reply

    def _verified(self, line: str, reply: Reply) -> tuple[Answer, Any]:
        shown = reply.headers.get(HEADER.lower(), "")
        if not shown and b"<html" in reply.body[:2000].lower():
            raise BadAnswer("a web page came instead")
        answer = Answer(self.secret.key("answer mac"), line.rpartition(" ")[2], shown, reply.body)
        body = reply.body if self.box is None else unseal(self.box, reply.body)
        try:
            return answer, json.loads(body) if body else None
        except (ValueError, RecursionError) as bad:
            raise BadAnswer("the answer is no JSON") from bad

    def _exchange(self, server: str, report: Fields | None) -> tuple[Answer, Any]:
        body = self._sealed(json.dumps(report, separators=(",", ":")).encode() if report else b"")
        node, challenge = self.secret.node, "-"
        for _ in range(5):
            self.counters.sequence += challenge == "-"
            self.save()
            line = self.counters.line(self.secret, node, challenge, body)
            reply = self._send(server, EXCHANGE_PATH, line, body)
            if reply.status == 404 and HEADER.lower() not in reply.headers and "@" not in node:
                # it does not know us: say who we are, so that it can sign
                node = f"{self.secret.node}@{b64(self.secret.agent)}@{self.secret.network}"
                continue
            answer, data = self._verified(line, reply)
            if answer.status in (200, 204):
                return answer, data
            if answer.status != 409 or not isinstance(data, dict) or "error" in data:
                raise Refused(answer.status, data)
            challenge = str(data.get("challenge", "-"))
            if challenge == "-":
                self.counters.incarnation = str(data["incarnation"])
                self.counters.epoch, self.counters.sequence = int(data["epoch"]) + 1, -1
        raise BadAnswer("the server does not accept our counters")

    def _sealed(self, body: bytes) -> bytes:
        return bytes(self.box.encrypt(body)) if body and self.box is not None else body

    def _join_line(self, incarnation: str, nonce: bytes, body: bytes) -> str:
        head = (b64(self.secret.agent), self.secret.network, self.counters.mode, incarnation, b64(nonce))
        return signed(self.secret.key("request mac"), JOIN_PATH, head, body)

    def _prove(self, server: str) -> Answer:
        line = self._join_line("-", os.urandom(16), b"")
        answer, data = self._verified(line, self._send(server, JOIN_PATH, line, b""))
        if answer.status != 409:
            raise Refused(answer.status, data)
        self.counters.incarnation = str(data["incarnation"])
        return answer

    def _join(self, server: str, ask: Callable[[bytes], Fields]) -> Any:
        for _ in range(3):
            nonce = os.urandom(16)
            body = self._sealed(json.dumps(ask(nonce), separators=(",", ":")).encode())
            line = self._join_line(self.counters.incarnation, nonce, body)
            answer, data = self._verified(line, self._send(server, JOIN_PATH, line, body))
            if answer.status == 200:
                return data
            if answer.status != 409 or "incarnation" not in data:
                raise Refused(answer.status, data)
            self.counters.incarnation = str(data["incarnation"])
        raise BadAnswer("the server changes its incarnation again and again")


def fetch_pin(sender: SocketTransport | RequestsTransport, server: str, verify: bool = False) -> bytes:
    """The key that a server claims to have. BadAnswer when it is no netmaker-lite server."""
    reply = sender.send(server, HELLO_PATH, "", b"", HTTP_TIMEOUT, verify)
    try:
        pin = unb64(json.loads(reply.body)["pin"])
        if len(pin) != KEY_BYTES:
            raise ValueError("no key")
        return pin
    except MALFORMED as bad:
        raise BadAnswer("there is no netmaker-lite server") from bad


# --------------------
# RECONCILE
# --------------------


def watch(memory: Memory, actual: Actual, wall: float, now: float) -> set[str]:
    """The keys of peers whose session lives; the memory notes when bytes came, and since when there is no handshake.

    A handshake younger than 180 s, and, with keepalives, bytes received within the last minute.
    """
    fresh = set()
    for key, live in actual.peers.items():
        before = memory.rx.get(key, ())
        rx, heard, handshake, born, tx = before if len(before) == 5 else (-1, 0, -1, 0, -1)
        if rx != live.rx:
            heard = int(now)
        if handshake != live.handshake:  # its age counts once: later the clock may step
            born = int(now - max(0.0, wall - live.handshake))
        memory.rx[key] = [live.rx, heard, live.handshake, born, live.tx]
        silent = live.keepalive and now - heard >= max(60, 3 * live.keepalive)
        if live.handshake and now - born < FRESH and not silent:
            fresh.add(key)
            memory.waiting.pop(key, None)
        elif live.keepalive or not live.handshake or (tx >= 0 and tx != live.tx and rx == live.rx):
            memory.waiting.setdefault(key, now)
        elif rx != live.rx:  # without keepalives a tunnel that nobody uses is silent
            memory.waiting.pop(key, None)
    for known in (memory.waiting, memory.renewed, memory.rx):
        for past in set(known) - set(actual.peers):
            del known[past]
    return fresh


def report(
    memory: Memory, actual: Actual, fresh: set[str], facts: Fields, wishes: Fields, now: float, lone: Iterable[str] = ()
) -> Row:
    """What an exchange tells the server: only what changed since it last heard. `lone`: keys of peers without a way to them."""
    node_of = {record["key"]: node for node, record in memory.view.peers.items()}
    seen = {node_of[key]: actual.peers[key].endpoint for key in fresh if key in node_of and actual.peers[key].endpoint}
    tried = {key for key, live in actual.peers.items() if live.tx and live.endpoint} | {*lone}
    mute = {node_of[key]: True for key, since in memory.waiting.items() if key in node_of and key in tried and now - since > MUTE}
    rejected = memory.rejected or ({"word": "-"} if memory.said not in ("", "-") else {})  # nothing any more
    told: Row = {
        "facts": {name: value for name, value in facts.items() if memory.facts.get(name) != value},
        "wishes": {name: value for name, value in wishes.items() if memory.wishes.get(name) != value},
        "seen": {**dict.fromkeys(memory.seen.keys() - seen.keys()), **{n: e for n, e in seen.items() if memory.seen.get(n) != e}},
        "mute": {**dict.fromkeys(memory.mute.keys() - mute.keys()), **{n: True for n in mute if n not in memory.mute}},
        "rejected": rejected if rejected.get("word") != memory.said else {},
    }
    return {name: value for name, value in told.items() if value}


def with_ranges_of(view: View, old: View) -> None:
    """Give the peers the ranges that an older view has: these are routes, which are taken back."""
    for node, record in view.peers.items():
        ranges = old.peers.get(node, {}).get("ips")
        view.peers[node] = {name: value for name, value in record.items() if name != "ips"}
        if ranges:
            view.peers[node]["ips"] = ranges


def reported(memory: Memory, told: Fields) -> None:
    memory.facts.update(told.get("facts", {}))
    memory.wishes.update(told.get("wishes", {}))
    for name, known in (("seen", memory.seen), ("mute", memory.mute)):
        for node, value in told.get(name, {}).items():
            if value is None:
                known.pop(node, None)
            else:
                known[node] = value
    if "rejected" in told:
        memory.said = told["rejected"]["word"]


def lingering(memory: Memory, before: View, after: View, snapshot: bool, now: float) -> None:
    """Peers that a restored server no longer knows stay for an hour. Changes `after` and the memory."""
    if snapshot and before.incarnation not in ("-", after.incarnation):
        memory.kept = {node: now + KEEP_AFTER_RESTORE for node in before.peers if node not in after.peers}
    for node in list(memory.kept):
        theirs, ours = after.peers.get(node), before.peers.get(node)
        if theirs is None and ours is not None and snapshot:
            after.peers[node] = ours
        elif theirs is not ours or theirs is None:  # the server knows it again, or named it as gone
            del memory.kept[node]
    others = [record for node, record in after.peers.items() if node not in memory.kept]
    taken = {record.get(kind) for record in others for kind in ("key", "ip", "ip6")} - {None}
    for node in [node for node in memory.kept if taken & {after.peers[node].get(kind) for kind in ("key", "ip", "ip6")}]:
        del after.peers[node], memory.kept[node]
    lapse(memory, after, now)


def lapse(memory: Memory, view: View, now: float) -> None:
    for node, until in list(memory.kept.items()):
        if not 0 <= until - now < KEEP_AFTER_RESTORE + 1:  # more after a reboot; not quite exact, as sums of floats are
            del memory.kept[node]
            view.peers.pop(node, None)


def forget(context: Context, network: str) -> None:
    """Remove a membership's files: first the one that says it exists."""
    for kind in (*reversed(MEMBERSHIP), "peers", "memory", "state", "seen"):
        context.files.remove(context.paths.of(kind, network))


def forget_staged(context: Context, network: str) -> None:
    forget(context._replace(paths=context.paths.staged()), network)


def run_hook(context: Context, network: str, interface: str, kind: str, texts: Words) -> list[str]:
    """Run root's own hook of this network, and the server's where they are accepted; what failed. Their output goes nowhere."""
    path, failed = f"{context.paths.home}/hooks/{network}/{kind}", []
    commands = [("sh", "-c", text.replace("%i", interface)) for text in texts if text]
    if kind and os.path.exists(path):
        owned = [os.stat(each) for each in (path, os.path.dirname(path))]
        if any(info.st_uid or info.st_mode & 0o022 for info in owned):
            failed.append(f"{path} is not run: others than root can write it")
        else:
            commands.insert(0, (path, interface, network))
    for argv in commands:
        try:
            context.run.apply([Step(argv, kind, detached=True)])
        except CommandFailed as bad:
            failed.append(f"a hook failed: {bad}")
    return failed


class Node:
    """One membership on this machine: its files, its conversation, its interface."""

    def __init__(self, context: Context, config: Config, secret: Secret, private: str, spare: Spare = None) -> None:
        self.context, self.config, self.secret, self.private, self.spare = context, config, secret, private, spare
        self.paths, self.files, self.run = context.paths, context.files, context.run
        self.system = context.system
        self.counters = Counters(read_text(self.file("state")))
        self.counters.server = "-" if self.counters.server == DOWN else self.counters.server
        self.memory = self._remembered()
        self.session = Session(config, secret, self.counters, self.save_counters, self.system)
        self.place = Place()
        self.homes: dict[str, str] = {}
        self.sources: dict[int, str] = {}
        self._live = Actual()
        self.fresh: set[str] = set()
        self.late = False  # names are still to be written
        self.heard = 0.0
        self.shifted = False  # an address that this machine had at the last check-in is gone
        self.proven: set[str] = set()  # nodes that answered in a LAN, just now
        self.changes: list[Step] = []

    def file(self, kind: str) -> str:
        return self.paths.of(kind, self.config.network)

    def others(self) -> list[Row]:
        """The records of all other nodes, by name."""
        peers = self.memory.view.peers.items()
        return sorted((record for node, record in peers if node != self.secret.node), key=lambda record: str(record["name"]))

    def move(self, context: Context) -> None:
        """A prepared join becomes the membership: its files, the one that says it exists last."""
        for kind in MEMBERSHIP:
            text = self.secret.text() if kind == "secret" else read_text(self.file(kind))
            self.files.write(context.paths.of(kind, self.config.network), text)
        forget_staged(context, self.config.network)
        self.context, self.paths = context, context.paths

    @classmethod
    def load(cls, context: Context, network: str) -> Node:
        """From disk; NetclientError that says which file is wrong and what to do."""
        paths, kind = context.paths, "netconfig"
        try:
            config = Config.parse(read_text(paths.of(kind, network)))
            kind = "secret"
            secret = Secret.parse(network, read_text(paths.of(kind, network)))
            kind = "wgkey"
            keys = parse_keys(read_text(paths.of(kind, network)))
        except ValueError as bad:
            cure = f"join --force with a fresh token, or leave -n {network}"
            raise NetclientError(f"{paths.of(kind, network)} is missing or damaged: {cure}") from bad
        return cls(context, config, secret, *keys)

    def _remembered(self) -> Memory:
        try:
            return Memory(json.loads(read_text(self.file("memory"))))
        except MALFORMED:
            memory = Memory()
        with contextlib.suppress(*MALFORMED):
            memory.view = View(json.loads(read_text(self.file("peers"))))
        # what the user wished was told when it was written down
        memory.wishes = dict(self.config.wishes)
        self.counters.word, self.counters.incarnation = "-", memory.view.incarnation
        return memory

    def save_counters(self) -> None:
        self.files.volatile(self.file("state"), self.counters.text())

    def save_memory(self) -> None:
        self.files.volatile(self.file("memory"), self.memory.text())

    def save_good(self) -> None:
        """The last good state to flash: at a change, at most once a minute; for endpoints alone once an hour."""
        memory, now = self.memory, time.monotonic()
        age = now - memory.flashed if 0 < memory.flashed <= now else float("inf")
        path = self.file("peers")
        old = _loaded(read_text(path))
        endpoints = {key: self._live.peers[key].endpoint for key in self.fresh if key in self._live.peers}
        same_mesh = {**old, "endpoints": 0} == {**memory.view.values(), "endpoints": 0}
        if age < 60 or (same_mesh and (age < 3600 or endpoints.items() <= dict(old.get("endpoints", {})).items())):
            return
        keys = {record["key"] for record in memory.view.peers.values()}
        known = {**memory.view.endpoints, **endpoints}
        memory.view.endpoints = {key: known[key] for key in sorted(known) if key in keys}
        self.files.write(path, json.dumps(memory.view.values(), separators=(",", ":")) + "\n")
        memory.flashed = now

    def keep_keys(self, private: str, spare: Spare) -> None:
        """To flash: the key in force, and the next one with its public half, until that is in force."""
        text = private + "\n" + (" ".join(spare) + "\n" if spare else "")
        self.files.write(self.file("wgkey"), text)
        self.private, self.spare = private, spare

    # -- the machine

    def read(self) -> Actual:
        links = self.system.links()
        self._live = self.system.actual(self.config.interface, links)
        self.fresh = watch(self.memory, self._live, time.time(), time.monotonic())
        self.homes = self.system.subnets(links)
        me = self.memory.view.me
        own = self.memory.view.peers.get(self.secret.node, {})
        seen = split_endpoint(own["seen"])[0] if own.get("seen") else ""
        self.sources, lan = self.system.sources(), self.system.lan_hash()
        ways = frozenset(self.sources)
        self.place = Place(seen, tuple(self.homes), lan, me.get("local", False), me.get("punch", True), ways)
        for node, record in list(self.memory.view.peers.items()):
            spare = record.get("spare")  # who missed the instant moves at the first handshake
            if spare and self._handshake(spare) > max(self._handshake(record["key"]), self.memory.passed.get(spare, 0)):
                self.turn(node)
        return self._live

    def _handshake(self, key: str) -> int:
        return self._live.peers[key].handshake if key in self._live.peers else 0

    def turn(self, node: str) -> None:
        """Have a node's traffic go by its other key."""
        memory = self.memory
        record = memory.view.peers[node]
        old, new = record["key"], record["spare"]
        memory.view.peers[node] = {**record, "key": new, "spare": old, "moved": not record.get("moved")}
        memory.passed[old] = self._handshake(old)
        memory.waiting.pop(new, None)
        memory.deaf[new] = memory.deaf.get(old, 0)
        memory.unsettled = time.monotonic() + UNSETTLED

    def switch(self, patience: float) -> None:
        """Change keys at the announced instants, waiting for those that are at most `patience` seconds away.

        From a node that does not come with its new key others go back to the old one, until it does.
        """
        memory = self.memory
        for node, at in sorted(memory.switch.items(), key=lambda pair: pair[1]):
            own = node == self.secret.node
            at += own and SWITCH_AFTER
            left = at - time.monotonic()
            if patience < left <= LONGEST or self.run.dry:
                return
            del memory.switch[node]
            if node.startswith(DIRECT):  # from a relay back to the direct way, both ends at one instant
                time.sleep(min(max(0.0, left), patience))
                memory.view.me.get("relayed", {}).pop(node[len(DIRECT) :], None)
                self.read()
                self.apply(memory.view)
                self.save_memory()
                continue
            record = memory.view.peers.get(node, {})
            over = record.get("moved", "spare" not in record) or record["key"] in memory.passed
            if left > LONGEST or (not self.spare if own else over):
                continue
            time.sleep(max(0.0, left - 1))  # what takes time first
            self.read()
            if own and self.spare:
                self.keep_keys(self.spare[0], None)
            time.sleep(max(0.0, at - time.monotonic()))
            if not own and not memory.view.peers[node].get("moved"):
                self.turn(node)
            self.apply(memory.view)
            if not own:
                time.sleep(SWITCH_WITHIN)
                self.read()
                if memory.view.peers[node].get("moved") and not self._handshake(record["spare"]):
                    self.turn(node)
                self.apply(memory.view)
            self.save_memory()

    def keep_out(self) -> list[str]:
        endpoints = [live.endpoint for live in self._live.peers.values() if live.endpoint]
        found = [split_endpoint(text)[0] for text in endpoints]
        if self.counters.server != "-" and any(record.get("ips") for record in self.memory.view.peers.values()):
            # only where a range could swallow it; while DNS is down, what it said last
            self.memory.server = self._servers() or self.memory.server
            found += self.memory.server
        return [*found, *self.place.subnets]

    def _servers(self) -> list[str]:
        """The addresses of the server outside of tunnels, and the one in use."""
        urls = {*self.config.servers, self.counters.server} - {"-", self.config.hub}
        return [address for url in sorted(urls) for address in addresses_of(split_url(url)[1])]

    def desired(self, view: View) -> Desired:
        now = time.monotonic()
        endpoints = {}
        ranges = [view.me[width] for width in ("range", "range6") if view.me.get(width)]
        mine = {text.split("/")[0] for text in self.place.subnets}
        for node, record in view.peers.items():
            key = record["key"]
            found = self.memory.found.get(node, "")
            live = self._live.peers.get(key)
            waited = now - max(self.memory.waiting.get(key, now), self.memory.renewed.get(key, 0))
            turn = int(waited // TURN)
            resting = live is not None and bool(live.endpoint) and key not in self.memory.waiting
            where, saved = live.endpoint if live else "", view.endpoints.get(key, "")
            sure = not resting or node in self.proven or where == found  # a session that lives moves for no old answer
            if found and sure and inside(split_endpoint(found)[0], self.place.subnets):
                record = {**record, "found": found}
            chosen = choose_endpoint(record, self.place, where, resting, turn, saved, now < self.memory.deaf.get(key, 0))
            if turn and where and where in (found, record.get("local")):  # no handshake came: the public one, for a while
                self.memory.deaf[key] = now + DEAF
            spare = self._live.peers.get(record.get("spare", ""))
            if spare and spare.endpoint and not where:
                chosen = spare.endpoint
            address = split_endpoint(chosen)[0] if chosen else ""
            if chosen and address not in mine and not inside(address, ranges):
                endpoints[node] = chosen
                if spare and turn:  # which of the two keys the node has shows when it answers
                    endpoints[spare.key] = chosen
        out = [*self.keep_out(), *(split_endpoint(text)[0] for text in endpoints.values())]
        key = self.secret.key("client")
        wanted, warnings = desire(view, self.secret.node, self.config, self.private, endpoints, out, key)
        self._warn("peers", warnings)
        if view.state in ("disabled", "expired"):
            wanted = wanted._replace(peers={})
        return wanted._replace(port=self._port(wanted.port))

    def _port(self, wished: int) -> int:
        """The server's port, unless the user fixed one or another program has it; kept over rebuilds."""
        config, system = self.config, self.system
        if config.port and (config.fixed or self._live.port == config.port == wished):
            wished = config.port
        if wished != self._live.port and not system.port_is_free(wished):
            if config.fixed:
                raise NetclientError("UDP port %d is in use by another program: stop that, or join with another --port" % wished)
            free = (port for port in range(wished, 65536) if system.port_is_free(port))
            wished = self._live.port if self._live.port >= 1024 else next(free)
        if wished != config.port:
            config.port = wished
            self.files.write(self.file("netconfig"), config.text())
        return wished

    def apply(self, view: View) -> bool:
        if view.state in ("", "pending") or not (view.me.get("ip") or view.me.get("ip6")):
            return False
        wanted = self.desired(view)
        backend = self.system.backend() if not self._live.exists else KernelWireGuard(self.run)
        create = backend.create(self.config.interface)
        many_routes = len(wanted.routes ^ self._live.routes) > 1
        steps = plan(self._live, wanted, create, many_routes and self.system.batch())
        if not self._live.exists:
            self.run.apply(steps[:1])
            self._await_interface()
            now = self.system.actual(self.config.interface, self.system.links())
            steps = steps[1:] if self.run.dry else plan(now, wanted, create)
        if set(self._live.peers) != set(wanted.peers):
            self.memory.unsettled = time.monotonic() + UNSETTLED
        created = not self._live.exists
        self.run.apply(steps)
        steps += self._forward(view, wanted.port) + self._name(view)
        self._hook(view.me.get("hooks", []), created)
        self.changes += steps
        if steps and not self.run.dry:
            self.read()
        return bool(steps)

    def _hook(self, told: list[str], created: bool) -> None:
        """PostUp where the interface came up, and where the server's commands are others than those that have run."""
        memory, interface = self.memory, self.config.interface
        wanted = told if self.config.accept_hooks else []
        if created or memory.hooks != wanted:
            failed = [] if created else run_hook(self.context, self.config.network, interface, "", memory.hooks[1:])
            failed += run_hook(self.context, self.config.network, interface, "postup" * created, wanted[:1])
            memory.hooks, memory.unhooked = wanted, "; ".join(failed)
            self._warn("hooks", failed)

    def _forward(self, view: View, port: int) -> list[Step]:
        """Firewall and forwarding as the view's roles want them. What fails here is said and stops nothing else."""
        rules, steps = None, []
        warnings: list[str] = []
        try:
            if any(roles(view)):
                ways, interface = self.system.ways(self.config.interface), self.config.interface
                strangers = [text for text in self.keep_out() if "/" not in text and not inside(text, self.place.subnets)]
                named = view.me.get("egress", {}).get("interface", "")
                links = [named] if named and self.system.exists(named) else []
                rules, warnings = gateway_rules(view, interface, port, ways, strangers, links)
                away = [flow for flow in rules.passed if flow.target and not flow.back] if rules else []
                for name, target in [(flow.exit, flow.target) for flow in away if flow.exit not in exits(flow.target, ways)]:
                    if self.system.is_strict(name):
                        warnings.append(f"{name} drops what comes from {target}: set its rp_filter to 2")
            gateway = Gateway(self.run, self.files, self.context.paths.run, self.config.network)
            if rules and gateway.backend is None:
                warnings.append("it forwards without NAT: there is no nft and no iptables here; install nftables")
            steps = gateway.apply(rules)
        except NetclientError as bad:
            warnings.append(f"the gateway is not as it should be: {bad}")
        self._warn("gateway", warnings)
        return steps

    def _name(self, view: View) -> list[Step]:
        """Have this machine know the names that the view has. What fails here is said and stops nothing else."""
        memory, names = self.memory, Names(self.context, self.config.network, self.config.interface)
        lines = host_lines(view, self.config.network)
        nameserver = view.me.get("nameserver", "") if lines else ""
        steps: list[Step] = []
        failures: list[str] = []
        how, now = "", time.monotonic()
        try:
            differing = names.differing(lines)
            self.late = names.hosts in differing and 0 < memory.named <= now < memory.named + 60
            if differing and not self.late:  # flash is written once a minute
                names.write(lines)
                memory.named = now
        except (NetclientError, OSError) as bad:
            failures.append(f"names are not as they should be: {bad}")
        try:
            if nameserver or memory.names not in ("", "hosts", "dnsmasq"):
                how, steps = names.split(nameserver)
            self.run.apply(steps)
        except NetclientError as bad:
            failures.append(f"no nameserver is asked for names: {bad}")
        memory.names = "" if not lines else how if nameserver and how else "dnsmasq" if names.openwrt else "hosts"
        self._warn("names", failures)
        return steps

    def _warn(self, kind: str, warnings: list[str]) -> None:
        """Say what was not said of the same kind the last time."""
        for warning in [text for text in warnings if text not in self.memory.warned.get(kind, ())]:
            self.context.say(f"{self.config.network}: {warning}")
        self.memory.warned[kind] = warnings

    def _seek(self) -> None:
        """Ask the LAN for nodes that are lost in it: those without a handshake, and all of them when this machine has moved."""
        memory, now, homes = self.memory, time.monotonic(), list(self.place.subnets)
        self.shifted = bool(homes) and not {*memory.homes} <= {*homes}  # a new one beside them cuts nobody off
        memory.moved = now if homes and memory.homes not in ([], homes) else memory.moved
        memory.homes = homes or memory.homes  # without any for a moment, while it moves
        group, lan = memory.view.me.get("group", ""), self.place.lan
        near = (each for each in self.others() if memory.view.me.get("local") or (lan and each.get("lan") == lan))
        moved = 0 < memory.moved <= now < memory.moved + UNSETTLED  # old sessions may look alive for a minute
        answers: dict[str, str] = {}
        lost = [each["id"] for each in near if moved or now - memory.waiting.get(each["key"], now) > 5]
        if group and lost and not self.run.dry:
            answers, self.proven = ask_neighbours(homes, unb64(group))
        memory.found.update(answers)
        memory.lonely = bool(group) and not {*lost} <= {*answers}

    def neighbour(self) -> Told:
        """What this node tells its LANs: the group's key, its id, its endpoints there."""
        group, port = self.memory.view.me.get("group", ""), self.config.port
        own = [text.split("/")[0] for text in self.system.subnets(self.system.links())]
        return unb64(group), self.secret.node, [endpoint(address, port) for address in own] if group else []

    def _knock(self) -> None:
        """Have WireGuard try again peers that it gave up, as it does after 90 s (REKEY_ATTEMPT_TIME) where no packet waits, which
        is so with those that are relayed; show all peers this machine's new address. A keepalive set anew makes a packet.
        """
        now, live = time.monotonic(), self._live.peers
        silent = {key for key, since in self.memory.waiting.items() if now - since > 90 and self._tried(key)}
        knocked = [key for key, peer in live.items() if peer.keepalive and (self.shifted or (key in silent and not peer.allowed))]
        words: list[str] = []
        for key in sorted(knocked):
            # wireguard-go goes on sending from the address that it sent from before until an endpoint is set
            words += ["peer", key, *(("endpoint", live[key].endpoint) if self.shifted and live[key].endpoint else ())]
            words += ["persistent-keepalive", "0", "peer", key, "persistent-keepalive", str(live[key].keepalive)]
        if words:
            self.run.apply([Step(("wg", "set", self.config.interface, *words), TRY)])

    def _await_interface(self) -> None:
        end = time.monotonic() + 5
        while not self.run.dry:
            try:
                self.run("wg", "show", self.config.interface, "dump")
                return
            except CommandFailed:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    # -- the conversation

    def facts(self) -> Row:
        local = self.config.localaddress or self._local_address()
        live, told = self._live, self.memory.facts
        spare = self.spare[1] if self.spare else ""
        known = live.public if live.private == self.private else "" if live.exists else told.get("key")
        more: Row = {"keyed": True} if self.config.keyed else {}
        if self.config.accept_hooks or told.get("hooks"):
            said = "accepted; " + "".join(letter for letter in self.memory.unhooked if " " <= letter <= "~")
            more["hooks"] = said[:80] if self.config.accept_hooks else ""
        if spare or told.get("next") or "spare" in self.memory.view.peers.get(self.secret.node, ()):
            more["next"] = spare
        return {
            **more,
            "key": known or derived_public(self.private),
            "port": self.config.port,
            "fixed": self.config.fixed,
            "endpoint": self.config.endpoint,
            "local": local,
            "local6": self._own6(),
            "lan": self.place.lan,
            "os": f"{os.uname().sysname} {os.uname().release}",
            "version": __version__,
            "machine": self.system.machine_hash(),
        }

    def _local_address(self) -> str:
        """The address in the own LAN: in --localrange or the network's, else the one that the server sees, else any."""
        found = [text.split("/")[0] for text in self.place.subnets]
        wanted = self.config.localrange or self.memory.view.me.get("localrange")
        if wanted:
            found = [address for address in found if inside(address, [wanted])]
        if self.session.own in found:
            return self.session.own
        before = str(self.memory.facts.get("local", ""))
        return before if before in found else found[0] if found else ""

    def _own6(self) -> str:
        """The IPv6 address, of a card of this machine, from which its packets go out: no NAT stands before a public one."""
        own = self.sources.get(6, "::")
        return own if is_public(own) and own in {text.split("/")[0] for text in self.homes} else ""

    def exchange(self) -> Any:
        now = time.monotonic()
        lone = [record["key"] for record in self.others() if apart(record, self.place)]
        facts, wishes = self.facts(), self.config.wishes
        told = {} if self.run.dry else report(self.memory, self._live, self.fresh, facts, wishes, now, lone)
        answer, data = self.session.exchange(told)
        self.heard = answer.at
        reported(self.memory, told)
        self.memory.exchanged = now
        self._clock(answer.time, "the server's")
        return data

    def _clock(self, known: float, whose: str) -> None:
        said = self.system.step_clock(known, whose)
        if said:
            self.context.say(f"{self.config.network}: {said}")

    def check_in(self, handed: Answer | None = None, afresh: bool = False, patience: float = 0) -> None:
        """One check-in: repair the machine from what is known, ask, apply what is new, confirm, remember.

        afresh: take a snapshot whatever is known; patience: see `switch`. Raises Refused, Unreachable and CommandFailed; the
        machine is then as the last authenticated answer wants it.
        """
        files = [self.file(kind) for kind in (*MEMBERSHIP, "peers")]
        self._clock(max((os.path.getmtime(path) for path in files if os.path.exists(path)), default=0.0), "its own files'")
        self.read()
        lapse(self.memory, self.memory.view, time.monotonic())
        self._seek()
        self.apply(self.memory.view)
        self._knock()
        if afresh:
            self.counters.word = "-"
        data = self._opened(handed) if handed is not None and handed.status == 200 else None
        for _ in range(5):
            self.switch(patience)
            try:
                data = data or self.exchange()
            except Unreachable:
                self._roll_back()
                raise
            self.memory.trial = None
            if data is None:
                break
            self.adopt(data)
            data = None
            if self.run.dry:
                return
        if not self.run.dry:
            self.save_good()

    def _opened(self, answer: Answer) -> Any:
        self.heard = answer.at
        body = answer.body if self.session.box is None else unseal(self.session.box, answer.body)
        return json.loads(body)

    def adopt(self, data: Fields) -> None:
        """Take a delta or snapshot: check it whole, remember it, then make the machine so."""
        memory, before = self.memory, self.memory.view
        before.word = self.counters.word
        after = parse_news(before, data)
        after.incarnation = self.counters.incarnation
        lingering(memory, before, after, "from" not in data, time.monotonic())
        keeping_keys(before, after, self._live.peers)
        memory.switch = parse_switch(data.get("in"), self.heard)
        memory.passed = memory.passed if memory.switch else {}
        for node in [node for node, at in memory.switch.items() if node.startswith(DIRECT) and at <= self.heard]:
            after.me.get("relayed", {}).pop(node[len(DIRECT) :], None)
            del memory.switch[node]
        if before.incarnation not in ("-", after.incarnation):  # a restored server knows older ones
            memory.facts, memory.seen, memory.mute = {}, {}, {}
        refused = memory.rejected.get("word") == after.word
        if refused:  # taken back once: its peers count, its addresses and routes do not
            after.me = before.me
            with_ranges_of(after, before)
        else:
            memory.rejected = {}
        self._check_clash(after)
        for node, record in after.peers.items():
            if before.peers.get(node) != record and record["key"] in memory.waiting:
                memory.renewed[record["key"]] = time.monotonic()
        risky = [(roles(each), each.me.get("dns"), each.me.get("nameserver")) for each in (before, after)]
        if before.me and not refused and (risky[0] != risky[1] or cuts_off(self._live, self._wanted_routes(after))):
            memory.trial = before.values()
        named = after.me.get("interface", "")  # the network's, once, where the user named none
        first = not before.me and named and self.config.interface == "nm-" + self.config.network
        if first and not self.system.exists(named):
            self.config.interface = named
        hub = after.me.get("server", "")
        if first or self.config.hub != hub:
            self.config.hub = hub
            self.files.write(self.file("netconfig"), self.config.text())
        memory.view = after
        self.counters.word = after.word
        asked = after.me.get("refresh") and not self.config.keyed
        if self.spare and not asked:
            self.keep_keys(self.private, None)
        elif asked and not self.spare and "spare" not in after.peers.get(self.secret.node, ()):
            new = new_private()
            self.keep_keys(self.private, (new, derived_public(new)))
        if not self.run.dry:
            self.save_memory()
            self.save_counters()
        self.apply(after)
        if after.me.get("port") != self.config.port:  # it has to hear of ours again
            memory.facts.pop("port", None)

    def _wanted_routes(self, view: View) -> Desired:
        if not view.me:
            return Desired("", "", 0, 0, frozenset(), frozenset(), {})
        return desire(view, self.secret.node, self.config, self.private, {}, self.keep_out())[0]

    def _check_clash(self, view: View) -> None:
        before = self.memory.view.me
        ranges = {view.me.get("range"), view.me.get("range6")} - {None, before.get("range"), before.get("range6")}
        servers = self._servers() if ranges and self.counters.server != "-" else []
        for text, interface in {**self.homes, **dict.fromkeys(servers, "the server")}.items():
            own: Any = ipaddress.ip_interface(text).network
            for network in map(ipaddress.ip_network, sorted(filter(None, ranges))):
                if own.version == network.version and own.overlaps(network):
                    raise NetclientError(
                        f"the network's range {network} overlaps {own} of {interface} here: nothing was changed; the admin can "
                        f"move it (netmaker-lite network set {self.config.network} addressrange=…); a join needs a new token then"
                    )

    def _roll_back(self) -> None:
        """Commit-confirm: the server is gone since a change of addresses or routes: take these back."""
        trial = self.memory.trial
        if trial is None:
            return
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(1)
            try:
                self.session.exchange()
                return
            except Unreachable:
                continue
            except Refused:
                return
        view, old = self.memory.view, View(trial)
        self.memory.rejected = {"word": view.word, "reason": "the server could not be reached any more after applying it"}
        self.context.say(
            f"{self.config.network}: revision {view.word} cut the server off: addresses, routes, roles are taken back"
        )
        view.me, view.word = old.me, old.word
        with_ranges_of(view, old)
        self.counters.word, self.memory.trial = old.word, None
        self.read()
        self.apply(view)

    def finish(self, done: bool = True) -> None:
        """Write down when the next full check is due (after a failure at once), and what the machine looks like."""
        now, memory = time.monotonic(), self.memory
        tried = (max(since, memory.renewed.get(key, 0)) for key, since in memory.waiting.items() if self._tried(key))
        hurry = any(now - since < HOPELESS for since in tried)
        unsettled = hurry or self.late or now < memory.unsettled or memory.trial is not None or bool(memory.switch)
        self.counters.due = now + CHECK_EVERY if done and not unsettled else 0
        self.counters.interface = self.config.interface
        self.counters.local = self.session.own or "-"
        self.counters.mark = machine_mark(self.config.interface)
        self.files.volatile(self.file("seen"), seen_text(self.counters, self.secret.look))
        self.save_memory()
        self.save_counters()

    def rest(self) -> None:
        """Nothing to do until it is taken up again: what the no-change check-in and netclient-look know of that."""
        self.counters.server = DOWN
        self.memory = Memory({"view": self.memory.view.values()})
        if not self.run.dry:
            self.save_memory()
            self.save_counters()
            self.files.volatile(self.file("seen"), DOWN + "\n")

    def _tried(self, key: str) -> bool:
        live = self._live.peers.get(key)
        return live is not None and bool(live.endpoint) and live.keepalive > 0


def seen_text(counters: Counters, look: str) -> str:
    """`NETWORK.seen` on tmpfs: all that shell/netclient-look knows, for it cannot hash: when the agent is due, where to ask, and
    the routes in the kernel's order.
    """
    words = (line.split() for line in read_text("/proc/net/ipv6_route").splitlines())
    routes6 = [f"6 {word[4]} {word[9]}" for word in words if len(word) > 9 and word[1] == "00" and word[9] != "lo"]
    head = (int(counters.due), counters.interface, counters.local, counters.word, counters.server + LOOK_PATH + look)
    return "\n".join((" ".join(map(str, head)), *routes_of(counters.interface), *routes6)) + "\n"


def _loaded(text: str) -> Row:
    try:
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    except ValueError:
        return {}


def derived_public(private: str) -> str:
    return binascii.b2a_base64(public_key(binascii.a2b_base64(private)), newline=False).decode()


def new_private() -> str:
    raw = bytearray(os.urandom(KEY_BYTES))
    raw[0] &= 248
    raw[31] = raw[31] & 127 | 64
    return binascii.b2a_base64(bytes(raw), newline=False).decode()


def check_in(context: Context, network: str, afresh: bool = False, retell: bool = False, patience: float = 0) -> bool:
    """One check-in of one network, under its lock (another run that has it is no error). Whether a key is still to change."""
    held, answer = HANDED_OVER.pop(network, (None, None))
    if held is None:
        held = context.files.lock(context.paths.of("lock", network))
    if held is None:
        return False
    try:
        node, done = Node.load(context, network), False
        if node.config.down:
            node.rest()
            return False
        if retell:
            node.memory.facts, node.memory.wishes, node.memory.seen, node.memory.mute = {}, {}, {}, {}
        try:
            _check_in(node, answer, afresh, patience)
            done = True
            return bool(node.memory.switch)
        except BadAnswer as bad:
            raise Unreachable(str(bad)) from bad
        finally:
            if network in context.paths.networks() and not context.run.dry and not node.config.down:
                node.finish(done)
    finally:
        os.close(held)


OUTSIDE = {  # states of a node without peers
    "down": "taken down here: `netclient-lite connect` takes it up",
    "pending": "waiting for the administrator's approval",
    "disabled": "disabled: no peers until an administrator enables it",
    "expired": "its time is over: no peers until an administrator extends it",
}


def _check_in(node: Node, answer: Answer | None, afresh: bool, patience: float) -> None:
    network, say = node.config.network, node.context.say
    try:
        node.check_in(answer, afresh, patience)
    except Refused as no:
        if no.code == 410:
            end_membership(node, "confirm")
            say(f"{network}: {no}: {node.config.interface} is taken down and forgotten")
            return
        if no.code != 404:
            raise
        say(f"{network}: the server does not know this node (restored from an older backup?): joining again")
        me = node.memory.view.me  # wishing for the addresses that it has
        held = {wish: me[kind] for wish, kind in (("address", "ip"), ("address6", "ip6")) if me.get(kind)}
        enrol(node, {**node.config.wishes, **held})
        node.check_in(None, True)
    if node.memory.view.state in OUTSIDE:
        say(f"{network}: {OUTSIDE[node.memory.view.state]}")
    done = [step.why for step in node.changes if not step.why.startswith(TRY)]
    if done and not node.run.echo:
        say(f"{network}: {'; '.join(done[:6])}{' …' if len(done) > 6 else ''}")


def enrol(node: Node, wishes: Fields) -> None:
    """Join at the server: a prepared membership, or again where a restored server forgot this node."""
    token = parse_stored(read_text(node.file("nettoken")))
    node.read()

    facts = node.facts()

    def ask(nonce: bytes) -> Fields:
        name, _, secret = token.partition(".")
        proof = {"key": name, "mac": key_proof(unb64(secret), node.secret.key("proof"), nonce)}
        return {"facts": facts, "wishes": wishes, **({"proof": proof} if token else {})}

    data = node.session.join(ask)
    node.secret.node, node.secret.look = str(data["node"]), str(data["look"])
    node.files.write(node.file("secret"), node.secret.text())
    node.counters.epoch, node.counters.sequence, node.counters.word = 0, -1, "-"
    node.memory.facts, node.memory.wishes = dict(facts), dict(wishes)
    node.memory.seen, node.memory.mute = {}, {}
    node.memory.view.state = str(data.get("state", ""))
    node.save_counters()


def parse_stored(text: str) -> str:
    key = text.strip()
    if not re.fullmatch(ACCESS_KEY, key, re.ASCII):
        raise NetclientError("the stored access key is damaged: join again with --force and a fresh token")
    return key


def take_down(context: Context, network: str, interface: str) -> None:
    """What a network has on this machine goes: firewall, switches and names first, then the interface, then what hooks did."""
    gateway = Gateway(context.run, context.files, context.paths.run, network)
    for undo in (lambda: gateway.apply(None), Names(context, network, interface).clear):
        try:
            undo()
        except (NetclientError, OSError) as bad:
            context.say(f"{network}: not all is as it was before: {bad}")
    removal = context.system.removal(interface)
    context.run.apply(removal)
    hooks = _loaded(read_text(context.paths.of("memory", network))).get("hooks", [])[1:]
    for failed in run_hook(context, network, interface, "postdown", hooks) if removal else ():
        context.say(f"{network}: {failed}")


def end_membership(node: Node, tell: str) -> bool:
    """Take a membership down and forget it, and tell the server: `leave`, or `confirm` its removal. Whether it heard.

    It works with the server gone.
    """
    heard = False
    take_down(node.context, node.config.network, node.config.interface)
    for word in (tell, "confirm") if node.secret.node != "-" and not node.run.dry else ():
        try:
            node.session.exchange({word: True})
        except Refused as no:
            heard = heard or no.code in (404, 410)
        except (Unreachable, BadAnswer):
            break
    forget(node.context, node.config.network)
    return heard


# --------------------
# SERVICE
# --------------------

LAUNCHER = """#!/bin/sh
# Made by netclient-lite {version} for units and cron lines. Bytecode where it fits the interpreter, else the source.
py={python} code={bytecode}
[ -x "$py" ] && [ -f "$code" ] && exec "$py" -I -S "$code" "$@"
exec {fallback} "$@"
"""

MADE = "# Made by netclient-lite for --daemon {mode}"
# 15 s from start to start, however long a check-in takes
LOOP = "while :; do sleep 15 & {launcher} checkin -n all; wait; done"


class Init(NamedTuple):
    """An init system: a path that is there where it runs, a program that it needs, files (path, mode, text), and the commands
    that start and stop. Words in braces are those of `words_for`.
    """

    sign: str
    program: str
    files: tuple[tuple[str, int, str], ...]
    start: tuple[str, ...]
    stop: tuple[str, ...]


SYSTEMD_SERVICE = """[Unit]
{made}
Description=netclient-lite: {what}
After=network-online.target
Wants=network-online.target

[Service]
Type={kind}
ExecStart={launcher} {verb}
# a userspace WireGuard, our child, outlives a check-in
KillMode=process
{more}
"""
SYSTEMD_TIMER = """[Unit]
{made}
Description=netclient-lite: a check-in every 15 s

[Timer]
OnCalendar=*:*:0/15
AccuracySec=1s
OnBootSec=1s

[Install]
WantedBy=timers.target
"""
# procd and OpenRC start what has ended again: for a check-in that is a timer
PROCD = """#!/bin/sh /etc/rc.common
{made}
START=95
STOP=05
USE_PROCD=1

start_service() {{
	procd_open_instance
	procd_set_param command {launcher} {verb}
	procd_set_param respawn 3600 {pause} 0
	procd_set_param stderr 1
	procd_close_instance
}}
"""
OPENRC = """#!/sbin/openrc-run
{made}
description="netclient-lite: {what}"
supervisor=supervise-daemon
command={launcher}
command_args="{verb}"
respawn_delay={pause}
respawn_max=0

depend() {{
	need net
	after firewall ntp-client
}}
"""
RUNIT = """#!/bin/sh
{made}
exec 2>&1
{loop}
"""
SYSV = """#!/bin/sh
### BEGIN INIT INFO
# Provides:          netclient
# Required-Start:    $network $remote_fs
# Required-Stop:     $network $remote_fs
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: netclient-lite: {what}
### END INIT INFO
{made}
file=/var/run/netclient.pid
runs() {{
	[ -f $file ] && kill -0 "$(cat $file)" 2>/dev/null
}}
case ${{1:-}} in
start)
	runs || {{
		({loop}) </dev/null >/dev/null 2>&1 &
		echo $! >$file
	}}
	;;
stop)
	! runs || kill "$(cat $file)"
	rm -f $file
	;;
restart | force-reload)
	"$0" stop
	"$0" start
	;;
status) runs ;;
*)
	echo "usage: $0 start|stop|restart|status" >&2
	exit 2
	;;
esac
"""
SCRIPT = "/etc/init.d/netclient"
UNITS = "/etc/systemd/system/netclient."
INITS = (
    Init(
        "/run/systemd/system",
        "systemctl",
        ((UNITS + "service", 0o644, SYSTEMD_SERVICE), (UNITS + "timer", 0o644, SYSTEMD_TIMER)),
        ("systemctl daemon-reload", "systemctl enable --now netclient.{unit}"),
        ("systemctl disable --now netclient.timer netclient.service",),
    ),
    Init(
        "/sbin/procd",
        "sh",
        ((SCRIPT, 0o755, PROCD),),
        (SCRIPT + " enable", SCRIPT + " restart"),
        (SCRIPT + " stop", SCRIPT + " disable"),
    ),
    Init(
        "/run/openrc",
        "rc-service",
        ((SCRIPT, 0o755, OPENRC),),
        ("rc-update add netclient default", "rc-service netclient restart"),
        ("rc-service netclient stop", "rc-update del netclient default"),
    ),
    Init(
        "/run/runit",
        "sv",
        (("/etc/sv/netclient/run", 0o755, RUNIT),),
        ("ln -sfn /etc/sv/netclient {folder}/netclient",),
        ("sv down {folder}/netclient", "rm -f {folder}/netclient"),
    ),
    *(
        Init("/etc/inittab", program, ((SCRIPT, 0o755, SYSV),), (add, SCRIPT + " restart"), (SCRIPT + " stop", remove))
        for program, add, remove in (
            ("update-rc.d", "update-rc.d netclient defaults", "update-rc.d -f netclient remove"),
            ("chkconfig", "chkconfig --add netclient", "chkconfig --del netclient"),
        )
    ),
)


def words_for(mode: str, launcher: str) -> dict[str, str]:
    """What stands in an init system's files and commands for `--daemon on` or `resident`."""
    folder = "/var/service" if os.path.isdir("/var/service") else "/etc/service"
    resident = mode == "resident"
    more = "Restart=always\nRestartSec=5\n\n[Install]\nWantedBy=multi-user.target" if resident else ""
    what, kind, unit = ("stay and apply changes", "exec", "service") if resident else ("check in every 15 s", "oneshot", "timer")
    verb, pause = ("daemon", "5") if resident else ("checkin -n all", "15")
    loop = f"exec {launcher} daemon" if resident else LOOP.format(launcher=launcher)
    words = {"made": MADE.format(mode=mode), "what": what, "kind": kind, "unit": unit, "verb": verb, "pause": pause}
    return {**words, "launcher": launcher, "loop": loop, "more": more, "folder": folder}


class Service:
    """What the init system of this machine does for the agent."""

    def __init__(self, context: Context) -> None:
        self.context = context
        here = [init for init in INITS if os.path.exists(init.sign) and context.run.has(init.program)]
        self.init = here[0] if here and not context.paths.root else None

    def install(self, mode: str, launcher: str) -> None:
        """Write its files and start it. A script that is not ours, as a package has it, stays as it is."""
        if self.init is None:
            raise NetclientError("no init system that this agent knows runs here")
        words = words_for(mode, launcher)
        texts = {path: (text.format(**words), kind) for path, kind, text in self.init.files}
        texts = {path: each for path, each in texts.items() if not (mode == "resident" and path.endswith(".timer"))}
        if any(read_text(path) not in (text, "") and self._is_ours(path) for path, (text, _) in texts.items()):
            self.remove()
        for path, (text, kind) in texts.items():
            if not os.path.exists(path) or self._is_ours(path):
                self.context.files.write(path, text, kind)
        self._do(self.init.start, words)

    def remove(self) -> None:
        ours = [path for path, _, _ in self.init.files if self._is_ours(path)] if self.init else []
        for command in self.init.stop if self.init and ours else ():
            with contextlib.suppress(CommandFailed):
                self._do((command,), words_for("on", ""))
        for path in ours:
            self.context.files.remove(path)

    def _is_ours(self, path: str) -> bool:
        return MADE[:30] in read_text(path)

    def _do(self, commands: Words, words: Mapping[str, str]) -> None:
        self.context.run.apply([Step(tuple(command.format(**words).split()), "the service") for command in commands])


# Of each cron: a path that is there, its file, how a line begins, what makes it read the file.
PLAIN, ROOT = "* * * * * ", "* * * * * root "
CRONS = (
    ("/etc/openwrt_release", "/etc/crontabs/netclient", PLAIN, ("/etc/init.d/cron enable", "/etc/init.d/cron restart")),
    ("/etc/synoinfo.conf", "/etc/crontab", "*\t*\t*\t*\t*\troot\t", ("synoservice --restart crond", "systemctl restart crond")),
    ("/etc/config/qpkg.conf", "/etc/config/crontab", PLAIN, ("crontab /etc/config/crontab", "/etc/init.d/crond.sh restart")),
    ("/opt/etc/crontab", "/opt/etc/crontab", ROOT, ("/opt/etc/init.d/S10cron restart",)),
    ("/etc/cron.d", "/etc/cron.d/netclient", ROOT, ()),
    ("/etc/crontabs", "/etc/crontabs/root", PLAIN, ()),
    ("/var/spool/cron/crontabs", "/var/spool/cron/crontabs/root", PLAIN, ()),
)


def cron_lines(start: str, command: str) -> list[str]:
    """Every 15 s by a cron whose grain is a minute."""
    return [start + (f"sleep {second}; " if second else "") + command for second in (0, 15, 30, 45)]


def set_cron(context: Context, launcher: str, on: bool) -> bool:
    """Have this machine's cron check in, or not any more; other lines of its file stay as they are. Whether anything changed."""
    root, run = context.paths.root, context.run
    _, file, start, after = cron_here(context)
    before = read_exact(root + file)
    lines = cron_lines(start, run.where("netclient-look") or launcher + " checkin -n all") if on else []
    text = with_names(before, "cron", lines)
    if text == before:
        return False
    if text:
        context.files.edit(root + file, text)
    else:
        context.files.remove(root + file)
    for words in [command.split() for command in after if run.has(command.split()[0])]:
        try:
            run.apply([Step(tuple(words), "have cron read it")])
        except CommandFailed as bad:
            context.say(str(bad))
    return True


def cron_here(context: Context) -> tuple[str, str, str, tuple[str, ...]]:
    """The row of this machine's cron; NetclientError where there is none."""
    for row in CRONS:
        if os.path.exists(context.paths.root + row[0]):
            return row
    raise NetclientError("no cron was found here: install one (cron, cronie), or have anything call the check-in every 15 s")


# What the launcher starts: the first section alone, so that the check-in that changes nothing does not read the rest.
QUICK_END = """
if __name__ == "__main__":
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("netclient_lite", {whole!r})
    whole = sys.modules["netclient_lite"] = module_from_spec(spec)
    spec.loader.exec_module(whole)
    whole.HANDED_OVER.update(HANDED_OVER)
    whole.QUICKLY_DONE.update(QUICKLY_DONE)
    sys.exit(whole.main())
"""


def settle_in(context: Context) -> str:
    """Make `/etc/netclient/netclient`, a launcher; a lone file copies itself beside it. The launcher's path."""
    home, here = context.paths.home, os.path.abspath(__file__)
    launcher = home + "/netclient"
    here = here.replace(home + "/netclient_lite.pyc", home + "/netclient_lite.py")
    source, whole, fallback = here, here, "netclient-lite"  # bytecode without a source is used where it is
    if not here.endswith(".py"):
        source = ""
    elif re.search("/(site|dist)-packages/|^/usr/lib/", here):  # a package's: it is used where it is
        from importlib.util import cache_from_source

        whole, fallback = cache_from_source(here), f"{sys.executable} {here}"
        if not os.path.exists(whole):
            _compile(context, here, whole)
    else:
        source, whole = home + "/netclient_lite.py", home + "/netclient_lite.pyc"
        context.files.write(source, read_text(here), 0o755)
        fallback = "python3 " + source
        _compile(context, source, whole)
    bytecode = home + "/netclient_quick.pyc" if source else whole
    if source:
        part = context.paths.run + "/netclient_quick.py"
        context.files.volatile(part, read_text(here).partition("\n# IMPORTS\n")[0] + QUICK_END.format(whole=whole))
        _compile(context, part, bytecode)
        context.files.remove(part)
    # python3.11, not python3: after an upgrade of Python the launcher must take the source
    python = os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable
    text = LAUNCHER.format(version=__version__, python=python, bytecode=bytecode, fallback=fallback)
    context.files.write(launcher, text, 0o755)
    return launcher


def _compile(context: Context, source: str, bytecode: str) -> None:
    """Without docstrings and columns: less to read."""
    if not context.run.dry:
        code = f"import py_compile as c;c.compile({source!r},{bytecode + '.tmp'!r},doraise=True,optimize=2)"
        context.run(sys.executable, "-ISX", "no_debug_ranges", "-c", code)
        context.files.keep(bytecode + ".tmp", bytecode)


def install_service(context: Context, mode: str) -> None:
    """Have a check-in happen every 15 s, or the daemon stay; where it cannot, say what to do."""
    launcher = context.paths.home + "/netclient"
    try:
        launcher = settle_in(context)
        if mode != "off":
            Service(context).install(mode, launcher)
    except (NetclientError, OSError) as bad:
        cron = "have cron check in (`netclient-lite cron on`, or cron/README.md)"
        context.say(f"the service could not be set up: {bad}: {cron}, or keep `{launcher} daemon` running")


def nudge_daemon(context: Context) -> None:
    pid = read_text(context.paths.run + "/daemon.pid").strip()
    if pid.isdigit() and "netclient" in read_text(f"/proc/{pid}/cmdline"):
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGHUP)


# --------------------
# COMMANDS
# --------------------

Options = argparse.Namespace


def need_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise NetclientError(f"{verb} needs root, to which WireGuard and the keys belong: try `sudo netclient-lite {verb} …`")


def need_tools(context: Context) -> None:
    for program, packet in (("wg", "wireguard-tools"), ("ip", "iproute2 (or BusyBox' ip)")):
        if not context.run.has(program):
            raise NetclientError(f"`{program}` is not installed: install {packet} and run this again")


def chosen_networks(context: Context, options: Options) -> list[str]:
    joined = context.paths.networks()
    wanted = (options.network or "all").lower()
    if wanted == "all":
        return joined
    if wanted not in joined:
        known = "joined: " + ", ".join(joined) if joined else "none is joined"
        raise UsageError(f"this machine is not in a network {options.network!r} ({known})")
    return [wanted]


def cmd_join(context: Context, options: Options) -> ExitStatus:
    need_root(options.verb)
    need_tools(context)
    token = access_token(options)
    network = token.network
    held = _locked(context, network)
    try:
        if network in context.paths.networks() and not options.force:
            return update(Node.load(context, network), options)
        node = prepare(context._replace(paths=context.paths.staged()), token, options)
        if context.run.dry:
            return tell_plan(node)
        join(context, node)
        if options.verb == "register" and not node.config.hub:
            context.say(f"{network}: no tunnel to the server yet: {network} is to be a hub network, and the server's host in it")
        return ExitStatus.OK
    finally:
        os.close(held)


def _locked(context: Context, network: str) -> int:
    held = context.files.lock(context.paths.of("lock", network), wait=True)
    if held is None:
        raise NetclientError(f"the lock of {network} cannot be had: is the file system full or read-only?")
    return held


def access_token(options: Options) -> Token:
    """What --token says and other flags add; else what --apiserver, -n, --key and --server-key make."""
    token = parse_token(options.token) if options.token else None
    if token is None and not (options.apiserver and options.network):
        raise UsageError(
            f"{options.verb} needs a token (-t TOKEN), or the server and the network (--apiserver HOST:PORT -n NET [-k KEY])"
        )
    servers, network = (token.servers, token.network) if token else ((), "")
    if options.network and options.network != "all":
        asked = check_network(options.network)
        if token and asked != network:
            raise UsageError(f"the token is for the network {network}, not {asked}")
        network = asked
    if options.apiserver:
        place = options.apiserver if "://" in options.apiserver else "http://" + options.apiserver
        try:
            split_url(place)
        except ValueError as bad:
            raise UsageError(f"--apiserver: {bad}") from bad
        servers = (place.rstrip("/"),)
    pin = token.pin if token else b""
    if options.server_key:
        try:
            pin = unb64(options.server_key)
        except ValueError:
            pin = b""
        if len(pin) != KEY_BYTES:
            raise UsageError("--server-key is no server key: 43 characters, as `netmaker-lite serve` prints them")
    key = options.key or (token.key if token else "")
    try:
        return Token(servers, pin, network, parse_stored(key))
    except NetclientError as bad:
        raise UsageError("the access key is not of this kind of server: ID.SECRET, as `netmaker-lite key add` prints it") from bad


def trusted_pin(context: Context, token: Token, options: Options) -> bytes:
    """The server's key where no token brought it: over https by certificate, else by a person's word."""
    sender = transport()
    server = token.servers[0]
    try:
        pin = fetch_pin(sender, server, verify=server.startswith("https:"))
    except (OSError, BadAnswer) as bad:
        why = f"{server} {why_not(bad)}" if isinstance(bad, OSError) else f"at {server} {bad}"
        raise Unreachable("nothing was changed: " + why) from bad
    if server.startswith("https:") or options.accept_key:
        return pin
    if sys.stdin.isatty():
        print(f"The server at {server} has the key\n  {b64(pin)}\nIs that what `netmaker-lite serve` printed? [y/N] ", end="")
        sys.stdout.flush()
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return pin
        raise NetclientError("the server's key was not confirmed: nothing was changed")
    line = " ".join(word for word in sys.argv[1:] if word != "join")
    for secret in filter(None, (options.key, options.token, options.privatekey)):
        line = line.replace(secret, "…")  # also in --key=SECRET
    fit = f"If {b64(pin)} is what `netmaker-lite serve` printed, run: netclient-lite join {line} --server-key={b64(pin)}"
    raise NetclientError("nobody is there to confirm the server's key. " + fit)


def prepare(context: Context, token: Token, options: Options) -> Node:
    """Check all that a join needs; then write the membership's files, beside those of one that may be there.

    A join that was interrupted goes on with the keys that it had: to the server it is the same.
    """
    network, paths, files = token.network, context.paths, context.files
    interface = check_interface(options.interface or "nm-" + network)
    there = Paths(paths.root)
    for other in there.networks():
        if other != network and _loaded(read_text(there.of("netconfig", other))).get("interface") == interface:
            raise UsageError(f"{interface} belongs to the network {other}: choose another --interface")
    wishes, chosen = checked(options)
    wishes.setdefault("name", fold_name(os.uname().nodename))
    private = options.privatekey or read_text(paths.of("wgkey", network)).strip() or new_private()
    try:
        check_key(private)
    except Invalid as bad:  # without the key itself
        raise UsageError("--privatekey is no WireGuard key: 44 characters of base64 that end in '='") from bad
    if options.publickey and options.publickey != derived_public(private):
        raise UsageError("--publickey does not belong to --privatekey")
    context.system.backend()
    replaced = _loaded(read_text(there.of("netconfig", network)))
    port = _join_port(context, options, replaced.get("port", 0))
    if context.system.exists(interface) and not (options.force and interface in (replaced.get("interface"), "nm-" + network)):
        raise NetclientError(f"{interface} is there already: choose another --interface (--force replaces nm-{network})")
    pin = token.pin or trusted_pin(context, token, options)
    config = Config({**chosen, "network": network, "servers": list(token.servers), "interface": interface, "port": port})
    config.keyed, config.fixed = bool(options.privatekey), options.port is not None
    config.wishes, config.daemon = wishes, options.daemon or "on"
    try:
        secret = Secret.parse(network, read_text(paths.of("secret", network)))
    except ValueError:
        secret = None
    if secret is None or secret.pin != pin:
        scalar = os.urandom(KEY_BYTES)
        secret = Secret(network, "-", "-", public_key(scalar), x25519(scalar, pin), pin)
    _prove(context, config, secret)
    texts = {"wgkey": private + "\n", "nettoken": token.key + "\n", "secret": secret.text(), "netconfig": config.text()}
    for kind in MEMBERSHIP:
        files.write(paths.of(kind, network), texts[kind])
    return Node(context, config, secret, private)


def checked(options: Options) -> tuple[Row, dict[str, str]]:
    """Wishes for the server and settings of this machine from the flags; UsageError or Invalid for a bad one."""
    wishes = {name: getattr(options, name) for name in WISHES if getattr(options, name) is not None}
    kinds = ("endpoint", "localaddress", "localrange", "accept_hooks")
    chosen = {name: getattr(options, name) for name in kinds if getattr(options, name) not in (None, "")}
    if "name" in wishes:
        wishes["name"] = check_name(wishes["name"])
    for name, version in (("address", 4), ("address6", 6), ("endpoint", 0), ("localaddress", 0)):
        for found in (wishes, chosen):
            if name in found:
                found[name] = check_address(found[name], version)
    try:
        ipaddress.ip_network(chosen.get("localrange", "::/0"))
    except ValueError as bad:
        raise UsageError(f"--localrange: {bad}") from bad
    return wishes, chosen


def _prove(context: Context, config: Config, secret: Secret) -> None:
    try:
        answer = Session(config, secret, Counters(), lambda: None, context.system).prove()
    except Unreachable as bad:
        raise Unreachable(f"nothing was changed: {bad}") from bad
    said = context.system.step_clock(answer.time, "the server's")
    if said:
        context.say(said)


def _join_port(context: Context, options: Options, held: int) -> int:
    """The port to listen on: the user's, or the first free one. `held`: that of the membership replaced."""
    if options.port is not None:
        if options.port != held and not context.system.port_is_free(options.port):
            raise NetclientError("UDP port %d is in use by another program: stop that, or choose another --port" % options.port)
        return int(options.port)
    return next(port for port in range(51821, 65536) if context.system.port_is_free(port))


def tell_plan(node: Node) -> ExitStatus:
    interface = node.config.interface
    wanted = Desired(interface, node.private, node.config.port, 1280, frozenset(["192.0.2.0/24"]), frozenset(), {})
    steps = plan(Actual(), wanted, node.system.backend().create(interface))
    show("join %s at %s" % (node.config.network, node.config.servers[0]), True)
    for step in steps:
        show(" ".join(step.argv).replace("192.0.2.0/24", "(the address that the server gives)"), True)
    return ExitStatus.OK


def join(context: Context, node: Node) -> ExitStatus:
    """Tell the server; then replace what was there, bring the interface up and install the service.

    What fails is undone; what was there before stays until the server has accepted.
    """
    network, joined = node.config.network, context.paths.networks()
    try:
        # its name and addresses are free only after the old membership has ended
        old = View(_loaded(read_text(context.paths.of("peers", network)))).me if network in joined else {}
        taken = [(wish, old.get(kind)) for wish, kind in (("name", "name"), ("address", "ip"), ("address6", "ip6"))]
        enrol(node, {wish: value for wish, value in node.config.wishes.items() if (wish, value) not in taken})
    except (Unreachable, BadAnswer) as bad:
        raise Unreachable(f"the server stopped answering during the join ({bad}): run the command again, it goes on") from bad
    except NetclientError:
        forget_staged(context, network)
        raise
    if network in joined:
        end_membership(Node.load(context, network), "leave")
    context.run.apply(context.system.removal(node.config.interface))
    forget(context, network)
    try:
        node.move(context)
        node.check_in()
    except (Unreachable, BadAnswer) as bad:
        raise Unreachable(f"{network}: joined, but the server stopped answering ({bad}): the next check-in goes on") from bad
    except NetclientError:
        end_membership(node, "leave")
        forget_staged(context, network)
        raise
    node.finish()
    install_service(context, node.config.daemon)
    nudge_daemon(context)
    if node.session.box is None and node.session.server.startswith("http:"):
        context.say(f"{network}: without PyNaCl the peer lists travel readable on plain HTTP, though never alterable")
    me = node.memory.view.me
    if node.memory.view.state == "pending":
        print(f"{network}: asked to join; to be approved by: netmaker-lite node approve {network} {node.secret.node}")
    else:
        where = " and ".join(me[kind] for kind in ("ip", "ip6") if me.get(kind))
        print(f"{network}: joined as {me['name']} with {where} on {node.config.interface}, port {node.config.port}")
    return ExitStatus.OK


def update(node: Node, options: Options) -> ExitStatus:
    """Join on a joined machine: new wishes and settings, the membership stays."""
    config = node.config
    wishes, chosen = checked(options)
    if options.interface not in (None, config.interface) or options.privatekey:
        raise UsageError(f"{config.network} is joined already: --interface and --privatekey need --force, which joins anew")
    config.wishes.update(wishes)
    config.down = False
    for name, value in {**chosen, **({"daemon": options.daemon} if options.daemon else {})}.items():
        setattr(config, name, value)
    if options.port is not None and options.port != config.port:
        config.port, config.fixed = _join_port(node.context, options, config.port), True
    node.check_in()  # what the server refuses is not kept
    node.files.write(node.file("netconfig"), config.text())
    forget_staged(node.context, config.network)
    if not node.run.dry:
        node.finish()
    install_service(node.context, config.daemon)
    print(f"{config.network}: is joined already; settings updated (--force joins anew)")
    return ExitStatus.OK


def leave(context: Context, network: str) -> None:
    held = _locked(context, network)
    try:
        try:
            node = Node.load(context, network)
        except NetclientError:  # interrupted half-way: finish it
            _leave_rest(context, network)
            return
        heard = end_membership(node, "leave")
        after = "" if heard else "; the server could not be told: its administrator can remove the node"
        print(f"{network}: would be left" if context.run.dry else f"{network}: left{after}")
    finally:
        forget_staged(context, network)
        os.close(held)


def cmd_leave(context: Context, options: Options) -> ExitStatus:
    need_root("leave")
    if not options.network:
        raise UsageError("leave needs -n NETWORK, or -n all")
    for network in chosen_networks(context, options):
        leave(context, network)
    if not context.paths.networks():
        Service(context).remove()
    nudge_daemon(context)
    return ExitStatus.OK


def cmd_uninstall(context: Context, options: Options) -> ExitStatus:
    """Leave all networks, and take away what the agent has put on this machine; root's hooks stay."""
    need_root("uninstall")
    options.network = "all"
    cmd_leave(context, options)
    with contextlib.suppress(NetclientError):
        set_cron(context, "", False)
    home = context.paths.home
    for name in ("netclient", "netclient_quick.pyc", "netclient_lite.pyc", "netclient_lite.py"):
        context.files.remove(home + "/" + name)
    staged = context.paths.staged()
    context.files.remove_folders(staged.config, context.paths.config, home, staged.run, context.paths.run)
    print("what the agent had put on this machine " + ("would be" if context.run.dry else "is") + " removed")
    return ExitStatus.OK


def cmd_cron(context: Context, options: Options) -> ExitStatus:
    """Check-ins by cron, for machines whose init system starts nothing every 15 s."""
    if options.action == "show":
        command = context.run.where("netclient-look") or context.paths.home + "/netclient checkin -n all"
        print("\n".join(cron_lines(cron_here(context)[2], command)))
        return ExitStatus.OK
    need_root("cron")
    on = options.action == "on"
    changed = set_cron(context, settle_in(context) if on else "", on)
    print(f"{cron_here(context)[1]}: " + ("check-ins every 15 s" if on else "no check-ins") + ("" if changed else ", as before"))
    return ExitStatus.OK


def cmd_connect(context: Context, options: Options) -> ExitStatus:
    """Take networks up or down without leaving them; down they stay, also over a reboot."""
    need_root(options.verb)
    if not options.network:
        raise UsageError(f"{options.verb} needs -n NETWORK, or -n all")
    for network in chosen_networks(context, options):
        held = _locked(context, network)
        try:
            node = Node.load(context, network)
            node.config.down = options.verb == "disconnect"
            node.files.write(node.file("netconfig"), node.config.text())
            if node.config.down:
                take_down(context, network, node.config.interface)
                node.rest()
        finally:
            os.close(held)
        if not node.config.down:
            check_in(context, network)
        would = "would be " if context.run.dry else ""
        print(f"{network}: {would}{'down (connect takes it up again)' if node.config.down else 'up'}")
    nudge_daemon(context)
    return ExitStatus.OK


def _leave_rest(context: Context, network: str) -> None:
    interface = str(_loaded(read_text(context.paths.of("netconfig", network))).get("interface") or "nm-" + network)
    take_down(context, network, interface)
    forget(context, network)
    print(f"{network}: its files were damaged or incomplete; all of it is removed")


def follow_host(context: Context, options: Options) -> None:
    """Be in the networks that the server on this host names in its data folder, and in no other that it had named."""
    folder = os.path.abspath(options.server_data)
    path, joined = folder + "/host.json", context.paths.networks()
    try:  # a file: what is no file might never end
        server, pin, keys = parse_host(read_text(path) if os.path.isfile(path) else "")
    except MALFORMED as bad:
        raise NetclientError(f"{path} is missing or damaged: `netmaker-lite serve` writes it; nothing was changed") from bad
    for network in joined:
        if network not in keys and _loaded(read_text(context.paths.of("netconfig", network))).get("hosted") == folder:
            leave(context, network)
    failed = []
    for network in sorted(keys.keys() - set(joined)):
        given = {"network": network, "name": "netmaker", "daemon": "off", "force": False}
        held = _locked(context, network)
        try:
            token = Token((server,), pin, network, keys[network])
            node = prepare(context._replace(paths=context.paths.staged()), token, Options(**{**vars(options), **given}))
            node.config.hosted = folder
            node.files.write(node.file("netconfig"), node.config.text())
            if context.run.dry:
                tell_plan(node)
            else:
                join(context, node)
        except (NetclientError, BadAnswer) as bad:
            failed.append(f"{network}: {bad}")
        finally:
            os.close(held)
    if failed:
        raise NetclientError("; ".join(failed))


def cmd_checkin(context: Context, options: Options) -> ExitStatus:
    """checkin, and two that do more: pull takes all anew, push tells all anew."""
    need_root(options.verb)
    began = time.monotonic()
    afresh, retell = bool(options.force) or options.verb == "pull", options.verb == "push"
    outcome = ExitStatus.OK
    if options.server_data:
        try:
            follow_host(context, options)
        except NetclientError as bad:
            context.say(str(bad))
            outcome = ExitStatus.FAILED
    names = [name for name in chosen_networks(context, options) if name not in QUICKLY_DONE]
    for patience in (0.0, LONGEST)[len(names) < 2 :]:  # no network holds others up
        waiting = []
        for network in names:
            try:
                if check_in(context, network, afresh, retell, patience):
                    waiting.append(network)
            except NetclientError as bad:
                context.say(f"{network}: {bad}" if not str(bad).startswith(network + ":") else str(bad))
                outcome = ExitStatus.FAILED
        names = waiting
    if options.verb == "checkin":
        stay_for_neighbours(context, began)
    return outcome


STAY = 12.0  # seconds from its start that a check-in stays at most: the next one comes after 15


def stay_for_neighbours(context: Context, began: float) -> None:
    """Where a neighbour is lost and none answers, be there for it for a while, so that two that only check in find each other."""
    if context.run.dry:
        return
    lonely = [name for name in context.paths.networks() if _loaded(read_text(context.paths.of("memory", name))).get("lonely")]
    stamp = context.paths.run + "/announced"
    last = read_text(stamp).strip()
    if not lonely or (last.isdigit() and 0 <= began - int(last) < ANNOUNCE_EVERY):
        return
    held = context.files.lock(stamp + ".lock")
    if held is None:
        return
    try:
        context.files.volatile(stamp, "%d" % began)
        listen(context, began + STAY)
    finally:
        os.close(held)


def awake(context: Context) -> list[str]:
    """The networks that their user has not taken down."""
    kept = ((network, _loaded(read_text(context.paths.of("netconfig", network)))) for network in context.paths.networks())
    return [network for network, config in kept if not config.get("down")]


def listen(context: Context, end: float) -> None:
    """Answer in the LANs for this machine's nodes until `end` (monotonic); check in where a lost neighbour is heard of."""
    own: dict[str, Told] = {}
    for network in awake(context):
        with contextlib.suppress(NetclientError):
            node = Node.load(context, network)
            if node.memory.view.me.get("group"):
                own[network] = node.neighbour()

    def heard(network: str, other: str, place: str) -> None:
        with contextlib.suppress(NetclientError):
            memory = Node.load(context, network).memory
            key = memory.view.peers.get(other, {}).get("key", "")
            if (memory.lonely or key in memory.waiting) and memory.found.get(other) != place:
                check_in(context, network)

    be_there(own, heard, list(context.system.subnets(context.system.links())) if own else [], end)


def show_json(listed: Sequence[Any]) -> ExitStatus:
    print(json.dumps(listed, indent=2))
    return ExitStatus.OK


def address_of(record: Fields) -> str:
    return str(record.get("ip") or record.get("ip6", ""))


def cmd_list(context: Context, options: Options) -> ExitStatus:
    need_root("list")
    listed = []
    for network in chosen_networks(context, options):
        node = Node.load(context, network)
        me, own = node.memory.view.me, node.memory.view.peers.get(node.secret.node, {})
        entry = {"network": network, "name": me.get("name", ""), "address": me.get("ip", ""), "address6": me.get("ip6", "")}
        entry["publickey"] = derived_public(node.private)
        entry["endpoint"] = own.get("static") or own.get("at") or own.get("seen") or own.get("local", "")
        entry["peers"] = [
            {"name": record["name"], "address": address_of(record), "endpoint": (candidates(record, node.place) or [""])[0]}
            for record in node.others()
        ]
        listed.append(entry)
    return show_json(listed)


def table(head: Words, rows: Sequence[Words]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
    return "\n".join(lines) + "\n"


NEVER = LivePeer("", "", frozenset(), 0, 0, 0, 0)  # a peer that is not there


REASONS = {  # of an endpoint in use
    **{"static": "set by hand", "at": "seen by other nodes", "seen": "seen by the server", "local": "same LAN"},
    **{"local6": "its own IPv6 address", "found": "it answers in this LAN"},
}


def path_to(node: Node, record: Fields, live: LivePeer) -> Row:
    """How this node reaches another: path, the relay's name, and why."""
    view, own = node.memory.view, node.secret.node
    peer = carrier(view, own, record["id"])
    if peer not in ("", record["id"]):
        relay = view.peers[peer]
        by_itself = record["id"] in view.me.get("relayed", {})
        why = "no direct handshake for a minute" if by_itself else "an administrator's choice"
        return {"path": "relayed" if relay["key"] in node.fresh else "none", "via": relay["name"], "why": why}
    if not peer:
        return {"path": "none", "via": "", "why": "kept apart by an administrator"}
    if record["key"] not in node.fresh:
        ago = int(time.time()) - live.handshake
        silent = f"no answer for {ago} s" if live.handshake else "no answer yet" if live.endpoint else "it has to call first"
        return {"path": "none", "via": "", "why": apart(record, node.place) or silent}
    known = {**record, "found": node.memory.found.get(record["id"], "")}
    near = live.endpoint in (known.get("local"), known["found"]) and live.endpoint not in (known.get("seen"), known.get("at"))
    why = next((text for kind, text in REASONS.items() if known.get(kind) == live.endpoint), "where its packets come from")
    return {"path": "local" if near else "direct", "via": "", "why": why}


def status_of(node: Node) -> Row:
    """What `status --json` says of one network; ages in seconds, last_exchange in unix seconds."""
    now, wall, view = time.monotonic(), time.time(), node.memory.view
    actual, exchanged = node.read(), node.memory.exchanged
    peers = []
    for record in node.others():
        live = actual.peers.get(record["key"], NEVER)
        peers.append(
            {
                **{"name": record["name"], "public_key": record["key"], "address": address_of(record)},
                "endpoint": live.endpoint,
                **path_to(node, record, live),
                "handshake_age": max(0, int(wall) - live.handshake) if live.handshake else None,
                **{"rx": live.rx, "tx": live.tx},
            }
        )
    return {
        "network": node.config.network,
        "node": view.me.get("name", node.secret.node),
        "interface": node.config.interface,
        **{"address": view.me.get("ip", ""), "address6": view.me.get("ip6", "")},
        "server": node.counters.server if node.counters.server != "-" else node.config.servers[0],
        "state": "down" if node.config.down else view.state,
        "connected": actual.exists and actual.up,
        "revision": view.word,
        "last_exchange": int(wall - now + exchanged) if 0 < exchanged <= now else None,
        "names": node.memory.names,
        "peers": peers,
        "clients": [client_status(record, actual, wall) for record in view.me.get("clients", ())],
    }


def client_status(record: Fields, actual: Actual, wall: float) -> Row:
    live = actual.peers.get(record["key"], NEVER)
    age = max(0, int(wall) - live.handshake) if live.handshake else None
    more = {"handshake_age": age, "rx": live.rx, "tx": live.tx}
    return {"id": record["id"], "address": address_of(record), "endpoint": live.endpoint, **more}


def cmd_status(context: Context, options: Options) -> ExitStatus:
    need_root("status")
    listed = [status_of(Node.load(context, network)) for network in chosen_networks(context, options)]
    if options.json:
        return show_json(listed)
    for entry in listed:
        last = entry["last_exchange"]
        entry["contact"] = "last contact %d s ago" % (time.time() - last) if last else "no contact yet"
        state = OUTSIDE.get(entry["state"], "")
        entry["up"] = ("" if entry["connected"] else " (down)") + (state and ", " + state)
        entry["where"] = " ".join(filter(None, (entry["address"], entry["address6"]))) or "(no address yet)"
        entry["known"] = entry["names"] and "; names: " + entry["names"]
        print("{network}: {node}, {where} on {interface}{up}; {server}, {contact}, revision {revision}{known}".format(**entry))
        rows = []
        for peer in (
            *entry["peers"],
            *({"name": "client " + client["id"], "path": "client", **client} for client in entry["clients"]),
        ):
            age = "%d s ago" % peer["handshake_age"] if peer["handshake_age"] is not None else "never"
            traffic = "{} / {}".format(amount(peer["rx"]), amount(peer["tx"]))
            path = peer["path"] + (" via " + peer["via"] if peer.get("via") else "")
            rows.append(("  " + peer["name"], peer["address"], path, peer["endpoint"] or "-", age, traffic, peer.get("why", "")))
        print(table(("  PEER", "ADDRESS", "PATH", "ENDPOINT", "HANDSHAKE", "RECEIVED / SENT", "WHY"), rows), end="")
    if not listed:
        print("no network is joined")
    return ExitStatus.OK


def amount(count: int) -> str:
    size, unit = (count / 1024, "KiB") if count < 1 << 20 else (count / (1 << 20), "MiB")
    return "%d B" % count if count < 1024 else f"{size:.1f} {unit}"


def cmd_daemon(context: Context, options: Options) -> ExitStatus:
    need_root("daemon")
    if context.files.lock(context.paths.run + "/daemon.lock") is None:
        raise NetclientError("a daemon runs already: end that one first, or leave it be")
    stop, again = threading.Event(), threading.Event()

    def end(*_: Any) -> None:
        stop.set()
        again.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, lambda *_: again.set())
    context.files.volatile(context.paths.run + "/daemon.pid", "%d\n" % os.getpid())
    watchers: dict[str, threading.Thread] = {}
    threading.Thread(target=announce, args=(context, stop), daemon=True).start()
    follower = Follower(context, options) if options.server_data else None
    while not stop.is_set():
        again.clear()
        if follower:
            follower.look()
        for network in awake(context):
            if network not in watchers or not watchers[network].is_alive():
                watchers[network] = threading.Thread(target=stay, args=(context, network, stop, again), daemon=True)
                watchers[network].start()
        again.wait(HOST_EVERY if follower else None)
    return ExitStatus.OK


def announce(context: Context, stop: threading.Event) -> None:
    """Be there for neighbours as long as the daemon runs; check in when this machine's addresses are others than before."""
    before: dict[str, str] = {}
    while not stop.is_set():
        began = time.monotonic()
        with contextlib.suppress(NetclientError, OSError):
            homes = context.system.subnets(context.system.links())
            for network in context.paths.networks() if homes and before not in ({}, homes) else ():
                with contextlib.suppress(NetclientError):
                    check_in(context, network)
            before = homes or before
            listen(context, began + ANNOUNCE_EVERY)
        stop.wait(max(0.5, began + 1 - time.monotonic()))  # addresses come and go several at a time


HOST_EVERY = 1.0  # seconds between two looks at a server's host.json


class Follower:
    """The daemon's eye on a server's host.json: followed when it is another, and again after a failure."""

    def __init__(self, context: Context, options: Options) -> None:
        self.context, self.options = context, options
        self.seen, self.again, self.said = -1.0, 0.0, ""

    def look(self) -> None:
        path = self.options.server_data + "/host.json"
        now = os.path.getmtime(path) if os.path.exists(path) else 0.0
        if now == self.seen and time.monotonic() < self.again:
            return
        self.seen, self.again = now, time.monotonic() + CHECK_EVERY
        try:
            follow_host(self.context, self.options)
            self.said = ""
        except NetclientError as bad:
            self.again = time.monotonic() + 15
            if str(bad) != self.said:
                self.context.say(str(bad))
            self.said = str(bad)


def stay(context: Context, network: str, stop: threading.Event, again: threading.Event) -> None:
    try:
        follow(context, network, stop)
    finally:
        stop.wait(5)
        again.set()


def follow(context: Context, network: str, stop: threading.Event) -> None:
    """The daemon's work for one network: check in, then wait for a new word. Says a failure once."""
    said = ""
    while not stop.is_set() and network in awake(context):
        began = time.monotonic()
        try:
            check_in(context, network, patience=LONGEST)
            said, failed = "", False
        except NetclientError as bad:
            if str(bad) != said:
                context.say(str(bad))
            said, failed = str(bad), True
        if network not in context.paths.networks():
            return
        # a look is only a hint: a forged one must not keep us busy
        least = 15.0 if wait_for_word(context, network, stop, failed) == "!" else 0.5
        stop.wait(max(0.0, began + least - time.monotonic()))


def wait_for_word(context: Context, network: str, stop: threading.Event, failed: bool) -> str:
    """Return when a check-in is due: a new word, the next full check, or a while after a failure."""
    while not stop.is_set():
        try:
            node = Node.load(context, network)
            left = node.counters.due - time.monotonic()
            word = "" if failed else node.session.look(int(max(3, min(50, left))))
        except (NetclientError, BadAnswer, OSError):
            word = ""
        if not word:
            stop.wait(5 if failed else 15)
            return ""
        if word != node.counters.word or left <= 50:
            return word
    return ""


class Finding(NamedTuple):
    """What `doctor` found. level: ok, warn (works, but) or bad; cure: a command where there is one."""

    level: str
    check: str
    what: str
    cure: str = ""


# By a program that is here: how it installs, and what it calls the packages that are named otherwise elsewhere.
INSTALLERS = {
    "opkg": ("opkg install", {"ip": "ip-full", "wireguard-go": "kmod-wireguard"}),
    "apk": ("apk add", {"ping": "iputils"}),
    "apt-get": ("apt-get install", {"ping": "iputils-ping"}),
    **{name: (name + " install", {"ping": "iputils", "ip": "iproute"}) for name in ("dnf", "yum", "zypper")},
    "pacman": ("pacman -S", {"ping": "iputils"}),
}
PACKAGES = {"wg": "wireguard-tools", "ip": "iproute2", "ping": "iputils-ping"}


def install_hint(run: Run, name: str) -> str:
    for program, (how, others) in INSTALLERS.items():
        if run.has(program):
            return f"{how} {others.get(name, PACKAGES.get(name, name))}"
    return f"install {PACKAGES.get(name, name)}"


def diagnose_machine(context: Context) -> Iterator[Finding]:
    """What has nothing to do with one network."""
    paths, run = context.paths, context.run
    if os.geteuid():
        yield Finding("warn", "root", "without root most cannot be looked at", "sudo netclient-lite doctor")
    for name in ("wg", "ip", "ping"):
        if not run.has(name):
            yield Finding("warn" if name == "ping" else "bad", "tools", f"{name} is not installed", install_hint(run, name))
    userspace = UserspaceWireGuard(run)
    if not os.path.isdir("/sys/module/wireguard") and not userspace.is_supported():
        what = "no WireGuard: no kernel module is loaded, and " + (
            "/dev/net/tun is missing for " + userspace.programs[0] if userspace.programs else "no userspace program is here"
        )
        yield Finding("bad", "wireguard", what, f"modprobe wireguard, or {install_hint(run, 'wireguard-go')}")
    files = [paths.of(kind, network) for network in paths.networks() for kind in (*MEMBERSHIP, "peers")]
    files = [path for path in files if os.path.exists(path)]
    behind = max([1.7e9, *map(os.path.getmtime, files)]) - time.time()
    if behind > 60:
        yield Finding(
            "bad", "clock", f"the clock is {behind:.0f} s behind the agent's own files", "set it: ntpd -q -n -p pool.ntp.org"
        )
    for path in files:
        if os.stat(path).st_mode & 0o077:
            yield Finding("bad", "files", f"{path} can be read by others", f"chmod 600 {path}")
    for path, least, kind in ((paths.home, 512, "flash"), (paths.run, 64, "tmpfs")):
        if os.path.isdir(path):
            free = os.statvfs(path)
            kib = free.f_bavail * free.f_frsize // 1024
            if kib < least:
                yield Finding(
                    "bad", "space", f"{kib} KiB are free for {path} ({kind}): changes cannot be written", f"make room: df {path}"
                )
    mounts = [line.split() for line in read_text("/proc/mounts").splitlines()]
    where = os.path.realpath(paths.run)
    inside_of = [word for word in mounts if len(word) > 2 and (where + "/").startswith(word[1].rstrip("/") + "/")]
    if inside_of and max(inside_of, key=lambda word: len(word[1]))[2] not in ("tmpfs", "ramfs"):
        yield Finding(
            "warn", "tmpfs", f"{where} is no tmpfs: every check-in writes to that disk", f"mount -t tmpfs tmpfs {where}"
        )
    if not paths.networks():
        yield Finding("warn", "networks", "no network is joined", "netclient-lite join -t TOKEN")


def diagnose(context: Context, network: str) -> Iterator[Finding]:
    """What is wrong with one network here."""
    try:
        node = Node.load(context, network)
    except NetclientError as bad:
        yield Finding("bad", "files", str(bad), f"netclient-lite join -t TOKEN --force, or leave -n {network}")
        return
    view, interface, system, run = node.memory.view, node.config.interface, node.system, context.run
    if node.config.down:
        yield Finding("warn", "state", "it is taken down", f"netclient-lite connect -n {network}")
        return
    if view.state in OUTSIDE:
        yield Finding("warn", "state", OUTSIDE[view.state], "ask the administrator")
    yield from diagnose_servers(node)
    if not (run.has("wg") and run.has("ip")) or os.geteuid() or not view.me:
        return
    again = f"netclient-lite checkin -n {network} --force"
    actual, links = node.read(), system.links()
    if not actual.exists or not actual.up:
        yield Finding("bad", "interface", f"{interface} is " + ("down" if actual.exists else "not there"), again)
        return
    with contextlib.suppress(NetclientError):
        wanted = node.desired(view)
        steps = plan(actual, wanted, KernelWireGuard(run).create(interface))
        for step in steps[:3]:
            yield Finding("warn", "interface", f"not as it should be; to do: {step.why}", again)
    mine = [view.me[width] for width in ("range", "range6") if view.me.get(width)]
    for text, name in system.subnets(links).items():
        if any(inside(text.split("/")[0], [each]) or inside(each.split("/")[0], [text]) for each in mine):
            cure = "give the network another range (netmaker-lite network set), or that interface"
            yield Finding("bad", "addresses", f"{text} on {name} overlaps with the network's {' '.join(mine)}", cure)
    if system.is_strict(interface):
        cure = f"sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{interface}.rp_filter=2"
        yield Finding("warn", "rp_filter", "strict reverse path filtering drops what comes back another way", cure)
    if any(roles(view)) and read_text(f"{IPV4}{interface}/forwarding").strip() == "0" and view.me.get("forwarding", True):
        yield Finding("bad", "forwarding", f"this node is to forward, but {interface} does not", again)
    yield from diagnose_firewall(context, actual.port)
    for record in node.others():
        live = actual.peers.get(record["key"], NEVER)
        way = path_to(node, record, live)
        if way["path"] == "none":
            yield Finding(
                "warn", "peers", f"{record['name']} is not reached: {way['why']}", "netclient-lite doctor, on that machine"
            )
        if live.endpoint:
            yield from diagnose_route(node, record["name"], split_endpoint(live.endpoint)[0])
    yield from diagnose_mtu(node, actual)
    name, own = f"{view.me.get('name', '')}.{network}", view.me.get("ip") or view.me.get("ip6", "")
    if view.me.get("dns") and node.memory.names and own not in system.resolved(name):
        yield Finding("warn", "names", f"{name} does not resolve to {own}", again)


def diagnose_servers(node: Node) -> Iterator[Finding]:
    """Each of its URLs: reached, genuine, at the same time as we."""
    for url in node.config.servers:
        config = Config({**node.config.values(), "servers": [url], "hub": ""})
        try:
            answer = Session(config, node.secret, Counters(), lambda: None, node.system).prove()
        except (NetclientError, BadAnswer) as bad:
            cure = (
                "ask its administrator whether that is right"
                if "key" in str(bad)
                else "is it running, and its TCP port open on the way?"
            )
            yield Finding("bad", "server", str(bad), cure)
            continue
        off = answer.time - time.time()
        if abs(off) > 60:
            yield Finding(
                "warn", "clock", f"{url} has a time {off:+.0f} s from ours", "set the clock: ntpd -q -n -p pool.ntp.org"
            )
        own = {text.split("/")[0] for text in node.homes}
        nat = "no NAT" if answer.address in own else "behind NAT" if is_public(answer.address) else "in its LAN"
        yield Finding("ok", "server", f"{url} is genuine, and sees this machine as {answer.address} ({nat})")
    last = time.monotonic() - node.memory.exchanged
    if node.memory.exchanged and last > 2 * CHECK_EVERY:
        cure = "netclient-lite cron on, or join once more with --daemon on"
        yield Finding("warn", "service", f"the last full check-in was {last:.0f} s ago: nothing starts them", cure)


def diagnose_firewall(context: Context, port: int) -> Iterator[Finding]:
    """Whether a firewall drops what comes to the WireGuard port. What it says is a hint: rules can be anything."""
    run = context.run
    try:
        text = run("nft", "list", "ruleset") if run.has("nft") else run("iptables", "-S") if run.has("iptables") else ""
    except CommandFailed:
        return
    dropping = re.search(r"hook input [^\n]*policy drop|-P INPUT DROP", text)
    if dropping and str(port) not in text:
        cure = f"nft insert rule inet filter input udp dport {port} accept (the chain's name may differ)"
        if run.has("uci"):
            cure = "install the OpenWrt package, or a firewall rule for udp port %d from wan" % port
        yield Finding(
            "warn",
            "firewall",
            f"input is dropped unless asked for, with no rule for UDP port {port}: others cannot call first",
            cure,
        )


def diagnose_route(node: Node, name: str, address: str) -> Iterator[Finding]:
    """Whether packets to an endpoint leave by a real interface, and not into somebody's tunnel."""
    with contextlib.suppress(CommandFailed):
        found = re.search(r" dev (\S+)", node.run("ip", *(["-6"] if ":" in address else []), "route", "get", address))
        if found and found.group(1) != "lo" and OVERLAY_OR_CONTAINER.match(found.group(1)):
            what = f"packets to {name}'s endpoint {address} go into {found.group(1)}: another VPN has taken the route"
            yield Finding("bad", "routes", what, f"ip route add {address} via GATEWAY, or exclude it there")


def diagnose_mtu(node: Node, actual: Actual) -> Iterator[Finding]:
    """Full packets to one peer that answers; some seconds at most."""
    others = (record for record in node.others() if record["key"] in node.fresh and "ip" in record)
    record = next(others, None)
    if record is None or not node.run.has("ping"):
        return

    def answers(size: int) -> bool:
        with contextlib.suppress(CommandFailed):
            node.run("ping", "-c", "1", "-W", "1", "-s", str(size - 28), record["ip"])
            return True
        return False

    if answers(96) and not (answers(actual.mtu) or answers(actual.mtu)):
        fits = next((size for size in range(actual.mtu - 40, 576, -80) if answers(size)), 576)
        what = f"packets of {actual.mtu} bytes to {record['name']} are lost, of {fits} they arrive: the way below is narrower"
        yield Finding(
            "bad", "mtu", what, f"netclient-lite join -t TOKEN --mtu {fits} (or netmaker-lite network set NETWORK mtu={fits})"
        )


def cmd_doctor(context: Context, options: Options) -> ExitStatus:
    """What is wrong on this machine, and the command that cures it. It changes nothing."""
    dry = Run(dry=True)
    context = context._replace(run=dry, files=Files(True), system=System(dry, context.paths.root))
    found: list[tuple[str, Finding]] = [("", each) for each in diagnose_machine(context)]
    for network in chosen_networks(context, options):
        try:
            found += [(network, each) for each in diagnose(context, network)]
        except (NetclientError, OSError) as bad:
            found.append((network, Finding("bad", "doctor", f"the rest could not be looked at: {bad}")))
    listed = [{"network": network, **finding._asdict()} for network, finding in found]
    if options.json:
        show_json(listed)
    else:
        for network, (level, check, what, cure) in found:
            print(f"{level:4}  {network + ': ' if network else ''}{check}: {what}" + (f"\n      cure: {cure}" if cure else ""))
        if all(finding.level == "ok" for _, finding in found):
            print("nothing is wrong")
    return ExitStatus.FAILED if any(finding.level == "bad" for _, finding in found) else ExitStatus.OK


def cmd_mdns(context: Context, options: Options) -> ExitStatus:
    """What another responder of this machine may publish for it: a line a network, port and TXT strings (docs/lan.md)."""
    need_root("mdns")
    for network in awake(context):
        group, node, places = Node.load(context, network).neighbour()
        if places:
            print(split_endpoint(places[0])[1], *announced(group, node, places))
    return ExitStatus.OK


def cmd_version(context: Context, options: Options) -> ExitStatus:
    print(f"netclient-lite {__version__} (protocol {PROTOCOL})")
    return ExitStatus.OK


# --------------------
# CLI
# --------------------


class Command(NamedTuple):
    """A verb, and the flags that its help shows."""

    name: str
    function: Callable[[Context, Options], ExitStatus]
    help: str
    flags: tuple[str, ...] = ()


JOIN_FLAGS = tuple(setting.name for setting in SETTINGS if setting.name != "server-data")
COMMANDS = (
    Command("join", cmd_join, "become a node, or update the settings", (*JOIN_FLAGS, "accept-key", "force", "dry-run")),
    Command(
        "register", cmd_join, "join a hub network, through which the server is reached from then on", (*JOIN_FLAGS, "dry-run")
    ),
    Command("leave", cmd_leave, "leave networks (-n NET or all), also with the server gone", ("network", "dry-run")),
    Command("connect", cmd_connect, "take networks up again", ("network", "dry-run")),
    Command("disconnect", cmd_connect, "take networks down without leaving them", ("network", "dry-run")),
    Command("cron", cmd_cron, "check-ins every 15 s by cron: on, off, or show the lines", ("dry-run",)),
    Command("uninstall", cmd_uninstall, "leave all networks and remove the agent's files", ("dry-run",)),
    Command(
        "checkin",
        cmd_checkin,
        "check in once: ask, apply what is new, repair the rest",
        ("network", "server-data", "force", "dry-run"),
    ),
    Command("pull", cmd_checkin, "fetch the whole state anew and apply it", ("network", "dry-run")),
    Command("push", cmd_checkin, "tell the server all about this machine again", ("network", "dry-run")),
    Command("list", cmd_list, "the networks of this machine and their nodes, as JSON", ("network", "json")),
    Command("status", cmd_status, "peers: path, endpoint, age of the handshake, traffic", ("network", "json")),
    Command("doctor", cmd_doctor, "what is wrong on this machine, and what cures it; changes nothing", ("network", "json")),
    Command("mdns", cmd_mdns, "print what another mDNS responder may publish for this machine"),
    Command("daemon", cmd_daemon, "stay, and apply changes within a second", ("server-data",)),
    Command("version", cmd_version, "print the version"),
)
SWITCHES = (
    ("accept-key", "trust the server's key unseen (for scripts, on a network you trust)"),
    ("force", "join: replace what is there; checkin: a full one"),
    ("dry-run", "print the commands and files, change nothing"),
    ("json", "print JSON"),
    ("verbose", "print each command that changes the machine"),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser, from the tables. Every verb takes every flag, as in the original; its help shows its own."""
    about = "The agent of netmaker-lite: WireGuard meshes for routers, NAS and IoT."
    parser = argparse.ArgumentParser("netclient-lite", description=about)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for command in COMMANDS:
        verb = verbs.add_parser(command.name, help=command.help, description=command.help)
        for setting in SETTINGS:
            names = ["--" + setting.name, *("-" + alias for alias in setting.aliases if len(alias) == 1)]
            names += ["--" + alias for alias in setting.aliases if len(alias) > 1]
            text = f"{setting.help} [{setting.env}]" if setting.name in command.flags else argparse.SUPPRESS
            place = {"dest": setting.name.replace("-", "_"), "metavar": setting.metavar or setting.kind.upper()}
            verb.add_argument(*names, help=text, **place)  # type: ignore[arg-type]
        for name in IGNORED:
            verb.add_argument("--" + name, help=argparse.SUPPRESS)
        for name, text in SWITCHES:
            shown = text if name in command.flags or name == "verbose" else argparse.SUPPRESS
            verb.add_argument("--" + name, *(["-v"] if name == "verbose" else []), action="store_true", help=shown)
        if command.name == "cron":
            verb.add_argument("action", nargs="?", default="show", choices=("on", "off", "show"))
        verb.set_defaults(command=command)
    return parser


def spelled_out(arguments: Words) -> list[str]:
    """The original's spellings to ours: `-daemon=off` gets its second dash, old short forms their name."""
    known = {alias for setting in SETTINGS for alias in (setting.name, *setting.aliases) if len(alias) > 1}
    short = {alias: setting.name for setting in SETTINGS for alias in setting.aliases if len(alias) == 1}
    alone = {"help", "version"} | {name for name, _ in SWITCHES}
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, found, value = word.lstrip("-").partition("=")
        dashes = len(word) - len(word.lstrip("-"))
        name = IGNORED_ALIASES.get(name, short.get(name, name)) if dashes else ""
        if dashes in (1, 2) and name in known | set(IGNORED):
            # in one word: argparse takes a value that begins with a dash for a flag
            given = value if found else next(rest, None)
            words.append("--" + name if given is None else f"--{name}={given}")
        elif dashes == 1 and name in alone:
            words.append("--" + name)
        else:
            words.append(word)
    return words


def resolve(options: Options, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Flag, else environment: each setting's value in its kind, None where neither says anything."""
    for setting in SETTINGS:
        name = setting.name.replace("-", "_")
        text = getattr(options, name)
        text = environment.get(setting.env) if text is None else text
        setattr(options, name, setting_value(setting, text) if text not in (None, "") else None)
    for name, env in IGNORED.items():
        if getattr(options, name) is not None or environment.get(env):
            say(f"--{name} ({env}) means nothing to netclient-lite and is ignored")


def say(sentence: str) -> None:
    """One line for the user: on stderr, or in the system's log where stderr leads nowhere."""
    try:
        nowhere = os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev and os.fstat(2).st_mode & 0o170000 == 0o020000
    except OSError:
        nowhere = True
    if nowhere:
        import syslog

        syslog.openlog("netclient-lite", syslog.LOG_PID, syslog.LOG_DAEMON)
        syslog.syslog(syslog.LOG_NOTICE, sentence)
    else:
        print("netclient-lite: " + sentence, file=sys.stderr, flush=True)


def main(arguments: Words | None = None) -> int:
    """The command line: returns the exit status."""
    options = build_parser().parse_args(spelled_out(sys.argv[1:] if arguments is None else arguments))
    os.umask(0o077)
    try:
        resolve(options, os.environ, say)
        paths = Paths(root_folder())
        run, files = Run(options.dry_run, options.verbose), Files(options.dry_run)
        context = Context(paths, run, files, System(run, paths.root), say)
        return int(options.command.function(context, options))
    except NetclientError as bad:
        say(str(bad))
        return int(bad.status)
    except BadAnswer as bad:
        say(f"the server's answer does not count: {bad}")
        return int(ExitStatus.FAILED)
    except KeyboardInterrupt:
        return int(ExitStatus.FAILED)
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(ExitStatus.OK)


if __name__ == "__main__":
    sys.exit(main())
