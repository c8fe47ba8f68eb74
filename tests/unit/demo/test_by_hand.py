"""Keys that are pressed while a demo runs."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tidegate.demo.by_hand import ByHand
from tidegate.sdk.client import Client


class Noted:
    """Stands in for a client: notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda what, reason: self.calls.append((name, what))


@pytest.mark.feature("K3")
@pytest.mark.parametrize(
    ("typed", "calls", "is_paused"),
    [
        ([""], [], False),
        (["p"], [("pause_queue", "q")], True),
        (["pr"], [("resume_queue", "q")], False),
        (["p", "x", "r"], [("pause_queue", "q"), ("resume_queue", "q")], False),
        (
            ["p", "c", "c"],
            [("pause_queue", "q"), ("resume_queue", "q"), ("cancel", "a"), ("cancel", "b")],
            False,
        ),
    ],
)
def test_what_is_typed_is_done_once(typed: list[str], calls: list[tuple[str, str]], is_paused: bool) -> None:
    client, keys = Noted(), iter(typed)
    by_hand = ByHand(lambda: next(keys), "q")
    for expected in typed:
        assert by_hand.obey(cast("Client", client), ["a", "b"]) == expected
    assert client.calls == calls
    assert (by_hand.is_paused, by_hand.was_cancelled) == (is_paused, "c" in "".join(typed))
