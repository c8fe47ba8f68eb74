"""Isolation `job`, against a small API server over HTTP that runs pods as processes; on a real cluster see tests/e2e."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import isolated_app
from support.attempts import attempted, until
from support.fake_cluster import Answer, FakeCluster, refused, serving
from tidegate.cluster_api import ClusterApi, ClusterApiError
from tidegate.domain.messages import StepResult
from tidegate.executor import endings, results
from tidegate.executor.attempt import Attempt
from tidegate.executor.isolation import Apart
from tidegate.executor.isolation.errand import Ended, Reported, errand_of
from tidegate.executor.isolation.job_log import (
    LINE_CHARACTERS,
    Voice,
    errand_from,
    heard_in,
    log_lines_wanted,
    variables_of,
)
from tidegate.executor.isolation.job_manifest import LABEL, Owner, label_value, limits_of
from tidegate.executor.isolation.jobs import Jobs, with_log
from tidegate.executor.settings import ExecutorSettings
from unit.executor.test_taking_tasks import task

pytestmark = pytest.mark.feature("T4")

APP = f"{Path(isolated_app.__file__)}:app"
OWNER = Owner("tools-team", "me")
SETTINGS = ExecutorSettings(
    job_namespace="jobs",
    job_image="registry.example/app:1",
    job_env={"REGION": "eu"},
    job_env_secrets=("keys",),
    job_pod={"nodeSelector": {"pool": "tools"}},
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with serving(FakeCluster("jobs", tmp_path), monkeypatch) as served:
        yield served


def jobs_of(settings: ExecutorSettings = SETTINGS, owner: Owner = OWNER) -> Jobs:
    return Jobs(ClusterApi(), settings, owner, poll_s=0.05)


def run(function: str, arguments: Any = None, *, settings: ExecutorSettings = SETTINGS, **more: Any) -> StepResult:
    apart = Apart(APP, {"job": jobs_of(settings)})
    (result,) = attempted(isolated_app.app, function, arguments, apart=apart, demanded="job", **more)
    return result


def test_a_function_runs_as_a_job_that_is_gone_afterwards(cluster: FakeCluster) -> None:
    seen = json.loads(run("who", timeout_s=300).output)
    assert (seen["key"], seen["run"], seen["step"], seen["attempt"]) == ("k", "run-1", "node-0-5-0", 1)
    assert 0 < seen["left_s"] <= 300
    assert seen["kafka"] == []  # what was sent to it is not in its environment either
    assert cluster.jobs == {}
    assert len(cluster.deleted) == 1


def test_the_job_says_whose_it_is_and_may_do_nothing_else(cluster: FakeCluster) -> None:
    assert run("as_job", {"text": "hello"}).output == '"hello"'
    (job,) = cluster.made
    labels = job["metadata"]["labels"]
    assert {name.removeprefix(LABEL): value for name, value in labels.items() if name.startswith(LABEL)} == {
        "namespace": "tools-team",
        "instance": "me",
        "job": job["metadata"]["name"],
        "run": "run-1",
        "step": "node-0-5-0",
        "attempt": "1",
    }
    spec = job["spec"]
    assert spec["template"]["metadata"]["labels"] == labels
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (0, 1, 1)
    assert spec["activeDeadlineSeconds"] == 120 + 5 + 60 + 10
    pod = spec["template"]["spec"]
    assert (pod["restartPolicy"], pod["automountServiceAccountToken"]) == ("Never", False)
    assert pod["nodeSelector"] == {"pool": "tools"}
    (container,) = pod["containers"]
    assert container["image"] == "registry.example/tools:1"
    assert container["resources"]["limits"] == {"memory": "96Mi"}
    assert container["resources"]["requests"] == {"memory": "96Mi", "cpu": "50m"}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "REGION", "value": "eu"} in container["env"]


def test_a_policy_forces_a_function_that_says_nothing_of_it_into_a_job(cluster: FakeCluster) -> None:
    run("here")
    (container,) = cluster.made[0]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/app:1"
    assert container["resources"]["limits"] == {"memory": "512Mi"}


def test_a_failure_keeps_the_end_of_the_log(cluster: FakeCluster) -> None:
    result = run("fail", {"text": "no disk"})
    assert (result.outcome, result.error_class, result.retryable) == ("failed", "OSError", True)
    assert result.error_message.startswith("no disk\nthe end of its log:\n")
    assert "about to fail" in result.error_message
    assert "tidegate-answer" not in result.error_message


@pytest.mark.parametrize(
    ("function", "arguments", "outcome", "error_class", "retryable"),
    [
        ("talk", {"characters": 2000}, "failed", "OutputTooLarge", False),
        ("be_killed", None, "died", "Died", True),
    ],
)
def test_how_it_fails(
    cluster: FakeCluster, function: str, arguments: Any, outcome: str, error_class: str, retryable: bool
) -> None:
    result = run(function, arguments)
    assert (result.outcome, result.error_class, result.retryable) == (outcome, error_class, retryable)
    assert cluster.jobs == {}


def test_arguments_that_fit_into_no_job_are_refused_at_once(cluster: FakeCluster) -> None:
    text = "".join(chr(0x4E00 + number * 7919 % 20000) for number in range(600_000))
    result = run("as_job", {"text": text})
    assert (result.error_class, result.retryable) == ("ErrandTooLarge", False)
    assert cluster.made == []


def test_a_timeout_ends_the_job_and_what_it_had_cost_is_known(cluster: FakeCluster, tmp_path: Path) -> None:
    arguments = {"seconds": 600, "pids": str(tmp_path / "pids")}
    result = run("sleep_with_child", arguments, timeout_s=3, idempotent=False)
    assert (result.outcome, result.retryable, result.actual_micros) == ("timed_out", False, 11)
    assert cluster.jobs == {}


def test_a_job_that_its_own_pod_does_not_end_is_ended_from_here(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.executor.isolation.job_manifest.CLOCKS_APART_S", 0)
    monkeypatch.setattr("tidegate.executor.isolation.job_manifest.END_S", -9.5)
    settings = SETTINGS.model_copy(update={"job_start_s": 10.0})
    arguments = {"seconds": 600, "pids": str(tmp_path / "pids")}
    result = run("sleep_with_child", arguments, settings=settings, timeout_s=12)
    assert (result.outcome, result.actual_micros) == ("timed_out", 11)
    assert cluster.jobs == {}


@pytest.mark.parametrize("how", ["cancel", "abort"])
def test_cancelling_deletes_the_job(cluster: FakeCluster, tmp_path: Path, how: str) -> None:
    pids = tmp_path / "pids"

    async def end(attempt: Attempt) -> None:
        await until(pids.exists)
        getattr(attempt, how)()

    answers = attempted(
        isolated_app.app,
        "sleep_with_child",
        {"seconds": 600, "pids": str(pids)},
        apart=Apart(APP, {"job": jobs_of()}),
        demanded="job",
        meanwhile=end,
    )
    assert [answer.outcome for answer in answers] == (["cancelled"] if how == "cancel" else [])
    assert cluster.jobs == {}


def test_a_pod_that_does_not_begin_is_given_up_and_nothing_has_happened(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.executor.isolation.job_manifest.CLOCKS_APART_S", 0.1)
    cluster.starts_pods = False
    result = run("here", settings=SETTINGS.model_copy(update={"job_start_s": 0.5}), idempotent=False)
    assert (result.error_class, result.retryable) == ("NotStarted", True)
    assert result.error_message == "its pod did not begin within 0.5 s: ImagePullBackOff; no such image"
    assert cluster.jobs == {}


def test_a_pod_that_begins_late_does_not_enter_the_function(cluster: FakeCluster) -> None:
    result = run("here", settings=SETTINGS.model_copy(update={"job_start_s": 0.01}), idempotent=False)
    assert (result.error_class, result.retryable) == ("NotStarted", True)


def test_a_pod_that_ends_without_an_answer_may_have_done_anything(cluster: FakeCluster) -> None:
    async def kill_pod(_: Attempt) -> None:
        await until(lambda: any(cluster.pods.values()))
        for process in cluster.pods.values():
            assert process is not None
            process.kill()

    (result,) = attempted(
        isolated_app.app,
        "here",
        apart=Apart(APP, {"job": jobs_of()}),
        demanded="job",
        idempotent=False,
        meanwhile=kill_pod,
    )
    assert (result.outcome, result.error_class, result.retryable) == ("died", "Died", False)
    assert "OOMKilled, exit code 137" in result.error_message


def test_it_is_not_made_after_the_lease_lapsed(cluster: FakeCluster) -> None:
    apart = Apart(APP, {"job": jobs_of()})
    assert attempted(isolated_app.app, "here", apart=apart, demanded="job", lease_held=lambda: False) == []
    assert cluster.made == []


def failing(count: int, *kinds: tuple[str, str]) -> Callable[[str, str], Answer | None]:
    """Return trouble: the first so many requests of these methods and ends of paths fail."""
    left = [count]

    def trouble(method: str, path: str) -> Answer | None:
        if left[0] and any(method == kind and path.endswith(end) for kind, end in kinds):
            left[0] -= 1
            return refused(503, "the server is currently unable to handle the request")
        return None

    return trouble


@pytest.mark.parametrize("kinds", [("POST", "/jobs"), ("GET", "/pods"), ("GET", "/log"), ("DELETE", "")])
def test_an_api_server_that_is_away_for_a_moment_is_asked_again(
    cluster: FakeCluster, kinds: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.executor.isolation.jobs.ASK_AGAIN_S", 0.05)
    cluster.trouble = failing(3, kinds)
    assert run("as_job", {"text": "x"}).output == '"x"'
    assert cluster.jobs == {}


def test_a_job_whose_making_was_not_answered_is_made_once(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.executor.isolation.jobs.ASK_AGAIN_S", 0.05)
    answer = cluster.answer

    def lose_the_first(method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        given = answer(method, path, query, body)
        return refused(504, "timed out") if method == "POST" and given[0] == 201 else given

    monkeypatch.setattr(cluster, "answer", lose_the_first)
    assert run("as_job", {"text": "x"}).output == '"x"'
    assert len(cluster.made) == 1


def test_what_the_executor_may_not_do_is_said_at_once(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was made there is nothing to delete, and the slot is free for others."""
    answer, asked = cluster.answer, list[str]()
    monkeypatch.setattr(cluster, "answer", lambda method, *more: (asked.append(method), answer(method, *more))[1])
    result = run("as_job", {"text": "x"}, settings=SETTINGS.model_copy(update={"job_namespace": "elsewhere"}))
    assert result.error_class == "NotStarted"
    assert "403 jobs.batch is forbidden in the namespace 'elsewhere'" in result.error_message
    assert asked == ["POST"]


def test_a_job_that_may_have_been_made_before_it_was_refused_is_deleted(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.executor.isolation.jobs.ASK_AGAIN_S", 0.05)
    answer = cluster.answer

    def lose_and_refuse(method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        if method == "POST" and cluster.made:
            return refused(403, "exceeded quota")  # by the one that was made
        given = answer(method, path, query, body)
        return refused(504, "timed out") if method == "POST" else given

    monkeypatch.setattr(cluster, "answer", lose_and_refuse)
    result = run("as_job", {"text": "x"})
    assert (result.error_class, len(cluster.made)) == ("NotStarted", 1)
    assert cluster.jobs == {}


def test_what_a_predecessor_left_is_deleted_before_anybody_hears_of_us_and_nothing_else(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """A killed executor deletes nothing: its next incarnation does."""
    pids = tmp_path / "pids"

    async def main() -> None:
        for owner in (OWNER, Owner("other-team", "me"), Owner("tools-team", "you")):
            left = jobs_of(owner=owner)
            wanted = msgspec.structs.replace(task(), instance_id=owner.instance_id)
            call = wanted.call
            assert call is not None
            arguments = json.dumps({"seconds": 600, "pids": str(pids)})
            call = msgspec.structs.replace(call, function="sleep_with_child", arguments=arguments, timeout_ms=600_000)
            settings = isolated_app.app.functions["sleep_with_child"].settings
            errand = errand_of(wanted, call, settings, app=APP, output_max_bytes=1000)
            running = asyncio.ensure_future(left.run(errand, settings, enter=lambda: None, reported=lambda _: None))
            made = len(cluster.made)
            await until(lambda: len(cluster.made) > made)  # noqa: B023 - awaited here
            # Killed: not even its last words are heard.
            left._delete_surely = lambda name: asyncio.sleep(0)  # type: ignore[method-assign]
            running.cancel()
        assert await jobs_of().clean_up() == 1

    asyncio.run(main())
    left = [job["metadata"]["labels"] for job in cluster.jobs.values()]
    assert {(one[f"{LABEL}namespace"], one[f"{LABEL}instance"]) for one in left} == {
        ("other-team", "me"),
        ("tools-team", "you"),
    }


def test_without_credentials_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterApiError, match="no way to log in"):
        ClusterApi()


# --- errand and answer through variables and logs ------------------------------------------------------------------------


def errand(text: str = "x", output_max_bytes: int = 500_000) -> Any:
    wanted = task()
    assert wanted.call is not None
    call = msgspec.structs.replace(wanted.call, arguments=json.dumps({"text": text}))
    settings = isolated_app.app.functions["here"].settings
    return errand_of(wanted, call, settings, app=APP, output_max_bytes=output_max_bytes)


def test_an_errand_travels_in_variables_and_leaves_none() -> None:
    text = "".join(chr(0x4E00 + number * 7919 % 20000) for number in range(200_000))
    wanted = errand(text)
    variables = variables_of(wanted, "a-job")
    assert max(map(len, variables.values())) < 128 * 1024
    assert len(variables) > 2
    variables["OTHER"] = "stays"
    assert errand_from(variables) == (wanted, "a-job")
    assert variables == {"OTHER": "stays"}


def test_an_answer_is_found_among_what_is_printed() -> None:
    said: list[bytes] = []
    voice = Voice("a-job", said.append)
    answers = [
        Reported(5, {"calls": 1}),
        Ended(endings.Ending(outcome=results.SUCCEEDED, output='"' + "\\n" * 200_000 + '"'), 1, 2),
    ]
    for one in answers:
        voice.say(one)
    assert max(map(len, said)) < LINE_CHARACTERS + 200
    noise = [b"noise\n", b"tidegate-answer another-job 1 1/1 e30=\n", b"tidegate-answer a-job 9 1/1 !!!\n"]
    log = b"".join(piece + noise[number % 3] for number, piece in enumerate(said)).decode()
    heard = heard_in(log, "a-job")
    assert list(heard.lines) == answers
    assert "noise" in heard.printed
    # Of the largest answer the end of the log that is read holds everything.
    assert len(said) < log_lines_wanted(errand(output_max_bytes=400_002))


def test_half_an_answer_is_none() -> None:
    said: list[bytes] = []
    Voice("a-job", said.append).say(Ended(endings.Ending(outcome=results.SUCCEEDED, output='"' + "x" * 50_000 + '"')))
    for lost in range(len(said)):
        assert heard_in(b"".join(said[:lost] + said[lost + 1 :]).decode(), "a-job").lines == ()


def test_the_message_of_a_failure_keeps_its_beginning_and_the_end_of_the_log() -> None:
    text = with_log("m" * 10_000, "a" * 10_000 + "the end")
    assert len(text) <= results.MAX_MESSAGE_CHARACTERS
    assert text.startswith("mmm")
    assert text.endswith("the end")


def test_labels_hold_any_name() -> None:
    assert label_value("run-1") == "run-1"
    for text in ("triage/2/tool:lookup", "x" * 64, "-x", ""):
        assert label_value(text).isalnum()
    assert label_value("a/b") != label_value("a/c")


def test_times_of_a_job_are_counted_from_one_allowance() -> None:
    limits = limits_of(errand(), SETTINGS)
    assert (limits.enter_s, limits.given_up_s, limits.over_s) == (120, 125, 136)
