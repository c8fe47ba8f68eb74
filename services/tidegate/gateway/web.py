"""The web endpoints of the live view, on Faust's own web server."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from faust.web import Request, Response, View

from tidegate import metrics
from tidegate.domain.identity import is_run_id
from tidegate.gateway.figures import ACCOUNT, FIELDS, MINUTE_MS, Figures, Name, Tally, is_at_or_below
from tidegate.gateway.service import Gateway
from tidegate.gateway.view import LiveView, Place, RunRow

PAUSED: Final = "paused"  # no status, but people look for it as for one
DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 1000
LATEST_MS: Final = 2**62
MAX_WAIT_S: Final = 30.0
PEER_TIMEOUT_S: Final = 5.0
LOCAL: Final = "local"
MAX_MINUTES: Final = 31 * 24 * 60
WINDOW_MINUTES: Final = (5, 60, 24 * 60)

_Handler = Callable[..., Awaitable[Response]]
_encoder = msgspec.json.Encoder()


class BadRequestError(ValueError):
    """A parameter that makes no sense; the message says what would."""


class Api:
    """Answers requests: from our own partitions, and for the others by asking the gateways that own them."""

    def __init__(self, gateway: Gateway, own_url: str) -> None:
        self._gateway = gateway
        self._own_url = own_url
        page = gateway.app.page
        for path, handler in (
            ("/health", self._health),
            ("/ready", self._ready),
            ("/v1/runs", self._when_ready(self._runs)),
            ("/v1/runs/{run_id}", self._when_ready(self._run)),
            ("/v1/spend", self._when_ready(self._spend)),
            ("/v1/accounts", self._when_ready(self._accounts)),
            ("/v1/accounts/{account:.+}", self._when_ready(self._accounts)),
            ("/v1/functions", self._when_ready(self._functions)),
            ("/v1/functions/{function}", self._when_ready(self._functions)),
        ):
            page(path, name=path)(_handler(path, handler))

    # -- endpoints ---------------------------------------------------------------

    async def _health(self, view: View, request: Request) -> Response:
        """The process lives. What the numbers say is for people."""
        gateway = self._gateway
        body = {
            "ready": self._gateway.is_ready,
            "partitions": sorted(gateway.owned),
            "standby": sorted(gateway.standby),
            "runs": len(gateway.view.rows),
            "tallies": len(gateway.view.tallies.rows),
            "lag": gateway.lag(),
            "changelog_records": gateway.changelog_records,
            **vars(gateway.counters),
        }
        return _json(view, 200, body)

    async def _ready(self, view: View, request: Request) -> Response:
        """The view is complete as of the time when this process had its partitions."""
        return _json(
            view, 200 if self._gateway.is_ready else 503, {"ready": self._gateway.is_ready, "lag": self._gateway.lag()}
        )

    async def _run(self, view: View, request: Request, run_id: str) -> Response:
        """One run; with `after_seq` and `wait_ms` only when it is past that seq, or the time is over."""
        query = request.query
        if not is_run_id(run_id):  # and no path to ask others by
            return _unknown_run(view, run_id)
        peer = self._peer_of(run_id, query)
        if peer is not None:
            return await self._forwarded(view, peer, f"/v1/runs/{run_id}", query)
        after_seq = _whole(query, "after_seq", 0, 0, 2**62)
        wait_s = _whole(query, "wait_ms", 0, 0, int(MAX_WAIT_S * 1000)) / 1000
        if wait_s:
            was_ours = self._is_ours(run_id)
            await self._gateway.changed(run_id, after_seq, wait_s)
            if was_ours and not self._is_ours(run_id):
                return _restoring(view)
        row = self._gateway.view.rows.get(run_id)
        if row is None or row.status == "absent":
            return _unknown_run(view, run_id)
        return _json(view, 200, run_body(row))

    async def _runs(self, view: View, request: Request) -> Response:
        """The newest runs, without their steps."""
        query = request.query
        limit = _whole(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        own = [summary(row) for row in newest(self._gateway.view, query, limit)]
        answers, missing = await self._ask_peers("/v1/runs", query)
        rows = own + [row for answer in answers for row in answer["runs"]]
        rows.sort(key=lambda row: (row["started_ms"], row["run_id"]), reverse=True)
        page = rows[:limit]
        return _json(view, 200, {"runs": page, "next": _next_page(page, limit), "partitions_missing": missing})

    async def _spend(self, view: View, request: Request) -> Response:
        """What an account and all below it spent, per minute."""
        query = request.query
        since = since_asked(query, *self._now_and_kept())
        path = query.get("account", "")
        spent = self._gateway.view.tallies.spent(lambda tally: is_at_or_below(tally.name, path), since)
        answers, missing = await self._ask_peers("/v1/spend", {**query, "since_ms": str(since * MINUTE_MS)})
        for answer in answers:
            for account in answer["accounts"]:
                windows = spent.setdefault(account["account"], {})
                for window in account["windows"]:
                    minute = window["start_ms"] // MINUTE_MS
                    windows[minute] = windows.get(minute, 0) + window["micros"]
        return _json(view, 200, {**spend_body(spent, since), "partitions_missing": missing})

    async def _accounts(self, view: View, request: Request, account: str = "") -> Response:
        """What accounts did in the last minutes: one and all below it, or all."""

        def fits(tally: Tally) -> bool:
            return tally.kind == ACCOUNT and is_at_or_below(tally.name, account)

        return await self._figures(view, request, "accounts", account, fits)

    async def _functions(self, view: View, request: Request, function: str = "") -> Response:
        """What functions did in the last minutes: one, or all; of one kind if the query names it."""
        kind = request.query.get("kind", "")

        def fits(tally: Tally) -> bool:
            return tally.kind != ACCOUNT and function in ("", tally.name) and kind in ("", tally.kind)

        return await self._figures(view, request, "functions", function, fits)

    async def _figures(
        self, view: View, request: Request, what: str, name: str, fits: Callable[[Tally], bool]
    ) -> Response:
        """Answer with the sums of windows that end with a minute: this one, or that of `until_ms`; of all that is kept at most."""
        query = request.query
        if name and not may_be_named(name):
            return _nothing_counted(view, name)
        sizes, until = windows_asked(query, *self._now_and_kept())
        found = self._gateway.view.tallies.windows(fits, sizes, until)
        # Others cut windows where we do, whatever minute it is there.
        same = {"until_ms": str(until * MINUTE_MS), "since_ms": str((until - max(sizes) + 1) * MINUTE_MS)}
        answers, missing = await self._ask_peers(f"/v1/{what}", {**query, **same}, name)
        for answer in answers:
            for row in answer[what]:
                sums = found.setdefault(Name(row["kind"], row["name"]), [Figures() for _ in sizes])
                for sum_, window in zip(sums, row["windows"], strict=True):
                    sum_.add(Figures(*(window[field] for field in FIELDS)))
        if name and not found and not missing and query.get("scope") != LOCAL:
            return _nothing_counted(view, name)
        return _json(view, 200, {**figures_body(what, found, sizes, until), "partitions_missing": missing})

    def _now_and_kept(self) -> tuple[int, int]:
        """Return the minute that it is, and the first one that figures are kept of."""
        now = time.time_ns() // 1_000_000 // MINUTE_MS
        return now, self._gateway.view.kept_since(now)

    def _when_ready(self, handler: _Handler) -> _Handler:
        """Return the handler, but no half answers while the view is being restored."""

        async def answer(view: View, request: Request, **path: str) -> Response:
            if not self._gateway.is_ready:
                return _restoring(view)
            return await handler(view, request, **path)

        return answer

    # -- other gateways ---------------------------------------------------------------

    def _is_ours(self, run_id: str) -> bool:
        return self._gateway.partition_of(run_id) in self._gateway.owned

    def _peer_of(self, run_id: str, query: Mapping[str, str]) -> str | None:
        """Return the address of the gateway that owns the run, None if that is us (or nobody else is known)."""
        if self._is_ours(run_id) or "scope" in query:
            return None
        url = self._gateway.peers().get(self._gateway.partition_of(run_id))
        return None if url == self._own_url else url

    async def _forwarded(self, view: View, peer: str, path: str, query: Mapping[str, str]) -> Response:
        try:
            status, body = await self._ask(peer, path, query, MAX_WAIT_S + PEER_TIMEOUT_S)
        except (aiohttp.ClientError, TimeoutError) as error:
            return _error(
                view, 503, "peer_unavailable", f"the gateway at {peer}, which owns the run, does not answer: {error}"
            )
        return view.bytes(body, content_type="application/json", status=status)

    async def _ask_peers(self, path: str, query: Mapping[str, str], name: str = "") -> tuple[list[Any], list[int]]:
        """Return the other gateways' answers about all, or one name, and the partitions that nobody answered for."""
        if name:
            path = f"{path}/{quote(name, safe='')}"
        gateway = self._gateway
        if query.get("scope") == LOCAL:
            return [], []
        peers: dict[str, list[int]] = {}
        missing = []
        owners = gateway.peers()
        for partition in range(gateway.partition_count):
            if partition not in gateway.owned:
                url = owners.get(partition)
                if url is None or url == self._own_url:
                    missing.append(partition)
                else:
                    peers.setdefault(url, []).append(partition)
        results = await asyncio.gather(
            *(self._ask(url, path, query, PEER_TIMEOUT_S) for url in peers), return_exceptions=True
        )
        answers = []
        for partitions, result in zip(peers.values(), results, strict=True):
            if isinstance(result, BaseException) or result[0] != 200:
                missing += partitions
            else:
                answers.append(msgspec.json.decode(result[1]))
        return answers, sorted(missing)

    async def _ask(self, url: str, path: str, query: Mapping[str, str], timeout_s: float) -> tuple[int, bytes]:
        parameters = {**query, "scope": LOCAL}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self._gateway.app.http_client.get(
            f"{url.rstrip('/')}{path}", params=parameters, timeout=timeout
        ) as response:
            return response.status, await response.read()


def _handler(name: str, method: _Handler) -> Any:
    """Return a handler as Faust wants it: a plain function of the view and the request. It is timed under its name."""
    seconds = metrics.gateway_request_seconds.labels(name)

    async def answer(view: View, request: Request, **path: str) -> Response:
        began_s = time.monotonic()
        try:
            return await method(view, request, **path)
        except BadRequestError as error:
            return _error(view, 400, "bad_request", str(error))
        finally:
            if "wait_ms" not in request.query:
                seconds.observe(time.monotonic() - began_s)

    return answer


def _json(view: View, status: int, body: Any) -> Response:
    return view.bytes(_encoder.encode(body), content_type="application/json", status=status)


def _restoring(view: View) -> Response:
    """Return the answer while nobody can say: the view is being restored, or the group has just given the partition away."""
    return _error(view, 503, "restoring", "the live view is being restored; ask again in a moment")


def _error(view: View, status: int, code: str, message: str) -> Response:
    return _json(view, status, {"code": code, "message": message})


def _unknown_run(view: View, run_id: str) -> Response:
    return _error(view, 404, "unknown_run", f"the live view has no run {run_id}")


def _nothing_counted(view: View, name: str) -> Response:
    return _error(view, 404, "nothing_counted", f"the live view has counted nothing of {name} in that time")


def may_be_named(name: str) -> bool:
    """Tell whether an account or a function may have a name. In a path, `..` would lead to another page of the one who is asked."""
    return not {".", ".."} & set(name.split("/"))


def _whole(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    # ASCII digits, and no more of them than `most` has: there are digits and lengths that `int` does not take.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise BadRequestError(f"{name} must be a whole number from {least} to {most}, not {text[:40]!r}")
    return int(text)


# --- bodies -------------------------------------------------------------------------------------------------------------


def newest(view: LiveView, query: Mapping[str, str], limit: int) -> list[RunRow]:
    """Return the rows that a query asks for, those started last first. Raises BadRequestError."""
    since_ms, until_ms = _whole(query, "since_ms", 0, 0, LATEST_MS), _whole(query, "until_ms", LATEST_MS, 0, LATEST_MS)
    before = min(_place(query.get("before", "")), (until_ms, ""))
    wanted = {status for status in query.get("status", "").split(",") if status}
    workflow, account = query.get("workflow", ""), query.get("account", "")

    def fits(row: RunRow) -> bool:
        return (
            (row.status in wanted or (row.is_paused and PAUSED in wanted) if wanted else row.status != "absent")
            and (not workflow or row.workflow == workflow or row.workflow.startswith(f"{workflow}@"))
            and is_at_or_below(row.account, account)
        )

    young = itertools.takewhile(lambda row: row.started_ms >= since_ms, view.newest_first(before))
    return list(itertools.islice(filter(fits, young), limit))


def _place(text: str) -> Place:
    """Return where a page begins: behind the run that `next` of the page before named. Raises BadRequestError."""
    if not text:
        return LATEST_MS, ""
    started_ms, colon, run_id = text.partition(":")
    if not colon:
        raise BadRequestError("before must be what `next` of the page before said")
    return _whole({"before": started_ms}, "before", 0, 0, LATEST_MS), run_id


def _next_page(page: list[dict[str, Any]], limit: int) -> str | None:
    """Return what `before` asks for the next page; None if there is none."""
    return f"{page[-1]['started_ms']}:{page[-1]['run_id']}" if len(page) == limit else None


def summary(row: RunRow) -> dict[str, Any]:
    """Return what a list says of a run."""
    return {
        "run_id": row.run_id,
        "status": row.status,
        "workflow": row.workflow,
        "account": row.account,
        "seq": row.seq,
        "step_count": row.step_count,
        "succeeded_count": row.succeeded_count,
        "failed_count": row.failed_count,
        "cancelled_count": row.cancelled_count,
        "open_approvals": len(row.approvals),
        "open_waits": row.waiting_count,
        "paused": row.is_paused,
        "error": row.error,
        "started_ms": row.started_ms,
        "finished_ms": row.finished_ms or None,
        "updated_ms": row.updated_ms,
        "budget_micros": row.budget_micros,
        "spent_micros": row.spent_micros,
        "incomplete": row.incomplete,
    }


def run_body(row: RunRow) -> dict[str, Any]:
    """Return everything that the view knows of a run."""
    return {
        **summary(row),
        "cancel_requested": row.cancel_requested,
        "code": row.code,
        "output": row.output or None,
        "output_cut": row.output_cut,
        "approvals": list(row.approvals.values()),
        "waits": list(row.waits.values()),
        "steps": [
            {
                "step_id": step_id,
                "status": line.status,
                "attempt": line.attempt,
                "error": line.error,
                "waits_for": line.waits_for,
            }
            for step_id, line in row.steps.items()
        ],
    }


def windows_asked(query: Mapping[str, str], now: int, kept: int) -> tuple[tuple[int, ...], int]:
    """Return the lengths of windows of figures, and the minute that they end with.

    kept: the first minute that is kept. Those that nobody named begin no earlier. Raises BadRequestError.
    """
    minutes = _whole(query, "minutes", 0, 1, MAX_MINUTES)
    until = _whole(query, "until_ms", now * MINUTE_MS, 0, LATEST_MS) // MINUTE_MS
    # One minute is left over: it may be the next one by the time that another gateway is asked.
    since = _whole(query, "since_ms", 0 if minutes else (kept + 1) * MINUTE_MS, 0, LATEST_MS) // MINUTE_MS
    sizes = tuple(max(1, min(size, until - since + 1)) for size in ((minutes,) if minutes else WINDOW_MINUTES))
    _must_be_kept(until - max(sizes) + 1, now, kept)
    return sizes, until


def since_asked(query: Mapping[str, str], now: int, kept: int) -> int:
    """Return the minute from which on spend is asked for. kept: the first one that is kept. Raises BadRequestError."""
    minutes = _whole(query, "minutes", min(24 * 60, now - kept), 1, MAX_MINUTES)
    since = _whole(query, "since_ms", (now - minutes + 1) * MINUTE_MS, 0, LATEST_MS) // MINUTE_MS
    _must_be_kept(since, now, kept)
    return since


def _must_be_kept(since: int, now: int, kept: int) -> None:
    """Refuse a window of which a part is forgotten: its sums would be too small. Raises BadRequestError."""
    if since < kept:
        raise BadRequestError(
            f"the window begins at {since * MINUTE_MS} ms, and figures are kept from {kept * MINUTE_MS} ms on, for "
            f"{(now - kept) // 60} h: ask for a shorter or later one, ask ClickHouse, or raise TIDEGATE_GATEWAY_KEEP_H"
        )


def figures_body(
    what: str, found: Mapping[Name, Sequence[Figures]], sizes: Sequence[int], until_minute: int
) -> dict[str, Any]:
    """Return windows of figures, those of all together first. error_rate: null where no attempt ended."""
    total = [Figures() for _ in sizes]
    for sums in found.values():
        for sum_, one in zip(total, sums, strict=True):
            sum_.add(one)

    def windows(sums: Sequence[Figures]) -> list[dict[str, Any]]:
        return [
            {
                "minutes": size,
                "start_ms": (until_minute - size + 1) * MINUTE_MS,
                **{field: getattr(one, field) for field in FIELDS},
                "error_rate": one.errors / one.attempts if one.attempts else None,
            }
            for size, one in zip(sizes, sums, strict=True)
        ]

    return {
        "until_ms": (until_minute + 1) * MINUTE_MS,
        "total": windows(total),
        what: [
            {"kind": kind, "name": name, "windows": windows(found[Name(kind, name)])} for kind, name in sorted(found)
        ],
    }


def spend_body(spent: Mapping[str, Mapping[int, int]], since_minute: int) -> dict[str, Any]:
    """Return what accounts spent, window by window."""
    accounts = [
        {
            "account": account,
            "total_micros": sum(windows.values()),
            "windows": [{"start_ms": minute * MINUTE_MS, "micros": windows[minute]} for minute in sorted(windows)],
        }
        for account, windows in sorted(spent.items())
    ]
    return {
        "window_ms": MINUTE_MS,
        "since_ms": since_minute * MINUTE_MS,
        "total_micros": sum(account["total_micros"] for account in accounts),
        "accounts": accounts,
    }
