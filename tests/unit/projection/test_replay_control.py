"""What is said of replays by a projection that has just begun."""

from __future__ import annotations

import threading

import pytest

from support.stack import eventually
from tidegate.eventlog.memory import MemoryBroker
from tidegate.projection import control
from tidegate.projection.replay import Parts, Progress
from tidegate.projection.service import Limits
from tidegate.projection.store import Store, StoreError

WAIT_S = 30.0


@pytest.mark.feature("L4")
def test_it_says_that_it_does_not_know_yet_what_the_process_before_had_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    class Client:
        def close(self) -> None:
            pass

    def load_all(_: Store) -> list[Progress]:
        answers.wait()
        return []

    monkeypatch.setattr(control, "load_all", load_all)
    parts = Parts(MemoryBroker(), lambda _: Store(Client()), "tidegate", lambda *_: 0, Limits(1, 1, 1))
    replays = control.Replays(parts, "projection-0")
    assert replays.current() is None
    replays.resume()
    with pytest.raises(StoreError, match="not known yet"):
        replays.current()
    answers.set()

    def knows() -> bool:
        try:
            return replays.current() is None
        except StoreError:
            return False

    assert eventually(knows, "what it knows", WAIT_S)
    replays.close()
