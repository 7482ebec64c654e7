# SPDX-License-Identifier: Apache-2.0
"""How much memory the server takes with 1,000 and with 10,000 nodes, each of which has made an exchange.

    python bench/resident.py

The nodes are put into the database as if they had joined long ago. Then the server is started on it as it is installed, from
bytecode, and all of them come, sealed as with PyNaCl, so that it has derived everybody's keys. At the end one fetches all peers.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from kit import NORMAL, SERVER, Figure, report, resident
from serverkit import Client, Server, make_core

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

BUDGETS = {1_000: 40.0, 10_000: 60.0}


class Elsewhere(Server):
    """A server in a process of its own, as `Client` speaks to it."""

    def __init__(self, folder: str) -> None:
        core = make_core(folder)
        netmaker_core.add_network(core, "default", {"range": "10.64.0.0/16"})
        self.core, self.known = core, core.key.pin
        with server.listener("127.0.0.1", 0) as sock:
            self.port = int(sock.getsockname()[1])

    @property
    def pin(self) -> bytes:
        return self.known

    def start(self) -> None:
        self.core.store.close()
        folder = self.core.settings.data
        environment = {**NORMAL, "NETMAKER_DATA": folder, "TRUSTED_PROXIES": "127.0.0.1", "SERVER_HOST": "203.0.113.10"}
        argv = (sys.executable, "-m", SERVER.stem, "serve", "--host", "127.0.0.1", "--port", str(self.port))
        self.process = subprocess.Popen(
            argv, env=environment, cwd=SERVER.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 15
        while not self.answers():
            if time.monotonic() > end:
                raise RuntimeError("the server does not start")
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            return self.get("/api/health")[0] == 200
        except OSError:
            return False

    def stop(self, flush: bool = True) -> None:
        self.process.terminate()
        self.process.wait()


def settled(home: Server, number: int) -> tuple[Client, dict[str, Any], dict[str, Any]]:
    """A node that joined long ago: the client, and its rows."""
    client = Client(home, source=str(ipaddress.IPv4Address("198.51.0.0") + number), sealed=True)
    client.node, client.look, client.epoch = os.urandom(8).hex(), agent.b64(os.urandom(16)), 1
    address = str(ipaddress.IPv4Address("10.64.0.1") + number)
    row = {**netmaker_core.blank(netmaker_core.Node), "id": client.node, "network": "default", "auth": agent.b64(client.public)}
    row.update(look=client.look, state=netmaker_core.ACTIVE, name="router-%d" % number, key=client.facts["key"], ip=address)
    row.update(port=51821, source=client.source, public=client.source, local="192.168.1.10", lan="9f31c2aa")
    row.update(machine=os.urandom(8).hex(), confirmed=True, changed=1, own_changed=1, since=1)
    return client, row, {"network": "default", "address": address, "node": client.node, "released": None}


def populated(home: Elsewhere, count: int) -> list[Client]:
    """So many nodes in the database, in one transaction."""
    clients = []
    writer: Any = home.core.store.writer
    with writer.atomic("IMMEDIATE"):
        for number in range(count):
            client, node, lease = settled(home, number)
            insert(writer, "node", node)
            insert(writer, "lease", lease)
            clients.append(client)
        writer.execute_sql("UPDATE network SET members = ?, cursor = ?", (count, count + 1))
    word = home.core.store.word("default")
    assert word
    for client in clients:
        client.incarnation, client.have = home.core.store.incarnation, "%d.%s" % word
    return clients


def insert(writer: Any, table: str, row: dict[str, Any]) -> None:
    columns = ", ".join('"%s"' % name for name in row)
    marks = ", ".join("?" * len(row))
    writer.execute_sql(netmaker_core.composed("INSERT INTO %s (%s) VALUES (%s)", table, columns, marks), [*row.values()])


def measure(count: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        home = Elsewhere(folder)
        clients = populated(home, count)
        home.start()
        try:
            process = home.process.pid
            idle = resident(process)
            for client in clients:
                if client.exchange().status != 204:
                    raise RuntimeError("an exchange brought news")
            busy = resident(process)
            clients[0].have = "-"
            assert len(clients[0].exchange()["peers"]) == count
            after = resident(process)
        finally:
            home.stop()
    name = f"{count:,} nodes"
    return [
        Figure(f"{name}: before anybody came", idle, None, "MB"),
        Figure(f"{name}: when all have come", busy, BUDGETS[count], "MB"),
        Figure(f"{name}: and one has fetched all peers", after, BUDGETS[count], "MB"),
    ]


def main() -> None:
    # an installed module has its bytecode; compiling takes ten megabytes, which a process keeps
    subprocess.run((sys.executable, "-c", f"import {SERVER.stem}"), cwd=SERVER.parent, env=NORMAL, check=True)
    report("Memory of the server", [figure for count in BUDGETS for figure in measure(count)])


if __name__ == "__main__":
    main()
