# SPDX-License-Identifier: Apache-2.0
"""The OpenWrt package: what the feed's Makefile installs, what mkipk.py packs, and a router that joins by UCI."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from agentkit import REPO
from lab import Lab, Router, unfit, wait_for
from mesh import Mesh
from openwrtkit import make_openwrt
from test_layout import LIGHT
from vmkit import PARTS

FEED = REPO / "openwrt"
SPEC = importlib.util.spec_from_file_location("mkipk", FEED / "mkipk.py")
assert SPEC and SPEC.loader
mkipk: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mkipk)

# What the build system gives to a Makefile, as far as ours uses it: `make install-PACKAGE` installs into DEST.
RULES = """
BUILD_DIR := $(DEST)/../build
INSTALL_DIR := install -d -m0755
INSTALL_BIN := install -m0755
INSTALL_DATA := install -m0644
INSTALL_CONF := install -m0600
LN := ln -sf
CP := cp -fpR
"""
PACKAGE = """
PKG_BUILD_DIR ?= $(BUILD_DIR)/$(PKG_NAME)-$(PKG_VERSION)
define BuildPackage
install-$(1):
	$$(call Build/Prepare)
	$$(call Build/Compile)
	$$(call Package/$(1)/install,$$(DEST))
endef
"""
PYTHON3 = """
PYTHON3_PKG_DIR := /usr/lib/python3.13/site-packages
define Py3Package
Package/$(1)/install = $$(call Py3Package/$(1)/install,$$(1))
endef
"""


def installed(package: str, folder: Path) -> dict[str, str]:
    """Mode (links: target) by path of what a package's Makefile installs."""
    top, dest = folder / "top", folder / "dest"
    (top / "feeds/packages/lang/python").mkdir(parents=True)
    (top / "include").mkdir()
    dest.mkdir()
    (top / "rules.mk").write_text(RULES)
    (top / "include/package.mk").write_text(PACKAGE)
    (top / "feeds/packages/lang/python/python3-package.mk").write_text(PYTHON3)
    for name in ("pypi.mk", "luci.mk"):
        (top / "feeds/packages/lang/python" / name).write_text("")
    argv = [
        "make",
        "-s",
        "-C",
        str(FEED / package),
        f"TOPDIR={top}",
        f"INCLUDE_DIR={top}/include",
        f"DEST={dest}",
        f"install-{package}",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in dest.rglob("*"):
        if path.is_symlink():
            found["/" + str(path.relative_to(dest))] = "-> " + os.readlink(path)
        elif path.is_file():
            found["/" + str(path.relative_to(dest))] = f"{path.stat().st_mode & 0o777:o}"
    return found


@pytest.mark.skipif(not shutil.which("make"), reason="make is not here")
def test_the_feeds_package_installs(tmp_path: Path) -> None:
    assert installed("netclient-lite", tmp_path) == {
        "/etc/config/netclient": "600",
        "/etc/hotplug.d/iface/95-netclient": "644",
        "/etc/hotplug.d/ntp/95-netclient": "644",
        "/etc/init.d/netclient": "755",
        "/etc/uci-defaults/80-netclient": "644",
        "/usr/bin/netclient-lite": "755",
        "/usr/bin/netclient-look": "755",
        "/usr/bin/netclient_lite.py": "-> netclient-lite",
        "/usr/lib/netclient-lite/netclient_lite.py": "644",
        "/usr/libexec/netclient-uci": "755",
    }


@pytest.mark.skipif(not shutil.which("make"), reason="make is not here")
def test_the_servers_package_installs(tmp_path: Path) -> None:
    modules = ("netmaker_admin", "netmaker_core", "netmaker_lite")
    assert installed("netmaker-lite", tmp_path) == {
        "/etc/config/netmaker": "600",
        "/etc/init.d/netmaker": "755",
        "/usr/bin/netmaker-lite": "755",
        **{f"/usr/lib/python3.13/site-packages/{name}.py": "644" for name in modules},
    }


def test_it_depends_on_what_the_code_imports() -> None:
    """test_layout holds the agent to what python3-light has, and ssl."""
    assert sorted(mkipk.depends()) == ["kmod-wireguard", "python3-light", "python3-openssl", "wireguard-tools"]
    assert "ssl" in LIGHT and "import ssl" in (REPO / "netclient_lite.py").read_text()
    conffiles = re.search(
        r"define Package/netclient-lite/conffiles\n(.*?)endef", (FEED / "netclient-lite/Makefile").read_text(), re.S
    )
    assert conffiles and conffiles.group(1) == mkipk.KEEP


def unpacked(data: bytes) -> dict[str, tuple[int, bytes, str]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        return {
            "/" + entry.name.lstrip("./"): (
                entry.mode,
                stream.read() if (stream := tar.extractfile(entry)) else b"",
                entry.linkname,
            )
            for entry in tar
            if not entry.isdir()
        }


def test_packages_without_the_sdk() -> None:
    """Twice the same bytes; the files of the feed's package; scripts that do nothing in an image builder."""
    (ipk_name, ipk), (apk_name, apk) = mkipk.packages()
    assert [(ipk_name, ipk), (apk_name, apk)] == list(mkipk.packages())
    assert re.fullmatch(r"netclient-lite_[\d.]+-\d+_all\.ipk", ipk_name) and re.fullmatch(
        r"netclient-lite-[\d.]+-r\d+\.apk", apk_name
    )
    outer = unpacked(ipk)
    assert outer["/debian-binary"][1] == b"2.0\n" and len(outer) == 3
    control, data = unpacked(outer["/control.tar.gz"][1]), unpacked(outer["/data.tar.gz"][1])
    assert "Depends: python3-light, python3-openssl, wireguard-tools, kmod-wireguard\n" in control["/control"][1].decode()
    assert data["/etc/init.d/netclient"][0] == 0o755 and data["/etc/config/netclient"][0] == 0o600
    assert data["/usr/bin/netclient_lite.py"][2] == "netclient-lite"
    assert len(ipk) < 60 * 1024
    for name in ("postinst", "prerm"):
        script = control["/" + name][1].decode()
        done = subprocess.run(
            ["/bin/sh", "-c", script], env={"IPKG_INSTROOT": "/somewhere", "PATH": "/nowhere"}, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    second = apk.index(b"\x1f\x8b\x08", 10)
    while True:  # the second stream begins where the first one ends
        try:
            apk_data = unpacked(apk[second:])
            break
        except (tarfile.TarError, OSError, EOFError):
            second = apk.index(b"\x1f\x8b\x08", second + 1)
    assert {path: entry[1] for path, entry in apk_data.items()} == {path: entry[1] for path, entry in data.items()}
    with tarfile.open(fileobj=io.BytesIO(apk), mode="r:gz") as tar:
        info = tar.extractfile(".PKGINFO")
        assert info and b"pkgname = netclient-lite\n" in info.read()
        assert "APK-TOOLS.checksum.SHA1" in tar.getmember("etc/init.d/netclient").pax_headers


SHELLS = [
    *([f"{PARTS}/busybox/bin/busybox ash"] if (PARTS / "busybox").exists() else []),
    *(["dash"] if shutil.which("dash") else []),
]


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_can_be_read_by_the_shells(shell: str) -> None:
    for path in (FEED / "netclient-lite/files").iterdir():
        if path.name not in ("netclient-lite", "netclient.config"):
            subprocess.run([*shell.split(), "-n", str(path)], check=True)


# -- a router


UNFIT = unfit("wg", "busybox")


class Procd:
    """What procd does with the instances of the init script: start, and start again what has ended, after its pause."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def init(self, verb: str) -> None:
        self.router.run("sh", "/etc/rc.common", "/etc/init.d/netclient", verb)

    def instances(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for line in self.router.read("/tmp/procd").splitlines():
            name, what, *rest = line.split()
            found.setdefault(name, {})[what] = " ".join(rest)
        return found

    def run(self) -> None:
        for settings in self.instances().values():
            if "respawn" in settings:
                pause = settings["respawn"].split()[1]
                self.router.start("sh", "-c", f"while :; do {settings['command']}; sleep {pause}; done")
            elif "command" in settings:
                self.router.start(*settings["command"].split())


@pytest.mark.lab
@pytest.mark.skipif(bool(UNFIT), reason=UNFIT)
@pytest.mark.timeout(280)
def test_a_router_from_the_package_to_the_mesh(lab: Lab, tmp_path: Path) -> None:
    """Install the .ipk by BusyBox' tar, write UCI, start: it joins, checks in every 15 s, follows changes; its zone stays."""
    mesh = Mesh(lab)
    home = lab.router("home", "203.0.113.21", lan="192.168.1.0/24")
    hub = mesh.join(mesh.host)
    nas = lab.site("nas", home)
    make_openwrt(home)
    home.run("sh", "-c", "touch /etc/openwrt_release; mkdir -p /tmp/pk")
    (tmp_path / "x").mkdir()
    _, ipk = next(iter(mkipk.packages()))
    control = unpacked(unpacked(ipk)["/control.tar.gz"][1])
    for path, (mode, data, link) in unpacked(unpacked(ipk)["/data.tar.gz"][1]).items():
        if link:
            home.run("ln", "-sf", link, path)
        else:
            home.write(path, data.decode())
            home.run("chmod", f"{mode:o}", path)
    home.write("/tmp/pk/postinst", control["/postinst"][1].decode())
    home.run("sh", "/tmp/pk/postinst")
    procd = Procd(home)
    assert procd.instances()["checkin"]["respawn"] == "3600 15 0"
    assert procd.instances()["reload"] == {"netclient": ""}
    zone = 'iifname "nm-*" accept'
    assert zone in home.run("nft", "list", "ruleset").stdout
    assert home.run("test", "-e", "/etc/uci-defaults/80-netclient", check=False).returncode

    config = home.read("/etc/config/netclient")
    home.write("/etc/config/netclient", config + f"config network\n\toption token '{mesh.token()}'\n\toption name 'router'\n")
    procd.init("restart")
    procd.run()
    wait_for(lambda: home.run("ip", "link", "show", "nm-demo", check=False).returncode == 0, 30, "the router to join by UCI")

    def written() -> str:
        return "\n".join(line for line in home.read("/etc/config/netclient").splitlines() if not line.startswith("#"))

    wait_for(lambda: "option network 'demo'" in written(), 20, "the network in UCI")
    assert "token" not in written() and written().count("config network") == 1
    wait_for(lambda: hub.checkin() and not hub.host.ping("10.20.30.2", count=1).lost, 45, "the tunnel")

    mesh.admin("node", "egress", "demo", "router", "192.168.1.0/24")
    wait_for(lambda: hub.checkin() and not hub.host.ping(nas.ip, count=1).lost, 40, "the LAN behind it")
    rules = home.run("nft", "list", "ruleset").stdout
    assert "netclient_demo" not in home.run("sh", "-c", "grep \"'zone'\\|zone \" /etc/config/firewall || true").stdout
    home.run("fw4", "-q", "reload")
    assert home.run("nft", "list", "ruleset").stdout == rules and not hub.host.ping(nas.ip, count=2).lost

    procd.init("reload")
    mdns = procd.instances()["checkin"]["mdns"].split()
    assert mdns[:2] == ["netclient-lite", "udp"] and f"192.168.1.1:{mdns[2]}" in " ".join(mdns[3:])

    times = []  # netclient-look writes down when it begins
    for _ in range(4):
        before = home.read("/var/run/netclient/look")
        wait_for(lambda before=before: home.read("/var/run/netclient/look") != before, 20, "the next check-in")  # type: ignore[misc]
        times.append(time.monotonic())
    gaps = [late - early for early, late in zip(times, times[1:])]
    assert all(13 <= gap <= 17.5 for gap in gaps), gaps

    home.run("sh", "-c", "echo '# newer' >>/usr/lib/netclient-lite/netclient_lite.py; rm /etc/netclient/netclient_quick.pyc")
    home.run("sh", "/tmp/pk/postinst")  # an upgrade
    assert home.run("test", "-f", "/etc/netclient/netclient_quick.pyc", check=False).returncode == 0

    home.run("sh", "-c", "sed -i \"s/option enabled '1'/option enabled '0'/\" /etc/config/netclient")
    home.run("/usr/libexec/netclient-uci")
    assert home.run("ip", "link", "show", "nm-demo", check=False).returncode
    home.run("sh", "-c", "sed -i \"s/option enabled '0'/option enabled '1'/\" /etc/config/netclient")
    home.run("/usr/libexec/netclient-uci")
    assert home.run("ip", "link", "show", "nm-demo", check=False).returncode == 0


# -- LuCI

LUCI = FEED / "luci-app-netclient-lite"


def test_luci_asks_for_what_it_may_and_what_there_is() -> None:
    """The access list names the commands that the views run, each with verbs that the agent has."""
    from netclient_lite import COMMANDS

    acl = json.loads((LUCI / "root/usr/share/rpcd/acl.d/luci-app-netclient-lite.json").read_text())["luci-app-netclient-lite"]
    menu = json.loads((LUCI / "root/usr/share/luci/menu.d/luci-app-netclient-lite.json").read_text())
    views = {entry["action"]["path"] for entry in menu.values() if entry["action"]["type"] == "view"}
    folder = LUCI / "htdocs/luci-static/resources/view"
    assert {str(path.relative_to(folder))[:-3] for path in folder.rglob("*.js")} == views
    assert all(entry["depends"]["acl"] == ["luci-app-netclient-lite"] for entry in menu.values())
    allowed = {command for part in ("read", "write") for command in acl[part].get("file", {})}
    verbs = {command.split()[1] for command in allowed if command.startswith("/usr/bin/netclient-lite ")}
    assert verbs <= {command.name for command in COMMANDS}
    source = "".join(path.read_text() for path in folder.rglob("*.js"))
    run = {" ".join(re.findall(r"'([^']*)'", found)) for found in re.findall(r"agent\(\[(.*?)\]", source)}
    for words in run:
        assert any(("/usr/bin/netclient-lite " + words).startswith(command.rstrip("*").rstrip()) for command in allowed), words


@pytest.mark.skipif(not shutil.which("node"), reason="node is not here")
def test_luci_views_are_javascript() -> None:
    for path in LUCI.rglob("*.js"):  # LuCI runs them as the body of a function
        script = "(function() {" + path.read_text().replace("'require", "//'require") + "\n})"
        done = subprocess.run(["node", "--check", "-"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
