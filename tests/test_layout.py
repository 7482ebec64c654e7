# SPDX-License-Identifier: Apache-2.0
"""The shape of the four files: sections in the order of the contents, each on what stands above it, effects where they belong.

What a section may do stands in the table RULES, one row for each file.
"""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import symtable
import sys
from typing import Iterator, Mapping, NamedTuple, Sequence

import pytest
from agentkit import REPO

import netmaker_core

EVERYWHERE = ("*",)


class Rules(NamedTuple):
    """What one file may do, and where: names to the sections in which they may stand."""

    limit: int  # bytes
    names: Mapping[str, Sequence[str]]  # modules and functions by which effects come about
    writes: Mapping[str, Sequence[str]]  # sections that open files for writing, with the functions that do it
    changes: Sequence[str]  # sections that make, rename or remove files
    pure: Sequence[str]  # sections that touch nothing at all
    imports: Sequence[str]  # modules of the standard library
    optional: Mapping[str, Sequence[str]]  # others, with the sections in which they are imported


# Of EMBEDDED.md §2: what OpenWrt's python3-light holds, and ssl of python3-openssl.
LIGHT = (
    *("argparse", "binascii", "contextlib", "enum", "errno", "fcntl", "hashlib", "importlib.util", "ipaddress", "json", "os"),
    *(
        "posix",
        "py_compile",
        "re",
        "select",
        "signal",
        "site",
        "socket",
        "ssl",
        "subprocess",
        "sys",
        "syslog",
        "threading",
        "time",
        "typing",
    ),
    *("_blake2", "_socket", "__future__"),
)
# What python3-light lacks: each is a package of its own there, and some megabytes of flash.
NOT_LIGHT = (
    *("urllib", "http", "email", "logging", "uuid", "asyncio", "concurrent", "decimal", "ctypes", "sqlite3", "unittest", "xml"),
    *("multiprocessing", "unicodedata", "lzma", "distutils", "pydoc", "dbm", "cgi", "readline", "curses", "venv", "pathlib"),
)

SERVER_IMPORTS = (
    *LIGHT,
    *(
        "ast",
        "base64",
        "bisect",
        "builtins",
        "collections",
        "functools",
        "gc",
        "heapq",
        "io",
        "itertools",
        "keyword",
        "logging",
        "random",
        "resource",
        "secrets",
    ),
    *(
        "shutil",
        "socketserver",
        "sqlite3",
        "string",
        "tokenize",
        "types",
        "urllib.parse",
        "wsgiref.simple_server",
        "netclient_lite",
    ),
)
RULES = {
    "netclient_lite.py": Rules(
        limit=280 * 1024,  # what machines get has a limit of its own, below
        names={
            "subprocess": ("IMPORTS", "RUN"),
            "print": ("RUN", "FILES", "COMMANDS", "CLI"),
            "signal": ("IMPORTS", "NAMES", "SERVICE", "COMMANDS"),
            "threading": ("IMPORTS", "COMMANDS"),
            "argparse": ("IMPORTS", "COMMANDS", "CLI"),
            "_socket": ("WIRE", "SYSTEM", "DISCOVER", "API"),
            "site": ("WIRE",),
            "syslog": ("CLI",),
            "os.environ": ("WIRE", "RUN", "SYSTEM", "CLI"),
            "os._exit": ("WIRE",),
            "os.kill": ("NAMES", "SERVICE"),
            "os.geteuid": ("COMMANDS",),
            "input": (),
        },
        writes={"WIRE": ("write_volatile", "lock"), "FILES": EVERYWHERE},
        changes=("WIRE", "FILES"),
        pure=("ERRORS", "TOKENS", "SETTINGS", "VALUES", "PARSE", "PLAN"),
        imports=LIGHT,
        optional={"nacl": ("TOKENS",), "requests": ("API",)},
    ),
    "netmaker_core.py": Rules(
        limit=200 * 1024,
        names={
            "subprocess": (),
            "print": (),
            "bottle": (),
            "peewee": ("IMPORTS", "MODELS", "STORE"),
            "sqlite3": ("IMPORTS", "STORE", "ACTIONS"),
            "nacl": ("IMPORTS", "TOKENS"),
            "argparse": (),
            "fcntl": ("IMPORTS", "STORE"),
            "signal": (),
            "threading": ("IMPORTS", "TOKENS", "STORE", "MEMBERS"),
            "os.environ": (),
            "os._exit": (),
            "os.kill": (),
            "input": (),
        },
        writes={"TOKENS": EVERYWHERE, "STORE": EVERYWHERE, "ACTIONS": EVERYWHERE},
        changes=("TOKENS", "STORE", "ACTIONS"),
        pure=("ERRORS", "ADDRESSES", "MESH", "RENDER"),
        imports=SERVER_IMPORTS,
        optional={"peewee": ("IMPORTS",), "nacl": ("IMPORTS",), "segno": ("RENDER",), "psycopg": ("STORE",)},
    ),
    "netmaker_lite.py": Rules(
        limit=200 * 1024,
        names={
            "subprocess": (),
            "print": (),
            "bottle": ("IMPORTS", "ROUTES", "OPENAPI", "SERVE"),
            "peewee": ("IMPORTS", "VIEWS"),  # views go by the kinds of the fields
            "sqlite3": (),
            "nacl": ("IMPORTS", "AGENTS"),
            "gevent": ("IMPORTS", "SERVE"),
            "waitress": ("SERVE",),
            "argparse": (),
            "fcntl": ("IMPORTS", "SERVE"),
            "signal": ("IMPORTS", "SERVE"),
            "threading": ("IMPORTS", "AGENTS", "SERVE"),
            "os.environ": ("IMPORTS", "SERVE", "CLI"),
            "os._exit": (),
            "os.kill": (),
            "input": (),
        },
        writes={"SERVE": EVERYWHERE},
        changes=("SERVE",),
        pure=(),
        imports=(*SERVER_IMPORTS, "netmaker_core", "netmaker_admin"),
        optional={
            "bottle": ("IMPORTS",),
            "peewee": ("IMPORTS",),
            "nacl": ("IMPORTS",),
            "gevent": ("IMPORTS", "SERVE"),
            "waitress": ("SERVE",),
            "prometheus_client": ("ROUTES",),
        },
    ),
    "netmaker_admin.py": Rules(
        limit=60 * 1024,
        names={
            "subprocess": (),
            "print": (),
            "signal": (),
            "threading": (),
            "argparse": ("IMPORTS", "COMMANDS", "WORDS"),
            "getpass": ("IMPORTS", "CLI"),
            "os.environ": ("CLI",),
            "os._exit": (),
            "os.kill": (),
            "input": (),
        },
        writes={},
        changes=(),
        pure=("CALLS", "COMPLETION"),
        imports=(
            *("argparse", "getpass", "io", "ipaddress", "json", "os", "re", "stat", "sys", "textwrap", "time", "typing"),
            *("urllib.parse", "__future__"),
        ),
        optional={"requests": ("HTTP",), "segno": ("PRINTING",)},
    ),
}
# Names that stand for the world outside; a pure section has none of them.
WORLD = (
    "os",
    "_os",
    "_socket",
    "socket",
    "time",
    "subprocess",
    "threading",
    "signal",
    "random",
    "open",
    "print",
    "bottle",
    "peewee",
)
WORLD_ALLOWED = {("netclient_lite.py", "TOKENS"): ("os", "_os"), ("netclient_lite.py", "SETTINGS"): ("os",)}  # chance; listdir

# Never, in any of them: shells, and whatever starts a process beside subprocess.
NEVER = (
    *("system", "popen", "popen2", "fork", "forkpty", "startfile", "posix_spawn", "posix_spawnp", "getoutput", "getstatusoutput"),
    *("spawnl", "spawnle", "spawnlp", "spawnlpe", "spawnv", "spawnve", "spawnvp", "spawnvpe"),
    *("execl", "execle", "execlp", "execlpe", "execve", "execvp", "execvpe"),
)
OS = ("os", "_os", "posix", "shutil", "subprocess", "pty")
# os functions that change the file system.
CHANGING = (
    *("rename", "replace", "unlink", "remove", "rmdir", "removedirs", "mkdir", "makedirs", "link", "symlink", "chmod", "chown"),
    *("truncate", "ftruncate", "utime", "mkfifo", "mknod", "lchown"),
)
WRITING_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC"}


class File:
    """One of the files: its text, its tree, its sections."""

    def __init__(self, name: str) -> None:
        self.name, self.rules = name, RULES[name]
        self.source = (REPO / name).read_text("utf-8")
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)
        self.banners = [
            (number, match.group(1))
            for number, line in enumerate(self.lines, 1)
            for match in [re.fullmatch(r"# ([A-Z][A-Z ]*[A-Z])", line)]
            if match and self._is_rule(number - 1) and self._is_rule(number + 1)
        ]
        self.order = [section for _, section in self.banners]
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]

    def _is_rule(self, number: int) -> bool:
        return bool(re.fullmatch(r"# -{20,}", self.lines[number - 1]))

    def section(self, line: int) -> str:
        """The section that a line stands in; "" above the first."""
        above = [section for number, section in self.banners if number - 1 <= line]
        return above[-1] if above else ""

    def rank(self, line: int) -> int:
        section = self.section(line)
        return self.order.index(section) if section else -1

    def function(self, line: int) -> str:
        """The innermost function around a line."""
        around = [node for node in self.functions if node.lineno <= line <= (node.end_lineno or 0)]
        return max(around, key=lambda node: node.lineno).name if around else ""

    def nodes(self, *kinds: type) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def definitions(self) -> dict[str, int]:
        """Every module-level name and the line that first makes it."""
        found: dict[str, int] = {}
        for node in statements(self.tree.body):
            for name in names_made(node):
                found.setdefault(name, node.lineno)
        return found


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of the module itself, also those in its branches; not those of classes and functions."""
    for node in body:
        yield node
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            for part in ("body", "orelse", "finalbody", "handlers"):
                for inner in getattr(node, part, ()):
                    yield from statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def names_made(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [part.id for target in targets if target is not None for part in ast.walk(target) if isinstance(part, ast.Name)]


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that is executed when the module is imported: all but what is inside functions."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            for part in (*getattr(child, "decorator_list", ()), *child.args.defaults, *filter(None, child.args.kw_defaults)):
                yield part
                yield from at_import(part)
        elif not isinstance(child, ast.arg):
            yield from at_import(child)


def inner_tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from inner_tables(child)


@pytest.fixture(params=sorted(RULES), scope="module")
def file(request):
    return File(request.param)


def test_the_contents_are_the_banners_in_their_order(file):
    contents = ast.get_docstring(file.tree).split("\nContents", 1)[1]
    assert re.findall(r"^ +([A-Z][A-Z ]*[A-Z])  +\S", contents, re.M) == file.order
    assert len(file.order) == len(set(file.order))


def test_the_file_is_small_enough_to_be_one_file(file):
    size, limit = (REPO / file.name).stat().st_size, file.rules.limit
    assert size <= limit


def test_what_machines_get_fits_on_a_router():
    """A source without what only people read; the budget is for what lies on the flash."""
    assert len(netmaker_core.slim((REPO / "netclient_lite.py").read_text("utf-8")).encode()) <= 150 * 1024


def as_plain(node: ast.stmt) -> ast.stmt:
    """`a: int = 1` as `a = 1`."""
    if isinstance(node, ast.AnnAssign) and node.value:
        return ast.copy_location(ast.Assign([node.target], node.value, type_comment=None), node)
    return node


def is_only_read(node: ast.stmt) -> bool:
    """A lone string, or `if TYPE_CHECKING:`."""
    return (
        isinstance(getattr(node, "value", None), ast.Constant)
        if isinstance(node, ast.Expr)
        else (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    )


def without_what_is_only_read(source: str) -> str:
    tree = ast.parse(source)
    fields = {each for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for each in node.body}
    for node in ast.walk(tree):
        for part in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, part, None), list):
                setattr(node, part, [as_plain(each) if each not in fields else each for each in getattr(node, part)])
        if node in fields and isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        for part in ("body", "orelse", "finalbody"):
            body = getattr(node, part, None)
            if isinstance(body, list):
                body[:] = [each for each in body if not is_only_read(each)]
    number_locals(tree)
    return ast.dump(tree)


def number_locals(tree: ast.Module) -> None:
    """Give what is bound within a function, and is neither a parameter nor bound outside, the number of its first appearance.

    Two programs that differ in such names alone, one name for one everywhere in a function, are the same then.
    """
    outer = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    known = {each.id for node in outer for each in ast.walk(node) if isinstance(each, ast.Name)} | {*dir(builtins)}
    known |= {each for node in tree.body for each in [getattr(node, "name", "")]}
    methods = [each for node in tree.body if isinstance(node, ast.ClassDef) for each in node.body]
    for function in [node for node in (*tree.body, *methods) if isinstance(node, ast.FunctionDef)]:
        parameters = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        bound = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
        numbers: dict[str, str] = {}
        for node in ast.walk(function):
            for part in ("id", "name"):
                name = getattr(node, part, None)
                if isinstance(node, (ast.Name, ast.ExceptHandler)) and name in bound - parameters - known:
                    setattr(node, part, numbers.setdefault(name, f"local{len(numbers)}"))
            if isinstance(node, ast.Nonlocal):
                node.names = [numbers.get(name, name) for name in node.names]


TRICKY = '''#!/usr/bin/env python3
# the licence
"""What it is."""

import os  # why


class Empty(Exception):
    """Nothing but this."""


class Kept:
    field: int = 1  # its annotation is the field's


def g(first, *, second=2):
    third = first + second
    def inner(fourth):
        nonlocal third
        third += fourth
        return [fifth for fifth in range(third) if fifth.third]
    try:
        return inner(fourth=third), f"{first}"
    except ValueError as sixth:
        seventh = sixth; print(os, TOP, seventh); return f"{seventh!r}"


TOP = [third for third in ()]


def f(a: "1", b: "Callable[[int], str]"=(1,
            2), *c: "…", d:int = 3) -> "dict[str, str]":
    # a comment
    known: "dict[str, int]" = {}
    text = """kept:
        # no comment

    """ + "# nor this"
    """no docstring, and no effect"""
    if a: "alone"
    return {  # here too
        "a": text,

        "b": """x""",
    }
'''


@pytest.mark.parametrize("source", [TRICKY, *((REPO / name).read_text("utf-8") for name in sorted(RULES))])
def test_a_slim_program_is_the_same_program(source):
    made = netmaker_core.slim(source)
    assert without_what_is_only_read(made) == without_what_is_only_read(source)
    head = [line for line in source.splitlines()[:2] if line.startswith("#")]  # interpreter and licence
    assert made.splitlines()[: len(head)] == head
    assert len(made) < len(source) and netmaker_core.slim(made) == made  # what was copied from a machine is served too


def test_what_is_used_at_import_stands_above(file):
    made = file.definitions()
    for node in at_import(file.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            assert made.get(node.id, 0) <= node.lineno, f"{node.id} in line {node.lineno}"


def test_functions_use_only_what_is_in_their_own_section_or_above(file):
    made, wrong = file.definitions(), []
    for table in inner_tables(symtable.symtable(file.source, file.name, "exec")):
        for symbol in table.get_symbols():
            name = symbol.get_name()
            if (
                symbol.is_referenced()
                and symbol.is_global()
                and name in made
                and file.rank(made[name]) > file.rank(table.get_lineno())
            ):
                wrong.append(
                    f"{table.get_name()} of {file.section(table.get_lineno())} uses {name} of {file.section(made[name])}"
                )
    assert wrong == []


def test_effects_stand_in_their_sections(file):
    wrong = []
    for node in file.nodes(ast.Name, ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else "os." + node.attr if of_os(node) else ""
        allowed = file.rules.names.get(name)
        if allowed is not None and file.section(node.lineno) not in allowed and not is_exception_of(file, node):
            wrong.append(f"{name} in {file.section(node.lineno)}, line {node.lineno}")
    assert wrong == []


def of_os(node: ast.AST) -> bool:
    """`os.something`, under any of the names that os goes by."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OS


def is_exception_of(file: File, name: ast.AST) -> bool:
    """`peewee.IntegrityError`: whoever calls may have to tell failures apart."""
    for node in file.nodes(ast.Attribute):
        if node.value is name:
            return node.attr.endswith(("Error", "Exception"))
    return False


def test_pure_sections_touch_nothing(file):
    wrong = []
    for node in file.nodes(ast.Name):
        section = file.section(node.lineno)
        if section in file.rules.pure and node.id in WORLD and node.id not in WORLD_ALLOWED.get((file.name, section), ()):
            wrong.append(f"{node.id} in {section}, line {node.lineno}")
    assert wrong == []


def opens_for_writing(node: ast.Call) -> bool:
    words = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
    flags = {part.attr for word in words for part in ast.walk(word) if isinstance(part, ast.Attribute)}
    modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return bool(flags & WRITING_FLAGS) or any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)


def test_files_are_written_in_their_places(file):
    wrong = []
    for node in file.nodes(ast.Call):
        called = node.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if name != "open" or not opens_for_writing(node) or "devnull" in ast.dump(node.args[0]):
            continue
        functions = file.rules.writes.get(file.section(node.lineno), ())
        if functions != EVERYWHERE and file.function(node.lineno) not in functions:
            wrong.append(f"line {node.lineno} in {file.section(node.lineno)}")
    assert wrong == []


def test_the_file_system_is_changed_in_its_places(file):
    changing = [node for node in file.nodes(ast.Attribute) if of_os(node) and node.attr in CHANGING]
    elsewhere = [node for node in changing if file.section(node.lineno) not in file.rules.changes]
    assert [f"{node.attr} in line {node.lineno}" for node in elsewhere] == []


def test_no_shell_and_no_other_way_to_start_a_process(file):
    for node in file.nodes(ast.Call):
        for keyword in node.keywords:
            assert keyword.arg != "shell", f"line {node.lineno}"
    for node in file.nodes(ast.Attribute):
        assert not (of_os(node) and node.attr in NEVER), f"{node.attr} in line {node.lineno}"
    for node in file.nodes(ast.Name):
        assert node.id not in ("eval", "exec", "compile"), f"{node.id} in line {node.lineno}"


def test_imports_are_those_that_may_be(file):
    wrong = []
    for node in file.nodes(ast.Import, ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for module in modules:
            top, section = module.split(".")[0], file.section(node.lineno)
            if top in file.rules.optional:
                if section not in file.rules.optional[top]:
                    wrong.append(f"{module} in {section}, line {node.lineno}")
            elif module not in file.rules.imports and top not in file.rules.imports:
                wrong.append(f"{module}, line {node.lineno}")
    assert wrong == []


def test_the_agent_imports_what_may_be_missing_inside_functions_alone():
    agent = File("netclient_lite.py")
    for node in at_import(agent.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {module.split(".")[0] for module in modules} & set(agent.rules.optional), f"line {node.lineno}"
    assert not re.search(r"^\s*(import|from) (bottle|peewee|netmaker_\w+)\b", agent.source, re.M)


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, %r)
"""


def run_without(missing: Sequence[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of code where these modules are not installed."""
    whole = WITHOUT % (missing, str(REPO)) + code
    return subprocess.run([sys.executable, "-I", "-S", "-c", whole], capture_output=True, text=True, timeout=30, check=False)


def test_the_command_line_stands_alone():
    """On a laptop there is neither the server's files nor what those need, nor need there be requests or segno."""
    missing = ("netmaker_lite", "netclient_lite", "bottle", "peewee", "nacl", "requests", "segno")
    done = run_without(missing, 'import netmaker_admin\nsys.exit(netmaker_admin.main(["version"]))')
    assert (done.returncode, done.stderr) == (0, "")


OURS = ("netmaker_lite", "netmaker_core", "netmaker_admin")


def test_the_server_takes_from_the_agent_and_never_the_other_way_round():
    assert not {alias.name for node in File("netclient_lite.py").nodes(ast.Import) for alias in node.names} & set(OURS)
    for name in ("netmaker_lite.py", "netmaker_core.py"):
        shared = [node for node in File(name).nodes(ast.ImportFrom) if node.module == "netclient_lite"]
        assert len(shared) <= 1
    below = {alias.name for node in File("netmaker_core.py").nodes(ast.Import) for alias in node.names}
    assert not below & {"netmaker_lite", "netmaker_admin"}


BARE = """
import netclient_lite, ssl, py_compile, importlib.util, syslog
netclient_lite.build_parser().format_help()
assert netclient_lite.main(["version"]) == 0
print(sorted(name for name in sys.modules if name.split(".")[0] in %r))
"""


def test_the_agent_runs_on_openwrts_python3_light():
    missing = (*NOT_LIGHT, "requests", "nacl", "zeroconf", "bottle", "peewee")
    done = run_without(missing, BARE % (missing,))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
