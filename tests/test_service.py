# SPDX-License-Identifier: Apache-2.0
"""What makes check-ins happen: init systems and crons, their files and the commands that they take, and real ones at work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agentkit import REPO
from lab import Host, Lab, unfit
from mesh import Mesh
from vmkit import PARTS

import netclient_lite as agent
from netclient_lite import CRONS, INITS, Context, Files, Paths, Run, System, cron_lines, words_for

LAUNCHER = "/etc/netclient/netclient"
NAMES = ("systemd", "procd", "openrc", "runit", "sysv", "sysv-chkconfig")
FILES = [
    pytest.param(mode, Path(path).name, text.format(**words_for(mode, LAUNCHER)), id=f"{name}-{Path(path).name}-{mode}")
    for name, init in zip(NAMES, INITS)
    for path, _, text in init.files
    for mode in ("on", "resident")
    if not (mode == "resident" and path.endswith(".timer"))
]
SCRIPTS = [each for each in FILES if each.values[2].startswith("#!")]  # type: ignore[union-attr]


@pytest.mark.parametrize(("mode", "name", "text"), FILES)
def test_each_file_names_what_it_starts(mode: str, name: str, text: str) -> None:
    assert agent.MADE.format(mode=mode) in text and "{" not in re.sub(
        r"\{\n[^{}]*\n\}|\$\{1:-\}|\{ \w|runs\(\) \{|\|\| \{", "", text
    )
    if name != "netclient.timer":
        assert (LAUNCHER + " daemon" if mode == "resident" else LAUNCHER + " checkin -n all") in re.sub(
            r'\ncommand_args="(.*)"', r" \1", text
        )


@pytest.mark.parametrize(("mode", "name", "text"), SCRIPTS)
def test_scripts_are_clean(mode: str, name: str, text: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    head, _, rest = text.partition("\n")
    script.write_text("#!/bin/sh\n" + rest)
    subprocess.run(["sh", "-n", str(script)], check=True)
    left = "SC2034" if head != "#!/bin/sh" else "SC1000"  # variables that procd's and OpenRC's own scripts read
    checked = [str(Path(sys.executable).parent / "shellcheck"), "-s", "dash", "-e", left, str(script)]
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("mode", ["on", "resident"])
def test_systemd_takes_its_units(mode: str, tmp_path: Path) -> None:
    units = {}
    for path, _, text in INITS[0].files:
        if mode == "on" or path.endswith(".service"):
            units[tmp_path / Path(path).name] = text.format(**words_for(mode, "/bin/true"))
    for path, text in units.items():
        path.write_text(text)
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, units)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "netclient" in line]) == (0, [])


# -- cron


def test_every_fifteen_seconds_by_a_cron_of_minutes() -> None:
    lines = cron_lines("* * * * * root ", "/bin/x")
    assert lines == ["* * * * * root /bin/x"] + [f"* * * * * root sleep {second}; /bin/x" for second in (15, 30, 45)]
    assert not any("&>" in line or "%" in line for line in lines)


@pytest.mark.parametrize("before", ["", "# mine\n5 4 * * *\troot\t/bin/mine\n", "no end"], ids=["none", "others", "no newline"])
@pytest.mark.parametrize("row", CRONS, ids=lambda row: row[1])
def test_cron_on_and_off(
    row: tuple[str, str, str, tuple[str, ...]], before: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its lines come once, others' stay, and off leaves the file as it was."""
    sign, file = tmp_path / row[0].lstrip("/"), tmp_path / row[1].lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not sign.exists() and sign != file:
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.touch()
    if before or sign == file:
        file.write_text(before)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in {Path(command.split()[0]).name for command in row[3]}:
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n')
        (programs / name).chmod(0o755)
    run = Run()
    run.environment["PATH"] = f"{programs}:/usr/bin:/bin"
    files = Files()
    context = Context(Paths(str(tmp_path)), run, files, System(run, str(tmp_path)), print)
    assert agent.set_cron(context, LAUNCHER, True)
    text = file.read_text()
    for line in cron_lines(row[2], LAUNCHER + " checkin -n all"):
        assert f"{line} # cron\n" in text
    assert before in text and text.endswith("\n")
    assert not agent.set_cron(context, LAUNCHER, True) and file.read_text() == text
    called = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert called == [command for command in row[3] if not command.startswith("/")]
    assert agent.set_cron(context, "", False)
    assert (file.read_text() if file.exists() else "") == before


def test_the_files_of_the_cron_folder_are_what_the_agent_writes() -> None:
    """One source: what cron/ holds to copy is what `cron show` prints for that cron."""
    folder = REPO / "cron"
    known = {"netclient-lite": "* * * * * root ", "crontab": "* * * * * ", "synology": "*\t*\t*\t*\t*\troot\t"}
    for name, start in known.items():
        held = [line for line in (folder / name).read_text().splitlines() if not line.startswith("#")]
        assert held == cron_lines(start, LAUNCHER + " checkin -n all"), name
    assert {path.name for path in folder.iterdir()} == {*known, "README.md"}


# -- on machines


UNFIT = unfit("wg", "busybox")
lab_only = [pytest.mark.lab, pytest.mark.skipif(bool(UNFIT), reason=UNFIT), pytest.mark.timeout(240)]


def pretend(host: Host, *programs: str) -> None:
    """Programs that only write down how they are called, or do what the tests need."""
    for name in programs:
        script = f'#!/bin/sh\necho "{name} $*" >>/tmp/calls\n'
        host.write(f"/usr/local/sbin/{name}", script)
        host.run("chmod", "755", f"/usr/local/sbin/{name}")


def calls(host: Host) -> list[str]:
    return host.run("sh", "-c", "cat /tmp/calls 2>/dev/null; rm -f /tmp/calls").stdout.splitlines()


COMMANDS = {
    "systemd": ("/run/systemd/system", ("systemctl",)),
    "openrc": ("/run/openrc", ("rc-service", "rc-update")),
    "runit": ("/run/runit", ("sv",)),
    "sysv": ("/etc/inittab", ("update-rc.d",)),
}
STARTED = {
    "systemd": ["systemctl daemon-reload", "systemctl enable --now netclient.timer"],
    "openrc": ["rc-update add netclient default", "rc-service netclient restart"],
    "runit": [],
    "sysv": ["update-rc.d netclient defaults"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
def test_a_join_installs_and_a_leave_removes(lab: Lab, name: str) -> None:
    """The complete list of commands; the other mode replaces the files; nothing is left."""
    mesh = Mesh(lab)
    host = lab.public("nas", "203.0.113.30")
    sign, programs = COMMANDS[name]
    host.run("sh", "-c", "mkdir -p /etc/init.d /var/service; rm -f /etc/init.d/netclient")
    host.run("mkdir" if sign.startswith("/run") else "touch", *(["-p"] if sign.startswith("/run") else []), sign)
    pretend(host, *programs)
    token = mesh.token(2)
    host.agent("join", "-t", token)
    assert calls(host) == STARTED[name]
    init = INITS[NAMES.index(name)]
    for path, mode, text in init.files:
        assert host.read(path) == text.format(**words_for("on", LAUNCHER))
        assert host.run("stat", "-c", "%a", path).stdout.strip() == f"{mode:o}"
    if name == "sysv":
        assert host.run("/etc/init.d/netclient", "status", check=False).returncode == 0
    host.agent("join", "-t", token, "--daemon", "resident")
    assert "daemon" in host.read(init.files[0][0])
    calls(host)
    host.agent("leave", "-n", "all")
    assert all(host.run("test", "-e", path, check=False).returncode for path, _, _ in init.files)
    assert calls(host) != [] or name == "sysv"
    if name == "runit":
        assert host.run("test", "-L", "/var/service/netclient", check=False).returncode


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(240)
def test_real_ones_keep_the_time(lab: Lab) -> None:
    """BusyBox' crond and runit's runsv, side by side: check-ins every 15 s, give or take two, none at the same time."""
    runsv = PARTS / "runit/usr/bin/runsv"
    host = lab.public("nas", "203.0.113.30")
    host.run("sh", "-c", "mkdir -p /etc/netclient /tmp/tabs /tmp/run; rm -rf /etc/cron.d")
    script = "#!/bin/sh\nread -r now rest </proc/uptime\necho $now >>/tmp/$1.times\nsleep 2\n"
    host.write(LAUNCHER, script)
    host.run("chmod", "755", LAUNCHER)
    host.write("/tmp/tabs/root", "\n".join(cron_lines("* * * * * ", f"{LAUNCHER} cron")) + "\n")
    host.start("busybox", "crond", "-f", "-c", "/tmp/tabs", "-L", "/dev/null")
    kinds = ["cron"]
    if runsv.exists():
        kinds.append("checkin")
        host.write("/tmp/sv/run", INITS[3].files[0][2].format(**words_for("on", LAUNCHER)))
        host.run("chmod", "755", "/tmp/sv/run")
        host.start(str(runsv), "/tmp/sv")
    host.run("sleep", "140", timeout=170)
    for kind in kinds:
        times = [float(line) for line in host.read(f"/tmp/{kind}.times").split()]
        gaps = [after - before for before, after in zip(times, times[1:])]
        assert len(gaps) >= 5 and all(13 <= gap <= 17 for gap in gaps), (kind, gaps)


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
def test_down_and_up_again_and_away(lab: Lab) -> None:
    """disconnect holds over check-ins and a reboot, connect ends it; uninstall leaves nothing but root's hooks."""
    mesh = Mesh(lab)
    one, two = (mesh.join(lab.public(name, ip)) for name, ip in (("one", "203.0.113.30"), ("two", "203.0.113.31")))
    mesh.settle([one, two])
    address, host = two.address, one.host

    def there() -> bool:
        return host.run("ip", "link", "show", "nm-demo", check=False).returncode == 0

    before = host.run("sh", "-c", "ls /etc/netclient/config").stdout
    assert "demo: would be down" in host.agent("disconnect", "-n", "demo", "--dry-run").stdout and there()
    assert "connect takes it up again" in host.agent("disconnect", "-n", "demo").stdout
    for _ in range(2):
        one.checkin()
        one.checkin("--force")
        assert not there()
        host.reboot()
    assert host.run("sh", "-c", "ls /etc/netclient/config").stdout == before
    assert "taken down here" in host.agent("status").stdout
    host.agent("disconnect", "-n", "demo")
    assert host.agent("connect", "-n", "all").stdout == "demo: up\n" and there()
    mesh.settle([one, two])
    assert not host.ping(address, count=2).lost

    host.write("/etc/netclient/hooks/demo/postdown", "#!/bin/sh\n")
    host.run("sh", "-c", "mkdir -p /etc/cron.d")
    assert "/etc/cron.d/netclient: check-ins every 15 s" in host.agent("cron", "on").stdout
    assert "as before" in host.agent("cron", "on").stdout
    host.agent("uninstall")
    assert not there()
    left = host.run(
        "sh", "-c", "find /etc/netclient /var/run/netclient /etc/cron.d/netclient 2>/dev/null", check=False
    ).stdout.split()
    assert [path for path in left if "/hooks" not in path] == ["/etc/netclient"]
    assert "no network is joined" in host.agent("status").stdout
