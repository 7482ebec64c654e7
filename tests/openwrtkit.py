# SPDX-License-Identifier: Apache-2.0
"""A router in the lab as OpenWrt is one: BusyBox for all its userland, and stand-ins for `uci` and `fw4`, which are nowhere else.

The stand-ins know what the agent uses of them: named sections in /etc/config/firewall, and a table `inet fw4` made of zones,
rules and NAT sections, which `fw4 reload` makes anew as a whole.
"""

from __future__ import annotations

from lab import Router

CONFIG = """config zone 'lan'
	option name 'lan'
	list device 'br-lan'
	option input 'ACCEPT'
config zone 'wan'
	option name 'wan'
	list device 'wan'
	option masq '1'
"""

COMMON = """#!/usr/bin/python3
import re, subprocess, sys
PATH = "/etc/config/firewall"
def load():
    sections, name = {}, ""
    for line in open(PATH):
        word = re.findall(r"'[^']*'|\\S+", line)
        if word[:1] == ["config"]:
            name = word[2].strip("'")
            sections[name] = {"": word[1]}
        elif word:
            sections[name][word[1]] = word[2].strip("'")
    return sections
"""

UCI = (
    COMMON
    + """
argv = sys.argv[1:]
assert argv[:2] == ["-q", "-t"], argv
sections = load()
if argv[3:] == ["show", "firewall"]:
    for name, options in sections.items():
        for option, value in options.items():
            print(f"firewall.{name}.{option}='{value}'" if option else f"firewall.{name}={value}")
elif argv[3:] == ["batch"]:
    for line in sys.stdin.read().splitlines():
        verb, rest = line.split(" ", 1)
        place, _, value = rest.partition("=")
        _, name, option = (place + "..").split(".")[:3]
        if verb == "delete":
            del sections[name]
        elif verb == "commit":
            with open(PATH, "w") as file:
                for name, options in sections.items():
                    print(f"config {options['']} '{name}'", file=file)
                    for option, value in options.items():
                        if option:
                            print(f"\\t{'list' if option == 'device' else 'option'} {option} '{value}'", file=file)
            open("/tmp/commits", "a").write("x")
        else:
            assert (verb == "add_list") == (option == "device"), line
            sections.setdefault(name, {})[option] = value.strip("'")
else:
    sys.exit(f"uci {argv}")
"""
)

FW4 = (
    COMMON
    + """
zones = {options["name"]: options for options in load().values() if options[""] == "zone"}
def device(zone, word):
    return f'{word} "{zones[zone]["device"]}"' if zone in zones else ""
def addresses(options):
    kind = "ip6" if options.get("family") == "ipv6" else "ip"
    pairs = (("src_ip", "saddr"), ("dest_ip", "daddr"))
    return " ".join(f"{kind} {word} {options[option]}" for option, word in pairs if option in options)
if sys.argv[1:3] == ["-q", "device"]:
    found = [name for name, options in zones.items() if options["device"] == sys.argv[3]]
    print(*found)
    sys.exit(not found)
assert sys.argv[1:] == ["-q", "reload"]
chains = {
    "input": ["type filter hook input priority 0; policy drop;", "ct state established,related accept", 'iifname "lo" accept'],
    "forward": ["type filter hook forward priority 0; policy drop;", "ct state established,related accept",
                'iifname "br-lan" oifname "wan" accept'],
    "srcnat": ["type nat hook postrouting priority 100;", 'oifname "wan" masquerade'],
}
for name, options in load().items():
    if options[""] == "zone" and options.get("input") == "ACCEPT":
        chains["input"].append(f'iifname "{options["device"]}" accept')
    elif options[""] == "rule" and "dest" in options:
        way = device(options["src"], "iifname"), device(options["dest"], "oifname")
        chains["forward"].append(" ".join((*way, addresses(options), "accept")))
    elif options[""] == "rule":
        chains["input"].append(f"{options['proto']} dport {options['dest_port']} accept")
    elif options[""] == "nat":
        chains["srcnat"].append(f'{device(options["src"], "oifname")} {addresses(options)} masquerade')
text = "table inet fw4\\ndelete table inet fw4\\ntable inet fw4 {\\n"
for name, rules in chains.items():
    text += f"chain {name} {{\\n" + "\\n".join(rules) + "\\n}\\n"
subprocess.run(["nft", "-f", "-"], input=text + "}\\n", text=True, check=True)
open("/tmp/reloads", "a").write("x")
"""
)


def make_openwrt(router: Router) -> None:
    """Turn a router into one, with its own firewall in force."""
    router.write("/etc/config/firewall", CONFIG)
    for path, text in (("/usr/bin/uci", UCI), ("/sbin/fw4", FW4)):
        router.write(path, text)
        router.run("chmod", "755", path)
    busybox = router.run("sh", "-c", "command -v busybox").stdout.strip()
    router.run("rm", "-f", "/usr/sbin/iptables", "/usr/sbin/ip6tables")
    router.run("nft", "flush", "ruleset")
    router.run("fw4", "-q", "reload")
    # what comes first on the PATH; `ping` is the tests' own
    script = "for name in $($0 --list); do case $name in ping*) ;; *) ln -sf $0 /usr/local/sbin/$name ;; esac; done"
    router.run("sh", "-c", script, busybox)
