"""What a stranger answers, and what a hostile or confused server says, against the agent's own functions."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest
from agentkit import PRIVATE, Standing, config_of, record, view_of

import netclient_lite as agent


@contextlib.contextmanager
def answering(*answers):
    """A server that gives these raw answers, the last one again and again: (port, how many requests)."""
    sock = socket.create_server(("127.0.0.1", 0))
    count = [0]
    stop = threading.Event()

    def run():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                talk, _ = sock.accept()
                with talk:
                    talk.settimeout(2)
                    asked = talk.recv(65536)
                    n = min(count[0], len(answers) - 1)
                    count[0] += 1
                    a = answers[n]
                    talk.sendall(a(asked) if callable(a) else a)

    t = threading.Thread(target=run, daemon=True)
    t.start()
    try:
        yield sock.getsockname()[1], count
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        t.join(5)


def http(body, status="200 OK", more=""):
    return ("HTTP/1.0 %s\r\n%sContent-Length: %d\r\n\r\n" % (status, more, len(body))).encode("latin-1") + body


def session(port):
    secret = agent.Secret("demo", "0" * 16, "cap", b"a" * 32, b"z" * 32, b"s" * 32)
    return agent.Session(
        config_of(servers=["http://127.0.0.1:%d" % port]), secret, agent.Counters(), lambda: None, agent.System(agent.Run())
    )


FORGED = {
    "odd length": b"HTTP/1.0 200 OK\r\nContent-Length: \xb2\r\n\r\nx",
    "endless length": b"HTTP/1.0 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx",
    "endless status": b"HTTP/1.0 " + b"9" * 5000 + b" OK\r\n\r\nx",
    "a pin that is no text": http(b'{"pin": 1}'),
    "a list": http(b"[1]"),
    "deep": http(b"[" * 200000),
    "null": http(b"null"),
    "no utf-8": http(b"\xff\xfe{}"),
    "odd header": http(b"", more="NM-Lite: \xff 200 x y z\r\n"),
    "line": http(b"", more="NM-Lite: 1 200 x y z\r\n"),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_whatever_a_stranger_answers_is_no_answer(forged):
    with answering(forged) as (port, _), pytest.raises(agent.Unreachable):
        session(port).exchange()


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_whatever_a_stranger_says_for_a_key_is_none(forged):
    with answering(forged) as (port, _), pytest.raises(agent.BadAnswer):
        agent.fetch_pin(agent.SocketTransport(), "http://127.0.0.1:%d" % port)


class Stop(Exception):
    pass


def make_home(tmp_path, port):
    paths = agent.Paths(str(tmp_path))
    files = agent.Files()
    secret = agent.Secret("demo", "0" * 16, "cap", b"a" * 32, b"z" * 32, b"s" * 32)
    texts = {
        "wgkey": PRIVATE + "\n",
        "nettoken": "\n",
        "secret": secret.text(),
        "netconfig": config_of(servers=["http://127.0.0.1:%d" % port]).text(),
    }
    for kind, text in texts.items():
        files.write(paths.of(kind, "demo"), text)
    said = []
    run = agent.Run()
    return agent.Context(paths, run, files, agent.System(run, str(tmp_path)), said.append), said


@pytest.mark.parametrize("word", ["!", "7.00000007"])
def test_looks_that_lie_cost_little(tmp_path, monkeypatch, word):
    """A forged look, or one that comes from another address each time, may hurry check-ins, but not without end."""
    with answering(http(word.encode())) as (port, _count):
        context, _said = make_home(tmp_path, port)
        context.files.volatile(context.paths.of("state", "demo"), agent.Counters().text())
        checks = []

        def check_in(context, network, **_):
            checks.append(1)
            node = agent.Node.load(context, network)
            node.memory.exchanged = time.monotonic()
            node.counters.due = time.monotonic() + 300
            node.counters.word = "1.00000001"
            node.save_memory()
            node.save_counters()

        monkeypatch.setattr(agent, "check_in", check_in)
        stop = threading.Event()
        threading.Timer(1.5, stop.set).start()
        agent.follow(context, "demo", stop)
    assert len(checks) <= 4, len(checks)


def test_secret_in_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETCLIENT_ROOT", str(tmp_path))
    pin = agent.b64(b"p" * 32)
    with answering(http(json.dumps({"pin": pin}).encode())) as (port, _):
        for words in (
            ["--key=abc.AAAAAAAAAAAAAAAAAAAAAA"],
            ["-kabc.AAAAAAAAAAAAAAAAAAAAAA"],
            ["-k", "abc.AAAAAAAAAAAAAAAAAAAAAA"],
        ):
            argv = ["join", "-n", "demo", "--apiserver", "127.0.0.1:%d" % port, *words]
            monkeypatch.setattr(agent.sys, "argv", ["netclient", *argv])
            monkeypatch.setattr(agent.sys, "stdin", __import__("io").StringIO())
            agent.main(argv)
            said = capsys.readouterr()
            assert "server-key" in said.err
            assert "AAAAAAAAAAAAAAAAAAAAAA" not in said.err + said.out, words


def test_port_admin_vs_user(tmp_path):
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5"), port=51900))
    node = standing.node  # fixed 51821
    standing.settle()
    node.memory.facts = dict(node.facts())
    data = {"word": "2.00000002", "from": "1.00000001", "peers": [], "me": {**node.memory.view.me, "port": 51901}}
    node.counters.word, node.counters.incarnation = "1.00000001", node.memory.view.incarnation
    node.adopt(data)
    assert standing.kernel.actual().port == 51821
    told = agent.report(node.memory, node._live, node.fresh, node.facts(), {}, 1)
    assert told["facts"] == {"port": 51821}


def test_odd_endpoints_of_peers():
    text = "A\tB\t51821\toff\n" + "\n".join(
        "%s\t(none)\t%s\t(none)\t0\t0\t0\toff" % (k, e)
        for k, e in (("k1", "1.2.3.4:0"), ("k2", "[fe80::1%eth0]:51821"), ("k3", "(none)"), ("k4", "[2001:db8::1]:5"))
    )
    got = {k: p.endpoint for k, p in agent.parse_dump(text).peers.items()}
    assert got == {"k1": "", "k2": "", "k3": "", "k4": "[2001:db8::1]:5"}


def test_machine_hash_random(monkeypatch):
    files = {"eth0": ("02:00:00:00:00:01", "0"), "wlan0": ("0a:11:22:33:44:55", "3")}
    monkeypatch.setattr(agent.os, "listdir", lambda p: list(files))
    monkeypatch.setattr(agent.os.path, "exists", lambda p: True)
    monkeypatch.setattr(agent.os.path, "isdir", lambda p: True)

    def read(p):
        n = p.split("/")[4] if p.startswith("/sys/class/net/") else ""
        return files[n][0] if p.endswith("/address") else files[n][1] if p.endswith("addr_assign_type") else "id"

    monkeypatch.setattr(agent, "read_text", read)
    s = agent.System(agent.Run())
    one = s.machine_hash()
    files["wlan0"] = ("0e:99:22:33:44:55", "3")
    assert s.machine_hash() == one


def test_name_stops_resolving(tmp_path, monkeypatch):
    """The guard holds while DNS is down: else the server's route would go into the tunnel just then."""
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5", ips=["203.0.113.0/24"])))
    standing.node.counters.server = "http://vpn.example.org:8081"
    monkeypatch.setattr(agent._socket, "getaddrinfo", lambda host, port, *_: [(2, 1, 6, "", ("203.0.113.10", 0))])
    standing.settle()
    assert "203.0.113.0/24" not in standing.kernel.actual().routes

    def nothing(*_):
        raise agent._socket.gaierror(-3, "try again")

    monkeypatch.setattr(agent._socket, "getaddrinfo", nothing)
    standing.settle()
    assert "203.0.113.0/24" not in standing.kernel.actual().routes


def test_endpoint_about_to_be_set(tmp_path):
    standing = Standing(
        tmp_path,
        view_of(record("b", ip="10.20.30.5", ips=["198.51.100.0/24"]), record("c", ip="10.20.30.6", seen="198.51.100.7:51821")),
    )
    standing.settle()
    assert "198.51.100.0/24" not in standing.kernel.actual().routes


def test_requests_bounded(monkeypatch):
    pytest.importorskip("requests")
    monkeypatch.setattr(agent, "MAX_ANSWER", 100000)
    monkeypatch.delenv("http_proxy", raising=False)
    with answering(http(b"x" * 3000000)) as (port, _), pytest.raises(agent.BadAnswer):
        agent.RequestsTransport().send("http://127.0.0.1:%d" % port, agent.HELLO_PATH, "", b"", 5, False)
