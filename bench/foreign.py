# SPDX-License-Identifier: Apache-2.0
"""What a check-in costs a router: instructions on 32-bit MIPS and ARM (QEMU's user mode), memory on 32-bit x86 (native).

    python bench/foreign.py [FOLDER]

Debian's own roots of these processors are unpacked into FOLDER (default: a temporary one; some 600 MB), with QEMU and mmdebstrap
beside them; nothing is installed. It needs apt-get, dpkg, perl, cc and a system Python that is the roots' (Debian 12: 3.11).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator

from checkin import LOCAL, Counting, Standing, installed
from kit import NORMAL, Command, Figure, Starter, report, shown
from serverkit import Server

PYTHON = "/usr/bin/python3"
SUITE, WANTED = "bookworm", "python3-minimal,libpython3.11-stdlib,libssl3"
PROCESSORS = {"mipsel": "qemu-mipsel", "armhf": "qemu-arm"}
NATIVE = "i386"

# QEMU counts by a plugin: its interface is declared here by hand, for Debian packages no header of it.
PLUGIN = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct qemu_plugin_tb;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*called)(uint64_t, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int what, void *where, uint64_t by);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*called)(uint64_t, void *), void *);
int qemu_plugin_version = 1;
static uint64_t count;
static const char *out;
static void translated(uint64_t id, struct qemu_plugin_tb *block) {
	qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &count, qemu_plugin_tb_n_insns(block));
}
static void ended(uint64_t id, void *unused) {
	FILE *file = fopen(out, "w");
	if (file) { fprintf(file, "%llu", (unsigned long long)count); fclose(file); }
}
int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
	out = strdup(strchr(argv[0], '=') + 1);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, NULL);
	return 0;
}
"""


def do(*argv: object, cwd: Path) -> None:
    done = subprocess.run([str(word) for word in argv], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"foreign.py: {argv[0]} failed: {done.stderr[-600:]}")


def mirror() -> str:
    """Where this machine's packages come from."""
    for path in (*Path("/etc/apt").glob("sources.list.d/*"), Path("/etc/apt/sources.list")):
        for word in path.read_text().split() if path.is_file() else ():
            if word.startswith(("http", "mirror+", "file:")) and "security" not in word:
                return word
    raise SystemExit("foreign.py: no package source in /etc/apt")


def prepare(folder: Path) -> None:
    """Unpack what is not there yet."""
    for package, name in (("qemu-user", "qemu"), ("mmdebstrap", "mmdebstrap")):
        if not (folder / name).exists():
            do("apt-get", "-q", "download", package, cwd=folder)
            do("dpkg", "-x", next(folder.glob(package + "_*.deb")), name, cwd=folder)
    for processor in (*PROCESSORS, NATIVE):
        if not (folder / processor).exists():
            options = (
                "--variant=extract",
                f"--arch={processor}",
                "--skip=check/qemu,check/chrooting,cleanup/apt",
                f"--include={WANTED}",
            )
            source = f"deb [trusted=yes] {mirror()} {SUITE} main"
            do("perl", "mmdebstrap/usr/bin/mmdebstrap", *options, SUITE, processor, source, cwd=folder)
            # Debian does that when it installs; bytecode is the same on all processors
            do(PYTHON, "-m", "compileall", "-q", f"{processor}/usr/lib/python3.11", cwd=folder)
    (folder / "count.c").write_text(PLUGIN)
    do("cc", "-O2", "-shared", "-fPIC", "-o", "count.so", "count.c", cwd=folder)


def counted(folder: Path, processor: str, command: Command) -> float:
    """Millions of instructions of a Python of this processor."""
    root, out = folder / processor, folder / "count"
    qemu = (str(folder / "qemu/usr/bin" / PROCESSORS[processor]), "-plugin", f"{folder}/count.so,out={out}", "-L", str(root))
    argv = (*qemu, str(root / "usr/bin/python3.11"), *command.argv[1:])
    environment = {**NORMAL, "NETCLIENT_ROOT": command.root, "PYTHONHASHSEED": "0"}
    subprocess.run(argv, env=environment, check=True, capture_output=True)
    return int(out.read_text()) / 1e6


def native(folder: Path, command: Command) -> Command:
    """The same by the 32-bit Python of this processor's family."""
    root = folder / NATIVE
    libraries = f"{root}/lib/i386-linux-gnu:{root}/usr/lib/i386-linux-gnu"
    return Command(
        (str(root / "lib/ld-linux.so.2"), "--library-path", libraries, str(root / "usr/bin/python3.11"), *command.argv[1:]),
        command.root,
    )


def figures(folder: Path, node: Standing, quick: str) -> Iterator[Figure]:
    floor, check = Command((PYTHON, "-I", "-S", "-c", "pass")), node.check_in(PYTHON, quick)
    whole = Command((PYTHON, "-I", "-S", quick.replace("netclient_quick", "netclient_lite"), "version"))
    for processor in PROCESSORS:
        least = counted(folder, processor, floor)
        node.refresh()
        cost = counted(folder, processor, check)
        if not node.has_checked_in(1):
            raise RuntimeError("a check-in was not the quick one")
        yield Figure(f"{processor}: `-c pass`", least, None, "M")
        yield Figure(f"{processor}: a check-in without news", cost, None, "M")
        yield Figure(f"{processor}: the same, x of `-c pass`", cost / least, 1.1, "x")
        yield Figure(f"{processor}: the whole agent loaded (`version`)", counted(folder, processor, whole), None, "M")
    node.refresh()
    with Starter() as starter:
        least_mb, check_mb, whole_mb = (starter.run(native(folder, each)).rss for each in (floor, check, whole))
    yield Figure(f"{NATIVE}: memory of `-c pass`", least_mb, None, "MB")
    yield Figure(f"{NATIVE}: memory of a check-in without news", check_mb, 9, "MB")
    yield Figure(f"{NATIVE}: memory of the whole agent loaded", whole_mb, 32, "MB")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else name).absolute()
        folder.mkdir(exist_ok=True)
        prepare(folder)
        home = Server(name + "/data")
        try:
            home.network()
            way = Counting(home.port)
            node = Standing(home, Path(name) / "node", f"http://{LOCAL}:{way.port}", home.key())
            found = list(figures(folder, node, installed(PYTHON, Path(name))))
        finally:
            home.stop()
        report("A check-in on other processors", found)
        cost = {figure.what.split(":")[0]: figure.measured for figure in found if figure.what.endswith("without news")}
        mips = cost["mipsel"] / (580 * 0.6 * 15) * 100
        print(f"\nevery 15 s on a router of 580 MHz, at 0.6 instructions a cycle (an estimate): {shown(mips, '%')} of its time")


if __name__ == "__main__":
    main()
