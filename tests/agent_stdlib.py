# SPDX-License-Identifier: Apache-2.0
"""The agent on the standard library alone, on any CPython from 3.8 on: `python3.8 -I tests/agent_stdlib.py`.

What tests/test_*.py prove at length with pytest and hypothesis on one Python is tried here on the others with a handful of cases.
requests, PyNaCl and zeroconf cannot be imported, as on a router that has none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import py_compile
import random
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

MISSING = ("requests", "nacl", "nacl.bindings", "nacl.secret", "zeroconf", "bottle", "peewee")
for name in MISSING:
    sys.modules[name] = None  # type: ignore[assignment]

from kernel import Kernel, RefusedByKernel, hand_commands, hand_peer_command, key_like  # noqa: E402

import netclient_lite as agent  # noqa: E402 - what must be missing has to be missing before

IF = "nm-demo"
CREATE = agent.Step(("ip", "link", "add", "dev", IF, "type", "wireguard"), "make " + IF)
TOKEN = agent.Token(("http://203.0.113.10:8081", "https://[2001:db8::1]/mesh"), bytes(range(32)), "default", "k1." + "A" * 22)


def recorded(what):
    """The recorded outputs called so (see tests/data/record.sh)."""
    names = sorted(name for name in os.listdir(os.path.join(HERE, "data")) if name.startswith(what + "."))
    assert names, what
    for name in names:
        with open(os.path.join(HERE, "data", name), encoding="utf-8") as stream:
            yield stream.read()


class Tokens(unittest.TestCase):
    def test_a_token_comes_back_as_it_was(self):
        self.assertEqual(agent.parse_token(agent.make_token(TOKEN)), TOKEN)

    def test_truncations_and_changes_are_refused(self):
        text = agent.make_token(TOKEN)
        for at in range(len(text)):
            for other in (text[:at], text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]):
                with self.assertRaises(agent.Invalid):
                    agent.parse_token(other)

    def test_the_originals_token_is_read(self):
        raw = json.dumps({"apiconn": "203.0.113.10:8081", "network": "demo", "key": ""}).encode()
        self.assertEqual(agent.parse_token(agent.b64(raw)).servers, ("http://203.0.113.10:8081",))

    def test_names_keys_addresses_and_ports(self):
        for check, good, bad in (
            (agent.check_network, "demo", "a b"),
            (agent.check_name, "router-1", "-"),
            (agent.check_key, key_like("a"), "x"),
            (agent.check_address, "fd00::1", "fe80::1%eth0"),
            (agent.check_port, 51821, 80),
        ):
            self.assertEqual(check(good), good)
            with self.assertRaises(agent.Invalid):
                check(bad)


class Curve(unittest.TestCase):
    BASE = b"\x09" + bytes(31)

    def test_the_vectors_of_rfc_7748(self):
        for scalar, point, shared in (
            (
                "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
                "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
                "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
            ),
            (
                "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
                "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
                "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
            ),
        ):
            self.assertEqual(agent.x25519(bytes.fromhex(scalar), bytes.fromhex(point)).hex(), shared)

    def test_the_iterated_vector(self):
        k = u = self.BASE
        for _ in range(100):
            k, u = agent.ladder(k, u), k
        # the outcome of 100 rounds is not in the RFC; it is that of PyNaCl, whose 1,000 are the RFC's
        self.assertEqual(k.hex(), HUNDRED)

    def test_an_all_zero_outcome_is_refused(self):
        for point in (bytes(32), b"\x01" + bytes(31), (2**255 - 20).to_bytes(32, "little")):
            with self.assertRaises(agent.Invalid):
                agent.x25519(hashlib.sha256(b"some scalar").digest(), point)

    def test_without_pynacl_nothing_is_sealed(self):
        self.assertIsNone(agent.secret_box(bytes(32)))
        self.assertEqual(agent.check_key(agent.derived_public(agent.new_private()))[-1], "=")


HUNDRED = "b1a5a73158904c020866c13939dd7e1aa26852ee1d2609c92e5a8f1debe2150a"


class Plans(unittest.TestCase):
    def test_after_a_plan_nothing_is_left_to_do(self):
        for seed in range(60):
            chance = random.Random(seed)
            kernel, desired = self.draw(chance)
            first = agent.plan(kernel.actual(), desired, CREATE, batch=bool(seed % 2))
            kernel.replay(first)
            with self.subTest(seed=seed):
                self.assertEqual(agent.plan(kernel.actual(), desired, CREATE), [], first)
                self.assertEqual(set(kernel.actual().peers), set(desired.peers))

    def draw(self, chance):
        """An interface in some state, and another one to be brought about."""
        kernel = Kernel(IF)
        if chance.random() < 0.9:
            kernel(*CREATE.argv)
            commands = [hand_peer_command(IF, chance) for _ in range(3)] + chance.sample(hand_commands(IF), 8)
            for command in commands:
                with contextlib.suppress(RefusedByKernel):
                    kernel(*command)
        addresses = frozenset(
            chance.sample(("10.20.30.2/24", "10.20.0.2/16"), 1) + chance.sample(("fd00:20::2/64",), chance.randint(0, 1))
        )
        routes = agent.networks_of(addresses) | set(chance.sample(("192.168.7.0/24", "172.29.0.0/16", "fd00:7::/48"), 2))
        peers = {}
        for owner, owned in (("a", "10.20.30.5/32"), ("b", "192.168.7.0/24"), ("d", "fd00:7::/48")):
            if chance.random() < 0.7:
                peer = agent.Peer(key_like(owner), chance.choice(("", "203.0.113.7:51821")), frozenset({owned}), 20)
                peers[peer.key] = peer
        return kernel, agent.Desired(IF, key_like("private"), 51821, 1280, addresses, frozenset(routes), peers)

    def test_a_dry_run_starts_nothing_and_shows_no_key(self):
        desired = agent.Desired(IF, key_like("private"), 51821, 1280, frozenset(), frozenset(), {})
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            agent.Run(dry=True).apply(agent.plan(agent.Actual(), desired, CREATE))
        self.assertIn("wg set nm-demo", shown.getvalue())
        self.assertNotIn(key_like("private"), shown.getvalue())

    def test_processes_run(self):
        run = agent.Run()
        self.assertEqual(run("cat", stdin="text"), "text")
        with self.assertRaises(agent.CommandFailed):
            run("false")
        with self.assertRaises(agent.CommandFailed):
            run("nm-no-such-tool")


class Parsers(unittest.TestCase):
    def test_what_the_tools_printed(self):
        for text in recorded("wg-dump-peers"):
            peers = {peer.endpoint: peer for peer in agent.parse_dump(text).peers.values()}
            self.assertEqual(set(peers), {"127.0.0.1:51822", "[2001:db8::7]:51821", "203.0.113.7:40007", ""})
            self.assertEqual(len(peers["127.0.0.1:51822"].allowed), 4)
        for text in recorded("ip-addr"):
            links = agent.parse_links(text)
            self.assertEqual(tuple(links["nm-demo"])[:3], (True, 1280, ["10.20.30.2/24", "fd00:20:30::2/64"]))
            self.assertEqual(tuple(links["ppp0"])[2], ["100.64.0.2/32"])
        for text in recorded("ip-route-dev"):
            self.assertEqual(agent.parse_routes(text), {"10.20.30.0/24", "10.99.0.1/32", "192.168.7.0/24"})
        for text in recorded("ip-6-route-dev"):
            self.assertEqual(agent.parse_routes(text), {"fd00:20:30::/64", "fd00:98::1/128", "fd00:99::/48"})
        for text in recorded("proc-net-arp"):
            self.assertEqual(agent.parse_arp(text, "192.168.1.1"), "02:00:5e:10:00:01")
        if sys.byteorder == "little":
            for text in recorded("proc-net-route"):
                self.assertEqual(agent.parse_default_gateway(text), ("eth0", "192.168.1.1"))

    def test_what_the_server_sends(self):
        me = {"name": "me", "ip": "10.20.30.2", "range": "10.20.30.0/24", "port": 51821, "keepalive": 20, "mtu": 1280}
        peer = {"id": "b", "name": "b", "key": key_like("b"), "ip": "10.20.30.5", "seen": "203.0.113.7:51821"}
        view = agent.parse_news(agent.View(), {"word": "1.00000001", "peers": [peer], "me": me})
        config = agent.Config({"network": "demo", "interface": IF})
        wanted, warnings = agent.desire(view, "me", config, key_like("private"), {"b": "203.0.113.7:51821"})
        self.assertEqual((wanted.addresses, warnings), ({"10.20.30.2/24"}, []))
        self.assertEqual(wanted.peers[key_like("b")].allowed, {"10.20.30.5/32"})
        with self.assertRaises(agent.BadAnswer):
            agent.parse_news(view, {"word": "2.00000002", "peers": [{**peer, "key": "x"}]})

    def test_files_come_back_as_they_were(self):
        secret = agent.Secret("demo", "node", "look", b"a" * 32, b"z" * 32, b"s" * 32)
        self.assertEqual(agent.Secret.parse("demo", secret.text()).text(), secret.text())
        self.assertEqual(agent.Counters(agent.Counters().text()).text(), agent.Counters().text())
        config = agent.Config({"network": "demo"})
        self.assertEqual(agent.Config.parse(config.text()).text(), config.text())
        self.assertEqual(agent.Memory(json.loads(agent.Memory().text())).text(), agent.Memory().text())

    def test_files_are_written_whole_and_private(self):
        with tempfile.TemporaryDirectory() as folder:
            path, files = os.path.join(folder, "config", "secret-demo"), agent.Files()
            self.assertTrue(files.write(path, "text\n"))
            self.assertFalse(files.write(path, "text\n"))
            self.assertEqual((agent.read_text(path), os.stat(path).st_mode & 0o777), ("text\n", 0o600))
            held = files.lock(os.path.join(folder, "run", "demo.lock"))
            self.assertIsNone(files.lock(os.path.join(folder, "run", "demo.lock")))
            os.close(held)


class CommandLine(unittest.TestCase):
    def run_agent(self, *arguments):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), mock.patch("os.geteuid", return_value=0):
            before = os.umask(0o022)
            try:
                status = agent.main(list(arguments))
            except SystemExit as end:
                status = end.code
            finally:
                os.umask(before)
        return status, shown.getvalue()

    def test_every_verb_has_help(self):
        for command in agent.COMMANDS:
            status, shown = self.run_agent(command.name, "--help")
            self.assertEqual(status, 0)
            for flag in command.flags:
                self.assertIn("--" + flag, shown)

    def test_the_originals_spellings(self):
        for words in (("-daemon=off",), ("--daemon", "off"), ("-daemon", "no")):
            options = agent.build_parser().parse_args(agent.spelled_out(["join", "-a6", "fd00::2", "-os", "linux", *words]))
            agent.resolve(options, {"NETCLIENT_DNS": "no"}, lambda said: None)
            self.assertEqual((options.daemon, options.address6, options.dnson), ("off", "fd00::2", False))

    def test_mistakes_have_a_sentence(self):
        with mock.patch.object(agent.Run, "has", return_value=True):
            for words in (("join",), ("join", "-t", "x"), ("join", "-t", agent.make_token(TOKEN), "-n", "other"), ("leave",)):
                status, shown = self.run_agent(*words)
                self.assertEqual((status, shown.count("\n")), (2, 1), shown)
        self.assertEqual(self.run_agent("frobnicate")[0], 2)
        self.assertEqual(self.run_agent("version")[0], 0)

    def test_bytecode_and_source_start(self):
        with tempfile.TemporaryDirectory() as folder:
            code = os.path.join(folder, "netclient_lite.pyc")
            py_compile.compile(agent.__file__, cfile=code, doraise=True)
            for path in (code, agent.__file__):
                done = subprocess.run(
                    [sys.executable, "-I", "-S", path, "version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
                self.assertEqual(done.returncode, 0, done.stdout)
                self.assertIn(agent.__version__.encode(), done.stdout)

    def test_nothing_that_may_be_missing_was_imported(self):
        for name in MISSING:
            self.assertIsNone(sys.modules[name])
        # what OpenWrt's python3-light lacks; unittest is ours, and it brings logging and its own
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", BARE, os.path.dirname(HERE)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.assertEqual((done.returncode, done.stdout.strip()), (0, b"[]"), done.stdout)


BARE = """
import sys
sys.path.insert(0, sys.argv[1])
import netclient_lite
netclient_lite.build_parser().format_help()
lacking = ("urllib", "http", "email", "logging", "uuid", "asyncio", "decimal", "ctypes", "pathlib")
print([name for name in lacking if name in sys.modules])
"""


if __name__ == "__main__":
    unittest.main(verbosity=0)
