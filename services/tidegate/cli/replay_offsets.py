"""`tidegate replay offsets`: have the projection read some of the log again, by resetting its consumer group in safety.

1. On Kubernetes the projection's workload is scaled to 0, after KEDA, if that scales it, was paused at 0. How many replicas it had,
   and whether KEDA was paused before, stands in annotations of them by then.
2. Kafka takes the new offsets as soon as the group has no members, and refuses them before: there is no race to lose.
3. The workload gets its replicas back, and loses the annotation, in one step; then KEDA goes on.
4. What the group has committed is followed until it has read all that was there when it was reset.

Every step can be done again. A command that was killed is given again, and finds the annotation: the replicas come back.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tidegate.cli.wording import moment_ms
from tidegate.cluster_api import FORBIDDEN, NOT_FOUND, ClusterApi, ClusterApiError, own_namespace
from tidegate.eventlog.interface import EventLogError, GroupInUseError, TopicPartition
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.failpoints import failpoint
from tidegate.projection.service import GATE_LEDGER, RUN_EVENTS, TOPICS
from tidegate.projection.settings import ProjectionSettings

ANNOTATION: Final = "tidegate.dev/replicas-before-reset"
# KEDA takes a ScaledObject with this annotation to so many replicas, and leaves it there.
PAUSED: Final = "autoscaling.keda.sh/paused-replicas"
PAUSED_BEFORE: Final = "tidegate.dev/paused-before-reset"
LOGS: Final = (RUN_EVENTS, GATE_LEDGER)
KINDS: Final = {"statefulset": "statefulsets", "deployment": "deployments"}
POLL_S: Final = 0.5
EXIT_FAILED, EXIT_USAGE = 1, 2

_notes = Console(stderr=True, highlight=False, soft_wrap=True)


def offsets(
    start: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="earliest|TIME|OFFSET",
            help="Where to read on: the beginning; a time (2026-01-31T12:00Z, or 90m, 12h, 7d ago), in all topics; an offset, in "
            "every partition of the logs.",
        ),
    ] = "earliest",
    workload: Annotated[
        str,
        typer.Option(
            metavar="statefulset/NAME|deployment/NAME",
            help="The projection's workload on Kubernetes, to be scaled down and up again; a ScaledObject of its name is paused "
            "meanwhile. Without it the projection must be stopped by hand.",
        ),
    ] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")] = "",
    wait_s: Annotated[
        float, typer.Option(help="How long to wait for the group to be empty: longer than its session, 10 s.")
    ] = 120.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which offsets would be set.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it has caught up.")] = False,
) -> None:
    """Have the projection read the log again from somewhere, by a safe reset of its consumer group.

    Rows are idempotent, so a reset is harmless wherever it goes to. To make tables anew without downtime use
    `tidegate replay projection`. Given again after it was killed, it goes on.

    Exit codes: 0 done; 1 it did not work, and what was scaled down is up again; 2 wrong usage.
    """
    group = ProjectionSettings().projection_group
    broker = KafkaBroker(KafkaSettings())
    try:
        scaled = _Workload(workload, namespace or own_namespace()) if workload else None
        positions, ends = _positions(broker, start)
        for at, to in sorted(positions.items()):
            typer.echo(f"  {at.topic}:{at.partition}  to {to} of {ends[at]}")
        if dry_run:
            return
        try:
            if scaled is not None:
                scaled.down()
            failpoint("replay-offsets.scaled-down")
            _reset(broker, group, positions, wait_s)
            failpoint("replay-offsets.reset")
        finally:
            if scaled is not None:
                scaled.up()
        typer.echo(f"group {group} reads on from there")
        if not detach and scaled is not None:
            _follow(broker, group, positions, ends)
            typer.echo("caught up")
    except (EventLogError, ClusterApiError) as error:
        _fail(str(error), EXIT_FAILED)
    finally:
        broker.close()


class _Workload:
    """A StatefulSet or a Deployment, how many replicas it is to have, and what scales it."""

    def __init__(self, reference: str, namespace: str) -> None:
        kind, _, name = reference.partition("/")
        if kind not in KINDS or not name:
            _fail(f"--workload: {reference!r} is neither statefulset/NAME nor deployment/NAME", EXIT_USAGE)
        self._path = f"/apis/apps/v1/namespaces/{namespace}/{KINDS[kind]}/{name}"
        self._scaler_path = f"/apis/keda.sh/v1alpha1/namespaces/{namespace}/scaledobjects/{name}"
        self._reference = reference
        self._api = ClusterApi()
        self._replicas: int | None = None  # while they are taken
        # While KEDA is paused by us: at how many replicas it was before; empty if it was not.
        self._paused: str | None = None

    def down(self) -> None:
        """Scale to 0; what was scaled to 0 by one of us who was killed stays so, and its replicas are remembered."""
        found = self._api.request("GET", self._path)
        noted = found["metadata"].get("annotations", {}).get(ANNOTATION)
        self._replicas = int(noted) if noted else int(found["spec"].get("replicas", 1))
        note = {"annotations": {ANNOTATION: str(self._replicas)}}
        self._api.request("PATCH", self._path, body={"metadata": note})
        self._pause()
        self._api.request("PATCH", self._path, body={"spec": {"replicas": 0}})
        _notes.print(f"{self._reference} is scaled to 0, from {self._replicas}")

    def up(self) -> None:
        """Give the replicas back, if they were taken."""
        if self._replicas is not None:
            body: dict[str, Any] = {
                "metadata": {"annotations": {ANNOTATION: None}},
                "spec": {"replicas": self._replicas},
            }
            self._api.request("PATCH", self._path, body=body)
            _notes.print(f"{self._reference} is scaled to {self._replicas}")
            self._replicas = None
        if self._paused is not None:
            self._annotate_scaler({PAUSED: self._paused or None, PAUSED_BEFORE: None})
            self._paused = None

    def _pause(self) -> None:
        """Pause the ScaledObject of the workload's name at 0, if there is one: it would give the replicas back at once."""
        try:
            found = self._api.request("GET", self._scaler_path)
        except ClusterApiError as error:
            if error.status == FORBIDDEN:
                _notes.print(f"not known whether KEDA scales {self._reference}, which would disturb: {error}")
            elif error.status != NOT_FOUND:  # neither there, nor KEDA
                raise
            return
        annotations = found["metadata"].get("annotations", {})
        paused = annotations.get(PAUSED_BEFORE, annotations.get(PAUSED, ""))
        self._annotate_scaler({PAUSED: "0", PAUSED_BEFORE: paused})
        self._paused = paused
        _notes.print(f"KEDA is paused for {self._reference}")

    def _annotate_scaler(self, annotations: dict[str, str | None]) -> None:
        self._api.request("PATCH", self._scaler_path, body={"metadata": {"annotations": annotations}})


def _positions(broker: KafkaBroker, start: str) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    """Return where to read on, and where the topics end now. Ends the command if `start` says nothing."""
    at_ms = None
    is_offset = start.isascii() and start.isdigit()
    if start != "earliest" and not is_offset:
        try:
            at_ms = moment_ms(start, time.time())
        except ValueError:
            _fail(f"--to: {start!r} is neither earliest, nor an offset, nor a time", EXIT_USAGE)
    positions, ends = {}, {}
    for topic, found in broker.describe(LOGS if is_offset else TOPICS).items():
        for number in range(found.partition_count):
            at, span = TopicPartition(topic, number), broker.offsets(topic, number)
            ends[at] = span.end
            wanted = int(start) if is_offset else span.start
            if at_ms is not None:
                wanted = broker.offset_at(topic, number, at_ms)
            positions[at] = min(max(wanted, span.start), span.end)
    if not positions:
        _fail(f"there are no topics {', '.join(TOPICS)}", EXIT_FAILED)
    return positions, ends


def _reset(broker: KafkaBroker, group: str, positions: dict[TopicPartition, int], wait_s: float) -> None:
    deadline_s = time.monotonic() + wait_s
    said = False
    while True:
        try:
            broker.reset_group(group, positions)
            return
        except GroupInUseError as error:
            if time.monotonic() > deadline_s:
                raise EventLogError(
                    f"{error}, also after {wait_s:g} s: stop every projection, or name its --workload"
                ) from None
            if not said:
                _notes.print(f"waiting until nobody is in group {group} any more …")
            said = True
        time.sleep(POLL_S)


def _follow(
    broker: KafkaBroker, group: str, positions: dict[TopicPartition, int], ends: dict[TopicPartition, int]
) -> None:
    """Show how far the group is until it has read all that was there. Blocks; Ctrl-C leaves the projection at it."""
    whole = sum(ends[at] - positions[at] for at in positions)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"))
    with Progress(*columns, console=_notes, transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task("reading", total=whole)
        while True:
            done = {topic: broker.committed(group, topic) for topic in {at.topic for at in positions}}
            left = sum(max(0, ends[at] - max(done[at.topic].get(at.partition, 0), positions[at])) for at in positions)
            bars.update(bar, completed=whole - left)
            if not left:
                return
            time.sleep(POLL_S)


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(f"tidegate replay offsets: {text}", err=True)
    raise typer.Exit(code) from None
