"""Runs of partitions that are another gateway's, or come to be while somebody waits."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.domain.identity import partition_of
from tidegate.gateway import web
from tidegate.gateway.view import LiveView, RunRow

OURS, THEIRS = (next(name for name in "abcdef" if partition_of(name, 2) == partition) for partition in (0, 1))


class Served:
    """The address of a run, of a gateway that has partition 0 of two."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.gateway: Any = SimpleNamespace(
            app=SimpleNamespace(page=lambda path, name: lambda handler: self.handlers.update({path: handler})),
            is_ready=True,
            view=LiveView([RunRow(run_id=OURS, status="running", seq=1)]),
            owned={0},
            partition_of=lambda run_id: partition_of(run_id, 2),
            peers=lambda: {0: "own", 1: "peer"},
        )
        api: Any = web.Api(self.gateway, "own")

        async def ask(url: str, path: str, query: Any, timeout_s: float) -> tuple[int, bytes]:
            self.asked.append(f"{url}{path}")
            return 200, b"{}"

        api._ask = ask

    def get(self, run_id: str, **query: str) -> tuple[int, Any]:
        page = SimpleNamespace(bytes=lambda body, content_type, status: (status, json.loads(body)))
        handler = self.handlers["/v1/runs/{run_id}"]
        answer: tuple[int, Any] = asyncio.run(handler(page, SimpleNamespace(query=query), run_id=run_id))
        return answer


@pytest.mark.feature("O3")
def test_what_names_no_run_is_not_handed_on_as_an_address() -> None:
    served = Served()
    assert served.get(THEIRS)[0] == 200
    assert served.asked == [f"peer/v1/runs/{THEIRS}"]
    for name in ("../spend", "a?scope=x", "a#b", "", "a b", "../../health"):
        status, body = served.get(name)
        assert (status, body["code"]) == (404, "unknown_run")
    assert len(served.asked) == 1


@pytest.mark.feature("O3")
def test_a_run_that_moves_while_somebody_waits_is_not_said_to_be_unknown() -> None:
    served = Served()

    async def moved(run_id: str, after_seq: int, timeout_s: float) -> None:
        served.gateway.owned, served.gateway.view = {1}, LiveView()

    served.gateway.changed = moved
    status, body = served.get(OURS, wait_ms="1000", after_seq="1")
    assert (status, body["code"]) == (503, "restoring")
