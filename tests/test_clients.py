# SPDX-License-Identifier: Apache-2.0
"""External clients: keys, addresses, configurations and pictures."""

from __future__ import annotations

import base64
import builtins
import re
import shutil
import subprocess
from hashlib import blake2b

import pytest
from meshkit import heard, join
from restkit import make_user
from serverkit import Client, Clock, clients, make_core, settle, wireguard_key
from test_store import in_parallel

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server
from netclient_lite import Invalid


@pytest.fixture
def gateway(core):
    return netmaker_core.create_ingress(core, join(core, "gw"))


def lines(config):
    """{"Interface": {…}, "Peer": {…}} of a configuration."""
    found = {}
    for line in config.splitlines():
        if line.startswith("["):
            section = found[line.strip("[]")] = {}
        elif " = " in line:
            name, _, value = line.partition(" = ")
            assert value and name not in section
            section[name] = value.partition("#")[0]  # as wg-quick reads it
    return found


def again(core, row):
    return netmaker_core.need_client(core, "default", row["id"])


# ---- what is made


def test_a_client_has_a_configuration(core, gateway):
    netmaker_core.create_egress(core, join(core, "nas"), ["192.168.7.0/24"])
    row = netmaker_core.add_client(core, gateway, {"name": "phone"})
    found = lines(row["config"])
    assert found["Interface"] == {"PrivateKey": row["privatekey"], "Address": "10.20.30.3/32", "MTU": "1280"}
    shared = netmaker_core.preshared_key(core, gateway, row)
    assert found["Peer"] == {
        "PublicKey": gateway["key"],
        "PresharedKey": shared,
        "AllowedIPs": "10.20.30.0/24, 192.168.7.0/24",
        "Endpoint": gateway["public"] + ":51821",
        "PersistentKeepalive": "20",
    }
    assert agent.derived_public(row["privatekey"]) == row["key"]
    assert len(base64.b64decode(shared)) == 32
    assert (row["outdated"], again(core, row)["endpoint"]) == (False, gateway["public"] + ":51821")


def test_both_ends_compute_the_preshared_key(home):
    """The gateway from what it has on disk, and what it hears of the client; it never travels."""
    gateway = Client(home).join(home.key())
    row = netmaker_core.create_ingress(home.core, home.node(gateway))
    made = netmaker_core.add_client(home.core, row, {})
    gateway.exchange()
    (told,) = gateway.me["ingress"]["clients"]
    assert told == {"id": made["id"], "key": made["key"], "ip": made["ip"]}
    key = gateway.key("client")
    shared = blake2b((told["id"] + "\n" + told["key"]).encode(), key=key, digest_size=32).digest()
    assert "PresharedKey = %s\n" % base64.b64encode(shared).decode() in made["config"]


def test_everybody_sends_a_clients_traffic_to_its_gateway(core, gateway):
    other = join(core, "other")
    row = netmaker_core.add_client(core, gateway, {"internet": True})
    record = next(each for each in heard(core, other["id"])["peers"] if each["id"] == gateway["id"])
    assert record["ips"] == [row["ip"] + "/32"]
    me = heard(core, gateway["id"])["me"]
    assert me["forward"] is True and me["ingress"]["clients"][0]["internet"] is True
    netmaker_core.set_client(core, row, {"enabled": False})
    record = next(each for each in heard(core, other["id"])["peers"] if each["id"] == gateway["id"])
    assert "ips" not in record and heard(core, gateway["id"])["me"]["ingress"] == {"clients": []}
    netmaker_core.set_client(core, row, {"enabled": True})
    assert heard(core, gateway["id"])["me"]["ingress"]["clients"]


def test_dns_and_the_internet_are_chosen(core, gateway):
    netmaker_core.set_network(core, "default", {"client_dns": "10.20.30.1"})
    row = netmaker_core.add_client(core, gateway, {"internet": True, "name": "phone"})
    found = lines(row["config"])
    assert (found["Peer"]["AllowedIPs"], found["Interface"]["DNS"]) == ("0.0.0.0/0, ::/0", "10.20.30.1")
    row = netmaker_core.set_client(core, row, {"internet": False, "resolver": "9.9.9.9, 2620:fe::fe"})
    found = lines(again(core, row)["file"])
    assert (found["Peer"]["AllowedIPs"], found["Interface"]["DNS"]) == ("10.20.30.0/24", "9.9.9.9, 2620:fe::fe")


def test_both_families(core):
    netmaker_core.set_network(core, "default", {"range6": "fd00:20:30::/64"})
    gateway = netmaker_core.create_ingress(core, join(core, "gw"))
    row = netmaker_core.add_client(core, gateway, {})
    found = lines(row["config"])
    assert found["Interface"]["Address"] == "10.20.30.2/32, fd00:20:30::2/128"
    assert found["Peer"]["AllowedIPs"] == "10.20.30.0/24, fd00:20:30::/64"


def test_a_client_may_bring_its_key(core, gateway):
    key = wireguard_key()
    row = netmaker_core.add_client(core, gateway, {"key": key, "name": "laptop"})
    assert (row["key"], row["privatekey"]) == (key, "")
    assert lines(row["config"])["Interface"]["PrivateKey"] == ""
    with pytest.raises(netmaker_core.Clash, match="belongs to the client laptop"):
        netmaker_core.add_client(core, gateway, {"key": key})
    with pytest.raises(netmaker_core.Clash, match="belongs to the node gw"):
        netmaker_core.add_client(core, gateway, {"key": gateway["key"]})
    with pytest.raises(netmaker_core.Clash, match="belongs to the client laptop"):
        join(core, "thief", key=key)


def test_who_cannot_have_clients(core):
    node = join(core, "node")
    with pytest.raises(netmaker_core.Clash, match="no ingress gateway: `netmaker-lite node ingress default node`"):
        netmaker_core.add_client(core, node, {})
    hidden = netmaker_core.create_ingress(core, join(core, "hidden"))
    core.store.set_meta("x", "")
    netmaker_core.set_node(core, hidden, {"public": ""})
    with pytest.raises(netmaker_core.Clash, match="nobody outside can reach hidden: set its endpoint first"):
        netmaker_core.add_client(core, hidden, {})
    machine = netmaker_core.add_node(core, "default", {"key": wireguard_key(), "name": "manual"})
    with pytest.raises(netmaker_core.Clash, match="no agent runs on manual"):
        netmaker_core.create_ingress(core, machine)


# ---- addresses and names


def test_addresses_and_names_are_given_once(core, gateway, tmp_path):
    other = make_core(str(tmp_path), Clock())
    found = in_parallel(8, lambda number: (
        netmaker_core.add_client((core, other)[number % 2], gateway, {})
        if number % 4 else join((core, other)[number // 4], "client")
    ))  # fmt: skip
    assert len({row["ip"] for row in found}) == len({row["name"] for row in found}) == 8, found
    assert netmaker_core.check(core) == []
    other.store.close()


def test_a_name_is_a_nodes_or_a_clients(core, gateway):
    row = netmaker_core.add_client(core, gateway, {"name": "phone"})
    for name in ("gw", "phone"):
        with pytest.raises(netmaker_core.Clash, match="the name %s is taken" % name):
            netmaker_core.add_client(core, gateway, {"name": name})
    assert join(core, "phone")["name"] == "phone-2"
    with pytest.raises(netmaker_core.Clash, match="taken"):
        netmaker_core.set_node(core, gateway, {"name": "phone"})
    with pytest.raises(netmaker_core.Clash, match="taken"):
        netmaker_core.set_client(core, row, {"name": "phone-2"})
    assert netmaker_core.set_client(core, row, {"name": "mobile"})["name"] == "mobile"
    assert netmaker_core.set_node(core, gateway, {"name": "phone"})["name"] == "phone"


def test_a_range_change_takes_clients_along(core, gateway):
    row = netmaker_core.add_client(core, gateway, {})
    netmaker_core.set_network(core, "default", {"range": "10.99.0.0/24", "range6": "fd99::/64"})
    now = again(core, row)
    assert (now["ip"], now["outdated"]) == ("10.99.0.2", True) and now["ip6"].startswith("fd99::")
    records = {record["id"]: record for record in heard(core, join(core, "x")["id"])["peers"]}
    assert records[gateway["id"]]["ips"] == ["10.99.0.2/32", now["ip6"] + "/128"]


def test_what_goes_with_whom(core, gateway):
    one, two = (netmaker_core.add_client(core, gateway, {}) for _ in range(2))
    netmaker_core.remove_client(core, one)
    with pytest.raises(netmaker_core.Missing, match="client list default"):
        again(core, one)
    netmaker_core.delete_role(core, gateway, "ingress")
    assert netmaker_core.clients(core) == [] and "ingress" not in heard(core, gateway["id"])["me"]
    netmaker_core.create_ingress(core, gateway)
    three = netmaker_core.add_client(core, gateway, {})
    assert len({row["ip"] for row in (one, two, three)}) == 3
    netmaker_core.remove_node(core, gateway)
    assert netmaker_core.clients(core) == [] and core.store.rows("SELECT 1 FROM lease WHERE node IS NOT NULL") == []


# ---- keys are kept for a while


def test_the_private_key_is_kept_for_a_quarter_of_an_hour(core, gateway):
    row = netmaker_core.add_client(core, gateway, {})
    sealed = core.store.rows("SELECT private FROM client")[0][0]
    assert row["privatekey"] not in sealed and sealed
    core.clock.now += netmaker_core.KEPT - 1
    netmaker_core.sweep(core)
    assert "\nPrivateKey = " + row["privatekey"] in again(core, row)["file"]
    core.clock.now += 1
    assert row["privatekey"] not in again(core, row)["file"]  # whether or not housekeeping came by
    netmaker_core.sweep(core)
    assert core.store.rows("SELECT private FROM client") == [("",)]
    with pytest.raises(netmaker_core.UsedUp, match="renew the client"):
        netmaker_core.picture_of(again(core, row), "png")


def test_renewing_makes_another_pair(core, gateway):
    row = netmaker_core.add_client(core, gateway, {})
    netmaker_core.set_node(core, gateway, {"static": "203.0.113.77"})
    assert again(core, row)["outdated"]
    new = netmaker_core.renew_client(core, again(core, row))
    assert new["key"] != row["key"] and not new["outdated"] and new["ip"] == row["ip"]
    assert "Endpoint = 203.0.113.77:51821" in new["config"]
    assert re.search("PresharedKey = (.*)", new["config"])[1] != re.search("PresharedKey = (.*)", row["config"])[1]
    own = netmaker_core.renew_client(core, new, wireguard_key())
    assert own["privatekey"] == "" and "PrivateKey = #" in own["config"]


@pytest.mark.parametrize(
    "change",
    [{"key": "A" * 43 + "="}, {"static": "203.0.113.77"}, {"mtu": 1400}, {"port": 5000}, {"keepalive": 0}],
    ids=lambda change: next(iter(change)),
)
def test_a_configuration_goes_stale_with_its_gateway(core, gateway, change):
    row = netmaker_core.add_client(core, gateway, {})
    netmaker_core.set_node(core, gateway, {"name": "other", "dns": False})
    assert not again(core, row)["outdated"]
    netmaker_core.set_node(core, gateway, {**change, **({"key": wireguard_key()} if "key" in change else {})})
    assert again(core, row)["outdated"]


# ---- pictures


@pytest.mark.skipif(not shutil.which("zbarimg"), reason="zbarimg (Debian: zbar-tools) is not installed")
def test_a_picture_can_be_read(core, gateway, tmp_path):
    pytest.importorskip("segno")
    row = netmaker_core.add_client(core, gateway, {"internet": True})
    picture = tmp_path / "phone.png"
    picture.write_bytes(netmaker_core.picture_of(again(core, row), "png"))
    done = subprocess.run(["zbarimg", "-q", "--raw", str(picture)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == row["config"].strip()
    width = int.from_bytes(picture.read_bytes()[16:20], "big")
    assert 200 <= width <= 300


def test_a_picture_that_can_be_scaled(core, gateway):
    pytest.importorskip("segno")
    row = netmaker_core.add_client(core, gateway, {})
    assert netmaker_core.picture_of(again(core, row), "svg").startswith(b"<?xml")


def test_without_segno_a_sentence(core, gateway, monkeypatch):
    row = netmaker_core.add_client(core, gateway, {})
    real = builtins.__import__

    def missing(name, *rest):
        if name == "segno":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(netmaker_core.Busy, match="pip install segno"):
        netmaker_core.picture_of(again(core, row), "png")


def test_a_client_whose_gateway_is_not_there_yet_is_not_shown(core, gateway):
    """Gateways are read before clients; another process may have changed both in between."""
    netmaker_core.add_client(core, gateway, {})
    core.store.writer.execute_sql("UPDATE node SET ingress = 0")
    assert netmaker_core.clients(core) == []
    core.store.writer.execute_sql("UPDATE node SET ingress = 1")


# ---- over HTTP


@pytest.fixture
def boss(home):
    return make_user(home, "boss", admin=True)


def test_clients_by_rest(home, boss):
    gateway, other = clients(home, 2, home.key())
    boss.good("POST", "/api/nodes/default/%s/createingress" % gateway.node)
    path = "/api/extclients/default"
    made = boss.good("POST", "%s/%s" % (path, gateway.node), {"clientid": "Phone", "dns": "9.9.9.9"})
    assert (made["clientid"], made["ingressgatewayid"], made["enabled"], made["dns"]) == ("phone", gateway.node, "yes", "9.9.9.9")
    assert made["privatekey"] in made["config"] and made["ingressgatewayendpoint"] == gateway.source + ":51821"
    listed = boss.get(path)
    assert listed == boss.get("/api/extclients") == [boss.get(path + "/phone")]
    assert listed[0]["privatekey"] == listed[0]["config"] == "" and made["privatekey"] not in str(listed)
    said = boss.call("GET", path + "/phone/file")
    assert said.body.decode() == made["config"] and "phone.conf" in said.headers["Content-Disposition"]
    assert said.headers["Cache-Control"] == "no-store"
    for form, start in (("qr", b"\x89PNG"), ("svg", b"<?xml")):
        pytest.importorskip("segno")
        assert boss.call("GET", "%s/phone/%s" % (path, form)).body.startswith(start)
    assert boss.call("GET", path + "/phone/pdf").status == 404
    home.core.clock.now += netmaker_core.KEPT
    assert boss.call("GET", path + "/phone/qr").status == 410
    assert (
        boss.good("PUT", path + "/phone", {**listed[0], "clientid": "mobile", "enabled": "no", "internet": "yes"})["clientid"]
        == "mobile"
    )
    settle((gateway, other))
    assert gateway.me["ingress"] == {"clients": []}
    new = boss.good("POST", path + "/mobile/renew")
    assert new["privatekey"] not in ("", made["privatekey"]) and new["enabled"] == "no"
    assert boss.good("POST", "%s/%s" % (path, gateway.node))["clientid"] == "client"
    assert boss.good("PUT", path + "/mobile", {"publickey": wireguard_key()})["publickey"] == new["publickey"]
    assert boss.good("DELETE", path + "/mobile")["Code"] == 200
    assert boss.call("GET", path + "/mobile").status == 404
    assert boss.call("POST", "%s/%s" % (path, other.node)).status == 409


def test_a_user_sees_the_clients_of_the_own_networks(home, boss):
    home.network("else", "10.66.0.0/16")
    gateway = Client(home).join(home.key())
    boss.good("POST", "/api/nodes/default/%s/createingress" % gateway.node)
    made = boss.good("POST", "/api/extclients/default/" + gateway.node)
    joe = make_user(home, "joe", "else")
    assert joe.get("/api/extclients") == []
    for path in ("", "/" + made["clientid"], "/%s/file" % made["clientid"]):
        assert joe.call("GET", "/api/extclients/default" + path).status == 403
    ann = make_user(home, "ann", "default")
    assert [row["clientid"] for row in ann.get("/api/extclients")] == ["client"]
    assert "(new)" not in str(boss.get("/api/audit")) and made["privatekey"] not in str(boss.get("/api/audit"))


@pytest.mark.parametrize(
    "body", [{"clientid": "a b"}, {"publickey": "x"}, {"dns": "example.com"}, {"internet": "maybe"}, {"x": 1}]
)
def test_bad_clients_by_rest(home, boss, body):
    gateway = Client(home).join(home.key())
    boss.good("POST", "/api/nodes/default/%s/createingress" % gateway.node)
    assert boss.call("POST", "/api/extclients/default/" + gateway.node, body).status == 400


def test_names_with_line_ends_do_not_reach_a_configuration(core, gateway):
    with pytest.raises(Invalid):
        server.check_addresses("9.9.9.9\nPostUp = reboot")
