"""Requests made from /openapi.json, right and wrong ones: none makes the server fail, and errors have one shape."""

from __future__ import annotations

from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

import toy
from tests.server.server_samples import registry, running
from trained import trained_deep

_EXAMPLES = 12  # of each operation
_PHASES = (Phase.explicit, Phase.generate)


def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    made = registry(tmp_path / "s", trained_deep(toy.llm(layers=4)), settings={"max_tokens": 8, "default_tokens": 2})
    met: dict[str, set[int]] = {}
    with running(made) as (url, server):
        schema = schemathesis.openapi.from_dict(server.config.app.openapi())
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=_EXAMPLES, derandomize=True, database=None, deadline=None, phases=_PHASES,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def ask(case: schemathesis.Case) -> None:
                response = case.call(base_url=url)
                met.setdefault(f"{case.method} {case.path}", set()).add(response.status_code)
                checks = [not_a_server_error]
                if "event-stream" not in response.headers.get("content-type", [""])[0]:
                    checks.append(response_schema_conformance)
                case.validate_response(response, checks=checks)
                if response.status_code >= 400 and response.status_code not in (400,):
                    assert set(response.json()["error"]) == {"message", "type", "code", "param"}

            ask()
    assert len(met) >= 17, met
    assert {200, 202} & set().union(*met.values()) and all(max(codes) < 500 for codes in met.values()), met
