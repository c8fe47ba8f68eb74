"""Budgets: the documents that people put in force while a day goes on, and what the judge makes of them.

What a ledger's buckets hold is recomputed from its bytes by `tidegate.audit`. Here it is held against the documents: that an
attempt was counted in every bucket that concerns it, with the limits and top-ups in force, and that questions had answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tidegate import codec
from tidegate.audit.budgets import BudgetBooks
from tidegate.domain import canonical
from tidegate.domain import ledger_events as le
from tidegate.domain import run_events as re
from tidegate.domain.entry import Entry
from tidegate.domain.messages import PolicyPublished
from tidegate.domain.retry_documents import KEY_PREFIX, RetryDocuments

if TYPE_CHECKING:
    from simulation.work import Work

HOUR_MS: Final = 3_600_000
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "roots": {"account": "*", "window": "hour"},
    "teams": {"account": "acme/*", "window": "day"},
    "acme": {"account": "acme", "window": "total"},
    "runs": {"account": "*", "window": "run"},
    "flow": {"account": "*/*", "workflow": "w0", "window": "month"},
}
METERS: Final = {"micros": "money_micros", "calls": "calls", "wall_ms": "wall_seconds"}
PREFIXES: Final = (b"budget:", b"topup:", b"retry:", b"retention:")
RETENTION: Final = {"kind": "retention", "retention": "ledger", "version": "1", "keep_s": 1, "every_s": 2}
RULE: Final = "budget:"
AttemptKey = tuple[str, str, int]


class Treasury:
    """People who put budgets in force, change them, top them up and take them away."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.world = work.world
        self.rng = work.rng
        self.in_force: dict[str, dict[str, Any]] = {}
        self.retires = self.world.seed % 2 == 0

    def publish_budget(self) -> None:
        if self.retires:  # from here on, and for every other seed only
            self.retires = False
            self._write("retention:ledger", RETENTION)
        name = self.rng.choice(sorted(SHAPES))
        if name in self.in_force and self.rng.random() < 0.3:
            self._remove(name)
            return
        limits = {
            "money_micros": self.rng.choice((20, 100, 400)),
            "calls": self.rng.choice((2, 8, 30)),
            "wall_seconds": self.rng.choice((5, 30)),
        }
        document: dict[str, Any] = {
            **SHAPES[name],
            "limits": {meter: limits[meter] for meter in self.rng.sample(sorted(limits), self.rng.randint(1, 2))},
            "on_exceed": self.rng.choice(("deny", "ask", "pause", "pause")),
            "alerts": self.rng.choice(([], [50, 100])),
        }
        if document["on_exceed"] == "ask" and self.rng.random() < 0.5:
            document["expires_s"] = self.rng.choice((1, 5))
        self._publish(name, document)

    def top_up(self) -> None:
        """Give a bucket of some budget more room, whether it needs it or not."""
        if not self.in_force:
            return
        budget = self.rng.choice(sorted(self.in_force))
        is_per_run = self.in_force[budget]["window"] == "run"
        name = f"t{self.work.number()}"
        document = {
            "kind": "topup",
            "topup": name,
            "version": "1",
            "budget": budget,
            "account": self.rng.choice(("acme", "acme/support", "beta", "beta/x", "gamma")),
            "run": self.rng.choice(self.work.started[-6:]) if is_per_run and self.work.started else "",
            "at_ms": self.world.now_ms,
            "add": {self.rng.choice(("money_micros", "calls")): self.rng.choice((5, 50))},
        }
        self._write(f"topup:{name}", document)

    def publish_retry(self) -> None:
        """Say how failed attempts are repeated, or take back what was said."""
        name = self.rng.choice(("patient", "hasty"))
        if self.rng.random() < 0.3:
            self._write(f"retry:{name}", None)
            return
        settings: dict[str, Any] = {
            "max_attempts": self.rng.choice((1, 2, 4)),
            "backoff_ms": self.rng.choice((10, 300)),
        }
        if self.rng.random() < 0.5:
            settings["retry_rules"] = [{"on": ["Flaky"], "max_attempts": self.rng.choice((2, 5)), "backoff_ms": 50}]
        document = {
            "kind": "retry",
            "retry": name,
            "version": str(self.work.number()),
            "retries": settings,
            "account": self.rng.choice(("*", "acme", "beta/*")),
        }
        self._write(f"retry:{name}", document)

    def lift_pauses(self) -> None:
        """Let nothing wait for a budget any more: everything is to come to rest."""
        for name, document in sorted(self.in_force.items()):
            if document["on_exceed"] == "pause" and self.rng.random() < 0.5:
                self._publish(name, {**document, "limits": {"calls": 10**9}})
            elif document["on_exceed"] == "pause":
                self._remove(name)

    def _publish(self, name: str, document: dict[str, Any]) -> None:
        version = str(self.work.number())
        self.in_force[name] = document
        self._write(f"budget:{name}", {"kind": "budget", "budget": name, "version": version, **document})

    def _remove(self, name: str) -> None:
        del self.in_force[name]
        self._write(f"budget:{name}", None)

    def _write(self, key: str, document: dict[str, Any] | None) -> None:
        self.world.judge.budgets.document(key, document)
        row = document and _row(key, document)
        self.world.write("policies", 0, key, None if row is None else codec.encode(row))


def _row(key: str, document: dict[str, Any]) -> PolicyPublished:
    text = canonical.dumps(document)
    return PolicyPublished(policy_id=key, version=document["version"], document=text, by="sim", at_ms=0)


class Held(NamedTuple):
    """An attempt that waits for a human, as the ledger says."""

    rule: str
    expires_at_ms: int


class BudgetJudge:
    """Takes note of documents and events. require: raises its text if its condition does not hold."""

    def __init__(self, require: Callable[[object, str], None], books: BudgetBooks) -> None:
        self._require = require
        self._books = books
        self._written: list[tuple[int, str, dict[str, Any] | None]] = []
        self._next: tuple[str, dict[str, Any] | None] | None = None
        self._workflows: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._held: dict[AttemptKey, list[Held]] = {}
        self._asked: dict[tuple[str, str], re.ApprovalRequested] = {}
        self._yes: dict[AttemptKey, list[str]] = {}
        self._expired: set[AttemptKey] = set()
        self.counts: Counter[str] = Counter()

    def document(self, key: str, document: dict[str, Any] | None) -> None:
        """Hear what the next record of `policies` says; None: it removes the document."""
        self._next = (key, document)

    def written(self, offset: int) -> None:
        """Take the document that was announced: it is in the topic now."""
        assert self._next is not None
        self._written.append((offset, *self._next))

    def retries(self, version: int) -> RetryDocuments:
        """Return the retry documents that were in force at a version of the table."""
        found = RetryDocuments()
        for offset, key, document in self._written:
            if offset < version and key.startswith(KEY_PREFIX):
                found.take(key, document and _row(key, document))
        return found

    def _in_force(self, entry: Entry, kind: str) -> dict[str, dict[str, Any]]:
        latest = {key: doc for offset, key, doc in self._written if offset < entry.tables["policies"]}
        prefix = f"{kind}:"
        return {key.removeprefix(prefix): doc for key, doc in latest.items() if doc and key.startswith(prefix)}

    # -- runs ---------------------------------------------------------------

    def run_event(self, entry: Entry, event: Any) -> None:
        """Note who asked what, and who said yes."""
        if isinstance(event, re.ChildStarted):
            self._parents[event.child_run_id] = entry.subject
        elif isinstance(event, re.ApprovalRequested):
            self._asked[entry.subject, event.step_id] = event
        elif isinstance(event, re.AttemptEnded) and event.retry_document:
            self.counts["retries by documents"] += 1
        elif isinstance(event, re.ApprovalExpired):
            self._expired.add((entry.subject, event.step_id, event.attempt))
            self.counts["questions expired"] += 1
        elif isinstance(event, re.ApprovalResolved) and event.approved and event.why == "policy" and event.command_id:
            rule = self._asked[entry.subject, event.step_id].rule
            self._yes.setdefault((entry.subject, event.step_id, event.attempt), []).append(rule)

    def was_about_a_rule(self, run_id: str, step_id: str) -> bool:
        """Tell whether the latest question of a step was one of a rule, and not of a budget."""
        return not self._asked[run_id, step_id].rule.startswith(RULE)

    # -- the ledger ---------------------------------------------------------------

    def ledger_event(self, entry: Entry, event: Any) -> None:
        """An attempt is counted where documents say so, goes on after a question only with a yes, and waits only for a reason."""
        if isinstance(event, le.RunOpened):
            self._workflows[event.run_id] = event.workflow.partition("@")[0]
            return
        if not hasattr(event, "attempt"):
            return
        key = (event.run_id, event.step_id, event.attempt)
        if isinstance(event, le.Reserving):
            self._has_answers(key)
            self._is_counted(entry, event)
            if event.exceeds:
                self.counts["budgets exceeded"] += len(event.exceeds)
                is_allowed = any(rule.startswith(RULE) for rule in self._yes.get(key, ()))
                self._require(is_allowed, f"(5) {key} exceeds {event.exceeds}, which nobody allowed")
        elif isinstance(event, le.ApprovalHeld):
            self._held.setdefault(key, []).append(Held(event.rule, event.expires_at_ms))
            self._does(entry, event, "ask")
        elif isinstance(event, le.QuestionAnswered):
            self.counts["questions answered by documents"] += 1
            question = self._held[key].pop()
            self._require(question.rule.startswith(RULE), f"(2) {event.by} answered the question of {question.rule}")
        elif isinstance(event, le.ApprovalLapsed):
            due_ms = self._held[key][-1].expires_at_ms
            self._require(
                0 < due_ms <= entry.now_ms, f"(2) the question of {key} lapsed at {entry.now_ms}, due {due_ms}"
            )
        elif isinstance(event, le.AttemptPaused):
            self.counts["paused by families" if event.rule == "family" else "paused by budgets"] += 1
            self._does(entry, event, "pause")
        elif isinstance(event, le.AttemptRefused):
            self._does(entry, event, "deny")

    def _has_answers(self, key: AttemptKey) -> None:
        held, answers = self._held.get(key, []), self._yes.get(key, [])
        self._require(len(answers) >= len(held), f"(2) {key} goes on: {len(held)} questions, {len(answers)} times yes")
        self._require(key not in self._expired, f"(2) {key} goes on, though nobody answered in time")

    def _does(self, entry: Entry, event: Any, what: str) -> None:
        if event.rule.startswith(RULE):
            self.counts["without room"] += 1
            document = self._in_force(entry, "budget").get(event.rule.removeprefix(RULE))
            self._require(
                document and document["on_exceed"] == what, f"(5) {event.rule} made somebody {what}: {document}"
            )

    def _is_counted(self, entry: Entry, event: le.Reserving) -> None:
        expected: dict[str, dict[str, int | None]] = {}
        for name, document in self._in_force(entry, "budget").items():
            pattern, path = document["account"].split("/"), event.account.split("/")
            fits = len(pattern) <= len(path) and all(a in ("*", b) for a, b in zip(pattern, path, strict=False))
            if not fits or document.get("workflow", "") not in ("", self._workflows[event.run_id]):
                continue
            account, window = "/".join(path[: len(pattern)]), _window(document["window"], entry.now_ms)
            run_id = self._family(event.run_id) if document["window"] == "run" else ""
            key = f"{name}|{account}|{f'run:{run_id}' if run_id else window[0] if window[1] else 'total'}"
            expected[key] = self._limits(entry, name, document, account, run_id, window)
        self._require(
            set(event.buckets) == set(expected),
            f"(5) {event.run_id} {event.step_id}#{event.attempt} is counted in {event.buckets}, not {sorted(expected)}",
        )
        for key, limits in expected.items():
            bucket = self._books.buckets.get(key)
            said = {meter: bucket.limits[meter] for meter in METERS} if bucket is not None else limits
            self._require(said == limits, f"(5) {key} has limits {said}, its documents say {limits}")

    def _family(self, run_id: str) -> str:
        """Return the run that all runs above this one, and itself, are done for."""
        while run_id in self._parents:
            run_id = self._parents[run_id]
        return run_id

    def _limits(
        self, entry: Entry, name: str, document: dict[str, Any], account: str, run_id: str, window: tuple[int, int]
    ) -> dict[str, int | None]:
        found = {}
        for meter, field in METERS.items():
            limit = document["limits"].get(field)
            if limit is not None:
                limit *= 1000 if field == "wall_seconds" else 1
                limit += sum(
                    more["add"].get(field, 0)
                    for more in self._in_force(entry, "topup").values()
                    if (more["budget"], more["account"], more["run"]) == (name, account, run_id)
                    and (not window[1] or window[0] <= more["at_ms"] < window[1])
                )
            found[meter] = limit
        return found


def _window(unit: str, now_ms: int) -> tuple[int, int]:
    """Return from when until when a window lasts that holds a time, in UTC; (0, 0) for ever."""
    if unit in ("run", "total"):
        return 0, 0
    if unit in ("hour", "day"):
        length_ms = HOUR_MS if unit == "hour" else 24 * HOUR_MS
        return now_ms // length_ms * length_ms, (now_ms // length_ms + 1) * length_ms
    day = datetime.fromtimestamp(now_ms / 1000, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = day.replace(year=day.year + day.month // 12, month=day.month % 12 + 1)
    return int(day.timestamp() * 1000), int(following.timestamp() * 1000)
