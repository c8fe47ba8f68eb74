"""The watchdog barks at a loop that hangs beyond a deadline, and at nothing else."""

import gc
import sys
import threading
import time

from tidegate.executor.watchdog import Watchdog, overdue_s

WAIT_S = 20.0


class Loop:
    """Stands for an event loop: answers pings unless told to hang."""

    def __init__(self) -> None:
        self.hangs = False
        self.pings = threading.Semaphore(0)

    def ping(self, pong):
        self.pings.release()
        if not self.hangs:
            pong()


def watch(loop: Loop, overdue: float, barks: list[str]) -> Watchdog:
    watchdog = Watchdog(ping=loop.ping, latest_overdue_s=lambda: overdue, grace_s=0.1, bark=barks.append, check_s=0.01)
    watchdog.start()
    return watchdog


def wait_for(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_barks_once_with_the_stack_of_the_loop():
    loop, barks = Loop(), []
    loop.hangs = True
    watchdog = watch(loop, 5.0, barks)
    wait_for(lambda: barks)
    watchdog.stop()
    assert len(barks) == 1
    assert "test_barks_once_with_the_stack_of_the_loop" in barks[0]


def test_nothing_is_collected_while_it_looks(monkeypatch):
    """Collecting in there can wait for a lock that is held there: the whole process stood still, watchdog and all."""
    seen, look = [], sys._current_frames

    def looked():
        seen.append(gc.isenabled())
        return look()

    monkeypatch.setattr(sys, "_current_frames", looked)
    loop, barks = Loop(), []
    loop.hangs = True
    watchdog = watch(loop, 5.0, barks)
    wait_for(lambda: barks)
    watchdog.stop()
    assert seen == [False]
    assert gc.isenabled()


def test_is_silent_while_the_loop_answers_or_no_deadline_has_passed():
    for hangs, overdue in ((False, 5.0), (True, -1.0), (True, 0.05)):
        loop, barks = Loop(), []
        loop.hangs = hangs
        watchdog = watch(loop, overdue, barks)
        for _ in range(30):
            assert loop.pings.acquire(timeout=WAIT_S)
        watchdog.stop()
        assert barks == []


def test_overdue():
    now = time.monotonic()
    assert overdue_s([]) < 0
    assert overdue_s([now + 60]) < 0
    assert overdue_s([now + 60, now - 5]) >= 5
