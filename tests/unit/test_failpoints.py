"""Failpoints: inert unless armed, exact about when they act, loud about typos."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tidegate import failpoints
from tidegate.failpoints import FailpointSyntaxError, arm, failpoint


@pytest.fixture(autouse=True)
def _disarm():
    yield
    arm("")


def test_unarmed_points_do_nothing():
    failpoint("anything")


def test_acts_at_the_nth_pass_and_only_then():
    arm("slow=sleep:0.05@3, other=kill")
    durations = []
    for _ in range(4):
        began = time.perf_counter()
        failpoint("slow")
        durations.append(time.perf_counter() - began)
    assert [duration >= 0.05 for duration in durations] == [False, False, True, False]


def test_counts_passes_of_all_threads_together():
    arm("slow=sleep:0.05@4")
    slept = []

    def cross():
        began = time.perf_counter()
        failpoint("slow")
        slept.append(time.perf_counter() - began >= 0.05)

    threads = [threading.Thread(target=cross) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slept.count(True) == 1


@pytest.mark.parametrize(
    "specification",
    [
        "kill",
        "=kill",
        "x=",
        "x=explode",
        "x=sleep",
        "x=sleep:soon",
        "x=sleep:-1",
        "x=sleep:inf",
        "x=kill@0",
        "x=kill@-1",
    ],
)
def test_a_typo_is_refused(specification):
    with pytest.raises(FailpointSyntaxError):
        arm(specification)


def _run(specification: str) -> subprocess.Popen[bytes]:
    code = "from tidegate.failpoints import failpoint; print('before', flush=True); failpoint('here'); print('after')"
    environment = {**os.environ, failpoints.ENVIRONMENT_VARIABLE: specification}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_kill_from_the_environment_leaves_no_time_to_clean_up():
    process = _run("here=kill")
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (-signal.SIGKILL, b"before\n")


def test_stop_freezes_until_somebody_continues():
    process = _run("here=stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == b"before\nafter\n"


def test_a_file_arms_a_process_while_it_works_and_is_removed(tmp_path):
    file = tmp_path / "points"
    code = (
        "import sys; from tidegate.failpoints import failpoint; print(flush=True); sys.stdin.read(); failpoint('here')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, failpoints.ENVIRONMENT_VARIABLE: f"@{file}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"\n"
    file.write_text("here=kill")
    process.send_signal(signal.SIGUSR1)
    while file.exists():
        time.sleep(0.01)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL


def test_a_file_that_is_there_arms_at_start(tmp_path):
    file = tmp_path / "points"
    file.write_text("here=kill")
    assert _run(f"@{file}").wait(20) == -signal.SIGKILL
    assert not file.exists()
    assert _run(f"@{file}").wait(20) == 0


def test_a_typo_in_the_environment_stops_the_process_at_start():
    process = _run("here=kil")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"the action must be kill, stop or sleep:SECONDS" in err
