# SPDX-License-Identifier: Apache-2.0
"""What the measuring programs share: runs of a command, medians, instruction counts, the table. Alone it describes the machine.

python bench/kit.py
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple, Sequence

CODE = Path(__file__).resolve().parent.parent
for folder in (CODE, CODE / "tests"):
    sys.path.insert(0, str(folder))  # the programs under measurement, and the tests' helpers

AGENT, SERVER = CODE / "netclient_lite.py", CODE / "netmaker_lite.py"
# Without bytecode every import compiles, which is no machine's normal state.
NORMAL = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


# ---- the table


class Figure(NamedTuple):
    """One line of a table: what, how much, and how much it may be."""

    what: str
    measured: float
    budget: float | None = None
    unit: str = ""

    def cells(self) -> tuple[str, str, str, str]:
        if self.budget is None:
            return self.what, shown(self.measured, self.unit), "", ""
        verdict = "ok" if self.measured <= self.budget else "over"
        return self.what, shown(self.measured, self.unit), "<= " + shown(self.budget, self.unit), verdict


def shown(number: float, unit: str) -> str:
    """A whole number as it is, any other with as many places as can be believed."""
    places = 0 if number == int(number) or number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{places}f} {unit}".rstrip()


def report(title: str, figures: Sequence[Figure]) -> None:
    """Print a table; what is over its budget is for the reader to judge, never a failure."""
    rows = [("what", "measured", "budget", ""), *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print(f"\n{title}")
    for what, measured, budget, verdict in rows:
        line = f"  {what:{widths[0]}}  {measured:>{widths[1]}}  {budget:>{widths[2]}}  {verdict}"
        print(line.rstrip(), flush=True)


# ---- runs of a command


class Command(NamedTuple):
    """What to run, and the root of the tree that the agent uses."""

    argv: tuple[str, ...]
    root: str = ""


class Spent(NamedTuple):
    """What a process and those it waited for have used."""

    cpu: float  # ms, user and system
    rss: float  # MB at its highest


# The kernel charges a new process with the memory of the one that started it until then, so that has to be a small one.
STARTER = """
import posix, sys
null = [(posix.POSIX_SPAWN_OPEN, 1, "/dev/null", posix.O_WRONLY, 0)]
for line in sys.stdin:
    root, *argv = line[:-1].split("\\t")
    process = posix.posix_spawnp(argv[0], argv, {**posix.environ, "NETCLIENT_ROOT": root}, file_actions=null)
    _, status, used = posix.wait4(process, 0)
    print(status, used.ru_utime + used.ru_stime, used.ru_maxrss, flush=True)
"""


class Starter:
    """Starts commands from a small process and tells what they used."""

    def __init__(self) -> None:
        argv = (sys.executable, "-I", "-S", "-c", STARTER)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=NORMAL, encoding="utf-8")

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, command: Command) -> Spent:
        to, back = self._process.stdin, self._process.stdout
        assert to and back
        to.write("\t".join((command.root, *command.argv)) + "\n")
        to.flush()
        status, cpu, rss = back.readline().split()
        if int(status):
            raise RuntimeError(f"{' '.join(command.argv)} failed")
        return Spent(float(cpu) * 1e3, int(rss) / 1024)

    def compare(self, commands: Sequence[Command], rounds: int = 41, warm: int = 3) -> list[Spent]:
        """Medians of several commands, run in turn, so that whatever else the machine does hits all of them."""
        table = [[self.run(command) for command in commands] for _ in range(warm + rounds)][warm:]
        return [Spent(median(run.cpu for run in runs), median(run.rss for run in runs)) for runs in zip(*table)]


class Counted(NamedTuple):
    """A command under callgrind: user-mode instructions of all its processes, in millions, and how many processes they were."""

    instructions: float
    processes: int


def instructions(command: Command) -> Counted:
    """Count the instructions of a command, its children's among them: the same at every run, to a thousandth."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"--callgrind-out-file={folder}/%p"
        valgrind = ("valgrind", "--tool=callgrind", "--trace-children=yes", "--quiet", out)
        environment = {**NORMAL, "NETCLIENT_ROOT": command.root}
        subprocess.run([*valgrind, *command.argv], env=environment, check=True, stdout=subprocess.DEVNULL)
        files = list(Path(folder).iterdir())
        return Counted(sum(map(_total, files)) / 1e6, len(files))


def _total(file: Path) -> int:
    lines = file.read_text("utf-8", "replace").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("totals:"))


def has_valgrind() -> bool:
    return shutil.which("valgrind") is not None


# ---- work in this process


def cpu_times(jobs: Sequence[Callable[[], object]], rounds: int = 9, repeat: int = 200) -> list[float]:
    """CPU µs of one call of each job in this thread: medians over rounds in which all of them have their turn."""
    table = [[_cpu_time(job, repeat) for job in jobs] for _ in range(rounds + 1)][1:]
    return [median(times) for times in zip(*table)]


def _cpu_time(job: Callable[[], object], repeat: int) -> float:
    start = time.thread_time_ns()
    for _ in range(repeat):
        job()
    return (time.thread_time_ns() - start) / repeat / 1e3


def resident(process: int, highest: bool = False) -> float:
    """MB in memory of a process, now or at its highest."""
    name = "VmHWM:" if highest else "VmRSS:"
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def pythons() -> list[str]:
    """This interpreter and, where it is another one, the system's."""
    own, system = os.path.realpath(sys.executable), os.path.realpath("/usr/bin/python3")
    return [sys.executable] if own == system or not os.path.exists(system) else ["/usr/bin/python3", sys.executable]


def version_of(python: str) -> str:
    script = "import platform as p; print(p.python_version())"
    return subprocess.run((python, "-c", script), capture_output=True, text=True, check=True).stdout.strip()


# ---- the machine


def machine() -> list[str]:
    """What the figures depend on, in words."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    memory = int(_lines("/proc/meminfo")[0].split()[1]) / (1 << 20)
    system = next((line.split("=")[1].strip('"') for line in _lines("/etc/os-release") if line.startswith("PRETTY_NAME")), "")
    interpreters = ", ".join(sorted({version_of(python) for python in pythons()}))
    return [
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} CPUs ({cpu}), {memory:.0f} GiB, {system}, Linux {platform.release()}",
        f"CPython {interpreters}; SQLite {sqlite3.sqlite_version}; load {os.getloadavg()[0]:.1f}",
    ]


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


if __name__ == "__main__":
    print("\n".join(machine()))
