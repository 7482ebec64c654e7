# SPDX-License-Identifier: Apache-2.0
"""A machine of its own in QEMU, in a LAN of the lab: a kernel that has WireGuard, BusyBox, Python, `wg`, and the agent.

It runs a script as its first process, without a disk: all that it has comes with the initial RAM disk. Packages that it needs are
unpacked by shell/test.sh; without them `unfit_for_vm` says what is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from agentkit import REPO
from lab import Router

PARTS = Path(os.environ.get("NM_TEST_VENV") or sys.prefix).absolute() / "parts"
KERNEL = PARTS / "linux-image-cloud-amd64"
PYTHON = "/usr/bin/python3"
WANTED = ("virtio_pci", "virtio_net", "wireguard")
UNUSED = (
    "test",
    "idlelib",
    "tkinter",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "dist-packages",
    "site-packages",
    "__pycache__",
    "config-*",
)

INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root NETCLIENT_SET_CLOCK=no
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
ln -s /proc/self/fd/0 /dev/stdin
mount -t tmpfs tmpfs /var/run
mount -t tmpfs tmpfs /tmp
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
ip link set lo up
ip link set eth0 up
ip addr add {address} dev eth0
ip route add default via {gateway}
sh /script
echo "== end $?"
reboot -f
"""


def unfit_for_vm() -> str:
    """Why there can be no such machine here; "" where there can."""
    if platform.machine() != "x86_64":
        return "the kernel that is tried is one for x86_64"
    missing = [tool for tool in ("qemu-system-x86_64", "wg", "busybox", PYTHON) if not shutil.which(tool)]
    missing += [] if KERNEL.is_dir() else [KERNEL.name]
    return f"a machine in QEMU needs {', '.join(missing)}" if missing else ""


def load_order(wanted: Sequence[str]) -> Iterator[Path]:
    """The files of kernel modules, each after those that it depends on (its own `depends=`)."""
    files = {path.stem.replace("-", "_"): path for path in KERNEL.rglob("*.ko")}
    done: set[str] = set()

    def need(name: str) -> Iterator[Path]:
        if name in done or name not in files:  # built in
            return
        done.add(name)
        told = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for other in told.group(1).decode().split(",") if told else ():
            yield from need(other.replace("-", "_"))
        yield files[name]

    for name in wanted:
        yield from need(name)
    yield from (path for name, path in files.items() if name in ("libcurve25519", "curve25519_x86_64") and name not in done)


def libraries(program: str) -> set[str]:
    """The shared libraries of a program, by the dynamic linker's own word."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(/\S+\.so\S*)", said))


def make_ram_disk(folder: Path, files: Mapping[str, str], address: str, gateway: str) -> Path:
    """The initial RAM disk: `files` are texts by path; /script among them is what the machine does."""
    root = folder / "root"
    stdlib = Path(
        subprocess.run(
            [PYTHON, "-c", "import os; print(os.path.dirname(os.__file__))"], capture_output=True, text=True
        ).stdout.strip()
    )
    for name in ("bin", "modules", "proc", "sys", "dev", "tmp", "root", "etc", "var/run", f".{stdlib.parent}"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copytree(stdlib, root / f".{stdlib}", ignore=shutil.ignore_patterns(*UNUSED), symlinks=True)
    python = os.path.realpath(PYTHON)
    dynamic = {str(path) for path in (stdlib / "lib-dynload").glob("*.so")}
    for path in {
        python,
        shutil.which("wg") or "",
        *(each for program in (python, "/usr/bin/wg", *dynamic) for each in libraries(program)),
    }:
        target = root / f".{path}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / f".{PYTHON}").symlink_to(python)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for applet in subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        (root / "bin" / applet).symlink_to("busybox") if applet != "busybox" else None
    order = list(load_order(WANTED))
    for module in order:
        shutil.copy(module, root / "modules" / module.name)
    (root / "modules/order").write_text("\n".join(path.stem for path in order) + "\n")
    shutil.copy(REPO / "netclient_lite.py", root / "root/netclient_lite.py")
    for name, text in {"init": INIT.format(address=address, gateway=gateway), **files}.items():
        (root / name.lstrip("/")).write_text(text)
    (root / "init").chmod(0o755)
    disk = folder / "initrd"
    pack = 'find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 >"$1"'
    subprocess.run(["sh", "-c", pack, "sh", str(disk)], cwd=root, check=True)
    shutil.rmtree(root)
    return disk


def start_vm(router: Router, disk: Path, memory: int = 256) -> subprocess.Popen[str]:
    """Start it in a router's LAN; what it says is in the router's log."""
    router._ip("tuntap add dev vm mode tap", "link set vm master br-lan up")
    kernel = next((KERNEL / "boot").glob("vmlinuz-*"))
    return router.start(
        *("qemu-system-x86_64", "-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(memory), "-nodefaults"),
        *("-nographic", "-serial", "stdio", "-no-reboot", "-kernel", str(kernel), "-initrd", str(disk)),
        *("-netdev", "tap,id=lan,ifname=vm,script=no,downscript=no", "-device", "virtio-net-pci,netdev=lan,romfile="),
        *("-append", "console=ttyS0 quiet panic=1 rdinit=/init mitigations=off"),
    )
