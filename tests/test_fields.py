# SPDX-License-Identifier: Apache-2.0
"""What goes through the border: shown objects come back unchanged, and nothing odd gets further than a sentence."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from restkit import PASSWORD, Rest, World, rows

import netmaker_core
import netmaker_lite as server

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
more = settings(few, max_examples=400)


def objects(world: World) -> Iterator[tuple[str, Any]]:
    """(path, object) of everything that has a GET and a PUT under one path."""
    fill = {"n": "default", "node": world.node.node, "u": "carol"}
    puts = {route.path for route in server.ROUTES if route.method == "PUT"}
    for route in server.ROUTES:
        if route.method == "GET" and route.path in puts:
            path = route.path
            for name, value in fill.items():
                path = path.replace("<%s>" % name, value)
            said = world.admin.call("GET", path)
            if said.status == 200:
                yield path, {name: value for name, value in said.value.items() if name not in ("seenby", "relayed")}


# ---- shown and sent back


def in_other_words(value: Any) -> st.SearchStrategy[Any]:
    """The same value as other clients write it."""
    forms = [value]
    if isinstance(value, bool):
        return st.just(value)
    if isinstance(value, (int, float)):
        forms += [str(value), float(value)]
    if value in ("yes", "no"):
        forms += [value == "yes"]
    if isinstance(value, list):
        forms += [",".join(value)]
    return st.sampled_from(forms)


def test_what_is_shown_can_be_sent_back_and_changes_nothing(world: World) -> None:
    """User interfaces echo whole objects. The audit log has no line of that, and no node hears of it."""
    core = world.home.core
    netmaker_core.set_node(
        core, world.home.node(world.node), {"ips": "192.168.7.0/24", "static": "203.0.113.7", "keepalive": 0, "expires": 1 << 33}
    )
    netmaker_core.set_network(core, "default", {"range6": "fd00:20::/64", "local_range": "192.168.1.0/24", "silent": 86400})
    found = list(objects(world))
    assert len(found) >= 3
    before = rows(world.home)

    @few
    @given(st.data())
    def echo(data: st.DataObject) -> None:
        for path, shown in found:
            names = data.draw(st.sets(st.sampled_from(sorted(shown))))
            body = {name: data.draw(in_other_words(shown[name])) for name in names}
            said = world.admin.call("PUT", path, body)
            assert (said.status, said.value) == (200, shown), (path, body)

    echo()
    for path, shown in found:
        for body in (shown, {name.upper(): value for name, value in shown.items()}, dict.fromkeys(shown), {}):
            said = world.admin.call("PUT", path, body)
            assert (said.status, said.value) == (200, shown), (path, said)
    assert rows(world.home) == before


FINE: dict[str, st.SearchStrategy[Any]] = {
    "displayname": st.from_regex(r"[A-Za-z0-9_./;% ^#()!@$*-]{1,20}", fullmatch=True),
    "localrange": st.ip_addresses(v=4).map(lambda each: "%s/32" % each) | st.just(""),
    "defaultinterface": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", fullmatch=True),
    "defaultlistenport": st.integers(1024, 65535), "defaultkeepalive": st.integers(0, 1000), "defaultmtu": st.integers(576, 9200),
    "nodelimit": st.integers(100, 1 << 53), "checkininterval": st.integers(2, 100000),
    "autoremove": st.just(0) | st.integers(3600, 1 << 32), "listenport": st.integers(1024, 65535),
    "persistentkeepalive": st.integers(0, 1000), "mtu": st.integers(576, 9200), "expdatetime": st.integers(1 << 33, 1 << 40),
    "name": st.from_regex("[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True), "isadmin": st.booleans(),
}  # fmt: skip


def test_what_is_taken_is_shown(world: World) -> None:
    """Every field of its own range, as number or text: GET says what PUT said."""
    table = {"/api/networks/default": server.NETWORK_FIELDS, "/api/nodes/default/" + world.node.node: server.NODE_FIELDS}
    flags = (
        "isdualstack",
        "allowmanualsignup",
        "islocal",
        "defaultudpholepunch",
        "dnson",
        "roaming",
        "ipforwarding",
        "udpholepunch",
    )

    @few
    @given(st.data())
    def put(data: st.DataObject) -> None:
        for path, fields in table.items():
            can = [field.name for field in fields if field.check and (field.name in FINE or field.name in flags)]
            name = data.draw(st.sampled_from(sorted(set(can) - {"listenport"})))
            value = data.draw(FINE.get(name, st.sampled_from(["yes", "no"])))
            said = world.admin.call("PUT", path, {name: data.draw(in_other_words(value))})
            assert said.status == 200 and said.value[name] == value, (name, value, said)
            once = {"seenby": {}, "relayed": {}}
            assert {**world.admin.get(path), **once} == {**said.value, **once}

    put()


# ---- wrong

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [
            10**400,
            -1,
            1 << 63,
            1 << 64,
            "\0",
            "\ud800",
            "²",
            "٣",
            "1e3",
            "0x10",
            " 7 ",
            "+5",
            "1_0",
            "9" * 19,
            "é" * 5000,
            "x" * 4097,
        ]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def refused(said: Any) -> None:
    """A sentence in JSON."""
    assert 400 <= said.status < 500, said
    assert said.headers["Content-Type"] == "application/json"
    assert said.value["Code"] == said.status and said.sentence and "Traceback" not in said.sentence


def test_junk_in_any_member_is_bad_input_or_a_fine_value(world: World) -> None:
    """Whatever comes, no 5xx; and what was refused changed nothing."""
    fill = {"n": "default", "node": world.node.node, "u": "carol", "name": "front"}
    takers = [route for route in server.ROUTES if route.takes and not route.path.endswith(("authenticate", "createadmin"))]

    @more
    @given(st.data())
    def send(data: st.DataObject) -> None:
        route = data.draw(st.sampled_from(takers))
        path = route.path
        for name, value in fill.items():
            path = path.replace("<%s>" % name, value)
        names = data.draw(st.sets(st.sampled_from([field.name for field in route.takes]), min_size=1, max_size=3))
        body = {name: data.draw(junk, label=name) for name in names}
        before = rows(world.home)
        said = world.admin.call(route.method, path, body)
        if said.status != 200:
            refused(said)
            assert rows(world.home) == before, (path, body, said)

    send()
    for route in (each for each in server.ROUTES if each.path.endswith(("authenticate", "createadmin"))):
        for value in ("\ud800", ["\ud800"], ["root", "x"], "\0", 10**30, {"a": 1}, [[]], True, 1.5, "x" * 5000, ["x" * 3000] * 2):
            for name in ("username", "password"):
                body = {"username": "root", "password": PASSWORD, name: value}
                refused(world.nobody.call(route.method, route.path.replace("<n>", "default"), body))


BODIES = {
    "no JSON": b"netid=x&addressrange=10.9.9.0/24",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "a number": b"1",
    "deep": b'{"netid":' + b"[" * 10000 + b"]" * 10000 + b"}",
    "deep objects": b'{"a":' * 10000 + b"1" + b"}" * 10000,
    "cut": b'{"netid": "x',
    "more behind": b'{"netid":"x"} {}',
    "NaN": b'{"nodelimit": NaN}',
    "infinite": b'{"nodelimit": -Infinity}',
    "too large a number": b'{"nodelimit": 1e999}',
    "a long number": b'{"nodelimit": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"netid":"x"}'.encode("utf-16"),
    "no UTF-8": b'{"netid": "\xff\xfe"}',
    "a lone surrogate": b'{"netid": "\\ud800"}',
    "a NUL": b'{"netid": "x\\u0000y"}',
    "a member twice": b'{"netid": "evil", "netid": "evil2", "addressrange": "10.9.9.0/24"}',
    "a raw NUL": b'{"netid": "a\0b"}',
    "in other letters": b'{"netid": "evil", "NetID": "evil2", "addressrange": "10.9.9.0/24"}',
    "unknown member": b'{"netdi": "evil"}',
    "odd member": b'{"\\ud800\\u0000": 1}',
    "many members": b"{" + b",".join(b'"a%d":1' % n for n in range(20000)) + b"}",
    "a mark": b'\xef\xbb\xbf{"netid": "evil"}',
    "prototype": b'{"__proto__": {"isadmin": true}}',
}


@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x"]
)
def test_odd_bodies_are_refused(world: World, kind: str) -> None:
    before = rows(world.home)
    for body in BODIES.values():
        for method, path in (
            ("POST", "/api/networks"),
            ("PUT", "/api/networks/default"),
            ("POST", "/api/users/adm/authenticate"),
        ):
            refused(world.admin.call(method, path, body, Content_Type=kind))
    assert rows(world.home) == before


def test_strangers_bodies_are_smaller(world: World) -> None:
    padding = b" " * (server.MAX_UNPROVEN + 1)
    said = world.nobody.call("POST", "/api/users/adm/authenticate", b"{}" + padding)
    refused(said)
    assert said.status == 413
    said = world.nobody.call("POST", "/api/networks", b"{}" + b" " * (1 << 19))
    assert said.status == 401
    assert world.admin.call("PUT", "/api/networks/default", b"{}" + b" " * (1 << 19)).status == 200


# ---- the web server's own refusals, and odd requests


def raw(world: World, request: bytes) -> tuple[int, bytes]:
    """Status and body."""
    with socket.create_connection(("127.0.0.1", world.home.port), 10) as sock:
        sock.settimeout(10)
        answer = b""
        try:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            while True:
                piece = sock.recv(65536)
                if not piece:
                    break
                answer += piece
        except OSError:  # it closed while we were still sending
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]) if head else 0, body


def test_odd_requests_are_refused_in_json(world: World) -> None:
    bearer = b"Authorization: Bearer " + world.admin.bearer.encode()
    post = b"POST /api/networks HTTP/1.1\r\nHost: x\r\n" + bearer + b"\r\nConnection: close\r\n"
    new = b'{"netid":"evil","addressrange":"10.9.9.0/24"}'
    odd = {
        "chunk of no size": post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        "other encoding": post + b"Transfer-Encoding: gzip\r\n\r\n" + new,
        "length and chunks": post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "negative length": post + b"Content-Length: -5\r\n\r\n" + new,
        "length in words": post + b"Content-Length: five\r\n\r\n" + new,
        "two lengths": post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + new,
        "length of 2 GiB": post + b"Content-Length: 2147483648\r\n\r\n" + new,
        "endless header": b"GET /api/health HTTP/1.1\r\nX: " + b"x" * 40000 + b"\r\n\r\n",
        "endless path": b"GET /" + b"x" * 40000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "broken header": b"GET /api/health HTTP/1.1\r\nHost x\r\n\r\n",
        "folded header": b"GET /api/health HTTP/1.1\r\nHost: x\r\n \r\nX : y\r\n\r\n",
        "2 MiB of chunks": post
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 32
        + b"0\r\n\r\n",
        "2 MiB": post + b'Content-Length: 2097152\r\n\r\n{"netid": "' + b"x" * (2 << 20),
        "no version": b"GARBAGE\r\n\r\n",
        "bad percent": b"GET /api/nodes/%ff%fe HTTP/1.1\r\nHost: x\r\n" + bearer + b"\r\nConnection: close\r\n\r\n",
    }
    before = rows(world.home)
    for name, request in odd.items():
        status, body = raw(world, request)
        if status == 0 and ("iB" in name or "endless" in name):
            continue
        assert 400 <= status < 500 or status in (501, 505), (name, status, body)
        said = json.loads(body)
        assert said["Code"] == status and said["Message"], (name, body)
    assert rows(world.home) == before


def test_chunks_are_a_body_like_any(world: World) -> None:
    new = b'{"netid":"chunked","addressrange":"10.9.9.0/24"}'
    head = b"POST /api/networks HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + world.admin.bearer.encode()
    status, body = raw(world, head + b"\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(new), new))
    assert status == 200 and json.loads(body)["netid"] == "chunked"


PATHS = (
    "/api/networks/%2e%2e",
    "/api/networks/%2e%2e%2fusers",
    "/api/networks/../users",
    "/api/networks//",
    "//api/networks",
    "/api/networks/",
    "/api/networks/%00",
    "/api/networks/default%00",
    "/api/networks/default%0d%0aX-Evil:%20yes",
    "/api/networks/" + "x" * 8000,
    "/api/networks/%F0%9F%92%A9",
    "/api/networks/%C3%28",
    "/api/networks/%ED%A0%80",
    "/api/networks/default%2fkeys",
    "/api/networks/*",
    "/meshclient/files/../netmaker_lite.py",
    "/meshclient/files/%2e%2e/netmaker_lite.py",
    "/meshclient/files/%2e%2e%2fserver.key",
    "/meshclient/files/netclient_lite.py/../../etc/passwd",
    "/meshclient/files/netclient_lite.py%00.txt",
    "/../../../../etc/passwd",
    "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/api/nodes/default/..%2f..%2fusers%2froot",
    "/server.key",
    "/.git/config",
    "/netmaker.db",
    "/api/nodes/default/%2A",
    "/api/users/root/",
    "/API/networks",
    "/api/networks;x=1",
    "/api/users/r%6fot%20",
    "/?/../etc/passwd",
)


SAME = ("/api/networks/default%2fkeys", "//api/networks")


def test_paths_lead_nowhere_else(world: World) -> None:
    """For somebody without the right, and for an administrator: no file, no other object, no header of theirs."""
    for path in PATHS:
        for rest in (world.nobody, world.carol, world.admin):
            said = rest.call("GET", path)
            if said.status == 200:  # what is the same path
                assert path in SAME, path
                assert (rest is not world.nobody and b'"other"' not in said.body) or rest is world.admin, path
                continue
            assert 400 <= said.status < 500, (path, said)
            assert said.value["Code"] == said.status and "X-Evil" not in said.headers
            assert b"root:x" not in said.body and b"PRIVATE" not in said.body and b"import" not in said.body


def test_other_methods(world: World) -> None:
    """HEAD is GET without the body, with the same rights; OPTIONS tells nothing; the rest is 405 as JSON."""
    for route in server.ROUTES:
        if route.method == "GET" and "<" not in route.path:
            got, head = (world.admin.call(method, route.path) for method in ("GET", "HEAD"))
            assert head.status == got.status and head.body == b"", route
            if route.role not in ("anyone", "agent"):
                assert world.nobody.call("HEAD", route.path).status == 401
        said = world.nobody.call("OPTIONS", route.path.replace("<", "").replace(">", ""))
        assert said.status == 204 and said.body == b"" and "Access-Control-Allow-Origin" not in said.headers
    before = rows(world.home)
    for method in ("PATCH", "TRACE", "CONNECT", "PROPFIND", "X"):
        said = world.admin.call(method, "/api/networks", {})
        assert said.status == 405 and said.value["Code"] == 405, (method, said)
    assert world.admin.call("POST", "/api/networks/default", {"displayname": "x"}, X_HTTP_Method_Override="PUT").status == 405
    assert rows(world.home) == before


@pytest.mark.parametrize("name", ["page", "per_page", "since"])
def test_queries_are_bounded(world: World, name: str) -> None:
    lists = [
        route.path for route in server.ROUTES if route.method == "GET" and route.gives.startswith("[") and "<" not in route.path
    ]
    for path in lists:
        for value in (
            "-1",
            "²",
            "٣",
            "1e9",
            "%ff",
            "%00",
            "9" * 30,
            "0x1",
            "1.5",
            "+1",
            "%201",
            "nan",
            "1d;x",
            "x" * 3000,
            "24h24h",
            "0" * 25,
        ):
            said = world.admin.call(
                "GET", "%s?%s=%s" % (path, name, value.encode().decode("latin-1") if value.isascii() else "%C2%B2")
            )
            if name == "since" and path != "/api/audit" and value != "%ff":
                assert said.status == 200
            else:
                refused(said)
        if name != "since":
            for value in ("0", "1001" if name == "per_page" else "0", ""):
                refused(world.admin.call("GET", "%s?%s=%s" % (path, name, value)))
    assert world.admin.call("GET", "/api/networks?page=2147483648&per_page=1000").value == []
    assert world.admin.call("GET", "/api/audit?since=999999w&since=1h").status == 200
    assert world.admin.call("GET", "/api/nodes?per_page=9999").value["Message"].startswith("per_page takes")


def test_pages_are_the_whole_list(world: World) -> None:
    for number in range(23):
        netmaker_core.add_key(world.home.core, "default", "key-%d" % number)
    for path in ("/api/networks/default/keys", "/api/audit", "/api/nodes", "/api/users"):
        said = world.admin.call("GET", path)
        total = int(said.headers["X-Total-Count"])
        pages = [world.admin.call("GET", "%s?page=%d&per_page=5" % (path, number)) for number in range(1, total // 5 + 3)]
        assert [row for page in pages for row in page.value] == said.value and len(said.value) == total
        assert {page.headers["X-Total-Count"] for page in pages} == {str(total)}


def test_the_log_has_no_escapes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """What strangers send comes into no terminal of an administrator's."""
    for text in ("%1b[2J", "%0aERROR:%20forged", "%e2%80%ae"):
        world.admin.call("GET", "/api/nodes/default/x" + text)
        world.nobody.call("POST", "/api/users/adm/authenticate", {"username": "root\n\x1b[2J" + text, "password": "x"})
        world.nobody.call("GET", "/x" + text, None, User_Agent="\x1b[2J")
    assert not [record for record in caplog.records if any(ord(char) < 32 for char in record.getMessage())]


@pytest.mark.parametrize("backend", ["wsgiref", "gevent", "waitress"])
def test_other_web_servers_refuse_as_well(tmp_path: Path, backend: str) -> None:
    """`serve` as it is started: a body that cannot be measured is not taken for an empty one."""
    if backend == "gevent":
        pytest.importorskip("gevent")
    with server.listener("127.0.0.1", 0) as sock:
        port = int(sock.getsockname()[1])
    values = {"PATH": "/usr/bin:/bin", "NETMAKER_DATA": str(tmp_path), "API_PORT": str(port)}
    command = [sys.executable, server.__file__, "serve", "--host", "127.0.0.1"]
    with subprocess.Popen(
        command, env={**values, "SERVER_BACKEND": backend}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout
            while "setup code" not in process.stdout.readline():
                assert process.poll() is None
            home: Any = type("Home", (), {"port": port})
            rest = Rest(home)
            asked = {"username": "root", "password": PASSWORD}
            assert rest.call("POST", "/api/users/adm/createadmin", asked).status == 200
            token = rest.call("POST", "/api/users/adm/authenticate", asked).value["Response"]["AuthToken"]
            admin: Any = type("World", (), {"home": home})
            head = (
                b"POST /api/networks HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
                + token.encode()
                + b"\r\n"
            )
            new = b'{"netid":"new","addressrange":"10.9.9.0/24"}'
            chunks = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(new), new)
            status, body = raw(admin, chunks)
            assert status == (200 if backend == "waitress" else 400) and (status == 200 or b"Content-Length" in body)
            for request, wanted in ((b"Content-Length: 2147483648\r\n\r\n", 413), (b"Content-Length: -5\r\n\r\n", None)):
                status, body = raw(admin, head + request)
                assert 400 <= status < 500 and status in (wanted or status, 0), (request, status, body)
            assert rest.call("GET", "/api/users").status == 401
            assert Rest(home, token).call("GET", "/nothing").value["Code"] == 404
        finally:
            process.terminate()
            assert process.stdout and "Traceback" not in process.stdout.read()
