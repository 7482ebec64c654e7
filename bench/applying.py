# SPDX-License-Identifier: Apache-2.0
"""What it takes to apply changed peers on real WireGuard, and a lab of ten nodes with daemons that hear of a change.

    python bench/applying.py             as root; without root, or without the lab's tools, it says so and ends

In a namespace with wireguard-go and 200 peers the agent's own reconcile applies k changed ones; beside it one `wg set` a peer.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Iterator

from kit import Figure, report, resident
from lab import Host, Lab, unfit, wait_for
from mesh import Member, Mesh

import netclient_lite as agent

PEERS, TIMES, NODES = 200, 5, 10
INTERFACE = "nm-bench"


# ---- in the namespace


class Counting(agent.Run):
    """The door to processes, which notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[str, ...]] = []

    def __call__(self, *argv: str, stdin: str = "", detached: bool = False) -> str:
        self.started.append(argv)
        return super().__call__(*argv, stdin=stdin, detached=detached)


def record(number: int, port: int = 51821) -> dict[str, Any]:
    """A peer as the server tells of it."""
    key = base64.b64encode(number.to_bytes(32, "big")).decode()
    address = "%d.%d" % divmod(256 + number, 256)
    return {
        "id": "%016x" % number,
        "name": "peer-%d" % number,
        "key": key,
        "ip": "10.20." + address,
        "seen": f"203.0.{address}:{port}",
    }


def standing(root: str, run: Counting) -> agent.Node:
    """A node with a view of so many peers, and nothing on the machine yet."""
    me = {"name": "me", "ip": "10.20.0.1", "range": "10.20.0.0/16", "port": 51821, "keepalive": 20, "mtu": 1280}
    peers = {each["id"]: each for each in map(record, range(1, PEERS + 1))}
    values = {"word": "1.00000001", "incarnation": "i", "state": "active", "me": me, "peers": peers}
    system = agent.System(run, root)
    context = agent.Context(agent.Paths(root), run, agent.Files(), system, lambda sentence: None)
    written = {"version": 1, "network": "bench", "interface": INTERFACE, "servers": ["http://203.0.113.10"]}
    config = agent.Config.parse(json.dumps(written))
    secret = agent.Secret("bench", "f" * 16, "look", b"a" * 32, b"z" * 32, b"s" * 32)
    node = agent.Node(context, config, secret, agent.new_private())
    node.memory.view = agent.View(values)
    return node


def reconcile(node: agent.Node, run: Counting) -> tuple[int, int, float]:
    """Read and apply: (changing processes, all processes, ms)."""
    run.started.clear()
    start = time.monotonic()
    node.read()
    node.apply(node.memory.view)
    spent = (time.monotonic() - start) * 1e3
    return sum(argv in {step.argv for step in node.changes} for argv in run.started), len(run.started), spent


def inside() -> None:
    """Runs in the namespace; prints [k, changing processes, all processes, ms, ms of one `wg set` a peer]."""
    run = Counting()
    with tempfile.TemporaryDirectory() as root:
        node = standing(root, run)
        reconcile(node, run)
        port = 51821
        for changed in (0, 1, 10, 100):
            rounds = []
            for _ in range(TIMES):
                port += 1
                peers = {each["id"]: each for each in (record(number, port) for number in range(1, changed + 1))}
                node.memory.view.peers.update(peers)
                node.changes = []
                rounds.append((*reconcile(node, run), one_by_one(changed, port)))
            print(json.dumps([changed, *(median(column) for column in zip(*rounds))]))


def one_by_one(changed: int, port: int) -> float:
    """The endpoints again, as who knows no better sets them."""
    start = time.monotonic()
    for number in range(1, changed + 1):
        peer = record(number, port)
        words = ("peer", peer["key"], "endpoint", peer["seen"], "allowed-ips", peer["ip"] + "/32", "persistent-keepalive", "20")
        subprocess.run(("wg", "set", INTERFACE, *words), check=True)
    return (time.monotonic() - start) * 1e3


# ---- outside


def applied(host: Host) -> Iterator[Figure]:
    said = host.run(host.lab.python, os.path.abspath(__file__), "inside", timeout=120).stdout
    for changed, changing, started, spent, naive in map(json.loads, said.splitlines()):
        name = f"{changed} of {PEERS} peers changed"
        yield Figure(f"{name}: processes that change", changing, min(changed, 1))
        yield Figure(f"{name}: processes in all", started)
        yield Figure(f"{name}: time", spent, None, "ms")
        if changed:
            yield Figure(f"{name}: time of one `wg set` a peer", naive, None, "ms")


def heard(mesh: Mesh, members: list[Member]) -> Iterator[Figure]:
    """How long it takes until the daemons of all others have applied a change; how large a daemon is."""
    daemons = [member.host.start(*mesh.lab.agent_argv, "daemon") for member in members]
    try:
        wait_for(lambda: all(len(member.peers()) == len(members) - 1 for member in members), 60, "the daemons to be meshed")
        time.sleep(3)  # for every daemon to be in a long-poll again
        times = [until_heard(mesh, members, word) for word in ("disable", "enable") * 2]
        name = f"{len(members)} nodes with daemons: all have applied a change"
        yield Figure(f"{name}, from the start of the command", median(whole for whole, _ in times), 1, "s")
        yield Figure(f"{name}, from its end", median(rest for _, rest in times), None, "s")
        sizes = [resident(daemon.pid) for daemon in daemons]
        yield Figure("a daemon's memory", max(sizes), 30, "MB")
    finally:
        for daemon in daemons:
            daemon.kill()


def until_heard(mesh: Mesh, members: list[Member], word: str) -> tuple[float, float]:
    """Disable or enable the last node: seconds from the command's start, and from its end, until all others show it."""
    others, last = members[:-1], members[-1]
    want = len(members) - 1 - (word == "disable")
    start = time.monotonic()
    mesh.admin("node", word, mesh.network, last.name)
    end = time.monotonic()
    wait_for(lambda: all(len(member.peers()) == want for member in others), 30, "all others to hear")
    now = time.monotonic()
    time.sleep(2)  # for every daemon to be in a long-poll again
    return now - start, now - end


def main() -> None:
    if sys.argv[1:] == ["inside"]:
        inside()
        return
    missing = unfit("wg", "wireguard-go")
    if missing:
        print(f"\nleft out: {missing}")
        return
    with Lab() as lab:
        report("Applying changed peers, wireguard-go", list(applied(lab.public("alone", "203.0.113.99"))))
        mesh = Mesh(lab)
        members = [mesh.join(lab.public("node-%d" % number, "203.0.113.%d" % (100 + number))) for number in range(NODES)]
        report("Daemons", [*heard(mesh, members), agent_file()])


def agent_file() -> Figure:
    return Figure("the agent's file", Path(agent.__file__).stat().st_size / 1024, 150, "KB")


if __name__ == "__main__":
    main()
