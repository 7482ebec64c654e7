# SPDX-License-Identifier: Apache-2.0
"""Software written for Netmaker 0.8 works against this server: its page, scripts with curl, clients in Go."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import pytest
from restkit import MASTER, PASSWORD, Rest, Said, fetch
from serverkit import Client, Clock, Server, wireguard_key

import netmaker_lite as server

DOCS = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
PAGE = "http://ui.example"

# ---- what 0.8.2 had

ENDPOINTS = """
GET /api/networks
POST /api/networks
GET /api/networks/{n}
PUT /api/networks/{n}
PUT /api/networks/{n}/nodelimit
DELETE /api/networks/{n}
POST /api/networks/{n}/keyupdate
POST /api/networks/{n}/keys
GET /api/networks/{n}/keys
DELETE /api/networks/{n}/keys/{name}
GET /api/networks/{n}/signuptoken
GET /api/nodes
GET /api/nodes/{n}
GET /api/nodes/{n}/{mac}
PUT /api/nodes/{n}/{mac}
DELETE /api/nodes/{n}/{mac}
POST /api/nodes/{n}
POST /api/nodes/{n}/{mac}/approve
POST /api/nodes/{n}/{mac}/creategateway
DELETE /api/nodes/{n}/{mac}/deletegateway
POST /api/nodes/{n}/{mac}/createingress
DELETE /api/nodes/{n}/{mac}/deleteingress
POST /api/nodes/{n}/{mac}/createrelay
DELETE /api/nodes/{n}/{mac}/deleterelay
GET /api/nodes/adm/{n}/lastmodified
POST /api/nodes/adm/{n}/authenticate
GET /api/users/adm/hasadmin
POST /api/users/adm/createadmin
POST /api/users/adm/authenticate
GET /api/users
GET /api/users/{u}
PUT /api/users/{u}
DELETE /api/users/{u}
POST /api/users/{u}
PUT /api/users/{u}/adm
PUT /api/users/networks/{u}
GET /api/dns
GET /api/dns/adm/{n}
GET /api/dns/adm/{n}/nodes
GET /api/dns/adm/{n}/custom
POST /api/dns/{n}
PUT /api/dns/{n}/{domain}
DELETE /api/dns/{n}/{domain}
POST /api/dns/adm/pushdns
GET /api/extclients
GET /api/extclients/{n}
GET /api/extclients/{n}/{id}
GET /api/extclients/{n}/{id}/{type}
POST /api/extclients/{n}/{mac}
PUT /api/extclients/{n}/{id}
DELETE /api/extclients/{n}/{id}
POST /api/server/addnetwork/{n}
DELETE /api/server/removenetwork/{n}
GET /api/server/getconfig
"""

# Of each struct: texts, yes-or-no texts, integers, lists of texts, lists of objects, booleans; as Go's encoder writes them.
STRUCTS: dict[str, dict[str, str]] = {
    "Network": {
        "text": "netid displayname addressrange addressrange6 localrange defaultinterface defaultpostup defaultpostdown "
        "defaultextclientdns",
        "flag": "islocal isdualstack isipv4 isipv6 defaultsaveconfig defaultudpholepunch allowmanualsignup isgrpchub",
        "number": "defaultlistenport defaultkeepalive defaultmtu nodelimit checkininterval nodeslastmodified "
        "networklastmodified keyupdatetimestamp",
        "objects": "accesskeys",
    },
    "Node": {
        "text": "id macaddress network name password publickey endpoint localaddress address address6 interface postup postdown "
        "localrange ingressgatewayrange action os accesskey",
        "flag": "udpholepunch isdualstack isstatic roaming islocal ipforwarding dnson ispending isrelay isrelayed "
        "isegressgateway isingressgateway pullchanges isserver saveconfig",
        "number": "listenport persistentkeepalive mtu checkininterval lastmodified lastcheckin lastpeerupdate "
        "keyupdatetimestamp expdatetime",
        "texts": "allowedips relayaddrs egressgatewayranges",
    },
    "AccessKey": {"text": "name value accessstring", "number": "uses"},
    "ExtClient": {
        "text": "clientid description privatekey publickey network address ingressgatewayid ingressgatewayendpoint",
        "number": "lastmodified",
    },
    "User": {"text": "username password", "texts": "networks", "truth": "isadmin"},
    "DNSEntry": {"text": "address name network"},
}  # fmt: skip
IS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "flag": lambda value: value in ("yes", "no"),
    "number": lambda value: type(value) is int,
    "texts": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "objects": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "truth": lambda value: isinstance(value, bool),
}
ZERO = {"text": "", "flag": "", "number": 0, "texts": None, "objects": None, "truth": False}
DIFFERENCES = {  # member → the words of docs/api.md
    "User.password": "no answer has passwords or their hashes",
    "Network.accesskeys": "`accesskeys` of a network is empty",
    "Node.password": "no answer has passwords or their hashes",
    "AccessKey.value": "shown once, when made",
    "AccessKey.accessstring": "shown once, when made",
    "ExtClient.privatekey": "shown once; kept sealed",
    "Node.id": "a random id",
    "Network.defaultpostup": "of a network are not kept",
}
ABSENT = {"User.password"}


def fields(struct: str) -> dict[str, str]:
    return {name: kind for kind, names in STRUCTS[struct].items() for name in names.split()}


def go(struct: str, **values: Any) -> dict[str, Any]:
    """A struct of which only these members were set, as Go's encoder writes it."""
    return {**{name: ZERO[kind] for name, kind in fields(struct).items()}, **values}


def plan(told: Mapping[str, Any], found: Mapping[str, Any], *secrets: str) -> dict[str, tuple[Any, Any]]:
    """What a provider would change: what was set, and is read otherwise."""
    set_ = {name: value for name, value in told.items() if value not in ("", 0, None) and name not in secrets}
    return {name: (value, found.get(name)) for name, value in set_.items() if found.get(name) != value}


def by_position(path: str) -> str:
    return re.sub("[<{][a-z0-9]+[>}]", "*", path)


def test_every_endpoint_is_there() -> None:
    ours = {(route.method, by_position(route.path)) for route in server.ROUTES}
    wanted = [line.split() for line in ENDPOINTS.split("\n") if line]
    assert [line for line in wanted if (line[0], by_position(line[1])) not in ours] == [] and len(wanted) == 54
    assert ("GET", "/meshclient/files/install.sh") in ours
    listed = set(re.findall(r"^\| `([A-Z]+ /[^`]+)` \|", DOCS, re.M))
    for route in server.ROUTES:
        if route.role != "agent":
            line = "%s %s" % (route.method, re.sub("<([a-z0-9]+)>", r"{\1}", route.path))
            assert line in listed, line


def reachable(home: Server, network: str = "default") -> Client:
    """A node that can be a gateway of external clients."""
    node = Client(home, network).join(home.key(network))
    node.facts.update(endpoint="203.0.113.7", fixed=True)
    node.exchange({"facts": node.facts})
    return node


@pytest.fixture
def front(home: Server) -> Client:
    return reachable(home)


def test_every_field_is_there_in_its_type(home: Server, admin: Rest, front: Client) -> None:
    key = admin.good("POST", "/api/networks/default/keys", {"name": "front", "uses": 3})
    admin.good("POST", "/api/nodes/default/%s/createingress" % front.node)
    client = admin.good("POST", "/api/extclients/default/%s" % front.node)
    admin.good("POST", "/api/dns/default", {"name": "printer", "address": "10.20.30.99"})
    answers = {
        "Network": [admin.get("/api/networks/default"), *admin.get("/api/networks")],
        "Node": [admin.get("/api/nodes/default/" + front.node), *admin.get("/api/nodes"), *admin.get("/api/nodes/default")],
        "AccessKey": [key, *(each for each in admin.get("/api/networks/default/keys") if each["uses"])],
        "ExtClient": [client, *admin.get("/api/extclients"), admin.get("/api/extclients/default/" + client["clientid"])],
        "User": [admin.get("/api/users/root"), *admin.get("/api/users")],
        "DNSEntry": [*admin.get("/api/dns"), *admin.get("/api/dns/adm/default"), *admin.get("/api/dns/adm/default/custom")],
    }
    section = DOCS.partition("## Differences")[2]
    for struct in STRUCTS:
        assert answers[struct]
        for shown in answers[struct]:
            for name, kind in fields(struct).items():
                where = "%s.%s" % (struct, name)
                assert (name in shown) is (where not in ABSENT), where
                assert where in ABSENT or IS[kind](shown[name]), (where, shown[name])
    for where, words in DIFFERENCES.items():
        assert words in section, (where, words)
        assert where.partition(".")[2] in fields(where.partition(".")[0])


# ---- the page of 0.8, served from elsewhere


class Page:
    """A browser with the page: axios asks, the browser first asks whether it may."""

    def __init__(self, home: Server) -> None:
        self.home, self.token, self.preflights = home, "", 0

    def send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Said:
        return fetch(self.home.port, method, path, body, {"Origin": PAGE, "Referer": PAGE + "/", **headers})

    def preflight(self, method: str, path: str, names: list[str]) -> None:
        self.preflights += 1
        asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": ",".join(names)}
        said = self.send("OPTIONS", path, None, {"Accept": "*/*", "Sec-Fetch-Mode": "cors", **asked})
        assert 200 <= said.status < 300 and said.headers["Access-Control-Allow-Origin"] in (PAGE, "*")
        assert method in ("GET", "POST") or method in said.headers["Access-Control-Allow-Methods"].split(", ")
        assert set(names) <= set(said.headers["Access-Control-Allow-Headers"].lower().split(", "))

    def call(self, method: str, path: str, body: Any = None, **more: str) -> Said:
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        if self.token:
            headers["authorization"] = "Bearer " + self.token
        if body is not None:
            headers["content-type"] = "application/json;charset=UTF-8"
        if headers or method not in ("GET", "POST"):
            self.preflight(method, "/api" + path, sorted(headers))
        raw = None if body is None else json.dumps(body).encode()
        said = self.send(method, "/api" + path, raw, {"Accept": "application/json, text/plain, */*", **headers})
        assert said.headers["Access-Control-Allow-Origin"] in (PAGE, "*"), "the browser hides this answer from the page"
        return said

    def good(self, method: str, path: str, body: Any = None) -> Any:
        said = self.call(method, path, body)
        assert said.status == 200, (method, path, said)
        return said.value

    def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and the sentence that the page can show."""
        said = self.call(method, path, body)
        assert said.status >= 400 and said.value["Code"] == said.status
        return said.status, said.value["Message"]

    def sign_in(self, name: str, password: str) -> dict[str, Any]:
        said = self.good("POST", "/users/adm/authenticate", {"username": name, "password": password})
        assert said["Code"] == 200 and said["Response"]["UserName"] == name.lower()
        self.token = said["Response"]["AuthToken"]
        return jwt_decode(self.token)


def jwt_decode(token: str) -> dict[str, Any]:
    """As the library jwt-decode does, without which the page takes nobody in."""
    part = token.split(".")[1].replace("-", "+").replace("_", "/")
    found: dict[str, Any] = json.loads(base64.b64decode(part + "=" * (-len(part) % 4)))
    return found


@pytest.fixture
def empty(tmp_path: Path, clock: Clock) -> Iterator[Server]:
    running = Server(str(tmp_path / "empty"), clock, CORS_ALLOWED_ORIGIN=PAGE, MASTER_KEY=MASTER)
    yield running
    running.stop()


@pytest.fixture
def page(empty: Server) -> Page:
    """The page, with its administrator signed in and one network."""
    code = server.new_setup_code(empty.core)
    Rest(empty).good("POST", "/api/users/adm/createadmin", {"username": "ada", "password": PASSWORD, "setupcode": code})
    found = Page(empty)
    found.sign_in("ada", PASSWORD)
    found.good("POST", "/networks", form("office", "10.20.30.0/24"))
    return found


def form(name: str, range_: str, **more: str) -> dict[str, str]:
    """What the page's form sends: the IPv6 range always, whatever the box says."""
    rest = {"localrange": "", "islocal": "no", "isdualstack": "no", "defaultudpholepunch": "no"}
    return {"addressrange": range_, "netid": name, **rest, "addressrange6": "fd39:75a7:808f:649d::/64", **more}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Names of members that are others; none may be gone."""
    assert old.keys() == new.keys()
    return {name for name in new if old[name] != new[name]}


def test_the_page_lets_the_first_administrator_in(empty: Server) -> None:
    page = Page(empty)
    assert page.good("GET", "/users/adm/hasadmin") is False and page.preflights == 0
    account = {"username": "Ada", "password": PASSWORD}
    status, sentence = page.refused("POST", "/users/adm/createadmin", account)
    assert status == 403 and "setup code" in sentence
    code = server.new_setup_code(empty.core)
    made = page.good("POST", "/users/adm/createadmin", go("User", **account, isadmin=True, setupcode=code))
    assert made == {"username": "ada", "networks": [], "isadmin": True}
    assert page.good("GET", "/users/adm/hasadmin") is True
    assert page.refused("POST", "/users/adm/authenticate", {**account, "password": "wrong"})[0] == 401
    assert page.sign_in("Ada", PASSWORD)["exp"] == empty.core.now + server.SESSION
    assert page.good("GET", "/users/Ada")["isadmin"] is True
    assert [page.good("GET", path) for path in ("/networks", "/nodes", "/extclients", "/dns")] == [[], [], [], []]
    config = page.good("GET", "/server/getconfig")
    assert (config["MasterKey"], config["ClientMode"], config["RestBackend"]) == ("(hidden)", "on", "on")
    token, page.token = page.token, page.token + "x"
    assert page.refused("GET", "/networks")[0] == 401
    page.token = token[: token.index(".")]
    assert page.refused("GET", "/networks")[0] == 401
    page.token = token
    page.good("POST", "/users/adm/logout")
    assert page.refused("GET", "/networks") == (401, "this bearer token is not known: sign in, or ask for another")
    page.token = ""
    assert page.refused("GET", "/nothing/here")[0] == 404


def test_a_page_from_elsewhere_is_not_let_in(empty: Server) -> None:
    for origin in ("http://evil.example", "null"):
        said = Page(empty).send("OPTIONS", "/api/networks", None, {"Origin": origin, "Access-Control-Request-Method": "GET"})
        assert "Access-Control-Allow-Origin" not in said.headers


def test_networks_on_the_page(page: Page) -> None:
    office = page.good("GET", "/networks/office")
    assert (office["isdualstack"], office["addressrange6"], office["defaultudpholepunch"]) == ("no", "", "no")
    page.good("POST", "/networks", form("home", "192.168.1.10/23", islocal="yes", localrange="172.16.5.9/16", isdualstack="yes"))
    home = page.good("GET", "/networks/home")
    assert (home["addressrange"], home["localrange"], home["isdualstack"]) == ("192.168.0.0/23", "172.16.0.0/16", "yes")
    assert "overlaps" in page.refused("POST", "/networks", form("third", "10.20.30.128/25"))[1]
    assert "overlaps" in page.refused("POST", "/networks", form("third", "10.77.0.0/24", isdualstack="yes"))[1]
    page.good("POST", "/networks/office/keys", {"name": "door", "uses": 2})
    for name, value, others in (
        ("displayname", "My Office", set()), ("defaultkeepalive", 25, set()), ("allowmanualsignup", "yes", set()),
        ("defaultmtu", "1380", set()), ("addressrange6", "fd00:7::/64", {"isdualstack", "isipv6"}),
    ):  # fmt: skip
        before = page.good("GET", "/networks/office")
        after = page.good("PUT", "/networks/office", {**before, name: value})
        assert changed(before, after) - {"networklastmodified", "nodeslastmodified", "revision"} == {name, *others}, name
        assert str(after[name]) == str(value)
    box = {**page.good("GET", "/networks/office"), "isdualstack": "no", "addressrange6": ""}
    assert page.good("PUT", "/networks/office", box)["isdualstack"] == "no"
    assert [each["name"] for each in page.good("GET", "/networks/office/keys")] == ["door"]
    assert page.good("DELETE", "/networks/home")["Code"] == 200
    assert [each["netid"] for each in page.good("GET", "/networks")] == ["office"]


def test_keys_on_the_page(empty: Server, page: Page) -> None:
    made = page.good("POST", "/networks/office/keys", {"name": "front", "uses": 0})  # 0 stands in the form
    assert made["value"] and made["accessstring"] and made["uses"] == 1
    listed = page.good("GET", "/networks/office/keys")
    assert [(each["name"], each["uses"], each["value"], each["accessstring"]) for each in listed] == [("front", 1, "", "")]
    Client(empty, "office").join(made["value"])
    assert Client(empty, "office", "198.51.100.2").try_join(made["value"]).status != 200
    page.good("POST", "/networks/office/keys", {"name": "back", "uses": 7})
    assert "Message" in page.good("DELETE", "/networks/office/keys/back")
    assert "back" not in [each["name"] for each in page.good("GET", "/networks/office/keys")]


def test_nodes_on_the_page(empty: Server, page: Page) -> None:
    key = page.good("POST", "/networks/office/keys", {"name": "front", "uses": 5})["value"]
    page.good("PUT", "/networks/office", {**page.good("GET", "/networks/office"), "allowmanualsignup": "yes"})
    one, two = (Client(empty, "office", "198.51.100.%d" % number).join(key) for number in (1, 2))
    one.facts.update(endpoint="203.0.113.7", fixed=True)
    one.exchange({"facts": one.facts})
    Client(empty, "office", "198.51.100.3").join()
    waiting = [node for node in page.good("GET", "/nodes") if node["ispending"] == "yes"]
    assert len(waiting) == 1
    assert page.good("POST", "/nodes/office/%s/approve" % waiting[0]["macaddress"]) == "SUCCESS"
    assert [node["ispending"] for node in page.good("GET", "/nodes")] == ["no"] * 3
    path = "/nodes/office/" + one.node
    for name, value in (
        ("name", "reception"), ("expdatetime", 1 << 32), ("persistentkeepalive", 30), ("mtu", 1400), ("udpholepunch", "yes"),
        ("allowedips", ["192.168.9.0/24"]), ("postup", "true"), ("address", "10.20.30.200"),
    ):  # fmt: skip
        before = next(node for node in page.good("GET", "/nodes") if node["id"] == one.node)
        page.good("PUT", path, {**before, name: value})
        after = next(node for node in page.good("GET", "/nodes") if node["id"] == one.node)
        assert changed(before, after) - {"lastmodified", "hooks"} == ({name} if before[name] != value else set()), name
        assert after[name] == value
    page.good("PUT", path, {**after, "macaddress": "8C:90:B5:06:F1:D9"})
    by_mac = "/nodes/office/8c:90:b5:06:f1:d9"
    assert page.good("GET", by_mac)["id"] == page.good("GET", "/nodes/office/8C:90:B5:06:F1:D9")["id"] == one.node
    gateway = page.good("POST", by_mac + "/creategateway", {"ranges": ["192.168.77.1/24", "172.20.0.0/16"], "interface": "eth0"})
    assert (gateway["isegressgateway"], gateway["egressgatewayranges"]) == ("yes", ["192.168.77.0/24", "172.20.0.0/16"])
    status, sentence = page.refused("POST", by_mac + "/creategateway", {"ranges": ["0.0.0.0/0"], "interface": "eth0"})
    assert status == 400 and "internet" in sentence
    assert page.good("PUT", by_mac, page.good("GET", by_mac))["isegressgateway"] == "yes"
    two_now = next(node for node in page.good("GET", "/nodes") if node["id"] == two.node)
    relay = page.good("POST", by_mac + "/createrelay", {"relayaddrs": [two_now["address"]]})
    assert relay["isrelay"] == "yes" and len(relay["relayaddrs"]) == 1
    assert page.good("DELETE", by_mac + "/deleterelay")["isrelay"] == "no"
    assert page.good("DELETE", by_mac + "/deletegateway")["isegressgateway"] == "no"
    assert type(page.good("GET", "/nodes/adm/office/lastmodified")) is int
    assert "node" in page.refused("DELETE", "/networks/office")[1]
    for node in page.good("GET", "/nodes/office"):
        assert page.good("DELETE", "/nodes/office/" + node["macaddress"])["Message"].endswith("deleted.")
    page.good("DELETE", "/networks/office")


def test_external_clients_on_the_page(empty: Server, page: Page) -> None:
    reachable(empty, "office")
    mac = page.good("GET", "/nodes")[0]["macaddress"]
    assert "ingress" in page.refused("POST", "/extclients/office/" + mac)[1]
    assert page.good("POST", "/nodes/office/%s/createingress" % mac)["isingressgateway"] == "yes"
    page.good("POST", "/extclients/office/" + mac)
    (client,) = page.good("GET", "/extclients")
    assert client["ingressgatewayid"] == mac and client["privatekey"] == "" and client["clientid"]
    path = "/extclients/office/" + client["clientid"]
    file = page.call("GET", path + "/file")
    assert file.status == 200 and b"[Interface]" in file.body and file.headers["Content-Disposition"].startswith("attachment")
    picture = page.call("GET", path + "/qr")
    assert picture.status == 200 and picture.body.startswith(b"\x89PNG") and picture.headers["Content-Type"] == "image/png"
    assert page.good("PUT", path, {"clientid": "phone"})["clientid"] == "phone"
    assert page.refused("GET", path)[0] == 404
    assert page.good("DELETE", "/extclients/office/phone")["Code"] == 200
    page.good("POST", "/extclients/office/" + mac, {"clientid": ""})
    assert page.good("DELETE", "/nodes/office/%s/deleteingress" % mac)["isingressgateway"] == "no"
    assert page.good("GET", "/extclients") == []


def test_names_and_users_on_the_page(empty: Server, page: Page) -> None:
    made = page.good("POST", "/dns/office", {"address": "10.20.30.9", "name": "printer"})
    assert (made["name"], made["address"], made["network"]) == ("printer", "10.20.30.9", "office")
    assert page.good("GET", "/dns/adm/office/custom") == [made] == page.good("GET", "/dns")
    assert page.good("DELETE", "/dns/office/printer")["Code"] == 200 and page.good("GET", "/dns") == []
    page.good("POST", "/networks", form("home", "10.1.0.0/24"))
    made = page.good("POST", "/users/Joe", {"username": "Joe", "password": PASSWORD, "networks": ["office"]})
    assert made == {"username": "joe", "networks": ["office"], "isadmin": False}
    joe = Page(empty)
    joe.sign_in("Joe", PASSWORD)
    assert joe.good("GET", "/users/Joe")["isadmin"] is False
    assert [each["netid"] for each in joe.good("GET", "/networks")] == ["office"]
    assert joe.refused("GET", "/users")[0] == joe.refused("GET", "/networks/home/keys")[0] == 403
    body = {"username": "joe", "networks": ["home", "office"]}
    for path in ("/users/networks/joe", "/users/joe/adm"):
        assert page.good("PUT", path, body)["networks"] == ["home", "office"]
    assert len(joe.good("GET", "/networks")) == 2
    assert joe.good("PUT", "/users/joe", {"username": "joe", "password": PASSWORD + "!"})["username"] == "joe"
    assert joe.refused("GET", "/networks")[0] == 401
    joe.sign_in("joe", PASSWORD + "!")
    status, sentence = page.refused("PUT", "/users/ada", {"username": "eve", "password": PASSWORD})
    assert status == 400 and "keeps the name" in sentence
    assert page.good("DELETE", "/users/joe")["Code"] == 200
    assert [each["username"] for each in page.good("GET", "/users")] == ["ada"]


# ---- scripts with curl

SCRIPT = r"""
set -eu
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)'"$1"')'; }
api() { curl --max-time 20 -fsS -H "authorization: Bearer $MASTER_KEY" "$@"; }
json='Content-Type: application/json'

[ "$(curl -s -o /dev/null -w '%{http_code}' "$API/api/networks")" = 401 ]
[ "$(curl -s -o /dev/null -w '%{http_code}' -H 'authorization: Bearer secretkey' "$API/api/networks")" = 401 ]
api -d '{"addressrange":"10.70.0.0/16","netid":"skynet"}' -H "$json" "$API/api/networks" >/dev/null
api -d '{"addressrange":"10.69.0.0/16","netid":"other"}' "$API/api/networks" >/dev/null    # as a form, as curl says by itself
[ "$(api "$API/api/networks" | field '[2]["netid"]')" = skynet ]
api -X PUT -d '{"displayname":"my-house"}' -H "$json" "$API/api/networks/skynet" | field '["displayname"]' | grep -qx my-house
api -X PUT -d '{"nodelimit":"7"}' -H "$json" "$API/api/networks/skynet/nodelimit" | field '["nodelimit"]' | grep -qx 7
api -d '{"uses":10,"name":"mykey"}' -H "$json" "$API/api/networks/skynet/keys" | field '["accessstring"]' | grep -q .
[ "$(api "$API/api/networks/skynet/keys" | field '[0]["uses"]')" = 10 ]
api -X DELETE "$API/api/networks/skynet/keys/mykey" >/dev/null
cat >node <<END
{"endpoint": "100.200.100.200", "publickey": "$KEY", "macaddress": "8c:90:b5:06:f1:d9", "password": "reallysecret",
 "localaddress": "172.16.16.1", "accesskey": "aA3bVG0rnItIRXDx", "listenport": 6400}
END
api -d @node -H "$json" "$API/api/nodes/skynet" >/dev/null
node="$API/api/nodes/skynet/8c:90:b5:06:f1:d9"
[ "$(api "$node" | field '["listenport"]')" = 6400 ]
[ "$(api "$node" | field '["endpoint"]')" = 100.200.100.200 ]
api -X PUT -d '{"name":"laptop1"}' -H "$json" "$node" | field '["name"]' | grep -qx laptop1
egress='{ "rangestring": "172.31.0.0/16", "interface": "eth0"}'
api -d "$egress" -H "$json" "$node/creategateway" | field '["isegressgateway"]' | grep -qx yes
api -X DELETE "$node/deletegateway" | field '["isegressgateway"]' | grep -qx no
api -X POST "$API/api/nodes/lab/$NODE/createingress" | field '["isingressgateway"]' | grep -qx yes
api -X POST "$API/api/extclients/lab/$NODE" | field '["clientid"]' >client
api "$API/api/extclients/lab/$(cat client)/file" | grep -q '^\[Peer\]'
api "$API/api/nodes/adm/skynet/lastmodified" | grep -qxE '[0-9]+'
[ "$(api "$API/api/nodes" | field '[1]["network"]')" = skynet ]
api -X POST "$API/api/networks/skynet/keyupdate" | field '["netid"]' | grep -qx skynet
api -d '{"name":"printer","address":"10.70.0.99"}' -H "$json" "$API/api/dns/skynet" >/dev/null
api -X PUT -d '{"name":"scanner"}' -H "$json" "$API/api/dns/skynet/printer" | field '["name"]' | grep -qx scanner
api -X POST "$API/api/dns/adm/pushdns" | field '["Message"]' | grep -qi 'DNS pushed'
curl -fsS "$API/api/users/adm/hasadmin" | grep -qx false
user='{ "username": "smartguy", "password": "YOUR_PASS_WORD"}'
curl -fsS -d "$user" -H "$json" "$API/api/users/adm/createadmin" | field '["isadmin"]' | grep -qx True
token=$(curl -fsS -d "$user" "$API/api/users/adm/authenticate" | field '["Response"]["AuthToken"]')
curl -fsS -H "Authorization: Bearer $token" "$API/api/users/smartguy" | field '["username"]' | grep -qx smartguy
api -X PUT -d '{"password":"noonewillguessthis"}' -H "$json" "$API/api/users/smartguy" >/dev/null
[ "$(curl -s -o /dev/null -w '%{http_code}' -H "Authorization: Bearer $token" "$API/api/networks")" = 401 ]
api -X POST "$API/api/server/addnetwork/skynet" >/dev/null
api -X DELETE "$API/api/server/removenetwork/skynet" >/dev/null
curl -fsS "$API/meshclient/files/netclient_lite.py" | head -1 | grep -q python
[ "$(curl -s -o body -w '%{http_code}' -X DELETE -H "authorization: Bearer $MASTER_KEY" "$API/api/networks/skynet")" = 409 ]
field '["Message"]' <body | grep -q 'has nodes'
api -X DELETE "$node" | field '["Message"]' | grep -q 'deleted\.'
api -X DELETE "$API/api/networks/skynet" >/dev/null
api -X DELETE "$API/api/networks/other" >/dev/null
[ "$(api "$API/api/networks" | field '[0]["netid"]')" = lab ]
echo done
"""


def test_scripts_with_curl(empty: Server, tmp_path: Path) -> None:
    empty.network("lab", "10.20.30.0/24")
    node = reachable(empty, "lab").node
    url = "http://127.0.0.1:%d" % empty.port
    values = {"PATH": os.environ["PATH"], "API": url, "MASTER_KEY": MASTER, "KEY": wireguard_key(), "NODE": node, "NO_PROXY": "*"}
    done = subprocess.run(["sh", "-xc", SCRIPT], cwd=tmp_path, env=values, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout[-5:]) == (0, "done\n"), done.stderr[-1500:]


# ---- clients in Go: Terraform's life of a resource


def test_a_network_by_terraform(home: Server, admin: Rest) -> None:
    told = go("Network", netid="skynet", addressrange="10.70.0.0/16", defaultlistenport=51900, allowmanualsignup="yes")
    admin.good("POST", "/api/networks", told)
    read = admin.get("/api/networks/skynet")
    assert plan(told, read) == {}
    default = admin.get("/api/networks/default")
    for name in ("nodelimit", "defaultkeepalive", "defaultmtu", "checkininterval", "defaultudpholepunch", "islocal"):
        assert read[name] == default[name], name
    told = {**{name: read[name] for name in fields("Network")}, "defaultmtu": 1400}
    admin.good("PUT", "/api/networks/skynet", told)
    assert plan(told, admin.get("/api/networks/skynet"), "networklastmodified", "nodeslastmodified") == {}
    imported = next(each for each in admin.get("/api/networks") if each["netid"] == "skynet")
    assert imported == admin.get("/api/networks/skynet")
    admin.good("DELETE", "/api/networks/skynet")
    assert admin.call("GET", "/api/networks/skynet").status == 404
    admin.good("POST", "/api/networks", {"NetID": "skynet", "AddressRange": "10.70.0.0/16", "DefaultKeepalive": "25"})
    assert admin.get("/api/networks/skynet")["defaultkeepalive"] == 25
    admin.good("POST", "/api/networks", {"netid": "silent", "addressrange": "10.71.0.0/16", "defaultkeepalive": "0"})
    assert admin.get("/api/networks/silent")["defaultkeepalive"] == 0
    admin.good("POST", "/api/networks", {"netid": "six", "addressrange6": "fd00:71::/64", "isdualstack": "no"})
    assert admin.get("/api/networks/six")["isipv6"] == "yes"


def test_an_access_key_by_terraform(home: Server, admin: Rest) -> None:
    path = "/api/networks/default/keys"
    told = go("AccessKey", name="ci", uses=5, value="chosen")
    made = admin.good("POST", path, told)
    assert made["value"] != "chosen" and plan(told, made, "value") == {}
    assert plan(told, next(each for each in admin.get(path) if each["name"] == "ci"), "value") == {}
    assert admin.good("POST", path, go("AccessKey", name="once"))["uses"] == 1
    admin.good("DELETE", path + "/ci")
    assert [each["name"] for each in admin.get(path)] == ["once"]
    admin.good("POST", path, told)


def test_a_node_by_terraform(home: Server, admin: Rest) -> None:
    told = go(
        "Node", name="box", publickey=wireguard_key(), endpoint="203.0.113.50", listenport=51999, macaddress="8c:90:b5:06:f1:d9",
        network="default", password="reallysecret", accesskey="x", isstatic="yes", expdatetime=int(time.time()) + 10**9,
    )  # fmt: skip
    admin.good("POST", "/api/nodes/default", told)
    path = "/api/nodes/default/8c:90:b5:06:f1:d9"
    read = admin.get(path)
    assert plan(told, read, "password", "accesskey") == {}
    told = {**{name: read[name] for name in fields("Node")}, "mtu": 1400, "password": "x", "accesskey": "x"}
    admin.good("PUT", path, told)
    read = admin.get(path)
    assert plan(told, read, "password", "accesskey", "lastmodified") == {}
    bare = admin.good("PUT", path, go("Node", name="crate", macaddress="8c:90:b5:06:f1:d9", endpoint="203.0.113.50"))
    assert bare["name"] == "crate"
    for name in ("listenport", "mtu", "dnson", "roaming", "address", "publickey", "isstatic", "udpholepunch", "endpoint"):
        assert bare[name] == read[name], name
    assert path.rpartition("/")[2] in [each["macaddress"] for each in admin.get("/api/nodes/default")]
    admin.good("DELETE", path)
    assert admin.call("GET", path).status == 404


def test_a_client_a_name_and_a_user_by_terraform(home: Server, admin: Rest, front: Client) -> None:
    admin.good("POST", "/api/nodes/default/%s/createingress" % front.node, go("Node"))
    egress = {"nodeid": "", "netid": "", "ranges": ["192.168.77.0/24"], "rangestring": "", "interface": "", "postup": ""}
    admin.good("POST", "/api/nodes/default/%s/creategateway" % front.node, egress)
    told = go("ExtClient", clientid="phone", network="default")
    made = admin.good("POST", "/api/extclients/default/" + front.node, told)
    read = admin.get("/api/extclients/default/phone")
    assert plan(told, read) == {} and plan(read, made) == {}
    renamed = admin.good("PUT", "/api/extclients/default/phone", {**read, **go("ExtClient"), "clientid": "tablet"})
    assert changed(read, renamed) <= {"clientid", "lastmodified"}
    assert admin.good("PUT", "/api/extclients/default/tablet", renamed) == renamed
    admin.good("DELETE", "/api/extclients/default/tablet")
    assert admin.get("/api/extclients/default") == []

    told = go("DNSEntry", name="printer", address="10.20.30.99")
    assert plan(told, admin.good("POST", "/api/dns/default", told)) == {}
    assert plan(told, next(each for each in admin.get("/api/dns/adm/default/custom"))) == {}
    moved = admin.good("PUT", "/api/dns/default/printer", go("DNSEntry", address="10.20.30.98"))
    assert (moved["name"], moved["address"]) == ("printer", "10.20.30.98")
    admin.good("DELETE", "/api/dns/default/printer")

    told = go("User", username="tom", password=PASSWORD, networks=["default"])
    assert plan(told, admin.good("POST", "/api/users/tom", told), "password") == {}
    assert plan(told, admin.get("/api/users/tom"), "password") == {}
    told = go("User", username="tom", networks=[])
    assert admin.good("PUT", "/api/users/tom/adm", told)["networks"] == []
    Rest(home).good("POST", "/api/users/adm/authenticate", {"UserName": "tom", "Password": PASSWORD})
    admin.good("DELETE", "/api/users/tom")


def test_what_is_read_only_can_be_said_and_what_nobody_has_cannot(home: Server, admin: Rest, front: Client) -> None:
    """Every member of the original's structs is accepted where the original takes the struct."""
    admin.good("POST", "/api/nodes/default/%s/createingress" % front.node)
    admin.good("POST", "/api/extclients/default/" + front.node, {"clientid": "phone"})
    for method, path, struct in (
        ("PUT", "/api/networks/default", "Network"), ("PUT", "/api/nodes/default/" + front.node, "Node"),
        ("PUT", "/api/extclients/default/phone", "ExtClient"), ("POST", "/api/networks/default/keys", "AccessKey"),
    ):  # fmt: skip
        taken = {field.name for field in server.SCHEMAS[struct] if field.check}
        for name, kind in fields(struct).items():
            if name not in taken or struct == "AccessKey":
                value = {"texts": ["x"], "objects": [{"name": "x", "uses": 1}], "number": 7}.get(kind, "yes")
                assert admin.call(method, path, {name.title(): value}).status == 200, (path, name)
        said = admin.call(method, path, {"nonesuch": 1})
        assert said.status == 400 and "nonesuch" in said.sentence


def test_wrong_values_of_every_kind_are_refused_by_name(home: Server, admin: Rest, front: Client) -> None:
    """ "" and 0 are what Go writes for what was left out; nothing else is silently dropped."""
    for body in ({"mtu": 1}, {"mtu": "0"}, {"listenport": "x"}, {"dnson": "maybe"}, {"name": "-"}, {"address": "10.20.30"}):
        said = admin.call("PUT", "/api/nodes/default/" + front.node, body)
        assert said.status == 400 and said.sentence.startswith(*body), said
    before = admin.get("/api/nodes/default/" + front.node)
    left_out = {"mtu": 0, "listenport": 0, "name": "", "dnson": "", "address": ""}
    assert admin.good("PUT", "/api/nodes/default/" + front.node, left_out).items() <= before.items()


@pytest.mark.parametrize("limit", [{"scope": ""}, {"expires": 0}, {"name": ""}])
def test_an_api_token_has_no_empty_limits(admin: Rest, limit: dict[str, Any]) -> None:
    said = admin.call("POST", "/api/users/root/tokens", {"name": "ci", "scope": "read", **limit})
    assert said.status == 400 and said.sentence.startswith(*limit) and admin.get("/api/users/root/tokens") == []
