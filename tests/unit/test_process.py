"""How a service's process ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import Final

import pytest

from tidegate import process
from tidegate.eventlog.interface import EventLogError
from tidegate.health import Pulse

WAIT_S: Final = 60.0
# A thread that nobody ends stands for a client that waits for an answer which never comes.
STUCK: Final = """
import sys, threading
from tidegate.process import run_service
threading.Thread(target=threading.Event().wait).start()
print("said before the end")
sys.exit(run_service(lambda: 1))
"""


@pytest.mark.feature("K2")
def test_a_service_that_failed_ends_whatever_its_clients_wait_for() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert done.stdout == "said before the end\n"


def test_a_loop_ends_for_what_another_thread_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer without a connection is told of no refusal: it waited for ever beside a heartbeat that was refused."""
    pulse = Pulse()
    monkeypatch.setattr(process, "PULSE", pulse)
    pulse.end("of before")
    turns: list[int] = []

    def turn() -> None:
        turns.append(1)
        if len(turns) == 3:
            for _ in range(3):
                pulse.end("the credentials were replaced")

    with pytest.raises(EventLogError, match="the credentials were replaced"):
        process.run_until_stopped(turn, threading.Event())
    assert len(turns) == 3
    assert len(pulse.reasons_to_end) == 2


# A mutex that is locked twice stands for a client that waits for Kafka: handlers of signals run when it returns to Python.
DEAF: Final = """
import ctypes, threading
from tidegate.process import stop_on_signals
stop = stop_on_signals({within})
threading.Thread(target=lambda: stop.wait() and print("told", flush=True), daemon=True).start()
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.feature("K1")
@pytest.mark.parametrize(("within", "number", "code"), [("0.1", signal.SIGTERM, 0), ("None", signal.SIGINT, 130)])
def test_a_service_that_is_inside_a_client_hears_of_its_end_and_comes_to_it(
    within: str, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF.format(within=within)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if code:
            assert process.stdout.readline() == "told\n"
            process.send_signal(number)
        out, error = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == code, error
    assert code or out.startswith("told\n")
    assert ("without a clean end" in out + error) is (code == 0)
