"""Keys that are pressed while a demo runs."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tidegate.demo.by_hand import CANCELLED, PAUSED, RESUMED, ByHand
from tidegate.sdk.client import Client


class Noted:
    """Stands in for a client: notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda what, reason: self.calls.append((name, what))


@pytest.mark.feature("K3")
@pytest.mark.parametrize(
    ("typed", "calls", "said", "is_paused"),
    [
        ([""], [], [[]], False),
        (["p"], [("pause_queue", "q")], [[PAUSED]], True),
        (["pr"], [("resume_queue", "q")], [[RESUMED]], False),
        (["rp"], [("pause_queue", "q")], [[PAUSED]], True),
        (["p", "x", "r"], [("pause_queue", "q"), ("resume_queue", "q")], [[PAUSED], [], [RESUMED]], False),
        (
            ["p", "c", "c"],
            [("pause_queue", "q"), ("resume_queue", "q"), ("cancel", "a"), ("cancel", "b")],
            [[PAUSED], [CANCELLED], []],
            False,
        ),
    ],
)
def test_what_is_typed_is_done_once_and_said(
    typed: list[str], calls: list[tuple[str, str]], said: list[list[str]], is_paused: bool
) -> None:
    client, keys = Noted(), iter(typed)
    by_hand = ByHand(lambda: next(keys), "q")
    assert [by_hand.obey(cast("Client", client), ["a", "b"]) for _ in typed] == said
    assert client.calls == calls
    assert (by_hand.is_paused, by_hand.was_cancelled) == (is_paused, "c" in "".join(typed))
