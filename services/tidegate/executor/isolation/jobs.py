"""Functions in Kubernetes Jobs: one Job for one attempt, deleted when the attempt is over, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog

from tidegate.cluster_api import CONFLICT, NOT_FOUND, ClusterApi, ClusterApiError
from tidegate.executor import results
from tidegate.executor.endings import Ending, ErrandTooLargeError, died, not_started, raised
from tidegate.executor.isolation import job_log
from tidegate.executor.isolation.errand import Ended, Errand, Reported
from tidegate.executor.isolation.job_manifest import LABEL, Limits, Owner, limits_of, manifest, name_of
from tidegate.executor.settings import ExecutorSettings
from tidegate.sdk.functions import Settings

POLL_S: Final = 0.5
GONE_S: Final = 30.0  # how long the pods of a deleted Job are waited for
ASK_AGAIN_S: Final = 1.0
LOG_TRIES: Final = 5
MAX_PRINTED_CHARACTERS: Final = 3000  # of the end of the log, in the message of a failure
REFUSED: Final = (400, 401, 403, 404, 422)  # it will not be otherwise in a moment

_log = structlog.get_logger()


class Jobs:
    """Runs functions in Jobs of one namespace, through the API server. Belongs to the event loop."""

    def __init__(self, api: ClusterApi, settings: ExecutorSettings, owner: Owner, *, poll_s: float = POLL_S) -> None:
        self._api = api
        self._settings = settings
        self._owner = owner
        self._poll_s = poll_s
        self._began = str(time.time_ns())  # no two incarnations of an instance begin at the same moment
        self._path = f"/apis/batch/v1/namespaces/{settings.job_namespace}/jobs"
        self._pods_path = f"/api/v1/namespaces/{settings.job_namespace}/pods"

    async def clean_up(self) -> int:
        """Delete the Jobs that our predecessors have left; return how many there were.

        Blocks until their pods are gone, for a while: only then nobody can take the attempts to be lost while they go on.
        Raises ClusterApiError.
        """
        selector = {"labelSelector": self._owner.selector()}
        left = (await self._api.ask("GET", self._path, query=selector)).get("items", [])
        for job in left:
            await self._delete(job["metadata"]["name"])
        if left:
            _log.warning("deleting what a predecessor left running", jobs=len(left))
        if not await self._are_gone(self._owner.selector()):
            _log.error("pods of a predecessor are still there; their answers are ignored", after_s=GONE_S)
        return len(left)

    async def run(
        self, errand: Errand, settings: Settings, *, enter: Callable[[], None], reported: Callable[[Reported], None]
    ) -> Ended:
        """See `Isolation.run`. What cannot be known, as of a pod that is gone, ends as `died`."""
        limits = limits_of(errand, self._settings)
        errand = msgspec.structs.replace(
            errand,
            memory_mib=0,  # the container has a limit
            enter_before_ms=round((time.time() + limits.enter_s) * 1000),
        )
        name = name_of(errand, self._began)
        try:
            variables = job_log.variables_of(errand, name)
        except ErrandTooLargeError as error:
            return Ended(raised(error, has_returned=False))
        made = manifest(errand, settings, self._settings, self._owner, name=name, variables=variables)
        enter()
        began_s = time.monotonic()
        may_be_there = True
        try:
            problem, may_be_there = await self._make(made, limits, began_s)
            if problem:
                return Ended(not_started(problem))
            return await _Watch(self._api, self._pods_path, name, errand, limits, began_s, self._poll_s).until_over(
                self._give_up, reported
            )
        finally:
            if may_be_there:
                await asyncio.shield(asyncio.ensure_future(self._delete_surely(name)))

    async def _make(self, made: dict[str, Any], limits: Limits, began_s: float) -> tuple[str, bool]:
        """Make the Job; return why there will be none, empty if there is one, and whether there may be one all the same."""
        for number in itertools.count(1):
            try:
                await self._api.ask("POST", self._path, body=made)
                break
            except ClusterApiError as error:
                if error.status == CONFLICT:
                    break  # we made it, and the answer was lost
                if error.status in REFUSED or time.monotonic() - began_s > limits.enter_s:
                    # Who is refused at once may delete nothing either: trying would only keep the slot taken.
                    return f"its Job was not made: {error}", error.status not in REFUSED or number > 1
                await asyncio.sleep(ASK_AGAIN_S)
        return "", True

    async def _give_up(self, name: str) -> bool:
        """Delete a Job that did not begin; return whether it is certain that it never will."""
        await self._delete_surely(name)
        return await self._are_gone(f"{LABEL}job={name}")

    async def _delete_surely(self, name: str) -> None:
        deadline_s = time.monotonic() + GONE_S
        while time.monotonic() < deadline_s:
            try:
                await self._delete(name)
                return
            except ClusterApiError as error:
                _log.warning("a Job is not deleted yet", job=name, error=str(error))
                await asyncio.sleep(ASK_AGAIN_S)

    async def _delete(self, name: str) -> None:
        try:
            await self._api.ask("DELETE", f"{self._path}/{name}", query={"propagationPolicy": "Background"})
        except ClusterApiError as error:
            if error.status != NOT_FOUND:
                raise

    async def _are_gone(self, selector: str) -> bool:
        deadline_s = time.monotonic() + GONE_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(ClusterApiError):
                if not (await self._api.ask("GET", self._pods_path, query={"labelSelector": selector})).get("items"):
                    return True
            await asyncio.sleep(self._poll_s)
        return False


class _Watch:
    """Looks at the pod of one Job until it is over."""

    def __init__(
        self,
        api: ClusterApi,
        pods_path: str,
        name: str,
        errand: Errand,
        limits: Limits,
        began_s: float,
        poll_s: float,
    ) -> None:
        self._api = api
        self._pods_path = pods_path
        self._name = name
        self._errand = errand
        self._limits = limits
        self._began_s = began_s
        self._poll_s = poll_s
        self._pod: dict[str, Any] = {}  # as last seen
        self._trouble = ""

    async def until_over(self, give_up: Callable[[str], Any], reported: Callable[[Reported], None]) -> Ended:
        """Return how it ended. give_up(name): deletes the Job and says whether it is gone."""
        has_begun = False
        while True:
            is_gone = not await self._look()
            has_begun = has_begun or _has_begun(self._pod)
            if _is_over(self._pod) or (is_gone and has_begun):
                return await self._ended(reported)
            waited_s = time.monotonic() - self._began_s
            if not has_begun and waited_s > self._limits.given_up_s:
                why = f"its pod did not begin within {self._limits.enter_s:g} s: {self._why_not()}"
                if await give_up(self._name):
                    return Ended(not_started(why))
                return Ended(died(f"{why}; and it could not be deleted", idempotent=self._errand.idempotent))
            if waited_s > self._limits.over_s:
                return await self._ended(reported, Ending(outcome=results.TIMED_OUT))
            await asyncio.sleep(self._poll_s)

    async def _look(self) -> bool:
        """Look at the pod; return False if there is none. An API server that does not answer is asked again later."""
        try:
            found = await self._api.ask("GET", self._pods_path, query={"labelSelector": f"{LABEL}job={self._name}"})
        except ClusterApiError as error:
            self._trouble = str(error)
            return True
        pods = found.get("items", [])
        if pods:
            self._pod = pods[0]
        return bool(pods)

    async def _ended(self, reported: Callable[[Reported], None], unless: Ending | None = None) -> Ended:
        """Return how the log says that it ended; else `unless`, or that the pod died."""
        heard = await self._hear()
        ended = Ended(unless or died(self._how_it_died(), idempotent=self._errand.idempotent))
        for line in heard.lines:
            if isinstance(line, Reported):
                reported(line)
            elif isinstance(line, Ended):
                ended = line
        if ended.ending.outcome == results.SUCCEEDED or not heard.printed:
            return ended
        ending = msgspec.structs.replace(
            ended.ending, error_message=with_log(ended.ending.error_message, heard.printed)
        )
        return msgspec.structs.replace(ended, ending=ending)

    async def _hear(self) -> job_log.Heard:
        pod = self._pod.get("metadata", {}).get("name", "")
        wanted = {"tailLines": str(job_log.log_lines_wanted(self._errand))}
        for _ in range(LOG_TRIES if pod else 0):
            try:
                log = await self._api.ask_text("GET", f"{self._pods_path}/{pod}/log", query=wanted)
                return job_log.heard_in(log, self._name)
            except ClusterApiError as error:
                self._trouble = str(error)
                if error.status == NOT_FOUND:
                    break
                await asyncio.sleep(self._poll_s)
        return job_log.Heard((), "")

    def _how_it_died(self) -> str:
        state = _state(self._pod).get("terminated", {})
        seen = [
            self._pod.get("status", {}).get("reason", ""),
            state.get("reason", ""),
            f"exit code {state['exitCode']}" if "exitCode" in state else "",
            self._pod.get("status", {}).get("message", "") or state.get("message", ""),
        ]
        how = ", ".join(text for text in dict.fromkeys(seen) if text)
        return f"its pod ended without an answer ({how or self._trouble or 'it is gone'})"

    def _why_not(self) -> str:
        if not self._pod:
            return self._trouble or "it has none: a quota, or an admission rule of the namespace, perhaps"
        waiting = _state(self._pod).get("waiting", {})
        conditions = [one for one in self._pod.get("status", {}).get("conditions", []) if one.get("status") == "False"]
        texts = [waiting.get("reason"), waiting.get("message"), *(one.get("message") for one in conditions)]
        return "; ".join(dict.fromkeys(text for text in texts if text)) or "it is pending"


def with_log(message: str, printed: str) -> str:
    """Return the message of a failure with the end of the log behind it; together as long as a result may hold."""
    end = printed[-MAX_PRINTED_CHARACTERS:]
    head = message[: results.MAX_MESSAGE_CHARACTERS - MAX_PRINTED_CHARACTERS - 50]
    return f"{head}\nthe end of its log:\n{end}" if head else f"the end of its log:\n{end}"


def _state(pod: dict[str, Any]) -> dict[str, Any]:
    statuses = pod.get("status", {}).get("containerStatuses") or [{}]
    state: dict[str, Any] = statuses[0].get("state", {})
    return state


def _has_begun(pod: dict[str, Any]) -> bool:
    return "running" in _state(pod) or _is_over(pod)


def _is_over(pod: dict[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
