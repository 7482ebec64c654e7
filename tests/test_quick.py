# SPDX-License-Identifier: Apache-2.0
"""The check-in of every 15 s where nothing is new: what it loads, writes and sends, and when it leaves the rest to the rest.

It runs as launchers start it, `python -I -S netclient_lite.pyc checkin`, against a server of a few lines that signs its answers.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import time

import pytest
from agentkit import AGENT, config_of
from kernel import key_like

import netclient_lite as agent
from netclient_lite import Counters, Secret, machine_mark

NODE, LOOK, INCARNATION, WORD = "5f3a9c0e7b1d2468", "m3Jq0n9x2b8VtYwKzR5uPg", "Zk3vQ9wXy0E", "12.5b0c9a41"
QUICK_PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable


class Server(socketserver.ThreadingTCPServer):
    """Answers each exchange with a status and its own signature, or with what it is told to answer."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, secrets):
        super().__init__(("127.0.0.1", 0), Handler)
        self.secrets = {secret.node: secret for secret in secrets}
        self.status, self.body, self.raw, self.key = 204, b"", None, "answer mac"
        self.requests, self.seen, self.bytes = [], {}, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.server_address[1]

    def answer(self, line, asked):
        """The answer to a request's line and body, once its MAC and its number have been checked."""
        fields = line.split(" ")
        secret = self.secrets[fields[1]]
        head = line.rpartition(" ")[0]
        proof = agent.mac(secret.key("request mac"), b"POST " + agent.EXCHANGE_PATH.encode(), head.encode(), asked)
        assert fields[-1] == proof
        assert fields[0] == agent.PROTOCOL
        number = tuple(map(int, fields[4].split(".")))
        assert number > self.seen.get(fields[1], (-1, -1))
        self.seen[fields[1]] = number
        shown = f"1 {self.status} 203.0.113.7 {int(time.time())} 15"
        proof = agent.mac(secret.key(self.key), shown.encode(), fields[-1].encode(), self.body)
        length = f"Content-Length: {len(self.body)}\r\n" if self.body else ""
        return f"HTTP/1.0 {self.status} X\r\nNM-Lite: {shown} {proof}\r\n{length}\r\n".encode() + self.body


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        data = b""
        while not agent._complete(data):
            piece = self.request.recv(65536)
            if not piece:
                return
            data += piece
        self.server.requests.append(data)
        line = re.search(rb"\r\nNM-Lite: ([^\r]*)\r\n", data).group(1).decode()
        asked = data.partition(b"\r\n\r\n")[2]
        answer = self.server.answer(line, asked) if self.server.raw is None else self.server.raw
        self.server.bytes += len(data) + len(answer)
        self.request.sendall(answer)


def secret_of(network, number=0):
    return Secret(network, NODE[:-1] + str(number), LOOK, b"a" * 32, bytes([number]) * 32, b"s" * 32)


class Tree:
    """A machine that is joined to networks, and settled."""

    def __init__(self, root, *networks):
        self.root, self.config, self.run = root, root / "etc/netclient/config", root / "var/run/netclient"
        self.config.mkdir(parents=True)
        self.run.mkdir(parents=True)
        self.secrets = [secret_of(network, number) for number, network in enumerate(networks)]
        self.server = Server(self.secrets)
        for secret in self.secrets:
            (self.config / f"secret-{secret.network}").write_text(secret.text())
            for kind in ("netconfig", "wgkey", "nettoken", "peers"):
                (self.config / f"{kind}-{secret.network}").write_text("not read\n")
            self.settle(secret.network)

    def settle(self, network="demo", **change):
        """Write the state that a full check-in leaves behind, but for what shall be otherwise."""
        state = Counters()
        state.incarnation, state.epoch, state.sequence, state.word = INCARNATION, 3, 1234, WORD
        state.mode, state.server, state.due = "s", self.server.url, time.monotonic() + 200
        state.mark, state.interface, state.local = machine_mark("lo"), "lo", "127.0.0.1"
        for name, value in change.items():
            setattr(state, name, value)
        (self.run / f"{network}.state").write_text(state.text())

    def state(self, network="demo"):
        return Counters((self.run / f"{network}.state").read_text())

    def files(self):
        """Every file with what changes when it is written."""
        paths = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    def environment(self, **more):
        kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        return {**kept, "NETCLIENT_ROOT": str(self.root), **more}


@pytest.fixture
def tree(tmp_path):
    with contextlib.closing(Tree(tmp_path / "root", "demo")) as made:
        yield made


Tree.close = lambda self: (self.server.shutdown(), self.server.server_close())


INSTALL = """
import sys
sys.path.insert(0, sys.argv[1])
import netclient_lite as agent
run = agent.Run()
agent.settle_in(agent.Context(agent.Paths(sys.argv[2]), run, agent.Files(), agent.System(run), print))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The bytecode that the agent installs and its launcher starts, by interpreter."""
    made = {}

    def compile_for(python):
        if python not in made:
            root = tmp_path_factory.mktemp("installed")
            subprocess.run([python, "-I", "-c", INSTALL, str(AGENT.parent), str(root)], check=True)
            made[python] = re.search(r" code=(\S+)", (root / "etc/netclient/netclient").read_text()).group(1)
        return made[python]

    return compile_for


# Runs the bytecode as `python -I -S FILE …` does, watches, and tells at the end which way it went: the quick one ends in
# os._exit, the full one goes on to import argparse. It uses sys, posix and marshal, which every interpreter has at its start.
WATCHED = """
import sys, posix, marshal
before = set(sys.modules)
handle = posix.open(sys.argv[1], posix.O_RDONLY)
data = b""
while True:
    piece = posix.read(handle, 1 << 20)
    if not piece:
        break
    data += piece
posix.close(handle)
space = {"__name__": "__main__", "__file__": sys.argv[1], "__builtins__": __builtins__}
leave, children = posix._exit, []
def end(status, way="quick"):
    loaded = sorted(set(sys.modules) - before)
    handed = {name: answer and answer.status for name, (held, answer) in space["HANDED_OVER"].items()}
    posix.write(1, repr({"way": way, "status": status, "loaded": loaded, "children": children, "handed": handed}).encode())
    leave(0)
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name == "argparse":
            end(None, "full")
def child(*arguments, **keywords):
    children.append(repr(arguments))
    raise OSError("no children here")
for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "execv", "execve"):
    if hasattr(posix, name):
        setattr(posix, name, child)
posix._exit = end
sys.meta_path.insert(0, Gate())
sys.argv = sys.argv[1:]
exec(marshal.loads(data[16:]), space)
"""


@pytest.fixture
def watched(tree, compiled):
    def run(*arguments, **environment):
        command = [sys.executable, "-I", "-S", "-c", WATCHED, compiled(sys.executable), *(arguments or ("checkin",))]
        done = subprocess.run(command, env=tree.environment(**environment), capture_output=True, text=True, timeout=30)
        assert done.stderr == "", done.stderr
        return ast.literal_eval(done.stdout)

    return run


# ---------------------------------------------------------------------------------------------------------------------


def test_it_ends_without_a_word_and_counts_up(tree, compiled):
    for number in (1235, 1236):
        command = [sys.executable, "-I", "-S", compiled(sys.executable), "checkin"]
        done = subprocess.run(command, env=tree.environment(), capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tree.state().epoch, tree.state().sequence) == (3, number)
        assert tree.state().text().split()[3:] == [WORD, "s", tree.server.url, *tree.state().text().split()[6:]]
    assert len(tree.server.requests) == 2


def test_the_source_does_the_same(tree):
    command = [sys.executable, "-I", "-S", str(AGENT), "checkin", "-n", "all"]
    done = subprocess.run(command, env=tree.environment(), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(tree.server.requests) == 1


def test_it_loads_c_built_ins_alone_and_starts_nothing(watched):
    seen = watched()
    assert (seen["way"], seen["status"], seen["children"], seen["handed"]) == ("quick", 0, [], {})
    assert set(seen["loaded"]) <= {"__future__", "_socket", "_blake2", "binascii", "errno", "fcntl", "time"}


def test_its_bytes_are_few_and_do_not_grow(tree, watched):
    (tree.config / "peers-demo").write_text("x" * 1_000_000)
    assert watched()["way"] == "quick"
    assert tree.server.bytes <= 400


def test_it_writes_on_tmpfs_alone(tree, watched):
    before = tree.files()
    assert watched()["way"] == "quick"
    after = tree.files()
    assert {name for name in after if after[name] != before.get(name)} <= {
        "var/run/netclient/demo.state",
        "var/run/netclient/demo.lock",
    }
    assert set(before) <= set(after)


@pytest.mark.parametrize(
    "arguments", [("checkin",), ("checkin", "-n", "all"), ("checkin", "-n", "demo"), ("checkin", "--network", "demo")]
)
def test_all_usual_spellings_are_quick(watched, arguments):
    assert watched(*arguments)["way"] == "quick"


@pytest.mark.parametrize(
    "arguments",
    [
        ("checkin", "--force"),
        ("checkin", "-n", "other"),
        ("checkin", "-n"),
        ("checkin", "-h"),
        ("pull",),
        ("status", "-n", "all"),
    ],
    ids=" ".join,
)
def test_everything_else_is_left_to_the_rest(tree, watched, arguments):
    assert watched(*arguments)["way"] == "full"
    assert tree.server.requests == []


def gone(tree):
    (tree.run / "demo.state").unlink()


UNSETTLED = {
    "no state": gone,
    "an empty state": lambda tree: (tree.run / "demo.state").write_text(""),
    "a damaged state": lambda tree: (tree.run / "demo.state").write_text("i x 4 w s u 1 m n l\n"),
    "no run folder": lambda tree: shutil.rmtree(tree.run),
    "another machine": lambda tree: tree.settle(mark="xxxxxxxxxxx"),
    "an interface that is gone": lambda tree: tree.settle(interface="nm-gone", mark=machine_mark("lo")),
    "a full check that is due": lambda tree: tree.settle(due=time.monotonic() - 1),
    "a full check that is always due": lambda tree: tree.settle(due=0),
    "a due from before a reboot": lambda tree: tree.settle(due=time.monotonic() + 5000),
    "a secret that is damaged": lambda tree: (tree.config / "secret-demo").write_text("1 x y z\n"),
    "a server that is no address": lambda tree: tree.settle(server="-"),
}


@pytest.mark.parametrize("change", UNSETTLED.values(), ids=UNSETTLED)
def test_where_something_may_be_new_it_is_left_to_the_rest_without_a_request(tree, watched, change):
    change(tree)
    seen = watched()
    assert (seen["way"], seen["children"]) == ("full", [])
    assert set(seen["handed"].values()) <= {None}
    assert tree.server.requests == []


@pytest.mark.parametrize("status", [200, 409, 410, 404])
def test_an_answer_with_news_goes_to_the_rest_with_the_lock(tree, watched, status):
    tree.server.status, tree.server.body = status, json.dumps({"word": "13.00000000"}).encode()
    seen = watched()
    assert (seen["way"], seen["handed"]) == ("full", {"demo": status})
    assert len(tree.server.requests) == 1


def test_another_own_address_is_news(tree, watched):
    tree.settle(local="192.0.2.1")
    assert watched()["way"] == "full"


UNPROVEN = {
    "a wrong signature": {"key": "another key"},
    "no signature": {"raw": b"HTTP/1.0 204 No Content\r\n\r\n"},
    "a web page": {"raw": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>please log in</html>"},
    "a redirect": {"raw": b"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n\r\n"},
    "no HTTP": {"raw": b"SSH-2.0-OpenSSH_9.2\r\n"},
    "nothing": {"raw": b""},
    "an old answer": {"raw": b"HTTP/1.0 204 X\r\nNM-Lite: 1 204 203.0.113.7 1 15 " + b"A" * 43 + b"\r\n\r\n"},
    "half an answer": {"raw": b"HTTP/1.0 200 X\r\nContent-Length: 500\r\n\r\n{"},
}


@pytest.mark.parametrize("told", UNPROVEN.values(), ids=UNPROVEN)
def test_what_proves_nothing_is_left_to_the_rest(tree, watched, told):
    for name, value in told.items():
        setattr(tree.server, name, value)
    seen = watched()
    assert (seen["way"], seen["handed"]) == ("full", {"demo": None})


def test_a_server_that_is_not_there_is_left_to_the_rest(tree, watched):
    tree.server.server_close()
    assert watched()["way"] == "full"
    assert tree.state().sequence == 1235  # the number is spent: a request may have arrived


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_behind_a_proxy_it_is_left_to_the_rest(tree, watched, name):
    assert watched(**{name: "http://proxy.example.org:3128"})["way"] == "full"
    assert tree.server.requests == []


def test_while_another_run_works_it_leaves_quietly(tree, watched):
    with open(tree.run / "demo.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        seen = watched()
    assert (seen["way"], seen["status"]) == ("quick", 0)
    assert tree.server.requests == []


def test_several_networks_are_one_process_and_only_what_is_new_is_handed_over(tmp_path, compiled):
    with contextlib.closing(Tree(tmp_path / "root", "demo", "other")) as tree:
        command = [sys.executable, "-I", "-S", "-c", WATCHED, compiled(sys.executable), "checkin"]

        def run():
            return ast.literal_eval(subprocess.check_output(command, env=tree.environment(), timeout=30, text=True))

        assert run()["way"] == "quick"
        assert len(tree.server.requests) == 2
        tree.settle("other", due=0)
        seen = run()
        assert (seen["way"], seen["handed"]) == ("full", {"other": None})
        assert len(tree.server.requests) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="a full check-in is for root")
def test_a_network_that_needs_more_costs_the_others_nothing(tmp_path, compiled):
    # one peer without a handshake in one network must not make every check-in of all networks a full one
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("ip", "wg"):
        (tools / tool).write_text("#!/bin/sh\n")
        (tools / tool).chmod(0o755)
    with contextlib.closing(Tree(tmp_path / "root", "demo", "other")) as tree:
        for secret in tree.secrets:
            config = config_of(network=secret.network, servers=[tree.server.url])
            (tree.config / f"netconfig-{secret.network}").write_text(config.text())
            (tree.config / f"wgkey-{secret.network}").write_text(key_like("private") + "\n")
        tree.settle("other", due=0)
        command = [sys.executable, "-I", "-S", compiled(sys.executable), "checkin"]
        environment = tree.environment(PATH=f"{tools}:{os.environ['PATH']}")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        asked = [re.search(rb"NM-Lite: 1 (\S+)", request).group(1).decode() for request in tree.server.requests]
        assert sorted(asked) == [secret.node for secret in tree.secrets]


def test_the_mark_changes_with_the_machine(monkeypatch):
    """Addresses, routes and the interface itself are in the mark; counters are not."""
    texts = {
        "/proc/net/dev": "Inter-|\n face |\n    lo: 1 2\nnm-demo: 3 4\n",
        "/proc/net/route": "Iface\nnm-demo\t001E140A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n",
        "/proc/net/if_inet6": "fd000020000000000000000000000002 07 40 00 80  nm-demo\n",
        "/proc/net/ipv6_route": "fd000020000000000000000000000000 40 "
        + "0" * 32
        + " 00 "
        + "0" * 32
        + " 00000100 00000001 00000000 00000001  nm-demo\n",
    }
    monkeypatch.setattr(agent, "read_text", lambda path: texts.get(path, ""))
    settled = machine_mark("nm-demo")
    same = {
        "/proc/net/dev": ("3 4", "5 6"),
        "/proc/net/if_inet6": ("40 00 80", "40 00 a0"),  # while its address is checked for a double
        "/proc/net/ipv6_route": ("00000001 00000000", "00000004 00000009"),  # who uses it, and how often
    }
    for path, (old, new) in same.items():
        before, texts[path] = texts[path], texts[path].replace(old, new)
        assert machine_mark("nm-demo") == settled, path
        texts[path] = before
    other = {
        "/proc/net/dev": ("nm-demo: 3 4\n", ""),
        "/proc/net/route": ("nm-demo\t001E140A", "nm-demo\t001F140A"),
        "/proc/net/if_inet6": ("0002 07", "0003 07"),
        "/proc/net/ipv6_route": ("fd000020", "fd000021"),
    }
    for path, (old, new) in other.items():
        before, texts[path] = texts[path], texts[path].replace(old, new)
        assert before != texts[path]
        assert machine_mark("nm-demo") != settled, path
        texts[path] = before
    texts["/proc/net/route"] = texts["/proc/net/route"].replace("0101A8C0", "0201A8C0")  # another router: another LAN
    assert machine_mark("nm-demo") != settled


@pytest.mark.parametrize("python", sorted({QUICK_PYTHON, sys.executable}))
def test_the_bytecode_is_read_at_one_go(compiled, python):
    # the first section alone; CPython reads a .pyc of more than 256 KiB byte by byte, which is an eighth of its whole start
    assert os.path.getsize(compiled(python)) <= 32 * 1024


def test_the_launcher_does_it(tree, compiled):
    launcher = os.path.join(os.path.dirname(compiled(sys.executable)), "netclient")
    done = subprocess.run([launcher, "checkin", "-n", "all"], env=tree.environment(), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(tree.server.requests) == 1


def collected(command, environment):
    """Start a program under callgrind; the process, to be read later."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command]
    return subprocess.Popen(valgrind, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
def test_its_instructions_are_those_of_starting_python(tree, compiled):
    bare = [QUICK_PYTHON, "-I", "-S"]
    environment = {"PATH": os.environ["PATH"], "NETCLIENT_ROOT": str(tree.root)}
    runs = [collected([*bare, "-c", "pass"], environment), collected([*bare, compiled(QUICK_PYTHON), "checkin"], environment)]
    told = [run.communicate(timeout=120)[0] for run in runs]
    floor, ours = (int(re.search(r"Collected : (\d+)", text).group(1)) for text in told)
    assert [run.returncode for run in runs] == [0, 0]
    assert len(tree.server.requests) == 1
    assert ours <= 1.1 * floor, f"{ours / floor:.2f} times the instructions of `python3 -I -S -c pass`"
