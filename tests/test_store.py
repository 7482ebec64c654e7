# SPDX-License-Identifier: Apache-2.0
"""The database: batches, migrations, races, backup and restore, the server's key."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading

import pytest
from serverkit import Client, Clock, Server, make_core, wireguard_key

import netmaker_lite as server
from netclient_lite import Invalid, b64, parse_token


@pytest.fixture
def core(tmp_path):
    made = make_core(str(tmp_path), Clock())
    server.add_network(made, "default", {"range": "10.20.30.0/24"})
    yield made
    made.store.close()


def joining(core, key_id, number, **values):
    """A joiner whose proof was right."""
    facts = {"key": wireguard_key(), "port": 51821, "name": "n", **values}
    return server.Joining("default", "auth-%d" % number, key_id, "198.51.100.1", "198.51.100.1", facts)


def in_parallel(count, work):
    """What each of so many threads at once got, or the error it got."""
    found, start = [], threading.Barrier(count)

    def run(number):
        start.wait()
        try:
            found.append(work(number))
        except Exception as problem:
            found.append(problem)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# ---- batches


def test_a_batch_applies_whole_or_not_at_all(core):
    batch = server.NetworkBatch("default", core.now)
    row = {"network": "default", "address": "10.20.30.9", "node": "x", "released": None}
    batch.insert("lease", row)
    batch.update("node", {"name": "x"}, "id = ?", "nobody", must=True)
    assert core.store.apply(batch) is False
    assert core.store.rows("SELECT * FROM lease") == []
    assert core.store.word("default")[0] == 1


def test_a_batch_whose_precondition_fails_changes_nothing(core):
    batch = server.NetworkBatch("default", core.now)
    batch.when("counter = ?", 99)
    batch.insert("access_key", {"id": "x", "network": "default", "name": "n", "secret": "", "created": 0})
    assert core.store.apply(batch) is False
    assert core.store.rows("SELECT * FROM access_key") == []


def test_later_statements_hold_only_with_the_stamp(core):
    """Sent to a database without interactive transactions they must do nothing when the first did not."""
    batch = server.NetworkBatch("default", core.now)
    batch.when("counter = ?", 99)
    batch.update("network", {"mtu": 1}, "id = ?", "default")
    batch.insert("lease", {"network": "default", "address": "a", "node": "x", "released": None})
    for sql, values, _ in batch.statements():
        core.store.writer.execute_sql(sql, values)
    assert core.store.rows("SELECT mtu FROM network") == [(1280,)]
    assert core.store.rows("SELECT * FROM lease") == []


def test_the_history_is_pruned(core, monkeypatch):
    monkeypatch.setattr(server, "HISTORY", 5)
    for mtu in range(1300, 1320):
        server.set_network(core, "default", {"mtu": mtu})
    assert core.store.rows("SELECT COUNT(*) FROM revision") == [(5,)]
    assert server.check(core) == []


def test_only_one_process_wins_when_another_upsets(core, tmp_path):
    """A change whose precondition another process upset is built anew from a fresh look."""
    other, builds = make_core(str(tmp_path)), []

    def build():
        word = core.store.word("default")
        builds.append(word)
        if len(builds) == 1:  # the other process has the file to itself for this moment
            threading.Thread(target=lambda: None).start()
            apply = server.NetworkBatch("default", 0)
            assert other.store.apply(apply)
        batch = server.NetworkBatch("default", core.now)
        batch.when("counter = ?", word[0])
        return batch

    core.store.change(build)
    assert len(builds) == 2
    other.store.close()


# ---- joins


def test_32_joins_on_one_use_make_one_node(core):
    key = server.add_key(core, "default", uses=1)
    found = in_parallel(32, lambda number: server.join(core, joining(core, key["id"], number)))
    nodes = [each for each in found if isinstance(each, dict)]
    assert len(nodes) == 1
    assert sum(isinstance(each, server.UsedUp) for each in found) == 31
    assert len(server.nodes(core, "default")) == 1
    assert server.check(core) == []


def test_joins_of_two_processes_on_three_uses(core, tmp_path):
    key = server.add_key(core, "default", uses=3)
    other = make_core(str(tmp_path))
    found = in_parallel(12, lambda number: server.join((core, other)[number % 2], joining(core, key["id"], number)))
    assert sum(isinstance(each, dict) for each in found) == 3, found
    assert server.check(core) == []
    other.store.close()


def test_200_joins_no_address_twice(core):
    key = server.add_key(core, "default", uses=None)
    found = in_parallel(8, lambda part: [
        server.join(core, joining(core, key["id"], part * 25 + each)) for each in range(25)
    ])  # fmt: skip
    nodes = [node for part in found for node in part]
    assert len({node["ip"] for node in nodes}) == len({node["name"] for node in nodes}) == 200
    assert len({node["port"] for node in nodes}) == 200  # all behind one address
    assert server.check(core) == []


def test_a_retry_gets_the_same_node_and_spends_nothing(core):
    key = server.add_key(core, "default", uses=1)
    who = joining(core, key["id"], 1)
    assert server.join(core, who)["id"] == server.join(core, who)["id"]


def test_a_fixed_port_is_kept(core):
    key = server.add_key(core, "default", uses=None)
    for number in range(2):
        assert server.join(core, joining(core, key["id"], number, fixed=True))["port"] == 51821


def test_a_key_runs_out_by_time(core):
    key = server.add_key(core, "default", uses=None, lifetime=3600)
    core.clock.now += 3599
    server.join(core, joining(core, key["id"], 1))
    core.clock.now += 1
    with pytest.raises(server.UsedUp, match="used up or expired"):
        server.join(core, joining(core, key["id"], 2))


def test_the_node_limit_holds(core):
    server.set_network(core, "default", {"node_limit": 1})
    key = server.add_key(core, "default", uses=None)
    node = server.join(core, joining(core, key["id"], 1))
    with pytest.raises(server.Clash, match=r"limit .*: raise nodelimit, or remove nodes"):
        server.join(core, joining(core, key["id"], 2))
    server.remove_node(core, node)
    server.join(core, joining(core, key["id"], 3))


def test_sign_ups_are_bounded(core):
    with pytest.raises(server.Denied, match="without an access key"):
        server.join(core, joining(core, "", 1))
    server.set_network(core, "default", {"manual": True})
    for number in range(server.PENDING_PER_SOURCE):
        node = server.join(core, joining(core, "", number))
        assert node["state"] == "pending" and node["ip"] == ""
    with pytest.raises(server.SlowDown):
        server.join(core, joining(core, "", 99))
    core.clock.now += 8 * 86400
    server.sweep(core)
    assert server.nodes(core, "default") == []


def test_nodes_expire_and_come_back(core):
    key = server.add_key(core, "default", uses=None)
    node = server.join(core, joining(core, key["id"], 1))
    server.set_node(core, node, {"expires": core.now + 10})
    core.clock.now += 11
    server.sweep(core)
    assert server.need_node(core, "default", node["id"])["state"] == "expired"
    assert server.set_node(core, node, {"expires": None})["state"] == "active"


# ---- networks


def test_ranges_may_not_overlap(core):
    with pytest.raises(server.Clash, match="of the network default"):
        server.add_network(core, "other", {"range": "10.20.0.0/16"})
    server.add_network(core, "other", {"range": "10.21.0.0/16"})
    with pytest.raises(server.Clash, match="overlaps"):
        server.set_network(core, "other", {"range": "10.20.30.128/25"})
    with pytest.raises(server.Clash, match="already"):
        server.add_network(core, "OTHER", {"range": "10.99.0.0/16"})


def test_two_networks_at_once_with_one_range(core):
    found = in_parallel(4, lambda number: server.add_network(core, "n%d" % number, {"range": "10.77.0.0/16"}))
    assert sum(isinstance(each, dict) for each in found) == 1


def test_a_range_change_readdresses_every_node_at_once(core):
    key = server.add_key(core, "default", uses=None)
    nodes = [server.join(core, joining(core, key["id"], number)) for number in range(5)]
    before = core.store.word("default")[0]
    server.set_network(core, "default", {"range": "10.99.0.0/24", "range6": "fd99::/64"})
    assert core.store.word("default")[0] == before + 1
    for node in nodes:
        now = server.need_node(core, "default", node["id"])
        host = node["ip"].rpartition(".")[2]
        assert now["ip"] == "10.99.0." + host and now["ip6"].startswith("fd99::")
    later = server.join(core, joining(core, key["id"], 9))
    assert later["ip"] == "10.99.0.6"
    assert server.check(core) == []


def test_a_network_with_nodes_stays(core):
    key = server.add_key(core, "default", uses=None)
    node = server.join(core, joining(core, key["id"], 1))
    with pytest.raises(server.Clash, match="has nodes"):
        server.remove_network(core, "default")
    server.remove_node(core, node)
    server.remove_network(core, "default")
    assert server.check(core) == [] and server.networks(core) == []


# ---- nodes


def test_a_removed_address_is_the_last_to_be_given_out(core):
    key = server.add_key(core, "default", uses=None)
    first = server.join(core, joining(core, key["id"], 1))
    server.remove_node(core, first)
    assert server.join(core, joining(core, key["id"], 2))["ip"] == "10.20.30.2"
    assert server.check(core) == []


def test_an_address_can_be_moved_but_not_taken(core):
    key = server.add_key(core, "default", uses=None)
    one, two = (server.join(core, joining(core, key["id"], number)) for number in range(2))
    assert server.set_node(core, one, {"ip": "10.20.30.77"})["ip"] == "10.20.30.77"
    with pytest.raises(server.Clash, match="taken"):
        server.set_node(core, two, {"ip": "10.20.30.77"})
    with pytest.raises(server.Clash, match="name"):
        server.set_node(core, two, {"name": one["name"]})
    with pytest.raises(Invalid):
        server.set_node(core, two, {"ip": "10.20.30.255"})
    assert server.check(core) == []


def test_no_range_has_two_owners(core):
    key = server.add_key(core, "default", uses=None)
    one, two = (server.join(core, joining(core, key["id"], number)) for number in range(2))
    server.set_node(core, one, {"ips": "192.168.7.0/24"})
    with pytest.raises(server.Clash, match="which is a range of the node n:"):
        server.set_node(core, two, {"ips": "192.168.7.128/25"})
    with pytest.raises(server.Clash, match="which is the network's own range"):
        server.set_node(core, two, {"ips": "10.20.30.0/28"})


def test_one_wireguard_key_belongs_to_one_node(core):
    key = server.add_key(core, "default", uses=None)
    one = server.join(core, joining(core, key["id"], 1))
    with pytest.raises(server.Clash, match="belongs to the node"):
        server.join(core, joining(core, key["id"], 2, key=one["key"]))


# ---- the file, the key


def test_files_are_private_from_the_first_byte(tmp_path):
    core = make_core(str(tmp_path / "data"))
    for name in ("netmaker.db", "server.key"):
        assert stat.S_IMODE(os.stat(tmp_path / "data" / name).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "data").st_mode) == 0o700
    server.backup(core, str(tmp_path / "copy"), True)
    assert stat.S_IMODE(os.stat(tmp_path / "copy").st_mode) == 0o600
    core.store.close()


def test_starts_at_once_agree_on_the_key_and_the_incarnation(tmp_path):
    cores = in_parallel(6, lambda number: make_core(str(tmp_path)))
    assert len({core.key.pin for core in cores}) == 1, cores
    assert len({core.store.incarnation for core in cores}) == 1
    for core in cores:
        core.store.close()


def test_another_server_key_is_noticed(tmp_path):
    make_core(str(tmp_path)).store.close()
    (tmp_path / "server.key").write_text(b64(os.urandom(32)) + "\n")
    with pytest.raises(server.ServerError, match="not the key that this database was made with"):
        make_core(str(tmp_path))


def test_a_lost_server_key_is_not_made_anew_unasked(tmp_path):
    core = make_core(str(tmp_path))
    server.add_network(core, "default", {"range": "10.20.30.0/24"})
    server.add_key(core, "default")
    core.store.close()
    with pytest.raises(server.Clash, match="move it away first"):
        server.give_up_key(core.settings)
    os.unlink(tmp_path / "server.key")
    with pytest.raises(server.ServerError, match=r"is missing: restore it .*serve --new-key, and every agent joins again"):
        make_core(str(tmp_path))
    assert not (tmp_path / "server.key").exists()
    assert server.give_up_key(core.settings) == 1
    again = make_core(str(tmp_path))
    assert again.key.pin != core.key.pin and again.store.meta("pin") == b64(again.key.pin)
    assert server.access_keys(again, "default") == [] and server.check(again) == []
    again.store.close()


def test_a_pin_can_stand_after_a_flag(tmp_path, monkeypatch):
    seeds = [number.to_bytes(32, "little") for number in range(2000)]
    bad = next(seed for seed in seeds if b64(server.agent.public_key(seed)).startswith("-"))
    good = next(seed for seed in seeds if not b64(server.agent.public_key(seed)).startswith("-"))
    drawn = iter([bad, good])
    real = server.secrets.token_bytes
    monkeypatch.setattr(server.secrets, "token_bytes", lambda size: next(drawn) if size == 32 else real(size))
    assert server.ServerKey.load(str(tmp_path / "server.key")).private == good


def test_a_damaged_key_is_named(tmp_path):
    (tmp_path / "server.key").write_text("nonsense\n")
    with pytest.raises(server.ServerError, match="damaged"):
        make_core(str(tmp_path))


def test_the_database_alone_opens_nothing(core):
    key = server.add_key(core, "default")
    secret = key["value"].split(".")[1]
    for table in server.MODELS:
        for row in core.store.select(table.select()):
            assert secret not in str(row) and b64(core.key.private) not in str(row)


def test_tokens_hold_what_joining_needs(core):
    core.store.set_meta("urls", "http://203.0.113.10:8081 http://[2001:db8::1]:8081")
    token = parse_token(server.add_key(core, "default")["accessstring"])
    assert token.servers == ("http://203.0.113.10:8081", "http://[2001:db8::1]:8081")
    assert token.pin == core.key.pin and token.network == "default" and "." in token.key


def test_a_newer_database_is_refused(tmp_path):
    core = make_core(str(tmp_path))
    core.store.set_meta("schema", "99")
    core.store.close()
    with pytest.raises(server.ServerError, match="newer netmaker-lite"):
        make_core(str(tmp_path))


def test_a_migration_runs_once_and_keeps_a_copy(tmp_path, monkeypatch):
    make_core(str(tmp_path)).store.close()
    newer = server.SCHEMA + 1
    monkeypatch.setattr(server, "SCHEMA", newer)
    monkeypatch.setattr(server, "MIGRATIONS", {newer: ("ALTER TABLE network ADD COLUMN fresh TEXT",)})
    for _ in range(2):
        core = make_core(str(tmp_path))
        assert core.store.meta("schema") == str(newer)
        core.store.close()
    with sqlite3.connect(tmp_path / f"netmaker.db.before-{newer}") as copy:
        assert copy.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == (str(newer - 1),)
    copy.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    make_core(str(tmp_path)).store.close()
    newer = server.SCHEMA + 1
    monkeypatch.setattr(server, "SCHEMA", newer)
    monkeypatch.setattr(server, "MIGRATIONS", {newer: ("ALTER TABLE network ADD COLUMN fresh TEXT", "nonsense")})
    with pytest.raises(server.ServerError):
        make_core(str(tmp_path))
    with sqlite3.connect(tmp_path / "netmaker.db") as file:
        columns = [row[1] for row in file.execute("PRAGMA table_info(network)")]
        assert "fresh" not in columns
    file.close()


# ---- backup, restore, check


def test_backup_and_restore(tmp_path, clock):
    home = Server(str(tmp_path / "data"), clock)
    home.network()
    key = home.key()
    one, two = Client(home).join(key), Client(home, source="198.51.100.2").join(key)
    one.exchange()
    two.exchange()
    server.backup(home.core, str(tmp_path / "copy"), False)
    server.remove_node(home.core, home.node(two))
    three = Client(home, source="198.51.100.3").join(key)
    for client in (one, three):
        client.exchange()
    captured = one.sent
    incarnation = home.core.store.incarnation
    home.stop()

    done = server.restore(home.core.settings, str(tmp_path / "copy"))
    assert done.nodes == 2 and [node["id"] for node in done.back] == [two.node]
    again = Server(str(tmp_path / "data"), clock)
    assert again.core.store.incarnation != incarnation
    assert server.check(again.core) == []
    one.home = three.home = again
    assert one.send(*captured).status == 409
    said = one.exchange()
    assert "from" not in said.value and one.names() == {"node", "node-2"}
    status, headers, _ = again.post(*_line_of(three), three.source)
    assert status == 404 and "nm-lite" not in headers  # nothing is proven yet
    three.sequence += 1
    who = "%s@%s@%s" % (three.node, b64(three.public), three.network)
    assert three.send(three.line(who=who), b"").status == 404
    again.stop()


def _line_of(client):
    client.sequence += 1
    return server.agent.EXCHANGE_PATH, client.line(), b""


def test_a_backup_with_the_key_stands_alone(tmp_path):
    core = make_core(str(tmp_path / "one"))
    server.backup(core, str(tmp_path / "with"), True)
    server.backup(core, str(tmp_path / "without"), False)
    core.store.close()
    other = server.Settings({}, {"NETMAKER_DATA": str(tmp_path / "two")})
    with pytest.raises(server.Clash, match="another server key"):
        server.restore(other, str(tmp_path / "without"))
    server.restore(other, str(tmp_path / "with"))
    restored = make_core(str(tmp_path / "two"))
    assert restored.key.pin == core.key.pin
    assert "server_key" not in restored.store.writer.get_tables()
    restored.store.close()
    assert b64(core.key.private).encode() not in (tmp_path / "without").read_bytes()


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + b"x" * 5000])
def test_what_is_no_backup_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    settings = server.Settings({}, {"NETMAKER_DATA": str(tmp_path / "data")})
    with pytest.raises(Invalid, match="no backup"):
        server.restore(settings, str(tmp_path / "file"))
    with pytest.raises(Invalid, match="cannot read"):
        server.restore(settings, str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "fault, word",
    [
        ("DELETE FROM lease", "without a lease"),
        ("UPDATE lease SET node = 'x'", "lease without a node"),
        ("UPDATE network SET counter = 1", "history from the future"),
        ("UPDATE network SET tag = 'x'", "not in the history"),
        ("UPDATE network SET members = 9", "wrong count"),
        ("UPDATE node SET ip = '10.9.9.9'", "outside its range"),
        ("UPDATE access_key SET secret = 'x'", "another server.key"),
        ("INSERT INTO observed VALUES ('default', 'a', 'b', 'c')", "not there"),
        ("INSERT INTO gone VALUES ('nowhere', 'a', 1)", "without a network"),
    ],
)
def test_check_finds_faults(core, fault, word):
    key = server.add_key(core, "default", uses=None)
    server.join(core, joining(core, key["id"], 1))
    assert server.check(core) == []
    core.store.writer.execute_sql(fault)
    assert any(word in finding for finding in server.check(core)), server.check(core)


def test_a_database_set_back_in_time_gives_a_snapshot(tmp_path, clock):
    home = Server(str(tmp_path / "data"), clock)
    home.network()
    key = home.key()
    one = Client(home).join(key)
    one.exchange()
    home.stop()
    for name in ("netmaker.db", "netmaker.db-wal"):
        if (tmp_path / "data" / name).exists():
            shutil.copy(tmp_path / "data" / name, tmp_path / name)

    def started():
        again = Server(str(tmp_path / "data"), clock)
        one.home = again
        return again

    again = started()
    Client(again, source="198.51.100.2").join(key)
    one.exchange()
    assert len(one.peers) == 2
    again.stop()
    for name in os.listdir(tmp_path / "data"):
        if name.startswith("netmaker.db"):
            os.unlink(tmp_path / "data" / name)
    shutil.copy(tmp_path / "netmaker.db", tmp_path / "data" / "netmaker.db")
    again = started()
    other = Client(again, source="198.51.100.3")
    other.wishes = {"name": "other"}
    other.join(key)  # the same counter as before, another tag
    said = one.exchange()
    assert "from" not in said.value and one.names() == {"node", "other"}
    again.stop()
