# SPDX-License-Identifier: Apache-2.0
"""Every secret of a busy run is looked for in every answer, log line and file of it, and found only where it belongs."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from restkit import MASTER, PASSWORD, Rest, Said, World, body_of, path_of
from serverkit import Client

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

REPO = Path(server.__file__).parent


@pytest.fixture
def settings() -> dict[str, str]:
    return {"MASTER_KEY": MASTER}


def spellings(secret: bytes) -> set[bytes]:
    """A key as others might write it."""
    plain, url = base64.b64encode(secret), base64.urlsafe_b64encode(secret)
    return {secret, plain, plain.rstrip(b"="), url.rstrip(b"="), secret.hex().encode(), secret.hex().upper().encode()}


def texts(*found: str) -> set[bytes]:
    return {each.encode() for each in found}


class Record:
    """What left the server over HTTP, and what was said in it that is shown once."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, Said]] = []
        self.once: dict[str, tuple[set[bytes], str]] = {}  # what → its spellings, the answer where it may be

    def take(self, label: str, said: Said) -> Said:
        self.answers.append((label, said))
        return said

    def shown(self, what: str, label: str, *secret: str) -> None:
        self.once[what] = (texts(*secret), label)


def busy(world: World, record: Record) -> None:
    """Everything once, by an administrator, by the user, by the master key and by strangers; and what makes secrets."""
    home = world.home
    for number, rest in enumerate((world.nobody, Rest(home, "nms_" + "x" * 43), world.carol, Rest(home, MASTER), world.admin)):
        for route in server.ROUTES:
            if route.path.endswith("/logout") or (route.method, route.path) == ("DELETE", "/api/users/<u>"):
                continue
            record.take(
                "%d %s %s" % (number, route.method, route.path),
                rest.call(route.method, path_of(route, world), body_of(route, world)),
            )
    label = "POST key"
    said = record.take(label, world.admin.call("POST", "/api/networks/default/keys", {"name": "shown", "uses": 0}))
    assert said.status == 200
    key = said.value["value"]
    record.shown("access key", label, key, key.partition(".")[2], said.value["accessstring"])
    Client(home, source="198.51.100.60").join(key).exchange()
    label = "POST token"
    said = record.take(label, world.admin.call("POST", "/api/users/root/tokens", {"name": "shown"}))
    assert said.status == 200
    record.shown("API token", label, said.value["value"])
    Rest(home, said.value["value"]).get("/api/networks")
    label = "sign in"
    asked = {"username": "root", "password": PASSWORD}
    said = record.take(label, world.nobody.call("POST", "/api/users/adm/authenticate", asked))
    assert said.status == 200
    record.shown("session", label, said.value["Response"]["AuthToken"])
    for wrong in ({"username": "root", "password": PASSWORD + "#wrong"}, [PASSWORD]):
        record.take("wrong sign in", world.nobody.call("POST", "/api/users/adm/authenticate", wrong))
    changed = {"password": PASSWORD + "#second"}
    assert record.take("new password", world.admin.call("PUT", "/api/users/carol", changed)).status == 200
    for path in [
        route.path for route in server.ROUTES if route.method == "GET" and "<" not in route.path and route.role != "agent"
    ]:
        record.take("GET " + path, world.admin.call("GET", path))
    world.node.exchange({"facts": {**world.node.facts, "port": 51900}})
    world.node.looked()


def forbidden(world: World) -> dict[str, set[bytes]]:
    """What is nowhere but with its owner, or in server.key."""
    core = world.home.core
    return {
        "password": texts(PASSWORD),
        "master key": texts(MASTER),
        "server.key": spellings(core.key.private),
        "an agent's auth key": spellings(world.node.auth),
        "another agent's auth key": spellings(world.stranger.auth),
        "what agent and server share": spellings(world.node.shared),
        "session": texts(world.admin.bearer),
        "the user's session": texts(world.carol.bearer),
        "API token": texts(world.token.bearer),
        "first access key": texts(world.access, world.access.partition(".")[2]),
        "other network's access key": texts(world.other_access, world.other_access.partition(".")[2]),
    }


def every_file(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.name, path.read_bytes()


def test_secrets_stay_where_they_belong(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    home, record = world.home, Record()
    busy(world, record)
    hashes = {name: texts(row["password"]) for name, row in ((row["name"], row) for row in server.users(home.core))}
    capabilities = {each.name: texts(each.look) for each in (world.node, world.second)}
    secret = forbidden(world)
    log = (caplog.text + "".join(capfd.readouterr())).encode()

    def look(place: str, text: bytes, among: dict[str, set[bytes]]) -> None:
        for what, words in among.items():
            assert not any(word in text for word in words), (what, place)

    everything = {**secret, **{name: words for name, (words, _) in record.once.items()}}
    everything["server's key, decoded token"] = spellings(home.core.key.private)
    for label, said in record.answers:
        heads = "".join("%s: %s\n" % pair for pair in said.headers.items()).encode()
        own = {name for name, (_, where) in record.once.items() if where == label}
        look(label, said.body + heads, {name: words for name, words in everything.items() if name not in own})
        look(label, said.body + heads, {**hashes, **capabilities})
        for token in re.findall(rb"[A-Za-z0-9_-]{40,}", said.body):  # tokens are encoded JSON
            look(label + ", decoded", base64.urlsafe_b64decode(token[: len(token) // 4 * 4]), secret)
    look("the log", log, {**everything, **hashes, **capabilities})
    home.core.store.copy(str(tmp_path / "data" / "copy"))
    netmaker_core.backup(home.core, str(tmp_path / "backup"), False)
    netmaker_core.backup(home.core, str(tmp_path / "backup-with-key"), True)
    checked = set()
    for name, content in every_file(tmp_path):
        checked.add(name)
        may = {
            "server.key": {"server.key", "server's key, decoded token"},
            "backup-with-key": {"server.key", "server's key, decoded token"},
        }
        look(name, content, {what: words for what, words in everything.items() if what not in may.get(name, set())})
    assert {"netmaker.db", "netmaker.db-wal", "server.key", "backup", "backup-with-key", "copy"} <= checked
    with_key = (tmp_path / "backup-with-key").read_bytes()
    assert agent.b64(home.core.key.private).encode() in with_key and (tmp_path / "server.key").exists() is False


def test_the_scan_finds_what_it_looks_for(world: World, tmp_path: Path) -> None:
    """A scan that finds nothing proves something only if it would find it."""
    store = world.home.core.store
    store.set_meta("urls", world.admin.bearer)
    found = [name for name, content in every_file(tmp_path) if world.admin.bearer.encode() in content]
    assert found
    assert any(word in (tmp_path / "data" / "server.key").read_bytes() for word in spellings(world.home.core.key.private))


def test_audit_log_and_dump_have_no_secrets(world: World) -> None:
    """Column by column: what the database says of secrets is hashed or sealed."""
    busy(world, Record())
    secret = forbidden(world)
    with io.StringIO() as out:
        copy = sqlite3.connect(":memory:")
        world.home.core.store._raw().backup(copy)
        out.writelines(copy.iterdump())
        copy.close()
        dump = out.getvalue().encode()
    for what, words in secret.items():
        assert not any(word in dump for word in words), what
    for (password,) in world.home.core.store.rows("SELECT password FROM account"):
        assert password.startswith("$argon2id$")


def test_the_servers_own_output(tmp_path: Path) -> None:
    """`serve` at its most talkative says the setup code, which is of use once, and no other secret."""
    values = {
        "PATH": "/usr/bin:/bin",
        "NETMAKER_DATA": str(tmp_path / "data"),
        "MASTER_KEY": MASTER,
        "VERBOSITY": "3",
        "API_PORT": "0",
    }
    port = free_port()
    values["API_PORT"] = str(port)
    command = [sys.executable, str(REPO / "netmaker_lite.py"), "serve", "--host", "127.0.0.1"]
    with subprocess.Popen(command, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout
            lines = [process.stdout.readline()]
            while "setup code" not in lines[-1]:
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            asked: Any = {"username": "root", "password": PASSWORD}
            home: Any = type("Home", (), {"port": port})
            assert Rest(home).call("POST", "/api/users/adm/createadmin", asked).status == 200
            token = Rest(home).call("POST", "/api/users/adm/authenticate", asked).value["Response"]["AuthToken"]
            for path in ("/api/networks", "/api/networks/x", "/api/users/" + PASSWORD.replace(" ", "%20")):
                Rest(home, token).call("GET", path)
                Rest(home, MASTER).call("GET", path)
        finally:
            process.terminate()
        text = "".join(lines) + process.stdout.read()
    key = (tmp_path / "data" / "server.key").read_text().strip()
    for word in (PASSWORD, MASTER, key, token, "argon2"):
        assert word not in text, text
    assert "Traceback" not in text and process.returncode == 0
    assert json.dumps(text).isascii()


def free_port() -> int:
    with server.listener("127.0.0.1", 0) as sock:
        return int(sock.getsockname()[1])
