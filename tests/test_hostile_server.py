"""What nobody may bring the server to do: stop housekeeping, park polls, answer 500, believe a forged hop."""

from __future__ import annotations

import os
import time

import pytest
from serverkit import Client, Server, make_core, wireguard_key

import netclient_lite as agent
import netmaker_lite as server


@pytest.mark.parametrize("number", ["1.%d" % 10**25, "%d.0" % 10**25, "%d.0" % (1 << 63), "\u00b2.0", "1.\u00b2"])
def test_numbers_beyond_the_databases_are_refused_and_housekeeping_lives(home, number):
    client = Client(home).join(home.key())
    client.exchange()
    line = client.line(number=number)
    status = posted(home, line, client.source)
    client.looked()
    dead = ""
    try:
        home.agents.flush()
    except Exception as e:
        dead = repr(e)
    assert status == 400 and not dead, (status, dead)


def posted(home, line, source):
    """An exchange whose line has bytes beyond ASCII, which a server reads as Latin-1."""
    head = "POST %s HTTP/1.0\r\nHost: x\r\nX-Forwarded-For: %s\r\nNM-Lite: %s\r\nContent-Length: 0\r\n\r\n"
    return home.send((head % (agent.EXCHANGE_PATH, source, line)).encode("latin-1"))[0]


def test_have_odd(home):
    client = Client(home).join(home.key())
    client.exchange()
    client.sequence += 1
    line = client.line(have="\u00b2.5b0c9a41")
    assert posted(home, line, client.source) == 200


def test_an_odd_length_is_a_refusal(home):
    """Web servers differ in what they let through: this digit is none to int."""
    said = []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/api/users/adm/authenticate", "CONTENT_LENGTH": "\u00b2"}
    home.app(environ, lambda status, *_: said.append(status))
    assert [status[:4] for status in said] == ["413 "]  # newer Pythons have other words for it


def test_a_stranger_parks_no_poll(home):
    began = time.monotonic()
    said = home.get(agent.LOOK_PATH + "nobody?have=!&wait=2")[2]
    assert said == b"!" and time.monotonic() - began < 1


def test_the_garbage_hop(tmp_path):
    home = Server(str(tmp_path / "d2"))
    try:
        got = home.get("/api/getip", "198.51.100.66, unknown")[2]
        got2 = home.get("/api/getip", "198.51.100.66, 203.0.113.9:4711")[2]
        assert (got, got2) == (b"127.0.0.1", b"203.0.113.9"), (got, got2)
    finally:
        home.stop()


def test_lone_surrogates(home, capfd):
    client = Client(home)
    client.try_join("")  # learns the incarnation
    nonce = os.urandom(16)
    body = b'{"proof": {"key": "\\ud800", "mac": "\\ud800"}, "facts": {"key": "%s"}}' % wireguard_key().encode()
    line = client.join_line(body, client.incarnation, nonce)
    status = home.post(agent.JOIN_PATH, line, body, client.source)[0]
    assert status == 400, status


def test_rejected_reason_is_printable(home):
    client = Client(home).join(home.key())
    client.exchange()
    client.exchange({"rejected": {"word": "1.00000000", "reason": "\x1b[2Jboo"}})
    shown = home.node(client)["rejected"]
    assert "\x1b" not in shown, shown


def test_rejected_surrogate(home):
    client = Client(home).join(home.key())
    client.exchange()
    client.sequence += 1
    body = b'{"rejected": {"word": "1.00000000", "reason": "\\ud800"}}'
    s = home.post(agent.EXCHANGE_PATH, client.line(body), body, client.source)[0]
    assert s in (200, 204, 400), s


def test_stand_in(tmp_path, monkeypatch):
    core = make_core(str(tmp_path), SERVER_HOST="box.example")
    monkeypatch.setattr(server.socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", ("127.0.1.1", 0))])
    monkeypatch.setattr(server, "default_address", lambda: "203.0.113.10")
    try:
        assert server.Sight(core.settings).public("127.0.0.1") == "203.0.113.10"
    finally:
        core.store.close()


def test_reloaded_member_keys(home):
    client = Client(home).join(home.key())
    client.exchange()
    # the database went back in time under the running server: history of the word in memory is gone
    home.core.store._write("UPDATE network SET tag = 'deadbeef' WHERE 1", ())
    home.core.store._write("UPDATE revision SET tag = 'deadbeef' WHERE 1", ())
    client.exchange()
