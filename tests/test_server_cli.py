# SPDX-License-Identifier: Apache-2.0
"""The administrator's commands, their sentences and exit statuses, and a real `serve`."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from serverkit import Client

import netmaker_admin as admin
import netmaker_core
import netmaker_lite as server
from netclient_lite import parse_token

PROGRAM = Path(__file__).resolve().parent.parent / "netmaker_lite.py"


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command in this process: (status, what it printed, what it complained of)."""

    def command(words, **environment):
        values = {"NETMAKER_DATA": str(tmp_path / "data"), "SERVER_HOST": "203.0.113.10", **environment}
        try:
            status = server.main(words.split() if isinstance(words, str) else words, values)
        except SystemExit as end:  # argparse
            status = end.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


@pytest.fixture
def done(run):
    """Run a command that works; the object of --json."""

    def command(words):
        status, out, err = run(words + " --json")
        assert status == 0, err
        return json.loads(out)

    return command


def test_networks(run, done):
    made = done("network add Home --range 10.1.2.3/24 --range6 fd01::/64 --mtu 1400 --hole-punch no")
    assert made["netid"] == "home" and made["addressrange"] == "10.1.2.0/24"
    assert (made["isdualstack"], made["defaultudpholepunch"], made["defaultmtu"]) == ("yes", "no", 1400)
    assert made["defaultinterface"] == "nm-home" and made["checkininterval"] == 15
    assert done("network show home") == done("network list")[0] == made
    changed = done("network set home defaultkeepalive=25 manual-signup=yes checkininterval=30")
    assert (changed["defaultkeepalive"], changed["allowmanualsignup"], changed["checkininterval"]) == (25, "yes", 30)
    assert "10.1.2.0/24" in run("network list")[1]
    assert run("network remove home") == (0, "network home removed\n", "")
    assert done("network list") == []


def test_keys(run, done):
    done("network add home --range 10.1.2.0/24")
    made = done("key add home --name front --uses 3 --expires 24h")
    token = parse_token(made["accessstring"])
    assert token.key == made["value"] and token.servers == ("http://203.0.113.10:8081",)
    assert made["join"] == "netclient_lite.py join -t " + made["accessstring"]
    listed = done("key list home")
    assert listed[0]["name"] == "front" and listed[0]["uses"] == 3
    assert listed[0]["accessstring"] == listed[0]["value"] == ""
    printed = run("key add home --uses unlimited")[1]
    assert "netclient_lite.py join -t " in printed and "shown once" in printed
    assert "unlimited" in run("key list home")[1]
    assert run("key remove home front")[0] == 0
    assert len(done("key list home")) == 1


@pytest.fixture
def node(home, done, monkeypatch, tmp_path):
    """A node of a running server, and the command line beside it."""
    monkeypatch.setattr(server.time, "time", home.core.clock)
    client = Client(home).join(home.key())
    client.exchange({"facts": {"os": "OpenWrt"}})
    return client


def test_nodes(node, run, done):
    listed = done("node list default")
    assert [each["name"] for each in listed] == ["node"]
    found = done("node show default node")
    assert found["id"] == node.node and found["address"] == "10.20.30.1" and found["os"] == "OpenWrt"
    assert (found["status"], found["ispending"], found["endpoint"]) == ("healthy", "no", node.source)
    assert (found["persistentkeepalive"], found["mtu"], found["interface"]) == (20, 1280, "nm-default")
    words = "name=Front address=10.20.30.9 listenport=40000 keepalive=0 allowedips=192.168.7.0/24 expires=7d"
    changed = done("node set default %s %s" % (node.node, words))
    assert (changed["name"], changed["address"], changed["listenport"]) == ("front", "10.20.30.9", 40000)
    assert (changed["isstatic"], changed["allowedips"]) == ("yes", ["192.168.7.0/24"])
    node.exchange()
    record = node.peers[node.node]
    assert (record["ip"], record["ips"], node.me["port"]) == ("10.20.30.9", ["192.168.7.0/24"], 40000)
    assert done("node set default front endpoint=198.51.100.9:4000")["endpoint"] == "198.51.100.9:4000"
    assert done("node set default front isstatic=no")["isstatic"] == "no"
    assert "front" in run("node list default")[1]
    for verb in ("disable", "enable"):
        assert done("node %s default front" % verb)["name"] == "front"
    assert done("node remove default front")["Message"] == "node front deleted."
    assert done("node list default") == []


def test_approve_and_reject(home, run, done):
    done("network set default allowmanualsignup=yes")
    one, two = Client(home, source="192.0.2.71").join(), Client(home, source="192.0.2.72").join()
    assert done("node show default %s" % one.name)["ispending"] == "yes"
    assert done("node approve default %s" % one.name) == "SUCCESS"
    assert done("node show default %s" % one.name)["address"] == "10.20.30.1"
    assert run("node reject default %s" % two.name)[1] == "node %s turned away\n" % two.name
    status, _, err = run("node reject default %s" % one.name)
    assert status == 1 and "not pending" in err


@pytest.mark.parametrize(
    "words, status, sentence",
    [
        ("network add all --range 10.1.0.0/24", 2, "every network"),
        ("network add a/b --range 10.1.0.0/24", 2, "no network name"),
        ("network add x", 2, "needs a range"),
        ("network add x --range 10.1.0.0/33", 2, "no range"),
        ("network add x --range fd00::/64", 2, "no IPv4 range: give it with --range6"),
        ("network add x --range6 fd77::/129", 2, "like fd00:"),
        ("network add x --range 10.1.0.0/24 --port 80", 2, "--port takes a whole number from 1024 to 65535, not '80'"),
        ("network add x --range 10.1.0.0/24 --mtu 10", 2, "--mtu takes a whole number from 576 to 9200, not '10'"),
        ("network add x --range 10.1.0.0/24 --hole-punch perhaps", 2, "--hole-punch: 'perhaps' is neither yes nor no"),
        ("network set default mtu=10", 2, ": mtu takes a whole number"),
        ("network set default mtu", 2, "write mtu=VALUE"),
        ("network add x --range 10.20.30.0/25", 1, "overlaps"),
        ("network add default --range 10.9.0.0/24", 1, "already"),
        ("network show nowhere", 1, "no network nowhere"),
        ("network set default colour=red", 2, "cannot be set"),
        ("network set default netid=x", 2, "cannot be set"),
        ("network frobnicate", 2, "there is no command netmaker-lite network frobnicate: there is add, list"),
        ("key add nowhere", 1, "no network"),
        ("key add default --uses 0", 2, "whole number"),
        ("key add default --uses many", 2, "or unlimited, not 'many'"),
        ("key add default --expires soon", 2, "like 24h"),
        ("key add default --name a/b", 2, "no name for a key"),
        ("key remove default nothing", 1, "no key nothing: `netmaker-lite key list default`"),
        ("node show default nobody", 1, "no node nobody: `netmaker-lite node list default`"),
        ("restore /nowhere/file", 2, "cannot read"),
        ("backup /nowhere/file", 1, "cannot write"),
        ("", 2, "required"),
    ],
)
def test_errors_are_one_sentence(run, done, words, status, sentence):
    done("network add default --range 10.20.30.0/24")
    before = (done("network list"), done("key list default"))
    found, out, err = run(words)
    assert (found, out) == (status, "") and sentence in err
    assert "Traceback" not in err
    if "usage" not in err:
        assert err.startswith("netmaker-lite: ") and err.count("\n") == 1
    assert (done("network list"), done("key list default")) == before


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"API_PORT": "http"}, "API_PORT=http"),
        ({"CHECKIN_INTERVAL": "0"}, "CHECKIN_INTERVAL=0"),
        ({"DATABASE": "rqlite"}, "not supported here"),
        ({"SERVER_BACKEND": "apache"}, "there is waitress, gevent, wsgiref"),
        ({"TRUSTED_PROXIES": "nonsense"}, "TRUSTED_PROXIES"),
        ({"SERVER_API_CONN_STRING": "ftp://x"}, "SERVER_API_CONN_STRING"),
        ({"VERBOSITY": "9"}, "VERBOSITY=9"),
        ({"SERVER_HOST": "a b"}, "SERVER_HOST=a b"),
    ],
)
def test_settings_that_cannot_be(run, environment, sentence):
    status, _, err = run("serve", **environment)
    assert status == 2 and sentence in err


def test_settings_come_from_flag_environment_file_default(tmp_path):
    (tmp_path / "netmaker.env").write_text("# mine\nAPI_PORT=1111\nexport SERVER_HOST='file'\nPOLL_LIMIT=7\n")
    place = {"NETMAKER_DATA": str(tmp_path)}
    found = netmaker_core.Settings({"API_PORT": "3333"}, {**place, "API_PORT": "2222", "SERVER_HOST": "environment"})
    names = ("API_PORT", "SERVER_HOST", "POLL_LIMIT", "CHECKIN_INTERVAL")
    assert [found[name] for name in names] == [3333, "environment", 7, 15]


def test_an_unusable_data_folder_has_its_sentence(run, tmp_path):
    (tmp_path / "file").write_text("x")
    for words in ("network add home --range 10.1.0.0/24", "serve"):
        status, _, err = run(words, NETMAKER_DATA=str(tmp_path / "file" / "data"))
        assert status == 1 and "cannot make the data folder" in err and err.count("\n") == 1
    (tmp_path / "netmaker.db").write_bytes(b"x" * 8192)
    status, _, err = run("network list", NETMAKER_DATA=str(tmp_path))
    assert status == 1 and "is damaged" in err and "restore FILE" in err


def test_backup_restore_check_version(run, done, tmp_path):
    done("network add home --range 10.1.2.0/24")
    assert done("backup %s --with-key" % (tmp_path / "copy"))["with_key"] == "yes"
    done("network add other --range 10.2.2.0/24")
    assert done("restore %s" % (tmp_path / "copy")) == {"nodes": 0, "back": []}
    assert [each["netid"] for each in done("network list")] == ["home"]
    assert done("check") == {"findings": []}
    assert done("version") == {"version": server.__version__}
    core = netmaker_core.open_core(netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path / "data")}))
    core.store.writer.execute_sql("UPDATE network SET members = 7")
    core.store.close()
    status, out, _ = run("check")
    assert status == 1 and "wrong count of nodes" in out


def test_a_misspelt_folder_makes_no_database(run, tmp_path):
    for words in ("network list", "key add home", "node list home", "backup %s" % (tmp_path / "copy"), "check"):
        status, out, err = run(words + " --data %s" % (tmp_path / "typo"))
        assert (status, out) == (1, "")
        cure = "name the server's folder with --data, or begin with `netmaker-lite serve`"
        assert err == "netmaker-lite: there is no database in %s: %s\n" % (tmp_path / "typo", cure)
    assert os.listdir(tmp_path) == []


def test_the_version_needs_nothing(run, tmp_path):
    place = tmp_path / "data"
    place.mkdir()
    (place / "netmaker.env").write_text("API_PORT=nonsense\n")
    assert run("version") == (0, "netmaker-lite %s\n" % server.__version__, "")


def test_what_the_settings_file_says_in_vain_is_named(run, done, tmp_path, caplog):
    done("network add home --range 10.1.2.0/24")
    (tmp_path / "data" / "netmaker.env").write_text("# fine\nAPI_PROT=1\n\nexport SERVER_HOST=x\nnonsense here\n")
    caplog.clear()
    assert run("network list")[0] == 0
    file = str(tmp_path / "data" / "netmaker.env")
    expected = ["%s, line 2: there is no setting API_PROT" % file, "%s, line 5: 'nonsense' is not NAME=value" % file]
    assert [record.getMessage() for record in caplog.records] == expected


def test_flags_that_do_nothing_are_not_there(run):
    helps = {words: run(words + " --help")[1] for words in ("serve", "version", "check")}
    assert "--json" not in helps["serve"] and "--data" in helps["serve"] and "--new-key" in helps["serve"]
    assert "--data" not in helps["version"] and "--json" in helps["version"]
    assert "--data" in helps["check"] and "--json" in helps["check"]
    assert all(each.name in helps["serve"] and each.help in helps["serve"] for each in netmaker_core.SETTINGS)


def test_times_are_for_people_unless_json(node, run, done):
    done("node set default node expires=1900000000")
    lines = dict(line.split(None, 1) for line in run("node show default node")[1].splitlines() if "  " in line)
    assert lines["expdatetime"] == "2030-03-17 17:46 UTC" and lines["lastcheckin"] == "2027-01-15 08:00 UTC"
    assert done("node show default node")["expdatetime"] == 1900000000
    assert "UTC" in run("network show default")[1]
    netmaker_core.add_key(node.home.core, "default", name="old", lifetime=3600)
    assert "2027-01-15 09:00 UTC\n" in run("key list default")[1]
    node.home.core.clock.now += 3600
    assert "  expired\n" in run("key list default")[1]


def test_sentences_about_nodes(node, run, home):
    Client(home, source="198.51.100.2").join(home.key())
    assert "10.20.30.2 is taken: choose another\n" in run("node set default node address=10.20.30.2")[2]
    assert "its range is 10.20.30.0/24\n" in run("node set default node address=10.9.9.9")[2]
    assert "the name node-2 is taken: choose another\n" in run("node set default node name=node-2")[2]
    assert "which is the network's own range" in run("node set default node allowedips=10.20.0.0/16")[2]
    assert "mtu takes a whole number from 576 to 9200, not '10'\n" in run("node set default node mtu=10")[2]
    assert "`netmaker-lite node remove default node`" in run("node reject default node")[2]


# ---- rights

NOBODY = 65534


@pytest.fixture
def place():
    """A folder that every user can enter; the process is root again afterwards."""
    if os.getuid():
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # noqa: S103
        yield Path(folder)
        os.seteuid(0)
        os.setegid(0)


def test_root_writes_and_reads_backups_where_the_servers_user_cannot(run, place):
    data, usb = place / "data", place / "usb"
    data.mkdir()
    usb.mkdir(mode=0o700)
    os.chown(data, NOBODY, NOBODY)

    def sudo(words):
        os.seteuid(0)
        os.setegid(0)
        status, _, err = run(words, NETMAKER_DATA=str(data))
        assert os.geteuid() == NOBODY
        assert status == 0, err

    sudo("network add home --range 10.1.2.0/24")
    sudo("backup %s --with-key" % (usb / "copy"))
    sudo("network add other --range 10.2.2.0/24")
    sudo("restore %s" % (usb / "copy"))
    os.seteuid(0)
    os.setegid(0)
    found = os.stat(usb / "copy")
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600) and os.listdir(usb) == ["copy"]
    assert {(data / name).stat().st_uid for name in os.listdir(data)} == {NOBODY}
    assert not [name for name in os.listdir(data) if name.startswith("backup.")]
    assert "10.2.2.0/24" not in run("network list", NETMAKER_DATA=str(data))[1]


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_without_permission_one_sentence_says_whose_it_is(run, place, monkeypatch, mode):
    data = place / "data"
    assert run("network add home --range 10.1.2.0/24", NETMAKER_DATA=str(data))[0] == 0
    os.chmod(data, mode)
    monkeypatch.setattr(server.os, "getuid", lambda: NOBODY)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    for words in ("network list", "network add x --range 10.9.0.0/24", "check", "serve"):
        status, out, err = run(words, NETMAKER_DATA=str(data))
        assert (status, out) == (1, "") and err.count("\n") == 1, err
        assert err.startswith("netmaker-lite: %s" % data) and err.endswith(" belongs to root: run this with sudo\n")
    status, _, err = run("serve", NETMAKER_DATA=str(place / "new"))
    assert status == 1 and "cannot make the data folder %s" % (place / "new") in err and err.count("\n") == 1


# ---- serve


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(folder, port, *more, **environment):
    """A real server process that answers."""
    values = {**os.environ, "NETMAKER_DATA": str(folder), "SERVER_HOST": "203.0.113.10", **environment}
    command = [sys.executable, str(PROGRAM), "serve", "--host", "127.0.0.1", "--port", str(port), *more]
    process = subprocess.Popen(command, env=values, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=10))


class Place:
    """What a Client needs of a server that runs elsewhere."""

    def __init__(self, port, core):
        self.port, self.core, self.pin = port, core, core.key.pin

    def post(self, path, line, body, source=""):
        request = server.agent.post("127.0.0.1", self.port, "", path, line, body)
        return server.agent.http("127.0.0.1", self.port, False, request)[:3]


@pytest.mark.parametrize("backend", ["waitress", "wsgiref", "gevent"])
def test_serve(tmp_path, run, done, backend):
    if backend == "gevent":
        pytest.importorskip("gevent")
    done("network add default --range 10.20.30.0/24")
    port = free_port()
    process = started(tmp_path / "data", port, SERVER_BACKEND=backend)
    try:
        made = done("key add default")
        assert parse_token(made["accessstring"]).servers == ("http://203.0.113.10:%d" % port,)
        core = netmaker_core.open_core(netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path / "data")}))
        client = Client(Place(port, core), source="").join(made["value"])
        assert client.exchange().status == 200 and client.exchange().status == 204
        assert client.peers[client.node]["seen"] == "203.0.113.10:51821"  # on the server's own host
        core.store.close()
        status, _, err = run("restore %s" % (tmp_path / "x"))
        assert status == 1 and "stop it first" in err
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "listening on 127.0.0.1:%d" % port in out
    assert server.b64(core.key.pin) in out
    assert "Traceback" not in err
    core = netmaker_core.open_core(netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path / "data")}))
    assert netmaker_core.nodes(core, "default")[0]["last_seen"] > 0
    core.store.close()


def test_serve_with_a_new_key(tmp_path, run, done):
    done("network add default --range 10.20.30.0/24")
    done("key add default")
    os.unlink(tmp_path / "data" / "server.key")
    status, _, err = run("key add default")
    assert status == 1 and "server.key is missing: restore it" in err and err.count("\n") == 1
    assert "is missing" in run("serve --host 127.0.0.1 --port %d" % free_port())[2]
    process = started(tmp_path / "data", free_port(), "--new-key")
    out = "".join(process.stdout.readline() for _ in range(4))
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "removed: 1\n" in out, err
    assert done("key list default") == []
    assert server.b64(parse_token(done("key add default")["accessstring"]).pin) in out
    assert "move it away first" in run("serve --new-key --host 127.0.0.1 --port %d" % free_port())[2]


def test_a_port_in_use_has_its_sentence(tmp_path, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = run("serve --host 127.0.0.1 --port %d" % taken.getsockname()[1])
    assert status == 1 and "cannot listen on 127.0.0.1" in err and "running already" in err
    assert err.count("\n") == 1


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['bottle'] = None; import netmaker_lite"
    found = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert found.returncode == 1 and "pip install bottle" in found.stderr and "Traceback" not in found.stderr


def test_help_of_every_command(run):
    for command in admin.SHOWN:
        status, out, _ = run(command.words + " --help")
        assert status == 0 and command.help in " ".join(out.split())


def test_the_address_in_tokens(tmp_path):
    def urls(**values):
        return netmaker_core.own_urls(netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path), **values}))

    assert urls(SERVER_HOST="[2001:db8::1]") == urls(SERVER_HOST="2001:db8::1") == ("http://[2001:db8::1]:8081",)
    assert urls(SERVER_HOST="x.example", API_PORT="80") == ("http://x.example:80",)
    assert urls(SERVER_API_CONN_STRING="https://a/nm/, b:81") == ("https://a/nm", "http://b:81")
    assert urls() == ("http://%s:8081" % netmaker_core.default_address(),)


def test_where_it_listens(tmp_path):
    def bind(**values):
        return netmaker_core.bind_address(netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path), **values}))

    assert bind(SERVER_HOST="x.example") == bind(SERVER_HOST="203.0.113.10") == "0.0.0.0"
    assert bind(SERVER_HOST="2001:db8::1") == bind(SERVER_HOST="[2001:db8::1]") == "::"
    assert bind(SERVER_HOST="2001:db8::1", SERVER_BIND="127.0.0.1") == "127.0.0.1"


def test_both_families_at_once(tmp_path):
    sock = server.listener("::", 0)
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, sock.getsockname()[1]), 5).close()
    sock.close()


def test_this_hosts_own_addresses():
    assert server.Sight._own("127.0.0.1") and server.Sight._own(netmaker_core.default_address())
    assert not server.Sight._own("192.0.2.213")


# ---- from elsewhere


def test_the_same_commands_from_elsewhere(node, run, done, monkeypatch):
    """Over HTTP with an API token: the same objects, the same sentences."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse\n"))
    assert run("user add ada --admin")[0] == 0
    token = done("user apitoken add ada laptop")["value"]
    api = {"NETMAKER_API": "http://127.0.0.1:%d" % node.home.port, "NETMAKER_TOKEN": token}
    for words in ("network show default", "node list default", "node show default node", "user list", "user apitoken list ada"):
        assert json.loads(run(words + " --json", **api)[1]) == done(words)
    for words in (
        "network show nowhere",
        "node show default nobody",
        "network set default mtu=10",
        "key add default --expires soon",
    ):
        assert run(words, **api) == run(words)
    assert run("node set default node name=front mtu=1300", **api)[0] == 0
    assert done("node show default front")["mtu"] == 1300
    who = [(entry["who"], entry["action"]) for entry in done("audit --network default --since 1h")]
    assert ("ada/laptop", "node set") in who
    assert run("names node default", **api)[1] == "front\n"
    read = done("user apitoken add ada eyes --scope read")["value"]
    assert run("node list default", **{**api, "NETMAKER_TOKEN": read})[0] == 0
    status, _, err = run("node remove default front", **{**api, "NETMAKER_TOKEN": read})
    assert (status, err) == (1, "netmaker-lite: this API token may only read: take one of scope write\n")
    run("user apitoken remove ada laptop")
    status, _, err = run("node list default", **api)
    assert status == 1 and "does not know this token" in err
    assert "user apitoken add" in run("node list default", NETMAKER_API=api["NETMAKER_API"])[2]


def test_the_command_line_works_where_the_api_is_off(run):
    assert run("network add home --range 10.1.2.0/24", REST_BACKEND="off")[0] == 0


def test_who_changed_what_on_this_host(run, done):
    run("network add home --range 10.1.2.0/24", SUDO_USER="ann")
    entry = done("audit")[0]
    assert (entry["who"], entry["source"], entry["action"], entry["network"]) == ("ann", "this host", "network add", "home")
    assert "network add" in run("audit --since 1h")[1]
    assert run("audit --since soon")[2] == "netmaker-lite: 'soon' is no time: a number and s, m, h, d or w, like 24h\n"


def test_a_time_without_its_unit_expels_no_node(node, run, done):
    for words in ("node set default node expires=30", "key add default --expires 24", "audit --since 24"):
        status, _, err = run(words)
        assert status == 2 and "has no unit" in err, words
    assert done("node show default node")["expdatetime"] == 0


@pytest.mark.parametrize("how, status", (("<&-", 2), (">&-", 0), (">/dev/full", 1)))
def test_closed_streams_and_full_disks_have_their_sentence(tmp_path, how, status):
    words = "user add bob" if how == "<&-" else "network add home --range 10.1.2.0/24"
    script = '"$0" "$1" %s --data "$2" %s' % (words, how)
    argv = ("sh", "-c", script, sys.executable, str(Path(server.__file__)), str(tmp_path / "data"))
    found = subprocess.run(argv, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
    assert found.returncode == status and len(found.stderr.splitlines()) <= 1, found.stderr
