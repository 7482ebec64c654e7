# SPDX-License-Identifier: Apache-2.0
"""An administrator's client: JSON over HTTP to a running server, as a script with curl would."""

from __future__ import annotations

import http.client
import json
from typing import Any, Mapping, NamedTuple

from serverkit import Server

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


class Rest:
    """Calls with one bearer token, or none."""

    def __init__(self, home: Server, bearer: str = "") -> None:
        self.home, self.bearer = home, bearer

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Said:
        """`body`: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.home.port, timeout=60)
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.bearer:
            given.setdefault("Authorization", "Bearer " + self.bearer)
        try:
            connection.request(method, path, raw, {"Content-Type": "application/json", **given})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        kind = answer.getheader("Content-Type") or ""
        value = json.loads(data) if kind.startswith("application/json") and data else None
        return Said(answer.status, value, dict(answer.getheaders()), data)

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
    return Rest(home, server.sign_in(core, name, PASSWORD)["value"])


def api_token(home: Server, owner: str, name: str = "script", **values: Any) -> Rest:
    row = server.add_api_token(home.core, owner, {"name": name, **values})
    return Rest(home, row["value"])
