# SPDX-License-Identifier: Apache-2.0
"""shell/netclient-look: what it calls, when it becomes the agent's check-in, and that it costs neither Python nor flash."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Sequence

import pytest
from agentkit import REPO
from lab import Lab, unfit, wait_for
from mesh import Mesh
from vmkit import PARTS

import netclient_lite as agent

LOOK = REPO / "shell/netclient-look"
# Debian's static BusyBox prefers its own applets to stubs; the other one is unpacked by shell/test.sh.
BUSYBOX = PARTS / "busybox/bin/busybox"
SHELLS = [*([f"{BUSYBOX} ash"] if BUSYBOX.exists() else []), *(["dash"] if shutil.which("dash") else [])]
WORD = "12.5b0c9a41"
URL = f"http://203.0.113.10:8081/api/agent/v1/look/capability?have={WORD}"
FETCHERS = {
    "uclient-fetch": f"uclient-fetch -q -T 5 --no-check-certificate -O - {URL}",
    "wget": f"wget -q -t 1 -T 5 -O - {URL}",
    "curl": f"curl -fgks -m 8 {URL}",
}
TOOLS = ("sed", "sleep", "cat")  # of which it uses the first two


class Machine:
    """A tree of the agent's files, and a PATH of stubs that write down what is called."""

    def __init__(self, folder: Path, *fetchers: str, shell: str = SHELLS[0] if SHELLS else "") -> None:
        self.root, self.bin, self.shell = folder / "root", folder / "bin", shell
        self.run_folder, self.config = self.root / "var/run/netclient", self.root / "etc/netclient/config"
        for path in (self.run_folder, self.config, self.bin):
            path.mkdir(parents=True)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or "")
        self.calls, self.answer = folder / "calls", folder / "answer"
        self.stub(self.root / "etc/netclient/netclient", 'echo "agent $*" >>CALLS')
        for name in fetchers:
            self.stub(self.bin / name, f'echo "{name} $*" >>CALLS; cat ANSWER')
        self.says(WORD)

    def stub(self, path: Path, script: str) -> None:
        path.write_text("#!/bin/sh\n" + script.replace("CALLS", str(self.calls)).replace("ANSWER", str(self.answer)) + "\n")
        path.chmod(0o755)

    def says(self, text: str) -> None:
        self.answer.write_text(text)

    def joined(
        self,
        network: str = "demo",
        due: float = 200,
        interface: str = "lo",
        address: str = "127.0.0.1",
        seen: Sequence[str] | None = None,
    ) -> None:
        """The files of a settled membership, whose interface is this machine's own loopback."""
        uptime = int(float(Path("/proc/uptime").read_text().split()[0]))
        counters = agent.Counters()
        counters.word, counters.server, counters.due = WORD, "http://203.0.113.10:8081", uptime + due if due else 0
        counters.interface, counters.local = interface, address
        head, *lines = agent.seen_text(counters, "capability").splitlines()
        lines = lines if seen is None else [*seen]
        (self.run_folder / f"{network}.seen").write_text("\n".join([head, *lines]) + "\n")
        secret = agent.Secret(network, "node", "capability", bytes(32), bytes(32), bytes(32))
        (self.config / f"secret-{network}").write_text(secret.text())

    def look(self, *options: str, **environment: str) -> list[str]:
        """Run it; the calls that it made. It says nothing and succeeds."""
        self.calls.write_text("")
        env = {"PATH": str(self.bin), "NETCLIENT_ROOT": str(self.root), **environment}
        program, *rest = self.shell.split()
        argv = (shutil.which(program) or "", *rest, str(LOOK), *options)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return self.calls.read_text().splitlines()


@pytest.fixture(params=SHELLS or [pytest.param("", marks=pytest.mark.skip(reason="neither busybox nor dash is here"))])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


AGENT = ["agent checkin -n all"]


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_one_question_where_nothing_is_new(tmp_path: Path, shell: str, fetcher: str) -> None:
    machine = Machine(tmp_path, fetcher, shell=shell)
    machine.joined()
    assert machine.look() == [FETCHERS[fetcher]]
    assert machine.look("-j", "0") == [FETCHERS[fetcher]]
    seen = machine.run_folder / "demo.seen"
    seen.write_text(seen.read_text().replace("http://", "https://"))
    unchecked = {"wget": "-O - --no-check-certificate"}.get(fetcher, "-O -")
    assert machine.look() == [FETCHERS[fetcher].replace("http://", "https://").replace("-O -", unchecked)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("13.00000001", AGENT), ("!", AGENT), ("", []), ("<html>sign in</html>", []), ("Moved\n" * 1000, [])],
    ids=["another word", "come", "nothing", "a portal", "much"],
)
def test_what_the_server_says(tmp_path: Path, shell: str, answer: str, expected: list[str]) -> None:
    """Its word is a hint: another one starts the agent; no answer, and what is none, is not acted on."""
    machine = Machine(tmp_path, "wget", shell=shell)
    machine.joined()
    machine.says(answer)
    assert machine.look() == [FETCHERS["wget"], *expected]


def test_what_is_not_as_the_agent_left_it(tmp_path: Path, shell: str) -> None:
    machine = Machine(tmp_path, "wget", shell=shell)
    usual = agent.routes_of("lo")
    for odd in ({"due": 0}, {"due": -1}, {"due": 4000}, {"interface": "nm-gone"}, {"address": "192.0.2.77"}):
        machine.joined(**odd)  # type: ignore[arg-type]
        assert machine.look() == AGENT, odd
    for seen in ([*usual, "lo 0000000A 00000000 0001 000000FF"], ["eth9 00000000 0100A8C0 0003 00000000", *usual]):
        machine.joined(seen=seen)
        assert machine.look() == AGENT, seen
    machine.joined()
    path = machine.run_folder / "demo.seen"
    text = path.read_text()
    for damaged in ("", "x", text[: len(text) // 3], text.replace("http://", "ftp://")):
        path.write_text(damaged)
        assert machine.look() == AGENT, damaged
    path.unlink()
    assert machine.look() == AGENT


def test_several_networks_are_asked_at_once(tmp_path: Path, shell: str) -> None:
    machine = Machine(tmp_path, shell=shell)
    answers = 'case "$*" in *10:8081*) sleep 1 ;; *) sleep 1; echo 12.5b0c9a41 ;; esac'
    machine.stub(machine.bin / "wget", f'echo "wget $*" >>CALLS; {answers}')
    for network in ("one", "two", "three"):
        machine.joined(network)
    seen = machine.run_folder / "two.seen"
    seen.write_text(seen.read_text().replace("203.0.113.10", "203.0.113.20"))
    began = time.monotonic()
    assert len(machine.look()) == 3
    assert time.monotonic() - began < 2.5  # a deadline, not a measurement: in turn it would be three
    seen.write_text(seen.read_text().replace(WORD, "11.00000000"))
    assert machine.look()[3:] == AGENT


def test_it_leaves_quietly(tmp_path: Path, shell: str) -> None:
    """With nothing joined, and while another one is at it; after booting it is the agent's turn."""
    machine = Machine(tmp_path, "wget", shell=shell)
    assert machine.look() == []
    machine.joined()
    uptime = Path("/proc/uptime").read_text().split(".")[0]
    (machine.run_folder / "look").write_text(f"{os.getpid()} {uptime}\n")
    assert machine.look() == []
    (machine.run_folder / "look").write_text(f"{os.getpid()} {int(uptime) - 200}\n")  # the number is another process's by now
    assert machine.look() == [FETCHERS["wget"]]
    shutil.rmtree(machine.run_folder)
    assert machine.look() == AGENT


def test_a_fetcher_that_crashes_at_its_option_is_used_without(tmp_path: Path, shell: str) -> None:
    """Debian 12's BusyBox does, at -T."""
    machine = Machine(tmp_path, shell=shell)
    machine.stub(machine.bin / "wget", 'echo "wget $*" >>CALLS; case "$*" in *-T*) kill -SEGV $$ ;; esac; cat ANSWER')
    machine.joined()
    plain = FETCHERS["wget"].replace("-T 5 ", "")
    assert machine.look() == [FETCHERS["wget"]]
    assert machine.look() == machine.look() == [plain]


def test_wrong_words_are_answered_with_the_right_ones(shell: str) -> None:
    for words, status in ((["-x"], 2), (["-j"], 2), (["-j", "2s"], 2), (["--help"], 0)):
        done = subprocess.run([*shell.split(), str(LOOK), *words], capture_output=True, text=True, check=False)
        assert done.returncode == status and "netclient-look [-j SECONDS]" in done.stdout + done.stderr


# -- real

UNFIT = unfit("wg", "busybox")


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(240)
def test_looks_of_a_real_node(lab: Lab) -> None:
    """BusyBox for shell and wget, the real server: 100 looks start no Python and write nothing to flash."""
    mesh = Mesh(lab)
    one, two = [mesh.join(lab.public(name, ip)) for name, ip in (("one", "203.0.113.30"), ("two", "203.0.113.31"))]
    host = one.host
    host.run("sh", "-c", "for name in sh wget sed sleep; do ln -sf $(command -v busybox) /usr/local/sbin/$name; done")
    host.run("mv", "/etc/netclient/netclient", "/etc/netclient/real")
    host.write("/etc/netclient/netclient", '#!/bin/sh\necho "$*" >>/tmp/started\nexec /etc/netclient/real "$@"\n')
    host.run("chmod", "755", "/etc/netclient/netclient")

    def looks(times: int = 1) -> int:
        """How often the agent was started by that many looks."""
        loop = f"i=0; while [ $i -lt {times} ]; do sh {LOOK}; i=$((i + 1)); done"
        return int(host.run("sh", "-c", f": >/tmp/started; {loop}; wc -l </tmp/started").stdout)

    def settled() -> bool:
        """For two minutes after a change of peers the agent goes on by itself."""
        two.checkin()
        host.run("sh", "-c", "sleep 5; touch /tmp/mark")
        return looks() == 0 and looks(100) == 0

    wait_for(settled, 200, "100 looks of a settled node without the agent")
    assert host.run("find", "/etc", "-newer", "/tmp/mark").stdout == ""

    mesh.admin("network", "set", "demo", "mtu=1300")
    assert looks() == 1
    assert "mtu 1300" in host.run("ip", "link", "show", "nm-demo").stdout
    host.run("ip", "link", "del", "nm-demo")
    assert looks() == 1
    assert "mtu 1300" in host.run("ip", "link", "show", "nm-demo").stdout
