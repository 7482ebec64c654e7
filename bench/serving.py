# SPDX-License-Identifier: Apache-2.0
"""What the server does for looks, exchanges, changes, joins and a new range: CPU, rows, commits, bytes.

    python bench/serving.py

The server runs in this process. Looks and exchanges enter at its WSGI application, joins and changes behind that, so that no
socket is in the figures; one pair of lines tells what they cost through waitress and a real connection.
"""

from __future__ import annotations

import io
import tempfile
import threading
import time
from functools import partial
from statistics import median
from typing import Any, Iterator, Sequence, cast

import bottle
from kit import Figure, cpu_times, report
from serverkit import Client, Server

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

ROUNDS, REPEAT = 9, 200


class Home(Server):
    """The server with its front door left out: a request of `Client` is a call, and what it costs is noted."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.spent = 0.0  # CPU ms of this thread in the server since somebody set it to 0

    def post(self, path: str, line: str, body: bytes, source: str = "") -> tuple[int, dict[str, str], bytes]:
        answer = self.agents.join if path == agent.JOIN_PATH else self.agents.exchange
        start = time.thread_time()
        reply = answer(line, body, source)
        self.spent += (time.thread_time() - start) * 1e3
        return reply.status, {agent.HEADER.lower(): reply.line}, reply.body


def newcomer(home: Server, number: int) -> Client:
    """A node with one IPv4 address, one public and one local endpoint."""
    client = Client(home, source="198.51.%d.%d" % divmod(256 + number, 256))
    client.facts.update(local="192.168.1.%d" % (number % 250 + 2), lan="9f31c2aa")
    client.wishes["name"] = "router-%d" % number
    return client


def grow(home: Server, nodes: list[Client], size: int, key: str) -> None:
    """Join until there are so many. Each says once that it is there, which ends its join."""
    for number in range(len(nodes), size):
        client = newcomer(home, number).join(key)
        client.have = client.looked() if number else "-"
        client.exchange()
        nodes.append(client)


class Trace:
    """What the database does: rows that came back, and commits."""

    def __init__(self, store: netmaker_core.Store) -> None:
        self.rows = self.commits = self.statements = 0
        reader, writer = cast(Any, store.reader), cast(Any, store.writer)
        self._reader, self._writer = reader.connection(), writer.connection()

    def __enter__(self) -> Trace:
        self._reader.row_factory = self._writer.row_factory = self._row
        self._writer.set_trace_callback(self._statement)
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.row_factory = self._writer.row_factory = None
        self._writer.set_trace_callback(None)

    def _row(self, cursor: object, row: tuple[Any, ...]) -> tuple[Any, ...]:
        self.rows += 1
        return row

    def _statement(self, sql: str) -> None:
        self.statements += 1
        self.commits += sql.startswith("COMMIT")


# ---- looks and exchanges that bring nothing new


def bare() -> Any:
    """The yardstick: the same web framework, a route that answers 204."""
    app = bottle.Bottle()

    def nothing() -> bytes:
        bottle.response.status = 204
        return b""

    app.route("/api/agent/v1/nothing", "GET", nothing)
    return app


def request_of(method: str, path: str, query: str, line: str, source: str) -> dict[str, Any]:
    """A request as a web server hands it over."""
    return {
        **{"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query, "CONTENT_LENGTH": ""},
        **{"SERVER_NAME": "bench", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.0", "REMOTE_ADDR": source},
        **{"HTTP_HOST": "bench", "HTTP_NM_LITE": line, "wsgi.version": (1, 0), "wsgi.url_scheme": "http"},
        **{"wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.multithread": True, "wsgi.multiprocess": False},
    }


def ask(app: Any, requests: Iterator[dict[str, Any]], wanted: str) -> None:
    """One call of a WSGI application."""
    said: list[str] = []
    answer = app(next(requests), lambda status, headers, problem=None: said.append(status))
    for _ in answer:
        pass
    if not said[0].startswith(wanted):
        raise RuntimeError(f"answered {said[0]}, not {wanted}")


def exchanges(node: Client, count: int) -> Iterator[dict[str, Any]]:
    """Requests prepared beforehand, each with the next number."""
    made = []
    for _ in range(count):
        node.sequence += 1
        made.append(request_of("POST", agent.EXCHANGE_PATH, "", node.line(), node.source))
    return iter(made)


def looks(node: Client, count: int) -> Iterator[dict[str, Any]]:
    query = "have=" + node.have
    return iter([request_of("GET", agent.LOOK_PATH + node.look, query, "", node.source) for _ in range(count)])


def unchanged(home: Home, node: Client) -> Iterator[Figure]:
    """The bulk of all requests, at the WSGI application."""
    while node.exchange().status != 204:
        pass
    count, name = (ROUNDS + 1) * REPEAT, f"{len(home.agents.members.nodes)} nodes"
    nothing = iter([request_of("GET", "/api/agent/v1/nothing", "", "", "") for _ in range(count)])
    work = ((bare(), nothing, "204"), (home.app, looks(node, count), "200"), (home.app, exchanges(node, count), "204"))
    jobs = [partial(ask, *each) for each in work]
    floor, look, exchange = cpu_times(jobs, ROUNDS, REPEAT)
    yield Figure(f"{name}: bare 204", floor, None, "µs")
    yield Figure(f"{name}: look", look / floor, 15, "x")
    yield Figure(f"{name}: exchange", exchange / floor, 15, "x")
    for what, made, wanted in (("look", looks(node, 1), "200"), ("exchange", exchanges(node, 1), "204")):
        with Trace(home.core.store) as trace:
            ask(home.app, made, wanted)
        yield Figure(f"{name}: rows read by a {what}".replace("a e", "an e"), trace.rows, 1)
        yield Figure(f"{name}: statements of the writer for a {what}".replace("a e", "an e"), trace.statements, 0)


def through_waitress(home: Home, node: Client) -> Iterator[Figure]:
    """The same with the web server and a connection for each request, as check-ins by cron have it."""
    sock = server.listener("127.0.0.1", 0)
    port = int(sock.getsockname()[1])
    plain = server.waitress_server(bare(), [sock], home.core.settings["POLL_LIMIT"])
    threading.Thread(target=plain.run, daemon=True).start()
    nothing = b"GET /api/agent/v1/nothing HTTP/1.0\r\n\r\n"

    def exchange() -> bytes:
        node.sequence += 1
        head = b"X-Forwarded-For: %s\r\n\r\n" % node.source.encode()
        return agent.post("127.0.0.1", home.port, "", agent.EXCHANGE_PATH, node.line())[:-2] + head

    floors, costs = [], []
    for _ in range(ROUNDS):
        floors.append(server_time(port, [nothing] * 100))
        costs.append(server_time(home.port, [exchange() for _ in range(100)]))
    yield Figure("through waitress: bare 204", median(floors), None, "µs")
    yield Figure("through waitress: exchange", median(costs) / median(floors), None, "x")


def server_time(port: int, requests: Sequence[bytes]) -> float:
    """CPU µs of a request in all threads of this process but ours."""
    ours, all_of_us = time.thread_time_ns(), time.process_time_ns()
    for request in requests:
        if agent.http("127.0.0.1", port, False, request)[0] != 204:
            raise RuntimeError("not a 204")
    spent = time.process_time_ns() - all_of_us - (time.thread_time_ns() - ours)
    return spent / len(requests) / 1e3


# ---- changes


def news(home: Home, nodes: Sequence[Client]) -> Iterator[Figure]:
    """What the others are told of k changed nodes, and what it costs to tell them."""
    observers = nodes[-50:]
    for changed in (1, 10, 100):
        for node in observers:
            node.exchange()
        have = observers[0].have
        for node in nodes[:changed]:
            node.exchange({"facts": {"port": node.facts["port"] + changed}})
        mesh = next(iter(home.agents.members.meshes.values()))
        before = len(mesh.blobs)
        with Trace(home.core.store) as trace:
            answers = [observer.exchange() for observer in observers]
        assert all(len(said["peers"]) == changed and said["from"] == have for said in answers)
        yield Figure(f"{changed} of {len(nodes)} changed: bytes a changed peer", len(answers[0].body) / changed, 256, "B")
        # one keyed row proves each answer fresh; rows of changes were read when the changes were made
        yield Figure(
            f"{changed} of {len(nodes)} changed: rows for each of {len(observers)} who hear", trace.rows / len(observers), 2
        )
        yield Figure(f"{changed} of {len(nodes)} changed: times it was put together", len(mesh.blobs) - before, 1)


def read_by_another(home: Home, node: Client) -> Iterator[Figure]:
    """Rows that a server reads for one change that another process has made."""
    netmaker_core.set_node(home.core, home.node(node), {"local": "192.168.1.77"})
    member = home.agents.members.nodes[node.node]
    with Trace(home.core.store) as trace:
        home.agents.members.prove(member.mesh)
    yield Figure(f"rows for a change by another process, {len(member.mesh.members)} nodes", trace.rows, 6)


def a_join(home: Home, number: int, key: str) -> tuple[float, float]:
    """CPU ms of the server for a join, and for the first exchange, which brings all peers."""
    client = newcomer(home, number)
    home.spent = 0.0
    client.join(key)
    joined, home.spent = home.spent, 0.0
    client.exchange()
    return joined, home.spent


def joins(home: Home, size: int, key: str) -> Iterator[Figure]:
    costs = [a_join(home, size + number, key) for number in range(21)]
    yield Figure(f"a join at {size} nodes: CPU", median(cost[0] for cost in costs), 20, "ms")
    yield Figure(f"its first exchange, a snapshot of {size} peers: CPU", median(cost[1] for cost in costs), None, "ms")


def first_200(folder: str) -> Iterator[Figure]:
    """Joins over HTTP, one after the other, until each client has its answer."""
    home = Server(folder)
    try:
        home.network()
        key = home.key()
        nodes = [newcomer(home, number) for number in range(200)]
        start = time.monotonic()
        for node in nodes:
            node.join(key)
        yield Figure("200 joins over HTTP: time", time.monotonic() - start, 2, "s")
        addresses = {row["ip"] for row in netmaker_core.nodes(home.core, "default")}
        yield Figure("200 joins over HTTP: addresses given twice", 200 - len(addresses), 0)
    finally:
        home.stop()


def new_range(home: Home, cidr: str) -> Iterator[Figure]:
    """All nodes get another address."""
    size = len(home.agents.members.nodes)
    with Trace(home.core.store) as trace:
        start = time.monotonic()
        netmaker_core.set_network(home.core, "default", {"range": cidr})
        spent = time.monotonic() - start
    yield Figure(f"new range for {size} nodes: time", spent, 1, "s")
    yield Figure(f"new range for {size} nodes: transactions", trace.commits, 1)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report("Joins", list(first_200(folder + "/first")))
        home = Home(folder + "/home")
        try:
            measure(home)
        finally:
            home.stop()


def measure(home: Home) -> None:
    home.network(cidr="10.20.0.0/16")
    key, nodes = home.key(), list[Client]()
    grow(home, nodes, 100, key)
    few = list(unchanged(home, nodes[0]))
    grow(home, nodes, 500, key)
    report("A new range", list(new_range(home, "10.30.0.0/16")))
    grow(home, nodes, 1000, key)
    report(
        "Looks and exchanges without news (x: of a bare 204)",
        [*few, *unchanged(home, nodes[0]), *through_waitress(home, nodes[0])],
    )
    report("A change, for those who must hear of it", [*news(home, nodes), *read_by_another(home, nodes[0])])
    report("Joins", list(joins(home, 1000, key)))


if __name__ == "__main__":
    main()
