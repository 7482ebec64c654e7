# SPDX-License-Identifier: Apache-2.0
"""The administrator's command line: what it asks, what it prints, how it completes, and its way to a server elsewhere."""

from __future__ import annotations

import http.server
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from agentkit import REPO

import netmaker_admin as admin
import netmaker_lite as server

sys.path.insert(0, str(REPO / "docs"))
import make_man

KEY = {"name": "front", "network": "home", "uses": None, "expiration": None, "value": "id.secret", "accessstring": "TOKEN",
       "join": "netclient_lite.py join -t TOKEN", "install": "curl … | sh"}  # fmt: skip
CONFIG = "[Interface]\nPrivateKey = x\n\n[Peer]\nPublicKey = y\n"
CLIENT = {"clientid": "phone", "network": "home", "address": "10.0.0.9", "enabled": "yes", "config": CONFIG, "privatekey": ""}


class Fake:
    """A server that says what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.answer = admin.Answer(200, {"Code": 200, "Message": "done", "Response": None})
        self.settings = [("API_PORT", "8081", "port to listen on")]
        self.commands = {"check": lambda args: admin.Printed({"findings": []}, ["in order"])}
        self.opened: list[str] = []

    def open(self, args):
        self.opened.append(args.data)
        return self

    def call(self, method, path, body):
        self.asked.append((method, path, body))
        return self.answer

    def close(self):
        pass


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def run(fake, capsys):
    """Run a command: (status, what it printed, what it complained of)."""

    def command(words, local=fake, **environment):
        status = admin.main(words.split() if isinstance(words, str) else words, environment, local)
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


# ---- what is asked


N, C = "/api/nodes/home", "/api/extclients/home"


@pytest.mark.parametrize(
    "words, call",
    [
        ("network list --json", ("GET", "/api/networks", None)),
        ("network add Home --range 10.0.0.0/24 --local-only --hole-punch no --mtu 1400 --json",
         ("POST", "/api/networks", {"netid": "Home", "addressrange": "10.0.0.0/24", "islocal": "yes", "defaultudpholepunch": "no",
                                    "defaultmtu": "1400"})),
        ("network show home", ("GET", "/api/networks/home", None)),
        ("network set home mtu=1400 range6= --json", ("PUT", "/api/networks/home", {"defaultmtu": "1400", "addressrange6": ""})),
        ("network refresh-keys home", ("POST", "/api/networks/home/keyupdate", None)),
        ("network remove home", ("DELETE", "/api/networks/home", None)),
        ("key add home --json", ("POST", "/api/networks/home/keys", {})),
        ("key add home --name a --uses unlimited --expires 24h --json",
         ("POST", "/api/networks/home/keys", {"name": "a", "uses": "unlimited", "expires": "24h"})),
        ("key remove home a%b", ("DELETE", "/api/networks/home/keys/a%25b", None)),
        ("node show home n", ("GET", N + "/n", None)),
        ("node set home n keepalive= allowedips=10.0.0.0/8,10.1.0.0/16",
         ("PUT", N + "/n", {"persistentkeepalive": "", "allowedips": ["10.0.0.0/8", "10.1.0.0/16"]})),
        ("node set home n port=4000", ("PUT", N + "/n", {"listenport": "4000", "isstaticport": "yes"})),
        ("node set home n endpoint=", ("PUT", N + "/n", {"endpoint": "", "isstaticendpoint": "no"})),
        ("node set home n port=4000 isstatic=no", ("PUT", N + "/n", {"listenport": "4000", "isstatic": "no"})),
        ("node approve home n", ("POST", N + "/n/approve", None)),
        ("node refresh-key home n", ("POST", N + "/n/refreshkey", None)),
        ("node remove home n", ("DELETE", N + "/n", None)),
        ("node egress home n 10.0.0.0/8 10.1.0.0/16 --no-nat --interface eth1",
         ("POST", N + "/n/creategateway", {"ranges": ["10.0.0.0/8", "10.1.0.0/16"], "nat": "no", "interface": "eth1"})),
        ("node egress home n off", ("DELETE", N + "/n/deletegateway", None)),
        ("node ingress home n", ("POST", N + "/n/createingress", None)),
        ("node ingress home n off", ("DELETE", N + "/n/deleteingress", None)),
        ("node relay home n a b", ("POST", N + "/n/createrelay", {"relayaddrs": ["a", "b"]})),
        ("node relay home n off", ("DELETE", N + "/n/deleterelay", None)),
        ("acl deny home a b", ("POST", "/api/networks/home/acls", {"node1": "a", "node2": "b"})),
        ("acl allow home a b", ("DELETE", "/api/networks/home/acls/a/b", None)),
        ("client add home gw --json", ("POST", C + "/gw", {})),
        ("client add home gw --name phone --public-key K --dns 1.1.1.1 --internet --json",
         ("POST", C + "/gw", {"clientid": "phone", "publickey": "K", "dns": "1.1.1.1", "internet": "yes"})),
        ("client show home phone --qr --json", ("GET", C + "/phone", None)),
        ("client renew home phone --json", ("POST", C + "/phone/renew", {})),
        ("client rename home phone tablet --json", ("PUT", C + "/phone", {"clientid": "tablet"})),
        ("client disable home phone", ("PUT", C + "/phone", {"enabled": "no"})),
        ("client enable home phone", ("PUT", C + "/phone", {"enabled": "yes"})),
        ("client remove home phone", ("DELETE", C + "/phone", None)),
        ("dns list home --json", ("GET", "/api/dns/adm/home", None)),
        ("dns add home nas 10.0.0.7", ("POST", "/api/dns/home", {"name": "nas", "address": "10.0.0.7"})),
        ("dns remove home nas", ("DELETE", "/api/dns/home/nas", None)),
        ("user list --json", ("GET", "/api/users", None)),
        ("user remove ann", ("DELETE", "/api/users/ann", None)),
        ("user apitoken add ann ci --scope read --network a --network b --json",
         ("POST", "/api/users/ann/tokens", {"name": "ci", "scope": "read", "networks": ["a", "b"]})),
        ("user apitoken list ann --json", ("GET", "/api/users/ann/tokens", None)),
        ("user apitoken remove ann ci", ("DELETE", "/api/users/ann/tokens/ci", None)),
        ("audit --network home --since 24h --json", ("GET", "/api/audit?network=home&since=24h", None)),
        ("audit --json", ("GET", "/api/audit", None)),
        ("openapi", ("GET", "/api/openapi.json", None)),
        ("--json --data /x network show home", ("GET", "/api/networks/home", None)),
        ("node set home n mtu=1300 --json roaming=no", ("PUT", N + "/n", {"mtu": "1300", "roaming": "no"})),
    ],
)  # fmt: skip
def test_a_command_is_one_call(run, fake, words, call):
    status, _, err = run(words)
    assert (status, err, fake.asked) == (0, "", [call])


def test_every_call_is_one_of_the_rest_api():
    table = re.findall(r"^\| `([A-Z]+ /\S+)` \|", (REPO / "docs/api.md").read_text("utf-8"), re.M)
    routes = [re.compile(re.sub(r"\{\w+\}", "[^/]+", line)) for line in table]
    for command in admin.COMMANDS:
        for call in filter(None, command.rest.split(" | ")):
            assert any(route.fullmatch(call) for route in routes), call
    for path, _ in admin.NAMES.values():
        assert any(route.fullmatch("GET " + path) for route in routes), path


@pytest.mark.parametrize(
    "ours, theirs", [(admin.NETWORK_SETTINGS, server.NETWORK_FIELDS), (admin.NODE_SETTINGS, server.NODE_FIELDS)]
)
def test_whatever_the_server_takes_can_be_set(ours, theirs):
    assert {each.name for each in theirs if each.check} - {"netid"} <= {each.field for each in ours}


def test_every_command_has_a_call_or_works_on_this_host():
    for command in admin.COMMANDS:
        assert command.rest or command.words in (*admin.HERE, "completion", "names", "version"), command.words
        for call in filter(None, command.rest.split(" | ")):
            assert re.fullmatch(r"(GET|PUT|POST|DELETE) (/api/[A-Za-z./{}0-9]+)", call)
            filled = set(re.findall(r"\{(\w+)\}", call))
            assert filled <= {argument.dest for argument in command.arguments}, command.words


# ---- passwords


def test_a_password_comes_from_standard_input_where_that_is_no_terminal(run, fake, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("secret word\n"))
    assert run("user add ann --admin --network a")[0] == 0
    body = {"username": "ann", "isadmin": True, "networks": ["a"], "password": "secret word"}
    assert fake.asked == [("POST", "/api/users/ann", body)]
    status, _, err = run("user passwd ann")
    assert status == 2 and "no password on standard input" in err and len(fake.asked) == 1


@pytest.mark.parametrize("second, status, calls", [("secret", 0, 1), ("other", 1, 0)])
def test_a_password_is_asked_for_twice_in_a_terminal(run, fake, monkeypatch, second, status, calls):
    said = iter(["secret", second])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(admin.getpass, "getpass", lambda prompt: next(said))
    found, _, err = run("user passwd ann")
    assert (found, len(fake.asked)) == (status, calls)
    assert ("differ" in err) == (status == 1)


# ---- what is printed


def test_json_is_what_the_api_answers(run, fake):
    fake.answer = admin.Answer(200, [{"netid": "home", "more": [1, {"a": None}]}])
    assert json.loads(run("network list --json")[1]) == fake.answer.value
    fake.answer = admin.Answer(200, "SUCCESS")
    assert run("node approve home n --json")[1] == '"SUCCESS"\n'
    assert run("node approve home n")[1] == "node n approved\n"


def test_lists_are_aligned_tables(run, fake):
    fake.answer = admin.Answer(200, [{"netid": "home", "addressrange": "10.0.0.0/24", "nodes": 3}, {"netid": "a-long-one"}])
    out = run("network list")[1].splitlines()
    assert out[0].split() == ["NETWORK", "RANGE", "RANGE6", "NODES", "REVISION"]
    assert {line.index(word) for line, word in zip(out, ("RANGE", "10.0.0.0", "-", "-"))} & {len("a-long-one") + 2}
    fake.answer = admin.Answer(200, [])
    assert run("network list")[1].startswith("no networks: netmaker-lite network add")
    assert run("node list home")[1].startswith("no nodes: netmaker-lite key add home prints")


def test_a_key_is_printed_with_what_joins(run, fake):
    fake.answer = admin.Answer(200, KEY)
    out = run("key add home --uses unlimited")[1]
    assert out.splitlines()[0] == "key front for home, uses: unlimited"
    assert "  token  TOKEN\n" in out and "the next lines as one:\ncurl" in out and out.endswith("This is shown once.\n")
    fake.answer = admin.Answer(200, [KEY, {**KEY, "uses": 2, "expiration": 1}])
    out = run("key list home")[1]
    assert "unlimited  never" in out and "2          expired" in out


def test_objects_say_what_there_is_to_say(run, fake):
    fake.answer = admin.Answer(
        200,
        {
            "name": "n",
            "id": "1",
            "macaddress": "1",
            "isrelay": "no",
            "isstatic": "yes",
            "address6": "",
            "allowedips": [],
            "lastcheckin": 1800000000,
            "seenby": {"a": "1.2.3.4:5", "b": ""},
        },
    )
    out = run("node show home n")[1]
    assert "lastcheckin  2027-01-15 08:00 UTC\n" in out and "seenby a     1.2.3.4:5\nseenby b     no handshake\n" in out
    assert "isstatic     yes\n" in out
    assert not [word for word in ("address6", "allowedips", "macaddress", "isrelay") if word in out]


def test_what_nodes_say_of_themselves_does_not_speak_to_the_terminal(run, fake):
    fake.answer = admin.Answer(200, {"os": "\x1b]0;mine\x07\r", "seenby": {"a": "\x9b2J"}})
    assert "os        ?]0;mine??\n" in run("node show home n")[1] and "seenby a  ?2J\n" in run("node show home n")[1]
    fake.answer = admin.Answer(400, {"Message": "no \x1b[2J"})
    assert run("node show home n")[2] == "netmaker-lite: no ?[2J\n"


def test_a_clients_output_is_its_file(run, fake):
    fake.answer = admin.Answer(200, CLIENT)
    out = run("client add home gw")[1]
    assert out.startswith("# phone of network home, 10.0.0.9.") and out.endswith(CONFIG)


def test_qr_codes(run, fake, monkeypatch):
    segno = pytest.importorskip("segno")
    fake.answer = admin.Answer(200, CLIENT)
    made = run("client add home gw --qr")[1]
    assert "▄" in made and "PrivateKey" not in made
    fake.answer = admin.Answer(200, None, CONFIG.encode())
    assert run("client show home phone --qr")[1] == made
    assert fake.asked[-1][1] == C + "/phone/file"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    plain = admin.qr(CONFIG)
    assert all(line.isascii() for line in plain) and len(plain) >= segno.make(CONFIG, error="L", micro=False).symbol_size()[1]


def test_without_segno_nothing_is_made_that_is_shown_once(run, fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "segno", None)
    status, out, err = run("client add home gw --qr")
    assert (status, out, fake.asked) == (1, "", []) and "pip install segno" in err


# ---- mistakes


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "a command is required after netmaker-lite: serve, network,"),
        ("network", "a command is required after netmaker-lite network: add, list, show, set,"),
        ("user apitoken", "after netmaker-lite user apitoken: add, list, remove ("),
        ("frobnicate", "there is no command netmaker-lite frobnicate: there is serve, network"),
        ("network delete home", "there is no command netmaker-lite network delete: there is add, list"),
        ("network show", "network show: it needs NETWORK (netmaker-lite network show --help)"),
        ("network show a b", "network show: there is no b ("),
        ("node list home --colour red", "node list: there is no --colour red ("),
        ("key add home --uses 0", "key add: --uses takes a whole number from 1 on, or unlimited, not '0' ("),
        ("key add home --name", "key add: --name: expected one argument ("),
        ("network set home mtu", "write mtu=VALUE"),
        ("network set home netid=x", "'netid=x' cannot be set: KEY=VALUE with one of range, range6,"),
        ("node show home ../x", "'../x' is no name of anything here"),
        ("node show home ..", "'..' is no name of anything here"),
        ("completion zsh", "completion: bash|ash takes bash or ash, not 'zsh' ("),
        ("node list home --api https://x --data /y", "give one of them"),
        ("node list home --token-file /y", "go with --api"),
        ("node list home --api x.example", "a URL like https://mesh.example"),
        ("node list home --api ftp://x.example", "a URL like https://mesh.example"),
        ("node list home --api https://u:p@x.example", "takes no user and password"),
        ("node list home --api https://x:99999", "is no URL: Port out of range"),
        ("node list home --api http://192.0.2.1:8081", "readable for everybody on the way: use https"),
        ("node list home --api https://x --token-file /nowhere", "cannot read /nowhere: No such file"),
    ],
)
def test_wrong_usage_is_one_sentence(run, fake, words, sentence):
    status, out, err = run(words)
    assert (status, out, fake.asked) == (2, "", []) and sentence in err
    assert err.startswith("netmaker-lite: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, refusal, status, sentence",
    [
        ("network add x --mtu 10", (400, "defaultmtu takes a whole number"), 2, "--mtu takes a whole number"),
        ("network add x --range y", (400, "addressrange: 'y' is no range"), 2, "--range: 'y' is no range"),
        ("network set x keepalive=y", (400, "defaultkeepalive takes a number"), 2, "keepalive takes a number"),
        ("network set x defaultkeepalive=y", (400, "defaultkeepalive takes a number"), 2, "defaultkeepalive takes a number"),
        ("network show x", (404, "no network x: `netmaker-lite network list`"), 1, "no network x: `netmaker-lite network list`"),
        ("node show x name", (409, "name: that is another's"), 1, "name: that is another's"),
        (
            "node refresh-key x y",
            (404, "Not found: '/api/nodes/x/y/refreshkey'"),
            1,
            "the server does not know how to do this: it is of another version (`netmaker-lite version` prints this one's)",
        ),
        ("network show x", (503, None), 1, "the server answers 503 and does not say why"),
    ],
)
def test_refusals_name_what_the_user_wrote(run, fake, words, refusal, status, sentence):
    code, message = refusal
    fake.answer = admin.Answer(code, message and {"Code": code, "Message": message})
    assert run(words) == (status, "", "netmaker-lite: %s\n" % sentence)


def test_without_the_servers_file(run):
    assert "name one with --api URL or NETMAKER_API" in run("network list", None)[2]
    assert run("backup /x", None) == (2, "", "netmaker-lite: backup works on the server's host alone: run it there\n")


def test_a_reader_that_goes_is_no_error(fake):
    code = "import netmaker_admin as a; a.show = lambda *_: a.sys.stdout.write('x' * 999999); a.sys.exit(a.main(['version']))"
    command = "%s -c %r | head -c 1" % (sys.executable, code)
    done = subprocess.run(["bash", "-c", "set -o pipefail; " + command], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x", "")


# ---- help


def test_help_of_every_command_and_noun(run):
    for command in admin.SHOWN:
        status, out, _ = run(command.words + " --help")
        assert status == 0 and command.help in " ".join(out.split()) and max(map(len, out.splitlines())) <= 100
        assert run("help " + command.words)[1] == out
        for argument in command.arguments:
            assert argument.spelled in out and argument.options["help"].split()[0] in out
    for noun in ("", *admin.NOUNS):
        status, out, _ = run(noun + " --help")
        assert status == 0
        assert all(command.words in out for command in admin.SHOWN if command.words.startswith(noun and noun + " "))
    assert "API_PORT" in run("serve --help")[1]
    assert "names" not in re.findall(r"^  (\S+)", run("--help")[1], re.M)


def test_the_programs_versions_are_one():
    texts = [(REPO / name).read_text("utf-8") for name in ("netmaker_lite.py", "netmaker_admin.py", "netclient_lite.py")]
    assert len({re.search('^__version__ = "(.+)"', text, re.M)[1] for text in texts}) == 1


def test_docs_made_from_the_tables_are_up_to_date():
    assert make_man.out_of_date() == [], "make man"


@pytest.mark.parametrize("name", ["netmaker-lite.1", "netclient-lite.1"])
def test_docs_man_pages_are_valid(name):
    page = REPO / "docs" / "man" / name
    checks = (["mandoc", "-Tlint", "-Wwarning"], ["groff", "-ww", "-man", "-Tutf8", "-z"])
    for check in checks:
        if shutil.which(check[0]):
            done = subprocess.run([*check, str(page)], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    text = page.read_text("ascii")
    assert re.findall(r"^\.(?!TH|SH|SS|TP|PP|B|BR|I|nh|ad|\\\").*", text, re.M) == []
    assert text.count(".SH NAME") == text.count(".SH SYNOPSIS") == 1


# ---- completion


@pytest.fixture
def shell_folder(tmp_path):
    """A folder for the PATH, in which netmaker-lite writes down its words, and knows two nodes."""
    program = tmp_path / "netmaker-lite"
    program.write_text(
        '#!/bin/sh\n[ "$1" = names ] || { echo "ran: $*"; exit; }\necho "$@" >>%s/asked\n'
        "case $2 in node) echo camera; echo cellar ;; network) echo home ;; esac\n" % tmp_path
    )
    program.chmod(0o755)
    return tmp_path


class Terminal:
    """A real bash at a real terminal, with the completion in it."""

    def __init__(self, folder: Path) -> None:
        pid, self.fd = pty.fork()
        if not pid:
            env = {"PATH": "%s:/usr/bin:/bin" % folder, "TERM": "dumb", "PS1": "$ ", "HISTFILE": "", "INPUTRC": "/dev/null"}
            os.execve(shutil.which("bash"), ["bash", "--norc", "--noprofile", "-i"], env)  # noqa: S606
        self.pid = pid
        script = folder / "completion"
        script.write_text(admin.completion_script("bash"))
        self.type(
            "bind 'set bell-style none'; bind 'set page-completions off'; bind 'set completion-query-items 0'; . %s\n" % script
        )
        self.type("cd %s; echo ready $((40 + 2))\n" % folder, "ready 42")

    def type(self, text: str, until: str = "$ ") -> str:
        os.write(self.fd, text.encode())
        seen, end = "", time.monotonic() + 20
        while until not in seen.replace("\r", ""):
            assert time.monotonic() < end, seen
            seen += os.read(self.fd, 65536).decode()
        return seen

    def completed(self, line: str, until: str) -> None:
        self.type(line + "\t", until)
        self.type("\x15")  # the line is thrown away

    def close(self) -> None:
        os.close(self.fd)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes(shell_folder):
    terminal = Terminal(shell_folder)
    try:
        terminal.completed("netmaker-lite net", "netmaker-lite network ")
        terminal.completed("netmaker-lite network ref", "refresh-keys ")
        terminal.completed("netmaker-lite user api", "apitoken ")
        terminal.completed("netmaker-lite node show h", "show home ")
        terminal.completed("netmaker-lite node show home cam", "home camera ")
        terminal.completed("netmaker-lite node relay home camera ce", "camera cellar ")
        terminal.completed("netmaker-lite node relay home camera cellar of", "cellar off ")
        terminal.completed("netmaker-lite key add home --exp", "--expires ")
        terminal.completed("netmaker-lite key add --uses 3 h", "3 home ")
        terminal.completed("netmaker-lite network set home hole", "hole-punch=")
        terminal.completed("netmaker-lite network set home mtu=1400 por", "port=")
        terminal.completed("netmaker-lite completion b", "bash ")
        terminal.completed("netmaker-lite node list --api https://x.example --token-file /t h", "/t home ")
        (shell_folder / "a-backup").write_text("")
        terminal.completed("netmaker-lite restore a-b", "a-backup ")
        terminal.completed("netmaker-lite audit --network h", "--network home ")
        both = terminal.type("netmaker-lite node show home c\t\t", "cellar")
        assert "camera" in both
    finally:
        terminal.close()
    asked = (shell_folder / "asked").read_text()
    assert "names node home\n" in asked and "names network  --api https://x.example --token-file /t\n" in asked


def test_names_for_the_completion(run, fake):
    fake.answer = admin.Answer(200, [{"name": "camera"}, {"name": "cellar"}])
    assert run("names node home") == (0, "camera\ncellar\n", "")
    assert fake.asked == [("GET", "/api/nodes/home", None)]
    fake.answer = admin.Answer(404, {"Message": "no network"})
    assert run("names node home") == (0, "", "")
    assert run("names nonsense home")[1] == ""
    kinds = {argument.kind.partition("=")[0] for command in admin.SHOWN for argument in command.arguments}
    assert kinds - {"", "-", "file", "dir", "pairs"} == set(admin.NAMES)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes_the_agents_words():
    script = REPO / "docs" / "completion" / "netclient-lite"

    def offered(*words):
        code = '. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _netclient_lite; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code, str(script), *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    assert offered("netclient-lite", "st") == ["status"]
    assert offered("netclient-lite", "join", "--dns") == ["--dnson"]
    assert offered("netclient-lite", "join", "--dnson", "") == ["yes", "no"]
    assert offered("netclient-lite", "join", "--daemon", "r") == ["resident"]
    assert offered("netclient-lite", "join", "-t", "") == []
    assert "all" in offered("netclient-lite", "leave", "-n", "")


SHELLS = [shell for shell in ("busybox ash", "dash", "bash") if shutil.which(shell.split()[0])]


@pytest.mark.parametrize("shell", SHELLS)
def test_ash_has_words_shortened(shell_folder, shell):
    script = shell_folder / "script"

    def said(words):
        script.write_text(admin.completion_script("ash") + words + "\n")
        env = {"PATH": "%s:/usr/bin:/bin" % shell_folder}
        done = subprocess.run([*shell.split(), str(script)], env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert said("nml no l home") == (0, "ran: node list home\n")
    assert said("nml node set 'my home' 'a b'") == (0, "ran: node set my home a b\n")
    assert said("nml u api add ann ci --scope read") == (0, "ran: user apitoken add ann ci --scope read\n")
    assert said("nml n l") == (2, "netmaker-lite: network node\n")
    assert said("nml k") == (2, "netmaker-lite key: add list remove\n")
    assert said("nml node re") == (2, "netmaker-lite node: reject refresh-key remove relay\n")
    code, text = said("nml")
    assert code == 2 and "serve" in text and "version" in text
    assert said("nml x")[0] == 2
    assert said("set -eu; nml version") == (0, "ran: version\n")


def test_the_scripts_are_clean():
    checker = shutil.which("shellcheck", path="%s:%s" % (Path(sys.executable).parent, os.environ["PATH"]))
    if not checker:
        pytest.skip("no shellcheck here")
    for shell, dialect in (("bash", "bash"), ("ash", "busybox"), ("ash", "dash")):
        script = admin.completion_script(shell)
        done = subprocess.run([checker, "-s", dialect, "-"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [checker, "-s", "bash", "-e", "SC2207", str(REPO / "docs/completion/netclient-lite")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# ---- a server elsewhere, over real HTTP


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what the test put there, and keeps what came."""

    seen: list[tuple[str, str, str | None, bytes]]
    replies: dict[str, tuple[int, str, bytes]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        status, kind, reply = self.replies.get(self.path, (200, "application/json", b"[]"))
        self.send_response(status)
        self.send_header("Location" if status // 100 == 3 else "Content-Type", kind)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web():
    """(URL, what came, what is answered)."""
    handler = type("Handler", (Handler,), {"seen": [], "replies": {}})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield "http://127.0.0.1:%d" % running.server_port, handler.seen, handler.replies
    running.shutdown()
    thread.join()
    running.server_close()


def test_over_http(run, fake, web, tmp_path, monkeypatch):
    url, seen, replies = web
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login thief password other\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    replies["/nm/api/networks"] = (200, "application/json; charset=utf-8", b'[{"netid": "home"}]')
    assert json.loads(run("network list --json", NETMAKER_API=url + "/nm/", NETMAKER_TOKEN="abc")[1]) == [{"netid": "home"}]
    file = tmp_path / "token"
    file.write_text("def\n")
    file.chmod(0o644)
    status, _, err = run("network set home mtu=1400 --json --api %s --token-file %s" % (url, file), NETMAKER_TOKEN="abc")
    assert status == 0 and err == "netmaker-lite: others may read %s: chmod 600 it\n" % file
    assert seen == [
        ("GET", "/nm/api/networks", "Bearer abc", b""),
        ("PUT", "/api/networks/home", "Bearer def", b'{"defaultmtu": "1400"}'),
    ]
    assert fake.opened == fake.asked == []
    run("network list --data /mine", NETMAKER_API=url)
    assert fake.opened == ["/mine"]


@pytest.mark.parametrize(
    "reply, sentence",
    [
        ((401, "application/json", b"{}"), "the server wants an API token, in NETMAKER_TOKEN or a file (--token-file)"),
        ((403, "application/json", b'{"Message": "home is not yours"}'), "home is not yours"),
        ((302, "https://thief.example/", b""), "leads on to https://thief.example/, which is not followed"),
        ((404, "text/html", b"<html>"), "does not answer like a netmaker-lite server (status 404, text/html): check the URL"),
        ((502, "text/html", b"<html>"), "does not answer like a netmaker-lite server (status 502, text/html): check the URL"),
        ((200, "text/html", b"<html>welcome"), "does not answer like a netmaker-lite server (status 200, text/html)"),
        ((200, "application/json", b"{"), "answers broken JSON"),
    ],
)
def test_answers_that_are_none(run, web, reply, sentence):
    url, seen, replies = web
    replies["/api/networks"] = reply
    status, out, err = run("network list --api " + url)
    assert (status, out, len(seen)) == (1, "", 1) and sentence in err and err.count("\n") == 1


def test_a_token_that_does_not_count(run, web):
    url, _, replies = web
    replies["/api/networks"] = (401, "application/json", b"{}")
    err = run("network list --api " + url, NETMAKER_TOKEN="abc")[2]
    assert "does not know this token, or it has expired: `netmaker-lite user apitoken add" in err and "abc" not in err
    assert "holds no token" in run("network list --api " + url, NETMAKER_TOKEN="a b")[2]


def test_a_file_over_http(run, web):
    pytest.importorskip("segno")
    url, _, replies = web
    replies[C + "/phone/file"] = (200, "application/octet-stream", CONFIG.encode())
    status, out, err = run("client show home phone --qr --api " + url)
    assert (status, err) == (0, "") and "▄" in out


def test_a_server_that_is_not_there(run, tmp_path, monkeypatch):
    status, _, err = run("network list --api http://127.0.0.1:1")
    assert (status, err.count("\n")) == (1, 1) and "cannot reach http://127.0.0.1:1 (Connection refused)" in err
    status, _, err = run("network list --api https://nowhere.invalid")
    assert (status, err.count("\n")) == (1, 1) and "cannot reach https://nowhere.invalid (" in err
    monkeypatch.setattr(admin, "TIMEOUTS", (0.2, 0.2))
    with __import__("socket").create_server(("127.0.0.1", 0)) as silent:
        err = run("network list --api http://127.0.0.1:%d" % silent.getsockname()[1])[2]
    assert "does not answer: is the server running" in err
    monkeypatch.setitem(sys.modules, "requests", None)
    assert "pip install requests" in run("network list --api http://127.0.0.1:1")[2]
