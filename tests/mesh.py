"""A mesh in the lab: the real server over HTTP, real agents, real WireGuard. The stories and the demo are told with it.

with Lab() as lab:
    mesh = Mesh(lab)
    hub = mesh.join(mesh.host)
    nas = mesh.join(lab.site("nas", lab.router("home", "203.0.113.21")))
    nas.checkin()
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from typing import Any, Iterable, Mapping

from lab import Host, Lab, wait_for

SERVER_IP = "203.0.113.10"
SERVER_URL = f"http://{SERVER_IP}:8081"


class Member:
    """A host that is a node of one network."""

    def __init__(self, mesh: Mesh, host: Host, network: str) -> None:
        self.mesh, self.host, self.network = mesh, host, network
        self.interface = f"nm-{network}"

    def __repr__(self) -> str:
        return f"<Member {self.host.name}>"

    @property
    def status(self) -> dict[str, Any]:
        """What ``status --json`` says of the network."""
        entries = json.loads(self.host.agent("status", "--json").stdout)
        found: dict[str, Any] = next(entry for entry in entries if entry["network"] == self.network)
        return found

    @property
    def address(self) -> str:
        """The overlay address."""
        entries = json.loads(self.host.agent("list", "--json").stdout)
        return str(next(entry["address"] for entry in entries if entry["network"] == self.network))

    @property
    def address6(self) -> str:
        """The IPv6 overlay address."""
        return str(self.status["address6"])

    @property
    def name(self) -> str:
        return self.host.name

    def checkin(self, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One check-in, as cron does it."""
        return self.host.agent("checkin", "-n", "all", *flags, check=check)

    def leave(self) -> None:
        self.host.agent("leave", "-n", self.network)

    def daemon(self) -> None:
        """Start the resident daemon."""
        self.host.start(*self.mesh.lab.agent_argv, "daemon")

    def peers(self) -> set[str]:
        """The public keys that WireGuard has."""
        lines = self.host.run("wg", "show", self.interface, "peers").stdout
        return set(lines.split())

    def path(self, other: Member) -> str:
        """The path to another as status tells it."""
        return str(self.peer(other)["path"])

    def peer(self, other: Member) -> dict[str, Any]:
        """What status tells of another."""
        found: dict[str, Any] = next(peer for peer in self.status["peers"] if peer["name"] == other.name)
        return found

    def snapshot(self) -> str:
        """All that the agent owns on this machine, as text: equal before and after means that nothing changed."""
        run = self.host.run
        dump = run("wg", "show", self.interface, "dump").stdout.splitlines()
        # key, endpoint and allowed IPs; handshakes and traffic move by themselves
        peers = sorted("\t".join(line.split("\t")[i] for i in (0, 2, 3, 7)) for line in dump[1:])
        texts = [dump[0], *peers, run("ip", "addr", "show", "dev", self.interface).stdout]
        texts += [run("ip", "route").stdout, run("ip", "-6", "route").stdout]
        return "\n".join(texts)


class Mesh:
    """A server on a public host and the nodes of its networks. `host`, `serving`: another one, and its settings."""

    def __init__(
        self,
        lab: Lab,
        network: str = "demo",
        *settings: str,
        range4: str = "10.20.30.0/24",
        host: Host | None = None,
        serving: Mapping[str, str] | None = None,
    ) -> None:
        self.lab, self.network = lab, network
        self.host = host or lab.public("server", SERVER_IP)
        self.serving = serving or {"SERVER_HOST": SERVER_IP}
        self.serve()
        self.admin("network", "add", network, *(("--range", range4) if range4 else ()), *settings)
        self.members: list[Member] = []

    def serve(self) -> subprocess.Popen[str]:
        """Start the server and wait until it answers."""
        self.process = self.host.start(*self.lab.server_argv, "serve", env=self.serving)
        wait_for(self.answers, 15, "the server to answer")
        return self.process

    def answers(self) -> bool:
        script = "import urllib.request as u; u.urlopen('http://127.0.0.1:8081/api/health', timeout=2).read()"
        return self.host.run(self.lab.python, "-c", script, check=False).returncode == 0

    def kill(self) -> None:
        """The server dies without a word."""
        self.process.kill()
        self.process.wait()

    def admin(self, *args: str) -> str:
        """A command of netmaker-lite on the server's host."""
        return self.host.server(*args).stdout

    def token(self, uses: int = 1, network: str = "") -> str:
        made = self.admin("key", "add", network or self.network, "--uses", str(uses), "--json")
        return str(json.loads(made)["accessstring"])

    def join(self, host: Host, *flags: str, network: str = "") -> Member:
        """Join with a fresh token, unmanaged."""
        token = self.token(network=network)
        host.agent("join", "-t", token, "--name", host.name, "--daemon", "off", *flags)
        member = Member(self, host, network or self.network)
        self.members.append(member)
        return member

    def nodes(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self.admin("node", "list", self.network, "--json"))
        return listed

    def settle(self, members: Iterable[Member], timeout: float = 30) -> None:
        """Check in round after round, faster than cron would, until each pair has a live session."""
        chosen = list(members)

        def meshed() -> bool:
            for member in chosen:
                member.checkin()
            want = len(chosen) - 1
            return all(sum(p["path"] != "none" for p in m.status["peers"]) >= want for m in chosen)

        wait_for(meshed, timeout, f"{chosen} to be meshed")


class Cron:
    """Check-ins of several members every 15 s, each at its own second, as cron on machines that know nothing of each other."""

    def __init__(self, members: Iterable[Member], interval: float = 15.0) -> None:
        self.interval = interval
        self.stop_it = threading.Event()
        chosen = list(members)
        offsets = [interval * (number + 1) / (len(chosen) + 1) for number in range(len(chosen))]
        self.threads = [threading.Thread(target=self._run, args=pair) for pair in zip(chosen, offsets)]

    def _run(self, member: Member, offset: float) -> None:
        next_time = time.monotonic() + offset
        while not self.stop_it.wait(max(0.0, next_time - time.monotonic())):
            member.checkin(check=False)
            next_time += self.interval

    def __enter__(self) -> Cron:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_it.set()
        for thread in self.threads:
            thread.join()
