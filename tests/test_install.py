# SPDX-License-Identifier: Apache-2.0
"""shell/install.sh and the line that fetches it: under dash and BusyBox' ash, from the real server, on machines made of stubs.

A stub records its call; those of the package managers install what they are asked for, that is, further stubs.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator

import pytest
from agentkit import REPO
from lab import Lab, unfit, wait_for
from mesh import SERVER_URL, Mesh
from serverkit import Server

import netclient_lite as agent
import netmaker_core
import netmaker_lite as server

BUSYBOX = shutil.which("busybox") or ""
SHELLS = {"dash": [shutil.which("dash") or "sh"], "ash": [BUSYBOX, "ash"]}
TOOLS = (
    "cat",
    "cut",
    "df",
    "env",
    "grep",
    "head",
    "id",
    "mktemp",
    "modinfo",
    "rm",
    "rmdir",
    "sed",
    "sha256sum",
    "sh",
    "tail",
    "tr",
)
TOKEN = agent.make_token(agent.Token(("http://192.0.2.1:8081",), b"p" * 32, "home", "k1234567." + "s" * 22))
TEMPLATE = (REPO / "shell/install.sh").read_text("utf-8")
AGENT = netmaker_core.slim((REPO / "netclient_lite.py").read_text()).encode()
OPENWRT_PYTHON = "python3-light python3-openssl"

# BusyBox' wget, which dies at the -T that it was built without.
UCLIENT_FETCH = f"""#!/bin/sh
[ "$1 $2 $3" = "-q -T 20" ] && shift 3 || {{ [ "$1" = -qT20 ] && shift; }} || exit 1
exec {BUSYBOX} wget -q "$@"
"""
STUB = """#!/bin/sh
name=${0##*/}
here=${0%%/*}
printf '%%s\\n' "$name $*" >>%(log)s
case $name:$* in
python3:-c*) exec %(python)s "$@" ;;
python3:*join*)
    printf '%%s\\n' "token $NETCLIENT_ACCESSTOKEN" >>%(log)s
    if [ -e %(log)s.fails ]; then echo refused >&2; exit 1; fi
    ;;
ip:link*) [ -e %(log)s.kernel ] ;;
apt-get:*update | opkg:update | apk:update) ;;
apt-get:* | opkg:* | apk:*)
    if [ -e %(log)s.fails ]; then echo "E: Unable to locate package" >&2; exit 100; fi
    for word; do
        case $word in
        python3 | python3-light) cp="python3" ;;
        wireguard-tools) cp=wg ;;
        iproute2) cp=ip ;;
        wireguard-go) cp=wireguard-go ;;
        kmod-wireguard) : >%(log)s.kernel; continue ;;
        *) continue ;;
        esac
        [ ! -L "$here/$cp" ] || exit 1
        while IFS= read -r line; do printf '%%s\\n' "$line"; done <"$0" >"$here/$cp"
        /bin/chmod 755 "$here/$cp"
    done
    ;;
esac
"""


class Machine:
    """A folder with the programs that a machine has, and what was called of them."""

    def __init__(self, folder: Path, shell: str, url: str = "") -> None:
        self.folder, self.shell, self.url = folder, shell, url
        self.bin, self.tmp, self.log = folder / "bin", folder / "tmp", folder / "log"
        for path in (self.bin, self.tmp):
            path.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool, path="/usr/bin:/bin:/usr/sbin:/sbin")
            if found:
                (self.bin / tool).symlink_to(found)
        self.script = folder / "install.sh"
        self.write_script(netmaker_core.install_script(TEMPLATE, AGENT))
        self.release = folder / "openwrt_release"

    def write_script(self, text: str) -> None:
        self.script.write_text(text, "utf-8")

    def have(self, *names: str) -> Machine:
        for name in names:
            self.program(name, STUB % {"log": self.log, "python": sys.executable})
        return self

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        assert not path.is_symlink(), f"this would write over the machine's own {name}"
        path.write_text(text, "utf-8")
        path.chmod(0o755)

    def real(self, name: str) -> Machine:
        """A program of the machine that the tests run on."""
        (self.bin / name).symlink_to(str(shutil.which(name)))
        return self

    def openwrt(self) -> Machine:
        self.release.write_text("DISTRIB_ID='OpenWrt'\n", "utf-8")
        return self

    def kernel(self) -> Machine:
        """WireGuard is in the kernel."""
        Path(f"{self.log}.kernel").touch()
        return self

    def failing(self) -> Machine:
        """Package managers and joins fail."""
        Path(f"{self.log}.fails").touch()
        return self

    @property
    def calls(self) -> list[str]:
        """What was called, without what only asks."""
        text = self.log.read_text("utf-8") if self.log.exists() else ""
        asks = ("python3 -c", "import ", "sys.exit(", "ip link", "with urllib", "    open(")
        return [line.rstrip() for line in text.splitlines() if not line.startswith(asks)]

    def environment(self, **more: str) -> dict[str, str]:
        env = {"PATH": str(self.bin), "TMPDIR": str(self.tmp), "NM_SBIN": "/nonexistent", "NM_OPENWRT": str(self.release)}
        return {**env, "NETCLIENT_ROOT": str(self.folder / "root"), **more}

    def run(self, *arguments: str, prelude: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """The script; BusyBox' ash prefers its applets to PATH, so there stubs are functions."""
        env = self.environment(**{"KEY": TOKEN, "NM_SERVER": self.url, **more})
        if self.shell == "ash" and (self.bin / "ip").exists():
            prelude += f'ip() {{ "{self.bin}/ip" "$@"; }}\n'
        text = f'{prelude}. "{self.script}"'
        done = subprocess.run(
            [*SHELLS[self.shell], "-c", text, "install.sh", *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert list(self.tmp.iterdir()) == []  # nothing is left behind, whatever happened
        return done

    def paste(self, line: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The line, in a shell of this machine."""
        with contextlib.suppress(FileExistsError):
            (self.bin / "sh").unlink()
            (self.bin / "sh").symlink_to(SHELLS[self.shell][0] if self.shell == "dash" else BUSYBOX)
        done = subprocess.run(
            [*SHELLS[self.shell], "-c", line],
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert list(self.tmp.iterdir()) == []
        return done


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest) -> str:
    if not Path(SHELLS[request.param][0]).is_file():
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture
def machine(tmp_path: Path, shell: str, home: Server) -> Machine:
    return Machine(tmp_path, shell, f"http://127.0.0.1:{home.port}")


@contextlib.contextmanager
def answering(status: int, body: bytes, location: str = "") -> Iterator[str]:
    """A web server that gives the same answer to everything: a portal, an error page, a thief."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if location and self.path != "/portal":
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


# -- what is installed -----------------------------------------------------------------------------------------------------


def joined(machine: Machine, *flags: str) -> list[str]:
    """The last two calls of a machine that joined."""
    lines = machine.calls[-2:]
    assert re.fullmatch(r"python3 \S+/netclient_lite\.py (.*)", lines[0])
    assert lines[0].endswith(" ".join(("/netclient_lite.py join", *flags)))
    assert lines[1] == "token " + TOKEN
    return machine.calls[:-2]


def test_a_bare_debian_gets_all_of_it_without_recommended_packages(machine: Machine) -> None:
    machine.have("apt-get").real("curl")
    done = machine.run("--name", "nas", "--daemon", "off")
    assert done.returncode == 0, done.stderr
    options = "apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install"
    first = "python3 wireguard-tools" + (" iproute2" if machine.shell == "dash" else "")  # BusyBox has its own ip
    calls = joined(machine, "--name", "nas", "--daemon", "off")
    if machine.shell == "dash":
        assert calls == ["apt-get -q update", f"{options} {first}", "apt-get -q update", f"{options} wireguard-go"]
    else:
        assert calls[:2] == ["apt-get -q update", f"{options} {first}"]


@pytest.mark.parametrize("manager", ["opkg", "apk"])
def test_a_bare_openwrt_gets_the_light_python(machine: Machine, manager: str) -> None:
    machine.have(manager, "ip").real("wget").openwrt()
    assert machine.run("--daemon", "off").returncode == 0
    verb = {"opkg": "opkg install", "apk": "apk add"}[manager]
    calls = [f"{manager} update", f"{verb} {OPENWRT_PYTHON} wireguard-tools", f"{manager} update", f"{verb} kmod-wireguard"]
    assert joined(machine, "--daemon", "off") == calls


INSTALLS = {
    "dnf": "dnf -q -y install python3 wireguard-tools iproute",
    "yum": "yum -q -y install python3 wireguard-tools iproute",
    "zypper": "zypper -n -q install --no-recommends python3 wireguard-tools iproute2",
    "pacman": "pacman -S --noconfirm --needed python wireguard-tools iproute2",
    "apk": "apk add python3 wireguard-tools-wg iproute2",
    "opkg": f"opkg install {OPENWRT_PYTHON} wireguard-tools ip-full",  # Entware's
    "rpm-ostree": "rpm-ostree install -y --idempotent --apply-live python3 wireguard-tools iproute",
}


@pytest.mark.parametrize("manager", INSTALLS)
def test_each_package_manager_is_asked_for_its_own_names(machine: Machine, manager: str) -> None:
    machine.have(manager).real("wget").kernel()
    more = {}
    if manager == "rpm-ostree":
        (machine.folder / "ostree").touch()
        more["NM_OSTREE"] = str(machine.folder / "ostree")
    done = machine.run("--dry-run", **more)
    assert done.returncode == 0, done.stderr
    wanted = INSTALLS[manager]
    if machine.shell != "dash":  # BusyBox has its own ip
        wanted = re.sub(r" (iproute2?|ip-full)$", "", wanted)
    assert wanted in done.stdout.splitlines(), done.stdout


def test_what_is_there_is_not_installed(machine: Machine) -> None:
    machine.have("apt-get", "python3", "wg", "ip").real("curl").kernel()
    assert machine.run().returncode == 0
    assert joined(machine) == []


def test_an_unknown_system_with_the_tools_goes_on_and_without_them_says_which(machine: Machine) -> None:
    machine.have("python3", "ip").real("curl")
    refused = machine.run()
    assert refused.returncode == 1
    assert "missing: wg. Install by hand Python 3.8 or newer" in refused.stderr
    assert machine.calls == []
    machine.have("wg")
    assert machine.run().returncode == 0
    assert joined(machine) == []


@pytest.mark.parametrize("tool", ["uclient-fetch", "curl", "wget", "python3"])
def test_whatever_can_fetch_fetches(machine: Machine, tool: str) -> None:
    machine.have("apt-get", "python3", "wg", "ip").kernel()
    if tool == "uclient-fetch":
        machine.program(tool, UCLIENT_FETCH)
    elif tool != "python3":
        machine.real(tool)
    assert machine.run().returncode == 0
    joined(machine)


def test_the_server_is_found_in_the_token(machine: Machine) -> None:
    machine.have("apt-get", "python3", "wg", "ip").real("curl").kernel()
    token = agent.make_token(agent.Token((machine.url, "http://192.0.2.1:1"), b"p" * 32, "home", "k1234567." + "s" * 22))
    (machine.bin / "base64").symlink_to(str(shutil.which("base64")))
    assert machine.run(KEY=token, NM_SERVER="").returncode == 0


@pytest.mark.parametrize("how", ["KEY", "NM_TOKEN", "NETCLIENT_ACCESSTOKEN", "-t"])
def test_the_token_comes_in_four_ways_and_stands_on_no_command_line_of_ours(machine: Machine, how: str) -> None:
    machine.have("apt-get", "python3", "wg", "ip").real("curl").kernel()
    flags, given = (["-t", TOKEN], {}) if how == "-t" else ([], {how: TOKEN})
    assert machine.run(*flags, **{"KEY": "", **given}).returncode == 0
    assert joined(machine) == []


def test_a_dry_run_prints_the_commands_and_changes_nothing(machine: Machine) -> None:
    machine.have("opkg", "ip").real("wget").openwrt()
    before = sorted(machine.folder.rglob("*"))
    done = machine.run("--dry-run", "--name", "nas", "-k", "very", "--privatekey=secret")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("wget -q ") and lines[0].endswith(f"{machine.url}/meshclient/files/netclient_lite.py")
    assert lines[1].endswith("must be " + hashlib.sha256(AGENT).hexdigest())
    assert lines[2:4] == ["opkg update", f"opkg install {OPENWRT_PYTHON} wireguard-tools"]
    assert lines[-1].startswith("NETCLIENT_ACCESSTOKEN=… python3 ") and lines[-1].endswith("join --name nas -k … --privatekey=…")
    assert TOKEN not in done.stdout + done.stderr
    assert machine.calls == []
    assert sorted(machine.folder.rglob("*")) == before


# -- what goes wrong -------------------------------------------------------------------------------------------------------


def refused(machine: Machine, sentence: str, *arguments: str, **more: str) -> None:
    done = machine.run(*arguments, **more)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sentence in done.stderr
    assert done.stderr.splitlines()[-1].startswith("install: ")
    assert TOKEN not in done.stderr
    assert not (machine.folder / "root").exists()


def test_who_is_not_root_is_told_how_to_be(machine: Machine) -> None:
    machine.have("apt-get").real("curl")
    refused(machine, "must be root: become it", prelude="id() { echo 1000; }\n")
    assert machine.calls == []


def test_without_room_nothing_is_installed(machine: Machine) -> None:
    machine.have("opkg", "ip").real("wget").openwrt()
    frugal = 'df() { printf "Filesystem 1K-blocks Used Available Use%% Mounted on\\n/dev/a-long-name\\n 9 5 4000 96%% /\\n"; }\n'
    refused(machine, "only 4000 KB are free on / and 10240 are needed", prelude=frugal)
    assert machine.calls == []


def test_no_token_a_damaged_one_and_no_server(machine: Machine) -> None:
    machine.have("apt-get").real("curl")
    refused(machine, "no access token", KEY="")
    refused(machine, "token is damaged", KEY=TOKEN + "“")
    refused(machine, "token is damaged", KEY=TOKEN + "$(touch x)")
    refused(machine, "address is not known", KEY="abc", NM_SERVER="")
    refused(machine, "needs the token after it", "-t")
    assert machine.calls == []


def test_a_copy_that_no_server_made_is_refused(machine: Machine) -> None:
    machine.write_script(TEMPLATE)
    refused(machine.have("apt-get").real("curl"), "has no hash of the agent")


def test_a_server_that_is_gone(machine: Machine) -> None:
    machine.have("apt-get").real("curl")
    machine.url = "http://127.0.0.1:9"
    refused(machine, "cannot fetch http://127.0.0.1:9/meshclient/files/netclient_lite.py (")
    assert machine.calls == []


def test_no_program_that_can_fetch(tmp_path: Path, home: Server) -> None:
    refused(Machine(tmp_path, "dash", "http://127.0.0.1:9").have("apt-get"), "no uclient-fetch, curl, wget or python3 here")


def test_another_agent_a_portal_and_an_error_page_are_refused(machine: Machine) -> None:
    machine.have("apt-get").real("curl")
    for status, body, sentence in (
        (200, AGENT + b"\nimport evil\n", "another file than this script was made for"),
        (200, b"<html>Please sign in</html>", "captive portal"),
        (200, b"", "captive portal"),
        (404, b"<html>404</html>", "cannot fetch"),
        (503, b'{"Code": 503}', "cannot fetch"),
    ):
        with answering(status, body) as machine.url:
            refused(machine, sentence)
    with answering(302, b"<html>", "/portal") as machine.url:
        assert machine.run().returncode == 1
    assert machine.calls == []


def test_a_package_that_fails_is_named(machine: Machine) -> None:
    machine.have("apt-get", "python3", "ip").real("curl").failing()
    refused(machine, "apt could not install wireguard-tools (missing: wg): its message above tells why")
    assert "E: Unable to locate package" in machine.run().stderr
    assert not [call for call in machine.calls if "join" in call]


def test_a_join_that_fails_says_which_packages_stay(machine: Machine) -> None:
    machine.have("apt-get", "python3", "ip", "wg").real("curl").kernel().failing()
    refused(machine, "the join failed, for the reason above")


def test_uninstall_without_an_agent_does_nothing(machine: Machine) -> None:
    done = machine.run("--uninstall")
    assert done.returncode == 0
    assert "nothing to do" in done.stderr


def test_help(machine: Machine) -> None:
    done = machine.run("--help")
    assert done.returncode == 0
    assert "--uninstall" in done.stdout


def test_a_script_cut_off_anywhere_runs_nothing(tmp_path: Path, shell: str) -> None:
    machine = Machine(tmp_path, shell, "http://127.0.0.1:9").have("apt-get", "python3", "wg", "ip", "curl", "wget")
    whole = machine.script.read_text("utf-8")
    body = whole.rstrip()[: whole.rindex("{ main") + len('{ main "$@"; }')]
    ends = [*range(0, len(body), 97), *range(len(body) - 200, len(body))]
    for end in ends:
        machine.write_script(whole[:end])
        machine.run()
        assert machine.calls == [], end
    machine.write_script(body)
    machine.run()
    assert machine.calls != []


# -- the line --------------------------------------------------------------------------------------------------------------


def install_line_of(home: Server, url: str) -> str:
    script = home.get("/meshclient/files/install.sh")[2]
    return netmaker_core.install_line(url, TOKEN, hashlib.sha256(script).hexdigest())


@pytest.mark.parametrize("tool", ["uclient-fetch", "curl", "wget"])
def test_the_line_fetches_checks_and_runs(machine: Machine, home: Server, tool: str) -> None:
    machine.have("apt-get", "python3", "wg", "ip").kernel()
    if tool == "uclient-fetch":
        machine.program(tool, UCLIENT_FETCH)
    else:
        machine.real(tool)
    if machine.shell == "ash":
        machine.have("wireguard-go")  # its ip is the applet
    done = machine.paste(install_line_of(home, machine.url) + " --name nas")
    assert done.returncode == 0, done.stderr
    assert joined(machine, "--name", "nas") == []


def test_the_line_refuses_every_other_script(machine: Machine, home: Server) -> None:
    machine.have("apt-get", "python3", "wg", "ip").real("curl").kernel()
    script = home.get("/meshclient/files/install.sh")[2]
    for body in (script + b"\n", script.replace(b"set -eu", b"set -e "), script[:-40], b"<html>", b""):
        with answering(200, body) as url:
            done = machine.paste(install_line_of(home, url))
            assert done.returncode == 1
            assert f"{url}/meshclient/files/install.sh: no answer, or not the script of this line" in done.stderr
    assert machine.paste(install_line_of(home, "http://127.0.0.1:9")).returncode == 1
    assert machine.calls == []


def test_the_line_is_short_enough_for_a_router_and_quotes_what_it_holds(home: Server) -> None:
    """OpenWrt builds BusyBox with FEATURE_EDITING_MAX_LEN 512: what goes beyond is dropped while it is typed or pasted."""
    made = server.view_key(netmaker_core.add_key(home.core, "default"))
    assert max(map(len, made["install"].splitlines())) < 511
    assert made["install"].startswith("KEY=%s sh -c '\n" % made["accessstring"])
    script = home.get("/meshclient/files/install.sh")[2]
    assert hashlib.sha256(script).hexdigest() in made["install"]
    long = netmaker_core.install_line("https://mesh-server.example.org:8443/mesh", TOKEN, "0" * 64)
    assert max(map(len, long.splitlines())) < 511
    assert long.count("--no-check-certificate") == 2  # the hash proves it
    odd = netmaker_core.install_line("http://[2001:db8::1]:8081/it's;a", TOKEN, "0" * 64)
    assert odd.endswith(" 'http://[2001:db8::1]:8081/it'\\''s;a'")


@pytest.mark.skipif(not BUSYBOX, reason="busybox is not installed")
def test_the_line_pasted_at_the_prompt_of_busybox(tmp_path: Path, home: Server) -> None:
    machine = Machine(tmp_path, "ash", f"http://127.0.0.1:{home.port}")
    machine.have("apt-get", "python3", "wg", "ip", "wireguard-go")
    (machine.bin / "sh").unlink()
    (machine.bin / "sh").symlink_to(BUSYBOX)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [BUSYBOX, "ash", "-i"],
        env=machine.environment(TERM="dumb"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    drained = threading.Thread(target=_drain, args=(ours,), daemon=True)
    drained.start()
    os.write(ours, (install_line_of(home, machine.url) + " --name nas\nexit\n").encode())
    process.wait(30)
    os.close(ours)
    assert joined(machine, "--name", "nas") == []


def _drain(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass


# -- the server ------------------------------------------------------------------------------------------------------------


def test_the_script_that_is_served_knows_the_agent_that_is_served(home: Server) -> None:
    script, source = (home.get("/meshclient/files/" + name)[2] for name in ("install.sh", "netclient_lite.py"))
    assert source == AGENT
    assert b"\nAGENT_SHA256=%s\n" % hashlib.sha256(source).hexdigest().encode() in script
    look = (REPO / "shell/netclient-look").read_bytes()
    assert home.get("/meshclient/files/netclient-look")[2] == look
    assert script.decode() == netmaker_core.install_script(TEMPLATE, AGENT, look)
    assert len([1 for a, b in zip(TEMPLATE.splitlines(), script.decode().splitlines()) if a != b]) == 2


@pytest.mark.parametrize("name", ["install.sh", "netclient_lite.py", "netclient-look"])
def test_files_can_be_asked_for_by_head(home: Server, name: str) -> None:
    said = home.raw(b"HEAD /meshclient/files/%s HTTP/1.0\r\n\r\n" % name.encode())
    head, _, body = said.partition(b"\r\n\r\n")
    size = len(home.get("/meshclient/files/" + name)[2])
    assert head.startswith(b"HTTP/1.0 200")
    assert b"content-length: %d" % size in head.lower()
    assert body == b""


def test_without_the_script_keys_come_without_the_line(
    home: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = tmp_path / "alone" / "netclient_lite.py"
    alone.parent.mkdir()
    alone.write_bytes(AGENT)
    monkeypatch.setattr(agent, "__file__", str(alone))
    for _ in range(2):
        made = server.view_key(netmaker_core.add_key(home.core, "default"))
        assert made["install"] == "" and made["join"]
    assert [record.message for record in caplog.records].count(caplog.records[-1].message) == 1
    assert "install.sh is not installed with this server" in caplog.text
    status, _, body = home.get("/meshclient/files/install.sh")
    assert (status, json.loads(body)["Code"]) == (404, 404)
    alone.unlink()  # bytecode alone, as OpenWrt's package has it
    assert home.get("/meshclient/files/netclient_lite.py")[0] == 404


def test_a_wheel_finds_the_script_where_it_lays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "lib/python3.11/site-packages/netclient_lite.py"
    script = tmp_path / "share/netmaker-lite/shell/install.sh"
    for path, data in ((module, b"agent=1\n"), (script, TEMPLATE.encode())):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    monkeypatch.setattr(agent, "__file__", str(module))
    assert hashlib.sha256(b"agent=1\n").hexdigest() in netmaker_core.client_files()["install.sh"].decode()
    module.write_bytes(b"agent=2\n")  # updated under a running server
    os.utime(module, ns=(1, 1))
    assert hashlib.sha256(b"agent=2\n").hexdigest() in netmaker_core.client_files()["install.sh"].decode()


# -- on real WireGuard -----------------------------------------------------------------------------------------------------

UNFIT = unfit("wg", "wireguard-go", "curl")
APT = """#!/bin/sh
echo "apt-get $*" >>/var/log/apt-calls
case $* in *wireguard-tools*) mv /opt/wg /usr/bin/wg ;; *install*wireguard-go*) mv /opt/wireguard-go /usr/bin/wireguard-go ;; esac
"""


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(180)
def test_from_the_line_to_a_mesh_and_back(lab: Lab) -> None:
    """A NAS without WireGuard joins by the line; the line again updates; what it left can be taken away without a trace."""
    mesh = Mesh(lab)
    hub = mesh.join(mesh.host)
    nas = lab.site("nas", lab.router("home", "203.0.113.21"))
    nas.run("sh", "-c", "mv /usr/bin/wg /usr/bin/wireguard-go /opt; mkdir /opt/tmp")
    nas.write("/usr/bin/apt-get", APT)
    nas.run("chmod", "755", "/usr/bin/apt-get")
    line = json.loads(mesh.admin("key", "add", mesh.network, "--json"))["install"]
    assert line.endswith(SERVER_URL)
    before = set(nas.run("find", "/etc", "/var/run/").stdout.split())

    for expected in ("done: /etc/netclient/netclient status", "settings updated"):
        done = nas.run("sh", "-c", line + " --daemon off --name nas", env={"TMPDIR": "/opt/tmp"})
        assert expected in done.stdout + done.stderr
    assert nas.read("/var/log/apt-calls").count("wireguard-tools") == 1
    assert nas.run("ls", "/opt/tmp").stdout == ""
    hub.checkin()
    address = json.loads(nas.agent("list", "--json").stdout)[0]["peers"][0]["address"]
    wait_for(lambda: not nas.ping(address, count=1).lost, 20, "the hub to be reached")
    assert "nas" in nas.run("/etc/netclient/netclient", "list").stdout

    spent = lab.site("spent", lab.router("other", "203.0.113.22", lan="192.168.2.0/24"))
    empty = set(spent.run("find", "/etc", "/var/run/").stdout.split())
    failed = spent.run("sh", "-c", line + " --daemon off", check=False)
    assert failed.returncode == 1
    assert "install: the join failed, for the reason above" in failed.stderr
    left = spent.run("find", "/etc", "/var/run/", "-type", "f").stdout.split()
    assert not [path for path in left if path not in empty and not path.endswith(".lock")]

    nas.run("curl", "-fso", "/root/install.sh", SERVER_URL + "/meshclient/files/install.sh")
    dry = nas.run("sh", "/root/install.sh", "--uninstall", "--dry-run").stdout
    assert dry.splitlines() == ["/etc/netclient/netclient uninstall", "rm -f /usr/bin/netclient-look"]
    assert nas.run("test", "-x", "/usr/bin/netclient-look", check=False).returncode == 0
    nas.run("sh", "/root/install.sh", "--uninstall")
    after = set(nas.run("find", "/etc", "/var/run/").stdout.split())
    assert after - {"/var/run/wireguard"} == before  # wireguard-go's own folder
    assert "nm-demo" not in nas.run("ip", "link").stdout
    assert [node["name"] for node in mesh.nodes()] == ["server"]
