# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Iterator

import pytest
from lab import Lab
from restkit import Rest, make_user
from serverkit import Clock, Server

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
def home(tmp_path: Path, clock: Clock) -> Iterator[Server]:
    """A running server with the network `default`."""
    running = Server(str(tmp_path / "data"), clock)
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
