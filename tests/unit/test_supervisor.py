"""The supervisor against real processes that crash, hang, loop and leave children behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from support.ends import is_gone
from tidegate.embedded import supervisor as supervisor_module
from tidegate.embedded.ports import choose_port, is_free
from tidegate.embedded.supervisor import ProcessSpec, ProcessStatus, Supervisor

pytestmark = pytest.mark.timeout(60)

WAIT_S = 15.0
SLEEP = ("sleep", "600")

Make = Callable[..., Supervisor]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.005)


def shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Make]:
    """Start a supervisor of these processes; it is stopped after the test."""
    made: list[Supervisor] = []

    def make(*specs: ProcessSpec, said: list[str] | None = None) -> Supervisor:
        supervisor = Supervisor(specs, tmp_path / "logs", on_progress=(said if said is not None else []).append)
        made.append(supervisor)
        supervisor.start()
        return supervisor

    yield make
    for supervisor in made:
        supervisor.stop(grace_s=0)


def status_of(supervisor: Supervisor, name: str) -> ProcessStatus:
    return next(status for status in supervisor.status() if status.name == name)


def test_it_runs_what_it_is_told_and_says_so(supervise: Make) -> None:
    supervisor = supervise(ProcessSpec("one", SLEEP), ProcessSpec("two", SLEEP))
    assert supervisor.wait_ready(WAIT_S)
    statuses = supervisor.status()
    assert [status.name for status in statuses] == ["one", "two"]
    assert [status.state for status in statuses] == ["running", "running"]
    assert all(status.pid is not None and psutil.pid_exists(status.pid) for status in statuses)
    assert [(status.restarts, status.last_exit) for status in statuses] == [(0, None), (0, None)]


def test_output_goes_to_a_log_per_process_and_the_last_one_is_kept(supervise: Make) -> None:
    for text in ("first", "second"):
        spec = ProcessSpec("app", shell("echo $WORD; echo error >&2"), env={"WORD": text}, restart=False)
        supervisor = supervise(spec)
        wait_until(lambda: status_of(supervisor, "app").state == "exited", "the end")  # noqa: B023
    log_path = status_of(supervisor, "app").log_path
    assert log_path.read_text() == "second\nerror\n"
    assert log_path.with_suffix(".log.1").read_text() == "first\nerror\n"


@pytest.fixture
def _no_delay_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any delay outlasts the test: what comes to pass in it came without one, however slow the machine is."""
    monkeypatch.setattr(supervisor_module, "BACKOFF_FIRST_S", 600.0)
    monkeypatch.setattr(supervisor_module, "BACKOFF_MAX_S", 600.0)


@pytest.mark.usefixtures("_no_delay_is_short")
def test_a_killed_process_is_back_at_once(supervise: Make) -> None:
    supervisor = supervise(ProcessSpec("app", SLEEP))
    pids = {status_of(supervisor, "app").pid}
    # However often it is killed by us: that is no crash loop.
    for _ in range(6):
        assert supervisor.kill("app") in pids
        wait_until(lambda: status_of(supervisor, "app").pid not in {None, *pids}, "the successor")
        pids.add(status_of(supervisor, "app").pid)
    status = status_of(supervisor, "app")
    assert (status.state, status.restarts, status.last_exit) == ("running", 6, -signal.SIGKILL)


@pytest.mark.usefixtures("_no_delay_is_short")
def test_the_first_crash_costs_no_delay(supervise: Make, tmp_path: Path) -> None:
    marker = tmp_path / "crashed"
    script = f"if [ -e {marker} ]; then sleep 600; else touch {marker}; exit 7; fi"
    said: list[str] = []
    supervisor = supervise(ProcessSpec("app", shell(script)), said=said)
    wait_until(lambda: status_of(supervisor, "app").restarts == 1, "the restart")
    assert status_of(supervisor, "app").last_exit == 7
    assert said == ["app ended with status 7: starting it again"]


def test_a_crash_loop_is_slowed_down_and_explained(supervise: Make) -> None:
    supervisor = supervise(ProcessSpec("app", shell("echo cannot reach the moon; exit 3")))
    wait_until(lambda: status_of(supervisor, "app").state == "crash-looping", "the verdict")
    status = status_of(supervisor, "app")
    assert status.last_exit == 3
    assert status.last_lines[-1] == "cannot reach the moon"
    time.sleep(1.0)
    # 0, 0.1, 0.2, 0.4, 0.8 s: without backoff it would be dozens.
    assert status_of(supervisor, "app").restarts <= 6


def test_the_backoff_is_bounded_and_forgives() -> None:
    delays = [supervisor_module._backoff_s(deaths) for deaths in range(1, 40)]
    assert delays[:4] == [0.0, 0.1, 0.2, 0.4]
    assert delays == sorted(delays)
    assert max(delays) == supervisor_module.BACKOFF_MAX_S == 5.0


def test_who_runs_long_enough_is_healthy_again(
    supervise: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HEALTHY_AFTER_S", 1.5)  # no short life may last so long on a busy machine
    count = tmp_path / "count"
    script = f"echo x >> {count}; [ $(wc -l < {count}) -gt 3 ] && sleep 600; exit 1"
    supervisor = supervise(ProcessSpec("app", shell(script)))
    wait_until(lambda: status_of(supervisor, "app").state == "crash-looping", "the crash loop")
    wait_until(lambda: status_of(supervisor, "app").state == "running", "recovery")


def test_readiness_is_asked_until_it_comes_and_anew_after_a_restart(supervise: Make, tmp_path: Path) -> None:
    door = tmp_path / "open"

    def ready() -> bool:
        if not door.exists():
            raise ConnectionRefusedError
        return True

    supervisor = supervise(ProcessSpec("app", SLEEP, ready=ready))
    assert not supervisor.wait_ready(0.1)
    assert status_of(supervisor, "app").state == "starting"
    door.touch()
    assert supervisor.wait_ready(WAIT_S)
    assert status_of(supervisor, "app").state == "running"
    door.unlink()
    assert status_of(supervisor, "app").state == "running"
    supervisor.kill("app")
    wait_until(lambda: status_of(supervisor, "app").restarts == 1, "the restart")
    assert status_of(supervisor, "app").state == "starting"


def test_stop_asks_in_reverse_order_and_lets_them_finish(
    supervise: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"trap 'sleep 0.1; exit 5' TERM; touch {tmp_path}/$NAME.up; while :; do sleep 0.01; done"
    names = ["first", "second", "third"]
    supervisor = supervise(*(ProcessSpec(name, shell(script), env={"NAME": name}) for name in names))
    wait_until(lambda: all((tmp_path / f"{name}.up").exists() for name in names), "the traps")
    pids = [status.pid for status in supervisor.status()]
    asked: list[int] = []
    real_kill = os.kill

    def kill(pid: int, number: int) -> None:
        asked.append(pid)
        real_kill(pid, number)

    monkeypatch.setattr(os, "kill", kill)
    supervisor.stop(grace_s=WAIT_S)
    assert asked == list(reversed(pids))
    assert [status.state for status in supervisor.status()] == ["stopped"] * 3
    assert [status.last_exit for status in supervisor.status()] == [5, 5, 5]
    supervisor.stop()


def test_who_does_not_listen_is_killed_after_the_grace(supervise: Make, tmp_path: Path) -> None:
    up = tmp_path / "up"
    supervisor = supervise(ProcessSpec("deaf", shell(f"trap '' TERM; touch {up}; while :; do sleep 0.01; done")))
    wait_until(up.exists, "the trap")
    started_at = time.monotonic()
    supervisor.stop(grace_s=0.3)
    assert time.monotonic() - started_at >= 0.3
    assert status_of(supervisor, "deaf").last_exit == -signal.SIGKILL


@pytest.mark.usefixtures("_no_delay_is_short")
def test_stop_ends_a_backoff(supervise: Make) -> None:
    said: list[str] = []
    supervisor = supervise(ProcessSpec("app", ("false",)), said=said)
    wait_until(lambda: "app ended with status 1: again in 600.0 s" in said, "a long backoff")
    supervisor.stop()
    assert status_of(supervisor, "app").state == "stopped"


def test_what_a_dead_process_left_running_is_ended(supervise: Make, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    supervisor = supervise(ProcessSpec("app", shell(f"sleep 600 & echo $! > {pid_file}; wait")))
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "the grandchild")
    grandchild = psutil.Process(int(pid_file.read_text()))
    supervisor.kill("app")
    wait_until(lambda: is_gone(grandchild), "its end")


def test_a_program_that_is_not_there_says_so(supervise: Make) -> None:
    supervisor = supervise(ProcessSpec("app", ("no-such-program",), restart=False))
    wait_until(lambda: status_of(supervisor, "app").state == "exited", "the end")
    status = status_of(supervisor, "app")
    assert status.last_exit == 127
    assert "no-such-program" in status.last_lines[-1]


def test_names_are_unique(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        Supervisor([ProcessSpec("app", SLEEP), ProcessSpec("app", SLEEP)], tmp_path)


def test_processes_outlive_the_thread_that_started_them(supervise: Make) -> None:
    made: list[Supervisor] = []
    thread = threading.Thread(target=lambda: made.append(supervise(ProcessSpec("app", SLEEP))))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert status_of(made[0], "app").restarts == 0


PARENT = """
import sys
from pathlib import Path
from tidegate.embedded.supervisor import ProcessSpec, Supervisor

supervisor = Supervisor([ProcessSpec("app", ("sleep", "600"))], Path(sys.argv[1]))
supervisor.start()
print(supervisor.status()[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "returned"])
def test_processes_die_with_the_supervisors_process(tmp_path: Path, end: signal.Signals | None) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        if end is None:
            parent.stdin.close()
        else:
            parent.send_signal(end)
        wait_until(lambda: is_gone(child), "its end")


def test_a_free_port_is_given_as_asked_and_a_taken_one_is_not() -> None:
    port = choose_port()
    assert is_free(port)
    assert choose_port(port) == port
    assert choose_port(port, avoid=frozenset({port})) != port
