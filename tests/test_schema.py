# SPDX-License-Identifier: Apache-2.0
"""/api/openapi.json is complete and true: every route is in it, and thousands of made-up requests get only what it says."""

from __future__ import annotations

import copy
import logging
import os
import re
import sqlite3
from collections import Counter
from typing import Any

import pytest
from restkit import World, body_of, parts_of

import netmaker_lite as server

EXAMPLES = int(os.environ.get("NM_EXAMPLES", "50"))  # for each operation, valid and invalid together


def document(world: World) -> Any:
    return world.nobody.get("/api/openapi.json")


def strict(schema: Any) -> Any:
    """The same where an answer may have no member that is not described."""
    found = copy.deepcopy(schema)
    todo = [found["components"]["schemas"]]
    todo += [each.get("responses") for path in found["paths"].values() for each in path.values()]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if one.get("type") == "object" and "properties" in one:
                one.setdefault("additionalProperties", False)
            todo += one.values()
    return found


def test_every_route_is_described(world: World) -> None:
    paths = document(world)["paths"]
    described = {(method.upper(), path) for path, each in paths.items() for method in each}
    assert described == {(route.method, re.sub("<([a-z0-9]+)>", r"{\1}", route.path)) for route in server.ROUTES}
    identities = [one["operationId"] for each in paths.values() for one in each.values()]
    assert len(set(identities)) == len(identities)
    for path, each in paths.items():
        for method, one in each.items():
            names = [part["name"] for part in one["parameters"] if part["in"] == "path"]
            assert names == re.findall("{([a-z0-9]+)}", path)
            route = next(
                r for r in server.ROUTES if r.method == method.upper() and re.sub("[<>]", "", r.path) == re.sub("[{}]", "", path)
            )
            assert ("security" in one) == (route.role not in ("anyone", "agent", "nobody"))
            assert one["summary"] and "lambda" not in one["summary"], route


def test_references_lead_somewhere(world: World) -> None:
    whole = document(world)
    found = set(re.findall("'\\$ref': '#/components/([^']+)'", repr(whole)))
    assert {name for name in found if name.partition("/")[2] not in whole["components"][name.partition("/")[0]]} == set()
    used = {name.partition("/")[2] for name in found if name.startswith("schemas/")}
    assert used == set(whole["components"]["schemas"])


schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis needs CPython 3.10: what the document says is not tried here"
)


NEVER_GOOD = {  # a signed line, a route for nobody, an administrator is there, nodes are there
    "POST /api/agent/v1/join", "POST /api/agent/v1/exchange", "POST /api/nodes/adm/{n}/authenticate",
    "POST /api/users/adm/createadmin", "DELETE /api/networks/{n}",
}  # fmt: skip


def either(operation: Any) -> Any:
    """Requests as the document wants them, and others."""
    modes = schemathesis.GenerationMode
    return operation.as_strategy(generation_mode=modes.POSITIVE) | operation.as_strategy(generation_mode=modes.NEGATIVE)


def test_answers_are_as_described(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """An administrator's made-up requests, each operation on the same world. Who may what is tried in test_roles.py."""
    import hypothesis
    from hypothesis import HealthCheck, Phase
    from hypothesis import strategies as st
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as conformance

    checks = [
        not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_headers_conformance,
        conformance.response_schema_conformance,
    ]
    store = world.home.core.store
    schema = schemathesis.openapi.from_dict(strict(document(world)))
    schema.config.update(base_url="http://127.0.0.1:%d" % world.home.port)
    bearer = {"Authorization": "Bearer " + world.admin.bearer}
    real = {"n": ["default"], "node": [world.node.node, world.pending.node], "u": ["carol", "new"], "name": ["front"]}
    seen: Counter[tuple[str, int]] = Counter()
    changes = "SELECT COUNT(*) FROM audit"
    saved, before = sqlite3.connect(":memory:"), store.row(changes)
    store._raw().backup(saved)

    def send(case: Any, data: Any) -> None:
        for name in case.path_parameters or {}:
            if name in real and data.draw(st.integers(0, 3)):
                case.path_parameters[name] = data.draw(st.sampled_from(real[name]))
        validate(case)

    def validate(case: Any) -> None:
        said = case.call_and_validate(checks=checks, headers=bearer)
        seen[case.operation.label, said.status_code] += 1
        if store.row(changes) != before:
            store.replace(saved)

    run = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    routes = {route.method + " " + re.sub(server.PART, r"{\1}", route.path): route for route in server.ROUTES}
    for result in schema.get_all_operations():
        operation = result.ok()
        route = routes[operation.label]
        right = {"body": body_of(route, world)} if route.takes else {}
        validate(operation.Case(path_parameters=parts_of(route, world), **right))
        run(hypothesis.given(case=either(operation), data=st.data())(send))()
    saved.close()
    assert sum(seen.values()) >= 15 * len(server.ROUTES)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    labels, good = {label for label, _ in seen}, {label for label, status in seen if status < 300}
    assert len(labels) == len(server.ROUTES)
    assert labels - good <= NEVER_GOOD, labels - good
