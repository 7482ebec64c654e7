# SPDX-License-Identifier: Apache-2.0
"""A server in this process, and clients that speak the protocol with the agent's own WIRE functions."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from typing import Any, Iterable, Mapping

from waitress import wasyncore

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

PUBLIC = "198.51.100.%d"


class Clock:
    """Time that tests can move."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def make_core(folder: str, clock: Clock | None = None, **environment: str) -> netmaker_core.Core:
    values = {
        "NETMAKER_DATA": folder,
        "SERVER_HOST": "203.0.113.10",
        "TRUSTED_PROXIES": "127.0.0.1",
        **environment,
    }
    core = netmaker_core.open_core(netmaker_core.Settings({}, values))
    if clock is not None:
        core.clock = clock
    return core


class Sight(server.Sight):
    """Which addresses are this host's own must not depend on what else runs on it."""

    @staticmethod
    def _own(source: str) -> bool:
        return source.startswith("127.")


class Server:
    """The real server over HTTP on a free loopback port; what `serve` runs, without its process."""

    def __init__(self, folder: str, clock: Clock | None = None, bind: str = "127.0.0.1", **environment: str) -> None:
        self.folder = folder
        self.core = make_core(folder, clock, **environment)
        self.agents = server.Agents(self.core, Sight(self.core.settings))
        self.app = server.make_app(self.agents)
        sock = server.listener(bind, 0)
        self.port = int(sock.getsockname()[1])
        polls = self.core.settings["POLL_LIMIT"]
        self._server = server.waitress_server(self.app, [sock], polls)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self.keeper = server.Housekeeping(self.agents)
        self.keeper.start()

    @property
    def pin(self) -> bytes:
        return self.core.key.pin

    def stop(self, flush: bool = True) -> None:
        """Without `flush` as a crash would: what was to be written behind is lost."""
        if not flush:
            self.agents.members.nodes.clear()
        self.keeper.stop()
        self._server.task_dispatcher.shutdown()
        with contextlib.suppress(OSError):  # a loop that is awake anyway may have closed everything before it is woken
            self._server.trigger.pull_trigger(lambda: wasyncore.close_all(self._server._map))
        self._thread.join(10)
        self.core.store.close()

    # ---- what an administrator does

    def network(self, name: str = "default", cidr: str = "10.20.30.0/24", **more: Any) -> netmaker_core.Row:
        return netmaker_core.add_network(self.core, name, {"range": cidr, **more})

    def key(self, network: str = "default", uses: int | None = None, **more: Any) -> str:
        """An access key as "id.secret"."""
        return str(netmaker_core.add_key(self.core, network, uses=uses, **more)["value"])

    def node(self, client: Client) -> netmaker_core.Row:
        return netmaker_core.need_node(self.core, client.network, client.node)

    # ---- plain requests

    def get(self, path: str, source: str = "", timeout: float = 60) -> tuple[int, dict[str, str], bytes]:
        head = "GET %s HTTP/1.0\r\nHost: x\r\n" % path
        return self.send((head + _forwarded(source) + "\r\n").encode(), timeout)

    def post(self, path: str, line: str, body: bytes, source: str = "") -> tuple[int, dict[str, str], bytes]:
        request = agent.post("127.0.0.1", self.port, "", path, line, body)
        first, _, rest = request.partition(b"\r\n")
        return self.send(first + b"\r\n" + _forwarded(source).encode() + rest)

    def send(self, request: bytes, timeout: float = 60) -> tuple[int, dict[str, str], bytes]:
        status, headers, body, _ = agent.http("127.0.0.1", self.port, False, request, timeout)
        return status, headers, body

    def raw(self, request: bytes) -> bytes:
        """Everything that comes back, as bytes on the wire."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as sock:
            sock.sendall(request)
            pieces: list[bytes] = []
            while True:
                piece = sock.recv(65536)
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)


def _forwarded(source: str) -> str:
    return "X-Forwarded-For: %s\r\n" % source if source else ""


def wireguard_key() -> str:
    import base64

    return base64.b64encode(os.urandom(32)).decode()


class Said:
    """A verified answer: status and the opened body."""

    def __init__(self, status: int, body: bytes, answer: agent.Answer) -> None:
        self.status, self.body, self.answer = status, body, answer
        self.value: Any = json.loads(body) if body else None

    def __getitem__(self, name: str) -> Any:
        return self.value[name]

    def get(self, name: str, default: Any = None) -> Any:
        return (self.value or {}).get(name, default)


class Client:
    """A node as the protocol knows it, without WireGuard. It follows deltas like an agent."""

    def __init__(self, home: Server, network: str = "default", source: str = "198.51.100.1", sealed: bool = False) -> None:
        self.home, self.network, self.source = home, network, source
        self.mode = "s" if sealed else "p"
        self.auth = os.urandom(32)
        self.public = agent.public_key(self.auth)
        self.shared = agent.x25519(self.auth, home.pin)
        self.facts: dict[str, Any] = {"key": wireguard_key(), "port": 51821}
        self.wishes: dict[str, Any] = {}
        self.node = self.look = self.name = ""
        self.incarnation, self.epoch, self.sequence, self.have = "-", 0, -1, "-"
        self.peers: dict[str, dict[str, Any]] = {}
        self.me: dict[str, Any] = {}
        self.sent: tuple[str, bytes] = ("", b"")

    def key(self, label: str) -> bytes:
        return agent.label_key(self.shared, label, self.public, self.home.pin, self.network)

    def seal(self, body: bytes) -> bytes:
        box = agent.secret_box(self.key("seal"))
        return bytes(box.encrypt(body)) if self.mode == "s" and body else body

    def opened(self, line: str, headers: Mapping[str, str], body: bytes) -> Said:
        answer = agent.Answer(self.key("answer mac"), line.rpartition(" ")[2], headers.get("nm-lite", ""), body)
        plain = agent.unseal(agent.secret_box(self.key("seal")), body) if self.mode == "s" else body
        return Said(answer.status, plain, answer)

    # ---- join

    def join_line(self, body: bytes, incarnation: str, nonce: bytes) -> str:
        fields = (agent.b64(self.public), self.network, self.mode, incarnation, agent.b64(nonce))
        return agent.signed(self.key("request mac"), agent.JOIN_PATH, fields, body)

    def join_body(self, access_key: str, nonce: bytes) -> bytes:
        asked: dict[str, Any] = {"facts": self.facts, "wishes": self.wishes}
        if access_key:
            key_id, _, secret = access_key.partition(".")
            proof = agent.key_proof(agent.unb64(secret), self.key("proof"), nonce)
            asked["proof"] = {"key": key_id, "mac": proof}
        return self.seal(json.dumps(asked).encode())

    def try_join(self, access_key: str = "") -> Said:
        line = self.join_line(b"", "-", os.urandom(16))
        _, headers, body = self.home.post(agent.JOIN_PATH, line, b"", self.source)
        self.incarnation = self.opened(line, headers, body)["incarnation"]
        nonce = os.urandom(16)
        asked = self.join_body(access_key, nonce)
        line = self.join_line(asked, self.incarnation, nonce)
        self.sent = (line, asked)
        return self.opened(line, *self.home.post(agent.JOIN_PATH, line, asked, self.source)[1:])

    def join(self, access_key: str = "") -> Client:
        said = self.try_join(access_key)
        assert said.status == 200, said.value
        self.node, self.look, self.name = said["node"], said["look"], said["name"]
        return self

    # ---- exchange

    def line(self, body: bytes = b"", challenge: str = "-", who: str = "", **other: Any) -> str:
        fields = {
            "node": who or self.node,
            "mode": self.mode,
            "incarnation": self.incarnation,
            "number": "%d.%d" % (self.epoch, self.sequence),
            "challenge": challenge,
            "have": self.have,
            "nonce": agent.b64(os.urandom(16)),
            **other,
        }
        return agent.signed(self.key("request mac"), agent.EXCHANGE_PATH, [*fields.values()], body)

    def send(self, line: str, body: bytes, source: str = "") -> Said:
        self.sent = (line, body)
        status, headers, answer = self.home.post(agent.EXCHANGE_PATH, line, body, source or self.source)
        said = self.opened(line, headers, answer)
        assert said.status == status
        return said

    def ask(self, report: Mapping[str, Any] | None = None, challenge: str = "-") -> Said:
        """One exchange, as it comes; nothing is followed up."""
        body = self.seal(json.dumps(report).encode()) if report is not None else b""
        return self.send(self.line(body, challenge), body)

    def exchange(self, report: Mapping[str, Any] | None = None) -> Said:
        """An exchange to its end: goes on after a 409, answers challenges, applies what comes."""
        self.sequence += 1
        said = self.ask(report)
        for _ in range(3):
            if said.status != 409 or "error" in said.value:
                break
            if "challenge" in said.value:
                said = self.ask(report, said["challenge"])
            else:
                self.incarnation, self.epoch, self.sequence = said["incarnation"], said["epoch"] + 1, 0
                said = self.ask(report)
        if said.status == 200:
            self.apply(said)
        return said

    def apply(self, said: Said) -> None:
        records = {record["id"]: record for record in said["peers"]}
        self.peers = {**self.peers, **records} if "from" in said.value else records
        if "from" in said.value:
            assert said["from"] == self.have
        for node in said.get("gone", ()):
            self.peers.pop(node, None)
        self.me = said.get("me", self.me)
        self.have = said["word"]

    def names(self) -> set[str]:
        return {record["name"] for record in self.peers.values()}

    def looked(self, have: str = "", wait: int = 0, source: str = "") -> str:
        path = "%s%s?have=%s&wait=%d" % (agent.LOOK_PATH, self.look, have or self.have, wait)
        return self.home.get(path, source or self.source)[2].decode()


def clients(home: Server, count: int, access_key: str, **more: Any) -> list[Client]:
    """So many joined clients, each behind a public address of its own."""
    found = []
    for number in range(1, count + 1):
        source = "198.51.%d.%d" % (100 + number // 250, number % 250 + 1)
        found.append(Client(home, source=source, **more).join(access_key))
    return found


def settle(nodes: Iterable[Client]) -> None:
    """Let everyone hear of everything."""
    for _ in range(2):
        for node in nodes:
            node.exchange()
