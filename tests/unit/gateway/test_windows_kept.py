"""Figures of a time of which a part is forgotten are refused, or begin where the live view does, and say so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.gateway import web
from tidegate.gateway.figures import ACCOUNT, HOUR_MINUTES, MINUTE_MS, STEP, Figures, Tally
from tidegate.gateway.view import LiveView

KEEP_MINUTES = 180
NOW = 10_000 * 60 - 1  # the last minute of an hour
PATHS = ("/v1/accounts", "/v1/functions", "/v1/spend")


class Clock:
    """What `web` uses of `time`."""

    def __init__(self) -> None:
        self.minute = NOW

    def time_ns(self) -> int:
        return self.minute * MINUTE_MS * 1_000_000

    def monotonic(self) -> float:
        return 0.0


class _Page:
    def bytes(self, body: bytes, content_type: str, status: int) -> tuple[int, bytes]:
        return status, body


class Served:
    """The web endpoints over a view of one partition; with a peer, that has another one."""

    def __init__(self, partition: int, peer: Served | None = None, clock: Clock | None = None) -> None:
        self.handlers: dict[str, Any] = {}
        view = LiveView(tallies=_tallies(partition), keep_minutes=KEEP_MINUTES)
        for key in view.outdated_tallies(NOW * MINUTE_MS):
            view.tallies.forget(key)
        gateway: Any = SimpleNamespace(
            app=SimpleNamespace(page=lambda path, name: lambda handler: self.handlers.update({path: handler})),
            is_ready=True,
            view=view,
            owned={partition},
            partition_count=1 if peer is None else 2,
            peers=lambda: {1: "peer"},
        )
        api: Any = web.Api(gateway, "own")

        async def ask(url: str, path: str, query: Mapping[str, str], timeout_s: float) -> tuple[int, bytes]:
            assert peer is not None
            assert clock is not None
            clock.minute += 1  # it takes a moment
            return await peer.answer(path, {**query, "scope": "local"})

        api._ask = ask

    async def answer(self, path: str, query: Mapping[str, str]) -> tuple[int, bytes]:
        answer: tuple[int, bytes] = await self.handlers[path](_Page(), SimpleNamespace(query=query))
        return answer

    def get(self, path: str, **query: int) -> tuple[int, Any]:
        status, body = asyncio.run(self.answer(path, {name: str(value) for name, value in query.items()}))
        return status, json.loads(body)


def _tallies(partition: int) -> list[Tally]:
    """Return the tallies of an account and a function that spent 1 in every minute of a week."""
    return [
        Tally(
            partition=partition,
            kind=kind,
            name="acme",
            hour=hour,
            log="",
            minutes={minute: Figures(spent_micros=1) for minute in range(HOUR_MINUTES)},
        )
        for kind in (ACCOUNT, STEP)
        for hour in range((NOW - 7 * 24 * 60) // HOUR_MINUTES, NOW // HOUR_MINUTES + 1)
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(web, "time", clock)
    return clock


@pytest.fixture
def served(clock: Clock) -> Served:
    return Served(0)


@pytest.mark.feature("P2")
@pytest.mark.parametrize("path", PATHS)
def test_a_window_that_begins_before_what_is_kept_is_refused(served: Served, path: str) -> None:
    assert served.get(path, minutes=KEEP_MINUTES)[0] == 200
    status, body = served.get(path, minutes=KEEP_MINUTES + 2)
    assert (status, body["code"]) == (400, "bad_request")
    for said in ("for 3 h", "TIDEGATE_GATEWAY_KEEP_H", str((NOW - KEEP_MINUTES) * MINUTE_MS)):
        assert said in body["message"]


@pytest.mark.feature("P2")
@pytest.mark.parametrize("path", PATHS[:2])
def test_so_is_one_that_ended_long_ago(served: Served, path: str) -> None:
    ended = (NOW - 60) * MINUTE_MS
    assert served.get(path, minutes=KEEP_MINUTES - 60, until_ms=ended)[0] == 200
    assert served.get(path, minutes=KEEP_MINUTES, until_ms=ended)[0] == 400
    assert served.get(path, until_ms=(NOW - KEEP_MINUTES - 1) * MINUTE_MS)[0] == 400
    assert served.get(path, until_ms=0)[0] == 400


@pytest.mark.feature("P2")
def test_spend_since_a_time_that_is_forgotten_is_refused(served: Served) -> None:
    assert served.get("/v1/spend", since_ms=(NOW - KEEP_MINUTES) * MINUTE_MS)[1]["total_micros"] == KEEP_MINUTES + 1
    assert served.get("/v1/spend", since_ms=(NOW - KEEP_MINUTES - 1) * MINUTE_MS)[0] == 400


@pytest.mark.feature("P2")
def test_windows_that_nobody_named_begin_where_the_view_does_and_say_so(served: Served) -> None:
    def said(**query: int) -> list[tuple[int, int, int]]:
        (account,) = served.get("/v1/accounts", **query)[1]["accounts"]
        return [(one["minutes"], one["start_ms"] // MINUTE_MS, one["spent_micros"]) for one in account["windows"]]

    assert said() == [(5, NOW - 4, 5), (60, NOW - 59, 60), (KEEP_MINUTES, NOW - KEEP_MINUTES + 1, KEEP_MINUTES)]
    assert said(until_ms=(NOW - 150) * MINUTE_MS) == [
        (5, NOW - 154, 5),
        (30, NOW - KEEP_MINUTES + 1, 30),
        (30, NOW - KEEP_MINUTES + 1, 30),
    ]
    spend = served.get("/v1/spend")[1]
    assert (spend["since_ms"] // MINUTE_MS, spend["total_micros"]) == (NOW - KEEP_MINUTES + 1, KEEP_MINUTES)


@pytest.mark.feature("P2")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("query", [{}, {"minutes": KEEP_MINUTES}])
def test_another_gateway_answers_for_the_same_windows_in_its_next_minute(
    clock: Clock, path: str, query: dict[str, int]
) -> None:
    status, body = Served(0, Served(1), clock).get(path, **query)
    assert (status, body["partitions_missing"]) == (200, [])
    total = body["total_micros"] if path == "/v1/spend" else body["total"][-1]["spent_micros"]
    assert total == 2 * KEEP_MINUTES
