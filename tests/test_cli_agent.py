# SPDX-License-Identifier: Apache-2.0
"""The agent's command line: verbs, the original's flags in all their spellings, and a sentence for every mistake.

Parts: VERBS - THE ORIGINAL'S FLAGS - MISTAKES - WHO MAY
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from typing import NamedTuple

import pytest
from agentkit import AGENT, config_of
from kernel import key_like

import netclient_lite as agent
from netclient_lite import COMMANDS, IGNORED, SETTINGS, Token, b64, make_token

PIN = bytes(range(32))
TOKEN = make_token(Token(("http://127.0.0.1:9",), PIN, "default", "k1." + b64(b"0123456789abcdef")))
PARSER = agent.build_parser()
VERBS = [command.name for command in COMMANDS]


class Outcome(NamedTuple):
    """What a command left behind: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


@pytest.fixture
def netclient(tmp_path, monkeypatch, capsys):
    """Runs the agent in this process, as root by its own belief, on an empty tree; `ip` and `wg` do nothing and say yes."""
    tools, root = tmp_path / "bin", tmp_path / "root"
    tools.mkdir()
    for tool in ("ip", "wg"):
        (tools / tool).write_text("#!/bin/sh\nexit 0\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith("NETCLIENT_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(agent, "root_folder", lambda: str(root))
    before = os.umask(0o022)

    def run(*arguments):
        try:
            status = agent.main(list(arguments))
        except SystemExit as end:  # argparse's own way out
            status = end.code
        shown = capsys.readouterr()
        return Outcome(status, shown.out, shown.err)

    run.root = root
    yield run
    os.umask(before)


def sentence(outcome, status):
    """The one sentence on stderr of a command that failed; nothing else was said, and nothing was written."""
    assert outcome.status == status, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome
    assert lines[0].startswith("netclient-lite: ")
    assert "Traceback" not in outcome.err + outcome.out
    return lines[0][len("netclient-lite: ") :]


def written(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def parsed(*words):
    return PARSER.parse_args(agent.spelled_out(words))


# ---------------------------------------------------------------------------------------------------------------------
# VERBS
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_names_its_flags(netclient, verb):
    outcome = netclient(verb, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    command = next(each for each in COMMANDS if each.name == verb)
    for flag in command.flags:
        assert f"--{flag}" in outcome.out
    flat = re.sub(r"\s+", "", outcome.out)
    for setting in SETTINGS:
        assert (setting.env in flat) == (setting.name in command.flags), setting.name


def test_the_help_lists_every_verb(netclient):
    outcome = netclient("--help")
    assert outcome.status == 0
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\s", outcome.out, re.M), verb


def test_the_verbs_that_the_docstring_names_are_there():
    named = re.search(r"^ +COMMANDS +(.*?)^ +CLI", agent.__doc__, re.M | re.S).group(1)
    assert sorted(re.split(r",\s+", named.strip())) == sorted(VERBS)


def test_version(netclient):
    assert netclient("--version").out == agent.__version__ + "\n"
    assert agent.__version__ in netclient("version").out


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("checkin", "--frobnicate"), ("join", "-t"), ("join", "x")], ids=str)
def test_what_is_no_command_line_exits_2_with_usage(netclient, arguments):
    outcome = netclient(*arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("usage: netclient-lite")
    assert outcome.out == ""
    assert written(netclient.root) == []


@pytest.mark.parametrize("verb", ["list", "status"])
def test_with_nothing_joined_there_is_nothing_to_show(netclient, verb):
    assert netclient(verb) == (0, "[]\n" if verb == "list" else "no network is joined\n", "")
    shown = netclient(verb, "--json")
    assert (shown.status, json.loads(shown.out), shown.err) == (0, [], "")


@pytest.mark.parametrize("verb", ["checkin", "pull", "push", "leave"])
def test_with_nothing_joined_there_is_nothing_to_do(netclient, verb):
    assert netclient(verb, "-n", "all") == (0, "", "")
    assert written(netclient.root) == []


# ---------------------------------------------------------------------------------------------------------------------
# THE ORIGINAL'S FLAGS
# ---------------------------------------------------------------------------------------------------------------------
# Netmaker 0.8's, as its `netclient join --help` lists them: flag, alias, environment name, a value.

ORIGINAL = [
    ("network", "n", "NETCLIENT_NETWORK", "demo"),
    ("token", "t", "NETCLIENT_ACCESSTOKEN", "eyJ2"),
    ("key", "k", "NETCLIENT_ACCESSKEY", "k1.secret"),
    ("apiserver", "", "NETCLIENT_API_SERVER", "203.0.113.10:8081"),
    ("grpcserver", "", "NETCLIENT_GRPC_SERVER", "203.0.113.10:50051"),
    ("name", "", "NETCLIENT_NAME", "router-1"),
    ("password", "p", "NETCLIENT_PASSWORD", "secret"),
    ("endpoint", "e", "NETCLIENT_ENDPOINT", "203.0.113.7"),
    ("localaddress", "", "NETCLIENT_LOCALADDRESS", "192.168.1.10"),
    ("localrange", "", "NETCLIENT_LOCALRANGE", "192.168.1.0/24"),
    ("address", "a", "NETCLIENT_ADDRESS", "10.20.30.2"),
    ("addressIPv6", "a6", "NETCLIENT_ADDRESSIPV6", "fd00::2"),
    ("macaddress", "m", "NETCLIENT_MACADDRESS", "02:00:00:00:00:01"),
    ("publickey", "pubkey", "NETCLIENT_PUBLICKEY", "k"),
    ("privatekey", "privkey", "NETCLIENT_PRIVATEKEY", "k"),
    ("interface", "i", "NETCLIENT_INTERFACE", "nm-demo"),
    ("port", "", "NETCLIENT_PORT", "51821"),
    ("keepalive", "", "NETCLIENT_KEEPALIVE", "20"),
    ("operatingsystem", "os", "NETCLIENT_OS", "linux"),
    ("dnson", "", "NETCLIENT_DNS", "no"),
    ("islocal", "", "NETCLIENT_IS_LOCAL", "yes"),
    ("isdualstack", "", "NETCLIENT_IS_DUALSTACK", "no"),
    ("udpholepunch", "", "NETCLIENT_UDP_HOLEPUNCH", "yes"),
    ("ipforwarding", "", "NETCLIENT_IPFORWARDING", "on"),
    ("postup", "", "NETCLIENT_POSTUP", "true"),
    ("postdown", "", "NETCLIENT_POSTDOWN", "true"),
    ("daemon", "", "NETCLIENT_DAEMON", "off"),
    ("roaming", "", "NETCLIENT_ROAMING", "on"),
]
OURS = {"addressIPv6": "address6"}


@pytest.mark.parametrize(("flag", "alias", "env", "value"), ORIGINAL, ids=[row[0] for row in ORIGINAL])
def test_every_flag_of_the_original_is_taken_in_every_spelling_by_every_verb(flag, alias, env, value):
    attribute = OURS.get(flag, flag)
    spellings = [(f"--{flag}", value), (f"--{flag}={value}",), (f"-{flag}", value), (f"-{flag}={value}",)]
    if alias:
        spellings += [(f"-{alias}", value), (f"-{alias}={value}",), (f"--{alias}", value)][: 3 if len(alias) > 1 else 1]
    for words in spellings:
        for verb in VERBS:
            assert getattr(parsed(verb, *words), attribute) == value, words


@pytest.mark.parametrize(("flag", "alias", "env", "value"), ORIGINAL, ids=[row[0] for row in ORIGINAL])
def test_every_environment_name_of_the_original_is_taken_and_what_is_ignored_gets_a_word(flag, alias, env, value):
    attribute, said = OURS.get(flag, flag), []
    bare = parsed("checkin")
    agent.resolve(bare, {env: value}, said.append)
    given = parsed("checkin", f"--{flag}", value)
    told = []
    agent.resolve(given, {}, told.append)
    if flag in IGNORED:
        assert len(said) == len(told) == 1
        assert flag in told[0]
        assert flag in said[0] or env in said[0]
    else:
        assert said == told == []
        assert getattr(bare, attribute) == getattr(given, attribute)
        assert getattr(bare, attribute) is not None
        assert next(setting.env for setting in SETTINGS if setting.name == attribute) == env


def test_a_flag_goes_before_the_environment():
    options = parsed("join", "--name", "flag", "--port", "51900")
    agent.resolve(options, {"NETCLIENT_NAME": "environment", "NETCLIENT_PORT": "x", "NETCLIENT_MTU": "1280"}, print)
    assert (options.name, options.port, options.mtu) == ("flag", 51900, 1280)


@pytest.mark.parametrize("setting", [each for each in SETTINGS if each.kind == "yesno"], ids=lambda each: each.name)
def test_yes_and_no_have_many_names(setting):
    for words, expected in ((("yes", "on", "true", "YES", "On"), True), (("no", "off", "false", "NO", "Off"), False)):
        for word in words:
            options = parsed("join", f"-{setting.name}={word}")
            agent.resolve(options, {}, print)
            assert getattr(options, setting.name.replace("-", "_")) is expected
    with pytest.raises(agent.UsageError, match=f"--{setting.name} takes yes or no"):
        agent.resolve(parsed("join", f"--{setting.name}", "maybe"), {}, print)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *((("-daemon=off",), "off"), (("--daemon", "off"), "off"), (("-daemon", "no"), "off"), (("--daemon=yes",), "on")),
        *((("--daemon", "resident"), "resident"), (("-daemon=on",), "on"), (("--daemon", "OFF"), "off"), ((), None)),
    ],
    ids=str,
)
def test_the_daemon_flag(words, expected):
    options = parsed("join", *words)
    agent.resolve(options, {}, print)
    assert options.daemon == expected


def test_values_may_begin_with_a_dash():
    # one server key in 64 does, and the agent itself prints `--server-key KEY` for people to run
    pin = "-" + b64(PIN)[1:]
    assert parsed("join", "--server-key", pin).server_key == pin
    assert parsed("join", "-k", "-x.y").key == "-x.y"
    assert parsed("join", "--server-key=" + pin).server_key == pin


def test_the_joins_of_the_seeds_are_taken_as_they_stand():
    line = "join --dnson no --name nas --network demo --daemon off --apiserver 203.0.113.10:8081 --grpcserver 203.0.113.10:50051"
    options, said = parsed(*line.split()), []
    agent.resolve(options, {}, said.append)
    assert (options.dnson, options.name, options.network, options.daemon) == (False, "nas", "demo", "off")
    assert (options.apiserver, len(said)) == ("203.0.113.10:8081", 1)


# ---------------------------------------------------------------------------------------------------------------------
# MISTAKES
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("join",), "join needs a token"),
        (("join", "-n", "demo"), "join needs a token"),
        (("join", "--apiserver", "203.0.113.10:8081"), "join needs a token"),
        (("join", "-t", TOKEN[:-7]), "damaged"),
        (("join", "-t", TOKEN[:40] + "x" + TOKEN[41:]), "damaged"),
        (("join", "-t", "hello"), "damaged"),
        (("join", "-t", b64(b'{"a":1}')), "not an access token"),
        (("join", "-t", TOKEN, "-n", "other"), "the token is for the network default, not other"),
        (("join", "-t", TOKEN, "-n", "a b"), "no network name"),
        (("join", "-n", "demo", "--apiserver", "x:y"), "--apiserver"),
        (("join", "-n", "x" * 13, "--apiserver", "127.0.0.1:9"), "no network name"),
        (("join", "-n", "demo", "--apiserver", "127.0.0.1:9", "--server-key", "x"), "--server-key"),
        (("join", "-n", "demo", "--apiserver", "127.0.0.1:9", "--server-key", b64(PIN), "-k", "x"), "access key"),
        (("join", "-t", TOKEN, "--port", "80"), "--port takes a whole number from 1024 to 65535"),
        (("join", "-t", TOKEN, "--port", "65536"), "--port takes"),
        (("join", "-t", TOKEN, "--port", "x"), "--port takes"),
        (("join", "-t", TOKEN, "--port", "²"), "--port takes"),
        (("join", "-t", TOKEN, "--keepalive", "-1"), "--keepalive takes"),
        (("join", "-t", TOKEN, "--keepalive", "1001"), "--keepalive takes"),
        (("join", "-t", TOKEN, "--mtu", "100"), "--mtu takes"),
        (("join", "-t", TOKEN, "--dnson", "maybe"), "--dnson takes yes or no"),
        (("join", "-t", TOKEN, "--daemon", "perhaps"), "--daemon takes on, off or resident"),
        (("join", "-t", TOKEN, "--address", "10.20.30"), "no IP address"),
        (("join", "-t", TOKEN, "--address", "fd00::1"), "no IPv4 address"),
        (("join", "-t", TOKEN, "--address6", "10.0.0.1"), "no IPv6 address"),
        (("join", "-t", TOKEN, "--endpoint", "router.example.org"), "no IP address"),
        (("join", "-t", TOKEN, "--localaddress", "x"), "no IP address"),
        (("join", "-t", TOKEN, "--localrange", "192.168.1.1/24"), "--localrange"),
        (("join", "-t", TOKEN, "--name", "my router"), "no node name"),
        (("join", "-t", TOKEN, "--interface", "a/b"), "no interface name"),
        (("join", "-t", TOKEN, "--interface", "x" * 16), "no interface name"),
        (("join", "-t", TOKEN, "--interface", ".."), "no interface name"),
        (("join", "-t", TOKEN, "--interface=-x"), "no interface name"),
        (("join", "-t", TOKEN, "--privatekey", "x"), "--privatekey"),
        (("join", "-t", TOKEN, "--privatekey", key_like("a"), "--publickey", key_like("b")), "--publickey does not belong"),
        (("leave",), "leave needs -n"),
        (("leave", "-n", "demo"), "'demo'"),
        (("checkin", "-n", "demo"), "'demo'"),
        (("pull", "-n", "demo"), "'demo'"),
        (("status", "-n", "demo"), "'demo'"),
    ],
    ids=lambda value: " ".join(value).replace(TOKEN, "TOKEN") if isinstance(value, tuple) else "",
)
def test_a_mistake_gets_one_sentence_and_exit_status_2(netclient, arguments, expected):
    said = sentence(netclient(*arguments), 2)
    assert expected in said
    assert written(netclient.root) == []
    for secret in (TOKEN[20:60], key_like("a")):
        assert secret not in said


def test_a_bad_private_key_is_not_shown(netclient):
    nearly = key_like("a")[:-2] + "=="
    assert nearly[:20] not in sentence(netclient("join", "-t", TOKEN, "--privatekey", nearly), 2)


@pytest.mark.parametrize(
    ("option", "value"), [("--name", "my router"), ("--address", "x"), ("--endpoint", "x"), ("--localrange", "x")]
)
def test_a_mistake_on_a_joined_machine_leaves_its_settings_alone(netclient, monkeypatch, option, value):
    # what is written here goes to the server at every check-in
    paths, files = agent.Paths(str(netclient.root)), agent.Files()
    secret = agent.Secret("default", "0123456789abcdef", "look", b"a" * 32, b"z" * 32, PIN)
    texts = {"netconfig": config_of(network="default", servers=["http://127.0.0.1:9"]).text(), "secret": secret.text()}
    for kind, text in {**texts, "wgkey": key_like("a") + "\n", "nettoken": "\n"}.items():
        files.write(paths.of(kind, "default"), text)
    before = {name: (netclient.root / name).read_text() for name in written(netclient.root)}
    sentence(netclient("join", "-t", TOKEN, option, value), 2)
    assert {name: (netclient.root / name).read_text() for name in written(netclient.root)} == before


def test_a_port_in_use_has_its_sentence(netclient):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        port = taken.getsockname()[1]
        said = sentence(netclient("join", "-t", TOKEN, "--port", str(port)), 1)
    assert f"UDP port {port} is in use" in said
    assert written(netclient.root) == []


def test_an_interface_that_is_there_has_its_sentence(netclient):
    assert "lo is there" in sentence(netclient("join", "-t", TOKEN, "--interface", "lo"), 1)
    assert written(netclient.root) == []


def test_a_server_that_is_not_there_has_its_sentence(netclient):
    said = sentence(netclient("join", "-t", TOKEN), 1)
    assert "nothing was changed" in said
    assert "refuses the connection" in said
    assert written(netclient.root) == []


# ---------------------------------------------------------------------------------------------------------------------
# WHO MAY
# ---------------------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import netclient_lite
netclient_lite.build_parser().format_help()  # nobody may not read all of this Python: what argparse imports late comes first
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
raise SystemExit(netclient_lite.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "arguments",
    [("join", "-t", TOKEN), ("leave", "-n", "all"), ("checkin",), ("pull",), ("push",), ("list",), ("status",), ("daemon",)],
    ids=lambda words: words[0],
)
def test_whoever_is_not_root_is_told_so(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", AS_NOBODY, str(AGENT.parent), *arguments],
        env={"NETCLIENT_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    said = sentence(Outcome(done.returncode, done.stdout, done.stderr), 1)
    assert "root" in said
    assert f"sudo netclient-lite {arguments[0]}" in said


def test_anybody_may_ask_for_the_version_and_for_help():
    for arguments in (["version"], ["--help"], ["join", "--help"]):
        command = [sys.executable, "-I", "-c", AS_NOBODY, str(AGENT.parent), *arguments]
        done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("tool", "packet"), [("wg", "wireguard-tools"), ("ip", "iproute2")])
def test_a_missing_tool_is_named_with_its_package(netclient, monkeypatch, tool, packet):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("/" + tool) and real(path, mode))
    said = sentence(netclient("join", "-t", TOKEN), 1)
    assert f"`{tool}` is not installed" in said
    assert packet in said
    assert written(netclient.root) == []


def test_a_machine_without_wireguard_is_told_what_to_install(netclient, monkeypatch):
    monkeypatch.setattr(agent.KernelWireGuard, "is_supported", lambda self: False)
    monkeypatch.setattr(agent.UserspaceWireGuard, "is_supported", lambda self: False)
    said = sentence(netclient("join", "-t", TOKEN), 1)
    for word in ("kmod-wireguard", "wireguard-go"):
        assert word in said
    assert written(netclient.root) == []


def test_tools_are_found_where_crons_path_does_not_lead(monkeypatch, tmp_path):
    (tmp_path / "nm-tool").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "nm-tool").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = agent.Run()
    assert run.has("nm-tool")
    assert run.has("sh")
    assert not run.has("nm-no-such-tool")
    assert run("nm-tool") == "here\n"
    with pytest.raises(agent.CommandFailed, match="not installed"):
        run("nm-no-such-tool")
