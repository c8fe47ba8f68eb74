"""The refund demo: an executor is killed between the money moving and anybody knowing, and the customer is paid once."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tidegate.audit.money import Books, audit
from tidegate.cli.run_output import describe
from tidegate.demo.app import app
from tidegate.demo.payments import Payments
from tidegate.domain.identity import account_root, partition_of
from tidegate.embedded import sql
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.verification import Report, verify_partition
from tidegate.sdk.client import Client

APP: Final = "tidegate.demo.app:app"
EXECUTOR: Final = "executor-default-0"
ACCOUNT: Final = "acme/support"
BUDGET_MICROS: Final = 50_000
PROVIDER_DELAY_S: Final = "1.5"
RUN_TIMEOUT_S: Final = 60.0
PROJECTION_TIMEOUT_S: Final = 30.0

Say = Callable[[str], None]


class DemoError(RuntimeError):
    """The demo could not show what it wanted to show; the message says where it stopped."""


def make_stack(data_dir: Path, on_progress: Say) -> Stack:
    """Return the stack that the demo runs on: everything, and one executor whose payment provider is slow to answer."""
    pool = ExecutorPool(APP, slots=4, env={"TIDEGATE_DEMO_PROVIDER_DELAY_S": PROVIDER_DELAY_S})
    return Stack(data_dir, pools=[pool], on_progress=on_progress)


class RefundDemo:
    """Runs the demo on a started stack. `say` gets every line for people as it happens."""

    def __init__(self, stack: Stack, say: Say) -> None:
        self._stack = stack
        self._say = say
        self._payments = Payments(stack.data_dir / "payments.sqlite")
        self._order_id = f"order-{uuid.uuid4().hex[:6]}"
        self._killed_pid: int | None = None

    def run(self) -> dict[str, Any]:
        """Run it and return the proof. Blocks for some seconds. Raises DemoError, EventLogError."""
        began = time.monotonic()
        with Client(self._stack.settings, by="demo") as client:
            client.publish(app)
            run_id = client.start(
                agent="support", input={"order_id": self._order_id}, account=ACCOUNT, budget_micros=BUDGET_MICROS
            )
            self._say(f"run {run_id}: an agent handles the complaint about {self._order_id}")
            killer = threading.Thread(target=self._kill_in_the_refund, daemon=True)
            killer.start()
            self._show_time_line(client, run_id)
            killer.join(timeout=1.0)
            run = client.wait(run_id, RUN_TIMEOUT_S)
        if self._killed_pid is None:
            raise DemoError("the refund was over before the executor could be killed")
        if run.status != "succeeded":
            raise DemoError(f"the run ended as {run.status}: {run.code} {run.reason}")
        return self._prove(run_id, began)

    # -- what happens -------------------------------------------------------------------

    def _kill_in_the_refund(self) -> None:
        """Kill the executor as soon as the payment ledger shows the refund: its result has not reached Kafka then."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not self._payments.refunds(self._order_id):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        self._killed_pid = self._stack.kill(EXECUTOR)
        self._say(f"          the money has moved; kill -9 {self._killed_pid} (the executor), before anybody knows")

    def _show_time_line(self, client: Client, run_id: str) -> None:
        began_ms = 0
        for event in client.events(run_id, follow=True):
            began_ms = began_ms or event.at_ms
            self._say(f"  {event.at_ms - began_ms:>6} ms {event.type:<18} {describe(event)}")

    # -- the proof ----------------------------------------------------------------------

    def _prove(self, run_id: str, began: float) -> dict[str, Any]:
        wait_for_projection(self._stack.data_dir, self._stack.settings, run_id)
        dispatches = self._sql(
            "SELECT uniqExact(attempt) AS n FROM events "
            f"WHERE run_id = '{run_id}' AND type = 'AttemptDispatched' AND endsWith(step_id, 'tool:issue_refund')"
        )[0]["n"]
        money = self._sql(
            "SELECT sumIf(reserved_micros, type IN ('AttemptGranted', 'AttemptReserved')) AS reserved, "
            "sumIf(reserved_micros, type IN ('AttemptSettled', 'AttemptReleased')) AS ended, "
            f"sumIf(actual_micros, type = 'AttemptSettled') AS settled FROM ledger WHERE run_id = '{run_id}'"
        )[0]
        report = self._verify(run_id)
        books = self._audit()
        recomputed = books.runs[run_id]
        effects = self._payments.refunds(self._order_id)
        proof = {
            "run_id": run_id,
            "refund_dispatches": int(dispatches),
            "refund_effects": effects,
            "chain_verified": report.ok and report.events > 0,
            "reserved_micros": int(money["reserved"]),
            "settled_micros": int(money["settled"]),
            "money_recomputed": not books.problems and recomputed.settled_micros == int(money["settled"]),
            "seconds": round(time.monotonic() - began, 2),
        }
        open_micros = int(money["reserved"]) - int(money["ended"])
        ok = (
            proof["refund_dispatches"] == 2
            and proof["refund_effects"] == 1
            and proof["chain_verified"]
            and proof["money_recomputed"]
            and open_micros == recomputed.reserved_micros == 0
            and 0 < int(money["settled"]) <= BUDGET_MICROS
        )
        self._show(proof, report, books, open_micros)
        return {"ok": ok, **proof}

    def _show(self, proof: dict[str, Any], report: Report, books: Books, open_micros: int) -> None:
        """Say the proof, each line with where it comes from."""
        run = books.runs[proof["run_id"]]
        self._say("\nThe proof, each line the answer to a query:")
        self._say(f"  refund dispatched   {proof['refund_dispatches']} times     (ClickHouse, events)")
        self._say(f"  refunded            {proof['refund_effects']} time      (the payment provider's own ledger)")
        self._say(
            f"  chain verified      {proof['chain_verified']!s:<11} "
            f"({report.events} events in {report.entries} entries, run and ledger)"
        )
        self._say(
            f"  money               {proof['reserved_micros']} micro-dollars reserved, {proof['settled_micros']} settled, "
            f"{open_micros} left open (ClickHouse, ledger)"
        )
        self._say(
            f"  money recomputed    {run.settled_micros} settled, {run.reserved_micros} left open "
            "(from the ledger's bytes, with nothing of the gate)"
        )
        for problem in (*report.problems, *books.problems):
            self._say(f"    {problem}")

    def _verify(self, run_id: str) -> Report:
        """Verify the run's chain, and the whole partition of the ledger that paid for it."""
        broker = KafkaBroker(self._stack.settings)
        report = Report()
        counts = broker.describe(["run-events", "gate-ledger"])
        runs = partition_of(run_id, counts["run-events"].partition_count)
        ledger = partition_of(account_root(ACCOUNT), counts["gate-ledger"].partition_count)
        for topic, partition, only in (("run-events", runs, run_id), ("gate-ledger", ledger, None)):
            start, end = broker.offsets(topic, partition)
            verify_partition(broker.read(topic, partition, start, end), report, only)
        return report

    def _audit(self) -> Books:
        """Recompute the money of everybody from the ledger."""
        broker = KafkaBroker(self._stack.settings)
        count = broker.describe(["gate-ledger"])["gate-ledger"].partition_count
        return audit(broker.read("gate-ledger", n, *broker.offsets("gate-ledger", n)) for n in range(count))

    def _sql(self, query: str) -> list[dict[str, Any]]:
        try:
            return sql.query(self._stack.data_dir, query)
        except OSError as error:
            raise DemoError(f"the SQL endpoint does not answer: {error}") from error


def wait_for_projection(data_dir: Path, kafka: KafkaSettings, run_id: str) -> None:
    """Wait until the gate has closed the books of the run and all tables show it. Raises DemoError."""
    broker = KafkaBroker(kafka)
    closed = f"SELECT count() AS n FROM ledger WHERE run_id = '{run_id}' AND type = 'RunClosed'"
    deadline_s = time.monotonic() + PROJECTION_TIMEOUT_S
    try:
        while not int(sql.query(data_dir, closed)[0]["n"]):
            if time.monotonic() > deadline_s:
                raise TimeoutError("the ledger in ClickHouse does not show the end of the run")
            time.sleep(0.1)
        sql.wait_caught_up(data_dir, sql.log_ends(broker), PROJECTION_TIMEOUT_S)
    except OSError as error:  # TimeoutError too
        raise DemoError(f"{error}; see projection-0.log") from error
    finally:
        broker.close()
