#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""netmaker-lite's command line: the administrator's tool, on the server's host and from anywhere else.

    netmaker-lite network add home --range 10.20.30.0/24
    netmaker-lite key add home                              prints what joins a machine, once
    netmaker-lite node list home --json                     what the REST API answers
    NETMAKER_TOKEN=… netmaker-lite node list home --api https://mesh.example

Every command is a row of one table: its words, its arguments, the REST call that it becomes, what it
prints. On the server's host the calls go to the server's application in this process, whether or not
a server runs; with --api URL they go over HTTP. So this file needs the standard library alone (and
requests for --api, segno for --qr), and works without the server's files on a laptop.

Contents
    IMPORTS     the standard library
    CALLS       calls, answers, what can go wrong
    HTTP        a server elsewhere, through requests
    PRINTING    tables and objects for people, QR codes
    COMMANDS    the table of commands
    HELP        synopses and help texts, from the table
    WORDS       arguments to a command, its body and its path
    COMPLETION  scripts for bash and ash, from the table
    CLI         connect, call, print; main
"""

from __future__ import annotations

__version__ = "0.1.0"

# --------------------------------------------------------------------------------------------------
# IMPORTS
# --------------------------------------------------------------------------------------------------

import argparse
import getpass
import io
import ipaddress
import json
import os
import re
import stat
import sys
import textwrap
import time
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple, NoReturn, Protocol, Sequence
from urllib.parse import quote, urlencode, urlsplit

Args = argparse.Namespace
Row = Dict[str, Any]  # a JSON object

# --------------------------------------------------------------------------------------------------
# CALLS
# --------------------------------------------------------------------------------------------------


class Failed(Exception):
    """One sentence with cause and cure, and the exit status: 1 failed, 2 wrong usage."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


class Answer(NamedTuple):
    """What a call brought: the status, the JSON value, and the body as it came (files are no JSON)."""

    status: int
    value: Any
    body: bytes = b""


class Server(Protocol):
    """Whom the calls go to."""

    def call(self, method: str, path: str, body: Any) -> Answer: ...

    def close(self) -> None: ...


class Printed(NamedTuple):
    """What a command prints, the object for --json or the lines for people, and its exit status."""

    value: Any
    lines: Sequence[str]
    status: int = 0


class Local(Protocol):
    """What the server's own files add on its host: a server in this process, and the commands that are no REST calls."""

    @property
    def settings(self) -> Sequence[tuple[str, str, str]]: ...  # name, default, what it does

    @property
    def commands(self) -> Mapping[str, Callable[[Args], Printed]]: ...

    def open(self, args: Args) -> Server: ...


def refusal(answer: Answer) -> str:
    """The sentence of an answer that is an error."""
    value = answer.value if isinstance(answer.value, dict) else {}
    if str(value.get("Message")).startswith("Not found: '/api/"):
        return "the server does not know how to do this: it is of another version (`netmaker-lite version` prints this one's)"
    return str(value.get("Message") or value.get("error") or "the server answers %d and does not say why" % answer.status)


# --------------------------------------------------------------------------------------------------
# HTTP
# --------------------------------------------------------------------------------------------------

TIMEOUTS = (10, 60)  # seconds to connect, and between two pieces of the answer


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_url(url: str, insecure: bool) -> str:
    """The URL of a server, without the slash at its end. A token goes over plain HTTP only where that is asked for."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as bad:
        raise Failed("--api: %r is no URL: %s" % (url, bad), 2) from bad
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise Failed("--api takes a URL like https://mesh.example or http://127.0.0.1:8081, not %r" % url, 2)
    if parts.username or parts.password:
        raise Failed("--api takes no user and password: put an API token into NETMAKER_TOKEN or a file (--token-file)", 2)
    if parts.scheme == "http" and not is_loopback(host) and not insecure:
        cure = "use https, an SSH tunnel to its loopback, or --insecure inside a network that you trust"
        raise Failed("the token would go to %s readable for everybody on the way: %s" % (host, cure), 2)
    return url.rstrip("/")


def read_token(path: str, environment: Mapping[str, str]) -> str:
    """The API token, of a file or the environment; "" where there is none."""
    token = environment.get("NETMAKER_TOKEN", "")
    if path:
        try:
            with open(path, encoding="utf-8") as stream:
                if stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077 and os.name == "posix":
                    sys.stderr.write("netmaker-lite: others may read %s: chmod 600 it\n" % path)
                token = stream.read(4096)
        except (OSError, ValueError) as problem:
            raise Failed(
                "--token-file: cannot read %s: %s" % (path, getattr(problem, "strerror", "it is no text")), 2
            ) from problem
    token = token.strip()
    if token and not re.fullmatch("[!-~]+", token):
        raise Failed("%s holds no token: that is one word" % (path or "NETMAKER_TOKEN"), 2)
    return token


def innermost(problem: BaseException) -> str:
    """Why a connection failed, without the layers of those who passed it on."""
    deepest = ""
    seen: list[Any] = [problem]
    for each in seen:
        if isinstance(each, OSError) and each.strerror:
            deepest = each.strerror
        reasons = (each.__cause__, each.__context__, getattr(each, "reason", None), *each.args)
        seen += [reason for reason in reasons if isinstance(reason, BaseException) and reason not in seen]
    return deepest or "the connection broke"


class Remote:
    """A server elsewhere, over HTTP."""

    def __init__(self, url: str, token: str) -> None:
        try:
            import requests
        except ImportError as missing:
            raise Failed("--api needs the package requests, which is not installed here: pip install requests") from missing
        self.url, self.token, self.errors = url, token, requests.exceptions
        self.session = requests.Session()
        self.session.trust_env = not is_loopback(urlsplit(url).hostname or "")  # no proxy leads to this machine itself

    def signed(self, request: Any) -> Any:
        # as `auth`, for requests would else put what a .netrc holds in its place
        if self.token:
            request.headers["Authorization"] = "Bearer " + self.token
        return request

    def call(self, method: str, path: str, body: Any) -> Answer:
        try:
            found = self.session.request(
                method, self.url + path, json=body, auth=self.signed, timeout=TIMEOUTS, allow_redirects=False
            )
        except self.errors.SSLError as problem:
            cure = "an own authority's certificate is named by REQUESTS_CA_BUNDLE"
            raise Failed(
                "the certificate of %s is not to be trusted (%s): %s" % (self.url, innermost(problem), cure)
            ) from problem
        except self.errors.Timeout as problem:
            cure = "is the server running, reachable from here, and does it speak %s?" % self.url.partition(":")[0]
            raise Failed("%s does not answer: %s" % (self.url, cure)) from problem
        except (self.errors.RequestException, ValueError) as problem:
            cure = "is the server running, and the URL right?"
            raise Failed("cannot reach %s (%s): %s" % (self.url, innermost(problem), cure)) from problem
        return self.understood(found, path.endswith("/file"))

    def understood(self, found: Any, is_file: bool) -> Answer:
        status, kind = found.status_code, found.headers.get("Content-Type", "").partition(";")[0]
        if 300 <= status < 400:
            where = found.headers.get("Location", "nowhere")
            raise Failed("%s leads on to %s, which is not followed: give the URL that is meant to --api" % (self.url, where))
        if kind != "application/json" and not (is_file and status < 400):
            sentence = "%s does not answer like a netmaker-lite server (status %d, %s): check the URL"
            raise Failed(sentence % (self.url, status, kind or "no type"))
        if status == 401:
            raise Failed(self.stranger())
        try:
            value = found.json() if kind == "application/json" else None
        except ValueError as bad:
            raise Failed("%s answers broken JSON: is that a netmaker-lite server?" % self.url) from bad
        return Answer(status, value, found.content)

    def stranger(self) -> str:
        make = "`netmaker-lite user apitoken add USER NAME` on its host makes one"
        if self.token:
            return "the server does not know this token, or it has expired: %s" % make
        return "the server wants an API token, in NETMAKER_TOKEN or a file (--token-file): %s" % make

    def close(self) -> None:
        self.session.close()


# --------------------------------------------------------------------------------------------------
# PRINTING
# --------------------------------------------------------------------------------------------------

Show = Callable[[Answer, Args], Sequence[str]]
DATES = frozenset(
    ("expdatetime", "lastcheckin", "lastmodified", "networklastmodified", "nodeslastmodified", "expiration", "created", "time")
)
# The original's, which say nothing here: in --json alone.
EMPTY = frozenset(
    (
        *("accesskey", "accesskeys", "action", "defaultsaveconfig", "keyupdatetimestamp"),
        *("lastpeerupdate", "password", "pullchanges", "saveconfig"),
    )
)


def printable(text: str) -> str:
    """Text from elsewhere, which must not speak to the terminal."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)


def cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in ("", None) else printable(str(value))


def date(then: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(then)) if then else "never"


def ago(then: Any) -> str:
    """How long ago, for people."""
    seconds = max(0, int(time.time()) - int(then or 0))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if then and seconds >= size:
            return "%d %s ago" % (seconds // size, unit)
    return "%d s ago" % seconds if then else "never"


def expiry(then: Any) -> str:
    return "never" if not then else "expired" if then <= time.time() else date(then)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "": lambda value: value,
    "ago": ago,
    "date": date,
    "expiry": expiry,
    "count": lambda left: "unlimited" if left is None else left,
}


def table(none: str, columns: str) -> Show:
    """A list in columns, `HEADING=member` or `HEADING=member:converter`. `none` is said of an empty list."""
    heads, _, sources = zip(*(column.partition("=") for column in columns.split()))
    members = [source.partition(":")[::2] for source in sources]

    def shown(answer: Answer, args: Args) -> Sequence[str]:
        if not answer.value:
            return [none.format(**vars(args))]
        rows = [[cell(CONVERTERS[how](each.get(member))) for member, how in members] for each in answer.value]
        return aligned([[head.replace("_", " ") for head in heads], *rows])

    return shown


def listing(answer: Answer, args: Args) -> Sequence[str]:
    """One object, a line for each member that says something: what it is not (is…: no) does not."""
    pairs: list[tuple[str, str]] = []
    for name, value in answer.value.items():
        if name in EMPTY or (name.startswith("is") and value == "no") or (name == "macaddress" and value == answer.value["id"]):
            continue
        if isinstance(value, dict):
            pairs += [("%s %s" % (name, inner), cell(one or "no handshake")) for inner, one in value.items()]
        elif name in DATES:
            pairs.append((name, date(value)))
        elif value not in ("", None, [], {}):
            pairs.append((name, cell(value)))
    return aligned(pairs)


def said(*sentences: str) -> Show:
    """Sentences about what was done, with the arguments and other members of the answer in them."""

    def shown(answer: Answer, args: Args) -> Sequence[str]:
        values = {**(answer.value if isinstance(answer.value, dict) else {}), **vars(args)}
        return [sentence.format(**values) for sentence in sentences]

    return shown


def need_segno() -> Any:
    try:
        import segno
    except ImportError as missing:
        raise Failed("--qr needs the package segno, which is not installed here: pip install segno") from missing
    return segno


def qr(text: str) -> Sequence[str]:
    """A QR code for the terminal: half blocks, or where its encoding has none, reversed blanks."""
    try:
        "▀▄█".encode(sys.stdout.encoding or "ascii")
        compact = True
    except (UnicodeEncodeError, LookupError):
        compact = False
    out = io.StringIO()
    need_segno().make(text, error="L", micro=False).terminal(out, compact=compact)
    return out.getvalue().splitlines()


# --------------------------------------------------------------------------------------------------
# COMMANDS
# --------------------------------------------------------------------------------------------------


class Argument(NamedTuple):
    """An argument: flags or name, as argparse wants it, the member of the body that it fills, and what completes it."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]
    field: str = ""
    kind: str = "-"

    @property
    def dest(self) -> str:
        return str(self.options.get("dest") or self.flags[0].lstrip("-").replace("-", "_"))

    @property
    def is_flag(self) -> bool:
        return self.flags[0].startswith("-")

    @property
    def spelled(self) -> str:
        """As the user knows it."""
        return self.flags[0] if self.is_flag else str(self.options["metavar"])


def arg(*flags: str, field: str = "", kind: str = "-", **options: Any) -> Argument:
    return Argument(flags, options, field, kind)


class Setting(NamedTuple):
    """A member of a network or node that can be set, its short name on the command line, and what it is.

    `along` is a member that becomes yes with it, or no where it is emptied.
    """

    field: str
    short: str
    metavar: str
    help: str
    along: str = ""


NETWORK_SETTINGS = (
    Setting("addressrange", "range", "CIDR", "IPv4 range, like 10.20.30.0/24"),
    Setting("addressrange6", "range6", "CIDR", "IPv6 range, like fd00:20:30::/64"),
    Setting("islocal", "local-only", "yes|no", "all nodes are in one LAN"),
    Setting("isgrpchub", "hub", "yes|no", "nodes know the server's host alone (docs/comms.md)"),
    Setting("hosted", "hosted", "yes|no", "the server's host is a node of it (yes)"),
    Setting("localrange", "local-range", "CIDR", "that LAN's range"),
    Setting("defaultudpholepunch", "hole-punch", "yes|no", "use endpoints that other nodes observe (yes)"),
    Setting("allowmanualsignup", "manual-signup", "yes|no", "let machines ask to join without a key (no)"),
    Setting("defaultlistenport", "port", "N", "the nodes' WireGuard port (51821)"),
    Setting("defaultkeepalive", "keepalive", "S", "seconds between keepalives, 0 for none (20)"),
    Setting("defaultmtu", "mtu", "N", "MTU of the interfaces (1280)"),
    Setting("nodelimit", "node-limit", "N", "how many nodes it may have"),
    Setting("checkininterval", "checkin-interval", "S", "seconds between two check-ins of a node (15)"),
    Setting("defaultinterface", "interface", "IF", "the nodes' interface (nm-NAME)"),
    Setting("displayname", "display", "TEXT", "name for people"),
    Setting("defaultextclientdns", "client-dns", "IP", "name server of external clients"),
    Setting("autoremove", "auto-remove", "30d", "remove nodes that are not heard of for so long; 0: never (0)"),
)
NODE_SETTINGS = (
    Setting("name", "name", "NAME", "its name, a DNS label"),
    Setting("macaddress", "macaddress", "MAC", "its MAC address, for scripts that name nodes so"),
    Setting("address", "address", "IP", "its IPv4 address in the network"),
    Setting("address6", "address6", "IP", "its IPv6 address in the network"),
    Setting("allowedips", "allowedips", "CIDR,…", "more ranges that lead to it"),
    Setting("endpoint", "endpoint", "IP[:PORT]", "where the others reach it; it stays then", "isstaticendpoint"),
    Setting("listenport", "port", "N", "its WireGuard port; it stays then", "isstaticport"),
    Setting("isstatic", "isstatic", "yes|no", "both stay as they are"),
    Setting("isstaticendpoint", "isstaticendpoint", "yes|no", "its endpoint stays"),
    Setting("isstaticport", "isstaticport", "yes|no", "its port stays"),
    Setting("persistentkeepalive", "keepalive", "S", "seconds between keepalives, 0 for none; empty: the network's"),
    Setting("mtu", "mtu", "N", "MTU of its interface; empty: the network's"),
    Setting("dnson", "dnson", "yes|no", "it sets up names"),
    Setting("roaming", "roaming", "yes|no", "it follows changes of its own address"),
    Setting("ipforwarding", "ipforwarding", "yes|no", "it forwards"),
    Setting("udpholepunch", "hole-punch", "yes|no", "it uses endpoints that other nodes observe"),
    Setting("islocal", "islocal", "yes|no", "the others use its local address"),
    Setting("expdatetime", "expires", "24h|UNIX", "when its membership ends; empty: never"),
    *(
        Setting(
            "post" + when, "post" + when, "COMMAND", "run when its interface goes %s, if that machine's root allows it" % when
        )
        for when in ("up", "down")
    ),
)
LISTS = ("allowedips",)


class Command(NamedTuple):
    """A command: words, help, arguments, the REST call that it becomes, what it prints.

    `rest` is METHOD /path; two of them with a bar between: `off` or --qr chooses the second. "" is no REST call.
    The body is what the arguments' fields say, and `fixed`.
    """

    words: str
    help: str
    rest: str
    arguments: tuple[Argument, ...] = ()
    show: Show = listing
    fixed: Mapping[str, Any] = {}
    settings: tuple[Setting, ...] = ()  # what its KEY=VALUE words may name
    more: str = ""  # a paragraph of help
    asks: bool = False  # for a password
    founds: bool = False  # may be the first on an empty data folder


NETWORK = arg("network", metavar="NETWORK", kind="network", help="name of the network")
NODE = arg("node", metavar="NODE", kind="node", help="id or name of the node")
CLIENT = arg("client", metavar="CLIENT", kind="client", help="name of the external client")
USER = arg("user", metavar="USER", kind="user", help="name of the user")
PAIRS = arg("fields", metavar="KEY=VALUE", kind="pairs", nargs="+", help="what to set")
QR = arg("--qr", action="store_true", help="print it as a QR code, for a phone's camera")
EXPIRES = arg("--expires", field="expires", metavar="24h", help="how long it is good (for ever)")
PUBLIC = arg("--public-key", field="publickey", metavar="K", help="its own WireGuard public key; the private one stays there")


def one_of(*words: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError("takes %s, not %r" % (" or ".join(words), text))
        return text

    return checked


def uses(text: str) -> str:
    if text != "unlimited" and not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError("takes a whole number from 1 on, or unlimited, not %r" % text)
    return text


def show_network(answer: Answer, args: Args) -> Sequence[str]:
    made = answer.value
    ranges = " and ".join(filter(None, (made["addressrange"], made["addressrange6"])))
    return ["network %s: %s" % (made["netid"], ranges), "next: netmaker-lite key add %s" % made["netid"]]


def show_key(answer: Answer, args: Args) -> Sequence[str]:
    key = answer.value
    until = ", until " + date(key["expiration"]) if key.get("expiration") else ""
    lines = ["key %s for %s, uses: %s%s" % (key["name"], key["network"], args.uses or 1, until)]
    lines += ["  key    " + key["value"], "  token  " + key["accessstring"], "  join   " + key["join"]]
    if key.get("install"):
        lines += ["or, as root on a machine with neither agent nor tools, the next lines as one:", key["install"]]
    return [*lines, "This is shown once."]


def show_client(answer: Answer, args: Args) -> Sequence[str]:
    """A configuration that was just made, as the file that it is; what there is to say stands in its comments."""
    client = answer.value
    if args.qr:
        return qr(client["config"])
    place = (client["clientid"], client["network"], client.get("address", "no address"))
    lines = ["# %s of network %s, %s. This is shown once: > FILE keeps it, --qr draws it." % place]
    return [*lines, *client["config"].splitlines()]


def show_client_again(answer: Answer, args: Args) -> Sequence[str]:
    return qr(answer.body.decode()) if args.qr else listing(answer, args)


def show_openapi(answer: Answer, args: Args) -> Sequence[str]:
    return json.dumps(answer.value, indent=2).splitlines()


def is_off(args: Args) -> bool:
    """The one word `off` where ranges or nodes may stand."""
    return getattr(args, "targets", None) in ("off", ["off"])


NODE_PATH = "/api/nodes/{network}/{node}"
CLIENT_PATH = "/api/extclients/{network}/{client}"
ON_NODE = (NETWORK, NODE)
ON_CLIENT = (NETWORK, CLIENT)
PAIR = (
    NETWORK,
    arg("node1", field="node1", metavar="NODE", kind="node", help="id or name of one node"),
    arg("node2", field="node2", metavar="NODE", kind="node", help="and of the other"),
)


def flags_of(settings: Iterable[Setting]) -> Iterable[Argument]:
    for each in settings:
        value = {"action": "store_const", "const": "yes"} if each.short in ("local-only", "hub") else {"metavar": each.metavar}
        yield arg("--" + each.short, field=each.field, help=each.help, **value)


def targets(field: str, what: str, kind: str, help: str, nargs: str = "+") -> Argument:
    return arg("targets", field=field, metavar=what + "…|off", kind=kind + "=off", nargs=nargs, help=help + "; off: none")


COMMANDS = (
    Command(
        "serve",
        "run the server",
        "",
        (
            arg("--host", metavar="ADDRESS", help="where to listen; :: for both families (default: as SERVER_HOST)"),
            arg("--port", metavar="N", help="port to listen on (8081)"),
            arg("--new-key", action="store_true", help="the server.key is lost: make another, every agent joins again"),
        ),
    ),
    # ---- networks
    Command(
        "network add",
        "make a network",
        "POST /api/networks",
        (
            arg("name", field="netid", metavar="NAME", help="1 to 12 letters, digits, '.', '_' or '-'"),
            *flags_of(NETWORK_SETTINGS),
        ),
        show_network,
        founds=True,
    ),
    Command(
        "network list",
        "all networks",
        "GET /api/networks",
        (),
        table(
            "no networks: netmaker-lite network add NAME --range 10.20.30.0/24",
            "NETWORK=netid RANGE=addressrange RANGE6=addressrange6 NODES=nodes REVISION=revision",
        ),
    ),
    Command("network show", "one network", "GET /api/networks/{network}", (NETWORK,)),
    Command(
        "network set",
        "change a network; its nodes follow by themselves",
        "PUT /api/networks/{network}",
        (NETWORK, PAIRS),
        settings=NETWORK_SETTINGS,
    ),
    Command(
        "network refresh-keys",
        "give every node a new WireGuard key, one after the other; no tunnel breaks",
        "POST /api/networks/{network}/keyupdate",
        (NETWORK,),
        said("network {network}: its nodes change their keys, one after the other"),
    ),
    Command(
        "network remove",
        "forget a network without nodes",
        "DELETE /api/networks/{network}",
        (NETWORK,),
        said("network {network} removed"),
    ),
    # ---- access keys
    Command(
        "key add",
        "make an access key; print what joins a machine, once",
        "POST /api/networks/{network}/keys",
        (
            NETWORK,
            arg("--name", field="name", metavar="N", help="its name (chosen by itself)"),
            arg("--uses", field="uses", metavar="N", type=uses, help="machines that may join, or `unlimited` (1)"),
            EXPIRES,
        ),
        show_key,
    ),
    Command(
        "key list",
        "the access keys of a network",
        "GET /api/networks/{network}/keys",
        (NETWORK,),
        table("no keys: netmaker-lite key add {network}", "NAME=name USES_LEFT=uses:count EXPIRES=expiration:expiry"),
    ),
    Command(
        "key remove",
        "make an access key useless",
        "DELETE /api/networks/{network}/keys/{key}",
        (NETWORK, arg("key", metavar="NAME", kind="key", help="name of the key")),
        said("key {key} removed: nobody can join with it any more"),
    ),
    # ---- nodes
    Command(
        "node list",
        "the nodes of a network",
        "GET /api/nodes/{network}",
        (NETWORK,),
        table(
            "no nodes: netmaker-lite key add {network} prints the line that joins one",
            "NAME=name ID=id ADDRESS=address ADDRESS6=address6 ENDPOINT=endpoint PORT=listenport STATUS=status"
            " SEEN=lastcheckin:ago",
        ),
    ),
    Command("node show", "all that is known of a node", "GET " + NODE_PATH, ON_NODE),
    Command("node set", "change a node; it follows by itself", "PUT " + NODE_PATH, (*ON_NODE, PAIRS), settings=NODE_SETTINGS),
    Command("node approve", "let a pending node in", f"POST {NODE_PATH}/approve", ON_NODE, said("node {node} approved")),
    Command("node reject", "turn a pending node away", f"POST {NODE_PATH}/reject", ON_NODE, said("node {node} turned away")),
    Command("node disable", "take it out of the mesh", f"POST {NODE_PATH}/disable", ON_NODE, said("node {node} disabled")),
    Command("node enable", "let it in again", f"POST {NODE_PATH}/enable", ON_NODE, said("node {node} enabled")),
    Command(
        "node refresh-key",
        "give it a new WireGuard key; no tunnel breaks",
        f"POST {NODE_PATH}/refreshkey",
        ON_NODE,
        said("node {node} changes its key"),
    ),
    Command("node remove", "end its membership", f"DELETE {NODE_PATH}", ON_NODE, said("node {node} removed")),
    Command(
        "node egress",
        "make it the gateway to networks behind it, or no longer",
        f"POST {NODE_PATH}/creategateway | DELETE {NODE_PATH}/deletegateway",
        (
            *ON_NODE,
            targets("ranges", "RANGE", "", "like 192.168.1.0/24"),
            arg("--interface", field="interface", metavar="IF", help="its interface to them (that of its route)"),
            arg("--no-nat", field="nat", action="store_const", const="no", help="keep the sources' addresses"),
        ),
        lambda answer, args: ["node %s leads to %s" % (args.node, "no network" if is_off(args) else ", ".join(args.targets))],
    ),
    Command(
        "node ingress",
        "make it the gateway of external clients, or no longer (its clients go)",
        f"POST {NODE_PATH}/createingress | DELETE {NODE_PATH}/deleteingress",
        (*ON_NODE, arg("targets", metavar="off", kind="=off", nargs="?", type=one_of("off"), help="no longer")),
        lambda answer, args: ["node %s takes %s" % (args.node, "no clients" if is_off(args) else "external clients")],
    ),
    Command(
        "node relay",
        "let it carry the traffic of nodes that others cannot reach, or no longer",
        f"POST {NODE_PATH}/createrelay | DELETE {NODE_PATH}/deleterelay",
        (*ON_NODE, targets("relayaddrs", "PEER", "node", "nodes to relay; none: pairs that need it, by themselves", "*")),
        lambda answer, args: [
            "node %s relays %s" % (args.node, "no node" if is_off(args) else ", ".join(args.targets) or "pairs that need it")
        ],
    ),
    # ---- who may know whom
    Command(
        "acl deny",
        "keep two nodes apart",
        "POST /api/networks/{network}/acls",
        PAIR,
        said("{node1} and {node2} do not know each other"),
    ),
    Command(
        "acl allow",
        "let two nodes know each other again",
        "DELETE /api/networks/{network}/acls/{node1}/{node2}",
        PAIR,
        said("{node1} and {node2} know each other"),
    ),
    Command(
        "acl list",
        "the pairs that are kept apart",
        "GET /api/networks/{network}/acls",
        (NETWORK,),
        table("every node of {network} knows every other", "NODE=name1 APART_FROM=name2"),
    ),
    # ---- external clients
    Command(
        "client add",
        "make an external client, a phone or laptop without our agent; print its configuration, once",
        "POST /api/extclients/{network}/{gateway}",
        (
            NETWORK,
            arg("gateway", metavar="GATEWAY", kind="node", help="id or name of an ingress node"),
            arg("--name", field="clientid", metavar="N", help="its name (chosen by itself)"),
            PUBLIC,
            arg("--dns", field="dns", metavar="IP", help="its name server"),
            arg("--internet", field="internet", action="store_const", const="yes", help="the gateway is its way to everywhere"),
            QR,
        ),
        show_client,
    ),
    Command(
        "client list",
        "the external clients of a network",
        "GET /api/extclients/{network}",
        (NETWORK,),
        table(
            "no clients: netmaker-lite client add {network} GATEWAY",
            "NAME=clientid ADDRESS=address ADDRESS6=address6 GATEWAY=ingressgatewayendpoint ENABLED=enabled OUTDATED=outdated",
        ),
    ),
    Command(
        "client show",
        "one external client; with --qr its configuration, in the first 15 minutes",
        f"GET {CLIENT_PATH} | GET {CLIENT_PATH}/file",
        (*ON_CLIENT, QR),
        show_client_again,
    ),
    Command(
        "client renew",
        "give it a new key; print the new configuration, once",
        f"POST {CLIENT_PATH}/renew",
        (*ON_CLIENT, PUBLIC, QR),
        show_client,
    ),
    Command(
        "client rename",
        "give it another name",
        "PUT " + CLIENT_PATH,
        (*ON_CLIENT, arg("name", field="clientid", metavar="NAME", help="the new name")),
        said("client {client} is {clientid} now"),
    ),
    Command(
        "client disable",
        "lock it out",
        "PUT " + CLIENT_PATH,
        ON_CLIENT,
        said("client {client} disabled"),
        fixed={"enabled": "no"},
    ),
    Command(
        "client enable",
        "let it in again",
        "PUT " + CLIENT_PATH,
        ON_CLIENT,
        said("client {client} enabled"),
        fixed={"enabled": "yes"},
    ),
    Command("client remove", "remove it for good", "DELETE " + CLIENT_PATH, ON_CLIENT, said("client {client} removed")),
    # ---- names
    Command(
        "dns list",
        "the names of a network: nodes, clients, own entries",
        "GET /api/dns/adm/{network}",
        (NETWORK,),
        table("no names in {network}", "NAME=name ADDRESS=address ADDRESS6=address6"),
    ),
    Command(
        "dns add",
        "add an own entry",
        "POST /api/dns/{network}",
        (
            NETWORK,
            arg("name", field="name", metavar="NAME", help="a host name"),
            arg("address", field="address", metavar="ADDRESS", help="what it means"),
        ),
        said("{name} is {address} in {network}"),
    ),
    Command(
        "dns remove",
        "remove an own entry",
        "DELETE /api/dns/{network}/{name}",
        (NETWORK, arg("name", metavar="NAME", kind="dns", help="the host name")),
        said("{name} removed from {network}"),
    ),
    # ---- users
    Command(
        "user add",
        "make a user; the password is asked for, or read from standard input",
        "POST /api/users/{user}",
        (
            arg("user", field="username", metavar="NAME", help="3 to 40 letters, digits, '.', '@', '_', '+' or '-'"),
            arg("--admin", field="isadmin", action="store_true", help="may do everything"),
            arg("--network", field="networks", metavar="N", kind="network", action="append", help="may manage it; repeatable"),
        ),
        said("user {user} made"),
        asks=True,
        founds=True,
    ),
    Command(
        "user list",
        "all users",
        "GET /api/users",
        (),
        table("no users: netmaker-lite user add NAME --admin", "NAME=username ADMIN=isadmin NETWORKS=networks"),
    ),
    Command(
        "user passwd",
        "give a user another password, asked for or read from standard input",
        "PUT /api/users/{user}",
        (USER,),
        said("user {user} has another password"),
        asks=True,
    ),
    Command("user remove", "remove a user", "DELETE /api/users/{user}", (USER,), said("user {user} removed")),
    Command(
        "user apitoken add",
        "make a token for scripts and for --api; print it, once",
        "POST /api/users/{user}/tokens",
        (
            USER,
            arg("name", field="name", metavar="NAME", help="its name"),
            arg("--scope", field="scope", metavar="read|write", kind="=read,write", type=one_of("read", "write"), help="(write)"),
            arg("--network", field="networks", metavar="N", kind="network", action="append", help="only this; repeatable"),
            EXPIRES,
        ),
        said("token {name} of {user}:", "  {value}", "This is shown once."),
    ),
    Command(
        "user apitoken list",
        "a user's tokens",
        "GET /api/users/{user}/tokens",
        (USER,),
        table(
            "no tokens: netmaker-lite user apitoken add {user} NAME",
            "NAME=name SCOPE=scope NETWORKS=networks EXPIRES=expires:expiry",
        ),
    ),
    Command(
        "user apitoken remove",
        "make a token useless",
        "DELETE /api/users/{user}/tokens/{name}",
        (USER, arg("name", metavar="NAME", kind="token", help="its name")),
        said("token {name} of {user} removed"),
    ),
    # ---- the whole
    Command(
        "audit",
        "who changed what, and when; the newest first",
        "GET /api/audit",
        (
            arg("--network", field="network", metavar="N", kind="network", help="only this network"),
            arg("--since", field="since", metavar="24h", help="only what is younger"),
        ),
        table(
            "nothing was changed",
            "TIME=time:date WHO=who SOURCE=source NETWORK=network ACTION=action TARGET=target DETAIL=detail",
        ),
    ),
    Command(
        "backup",
        "write everything into one file, also while the server runs",
        "",
        (
            arg("file", metavar="FILE", kind="file", help="the backup"),
            arg("--with-key", action="store_true", help="with server.key: keep it like a password"),
        ),
    ),
    Command(
        "restore",
        "take over a backup; the server must be stopped",
        "",
        (arg("file", metavar="FILE", kind="file", help="the backup"),),
    ),
    Command("check", "look for faults in the database", ""),
    Command("openapi", "the description of the REST API, OpenAPI as JSON", "GET /api/openapi.json", (), show_openapi),
    Command(
        "completion",
        "print what makes this shell complete, or shorten, the words of this program",
        "",
        (arg("shell", metavar="bash|ash", kind="=bash,ash", type=one_of("bash", "ash"), help="the shell"),),
        more='For bash, put eval "$(netmaker-lite completion bash)" into ~/.bashrc; for ash the same into ~/.profile.',
    ),
    # for the completion alone: without help, so no list names it
    Command(
        "names",
        "",
        "",
        (arg("what", metavar="KIND", help="of names"), arg("within", metavar="WITHIN", nargs="?", default="-", help="which")),
    ),
    Command("version", "print the version", ""),
)
NOUNS = {
    "network": "networks",
    "key": "access keys: the right to join",
    "node": "nodes: machines in a network",
    "acl": "which nodes may know each other",
    "client": "external clients: phones and laptops behind an ingress node",
    "dns": "names",
    "user": "users of the API and their tokens",
    "user apitoken": "tokens for scripts and for --api",
}
SHOWN = tuple(command for command in COMMANDS if command.help)
HERE = ("serve", "backup", "restore", "check")  # they need the server's own files and its data folder
JSON = arg("--json", action="store_true", default=False, help="print what the REST API answers")
DATA = arg("--data", metavar="DIR", kind="dir", default="", help="the server's data folder on this host [NETMAKER_DATA]")
WHERE = (
    DATA,
    arg("--api", metavar="URL", default="", help="ask the server at this URL instead [NETMAKER_API]"),
    arg("--token-file", metavar="FILE", kind="file", default="", help="holds the API token for --api (else: NETMAKER_TOKEN)"),
    arg("--insecure", action="store_true", default=False, help="let the token go over plain http:// beyond this host"),
)


def common(command: Command) -> tuple[Argument, ...]:
    """The arguments that a command shares with others."""
    where = WHERE if command.rest or command.words == "names" else (DATA,) if command.words in HERE else ()
    plain = ("serve", "openapi", "completion", "names")
    return (*where, *(() if command.words in plain else (JSON,)))


# --------------------------------------------------------------------------------------------------
# HELP
# --------------------------------------------------------------------------------------------------

ABOUT = "Server of a WireGuard mesh, and its administrator's tool."
ENDING = (
    "On the server's host the commands work on its data folder, whether or not it runs; with --api URL (or NETMAKER_API)"
    " and an API token (NETMAKER_TOKEN, or --token-file) on a server elsewhere. netmaker-admin is the same program for a"
    " machine without the server and what that needs.",
    "Exit status: 0 done, 1 failed, 2 wrong usage. `netmaker-lite COMMAND --help` tells more.",
)


def synopsis(command: Command) -> str:
    """The command with its own arguments; the common ones stand in the help."""
    words = ["netmaker-lite", command.words]
    for argument in command.arguments:
        options, shown = argument.options, argument.spelled
        if argument.is_flag:
            more = " " + str(options["metavar"]) if "metavar" in options else ""
            shown = "[%s%s]%s" % (shown, more, "…" if options.get("action") == "append" else "")
        elif options.get("nargs") == "?":
            shown = "[%s]" % shown
        elif options.get("nargs") == "+" and "…" not in shown:
            shown += "…"
        words.append(shown)
    return " ".join(words)


def wrapped(text: str, width: int, indent: str = "", hang: str = "") -> str:
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent + hang, break_on_hyphens=False)


def columns(pairs: Iterable[tuple[str, str]], width: int, at: int) -> list[str]:
    """What, and what it means, hanging at a column."""
    lines = []
    for what, meaning in pairs:
        text = wrapped(meaning, width, " " * at).lstrip()
        lines += [("  " + what).ljust(at - 1) + " " + text] if len(what) < at - 2 else ["  " + what, " " * at + text]
    return lines


def terminal_width() -> int:
    try:
        return max(40, min(os.get_terminal_size(1).columns - 1, 110))
    except (OSError, ValueError):
        return 100


def overview(noun: str) -> str:
    """All commands, or those of one noun."""
    width = terminal_width()
    lines = ["usage: netmaker-lite %s…" % (noun + " " if noun else "COMMAND "), "", NOUNS.get(noun, ABOUT), ""]
    for head in dict.fromkeys(command.words.rpartition(" ")[0] for command in SHOWN):
        if noun and head != noun and not head.startswith(noun + " "):
            continue
        own = [(command.words, command.help) for command in SHOWN if command.words.rpartition(" ")[0] == head]
        lines += [NOUNS.get(head, "the server") + ":"] * (head != noun or not noun) + columns(own, width, 25) + [""]
    return "\n".join([*lines, *(wrapped(text, width) for text in ENDING)])


def meanings(arguments: Iterable[Argument]) -> list[tuple[str, str]]:
    return [
        (
            " ".join(filter(None, (each.flags[0], each.options.get("metavar", "")))) if each.is_flag else each.spelled,
            each.options["help"],
        )
        for each in arguments
    ]


def help_of(command: Command, server_settings: Sequence[tuple[str, str, str]] = ()) -> str:
    """The help of one command; that of `serve` lists the server's settings."""
    width = terminal_width()
    lines = [wrapped("usage: " + synopsis(command), width, hang="       "), "", wrapped(command.help, width), ""]
    if command.more:
        lines += [wrapped(command.more, width), ""]
    parts = {
        "arguments": meanings(each for each in command.arguments if not each.is_flag),
        "options": meanings(each for each in command.arguments if each.is_flag),
        "KEY": [(each.short + "=" + each.metavar, each.help) for each in command.settings],
        "settings (environment, or netmaker.env in the data folder)": [
            (name, help + (default and " [%s]" % default)) for name, default, help in server_settings if command.words == "serve"
        ],
        "common options": meanings(common(command)),
    }
    for head, pairs in parts.items():
        if pairs:
            lines += [head + ":", *columns(pairs, width, 27), ""]
    return "\n".join(lines).rstrip()


# --------------------------------------------------------------------------------------------------
# WORDS
# --------------------------------------------------------------------------------------------------

BY_WORDS = {command.words: command for command in COMMANDS}
HELP = ("-h", "--help")


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are sentences."""

    words = ""

    def error(self, message: str) -> NoReturn:
        message = re.sub("^argument (.+?): (takes )?", lambda found: found[1] + (" takes " if found[2] else ": "), message)
        message = message.replace("the following arguments are required: ", "it needs ")
        if message.startswith("unrecognized arguments: "):
            message = "there is no " + message.partition(": ")[2]
        raise Failed("%s: %s (netmaker-lite %s --help)" % (self.words, message, self.words), 2)


def make_parser(command: Command) -> Parser:
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.words = command.words
    for argument in (*command.arguments, *common(command)):
        parser.add_argument(*argument.flags, **argument.options)
    parser.set_defaults(json=False, data="", qr=False)
    return parser


def split_common(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Common flags that stand before the command, and the rest."""
    flags = {each.flags[0]: "metavar" in each.options for each in (*WHERE, JSON)}
    rest, before = list(argv), []
    while rest and rest[0].partition("=")[0] in flags:
        takes = flags[rest[0].partition("=")[0]] and "=" not in rest[0]
        before += rest[: 1 + takes]
        del rest[: 1 + takes]
    return before, rest


def find(argv: Sequence[str]) -> tuple[Command | None, list[str], str]:
    """The command, its arguments; none where help is asked for: then the noun."""
    before, rest = split_common(argv)
    asked = rest[:1] == ["help"]
    rest = rest[asked:]
    for length in (3, 2, 1):
        command = BY_WORDS.get(" ".join(rest[:length])) if len(rest) >= length else None
        if command:
            return command, [*before, *rest[length:], *HELP[:asked]], ""
    noun = next((" ".join(rest[:length]) for length in (2, 1) if " ".join(rest[:length]) in NOUNS), "")
    if asked or set(rest) & set(HELP):
        return None, [], noun
    if rest == ["--version"]:
        return BY_WORDS["version"], [], ""
    raise Failed(no_such(noun, rest[len(noun.split()) :]), 2)


def no_such(noun: str, rest: Sequence[str]) -> str:
    """What may stand where a command's word is missing or unknown."""
    depth = len(noun.split())
    under = [command.words.split() for command in SHOWN]
    possible = ", ".join(dict.fromkeys(words[depth] for words in under if words[:depth] == noun.split()))
    program = " ".join(filter(None, ("netmaker-lite", noun)))
    if not rest:
        return "a command is required after %s: %s (%s --help)" % (program, possible, program)
    return "there is no command %s %s: there is %s (%s --help)" % (program, rest[0], possible, program)


def read_pairs(words: Iterable[str], settings: Sequence[Setting]) -> dict[str, tuple[str, Any]]:
    """KEY=VALUE words: {field: (the key as typed, the value)}."""
    known = {name: each for each in settings for name in (each.short, each.field)}
    found: dict[str, tuple[str, Any]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        setting = known.get(name.lower())
        if setting is None:
            raise Failed("%r cannot be set: KEY=VALUE with one of %s" % (word, ", ".join(each.short for each in settings)), 2)
        if not equals:
            raise Failed("write %s=VALUE" % name, 2)
        found[setting.field] = (name, [each for each in value.split(",") if each] if setting.field in LISTS else value)
    for setting in settings:
        if setting.along and setting.field in found and not {setting.along, "isstatic"} & found.keys():
            name, value = found[setting.field]
            found[setting.along] = (name, "yes" if value else "no")
    return found


def members(command: Command, args: Args) -> dict[str, tuple[str, Any]]:
    """What goes into the body: {field: (as the user knows it, the value)}."""
    given = [(each, getattr(args, each.dest)) for each in command.arguments if each.field]
    found = {each.field: (each.spelled, value) for each, value in given if value not in (None, "", False)}
    if command.settings:
        found.update(read_pairs(args.fields, command.settings))
    return {**found, **{field: (field, value) for field, value in command.fixed.items()}}


def takes_body(command: Command) -> bool:
    return bool(command.asks or command.fixed or command.settings or any(each.field for each in command.arguments))


def fill(template: str, args: Args) -> str:
    """A path with the arguments in it, each as one segment."""

    def segment(found: re.Match[str]) -> str:
        value = str(getattr(args, found[1]))
        if value in ("", ".", "..") or "/" in value or not value.isprintable():
            raise Failed("%r is no name of anything here: use one that `list` shows" % value, 2)
        return quote(value, safe="")

    return re.sub(r"\{(\w+)\}", segment, template)


def spelled_out(sentence: str, names: Mapping[str, tuple[str, Any]]) -> str:
    """A refusal that names a member of the body first: with the flag or word that the user gave for it."""
    found = re.match(r"(\w+)(?=:| takes )", sentence)
    return names[found[1]][0] + sentence[found.end() :] if found and found[1] in names else sentence


# --------------------------------------------------------------------------------------------------
# COMPLETION
# --------------------------------------------------------------------------------------------------

# Where the names of a kind come from, and the member that is the name; {0} is the network or user on the line.
NAMES = {
    "network": ("/api/networks", "netid"),
    "key": ("/api/networks/{0}/keys", "name"),
    "node": ("/api/nodes/{0}", "name"),
    "client": ("/api/extclients/{0}", "clientid"),
    "dns": ("/api/dns/adm/{0}/custom", "name"),
    "user": ("/api/users", "username"),
    "token": ("/api/users/{0}/tokens", "name"),
}

BASH = r"""# bash completion of netmaker-lite, for ~/.bashrc: eval "$(netmaker-lite completion bash)"
# Names of networks, nodes and the like come from the server that the line (or NETMAKER_DATA, NETMAKER_API) names.
# shellcheck disable=SC2207 # no name has blanks in it

_netmaker_lite_next() { # WORDS: the words that may follow them
    case $1 in
%(next)s
    *) return 1 ;;
    esac
}

_netmaker_lite_command() { # WORDS: sets flags (with what their values are), places and pairs
    pairs=
    case $1 in
%(commands)s
    *) return 1 ;;
    esac
}

_netmaker_lite_values() { # KIND: what may stand here
    local fixed=${1#*=}
    [[ $1 == *=* ]] && COMPREPLY+=($(compgen -W "${fixed//,/ }" -- "$cur"))
    case ${1%%%%=*} in
    '' | -) ;;
    file) compopt -o filenames && COMPREPLY+=($(compgen -f -- "$cur")) ;;
    dir) compopt -o filenames && COMPREPLY+=($(compgen -d -- "$cur")) ;;
    pairs) compopt -o nospace && COMPREPLY+=($(compgen -W "$pairs" -- "$cur")) ;;
    *) COMPREPLY+=($(compgen -W "$("$program" names "${1%%%%=*}" "${given[0]}" "${where[@]}" 2>/dev/null)" -- "$cur")) ;;
    esac
}

_netmaker_lite() {
    local IFS=$' \t\n' program=$1 line=${COMP_LINE:0:COMP_POINT} cur command flags places pairs flag kind word i
    local -a words where=() given=() kinds
    COMPREPLY=()
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    cur=${words[${#words[@]} - 1]}
    words=("${words[@]:1:${#words[@]} - 2}")
    for i in 3 2 1; do
        command=${words[*]:0:i}
        [[ ${#words[@]} -ge $i ]] && _netmaker_lite_command "$command" && break
        command=
    done
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "$(_netmaker_lite_next "${words[*]}")" -- "$cur"))
        return
    fi
    words=("${words[@]:i}")
    for ((i = 0; i < ${#words[@]}; i++)); do
        word=${words[i]} kind=
        for flag in $flags; do
            [[ ${flag%%%%:*} == "$word" && $flag == *:* ]] && kind=${flag#*:}
        done
        case $word in --data | --api | --token-file | --insecure) where+=("$word" ${kind:+"${words[i + 1]}"}) ;; esac
        if [[ -n $kind ]]; then
            if ((i + 1 == ${#words[@]})); then
                _netmaker_lite_values "$kind"
                return
            fi
            i=$((i + 1))
        elif [[ $word != -* ]]; then
            given+=("$word")
        fi
    done
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$(for flag in $flags; do echo "${flag%%%%:*}"; done)" -- "$cur"))
        return
    fi
    read -ra kinds <<<"$places"
    i=${#given[@]}
    ((i < ${#kinds[@]})) || i=$((${#kinds[@]} - 1))
    ((i < 0)) || kind=${kinds[i]}
    [[ ${#given[@]} -lt ${#kinds[@]} || $kind == *+ ]] && _netmaker_lite_values "${kind%%+}"
    return 0
}

complete -F _netmaker_lite netmaker-lite netmaker-admin
"""

ASH = r"""# BusyBox ash completes names of files only, and lets no script add to that. The next best thing, for ~/.profile:
# eval "$(netmaker-lite completion ash)"; it works in every POSIX shell that has `local`.
#   nml n l home      the same as netmaker-lite node list home, if no other command begins with n; else what could be meant
#   nml node          the commands of node; nml alone: all of them
nml() {
	local word all one found said line=netmaker-lite words=''
	while :; do
		case $words in
%(next)s
		*) break ;;
		esac
		word=${1-} found='' said=''
		for one in $all; do
			case $one in
			"$word") found=$one said=$one && break ;;
			"$word"*) found=$one said="$said $one" ;;
			esac
		done
		case $said in
		'' | ' '*' '*)
			echo "$line:${said:- $all}" >&2
			return 2
			;;
		esac
		words="${words:+$words }$found" line="$line $found"
		shift
	done
	# shellcheck disable=SC2086 # the command's words
	netmaker-lite $words "$@"
}
"""


def following() -> dict[str, list[str]]:
    """Words to those that may follow: {"": [serve, …], "network": [add, …], …}."""
    found: dict[str, list[str]] = {}
    for command in SHOWN:
        words = command.words.split()
        for depth, word in enumerate(words):
            after = found.setdefault(" ".join(words[:depth]), [])
            if word not in after:
                after.append(word)
    return found


def bash_case(command: Command) -> str:
    """One command for the script: its flags, each with the kind of its value, and the kinds of its places."""
    arguments = [*command.arguments, *common(command)]
    flags = [each.flags[0] + (":" + each.kind if "metavar" in each.options else "") for each in arguments if each.is_flag]
    places = [each.kind + ("+" if each.options.get("nargs") in ("+", "*") else "") for each in arguments if not each.is_flag]
    pairs = " ".join(each.short + "=" for each in command.settings)
    parts = ["flags='%s --help'" % " ".join(flags), "places='%s'" % " ".join(places), "pairs='%s'" % pairs if pairs else ""]
    return "    '%s') %s ;;" % (command.words, " ".join(filter(None, parts)))


def completion_script(shell: str) -> str:
    if shell == "bash":
        words = ["    '%s') echo '%s' ;;" % (before, " ".join(after)) for before, after in following().items()]
        return BASH % {"next": "\n".join(words), "commands": "\n".join(map(bash_case, SHOWN))}
    return ASH % {"next": "\n".join("\t\t'%s') all='%s' ;;" % (b, " ".join(after)) for b, after in following().items())}


# --------------------------------------------------------------------------------------------------
# CLI
# --------------------------------------------------------------------------------------------------


def connect(args: Args, environment: Mapping[str, str], local: Local | None) -> Server:
    """The server that the calls go to: --api, else --data, else NETMAKER_API, else this host's."""
    if args.api and args.data:
        raise Failed("--data names a folder of this host, --api a server elsewhere: give one of them", 2)
    url = args.api or ("" if args.data else environment.get("NETMAKER_API", ""))
    if url:
        return Remote(check_url(url, args.insecure), read_token(args.token_file, environment))
    if args.token_file or args.insecure:
        raise Failed("--token-file and --insecure go with --api URL: without it no token is used", 2)
    if local is None:
        raise Failed("this program has no server in it: name one with --api URL or NETMAKER_API", 2)
    return local.open(args)


def ask_password(user: str) -> str:
    """A password from the terminal, twice; from standard input where that is none."""
    if not (sys.stdin and sys.stdin.isatty()):  # None: it is closed
        password = sys.stdin.readline().rstrip("\r\n") if sys.stdin else ""
        if not password:
            raise Failed("there is no password on standard input: give it as one line, or run this in a terminal", 2)
        return password
    password = getpass.getpass("Password for %s: " % user)
    if password != getpass.getpass("The same again: "):
        raise Failed("the two passwords differ, so nothing was changed: try again")
    return password


def answered(server: Server, call: str, body: Any) -> Answer:
    method, _, path = call.partition(" ")
    return server.call(method, path, body)


def run_rest(command: Command, args: Args, server: Server) -> Printed:
    """The command's one call."""
    names = members(command, args)
    calls = command.rest.split(" | ")
    call = fill(calls[-1 if is_off(args) or (args.qr and not args.json) else 0], args)
    if args.qr:
        need_segno()  # before anything is made that is shown once
    body: Any = {field: value for field, (_, value) in names.items()}
    if command.asks:
        body["password"] = ask_password(args.user)
    if call.startswith("GET "):
        call, body = call + ("?" + urlencode(body) if body else ""), None
    elif call.startswith("DELETE ") or not takes_body(command):
        body = None
    answer = answered(server, call, body)
    if answer.status >= 400:
        raise Failed(spelled_out(refusal(answer), names), 2 if answer.status == 400 else 1)
    try:
        return Printed(answer.value, () if args.json else command.show(answer, args))
    except (AttributeError, KeyError, TypeError) as odd:
        raise Failed("done, but the server's answer lacks %s: --json prints it as it is" % odd) from odd


def over_rest(command: Command, args: Args, environment: Mapping[str, str], local: Local | None) -> Printed:
    server = connect(args, environment, local)
    try:
        return run_rest(command, args, server)
    finally:
        server.close()


def names_of(args: Args, environment: Mapping[str, str], local: Local | None) -> Printed:
    """Names of a kind, for the completion: none where there are none to be had."""
    path, member = NAMES.get(args.what, ("", ""))
    server = connect(args, environment, local)
    try:
        answer = answered(server, "GET " + path.format(quote(args.within, safe="")), None)
    finally:
        server.close()
    listed = answer.value if isinstance(answer.value, list) else []
    return Printed(None, [str(each[member]) for each in listed])


def run_command(command: Command, args: Args, environment: Mapping[str, str], local: Local | None) -> Printed:
    if command.rest:
        return over_rest(command, args, environment, local)
    if command.words == "version":
        return Printed({"version": __version__}, ["netmaker-lite " + __version__])
    if command.words == "completion":
        return Printed(None, completion_script(args.shell).splitlines())
    if command.words == "names":
        return names_of(args, environment, local)
    if local is None:
        raise Failed("%s works on the server's host alone: run it there" % command.words, 2)
    return local.commands[command.words](args)


def show(printed: Printed, as_json: bool) -> None:
    lines = [json.dumps(printed.value, indent=2)] if as_json and printed.value is not None else printed.lines
    try:
        if sys.stdout:  # None: it is closed
            sys.stdout.write("".join(line + "\n" for line in lines))
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise Failed("done, but its output cannot be written: %s" % problem.strerror) from problem


def run(argv: Sequence[str], environment: Mapping[str, str], local: Local | None) -> int:
    command, rest, noun = find(argv)
    if command is None or set(rest) & set(HELP):
        settings = local.settings if local else ()
        show(Printed(None, [help_of(command, settings) if command else overview(noun)]), False)
        return 0
    args = make_parser(command).parse_intermixed_args(rest)
    args.command = command
    printed = run_command(command, args, environment, local)
    show(printed, args.json)
    return printed.status


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ, local: Local | None = None) -> int:
    """The command line: the exit status. `local`: what there is on the server's own host."""
    try:
        return run(sys.argv[1:] if argv is None else argv, environment, local)
    except Failed as problem:
        sys.stderr.write("netmaker-lite: %s\n" % printable(str(problem)))
        return problem.status
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (KeyboardInterrupt, EOFError):
        sys.stderr.write("\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
