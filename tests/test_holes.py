# SPDX-License-Identifier: Apache-2.0
"""Each hole that the original had, and some more: a test that tries to break in."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest
from restkit import MASTER, PASSWORD, Rest, World, api_token, body_of, make_user, path_of, rows
from serverkit import Client, Clock, Server, make_core

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

FIRST = {"username": "eve", "password": PASSWORD}
CREATE, SIGN_IN = "/api/users/adm/createadmin", "/api/users/adm/authenticate"


@pytest.fixture
def bare(tmp_path: Path, clock: Clock) -> Iterator[Server]:
    """A server at its first start that believes no proxy."""
    running = Server(str(tmp_path / "bare"), clock, TRUSTED_PROXIES="")
    yield running
    running.stop()


def sign_in(home: Server, name: str = "root", password: str = PASSWORD, source: str = "198.51.100.200") -> Any:
    return Rest(home).call("POST", SIGN_IN, {"username": name, "password": password}, X_Forwarded_For=source)


# ---- the first administrator


def test_the_first_administrator_is_made_once(bare: Server) -> None:
    """createadmin was repeatable by anyone."""
    stranger = Rest(bare)
    assert stranger.get("/api/users/adm/hasadmin") is False
    assert stranger.call("POST", CREATE, FIRST).status == 200
    for body in (FIRST, {**FIRST, "username": "eve2"}, {**FIRST, "username": "eve3", "setupcode": "x"}, {}):
        assert stranger.call("POST", CREATE, body).status in (400, 409)
    assert [row["name"] for row in server.users(bare.core)] == ["eve"] and stranger.get("/api/users/adm/hasadmin") is True


def test_of_16_at_once_one_becomes_administrator(bare: Server) -> None:
    code = server.new_setup_code(bare.core)
    with ThreadPoolExecutor(16) as pool:
        asked = [{"username": "eve%d" % number, "password": PASSWORD, "setupcode": code} for number in range(16)]
        said = list(pool.map(lambda body: Rest(bare).call("POST", CREATE, body).status, asked))
    assert said.count(200) == 1 and set(said) <= {200, 409, 429}
    assert len(server.users(bare.core)) == 1 and bare.core.store.meta("setup") == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"X_Forwarded_For": "127.0.0.1"},
        {"X_Forwarded_Proto": "https"},
        {"X_Real_IP": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "attacker.example"},
        {"Host": "attacker.example:8081"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Host": "203.0.113.10:8081"},
        {"Host": ""},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
def test_no_first_administrator_through_a_proxy_or_a_page(bare: Server, headers: dict[str, str]) -> None:
    """Both come from loopback: a reverse proxy's clients, and pages in a browser on the server's host (DNS rebinding, forms)."""
    said = Rest(bare).call("POST", CREATE, FIRST, **headers)
    assert said.status == 403 and "setup code" in said.sentence
    assert not server.users(bare.core)


def test_no_first_administrator_through_nginx_as_it_comes(bare: Server) -> None:
    """It speaks HTTP/1.0 under our own name and says nothing of its client."""
    body = json.dumps(FIRST).encode()
    head = b"POST %s HTTP/1.0\r\nHost: 127.0.0.1:%d\r\nContent-Length: %d\r\n\r\n" % (CREATE.encode(), bare.port, len(body))
    assert bare.raw(head + body).startswith(b"HTTP/1.0 403")


def test_the_setup_code_is_not_guessed(bare: Server) -> None:
    code, far = server.new_setup_code(bare.core), {"Host": "203.0.113.10"}
    for guess in ("", " ", "0000-0000-0000-0000-0000", code[:-1], code + "0", bare.core.store.meta("setup"), *"abcde"):
        last = Rest(bare).call("POST", CREATE, {**FIRST, "setupcode": guess}, **far).status
        assert last in (403, 429)
    assert last == 429 and not server.users(bare.core)
    assert Rest(bare).call("POST", CREATE, {**FIRST, "setupcode": code}, **far).status == 429


def test_a_used_setup_code_is_worth_nothing(bare: Server) -> None:
    code = server.new_setup_code(bare.core)
    far = {"Host": "203.0.113.10"}
    assert Rest(bare).call("POST", CREATE, {**FIRST, "setupcode": code}, **far).status == 200
    assert Rest(bare).call("POST", CREATE, {**FIRST, "username": "more", "setupcode": code}, **far).status == 409
    assert bare.core.store.meta("setup") == "" and server.new_setup_code(bare.core) == ""


# ---- passwords and sessions


def test_a_hash_is_no_password_and_never_told(world: World) -> None:
    home, hashed = world.home, server.need_user(world.home.core, "root")["password"]
    assert hashed.startswith("$argon2id$")
    assert sign_in(home, "root", hashed).status == 401
    for path in ("/api/users", "/api/users/root", "/api/audit", "/api/server/getconfig", "/api/server/status"):
        said = world.admin.call("GET", path)
        assert said.status == 200 and b"argon2" not in said.body and hashed.encode() not in said.body
    said = world.admin.call("PUT", "/api/users/root", {"password": PASSWORD + "!"})
    assert set(said.value) == {"username", "networks", "isadmin"}


def test_passwords_are_not_tried_for_long_from_one_place(world: World, clock: Clock) -> None:
    home = world.home
    assert [sign_in(home, password="wrong").status for _ in range(12)] == [401] * 10 + [429] * 2
    said = sign_in(home)
    assert said.status == 429 and "wait" in said.sentence  # the right one neither
    assert sign_in(home, source="198.51.100.201").status == 200  # from elsewhere
    clock.now += 31
    assert sign_in(home).status == 200


def test_many_tries_at_once_are_no_more_tries(world: World) -> None:
    with ThreadPoolExecutor(30) as pool:
        said = list(pool.map(lambda _: sign_in(world.home, password="wrong").status, range(30)))
    assert said.count(401) == 10 and said.count(429) == 20


def test_a_whole_ipv6_network_is_one_place(world: World) -> None:
    said = [sign_in(world.home, password="wrong", source="2001:db8::%x:1" % number).status for number in range(12)]
    assert said.count(401) == 10
    assert sign_in(world.home, password="wrong", source="2001:db8:0:1::1").status == 401


def test_one_name_is_not_tried_for_long_from_everywhere(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "is_password", lambda hashed, password: password == PASSWORD)  # only the counting counts
    said = [sign_in(world.home, "Root", "wrong", "198.51.%d.7" % number).status for number in range(62)]
    assert said == [401] * 60 + [429] * 2
    assert sign_in(world.home, "mallory", PASSWORD, "198.51.100.77").status == 200


def test_right_sign_ins_are_not_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "is_password", lambda hashed, password: password == PASSWORD)
    assert {sign_in(world.home).status for _ in range(70)} == {200}


def test_an_unknown_name_takes_as_much_work_as_a_wrong_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = netmaker_core.is_password
    monkeypatch.setattr(server, "is_password", lambda hashed, password: compared.append(hashed) or real(hashed, password))
    known, unknown = sign_in(world.home, "root", "wrong"), sign_in(world.home, "nobody-here", "wrong")
    assert (known.status, known.value) == (unknown.status, unknown.value)
    assert [hashed.split("$")[1:4] for hashed in compared] == [["argon2id", *compared[0].split("$")[2:4]]] * 2


def test_a_session_is_never_chosen_by_who_signs_in(world: World) -> None:
    """Fixation: neither a bearer nor a cookie of before becomes the session."""
    chosen = "nms_" + "A" * 43
    stranger = Rest(world.home, chosen)
    asked = {"username": "root", "password": PASSWORD}
    said = stranger.call("POST", SIGN_IN, asked, Cookie="session=" + chosen)
    token = said.value["Response"]["AuthToken"]
    assert said.status == 200 and token != chosen and stranger.call("GET", "/api/users").status == 401
    assert "Set-Cookie" not in said.headers
    again = stranger.call("POST", SIGN_IN, asked).value["Response"]["AuthToken"]
    assert again != token and Rest(world.home, token).call("GET", "/api/users").status == 200


def test_sign_in_names_the_way_out_only_to_who_may(world: World) -> None:
    assert world.carol.call("POST", "/api/users/adm/logout").status == 200
    assert world.carol.call("POST", "/api/users/adm/logout").status == 401
    assert world.admin.call("GET", "/api/users").status == 200


# ---- rights


def test_a_user_reads_and_changes_nobody_else(world: World) -> None:
    """CVE-2023-32078."""
    before = rows(world.home)
    for name in ("root", "Root", "carol%20", "carol%2f..%2froot", "..%2froot"):
        for method, path in (("GET", ""), ("PUT", ""), ("PUT", "/adm"), ("DELETE", ""), ("GET", "/tokens"), ("POST", "/tokens")):
            said = world.carol.call(method, "/api/users/" + name + path, {"password": "gotcha, gotcha", "name": "x"})
            assert said.status in (403, 404, 405), (name, method, path, said)
    assert rows(world.home) == before


def test_nobody_makes_himself_administrator(world: World) -> None:
    """CVE-2023-32079."""
    for more in (
        {"isadmin": True},
        {"IsAdmin": "yes"},
        {"networks": ["default", "other"]},
        {"username": "root"},
        {"admin": True},
    ):
        said = world.carol.call("PUT", "/api/users/carol", {"password": PASSWORD, **more})
        assert said.status in (200, 400)
        user = server.need_user(world.home.core, "carol")
        assert not user["admin"] and user["networks"] == "default" and user["name"] == "carol"
        world.carol = Rest(world.home, server.sign_in(world.home.core, "carol", PASSWORD)["value"])


def test_a_token_makes_none_that_may_more(world: World) -> None:
    home = world.home
    weak = {
        "read only": api_token(home, "root", "a", write=False), "limited": api_token(home, "root", "b", networks="default"),
        "user's": api_token(home, "carol", "c"), "user's, read only": api_token(home, "carol", "d", write=False),
    }  # fmt: skip
    before = rows(home)
    for name, token in weak.items():
        for user in ("root", "carol", "mallory"):
            assert token.call("POST", "/api/users/%s/tokens" % user, {"name": "stronger"}).status == 403, name
            assert token.call("PUT", "/api/users/%s" % user, {"password": PASSWORD + "!"}).status == 403, name
            assert token.call("GET", "/api/users/%s/tokens" % user).status in (403, 200 if name == "read only" else 403), name
        assert token.call("POST", "/api/users/new", {"password": PASSWORD, "isadmin": True}).status == 403
    assert rows(home) == before


@pytest.mark.parametrize("name", ["adm", "ADM", "networks", "Networks"])
def test_a_word_of_the_paths_is_no_user(world: World, name: str) -> None:
    said = world.admin.call("POST", "/api/users/" + name, {"username": name, "password": PASSWORD})
    assert said.status == 400 and "take another name" in said.sentence


def test_an_administrator_stays(world: World) -> None:
    core = world.home.core
    with ThreadPoolExecutor(2) as pool:  # both remove each other
        asked = [(world.admin, "DELETE", "/api/users/second-root", None), (world.root, "DELETE", "/api/users/root", None)]
        list(pool.map(lambda each: each[0].call(*each[1:]).status, asked))
    (left,) = (row["name"] for row in server.users(core) if row["admin"])
    rest = world.admin if left == "root" else world.root
    assert rest.call("DELETE", "/api/users/" + left).status == 409
    for path in ("", "/adm"):
        said = rest.call("PUT", "/api/users/" + left + path, {"isadmin": False})
        assert said.status == 409 and "only administrator" in said.sentence
    assert rest.get("/api/users/" + left)["isadmin"] is True


def test_a_user_sees_nothing_of_other_networks(world: World) -> None:
    """Neither in lists, nor in the log, nor in numbers, nor in sentences."""
    home = world.home
    netmaker_core.set_node(home.core, home.node(world.stranger), {"name": "strange-machine", "ips": "192.168.55.0/24"})
    netmaker_core.set_network(home.core, "other", {"display": "Secret Lab"})
    hidden = [
        b"strange-machine",
        b"Secret Lab",
        b"192.168.55",
        b"10.99.0",
        b"mallory",
        b"second-root",
        world.stranger.node.encode(),
    ]
    hidden += [b'"other"', home.node(world.stranger)["key"].encode(), b"198.51.100.9"]
    fill = {"n": "default", "node": world.node.node, "u": "carol", "node1": world.node.node, "node2": world.second.node}
    queries = ("", "?network=other", "?network=OTHER", "?since=0&network=", "?page=1&per_page=1000")
    for route in server.ROUTES:
        if route.method == "GET" and route.role in ("user", "network", "self", "admin"):
            path = route.path
            for name, value in fill.items():
                path = path.replace("<%s>" % name, value)
            for query in queries:
                said = world.carol.call("GET", path.replace("<", "").replace(">", "") + query)
                for word in hidden:
                    assert word not in said.body, (route.path, query, word, said.body)
    for network in ("other", "nothing-here"):  # whether there is such a network is not told either
        assert world.carol.call("GET", "/api/networks/" + network).sentence == "carol may not do this: an administrator can"
    for node in (world.stranger.node, "strange-machine"):
        assert world.carol.call("GET", "/api/nodes/default/" + node).status == 404
    status = world.carol.get("/api/server/status")
    assert (status["networks"], status["nodes"]) == (1, 3)
    assert {row["network"] for row in world.carol.get("/api/audit")} == {"default"}


def test_no_refusal_tells_of_other_networks(world: World) -> None:
    path = "/api/nodes/default/%s/creategateway" % world.node.node
    said = world.carol.call("POST", path, {"ranges": ["10.99.0.0/16"]})
    assert said.status == 409 and "the range of another network" in said.sentence and "other:" not in said.sentence
    assert "the range of the network other" in world.admin.call("POST", path, {"ranges": ["10.99.0.0/16"]}).sentence
    asked = [world.carol.call("POST", "/api/users/carol/tokens", {"name": n, "networks": n}) for n in ("other", "nothing-here")]
    assert [said.status for said in asked] == [404, 404]
    assert asked[0].sentence.replace("other", "nothing-here") == asked[1].sentence


def test_who_may_only_read_gets_no_key_of_a_client(world: World) -> None:
    token = api_token(world.home, "root", "reader", write=False)
    assert token.get("/api/extclients/default/phone")["privatekey"] == ""
    for form in ("file", "qr", "svg"):
        assert token.call("GET", "/api/extclients/default/phone/" + form).status == 403
    assert world.admin.call("GET", "/api/extclients/default/phone/file").status == 200


def test_what_a_key_or_token_may_stands_in_the_log(world: World) -> None:
    world.admin.good("POST", "/api/networks/default/keys", {"name": "short", "uses": 3})
    made = world.admin.good("POST", "/api/users/carol/tokens", {"name": "ci", "scope": "read", "networks": "default"})
    log = {row["action"]: row for row in reversed(world.admin.get("/api/audit"))}
    assert log["key add"]["detail"] == "uses=3 expires=never"
    assert log["token add"]["detail"] == "write=0 networks=default" and made["value"] not in str(log)


def test_nodes_are_found_in_their_own_network_only(world: World) -> None:
    """CVE-2026-29194: the path's network is allowed, the node is another's."""
    before = rows(world.home)
    for route in server.ROUTES:
        if "/<n>/<node>" in route.path:
            path = path_of(route, world).replace("/default/", "/other/")
            said = world.mallory.call(route.method, path, body_of(route, world))
            assert said.status == 404, (route, said)
    assert rows(world.home) == before


# ---- what agents might do


def test_a_nodes_credentials_are_for_itself(world: World) -> None:
    home, second = world.home, world.second
    thief = Client(home)
    thief.__dict__.update({**world.node.__dict__, "node": second.node, "sequence": 50})
    body = json.dumps({"facts": {**second.facts, "port": 4444}}).encode()
    assert home.post(agent.EXCHANGE_PATH, thief.line(body), body, thief.source)[0] == 403
    assert home.node(second)["port"] != 4444


RIGHTS: tuple[dict[str, Any], ...] = (
    {"ips": "0.0.0.0/0"}, {"allowedips": ["10.20.30.0/24"]}, {"isegressgateway": "yes"}, {"egressgatewayranges": ["0.0.0.0/0"]},
    {"isserver": "yes"}, {"state": "active"}, {"ispending": "no"}, {"network": "other"}, {"id": "0" * 16}, {"auth": "x"},
    {"postup": "touch /tmp/owned"}, {"postdown": "id"}, {"expires": None}, {"isrelay": "yes"}, {"ranges": ["10.0.0.0/8"]},
)  # fmt: skip


def test_a_node_gives_itself_no_rights(world: World) -> None:
    """The original took the node's word for every field."""
    before = rows(world.home)
    for part in ("facts", "wishes"):
        for given in RIGHTS:
            assert world.node.exchange({part: given}).status == 400, (part, given)
            assert world.pending.exchange({part: given}).status in (400, 403), (part, given)
    assert rows(world.home) == before


def test_an_access_key_is_used_as_often_as_it_says(home: Server) -> None:
    key = home.key(uses=3)
    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(lambda n: Client(home, source="198.51.100.%d" % n).try_join(key).status, range(1, 17)))
    assert said.count(200) == 3 and said.count(410) == 13
    assert len(netmaker_core.nodes(home.core, "default")) == 3


def test_no_command_text_reaches_an_agent(world: World) -> None:
    """PR#576: PostUp of the network, the node or a gateway was run as root on every machine."""
    evil = "touch /tmp/netmaker-lite-owned; $(id) `id` | sh"
    network = {"defaultpostup": evil, "defaultpostdown": evil, "displayname": "x"}
    assert world.admin.call("PUT", "/api/networks/default", network).status == 200
    assert world.admin.call("PUT", "/api/nodes/default/" + world.node.node, {"postup": evil}).status in (200, 400)
    body = {"ranges": ["192.168.60.0/24"], "interface": "eth0", "postup": evil, "postdown": evil}
    world.admin.call("POST", "/api/nodes/default/%s/creategateway" % world.node.node, body)
    for text in ("eth0; id", "$(id)", "../../etc", "-eth0", "eth0 up", "\n"):
        assert world.admin.call("PUT", "/api/networks/default", {"defaultinterface": text}).status == 400
    world.node.exchange(), world.second.exchange()
    told = json.dumps([world.node.me, world.node.peers, world.second.me, world.second.peers])
    assert "touch" not in told and "postup" not in told.lower()


def test_private_keys_are_told_once(world: World, clock: Clock) -> None:
    """CVE-2026-29196: an external client's was in every GET. Here the file has it for a quarter of an hour."""
    node = "/%s/%s" % ("default", world.node.node)
    if "/api/extclients" not in {route.path for route in server.ROUTES}:
        pytest.skip("this server makes no external clients")
    made = world.admin.good("POST", "/api/extclients" + node, {"clientid": "tablet"})
    key, path = made["privatekey"], "/api/extclients/default/tablet"
    assert len(base64.b64decode(key)) == 32 and key in made["config"]
    secret = {key.encode(), base64.b64decode(key), base64.b64decode(key).hex().encode()}
    for rest in (world.admin, world.carol, world.mallory, world.nobody):
        for route in server.ROUTES:
            if route.method == "GET":
                where = path_of(route, world).replace("/phone", "/tablet")
                if where == path + "/file":
                    continue
                assert not any(each in rest.call("GET", where).body for each in secret), where
    for rest in (world.carol, world.admin):
        assert key.encode() in rest.call("GET", path + "/file").body
    assert world.mallory.call("GET", path + "/file").status == world.mallory.call("GET", path + "/qr").status == 403
    dump = json.dumps(rows(world.home), default=str)
    assert key not in dump and base64.b64decode(key).hex() not in dump
    clock.now += 901
    for form in ("file", "qr", "svg"):
        assert key.encode() not in world.admin.call("GET", "%s/%s" % (path, form)).body
    renewed = world.admin.good("POST", path + "/renew", {})
    assert renewed["privatekey"] not in ("", key)


# ---- texts


INJECTIONS = (
    "' OR '1'='1",
    "'; DROP TABLE node; --",
    'x" OR 1=1 --',
    "default' UNION SELECT password FROM account --",
    "%",
    "_efault",
    "\\",
    "default/*",
    "d\u0435fault",
    "0x64656661756c74",
    "default\x00",
    "<script>alert(1)</script>",
    "\x1b[2J\x1b]0;owned\x07",
    "{{7*7}}",
)


def quoted(text: str) -> str:
    return "".join(chr(c) if 48 <= c < 58 or 97 <= c < 123 else "%%%02x" % c for c in text.encode())


def test_texts_are_never_sql(world: World) -> None:
    """In every part of every path and query, and in every member of every body."""
    fill = {"n": "default", "node": world.node.node, "u": "carol", "name": "front"}
    for text in INJECTIONS:
        for route in server.ROUTES:
            names = [part[1:-1] for part in route.path.split("/") if part.startswith("<")]
            for bad in names or [""]:
                path = route.path
                for name in names:
                    path = path.replace("<%s>" % name, quoted(text) if name == bad else fill.get(name, "x"))
                if route.method == "GET":
                    path += "?network=%s&since=%s&page=%s&per_page=%s" % ((quoted(text),) * 4)
                said = world.admin.call(route.method, path, {field.name: text for field in route.takes})
                assert said.status < 500, (route, path, said)
                assert b"argon2" not in said.body and b"syntax" not in said.body.lower() and b"\x1b" not in said.body
    assert len(server.users(world.home.core)) == 4 and len(netmaker_core.networks(world.home.core)) == 2
    assert all(ord(c) >= 32 for row in server.AuditLog(world.home.core)[:] for value in row.values() for c in str(value))


# ---- secrets at rest


@pytest.mark.parametrize("value", ["secretkey", "secret", "password", "changeme", "a" * 40, "short-but-odd"])
def test_no_default_and_no_simple_master_key(tmp_path: Path, value: str) -> None:
    with pytest.raises(agent.Invalid, match="too easy to guess"):
        make_core(str(tmp_path), MASTER_KEY=value)


def test_the_originals_default_secrets_open_nothing(world: World) -> None:
    for key in ("secretkey", "netmaker", "DNS_KEY", "(hidden)"):
        assert Rest(world.home, key).call("GET", "/api/networks").status == 401


def test_files_are_private_from_the_first_byte(world: World) -> None:
    os.umask(0)
    folder = Path(world.home.folder)
    world.home.core.store.copy(str(folder / "copy"))
    netmaker_core.backup(world.home.core, str(folder / "backup"), True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


# ---- browsers


def test_pages_from_elsewhere_are_let_in_by_name_only(tmp_path: Path, clock: Clock, home: Server, admin: Rest) -> None:
    open_ = Server(str(tmp_path / "cors"), clock, CORS_ALLOWED_ORIGIN="https://ui.example, https://other.example:8443")
    everyone = Server(str(tmp_path / "all"), clock, CORS_ALLOWED_ORIGIN="*")
    try:
        ui, other = "https://ui.example", "https://other.example:8443"
        bad = (
            "https://ui.example.evil.com",
            "https://evil-ui.example",
            "http://ui.example",
            "https://ui.example:444",
            "null",
            "*",
            "",
        )
        for path, method in (("/api/networks", "GET"), ("/api/health", "GET"), ("/nothing", "GET"), ("/api/networks", "OPTIONS")):
            for origin in (ui, other):
                said = Rest(open_).call(method, path, None, Origin=origin)
                assert said.headers["Access-Control-Allow-Origin"] == origin and "Origin" in said.headers["Vary"]
                assert "Access-Control-Allow-Credentials" not in said.headers
                assert "Access-Control-Allow-Origin" not in Rest(home).call(method, path, None, Origin=origin).headers
            for origin in bad:
                assert "Access-Control-Allow-Origin" not in Rest(open_).call(method, path, None, Origin=origin).headers
            assert Rest(everyone).call(method, path, None, Origin="https://any").headers["Access-Control-Allow-Origin"] == "*"
    finally:
        open_.stop()
        everyone.stop()


# ---- one who goes on and on


def test_endless_tries_take_no_memory(world: World) -> None:
    """Neither wrong bearers nor wrong names nor forged sources pile up."""
    web = server.Web(world.home.agents)
    for number in range(11000):
        web.sources.add(float(number), "2001:db8:%x:%x::1" % divmod(number, 65536))
        web.names.add(float(number), "name-%d" % number)
        web._canonical("198.51.%d.%d" % divmod(number, 256))
        web.agents.sight.public("198.51.%d.%d" % divmod(number, 256))
    assert max(map(len, (web.sources.buckets, web.names.buckets))) <= 10001 and len(web._sources) <= 4097
    assert len(web.agents.sight._known) <= 4097


def test_nodes_that_are_gone_take_no_memory(home: Server, clock: Clock) -> None:
    node = Client(home).join(home.key())
    node.exchange()
    netmaker_core.remove_node(home.core, home.node(node))
    assert node.exchange().status == 410
    clock.now += 3601
    home.agents.flush()
    assert home.agents.members.nodes == {} == home.agents.members.looks
    assert node.exchange().status == 410 and node.exchange({"confirm": True}).status == 410
    assert home.core.store.rows("SELECT 1 FROM node") == []


def test_a_long_log_is_not_read_at_once(world: World) -> None:
    """Anybody who is signed in may ask for it, again and again, and the server is a router."""
    columns = "time, who, source, network, action, target, detail"
    sql = server.composed("INSERT INTO audit (%s) VALUES (1800000000, 'x', '', 'default', 'y', '', '')", columns)
    with world.home.core.store.writer.atomic("IMMEDIATE"):
        for _ in range(3000):
            world.home.core.store._write(sql, ())
    read: list[int] = []
    world.home.core.store.reader.connection().row_factory = lambda cursor, row: read.append(1) or row
    for query, count in (("", 1000), ("?per_page=10", 10), ("?page=300&per_page=10", 10), ("?page=99999", 0)):
        read.clear()
        said = world.carol.call("GET", "/api/audit" + query)
        assert len(said.value) == count and int(said.headers["X-Total-Count"]) > 3000
        assert len(read) < count + 10
    world.home.core.store.reader.connection().row_factory = None


def test_a_long_name_fills_no_bucket(world: World) -> None:
    assert sign_in(world.home, "x" * 4000, "wrong").status == 401
    assert sign_in(world.home, "x" * 5000, "wrong").status == 400


def test_slow_hashing_shuts_no_agent_out(world: World) -> None:
    """argon2id is two at a time; who waits for it must not hold all threads of the web server."""
    with ThreadPoolExecutor(60) as pool:
        tries = [pool.submit(sign_in, world.home, "root", "wrong") for _ in range(60)]
        done = threading.Event()
        pool.submit(lambda: (world.node.exchange(), done.set()))
        assert done.wait(10)
        assert {each.result().status for each in tries} == {401, 429}


def test_master_key_and_users_stay_apart(tmp_path: Path, clock: Clock) -> None:
    """A user called like the audit log calls the master key is not it, and the log tells them apart."""
    home = Server(str(tmp_path / "m"), clock, MASTER_KEY=MASTER)
    try:
        user = make_user(home, "masterkey")
        assert user.call("GET", "/api/users").status == 403
        Rest(home, MASTER).good("POST", "/api/networks", {"netid": "m", "addressrange": "10.1.0.0/24"})
        assert user.get("/api/networks") == []
    finally:
        home.stop()
