# SPDX-License-Identifier: Apache-2.0
"""The database: batches, migrations, races, backup and restore, the server's key."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading
from pathlib import Path

import meshkit
import pytest
from restkit import Rest, api_token, make_user
from serverkit import Client, Clock, Server, make_core, wireguard_key

import netmaker_core
import netmaker_lite as server
from netclient_lite import Invalid, b64, parse_token

CONSOLE = netmaker_core.Caller("ann", "this host")


@pytest.fixture
def core(tmp_path):
    made = make_core(str(tmp_path), Clock())
    netmaker_core.add_network(made, "default", {"range": "10.20.30.0/24"})
    yield made
    made.store.close()


def joining(core, key_id, number, **values):
    """A joiner whose proof was right."""
    facts = {"key": wireguard_key(), "port": 51821, "name": "n", **values}
    return netmaker_core.Joining("default", "auth-%d" % number, key_id, "198.51.100.1", "198.51.100.1", facts)


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
    batch = netmaker_core.NetworkBatch("default", core.now)
    row = {"network": "default", "address": "10.20.30.9", "node": "x", "released": None}
    batch.insert("lease", row)
    batch.update("node", {"name": "x"}, "id = ?", "nobody", must=True)
    assert core.store.apply(batch) is False
    assert core.store.rows("SELECT * FROM lease") == []
    assert core.store.word("default")[0] == 1


def test_a_batch_whose_precondition_fails_changes_nothing(core):
    batch = netmaker_core.NetworkBatch("default", core.now)
    batch.when("counter = ?", 99)
    batch.insert("access_key", {"id": "x", "network": "default", "name": "n", "secret": "", "created": 0})
    assert core.store.apply(batch) is False
    assert core.store.rows("SELECT * FROM access_key") == []


def test_later_statements_hold_only_with_the_stamp(core):
    """Sent to a database without interactive transactions they must do nothing when the first did not."""
    batch = netmaker_core.NetworkBatch("default", core.now)
    batch.when("counter = ?", 99)
    batch.update("network", {"mtu": 1}, "id = ?", "default")
    batch.insert("lease", {"network": "default", "address": "a", "node": "x", "released": None})
    for sql, values, _ in batch.statements():
        core.store.writer.execute_sql(sql, values)
    assert core.store.rows("SELECT mtu FROM network") == [(1280,)]
    assert core.store.rows("SELECT * FROM lease") == []


def test_the_history_is_pruned(core, monkeypatch):
    monkeypatch.setattr(netmaker_core, "HISTORY", 5)
    for mtu in range(1300, 1320):
        netmaker_core.set_network(core, "default", {"mtu": mtu})
    assert core.store.rows("SELECT COUNT(*) FROM revision") == [(5,)]
    assert netmaker_core.check(core) == []


def test_only_one_process_wins_when_another_upsets(core, tmp_path):
    """A change whose precondition another process upset is built anew from a fresh look."""
    other, builds = make_core(str(tmp_path)), []

    def build():
        word = core.store.word("default")
        builds.append(word)
        if len(builds) == 1:  # the other process has the file to itself for this moment
            threading.Thread(target=lambda: None).start()
            apply = netmaker_core.NetworkBatch("default", 0)
            assert other.store.apply(apply)
        batch = netmaker_core.NetworkBatch("default", core.now)
        batch.when("counter = ?", word[0])
        return batch

    core.store.change(build)
    assert len(builds) == 2
    other.store.close()


def upset_once(core, monkeypatch, other):
    """Another process' change comes between a change's look and its commit."""
    apply = core.store.apply

    def late(batch):
        monkeypatch.setattr(core.store, "apply", apply)
        other()
        return apply(batch)

    monkeypatch.setattr(core.store, "apply", late)


def test_a_name_given_away_meanwhile_is_not_given_twice(core, monkeypatch):
    upset_once(core, monkeypatch, lambda: netmaker_core.set_name(core, "default", "", {"name": "nas", "ip": "192.0.2.7"}))
    made = netmaker_core.add_node(core, "default", {"name": "nas", "key": wireguard_key()})
    assert made["name"] == "nas-2"


def test_clients_that_come_while_their_gateway_goes_go_too(core, monkeypatch):
    node = meshkit.join(core, "gw")

    def let_in():
        netmaker_core.create_ingress(core, node)
        netmaker_core.add_client(core, node, {"name": "phone"})

    upset_once(core, monkeypatch, let_in)
    netmaker_core.remove_node(core, node)
    assert netmaker_core.clients(core) == [] and netmaker_core.check(core) == []


def test_of_two_processes_one_gives_a_node_its_turn_to_refresh(core):
    nodes = [meshkit.join(core, name) for name in ("one", "two")]
    core.store.writer.execute_sql("UPDATE node SET refresh = 'queued', confirmed = 1")
    members = netmaker_core.Members(core.store)
    for node in nodes:  # both were seen waiting
        members.node(node["id"])
    for node in nodes:
        netmaker_core.step_refresh(core, members.nodes[node["id"]].row, netmaker_core.ASKED, core.now)
    assert [netmaker_core.need_node(core, "default", node["id"])["refresh"] for node in nodes] == ["asked", "queued"]


# ---- joins


def test_32_joins_on_one_use_make_one_node(core):
    key = netmaker_core.add_key(core, "default", uses=1)
    found = in_parallel(32, lambda number: netmaker_core.join(core, joining(core, key["id"], number)))
    nodes = [each for each in found if isinstance(each, dict)]
    assert len(nodes) == 1
    assert sum(isinstance(each, netmaker_core.UsedUp) for each in found) == 31
    assert len(netmaker_core.nodes(core, "default")) == 1
    assert netmaker_core.check(core) == []


def test_joins_of_two_processes_on_three_uses(core, tmp_path):
    key = netmaker_core.add_key(core, "default", uses=3)
    other = make_core(str(tmp_path))
    found = in_parallel(12, lambda number: netmaker_core.join((core, other)[number % 2], joining(core, key["id"], number)))
    assert sum(isinstance(each, dict) for each in found) == 3, found
    assert netmaker_core.check(core) == []
    other.store.close()


def test_200_joins_no_address_twice(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    found = in_parallel(8, lambda part: [
        netmaker_core.join(core, joining(core, key["id"], part * 25 + each)) for each in range(25)
    ])  # fmt: skip
    nodes = [node for part in found for node in part]
    assert len({node["ip"] for node in nodes}) == len({node["name"] for node in nodes}) == 200
    assert len({node["port"] for node in nodes}) == 200  # all behind one address
    assert netmaker_core.check(core) == []


def test_a_retry_gets_the_same_node_and_spends_nothing(core):
    key = netmaker_core.add_key(core, "default", uses=1)
    who = joining(core, key["id"], 1)
    assert netmaker_core.join(core, who)["id"] == netmaker_core.join(core, who)["id"]


def test_a_fixed_port_is_kept(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    for number in range(2):
        assert netmaker_core.join(core, joining(core, key["id"], number, fixed=True))["port"] == 51821


def test_a_key_runs_out_by_time(core):
    key = netmaker_core.add_key(core, "default", uses=None, lifetime=3600)
    core.clock.now += 3599
    netmaker_core.join(core, joining(core, key["id"], 1))
    core.clock.now += 1
    with pytest.raises(netmaker_core.UsedUp, match="used up or expired"):
        netmaker_core.join(core, joining(core, key["id"], 2))


def test_the_node_limit_holds(core):
    netmaker_core.set_network(core, "default", {"node_limit": 1})
    key = netmaker_core.add_key(core, "default", uses=None)
    node = netmaker_core.join(core, joining(core, key["id"], 1))
    with pytest.raises(netmaker_core.Clash, match=r"limit .*: raise nodelimit, or remove nodes"):
        netmaker_core.join(core, joining(core, key["id"], 2))
    netmaker_core.remove_node(core, node)
    netmaker_core.join(core, joining(core, key["id"], 3))


def test_sign_ups_are_bounded(core):
    with pytest.raises(netmaker_core.Denied, match="without an access key"):
        netmaker_core.join(core, joining(core, "", 1))
    netmaker_core.set_network(core, "default", {"manual": True})
    for number in range(netmaker_core.PENDING_PER_SOURCE):
        node = netmaker_core.join(core, joining(core, "", number))
        assert node["state"] == "pending" and node["ip"] == ""
    with pytest.raises(netmaker_core.SlowDown):
        netmaker_core.join(core, joining(core, "", 99))
    core.clock.now += 8 * 86400
    netmaker_core.sweep(core)
    assert netmaker_core.nodes(core, "default") == []


def test_nodes_expire_and_come_back(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    node = netmaker_core.join(core, joining(core, key["id"], 1))
    netmaker_core.set_node(core, node, {"expires": core.now + 10})
    core.clock.now += 11
    netmaker_core.sweep(core)
    assert netmaker_core.need_node(core, "default", node["id"])["state"] == "expired"
    assert netmaker_core.set_node(core, node, {"expires": None})["state"] == "active"


# ---- networks


def test_ranges_may_not_overlap(core):
    with pytest.raises(netmaker_core.Clash, match="of the network default"):
        netmaker_core.add_network(core, "other", {"range": "10.20.0.0/16"})
    netmaker_core.add_network(core, "other", {"range": "10.21.0.0/16"})
    with pytest.raises(netmaker_core.Clash, match="overlaps"):
        netmaker_core.set_network(core, "other", {"range": "10.20.30.128/25"})
    with pytest.raises(netmaker_core.Clash, match="already"):
        netmaker_core.add_network(core, "OTHER", {"range": "10.99.0.0/16"})


def test_two_networks_at_once_with_one_range(core):
    found = in_parallel(4, lambda number: netmaker_core.add_network(core, "n%d" % number, {"range": "10.77.0.0/16"}))
    assert sum(isinstance(each, dict) for each in found) == 1


def test_a_range_change_readdresses_every_node_at_once(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    nodes = [netmaker_core.join(core, joining(core, key["id"], number)) for number in range(5)]
    before = core.store.word("default")[0]
    netmaker_core.set_network(core, "default", {"range": "10.99.0.0/24", "range6": "fd99::/64"})
    assert core.store.word("default")[0] == before + 1
    for node in nodes:
        now = netmaker_core.need_node(core, "default", node["id"])
        host = node["ip"].rpartition(".")[2]
        assert now["ip"] == "10.99.0." + host and now["ip6"].startswith("fd99::")
    later = netmaker_core.join(core, joining(core, key["id"], 9))
    assert later["ip"] == "10.99.0.6"
    assert netmaker_core.check(core) == []


def test_a_wish_that_a_new_range_leaves_out_hinders_no_approval(core):
    netmaker_core.set_network(core, "default", {"manual": True})
    node = netmaker_core.join(core, joining(core, "", 1, ip="10.20.30.77"))
    netmaker_core.set_network(core, "default", {"range": "10.66.0.0/24"})
    assert netmaker_core.approve(core, node)["ip"] == "10.66.0.1"


def test_a_network_with_nodes_stays(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    node = netmaker_core.join(core, joining(core, key["id"], 1))
    with pytest.raises(netmaker_core.Clash, match="has nodes"):
        netmaker_core.remove_network(core, "default")
    netmaker_core.remove_node(core, node)
    netmaker_core.remove_network(core, "default")
    assert netmaker_core.check(core) == [] and netmaker_core.networks(core) == []


# ---- nodes


def test_a_removed_address_is_the_last_to_be_given_out(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    first = netmaker_core.join(core, joining(core, key["id"], 1))
    netmaker_core.remove_node(core, first)
    assert netmaker_core.join(core, joining(core, key["id"], 2))["ip"] == "10.20.30.2"
    assert netmaker_core.check(core) == []


def test_an_address_can_be_moved_but_not_taken(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    one, two = (netmaker_core.join(core, joining(core, key["id"], number)) for number in range(2))
    assert netmaker_core.set_node(core, one, {"ip": "10.20.30.77"})["ip"] == "10.20.30.77"
    with pytest.raises(netmaker_core.Clash, match="taken"):
        netmaker_core.set_node(core, two, {"ip": "10.20.30.77"})
    with pytest.raises(netmaker_core.Clash, match="name"):
        netmaker_core.set_node(core, two, {"name": one["name"]})
    with pytest.raises(Invalid):
        netmaker_core.set_node(core, two, {"ip": "10.20.30.255"})
    assert netmaker_core.check(core) == []


def test_no_range_has_two_owners(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    one, two = (netmaker_core.join(core, joining(core, key["id"], number)) for number in range(2))
    netmaker_core.set_node(core, one, {"ips": "192.168.7.0/24"})
    with pytest.raises(netmaker_core.Clash, match="which is a range of the node n:"):
        netmaker_core.set_node(core, two, {"ips": "192.168.7.128/25"})
    with pytest.raises(netmaker_core.Clash, match="which is the network's own range"):
        netmaker_core.set_node(core, two, {"ips": "10.20.30.0/28"})


def test_one_wireguard_key_belongs_to_one_node(core):
    key = netmaker_core.add_key(core, "default", uses=None)
    one = netmaker_core.join(core, joining(core, key["id"], 1))
    with pytest.raises(netmaker_core.Clash, match="belongs to the node"):
        netmaker_core.join(core, joining(core, key["id"], 2, key=one["key"]))


# ---- the file, the key


def test_files_are_private_from_the_first_byte(tmp_path):
    core = make_core(str(tmp_path / "data"))
    for name in ("netmaker.db", "server.key"):
        assert stat.S_IMODE(os.stat(tmp_path / "data" / name).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "data").st_mode) == 0o700
    netmaker_core.backup(core, str(tmp_path / "copy"), True)
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
    with pytest.raises(netmaker_core.ServerError, match="not the key that this database was made with"):
        make_core(str(tmp_path))


def test_a_lost_server_key_is_not_made_anew_unasked(tmp_path):
    core = make_core(str(tmp_path))
    netmaker_core.add_network(core, "default", {"range": "10.20.30.0/24"})
    netmaker_core.add_key(core, "default")
    core.store.close()
    with pytest.raises(netmaker_core.Clash, match="move it away first"):
        netmaker_core.give_up_key(core.settings, CONSOLE)
    os.unlink(tmp_path / "server.key")
    with pytest.raises(netmaker_core.ServerError, match=r"is missing: restore it .*serve --new-key, and every agent joins again"):
        make_core(str(tmp_path))
    assert not (tmp_path / "server.key").exists()
    assert netmaker_core.give_up_key(core.settings, CONSOLE) == 1
    again = make_core(str(tmp_path))
    assert again.store.rows("SELECT who, action, detail FROM audit")[-1] == ("ann", "server new key", "access keys removed: 1")
    assert again.key.pin != core.key.pin and again.store.meta("pin") == b64(again.key.pin)
    assert netmaker_core.access_keys(again, "default") == [] and netmaker_core.check(again) == []
    again.store.close()


def test_a_pin_can_stand_after_a_flag(tmp_path, monkeypatch):
    seeds = [number.to_bytes(32, "little") for number in range(2000)]
    bad = next(seed for seed in seeds if b64(server.agent.public_key(seed)).startswith("-"))
    good = next(seed for seed in seeds if not b64(server.agent.public_key(seed)).startswith("-"))
    drawn = iter([bad, good])
    real = server.secrets.token_bytes
    monkeypatch.setattr(server.secrets, "token_bytes", lambda size: next(drawn) if size == 32 else real(size))
    assert netmaker_core.ServerKey.load(str(tmp_path / "server.key")).private == good


def test_a_damaged_key_is_named(tmp_path):
    (tmp_path / "server.key").write_text("nonsense\n")
    with pytest.raises(netmaker_core.ServerError, match="damaged"):
        make_core(str(tmp_path))


def test_the_database_alone_opens_nothing(core):
    key = netmaker_core.add_key(core, "default")
    secret = key["value"].split(".")[1]
    for table in netmaker_core.MODELS:
        for row in core.store.select(table.select()):
            assert secret not in str(row) and b64(core.key.private) not in str(row)


def test_tokens_hold_what_joining_needs(core):
    core.store.set_meta("urls", "http://203.0.113.10:8081 http://[2001:db8::1]:8081")
    token = parse_token(netmaker_core.add_key(core, "default")["accessstring"])
    assert token.servers == ("http://203.0.113.10:8081", "http://[2001:db8::1]:8081")
    assert token.pin == core.key.pin and token.network == "default" and "." in token.key


def test_a_newer_database_is_refused(tmp_path):
    core = make_core(str(tmp_path))
    core.store.set_meta("schema", "99")
    core.store.close()
    with pytest.raises(netmaker_core.ServerError, match="newer netmaker-lite"):
        make_core(str(tmp_path))


def next_schema(monkeypatch, *statements):
    monkeypatch.setattr(netmaker_core, "SCHEMA", netmaker_core.SCHEMA + 1)
    monkeypatch.setattr(netmaker_core, "MIGRATIONS", {netmaker_core.SCHEMA: statements})
    return netmaker_core.SCHEMA


def test_a_migration_runs_once_and_keeps_a_copy(tmp_path, monkeypatch):
    make_core(str(tmp_path)).store.close()
    fresh = next_schema(monkeypatch, "ALTER TABLE network ADD COLUMN fresh TEXT")
    for _ in range(2):
        core = make_core(str(tmp_path))
        assert core.store.meta("schema") == str(fresh)
        core.store.close()
    with sqlite3.connect(tmp_path / f"netmaker.db.before-{fresh}") as copy:
        assert copy.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == (str(fresh - 1),)
    copy.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    make_core(str(tmp_path)).store.close()
    next_schema(monkeypatch, "ALTER TABLE network ADD COLUMN fresh TEXT", "nonsense")
    with pytest.raises(netmaker_core.ServerError):
        make_core(str(tmp_path))
    with sqlite3.connect(tmp_path / "netmaker.db") as file:
        columns = [row[1] for row in file.execute("PRAGMA table_info(network)")]
        assert "fresh" not in columns
    file.close()


def test_a_database_of_the_first_release_is_brought_up_to_date(tmp_path):
    """Tables, columns and indexes as in a database made today; what was in it stays."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(mode=0o700)
    file = sqlite3.connect(old / "netmaker.db")
    file.executescript((Path(__file__).parent / "data/schema-1.sql").read_text())
    file.execute("UPDATE meta SET value = '' WHERE key = 'pin'")
    file.commit()
    file.close()

    def schema(folder):
        file = sqlite3.connect(folder / "netmaker.db")
        tables = [row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: {row[1] for row in file.execute(f"PRAGMA table_info({table})")} for table in tables}
        indexes = {row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        file.close()
        return columns, indexes

    for folder in (old, new):
        make_core(str(folder)).store.close()
    assert schema(old) == schema(new)
    core = make_core(str(old))
    assert [row["id"] for row in netmaker_core.networks(core)] == ["default", "old"]
    assert [row["name"] for row in netmaker_core.nodes(core, "default")] == ["nas"]
    assert [each for each in netmaker_core.check(core) if "another server.key" not in each] == []
    netmaker_core.set_network(core, "default", {"mtu": 1400})
    core.store.close()


def test_a_damaged_database_is_called_so(tmp_path):
    make_core(str(tmp_path)).store.close()
    for leftover in tmp_path.glob("netmaker.db-*"):
        leftover.unlink()
    (tmp_path / "netmaker.db").write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(netmaker_core.ServerError, match=r"is damaged .* restore FILE"):
        make_core(str(tmp_path))


# ---- backup, restore, check


def test_backup_and_restore(tmp_path, clock):
    home = Server(str(tmp_path / "data"), clock)
    home.network()
    key = home.key()
    one, two = Client(home).join(key), Client(home, source="198.51.100.2").join(key)
    one.exchange()
    two.exchange()
    bearers = make_user(home, "root", admin=True), api_token(home, "root")
    netmaker_core.backup(home.core, str(tmp_path / "copy"), False)
    server.remove_api_token(home.core, "root", "script")
    netmaker_core.remove_node(home.core, home.node(two))
    three = Client(home, source="198.51.100.3").join(key)
    for client in (one, three):
        client.exchange()
    captured = one.sent
    incarnation = home.core.store.incarnation
    home.stop()

    done = netmaker_core.restore(home.core.settings, str(tmp_path / "copy"), CONSOLE)
    assert done.nodes == 2 and [node["id"] for node in done.back] == [two.node]
    again = Server(str(tmp_path / "data"), clock)
    assert again.core.store.incarnation != incarnation
    assert netmaker_core.check(again.core) == []
    for bearer in bearers:  # one of them was revoked after the backup, and nobody knows which
        assert Rest(again, bearer.bearer).call("GET", "/api/networks").status == 401
    assert again.core.store.rows("SELECT who, source, action FROM audit")[-1] == ("ann", "this host", "server restore")
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
    netmaker_core.backup(core, str(tmp_path / "with"), True)
    netmaker_core.backup(core, str(tmp_path / "without"), False)
    core.store.close()
    other = netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path / "two")})
    with pytest.raises(netmaker_core.Clash, match="another server key"):
        netmaker_core.restore(other, str(tmp_path / "without"), CONSOLE)
    netmaker_core.restore(other, str(tmp_path / "with"), CONSOLE)
    restored = make_core(str(tmp_path / "two"))
    assert restored.key.pin == core.key.pin
    assert "server_key" not in restored.store.writer.get_tables()
    restored.store.close()
    assert b64(core.key.private).encode() not in (tmp_path / "without").read_bytes()


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + b"x" * 5000])
def test_what_is_no_backup_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    settings = netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path / "data")})
    with pytest.raises(Invalid, match="no backup"):
        netmaker_core.restore(settings, str(tmp_path / "file"), CONSOLE)
    with pytest.raises(Invalid, match="cannot read"):
        netmaker_core.restore(settings, str(tmp_path / "nothing"), CONSOLE)


def test_a_backup_of_the_first_release_is_restored(tmp_path):
    """Its tables are fewer; they are brought up to date on the way."""
    file = sqlite3.connect(tmp_path / "copy")
    file.executescript((Path(__file__).parent / "data/schema-1.sql").read_text())
    key = netmaker_core.new_private()
    file.execute("CREATE TABLE server_key (private TEXT NOT NULL)")
    file.execute("INSERT INTO server_key VALUES (?)", (b64(key),))
    file.commit()
    file.close()
    settings = netmaker_core.Settings({}, {"NETMAKER_DATA": str(tmp_path / "data")})
    assert netmaker_core.restore(settings, str(tmp_path / "copy"), CONSOLE).nodes == 1
    core = make_core(str(tmp_path / "data"))
    assert core.key.private == key and core.store.rows("SELECT action FROM audit") == [("server restore",)]
    core.store.close()


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
    key = netmaker_core.add_key(core, "default", uses=None)
    netmaker_core.join(core, joining(core, key["id"], 1))
    assert netmaker_core.check(core) == []
    core.store.writer.execute_sql(fault)
    assert any(word in finding for finding in netmaker_core.check(core)), netmaker_core.check(core)


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
