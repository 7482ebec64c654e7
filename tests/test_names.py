# SPDX-License-Identifier: Apache-2.0
"""Names of nodes, clients and entries, and the files for CoreDNS."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meshkit import heard, join
from restkit import make_user
from serverkit import Client, Server, clients, make_core, settle

import netmaker_core
import netmaker_lite as server
from netclient_lite import Invalid, check_host_name


def add(core, name, ip="192.0.2.7", ip6=""):
    return netmaker_core.set_name(core, "default", "", {"name": name, "ip": ip, "ip6": ip6})


def shown(core, network="default"):
    return {row["name"]: (row["ip"], row["ip6"], row["kind"]) for row in netmaker_core.names(core, network)}


@pytest.mark.parametrize("name", ["printer", "a.b.c", "x", "3com", "a-b", "a" * 63 + ".b", "xn--bcher-kva"])
def test_host_names(name):
    assert check_host_name(name.upper()) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a-",
        "a.-b",
        "a-.b",
        "a_b",
        "a b",
        "a\n",
        "ä",
        "*",
        "a" * 64,
        "b." + "a" * 64,
        "a." * 97,
    ],
)
def test_what_is_no_host_name(name):
    with pytest.raises(Invalid, match="no host name"):
        check_host_name(name)


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


@given(st.lists(LABEL, min_size=1, max_size=5))
def test_every_row_of_labels_is_one(labels):
    assert check_host_name(".".join(labels)) == ".".join(labels)


@given(st.text("ab-._ \n1", max_size=12))
def test_what_passes_is_safe_in_a_file(text):
    try:
        name = check_host_name(text)
    except Invalid:
        return
    assert all(label and label.strip("-") == label and set(label) <= set("ab1-") for label in name.split("."))


def test_entries_come_change_and_go(core):
    assert add(core, "printer") == {"name": "printer", "ip": "192.0.2.7", "ip6": "", "network": "default"}
    assert netmaker_core.set_name(core, "default", "printer", {"ip6": "fd00::7"})["ip"] == "192.0.2.7"
    netmaker_core.set_name(core, "default", "printer", {"name": "scanner"})
    assert shown(core) == {"scanner": ("192.0.2.7", "fd00::7", "custom")}
    netmaker_core.set_name(core, "default", "scanner", {"name": "scanner", "ip": "192.0.2.8"})
    netmaker_core.set_name(core, "default", "SCANNER", None)
    assert shown(core) == {}
    with pytest.raises(netmaker_core.Missing, match="dns list default"):
        netmaker_core.set_name(core, "default", "scanner", None)
    for values in ({"name": "x"}, {"ip": "192.0.2.1"}, {"name": "x", "ip": ""}):
        with pytest.raises(Invalid, match="a name and an address"):
            netmaker_core.set_name(core, "default", "", values)


def test_a_name_means_one_thing(core):
    gateway = netmaker_core.create_ingress(core, join(core, "gw"))
    netmaker_core.add_client(core, gateway, {"name": "phone"})
    add(core, "printer")
    for name in ("gw", "phone", "printer"):
        with pytest.raises(netmaker_core.Clash, match="taken"):
            add(core, name)
    assert join(core, "printer")["name"] == "printer-2"
    with pytest.raises(netmaker_core.Clash, match="taken"):
        netmaker_core.set_node(core, gateway, {"name": "printer"})
    with pytest.raises(netmaker_core.Clash, match="taken"):
        netmaker_core.set_name(core, "default", "printer", {"name": "gw"})
    netmaker_core.add_network(core, "other", {"range": "10.77.0.0/24"})
    netmaker_core.set_name(core, "other", "", {"name": "printer", "ip": "192.0.2.7"})


def test_only_what_is_there_has_a_name(core):
    netmaker_core.set_network(core, "default", {"manual": True})
    node, gateway = join(core, "node"), netmaker_core.create_ingress(core, join(core, "gw"))
    netmaker_core.join(
        core, netmaker_core.Joining("default", "p", "", "198.51.100.9", "", {"key": "k", "port": 1, "name": "waits"})
    )
    client = netmaker_core.add_client(core, gateway, {"name": "phone"})
    assert shown(core) == {
        "node": (node["ip"], "", "node"), "gw": (gateway["ip"], "", "node"), "phone": (client["ip"], "", "client"),
    }  # fmt: skip
    netmaker_core.disable(core, node)
    netmaker_core.set_client(core, client, {"enabled": False})
    assert set(shown(core)) == {"gw"}


def test_a_range_change_keeps_entries(core):
    node = join(core, "node")
    add(core, "printer")
    netmaker_core.set_network(core, "default", {"range": "10.99.0.0/24"})
    assert shown(core) == {"node": ("10.99.0.1", "", "node"), "printer": ("192.0.2.7", "", "custom")}
    netmaker_core.remove_node(core, node)
    netmaker_core.remove_network(core, "default")
    assert core.store.rows("SELECT * FROM dns") == []


# ---- what agents hear


def test_agents_hear_the_names_that_no_node_has(home):
    one, two = clients(home, 2, home.key())
    settle((one, two))
    assert "names" not in one.exchange().get("me", {})
    netmaker_core.set_name(home.core, "default", "", {"name": "printer", "ip": "192.0.2.7", "ip6": "fd00::7"})
    gateway = netmaker_core.create_ingress(home.core, home.node(one))
    made = netmaker_core.add_client(home.core, gateway, {"name": "phone"})
    assert two.exchange()["names"] == {"phone": [made["ip"]], "printer": ["192.0.2.7", "fd00::7"]}
    netmaker_core.set_node(home.core, home.node(one), {"mtu": 1400})
    assert "names" not in two.exchange().value  # nothing new in them
    netmaker_core.set_client(home.core, made, {"enabled": False})
    assert two.exchange()["names"] == {"printer": ["192.0.2.7", "fd00::7"]}
    netmaker_core.set_name(home.core, "default", "printer", None)
    assert two.exchange()["names"] == {}
    two.have = "-"
    assert two.exchange()["names"] == {}


def test_a_waiting_node_hears_no_names(home):
    netmaker_core.set_network(home.core, "default", {"manual": True})
    netmaker_core.set_name(home.core, "default", "", {"name": "printer", "ip": "192.0.2.7"})
    waits = Client(home)
    waits.join()
    assert "names" not in waits.exchange().value


def test_agents_hear_of_the_nameserver(tmp_path, clock):
    for address in ("", "10.20.30.1", "10.20.30.2"):
        core = make_core(str(tmp_path), clock, COREDNS_ADDR=address)
        if not address:
            netmaker_core.add_network(core, "default", {"range": "10.20.30.0/24"})
            node = join(core, "node")
        before = core.store.word("default")
        members = netmaker_core.Members(core.store, netmaker_core.tell_nameserver(core))
        assert (core.store.word("default") != before) == bool(address)
        assert heard(core, node["id"], members)["me"].get("nameserver", "") == address
        core.store.close()
    core = make_core(str(tmp_path), clock, COREDNS_ADDR="10.20.30.2", DNS_MODE="off")
    assert netmaker_core.tell_nameserver(core) == ""
    core.store.close()


def test_the_command_line_tells_nobody_of_a_nameserver(tmp_path, clock):
    """It need not have the server's environment."""
    core = make_core(str(tmp_path), clock, COREDNS_ADDR="10.20.30.1")
    netmaker_core.add_network(core, "default", {"range": "10.20.30.0/24"})
    netmaker_core.tell_nameserver(core)
    before = core.store.word("default")
    here = server.InProcess(make_core(str(tmp_path), clock), netmaker_core.Caller("ann"))
    assert here.call("GET", "/api/networks", None).status == 200
    here.close()
    assert core.store.word("default") == before and core.store.meta("nameserver") == "10.20.30.1"
    core.store.close()


# ---- the files


def test_the_files_for_coredns(core):
    node = join(core, "node")
    add(core, "printer", "192.0.2.7", "fd00::7")
    netmaker_core.write_names(core)
    folder = os.path.join(core.settings.data, "dnsconfig")
    with open(os.path.join(folder, "netmaker.hosts")) as stream:
        text = stream.read()
    assert text.splitlines()[1:] == [node["ip"] + " node.default", "192.0.2.7 printer.default", "fd00::7 printer.default"]
    with open(os.path.join(folder, "Corefile")) as stream:
        corefile = stream.read()
    assert corefile.startswith("default {\n    hosts netmaker.hosts {\n") and "\n    reload " in corefile
    assert corefile.count("{") == corefile.count("}")
    before = {name: os.stat(os.path.join(folder, name)) for name in os.listdir(folder)}
    assert {stat.S_IMODE(each.st_mode) for each in before.values()} == {0o644} and len(before) == 2
    netmaker_core.set_network(core, "default", {"mtu": 1400})
    netmaker_core.write_names(core)
    after = {name: os.stat(os.path.join(folder, name)) for name in os.listdir(folder)}
    assert {name: (each.st_ino, each.st_mtime_ns) for name, each in before.items()} == {
        name: (each.st_ino, each.st_mtime_ns) for name, each in after.items()
    }


def test_no_network_lies_among_the_names_of_another(core):
    with pytest.raises(netmaker_core.Clash, match=r"b\.default would stand among the names of default"):
        netmaker_core.add_network(core, "b.default", {"range": "10.77.0.0/24"})
    netmaker_core.add_network(core, "ult", {"range": "10.77.0.0/24"})
    netmaker_core.add_network(core, "lab.home", {"range": "10.78.0.0/24"})
    with pytest.raises(netmaker_core.Clash, match=r"lab\.home would stand among the names of home"):
        netmaker_core.add_network(core, "home", {"range": "10.79.0.0/24"})


def test_a_network_called_as_a_domain_takes_nothing_from_it():
    """What no node has is asked outside, as all else is."""
    own, rest = netmaker_core.corefile(["dev"]).split("\n}\n. {\n")
    for block in (own, rest):
        assert "forward . /etc/resolv.conf" in block
    assert "fallthrough" in own and "cache" not in own


def test_no_network_is_no_zone():
    assert netmaker_core.corefile([]).startswith(". {") and netmaker_core.corefile(["a", "b"]).startswith("a b {")


def test_housekeeping_writes_after_changes_only(home, monkeypatch):
    written = []
    monkeypatch.setattr(server, "write_names", lambda core: written.append(netmaker_core.names(core)))
    home.keeper.push_names()
    home.keeper.push_names()
    netmaker_core.set_name(home.core, "default", "", {"name": "printer", "ip": "192.0.2.7"})
    home.keeper.push_names()
    assert [len(each) for each in written] == [0, 1]


def test_dns_mode_off_writes_nothing(tmp_path, clock):
    home = Server(str(tmp_path), clock, DNS_MODE="off")
    boss = make_user(home, "boss", admin=True)
    home.network()
    home.keeper.push_names()
    assert boss.call("POST", "/api/dns/adm/pushdns").status == 409
    assert not os.path.exists(os.path.join(str(tmp_path), "dnsconfig"))
    home.stop()


def test_names_by_rest(home):
    boss, joe = make_user(home, "boss", admin=True), make_user(home, "joe")
    node = Client(home)
    node.wishes["name"] = "nas"
    node.join(home.key())
    path = "/api/dns/default"
    made = boss.good("POST", path, {"name": "Printer", "address": "192.0.2.7"})
    assert made == {"name": "printer", "address": "192.0.2.7", "address6": "", "network": "default"}
    six = boss.good("POST", path, {"name": "six", "address": "FD00::1"})
    assert (six["address"], six["address6"]) == ("", "fd00::1")
    assert [row["name"] for row in boss.get("/api/dns")] == ["nas", "printer", "six"]
    assert [row["name"] for row in boss.get("/api/dns/adm/default")] == ["nas", "printer", "six"]
    assert [row["name"] for row in boss.get("/api/dns/adm/default/nodes")] == ["nas"]
    assert [row["name"] for row in boss.get("/api/dns/adm/default/custom")] == ["printer", "six"]
    changed = boss.good("PUT", path + "/printer", {**made, "name": "scanner", "address": "192.0.2.8"})
    assert (changed["name"], changed["address"]) == ("scanner", "192.0.2.8")
    assert boss.good("DELETE", path + "/scanner")["Code"] == 200
    assert boss.call("DELETE", path + "/scanner").status == 404
    assert boss.call("POST", path, {"name": "nas", "address": "192.0.2.7"}).status == 409
    assert boss.call("POST", path, {"name": "a_b", "address": "192.0.2.7"}).status == 400
    assert boss.call("POST", path, {"name": "a", "address": "x"}).status == 400
    assert boss.call("POST", path, {"name": "a"}).status == 400
    assert boss.good("POST", "/api/dns/adm/pushdns")["Message"] == "DNS pushed to CoreDNS"
    assert os.path.exists(os.path.join(home.folder, "dnsconfig", "netmaker.hosts"))
    assert joe.call("GET", "/api/dns/adm/default").status == joe.call("GET", "/api/dns").status == 403
