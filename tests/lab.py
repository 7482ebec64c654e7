"""A lab in one machine: hosts, home routers with their NAT, and an internet, all Linux namespaces.

    with Lab() as lab:
        server = lab.public("server", "203.0.113.10")
        home = lab.router("home", "203.0.113.21")
        nas = lab.site("nas", home)
        assert nas.ping(server.ip).lost == 0

A host is a shell that holds a network, a mount and a UTS namespace and waits on its standard input;
what runs on the host has entered these namespaces. Its root is an overlay over the machine's:
programs are the machine's, as they are when the lab begins; whatever the host writes is its own and
is gone with it. Once the shell's input closes, be it because the tests were killed, it kills every
process that lives in its network, and ends. Links are born inside the namespaces: the machine's own
are never touched.

IPv4 is there unless an address is given as "", IPv6 where one is asked for (`ip6`, `wan6`, `lan6`). Routers translate IPv4; IPv6
they forward as it is, to their LAN's own public range, behind a firewall that lets nothing in unasked.

Needs root, iproute2, nftables, conntrack and iputils' ping.

Contents: ERRORS - PROCESSES - PINGS - HOST - SEGMENT - ROUTER - LAB
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Callable, Mapping, NamedTuple, Sequence, TypeVar

CODE = Path(__file__).resolve().parent.parent
INTERNET = "203.0.113.0/24"
INTERNET6 = "2001:db8::/64"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "NETCLIENT_SET_CLOCK": "no",  # all hosts share the machine's clock
}

T = TypeVar("T")
H = TypeVar("H", bound="Host")


# ---------------------------------------------------------------------------------------- ERRORS


class LabError(Exception):
    """The lab could not be built, or what it was asked for did not come about."""


class CommandFailed(LabError):
    """A command on a host failed; the message shows all that it said."""

    def __init__(self, host: str, argv: Sequence[str], how: str, out: str, err: str) -> None:
        super().__init__(f"{host}# {shlex.join(argv)}\n{how}\nstdout: {out}\nstderr: {err}")


def unfit(*tools: str) -> str:
    """Say in a sentence why this machine cannot hold a lab, with ``tools`` in it; "" if it can."""
    if os.geteuid() != 0:
        return "the lab is made of network namespaces: run it as root"
    needed = ("unshare", "nsenter", "ip", "bridge", "nft", "conntrack", "ping", *tools)
    missing = [tool for tool in needed if not shutil.which(tool, path=ENVIRONMENT["PATH"])]
    return f"the lab needs {', '.join(missing)}: install it" if missing else ""


def wait_for(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Ask until the answer is true, and give it; ``what`` says in words what is waited for."""
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(0.02)


# ------------------------------------------------------------------------------------- PROCESSES


def _spawn(
    argv: Sequence[str],
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int = subprocess.STDOUT,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start a process: everything that the lab runs is started here.

    Each gets a session of its own, so that Ctrl-C stops the tests and they stop the lab.
    """
    return subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={**ENVIRONMENT, **(env or {})},
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


# ----------------------------------------------------------------------------------------- PINGS


class Loss(NamedTuple):
    """What a ping sent, what came back, and the percentage that did not."""

    sent: int
    received: int
    percent: float

    @classmethod
    def of(cls, sent: int, received: int) -> Loss:
        """Add the percentage: 100 where nothing could be sent."""
        return cls(sent, received, 100.0 * (sent - received) / sent if sent else 100.0)

    @property
    def lost(self) -> int:
        """How many packets got no answer."""
        return self.sent - self.received


class Pinging:
    """A ping in the background: `stop` tells its loss, leaving the context ends it anyway."""

    def __init__(self, ping: subprocess.Popen[str], log: Path) -> None:
        self._ping = ping
        self._log = log
        self._loss: Loss | None = None
        wait_for(self._handles_sigquit, 5, "ping to start")

    def __enter__(self) -> Pinging:
        return self

    def __exit__(self, *_: object) -> None:
        self._ping.kill()
        self._ping.wait()

    def stop(self) -> Loss:
        """Stop, once the packets in flight have had up to a second to come back."""
        if self._loss is None:
            sent = self._count_sent()
            with contextlib.suppress(LabError):
                wait_for(lambda: self._count_answered(sent) == sent, 1, "the last answers")
            self._ping.send_signal(signal.SIGINT)
            self._ping.wait(timeout=5)
            self._loss = Loss.of(sent, self._count_answered(sent))
        return self._loss

    def _handles_sigquit(self) -> bool:
        if self._ping.poll() is not None:
            raise LabError(f"ping ended at once: {self._log.read_text()}")
        status = Path(f"/proc/{self._ping.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGQUIT - 1) & 1)

    def _count_sent(self) -> int:
        """Ask ping, which goes on: at SIGQUIT it prints "answered/sent packets"."""
        self._ping.send_signal(signal.SIGQUIT)
        found = wait_for(lambda: re.search(r"(?m)^\d+/(\d+) packets", self._log.read_text()), 5, "ping to count")
        return int(found.group(1)) if found else 0

    def _count_answered(self, sent: int) -> int:
        """Count how many of the first ``sent`` packets have an answer."""
        answered = re.findall(r"bytes from .*icmp_seq=(\d+)", self._log.read_text())
        return sum(seq <= sent for seq in {int(seq) for seq in answered})


# ------------------------------------------------------------------------------------------ HOST

# $1 a folder for mounts, $2 the host's name, $3… folders that an overlay over / does not show
HOLDER = """
state=$1 name=$2
shift 2
mount -t tmpfs lab "$state"
cd "$state"
mkdir upper work root
mount -t overlay -o "lowerdir=/,upperdir=$state/upper,workdir=$state/work" lab root
cd root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs run run
for folder; do
    mkdir -p ".$folder"
    mount --bind -o ro "$folder" ".$folder"
done
mkdir -p mnt
pivot_root . mnt
umount -l /mnt

echo "$name" >/proc/sys/kernel/hostname
echo "127.0.1.1 $name" >>/etc/hosts
rm -f /etc/resolv.conf
touch /etc/resolv.conf
ip link set lo up

sweep() {
    found=yes
    while [ "$found" ]; do
        found=
        for process in /proc/[0-9]*; do
            [ "$process/ns/net" -ef /proc/$$/ns/net ] && [ "$process" != /proc/$$ ] || continue
            found=yes
            kill -9 "${process#/proc/}"
        done
    done 2>/dev/null
}

set +e
echo ready
while read -r _; do
    sweep
    echo swept
done
sweep
"""

POWER_CYCLE = """
umount -l /run
mount -t tmpfs run /run
for kind in tun wireguard; do
    for link in $(ip -br link show type $kind | cut -d' ' -f1); do
        ip link del "$link" || true
    done
done
nft flush ruleset
conntrack -F
for switch in /proc/sys/net/ipv[46]/conf/*/forwarding; do echo 0 >"$switch"; done
"""


class Host:
    """A machine in the lab, made by `Lab`."""

    def __init__(self, lab: Lab, name: str, folder: Path) -> None:
        self.lab = lab
        self.name = name
        self.ip = ""
        self.ip6 = ""
        self._uplink: tuple[Host, str] | None = None
        self._logs = folder  # also where the holder mounts, which only its namespace sees
        self._logs.mkdir()
        self._started: list[subprocess.Popen[str]] = []
        unshare = ("unshare", "-n", "-m", "-u", "sh", "-ec", HOLDER, "lab", str(folder), name)
        self._holder = _spawn((*unshare, *lab.beside_root), stdin=subprocess.PIPE)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.ip or self.ip6}>"

    @property
    def pid(self) -> int:
        """The process that holds the host's namespaces."""
        return self._holder.pid

    # Commands

    def run(
        self,
        *argv: str,
        check: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; ``env`` comes on top of the lab's own small environment."""
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        with _spawn(self._inside(argv), stdin, stderr=subprocess.PIPE, env=env) as process:
            try:
                out, err = process.communicate(input, timeout)
            except subprocess.TimeoutExpired as late:
                said = [str(text or b"", "utf-8", "replace") for text in (late.output, late.stderr)]
                raise CommandFailed(self.name, argv, f"no end of it in {timeout:g} s", *said) from None
            finally:
                process.kill()
        if check and process.returncode:
            raise CommandFailed(self.name, argv, f"exit {process.returncode}", out, err)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command that goes on by itself; what it says is found in `log`."""
        return self._start(argv, env)[0]

    def agent(self, *args: str, **kw: Any) -> subprocess.CompletedProcess[str]:
        """Run netclient-lite; keywords as for `run`."""
        return self.run(*self.lab.agent_argv, *args, **kw)

    def server(self, *args: str, **kw: Any) -> subprocess.CompletedProcess[str]:
        """Run netmaker-lite; keywords as for `run`."""
        return self.run(*self.lab.server_argv, *args, **kw)

    def wg(self, interface: str) -> str:
        """Tell what `wg show` tells of an interface."""
        return self.run("wg", "show", interface).stdout

    def log(self) -> str:
        """All that the started commands have said: for the messages of failed tests."""
        logs = sorted(self._logs.iterdir())
        return "".join(f"==> {self.name}: {log.name}\n{log.read_text(errors='replace')}\n" for log in logs)

    # Files

    def read(self, path: str) -> str:
        """Read a file as the host sees it."""
        return self.run("cat", path).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file as the host sees it, and the folders above it."""
        self.run("sh", "-c", 'mkdir -p "${1%/*}/" && cat >"$1"', "write", path, input=text)

    # Pings

    def ping(self, dst: str, count: int = 3, interval: float = 0.2, timeout: float = 1) -> Loss:
        """Ping and count; a destination without a route is a loss too, not an error."""
        argv = ("ping", "-nq", f"-c{count}", f"-i{interval:g}", f"-W{timeout:g}", dst)
        answer = self.run(*argv, check=False, timeout=count * interval + timeout + 30)
        found = re.search(r"(\d+) packets transmitted, (\d+) received", answer.stdout)
        if found:
            return Loss.of(int(found.group(1)), int(found.group(2)))
        if "unreachable" in answer.stderr:
            return Loss.of(count, 0)
        raise CommandFailed(self.name, argv, "no count", answer.stdout, answer.stderr)

    def pinging(self, dst: str, interval: float = 0.01) -> Pinging:
        """Ping in the background until `Pinging.stop`; 0.01 s come out as some 0.016."""
        return Pinging(*self._start(("ping", "-n", f"-i{interval:g}", dst)))

    # Cable and power

    def cut(self) -> None:
        """Have the uplink carry nothing, as a line that is dead further on: its carrier stays."""
        self._uplink_state("0")

    def mend(self) -> None:
        """Have the uplink carry all again."""
        self._uplink_state("3")

    def reboot(self) -> None:
        """Lose power and start again: processes, tunnels, firewall and /run go, the disk stays.

        Nothing of the product starts by itself: the test is the host's init system.
        """
        self._sweep()
        self.run("sh", "-ec", POWER_CYCLE)
        self._boot()

    def _boot(self) -> None:
        """Do what the host's own system does at each start."""

    def _end(self) -> None:
        """Let the holder kill all and go; `_wait` until it has."""
        if self._holder.stdin and not self._holder.stdin.closed:
            self._holder.stdin.close()

    def _wait(self) -> None:
        for process in (self._holder, *self._started):
            process.wait(timeout=10)
        if self._holder.stdout:
            self._holder.stdout.close()

    # Inside

    def _sweep(self) -> None:
        """Have the holder kill all that lives here but itself."""
        assert self._holder.stdin
        self._holder.stdin.write("sweep\n")
        self._holder.stdin.flush()
        self._expect("swept")

    def _expect(self, answer: str) -> None:
        assert self._holder.stdout
        said = self._holder.stdout.readline()
        if said != f"{answer}\n":
            raise LabError(f"{self.name} is broken: {said}{self._holder.stdout.read()}")

    def _inside(self, argv: Sequence[str]) -> Sequence[str]:
        return ("nsenter", "-t", str(self.pid), "-n", "-m", "-u", "--", *argv)

    def _start(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[subprocess.Popen[str], Path]:
        path = self._logs / f"{len(self._started):03} {Path(argv[0]).name}"
        with path.open("w") as log:
            process = _spawn(self._inside(argv), stdout=log, env=env)
        self._started.append(process)
        return process, path

    def _ip(self, *lines: str) -> None:
        self.run("ip", "-batch", "-", input="\n".join(lines) + "\n")

    def _uplink_state(self, state: str) -> None:
        """Set the bridge's state for our port: 0 is disabled, 3 forwarding."""
        if not self._uplink:
            raise LabError(f"{self.name} has no uplink")
        far, port = self._uplink
        far.run("bridge", "link", "set", "dev", port, "state", state)


def adjacency(hosts: Mapping[Host, str], count: int = 3) -> dict[tuple[str, str], Loss]:
    """Ping every host's address from every other, all at once: {(from, to): loss}."""
    pairs = [(a, b) for a in hosts for b in hosts if a is not b]
    with ThreadPoolExecutor(max_workers=32) as threads:
        losses = threads.map(lambda pair: pair[0].ping(hosts[pair[1]], count), pairs)
        return {(a.name, b.name): loss for (a, b), loss in zip(pairs, losses)}


# --------------------------------------------------------------------------------------- SEGMENT


class Segment:
    """An Ethernet: a bridge on its owner, whose address there, the first, is the way out."""

    def __init__(self, owner: Host, bridge: str, *networks: str) -> None:
        self.owner = owner
        self.bridge = bridge
        self.networks = [ipaddress.ip_network(network) for network in networks if network]
        self.gateways = [str(network[1]) for network in self.networks]
        self._taken = set(self.gateways)
        self._ports = 0
        pairs = zip(self.gateways, self.networks)
        # else the bridge has the lowest MAC of its ports, which a new one would change: neighbours lose their gateway for a while
        mac = "02:" + os.urandom(5).hex(":")
        owner._ip(
            f"link add {bridge} address {mac} type bridge",
            f"link set {bridge} up",
            *(f"address add {gateway}/{network.prefixlen} dev {bridge} {_now(gateway)}" for gateway, network in pairs),
        )

    def connect(self, host: Host, link: str, ip: str | None = None, ip6: str | None = None) -> None:
        """Run a cable to a host, whose end gets an address of each family that is here, and is its way out.

        None: the next free one; "": none of this family.
        """
        self._ports += 1
        port = f"port{self._ports}"
        self.owner._ip(
            f"link add {port} type veth peer name {link} netns {host.pid}",
            f"link set {port} master {self.bridge} up",
        )
        host._ip(f"link set {link} up")
        for network, gateway in zip(self.networks, self.gateways):
            chosen = self._take(network, ip if network.version == 4 else ip6)
            if chosen:
                setattr(host, "ip" if network.version == 4 else "ip6", chosen)
                host._ip(
                    f"address add {chosen}/{network.prefixlen} dev {link} {_now(chosen)}",
                    f"route add default via {gateway}",
                )
        host._uplink = self.owner, port

    def isolate(self) -> None:
        """Keep the hosts apart: each talks to the owner alone, as guests in a Wi-Fi."""
        for number in range(1, self._ports + 1):
            self.owner.run("bridge", "link", "set", "dev", f"port{number}", "isolated", "on")

    def _take(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network, ip: str | None) -> str:
        if ip == "":
            return ""
        ip = ip or next(str(network[i]) for i in range(10, network.num_addresses) if str(network[i]) not in self._taken)
        if ip in self._taken or ipaddress.ip_address(ip) not in network:
            raise LabError(f"{ip} is taken, or not in {network}: choose another")
        self._taken.add(ip)
        return ip


def _now(ip: str) -> str:
    """What makes an IPv6 address usable at once: nobody is asked whether it is taken."""
    return "nodad" if ":" in ip else ""


# ---------------------------------------------------------------------------------------- ROUTER

# Dropping unasked packets at the input is what keeps hole punching possible: else they leave an
# entry in conntrack, and the answer to them then gets another source port.
FIREWALL = """
table ip home
delete table ip home
table ip home {
    chain input {
        type filter hook input priority filter
        iifname "wan" ct state new,invalid drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop
        ct state established,related accept
        iifname "br-lan" accept
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "wan" masquerade %s
    }
}
"""
FIREWALL6 = """
table ip6 home
delete table ip6 home
table ip6 home {
    chain input {
        type filter hook input priority filter
        iifname "wan" ct state new,invalid drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop
        ct state established,related accept
        iifname "br-lan" accept
    }
}
"""


class Router(Host):
    """A home router: NAT on ``wan`` that keeps ports unless it is symmetric, and a LAN behind."""

    lan: Segment
    symmetric = False

    def set_symmetric(self, symmetric: bool) -> None:
        """Give each connection a random port, or its own; those that stand are forgotten."""
        self.symmetric = symmetric
        self._boot()
        self.flush()

    def flush(self) -> None:
        """Forget all connections."""
        self.run("conntrack", "-F")
        self.run("conntrack", "-F", "-f", "ipv6")

    def _boot(self) -> None:
        _forward(self)
        self.run("nft", "-f", "-", input=FIREWALL % ("random,fully-random" * self.symmetric) + FIREWALL6)


def _forward(host: Host) -> None:
    host.write("/proc/sys/net/ipv4/ip_forward", "1")
    host.write("/proc/sys/net/ipv6/conf/all/forwarding", "1")


# ------------------------------------------------------------------------------------------- LAB


class Lab:
    """An internet to put hosts and routers on; the head of this file has an example."""

    internet: Host

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python
        self.agent_argv = (python, str(CODE / "netclient_lite.py"))
        self.server_argv = (python, str(CODE / "netmaker_lite.py"))
        self.hosts: dict[str, Host] = {}
        self.beside_root = _beside_root(python)
        self.folder: Path | None = None

    def __enter__(self) -> Lab:
        if unfit():
            raise LabError(unfit())
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
            self._make_internet()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all that lives in the lab and forget it; again does nothing."""
        hosts, self.hosts = self.hosts, {}
        try:
            for host in hosts.values():
                host._end()
            for host in hosts.values():
                host._wait()
        finally:
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def public(self, name: str, ip: str, ip6: str = "") -> Host:
        """Put a host on the internet."""
        host = self._add(Host, name)
        self._segment.connect(host, "eth0", ip, ip6)
        return host

    def router(
        self,
        name: str,
        wan_ip: str,
        lan: str = "192.168.1.0/24",
        symmetric: bool = False,
        wan6: str = "",
        lan6: str = "",
        behind: Router | None = None,
    ) -> Router:
        """Put a home router on the internet, or behind a carrier's, with a LAN and a NAT of its own; without ``lan``, for v6."""
        router = self._add(Router, name)
        (behind.lan if behind else self._segment).connect(router, "wan", wan_ip, wan6)
        router.lan = Segment(router, "br-lan", lan, lan6)
        if lan6 and wan6:
            self.internet._ip(f"route add {lan6} via {wan6}")
        router.set_symmetric(symmetric)
        return router

    def site(self, name: str, router: Router, ip: str | None = None, ip6: str | None = None) -> Host:
        """Put a host in a router's LAN, at ``ip`` and ``ip6``, or the next free addresses from .10 (::a) on."""
        host = self._add(Host, name)
        router.lan.connect(host, "eth0", ip, ip6)
        return host

    def log(self) -> str:
        """All that started commands have said on all hosts."""
        return "".join(host.log() for host in self.hosts.values())

    def _make_internet(self) -> None:
        self.internet = self._add(Host, "internet")
        self._segment = Segment(self.internet, "br-inet", INTERNET, INTERNET6)
        self.internet._ip("route add unreachable default", "route add unreachable ::/0")
        _forward(self.internet)

    def _add(self, kind: type[H], name: str) -> H:
        if not self.folder or name in self.hosts:
            raise LabError(f"no host {name!r} can be added: the lab is closed, or it has one")
        host = kind(self, name, self.folder / name)
        self.hosts[name] = host
        host._expect("ready")
        return host


def _beside_root(python: str) -> list[str]:
    """List the folders of the product and its Python that are on another file system than /."""
    homes = {Path(python).absolute().parent.parent, Path(python).resolve().parent.parent, CODE}
    root = Path("/").stat().st_dev
    return sorted(str(home) for home in homes if home.stat().st_dev != root)
