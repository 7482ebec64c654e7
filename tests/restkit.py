# SPDX-License-Identifier: Apache-2.0
"""An administrator's client: JSON over HTTP to a running server, as a script with curl would."""

from __future__ import annotations

import http.client
import json
import re
from typing import Any, Mapping, NamedTuple

from serverkit import Client, Server, wireguard_key

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

PASSWORD = "correct horse battery"


class Said(NamedTuple):
    """An answer."""

    status: int
    value: Any
    headers: Mapping[str, str]
    body: bytes

    @property
    def sentence(self) -> str:
        return str(self.value["Message"])


def fetch(port: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Said:
    """One request to a server on this host, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    kind = answer.getheader("Content-Type") or ""
    value = json.loads(data) if kind.startswith("application/json") and data else None
    return Said(answer.status, value, dict(answer.getheaders()), data)


class Rest:
    """Calls with one bearer token, or none."""

    def __init__(self, home: Server, bearer: str = "") -> None:
        self.home, self.bearer = home, bearer

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Said:
        """`body`: bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.bearer:
            given.setdefault("Authorization", "Bearer " + self.bearer)
        return fetch(self.home.port, method, path, raw, {"Content-Type": "application/json", **given})

    def get(self, path: str) -> Any:
        """The object; an AssertionError for anything but a 200."""
        return self.good("GET", path)

    def good(self, method: str, path: str, body: Any = None) -> Any:
        said = self.call(method, path, body)
        assert said.status == 200, (method, path, said)
        return said.value


def make_user(home: Server, name: str, *networks: str, admin: bool = False) -> Rest:
    """A user with a session."""
    core = home.core
    server.add_user(core, {"name": name, "password": PASSWORD, "admin": admin, "networks": ",".join(networks)})
    return Rest(home, server._open_session(core, name, {"expires": core.now + server.SESSION}, "sign in")["value"])


def api_token(home: Server, owner: str, name: str = "script", **values: Any) -> Rest:
    row = server.add_api_token(home.core, owner, {"name": name, **values})
    return Rest(home, row["value"])


def rows(home: Server) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that the database says, but for what agents' mere presence changes."""
    found = {}
    for model in netmaker_core.MODELS:
        columns = [name for name in model._meta.columns if name not in ("last_seen", "sequence")]
        sql = netmaker_core.composed("SELECT %s FROM %s", ", ".join('"%s"' % name for name in columns), model._meta.table_name)
        found[model._meta.table_name] = sorted(home.core.store.rows(sql), key=repr)
    return found


FURNITURE = (  # what else is there, where the server has such
    ("/api/nodes/<n>/<node>/createingress", None),
    ("/api/extclients/<n>/<node>", {"clientid": "phone"}),
    ("/api/dns/<n>", {"name": "printer", "address": "10.20.30.99"}),
)
MASTER = "correct-master-key-0123456789"


class World:
    """Two networks with nodes in several states, and bearer tokens of every kind: something to break into."""

    def __init__(self, home: Server) -> None:
        self.home, core = home, home.core
        home.network("other", "10.99.0.0/24")
        netmaker_core.set_network(core, "default", {"manual": True})
        self.access, self.other_access = home.key(uses=None, name="front"), home.key("other", uses=None, name="back")
        self.node, self.second = (Client(home, source="198.51.100.%d" % number).join(self.access) for number in (1, 2))
        self.stranger = Client(home, "other", "198.51.100.9").join(self.other_access)
        self.pending = Client(home, source="198.51.100.3").join()
        self.node.facts.update(endpoint="203.0.113.7", fixed=True)  # clients of a gateway need to reach it
        for node in (self.node, self.second, self.stranger):
            node.exchange({"facts": node.facts})
        self.admin, self.root = make_user(home, "root", admin=True), make_user(home, "second-root", admin=True)
        self.carol, self.mallory = make_user(home, "carol", "default"), make_user(home, "mallory", "other")
        self.nobody, self.token = Rest(home), api_token(home, "carol", "carols")
        for route in server.ROUTES:
            for path, body in FURNITURE:
                if (route.method, route.path) == ("POST", path):
                    self.admin.good("POST", path_of(route, self), body)

    def revoked(self) -> dict[str, Rest]:
        """Bearer tokens that were good once."""
        home, core = self.home, self.home.core
        gone = make_user(home, "gone", admin=True)
        gone_token = api_token(home, "gone")
        server.remove_user(core, "gone")
        left = make_user(home, "left", admin=True)
        left.good("POST", "/api/users/adm/logout")
        changed = make_user(home, "changed", admin=True)
        server.set_user(core, "changed", {"password": PASSWORD + " too"})
        late = server._open_session(core, "root", {"expires": core.now}, "sign in")["value"]
        token = api_token(home, "root", "withdrawn")
        server.remove_api_token(core, "root", "withdrawn")
        return {
            "session of a removed user": gone, "API token of a removed user": gone_token, "signed out": left,
            "session before a new password": changed, "session that is over": Rest(home, late),
            "removed API token": token, "API token that has expired": api_token(home, "root", "late", expires=core.now),
        }  # fmt: skip

    def credentials(self) -> dict[str, str]:
        """What is secret, but no bearer token."""
        core, row = self.home.core, self.home.node(self.node)
        session = core.store.rows("SELECT id FROM session WHERE owner = 'root'")[0][0]
        return {
            "node id": self.node.node, "node's capability": self.node.look, "pending node's capability": self.pending.look,
            "node's auth key": row["auth"], "node's WireGuard key": row["key"], "access key": self.access,
            "access key's secret": self.access.partition(".")[2], "pin": agent.b64(self.home.pin),
            "server.key": agent.b64(core.key.private), "hash": server.need_user(core, "root")["password"],
            "password": PASSWORD, "fingerprint of a session": session, "name": "root", "incarnation": core.store.incarnation,
        }  # fmt: skip


# ---- a right request for every route

VALUES = {  # of members of bodies: each would change something if a refused call came through
    "netid": "new", "addressrange": "10.77.0.0/24", "nodelimit": 5, "displayname": "taken over", "name": "taken-over",
    "publickey": wireguard_key(), "username": "carol", "password": PASSWORD, "isadmin": True, "networks": ["default", "other"],
    "uses": 7, "scope": "write", "node1": "", "node2": "", "ranges": ["192.168.77.0/24"], "address": "10.20.30.77",
    "clientid": "intruder", "enabled": "no", "interface": "eth0", "relayaddrs": ["10.20.30.2"],
}  # fmt: skip


def parts_of(route: server.Route, world: World) -> dict[str, str]:
    """The parts of the route's path: the network `default`, the node and the user that are there; any name for the rest."""
    second = {"node": world.node.node, "node1": world.node.node, "node2": world.second.node}
    known = {"n": "default", "u": "carol", "name": "front", "id": "phone", "type": "file", "form": "file", **second}
    if "/dns/" in route.path:
        known["name"] = "printer"
    if route.path.endswith(("/approve", "/reject")):
        known["node"] = world.pending.node
    if route.method == "POST" and route.path.endswith("<u>"):
        known["u"] = "newcomer"
    if "/tokens/" in route.path:
        known["name"] = "carols"
    return {name: known.get(name, "x") for name in re.findall(server.PART, route.path)}


def path_of(route: server.Route, world: World) -> str:
    path = route.path
    for name, value in parts_of(route, world).items():
        path = path.replace("<%s>" % name, value)
    return path


def body_of(route: server.Route, world: World) -> Any:
    if route.path.endswith("/authenticate"):
        return {"username": "root", "password": PASSWORD}
    found = {field.name: VALUES[field.name] for field in route.takes if field.check and field.name in VALUES}
    if "/<u>" in route.path and "username" in found:
        found["username"] = parts_of(route, world)["u"]
    if "node1" in found:
        found.update(node1=world.node.node, node2=world.second.node)
    if route.method == "PUT":  # names are kept
        found = {name: value for name, value in found.items() if name not in ("netid", "username", "publickey")}
    return found if route.takes else None
