# SPDX-License-Identifier: Apache-2.0
"""A router in the lab as OpenWrt is one: BusyBox for its userland, stand-ins for `uci`, `fw4` and procd, which are nowhere else.

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
import os, re, subprocess, sys
PATH = "/etc/config/firewall"
def load(path=PATH):
    sections, name = {}, ""
    for line in open(path) if os.path.exists(path) else ():
        word = re.findall(r"'[^']*'|[^\\s#']\\S*|#.*", line)
        word = [each.strip("'") for each in word if not each.startswith("#")]
        if word[:1] == ["config"]:
            name = word[2] if len(word) > 2 else "cfg%02d" % len(sections)
            sections[name] = {"": word[1]}
        elif word:
            sections[name][word[1]] = word[2]
    return sections
"""

UCI = (
    COMMON
    + """
argv = [word for number, word in enumerate(sys.argv[1:]) if word not in ("-q", "-t") and sys.argv[number] != "-t"]
assert sys.argv[1] == "-q", sys.argv
def staged(package):
    return "/tmp/.staged-" + package
def sections_of(package):
    return load(staged(package) if os.path.exists(staged(package)) else "/etc/config/" + package)
def save(sections, path):
    with open(path, "w") as file:
        for name, options in sections.items():
            print(f"config {options['']} '{name}'", file=file)
            for option, value in options.items():
                if option:
                    print(f"\\t{'list' if option == 'device' else 'option'} {option} '{value}'", file=file)
def do(verb, rest):
    place, _, value = rest.partition("=")
    package, name, option = (place + "..").split(".")[:3]
    sections = sections_of(package)
    if verb == "show":
        for name, options in sections.items():
            for option, value in options.items():
                print(f"{package}.{name}.{option}='{value}'" if option else f"{package}.{name}={value}")
    elif verb == "get":
        if option not in sections.get(name, {}):
            sys.exit(1)
        print(sections[name][option])
    elif verb == "delete":
        if option:
            del sections[name][option]
        else:
            del sections[name]
        save(sections, staged(package))
    elif verb == "commit":
        save(sections, "/etc/config/" + package)
        if os.path.exists(staged(package)):
            os.unlink(staged(package))
        open("/tmp/commits", "a").write("x" if package == "firewall" else "")
    else:
        assert (verb == "add_list") == (option == "device"), rest
        sections.setdefault(name, {})[option] = value.strip("'")
        save(sections, staged(package))
if argv[0] == "batch":
    for line in filter(None, map(str.strip, sys.stdin.read().splitlines())):
        do(*line.split(" ", 1))
elif argv[0] == "add":
    sections = sections_of(argv[1])
    name = "cfg%02d" % (len(sections) + 40)
    sections[name] = {"": argv[2]}
    save(sections, staged(argv[1]))
    print(name)
else:
    do(argv[0], argv[1])
"""
)

# What /lib/functions.sh has of UCI, by that `uci`.
FUNCTIONS = """
config_load() { CONFIG_PACKAGE=$1; }
config_get() { eval "$1=\\$(uci -q get $CONFIG_PACKAGE.$2.$3 || echo \\"${4:-}\\")"; }
config_get_bool() {
	config_get "$@"
	eval "case \\$$1 in 1 | on | true | yes | enabled) $1=1 ;; *) $1=0 ;; esac"
}
config_foreach() {
	local each
	for each in $(uci -q show "$CONFIG_PACKAGE" | sed -n "s/^$CONFIG_PACKAGE\\.\\([^.=]*\\)=$2\\$/\\1/p"); do "$1" "$each"; done
}
"""
# rc.common and procd's functions: what a script asks procd for, a line each.
RC_COMMON = """#!/bin/sh
. /lib/functions.sh
procd_open_instance() { instance=$1; }
procd_set_param() { echo "$instance $*" >>/tmp/procd; }
procd_close_instance() { :; }
procd_add_mdns() { echo "$instance mdns $*" >>/tmp/procd; }
procd_add_reload_trigger() { echo "reload $*" >>/tmp/procd; }
logger() { :; }
script=$1 verb=$2
shift 2
. "$script"
case $verb in
start | restart | reload) rm -f /tmp/procd; start_service; service_triggers ;;
stop) stop_service ;;
enable) touch /etc/rc.enabled ;;
disable) rm -f /etc/rc.enabled ;;
enabled) [ -e /etc/rc.enabled ] ;;
*) "$verb" "$@" ;;
esac
"""

FW4 = (
    COMMON
    + """
zones = {options["name"]: options for options in load().values() if options[""] == "zone"}
def wild(name):
    return name.replace("+", "*")
def device(zone, word):
    return f'{word} "{wild(zones[zone]["device"])}"' if zone in zones else ""
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
        chains["input"].append(f'iifname "{wild(options["device"])}" accept')
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
    for path, text in (
        ("/usr/bin/uci", UCI),
        ("/sbin/fw4", FW4),
        ("/etc/rc.common", RC_COMMON),
        ("/lib/functions.sh", FUNCTIONS),
        ("/etc/init.d/firewall", "#!/bin/sh\nexec /sbin/fw4 -q reload\n"),
    ):
        router.write(path, text)
        router.run("chmod", "755", path)
    busybox = router.run("sh", "-c", "command -v busybox").stdout.strip()
    router.run("rm", "-f", "/usr/sbin/iptables", "/usr/sbin/ip6tables")
    router.run("nft", "flush", "ruleset")
    router.run("fw4", "-q", "reload")
    # what comes first on the PATH; `ping` is the tests' own
    script = "for name in $($0 --list); do case $name in ping*) ;; *) ln -sf $0 /usr/local/sbin/$name ;; esac; done"
    router.run("sh", "-c", script, busybox)
