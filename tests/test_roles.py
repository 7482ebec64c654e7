# SPDX-License-Identifier: Apache-2.0
"""Every route of the table by everybody: exactly those get in who may, and who is refused changes nothing."""

from __future__ import annotations

import base64
import json
import sqlite3
from typing import Any

import pytest
from restkit import MASTER, PASSWORD, Rest, World, api_token, body_of, path_of, rows
from serverkit import Server

import netmaker_core
import netmaker_lite as server

# What needs no bearer token. Whoever adds to this list must want a stranger to call it.
FOR_STRANGERS = {
    ("GET", "/api/health"), ("GET", "/api/getip"), ("GET", "/api/openapi.json"), ("GET", "/api/users/adm/hasadmin"),
    ("POST", "/api/users/adm/createadmin"), ("POST", "/api/users/adm/authenticate"),
}  # fmt: skip


@pytest.fixture
def settings() -> dict[str, str]:
    return {"MASTER_KEY": MASTER}


def jwt(**claims: Any) -> str:
    """As the original's, unsigned."""
    parts = ({"alg": "none", "typ": "JWT"}, {"IsAdmin": True, "UserName": "root", "Networks": ["default"], **claims})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


def strangers(world: World) -> dict[str, Rest]:
    """Whoever is nobody here."""
    home = world.home
    odd = {"garbage": "garbage", "forged JWT": jwt(), "wrong master key": MASTER[:-1] + "8", "master key and more": MASTER + "x"}
    odd.update(world.credentials(), **{"space": " ", "signed JWT": jwt(exp=1 << 40) + "c2ln"})
    return {"nothing": world.nobody, **{name: Rest(home, text) for name, text in odd.items()}, **world.revoked()}


def members(world: World) -> dict[str, tuple[Rest, str, bool]]:
    """Whoever is somebody: with which roles in the network `default`, and whether he may write."""
    home = world.home
    server.add_user(home.core, {"name": "loner", "password": PASSWORD, "networks": ""})
    tokens = {
        "read-only API token of an administrator": (api_token(home, "root", "r", write=False), "user network self admin", False),
        "API token of an administrator": (api_token(home, "root", "w"), "user network self admin", True),
        "API token for the network": (api_token(home, "root", "d", networks="default"), "user network", True),
        "API token for another network": (api_token(home, "root", "o", networks="other"), "user", True),
        "read-only API token of the user": (api_token(home, "carol", "r", write=False), "user network", False),
        "API token of the user": (api_token(home, "carol", "w"), "user network", True),
        "API token of a user for what he has not": (api_token(home, "carol", "x", networks="other"), "user", True),
    }
    return {
        "user of another network": (world.mallory, "user", True),
        "user without a network": (Rest(home, server.sign_in(home.core, "loner", PASSWORD)["value"]), "user", True),
        "user of the network": (world.carol, "user network self", True),
        "administrator": (world.admin, "user network self admin", True),
        "master key": (Rest(home, MASTER), "user network self admin", True),
        **tokens,
    }


def guarded() -> list[server.Route]:
    return [route for route in server.ROUTES if route.role not in ("anyone", "agent")]


def test_roles_of_the_table_are_the_intended_ones() -> None:
    for route in server.ROUTES:
        assert route.role in ("anyone", "agent", "nobody", "user", "network", "self", "admin"), route
        if route.role == "anyone" and (route.method != "GET" or route.path.startswith(("/api", "/metrics"))):
            assert (route.method, route.path) in FOR_STRANGERS
        if route.role == "agent":
            assert route.path.startswith("/api/agent/v1/")
        if "<n>" in route.path:
            assert route.role in ("network", "admin", "nobody"), route
        if "<u>" in route.path:
            assert route.role in ("self", "admin"), route
        if route.role == "user":
            assert "<" not in route.path, (route, "whose is it?")


def test_strangers_get_in_nowhere(world: World) -> None:
    everybody = strangers(world)
    before = rows(world.home)
    for route in guarded():
        path, body = path_of(route, world), body_of(route, world)
        for name, rest in everybody.items():
            said = rest.call(route.method, path, body)
            none = not rest.bearer.strip()
            wanted = 403 if route.role == "nobody" or (none and route.refusal) else 401
            assert said.status == wanted, (name, route.method, path, said)
            assert said.value["Code"] == wanted and said.sentence and said.value["error"] == said.sentence
            assert ("Www-Authenticate" in said.headers) == (wanted == 401)
    assert rows(world.home) == before


def test_members_get_in_where_they_may(world: World) -> None:
    home, everybody = world.home, members(world)
    bad = []
    saved = sqlite3.connect(":memory:")
    home.core.store._raw().backup(saved)
    for route in guarded():
        path, body = path_of(route, world), body_of(route, world)
        for name, (rest, roles, may_write) in everybody.items():
            before = rows(home)
            said = rest.call(route.method, path, body)
            reads = route.method == "GET" and "<type>" not in route.path  # a client's configuration has its keys
            allowed = route.role in roles.split() and (may_write or reads)
            if allowed == (said.status in (401, 403)) or said.status >= 500:
                bad.append((name, route.method, path, said.status, said.body))
            if not allowed:
                assert said.status == 403 and said.value["Code"] == 403 and said.sentence
                assert rows(home) == before, (name, route)
            elif route.method == "GET":
                assert rows(home) == before, (name, route)
            elif rows(home) != before:
                home.core.store.replace(saved)
    saved.close()
    assert not bad, "\n".join(map(str, bad))


def test_anyone_may_what_is_for_strangers(world: World) -> None:
    core = world.home.core
    for route in server.ROUTES:
        if route.role == "anyone":
            said = world.nobody.call(route.method, path_of(route, world), body_of(route, world))
            assert said.status not in (401, 403) and said.status < 500, (route, said)
    said = world.nobody.call("POST", "/api/users/adm/createadmin", {"username": "eve", "password": PASSWORD})
    assert said.status == 409 and [row["name"] for row in server.users(core) if row["admin"]] == ["root", "second-root"]


def test_agents_paths_do_not_care_for_bearers(world: World) -> None:
    before = rows(world.home)
    for rest in (world.nobody, world.admin, Rest(world.home, MASTER)):
        for route in server.ROUTES:
            if route.role == "agent" and route.method == "POST":
                assert 400 <= rest.call(route.method, route.path, {"network": "default"}).status < 500
    assert rows(world.home) == before


def test_rights_are_read_anew_for_each_request(world: World) -> None:
    world.admin.get("/api/users")
    server.set_user(world.home.core, "root", {"admin": False, "networks": "other"})
    assert world.admin.call("GET", "/api/users").status == 403
    assert world.admin.call("GET", "/api/nodes/default").status == 403
    assert [row["netid"] for row in world.admin.get("/api/networks")] == ["other"]


def test_a_new_owner_of_a_name_inherits_no_token(world: World) -> None:
    core = world.home.core
    token = api_token(world.home, "carol")
    server.remove_user(core, "carol")
    server.add_user(core, {"name": "carol", "password": PASSWORD, "admin": True})
    assert token.call("GET", "/api/networks").status == world.carol.call("GET", "/api/networks").status == 401


@pytest.mark.parametrize("header", ["Bearer ", "Bearer", "bearer  ", "Basic " + MASTER, MASTER, "Bearer\t" + MASTER])
def test_a_master_key_that_is_not_set_is_nobodys(home: Server, world: World, header: str) -> None:
    """Nor does an empty one or another scheme fit."""
    for server_ in (home, world.home):
        for method, path in (("GET", "/api/users"), ("POST", "/api/networks"), ("GET", "/metrics")):
            assert Rest(server_).call(method, path, {}, Authorization=header).status == 401


def test_a_bearer_is_taken_from_its_header_only(world: World) -> None:
    bearer = world.admin.bearer
    for query in ("access_token=", "token=", "bearer=", "Authorization=Bearer%20"):
        assert world.nobody.call("GET", "/api/users?" + query + bearer).status == 401
    for name in ("Cookie", "X_Authorization", "X_Auth_Token", "Proxy_Authorization", "Netmaker.caller", "netmaker_caller"):
        assert world.nobody.call("GET", "/api/users", None, **{name: "Bearer " + bearer}).status == 401


def test_a_limit_to_a_network_does_not_outlive_it(world: World) -> None:
    """Somebody makes another network of that name later: old tokens and users do not have it."""
    core = world.home.core
    token = api_token(world.home, "root", "limited", networks="other")
    both = api_token(world.home, "root", "both", networks="default,other")
    netmaker_core.remove_node(core, world.home.node(world.stranger))
    netmaker_core.remove_network(core, "other")
    world.home.network("other", "10.99.0.0/24")
    assert world.mallory.get("/api/networks") == []
    assert token.call("GET", "/api/networks").status == 401
    assert [row["netid"] for row in both.get("/api/networks")] == ["default"]
