#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make installable OpenWrt packages of the agent without the SDK: an .ipk (opkg) and an .apk.

    python3 openwrt/mkipk.py [FOLDER]

The same files as the feed's package, but the agent as source, which any Python >= 3.8 takes; its bytecode is made on the
router. What is built twice is the same, byte for byte. The .apk is of version 2 of that format and not signed: `apk add
--allow-untrusted`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FILES = HERE / "netclient-lite/files"
LIBRARY = "/usr/lib/netclient-lite/netclient_lite.py"

# What opkg's default_postinst does for packages of the build system.
DEFAULT = """if [ -f /etc/uci-defaults/80-netclient ]; then
	(. /etc/uci-defaults/80-netclient) && rm -f /etc/uci-defaults/80-netclient
fi
/etc/init.d/netclient enable
/etc/init.d/netclient restart
exit 0
"""
PRERM = """#!/bin/sh
[ -z "$IPKG_INSTROOT" ] || exit 0
/etc/init.d/netclient stop
/etc/init.d/netclient disable
exit 0
"""
KEEP = "/etc/config/netclient\n/etc/netclient/\n"


class Item(NamedTuple):
    path: str
    mode: int
    data: bytes = b""
    link: str = ""


def field(name: str) -> str:
    """A value of the feed's Makefile: one source for version and dependencies."""
    found = re.search(rf"^\s*{name}:?=(.*)$", (HERE / "netclient-lite/Makefile").read_text(), re.M)
    if not found:
        raise SystemExit(f"mkipk.py: the Makefile has no {name}")
    return found.group(1).strip()


def postinst() -> bytes:
    """The feed's, and what its build system adds."""
    found = re.search(r"define Package/netclient-lite/postinst\n(.*?)endef", (HERE / "netclient-lite/Makefile").read_text(), re.S)
    if not found:
        raise SystemExit("mkipk.py: the Makefile has no postinst")
    return (found.group(1).replace("$$", "$") + DEFAULT).encode()


def contents() -> list[Item]:
    """The files of the package, sorted."""
    sys.path.insert(0, str(ROOT))
    try:
        from netmaker_core import slim
    except ImportError:  # without the server's packages: as it is
        slim = str
    agent = slim((ROOT / "netclient_lite.py").read_text("utf-8"))
    installed = {"netclient.config": ("/etc/config/netclient", 0o600), "netclient.init": ("/etc/init.d/netclient", 0o755)}
    installed["netclient.defaults"] = ("/etc/uci-defaults/80-netclient", 0o644)
    installed["netclient.iface"] = ("/etc/hotplug.d/iface/95-netclient", 0o644)
    installed["netclient.ntp"] = ("/etc/hotplug.d/ntp/95-netclient", 0o644)
    installed["netclient-uci"] = ("/usr/libexec/netclient-uci", 0o755)
    items = [Item(path, mode, (FILES / name).read_bytes()) for name, (path, mode) in installed.items()]
    items.append(Item(LIBRARY, 0o644, agent.encode()))
    items.append(Item("/usr/bin/netclient-lite", 0o755, (FILES / "netclient-lite").read_bytes()))
    items.append(Item("/usr/bin/netclient_lite.py", 0o777, b"", "netclient-lite"))
    items.append(Item("/usr/bin/netclient-look", 0o755, (ROOT / "shell/netclient-look").read_bytes()))
    items.append(Item("/lib/upgrade/keep.d/netclient-lite", 0o644, KEEP.encode()))
    return sorted(items)


def archive(items: Iterable[Item], dot: str = "./", sums: bool = False, ended: bool = True) -> bytes:
    """A tar of these files and the folders above them: no times, no owners but root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if sums else tarfile.GNU_FORMAT) as tar:
        made: set[str] = set()
        for item in items:
            path = item.path.lstrip("/")
            for folder in reversed([str(each) for each in Path(path).parents if str(each) != "."]):
                if folder not in made:
                    made.add(folder)
                    entry = tarfile.TarInfo(dot + folder)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
            entry = tarfile.TarInfo(dot + path)
            entry.mode, entry.size, entry.uname, entry.gname = item.mode, len(item.data), "root", "root"
            if item.link:
                entry.type, entry.linkname = tarfile.SYMTYPE, item.link
            if sums:
                entry.pax_headers = {"APK-TOOLS.checksum.SHA1": hashlib.sha1(item.data or item.link.encode()).hexdigest()}  # noqa: S324
            tar.addfile(entry, io.BytesIO(item.data))
        length = tar.offset
    return out.getvalue() if ended else out.getvalue()[:length]


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def depends() -> list[str]:
    return [word.lstrip("+") for word in field("DEPENDS").split()]


def ipk(items: list[Item]) -> bytes:
    """opkg's: a compressed tar of three files."""
    size = sum(len(item.data) for item in items)
    lines = {
        **{"Package": field("PKG_NAME"), "Version": field("PKG_VERSION") + "-" + field("PKG_RELEASE")},
        **{"Depends": ", ".join(depends()), "Section": field("SECTION"), "Architecture": field("PKGARCH")},
        **{"Maintainer": field("PKG_MAINTAINER"), "License": field("PKG_LICENSE"), "Installed-Size": str(size)},
        "Description": field("TITLE"),
    }
    control = "".join(f"{name}: {value}\n" for name, value in lines.items())
    parts = [Item("control", 0o644, control.encode()), Item("conffiles", 0o644, b"/etc/config/netclient\n")]
    parts += [Item("postinst", 0o755, postinst()), Item("prerm", 0o755, PRERM.encode())]
    outer = [Item("debian-binary", 0o644, b"2.0\n"), Item("control.tar.gz", 0o644, packed(archive(parts)))]
    return packed(archive([*outer, Item("data.tar.gz", 0o644, packed(archive(items)))]))


def apk(items: list[Item]) -> bytes:
    """apk's: two compressed tars one after the other, the first without its end."""
    data = packed(archive(items, dot="", sums=True))
    said = [("pkgname", field("PKG_NAME")), ("pkgver", field("PKG_VERSION") + "-r" + field("PKG_RELEASE"))]
    said += [("pkgdesc", field("TITLE")), ("arch", "noarch"), ("license", field("PKG_LICENSE"))]
    said += [("size", str(sum(len(item.data) for item in items))), *(("depend", name) for name in depends())]
    said.append(("datahash", hashlib.sha256(data).hexdigest()))
    info = "".join(f"{name} = {value}\n" for name, value in said)
    scripts = [Item(".post-install", 0o755, postinst()), Item(".post-upgrade", 0o755, postinst())]
    parts = [Item(".PKGINFO", 0o644, info.encode()), *scripts, Item(".pre-deinstall", 0o755, PRERM.encode())]
    return packed(archive(parts, dot="", ended=False)) + data


def packages() -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of each."""
    items, name, version = contents(), field("PKG_NAME"), field("PKG_VERSION")
    yield f"{name}_{version}-{field('PKG_RELEASE')}_{field('PKGARCH')}.ipk", ipk(items)
    yield f"{name}-{version}-r{field('PKG_RELEASE')}.apk", apk(items)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in packages():
        (folder / name).write_bytes(data)
        print(f"{folder / name}  {len(data)} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
