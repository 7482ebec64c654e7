# SPDX-License-Identifier: Apache-2.0
"""What a gateway forwards, and the complete text that each firewall gets for it; on models of the three nothing is left to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from agentkit import Clock, Standing, own_settings, record, view_of
from hypothesis import given
from hypothesis import strategies as st

import netclient_lite as agent
from netclient_lite import (
    Files,
    Flow,
    Gateway,
    Invalid,
    Rules,
    Run,
    exits,
    gateway_rules,
    iptables_rules,
    parse_me,
    parse_ruleset,
    parse_ways,
    plan_iptables,
    plan_nft,
    plan_uci,
    roles,
    section,
)

WAYS = [
    ("0.0.0.0/0", "wan"),
    ("192.168.7.0/24", "br-lan"),
    ("fd07::/64", "br-lan"),
    ("10.42.0.0/24", "cni0"),
    ("10.42.1.0/24", "flannel.1"),
]
DUAL = {"ip6": "fd20::2", "range6": "fd20::/64"}
IF = "nm-demo"


def rules_for(*ranges: str, interface: str = "", nat: bool = True, keep_out: tuple[str, ...] = (), **me: Any) -> Any:
    egress = {"ranges": list(ranges), "interface": interface, "nat": nat}
    settings = parse_me(own_settings(**({"egress": egress} if ranges else {}), **me))
    view = view_of(record("a", ip="10.20.30.3"))
    view.me = {**settings, "clients": me.get("clients", [])}
    return gateway_rules(view, IF, 51821, WAYS, keep_out, ["br-lan", "wan", IF])


def whole(*ranges: str, **more: Any) -> Rules:
    rules, warnings = rules_for(*ranges, **more)
    assert rules and not warnings
    return rules


# -- what is to be forwarded


def test_both_directions_and_the_own_address_for_the_mesh_alone() -> None:
    assert whole("192.168.7.0/24") == Rules(
        IF,
        51821,
        (Flow(4, IF, "br-lan", "", "192.168.7.0/24"), Flow(4, "br-lan", IF, "192.168.7.0/24")),
        (Flow(4, "", "br-lan", "10.20.30.0/24", "192.168.7.0/24"),),
    )
    assert whole("192.168.7.0/24", nat=False).masked == ()
    assert whole("fd07::/64").masked == ()  # a network without IPv6 has no source to hide
    assert whole("fd07::/64", **DUAL).masked == (Flow(6, "", "br-lan", "fd20::/64", "fd07::/64"),)


def test_relays_forward_within_the_mesh() -> None:
    assert whole(forward=True).passed == (Flow(4, IF, IF),)
    assert whole(forward=True, **DUAL).passed == (Flow(4, IF, IF), Flow(6, IF, IF))


def test_clients_to_the_internet() -> None:
    clients = [{"id": "1", "key": "k", "ip": "10.20.30.9", "internet": True}, {"id": "2", "key": "k", "ip": "10.20.30.8"}]
    rules = whole(clients=clients)
    assert rules.passed == (Flow(4, IF, "wan", "10.20.30.9"), Flow(4, "wan", IF, "", "10.20.30.9", True))
    assert rules.masked == (Flow(4, "", "wan", "10.20.30.9"),)
    none, warnings = rules_for(clients=[{"ip6": "fd20::9", "internet": True}])
    assert none is None and warnings == ["the client fd20::9 gets no internet: there is no default route"]


def test_where_a_range_lies() -> None:
    assert exits("10.42.0.0/16", WAYS) == ["cni0", "flannel.1"]  # the Pods of a Kubernetes node
    assert exits("10.43.0.0/16", WAYS) == ["wan"]
    assert exits("192.168.7.8/32", WAYS) == ["br-lan"]
    assert exits("fd99::/64", WAYS) == []


@pytest.mark.parametrize(
    ("text", "more", "why"),
    [
        ("0.0.0.0/0", {}, "it would take everything"),
        ("10.20.0.0/16", {}, "it would take 10.20.30.0/24"),
        ("203.0.113.0/24", {"keep_out": ("203.0.113.10",)}, "it would take 203.0.113.10"),
        ("169.254.0.0/16", {}, "no node can own it"),
        ("fd99::/64", {}, "no route leads there"),
        ("192.168.7.0/24", {"interface": "eth9"}, "there is no interface eth9"),
    ],
)
def test_what_is_not_opened(text: str, more: dict[str, Any], why: str) -> None:
    rules, warnings = rules_for(text, **more)
    assert rules is None and len(warnings) == 1 and why in warnings[0]
    rules, _ = rules_for("192.168.7.0/24", text, **{**more, "interface": ""})
    assert rules  # the others are


def test_the_user_may_forbid_it_and_a_disabled_node_does_nothing() -> None:
    rules, warnings = rules_for("192.168.7.0/24", forwarding=False)
    assert rules is None and "--ipforwarding no" in warnings[0]
    view = view_of(forward=True)
    assert any(roles(view))
    view.state = "disabled"
    assert not any(roles(view))


@pytest.mark.parametrize(
    "egress",
    [
        *({"ranges": [text], "interface": ""} for text in ("192.168.7.1/24", "x", "10.0.0.0/8; reboot")),
        *({"ranges": ["10.1.0.0/16"], "interface": text} for text in ("a b", "../x", "$(reboot)", "-i", 7)),
        *({"interface": "eth0"}, ["10.0.0.0/8"], {"ranges": 7}),
    ],
)
def test_odd_instructions_reach_no_command_line(egress: Any) -> None:
    with pytest.raises((Invalid, ValueError, KeyError, TypeError)):
        parse_me(own_settings(egress=egress))


def test_ways_of_both_tools() -> None:
    text = "default via 203.0.113.1 dev wan metric 100 \n192.168.7.0/24 dev br-lan proto kernel scope link  src 192.168.7.1\n"
    text += "10.0.0.9 via 10.0.0.1 dev eth1\nunreachable 10.9.0.0/16 dev lo\nblackhole 10.8.0.0/16\n"
    assert parse_ways(text, 4) == [("0.0.0.0/0", "wan"), ("192.168.7.0/24", "br-lan"), ("10.0.0.9/32", "eth1")]
    assert parse_ways("default via fe80::1 dev wan\nfd07::/64 dev br-lan metric 256\n", 6) == [
        ("::/0", "wan"),
        ("fd07::/64", "br-lan"),
    ]


# -- nft

FOREIGN = """table inet fw { # handle 1
	set blocked { # handle 9
		type ipv4_addr
	}

	chain input { # handle 1
		type filter hook input priority filter; policy drop;
		ct state established,related accept # handle 4
	}

	chain forward { # handle 2
		type filter hook forward priority filter; policy accept;
		iifname "lan" accept # handle 5
		jump late # handle 6
	}

	chain late { # handle 3
		reject # handle 7
	}
}
table ip open { # handle 2
	chain forward { # handle 1
		type filter hook forward priority filter; policy accept;
		counter packets 0 bytes 0 comment "drop reject" # handle 2
	}
}
"""


class NftModel:
    """Chains and what `nft -f -` does to them."""

    def __init__(self, text: str) -> None:
        self.chains = parse_ruleset(text)
        self.handle = 100

    def feed(self, text: str) -> None:
        for line in text.splitlines():
            verb, what, family, table, rest = (line + " ").split(" ", 4)
            name, _, tail = rest.strip().partition(" ")
            key = (family, table, name)
            if (verb, what) == ("add", "chain"):
                self.chains.setdefault(key, [tail[2:-2]])
            elif (verb, what) == ("flush", "chain"):
                del self.chains[key][1:]
            elif (verb, what) == ("delete", "chain"):
                assert len(self.chains.pop(key)) == 1
            elif (verb, what) == ("delete", "table"):
                self.chains = {other: body for other, body in self.chains.items() if other[:2] != key[:2]}
            elif (verb, what) == ("delete", "rule"):
                before = len(self.chains[key])
                self.chains[key] = [rule for rule in self.chains[key] if not rule.endswith("# " + tail)]
                assert len(self.chains[key]) == before - 1
            elif what == "rule":
                self.handle += 1
                at = 1 if verb == "insert" else len(self.chains[key])
                self.chains[key].insert(at, f"{tail} # handle {self.handle}")
            else:
                assert (verb, what) == ("add", "table"), line


def unmarked(text: str) -> list[str]:
    return re.sub(r":[0-9a-f]{8}\"", '"', text).splitlines()


def test_all_that_nft_gets() -> None:
    rules = whole("192.168.7.0/24", "fd07::/64", **DUAL)._replace(closed=True)
    mark = ' comment "netclient:demo"'
    own = "inet netclient"
    passed = [
        'iifname "nm-demo" oifname "br-lan" ip daddr 192.168.7.0/24 accept' + mark,
        'iifname "br-lan" oifname "nm-demo" ip saddr 192.168.7.0/24 accept' + mark,
        'iifname "nm-demo" oifname "br-lan" ip6 daddr fd07::/64 accept' + mark,
        'iifname "br-lan" oifname "nm-demo" ip6 saddr fd07::/64 accept' + mark,
    ]
    assert unmarked(plan_nft("demo", rules, parse_ruleset(FOREIGN))) == [
        f"add table {own}",
        f"add chain {own} forward-demo {{ type filter hook forward priority 0; }}",
        f"flush chain {own} forward-demo",
        f'add rule {own} forward-demo iifname "nm-demo" tcp flags syn / syn,rst tcp option maxseg size set rt mtu{mark}',
        f'add rule {own} forward-demo oifname "nm-demo" tcp flags syn / syn,rst tcp option maxseg size set rt mtu{mark}',
        *(f"add rule {own} forward-demo {rule}" for rule in passed),
        f'add rule {own} forward-demo iifname "nm-demo" drop{mark}',
        f"add table {own}",
        f"add chain {own} postrouting-demo {{ type nat hook postrouting priority 100; }}",
        f"flush chain {own} postrouting-demo",
        f'add rule {own} postrouting-demo oifname "br-lan" ip saddr 10.20.30.0/24 ip daddr 192.168.7.0/24 masquerade{mark}',
        f'add rule {own} postrouting-demo oifname "br-lan" ip6 saddr fd20::/64 ip6 daddr fd07::/64 masquerade{mark}',
        f"insert rule inet fw input udp dport 51821 accept{mark}",
        *(f"insert rule inet fw forward {rule}" for rule in reversed(passed)),
    ]
    assert plan_nft("demo", None, parse_ruleset(FOREIGN)) == ""


def test_chains_of_iptables_are_left_to_iptables() -> None:
    text = FOREIGN.replace("table inet fw", "table ip filter")
    assert "ip filter" in plan_nft("demo", whole("192.168.7.0/24"), parse_ruleset(text))
    assert "ip filter" not in plan_nft("demo", whole("192.168.7.0/24"), parse_ruleset(text), [("ip", "filter")])


def test_only_the_fitting_family_goes_into_a_chain_of_one() -> None:
    text = FOREIGN.replace("table inet fw", "table ip6 fw")
    made = plan_nft("demo", whole("192.168.7.0/24", "fd07::/64", forward=True, **DUAL), parse_ruleset(text))
    inserted = [line for line in made.splitlines() if line.startswith("insert rule ip6 fw forward")]
    assert len(inserted) == 3 and all("ip " not in line.split("forward", 1)[1] for line in inserted)


# -- iptables


class IptablesModel:
    """Tables, what `-S` tells of them, and what `iptables-restore -n` does."""

    def __init__(self, *rules: str) -> None:
        self.tables = {
            "filter": {"INPUT": [], "FORWARD": list(rules), "OUTPUT": []},
            "nat": {"PREROUTING": [], "POSTROUTING": list(rules), "OUTPUT": []},
        }

    def listed(self) -> dict[str, str]:
        def lines(chains: dict[str, list[str]]) -> list[str]:
            heads = [f"-P {name} ACCEPT" if name.isupper() else f"-N {name}" for name in chains]
            return heads + [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]

        return {table: "\n".join(lines(chains)) for table, chains in self.tables.items()}

    def feed(self, text: str) -> None:
        chains: dict[str, list[str]] = {}
        for line in text.splitlines():
            word = line.split(" ")
            if line.startswith("*"):
                chains = self.tables[line[1:]]
            elif line.startswith(":"):
                chains[word[0][1:]] = []
            elif word[0] == "-A":
                chains[word[1]].append(" ".join(word[2:]))
            elif word[0] == "-I":
                chains[word[1]].insert(int(word[2]) - 1, " ".join(word[3:]))
            elif word[0] == "-D":
                chains[word[1]].remove(" ".join(word[2:]))
            elif word[0] == "-F":
                chains[word[1]].clear()
            elif word[0] == "-X":
                assert not chains.pop(word[1])
            else:
                assert line == "COMMIT"


def test_all_that_iptables_gets() -> None:
    rules = whole("192.168.7.0/24", clients=[{"ip": "10.20.30.9", "internet": True}])._replace(closed=True)
    text = plan_iptables("demo", iptables_rules(rules, 4, None), IptablesModel().listed())
    clamp = "-p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"
    assert re.sub(r"-m comment --comment [0-9a-f]{8} ", "", text).splitlines() == [
        "*filter",
        ":netclient-F-demo - [0:0]",
        ":netclient-I-demo - [0:0]",
        f"-A netclient-F-demo -i nm-demo {clamp}",
        f"-A netclient-F-demo -o nm-demo {clamp}",
        "-A netclient-F-demo -i nm-demo -o br-lan -d 192.168.7.0/24 -j ACCEPT",
        "-A netclient-F-demo -i br-lan -o nm-demo -s 192.168.7.0/24 -j ACCEPT",
        "-A netclient-F-demo -i nm-demo -o wan -s 10.20.30.9 -j ACCEPT",
        "-A netclient-F-demo -i wan -o nm-demo -d 10.20.30.9 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A netclient-F-demo -i nm-demo -j DROP",
        "-I FORWARD 1 -j netclient-F-demo",
        "-A netclient-I-demo -p udp --dport 51821 -j ACCEPT",
        "-I INPUT 1 -j netclient-I-demo",
        "COMMIT",
        "*nat",
        ":netclient-P-demo - [0:0]",
        "-A netclient-P-demo -o br-lan -s 10.20.30.0/24 -d 192.168.7.0/24 -j MASQUERADE",
        "-A netclient-P-demo -o wan -s 10.20.30.9 -j MASQUERADE",
        "-I POSTROUTING 1 -j netclient-P-demo",
        "COMMIT",
    ]


# -- fw4


class UciModel:
    """`uci show firewall` and `uci batch`, of named sections."""

    def __init__(self) -> None:
        self.sections = {"cfg01": ("zone", {"name": "lan"}), "netclient_other": ("zone", {"name": "other"})}
        self.commits = 0

    def show(self) -> str:
        lines = []
        for name, (kind, options) in self.sections.items():
            lines += [f"firewall.{name}={kind}", *(f"firewall.{name}.{option}='{value}'" for option, value in options.items())]
        return "\n".join(lines)

    def feed(self, text: str) -> None:
        for line in text.splitlines():
            verb, _, rest = line.partition(" ")
            place, _, value = rest.partition("=")
            _, name, *option = place.split(".") + [""] * (place == "firewall")
            if verb == "delete":
                del self.sections[name]
            elif verb == "commit":
                self.commits += 1
            elif option:
                self.sections[name][1][option[0]] = value.strip("'")
            else:
                self.sections[name] = (value, {})


ZONES = {IF: "netclient_demo", "br-lan": "lan", "wan": "wan"}


def test_all_that_uci_gets() -> None:
    rules = whole("192.168.7.0/24", "fd07::/64", **DUAL)
    named = "name='netclient demo'"

    def made(number: int, kind: str, **options: str) -> list[str]:
        name = f"firewall.netclient_demo_{number}"
        return [f"set {name}={kind}", f"set {name}.{named}", *(f"set {name}.{key}='{value}'" for key, value in options.items())]

    passed = {"proto": "all", "target": "ACCEPT"}
    masked = {"proto": "all", "target": "MASQUERADE"}
    assert plan_uci("demo", rules, ZONES, UciModel().show()).splitlines() == [
        "set firewall.netclient_demo=zone",
        "set firewall.netclient_demo.name='netclient_demo'",
        "add_list firewall.netclient_demo.device='nm-demo'",
        *(f"set firewall.netclient_demo.{name}='ACCEPT'" for name in ("input", "output")),
        "set firewall.netclient_demo.forward='REJECT'",
        "set firewall.netclient_demo.mtu_fix='1'",
        *made(1, "rule", src="*", proto="udp", dest_port="51821", target="ACCEPT"),
        *made(2, "rule", src="netclient_demo", dest="lan", dest_ip="192.168.7.0/24", family="ipv4", **passed),
        *made(3, "rule", src="lan", dest="netclient_demo", src_ip="192.168.7.0/24", family="ipv4", **passed),
        *made(4, "rule", src="netclient_demo", dest="lan", dest_ip="fd07::/64", family="ipv6", **passed),
        *made(5, "rule", src="lan", dest="netclient_demo", src_ip="fd07::/64", family="ipv6", **passed),
        *made(6, "nat", src="lan", src_ip="10.20.30.0/24", dest_ip="192.168.7.0/24", family="ipv4", **masked),
        *made(7, "nat", src="lan", src_ip="fd20::/64", dest_ip="fd07::/64", family="ipv6", **masked),
        "commit firewall",
    ]
    assert section("a_b-c.d") == "netclient_a_5fb_2dc_2ed"


# -- all three: once applied nothing is left to do, two networks do not meet, and all of it goes again

RANGES = st.lists(st.sampled_from(["192.168.7.0/24", "fd07::/64", "10.42.0.0/16", "10.43.0.0/16"]), unique=True, max_size=3)
CLIENT = {"ip": "10.20.30.9", "ip6": "fd20::9", "internet": True}


@st.composite
def wishes(draw: st.DrawFn) -> Rules | None:
    clients = [CLIENT] if draw(st.booleans()) else []
    ranges, more = draw(RANGES), {"nat": draw(st.booleans()), "forward": draw(st.booleans()), "clients": clients}
    rules, _ = rules_for(*ranges, **more, **DUAL)
    return rules and rules._replace(closed=draw(st.booleans()))  # type: ignore[no-any-return]


CHANGES = st.lists(st.tuples(st.sampled_from(["demo", "demo-2", "de.o", "2"]), wishes()), max_size=6)


@given(CHANGES, st.sampled_from(["", FOREIGN]))
def test_nft_is_as_wanted_after_one_step(changes: list[tuple[str, Rules | None]], foreign: str) -> None:
    model, wanted = NftModel(foreign), {}
    for network, rules in [*changes, *((network, None) for network, _ in changes)]:
        wanted[network] = rules
        model.feed(plan_nft(network, rules, model.chains))
        assert [plan_nft(other, want, model.chains) for other, want in wanted.items()] == [""] * len(wanted)
    assert model.chains == parse_ruleset(foreign)


@given(CHANGES, st.booleans())
def test_nft_is_repaired_after_a_reload(changes: list[tuple[str, Rules | None]], flushed: bool) -> None:
    model, wanted = NftModel(FOREIGN), dict(changes)
    for network, rules in wanted.items():
        model.feed(plan_nft(network, rules, model.chains))
    model.chains = {**({} if flushed else model.chains), **parse_ruleset(FOREIGN)}
    for network, rules in wanted.items():
        model.feed(plan_nft(network, rules, model.chains))
    assert [plan_nft(network, rules, model.chains) for network, rules in wanted.items()] == [""] * len(wanted)


@given(CHANGES, st.sampled_from([(4, None), (6, None), (4, ("FORWARD",))]))
def test_iptables_is_as_wanted_after_one_step(changes: list[tuple[str, Rules | None]], how: Any) -> None:
    model, blank, wanted = IptablesModel("-j DOCKER-USER"), IptablesModel("-j DOCKER-USER"), {}
    for network, rules in [*changes, *((network, None) for network, _ in changes)]:
        wanted[network] = iptables_rules(rules, *how) if rules else {}
        model.feed(plan_iptables(network, wanted[network], model.listed()))
        assert [plan_iptables(other, want, model.listed()) for other, want in wanted.items()] == [""] * len(wanted)
        model.tables["filter"]["FORWARD"].remove("-j DOCKER-USER")  # docker starts again
        model.tables["filter"]["FORWARD"].insert(0, "-j DOCKER-USER")
        for other, want in wanted.items():
            model.feed(plan_iptables(other, want, model.listed()))
    assert model.tables == blank.tables


@given(CHANGES)
def test_uci_is_as_wanted_after_one_step(changes: list[tuple[str, Rules | None]]) -> None:
    model, wanted = UciModel(), {}
    for network, rules in [*changes, *((network, None) for network, _ in changes)]:
        wanted[network] = rules
        zones = {**dict.fromkeys(("cni0", "flannel.1"), "*"), **ZONES, IF: section(network)}
        text, before = plan_uci(network, rules, zones, model.show()), model.commits
        model.feed(text)
        assert model.commits - before == bool(text)
        assert [plan_uci(o, w, {**zones, IF: section(o)}, model.show()) for o, w in wanted.items()] == [""] * len(wanted)
    assert model.sections == UciModel().sections


# -- the node


@pytest.mark.parametrize("role", [{"forward": True}, {"egress": {"ranges": ["192.168.7.0/24"], "interface": "", "nat": True}}])
def test_a_change_of_roles_is_on_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: dict[str, Any]) -> None:
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5")))
    standing.settle()
    node, seen = standing.node, []
    monkeypatch.setattr(node, "_forward", lambda view, port: seen.append(roles(view)) or [])
    node.counters.word = "1.00000001"
    node.adopt({"from": "1.00000001", "word": "2.00000002", "me": own_settings(**role)})
    assert node.memory.trial and any(seen[-1])
    monkeypatch.setattr(node.session, "exchange", lambda *_: (_ for _ in ()).throw(agent.Unreachable("gone")))
    monkeypatch.setattr(agent, "time", Clock())
    node._roll_back()
    assert not any(seen[-1]) and node.memory.rejected["word"] == "2.00000002"


def test_a_node_without_a_role_starts_nothing_for_it(tmp_path: Path) -> None:
    class NoRun(Run):
        def __call__(self, *argv: str, stdin: str = "", detached: bool = False) -> str:
            raise AssertionError(argv)

    assert Gateway(NoRun(), Files(), str(tmp_path), "demo").apply(None) == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_set_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = Standing(tmp_path, view_of(record("b", ip="10.20.30.5"), forward=True))

    def fails(*_: Any) -> Any:
        raise agent.CommandFailed(["nft", "-f", "-"], 1, "no such file")

    monkeypatch.setattr(Gateway, "apply", fails)
    monkeypatch.setattr(agent.System, "ways", lambda *_: WAYS)
    standing.settle()
    standing.settle()
    assert [text for text in standing.said if "gateway" in text] == [
        "demo: the gateway is not as it should be: `nft -f -` failed (status 1): no such file"
    ]
