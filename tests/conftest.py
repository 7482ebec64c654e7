# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Iterator

import pytest
from lab import Lab
from restkit import Rest, World, make_user
from serverkit import Clock, Server, make_core

import netmaker_core

os.environ["NETCLIENT_SET_CLOCK"] = "no"  # a test must never move this machine's clock


@pytest.fixture(autouse=True)
def nobody_sets_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that runs the agent in this process."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to set the clock")

    monkeypatch.setattr(time, "clock_settime", refuse)


@pytest.fixture(autouse=True)
def nobody_keeps_the_umask() -> Iterator[None]:
    """The agent's main makes private whatever this process writes from then on; hosts of the lab must not be."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core(tmp_path: Path) -> Iterator[netmaker_core.Core]:
    """A database with the network `default`, sound at the end."""
    made = make_core(str(tmp_path), Clock())
    netmaker_core.add_network(made, "default", {"range": "10.20.30.0/24"})
    yield made
    assert netmaker_core.check(made) == []
    made.store.close()


@pytest.fixture
def settings() -> dict[str, str]:
    """What `home` is started with besides; for modules to say otherwise."""
    return {}


@pytest.fixture
def home(tmp_path: Path, clock: Clock, settings: dict[str, str]) -> Iterator[Server]:
    """A running server with the network `default`."""
    running = Server(str(tmp_path / "data"), clock, **settings)
    running.network()
    yield running
    running.stop()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """An internet to put hosts on; tests/lab.py."""
    with Lab() as lab:
        yield lab


@pytest.fixture
def admin(home: Server) -> Rest:
    """An administrator who is signed in."""
    return make_user(home, "root", admin=True)


@pytest.fixture
def world(home: Server) -> World:
    """Something to break into, on that server."""
    return World(home)
