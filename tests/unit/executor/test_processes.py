"""Isolation `subprocess`: what comes back from a function in a process of its own, and what ends it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from support import isolated_app
from support.attempts import attempted, until
from tidegate.domain.messages import StepResult
from tidegate.executor.attempt import Attempt
from tidegate.executor.isolation import Apart
from tidegate.executor.isolation.errand import Ended
from tidegate.executor.isolation.process import Processes

pytestmark = pytest.mark.feature("T4")

APART = Apart(f"{Path(isolated_app.__file__)}:app", {"subprocess": Processes(60.0)})


def run(function: str, arguments: Any = None, **more: Any) -> StepResult:
    (result,) = attempted(isolated_app.app, function, arguments, apart=APART, **more)
    return result


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not is_gone(pid)]}"
        time.sleep(0.05)


async def written(path: Path) -> list[int]:
    await until(lambda: path.exists() and path.read_text() != "")
    return [int(word) for word in path.read_text().split()]  # noqa: ASYNC240 - a few bytes


def test_a_function_in_a_process_of_its_own_is_told_the_same_and_prints_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIDEGATE_KAFKA_SASL_PASSWORD", "secret")
    result = run("who", timeout_s=300)
    seen = json.loads(result.output)
    assert result.outcome == "succeeded"
    assert seen.pop("pid") != os.getpid()
    assert 0 < seen.pop("left_s") <= 300
    assert seen == {
        "key": "k",
        "run": "run-1",
        "step": "node-0-5-0",
        "attempt": 1,
        "account": "acme",
        "function": "who",
        "kafka": [],
    }


def test_a_policy_forces_a_function_out_of_the_process() -> None:
    assert json.loads(run("here").output) == os.getpid()
    assert json.loads(run("here", demanded="subprocess").output) != os.getpid()


def test_what_it_costs_and_when_it_ran_comes_back() -> None:
    result = run("add", {"a": 1, "b": 2})
    assert (result.output, result.actual_micros, result.usage) == ("3", 7, {"calls": 1})
    assert 0 < result.started_ms <= result.finished_ms
    assert run("doubled", "ab").output == '"abab"'


@pytest.mark.parametrize(("way", "status"), [("returns", 1), ("raises", 1), ("exits", 7)])
def test_a_child_that_a_function_forks_does_not_answer_for_it(way: str, status: int) -> None:
    result = run("fork", {"way": way})
    assert result.outcome == "succeeded"
    assert json.loads(result.output)["status"] == status


@pytest.mark.parametrize(
    ("function", "arguments", "error_class", "retryable"),
    [
        ("add", {"a": "x", "b": 2}, "BadArguments", False),
        ("refuse", {"text": "no"}, "NonRetryable", False),
        ("fail", {"text": "no"}, "OSError", True),
        ("eat", {"mib": 400}, "MemoryError", True),
        ("talk", {"characters": 2000}, "OutputTooLarge", False),
    ],
)
def test_how_it_fails(function: str, arguments: Any, error_class: str, retryable: bool) -> None:
    result = run(function, arguments)
    assert (result.outcome, result.error_class, result.retryable) == ("failed", error_class, retryable)


@pytest.mark.parametrize(("function", "arguments"), [("leave", {"status": 3}), ("be_killed", None)])
def test_how_it_dies(function: str, arguments: Any) -> None:
    result = run(function, arguments)
    assert (result.outcome, result.error_class, result.retryable) == ("died", "Died", True)


@pytest.mark.feature("T2")
@pytest.mark.parametrize(("is_entered", "outcome"), [(True, "died"), (False, "failed")])
def test_a_place_that_breaks_leaves_the_outcome_unknown_once_the_function_may_be_entered(
    is_entered: bool, outcome: str
) -> None:
    class Broken:
        async def run(self, _errand: Any, _settings: Any, *, enter: Callable[[], None], reported: Any) -> Ended:
            if is_entered:
                enter()
            raise OSError("no such socket")

    apart = Apart(APART.app, {"subprocess": Broken()})
    (result,) = attempted(isolated_app.app, "add", {"a": 1, "b": 2}, apart=apart, idempotent=False)
    assert (result.outcome, result.retryable) == (outcome, not is_entered)
    assert "no such socket" in result.error_message


def test_a_change_may_be_large_where_outputs_must_be_small() -> None:
    result = run("propose")
    assert (result.outcome, result.output, result.error_message) == ("succeeded", "1", "")
    assert len(result.change) > 200_000


def test_what_a_process_can_use_under_its_limit_it_can_use() -> None:
    assert run("eat", {"mib": 20}).output == str(20 * 1024 * 1024)


def test_a_death_of_unknown_effect_is_not_repeated_unless_that_is_harmless_and_its_cost_is_known() -> None:
    result = run("leave", {"status": 3}, idempotent=False)
    assert (result.outcome, result.retryable, result.actual_micros) == ("died", False, 3)
    assert "status 3" in result.error_message
    assert "it may have had its effect" in result.error_message


def test_a_timeout_kills_the_function_and_what_it_has_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    result = run("sleep_with_child", {"seconds": 600, "pids": str(pids)}, timeout_s=3)
    assert (result.outcome, result.actual_micros) == ("timed_out", 11)
    wait_until_gone([int(word) for word in pids.read_text().split()])


@pytest.mark.parametrize("how", ["cancel", "abort"])
def test_cancelling_kills_it_and_aborting_says_nothing(tmp_path: Path, how: str) -> None:
    pids = tmp_path / "pids"

    async def end(attempt: Attempt) -> None:
        await written(pids)
        getattr(attempt, how)()

    answers = attempted(
        isolated_app.app, "sleep_with_child", {"seconds": 600, "pids": str(pids)}, apart=APART, meanwhile=end
    )
    assert [answer.outcome for answer in answers] == (["cancelled"] if how == "cancel" else [])
    wait_until_gone([int(word) for word in pids.read_text().split()])


def test_what_a_function_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    assert run("leave_child", {"pids": str(tmp_path / "pids")}).output == '"done"'
    wait_until_gone([int((tmp_path / "pids").read_text())])


def test_it_is_not_entered_after_the_lease_lapsed_while_its_process_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    answers = attempted(
        isolated_app.app,
        "sleep_with_child",
        {"seconds": 1, "pids": str(pids)},
        apart=APART,
        lease_held=lambda: False,
    )
    assert answers == []
    assert not pids.exists()


def test_a_process_that_is_not_ready_in_time_has_not_been_started() -> None:
    slow = Apart(APART.app, {"subprocess": Processes(0.001)})
    (result,) = attempted(isolated_app.app, "add", {"a": 1, "b": 2}, apart=slow, idempotent=False)
    assert (result.error_class, result.retryable) == ("NotStarted", True)


def test_an_app_that_cannot_be_loaded_there_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such licence')")
    broken = Apart(f"{tmp_path / 'broken.py'}:app", {"subprocess": Processes(60.0)})
    (result,) = attempted(isolated_app.app, "add", {"a": 1, "b": 2}, apart=broken)
    assert (result.error_class, result.error_message) == (
        "NotStarted",
        "the app cannot be loaded: RuntimeError: no such licence",
    )


def test_processes_die_with_a_killed_executor(tmp_path: Path) -> None:
    """The function's process by the kernel; not what it has started itself (docs/isolation.md)."""
    pids = tmp_path / "pids"
    arguments = {"seconds": 600, "pids": str(pids)}
    program = (
        "import sys\n"
        "from unit.executor import test_processes as t\n"
        f"t.run('sleep_with_child', {arguments!r}, timeout_s=600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    executor = subprocess.Popen([sys.executable, "-c", program], env=environment)
    function, child = asyncio.run(asyncio.wait_for(written(pids), 60))
    executor.kill()
    executor.wait()
    try:
        wait_until_gone([function])
    finally:
        psutil.Process(child).kill()
