# SPDX-License-Identifier: Apache-2.0
"""What the docs say of routes and settings is what the tables say."""

from __future__ import annotations

import re

from agentkit import REPO

import netmaker_core
import netmaker_lite as server

API = (REPO / "docs/api.md").read_text("utf-8")


def test_every_route_stands_in_the_api_document_with_who_may():
    documented = set(re.findall(r"^\| `([A-Z]+) (\S+)` \| (\w+)", API, re.M))
    served = {
        (route.method, re.sub("<([a-z0-9]+)>", r"{\1}", route.path), route.role)
        for route in server.ROUTES
        if route.role != "agent"
    }
    assert documented == served


def test_every_field_that_the_api_document_calls_by_name_is_there():
    fields = {field.name for table in server.SCHEMAS.values() for field in table}
    fields |= {field.name for route in server.ROUTES for field in route.takes}
    named = re.findall(r"`([a-z0-9]+)`", API.split("## Fields worth a word")[1].split("## Differences")[0])
    assert set(named) - fields <= {"unlimited", "30d", "file", "renew"}  # values


def test_every_setting_is_in_the_servers_help(capsys):
    assert server.main(["serve", "--help"]) == 0
    told = capsys.readouterr().out
    assert [each.name for each in netmaker_core.SETTINGS if each.name not in told] == []
