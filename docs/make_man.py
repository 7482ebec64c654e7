#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/man/*.1, docs/cli.md and docs/completion/* from the tables that make the programs' own --help.

python3 docs/make_man.py            writes them
python3 docs/make_man.py --check    says which are out of date; the status is 1 if any is
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable, Iterable

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import netclient_lite as agent  # noqa: E402
import netmaker_admin as admin  # noqa: E402
import netmaker_core  # noqa: E402
import netmaker_lite as server  # noqa: E402

DATE = "November 2026"
Pairs = Iterable["tuple[str, str]"]

# --- man pages: the man macros, which groff, mandoc and BusyBox' man read ---------------------------------------------


def escaped(text: str) -> str:
    """Text for roff: no escape, no request at the beginning of a line, hyphens that can be copied, ASCII only."""
    for old, new in (
        ("\\", "\\e"),
        ("-", "\\-"),
        ("…", "\\&..."),
        ("'", "\\(aq"),
        ("`", "\\(ga"),
        ("^", "\\(ha"),
        ("~", "\\(ti"),
    ):
        text = text.replace(old, new)
    return "\\&" + text if text.startswith(".") else text


def bold(text: str) -> str:
    return '.B "%s"' % escaped(text).replace('"', "\\(dq")


def listed(pairs: Pairs) -> list[str]:
    return [line for what, meaning in pairs for line in (".TP", bold(what), escaped(meaning))]


def section(name: str, *lines: str) -> list[str]:
    return [".SH " + name, *lines]


def page(name: str, about: str, sections: Iterable[list[str]]) -> str:
    head = [
        ".\\\" Made by docs/make_man.py from the program's tables; changes belong there.",
        '.TH %s 1 "%s" "%s %s" "netmaker-lite"' % (name.upper(), DATE, name, server.__version__),
        ".nh",  # flags and addresses are not to be broken
        ".ad l",
        *section("NAME", "%s \\- %s" % (name, escaped(about))),
    ]
    return "\n".join([*head, *(line for lines in sections for line in lines)]) + "\n"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


STATUS = listed([("0", "done"), ("1", "failed; one sentence on standard error says why, and what helps"), ("2", "wrong usage")])


def command_lines(command: admin.Command) -> list[str]:
    lines = [".SS " + escaped(command.words), bold(admin.synopsis(command)), ".PP", escaped(sentence(command.help))]
    if command.more:
        lines += [".PP", escaped(command.more)]
    return lines + listed(admin.meanings(command.arguments))


def keys(settings: Iterable[admin.Setting]) -> list[str]:
    return listed((each.short + "=" + each.metavar, each.help) for each in settings)


def server_page() -> str:
    settings = ((each.name, each.help + (each.default and " [%s]" % each.default)) for each in netmaker_core.SETTINGS)
    variables = [
        ("NETMAKER_API", "URL of the server that the commands ask, instead of the data folder of this host (--api)"),
        ("NETMAKER_TOKEN", "API token for it (--token-file)"),
    ]
    sections = [
        section("SYNOPSIS", bold("netmaker-lite"), ".I COMMAND", "[arguments]"),
        section("DESCRIPTION", *(escaped(text) + "\n.PP" for text in admin.ENDING)),
        section("COMMON OPTIONS", *listed(admin.meanings((*admin.WHERE, admin.JSON)))),
        section("COMMANDS", *(line for command in admin.SHOWN for line in command_lines(command))),
        section("KEYS OF A NETWORK", "For network set, and as flags of network add.", *keys(admin.NETWORK_SETTINGS)),
        section("KEYS OF A NODE", "For node set.", *keys(admin.NODE_SETTINGS)),
        section("EXIT STATUS", *STATUS),
        section("ENVIRONMENT", *listed([*variables, *settings])),
        section(
            "FILES",
            *listed(
                [
                    ("/var/lib/netmaker-lite", "the data folder: netmaker.db, server.key (keep it), netmaker.env (settings)"),
                ]
            ),
        ),
        section("SEE ALSO", ".BR netclient\\-lite (1),", ".BR wg (8)"),
    ]
    return page("netmaker-lite", "server of a WireGuard mesh, and its administrator's tool", sections)


def agent_flags(names: Iterable[str]) -> list[tuple[str, str]]:
    """The flags that a verb's help shows, with their other spellings and environment names."""
    found, switches = [], dict(agent.SWITCHES)
    settings = {setting.name: setting for setting in agent.SETTINGS}
    for name in names:
        if name in switches:
            found.append(("--" + name, switches[name]))
            continue
        setting = settings[name]
        short = ["-" + alias for alias in setting.aliases if len(alias) == 1]
        value = setting.metavar or {"yesno": "yes|no", "daemon": "on|resident|off"}.get(setting.kind, setting.kind.upper())
        found.append((", ".join([*short, "--" + name]) + " " + value, "%s [%s]" % (setting.help, setting.env)))
    return found


def agent_lines(command: agent.Command) -> list[str]:
    words = ["netclient-lite", command.name, *("[--%s]" % flag for flag in command.flags if command.name != "join")]
    words += ["[flags]"] * (command.name == "join")
    lines = [".SS " + command.name, bold(" ".join(words)), ".PP", escaped(sentence(command.help))]
    return lines + (listed(agent_flags(command.flags)) if command.name == "join" else [])


def agent_page() -> str:
    about = (
        "The agent of netmaker-lite asks its server what this machine's mesh looks like, and changes of interfaces, addresses"
        " and routes only what differs. Without the server the mesh goes on. Flags may have one dash or two, and a value after"
        " a blank or an equals sign; yes and no may be on and off, true and false."
    )
    switches = [pair for pair in agent.SWITCHES if pair[0] not in ("accept-key",)]
    sections = [
        section("SYNOPSIS", bold("netclient-lite"), ".I COMMAND", "[flags]"),
        section("DESCRIPTION", escaped(about)),
        section("COMMANDS", *(line for command in agent.COMMANDS for line in agent_lines(command))),
        section("FLAGS OF SEVERAL COMMANDS", *listed(("--" + name, text) for name, text in switches)),
        section("EXIT STATUS", *STATUS),
        section(
            "FILES",
            *listed(
                [
                    (
                        "/etc/netclient/config",
                        "one set of files for each network that this machine joined, readable by root alone",
                    ),
                    ("/etc/netclient/netclient", "what units and cron lines call"),
                    ("/var/run/netclient", "what changes often, on a tmpfs"),
                ]
            ),
        ),
        section("SEE ALSO", ".BR netmaker\\-lite (1),", ".BR wg (8)"),
    ]
    return page("netclient-lite", "agent of netmaker-lite, a WireGuard mesh for routers, NAS and IoT", sections)


# --- docs/cli.md ------------------------------------------------------------------------------------------------------


def cells(text: str) -> str:
    return text.replace("|", "\\|")


def markdown(pairs: Pairs) -> list[str]:
    rows = ["| `%s` | %s |" % (cells(what), cells(meaning)) for what, meaning in pairs]
    return ["| | |", "| --- | --- |", *rows, ""] if rows else []


def command_section(command: admin.Command) -> list[str]:
    calls = " or ".join("`%s`" % call for call in command.rest.split(" | ") if call)
    return [
        "### " + command.words,
        "",
        sentence(command.help) + (" " + command.more if command.more else ""),
        "",
        "    " + admin.synopsis(command),
        "",
        *markdown(admin.meanings(command.arguments)),
        *(["REST: " + calls, ""] if calls else []),
    ]


def settings_table(title: str, settings: Iterable[admin.Setting]) -> list[str]:
    return [
        "## " + title,
        "",
        *markdown((each.short + "=" + each.metavar, each.help + " (`%s`)" % each.field) for each in settings),
    ]


def cli_md() -> str:
    lines = [
        "# The command line",
        "",
        "Made by `make man` from the table of commands in `netmaker_admin.py`; changes belong there.",
        "",
        *(line for text in admin.ENDING for line in (text, "")),
        "Common options, of every command that has a use for them:",
        "",
        *markdown(admin.meanings((*admin.WHERE, admin.JSON))),
    ]
    head = None
    for command in admin.SHOWN:
        noun = command.words.rpartition(" ")[0].split(" ")[0]
        if noun != head:
            lines += ["## " + sentence(admin.NOUNS.get(noun, "the server"))[:-1], ""]
        head = noun
        lines += command_section(command)
    lines += settings_table("Keys of a network", admin.NETWORK_SETTINGS)
    lines += settings_table("Keys of a node", admin.NODE_SETTINGS)
    return "\n".join(lines).rstrip() + "\n"


# --- completion -------------------------------------------------------------------------------------------------------

AGENT_BASH = r"""# bash completion of netclient-lite; made by docs/make_man.py from the agent's tables

_netclient_lite() {
    local cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} flags=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "%(verbs)s" -- "$cur"))
        return
    fi
    case $before in
    -n | --network)
        COMPREPLY=($(compgen -W "all $(cd /etc/netclient/config 2>/dev/null && for flags in netconfig-*; do
            [[ -e $flags && $flags != *.tmp ]] && echo "${flags#netconfig-}"
        done)" -- "$cur"))
        return
        ;;
    --daemon) COMPREPLY=($(compgen -W "on resident off" -- "$cur")) && return ;;
    %(yesno)s) COMPREPLY=($(compgen -W "yes no" -- "$cur")) && return ;;
    %(taking)s) return ;;
    esac
    case ${COMP_WORDS[1]} in
%(commands)s
    esac
    COMPREPLY=($(compgen -W "$flags --verbose --help" -- "$cur"))
}

complete -F _netclient_lite netclient-lite netclient_lite.py
"""


def agent_completion() -> str:
    kinds = {kind: ["--" + each.name for each in agent.SETTINGS if each.kind == kind] for kind in ("yesno", "text", "number")}
    taking = [name for name in (*kinds["text"], *kinds["number"]) if name != "--network"]
    commands = ["    %s) flags='%s' ;;" % (each.name, " ".join("--" + flag for flag in each.flags)) for each in agent.COMMANDS]
    return AGENT_BASH % {
        "verbs": " ".join(each.name for each in agent.COMMANDS),
        "yesno": " | ".join(kinds["yesno"]),
        "taking": " | ".join(["-t", "-k", *taking]),
        "commands": "\n".join(commands),
    }


FILES: dict[str, Callable[[], str]] = {
    "cli.md": cli_md,
    "man/netmaker-lite.1": server_page,
    "man/netclient-lite.1": agent_page,
    "completion/netmaker-lite": lambda: admin.completion_script("bash"),
    "completion/netclient-lite": agent_completion,
}


def out_of_date() -> list[str]:
    """The files that are not what the tables say."""
    return [name for name, make in FILES.items() if not (DOCS / name).is_file() or (DOCS / name).read_text("utf-8") != make()]


def main(arguments: list[str]) -> int:
    stale = out_of_date()
    if arguments == ["--check"]:
        sys.stderr.write("".join("docs/%s is out of date: make man\n" % name for name in stale))
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(FILES[name](), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
