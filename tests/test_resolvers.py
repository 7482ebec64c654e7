# SPDX-License-Identifier: Apache-2.0
"""Names on a node: what stands in its hosts file, what its resolver is told, and that all of it goes again."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import netclient_lite as agent
from netclient_lite import BadAnswer, Files, Invalid, Names, Paths, Run, System, View, host_lines, with_names

RECORD = {"id": "1", "name": "nas", "key": "A" * 43 + "=", "ip": "10.20.30.2", "ip6": "fd00::2"}
LINE = "10.20.30.2 nas.demo"


def view(**values: Any) -> View:
    peers = {"1": RECORD, "2": {"id": "2", "name": "vps", "key": "B" * 43 + "=", "ip": "10.20.30.1"}}
    names = {"phone": ["10.20.30.9", "fd00::9"], "www.nas": ["10.20.30.2"]}
    return View({"state": "active", "me": {"dns": True}, "peers": peers, "names": names, **values})


def test_every_name_has_a_line_for_each_address():
    assert host_lines(view(), "demo") == [
        *("10.20.30.1 vps.demo", "10.20.30.2 nas.demo", "10.20.30.2 www.nas.demo", "10.20.30.9 phone.demo"),
        *("fd00::2 nas.demo", "fd00::9 phone.demo"),
    ]


@pytest.mark.parametrize("values", [{"me": {"dns": False}}, {"state": "disabled"}, {"state": "expired"}, {"state": "pending"}])
def test_who_wants_no_names_has_none(values):
    assert host_lines(view(**values), "demo") == []


NEWS = {"word": "1.00000001", "state": "active"}


@pytest.mark.parametrize(
    "names",
    [
        {"a b": ["10.0.0.1"]},
        {"a\n6.6.6.6 bank.example": ["10.0.0.1"]},
        {"a": ["10.0.0.1 b"]},
        {"": ["10.0.0.1"]},
        {"-a": []},
        {"a..b": []},
        [],
        {"a": 5},
    ],
)
def test_odd_names_are_refused(names):
    with pytest.raises(BadAnswer):
        agent.parse_news(View(), {**NEWS, "names": names})


def test_a_delta_without_names_leaves_them_and_a_snapshot_has_none():
    known = agent.parse_news(View(), {**NEWS, "names": {"Printer": ["192.168.7.20"]}})
    assert known.names == {"printer": ["192.168.7.20"]}
    assert agent.parse_news(known, {"word": "2.00000002", "from": known.word}).names == known.names
    assert agent.parse_news(known, {"word": "2.00000002"}).names == {}


labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
hosts_files = st.text(alphabet="10. \tabc#\n\r\x7fé", max_size=60)
lines = st.lists(st.builds("10.0.0.{} {}".format, st.integers(1, 9), labels), unique=True, max_size=4)


@given(hosts_files, lines, lines)
def test_what_is_added_goes_again_and_the_rest_is_never_touched(text, one, two):
    first = with_names(text, "demo", one)
    both = with_names(first, "other", two)
    assert with_names(with_names(both, "demo", []), "other", []) == text
    assert with_names(with_names(both, "other", []), "demo", []) == text
    assert both == with_names(with_names(text, "other", two), "demo", one)
    assert with_names(both, "demo", one) == both  # nothing to write when nothing differs
    assert [line[:-7] for line in both.splitlines() if line.endswith(" # demo")] == sorted(one)


OWNED = st.sampled_from(["# netclient begin (written by netclient-lite)", "# netclient end", "10.0.0.1 a.demo # demo"])
OTHERS = st.sampled_from(["127.0.0.1 localhost", "10.9.9.9 printer", "# a note"])


@given(st.lists(st.one_of(OWNED, OTHERS), max_size=9), lines)
def test_a_block_that_somebody_cut_costs_no_other_line(text, names):
    """The second time it is whole again."""
    wanted = [line for line in text if not line.startswith("# netclient") and not line.endswith("# demo")]
    after = with_names(with_names("\n".join(text) + "\n", "demo", names), "demo", names)
    assert with_names(after, "demo", names) == after
    assert set(wanted) <= set(after.splitlines()) and set(wanted) <= set(with_names(after, "demo", []).splitlines())


@given(st.dictionaries(labels, st.just(["10.0.0.1"]), max_size=4), st.sampled_from(("a", "b.a", "x-1")))
def test_a_network_names_nothing_outside_itself(names, network):
    after = agent.parse_news(View(), {**NEWS, "names": names})
    after.me = {"dns": True}
    assert all(line.endswith("." + network) for line in host_lines(after, network))


class Told(Run):
    """A machine whose programs answer as told; what would change it is noted."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers, self.changes = answers, []

    def __call__(self, *argv: str, stdin: str = "", detached: bool = False) -> str:
        words = " ".join(argv)
        if words in self.answers:
            return self.answers[words]
        self.changes.append(words + (f" <<< {stdin!r}" if stdin else ""))
        return ""

    def has(self, program: str) -> bool:
        return any(words.split()[0] == program for words in self.answers)


def names_on(tmp_path: Path, answers: dict[str, str] | None = None) -> tuple[Names, Told]:
    (tmp_path / "etc").mkdir(exist_ok=True)
    run = Told(answers or {})
    context = agent.Context(Paths(str(tmp_path)), run, Files(), System(run), print)
    (tmp_path / "var" / "run" / "netclient").mkdir(parents=True, exist_ok=True)
    return Names(context, "demo", "nm-demo"), run


def test_the_hosts_file_keeps_mode_owner_and_bytes(tmp_path):
    names, _ = names_on(tmp_path)
    path = tmp_path / "etc" / "hosts"
    path.write_bytes(b"127.0.0.1 localhost\n# caf\xe9\r\n10.9.9.9 other")
    path.chmod(0o640)
    before = path.read_bytes()
    names.write([LINE])
    assert path.read_bytes().startswith(before) and b"10.20.30.2 nas.demo # demo\n" in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    names.write([])
    assert path.read_bytes() == before
    path.unlink()
    names.write([LINE])
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    names.write([])
    assert path.read_bytes() == b""


def test_a_link_is_followed_and_a_mount_is_written_in_place(tmp_path, monkeypatch):
    names, _ = names_on(tmp_path)
    real = tmp_path / "real"
    real.write_text("127.0.0.1 localhost\n")
    (tmp_path / "etc" / "hosts").symlink_to(real)
    names.write([LINE])
    assert (tmp_path / "etc" / "hosts").is_symlink() and LINE in real.read_text()

    def busy(*_: str) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    inode = real.stat().st_ino
    names.write([])
    assert real.read_text() == "127.0.0.1 localhost\n" and real.stat().st_ino == inode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["etc", "real", "var"]


def test_a_folder_that_cannot_be_written_does_not_matter_where_the_file_can(tmp_path, monkeypatch):
    names, _ = names_on(tmp_path)
    path = tmp_path / "etc" / "hosts"
    path.write_text("127.0.0.1 localhost\n")

    def read_only(*_: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", read_only)
    names.write([LINE])
    assert LINE in path.read_text()
    names.write([])
    assert path.read_text() == "127.0.0.1 localhost\n"
    monkeypatch.setattr(Files, "_put", read_only)
    with pytest.raises(agent.NetclientError, match=r"^cannot write .*hosts \(Read-only file system\): make it writable"):
        names.write([LINE])
    assert path.read_text() == "127.0.0.1 localhost\n"


def test_what_cannot_be_read_is_not_written(tmp_path, monkeypatch):
    names, _ = names_on(tmp_path)
    (tmp_path / "etc" / "hosts").mkdir()
    with pytest.raises(OSError, match="directory"):
        names.write([LINE])


def test_two_networks_at_once_lose_no_line(tmp_path):
    names, _ = names_on(tmp_path)
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    context = agent.Context(Paths(str(tmp_path)), names.run, Files(), System(names.run), print)
    every = [Names(context, f"n{number}", f"nm-n{number}") for number in range(4)]
    for lines in (["10.0.0.1 a"], ["10.0.0.2 b", "10.0.0.3 c"], []):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda each, lines=lines: each.write(lines), every))  # type: ignore[misc]
        text = (tmp_path / "etc" / "hosts").read_text()
        assert all(f"{line} # n{number}\n" in text for line in lines for number in range(4))
    assert text == "127.0.0.1 localhost\n"


def test_on_openwrt_it_is_a_file_on_tmpfs(tmp_path):
    (tmp_path / "tmp" / "hosts").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "openwrt_release").write_text("DISTRIB_ID='OpenWrt'\n")
    names, _ = names_on(tmp_path)
    names.write([LINE])
    assert (tmp_path / "tmp/hosts/netclient-demo").read_text() == LINE + "\n" and not (tmp_path / "etc/hosts").exists()
    names.write([])
    assert not (tmp_path / "tmp/hosts/netclient-demo").exists() and not (tmp_path / "etc/hosts").exists()


def test_a_block_from_before_dnsmasq_ran_goes(tmp_path):
    names, _ = names_on(tmp_path)
    names.write([LINE])
    (tmp_path / "tmp" / "hosts").mkdir(parents=True)
    (tmp_path / "etc" / "openwrt_release").write_text("")
    names, _ = names_on(tmp_path)
    names.write([LINE])
    assert (tmp_path / "etc/hosts").read_text() == "" and names.differing([LINE]) == {}


RESOLVED = {"resolvectl dns nm-demo": "Link 7 (nm-demo):\n", "resolvectl domain nm-demo": "Link 7 (nm-demo):\n"}
RESOLVED_SET = {
    "resolvectl dns nm-demo": "Link 7 (nm-demo): 10.20.30.1\n",
    "resolvectl domain nm-demo": "Link 7 (nm-demo): ~demo\n",
}


@pytest.mark.parametrize(
    ("answers", "nameserver", "changes"),
    [
        (RESOLVED, "10.20.30.1", ["domain nm-demo ~demo", "default-route nm-demo false", "dns nm-demo 10.20.30.1"]),
        (RESOLVED_SET, "10.20.30.1", []),
        (RESOLVED_SET, "10.20.30.9", ["domain nm-demo ~demo", "default-route nm-demo false", "dns nm-demo 10.20.30.9"]),
        (RESOLVED_SET, "", ["revert nm-demo"]),
        (RESOLVED, "", []),
    ],
)
def test_resolved_asks_for_the_network_alone(tmp_path, monkeypatch, answers, nameserver, changes):
    names, run = names_on(tmp_path, answers)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/resolve")
    how, steps = names.split(nameserver)
    run.apply(steps)
    assert (how, run.changes) == ("resolved", ["resolvectl " + change for change in changes])


def test_a_resolved_that_does_not_run_is_none(tmp_path, monkeypatch):
    """Its folder outlives it."""
    names, run = names_on(tmp_path, {"resolvectl dns nm-demo": "", "resolvectl domain nm-demo": ""})
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/resolve")
    assert (names.split("10.20.30.1"), run.changes) == (("", []), [])


OPENRESOLV = {
    "resolvconf --version": "openresolv 3.12.0\n",
    "resolvconf -v": "DOMAIN=''\nSEARCH='lan'\nNAMESERVERS='192.0.2.1'\nLOCALNAMESERVERS='127.0.0.1'\nDOMAINS='lan:192.0.2.1'\n",
    "resolvconf -l nm-demo": "",
}
NO_SERVER_HERE = {**OPENRESOLV, "resolvconf -v": OPENRESOLV["resolvconf -v"].replace("127.0.0.1", "")}
RECORD_SET = {"resolvconf -l nm-demo": "# resolv.conf from nm-demo\nsearch demo\nnameserver 10.20.30.1\n"}
ADD = ["resolvconf -p -a nm-demo <<< 'search demo\\nnameserver 10.20.30.1\\n'"]


@pytest.mark.parametrize(
    ("answers", "nameserver", "how", "changes"),
    [
        (OPENRESOLV, "10.20.30.1", "openresolv", ADD),
        ({**OPENRESOLV, **RECORD_SET}, "10.20.30.1", "openresolv", []),
        ({**OPENRESOLV, **RECORD_SET}, "", "", ["resolvconf -d nm-demo"]),
        (OPENRESOLV, "", "", []),
        (NO_SERVER_HERE, "10.20.30.1", "", []),
        ({**NO_SERVER_HERE, **RECORD_SET}, "10.20.30.1", "", ["resolvconf -d nm-demo"]),
    ],
)
def test_openresolv_has_a_private_record(tmp_path, monkeypatch, answers, nameserver, how, changes):
    names, run = names_on(tmp_path, answers)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    found, steps = names.split(nameserver)
    run.apply(steps)
    assert (found, run.changes) == (how, changes)


def test_debians_resolvconf_is_left_alone(tmp_path, monkeypatch):
    names, run = names_on(tmp_path, {"resolvconf --help": ""})
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    assert (names.split("10.20.30.1"), run.changes) == (("", []), ["resolvconf --version"])


def test_names_are_checked():
    assert agent.check_host_name("WWW.Nas") == "www.nas"
    for odd in ("", "a..b", ".a", "a.", "-a", "a-", "a_b", "a b", "é", "a" * 64, "a." * 97):
        with pytest.raises(Invalid):
            agent.check_host_name(odd)
