# SPDX-License-Identifier: Apache-2.0
"""What a check-in costs that brings nothing new, as the launcher starts it: `python3 -I -S netclient_quick.pyc checkin`.

    python bench/checkin.py

Against the real server in this process, over HTTP and over TLS. The yardstick is `python3 -I -S -c pass` of the same interpreter.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Iterator, Mapping

from kit import AGENT, NORMAL, Command, Figure, Starter, has_valgrind, instructions, pythons, report, version_of
from serverkit import Client, Server, clients

import netclient_lite as agent

LOCAL = "127.0.0.1"


class Counting:
    """A way to the server that counts the bytes of each direction, and ends TLS where it is given a certificate."""

    def __init__(self, port: int, certificate: str = "") -> None:
        self.target, self.sent, self.received = port, 0, 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self.context:
            self.context.load_cert_chain(certificate)
        self._socket = socket.create_server((LOCAL, 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection = self._socket.accept()[0]
            with self.context.wrap_socket(connection, server_side=True) if self.context else connection as near:
                self._pass_on(near)

    def _pass_on(self, near: socket.socket) -> None:
        """One request without a body, one answer to its end."""
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            piece = near.recv(65536)
            if not piece:
                return
            request += piece
        with socket.create_connection((LOCAL, self.target)) as far:
            far.sendall(request)
            answer = b"".join(iter(lambda: far.recv(65536), b""))
        near.sendall(answer)
        self.sent, self.received = len(request), len(answer)


class Standing:
    """The files of a node that is settled: what a check-in finds every 15 s."""

    def __init__(self, home: Server, folder: Path, server: str, key: str) -> None:
        self.client, self.root, self.server = Client(home, source=LOCAL, sealed=True).join(key), str(folder), server
        client = self.client
        self.state = folder / "var/run/netclient/default.state"
        self.state.parent.mkdir(parents=True)
        secrets = folder / "etc/netclient/config"
        secrets.mkdir(parents=True)
        known = agent.Secret("default", client.node, client.look, client.public, client.shared, client.home.pin)
        (secrets / "secret-default").write_text(known.text())
        self.refresh()

    def refresh(self) -> None:
        """It has heard of everything, and the next full check is nearly five minutes away."""
        done = agent.Counters(self.state.read_text() if self.state.exists() else "")
        client = self.client
        client.sequence = max(done.sequence, client.sequence)
        while client.exchange().status != 204:
            pass
        done.incarnation, done.epoch, done.sequence = client.incarnation, client.epoch, client.sequence
        done.word, done.mode, done.server = client.have, client.mode, self.server
        done.due, done.interface, done.local = time.monotonic() + agent.CHECK_EVERY - 5, "lo", LOCAL
        done.mark = agent.machine_mark(done.interface)
        self.state.write_text(done.text())
        self.state.with_suffix(".seen").write_text(agent.seen_text(done, client.look))

    def look(self) -> Command:
        """The same without Python."""
        return Command(("busybox", "ash", str(AGENT.parent / "shell/netclient-look")), self.root)

    def check_in(self, python: str, code: str) -> Command:
        return Command((python, "-I", "-S", code, "checkin"), self.root)

    def has_checked_in(self, times: int) -> bool:
        """Since `refresh`; each run takes one number, and one that went on to the full check-in remembers more."""
        taken = agent.Counters(self.state.read_text()).sequence - self.client.sequence
        return taken == times and not self.state.with_suffix(".memory").exists()


INSTALL = """
import sys
sys.path.insert(0, sys.argv[1])
import netclient_lite as agent
run = agent.Run()
agent.settle_in(agent.Context(agent.Paths(sys.argv[2]), run, agent.Files(), agent.System(run), print))
"""


def installed(python: str, folder: Path) -> str:
    """The agent's bytecode for an interpreter, as a join from a lone file installs it."""
    root = folder / ("installed-" + version_of(python))
    subprocess.run((python, "-c", INSTALL, str(AGENT.parent), str(root)), check=True, env=NORMAL)
    return str(root / "etc/netclient/netclient_quick.pyc")


def certificate(folder: Path) -> str:
    """A self-signed one, as pinned agents take it."""
    place = str(folder / "server.pem")
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=bench", "-keyout", place, "-out", place)
    subprocess.run(("openssl", "req", "-x509", "-nodes", "-days", "2", *made), check=True, capture_output=True)
    return place


# ---- the figures


def cpu_and_memory(plain: Standing, secure: Standing, code: Mapping[str, str]) -> Iterator[Figure]:
    """Medians of runs in turn."""
    rounds, warm = 41, 3
    for node in (plain, secure):
        node.refresh()
    commands = [each for python in code for each in (idle(python), *(n.check_in(python, code[python]) for n in (plain, secure)))]
    with Starter() as starter:
        spent = iter(starter.compare(commands, rounds, warm))
    if not all(node.has_checked_in(len(code) * (rounds + warm)) for node in (plain, secure)):
        raise RuntimeError("a check-in was not the quick one: is another program changing this machine's routes?")
    for python in code:
        name = "CPython " + version_of(python)
        floor, check, tls = next(spent), next(spent), next(spent)
        yield Figure(f"{name}: CPU of `-c pass`", floor.cpu, None, "ms")
        yield Figure(f"{name}: CPU of a check-in", check.cpu / floor.cpu, None, "x")
        yield Figure(f"{name}: CPU of one over https", tls.cpu / floor.cpu, None, "x")
        yield Figure(f"{name}: memory of a check-in", check.rss, 9.0, "MB")
        yield Figure(f"{name}: memory of one over https", tls.rss, None, "MB")


def counts(plain: Standing, secure: Standing, code: Mapping[str, str]) -> Iterator[Figure]:
    """Instructions and processes, by callgrind."""
    for python in code:
        name = "CPython " + version_of(python)
        for node in (plain, secure):
            node.refresh()
        floor = instructions(idle(python))
        check, tls = (instructions(node.check_in(python, code[python])) for node in (plain, secure))
        if not (plain.has_checked_in(1) and secure.has_checked_in(1)):
            raise RuntimeError("a check-in was not the quick one")
        yield Figure(f"{name}: instructions of `-c pass`", floor.instructions, None, "M")
        yield Figure(f"{name}: instructions of a check-in", check.instructions / floor.instructions, 1.1, "x")
        yield Figure(f"{name}: instructions of one over https", tls.instructions / floor.instructions, 4.5, "x")
        yield Figure(f"{name}: child processes of a check-in", check.processes - 1, 0)
        # beyond this size CPython reads the bytecode of a script by single bytes
        yield Figure(f"{name}: the bytecode", Path(code[python]).stat().st_size / 1024, 256, "KB")


def by_small_parent(command: Command) -> float:
    """MB at its highest, started by BusyBox' `time`, which is smaller itself; it shows four times what the kernel tells."""
    argv = ("busybox", "time", "-f", "%M", *command.argv)
    done = subprocess.run(argv, env={**NORMAL, "NETCLIENT_ROOT": command.root}, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) / 4 / 1024


def looks(node: Standing) -> Iterator[Figure]:
    """`netclient-look` by BusyBox, its shell and its wget."""
    python = next(iter(pythons()))
    node.refresh()
    before = node.state.read_text()
    with Starter() as starter:
        floor, look = starter.compare([idle(python), node.look()])
    if node.state.read_text() != before:
        raise RuntimeError("a look became a check-in")
    yield Figure(f"netclient-look: CPU, x of `-c pass` of CPython {version_of(python)}", look.cpu / floor.cpu, 0.5, "x")
    yield Figure("netclient-look: memory", by_small_parent(node.look()), 2.5, "MB")


def idle(python: str) -> Command:
    return Command((python, "-I", "-S", "-c", "pass"))


def payload(node: Standing, way: Counting, command: Command, key: str) -> Iterator[Figure]:
    """Bytes on the wire in a small network and in a large one."""
    for size in (2, 200):
        missing = size - len(node.client.home.agents.members.nodes)
        clients(node.client.home, missing, key)
        node.refresh()
        with Starter() as starter:
            starter.run(command)
        yield Figure(f"bytes both ways, {size} nodes ({way.sent} there, {way.received} back)", way.sent + way.received, 400, "B")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = Server(str(folder / "data"))
        try:
            home.network()
            measure(home, folder)
        finally:
            home.stop()


def measure(home: Server, folder: Path) -> None:
    key = home.key()
    way, secure_way = Counting(home.port), Counting(home.port, certificate(folder))
    plain = Standing(home, folder / "plain", f"http://{LOCAL}:{way.port}", key)
    secure = Standing(home, folder / "secure", f"https://{LOCAL}:{secure_way.port}", key)
    code = {python: installed(python, folder) for python in pythons()}
    report("A check-in without news: the wire", list(payload(plain, way, plain.check_in(*next(iter(code.items()))), key)))
    report("A check-in without news: time and memory (x: of `python3 -I -S -c pass`)", list(cpu_and_memory(plain, secure, code)))
    if shutil.which("busybox"):
        report("The same without Python, by BusyBox", list(looks(plain)))
    if has_valgrind():
        report("A check-in without news: counts", list(counts(plain, secure, code)))
    else:
        print("\nvalgrind is not installed: instructions are not counted")


if __name__ == "__main__":
    main()
